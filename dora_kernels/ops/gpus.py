"""Every number that a GPU decides: what launches depend on, and the measured constants of dispatch."""

from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """What launch configurations depend on."""

    multiprocessors: int
    has_wgmma: bool  # four warps multiply from shared memory: registers then hold larger products
    has_tensor_memory: bool  # products add up there, and pass through registers for each block of the rank

    @property
    def products_spare_registers(self) -> bool:
        """Whether operands or results of products lie elsewhere: more fits beside them."""
        return self.has_wgmma or self.has_tensor_memory


GPUS = {
    (8, 0): Gpu(108, False, False),
    (8, 6): Gpu(84, False, False),
    (8, 9): Gpu(128, False, False),
    (9, 0): Gpu(132, True, False),
    (10, 0): Gpu(148, False, True),
    (12, 0): Gpu(170, False, False),
}
"""By compute capability, from the vendor's data sheets. Frozen: no driver's answer decides the order of a sum."""


DEFAULT_GPU = GPUS[9, 0]


def gpu_of(tensor: torch.Tensor) -> Gpu:
    """The data of the tensor's GPU. One that is not in the table gets those of the last of its major version; one of an
    unknown version, and the interpreter, `DEFAULT_GPU`."""
    if not tensor.is_cuda:
        return DEFAULT_GPU
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability in GPUS:
        return GPUS[capability]
    return next((gpu for known, gpu in reversed(GPUS.items()) if known[0] == capability[0]), DEFAULT_GPU)


MIN_CAPABILITY = (8, 0)

WEIGHT_SPACE_FACTOR: dict[tuple[int, int], float] = {}
"""Per compute capability: measured time of the weight-space form over its predicted time, relative to the token-space
form's. Empty until measured: an architecture that is absent has 1.0, the prediction alone."""

RANK_PER_BYTE = 27
"""The rank at which one element of s·B·A of fp32 factors takes as long as moving one byte. At high ranks blocks of the
factors come from L2 at 6.65 TB/s, against 4.3 TB/s of memory: 29 in the norm, 27 in the merge and in token space's
rescale, on an H200's roofs."""

HALF_PRODUCT_SPEEDUP = 2
"""How many times as fast products of 16-bit factors are: half as many bytes."""

SHORTEST_LAUNCH = 6 << 20
"""Elements that could move in the 3 µs that a launch takes at least, on the same GPU."""
