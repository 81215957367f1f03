"""Models that write in place over a layer's output, from which the layer reads its magnitude's gradient."""

import copy
import pickle

import peft
import pytest
import torch
import transformers
from functorch.compile import min_cut_rematerialization_partition, nop
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import dora_kernels as dk
from tests.support.oracle import relative_error
from tests.support.peft_models import trained
from tests.support.tiny_models import VOCAB
from tests.tolerances import SAME_FP32

SPACES = pytest.mark.parametrize("space", ["token", "weight"])


class AddInPlace(nn.Module):
    """Not ReLU: it leaves the values alone that its gradient lets through, and dm would be right by chance."""

    def forward(self, y):
        y += 0.5
        return y.sigmoid()


MODEL = nn.Sequential(nn.Linear(8, 16, bias=False), AddInPlace(), nn.Linear(16, 4, bias=False))
X = torch.linspace(-2, 2, 40).sin().reshape(5, 8)


def plain():
    """What PEFT makes of the model, whose layers keep nothing that is written over."""
    torch.manual_seed(0)
    return trained(peft.get_peft_model(copy.deepcopy(MODEL), peft_config()))


def peft_config():
    return peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["0", "2"])


def patched(space):
    model = plain()
    dk.patch_peft(model, space=space)
    return model


def ours(space):
    """The same adapter in layers of our own."""
    source = plain().base_model.model
    layers = [
        dk.DoraLinear.from_linear(nn.Linear(*source[i].base_layer.weight.T.shape, bias=False), r=2, lora_alpha=4)
        for i in (0, 2)
    ]
    with torch.no_grad():
        for layer, lora in zip(layers, (source[0], source[2])):
            layer.space = space
            layer.weight.copy_(lora.base_layer.weight)
            layer.lora_A.copy_(lora.lora_A["default"].weight)
            layer.lora_B.copy_(lora.lora_B["default"].weight)
            layer.magnitude.copy_(lora.lora_magnitude_vector["default"].weight)
    return nn.Sequential(layers[0], AddInPlace(), layers[1])


def gradients(model, call=None):
    """By kind and layer, so that PEFT's names and ours agree."""
    model.zero_grad()
    x = X.clone().requires_grad_()
    (model if call is None else call)(x).square().sum().backward()
    found = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    kinds = ("lora_A", "lora_B", "magnitude")
    return {"x": x.grad} | {f"{k}.{i}": [g for n, g in found if k in n][i] for k in kinds for i in range(2)}


@pytest.fixture(scope="module")
def expected():
    return gradients(plain())


def check(found, expected):
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) <= SAME_FP32, name


BUILDERS = pytest.mark.parametrize("build", [ours, patched], ids=lambda build: build.__name__)


class CountMatrixProducts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return function(*args, **(kwargs or {}))


@SPACES
@BUILDERS
def test_gradients_are_exact_from_the_first_step_and_cost_nothing_more_later(build, space, expected):
    model = build(space)
    products = []
    for _ in range(3):
        with CountMatrixProducts() as counted:
            check(gradients(model), expected)
        products.append(counted.count)
    assert products[1] == products[2] < products[0]


@BUILDERS
def test_a_layer_whose_output_is_left_alone_gives_away_no_copy(build):
    model = build("token")
    gradients(model)
    uses = [layer.output_use if build is ours else layer.dora_fusion.output_use for layer in written_layers(model)]
    assert [use.is_written for use in uses] == [True, False]


def written_layers(model):
    return [module for module in model.modules() if hasattr(type(module), "plan")]


@SPACES
@BUILDERS
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])
def test_checkpointing(use_reentrant, build, space, expected):
    model = build(space)
    for _ in range(2):
        check(gradients(model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)), expected)


def test_saved_tensors_that_are_moved_away(expected):
    model = ours("token")
    with torch.autograd.graph.save_on_cpu():
        check(gradients(model), expected)


BACKENDS = {
    "keeps_all": aot_autograd(fw_compiler=nop, bw_compiler=nop),
    "recomputes": aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=min_cut_rematerialization_partition),
}


# Tracing takes seconds: each value of each axis once.
@pytest.mark.parametrize(
    ("build", "space", "backend"), [(ours, "token", "keeps_all"), (patched, "weight", "recomputes")]
)
def test_compiled_as_one_graph(build, space, backend, expected):
    model = build(space)
    torch._dynamo.reset()
    check(gradients(model, torch.compile(model, fullgraph=True, backend=BACKENDS[backend])), expected)


@pytest.mark.parametrize(("space", "backend"), [("token", "recomputes"), ("weight", "keeps_all")])
def test_compiled_alone_and_written_outside(space, backend, expected):
    model = ours(space)
    torch._dynamo.reset()
    first = torch.compile(model[0], fullgraph=True, backend=BACKENDS[backend])
    check(gradients(model, lambda x: model[2](model[1](first(x)))), expected)


def test_a_copy_of_a_layer_knows_it_too(expected):
    model = ours("token")
    gradients(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[0].output_use.is_written and twin[0].output_use is not model[0].output_use
        check(gradients(twin), expected)


def test_llama4_adds_its_experts_to_the_shared_ones_output():
    config = transformers.Llama4TextConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, intermediate_size_mlp=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        pad_token_id=0, attention_chunk_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "down_proj"])
    model = trained(peft.get_peft_model(transformers.Llama4ForCausalLM(config), lora)).train()
    tokens = torch.arange(14).reshape(2, 7) * 11 % VOCAB

    def run():
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = run()
    assert any("shared_expert.down_proj" in name for name in expected)
    dk.patch_peft(model)
    for _ in range(2):
        check(run(), expected)
