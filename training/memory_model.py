"""Peak GPU memory of one training step with DoRA, predicted from a model's config: no weights, no GPU.

It counts live bytes: bf16 activations under autocast, sdpa attention that keeps no scores, fp32 adapters under fused
AdamW. All rows are `cutoff_len` long.

    whole step      weights, adapters, their gradients (they outlive a forward under accumulation), Adam's two moments
    after forward   what the decoder layers keep; with checkpointing each layer's input alone
    then either     the loss, from the final norm to the gradient of its input,
    or              the backward of one layer: its recomputed activations, gradients, and W' or dZ of one linear

Not counted: tensors smaller than a row of tokens or a weight (n and g, partial sums), the attention mask of padded
rows, the allocator's rounding, and the CUDA context. `USABLE` leaves room for them.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

import dora_kernels as dk
from dora_kernels.models.targets import find_targets
from dora_kernels.ops import dispatch

MODEL_TYPES = ("llama", "qwen2", "qwen3")
LOSSES = ("tiled", "liger", "whole")
# The share of a card's memory that a step may use. The rest is for the CUDA context, libraries and fragmentation. An
# assumption.
USABLE = 0.92
# TRL's fused LM head projects tiles of this many tokens by this many words.
TRL_TILE = (4096, 32768)
BF16, FP32 = 2, 4
# fp32 tensors of its input's shape in an RMSNorm's backward, besides the saved one.
NORM_BACKWARD = 5


class Memory(NamedTuple):
    """Bytes by part. `loss` and `layer_backward` are not alive together: the larger one makes the peak."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    layer_backward: int

    @property
    def peak(self) -> int:
        """The most bytes that are alive at one time."""
        return sum(self[:5]) + max(self.loss, self.layer_backward)


class Planned(NamedTuple):
    """A model on the meta device, and the linear layers that get an adapter."""

    model: nn.Module
    targets: dict[str, nn.Module]
    rank: int
    quantize: bool
    weights: int  # bytes
    adapters: int  # bytes, fp32


def planned_model(
    config: PretrainedConfig, *, lora_r: int = 16, target_modules="all-linear", quantize: bool = False
) -> Planned:
    """The model of `config` on the meta device.

    Raises:
        ValueError: a model type whose layers the formulas do not describe, or targets outside its decoder layers.
    """
    if config.model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ValueError(f"the memory of model type {config.model_type!r} cannot be predicted; known are {known}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    targets = find_targets(model, dk.DoraConfig(r=lora_r, target_modules=target_modules))
    for path in targets:
        if not path.startswith("model.layers."):
            raise ValueError(f"target {path} is outside the decoder layers: only adapters inside them can be predicted")
    adapters = sum(lora_r * sum(linear.weight.shape) + linear.out_features for linear in targets.values())
    return Planned(model, targets, lora_r, quantize, weight_bytes(model, quantize), adapters * FP32)


def predict(
    planned: Planned, *, batch_size: int, cutoff_len: int, activation_checkpointing: bool = False, loss: str = "tiled"
) -> Memory:
    """Memory of a step over [batch_size, cutoff_len] tokens.

    `loss`: "tiled" is TRL's SFTTrainer, "liger" Liger's fused linear cross-entropy, "whole" transformers' own loss
    over all logits.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss should be one of {', '.join(LOSSES)}, got {loss!r}")
    config, tokens = planned.model.config, batch_size * cutoff_len
    layers = [_Layer(planned, layer, tokens) for layer in planned.model.model.layers]
    hidden = tokens * config.hidden_size
    if activation_checkpointing:
        activations = len(layers) * hidden * BF16
        backward = max(layer.kept + layer.backward for layer in layers)
    else:
        # The embedding's output takes no gradient, so the first norm keeps nothing.
        activations = sum(layer.kept for layer in layers) - hidden * FP32
        backward = max(layer.backward for layer in layers)
    # Cosine and sine of the positions, one row for all.
    activations += 2 * cutoff_len * layers[0].head_dim * BF16
    return Memory(
        weights=planned.weights,
        adapters=planned.adapters,
        gradients=planned.adapters,
        optimizer=2 * planned.adapters,
        activations=activations,
        # What the final norm keeps, and then the loss, or that norm's own backward.
        loss=hidden * FP32
        + max(loss_bytes(loss, tokens, config.hidden_size, config.vocab_size), NORM_BACKWARD * hidden * FP32),
        layer_backward=backward,
    )


def largest_batch(planned: Planned, card_gib: float, **step) -> int:
    """The most rows whose step fits into the usable part of a card of `card_gib` GiB; 0 if none does."""
    budget = card_gib * USABLE * 2**30

    def fits(batch_size: int) -> bool:
        return predict(planned, batch_size=batch_size, **step).peak <= budget

    if not fits(1):
        return 0
    bound = 1
    while fits(2 * bound):
        bound *= 2
    fitting, too_many = bound, 2 * bound
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
    return fitting


def weight_bytes(model: nn.Module, quantize: bool) -> int:
    """Bytes of the base in bf16, or with `quantize` in NF4 but for embeddings, norms and head."""
    total = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    for module in model.modules():
        if quantize and isinstance(module, nn.Linear) and module is not model.lm_head:
            total += nf4_bytes(module.weight.numel()) - module.weight.nbytes
    return total


def nf4_bytes(elements: int) -> int:
    """bitsandbytes' NF4 with double quantisation: 4.127 bits a weight."""
    blocks = math.ceil(elements / 64)
    return math.ceil(elements / 2) + blocks + FP32 * math.ceil(blocks / 256)


def loss_bytes(loss: str, tokens: int, hidden: int, vocab: int) -> int:
    """Bytes between the final norm's output and its gradient, without the norm's own."""
    if loss == "whole":
        # In the backward: log-probabilities, their gradient and the logits' gradient, all fp32.
        return 3 * tokens * vocab * FP32
    if loss == "liger":
        # The head's input, its gradient, and a chunk's logits.
        return 4 * tokens * hidden * BF16
    # The head's input, its gradient in fp32 and then rounded.
    tile = min(tokens, TRL_TILE[0]) * TRL_TILE[1] * BF16
    return tile + tokens * hidden * (BF16 + FP32 + BF16)


class _Layer:
    """One decoder layer: `kept` between forward and backward, and `backward`, the most that its backward adds."""

    def __init__(self, planned: Planned, layer: nn.Module, tokens: int):
        self.planned, self.tokens = planned, tokens
        self.adapted = {id(module) for module in planned.targets.values()}
        self.head_dim = layer.self_attn.head_dim
        attention, mlp = layer.self_attn, layer.mlp
        mlp_kept = self._mlp(mlp)
        self.kept = 2 * self._norm(layer.input_layernorm) + self._attention(attention) + mlp_kept
        hidden, wide = (tokens * size * BF16 for size in (mlp.down_proj.out_features, mlp.gate_proj.out_features))
        # Three heights of the layer's backward, each with the gradient of the layer's output: in down_proj's; in the
        # product's, where the gradients of both factors stand beside its own; and in the norm's before the MLP, which
        # takes five fp32 tensors when what the MLP kept is gone. Attention's is lower.
        down = hidden + wide + self._transient(mlp.down_proj)
        product = hidden + 3 * wide - ((wide + hidden) if self._is_adapted(mlp.down_proj) else 0)
        norm = hidden + NORM_BACKWARD * self._norm(layer.input_layernorm) - mlp_kept
        self.backward = max(down, product, norm)

    def _norm(self, norm: nn.Module) -> int:
        """An RMSNorm keeps its input in fp32."""
        return self.tokens * norm.weight.shape[0] * FP32

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

    def _adapter(self, linear: nn.Linear, output_is_kept: bool = False) -> int:
        """What a DoRA layer keeps beside its input: its output, or with a bias what comes before; in token space h."""
        if not self._is_adapted(linear):
            return 0
        output = 0 if output_is_kept and linear.bias is None else linear.out_features
        return self.tokens * (output + (self.planned.rank if self._space(linear) == "token" else 0)) * BF16

    def _transient(self, linear: nn.Linear) -> int:
        """W', or a dequantised W, in weight space; dZ in token space; nothing for a plain frozen linear."""
        if not self._is_adapted(linear):
            return linear.weight.numel() * BF16 if self.planned.quantize else 0
        elements = linear.weight.numel() if self._space(linear) == "weight" else self.tokens * linear.out_features
        return elements * BF16

    def _space(self, linear: nn.Linear) -> str:
        """The form that a DoRA layer takes."""
        problem = dispatch.Problem(
            tokens=self.tokens,
            out_features=linear.out_features,
            in_features=linear.in_features,
            dtype=torch.bfloat16,
            device=linear.weight.device,
            rank=self.planned.rank,
            has_bias=linear.bias is not None,
            is_packed=self.planned.quantize,
        )
        return dispatch.choose(problem).space

    def _is_adapted(self, linear: nn.Module) -> bool:
        return id(linear) in self.adapted
