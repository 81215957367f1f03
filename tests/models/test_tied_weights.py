"""Merging where weights are tied: what stays tied, what does not, and that files say so."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, BertForMaskedLM

from dora_kernels.models.merge import merge_dora, unmerge_dora
from dora_kernels.models.modules import dora_layers
from tests.support.merging import assert_close, trained
from tests.support.tiny_models import bert_config, llama, logits, t5


def reloaded(model, directory):
    model.save_pretrained(directory)
    return type(model).from_pretrained(directory).eval()


def test_merging_a_tied_head_leaves_the_embedding_alone_and_reloads_untied(tmp_path):
    model = trained(llama(tied=True), target_modules=["lm_head", "q_proj"])
    embedding = model.model.embed_tokens.weight
    bits, expected = embedding.detach().clone(), logits(model)
    with pytest.warns(UserWarning, match="lm_head.weight no longer tied after merging"):
        merge_dora(model, keep_base=True)
    assert model.model.embed_tokens.weight is embedding
    assert torch.equal(embedding, bits)
    assert model.lm_head.weight is not embedding
    assert model.config.tie_word_embeddings is False
    assert_close(logits(model), expected, torch.float32)
    for loaded in (reloaded(model, tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert torch.equal(logits(loaded), logits(model))
    # A caller that ties again by habit must not undo the merge either.
    model.tie_weights()
    assert_close(logits(model), expected, torch.float32)

    unmerge_dora(model)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is embedding
    assert torch.equal(logits(model), expected)


def test_merging_beside_tied_weights_keeps_them_tied(tmp_path, recwarn):
    model = merge_dora(trained(llama(tied=True)))
    assert not [warning for warning in recwarn if "tied" in str(warning.message)]
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(model))


@pytest.mark.filterwarnings("ignore:modules_to_save")
def test_a_head_trained_apart_reloads_untied(tmp_path):
    model = trained(llama(tied=True), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    with pytest.warns(UserWarning, match="no longer tied"):
        merge_dora(model)
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(model))


def test_a_tied_bias_is_saved_with_the_head_it_belongs_to(tmp_path):
    torch.manual_seed(0)
    model = BertForMaskedLM(bert_config()).eval()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    trained(model, target_modules=["decoder"])
    expected = logits(model)
    with pytest.warns(UserWarning, match="no longer tied"):
        merge_dora(model, keep_base=True)
    assert_close(logits(model), expected, torch.float32)
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(model))
    unmerge_dora(model)
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    assert torch.equal(logits(model), expected)


def test_partners_that_stay_equal_are_saved_and_tied_again(tmp_path):
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=61,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=32,
    )
    model = trained(BartForConditionalGeneration(config).eval(), target_modules=["lm_head"])
    expected, ties = logits(model), dict(model.all_tied_weights_keys)
    with pytest.warns(UserWarning, match="no longer tied"):
        merge_dora(model, keep_base=True)
    assert_close(logits(model), expected, torch.float32)
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(model))
    unmerge_dora(model)
    assert model.all_tied_weights_keys == ties
    for target, source in ties.items():
        assert model.get_parameter(target) is model.get_parameter(source), target
    assert torch.equal(logits(model), expected)


def test_a_config_that_cannot_say_untied_refuses_the_merge():
    model = trained(t5(), target_modules=["lm_head", "q"])
    count, expected = len(dora_layers(model)), logits(model)
    with pytest.raises(ValueError, match=r"lm_head\.weight.*T5Config cannot describe"):
        merge_dora(model)
    assert len(dora_layers(model)) == count
    assert torch.equal(logits(model), expected)
    merge_dora(trained(t5(), target_modules=["q"]))
