"""The time of one launch under four roofs: memory, L2, instructions (issue slots and pipes), tensor cores.

The longest is the prediction. Instructions are those of the very launch, compiled and disassembled; other libraries'
kernels have no code here and are counted by bytes and FLOPs alone. So are those of experts: how often their loops run,
the number of each expert's tokens says, which is data.
"""

from collections import Counter
from functools import cache
from typing import NamedTuple

from .gpus import LATENCY, Roofs, by_bytes_and_flops
from .launches import SizedLaunch
from .occupancy import bytes_needed, programs_on_the_fullest, resident_programs, waves
from .pipes import WARP, cycles, multiply_adds
from .sass import Code, compile_code, executed, stages
from .traffic import Operation
from .trips import structure


class Profile(NamedTuple):
    """One launch on one GPU: seconds under each roof by its name, and what limits reaching them."""

    seconds: dict[str, float]
    instructions: float  # of a thread, for each element of the matrix that the kernel walks
    products: float  # multiply-adds of the code over those of the source; 0 where the code does not show them
    resident: int  # programs on a multiprocessor
    waves: float
    in_flight: float  # bytes on a multiprocessor, over those that Little's law asks for

    @property
    def roof(self) -> str:
        """The name of the longest."""
        return max(self.seconds, key=self.seconds.get)

    @property
    def pipe(self) -> str:
        """The name of the longest of issue slots and pipes."""
        return max((name for name in self.seconds if name not in OTHERS), key=self.seconds.get)


OTHERS = ("memory", "L2", "tensor", "launch")
"""Roofs that are not instructions."""


def profile(launch: SizedLaunch, roofs: Roofs) -> Profile:
    """Compiles the launch, once for each GPU generation."""
    (code, counts, streamed), traffic, sm = _analysed(launch, roofs.capability), launch.traffic, roofs.multiprocessor
    resident = max(1, resident_programs(code.registers, code.shared, code.warps, sm))
    programs = programs_on_the_fullest(launch.programs, resident, roofs.multiprocessors)
    pipes = {name: taken * programs / roofs.clock for name, taken in cycles(counts, code.warps, sm).items()}
    threads = WARP * code.warps * launch.programs
    multiplied = code.warps * launch.programs * sum(multiply_adds(opcode) * n for opcode, n in counts.items())
    if traffic.flops and not multiplied:
        pipes["tensor"] = traffic.flops / roofs.flops[traffic.rate]
    times = {"memory": traffic.memory / roofs.bandwidth, "L2": (traffic.loaded + traffic.stored) / roofs.l2}
    flight = streamed * stages(code) * min(resident, programs)
    reads = traffic.unique / max(1, traffic.memory)
    needed = reads * bytes_needed(roofs.bandwidth, LATENCY, roofs.multiprocessors)
    return Profile(
        times | pipes | {"launch": roofs.launch},
        sum(counts.values()) * threads / max(1, launch.elements),
        2 * multiplied / max(1, traffic.flops),
        resident,
        waves(launch.programs, resident, roofs.multiprocessors),
        flight / max(1, needed),
    )


def longest(operation: Operation, roofs: Roofs) -> tuple[str, float]:
    """The roof that an operation's time is from, and its seconds.

    Raises:
        ValueError: the operation is a kernel of ours that was counted where kernels are interpreted.
    """
    if operation.name.startswith("expert_"):
        return by_bytes_and_flops(operation, roofs)
    if operation.launch is not None:
        found = profile(operation.launch, roofs)
        return found.roof, found.seconds[found.roof]
    if operation.name.endswith("_kernel"):
        raise ValueError(f"{operation.name} has no instructions where kernels are interpreted: unset TRITON_INTERPRET")
    return by_bytes_and_flops(operation, roofs)


_code_of = cache(compile_code)


@cache
def _analysed(launch: SizedLaunch, capability: tuple[int, int]) -> tuple[Code, Counter[str], int]:
    """The code, how often a warp executes each opcode, and the bytes of a streamed block."""
    code = _code_of(launch.launch, capability)
    found = structure(code.ttir, launch.grid, [value for _, value in launch.arguments])
    return code, executed(code, found.loops), found.streamed
