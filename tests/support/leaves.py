"""A problem's tensors as fresh leaves, and a call of the engine with them."""

import dora_kernels as dk

TRAINABLE = ("x", "lora_A", "lora_B", "magnitude", "bias")


def leaves_of(problem, trained=TRAINABLE):
    """By name; `trained` require gradients."""
    found = {name: getattr(problem, name) for name in TRAINABLE}
    return {name: t.clone().requires_grad_(name in trained) for name, t in found.items() if t is not None}


def forward(problem, leaves, **options):
    return dk.dora_linear(weight=problem.weight, **leaves, scaling=problem.scaling, **options)
