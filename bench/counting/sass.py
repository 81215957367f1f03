"""The instructions of a compiled kernel (SASS), and how often a warp executes each."""

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import triton

from .compiled import resources, tool
from .launches import Launch, target_of
from .listing import Listing, Span, loops_of, matched
from .trips import Loop

LINE = re.compile(r'//## File "(?:[^"]*/)?([^"/]+)", line (\d+)')
LABEL = re.compile(r"(\.L_x?_?\w+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
ACCESSES = ("LDG", "LDGSTS", "STG")


class Instruction(NamedTuple):
    """An opcode with its modifiers, and its operands."""

    opcode: str
    operands: str


class Code(NamedTuple):
    """A kernel as the GPU runs it, without the functions behind its end, slow paths that are hardly ever called."""

    instructions: tuple[Instruction, ...]
    listing: Listing  # of the instructions
    ptx: Listing  # of what the assembler was given
    ttir: str
    registers: int  # of a thread
    shared: int  # bytes of a program
    warps: int


def compile_code(launch: Launch, capability: tuple[int, int]) -> Code:
    """Compiles and disassembles without a GPU or a driver."""
    kernel = triton.compile(launch.source(), target=target_of(capability), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        instructions, listing = parse(tool("nvdisasm", "-g", "-c", file.name))
    registers, _, _ = resources(kernel.asm["cubin"])
    ptx, shared = parse_ptx(kernel.asm["ptx"]), kernel.metadata.shared
    return Code(instructions, listing, ptx, kernel.asm["ttir"], registers, shared, launch.num_warps)


def parse(text: str) -> tuple[tuple[Instruction, ...], Listing]:
    """What `nvdisasm -g -c` printed."""
    found: list[Instruction] = []
    places: list[str] = []
    always: list[bool] = []  # Whether it runs without a condition.
    heads: dict[str, int] = {}
    place = ""
    for line in text.splitlines():
        if source := LINE.search(line):
            place = f"{source[1]}:{source[2]}"
        elif label := LABEL.match(line.strip()):
            heads[label[1]] = len(found)
        elif instruction := INSTRUCTION.match(line):
            found.append(Instruction(instruction[2], instruction[3].strip()))
            places.append(place)
            always.append(not instruction[1])
    exits = [i for i, one in enumerate(found) if one.opcode == "EXIT"]
    # The last exit may leave a loop whose branch back stands behind it.
    ends = (i for i in range(exits[-1], len(found)) if always[i] and found[i].opcode in ("EXIT", "BRA"))
    end = 1 + next(ends, exits[-1])
    branches, accesses = {}, set()
    for i, one in enumerate(found[:end]):
        if one.opcode.startswith("BRA") and (target := re.search(r"`\((\.L\w+)\)", one.operands)):
            branches[i] = target[1]
        if one.opcode.partition(".")[0] in ACCESSES:
            accesses.add(i)
    return tuple(found[:end]), Listing(tuple(places[:end]), frozenset(accesses), loops_of(heads, branches))


def parse_ptx(text: str) -> Listing:
    """What Triton gave to the assembler."""
    files = dict(re.findall(r'\.file\s+(\d+) "(?:[^"]*/)?([^"/]+)"', text))
    heads, branches, places, accesses = {}, {}, [], set()
    place = ""
    for i, line in enumerate(text.splitlines()):
        if location := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            place = f"{files.get(location[1], '')}:{location[2]}"
        elif label := re.match(r"(\$L\w+):", line):
            heads[label[1]] = i
        elif branch := re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line):
            branches[i] = branch[1]
        elif re.search(r"\b(?:(?:ld|st)\.global|cp\.async\.c[ag])\.", line):
            accesses.add(i)
        places.append(place)
    return Listing(tuple(places), frozenset(accesses), loops_of(heads, branches))


def executed(code: Code, loops: Sequence[Loop]) -> Counter[str]:
    """How often a warp executes each opcode, for the trips of the source's loops."""
    weights = [1.0] * len(code.instructions)
    for span, rounds in rounds_of(code, loops).items():
        for i in range(span.first, span.last + 1):
            weights[i] *= rounds
    counts: Counter[str] = Counter()
    for instruction, weight in zip(code.instructions, weights):
        counts[instruction.opcode] += weight
    return counts


def rounds_of(code: Code, loops: Sequence[Loop]) -> dict[Span, float]:
    """How often each loop of the code goes round, each time that the loop around it comes by.

    A loop without a counterpart in the source waits for the hardware: it goes round once. The assembler may write a
    loop's body several times over; the accesses to global memory, which it neither adds nor removes, tell how often.
    Of several loops made of one the first does all the work: others are its remainder, or for other arguments.

    Raises:
        ValueError: a loop that the assembler was given is not in the code.
    """
    once: dict[int, int] = {}
    for span, index in matched(code.ptx, loops).items():
        if index is not None:
            once.setdefault(index, code.ptx.accesses_in(span, loops[index].places))
    rounds, done = dict.fromkeys(code.listing.loops, 1.0), set()
    for span, index in matched(code.listing, loops).items():
        if index is None:
            continue
        copies = code.listing.accesses_in(span, loops[index].places) / once[index] if once.get(index) else 1
        rounds[span] = 0.0 if index in done else loops[index].trips / max(1, round(copies))
        done.add(index)
    for index in once.keys() - done:
        places, trips = loops[index].places, loops[index].trips
        # A loop of few trips, known when compiled, may be written out.
        if sum(code.listing.places[i] in places for i in code.listing.accesses) < once[index] * trips:
            raise ValueError(f"the code has no loop with the lines {sorted(places)}")
    return rounds


def stages(code: Code) -> float:
    """Blocks that a program has in flight: asynchronous copies that a loop leaves open when it waits, and the next."""
    found = [1.0]
    opened = _groups(code.instructions)
    for span in code.listing.loops:
        body = code.instructions[span.first : span.last + 1]
        waits = [re.search(r"SB0, (0x\w+)", one.operands) for one in body if one.opcode.startswith("DEPBAR")]
        # Other waits on this scoreboard leave more open than there are copies.
        left = [count for wait in waits if wait and (count := int(wait[1], 16)) < opened]
        if left and _groups(body):
            found.append(max(left) / _groups(body) + 1)
    return max(found)


def _groups(instructions: Sequence[Instruction]) -> int:
    """Groups of asynchronous copies."""
    return sum(one.opcode == "LDGDEPBAR" for one in instructions)
