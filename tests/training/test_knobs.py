"""What the flags for TRL's fields, the adapter's fields and parts of a pass do to a run."""

import json
import shutil

import pytest
import torch

from dora_kernels.peft.callback import AccumulatingCallback
from tests.support.marks import slow
from tests.support.training_runs import arguments, data, metrics, one_layer_base, run  # noqa: F401
from training.__main__ import main
from training.checkpoints.checkpoint import list_checkpoints
from training.checkpoints.resume_state import optimizer_numbers
from training.finetune.trainer import DoraTrainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return one_layer_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def trainers(monkeypatch):
    """Every trainer that is made."""
    made, train_from = [], DoraTrainer.train_from

    def noted(self, checkpoint):
        made.append(self)
        train_from(self, checkpoint)

    monkeypatch.setattr(DoraTrainer, "train_from", noted)
    return made


def test_fields_reach_the_trainer(data, base, tmp_path, trainers):  # noqa: F811
    words = ["--set", "weight_decay=0.3", "lr_scheduler_type=constant", "save_total_limit=1", "optim=adamw_torch"]
    words += ["--gradient_accumulation_steps", "2", "--keep_weights"]
    rows = run(data, tmp_path, *words, base_model=base, save_step=1, eval_step=0, max_steps=3, warmup_ratio=0)
    (trainer,) = trainers
    callbacks = trainer.callback_handler.callbacks
    assert [each.keep_weights for each in callbacks if isinstance(each, AccumulatingCallback)] == [True]
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.3, 0.0], "but magnitudes"
    assert {row["learning_rate"] for row in rows} == {5e-3}
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]


@pytest.mark.parametrize("engine", [[], ["--use_peft"]], ids=["ours", "peft"])
def test_the_adapters_fields_reach_its_config(data, base, tmp_path, engine):  # noqa: F811
    words = ["--use_rslora", "--rank_pattern", "q_proj=3", "--alpha_pattern", "v_proj=7", "--exclude_modules", "k_proj"]
    words += ["--modules_to_save", "norm", "--space", "token", "--rounding", "nearest"]
    run(data, tmp_path, *engine, *words, base_model=base, save_step=0, eval_step=0, max_steps=1)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["use_rslora"] and fields["rank_pattern"] == {"q_proj": 3} and fields["alpha_pattern"] == {"v_proj": 7}
    assert fields["modules_to_save"] == ["norm"] and fields["exclude_modules"] == ["k_proj"]


def test_early_stopping_counts_evaluations_without_a_lower_loss(data, base, tmp_path, trainers, capsys):  # noqa: F811
    """At a learning rate of 0 no evaluation is lower than the first one after a step."""
    flags = {"base_model": base, "learning_rate": 0, "eval_step": 2, "max_steps": 20, "early_stopping": 2}
    rows = run(data, tmp_path, **flags, save_step=2)
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 4, 6]
    assert trainers[0].state.global_step == 6 and (tmp_path / "adapter_model.safetensors").is_file()
    assert "stopped early at step 6: 2 evaluations without a lower loss than step 2's" in capsys.readouterr().out


@pytest.mark.slow
def test_early_stopping_goes_on_counting_after_a_resume(data, base, tmp_path, trainers):  # noqa: F811
    flags = {"base_model": base, "learning_rate": 0, "eval_step": 2, "max_steps": 20, "early_stopping": 3}
    run(data, tmp_path, **flags, save_step=2)
    assert trainers[0].state.global_step == 8
    for step in (8,):
        checkpoint = tmp_path / f"checkpoint-{step}"
        assert checkpoint.is_dir()
        for file in sorted(checkpoint.iterdir()):
            file.unlink()
        checkpoint.rmdir()
    main(arguments(data, tmp_path, "--resume", **flags, save_step=2))
    assert trainers[1].state.global_step == 8
    assert [row["step"] for row in metrics(tmp_path) if "eval_loss" in row] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("optimizer", ["adafactor", slow("sgd")])
def test_another_optimizer_resumes_to_the_same_bits(data, base, tmp_path, optimizer):  # noqa: F811
    """Adafactor keeps numbers beside its tensors, SGD keeps nothing."""
    words = ["--set", f"optim={optimizer}"]
    flags = {"base_model": base, "eval_step": 0, "save_step": 2, "max_steps": 4, "warmup_ratio": 0}
    run(data, tmp_path, *words, **flags)
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    shutil.rmtree(tmp_path / "checkpoint-4")
    main(arguments(data, tmp_path, "--resume", *words, **flags))
    assert weights.read_bytes() == whole


def test_what_no_checkpoint_holds_is_said():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = {"step": 3, "clock": object()}
    with pytest.raises(ValueError, match=r"this optimizer keeps a object \(clock\), which no checkpoint holds"):
        optimizer_numbers(optimizer)


def test_half_a_pass_and_a_share_of_the_rows(data, base, tmp_path, capsys):  # noqa: F811
    flags = {"base_model": base, "max_steps": None, "num_epochs": 0.5, "val_set_size": 0.2, "eval_step": 0}
    rows = run(data, tmp_path, **flags, save_step=0)
    assert "40 training rows; 10 rows held out" in capsys.readouterr().out
    assert rows[-1]["step"] == 10
