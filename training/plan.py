"""`python -m training.plan`: does a run fit? Peak memory by part, counted from the model's config alone.

Without --base_model: the largest batches of three well-known models on five cards.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen2Config
from transformers.hf_argparser import HfArg

import dora_kernels as dk

from .command_line import command_line, module_names
from .known_models import KNOWN_MODELS, ModelSizes
from .memory_model import Planned, largest_batch, planned_model, predict
from .planning.formats import NAMES, base_format_of
from .spelling import spelled

MANY_TOKENS = 2**20
"""In one step of one GPU: nobody fine-tunes with more."""
CARDS = (16, 24, 48, 80, 141)


def config_of(sizes: ModelSizes) -> PretrainedConfig:
    """A config of these sizes; what it leaves at its default changes no size."""
    cls = Qwen2Config if sizes.attention_bias else LlamaConfig
    return cls(**{name: value for name, value in sizes._asdict().items() if name != "attention_bias"})


EXAMPLES = {name: config_of(KNOWN_MODELS[name.lower()]) for name in ("Llama-3-8B", "Qwen2.5-32B", "Llama-3-70B")}
PARTS = {
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients of the adapters",
    "optimizer": "optimizer",
    "kept": "kept over micro-steps",
    "activations": "activations kept",
    "loss": "logits and loss, or",
    "layer_backward": "workspace: one layer at work",
}


@dataclass
class Flags:
    """What to plan, by the names of `python -m training`'s flags."""

    base_model: str = HfArg(default="", help="folder with a config.json, that file, or a hub id; no weights are read")
    quantize: bool = HfArg(default=False, help="base in 4 bits (NF4, double quantisation)")
    base_format: Literal["", "nf4", "fp8", "int4", "nvfp4", "mxfp4"] = HfArg(
        default="", help="format of the base's linear layers; default: what its config says, else bf16"
    )
    merge_aware: bool = HfArg(default=False, help="quantise the merged weight in every step, as it will be served")
    cutoff_len: int = HfArg(default=512, help="tokens of a row; all rows are taken to be full")
    batch_size: int = HfArg(default=1, help="rows per forward pass")
    lora_r: int = HfArg(default=16, help="rank of the adapter")
    lora_target_modules: str = HfArg(default="all-linear", help="comma-separated module names")
    lora_target_parameters: str = HfArg(default="", help="comma-separated fused parameters, the stacks of experts")
    activation_checkpointing: bool | None = HfArg(
        default=None,
        help="recompute activations in the backward, true or false; default: both ways side by side",
        metadata={"nargs": "?", "const": True},
    )
    fuse_blocks: Literal["auto", "off"] = HfArg(default="auto", help="a gated MLP as one function, or layer by layer")
    keep_weights: bool = HfArg(default=False, help="keep merged weights over micro-steps")
    use_liger: bool = HfArg(default=False, help="Liger's fused linear cross-entropy")
    whole_logits: bool = HfArg(default=False, help="a loop of your own: transformers' loss")
    card: list[float] = field(
        default_factory=list, metadata={"help": "GiB of a card; may be repeated", "action": "extend"}
    )

    def check(self) -> None:
        """Raise ValueError, naming the flag, if a value cannot work."""
        for name in ("cutoff_len", "batch_size", "lora_r"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`--{name}` should be a positive integer value but the value passed is {value}")
        for size in self.card:
            if not 0 < size < math.inf:
                raise ValueError(f"`--card` should be a positive number of GiB but the value passed is {size:g}")
        if self.quantize and self.base_format not in ("", "nf4"):
            raise ValueError(f"`--quantize` is NF4, and does not go with --base_format {self.base_format}")
        if self.keep_weights and self.merge_aware:
            raise ValueError(
                "`--keep_weights` does not go with --merge_aware, whose layers keep nothing: leave one of them out"
            )
        if self.use_liger and self.whole_logits:
            raise ValueError("`--use_liger` does not go with --whole_logits: leave one of them out")

    def format_of(self, config: PretrainedConfig) -> str:
        """One of `formats.NAMES`, or "" for bf16. Raises ValueError for a base that is quantised in another way."""
        return "nf4" if self.quantize else self.base_format or base_format_of(config)

    @property
    def loss(self) -> str:
        """One of `memory_model.LOSSES`."""
        return "liger" if self.use_liger else "whole" if self.whole_logits else "tiled"

    @property
    def cards(self) -> Sequence[float]:
        """GiB of each card."""
        return self.card or CARDS


def run(flags: Flags) -> None:
    """Print the plan. Raises ValueError or OSError on bad input."""
    flags.check()
    print("\n".join(report(read_config(flags.base_model), flags) if flags.base_model else table(flags)))


def read_config(base_model: str) -> PretrainedConfig:
    """Raises ValueError or FileNotFoundError, in one sentence."""
    path = Path(base_model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"`--base_model` {path} is not a folder with a config.json")
    try:
        return AutoConfig.from_pretrained(base_model)
    except (ValueError, OSError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"`--base_model` {base_model} has no config that can be read here: {first}") from None


def report(config: PretrainedConfig, flags: Flags) -> Iterator[str]:
    """Memory by part, and the largest batch of each card."""
    base_format = flags.format_of(config)
    planned = _planned(config, flags, base_format)
    ways = [False, True] if flags.activation_checkpointing is None else [flags.activation_checkpointing]
    if not planned.can_checkpoint:
        ways = [False]
    fixed = {"cutoff_len": flags.cutoff_len, "loss": flags.loss, "keep_weights": flags.keep_weights}
    steps = [{"activation_checkpointing": way} | fixed for way in ways]
    yield (
        f"{config.model_type}, base in {NAMES.get(base_format, 'bf16')}; DoRA of rank {flags.lora_r} on "
        f"{planned.trained.layers} layers; {flags.batch_size} × {flags.cutoff_len} tokens"
    )
    yield from planned.notes
    yield _line("a prediction", ["checkpointed" if way else "all kept" for way in ways])
    memories = [predict(planned, batch_size=flags.batch_size, **step) for step in steps]
    for part, label in PARTS.items():
        if part != "kept" or flags.keep_weights:
            yield _line(label, [_size(getattr(memory, part)) for memory in memories])
    yield _line("peak", [_size(memory.peak) for memory in memories])
    batches = [_largest(planned, flags.cards, step) for step in steps]
    for card, *rows in zip(flags.cards, *batches):
        yield _line(f"largest batch on {card:g} GB", [_batch(batch) for batch in rows])
    if max(map(max, batches)) * flags.cutoff_len > MANY_TOKENS:
        yield (
            f"batches of more than {MANY_TOKENS:,} tokens are no advice: memory is no limit, and training takes fewer"
        )


def table(flags: Flags) -> Iterator[str]:
    """Markdown: the largest batch with checkpointing, and without, of each example on each card."""
    cards = flags.cards
    yield "| prediction | peak at batch 1 | " + " | ".join(f"{card:g} GB" for card in cards) + " |"
    yield "|---|---|" + "---|" * len(cards)
    for name, config in EXAMPLES.items():
        for base_format in ("", "nf4", "fp8"):
            planned = _planned(config, flags, base_format)
            steps = [
                {"activation_checkpointing": way}
                | {"cutoff_len": flags.cutoff_len, "loss": flags.loss, "keep_weights": flags.keep_weights}
                for way in (True, False)
            ]
            peaks = " / ".join(_size(predict(planned, batch_size=1, **step).peak) for step in steps)
            batches = [_largest(planned, cards, step) for step in steps]
            cells = [" / ".join(map(_batch, both)) for both in zip(*batches)]
            yield f"| {name}, {NAMES.get(base_format, 'bf16')} | {peaks} | " + " | ".join(cells) + " |"


def _planned(config: PretrainedConfig, flags: Flags, base_format: str) -> Planned:
    return planned_model(
        config,
        dk.DoraConfig(
            r=flags.lora_r,
            target_modules=module_names(flags.lora_target_modules),
            target_parameters=module_names(flags.lora_target_parameters) if flags.lora_target_parameters else None,
            fuse_blocks=flags.fuse_blocks == "auto" and "auto",
            merge_aware=flags.merge_aware,
        ),
        base_format=base_format,
    )


def _largest(planned: Planned, cards: Sequence[float], step: dict) -> list[int]:
    """Of each card. The largest is asked first: what is counted for it holds for smaller batches."""
    found = {card: largest_batch(planned, card, **step) for card in sorted(cards, reverse=True)}
    return [found[card] for card in cards]


def _line(label: str, values: list[str]) -> str:
    return f"{label:<32}" + "".join(f"{value:>14}" for value in values)


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.{0 if size >= 2**20 else 2}f} MiB"


def _batch(rows: int) -> str:
    return str(rows) if rows else "–"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run with these command-line arguments."""
    command_line(Flags, run, arguments, prog=spelled("plan"), description=__doc__)


if __name__ == "__main__":
    main()
