"""Draws the plots of `benchmarks.md` in `plots/`: `python docs/draw_plots.py`, in a clone, in minutes.

All but the losses are predicted. The losses are those of the committed run on a CPU. Names, such as `layer rank`, draw
these alone.
"""

import itertools
import sys
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import kernels, plots  # noqa: E402 (the clone's, which stands above)
from bench.counting.gpus import ROOFS, by_bytes_and_flops  # noqa: E402
from bench.counting.predicted import predict, predict_model  # noqa: E402
from bench.measuring.shapes import Run, layer_shapes  # noqa: E402
from bench.rows.records import groups, read_rows  # noqa: E402

FOLDER = Path(__file__).parent / "plots"
GPU, MODEL, DTYPE = "h200", "llama-3-8b", torch.bfloat16
LAYERS = ("q,o_proj", "gate,up_proj")
TOKENS, RANKS = (1, 64, 512, 2048, 8192), (8, 16, 64, 128, 384)
# Forms that a user has to ask for, and PEFT's slower ways, would hide the rest.
SHOWN = ("frozen base", "PEFT LoRA fp32, autocast", "PEFT DoRA fp32, autocast", "ours fp32, auto")
MACHINE = f"PREDICTION for {GPU.upper()}, nothing was measured"


def layers(tokens: tuple[int, ...], ranks: tuple[int, ...]) -> plots.Groups:
    """A predicted case each, as the results of a run have them."""
    found = []
    for shape, count, rank in itertools.product(shapes(), tokens, ranks):
        rows = predict(shape, count, rank, DTYPE, ROOFS[GPU])
        found.append(with_case({name: rows[name] for name in SHOWN}, shape, count, rank))
    return found


def rooflines() -> plots.Groups:
    found = itertools.product(shapes(), (16, 384))
    return [with_case(kernels.predict(shape, 8192, r, DTYPE, ROOFS[GPU]), shape, 8192, r) for shape, r in found]


def memory() -> plots.Groups:
    found = []
    for checkpointing in (False, True):
        run = Run(MODEL, 0, 2, 4096, 16, checkpointing, "")
        # Peaks are counted; the limit decides the seconds alone.
        rows = predict_model(run, DTYPE, ROOFS[GPU], by_bytes_and_flops)
        found.append({name: rows[name] | {"case": run._asdict()} for name in SHOWN})
    return found


def shapes() -> list:
    return [shape for shape in layer_shapes(MODEL) if shape.name in LAYERS]


def with_case(rows: dict[str, dict], shape, tokens: int, rank: int) -> dict[str, dict]:
    case = {"model": MODEL, "layer": shape.name, "out": shape.out_features, "in": shape.in_features}
    case |= {"tokens": tokens, "rank": rank, "dtype": "bf16", "compiled": False}
    return {name: row | {"case": case} for name, row in rows.items()}


def losses() -> tuple[plots.Groups, str]:
    """The committed curves of one seed, and where they were measured."""
    found = groups(read_rows([ROOT / "bench/results/step-cpu-bf16.jsonl"]))[:1]
    return found, "measured on a CPU, steps of a bf16 model"


def draw(name: str, folder: Path) -> Path:
    """Draws one of `PLOTS` into the folder."""
    path = folder / f"{name}.png"
    # `plot_layers` adds the case to the name.
    (drawn,) = PLOTS[name](path)
    return drawn.rename(path)


PLOTS = {
    "layer": lambda path: plots.plot_layers(layers(TOKENS, (16,)), "tokens", MACHINE, path),
    "rank": lambda path: plots.plot_layers(layers((8192,), RANKS), "rank", MACHINE, path),
    "roofline": lambda path: plots.plot_roofline(rooflines(), MACHINE, path),
    "memory": lambda path: plots.plot_memory(memory(), MACHINE, path),
    "losses": lambda path: plots.plot_losses(*losses(), path),
}


def shrink(path: Path) -> None:
    """A plot has few colours."""
    image = Image.open(path).convert("RGB")
    image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PLOTS:
        drawn = draw(name, FOLDER)
        shrink(drawn)
        print(drawn, drawn.stat().st_size)
