"""Compiles the kernels of a day in many processes, before one process would compile them one by one.

    python -m bench.day.compile_ahead --capability 9.0 --preset day

They land in Triton's cache, under the names by which their launches look for them.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch
import triton

from ..counting.cases import BF16, FP16, FP32, INT4, Case
from ..counting.launches import launches, target_of
from ..installation import PACKAGE, ROOT
from ..measuring.shapes import BLOCKS, BREAK_EVEN, PRESETS, Preset, block_sizes
from ..offline import parse_capability
from .folder import cache_of
from .step import Done

SECONDS = 1.5 / (os.cpu_count() or 1)  # a kernel, until they were counted
BATCH = 4  # launches that a process compiles between two reports
REHEARSED = 2  # kernels that a rehearsal compiles


def total(day) -> int:
    """How many kernels there are, about: they are counted by the process that compiles them."""
    return day.folder.step("compile").get("kernels") or (REHEARSED if day.rehearsed else 250)


def seconds_left(day) -> float:
    """What compiling the others will take."""
    left = day.folder.step("compile")["left"]
    return SECONDS * (total(day) if left is None else left)


def run(day, step, seconds: float) -> Done:
    """Runs this file as a command for so long at most."""
    major, minor = torch.cuda.get_device_capability(day.device)
    command = [sys.executable, "-m", f"{PACKAGE}.day.compile_ahead"]
    command += ["--capability", f"{major}.{minor}", "--preset", day.preset, "--seconds", str(seconds)]
    if day.rehearsed:
        command += ["--most", str(REHEARSED), "--jobs", "1"]
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache_of(day.rehearsed))}
    known, found = day.folder.step(step.name), {}
    # In this process's group, so that it ends with it.
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            found = json.loads(line)
            known["cases"], known["kernels"] = found["compiled"], found["kernels"]
            print(f"   compiled {found['compiled']} of {found['kernels']}", flush=True)
    left = found["kernels"] - found["compiled"] if found else None
    return Done(int(not found), 1 if left is None else left)


def cases(preset: str) -> Iterator[Case]:
    """The calls whose kernels the day launches: of layers, of gated MLPs, of attention's layers that share an input, of
    experts."""
    of = PRESETS[preset]
    tokens, ranks = BREAK_EVEN[preset]
    sizes = {(shape, m, r) for _, shape, m, r in of.layers()}
    sizes |= {(shape, m, r) for _, shape, _, _ in of.layers() for m, r in itertools.product(tokens, ranks)}
    for shape, m, r in sorted(sizes, key=lambda size: (size[2], -size[1])):
        for adapter_dtype in (FP32, BF16):
            for space in ("token", "weight"):
                yield Case(BF16, adapter_dtype, space, r, shape.out_features, shape.in_features, m, bias=shape.bias)
    shape = next(of.layers())[1]
    for types in ((FP32, FP32), (FP16, FP32)):
        yield Case(*types, "token", of.ranks[0], shape.out_features, shape.in_features, 515)
    yield from _blocks(of)
    yield from _experts(of)
    for packed in [{"nf4": "nested"}, *({"int4": kind} for kind in INT4)]:
        yield Case(BF16, FP32, "weight", of.ranks[0], shape.out_features, shape.in_features, 515, **packed)


def _blocks(of: Preset) -> Iterator[Case]:
    found = {(block, m, r, space) for _, block, m, r in of.blocks() for space in ("token", "weight")}
    for run in (run for run in of.runs if not run.is_mixture):
        for name, sizes in block_sizes(run.model).items():
            found.add((BLOCKS[name](**sizes), run.batch * run.sequence, run.rank, "auto"))
    for block, m, r, space in sorted(found):
        first = block.layers[0]
        kind = {"mlp": "silu"} if block.name == "mlp" else {"siblings": block.outputs, "bias": first.bias}
        yield Case(BF16, FP32, space, r, first.out_features, first.in_features, m, **kind)


def _experts(of: Preset) -> Iterator[Case]:
    mixtures = [run for run in of.runs if run.is_mixture]
    found = {(shape, m, r) for _, shape, m, r in of.experts()}
    found |= {(run.sizes.experts, run.batch * run.sequence, run.rank) for run in mixtures}
    for (experts, chosen, hidden, intermediate), m, r in sorted(found):
        for space in ("token", "weight"):
            gate_up = Case(BF16, FP32, space, r, 2 * intermediate, hidden, m * chosen, experts=experts)
            down = gate_up._replace(out_features=hidden, in_features=intermediate)
            yield from (gate_up._replace(mlp="silu"), gate_up, down)
    for run in mixtures:
        q, k, hidden = run.sizes.queries, run.sizes.keys, run.sizes.hidden_size
        attention = Case(BF16, FP32, "auto", run.rank, q, hidden, run.batch * run.sequence)
        yield attention._replace(siblings=(q, k, k))
        yield attention
        yield attention._replace(out_features=k)
        yield attention._replace(out_features=hidden, in_features=q)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--capability", type=parse_capability, required=True)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--most", type=int, default=None)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    found = list(itertools.islice(launches(cases(args.preset), args.capability), args.most))
    batches = [(args.capability, found[i : i + BATCH]) for i in range(0, len(found), BATCH)]
    done = 0
    for count in compiled(batches, args.jobs, deadline):
        done += count
        print(json.dumps({"kernels": len(found), "compiled": done}), flush=True)
    return 0


def compiled(batches: list, jobs: int, deadline: float) -> Iterator[int]:
    """How many each finished batch has compiled; after the deadline none is begun."""
    # Spawned, for a process that has started LLVM's threads must not be forked.
    with ProcessPoolExecutor(max_workers=jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_compile, batch) for batch in batches]):
            yield future.result()
            if time.monotonic() > deadline:
                pool.shutdown(cancel_futures=True)
                return


def _compile(batch) -> int:
    capability, found = batch
    for launch in found:
        triton.compile(launch.source(), target=target_of(capability), options=dict(launch.options))
    return len(found)


if __name__ == "__main__":
    sys.exit(main())
