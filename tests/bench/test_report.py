"""The report from results that are made up, of a full GPU run: every table, every plot, and rows where ours loses."""

import itertools
import json

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from bench import kernels, report
from bench.__main__ import main
from bench.counting.gpus import ROOFS, by_bytes_and_flops
from bench.installation import LOCAL
from bench.measuring.shapes import PRESETS, layer_shapes
from bench.rows.compare import group_table
from bench.rows.records import default_path, groups, read_rows

STAMP = {
    "kind": "GPU", "device": "made up for a test", "threads": None, "driver": "0", "torch": "0", "triton": "0",
    "peft": "0", "commit": "0", "date": "2000-01-01",
}  # fmt: skip
FACTORS = {
    "frozen base": 1.0, "PEFT LoRA bf16": 1.3, "PEFT DoRA fp32, autocast": 2.6, "PEFT DoRA bf16": 2.2,
    "ours fp32, auto": 1.25, "ours fp32, token, triton": 1.4, "ours fp32, weight, triton": 1.2,
}  # fmt: skip


def row(command, case, contestant, **values):
    return {"command": command, "case": case, "contestant": contestant, "failed": None, **values, "stamp": STAMP}


def times(**seconds):
    return {part: {"median": s, "low": 0.98 * s, "high": 1.02 * s, "minimum": 0.97 * s} for part, s in seconds.items()}


def layer_rows(token_counts=(1, 512, 8192), ranks=(16, 384)):
    for shape, tokens, rank in itertools.product(layer_shapes("llama-3-8b")[:2], token_counts, ranks):
        case = {
            "model": "llama-3-8b", "layer": shape.name, "out": shape.out_features, "in": shape.in_features,
            "bias": False, "tokens": tokens, "rank": rank, "dtype": "bf16", "compiled": False,
        }  # fmt: skip
        base = 3e-5 + 4 * tokens * shape.out_features * shape.in_features / 790e12
        for name, factor in FACTORS.items():
            total = base * (factor + rank / 1000)
            if "token" in name and tokens == 1:
                total *= 4  # ours loses there
            if name.startswith("PEFT DoRA fp32") and (tokens, rank) == (8192, 384):
                yield row("layer", case, name) | {"failed": "out of memory"}
                continue
            peak = int(1e6 + 4 * tokens * shape.out_features * factor)
            yield row(
                "layer", case, name,
                seconds=times(forward=total / 3, backward=2 * total / 3, total=total), peak_bytes=peak,
            )  # fmt: skip


def kernel_rows():
    for shape in layer_shapes("llama-3-8b"):
        for rank in (16, 384):
            case = {"model": "llama-3-8b", "layer": shape.name, "tokens": 8192, "rank": rank, "dtype": "bf16"}
            predicted = kernels.predict(shape, 8192, rank, torch.bfloat16, ROOFS["h200"], by_bytes_and_flops)
            for name, found in predicted.items():
                yield row("kernels", case, name, **found)


def model_rows():
    for checkpointing in (False, True):
        case = {
            "model": "llama-3-8b", "layers": 0, "batch": 2, "sequence": 4096, "rank": 16,
            "checkpointing": checkpointing, "quantize": "", "dtype": "bf16", "compiled": False,
        }  # fmt: skip
        for name, factor in FACTORS.items():
            yield row("model", case, name, seconds=times(forward=0.2 * factor, total=0.6 * factor), peak_bytes=1 << 33)


def step_rows():
    for name, shift in {"PEFT LoRA": 0.1, "PEFT DoRA": 0.0, "PEFT DoRA, patched": 0.0, "ours": 0.0}.items():
        losses = [5.0 / (1 + at / 10) + shift for at in range(60)]
        case = {"model": "training/demo/base", "steps": 60, "rank": 16, "batch": 16, "seed": 0}
        yield row("step", case, name, losses=losses, held_out=[[60, losses[-1]]], step_seconds=0.05)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "made-up.jsonl"
    rows = [*layer_rows(), *kernel_rows(), *model_rows(), *step_rows()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_plot_is_drawn(results, tmp_path):
    assert main(["report", str(results), "--plots", str(tmp_path)]) == 0
    drawn = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    layers = [f"tokens-llama-3-8b-rank-{rank}" for rank in (16, 384)]
    layers += [f"rank-llama-3-8b-tokens-{tokens}" for tokens in (1, 512, 8192)]
    assert set(drawn) == {
        f"gpu-0-{name}.png" for name in (*(f"layer-{name}" for name in layers), "roofline", "memory", "losses")
    }
    # Panels without a line are about 10 kB.
    assert min(drawn.values()) > 20_000


def overlapping(figure):
    """Pairs of texts of a figure, tick labels, titles and all, that cover each other."""
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    # Tick labels past the ends of an axis are not drawn.
    hidden = {
        id(tick.label1)
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if id(text) not in hidden]
    return [(a, b) for (a, one), (b, two) in itertools.combinations(boxes, 2) if one.overlaps(two)]


@pytest.mark.slow
def test_labels_do_not_collide(tmp_path, monkeypatch):
    """On the densest axes, those of the preset `full`, and in the other kinds of plot."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    grid = PRESETS["full"]
    rows = [*layer_rows(grid.tokens, (16,)), *layer_rows((8192,), grid.ranks)]
    rows += [*kernel_rows(), *model_rows(), *step_rows()]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = list(report.draw(groups(read_rows([path])), tmp_path))
    assert len(drawn) == len(figures) == 5
    for image, figure in zip(drawn, figures):
        assert not overlapping(figure), image.name


def test_rows_that_lose_and_fail_stay(results, capsys):
    assert main(["report", str(results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    layers = [line for line in lines if "layer q,o_proj" in line and "kernels" not in line]
    assert len(layers) >= 3 * 2
    assert main(["report", str(results), "--full"]) == 0
    text = capsys.readouterr().out
    assert "PEFT DoRA fp32, autocast failed: out of memory" in text
    assert all(f"`{command}`" in text for command in ("layer", "model", "step", "kernels"))
    # Four times the base's time and more: ours at one token.
    losing = [
        line for line in text.splitlines() if line.startswith("| ours fp32, token") and float(line.split("|")[8]) > 4
    ]
    assert len(losing) == 2 * 2


def summarised(rows, command="layer"):
    """The cells of the summary of one case; `rows` holds seconds by contestant, None for one that failed."""
    group = {
        name: {"command": command, "case": {"tokens": 8}, "stamp": STAMP, "failed": None if t else "out of memory"}
        | ({"seconds": {"total": {"median": t}}} if t else {})
        for name, t in rows.items()
    }
    return [cell.strip() for cell in report.summary([group]).splitlines()[-1].strip("|").split("|")]


PEERS = {"frozen base": 1.0, "PEFT LoRA fp32": 2.0, "PEFT DoRA fp32": 3.0}


def test_the_summary_shows_what_is_chosen_unasked():
    """Also where another form is faster, and where it failed; × base, × LoRA, × others' DoRA best and worst."""
    forms = {"ours fp32, auto": 6.0, "ours fp32, token, triton": 5.0, "ours bf16, auto, triton": 4.0}
    assert summarised(PEERS | forms)[1:7] == ["ours fp32, auto", "6000.00", "6.00", "3.00", "2.00", "2.00"]
    compiled = {f"{name}, compiled": t for name, t in (PEERS | forms).items()}
    assert summarised(compiled)[1:4] == ["ours fp32, auto, compiled", "6000.00", "6.00"]
    assert summarised(PEERS | forms | {"ours fp32, auto": None})[1:4] == ["ours fp32, auto: failed", "-", "-"]
    header = [cell.strip() for cell in report.summary([]).splitlines()[0].strip("|").split("|")]
    assert header[1] == "ours" and header[5:7] == ["× others' DoRA, best", "× others' DoRA, worst"]


def test_older_files_show_the_fastest_form():
    forms = {"ours fp32, token, triton": 9.0, "ours fp32, weight, triton": 6.0}
    assert summarised(PEERS | forms)[1:4] == ["ours fp32, weight, triton", "6000.00", "6.00"]
    assert summarised(PEERS | dict.fromkeys(forms))[1:4] == ["every form failed", "-", "-"]


def test_axolotls_dora_is_a_peer_and_a_patched_one_is_not():
    ours = {"ours fp32, auto": 6.0, "PEFT DoRA fp32, patched": 1.0}
    assert summarised(PEERS | ours | {"Axolotl DoRA fp32": 2.0, "Axolotl DoRA bf16": 12.0})[5:7] == ["3.00", "0.50"]


def spread(percent):
    """A row whose quartiles stand so far from its median of a second."""
    return {"seconds": {"total": {"median": 1.0, "low": 1 - percent / 100, "high": 1 + percent / 100}}, "failed": None}


@pytest.mark.parametrize("percent, noise", [(9, False), (14, True)])
def test_a_row_that_spreads_by_more_than_a_tenth_is_noise(percent, noise):
    row = {"command": "layer", "case": {"tokens": 8}, "stamp": STAMP} | spread(percent)
    assert (f"| {percent} noise |" in " ".join(group_table({"ours fp32, auto": row}).split())) == noise
    assert ("(noise)" in report.summary([{"ours fp32, auto": row}])) == noise


def test_what_is_measured_here_is_reported_where_it_is_asked_for(results, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--local"]) == 2 and "there are no results in out/bench" in capsys.readouterr().out
    LOCAL.mkdir(parents=True)
    (LOCAL / "here.jsonl").write_text(results.read_text())
    assert main(["report", "--local"]) == 0
    assert "layer q,o_proj" in capsys.readouterr().out
    assert default_path({"kind": "CPU", "device": "A CPU"}) == LOCAL / "cpu-a-cpu.jsonl"
    monkeypatch.setattr(report, "RESULTS", tmp_path / "committed")
    assert main(["report"]) == 2 and "no results in" in capsys.readouterr().out
