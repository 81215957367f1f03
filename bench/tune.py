"""Proposes launch configurations for one kernel, types, rank and shape: the values that its `*_config` should return.

Every combination of the values given by --field (default: a small grid) is compiled for the GPU generation; those that
break a limit of `python -m bench offline` are left out. On a machine whose GPU is of that generation the rest is timed
and the fastest comes first. Elsewhere they are ordered by the warps that fit on a multiprocessor and by registers:
that says what cannot be bad for want of resources, and nothing about speed.
"""

import argparse
import importlib
import itertools
import pkgutil
import sys
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from dora_kernels.ops import kernels

from .counting.cases import DTYPES, Case, call
from .counting.compiled import SHARED_LIMITS, Figures, broken_limits, compile_launch
from .counting.launches import launches
from .offline import check_compilable, parse_capability

CONFIGURED_BY = {
    "weight_norm": "weight_norm_config",
    "merge_scale": "merge_config",
    "rescale_fwd": "rescale_fwd_config",
    "rescale_bwd": "rescale_bwd_config",
    "glu_fwd": "glu_fwd_config",
    "glu_bwd": "glu_bwd_config",
}
GRID = {
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
    "in_flight": (1, 3, 4),
    "block_m": (32, 64),
    "block_n": (16, 32, 64),
    "block_k": (64, 128),
}
REGISTERS = 65_536  # on a multiprocessor of every GPU since 8.0
WARPS = {(8, 0): 64, (9, 0): 64, (10, 0): 64}  # that fit on a multiprocessor; 48 on the others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    dtypes = {Case(*pair, "token", 16).dtypes: pair for pair in DTYPES}
    parser.add_argument("--kernel", required=True, choices=CONFIGURED_BY)
    parser.add_argument("--capability", type=parse_capability, default=(9, 0), metavar="X.Y", help="default: 9.0")
    parser.add_argument("--dtypes", type=str, choices=dtypes, default="bf16/fp32", help="of x and W / of the adapter")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shape", type=int, nargs=3, default=(4096, 4096, 8192), metavar=("N", "K", "M"))
    parser.add_argument(
        "--field", action="append", type=_field, default=[], metavar="NAME=V,V", help="values to try; repeatable"
    )
    parser.set_defaults(dtype_pairs=dtypes)


def main(args: argparse.Namespace) -> int:
    if not check_compilable():
        return 2
    out_features, in_features, tokens = args.shape
    space = "weight" if args.kernel.startswith("merge") else "token"
    mlp = "silu" if args.kernel.startswith("glu") else None
    case = Case(*args.dtype_pairs[args.dtypes], space, args.rank, out_features, in_features, tokens, mlp=mlp)
    timed = torch.cuda.is_available() and torch.cuda.get_device_capability() == args.capability
    rows, left_out = [], 0
    for fields in candidates(CONFIGURED_BY[args.kernel], dict(args.field)):
        with configured(CONFIGURED_BY[args.kernel], fields):
            found = [launch for launch in launches([case], args.capability) if launch.name == args.kernel]
            if not found:
                print(f"{case} does not launch {args.kernel}", file=sys.stderr)
                return 2
            figures = [compile_launch(launch, args.capability) for launch in found]
            if any(broken_limits(f, args.capability) for f in figures):
                left_out += 1
                continue
            warps = min(resident_warps(f, launch.num_warps, args.capability) for f, launch in zip(figures, found))
            rows.append((milliseconds(case, args.kernel) if timed else None, -warps, figures[-1], fields))
        print(f"tried {fields}", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: (row[0] or 0.0, row[1], row[2].registers))
    print(f"{args.kernel} for {case}, sm_{args.capability[0]}{args.capability[1]}; {left_out} broke a limit")
    print("timed on this GPU" if timed else "NOT TIMED, no such GPU here: ordered by resources, not by speed")
    for time, warps, f, fields in rows:
        settings = ", ".join(f"{name}={value}" for name, value in fields.items())
        speed = f"{1000 * time:9.1f} us" if timed else f"{-warps:3} warps"
        print(f"{speed}  registers={f.registers:<4}shared={f.shared:<7}mma={f.tensor_instructions:<4}{settings}")
    return 0


def candidates(function: str, chosen: dict[str, tuple[int, ...]]):
    """Each combination of values, for the fields that this configuration has."""
    (original,) = {getattr(module, function) for module in _modules_with(function)}
    known = original.__annotations__["return"]._fields
    if unknown := set(chosen) - set(known):
        raise SystemExit(f"{function} has no field {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    fields = chosen or {name: values for name, values in GRID.items() if name in known}
    for values in itertools.product(*fields.values()):
        yield dict(zip(fields, values))


@contextmanager
def configured(function: str, fields: dict[str, int]):
    """Inside, the launchers get the configuration they would have, with these fields replaced."""
    modules = _modules_with(function)
    original = getattr(modules[0], function)

    def replaced(*args, **kwargs):
        return original(*args, **kwargs)._replace(**fields)

    with ExitStack() as patches:
        for module in modules:
            patches.enter_context(mock.patch.object(module, function, replaced))
        yield


def resident_warps(figures: Figures, num_warps: int, capability: tuple[int, int]) -> int:
    """Warps of this kernel that fit on one multiprocessor at once."""
    # A warp's registers are handed out in units of 256; a program's shared memory comes with 1 KiB for the system.
    by_registers = REGISTERS // (-(-figures.registers * 32 // 256) * 256 * num_warps)
    by_shared = (SHARED_LIMITS[capability] + 1024) // (figures.shared + 1024)
    return min(by_registers, by_shared, WARPS.get(capability, 48) // num_warps) * num_warps


def milliseconds(case: Case, kernel: str) -> float:
    """Time of this kernel's launches in the call, repeated alone with the same arguments. Needs a GPU."""
    from triton.testing import do_bench

    made, run = [], JITFunction.run

    def record(self, *args, **kwargs):
        if self.fn.__name__ == f"_{kernel}_kernel":
            made.append((self, args, kwargs))
        return run(self, *args, **kwargs)

    with mock.patch.object(JITFunction, "run", record), torch.device("cuda"):
        call(case)
    return do_bench(lambda: [run(launched, *args, **kwargs) for launched, args, kwargs in made])


def _modules_with(function: str):
    names = (module.name for module in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."))
    return [module for module in map(importlib.import_module, names) if hasattr(module, function)]


def _field(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, values = text.partition("=")
    try:
        return name, tuple(int(value) for value in values.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be NAME=V,V with whole numbers, got {text!r}") from None
