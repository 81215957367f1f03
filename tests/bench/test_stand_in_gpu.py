"""The CPU that stands in for a GPU answers as one, and counts what it is asked."""

import pytest
import torch
import torch.utils.checkpoint

import dora_kernels as dk
from bench.day.stand_in_gpu import CUDA, LOST, stand_in_gpu
from bench.measuring.timing import ContextLost, attempt, interleaved


@pytest.fixture
def gpu():
    with stand_in_gpu() as found:
        yield found


def test_tensors_say_that_they_are_on_the_gpu(gpu):
    with torch.device("cuda"):
        made = torch.ones(2, 3)
    for tensor in (made, torch.ones(2, device="cuda"), torch.ones(2).cuda(), torch.ones(2).to(CUDA)):
        assert tensor.is_cuda and tensor.device == CUDA
    assert torch.nn.Linear(2, 3).cuda().weight.is_cuda
    assert torch.mm(made.bfloat16(), made.bfloat16().T, out_dtype=torch.float32).dtype == torch.float32


def test_the_engine_takes_the_gpus_way_forward_and_backward(gpu):
    layer = dk.DoraLinear.from_linear(torch.nn.Linear(32, 32).cuda(), r=4, lora_alpha=8)
    assert "a supported GPU" in str(dk.explain(layer, tokens=8))
    layer(torch.randn(8, 32, device="cuda", requires_grad=True)).sum().backward()
    # The engine makes the tensor's GPU the current one for each half.
    assert gpu.calls["device"] >= 2 and layer.lora_B.grad is not None


def test_what_a_checkpoint_recomputes_is_taken_for_what_it_was(gpu):
    x = torch.ones(3, device="cuda", requires_grad=True)
    torch.utils.checkpoint.checkpoint(lambda x: (x * x).sin(), x, use_reentrant=False).sum().backward()
    assert torch.allclose(x.grad, 2 * torch.ones(3).cos())


def test_an_optimizer_steps(gpu):
    parameter = torch.nn.Parameter(torch.ones(3, device="cuda"))
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.5, weight_decay=0.0).step()
    assert torch.allclose(parameter, torch.full((3,), 0.5))


def test_a_replayed_graph_computes_anew_in_the_same_memory(gpu):
    x = torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = 2 * x + 1
    x.fill_(5)
    assert y.eq(3).all()
    graph.replay()
    assert y.eq(11).all()
    assert gpu.calls["replay"] == 1


def test_time_passes_only_where_something_runs(gpu):
    def phases():
        yield "nothing"
        torch.ones(1 << 20, device="cuda").zero_()
        yield "zeros"

    times, failed = interleaved({"a": phases}, CUDA, repetitions=2)
    assert not failed and times["a"]["nothing"].median == 0 < times["a"]["zeros"].median


def test_planned_faults_are_raised_once_and_a_lost_context_for_good(gpu):
    gpu.faults["Event", 2] = torch.OutOfMemoryError("CUDA out of memory.")
    torch.cuda.Event()
    assert attempt(torch.cuda.Event) == (None, "out of memory")
    assert attempt(torch.cuda.Event)[1] is None
    gpu.faults["synchronize", gpu.calls["synchronize"] + 1] = RuntimeError(LOST)
    with pytest.raises(ContextLost, match="ours: RuntimeError: CUDA error"):
        attempt(torch.cuda.synchronize, who="ours")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        torch.cuda.Event()


def test_outside_nothing_is_left_of_it():
    with stand_in_gpu():
        pass
    assert not torch.ones(1).is_cuda and not torch.cuda.is_available()
