"""Two processes on one machine: launching them, and what each does under `torchrun -m tests.support.two_processes`.

That is one launch, in which importing is paid once, of six runs: one on rows that do not divide; a whole one; one that
SIGTERM reaches in one process only; its continuation; one on packed rows; and one whose loss goes NaN in one process,
through the module's own `__main__`.
"""

import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.multiprocessing

from tests.support.training_runs import arguments
from training.__main__ import main
from training.finetune.trainer import DoraTrainer

# Neither 21 training rows nor 9 held-out ones divide by the processes' batches.
UNEVEN = {"val_set_size": 9, "max_steps": None, "num_epochs": 2, "gradient_accumulation_steps": 3, "eval_step": 4}
# 20 rows in batches of 2 x 1 x 3 are 4 steps an epoch, the last one smaller; dropout needs each process's generators.
FLAGS = {"batch_size": 1, "max_steps": None, "num_epochs": 2, "gradient_accumulation_steps": 3, "save_step": 100}
FLAGS |= {"lora_dropout": 0.2}
STOP = 6
PACKED = {"batch_size": 1, "max_steps": 1, "save_step": 0, "cutoff_len": 256}


def torchrun(*words):
    """Two processes that do `words`, to their end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=600)


def in_two_processes(work):
    """Calls `work()` in two processes that are forked from this one, where everything is imported already, with the
    environment that torchrun sets. Raises if one of them fails.

    A forked process skips the interpreter's shutdown, in which a thread of gloo's that frees a tensor aborts it.
    `destroy_process_group` would not do after FSDP2: DTensor caches its device mesh, which holds the process group.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)  # a fork does not take threads along
    torch.multiprocessing.start_processes(_work_of_rank, (work,), nprocs=2, start_method="fork")


def _work_of_rank(rank, work):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    work()


def gloo_threads():
    """How many threads of this process run gloo's collectives."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return names.count("pt_gloo_runloop")


def before_step(number, act):
    """Calls `act(trainer)` in the second process before step `number`. Returns what undoes this."""
    step = DoraTrainer.training_step

    def wrapped(self, *arguments):
        if self.args.process_index == 1 and self.state.global_step == number - 1:
            act(self)
        return step(self, *arguments)

    DoraTrainer.training_step = wrapped
    return lambda: setattr(DoraTrainer, "training_step", step)


def poison(trainer):
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.up_proj.lora_A[0, 0] = torch.inf


def runs(data, uneven, folder):
    main(arguments(uneven, folder / "uneven", **UNEVEN | {"batch_size": 1}))
    main(arguments(data, folder / "whole", **FLAGS))
    undo = before_step(STOP, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    main(arguments(data, folder / "stopped", **FLAGS))
    undo()
    main(arguments(data, folder / "stopped", "--resume", **FLAGS))
    main(arguments(data, folder / "packed", "--packing", **PACKED))
    before_step(3, poison)
    threads = gloo_threads()
    sys.argv[1:] = arguments(data, folder / "poisoned", **FLAGS | {"save_step": 1})
    try:
        runpy.run_module("training", run_name="__main__")
    except SystemExit as error:
        # One line each: the two processes share the stream.
        sys.stdout.write(f"process {os.environ['RANK']} said {error}\n")
    sys.stdout.write(f"gloo's threads: {threads}, at the end {gloo_threads()}\n")


if __name__ == "__main__":
    runs(*map(Path, sys.argv[1:]))
