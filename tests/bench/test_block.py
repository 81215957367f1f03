"""A block alone: who is wrong is not timed, and what is saved is what is counted."""

import pytest
import torch

from bench import block
from bench.contestants import block as field
from bench.contestants.layer import Contestant
from bench.counting import layer_counts
from bench.gates import block as gate
from bench.gates.layer import errors
from bench.measuring.shapes import mlp_shape, qkv_shape
from bench.rows.compare import FUSED_GLU
from tests.tolerances import SAME_FP32

CPU, BF16, HOPPER = torch.device("cpu"), torch.bfloat16, (9, 0)
MLP, QKV, TOKENS, RANK = mlp_shape(64, 192), qkv_shape(64, 32, True), 160, 4
SWAPPED = {"mlp": ("gate_proj", "up_proj"), "qkv": ("k_proj", "v_proj")}
every_block = pytest.mark.parametrize("shape", [MLP, QKV], ids=lambda shape: shape.name)


def problem_of(shape, dtype):
    return field.make_problem(shape, TOKENS, RANK, dtype, CPU)


def swapped(right, *names):
    """A contestant with two layers exchanged."""

    def build(problem):
        layers = dict(zip(names, (problem.layers[name] for name in reversed(names))))
        return right.build(problem._replace(layers=problem.layers | layers))

    return Contestant(right.kind, build)


@every_block
def test_every_contestant_is_correct_and_a_wrong_one_is_not_timed(shape):
    contestants = field.contestants(shape.name, torch.float32, CPU)
    if shape is MLP:
        contestants["fused GLU"] = field.counted("mlp", torch.float32)[FUSED_GLU]
    wrong = swapped(contestants["ours fp32, auto"], *SWAPPED[shape.name])
    results = block.measure(problem_of(shape, torch.float32), contestants | {"swapped": wrong}, 1)
    wrong = results.pop("swapped")
    assert wrong["failed"].startswith("wrong: y ") and not {"seconds", "saved_bytes"} & wrong.keys()
    for name, row in results.items():
        assert row["failed"] is None and row["seconds"]["total"]["median"] > 0, name
        assert (row["saved_bytes"] == 0) == (shape is QKV and name == "frozen base"), name
        assert max(row["errors"].values()) < SAME_FP32, name
    names = {f"{factor} of {layer.name}" for factor in ("dA", "dB", "dm") for layer in shape.layers}
    assert names | {"dx", "y"} == results["ours fp32, layer by layer"]["errors"].keys()


@every_block
def test_sixteen_bits_pass_the_gate_with_room(shape):
    problem = problem_of(shape, BF16)
    bar = gate.DEEPER * gate.BAR[BF16] * gate.UNIT_ROUNDOFF[BF16]
    exact = {kind: gate.truth(kind, problem) for kind in ("base", "lora", "dora")}
    for name, contestant in field.contestants(shape.name, BF16, CPU).items():
        found = errors(contestant, problem, exact[contestant.kind])
        assert all(error < bar / 2 for error in found.values()), (name, found)


SAVED = {
    # silu's input and output beside up; both products and the output of down; and with each layer alone the products,
    # silu(gate), a and down's output.
    ("mlp", "frozen base"): 3 * 192, ("mlp", FUSED_GLU): 2 * 192, ("mlp", "ours fp32, weight"): 2 * 192 + 64,
    ("mlp", "ours fp32, token"): 2 * 192 + 64, ("mlp", "ours fp32, layer by layer"): 4 * 192 + 64,
    # The outputs, without their biases.
    ("qkv", "frozen base"): 0, ("qkv", "ours fp32, weight"): 128, ("qkv", "ours fp32, token"): 128,
    ("qkv", "ours fp32, layer by layer"): 128,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), SAVED)
def test_what_is_saved(kind, name):
    """As counted, and as it is, for each token, beyond tensors of the rank's size and a feature's."""
    shape = {"mlp": MLP, "qkv": QKV}[kind]
    counted = field.counted(kind, BF16)
    real = counted | field.contestants(kind, BF16, CPU)
    of_gpu, of_cpu = (counted.get(name) or counted[f"{name}, triton"]), (real.get(name) or real[f"{name}, reference"])
    by_count = layer_counts.saved_by(of_gpu, shape, TOKENS, RANK, BF16, HOPPER)
    least, hidden = (2 * TOKENS * size for size in (SAVED[kind, name], 64))
    for saved in (by_count, block.saved_by(of_cpu, problem_of(shape, BF16))):
        assert least <= saved < least + hidden


@every_block
def test_a_block_takes_fewer_launches_than_its_layers(shape):
    ours = field.counted(shape.name, BF16)

    def launches(name):
        parts, _ = layer_counts.count(ours[name], shape, TOKENS, RANK, BF16, HOPPER)
        return sum(map(len, parts.values()))

    assert launches("ours fp32, auto") < launches("ours fp32, layer by layer")


def test_a_block_that_is_none_is_no_row_of_ours(monkeypatch):
    monkeypatch.setattr(field, "fuse_blocks", lambda model: {field.PATHS["mlp"]: "it is another"})
    with pytest.raises(RuntimeError, match="no block: it is another"):
        field.contestants("mlp", torch.float32, CPU)["ours fp32, auto"].build(problem_of(MLP, torch.float32))


def test_without_a_fused_glu_the_reason_is_said():
    assert FUSED_GLU not in field.contestants("mlp", BF16, CPU)
    assert field.left_out(CPU) == [f"{FUSED_GLU}: left out; on cpu no library fuses it"]
