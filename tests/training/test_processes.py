"""Training in two processes on a CPU, over gloo: the numbers of one, one writer, stopped and resumed together."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dora_kernels as dk
from tests.support.training_runs import arguments, data, metrics, numbers, run  # noqa: F401
from tests.support.two_processes import FLAGS, PACKED, STOP, torchrun
from tests.tolerances import SAME_FP32
from training import demo
from training.__main__ import main
from training.checkpoints.checkpoint import damage, list_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
WEIGHTS = "adapter_model.safetensors"


def test_the_command_in_two_processes_is_the_command_in_one(data, tmp_path):  # noqa: F811
    """The same global batches over two epochs. Neither 41 training rows nor 9 held-out ones divide by the processes'
    batches: accelerate repeats some, and none may count twice."""
    flags = {"val_set_size": 9, "max_steps": None, "num_epochs": 2, "gradient_accumulation_steps": 3, "eval_step": 7}
    with data.open() as rows:  # and one that cannot be used
        (tmp_path / "rows.jsonl").write_text(rows.read() + '{"prompt": "", "completion": "nothing"}\n')
    one = run(tmp_path / "rows.jsonl", tmp_path / "one", **flags)
    words = arguments(tmp_path / "rows.jsonl", tmp_path / "two", **flags | {"batch_size": 1})
    launched = torchrun("training", *words)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    two = metrics(tmp_path / "two")
    assert [row["step"] for row in two] == [row["step"] for row in one], "one process logs"
    for row, other in zip(two, one):
        name = "loss" if "loss" in row else "eval_loss"
        assert row[name] == pytest.approx(other[name], rel=SAME_FP32)
    for once in ("row 51: `prompt` is empty", "in 2 processes", "held-out perplexity"):
        assert launched.stdout.count(once) == 1, launched.stdout
    assert len((tmp_path / "two" / "skipped_rows.jsonl").read_text().splitlines()) == 1
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):  # noqa: F811
    """The folder of `tests.support.two_processes`, and what was said there."""
    folder = tmp_path_factory.mktemp("runs")
    launched = torchrun("tests.support.two_processes", data, folder)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    return folder, launched.stdout


def test_a_stop_in_one_process_stops_both_and_resumes_exactly(runs):
    folder, said = runs
    assert said.count(f"stopped and saved at step {STOP}; continue with") == 1
    # An evaluation that was due at the step of the stop is not waited for.
    expected = [row for row in metrics(folder / "whole") if "eval_loss" not in row or row["step"] != STOP]
    assert numbers(metrics(folder / "stopped")) == numbers(expected)
    assert (folder / "stopped" / WEIGHTS).read_bytes() == (folder / "whole" / WEIGHTS).read_bytes()


def test_each_process_has_its_own_generators(runs):
    folder, _ = runs
    checkpoint = list_checkpoints(folder / "stopped")[0]
    tensors = load_file(checkpoint / "training_state.safetensors")
    assert not torch.equal(tensors["0.random.cpu"], tensors["1.random.cpu"]), "or both drop the same features"
    assert len(json.loads((checkpoint / "training_state.json").read_text())["random"]) == 2


def test_a_checkpoint_of_two_loads_in_one_and_is_not_resumed_there(runs, data):  # noqa: F811
    folder, _ = runs
    checkpoint = list_checkpoints(folder / "whole")[0]
    assert damage(checkpoint) is None
    model = dk.load_adapter(AutoModelForCausalLM.from_pretrained(demo.BASE, dtype=torch.float32), checkpoint)
    tensors = load_file(folder / "whole" / WEIGHTS)
    layer = model.model.layers[1].mlp.up_proj
    assert torch.equal(layer.lora_B, tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"])
    with pytest.raises(SystemExit, match="run with other settings: processes differ"):
        main(arguments(data, folder / "whole", "--resume", **FLAGS))


def test_packed_or_not_no_held_out_row_counts_twice(runs, data, tmp_path):  # noqa: F811
    """The 10 held-out rows of two processes end in repeated ones; packing lays them into one sequence."""
    folder, _ = runs
    one = run(data, tmp_path, "--packing", **PACKED)[0]
    # fp64 sums of fp32 losses, in other batches.
    assert metrics(folder / "packed")[0]["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-6)


def test_a_nan_in_one_process_stops_both(runs):
    folder, said = runs
    named, other = sorted((line for line in said.splitlines() if " said error: " in line), reverse=True)
    assert "process 1 said error: the loss of step 3" in named and "up_proj was the first layer to go" in named
    assert "process 0 said error: the loss of step 3" in other and "is not finite in another process" in other
    assert [path.name for path in list_checkpoints(folder / "poisoned")] == ["checkpoint-2", "checkpoint-1"]


def test_the_demo_is_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="the demo runs in one process"):
        main(["--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
