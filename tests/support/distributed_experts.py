"""What each of two processes does that train adapters of fused experts, under DDP and FSDP2 around decoder layers:
`torchrun --nproc_per_node 2 -m tests.support.distributed_experts FOLDER` leaves the losses of each."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dora_kernels as dk
from dora_kernels.layers.experts import adapted_experts
from tests.support.shard_training import train
from tests.support.tiny_experts import tiny_experts

CONFIG = dk.DoraConfig(
    r=3, lora_alpha=6, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
)


def adapted_mixtral():
    torch.manual_seed(0)
    return dk.apply_dora(tiny_experts("Mixtral", torch.float32), CONFIG).train()


def sharded():
    model = adapted_mixtral()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    adapters = list(adapted_experts(model).values())
    assert all(isinstance(parameter, DTensor) for adapter in adapters for parameter in adapter.parameters())
    assert all(adapter.lora_A.to_local().shape[0] == 2 for adapter in adapters), "each process holds half"
    return model


def work(folder):
    dist.init_process_group("gloo")
    models = {"ddp": DistributedDataParallel(adapted_mixtral()), "fsdp2": sharded()}
    found = {}
    for name, model in models.items():
        losses = train(model, lambda tokens: tokens.chunk(2)[dist.get_rank()])
        dist.all_reduce(losses)
        found[name] = losses / 2
    if dist.get_rank() == 0:
        save_file(found, folder / "losses.safetensors")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    dist.barrier()
    # Past the interpreter's shutdown, in which a thread of gloo's that frees a tensor aborts it.
    os._exit(0)
