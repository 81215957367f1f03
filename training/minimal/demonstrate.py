"""The embedded demo on the minimal loop: fine-tune with DoRA, compare with the base, merge."""

import shutil
import time
from dataclasses import fields
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import dora_kernels as dk

from .. import demo
from ..checkpoints.checkpoint import list_checkpoints
from ..checkpoints.lock import check_folder
from ..checkpoints.loss_plot import plot_losses
from ..distributed.processes import local_rank
from ..flags import Flags
from ..model.base_model import load_tokenizer
from ..stopping import stop_on_interrupt, stop_on_sigterm
from .batches import Example, Row, encode, read_splits
from .evaluate import answer, exact_match, held_out_loss
from .loop import LoopSettings, total_steps, train

# Exact match of the base model and of the tuned model, between which the demo counts as learned.
BASE_AT_MOST = 0.05
TUNED_AT_LEAST = 0.80
EVALUATION_BATCH = 100


def run(flags: Flags, command: str) -> None:
    """Evaluate the base, fine-tune it, evaluate again, merge, and print the comparison.

    On SIGTERM or Ctrl-C in training, save a checkpoint and return.

    Args:
        command: the command line that continues the run.

    Raises:
        ValueError: bad flags, or a demo that did not learn.
    """
    started = time.perf_counter()
    flags.check()
    if local_rank() is not None:
        raise ValueError("the demo runs in one process: start it without torchrun")
    torch.set_num_threads(demo.THREADS)
    output_dir = Path(flags.output_dir)
    rows = read_splits(flags.data_path)
    tokenizer, _ = load_tokenizer(flags.base_model)
    model = AutoModelForCausalLM.from_pretrained(flags.base_model, dtype=torch.float32)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    examples = {split: encode(rows[split], tokenizer, flags.cutoff_len) for split in rows}
    names = [field.name for field in fields(LoopSettings) if hasattr(flags, field.name)]
    settings = LoopSettings(**{name: getattr(flags, name) for name in names})
    steps = total_steps(settings, len(rows["train"]))
    torch.manual_seed(flags.seed)
    model = dk.apply_dora(model, flags.dora)
    prepare_folder(output_dir, flags.resume)
    print(f"{len(rows['train'])} training rows, {steps} steps; tested on {len(rows['test'])} rows; {model.device.type}")

    # A fresh adapter changes no bit of the base model's output.
    before = evaluate(model, tokenizer, rows["test"], examples["test"])
    with stop_on_sigterm() as request, stop_on_interrupt(request):
        done = train(
            model,
            examples["train"],
            examples["validation"],
            settings,
            output_dir=output_dir,
            pad_id=tokenizer.pad_token_id,
            write_adapter=lambda folder: dk.save_adapter(model, folder),
            read_adapter=lambda folder: dk.load_adapter(model, folder),
            resume=flags.resume,
            request=request,
        )
    if done < steps:
        print(f"\nstopped and saved at step {done}; continue with\n  {command}")
        return
    dk.save_adapter(model, output_dir)
    plot_losses(output_dir / "metrics.jsonl", output_dir / "loss.png", "DoRA: the demo, nats per target token")
    after = evaluate(model, tokenizer, rows["test"], examples["test"])
    merged = evaluate(dk.merge_dora(model), tokenizer, rows["test"], examples["test"])
    same = sum(a == b for a, b in zip(after["answers"], merged["answers"], strict=True))

    size = (output_dir / "adapter_model.safetensors").stat().st_size
    sample = rows["test"][0]
    print(f"\n{sample['prompt']}  expected: {sample['completion']}")
    print(f"  base:     {before['answers'][0]}\n  tuned:    {after['answers'][0]}\n")
    print(f"{'':24}{'base':>8}{'tuned':>8}{'merged':>8}")
    print(f"{'held-out loss (nats)':24}{before['loss']:8.4f}{after['loss']:8.4f}{merged['loss']:8.4f}")
    print(f"{'exact match':24}{before['match']:8.1%}{after['match']:8.1%}{merged['match']:8.1%}")
    print(f"merged answers equal to the tuned model's: {same} of {len(rows['test'])}")
    print(f"adapter: {output_dir} ({size / 1e6:.2f} MB); losses: {output_dir / 'loss.png'}")
    print(f"{time.perf_counter() - started:.0f} s")
    if same < len(rows["test"]):
        raise ValueError(f"the merged model answers {len(rows['test']) - same} test prompts differently")
    if before["match"] > BASE_AT_MOST or after["match"] < TUNED_AT_LEAST:
        raise ValueError(
            f"the demo did not learn: exact match went from {before['match']:.1%} to {after['match']:.1%}, "
            f"expected from at most {BASE_AT_MOST:.0%} to at least {TUNED_AT_LEAST:.0%}"
        )


def prepare_folder(output_dir: Path, resume: bool) -> None:
    """Empty the demo's own folder; raise ValueError if another folder holds the checkpoints of another run."""
    if resume or not list_checkpoints(output_dir):
        return
    if output_dir != demo.OUTPUT:
        check_folder(output_dir, resume)
    print(f"starting over in {output_dir} (--resume would continue the run that is there)")
    shutil.rmtree(output_dir)


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], examples: list[Example]
) -> dict:
    """`loss` in nats per target token, greedy `answers`, and their exact `match` as a share."""
    longest = max(sum(label >= 0 for label in example["labels"]) for example in examples)
    answers = answer(model, tokenizer, [row["prompt"] for row in rows], longest + 8, EVALUATION_BATCH)
    loss = held_out_loss(model, examples, EVALUATION_BATCH, tokenizer.pad_token_id)
    return {"loss": loss, "answers": answers, "match": exact_match(answers, rows)}
