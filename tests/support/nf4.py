"""4-bit layers for tests, and an fp64 reading of bitsandbytes' packing that shares no code with the engine's."""

import bitsandbytes as bnb
import numpy as np
import torch


def linear_4bit(
    weight, *, nested=True, blocksize=64, quant_type="nf4", bias=None, compute_dtype=None, storage=torch.uint8
):
    """bitsandbytes' `Linear4bit` with `weight` [N, K] quantised, in its usual packing."""
    N, K = weight.shape
    linear = bnb.nn.Linear4bit(K, N, bias=bias is not None, quant_type=quant_type, compute_dtype=compute_dtype)
    linear.weight = bnb.nn.Params4bit(
        weight.clone(),
        quant_type=quant_type,
        compress_statistics=nested,
        blocksize=blocksize,
        quant_storage=storage,
        module=linear,
    )
    if bias is not None:
        linear.bias.data = bias.clone()
    linear = linear.to("cpu")
    # Else the first forward in eval mode repacks the weight on some CPUs.
    linear.support_avx512bf16_for_cpu = False
    return linear


def decoded(parameter):
    """W [N, K] in fp64, one element after the other as the format says."""
    state = parameter.quant_state
    packed = parameter.data.view(torch.uint8).flatten().numpy()
    nibbles = np.empty(2 * len(packed), dtype=np.int64)
    nibbles[0::2], nibbles[1::2] = packed // 16, packed % 16
    absmax = state.absmax
    if state.nested:
        codes, scales = state.state2.code.numpy(), state.state2.absmax.numpy()
        statistics = absmax.numpy()
        absmax = [
            codes[s] * scales[i // state.state2.blocksize] + state.offset.item() for i, s in enumerate(statistics)
        ]
    count = state.shape[0] * state.shape[1]
    code = state.code.numpy().astype(np.float64)
    values = [code[nibbles[i]] * float(absmax[i // state.blocksize]) for i in range(count)]
    return torch.tensor(values, dtype=torch.float64).view(*state.shape)
