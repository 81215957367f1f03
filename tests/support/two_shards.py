"""Two processes on a CPU under FSDP2, as `--fsdp` has them on GPUs: `python -m tests.support.two_shards DATA FOLDER`.

On a CPU accelerate runs DDP where FSDP2 is asked for, and the command refuses to ask. Here both are told otherwise;
what follows is all theirs and ours: wrapping decoder layers, sharding, gathering, clipping, saving, resuming.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from dora_kernels.layers.frozen import Freezable
from tests.support.shard_training import sharded
from tests.support.training_runs import arguments
from tests.support.two_processes import before_step, in_two_processes
from training.__main__ import main
from training.finetune import config
from training.finetune import run as finetune
from training.finetune.trainer import DoraTrainer
from training.flags import flags
from training.model import base_model as base

FLAGS = {"batch_size": 1, "gradient_accumulation_steps": 3, "max_steps": 4}
# As `accelerate launch` sets them from a configuration file.
LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
LAUNCHED |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "ACCELERATE_MIXED_PRECISION": "bf16"}


def shard_on_a_cpu():
    """As accelerate's own constructor does it for several GPUs."""
    init = AcceleratorState.__init__

    def sharded(self, *args, fsdp_plugin=None, **options):
        init(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = sharded
    flags.check_sharding = lambda flag, device: None


def look_at_each_step():
    """Asserts that each process holds half of each parameter, and that a layer's forward sees them whole, in fp32."""
    step = DoraTrainer.training_step

    def look(module, inputs):
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        assert len(trained) == 3 and not any(isinstance(parameter, DTensor) for parameter in trained)
        assert {parameter.dtype for parameter in trained} == {torch.float32}, "adapters are not rounded"
        seen.add(module)

    def wrapped(self, *arguments):
        layers = [module for module in self.model.modules() if isinstance(module, Freezable)]
        for parameter in (parameter for layer in layers for parameter in layer.parameters()):
            assert isinstance(parameter, DTensor)
            assert abs(parameter.to_local().shape[0] * 2 - parameter.shape[0]) <= 1, "each process holds half"
        seen.clear()
        hooks = [layer.register_forward_pre_hook(look) for layer in layers]
        loss = step(self, *arguments)
        assert seen == set(layers) != set()
        for hook in hooks:
            hook.remove()
        return loss

    seen = set()
    DoraTrainer.training_step = wrapped
    return lambda: setattr(DoraTrainer, "training_step", step)


def poison(trainer):
    """A NaN in one process only; one in a parameter would be both's."""
    embedding = trainer.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: output * torch.nan)


def runs(data, folder):
    undo = look_at_each_step()
    main(arguments(data, folder / "whole", "--fsdp", **FLAGS))
    # What a run that was killed after its first checkpoint has left.
    if os.environ["RANK"] == "0":
        shutil.copytree(folder / "whole", folder / "resumed", ignore=shutil.ignore_patterns("checkpoint-4"))
        (folder / "resumed" / "adapter_model.safetensors").unlink()
    torch.distributed.barrier()
    del os.environ["ACCELERATE_USE_FSDP"]  # which accelerate has set
    main(arguments(data, folder / "resumed", "--fsdp", "--resume", **FLAGS))
    os.environ |= LAUNCHED
    base.compute_dtype = finetune.compute_dtype = config.compute_dtype = lambda device: torch.bfloat16
    words = arguments(data, folder / "launched", "--use_peft", "--activation_checkpointing", **FLAGS | {"max_steps": 2})
    main(words)
    sharded(folder / "state.safetensors")
    undo()
    before_step(1, poison)
    try:
        main(arguments(data, folder / "poisoned", **FLAGS))
    except SystemExit as error:
        # One line each: the two processes share the stream.
        sys.stdout.write(f"process {os.environ['RANK']} said {error}\n")


if __name__ == "__main__":
    shard_on_a_cpu()
    in_two_processes(lambda: runs(*map(Path, sys.argv[1:])))
