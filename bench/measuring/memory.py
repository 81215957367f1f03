"""Memory of a call: its peak, and what autograd saves in it."""

import gc
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory held at once during `call`, beyond what was held before it.

    On a GPU it is the allocator's own count, on a CPU the sum of what PyTorch's allocator reports.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    # Each event is one allocation (positive) or release (negative), in bytes.
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def saved_bytes(forward: Callable[[], object], kept: Iterable[torch.Tensor]) -> int:
    """What autograd saves in `forward` for the backward, each memory once, but for that of the tensors of `kept`."""
    saved, known = {}, {tensor.untyped_storage()._cdata for tensor in kept}

    def pack(tensor):
        # Held until the end: another tensor must not get its memory.
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    found = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in known)
    del output
    return found
