"""No number without correctness: a contestant's loss and the gradient of every trained parameter against fp64.

The model is the run's with two decoder layers and a small vocabulary, of the run's widths, rank and checkpointing; one
row of at most 256 tokens passes through it, in the form (token or weight space) that the run's own number of tokens
takes. Adapters are not fresh: the update is about a third of the weight, m is off its norm by 10 %.
Stacks of experts count as linears do; for a mixture's gradients of A and B, PEFT has a layout of its own.
"""

import copy
from collections.abc import Iterator

import peft
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

import dora_kernels as dk
from dora_kernels.layers.experts import DoraExperts
from dora_kernels.ops.base_weights import is_quantized, weight_of
from dora_kernels.ops.dispatch import dense_weight

from ..contestants.experts import STACKS, Stack, in_pefts_layout
from ..contestants.layer import ALPHA_OVER_RANK, factors_of
from ..contestants.model import Contestant, Trained, adapted, build_base
from ..measuring.shapes import Run
from .experts import ExactExperts
from .layer import BAR, UNIT_ROUNDOFF, error

LAYERS, VOCABULARY, TOKENS = 2, 512, 256
DEEPER = 2
"""Times the bar of one linear: a gradient of the first layer has passed two layers of seven linears each, and the
norms, products and residuals between them, each of which rounds. What is dropped or scaled wrong is further off."""

Values = dict[str, dict[str, torch.Tensor]]
"""Of each adapted linear or stack, by its path in the base: values for "dA", "dB" and "dm"."""


class Gate:
    """Holds the contestants of one run against fp64; what is exact is computed once for each kind."""

    def __init__(self, run: Run, dtype: torch.dtype, device: torch.device, *, compiled: bool = False):
        self.run, self.dtype, self.compiled = run, dtype, compiled
        self.base = build_base(run._replace(layers=LAYERS), dtype, device, vocabulary=VOCABULARY)
        generator = torch.Generator(device).manual_seed(1)
        self.ids = torch.randint(VOCABULARY, (1, min(run.sequence, TOKENS)), generator=generator, device=device)
        self.values = make_values(self.base, run.rank, dtype, generator)
        self._exact: dict[str, dict[str, torch.Tensor]] = {}

    def errors(self, contestant: Contestant) -> dict[str, float]:
        """Relative error of the loss, and of each gradient by its name and the linear's path."""
        if contestant.kind not in self._exact:
            self._exact[contestant.kind] = truth(self.base, self.values, contestant.kind, self.ids)
        exact = self._exact[contestant.kind]
        model = adapted(self.base, contestant.adapt, self.run.checkpointing)
        parameters = adapters(model)
        with torch.no_grad():
            for path, values in self.values.items():
                for name, parameter in parameters.get(path, {}).items():
                    parameter.copy_(laid_out(name, values[name], parameter))
        take_the_forms_of(model, self.run.batch * self.run.sequence)
        trained = Trained(torch.compile(model) if self.compiled else model, self.ids, contestant.autocast)
        for part in trained.step():
            if part == "backward":
                break
        found = {f"{name} of {path}": p.grad for path, some in parameters.items() for name, p in some.items()}
        found["loss"] = trained.first.loss
        return {name: error(found.get(name), laid_out(name, value, found.get(name))) for name, value in exact.items()}

    def broken(self, errors: dict[str, float]) -> str | None:
        """What fails, or None."""
        bar = DEEPER * BAR[self.dtype] * UNIT_ROUNDOFF[self.dtype]
        # Not `value > bar`: NaN is a failure.
        wrong = [f"{name} {value:.1e}" for name, value in errors.items() if not value <= bar]
        if not wrong:
            return None
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return f"wrong: {', '.join(wrong[:3])}{more} against fp64, allowed {bar:.1e}"


def worst(errors: dict[str, float]) -> dict[str, float]:
    """Of the loss and of the gradients of A, B and m, for the results file."""
    found: dict[str, float] = {}
    for name, value in errors.items():
        short = name.partition(" of ")[0]
        found[short] = max(found.get(short, 0.0), value)
    return found


def make_values(base: nn.Module, rank: int, dtype: torch.dtype, generator: torch.Generator) -> Values:
    """For every linear and every stack of experts of the decoder layers, in fp32, of what `dtype` can represent: then
    one truth is everybody's."""
    found: Values = {}
    for path, weight in adapted_weights(base.model):
        *experts, N, K = weight.shape

        def normal(*size, scale=1.0, device=weight.device):
            return torch.randn(*size, generator=generator, device=device) * scale

        norms = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float64)
        size = (norms.square().sum() / weight.numel()).sqrt().item()
        values = {
            "dA": normal(*experts, rank, K),
            "dB": normal(*experts, N, rank, scale=0.3 * size / ALPHA_OVER_RANK / rank**0.5),
            "dm": norms.float() * (1 + 0.1 * normal(*experts, N)),
        }
        found[f"model.{path}"] = {name: value.to(dtype).float() for name, value in values.items()}
    return found


def adapted_weights(decoder: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """By path, each linear's weight [N, K] and each stack [E, N, K]."""
    for path, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            yield path, dense(module)
        elif hasattr(module, "gate_up_proj"):
            yield from ((f"{path}.{name}", getattr(module, name)) for name in STACKS)


def laid_out(name: str, value: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    """A stack's "dA" or "dB", or the gradient of one, in PEFT's layout where `like` is."""
    if like is None or like.ndim == value.ndim:
        return value
    return in_pefts_layout(lora_A=value) if name.startswith("dA") else in_pefts_layout(lora_B=value)


def truth(base: nn.Module, values: Values, kind: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """In fp64, by autograd on materialised weights, with DoRA's norm detached; it shares no code with anybody."""
    model = copy.deepcopy(base)
    leaves: dict[str, torch.Tensor] = {}
    for path, module in list(model.named_modules()):
        if path in values:
            exact = _ExactLinear(module, values[path], kind)
            model.set_submodule(path, exact)
            leaves |= {f"{name} of {path}": leaf for name, leaf in exact.leaves.items()}
        elif f"{path}.down_proj" in values and hasattr(module, "gate_up_proj"):
            stacks = {name: Stack(getattr(module, name), *values[f"{path}.{name}"].values()) for name in STACKS}
            exact = ExactExperts(kind, stacks)
            model.set_submodule(path, exact)
            leaves |= {name.replace(" of ", f" of {path}."): leaf for name, leaf in exact.leaves.items()}
        elif hasattr(module, "variance_epsilon"):
            # transformers' own computes in fp32.
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(path, norm)
    logits = model.double().train()(input_ids=ids).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    grads = torch.autograd.grad(loss, list(leaves.values())) if leaves else ()
    return {"loss": loss.detach(), **dict(zip(leaves, grads))}


class _ExactLinear(nn.Module):
    def __init__(self, module: nn.Linear, values: dict[str, torch.Tensor], kind: str):
        super().__init__()
        self.weight, self.kind = dense(module).double(), kind
        self.bias = None if module.bias is None else module.bias.double()
        names = {"base": (), "lora": ("dA", "dB"), "dora": ("dA", "dB", "dm")}[kind]
        self.leaves = {name: values[name].double().requires_grad_() for name in names}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if self.kind != "base":
            weight = weight + ALPHA_OVER_RANK * self.leaves["dB"] @ self.leaves["dA"]
        if self.kind == "dora":
            weight = (self.leaves["dm"] / weight.norm(dim=1).detach())[:, None] * weight
        return linear(x, weight, self.bias)


def dense(module: nn.Linear) -> torch.Tensor:
    """A linear's weight [N, K]; in 4 bits as the format defines it: bitsandbytes 0.50 decodes rows of broken blocks
    wrongly on a CPU. Other formats are decoded in PyTorch, which the tests hold to their libraries' own decoders."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if is_quantized(module) and state is None:
        return dense_weight(weight_of(module), torch.float32, impl="reference")
    weight = module.weight.data
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_blockwise

    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    codes = torch.stack((weight.view(-1) >> 4, weight.view(-1) & 15), dim=1).view(-1)[: state.shape.numel()].long()
    return (state.code[codes] * scales.repeat_interleave(state.blocksize)[: codes.numel()]).view(state.shape)


def adapters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The trained parameters of each adapted linear or stack, by its path in the base and the names of their
    gradients."""
    found = {}
    for path, module in model.named_modules():
        path = path.removeprefix("base_model.model.")
        if isinstance(module, peft.tuners.lora.ParamWrapper):
            found[f"{path.replace('.base_layer', '')}.{module.parameter_name}"] = factors_of(module)
        elif isinstance(module, (dk.DoraLinear, DoraExperts, peft.tuners.lora.LoraLayer)):
            found[path.replace(".dora.", ".")] = factors_of(module)
    return found


def take_the_forms_of(model: nn.Module, tokens: int) -> None:
    """Makes each layer of ours run what it would run for so many tokens, whatever comes."""
    for module in model.modules():
        if isinstance(module, dk.DoraLinear):
            module.space = module.plan(tokens).space
        elif isinstance(module, DoraExperts):
            module.space = module.stack_plan(tokens).space
        elif hasattr(module, "dora_fusion"):
            module.dora_fusion.options["space"] = module.plan(tokens).space
