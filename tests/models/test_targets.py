"""Target matching, held against PEFT's own functions."""

import re
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from dora_kernels import apply_dora
from dora_kernels.config import DoraConfig
from dora_kernels.models.targets import find_saved, find_targets, is_excluded, matches, rank_and_alpha
from tests.support.tiny_models import FAMILIES, llama, t5

parts = st.sampled_from(
    ["model", "layers", "0", "1", "12", "attn", "q_proj", "v_proj", "xq_proj", "head", "score", "a_b"]
)
names = st.lists(parts, min_size=1, max_size=5).map(".".join)
regexes = st.sampled_from(
    [
        ".*",
        r".*\.q_proj",
        "q_proj",
        r"model\.layers\.\d+\..*",
        "(.*head|score)",
        r".*[qv]_proj",
        "model",
        "all",
        "x?q_proj",
    ]
)
entries = st.lists(names | parts, min_size=1, max_size=3)
patterns = st.dictionaries(names | regexes, st.integers(1, 64), max_size=3)


@settings(max_examples=600)
@given(name=names, targets=entries | regexes, exclude=st.none() | entries | regexes, saved=st.none() | entries)
def test_a_name_is_targeted_exactly_where_peft_targets_it(name, targets, exclude, saved):
    fields = {"target_modules": targets, "exclude_modules": exclude, "modules_to_save": saved}
    pefts = check_target_module_exists(peft.LoraConfig(**fields), name)
    config = DoraConfig(**fields)
    # The two questions that `find_targets` asks of each module.
    assert (matches(config.target_modules, name) and not is_excluded(config, name)) == bool(pefts)


@settings(max_examples=300)
@given(name=names, ranks=patterns, alphas=patterns)
def test_rank_and_alpha_patterns_are_pefts(name, ranks, alphas):
    config = DoraConfig(r=5, lora_alpha=7, rank_pattern=ranks, alpha_pattern=alphas)
    pefts = ranks.get(get_pattern_key(ranks, name), 5), alphas.get(get_pattern_key(alphas, name), 7)
    assert rank_and_alpha(config, name) == pefts


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_pefts_set_without_the_head(family):
    model = FAMILIES[family]()
    pefts = _maybe_include_all_linear_layers(peft.LoraConfig(target_modules="all-linear"), model).target_modules
    ours = find_targets(model, DoraConfig(target_modules="all-linear"))
    assert set(ours) == pefts
    assert "lm_head" not in ours
    assert list(ours) == list(find_targets(model, DoraConfig(target_modules="ALL-linear")))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {
            "target_modules": ["layers.0.self_attn.q_proj", "down_proj"],
            "exclude_modules": ["model.layers.1.mlp.down_proj"],
        },
        {"target_modules": r".*\.[01]\..*_proj", "exclude_modules": r".*mlp.*"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
        {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["suffixes", "paths", "regex", "all-linear", "modules_to_save", "head by name"],
)
def test_the_layers_are_those_that_peft_patches(fields):
    patched = peft.get_peft_model(llama(), peft.LoraConfig(use_dora=True, **fields))
    assert list(find_targets(llama(), DoraConfig(**fields))) == patched.base_model.targeted_module_names


@pytest.mark.parametrize("saved", [["lm_head"], ["head"], ["layers.0.mlp", "norm"], ["mlp", "down_proj"]], ids=str)
def test_modules_to_save_are_those_that_peft_saves(saved):
    fields = {"target_modules": ["q_proj"], "modules_to_save": saved}
    patched = peft.get_peft_model(llama(), peft.LoraConfig(use_dora=True, **fields))
    wrapped = {
        name.removeprefix("base_model.model.")
        for name, module in patched.named_modules()
        if isinstance(module, peft.utils.ModulesToSaveWrapper)
    }
    outermost = {name for name in wrapped if not any(name.startswith(f"{other}.") for other in wrapped)}
    assert set(find_saved(llama(), DoraConfig(**fields))) == outermost


def test_nothing_matches_names_what_there_is():
    with pytest.raises(ValueError, match=r"Target modules \['nope'\] not found.*down_proj, gate_proj, k_proj, lm_head"):
        find_targets(llama(), DoraConfig(target_modules=["nope"]))
    with pytest.raises(ValueError, match="Target modules q_proj not found"):
        find_targets(llama(), DoraConfig(target_modules="q_proj"))  # a regular expression matches the whole path
    with pytest.raises(ValueError, match="it has none"):
        find_targets(nn.Sequential(nn.ReLU()), DoraConfig())


def test_one_entry_that_matches_nothing_is_an_error_of_its_own():
    with pytest.raises(ValueError, match=re.escape("Target modules ['v_porj'] not found")):
        find_targets(llama(), DoraConfig(target_modules=["q_proj", "v_porj"]))


def test_of_an_adapter_of_another_model_only_some_targets_are_named():
    absent = [f"model.layers.{layer}.attn.{name}" for layer in range(40) for name in ("c_attn", "c_proj")]
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.attn\.c_attn', .*, and 75 more\] not found") as raised:
        find_targets(llama(), DoraConfig(target_modules=absent))
    assert len(str(raised.value)) < 500


def test_everything_excluded_says_so():
    with pytest.raises(ValueError, match="All modules were excluded"):
        find_targets(llama(), DoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("exclude", "idle"),
    [
        (["down_porj", "v_proj", "lm_head"], "['down_porj']"),
        ("down_proj", "['down_proj']"),  # a regular expression matches the whole path
        (["down_proj", "lm_head"], None),
        (".*down_proj", None),
    ],
)
def test_an_exclusion_that_matches_nothing_is_said(exclude, idle):
    config = DoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], exclude_modules=exclude)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        apply_dora(llama(), config)
    said = [str(warning.message) for warning in caught if "`exclude_modules`" in str(warning.message)]
    assert said == ([f"`exclude_modules` {idle} matches no module of the model: it excludes nothing"] if idle else [])
    assert all(warning.filename == __file__ for warning in caught)


def test_a_model_without_transformers_needs_no_head():
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)}))
    assert list(find_targets(model, DoraConfig())) == ["0", "1.fc"]


def test_t5_encoder_and_decoder_are_matched_alike():
    targets = find_targets(t5(), DoraConfig(target_modules=["q", "wo"]))
    assert len(targets) == 2 * (1 + 1) + 2 * (2 + 1)
    assert all(isinstance(module, nn.Linear) for module in targets.values())
    assert all(isinstance(module.weight, torch.Tensor) for module in targets.values())
