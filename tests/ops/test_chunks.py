"""How tokens are dealt out to programs: whole waves, and no program with next to nothing to do."""

from math import ceil

import pytest

from dora_kernels.ops.gpus import GPUS
from dora_kernels.ops.kernels.chunks import FULL, token_chunks
from dora_kernels.ops.kernels.rescale_bwd import rescale_bwd_config

BLOCKS = {features: ceil(features / 64) for features in (1024, 4096, 5120, 8192, 11008, 14336, 28672)}


@pytest.mark.parametrize("resident", [1, 2, 3, 4])
@pytest.mark.parametrize("gpu", GPUS.values(), ids=[f"sm_{major}{minor}" for major, minor in GPUS])
def test_waves_are_full(gpu, resident):
    """Features of Llama's layers. Where a chunk's programs hardly fit a wave, no number of chunks fills 90 %."""
    fills = []
    for blocks in BLOCKS.values():
        waves = blocks * token_chunks(65536, blocks, resident, gpu) / (resident * gpu.multiprocessors)
        fills.append(waves / ceil(waves))
    assert min(fills) >= 0.8
    assert sum(fill >= FULL for fill in fills) >= len(fills) - 2


def test_one_wave_is_enough_where_it_is_full():
    hopper = GPUS[9, 0]
    assert token_chunks(8192, BLOCKS[4096], 3, hopper) == 6  # 384 programs in 396 places
    assert token_chunks(8192, BLOCKS[14336], 3, hopper) == 5  # 1120 in 3 × 396; one wave would hold 224, two 672


@pytest.mark.parametrize(("tokens", "chunks"), [(1, 1), (127, 1), (512, 4), (8192, 6)])
def test_a_program_has_128_tokens(tokens, chunks):
    assert token_chunks(tokens, BLOCKS[4096], 3, GPUS[9, 0]) == chunks


def test_more_features_than_the_waves_hold():
    assert token_chunks(8192, 10**6, 1, GPUS[9, 0]) == 1


def test_rescale_bwd_fills_the_wave_of_its_gpu():
    """With three programs a multiprocessor where dyᵀh takes registers, else with four."""

    def chunks(has_product, gpu):
        return rescale_bwd_config(65536, 4096, 4, 2, has_product, gpu).chunks

    hopper, ampere = GPUS[9, 0], GPUS[8, 0]
    assert chunks(True, hopper) == 3 * 132 // 64
    assert chunks(False, hopper) == 4 * 132 // 64
    assert chunks(True, ampere) == 3 * 108 // 64
