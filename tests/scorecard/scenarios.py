"""What writes: each scenario begins with something good, and is to keep it, or replace it by something whole."""

import functools
import shutil
import tempfile
from pathlib import Path

from .small import adapter_folder, base, base_folder, model, rows_file


class Scenario:
    """Something good in `folder`, and what writes over it or beside it."""

    errors: tuple = (OSError,)

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self) -> None:
        raise NotImplementedError

    def check(self, failed: bool) -> None:
        """Asserts that what is there is good; `failed`: the write raised."""
        raise NotImplementedError

    def remember(self) -> None:
        """Called when the fault is about to happen."""


class Checkpoint(Scenario):
    """The third checkpoint of a run, whose older ones are rotated."""

    def __init__(self, folder):
        super().__init__(folder)
        self.out, self.sound = folder / "out", []
        for step in (1, 2):
            self.save(step)

    def save(self, step):
        import torch

        import dora_kernels as dk
        from training.checkpoints.checkpoint import save_checkpoint

        tensors = {"moment": torch.full((3,), float(step))}
        save_checkpoint(self.out, step, tensors, {"step": step}, lambda path: dk.save_adapter(model(step), path))

    def write(self):
        from safetensors import SafetensorError

        try:
            self.save(3)
        except SafetensorError as error:  # the commands' own `except` turns both into one sentence
            raise OSError(str(error)) from error

    def remember(self):
        from training.checkpoints.checkpoint import damage, list_checkpoints, step_of

        self.sound = [step_of(path) for path in list_checkpoints(self.out) if damage(path) is None]

    def check(self, failed):
        import dora_kernels as dk
        from training.checkpoints.checkpoint import load_checkpoint, newest_checkpoint, step_of

        newest = newest_checkpoint(self.out, report=lambda text: None)
        step = step_of(newest)
        assert step >= max(self.sound), f"{max(self.sound)} was sound, now {step} is the newest"
        tensors, state = load_checkpoint(newest)
        assert state == {"step": step} and tensors["moment"].tolist() == [step] * 3
        same_adapter(dk.load_adapter(base(), newest), model(step))


class Adapter(Scenario):
    """An adapter of another rank over one that is there."""

    def __init__(self, folder):
        super().__init__(folder)
        self.save(1)

    def save(self, step):
        import dora_kernels as dk

        dk.save_adapter(model(step), self.folder / "out")

    def write(self):
        self.save(5)

    def check(self, failed):
        import dora_kernels as dk

        loaded = dk.load_adapter(base(), self.folder / "out")
        step = 5 if loaded.dora_config.r == model(5).dora_config.r else 1
        assert failed or step == 5
        same_adapter(loaded, model(step))


class Metrics(Scenario):
    """A log, cut back to a step and gone on with."""

    def __init__(self, folder):
        super().__init__(folder)
        from training.checkpoints.metrics import append_row

        self.path = folder / "metrics.jsonl"
        for step in range(1, 6):
            append_row(self.path, {"step": step, "loss": step / 7})

    def write(self):
        from training.checkpoints.loss_plot import plot_losses
        from training.checkpoints.metrics import append_row, keep_until

        keep_until(self.path, 3)
        append_row(self.path, {"step": 4, "loss": 4 / 7})
        plot_losses(self.path, self.folder / "loss.png", "DoRA")

    def check(self, failed):
        from training.checkpoints.metrics import read_rows

        steps = [row["step"] for row in read_rows(self.path)]
        assert steps[:3] == [1, 2, 3] and (failed or steps == [1, 2, 3, 4]), steps


class Merge(Scenario):
    """A new folder with a model; nothing of it is there unless all is."""

    module, words = "merge", ()
    errors = (SystemExit,)

    def write(self):
        import importlib

        command = importlib.import_module(f"training.{self.module}")
        words = ["--base_model", base_folder(), "--adapter", adapter_folder(), "--output_dir", self.folder / "out"]
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        command.main([*map(str, words), *self.words])

    def check(self, failed):
        left = sorted(path.name for path in self.folder.iterdir())
        assert left == ([] if failed else ["out"]), left
        if not failed:
            assert contents(self.folder / "out") == whole(type(self).__name__)


class Export(Merge):
    module, words = "export", ("--to", "lora", "--rank", "2")


class Run(Scenario):
    """Training from the first file to the last, over a folder in which an earlier adapter is."""

    errors = (SystemExit,)

    def __init__(self, folder):
        super().__init__(folder)
        import dora_kernels as dk

        self.out, self.sound = folder / "out", []
        dk.save_adapter(model(1), self.out)

    def write(self, *bare):
        from tests.support.training_runs import arguments
        from training.__main__ import main

        main(arguments(rows_file(), self.out, *bare, base_model=base_folder(), max_steps=4, eval_step=0, lora_r=3))

    remember = Checkpoint.remember

    def check(self, failed):
        import dora_kernels as dk
        from training.checkpoints.checkpoint import newest_checkpoint, step_of

        newest = newest_checkpoint(self.out, report=lambda text: None)
        assert (step_of(newest) if newest else 0) >= max(self.sound, default=0)
        loaded = dk.load_adapter(base(), self.out)
        if loaded.dora_config.r == model(1).dora_config.r:
            assert failed
            same_adapter(loaded, model(1))
        else:
            assert adapter_bytes(self.out) == whole("Run")[WEIGHTS]
        if failed:
            self.write("--resume")
            assert adapter_bytes(self.out) == whole("Run")[WEIGHTS]


WEIGHTS = "adapter_model.safetensors"
SCENARIOS = {"checkpoint": Checkpoint, "adapter": Adapter, "metrics": Metrics}
SCENARIOS |= {"merge": Merge, "export": Export, "run": Run}


@functools.cache
def whole(name: str) -> dict[str, bytes]:
    """What the scenario writes where nothing fails."""
    with tempfile.TemporaryDirectory() as folder:
        scenario = {"Merge": Merge, "Export": Export, "Run": Run}[name](Path(folder))
        scenario.write()
        return contents(Path(folder, "out"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def adapter_bytes(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


def same_adapter(loaded, expected) -> None:
    import torch

    trained = {name: p for name, p in expected.named_parameters() if p.requires_grad}
    actual = {name: p for name, p in loaded.named_parameters() if p.requires_grad}
    assert actual.keys() == trained.keys()
    assert all(torch.equal(actual[name], p) for name, p in trained.items()), "another adapter"
