"""Axolotl's and Unsloth's LoRA: PEFT's layers reach their functions, and what a library leaves to PEFT is no row."""

import argparse
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from bench import block, model
from bench.contestants import block as field
from bench.contestants import fused_lora
from bench.contestants import model as model_field
from bench.gates.model import Gate
from bench.measuring.shapes import Run, mlp_shape, qkv_shape
from bench.rows.session import Session
from tests.tolerances import SAME_FP32

CPU, TOKENS, RANK = torch.device("cpu"), 24, 4
MLP, QKV, BIASED = mlp_shape(64, 96), qkv_shape(64, 32, False), qkv_shape(64, 32, True)
RUN = Run("tiny", 0, 1, 16, RANK)
every_library = pytest.mark.parametrize("library", fused_lora.MODULES)


class _OverX(torch.autograd.Function):
    """x; where asked, its gradient is written over it, as Unsloth does."""

    @staticmethod
    def forward(ctx, x, inplace):
        ctx.x = x.detach() if inplace else None
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.x is not None:
            ctx.x.copy_(grad)
        return grad, None


def functions(biased):
    """The libraries' functions in PyTorch, of x [batch, sequence, K], and how often each was called."""
    calls = {}

    def linear(layer, x):
        A, B = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
        weight = layer.base_layer.weight + (layer.scaling["default"] * B @ A).to(x.dtype)
        return F.linear(x, weight, layer.base_layer.bias if biased else None)

    def begin(name, x, inplace):
        assert x.ndim == 3
        calls[name] = calls.get(name, 0) + 1
        return _OverX.apply(x, inplace)

    def apply_lora_mlp_swiglu(self, X, inplace=True):
        x = begin("mlp", X, inplace)
        return linear(self.down_proj, F.silu(linear(self.gate_proj, x)) * linear(self.up_proj, x))

    def apply_lora_qkv(self, X, inplace=True):
        x = begin("qkv", X, inplace)
        return linear(self.q_proj, x), linear(self.k_proj, x), linear(self.v_proj, x)

    def apply_lora_o(self, X):
        return linear(self.o_proj, begin("o", X, False))

    return [apply_lora_mlp_swiglu, apply_lora_qkv, apply_lora_o], calls


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for both modules, by library. Like Unsloth's, its functions know no bias of the layer."""
    found = {}
    for library, path in fused_lora.MODULES.items():
        root = path.partition(".")[0]
        for name in (root, f"{root}.kernels"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        module = found[library] = types.ModuleType(path)
        made, module.calls = functions(biased=library == "Axolotl")
        for function in made:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, path, module)
    return found


def measured(shape, library):
    """The library's rows of a block, beside PEFT's, which is last and has the same input."""
    problem = field.make_problem(shape, TOKENS, RANK, torch.float32, CPU)
    x = problem.x.detach().clone()
    rows = field.contestants(shape.name, torch.float32, CPU, libraries=[library])
    rows = {name: rows[name] for name in (f"{library} LoRA fp32", "PEFT LoRA fp32")}
    results = block.measure(problem, rows, 1)
    assert torch.equal(problem.x, x)
    assert results["PEFT LoRA fp32"]["failed"] is None
    return results[f"{library} LoRA fp32"]


@every_library
@pytest.mark.parametrize("shape", [MLP, QKV], ids=lambda shape: shape.name)
def test_a_block_is_one_call_and_correct(shape, library, libraries):
    row = measured(shape, library)
    assert row["failed"] is None and row["seconds"]["total"]["median"] > 0
    assert max(row["errors"].values()) < SAME_FP32
    assert row["errors"].keys() == {"y", "dx"} | {
        f"{factor} of {layer.name}" for factor in ("dA", "dB") for layer in shape.layers
    }
    # The gate, three for warmth, one timed, one for memory, one for what is saved.
    assert libraries[library].calls == {shape.name: 7}


def test_axolotl_has_biases_and_unsloth_leaves_them_to_peft(libraries):
    assert measured(BIASED, "Axolotl")["failed"] is None
    failed = measured(BIASED, "Unsloth")["failed"]
    assert "Unsloth leaves layers with a bias to PEFT: q_proj, k_proj, v_proj" in failed
    assert not libraries["Unsloth"].calls


@every_library
def test_what_a_library_leaves_to_peft_is_not_timed(library, libraries, monkeypatch):
    def apply_lora_qkv(self, X, inplace=True):
        return self.q_proj(X), self.k_proj(X), self.v_proj(X)

    monkeypatch.setattr(libraries[library], "apply_lora_qkv", apply_lora_qkv)
    row = measured(QKV, library)
    assert f"{library} left q_proj to PEFT" in row["failed"] and "seconds" not in row


def exchanged(apply_lora_qkv):
    """The function with k's and v's outputs for each other."""

    def apply(self, X, **options):
        q, k, v = apply_lora_qkv(self, X, **options)
        return q, v, k

    return apply


@every_library
def test_a_wrong_function_is_not_timed(library, libraries, monkeypatch):
    module = libraries[library]
    monkeypatch.setattr(module, "apply_lora_qkv", exchanged(module.apply_lora_qkv))
    row = measured(QKV, library)
    assert row["failed"].startswith("wrong: y ") and "seconds" not in row
    gate = Gate(RUN, torch.float32, CPU)
    field = model_field.field_of(RUN, torch.float32, libraries=[library])
    assert "of model.layers" in gate.broken(gate.errors(field[f"{library} LoRA fp32"]))


@every_library
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_a_model_has_three_calls_a_layer_and_is_correct(checkpointing, library, libraries):
    run = RUN._replace(checkpointing=checkpointing)
    gate, contestants = Gate(run, torch.float32, CPU), model_field.field_of(run, torch.float32, libraries=[library])
    errors = gate.errors(contestants[f"{library} LoRA fp32"])
    assert gate.broken(errors) is None and len(errors) == 1 + 2 * 2 * 7
    assert libraries[library].calls == dict.fromkeys(("qkv", "o", "mlp"), 2 * (1 + checkpointing))


def test_a_step_of_both_is_timed(libraries, monkeypatch, tmp_path, capsys):
    names = ("frozen base", "Axolotl LoRA fp32", "Unsloth LoRA fp32")
    every = model.field_of
    monkeypatch.setattr(
        model, "field_of", lambda *args, **options: {n: c for n, c in every(*args, **options).items() if n in names}
    )
    arguments = {"device": "cpu", "preset": "tiny", "threads": 1, "repetitions": 1, "commit": None, "again": False}
    session = Session(argparse.Namespace(**arguments, output=tmp_path / "r.jsonl", minutes=None))
    assert "unsloth" in session.records.stamp
    rows = model.measure(model_field.build_base(RUN, torch.float32, CPU), RUN, session)
    assert tuple(rows) == names
    assert all(row["failed"] is None and row["seconds"]["total"]["median"] > 0 for row in rows.values())
    assert "  Unsloth LoRA: its import patches" in capsys.readouterr().out


@every_library
def test_adapters_have_the_dtype_of_the_name(library, libraries):
    base = model_field.build_base(RUN._replace(layers=1), torch.bfloat16, CPU)
    found = model_field.field_of(RUN, torch.bfloat16, libraries=[library])
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        adapted = model_field.adapted(base, found[f"{library} LoRA {name}"].adapt, False)
        assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {dtype}
        assert f"{library} LoRA {name}" in field.contestants("mlp", torch.bfloat16, CPU, libraries=[library])


def test_what_is_missing_is_said(libraries, monkeypatch):
    assert fused_lora.installed() == ["Axolotl", "Unsloth"]
    (remark,) = fused_lora.remarks()
    assert remark.startswith("Unsloth LoRA: its import patches")
    monkeypatch.delattr(libraries["Axolotl"], "apply_lora_o")
    monkeypatch.setitem(sys.modules, "unsloth.kernels.fast_lora", None)
    assert fused_lora.installed() == []
    first, second = fused_lora.remarks()
    assert first.startswith("Axolotl LoRA: left out; AttributeError")
    assert second.startswith("Unsloth LoRA: left out; ModuleNotFoundError")
