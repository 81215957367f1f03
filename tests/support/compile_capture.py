"""Prints what `torch.compile` makes of a layer with compiled (not interpreted) kernels, on a machine without a GPU.

tests/ops/test_compile.py runs it in a process of its own: pytest's has bound the kernels to the interpreter. Fake CPU
tensors stand for a GPU's, so that everything is traced and nothing runs; one JSON object per line, by case.
"""

import json
import os
from contextlib import ExitStack
from unittest.mock import patch

import torch
import triton
from torch._functorch.aot_autograd import aot_module_simplified
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

import dora_kernels as dk
from dora_kernels.ops import dispatch
from dora_kernels.ops.dora_experts import dora_experts
from dora_kernels.ops.dora_siblings import dora_siblings
from dora_kernels.ops.members import Member
from dora_kernels.ops.types import Rounding
from tests.support.stand_in_gpu import taken_for_gpu

CASES = {
    "token_bias_rank_64": {"space": "token", "bias": True, "R": 64},
    "token_peft_dropout": {"space": "token", "lora_dropout": 0.1, "dropout_mode": "peft"},
    "weight": {"space": "weight"},
    # The number of tokens as a symbol, on which dispatch decides.
    "auto_dynamic": {"space": "auto", "dynamic": True},
}

SIBLINGS = {"siblings, token space": "token", "siblings, weight space": "weight"}
EXPERTS = {"experts": None, "experts, gate times up": "silu"}


class _HopperDriver:
    """Lets Triton lower the kernels, from which torch.compile learns what each of them writes."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def call_names(module):
    """The operators and kernels that a graph calls, bodies of autograd functions included."""
    names = []
    for graph_module in module.modules():
        if not isinstance(graph_module, torch.fx.GraphModule):
            continue
        for node in graph_module.graph.nodes:
            if "kernel_idx" in node.kwargs:
                names.append(kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__)
            elif node.op == "call_function":
                names.append(getattr(node.target, "__name__", str(node.target)))
            elif node.op == "call_method":
                names.append(node.target)
    return names


def problem(make, *, bias=False, R=16, **options):
    """A layer in training, its input and the gradient of its output, their values from `make`."""
    M, N, K, dtype = 64, 48, 80, torch.bfloat16
    linear = torch.nn.Linear(K, N, bias=bias, dtype=dtype)
    layer = dk.DoraLinear.from_linear(linear, r=R, lora_alpha=32, impl="reference", **options).train()
    return layer, make(2, M // 2, K, dtype=dtype).requires_grad_(), make(2, M // 2, N, dtype=dtype)


def experts(make):
    """A stack of experts and its leaves, the tokens' gradient, and where each expert's tokens end."""
    E, S, N, K, R = 4, 64, 48, 80, 16
    shapes = (E, R, K), (E, N, R), (E, N)
    leaves = [make(S, K, dtype=torch.bfloat16), *(make(shape) for shape in shapes)]
    ends = torch.tensor([20, 20, 30, S], dtype=torch.int32)
    weight, grad_y = make(E, N, K, dtype=torch.bfloat16), make(S, N, dtype=torch.bfloat16)
    return weight, [leaf.requires_grad_() for leaf in leaves], grad_y, ends


def call_experts(x, weight, lora_A, lora_B, magnitude, ends, activation):
    return dora_experts(
        x, weight, lora_A, lora_B, magnitude, ends, scaling=2.0, impl="triton", activation=activation
    )  # fmt: skip


def capture_experts(activation):
    """As `capture`, of `dora_experts`."""
    weight, (x, *factors), grad_y, ends = experts(torch.empty)
    backend, captured = capturing()
    y = torch.compile(call_experts, fullgraph=True, backend=backend)(x, weight, *factors, ends, activation)
    torch.autograd.grad(y, (x, *factors), grad_y[:, : y.shape[1]])
    return captured


def siblings(make):
    """Layers of one input whose norms have one launch, and whose W' have one; their input, and their gradients."""
    K, R = 80, 16

    def member(N):
        factors = [make(*shape).requires_grad_() for shape in ((R, K), (N, R), (N,))]
        return Member(make(N, K, dtype=torch.bfloat16), *factors, None, 2.0, Rounding("dithered", N))

    members = [member(48), member(32)]
    x, *grads = (make(64, size, dtype=torch.bfloat16) for size in (K, 48, 32))
    return x.requires_grad_(), members, grads


def factors_of(members):
    return [factor for member in members for factor in member.factors]


def capture_siblings(space):
    """As `capture`, of `dora_siblings`."""
    x, members, grads = siblings(torch.empty)
    backend, captured = capturing()
    call = torch.compile(
        lambda x: dora_siblings(x, members, space=space, impl="triton"), fullgraph=True, backend=backend
    )
    torch.autograd.grad(call(x), (x, *factors_of(members)), grads)
    return captured


def capturing():
    """A backend, and what it fills: {"traced": one list of names per graph, "forward": names, "backward": names}"""
    captured = {"traced": [], "forward": None, "backward": None}

    def compiler(direction):
        def keep(graph_module, inputs):
            captured[direction] = call_names(graph_module)
            return graph_module.forward

        return keep

    def backend(graph_module, inputs):
        captured["traced"].append(call_names(graph_module))
        return aot_module_simplified(
            graph_module, inputs, fw_compiler=compiler("forward"), bw_compiler=compiler("backward")
        )

    torch._dynamo.reset()
    return backend, captured


def capture(*, dynamic=False, **options):
    """What `capturing` gives, of a layer."""
    layer, x, grad_y = problem(torch.empty, **options)
    layer.impl = "triton"
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    backend, captured = capturing()
    y = torch.compile(layer, fullgraph=True, backend=backend)(x)
    torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B, layer.magnitude), grad_y)
    return captured


def main():
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter's kernels cannot be compiled"
    refused = dispatch.choose_impl(torch.device("cpu"))[1]
    print(json.dumps({"case": "reason_without_gpu", "reason": refused}))
    triton.runtime.driver.set_active(_HopperDriver())
    with ExitStack() as stack:
        stack.enter_context(patch("torch.utils._triton.has_triton", lambda *args: True))
        stack.enter_context(taken_for_gpu())
        stack.enter_context(FakeTensorMode())
        for name, options in CASES.items():
            print(json.dumps({"case": name} | capture(**options)))
        for name, space in SIBLINGS.items():
            print(json.dumps({"case": name} | capture_siblings(space)))
        for name, activation in EXPERTS.items():
            print(json.dumps({"case": name} | capture_experts(activation)))


if __name__ == "__main__":
    main()
