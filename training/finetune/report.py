"""What a run prints, and the adapter's model card."""

import math
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from dora_kernels.adapters.save_load import WEIGHTS_NAME

from ..checkpoints.metrics import METRICS, read_rows
from ..data.rows import Rows
from ..flags import Flags
from ..model.adapter import Adapter
from ..spelling import spelled
from .meter import peak_memory


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
    where = f"--base_model {flags.base_model} --adapter {folder}"
    lines.append(f"  {spelled('merge')} {where} --output_dir {folder}-merged")
    return "\n".join(lines)


def write_card(flags: Flags, adapter: Adapter, rows: Rows, path: Path) -> None:
    """The README.md that goes beside the adapter."""
    folder = Path(flags.output_dir)
    data = ModelCardData(
        base_model=flags.base_model,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["dora" if flags.use_dora else "lora", flags.task],
    )
    settings = [
        *("lora_r", "lora_alpha", "lora_dropout", "learning_rate", "batch_size", "gradient_accumulation_steps"),
        *("num_epochs", "cutoff_len", "seed"),
    ]
    measured = losses(folder / METRICS)
    result = (
        f"Held-out loss {measured[0]:.4f} before and {measured[1]:.4f} after training "
        f"(perplexity {_perplexity(measured[0]):.4g} and {_perplexity(measured[1]):.4g})."
        if measured
        else "No rows were held out."
    )
    table = "\n".join(f"| {name} | {getattr(flags, name)} |" for name in settings)
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
| quantised base | {"NF4" if flags.quantize else "no"} |
"""
    ModelCard(text).save(path)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))
