"""Roofs of GPUs that are not at hand, for predictions. Measured ones come from `python -m bench kernels` on the GPU."""

from typing import NamedTuple

from .traffic import Operation


class Roofs(NamedTuple):
    """What a prediction assumes: bytes and FLOPs a second, seconds per launch, bytes of memory, and their source."""

    bandwidth: float
    flops: dict[str, float]  # by rate: bf16, tf32x3, fp32, fp64
    launch: float
    memory: float  # the data sheet's GB as GiB, which no card quite has: an H200 reports 139.8 of 141
    source: str


def seconds(operation: Operation, roofs: Roofs) -> float:
    """The model of one launch's time."""
    return max(operation.memory / roofs.bandwidth, operation.flops / roofs.flops[operation.rate], roofs.launch)


def _roofs(
    memory_gb: float, bandwidth_tb: float, bf16: float, tf32: float, fp32: float, fp64: float, source: str
) -> Roofs:
    # fp32 accuracy on tensor cores takes three tf32 products.
    rates = {"bf16": bf16, "tf32x3": tf32 / 3, "fp32": fp32, "fp64": fp64}
    flops = {name: value * 1e12 for name, value in rates.items()}
    return Roofs(bandwidth_tb * 1e12, flops, 3e-6, memory_gb * 2**30, source)


# Share of the data sheet's numbers that large copies and GEMMs reach on the one GPU where both were measured: an H200
# copies 4.3 of 4.8 TB/s and multiplies at 790 of 989 TFLOP/s.
COPY, GEMM = 0.9, 0.8


def _from_data_sheet(memory_gb, bandwidth_tb, bf16, tf32, fp32, fp64, name) -> Roofs:
    source = f"data sheet of {name}, dense, times {COPY} (bandwidth) and {GEMM} (products)"
    return _roofs(memory_gb, COPY * bandwidth_tb, *(GEMM * value for value in (bf16, tf32, fp32, fp64)), source)


ROOFS = {
    "h200": _roofs(
        141, 4.3, 790, GEMM * 494, GEMM * 67, GEMM * 67,
        "measured on one H200: copy 4.3 TB/s, bf16 GEMM 790 TFLOP/s; memory: data sheet; "
        "other formats: data sheet times 0.8",
    ),
    "h100": _from_data_sheet(80, 3.35, 989, 494, 67, 67, "NVIDIA H100 SXM"),
    "a100": _from_data_sheet(80, 2.039, 312, 156, 19.5, 19.5, "NVIDIA A100 80 GB SXM"),
    "4090": _from_data_sheet(24, 1.008, 165, 82.6, 82.6, 1.3, "GeForce RTX 4090 (bf16 with fp32 accumulation)"),
    "b200": _from_data_sheet(180, 8.0, 2250, 1125, 75, 37, "NVIDIA B200"),
}  # fmt: skip
"""By the names that `--gpu` takes. A launch is assumed to take at least 3 µs, from start to start in a full queue."""

CAPABILITIES = {"h200": (9, 0), "h100": (9, 0), "a100": (8, 0), "4090": (8, 9), "b200": (10, 0)}
