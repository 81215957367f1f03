"""The prediction of a layer's fused experts: its products, launches and bytes are counted right."""

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from bench.__main__ import main
from bench.contestants.experts import STACKS, contestants
from bench.counting.gpus import ROOFS
from bench.experts import count, predict
from bench.measuring.shapes import EXPERTS
from dora_kernels.layers.experts import DoraExperts, adapt_experts
from dora_kernels.ops.overhead import experts_overhead
from dora_kernels.ops.problem import Problem
from tests.support.buffers import count_launches

SHAPE, TOKENS, RANK = EXPERTS["tiny"], 16, 8


@pytest.fixture(scope="module")
def predicted():
    return predict(SHAPE, TOKENS, RANK, ROOFS["h200"])


def flops(row):
    return sum(operation.flops for made in row["operations"].values() for operation in made)


def test_the_base_does_its_products_once_each_way(predicted):
    weights = 3 * SHAPE.hidden * SHAPE.intermediate
    assert flops(predicted["frozen base"]) == 2 * 2 * TOKENS * SHAPE.chosen * weights
    assert flops(predicted["frozen base"]) < flops(predicted["ours fp32"])


def test_peft_makes_a_gradient_of_the_whole_stack_and_we_do_not():
    shape = EXPERTS["qwen3-30b-a3b"]
    stack = 2 * shape.experts * 2 * shape.intermediate * shape.hidden
    peaks = {name: row["peak_bytes"] for name, row in predict(shape, 512, 16, ROOFS["h200"]).items()}
    assert peaks["PEFT LoRA fp32"] - peaks["frozen base"] > stack
    assert peaks["ours fp32"] - peaks["frozen base"] < stack / 8


def test_the_counted_launches_are_those_that_run(predicted):
    sizes = {"hidden_size": SHAPE.hidden, "moe_intermediate_size": SHAPE.intermediate, "num_experts": SHAPE.experts}
    experts = Qwen3MoeExperts(Qwen3MoeConfig(**sizes)).to(torch.bfloat16).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(std=0.1)
    options = {"r": RANK, "lora_alpha": 2 * RANK, "impl": "triton"}
    adapt_experts(experts, {stack: DoraExperts(experts, stack, **options) for stack in STACKS})
    x = torch.randn(TOKENS, SHAPE.hidden, dtype=torch.bfloat16, requires_grad=True)
    chosen, weights = torch.randint(SHAPE.experts, (TOKENS, SHAPE.chosen)), torch.rand(TOKENS, SHAPE.chosen).bfloat16()
    with count_launches() as run:
        experts.train()(x, chosen, weights).sum().backward()
    made = [o.name for made in predicted["ours fp32"]["operations"].values() for o in made]
    assert sorted(f"_{name}" for name in made if name.endswith("_kernel")) == sorted(run.elements())


@pytest.mark.parametrize("space", ["token", "weight"])
def test_dispatch_decides_by_the_bytes_that_are_counted(space):
    """At r = 8 `experts_overhead`, without the rank, is right to the rank's share."""
    shape, tokens = EXPERTS["mixtral-8x7b"], 4096
    field = contestants(shape, 8, torch.bfloat16)

    def build():
        model = field["ours fp32"]()
        for adapter in model.experts.dora.values():
            adapter.space = space
        return model

    def moved(build):
        made = count(build, shape, tokens, ROOFS["h200"])["operations"].values()
        return sum(operation.memory for operations in made for operation in operations)

    sizes = (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    device = torch.device("cuda")
    problems = [Problem(tokens * shape.chosen, *size, 8, torch.bfloat16, device) for size in sizes]
    predicted = sum(experts_overhead(shape.experts)(space, problem) for problem in problems)
    assert 1 <= (moved(build) - moved(field["frozen base"])) / (2 * predicted) < 1.03


def test_many_tokens_of_large_experts_are_counted_in_weight_space():
    row = predict(EXPERTS["mixtral-8x7b"], 65536, 16, ROOFS["h200"])["ours fp32"]
    names = {part: [operation.name for operation in made] for part, made in row["operations"].items()}
    assert not row.get("failed")
    assert all(made.count("merge_scale_kernel") == 2 * 8 == made.count("mm") for made in names.values())


def test_the_command_prints_a_table_for_each_number_of_tokens(capsys):
    assert main(["experts", "--gpu", "h200", "--model", "tiny", "--tokens", "8", "16", "--ranks", "8"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| ours fp32") == 2 and "tokens an expert 4.0" in printed and "FAILED" not in printed
