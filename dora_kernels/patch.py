"""`apply_dora`: a Hugging Face model in, the same model with DoRA layers out. Everything is checked before anything is
changed.

Activation checkpointing needs nothing from us: transformers gives the embeddings' output a gradient when it is switched
on, before `apply_dora` or after, so that `use_reentrant=True` reaches the adapters too.
"""

import copy
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from .config import DoraConfig
from .linear import DoraLinear
from .offloading import REMEDY, is_offloaded
from .parents import why_overwritten, why_read_past
from .quantized import is_quantized, keep_packing, sharding_of, weight_of
from .targets import LINEAR_CLASSES, find_saved, find_targets, rank_and_alpha


def apply_dora(model: nn.Module, config: DoraConfig) -> nn.Module:
    """Replaces the target layers by `DoraLinear`, in place, and freezes all the rest. Returns the model.

    Quantised layers keep their weights packed: NF4 is decoded inside the kernels, bitsandbytes' FP4 and 8-bit,
    torchao's and HQQ's layers dequantise themselves at each use. bitsandbytes' repacking of 4-bit weights in the first
    eval forward on some CPUs is switched off.

    The adapters are fp32 and start as an exact no-op. `modules_to_save` become trainable as they are, in their own
    dtype as in PEFT (load them in fp32 to train them well); one that shares a weight with another module trains its own
    copy of it. The config is remembered as `model.dora_config`.

    Raises:
        TypeError: not a module, or not a `DoraConfig`.
        ValueError: nothing matches, a target that cannot be adapted (each is named, with its type), or a model that is
            patched already, a PEFT model, on the meta device, or offloaded. The model is then unchanged.
    """
    targets = check_targets(model, config)
    saved = find_saved(model, config)
    config = replace(config)  # the model's own copy: the caller's may change later
    keep_packing(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        layers = {path: _dora_layer(path, module, config) for path, module in targets.items()}
        saved = {path: _unshared(model, path, module) for path, module in saved.items()}
    except BaseException:
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    for path, module in (layers | saved).items():
        replace_module(model, path, module)
    for module in saved.values():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
    model.dora_config = config
    return model


def dora_layers(model: nn.Module) -> dict[str, DoraLinear]:
    """The DoRA layers of a model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, DoraLinear)}


def check_targets(model: nn.Module, config: DoraConfig) -> dict[str, nn.Module]:
    """The modules that `apply_dora` would replace, by path, after every check it makes."""
    if not isinstance(config, DoraConfig):
        raise TypeError(f"config should be a DoraConfig, got {type(config).__name__}")
    config = replace(config)  # validated again: a field may have been set since
    check_model(model)
    check_whole(model.named_parameters())
    if layers := dora_layers(model):
        raise ValueError(f"The model has DoRA layers already ({_some(layers)}); merge_dora it, or load the base afresh")
    if hasattr(model, "dora_unmerged"):
        raise ValueError("The model was merged with keep_base=True; unmerge_dora it, or load the base afresh")
    targets = find_targets(model, config)
    paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    reasons = {}
    for path, module in targets.items():
        if paths[id(module)] > 1:
            reasons[path] = "is used in several places under several names"
        elif reason := _why_unsupported(module) or why_read_past(model, path) or why_overwritten(model, path):
            reasons[path] = reason
    if reasons:
        listed = _some({f"{path} ({type(targets[path]).__name__}) {reason}" for path, reason in reasons.items()}, "; ")
        raise ValueError(
            f"Target modules that cannot be adapted: {listed}. DoRA layers replace torch.nn.Linear and transformers' "
            "Conv1D; narrow `target_modules` or list these in `exclude_modules`"
        )
    _check_saved(find_saved(model, config), targets, config)
    return targets


def check_model(model: nn.Module) -> None:
    """Refuses what cannot be patched, merged or saved: a compiled or PEFT model, weights that are not here."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise ValueError("The model is compiled: pass model._orig_mod, and compile it afterwards")
    for path, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"The model holds PEFT's {type(module).__name__}: patch_peft(model) fuses a PEFT model, "
                "model.merge_and_unload() merges it (to merge in fp32: save_pretrained it, then merge_dora what "
                "load_adapter makes of the base model); or pass the base model"
            )
        if is_offloaded(module):
            where = path or "The model"
            raise ValueError(
                f"{where} is offloaded by accelerate, so its weights are not there to be adapted; {REMEDY}"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device, without values; load the model's weights first")


def check_whole(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuses, by name, what this process holds a part of."""
    for name, tensor in tensors:
        if sharding := sharding_of(tensor):
            raise ValueError(f"{name} is {sharding}")


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at `path`; accelerate's hook, which moves inputs between devices, moves along."""
    old = model.get_submodule(path)
    if module is old:
        return
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        hooks = sys.modules["accelerate.hooks"]
        hooks.remove_hook_from_module(old)
        hooks.add_hook_to_module(module, hook)
    model.set_submodule(path, module)


def _dora_layer(path: str, linear: nn.Module, config: DoraConfig) -> DoraLinear:
    r, lora_alpha = rank_and_alpha(config, path)
    return DoraLinear.from_linear(
        linear,
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        dropout_mode=config.dropout_mode,
        space=config.space,
        impl=config.impl,
        rounding=config.rounding,
        nf4_parity=config.nf4_parity,
        # Layers of equal shape must not share a rounding pattern; the path is the same in every run and process.
        salt=zlib.crc32(path.encode()),
    )


def _why_unsupported(module: nn.Module) -> str | None:
    """Why a target cannot become a `DoraLinear`, or None."""
    if is_quantized(module):
        try:
            weight_of(module)
        except ValueError as error:
            return f"cannot be read: {error}"
        return _why_wrapped(module)
    base = next((cls for cls in LINEAR_CLASSES if isinstance(module, cls)), None)
    if base is None:
        return "is not a linear layer"
    weight = module._parameters.get("weight")
    if weight is None:
        return "computes its weight (a parametrization)"
    if type(weight) is not nn.Parameter:
        return f"has a weight of type {type(weight).__name__}: sharded weights and unknown formats are not supported"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"has a weight of dtype {weight.dtype}, of no quantisation known here"
    if weight.ndim != 2 or weight.numel() == 0:
        return f"has a weight of shape {list(weight.shape)}: gather a sharded weight first"
    if type(module).forward is not base.forward or type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "has a forward of its own, or is read past it"
    return _why_wrapped(module)


def _why_wrapped(module: nn.Module) -> str | None:
    """Why a layer's forward is more than its class's, or None."""
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        return "had its forward replaced"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name, None) for name in hooks):
        return "has hooks, which would be lost: register them after apply_dora"
    return None


def _check_saved(saved: dict[str, nn.Module], targets: dict[str, nn.Module], config: DoraConfig) -> None:
    missing = [entry for entry in config.modules_to_save or () if not any(path.endswith(entry) for path in saved)]
    if missing:
        raise ValueError(f"modules_to_save {missing} not found in the base model")
    containers = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
    for path, module in saved.items():
        if isinstance(module, containers):
            raise TypeError(f"modules_to_save cannot be applied to {path}: it is a {type(module).__name__}")
        inside = [target for target in targets if target == path or target.startswith(f"{path}.")]
        if inside:
            raise ValueError(f"modules_to_save {path} holds the target {inside[0]}; name one of them more precisely")


def _unshared(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """`module`, or a copy where it shares a parameter with a module outside, which must stay frozen."""
    total, inside = (
        Counter(id(parameter) for part in root.modules() for parameter in part._parameters.values())
        for root in (model, module)
    )
    if all(total[id(parameter)] == inside[id(parameter)] for parameter in module.parameters()):
        return module
    warnings.warn(f"modules_to_save: {path} shared a weight with another module; it trains its own copy", stacklevel=4)
    return copy.deepcopy(module)


def _some(names, separator: str = ", ", most: int = 5) -> str:
    names = sorted(names)
    more = f"{separator}and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more
