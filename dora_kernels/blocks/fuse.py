"""The blocks of a model: made where they fit, and taken back."""

from torch import nn

from ..layers.blocks_seen import GatedMlp, Siblings
from ..layers.experts import fuse_gates, unfuse_gates
from ..layers.frozen import Freezable
from ..layers.probe import probe
from .mlp import FusedMlp, MlpBlock, fuse_mlp, unfuse_mlp
from .siblings import share_inputs, shared_inputs, unshare_inputs


def fuse_blocks(model: nn.Module) -> dict[str, str | None]:
    """Makes each gated MLP of DoRA layers one function, and lets other DoRA layers of one input compute together, in
    place, until `unfuse_blocks`. Gate and up of experts compute their product, too. Returns, by the path of each module
    that is like a block, why it is none; None where it is one."""
    fuse_gates(model)
    seen = probe(model)
    reasons: dict[str, str | None] = dict(seen.not_blocks)
    for path, mlp in seen.mlps.items():
        module = model.get_submodule(path)
        reasons[path] = why_not_fused(module, mlp)
        if reasons[path] is None and not isinstance(module, FusedMlp):
            fuse_mlp(module, _block(module, mlp))
    for path, groups in seen.siblings.items():
        module = model.get_submodule(path)
        if adapted := tuple(names for group in groups if len(names := _adapted(module, group)) > 1):
            share_inputs(module, adapted)
            reasons[path] = reasons.get(path) if path in seen.mlps else None
    return reasons


def _adapted(module: nn.Module, group: Siblings) -> tuple[str, ...]:
    return tuple(name for name in group.layers if isinstance(module.get_submodule(name), Freezable))


def unfuse_blocks(model: nn.Module) -> None:
    """Gives each block's module its own forward back."""
    unfuse_gates(model)
    for module in fused_blocks(model).values():
        unfuse_block(module)


def unfuse_block(module: nn.Module) -> None:
    """Gives one module its own forward back; any other than a block is left alone."""
    unshare_inputs(module)
    if isinstance(module, FusedMlp):
        unfuse_mlp(module)


def fused_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are blocks, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, FusedMlp) or shared_inputs(module) is not None
    }


def why_not_fused(module: nn.Module, mlp: GatedMlp) -> str | None:
    """Why a gated MLP's layers keep computing alone, or None."""
    for name in (mlp.gate, mlp.up, mlp.down):
        if not isinstance(module.get_submodule(name), Freezable):
            return f"{name} is no DoRA layer"
    if "forward" in vars(module):
        return "its forward was replaced (by accelerate's hooks, or another library)"
    if mlp.up_first:
        return "up comes before gate in their one layer"
    return None


def _block(module: nn.Module, mlp: GatedMlp) -> MlpBlock:
    layers = {mlp.gate, mlp.up, mlp.down}
    others = tuple(
        (name, type(other))
        for name, other in module.named_modules()
        if name and not any(name == layer or name.startswith(f"{layer}.") for layer in layers)
    )
    return MlpBlock(mlp.gate, None if mlp.up == mlp.gate else mlp.up, mlp.down, mlp.activation, others)
