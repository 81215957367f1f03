"""The contestants of `layer`: who is wrong or breaks is not timed, and who is right has room."""

import sys
import types

import pytest
import torch

from bench import layer
from bench.contestants import layer as contestants
from bench.contestants import model as model_field
from bench.counting import layer_counts
from bench.gates import layer as gate
from bench.measuring.shapes import layer_shapes

DEVICE = torch.device("cpu")


def test_a_contestant_that_is_wrong_or_breaks_is_not_timed(monkeypatch):
    """A gate that cannot close is no gate: a scaled output, a missing gradient and a raised error each keep out."""
    problem = contestants.make_problem(layer_shapes("tiny")[0], 8, 4, torch.float32, DEVICE)
    right = contestants.contestants(torch.float32, DEVICE)["ours fp32, token, reference"]

    def scaled(problem):
        entry = right.build(problem)
        entry.module.lora_alpha *= 1.1
        return entry

    def incomplete(problem):
        entry = right.build(problem)
        return entry._replace(trained={name: p for name, p in entry.trained.items() if name != "dm"})

    def full(problem):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")

    field = {"right": right}
    field |= {build.__name__: right._replace(build=build) for build in (scaled, incomplete, full)}
    results = layer.measure(problem, field, repetitions=1)
    assert results["right"]["failed"] is None and results["right"]["seconds"]
    assert "wrong: y" in results["scaled"]["failed"]
    assert results["incomplete"]["failed"].startswith("wrong: dm inf")
    assert results["full"]["failed"] == "out of memory"
    assert not any("seconds" in results[name] for name in ("scaled", "incomplete", "full"))


@pytest.fixture
def axolotl(monkeypatch):
    """A stand-in for Axolotl's module: `apply_lora_o(self, X)` for a PEFT layer `self.o_proj` and X [batch, rows, K].

    Like Axolotl's it keeps the norm on the magnitude; `module.fresh` counts how often it was computed.
    """
    module = types.ModuleType("axolotl.kernels.lora")
    module.fresh = 0

    def apply_lora_o(self, X):
        assert X.ndim == 3
        layer = self.o_proj
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        magnitude, weight = layer.lora_magnitude_vector["default"].weight, layer.base_layer.weight
        adapted = weight + layer.scaling["default"] * (B @ A).to(weight.dtype)
        if not hasattr(magnitude, "_dora_cache"):
            module.fresh += 1
            magnitude._dora_cache = adapted.norm(dim=1).detach()
        scale = magnitude / magnitude._dora_cache
        return torch.nn.functional.linear(X, (scale[:, None] * adapted).to(X.dtype))

    module.apply_lora_o = apply_lora_o
    for name in ("axolotl", "axolotl.kernels"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_axolotl_is_a_row_where_it_is_installed(axolotl):
    problem = contestants.make_problem(layer_shapes("tiny")[0], 8, 4, torch.float32, DEVICE)
    field = contestants.contestants(torch.float32, DEVICE)
    results = layer.measure(problem, {name: c for name, c in field.items() if "Axolotl" in name}, repetitions=2)
    assert list(results) == ["Axolotl DoRA fp32"]
    assert results["Axolotl DoRA fp32"]["failed"] is None and results["Axolotl DoRA fp32"]["seconds"]
    # The gate, three for warmth, two timed, one for memory: each with a norm of its own.
    assert axolotl.fresh == 7
    assert {"Axolotl DoRA fp32", "Axolotl DoRA bf16"} < set(contestants.contestants(torch.bfloat16, DEVICE))
    assert not any("axolotl" in line for line in contestants.left_out())


def test_without_axolotl_the_reason_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "axolotl", None)
    assert any(line.startswith("axolotl: left out; ModuleNotFoundError") for line in contestants.left_out())
    assert not any("Axolotl" in name for name in contestants.contestants(torch.bfloat16, DEVICE))


@pytest.mark.parametrize("dtype", contestants.DTYPES)
def test_names_say_the_dtype_in_use(dtype, axolotl):
    other = {"bf16", "fp16", "fp32"} - {dtype, "fp32"}
    both = {"fp32", dtype}
    for device, impl in ((DEVICE, "reference"), (torch.device("cuda"), "triton")):
        names = contestants.contestants(contestants.DTYPES[dtype], device)
        assert not any(one in name for name in names for one in other)
        for kind in ("PEFT LoRA", "PEFT DoRA", "Axolotl DoRA"):
            assert {f"{kind} {one}" for one in both} <= set(names)
        assert (f"ours {dtype}, auto, {impl}" in names) == (dtype != "fp32")
    whole = model_field.contestants(contestants.DTYPES[dtype], 4)
    assert not any(one in name for name in whole for one in other)
    assert {f"PEFT {kind} {dtype}" for kind in ("LoRA", "DoRA")} <= set(whole)


@pytest.mark.parametrize("tokens", [1, 8192])
def test_what_is_chosen_unasked_is_a_contestant(tokens):
    """One row beside those of each space, which takes the space that `dispatch` chooses for the shape."""
    shape = layer_shapes("llama-3-8b")[2]
    field = contestants.contestants(torch.bfloat16, torch.device("cuda"))
    launched = {}
    for form in ("auto", "token, triton", "weight, triton"):
        parts, _ = layer_counts.count(field[f"ours fp32, {form}"], shape, tokens, 16, torch.bfloat16, (9, 0))
        launched[form] = [o.name for operations in parts.values() for o in operations]
    assert launched["token, triton"] != launched["weight, triton"]
    assert launched["auto"] == launched["token, triton" if tokens == 1 else "weight, triton"]


def test_sixteen_bits_pass_the_gate_with_room():
    """The bar is for wrong contestants: the right ones, PEFT's too, stay well below."""
    problem = contestants.make_problem(layer_shapes("tiny")[2], 40, 4, torch.bfloat16, DEVICE)
    field = contestants.contestants(torch.bfloat16, DEVICE)
    exact = {kind: gate.truth(kind, problem) for kind in ("base", "lora", "dora")}
    bar = gate.BAR[torch.bfloat16] * gate.UNIT_ROUNDOFF[torch.bfloat16]
    for name, contestant in field.items():
        errors = gate.errors(contestant, problem, exact[contestant.kind])
        assert all(error < bar / 2 for error in errors.values()), (name, errors)


def test_a_failure_while_timing_is_a_row_too(monkeypatch):
    problem = contestants.make_problem(layer_shapes("tiny")[0], 8, 4, torch.float32, DEVICE)
    field = contestants.contestants(torch.float32, DEVICE)
    phases, calls = contestants.Entry.phases, []

    def breaks(self, problem):
        run = phases(self, problem)
        if "dm" not in self.trained:
            return run

        def broken():
            calls.append(1)
            if len(calls) > 9:
                raise torch.OutOfMemoryError("later")
            yield from run()

        return broken

    monkeypatch.setattr(contestants.Entry, "phases", breaks)
    results = layer.measure(problem, field, repetitions=3)
    assert results["PEFT DoRA fp32"]["failed"] == "out of memory"
    assert results["PEFT LoRA fp32"]["seconds"]["total"]["repetitions"] == 3
    # Each of those that broke did so once, and was left out from then on.
    assert len(calls) == 9 + sum(row["failed"] is not None for row in results.values())
