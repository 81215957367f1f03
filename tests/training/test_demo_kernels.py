"""The demo's model and data through the real kernels, interpreted: the curve must be the reference path's."""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dora_kernels as dk
from tests.support.buffers import count_launches
from tests.tolerances import AFTER_ADAM
from training import demo
from training.minimal.batches import encode, read_splits
from training.minimal.loop import LoopSettings, train

STEPS = 4


def _losses(impl, folder):
    """Losses of steps on one row, the demo's shortest, so that few of them learn; and the launches they took."""
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE)
    shortest = min(read_splits(demo.DATA)["train"], key=lambda row: len(row["prompt"] + row["completion"]))
    examples = encode([shortest] * STEPS, tokenizer, 256)
    model = AutoModelForCausalLM.from_pretrained(demo.BASE, dtype=torch.float32)
    torch.manual_seed(0)
    model = dk.apply_dora(model, dk.DoraConfig(r=8, lora_alpha=16, impl=impl))
    settings = LoopSettings(batch_size=1, max_steps=STEPS, learning_rate=5e-3)
    with count_launches() as launches:
        train(
            model, examples, [], settings, output_dir=folder, pad_id=tokenizer.pad_token_id,
            write_adapter=lambda path: dk.save_adapter(model, path),
            read_adapter=lambda path: dk.load_adapter(model, path),
        )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows]), launches


def test_steps_through_the_kernels(tmp_path):
    found, launches = _losses("triton", tmp_path / "triton")
    expected, none = _losses("reference", tmp_path / "reference")
    assert found.shape == expected.shape == (STEPS,)
    assert torch.allclose(found, expected, rtol=AFTER_ADAM), (found - expected).abs().max()
    assert expected[-1] < 0.7 * expected[0], "the curve goes somewhere, or the comparison would be idle"
    assert not none
    # Every layer, every step, forward and backward: none fell back. Gate and up share a finishing launch.
    linears, blocks = 14, 2
    assert launches["_rescale_bwd_finish_kernel"] == (linears - blocks) * STEPS
    assert launches["_glu_fwd_kernel"] == launches["_glu_bwd_kernel"] == blocks * STEPS
