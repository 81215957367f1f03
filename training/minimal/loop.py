"""The minimal training loop: one process, AdamW, cosine schedule with warm-up, accumulation, clipping, exact resume.

It trains the parameters that require a gradient. A run writes `metrics.jsonl` and `checkpoint-<step>/` to its output
folder.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_scheduler

import dora_kernels as dk
from dora_kernels.adapters.atomic import sync
from dora_kernels.layers.accumulating import norm_uses

from ..checkpoints.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from ..checkpoints.metrics import append_row, keep_until
from ..checkpoints.resume_state import optimizer_state, random_state, set_optimizer_state, set_random_state
from ..data.order import rows_of_step, steps_per_epoch
from ..model.optimizer import parameter_groups
from ..stopping import StopRequest
from .batches import Example, collate, fingerprint
from .evaluate import held_out_loss, summed_loss, target_tokens


@dataclass(frozen=True)
class LoopSettings:
    """Everything that decides the numbers of a run, besides the model and the data."""

    batch_size: int = 16  # rows per forward pass
    gradient_accumulation_steps: int = 1  # forward passes per optimizer step
    keep_weights: bool = False  # over these passes
    num_epochs: float = 1
    max_steps: int = 0  # optimizer steps; 0: as many as num_epochs take
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.05  # share of the steps
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    eval_step: int = 0  # steps between evaluations; 0: never
    save_step: int = 0  # steps between checkpoints; 0: never
    seed: int = 0


def total_steps(settings: LoopSettings, rows: int) -> int:
    """Optimizer steps of the whole run."""
    batch = settings.batch_size * settings.gradient_accumulation_steps
    return settings.max_steps or math.ceil(settings.num_epochs * steps_per_epoch(rows, batch))


def train(
    model: PreTrainedModel,
    examples: list[Example],
    held_out: list[Example],
    settings: LoopSettings,
    *,
    output_dir: str | Path,
    pad_id: int,
    write_adapter: Callable[[Path], None],
    read_adapter: Callable[[Path], None],
    resume: bool = False,
    request: StopRequest | None = None,
) -> int:
    """Train `model` in place. Returns the steps that are done: all, or fewer if `request` ended training.

    Args:
        write_adapter, read_adapter: store the trained parameters in a folder, and restore them.
        resume: continue from the newest sound checkpoint, if there is one.
        request: read after each step; once it is made, the step is saved.

    Raises:
        ValueError: the checkpoint is of a run with other settings or other data.
        FloatingPointError: the loss is not finite.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    metrics = output_dir / "metrics.jsonl"
    steps = total_steps(settings, len(examples))
    batch_rows = settings.batch_size * settings.gradient_accumulation_steps
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=settings.learning_rate)
    warmup = math.ceil(settings.warmup_ratio * steps)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    run = asdict(settings) | {"examples": fingerprint(examples)}  # must be equal in a resumed run

    torch.manual_seed(settings.seed)
    done = 0
    checkpoint = newest_checkpoint(output_dir) if resume else None
    if checkpoint:
        tensors, state = load_checkpoint(checkpoint)
        if state["run"] != run:
            changed = sorted(name for name in run if state["run"].get(name) != run[name])
            raise ValueError(f"{checkpoint} is of a run with other settings: {', '.join(changed)} differ")
        read_adapter(checkpoint)
        set_optimizer_state(optimizer, tensors, state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        set_random_state(tensors, state["random"])
        done = state["step"]
        print(f"resuming from {checkpoint}")
    elif resume:
        print(f"no sound checkpoint in {output_dir}: starting from the beginning")
    keep_until(metrics, done if checkpoint else -1)

    def evaluate(step: int) -> None:
        loss = held_out_loss(model, held_out, settings.batch_size, pad_id)
        append_row(metrics, {"step": step, "eval_loss": loss})

    if settings.eval_step and not checkpoint:
        evaluate(step=0)
    model.train()
    progress = tqdm(range(done, steps), initial=done, total=steps, desc="training", unit="step", mininterval=1)
    for index in progress:
        chosen = [examples[row] for row in rows_of_step(len(examples), batch_rows, settings.seed, index)]
        starts = range(0, len(chosen), settings.batch_size)
        batches = [collate(chosen[start : start + settings.batch_size], pad_id) for start in starts]
        # One denominator for all micro-batches: a mean of means would give short answers more weight.
        tokens = sum(target_tokens(batch) for batch in batches)
        loss = 0.0
        accumulates = len(batches) > 1 and norm_uses(model)
        with dk.accumulating(model, keep_weights=settings.keep_weights) if accumulates else nullcontext():
            for batch in batches:
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                part = summed_loss(model, batch) / tokens
                part.backward()
                loss += part.item()
        step = index + 1
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {step} is {loss}; a lower --learning_rate may help")
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm).item()
        rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        append_row(metrics, {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens": tokens})
        progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        stopped = request is not None and request.requested and step < steps
        if settings.eval_step and (step % settings.eval_step == 0 or step == steps) and not stopped:
            evaluate(step)
        if stopped or (settings.save_step and (step % settings.save_step == 0 or step == steps)):
            moments, groups = optimizer_state(optimizer)
            generators, generator_json = random_state()
            state = {"step": step, "run": run, "optimizer": groups, "random": generator_json}
            state["scheduler"] = scheduler.state_dict()
            sync(metrics)  # rows must be as durable as the checkpoint after them
            save_checkpoint(output_dir, step, moments | generators, state, write_adapter)
        if stopped:
            return step
    return steps
