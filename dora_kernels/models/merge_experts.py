"""Merging the adapters of fused experts: W' takes W's place one expert at a time, so that there is no second stack."""

import torch
from torch import nn

from ..layers.experts import Adapters, DoraExperts, adapt_experts, release_experts


class KeptExperts:
    """What takes a merge back: a module's adapters, and its stacks as they were."""

    def __init__(self, experts: nn.Module):
        self.adapters = dict(experts.dora.items())
        self.stacks = {name: getattr(experts, name).detach().clone() for name in self.adapters}

    def put_back(self, experts: nn.Module) -> None:
        """Gives them to the module, on the device and in the mode that it has now."""
        if isinstance(getattr(experts, "dora", None), Adapters):
            release_experts(experts)
        with torch.no_grad():
            for name, stack in self.stacks.items():
                getattr(experts, name).copy_(stack)
        device = getattr(experts, next(iter(self.stacks))).device
        adapters = {name: adapter.to(device).train(experts.training) for name, adapter in self.adapters.items()}
        adapt_experts(experts, adapters)


def merge_experts(
    experts: nn.Module, keep_base: bool, dtype: torch.dtype | None = None
) -> tuple[KeptExperts | None, dict[str, float]]:
    """Writes W' over each adapted stack of the module and takes the adapters off. In another `dtype` W' is a stack of
    its own.

    Returns what was there, if it is kept, and by the stack's name what rounding costs, as a share of the update.
    """
    kept = KeptExperts(experts) if keep_base else None
    errors = {}
    try:
        for name, adapter in experts.dora.items():
            errors[name] = _merge_stack(adapter, dtype, spend=not keep_base)
    except BaseException:
        if kept is not None:
            kept.put_back(experts)
        raise
    release_experts(experts)
    return kept, errors


@torch.no_grad()
def _merge_stack(adapter: DoraExperts, dtype: torch.dtype | None, spend: bool) -> float:
    """‖rounded W' − W'‖ / ‖W' − W‖ of all experts, 0 without an update.

    `spend` makes the adapter of a merged expert one that changes nothing: a merge that stops half way can go on.
    """
    stack, parameter = adapter.stack, getattr(adapter.experts, adapter.name)
    in_place = dtype in (None, stack.dtype)
    cast = parameter.data if in_place else torch.empty_like(parameter, dtype=dtype)
    rows = cast.mT if adapter.experts.is_transposed else cast
    wide = torch.promote_types(stack.dtype, torch.float32)
    sums = torch.zeros(2, dtype=torch.float64, device=stack.device)
    for expert in range(len(stack)):
        exact, rounded = adapter.merged_expert(expert, wide), adapter.merged_expert(expert, dtype)
        for at, other in enumerate((rounded, stack[expert])):
            sums[at] += (exact - other).square().sum(dtype=torch.float64)
        rows[expert].copy_(rounded)
        if spend and in_place:
            _spend(adapter, expert)
    if not in_place:
        parameter.data = cast
        for expert in range(len(stack) if spend else 0):
            _spend(adapter, expert)
    error, update = sums.sqrt().tolist()
    return error / update if update > 0 else 0.0


def _spend(adapter: DoraExperts, expert: int) -> None:
    adapter.lora_B[expert].zero_()
    adapter.magnitude[expert].copy_(adapter.expert_norm(expert).norm)


def merged_stack(adapter: DoraExperts, dtype: torch.dtype | None) -> torch.Tensor:
    """W' of all experts in the layout of the parameter, in `dtype` or its own."""
    stack = getattr(adapter.experts, adapter.name)
    merged = torch.empty(stack.shape, dtype=dtype or stack.dtype, device=stack.device)
    rows = merged.mT if adapter.experts.is_transposed else merged
    for expert in range(len(merged)):
        rows[expert] = adapter.merged_expert(expert, dtype)
    return merged
