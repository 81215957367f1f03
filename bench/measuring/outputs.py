"""What a timed call returns, held to what it returned first, and then filled with NaN.

Memory that is handed out again holds the results of an earlier repetition: a kernel that leaves elements out would go
unnoticed. Filled with NaN, they show. Outside of the timed stretch.
"""

from collections.abc import Iterable

import torch
from torch.utils._pytree import tree_leaves

BAR = 1e-3
"""Relative change of an output's norm from one repetition to the next. Ours repeat to the bit; libraries may sum in
another order, which moves a norm by less than a millionth. What is missing moves it by more, or makes it NaN."""


class Outputs:
    """Called with a contestant's name and what it returned; says what is wrong, or None."""

    def __init__(self, kept: Iterable[torch.Tensor]):
        """`kept`: tensors that are read again, which a call may hand through, and which are not filled."""
        self._kept = {_place(tensor) for tensor in kept}
        self._first: dict[str, list[float]] = {}

    def __call__(self, name: str, returned: object) -> str | None:
        found = [leaf.detach() for leaf in tree_leaves(returned) if _is_number(leaf)]
        norms = [torch.linalg.vector_norm(tensor, dtype=_wide(tensor)).item() for tensor in found]
        first = self._first.setdefault(name, norms)
        # Not `>`: NaN is a failure.
        if len(norms) != len(first) or not all(abs(a - b) <= BAR * abs(b) for a, b in zip(norms, first)):
            return f"wrong: a repetition returned other values than the first: norms {norms}, then {first}"
        for tensor in found:
            if _place(tensor) not in self._kept:
                tensor.fill_(torch.nan)
        return None


def _is_number(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel() > 0


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
