"""The base model and its tokenizer, as a run needs them."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import dora_kernels as dk
from dora_kernels.models.targets import find_targets


def load_tokenizer(path: str, trust_remote_code: bool = False) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer with an end-of-text token and a pad token, and what had to be supplied.

    Raises ValueError if it cannot be loaded or has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"`--base_model` {path} is neither here nor readable from the hub: {error}") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no end-of-text token, so no answer could end")
    said = []
    if tokenizer.pad_token_id is None:
        said.append(f"the tokenizer has no pad token: {tokenizer.eos_token} pads, and is still learned as end of text")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, said


def load_model(
    path: str, device: torch.device, *, quantize: bool = False, stay: bool = False, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The base model in bf16 where the card has it and in fp32 elsewhere, or in NF4 with `quantize`.

    It is on `device`; with `stay` it is left on the CPU.
    """
    dtype = compute_dtype(device)
    options: dict = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if quantize:
        from transformers import BitsAndBytesConfig  # imports bitsandbytes, which has things to say

        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if device.type == "cuda" else dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    # A cache of keys and values is for generating; beside checkpointed activations it is also in the way.
    model.config.use_cache = False
    return model if quantize or stay else model.to(device)


def check_targets(path: str, config: dk.DoraConfig, trust_remote_code: bool = False) -> None:
    """Raise ValueError if `config` names a module that the model does not have, before its weights are read."""
    options = {"trust_remote_code": trust_remote_code}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, **options), **options)
    find_targets(model, config)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware computes in it, else fp32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32
