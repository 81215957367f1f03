"""Counted allocations of a training step: a tracker that sees every tensor of it, and knows no formula."""

import weakref
from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM
from triton.runtime.interpreter import InterpretedFunction

import dora_kernels as dk
from tests.support.planned import RANK
from tests.support.stand_in_gpu import users_of_mm_fp32
from tests.support.tiny_models import checkpoint_activations
from training.quantised_linear import quantised_linear


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations return, from their birth until Python and autograd let go of them."""

    def __init__(self):
        super().__init__()
        self.sizes, self.live, self.peak, self.paused = {}, 0, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and not self.paused:
                self.add(value)
        return result

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += self.sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key)

    def _free(self, key):
        self.live -= self.sizes.pop(key)

    @contextmanager
    def as_on_a_gpu(self):
        """Kernels' launchers allocate and nothing is launched; and the product of 16-bit factors with an fp32 result,
        one GEMM on a GPU, does without the fp32 copies of its factors that it needs on a CPU."""

        def mm_fp32(a, b):
            self.paused = True
            product = a.float() @ b.float()
            self.paused = False
            return product.clone()

        with ExitStack() as stack:
            stack.enter_context(patch.object(InterpretedFunction, "run", lambda self, *args, **kwargs: None))
            for module in users_of_mm_fp32():
                stack.enter_context(patch.object(module, "mm_fp32", mm_fp32))
            yield


def quantized(model):
    """Every linear but the head in NF4, as `BitsAndBytesConfig` with double quantisation leaves it."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no NF4 model to count")
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            with torch.device("meta"):
                layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=module.bias is not None)
            layer.compute_dtype, layer.bias = torch.bfloat16, module.bias
            weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            layer.weight = weight.to("cpu")
            model.set_submodule(path, layer)
    return model


def in_format(model, base_format):
    """Every linear but the head in the format."""
    if base_format == "nf4":
        return quantized(model)
    for path, module in list(model.named_modules()):
        if base_format and isinstance(module, torch.nn.Linear) and path != "lm_head":
            model.set_submodule(path, quantised_linear(module, base_format))
    return model


def count(config, batch_size, cutoff_len, *, base_format="", checkpointing=False, loss="whole", keep=False, **options):
    """Bytes before the step, with all gradients and moments; and the peak of the step, as training takes it; to `keep`
    weights that of its second micro-step, and of the scope around both."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    adapter = dk.DoraConfig(**{"r": RANK} | options, impl="triton")
    model = dk.apply_dora(in_format(model, base_format), adapter).train()
    if checkpointing:
        checkpoint_activations(model)
    forward = prepare(model, loss)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    live = LiveBytes()
    for parameter in model.parameters():
        live.add(parameter)
        state = getattr(parameter, "quant_state", None)
        for value in [] if state is None else state.as_dict(packed=False).values():
            if isinstance(value, torch.Tensor):
                live.add(value)
    for buffer in model.buffers():
        live.add(buffer)

    def accumulate(tokens):
        with torch.autocast("cpu", torch.bfloat16):
            result = forward(tokens)
        result.backward()

    with live.as_on_a_gpu(), live:
        accumulate(torch.zeros(1, 8, dtype=torch.int64))
        optimizer.step()  # its moments exist from here on, and the gradients, which accumulate
        before = live.peak = live.live
        with dk.accumulating(model, keep_weights=True) if keep else nullcontext():
            for _ in range(2 if keep else 1):
                live.peak = live.live
                accumulate(torch.zeros(batch_size, cutoff_len, dtype=torch.int64))
            optimizer.step()
    return before, live.peak


def prepare(model, loss):
    """The loss of [batch, length] tokens, in the three ways of `memory.LOSSES`."""
    if loss == "liger":
        pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
        from training.model.liger import use_fused_loss

        use_fused_loss(model)
    if loss == "tiled":
        utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")
        utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        return lambda tokens: model(input_ids=tokens, labels=tokens, use_cache=False, fused_lm_head=True).loss
    return lambda tokens: model(input_ids=tokens, labels=tokens, use_cache=False).loss
