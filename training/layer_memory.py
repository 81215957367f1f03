"""Bytes that one decoder layer with DoRA keeps between forward and backward, and the most that its backward adds.

The layer is Llama's or like it, in bf16. `memory_model` says what is left out.
"""

from typing import NamedTuple

import torch
from torch import nn

from dora_kernels.ops import dispatch
from dora_kernels.ops.overhead import glu_overhead, layer_overhead
from dora_kernels.ops.recomputation import MOST_KEPT

BF16, FP32 = 2, 4
# fp32 tensors of its input's shape in an RMSNorm's backward, besides the saved one.
NORM_BACKWARD = 5

Call = tuple[nn.Linear, ...]
"""Linear layers that are computed together."""


class Adapters(NamedTuple):
    """Which layers are adapted, by their identity, and how."""

    adapted: frozenset[int]
    rank: int
    quantize: bool
    fuse_blocks: bool


class LayerMemory:
    """`kept` between forward and backward, and the most that the backward adds to it: `backward`, or
    `recomputed_backward` where the forward is run again and leaves every W' to the backward."""

    def __init__(self, layer: nn.Module, adapters: Adapters, tokens: int):
        self.adapters, self.tokens = adapters, tokens
        self.head_dim = layer.self_attn.head_dim
        attention, mlp = layer.self_attn, layer.mlp
        of_mlp = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        self.is_block = adapters.fuse_blocks and all(map(self._is_adapted, of_mlp))
        self.of_attention = [(attention.q_proj,), (attention.k_proj,), (attention.v_proj,), (attention.o_proj,)]
        self.of_mlp = [of_mlp[:2], of_mlp[2:]] if self.is_block else [(linear,) for linear in of_mlp]
        self.norm = tokens * layer.input_layernorm.weight.shape[0] * FP32  # an RMSNorm keeps its input in fp32
        self.mlp_kept = self._block(mlp) if self.is_block else self._mlp(mlp)
        self.kept = 2 * self.norm + self._attention(attention) + self.mlp_kept
        self.backward, self.recomputed_backward = self._backward(mlp, []), self._backward(mlp, self._left())

    def _backward(self, mlp: nn.Module, left: list[Call]) -> int:
        """`left` are the calls whose W' is there already.

        The heights are those of the MLP and of the norm before it, each with the gradient of the layer's output. The
        norm's takes five fp32 tensors when what the MLP kept is gone. Attention's is lower.
        """
        hidden, wide = (self.tokens * size * BF16 for size in (mlp.down_proj.out_features, mlp.gate_proj.out_features))
        first, down = (0 if call in left else self._transient(call) for call in (self.of_mlp[0], self.of_mlp[-1]))
        merged = {call: self._merged(call) for call in left}
        if self.is_block:
            # da; the pass over it, which writes the gradients of both products; then dx of these.
            heights = [wide + down, 3 * wide, 2 * wide + hidden + first]
        else:
            # down_proj's; the product's, where the gradients of both factors stand beside its own.
            freed = wide + hidden if self._is_adapted(mlp.down_proj) else 0
            heights = [wide + down, 3 * wide - freed - merged.get(self.of_mlp[-1], 0)]
        mlp_height = max(heights) + sum(merged.values())
        norm_height = NORM_BACKWARD * self.norm - self.mlp_kept
        norm_height += sum(size for call, size in merged.items() if call not in self.of_mlp)
        return hidden + max(mlp_height, norm_height)

    def _left(self) -> list[Call]:
        """The calls whose W' a recomputation leaves to the backward."""
        left, size = [], 0
        for call in self.of_attention + self.of_mlp:
            if self._space(call) == "weight" and size + self._merged(call) <= MOST_KEPT:
                left.append(call)
                size += self._merged(call)
        return left

    def _attention(self, attention: nn.Module) -> int:
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (linear.out_features for linear in projections)
        # sdpa keeps the rotated query and key, the value, its output (o_proj's input) and fp32 log-sums.
        elements = query + key + value + query
        kept = self.tokens * (elements * BF16 + attention.config.num_attention_heads * FP32)
        if any(map(self._is_adapted, projections)):
            kept += self.tokens * attention.q_proj.in_features * BF16
        if hasattr(attention, "q_norm"):  # Qwen3 normalises each head
            kept += self.tokens * (query + key) * FP32
        kept += self._adapter(attention.q_proj) + self._adapter(attention.k_proj)
        return kept + self._adapter(attention.v_proj, output_is_kept=True) + self._adapter(attention.o_proj)

    def _mlp(self, mlp: nn.Module) -> int:
        # SwiGLU keeps gate, up and silu(gate); their product is down_proj's input.
        kept = 3 * self.tokens * mlp.gate_proj.out_features * BF16
        if self._is_adapted(mlp.gate_proj) or self._is_adapted(mlp.up_proj):
            kept += self.tokens * mlp.gate_proj.in_features * BF16
        if self._is_adapted(mlp.down_proj):
            kept += self.tokens * mlp.down_proj.in_features * BF16
        kept += self._adapter(mlp.gate_proj, output_is_kept=True) + self._adapter(mlp.up_proj, output_is_kept=True)
        return kept + self._adapter(mlp.down_proj)

    def _block(self, mlp: nn.Module) -> int:
        """The products of gate and up are kept, neither silu(gate) nor down_proj's input."""
        products, x = 2 * mlp.gate_proj.out_features, mlp.gate_proj.in_features
        h = 2 * self.adapters.rank if self._space(self.of_mlp[0]) == "token" else 0
        return self.tokens * (x + products + h) * BF16 + self._adapter(mlp.down_proj)

    def _adapter(self, linear: nn.Linear, output_is_kept: bool = False) -> int:
        """What a DoRA layer keeps beside its input: its output, or with a bias what comes before; in token space h."""
        if not self._is_adapted(linear):
            return 0
        output = 0 if output_is_kept and linear.bias is None else linear.out_features
        return self.tokens * (output + (self.adapters.rank if self._space((linear,)) == "token" else 0)) * BF16

    def _merged(self, call: Call) -> int:
        return sum(linear.weight.numel() for linear in call) * BF16

    def _transient(self, call: Call) -> int:
        """W', or a dequantised W, in weight space; dZ of one linear in token space; nothing for a plain frozen one."""
        if not self._is_adapted(call[0]):
            return self._merged(call) if self.adapters.quantize else 0
        if self._space(call) == "weight":
            return self._merged(call)
        return self.tokens * call[0].out_features * BF16 if len(call) == 1 else 0

    def _space(self, call: Call) -> str | None:
        """The form that a call takes; None for a frozen layer."""
        first = call[0]
        if not self._is_adapted(first):
            return None
        problem = dispatch.Problem(
            tokens=self.tokens,
            out_features=sum(linear.out_features for linear in call),
            in_features=first.in_features,
            dtype=torch.bfloat16,
            device=first.weight.device,
            rank=self.adapters.rank,
            has_bias=first.bias is not None,
            is_packed=self.adapters.quantize,
        )
        return dispatch.choose(problem, overhead=layer_overhead if len(call) == 1 else glu_overhead).space

    def _is_adapted(self, linear: nn.Module) -> bool:
        return id(linear) in self.adapters.adapted
