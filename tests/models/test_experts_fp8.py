"""FP8 experts: gradients are those of materialised decoded weights, and nothing of a stack's size is made."""

import warnings

import pytest
import torch
from torch.func import functional_call

import dora_kernels as dk
from dora_kernels.layers.experts import adapted_experts
from dora_kernels.ops import chunked, dispatch
from dora_kernels.ops.stacks import stack_norm
from tests.models.test_experts import FACTORS, config
from tests.support.allocations import Allocations, without_the_interpreters
from tests.support.fp8_experts import decoded, fp8_experts, plain_twin
from tests.support.oracle import relative_error
from tests.support.tiny_experts import BATCH, losses
from tests.support.tiny_models import checkpoint_activations
from tests.tolerances import ORACLE_FP32, ORACLE_FP64, ORACLE_FP64_MODEL, SAME_FP32

STACK = "model.layers.1.mlp.experts.down_proj"
FORMATS = {
    "blocks": {},
    "cut blocks": {"block": (7, 5)},
    "powers of two": {"scale_fmt": "ue8m0"},
    "one scale": {"block": None},
}


def adapted(dtype=torch.float64, base=None, **options):
    """With adapters that differ from the start."""
    torch.manual_seed(0)
    model = dk.apply_dora(fp8_experts(dtype=dtype, **base or {}), config(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in adapted_experts(model).values():
            adapter.lora_B.copy_(0.1 * torch.randn(adapter.lora_B.shape, generator=generator, dtype=torch.float64))
            adapter.magnitude.mul_(1 + 0.1 * torch.randn(adapter.magnitude.shape, generator=generator))
    return model


def truth(model, **inputs):
    """Loss and gradients with W' = m / ‖V‖ ⊙ V of each expert in fp64, V = W + s B A over the decoded W."""
    twin, factors, merged = plain_twin(model).train(), {}, {}
    for name, adapter in adapted_experts(model).items():
        A, B, m = factors[name] = [getattr(adapter, f).detach().double().requires_grad_() for f in FACTORS]
        path, _, stack = name.rpartition(".")
        V = decoded(model.get_submodule(path), stack) + 2.0 * B @ A
        merged[name] = (m / V.detach().norm(dim=2)).unsqueeze(-1) * V
    loss = losses(None, lambda **inputs: functional_call(twin, merged, kwargs=inputs))
    loss.backward()
    return loss.detach(), {f"{name}.{f}": leaf.grad for name, some in factors.items() for f, leaf in zip(FACTORS, some)}


def gradients(model):
    found = {f"{name}.{f}": getattr(a, f).grad for name, a in adapted_experts(model).items() for f in FACTORS}
    assert len(found) == 12
    return found


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("base", FORMATS.values(), ids=FORMATS)
def test_training_is_that_of_the_decoded_experts(base, space):
    model = adapted(base=base, space=space).train()
    loss = losses(model)
    loss.backward()
    expected, exact = truth(model)
    assert relative_error(loss.detach(), expected) <= ORACLE_FP64
    found = gradients(model)
    assert max(relative_error(found[name], exact[name]) for name in exact) <= ORACLE_FP64_MODEL


@pytest.mark.parametrize("space", ["token", "weight"])
def test_the_kernels_decode_as_the_reference_does(space):
    both = []
    for impl in ("triton", "reference"):
        model = adapted(torch.float32, space=space, impl=impl).train()
        losses(model).backward()
        both.append(gradients(model))
    assert max(relative_error(both[0][name], both[1][name]) for name in both[0]) <= SAME_FP32


def test_a_fresh_adapter_changes_nothing_and_keeps_what_is_packed():
    model = fp8_experts()
    before = {name: p.clone() for name, p in model.named_parameters() if "experts" in name}
    expected = plain_twin(model)(BATCH).logits
    model = dk.apply_dora(model, config())
    assert relative_error(model(BATCH).logits, expected) <= ORACLE_FP64_MODEL
    assert len(before) == 8 and all(torch.equal(model.get_parameter(n).float(), p.float()) for n, p in before.items())
    assert {p.dtype for n, p in model.named_parameters() if n.endswith("_proj") and "experts" in n} == {
        torch.float8_e4m3fn
    }


@pytest.mark.parametrize("stack", ["gate_up_proj", "down_proj"])
def test_beside_a_stack_that_stays_frozen(stack):
    model = adapted(target_parameters=[f"experts.{stack}"]).train()
    losses(model).backward()
    _, exact = truth(model)
    for name, adapter in adapted_experts(model).items():
        for factor in FACTORS:
            assert relative_error(getattr(adapter, factor).grad, exact[f"{name}.{factor}"]) <= ORACLE_FP64_MODEL
    # Scales are no parameters of experts.
    assert set(dk.explain(model, tokens=8).experts.values()) == {4 * 12 * 16 * (1 if stack == "gate_up_proj" else 2)}


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("space", ["token", "weight"])
def test_nothing_of_the_stacks_size_is_made(space, impl, monkeypatch):
    """The largest fresh tensor has the size of one expert's weight: it is decoded, or merged."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 64)
    without_the_interpreters(monkeypatch)
    model = adapted(torch.bfloat16, base={"moe_intermediate_size": 48}, space=space, impl=impl, r=1).train()
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(6, 16).bfloat16().requires_grad_()
    routes = torch.tensor([[0, 1]] * 4 + [[1, 3]] * 2), torch.full((6, 2), 0.5).bfloat16()
    with Allocations() as made:
        experts(x, *routes).sum().backward()
    most = max(torch.Size(shape).numel() for shape, _ in made.made)
    assert most == 2 * 48 * 16 < experts.gate_up_proj.numel()


def test_explain_says_that_they_are_decoded():
    model = adapted(torch.float32)
    line = dk.explain(model, tokens=8).stacks[STACK]
    assert "weight space" in line and "FP8 is decoded in the same pass" in line


def test_other_layers_are_seen_beyond_experts_that_only_a_gpu_runs():
    explained = dk.explain(adapted(torch.float32, target_modules="all-linear").train(), tokens=8)
    assert explained.unseen is None
    assert any("q_proj" in what and "as one function" in what for what in explained.blocks.values())


def test_a_cast_that_loses_the_scales_is_seen_in_the_next_call():
    model = adapted(torch.float32)
    with pytest.raises(ValueError, match=r"was cast to torch.bfloat16 in FP8Experts, without its scales"):
        model.to(torch.bfloat16)(BATCH)


def test_what_records_calls_is_refused(monkeypatch):
    """It would wait for the numbers of tokens, which a graph cannot."""
    model = adapted(torch.float32)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match=r"decoded expert by expert: torch.compile and CUDA graphs cannot record it"):
        model.model.layers[0].mlp.experts(torch.randn(2, 16), torch.tensor([[0, 1]] * 2), torch.ones(2, 2))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_norms_are_of_the_experts_that_have_tokens(impl):
    adapter = adapted_experts(adapted(torch.float32, impl=impl))[STACK]
    factors, ends = (adapter.lora_A, adapter.lora_B, adapter.magnitude), torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    with dispatch.operations_for(adapter.stack, impl) as (ops, stack):
        some, every = stack_norm(ops, stack, *factors, 2.0, ends=ends), adapter.weight_norm()
    V = decoded(adapter.experts, "down_proj") + 2.0 * adapter.lora_B.double() @ adapter.lora_A.double()
    assert relative_error(every.norm, V.norm(dim=2)) <= ORACLE_FP32
    assert relative_error(every.scale, adapter.magnitude / V.norm(dim=2)) <= ORACLE_FP32
    for part, whole in zip(some, every):
        assert not part[1].any() and torch.equal(part[[0, 2, 3]], whole[[0, 2, 3]])
    assert torch.equal(adapter.expert_norm(2).norm, every.norm[2])


def test_an_expert_without_tokens_is_not_read_and_trains_nothing():
    model = adapted(torch.float32).train()
    experts = model.model.layers[0].mlp.experts
    experts.down_proj_scale_inv.data[2] = torch.nan
    routes = torch.tensor([[0, 1], [1, 3]]), torch.full((2, 2), 0.5)
    experts(torch.randn(2, 16), *routes).sum().backward()
    for factor in FACTORS:
        grad = getattr(experts.dora["down_proj"], factor).grad
        assert grad.isfinite().all() and not grad[2].any() and grad[[0, 1, 3]].flatten(1).any(1).all()


def test_checkpointing_changes_no_gradient():
    both = []
    for checkpointed in (False, True):
        model = adapted(torch.float32).train()
        if checkpointed:
            checkpoint_activations(model, use_reentrant=False)
        losses(model).backward()
        both.append(gradients(model))
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_frozen_adapters_keep_the_norms():
    model = adapted(torch.float32)
    with torch.no_grad():
        expected = model(BATCH).logits
        with dk.frozen_adapters(model):
            assert relative_error(model(BATCH).logits, expected) <= SAME_FP32


def test_files_go_from_fp8_to_the_decoded_base_which_merges(tmp_path):
    """What merging is refused for says what to do instead; here it is done."""
    model = adapted()
    expected = model(BATCH).logits
    for call in (dk.merge_dora, dk.merged_weights):
        with pytest.raises(ValueError, match=r"experts.*cannot be merged: it is a stack in FP8.*dequantize=True"):
            call(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dk.save_adapter(model, tmp_path)
    again = dk.load_adapter(fp8_experts(), tmp_path).eval()
    assert relative_error(again(BATCH).logits, expected) <= ORACLE_FP64
    dense = dk.load_adapter(plain_twin(model), tmp_path).eval()
    assert relative_error(dense(BATCH).logits, expected) <= ORACLE_FP64_MODEL
    assert relative_error(dk.merge_dora(dense)(BATCH).logits, expected) <= ORACLE_FP64_MODEL
