"""The recipe for reinforcement learning, run with TRL: what the engine gets is W' of each step, and the base stays."""

import pytest
import torch

from tests.support.doc_blocks import ROOT, blocks
from tests.support.oracle import relative_error
from tests.test_docs import REAL, TINY
from tests.tolerances import SAME_FP32

pytestmark = pytest.mark.filterwarnings("ignore")
RATE = ('report_to="none"', 'report_to="none", learning_rate=0.01, save_strategy="no"')
FP32 = ("dtype=torch.bfloat16", "dtype=torch.float32")


def test_the_engine_gets_the_weights_of_each_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "docs" / "reinforcement-learning.md", "python")
    text = block.text.replace(REAL, TINY).replace(*RATE).replace(*FP32)
    setup, train, _ = text.rpartition("trainer.train()")
    names = {"__name__": "__main__"}
    exec(setup, names)
    trainer, engine, sent = names["trainer"], names["engine"], []
    load = engine.load_weights
    monkeypatch.setattr(engine, "load_weights", lambda weights: (load(weights), sent.append(engine.weights)))
    base = {name: tensor.clone() for name, tensor in trainer.model.named_parameters() if not tensor.requires_grad}
    exec(train, names)

    model = trainer.model
    assert len(sent) == 3, "before the first step, and after each of two"
    parameters = dict(model.named_parameters())
    assert base and all(torch.equal(parameters[name], tensor) for name, tensor in base.items())
    moved = 0
    for path, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_magnitude_vector"):
            continue
        assert hasattr(layer, "dora_fusion"), path
        lora_A, lora_B = (getattr(layer, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
        magnitude, weight = layer.lora_magnitude_vector["default"].weight.double(), layer.base_layer.weight.double()
        adapted = weight + layer.scaling["default"] * lora_B @ lora_A
        expected = magnitude[:, None] * adapted / adapted.norm(dim=1, keepdim=True)
        assert relative_error(sent[0][f"{path}.weight"], weight) <= SAME_FP32
        assert relative_error(sent[-1][f"{path}.weight"], expected) <= SAME_FP32
        moved += relative_error(sent[-1][f"{path}.weight"], sent[1][f"{path}.weight"]) > 1e-4
    assert moved > 0
    assert set(sent[0]) == {name for name, _ in type(model.get_base_model())(model.config).named_parameters()}
