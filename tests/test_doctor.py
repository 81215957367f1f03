"""`python -m dora_kernels`: what it finds, what it says to do, and that a wrong engine fails its self-test."""

import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

from dora_kernels import doctor
from dora_kernels.ops import reference

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def test_a_sound_engine_passes(capsys):
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert "The self-test passed" in printed
    assert f"torch         {metadata.version('torch')}" in printed
    assert re.search(r"cpu .*: reference: ", printed), "what would run, and why"
    assert printed.count(": correct, error") == 6


def test_a_wrong_engine_fails(monkeypatch, capsys):
    """The norm one percent too long: by far not what rounding explains."""
    right = reference.weight_norm

    def wrong(*args, **kwargs):
        found, cast_A = right(*args, **kwargs)
        return found._replace(scale=found.scale / 1.01), cast_A

    monkeypatch.setattr(reference, "weight_norm", wrong)
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert "token space, fp32 base, fp32 adapter, bias: wrong: y " in printed
    assert "of the self-test's forms failed" in printed


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=["fp32", "bf16"]
)
def test_the_kernels_pass_it_too(dtypes, space):
    form = doctor.Form(CPU, "triton", space, *dtypes, bias=True)
    assert doctor.check(form, doctor.Sizes(33, 48, 40, 8)).failure is None


def test_an_error_is_a_finding():
    found = doctor.check(doctor.Form(torch.device("cuda"), "triton", "token", torch.float32, torch.float32))
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert found.failure.startswith("raised ") and str(found).endswith(found.failure)


def test_nan_is_wrong(monkeypatch):
    monkeypatch.setattr(doctor, "compare", lambda form, sizes: {"y": 0.0, "dm": float("nan")})
    found = doctor.check(doctor.Form(CPU, "reference", "token", torch.float32, torch.float32))
    assert found.failure.startswith("wrong: dm nan")


def test_what_is_missing_has_a_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda package: None)

    def missing(*requirements):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(doctor, "require", missing)
    advice = list(doctor.remedies([CPU]))
    assert 'pip install "peft>=0.21"' in "\n".join(advice)
    assert "PyTorch sees no GPU" in advice[-1]


def test_an_old_gpu_and_no_compiler_have_remedies(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    advice = "\n".join(doctor.remedies([CPU, torch.device("cuda", 0)]))
    assert "compute capability (7, 5), the kernels need (8, 0)" in advice and "C compiler" in advice


def test_the_oldest_versions_are_those_of_the_package():
    setup = (ROOT / "setup.py").read_text() + (ROOT / "dora_kernels" / "ops" / "dispatch.py").read_text()
    for name, (oldest, _) in doctor.LIBRARIES.items():
        assert f'"{name}>={oldest}"' in setup, name
