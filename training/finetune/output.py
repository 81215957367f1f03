"""Files in the output folder: rows that were left out or cut; and of a finished run its adapter, card and curve."""

import json
import tempfile
from pathlib import Path

from dora_kernels.adapters.atomic import move_files, remove, write_atomic
from dora_kernels.adapters.save_load import WEIGHTS_NAME

from ..checkpoints.loss_plot import plot_losses
from ..checkpoints.metrics import METRICS
from ..data.rows import Rows
from ..flags import Flags
from ..model.adapter import Adapter
from .report import title, write_card


def write_output(flags: Flags, adapter: Adapter, tokenizer, rows: Rows, steps: int) -> None:
    """Write the files to a temporary folder, then move all of them into the output folder.

    Args:
        steps: optimizer steps that were taken.

    Raises:
        OSError: a file cannot be written. The files of an earlier run are then unchanged.
    """
    output_dir = Path(flags.output_dir)
    for leftover in output_dir.glob(".finish-*"):  # of a run that was killed here
        remove(leftover)
    with tempfile.TemporaryDirectory(prefix=".finish-", dir=output_dir) as temporary:
        staged = Path(temporary)
        adapter.write(staged)
        save_tokenizer(tokenizer, staged)
        plot_losses(output_dir / METRICS, staged / "loss.png", title(flags))
        write_card(flags, adapter, rows, steps, staged / "README.md")
        files = [str(path.relative_to(staged)) for path in staged.rglob("*") if path.is_file()]
        move_files(staged, output_dir, sorted(files, key=lambda name: name == WEIGHTS_NAME))


def write_account(rows: Rows, output_dir: Path) -> None:
    """Write skipped_rows.jsonl and cut_rows.jsonl, or delete those of an earlier run if there are no such rows."""
    for name, listed in (("skipped_rows.jsonl", rows.skipped), ("cut_rows.jsonl", rows.cut)):
        if listed:
            write_atomic(output_dir / name, "".join(json.dumps(row) + "\n" for row in listed))
        else:
            (output_dir / name).unlink(missing_ok=True)


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write the tokenizer's files. Raises OSError if they cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        # tokenizers, which is written in Rust, raises a bare Exception on a full disk.
        raise OSError(f"the tokenizer cannot be written to {folder}: {error}") from error
