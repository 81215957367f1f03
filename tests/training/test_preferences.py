"""`--task dpo`, `kto` and `orpo`: the rows, PEFT's numbers, and an exact resume."""

import json
import os
import signal

import pytest
from transformers import AutoTokenizer

from tests.support.marks import slow
from tests.support.training_runs import arguments, demo_rows, metrics, numbers, one_layer_base, run, write_rows
from training import demo
from training.__main__ import main
from training.data.rows import load_rows
from training.finetune.resumable import Resumable

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
TASKS = ("dpo", "kto", "orpo")
WEIGHTS = "adapter_model.safetensors"


def preferences(task, count=16):
    rows = demo_rows(count)
    if task == "kto":
        return [row | {"label": number % 2 == 0} for number, row in enumerate(rows)]
    worse = [rows[number - 1]["completion"] for number in range(count)]
    return [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": bad} for row, bad in zip(rows, worse)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return one_layer_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("task", TASKS)
def test_the_losses_are_those_of_pefts_own_code(task, base, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", preferences(task))
    flags = {"base_model": base, "task": task, "max_steps": 3, "eval_step": 0, "save_step": 0, "val_set_size": 0}
    ours = run(data, tmp_path / "ours", **flags)
    theirs = run(data, tmp_path / "theirs", "--use_peft", "--no-fused", **flags)
    assert len(ours) == 3 and ours[-1]["loss"] != pytest.approx(ours[0]["loss"], rel=1e-4)
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)
    assert f"- {task}\n" in (tmp_path / "ours/README.md").read_text()


@pytest.mark.parametrize("task", ["dpo", slow("kto"), slow("orpo")])
def test_a_stopped_run_ends_with_the_same_bits(task, base, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "rows.jsonl", preferences(task))
    flags = {"base_model": base, "task": task, "max_steps": 4, "eval_step": 2, "save_step": 100, "val_set_size": 4}
    run(data, tmp_path / "whole", **flags)
    step = Resumable.training_step

    def interrupted(self, *args, **options):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Resumable, "training_step", interrupted)
        run(data, tmp_path / "out", **flags)
    assert (tmp_path / "out/checkpoint-3").is_dir() and not (tmp_path / "out" / WEIGHTS).exists()
    main(arguments(data, tmp_path / "out", "--resume", **flags))
    assert numbers(metrics(tmp_path / "out")) == numbers(metrics(tmp_path / "whole"))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


ASK = {"role": "user", "content": "Who?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Me.", "No."))
PAIR = {"prompt": "Who?", "chosen": "Me.", "rejected": "No."}
JUDGED = {"prompt": "Who?", "completion": "Me.", "label": True}


def load(path, task, **options):
    settings = {"cutoff_len": 256, "val_set_size": 0, "bad_row_limit": 0.9, "seed": 0}
    return load_rows(str(path), AutoTokenizer.from_pretrained(demo.BASE), task=task, **settings | options)


@pytest.mark.parametrize(
    "task, row, reason",
    [
        ("dpo", PAIR | {"rejected": "Me."}, "`chosen` and `rejected` are the same"),
        ("dpo", PAIR | {"chosen": " "}, "`chosen` is empty"),
        ("orpo", PAIR | {"rejected": None}, "`rejected` is missing"),
        ("orpo", PAIR | {"chosen": [GOOD]}, "`chosen`, `rejected`, `prompt` should all be texts, or all messages"),
        ("kto", JUDGED | {"label": "perhaps"}, "`label` should be true or false, got 'perhaps'"),
        ("kto", JUDGED | {"prompt": None}, "`prompt` is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 5 else None,
)
def test_a_bad_preference_is_named(tmp_path, task, row, reason):
    fine = JUDGED if task == "kto" else PAIR
    rows = load(write_rows(tmp_path / "a.jsonl", [fine, row]), task)
    assert rows.skipped == [{"place": "a.jsonl, row 2", "reason": reason}] and len(rows.train) == 1


def test_conversations_and_labels_as_people_write_them(tmp_path):
    spoken = {"prompt": [{"from": "human", "value": "Who?"}], "chosen": [GOOD], "rejected": [BAD]}
    (row,) = load(write_rows(tmp_path / "a.jsonl", [spoken]), "dpo").train
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([ASK], [GOOD], [BAD])
    labels = [True, False, 1, 0, "true", "False", "good", "bad"]
    rows = load(write_rows(tmp_path / "b.jsonl", [JUDGED | {"label": label} for label in labels]), "kto").train
    assert rows["label"] == [True, False] * 4


def test_columns_that_a_task_lacks(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b"}])
    with pytest.raises(ValueError, match=r"`--task dpo` needs the columns chosen, rejected; .* lacks rejected and has"):
        load(path, "dpo")


@pytest.mark.parametrize("flag", ["packing", "assistant_only_loss"])
def test_what_a_preference_cannot_have(base, tmp_path, flag):
    data = write_rows(tmp_path / "rows.jsonl", preferences("dpo"))
    with pytest.raises(SystemExit, match=f"`--task dpo` does not go with --{flag}"):
        main(arguments(data, tmp_path / "out", f"--{flag}", task="dpo", base_model=base))


def test_a_field_of_the_tasks_own_configuration(base, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", preferences("dpo"))
    flags = {"base_model": base, "task": "dpo", "max_steps": 2, "eval_step": 0, "save_step": 0, "val_set_size": 0}
    flags["warmup_ratio"] = 0
    losses = {beta: run(data, tmp_path / beta, set=f"beta={beta}", **flags)[-1]["loss"] for beta in ("0.1", "5")}
    assert losses["0.1"] != losses["5"]
    with pytest.raises(SystemExit, match="`--set` packing_strategy is no field of DPOConfig"):
        main(arguments(data, tmp_path / "out", set="packing_strategy=bfd", **flags))
    assert json.loads((tmp_path / "5/adapter_config.json").read_text())["use_dora"]
