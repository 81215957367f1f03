"""`DoraConfig`: what to adapt and how.

Names and meanings are those of PEFT's `LoraConfig`. `lora_dropout` means the same with `dropout_mode="peft"`.
"""

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields

CHOICES = {
    "dropout_mode": ("lora", "peft"),
    "space": ("auto", "token", "weight"),
    "impl": ("auto", "triton", "reference"),
    "rounding": ("dithered", "nearest"),
    "expert_rank": ("full", "active"),
}


@dataclass
class DoraConfig:
    """The configuration of a DoRA adapter.

    Args:
        r: rank, at least 1.
        lora_alpha: the scaling is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
        lora_dropout: probability in [0, 1); what it acts on, see `dropout_mode`.
        target_modules: module names or their suffixes (a list), a regular expression that matches the whole name
            (a string), or "all-linear": every linear layer except the output embeddings (lm_head). Names may be those
            of embeddings and convolutions too. Empty where `target_parameters` alone are adapted.
        target_parameters: names or suffixes of fused 3-D parameters, the stacks of experts ("mlp.experts.down_proj").
        expert_rank: "full" gives each expert the rank `r`, "active" gives it `r` divided by the number of experts that
            a token goes to, rounded down. `lora_alpha` is not divided.
        exclude_modules: names or suffixes (a list) or a regular expression (a string) never to adapt.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        rank_pattern, alpha_pattern: `{name, suffix or regular expression: r or lora_alpha}` for layers that differ.
        modules_to_save: modules to train in full and to save with the adapter; never adapted. A classifier's head is
            added to them as in PEFT ("classifier", "score" or "qa_outputs"); an empty list says that it is not.
        dropout_mode: "lora" drops the input of the LoRA branch only (one base GEMM); "peft" is PEFT's meaning (two).
        space, impl, rounding: see `dora_linear`.
        nf4_parity: see `dora_linear`; of no effect on other bases.
        merge_aware: train what will be served. Each forward multiplies with W' quantised in the base's own format, its
            scales kept, as `export --to` that format writes it; over a dense base, rounded to its dtype. Gradients
            pass straight through. Linear layers in weight space: no dropout, no experts, no `nf4_parity`.
        fuse_blocks: "auto" computes a gated MLP, and layers of one input, by one function while they train, where the
            model's own does that; False computes each layer alone.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of its range.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None
    dropout_mode: str = "lora"
    space: str = "auto"
    impl: str = "auto"
    rounding: str = "dithered"
    nf4_parity: bool = False
    fuse_blocks: str | bool = "auto"
    target_parameters: list[str] | None = None
    expert_rank: str = "full"
    merge_aware: bool = False

    def __post_init__(self):
        check_rank("`r`", self.r)
        _check_alpha("`lora_alpha`", self.lora_alpha)
        if not _is_number(self.lora_dropout):
            raise TypeError(f"`lora_dropout` should be a number, got {self.lora_dropout!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` should be a probability in [0, 1), got {self.lora_dropout}")
        check_bools(use_rslora=self.use_rslora, nf4_parity=self.nf4_parity, merge_aware=self.merge_aware)
        check_blocks("fuse_blocks", self.fuse_blocks)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` should be one of {', '.join(choices)}, got {getattr(self, name)!r}")

        self.target_modules = _names("target_modules", self.target_modules, regex=True)
        self.target_parameters = _names("target_parameters", self.target_parameters, regex=False) or None
        if not self.target_modules and not (self.target_parameters and self.target_modules == []):
            raise ValueError('`target_modules` should name at least one module; "all-linear" takes every linear layer')
        if self.expert_rank != "full" and not self.target_parameters:
            raise ValueError(f'`expert_rank` should be "full" without `target_parameters`, got {self.expert_rank!r}')
        if self.merge_aware:
            self._check_merge_aware()
        self.exclude_modules = _names("exclude_modules", self.exclude_modules, regex=True)
        self.modules_to_save = _names("modules_to_save", self.modules_to_save, regex=False)
        self.rank_pattern = _pattern("rank_pattern", self.rank_pattern, check_rank)
        self.alpha_pattern = _pattern("alpha_pattern", self.alpha_pattern, _check_alpha)

    def _check_merge_aware(self) -> None:
        against = {
            "lora_dropout": self.lora_dropout > 0 and "drops the input of A and B, and the merged weight has none",
            "space": self.space == "token" and "has no merged weight in token space",
            "nf4_parity": self.nf4_parity and "rounds what is decoded, which no checkpoint in NF4 does",
            "target_parameters": self.target_parameters and "are experts, which no export quantises",
        }
        for name, reason in against.items():
            if reason:
                raise ValueError(f"`{name}` {reason}: leave it or `merge_aware` out")

    @classmethod
    def from_dict(cls, values: Mapping) -> "DoraConfig":
        """A config from a mapping, such as one read from disk.

        Raises:
            ValueError: a key that is no field; the message suggests the nearest one.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                short = {field.removeprefix("lora_"): field for field in known}  # "lora_r" is meant for "r"
                nearest = difflib.get_close_matches(str(name).removeprefix("lora_"), short, n=1)
                hint = f"did you mean `{short[nearest[0]]}`? " if nearest else ""
                raise ValueError(f"DoraConfig has no field {name!r}; {hint}The fields are: {', '.join(known)}")
        return cls(**values)


def check_bools(**values) -> None:
    """Raises TypeError for what is neither True nor False, by its name."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"`{name}` should be True or False, got {value!r}")


def check_rank(name: str, value) -> None:
    """Raises TypeError or ValueError for what is no rank, in PEFT's words."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} should be a positive integer value but the value passed is {value!r}")
    if value < 1:
        raise ValueError(f"{name} should be a positive integer value but the value passed is {value}")


def check_blocks(name: str, value) -> None:
    """Raises ValueError for what is neither "auto" nor False."""
    if value is not False and value != "auto":
        raise ValueError(f'`{name}` should be "auto" or False, got {value!r}')


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_alpha(name: str, value) -> None:
    if not _is_number(value):
        raise TypeError(f"{name} should be a positive number, got {value!r}")
    if not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} should be a positive number, got {value}")


def _names(field: str, value, *, regex: bool) -> list[str] | str | None:
    """`value` as a new list without repetitions or, where a regular expression is meant, the string."""
    if value is None:
        return None
    if isinstance(value, str):
        if not regex:
            raise TypeError(f'`{field}` should be a list of module names, got the string {value!r}; write ["{value}"]')
        _check_regex(field, value)
        return value
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in value):
        kinds = "a list of module names" + (" or a regular expression" if regex else "")
        raise TypeError(f"`{field}` should be {kinds}, got {value!r}")
    if "" in value:
        raise ValueError(f"`{field}` holds an empty name")
    if not regex:
        # PEFT reads these as regular expressions when it keeps adapters off them.
        for name in value:
            _check_regex(field, name)
    return sorted(value) if isinstance(value, (set, frozenset)) else list(dict.fromkeys(value))


def _pattern(field: str, value, check) -> dict | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"`{field}` should be a dict of module names to numbers, got {value!r}")
    for key, number in value.items():
        _check_regex(field, key)
        check(f"`{field}[{key!r}]`", number)
    return dict(value)


def _check_regex(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`{field}`: {pattern!r} is not a regular expression: {error}") from error
