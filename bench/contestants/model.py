"""Whole models in every form that competes: the frozen base, also with a fused GLU, PEFT's LoRA and DoRA, Axolotl's and
Unsloth's LoRA, ours; random weights."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import dora_kernels as dk
from dora_kernels.ops.base_weights import is_known_to_peft

from ..installation import training
from ..measuring.shapes import Run
from ..measuring.timing import release
from ..rows.compare import FUSED_GLU
from . import fused_lora
from .fused_glu import fuse_glu, why_no_fused_glu
from .layer import ALPHA_OVER_RANK, DTYPE_NAMES, patch
from .mixture import ATTENTION, STACKS, build_mixture

layers = training("quantised_linear")

POSITIONS = 64  # whose logits are compared
Adapt = Callable[[nn.Module], nn.Module]
"""Makes the trained model out of the base."""


def build_base(run: Run, dtype: torch.dtype, device: torch.device, vocabulary: int = 0) -> nn.Module:
    """The frozen model, random weights in `dtype`, its linear layers in the format that is asked for.

    `vocabulary`: another size than the model's own.
    """
    if run.is_mixture:
        if run.quantize:
            raise ValueError(f"a mixture has no --quantize {run.quantize}, which leaves its experts in 16 bits")
        return build_mixture(run, dtype, device, vocabulary).requires_grad_(False)
    m = run.sizes
    config = LlamaConfig(
        vocab_size=vocabulary or m.vocab_size,
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        num_hidden_layers=run.layers or m.num_hidden_layers,
        num_attention_heads=m.num_attention_heads,
        num_key_value_heads=m.num_key_value_heads,
        attention_bias=m.attention_bias,
        max_position_embeddings=32768,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if run.quantize:
        quantize(model, run.quantize, dtype)
    return model.requires_grad_(False)


def quantize(model: nn.Module, form: str, dtype: torch.dtype) -> None:
    """Replaces the decoder's linear layers by those of a format: bitsandbytes' NF4, as loading with `load_in_4bit`
    would, or one of `training.quantised_linear`."""
    for parent in list(model.model.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                nf4 = form == "nf4"
                setattr(parent, name, in_nf4(linear, dtype) if nf4 else layers.quantised_linear(linear, form))
    if form == "nf4":
        model.is_loaded_in_4bit = True  # by which PEFT knows
    release()


def in_nf4(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' NF4 layer of this one's values, which computes in `dtype`. Raises RuntimeError without the
    library."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise RuntimeError(f"--quantize nf4 needs bitsandbytes, which cannot be imported: {error}") from None
    four_bit = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    if linear.weight.is_meta:
        four_bit.weight = empty_nf4(linear.weight)
    else:
        data = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        four_bit.weight = data.to(linear.weight.device)
    four_bit.bias = linear.bias
    return four_bit


def empty_nf4(weight: torch.Tensor) -> nn.Parameter:
    """A 4-bit weight without values, with the statistics that quantising leaves: double-quantised blocks of 64."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    def empty(*size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device=weight.device)

    blocks = -(-weight.numel() // 64)
    nested = QuantState(absmax=empty(-(-blocks // 256)), blocksize=256, code=empty(256), dtype=torch.float32)
    state = QuantState(
        absmax=empty(blocks, dtype=torch.uint8), shape=weight.shape, code=empty(16), blocksize=64, quant_type="nf4",
        dtype=weight.dtype, offset=empty(), state2=nested,
    )  # fmt: skip
    packed = empty(-(-weight.numel() // 2), 1, dtype=torch.uint8)
    return Params4bit(packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True)


class First(NamedTuple):
    """What the first step computed, before any update."""

    loss: torch.Tensor
    logits: torch.Tensor  # [first positions, vocabulary] of the first row


@dataclass
class Trained:
    """A contestant ready to step."""

    model: nn.Module
    ids: torch.Tensor  # [batch, sequence]
    autocast: torch.dtype | None = None
    fused: bool | None = None  # the optimizer; None: on a GPU

    def __post_init__(self):
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        fused = self.ids.is_cuda if self.fused is None else self.fused
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=fused) if self.parameters else None
        self.first: First | None = None

    def begin(self) -> None:
        """Makes the optimizer's moments, as the first step does."""
        if self.optimizer:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def step(self) -> Iterator[str]:
        """For `timing.interleaved`."""
        on = nullcontext() if self.autocast is None else torch.autocast(self.ids.device.type, self.autocast)
        with on:
            output = self.model(input_ids=self.ids, labels=self.ids)
        loss = output.loss
        if self.first is None:
            self.first = First(loss.detach(), output.logits[0, :POSITIONS].detach().clone())
        del output  # the logits go when the backward lets them go
        yield "forward"
        loss.backward()
        yield "backward"
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()
            yield "optimizer"


class Contestant(NamedTuple):
    """What it makes of the base, autocast's dtype if used, and the mathematics it must match."""

    kind: str  # "base", "lora" or "dora"
    adapt: Adapt
    autocast: torch.dtype | None = None


def by_peft(rank: int, dora: bool, fp32_adapters: bool, patched: bool = False, **options) -> Adapt:
    """PEFT's model, of all linear layers unless `options` say otherwise."""

    def adapt(model):
        if dora and not all(map(is_known_to_peft, model.modules())):
            # Said here, for PEFT fails by the weight's values, which a prediction has not.
            raise NotImplementedError("PEFT cannot build DoRA over this format")
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=ALPHA_OVER_RANK * rank,
            use_dora=dora,
            task_type="CAUSAL_LM",
            **{"target_modules": "all-linear"} | options,
        )
        # At r = 384 adapters have a billion values: drawn on the GPU, not on the CPU.
        device = next(model.parameters()).device
        with device if device.type == "cuda" else nullcontext():
            model = peft.get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters)
        if patched:
            patch(model)
        return model

    return adapt


def by_library(library: str, rank: int, fp32_adapters: bool) -> Adapt:
    """PEFT's LoRA, its layers run by the library."""
    lora = by_peft(rank, False, fp32_adapters)
    return lambda model: fused_lora.fuse_decoder(lora(model), library)


def by_us(rank: int, **options) -> Adapt:
    """Our model, likewise."""

    def adapt(model):
        options_of_all = {"r": rank, "lora_alpha": ALPHA_OVER_RANK * rank, "target_modules": "all-linear"}
        return dk.apply_dora(model, dk.DoraConfig(**options_of_all | options))

    return adapt


def contestants(dtype: torch.dtype, rank: int, *, libraries: Iterable[str] = ()) -> dict[str, Contestant]:
    """By name, in the order of the tables. `libraries`: those of `fused_lora` that are installed."""
    field = {"frozen base": Contestant("base", lambda model: model), FUSED_GLU: Contestant("base", fuse_glu)}
    if dtype == torch.float32:
        field["PEFT LoRA fp32"] = Contestant("lora", by_peft(rank, False, True))
        field["PEFT DoRA fp32"] = Contestant("dora", by_peft(rank, True, True))
        field["PEFT DoRA fp32, patched"] = Contestant("dora", by_peft(rank, True, True, patched=True))
    else:
        for kind, method in (("lora", "LoRA"), ("dora", "DoRA")):
            field[f"PEFT {method} fp32, autocast"] = Contestant(kind, by_peft(rank, kind == "dora", True), dtype)
            field[f"PEFT {method} {DTYPE_NAMES[dtype]}"] = Contestant(kind, by_peft(rank, kind == "dora", False))
        field["PEFT DoRA fp32"] = Contestant("dora", by_peft(rank, True, True))
        field["PEFT DoRA fp32, autocast, patched"] = Contestant("dora", by_peft(rank, True, True, patched=True), dtype)
    for library in libraries:
        for name, fp32 in {"fp32": True, DTYPE_NAMES[dtype]: dtype == torch.float32}.items():
            field[f"{library} LoRA {name}"] = Contestant("lora", by_library(library, rank, fp32))
    field["ours fp32, auto"] = Contestant("dora", by_us(rank))
    field["ours fp32, layer by layer"] = Contestant("dora", by_us(rank, fuse_blocks=False))
    return field | {"frozen base, again": field["frozen base"]}


def mixture_contestants(dtype: torch.dtype, rank: int) -> dict[str, Contestant]:
    """Those of a mixture: attention and the experts are adapted. PEFT has no DoRA for experts, which its row says."""
    # By name: PEFT's "all-linear" would adapt the router, too, and give gate and up twice the rank.
    experts = {"target_modules": ATTENTION, "target_parameters": STACKS}
    field = {"frozen base": Contestant("base", lambda model: model)}
    if dtype == torch.float32:
        field["PEFT LoRA fp32"] = Contestant("lora", by_peft(rank, False, True, **experts))
    else:
        field["PEFT LoRA fp32, autocast"] = Contestant("lora", by_peft(rank, False, True, **experts), dtype)
        field[f"PEFT LoRA {DTYPE_NAMES[dtype]}"] = Contestant("lora", by_peft(rank, False, False, **experts))
    field["PEFT DoRA fp32"] = Contestant("dora", by_peft(rank, True, True, **experts))
    field["ours fp32, auto"] = Contestant("dora", by_us(rank, **experts))
    field["ours fp32, layer by layer"] = Contestant("dora", by_us(rank, fuse_blocks=False, **experts))
    return field | {"frozen base, again": field["frozen base"]}


def field_of(run: Run, dtype: torch.dtype, *, libraries: Iterable[str] = ()) -> dict[str, Contestant]:
    """The contestants of a run."""
    if run.is_mixture:
        return mixture_contestants(dtype, run.rank)
    return contestants(dtype, run.rank, libraries=libraries)


def left_out(device: torch.device) -> dict[str, str]:
    """The contestants that cannot run on `device`, with the reason."""
    reason = why_no_fused_glu(device)
    return {} if reason is None else {FUSED_GLU: reason}


def adapted(base: nn.Module, adapt: Adapt, checkpointing: bool) -> nn.Module:
    """The trained model; the base's structure is copied, its frozen weights are not."""
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    model = copy.deepcopy(base, shared)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # For the base, that its backward passes through every layer; for the others as in fine-tuning.
    model.enable_input_require_grads()
    return adapt(model).train()
