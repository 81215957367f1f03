"""Which pipe of a multiprocessor each instruction takes, and the cycles that a program takes of each pipe.

A multiprocessor has four schedulers; each issues one instruction of a warp (32 threads) a cycle, and has a quarter of
every pipe. Pipes are named as the profiler (Nsight Compute) names them. Instructions of the uniform pipe, and those of
none, take issue slots alone. Stalls and bank conflicts are not modelled.
"""

import re
from collections.abc import Mapping

from .gpus import Multiprocessor

WARP = 32
FOUR = 4  # schedulers

OPCODES = {
    "alu": "IADD3 VIADD VIADDMNMX LOP3 PLOP3 LEA SHF SHL SHR BMSK SGXT PRMT SEL FSEL MOV ISETP FSETP HSETP2 FSET FMNMX "
    "IMNMX VIMNMX FMNMX3 VIMNMX3 FCHK IABS P2R R2P F2FP I2FP I2IP CS2R VOTE VOTEU",
    "fp32": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 HFMA2 HADD2 HMUL2 FHADD",
    "imad": "IMAD IDP",
    "fp64": "DFMA DADD DMUL DSETP DMMA",
    "xu": "MUFU F2F F2I I2F FRND POPC FLO BREV",
    "uniform": "UIADD3 UIMAD UISETP ULEA ULOP3 UMOV USEL USGXT USHF UPLOP3 UP2UR UPRMT UBMSK UFLO UPOPC UF2FP UI2F "
    "UFSETP UFMUL UFADD UFFMA UVIMNMX UVIADD UVIRTCOUNT ULDC LDCU R2UR S2UR UCLEA UR2UP",
    "lsu": "LDG STG LDS STS LDGSTS LDSM STSM LDL STL SHFL ATOMS ATOMG RED UBLKCP",
    "tmem": "LDTM STTM",
    "tensor": "HMMA HGMMA UTCHMMA UTCQMMA UTCBAR UTCATOMSWS UTCCP",
    "other": "LDC BAR BRA BRX BSSY BSYNC BREAK CALL RET EXIT NOP NANOSLEEP WARPSYNC DEPBAR LDGDEPBAR ARRIVES MEMBAR "
    "FENCE CCTL ERRBAR YIELD S2R WARPGROUP SYNCS ELECT REDUX BMOV ACQBULK UCGABAR_WAIT UCGABAR_ARV CREDUX LEPC BPT",
}
PIPES = {opcode: pipe for pipe, opcodes in OPCODES.items() for opcode in opcodes.split()}


def cycles(counts: Mapping[str, float], warps: int, sm: Multiprocessor) -> dict[str, float]:
    """Cycles that one program of `warps` takes of each pipe of a multiprocessor; `counts` are of one warp.

    Raises:
        ValueError: an opcode whose pipe is not known.
    """
    taken = dict.fromkeys(("issue", "alu", "fp32", "imad", "fp64", "xu", "lsu", "tmem", "tensor"), 0.0)
    for opcode, count in counts.items():
        pipe = pipe_of(opcode)
        taken["issue"] += count / FOUR
        if pipe == "tensor":
            taken["tensor"] += count * multiply_adds(opcode) / (sm.tensor / 2 if "TF32" in opcode else sm.tensor)
        elif pipe == "lsu":
            taken["lsu"] += count * WARP / (sm.shuffles if opcode.startswith("SHFL") else sm.bytes / lane_bytes(opcode))
        elif pipe == "tmem":
            taken["tmem"] += count * tensor_memory_bytes(opcode) / sm.tensor_memory
        elif pipe in taken:
            taken[pipe] += count * WARP / getattr(sm, pipe)
    # Integer products run on half of the pipe that fp32 has to itself, or on all of it where it is half as wide.
    imad = taken.pop("imad")
    taken["fma"] = max(imad, taken.pop("fp32") + imad * sm.imad / max(sm.fp32, sm.imad))
    return {pipe: warps * value for pipe, value in taken.items()}


def pipe_of(opcode: str) -> str:
    """The pipe of an opcode with its modifiers."""
    name = opcode.partition(".")[0]
    if name not in PIPES:
        raise ValueError(f"the pipe of the instruction {opcode} is not known: add it to bench/counting/pipes.py")
    return PIPES[name]


def multiply_adds(opcode: str) -> int:
    """Of one warp: m · n · k, of a warp group's HGMMA a quarter; 0 where the opcode does not say."""
    if found := re.match(r"HMMA\.(16816|1688|1684)\b", opcode):
        return {"16816": 2048, "1688": 1024, "1684": 512}[found[1]]
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        return int(found[1]) * int(found[2]) * int(found[3]) // 4
    return 0


def lane_bytes(opcode: str) -> int:
    """Bytes of the path that one thread takes: at least a register's, whatever it moves."""
    if repeated := re.search(r"^(?:LDSM|STSM)\..*\.(\d)$", opcode):
        return 4 * int(repeated[1])
    width = re.search(r"\.(128|64)\b", opcode)
    return int(width[1]) // 8 if width else 4


def tensor_memory_bytes(opcode: str) -> int:
    """Of one warp: rows · bytes of an element · columns."""
    rows, bits, columns = re.match(r"\w{4}(?:\.(\d+)dp(\d+)bit\w*)?(?:\.x(\d+))?", opcode).groups()
    return int(rows or WARP) * int(bits or 32) // 8 * int(columns or 1)
