"""Tiny random models of every family that transformers builds from a config alone, and a batch that each takes."""

from typing import NamedTuple

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

KINDS = {
    "decoder": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "encoder": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "encoder-decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "vision": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "vision-language": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "speech": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES
    | modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES
    | modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
VOCABULARY = 320
TOO_LARGE = 40_000_000
"""Parameters: a config that stays larger is not shrunk by the names below, and would take minutes."""
SIZES = {
    1: "attn_layer_offset expert_layer_offset first_k_dense_replace n_group topk_group",
    2: "attn_layer_period expert_layer_period num_hidden_layers num_layers n_layer n_layers encoder_layers "
    "decoder_layers num_decoder_layers num_blocks depth num_key_value_heads num_kv_heads num_experts_per_tok moe_topk "
    "moe_top_k",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts",
    16: "rotary_dim head_dim qk_nope_head_dim v_head_dim qk_rope_head_dim",
    32: "q_lora_rank kv_lora_rank",
    64: "hidden_size d_model n_embd embed_dim hidden_dim dim encoder_hidden_size decoder_hidden_size "
    "attention_hidden_size",
    128: "intermediate_size d_ff n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size mlp_dim "
    "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size",
    VOCABULARY: "vocab_size",
}
LAYER_TYPES = ("layer_types", "mlp_layer_types", "block_types", "layers_block_type")
AT_MOST = {name: size for size, names in SIZES.items() for name in names.split()}


class Family(NamedTuple):
    """A tiny model in fp32 in eval mode, and the arguments of its forward."""

    model: transformers.PreTrainedModel
    batch: dict[str, torch.Tensor]


def names() -> list[str]:
    """`kind model_type` of everything that transformers has."""
    return [f"{kind} {family}" for kind, those in KINDS.items() for family in those if family in CONFIG_MAPPING_NAMES]


def shrink(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """The config with every size that has a known name at its least, its parts' too."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            shrink(value)
        elif name == "embed_dim" and isinstance(getattr(config, "num_heads", None), (list, tuple)):
            config.embed_dim = 8 * config.num_heads[0]
        elif name in AT_MOST and type(value) is int and value > AT_MOST[name]:
            setattr(config, name, AT_MOST[name])
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id") and type(value) is int and value >= VOCABULARY:
            setattr(config, name, 0)
        elif name in LAYER_TYPES and value is not None:
            kinds = list(dict.fromkeys(value))  # as many kinds as there are layers
            setattr(config, name, (kinds * 2)[: AT_MOST["num_hidden_layers"]])
        elif name == "rope_parameters" and "mrope_section" in (value or {}):
            sections = value["mrope_section"]
            value["mrope_section"] = [part * AT_MOST["head_dim"] // (2 * sum(sections)) for part in sections]
    if config.to_dict().get("per_layer_config"):
        raise ValueError("its layers have sizes of their own")
    if getattr(config, "kv_lora_rank", None):
        config.num_key_value_heads = config.num_attention_heads
    return config


def tiny(name: str) -> Family:
    """The family of that name, the same on every call. Whatever its classes raise, where they refuse the sizes."""
    kind, model_type = name.split()
    config = shrink(getattr(transformers, CONFIG_MAPPING_NAMES[model_type])())
    classes = KINDS[kind][model_type]
    model_class = getattr(transformers, classes if isinstance(classes, str) else classes[0])
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    if parameters > TOO_LARGE:
        raise ValueError(f"{name} has {parameters:,} parameters")
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    return Family(model, batch(model))


def batch(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Random input of the kind that the model names as its main one."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    tokens = torch.randint(3, 100, (2, 8), generator=generator)
    decoder = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
    if model.main_input_name == "input_ids":
        return {"input_ids": tokens, **decoder}
    if model.main_input_name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 64
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 4000, generator=generator)} | decoder
    if model.main_input_name == "input_features":
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_projection_input_dim", 80)
        shape = (2, bins, 2 * config.max_source_positions) if model.config.model_type == "whisper" else (2, 64, bins)
        return {"input_features": torch.randn(shape, generator=generator)} | decoder
    raise ValueError(f"{type(model).__name__} takes {model.main_input_name}, which is not made here")
