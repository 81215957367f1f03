"""`apply_dora` on fused experts: each family's layout trains as its materialised weights would, and files hold it."""

import copy
import pickle

import pytest
import torch
from torch.func import functional_call

import dora_kernels as dk
from dora_kernels.layers.experts import adapted_experts
from dora_kernels.ops import dispatch
from tests.layers.test_data_parallel import replica_of
from tests.support.marks import slow
from tests.support.oracle import relative_error
from tests.support.tiny_experts import BATCH, FAMILIES, OTHERS, losses, tiny_experts
from tests.support.tiny_models import checkpoint_activations
from tests.tolerances import AFTER_ADAM_FP64, ORACLE_FP64, ORACLE_FP64_MODEL, SAME_FP32

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
FACTORS = ("lora_A", "lora_B", "magnitude")
# OLMoE has Mixtral's layout.
every_layout = pytest.mark.parametrize("name", [slow(name) if name == "OLMoE" else name for name in FAMILIES])


def config(**options):
    return dk.DoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": STACKS} | options)


def adapted(name, dtype=torch.float64, **options):
    """With adapters that differ from the start, and biases that do in gpt-oss."""
    torch.manual_seed(0)
    model = dk.apply_dora(tiny_experts(name, dtype), config(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in adapted_experts(model).values():
            noise = torch.randn(adapter.lora_B.shape, generator=generator, dtype=torch.float64)
            adapter.lora_B.copy_(0.1 * noise)
            adapter.magnitude.mul_(1 + 0.1 * torch.randn(adapter.magnitude.shape, generator=generator))
    return model


class Materialised:
    """The plain model computed with each expert's W' = m / ‖V‖ ⊙ V, V = W + s B A, autograd differentiating it all."""

    def __init__(self, name, model):
        self.plain = tiny_experts(name).train(model.training)
        self.factors = {
            stack: [getattr(adapter, factor).detach().clone().requires_grad_() for factor in FACTORS]
            for stack, adapter in adapted_experts(model).items()
        }

    def __call__(self, **inputs):
        merged = {}
        for name, (lora_A, lora_B, magnitude) in self.factors.items():
            stack = self.plain.get_parameter(name).detach()
            transposed = self.plain.get_submodule(name.rpartition(".")[0]).is_transposed
            rows = []
            for expert, weight in enumerate(stack):
                weight = weight.T if transposed else weight
                adapted = weight + 2.0 * lora_B[expert] @ lora_A[expert]
                row = magnitude[expert, :, None] * adapted / adapted.detach().norm(dim=1, keepdim=True)
                rows.append(row.T if transposed else row)
            merged[name] = torch.stack(rows)
        return functional_call(self.plain, merged, kwargs=inputs)


@every_layout
def test_training_is_that_of_materialised_experts(name):
    """Loss and gradients at the start, parameters after three steps of Adam."""
    model = adapted(name).train()
    truth = Materialised(name, model)
    ours = {stack: [getattr(adapter, f) for f in FACTORS] for stack, adapter in adapted_experts(model).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for factors in ours.values() for p in factors}
    pairs = [(a, b) for stack in ours for a, b in zip(ours[stack], truth.factors[stack])]
    optimizers = [torch.optim.Adam([pair[side] for pair in pairs], lr=1e-2) for side in (0, 1)]
    for step in range(3):
        found, expected = losses(model), losses(None, truth)
        for optimizer, loss in zip(optimizers, (found, expected)):
            optimizer.zero_grad()
            loss.backward()
        if step == 0:
            assert relative_error(found.detach(), expected.detach()) <= ORACLE_FP64
            assert max(relative_error(a.grad, b.grad) for a, b in pairs) <= ORACLE_FP64_MODEL
        for optimizer in optimizers:
            optimizer.step()
    assert max(relative_error(a.detach(), b.detach()) for a, b in pairs) <= AFTER_ADAM_FP64


@pytest.mark.parametrize("name", OTHERS)
def test_gradients_of_further_models_are_those_of_materialised_experts(name):
    model = adapted(name).train()
    truth = Materialised(name, model)
    found, expected = losses(model), losses(None, truth)
    found.backward()
    expected.backward()
    assert relative_error(found.detach(), expected.detach()) <= ORACLE_FP64
    for path, adapter in adapted_experts(model).items():
        for factor, exact in zip(FACTORS, truth.factors[path], strict=True):
            assert relative_error(getattr(adapter, factor).grad, exact.grad) <= ORACLE_FP64_MODEL


@pytest.mark.parametrize("name", [slow(n) if n in ("OLMoE", "DeepSeek-V3") else n for n in FAMILIES])
def test_both_forms_train_alike(name):
    gradients = []
    for space in ("token", "weight"):
        model = adapted(name, space=space).train()
        losses(model).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert max(relative_error(a, b) for a, b in zip(*gradients)) <= ORACLE_FP64_MODEL


def test_explain_says_the_form_and_at_how_many_tokens_of_an_expert():
    model = adapted("Mixtral", torch.float32).train()
    lines = [dk.explain(model, tokens=tokens).stacks["model.layers.0.mlp.experts.down_proj"] for tokens in (1, 2000)]
    assert "token space: predicted to take less time" in lines[0] and "; 0.5 tokens an expert" in lines[0]
    assert "weight space: predicted to take less time" in lines[1] and "; 1000 tokens an expert" in lines[1]
    forced = dk.explain(adapted("Mixtral", torch.float32, space="token"), tokens=2000).stacks.values()
    assert all("token space: asked for" in line for line in forced)


@every_layout
def test_gate_times_up_is_one_pass_where_the_module_has_no_gate_of_its_own(name):
    gradients = []
    for fuse_blocks in ("auto", False):
        model = adapted(name, space="token", fuse_blocks=fuse_blocks).train()
        fused = {adapter.activation for path, adapter in adapted_experts(model).items() if "gate_up" in path}
        assert fused == {"silu" if fuse_blocks and name != "gpt-oss" else None}
        lines = dk.explain(model, tokens=8).stacks
        assert any("silu(gate) ⊙ up in the same pass" in line for line in lines.values()) == (fused == {"silu"})
        losses(model).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert max(relative_error(a, b) for a, b in zip(*gradients)) <= ORACLE_FP64_MODEL


def test_another_activation_is_a_pass_of_its_own():
    for activation, fused in (("gelu_pytorch_tanh", "gelu_tanh"), ("relu", None)):
        model = dk.apply_dora(tiny_experts("Mixtral", hidden_act=activation), config(space="token"))
        adapters = adapted_experts(model)
        assert adapters["model.layers.0.mlp.experts.gate_up_proj"].activation == fused
        assert adapters["model.layers.0.mlp.experts.down_proj"].activation is None
        expected = tiny_experts("Mixtral", hidden_act=activation)(BATCH).logits
        assert relative_error(model(BATCH).logits, expected) <= ORACLE_FP64_MODEL


def test_an_activation_that_was_changed_since_is_the_one_that_runs():
    model = adapted("Mixtral", space="token")
    experts = model.model.layers[0].mlp.experts
    gate_up = adapted_experts(model)["model.layers.0.mlp.experts.gate_up_proj"]
    before = model(BATCH).logits
    handle = experts.act_fn.register_forward_hook(lambda module, args, output: output * 2)
    assert gate_up.activation is None
    hooked = model(BATCH).logits
    handle.remove()
    assert gate_up.activation == "silu" and torch.equal(model(BATCH).logits, before)
    experts.act_fn = torch.nn.Sequential(experts.act_fn, torch.nn.Tanh())
    assert gate_up.activation is None
    replaced = model(BATCH).logits
    for changed in (hooked, replaced):
        assert relative_error(changed, before) > 1e-3


@pytest.mark.parametrize("stack", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_beside_a_stack_that_stays_frozen(name, stack):
    """Gradients pass through the frozen one, in the first layer too."""
    model = adapted(name, target_parameters=[f"experts.{stack}"]).train()
    truth = Materialised(name, model)
    losses(model).backward()
    losses(None, truth).backward()
    assert len(truth.factors) == 2
    for path, adapter in adapted_experts(model).items():
        for factor, expected in zip(FACTORS, truth.factors[path]):
            assert relative_error(getattr(adapter, factor).grad, expected.grad) <= ORACLE_FP64_MODEL


@every_layout
def test_a_fresh_adapter_changes_nothing(name):
    plain = tiny_experts(name, torch.float32)
    expected = plain(BATCH).logits
    found = dk.apply_dora(plain, config())(BATCH).logits
    assert relative_error(found, expected) <= SAME_FP32
    keys = {key for key in plain.state_dict() if ".dora." not in key}
    assert keys == set(tiny_experts(name, torch.float32).state_dict())


def test_one_parameter_of_a_module_and_linear_layers_besides():
    model = dk.apply_dora(
        tiny_experts("Mixtral"), config(target_modules=["q_proj"], target_parameters=["1.mlp.experts.down_proj"])
    )
    assert list(adapted_experts(model)) == ["model.layers.1.mlp.experts.down_proj"]
    model.train()
    losses(model).backward()
    adapter = adapted_experts(model)["model.layers.1.mlp.experts.down_proj"]
    assert all(getattr(adapter, factor).grad.isfinite().all() for factor in FACTORS)
    lines = str(dk.explain(model, tokens=8)).splitlines()
    assert any(line.startswith("model.layers.1.mlp.experts.down_proj (experts=4, 16×24, r=3") for line in lines)
    frozen = 4 * 48 * 16
    assert f"model.layers.1.mlp.experts: {frozen} parameters of fused experts stay frozen" in lines


def test_the_models_implementation_may_be_switched():
    """As generation does: an adapter is never left out for that."""
    model = adapted("Mixtral", torch.float32)
    expected = model(BATCH).logits
    model.set_experts_implementation("batched_mm")
    assert torch.equal(model(BATCH).logits, expected)
    assert model.config._experts_implementation == "batched_mm"


def test_copies_and_pickles_compute_the_same():
    model = adapted("gpt-oss", torch.float32)
    expected = model(BATCH).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(BATCH).logits, expected)
        adapter = next(iter(adapted_experts(twin).values()))
        with torch.no_grad():
            adapter.magnitude.mul_(2)
        assert not torch.equal(twin(BATCH).logits, expected)
    assert torch.equal(model(BATCH).logits, expected)


def test_replicas_of_data_parallel_read_their_own_stacks():
    model = adapted("gpt-oss").train()
    losses(model).backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    replica = replica_of(model)
    for module in model.modules():
        if hasattr(module, "dora"):  # as if on another device
            module.down_proj.data, module.down_proj_bias.data = (torch.empty(0, dtype=torch.float64) for _ in range(2))
    losses(replica).backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert max(relative_error(a, b) for a, b in zip(found, expected)) <= ORACLE_FP64


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_changes_no_gradient(reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = adapted("Qwen3-MoE", torch.float32).train()
        if checkpointed:
            checkpoint_activations(model, use_reentrant=reentrant)
        losses(model).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_reentrant_checkpointing_of_an_input_without_a_gradient():
    gradients = []
    for checkpointed in (False, True):
        model = adapted("Qwen3-MoE", torch.float32).train()
        embedded = model.get_input_embeddings()(BATCH).detach()
        if checkpointed:
            checkpoint_activations(model, use_reentrant=True)
        model(inputs_embeds=embedded, labels=BATCH).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_frozen_adapters_keep_each_experts_norm(monkeypatch):
    model = adapted("gpt-oss", torch.float32)
    with torch.no_grad():
        expected = model(BATCH).logits
        with dk.frozen_adapters(model):
            monkeypatch.delattr(dispatch.implementation("reference"), "expert_norm")
            assert torch.equal(model(BATCH).logits, expected)
            with pytest.raises(RuntimeError, match="frozen_adapters"):
                model.train()


@every_layout
def test_a_rank_may_be_divided_over_the_experts_of_a_token(name):
    """Both experts that a token goes to have half the rank, the factors and the scaling of a model with that rank."""
    divided = adapted(name, r=7, lora_alpha=6, expert_rank="active", rank_pattern={"1.mlp.experts.down_proj": 5})
    model = adapted(name, r=3, lora_alpha=6, rank_pattern={"1.mlp.experts.down_proj": 5})
    found, expected = adapted_experts(divided), adapted_experts(model)
    assert {path: adapter.r for path, adapter in found.items()} == {path: a.r for path, a in expected.items()}
    assert {a.r for a in found.values()} == {3, 5}
    assert all(a.lora_A.shape[1] == a.r and a.scaling == 6 / a.r for a in found.values())
    assert torch.equal(divided(BATCH).logits, model(BATCH).logits)
