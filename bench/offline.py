"""Compiles every kernel of the engine for every GPU generation, on any machine, and holds the result to its limits.

The launches are those that `dora_linear`, `dora_mlp` and `dora_experts` make, forward and backward, over ranks, types,
shapes and options. The first table has a row for each kernel, type and generation, with the worst over its launches:
registers a thread, bytes of stack, instructions that spill, bytes of shared memory, tensor-core instructions (fewest,
where a dot is) and the narrowest access in bits to a two-dimensional block (where sizes divide by 16). A broken limit
is printed with its launch, and the exit status is 1.

The second table has a row for each kernel, case and GPU: instructions of a thread per element, and the time of the
longest pipe, of L2 and of the tensor cores over the time of the bytes. Above 1 the kernel cannot reach the memory's
bandwidth. Beside them stand programs on a multiprocessor, waves, and bytes in flight over those that are needed.
"""

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import triton

from dora_kernels.ops.kernels import interpreted

from .counting.case_lists import all_cases, quick_cases, roof_cases
from .counting.cases import Case
from .counting.compiled import Figures, broken_limits, compile_launch, is_aligned
from .counting.gpus import ROOFS
from .counting.launches import CAPABILITIES, Launch, SizedLaunch, launches, sized_launches
from .counting.roofs import profile
from .installation import RESULTS
from .rows.roofs import Row, roofs_table, shown

COLUMNS = ("kernel", "dtypes", "sm", "launches", "registers", "stack", "spills", "shared", "mma", "width")
THOROUGH = (9, 0)
"""The GPU generation of which the committed summary covers every launch."""
BATCH = 8  # launches a worker compiles between two reports


class Compiled(NamedTuple):
    """One launch on one GPU generation."""

    capability: tuple[int, int]
    launch: Launch
    case: Case
    figures: Figures

    def __str__(self) -> str:
        f = self.figures
        return (
            f"sm_{_sm(self.capability)} {self.launch} [{self.case}]: registers={f.registers} stack={f.stack} "
            f"spills={f.spills} shared={f.shared} mma={f.tensor_instructions} width={f.width or '-'}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--capability",
        action="append",
        type=parse_capability,
        metavar="X.Y",
        help="only this GPU generation; repeatable",
    )
    parser.add_argument("--kernel", action="append", metavar="NAME", help="only this kernel; repeatable")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one call per compiled path (an hour of one core) instead of every rank, shape and option (three hours)",
    )
    parser.add_argument("--check", action="store_true", help="compare with the committed summary: CI's choice")
    parser.add_argument("--update", action="store_true", help="rewrite the committed summary")
    parser.add_argument("--verbose", action="store_true", help="print each launch, not only the summary")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile (default: all cores)")


def main(args: argparse.Namespace) -> int:
    if not check_compilable():
        return 2
    if args.update and (args.capability or args.kernel):
        print("--update writes the whole summary: leave out --capability and --kernel", file=sys.stderr)
        return 2
    of_summary = args.check or args.update
    cases = list(dict.fromkeys(quick_cases() if args.quick or of_summary else all_cases()))
    work = {}
    for capability in args.capability or CAPABILITIES:
        found = launches(cases, capability)
        for launch, case in (summarised(found, capability) if of_summary else found).items():
            if not args.kernel or launch.name in args.kernel:
                work[capability, launch] = case
    if not work:
        print(f"no kernel is called {', '.join(args.kernel)}", file=sys.stderr)
        return 2
    compiled, failed = [], False
    for one in compile_all(work, args.jobs):
        if args.verbose:
            print(one, flush=True)
        # At once: every launch takes hours, and what breaks a limit may be no kernel that can be disassembled.
        failed |= report_broken(one)
        compiled.append(one)
    tables = [summarise(compiled), roofs_table(profile_all(args.capability, args.kernel, args.jobs))]
    print(*join(tables), sep="\n")
    path = RESULTS / f"offline-triton-{triton.__version__}.txt"
    if args.update:
        path.write_text("\n".join(join(tables)) + "\n")
        print(f"wrote {path}")
    if args.check:
        failed |= differs(path, tables, args)
    return int(failed)


def summarised(found: dict[Launch, Case], capability: tuple[int, int]) -> dict[Launch, Case]:
    """What the committed summary covers, so that CI compiles it in minutes: all launches on one generation, and on the
    others one of each kernel and types. That is one whose sizes do not divide by 16, if there is one: it needs the most
    registers."""
    if capability == THOROUGH:
        return found
    chosen: dict[tuple[str, str], Launch] = {}
    for launch, case in found.items():
        key = launch.name, case.dtypes
        if key not in chosen or (is_aligned(chosen[key]) and not is_aligned(launch)):
            chosen[key] = launch
    return {launch: found[launch] for launch in chosen.values()}


def check_compilable() -> bool:
    """Whether kernels can be compiled in this process; says why not."""
    if interpreted():
        print("the kernels are interpreted and cannot be compiled: unset TRITON_INTERPRET", file=sys.stderr)
    return not interpreted()


def compile_all(work: dict[tuple[tuple[int, int], Launch], Case], jobs: int) -> Iterator[Compiled]:
    """Compiles in `jobs` processes; yields the launches of a batch when it is done."""
    keys = iter(work)
    batches = list(iter(lambda: list(islice(keys, BATCH)), []))
    for batch in in_processes("compiled", _compile_batch, batches, jobs):
        yield from (Compiled(*key, work[key], figures) for key, figures in batch)


def profile_all(capabilities: Sequence[tuple[int, int]] | None, kernels: Sequence[str] | None, jobs: int) -> list[Row]:
    """The rows of the table of roofs, of these GPU generations and kernels (None: all)."""
    tasks: dict[tuple, dict[SizedLaunch, Case]] = {}
    for capability in {roofs.capability for roofs in ROOFS.values()}:
        if capabilities and capability not in capabilities:
            continue
        for case, launch in sized_launches(roof_cases(), capability):
            if shown(case, launch) and not (kernels and launch.launch.name not in kernels):
                tasks.setdefault((capability, launch.launch), {}).setdefault(launch, case)
    work = [(capability, list(found.items())) for (capability, _), found in tasks.items()]
    return [row for rows in in_processes("disassembled", _profile, work, jobs) for row in rows]


def in_processes(done: str, function: Callable, batches: Sequence, jobs: int) -> Iterator:
    """What `function` makes of each batch, in no order, printing progress to stderr."""
    start, tenth = time.monotonic(), 0
    # Spawned, for a process that has started LLVM's threads must not be forked.
    with ProcessPoolExecutor(max_workers=jobs, mp_context=get_context("spawn")) as pool:
        for i, future in enumerate(as_completed([pool.submit(function, batch) for batch in batches]), start=1):
            yield future.result()
            if 10 * i // len(batches) > tenth:
                tenth = 10 * i // len(batches)
                elapsed = time.monotonic() - start
                print(f"{done} {100 * i // len(batches)} % in {elapsed:.0f} s", file=sys.stderr, flush=True)


def _profile(task: tuple[tuple[int, int], list[tuple[SizedLaunch, Case]]]) -> list[Row]:
    capability, launched = task
    gpus = [name for name, roofs in ROOFS.items() if roofs.capability == capability]
    return [Row(case, launch, gpu, profile(launch, ROOFS[gpu])) for launch, case in launched for gpu in gpus]


def _compile_batch(batch: list[tuple[tuple[int, int], Launch]]) -> list:
    return [((capability, launch), compile_launch(launch, capability)) for capability, launch in batch]


def summarise(compiled: Iterable[Compiled]) -> list[str]:
    """A header and one line per kernel, types and GPU generation, each figure the worst over the launches."""
    groups: dict[tuple[str, str, int], list[Figures]] = {}
    for one in compiled:
        groups.setdefault((one.launch.name, one.case.dtypes, _sm(one.capability)), []).append(one.figures)
    lines = [COLUMNS]
    for (kernel, dtypes, sm), figures in sorted(groups.items()):
        dots = [f.tensor_instructions for f in figures if f.tensor_dots]
        widths = [f.width for f in figures if f.width]
        worst = [max(f[i] for f in figures) for i in range(4)]
        lines.append([kernel, dtypes, sm, len(figures), *worst, min(dots, default="-"), min(widths, default="-")])
    return ["{:<20}{:<11}{:>4}{:>10}{:>11}{:>7}{:>8}{:>8}{:>5}{:>7}".format(*line) for line in lines]


def report_broken(one: Compiled) -> bool:
    """Prints each limit that a launch breaks; whether there was one."""
    broken = broken_limits(one.figures, one.capability)
    for limit in broken:
        print(f"BROKEN: {limit}: sm_{_sm(one.capability)} {one.launch} [{one.case}]", file=sys.stderr, flush=True)
    return bool(broken)


def join(tables: Iterable[list[str]]) -> list[str]:
    """The lines of all tables, an empty one between them."""
    return "\n\n".join("\n".join(table) for table in tables).split("\n")


def differs(path: Path, tables: Sequence[list[str]], args: argparse.Namespace) -> bool:
    """Prints how the tables differ from the committed ones, over the rows that `args` selects."""
    if not path.exists():
        print(f"no committed summary {path.name}: run with --update and commit it", file=sys.stderr)
        return True
    capabilities = args.capability or CAPABILITIES
    gpus = {name for name, roofs in ROOFS.items() if roofs.capability in capabilities}
    generations = gpus | {str(_sm(capability)) for capability in capabilities}
    committed = []
    for header, *rows in (table.splitlines() for table in path.read_text().split("\n\n")):
        column = next(i for i, name in enumerate(header.split()) if name in ("sm", "gpu"))
        rows = [row for row in rows if row.split()[column] in generations]
        committed.append([header, *(row for row in rows if not args.kernel or row.split()[0] in args.kernel)])
    compared = (join(committed), join(tables), path.name, "compiled now")
    difference = list(difflib.unified_diff(*compared, lineterm="", n=0))
    if difference:
        print(*difference, sep="\n", file=sys.stderr)
        print("the compiled kernels changed: if intended, run `python -m bench offline --update`", file=sys.stderr)
    return bool(difference)


def _sm(capability: tuple[int, int]) -> int:
    return capability[0] * 10 + capability[1]


def parse_capability(text: str) -> tuple[int, int]:
    for capability in CAPABILITIES:
        if text == f"{capability[0]}.{capability[1]}":
            return capability
    raise argparse.ArgumentTypeError(f"must be one of {', '.join(f'{a}.{b}' for a, b in CAPABILITIES)}, got {text!r}")
