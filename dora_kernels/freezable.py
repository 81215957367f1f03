"""What a layer needs to keep its norm inside `frozen_adapters`: a place for it, and a guard against what ages it."""

import torch
from torch import nn

from .offloading import refuse_absent


class Freezable(nn.Module):
    """A module that may hold n and g, as `dora_linear` takes them; train, load, move or convert it then, and it raises.

    A subclass has `weight_norm()`, which computes them, and reads `frozen_scale` in its forward.
    """

    frozen_scale: tuple[torch.Tensor, torch.Tensor] | None = None

    def freeze(self) -> None:
        """Computes n and g and keeps them. Raises ValueError where the weights are not there."""
        refuse_absent(self, "freeze an adapter")
        self.frozen_scale = self.weight_norm()

    def thaw(self) -> None:
        """Forgets them."""
        self.__dict__.pop("frozen_scale", None)

    def train(self, mode: bool = True) -> "Freezable":
        if mode:
            self.refuse_if_frozen("train")
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.refuse_if_frozen("load weights")
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args, **kwargs) -> "Freezable":
        self.refuse_if_frozen("move or convert the model")
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        # A copy or a pickle made inside frozen_adapters is not in its scope.
        return {name: value for name, value in super().__getstate__().items() if name != "frozen_scale"}

    def refuse_if_frozen(self, act: str) -> None:
        """Raises RuntimeError inside `frozen_adapters`, as `act` would make the norm stale."""
        if self.frozen_scale is not None:
            raise RuntimeError(f"cannot {act} inside frozen_adapters: its norms would go stale; leave the scope first")
