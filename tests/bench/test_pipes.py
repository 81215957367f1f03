"""Cycles of each pipe, by hand from the vendor's table of throughputs."""

import pytest

from bench.counting.gpus import MULTIPROCESSORS, ROOFS
from bench.counting.pipes import cycles, lane_bytes, multiply_adds, pipe_of, tensor_memory_bytes

AMPERE, HOPPER = MULTIPROCESSORS[8, 0], MULTIPROCESSORS[9, 0]


def test_cycles_of_a_program():
    """Four warps on Hopper: 32 lanes at 128 fp32, 64 integer, 16 conversions and 32 shuffles a clock, and 128 bytes."""
    counts = {"FFMA": 8, "LOP3.LUT": 6, "MUFU.RCP": 1, "SHFL.BFLY": 2, "LDG.E.128": 3, "STS": 1, "EXIT": 1}
    assert cycles(counts, 4, HOPPER) == pytest.approx(
        {
            "issue": 4 * 22 / 4,
            "alu": 4 * 6 * 32 / 64,
            "fma": 4 * 8 * 32 / 128,
            "xu": 4 * 32 / 16,
            "lsu": 4 * (2 * 32 / 32 + 3 * 32 * 16 / 128 + 32 * 4 / 128),
            "fp64": 0,
            "tmem": 0,
            "tensor": 0,
        }
    )


def test_integer_products_share_the_pipe_of_fp32():
    # Half of Hopper's pipe multiplies integers; the other half is free for fp32.
    assert cycles({"IMAD": 4, "FFMA": 4}, 4, HOPPER)["fma"] == 8
    assert cycles({"IMAD": 4, "FFMA": 12}, 4, HOPPER)["fma"] == 16
    # On 8.0 all of it does both, 64 a clock.
    assert cycles({"IMAD": 4, "FFMA": 4}, 4, AMPERE)["fma"] == 16


def test_products_of_tensor_cores():
    assert multiply_adds("HMMA.16816.F32.BF16") == 16 * 8 * 16
    assert multiply_adds("HMMA.1688.F32.TF32") == 16 * 8 * 8
    # Of a warp group of four.
    assert multiply_adds("HGMMA.64x32x16.F32.BF16") == 64 * 32 * 16 // 4
    bf16, tf32 = ({f"HGMMA.64x32x{k}": 1} for k in ("16.F32.BF16", "8.F32.TF32"))
    assert cycles(bf16, 4, HOPPER)["tensor"] == cycles(tf32, 4, HOPPER)["tensor"] == 64 * 32 * 16 / 2048


def test_tensor_cores_have_the_data_sheets_rate():
    """TFLOP/s of bf16 with fp32 sums, dense. The H100's data sheet counts at 1.83 GHz."""
    for gpu, clock, sheet in (("h100", 1.83, 989), ("a100", 1.41, 312), ("4090", 2.52, 165.2), ("b200", 1.85, 2250)):
        roofs = ROOFS[gpu]
        assert 2 * roofs.multiprocessor.tensor * roofs.multiprocessors * clock / 1e3 == pytest.approx(sheet, rel=0.01)


def test_widths():
    widths = {"LDG.E.128": 16, "LDG.E.64": 8, "LDG.E": 4, "LDG.E.U8": 4, "LDSM.16.M88.4": 16, "LDSM.16.M88": 4}
    assert {opcode: lane_bytes(opcode) for opcode in widths} == widths


def test_tensor_memory():
    """Some instructions serve half of a warp's threads; a B200 moves 228 bytes a cycle."""
    assert tensor_memory_bytes("LDTM.x32") == 32 * 4 * 32
    assert tensor_memory_bytes("STTM.16dp32bit_t16_t31.x64") == 16 * 4 * 64
    assert tensor_memory_bytes("LDTM.16dp256bit.x8") == 16 * 32 * 8
    assert tensor_memory_bytes("STTM") == 32 * 4
    taken = cycles({"LDTM.x32": 57}, 4, ROOFS["b200"].multiprocessor)
    assert taken["tmem"] == 4 * 32 * 4 * 32 / 4 and taken["lsu"] == 0


def test_an_unknown_instruction_is_refused():
    assert pipe_of("IMAD.MOV.U32") == "imad" and pipe_of("LDGSTS.E.BYPASS.128") == "lsu"
    with pytest.raises(ValueError, match=r"FROB\.X is not known"):
        cycles({"FROB.X": 1}, 4, HOPPER)
