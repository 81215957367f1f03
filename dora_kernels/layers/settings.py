"""What a module's forward may read besides its parameters: plain attributes, its own and its class's."""

import copy
from functools import cache
from types import CodeType, FunctionType

import torch
from torch import nn

from .valueless import watched_layers

PLAIN = (bool, int, float, str, type(None), torch.dtype)
CONTAINERS = (tuple, list, dict, set, frozenset)
NO_SETTINGS = {"training", "name_or_path", *vars(nn.Module())}


def settings(module: nn.Module) -> dict[str, object]:
    """The values by name, containers copied.

    A whole number that no method names is none, as it may be the layer's own, nor is what is private and not named.
    """
    named, of_class = names_read(type(module)), _of_class(type(module))
    found = {}
    for name in sorted({*vars(module), *(named & of_class.keys())} - NO_SETTINGS):
        value = vars(module).get(name, of_class.get(name))
        if name not in named and (type(value) is int or name.startswith("_")):
            continue
        if isinstance(value, PLAIN):
            found[name] = value
        elif type(value) in CONTAINERS and not _holds_tensors(value):
            found[name] = copy.deepcopy(value)
    return found


def have_same_settings(one: nn.Module, other: nn.Module) -> bool:
    """Of the parts that are around their layers, by path."""
    return _settings_around_layers(one) == _settings_around_layers(other)


def _settings_around_layers(module: nn.Module) -> dict[str, dict[str, object]]:
    layers = watched_layers(module)
    return {
        path: settings(part)
        for path, part in module.named_modules()
        if not any(f"{path}.".startswith(f"{layer}.") for layer in layers)
    }


def _holds_tensors(value) -> bool:
    parts = (*value, *value.values()) if isinstance(value, dict) else value
    return any(_holds_tensors(part) if type(part) in CONTAINERS else not isinstance(part, PLAIN) for part in parts)


def _of_class(kind: type[nn.Module]) -> dict[str, object]:
    """The attributes of a class and those that it inherits, up to PyTorch's. A property is not asked for its value."""
    return {name: value for base in reversed(_own_classes(kind)) for name, value in vars(base).items()}


def _own_classes(kind: type[nn.Module]) -> tuple[type, ...]:
    return kind.__mro__[: kind.__mro__.index(nn.Module)]


@cache
def names_read(kind: type[nn.Module]) -> frozenset[str]:
    """The names of attributes in the code of a class's methods, its constructor left out."""
    methods = [
        method
        for base in _own_classes(kind)
        for name, method in vars(base).items()
        if isinstance(method, FunctionType) and name != "__init__"
    ]
    return frozenset(name for method in methods for name in _names(method.__code__))


def _names(code: CodeType) -> set[str]:
    # A text may name an attribute, as of `getattr`.
    inner = [_names(part) for part in code.co_consts if isinstance(part, CodeType)]
    return {*code.co_names, *(part for part in code.co_consts if isinstance(part, str))}.union(*inner)
