"""Whether a call is inside activation checkpointing, and of which kind, or where other hooks pack what is saved."""

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def is_selective() -> bool:
    """Whether this call is in a region of selective checkpointing, forward or recomputation.

    It keeps some operations' outputs, and finds each again by how often its operation ran before: the recomputation
    must run the same operations, and none may write over another's output.
    """
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    return any(type(mode).__module__ == "torch.utils.checkpoint" for mode in _get_current_dispatch_mode_stack())


def checkpoint_hook():
    """The hook that packs what is saved here, if it is that of a checkpointed region."""
    hook = _hook()
    return hook if hook is not None and hook.__module__ == "torch.utils.checkpoint" else None


def is_saved_elsewhere() -> bool:
    """Whether other hooks pack what is saved here, which may copy it to the host."""
    return _hook() is not None and checkpoint_hook() is None


def _hook():
    if torch.compiler.is_compiling():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]
