"""The layers of a decoder, members of a list: one of each kind runs, and the others let their input pass."""

import weakref
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from dora_kernels.layers.valueless import signature


def kinds(model: nn.Module, targets: Iterable[str]) -> dict[str, tuple]:
    """Of each member of a list, by its path: the list, what the member is built of, and which of its parts are
    targets. A list inside a member is a part."""
    found: dict[str, tuple] = {}
    for path, members in model.named_modules():
        if not isinstance(members, nn.ModuleList) or any(path.startswith(f"{member}.") for member in found):
            continue
        for name, member in members.named_children():
            own = f"{path}.{name}"
            if any(True for _ in member.children()):
                parts = frozenset(target.removeprefix(own) for target in targets if target.startswith(f"{own}."))
                found[own] = (path, signature(member), parts)
    return found


def examples(kinds: dict[str, tuple]) -> dict[str, str]:
    """Of each member, by its path, the one that runs for it: the first of its kind. A list's first member, whose input
    may have no gradient, runs for itself alone."""
    firsts = {kind[0]: path for path, kind in reversed(kinds.items())}
    chosen: dict[tuple, str] = {}
    for path, kind in kinds.items():
        if path != firsts[kind[0]]:
            chosen.setdefault(kind, path)
    return {path: path if path == firsts[kind[0]] else chosen[kind] for path, kind in kinds.items()}


def ignore(event: str, path: str) -> None:
    pass


class Running:
    """A member that runs. `noted` is told when it begins, when it has ended, and when its backward begins."""

    noted: Callable[[str, str], None] = staticmethod(ignore)
    path: str
    form: tuple

    def __call__(self, *args, **kwargs):
        self.noted("forward", self.path)
        output = super().__call__(*args, **kwargs)
        self.noted("after", self.path)
        leaves, spec = tree_flatten(output)
        # Weakly: what is held here would be counted.
        self.form = [weakref.ref(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec
        hidden = first_tensor(leaves)
        if hidden.requires_grad:
            noted, path = self.noted, self.path
            hidden.register_hook(lambda grad: noted("backward", path))
        return output


class Passing:
    """A member without parts: it returns its input, in the form of its example's output."""

    noted: Callable[[str, str], None] = staticmethod(ignore)
    path: str
    example: tuple[Running]  # in a tuple: it is no part

    def __call__(self, *args, **kwargs):
        self.noted("forward", self.path)
        leaves, spec = self.example[0].form
        place = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, weakref.ref))
        others = [leaf() if isinstance(leaf, weakref.ref) else leaf for leaf in leaves]
        return tree_unflatten([*others[:place], first_tensor((args, kwargs)), *others[place + 1 :]], spec)


def first_tensor(tree) -> torch.Tensor:
    """The hidden states among a layer's arguments or results."""
    return next(leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def reduce(model: nn.Module, examples: dict[str, str]) -> None:
    """Makes each example a `Running`, each other member a `Passing`: both of the member's class and with its
    settings."""
    for path in dict.fromkeys(examples.values()):
        member = model.get_submodule(path)
        member.__class__, member.path = _as(Running, type(member)), path
    for path, example in examples.items():
        if path != example:
            member = model.get_submodule(path)
            passing = nn.Module()
            settings = {k: v for k, v in vars(member).items() if k not in vars(passing)}
            vars(passing).update(settings, path=path, example=(model.get_submodule(example),))
            passing.__class__ = _as(Passing, type(member))
            model.set_submodule(path, passing)


@cache
def _as(role: type, member_class: type) -> type:
    return type(member_class.__name__, (role, member_class), {"__module__": member_class.__module__})
