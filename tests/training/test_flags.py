"""Flags: the reference's command line, the YAML file, and the device that each process takes."""

import dataclasses
import json
import shlex

import pytest
from trl import SFTConfig

from tests.support.training_runs import arguments, data  # noqa: F401
from training import demo
from training.flags import Flags, parse_flags
from training.flags.flags import check_source
from training.flags.parsing import DEMO
from training.flags.trainer_fields import FLAG_OF, REFUSED, trainer_fields

REFERENCE = """
--base_model PATH_TO_MODEL --data_path PATH_TO_DATASET --output_dir PATH_TO_OUTPUT_DIR --batch_size 1 --num_epochs 3
--learning_rate 3e-4 --cutoff_len 512 --val_set_size 500 --use_compile True --use_peft --quantize --eval_step 10
--save_step 100 --device "cuda:0" --lora_r 16 --lora_alpha 32 --lora_dropout 0.05
--lora_target_modules "q_proj,k_proj,v_proj,o_proj" --hub_model_id "YOUR_HF_REPO" --push_to_hub
"""


def test_the_references_command_as_printed():
    flags, is_demo = parse_flags(shlex.split(REFERENCE))
    assert not is_demo
    assert flags == Flags(
        base_model="PATH_TO_MODEL", data_path="PATH_TO_DATASET", output_dir="PATH_TO_OUTPUT_DIR", batch_size=1,
        num_epochs=3, learning_rate=3e-4, cutoff_len=512, val_set_size=500, use_compile=True, use_peft=True,
        quantize=True, eval_step=10, save_step=100, device="cuda:0", lora_r=16, lora_alpha=32, lora_dropout=0.05,
        lora_target_modules="q_proj,k_proj,v_proj,o_proj", hub_model_id="YOUR_HF_REPO", push_to_hub=True,
    )  # fmt: skip
    assert flags.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("words, value", [([], True), (["--use_dora"], True), (["--no_use_dora"], False)], ids=str)
def test_dora_or_lora(words, value):
    assert parse_flags(["--base_model", "a", "--data_path", "b", *words])[0].use_dora is value


def test_without_targets_all_linears_are_adapted():
    assert parse_flags(["--base_model", "a", "--data_path", "b"])[0].target_modules == "all-linear"


def test_the_demo_has_its_own_settings_and_the_user_wins():
    flags, is_demo = parse_flags(["--learning_rate", "0.5"])
    assert is_demo and flags.learning_rate == 0.5
    assert (flags.base_model, flags.batch_size) == (str(demo.BASE), DEMO["batch_size"])


def test_dashes_are_as_good_as_underscores():
    flags, is_demo = parse_flags(["--base-model", "a", "--data-path=b", "--no-fused", "--use-peft"])
    assert not is_demo and (flags.base_model, flags.data_path, flags.fused) == ("a", "b", False)


def test_the_demo_refuses_what_its_loop_cannot(capsys):
    with pytest.raises(SystemExit):
        parse_flags(["--quantize"])
    assert "the demo has no --quantize: give --base_model and --data_path" in capsys.readouterr().err


def test_yaml_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "base_model: model\ndata_path: rows.jsonl\nlearning_rate: 1e-3\nuse_peft: true\nuse_dora: false\n"
        "lora_target_modules: [q_proj, v_proj]\nval_set_size: null\nbatch_size: 4\n"
    )
    flags, is_demo = parse_flags(["--batch_size", "8", "--config", str(path), "--use_dora"])
    assert not is_demo and (flags.base_model, flags.data_path) == ("model", "rows.jsonl")
    assert flags.learning_rate == 1e-3 and flags.use_peft and flags.target_modules == ["q_proj", "v_proj"]
    assert flags.batch_size == 8 and flags.use_dora and flags.val_set_size is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("trainer: 3", "`trainer` should hold `field: value` lines"),
        ("weight_decay: 0.1", "it is a field of TRL's configuration: --set weight_decay=VALUE"),
        ("learning_rat: 1", "has an unknown key 'learning_rat'; did you mean --learning_rate?"),
        ("[1, 2]", "should hold `flag: value` lines, got list"),
        ("a: [", "is not YAML"),
        ("batch_size: many", "argument --batch_size: invalid int value: 'many'"),
        ("base_model: a\ndata_path: b\nuse_peft: perhaps", "argument --use_peft"),
        (None, "No such file"),
    ],
    ids=["section", "field", "unknown key", "list", "not yaml", "wrong type", "wrong bool", "absent"],
)
def test_a_bad_config_is_named(tmp_path, capsys, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit):
        parse_flags(["--config", str(path)])
    assert message in capsys.readouterr().err


FAMILIAR = {
    "--lr 1e-4": {"learning_rate": 1e-4},
    "--epochs 0.5": {"num_epochs": 0.5},
    "--num-train-epochs=2": {"num_epochs": 2},
    "--max_length 77": {"cutoff_len": 77},
    "--max-seq-length 78": {"cutoff_len": 78},
    "--load_in_4bit": {"quantize": True},
    "--per_device_train_batch_size 3": {"batch_size": 3},
    "--micro_batch_size=4": {"batch_size": 4},
    "--lora-rank 5": {"lora_r": 5},
    "--target_modules q_proj": {"lora_target_modules": "q_proj"},
    "--gradient_checkpointing": {"activation_checkpointing": True},
    "--eval_steps 6": {"eval_step": 6},
    "--val_set_size 0.1": {"val_set_size": 0.1},
}


@pytest.mark.parametrize("words", FAMILIAR)
def test_the_names_of_other_programs_are_understood(words):
    flags, _ = parse_flags(["--model", "a", "--dataset", "b", *words.split()])
    assert {name: value for name, value in vars(flags).items() if value != getattr(Flags(), name)} == {
        "base_model": "a", "data_path": "b", **FAMILIAR[words],
    }  # fmt: skip


def test_a_familiar_name_counts_as_the_flag(capsys):
    with pytest.raises(SystemExit):
        parse_flags(["--model", "a", "--data", "b", "--init_adapter", "c", "--lora-rank", "4"])
    assert "--lora_r is decided by --init_adapter's own" in capsys.readouterr().err


def test_help_is_grouped_and_each_group_fits_a_screen(capsys):
    with pytest.raises(SystemExit):
        parse_flags(["--help"])
    _, *groups = capsys.readouterr().out.split("\n\n")
    headings = [group.splitlines()[0] for group in groups]
    assert {"the run:", "data:", "training:", "the adapter:", "speed and memory:"} < set(headings)
    assert max(len(group.splitlines()) for group in groups) <= 24
    assert max(len(line) for group in groups for line in group.splitlines()) <= 110
    said = " ".join(" ".join(groups).split())
    assert all(f"--{name} " in said for name in vars(Flags())), "a flag without a line"


def test_the_trainers_other_fields(tmp_path):
    """From the YAML's section and from `--set`, which wins; each of the type that the field has."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "base_model: a\ndata_path: b\n"
        "trainer: {weight_decay: 0.1, optim: adafactor, lr_scheduler_kwargs: {min_lr: 1.0e-5}, logging_steps: 5}\n"
    )
    flags, _ = parse_flags(["--config", str(path), "--set", "weight_decay=0.2", "neftune_noise_alpha=5"])
    found = trainer_fields(flags.set, SFTConfig)
    kwargs = found.pop("lr_scheduler_kwargs")
    assert (kwargs if isinstance(kwargs, dict) else json.loads(kwargs)) == {"min_lr": 1e-5}
    assert found == {"weight_decay": 0.2, "optim": "adafactor", "logging_steps": 5, "neftune_noise_alpha": 5.0}


def test_every_field_of_trls_configuration_is_decided_somewhere():
    """A flag, a reason why not, or `--set`: and no name in two of them, or of a field that is gone."""
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    assert not FLAG_OF.keys() & REFUSED.keys()
    assert {name for name in FLAG_OF.keys() | REFUSED.keys() if name not in known} <= {"local_rank"}
    given = {word.removeprefix("--") for word in FLAG_OF.values()}
    assert given <= vars(Flags()).keys()


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    """No shell replaces it in a YAML file, or behind an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("base_model: a\ndata_path: ~/rows.jsonl\n")
    flags, _ = parse_flags(["--config=~/run.yaml", "--output_dir=~/out", "--init_adapter=a~b"])
    assert flags.data_path == f"{tmp_path}/rows.jsonl" and flags.output_dir == f"{tmp_path}/out"
    assert flags.init_adapter == "a~b"


@pytest.mark.parametrize(
    "device, expected",
    [
        ("", "cuda:1"),
        ("cuda", "cuda:1"),
        ("cuda:1", "cuda:1"),
        ("cpu", "cpu"),
        ("cuda:0", "`--device` cuda:0 is one GPU for several processes: use --device cuda"),
    ],
    ids=["default", "cuda", "its own", "cpu", "another's"],
)
def test_each_process_takes_the_gpu_of_its_number(monkeypatch, device, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    if expected.startswith("`"):
        with pytest.raises(ValueError, match=expected):
            _ = Flags(device=device).torch_device
    else:
        assert str(Flags(device=device).torch_device) == expected


@pytest.mark.parametrize("device", ["", "cuda", "cuda:0"])
def test_one_process_takes_the_first_gpu(monkeypatch, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert str(Flags(device=device).torch_device) == "cuda:0"
    with pytest.raises(ValueError, match=r"`--device` cuda:1: .* run with CUDA_VISIBLE_DEVICES=1 and --device cuda:0"):
        _ = Flags(device="cuda:1").torch_device


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"cuda:2, for process 2 of this machine, is not there \(2 CUDA devices"):
        _ = Flags().torch_device


@pytest.mark.parametrize("name", ["meta-llama/Meta-Llama-3-8B", "timdettmers/openassistant-guanaco", "gpt2"], ids=str)
def test_a_hub_id_is_left_to_the_hub(name):
    check_source("base_model", name)
