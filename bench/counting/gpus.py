"""Rates of GPUs that are not at hand, for predictions, and their sources.

`python -m bench kernels` measures bandwidth and GEMMs on a GPU. Other rates are the vendor's or estimates, and say so.
"""

from typing import NamedTuple

from .traffic import Operation


class Multiprocessor(NamedTuple):
    """One multiprocessor: results per clock of each pipe, and what it holds.

    Pipes: CUDA C++ Best Practices Guide, "Throughput of Native Arithmetic Instructions"; for 10.0 and 12.0 as its
    versions 13.0 and 13.4 are quoted by public repositories. Limits: CUDA C++ Programming Guide, "Compute
    Capabilities". Tensor cores: data sheets divided by multiprocessors, clock and 2. Tensor memory: four times the 57
    bytes a cycle that one warp read on a B300 (the repository ademeure/QuickRunCUDA); published figures disagree.
    """

    fp32: int
    alu: int  # compare, shift, logic and select; adds of integers, which 12.0 does twice as fast
    imad: int  # products of integers
    fp64: int
    tensor: int  # multiply-adds of 16-bit factors with fp32 sums, half of it for tf32
    shared: int  # bytes
    warps: int
    programs: int
    xu: int = 16  # conversions, reciprocals and roots
    shuffles: int = 32
    bytes: int = 128  # of shared memory and L1
    tensor_memory: int = 0  # bytes, read; writes are taken to be no faster


MULTIPROCESSORS = {
    (8, 0): Multiprocessor(64, 64, 64, 32, 1024, 167_936, 64, 32),
    (8, 6): Multiprocessor(128, 64, 64, 2, 256, 102_400, 48, 16),
    (8, 9): Multiprocessor(128, 64, 64, 2, 256, 102_400, 48, 24),
    (9, 0): Multiprocessor(128, 64, 64, 64, 2048, 233_472, 64, 32),
    (10, 0): Multiprocessor(128, 64, 64, 64, 4096, 233_472, 64, 32, tensor_memory=228),
    (12, 0): Multiprocessor(128, 64, 64, 2, 256, 102_400, 48, 24),
}
"""By compute capability."""


class Roofs(NamedTuple):
    """What a prediction assumes of a GPU: bytes and FLOPs a second, seconds per launch, bytes of memory, cycles a
    second of each multiprocessor, and their sources."""

    capability: tuple[int, int]
    bandwidth: float
    l2: float
    flops: dict[str, float]  # by rate: bf16, bf16x3, tf32x3, fp32, fp64
    launch: float
    memory: float  # the data sheet's GB as GiB, which no card quite has: an H200 reports 139.8 of 141
    multiprocessors: int
    clock: float
    source: str

    @property
    def multiprocessor(self) -> Multiprocessor:
        return MULTIPROCESSORS[self.capability]


def by_bytes_and_flops(operation: Operation, roofs: Roofs) -> tuple[str, float]:
    """The longest roof of one launch and its seconds: all that can be said of other libraries' kernels."""
    times = {
        "memory": operation.memory / roofs.bandwidth,
        "tensor": operation.flops / roofs.flops[operation.rate],
        "launch": roofs.launch,
    }
    return max(times.items(), key=lambda roof: roof[1])


def seconds(operation: Operation, roofs: Roofs) -> float:
    """One launch's time by bytes of memory and FLOPs alone."""
    return by_bytes_and_flops(operation, roofs)[1]


LATENCY = 700e-9
"""Seconds from a load's issue to its data while memory is busy: an estimate; 500 to 600 ns are measured on idle
Hopper GPUs."""

# Share of the data sheet's numbers that large copies and GEMMs reach on the one GPU where both were measured: an H200
# copies 4.3 of 4.8 TB/s and multiplies at 790 of 989 TFLOP/s.
COPY, GEMM = 0.9, 0.8
LAUNCH = 3e-6  # seconds, from start to start in a full queue
TERA, GIGA = 1e12, 1e9


def _roofs(
    capability: tuple[int, int],
    source: str,
    *,
    memory_gb: float,
    bandwidth: float,
    l2: float,
    multiprocessors: int,
    clock: float,
    flops: tuple[float, ...],
) -> Roofs:
    """Bandwidths in TB/s, the clock in GHz, FLOPs in TFLOP/s: bf16, tf32, fp32, fp64."""
    bf16, tf32, fp32, fp64 = (TERA * value for value in flops)
    # Of fp32 factors: three products of their pieces.
    rates = {"bf16": bf16, "bf16x3": bf16 / 3, "tf32x3": tf32 / 3, "fp32": fp32, "fp64": fp64}
    rest = (rates, LAUNCH, memory_gb * 2**30, multiprocessors, GIGA * clock, source)
    return Roofs(capability, TERA * bandwidth, TERA * l2, *rest)


def _from_data_sheet(capability: tuple[int, int], name: str, *, bandwidth: float, flops: tuple, **rates) -> Roofs:
    source = f"data sheet of {name}, dense, times {COPY} (bandwidth) and {GEMM} (products)"
    flops = tuple(GEMM * value for value in flops)
    return _roofs(capability, source, bandwidth=COPY * bandwidth, flops=flops, **rates)


ROOFS = {
    "h200": _roofs(
        (9, 0),
        "measured on one H200: copy 4.3 TB/s, bf16 GEMM 790 TFLOP/s; memory: data sheet; "
        "other formats: data sheet times 0.8",
        memory_gb=141, bandwidth=4.3, l2=6.65, multiprocessors=132, clock=1.755,
        flops=(790, GEMM * 494, GEMM * 67, GEMM * 67),
    ),
    "h100": _from_data_sheet(
        (9, 0), "NVIDIA H100 SXM", memory_gb=80, bandwidth=3.35, l2=6.65, multiprocessors=132, clock=1.755,
        flops=(989, 494, 67, 67),
    ),
    "a100": _from_data_sheet(
        (8, 0), "NVIDIA A100 80 GB SXM", memory_gb=80, bandwidth=2.039, l2=4.5, multiprocessors=108, clock=1.41,
        flops=(312, 156, 19.5, 19.5),
    ),
    "4090": _from_data_sheet(
        (8, 9), "GeForce RTX 4090 (bf16 with fp32 accumulation)", memory_gb=24, bandwidth=1.008, l2=5.0,
        multiprocessors=128, clock=2.5, flops=(165, 82.6, 82.6, 1.3),
    ),
    "b200": _from_data_sheet(
        (10, 0), "NVIDIA B200", memory_gb=180, bandwidth=8.0, l2=10.0, multiprocessors=148, clock=1.85,
        flops=(2250, 1125, 75, 37),
    ),
}  # fmt: skip
"""By the names that `--gpu` takes.

L2: XLA's cost model has 6.65 TB/s for an H100, as measured. An H200 is taken to have the same. Others are estimates.
Clocks: the A100's and the RTX 4090's are the data sheets' boost. Hopper's 1.755 GHz (of up to 1.98) and the B200's
1.85 GHz are estimates of what they keep under load.
"""

CAPABILITIES = {name: roofs.capability for name, roofs in ROOFS.items()}
