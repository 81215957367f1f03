"""W' that layers keep over the micro-steps of one optimizer step, inside `accumulating(model, keep_weights=True)`.

Whether it still is that of A, B and m is known on the device alone, which makes it again in its place or leaves it. No
graph loses the W' that its backward will read: while one holds it, what may differ goes into fresh memory.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from .accumulation import Kept, keeps_weight
from .base_weights import Packed, readable
from .call import Call, Inputs
from .output import OutputUse
from .recomputation import leave_norm
from .types import NormScale, Rounding


class Rows(NamedTuple):
    """The layer whose rows of W' are meant."""

    use: OutputUse | None
    scaling: float
    rounding: Rounding


class KeptWeight:
    """`merged` [ΣN, K], W' of layers side by side, and of which of their comparisons each one's rows are."""

    def __init__(self, layers: Sequence[Rows], shape: tuple[int, int], dtype: torch.dtype, device: torch.device):
        # Outside inference mode, whose tensors no backward may read.
        with torch.inference_mode(False):
            self.merged = torch.empty(shape, dtype=dtype, device=device)
        self.layers = list(layers)
        self._unheld = self._holders()
        self._of: list[tuple[Kept, int] | None] = [None] * len(layers)

    def fits(self, layers: Sequence[Rows], shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it is the memory of these layers' W'."""
        merged, pairs = self.merged, zip(self.layers, layers)
        same = len(self.layers) == len(layers) and all(one.use is other.use and one == other for one, other in pairs)
        return same and (merged.shape, merged.dtype, merged.device) == (torch.Size(shape), dtype, device)

    @property
    def is_held(self) -> bool:
        """Whether a graph will read it: each saved alias holds the memory once more."""
        return self._holders() > self._unheld

    def behind(self, index: int) -> int | None:
        """How many comparisons ago a layer's rows were its W'; None where they never were, or of other weights."""
        kept: Kept | None = self.layers[index].use.kept_norm
        if kept is None or self._of[index] is None or self._of[index][0] is not kept:
            return None
        return kept.comparisons - self._of[index][1]

    def has(self, index: int, known: bool) -> bool:
        """Whether a layer's rows can be brought up to date, with n and g that are `known`."""
        return known and self.behind(index) in (0, 1)

    def bring_up_to_date(
        self,
        ops: ModuleType,
        index: int,
        weight: torch.Tensor | Packed,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        norm_scale: NormScale,
        rows: torch.Tensor,
    ) -> None:
        """Makes `rows`, a layer's part of `merged`, its W', where they are `has`."""
        use, scaling, rounding = self.layers[index]
        if self.behind(index):
            ops.kept_merge(
                weight, lora_A, lora_B, scaling,
                rounding=rounding, norm_scale=norm_scale, changed=use.kept_norm.changed, out=rows,
            )  # fmt: skip

    def taken(self) -> torch.Tensor:
        """W' as one call uses and saves it, when all rows are up to date."""
        if any(self.behind(index) != 0 for index in range(len(self.layers))):
            # Kernels' writes are not counted. A graph that holds this memory in spite of all raises.
            torch.autograd.graph.increment_version(self.merged)
            # No norm is kept yet where a recomputation took that of a forward outside the scope.
            found = [layer.use.kept_norm for layer in self.layers]
            self._of = [None if kept is None else (kept, kept.comparisons) for kept in found]
        return self.merged.detach()

    def _holders(self) -> int:
        return torch._C._storage_Use_Count(self.merged.untyped_storage()._cdata)


def kept_weight(
    layers: Sequence[Rows], known: Sequence[bool], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> KeptWeight | None:
    """Where these layers keep W' [ΣN, K], after n and g of those that are `known` were compared; None where they do
    not."""
    if not all(keeps_weight(layer.use) for layer in layers):
        return None
    first = layers[0].use
    kept: KeptWeight | None = first.kept_weight
    if kept is not None and kept.fits(layers, shape, dtype, device):
        is_current = all(is_known and kept.behind(index) == 0 for index, is_known in enumerate(known))
        if is_current or not kept.is_held:
            return kept
    first.kept_weight = KeptWeight(layers, shape, dtype, device)
    return first.kept_weight


def merged_weight(ops: ModuleType, call: Call, inputs: Inputs) -> tuple[torch.Tensor, NormScale]:
    """W' [N, K] in x's dtype, n and g, of a call of `forms` in weight space: kept, or made anew."""
    x, _, lora_A, lora_B, magnitude, _, weight, given = inputs
    kept, known = None, given is not None
    if call.trains:
        rows = Rows(call.output_use, call.scaling, call.rounding)
        kept = kept_weight([rows], [known], tuple(weight.shape), x.dtype, x.device)
    if kept is not None and kept.has(0, known):
        kept.bring_up_to_date(ops, 0, readable(weight), lora_A, lora_B, given, kept.merged)
        return kept.taken(), given
    merged, norm_scale = ops.merge(
        readable(weight), lora_A, lora_B, magnitude, call.scaling,
        dtype=x.dtype, rounding=call.rounding, norm_scale=given, out=None if kept is None else kept.merged,
    )  # fmt: skip
    leave_norm(call, inputs, norm_scale)
    return merged if kept is None else kept.taken(), norm_scale
