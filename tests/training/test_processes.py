"""Training in two processes on a CPU, over gloo: the numbers of one, one writer, stopped and resumed together."""

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import dora_kernels as dk
from tests.support.training_runs import arguments, demo_rows, metrics, numbers, run, write_rows
from tests.support.two_processes import FLAGS, PACKED, STOP, UNEVEN, gloo_threads, torchrun
from tests.tolerances import SAME_FP32
from training import demo
from training.__main__ import main
from training.checkpoints.checkpoint import damage, list_checkpoints
from training.distributed.processes import leave

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", demo_rows(30))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """The same rows and one that cannot be used."""
    path = tmp_path_factory.mktemp("uneven") / "rows.jsonl"
    return write_rows(path, [*demo_rows(30), {"prompt": "", "completion": "nothing"}])


@pytest.fixture(scope="module")
def runs(data, uneven, tmp_path_factory):
    """The folder of `tests.support.two_processes`, and what was said there."""
    folder = tmp_path_factory.mktemp("runs")
    launched = torchrun("tests.support.two_processes", data, uneven, folder)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    return folder, launched.stdout


def test_the_command_in_two_processes_is_the_command_in_one(runs, uneven, tmp_path):
    """The same global batches over two epochs. Accelerate repeats rows to fill the last ones; none may count twice."""
    folder, said = runs
    one = run(uneven, tmp_path / "one", **UNEVEN)
    two = metrics(folder / "uneven")
    assert [row["step"] for row in two] == [row["step"] for row in one], "one process logs"
    for row, other in zip(two, one):
        name = "loss" if "loss" in row else "eval_loss"
        assert row[name] == pytest.approx(other[name], rel=SAME_FP32)
    # Of the six runs four reach their end.
    for text, times in {"row 31: `prompt` is empty": 1, "in 2 processes": 6, "held-out perplexity": 4}.items():
        assert said.count(text) == times, (text, said)
    assert len((folder / "uneven" / "skipped_rows.jsonl").read_text().splitlines()) == 1
    assert {path.name for path in (folder / "uneven").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


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


def test_a_checkpoint_of_two_loads_in_one_and_is_not_resumed_there(runs, data):
    folder, _ = runs
    checkpoint = list_checkpoints(folder / "whole")[0]
    assert damage(checkpoint) is None
    model = dk.load_adapter(AutoModelForCausalLM.from_pretrained(demo.BASE, dtype=torch.float32), checkpoint)
    tensors = load_file(folder / "whole" / WEIGHTS)
    layer = model.model.layers[1].mlp.up_proj
    assert torch.equal(layer.lora_B, tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"])
    with pytest.raises(SystemExit, match="run with other settings: processes differ"):
        main(arguments(data, folder / "whole", "--resume", **FLAGS))


def test_packed_or_not_no_held_out_row_counts_twice(runs, data, tmp_path):
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


def test_the_commands_end_is_that_of_gloos_threads(runs):
    """One of them could free a tensor while the interpreter shuts down, which aborts the process."""
    _, said = runs
    assert said.count("gloo's threads: 2, at the end 0\n") == 2


@pytest.fixture
def group_of_one(tmp_path):
    """Yields how many threads of gloo's earlier tests left behind in this process."""
    others = gloo_threads()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield others
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("failed", [False, True])
def test_a_model_in_a_cycle_does_not_keep_the_group(group_of_one, failed):
    model = DistributedDataParallel(torch.nn.Linear(2, 3))
    model.itself = [model]
    model(torch.ones(1, 2)).sum().backward()
    assert gloo_threads() > group_of_one
    del model
    leave(failed)
    assert gloo_threads() == group_of_one


def test_a_process_that_failed_does_not_wait_for_nccl(group_of_one, monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    leave(failed=True)
    assert dist.is_initialized()
    leave(failed=False)
    assert not dist.is_initialized()


def test_the_demo_is_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="the demo runs in one process"):
        main(["--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
