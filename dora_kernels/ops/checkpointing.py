"""Whether a call is inside activation checkpointing, and of which kind."""

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
    if torch.compiler.is_compiling():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks[0] if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint" else None
