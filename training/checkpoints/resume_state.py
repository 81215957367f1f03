"""Optimizer moments and random generators as tensors and JSON, for an exact resume."""

import random
from collections.abc import Sequence

import numpy as np
import torch

from ..distributed.sharding import full_tensor, shard_like


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The optimizer's tensors as `optimizer.<parameter index>.<name>`, and its parameter groups as JSON.

    Where parameters are sharded, all processes must call it, and get full tensors.
    """
    state = optimizer.state_dict()
    tensors = {
        f"optimizer.{index}.{name}": full_tensor(value)
        for index, entry in state["state"].items()
        for name, value in entry.items()
        if isinstance(value, torch.Tensor)
    }
    return tensors, state["param_groups"]


def optimizer_numbers(optimizer: torch.optim.Optimizer) -> list[list]:
    """What an optimizer keeps of a parameter beside tensors, as JSON: [parameter index, name, number]. Adafactor does.

    Raises:
        ValueError: it keeps what JSON does not hold.
    """
    found = []
    for index, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            if not isinstance(value, torch.Tensor | int | float | None):
                kind = type(value).__name__
                raise ValueError(f"this optimizer keeps a {kind} ({name}), which no checkpoint holds: --save_step 0")
            found += [] if isinstance(value, torch.Tensor) else [[index, name, value]]
    return found


def set_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], groups: list[dict], numbers: Sequence[list] = ()
) -> None:
    """Restore `optimizer_state` and `optimizer_numbers` into an optimizer of the same parameters in the same order."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict] = {}
    for index, name, value in numbers:
        state.setdefault(index, {})[name] = value
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = shard_like(value, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state() -> tuple[dict[str, torch.Tensor], dict]:
    """The state of every generator: PyTorch's (CPU and each GPU) as tensors, NumPy's and Python's as JSON."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return tensors, {"python": [version, list(words), gauss], "numpy": [kind, keys.tolist(), *rest]}


def set_random_state(tensors: dict[str, torch.Tensor], state: dict) -> None:
    """Restore `random_state`."""
    torch.set_rng_state(tensors["random.cpu"])
    for key, value in tensors.items():
        if key.startswith("random.cuda.") and torch.cuda.is_available():
            torch.cuda.set_rng_state(value, int(key.rpartition(".")[2]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
