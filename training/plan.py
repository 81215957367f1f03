"""`python -m training.plan`: does a run fit? Peak memory by part, predicted from the model's config alone.

Without --base_model: the largest batches of three well-known models on five cards.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from .memory_model import Planned, largest_batch, planned_model, predict

CARDS = (16, 24, 48, 80, 141)
# As published with the models; what is left out changes no size.
EXAMPLES = {
    "Llama-3-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "Qwen2.5-32B": Qwen2Config(
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
    ),
    "Llama-3-70B": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
PARTS = {
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients of the adapters",
    "optimizer": "optimizer",
    "activations": "activations kept",
    "loss": "logits and loss, or",
    "layer_backward": "workspace: one layer's backward",
}


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags, named as those of `python -m training`. Exits with a sentence on what cannot be."""
    parser = argparse.ArgumentParser(prog="python -m training.plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--base_model", help="folder with a config.json, that file, or a hub id; no weights are read")
    parser.add_argument("--quantize", action="store_true", help="base in 4 bits (NF4, double quantisation)")
    parser.add_argument("--cutoff_len", type=_positive, default=512, help="tokens of a row; all are taken to be full")
    parser.add_argument("--batch_size", type=_positive, default=1, help="rows per forward pass")
    parser.add_argument("--lora_r", type=_positive, default=16, help="rank of the adapter")
    parser.add_argument("--lora_target_modules", default="all-linear", help="comma-separated module names")
    parser.add_argument(
        "--activation_checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations in the backward; default: both ways side by side",
    )
    losses = parser.add_mutually_exclusive_group()
    losses.add_argument("--use_liger", action="store_true", help="Liger's fused linear cross-entropy")
    losses.add_argument("--whole_logits", action="store_true", help="a loop of your own: transformers' loss")
    parser.add_argument("--card", type=_positive_number, action="append", help="GiB of a card; may be repeated")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan. Exits non-zero, with a sentence, on bad input."""
    flags = parse_flags(arguments)
    try:
        if flags.base_model is None:
            print("\n".join(table(flags)))
        else:
            print("\n".join(report(read_config(flags.base_model), flags)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


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


def report(config: PretrainedConfig, flags: argparse.Namespace) -> Iterator[str]:
    """Memory by part, and the largest batch of each card."""
    planned = _planned(config, flags)
    ways = [False, True] if flags.activation_checkpointing is None else [flags.activation_checkpointing]
    steps = [{"cutoff_len": flags.cutoff_len, "activation_checkpointing": way, "loss": _loss(flags)} for way in ways]
    yield (
        f"{config.model_type}, {config.num_hidden_layers} layers, base in {'NF4' if flags.quantize else 'bf16'}; DoRA "
        f"of rank {flags.lora_r} on {len(planned.targets)} linears; {flags.batch_size} × {flags.cutoff_len} tokens"
    )
    heads = ["checkpointed" if way else "all kept" for way in ways]
    yield _line("GiB, a prediction", heads)
    memories = [predict(planned, batch_size=flags.batch_size, **step) for step in steps]
    for part, label in PARTS.items():
        yield _line(label, [_gib(getattr(memory, part)) for memory in memories])
    yield _line("peak", [_gib(memory.peak) for memory in memories])
    for card in flags.card or CARDS:
        yield _line(f"largest batch on {card:g} GB", [_batch(largest_batch(planned, card, **step)) for step in steps])


def table(flags: argparse.Namespace) -> Iterator[str]:
    """Markdown: the largest batch with checkpointing, and without, of each example on each card."""
    cards = flags.card or CARDS
    yield "| prediction | peak at batch 1 | " + " | ".join(f"{card:g} GB" for card in cards) + " |"
    yield "|---|---|" + "---|" * len(cards)
    for name, config in EXAMPLES.items():
        for quantize in (False, True):
            planned = _planned(config, flags, quantize)
            steps = [
                {"cutoff_len": flags.cutoff_len, "activation_checkpointing": way, "loss": _loss(flags)}
                for way in (True, False)
            ]
            peaks = " / ".join(_gib(predict(planned, batch_size=1, **step).peak) for step in steps)
            cells = [" / ".join(_batch(largest_batch(planned, card, **step)) for step in steps) for card in cards]
            yield f"| {name}, {'NF4' if quantize else 'bf16'} | {peaks} | " + " | ".join(cells) + " |"


def _planned(config: PretrainedConfig, flags: argparse.Namespace, quantize: bool | None = None) -> Planned:
    names = [name.strip() for name in flags.lora_target_modules.split(",")]
    targets = "all-linear" if names == ["all-linear"] else names
    quantize = flags.quantize if quantize is None else quantize
    return planned_model(config, lora_r=flags.lora_r, target_modules=targets, quantize=quantize)


def _loss(flags: argparse.Namespace) -> str:
    return "liger" if flags.use_liger else "whole" if flags.whole_logits else "tiled"


def _line(label: str, values: list[str]) -> str:
    return f"{label:<32}" + "".join(f"{value:>14}" for value in values)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _batch(rows: int) -> str:
    return str(rows) if rows else "–"


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a positive integer value but the value passed is {text}")
    return int(text)


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"should be a positive number of GiB but the value passed is {text}")
    return number


if __name__ == "__main__":
    main()
