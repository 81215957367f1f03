"""Inference without merging: g is computed once per layer, so that decoding reads W once per token instead of twice.

`Freezable` holds a layer's cached norm and raises if the layer is trained, loaded or moved meanwhile.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..ops.types import NormScale
from . import Model
from .support import check_weights_loaded


class Freezable(nn.Module):
    """A module that may hold n and g, as `dora_linear` takes them. Training, loading or moving it raises meanwhile.

    A subclass has `weight_norm()`, which computes them, and reads `frozen_scale` in its forward.
    """

    frozen_scale: NormScale | None = None

    def freeze(self) -> None:
        """Computes n and g and keeps them. Raises ValueError where the weights are not there."""
        check_weights_loaded(self, "freeze an adapter")
        self.frozen_scale = self.weight_norm()

    def thaw(self) -> None:
        """Forgets them."""
        self.__dict__.pop("frozen_scale", None)

    def train(self, mode: bool = True) -> "Freezable":
        if mode:
            self.refuse_if_frozen("train")
        return super().train(mode)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        self.refuse_if_frozen("load weights")
        self.refuse_base_if_accumulating(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, function, *args, **kwargs) -> "Freezable":
        # Some models call `.to` in each forward: one that changes nothing is let through.
        if self.frozen_scale is not None:
            with torch.no_grad():
                changes = any(function(tensor) is not tensor for tensor in (*self.parameters(), *self.buffers()))
            if changes:
                self.refuse_if_frozen("move or convert the model")
        return super()._apply(function, *args, **kwargs)

    def __getstate__(self) -> dict:
        # A copy or a pickle made inside frozen_adapters is not in its scope.
        return {name: value for name, value in super().__getstate__().items() if name != "frozen_scale"}

    def refuse_if_frozen(self, act: str) -> None:
        """Raises RuntimeError inside `frozen_adapters`, as `act` would make the norm stale."""
        if self.frozen_scale is not None:
            raise RuntimeError(f"cannot {act} inside frozen_adapters: its norms would go stale; leave the scope first")

    def refuse_base_if_accumulating(self, state_dict: Mapping[str, torch.Tensor], prefix: str) -> None:
        """Raises RuntimeError inside `accumulating`, where a weight is to be loaded to which its norms are not held."""
        if not getattr(getattr(self, "output_use", None), "keeps_norm", False):
            return
        own = (*self.named_parameters(), *self.named_buffers())
        given = [prefix + name for name, tensor in own if not tensor.requires_grad and prefix + name in state_dict]
        if given:
            raise RuntimeError(
                f"cannot load {given[0]} inside accumulating: the norms kept there would be of the old weight; leave "
                "the scope first"
            )


@contextmanager
def frozen_adapters(model: Model) -> Iterator[Model]:
    """Inside the scope every DoRA layer of `model`, ours or patched, keeps n and g; leaving it forgets them.

    The model must be in eval mode, and forward must run without gradients: `model.train()`, loading weights, merging,
    unpatching and a forward that autograd would record raise inside the scope. Weights changed in place by other means
    are not seen. A patched PEFT layer keeps n and g of the adapter that is active on entering; any other adapter's are
    computed at each call, and a layer that is left to PEFT stays so. Outputs are the same to the last bit, except in
    weight space in Triton: there another kernel computes W', and may add B A's fp32 products in another order.

    Raises:
        ValueError: no such layer in the model, or weights that are offloaded or sharded. RuntimeError: the model is in
            training mode, or frozen already.
    """
    layers = [module for module in model.modules() if isinstance(module, Freezable)]
    if not layers:
        raise ValueError(
            "frozen_adapters found no DoRA layer of this engine: call apply_dora first, or patch_peft on a PEFT model"
        )
    if any(layer.training for layer in layers):
        raise RuntimeError("frozen_adapters is for inference: call model.eval() first")
    if any(layer.frozen_scale is not None for layer in layers):
        raise RuntimeError("the adapters are frozen already: frozen_adapters does not nest")
    try:
        for layer in layers:
            layer.freeze()
        yield model
    finally:
        for layer in layers:
            layer.thaw()
