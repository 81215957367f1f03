"""The operation on tensors: `dora_linear`, which form of it runs, and the kernels and the reference behind it."""
