"""The real Trainer and the real SFTTrainer: 50 steps, patched and unpatched, beside an engine that is wrong on purpose.

In fp64, where two right engines differ by 1e-15 a step and a wrong gradient by far more, even after 50 steps of AdamW.
"""

import copy
from types import SimpleNamespace

import datasets
import peft
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from dora_kernels.peft import patched_peft, unpatch_peft
from dora_kernels.peft.callback import DoraKernelsCallback, check_liger
from tests.support.peft_models import assert_close, count_fused, dora_config, frozen_magnitude
from tests.support.tiny_models import VOCAB, llama

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]
STEPS = 50
AGREE, DIFFER, PARAMETERS = 1e-6, 1e-2, 1e-11
"""Bounds on |loss − PEFT's loss| at any step, right and wrong (transformers computes it in fp32), and on the relative
difference of the trained parameters. Measured: 0, 0.2 and 2e-15."""


def arguments(folder, cls=TrainingArguments, **options):
    return cls(
        output_dir=str(folder),
        max_steps=STEPS,
        learning_rate=5e-2,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        seed=0,
        **options,
    )


def losses(trainer):
    """The loss of each step, to the last bit: the trainer's log is rounded."""
    curve, compute_loss = [], trainer.compute_loss

    def recorded(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        curve.append(loss.item())
        return loss

    trainer.compute_loss = recorded
    trainer.train()
    assert len(curve) == STEPS
    return torch.tensor(curve, dtype=torch.float64)


def run_trainer(folder, callbacks=(), dropout=0.0):
    torch.manual_seed(0)
    config = dora_config(lora_dropout=dropout, target_modules=["q_proj", "up_proj", "down_proj"])
    model = peft.get_peft_model(llama(torch.float64, layers=1), config)
    tokens = [{"input_ids": row, "labels": row} for row in (torch.arange(64 * 8).reshape(64, 8) * 7 % VOCAB).tolist()]
    trainer = Trainer(
        model, arguments(folder), train_dataset=datasets.Dataset.from_list(tokens), callbacks=list(callbacks)
    )
    return losses(trainer), trainer


def tokenizer():
    words = {f"w{index}": index for index in range(VOCAB - 3)} | {"<pad>": 58, "</s>": 59, "<unk>": 60}
    splitter = Tokenizer(WordLevel(words, unk_token="<unk>"))
    splitter.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="</s>")


def run_sft(folder, callbacks=()):
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    texts = [{"text": " ".join(f"w{(start + 3 * i) % 50}" for i in range(8))} for start in range(64)]
    trainer = SFTTrainer(
        model=llama(torch.float64, layers=1),
        args=arguments(folder, SFTConfig, max_length=16, gradient_checkpointing=False, bf16=False),
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer(),
        peft_config=dora_config(target_modules=["q_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"),
        callbacks=list(callbacks),
    )
    return losses(trainer), trainer


def adapters(trainer):
    parameters = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(parameters) == 3 * 3
    return parameters


@pytest.mark.parametrize("run", [run_trainer, run_sft], ids=["Trainer", "SFTTrainer"])
def test_the_loss_curves_agree(run, tmp_path):
    expected, peft_trainer = run(tmp_path)
    callback = DoraKernelsCallback()
    with count_fused() as calls:
        actual, trainer = run(tmp_path, [callback])
    assert len(calls) == STEPS * 3
    assert len(callback.report.fused) == 3
    assert expected[-10:].mean() < expected[:10].mean() - 0.1, "the model learns"
    assert (actual - expected).abs().max() < AGREE
    assert_close(adapters(trainer), adapters(peft_trainer), PARAMETERS)
    with frozen_magnitude():
        wrong, _ = run(tmp_path, [DoraKernelsCallback()])
    assert (wrong - expected).abs().max() > DIFFER, "the control"
    assert len(unpatch_peft(trainer.model).state_dict()) == len(peft_trainer.model.state_dict())


def test_with_dropout_too(tmp_path):
    expected, _ = run_trainer(tmp_path, dropout=0.2)
    actual, _ = run_trainer(tmp_path, [DoraKernelsCallback()], dropout=0.2)
    assert (actual - expected).abs().max() < AGREE


def test_the_scope_reaches_a_trainer_that_builds_its_model(tmp_path):
    expected, _ = run_sft(tmp_path)
    with patched_peft(), count_fused() as calls:
        actual, _ = run_sft(tmp_path)
    assert len(calls) == STEPS * 3
    assert (actual - expected).abs().max() < AGREE


def test_the_callback_says_what_is_wrong(tmp_path):
    with pytest.raises(TypeError, match=r"DoraKernelsCallback\.__init__\(\) got an unexpected .*'speed'"):
        DoraKernelsCallback(speed="fast")
    with pytest.raises(ValueError, match="`space` should be one of"):
        DoraKernelsCallback(space="fast")
    callback = DoraKernelsCallback()
    with pytest.raises(ValueError, match="found no LoRA layer"):
        callback.on_train_begin(None, None, None, model=copy.deepcopy(llama()))


def test_liger_kernels_that_overwrite_outputs_are_refused():
    """tests/training/test_liger.py shows what they do to the magnitude's gradient."""
    callback = DoraKernelsCallback()
    with pytest.raises(ValueError, match=r"Liger's rope and swiglu and geglu overwrite .*'swiglu': False"):
        callback.on_train_begin(SimpleNamespace(use_liger_kernel=True, liger_kernel_config=None), None, None)
    off = {"rope": False, "geglu": False}
    with pytest.raises(
        ValueError, match=r"Liger's swiglu overwrite .*={'rope': False, 'geglu': False, 'swiglu': False}"
    ):
        callback.on_train_begin(SimpleNamespace(use_liger_kernel=True, liger_kernel_config=off), None, None)
    check_liger(SimpleNamespace(use_liger_kernel=True, liger_kernel_config=off | {"swiglu": False}))
    check_liger(SimpleNamespace(use_liger_kernel=False, liger_kernel_config=None))
