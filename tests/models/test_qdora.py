"""4-bit models, from `from_pretrained` to the merged model: through the kernels, beside PEFT's QDoRA and fp64."""

import peft
import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import dora_kernels as dk
from dora_kernels.ops.base_weights import keep_packing
from tests.support.buffers import count_launches
from tests.support.nf4 import decoded, linear_4bit
from tests.support.oracle import errors, exact, make_problem, relative_error, set_adapter, solve
from tests.tolerances import ORACLE_FP32, SAME_FP32

VOCAB, LAYERS = 64, 1
# Rows of whole blocks: where blocks straddle output features, bitsandbytes 0.50 itself decodes wrongly on a CPU.
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = {"r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=LAYERS, max_position_embeddings=32, **SHAPE)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def load(folder, compute_dtype=torch.float32, double=True):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=compute_dtype)


def batches(steps):
    generator = torch.Generator().manual_seed(1)
    few = [torch.randint(VOCAB, (2, 9), generator=generator) for _ in range(2)]
    return [few[step % 2] for step in range(steps)]


def randomise(model):
    """The same A and B, far from a fresh adapter's, in models whose adapters are named differently."""
    generator = torch.Generator().manual_seed(2)
    for kind in ("lora_A", "lora_B"):
        for name, parameter in model.named_parameters():
            if kind in name:
                with torch.no_grad():
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def train(model, steps=12):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for tokens in batches(steps):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def peft_losses(folder):
    model = load(folder)
    keep_packing(model)
    model = peft.get_peft_model(model, peft.LoraConfig(use_dora=True, target_modules=TARGETS, **CONFIG)).train()
    randomise(model)
    return train(model)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_parity_mode_follows_pefts_losses(folder, impl, peft_losses):
    model = dk.apply_dora(load(folder), dk.DoraConfig(**CONFIG, impl=impl, nf4_parity=True)).train()
    randomise(model)
    with count_launches() as launches:
        losses = torch.tensor(train(model, 12 if impl == "reference" else 5), dtype=torch.float64)
    assert bool(launches) == (impl == "triton")
    peft_curve = torch.tensor(peft_losses, dtype=torch.float64)
    assert peft_curve[-2] < peft_curve[0]
    assert (losses - peft_curve[: len(losses)]).abs().max() <= SAME_FP32 * peft_curve[0]


def test_parity_mode_takes_pefts_norm(folder):
    """PEFT's is that of the weight rounded to bf16; the default's that of what was decoded."""
    linear = load(folder, torch.bfloat16).model.layers[0].self_attn.q_proj
    theirs = dequantize_module_weight(linear).double().norm(dim=1)
    error = {}
    for parity in (True, False):
        ours = dk.DoraLinear.from_linear(linear, **CONFIG, nf4_parity=parity).weight_norm()[0]
        error[parity] = relative_error(ours, theirs)
    assert error[True] <= ORACLE_FP32 and error[False] > 5 * ORACLE_FP32


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_default_mode_is_nearer_to_fp64_than_peft(impl):
    """In bf16: PEFT rounds what it decodes, the product and the sum; W' is rounded once."""
    total = {"ours": {}, "peft": {}}
    for seed in range(6):
        problem = make_problem(64, 48, 128, 8, torch.bfloat16, torch.bfloat16, seed=seed)
        linear = linear_4bit(problem.weight, compute_dtype=torch.bfloat16)
        model = torch.nn.Sequential(linear)
        model.is_loaded_in_4bit = True
        config = peft.LoraConfig(r=8, lora_alpha=8 * problem.scaling, target_modules=["0"], use_dora=True)
        layer = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0]
        x = problem.x.clone().requires_grad_()
        leaves = [x, *set_adapter(layer, problem)]
        y = layer(x)
        theirs = dict(zip(("y", "dx", "dA", "dB", "dm"), (y, *torch.autograd.grad(y, leaves, problem.grad_y))))
        problem.weight = linear.weight
        ours = solve(problem, impl=impl)
        problem.weight = decoded(linear.weight)
        truth = exact(problem)
        for who, solution in (("ours", ours), ("peft", theirs)):
            for name, error in errors(solution, truth).items():
                total[who][name] = total[who].get(name, 0.0) + error
    for name in truth:
        assert total["ours"][name] < total["peft"][name], (name, total)


def test_evaluation_in_between_changes_no_gradient(folder):
    """The trap that halves stock PEFT's gradients: the repacking in the first eval forward."""

    def gradients(evaluate):
        model = dk.apply_dora(load(folder), dk.DoraConfig(**CONFIG))
        randomise(model)
        (tokens,) = batches(1)
        if evaluate:
            with torch.no_grad():
                model.eval()(tokens)
        model.train()(tokens, labels=tokens).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, after_eval = gradients(False), gradients(True)
    assert plain and all(torch.equal(plain[name], after_eval[name]) for name in plain)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_from_training_to_a_saved_adapter_and_back(folder, tmp_path, double):
    model = dk.apply_dora(load(folder, torch.bfloat16, double), dk.DoraConfig(**CONFIG)).train()
    losses = train(model, steps=6)
    assert losses[-2] < losses[0]
    (tokens,) = batches(1)
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    dk.save_adapter(model, tmp_path / "adapter")
    fresh = dk.load_adapter(load(folder, torch.bfloat16, double), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(fresh(tokens).logits, logits)
        with dk.frozen_adapters(fresh):
            assert torch.equal(fresh(tokens).logits, logits)


@pytest.fixture
def peft_model(folder):
    def build(compute_dtype=torch.float32):
        model = load(folder, compute_dtype)
        model = peft.get_peft_model(model, peft.LoraConfig(use_dora=True, target_modules=TARGETS, **CONFIG))
        keep_packing(model)
        return model

    return build


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_pefts_4_bit_layers_are_fused_and_given_back(peft_model, impl):
    stock, patched = peft_model().train(), peft_model().train()
    report = dk.patch_peft(patched, impl=impl, nf4_parity=True)
    assert len(report.fused) == 7 * LAYERS and not report.skipped
    assert "NF4 is decoded in the same pass, rounded first as PEFT does" in str(dk.explain(patched, tokens=8))
    for model in (stock, patched):
        randomise(model)
    with count_launches() as launches:
        ours = torch.tensor(train(patched, steps=6), dtype=torch.float64)
    assert bool(launches) == (impl == "triton")
    assert (ours - torch.tensor(train(stock, steps=6), dtype=torch.float64)).abs().max() <= SAME_FP32 * ours[0]
    dk.unpatch_peft(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in stock.modules()]


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("parity", [False, True], ids=["default", "parity"])
def test_a_fresh_peft_adapter_on_4_bits_changes_nothing(folder, peft_model, compute_dtype, parity):
    (tokens,) = batches(1)
    base = load(folder, compute_dtype)
    keep_packing(base)
    patched = peft_model(compute_dtype).eval()
    dk.patch_peft(patched, nf4_parity=parity)
    with torch.no_grad():
        expected, found = base(tokens).logits, patched(tokens).logits
    assert torch.equal(found, expected)


def test_a_repacked_layer_is_refused_by_name(folder):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = load(folder)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data, _ = _convert_weight_packed_for_cpu(
            layer.self_attn.q_proj.weight.data, layer.self_attn.q_proj.weight.quant_state
        )
    with pytest.raises(ValueError, match=r"q_proj .* cannot be read: bitsandbytes repacked"):
        dk.apply_dora(model, dk.DoraConfig(target_modules=["q_proj"]))
