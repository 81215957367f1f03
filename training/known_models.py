"""The sizes of well-known models, as in their published config.json."""

from typing import NamedTuple


class ModelSizes(NamedTuple):
    """The sizes of a Llama-like decoder, by transformers' names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    attention_bias: bool = False  # biases of q, k and v, as Qwen2 has them


KNOWN_MODELS = {
    "llama-3-8b": ModelSizes(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": ModelSizes(8192, 28672, 80, 64, 8, 128256),
    "qwen2.5-7b": ModelSizes(3584, 18944, 28, 28, 4, 152064, attention_bias=True),
    "qwen2.5-32b": ModelSizes(5120, 27648, 64, 40, 8, 152064, attention_bias=True),
}
