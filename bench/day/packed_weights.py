"""Random weights in the formats that kernels decode, beside their values by the formats' own formulas."""

from functools import partial

import torch
import torch.nn.functional as F

from dora_kernels.ops.base_weights import Fp4Weight, Fp8Weight, Int4Weight, Nf4Weight

from ..counting.cases import INT4

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


def fp4(kind: str, N: int, K: int, device: torch.device) -> tuple[Fp4Weight, torch.Tensor]:
    """W [N, K] in e2m1 with a scale for each group; and its values in fp64."""
    generator = torch.Generator(device).manual_seed(0)
    group, factor = (16, torch.tensor([800.0], device=device)) if kind == "NVFP4" else (32, None)
    codes = torch.randint(256, (N, K // 2), generator=generator, dtype=torch.uint8, device=device)
    steps = torch.rand(N, K // group, generator=generator, device=device)
    scales = (50 * (steps + 0.5)).to(torch.float8_e4m3fn) if kind == "NVFP4" else (120 + 4 * steps).to(torch.uint8)
    spread = scales.double() / factor.double() if kind == "NVFP4" else 2.0 ** (scales.double() - 127)
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64, device=device)
    nibbles = torch.stack([codes % 16, codes // 16], dim=2).flatten(1).int()
    exact = torch.cat([values, -values])[nibbles] * spread.repeat_interleave(group, 1)
    return Fp4Weight(codes, scales, factor, group, torch.Size((N, K)), torch.bfloat16), exact.bfloat16().double()


def int4(kind: str, N: int, K: int, device: torch.device) -> tuple[Int4Weight, torch.Tensor]:
    """W [N, K] of 4-bit integers as `INT4[kind]` has them; and its values in fp64."""
    generator = torch.Generator(device).manual_seed(0)
    layout, parts, group = INT4[kind]
    group = group or K

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(16, shape, generator=generator, device=device)

    codes = draw(N, K)
    zeros = draw(N, K // group) if "zeros" in parts else torch.full((N, K // group), 8, device=device)
    scales = (0.01 * (torch.rand(N, K // group, generator=generator, device=device) + 0.5)).bfloat16()
    groups = torch.arange(K, device=device) // group
    if "groups" in parts:
        groups = groups[torch.randperm(K, generator=generator, device=device)]
    exact = (codes - zeros[:, groups]) * scales.double()[:, groups]

    def stored(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor if layout.rows_are_outputs else tensor.T).contiguous()

    order = (0, 2, 4, 6, 1, 3, 5, 7) if layout.interleaved else range(8)
    weight = Int4Weight(
        stored(_words(codes, 0 if layout.words_along_outputs else 1, order)),
        stored(scales),
        stored(_words(zeros, 0, order)) if "zeros" in parts else None,
        groups.int() if "groups" in parts else None,
        group,
        torch.Size((N, K)),
        layout,
    )
    return weight, exact.to(scales.dtype).double()


def _words(codes: torch.Tensor, dim: int, order) -> torch.Tensor:
    """Eight codes along `dim` in 32 bits: of each eight the element `order[i]` in bits 4 i to 4 i + 3."""
    codes = codes.movedim(dim, -1)
    eights = F.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed = sum(eights[..., element] << 4 * place for place, element in enumerate(order))
    return (packed - ((packed >> 31) << 32)).int().movedim(-1, dim)


FORMATS = {"NF4": nf4, "FP8": fp8} | {kind: partial(fp4, kind) for kind in ("NVFP4", "MXFP4")}
FORMATS |= {f"int4 {kind}": partial(int4, kind) for kind in INT4}
"""By name: makes the weight that kernels read, and its values."""
