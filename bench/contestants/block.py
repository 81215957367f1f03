"""A block of adapted linear layers, a gated MLP or what an attention's input goes to, in every form that competes: the
frozen base, also with a fused GLU, PEFT's LoRA and DoRA, Axolotl's and Unsloth's LoRA, ours layer by layer and
together.

All hold the same parameters, rounded so that each of them can represent them, and share the frozen weights.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import peft
import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from dora_kernels.blocks.fuse import fuse_blocks

from ..measuring.shapes import BlockShape
from ..rows.compare import FUSED_GLU
from . import fused_lora, layer
from .fused_glu import FusedGluMlp, why_no_fused_glu
from .layer import ALPHA_OVER_RANK, DTYPE_NAMES, Contestant, Entry, Problem, patch

PATHS = {"mlp": "model.layers.0.mlp", "qkv": "model.layers.0.self_attn"}


class Projections(LlamaAttention):
    """An attention that ends with the layers of its input."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class OneSequence(nn.Module):
    """A block that takes [batch, sequence, K] alone, for rows of tokens."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return tree_map(lambda y: y[0], self.block(x[None]))


class BlockProblem(NamedTuple):
    """A block's parameters, its input and the gradients that come back, one for each output."""

    name: str  # of `shapes.BLOCKS`
    x: torch.Tensor  # [M, K]
    layers: dict[str, Problem]  # by name; without tokens of their own
    grad_y: torch.Tensor | tuple[torch.Tensor, ...]  # [M, N]

    @property
    def path(self) -> str:
        """Of the block in `_model`."""
        return PATHS[self.name]

    @property
    def rank(self) -> int:
        return next(iter(self.layers.values())).rank


def make_problem(shape: BlockShape, tokens: int, rank: int, dtype: torch.dtype, device: torch.device) -> BlockProblem:
    """Random data at the scales of a trained model, of each layer as `layer.make_problem`'s."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    layers = {
        part.name: layer.make_problem(part, 0, rank, dtype, device, seed)
        for seed, part in enumerate(shape.layers, start=1)
    }
    x, *grads = (normal(tokens, features) for features in (shape.in_features, *shape.outputs))
    return BlockProblem(shape.name, x.requires_grad_(), layers, grads[0] if len(grads) == 1 else tuple(grads))


def empty_problem(shape: BlockShape, tokens: int, rank: int, dtype: torch.dtype, device: str) -> BlockProblem:
    """One without values, for counting."""
    layers = {part.name: layer.empty_problem(part, 0, rank, dtype, device) for part in shape.layers}
    x, *grads = (
        torch.empty(tokens, features, dtype=dtype, device=device) for features in (shape.in_features, *shape.outputs)
    )
    return BlockProblem(shape.name, x.requires_grad_(), layers, grads[0] if len(grads) == 1 else tuple(grads))


def contestants(
    block: str, dtype: torch.dtype, device: torch.device, *, compiled: bool = False, libraries: Iterable[str] = ()
) -> dict[str, Contestant]:
    """By name, in the order of the tables; what the names say is as in `layer`.

    `libraries`: those of `fused_lora` that are installed.
    """
    half, own = dtype != torch.float32, DTYPE_NAMES[dtype]
    settings = [("fp32, autocast", torch.float32, dtype), (own, dtype, None)]
    settings = settings if half else [("fp32", torch.float32, None)]
    found = {"frozen base": Contestant("base", _base)}
    if block == "mlp" and why_no_fused_glu(device) is None:
        found[FUSED_GLU] = Contestant("base", _fused_base)
    for kind, method in (("lora", "LoRA"), ("dora", "DoRA")):
        for name, adapter, autocast in settings:
            found[f"PEFT {method} {name}"] = Contestant(kind, _peft(adapter, autocast, dora=kind == "dora"))
    for library in libraries:
        for name, adapter in {"fp32": torch.float32, own: dtype}.items():
            found[f"{library} LoRA {name}"] = Contestant("lora", _fused_lora(library, adapter))
    name, adapter, autocast = settings[0]
    found[f"PEFT DoRA {name}, patched"] = Contestant("dora", _peft(adapter, autocast, dora=True, patched=True))
    impl = "triton" if device.type == "cuda" else "reference"
    found["ours fp32, auto"] = Contestant("dora", _ours("auto", impl))
    found["ours fp32, layer by layer"] = Contestant("dora", _ours("auto", impl, fused=False))
    for space in ("token", "weight"):
        if not (dtype == torch.float16 and space == "weight"):
            found[f"ours fp32, {space}, {impl}"] = Contestant("dora", _ours(space, impl))
    return layer.compiled_contestants(found) if compiled else found


def counted(block: str, dtype: torch.dtype) -> dict[str, Contestant]:
    """Those of a GPU that can be counted, all libraries taken for installed."""
    found = contestants(block, dtype, torch.device("cuda"))
    fused = {FUSED_GLU: Contestant("base", _fused_base)} if block == "mlp" else {}
    return {"frozen base": found["frozen base"]} | fused | found


def left_out(device: torch.device) -> list[str]:
    """Contestants that are no row here, with the reason."""
    reason = why_no_fused_glu(device)
    return [] if reason is None else [f"{FUSED_GLU}: left out; {reason}"]


def _model(problem: BlockProblem, linear: Callable[[Problem], nn.Module]) -> nn.Module:
    """A model whose block has these layers. The rest of it has no values, and is there for those who look for a
    block."""
    features = {name: part.weight.shape[0] for name, part in problem.layers.items()}
    hidden = problem.x.shape[-1]
    config = LlamaConfig(
        vocab_size=8, hidden_size=hidden, intermediate_size=features.get("gate_proj", 8), num_hidden_layers=1,
        num_attention_heads=hidden // features.get("k_proj", hidden), num_key_value_heads=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).requires_grad_(False)
    for name, part in problem.layers.items():
        model.set_submodule(f"{problem.path}.{name}", linear(part))
    return model


def _block_of(model: nn.Module, problem: BlockProblem) -> nn.Module:
    """The block, which runs its layers alone."""
    block = model.get_submodule(problem.path)
    if problem.name == "qkv":
        del block.o_proj
        block.__class__ = Projections
    return block


def _base(problem: BlockProblem) -> Entry:
    return Entry(_block_of(_model(problem, layer.linear_of), problem), {})


def _fused_base(problem: BlockProblem) -> Entry:
    return Entry(FusedGluMlp(_block_of(_model(problem, layer.linear_of), problem)), {})


def _ours(space: str, impl: str, fused: bool = True) -> Callable[[BlockProblem], Entry]:
    def build(problem: BlockProblem) -> Entry:
        model = _model(problem, lambda part: layer.dora_linear_of(part, torch.float32, space, impl))
        if fused:
            reasons = fuse_blocks(model)
            if reasons.get(problem.path, "it was not looked at") is not None:
                raise RuntimeError(f"{problem.name} is no block: {reasons.get(problem.path)}")
        return _filled(_block_of(model, problem).train(), problem, torch.float32)

    return build


def _peft(adapter_dtype, autocast, *, dora: bool, patched: bool = False) -> Callable[[BlockProblem], Entry]:
    def build(problem: BlockProblem) -> Entry:
        config = peft.LoraConfig(
            r=problem.rank,
            lora_alpha=ALPHA_OVER_RANK * problem.rank,
            target_modules=list(problem.layers),
            use_dora=dora,
        )
        base = _model(problem, layer.linear_of)
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
        entry = _filled(base.get_submodule(problem.path).train(), problem, adapter_dtype)
        if patched:
            patch(model)
        return entry._replace(module=_block_of(base, problem), autocast=autocast)

    return build


def _fused_lora(library: str, adapter_dtype: torch.dtype) -> Callable[[BlockProblem], Entry]:
    fuse = {"mlp": fused_lora.fuse_mlp, "qkv": fused_lora.fuse_qkv}

    def build(problem: BlockProblem) -> Entry:
        entry = _peft(adapter_dtype, None, dora=False)(problem)
        # The input is everybody's: over it no gradient may be written.
        fuse[problem.name](entry.module, library, inplace=False)
        return entry._replace(module=OneSequence(entry.module))

    return build


def _filled(block: nn.Module, problem: BlockProblem, dtype: torch.dtype) -> Entry:
    """The block with the problem's factors, by the names of their gradients and their layers."""
    trained = {}
    for name, part in problem.layers.items():
        factors = layer.filled(layer.factors_of(block.get_submodule(name)), part, dtype)
        trained |= {f"{factor} of {name}": parameter for factor, parameter in factors.items()}
    return Entry(block, trained)
