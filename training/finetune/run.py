"""A fine-tuning run from flags, in steps: prepare, build, train, finish. The training loop is TRL's SFTTrainer."""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import datasets
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, ProgressCallback

from dora_kernels.peft.callback import AccumulatingCallback

from ..checkpoints.checkpoint import newest_checkpoint, step_of
from ..checkpoints.lock import check_folder, sole_run
from ..checkpoints.metrics import METRICS, keep_until
from ..data.order import steps_per_epoch
from ..data.rows import load_rows
from ..distributed.launchers import check_launcher, launched_with_fsdp
from ..distributed.processes import broadcast, join, print_once
from ..distributed.sharding import full_adapter
from ..flags import Flags
from ..flags.trainer_fields import trainer_fields
from ..model.adapter import add_adapter
from ..model.base_model import check_targets, compute_dtype, load_model, load_tokenizer
from ..model.liger import use_fused_loss
from ..stopping import StopRequest, stop_on_interrupt, stop_on_sigterm
from . import evaluations
from .advice import advice
from .callbacks import QuietProgress, StopOnRequest, WriteMetrics
from .config import trainer_config
from .hub import make_repository, push
from .output import write_account, write_output
from .preference import config_class, trainer_class
from .report import early_line, resume_hint, run_line, stopped_line, summary
from .resumable import Resumable
from .trainer import DoraTrainer

# Flags that change no number of a run, so that a resumed run may have others.
FREE = {"config", "output_dir", "resume", "save_step", "eval_step", "bad_row_limit"} | {
    *("report_to", "hub_model_id", "push_to_hub")
}


def run(flags: Flags, command: str) -> None:
    """Fine-tune as the flags say. On SIGTERM or Ctrl-C, save a checkpoint and return.

    Args:
        command: the command line that continues the run, printed when it can be continued.

    Raises:
        ValueError, OSError: bad input, before any work starts where it can be known.
        FloatingPointError: a loss or a gradient that is not finite.
        KeyboardInterrupt: Ctrl-C outside training, or a second one; it says what is saved.
    """
    this = Run(replace(flags, fsdp=flags.fsdp or launched_with_fsdp()), command)
    this.prepare()
    with stop_on_sigterm() as request, this.lock():
        this.build(request)
        try:
            if this.train():
                this.finish()
        except (OSError, SafetensorError) as error:  # a full disk, for one
            raise OSError(f"{error}; {resume_hint(flags, command, newest_checkpoint(this.output_dir))}") from error
        except KeyboardInterrupt:
            hint = resume_hint(flags, command, newest_checkpoint(this.output_dir))
            raise KeyboardInterrupt(f"aborted; {hint}") from None


class Run:
    """One fine-tuning run of one process.

    Attributes:
        device, processes, tokenizer, rows: set by `prepare`.
        checkpoint, evaluations, config, adapter, trainer, request: set by `build`.
        seconds: of training, set by `train`.
    """

    def __init__(self, flags: Flags, command: str):
        self.flags, self.command, self.output_dir = flags, command, Path(flags.output_dir)

    def prepare(self) -> None:
        """Check the flags, and read the tokenizer and the rows."""
        flags = self.flags
        flags.check()
        trainer_fields(flags.set, config_class(flags.task))  # raises before any work
        self.device = flags.torch_device
        check_launcher(compute_dtype(self.device))
        self.processes = join(self.device)
        check_folder(self.output_dir, flags.resume)
        self.tokenizer, notes = load_tokenizer(flags.base_model, flags.trust_remote_code)
        if not flags.init_adapter:
            check_targets(flags.base_model, flags.dora, flags.trust_remote_code, by_peft=flags.by_peft)
        self.rows = load_rows(
            flags.data_path,
            self.tokenizer,
            cutoff_len=flags.cutoff_len,
            # What is never evaluated is not withheld.
            val_set_size=0 if flags.eval_step == 0 and flags.val_set_size is None else flags.val_set_size,
            bad_row_limit=flags.bad_row_limit,
            seed=flags.seed,
            long_rows=flags.long_rows,
            assistant_only_loss=flags.assistant_only_loss,
            mapping=flags.mapping,
            config=flags.data_config,
            split=flags.data_split,
            task=flags.task,
        )
        if flags.push_to_hub and self.processes.is_main_process:
            make_repository(flags.hub_model_id)
        print_once("\n".join([*notes, *self.rows.said]))

    def lock(self) -> AbstractContextManager:
        """The scope in which no other run may write to the output folder."""
        return sole_run(self.output_dir) if self.processes.is_main_process else nullcontext()

    def build(self, request: StopRequest) -> None:
        """Load the model, put the adapter on it and make the trainer."""
        self.request, is_main = request, self.processes.is_main_process
        if is_main:
            write_account(self.rows, self.output_dir)
        self.checkpoint = broadcast(resume_point(self.output_dir, self.flags.resume) if is_main else None)
        held_out = len(self.rows.validation or ())
        self.evaluations = evaluations.planned(
            self.flags.eval_step, held_out=held_out, steps=self._steps(), batch=self._batch()
        )
        said = [evaluations.note(self.evaluations, held_out=held_out, asked=self.flags.eval_step is not None)]
        for sentence in (*filter(None, said), *advice(self.flags, self.device)):
            print_once(sentence)
        # Before the model, whose weights take minutes: the configuration checks its fields.
        self.config = trainer_config(self.flags, eval_step=self.evaluations.period, resumed=self.checkpoint is not None)
        model = load_model(
            self.flags.base_model,
            self.device,
            quantize=self.flags.quantize,
            keep_on_cpu=self.flags.fsdp,  # FSDP moves the layers to the GPU one at a time, and shards them there
            trust_remote_code=self.flags.trust_remote_code,
        )
        self.adapter = add_adapter(model, self.flags)
        if self.flags.use_liger:
            use_fused_loss(model)
        print_once(run_line(self.flags, self.adapter, model, self.device, self.processes.num_processes))
        self.trainer = self._make_trainer()

    def _batch(self) -> int:
        """Rows per optimizer step, over all processes."""
        return self.flags.batch_size * self.flags.gradient_accumulation_steps * self.processes.num_processes

    def _steps(self) -> int:
        """Optimizer steps of the run. Packing makes fewer of them, and evaluations more frequent."""
        return self.flags.max_steps or math.ceil(
            self.flags.num_epochs * steps_per_epoch(len(self.rows.train), self._batch())
        )

    def _evaluated_rows(self) -> datasets.Dataset | None:
        if not self.evaluations.period:
            return None
        rows = self.rows.validation.select_columns(self.rows.trained)
        return rows.select(evaluations.chosen_rows(len(rows), self.evaluations.rows, self.flags.seed))

    def _make_trainer(self) -> Resumable:
        flags, rows = self.flags, self.rows
        settings = {name: value for name, value in asdict(flags).items() if name not in FREE}
        # Texts have `input_ids` and `labels`, so TRL tokenises nothing of them. It keeps the column `place`.
        own = {"fused_loss": flags.use_liger} if flags.task == "sft" else {}
        make = DoraTrainer if flags.task == "sft" else trainer_class(flags.task)
        trainer = make(
            self.adapter,
            run=settings | {"data": rows.fingerprint, "processes": self.processes.num_processes},
            args=self.config,
            train_dataset=rows.train.select_columns(rows.trained),
            eval_dataset=self._evaluated_rows(),
            processing_class=self.tokenizer,
            callbacks=[
                AccumulatingCallback(keep_weights=flags.keep_weights),
                WriteMetrics(self.output_dir / METRICS),
                StopOnRequest(self.request),
            ],
            **own,
        )
        if self.evaluations.period and flags.early_stopping:
            trainer.add_callback(EarlyStoppingCallback(flags.early_stopping))
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(QuietProgress)
        return trainer

    def train(self) -> bool:
        """Train from the checkpoint, if there is one. Returns False if a signal ended training early."""
        started = time.perf_counter()
        with stop_on_interrupt(self.request):
            self.trainer.train_from(self.checkpoint)
        self.seconds = time.perf_counter() - started
        state = self.trainer.state
        if stopped := self.request.requested and state.global_step < state.max_steps:
            print_once(stopped_line(self.flags, self.command, state.global_step))
        elif self.flags.early_stopping and state.global_step < state.max_steps:
            print_once(early_line(self.flags, state.global_step, state.best_global_step))
        return not stopped

    def finish(self) -> None:
        """Write the output files, print the summary and upload the adapter."""
        # All processes gather what FSDP shards; the main one writes.
        with full_adapter(self.adapter.model, keep=self.processes.is_main_process):
            if not self.processes.is_main_process:
                return
            write_output(self.flags, self.adapter, self.tokenizer, self.rows, self.trainer.state.global_step)
            print(summary(self.flags, self.seconds))
            if self.flags.push_to_hub:
                print(f"pushed to {push(self.output_dir, self.flags.hub_model_id)}")


def resume_point(output_dir: Path, resume: bool) -> Path | None:
    """The checkpoint to continue from. It is printed, and metrics.jsonl is cut back to its step."""
    checkpoint = newest_checkpoint(output_dir) if resume else None
    if checkpoint:
        print(f"resuming from {checkpoint}")
    elif resume:
        print(f"no sound checkpoint in {output_dir}: starting from the beginning")
    keep_until(output_dir / METRICS, step_of(checkpoint) if checkpoint else -1)
    return checkpoint
