"""A user's program for the type checker, which `make lint` runs over it: who passes a model gets its class back."""

import torch
from torch import nn
from typing_extensions import assert_type

import dora_kernels as dk


class Net(nn.Module):
    """A model with a method of its own, as transformers' have `generate`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.linear(x))

    def generate(self) -> int:
        return 1


net = dk.apply_dora(Net(), dk.DoraConfig(r=4, target_modules=["linear"]))
assert_type(net, Net)
assert_type(dk.load_adapter(net, "adapter"), Net)
with dk.frozen_adapters(net) as frozen:
    assert_type(frozen, Net)
with dk.accumulating(net, keep_weights=True) as accumulated:
    assert_type(accumulated, Net)
assert_type(dk.merge_dora(net, keep_base=True).generate(), int)
assert_type(dk.unmerge_dora(net), Net)
dk.save_adapter(net, "adapter", compat="transformers")
for explanation in dk.explain(net, tokens=8192):
    assert_type(explanation.plan.space, str)

report = dk.patch_peft(net, space="auto", impl="auto", rounding="nearest")
assert_type(report, dk.PatchReport)
assert_type(report.fused, list[str])
assert_type(report.skipped, dict[str, str])
assert_type(dk.unpatch_peft(net), Net)
with dk.patched_peft(space="token"):
    pass
assert_type(dk.DoraKernelsCallback(impl="auto").report, dk.PatchReport | None)
assert_type(dk.AccumulatingCallback(), dk.AccumulatingCallback)

layer = dk.DoraLinear.from_linear(nn.Linear(8, 8), r=4, lora_alpha=8, use_rslora=True)
assert_type(layer, dk.DoraLinear)
assert_type(layer.merged_weight(), torch.Tensor)
y = dk.dora_linear(torch.ones(1, 8), layer.base_weight, layer.lora_A, layer.lora_B, layer.magnitude, scaling=2.0)
assert_type(y, torch.Tensor)
