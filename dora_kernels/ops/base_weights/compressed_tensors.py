"""compressed-tensors' layers: packed integers and floats of 4 bits, and FP8. Its other formats are refused by name."""

import torch
from torch import nn

from . import fp4, int4
from .fp4 import Fp4Weight
from .fp8 import Fp8Weight
from .int4 import Int4Layout, Int4Weight

LAYOUT = Int4Layout(rows_are_outputs=True)
FP4 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")


def recognises(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight_packed", None), torch.Tensor) or _is_fp8(module)


def _is_fp8(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_fp8 = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.element_size() == 1
    return is_fp8 and isinstance(getattr(module, "weight_scale", None), torch.Tensor)


def read(module: nn.Module, nf4_parity: bool) -> Int4Weight | Fp4Weight | Fp8Weight:
    if _is_fp8(module):
        return _read_fp8(module)
    return _read_fp4(module) if module.weight_packed.dtype == torch.uint8 else _read_int4(module)


def _read_fp8(module: nn.Module) -> Fp8Weight:
    """One scale for all, one for each output feature, or one for each block of `block_structure`."""
    codes, scales = module.weight.detach(), module.weight_scale.detach()
    if reason := _why_unknown_fp8(module):
        raise ValueError(f"this compressed-tensors weight {reason}")
    shape, dtype = tuple(codes.shape), scales.dtype
    scales = scales.float().view(1, 1) if scales.numel() == 1 else scales.float()
    parts = {(1, 1): shape, (shape[0], 1): (1, shape[1])}
    block = parts.get(tuple(scales.shape), getattr(module, "fp8_block", None) or _block_of(module))
    if block is None or tuple(scales.shape) != tuple(-(-size // part) for size, part in zip(shape, block)):
        raise ValueError(f"this compressed-tensors weight has scales {list(scales.shape)}, which are not known here")
    return Fp8Weight(codes, scales, tuple(block), dtype)


def _read_int4(module: nn.Module) -> Int4Weight:
    packed, scales = module.weight_packed.detach(), getattr(module, "weight_scale", None)
    shape = torch.Size((module.out_features, module.in_features))
    if reason := _why_unknown(module, shape):
        raise ValueError(f"this compressed-tensors weight {reason}")
    if scales.ndim != 2 or not 0 < scales.shape[1] <= shape[1]:
        raise ValueError(f"this compressed-tensors weight has scales {list(scales.shape)}, not one for each group")
    zeros = getattr(module, "weight_zero_point", None)
    group = shape[1] // scales.shape[1]
    weight = Int4Weight(packed, scales.detach(), None if zeros is None else zeros.detach(), None, group, shape, LAYOUT)
    return int4.checked(weight, "compressed-tensors")


def _read_fp4(module: nn.Module) -> Fp4Weight:
    """Decoded to bf16, whatever the model's dtype is, as the library does."""
    if reason := _why_unknown_fp4(module):
        raise ValueError(f"this compressed-tensors weight {reason}")
    shape = torch.Size((module.out_features, module.in_features))
    packed, scales = module.weight_packed.detach(), module.weight_scale.detach()
    factor = getattr(module, "weight_global_scale", None)
    group = shape[1] // scales.shape[-1] if scales.ndim == 2 and scales.shape[1] else 0
    weight = Fp4Weight(packed, scales, None if factor is None else factor.detach(), group, shape, torch.bfloat16)
    return fp4.checked(weight, "compressed-tensors")


def keep_packed(module: nn.Module) -> None:
    """Hides the layer from the library, whose hook would decompress it for good in the model's first forward."""
    if _is_fp8(module) and (block := _block_of(module)):
        module.fp8_block = tuple(block)
    vars(module).pop("quantization_scheme", None)


def wrapped_forward(module: nn.Module) -> bool:
    """Whether the forward that was put on the layer is the library's, which computes as the layer's class does."""
    function = getattr(vars(module).get("forward"), "__func__", None)
    return recognises(module) and _library_of(function) == "compressed_tensors"


def _block_of(module: nn.Module) -> tuple[int, int] | None:
    weights = getattr(getattr(module, "quantization_scheme", None), "weights", None)
    return getattr(weights, "block_structure", None)


def _why_unknown_fp8(module: nn.Module) -> str | None:
    """What is not known here about the layer's FP8, as what follows "the weight"."""
    if module.weight.dtype != torch.float8_e4m3fn:
        return f"is in {module.weight.dtype}: of its floats of 8 bits e4m3 is known here"
    if module.weight_scale.device != module.weight.device:
        return f"is on {module.weight.device} and its scales on {module.weight_scale.device}"
    if getattr(module, "weight_zero_point", None) is not None:
        return "is FP8 with `weight_zero_point`"
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None:  # adapted before: it was known then
        return None
    format_name = _name(scheme.format)
    if format_name not in (None, "float-quantized", "naive-quantized"):
        return f"is in the format {format_name}: float-quantized is known here"
    return None


def _why_unknown_fp4(module: nn.Module) -> str | None:
    """What is not known here about the layer's FP4, as what follows "the weight"."""
    scheme, scales = getattr(module, "quantization_scheme", None), getattr(module, "weight_scale", None)
    if scheme is not None and _name(scheme.format) not in (None, *FP4):
        return f"is packed in torch.uint8, in the format {_name(scheme.format)}: {' and '.join(FP4)} are known here"
    if scales is None:
        return "has no `weight_scale` beside it"
    for name in ("weight_zero_point", "weight_g_idx"):
        if getattr(module, name, None) is not None:
            return f"is FP4 with `{name}`"
    is_nvfp4 = scales.dtype == torch.float8_e4m3fn
    if is_nvfp4 != (getattr(module, "weight_global_scale", None) is not None):
        return f"has scales in {scales.dtype} {'without' if is_nvfp4 else 'and'} a `weight_global_scale`"
    if is_nvfp4 and module.weight_global_scale.dtype != torch.float32:
        return f"has its `weight_global_scale` in {module.weight_global_scale.dtype}: the library divides in fp32"
    if scheme is None:  # adapted before: it was known then
        return None
    kind, bits = _name(scheme.weights.type), scheme.weights.num_bits
    if (kind, bits) != ("float", 4):
        return f"has {kind} numbers of {bits} bits: floats of 4 bits are known here"
    if not scheme.weights.symmetric:
        return "is asymmetric"
    if scheme.input_activations is not None or scheme.output_activations is not None:
        return "belongs to a layer that quantises activations, too"
    return None


def _name(value) -> str | None:
    """Of an enumeration's member, or the name itself."""
    return getattr(value, "value", value)


def _library_of(function) -> str:
    # functools.wraps has given it the name and the module of what it wraps.
    return getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0]


def _why_unknown(module: nn.Module, shape: torch.Size) -> str | None:
    """What is not known here about the layer's scheme, as what follows "the weight"."""
    packed = module.weight_packed
    if packed.dtype != torch.int32:
        return f"is packed in {packed.dtype}: of its formats pack-quantized, int32, is known here"
    if getattr(module, "weight_scale", None) is None:
        return "has no `weight_scale` beside it"
    if getattr(module, "weight_g_idx", None) is not None:
        return "is ordered by activations (`weight_g_idx`), which the library itself no longer reads"
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None:  # adapted before: it was known then
        return None
    format_name = _name(scheme.format)
    if format_name not in (None, "pack-quantized"):
        return f"is in the format {format_name}: pack-quantized is known here"
    kind, bits = _name(scheme.weights.type), scheme.weights.num_bits
    if (kind, bits) != ("int", 4):
        return f"has {kind} numbers of {bits} bits: integers of 4 bits are known here"
    if scheme.input_activations is not None or scheme.output_activations is not None:
        return "belongs to a layer that quantises activations, too"
    if scheme.weights.symmetric != (getattr(module, "weight_zero_point", None) is None):
        symmetric = "symmetric, with" if scheme.weights.symmetric else "asymmetric, without"
        return f"is {symmetric} `weight_zero_point`"
    stored = getattr(module, "weight_shape", None)
    if stored is not None and not stored.is_meta and tuple(stored.tolist()) != tuple(shape):
        return f"has the shape {stored.tolist()}, its layer {list(shape)}"
    return None
