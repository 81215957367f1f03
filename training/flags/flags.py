"""`Flags`: all flags of a run, their checks, and what they mean to the engine."""

import math
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

import dora_kernels as dk

from ..command_line import module_names, numbers_by_name
from ..data.mapping import Mapping
from ..data.mixture import parts_of
from ..distributed.launchers import check_sharding, zero_config
from ..distributed.processes import local_rank
from .groups import Adapter, Data, Hardware, Run, Training

LOCAL_SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz"}


@dataclass
class Flags(Hardware, Adapter, Training, Data, Run):
    """With neither base_model nor data_path: the embedded demo, on the minimal loop."""

    def __post_init__(self):
        if self.val_set_size is not None and self.val_set_size >= 1 and self.val_set_size % 1 == 0:
            self.val_set_size = int(self.val_set_size)

    def check(self) -> None:
        """Raise FileNotFoundError or ValueError, naming the flag, if a value cannot work."""
        for name in ("base_model", "data_path"):
            if not getattr(self, name):
                raise ValueError(f"`--{name}` is needed as well (neither of the two: the demo)")
        for name, value in vars(self).items():
            if isinstance(value, str) and value.encode(errors="replace").decode() != value:
                raise ValueError(f"`--{name}` {value!r} is not valid UTF-8, and could not be written to the model card")
        for name in ("batch_size", "gradient_accumulation_steps", "cutoff_len"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`--{name}` should be a positive integer value but the value passed is {value}")
        if not 0 < self.num_epochs < math.inf:
            raise ValueError(f"`--num_epochs` should be above 0 but the value passed is {self.num_epochs}")
        if self.val_set_size is not None and self.val_set_size > 1 and not isinstance(self.val_set_size, int):
            raise ValueError(
                f"`--val_set_size` should be a number of rows, or below 1 a share of them, but the value passed is "
                f"{self.val_set_size}"
            )
        for name in ("max_steps", "eval_step", "save_step", "seed", "val_set_size", "early_stopping"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"`--{name}` should be 0 or more but the value passed is {value}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ValueError(f"`--learning_rate` should be 0 or more but the value passed is {self.learning_rate}")
        for name in ("warmup_ratio", "bad_row_limit"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"`--{name}` should be in [0, 1] but the value passed is {value}")
        check_source("base_model", self.base_model)
        for part in parts_of(self.data_path):
            check_source("data_path", part.path)
        _ = self.mapping
        if (folder := Path(self.base_model)).is_dir() and not (folder / "config.json").is_file():
            raise FileNotFoundError(f"`--base_model` {folder} is not a folder with a config.json")
        if self.init_adapter and not (Path(self.init_adapter) / "adapter_config.json").is_file():
            raise FileNotFoundError(f"`--init_adapter` {self.init_adapter} is not a folder with an adapter_config.json")
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            raise ValueError(f"`--output_dir` {self.output_dir} is not a folder")
        if self.task != "sft":
            for name in ("packing", "assistant_only_loss", "use_liger", "deepspeed", "fsdp"):
                if getattr(self, name):
                    raise ValueError(f"`--task {self.task}` does not go with --{name}: leave one of them out")
        if not self.fused and not self.by_peft:
            raise ValueError("`--no-fused` compares with PEFT's own code: it needs --use_peft")
        if self.keep_weights and self.gradient_accumulation_steps == 1:
            raise ValueError("`--keep_weights` is for several passes a step: it needs --gradient_accumulation_steps")
        if self.keep_weights and not (self.fused and self.use_dora):
            raise ValueError("`--keep_weights` is for the engine's DoRA: leave --no-fused and --no_use_dora out")
        if self.keep_weights and self.merge_aware:
            raise ValueError(
                "`--keep_weights` does not go with --merge_aware, whose layers keep nothing: leave one of them out"
            )
        if self.early_stopping and self.eval_step == 0:
            raise ValueError("`--early_stopping` needs evaluations: leave --eval_step 0 out")
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
        if self.merge_aware and self.by_peft:
            raise ValueError(
                "`--merge_aware` is for the engine's DoRA: PEFT, which --use_peft, --no_use_dora and other tasks than "
                "sft take, has no merged weight to quantise"
            )
        if self.lora_target_parameters and self.by_peft:
            raise ValueError(
                "`--lora_target_parameters` is for the engine's DoRA: PEFT, which --use_peft, --no_use_dora and other "
                "tasks than sft take, has none for experts"
            )
        check_trackers(self.trackers)

    @property
    def target_modules(self) -> list[str] | str:
        """Module names, or "all-linear"."""
        return module_names(self.lora_target_modules)

    @property
    def mapping(self) -> Mapping:
        """What `--columns` and `--prompt_template` say. Raises ValueError for a part that is not `ours=theirs`."""
        parts = [part.strip() for part in self.columns.split(",") if part.strip()]
        for part in parts:
            if not all(part.partition("=")):
                raise ValueError(f"`--columns` {part} should be ours=theirs, such as prompt=frage")
        return Mapping(dict(part.split("=", 1) for part in parts), self.prompt_template)

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
            target_parameters=module_names(self.lora_target_parameters) if self.lora_target_parameters else None,
            expert_rank=self.expert_rank,
            exclude_modules=self.excluded,
            modules_to_save=self.saved,
            use_rslora=self.use_rslora,
            rank_pattern=numbers_by_name("rank_pattern", self.rank_pattern, int),
            alpha_pattern=numbers_by_name("alpha_pattern", self.alpha_pattern, float),
            dropout_mode=self.dropout_mode,
            space=self.space,
            impl=self.impl,
            rounding=self.rounding,
            fuse_blocks=self.blocks,
            merge_aware=self.merge_aware,
        )

    @property
    def excluded(self) -> list[str] | None:
        """The modules of `--exclude_modules`."""
        return module_names(self.exclude_modules) if self.exclude_modules else None

    @property
    def saved(self) -> list[str] | None:
        """The modules of `--modules_to_save`."""
        return module_names(self.modules_to_save) if self.modules_to_save else None

    @property
    def by_peft(self) -> bool:
        """Whether PEFT builds the adapter. A preference's reference is the model with its adapter switched off."""
        return self.use_peft or not self.use_dora or self.task != "sft"

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


def _with_flag_names(text: str) -> str:
    """An error of the engine's config with the flags' names."""
    for field_, flag_ in {
        "r": "lora_r",
        "target_modules": "lora_target_modules",
        "target_parameters": "lora_target_parameters",
    }.items():
        text = text.replace(f"`{field_}`", f"`--{flag_}`")
    same = "lora_alpha|expert_rank|lora_dropout|impl|exclude_modules|modules_to_save|rank_pattern|alpha_pattern|space"
    same += "|merge_aware"
    return re.sub(rf"`({same})`", r"`--\1`", text)
