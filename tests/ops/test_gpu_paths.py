"""What a compiled kernel takes besides Llama's sizes: odd sizes and ranks, layouts, dropout, NF4, fp64, a model."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

import dora_kernels as dk
from dora_kernels.ops import kernels, reference
from dora_kernels.ops.base_weights import Nf4Weight
from dora_kernels.ops.types import Rounding
from tests.support.buffers import LAYOUTS, guard_launches
from tests.support.oracle import Problem, errors, exact, make_problem, relative_error, solve
from tests.support.tiny_models import llama
from tests.tolerances import ORACLE_FP64, SAME_FP32, SINGLE_CASE_FACTOR, TWIN, UNIT_ROUNDOFF

pytestmark = pytest.mark.gpu

SPACES = pytest.mark.parametrize("space", ["token", "weight"])
MIXES = pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)],
    ids=["bf16-fp32", "bf16", "fp32"],
)
SIZES = [
    (1, 1, 1, 1), (3, 1, 5, 2), (1, 513, 70, 24), (77, 1001, 333, 100), (130, 257, 65, 33), (65, 64, 2112, 8),
    (64, 1024, 1024, 1024), (300, 48, 48, 16), (0, 40, 24, 4),
]  # fmt: skip


def _check_against_fp64(problem, **options):
    """Units of roundoff, as a single small case may be unlucky; summation noise on top in fp32."""
    truth = exact(problem)
    bar = max(2 * SINGLE_CASE_FACTOR * UNIT_ROUNDOFF[problem.x.dtype], SAME_FP32)
    for name, error in errors(solve(problem, impl="triton", **options), truth).items():
        assert error <= bar, (name, error)


@SPACES
@MIXES
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_and_ranks(sizes, dtype, adapter_dtype, space):
    """Between guard bands: no kernel reads or writes past the end of a buffer."""
    problem = make_problem(*sizes, dtype, adapter_dtype, bias=sizes[1] % 2 == 1, device="cuda")
    with guard_launches():
        _check_against_fp64(problem, space=space)


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_layouts(x_layout, grad_layout, space):
    problem = make_problem(35, 72, 104, 8, torch.bfloat16, torch.float32, bias=space == "token", device="cuda")
    laid_out = {"x": LAYOUTS[x_layout](problem.x), "grad_y": LAYOUTS[grad_layout](problem.grad_y)}
    contiguous = {name: tensor.contiguous() for name, tensor in laid_out.items()}
    found = solve(Problem(**(vars(problem) | laid_out)), impl="triton", space=space)
    expected = solve(Problem(**(vars(problem) | contiguous)), impl="reference", space=space)
    for name, error in errors(found, expected).items():
        assert error <= TWIN[torch.bfloat16], (name, error)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("mode", ["lora", "peft"])
def test_dropout(mode, dtype, bias):
    problem = make_problem(257, 192, 320, 16, dtype, torch.float32, bias=bias, device="cuda")
    solutions = []
    for impl in ("triton", "reference"):
        torch.manual_seed(7)
        solutions.append(solve(problem, impl=impl, lora_dropout=0.2, dropout_mode=mode, training=True))
    for name, error in errors(*solutions).items():
        assert error <= TWIN[dtype], (name, error)


def _nf4_weight(N, K, nested, parity):
    """Random codes and statistics of the format: no library quantises here."""
    blocks = -(-N * K // 64)
    code = torch.linspace(-1, 1, 16, device="cuda")
    absmax, nested_statistics = torch.rand(blocks, device="cuda") + 0.5, (None, None, None)
    if nested:
        absmax = torch.randint(256, (blocks,), dtype=torch.uint8, device="cuda")
        nested_statistics = (
            torch.rand(-(-blocks // 256), device="cuda"), torch.rand(256, device="cuda"), torch.tensor(0.4).cuda(),
        )  # fmt: skip
    packed = torch.randint(256, (-(-N * K // 2),), dtype=torch.uint8, device="cuda")
    shape = torch.Size((N, K))
    return Nf4Weight(packed, absmax, code, *nested_statistics, shape, torch.bfloat16, 64, 256 if nested else 0, parity)


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("parity", [False, True], ids=["fp32", "parity"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (1001, 333), (40, 64)], ids=str)
def test_nf4(shape, nested, parity, rank):
    N, K = shape
    weight = _nf4_weight(N, K, nested, parity)
    p = make_problem(1, N, K, rank, torch.bfloat16, torch.float32, device="cuda")
    factors = (weight, p.lora_A, p.lora_B, p.magnitude)
    decoded = (kernels.decode(weight, torch.bfloat16), reference.decode(weight, torch.bfloat16))
    options = {"dtype": torch.bfloat16, "rounding": Rounding("dithered", 5)}
    merged = (kernels.merge(*factors, 2.0, **options), reference.merge(*factors, 2.0, **options))
    norms = (kernels.weight_norm(*factors, 2.0), reference.weight_norm(*factors, 2.0))
    for found, expected in [decoded, *zip(*map(tree_leaves, merged)), *zip(*map(tree_leaves, norms))]:
        assert found is expected is None or relative_error(found, expected) <= TWIN[found.dtype]


@SPACES
def test_gradients_in_fp64(space):
    p = make_problem(5, 6, 7, 3, torch.float64, device="cuda")
    norm = (p.weight + p.scaling * p.lora_B @ p.lora_A).norm(dim=1)

    def layer(x, lora_A, lora_B, magnitude):
        return dk.dora_linear(x, p.weight, lora_A, lora_B, magnitude, scaling=p.scaling, space=space, impl="triton")

    leaves = p.leaves()
    expected = torch.autograd.grad(
        leaves[0] @ ((leaves[3] / norm)[:, None] * (p.weight + p.scaling * leaves[2] @ leaves[1])).T, leaves, p.grad_y
    )
    found = torch.autograd.grad(layer(*leaves), leaves, p.grad_y)
    for ours, truth in zip(found, expected):
        assert relative_error(ours, truth) <= ORACLE_FP64


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_a_model_learns_what_the_reference_learns(autocast):
    """Five steps of a small Llama, kernels against PyTorch operations: same losses, and a frozen adapter's output."""
    losses, outputs = [], []
    for impl in ("triton", "reference"):
        torch.manual_seed(0)
        model = llama(torch.float32 if autocast else torch.bfloat16).cuda()
        model = dk.apply_dora(model, dk.DoraConfig(r=8, target_modules="all-linear", impl=impl))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        ids = torch.randint(61, (4, 33), generator=torch.Generator("cuda").manual_seed(1), device="cuda")
        for _ in range(5):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad(), dk.frozen_adapters(model):
            outputs.append(model(input_ids=ids).logits)
    ours, theirs = losses[:5], losses[5:]
    assert all(abs(a - b) <= 0.02 * b for a, b in zip(ours, theirs)), losses
    assert ours[-1] < ours[0]
    assert relative_error(*outputs) < 0.05
