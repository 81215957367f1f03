"""Random weights in the formats that kernels decode, beside their values by the formats' own formulas."""

import torch

from dora_kernels.ops.base_weights import Nf4Weight
from dora_kernels.ops.base_weights.fp8 import Fp8Weight

BLOCK, NESTED_BLOCK, FP8_BLOCK = 64, 256, (128, 128)


def nf4(N: int, K: int, device: torch.device) -> tuple[Nf4Weight, torch.Tensor]:
    """W [N, K] whose statistics are quantised, too; and its values in fp64."""
    generator = torch.Generator(device).manual_seed(0)
    blocks = -(-N * K // BLOCK)

    def codes(count: int) -> torch.Tensor:
        return torch.randint(256, (count,), generator=generator, dtype=torch.uint8, device=device)

    def positive(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator, device=device) + 0.5

    packed, absmax, code = codes(-(-N * K // 2)), codes(blocks), torch.linspace(-0.1, 0.1, 16, device=device)
    nested = positive(-(-blocks // NESTED_BLOCK)), positive(256), torch.tensor(0.4, device=device)
    weight = Nf4Weight(
        packed, absmax, code, *nested, torch.Size((N, K)), torch.bfloat16, BLOCK, NESTED_BLOCK, parity=False
    )
    nested_absmax, nested_code, offset = (tensor.double() for tensor in nested)
    largest = nested_code[absmax.int()] * nested_absmax.repeat_interleave(NESTED_BLOCK)[:blocks] + offset
    nibbles = torch.stack([packed // 16, packed % 16], dim=1).flatten()[: N * K]
    return weight, (code.double()[nibbles.int()] * largest.repeat_interleave(BLOCK)[: N * K]).view(N, K)


def fp8(N: int, K: int, device: torch.device) -> tuple[Fp8Weight, torch.Tensor]:
    """W [N, K] in e4m3 with a scale for each block; and its values in fp64."""
    generator = torch.Generator(device).manual_seed(0)
    rows, columns = FP8_BLOCK
    codes = torch.randn(N, K, generator=generator, device=device).to(torch.float8_e4m3fn)
    scales = 0.05 * (torch.rand(-(-N // rows), -(-K // columns), generator=generator, device=device) + 0.5)
    spread = scales.double().repeat_interleave(rows, 0)[:N].repeat_interleave(columns, 1)[:, :K]
    return Fp8Weight(codes, scales, FP8_BLOCK, torch.bfloat16), codes.double() * spread


FORMATS = {"NF4": nf4, "FP8": fp8}
"""By name: makes the weight that kernels read, and its values."""
