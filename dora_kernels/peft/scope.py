"""`patched_peft`: PEFT models patched as they are built."""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary, WeakSet

from ..blocks.fuse import fuse_blocks, fused_blocks, unfuse_block
from ..config import check_blocks
from ..ops.base_weights import keep_packing
from .patch import check_peft, checked_options, fuse_layers, survey, unfuse_layer

LEFT = (
    "patched_peft() has ended, and a model that was built in it is still in training mode: from here on it runs PEFT's "
    "own code. Train inside the scope, or call dora_kernels.patch_peft(model)"
)


@contextmanager
def patched_peft(
    *,
    space: str = "auto",
    impl: str = "auto",
    rounding: str = "dithered",
    nf4_parity: bool = False,
    blocks: str | bool = "auto",
) -> Iterator[None]:
    """Every PEFT LoRA model that is built, extended or loaded inside the scope is patched, as by `patch_peft`.

    Inside it PEFT builds DoRA layers over FP8, FP4 and int4 weights, too, where it would raise or crash by itself.
    Outside they run PEFT's formula on the decoded weight, until `patch_peft` fuses them again.

    For code that makes PEFT models where you cannot reach them; train inside the scope. Leaving it, by an exception
    too, unpatches those models; one that `patch_peft` had patched before stays so, with its own options. A model that
    is left in training mode is warned of, as it runs unfused from there on. Models that are not extended inside are
    untouched (`patch_peft` them), and a deepcopy made inside stays patched. The scope belongs to the process: models
    that other threads build meanwhile are patched too, and two scopes must close in the reverse of the order in which
    they were opened.

    Args:
        space, impl, rounding, nf4_parity: see `dora_linear`.
        blocks: see `patch_peft`.

    Raises:
        ValueError: an option that does not exist. ImportError: PEFT is missing or too old.
    """
    options = checked_options(space, impl, rounding, nf4_parity)
    check_blocks("blocks", blocks)
    check_peft()
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    from .packed_layer import packed_lora_layer

    # By layer: the options it had before the scope took it in, None where it was PEFT's.
    patched = WeakKeyDictionary()
    made = WeakSet()  # the blocks that the scope made

    def then_fuse(method):
        @functools.wraps(method)
        def wrapper(tuner, *args, **kwargs):
            result = method(tuner, *args, **kwargs)
            found = survey(tuner.model)
            for layer, unfusable, _ in found.values():
                if unfusable is None:
                    patched.setdefault(layer, layer.dora_fusion.options if hasattr(layer, "dora_fusion") else None)
            keep_packing(tuner.model)
            fuse_layers(found, options)
            if blocks:
                before = {*fused_blocks(tuner.model).values()}
                fuse_blocks(tuner.model)
                made.update({*fused_blocks(tuner.model).values()} - before)
            return result

        return wrapper

    create = LoraModel._create_new_module

    def create_packed_too(config, adapter_name, target, **kwargs):
        layer = packed_lora_layer(target, adapter_name, config, **kwargs)
        return create(config, adapter_name, target, **kwargs) if layer is None else layer

    # Adapters are made by the one and cast to fp32 by the other: only then can a fresh magnitude be exact.
    originals = {name: getattr(BaseTuner, name) for name in ("inject_adapter", "_cast_adapter_dtype")}
    try:
        for name, method in originals.items():
            setattr(BaseTuner, name, then_fuse(method))
        LoraModel._create_new_module = staticmethod(create_packed_too)
        yield
        if any(before is None and layer.training for layer, before in patched.items()):
            warnings.warn(LEFT, stacklevel=3)
    finally:
        for name, method in originals.items():
            setattr(BaseTuner, name, method)
        LoraModel._create_new_module = staticmethod(create)
        for block in made:
            unfuse_block(block)
        for layer, before in patched.items():
            if before is None:
                unfuse_layer(layer)
            elif hasattr(layer, "dora_fusion"):
                layer.dora_fusion.options = before
