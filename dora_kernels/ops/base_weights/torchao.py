"""torchao's tensor subclasses: NVFP4 and MXFP4 that lie plainly, and others, which dequantise themselves."""

import torch
from torch import nn

from . import fp4
from .fp4 import Fp4Weight
from .library import LibraryWeight


def recognises(module: nn.Module) -> bool:
    return type(getattr(module, "weight", None)).__module__.startswith("torchao.")


def read(module: nn.Module, nf4_parity: bool) -> Fp4Weight | LibraryWeight:
    weight = module.weight
    if _is_plain_fp4(weight):
        return _read_fp4(weight)
    return LibraryWeight("torchao", weight.shape, weight.dtype, weight.device, weight.dequantize)


def _is_plain_fp4(weight: torch.Tensor) -> bool:
    """Whether codes and scales lie row by row, in groups of the usual size. In fp16 the library loses MXFP4's scales
    that are out of range."""
    name = type(weight).__name__
    is_fp4 = name == "NVFP4Tensor" or (name == "MXTensor" and weight.elem_dtype == torch.float4_e2m1fn_x2)
    return (
        is_fp4
        and weight.dtype != torch.float16
        and weight.qdata.is_contiguous()
        and not weight.is_swizzled_scales
        and weight.block_size == fp4.GROUPS[_scales_of(weight).dtype]
    )


def _scales_of(weight: torch.Tensor) -> torch.Tensor:
    return weight.scale.view(torch.uint8) if weight.scale.dtype == torch.float8_e8m0fnu else weight.scale


def _read_fp4(weight: torch.Tensor) -> Fp4Weight:
    factor = getattr(weight, "per_tensor_scale", None)
    factor = None if factor is None else factor.view(1)
    parts = weight.qdata, _scales_of(weight), factor, weight.block_size, weight.shape, weight.dtype
    return fp4.checked(Fp4Weight(*parts, is_factor=True), "torchao")
