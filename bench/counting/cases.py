"""Calls of `dora_linear`, `dora_mlp`, `dora_siblings` and `dora_experts` that make every launch: over types, ranks,
shapes, formats and options."""

from functools import partial
from typing import NamedTuple

import torch

from dora_kernels import dora_linear
from dora_kernels.ops.base_weights import Fp4Weight, Fp8Weight, Int4Weight, Nf4Weight, Packed
from dora_kernels.ops.base_weights.compressed_tensors import LAYOUT as COMPRESSED_TENSORS
from dora_kernels.ops.base_weights.gptqmodel import AWQ, GPTQ
from dora_kernels.ops.dora_experts import dora_experts
from dora_kernels.ops.dora_mlp import dora_mlp
from dora_kernels.ops.dora_siblings import dora_siblings
from dora_kernels.ops.members import Member
from dora_kernels.ops.output import OutputUse
from dora_kernels.ops.types import Rounding

from .routing import spread_evenly

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64"}
DTYPES = ((BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16), (FP32, FP32), (FP64, FP64))
"""(x and weight, adapter)."""


INT4 = {
    "symmetric": (COMPRESSED_TENSORS, "", 128),
    "asymmetric": (COMPRESSED_TENSORS, "zeros", 32),
    "per channel": (COMPRESSED_TENSORS, "zeros", None),
    "GPTQ": (GPTQ, "zeros", 128),
    "act-order": (GPTQ, "zeros, groups", 128),
    "AWQ": (AWQ, "zeros", 128),
}
"""Layout, what the weight has beside codes and scales, and the input features of a group; None: all."""


FP8 = {"block": (128, 128), "row": (1, None), "tensor": (None, None)}
"""Output and input features that share a scale; None: all."""
FP4 = {"NVFP4": (16, torch.float8_e4m3fn), "MXFP4": (32, torch.uint8)}
"""Input features of a group, and the dtype of its scale."""


class Case(NamedTuple):
    """One call of `dora_linear`, and of its backward where `trains`; or of the function that an option names."""

    dtype: torch.dtype
    adapter_dtype: torch.dtype
    space: str
    rank: int
    out_features: int = 4096
    in_features: int = 4096
    tokens: int = 512
    rounding: str = "dithered"
    bias: bool = False
    dropout_mode: str | None = None
    trains: str = (
        "all"  # or "adapter" (no gradient for x), "factors" (nor for the magnitude), "nothing", "frozen scale"
    )
    grad_layout: str = "contiguous"  # or "expanded" (stride 0), "transposed"
    nf4: str | None = None  # "plain" or "nested" statistics, or "parity": nested, rounded first
    mlp: str | None = None  # the activation of a gated MLP; the shape is gate's and up's
    stacked: bool = False  # one layer is gate and up
    int4: str | None = None  # a name of `INT4`
    fp8: str | None = None  # a name of `FP8`
    fp4: str | None = None  # a name of `FP4`
    experts: int = 0  # of a stack; the shape is one expert's, and the tokens are those of all; with `mlp`: gate and up
    siblings: tuple[int, ...] = ()  # output features of each of several layers of one input
    accumulating: bool = False  # the second of two micro-steps is there too

    @property
    def dtypes(self) -> str:
        return f"{NAMES[self.dtype]}/{NAMES[self.adapter_dtype]}"

    def __str__(self) -> str:
        sizes = f"r={self.rank} {self.out_features}x{self.in_features} M={self.tokens}"
        options = self._asdict().items() - Case(*self[:7])._asdict().items()
        return " ".join([f"{self.dtypes} {self.space} space {sizes}", *sorted(f"{k}={v}" for k, v in options)])


def call(case: Case) -> None:
    """Runs the call that `case` describes, forward and backward."""
    if case.experts:
        return _call_experts(case)
    if case.mlp is not None:
        return _call_mlp(case)
    if case.siblings:
        return _call_siblings(case)
    training = case.trains in ("all", "adapter", "factors")
    trained = {"weight": False, "x": case.trains == "all", "magnitude": case.trains in ("all", "adapter")}
    N, K, R, M = case.out_features, case.in_features, case.rank, case.tokens

    def make(name, *shape, dtype=case.adapter_dtype):
        return torch.empty(shape, dtype=dtype, requires_grad=training and trained.get(name, True))

    frozen_scale = None
    if case.trains == "frozen scale":
        acc = FP64 if case.dtype == FP64 else FP32
        frozen_scale = (torch.empty(N, dtype=acc), torch.empty(N, dtype=acc))
    x, weight = make("x", M, K, dtype=case.dtype), _weight(case) or make("weight", N, K, dtype=case.dtype)
    layer = partial(
        dora_linear, x, weight, make("lora_A", R, K), make("lora_B", N, R), make("magnitude", N),
        bias=make("bias", N, dtype=case.dtype) if case.bias else None,
        scaling=2.0, space=case.space, impl="triton", rounding=case.rounding, frozen_scale=frozen_scale,
        training=case.dropout_mode is not None, dropout_mode=case.dropout_mode or "lora",
        lora_dropout=0.1 if case.dropout_mode else 0.0,
        output_use=OutputUse(keeps_norm=case.accumulating, keeps_weight=case.accumulating),
    )  # fmt: skip
    y = layer()
    if case.accumulating:
        del y  # whose graph holds the W' that is kept
        y = layer()
    if training:
        grad = {
            "contiguous": lambda: torch.empty_like(y),
            "expanded": lambda: torch.empty((), dtype=y.dtype).expand_as(y),
            "transposed": lambda: torch.empty(N, M, dtype=y.dtype).T,
        }
        y.backward(grad[case.grad_layout]())


def _call_mlp(case: Case) -> None:
    N, K = case.out_features, case.in_features
    gate, up = (_member(case, 2 * N, K), None) if case.stacked else (_member(case, N, K), _member(case, N, K))
    y = dora_mlp(_x(case), gate, up, _member(case, K, N), activation=case.mlp, space=case.space, impl="triton")
    y.backward(torch.empty_like(y))


def _call_experts(case: Case) -> None:
    E, N, K, R = case.experts, case.out_features, case.in_features, case.rank
    weight = torch.empty(E, N, K, dtype=case.dtype)
    x = torch.empty(case.tokens, K, dtype=case.dtype, requires_grad=True)
    shapes = (E, R, K), (E, N, R), (E, N)
    factors = [torch.empty(shape, dtype=case.adapter_dtype, requires_grad=True) for shape in shapes]
    bias = torch.empty(E, N, dtype=case.dtype) if case.bias else None
    ends = torch.empty(E, dtype=torch.int32)
    options = {"scaling": 2.0, "bias": bias, "space": case.space, "impl": "triton", "rounding": case.rounding}
    with spread_evenly(case.tokens):
        y = dora_experts(x, weight, *factors, ends, activation=case.mlp, **options)
        y.backward(torch.empty_like(y))


def _call_siblings(case: Case) -> None:
    members = [_member(case, features, case.in_features) for features in case.siblings]
    outputs = dora_siblings(_x(case), members, space=case.space, impl="triton")
    torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


def _x(case: Case) -> torch.Tensor:
    return torch.empty(case.tokens, case.in_features, dtype=case.dtype, requires_grad=True)


def _member(case: Case, out_features: int, in_features: int) -> Member:
    weight = torch.empty(out_features, in_features, dtype=case.dtype)
    shapes = (case.rank, in_features), (out_features, case.rank), (out_features,)
    factors = [torch.empty(shape, dtype=case.adapter_dtype, requires_grad=True) for shape in shapes]
    bias = torch.empty(out_features, dtype=case.dtype) if case.bias else None
    return Member(weight, *factors, bias, 2.0, Rounding(case.rounding))


def _weight(case: Case) -> Packed | None:
    """The packed weight of a case; None where it is a matrix."""
    made = {"nf4": _nf4_weight, "int4": _int4_weight, "fp8": _fp8_weight, "fp4": _fp4_weight}
    return next((make(case) for name, make in made.items() if getattr(case, name)), None)


def _fp8_weight(case: Case) -> Fp8Weight:
    N, K = case.out_features, case.in_features
    rows, columns = (part or size for part, size in zip(FP8[case.fp8], (N, K)))
    codes, scales = torch.empty(N, K, dtype=torch.float8_e4m3fn), torch.empty(-(-N // rows), -(-K // columns))
    return Fp8Weight(codes, scales, (rows, columns), case.dtype)


def _fp4_weight(case: Case) -> Fp4Weight:
    N, K = case.out_features, case.in_features
    group, dtype = FP4[case.fp4]
    codes, scales = torch.empty(N, K // 2, dtype=torch.uint8), torch.empty(N, K // group, dtype=dtype)
    factor = torch.empty(1) if case.fp4 == "NVFP4" else None
    return Fp4Weight(codes, scales, factor, group, torch.Size((N, K)), BF16)


def _int4_weight(case: Case) -> Int4Weight:
    N, K = case.out_features, case.in_features
    layout, options, group = INT4[case.int4]
    group = group or K

    def make(dtype, *shape):
        shape = shape if layout.rows_are_outputs else shape[::-1]
        return torch.empty(shape, dtype=dtype)

    words = (-(-N // 8), K) if layout.words_along_outputs else (N, -(-K // 8))
    return Int4Weight(
        make(torch.int32, *words),
        make(case.dtype, N, K // group),
        make(torch.int32, -(-N // 8), K // group) if "zeros" in options else None,
        torch.empty(K, dtype=torch.int32) if "groups" in options else None,
        group,
        torch.Size((N, K)),
        layout,
    )


def _nf4_weight(case: Case) -> Nf4Weight:
    N, K = case.out_features, case.in_features
    blocks, nested = -(-N * K // 64), case.nf4 != "plain"
    return Nf4Weight(
        torch.empty(-(-N * K // 2), dtype=torch.uint8),
        torch.empty(blocks, dtype=torch.uint8 if nested else FP32),
        torch.empty(16),
        torch.empty(-(-blocks // 256)) if nested else None,
        torch.empty(256) if nested else None,
        torch.empty(()) if nested else None,
        torch.Size((N, K)),
        BF16,
        blocksize=64,
        nested_blocksize=256 if nested else 0,
        parity=case.nf4 == "parity",
    )
