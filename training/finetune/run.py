"""A fine-tuning run from flags: check, load, train, report. The engine is TRL's SFTTrainer."""

import json
import tempfile
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import ProgressCallback
from trl import SFTConfig

from dora_kernels.adapters.integrity import put_in_place

from ..checkpoints.checkpoint import newest_checkpoint, remove, step_of, write_whole
from ..checkpoints.lock import check_folder, sole_run
from ..checkpoints.metrics import METRICS, keep_until, plot_losses
from ..data.rows import Rows, load_rows
from ..distributed.launchers import check_launcher, launched_with_fsdp, zero_config
from ..distributed.processes import join, of_main
from ..distributed.sharding import whole_adapter
from ..flags import Flags
from ..model.adapter import WEIGHTS, Adapter, add_adapter
from ..model.base_model import check_targets, compute_dtype, load_model, load_tokenizer
from ..model.liger import use_fused_loss
from .callbacks import QuietProgress, StopOnRequest, StopRequest, WriteMetrics, stop_on_sigterm
from .hub import make_repository, push
from .report import summary, write_card
from .trainer import DoraTrainer

# Flags that change no number of a run, so that a resumed run may have others.
FREE = {"config", "output_dir", "resume", "save_step", "eval_step", "bad_row_limit"} | {
    *("report_to", "hub_model_id", "push_to_hub")
}
WEIGHT_DECAY = 0.01
EVAL_BATCH = 8  # rows, at least: an evaluation keeps no activations


def run(flags: Flags, command: str) -> None:
    """Fine-tune as the flags say. `command` is the command line, printed when the run can be continued.

    Raises ValueError or OSError on bad input, before any work starts where it can be known, and FloatingPointError on
    a loss that is not finite. On SIGTERM it saves and returns.
    """
    flags = replace(flags, fsdp=flags.fsdp or launched_with_fsdp())
    flags.check()
    device = flags.torch_device
    check_launcher(compute_dtype(device))
    processes = join(device)
    say = print if processes.is_main_process else no_words
    output_dir = Path(flags.output_dir)
    check_folder(output_dir, flags.resume)
    tokenizer, said = load_tokenizer(flags.base_model, flags.trust_remote_code)
    if not flags.init_adapter:
        check_targets(flags.base_model, flags.dora, flags.trust_remote_code)
    rows = load_rows(
        flags.data_path,
        tokenizer,
        cutoff_len=flags.cutoff_len,
        val_set_size=flags.val_set_size,
        bad_row_limit=flags.bad_row_limit,
        seed=flags.seed,
    )
    if flags.assistant_only_loss and rows.kind != "messages":
        raise ValueError(f"`--assistant_only_loss` needs the column `messages`; the data has {rows.kind}")
    if flags.push_to_hub and processes.is_main_process:
        make_repository(flags.hub_model_id)
    say("\n".join([*said, *rows.said]))

    with stop_on_sigterm() as request, sole_run(output_dir) if processes.is_main_process else nullcontext():
        if rows.skipped and processes.is_main_process:
            write_whole(output_dir / "skipped_rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows.skipped))
        checkpoint = of_main(resume_point(output_dir, flags.resume) if processes.is_main_process else None)
        model = load_model(
            flags.base_model,
            device,
            quantize=flags.quantize,
            # FSDP takes it to the GPU one layer at a time, and leaves a part there.
            stay=flags.fsdp,
            trust_remote_code=flags.trust_remote_code,
        )
        adapter = add_adapter(model, flags)
        if flags.use_liger:
            use_fused_loss(model)
        together = f", in {processes.num_processes} processes" if processes.num_processes > 1 else ""
        say(f"{adapter.description}; base in {'NF4' if flags.quantize else str(model.dtype)[6:]} on {device}{together}")
        trainer = build_trainer(flags, adapter, tokenizer, rows, request, resumed=checkpoint is not None)
        started = time.perf_counter()
        try:
            trainer.train_from(checkpoint)
            if request.requested and trainer.state.global_step < trainer.state.max_steps:
                step = trainer.state.global_step
                saved = output_dir / f"checkpoint-{step}"
                say(f"\nstopped and saved at step {step}; {onward(flags, command, saved)}")
                return
            seconds = time.perf_counter() - started
            # All processes gather what FSDP sharded; the main one writes.
            with whole_adapter(adapter.model, keep=processes.is_main_process):
                if processes.is_main_process:
                    finish(flags, adapter, tokenizer, rows, seconds)
        except (OSError, SafetensorError) as error:  # a full disk
            sound = newest_checkpoint(output_dir)
            kept = f"{sound} is sound: {onward(flags, command, sound)}" if sound else "nothing was saved before"
            raise OSError(f"{error}; {kept}") from error


def onward(flags: Flags, command: str, checkpoint: Path) -> str:
    """How a run that ended early goes on."""
    if flags.deepspeed:
        return f"go on from its adapter, in a new --output_dir, with --init_adapter {checkpoint}"
    return f"continue with\n  {command} --resume"


def no_words(text: str) -> None:
    """What a process says that is not the main one."""


def resume_point(output_dir: Path, resume: bool) -> Path | None:
    """The checkpoint to continue from, said out loud; and metrics.jsonl taken back to it."""
    checkpoint = newest_checkpoint(output_dir) if resume else None
    if checkpoint:
        print(f"resuming from {checkpoint}")
    elif resume:
        print(f"no sound checkpoint in {output_dir}: starting from the beginning")
    keep_until(output_dir / METRICS, step_of(checkpoint) if checkpoint else -1)
    return checkpoint


def build_trainer(
    flags: Flags, adapter: Adapter, tokenizer, rows: Rows, request: StopRequest, *, resumed: bool
) -> DoraTrainer:
    """The trainer, with everything in it but the checkpoint to resume from."""
    # `place` says where a row stood; `_prepare_dataset` keeps it and the collator never sees it.
    trainer = DoraTrainer(
        adapter,
        run={name: value for name, value in asdict(flags).items() if name not in FREE}
        | {"data": rows.fingerprint, "processes": PartialState().num_processes},
        args=trainer_config(flags, evaluates=bool(rows.validation and flags.eval_step), resumed=resumed),
        fused_loss=flags.use_liger,
        train_dataset=rows.train,
        eval_dataset=rows.validation if flags.eval_step else None,
        processing_class=tokenizer,
        callbacks=[WriteMetrics(Path(flags.output_dir, METRICS)), StopOnRequest(request)],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(QuietProgress)
    return trainer


def trainer_config(flags: Flags, *, evaluates: bool, resumed: bool) -> SFTConfig:
    """Our flags in transformers' and TRL's words."""
    with warnings.catch_warnings():
        # TRL sets it by default under its old name, so it must be said under that name.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        config = _sft_config(flags, evaluates, resumed)
    if config.device.type == "cuda" and config.parallel_mode.value == "not_distributed":
        # Several GPUs are visible and one is asked for: no nn.DataParallel, which TRL refuses. There is no argument
        # for it; transformers sets this itself for a model that is spread over devices.
        config._n_gpu = 1
    # As `bf16` says: transformers would take what `accelerate launch` says where that is False.
    config.mixed_precision = "bf16" if config.bf16 else "no"
    return config


def _sft_config(flags: Flags, evaluates: bool, resumed: bool) -> SFTConfig:
    return SFTConfig(
        output_dir=flags.output_dir,
        per_device_train_batch_size=flags.batch_size,
        per_device_eval_batch_size=max(flags.batch_size, EVAL_BATCH),
        gradient_accumulation_steps=flags.gradient_accumulation_steps,
        num_train_epochs=flags.num_epochs,
        max_steps=flags.max_steps or -1,
        learning_rate=flags.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=flags.warmup_ratio,
        weight_decay=WEIGHT_DECAY,
        max_length=flags.cutoff_len,
        packing=flags.packing,
        eval_packing=False,
        assistant_only_loss=flags.assistant_only_loss,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=flags.eval_step or None,
        # The base's loss; a resumed run has it already.
        eval_on_start=evaluates and not resumed,
        save_strategy="steps" if flags.save_step else "no",
        save_steps=flags.save_step or 500,
        logging_steps=1,
        disable_tqdm=False,
        logging_nan_inf_filter=False,
        # `training.distributed.launchers` says why not in FSDP and DeepSpeed.
        bf16=compute_dtype(flags.torch_device) == torch.bfloat16 and not (flags.fsdp or flags.deepspeed),
        # Configured by `accelerate launch`, it is accelerate that knows how.
        fsdp=(flags.fsdp and not launched_with_fsdp()) or None,
        deepspeed=zero_config(flags.deepspeed) if flags.deepspeed else None,
        use_cpu=flags.torch_device.type == "cpu",
        # Every parameter of an adapter is used in every step.
        ddp_find_unused_parameters=False,
        torch_compile=flags.use_compile,
        gradient_checkpointing=flags.activation_checkpointing,
        report_to=flags.trackers,
        seed=flags.seed,
    )


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Raises OSError if it cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        # tokenizers, in Rust, has no kind of its own for a full disk
        raise OSError(f"the tokenizer cannot be written to {folder}: {error}") from error


def finish(flags: Flags, adapter: Adapter, tokenizer, rows: Rows, seconds: float) -> None:
    """The adapter, its card and the curve in the output folder; the summary; the upload."""
    output_dir = Path(flags.output_dir)
    for leftover in output_dir.glob(".finish-*"):  # of a run that was killed here
        remove(leftover)
    # Beside what an earlier run may have left there, and into its place once all of it is written.
    with tempfile.TemporaryDirectory(prefix=".finish-", dir=output_dir) as temporary:
        staged = Path(temporary)
        adapter.write(staged)
        save_tokenizer(tokenizer, staged)
        plot_losses(output_dir / METRICS, staged / "loss.png")
        write_card(flags, adapter, rows, staged / "README.md")
        files = [str(path.relative_to(staged)) for path in staged.rglob("*") if path.is_file()]
        put_in_place(staged, output_dir, sorted(files, key=lambda name: name == WEIGHTS))
    print(summary(flags, seconds))
    if flags.push_to_hub:
        print(f"pushed to {push(output_dir, flags.hub_model_id)}")
