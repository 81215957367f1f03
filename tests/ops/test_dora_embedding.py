"""`dora_embedding` against fp64 with the table W' in full, and against the installed PEFT."""

import pytest
import torch

from dora_kernels.ops.dora_embedding import dora_embedding
from tests.support.embedding import exact, make_embedding, make_problem, peft_model, solve, solve_peft
from tests.support.oracle import errors
from tests.tolerances import IN_PIECES, ORACLE_FP32, ORACLE_FP64, SINGLE_CASE

IMPLS = pytest.mark.parametrize("impl", ["triton", "reference"])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@IMPLS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_fp64(impl, dtype):
    embedding = make_embedding(dtype=dtype)
    problem = make_problem(embedding, adapter_dtype=torch.promote_types(dtype, torch.float32))
    found = errors(solve(embedding, problem, impl=impl, salt=3), exact(embedding, problem))
    assert max(found.values()) <= SINGLE_CASE[dtype], found


@IMPLS
def test_fp32_factors_over_16_bits_are_not_rounded_to_them(impl):
    """As in PEFT, whose products are fp32 there; each factor goes in as two pieces of the table's dtype."""
    embedding = make_embedding(dtype=torch.bfloat16)
    problem = make_problem(embedding, adapter_dtype=torch.float32)
    found = errors(solve(embedding, problem, impl=impl), exact(embedding, problem))
    assert max(found[name] for name in ("dA", "dB", "dm")) <= IN_PIECES, found


SETTINGS = {"plain": {}, "padding": {"padding_idx": -2}, "by_frequency": {"scale_grad_by_freq": True}}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (7,), ()], ids=str)
def test_values_and_gradients_are_pefts(settings, dtype, shape):
    embedding = make_embedding(rows=6, dtype=dtype, **settings)
    problem = make_problem(embedding, shape)
    if shape:
        problem.ids.view(-1)[:3] = torch.tensor([4, 1, 4])  # the padding, and one id twice
    found = errors(solve(embedding, problem), solve_peft(peft_model(embedding, problem), problem))
    assert max(found.values()) <= {torch.float64: ORACLE_FP64, torch.float32: ORACLE_FP32}[dtype], found


def test_the_padding_trains_b_and_m_but_not_a():
    embedding = make_embedding(padding_idx=2)
    problem = make_problem(embedding, (4,))
    problem.ids[:] = 2
    found = solve(embedding, problem)
    assert not found["dA"].any() and found["dB"].any() and found["dm"].any()


def test_the_norm_runs_over_the_whole_vocabulary():
    """A row that is in no batch is part of every output's norm: the rows of a batch are not enough."""
    embedding = make_embedding()
    problem = make_problem(embedding)
    problem.ids %= 5
    before = solve(embedding, problem)["y"]
    with torch.no_grad():
        embedding.weight[-1] *= 10
    assert not torch.allclose(solve(embedding, problem)["y"], before, rtol=0.1)


def test_a_magnitude_of_zero_keeps_its_gradient():
    embedding = make_embedding(dtype=torch.float64)
    problem = make_problem(embedding)
    problem.magnitude[1] = 0
    found = errors(solve(embedding, problem), exact(embedding, problem))
    assert max(found.values()) <= SINGLE_CASE[torch.float64], found


def test_what_is_kept_has_neither_the_batchs_nor_a_tables_size():
    embedding, kept = make_embedding(), []
    problem = make_problem(embedding)
    weight, leaves = embedding.weight.detach(), problem.leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = dora_embedding(problem.ids, weight, *leaves, scaling=2.0)
    own = {tensor.data_ptr() for tensor in (weight, *leaves)}
    sizes = {tensor.numel() for tensor in kept if tensor.data_ptr() not in own}
    assert sizes and not sizes & {y.numel(), weight.numel()}


def test_it_differentiates_once():
    embedding = make_embedding()
    problem = make_problem(embedding)
    leaves = problem.leaves()
    y = dora_embedding(problem.ids, embedding.weight.detach(), *leaves, scaling=2.0)
    with pytest.raises(RuntimeError, match="cannot differentiate twice"):
        torch.autograd.grad(y.sum(), leaves, create_graph=True)


WRONG = {
    "lora_A": ("lora_A", lambda t: t.T, ValueError, r"lora_A must be .*got \[23, 4\]; did you pass lora_A.T"),
    "lora_B": ("lora_B", lambda t: t[:3], ValueError, r"lora_B must be \[12, 4\], got \[3, 4\]"),
    "ids": ("ids", lambda t: t.float(), TypeError, "ids must be whole numbers, got torch.float32"),
}


@pytest.mark.parametrize(("name", "change", "kind", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(name, change, kind, message):
    embedding = make_embedding()
    problem = make_problem(embedding)
    setattr(problem, name, change(getattr(problem, name)))
    with pytest.raises(kind, match=message):
        solve(embedding, problem)
