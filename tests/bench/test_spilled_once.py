"""Launches that `python -m bench offline` found to spill, and that the committed summary leaves out: it has one of each
kernel and types on all generations but Hopper."""

import pytest

from .test_offline import run

PROGRAM = """
import sys
import torch
from bench.counting.cases import Case
from bench.counting.compiled import broken_limits, compile_launch
from bench.counting.launches import launches

capability, rank = tuple(map(int, sys.argv[1].split("."))), int(sys.argv[2])
found = launches([Case(torch.float16, torch.float32, "token", rank, mlp="silu")], capability)
passes = [launch for launch in found if launch.name in ("glu_fwd", "glu_bwd")]
assert len(passes) == 2
for launch in passes:
    print(*(f"{launch}: {limit}" for limit in broken_limits(compile_launch(launch, capability), capability)), sep="\\n")
"""


@pytest.mark.parametrize("capability, rank", [("10.0", 64), ("12.0", 100)])
def test_passes_of_a_gated_mlp_in_fp16(capability, rank):
    result = run("-c", PROGRAM, capability, str(rank))
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "", "")
