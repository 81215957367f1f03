"""The four roofs of one launch, against a sum by hand."""

import math

import pytest
import torch

from bench.counting import roofs
from bench.counting.accounting import Traffic
from bench.counting.cases import Case
from bench.counting.gpus import ROOFS
from bench.counting.launches import Launch, SizedLaunch
from bench.counting.sass import Code, parse, parse_ptx
from bench.counting.traffic import Operation
from bench.rows.roofs import COLUMNS, Row, roofs_table, shown

H200 = ROOFS["h200"]
SASS = """\
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
        /*0030*/                   LOP3.LUT R4, R4, R5, RZ, 0x3c, !PT ;
        /*0040*/                   LOP3.LUT R6, R6, R7, RZ, 0x3c, !PT ;
        /*0050*/                   FFMA R4, R5, R6, R4 ;
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0070*/                   EXIT ;
"""
TTIR = """\
module {
  tt.func public @_kernel(%w_ptr: !tt.ptr<bf16>, %M: i32, %N: i32) {
    %w = tt.splat %w_ptr : !tt.ptr<bf16> -> tensor<64x64x!tt.ptr<bf16>>
    %x = tt.load %w : tensor<64x64x!tt.ptr<bf16>>
  }
}
"""
PROGRAMS = 1320  # ten on each of 132 multiprocessors
TRAFFIC = Traffic(loaded=80_000_000, unique=20_000_000, stored=10_000_000, flops=8 * 2048 * 2 * PROGRAMS)


def launch(traffic=TRAFFIC, programs=PROGRAMS):
    compiled = Launch("module", "_rescale_fwd_kernel", (), (), (), (("num_warps", 8),), True)
    return SizedLaunch(compiled, (programs,), (("w_ptr", 1 << 24), ("M", 1024.0), ("N", 2048.0)), traffic)


@pytest.fixture
def compiled(monkeypatch):
    """The code above in place of what the compiler would make."""

    def use(**changes):
        code = Code(*parse(SASS), parse_ptx(""), TTIR, registers=64, shared=0, warps=8)._replace(**changes)
        roofs._analysed.cache_clear()
        monkeypatch.setattr(roofs, "_code_of", lambda launch, capability: code)

    use()
    yield use
    roofs._analysed.cache_clear()


def test_each_roof(compiled):
    found = roofs.profile(launch(), H200)
    per_program = 8 * 10 / 1.755e9  # warps, programs on a multiprocessor, and a second's cycles
    assert found.seconds == pytest.approx(
        {
            "memory": 30e6 / 4.3e12,
            "L2": 90e6 / 6.65e12,
            "issue": 8 / 4 * per_program,
            "alu": 2 * 32 / 64 * per_program,
            "fma": 32 / 128 * per_program,
            "lsu": 3 * 4 * per_program,
            "tensor": 2048 / 2048 * per_program,
            "xu": 0,
            "fp64": 0,
            "tmem": 0,
            "launch": 3e-6,
        }
    )
    assert (found.roof, found.pipe) == ("L2", "lsu")
    assert roofs.longest(Operation("rescale_fwd_kernel", 0, 0, 0, "bf16", launch=launch()), H200) == (
        "L2",
        pytest.approx(90e6 / 6.65e12),
    )


def test_what_limits_reaching_them(compiled):
    found = roofs.profile(launch(), H200)
    # Eight instructions of eight warps, for 1024 × 2048 elements; 64 registers a thread leave room for 4 programs.
    assert found.instructions == pytest.approx(8 * 8 * 32 * PROGRAMS / (1024 * 2048))
    assert found.products == 1
    assert (found.resident, found.waves) == (4, 2.5)
    # Four blocks of 8 KiB; two thirds of the bytes are reads.
    assert found.in_flight == pytest.approx(4 * 8192 / (2 / 3 * 4.3e12 * 700e-9 / 132))


def test_one_wave_ends_with_its_fullest_multiprocessor(compiled):
    few, full = (roofs.profile(launch(programs=programs), H200).seconds["alu"] for programs in (133, 264))
    assert few == full


def test_products_that_the_code_does_not_show_are_the_sources(compiled):
    instructions, listing = parse(SASS.replace("HMMA.16816.F32.BF16", "UTCHMMA"))
    compiled(instructions=instructions, listing=listing)
    found = roofs.profile(launch(), H200)
    assert found.products == 0
    assert found.seconds["tensor"] == pytest.approx(TRAFFIC.flops / 790e12)


def test_the_table_shows_the_launch_with_the_most_instructions(compiled):
    case = Case(torch.bfloat16, torch.float32, "token", 16, 2048, 4096, 1024)
    less = roofs.profile(launch(), H200)
    more = less._replace(instructions=2 * less.instructions)
    lines = roofs_table(Row(case, launch(), "h200", profile) for profile in (less, more))
    assert len(lines) == 2 and lines[0].split("gpu")[0].split() == list(COLUMNS[:5])
    ratio = less.seconds["lsu"] / less.seconds["memory"]
    assert lines[1].split() == [
        *("rescale_fwd", "token", "bf16/fp32", "2048x4096", "16", "h200"),
        *(f"{more.instructions:.1f}", "lsu", f"{ratio:.2f}", "1.94", "0.01", "4", "2.50", f"{more.in_flight:.2f}"),
    ]
    assert shown(case, launch()) and not shown(case, launch()._replace(arguments=(("N", 4096.0),)))
    assert not shown(case._replace(mlp="silu"), launch()), "an MLP's layers have rows as layers"
    assert math.isclose(launch().elements, 1024 * 2048)
