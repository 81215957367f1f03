"""How often a run is evaluated where nobody says, and the advice that it begins with."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from tests.support.training_runs import arguments, data, metrics, one_layer_base  # noqa: F401
from training import demo
from training.__main__ import main
from training.finetune.advice import advice, batch_advice
from training.finetune.evaluations import MOST, SHARE, STEP, Evaluations, chosen_rows, planned
from training.flags import Flags

RUNS = [
    (held_out, steps, batch) for held_out in (1, 40, 500, 20000) for steps in (1, 7, 300, 40000) for batch in (1, 32)
]


@pytest.mark.parametrize("held_out, steps, batch", RUNS)
def test_evaluations_cost_a_tenth_of_training(held_out, steps, batch):
    found = planned(None, held_out=held_out, steps=steps, batch=batch)
    evaluations = 1 + -(-steps // found.period)
    cost, training = evaluations * found.rows, STEP * steps * batch
    # The base's and the last one are measured in any run, of a row each at least.
    assert cost <= max(SHARE * training, 2)
    assert 1 <= found.rows <= held_out and 2 <= evaluations <= MOST + 1
    fewer = planned(None, held_out=held_out, steps=steps, batch=batch * 4)
    assert fewer.rows >= found.rows, "a longer run is evaluated better"


def test_what_is_asked_for_is_done():
    assert planned(7, held_out=20000, steps=10, batch=1) == Evaluations(7, 20000)
    assert (
        planned(0, held_out=20000, steps=10, batch=1)
        == planned(None, held_out=0, steps=9, batch=1)
        == Evaluations(0, 0)
    )


def test_the_rows_that_are_evaluated_are_drawn_once():
    rows = chosen_rows(1000, 50, seed=3)
    assert rows == chosen_rows(1000, 50, seed=3) != chosen_rows(1000, 50, seed=4)
    assert len(set(rows)) == 50 and max(rows) > 500


def test_a_run_says_what_is_evaluated(data, tmp_path, capsys):  # noqa: F811
    base = one_layer_base(tmp_path / "base")
    main(arguments(data, tmp_path / "out", base_model=base, eval_step=None, max_steps=10, save_step=0, val_set_size=10))
    said = capsys.readouterr().out
    assert "evaluated every 10 steps on 2 of the 10 held-out rows, so that it costs at most 10% of training" in said
    assert [row["step"] for row in metrics(tmp_path / "out") if "eval_loss" in row] == [0, 10]


@pytest.fixture
def small(tmp_path):
    """A folder with the config of a model that the plan knows."""
    config = AutoConfig.from_pretrained(demo.BASE)
    config.update({"num_hidden_layers": 1})
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_batch_that_fits_the_gpu_is_suggested(small):
    (said,) = batch_advice(Flags(base_model=small, cutoff_len=512), 24)
    assert "is predicted to fit --batch_size" in said and "--batch_size 16 --gradient_accumulation_steps 1" in said
    assert list(batch_advice(Flags(base_model="gpt2-that-is-not-here"), 24)) == []


@pytest.mark.parametrize(
    ("batch_size", "kept", "again", "said"),
    [
        (16, 40, 90, []),  # it is large enough
        (2, 2, 8, []),
        (64, 40, 90, ["--batch_size 40 is predicted to fit"]),
        (64, 0, 9, ["--batch_size 9 --activation_checkpointing is predicted to fit"]),
        (64, 0, 0, ["--batch_size 1 --quantize is predicted to fit"]),
        (2, 40, 90, ["--batch_size 16 --gradient_accumulation_steps 1 uses it better"]),
    ],
)
def test_what_is_suggested_of_the_batches_that_fit(small, monkeypatch, batch_size, kept, again, said):
    fitting = {False: kept, True: again}
    monkeypatch.setattr(
        "training.finetune.advice.largest_batch",
        lambda *_, activation_checkpointing, **__: fitting[activation_checkpointing],
    )
    monkeypatch.setattr("training.finetune.advice.planned_model", lambda *_, **__: None)
    monkeypatch.setattr("training.finetune.advice.predict", lambda *_, **__: SimpleNamespace(peak=30 << 30))
    found = list(batch_advice(Flags(base_model=small, cutoff_len=512, batch_size=batch_size), 24))
    assert len(found) == len(said) and all(map(str.endswith, found, said)), found


@pytest.mark.parametrize("rank, rate, warned", [(16, 3e-4, False), (256, 3e-4, True), (256, 1e-4, False)])
def test_a_high_rank_wants_a_lower_learning_rate(rank, rate, warned):
    said = list(advice(Flags(lora_r=rank, learning_rate=rate), torch.device("cpu")))
    assert bool(said) == warned and all("1e-4 is safer" in sentence for sentence in said)
