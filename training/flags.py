"""The flags of `python -m training`, and what is checked before work starts."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import dora_kernels as dk
from training import demo
from training.loop import LoopSettings


def flag(default, text: str):
    """A dataclass field with its line in `--help`."""
    return field(default=default, metadata={"help": text})


@dataclass
class Flags:
    """Without flags: the embedded demo."""

    base_model: str = flag(str(demo.BASE), "folder of a Hugging Face causal language model")
    data_path: str = flag(
        str(demo.DATA), ".jsonl file with prompt and completion, or folder of train, validation, test.jsonl"
    )
    output_dir: str = flag(str(demo.OUTPUT), "where the adapter, checkpoints, metrics.jsonl and loss.png go")
    batch_size: int = flag(16, "rows per forward pass")
    gradient_accumulation_steps: int = flag(1, "forward passes per optimizer step")
    num_epochs: int = flag(1, "passes over the training rows")
    max_steps: int = flag(0, "optimizer steps; above 0 it replaces --num_epochs")
    learning_rate: float = flag(5e-3, "peak of the cosine schedule")
    warmup_ratio: float = flag(0.05, "share of the steps in which the learning rate rises")
    cutoff_len: int = flag(256, "the most tokens a row may have")
    eval_step: int = flag(50, "steps between evaluations on the validation rows; 0: never")
    save_step: int = flag(100, "steps between checkpoints; 0: never")
    lora_r: int = flag(16, "rank of the adapter")
    lora_alpha: float = flag(32, "the adapter's update is scaled by lora_alpha / lora_r")
    lora_dropout: float = flag(0.0, "dropout before lora_A")
    lora_target_modules: str = flag("all-linear", "comma-separated module names, or all-linear")
    seed: int = flag(0, "decides initialization, data order and dropout")
    resume: bool = flag(False, "continue from the newest sound checkpoint in --output_dir")
    impl: Literal["auto", "triton", "reference"] = flag("auto", "which implementation of DoRA runs")

    def check(self) -> None:
        """Raise FileNotFoundError or ValueError, naming the flag, if a value cannot work."""
        for name in ("batch_size", "gradient_accumulation_steps", "num_epochs", "cutoff_len"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`--{name}` should be a positive integer value but the value passed is {value}")
        for name in ("max_steps", "eval_step", "save_step", "seed"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"`--{name}` should be 0 or more but the value passed is {value}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ValueError(f"`--learning_rate` should be 0 or more but the value passed is {self.learning_rate}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"`--warmup_ratio` should be in [0, 1] but the value passed is {self.warmup_ratio}")
        if not (Path(self.base_model) / "config.json").is_file():
            raise FileNotFoundError(f"`--base_model` {self.base_model} is not a folder with a config.json")
        if not Path(self.data_path).exists():
            raise FileNotFoundError(f"`--data_path` {self.data_path} does not exist")
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            raise ValueError(f"`--output_dir` {self.output_dir} is not a folder")
        _ = self.dora  # checks its own fields

    @property
    def is_demo(self) -> bool:
        """Whether the embedded model learns the embedded task, so that we know how good it must get."""
        return Path(self.base_model) == demo.BASE and Path(self.data_path) == demo.DATA

    @property
    def dora(self) -> dk.DoraConfig:
        """The part that the engine reads."""
        names = [name.strip() for name in self.lora_target_modules.split(",")]
        return dk.DoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules="all-linear" if names == ["all-linear"] else names,
            impl=self.impl,
        )

    @property
    def loop(self) -> LoopSettings:
        """The part that the training loop reads."""
        return LoopSettings(
            batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            num_epochs=self.num_epochs,
            max_steps=self.max_steps,
            learning_rate=self.learning_rate,
            warmup_ratio=self.warmup_ratio,
            eval_step=self.eval_step,
            save_step=self.save_step,
            seed=self.seed,
        )
