"""A checkpoint is complete or absent, damage is seen, and the newest sound one is never deleted."""

import json
import shutil

import pytest
import torch

from dora_kernels.adapters.atomic import write_atomic
from tests.support.disk_faults import Faults
from training.checkpoints import checkpoint as checkpoints
from training.checkpoints.checkpoint import (
    damage,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from training.checkpoints.lock import check_folder

ADAPTER = "adapter_model.safetensors"


def write_adapter(folder):
    (folder / ADAPTER).write_bytes(b"adapter" * 100)


def save(output_dir, step, keep=2):
    return save_checkpoint(
        output_dir, step, {"moment": torch.full((3,), float(step))}, {"step": step}, write_adapter, keep
    )


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    tensors = {"a": torch.randn(3, 5).T, "step": torch.tensor(7.0), "bytes": torch.arange(5, dtype=torch.uint8)}
    state = {"step": 7, "rate": 0.1 + 0.2, "words": [1, None, "x"]}
    path = save_checkpoint(tmp_path, 7, tensors, state, write_adapter)
    loaded, loaded_state = load_checkpoint(path)
    assert path.name == "checkpoint-7" and damage(path) is None
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert loaded_state == state
    assert not any(path.suffix in (".pt", ".bin", ".pkl") for path in path.rglob("*"))


def truncate(path):
    file = path / ADAPTER
    file.write_bytes(file.read_bytes()[:-1])
    return f"{ADAPTER} has 699 bytes"


def flip(path):
    file = path / "training_state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return "training_state.safetensors does not match its sha256"


def remove(path):
    (path / "training_state.json").unlink()
    return "training_state.json is missing"


def remove_manifest(path):
    (path / "manifest.json").unlink()
    return "manifest.json is missing"


def cut_manifest(path):
    file = path / "manifest.json"
    file.write_text(file.read_text()[:40])
    return "manifest.json is unreadable"


def empty_manifest(path):
    (path / "manifest.json").write_text('{"files": {}}')
    return "manifest.json names no file"


@pytest.mark.parametrize(
    "harm", [truncate, flip, remove, remove_manifest, cut_manifest, empty_manifest], ids=lambda harm: harm.__name__
)
def test_damaged_newest_is_skipped_out_loud(tmp_path, harm):
    older, newest = save(tmp_path, 10), save(tmp_path, 20)
    reason = harm(newest)
    said = []
    assert newest_checkpoint(tmp_path, said.append) == older
    assert len(said) == 1 and str(newest) in said[0] and reason in said[0]


def test_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None


def test_newest_is_by_number_and_other_folders_do_not_count(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step, keep=5)
    shutil.copytree(tmp_path / "checkpoint-100", tmp_path / "checkpoint-best")
    assert newest_checkpoint(tmp_path).name == "checkpoint-100"


def test_rotation_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-3"]


def test_rotation_counts_only_sound_ones(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    flip(tmp_path / "checkpoint-20")
    flip(tmp_path / "checkpoint-30")
    save(tmp_path, 15, keep=1)  # what a run resumed from 10 saves next
    assert newest_checkpoint(tmp_path, report=lambda text: None).name == "checkpoint-15"


def test_a_damaged_one_is_replaced(tmp_path):
    flip(save(tmp_path, 5))
    assert damage(save(tmp_path, 5)) is None


def test_a_failed_save_leaves_the_last_good_one_and_nothing_else(tmp_path):
    good = save(tmp_path, 1)

    def full_disk(folder):
        (folder / ADAPTER).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, {}, {}, full_disk)
    assert list(tmp_path.iterdir()) == [good] and damage(good) is None


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    leftover = tmp_path / ".tmp-3-12345"
    leftover.mkdir(parents=True)
    (leftover / "manifest.json").write_text(json.dumps({"files": {}}))
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, 4)
    assert not leftover.exists()


def test_files_are_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    """The order is the contract: manifest after the files it lists, rename after the manifest, parent last."""
    from training.checkpoints import checkpoint

    events = []
    sync, rename = checkpoint.sync, checkpoint.Path.rename
    monkeypatch.setattr(checkpoint, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(checkpoint.Path, "rename", lambda path, to: (events.append("rename"), rename(path, to))[1])
    save(tmp_path, 1)
    files = events[:3]
    assert sorted(files) == [ADAPTER, "training_state.json", "training_state.safetensors"]
    assert events[3] == "manifest.json" and events[4].startswith(".tmp-1-") and events[5:] == ["rename", tmp_path.name]


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="`keep` should be a positive number"):
        save(tmp_path, 1, keep=0)


def test_a_failed_rename_puts_back_what_stood_there(tmp_path):
    save(tmp_path, 5)
    with Faults(tmp_path) as counted:
        save(tmp_path, 5)
    second = [number for number, call in enumerate(counted.calls) if call.startswith("rename")][1]
    with Faults(tmp_path, second), pytest.raises(OSError, match="No space left"):
        save(tmp_path, 5)
    assert damage(tmp_path / "checkpoint-5") is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_checkpoint_that_cannot_be_read_is_skipped_out_loud(tmp_path, monkeypatch):
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    read = checkpoints._describe

    def bad_block(path):
        if newest in path.parents:
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(checkpoints, "_describe", bad_block)
    said = []
    assert newest_checkpoint(tmp_path, said.append) == older
    assert f"{newest}: {ADAPTER} cannot be read (Input/output error)" in said[0]


def test_links_are_taken_away_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("not ours")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("checkpoint-0", ".tmp-1-1"):
        (out / name).symlink_to(outside)
    (out / "log").symlink_to(outside / "file")
    save(out, 1, keep=1)
    write_atomic(out / "log", "ours")
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-1", "log"]
    assert (outside / "file").read_text() == "not ours" and (out / "log").read_text() == "ours"


def test_an_output_folder_that_cannot_be_is_refused_first(tmp_path, monkeypatch):
    check_folder(tmp_path / "new" / "run", resume=False)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`--output_dir` \S+file/run cannot be a run's folder: \S+file is no folder"):
        check_folder(tmp_path / "file" / "run", resume=False)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written to"):
        check_folder(tmp_path / "new", resume=False)
    assert not (tmp_path / "new").exists()
