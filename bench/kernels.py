"""Times each kernel against its floor: its bytes at the copy bandwidth, or its FLOPs at the rate of a GEMM.

Both roofs are measured in the same run, interleaved with the kernels: a device-to-device copy, and a product of random
matrices (bf16 on a GPU; fp32 on a CPU, where the reference runs in the kernels' place and the bytes are those that the
kernels would move). The floor's bytes are the operation's arguments and results, once each; "MB" is what its launches
move across the memory bus, `loads` what the programs load, the L2 cache's work included. The floor of products in fp32
precision on a GPU is that of three tf32 products, each at half bf16's rate. Every operation is held to fp64 first, and
each repetition to the first. On a GPU "profiler ms" is the sum of the kernels in the GPU's own profile. Bytes over time
that are more than the measured copy's, by over 5 %, are marked: such a row is not to be believed.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch

from dora_kernels.ops import dispatch

from .contestants.layer import ALPHA_OVER_RANK, DTYPES, empty_problem, make_problem
from .counting.gpus import Roofs
from .counting.operations import operations
from .counting.roofs import longest
from .counting.traffic import Operation, counting
from .gates import kernels as kernel_gate
from .measuring.outputs import Outputs
from .measuring.profiler import profile, profiled_seconds
from .measuring.timing import interleaved
from .rows.compare import seconds
from .rows.session import Session
from .rows.session import add_arguments as add_session_arguments
from .rows.tables import milliseconds, table

COMMAND = "kernels"
COPY, GEMM = "device copy", "GEMM"
ROOF_BYTES, ROOF_FLOPS = 1 << 30, 1 << 40  # of a predicted copy and GEMM: any would do
COPY_ELEMENTS, GEMM_SIDE = {"cuda": 1 << 28, "cpu": 1 << 22}, {"cuda": 8192, "cpu": 512}
PLAUSIBLE = 1.05  # times the measured copy bandwidth
SLOWER = {"bf16": 1, "bf16x3": 3, "tf32x3": 6, "fp32": 1, "fp64": 1}
"""How many times longer than bf16's a product takes on a GPU. On a CPU all are fp32's, as the measured GEMM is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_session_arguments(parser)


def main(args: argparse.Namespace) -> int:
    session = Session(args)
    run(session)
    return session.finish()


def run(session: Session) -> None:
    """Measures every case of the session's preset."""
    dtype = DTYPES[session.preset.dtype]
    for case, *sizes in session.preset.layers():
        if session.skips(COMMAND, case):
            continue
        results = session.measure(
            COMMAND, case, lambda sizes=sizes: measure(*sizes, dtype, session.device, session.repetitions)
        )
        if results:
            print(kernels_table(results), flush=True)


class Counted(NamedTuple):
    """One operation's launches, and the bytes that none could do without."""

    launches: list[Operation]
    compulsory_bytes: int

    def row(self) -> dict:
        """As a result has it."""
        made = self.launches
        return {
            "launches": [o.name for o in made],
            "compulsory_bytes": self.compulsory_bytes,
            "memory_bytes": sum(o.memory for o in made),
            "loaded_bytes": sum(o.loaded for o in made),
            "flops": {rate: sum(o.flops for o in made if o.rate == rate) for rate in {o.rate for o in made}},
        }


def measure(shape, tokens: int, rank: int, dtype: torch.dtype, device: torch.device, repetitions: int) -> dict:
    """By operation: its error against fp64, time, bytes and FLOPs, or why it failed; and the two roofs."""
    impl = dispatch.choose_impl(device)[0]
    ops = dispatch.implementation(impl)
    with torch.no_grad():
        problem = make_problem(shape, tokens, rank, dtype, device)
        factors = (problem.weight, problem.lora_A, problem.lora_B, problem.magnitude)
        (norm, scale), _ = ops.weight_norm(*factors, ALPHA_OVER_RANK)
        base_out, h = problem.x @ problem.weight.T, problem.x @ problem.lora_A.to(dtype).T
        works = operations(ops, problem, norm, scale, base_out, h)
        errors, failed = kernel_gate.check(
            {name: work.call for name, work in works.items()}, kernel_gate.truths(problem, norm, scale, base_out, h)
        )
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
        counted = {name: c.row() for name, c in count(shape, tokens, rank, dtype, capability).items()}
        roofs, sizes = roof_calls(device)
        calls = roofs | {name: work.call for name, work in works.items() if name not in failed}
        phases = {name: _whole(call) for name, call in calls.items()}
        kept = [tensor for work in works.values() for tensor in work.tensors]
        times, failed_later = interleaved(
            phases, device, repetitions=repetitions, head_start=True, inspect=Outputs(kept)
        )
        failed |= failed_later
        profiles = {name: profile(works[name].call, device) for name in works if name not in failed}
    results = {}
    for name in (*roofs, *works):
        done = {part: t._asdict() for part, t in times[name].items()} if name in times else {}
        results[name] = {"impl": impl, "seconds": done, "failed": failed.get(name), **(sizes | counted)[name]}
        if profiles.get(name):
            results[name]["profile"] = profiles[name]
        if name in errors:
            results[name]["errors"] = errors[name]
    return results


def count(shape, tokens: int, rank: int, dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, Counted]:
    """Of each operation, from fake tensors."""
    found = {}
    with counting(capability) as counter, torch.no_grad():
        problem = empty_problem(shape, tokens, rank, dtype, "cpu")
        norm, scale = torch.empty(2, shape.out_features)
        base_out, h = torch.empty_like(problem.grad_y), torch.empty(tokens, rank, dtype=dtype)
        works = operations(dispatch.implementation("triton"), problem, norm, scale, base_out, h)
        for name, work in works.items():
            counter.take()
            returned = work.call()
            found[name] = Counted(counter.take(), work.bytes(returned))
    return found


def predict(shape, tokens: int, rank: int, dtype: torch.dtype, roofs: Roofs, limit=longest) -> dict:
    """In the form of a measured result: the roofs that are assumed, and each operation's launches one after another,
    with the roof of each. `limit` gives the roof and the seconds of a launch."""
    found = {
        COPY: {
            "memory_bytes": ROOF_BYTES,
            "loaded_bytes": ROOF_BYTES // 2,
            "flops": {},
            "time": ROOF_BYTES / roofs.bandwidth,
        },
        GEMM: {
            "memory_bytes": 0,
            "loaded_bytes": 0,
            "flops": {"bf16": ROOF_FLOPS},
            "time": ROOF_FLOPS / roofs.flops["bf16"],
        },
    }
    for name, counted in count(shape, tokens, rank, dtype, roofs.capability).items():
        limits = [limit(operation, roofs) for operation in counted.launches]
        found[name] = {**counted.row(), "time": sum(time for _, time in limits), "roofs": [roof for roof, _ in limits]}
    return {
        name: {"impl": "triton", "seconds": {"total": {"median": row.pop("time")}}, **row}
        for name, row in found.items()
    }


def roof_calls(device: torch.device) -> tuple[dict[str, Callable], dict[str, dict]]:
    """The copy and the GEMM that stand for the roofs, and what they move and multiply."""
    gpu = device.type == "cuda"
    elements, side = COPY_ELEMENTS[device.type], GEMM_SIDE[device.type]
    dtype = torch.bfloat16 if gpu else torch.float32
    source, target = torch.ones(elements, dtype=dtype, device=device), torch.empty(elements, dtype=dtype, device=device)
    # Random: products of zeros draw less power and run at a higher clock.
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    calls = {COPY: lambda: target.copy_(source), GEMM: lambda: left @ right}
    moved, matrices = 2 * source.nbytes, 3 * left.nbytes
    return calls, {
        COPY: {"memory_bytes": moved, "loaded_bytes": moved // 2, "flops": {}},
        GEMM: {"memory_bytes": matrices, "loaded_bytes": matrices, "flops": {"bf16" if gpu else "fp32": 2 * side**3}},
    }


def floor(row: dict, group: dict[str, dict]) -> float | None:
    """Seconds that a call's bytes or FLOPs take at the roofs of its run, whichever is longer."""
    copy, gemm = group[COPY], group[GEMM]
    if not (seconds(copy) and seconds(gemm)):
        return None
    bandwidth = copy["memory_bytes"] / seconds(copy)
    ((multiplied, gemm_flops),) = gemm["flops"].items()
    slower = SLOWER if multiplied == "bf16" else dict.fromkeys(SLOWER, 1)
    product = sum(flops * slower[name] for name, flops in row["flops"].items()) * seconds(gemm) / gemm_flops
    return max(row.get("compulsory_bytes", row["memory_bytes"]) / bandwidth, product)


def bandwidth(row: dict | None) -> float | None:
    """Bytes a second across the memory bus."""
    time = seconds(row)
    return row["memory_bytes"] / time if time else None


def implausible(row: dict, group: dict[str, dict]) -> bool:
    """Whether a row claims more bytes a second than memory has: its time, its bytes or the copy's must be wrong."""
    claimed, copied = bandwidth(row), bandwidth(group.get(COPY))
    return bool(claimed and copied) and claimed > PLAUSIBLE * copied


def kernels_table(group: dict[str, dict]) -> str:
    """One row per operation; the measured or assumed rates first. Spreads and profiles are columns where there are any.

    Predictions name the roof of each launch.
    """
    predicted = any("roofs" in row for row in group.values())
    spread = any("low" in (row.get("seconds") or {}).get("total", {}) for row in group.values())
    profiled = any("profile" in row for row in group.values())
    header = ["operation", "ms", "MB", "loads MB", "GB/s", "TFLOP/s", "floor ms", "× floor"]
    header += ["roof"] * predicted + ["± %"] * spread + ["profiler ms"] * profiled
    rows, notes = [], []
    for name, row in group.items():
        time = seconds(row)
        if time is None:
            rows.append((f"{name}: {row['failed']}", *["-"] * (len(header) - 1)))
            continue
        lowest, mark = floor(row, group), ""
        if name != COPY and implausible(row, group):
            mark = " (!)"
            notes.append(f"(!) {name}: more than {PLAUSIBLE} × the measured copy; not to be believed")
        total = row["seconds"]["total"]
        cells = [
            f"{name} ({row['impl']})" if "launches" in row else name,
            milliseconds(time),
            f"{row['memory_bytes'] / 1e6:.1f}",
            f"{row['loaded_bytes'] / 1e6:.1f}",
            f"{row['memory_bytes'] / time / 1e9:.0f}{mark}",
            f"{sum(row['flops'].values()) / time / 1e12:.2f}",
            milliseconds(lowest),
            f"{time / lowest:.2f}" if lowest else "-",
        ]
        if predicted:
            cells.append(", ".join(row.get("roofs", "-")))
        if spread:
            cells.append(f"{50 * (total['high'] - total['low']) / time:.0f}" if "low" in total else "-")
        if profiled:
            cells.append(milliseconds(profiled_seconds(row)))
        rows.append(cells)
    return "\n".join([table(header, rows), *notes])


def _whole(call: Callable):
    def phases():
        returned = call()
        yield "call"
        return returned

    return phases
