"""Problems of an embedding with a DoRA adapter, solved by the engine, by PEFT, and in fp64 by PyTorch alone."""

import copy
from dataclasses import dataclass

import peft
import torch
from torch import nn

from dora_kernels.ops.dora_embedding import dora_embedding
from tests.support.conv import OneLayer

NAMES = ("y", "dA", "dB", "dm")


@dataclass
class Problem:
    """Inputs of one embedding and the gradient that comes back."""

    ids: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor
    grad_y: torch.Tensor
    scaling: float = 2.0

    def leaves(self, convert=lambda tensor: tensor):
        """A, B and m, requiring gradients."""
        return [convert(t.detach().clone()).requires_grad_() for t in (self.lora_A, self.lora_B, self.magnitude)]


def make_embedding(rows=23, columns=12, dtype=torch.float32, seed=0, **settings):
    torch.manual_seed(seed)
    return nn.Embedding(rows, columns, **settings).to(dtype)


def make_problem(embedding, shape=(3, 5), rank=4, adapter_dtype=None, seed=0):
    """Random ids, some of them more than once, and an adapter at the scales of a trained model, in PEFT's shapes."""
    generator = torch.Generator().manual_seed(seed)
    weight = embedding.weight.detach()
    rows, columns = weight.shape
    adapter_dtype = adapter_dtype or weight.dtype

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    norm = weight.double().norm(dim=0)
    return Problem(
        ids=torch.randint(0, rows, shape, generator=generator),
        lora_A=(0.2 * normal(rank, rows) / rank**0.5).to(adapter_dtype),
        lora_B=normal(columns, rank).to(adapter_dtype),
        magnitude=(norm * (1 + 0.1 * normal(columns))).to(adapter_dtype),
        grad_y=normal(*shape, columns).to(weight.dtype),
    )


def collect(y, leaves, grad_y):
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, grad_y))))


def solve(embedding, problem, **options):
    """By the engine."""
    leaves = problem.leaves()
    y = dora_embedding(
        problem.ids, embedding.weight.detach(), *leaves, scaling=problem.scaling, padding_idx=embedding.padding_idx,
        scale_grad_by_freq=embedding.scale_grad_by_freq, **options,
    )  # fmt: skip
    return collect(y, leaves, problem.grad_y)


def exact(embedding, problem):
    """In fp64: the table W' in full, the norm detached, and its rows taken by a product with one-hot vectors."""
    leaves = lora_A, lora_B, magnitude = problem.leaves(torch.Tensor.double)
    adapted = embedding.weight.detach().double() + problem.scaling * (lora_B @ lora_A).T
    merged = magnitude / adapted.detach().norm(dim=0) * adapted
    y = nn.functional.one_hot(problem.ids, len(merged)).double() @ merged
    return collect(y, leaves, problem.grad_y.double())


def peft_model(embedding, problem, **options):
    """The installed PEFT's DoRA layer over a copy of the embedding, with the problem's adapter."""
    rank = problem.lora_A.shape[0]
    config = peft.LoraConfig(
        r=rank, lora_alpha=problem.scaling * rank, target_modules=["layer"], use_dora=True, **options
    )
    model = peft.get_peft_model(OneLayer(copy.deepcopy(embedding)), config, autocast_adapter_dtype=False)
    for part, value in zip(parts_of(model.base_model.model.layer), (problem.lora_A, problem.lora_B, problem.magnitude)):
        part.data = value.clone()
    return model


def parts_of(layer, adapter="default"):
    """A, B and m of PEFT's layer."""
    factors = [getattr(layer, name)[adapter] for name in ("lora_embedding_A", "lora_embedding_B")]
    return [*factors, layer.lora_magnitude_vector[adapter].weight]


def solve_peft(model, problem):
    """By a PEFT model of `peft_model`, patched or not."""
    return collect(model(problem.ids), parts_of(model.base_model.model.layer), problem.grad_y)
