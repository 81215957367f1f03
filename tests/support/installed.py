"""Run by a Python that has the wheel, from outside the clone: what was installed is whole and works."""

from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

import dora_kernels as dk

CLONE = Path(__file__).parents[2]

package = Path(str(files(dk)))
assert package != CLONE / "dora_kernels", f"{package} is the clone's, not the wheel's"
inside = {path.relative_to(CLONE / "dora_kernels") for path in (CLONE / "dora_kernels").rglob("*.py")}
missing = {path for path in inside if not (package / path).is_file()}
assert not missing and (package / "py.typed").is_file(), f"the wheel lacks {missing or 'py.typed'}"

model = dk.apply_dora(nn.Sequential(nn.Linear(8, 4)), dk.DoraConfig(r=2, target_modules=["0"]))
model(torch.randn(3, 8)).sum().backward()
assert isinstance(model[0], dk.DoraLinear) and model[0].lora_B.grad is not None
print(f"dora_kernels works from {package}")
