"""Which formats are recognised, how each is read, and what is refused."""

import copy
import pickle
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import dora_kernels as dk
from dora_kernels.ops import reference
from dora_kernels.ops.base_weights import (
    FORMATS,
    LibraryWeight,
    Nf4Weight,
    dense,
    is_packed,
    is_quantized,
    keep_packing,
    needs_its_layer,
    note_of,
    readable,
    stored_rounding,
    weight_of,
)
from tests.support.fp8 import linear_fp8
from tests.support.int4 import linear_compressed, linear_gptq
from tests.support.nf4 import decoded, linear_4bit
from tests.support.oracle import relative_error
from tests.tolerances import ORACLE_FP32


def linear_8bit(dense):
    N, K = dense.shape
    linear = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
    linear.weight.data.copy_(dense)
    return linear.to("cpu")


class TorchaoWeight(nn.Parameter):
    """A stand-in of torchao's tensors, which are known by their module and dequantise themselves."""

    __module__ = "torchao.dtypes"

    def dequantize(self):
        return 2 * self.detach().clone()


class HqqLinear(nn.Module):
    """A stand-in of HQQ's layer."""

    def __init__(self, dense):
        super().__init__()
        self.W_q = nn.Parameter((4 * dense).round().to(torch.int8), requires_grad=False)
        self.out_features, self.in_features = dense.shape
        self.compute_dtype, self.bias = torch.float32, None

    def dequantize(self):
        return self.W_q.float() / 4

    def forward(self, x):
        return x @ self.dequantize().T


def torchao_linear(dense):
    linear = nn.Linear(*reversed(dense.shape), bias=False)
    linear.weight = TorchaoWeight(dense / 2, requires_grad=False)
    linear.forward = lambda x: x @ dense.T
    return linear


LIBRARIES = {
    "bitsandbytes (fp4)": lambda dense: linear_4bit(dense, quant_type="fp4"),
    "bitsandbytes (int8)": linear_8bit,
    "torchao": torchao_linear,
    "HQQ": HqqLinear,
}


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_another_librarys_weight_is_dequantised_by_it(name, impl):
    torch.manual_seed(0)
    base = LIBRARIES[name](torch.randn(48, 64))
    weight = weight_of(base)
    assert is_quantized(base) and isinstance(weight, LibraryWeight) and weight.format == name
    layer = dk.DoraLinear.from_linear(base, r=4, lora_alpha=8, impl=impl)
    nn.init.normal_(layer.lora_B, std=0.1)
    nn.init.ones_(layer.magnitude)
    x = torch.randn(5, 64, requires_grad=True)
    for _ in range(2):
        adapted = weight.dequantize().double() + 2.0 * (layer.lora_B.double() @ layer.lora_A.double())
        truth = x.double() @ (adapted / adapted.norm(dim=1, keepdim=True).detach()).T
        y = layer(x)
        assert relative_error(y, truth) <= ORACLE_FP32
        (grad_x,) = torch.autograd.grad(y.sum(), x)
        (true_grad,) = torch.autograd.grad(truth.sum(), x)
        assert relative_error(grad_x, true_grad) <= ORACLE_FP32
        # 8-bit layers move their scales on their own first forward.
        base(x.detach())
    assert f"{name} dequantises the weight at each use" in str(dk.explain(layer, tokens=5))


@pytest.mark.parametrize("name", LIBRARIES)
def test_nothing_dense_is_kept_for_the_backward(name):
    layer = dk.DoraLinear.from_linear(LIBRARIES[name](torch.randn(48, 64)), r=4, lora_alpha=8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(torch.randn(5, 64, requires_grad=True))
    assert torch.Size((48, 64)) not in kept and torch.Size((4, 64)) in kept


def test_each_format_recognises_its_own_layers_alone():
    torch.manual_seed(0)
    layers = {name: make(torch.randn(48, 64)) for name, make in LIBRARIES.items() if name != "bitsandbytes (fp4)"}
    layers |= {"nf4": linear_4bit(torch.randn(48, 64)), "fp8": linear_fp8(48, 64)}
    layers |= {"compressed-tensors": linear_compressed(48, 64)[0], "GPTQ": linear_gptq(48, 64)[0]}
    found = {name: [each for each in FORMATS if each.recognises(layer)] for name, layer in layers.items()}
    assert [len(formats) for formats in found.values()] == [1] * len(FORMATS)
    assert {formats[0] for formats in found.values()} == set(FORMATS)
    needing = {"bitsandbytes (int8)", "HQQ", "fp8", "compressed-tensors", "GPTQ"}
    assert {name for name, layer in layers.items() if needs_its_layer(layer)} == needing
    assert not any(each.recognises(nn.Linear(8, 4)) for each in FORMATS)


@pytest.mark.parametrize("parity", [False, True], ids=["default", "parity"])
def test_what_nf4_answers(parity):
    torch.manual_seed(0)
    linear = linear_4bit(torch.randn(48, 64).bfloat16())
    weight = weight_of(linear, nf4_parity=parity)
    expected = decoded(linear.weight).float()
    expected = expected.bfloat16().float() if parity else expected
    assert readable(weight) is weight and is_packed(weight)
    assert torch.equal(dense(weight, torch.float32, reference), expected)
    assert stored_rounding(weight, "dithered") == ("dithered" if parity else "nearest")
    assert ("rounded first as PEFT does" in note_of(weight)) == parity


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_a_librarys_weight_answers(name):
    torch.manual_seed(0)
    layer = LIBRARIES[name](torch.randn(48, 64))
    weight = weight_of(layer)
    assert not is_packed(weight) and stored_rounding(weight, "dithered") == "dithered" and name in note_of(weight)
    assert torch.equal(readable(weight), weight.dequantize())
    assert torch.equal(dense(weight, torch.bfloat16, reference), weight.dequantize().to(torch.bfloat16))


def test_what_a_matrix_answers():
    weight = torch.randn(4, 8)
    assert readable(weight) is weight and dense(weight, torch.float32, None) is weight
    assert torch.equal(dense(weight, torch.bfloat16, None), weight.bfloat16())
    assert stored_rounding(weight, "dithered") == "dithered" and note_of(weight) is None and not is_packed(weight)


def test_a_matrix_is_itself():
    linear = nn.Linear(8, 4)
    assert weight_of(linear) is linear.weight and not is_quantized(linear)


def test_nf4_is_recognised_by_its_state():
    weight = weight_of(linear_4bit(torch.randn(48, 64)))
    assert isinstance(weight, Nf4Weight) and weight.shape == (48, 64) and not weight.parity
    assert weight_of(linear_4bit(torch.randn(48, 64)), nf4_parity=True).parity


def test_a_weight_that_was_not_quantised_yet_is_refused():
    with pytest.raises(ValueError, match="not quantised yet: move the model to its device first"):
        dk.DoraLinear.from_linear(bnb.nn.Linear4bit(64, 48, quant_type="nf4"), r=4, lora_alpha=8)


def test_scales_on_another_device_are_refused():
    """A kernel would read them through a pointer of another GPU's memory."""
    linear = linear_4bit(torch.randn(48, 64))
    linear.weight.quant_state.absmax = linear.weight.quant_state.absmax.to("meta")
    with pytest.raises(ValueError, match=r"on cpu and its scales on meta: .* run one process for each GPU"):
        dk.DoraLinear.from_linear(linear, r=4, lora_alpha=8)


def test_a_repacked_weight_is_refused():
    """bitsandbytes repacks in the first eval forward on a CPU with AVX512-BF16; read as usual it would be noise."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    linear = linear_4bit(torch.randn(64, 64))
    linear.weight.data, linear.weight.quant_state = _convert_weight_packed_for_cpu(
        linear.weight.data, linear.weight.quant_state
    )
    with pytest.raises(ValueError, match=r"bitsandbytes repacked this 4-bit weight .* load the model again"):
        weight_of(linear)


def test_the_switch_of_the_repacking_is_cleared():
    model = nn.Sequential(linear_4bit(torch.randn(48, 64)), nn.Linear(48, 4))
    model[0].support_avx512bf16_for_cpu = True
    keep_packing(model)
    assert model[0].support_avx512bf16_for_cpu is False and not hasattr(model[1], "support_avx512bf16_for_cpu")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_quantised_layer_computes_the_same(copied):
    layer = dk.DoraLinear.from_linear(linear_4bit(torch.randn(48, 64)), r=4, lora_alpha=8)
    x = torch.randn(5, 64)
    assert torch.equal(copied(layer)(x), layer(x))


def test_an_incomplete_stand_in_is_no_quantised_layer():
    assert not is_quantized(SimpleNamespace(weight=torch.ones(2, 2)))
