"""PEFT's LoRA layer on an embedding with a fused forward."""

import torch
from peft.tuners.lora.layer import Embedding

from ..ops import dispatch
from ..ops.dora_embedding import dora_embedding, plan
from .fused import FusedLayer


class FusedEmbedding(FusedLayer, Embedding):
    """PEFT's `lora.Embedding`."""

    peft_class = Embedding

    @property
    def base_weight(self) -> torch.Tensor:
        """Wᵀ [embedding_dim, num_embeddings] of the base layer."""
        return self.base_layer.weight.T

    def parameters_of(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        magnitude = self.lora_magnitude_vector[adapter].weight
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter], magnitude

    def zeroed_of(self, adapter: str) -> torch.Tensor:
        return self.lora_embedding_A[adapter]

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.T.contiguous()

    def accepts(self, x: torch.Tensor, weight: torch.Tensor) -> bool:
        return x.dtype in (torch.int32, torch.int64) and x.device == weight.device

    def fused_call(self, x: torch.Tensor, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        base, options = self.base_layer, self.dora_fusion.options
        return dora_embedding(
            x,
            base.weight,
            *self.parameters_of(adapter),
            scaling=self.scaling[adapter],
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
            impl=options["impl"],
            rounding=options["rounding"],
            salt=options["salt"],
            frozen_scale=self.frozen_scale_of(adapter),
            output_use=self.output_use,
        )

    def plan_of(self, adapter: str, tokens: int) -> dispatch.Plan:
        return plan(self.base_layer.weight.device, self.dora_fusion.options["impl"])
