"""Callbacks of a run: metrics.jsonl, the progress bar, and stopping on a signal."""

from pathlib import Path

from transformers import ProgressCallback, TrainerCallback

from ..checkpoints.metrics import append_row
from ..distributed.processes import gather
from ..stopping import StopRequest

# Columns that transformers and TRL log and metrics.jsonl leaves out.
UNLOGGED = ("total_flos", "epoch", "entropy", "eval_entropy", "eval_epoch")


class WriteMetrics(TrainerCallback):
    """Writes one row of metrics.jsonl per logged step and per evaluation."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and ("loss" in logs or "eval_loss" in logs):
            row = {name: value for name, value in logs.items() if name not in UNLOGGED}
            append_row(self.path, {"step": state.global_step} | row)


class QuietProgress(ProgressCallback):
    """Shows the loss in the progress bar, and prints a line for evaluations only."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
        if "eval_loss" in logs:
            said = f"step {state.global_step}: eval_loss {logs['eval_loss']:.4f}"
            for name in ("perplexity", "rewards/accuracies"):
                if (value := logs.get(f"eval_{name}")) is not None:
                    said += f", {name} {value:.3g}"
            self.training_bar.write(said)


class StopOnRequest(TrainerCallback):
    """Saves and ends training after the step or the evaluation in which any process was asked to stop."""

    def __init__(self, request: StopRequest):
        self.request = request

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # All processes stop together: one that stopped alone would leave the others waiting for its gradients.
        if any(gather(self.request.requested)) and state.global_step < state.max_steps:
            self.request.requested = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    on_evaluate = on_step_end
