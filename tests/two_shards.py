"""Two processes on a CPU under FSDP2, as `--fsdp` runs them on GPUs, under `torchrun -m tests.two_shards`.

accelerate has no FSDP2 on a CPU: it runs DDP instead, and the command refuses that. Here both are told otherwise, and all
that follows is theirs and ours: wrapping the decoder layers, sharding, gathering, clipping, saving.
"""

import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from training import flags as training_flags
from training.__main__ import main
from tests.training_runs import arguments


def shard_on_a_cpu():
    """accelerate takes two processes on a CPU for what they are, whatever plugin it is given."""
    init = AcceleratorState.__init__

    def sharded(self, *args, fsdp_plugin=None, **options):
        init(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = sharded
    training_flags.check_sharding = lambda device: None


if __name__ == "__main__":
    shard_on_a_cpu()
    data, folder = map(Path, sys.argv[1:])
    main(arguments(data, folder / "whole", "--fsdp", batch_size=1, gradient_accumulation_steps=3))
