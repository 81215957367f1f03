"""Peak GPU memory of one training step with DoRA, predicted from a model's config: no weights, no GPU.

It counts live bytes: bf16 activations under autocast, sdpa attention that keeps no scores, fp32 adapters under fused
AdamW. All rows are `cutoff_len` long.

    whole step      weights, adapters, their gradients (they outlive a forward under accumulation), Adam's two moments
    after forward   what the decoder layers keep; with checkpointing each layer's input alone
    then either     the loss, from the final norm to the gradient of its input,
    or              the backward of one layer: its recomputed activations and W', gradients, and W' or dZ of one call

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

from .layer_memory import BF16, FP32, NORM_BACKWARD, Adapters, LayerMemory

MODEL_TYPES = ("llama", "qwen2", "qwen3")
LOSSES = ("tiled", "liger", "whole")
# The share of a card's memory that a step may use. The rest is for the CUDA context, libraries and fragmentation. An
# assumption.
USABLE = 0.92
# TRL's fused LM head projects tiles of this many tokens by this many words.
TRL_TILE = (4096, 32768)


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
    fuse_blocks: bool  # MLPs whose layers are all adapted are one function


def planned_model(
    config: PretrainedConfig,
    *,
    lora_r: int = 16,
    target_modules="all-linear",
    quantize: bool = False,
    fuse_blocks: str | bool = "auto",
) -> Planned:
    """The model of `config` on the meta device; `fuse_blocks` is `DoraConfig`'s.

    Raises:
        ValueError: a model type whose layers the formulas do not describe, or targets outside its decoder layers.
    """
    if config.model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ValueError(f"the memory of model type {config.model_type!r} cannot be predicted; known are {known}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    targets = find_targets(model, dk.DoraConfig(r=lora_r, target_modules=target_modules, fuse_blocks=fuse_blocks))
    for path in targets:
        if not path.startswith("model.layers."):
            raise ValueError(f"target {path} is outside the decoder layers: only adapters inside them can be predicted")
    adapters = sum(lora_r * sum(linear.weight.shape) + linear.out_features for linear in targets.values())
    weights = weight_bytes(model, quantize)
    return Planned(model, targets, lora_r, quantize, weights, adapters * FP32, bool(fuse_blocks))


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
    adapters = Adapters(
        frozenset(map(id, planned.targets.values())), planned.rank, planned.quantize, planned.fuse_blocks
    )
    layers = [LayerMemory(layer, adapters, tokens) for layer in planned.model.model.layers]
    hidden = tokens * config.hidden_size
    if activation_checkpointing:
        # Each layer's input; and of each adapted one n and g, which the recomputation takes from its forward.
        activations = len(layers) * hidden * BF16
        activations += 2 * FP32 * sum(linear.out_features for linear in planned.targets.values())
        backward = max(layer.kept + layer.recomputed_backward for layer in layers)
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
