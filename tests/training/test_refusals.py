"""Every refusal of a flag comes before work starts, in one sentence."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.training_runs import arguments, data, one_layer_base  # noqa: F401
from training import demo
from training.__main__ import main
from training.flags import parse_flags
from training.model.base_model import load_model


@pytest.mark.parametrize(
    "setting, message",
    [
        ("weight_decay=many", "`--set` weight_decay=many: invalid float value: 'many'"),
        ("weight_deca=1", "`--set` weight_deca is no field of SFTConfig; did you mean weight_decay?"),
        ("learning_rate=1", "`--set` learning_rate is decided by --learning_rate"),
        ("fp16=true", "`--set` fp16 cannot be set: the base is in bf16"),
        ("optim=sgdd", "sgdd"),
        ("weight_decay", "`--set` weight_decay should be name=value"),
    ],
)
def test_a_field_that_cannot_be_set(data, tmp_path, setting, message):  # noqa: F811
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        main(arguments(data, tmp_path / "out", set=setting))
    assert str(error.value).startswith("error: ")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--learning", "0.1"], "unrecognized arguments: --learning 0.1; did you mean --learning_rate?"),
        (["--weight_decay", "0.1"], "it is a field of TRL's configuration: --set weight_decay=VALUE"),
        (["--resume_from_checkpoint", "x"], "--resume continues from the newest checkpoint"),
        (["--impl", "cuda"], "invalid choice: 'cuda'"),
        (
            ["--base_model", "a", "--data_path", "b", "--init_adapter", "c", "--lora_r", "4"],
            "--lora_r is decided by --init_adapter's own adapter_config.json",
        ),
    ],
    ids=["abbreviated", "a field", "elsewhere", "choice", "init_adapter decides"],
)
def test_what_the_parser_refuses(words, message, capsys):
    with pytest.raises(SystemExit):
        parse_flags(words)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1, "the message stands alone"


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"base_model": "./absent"}, r"`--base_model` \./absent does not exist"),
        ({"base_model": "tests"}, "`--base_model` tests is not a folder with a config.json"),
        ({"base_model": None}, "`--base_model` is needed as well"),
        ({"data_path": "absent.jsonl"}, "`--data_path` absent.jsonl does not exist"),
        ({"device": "cuda:0"}, r"`--device` cuda:0 is not there \(0 CUDA devices found\): use --device cpu"),
        ({"device": "gpu"}, "`--device` should be cpu, cuda or cuda:N but the value passed is gpu"),
        ({"data_path": "\udce9.jsonl"}, "`--data_path` .* is not valid UTF-8"),
        ({"lora_r": 0}, "`--lora_r` should be a positive integer value but the value passed is 0"),
        ({"lora_dropout": 1.0}, r"`--lora_dropout` should be .*1\.0"),
        ({"lora_target_modules": "no_such_proj"}, "no_such_proj"),
        ({"lora_target_modules": ""}, "target_modules"),
        ({"lora_target_modules": "q_proj,lm_head", "lora_dropout": 0.1}, "lm_head: the loss reads .* has no dropout"),
        ({"lora_target_modules": "q_proj,lm_head", "use_peft": True}, "lm_head: the loss reads .* PEFT's adapter"),
        ({"learning_rate": -1.0}, "`--learning_rate` should be 0 or more but the value passed is -1.0"),
        ({"learning_rate": "nan"}, "`--learning_rate` should be 0 or more but the value passed is nan"),
        ({"batch_size": 0}, "`--batch_size` should be a positive integer value but the value passed is 0"),
        ({"num_epochs": 0}, "`--num_epochs` should be above 0 but the value passed is 0"),
        ({"val_set_size": 1.5}, "`--val_set_size` should be a number of rows, or below 1 a share of them"),
        ({"early_stopping": 2, "eval_step": 0}, "`--early_stopping` needs evaluations"),
        ({"keep_weights": True}, "`--keep_weights` .* needs --gradient_accumulation_steps"),
        ({"keep_weights": True, "gradient_accumulation_steps": 2, "use_dora": False}, "`--keep_weights` .* DoRA"),
        (
            {"keep_weights": True, "gradient_accumulation_steps": 2, "merge_aware": True},
            "`--keep_weights` does not go with --merge_aware, whose layers keep nothing",
        ),
        ({"rank_pattern": "q_proj=high"}, "`--rank_pattern` q_proj=high should be name=number"),
        ({"max_steps": -1}, "`--max_steps` should be 0 or more but the value passed is -1"),
        ({"warmup_ratio": 2.0}, r"`--warmup_ratio` should be in \[0, 1\] but the value passed is 2.0"),
        ({"val_set_size": 50}, "`--val_set_size` 50 should be smaller than the data, which has 50 usable rows"),
        (
            {"cutoff_len": 8},
            r"no usable training rows\n50 of 50 rows are left out, as no token of",
        ),
        ({"fused": False}, "`--no-fused` compares with PEFT's own code: it needs --use_peft"),
        ({"push_to_hub": True}, "`--push_to_hub` needs --hub_model_id"),
        ({"use_liger": True}, "`--use_liger` needs a CUDA device"),
        ({"report_to": "wandb,nothing"}, "`--report_to` (nothing|wandb) is not installed or not known"),
        ({"assistant_only_loss": True}, "`--assistant_only_loss` needs the column `messages` or `conversations`"),
        ({"init_adapter": "absent", "lora_r": None}, "`--init_adapter` absent is not a folder with an adapter_config"),
    ],
    ids=lambda value: "-".join(map(str, next(iter(value.items())))) if isinstance(value, dict) else None,
)
def test_bad_input_is_an_error_before_work_starts(data, tmp_path, monkeypatch, flags, message):  # noqa: F811
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    output_dir = tmp_path / "out"
    given = {"data_path": data} | flags
    with pytest.raises(SystemExit, match=message) as error:
        main(arguments(given.pop("data_path"), output_dir, **given))
    assert str(error.value).startswith("error: ")
    assert not output_dir.exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"lora_target_modules": "q_proj,kproj"}, r"\['kproj'\] not found .* named: .*k_proj"),
        ({"rank_pattern": "qproj=4"}, r"`rank_pattern` \['qproj'\] matches no layer that is adapted"),
    ],
    ids=["target", "pattern"],
)
def test_a_misspelled_name_is_found_before_the_weights_are_read(data, tmp_path, flags, message):  # noqa: F811
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.BASE / name, tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(arguments(data, tmp_path / "out", base_model=tmp_path, **flags))
    right = {"lora_target_modules": "q_proj,k_proj"}
    with pytest.raises(SystemExit, match=r"no file named model\.safetensors"):
        main(arguments(data, tmp_path / "out", base_model=tmp_path, **right))


@pytest.mark.parametrize("damage", ["absent", "of another shape"])
def test_a_base_that_lacks_a_weight_is_refused(damage, tmp_path):
    """transformers draws such weights at random."""
    file = one_layer_base(tmp_path) / "model.safetensors"
    tensors, name = load_file(file), "model.layers.0.mlp.up_proj.weight"
    weight = tensors.pop(name)
    save_file(tensors if damage == "absent" else tensors | {name: weight[1:]}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"`--base_model` {tmp_path} lacks 1 weights .* \({name}\)"):
        load_model(str(tmp_path), torch.device("cpu"))


def test_another_runs_folder_is_not_overwritten(data, tmp_path):  # noqa: F811
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(SystemExit, match="holds checkpoint-3 of an earlier run: continue it with --resume"):
        main(arguments(data, tmp_path))
