"""Corruptions of an adapter's two files: bytes, names, shapes, values, configuration."""

import hashlib
import json
import random
import struct
from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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


def identity(directory: Path, kind: str) -> str:
    """The same for two folders that hold the same: byte for byte after "bytes", else however JSON is spelt."""
    config, weights = (directory / CONFIG).read_bytes(), (directory / WEIGHTS).read_bytes()
    if kind != "bytes":
        config = json.dumps(json.loads(config), sort_keys=True).encode()
        size = int.from_bytes(weights[:8], "little")
        pairs = json.loads(weights[8 : 8 + size], object_pairs_hook=sorted)  # a name that is there twice stays so
        weights = json.dumps(pairs).encode() + weights[8 + size :]
    return hashlib.sha256(config + weights).hexdigest()[:16]


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
