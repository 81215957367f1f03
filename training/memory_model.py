"""Peak GPU memory of one training step with DoRA, predicted from a model's config: no weights, no GPU.

The step is counted on tensors without values: live bytes, bf16 activations under autocast, attention that keeps no
scores where the model's is sdpa, fp32 adapters under fused AdamW. All rows are `cutoff_len` long.

    whole step      weights, adapters, their gradients (they outlive a forward under accumulation), Adam's two moments
    after forward   what the decoder layers keep; with checkpointing each layer's input alone
    then either     the loss, from the final norm to the gradient of its input,
    or              one layer at work: its forward, or its backward with what that recomputes

Not counted: the attention mask of padded rows, the allocator's rounding, and the CUDA context. `USABLE` leaves room for
them.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import dora_kernels as dk
from dora_kernels.layers.experts import frozen_experts
from dora_kernels.layers.support import why_not_class
from dora_kernels.models.expert_targets import how_to_adapt
from dora_kernels.models.targets import find_targets, idle_exclusions

from .planning.formats import weight_bytes
from .planning.losses import LOSSES
from .planning.step import Counted, CountedModel, Step

# The share of a card's memory that a step may use. The rest is for the CUDA context, libraries and fragmentation. An
# assumption.
USABLE = 0.92


class Memory(NamedTuple):
    """Bytes by part. `loss` and `layer_backward` are not alive together: the larger one makes the peak."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    kept: int  # over micro-steps: W', norms and copies of the adapters
    activations: int
    loss: int
    layer_backward: int

    @property
    def peak(self) -> int:
        """The most bytes that are alive at one time."""
        return sum(self[:6]) + max(self.loss, self.layer_backward)


class Planned:
    """A model to be counted, and what was counted of it. `notes` are sentences on what is not as one might expect."""

    def __init__(self, model: PreTrainedModel, dora: dk.DoraConfig, base_format: str):
        targets = find_targets(model, dora) if dora.target_modules else {}
        self.config, self.can_checkpoint = model.config, model.supports_gradient_checkpointing
        self.weights = weight_bytes(model, base_format)
        self.notes = list(_notes(model, dora))
        self._steps: dict[tuple, dict[int, Step]] = {}
        for path in targets:
            why_not_class(model.get_submodule(path))  # remembered: it tries out small layers, which need values
        with self._refused(but=ValueError):  # which names the targets
            self._model = CountedModel(model, dora, list(targets), base_format)
        self.trained = self._model.trained()
        if left_out := len(targets) - self.trained.layers:
            self.notes.append(f"{left_out} of {len(targets)} linear layers stay frozen: training says why")

    def count(self, batch_size: int, *step) -> Counted:
        """As `CountedModel.count`; between two batches that issue the same operations memory is a straight line."""
        steps = self._steps.setdefault(step, {})
        below = max((other for other in steps if other <= batch_size), default=None)
        above = min((other for other in steps if other >= batch_size), default=None)
        if None in (below, above) or steps[below].operations != steps[above].operations:
            with self._refused():
                steps[batch_size] = self._model.count(batch_size, *step)
            below = above = batch_size
        share = (batch_size - below) / max(1, above - below)
        return self._model.of_all(steps[below].between(steps[above], share))

    @contextmanager
    def _refused(self, but: type | tuple = ()) -> Iterator[None]:
        """Whatever the model's own code raises becomes a sentence."""
        try:
            yield
        except but:
            raise
        except Exception as error:
            reason = f"{error}".strip().partition("\n")[0] or type(error).__name__
            kind = self.config.model_type
            raise ValueError(f"a step of model type {kind} cannot be counted without values: {reason}") from None


def _notes(model: PreTrainedModel, dora: dk.DoraConfig) -> Iterator[str]:
    has_attention = hasattr(model.config, "num_attention_heads")
    if has_attention and (attention := model.config._attn_implementation) != "sdpa":
        yield f"attention is {attention}: its scores are counted"
    if idle := idle_exclusions(model, dora):
        yield idle
    if experts := frozen_experts(model):
        if dora.target_parameters:
            yield "experts have tokens × top_k rows in a layer, however the router shares them out"
        else:
            yield f"{sum(experts.values()):,} parameters of fused experts stay frozen: {how_to_adapt(model)}"


def planned_model(config: PretrainedConfig, dora: dk.DoraConfig | None = None, *, base_format: str = "") -> Planned:
    """The model of `config`, with the adapters of `dora`; its linear layers in one of `formats.NAMES`, or in bf16.

    Raises:
        ValueError: transformers cannot build the model, its layers cannot be adapted, or not be counted.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # of any class, by the model's own code
        reason = f"{error}".strip().partition("\n")[0]
        raise ValueError(
            f"no causal language model can be built of this {config.model_type} config: {reason}"
        ) from None
    return Planned(model, dora or dk.DoraConfig(), base_format)


def predict(
    planned: Planned,
    *,
    batch_size: int,
    cutoff_len: int,
    activation_checkpointing: bool = False,
    loss: str = "tiled",
    keep_weights: bool = False,
) -> Memory:
    """Memory of a step over [batch_size, cutoff_len] tokens.

    `loss`: "tiled" is TRL's SFTTrainer, "liger" Liger's fused linear cross-entropy, "whole" transformers' own loss
    over all logits. `keep_weights`: a later micro-step inside `accumulating(keep_weights=True)`.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss should be one of {', '.join(LOSSES)}, got {loss!r}")
    counted = planned.count(batch_size, cutoff_len, activation_checkpointing, loss, keep_weights)
    return Memory(
        weights=planned.weights,
        adapters=planned.trained.adapters,
        gradients=planned.trained.total,
        optimizer=2 * planned.trained.total,
        kept=counted.kept,
        activations=counted.activations,
        loss=counted.loss,
        layer_backward=counted.layer,
    )


def largest_batch(planned: Planned, card_gib: float, **step) -> int:
    """The most rows whose step fits into the usable part of a card of `card_gib` GiB; 0 if none does."""
    budget = card_gib * USABLE * 2**30

    def peak(batch_size: int) -> int:
        return predict(planned, batch_size=batch_size, **step).peak

    if peak(1) > budget:
        return 0
    # Nearly a straight line, which tells where to look.
    each = max(1, peak(2) - peak(1))
    fitting, too_many = 1, 2 + int((budget - peak(1)) / each)
    while peak(too_many) <= budget:
        fitting, too_many = too_many, 2 * too_many
    return fitting - 1 + bisect_right(range(fitting, too_many), budget, key=peak)
