"""A run on a bad disk, in a folder with links in it, or from an adapter that PEFT would take as it is."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_kernels as dk
from tests.support.disk_faults import Faults
from tests.support.tiny_models import llama
from tests.support.training_runs import arguments, data, run  # noqa: F401
from training.__main__ import main
from training.checkpoints.checkpoint import list_checkpoints
from training.checkpoints.metrics import append_row, keep_until, read_rows
from training.flags import Flags
from training.model.adapter import add_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
WEIGHTS = "adapter_model.safetensors"
SHORT = {"max_steps": 2, "save_step": 1, "eval_step": 0}


def test_a_run_writes_through_no_link_and_a_full_disk_at_its_end_keeps_the_old_adapter(data, tmp_path):  # noqa: F811
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.write_text("not ours")
    out.mkdir()
    names = ("README.md", "loss.png", "metrics.jsonl", "metrics.jsonl.tmp", "tokenizer.json", WEIGHTS)
    for name in names:
        (out / name).symlink_to(outside)
    run(data, out, **SHORT)
    assert outside.read_text() == "not ours"
    assert not any((out / name).is_symlink() for name in names)
    before = (out / WEIGHTS).read_bytes()
    with Faults(out) as counted:
        main(arguments(data, out, "--resume", **SHORT))  # a finished run: only its last files are written again
    last = [(number, call) for number, call in enumerate(counted.calls) if "/.finish-" in call]
    strikes = {call.split()[0]: number for number, call in last}  # the last of each kind
    for strike in (strikes["tensors"], strikes["tokenizer"], strikes["replace"]):
        with (
            Faults(out, strike),
            pytest.raises(SystemExit, match=r"No space left[^;]*; .*checkpoint-2 is sound: continue"),
        ):
            main(arguments(data, out, "--resume", **SHORT))
        assert (out / WEIGHTS).read_bytes() == before
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-2", "checkpoint-1"]
    assert not list(out.glob(".finish-*")) and not list(out.glob(".adapter-*"))


def test_the_lock_is_no_link(data, tmp_path):  # noqa: F811
    (tmp_path / "outside").write_text("not ours")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "outside")
    with pytest.raises(SystemExit, match=r"error: .*\.lock"):
        main(arguments(data, tmp_path / "out", **SHORT))
    assert (tmp_path / "outside").read_text() == "not ours"


def test_a_damaged_log_is_named_and_a_new_run_begins_its_own(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_row(path, {"step": step})
    path.write_text(path.read_text().replace('"step": 2', '"step; 2'))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged.*move the file away"):
        keep_until(path, 3)
    keep_until(path, -1)
    assert read_rows(path) == []


def without_a_key(tensors):
    tensors.pop(next(name for name in tensors if "magnitude" in name))


def with_nan(tensors):
    tensors[next(iter(tensors))][0] = torch.nan


def with_integers(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name].long()


@pytest.mark.parametrize("harm", [without_a_key, with_nan, with_integers], ids=lambda harm: harm.__name__)
def test_peft_continues_whole_adapters_only(harm, tmp_path):
    model = peft.get_peft_model(llama(), peft.LoraConfig(use_dora=True, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    flags = Flags(init_adapter=str(tmp_path), use_peft=True)
    add_adapter(llama(), flags)
    harm(tensors)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"`--init_adapter` .* (does not fit the model|holds NaN)"):
        add_adapter(llama(), flags)


def test_an_adapter_on_the_head_is_continued_where_it_trains(tmp_path):
    dk.save_adapter(dk.apply_dora(llama(), dk.DoraConfig(target_modules=["q_proj", "lm_head"])), tmp_path)
    add_adapter(llama(), Flags(init_adapter=str(tmp_path)))
    with pytest.raises(ValueError, match=r"`--init_adapter` .* adapts the head: .* PEFT's adapter"):
        add_adapter(llama(), Flags(init_adapter=str(tmp_path), use_peft=True))
    config = dk.DoraConfig(target_modules=["q_proj", "lm_head"], lora_dropout=0.1)
    dk.save_adapter(dk.apply_dora(llama(), config), tmp_path)
    with pytest.raises(ValueError, match=r"`--init_adapter` .* adapts the head: .* has no dropout"):
        add_adapter(llama(), Flags(init_adapter=str(tmp_path)))


def test_peft_is_not_handed_a_damaged_adapter_of_ours(tmp_path):
    dk.save_adapter(dk.apply_dora(llama(), dk.DoraConfig(target_modules=["q_proj"])), tmp_path)
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-20] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="do not match their sha256"):
        add_adapter(llama(), Flags(init_adapter=str(tmp_path), use_peft=True))
