"""What a run could do better, said before it begins: a batch that fits the GPU, and a learning rate for the rank."""

from collections.abc import Iterator

import torch
from transformers import AutoConfig

from ..flags import Flags
from ..memory_model import largest_batch, planned_model, predict
from ..planning.formats import base_format_of

HIGH_RANK, HIGH_RATE = 128, 2e-4
"""From this rank on, runs with this learning rate have been reported to diverge."""
GLOBAL_BATCH = 16  # rows per optimizer step that a suggestion keeps below


def advice(flags: Flags, device: torch.device) -> Iterator[str]:
    """Sentences for the log; none changes anything."""
    if flags.lora_r >= HIGH_RANK and flags.learning_rate >= HIGH_RATE and not flags.init_adapter:
        yield (
            f"rank {flags.lora_r} at a learning rate of {flags.learning_rate:g}: runs of such ranks were reported to "
            f"diverge at {HIGH_RATE:g}; 1e-4 is safer"
        )
    if device.type == "cuda" and flags.task == "sft":
        yield from batch_advice(flags, torch.cuda.get_device_properties(device).total_memory / 2**30)


def batch_advice(flags: Flags, card_gib: float) -> Iterator[str]:
    """Whether the run fits a card of so many GiB, and which batch would fill it, by `dora-plan`'s prediction."""
    try:
        config = AutoConfig.from_pretrained(flags.base_model, trust_remote_code=flags.trust_remote_code)
        plan = planned_model(config, flags.dora, base_format="nf4" if flags.quantize else base_format_of(config))
    except (ValueError, OSError):
        return  # a model that cannot be counted
    loss = "liger" if flags.use_liger else "tiled"
    step = {"cutoff_len": flags.cutoff_len, "loss": loss, "keep_weights": flags.keep_weights}
    kept, again = (largest_batch(plan, card_gib, activation_checkpointing=way, **step) for way in (False, True))
    own = again if flags.activation_checkpointing else kept
    if own < flags.batch_size:
        peak = predict(
            plan, batch_size=flags.batch_size, activation_checkpointing=flags.activation_checkpointing, **step
        ).peak
        yield (
            f"predicted peak {peak / 2**30:.1f} GiB on a GPU of {card_gib:.0f} GiB, if rows have {flags.cutoff_len} "
            f"tokens: --batch_size {own or again or 1}"
            + (" --activation_checkpointing" if not own and again else "" if own or again else " --quantize")
            + " is predicted to fit"
        )
    elif flags.batch_size * flags.gradient_accumulation_steps < GLOBAL_BATCH and own > flags.batch_size:
        batch = min(own, GLOBAL_BATCH)
        yield (
            f"this GPU of {card_gib:.0f} GiB is predicted to fit --batch_size {own} of {flags.cutoff_len} tokens: "
            f"--batch_size {batch} --gradient_accumulation_steps {-(-GLOBAL_BATCH // batch)} uses it better"
        )
