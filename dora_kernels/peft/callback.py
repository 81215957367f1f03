"""What a transformers or TRL trainer calls: `DoraKernelsCallback` patches its PEFT model, `AccumulatingCallback` keeps
norms over the micro-steps of an optimizer step.

Apart from the rest: importing transformers' trainer takes seconds.
"""

import logging
from contextlib import ExitStack

from transformers import TrainerCallback

from ..config import check_blocks, check_bools
from ..layers.accumulating import accumulating, norm_uses
from .patch import PatchReport, checked_options, patch_peft

logger = logging.getLogger(__name__)


class AccumulatingCallback(TrainerCallback):
    """Opens `accumulating` for every optimizer step of several micro-steps, unless it is open.

    The scope ends with its step: a run that is resumed between two steps computes what an unbroken one does.

    Args:
        keep_weights: keep W' too, as `accumulating` does.
    """

    def __init__(self, *, keep_weights: bool = False) -> None:
        check_bools(keep_weights=keep_weights)
        self.keep_weights = keep_weights
        self._scope = ExitStack()

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        self._scope.close()  # an error may have ended the step before
        uses = norm_uses(model) if args.gradient_accumulation_steps > 1 else []
        if uses and not any(use.keeps_norm for use in uses):
            self._scope.enter_context(accumulating(model, keep_weights=self.keep_weights))

    def on_step_end(self, *args, **kwargs) -> None:
        self._scope.close()

    on_train_begin = on_train_end = on_step_end


class DoraKernelsCallback(AccumulatingCallback):
    """`Trainer(..., callbacks=[DoraKernelsCallback()])`: `patch_peft` when training begins.

    By then the model is on its device, and `SFTTrainer(..., peft_config=...)` has built it. It stays patched after
    training: `unpatch_peft(trainer.model)` gives it back. `report` is what `patch_peft` returned.

    Norms are kept over the micro-steps of an optimizer step, as by `AccumulatingCallback`.

    Args:
        keep_weights: keep W' too, as `accumulating` does.
        space, impl, rounding, nf4_parity, blocks: as for `patch_peft`.

    Raises:
        ValueError, TypeError: an option is none of its choices.
    """

    def __init__(
        self,
        *,
        keep_weights: bool = False,
        space: str = "auto",
        impl: str = "auto",
        rounding: str = "dithered",
        nf4_parity: bool = False,
        blocks: str | bool = "auto",
    ):
        super().__init__(keep_weights=keep_weights)
        check_blocks("blocks", blocks)
        self.options = checked_options(space, impl, rounding, nf4_parity) | {"blocks": blocks}
        self.report: PatchReport | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        super().on_train_begin()
        check_liger(args)
        self.report = patch_peft(model, **self.options)
        logger.info("%s", self.report)


def check_liger(args) -> None:
    """Raises ValueError where Liger kernels are on that write over what DoRA layers keep for the backward pass.

    Its SwiGLU overwrites the outputs of gate_proj and up_proj, its rotary embedding those of q_proj and k_proj: the
    magnitude's gradient is read off these, and would be wrong without a word.
    """
    config = getattr(args, "liger_kernel_config", None) or {}
    harmful = [name for name in ("rope", "swiglu", "geglu") if config.get(name, True)]
    if getattr(args, "use_liger_kernel", False) and harmful:
        raise ValueError(
            f"Liger's {' and '.join(harmful)} overwrite what DoRA layers keep for the magnitude's gradient: pass "
            f"liger_kernel_config={config | dict.fromkeys(harmful, False)} to the trainer's arguments"
        )
