"""Occupancy, waves and Little's law, against published examples."""

import pytest

from bench.counting.gpus import MULTIPROCESSORS, ROOFS
from bench.counting.occupancy import bytes_needed, programs_on_the_fullest, resident_programs, waves

HOPPER = MULTIPROCESSORS[9, 0]


@pytest.mark.parametrize(("warps", "resident"), [(4, 12), (10, 4)], ids=["128 threads", "320 threads"])
def test_registers_limit_occupancy(warps, resident):
    """CUDA C++ Best Practices Guide, "Calculating Occupancy": 37 registers leave 12 blocks of 128 threads (75 %), and
    four of 320 (63 %), on multiprocessors with 65,536 registers and 64 warps."""
    assert resident_programs(37, 0, warps, HOPPER) == resident
    assert resident * warps / HOPPER.warps == pytest.approx({4: 0.75, 10: 0.625}[warps])


def test_shared_memory_limits_occupancy():
    """Hopper Tuning Guide: 228 KB a multiprocessor, of which a block takes at most 227 and the system 1."""
    assert resident_programs(32, 227 << 10, 4, HOPPER) == 1
    assert resident_programs(32, 113 << 10, 4, HOPPER) == 2
    assert resident_programs(32, (75 << 10) + 512, 4, HOPPER) == 2
    assert resident_programs(32, 75 << 10, 4, HOPPER) == 3


def test_warps_and_programs_limit_occupancy():
    """CUDA C++ Programming Guide, "Compute Capabilities": 64 warps and 32 blocks on 9.0, 48 and 24 on 8.9."""
    assert resident_programs(16, 0, 8, HOPPER) == 8 and resident_programs(16, 0, 1, HOPPER) == 32
    ada = MULTIPROCESSORS[8, 9]
    assert resident_programs(16, 0, 8, ada) == 6 and resident_programs(16, 0, 1, ada) == 24


def test_waves():
    assert waves(528, 4, 132) == 1 and waves(576, 4, 132) == pytest.approx(1.0909, abs=1e-4)
    # One wave ends with its fullest multiprocessor; in many the mean tells.
    assert programs_on_the_fullest(133, 4, 132) == 2
    assert programs_on_the_fullest(1000, 4, 132) == pytest.approx(1000 / 132)


def test_littles_law():
    """Volkov, "Better Performance at Lower Occupancy" (GTC 2010): a GTX 480 of 15 multiprocessors at 1.4 GHz needs
    100 KB in flight for 177 GB/s at 800 cycles."""
    assert 15 * bytes_needed(177e9, 800 / 1.4e9, 15) == pytest.approx(100e3, rel=0.02)


def test_every_gpu_has_a_multiprocessor():
    assert all(roofs.multiprocessor.warps in (48, 64) for roofs in ROOFS.values())
