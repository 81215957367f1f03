"""Instructions are counted right: of hand-written SASS, and of tiny kernels whose counts their source tells."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.counting.listing import Listing, Span, matched
from bench.counting.sass import Code, executed, parse, parse_ptx, rounds_of, stages
from bench.counting.trips import Loop

ROOT = Path(__file__).parents[2]

# Two loops, the second inside the first; a wait for the hardware; a slow path behind the exit.
TEXT = """\
\t//## File "/somewhere/norm.py", line 3
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
\t//## File "/somewhere/norm.py", line 10 inlined at "/somewhere/norm.py", line 4
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P1 LDGDEPBAR ;
.L_x_1:
\t//## File "/somewhere/norm.py", line 11
        /*0030*/                   FFMA R8, R4, R5, R8 ;
\t//## File "/somewhere/blocks.py", line 7
        /*0040*/              @!P0 BRA `(.L_x_1) ;
\t//## File "/somewhere/norm.py", line 9
        /*0050*/                   DEPBAR.LE SB0, 0x0 ;
        /*0060*/               @P1 BRA `(.L_x_0) ;
.L_x_2:
\t//## File "/somewhere/norm.py", line 12
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3 ;
        /*0080*/               @P0 BRA `(.L_x_2) ;
        /*0090*/                   STG.E desc[UR4][R2.64], R8 ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   MUFU.RCP R0, R1 ;
        /*00c0*/                   BRA `(.L_x_3) ;
"""
OUTER, INNER, WAIT = Span(1, 6), Span(3, 4), Span(7, 8)
SOURCE = (Loop({"norm.py:9", "norm.py:10"}, 10), Loop({"blocks.py:7", "norm.py:11"}, 3, 0))
NO_PTX = Listing((), frozenset(), ())


def code(text=TEXT, ptx=NO_PTX):
    return Code(*parse(text), ptx=ptx, ttir="", registers=32, shared=0, warps=4)


def test_loops_are_branches_back():
    found = code()
    assert found.listing.loops == (OUTER, INNER, WAIT)
    assert found.instructions[-1].opcode == "EXIT"
    assert found.instructions[3].opcode == "FFMA" and found.listing.places[3] == "norm.py:11"
    assert found.listing.accesses == {1, 9}


def test_loops_are_found_by_their_lines():
    # The place of the branch alone does not tell: it may be any line of the loop.
    assert matched(code().listing, SOURCE) == {OUTER: 0, INNER: 1, WAIT: None}


def test_nested_loops_multiply():
    counts = executed(code(), SOURCE)
    assert (counts["MOV"], counts["LDG.E.128"], counts["FFMA"]) == (1, 10, 30)
    assert counts["SYNCS.PHASECHK.TRANS64.TRYWAIT"] == 1  # a wait is no loop of the source
    assert counts["BRA"] == 30 + 10 + 1 and counts["MUFU.RCP"] == 0


UNROLLED = """\
.L_x_0:
\t//## File "/somewhere/norm.py", line 9
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E R6, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E R7, desc[UR4][R2.64] ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0060*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
"""
PTX = """\
\t.file\t1 "/somewhere/norm.py"
$L__BB0_1:
\t.loc\t1 9 20
\t@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
$L__BB0_2:
\t.loc\t1 11 20
\t@%p1 cp.async.cg.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, %r6;
\t@%p1 st.global.b32 [ %rd3 + 0 ], { %r1 };
\t@%p2 bra \t$L__BB0_2;
\t.loc\t1 9 20
\t@%p3 bra \t$L__BB0_1;
"""


def test_an_unrolled_loop_goes_round_less_often():
    given, source = parse_ptx(PTX.replace("bra \t$L__BB0_2", "")), [Loop({"norm.py:9"}, 10)]
    unrolled = code(UNROLLED, given)
    assert rounds_of(unrolled, source) == {Span(0, 4): 2.5, Span(5, 6): 0}
    assert executed(unrolled, source)["LDG.E"] == 10


def test_what_the_assembler_was_given():
    listing = parse_ptx(PTX)
    outer, inner = listing.loops
    assert outer.holds(inner)
    assert listing.accesses_in(outer, {"norm.py:9", "norm.py:11"}) == 1
    assert listing.accesses_in(inner, {"norm.py:9", "norm.py:11"}) == 2


def test_two_loops_of_the_same_lines_are_told_apart_by_their_order():
    twice = [Loop({"norm.py:9"}, 10), Loop({"norm.py:9"}, 4)]
    assert rounds_of(code(UNROLLED), twice) == {Span(0, 4): 10, Span(5, 6): 4}


def test_a_loop_may_end_behind_the_last_exit():
    instructions, listing = parse(
        TEXT.replace("EXIT ;", "NOP ;")
        .replace("@P0 BRA `(.L_x_2)", "@P0 EXIT")
        .replace("/*0090*/                   STG.E desc[UR4][R2.64], R8", "/*0090*/                   BRA `(.L_x_0)")
    )
    assert listing.loops[0] == Span(1, 9) and len(instructions) == 10


def test_a_lost_loop_is_refused():
    with pytest.raises(ValueError, match=r"no loop with the lines \['norm.py:9'\]"):
        rounds_of(code(TEXT.replace("norm.py", "other.py"), parse_ptx(PTX)), [Loop({"norm.py:9"}, 10)])


@pytest.mark.parametrize(("left", "in_flight"), [(0, 1), (4, 3), (0x36, 1)], ids="0x{:x} left".format)
def test_blocks_in_flight(left, in_flight):
    """Two groups of copies a round: four left open are two rounds, and one more is issued."""
    loop = [
        '\t//## File "/somewhere/norm.py", line 9',
        ".L_x_0:",
        *["/*0010*/ LDGDEPBAR ;"] * 2,
        f"/*0030*/ DEPBAR.LE SB0, 0x{left:x} ;",
        "/*0040*/ @P1 BRA `(.L_x_0) ;",
        "/*0050*/ EXIT ;",
    ]
    prologue = ["/*0000*/ LDGDEPBAR ;"] * 6
    assert stages(code("\n".join([*prologue, *loop]))) == in_flight


KERNELS = """
import triton
import triton.language as tl


@triton.jit
def scale_kernel(x_ptr, y_ptr):
    offs = tl.program_id(0) * 512 + tl.arange(0, 512)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) * 3.0)


@triton.jit
def sum_kernel(x_ptr, y_ptr, N):
    offs = tl.arange(0, 128)
    acc = tl.zeros([128], tl.float32)
    for start in range(0, N, 128):
        acc += tl.load(x_ptr + start + offs)
    tl.store(y_ptr + offs, acc)


@triton.jit
def nested_kernel(x_ptr, y_ptr, N, R):
    offs = tl.arange(0, 128)
    acc = tl.zeros([128], tl.float32)
    for start in range(0, N, 128):
        x = tl.load(x_ptr + start + offs)
        for r in range(0, R):
            acc = acc * x + tl.load(y_ptr + r * 128 + offs)
    tl.store(y_ptr + offs, acc)


@triton.jit
def dot_kernel(x_ptr, y_ptr, N):
    offs = tl.arange(0, 64)
    block = offs[:, None] * 64 + offs[None, :]
    acc = tl.zeros([64, 64], tl.float32)
    for start in range(0, N, 64):
        x = tl.load(x_ptr + start * 64 + block)
        acc = tl.dot(x, x, acc)
    tl.store(y_ptr + block, acc)
"""
PROGRAM = """
import json
import torch
import tiny_kernels
from bench.counting.launches import Recorder
from bench.counting.pipes import multiply_adds
from bench.counting.sass import compile_code, executed
from bench.counting.trips import structure

found = {}
for capability in ((8, 0), (9, 0), (10, 0)):
    for name, dtype, sizes in (
        ("scale", "float32", ()), ("sum", "float32", (128_000,)), ("nested", "float32", (1280, 84)),
        ("dot", "bfloat16", (640,)),
    ):
        x, y = torch.empty(1 << 20, dtype=getattr(torch, dtype), device="meta"), torch.empty(1 << 20, device="meta")
        launch = Recorder(capability).bind(getattr(tiny_kernels, f"{name}_kernel"), x, y, *sizes, num_warps=4)
        code = compile_code(launch, capability)
        counts = executed(code, structure(code.ttir, (4,), [x.nbytes, y.nbytes, *sizes]).loops)
        products = sum(count * multiply_adds(opcode) for opcode, count in counts.items())
        families = {}
        for opcode, count in counts.items():
            family = opcode.partition(".")[0]
            families[family] = families.get(family, 0) + count
        found[f"{name} {capability[0]}.{capability[1]}"] = families | {"multiply-adds": products}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Instructions of each tiny kernel by the name of their opcode; compiled in a process that does not interpret."""
    path = tmp_path_factory.mktemp("tiny")
    (path / "tiny_kernels.py").write_text(KERNELS)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(path), str(ROOT)])
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("gpu", ["8.0", "9.0", "10.0"])
def test_instructions_of_kernels_that_the_source_tells(tiny, gpu):
    # 512 elements over 128 threads: four a thread, in one load and one store of 16 bytes.
    scale = tiny[f"scale {gpu}"]
    assert (scale["LDG"], scale["STG"]) == (1, 1)
    assert scale.get("FMUL", 0) + 2 * scale.get("FMUL2", 0) == 4
    # 1000 blocks of one element a thread, in however many copies the compiler wrote the loop.
    sums = tiny[f"sum {gpu}"]
    assert (sums["LDG"], sums["FADD"]) == pytest.approx((1000, 1000), rel=0.005)
    # 10 times a load, and 84 more with a multiply-add each; up to three of a remainder that need not run.
    nested = tiny[f"nested {gpu}"]
    assert (nested["LDG"], nested["FFMA"]) == pytest.approx((10 * 85, 10 * 84), rel=0.05)


@pytest.mark.parametrize("gpu", ["8.0", "9.0"])
def test_products_of_kernels_that_the_source_tells(tiny, gpu):
    """Ten products of 64 × 64 × 64, a quarter by each warp. 10.0's instructions do not say their size."""
    assert tiny[f"dot {gpu}"]["multiply-adds"] == 10 * 64**3 / 4
