"""Which modules of a model are blocks: gated MLPs, and those whose linear layers share an input."""

from collections import defaultdict
from typing import NamedTuple

from .dataflow import ModuleCall
from .gated_mlp_seen import GatedMlp, gated_mlp


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
    """By the names of the module's own layers, what each of their calls got: the input's number, the writes to it so
    far, and whether gradients were on.
    """
    numbers, inputs = {}, defaultdict(tuple)
    for layer in call.children:
        number = numbers.setdefault(id(layer.x), len(numbers)) if layer.x is not None else None
        inputs[call.name_of(layer.path)] += ((number, layer.writes, layer.with_grad),)
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
    if len({calls[0][other][0][:2] for other in together}) > 1:
        return f"writes over the input of {' and '.join(together)} between their calls"
    return f"does not call {' and '.join(together)} alike in every call"
