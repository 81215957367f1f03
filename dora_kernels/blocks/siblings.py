"""Layers that share an input, computed together by the first of them that is called.

Hooks of the module around the layers open such a call before its forward, and close it after. Each layer's forward asks
it for the output. The forwards of the model stay as they are. In between a patched layer carries the handles of those
hooks, for PEFT takes it away.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..layers.frozen import Freezable
from ..ops.base_weights import sharding_of
from ..ops.checkpointing import checkpoint_hook, is_selective
from ..ops.dispatch import Plan
from ..ops.dora_siblings import dora_siblings, plan_siblings, why_not_siblings
from ..ops.members import Member
from ..ops.output import WriteCounter
from .mlp import as_member


class SharedCall:
    """One call of a module, in which some of its layers get one input.

    The first layer that is called computes the outputs of all, at most once, and keeps the others' for their calls with
    that input. A layer that is called otherwise computes alone: with another tensor, or after a write to it, a second
    time, or in another mode of autograd's.
    """

    def __init__(self, layers: dict[str, nn.Module]):
        self._layers, self._mode = layers, _mode()
        self._was_asked = False
        self._outputs: list[torch.Tensor | None] = []
        self._x = self._writes = self._autocast = None

    def output(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's output for x, or None where it computes alone."""
        if not self._was_asked:
            self._was_asked = True
            self._compute(x)
        elif x is not self._x or self._has_changed():
            self._outputs, self._x = [], None
        if not self._outputs:
            return None
        y = None
        for index, each in enumerate(self._layers.values()):
            if each is layer:
                y, self._outputs[index] = self._outputs[index], None
        return y

    def _compute(self, x):
        layers = list(self._layers.values())
        trains = layers[0].training or torch.is_grad_enabled()
        if not trains or self._mode != _mode() or not _is_plain(x):
            return
        members = members_of_layers(self._layers, x.dtype, x.device)
        if isinstance(members, str) or x.shape[-1] != members[0].lora_A.shape[1]:
            return
        self._x, self._autocast = x, _autocast(x)
        self._writes = None if torch.compiler.is_compiling() else WriteCounter(x)
        self._outputs = list(dora_siblings(x, members, **layers[0].block_options._asdict()))

    def _has_changed(self):
        written = self._writes is not None and self._writes.has_moved
        return written or self._mode != _mode() or self._autocast != _autocast(self._x)


@dataclass(frozen=True)
class OpenShared:
    """The hook before a module's forward. `groups` are the names of the layers that share an input."""

    groups: tuple[tuple[str, ...], ...]

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if not (module.training or torch.is_grad_enabled()) or torch.jit.is_tracing():
            return
        for names in self.groups:
            layers = _layers(module, names)
            # A wrapper would answer for the layer inside, whose weights it may have taken away.
            if all(isinstance(layer, Freezable) for layer in layers.values()):
                call = SharedCall(layers)
                for layer in layers.values():
                    layer.shared_call = call

    def block_plans(self, module: nn.Module, tokens: int) -> list[tuple[tuple[str, ...], dict[str, Plan] | str]]:
        """For each group, what a call with `tokens` rows would run in the present mode, or why its layers run alone."""
        return [(names, _plans(module, names, tokens)) for names in self.groups]


@dataclass(frozen=True)
class CloseShared:
    """The hook after a module's forward, also where that raises."""

    groups: tuple[tuple[str, ...], ...]

    def __call__(self, module: nn.Module, *_) -> None:
        for names in self.groups:
            for layer in _layers(module, names).values():
                if isinstance(layer, Freezable):
                    layer.shared_call = None


def share_inputs(module: nn.Module, groups: tuple[tuple[str, ...], ...]) -> None:
    """Lets each group of the module's layers compute together, until `unshare_inputs`."""
    unshare_inputs(module)
    opens = module.register_forward_pre_hook(OpenShared(groups))
    closes = module.register_forward_hook(CloseShared(groups), always_call=True)
    for names in groups:
        for layer in _layers(module, names).values():
            if hasattr(layer, "shared_hooks"):
                layer.shared_hooks = opens, closes


def unshare_inputs(module: nn.Module) -> None:
    """Takes back what `share_inputs` did, if it did."""
    shared = shared_inputs(module)
    for names in () if shared is None else shared.groups:
        for layer in _layers(module, names).values():
            if layer is not None:
                vars(layer).pop("shared_hooks", None)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, (OpenShared, CloseShared))]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def shared_inputs(module: nn.Module) -> OpenShared | None:
    """What `share_inputs` left on the module."""
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, OpenShared)), None)


def members_of_layers(layers: dict[str, nn.Module], dtype: torch.dtype, device: torch.device) -> list[Member] | str:
    """The layers as `dora_siblings` takes them for an input, or why each runs alone in the present state."""
    if is_selective():
        return "selective checkpointing keeps operations inside its layers"
    members = []
    for name, layer in layers.items():
        member = as_member(layer, dtype)
        if isinstance(member, str):
            return f"{name} {member}"
        if layer._compiled_call_impl is not None:
            return f"{name} is compiled alone"
        if not isinstance(member.weight, torch.Tensor) and _cast_to(dtype, device) != dtype:
            return f"{name} is quantised and answers in the dtype of its input, which autocast changes"
        members.append(member)
    if len({layer.block_options for layer in layers.values()}) > 1:
        return "its layers were given different forms"
    return why_not_siblings(device, members) or members


def _plans(module, names, tokens):
    layers = _layers(module, names)
    if not all(isinstance(layer, Freezable) for layer in layers.values()):
        return "one is no DoRA layer any more"
    if not module.training:
        return "the model is in eval mode"
    first = layers[names[0]]
    members = members_of_layers(layers, first.base_dtype, first.base_device)
    if isinstance(members, str):
        return members
    plan = plan_siblings(members, tokens=tokens, dtype=first.base_dtype, **first.block_options._asdict())
    return dict.fromkeys(names, plan)


def _layers(module, names):
    """By name; None where the module has no such layer any more."""
    found = {}
    for name in names:
        layer = module
        for part in name.split("."):
            layer = getattr(layer, part, None)
        found[name] = layer
    return found


def _is_plain(x):
    """An input whose writes are counted, and that every layer takes."""
    if not isinstance(x, torch.Tensor) or sharding_of(x):
        return False
    if not torch.compiler.is_compiling() and (torch.is_inference_mode_enabled() or x.is_inference()):
        return False
    return x.ndim > 1 and x.numel() > 0 and x.is_floating_point()


def _mode():
    """What autograd does with a call: a checkpointed region may hold one of the layers alone."""
    return torch.is_grad_enabled(), checkpoint_hook()


def _autocast(x):
    return _cast_to(x.dtype, x.device)


def _cast_to(dtype, device):
    """What autocast makes of an input."""
    is_on = device.type != "meta" and torch.is_autocast_enabled(device.type) and dtype != torch.float64
    return torch.get_autocast_dtype(device.type) if is_on else dtype
