"""Every command of the suite runs on a CPU, end to end and in small, and its rows say what they should."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch

from bench import predict, report, step
from bench.__main__ import COMMANDS, main
from bench.contestants import layer as contestants
from bench.contestants import model as model_contestants
from bench.counting import gpus
from bench.counting.traffic import Operation
from bench.installation import ROOT
from bench.measuring import timing
from bench.measuring.memory import peak_bytes
from bench.measuring.shapes import PRESETS, layer_shapes
from bench.rows import records
from bench.rows.session import Session
from tests.tolerances import SAME_FP32
from training import demo
from training.minimal.batches import read_splits

DEVICE = torch.device("cpu")
# A tree with changes is never done; with a commit of that name it is.
TINY = ["--preset", "tiny", "--device", "cpu", "--threads", "1", "--commit", "test"]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The results of the whole suite's smallest preset: kernels, layer, block, experts and model."""
    path = tmp_path_factory.mktemp("bench") / "tiny.jsonl"
    assert main(["all", *TINY, "--output", str(path)]) == 0
    return path


def test_peak_memory_on_a_cpu():
    def call():
        a = torch.empty(1 << 20)  # 4 MiB
        b = a + 1
        del a
        c = b + 1  # b and c at once
        del b
        return c.sum()

    # 64 bytes of rounding per allocation, and the sum.
    assert 8 << 20 <= peak_bytes(call, DEVICE) <= (8 << 20) + 1024


def test_every_contestant_is_timed_and_correct(tiny):
    rows = rows_of(tiny)
    assert {row["command"] for row in rows} == {"kernels", "layer", "block", "experts", "model"}
    assert not [row for row in rows if row["failed"]]
    assert all(error < SAME_FP32 for row in rows if row["command"] == "model" for error in row["errors"].values())
    shapes = len(layer_shapes("tiny"))
    names = set(contestants.contestants(torch.float32, DEVICE))
    for name in names:
        mine = [row for row in rows if row["command"] == "layer" and row["contestant"] == name]
        assert len(mine) == shapes
        for row in mine:
            parts = row["seconds"]
            assert set(parts) == {"forward", "backward", "total"}
            assert all(0 < part["minimum"] <= part["median"] for part in parts.values())
            assert row["peak_bytes"] > 0
            assert all(error < SAME_FP32 for error in row["errors"].values())


def test_rows_are_stamped(tiny):
    stamp = rows_of(tiny)[0]["stamp"]
    assert stamp["kind"] == "CPU" and stamp["threads"] == 1
    assert stamp["torch"] == torch.__version__ and stamp["peft"] and stamp["triton"] and stamp["date"]
    assert stamp["load"] >= 0


def test_a_resumed_run_measures_nothing_twice_unless_asked(tiny, capsys):
    command = ["layer", *TINY, "--output", str(tiny)]
    before = tiny.read_text()
    assert main(command) == 0
    assert tiny.read_text() == before
    assert "frozen base" not in capsys.readouterr().out
    # Another machine, or another commit, is another measurement.
    other = records.Records(tiny, rows_of(tiny)[0]["stamp"] | {"commit": "other"})
    assert not other.has("layer", next(row["case"] for row in rows_of(tiny) if row["command"] == "layer"))


def test_no_case_is_started_after_the_deadline(tmp_path, capsys):
    path = tmp_path / "late.jsonl"
    command = ["layer", "--preset", "tiny", "--device", "cpu", "--output", str(path), "--minutes", "1e-9"]
    assert main(command) == 0
    assert not path.exists()
    assert f"{len(layer_shapes('tiny'))} cases left" in capsys.readouterr().out


def test_report_shows_every_row_and_draws(tiny, tmp_path, capsys, monkeypatch):
    rows = {split: rows[:16] for split, rows in read_splits(demo.DATA).items()}
    # Held-out losses take most of a short run's time.
    monkeypatch.setattr(step.batches, "read_splits", lambda path: rows)
    assert main(["step", "--steps", "2", "--batch", "2", "--output", str(tmp_path / "s.jsonl"), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["report", str(tiny), str(tmp_path / "s.jsonl"), "--full", "--plots", str(tmp_path / "plots")]) == 0
    text = capsys.readouterr().out
    for row in rows_of(tiny):
        assert row["contestant"] in text
    assert "mean % from PEFT DoRA, last half" in text and "CPU" in text
    drawn = ("roofline", "losses", "memory")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"cpu-0-{name}.png" for name in drawn}


def test_four_bit_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    path = tmp_path / "nf4.jsonl"
    command = ["model", "--model", "tiny", "--rank", "4", "--sequence", "8", "--quantize", "nf4", "--checkpointing"]
    assert main([*command, "--device", "cpu", "--repetitions", "1", "--output", str(path)]) == 0
    rows = {row["contestant"]: row for row in rows_of(path)}
    for name in ("frozen base", "PEFT LoRA fp32", "PEFT DoRA fp32", "PEFT DoRA fp32, patched", "ours fp32, auto"):
        assert rows[name]["failed"] is None and rows[name]["seconds"]["total"]["median"] > 0


def test_the_gpu_clock_reads_events_in_order(monkeypatch):
    """With a stand-in for CUDA's events: an event's time is the number of events recorded before it, in ms."""
    recorded = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            recorded.append(self)

        def elapsed_time(self, end):
            return float(recorded.index(end) ** 2 - recorded.index(self) ** 2)

    def phases():
        yield "forward"
        yield "backward"

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 8)
    assert timing._cuda_clock(DEVICE)(phases) == {"forward": 1e-3, "backward": 3e-3}


def test_predictions_are_labelled_and_compared(tiny, capsys, monkeypatch):
    names, every = ("frozen base", "PEFT DoRA fp32", "ours fp32, auto"), model_contestants.contestants

    def three(*args, **options):
        return {name: every(*args, **options)[name] for name in names}

    monkeypatch.setattr(model_contestants, "contestants", three)
    arguments = ["predict", "--gpu", "h200", "--model", "tiny", "--tokens", "8", "--ranks", "4", "--bytes-alone"]
    assert main([*arguments, "--verbose", "--tables", "kernels", "layer"]) == 0
    text = capsys.readouterr().out
    assert text.count("PREDICTION") == 1 + 2 * len(layer_shapes("tiny")) and "4.30 TB/s" in text
    assert "  ours fp32, auto, backward: rescale_bwd" in text
    assert "nothing was measured" in text
    assert main([*arguments, "--measured", str(tiny)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"PREDICTION for h200, beside what was measured in {tiny}. Roofs: ")
    assert "nothing was measured" not in text
    assert text.count("; measured on") == len({json.dumps([row["command"], row["case"]]) for row in rows_of(tiny)})
    compared = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")}
    # Of each command: ours and a part.
    assert {"merge, total", "PEFT DoRA fp32, backward", "ours fp32, auto, optimizer"} - compared == set()
    assert "ours fp32, auto, total" in compared


def test_help_names_the_tables_that_are_predicted(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["predict"])
    assert all(command in line for command in predict.TABLES)


def test_the_summary_shows_ratios_where_ours_loses():
    stamp = {"kind": "CPU", "device": "d", "threads": 1}
    times = {
        "frozen base": 1.0,
        "PEFT LoRA slow": 5.0,
        "PEFT LoRA": 2.0,
        "PEFT DoRA": 3.0,
        "ours, a": 6.0,
        "ours, b": 9.0,
    }
    group = {
        name: {"command": "layer", "case": {"tokens": 8}, "stamp": stamp, "seconds": {"total": {"median": t}}}
        for name, t in times.items()
    }
    last = [cell.strip() for cell in report.summary([group]).splitlines()[-1].strip("|").split("|")]
    # × base, × the fastest LoRA, × PEFT's best and worst DoRA, LoRA × base
    assert last == ["tokens 8", "ours, a", "6000.00", "6.00", "3.00", "2.00", "2.00", "2.00"]


def test_help_of_every_command(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
    assert "tokens" in capsys.readouterr().out


def test_the_profiler_is_quiet():
    """In a process of its own: the profiler's level is read once."""
    code = """
from bench.__main__ import main
import torch
from bench.measuring.memory import peak_bytes
print(peak_bytes(lambda: torch.ones(64), torch.device("cpu")))
"""
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (ran.stdout, ran.stderr) == ("256\n", "")


@pytest.mark.parametrize(
    "words, message",
    [([], "it needs a command: kernels, layer"), (["layer", "--presets", "tiny"], "unrecognized arguments: --presets")],
    ids=["no command", "typo"],
)
def test_a_mistake_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1


def test_the_h200_preset_is_the_issues():
    preset = PRESETS["h200"]
    assert [shape[1:3] for shape in layer_shapes("llama-3-8b")] == [
        (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336),
    ]  # fmt: skip
    assert (preset.tokens, preset.ranks, preset.compiled) == ((512, 8192), (16, 384), False)


def test_cuda_is_asked_for_by_name():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(RuntimeError, match="sees no GPU here"):
        Session(argparse.Namespace(device="cuda", preset="tiny", threads=None, repetitions=None, commit=None))


def test_predicted_seconds_are_the_longest_of_three():
    roofs = gpus.ROOFS["h200"]
    operation = Operation("mm", memory=0, loaded=0, flops=0, rate="bf16")
    assert gpus.seconds(operation, roofs) == roofs.launch
    assert gpus.seconds(operation._replace(memory=4_300_000_000), roofs) == pytest.approx(1e-3)
    assert gpus.seconds(operation._replace(flops=790 * 10**9), roofs) == pytest.approx(1e-3)


def test_recovery_compares_four_losses(tmp_path, capsys):
    output = tmp_path / "recovery.txt"
    words = ["--formats", "int4", "--rates", "0.02", "--steps", "3", "--rank", "2", "--batch", "2"]
    assert main(["recovery", *words, "--output", str(output)]) == 0
    row = next(line for line in output.read_text().splitlines() if line.startswith("| int4"))
    base, unmerged, requantised, merge_aware = map(float, row.split("|")[3:7])
    assert len({base, unmerged, requantised, merge_aware}) == 4 and max(requantised, merge_aware) < base
