"""A copy of a model without values: fake tensors, and one of the layers that repeat."""

import copy
from types import BuiltinFunctionType, FunctionType

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.base_weights import is_fp8_experts, is_quantized
from .conv import CONVOLUTIONS, DoraConv, plain_conv
from .embedding import DoraEmbedding, plain_embedding
from .experts import Adapters
from .support import LINEAR_CLASSES

OTHERS = (*CONVOLUTIONS.values(), nn.Embedding)

ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
aten = torch.ops.aten
FUNCTIONS = (FunctionType, BuiltinFunctionType)
PLAIN = (bool, float, str, type(None))
NO_SETTINGS = ("training", "name_or_path")  # of models that do the same: whether they train, and where they lay


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers by path, quantised and wrapped ones too."""
    return {path: layer for path, layer in watched_layers(model).items() if _is_linear(layer)}


def watched_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by path that an adapter can be on, linear, convolutions and embeddings, and those that have one."""
    found: dict[str, nn.Module] = {}
    last = None
    for path, module in model.named_modules():
        # PEFT's layers hold the one below, and the modules of the adapter.
        inside = last is not None and path.startswith(f"{last}.")
        if path and not inside and (_wraps(module) or _can_have_one(module)):
            found[path] = module
            last = path
    return found


def _can_have_one(module: nn.Module) -> bool:
    # The weight of a parametrization is computed from others.
    others = isinstance(module, OTHERS) and "weight" in module._parameters
    return others or isinstance(module, LINEAR_CLASSES) or is_quantized(module)


def _wraps(module: nn.Module) -> bool:
    """Whether it is a layer with an adapter, PEFT's or ours."""
    return hasattr(module, "in_features") and hasattr(module, "lora_A")


def _is_linear(layer: nn.Module) -> bool:
    base = getattr(layer, "base_layer", None) or layer
    return not isinstance(base, (DoraConv, DoraEmbedding, *OTHERS))


def repeats(model: nn.Module) -> dict[str, str]:
    """The paths of modules in a list that are like one before them, and that one's path."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{repeat}.") for repeat in found):
            continue
        firsts: dict[tuple, str] = {}
        for name, child in module.named_children():
            own = f"{path}.{name}" if path else name
            has_parts = not _wraps(child) and any(True for _ in child.children())
            if has_parts and (first := firsts.setdefault(signature(child), own)) != own:
                found[own] = first
    return found


def path_of_first(path: str, like: dict[str, str]) -> str:
    """The path of the module that runs in this one's place, its own if it runs itself."""
    first = ""
    for part in path.split("."):
        first = f"{first}.{part}" if first else part
        first = like.get(first, first)
    return first


def signature(module: nn.Module) -> tuple:
    """Classes, shapes and settings, functions too. A whole number is none: it may be the layer's own."""
    return tuple(
        (
            path,
            type(part),
            type(part).forward,  # a library may have given the class another
            tuple((name, tuple(p.shape)) for name, p in part._parameters.items() if p is not None),
            tuple((name, tuple(b.shape)) for name, b in part._buffers.items() if b is not None),
            tuple((k, v) for k, v in vars(part).items() if type(v) in PLAIN and k not in NO_SETTINGS),
            tuple((k, getattr(v, "__code__", v)) for k, v in vars(part).items() if isinstance(v, FUNCTIONS)),
        )
        for path, part in module.named_modules()
    )


def valueless(model: nn.Module, like: dict[str, str]) -> nn.Module:
    """A copy whose tensors are all fake. Call it in a `FakeTensorMode`.

    Quantised and wrapped layers become plain ones, the modules of `like` a `Repeat`.
    """
    stand_ins = {path: Repeat() for path in like}
    known: dict[int, object] = {id(model.get_submodule(path)): repeat for path, repeat in stand_ins.items()}
    dtype = next((p.dtype for p in model.parameters() if p.dtype in ACTIVATIONS), torch.float32)
    for layer in watched_layers(model).values():
        if id(layer) not in known and (_wraps(layer) or is_quantized(layer)):
            known[id(layer)] = _plain_layer(layer, dtype)
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in known:
                known[id(tensor)] = _fake(tensor)
    twin = copy.deepcopy(model, known)
    for module in twin.modules():
        # A forward that was put on a module, as accelerate and TRL do, and a hook may hold on to the model itself.
        vars(module).pop("forward", None)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, hooks).clear()
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
        if isinstance(getattr(module, "dora", None), Adapters):
            module.config = module.dora.base_config
        if is_fp8_experts(module):
            module.forward = _experts_of_a_gpu
    firsts = {path: Recorded(twin.get_submodule(path)) for path in set(like.values())}
    for path, repeat in stand_ins.items():
        repeat.first = firsts[like[path]]
    return twin


class Recorded:
    """A module whose last output is kept."""

    def __init__(self, module: nn.Module):
        self.module, self.output = module, None
        self._forward, module.forward = module.forward, self.forward

    def forward(self, *args, **kwargs):
        self.output = self._forward(*args, **kwargs)
        return self.output


class Repeat(nn.Module):
    """Returns what the module that it repeats returned last, and has its attributes."""

    first: Recorded | None = None

    def forward(self, *args, **kwargs):
        return self.first.module(*args, **kwargs) if self.first.output is None else self.first.output

    def __getattr__(self, name):
        return getattr(self.first.module, name)


def _experts_of_a_gpu(hidden_states, *routes):
    """In place of FP8 experts, which ask for a GPU's kernels."""
    return hidden_states.clone()


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake


def _plain_layer(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    base, options = getattr(layer, "base_layer", None) or layer, {"device": "cpu", "dtype": dtype}
    if _is_linear(layer):
        plain: nn.Module = nn.Linear(layer.in_features, layer.out_features, base.bias is not None, **options)
    elif hasattr(base, "num_embeddings"):
        plain = plain_embedding(base, **options)
    else:
        plain = plain_conv(base, **options)
    return plain.requires_grad_(False)


class Undecided(TorchDispatchMode):
    """Answers what depends on values that are not there: a number is 0, and of a selection one element is left."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is aten._grouped_mm.default:  # known without values in bf16 alone
            return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        try:
            return function(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if function is not aten._local_scalar_dense.default:
                raise
            dtype = args[0].dtype
            return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0
        except DynamicOutputShapeException:
            if function is aten.nonzero.default:
                return args[0].new_zeros((1, args[0].ndim), dtype=torch.long)
            if function is aten.index.Tensor:
                return aten.index.Tensor(args[0], _first_of_each(args[1]))
            raise


def _first_of_each(indices):
    """Boolean masks as the index of one element."""
    chosen = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            chosen += [index.new_zeros(1, dtype=torch.long)] * index.ndim
        else:
            chosen.append(index)
    return chosen
