"""Which modules of a model are blocks, by what they compute: a gated MLP, or linear layers that share an input."""

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
    """

    gate: str
    up: str
    down: str
    activation: str  # "silu" or "gelu_tanh"
    up_first: bool = False  # of two halves, the first is up


class Siblings(NamedTuple):
    """A module's own linear layers that get one tensor in each of its calls, and each once.

    Nothing writes to the tensor between the layers, nor ever to their outputs.
    """

    layers: tuple[str, ...]  # in the order of their calls; the paths start at the module


class Blocks(NamedTuple):
    """What was found, by the modules' paths."""

    mlps: dict[str, GatedMlp]
    siblings: dict[str, tuple[Siblings, ...]]
    not_blocks: dict[str, str]  # what a module does that a block does not, where it nearly is one


class BlocksSeen:
    """Collects the calls of a model's modules. What holds in all of a module's calls makes it a block."""

    def __init__(self):
        self._mlps: dict[str, list[GatedMlp | str | None]] = defaultdict(list)
        self._inputs: dict[str, list[dict[str, tuple]]] = defaultdict(list)

    def forget(self) -> None:
        self._mlps.clear()
        self._inputs.clear()

    def returned(self, call: ModuleCall) -> None:
        self._mlps[call.path].append(gated_mlp(call))
        self._inputs[call.path].append(_inputs(call))

    def found(self, written: frozenset[str]) -> Blocks:
        """Of all calls. `written` are the paths of the layers whose output is written over."""
        mlps, reasons = {}, {}
        for path, verdicts in self._mlps.items():
            first = next((v for v in verdicts if isinstance(v, str)), None)
            if first is None and len(set(verdicts)) > 1:
                first = "does not compute the same in every call"
            if first is not None:
                reasons[path] = first
            elif verdicts[0] is not None:
                mlps[path] = verdicts[0]
        # The innermost module counts, of two that do the same.
        mlps = {path: mlp for path, mlp in mlps.items() if not any(_is_inside(other, path) for other in mlps)}
        reasons = {
            path: reason
            for path, reason in reasons.items()
            if not any(_is_inside(path, mlp) or _is_inside(mlp, path) for mlp in mlps)
            and not any(_is_inside(other, path) for other in reasons)
        }
        used = {_join(path, name) for path, mlp in mlps.items() for name in (mlp.gate, mlp.up)}
        siblings = {}
        for path, calls in self._inputs.items():
            names = [name for name in calls[0] if _join(path, name) not in used]
            groups, reason = _siblings(names, calls, {name for name in names if _join(path, name) in written})
            if groups:
                siblings[path] = groups
            if reason is not None and path not in mlps:
                reasons.setdefault(path, reason)
        return Blocks(mlps, siblings, reasons)


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _inputs(call: ModuleCall) -> dict[str, tuple]:
    """By the names of the module's own layers, of each of its calls the input's number and the writes to it so far."""
    numbers, inputs = {}, defaultdict(tuple)
    for layer in call.children:
        number = numbers.setdefault(id(layer.x), len(numbers)) if layer.x is not None else None
        inputs[call.name_of(layer.path)] += ((number, layer.writes),)
    return dict(inputs)


def _siblings(names: list[str], calls: list[dict[str, tuple]], written: set[str]) -> tuple[tuple, str | None]:
    """The groups among the names, and why others that share an input in the first call form none."""
    groups, sharing = defaultdict(list), defaultdict(list)
    for name in names:
        if (number := calls[0][name][0][0]) is not None:
            sharing[number].append(name)
            key = tuple(call.get(name) for call in calls)
            if name not in written and all(inputs is not None and len(inputs) == 1 for inputs in key):
                groups[key].append(name)
    found = tuple(Siblings(tuple(group)) for group in groups.values() if len(group) > 1)
    grouped = {name for group in found for name in group.layers}
    for together in sharing.values():
        for name in together:
            if len(together) > 1 and name not in grouped:
                return found, _why_no_sibling(name, together, calls, written)
    return found, None


def _why_no_sibling(name: str, together: list[str], calls: list[dict[str, tuple]], written: set[str]) -> str:
    if name in written:
        return f"has {name}'s output written over"
    if any(len(call.get(name, ())) > 1 for call in calls):
        return f"calls {name} more than once"
    if len({calls[0][other][0] for other in together}) > 1:
        return f"writes over the input of {' and '.join(together)} between their calls"
    return f"does not give {' and '.join(together)} one input in every call"


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
        between = _between(down, makers)
        if any(operation.name in KNOWN for operation in between):
            return _why_not_alike(call, between) or _fit(call, down, between, makers)
    return None


def _between(down: LayerCall, makers: Makers) -> list[Operation]:
    """The operations that lead from other layers to this one, the last first. None if one mixes several features."""
    between, reached, todo = [], False, list(down.inputs)
    while todo:
        for step in makers.get(id(todo.pop()), ()):
            if isinstance(step, LayerCall):
                reached = True
            elif not any(step is known for known in between):
                if sum(id(x) in makers for x in step.inputs) > 1 and torch.Tag.pointwise not in step.function.tags:
                    return []
                between.append(step)
                todo += step.inputs
    return between if reached else []


def _why_not_alike(call: ModuleCall, between: list[Operation]) -> str | None:
    if any("bernoulli" in operation.name or "dropout" in operation.name for operation in between):
        return "drops values out in training"
    written = next((step for step in call.steps if isinstance(step, Operation) and step.is_write), None)
    if written is not None:
        return f"writes in place ({written.name})"
    if call.x is None:
        return "is not called with one tensor alone"
    return "has no gate" if len(between) == 1 else None


def _fit(call: ModuleCall, down: LayerCall, between: list[Operation], makers: Makers) -> GatedMlp | str:
    product, *before = between
    activation = next((x for x in before if _activation(x) and any(x.outputs[0] is y for y in product.inputs)), None)
    if product.function is not aten.mul.Tensor or len(product.inputs) != 2:
        return f"computes {product.name} before {call.name_of(down.path)}"
    if activation is None:
        other = next((x for x in before if x.name in KNOWN and not _activation(x)), None)
        return f"activates by {other.name}, not by silu or gelu_tanh" if other else "computes more after its activation"
    linear = next(y for y in product.inputs[::-1] if y is not activation.outputs[0])
    gate, up = _half(activation.inputs[0], makers), _half(linear, makers)
    if gate is None or up is None:
        other = next((x for x in before if x is not activation and x.function not in HALVES), activation)
        return f"computes {other.name} between its layers"
    if gate.layer.path == up.layer.path and gate.part == up.part:
        return "has no gate"
    if (gate.layer is up.layer) == (gate.part is None) or (gate.part is None) != (up.part is None):
        return "uses half of a layer's output"
    used = [gate.layer, up.layer, *gate.split, *up.split, activation, product]
    extra = next((step for step in call.steps if not any(step is one for one in (*used, down))), None)
    if isinstance(extra, Operation):
        return f"computes {extra.name} besides"
    if extra is not None:
        return f"calls {call.name_of(extra.path) or extra.path} besides"
    names = [call.name_of(layer.path) for layer in (gate.layer, up.layer, down)]
    if None in names:
        return "calls a layer outside itself"
    if gate.layer.x is not call.x or up.layer.x is not call.x:
        return f"does not give {names[0]} and {names[1]} the tensor that it got"
    if call.result is None or call.result is not down.outputs[0]:
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


def _half(tensor: Reference, makers: Makers) -> Half | None:
    step = next(iter(makers.get(id(tensor), ())), None)
    if isinstance(step, LayerCall):
        return Half(step, None, ())
    layer = next(iter(makers.get(id(step.inputs[0]), ())), None) if step and step.function in HALVES else None
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
    dim, start, end, stride = (*step.settings, 0, None, None, 1)[:4] if step.settings else (0, None, None, 1)
    size = shape[-1]
    if stride != 1 or dim not in (-1, len(shape) - 1):
        return None
    bounds = (start or 0, size if end is None else min(end, size))
    return {(0, size / 2): 0, (size / 2, size): 1}.get(bounds)


HALVES = {
    aten.split.Tensor: _part_of_split,
    aten.split_with_sizes.default: _part_of_split,
    aten.slice.Tensor: _part_of_slice,
}
