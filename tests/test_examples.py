"""The programs of examples/ train the embedded model, and are short."""

import itertools
import json
import runpy
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support.doc_blocks import ROOT
from tests.support.tiny_experts import tiny_experts

REAL, TINY = "Qwen/Qwen3-0.6B", str(ROOT / "training/demo/base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few rows of the demo's."""
    folder = tmp_path_factory.mktemp("data")
    with (ROOT / "training/demo/data/train.jsonl").open(encoding="utf-8") as rows:
        (folder / "train.jsonl").write_text("".join(line for line, _ in zip(rows, range(8))), encoding="utf-8")
    return folder


def run_example(file, monkeypatch, **flags):
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    monkeypatch.setattr("sys.argv", [file, *words])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runpy.run_path(str(ROOT / "examples" / file), run_name="__main__")


TRAINED = ["plain_model.py", "peft_trainer.py", "trl_sft.py", "qdora.py"]


@pytest.mark.parametrize("file", TRAINED)
def test_an_example_trains(file, data, tmp_path, monkeypatch, capsys):
    """Two steps; the adapter that it leaves is merged by the example that merges."""
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    run_example(file, monkeypatch, model=TINY, data=data, steps=2, output=adapter)
    assert "left to PEFT" not in capsys.readouterr().out
    run_example("merge_for_serving.py", monkeypatch, model=TINY, adapter=adapter, output=merged)
    assert f"vllm serve {merged}" in capsys.readouterr().out
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (TINY, merged))
    changed = {key for key in before if not before[key].float().equal(after[key].float())}
    assert changed and all("_proj.weight" in key for key in changed)


def test_the_example_of_preferences_trains(data, tmp_path, monkeypatch, capsys):
    pairs, adapter, merged = tmp_path / "pairs", tmp_path / "adapter", tmp_path / "merged"
    pairs.mkdir()
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    better = [{"prompt": row["prompt"], "chosen": row["completion"]} for row in rows]
    worse = [row | {"rejected": other["chosen"]} for row, other in itertools.pairwise(better)]
    (pairs / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in worse), encoding="utf-8")
    run_example("trl_dpo.py", monkeypatch, model=TINY, data=pairs, steps=3, output=adapter)
    said = capsys.readouterr().out
    assert "14 layers: 14 fused" in said and "left to PEFT" not in said
    run_example("merge_for_serving.py", monkeypatch, model=TINY, adapter=adapter, output=merged)
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (TINY, merged))
    assert any(not before[key].float().equal(after[key].float()) for key in before)


def test_the_example_of_sentence_embeddings_trains(data, tmp_path, monkeypatch, capsys):
    package = pytest.importorskip("sentence_transformers", reason="the example needs sentence-transformers")
    output = tmp_path / "out"
    run_example("sentence_embeddings.py", monkeypatch, model=TINY, data=data, steps=2, output=output)
    assert "14 layers: 14 fused" in capsys.readouterr().out
    assert "lora_magnitude_vector" in " ".join(load_file(output / "adapter/adapter_model.safetensors"))
    merged, plain = (package.SentenceTransformer(str(folder)) for folder in (output / "merged", TINY))
    assert abs(merged.encode("a sentence") - plain.encode("a sentence")).max() > 1e-4
    assert not any("lora" in name for name, _ in merged.named_parameters())


REAL_MODELS = {"experts.py": "Qwen/Qwen3-30B-A3B", "sentence_embeddings.py": "Qwen/Qwen3-Embedding-0.6B"}


def test_examples_are_short_and_name_a_real_model():
    files = sorted((ROOT / "examples").glob("*.py"))
    assert {file.name for file in files} == {*TRAINED, *REAL_MODELS, "merge_for_serving.py", "trl_dpo.py"}
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") <= 30 and f'default="{REAL_MODELS.get(file.name, REAL)}"' in text


def test_the_example_of_experts_trains_them(data, tmp_path, monkeypatch):
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    AutoTokenizer.from_pretrained(TINY).save_pretrained(base)
    tiny_experts("Qwen3-MoE", torch.bfloat16, vocab_size=AutoConfig.from_pretrained(TINY).vocab_size).save_pretrained(
        base
    )
    run_example("experts.py", monkeypatch, model=base, data=data, steps=2, output=adapter)
    run_example("merge_for_serving.py", monkeypatch, model=base, adapter=adapter, output=merged)
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, merged))
    changed = {key for key in before if not before[key].equal(after[key])}
    assert {key.rpartition(".")[2] for key in changed if ".experts." in key} == {"gate_up_proj", "down_proj"}
