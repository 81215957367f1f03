"""One training step of a model with DoRA layers, counted: what is kept, and the most that is alive.

A decoder's layers of one kind are alike, so that one of them runs. What it keeps, each of the others would.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

import dora_kernels as dk
from dora_kernels.layers.dora_layer import DoraLayer
from dora_kernels.layers.experts import DoraExperts
from dora_kernels.layers.valueless import Undecided
from dora_kernels.models.passed_head import close_head, open_head
from dora_kernels.models.targets import unmatched
from dora_kernels.ops.output import OutputUse

from .attention import fused_attention
from .decoder import Passing, Running, examples, kinds, reduce
from .fake_gpu import fake_gpu, fake_module, fake_tensor
from .formats import layer_in
from .held import HeldBytes, tensors
from .losses import STAND_INS, TRL_TILE
from .nf4 import linears_to_quantize

aten, prim = torch.ops.aten, torch.ops.prim
MOST_OPERATIONS = 20_000
"""Of a step: ten times what a usual model takes, and seconds of counting."""


class Counted(NamedTuple):
    """Bytes beyond the parameters, their gradients and moments."""

    kept: int  # by the layers, over micro-steps
    activations: int  # after the last decoder layer's forward
    loss: int  # the most that is added to them until that layer's backward
    layer: int  # the most that is added to them while a layer runs


class Trained(NamedTuple):
    """`layers` and `stacks` of experts have adapters, of so many bytes; `total` is all that trains."""

    layers: int
    stacks: int
    adapters: int
    total: int


class Stretch(NamedTuple):
    """A part of a step, which `event` of the member `path` begins."""

    event: str
    path: str
    calls: int  # of members, so far
    first: int  # of the step's moments


class Step(NamedTuple):
    """The bytes `held` at each moment, before the first operation of a stretch and after each operation, beside those
    `kept` all the time. Steps that issue the same operations are on a straight line, moment for moment."""

    operations: tuple
    stretches: list[Stretch]
    calls: list[str]  # the members, in order
    held: np.ndarray
    kept: int

    def between(self, other: "Step", share: float) -> "Step":
        """The step at this `share` of the way to the other one."""
        return self._replace(held=self.held + share * (other.held - self.held))


class Timeline(HeldBytes):
    """A step in stretches, between what members note. One begins with its first operation: until then Python may let go
    of something."""

    def __init__(self):
        super().__init__()
        self.moments: list[int] = []
        self.operations: list[str] = []
        self.stretches: list[Stretch] = []
        self.calls: list[str] = []
        self.is_backward = False
        self._noted: tuple | None = ("forward", "")

    def noted(self, event: str, path: str) -> None:
        if self.is_backward and event != "backward":
            return  # a recomputation
        self.is_backward = event == "backward"
        if event == "forward":
            self.calls.append(path)
        self._noted = event, path

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is prim.device.default:
            return func(*args)
        if self._noted:
            self.stretches.append(Stretch(*self._noted, len(self.calls), len(self.moments)))
            self.moments.append(self.held)
            self._noted = None
        if len(self.operations) == MOST_OPERATIONS:
            raise ValueError(
                f"one layer of each kind takes more than {MOST_OPERATIONS:,} operations: a loop over tokens?"
            )
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.operations.append(func.name())
        self.moments.append(self.held)
        return result


class Countable(Undecided):
    """Refuses what depends on values that are not there, where a wrong answer would change what is counted."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is aten.nonzero.default or (
            function is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        ):
            raise ValueError("how much it computes depends on the data")
        return super().__torch_dispatch__(function, types, args, kwargs)


class CountedModel:
    """A model on the meta device, which gets adapters and loses its values and most of its layers.

    Raises:
        ValueError: its layers cannot be adapted, or not be counted.
    """

    def __init__(self, model: PreTrainedModel, config: dk.DoraConfig, targets: list[str], base_format: str):
        self.model, self._mode = model, FakeTensorMode()
        self._examples = examples(kinds(model, targets))
        reduce(model, self._examples)
        if not isinstance(config.target_modules, str | None):
            gone = unmatched(model, config.target_modules)
            config = replace(config, target_modules=[name for name in config.target_modules if name not in gone])
        with fake_gpu(mode=self._mode), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fake_module(model, fake_tensor)
            for path, linear in linears_to_quantize(model).items() if base_format else ():
                model.set_submodule(path, layer_in(linear, base_format))
            dk.apply_dora(model, config).train()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)

    def trained(self) -> Trained:
        """Of the whole model."""
        layers, stacks, adapters, total = 0, 0, 0, 0
        for times, module in self._modules():
            own = times * sum(p.nbytes for p in module.parameters(recurse=False) if p.requires_grad)
            total += own
            if isinstance(module, DoraLayer | DoraExperts):
                adapters += own
                layers += times * isinstance(module, DoraLayer)
                stacks += times * isinstance(module, DoraExperts)
        return Trained(layers, stacks, adapters, total)

    def _modules(self) -> Iterator[tuple[int, nn.Module]]:
        """Each module that is there, and for how many of the whole model it stands."""
        repeated = Counter(self._examples.values())
        for path, module in self.model.named_modules():
            yield next((count for member, count in repeated.items() if f"{path}.".startswith(f"{member}.")), 1), module

    def count(
        self, batch_size: int, cutoff_len: int, activation_checkpointing: bool, loss: str, keep_weights: bool
    ) -> Step:
        """A step over [batch_size, cutoff_len] tokens; with `keep_weights` one inside `accumulating`, after another.

        Raises:
            ValueError: the model's code cannot run without values.
        """
        timeline = Timeline()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # of a name that older releases need
            if activation_checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                self.model.gradient_checkpointing_disable()
                self.model.disable_input_require_grads()  # which checkpointing had switched on
        attention = mock.patch.object(F, "scaled_dot_product_attention", fused_attention)
        scope = dk.accumulating(self.model, keep_weights=True) if keep_weights else nullcontext()
        with attention, fake_gpu(mode=self._mode), Countable(), scope:
            tokens = torch.empty(batch_size, cutoff_len, dtype=torch.int64)
            if keep_weights:
                with Timeline():  # which refuses too many operations
                    self._step(tokens, loss)
            kept = sum(times * _kept_bytes(module) for times, module in self._modules())
            with self._noting(timeline), timeline:
                self._step(tokens, loss)
        if not timeline.calls:
            raise ValueError(
                "its forward calls no member of a torch.nn.ModuleList, where decoder layers are looked for"
            )
        # A tile that is full grows no more.
        operations = (*timeline.operations, batch_size * cutoff_len >= TRL_TILE[0])
        return Step(operations, timeline.stretches, timeline.calls, np.array(timeline.moments), kept)

    def _step(self, tokens: torch.Tensor, loss: str) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            result = self._loss(tokens, loss)
        result.backward()

    def _loss(self, tokens: torch.Tensor, loss: str) -> torch.Tensor:
        if loss == "whole":
            return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        head = self.model.get_output_embeddings()
        is_adapted = isinstance(head, DoraLayer)
        if is_adapted:
            open_head(self.model, ())
        hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        result = STAND_INS[loss].apply(hidden, head.weight)
        if is_adapted:
            close_head(self.model, (), None)
        return result

    @contextmanager
    def _noting(self, timeline: Timeline) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.model.modules():
                if isinstance(module, Running | Passing):
                    stack.enter_context(mock.patch.object(module, "noted", timeline.noted))
            yield

    def of_all(self, step: Step) -> Counted:
        """With what members that did not run would have kept."""
        calls, held, stretches = step.calls, step.held, step.stretches
        starts = [held[stretch.first] for stretch in stretches]
        peaks = [part.max() for part in np.split(held, [stretch.first for stretch in stretches[1:]])]
        kept = {
            stretch.path: end - start
            for stretch, start, end in zip(stretches, starts, starts[1:])
            if stretch.event == "forward" and stretch.path == self._examples.get(stretch.path)
        }
        of_each = np.array([0] + [kept[self._examples[path]] for path in calls])
        ran = np.array([0] + [path == self._examples[path] for path in calls])
        whole, counted = np.cumsum(of_each), np.cumsum(of_each * ran)  # before each call

        def missing(stretch: Stretch) -> float:
            if stretch.event != "backward":
                return whole[stretch.calls] - counted[stretch.calls]
            # Highest in the last member that this one runs for.
            own = max(i for i, path in enumerate(calls) if path == stretch.path)
            highest = max(i for i, path in enumerate(calls) if self._examples[path] == stretch.path)
            return whole[highest + 1] - counted[own + 1]

        tops = [peak + missing(stretch) for stretch, peak in zip(stretches, peaks)]
        last = max(i for i, stretch in enumerate(stretches) if stretch.event != "backward")
        activations = starts[last] + missing(stretches[last])
        layer = max(tops[:last] + tops[last + 1 :])
        return Counted(step.kept, int(activations), int(tops[last] - activations), max(0, int(layer - activations)))


def _kept_bytes(module: nn.Module) -> int:
    """What a layer keeps from one micro-step to the next: copies of its factors, n and g, and W'."""
    use = getattr(module, "output_use", None) or OutputUse()
    norm, weight = use.kept_norm, use.kept_weight
    kept = [*(tensors(norm.norm) if norm else ()), *([weight.merged] if weight else ())]
    return sum(tensor.nbytes for tensor in kept)
