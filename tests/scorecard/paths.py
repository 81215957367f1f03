"""Hostile names and paths. A case is a command, or a call, and a number that chooses what it is given.

Each runs in a sandbox: `in/` is where it may write, everything else is listed, bytes and all, before and after, the
home and the folder of temporary files with it. What was asked for works, or is refused with a sentence where it may be;
either way not one file outside has changed.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from .row import Record, Row, Verdict, failures
from .small import adapter_folder, base, base_folder, model, rows_file

LEAST = 200

LINKED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "loss.png",
    "metrics.jsonl",
    "tokenizer.json",
)
LINKED += (
    "metrics.jsonl.tmp",
    "skipped_rows.jsonl",
    "cut_rows.jsonl",
    ".lock",
    ".tmp-1-1",
    "checkpoint-1",
    "checkpoint-99",
    ".finish-x",
)
"""What a run writes, and finds in its folder as a link to what is not the run's."""
NAMES = ("..", ".", "/", "a\0b", "a\nb", "x" * 300, "ü/ñ", "con", " ", "-rf", "~", "$HOME", "a/../../..", "*", "\udcff")
NAMES += ("..\\..", "a/./b", "%2e%2e", "\x1b[31m", "a//b", "with space", "`id`", "a;b")
KEYS = ("../../outside/evil", "/etc/passwd", "base_model.model.../../x.lora_A.weight", "a\nb", "x" * 5000)
OFFLINE = mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def run(case: str) -> dict:
    kind, _, number = case.rpartition("-")
    given = GIVEN[kind][int(number)]
    base_folder(), adapter_folder(), rows_file()  # made outside of the sandbox
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sandbox, before_cwd, before_tmp = Path(folder), Path.cwd(), tempfile.tempdir
        for name in ("in", "outside/folder", "home", "tmp"):
            (sandbox / name).mkdir(parents=True)
        shutil.copytree(adapter_folder(), sandbox / "outside" / "adapter")
        for name in ("file", "folder/file"):
            (sandbox / "outside" / name).write_text("not yours")
        os.chdir(sandbox / "in")
        before, said = listing(sandbox), ""
        elsewhere = mock.patch.dict(os.environ, {"HOME": str(sandbox / "home"), "TMPDIR": str(sandbox / "tmp")})
        try:
            tempfile.tempdir = None  # read anew
            # A name that could be the hub's is not asked for: the answer is slow, and another where there is no net.
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), OFFLINE, elsewhere:
                ATTEMPTS[kind](sandbox, given)
        except (ValueError, TypeError, OSError, SystemExit) as error:
            said = str(error)
            assert len(said) > 10, f"says only {said!r}"
        finally:
            os.chdir(before_cwd)
            tempfile.tempdir = before_tmp
        after = listing(sandbox)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not changed, f"outside of its folder changed: {changed}; it said {said!r}"
    assert not said or kind not in WORKS or given in REFUSED, f"was refused: {said}"
    return {"kind": kind, "given": ascii(given), "refused": bool(said), "said": ascii(said[:200])}


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


def deep() -> None:
    """So that dots lead nowhere but into `in/`."""
    os.makedirs("a/b/c/d")
    os.chdir("a/b/c/d")


def _linked(sandbox, name, *bare):
    link(sandbox, sandbox / "in" / "run", name)
    train(sandbox / "in" / "run", *bare, *(["--resume"] if "checkpoint" in name else []))


def _linked_peft(sandbox, name):
    _linked(sandbox, name, "--use_peft")


def _linked_save(sandbox, name):
    import dora_kernels as dk

    out = sandbox / "in" / "adapter"
    link(sandbox, out, name)
    dk.save_adapter(model(1), out)
    dk.load_adapter(base(), out)


def _save(sandbox, name):
    import dora_kernels as dk

    deep()
    dk.save_adapter(model(1), name)
    dk.load_adapter(base(), name)


def _load(sandbox, name):
    import dora_kernels as dk

    dk.load_adapter(base(), name)


def _init(sandbox, name):
    train(sandbox / "in" / "run", f"--init_adapter={name}", lora_r=None)


def _resume(sandbox, name):
    """Checkpoints whose names lead elsewhere are none."""
    out = sandbox / "in" / "run"
    (out / f"checkpoint-{name}").mkdir(parents=True)
    (out / "checkpoint-1").symlink_to(sandbox / "outside" / "adapter")
    train(out, "--resume")


def _merge(sandbox, name, module="merge", *bare):
    import importlib

    deep()
    command = importlib.import_module(f"training.{module}")
    adapter = str(sandbox / "outside" / "adapter")
    output = name.replace("OUTSIDE", str(sandbox / "outside"))
    command.main(["--base_model", str(base_folder()), f"--adapter={adapter}", f"--output_dir={output}", *bare])


def _export(sandbox, name):
    _merge(sandbox, name, "export", "--to", "lora", "--rank", "2")


def _adapter_in_merge(sandbox, name):
    from training.merge import main

    main(["--base_model", str(base_folder()), f"--adapter={name}", "--output_dir", "merged"])


def _keys(sandbox, key):
    import torch
    from safetensors.torch import load_file, save_file

    adapter = sandbox / "in" / "adapter"
    shutil.copytree(adapter_folder(), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors | {key: torch.zeros(2, 2)}, adapter / "adapter_model.safetensors")
    _adapter_in_merge(sandbox, adapter)


def _base_model(sandbox, name):
    from training.merge import main

    adapter = sandbox / "in" / "adapter"
    shutil.copytree(adapter_folder(), adapter)
    path = adapter / "adapter_config.json"
    named = {"base_model_name_or_path": name.replace("OUTSIDE", str(sandbox / "outside"))}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    main(["--adapter", str(adapter), "--output_dir", "merged"])


def _checkpoints(sandbox, name):
    """Rotating deletes what this run wrote: no link's target, no name that is not a step's."""
    from training.checkpoints.checkpoint import newest_checkpoint, save_checkpoint

    out = sandbox / "in" / "run"
    out.mkdir()
    (out / name).symlink_to(sandbox / "outside" / "folder")
    newest_checkpoint(out, report=lambda text: None)
    for step in (2, 3, 4):
        save_checkpoint(out, step, {}, {}, lambda path: None, keep=1)


def _pefts_name(sandbox, name):
    """PEFT joins an adapter's name to the folder that it saves in; what it saved there is read from there."""
    import peft

    import dora_kernels as dk

    config = peft.LoraConfig(use_dora=True, r=2, target_modules=["q_proj"])
    peft_model = peft.get_peft_model(base(), config, adapter_name=name)
    dk.patch_peft(peft_model)
    peft_model.save_pretrained("saved")
    dk.unpatch_peft(peft_model)
    dk.load_adapter(base(), Path("saved", name))


ATTEMPTS = {"linked": _linked, "linked --use_peft": _linked_peft, "linked save": _linked_save, "save": _save}
ATTEMPTS |= {"load": _load, "init": _init, "resume": _resume, "merge": _merge, "export": _export}
ATTEMPTS |= {"adapter in merge": _adapter_in_merge, "keys": _keys, "base model": _base_model}
ATTEMPTS |= {"checkpoints": _checkpoints, "PEFT's name": _pefts_name}
GIVEN = dict.fromkeys(ATTEMPTS, NAMES)
GIVEN |= dict.fromkeys(("linked", "linked --use_peft", "linked save"), LINKED)
GIVEN["save"] = tuple("/proc/evil" if name == "/" else name for name in NAMES)  # root could
GIVEN["resume"] = tuple(name for name in NAMES if "/" not in name and "\0" not in name and len(name) < 200)
GIVEN["merge"] = GIVEN["export"] = (*NAMES, "OUTSIDE/folder/../file", "OUTSIDE/folder")
GIVEN["keys"] = tuple(key + end for key in KEYS for end in ("", ".lora_A.weight", ".lora_magnitude_vector"))
GIVEN["base model"] = (*NAMES, "../../outside", "/etc", "../outside/folder", "a/b/c/d", "OUTSIDE/file")
GIVEN["checkpoints"] = ("checkpoint-0", "checkpoint-1", "checkpoint-3", "checkpoint-99999999999", "checkpoint-٣")
GIVEN["checkpoints"] += (".tmp-x", ".tmp-replaced-3", "checkpoint-", "checkpoint-1.5", "checkpoint--1")
# A module's name has no dot; PEFT itself saves at an absolute name; safetensors reads no path that is not UTF-8.
GIVEN["PEFT's name"] = tuple(name for name in NAMES if not {*name} & {*".\0\udcff"} and name != "/" and len(name) < 200)
WORKS = ("linked", "linked --use_peft", "linked save", "resume", "checkpoints", "PEFT's name")
REFUSED = {".lock"}
"""What works, whatever is given, but for a link in place of the lock; in other attempts some names are no good."""


def train(out: Path, *bare: str, **flags) -> None:
    from tests.support.training_runs import arguments
    from training.__main__ import main

    small = {"max_steps": 2, "save_step": 1, "eval_step": 0, "val_set_size": 0, "lora_target_modules": None}
    main(arguments(rows_file(), out, *bare, base_model=base_folder(), **small | flags))


def judge(records: list[Record]) -> Verdict:
    """Counts what differs in what is given to which attempt; in every attempt but reading, some of it works."""
    failed = failures(records)
    sound = [record for record in records if record["failed"] is None]
    distinct = {(record["kind"], record["given"]) for record in sound}
    worked = {record["kind"] for record in sound if not record["refused"]}
    refused = sum(record["refused"] for record in sound)
    text = f"{len(distinct)} distinct: {len(sound) - refused} worked, {refused} refused, {len(failed)} failures"
    return Verdict(text, len(distinct) >= LEAST and {*WORKS, "save", "merge", "export"} <= worked and not failed)


ROW = Row(
    what="hostile adapter names and paths",
    target=f"{LEAST}; no file outside the folder",
    cases=lambda: [f"{kind}-{number}" for kind, given in GIVEN.items() for number in range(len(given))],
    run=run,
    judge=judge,
)
