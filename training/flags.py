"""The flags of `python -m training`: fields, checks, the YAML file of `--config`, and parsing."""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import yaml
from transformers import HfArgumentParser

import dora_kernels as dk

from . import demo
from .command_line import expand_home, module_names
from .distributed.launchers import check_sharding, zero_config
from .distributed.processes import local_rank
from .spelling import spelled


def flag(default, text: str):
    """A dataclass field with a default and its line in `--help`."""
    return field(default=default, metadata={"help": text})


@dataclass
class Flags:
    """With neither --base_model nor --data_path: the embedded demo, on the minimal loop."""

    base_model: str = flag("", "hub id or folder of a Hugging Face causal language model")
    data_path: str = flag("", "hub id, folder, or .jsonl, .json, .csv, .tsv, .parquet or .txt file")
    output_dir: str = flag("out/run", "where the adapter, checkpoints, metrics.jsonl and loss.png go")
    config: str = flag("", "YAML file of flags; a flag on the command line wins over it")
    batch_size: int = flag(1, "rows per forward pass")
    gradient_accumulation_steps: int = flag(1, "forward passes per optimizer step")
    num_epochs: int = flag(1, "passes over the training rows")
    max_steps: int = flag(0, "optimizer steps; above 0 it replaces --num_epochs")
    learning_rate: float = flag(3e-4, "peak of the cosine schedule")
    warmup_ratio: float = flag(0.05, "share of the steps in which the learning rate rises")
    cutoff_len: int = flag(512, "the most tokens of a row; --long_rows says what happens to longer ones")
    long_rows: Literal["truncate", "drop"] = flag(
        "truncate", "longer rows lose their end and are listed in cut_rows.jsonl, or are left out"
    )
    val_set_size: int | None = flag(
        None, "rows held out for evaluation where the data brings no split; default: a tenth, at most 500; 0: none"
    )
    bad_row_limit: float = flag(
        0.05, "share of unusable rows above which the run stops before training; long rows do not count"
    )
    packing: bool = flag(False, "pack several rows into one sequence of cutoff_len tokens")
    assistant_only_loss: bool = flag(False, "learn the assistant's turns only (column `messages`)")
    eval_step: int = flag(10, "steps between evaluations; 0: never")
    save_step: int = flag(100, "steps between checkpoints; 0: never")
    seed: int = flag(0, "decides initialization, data order and dropout")
    resume: bool = flag(False, "continue from the newest checkpoint in --output_dir that verifies")
    init_adapter: str = flag("", "folder of an adapter to continue from; it decides rank, alpha and targets")
    use_dora: bool = flag(True, "DoRA; --no_use_dora trains plain LoRA, through PEFT")
    use_peft: bool = flag(False, "build the adapter with PEFT, and run it fused")
    fused: bool = flag(True, "--no-fused runs PEFT's own code: the baseline to compare with")
    lora_r: int = flag(16, "rank of the adapter")
    lora_alpha: float = flag(32, "the adapter's update is scaled by lora_alpha / lora_r")
    lora_dropout: float = flag(0.0, "dropout of the adapter's input")
    lora_target_modules: str = flag(
        "all-linear", "comma-separated module names; default: all attention and MLP linears"
    )
    impl: Literal["auto", "triton", "reference"] = flag("auto", "which implementation of DoRA runs")
    fuse_blocks: Literal["auto", "off"] = flag("auto", "compute a gated MLP by one function, or each layer alone")
    device: str = flag("", "cpu, cuda or cuda:N; default: the first GPU, or the CPU where there is none")
    quantize: bool = flag(False, "load the base in 4 bits (NF4, double quantisation)")
    use_compile: bool = flag(False, "torch.compile the model")
    use_liger: bool = flag(False, "Liger's fused linear cross-entropy (needs a GPU)")
    activation_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    fsdp: bool = flag(False, "shard the base over the GPUs of the processes (FSDP2)")
    deepspeed: str = flag("", "DeepSpeed's configuration, a JSON file (ZeRO stage 1 or 2)")
    report_to: str = flag("none", "comma-separated trackers, as transformers knows them: wandb, tensorboard, ...")
    hub_model_id: str = flag("", "repository on the hub, for --push_to_hub")
    push_to_hub: bool = flag(False, "upload the adapter when the run has ended")
    trust_remote_code: bool = flag(False, "run code that the model's repository brings")

    def check(self) -> None:
        """Raise FileNotFoundError or ValueError, naming the flag, if a value cannot work."""
        for name in ("base_model", "data_path"):
            if not getattr(self, name):
                raise ValueError(f"`--{name}` is needed as well (neither of the two: the demo)")
        for name, value in vars(self).items():
            if isinstance(value, str) and value.encode(errors="replace").decode() != value:
                raise ValueError(f"`--{name}` {value!r} is not valid UTF-8, and could not be written to the model card")
        for name in ("batch_size", "gradient_accumulation_steps", "num_epochs", "cutoff_len"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`--{name}` should be a positive integer value but the value passed is {value}")
        for name in ("max_steps", "eval_step", "save_step", "seed", "val_set_size"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"`--{name}` should be 0 or more but the value passed is {value}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ValueError(f"`--learning_rate` should be 0 or more but the value passed is {self.learning_rate}")
        for name in ("warmup_ratio", "bad_row_limit"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"`--{name}` should be in [0, 1] but the value passed is {value}")
        check_source("base_model", self.base_model)
        check_source("data_path", self.data_path)
        if (folder := Path(self.base_model)).is_dir() and not (folder / "config.json").is_file():
            raise FileNotFoundError(f"`--base_model` {folder} is not a folder with a config.json")
        if self.init_adapter and not (Path(self.init_adapter) / "adapter_config.json").is_file():
            raise FileNotFoundError(f"`--init_adapter` {self.init_adapter} is not a folder with an adapter_config.json")
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            raise ValueError(f"`--output_dir` {self.output_dir} is not a folder")
        if not self.fused and not self.use_peft:
            raise ValueError("`--no-fused` compares with PEFT's own code: it needs --use_peft")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("`--push_to_hub` needs --hub_model_id, the repository to upload to")
        try:
            _ = self.dora  # checks its own fields
        except (TypeError, ValueError) as error:
            raise ValueError(_with_flag_names(str(error))) from None
        if self.use_liger and self.torch_device.type != "cuda":
            raise ValueError("`--use_liger` needs a CUDA device: Liger's kernels do not run on a CPU; leave it out")
        if self.deepspeed:
            zero_config(self.deepspeed)
            if self.fsdp:
                raise ValueError("`--deepspeed` does not go with --fsdp: leave one of them out")
            if self.resume:
                raise ValueError(
                    "`--resume` does not go with --deepspeed, whose optimizer state is not in the checkpoints: go on "
                    "from an adapter with --init_adapter, in a new --output_dir"
                )
        for engine in (name for name in ("fsdp", "deepspeed") if getattr(self, name)):
            check_sharding(engine, self.torch_device)
            for name in ("quantize", "use_compile", "use_liger"):
                if getattr(self, name):
                    raise ValueError(f"`--{engine}` does not go with --{name}: leave one of them out")
        needed = (("use_liger", "liger_kernel"), ("quantize", "bitsandbytes"), ("deepspeed", "deepspeed"))
        for name, package in needed:
            if getattr(self, name) and find_spec(package) is None:
                raise ValueError(f"`--{name}` needs {package}: pip install {package.replace('_', '-')}")
        check_trackers(self.trackers)

    @property
    def target_modules(self) -> list[str] | str:
        """Module names, or "all-linear"."""
        return module_names(self.lora_target_modules)

    @property
    def trackers(self) -> list[str]:
        """The trackers of `--report_to`."""
        return [name.strip() for name in self.report_to.split(",") if name.strip() not in ("", "none")]

    @property
    def dora(self) -> dk.DoraConfig:
        """The engine's config."""
        return dk.DoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
            impl=self.impl,
            fuse_blocks=self.blocks,
        )

    @property
    def blocks(self) -> str | bool:
        """`--fuse_blocks` as the engine takes it."""
        return self.fuse_blocks == "auto" and self.fuse_blocks

    @property
    def torch_device(self) -> torch.device:
        """The device of this process. Of several processes, each takes the GPU of its local rank.

        Raises:
            ValueError: the device does not exist, one GPU is named to several processes, or one process is given
                another GPU than the first.
        """
        present = torch.cuda.device_count() if torch.cuda.is_available() else 0
        try:
            device = torch.device(self.device or ("cuda" if present else "cpu"))
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise ValueError(f"`--device` should be cpu, cuda or cuda:N but the value passed is {self.device}")
        if device.type == "cpu":
            return device
        rank = local_rank()
        if rank is not None and device.index not in (None, rank):
            raise ValueError(f"`--device` {self.device} is one GPU for several processes: use --device cuda")
        index = rank or 0 if device.index is None else device.index
        if index >= present:
            wanted = self.device if rank is None else f"cuda:{index}, for process {rank} of this machine,"
            raise ValueError(f"`--device` {wanted} is not there ({present} CUDA devices found): use --device cpu")
        if rank is None and index:
            raise ValueError(
                f"`--device` {self.device}: transformers takes the first GPU it sees: run with "
                f"CUDA_VISIBLE_DEVICES={index} and --device cuda:0"
            )
        return torch.device("cuda", index)


# The demo's settings. They are parsed before the user's flags, so the user's win.
DEMO = {
    "base_model": str(demo.BASE),
    "data_path": str(demo.DATA),
    "output_dir": str(demo.OUTPUT),
    "batch_size": 16,
    "learning_rate": 5e-3,
    "cutoff_len": 256,
    "eval_step": 50,
}
# The flags that the demo's minimal loop reads.
DEMO_FLAGS = {*DEMO, "gradient_accumulation_steps", "num_epochs", "max_steps", "warmup_ratio", "save_step", "seed"} | {
    *("resume", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "impl", "fuse_blocks", "config")
}


def parse_flags(arguments: Sequence[str]) -> tuple[Flags, bool]:
    """The flags, and whether they mean the demo. Exits with a sentence, as argparse does, on bad words."""
    parser = HfArgumentParser(Flags, prog=spelled(), description=Flags.__doc__, allow_abbrev=False)
    names = [name.name for name in fields(Flags)]
    (own, unknown) = parser.parse_known_args(list(arguments))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_suggestion(unknown[0].lstrip('-'), names)}")
    try:
        arguments = [*(_yaml_arguments(Path(own.config).expanduser(), names) if own.config else []), *arguments]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    given = {text.partition("=")[0].removeprefix("--").replace("-", "_") for text in arguments if text.startswith("--")}
    is_demo = not given & {"base_model", "data_path"}
    if is_demo:
        if unsupported := sorted(given - DEMO_FLAGS):
            parser.error(f"the demo has no --{unsupported[0]}: give --base_model and --data_path for a run of your own")
        arguments = [*_as_arguments(DEMO), *arguments]
    elif given & {"init_adapter"} and (redundant := given & {"lora_r", "lora_alpha", "lora_target_modules"}):
        parser.error(f"--{min(redundant)} is decided by --init_adapter's own adapter_config.json: leave it out")
    (flags,) = parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)
    return replace(flags, **expand_home(vars(flags))), is_demo


def check_source(name: str, value: str) -> None:
    """Raise FileNotFoundError unless `value` exists here or is spelled as an id on the hub: `name` or `owner/name`."""
    looks_local = (
        value.count("/") > 1 or value.startswith((".", "/", "~")) or Path(value).suffix.lower() in LOCAL_SUFFIXES
    )
    if looks_local and not Path(value).exists():
        raise FileNotFoundError(f"`--{name}` {value} does not exist")


def check_trackers(names: list[str]) -> None:
    """Raise ValueError for a tracker that transformers does not know, or that is not installed."""
    if names:
        from transformers.integrations import get_available_reporting_integrations

        if absent := sorted(set(names) - set(available := get_available_reporting_integrations())):
            installed = f"installed are {', '.join(sorted(available))}" if available else "none is installed"
            raise ValueError(f"`--report_to` {absent[0]} is not installed or not known to transformers; {installed}")


LOCAL_SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt"}


def _yaml_arguments(path: Path, names: list[str]) -> list[str]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"`--config` {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"`--config` {path} should hold `flag: value` lines, got {type(values).__name__}")
    for name in values:
        if name not in names or name == "config":
            raise ValueError(f"`--config` {path} has an unknown key {str(name)!r}{_suggestion(str(name), names)}")
    return _as_arguments(values)


def _as_arguments(values: dict) -> list[str]:
    """Settings as command-line words, so that one parser reads both sources."""
    words = []
    for name, value in values.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [] if value is None else [f"--{name}={text}"]
    return words


def _with_flag_names(text: str) -> str:
    """An error of the engine's config with the flags' names."""
    for field_, flag_ in {"r": "lora_r", "target_modules": "lora_target_modules"}.items():
        text = text.replace(f"`{field_}`", f"`--{flag_}`")
    return re.sub(r"`(lora_alpha|lora_dropout|impl)`", r"`--\1`", text)


def _suggestion(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean --{near[0]}?" if near else ""
