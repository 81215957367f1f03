"""A gated MLP alone: who is wrong is not timed, and what is saved is what is counted."""

import pytest
import torch

from bench import block
from bench.contestants import block as field
from bench.contestants.layer import Contestant
from bench.counting import layer_counts
from bench.gates import block as gate
from bench.gates.layer import errors
from bench.measuring.shapes import mlp_shape
from bench.rows.compare import FUSED_GLU
from tests.tolerances import SAME_FP32

CPU, BF16, HOPPER = torch.device("cpu"), torch.bfloat16, (9, 0)
SHAPE, TOKENS, RANK = mlp_shape(64, 192), 160, 4


def problem_of(dtype):
    return field.make_problem(SHAPE, TOKENS, RANK, dtype, CPU)


def swapped(name):
    """A contestant whose gate and up are exchanged."""
    right = field.contestants(torch.float32, CPU)[name]

    def build(problem):
        gate_proj, up_proj = problem.layers["gate_proj"], problem.layers["up_proj"]
        return right.build(problem._replace(layers=problem.layers | {"gate_proj": up_proj, "up_proj": gate_proj}))

    return Contestant(right.kind, build)


def test_every_contestant_is_correct_and_a_wrong_one_is_not_timed():
    contestants = field.contestants(torch.float32, CPU) | {"fused GLU": field.counted(torch.float32)[FUSED_GLU]}
    results = block.measure(problem_of(torch.float32), contestants | {"swapped": swapped("ours fp32, auto")}, 1)
    wrong = results.pop("swapped")
    assert wrong["failed"].startswith("wrong: y ") and not {"seconds", "saved_bytes"} & wrong.keys()
    for name, row in results.items():
        assert row["failed"] is None and row["saved_bytes"] > 0 and row["seconds"]["total"]["median"] > 0, name
        assert max(row["errors"].values()) < SAME_FP32, name
    assert {"dx", "y", "dm of up_proj", "dA of down_proj"} <= results["ours fp32, layer by layer"]["errors"].keys()


def test_sixteen_bits_pass_the_gate_with_room():
    problem = problem_of(BF16)
    bar = gate.DEEPER * gate.BAR[BF16] * gate.UNIT_ROUNDOFF[BF16]
    exact = {kind: gate.truth(kind, problem) for kind in ("base", "lora", "dora")}
    for name, contestant in field.contestants(BF16, CPU).items():
        found = errors(contestant, problem, exact[contestant.kind])
        assert all(error < bar / 2 for error in found.values()), (name, found)


# Of [tokens, intermediate] and of [tokens, hidden] in bf16: silu's input and output beside up; both products and the
# output of down; and with each layer alone the products, silu(gate), a and down's output.
SAVED = {
    "frozen base": (3, 0), FUSED_GLU: (2, 0), "ours fp32, weight": (2, 1), "ours fp32, token": (2, 1),
    "ours fp32, layer by layer": (4, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved(name):
    """As counted, and as it is, beyond tensors of the rank's size and a feature's."""
    counted = field.counted(BF16)
    real = counted | field.contestants(BF16, CPU)
    of_gpu, of_cpu = (counted.get(name) or counted[f"{name}, triton"]), (real.get(name) or real[f"{name}, reference"])
    found = layer_counts.saved_by(of_gpu, SHAPE, TOKENS, RANK, BF16, HOPPER), block.saved_by(of_cpu, problem_of(BF16))
    wide, hidden = (2 * TOKENS * size for size in (192, 64))
    least = SAVED[name][0] * wide + SAVED[name][1] * hidden
    assert all(least <= saved < least + hidden for saved in found), (found, least)


def test_a_block_that_is_none_is_no_row_of_ours(monkeypatch):
    monkeypatch.setattr(field, "fuse_blocks", lambda model: {field.MLP: "it is another"})
    with pytest.raises(RuntimeError, match="no block: it is another"):
        field.contestants(torch.float32, CPU)["ours fp32, auto"].build(problem_of(torch.float32))


def test_without_a_fused_glu_the_reason_is_said():
    assert FUSED_GLU not in field.contestants(BF16, CPU)
    assert field.left_out(CPU) == [f"{FUSED_GLU}: left out; on cpu no library fuses it"]
