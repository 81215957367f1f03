"""What a sceptic asks of a number: other orders, poisoned outputs, clocks, the profiler, bytes below the copy's."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import kernels
from bench.measuring import clocks, profiler, timing
from bench.measuring.outputs import Outputs
from bench.measuring.shapes import MODELS, Run, model_flops
from bench.measuring.timing import interleaved

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def contestant(call):
    def phases():
        returned = call()
        yield "call"
        return returned

    return phases


def test_each_of_two_runs_first_as_often():
    ran = []
    both = {name: contestant(lambda name=name: ran.append(name)) for name in "ab"}
    times, _ = interleaved(both, CPU, repetitions=8, warmup=2)
    firsts = ran[4::2]
    assert firsts.count("a") == firsts.count("b") == 4
    assert len(times["a"]["call"].orders) == 2


def test_memory_that_was_not_written_again_shows():
    """The second call leaves half of the memory as it finds it: right values, were it not for the poison."""
    memory = torch.empty(8)
    calls = [0]

    def forgetful():
        calls[0] += 1
        memory[: 8 if calls[0] == 1 else 4] = 1.0
        return memory

    times, failed = interleaved({"forgetful": contestant(forgetful)}, CPU, repetitions=3, inspect=Outputs([]))
    assert "other values than the first" in failed["forgetful"] and not times


def test_what_a_call_hands_through_is_not_poisoned():
    kept = torch.ones(4)
    outputs = Outputs([kept])
    fresh = torch.ones(4)
    assert outputs("a", (kept, [fresh, None, 3])) is None
    assert kept.eq(1).all() and fresh.isnan().all()
    assert outputs("a", (kept, [torch.ones(4)])) is None
    assert "other values" in outputs("a", (kept, [torch.ones(4) * 1.01]))
    assert "other values" in outputs("a", (kept,))


@pytest.mark.parametrize(("time", "believed"), [(0.5, False), (0.94, False), (0.96, True), (2.0, True)])
def test_more_bytes_than_the_copy_moves_are_marked(time, believed):
    def row(seconds, **more):
        total = {"median": seconds, "low": seconds, "high": seconds}
        return {"seconds": {"total": total}, "memory_bytes": 100, "loaded_bytes": 0, "flops": {"bf16": 1}, **more}

    group = {kernels.COPY: row(1.0), kernels.GEMM: row(1.0), "merge": row(time, impl="triton", launches=[])}
    assert kernels.implausible(group["merge"], group) is not believed
    assert ("not to be believed" in kernels.kernels_table(group)) is not believed


def test_clocks_of_a_cpu_are_not_asked_for():
    assert clocks.read(CPU) == {}


def test_clocks_come_from_the_command_where_the_library_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho '1980, 3201, 512.5, 43, 0x0000000000000004'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = clocks.read(CUDA)
    assert found == {"sm_mhz": 1980, "memory_mhz": 3201, "watts": 512.5, "celsius": 43, "throttled": 4}
    assert clocks.shown(found) == "1980 MHz SM, 3201 MHz memory, 512 W, 43 °C, clocks lowered for 0x4"


def test_clocks_that_cannot_be_read_say_why(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nvidia-smi" in clocks.shown(clocks.read(CUDA))


def events_of(*kernels):
    events = [
        SimpleNamespace(
            name=name,
            device_type=torch.autograd.DeviceType.CUDA,
            time_range=SimpleNamespace(start=start, elapsed_us=lambda time=time: time),
        )
        for start, (name, time) in enumerate(kernels)
    ]
    # Not in the order of their start, and with the CPU's own among them.
    return [SimpleNamespace(device_type=torch.autograd.DeviceType.CPU), *reversed(events)]


@pytest.fixture
def profiled(monkeypatch):
    def use(*kernels):
        class Profile:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

            def events(self):
                return events_of(*kernels)

        monkeypatch.setattr(torch.profiler, "profile", lambda activities: Profile())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(timing, "FLUSH_BYTES", 8)

    return use


def test_kernels_are_those_between_flushes(profiled):
    profiled(*[call for time in (3, 1, 2, 9, 2) for call in (("fill", 100), ("norm", time), ("merge", 2 * time))])
    assert profiler.kernels_of(lambda: None, CPU) == [("norm", 2e-6), ("merge", 4e-6)]


def test_repetitions_with_other_kernels_are_no_profile(profiled):
    profiled(*[("fill", 1), ("norm", 1)] * 4, ("fill", 1), ("other", 1))
    with pytest.raises(RuntimeError, match="that should be alike"):
        profiler.kernels_of(lambda: None, CPU)
    profiled()
    with pytest.raises(RuntimeError, match="saw 0 kernels"):
        profiler.kernels_of(lambda: None, CPU)


def test_tritons_profiler_is_asked_where_it_has_a_benchmark(monkeypatch):
    from triton import testing

    monkeypatch.setattr(testing, "do_bench_proton", lambda call: 2.0, raising=False)
    assert profiler.proton_seconds(lambda: None) == 2e-3
    monkeypatch.delattr(testing, "do_bench_proton")
    assert profiler.proton_seconds(lambda: None) is None


def test_model_flops_are_four_a_weight_and_token_and_attentions():
    """Of a published run: 402 TFLOP/s at 12,473 tokens/s is 32.2 GFLOP a token, by its authors' formula."""
    run = Run("llama-3-8b", 0, 2, 4096, 16)
    a_token = model_flops(run) / 8192
    assert a_token == pytest.approx(402e12 / 12473, rel=0.04)
    weights = 7_504_658_432  # of Llama-3-8B's linears and its head
    assert a_token - 32 * 6 * 4096 * MODELS["llama-3-8b"].hidden_size == 4 * weights
