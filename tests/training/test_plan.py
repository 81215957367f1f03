"""The plan against counted allocations: a tracker that sees every tensor of a real step, and knows no formula."""

import weakref
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from triton.runtime.interpreter import InterpretedFunction

import dora_kernels as dk
from tests.support.marks import slow
from tests.support.stand_in_gpu import users_of_mm_fp32
from tests.support.tiny_models import checkpoint_activations
from tests.tolerances import PLAN
from training import memory_model
from training.memory_model import planned_model, predict
from training.planning import losses, step
from training.planning.nf4 import nf4_bytes
from training.quantised_linear import quantised_linear

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
RANK = 2  # small beside the features, as in a real model: what is of the rank's size is not planned


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


def count(config, batch_size, cutoff_len, *, base_format="", checkpointing=False, loss="whole", **options):
    """Bytes before the step, with all gradients and moments; and the peak of the step, as training takes it."""
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


def assert_predicted(config, batch_size, cutoff_len, *, base_format="", checkpointing=False, loss="whole", **options):
    """`options` are `DoraConfig`'s."""
    step = {"checkpointing": checkpointing, "loss": loss}
    before, peak = count(config, batch_size, cutoff_len, base_format=base_format, **step, **options)
    plan = predict(
        planned_model(config, dk.DoraConfig(**{"r": RANK} | options), base_format=base_format),
        batch_size=batch_size,
        cutoff_len=cutoff_len,
        activation_checkpointing=checkpointing,
        loss=loss,
    )
    static = plan.weights + plan.adapters + plan.gradients + plan.optimizer
    # bitsandbytes' tables and Adam's step counters are left out.
    assert static == pytest.approx(before, rel=0.01)
    # Without the weights, in whose shadow an error could hide.
    assert plan.peak - static == pytest.approx(peak - before, rel=PLAN)


@pytest.mark.parametrize("shape", [(1, 128), (2, 128), (4, 96)], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("base_format", ["", "nf4"], ids=["dense", "nf4"])
def test_the_peak_of_a_step(base_format, checkpointing, shape):
    assert_predicted(LlamaConfig(**SIZES), *shape, base_format=base_format, checkpointing=checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("base_format", ["", "nf4"], ids=["dense", "nf4"])
def test_the_peak_of_a_step_without_blocks(base_format, checkpointing):
    step = {"base_format": base_format, "checkpointing": checkpointing}
    assert_predicted(LlamaConfig(**SIZES), 2, 128, fuse_blocks=False, **step)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config])
def test_other_models(config, checkpointing):
    """Qwen2 has biases, before which the product is kept; Qwen3 normalises each head."""
    assert_predicted(config(**SIZES | {"num_key_value_heads": 4}, head_dim=16), 2, 128, checkpointing=checkpointing)


OTHERS = {
    # Two kinds of layers, of which the rarer stands in the middle; norms before and after, and normalised heads.
    "gemma3": Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=32,
    ),
    "phi3": Phi3Config(**SIZES, pad_token_id=0),  # q, k and v are one layer, gate and up another
    "gpt_neox": GPTNeoXConfig(**SIZES),  # biases, and attention beside the MLP
    # Conv1D, and dropout; attention's is off, with which a CPU keeps the scores.
    "gpt2": GPT2Config(vocab_size=160, n_embd=64, n_layer=3, n_head=4, attn_pdrop=0.0),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
}
SLOW = ("gpt_neox", "mixtral")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    "config", [slow(config) if name in SLOW else config for name, config in OTHERS.items()], ids=OTHERS
)
def test_any_family(config, checkpointing):
    assert_predicted(config, 2, 128, checkpointing=checkpointing)


def test_experts_with_adapters():
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert_predicted(OTHERS["mixtral"], 2, 128, target_modules=["q_proj"], target_parameters=stacks, r=8)


def test_what_lies_outside_the_decoder():
    """An adapted head is merged for the loss, an adapted embedding has a gradient that the first layer passes on."""
    assert_predicted(LlamaConfig(**SIZES), 2, 128, target_modules=["lm_head", "embed_tokens", "q_proj"])


@pytest.mark.parametrize(
    ("base_format", "intermediate_size", "tokens"), [("", 512, 256), ("nf4", 1024, 128)], ids=["dense", "nf4"]
)
def test_few_tokens_for_the_weight(base_format, intermediate_size, tokens):
    """Dense weights run in token space and a norm's backward is the highest; of NF4 it is W' beside the tokens' own."""
    sizes = {"hidden_size": 512, "intermediate_size": intermediate_size, "num_hidden_layers": 1}
    assert_predicted(LlamaConfig(**SIZES | sizes), 1, tokens, base_format=base_format, checkpointing=True)


def test_tied_embeddings_count_once():
    assert_predicted(LlamaConfig(**SIZES | {"tie_word_embeddings": True}), 1, 128)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("loss", memory_model.LOSSES)
def test_losses_over_a_large_vocabulary(loss, checkpointing, monkeypatch):
    """The vocabulary of 4000 makes the loss the larger part; TRL's tile is cut down in proportion."""
    if loss == "tiled":
        kernels = pytest.importorskip("trl.kernels.chunked_logprob", reason="TRL is not installed")
        from trl.trainer import utils

        assert (kernels.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE) == losses.TRL_TILE
        monkeypatch.setattr(losses, "TRL_TILE", (4096, 1024))
        monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 1024)
        for module in (kernels, utils):  # or it runs PyTorch's operations, with more of them alive
            monkeypatch.setattr(module, "_use_triton", lambda device: True)
        # One GEMM on a GPU, which accumulates in place.
        monkeypatch.setattr(kernels, "_addmm_fp32", lambda total, a, b: total)
    assert_predicted(LlamaConfig(**SIZES | {"vocab_size": 4000}), 2, 128, checkpointing=checkpointing, loss=loss)


def test_nf4_is_4_127_bits_a_weight():
    assert nf4_bytes(4096 * 4096) * 8 / 4096**2 == pytest.approx(4.127, abs=5e-4)


def test_the_largest_batch_is_the_last_that_fits():
    planned = planned_model(LlamaConfig(**SIZES), dk.DoraConfig(r=RANK))
    step = {"cutoff_len": 128, "activation_checkpointing": True, "loss": "whole"}
    budget = 0.1 * memory_model.USABLE * 2**30
    batch = memory_model.largest_batch(planned, 0.1, **step)
    assert (
        predict(planned, batch_size=batch, **step).peak <= budget < predict(planned, batch_size=batch + 1, **step).peak
    )
    assert memory_model.largest_batch(planned, 1e-4, **step) == 0


def test_between_two_batches_nothing_is_counted():
    """Memory is a straight line there, moment for moment, and exactly so."""
    planned, again = (planned_model(OTHERS["gemma3"], dk.DoraConfig(r=RANK)) for _ in range(2))
    shape = {"cutoff_len": 64, "activation_checkpointing": True}
    for batch in (16, 48):
        predict(planned, batch_size=batch, **shape)
    with patch.object(step.CountedModel, "count", side_effect=AssertionError):
        between = predict(planned, batch_size=29, **shape)
    assert between == predict(again, batch_size=29, **shape)


def test_one_way_leaves_nothing_to_the_other():
    orders = (False, True), (True, False)
    first, second = (
        {way: predict(planned, batch_size=2, cutoff_len=64, activation_checkpointing=way) for way in order}
        for planned, order in zip([planned_model(LlamaConfig(**SIZES)) for _ in orders], orders)
    )
    assert first == second


def test_a_loop_over_tokens_is_not_counted(monkeypatch):
    monkeypatch.setattr(step, "MOST_OPERATIONS", 100)
    with pytest.raises(ValueError, match=r"of model type llama cannot be counted .* 100 operations"):
        predict(planned_model(LlamaConfig(**SIZES)), batch_size=1, cutoff_len=64)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_is_kept_over_micro_steps(tied):
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 2, "tie_word_embeddings": tied})
    planned = planned_model(config, dk.DoraConfig(r=RANK))
    step = {"batch_size": 1, "cutoff_len": 64}
    plan = predict(planned, keep_weights=True, **step)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dk.apply_dora(model, dk.DoraConfig(r=RANK, space="weight"))
    tokens = torch.arange(8)[None]
    with dk.accumulating(model, keep_weights=True):
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        uses = [module.output_use for module in model.modules() if hasattr(module, "output_use")]
        kept = sum(use.kept_weight.merged.nbytes for use in uses if use.kept_weight is not None)
        copies = sum(part.nbytes for use in uses for part in use.kept_norm.norm.factors)
    assert plan.kept == kept + copies
    assert plan.peak == predict(planned, **step).peak + plan.kept


def test_what_differs_from_what_one_expects_is_said():
    (frozen,) = planned_model(OTHERS["mixtral"]).notes
    assert frozen.startswith("405,504 parameters of fused experts stay frozen: target_parameters=['mlp.experts.down")
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    planned = planned_model(OTHERS["mixtral"], dk.DoraConfig(target_parameters=stacks))
    assert planned.notes == ["experts have tokens × top_k rows in a layer, however the router shares them out"]
    eager = Gemma2Config(**SIZES)
    assert "attention is eager: its scores are counted" in planned_model(eager).notes


FORMAT_SIZES = {"hidden_size": 128, "intermediate_size": 256}
"""Which groups of 128 and of 32 divide."""


@pytest.mark.parametrize(
    ("base_format", "merge_aware"),
    [
        ("fp8", False),
        ("int4", False),
        ("fp8", True),
        *(slow(*case) for case in (("nvfp4", False), ("mxfp4", False), ("nf4", True), ("", True))),
    ],
)
def test_the_peak_of_a_step_over_a_format(base_format, merge_aware):
    step = {"base_format": base_format, "merge_aware": merge_aware, "checkpointing": merge_aware}
    assert_predicted(LlamaConfig(**SIZES | FORMAT_SIZES), 2, 128, **step)
