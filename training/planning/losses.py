"""What stands for a fused loss: it allocates what the real one does."""

import torch

LOSSES = ("tiled", "liger", "whole")
"""TRL's SFTTrainer; Liger's fused linear cross-entropy; transformers' own, which needs no stand-in."""
# TRL's fused LM head projects tiles of this many tokens by this many words.
TRL_TILE = (4096, 32768)


class TiledLoss(torch.autograd.Function):
    """TRL's: gradients of the head's input and weight are summed in fp32 in the backward, then rounded."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        rows = hidden.numel() // hidden.shape[-1]
        tile = hidden.new_empty(min(rows, TRL_TILE[0]), TRL_TILE[1])
        wanted = [t if need else None for t, need in zip((hidden, weight), ctx.needs_input_grad)]
        sums = [None if t is None else torch.empty_like(t, dtype=torch.float32) for t in wanted]
        del tile  # after the sums: they were made while it was there
        return tuple(None if total is None else total.to(t.dtype) for total, t in zip(sums, wanted))


class LigerLoss(torch.autograd.Function):
    """Liger's: the gradients are made in the forward, beside a chunk's logits in two types, as large as the input."""

    @staticmethod
    def forward(ctx, hidden, weight):
        needs = ctx.needs_input_grad
        grads = [torch.empty_like(t) if need else None for t, need in zip((hidden, weight), needs)]
        chunk = torch.empty_like(hidden, dtype=torch.float32)
        del chunk
        ctx.save_for_backward(*grads)
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors


STAND_INS = {"tiled": TiledLoss, "liger": LigerLoss}
