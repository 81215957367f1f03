"""What stops a training run before one of its steps, and the command that it prints."""

import os
import shlex
import signal

import pytest

from training.finetune.trainer import DoraTrainer

WEIGHTS = "adapter_model.safetensors"


def before_step(monkeypatch, number, act):
    """Calls `act(trainer, inputs)` before the first forward pass of step `number`."""
    step = DoraTrainer.training_step

    def wrapped(self, model, inputs, *rest):
        if self.state.global_step == number - 1 and not done:
            done.append(number)
            act(self, inputs)
        return step(self, model, inputs, *rest)

    done = []
    monkeypatch.setattr(DoraTrainer, "training_step", wrapped)


@pytest.fixture(autouse=True)
def heeded():
    """Ctrl-C is not ignored, as it is where a shell starts the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def sigterm(trainer, inputs):
    os.kill(os.getpid(), signal.SIGTERM)


def ctrl_c(trainer, inputs):
    os.kill(os.getpid(), signal.SIGINT)


def printed_command(out):
    """The words after `python -m training` of the command that the run printed."""
    (line,) = (line.strip() for line in out.splitlines() if line.strip().startswith("python -m training --"))
    return shlex.split(line)[3:]
