"""Layers, siblings and experts to be compiled, and what `torch.compile` makes of them."""

import re
from functools import partial

import torch
from torch._functorch.aot_autograd import aot_module_simplified

import dora_kernels as dk
from dora_kernels.ops.dora_experts import dora_experts
from dora_kernels.ops.dora_siblings import dora_siblings
from dora_kernels.ops.members import Member
from dora_kernels.ops.types import Rounding


def call_names(module):
    """The operators that a graph calls, our functions by their own names, bodies of autograd functions included."""
    names = []
    for graph_module in module.modules():
        if not isinstance(graph_module, torch.fx.GraphModule):
            continue
        for node in graph_module.graph.nodes:
            text = next((value for value in (*node.args, *node.kwargs.values()) if isinstance(value, str)), "")
            if ours := re.match(r"ops\.\w+", text):
                names.append(ours[0])
            elif node.op == "call_function":
                names.append(getattr(node.target, "__name__", str(node.target)))
            elif node.op == "call_method":
                names.append(node.target)
    return names


def problem(*, bias=False, R=16, **options):
    """A layer in training, its input and the gradient of its output."""
    M, N, K, dtype = 64, 48, 80, torch.bfloat16
    linear = torch.nn.Linear(K, N, bias=bias, dtype=dtype)
    layer = dk.DoraLinear.from_linear(linear, r=R, lora_alpha=32, impl="reference", **options).train()
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer, torch.randn(2, M // 2, K, dtype=dtype).requires_grad_(), torch.randn(2, M // 2, N, dtype=dtype)


def layer_call(*, dynamic=False, **options):
    """A call, the tensors that it is differentiated by, and its gradients."""
    layer, x, grad_y = problem(**options)
    layer.impl = "triton"
    if dynamic:
        torch._dynamo.maybe_mark_dynamic(x, 1)  # of CPU tensors torch 2.11 takes it for a constant after all
    return lambda: (layer(x),), [x, layer.lora_A, layer.lora_B, layer.magnitude], [grad_y]


def siblings_call(space):
    """Of layers of one input whose norms have one launch, and whose W' have one."""
    K, R = 80, 16

    def member(N):
        factors = [torch.randn(*shape).requires_grad_() for shape in ((R, K), (N, R), (N,))]
        return Member(torch.randn(N, K, dtype=torch.bfloat16), *factors, None, 2.0, Rounding("dithered", N))

    members = [member(48), member(32)]
    x, *grads = (torch.randn(64, size, dtype=torch.bfloat16) for size in (K, 48, 32))
    leaves = [x.requires_grad_(), *(factor for member in members for factor in member.factors)]
    return lambda: dora_siblings(x, members, space=space, impl="triton"), leaves, grads


def experts_call(activation):
    """Of a stack of experts, one of which has no token."""
    E, S, N, K, R = 4, 64, 48, 80, 16
    weight, x = torch.randn(E, N, K, dtype=torch.bfloat16), torch.randn(S, K, dtype=torch.bfloat16)
    leaves = [x, *(torch.randn(shape) for shape in ((E, R, K), (E, N, R), (E, N)))]
    ends = torch.tensor([20, 20, 30, S], dtype=torch.int32)
    x, lora_A, lora_B, magnitude = [leaf.requires_grad_() for leaf in leaves]

    def call():
        return (
            dora_experts(
                x, weight, lora_A, lora_B, magnitude, ends, scaling=2.0, impl="triton", activation=activation
            ),
        )  # fmt: skip

    return call, leaves, [torch.randn(S, N if activation is None else N // 2, dtype=torch.bfloat16)]


CALLS = {
    "token space, bias, rank 64": partial(layer_call, space="token", bias=True, R=64),
    "token space, dropout": partial(layer_call, space="token", lora_dropout=0.1, dropout_mode="peft"),
    "weight space": partial(layer_call, space="weight"),
    # The number of tokens as a symbol, on which dispatch decides.
    "any number of tokens": partial(layer_call, space="auto", dynamic=True),
    "siblings, token space": partial(siblings_call, "token"),
    "siblings, weight space": partial(siblings_call, "weight"),
    "experts": partial(experts_call, None),
    "experts, gate times up": partial(experts_call, "silu"),
}


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
