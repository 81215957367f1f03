"""Evaluation within training: each layer's norm is computed once per evaluation, and the losses keep their bits."""

from contextlib import nullcontext

import pytest

from dora_kernels.ops import reference
from tests.support.marks import slow
from tests.support.training_runs import data, numbers, run  # noqa: F401
from training.finetune.trainer import DoraTrainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
FLAGS = {"max_steps": 2, "eval_step": 1, "save_step": 0}


@pytest.fixture
def norms(monkeypatch):
    """For each evaluation: how many norms were computed in it, alone or on the way to W'."""
    counts, loop = [], DoraTrainer.evaluation_loop
    inside = [False]

    def evaluation_loop(self, *args, **options):
        counts.append(0)
        inside[0] = True
        try:
            return loop(self, *args, **options)
        finally:
            inside[0] = False

    def count(name, computes):
        operation = getattr(reference, name)

        def counted(*args, **options):
            if inside[0] and computes(options):
                counts[-1] += 1
            return operation(*args, **options)

        monkeypatch.setattr(reference, name, counted)

    monkeypatch.setattr(DoraTrainer, "evaluation_loop", evaluation_loop)
    count("weight_norm", lambda options: True)
    count("merge", lambda options: options.get("norm_scale") is None)
    return counts


@pytest.mark.parametrize("engine", [[], slow(["--use_peft"])], ids=["ours", "peft"])
def test_once_per_layer_and_evaluation(data, tmp_path, norms, monkeypatch, engine):  # noqa: F811
    once = run(data, tmp_path / "once", *engine, **FLAGS)
    assert norms == [14, 14, 14]
    norms.clear()
    monkeypatch.setattr(DoraTrainer, "_norms_kept", lambda self: nullcontext())
    each_time = run(data, tmp_path / "each", *engine, **FLAGS)
    assert norms == [28, 28, 28], "or there is one batch, and nothing was to be saved"
    assert numbers(once) == numbers(each_time)
