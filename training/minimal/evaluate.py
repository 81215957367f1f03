"""Evaluation: held-out loss, greedy answers and exact match."""

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.order import IGNORED
from .batches import Example, Row, collate


def summed_loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy summed over the batch's target tokens, in nats: fp32, shape []."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits = logits[:, :-1].flatten(0, 1).float()  # [batch * (length - 1), vocab]
    return F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def target_tokens(batch: dict[str, torch.Tensor]) -> int:
    """The number of tokens that `summed_loss` sums over."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, examples: list[Example], batch_size: int, pad_id: int) -> float:
    """Mean loss per target token over all examples, in nats."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        total += summed_loss(model, batch).item()
        tokens += target_tokens(batch)
    model.train(was_training)
    return total / tokens


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Greedy completions, in the order of `prompts`."""
    was_training = model.training
    model.eval()
    answers = []
    for start in range(0, len(prompts), batch_size):
        # Padded on the left: generation continues at the right end.
        batch = tokenizer(prompts[start : start + batch_size], padding=True, padding_side="left", return_tensors="pt")
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers += tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return answers


def exact_match(answers: list[str], rows: list[Row]) -> float:
    """The share of answers that equal their row's completion, character by character."""
    return sum(given == row["completion"] for given, row in zip(answers, rows, strict=True)) / len(rows)
