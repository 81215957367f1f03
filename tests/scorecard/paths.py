"""Hostile names and paths. A case is a command, or a call, and a number that chooses what it is given.

Each runs in a sandbox: `in/` is where it may write, everything else is listed, bytes and all, before and after. What
was asked for works or is refused with a sentence; either way not one file outside has changed.
"""

import functools
import hashlib
import io
import json
import os
import random
import shutil
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from .row import Row, none_fail

LINKED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "loss.png",
    "metrics.jsonl",
    "tokenizer.json",
)
LINKED += ("metrics.jsonl.tmp", "skipped_rows.jsonl", ".lock", ".tmp-1-1", "checkpoint-1", "checkpoint-99", ".finish-x")
"""What a run writes, and finds in its folder as a link to what is not the run's."""
NAMES = ("..", ".", "/", "a\0b", "a\nb", "x" * 300, "ü/ñ", "con", " ", "-rf", "~", "$HOME", "a/../../..", "*", "\udcff")
KEYS = ("../../outside/evil", "/etc/passwd", "base_model.model.../../x.lora_A.weight", "a\nb", "x" * 5000)
OFFLINE = mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)
CASES = {"linked": 13, "linked save": 13, "save": 15, "load": 15, "init": 15, "resume": 15, "merge": 15, "export": 15}
CASES |= {"adapter in merge": 15, "keys": 25, "base model": 25, "checkpoints": 10, "PEFT's name": 15}


def run(case: str) -> dict:
    kind, number = case.rsplit("-", 1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sandbox, before_cwd = Path(folder), Path.cwd()
        for name in ("in", "outside/folder"):
            (sandbox / name).mkdir(parents=True)
        shutil.copytree(good_adapter(), sandbox / "outside" / "adapter")
        for name in ("file", "folder/file"):
            (sandbox / "outside" / name).write_text("not yours")
        os.chdir(sandbox / "in")
        before, said = listing(sandbox), ""
        try:
            # A name that could be the hub's is not asked for: the answer is slow, and another where there is no net.
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), OFFLINE:
                ATTEMPTS[kind](sandbox, int(number))
        except (ValueError, TypeError, OSError, SystemExit) as error:
            said = str(error)
            assert len(said) > 10, f"says only {said!r}"
        finally:
            os.chdir(before_cwd)
        after = listing(sandbox)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not changed, f"outside of its folder changed: {changed}; it said {said!r}"
    return {"refused": bool(said)}


def listing(sandbox: Path) -> dict[str, str]:
    """All that is not inside `in/`, by name: kind and content."""
    found = {}
    for path in sorted(sandbox.rglob("*")):
        name = str(path.relative_to(sandbox))
        if not name.startswith("in/"):
            content = path.read_bytes() if path.is_file() else b""
            found[name] = f"{path.is_dir()} {os.path.islink(path)} {hashlib.sha256(content).hexdigest()}"
    # And what lies around the sandbox, by name.
    return found | {str(path): "there" for path in sandbox.parent.glob("*evil*")}


def link(sandbox: Path, out: Path, name: str) -> None:
    """`out/name` leads to a file or a folder outside."""
    out.mkdir(exist_ok=True)
    folder = name.startswith((".tmp", "checkpoint", ".finish"))
    (out / name).symlink_to(sandbox / "outside" / ("folder" if folder else "file"))


def _linked(sandbox, number):
    link(sandbox, sandbox / "in" / "run", LINKED[number])
    train(sandbox / "in" / "run", *(["--resume"] if "checkpoint" in LINKED[number] else []))


def _linked_save(sandbox, number):
    import dora_kernels as dk

    out = sandbox / "in" / "adapter"
    link(sandbox, out, LINKED[number])
    dk.save_adapter(model(), out)
    dk.load_adapter(base(), out)


def hostile(sandbox: Path, number: int) -> str:
    """A name, inside of `in/`: what leads out of it by dots is what a user may ask for, and is read only."""
    return NAMES[number % len(NAMES)]


def _save(sandbox, number):
    import dora_kernels as dk

    name = hostile(sandbox, number)
    if set(name.split("/")) <= {"..", "."} or name.startswith("/") or ".." in name:
        # Asked for a folder that is there and not a run's: the sandbox's own, which may be written.
        name = str(sandbox / "in" / "x" / ".." / "y")
    dk.save_adapter(model(), name)


def _load(sandbox, number):
    import dora_kernels as dk

    dk.load_adapter(base(), hostile(sandbox, number))


def _init(sandbox, number):
    train(sandbox / "in" / "run", f"--init_adapter={hostile(sandbox, number)}", lora_r=None)


def _resume(sandbox, number):
    """Checkpoints whose names lead elsewhere are none."""
    out = sandbox / "in" / "run"
    out.mkdir()
    name = hostile(sandbox, number).replace("\0", "").replace("/", "")[:200]
    (out / f"checkpoint-{name}").mkdir(exist_ok=True)
    (out / "checkpoint-1").symlink_to(sandbox / "outside" / "adapter")
    train(out, "--resume")


def _merge(sandbox, number, module="merge", *bare):
    import importlib

    name = hostile(sandbox, number)
    # An output that is there is refused, so that any place may be named.
    output = name if number % 2 else str(sandbox / "outside" / "folder" / ".." / "file")
    command = importlib.import_module(f"training.{module}")
    adapter = str(sandbox / "outside" / "adapter")
    command.main(["--base_model", str(base_folder()), f"--adapter={adapter}", f"--output_dir={output}", *bare])


def _export(sandbox, number):
    _merge(sandbox, number, "export", "--to", "lora", "--rank", "2")


def _adapter_in_merge(sandbox, number):
    from training.merge import main

    main(["--base_model", str(base_folder()), f"--adapter={hostile(sandbox, number)}", "--output_dir", "merged"])


def _keys(sandbox, number):
    import torch
    from safetensors.torch import load_file, save_file

    import dora_kernels as dk

    adapter = sandbox / "in" / "adapter"
    shutil.copytree(good_adapter(), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = KEYS[number % len(KEYS)]
    if number >= len(KEYS):
        key = f"base_model.model.{key}.{random.Random(number).choice(('lora_A.weight', 'lora_magnitude_vector'))}"
    save_file(tensors | {key: torch.zeros(2, 2)}, adapter / "adapter_model.safetensors")
    try:
        dk.load_adapter(base(), adapter)
    except ValueError:
        if number % 2:
            _merge_from(adapter)
        raise
    raise AssertionError("a key that names no layer was taken")


def _base_model(sandbox, number):
    adapter = sandbox / "in" / "adapter"
    shutil.copytree(good_adapter(), adapter)
    path = adapter / "adapter_config.json"
    fields = json.loads(path.read_text())
    names = [*NAMES, "../../outside", "/etc", "../outside/folder", "a/b/c/d", str(sandbox / "outside" / "file")]
    fields["base_model_name_or_path"] = names[number % len(names)]
    path.write_text(json.dumps(fields))
    _merge_from(adapter)


def _merge_from(adapter):
    from training.merge import main

    main(["--adapter", str(adapter), "--output_dir", "merged"])


def _checkpoints(sandbox, number):
    """Rotating deletes what this run wrote: no link's target, no name that is not a step's."""
    from training.checkpoint import newest_checkpoint, save_checkpoint

    out = sandbox / "in" / "run"
    out.mkdir()
    for name in ("checkpoint-1", "checkpoint-0", f"checkpoint-{'9' * (number + 1)}", "checkpoint-٣", ".tmp-x"):
        (out / name).symlink_to(sandbox / "outside" / "folder")
    newest_checkpoint(out, say=lambda text: None)
    for step in (number + 2, number + 3, 10 ** (number % 3)):
        save_checkpoint(out, step, {}, {}, lambda path: None, keep=1 + number % 2)


def _pefts_name(sandbox, number):
    """PEFT joins an adapter's name to the folder that it saves in; our commands save what they named themselves."""
    import peft

    import dora_kernels as dk

    name = ("/" + "x" * 9, "../outside/evil", str(sandbox / "outside" / "evil"))[number % 3]
    config = peft.LoraConfig(use_dora=True, r=2, target_modules=["q_proj"])
    peft_model = peft.get_peft_model(base(), config, adapter_name=name.replace(".", "_"))
    dk.patch_peft(peft_model)
    str(dk.explain(peft_model, tokens=8))
    dk.unpatch_peft(peft_model)
    link(sandbox, sandbox / "in" / "run", LINKED[number % 6])
    if number < 3:
        train(sandbox / "in" / "run", "--use_peft")


ATTEMPTS = {"linked": _linked, "linked save": _linked_save, "save": _save, "load": _load, "init": _init}
ATTEMPTS |= {"resume": _resume, "merge": _merge, "export": _export, "adapter in merge": _adapter_in_merge}
ATTEMPTS |= {"keys": _keys, "base model": _base_model, "checkpoints": _checkpoints, "PEFT's name": _pefts_name}


def train(out: Path, *bare: str, **flags) -> None:
    from tests.training_runs import arguments
    from training.__main__ import main

    small = {"max_steps": 2, "save_step": 1, "eval_step": 0, "val_set_size": 0, "lora_target_modules": None}
    main(arguments(rows_file(), out, *bare, base_model=base_folder(), **small | flags))


def good_adapter() -> Path:
    return write_faults().adapter_folder()


def base_folder() -> Path:
    return write_faults().base_folder()


def rows_file() -> Path:
    return write_faults().rows_file()


def base():
    return write_faults().base()


def model():
    return write_faults().model(1)


@functools.cache
def write_faults():
    from . import write_faults

    return write_faults


ROW = Row(
    what="hostile adapter names and paths",
    target="200; no file outside the folder",
    cases=lambda: [f"{kind}-{number}" for kind, count in CASES.items() for number in range(count)],
    run=run,
    judge=none_fail(200),
    fast=True,
)
