"""A layer's fused experts: who is wrong is not timed, and products, launches and bytes are counted right."""

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from bench import layer
from bench.__main__ import main
from bench.contestants.experts import STACKS, contestants, counted, make_problem
from bench.contestants.layer import Contestant
from bench.counting.gpus import ROOFS
from bench.experts import count, predict
from bench.gates import experts as gate
from bench.gates.layer import errors
from bench.measuring.shapes import EXPERTS, PRESETS
from dora_kernels.layers.experts import DoraExperts, adapt_experts, fuse_gates, unfuse_gates
from dora_kernels.ops.overhead import experts_overhead
from dora_kernels.ops.problem import Problem
from tests.support.buffers import count_launches
from tests.tolerances import SAME_FP32

SHAPE, TOKENS, RANK = EXPERTS["tiny-moe"], 16, 8
CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture(scope="module")
def predicted():
    return predict(SHAPE, TOKENS, RANK, BF16, ROOFS["h200"])


def flops(row):
    return sum(operation.flops for made in row["operations"].values() for operation in made)


def test_the_base_does_its_products_once_each_way(predicted):
    weights = 3 * SHAPE.hidden * SHAPE.intermediate
    assert flops(predicted["frozen base"]) == 2 * 2 * TOKENS * SHAPE.chosen * weights
    assert flops(predicted["frozen base"]) < flops(predicted["ours fp32"])


def test_peft_makes_a_gradient_of_the_whole_stack_and_we_do_not():
    shape = EXPERTS["qwen3-30b-a3b"]
    stack = 2 * shape.experts * 2 * shape.intermediate * shape.hidden
    peaks = {name: row["peak_bytes"] for name, row in predict(shape, 512, 16, BF16, ROOFS["h200"]).items()}
    assert peaks["PEFT LoRA fp32"] - peaks["frozen base"] > stack
    assert peaks["ours fp32"] - peaks["frozen base"] < stack / 8


def test_the_counted_launches_are_those_that_run(predicted):
    sizes = {"hidden_size": SHAPE.hidden, "moe_intermediate_size": SHAPE.intermediate, "num_experts": SHAPE.experts}
    experts = Qwen3MoeExperts(Qwen3MoeConfig(**sizes)).to(torch.bfloat16).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(std=0.1)
    options = {"r": RANK, "lora_alpha": 2 * RANK, "impl": "triton"}
    adapt_experts(experts, {stack: DoraExperts(experts, stack, **options) for stack in STACKS})
    fuse_gates(experts)
    x = torch.randn(TOKENS, SHAPE.hidden, dtype=torch.bfloat16, requires_grad=True)
    chosen, weights = torch.randint(SHAPE.experts, (TOKENS, SHAPE.chosen)), torch.rand(TOKENS, SHAPE.chosen).bfloat16()
    with count_launches() as run:
        experts.train()(x, chosen, weights).sum().backward()
    made = [o.name for made in predicted["ours fp32"]["operations"].values() for o in made]
    assert sorted(f"_{name}" for name in made if name.endswith("_kernel")) == sorted(run.elements())


@pytest.mark.parametrize("gated", [False, True], ids=["each alone", "gate times up in one pass"])
@pytest.mark.parametrize("space", ["token", "weight"])
def test_dispatch_decides_by_the_bytes_that_are_counted(space, gated):
    """At r = 8 `experts_overhead`, without the rank, is right to the rank's share."""
    shape, tokens = EXPERTS["mixtral-8x7b"], 4096
    field = counted(shape, 8, BF16, space)

    def ours():
        model = field["ours fp32"]()
        if not gated:
            unfuse_gates(model)
        return model

    def base():
        # By our function, too: what transformers' own launches is another matter in each release.
        model = field["frozen base"]()
        adapt_experts(model.experts, {})
        return model

    def moved(build):
        made = count(build, shape, tokens, BF16, ROOFS["h200"])["operations"].values()
        return sum(operation.memory for operations in made for operation in operations)

    sizes = (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    device = torch.device("cuda")
    gate_up, down = (Problem(tokens * shape.chosen, *size, 8, BF16, device) for size in sizes)
    of_gate, of_down = experts_overhead(shape.experts, gated), experts_overhead(shape.experts)
    predicted = 2 * (of_gate(space, gate_up) + of_down(space, down))
    # The base computes its gate, too, as weight space does.
    ungated = moved(base) - 2 * (of_gate("weight", gate_up) - of_down("weight", gate_up))
    assert 1 <= (moved(ours) - ungated) / predicted < 1.03


def test_many_tokens_of_large_experts_are_counted_in_weight_space():
    row = predict(EXPERTS["mixtral-8x7b"], 65536, 16, BF16, ROOFS["h200"])["ours fp32"]
    names = {part: [operation.name for operation in made] for part, made in row["operations"].items()}
    assert not row.get("failed")
    # Of down's stack: gate and up have their product in token space's one pass.
    assert all(made.count("merge_scale_kernel") == 8 == made.count("mm") for made in names.values())


def test_the_prediction_has_a_table_for_each_number_of_tokens(capsys):
    words = ["--tables", "experts", "--mixture", "tiny-moe", "--tokens", "8", "16", "--ranks", "4", "--bytes-alone"]
    assert main(["predict", "--gpu", "h200", *words]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| ours fp32") == 2 and "tokens an expert 4.0" in printed and "FAILED" not in printed


def without_the_norm(problem):
    """Ours with magnitudes that belong to a base of another size."""
    stacks = {name: stack._replace(magnitude=2 * stack.magnitude) for name, stack in problem.stacks.items()}
    return contestants(torch.float32, CPU)["ours fp32, auto"].build(problem._replace(stacks=stacks))


def test_every_contestant_is_correct_and_a_wrong_one_is_not_timed():
    problem = make_problem(SHAPE, TOKENS, 4, torch.float32, CPU)
    field = contestants(torch.float32, CPU) | {"wrong": Contestant("dora", without_the_norm)}
    results = layer.measure(problem, field, 1, gate)
    wrong = results.pop("wrong")
    assert wrong["failed"].startswith("wrong: y ") and "seconds" not in wrong
    assert len(results) == 5
    for name, row in results.items():
        assert row["failed"] is None and row["seconds"]["total"]["median"] > 0, name
        assert max(row["errors"].values()) < SAME_FP32, name
    assert {"dA of down_proj", "dB of gate_up_proj"} <= results["PEFT LoRA fp32"]["errors"].keys()
    assert {"dm of down_proj", "dA of gate_up_proj"} <= results["ours fp32, weight"]["errors"].keys()


def test_sixteen_bits_pass_the_gate_with_room():
    problem = make_problem(SHAPE, TOKENS, 8, BF16, CPU)
    bar = gate.DEEPER * gate.BAR[BF16] * gate.UNIT_ROUNDOFF[BF16]
    exact = {kind: gate.truth(kind, problem) for kind in ("base", "lora", "dora")}
    for name, contestant in contestants(BF16, CPU).items():
        found = errors(contestant, problem, exact[contestant.kind])
        assert all(error < bar / 2 for error in found.values()), (name, found)


def test_a_row_says_how_many_tokens_an_expert_has():
    ((case, shape, tokens, rank),) = PRESETS["tiny"].experts()
    assert (case["model"], shape, tokens, rank, case["tokens an expert"]) == ("tiny-moe", SHAPE, 8, 4, 4.0)
    counts = make_problem(shape, tokens, rank, torch.float32, CPU).chosen.flatten().bincount(minlength=4)
    assert counts.tolist() == [4] * 4
