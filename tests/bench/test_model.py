"""Whole models: what is counted at two depths is exact at every depth, and the gate closes."""

import argparse
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dora_kernels as dk
import dora_kernels.models.apply
from bench import model
from bench.contestants import model as model_field
from bench.contestants.fused_glu import silu_mul
from bench.counting import model_counts
from bench.counting.model_counts import at_depth, count_step
from bench.counting.traffic import counting
from bench.gates import model as model_gate
from bench.measuring.shapes import MODELS, Run
from bench.rows.compare import FUSED_GLU
from bench.rows.session import Session
from tests.support.marks import slow
from tests.support.oracle import relative_error
from tests.tolerances import SAME_FP32, TWIN

BF16, HOPPER = torch.bfloat16, (9, 0)
CPU = torch.device("cpu")

# With many tokens activations are most of the memory, and highest in the last layer's backward; with a high rank and
# few tokens it is the gradients, in the first layer's.
CASES = {
    "ours": ("ours fp32, auto", Run("tiny", 0, 2, 64, 4)),
    "ours, nf4, checkpointed, high rank": ("ours fp32, auto", Run("tiny", 0, 1, 20, 64, True, "nf4")),
    "ours, fp8": ("ours fp32, auto", Run("tiny", 0, 2, 64, 4, True, "fp8")),
    "frozen, nvfp4": ("frozen base", Run("tiny", 0, 2, 64, 4, False, "nvfp4")),
    "PEFT DoRA": ("PEFT DoRA fp32, autocast", Run("tiny", 0, 2, 64, 4)),
    "fused GLU": (FUSED_GLU, Run("tiny", 0, 2, 64, 4)),
}
IN_SUITE = ("ours", "ours, nf4, checkpointed, high rank")


def sums(step):
    """By part: launches, bytes, FLOPs."""
    return {
        part: (len(made), sum(o.memory for o in made), sum(o.flops for o in made)) for part, made in step.parts.items()
    }


@pytest.mark.parametrize(
    ("name", "run"), [case if name in IN_SUITE else slow(*case) for name, case in CASES.items()], ids=CASES
)
def test_two_depths_give_every_depth(name, run, monkeypatch):
    # A loss so large that at few layers it is the highest, and at six layers with a high rank the gradients are.
    monkeypatch.setitem(MODELS, "tiny", MODELS["tiny"]._replace(vocab_size=4096))
    if run.quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    contestant = model_field.contestants(BF16, run.rank)[name]
    two, three, six = (count_step(run, contestant, BF16, HOPPER, layers) for layers in (2, 3, 6))
    for part, exact in sums(six).items():
        found = [at_depth(*pair, 6) for pair in zip(sums(two)[part], sums(three)[part])]
        assert found == list(exact), part
    assert max(at_depth(*pair, 6) for pair in zip(two.peaks, three.peaks)) == max(six.peaks)
    assert at_depth(two.saved, three.saved, 6) == six.saved


@pytest.mark.parametrize("quantize", ["", "nf4"], ids=["dense", "nf4"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_adapters_have_the_dtype_that_the_name_says(device, quantize, monkeypatch):
    if quantize:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        monkeypatch.setattr(bitsandbytes.nn.Params4bit, "__deepcopy__", lambda self, memo: self)
    monkeypatch.setattr(dora_kernels.models.apply, "check_model", lambda model: None)
    base = model_field.build_base(Run("tiny", 1, 1, 8, 4, False, quantize), BF16, torch.device(device))
    for name, contestant in model_field.contestants(BF16, 4).items():
        if device == "cpu" or "patched" not in name:
            adapted = model_field.adapted(base, contestant.adapt, False)
            found = {parameter.dtype for parameter in adapted.parameters() if parameter.requires_grad}
            assert found == (set() if contestant.kind == "base" else {BF16 if "bf16" in name else torch.float32}), name


def test_every_contestant_has_the_bases_products():
    """Ours in the forward: the base's GEMMs, x Aᵀ, and what the kernels multiply."""
    run = Run("tiny", 0, 2, 64, 4)
    field = model_field.contestants(BF16, run.rank)
    base, ours = (count_step(run, field[name], BF16, HOPPER, 2) for name in ("frozen base", "ours fp32, auto"))
    tokens, layers = 2 * 64, 2
    linears = layers * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64) + 128 * 64
    # Per head and row of the batch: two products, halved under the causal mask.
    attention = layers * 2 * 4 * (2 * 2 * 64 * 64 * 16) // 2
    # Older releases of transformers multiply rotary frequencies by positions in a GEMM: eight by 64.
    assert sums(base)["forward"][2] - (2 * tokens * linears + attention) in (0, 2 * 8 * 64)
    assert sums(ours)["forward"][2] > sums(base)["forward"][2]
    names = {operation.name for operation in ours.parts["forward"]}
    assert names & {"merge_scale_kernel", "rescale_fwd_kernel"}


def test_a_fused_glu_is_one_pass_each_way():
    """Two reads and a write forward; backward three reads, and writes over gate and up. silu(gate) is not kept."""
    run = Run("tiny", 0, 2, 64, 4)
    field = model_field.contestants(BF16, run.rank)
    base, fused = (count_step(run, field[name], BF16, HOPPER, 2) for name in ("frozen base", FUSED_GLU))
    wide = 2 * 2 * 64 * 128  # bytes of [tokens, intermediate]
    for part, passes in {"forward": 3, "backward": 5}.items():
        (first, second) = [o for o in fused.parts[part] if o.name.startswith("silu_mul")]
        assert first.memory == second.memory == passes * wide
        assert not any("silu" in o.name for o in fused.parts[part] if "mul" not in o.name)
        assert len(base.parts[part]) - len(fused.parts[part]) == 2 * (1 if part == "forward" else 2)
    assert base.saved - fused.saved == 2 * wide


def test_the_stand_in_of_the_fused_glu_is_right():
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = torch.randn(3, 64, 32, generator=generator, dtype=torch.float64).unbind()
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    expected, found = F.silu(gate) * up, silu_mul(gate * 1, up * 1)
    assert relative_error(found, expected) <= TWIN[torch.float64]
    pairs = zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad))
    assert all(relative_error(*pair) <= TWIN[torch.float64] for pair in pairs)


def test_without_a_fused_glu_the_reason_is_said(monkeypatch):
    assert model_field.left_out(CPU) == {FUSED_GLU: "on cpu no library fuses it"}
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.swiglu", None)
    assert model_field.left_out(torch.device("cuda"))[FUSED_GLU].startswith("ModuleNotFoundError")


def test_a_fused_function_of_the_mlp_is_what_ours_is_unless_asked():
    """The row without blocks launches no pass over gate and up, and saves silu(gate) and the product besides."""
    run = Run("tiny", 0, 2, 64, 4)
    field = model_field.contestants(BF16, run.rank)
    blocks, layers = (
        count_step(run, field[name], BF16, HOPPER, 2) for name in ("ours fp32, auto", "ours fp32, layer by layer")
    )
    assert {"glu_bwd_kernel"} <= {o.name for o in blocks.parts["backward"]} - {o.name for o in layers.parts["backward"]}
    assert layers.saved - blocks.saved >= 2 * 2 * 2 * 2 * 64 * 128  # two tensors of two layers


def test_a_fused_optimizer_reads_four_tensors_and_writes_three():
    with counting() as counter:
        parameter = nn.Parameter(torch.empty(1000))
        optimizer = torch.optim.AdamW([parameter], fused=True)
        parameter.grad = torch.empty(1000)
        optimizer.step()
        counter.take()
        optimizer.step()
        (update,) = [o for o in counter.take() if o.name == "_fused_adamw_"]
    # and the step's number, read and perhaps written
    assert 0 <= update.memory - 7 * 4000 <= 8


def test_four_bit_products_are_counted_as_a_gpu_runs_them():
    pytest.importorskip("bitsandbytes")
    run = Run("tiny", 0, 2, 64, 4, False, "nf4")
    base = model_field.contestants(BF16, 4)["frozen base"]
    packed, plain = (count_step(r, base, BF16, HOPPER, 2) for r in (run, run._replace(quantize="")))
    for part in ("forward", "backward"):
        assert sums(packed)[part][2] == sums(plain)[part][2]
        assert sum(o.name == "dequantize_4bit" for o in packed.parts[part]) == 2 * 7


@pytest.mark.parametrize("form", ["fp8", "int4", "nvfp4"])
def test_a_format_is_held_to_fp64_over_its_decoded_weights(form):
    run = Run("tiny", 0, 1, 16, 4, False, form)
    field = model_field.contestants(torch.float32, 4)
    gate = model_gate.Gate(run, torch.float32, CPU)
    assert gate.broken(gate.errors(field["ours fp32, auto"])) is None
    dense = model_gate.Gate(run._replace(quantize=""), torch.float32, CPU)
    path = "model.layers.0.mlp.down_proj"
    assert 1e-3 < relative_error(*(model_gate.dense(each.base.get_submodule(path)) for each in (gate, dense))) < 0.2
    base = field["frozen base"].adapt(gate.base)
    assert torch.isfinite(base(torch.arange(6)[None]).logits).all()


def wrong_contestants():
    """Each is ours with one thing off."""
    right = model_field.contestants(torch.float32, 4)["ours fp32, auto"]

    def change(do, at=0):
        def adapt(base):
            adapted = right.adapt(base)
            do([m for m in adapted.modules() if isinstance(m, dk.DoraLinear)][at])
            return adapted

        return right._replace(adapt=adapt)

    def scale(layer):
        layer.lora_alpha *= 1.1

    def freeze(layer):
        layer.magnitude.requires_grad_(False)

    def poison(layer):
        layer.register_full_backward_hook(lambda module, into, out: tuple(g if g is None else 1.01 * g for g in into))

    return {"scale": change(scale), "freeze": change(freeze), "poison": change(poison, at=-1)}


def test_a_wrong_model_is_a_row_that_says_so_and_is_not_timed(monkeypatch, tmp_path):
    """One layer of fourteen with another scale, without a gradient, or whose gradient of x is 1 % too large."""
    right = model_field.contestants(torch.float32, 4)
    field = {name: right[name] for name in ("frozen base", "ours fp32, auto")} | wrong_contestants()
    monkeypatch.setattr(model, "field_of", lambda run, dtype, libraries: field)
    arguments = {"device": "cpu", "preset": "tiny", "threads": 1, "repetitions": 1, "commit": None, "again": False}
    session = Session(argparse.Namespace(**arguments, output=tmp_path / "r.jsonl", minutes=None))
    run = Run("tiny", 0, 1, 8, 4)
    base = model_field.build_base(run, torch.float32, CPU)
    rows = model.measure(base, run, session)
    assert all("seconds" in rows[name] and not rows[name]["failed"] for name in ("frozen base", "ours fp32, auto"))
    for name in wrong_contestants():
        assert rows[name]["failed"].startswith("wrong: ") and "seconds" not in rows[name], name
    assert "dm of model.layers.0.self_attn.q_proj inf" in rows["freeze"]["failed"]


def test_a_run_whose_adapter_is_not_fresh_is_wrong(monkeypatch, tmp_path):
    """On two layers it is right, with the values that the gate gives it; in the run itself it must equal the base."""
    right = model_field.contestants(torch.float32, 4)

    def adapt(base):
        adapted = right["ours fp32, auto"].adapt(base)
        next(m for m in adapted.modules() if isinstance(m, dk.DoraLinear)).lora_B.data.fill_(1e-3)
        return adapted

    field = {"frozen base": right["frozen base"], "not fresh": right["ours fp32, auto"]._replace(adapt=adapt)}
    monkeypatch.setattr(model, "field_of", lambda run, dtype, libraries: field)
    arguments = {"device": "cpu", "preset": "tiny", "threads": 1, "repetitions": 1, "commit": None, "again": False}
    session = Session(argparse.Namespace(**arguments, output=tmp_path / "r.jsonl", minutes=None))
    run = Run("tiny", 0, 1, 8, 4)
    row = model.measure(model_field.build_base(run, torch.float32, CPU), run, session)["not fresh"]
    assert row["failed"].startswith("wrong: logits ") and "seconds" not in row
    assert max(row["errors"].values()) < SAME_FP32


def test_sixteen_bits_see_a_magnitude_that_is_left_out():
    """The bar in bf16 is wide for rounding, and not for a layer that forgets g: 10 % of m."""
    run = Run("tiny", 0, 1, 64, 4)
    gate = model_gate.Gate(run, BF16, CPU)
    field = model_field.contestants(BF16, 4)
    right = gate.errors(field["ours fp32, auto"])
    assert gate.broken(right) is None and all(error < 0.03 for error in right.values())
    # Its magnitude stays the norm's.
    gate.values = {
        path: values | {"dm": gate.base.get_submodule(path).weight.float().norm(dim=1)}
        for path, values in gate.values.items()
    }
    assert "wrong" in gate.broken(gate.errors(field["ours fp32, auto"]))


def test_the_gate_takes_the_forms_of_the_run():
    run = Run("tiny", 0, 2, 4096, 4)
    gate = model_gate.Gate(run, torch.float32, CPU)
    adapted = model_field.adapted(gate.base, model_field.contestants(torch.float32, 4)["ours fp32, auto"].adapt, False)
    layer = next(m for m in adapted.modules() if isinstance(m, dk.DoraLinear))
    assert (layer.plan(16).space, layer.plan(2 * 4096).space) == ("token", "weight")
    model_gate.take_the_forms_of(adapted, 2 * 4096)
    assert layer.plan(16).space == "weight"


def test_the_predicted_peak_is_that_of_the_plan():
    """`training.memory_model` has formulas, this counts: two ways to the memory of one step of Llama-3-8B's layers."""
    from training.memory_model import planned_model, predict
    from training.plan import EXAMPLES

    config = EXAMPLES["Llama-3-8B"]
    planned = planned_model(config, dk.DoraConfig(r=16))
    plan = predict(planned, batch_size=1, cutoff_len=2048, loss="whole")
    contestant = model_field.contestants(BF16, 16)["ours fp32, auto"]
    row = model_counts.predict_step(
        Run("llama-3-8b", 0, 1, 2048, 16), contestant, BF16, HOPPER, lambda operation: ("memory", 0.0)
    )
    assert row["peak_bytes"] == pytest.approx(plan.peak - plan.weights, rel=0.05)
