"""How a convolution reads its input, and its weight as a matrix: what `dora_conv` asks of PyTorch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn import grad

CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
INPUT_GRADIENT = {3: grad.conv1d_input, 4: grad.conv2d_input, 5: grad.conv3d_input}
WEIGHT_GRADIENT = {3: grad.conv1d_weight, 4: grad.conv2d_weight, 5: grad.conv3d_weight}


class Geometry(NamedTuple):
    """A convolution's settings, each tuple with one entry a spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str  # "same" or "valid"
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"

    def widths(self, kernel_size: tuple[int, ...]) -> list[tuple[int, int]]:
        """How much is added before and after each spatial dimension."""
        if self.padding == "valid":
            return [(0, 0)] * len(kernel_size)
        if self.padding == "same":
            totals = [step * (size - 1) for step, size in zip(self.dilation, kernel_size)]
            return [(total // 2, total - total // 2) for total in totals]
        return [(width, width) for width in self.padding]

    def padded(self, x: torch.Tensor, kernel_size: tuple[int, ...]) -> tuple[torch.Tensor, "Geometry"]:
        """x and the geometry with whole zero paddings: what else is added is added to x."""
        widths = self.widths(kernel_size)
        if self.padding_mode == "zeros" and all(before == after for before, after in widths):
            return x, self._replace(padding=tuple(before for before, _ in widths))
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        around = [width for pair in reversed(widths) for width in pair]
        return F.pad(x, around, mode), self._replace(padding=(0,) * len(widths), padding_mode="zeros")

    def convolved(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The convolution of `padded`'s x."""
        return CONV[weight.ndim](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, shape: torch.Size, weight: torch.Tensor, grad_y: torch.Tensor) -> torch.Tensor:
        """The gradient of `padded`'s x, of this shape."""
        return INPUT_GRADIENT[weight.ndim](shape, weight, grad_y, *self._moves)

    def weight_gradient(self, x: torch.Tensor, shape: torch.Size, grad_y: torch.Tensor) -> torch.Tensor:
        """The gradient of a weight of this shape."""
        return WEIGHT_GRADIENT[x.ndim](x, shape, grad_y, *self._moves)

    @property
    def _moves(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups


def is_channels_last(weight: torch.Tensor) -> bool:
    """Whether the channels lie innermost in memory."""
    return not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()


def as_matrix(weight: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """W [N, C, *k] as [N, K], K in the order of memory: a view of a weight that `is_channels_last` says this of."""
    return (weight.movedim(1, -1) if channels_last else weight).flatten(1)


def as_kernel(matrix: torch.Tensor, shape: torch.Size, channels_last: bool) -> torch.Tensor:
    """The inverse of `as_matrix`: a view of [N, K] as [N, C, *k]."""
    if not channels_last:
        return matrix.view(matrix.shape[0], *shape[1:])
    return matrix.view(matrix.shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def as_rows(image: torch.Tensor) -> torch.Tensor:
    """[batch, N, *positions] as [batch · positions, N]: a view where the channels lie innermost."""
    return image.movedim(1, -1).flatten(0, -2)


def as_image(rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[batch · positions, R] as [batch, R, *positions]: a view. `shape` is that of an image with other channels."""
    return rows.view(shape[0], *shape[2:], rows.shape[1]).movedim(-1, 1)
