"""Fresh PEFT adapters: an exact no-op once patched, and PEFT's bits again once unpatched. Zero rows train."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

from dora_kernels.peft import patch_peft, unpatch_peft
from tests.support.marks import slow
from tests.support.peft_models import count_fused, dora_config, step
from tests.support.tiny_models import FAMILIES, logits
from tests.tolerances import UNIT_ROUNDOFF

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def fresh(family="llama", dtype=torch.bfloat16, **options):
    return peft.get_peft_model(FAMILIES[family](dtype), dora_config(), **options).eval()


def magnitudes(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "magnitude" in name}


@DTYPES
@pytest.mark.parametrize("family", ["llama", slow("t5")])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_step_zero_is_the_base_model_bit_for_bit(impl, family, dtype):
    base, model = FAMILIES[family](dtype), fresh(family, dtype)
    if dtype == torch.bfloat16:
        assert not torch.equal(logits(model), logits(base)), "PEFT alone is not"
    for space in ("token", "weight"):
        patch_peft(model, impl=impl, space=space)
        with count_fused() as calls:
            assert torch.equal(logits(model), logits(base))
        assert calls


@DTYPES
def test_unpatching_restores_pefts_bits(dtype):
    model = fresh(dtype=dtype)
    before = magnitudes(model)
    for _ in range(2):
        patch_peft(model)
        assert any(not torch.equal(value, before[name]) for name, value in magnitudes(model).items())
        patch_peft(model)
        unpatch_peft(copy.deepcopy(model))
        unpatch_peft(model)
        for name, value in magnitudes(model).items():
            assert torch.equal(value, before[name]), name


def test_a_trained_adapter_is_never_touched():
    model = fresh()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.lora_B["default"].weight.data[0, 0] = 1e-30
    others = model.base_model.model.model.layers[1].mlp.up_proj.lora_magnitude_vector["default"].weight
    others.data[3] *= 1.01
    before = magnitudes(model)
    patch_peft(model)
    after = magnitudes(model)
    name = "base_model.model.model.layers.{}.mlp.up_proj.lora_magnitude_vector.default.weight"
    assert torch.equal(after[name.format(0)], before[name.format(0)]), "B is not zero"
    assert after[name.format(1)][3] == before[name.format(1)][3], "m is not the norm"


@pytest.mark.parametrize("trained", ["", "lora_magnitude_vector"], ids=["everything", "magnitudes_alone"])
def test_what_was_trained_while_patched_is_kept(trained):
    model = fresh(dtype=torch.float32)
    patch_peft(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and trained in name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step(model.train())
    optimizer.step()
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    unpatch_peft(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_magnitude_stays_as_it_is_and_is_warned_of(dtype):
    """No 16-bit number is the fp32 norm, and a g that were 1 until B moves would jump when it does."""
    model = fresh(dtype=dtype, autocast_adapter_dtype=False)
    before = magnitudes(model)
    with pytest.warns(UserWarning, match="14 trained magnitudes are stored in 16 bits .*autocast_adapter_dtype=True"):
        patch_peft(model)
    for name, value in magnitudes(model).items():
        assert value.dtype == dtype
        assert torch.equal(value, before[name]), name
    # g is off by half a unit of the magnitude's last place at most, in each of a few layers.
    base = logits(FAMILIES["llama"](dtype))
    assert (logits(model) - base).norm() < 10 * UNIT_ROUNDOFF[dtype] * base.norm()
    in_fp32 = fresh(dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_peft(model.requires_grad_(False))
        patch_peft(in_fp32)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_rows_train_where_peft_gives_nan(dtype, impl):
    linear = nn.Linear(24, 20, dtype=dtype)
    linear.weight.data[5:9] = 0
    bias = linear.bias.detach().clone()
    model = peft.get_peft_model(nn.Sequential(linear), dora_config(target_modules=["0"]))
    x = torch.randn(7, 24, dtype=dtype)
    assert model(x).isnan().any(), "PEFT's output"
    patch_peft(model, impl=impl)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        y = model(x)
        y.float().square().sum().backward()
        optimizer.step()
        assert y.isfinite().all()
        for name, parameter in model.named_parameters():
            assert parameter.isfinite().all(), name
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
    with torch.no_grad():
        assert torch.equal(model.eval()(x)[:, 5:9], bias[5:9].expand(7, 4)), "such an output feature is its bias"


@pytest.mark.parametrize("mode", ["eval", "train", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_step_zero_at_a_size_where_the_order_of_the_sum_shows(impl, dtype, mode):
    """A CPU's GEMM of this size sums in blocks and starts from the bias: added afterwards it moves the last bits.
    Under PEFT's dropout nothing of the dropped product may be left."""
    torch.manual_seed(0)
    linear, x = nn.Linear(1000, 100, bias=dtype != torch.bfloat16, dtype=dtype), torch.rand(10, 1000, dtype=dtype)
    base = linear(x)
    config = dora_config(target_modules=["0"], lora_dropout=0.3 if mode == "dropout" else 0.0)
    model = peft.get_peft_model(nn.Sequential(linear), config).train(mode != "eval")
    patch_peft(model, impl=impl, space="token")
    with count_fused() as calls:
        assert torch.equal(model(x), base)
    assert len(calls) == 1
