"""Loads the base model and its tokenizer."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import dora_kernels as dk
from dora_kernels.models.expert_targets import check_parameters
from dora_kernels.models.modules import listed
from dora_kernels.models.targets import check_patterns, find_targets


def load_tokenizer(path: str, trust_remote_code: bool = False) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer, with an end-of-text token and a pad token, and notes for the user about what was added.

    Raises:
        ValueError: it cannot be loaded, or has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"`--base_model` {path} is neither here nor readable from the hub: {error}") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no end-of-text token, so no answer could end")
    notes = []
    if tokenizer.pad_token_id is None:
        notes.append(f"the tokenizer has no pad token: {tokenizer.eos_token} pads, and is still learned as end of text")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, notes


def nf4_config(dtype: torch.dtype):
    """How `--quantize` makes NF4 of a base, which then computes in `dtype`."""
    from transformers import BitsAndBytesConfig  # importing it at the top would import bitsandbytes, which prints

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_model(
    path: str,
    device: torch.device,
    *,
    quantize: bool = False,
    keep_on_cpu: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The base model in `compute_dtype(device)`, or in NF4 with `quantize`.

    It is on `device`, or with `keep_on_cpu` on the CPU.

    Raises:
        ValueError: the checkpoint lacks some of the weights, which transformers would draw at random.
    """
    dtype = compute_dtype(device)
    options: dict = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if quantize:
        options["device_map"] = {"": device}
        options["quantization_config"] = nf4_config(torch.bfloat16 if device.type == "cuda" else dtype)
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = AutoModelForCausalLM.from_pretrained(path, **options)
    # Those on the meta device come from another process.
    held = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    if random := absent_weights(info) & held:
        raise ValueError(
            f"`--base_model` {path} lacks {len(random)} weights of its {type(model).__name__}, or has them in another "
            f"shape than its config.json says ({listed(random)}): download or save it again"
        )
    # The key-value cache serves generation, and conflicts with activation checkpointing.
    model.config.use_cache = False
    return model if quantize or keep_on_cpu else model.to(device)


def absent_weights(info: dict) -> set[str]:
    """The weights that a checkpoint lacks or has in another shape, by `from_pretrained`'s loading info."""
    return {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}


def why_not_on_head(by_peft: bool, lora_dropout: float) -> str | None:
    """Why an adapter on the model's head would not train, whose weight the loss reads instead of calling it, or None.

    The engine's own head gives the loss its merged weight, which has no dropout.
    """
    if by_peft:
        return "the loss reads the weight of the model's head, and PEFT's adapter on it would not train: leave it out"
    if lora_dropout > 0:
        return (
            "the loss reads the weight of the model's head, which has no dropout: set --lora_dropout 0, or leave it out"
        )
    return None


def check_targets(path: str, config: dk.DoraConfig, trust_remote_code: bool = False, *, by_peft: bool = False) -> None:
    """Raise ValueError if `config` names a module that the model does not have, or its head where that cannot train.
    No weights are read."""
    options = {"trust_remote_code": trust_remote_code}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, **options), **options)
    stacks, targets = check_parameters(model, config), find_targets(model, config)
    check_patterns(config, targets, stacks)
    head = model.get_output_embeddings()
    for name, module in targets.items():
        if module is head and (reason := why_not_on_head(by_peft, config.lora_dropout)):
            raise ValueError(f"`--lora_target_modules` {name}: {reason}")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware computes in it, else fp32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32
