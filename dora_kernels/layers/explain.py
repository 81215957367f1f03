"""What would run for a layer or a model, and why."""

from collections import Counter
from typing import NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..ops import dispatch
from .conv import DoraConv
from .experts import adapted_experts, frozen_experts
from .in_full import lines_in_full, trained_in_full
from .listing import grouped, total
from .probe import probe


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
    """The layers' explanations in order. `str()` has a line for each, for each block, each stack of experts and each
    module that trains in full, and one on `unseen`; equal layers of a stack of modules share a line with a count. The
    last line is the total.

    `blocks` holds by path what is one function, or why a module that is like a block is none. `stacks` holds by name
    what the adapter of a fused parameter runs. `experts` holds by path how many parameters of fused experts stay
    frozen, `in_full` how many of a module train beside the adapters. `unseen` is why the probe of what the model does
    with its layers stopped, None if it did not.
    """

    blocks: dict[str, str] = {}  # noqa: RUF012 (replaced, never changed)
    stacks: dict[str, str] = {}  # noqa: RUF012 (replaced, never changed)
    experts: dict[str, int] = {}  # noqa: RUF012 (replaced, never changed)
    in_full: dict[str, int] = {}  # noqa: RUF012 (replaced, never changed)
    unseen: str | None = None

    def __str__(self) -> str:
        lines = [str(explanation) for explanation in self]
        lines += [f"{path}: {what}" for path, what in self.blocks.items()]
        lines += [f"{name} {what}" for name, what in self.stacks.items()]
        lines += [f"{path}: {size} parameters of fused experts stay frozen" for path, size in self.experts.items()]
        lines += lines_in_full(self.in_full)
        lines = grouped(lines)
        if self.unseen is not None:
            lines.append(f"only the first step will tell layers that are not called: {self.unseen}")
        if len(self) > 1:
            lines.append(total(Counter(_what_runs(explanation.plan) for explanation in self)))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<what {len(self)} layers would run: print() says it>"


def explain(model: nn.Module, tokens: int) -> Explanations:
    """What each DoRA layer of `model` (or the layer itself), ours or a patched PEFT one, would run at `tokens` rows in
    its present mode: training if `model.train()` was called, else inference. Autocast is not looked at: pass a model in
    the dtype it will run in.

    Raises:
        ValueError: fewer than 0 tokens, no DoRA layer, or options that cannot run.
    """
    if tokens < 0:
        raise ValueError(f"tokens must be at least 0, got {tokens}")
    layers = [(name, module) for name, module in model.named_modules() if hasattr(type(module), "plan")]
    stacks = adapted_experts(model)
    if not layers and not stacks:
        raise ValueError("explain found no DoRA layer in the model; call apply_dora, or patch_peft a PEFT model, first")
    blocks, inside = {}, {}
    for path, module in model.named_modules():
        if hasattr(type(module), "block_plans"):
            plans = module.block_plans(tokens)
            blocks[path] = plans if isinstance(plans, str) else f"one function ({module.dora_block.activation})"
            if not isinstance(plans, str):
                inside |= _by_path(path, plans)
        for hook in module._forward_pre_hooks.values():
            if hasattr(hook, "block_plans"):
                groups = hook.block_plans(module, tokens)
                words = [blocks[path]] if path in blocks else []
                blocks[path] = "; ".join(words + [_together(names, plans) for names, plans in groups])
                for _, plans in groups:
                    inside |= {} if isinstance(plans, str) else _by_path(path, plans)
    explanations = Explanations(
        Explanation(
            name, layer.out_features, layer.in_features, layer.rank,
            _kept(layer, inside.get(name) or _plan(layer, tokens)),
        )
        for name, layer in layers
    )  # fmt: skip
    explanations.blocks = blocks
    explanations.stacks = {
        name: f"({adapter.extra_repr()}): {adapter.reason(tokens)}{_not_kept(adapter)}"
        for name, adapter in stacks.items()
    }
    explanations.experts, explanations.in_full = frozen_experts(model), trained_in_full(model)
    if not layers or layers[0][1] is not model:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of a PEFT model
        seen = probe(base)
        prefix = next((path for path, module in model.named_modules() if module is base), "")
        for path, reason in seen.not_blocks.items():
            explanations.blocks.setdefault(f"{prefix}.{path}".strip("."), f"not a block: {reason}")
        explanations.unseen = seen.stopped
    return explanations


def _what_runs(plan: dispatch.Plan) -> str:
    return "by PEFT's code" if plan.impl == "peft" else f"in {plan.space} space by {plan.impl}"


def _together(names: tuple[str, ...], plans: dict[str, dispatch.Plan] | str) -> str:
    """Of layers that share an input."""
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{listed} run alone: {plans}" if isinstance(plans, str) else f"{listed} as one function"


def _by_path(path: str, plans: dict[str, dispatch.Plan]) -> dict[str, dispatch.Plan]:
    return {f"{path}.{name}".strip("."): _inside(path, plan) for name, plan in plans.items()}


def _inside(path: str, plan: dispatch.Plan) -> dispatch.Plan:
    return plan._replace(reason=f"inside {path or 'the block'}, {plan.reason}")


def _kept(layer: nn.Module, plan: dispatch.Plan) -> dispatch.Plan:
    """What the layer keeps from call to call, inside `accumulating`."""
    use = getattr(layer, "output_use", None)
    if plan.impl == "peft" or use is None or not use.keeps_norm or not layer.training:
        return plan
    in_weight_space = plan.space == "weight"
    if getattr(layer, "merge_aware", False) or (_is_convolution(layer) and not in_weight_space):
        what = "nothing of it"
    else:
        what = "the norm and merged weight" if use.keeps_weight and in_weight_space else "the norm"
    return plan._replace(reason=f"{plan.reason}; accumulating keeps {what}")


def _is_convolution(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "base_layer", layer), (DoraConv, _ConvNd))


def _not_kept(adapter: nn.Module) -> str:
    return "; accumulating keeps nothing of experts" if adapter.output_use.keeps_norm else ""


def _plan(layer: nn.Module, tokens: int) -> dispatch.Plan:
    plan = layer.plan(tokens)
    if plan.impl == "peft" or not layer.output_use.is_written:
        return plan
    return plan._replace(reason=f"{plan.reason}; the model writes over its output, of which a copy is kept")
