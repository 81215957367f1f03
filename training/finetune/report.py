"""What a run prints, and the adapter's model card."""

import json
import math
import shlex
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from dora_kernels.adapters.peft_config import CONFIG_NAME
from dora_kernels.adapters.save_load import WEIGHTS_NAME

from ..checkpoints.metrics import METRICS, read_rows
from ..data.rows import Rows
from ..flags import Flags
from ..model.adapter import Adapter
from ..spelling import spelled
from .meter import peak_memory

SHOWN = ("use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
"""Fields of an adapter that a model card shows where they are set."""


def run_line(flags: Flags, adapter: Adapter, model: PreTrainedModel, device: torch.device, processes: int) -> str:
    """The adapter, the base model's dtype, the device and the number of processes."""
    dtype = "NF4" if flags.quantize else str(model.dtype)[6:]
    return f"{adapter.description}; base in {dtype} on {device}" + (
        f", in {processes} processes" if processes > 1 else ""
    )


def stopped_line(flags: Flags, command: str, step: int) -> str:
    """What a signal led to, and how to continue."""
    saved = Path(flags.output_dir) / f"checkpoint-{step}"
    return f"\nstopped and saved at step {step}; {_how_to_continue(flags, command, saved)}"


def early_line(flags: Flags, step: int, best: int) -> str:
    """Why `--early_stopping` ended training. The adapter is the last step's."""
    return (
        f"\nstopped early at step {step}: {flags.early_stopping} evaluations without a lower loss than step {best}'s; "
        f"the adapter is of step {step}"
    )


def resume_hint(flags: Flags, command: str, checkpoint: Path | None) -> str:
    """What is left of a run that failed: its newest sound checkpoint, if there is one, and how to continue from it."""
    if checkpoint is None:
        return "nothing was saved before"
    return f"{checkpoint} is sound: {_how_to_continue(flags, command, checkpoint)}"


def _how_to_continue(flags: Flags, command: str, checkpoint: Path) -> str:
    if flags.deepspeed:
        return f"go on from its adapter, in a new --output_dir, with --init_adapter {checkpoint}"
    return f"continue with\n  {command}"


def losses(metrics: Path) -> tuple[float, float] | None:
    """Held-out loss before and after training, or None if it was not measured twice."""
    measured = [row["eval_loss"] for row in read_rows(metrics) if "eval_loss" in row]
    return (measured[0], measured[-1]) if len(measured) > 1 else None


def summary(flags: Flags, seconds: float) -> str:
    """The last lines of a run: losses before and after, time, memory, files and the next command."""
    folder = Path(flags.output_dir)
    lines = ["", f"{'':22}{'before':>10}{'tuned':>10}"]
    if measured := losses(folder / METRICS):
        lines.append(f"{'held-out loss':22}{measured[0]:10.4f}{measured[1]:10.4f}")
        if flags.task == "sft":
            lines.append(f"{'held-out perplexity':22}{_perplexity(measured[0]):10.4g}{_perplexity(measured[1]):10.4g}")
    else:
        lines = ["", "nothing was held out, so nothing says how good the adapter is"]
    size = (folder / WEIGHTS_NAME).stat().st_size
    lines.append(f"{seconds:.0f} s of training, {peak_memory() / 1e9:.2f} GB at the peak; adapter {size / 1e6:.2f} MB")
    lines.append(f"adapter: {folder}; losses: {folder / 'loss.png'}, {folder / METRICS}; card: {folder / 'README.md'}")
    lines.append("next:")
    where = shlex.join(["--base_model", flags.base_model, "--adapter", str(folder), "--output_dir", f"{folder}-merged"])
    lines.append(f"  {spelled('merge')} {where}")
    return "\n".join(lines)


def title(flags: Flags) -> str:
    """What was trained, and the unit of its loss."""
    unit = ", nats per target token" if flags.task == "sft" else ""
    return f"{'DoRA' if flags.use_dora else 'LoRA'}, {flags.task.upper()}{unit}"


def write_card(flags: Flags, adapter: Adapter, rows: Rows, steps: int, path: Path) -> None:
    """The README.md that goes beside the adapter's files, of which it says what they hold.

    Args:
        steps: optimizer steps that were taken.
        path: in the folder of the adapter's files.
    """
    folder = Path(flags.output_dir)
    data = ModelCardData(
        base_model=flags.base_model,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["dora" if flags.use_dora else "lora", flags.task],
    )
    measured = losses(folder / METRICS)
    held_out = len(rows.validation or ())
    perplexity = f" (perplexity {_perplexity(measured[0]):.4g} and {_perplexity(measured[1]):.4g})" if measured else ""
    result = (
        f"Held-out loss {measured[0]:.4f} before and {measured[1]:.4f} after training"
        f"{perplexity if flags.task == 'sft' else ''}."
        if measured
        else "No held-out loss was measured."
    )
    own = json.loads((path.parent / CONFIG_NAME).read_text(encoding="utf-8"))
    targets = own["target_modules"]
    settings = {
        "rank": own["r"],
        "alpha": own["lora_alpha"],
        "dropout": own["lora_dropout"],
        "targets": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
        **{name: own[name] for name in SHOWN if own.get(name)},
        **({"continued from": flags.init_adapter} if flags.init_adapter else {}),
        "optimizer steps": steps,
        "rows per step": f"{flags.batch_size} × {flags.gradient_accumulation_steps}, in each process",
        "passes over the rows": f"at most {flags.max_steps} steps" if flags.max_steps else f"{flags.num_epochs:g}",
        "rows held out": held_out,
        "learning_rate": flags.learning_rate,
        "cutoff_len": flags.cutoff_len,
        "seed": flags.seed,
        **dict(setting.split("=", 1) for setting in flags.set),
        "quantised base": "NF4" if flags.quantize else "no",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    name = flags.hub_model_id or str(folder)
    text = f"""---
{data.to_yaml()}
---

# {folder.name}

An adapter for `{flags.base_model}` ({adapter.description.splitlines()[0]}), trained on `{flags.data_path}`
({len(rows.train)} rows, {rows.kind}). {result}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{flags.base_model}")
model = PeftModel.from_pretrained(model, "{name}")
```

| setting | value |
|---|---|
{table}
"""
    ModelCard(text).save(path)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))
