"""The frozen base's gated MLP with silu(gate) ⊙ up as one pass each way: the floor of whoever fuses a block.

On a GPU the passes are Liger's. Elsewhere they are PyTorch's operations, each counted as the one launch that it stands
for.
"""

import torch
import torch.nn.functional as F
from torch import nn


def why_no_fused_glu(device: torch.device) -> str | None:
    """Why the passes cannot run fused on `device`; None if they can."""
    if device.type != "cuda":
        return f"on {device.type} no library fuses it"
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # noqa: F401
    except Exception as error:  # Whatever a library raises on import: it is a row less.
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
    return None


class FusedGluMlp(nn.Module):
    """down(silu(gate(x)) ⊙ up(x)) of an MLP's own layers, which keep their names."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))


def fuse_glu(model: nn.Module) -> nn.Module:
    """The model with the MLP of each decoder layer replaced."""
    for layer in model.model.layers:
        layer.mlp = FusedGluMlp(layer.mlp)
    return model


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) ⊙ up. The backward writes over both."""
    if gate.is_cuda:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(gate, up)
    return _SiluMul.apply(gate, up)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return silu_mul_forward(gate, up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        silu_mul_backward(grad, gate, up)
        return gate, up


@torch.library.custom_op("bench::silu_mul_forward", mutates_args=())
def silu_mul_forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) ⊙ up."""
    return F.silu(gate) * up


@silu_mul_forward.register_fake
def _(gate, up):
    return torch.empty_like(gate)


@torch.library.custom_op("bench::silu_mul_backward", mutates_args=("gate", "up"))
def silu_mul_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> None:
    """Writes the gradients of gate and up over them, as Liger's kernel does."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    sigmoid = torch.sigmoid(wide)
    grad_gate = grad * up * sigmoid * (1 + wide * (1 - sigmoid))
    up.copy_(grad * wide * sigmoid)
    gate.copy_(grad_gate)


@silu_mul_backward.register_fake
def _(grad, gate, up):
    return None
