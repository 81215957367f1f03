"""What a run tells while it goes (metrics.jsonl, one progress bar), and SIGTERM as a request to stop after saving."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import ProgressCallback, TrainerCallback

from ..checkpoints.metrics import append_row
from ..distributed.processes import gather


class StopRequest:
    """`requested` becomes true when SIGTERM arrives."""

    requested = False


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """While open, SIGTERM no longer ends the process: whoever holds the request looks at it when it can stop."""
    request = StopRequest()

    def note(number, frame):
        request.requested = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)


# Of what transformers and TRL log, the columns that are not about the data itself.
LEFT_OUT = ("total_flos", "epoch", "entropy", "eval_entropy", "eval_epoch")


class WriteMetrics(TrainerCallback):
    """One row of metrics.jsonl per logged step and per evaluation."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and ("loss" in logs or "eval_loss" in logs):
            row = {name: value for name, value in logs.items() if name not in LEFT_OUT}
            append_row(self.path, {"step": state.global_step} | row)


class QuietProgress(ProgressCallback):
    """The bar shows the loss; a line is printed for evaluations only, not for every step."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
        if "eval_loss" in logs:
            loss, perplexity = logs["eval_loss"], logs["eval_perplexity"]
            self.training_bar.write(f"step {state.global_step}: eval_loss {loss:.4f}, perplexity {perplexity:.3g}")


class StopOnRequest(TrainerCallback):
    """Saves and ends training at the step, or the evaluation, in which the request came to any of the processes."""

    def __init__(self, request: StopRequest):
        self.request = request

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # Together: a process that stops alone would leave the others waiting for its gradients.
        if any(gather(self.request.requested)) and state.global_step < state.max_steps:
            self.request.requested = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    on_evaluate = on_step_end
