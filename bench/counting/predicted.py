"""The rows of a case as they are predicted: of a layer or a block, and of a model's step."""

from collections import Counter
from collections.abc import Callable

import torch

from ..contestants import block as block_field
from ..contestants import layer as layer_field
from ..contestants import model as model_field
from ..measuring.shapes import BlockShape, Run, Shape
from ..measuring.timing import attempt
from .gpus import Roofs
from .layer_counts import count, saved_by
from .model_counts import predict_step, seconds_by_roof
from .roofs import longest
from .traffic import Operation

Limit = Callable[[Operation, Roofs], tuple[str, float]]
"""The roof of a launch, and its seconds."""


def predict_model(run: Run, dtype: torch.dtype, roofs: Roofs, limit: Limit = longest) -> dict[str, dict]:
    """By contestant, in the form of a measured result, with the seconds under each roof as "roofs"."""
    results = {}
    for name, contestant in model_field.field_of(run, dtype).items():
        # A patched layer refuses tensors without data, and runs what ours runs; nothing drifts here.
        if not name.endswith(("patched", "again")):
            row, failure = attempt(
                lambda c=contestant: predict_step(run, c, dtype, roofs.capability, lambda o: limit(o, roofs))
            )
            results[name] = fitting(row, roofs) if row else {"failed": failure}
    return results


def fitting(row: dict, roofs: Roofs) -> dict:
    """The row of a step; where frozen weights and peak are more than the GPU's memory, one that failed."""
    held = row["frozen_bytes"] + row["peak_bytes"]
    if held <= roofs.memory:
        return row
    why = f"would not fit: {held / 2**30:.1f} GiB of {roofs.memory / 2**30:.1f} GiB"
    return {"failed": why, "peak_bytes": row["peak_bytes"], "layer": row["layer"]}


def predict(
    shape: Shape | BlockShape, tokens: int, rank: int, dtype: torch.dtype, roofs: Roofs, limit: Limit = longest
) -> dict[str, dict]:
    """By contestant, in the form of a measured result, with the launches of each part as "launches" and the seconds
    under each roof as "roofs". Of a block, how many launches there are and what they save stands as "block"."""
    is_block = isinstance(shape, BlockShape)
    if is_block:
        field = block_field.counted(shape.name, dtype)
    else:
        field = layer_field.contestants(dtype, torch.device("cuda"), reference=False)
    # A patched layer refuses tensors without data, and runs what ours runs; Axolotl's kernel has no account here.
    field = {name: c for name, c in field.items() if not name.endswith("patched") and not name.startswith("Axolotl")}
    results = {}
    for name, contestant in field.items():
        counted, failure = attempt(lambda c=contestant: count(c, shape, tokens, rank, dtype, roofs.capability))
        if failure:
            results[name] = {"failed": failure}
            continue
        parts, peak = counted
        limited = {part: seconds_by_roof(made, lambda o: limit(o, roofs)) for part, made in parts.items()}
        whole = sum(limited.values(), Counter())
        medians = {part: {"median": by_roof.total()} for part, by_roof in (limited | {"total": whole}).items()}
        results[name] = {"seconds": medians, "roofs": whole, "peak_bytes": peak, "launches": parts}
        if is_block:
            results[name]["saved_bytes"] = saved_by(contestant, shape, tokens, rank, dtype, roofs.capability)
            results[name]["block"] = {"launches": {part: len(made) for part, made in parts.items()}}
    return results
