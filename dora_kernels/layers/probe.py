"""What a model does with the layers that adapters can be on, seen by running a copy that has no values.

The copy has the model's own modules, but fake tensors in place of its parameters and buffers: a forward computes shapes
alone, so that a large model takes no memory and little time, and no weight and no random generator is touched.
"""

import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ..ops.output import WriteCounter
from .blocks_seen import Blocks, BlocksSeen, Siblings
from .dataflow import Dataflow
from .gated_mlp_seen import GatedMlp
from .probe_inputs import inputs_of
from .settings import have_same_settings, settings
from .valueless import Undecided, linear_layers, path_of_first, repeats, signature, valueless, watched_layers

SECONDS = 5.0
"""The longest that the forwards of a probe run, in processor time: another program's load changes no result."""


class Probe(NamedTuple):
    """What was seen, by the layers' paths."""

    reads: dict[str, str]  # the operation that took the layer's weight outside the layer's own forward
    written: frozenset[str]  # the layers whose output was written over in place
    stopped: str | None  # why a forward ended early, so that some layers were not seen, and no block was
    # By the paths of the modules around the layers:
    mlps: dict[str, GatedMlp]
    siblings: dict[str, tuple[Siblings, ...]]
    not_blocks: dict[str, str]  # what a module does, as what follows its name, that nearly is a block


SEEN: dict[tuple, Probe] = {}
"""By what models are built of: the same modules do the same."""


def probe(model: nn.Module) -> Probe:
    """Runs a copy of `model` in training and in inference, and watches its layers and the modules around them.

    A layer of PEFT's or of ours counts as the layer below it. Of modules that repeat in a list the first runs,
    and what was seen there holds for all. What a fused kernel of a GPU reads is not seen.
    """
    built = (repr(getattr(model, "config", None)), signature(model), _all_settings(model))
    if built not in SEEN:
        if len(SEEN) == 64:
            SEEN.clear()
        SEEN[built] = _probe(model)
    return SEEN[built]


def _all_settings(model: nn.Module) -> str:
    """Classes' own among them, which may be set between two models."""
    return repr([settings(module) for module in model.modules()])


def _probe(model: nn.Module) -> Probe:
    layers, like, watch, blocks = watched_layers(model), repeats(model), Watch(), BlocksSeen()
    stopped, written, found = None, frozenset(), Blocks({}, {}, {})
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _undisturbed():
            twin = valueless(model, like)
            candidates = inputs_of(twin)
            firsts = [path for path in layers if path_of_first(path, like) == path]
            watch.start(twin, firsts)
            dataflow = Dataflow(blocks.returned)
            linear = linear_layers(model)
            dataflow.start(twin, [path for path in firsts if path in linear])
            with Undecided(), watch, dataflow:
                stopped = _run(twin, candidates, blocks)
                written = watch.written()
                if stopped is None:
                    found = blocks.found(written)
                if found.siblings:
                    watch.give_columns(found.siblings)
                    found = found if (reason := _run(twin, candidates, blocks)) is None else _alone(found, reason)
    except Exception as error:  # Whatever a model does to tensors without values.
        stopped = _in_one_line(error)
    seen = {path: path_of_first(path, like) for path in layers}
    first_modules = {path: path_of_first(path, like) for path, _ in model.named_modules()}
    # Layers that repeat differ in whole numbers, such as their own. An MLP that its settings set apart is no repeat.
    others = {
        path: f"has other settings than {first}, which was looked at"
        for path, first in first_modules.items()
        if first in found.mlps and not have_same_settings(model.get_submodule(path), model.get_submodule(first))
    }
    mlps, siblings, not_blocks = (
        {path: of[first] for path, first in first_modules.items() if first in of} for of in found
    )
    return Probe(
        {path: watch.reads[first] for path, first in seen.items() if first in watch.reads},
        frozenset(path for path, first in seen.items() if first in written),
        stopped,
        {path: mlp for path, mlp in mlps.items() if path not in others},
        siblings,
        not_blocks | others,
    )


def _run(model: nn.Module, candidates: list[dict[str, torch.Tensor]], blocks: BlocksSeen) -> str | None:
    """Calls the model in both modes, with the first inputs that it takes. Returns why it took none."""
    reasons = []
    for inputs in candidates:
        blocks.forget()
        try:
            with torch.enable_grad():
                model.train()(**inputs)
            with torch.no_grad():
                model.eval()(**inputs)
        except Exception as error:
            reasons.append(_in_one_line(error))
        else:
            return None
    return reasons[0]


def _alone(found: Blocks, reason: str) -> Blocks:
    """Without siblings, as the model takes no output that is a part of a wider tensor's rows."""
    reasons = dict.fromkeys(found.siblings, f"views a layer's output as if its rows were adjacent ({reason})")
    return found._replace(siblings={}, not_blocks=reasons | found.not_blocks)


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


class Watch(TorchFunctionMode):
    """Notes which operation takes a layer's weight outside its forward, and the writes to what its forward returned."""

    def __init__(self):
        self.reads: dict[str, str] = {}
        self._outputs: list[tuple[str, WriteCounter]] = []
        self._paths: dict[int, str] = {}  # by the weight's identity
        self._running: set[str] = set()
        self._columns: set[str] = set()

    def start(self, model: nn.Module, paths: list[str]) -> None:
        self._until = time.thread_time() + SECONDS
        for path in paths:
            layer = model.get_submodule(path)
            # Where it was tied, the layer gets one of its own: an embedding may read its own too.
            layer.weight = nn.Parameter(torch.empty_like(layer.weight), requires_grad=False)
            self._paths[id(layer.weight)] = path
            layer.forward = self._watched(path, layer.forward)

    def give_columns(self, siblings: dict[str, tuple[Siblings, ...]]) -> None:
        """From now on these layers return what they do when they compute together: columns of one tensor."""
        self._until = time.thread_time() + SECONDS
        self._columns = {
            f"{path}.{name}".strip(".")
            for path, groups in siblings.items()
            for group in groups
            for name in group.layers
        }

    def written(self) -> frozenset[str]:
        return frozenset(path for path, counter in self._outputs if counter.has_moved)

    def _watched(self, path, forward):
        def watched(*args, **kwargs):
            if time.thread_time() > self._until:
                raise TimeoutError(f"it takes longer than {SECONDS:g} s")
            self._running.add(path)
            try:
                y = forward(*args, **kwargs)
            finally:
                self._running.discard(path)
            if path in self._columns:
                return torch.cat([y, y], dim=-1)[..., : y.shape[-1]]
            if isinstance(y, torch.Tensor):
                self._outputs.append((path, WriteCounter(y)))
            return y

        return watched

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            for tensor in value if type(value) in (list, tuple) else (value,):
                path = self._paths.get(id(tensor))
                # Its shape, dtype or device may be read: that is no use of its values.
                if path is not None and path not in self._running and _has_tensor(result):
                    self.reads.setdefault(path, getattr(function, "__name__", str(function)))
        return result


def _has_tensor(result) -> bool:
    return any(isinstance(part, torch.Tensor) for part in (result if type(result) in (list, tuple) else (result,)))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leaves the random generators as they were, from which a model may draw, and shows no warning twice."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
