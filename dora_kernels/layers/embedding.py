"""`DoraEmbedding`: an embedding with a frozen base weight and a trained DoRA adapter."""

from typing import ClassVar

import torch
from torch import nn

from ..config import check_rank
from ..ops import dispatch
from ..ops.dora_embedding import dora_embedding, plan
from .dora_layer import DoraLayer
from .support import why_not_format, why_not_weight, why_wrapped

SETTINGS = ("num_embeddings", "embedding_dim", "padding_idx", "norm_type", "max_norm", "scale_grad_by_freq", "sparse")


class DoraEmbedding(DoraLayer):
    """y = g ⊙ (W[ids] + s A[:, ids]ᵀ Bᵀ) with g = m / ‖W + s (B A)ᵀ‖ per embedding dimension, as PEFT has it.

    `weight` [V, D] is the base layer's own parameter (shared, frozen). `lora_A` [R, V], `lora_B` [D, R] and `magnitude`
    [D] are trained. As a matrix W is [D, V]: the norm runs over the vocabulary. `lora_dropout` has no effect, as in
    PEFT.

    Args:
        embedding: an `nn.Embedding`.
        r: rank, at least 1.
        adapter: `lora_alpha`, `use_rslora`, `impl`, `rounding`, `salt` and `adapter_dtype`, as for `DoraLinear`; what
            else that takes of an adapter has no effect.

    Raises:
        TypeError: another class. ValueError: `r` < 1, or a layer that `why_not_embedding` has a reason for.
    """

    file_names: ClassVar[dict[str, str]] = {
        "lora_A": "lora_embedding_A",
        "lora_B": "lora_embedding_B",
        "magnitude": "lora_magnitude_vector",
    }
    zeroed = "lora_A"
    bias = None

    def __init__(self, embedding: nn.Embedding, *, r: int, **adapter):
        super().__init__()
        check_rank("`r`", r)
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"DoraEmbedding takes an nn.Embedding, got {type(embedding).__name__}")
        if reason := why_not_embedding_class(embedding) or why_not_format(embedding):
            raise ValueError(f"DoraEmbedding cannot adapt a layer that {reason}")
        self.weight = embedding.weight
        # Models read them off their layers.
        for name in SETTINGS:
            setattr(self, name, getattr(embedding, name))
        self.add_adapter(self.base_weight, self.shapes_of(embedding, r), r=r, **adapter)
        self.train(embedding.training)

    @staticmethod
    def shapes_of(embedding: nn.Embedding, r: int) -> dict[str, tuple[int, ...]]:
        """Of the trained parameters."""
        rows, columns = embedding.weight.shape
        return {"lora_A": (r, rows), "lora_B": (columns, r), "magnitude": (columns,)}

    @property
    def base_weight(self) -> torch.Tensor:
        """Wᵀ [D, V]."""
        return self.weight.T

    @property
    def base_dtype(self) -> torch.dtype:
        """Of what the layer computes, under autocast too."""
        return self.weight.dtype

    def draw_factor(self) -> None:
        nn.init.normal_(self.lora_B)

    def plan(self, tokens: int) -> dispatch.Plan:
        """What a call would run, and why."""
        return plan(self.weight.device, self.impl)

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.T.contiguous()

    def to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.T

    def to_plain(self, base: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The plain embedding with the merged weight; `base` and `dtype` as in `merged_weight`."""
        weight = self.from_matrix(self.merged_weight(dtype or self.weight.dtype, base))
        embedding = plain_embedding(self, device="meta")
        embedding.weight = nn.Parameter(weight, requires_grad=False)
        return embedding.train(self.training)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.refuse_offloaded()
        return dora_embedding(
            ids,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.magnitude,
            scaling=self.scaling,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            impl=self.impl,
            rounding=self.rounding,
            salt=self.salt,
            frozen_scale=self.frozen_scale,
            output_use=self.output_use,
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}, {super().extra_repr()}"


def plain_embedding(embedding: nn.Module, **factory) -> nn.Embedding:
    """A new embedding of the same settings, adapted or not."""
    return nn.Embedding(**{name: getattr(embedding, name) for name in SETTINGS}, **factory)


def why_not_embedding(embedding: nn.Module, kept: bool = False) -> str | None:
    """Why the engine cannot compute in the embedding's place, as what follows "the layer …"; None if it can.

    `kept` as in `support.why_not`.
    """
    if reason := why_not_embedding_class(embedding):
        return reason
    return why_not_weight(embedding, kept) or why_wrapped(embedding, kept)


def why_not_embedding_class(embedding: nn.Module) -> str | None:
    """Why an embedding of this class and these settings computes something else than W[ids], or None."""
    if type(embedding).forward is not nn.Embedding.forward:
        return "has a forward of its own"
    if embedding.max_norm is not None:
        return f"has max_norm={embedding.max_norm}, which writes over the frozen weight"
    if embedding.sparse:
        return "has sparse gradients, and the adapter's are dense"
    return None
