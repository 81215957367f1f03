"""accelerate's offloading to memory or disk: weights that are there only while their module's forward runs.

What trains on such weights gets no gradient, and what reads them outside of forward reads nothing.
"""

from torch import nn

REMEDY = "load the model without cpu or disk in its device_map"


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate's brings the module's weights for each forward and takes them away again."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))


def refuse_absent(module: nn.Module, act: str) -> None:
    """Raises ValueError if a weight of the module is not there."""
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(f"cannot {act}: weights of a DoRA layer are offloaded or on the meta device; {REMEDY}")
