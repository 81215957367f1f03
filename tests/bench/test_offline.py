"""The offline compiler's limits turn red when they should, and its launches cover every kernel.

Kernels are compiled in processes of their own: in this one they are interpreted.
"""

import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import offline
from bench.__main__ import main
from bench.counting.cases import Case
from bench.counting.compiled import Figures
from bench.counting.launches import Launch

ROOT = Path(__file__).parents[2]

BAD_KERNELS = """
import triton
import triton.language as tl


@triton.jit
def dot_kernel(x_ptr, y_ptr, R, stride_x, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    offs, offs_r = tl.arange(0, BLOCK), tl.arange(0, 32)
    acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in range(0, R, 32):
        x = tl.load(x_ptr + offs[:, None] * stride_x + (start + offs_r)[None, :])
        acc = tl.dot(x, tl.trans(x), acc, input_precision=PRECISION)
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


@triton.jit
def copy_kernel(x_ptr, y_ptr, N, stride_x, STEP: tl.constexpr):
    offs_m, offs_n = tl.arange(0, 64), tl.arange(0, 64)
    x = tl.load(x_ptr + offs_m[:, None] * stride_x + (offs_n * STEP)[None, :])
    tl.store(y_ptr + offs_m[:, None] * 64 + offs_n[None, :], x)


@triton.jit
def sum_kernel(x_ptr, y_ptr, N, stride_x, STAGES: tl.constexpr):
    offs_m, offs_n = tl.arange(0, 64), tl.arange(0, 128)
    acc = tl.zeros([64, 128], dtype=tl.float32)
    for start in tl.range(0, N, 128, num_stages=STAGES):
        acc += tl.load(x_ptr + offs_m[:, None] * stride_x + (start + offs_n)[None, :])
    tl.store(y_ptr + offs_m[:, None] * 128 + offs_n[None, :], acc)


@triton.jit
def atomic_kernel(x_ptr, y_ptr, ONE: tl.constexpr):
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, 128))))
"""

CHECK = """
import torch
from bench.counting.compiled import broken_limits, compile_launch
from bench.counting.launches import Recorder
import bad_kernels

x = torch.empty(4096, 4096, dtype=torch.{dtype}, device="meta")
launch = Recorder({capability}).bind(bad_kernels.{kernel}, x, x, {arguments}, num_warps={warps}, num_stages={stages})
print(*broken_limits(compile_launch(launch, {capability}), {capability}), sep="\\n")
"""

CASES = {
    "plain tf32": ("dot_kernel", "float32", '64, 64, "tf32", 64', 4, 1, (8, 0), "plain tf32"),
    "plain tf32, Hopper": ("dot_kernel", "float32", '64, 64, "tf32", 64', 4, 1, (9, 0), "plain tf32"),
    "spills": ("dot_kernel", "float32", '64, 64, "tf32x3", 128', 4, 1, (8, 0), "of stack"),
    "shared memory": ("sum_kernel", "float32", "512, 512, 5", 8, 1, (8, 9), "of shared memory"),
    "narrow": ("copy_kernel", "bfloat16", "64, 64, 2", 4, 1, (9, 0), "16 at bad_kernels.py:19"),
    "float atomics": ("atomic_kernel", "float32", "1", 4, 1, (9, 0), "atomics"),
    "good dot": ("dot_kernel", "float32", '64, 64, "tf32x3", 64', 4, 1, (9, 0), None),
    "good copy": ("copy_kernel", "bfloat16", "64, 64, 1", 4, 1, (9, 0), None),
}


# In a random order all have soon been seen.
LAUNCHED = """
import random
import sys
from bench.counting.case_lists import quick_cases
from bench.counting.launches import sized_launches

cases, seen = list(quick_cases()), set()
random.Random(0).shuffle(cases)
for _, made in sized_launches(cases, (9, 0)):
    seen.add(made.launch.kernel)
    if seen.issuperset(sys.argv[1:]):
        break
print(*seen)
"""

ONE_CASE = """
from bench.counting.cases import BF16, FP16, FP32, Case
from bench.counting.compiled import broken_limits, compile_launch
from bench.counting.launches import launches

found = [launch for launch in launches([{case}], {capability}) if launch.name in {kernels}]
assert {{launch.name for launch in found}} == {kernels}
for launch in found:
    for limit in broken_limits(compile_launch(launch, {capability}), {capability}):
        print(launch, limit)
"""

# The committed summary has none of these: no call like them, or, but on Hopper, one launch of each kernel and types.
SPILLED_ONCE = {
    "a gated MLP in fp16": ((10, 0), 'Case(FP16, FP32, "token", 64, mlp="silu")', {"glu_fwd", "glu_bwd"}),
    "and of a masked rank": ((12, 0), 'Case(FP16, FP32, "token", 100, mlp="silu")', {"glu_fwd", "glu_bwd"}),
    "and in bf16": ((12, 0), 'Case(BF16, FP32, "token", 100, mlp="silu")', {"glu_fwd", "glu_bwd"}),
    "and with a bias": ((9, 0), 'Case(BF16, FP32, "token", 384, mlp="gelu_tanh", bias=True)', {"glu_fwd", "glu_bwd"}),
    "large blocks of the rank, of both factors' pieces": ((10, 0), 'Case(FP16, FP32, "token", 128)', {"rescale_fwd"}),
    "and of a masked rank's": ((10, 0), 'Case(BF16, FP32, "token", 100, mlp="silu")', {"glu_fwd"}),
    "int4 with zeros": ((12, 0), 'Case(BF16, FP32, "weight", 32, int4="AWQ")', {"merge_scale"}),
    "NF4 in fp32 at a masked rank": ((8, 6), 'Case(FP32, FP32, "weight", 17, nf4="plain")', {"merge_scale"}),
    "and rounded first": ((12, 0), 'Case(FP32, FP32, "weight", 17, 1024, nf4="parity")', {"merge_scale"}),
}


def run(*command, path=ROOT):
    """Runs Python with kernels that compile; modules in `path` can be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(path), str(ROOT)])
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """What each bad kernel breaks, by the name of its case; one process compiles them all."""
    path = tmp_path_factory.mktemp("bad")
    (path / "bad_kernels.py").write_text(BAD_KERNELS)
    lines = []
    for name, case in CASES.items():
        fields = ("kernel", "dtype", "arguments", "warps", "stages", "capability")
        lines.append(f"print({'== ' + name!r})\n{CHECK.format(**dict(zip(fields, case)))}")
    (path / "check.py").write_text("\n".join(lines))
    result = run(str(path / "check.py"), path=path)
    assert result.returncode == 0, result.stderr
    return {name: text for name, _, text in (part.partition("\n") for part in result.stdout.split("== ")[1:])}


@pytest.mark.parametrize("name", CASES)
def test_limits(broken, name):
    expected = CASES[name][-1]
    if expected is None:
        assert broken[name].strip() == ""
    else:
        assert expected in broken[name]


def test_every_kernel_is_launched():
    kernels = set()
    for file in (ROOT / "dora_kernels" / "ops" / "kernels").glob("*.py"):
        functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        kernels |= {node.name for node in functions if node.name.endswith("_kernel")}
    assert kernels
    result = run("-c", LAUNCHED, *kernels)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) == kernels


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(offline, "interpreted", lambda: True)
    assert main(["offline", "--quick"]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["offline", "--capability", "7.5"], ["offline", "--cap", "9.0"], ["off"]], ids=" ".join
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2


FIGURES = ("kernel dtypes sm launches", "weight_norm bf16/fp32 90 12", "weight_norm bf16/fp32 90 13")
ROOFLINES = ("kernel space dtypes shape rank gpu", "weight_norm a b c 16 h200 22.5", "weight_norm a b c 16 h200 24.0")


@pytest.mark.parametrize("changed", ["nothing", "figures", "roofs"])
def test_check_compares_selected_rows_with_the_committed_summary(tmp_path, changed, capsys):
    """Both tables; a change that costs instructions shows."""
    committed = tmp_path / "summary.txt"
    tables = [[FIGURES[0], FIGURES[1]], [ROOFLINES[0], ROOFLINES[1]]]
    others = [
        [rows[0], *(row.replace("90", "80").replace("h200", "a100") for row in rows[1:]), *rows[1:]]
        + [row.replace("weight_norm", "merge") for row in rows[1:]]
        for rows in tables
    ]
    committed.write_text("\n".join(offline.join(others)) + "\n")
    now = {"figures": [[FIGURES[0], FIGURES[2]], tables[1]], "roofs": [tables[0], [ROOFLINES[0], ROOFLINES[2]]]}
    selected = argparse.Namespace(capability=[(9, 0)], kernel=["weight_norm"])
    assert offline.differs(committed, now.get(changed, tables), selected) == (changed != "nothing")
    shown = capsys.readouterr().err
    assert (f"-{FIGURES[1]}" in shown) == (changed == "figures")
    assert (f"-{ROOFLINES[1]}" in shown) == (changed == "roofs")


def test_summary_shows_the_worst_launch():
    launch, case = (
        Launch("module", "_some_kernel", (), (), (), (), True),
        Case(torch.bfloat16, torch.float32, "token", 16),
    )
    good, bad = Figures(64, 0, 0, 1024, 1, 8, 0, 0, 128, ()), Figures(255, 8, 3, 4096, 1, 4, 0, 0, 16, ("16 at x:1",))
    compiled = [offline.Compiled((9, 0), launch, case, figures) for figures in (good, bad)]
    _, row = offline.summarise(compiled)
    assert " ".join(row.split()) == "some bf16/fp32 90 2 255 8 3 4096 4 16"
    assert [offline.report_broken(one) for one in compiled] == [False, True]


def test_the_summary_covers_one_generation_wholly_and_of_the_others_each_kernel_and_types():
    def made(kernel, stride):
        signature = (("N", "i32"), ("stride_wn", stride))
        return Launch(
            "module", f"_{kernel}_kernel", signature, (), ((0,), (1,)) if stride == "aligned" else (), (), True
        )

    case = Case(torch.bfloat16, torch.float32, "token", 16)
    other = case._replace(adapter_dtype=torch.bfloat16)
    found = {made("norm", "aligned"): case, made("norm", "odd"): case, made("norm", "other"): case}
    found |= {made("merge", "aligned"): other}
    assert offline.summarised(found, (9, 0)) == found
    assert list(offline.summarised(found, (8, 0))) == [made("norm", "odd"), made("merge", "aligned")]


@pytest.mark.parametrize("what", SPILLED_ONCE)
def test_what_spilled_once_spills_no_more(what):
    capability, case, kernels = SPILLED_ONCE[what]
    result = run("-c", ONE_CASE.format(capability=capability, case=case, kernels=kernels))
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "", "")
