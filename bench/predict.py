"""PREDICTS the tables of `layer` for a GPU that is not here, from bytes and FLOPs counted launch by launch.

Each launch is assumed to take the longest of: its bytes at the copy bandwidth, its FLOPs at the rate of their format,
and a fixed time per launch; launches follow each other without gaps, and nothing is found in the L2 cache that another
launch left there. Bytes, FLOPs, launches and peak memory are exact; the seconds are a model, and so are all ratios.
With `--measured FILE` each row of a real run is set beside its prediction.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from .compare import group_table, title
from .contestants import DTYPES, Contestant, Problem, contestants
from .gpus import CAPABILITIES, ROOFS, Roofs
from .records import groups, read_rows
from .shapes import MODELS, Shape, layer_shapes
from .tables import milliseconds, table
from .timing import attempt
from .traffic import Operation, counting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", choices=ROOFS, required=True)
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 384])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--verbose", action="store_true", help="list each launch of ours, with its bytes and FLOPs")
    parser.add_argument("--measured", type=Path, help="results file of a real run: predict its rows and compare")


def main(args: argparse.Namespace) -> int:
    roofs, capability = ROOFS[args.gpu], CAPABILITIES[args.gpu]
    rates = ", ".join(f"{name} {value / 1e12:.0f} TFLOP/s" for name, value in roofs.flops.items())
    print(
        f"PREDICTION for {args.gpu}, nothing was measured. Roofs: {roofs.bandwidth / 1e12:.2f} TB/s, {rates}, "
        f"{roofs.launch * 1e6:.0f} µs a launch ({roofs.source})"
    )
    if args.measured:
        return _compare(args.measured, roofs, capability)
    for shape in layer_shapes(args.model):
        for tokens in args.tokens:
            for rank in args.ranks:
                case = {"layer": shape.name, "out": shape.out_features, "in": shape.in_features}
                print(f"\nPREDICTION: {title(case | {'tokens': tokens, 'rank': rank, 'dtype': args.dtype})}")
                found = predict(shape, tokens, rank, DTYPES[args.dtype], roofs, capability, verbose=args.verbose)
                print(group_table(found))
    return 0


def predict(
    shape: Shape,
    tokens: int,
    rank: int,
    dtype: torch.dtype,
    roofs: Roofs,
    capability: tuple[int, int],
    *,
    verbose: bool = False,
) -> dict[str, dict]:
    """By contestant, in the form of a measured result."""
    field = contestants(dtype, torch.device("cuda"), reference=False)
    # A patched layer refuses tensors without data, and runs what ours runs.
    field = {name: c for name, c in field.items() if not name.endswith("patched")}
    results = {}
    for name, contestant in field.items():
        counted, failure = attempt(lambda c=contestant: count(c, shape, tokens, rank, dtype, capability))
        if failure:
            results[name] = {"failed": failure}
            continue
        parts, peak = counted
        times = {part: sum(seconds(o, roofs) for o in operations) for part, operations in parts.items()}
        times["total"] = sum(times.values())
        results[name] = {"seconds": {part: {"median": t} for part, t in times.items()}, "peak_bytes": peak}
        if verbose and name.startswith("ours"):
            for part, operations in parts.items():
                for o in operations:
                    print(
                        f"  {name}, {part}: {o.name:28}{o.memory / 1e6:9.1f} MB  loads {o.loaded / 1e6:9.1f} MB"
                        f"{o.flops / 1e9:10.1f} GFLOP {o.rate:7}{seconds(o, roofs) * 1e6:9.1f} µs"
                    )
    return results


def count(
    contestant: Contestant, shape: Shape, tokens: int, rank: int, dtype: torch.dtype, capability: tuple[int, int]
) -> tuple[dict[str, list[Operation]], int]:
    """The launches of each part, and the peak memory beyond parameters and inputs."""
    meta = _empty_problem(shape, tokens, rank, dtype, "meta")
    # Built outside the counter, without data: some builders move parameters, which fake ones refuse.
    entry = contestant.build(meta)
    with counting(capability) as counter:
        fake = {}
        for module in entry.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = fake.setdefault(id(parameter), _fake(parameter))
        entry = entry._replace(trained={name: fake[id(p)] for name, p in entry.trained.items()})
        problem = _empty_problem(shape, tokens, rank, dtype, "cpu")
        counter.take()
        before = counter.restart()
        parts = {}
        for part in entry.phases(problem)():
            parts[part] = counter.take()
        return parts, counter.peak_bytes - before


def seconds(operation: Operation, roofs: Roofs) -> float:
    """The model of one launch's time."""
    return max(operation.memory / roofs.bandwidth, operation.flops / roofs.flops[operation.rate], roofs.launch)


def _fake(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def _empty_problem(shape: Shape, tokens: int, rank: int, dtype: torch.dtype, device: str) -> Problem:
    def empty(*size, dtype=dtype, trained=False):
        return torch.empty(size, dtype=dtype, device=device, requires_grad=trained)

    N, K = shape.out_features, shape.in_features
    return Problem(
        empty(tokens, K, trained=True),
        nn.Parameter(empty(N, K), requires_grad=False),
        nn.Parameter(empty(N), requires_grad=False) if shape.bias else None,
        *(empty(*size, dtype=torch.float32) for size in ((rank, K), (N, rank), (N,))),
        grad_y=empty(tokens, N),
    )


def _compare(path: Path, roofs: Roofs, capability: tuple[int, int]) -> int:
    """Every measured row of `layer` beside its prediction."""
    found = [g for g in groups(read_rows([path])) if next(iter(g.values()))["command"] == "layer"]
    found = [g for g in found if not (case := next(iter(g.values()))["case"])["compiled"]]
    if not found:
        print(f"{path} has no rows of `layer` without torch.compile")
        return 2
    for group in found:
        first = next(iter(group.values()))
        case, dtype = first["case"], DTYPES[first["case"]["dtype"]]
        shape = Shape(case["layer"], case["out"], case["in"], case["bias"])
        print(f"\n{title(case)}; measured on {first['stamp']['device']} ({first['stamp']['kind']})")
        predicted = predict(shape, case["tokens"], case["rank"], dtype, roofs, capability)
        rows = []
        for name, row in group.items():
            for part in ("forward", "backward", "total"):
                measured, guess = (
                    r.get("seconds", {}).get(part, {}).get("median") for r in (row, predicted.get(name, {}))
                )
                if measured and guess:
                    rows.append(
                        (f"{name}, {part}", milliseconds(guess), milliseconds(measured), f"{measured / guess:.2f}")
                    )
        print(table(("contestant", "predicted ms", "measured ms", "measured / predicted"), rows))
    return 0
