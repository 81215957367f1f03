"""Times a training step (forward, backward, AdamW) of a whole model with random weights; nothing is downloaded.

Contestants share the frozen weights. One at a time has its adapters and optimizer in memory, so that peak memory is its
own; the frozen base is timed again at the end, and shows how far the machine has drifted. Memory is the peak beyond the
frozen weights: adapters, gradients, optimizer and activations. A contestant must reproduce the base's loss, of which a
fresh adapter changes nothing, and have finite gradients; the layers themselves are held to fp64 by `layer`.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import dora_kernels as dk

from .compare import group_table, title
from .contestants import ALPHA_OVER_RANK, DTYPES, patch
from .memory import peak_bytes
from .session import Session
from .session import add_arguments as add_session_arguments
from .shapes import MODELS, Run
from .timing import attempt, interleaved, release

COMMAND = "model"
STEPS = 5  # timed for each contestant; two come before
LOSS_BAR = 0.02
"""Relative distance from the base's loss. In bf16 the loss of random weights moves by less than a percent."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_session_arguments(parser)
    parser.add_argument(
        "--model", choices=MODELS, help="instead of the preset's runs: this model, with the flags below"
    )
    parser.add_argument("--layers", type=int, default=0, help="decoder layers (default: the model's own number)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward")
    parser.add_argument("--quantize", choices=["nf4"], default="", help="4-bit base weights, by bitsandbytes")


def main(args: argparse.Namespace) -> int:
    session = Session(args)
    flags = (args.layers, args.batch, args.sequence, args.rank, args.checkpointing, args.quantize)
    run(session, (Run(args.model, *flags),) if args.model else None)
    return session.finish()


def run(session: Session, runs: tuple[Run, ...] | None = None) -> None:
    """Measures every run of the session's preset, or those given."""
    built: tuple[tuple, nn.Module] | None = None
    for run in session.preset.runs if runs is None else runs:
        case = run._asdict() | {"dtype": session.preset.dtype, "compiled": session.preset.compiled}
        if session.skips(COMMAND, case):
            continue
        print(f"\n{title(case)}", flush=True)
        key = (run.model, run.layers, run.quantize)
        if built is None or built[0] != key:
            built = None
            release()
            base, failure = attempt(lambda r=run: build_base(r, DTYPES[session.preset.dtype], session.device))
            if failure:
                print(f"the model itself failed: {failure}", flush=True)
                continue
            built = (key, base)
        results = measure(built[1], run, session)
        session.records.add(COMMAND, case, results)
        print(group_table(results, tokens=run.batch * run.sequence), flush=True)


def build_base(run: Run, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The frozen model, random weights in `dtype`, its linear layers in 4 bits if asked for."""
    m = MODELS[run.model]
    config = LlamaConfig(
        vocab_size=m.vocab_size,
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
        quantize(model, dtype, device)
    return model.requires_grad_(False)


def quantize(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces the decoder's linear layers by bitsandbytes' NF4 ones, as loading with `load_in_4bit` would."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise RuntimeError(f"--quantize nf4 needs bitsandbytes, which cannot be imported: {error}") from None
    for parent in list(model.model.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                four_bit = bitsandbytes.nn.Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype,
                    quant_type="nf4", device="meta",
                )  # fmt: skip
                data = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                four_bit.weight, four_bit.bias = data.to(device), linear.bias
                setattr(parent, name, four_bit)
    model.is_loaded_in_4bit = True  # by which PEFT knows
    release()


@dataclass
class Trained:
    """A contestant ready to step."""

    model: nn.Module
    ids: torch.Tensor  # [batch, sequence]
    autocast: torch.dtype | None = None

    def __post_init__(self):
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        fused = self.ids.is_cuda
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=fused) if self.parameters else None
        self.first_loss: float | None = None

    def step(self) -> Iterator[str]:
        """For `timing.interleaved`."""
        on = nullcontext() if self.autocast is None else torch.autocast(self.ids.device.type, self.autocast)
        with on:
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        if self.first_loss is None:
            self.first_loss = loss.item()
        yield "forward"
        loss.backward()
        yield "backward"
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()
            yield "optimizer"


def contestants(
    dtype: torch.dtype, rank: int
) -> dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype | None]]:
    """By name: what makes the trained model out of the base, and autocast's dtype."""

    def by_peft(dora: bool, fp32_adapters: bool, patched: bool = False):
        def adapt(model):
            config = peft.LoraConfig(
                r=rank,
                lora_alpha=ALPHA_OVER_RANK * rank,
                target_modules="all-linear",
                use_dora=dora,
                task_type="CAUSAL_LM",
            )
            model = peft.get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters)
            if patched:
                patch(model)
            return model

        return adapt

    def by_us(model):
        config = dk.DoraConfig(r=rank, lora_alpha=ALPHA_OVER_RANK * rank, target_modules="all-linear")
        return dk.apply_dora(model, config)

    field = {"frozen base": (lambda model: model, None)}
    if dtype == torch.float32:
        field |= {"PEFT LoRA fp32": (by_peft(False, True), None), "PEFT DoRA fp32": (by_peft(True, True), None)}
        field |= {"PEFT DoRA fp32, patched": (by_peft(True, True, patched=True), None)}
    else:
        for method, dora in (("LoRA", False), ("DoRA", True)):
            field[f"PEFT {method} fp32, autocast"] = (by_peft(dora, True), dtype)
            field[f"PEFT {method} bf16"] = (by_peft(dora, False), None)
        field["PEFT DoRA fp32"] = (by_peft(True, True), None)
        field["PEFT DoRA fp32, autocast, patched"] = (by_peft(True, True, patched=True), dtype)
    field["ours fp32, auto"] = (by_us, None)
    return field | {"frozen base, again": field["frozen base"]}


def measure(base: nn.Module, run: Run, session: Session) -> dict[str, dict]:
    """By contestant: its loss, times and peak memory, or why it failed."""
    generator = torch.Generator(session.device).manual_seed(0)
    vocabulary = MODELS[run.model].vocab_size
    ids = torch.randint(vocabulary, (run.batch, run.sequence), generator=generator, device=session.device)
    results: dict[str, dict] = {}
    for name, (adapt, autocast) in contestants(DTYPES[session.preset.dtype], run.rank).items():
        expected = results.get("frozen base", {}).get("loss")
        results[name], failure = attempt(
            lambda a=adapt, c=autocast, e=expected: one(base, a, c, ids, e, run.checkpointing, session)
        )
        results[name] = results[name] or {"failed": failure}
        print(f"  {name}: {results[name]['failed'] or 'done'}", flush=True)
        release()
    return results


def one(base, adapt, autocast, ids, expected, checkpointing, session: Session) -> dict:
    """One contestant's result."""
    built: list[Trained] = []

    def build_and_warm_up():
        # The structure is copied, the frozen weights are not.
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        model = copy.deepcopy(base, shared)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # For the base, that its backward passes through every layer; for the others as in fine-tuning.
        model.enable_input_require_grads()
        model = adapt(model).train()
        built.append(Trained(torch.compile(model) if session.preset.compiled else model, ids, autocast))
        for _ in range(2):
            list(built[0].step())

    peak = peak_bytes(build_and_warm_up, session.device)
    (trained,) = built
    loss = trained.first_loss
    if expected is not None and not abs(loss - expected) <= LOSS_BAR * expected:
        return {"failed": f"wrong: loss {loss:.4f}, the base's is {expected:.4f}", "loss": loss}
    if not all(p.isfinite().all() for p in trained.parameters):
        return {"failed": "wrong: a step made a parameter infinite or NaN", "loss": loss}
    steps = min(STEPS, session.repetitions)
    times, failed = interleaved({"step": trained.step}, session.device, repetitions=steps, warmup=0)
    if failed:
        return {"failed": failed["step"], "loss": loss}
    seconds = {part: t._asdict() for part, t in times["step"].items()}
    return {"failed": None, "loss": loss, "peak_bytes": peak, "seconds": seconds}
