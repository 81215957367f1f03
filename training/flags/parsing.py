"""From command-line words and a YAML file to `Flags`. A mistake is answered by one sentence, last and alone."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from .. import demo
from ..command_line import OneSentence, expand_home
from ..spelling import spelled
from .flags import Flags
from .groups import GROUPS
from .trainer_fields import config_fields, suggestion

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
    *("resume", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "impl", "fuse_blocks", "config"),
    *("use_rslora", "dropout_mode", "exclude_modules", "rank_pattern", "alpha_pattern", "space", "rounding"),
    *("merge_aware", "keep_weights"),
}
# What --init_adapter's own adapter_config.json says.
DECIDED_BY_ADAPTER = {"lora_r", "lora_alpha", "lora_target_modules", "use_rslora", "exclude_modules"} | {
    *("modules_to_save", "rank_pattern", "alpha_pattern", "lora_target_parameters", "expert_rank", "merge_aware")
}
# Names of other programs for what is no flag here.
ELSEWHERE = {
    "resume_from_checkpoint": "--resume continues from the newest checkpoint in --output_dir",
    "bf16": "the base is in bf16 where the GPU computes in it: leave it out",
    "fp16": "the base is in bf16 where the GPU computes in it: leave it out",
    "load_in_8bit": "--quantize loads the base in 4 bits",
    "peft_type": "--no_use_dora trains plain LoRA",
    "lora_bias": "biases are not trained: leave it out",
    "do_train": "leave it out",
    "do_eval": "--val_set_size and --eval_step decide what is evaluated",
}
SECTION = "trainer"
"""The part of the YAML file that holds fields of TRL's configuration."""


class Parser(OneSentence):
    """Flags in groups."""

    def __init__(self):
        super().__init__(
            GROUPS,
            prog=spelled(),
            usage="%(prog)s --base_model MODEL --data_path DATA [flags]",
            description="Fine-tunes with DoRA. With neither --base_model nor --data_path: the embedded demo.",
            formatter_class=OneSpelling,
            allow_abbrev=False,
        )
        self.names = {
            option.lstrip("-").replace("-", "_"): action.dest for option, action in self._option_string_actions.items()
        }

    def flag_of(self, word: str) -> str | None:
        """The flag that a command-line word names; None for a value."""
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        return self.names.get(name) if word.startswith("--") else None

    def unknown(self, name: str) -> str:
        """What to write in place of a flag that there is not; empty if nobody knows."""
        name = name.lstrip("-").partition("=")[0].replace("-", "_")
        if name in ELSEWHERE:
            return f"; {ELSEWHERE[name]}"
        if name in config_fields():
            return f"; it is a field of TRL's configuration: --set {name}=VALUE"
        return suggestion(name, self.names, "--")


class OneSpelling(argparse.ArgumentDefaultsHelpFormatter):
    """Names each flag once, without its other spellings."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        first = action.option_strings[0]
        takes = "" if action.nargs in (0, "?") else f" {self._format_args(action, action.type.__name__.upper())}"
        if action.choices:
            takes = f" {{{','.join(action.choices)}}}"
        return first + takes

    def _get_help_string(self, action: argparse.Action) -> str:
        # An empty default is the absence of a value, which the text explains.
        shown = action.default not in ("", None, False, []) and action.nargs != 0
        return super()._get_help_string(action) if shown else action.help


def parse_flags(arguments: Sequence[str]) -> tuple[Flags, bool]:
    """The flags, and whether they mean the demo. Exits with a sentence on bad words."""
    parser = Parser()
    own, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{parser.unknown(unknown[0])}")
    try:
        arguments = [*(yaml_arguments(Path(own.config).expanduser(), parser) if own.config else []), *arguments]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    given = {parser.flag_of(text) for text in arguments} - {None, "help"}
    is_demo = not given & {"base_model", "data_path"}
    if is_demo:
        if unsupported := sorted(given - DEMO_FLAGS):
            parser.error(f"the demo has no --{unsupported[0]}: give --base_model and --data_path for a run of your own")
        arguments = [*_as_arguments(DEMO), *arguments]
    elif given & {"init_adapter"} and (redundant := given & DECIDED_BY_ADAPTER):
        parser.error(f"--{min(redundant)} is decided by --init_adapter's own adapter_config.json: leave it out")
    values = vars(parser.parse_args(list(arguments)))
    return replace(Flags(**values), **expand_home(values)), is_demo


def yaml_arguments(path: Path, parser: Parser) -> list[str]:
    """The words that a YAML file stands for.

    Raises:
        OSError, ValueError: it cannot be read, or holds what is no flag.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"`--config` {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"`--config` {path} should hold `flag: value` lines, got {type(values).__name__}")
    section = values.pop(SECTION, None)
    if section is not None and not isinstance(section, dict):
        raise ValueError(f"`--config` {path}: `{SECTION}` should hold `field: value` lines of TRL's configuration")
    for name in values:
        if parser.flag_of(f"--{name}") in (None, "config", "help"):
            raise ValueError(f"`--config` {path} has an unknown key {str(name)!r}{parser.unknown(str(name))}")
    settings = [
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in (section or {}).items()
    ]
    return [*_as_arguments(values), *(["--set", *settings] if settings else [])]


def _as_arguments(values: dict) -> list[str]:
    """Settings as command-line words, so that one parser reads both sources."""
    found = []
    for name, value in values.items():
        if name == "data_path" and isinstance(value, list):
            value = json.dumps(value, default=str)
        if isinstance(value, dict):
            value = ",".join(f"{key}={number}" for key, number in value.items())
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        found += [] if value is None else [f"--{name}={text}"]
    return found
