"""transformers' FP8 experts: stacks of e4m3 numbers, each expert with scales of its own."""

from dataclasses import dataclass
from typing import overload

import torch
from torch import nn

from .fp8 import Fp8Weight
from .sharding import sharding_of


@dataclass(frozen=True)
class Fp8Stack:
    """W [E, N, K] as it lies in memory. One expert is an `Fp8Weight`; nothing decodes more than one at a time."""

    codes: torch.Tensor  # float8 [E, N, K]
    scales: torch.Tensor  # fp32 or powers of two in 8 bits [E, ⌈N / rows⌉, ⌈K / columns⌉]
    block: tuple[int, int]
    dtype: torch.dtype  # in which the experts compute

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def is_cuda(self) -> bool:
        return self.codes.is_cuda

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def note(self) -> str:
        return self[0].note

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, experts: int) -> Fp8Weight: ...
    @overload
    def __getitem__(self, experts: slice) -> "Fp8Stack": ...
    def __getitem__(self, experts: int | slice) -> "Fp8Weight | Fp8Stack":
        kind = Fp8Weight if isinstance(experts, int) else Fp8Stack
        return kind(self.codes[experts], self.scales[experts], self.block, self.dtype)

    def readable(self) -> "Fp8Stack":
        return self


def is_fp8_experts(module: nn.Module) -> bool:
    """Whether the module's stacks are in transformers' FP8."""
    # By its own name: a subclass may compute something else.
    return type(module).__name__ == "FP8Experts"


def why_not_fp8_stack(module: nn.Module, name: str) -> str | None:
    """Why the stack `name` of FP8 experts cannot be read, as what follows its name; None if it can."""
    codes, scales = getattr(module, name), getattr(module, f"{name}_scale_inv")
    if codes.element_size() > 1:
        return f"was cast to {codes.dtype} in FP8Experts, without its scales: load the model again"
    if codes.dtype != torch.float8_e4m3fn:
        return f"holds {codes.dtype} in FP8Experts: only torch.float8_e4m3fn is read"
    if scales.device != codes.device:
        return f"is on {codes.device} and its scales on {scales.device}"
    if sharding := sharding_of(scales):
        return f"has scales that are {sharding}"
    expected = [-(-size // part) for size, part in zip(codes.shape[1:], _block(module, name))]
    if list(scales.shape[1:]) != expected:
        return f"has scales {list(scales.shape[1:])} of each expert; blocks of {_block(module, name)} have {expected}"
    return None


def read_fp8_stack(module: nn.Module, name: str) -> Fp8Stack:
    """The stack `name` of FP8 experts. They compute in the dtype of the model's config, else in bf16.

    Raises:
        ValueError: it cannot be read, as it was cast or moved since.
    """
    if reason := why_not_fp8_stack(module, name):
        raise ValueError(f"{name} {reason}")
    dtype = getattr(module.config, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    codes, scales = getattr(module, name).detach(), getattr(module, f"{name}_scale_inv").detach()
    return Fp8Stack(codes, scales, _block(module, name), dtype)


def _block(module: nn.Module, name: str) -> tuple[int, int]:
    if module.block_size is not None:
        return tuple(module.block_size)
    # A scale for each of the parts that were fused: gate's and up's.
    _, rows, columns = getattr(module, name).shape
    return -(-rows // getattr(module, f"{name}_scale_inv").shape[1]), columns
