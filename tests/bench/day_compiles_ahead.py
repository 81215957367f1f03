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

CASE, CAPABILITY = Case(BF16, FP32, "token", 5, 48, 72, 16), (9, 0)

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
    for launch in launches([CASE], CAPABILITY)
}
driver.set_active(Driver())
with mock.patch.object(dispatch, "_why_no_triton", lambda device: None), \
     mock.patch.object(JITFunction, "_do_compile", note), mock.patch.object(JITFunction, "run", run):
    call(CASE)
assert looked_up and set(looked_up) == ahead, (len(looked_up), len(ahead), len(set(looked_up) & ahead))
"""


def test_a_kernel_compiled_ahead_is_what_its_launch_looks_up():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", FOUND], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
