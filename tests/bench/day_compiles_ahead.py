"""What a day compiles ahead is found by the launch: Triton looks it up by the same key. `make rehearse` runs it.

Named so that plain `pytest` leaves it out.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# In a process of its own, for in this one kernels are interpreted. Triton asks its driver for a GPU, and then compiles.
FOUND = """
from unittest import mock
from triton.compiler import make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from bench.counting.cases import Case, BF16, FP32, call
from bench.counting.launches import launches, target_of
from dora_kernels.ops import dispatch

# A rank of the day's kind: where 8 does not divide it, a layer's columns of h start at addresses that 16 does not
# divide, which tensors without addresses do not show.
CAPABILITY, SIZES = (9, 0), (8, 48, 72, 16)
CASES = [Case(BF16, FP32, "token", *SIZES), Case(BF16, FP32, "weight", *SIZES, mlp="silu")]
CASES += [Case(BF16, FP32, "auto", *SIZES, siblings=(48, 16, 16))]

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: target_of(CAPABILITY))

looked_up = []

def note(self, key, signature, device, constexprs, options, attrs, warmup):
    looked_up.append((self.ASTSource(self, signature, constexprs, attrs).hash(), options.hash()))

def run(self, *args, grid, warmup=False, _run=JITFunction.run, **options):
    return _run(self, *args, grid=grid, warmup=True, **options)

backend = make_backend(target_of(CAPABILITY))
ahead = {
    (launch.source().hash(), backend.parse_options(dict(launch.options)).hash())
    for launch in launches(CASES, CAPABILITY)
}
driver.set_active(Driver())
with mock.patch.object(dispatch, "_why_no_triton", lambda device: None), \
     mock.patch.object(JITFunction, "_do_compile", note), mock.patch.object(JITFunction, "run", run):
    for case in CASES:
        call(case)
assert looked_up and set(looked_up) == ahead, (len(looked_up), len(ahead), len(set(looked_up) & ahead))
"""
BLOCKS = """
import torch
from bench import experts
from bench.contestants import block, experts as experts_field, model
from bench.counting.gpus import ROOFS
from bench.counting.launches import launches
from bench.counting.layer_counts import count
from bench.counting.model_counts import count_step
from bench.day.compile_ahead import cases
from bench.measuring.shapes import PRESETS

PRESET, BF16, CAPABILITY = PRESETS["rehearsal"], torch.bfloat16, (9, 0)

def parts():
    for _, shape, tokens, rank in PRESET.blocks():
        for name, contestant in block.counted(shape.name, BF16).items():
            if name.startswith("ours"):
                yield name, count(contestant, shape, tokens, rank, BF16, CAPABILITY)[0]
    for _, shape, tokens, rank in PRESET.experts():
        for space in ("auto", "token", "weight"):
            build = experts_field.counted(shape, rank, BF16, space)["ours fp32"]
            found = experts.count(build, shape, tokens, BF16, ROOFS["h200"])
            yield f"ours, {space}, of experts", found["operations"]
    for run in PRESET.runs:
        for name, contestant in model.field_of(run, BF16).items():
            if name.startswith("ours"):
                yield f"{name} in a model", count_step(run, contestant, BF16, CAPABILITY, 2).parts

ahead = launches(cases("rehearsal"), CAPABILITY)
made = {o.launch.launch: name for name, found in parts() for part in found.values() for o in part if o.launch}
missing = [f"{name}: {launch}" for launch, name in made.items() if launch not in ahead]
assert {"glu_fwd", "glu_bwd", "expert_glu_fwd", "expert_rescale_fwd"} <= {launch.name for launch in made}
assert not missing, missing
"""


def run(program):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_kernel_compiled_ahead_is_what_its_launch_looks_up():
    run(FOUND)


def test_every_kernel_of_a_days_blocks_experts_and_models_is_compiled_ahead():
    run(BLOCKS)
