"""A gated MLP's module whose calls are one function."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..layers.frozen import Freezable
from ..layers.settings import settings
from ..layers.support import why_wrapped
from ..ops.checkpointing import is_selective
from ..ops.dispatch import Plan
from ..ops.dora_mlp import dora_mlp, plan_mlp, why_not_mlp
from ..ops.members import Member


class MlpBlock(NamedTuple):
    """What a fused module carries: its layers' names, and those of the other modules in it."""

    gate: str  # of the layer that holds both gate and up, where `up` is None
    up: str | None
    down: str
    activation: str
    others: tuple[tuple[str, type[nn.Module]], ...]  # such as the activation, with its class


class FusedMlp(nn.Module):
    """Mixed into the class of a gated MLP (`model_class`), whose calls become one `dora_mlp`, or what they were before.

    An instance becomes one by assigning its `__class__`; deepcopy and pickle keep it. Whether a call is fused is
    decided at each call, as adapters may be disabled, merged or exchanged and hooks registered in between.
    """

    model_class: type[nn.Module]
    model_forward: Callable  # the class's own, as it was recognised
    other_forwards: tuple[tuple[type[nn.Module], Callable], ...]  # those of the classes of `MlpBlock.others`
    dora_block: MlpBlock
    dora_settings: dict[str, dict[str, object]]  # by the paths of the module itself and of the others in it

    def forward(self, *args, **kwargs) -> torch.Tensor:
        # A wrapper made while the module was fused may call this after it was given back.
        if not isinstance(self, FusedMlp):
            return type(self).forward(self, *args, **kwargs)
        x = args[0] if len(args) == 1 and not kwargs else None
        trains = self.training or torch.is_grad_enabled()
        if not trains or not isinstance(x, torch.Tensor) or torch.jit.is_tracing():
            return self.model_class.forward(self, *args, **kwargs)
        members = self.members(x.dtype, x.device)
        if isinstance(members, str) or x.ndim < 2 or x.shape[-1] != members[0].lora_A.shape[1] or x.numel() == 0:
            return self.model_class.forward(self, *args, **kwargs)
        down = self.get_submodule(self.dora_block.down)
        y = dora_mlp(x, *members, activation=self.dora_block.activation, **down.block_options._asdict())
        return y.to(x.dtype) if down.keeps_dtype else y

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        # PEFT's `unload` replaces one layer after the other, and knows no blocks.
        layers = [layer for layer in self.dora_block[:3] if layer is not None]
        if name in layers and not any(_holds_dora(self.get_submodule(layer)) for layer in layers):
            unfuse_mlp(self)

    def members(self, dtype: torch.dtype, device: torch.device) -> tuple[Member, Member | None, Member] | str:
        """Gate, up and down as `dora_mlp` takes them for an input, or why each runs alone in the present state."""
        block, found = self.dora_block, []
        if _has_any_global_hook():
            return "a hook of all modules would not see its layers"
        if self.model_class.forward is not self.model_forward:
            return "its class got another forward"
        if any(kind.forward is not forward for kind, forward in self.other_forwards):
            return "the class of a module in it got another forward"
        if is_selective():
            return "selective checkpointing keeps operations inside its layers"
        for name, kind in block.others:
            module = self.get_submodule(name)
            if type(module) is not kind or why_wrapped(module, kept=True):
                return f"{name} is another than it was"
        if changed := self._changed_settings():
            return f"`{changed}` is another than it was"
        for name in (block.gate, block.up, block.down):
            layer = None if name is None else self.get_submodule(name)
            member = layer if layer is None else as_member(layer, dtype)
            if isinstance(member, str):
                return f"{name} {member}"
            found.append(member)
        if len({self.get_submodule(name).block_options for name in (block.gate, block.up, block.down) if name}) > 1:
            return "its layers differ in the space or the implementation that they ask for"
        return why_not_mlp(device, *found) or tuple(found)

    def _changed_settings(self) -> str | None:
        """The name of one that was set since the module became a block: it may say what its own forward computes."""
        for path, own in self.dora_settings.items():
            module = self.get_submodule(path)
            for name, value in own.items():
                if getattr(module, name, None) != value:
                    return f"{path}.{name}".strip(".")
        return None

    def block_plans(self, tokens: int) -> dict[str, Plan] | str:
        """What a call with `tokens` rows would run for each layer in the present mode, or why they run alone."""
        if not self.training:
            return "its layers run alone in inference"
        block = self.dora_block
        down = self.get_submodule(block.down)
        members = self.members(down.base_dtype, down.base_device)
        if isinstance(members, str):
            return f"its layers run alone: {members}"
        options = down.block_options._asdict()
        plan = plan_mlp(*members, tokens=tokens, dtype=down.base_dtype, **options)
        names = [name for name in (block.gate, block.up) if name is not None]
        return dict.fromkeys(names, plan.gate_up) | {block.down: plan.down}

    def __reduce_ex__(self, protocol):
        # The class itself has no name by which pickle could find it.
        _, _, *state = super().__reduce_ex__(protocol)
        return _empty, (self.model_class, tuple(kind for kind, _ in self.other_forwards)), *state


def as_member(layer: nn.Module, dtype: torch.dtype) -> Member | str:
    """The layer as a block computes it, or why it runs alone."""
    # A wrapper would answer for the layer inside, whose weights it may have taken away.
    return layer.as_member(dtype) if isinstance(layer, Freezable) else "is no DoRA layer"


def _holds_dora(module: nn.Module) -> bool:
    return any(isinstance(part, Freezable) for part in module.modules())


def fuse_mlp(module: nn.Module, block: MlpBlock) -> None:
    """Makes a gated MLP's module one whose calls are one function, in place."""
    module.dora_settings = {
        path: settings(module.get_submodule(path)) for path in ("", *(name for name, _ in block.others))
    }
    module.dora_block = block
    module.__class__ = _class_of(type(module), tuple(kind for _, kind in block.others))


def unfuse_mlp(module: FusedMlp) -> None:
    """Gives the module its class back."""
    module.__class__ = _unfused(type(module))
    del module.dora_block, module.dora_settings


def _class_of(model_class, kinds):
    """The class of fused instances of `model_class`, with the forwards that it and `kinds` have now."""
    return _fused_class(model_class, model_class.forward, tuple((kind, kind.forward) for kind in kinds))


@cache
def _fused_class(model_class, forward, others):
    own = {"model_class": model_class, "model_forward": staticmethod(forward), "other_forwards": others}
    return type(f"Fused{model_class.__name__}", (FusedMlp, model_class), own)


@cache
def _unfused(cls):
    """The model's class; of a class that was made over the fused one, as FSDP2 makes it, the like over the model's."""
    if FusedMlp in cls.__bases__:
        return cls.model_class
    bases = tuple(_unfused(base) if issubclass(base, FusedMlp) else base for base in cls.__bases__)
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__.replace("Fused", "", 1), bases, own)


def _empty(model_class, kinds):
    cls = _class_of(model_class, kinds)
    return cls.__new__(cls)
