"""Four processes compile one kernel at the same moment, as `torchrun` starts them, into a cache that is empty."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Importing is paid once: the processes are forked before the compiler has started threads.
PROGRAM = """
import hashlib, multiprocessing, torch, triton
from bench.counting.launches import Recorder, target_of
from dora_kernels.ops.kernels.cast import _scaled_cast_kernel
from dora_kernels.ops.kernels.launch import TRITON_DTYPES

def compiled(barrier, found):
    x = torch.empty(64, 128, device="meta")
    arguments = (x, x, x, 2.0, 64, 128, 7, 128, 1, TRITON_DTYPES[torch.float32], False, True, 16, 128)
    launch = Recorder((9, 0)).bind(_scaled_cast_kernel, *arguments, num_warps=4)
    source = launch.source()
    barrier.wait()
    kernel = triton.compile(source, target=target_of((9, 0)), options=dict(launch.options))
    found.put(hashlib.sha256(kernel.asm["cubin"]).hexdigest())

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(4, timeout=60), context.Queue()
    processes = [context.Process(target=compiled, args=(barrier, found)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    print(*(found.get(timeout=10) for _ in processes))
"""


@pytest.mark.slow
def test_four_processes_fill_an_empty_cache_together(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
    )
    assert run.returncode == 0, run.stderr
    hashes = run.stdout.split()
    assert len(hashes) == 4 and len(set(hashes)) == 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".cubin" for path in files) == 1, "the kernel is there once"
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.relative_to(tmp_path).as_posix()], "and whole"
