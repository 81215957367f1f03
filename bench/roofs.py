"""Measures the roofs of the machine: a copy through memory, one that stays in L2, products, and the shortest launch.

The copy moves 1 GiB each way on a GPU; products are of random 8192×8192 matrices in bf16, tf32 and fp32. The copy in L2
is of 8 MiB, many times in a row; the launch is an addition to one element, many times in a row. On a CPU all are
smaller, fp32 alone is multiplied, and the caches are its own.
"""

import argparse
from collections.abc import Callable

import torch

from .counting.gpus import Roofs
from .kernels import COPY, GEMM, GEMM_SIDE, bandwidth, roof_calls
from .measuring.timing import interleaved
from .rows.compare import seconds
from .rows.session import Session
from .rows.session import add_arguments as add_session_arguments
from .rows.tables import table

COMMAND = "roofs"
CASE = {"roofs": "all"}
L2_COPY, TF32, FP32, LAUNCH = "copy in L2", "GEMM, tf32", "GEMM, fp32", "launch"
L2_ELEMENTS = 1 << 22  # of bf16: 8 MiB, which with its copy is less than half of any large GPU's L2
IN_A_ROW = 100
PRECISIONS = {TF32: "high", FP32: "highest"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_session_arguments(parser)


def main(args: argparse.Namespace) -> int:
    session = Session(args)
    run(session)
    return session.finish()


def run(session: Session) -> None:
    """Measures the machine of the session."""
    if session.skips(COMMAND, CASE):
        return
    if results := session.measure(COMMAND, CASE, lambda: measure(session.device, session.repetitions)):
        print(roofs_table(results), flush=True)


def measure(device: torch.device, repetitions: int) -> dict[str, dict]:
    """By roof: its time, and the bytes, FLOPs or launches in it, or why it failed."""
    calls, sizes = roof_calls(device)
    small = torch.ones(L2_ELEMENTS, dtype=torch.bfloat16, device=device)
    other, one = torch.empty_like(small), torch.zeros(1, device=device)
    calls[L2_COPY] = lambda: [other.copy_(small) for _ in range(IN_A_ROW)]
    calls[LAUNCH] = lambda: [one.add_(1) for _ in range(IN_A_ROW)]
    sizes[L2_COPY] = {"memory_bytes": 2 * small.nbytes * IN_A_ROW, "flops": {}}
    sizes[LAUNCH] = {"memory_bytes": 0, "flops": {}, "launches_in_a_row": IN_A_ROW}
    if device.type == "cuda":
        side = GEMM_SIDE["cuda"]
        left, right = torch.randn(2, side, side, device=device)
        for name, precision in PRECISIONS.items():
            calls[name] = lambda precision=precision: _product(left, right, precision)
            sizes[name] = {"memory_bytes": 3 * left.nbytes, "flops": {name.partition(", ")[2]: 2 * side**3}}
    phases = {name: _whole(call) for name, call in calls.items()}
    times, failed = interleaved(phases, device, repetitions=repetitions, head_start=True)
    return {
        name: {
            "failed": failed.get(name),
            "seconds": {part: t._asdict() for part, t in times[name].items()} if name in times else {},
            **sizes[name],
        }
        for name in calls
    }


def measured_roofs(group: dict[str, dict], assumed: Roofs) -> Roofs:
    """What a prediction takes; where a roof was not measured, what `assumed` has."""
    flops = dict(assumed.flops)
    for name, rate, products in ((GEMM, "bf16", 1), (GEMM, "bf16x3", 3), (TF32, "tf32x3", 3), (FP32, "fp32", 1)):
        if time := seconds(group.get(name)):
            flops[rate] = sum(group[name]["flops"].values()) / time / products
    launch = seconds(group.get(LAUNCH))
    return assumed._replace(
        bandwidth=bandwidth(group.get(COPY)) or assumed.bandwidth,
        l2=bandwidth(group.get(L2_COPY)) or assumed.l2,
        flops=flops,
        launch=launch / IN_A_ROW if launch else assumed.launch,
        source="measured by `bench roofs`; what it does not measure: " + assumed.source,
    )


def roofs_table(group: dict[str, dict]) -> str:
    """One row per roof."""
    rows = []
    for name, row in group.items():
        time = seconds(row)
        if time is None:
            rows.append((f"{name}: {row['failed']}", "-", "-", "-"))
            continue
        spread = row["seconds"]["total"]
        flops = sum(row["flops"].values())
        reached = f"{flops / time / 1e12:.1f} TFLOP/s" if flops else f"{bandwidth(row) / 1e12:.3f} TB/s"
        if "launches_in_a_row" in row:
            reached = f"{time / row['launches_in_a_row'] * 1e6:.2f} µs a launch"
        half = 50 * (spread["high"] - spread["low"]) / time
        rows.append((name, reached, f"{time * 1e3:.3f}", f"{half:.1f}"))
    return table(("roof", "reached", "ms", "± %"), rows)


def _product(left: torch.Tensor, right: torch.Tensor, precision: str) -> torch.Tensor:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return left @ right
    finally:
        torch.set_float32_matmul_precision(before)


def _whole(call: Callable):
    def phases():
        call()
        yield "call"

    return phases
