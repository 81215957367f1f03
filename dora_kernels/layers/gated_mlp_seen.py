"""Whether a module is a gated MLP, by what one call of it computed."""

from collections import defaultdict
from typing import NamedTuple

import torch

from .dataflow import LayerCall, ModuleCall, Operation, Reference

aten = torch.ops.aten

ACTIVATIONS = {aten.silu.default: ((), "silu"), aten.gelu.default: ((("approximate", "tanh"),), "gelu_tanh")}
"""By the operation: its settings, and the name."""

OTHERS = {"elu", "erf", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "sigmoid", "softplus", "tanh"}
KNOWN = OTHERS | {function.overloadpacket.__name__ for function in ACTIVATIONS}


Makers = dict[int, list[Operation | LayerCall]]
"""By a reference's identity, the steps that made or wrote its tensor."""


class GatedMlp(NamedTuple):
    """A module that takes one tensor x alone and computes down(act(gate(x)) ⊙ up(x)), and nothing else.

    The paths start at the module. One layer may hold gate and up as the halves of its output: then both are its path.
    The model may write over the output afterwards, as `Probe.written` tells of down.
    """

    gate: str
    up: str
    down: str
    activation: str  # "silu" or "gelu_tanh"
    up_first: bool = False  # of two halves, the first is up


def gated_mlp(call: ModuleCall) -> GatedMlp | str | None:
    """The gated MLP that the call computed, what sets it apart from one, or None where it is not like one at all."""
    layers = [step for step in call.steps if isinstance(step, LayerCall)]
    if not call.is_whole or len(layers) < 2:
        return None
    makers = defaultdict(list)
    for step in call.steps:
        for output in step.outputs:
            makers[id(output)].append(step)
    for down in reversed(layers):
        between, sources = _between(down, makers)
        if sources and any(operation.name.rstrip("_") in KNOWN for operation in between):
            if len(sources) == 1 and not any(operation.function in HALVES for operation in between):
                return "has no gate"
            return _why_not_alone(call) or _fit(call, down, between, makers)
    return None


def _between(down: LayerCall, makers: Makers) -> tuple[list[Operation], list[LayerCall]]:
    """The operations between this layer and those before it, the last first, and those layers' calls.

    Nothing where one of the operations, as attention's, is not elementwise in several tensors.
    """
    operations, layers, todo = [], [], list(down.inputs)
    while todo:
        for step in makers.get(id(todo.pop()), ()):
            found = layers if isinstance(step, LayerCall) else operations
            if any(step is known for known in found):
                continue
            found.append(step)
            if found is operations:
                if sum(id(x) in makers for x in step.inputs) > 1 and torch.Tag.pointwise not in step.function.tags:
                    return [], []
                todo += step.inputs
    return operations, layers


def _why_not_alone(call: ModuleCall) -> str | None:
    operations = [step for step in call.steps if isinstance(step, Operation)]
    if any("bernoulli" in operation.name or "dropout" in operation.name for operation in operations):
        return "drops values out in training"
    written = next((operation for operation in operations if operation.is_write), None)
    if written is not None:
        return f"writes in place ({written.name})"
    if any(step.with_grad != call.with_grad for step in call.steps):
        return "turns gradients on or off inside"
    return "is not called with one tensor alone" if call.x is None else None


def _fit(call: ModuleCall, down: LayerCall, between: list[Operation], makers: Makers) -> GatedMlp | str:
    product, *before = between
    activation = next((x for x in before if _activation(x) and any(x.outputs[0] is y for y in product.inputs)), None)
    if product.function is not aten.mul.Tensor or len(product.inputs) != 2:
        return f"computes {product.name} before {call.name_of(down.path)}"
    if activation is None:
        other = next((x for x in before if x.name in KNOWN and not _activation(x)), None)
        return f"activates by {other.name}, not by silu or gelu_tanh" if other else "computes more after its activation"
    linear = next((y for y in product.inputs if y is not activation.outputs[0]), None)
    gate, up = _half(activation.inputs[0], makers), _half(linear, makers)
    if gate is None or up is None:
        other = _maker(linear if gate is not None else activation.inputs[0], makers)
        return f"computes {other.name} between its layers" if other else "has no gate"
    if gate.layer.path == up.layer.path and gate.part == up.part:
        return "has no gate"
    if (gate.layer is up.layer) == (gate.part is None) or (gate.part is None) != (up.part is None):
        return "uses half of a layer's output"
    if gate.layer.shape != up.layer.shape:
        return "multiplies features of different shapes"
    if gate.layer.x is not call.x or up.layer.x is not call.x:
        return "does not give gate and up the tensor that it got"
    used = [gate.layer, up.layer, *gate.split, *up.split, activation, product]
    extra = next((step for step in call.steps if not any(step is one for one in (*used, down))), None)
    if isinstance(extra, Operation):
        return f"computes {extra.name} besides"
    if extra is not None:
        return f"calls {call.name_of(extra.path) or extra.path} besides"
    if down.path in (gate.layer.path, up.layer.path):
        return f"calls {call.name_of(down.path)} twice"
    names = [call.name_of(layer.path) for layer in (gate.layer, up.layer, down)]
    if None in names:
        return "calls a layer outside itself"
    if call.result is None or not any(call.result is y for y in down.outputs):
        return f"returns something else than {names[2]}'s output"
    if any(output() is not None for step in used for output in step.outputs):
        return "keeps a tensor from between its layers"
    return GatedMlp(*names, _activation(activation), up_first=gate.part == 1)


def _activation(operation: Operation) -> str | None:
    settings, name = ACTIVATIONS.get(operation.function, ((), None))
    return name if operation.settings == settings else None


class Half(NamedTuple):
    """Of a layer's output the first half (0) or the second (1), or all of it (None)."""

    layer: LayerCall
    part: int | None
    split: tuple[Operation, ...]


def _maker(tensor: Reference | None, makers: Makers) -> Operation | LayerCall | None:
    return next(iter(makers.get(id(tensor), ())), None)


def _half(tensor: Reference | None, makers: Makers) -> Half | None:
    step = _maker(tensor, makers)
    if isinstance(step, LayerCall):
        return Half(step, None, ())
    layer = _maker(step.inputs[0], makers) if step and step.function in HALVES else None
    if not isinstance(layer, LayerCall):
        return None
    part = HALVES[step.function](step, tensor, layer.shape)
    return None if part is None else Half(layer, part, (step,))


def _part_of_split(step: Operation, tensor: Reference, shape: torch.Size) -> int | None:
    sizes, dim = (*step.settings, 0)[:2]
    half = shape[-1] / 2
    is_half = sizes in (half, [half, half]) and dim in (-1, len(shape) - 1)
    return [output is tensor for output in step.outputs].index(True) if is_half else None


def _part_of_slice(step: Operation, tensor: Reference, shape: torch.Size) -> int | None:
    defaults = (0, None, None, 1)
    dim, start, end, stride = step.settings + defaults[len(step.settings) :]
    size = shape[-1]
    if dim not in (-1, len(shape) - 1):
        return None
    return {(0, size / 2, 1): 0, (size / 2, size, 1): 1}.get(slice(start, end, stride).indices(size))


HALVES = {
    aten.split.Tensor: _part_of_split,
    aten.split_with_sizes.default: _part_of_split,
    aten.slice.Tensor: _part_of_slice,
}
