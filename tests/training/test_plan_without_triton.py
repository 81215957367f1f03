"""`dora-plan` where Triton is missing: what is counted is the same."""

import subprocess
import sys
from pathlib import Path

from training.memory_model import planned_model, predict

CASES = """
from transformers import LlamaConfig, MixtralConfig
import dora_kernels as dk

sizes = dict(vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
experts = dk.DoraConfig(r=8, target_modules=["q_proj"], target_parameters=stacks)
cases = [
    (LlamaConfig(**sizes), dk.DoraConfig(space="token"), "", False),
    (LlamaConfig(**sizes), dk.DoraConfig(), "nf4", True),
    (MixtralConfig(**sizes, num_key_value_heads=4, num_local_experts=4), experts, "", False),
]
"""
PLANS = """
found = [
    predict(planned_model(config, dora, base_format=form), batch_size=2, cutoff_len=32, keep_weights=keep)
    for config, dora, form, keep in cases
]
"""
WITHOUT = """
import sys
sys.modules["triton"] = None  # what an import of it then raises is what a missing package raises
from dora_kernels.ops import dispatch
from training.memory_model import planned_model, predict
from training.planning.fake_gpu import fake_gpu
"""
THEN = """
print([tuple(memory) for memory in found])
assert dispatch.kernels is None and sys.modules["triton"] is None
try:
    with fake_gpu(launched=print):
        pass
except ValueError as error:
    print(error)
"""


def test_what_is_counted_is_the_same():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT + CASES + PLANS + THEN]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    names = {"planned_model": planned_model, "predict": predict}
    exec(CASES + PLANS, names)
    counted, refused = run.stdout.splitlines()
    assert counted == str([tuple(memory) for memory in names["found"]])
    assert refused.startswith("what a GPU would run is counted from its kernels, which are missing:")
