"""Trips of loops and streamed blocks are read right from Triton's intermediate code."""

import pytest

from bench.counting.trips import structure

CODE = """\
#loc = loc("/somewhere/norm.py":10:0)
#loc1 = loc("/somewhere/norm.py":20:8)
#loc2 = loc("/somewhere/blocks.py":7:8)
#loc3 = loc("/somewhere/norm.py":21:4)
#loc4 = loc(callsite(#loc2 at #loc3))
#loc5 = loc("/somewhere/norm.py":30:4)
module {
  tt.func public @_kernel(%w_ptr: !tt.ptr<bf16>, %a_ptr: !tt.ptr<f32>, %K: i32 loc("K"(#loc)), %R: i32) {
    %c0_i32 = arith.constant 0 : i32 loc(#loc)
    %c16_i32 = arith.constant 16 : i32 loc(#loc)
    %c64_i32 = arith.constant 64 : i32 loc(#loc)
    %pid = tt.get_program_id x : i32 loc(#loc)
    %first = arith.muli %pid, %c64_i32 : i32 loc(#loc)
    %count = tt.get_num_programs x : i32 loc(#loc)
    %step = arith.muli %count, %c64_i32 : i32 loc(#loc)
    scf.for %start = %first to %K step %step  : i32 {
    } loc(#loc1)
    %w = tt.splat %w_ptr : !tt.ptr<bf16> -> tensor<32x64x!tt.ptr<bf16>> loc(#loc)
    %sum:2 = scf.for %start = %c0_i32 to %K step %c64_i32 iter_args(%s = %c0_i32, %p = %w) -> (i32, i64)  : i32 {
      %x = tt.load %p, %c0_i32 : tensor<32x64x!tt.ptr<bf16>> loc(#loc)
      %inner = scf.for %r = %c0_i32 to %R step %c16_i32 iter_args(%t = %c0_i32) -> (i32)  : i32 {
        %a = tt.splat %a_ptr : !tt.ptr<f32> -> tensor<16x64x!tt.ptr<f32>> loc(#loc)
        %b = tt.addptr %a, %c0_i32 : tensor<16x64x!tt.ptr<f32>>, tensor<16x64xi32> loc(#loc)
        %y = tt.load %b : tensor<16x64x!tt.ptr<f32>> loc(#loc)
        scf.yield %t : i32 loc(#loc)
      } loc(#loc4)
      scf.yield %s, %p : i32, tensor<32x64x!tt.ptr<bf16>> loc(#loc)
    } loc(#loc5)
    BRANCH
      scf.for %start = %c0_i32 to %K step %c64_i32  : i32 {
      } loc(#loc3)
    } loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""
FIRST = "%taken = arith.cmpi eq, %pid, %c0_i32 : i32 loc(#loc)\n    scf.if %taken {"
OF_DATA = "%read = tt.load %w_ptr : !tt.ptr<bf16> loc(#loc)\n    scf.if %read {"


def read(branch, grid=(4,), K=640, R=40):
    return structure(CODE.replace("BRANCH", branch), grid, [1 << 20, 1 << 10, K, R])


def test_trips_are_means_over_programs():
    # Ten blocks of K dealt out over four programs; three blocks of the rank in each of ten; one program of four.
    assert [(loop.trips, loop.parent) for loop in read(FIRST).loops] == [(2.5, None), (10, None), (3, 1), (2.5, None)]


def test_a_loop_has_its_own_lines():
    """Of the innermost function where a call is inlined, and without those of loops inside."""
    assert [loop.places for loop in read(FIRST).loops] == [
        {"norm.py:20"},
        {"norm.py:10", "norm.py:30"},
        {"norm.py:10", "blocks.py:7"},
        {"norm.py:21"},
    ]


def test_a_branch_on_data_is_rare():
    assert read(OF_DATA).loops[-1].trips == 0


def test_an_empty_range_has_no_trips():
    assert [loop.trips for loop in read(FIRST, K=0).loops] == [0, 0, 3, 0]


def test_the_streamed_block_is_that_of_the_largest_tensor():
    assert read(FIRST).streamed == 32 * 64 * 2


UNKNOWN = {
    "of data": OF_DATA + "\n      scf.for %i = %c0_i32 to %K step %read  : i32 {\n      } loc(#loc)",
    "while": "%z = scf.while (%u = %c0_i32) : (i32) -> i32 {",
}


@pytest.mark.parametrize("branch", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_trips_are_refused(branch):
    with pytest.raises(ValueError, match="trips"):
        read(branch)


def test_arguments_must_fit_the_code():
    with pytest.raises(ValueError, match="4 parameters, the launch 2 arguments"):
        structure(CODE, (1,), [1, 2])
