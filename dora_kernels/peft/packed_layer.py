"""PEFT's LoRA layer over FP8, FP4 and int4 weights, which PEFT itself cannot read: it is shown a decoded layer."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..ops.base_weights import bias_of, is_known_to_peft, keep_packed, weight_of
from ..ops.dispatch import dense_weight


class PackedLoraLinear(Linear):
    """A LoRA layer whose base layer PEFT's code sees as a plain `nn.Linear` of the decoded weight.

    The decoded weight [out_features, in_features] lives as long as one call of PEFT's code, and as autograd keeps it.
    Activations are not quantised, with disabled adapters neither.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs):
        keep_packed(base_layer)
        super().__init__(base_layer, adapter_name, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        out_features, in_features = weight_of(module).shape
        return in_features, out_features

    @contextmanager
    def _decoded(self) -> Iterator[None]:
        packed = self.base_layer
        self._modules["base_layer"] = decoded_linear(packed)
        try:
            yield
        finally:
            self._modules["base_layer"] = packed

    def update_layer(self, *args, **kwargs) -> None:
        """Adds an adapter; PEFT takes dtype, device and the magnitude from the decoded weight."""
        with self._decoded():
            super().update_layer(*args, **kwargs)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        with self._decoded():
            return super().forward(x, *args, **kwargs)

    def merge(self, *args, **kwargs) -> None:
        """Raises ValueError: the format cannot hold the merged weight."""
        raise ValueError(
            f"PEFT cannot merge into a {type(self.base_layer).__name__}, whose weight is quantised: patch_peft the "
            "model, and take the merged weights from merged_weights"
        )


def decoded_linear(layer: nn.Module) -> nn.Linear:
    """A frozen `nn.Linear` with the layer's weight as a matrix, in the dtype that its format decodes to."""
    weight = weight_of(layer)
    with torch.device("meta"):
        linear = nn.Linear(*reversed(weight.shape))
    linear.weight = nn.Parameter(dense_weight(weight, weight.dtype), requires_grad=False)
    linear.bias = bias_of(layer)
    return linear


def packed_lora_layer(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs) -> PackedLoraLinear | None:
    """The layer that PEFT should put in the place of `target`; None where PEFT knows what to do.

    Raises:
        ValueError: the weight is of a format known here, and cannot be read.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not config.use_dora or is_known_to_peft(base):
        return None
    try:
        weight_of(base)
    except ValueError as error:
        raise ValueError(f"{kwargs.get('target_name', 'a layer')} cannot be read: {error}") from error
    return PackedLoraLinear(target, adapter_name, config=config, **kwargs)
