"""A run that is interrupted, damaged or poisoned: what is kept, what is said, and that resuming changes no bit."""

import signal
import time

import pytest
import torch

from tests.support.interruptions import WEIGHTS, before_step, ctrl_c, heeded, printed_command, sigterm  # noqa: F401 (a fixture)
from tests.support.marks import slow
from tests.support.training_runs import arguments, demo_rows, metrics, numbers, one_layer_base, run, write_rows
from training import commands
from training.__main__ import main
from training.checkpoints import checkpoint as checkpoints
from training.checkpoints.checkpoint import damage, list_checkpoints
from training.checkpoints.lock import sole_run
from training.data.order import order_of_epoch
from training.finetune.resumable import EpochOrder
from training.finetune.trainer import DoraTrainer
from training.stopping import INTERRUPTED, REPEATED

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
ENGINES = pytest.mark.parametrize("engine", [[], ["--use_peft"]], ids=["ours", "peft"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", demo_rows(26))


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """The flags of two epochs. 20 rows in batches of 2 x 3 are 4 steps each, the last one smaller: checkpoints fall
    inside epochs and on their end, and dropout needs the generators."""
    flags = {"max_steps": None, "num_epochs": 2, "gradient_accumulation_steps": 3, "save_step": 1, "val_set_size": 6}
    return flags | {"lora_dropout": 0.2, "base_model": one_layer_base(tmp_path_factory.mktemp("base"))}


@pytest.fixture(scope="module")
def whole(data, long, tmp_path_factory):
    """Uninterrupted runs, made once per engine."""
    made = {}

    def get(engine):
        name = "-".join(engine)
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole")
            run(data, made[name], *engine, **long)
        return made[name]

    return get


@ENGINES
@pytest.mark.parametrize("stop", [slow(2), 4, slow(6)], ids=["step 2", "step 4", "step 6"])
def test_sigterm_saves_and_the_printed_command_ends_with_the_same_bits(
    data, long, whole, tmp_path, monkeypatch, capsys, engine, stop
):
    with monkeypatch.context() as patch:
        before_step(patch, stop, sigterm)
        # A save of its own: the interval's would come later.
        main(arguments(data, tmp_path, *engine, **long | {"save_step": 100}))
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


def test_one_ctrl_c_saves_and_says_how_to_continue(data, long, whole, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        before_step(patch, 3, ctrl_c)
        main(arguments(data, tmp_path, **long | {"save_step": 100}))
    said = capfd.readouterr()
    assert "Ctrl-C again aborts at once" in said.err and "stopped and saved at step 3; continue with" in said.out
    main(printed_command(said.out))
    assert (tmp_path / WEIGHTS).read_bytes() == (whole([]) / WEIGHTS).read_bytes()


@pytest.mark.parametrize("save_step, hint", [(1, "checkpoint-2 is sound: continue with"), (0, "nothing was saved")])
def test_a_second_ctrl_c_aborts_and_says_what_is_saved(data, long, tmp_path, monkeypatch, capfd, save_step, hint):
    def twice(trainer, inputs):
        ctrl_c(trainer, inputs)
        ctrl_c(trainer, inputs)  # what torchrun hands on
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 2 * REPEATED)
        ctrl_c(trainer, inputs)
        raise AssertionError("the second one does not wait for the step")

    before_step(monkeypatch, 3, twice)
    monkeypatch.setattr("sys.argv", ["dora-train", *arguments(data, tmp_path, **long | {"save_step": save_step})])
    with pytest.raises(SystemExit) as ended:
        commands.train()
    said = capfd.readouterr().err
    assert ended.value.code == INTERRUPTED and "aborted; " in said and hint in said and "Traceback" not in said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / WEIGHTS).exists() and not list(tmp_path.glob(".tmp-*"))


def test_sigterm_during_an_evaluation(data, long, whole, tmp_path, monkeypatch, capsys):
    """The evaluation is finished, and logged; the step that it belongs to is what is saved."""
    step = DoraTrainer.prediction_step

    def interrupted(self, *args, **options):
        if self.state.global_step == 3:
            sigterm(self, None)
        return step(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(DoraTrainer, "prediction_step", interrupted)
        main(arguments(data, tmp_path, **long | {"save_step": 100}))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert numbers(metrics(tmp_path)) == [row for row in numbers(metrics(whole([]))) if row["step"] <= 3]
    main(printed_command(capsys.readouterr().out))
    assert numbers(metrics(tmp_path)) == numbers(metrics(whole([])))


def test_save_model_writes_the_adapter(data, tmp_path, monkeypatch):
    train_from = DoraTrainer.train_from

    def and_save(self, checkpoint):
        train_from(self, checkpoint)
        self.save_model(str(tmp_path / "saved"))

    monkeypatch.setattr(DoraTrainer, "train_from", and_save)
    run(data, tmp_path / "out", max_steps=1, save_step=0, eval_step=0)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert not (tmp_path / "saved" / "model.safetensors").exists()


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(data, long, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        before_step(patch, 6, sigterm)
        main(arguments(data, tmp_path, **long))
    file = tmp_path / "checkpoint-6" / "training_state.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    capsys.readouterr()
    main(arguments(data, tmp_path, "--resume", **long))
    out = capsys.readouterr().out
    assert "checkpoint-6: training_state.safetensors has" in out and "checkpoint-5\n" in out
    assert numbers(metrics(tmp_path)) == numbers(metrics(whole([])))


@pytest.mark.parametrize("steps", [3, None], ids=["inside an epoch", "at its end"])
def test_resuming_a_finished_run_trains_no_further(data, long, tmp_path, capsys, steps):
    flags = long | {"max_steps": steps, "num_epochs": 1}
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
def test_another_run_is_not_resumed(data, long, whole, other, named):
    with pytest.raises(SystemExit, match=rf"checkpoint-8 is of a run with other settings: {named}"):
        main(arguments(data, whole([]), "--resume", **long | other))


def test_a_full_disk_leaves_the_last_good_checkpoint(data, long, whole, tmp_path, monkeypatch):
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
            main(arguments(data, tmp_path, **long))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-2"]
    assert damage(tmp_path / "checkpoint-3") is None and not list(tmp_path.glob(".tmp-*"))
    main(printed_command(str(error.value)))
    assert numbers(metrics(tmp_path)) == numbers(metrics(whole([])))


def test_two_runs_do_not_share_a_folder(data, tmp_path):
    with sole_run(tmp_path), pytest.raises(SystemExit, match="another run is writing to"):
        main(arguments(data, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    run(data, tmp_path, max_steps=1)


def test_sigterm_means_what_it_did_once_the_run_is_over(data, tmp_path):
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


def test_evaluating_changes_no_number_of_the_training(data, long, whole, tmp_path):
    rows = run(data, tmp_path, **long | {"eval_step": 0})
    assert numbers(rows) == [row for row in numbers(metrics(whole([]))) if "eval_loss" not in row]
