"""What the compiler made of one launch: figures read from its output, and the limits they are held to.

A location is a line of a kernel's source: the compiler writes it beside each access to global memory.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton

from .launches import Launch, target_of

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

SHARED_LIMITS = {
    (8, 0): 166_912,
    (8, 6): 101_376,
    (8, 9): 101_376,
    (9, 0): 232_448,
    (10, 0): 232_448,
    (12, 0): 101_376,
}
"""Bytes of shared memory one program may use, by compute capability."""

WIDE = 128  # bits: the widest access every supported GPU has
COPIED = 8  # numbers that the compiler copies to shared memory at once: of bytes, less than the widest access
DTYPE_BITS = {"i8": 8, "f16": 16, "bf16": 16, "f32": 32}


class Figures(NamedTuple):
    """Of one compiled kernel. `spills` counts instructions that access local memory."""

    registers: int
    stack: int
    spills: int
    shared: int
    tensor_dots: int  # dots in the source that must run on tensor cores
    tensor_instructions: int
    plain_tf32: int  # dots that would round fp32 operands to 11 bits
    float_atomics: int
    width: int | None  # bits of the narrowest access to a two-dimensional block; None where sizes are not aligned
    narrow: tuple[str, ...]  # the places of accesses narrower than the block allows


def compile_launch(launch: Launch, capability: tuple[int, int]) -> Figures:
    """Compiles without a GPU or a driver."""
    kernel = triton.compile(launch.source(), target=target_of(capability), options=dict(launch.options))
    registers, stack, spills = resources(kernel.asm["cubin"])
    ptx, dots = kernel.asm["ptx"], list(_dots(kernel.asm["ttir"]))
    # The compiler writes tf32x3 as three products of each pair of operands: a count that does not divide by three, or
    # is smaller, says that it did something else.
    products, wanted = _tf32_products(kernel.asm["ttgir"]), 3 * sum(precision == "tf32x3" for _, precision in dots)
    plain_tf32 = sum(precision == "tf32" for _, precision in dots) or int(products % 3 > 0 or products < wanted)
    width, narrow = (None, ()) if not is_aligned(launch) else _widths(kernel.asm["ttgir"], ptx, launch.num_warps)
    return Figures(
        registers,
        stack,
        spills,
        kernel.metadata.shared,
        sum(dtype in ("f16", "bf16") or (dtype == "f32" and precision != "ieee") for dtype, precision in dots),
        len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        plain_tf32,
        len(re.findall(r"\b(?:atom|red)\.\S*\.(?:f|bf)(?:16|32|64)", ptx)),
        width,
        narrow,
    )


def broken_limits(figures: Figures, capability: tuple[int, int]) -> list[str]:
    """One sentence for each limit these figures break."""
    f, limit = figures, SHARED_LIMITS[capability]
    checks = (
        (f.stack > 0, f"{f.stack} bytes of stack, the limit is 0"),
        (f.spills > 0, f"{f.spills} instructions access local memory (spills), the limit is 0"),
        (f.shared > limit, f"{f.shared} bytes of shared memory, the limit is {limit}"),
        (f.tensor_dots > 0 and not f.tensor_instructions, "no tensor-core instruction where a dot is"),
        (f.plain_tf32 > 0, "plain tf32 for fp32 operands, which must be three products (tf32x3)"),
        (f.float_atomics > 0, f"{f.float_atomics} floating-point atomics, the limit is 0"),
        (bool(f.narrow), f"accesses narrower than {WIDE} bits: {', '.join(f.narrow)}"),
    )
    return [sentence for broken, sentence in checks if broken]


def is_aligned(launch: Launch) -> bool:
    """Whether every size and stride along which blocks are contiguous divides by 16, so that accesses can be wide."""
    unit_strides = {name for name, value in launch.constants.items() if name.startswith("stride_") and value == 1}
    return launch.contiguous and all(
        (index,) in launch.divisible or name in unit_strides
        for index, (name, _) in enumerate(launch.signature)
        if name.startswith("stride_") or name in ("N", "K", "R", "columns")
    )


def resources(cubin: bytes) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        # Spilled values live on the stack: without one there is nothing to look for, and disassembly is slow.
        spills = len(re.findall(r"\b(?:LDL|STL)\b", tool("nvdisasm", "-c", file.name))) if stack else 0
    return registers, stack, spills


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _dots(ttir: str) -> Iterator[tuple[str, str]]:
    """Operand type and precision of each dot in the source."""
    for line in re.findall(r"tt\.dot .*", ttir):
        precision = re.search(r"inputPrecision = (\w+)", line)
        yield re.search(r": tensor<(?:\d+x)+(\w+)", line)[1], precision[1] if precision else "ieee"


def _tf32_products(ttgir: str) -> int:
    """Tensor-core products of fp32 operands."""
    operand = r"(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) .*? : (?:tensor|!ttg\.memdesc)<(?:\d+x)+(\w+)"
    return sum(dtype == "f32" for dtype in re.findall(operand, ttgir))


def _widths(ttgir: str, ptx: str, num_warps: int) -> tuple[int | None, tuple[str, ...]]:
    """The narrowest access to a two-dimensional block in bits, and the places narrower than their block allows."""
    allowed = _allowed_widths(ttgir, 32 * num_warps)
    actual: dict[tuple[str, int], int] = {}
    for place, width in _accesses(ptx):
        if place in allowed:
            actual[place] = min(width, actual.get(place, width))
    narrow = [f"{width} at {file}:{line}" for (file, line), width in actual.items() if width < allowed[file, line]]
    return min(actual.values(), default=None), tuple(sorted(narrow))


def _allowed_widths(ttgir: str, threads: int) -> dict[tuple[str, int], int]:
    """By place: 128 bits, or a thread's share where the block is too small for all threads to access that much. A copy
    to shared memory moves `COPIED` numbers."""
    locations = dict(re.findall(r"^(#loc\d*) = (.*)$", ttgir, re.MULTILINE))

    def place(text: str) -> tuple[str, int] | None:
        if direct := re.search(r'"([^"]*)":(\d+):\d+', text):
            return Path(direct[1]).name, int(direct[2])
        reference = re.search(r"#loc\d*", text)
        return place(locations[reference[0]]) if reference and reference[0] in locations else None

    allowed: dict[tuple[str, int], int] = {}
    access = r"(tt\.load|tt\.store|ttg\.async_copy_global_to_local) .*tensor<(\d+)x(\d+)x!tt\.ptr<(\w+)>.* loc\((.*)\)$"
    for operation, rows, columns, dtype, location in re.findall(access, ttgir, re.MULTILINE):
        where = place(location)
        if where and dtype in DTYPE_BITS:
            share = int(rows) * int(columns) * DTYPE_BITS[dtype] // threads
            width = min(WIDE, share, COPIED * DTYPE_BITS[dtype] if "copy" in operation else WIDE)
            allowed[where] = min(width, allowed.get(where, WIDE))
    return allowed


def _accesses(ptx: str) -> Iterator[tuple[tuple[str, int], int]]:
    """Place and width in bits of each access to global memory."""
    files = {number: Path(path).name for number, path in re.findall(r'\.file\s+(\d+) "([^"]*)"', ptx)}
    place = ("", 0)
    for line in ptx.splitlines():
        if location := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            place = (files.get(location[1], ""), int(location[2]))
        elif copy := re.search(r"cp\.async\.c[ag]\.shared\.global .*?, 0x(\w+)", line):
            yield place, 8 * int(copy[1], 16)
        elif access := re.search(r"\b(?:ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+) ", line):
            yield place, int(access[1] or 1) * int(access[2])
