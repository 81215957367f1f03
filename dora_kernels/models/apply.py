"""`apply_dora`: a Hugging Face model in, the same model with DoRA layers out. Everything is checked before anything is
changed.

Activation checkpointing may be switched on before `apply_dora` or after, in either of its kinds.
"""

import copy
import warnings
import zlib
from collections import Counter
from dataclasses import replace

from torch import nn

from ..blocks.fuse import fuse_blocks, unfuse_blocks
from ..config import DoraConfig
from ..layers import Model
from ..layers.adapting import adapted, computes_in_fp16, why_not_adapted, why_not_kind, why_not_merge_aware
from ..layers.dora_layer import DoraLayer
from ..layers.experts import DoraExperts, adapt_experts, adapted_experts, frozen_experts
from ..layers.probe import Probe, probe
from ..layers.support import why_not_called, why_overwritten
from ..ops.base_weights import is_quantized, keep_packing
from .expert_targets import check_parameters, expert_rank_and_alpha, how_to_adapt
from .first_step import warn_after_first_step
from .heads import with_head
from .hooks import add_hooks
from .lost_state import batches_seen
from .modules import check_model, check_not_sharded, dora_layers, listed, replace_module
from .peft_names import misread_by_peft
from .targets import check_patterns, find_saved, find_targets, idle_exclusions, is_all_linear, rank_and_alpha


def apply_dora(model: Model, config: DoraConfig) -> Model:
    """Replaces the target layers by `DoraLinear`, `DoraConv` or `DoraEmbedding`, in place, and freezes all the rest.
    Returns the model.

    `target_parameters` are stacks of experts: their module computes with a `DoraExperts` beside each from then on.

    Quantised layers keep their weights packed: NF4, FP8, FP4 and int4 are decoded in the kernels, bitsandbytes'
    FP4 and 8-bit, torchao's and HQQ's layers dequantise themselves at each use. bitsandbytes' repacking of
    4-bit weights in the first eval forward on some CPUs is switched off.

    The adapters are fp32 and start as an exact no-op. `modules_to_save` become trainable as they are, in their own
    dtype as in PEFT (load them in fp32 to train them well); one that shares a weight with another module trains its own
    copy of it. The head of a classifier is one of them. The config is remembered as `model.dora_config`.
    `model.save_pretrained` warns from then on: what it writes loads as the base model.

    Raises:
        TypeError: not a module, or not a `DoraConfig`.
        ValueError: nothing matches, a key of a pattern matches no target, a target that cannot be adapted (each is
            named, with its type), or a model that is patched already, a PEFT model, on the meta device, or offloaded;
            with `merge_aware` a layer that computes in fp16. The model is then unchanged. "all-linear" leaves out, with
            a warning, layers whose class or model is the reason.
    """
    config = _checked(config)  # the model's own copy: the caller's may change later
    check_model(model)
    return adapt(model, with_head(model, config), to_train=True)


def adapt(model: Model, config: DoraConfig, *, to_train: bool = False) -> Model:
    """`apply_dora`, with no head that `config` does not name. What was trained may serve where it could not train."""
    targets, parameters = check_targets(model, config), check_parameters(model, config)
    if to_train:
        check_patterns(config, targets, parameters)
        if idle := idle_exclusions(model, config):
            warnings.warn(idle, stacklevel=3)
        if config.merge_aware:
            _check_not_fp16(targets)
    saved = find_saved(model, config)
    keep_packing(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        layers = {path: _dora_layer(path, module, config) for path, module in targets.items()}
        stacks = {
            path: {name: _dora_experts(f"{path}.{name}", experts, name, config) for name in names}
            for path, (experts, names) in parameters.items()
        }
        saved = {path: _unshared(model, path, module) for path, module in saved.items()}
    except BaseException:
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    for path, module in (layers | saved).items():
        replace_module(model, path, module)
    for path, adapters in stacks.items():
        adapt_experts(parameters[path][0], adapters)
    for module in saved.values():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
    model.dora_config = config
    if batches := batches_seen(model):
        model.dora_batches = batches
    for path in probe(model).written & layers.keys():
        layers[path].output_use.is_written = True
    unfuse_blocks(model)  # whose layers were replaced by hand
    if config.fuse_blocks:
        fuse_blocks(model)
    add_hooks(model)
    warn_after_first_step(model)
    return model


def check_targets(model: nn.Module, config: DoraConfig) -> dict[str, nn.Module]:
    """The modules that `apply_dora` would replace, by path, after every check it makes."""
    config = _checked(config)
    check_model(model)
    check_not_sharded(model.named_parameters())
    if layers := dora_layers(model) | adapted_experts(model):
        raise ValueError(
            f"The model has DoRA layers already ({listed(layers)}); merge_dora it, or load the base afresh"
        )
    if hasattr(model, "dora_unmerged"):
        raise ValueError("The model was merged with keep_base=True; unmerge_dora it, or load the base afresh")
    targets = find_targets(model, config) if config.target_modules else {}
    paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    reasons, left_out, seen = {}, {}, probe(model)
    misread = misread_by_peft(model, targets) if is_all_linear(config.target_modules) else ()
    for path, module in targets.items():
        if paths[id(module)] > 1:
            reasons[path] = "is used in several places under several names"
        elif reason := _why_not_here(model, path, rank_and_alpha(config, path)[0], seen):
            (left_out if is_all_linear(config.target_modules) else reasons)[path] = reason
        elif path in misread:
            left_out[path] = (
                "has a name that PEFT takes for another: named in `target_modules` it trains, for this library alone"
            )
        elif reason := why_not_adapted(module) or why_overwritten(model, path) or _why_not_served(module, config):
            reasons[path] = reason
    if left_out and len(left_out) == len(targets) and not config.target_parameters:
        reasons = left_out
    if reasons:
        refused = listed(
            {f"{path} ({type(targets[path]).__name__}) {reason}" for path, reason in reasons.items()}, "; "
        )
        raise ValueError(
            f"Target modules that cannot be adapted: {refused}. DoRA layers replace torch.nn.Linear, Conv1d, Conv2d, "
            "Conv3d and Embedding, and transformers' Conv1D; narrow `target_modules` or list these in "
            "`exclude_modules`"
        )
    targets = {path: module for path, module in targets.items() if path not in left_out}
    _check_saved(find_saved(model, config), [*targets, *check_parameters(model, config)], config)
    if is_all_linear(config.target_modules):
        _warn_of_left_out(model, left_out, config)
    return targets


def _checked(config: DoraConfig) -> DoraConfig:
    """A copy, validated again: a field may have been set since."""
    if not isinstance(config, DoraConfig):
        raise TypeError(f"config should be a DoraConfig, got {type(config).__name__}")
    return replace(config)


def _why_not_here(model: nn.Module, path: str, r: int, seen: Probe) -> str | None:
    """Why a layer of this class has no adapter, or one that would not act wherever the model computes with the layer's
    weight, or None."""
    if reason := why_not_kind(model.get_submodule(path), r) or why_not_called(model, path):
        return reason
    if path in seen.reads:
        return f"is not always called: the model reads its weight ({seen.reads[path]})"
    return None


def _why_not_served(module: nn.Module, config: DoraConfig) -> str | None:
    return why_not_merge_aware(module) if config.merge_aware else None


def _check_not_fp16(targets: dict[str, nn.Module]) -> None:
    if in_fp16 := [f"{path} ({type(module).__name__})" for path, module in targets.items() if computes_in_fp16(module)]:
        raise ValueError(
            f"merge_aware cannot train layers that compute in fp16, where the gradient of the magnitude underflows in "
            f"weight space: {listed(in_fp16)}; load the base in bf16 or fp32"
        )


def _warn_of_left_out(model: nn.Module, left_out: dict[str, str], config: DoraConfig) -> None:
    if left_out:
        reasons = listed({f"{path} {reason}" for path, reason in left_out.items()}, "; ")
        warnings.warn(
            f'"all-linear" leaves out {len(left_out)} layers: {reasons}. Name them in `exclude_modules` to say that',
            stacklevel=5,
        )
    if (experts := frozen_experts(model)) and not config.target_parameters:
        warnings.warn(
            f'"all-linear" adapts no expert: {sum(experts.values())} parameters of fused experts stay frozen '
            f"({listed(experts, most=1)}); {how_to_adapt(model)}",
            stacklevel=5,
        )


def _dora_layer(path: str, module: nn.Module, config: DoraConfig) -> DoraLayer:
    r, lora_alpha = rank_and_alpha(config, path)
    return adapted(
        module,
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        dropout_mode=config.dropout_mode,
        space=config.space,
        impl=config.impl,
        rounding=config.rounding,
        nf4_parity=config.nf4_parity,
        merge_aware=config.merge_aware,
        # Layers of equal shape must not share a rounding pattern; the path is the same in every run and process.
        salt=zlib.crc32(path.encode()),
    )


def _dora_experts(path: str, experts: nn.Module, name: str, config: DoraConfig) -> DoraExperts:
    r, lora_alpha = expert_rank_and_alpha(config, path, experts)
    salt = zlib.crc32(path.encode())
    adapter = DoraExperts(
        experts,
        name,
        r=r,
        lora_alpha=lora_alpha,
        use_rslora=config.use_rslora,
        space=config.space,
        impl=config.impl,
        rounding=config.rounding,
        salt=salt,
    )
    return adapter.train(experts.training)


def _check_saved(saved: dict[str, nn.Module], targets: list[str], config: DoraConfig) -> None:
    missing = [entry for entry in config.modules_to_save or () if not any(path.endswith(entry) for path in saved)]
    if missing:
        raise ValueError(f"modules_to_save {missing} not found in the base model")
    containers = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
    for path, module in saved.items():
        if isinstance(module, containers):
            raise TypeError(f"modules_to_save cannot be applied to {path}: it is a {type(module).__name__}")
        if any(is_quantized(part) for part in module.modules()):
            raise ValueError(
                f"modules_to_save {path} is quantised, and cannot be trained in full: load it unquantised, by the "
                "modules to skip of its quantisation's config"
            )
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
    warnings.warn(f"modules_to_save: {path} shared a weight with another module; it trains its own copy", stacklevel=5)
    return copy.deepcopy(module)
