"""The committed tables of roofs hold what the kernels are tuned for: an H200 at r = 16, bf16 weights, fp32 factors."""

from math import ceil

import pytest

from bench.installation import RESULTS
from bench.rows.roofs import COLUMNS

FILES = sorted(RESULTS.glob("offline-triton-*.txt"))
PIPES_OVER_BYTES = {"rescale_fwd": 0.70, "merge_scale": 0.75, "weight_norm": 0.85, "rescale_bwd": 0.60}
SQUARE = "4096x4096"
IN_CHUNKS = ("rescale_bwd", "glu_fwd", "glu_bwd")
TABLES = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])


def rows_of(path):
    """The rows of the H200, by column."""
    head, *lines = path.read_text().split("\n\n")[-1].splitlines()
    assert head.split() == " ".join(COLUMNS).split()
    rows = [dict(zip(COLUMNS, line.split())) for line in lines]
    return [row for row in rows if row["gpu"] == "h200"]


def test_both_versions_are_committed():
    assert len(FILES) == 2


@TABLES
@pytest.mark.parametrize("shape", [SQUARE, "14336x4096", "4096x14336"])
def test_memory_is_the_roof(path, shape):
    case = {"dtypes": "bf16/fp32", "shape": shape, "rank": "16"}
    rows = [row for row in rows_of(path) if case.items() <= row.items() and row["kernel"] in PIPES_OVER_BYTES]
    # Of the other shapes weight space alone is shown, and no launch that 4096×4096 has made already.
    needed = PIPES_OVER_BYTES.keys() if shape == SQUARE else {"weight_norm", "merge_scale"}
    assert {row["kernel"] for row in rows} >= needed
    for row in rows:
        assert float(row["pipe/bytes"]) <= PIPES_OVER_BYTES[row["kernel"]], row
        assert float(row["L2/bytes"]) <= 1.3, row


@TABLES
def test_waves_are_full(path):
    """At most one, or all of them; a few programs beyond a wave would run when all others are done."""
    # Not a layer's backward of other shapes: how many programs fit depends on whether x trains, their number must not.
    rows = [row for row in rows_of(path) if row["kernel"] in IN_CHUNKS]
    rows = [row for row in rows if row["kernel"] != "rescale_bwd" or row["shape"] == SQUARE]
    assert {row["kernel"] for row in rows} == set(IN_CHUNKS)
    for row in rows:
        waves = float(row["waves"])
        assert waves <= 1 or waves / ceil(waves) >= 0.9, row
