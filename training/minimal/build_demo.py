"""Makes the embedded default: `python -m training.minimal.build_demo` writes base/ (model, tokenizer) and data/.

The base is a two-layer Llama. It is trained from scratch on English text from the standard library
(`pydoc_data.topics`) and on generated tasks (`training.demo.tasks`). Everything is seeded: on one machine, the same
versions write the same files. It takes about ten minutes on one CPU core.
"""

import argparse
import itertools
import json
import pydoc_data.topics
import random
import re
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .. import demo
from ..demo.tasks import CITIES, GOODS, NAMES, base_row, copy_row, json_row
from .batches import Example, encode
from .evaluate import answer, exact_match
from .loop import LoopSettings, train

ROWS = {"train": 4000, "validation": 100, "test": 200}
VOCABULARY = 1536
CUTOFF = 160


def split_rows() -> dict[str, list[dict[str, str]]]:
    """The fine-tuning data by split. No prompt occurs twice, within a split or in two."""
    rng = random.Random(0)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < sum(ROWS.values()):
        row = json_row(rng)
        rows[row["prompt"]] = row
    remaining = iter(rows.values())
    return {split: list(itertools.islice(remaining, count)) for split, count in ROWS.items()}


def english() -> list[str]:
    """Paragraphs of prose, each on one line; listings and grammar are left out."""
    text = "\n\n".join(body for _, body in sorted(pydoc_data.topics.topics.items()))
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return [p for p in paragraphs if len(p) > 80 and sum(c.isalpha() or c == " " for c in p) > 0.92 * len(p)]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE inside words. A word has the same tokens after a space, a quote or a line break, so a model can
    copy it token by token. Every other character is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|[^\p{L}]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def chunks(ids: list[int], rng: random.Random, count: int, length: int) -> list[Example]:
    """Random windows of a token stream, every token a target."""
    starts = [rng.randrange(len(ids) - length) for _ in range(count)]
    return [{"input_ids": ids[s : s + length], "labels": ids[s : s + length]} for s in starts]


def pretrain(copy_steps: int, steps: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The base model: first copying, then everything at once."""
    rng = random.Random(0)
    torch.manual_seed(0)
    torch.set_num_threads(demo.THREADS)
    paragraphs = english()
    words = sorted({word for paragraph in paragraphs for word in re.findall(r"[A-Za-z]+", paragraph)})
    words += 10 * (NAMES + CITIES + GOODS)
    rows = [base_row(rng) for _ in range(32 * steps)]
    tokenizer = make_tokenizer(paragraphs + [row["prompt"] + row["completion"] for row in rows[:5000]])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        initializer_range=0.05,  # 0.02 is for wide models; here it makes the first hundreds of steps slow
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    copies = encode([copy_row(rng, words) for _ in range(40 * copy_steps)], tokenizer, CUTOFF)
    prose = chunks(tokenizer("\n".join(paragraphs))["input_ids"], rng, 4 * steps, 64)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(paragraphs)} paragraphs")
    with tempfile.TemporaryDirectory() as scratch:
        for examples, batch, rate in ((copies, 40, 3e-3), (encode(rows, tokenizer, CUTOFF) + prose, 36, 3e-3)):
            train(
                model,
                examples,
                [],
                LoopSettings(batch_size=batch, learning_rate=rate),
                output_dir=scratch,
                pad_id=tokenizer.pad_token_id,
                write_adapter=model.save_pretrained,
                read_adapter=lambda folder: None,
            )
    return model, tokenizer


def main() -> None:
    """Write the data, train the base, write it, and print its exact match by task."""
    parser = argparse.ArgumentParser(
        prog="python -m training.minimal.build_demo", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, default=demo.BASE.parent)
    parser.add_argument("--copy_steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=1600)
    arguments = parser.parse_args()

    data = arguments.output_dir / demo.DATA.name
    data.mkdir(parents=True, exist_ok=True)
    for split, rows in split_rows().items():
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    model, tokenizer = pretrain(arguments.copy_steps, arguments.steps)
    base = arguments.output_dir / demo.BASE.name
    tokenizer.save_pretrained(base)
    model.save_pretrained(base)

    tasks: dict[str, list] = {}
    rng = random.Random("check")
    for row in (base_row(rng) for _ in range(400)):
        tasks.setdefault(row["prompt"].split()[1], []).append(row)
    for verb, rows in sorted(tasks.items()):
        given = answer(model, tokenizer, [row["prompt"] for row in rows], 64, 100)
        print(f"{verb:8} {exact_match(given, rows):6.1%}   {rows[0]['prompt']!r} -> {given[0]!r}")


if __name__ == "__main__":
    main()
