"""Tensors of which this process holds only a part."""

import torch


def sharding_of(tensor: torch.Tensor) -> str | None:
    """How a tensor is sharded at this moment, and what to do; None for a whole one, and for what is no tensor.

    DeepSpeed's ZeRO-3 leaves an empty tensor, and the shape that it has when gathered as `ds_shape`.
    """
    if type(tensor).__name__ == "DTensor":
        return "a DTensor, of which this process holds a part: gather it first, with full_tensor()"
    whole = getattr(tensor, "ds_shape", None)
    if whole is not None and tensor.shape != whole:
        return f"ZeRO-3's part of {list(whole)}: gather it first, with deepspeed.zero.GatheredParameters"
    return None
