"""Measures all that is measured on a GPU, in slices of some minutes, into one folder.

    python -m bench day --minutes 9 --out DIR

The same command with the same folder goes on where the last slice ended. In this order: compile every kernel; hold
each kernel, form and type to fp64; the GPU's tests; roofs, and kernels against them; layer and model with every mode of
PEFT; the questions on which dispatch rests; thresholds proposed as data. Each step says what it will cost before it
starts. The folder holds eight files at most, each whole at any moment: `report.md` with the README's table first,
`results.jsonl`, `thresholds.json`, `tests.xml`, `log.txt`, `day.json` and the compiled kernels.

A GPU whose context is lost, or that hangs, costs the case that was running: another process goes on after it.
`--rehearse` runs the same lines on a CPU that stands in for a GPU, with small sizes and a clock that stands still
between launches; its numbers mean nothing.
"""

from .conductor import add_arguments, main

__all__ = ["add_arguments", "main"]
