"""A run that is interrupted, damaged or poisoned: what is kept, what is said, and that resuming changes no bit."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import dora_kernels as dk
from tests.support.training_runs import arguments, data, metrics, numbers, run  # noqa: F401
from training import demo
from training.__main__ import main
from training.checkpoints import checkpoint as checkpoints
from training.checkpoints.checkpoint import damage, list_checkpoints
from training.checkpoints.lock import sole_run
from training.data.order import order_of_epoch
from training.finetune.trainer import DoraTrainer, EpochOrder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
WEIGHTS = "adapter_model.safetensors"
# 40 rows in batches of 2 x 3 are 7 steps an epoch, the last one smaller: checkpoints fall inside epochs and on their
# end, and dropout needs the generators.
LONG = {"max_steps": None, "num_epochs": 2, "gradient_accumulation_steps": 3, "save_step": 1, "lora_dropout": 0.2}
ENGINES = pytest.mark.parametrize("engine", [[], ["--use_peft"]], ids=["ours", "peft"])


def before_step(monkeypatch, number, act):
    """Calls `act(trainer, inputs)` before the first forward pass of step `number`."""
    step = DoraTrainer.training_step

    def wrapped(self, model, inputs, *rest):
        if self.state.global_step == number - 1 and not done:
            done.append(number)
            act(self, inputs)
        return step(self, model, inputs, *rest)

    done = []
    monkeypatch.setattr(DoraTrainer, "training_step", wrapped)


def sigterm(trainer, inputs):
    os.kill(os.getpid(), signal.SIGTERM)


def printed_command(out):
    """The words after `python -m training` of the command that the run printed."""
    (line,) = (line.strip() for line in out.splitlines() if line.strip().startswith("python -m training --"))
    return shlex.split(line)[3:]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):  # noqa: F811
    """Uninterrupted runs, made once per engine."""
    made = {}

    def get(engine):
        name = "-".join(engine)
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole")
            run(data, made[name], *engine, **LONG)
        return made[name]

    return get


@ENGINES
@pytest.mark.parametrize("stop", [2, 7, 9], ids=lambda step: f"step {step}")
def test_sigterm_saves_and_the_printed_command_ends_with_the_same_bits(
    data,  # noqa: F811
    whole,
    tmp_path,
    monkeypatch,
    capsys,
    engine,
    stop,
):
    with monkeypatch.context() as patch:
        before_step(patch, stop, sigterm)
        # A save of its own: the interval's would come later.
        main(arguments(data, tmp_path, *engine, **LONG | {"save_step": 100}))
    out = capsys.readouterr().out
    assert f"stopped and saved at step {stop}" in out and not (tmp_path / WEIGHTS).exists()
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{stop}"]
    torch.manual_seed(999)
    main(printed_command(out))
    assert "resuming from" in capsys.readouterr().out
    # An evaluation that was due at the step of the stop is not waited for: it would take the time that is left.
    expected = [row for row in metrics(whole(engine)) if "eval_loss" not in row or row["step"] != stop]
    assert numbers(metrics(tmp_path)) == numbers(expected)
    assert (tmp_path / WEIGHTS).read_bytes() == (whole(engine) / WEIGHTS).read_bytes()


def test_sigterm_during_an_evaluation(data, whole, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The evaluation is finished, and logged; the step that it belongs to is what is saved."""
    step = DoraTrainer.prediction_step

    def interrupted(self, *args, **options):
        if self.state.global_step == 3:
            sigterm(self, None)
        return step(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(DoraTrainer, "prediction_step", interrupted)
        main(arguments(data, tmp_path, **LONG | {"save_step": 100}))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert numbers(metrics(tmp_path)) == [row for row in numbers(metrics(whole([]))) if row["step"] <= 3]
    main(printed_command(capsys.readouterr().out))
    assert numbers(metrics(tmp_path)) == numbers(metrics(whole([])))


def test_save_model_writes_the_adapter(data, tmp_path, monkeypatch):  # noqa: F811
    train_from = DoraTrainer.train_from

    def and_save(self, checkpoint):
        train_from(self, checkpoint)
        self.save_model(str(tmp_path / "saved"))

    monkeypatch.setattr(DoraTrainer, "train_from", and_save)
    run(data, tmp_path / "out", max_steps=1, save_step=0, eval_step=0)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert not (tmp_path / "saved" / "model.safetensors").exists()


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(data, whole, tmp_path, monkeypatch, capsys):  # noqa: F811
    with monkeypatch.context() as patch:
        before_step(patch, 6, sigterm)
        main(arguments(data, tmp_path, **LONG))
    file = tmp_path / "checkpoint-6" / "training_state.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    capsys.readouterr()
    main(arguments(data, tmp_path, "--resume", **LONG))
    out = capsys.readouterr().out
    assert "checkpoint-6: training_state.safetensors has" in out and "checkpoint-5\n" in out
    assert numbers(metrics(tmp_path)) == numbers(metrics(whole([])))


def test_kill_9_and_resume_end_with_the_same_losses(data, whole, tmp_path):  # noqa: F811
    words = arguments(data, tmp_path, **LONG | {"save_step": 3})
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: another number rounds differently
    command = [sys.executable, "-m", "training", *words]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = tmp_path / "metrics.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count('"loss"') < 4):
        time.sleep(0.01)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output.decode()
    assert 4 <= metrics(tmp_path)[-1]["step"] < 14
    main([*words, "--resume"])
    assert numbers(metrics(tmp_path)) == numbers(metrics(whole([])))
    assert (tmp_path / WEIGHTS).read_bytes() == (whole([]) / WEIGHTS).read_bytes()


@pytest.mark.parametrize("steps", [3, None], ids=["inside an epoch", "at its end"])
def test_resuming_a_finished_run_trains_no_further(data, tmp_path, capsys, steps):  # noqa: F811
    flags = LONG | {"max_steps": steps, "num_epochs": 1}
    before = run(data, tmp_path, **flags)
    capsys.readouterr()
    main(arguments(data, tmp_path, "--resume", **flags))
    assert metrics(tmp_path) == before
    assert f"{before[-1]['eval_loss']:10.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "other, named",
    [
        ({"learning_rate": 1e-3, "seed": 4}, "data, learning_rate, seed differ"),
        ({"val_set_size": 9}, "data, val_set_size"),
    ],
    ids=["settings", "data"],
)
def test_another_run_is_not_resumed(data, whole, other, named):  # noqa: F811
    with pytest.raises(SystemExit, match=rf"checkpoint-14 is of a run with other settings: {named}"):
        main(arguments(data, whole([]), "--resume", **LONG | other))


def test_a_full_disk_leaves_the_last_good_checkpoint(data, whole, tmp_path, monkeypatch):  # noqa: F811
    save_file, saved = checkpoints.save_file, []

    def full(tensors, path):
        saved.append(path)
        if len(saved) == 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(SystemExit, match=r"No space left on device; .*checkpoint-3 is sound: continue") as error:
            main(arguments(data, tmp_path, **LONG))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-2"]
    assert damage(tmp_path / "checkpoint-3") is None and not list(tmp_path.glob(".tmp-*"))
    main(printed_command(str(error.value)))
    assert numbers(metrics(tmp_path)) == numbers(metrics(whole([])))


def poisoned(kind, seen):
    def act(trainer, inputs):
        seen.append(inputs["input_ids"].clone())
        model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
        layer = model.model.layers[1].mlp.up_proj
        if kind == "weight":
            a = layer.lora_A if isinstance(layer, dk.DoraLinear) else layer.lora_A["default"].weight
            with torch.no_grad():
                a[0, 0] = torch.inf
        else:
            layer.magnitude.register_hook(lambda gradient: gradient * torch.nan)

    return act


@ENGINES
def test_a_nan_loss_names_step_rows_and_layer(data, tmp_path, monkeypatch, engine):  # noqa: F811
    seen = []
    before_step(monkeypatch, 3, poisoned("weight", seen))
    with pytest.raises(SystemExit) as error:
        main(arguments(data, tmp_path, *engine, save_step=1))
    message = str(error.value)
    assert re.search(
        r"the loss of step 3 \(.*\) is nan: .*model\.layers\.1\.mlp\.up_proj\S* was the first layer", message
    )
    assert re.search(r"the parameter \S*layers\.1\.mlp\.up_proj\S* holds NaN or infinity", message)
    # The rows that it names are those that were in the batch.
    numbers = [int(number) for number in re.findall(r"rows\.jsonl, row (\d+)", message)]
    named = [json.loads(line) for line in data.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE)
    batch = [tokenizer.decode(row, skip_special_tokens=True) for row in seen[0]]
    assert [named[number - 1]["prompt"] + named[number - 1]["completion"] for number in numbers] == batch
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-1"], "the good ones stay"


def test_a_nan_gradient_stops_before_it_poisons_the_weights(data, tmp_path, monkeypatch):  # noqa: F811
    before_step(monkeypatch, 3, poisoned("gradient", []))
    with pytest.raises(SystemExit, match=r"gradient of step 3 \(rows.* finite: model\.layers\.1\.mlp\.up_proj\.mag"):
        main(arguments(data, tmp_path, save_step=1))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-1"]


def test_two_runs_do_not_share_a_folder(data, tmp_path):  # noqa: F811
    with sole_run(tmp_path), pytest.raises(SystemExit, match="another run is writing to"):
        main(arguments(data, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    run(data, tmp_path, max_steps=1)


def test_sigterm_means_what_it_did_once_the_run_is_over(data, tmp_path):  # noqa: F811
    before = signal.getsignal(signal.SIGTERM)
    run(data, tmp_path, max_steps=1, eval_step=0, save_step=0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    epoch = 0
    sampler = EpochOrder(20, seed=3, epoch=lambda: epoch)
    first = list(sampler)
    assert list(sampler) == first == order_of_epoch(20, 3, 0)
    epoch = 1
    assert sorted(first) == sorted(sampler) == list(range(20)) and list(sampler) != first
    assert len(sampler) == 20


def test_evaluating_changes_no_number_of_the_training(data, whole, tmp_path):  # noqa: F811
    rows = run(data, tmp_path, **LONG | {"eval_step": 0})
    assert numbers(rows) == [row for row in numbers(metrics(whole([]))) if "eval_loss" not in row]
