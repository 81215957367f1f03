"""Write faults at every write site. A case is a scenario, one of its calls that can fail, and how it fails.

Or, at rest, a finished file and what is done to it.

Each scenario writes where something good is already, under `tests.support.disk_faults`. Whatever the fault: an error
comes out that names it, unless the write was complete; what was good before still verifies and loads, bit for bit, or
what replaced it does; and writing once more, without the fault, succeeds. A fault that did not happen is no case.
"""

import functools
import io
import json
import re
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from .row import Record, Row, Verdict, failures
from .scenarios import SCENARIOS, Adapter, Checkpoint, same_adapter
from .small import base, model

LEAST = 300
SAID = ("No space left on device", "Input/output error")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
FILES = {"adapter": ADAPTER}
FILES["checkpoint"] = (*ADAPTER, "manifest.json", "training_state.json", "training_state.safetensors")
"""What lies at rest."""


def cases() -> list[str]:
    """Every call of every scenario, failing in every way that such a call can; every file, damaged in every way."""
    from tests.support.disk_faults import AT_REST, CONTENT, KINDS, PLACES

    found = []
    for name in SCENARIOS:
        for number, call in enumerate(calls(name)):
            kinds = KINDS if call.split()[0] in CONTENT else KINDS[:2]  # only content can be torn
            found += [f"{name}|{number}|{kind}" for kind in kinds]
    for name, files in FILES.items():
        for file in files:
            found += [f"{name} at rest|{file}|missing"]
            found += [f"{name} at rest|{file}|{fault} {place}" for fault in AT_REST for place in PLACES]
    return found


def run(case: str) -> dict:
    name, what, kind = case.split("|")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        if name == "checkpoint at rest":
            found = checkpoint_at_rest(Path(folder), what, kind)
        elif name == "adapter at rest":
            found = adapter_at_rest(Path(folder), what, kind)
        else:
            found = while_writing(name, Path(folder), int(what), kind)
    return {"scenario": name, "call": what, "kind": kind} | found


def while_writing(name: str, folder: Path, strike: int, kind: str) -> dict:
    from tests.support.disk_faults import Faults

    scenario, error = SCENARIOS[name](folder), None
    with Faults(folder, strike, kind, scenario.remember) as faults:
        try:
            scenario.write()
        except scenario.errors as raised:
            error = raised
    assert faults.struck, "the chosen call was not reached"
    what = normal(faults.calls[strike], folder)
    try:
        assert error is None or any(said in str(error) for said in SAID), f"an error without the cause: {error}"
        assert faults.delivered or error is None, "an error without a fault"
        scenario.check(failed=error is not None)
        if error is not None and name != "run":
            scenario.write()
            scenario.check(failed=False)
    except (Exception, SystemExit) as raised:
        raise AssertionError(f"{what} ({kind}): {type(raised).__name__}: {raised}; the write said: {error}") from raised
    return {"call": what, "delivered": faults.delivered, "detected": error is not None}


def normal(call: str, folder: Path) -> str:
    """A call by names that are the same in every run."""
    inside = call.replace(str(folder.resolve()), "").replace(str(folder), "")
    return re.sub(r"/(\.tmp-\d+|\.finish|\.adapter|\.out)-\w+", r"/\1-*", inside)


def checkpoint_at_rest(folder: Path, name: str, fault: str) -> dict:
    """One file of the newest of two checkpoints, damaged: the older one is taken, and said why."""
    from training.checkpoints.checkpoint import newest_checkpoint, step_of

    checkpoint = Checkpoint(folder)
    file = checkpoint.out / "checkpoint-2" / name
    before = file.read_bytes()
    delivered = damage(file, fault)
    said = []
    found = step_of(newest_checkpoint(checkpoint.out, said.append))
    harmless = not delivered or (file.exists() and name == "manifest.json" and same_manifest(before, file.read_bytes()))
    assert found == (2 if harmless else 1), f"{fault} {name}: checkpoint {found} is taken, having said {said}"
    assert bool(said) != harmless
    checkpoint.sound = [found]
    checkpoint.check(failed=True)
    checkpoint.write()
    checkpoint.sound = [3]
    checkpoint.check(failed=False)
    return {"delivered": delivered, "detected": bool(said)}


def adapter_at_rest(folder: Path, name: str, fault: str) -> dict:
    """One of its two files, damaged: it is refused, unless what nobody reads was hit, and can be written anew."""
    import dora_kernels as dk

    adapter = Adapter(folder)
    delivered = damage(folder / "out" / name, fault)
    try:
        same_adapter(dk.load_adapter(base(), folder / "out"), model(1))
        said = ""
    except (ValueError, OSError) as error:
        said = str(error)
        assert len(said) > 20, f"says only {said!r}"
    assert delivered or not said
    adapter.write()
    adapter.check(failed=False)
    return {"delivered": delivered, "detected": bool(said)}


def damage(file: Path, fault: str) -> bool:
    """Does it to the file; whether that changed anything."""
    from tests.support.disk_faults import AT_REST, PLACES

    if fault == "missing":
        file.unlink()
        return True
    before = file.read_bytes()
    way, place = fault.split()
    AT_REST[way](file, PLACES[place](len(before)))
    return file.read_bytes() != before


def same_manifest(before: bytes, after: bytes) -> bool:
    """Whether the files that it lists are the same: a flipped bit may turn a space into another."""
    try:
        return json.loads(before)["files"] == json.loads(after)["files"]
    except (ValueError, KeyError):
        return False


@functools.cache
def calls(name: str) -> list[str]:
    """The calls of a scenario that can fail, in order."""
    from tests.support.disk_faults import Faults

    with (
        tempfile.TemporaryDirectory() as folder,
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        scenario = SCENARIOS[name](Path(folder))
        with Faults(Path(folder)) as faults:
            scenario.write()
    return [normal(call, Path(folder)) for call in faults.calls]


def judge(records: list[Record]) -> Verdict:
    """Counts faults that happened, each once: a call that is made again with the same names is the same fault."""
    failed = failures(records)
    happened = [record for record in records if record["failed"] is None and record["delivered"]]

    def distinct(found):
        return {(record["scenario"], record["call"], record["kind"]) for record in found}

    every, detected = distinct(happened), distinct(record for record in happened if record["detected"])
    text = f"{len(every)} distinct faults in {len(happened)} cases: {len(detected)} detected"
    text += f", {len(every - detected)} harmless (all is whole all the same), {len(failed)} failures"
    return Verdict(text, len(detected) >= LEAST and not failed)


ROW = Row(
    what="write faults (full disk, I/O error, torn file, flipped bit, missing file) at every write site",
    target=f"{LEAST}, all detected, no good checkpoint lost",
    cases=cases,
    run=run,
    judge=judge,
)
