"""Shared by merge and export: loading an adapter on its base model, errors of the update, and the output folder."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel

import dora_kernels as dk
from dora_kernels.adapters.peft_config import CONFIG_NAME, read_config
from dora_kernels.adapters.save_load import MAGNITUDE, PREFIX, WEIGHTS_NAME

from .checkpoints.lock import why_not_made
from .model.base_model import absent_weights
from .model_class import class_of

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""Copied, not written anew: `save_pretrained` would drop the sentencepiece file that llama.cpp reads."""


@dataclass
class Sources:
    """An adapter folder and the base model it belongs to, checked before any weight is read.

    Args:
        adapter: folder with PEFT's two files, from `save_adapter` or from PEFT.
        base_model: folder or Hub id; None takes the one that the adapter names.
        may_be_quantised: whether the base may be.

    Raises:
        FileNotFoundError: a folder or a file is missing.
        ValueError: neither DoRA nor LoRA, no base model, or a quantised one.
        OSError: the Hub's error.
    """

    adapter: Path
    base_model: str | None = None
    may_be_quantised: bool = False
    config: transformers.PretrainedConfig = field(init=False)
    fields: dict = field(init=False)

    def __post_init__(self):
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (self.adapter / name).is_file():
                raise FileNotFoundError(f"`--adapter` {self.adapter} should be a folder with {name}")
        self.fields = fields_of(self.adapter)
        if not self.is_plain_lora:
            read_config(self.adapter)  # raises for features that are not supported
        elif any(MAGNITUDE in key for key in stored_shapes(self.adapter / WEIGHTS_NAME)):
            raise ValueError(
                f"{self.adapter / CONFIG_NAME} says plain LoRA, but {WEIGHTS_NAME} holds magnitudes: "
                "set use_dora to true"
            )
        self.base_model = self.base_model or self.fields.get("base_model_name_or_path")
        if not self.base_model:
            raise ValueError(f"{self.adapter / CONFIG_NAME} names no base model: say which with --base_model")
        local = Path(self.base_model)
        # A Hub id has one slash at most.
        if not (local / "config.json").is_file() and (local.exists() or len(local.parts) > 2 or local.is_absolute()):
            raise FileNotFoundError(f"the base model {self.base_model} should be a Hub id or a folder with config.json")
        try:
            self.config = AutoConfig.from_pretrained(self.base_model)
        except (OSError, ValueError) as error:
            raise OSError(
                f"the base model {self.base_model} is neither here nor readable from the Hub: {error}"
            ) from error
        if getattr(self.config, "quantization_config", None) is not None and not self.may_be_quantised:
            raise ValueError(
                f"the base model {self.base_model} is quantised, and so would be the result: pass the original, "
                "unquantised model as --base_model, or export --to bf16, or --to the format of the base"
            )

    @property
    def is_plain_lora(self) -> bool:
        """Whether the adapter is LoRA without DoRA, which PEFT loads and merges."""
        return self.fields.get("peft_type") == "LORA" and not self.fields.get("use_dora")

    @property
    def quantised_by(self) -> str | None:
        """The method of the base's quantization_config; None for a dense base."""
        config = getattr(self.config, "quantization_config", None)
        return config and config["quant_method"]

    def load(self, quantization=None) -> PreTrainedModel:
        """The base model in its own dtype, on the CPU, with the adapter in it; a PEFT model for plain LoRA. A dense
        base is quantised by `quantization`, if it is given.

        Raises:
            ValueError: the adapter does not fit the base, or a head of the model is in neither of them.
        """
        stored = stored_shapes(self.adapter / WEIGHTS_NAME)
        found = class_of(self.fields, self.config, stored)
        options = {} if quantization is None else {"quantization_config": quantization}
        model, info = found.cls.from_pretrained(
            self.base_model, config=found.config, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True,
            **options,
        )  # fmt: skip
        if found.vocabulary:
            model.resize_token_embeddings(found.vocabulary, mean_resizing=False)
        random = {name for name in absent_weights(info) if PREFIX + name not in stored}
        if heads := sorted(name for name in random if "pooler" not in name):
            raise ValueError(
                f"{found.cls.__name__} has {heads[0]}, which is neither in the base model nor in the adapter: pass the "
                "base model that the adapter was trained with"
            )
        if random:
            print(f"in neither the base model nor the adapter, and random: {', '.join(sorted(random))}")
        if self.is_plain_lora:
            import peft

            return peft.PeftModel.from_pretrained(model, self.adapter).eval()
        return dk.load_adapter(model, self.adapter).eval()

    def copy_tokenizer(self, folder: Path) -> list[str]:
        """Copy the adapter's tokenizer files, or the base model's if it has none. Returns their names."""
        source = self.adapter
        if not (source / "tokenizer_config.json").is_file():
            source = Path(self.base_model)
        if not source.is_dir():
            source = Path(snapshot_download(self.base_model, allow_patterns=list(TOKENIZER_FILES)))
        found = {path for pattern in TOKENIZER_FILES for path in source.glob(pattern)}
        for path in found:
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, folder / path.name)
        return sorted(path.name for path in found)


def fields_of(adapter: Path) -> dict:
    """An adapter's adapter_config.json. Raises ValueError if it is no JSON object."""
    try:
        fields = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{adapter / CONFIG_NAME} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{adapter / CONFIG_NAME} should hold a JSON object, got {type(fields).__name__}")
    return fields


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, by key. Raises ValueError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # damaged files raise errors of any class
        raise ValueError(f"{path} is truncated or corrupt: {error}") from None


def check_output(output: Path) -> None:
    """Raise FileExistsError unless `output` is absent or an empty folder, ValueError if it has no name or no place."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"`--output_dir` {output} exists already: choose another, nothing is overwritten")
    if output.name in ("", ".."):
        raise ValueError(f"`--output_dir` {output} should end in the name of a folder: it is replaced by the new one")
    if reason := why_not_made(_linked(output).parent):
        raise ValueError(f"`--output_dir` {output} cannot be made there: {reason}")


def _linked(output: Path) -> Path:
    """The folder itself where `output` is a link to it."""
    return Path(os.path.realpath(output))


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output`, or what it links to. It is renamed to that at the end, or deleted on an
    error."""
    target = _linked(output)
    staged = target.parent / f".{target.name}-{os.getpid()}"
    try:
        staged.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"`--output_dir` {output} cannot be made there: {error}") from None
    try:
        yield staged
        staged.rename(target)  # raises if files have appeared there meanwhile
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def update_of(layer: dk.DoraLinear) -> torch.Tensor:
    """ΔW = W' − W [out_features, in_features], at least fp32."""
    exact = layer.merged_weight(torch.promote_types(layer.base_weight.dtype, torch.float32))
    return exact - layer.dense_base(exact.dtype)


class UpdateErrors:
    """The relative error of each layer's update ΔW: ‖approximation − ΔW‖ / ‖ΔW‖."""

    def __init__(self):
        self.norms: dict[str, tuple[float, float]] = {}

    def add(self, path: str, update: torch.Tensor, approximation: torch.Tensor) -> None:
        """Record one layer. Both tensors are [out_features, in_features]."""
        self.norms[path] = (approximation - update).norm().item(), update.norm().item()

    @property
    def per_layer(self) -> dict[str, float]:
        """By path; 0 for a layer without an update."""
        return {path: error / norm if norm else 0.0 for path, (error, norm) in self.norms.items()}

    @property
    def total(self) -> float:
        """Over all layers together."""
        error, norm = (math.hypot(*column) for column in zip(*self.norms.values()))
        return error / norm if norm else 0.0

    def __str__(self) -> str:
        lines = self.per_layer | {"total": self.total}
        width = max(map(len, lines))
        return "\n".join(f"{path:{width}}  {error:.3g}" for path, error in lines.items())
