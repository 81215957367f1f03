"""What a run leaves behind is true: the model card, the next command, the curve's title, the rows that are withheld."""

import re
import shlex

import pytest
import torch
from matplotlib.axes import Axes
from transformers import AutoModelForCausalLM

from tests.support.training_runs import arguments, data, one_layer_base, run  # noqa: F401
from training.__main__ import main
from training.merge import main as merge

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SHORT = {"max_steps": 2, "eval_step": 0, "save_step": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return one_layer_base(tmp_path_factory.mktemp("base"))


def card(folder):
    """The rows of the model card's table."""
    text = (folder / "README.md").read_text()
    return dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", text, re.MULTILINE))


def test_the_card_of_a_continued_adapter_says_its_own_rank(data, base, tmp_path):  # noqa: F811
    first = {"base_model": base, "lora_r": 3, "lora_target_modules": "q_proj,v_proj"}
    run(data, tmp_path / "first", **SHORT, **first, val_set_size=None)
    one = card(tmp_path / "first")
    assert (one["rank"], one["targets"], one["rows held out"]) == ("3", "q_proj, v_proj", "0")
    again = {"base_model": base, "init_adapter": tmp_path / "first", "lora_r": None}
    run(data, tmp_path / "second", "--set", "weight_decay=0.5", **SHORT | {"eval_step": 1}, **again)
    two = card(tmp_path / "second")
    assert (two["rank"], two["targets"], two["rows held out"]) == ("3", "q_proj, v_proj", "10")
    assert two["continued from"] == str(tmp_path / "first") and two["weight_decay"] == "0.5"
    assert two["optimizer steps"] == "2" and two["passes over the rows"] == "at most 2 steps"


@pytest.mark.parametrize("words, name", [([], "DoRA, SFT"), (["--no_use_dora"], "LoRA, SFT")], ids=["dora", "lora"])
def test_the_next_command_and_the_title_fit_what_was_trained(data, base, tmp_path, monkeypatch, capsys, words, name):  # noqa: F811
    titles, set_ = [], Axes.set
    monkeypatch.setattr(Axes, "set", lambda self, **named: (titles.append(named.get("title")), set_(self, **named))[1])
    run(data, tmp_path / "out", *words, base_model=base, learning_rate=0.1, **SHORT)
    assert titles == [f"{name}, nats per target token"]
    command = capsys.readouterr().out.rpartition("next:\n")[2].strip()
    assert command.startswith("python -m training.merge ")
    merge(shlex.split(command)[3:])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out-merged")
    plain = AutoModelForCausalLM.from_pretrained(base)
    path = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged.state_dict()[path], plain.state_dict()[path])
    if words:
        import peft

        adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "out")
        ids = torch.arange(1, 9)[None]
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-5)


def test_rows_are_withheld_for_evaluations_alone(data, base, tmp_path, capsys):  # noqa: F811
    for step, said in ((0, "50 training rows; 0 rows held out"), (2, "45 training rows; 5 rows held out")):
        main(arguments(data, tmp_path / str(step), base_model=base, **SHORT | {"eval_step": step}, val_set_size=None))
        assert said in capsys.readouterr().out
