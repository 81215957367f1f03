"""`DoraTrainer`: TRL's SFTTrainer, resumable, with an evaluation loss per token and Liger's loss."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from trl import SFTTrainer

import dora_kernels as dk
from dora_kernels.layers.frozen import Freezable

from ..data.order import IGNORED
from ..model.adapter import Adapter
from .resumable import Resumable


class DoraTrainer(Resumable, SFTTrainer):
    """Trains `adapter.model`.

    Args:
        adapter, run: see `Resumable`.
        fused_loss: the model computes its own loss (`training.model.liger`); TRL's loss is not used in training.
        options: SFTTrainer's other arguments.
    """

    def __init__(self, adapter: Adapter, run: dict, *, fused_loss: bool = False, **options):
        self.fused_loss = fused_loss
        self._eval_sums: list[torch.Tensor] = []
        super().__init__(adapter, run, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700))
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in transformers, but `eval_loss` is the mean over all tokens, not the mean of the batches' means."""
        self._eval_sums = []
        # The data loader draws from the global generator. Without the fork, evaluating would change later dropout.
        with torch.random.fork_rng(devices=[]), self._norms_kept():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, tokens = self.accelerator.reduce(torch.stack(self._eval_sums).sum(0).to(self.args.device)).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(tokens, 1)
        self.meter.skip()
        return output

    def _norms_kept(self) -> AbstractContextManager:
        """The scope in which norms are cached during an evaluation. Not for FSDP, which gathers a layer only in its
        forward."""
        fused = any(isinstance(module, Freezable) for module in self.model.modules())
        if not fused or self.is_fsdp_enabled:
            return nullcontext()
        return dk.frozen_adapters(self.model.eval())

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self._ignore_repeated(inputs, self.args.eval_batch_size)
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum().to(result[0].device)
        # In fp64 on the CPU, as it sums many batches. The mean over no token would be NaN.
        loss = result[0].double() * tokens if tokens else torch.zeros_like(tokens).double()
        self._eval_sums.append(torch.stack([loss, tokens.double()]).cpu())
        return result

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor | int | None:
        if batch_samples and self.model.training:
            self._ignore_repeated(batch_samples[-1], self.args.train_batch_size)
        return super()._get_num_items_in_batch(batch_samples, device)

    def _ignore_repeated(self, inputs: dict, batch: int) -> None:
        """Ignore the labels of rows that accelerate repeats to give every process the same number of rows.

        They are the last rows of an epoch's last batch, which has `batch` rows in each process.
        """
        labels, loader = inputs["labels"], self.accelerator.gradient_state
        if self.args.world_size == 1 or not loader.end_of_dataloader:
            return
        all_rows = batch * self.args.world_size
        distinct = len(loader.active_dataloader.dataset) % all_rows or all_rows
        if "position_ids" in inputs:  # packing puts several rows into one sequence
            row = (inputs["position_ids"] == 0).cumsum(-1) - 1
        else:
            row = torch.arange(len(labels), device=labels.device)[:, None]
        labels[(row + self.args.process_index * batch >= distinct).expand_as(labels)] = IGNORED

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (self.fused_loss and model.training) or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # TRL's count of tokens; packed batches have no mask.
        seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()
        self._total_train_tokens += self.accelerator.gather_for_metrics(seen).sum().item()
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch).loss

    def _forward(self, inputs: dict) -> None:
        # Not `compute_loss`, which is collective.
        self.model(**self._prepare_inputs(dict(inputs)))
