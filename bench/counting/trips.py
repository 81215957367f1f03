"""How often each loop of a launch runs, and what a program streams, from Triton's intermediate code (TTIR).

The scalars of the code are evaluated for the launch's arguments, for all programs of the grid at once. A scalar that
is computed from data is unknown. A branch that asks for one is taken to be rare: its loops run no times.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ARITHMETIC = {
    "addi": np.add,
    "subi": np.subtract,
    "muli": np.multiply,
    "divsi": np.floor_divide,  # Sizes are not negative.
    "remsi": np.remainder,
    "minsi": np.minimum,
    "maxsi": np.maximum,
    "andi": np.bitwise_and,
    "ori": np.bitwise_or,
    "xori": np.bitwise_xor,
    "select": np.where,
    "extsi": np.asarray,
    "extui": np.asarray,
    "trunci": np.asarray,
}
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "slt": np.less,
    "sle": np.less_equal,
    "sgt": np.greater,
    "sge": np.greater_equal,
}
BYTES = {"i8": 1, "f16": 2, "bf16": 2, "i16": 2, "f32": 4, "i32": 4, "f64": 8, "i64": 8}
AXES = "xyz"
UNKNOWN = None


class Loop(NamedTuple):
    """A loop of the source. `trips` is the mean over programs, each time that the loop around it comes by."""

    places: frozenset[str]  # file.py:line of what is in it, and in no loop inside it
    trips: float
    parent: int | None = None  # index of the loop around it


class Structure(NamedTuple):
    """The loops of a launch in the order of the code, and the bytes of the block that a program streams at a time."""

    loops: tuple[Loop, ...]
    streamed: int


def structure(ttir: str, grid: Sequence[int], arguments: Sequence[float]) -> Structure:
    """Of a launch on `grid`. `arguments` are the compiled function's: a scalar's value, a tensor's bytes.

    Raises:
        ValueError: a loop's bounds are unknown.
    """
    reader = _Reader(ttir, grid, arguments)
    for line in ttir.splitlines():
        reader.read(line)
    return Structure(tuple(reader.loops), reader.streamed())


class _Block(NamedTuple):
    """An open brace: a loop by its index, or a branch."""

    loop: int | None
    taken: float  # the share of programs that enter it


class _Reader:
    """Reads the code line by line: `loops` are finished when their braces close."""

    def __init__(self, ttir: str, grid: Sequence[int], arguments: Sequence[float]):
        self.loops: list[Loop] = []
        self._grid = [*grid, 1, 1][:3]
        self._arguments = arguments
        self._values: dict[str, object] = {}
        self._origins: dict[str, str] = {}  # of a pointer: what it was made from
        self._tensors: dict[str, float] = {}  # bytes, by the pointer argument
        self._reads: dict[str, int] = {}  # bytes of the largest block, by the pointer argument
        self._open: list[_Block] = []
        self._places = _places(ttir)

    def read(self, line: str) -> None:
        # A closing brace carries the place of the `for`.
        if location := re.search(r"loc\((#loc\d*)\)$", line):
            self._note(self._places[location[1]])
        if "tt.func public" in line:
            self._begin(line)
        elif found := re.search(r"scf\.for %([\w.]+) = (%\S+) to (%\S+) step (%\S+)", line):
            self._enter_loop(line, *found.groups())
        elif found := re.search(r"scf\.if (%\S+)", line):
            condition = self._value(found[1])
            self._open.append(_Block(None, 0.0 if condition is UNKNOWN else float(np.mean(condition))))
        elif "scf.while" in line:
            raise ValueError(f"the trips of a while loop are not known: {line.strip()}")
        elif re.match(r"\s*} else {", line):
            self._open.append(_Block(None, 1 - self._open.pop().taken))
        elif line.rstrip().endswith("{"):
            self._open.append(_Block(None, 1.0))
        elif re.match(r"\s*}", line) and self._open:
            self._open.pop()
        elif found := re.match(r"\s*%([\w.]+)(?::\d+)? = ([\w.]+)(.*)", line):
            self._values[found[1]] = self._result(found[1], found[2], found[3])

    def streamed(self) -> int:
        """Bytes of a block of each of the largest tensors."""
        largest = max((self._tensors[name] for name in self._reads), default=0)
        return sum(size for name, size in self._reads.items() if self._tensors[name] == largest)

    def _begin(self, line: str) -> None:
        parameters = re.findall(r"%([\w.]+): (!tt\.ptr)?", line)
        if len(parameters) != len(self._arguments):
            raise ValueError(f"the code has {len(parameters)} parameters, the launch {len(self._arguments)} arguments")
        for (name, pointer), value in zip(parameters, self._arguments):
            (self._tensors if pointer else self._values)[name] = value
        self._open.append(_Block(None, 1.0))

    def _enter_loop(self, line: str, variable: str, *bounds: str) -> None:
        first, end, step = map(self._value, bounds)
        if any(value is UNKNOWN for value in (first, end, step)):
            raise ValueError(f"the trips of this loop depend on data or on another loop: {line.strip()}")
        trips = float(np.mean(np.maximum(0, -((first - end) // step))))
        parent = self._around()
        for block in reversed(self._open):
            if block.loop is not None:
                break
            trips *= block.taken
        for inside, outside in re.findall(r"%([\w.]+) = (%[\w.#]+)[,)]", line.partition("iter_args")[2]):
            self._origins[inside] = outside
        self._open.append(_Block(len(self.loops), 1.0))
        self.loops.append(Loop(frozenset(), trips, parent))

    def _around(self) -> int | None:
        """The innermost open loop."""
        return next((block.loop for block in reversed(self._open) if block.loop is not None), None)

    def _note(self, place: str) -> None:
        if place and (index := self._around()) is not None:
            self.loops[index] = self.loops[index]._replace(places=self.loops[index].places | {place})

    def _result(self, name: str, operation: str, rest: str):
        """The scalar that an operation gives. Pointers and loads of blocks are noted."""
        operands = re.findall(r"%[\w.#]+", rest.partition(" : ")[0])
        if operands and operation.startswith("tt."):
            self._origins[name] = operands[0]
        elif operation == "arith.select":
            # Of a pointer: one that it may be.
            self._origins[name] = operands[1]
        if operation == "tt.load" and (block := re.search(r"tensor<([\dx]+)x!tt\.ptr<(\w+)>>", rest)):
            size = BYTES[block[2]] * int(np.prod([int(length) for length in block[1].split("x")]))
            tensor = self._tensor(operands[0])
            self._reads[tensor] = max(size, self._reads.get(tensor, 0))
        if operation == "arith.constant":
            constant = re.match(r" (-?\d+|true|false) ", rest)
            return UNKNOWN if constant is None else int({"true": 1, "false": 0}.get(constant[1], constant[1]))
        if operation == "tt.get_program_id":
            axis = AXES.index(rest.split()[0])
            return np.arange(self._grid[axis]).reshape([-1 if i == axis else 1 for i in range(3)])
        if operation == "tt.get_num_programs":
            return self._grid[AXES.index(rest.split()[0])]
        kind = operation.removeprefix("arith.")
        function = COMPARISONS[rest.split()[0].strip(",")] if kind == "cmpi" else ARITHMETIC.get(kind)
        values = [self._value(operand) for operand in operands]
        if function is None or not values or any(value is UNKNOWN for value in values):
            return UNKNOWN
        return function(*values)

    def _value(self, operand: str):
        return self._values.get(operand.lstrip("%"), UNKNOWN)

    def _tensor(self, pointer: str) -> str:
        """The argument that a block of pointers was made from."""
        name = pointer.lstrip("%")
        while name not in self._tensors:
            name = self._origins[name].lstrip("%")
        return name


def _places(ttir: str) -> dict[str, str]:
    """file.py:line of each location, of the innermost function where calls are inlined."""
    texts = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))

    def place(name: str) -> str:
        if direct := re.search(r'"([^"]*)":(\d+):\d+', texts[name]):
            return f"{Path(direct[1]).name}:{direct[2]}"
        return next(filter(None, map(place, re.findall(r"#loc\d*", texts[name]))), "")

    return {name: place(name) for name in texts}
