"""What limits reaching a roof: how many programs a multiprocessor holds, in how many waves, and bytes in flight."""

from math import ceil

from .gpus import Multiprocessor

REGISTERS = 65_536  # of a multiprocessor
REGISTER_UNIT = 256  # A warp's registers are handed out in such pieces.
SCHEDULERS = 4  # A warp's registers are in the quarter of its scheduler.
SYSTEM_SHARED = 1024  # bytes that each program holds besides its own


def resident_programs(registers: int, shared: int, warps: int, sm: Multiprocessor) -> int:
    """Programs that a multiprocessor holds at once: each of `warps`, with `registers` a thread and `shared` bytes.

    The rule is that of the CUDA occupancy calculator.
    """
    per_warp = ceil(32 * registers / REGISTER_UNIT) * REGISTER_UNIT
    by_registers = SCHEDULERS * (REGISTERS // SCHEDULERS // per_warp) // warps
    by_shared = sm.shared // (shared + SYSTEM_SHARED)
    return min(by_registers, by_shared, sm.warps // warps, sm.programs)


def waves(programs: int, resident: int, multiprocessors: int) -> float:
    """How many times over the grid fills the GPU."""
    return programs / (resident * multiprocessors)


def programs_on_the_fullest(programs: int, resident: int, multiprocessors: int) -> float:
    """Programs of one multiprocessor: the fullest one's in a single wave, the mean where there are more."""
    mean = programs / multiprocessors
    return ceil(mean) if mean < resident else mean


def bytes_needed(bandwidth: float, latency: float, multiprocessors: int) -> float:
    """Little's law: bytes in flight that one multiprocessor must have so that all together reach `bandwidth`."""
    return bandwidth * latency / multiprocessors
