"""Tiny mixtures of experts, each with another layout or router, in fp64."""

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB, EXPERTS = 61, 4
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES = {
    "Mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": EXPERTS}),
    "Qwen3-MoE": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8},
    ),
    "OLMoE": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": EXPERTS, "num_experts_per_tok": 2}),
    "DeepSeek-V3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 1}
        | {"num_key_value_heads": 2, **LATENT},
    ),
    "gpt-oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
    ),
}
ROUTED = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
OTHERS = {
    "Qwen2-MoE": (Qwen2MoeForCausalLM, Qwen2MoeConfig, ROUTED | {"shared_expert_intermediate_size": 8}),
    "Qwen3.5-MoE": (
        Qwen3_5MoeForCausalLM,
        Qwen3_5MoeTextConfig,
        ROUTED | {"shared_expert_intermediate_size": 8, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    ),
    "GLM-4.5": (
        Glm4MoeForCausalLM,
        Glm4MoeConfig,
        {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}
        | {"first_k_dense_replace": 1},
    ),
}
"""Further models whose experts go through the registry, in layouts that `FAMILIES` has, too."""
BATCH = torch.arange(18).reshape(2, 9) * 7 % VOCAB


def tiny_experts(name, dtype=torch.float64, **others):
    """The same weights on every call. PyTorch's grouped product has no fp64: transformers' own loop runs there."""
    cls, config, sizes = (FAMILIES | OTHERS)[name]
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = cls(config(**SIZES | sizes | others))
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than transformers starts them, so that routes differ and adapters matter.
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    torch.random.set_rng_state(state)
    model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def losses(model, forward=None):
    """Of the fixed batch."""
    return (forward or model)(input_ids=BATCH, labels=BATCH).loss
