"""`Resumable`: what each of TRL's trainers gets to be ours.

Magnitudes in a parameter group of their own, atomic checkpoints, exact resume in the middle of an epoch, and an error
that names the module where a loss became NaN.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState

from dora_kernels.adapters.atomic import sync

from ..checkpoints.checkpoint import load_checkpoint, save_checkpoint
from ..checkpoints.metrics import METRICS
from ..checkpoints.resume_state import (
    optimizer_numbers,
    optimizer_state,
    random_state,
    set_optimizer_state,
    set_random_state,
)
from ..data.order import order_of_epoch, rows_of_step, steps_per_epoch
from ..distributed.processes import gather
from ..distributed.sharding import full_adapter, full_tensor
from ..model.adapter import Adapter
from ..model.optimizer import parameter_groups
from .meter import Meter
from .nonfinite import first_nonfinite, first_nonfinite_gradient

KEPT = 2  # checkpoints
TRAINER_STATE = "trainer_state.json"  # the name that transformers expects


class EpochOrder(Sampler):
    """Row numbers in an order that is a pure function of (seed, epoch).

    `epoch()` is called when an epoch begins. accelerate's loader does not set the epoch of a resumed run when it skips
    to the step in several processes.
    """

    def __init__(self, rows: int, seed: int, epoch: Callable[[], int]):
        self.rows, self.seed, self.epoch = rows, seed, epoch

    def __iter__(self) -> Iterator[int]:
        return iter(order_of_epoch(self.rows, self.seed, self.epoch()))

    def __len__(self) -> int:
        return self.rows


class Resumable(Trainer):
    """Trains `adapter.model`. Stands before one of TRL's trainers among the bases of a class.

    Args:
        adapter: the model, and functions that write and read its adapter.
        run: everything that decides the numbers of the run, as JSON. A checkpoint of another `run` is refused.
        options: the trainer's other arguments.
    """

    def __init__(self, adapter: Adapter, run: dict, **options):
        self.adapter, self.run = adapter, run
        self.meter = Meter()
        with _quantized_base_is_accepted(adapter.model):
            super().__init__(model=adapter.model, **options)

    # Optimizer and order of the rows

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(parameter_groups(self.model, self.args.weight_decay), **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        rows = len(train_dataset if train_dataset is not None else self.train_dataset)
        steps = steps_per_epoch(rows, self.batch)
        return EpochOrder(rows, self.args.seed, lambda: self.state.global_step // steps)

    @property
    def batch(self) -> int:
        """Rows per optimizer step, over all processes."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    # Checkpoints

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end, from a checkpoint if there is one. A finished run is loaded and not trained further."""
        if checkpoint is not None:
            # Not in `_load_from_checkpoint`, which runs after FSDP has sharded the parameters.
            self._read(checkpoint)
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
            if state.global_step >= state.max_steps:  # transformers would take one more step
                self.state = state
                return
        # All processes drew the same adapter from the same seed; their dropout must differ. The main process keeps the
        # seed of a run in one process.
        if self.args.process_index:
            torch.manual_seed(self.args.seed + self.args.process_index)
        self.train(resume_from_checkpoint=checkpoint and str(checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Write a checkpoint, with the random generators of all processes. The main process writes."""
        self.store_flos()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        generators = gather(random_state())
        # DeepSpeed shards the optimizer in its own way, and such a run is not resumed.
        moments, groups = ({}, []) if self.is_deepspeed_enabled else optimizer_state(self.optimizer)
        tensors = moments | {f"{rank}.{name}": one[name] for rank, (one, _) in enumerate(generators) for name in one}
        state = {
            "step": self.state.global_step,
            "run": self.run,
            "optimizer": groups,
            "numbers": [] if self.is_deepspeed_enabled else optimizer_numbers(self.optimizer),
            "random": [values for _, values in generators],
            "scheduler": self.lr_scheduler.state_dict(),
            "tokens": self.tokens,
        }

        def write(folder: Path) -> None:
            self.adapter.write(folder)
            self.state.save_to_json(str(folder / TRAINER_STATE))

        metrics = Path(self.args.output_dir, METRICS)
        with full_adapter(self.adapter.model, keep=self.args.should_save):
            if not self.args.should_save:
                return
            if metrics.exists():
                sync(metrics)  # rows must be as durable as the checkpoint after them
            keep = self.args.save_total_limit or KEPT
            save_checkpoint(self.args.output_dir, self.state.global_step, tensors, state, write, keep)
        self.meter.skip()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter. transformers' own would write the base model's weights under the layers' names."""
        with full_adapter(self.adapter.model, keep=self.args.should_save):
            if self.args.should_save:
                self.adapter.write(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing to do: `train_from` has loaded it."""

    def _read(self, checkpoint: Path) -> None:
        _, state = load_checkpoint(checkpoint)
        if changed := sorted(name for name in self.run if state["run"].get(name) != self.run[name]):
            raise ValueError(
                f"{checkpoint} is of a run with other settings: {', '.join(changed)} differ; "
                "resume with that run's own, or start another in a new --output_dir"
            )
        self.adapter.read(checkpoint)
        self._total_train_tokens = state["tokens"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            tensors, state = load_checkpoint(checkpoint)
            set_optimizer_state(self.optimizer, tensors, state["optimizer"], state.get("numbers", ()))
            self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            tensors, state = load_checkpoint(checkpoint)
            rank = self.args.process_index
            own = {
                name.removeprefix(f"{rank}."): value for name, value in tensors.items() if name.startswith(f"{rank}.")
            }
            set_random_state(own, state["random"][rank])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing to do: bf16 and fp32 need no loss scaling."""

    # What is measured

    @property
    def tokens(self) -> float:
        """Tokens trained on so far; 0 where TRL does not count them."""
        return getattr(self, "_total_train_tokens", 0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.meter.read(self.tokens)
        super().log(logs, start_time)

    # What stops it

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        finite = self.accelerator.gather(torch.isfinite(loss).all().float().reshape(1)).bool()  # [processes]
        if finite.all():
            return loss
        own = finite[self.args.process_index]
        if not own or self.is_fsdp_enabled:  # under FSDP all processes must run the forward
            where = first_nonfinite(self.model, lambda: self._forward(inputs))
        if own:
            raise FloatingPointError(f"the loss of {self._step_and_rows()} is not finite in another process")
        raise FloatingPointError(f"the loss of {self._step_and_rows()} is {loss.item()}: {where}")

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | float:
        if self.is_deepspeed_enabled:  # DeepSpeed has clipped the gradients, and skips a step that is not finite
            norm = super()._clip_grad_norm(model)
            if not math.isfinite(norm):
                raise FloatingPointError(f"the gradient of {self._step_and_rows()} is not finite")
            return norm
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        # Before clipping, which would spread NaN to all gradients.
        if not torch.isfinite(full_tensor(torch.nn.utils.get_total_norm(gradients))):
            where = first_nonfinite_gradient(self.model)
            raise FloatingPointError(f"the gradient of {self._step_and_rows()} is not finite: {where} is the first")
        return full_tensor(super()._clip_grad_norm(model))

    def _step_and_rows(self) -> str:
        """The step in progress, and the places of its rows in the data."""
        step, rows = self.state.global_step, len(self.train_dataset)
        chosen = rows_of_step(rows, self.batch, self.args.seed, step)
        if "place" in self.train_dataset.column_names:
            places = "; ".join(self.train_dataset[row]["place"] for row in chosen)
        else:
            places = f"packed sequences {', '.join(map(str, chosen))}"
        return f"step {step + 1} ({places})"

    def _forward(self, inputs: dict) -> None:
        """One forward pass, in which the first value that is not finite is looked for."""
        self.compute_loss(self.model, self._prepare_inputs(dict(inputs)))


@contextmanager
def _quantized_base_is_accepted(model: nn.Module) -> Iterator[None]:
    """The scope in which a trainer is built on a quantised base.

    transformers refuses a quantised model without a PEFT adapter. TRL rounds the adapters of a 4-bit model to bf16,
    where their small updates are lost. Both read attributes of the model, and only while the trainer is built.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    flags = {"is_loaded_in_4bit": False, "_hf_peft_config_loaded": True} if getattr(base, "is_quantized", False) else {}
    before = {name: base.__dict__[name] for name in flags if name in base.__dict__}
    base.__dict__.update(flags)
    try:
        yield
    finally:
        for name in flags:
            del base.__dict__[name]
        base.__dict__.update(before)
