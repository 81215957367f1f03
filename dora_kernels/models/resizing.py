"""`resize_token_embeddings` of an adapted model: refused where an adapter has the size of the vocabulary."""

from torch import nn

from ..layers.dora_layer import DoraLayer
from .targets import output_embeddings


def resize_token_embeddings(
    model: nn.Module, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args, **kwargs
) -> nn.Module:
    """`type(model).resize_token_embeddings`, where transformers would not stop half way. A method of adapted models; a
    copy of the model has its own.

    Raises:
        ValueError: the embeddings or the head have an adapter, and the size would change.
    """
    embeddings = model.get_input_embeddings()
    adapted = [module for module in (embeddings, output_embeddings(model)) if isinstance(module, DoraLayer)]
    if adapted and (pad_to_multiple_of is not None or new_num_tokens not in (None, len(embeddings.weight))):
        path = next(path for path, module in model.named_modules() if module is adapted[0])
        raise ValueError(
            f"{path} has an adapter of {len(embeddings.weight)} tokens, which cannot be resized: load the base afresh, "
            "call resize_token_embeddings first, then apply_dora"
        )
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)
