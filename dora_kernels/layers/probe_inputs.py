"""Inputs without values for a transformers model, made from its config."""

import inspect

import torch
from torch import nn

TOKENS = 8
SAMPLES = 16_000  # a second of sound


def inputs_of(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """The arguments of a forward, of batch size 1: the model's main input, then all of its inputs that are known here.

    Raises:
        ValueError: the model's kind of input is not known here.
    """
    main = getattr(model, "main_input_name", None)
    if main not in MAKERS:
        raise ValueError(f"inputs for {type(model).__name__} are not known")
    parameters, config = inspect.signature(model.forward).parameters, model.config
    known = [name for name in parameters if name in MAKERS]
    required = {main, *(name for name in known if parameters[name].default is inspect.Parameter.empty)}
    if config.is_encoder_decoder:
        required |= {"decoder_input_ids"} & set(known)
    tries = [required] if required == set(known) else [required, known]
    return [{name: MAKERS[name](config) for name in names} for names in tries]


def _tokens(config):
    return torch.zeros(1, TOKENS, dtype=torch.long)


def _pixels(config):
    size = _setting(config, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.zeros(1, _setting(config, "num_channels", 3), height, width)


def _sound(config):
    return torch.zeros(1, SAMPLES)


def _spectrogram(config):
    bins = _setting(config, "num_mel_bins", 80)
    frames = 2 * _setting(config, "max_source_positions", 1500)
    return torch.zeros(1, bins, frames)


def _setting(config, name, default):
    """Of the config, or of the part of it that describes images or sound."""
    for part in (config, *(getattr(config, p, None) for p in ("vision_config", "backbone_config", "audio_config"))):
        value = getattr(part, name, None)
        if value is not None:
            return value
    return default


MAKERS = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "bbox": lambda config: torch.zeros(1, TOKENS, 4, dtype=torch.long),
    "pixel_values": _pixels,
    "input_values": _sound,
    "input_features": _spectrogram,
}
