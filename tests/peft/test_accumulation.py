"""A trainer that accumulates gradients keeps norms over the micro-steps of an optimizer step, and forgets them then."""

import datasets
import peft
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import dora_kernels as dk
from dora_kernels.layers.accumulating import norm_uses
from dora_kernels.peft.callback import AccumulatingCallback, DoraKernelsCallback
from tests.support.peft_models import assert_close, dora_config
from tests.support.tiny_models import VOCAB, llama

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
MICRO_STEPS, STEPS = 3, 2
ROWS = [{"input_ids": row, "labels": row} for row in (torch.arange(32 * 8).reshape(32, 8) * 7 % VOCAB).tolist()]


def from_peft(space="auto", **callback):
    model = peft.get_peft_model(llama(torch.float64, layers=1), dora_config(target_modules=["q_proj", "down_proj"]))
    return model, DoraKernelsCallback(space=space, **callback)


def of_ours(space="auto", **callback):
    config = dk.DoraConfig(r=4, target_modules=["q_proj", "down_proj"], space=space)
    return dk.apply_dora(llama(torch.float64, layers=1), config), AccumulatingCallback(**callback)


class Watched(Trainer):
    """Remembers before each micro-step whether every layer keeps norms, and how many have one."""

    def training_step(self, model, inputs, *args, **kwargs):
        uses = norm_uses(model)
        self.seen.append((all(use.keeps_norm for use in uses), sum(use.kept_norm is not None for use in uses)))
        return super().training_step(model, inputs, *args, **kwargs)


def trained(folder, model, callbacks, micro_steps=MICRO_STEPS, cls=Watched):
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        gradient_accumulation_steps=micro_steps,
        learning_rate=5e-2,
        per_device_train_batch_size=2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = cls(model, arguments, train_dataset=datasets.Dataset.from_list(ROWS), callbacks=callbacks)
    trainer.seen = []
    trainer.train()
    return trainer


def parameters(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("make", [from_peft, of_ours])
def test_norms_live_for_one_optimizer_step(make, tmp_path):
    torch.manual_seed(1)
    model, callback = make()
    trainer = trained(tmp_path, model, [callback])
    assert trainer.seen == [(True, 0), (True, 2), (True, 2)] * STEPS
    assert not any(use.keeps_norm or use.kept_norm for use in norm_uses(model))
    torch.manual_seed(1)
    plain, _ = make()
    other = trained(tmp_path, plain, [], cls=Trainer)
    assert other.state.global_step == STEPS
    assert_close(parameters(model), parameters(plain), 1e-11)


@pytest.mark.parametrize("make", [from_peft, of_ours])
def test_weights_live_for_one_optimizer_step(make, tmp_path):
    """On request, and to the same end."""
    seen = []

    class Looking(Watched):
        def training_step(self, model, *args, **kwargs):
            kept = [use.kept_weight for use in norm_uses(model)]
            seen.append([each is not None and not each.is_held for each in kept])
            return super().training_step(model, *args, **kwargs)

    ends = []
    for keeps in (True, False):
        torch.manual_seed(1)
        model, callback = make(space="weight", keep_weights=keeps)
        trained(tmp_path, model, [callback], cls=Looking)
        assert not any(use.kept_weight or use.keeps_weight for use in norm_uses(model))
        ends.append(parameters(model))
    assert seen == [[False] * 2, [True] * 2, [True] * 2] * STEPS + [[False] * 2] * STEPS * MICRO_STEPS
    for name, parameter in ends[0].items():
        assert torch.equal(parameter, ends[1][name]), name


def test_a_step_of_one_micro_step_copies_nothing(tmp_path):
    model, callback = of_ours()
    assert trained(tmp_path, model, [callback], micro_steps=1).seen == [(False, 0)] * STEPS


def test_a_scope_that_is_open_is_left_so(tmp_path):
    model, callback = of_ours()
    with dk.accumulating(model):
        trained(tmp_path, model, [callback])
        assert all(use.keeps_norm for use in norm_uses(model))


def test_an_error_leaves_no_scope_to_the_next_run(tmp_path):
    model, callback = of_ours()

    class Failing(Watched):
        def training_step(self, *args, **kwargs):
            super().training_step(*args, **kwargs)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        trained(tmp_path, model, [callback], cls=Failing)
    assert trained(tmp_path, model, [callback]).seen[0] == (True, 0)
    assert not any(use.keeps_norm for use in norm_uses(model))


def test_a_model_without_such_layers_trains(tmp_path):
    trainer = trained(tmp_path, llama(layers=1), [AccumulatingCallback()])
    assert len(trainer.seen) == MICRO_STEPS * STEPS


def test_merging_forgets_the_norm(tmp_path):
    """PEFT adds the update to W and subtracts it again: W is another one by a rounding."""
    model, _ = from_peft()
    dk.patch_peft(model.bfloat16())
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    nn.init.normal_(layer.lora_B["default"].weight)
    tokens = torch.tensor([ROWS[0]["input_ids"]])
    with dk.accumulating(model):
        before = model(tokens).logits
        before.sum().backward()
        assert layer.output_use.kept_norm is not None
        model.merge_adapter()
        model.unmerge_adapter()
        assert layer.output_use.kept_norm is None
