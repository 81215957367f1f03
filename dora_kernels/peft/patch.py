"""`patch_peft` and `unpatch_peft`: a PEFT DoRA model fused in place, and back.

PEFT is imported inside the functions: the engine works without it.
"""

import warnings
import zlib
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import NamedTuple

from torch import nn

from ..blocks.fuse import fuse_blocks, unfuse_blocks
from ..blocks.report import block_lines
from ..config import DoraConfig, check_blocks
from ..layers import Model
from ..layers.in_full import lines_in_full, trained_in_full
from ..layers.listing import grouped, total
from ..layers.probe import probe
from ..layers.support import why_overwritten
from ..ops import dispatch
from ..ops.base_weights import keep_packing, weight_of
from ..versions import require

TESTED = "0.21"


@dataclass(frozen=True)
class PatchReport:
    """What `patch_peft` did.

    `layers` maps a path to the reason why the layer is left to PEFT, None if it is fused. `blocks` maps that of a gated
    MLP, or of what is nearly one, to why its layers compute alone, None if they are one function. `in_full` maps that
    of a module which trains beside the adapters to its number of parameters. `str()` has a line for each, one with a
    count for equal layers of a stack of modules, and a total.
    """

    layers: dict[str, str | None]
    blocks: dict[str, str | None] = field(default_factory=dict)
    in_full: dict[str, int] = field(default_factory=dict)

    @property
    def fused(self) -> list[str]:
        """Paths of the fused layers."""
        return [path for path, reason in self.layers.items() if reason is None]

    @property
    def skipped(self) -> dict[str, str]:
        """Why each other layer is left to PEFT, by path."""
        return {path: reason for path, reason in self.layers.items() if reason is not None}

    def __str__(self) -> str:
        lines = [
            f"{path or 'layer'}: {'fused' if reason is None else f'left to PEFT: {reason}'}"
            for path, reason in self.layers.items()
        ]
        lines = grouped(lines + block_lines(self.blocks) + lines_in_full(self.in_full))
        if len(self.layers) > 1:
            lines.append(total({"fused": len(self.fused), "left to PEFT": len(self.skipped)}))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<PatchReport of {total({'fused': len(self.fused), 'left to PEFT': len(self.skipped)})}>"


def patch_peft(
    model: nn.Module,
    *,
    space: str = "auto",
    impl: str = "auto",
    rounding: str = "dithered",
    nf4_parity: bool = False,
    blocks: str | bool = "auto",
) -> PatchReport:
    """Fuses the DoRA layers of a PEFT model in place, until `unpatch_peft`. Call it where the model will run.

    Parameters, state-dict keys, configs and files stay PEFT's, and so does the meaning of every PEFT call. Whether a
    layer is fused is decided at each call: it is while exactly one DoRA adapter is active, not merged and not
    disabled, on a dense `nn.Linear` or `Conv1D`, an `nn.Embedding`, a convolution, or a quantised layer: over FP8,
    FP4 and int4 `patched_peft` lets PEFT build them. All else runs PEFT's own code. One value changes, and unpatching
    restores it: PEFT rounds a fresh adapter's magnitude to the weight's dtype; here it becomes the fp32 norm, so that
    step 0 equals the base model exactly. A magnitude stored in 16 bits (PEFT's `autocast_adapter_dtype=False`) cannot
    hold that norm: it stays as it is, with a warning. bitsandbytes' repacking of 4-bit weights in the first eval
    forward on some CPUs is switched off, for good. Patching again is harmless; it takes in what was added since.
    Fused layers can be differentiated once.

    Args:
        space, impl, rounding, nf4_parity: see `dora_linear`. A forced one raises where it cannot run.
        blocks: "auto" computes a gated MLP, and layers of one input, by one function while they train; False computes
            each layer alone.

    Raises:
        ValueError: an option that does not exist, or a model without a DoRA adapter. ImportError: PEFT is missing or
            too old. The model is then unchanged.
    """
    options = checked_options(space, impl, rounding, nf4_parity)
    check_blocks("blocks", blocks)
    check_peft()
    from .eligibility import why_not_active

    found = survey(model)
    _check_has_dora(model, found)
    for each in found.values():
        if each.unfusable is None and each.base is None:
            dispatch.choose_impl(weight_of(each.layer.base_layer).device, impl)
    keep_packing(model)
    fuse_layers(found, options)
    note_written(model)
    report = PatchReport(
        {path: each.unfusable or each.base or why_not_active(each.layer) for path, each in found.items()},
        fuse_or_unfuse(model, blocks),
        trained_in_full(model),
    )
    _warn_of_magnitudes(found)
    if not report.fused:
        warnings.warn(f"patch_peft fuses no layer of this model as it is now:\n{report}", stacklevel=2)
    return report


def unpatch_peft(model: Model) -> Model:
    """Gives the model's layers back to PEFT, and fresh magnitudes their bits. Returns the model, patched or not."""
    check_peft()
    for layer in _lora_layers(model).values():
        unfuse_layer(layer)
    unfuse_blocks(model)
    return model


class Surveyed(NamedTuple):
    """A LoRA layer of PEFT's, and what stands against fusing it.

    `unfusable` holds for its class and its place in the model; `base` as long as its base layer is as it is.
    """

    layer: nn.Module
    unfusable: str | None
    base: str | None


def survey(model: nn.Module) -> dict[str, Surveyed]:
    """Each LoRA layer of the model by path, asked once."""
    from .eligibility import why_not_base

    found = {}
    for path, layer in _lora_layers(model).items():
        overwritten = why_overwritten(model, path)
        unfusable = f"it {overwritten}" if overwritten else _why_not_class(layer)
        found[path] = Surveyed(layer, unfusable, None if unfusable else why_not_base(layer))
    return found


def fuse_layers(found: dict[str, Surveyed], options: dict) -> None:
    """Makes each layer that can be fused its fused class, with these options."""
    from .fresh import make_fresh_exact
    from .fused import FusedLayer, Fusion
    from .quantized import FUSED

    for path, (layer, unfusable, base) in found.items():
        if unfusable is not None:
            continue
        # Layers of equal shape must not share a rounding pattern; the path is the same in every run and process.
        salted = options | {"salt": zlib.crc32(path.removeprefix("base_model.model.").encode())}
        if isinstance(layer, FusedLayer):
            layer.dora_fusion.options = salted
        else:
            layer.dora_fusion = Fusion(salted)
            layer.__class__ = FUSED[type(layer)]
        if not layer.merged and base is None:
            make_fresh_exact(layer, options["impl"])


def note_written(model: nn.Module) -> None:
    """Lets the fused layers give away a copy of an output that the model writes over, as a trial run has shown."""
    base = _base_of(model)
    for path in probe(base).written:
        layer = base.get_submodule(path)
        if hasattr(layer, "dora_fusion"):
            layer.output_use.is_written = True


def fuse_or_unfuse(model: nn.Module, blocks: str | bool) -> dict[str, str | None]:
    """The blocks of the base model, made or taken back: `fuse_blocks`' answer, by the paths of the PEFT model."""
    unfuse_blocks(model)
    if not blocks:
        return {}
    base = _base_of(model)
    prefix = next((path for path, module in model.named_modules() if module is base), "")
    return {f"{prefix}.{path}".strip("."): reason for path, reason in fuse_blocks(base).items()}


def _base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def unfuse_layer(layer: nn.Module) -> None:
    """Makes a fused layer PEFT's own again; any other is left alone."""
    from .fresh import restore_fresh
    from .fused import FusedLayer

    if isinstance(layer, FusedLayer):
        layer.refuse_if_frozen("unpatch")
        restore_fresh(layer)
        del layer.dora_fusion
        layer.__class__ = layer.peft_class


def checked_options(
    space: str = "auto", impl: str = "auto", rounding: str = "dithered", nf4_parity: bool = False
) -> dict:
    """The options as a dict. Raises ValueError for one that does not exist."""
    options = {"space": space, "impl": impl, "rounding": rounding, "nf4_parity": nf4_parity}
    DoraConfig(**options)
    return options


def check_peft() -> None:
    """Raises ImportError where PEFT is missing or too old, and warns of a version that was never tried."""
    require(f"peft>={TESTED}")
    found = version("peft")
    if not found.startswith(f"{TESTED}."):
        warnings.warn(
            f"PEFT {found} is untested with dora_kernels, which was tested with {TESTED}: compare the model's outputs "
            f'with and without patching, or pip install "peft=={TESTED}.*"',
            stacklevel=3,
        )


def _lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    from peft.tuners.lora.layer import LoraLayer

    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, got {type(model).__name__}")
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def _check_has_dora(model: nn.Module, found: dict[str, Surveyed]) -> None:
    if not found:
        raise ValueError(
            f"patch_peft found no LoRA layer of PEFT in this {type(model).__name__}: make it a PEFT model with "
            "peft.get_peft_model(model, LoraConfig(use_dora=True)), or use apply_dora, which needs no patching"
        )
    if not any(each.layer.lora_magnitude_vector for each in found.values()):
        raise ValueError(
            "patch_peft found LoRA adapters without DoRA: there is no magnitude to fuse; build the adapter with "
            "LoraConfig(use_dora=True)"
        )


def _why_not_class(layer: nn.Module) -> str | None:
    """Why a layer cannot be fused, whatever its adapters; None if it can, or is."""
    from .fused import FusedLayer
    from .quantized import FUSED

    if isinstance(layer, FusedLayer):
        return None
    if type(layer) not in FUSED:
        return f"it is PEFT's {type(layer).__name__}, for a sharded or special base layer"
    if "forward" in layer.__dict__:
        return "its own forward was replaced (by accelerate's hooks, or another library)"
    return None


def _warn_of_magnitudes(found: dict[str, Surveyed]) -> None:
    """Warns of magnitudes that do not train beside an A or B that does, and of those that 16 bits hold badly."""
    frozen, rounded = [], []
    for path, (layer, _, _) in found.items():
        for adapter, magnitude in layer.lora_magnitude_vector.items():
            name = f"{path}.lora_magnitude_vector.{adapter}"
            if magnitude.weight.requires_grad and magnitude.weight.element_size() < 4:
                rounded.append(name)
            factors = [each[adapter].weight for each in (layer.lora_A, layer.lora_B) if adapter in each]
            if not magnitude.weight.requires_grad and any(factor.requires_grad for factor in factors):
                frozen.append(name)
    if frozen:
        warnings.warn(
            f"{len(frozen)} magnitudes do not require gradients while their A or B do ({frozen[0]} for one): a frozen "
            "magnitude trains plain LoRA; call requires_grad_(True) on it",
            stacklevel=3,
        )
    if rounded:
        warnings.warn(
            f"{len(rounded)} trained magnitudes are stored in 16 bits ({rounded[0]} for one): they are the weight's "
            "norm only to 0.4 %, so that step 0 is not exactly the base model, and small updates round to none; build "
            "the adapter in fp32, PEFT's default (autocast_adapter_dtype=True)",
            stacklevel=3,
        )
