"""Trackers are tried for real, without a network: the files that they leave hold the run's losses."""

import re

import pytest

from tests.support.training_runs import data, one_layer_base, run  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SHORT = {"max_steps": 3, "eval_step": 2, "save_step": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return one_layer_base(tmp_path_factory.mktemp("base"))


def curve(rows, name):
    """A step's loss as `metrics.jsonl` has it."""
    return {row["step"]: pytest.approx(row[name], rel=1e-6) for row in rows if name in row}


def test_tensorboard(data, base, tmp_path):  # noqa: F811
    pytest.importorskip("tensorboard", reason="--report_to tensorboard needs tensorboard, which is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = run(data, tmp_path, base_model=base, report_to="tensorboard", **SHORT)
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for tag, name in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        assert {event.step: event.value for event in events.Scalars(tag)} == curve(rows, name), tag


def test_wandb_offline(data, base, tmp_path, monkeypatch):  # noqa: F811
    wandb = pytest.importorskip("wandb", reason="--report_to wandb needs wandb, which is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    try:
        rows = run(data, tmp_path / "out", base_model=base, report_to="wandb", **SHORT)
    finally:
        wandb.finish()
        wandb.teardown()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    logged = file.read_bytes()
    for key, name in ((b"train/loss", "loss"), (b"eval/loss", "eval_loss")):
        # A key, the tag and length of its value, and the value as JSON.
        values = {float(value) for value in re.findall(key + rb"...(\d[\d.e-]+)", logged, re.DOTALL)}
        assert values == {row[name] for row in rows if name in row}, key
