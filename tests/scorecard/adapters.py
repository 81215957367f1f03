"""Corrupted adapters. A case is a seed, from which `EXAMPLES` corruptions of a good adapter follow.

Each either is refused with a sentence, the model being as it was, or loads bit for bit what the good one holds (bytes
that nothing reads were hit); within `LIMIT` seconds. In files of ours any byte may change; PEFT's have no digest, so
that a bit which turns one number into another is seen by nobody, and their values stay out of it.
"""

import functools
import json
import random
import shutil
import signal
import struct
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

from .row import Record, Row, Verdict, failures

EXAMPLES, CASES = 50, 20
LIMIT = 20
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("bytes", "keys", "shapes", "values", "config")
READERS = ("ours", "ours in place", "--init_adapter", "--init_adapter --use_peft")


def run(seed: str) -> dict:
    chance, counts = random.Random(int(seed)), {"refused": 0, "loaded as it was": 0}
    for number in range(EXAMPLES):
        kind, reader = KINDS[number % len(KINDS)], READERS[number // len(KINDS) % len(READERS)]
        source = chance.choice(("ours", "PEFT's"))
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder, "adapter")
            shutil.copytree(good(source), directory)
            what = f"{number}: {source} by {reader}: {CORRUPT[kind](directory, chance, source)}"
            if contents(directory) == contents(good(source)):
                what += " (nothing)"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    refused = attempt(directory, reader, expected(source))
            except BaseException as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:500]}") from error
        counts["refused" if refused else "loaded as it was"] += 1
    return counts


def attempt(directory: Path, reader: str, values: dict) -> bool:
    """Whether it was refused. Raises AssertionError if something else was loaded, or said badly."""
    import dora_kernels as dk
    from tests.tiny_models import assert_unchanged, llama, snapshot
    from training.adapters import add_adapter
    from training.flags import Flags

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
    for name, tensor in trained(loaded).items():
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


def _bytes(directory: Path, chance: random.Random, source: str) -> str:
    path = directory / chance.choice((CONFIG, WEIGHTS, WEIGHTS))
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little") if path.name == WEIGHTS else len(content)
    # PEFT's config has no digest either: there only what no longer is JSON, or no longer fits, is seen.
    end = len(content) if source == "ours" else header if path.name == WEIGHTS else 0
    way = chance.choice(("flip", "cut", "insert", "repeat", "overwrite")) if end else "cut"
    at = chance.randrange(end or len(content))
    if way == "flip":
        content[at] ^= 1 << chance.randrange(8)
    elif way == "cut":
        del content[at:]
    elif way == "insert":
        content[at:at] = chance.randbytes(chance.randint(1, 9))
    elif way == "repeat":
        content[at:at] = content[max(0, at - 40) : at]
    else:
        content[at : at + 8] = chance.randbytes(8)[: len(content) - at]
    path.write_bytes(content)
    return f"{way} at {at} of {path.name}"


def _keys(directory: Path, chance: random.Random, source: str) -> str:
    import torch

    tensors, digests = read(directory / WEIGHTS)
    name = chance.choice(sorted(tensors))
    way = chance.choice(("drop", "rename", "add", "swap", "spell twice", "another layer", "double the header"))
    if way == "drop":
        del tensors[name]
    elif way == "rename":
        at = chance.randrange(len(name))
        tensors[name[:at] + chance.choice("xyz./-0 ") + name[at + 1 :] + chance.choice(("", "x"))] = tensors.pop(name)
    elif way == "add":
        added = chance.choice(("../../evil", "/etc/passwd", "base_model.model.evil", name + ".", "", "é\n", "x" * 9000))
        tensors[added] = torch.zeros(2)
    elif way == "swap" and source == "ours":
        other = next(each for each in sorted(tensors) if each != name and tensors[each].shape == tensors[name].shape)
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif way == "spell twice":
        name = next(each for each in tensors if "magnitude" in each)
        tensors[name + ".weight"] = tensors[name].clone()
    elif way == "another layer":
        tensors = {each.replace("layers.1", "layers.7"): tensor for each, tensor in tensors.items()}
    else:
        content = (directory / WEIGHTS).read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + size].rstrip()
        first = json.loads(header)
        entry = json.dumps({name: first[name] | {"data_offsets": [0, 4]}})[1:-1].encode()
        header = header[:-1] + b"," + entry + b"}"
        (directory / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
        return f"{name} twice in the header"
    write(directory / WEIGHTS, tensors, digests)
    return f"{way} {name}"


def _shapes(directory: Path, chance: random.Random, source: str) -> str:
    import torch

    tensors, digests = read(directory / WEIGHTS)
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    way = chance.choice(
        ("transpose", "longer", "shorter", "flatten", "a dimension", "empty", "integers", "bool", "bytes")
    )
    changed = {
        "transpose": lambda: tensor[None] if tensor.ndim == 1 else tensor.T,
        "longer": lambda: torch.cat([tensor, tensor[:1]]),
        "shorter": lambda: tensor[:-1],
        "flatten": lambda: tensor.flatten()[None],
        "a dimension": lambda: tensor[..., None],
        "empty": lambda: tensor[:0],
        "integers": lambda: tensor.long(),
        "bool": lambda: tensor.bool(),
        "bytes": lambda: tensor.view(torch.uint8),
    }[way]()
    tensors[name] = changed
    write(directory / WEIGHTS, tensors, digests)
    return f"{way} {name}"


def _values(directory: Path, chance: random.Random, source: str) -> str:
    tensors, digests = read(directory / WEIGHTS)
    name = chance.choice(sorted(tensors))
    # In a file without a digest, only what is no number is seen.
    values = [float("nan"), float("inf"), float("-inf"), struct.unpack("f", b"\x01\x00\xc0\xff")[0]]
    value = chance.choice(values + [0.0, -1.0, 1e30, 1e-40] * (source == "ours"))
    flat = tensors[name].flatten()
    flat[chance.randrange(flat.numel())] = value
    tensors[name] = flat.view(tensors[name].shape)
    write(directory / WEIGHTS, tensors, digests)
    return f"{value} in {name}"


def _config(directory: Path, chance: random.Random, source: str) -> str:
    fields = json.loads((directory / CONFIG).read_text())
    way = chance.choice(("drop", "type", "wrong", "new"))
    if way == "drop":
        # What PEFT leaves out has defaults: dropping such a field of PEFT's is another adapter, not a damaged one.
        names = ("r", "target_modules", "peft_type", "use_dora", "lora_alpha")
        name = chance.choice(names if source == "ours" else names[1:4])
        fields.pop(name)
    elif way == "type":
        name = chance.choice(("r", "lora_alpha", "target_modules", "use_dora", "peft_type", "rank_pattern"))
        fields[name] = chance.choice(([[]], {"a": []}, "x", None, 2.5, True, -1, [1, None], "(", 10**40))
    elif way == "wrong":
        name, value = chance.choice(
            [("r", 2), ("r", 0), ("r", 10**9), ("target_modules", ["nope"]), ("target_modules", "("), ("bias", "all")]
            + [("peft_type", "IA3"), ("use_dora", False), ("target_modules", ["q_proj"]), ("lora_alpha", float("nan"))]
            + [("init_lora_weights", "pissa"), ("rank_pattern", {"q_proj": 9}), ("modules_to_save", ["lm_head"])]
            + [("lora_alpha", 7), ("use_rslora", True), ("alpha_pattern", {"q_proj": 9})] * (source == "ours")
        )
        fields[name] = value
    else:
        name = chance.choice(
            ("layer_replication", "use_qalora", "lora_bias", "trainable_token_indices", "use_unheard_of")
        )
        fields[name] = chance.choice((True, [[0, 1]], {"a": 1}, "yes"))
    (directory / CONFIG).write_text(json.dumps(fields))
    return f"{way} {name} = {str(fields.get(name, 'nothing'))[:40]}"


CORRUPT = {"bytes": _bytes, "keys": _keys, "shapes": _shapes, "values": _values, "config": _config}
DORA = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}


def read(path: Path) -> tuple[dict, dict]:
    """Tensors and header."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name).clone() for name in names}, file.metadata()


def write(path: Path, tensors: dict, header: dict) -> None:
    """With the header that the good file had: its digests are then of something else."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata=header)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@functools.cache
def good(source: str) -> Path:
    """A trained adapter in a folder that lasts as long as the process."""
    import peft
    import torch

    import dora_kernels as dk
    from tests.tiny_models import llama

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
    return directory


@functools.cache
def expected(source: str) -> dict:
    import dora_kernels as dk
    from tests.tiny_models import llama

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
    failed = failures(records)
    refused, unhurt = (sum(r.get(name, 0) for r in records) for name in ("refused", "loaded as it was"))
    text = f"{refused + unhurt:,}: {refused:,} refused, {unhurt} loaded bit for bit what was saved"
    text += f"; {len(failed)} batches of {EXAMPLES} with a failure" if failed else "; none loads silently, none hangs"
    return Verdict(text, refused + unhurt >= 1000 and not failed)


ROW = Row(
    what="corrupted adapters (bytes, keys, shapes, NaN, configuration; values of files without a digest left out)",
    target="1,000; none loads silently, none hangs",
    cases=lambda: map(str, range(CASES)),
    run=run,
    judge=judge,
    fast=True,
)
