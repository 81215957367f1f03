"""What PEFT lets one do with a model means the same in a patched one."""

import copy
import pickle

import peft
import pytest
import torch
from peft.helpers import DoraCaching

from dora_kernels.peft import patch_peft
from tests.support.peft_models import assert_close, count_fused, dora_config, infer, step, trained, twins

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# What a user may do to a model: each runs on a patched and an unpatched one. A number is how many calls are fused.
def _disabled(model):
    with model.disable_adapter():
        off = infer(model)
    return {"off": off["logits"]} | infer(model)


def _merged(model, **options):
    model.merge_adapter(**options)
    merged = infer(model)
    weights = {f"merged {n}": p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.unmerge_adapter()
    return {"merged": merged["logits"]} | weights | infer(model)


def _merged_and_unloaded(model, **options):
    return infer(model.merge_and_unload(**options))


def _another_adapter(model):
    torch.manual_seed(1)
    model.add_adapter("other", dora_config(r=2, target_modules=["q_proj", "up_proj", "c_attn"]))
    trained(model, seed=5, adapter="other")
    before = infer(model)
    model.set_adapter("other")
    other = step(model)
    model.set_adapter("default")
    return {"before": before["logits"], "other": other["logits"]} | step(model)


def _deleted(model):
    _another_adapter(model)
    model.delete_adapter("default")
    model.set_adapter("other")
    return step(model)


def _two_active(model):
    _another_adapter(model)
    model.base_model.set_adapter(["default", "other"])
    return step(model)


def _lora_beside(model):
    torch.manual_seed(1)
    model.add_adapter("plain", dora_config(use_dora=False, init_lora_weights=False))
    model.set_adapter("plain")
    lora = step(model)["logits"]
    model.set_adapter("default")
    return {"lora": lora} | step(model)


def _cached(model):
    model.eval()
    with DoraCaching():
        first = infer(model)["logits"]
        caches = [len(m._dora_cache) for m in model.modules() if hasattr(m, "_dora_cache")]
        assert caches and all(caches), "PEFT's caches fill"
        second = infer(model)["logits"]
    outside = infer(model)
    assert not any(m._dora_cache for m in model.modules() if hasattr(m, "_dora_cache")), "and are emptied"
    return {"first": first, "second": second} | outside


def _scaled(model):
    with peft.helpers.rescale_adapter_scale(model, 0.5):
        halved = infer(model)["logits"]
    return {"halved": halved} | infer(model)


def _checkpointed(model, use_reentrant):
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return step(model)


ACTS = {
    "disable_adapter": (_disabled, 14),
    "merge_and_unmerge": (_merged, 14),
    "safe_merge": (lambda model: _merged(model, safe_merge=True), 14),
    "merge_and_unload": (_merged_and_unloaded, 0),
    "merge_and_unload_safely": (lambda model: _merged_and_unloaded(model, safe_merge=True), 0),
    "unload": (lambda model: infer(model.unload()), 0),
    "add_and_set_adapter": (_another_adapter, 14 + 4 + 14),
    "delete_adapter": (_deleted, 14 + 4 + 14 + 4),
    # Ten layers have one active adapter, four have two.
    "two_active_adapters": (_two_active, 14 + 4 + 14 + 10),
    "lora_beside_dora": (_lora_beside, 14),
    "dora_caching": (_cached, 14),
    "rescaled": (_scaled, 28),
    # The recomputation runs each layer again.
    "activation_checkpointing": (lambda model: _checkpointed(model, use_reentrant=False), 28),
    "reentrant_checkpointing": (lambda model: _checkpointed(model, use_reentrant=True), 28),
    "frozen_adapter": (lambda model: infer(model.requires_grad_(False)), 14),
    "deepcopy": (lambda model: step(copy.deepcopy(model)), 14),
    "pickle": (lambda model: step(pickle.loads(pickle.dumps(model))), 14),
}


@pytest.mark.parametrize(("act", "fused"), ACTS.values(), ids=ACTS)
def test_acts(act, fused):
    plain, patched = twins()
    patch_peft(patched)
    expected = act(plain)
    with count_fused() as calls:
        assert_close(act(patched), expected)
    assert len(calls) == fused
