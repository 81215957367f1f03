"""PREDICTS the tables of `kernels`, `layer`, `block`, `model` and `experts` for a GPU that is not here.

"mixture" is the table of `model` for a mixture of experts, whose tokens are spread evenly.

A launch of our kernels takes the longest of four roofs, or a fixed time: the bytes that must come from memory, the
bytes that programs load and store through L2, the issue slots and pipes that its instructions take, and its products
on the tensor cores. Its instructions are those of the compiled kernel. Kernels of other libraries have the roofs of
memory and of products alone, and so have all kernels of experts. Launches follow each other without gaps. No launch
finds in L2 what another left there. Bytes, FLOPs, launches and peak memory are exact; the seconds are a model, and so
are all ratios. Axolotl's and Unsloth's kernels have no account here, and no rows.

`--measured FILE` sets each row of a real run beside its prediction. A model whose frozen weights and peak exceed the
memory on the data sheet has no time. `bench/results/predict-h200.txt` is what the defaults print for an H200; to change
it: `python -m bench predict --gpu h200 --output bench/results/predict-h200.txt`.
"""

import argparse
import itertools
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from . import block, experts, kernels, layer, model
from .contestants.layer import DTYPES
from .counting.gpus import ROOFS, Roofs, by_bytes_and_flops
from .counting.predicted import Limit, predict, predict_model
from .counting.roofs import longest
from .measuring.shapes import (
    EXPERTS,
    MODELS,
    QUANTISED,
    ExpertShape,
    Preset,
    Run,
    Shape,
    block_shape,
    layer_shapes,
)
from .offline import check_compilable
from .rows.compare import group_table, title
from .rows.records import groups, read_rows
from .rows.tables import mebibytes, milliseconds, ratio, table

MARK = "*"
NOTES = {
    longest: f"{MARK} kernels of the base, PEFT and PyTorch are counted by bytes and FLOPs alone, ours by four roofs",
    by_bytes_and_flops: f"{MARK} all kernels are counted by bytes and FLOPs alone",
}
EXPERTS_NOTE = ", but kernels of experts by bytes and FLOPs alone"
MIXTURE = "mixture"
"""The table of a whole mixture's step, which `model` measures."""
TABLES = (kernels.COMMAND, layer.COMMAND, block.COMMAND, model.COMMAND, experts.COMMAND, MIXTURE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", choices=ROOFS, required=True)
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument("--mixture", choices=EXPERTS, default="qwen3-30b-a3b", help="whose experts, and whose step")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 384])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--batch", type=int, default=2, help="of the whole model's step")
    parser.add_argument("--sequence", type=int, default=4096, help="of the whole model's step")
    parser.add_argument("--layers", type=int, default=0, help="of the whole model (default: its own number)")
    parser.add_argument("--tables", choices=TABLES, nargs="+", default=list(TABLES), help="default: all")
    parser.add_argument(
        "--bytes-alone", action="store_true", help="count our kernels, too, by bytes and FLOPs alone, without compiling"
    )
    parser.add_argument("--verbose", action="store_true", help="list each launch of ours, with its bytes and FLOPs")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--measured", type=Path, help="results file of a real run: predict its rows and compare")
    files.add_argument("--output", type=Path, metavar="FILE", help="write there what is printed")


def main(args: argparse.Namespace) -> int:
    if not args.bytes_alone and not check_compilable():
        return 2
    roofs = ROOFS[args.gpu]
    if args.measured:
        print(header(args.gpu, roofs, f"beside what was measured in {args.measured}"))
        return compare(args.measured, roofs, args.tables, limit_of(args))
    parts = []
    for part in itertools.chain([header(args.gpu, roofs, "nothing was measured")], sections(args)):
        print(part, flush=True)
        parts.append(part)
    if args.output:
        args.output.write_text("\n".join(parts) + "\n")
        print(f"\nwrote {args.output}")
    return 0


def limit_of(args: argparse.Namespace) -> Limit:
    return by_bytes_and_flops if args.bytes_alone else longest


def header(gpu: str, roofs: Roofs, beside: str) -> str:
    """What the numbers are, of which roofs, and counted with which versions."""
    rates = ", ".join(f"{name} {value / 1e12:.0f} TFLOP/s" for name, value in roofs.flops.items())
    return (
        f"PREDICTION for {gpu}, {beside}. Roofs: {roofs.bandwidth / 1e12:.2f} TB/s, L2 {roofs.l2 / 1e12:.2f} TB/s, "
        f"{rates}, {roofs.multiprocessors} multiprocessors at {roofs.clock / 1e9:.3f} GHz, "
        f"{roofs.launch * 1e6:.0f} µs a launch, {roofs.memory / 2**30:.0f} GiB of memory ({roofs.source})\n{versions()}"
    )


def versions() -> str:
    """The libraries whose launches are counted, and the compiler of ours."""
    found = []
    for name in ("torch", "triton", "peft", "transformers", "bitsandbytes"):
        try:
            # Without the build, which counts the same.
            found.append(f"{name} {metadata.version(name).partition('+')[0]}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return f"Counted with {', '.join(found)}"


def sections(args: argparse.Namespace) -> Iterator[str]:
    """Each case's title and table; an empty line before each."""
    for command in args.tables:
        if command == model.COMMAND:
            yield from _models(args)
        elif command == MIXTURE:
            yield from _steps(args.mixture, itertools.product(args.ranks, ("",), (False, True)), args)
        elif command == experts.COMMAND:
            yield from _experts(args)
        else:
            yield from _blocks(args) if command == block.COMMAND else _layers(command, args)


def _layers(command: str, args: argparse.Namespace) -> Iterator[str]:
    of_gpu = (DTYPES[args.dtype], ROOFS[args.gpu], limit_of(args))
    for shape, tokens, rank in itertools.product(layer_shapes(args.model), args.tokens, args.ranks):
        case = {"layer": shape.name, "out": shape.out_features, "in": shape.in_features}
        case |= {"tokens": tokens, "rank": rank, "dtype": args.dtype}
        lines = [f"\nPREDICTION, {command}: {title(case)}"]
        if command == kernels.COMMAND:
            lines.append(kernels.kernels_table(kernels.predict(shape, tokens, rank, *of_gpu)))
        else:
            lines += _table(predict(shape, tokens, rank, *of_gpu), args)
        yield "\n".join(lines)


def _blocks(args: argparse.Namespace) -> Iterator[str]:
    grid = Preset((args.model,), tuple(args.tokens), tuple(args.ranks), (), args.dtype)
    for case, shape, tokens, rank in grid.blocks():
        found = predict(shape, tokens, rank, DTYPES[args.dtype], ROOFS[args.gpu], limit_of(args))
        yield "\n".join([f"\nPREDICTION, block: {title(case)}", *_table(found, args)])


def _experts(args: argparse.Namespace) -> Iterator[str]:
    grid = Preset((), tuple(args.tokens), tuple(args.ranks), (), args.dtype, mixtures=(args.mixture,))
    for case, shape, tokens, rank in grid.experts():
        found = experts.predict(shape, tokens, rank, DTYPES[args.dtype], ROOFS[args.gpu])
        table = group_table(found, mark=MARK)
        yield "\n".join([f"\nPREDICTION, experts: {title(case)}", table, NOTES[by_bytes_and_flops]])


def _table(found: dict[str, dict], args: argparse.Namespace) -> Iterator[str]:
    limit = limit_of(args)
    if args.verbose:
        yield from launches_of_ours(found, ROOFS[args.gpu], limit)
    yield from (group_table(found, mark=MARK), *seconds_of_ours(found), NOTES[limit])


def _models(args: argparse.Namespace) -> Iterator[str]:
    dense_and_nf4 = itertools.product(args.ranks, ("", "nf4"), (False, True))
    # Other formats at one rank: what differs is the decoder.
    others = ((args.ranks[0], form, True) for form in QUANTISED[1:])
    yield from _steps(args.model, (*dense_and_nf4, *others), args)


def _steps(name: str, ways: Iterable[tuple[int, str, bool]], args: argparse.Namespace) -> Iterator[str]:
    """`ways`: ranks, formats and whether activations are recomputed."""
    for rank, quantize, checkpointing in ways:
        run = Run(name, args.layers, args.batch, args.sequence, rank, checkpointing, quantize)
        found = predict_model(run, DTYPES[args.dtype], ROOFS[args.gpu], limit_of(args))
        lines = [
            group_table(found, tokens=run.batch * run.sequence, mark=MARK),
            *seconds_of_ours(found),
            NOTES[limit_of(args)] + (EXPERTS_NOTE if run.is_mixture and limit_of(args) is longest else ""),
        ]
        yield "\n".join([f"\nPREDICTION, model: {title(run.case(args.dtype))}", *lines])


def seconds_of_ours(results: dict[str, dict]) -> Iterator[str]:
    """A line for each contestant of ours: its milliseconds by the roof that they are from."""
    for name, row in results.items():
        if name.startswith("ours") and "roofs" in row:
            by_roof = sorted(row["roofs"].items(), key=lambda item: -item[1])
            yield f"{name}, ms by roof: " + ", ".join(f"{roof} {milliseconds(time)}" for roof, time in by_roof)


def launches_of_ours(results: dict[str, dict], roofs: Roofs, limit: Limit) -> Iterator[str]:
    """A line for each."""
    for name, row in results.items():
        for part, operations in row.get("launches", {}).items() if name.startswith("ours") else ():
            for o in operations:
                roof, seconds = limit(o, roofs)
                yield (
                    f"  {name}, {part}: {o.name:28}{o.memory / 1e6:9.1f} MB  loads {o.loaded / 1e6:9.1f} MB"
                    f"{o.flops / 1e9:10.1f} GFLOP {o.rate:7}{seconds * 1e6:9.1f} µs by {roof}"
                )


def compare(path: Path, roofs: Roofs, tables: list[str], limit: Limit) -> int:
    """Every measured row beside its prediction. Exits with 2 where nothing measured can be predicted."""
    found = [g for g in groups(read_rows([path])) if _first(g)["command"] in tables]
    found = [g for g in found if not _first(g)["case"]["compiled"]]
    for group in found:
        first = _first(group)
        print(f"\n{first['command']}: {title(first['case'])}; measured on {first['stamp']['device']}")
        predicted = predict_case(first["command"], first["case"], roofs, limit)
        print(comparison(group, predicted))
    if found:
        print(f"\n{NOTES[limit]}")
    else:
        print(f"{path} has no rows of {', '.join(tables)} without torch.compile")
    return 0 if found else 2


def predict_case(command: str, case: dict, roofs: Roofs, limit: Limit = longest) -> dict[str, dict]:
    """What the results file calls `case`."""
    dtype = DTYPES[case["dtype"]]
    if command == model.COMMAND:
        return predict_model(Run(**{name: case[name] for name in Run._fields}), dtype, roofs, limit)
    if command == block.COMMAND:
        return predict(block_shape(case), case["tokens"], case["rank"], dtype, roofs, limit)
    if command == experts.COMMAND:
        shape = ExpertShape(**{name: case[name] for name in ExpertShape._fields})
        return experts.predict(shape, case["tokens"], case["rank"], dtype, roofs)
    shape = Shape(case["layer"], case["out"], case["in"], case["bias"])
    of = kernels.predict if command == kernels.COMMAND else predict
    return of(shape, case["tokens"], case["rank"], dtype, roofs, limit)


def comparison(group: dict[str, dict], predicted: dict[str, dict]) -> str:
    """One row per contestant and part; peak memory beside the total. Below it stands what failed, or should."""
    rows, notes = [], []
    for name, row in group.items():
        for what, result in (("predicted", predicted.get(name, {})), ("measured", row)):
            if result.get("failed"):
                notes.append(f"{name}, {what}: {result['failed']}")
        guessed = predicted.get(name, {}).get("seconds", {})
        for part, times in row.get("seconds", {}).items():
            if part in guessed:
                guess, measured = guessed[part]["median"], times["median"]
                memory = [r.get("peak_bytes") if part == "total" else None for r in (predicted[name], row)]
                rows.append(
                    (
                        f"{name}, {part}",
                        milliseconds(guess),
                        milliseconds(measured),
                        ratio(measured, guess),
                        *map(mebibytes, memory),
                        ratio(memory[1], memory[0]),
                    )
                )
    columns = ("contestant", "predicted ms", "measured ms", f"measured / predicted{MARK}")
    columns += ("predicted MiB", "measured MiB", "measured / predicted")
    return "\n".join([table(columns, rows), *notes])


def _first(group: dict[str, dict]) -> dict:
    return next(iter(group.values()))
