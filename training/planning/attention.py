"""What stands for `scaled_dot_product_attention`: it keeps what a GPU's fused attention keeps, and no scores."""

import torch


class FusedAttention(torch.autograd.Function):
    """The output [batch, heads, length, value features], laid out as the query, and fp32 log-sums of each row's
    scores."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        output = torch.empty_like(query)
        if value.shape[-1] != query.shape[-1]:
            batch, heads, length, _ = query.shape
            output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.empty_like(mask, dtype=query.dtype)  # PyTorch adds masks to the scores, and converts others
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, log_sums)
        return output

    @staticmethod
    def backward(ctx, grad):
        return *map(torch.empty_like, ctx.saved_tensors[:3]), None


def fused_attention(query, key, value, attn_mask=None, *args, **kwargs) -> torch.Tensor:
    """By `scaled_dot_product_attention`'s arguments."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    return FusedAttention.apply(query, key, value, attn_mask)
