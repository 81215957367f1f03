"""`python -m training.merge`: the checkpoint means what base and adapter mean together, or nothing is written."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

import dora_kernels as dk
from tests.support.adapter_folders import base_folder, load, our_adapter, pefts_adapter, printed_errors, updates
from tests.support.peft_models import dora_config, trained
from tests.support.tiny_models import FAMILIES, VOCAB, llama, logits
from tests.tolerances import MERGED_LOGITS
from training.exporting import Sources
from training.merge import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CASES = [
    ("llama", torch.float32, our_adapter, {"use_rslora": True}),
    ("llama", torch.bfloat16, pefts_adapter, {"rank_pattern": {"q_proj": 2}}),
    ("gpt2", torch.float32, pefts_adapter, {"task_type": "CAUSAL_LM"}),
    ("gpt2", torch.float16, our_adapter, {}),
    ("t5", torch.float32, our_adapter, {}),
    ("bert", torch.float32, pefts_adapter, {}),
]


def run(adapter, output, *flags):
    main(["--adapter", str(adapter), "--output_dir", str(output), *map(str, flags)])


@pytest.mark.parametrize(("family", "dtype", "write", "options"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_the_checkpoint_has_the_adapters_logits_and_the_bases_keys_and_dtypes(family, dtype, write, options, tmp_path):
    base = base_folder(tmp_path / "base", family, dtype)
    expected = logits(write(base, tmp_path / "adapter", family, dtype, **options))
    run(tmp_path / "adapter", tmp_path / "merged", "--base_model", base)
    actual = logits(load(tmp_path / "merged", family, "auto"))
    scale = expected.abs().max()
    # fp16 rounds 4 times finer than bf16.
    tolerance = MERGED_LOGITS.get(dtype, MERGED_LOGITS[torch.bfloat16] / 4) * scale
    assert (logits(load(base, family, dtype)) - expected).abs().max() > 5 * tolerance, "the adapter says something"
    assert (actual - expected).abs().max() <= tolerance
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    described = [{key: (value.shape, value.dtype) for key, value in tensors.items()} for tensors in (before, after)]
    assert described[0] == described[1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()


def test_what_a_causal_model_needs_is_there(tmp_path):
    base = base_folder(tmp_path / "base")
    our_adapter(base, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()  # an empty folder may be there
    run(tmp_path / "adapter", tmp_path / "merged")  # the adapter names its base
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), type(llama()))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("add")["input_ids"]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "merged"}, "no staging folder is left"


def test_the_adapters_own_tokenizer_wins(tmp_path):
    base = base_folder(tmp_path / "base")
    our_adapter(base, tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    (tmp_path / "adapter" / "chat_template.jinja").write_text("hello")
    (tmp_path / "adapter" / "metrics.jsonl").write_text("")
    run(tmp_path / "adapter", tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer_config.json").read_text() == '{"pad_token": "<pad>"}'
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "hello"
    assert not (tmp_path / "merged" / "metrics.jsonl").exists()


def tiny_llama_config():
    return llama().config


def tiny_vlm():
    text = tiny_llama_config().to_dict() | {"model_type": "qwen2"}
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "image_size": 8, "patch_size": 4, "projection_dim": 32,
    }  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=60, vision_feature_layer=-1)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


# The base as it is stored, the class that the adapter was trained in, and PEFT's task type for it.
CLASSES = {
    "vision-language": (tiny_vlm, AutoModelForImageTextToText, "CAUSAL_LM", {}),
    "sequence classification": (llama, AutoModelForSequenceClassification, "SEQ_CLS", {"num_labels": 3}),
    "two labels, the default": (llama, AutoModelForSequenceClassification, "SEQ_CLS", {}),
    "token classification": (FAMILIES["bert"], AutoModelForTokenClassification, "TOKEN_CLS", {"num_labels": 5}),
    "question answering": (FAMILIES["bert"], AutoModelForQuestionAnswering, "QUESTION_ANS", {}),
    "feature extraction": (llama, AutoModel, "FEATURE_EXTRACTION", {}),
    "no label": (llama, AutoModelForSequenceClassification, None, {"modules_to_save": ["score"]}),
}


def output(model):
    tokens = torch.arange(18).reshape(2, 9) * 7 % 53
    with torch.no_grad():
        return model.eval()(input_ids=tokens)[0]


@pytest.mark.parametrize(("make", "auto", "task", "options"), CLASSES.values(), ids=CLASSES)
def test_the_class_is_the_one_that_the_adapter_fits(make, auto, task, options, tmp_path):
    base = make()
    base.config.pad_token_id = 0
    base.save_pretrained(tmp_path / "base")
    labels = {name: value for name, value in options.items() if name == "num_labels"}
    saved = {name: value for name, value in options.items() if name == "modules_to_save"}
    torch.manual_seed(1)  # the head is new
    model = auto.from_pretrained(tmp_path / "base", **labels, ignore_mismatched_sizes=True)
    targets = r".*layers?\.\d+.*(q_proj|v_proj|query|value)"
    model = trained(peft.get_peft_model(model, dora_config(task_type=task, target_modules=targets, **saved)))
    model.save_pretrained(tmp_path / "adapter")
    run(tmp_path / "adapter", tmp_path / "merged", "--base_model", tmp_path / "base")
    merged = auto.from_pretrained(tmp_path / "merged")
    assert type(merged) is type(model.get_base_model())
    torch.testing.assert_close(output(merged), output(model), rtol=1e-4, atol=1e-6)
    with model.disable_adapter():
        assert (output(merged) - output(model)).abs().max() > 1e-4, "the adapter says something"


def test_a_head_that_nobody_stored_is_refused(tmp_path):
    base = base_folder(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, pad_token_id=0)
    our = dk.apply_dora(model, dk.DoraConfig(target_modules=["q_proj"], modules_to_save=[]))
    dk.save_adapter(our, tmp_path / "adapter")
    _edit(tmp_path / "adapter" / "adapter_config.json", task_type="SEQ_CLS")
    with pytest.raises(SystemExit, match=r"LlamaForSequenceClassification has score\.weight, which is neither in the"):
        run(tmp_path / "adapter", tmp_path / "merged", "--base_model", base)
    assert not (tmp_path / "merged").exists()


def test_a_vocabulary_that_grew_is_merged(tmp_path):
    base = base_folder(tmp_path / "base")
    model = load(base)
    model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    dk.apply_dora(model, dk.DoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    dk.save_adapter(model, tmp_path / "adapter")
    run(tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged.config.vocab_size == VOCAB + 6
    for ours, theirs in zip((merged.model.embed_tokens, merged.lm_head), (model.model.embed_tokens, model.lm_head)):
        assert torch.equal(ours.weight, theirs.weight)


def test_modules_to_save_and_a_tied_head_are_in_the_checkpoint(tmp_path):
    base = base_folder(tmp_path / "base", tied=True)
    model = our_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"], target_modules=["q_proj"])
    run(tmp_path / "adapter", tmp_path / "merged")
    assert torch.equal(load(tmp_path / "merged").lm_head.weight, model.lm_head.weight)
    expected = logits(model)
    error = (logits(load(tmp_path / "merged")) - expected).abs().max()
    assert error <= MERGED_LOGITS[torch.float32] * expected.abs().max()


def test_the_printed_error_is_the_roundings(tmp_path, capsys):
    base = base_folder(tmp_path / "base", dtype=torch.bfloat16)
    our_adapter(base, tmp_path / "adapter", dtype=torch.bfloat16)
    run(tmp_path / "adapter", tmp_path / "merged")
    printed = printed_errors(capsys.readouterr().out)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    squares = torch.zeros(2, dtype=torch.float64)
    found = updates(base, tmp_path / "adapter")
    assert printed.keys() == {*found, "total"}
    for path, (weight, update) in found.items():
        error = (stored[f"{path}.weight"].double() - weight - update).norm()
        # Three digits are printed.
        assert printed[path] == pytest.approx((error / update.norm()).item(), rel=6e-3)
        squares += torch.stack((error, update.norm())).square()
    assert printed["total"] == pytest.approx((squares[0] / squares[1]).sqrt().item(), rel=6e-3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    base_folder(folder / "base")
    our_adapter(folder / "base", folder / "adapter", target_modules=["q_proj"])
    return folder


def _edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _plain_lora(folder):
    _edit(folder / "adapter" / "adapter_config.json", use_dora=False)


def _nameless(folder):
    _edit(folder / "adapter" / "adapter_config.json", base_model_name_or_path=None)


def _absent_base(folder):
    shutil.rmtree(folder / "base")


def _unreadable_base(folder):
    (folder / "base" / "config.json").write_text("{")


def _quantised(folder):
    _edit(folder / "base" / "config.json", quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"})


def _weightless(folder):
    (folder / "adapter" / "adapter_model.safetensors").unlink()


def _there_already(folder):
    (folder / "merged").mkdir()
    (folder / "merged" / "precious").touch()


REFUSED = {
    "plain_lora": (_plain_lora, "says plain LoRA, but .* holds magnitudes"),
    "no_base_named": (_nameless, "names no base model: say which with --base_model"),
    "absent_base": (_absent_base, "should be a Hub id or a folder with config.json"),
    "unreadable_base": (_unreadable_base, "the base model .*base is neither here nor readable"),
    "quantised_base": (_quantised, "is quantised, and so would be the result"),
    "no_weights": (_weightless, "should be a folder with adapter_model.safetensors"),
    "overwriting": (_there_already, "merged exists already: choose another"),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_a_weight_is_read(damage, message, folders, tmp_path, monkeypatch):
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    _edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    monkeypatch.setattr(Sources, "load", lambda self: pytest.fail("the model was loaded"))
    damage(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=message) as error:
        run(tmp_path / "adapter", tmp_path / "merged")
    assert str(error.value).startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_a_name_is_no_place(folders, tmp_path, monkeypatch):
    """Such as the one that the command runs in: it cannot be replaced."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"`--output_dir` \. should end in the name of a folder"):
        run(folders / "adapter", ".", "--base_model", folders / "base")
    assert not any(tmp_path.iterdir())


def test_a_diverged_adapter_and_a_full_disk_leave_nothing(folders, tmp_path, monkeypatch):
    def full(self, folder):
        (folder / "config.json").touch()
        raise OSError("No space left on device")

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="No space left"):
        patched.setattr(PreTrainedModel, "save_pretrained", full)
        run(folders / "adapter", tmp_path / "merged")
    shutil.copytree(folders / "adapter", tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(SystemExit, match="holds NaN or infinity"):
        run(tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_another_base_than_the_adapters_is_refused(folders, tmp_path):
    llama(layers=1).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="does not fit the model"):
        run(folders / "adapter", tmp_path / "merged", "--base_model", tmp_path / "other")
    assert not (tmp_path / "merged").exists()


def test_pefts_own_merge_says_the_same(folders, tmp_path):
    run(folders / "adapter", tmp_path / "merged")
    pefts = peft.PeftModel.from_pretrained(load(folders / "base"), folders / "adapter").merge_and_unload()
    ours = load(tmp_path / "merged").state_dict()
    for name, value in pefts.state_dict().items():
        # fp32: both round a product of norms once or twice.
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-7)
