"""What would run for a layer or a model, and why."""

from typing import NamedTuple

from torch import nn

from ..ops import dispatch
from .support import fused_experts


class Explanation(NamedTuple):
    """One layer's plan; `str()` is one line."""

    name: str
    out_features: int
    in_features: int
    r: int
    plan: dispatch.Plan

    def __str__(self) -> str:
        size = f"{self.out_features}×{self.in_features}, r={self.r}"
        return f"{self.name or 'layer'} ({size}): {self.plan.reason}"


class Explanations(tuple[Explanation, ...]):
    """The layers' explanations in order; `str()` is one line each, and one for each stack of experts.

    `experts` holds by path how many parameters of fused experts stay frozen.
    """

    experts: dict[str, int] = {}  # noqa: RUF012 (replaced, never changed)

    def __str__(self) -> str:
        frozen = (f"{path}: {size} parameters of fused experts stay frozen" for path, size in self.experts.items())
        return "\n".join([*(str(explanation) for explanation in self), *frozen])


def explain(model: nn.Module, tokens: int) -> Explanations:
    """What each DoRA layer of `model` (or the layer itself), ours or a patched PEFT one, would run at `tokens` rows in
    its present mode: training if `model.train()` was called, else inference. Autocast is not looked at: pass a model in
    the dtype it will run in.

    Raises:
        ValueError: fewer than 0 tokens, no `DoraLinear`, or options that cannot run.
    """
    if tokens < 0:
        raise ValueError(f"tokens must be at least 0, got {tokens}")
    layers = [(name, module) for name, module in model.named_modules() if hasattr(type(module), "plan")]
    if not layers:
        raise ValueError("explain found no DoraLinear in the model; call apply_dora, or patch_peft a PEFT model, first")
    explanations = Explanations(
        Explanation(name, layer.out_features, layer.in_features, layer.rank, layer.plan(tokens))
        for name, layer in layers
    )
    explanations.experts = fused_experts(model)
    return explanations
