"""`--lora_target_parameters` trains, saves and merges the experts of a mixture."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support.interruptions import WEIGHTS, before_step
from tests.support.tiny_experts import tiny_experts
from tests.support.training_runs import arguments, data, metrics, numbers, run  # noqa: F401
from training import demo
from training.__main__ import main
from training.export import main as export
from training.flags import parse_flags
from training.merge import main as merge

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
STACKS = "mlp.experts.gate_up_proj,mlp.experts.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    vocabulary = AutoConfig.from_pretrained(demo.BASE).vocab_size
    tiny_experts("Qwen3-MoE", torch.float32, vocab_size=vocabulary).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.BASE).save_pretrained(folder)
    return folder


def test_a_run_trains_and_merges_experts(base, data, tmp_path):  # noqa: F811
    out, merged = tmp_path / "out", tmp_path / "merged"
    rows = run(data, out, base_model=base, lora_target_parameters=STACKS, max_steps=2, eval_step=2)
    assert rows[-1]["step"] == 2
    tensors = load_file(out / "adapter_model.safetensors")
    trained = {key for key, tensor in tensors.items() if ".experts." in key and "lora_B" in key and tensor.any()}
    assert len(trained) == 4
    merge(["--base_model", str(base), "--adapter", str(out), "--output_dir", str(merged)])
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, merged))
    changed = {key.rpartition(".")[2] for key in before if ".experts." in key and not before[key].equal(after[key])}
    assert changed == {"gate_up_proj", "down_proj"}
    for to in ("lora", "int4"):
        with pytest.raises(SystemExit, match=f"`--to` {to} has no form for the adapters of fused experts"):
            export(["--base_model", str(base), "--adapter", str(out), "--output_dir", str(tmp_path / to), "--to", to])


class Killed(BaseException):
    """Nothing catches it."""


def killed(trainer, inputs):
    raise Killed


def test_a_killed_run_goes_on_to_the_same_losses_and_bits(base, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    """In its fourth step: what the third trained is lost, and trained again. Experts' moments and m are resumed too."""
    flags = {"base_model": base, "lora_target_parameters": STACKS, "max_steps": 5, "eval_step": 0}
    whole = run(data, tmp_path / "whole", **flags)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 4, killed)
        main(arguments(data, tmp_path / "killed", **flags))
    assert not (tmp_path / "killed" / WEIGHTS).exists()
    capsys.readouterr()
    torch.manual_seed(999)
    main(arguments(data, tmp_path / "killed", "--resume", **flags))
    assert "checkpoint-2" in capsys.readouterr().out
    assert len(whole) >= 5 and numbers(metrics(tmp_path / "killed")) == numbers(whole)
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_run_divides_the_rank_over_the_experts_of_a_token(base, data, tmp_path):  # noqa: F811
    flags = {"lora_target_parameters": STACKS, "lora_r": 6, "expert_rank": "active"}
    run(data, tmp_path, base_model=base, max_steps=1, eval_step=0, save_step=0, **flags)
    shapes = {key: list(tensor.shape) for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    ranks = {"q_proj": 6, "experts": 4 * 3}
    assert {name: shapes[key][0] for name in ranks for key in shapes if name in key and "lora_A" in key} == ranks


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_target_parameters": "experts.w1"}, "experts.w1"),
        ({"lora_target_parameters": STACKS, "lora_dropout": 0.1}, "lora_dropout"),
        ({"lora_target_parameters": STACKS, "use_peft": True}, "PEFT"),
        ({"expert_rank": "active"}, "`--expert_rank` should be"),
    ],
    ids=["no such parameter", "dropout", "PEFT", "no experts"],
)
def test_what_cannot_train_is_refused_before_anything_is_loaded(base, data, tmp_path, flags, message):  # noqa: F811
    with pytest.raises(SystemExit, match=message):
        main(arguments(data, tmp_path / "out", base_model=base, **flags))
    assert not (tmp_path / "out").exists()


def test_a_short_name_is_understood(base, data, tmp_path):  # noqa: F811
    words = arguments(data, tmp_path / "out", base_model=base, target_parameters=STACKS)
    assert parse_flags(words)[0].dora.target_parameters == STACKS.split(",")
