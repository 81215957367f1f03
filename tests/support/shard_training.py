"""Training of each process where FSDP2 is around decoder layers.

`fully_shard` gathers a layer's parameters before its forward, so the norms are of whole weights though each process
holds a part. They and W' are kept over the micro-steps, while the gathered parameters come and go.
"""

from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dora_kernels as dk
from tests.support.tiny_models import VOCAB, llama

STEPS = 4
CONFIG = dk.DoraConfig(r=3, lora_alpha=6, space="weight", impl="reference")


def batch(step):
    """Tokens of both processes together: [4, 9]."""
    return torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(step))


def train(model, part, scope=nullcontext):
    """The losses of `STEPS` steps of AdamW on `part(batch)`, one number each; two micro-steps each, inside `scope`."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for step in range(STEPS):
        total = 0.0
        with scope(model):
            for tokens in part(batch(step)).chunk(2):
                loss = model(input_ids=tokens, labels=tokens).loss / 2
                loss.backward()
                total += loss.detach()
            kept = [module.output_use.kept_weight for module in model.modules() if hasattr(module, "output_use")]
            assert any(kept) == (scope is not nullcontext)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return torch.stack(losses)


def adapted():
    torch.manual_seed(0)
    return dk.apply_dora(llama(), CONFIG).train()


def sharded(file):
    """Writes the losses and the full state dict, as safetensors."""
    model = adapted()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    magnitude = model.model.layers[0].mlp.up_proj.magnitude
    assert magnitude.to_local().shape[0] * 2 == magnitude.shape[0], "each process holds half"
    scope = partial(dk.accumulating, keep_weights=True)
    losses = train(model, lambda tokens: tokens.chunk(2)[dist.get_rank()], scope)
    dist.all_reduce(losses)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        save_file({"losses": losses / 2} | {name: tensor.contiguous() for name, tensor in state.items()}, file)
