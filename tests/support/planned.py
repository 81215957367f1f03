"""Configs of models whose steps are planned and counted."""

from transformers import Gemma3TextConfig, GPT2Config, GPTNeoXConfig, MixtralConfig, Phi3Config

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
OTHERS = {
    # Two kinds of layers, of which the rarer stands in the middle; norms before and after, and normalised heads.
    "gemma3": Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=32,
    ),
    "phi3": Phi3Config(**SIZES, pad_token_id=0),  # q, k and v are one layer, gate and up another
    "gpt_neox": GPTNeoXConfig(**SIZES),  # biases, and attention beside the MLP
    # Conv1D, and dropout; attention's is off, with which a CPU keeps the scores.
    "gpt2": GPT2Config(vocab_size=160, n_embd=64, n_layer=3, n_head=4, attn_pdrop=0.0),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
}
FORMAT_SIZES = {"hidden_size": 128, "intermediate_size": 256}
"""Which groups of 128 and of 32 divide."""
RANK = 2  # small beside the features, as in a real model: what is of the rank's size is not planned
