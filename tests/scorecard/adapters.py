"""Corrupted adapters. A case is a seed, from which `EXAMPLES` corruptions of a good adapter follow.

Each either is refused with a sentence, the model being as it was, or loads bit for bit what the good one holds (bytes
that nothing reads were hit); within `LIMIT` seconds. A corruption that changes nothing is none: another is made. In
files of ours any byte may change; PEFT's have no digest, so that a bit which turns one number into another is seen by
nobody, and their values stay out of it.
"""

import functools
import json
import random
import shutil
import signal
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

from .corruptions import CONFIG, CORRUPT, identity
from .row import Record, Row, Verdict, failures

EXAMPLES, CASES = 50, 36  # more than 1,000, as small things come twice
LEAST = 1000
LIMIT = 20  # seconds
KINDS = tuple(CORRUPT)
READERS = ("ours", "ours in place", "--init_adapter", "--init_adapter --use_peft")


def run(seed: str) -> dict:
    chance, counts, made = random.Random(int(seed)), {"refused": 0, "loaded as it was": 0}, []
    for number in range(EXAMPLES):
        kind, reader = KINDS[number % len(KINDS)], READERS[number // len(KINDS) % len(READERS)]
        source = chance.choice(("ours", "PEFT's"))
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder, "adapter")
            what = f"{number}: {source} by {reader}: {corrupt(directory, kind, chance, source)}"
            made.append(identity(directory, kind))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    refused = attempt(directory, reader, expected(source))
            except BaseException as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:500]}") from error
        counts["refused" if refused else "loaded as it was"] += 1
    return counts | {"made": made}


def corrupt(directory: Path, kind: str, chance: random.Random, source: str) -> str:
    """Makes `directory` a good adapter with something of it changed; what, in words."""
    while True:
        shutil.copytree(good(source), directory)
        what = CORRUPT[kind](directory, chance, source)
        if identity(directory, kind) != identity(good(source), kind):
            return what
        shutil.rmtree(directory)


def attempt(directory: Path, reader: str, values: dict) -> bool:
    """Whether it was refused. Raises AssertionError if something else was loaded, or said badly."""
    import dora_kernels as dk
    from tests.support.tiny_models import assert_unchanged, llama, snapshot
    from training.flags import Flags
    from training.model.adapter import add_adapter

    model = llama()
    if reader == "ours in place":
        dk.apply_dora(model, dk.DoraConfig(**DORA))
    before = snapshot(model)
    try:
        with limited():
            if reader.startswith("--init_adapter"):
                flags = Flags(init_adapter=str(directory), use_peft="--use_peft" in reader, fused=False)
                loaded = add_adapter(model, flags).model
            else:
                loaded = dk.load_adapter(model, directory)
    except (ValueError, OSError) as error:
        assert len(str(error)) > 20 and any(
            named in str(error) for named in ("adapter", str(directory), "Target modules")
        ), f"says {error}"
        if "--use_peft" not in reader:  # the command ends here; PEFT has begun by then
            assert_unchanged(model, before)
        return True
    parameters = trained(loaded)
    assert parameters.keys() == values.keys() - {"scalings"}, "other parameters than the good one's are trained"
    for name, tensor in parameters.items():
        assert tensor.equal(values[name]), f"{name} is not what the good one holds"
    assert scalings(loaded) == values["scalings"], "the scaling is not the good one's"
    return False


@contextmanager
def limited():
    def late(number, frame):
        raise AssertionError(f"no answer in {LIMIT} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


DORA = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}


@functools.cache
def good(source: str) -> Path:
    """A trained adapter in a folder that lasts as long as the process."""
    import peft
    import torch

    import dora_kernels as dk
    from tests.support.tiny_models import llama

    torch.manual_seed(0)
    good.folders = getattr(good, "folders", [])
    good.folders.append(tempfile.TemporaryDirectory())
    directory = Path(good.folders[-1].name)
    if source == "ours":
        model = dk.apply_dora(llama(), dk.DoraConfig(**DORA))
    else:
        model = peft.get_peft_model(llama(), peft.LoraConfig(use_dora=True, **DORA))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    dk.save_adapter(model, directory) if source == "ours" else model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / CONFIG  # where PEFT writes a set, in another order in every process
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"target_modules": sorted(fields["target_modules"])}, indent=2))
    return directory


@functools.cache
def expected(source: str) -> dict:
    import dora_kernels as dk
    from tests.support.tiny_models import llama

    model = dk.load_adapter(llama(), good(source))
    return {name: tensor.detach().clone() for name, tensor in trained(model).items()} | {"scalings": scalings(model)}


def trained(model) -> dict:
    """Parameters by names that ours and PEFT's model share."""
    names = {".default": "", "base_model.model.": "", "lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
    names |= {"lora_magnitude_vector.weight": "magnitude"}
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for old, new in names.items():
                name = name.replace(old, new)
            found[name] = parameter
    return found


def scalings(model) -> list[float]:
    import dora_kernels as dk

    layers = [module for module in model.modules() if isinstance(module, dk.DoraLinear) or hasattr(module, "lora_A")]
    return [each.scaling["default"] if isinstance(each.scaling, dict) else each.scaling for each in layers]


def judge(records: list[Record]) -> Verdict:
    """Counts adapters that differ in what they hold."""
    failed = failures(records)
    refused, unhurt = (sum(r.get(name, 0) for r in records) for name in ("refused", "loaded as it was"))
    distinct = len({made for record in records for made in record.get("made", ())})
    text = f"{distinct:,} distinct in {refused + unhurt:,}: {refused:,} refused, "
    text += f"{unhurt} loaded bit for bit what was saved"
    text += f"; {len(failed)} batches of {EXAMPLES} with a failure" if failed else "; none loads silently, none hangs"
    return Verdict(text, distinct >= LEAST and not failed)


ROW = Row(
    what="corrupted adapters (bytes, keys, shapes, NaN, configuration; values of files without a digest left out)",
    target=f"{LEAST:,}; none loads silently, none hangs",
    cases=lambda: map(str, range(CASES)),
    run=run,
    judge=judge,
    fast=True,
)
