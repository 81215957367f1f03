"""The head of a classifier trains in full where PEFT trains it, and travels with the adapter, both ways."""

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertForQuestionAnswering,
    BertForTokenClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import dora_kernels as dk
from tests.support.tiny_models import VOCAB, bert, bert_config, llama, logits
from tests.tolerances import SAME_FP32


def seeded(cls, config):
    torch.manual_seed(0)
    return cls(config).eval()


def llama_classifier():
    config = llama().config
    config.num_labels, config.pad_token_id = 3, 0
    return seeded(LlamaForSequenceClassification, config)


def roberta():
    return seeded(RobertaForSequenceClassification, RobertaConfig(**bert_config().to_diff_dict()))


CLASSIFIERS = {
    "llama": (llama_classifier, "SEQ_CLS", ["score"]),
    "bert": (bert, "SEQ_CLS", ["classifier"]),
    # Its head holds two linear layers.
    "roberta": (roberta, "SEQ_CLS", ["classifier"]),
    "tokens": (lambda: seeded(BertForTokenClassification, bert_config()), "TOKEN_CLS", ["classifier"]),
    "answers": (lambda: seeded(BertForQuestionAnswering, bert_config()), "QUESTION_ANS", ["qa_outputs"]),
}
classifiers = pytest.mark.parametrize("make, task, head", CLASSIFIERS.values(), ids=CLASSIFIERS)


def targets(task):
    # For the other tasks PEFT's "all-linear" takes the head, and then refuses it.
    return "all-linear" if task == "SEQ_CLS" else ["query", "value"]


def lora(task):
    return peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=targets(task), task_type=task)


def pefts(make, task):
    torch.manual_seed(1)
    return peft.get_peft_model(make(), lora(task))


def stepped(model):
    """A step of training that moves all that trains. Returns the model."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    outputs = model.train()(input_ids=torch.arange(18).reshape(2, 9) * 5 % VOCAB, return_dict=True)
    # The answers of an extractive model are two tensors.
    found = outputs.logits if "logits" in outputs else outputs.start_logits - outputs.end_logits
    found.square().sum().backward()
    optimizer.step()
    return model.eval()


def answers(model):
    tokens = torch.arange(18).reshape(2, 9) * 7 % VOCAB
    with torch.no_grad():
        outputs = model(input_ids=tokens)
    return torch.cat([value.flatten() for name, value in outputs.items() if name.endswith("logits")])


def in_base(name):
    """A parameter's name in the base model, of PEFT's model or ours."""
    for part in ("base_model.model.", ".default", ".modules_to_save", ".weight", ".bias"):
        name = name.replace(part, "")
    return name.replace("lora_magnitude_vector", "magnitude")


@classifiers
def test_what_trains_is_what_peft_trains(make, task, head):
    model = dk.apply_dora(make(), dk.DoraConfig(r=2, target_modules=targets(task)))
    assert model.dora_config.modules_to_save == head
    ours, theirs = (
        {in_base(name) for name, parameter in each.named_parameters() if parameter.requires_grad}
        for each in (model, pefts(make, task))
    )
    assert ours == theirs and any(name.startswith(head[0]) for name in ours)


@classifiers
def test_ours_travel_to_peft(make, task, head, tmp_path):
    model = stepped(dk.apply_dora(make(), dk.DoraConfig(r=2, lora_alpha=4)))
    dk.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].task_type == task and type(loaded) is not peft.PeftModel
    assert any(head[0] in name and p.requires_grad for name, p in loaded.named_parameters())
    assert (answers(loaded.eval()) - answers(model)).abs().max() <= SAME_FP32 * answers(model).abs().max()
    assert not torch.allclose(answers(model), answers(make()), rtol=1e-2)


@classifiers
def test_pefts_fused_travel_to_ours(make, task, head, tmp_path):
    trained = pefts(make, task)
    report = dk.patch_peft(trained)
    stepped(trained).save_pretrained(tmp_path)
    loaded = dk.load_adapter(make(), tmp_path)
    assert loaded.dora_config.modules_to_save == head
    assert all(p.requires_grad for p in loaded.get_submodule(head[0]).parameters())
    assert (answers(loaded) - answers(trained)).abs().max() <= SAME_FP32 * answers(trained).abs().max()
    size = sum(p.numel() for p in make().get_submodule(head[0]).parameters())
    assert report.in_full == {f"base_model.model.{head[0]}": size}
    assert f"base_model.model.{head[0]}: trained in full, {size} parameters" in str(report).splitlines()


def test_pefts_step_is_ours():
    """Head, adapters and all: two sides of one run."""
    torch.manual_seed(1)
    ours = dk.apply_dora(llama_classifier(), dk.DoraConfig(r=2, lora_alpha=4))
    theirs = peft.get_peft_model(llama_classifier(), lora("SEQ_CLS"))
    for path, layer in ours.named_modules():
        if isinstance(layer, dk.DoraLinear):
            layer.lora_A.data.copy_(theirs.base_model.model.get_submodule(path).lora_A["default"].weight)
    for _ in range(3):
        stepped(ours)
        stepped(theirs)
    assert (logits(ours) - logits(theirs)).abs().max() <= 10 * SAME_FP32 * logits(theirs).abs().max()


def test_explain_says_what_trains_in_full():
    model = dk.apply_dora(bert(), dk.DoraConfig(r=2))
    explained = dk.explain(model, tokens=8)
    assert explained.in_full == {"classifier": 2 * 32 + 2}
    assert "classifier: trained in full, 66 parameters" in str(explained).splitlines()
    assert "trained in full" not in str(dk.explain(dk.apply_dora(llama(), dk.DoraConfig(r=2)), tokens=8))
    # Of a model of one's own nothing is frozen, or much is.
    own = nn.Sequential(dk.DoraLinear.from_linear(nn.Linear(4, 4), r=2, lora_alpha=4), nn.Linear(4, 3))
    assert dk.explain(own, tokens=8).in_full == {"1": 15}


def test_modules_of_ones_own_come_beside_the_head():
    model = dk.apply_dora(llama_classifier(), dk.DoraConfig(r=2, modules_to_save=["embed_tokens"]))
    assert model.dora_config.modules_to_save == ["embed_tokens", "score"]


def test_an_empty_list_leaves_the_head_to_its_adapter(tmp_path):
    model = dk.apply_dora(bert(), dk.DoraConfig(r=2, modules_to_save=[]))
    assert isinstance(model.classifier, dk.DoraLinear) and not dk.explain(model, tokens=8).in_full
    dk.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path)
    assert loaded.peft_config["default"].task_type is None
    # What is loaded is what was saved: no head is added to it.
    assert isinstance(dk.load_adapter(bert(), tmp_path).classifier, dk.DoraLinear)


def test_a_head_of_another_name_is_left_as_peft_leaves_it():
    config = BartConfig(
        vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    model = dk.apply_dora(BartForSequenceClassification(config), dk.DoraConfig(r=2))
    assert model.dora_config.modules_to_save is None
    assert isinstance(model.classification_head.dense, dk.DoraLinear)


def test_the_callers_config_stays():
    config = dk.DoraConfig(r=2)
    dk.apply_dora(bert(), config)
    assert config.modules_to_save is None
