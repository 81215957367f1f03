"""`python -m training` as a user runs it: flags, errors before work starts, `kill -9` and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training import demo
from training.__main__ import main
from training.flags import Flags

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The first rows of the demo's training data, as a user's single file."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = (demo.DATA / "train.jsonl").read_text().splitlines(keepends=True)[:40]
    path.write_text("".join(lines))
    return path


def arguments(data, output_dir, **flags):
    small = {"batch_size": 2, "max_steps": 20, "save_step": 3, "eval_step": 10, "lora_r": 2, "lora_dropout": 0.1}
    small["impl"] = "reference"
    small |= flags | {"data_path": data, "output_dir": output_dir}
    return [text for name, value in small.items() for text in (f"--{name}", str(value))]


def logged_lines(output_dir):
    path = output_dir / "metrics.jsonl"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def test_kill_9_and_resume_end_with_the_same_losses(data, tmp_path, capsys):
    """Killed between two checkpoints, so that logged steps have to be taken back."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: another number rounds differently
    command = [sys.executable, "-m", "training", *arguments(data, killed)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while len(logged_lines(killed)) < 6 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output.decode()
    before = [json.loads(line) for line in logged_lines(killed)]
    assert 5 <= before[-1]["step"] < 20

    main([*arguments(data, killed), "--resume"])
    assert "resuming from" in capsys.readouterr().out
    main(arguments(data, whole))
    assert logged_lines(killed) == logged_lines(whole)
    steps = [row["step"] for row in map(json.loads, logged_lines(killed)) if "loss" in row]
    assert steps == list(range(1, 21))
    weights = "adapter_model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    for name in ("adapter_config.json", "loss.png", "checkpoint-20"):
        assert (killed / name).exists(), name


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"base_model": "absent"}, "`--base_model` absent is not a folder with a config.json"),
        ({"data_path": "absent.jsonl"}, "`--data_path` absent.jsonl does not exist"),
        ({"lora_r": 0}, "`r` should be a positive integer value but the value passed is 0"),
        ({"lora_dropout": 1.0}, r"`lora_dropout` should be .*1\.0"),
        ({"lora_target_modules": "no_such_proj"}, "no_such_proj"),
        ({"lora_target_modules": ""}, "target_modules"),
        ({"learning_rate": -1.0}, "`--learning_rate` should be 0 or more but the value passed is -1.0"),
        ({"learning_rate": "nan"}, "`--learning_rate` should be 0 or more but the value passed is nan"),
        ({"batch_size": 0}, "`--batch_size` should be a positive integer value but the value passed is 0"),
        ({"max_steps": -1}, "`--max_steps` should be 0 or more but the value passed is -1"),
        ({"warmup_ratio": 2.0}, r"`--warmup_ratio` should be in \[0, 1\] but the value passed is 2.0"),
        ({"cutoff_len": 8}, "rows have more than cutoff_len = 8 tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_an_error_before_work_starts(data, tmp_path, flags, message):
    output_dir = tmp_path / "out"
    given = {"data_path": data} | flags
    with pytest.raises(SystemExit, match=message) as error:
        main(arguments(given.pop("data_path"), output_dir, **given))
    assert str(error.value).startswith("error: ")
    assert not output_dir.exists()


def test_empty_data_and_unknown_columns(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    with pytest.raises(SystemExit, match="has no rows"):
        main(arguments(path, tmp_path / "out"))
    path.write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(SystemExit, match=r"line 1: expected the columns \['completion', 'prompt'\]"):
        main(arguments(path, tmp_path / "out"))


def test_flags_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit):
        main(["--learning", "0.1"])
    assert "unrecognized arguments: --learning 0.1" in capsys.readouterr().err


def test_an_unknown_choice_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--impl", "cuda"])
    assert "invalid choice: 'cuda'" in capsys.readouterr().err


def test_another_runs_folder_is_not_overwritten(data, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(SystemExit, match="holds checkpoint-3 of an earlier run: continue it with --resume"):
        main(arguments(data, tmp_path))


def test_defaults_are_the_demo():
    assert Flags().is_demo and not Flags(data_path="elsewhere.jsonl").is_demo
