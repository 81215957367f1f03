"""Tiny Hugging Face models of the four families the engine is held against, inputs for them, and a before and after."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB = 61


def checkpoint_activations(model, **options):
    """Activation checkpointing, by the name that the installed transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options or None)


def llama(dtype=torch.float32, *, tied=False, layers=2):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return _make(LlamaForCausalLM, config, dtype)


def gpt2(dtype=torch.float32):
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return _make(GPT2LMHeadModel, config, dtype)


def bert(dtype=torch.float32):
    return _make(BertForSequenceClassification, bert_config(), dtype)


def bert_config():
    return BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
    )


def t5(dtype=torch.float32):
    config = T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return _make(T5ForConditionalGeneration, config, dtype)


FAMILIES = {"llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5}


def logits(model):
    """The logits of a fixed batch, fp32, without a graph."""
    tokens = torch.arange(18).reshape(2, 9) * 7 % VOCAB
    arguments = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = tokens[:, :5]
    with torch.no_grad():
        return model(**arguments).logits.float()


def snapshot(model):
    """What a refused call must leave alone: the modules, the parameter objects, their values and what trains."""
    modules = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    return modules, parameters, set(vars(model))


def assert_unchanged(model, before):
    modules, parameters, attributes = snapshot(model)
    assert modules == before[0]
    assert attributes == before[2]
    assert parameters.keys() == before[1].keys()
    for name, (identity, trains, value) in parameters.items():
        assert (identity, trains) == before[1][name][:2], name
        assert value.is_meta or torch.equal(value, before[1][name][2]), name


def _make(cls, config, dtype):
    """The same weights on every call, in eval mode, biases included (transformers starts them at zero)."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.05)
    torch.random.set_rng_state(state)
    return model.to(dtype).eval()
