"""`DoraConfig`: every bad value is refused with a sentence, and the fields are PEFT's."""

import inspect
from dataclasses import asdict, fields, replace

import peft
import pytest
import torch
from torch import nn

import dora_kernels as dk
from dora_kernels.config import DoraConfig

OURS_ALONE = {"dropout_mode", "space", "impl", "rounding", "nf4_parity", "fuse_blocks", "expert_rank"}
OURS_ALONE |= {"merge_aware"}


def test_every_field_is_pefts_or_the_engines_own():
    pefts = inspect.signature(peft.LoraConfig).parameters
    names = {field.name for field in fields(DoraConfig)}
    assert names - OURS_ALONE <= set(pefts)
    assert names >= OURS_ALONE


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("r", 0, ValueError, "`r` should be a positive integer value but the value passed is 0"),
        ("r", -3, ValueError, "positive integer"),
        ("r", 8.0, TypeError, "positive integer"),
        ("r", True, TypeError, "positive integer"),
        ("lora_alpha", 0, ValueError, "positive number"),
        ("lora_alpha", float("nan"), ValueError, "positive number"),
        ("lora_alpha", float("inf"), ValueError, "positive number"),
        ("lora_alpha", 10**400, ValueError, "positive number"),
        ("lora_alpha", "16", TypeError, "positive number"),
        ("lora_dropout", 1.0, ValueError, r"\[0, 1\)"),
        ("lora_dropout", -0.1, ValueError, r"\[0, 1\)"),
        ("lora_dropout", float("nan"), ValueError, r"\[0, 1\)"),
        ("lora_dropout", None, TypeError, "number"),
        ("use_rslora", 1, TypeError, "True or False"),
        ("target_modules", [], ValueError, "at least one module"),
        ("target_modules", "", ValueError, "at least one module"),
        ("target_modules", None, ValueError, "at least one module"),
        ("target_modules", [""], ValueError, "empty name"),
        ("target_modules", ["q_proj", 3], TypeError, "list of module names or a regular expression"),
        ("target_modules", "(q_proj", ValueError, "not a regular expression"),
        ("exclude_modules", {"a": 1}, TypeError, "list of module names"),
        ("modules_to_save", "classifier", TypeError, r'write \["classifier"\]'),
        ("modules_to_save", ["a)"], ValueError, "not a regular expression"),
        ("rank_pattern", {"q_proj": 0}, ValueError, r"`rank_pattern\['q_proj'\]` should be a positive integer"),
        ("rank_pattern", ["q_proj"], TypeError, "dict"),
        ("rank_pattern", {"(": 4}, ValueError, "not a regular expression"),
        ("alpha_pattern", {"q_proj": -1}, ValueError, "positive number"),
        ("dropout_mode", "input", ValueError, "one of lora, peft, got 'input'"),
        ("space", "merge", ValueError, "one of auto, token, weight"),
        ("impl", "cuda", ValueError, "one of auto, triton, reference"),
        ("rounding", "stochastic", ValueError, "one of dithered, nearest"),
        ("space", [], ValueError, "one of auto"),
        ("expert_rank", "top", ValueError, "one of full, active"),
        ("expert_rank", "active", ValueError, '"full" without `target_parameters`'),
        ("nf4_parity", "yes", TypeError, "`nf4_parity` should be True or False"),
        ("merge_aware", "fp8", TypeError, "`merge_aware` should be True or False"),
    ],
    ids=lambda value: str(value)[:24] if not isinstance(value, type) else value.__name__,
)
def test_bad_value_is_refused(field, value, error, message):
    with pytest.raises(error, match=message):
        DoraConfig(**{field: value})
    # A field set after construction is caught where the config is used.
    config = DoraConfig()
    setattr(config, field, value)
    with pytest.raises(error, match=message):
        replace(config)


def test_unknown_field_suggests_the_nearest():
    with pytest.raises(ValueError, match="no field 'lora_aplha'; did you mean `lora_alpha`"):
        DoraConfig.from_dict({"r": 4, "lora_aplha": 8})
    with pytest.raises(ValueError, match="no field 'lora_r'; did you mean `r`"):
        DoraConfig.from_dict({"lora_r": 8})
    with pytest.raises(ValueError, match="no field 'dropout'; did you mean `lora_dropout`"):
        DoraConfig.from_dict({"dropout": 0.1})
    with pytest.raises(ValueError, match="no field 'zzz'; The fields are: r, lora_alpha"):
        DoraConfig.from_dict({"zzz": 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        DoraConfig(rank=4)


def test_from_dict_is_the_inverse_of_asdict():
    config = DoraConfig(r=3, target_modules=["q_proj"], rank_pattern={"q_proj": 7}, lora_dropout=0.1)
    assert DoraConfig.from_dict(asdict(config)) == config


def test_the_lists_are_the_configs_own():
    names = ["q_proj"]
    config = DoraConfig(target_modules=names)
    names.append("v_proj")
    assert config.target_modules == ["q_proj"]
    assert DoraConfig(target_modules={"b", "a"}).target_modules == ["a", "b"]
    assert DoraConfig(target_modules=("b", "a", "b")).target_modules == ["b", "a"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_dropout": 0.1}, "`lora_dropout` drops the input of A and B"),
        ({"space": "token"}, "`space` has no merged weight in token space"),
        ({"nf4_parity": True}, "`nf4_parity` rounds what is decoded"),
        ({"target_modules": [], "target_parameters": ["down_proj"]}, "`target_parameters` are experts"),
    ],
    ids=["dropout", "space", "parity", "experts"],
)
def test_what_has_no_merged_weight_to_quantise_is_refused(fields, message):
    with pytest.raises(ValueError, match=f"{message}.*: leave it or `merge_aware` out"):
        DoraConfig(**fields, merge_aware=True)
    assert DoraConfig(space="weight", merge_aware=True).merge_aware


def _call_linear(**flags):
    dk.dora_linear(
        torch.ones(1, 2), torch.ones(2, 2), torch.ones(1, 2), torch.ones(2, 1), torch.ones(2), scaling=1, **flags
    )


def _scope(scope):
    def enter(**flags):
        with scope(**flags):
            pass

    return enter


LINEAR, ADAPTER = nn.Linear(2, 2), {"r": 1, "lora_alpha": 1}
# By what is called: how, and its flags that the signature has for itself or in its `**adapter`.
FLAGS = {
    dk.dora_linear: (_call_linear, {"training", "nf4_parity", "merge_aware"}),
    dk.DoraConfig: (dk.DoraConfig, {"use_rslora", "nf4_parity", "merge_aware"}),
    dk.DoraLinear: (
        lambda **flags: dk.DoraLinear(LINEAR.weight, **ADAPTER, **flags),
        {"fan_in_fan_out", "nf4_parity", "merge_aware", "use_rslora"},
    ),
    dk.DoraLinear.from_linear: (
        lambda **flags: dk.DoraLinear.from_linear(LINEAR, **ADAPTER, **flags),
        {"nf4_parity", "merge_aware", "use_rslora"},
    ),
    dk.DoraConv: (lambda **flags: dk.DoraConv(nn.Conv1d(2, 2, 1), **ADAPTER, **flags), {"use_rslora"}),
    dk.DoraEmbedding: (lambda **flags: dk.DoraEmbedding(nn.Embedding(2, 2), **ADAPTER, **flags), {"use_rslora"}),
    dk.accumulating: (_scope(lambda **flags: dk.accumulating(LINEAR, **flags)), {"keep_weights"}),
    dk.AccumulatingCallback: (dk.AccumulatingCallback, {"keep_weights"}),
    dk.DoraKernelsCallback: (dk.DoraKernelsCallback, {"keep_weights", "nf4_parity"}),
    dk.merge_dora: (lambda **flags: dk.merge_dora(LINEAR, **flags), {"keep_base"}),
    dk.save_adapter: (lambda **flags: dk.save_adapter(LINEAR, "nowhere", **flags), {"scales"}),
    dk.patch_peft: (lambda **flags: dk.patch_peft(LINEAR, **flags), {"nf4_parity"}),
    dk.patched_peft: (_scope(dk.patched_peft), {"nf4_parity"}),
}


@pytest.mark.parametrize("value", [1, "yes", None], ids=repr)
@pytest.mark.parametrize("function", FLAGS, ids=lambda function: function.__qualname__)
def test_a_flag_that_is_no_bool_is_refused(function, value):
    call, flags = FLAGS[function]
    for flag in flags:
        with pytest.raises(TypeError, match=f"`{flag}` should be True or False, got {value!r}"):
            call(**{flag: value})


def test_no_public_flag_is_left_out():
    for function in (getattr(dk, name) for name in dk.__all__):
        if callable(function):
            parameters = inspect.signature(function).parameters.values()
            flags = {parameter.name for parameter in parameters if parameter.annotation is bool}
            assert flags <= FLAGS.get(function, (None, set()))[1], function
