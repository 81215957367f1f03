"""Run by a Python that has the wheel or an editable install: what was installed is whole, works, and has one name each.

    python installed.py wheel|editable TREE

`TREE` is the unpacked source.
"""

import pkgutil
import sys
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

import dora_kernels as dk

kind, tree = sys.argv[1], Path(sys.argv[2]).resolve()
SHIPPED = {"dora_kernels": "dora_kernels", "dora_training": "training", "dora_bench": "bench"}

model = dk.apply_dora(nn.Sequential(nn.Linear(8, 4)), dk.DoraConfig(r=2, target_modules=["0"]))
model(torch.randn(3, 8)).sum().backward()
assert isinstance(model[0], dk.DoraLinear) and model[0].lora_B.grad is not None

modules = set()
for name, folder in SHIPPED.items():
    package = import_module(name)
    where = Path(str(files(package)))
    assert (where == tree / folder) is (kind == "editable"), f"{where} is not of the {kind} install"
    kept = {path.relative_to(tree / folder) for path in (tree / folder).rglob("*") if path.is_file()}
    wanted = {path for path in kept if path.suffix not in (".pyc", ".md")}
    missing = sorted(str(path) for path in wanted if not (where / path).is_file())
    assert not missing, f"{name} lacks {missing}"
    modules |= {module.name for module in pkgutil.walk_packages(package.__path__, f"{name}.")}
for module in modules:
    if not module.endswith("__main__"):
        import_module(module)
# A process with both would have two classes of each name.
assert len(modules) > 100 and not {"training", "bench"} & sys.modules.keys()
print(f"{', '.join(SHIPPED)} work from the {kind} install")
