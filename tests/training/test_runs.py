"""Whole runs of `python -m training` on a tiny model: each engine, each kind of data, and what they leave behind."""

import json
import shlex
import shutil
import sys
from collections import defaultdict

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dora_kernels as dk
from tests.support.marks import slow
from tests.support.training_runs import arguments, data, demo_rows, metrics, numbers, one_layer_base, run, write_rows  # noqa: F401
from tests.tolerances import MERGED_LOGITS, SAME_FP32
from training import demo
from training.__main__ import main
from training.merge import main as merge
from training.minimal.batches import encode
from training.minimal.evaluate import held_out_loss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
WEIGHTS = "adapter_model.safetensors"
TEXT = "Instruction: Return the order as JSON.\nInput: 3 red mugs.\nResponse:\n"


def base():
    return AutoModelForCausalLM.from_pretrained(demo.BASE, dtype=torch.float32)


@torch.no_grad()
def logits(model):
    tokens = AutoTokenizer.from_pretrained(demo.BASE)(TEXT, return_tensors="pt")["input_ids"]
    return model.eval()(tokens).logits


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):  # noqa: F811
    """One plain run, which several tests read."""
    folder = tmp_path_factory.mktemp("whole")
    run(data, folder)
    return folder


def test_a_run_leaves_what_others_rely_on(whole):
    for name in ("adapter_config.json", WEIGHTS, "loss.png", "metrics.jsonl", "README.md", "tokenizer.json"):
        assert (whole / name).is_file(), name
    assert {path.name for path in whole.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    rows = metrics(whole)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3, 6]
    assert all(row["tokens_per_second"] > 0 for row in rows if "loss" in row and row["step"] > 1)
    assert all(row["peak_memory_gb"] > 0 for row in rows if "loss" in row)
    before, *_, after = (row["eval_loss"] for row in rows if "eval_loss" in row)
    assert after < before - 1, "it learns"
    assert rows[0]["eval_perplexity"] == pytest.approx(torch.tensor(before).exp().item(), rel=SAME_FP32)
    card = (whole / "README.md").read_text()
    assert f"base_model: {demo.BASE}" in card and f"Held-out loss {before:.4f} before and {after:.4f} after" in card


def test_no_file_is_a_pickle(whole):
    endings = {path.suffix for path in whole.rglob("*") if path.is_file()} - {".png", ".md", ".jinja", ".lock", ""}
    assert endings == {".json", ".jsonl", ".safetensors"}


def test_a_checkpoint_holds_the_adapter_and_not_the_model(whole):
    for folder in (whole, whole / "checkpoint-6"):
        assert all("lora_" in name for name in load_file(folder / WEIGHTS)) and len(load_file(folder / WEIGHTS)) == 42
    names = {path.name for path in (whole / "checkpoint-6").iterdir()}
    assert names == {"adapter_config.json", WEIGHTS, "manifest.json", "trainer_state.json"} | {
        *("training_state.json", "training_state.safetensors")
    }


def test_magnitudes_have_their_own_group(whole):
    state = json.loads((whole / "checkpoint-6" / "training_state.json").read_text())
    others, magnitudes = state["optimizer"]
    assert (len(others["params"]), len(magnitudes["params"])) == (28, 14)
    assert others["weight_decay"] == 0.01 and magnitudes["weight_decay"] == 0
    assert others["lr"] == magnitudes["lr"], "not scaled"


def test_the_summarys_next_command_works(data, tmp_path, capsys):  # noqa: F811
    run(data, tmp_path / "out", max_steps=1, save_step=0, eval_step=0)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "python -m training.merge" in line)
    merge(shlex.split(line)[3:])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out-merged", dtype=torch.float32)
    expected = logits(dk.load_adapter(base(), tmp_path / "out"))
    assert (logits(merged) - expected).abs().max() <= MERGED_LOGITS[torch.float32] * expected.abs().max()


def test_magnitudes_move(whole):
    moved = [
        (layer.magnitude - layer.weight.norm(dim=1)).abs().max().item()
        for layer in dk.load_adapter(base(), whole).modules()
        if isinstance(layer, dk.DoraLinear)
    ]
    assert len(moved) == 14 and min(moved) > 1e-4


def test_the_loss_is_per_token(data, tmp_path):  # noqa: F811
    """Rows of different lengths in several batches: the mean of the batches' means is another number."""
    rows = [row | {"completion": row["completion"] * (1 + index // 8)} for index, row in enumerate(demo_rows(37))]
    write_rows(tmp_path / "train.jsonl", rows[:16])
    write_rows(tmp_path / "test.jsonl", rows[16:])
    first = run(tmp_path, tmp_path / "out", max_steps=1, save_step=0)[0]
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE)
    expected = held_out_loss(base(), encode(rows[16:], tokenizer, 512), 7, tokenizer.pad_token_id)
    assert first["step"] == 0 and first["eval_loss"] == pytest.approx(expected, rel=SAME_FP32)


def test_the_engines_agree(data, whole, tmp_path):  # noqa: F811
    """PEFT's adapter fused and not, over the same steps; ours starts from another draw of A, so only nearly."""
    fused = run(data, tmp_path / "fused", "--use_peft")
    unfused = run(data, tmp_path / "unfused", "--use_peft", "--no-fused")
    for row, other, ours in zip(fused, unfused, metrics(whole), strict=True):
        name = "loss" if "loss" in row else "eval_loss"
        # fp32 in another order, its differences amplified by six steps of Adam.
        assert row[name] == pytest.approx(other[name], rel=1e-3)
        assert ours[name] == pytest.approx(row[name], rel=0.1)
    assert fused[-1]["eval_loss"] != unfused[-1]["eval_loss"], "or --no-fused does nothing"


@pytest.mark.parametrize("engine", [[], ["--use_peft"]], ids=["ours", "peft"])
def test_blocks_can_be_switched_off(data, tmp_path, capsys, engine):  # noqa: F811
    losses = {}
    for blocks in ("auto", "off"):
        rows = run(data, tmp_path / blocks, *engine, fuse_blocks=blocks, max_steps=2, eval_step=0)
        assert ("MLPs as one function each" in capsys.readouterr().out) == (blocks == "auto")
        losses[blocks] = [row["loss"] for row in rows if "loss" in row]
    assert losses["auto"] == pytest.approx(losses["off"], rel=SAME_FP32)


def test_plain_lora(data, tmp_path):  # noqa: F811
    run(data, tmp_path, "--no_use_dora")
    names = load_file(tmp_path / WEIGHTS)
    assert len(names) == 28 and not any("magnitude" in name for name in names)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is False


@pytest.mark.parametrize("engine", ["ours", "peft"])
def test_continue_from_an_adapter(data, whole, tmp_path, engine):  # noqa: F811
    bare = ["--use_peft"] if engine == "peft" else []
    first = run(data, tmp_path, *bare, init_adapter=whole, lora_r=None, max_steps=1, save_step=0)[0]
    assert first["eval_loss"] == pytest.approx(metrics(whole)[-1]["eval_loss"], rel=SAME_FP32)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2


def test_lora_is_not_continued_as_dora(data, whole, tmp_path):  # noqa: F811
    with pytest.raises(SystemExit, match="is DoRA: continue it with --use_dora"):
        run(data, tmp_path, "--no_use_dora", init_adapter=whole, lora_r=None)


@pytest.mark.parametrize(
    "engine",
    [[], slow(["--use_peft"]), slow(["--use_peft", "--no-fused"])],
    ids=["ours", "peft", "peft unfused"],
)
def test_a_quantised_run(data, whole, tmp_path, engine):  # noqa: F811
    rows = run(data, tmp_path, *engine, "--quantize")
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses[-1] < losses[0] - 1
    assert losses[0] != pytest.approx(metrics(whole)[0]["eval_loss"], rel=1e-3), "the base is quantised"
    assert {tensor.dtype for tensor in load_file(tmp_path / "checkpoint-6" / WEIGHTS).values()} == {torch.float32}
    # TRL would round A and B to bf16; then no bit below it is ever set.
    trained = torch.cat([tensor.flatten() for tensor in load_file(tmp_path / WEIGHTS).values()])
    assert not torch.equal(trained, trained.bfloat16().float())
    resumed = run(data, tmp_path, *engine, "--quantize", "--resume")
    assert resumed == rows


@pytest.mark.slow
def test_the_references_command(tmp_path, monkeypatch, capsys):
    """As printed, on the CPU, with its placeholders filled in and a stub for the hub. Compiling to machine code takes
    minutes here, so the compiler's last stage is left out: the graphs are captured and run eagerly, of one layer. The
    rows have one length, as each other one is captured anew."""
    base_model = one_layer_base(tmp_path / "base")
    tokenizer, alike = AutoTokenizer.from_pretrained(demo.BASE), defaultdict(list)
    for row in demo_rows(400):
        alike[len(tokenizer(row["prompt"] + row["completion"])["input_ids"])].append(row)
    rows = write_rows(tmp_path / "rows.jsonl", max(alike.values(), key=len)[:21])
    uploaded, compile, compiled = tmp_path / "uploaded", torch.compile, []

    def eager(model=None, **options):
        compiled.append(options.pop("backend", "inductor"))
        return compile(model, backend="eager", **options)

    def upload_folder(self, *, repo_id, folder_path, **options):
        assert repo_id == "someone/adapter"
        shutil.copytree(folder_path, uploaded)
        return "https://hub.example/someone/adapter"

    monkeypatch.setattr(torch, "compile", eager)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, exist_ok: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    out = tmp_path / "out"
    command = [
        *("--base_model", str(base_model), "--data_path", str(rows), "--output_dir", str(out)),
        *("--batch_size", "1", "--num_epochs", "3", "--learning_rate", "3e-4", "--cutoff_len", "512"),
        *("--val_set_size", "16", "--use_compile", "True", "--use_peft", "--quantize", "--eval_step", "10"),
        *("--save_step", "100", "--device", "cpu", "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0.05"),
        *("--lora_target_modules", "q_proj,k_proj,v_proj,o_proj", "--hub_model_id", "someone/adapter"),
    ]
    main([*command, "--push_to_hub"])
    assert compiled == ["inductor"]
    assert [row["step"] for row in metrics(out) if "eval_loss" in row] == [0, 10, 15]
    assert {name.split(".")[6] for name in load_file(out / WEIGHTS)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert (out / "checkpoint-15").is_dir()
    said = capsys.readouterr()
    assert "pushed to https://hub.example/someone/adapter" in said.out and "hf_secret" not in said.out + said.err
    assert not [path for path in uploaded.rglob("*") if "checkpoint" in str(path) or path.name == "metrics.jsonl"]
    # What was pushed is read by transformers itself, which drops magnitudes in PEFT's spelling.
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(uploaded, dtype=torch.float32)),
        logits(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), out)),
    )


def test_a_hub_that_refuses_stops_before_training(data, tmp_path, monkeypatch):  # noqa: F811
    flags = arguments(data, tmp_path / "out", "--push_to_hub", hub_model_id="someone/adapter")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(SystemExit, match="`--push_to_hub` needs a login"):
        main(flags)

    def create_repo(self, name, exist_ok):
        raise PermissionError("403 Forbidden")

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    with pytest.raises(SystemExit, match="`--hub_model_id` someone/adapter cannot be written to: 403 Forbidden"):
        main(flags)
    assert not (tmp_path / "out").exists()


def test_a_yaml_run(data, whole, tmp_path):  # noqa: F811
    """The same run, half of it from a file."""
    words = arguments(data, tmp_path / "out")
    pairs = list(zip(words[::2], words[1::2], strict=True))
    config = tmp_path / "run.yaml"
    config.write_text("".join(f"{name[2:]}: {value}\n" for name, value in pairs[::2]) + "seed: 5\n")
    main([*[word for pair in pairs[1::2] for word in pair], "--config", str(config), "--seed", "0"])
    assert numbers(metrics(tmp_path / "out")) == numbers(metrics(whole))


def test_a_repositorys_code_runs_only_when_asked(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(demo.BASE, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "theirs.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig\n"
        f"Path({str(ran)!r}).touch()\n\nclass Config(LlamaConfig):\n    model_type = 'theirs'\n"
    )
    with pytest.raises(SystemExit, match="trust_remote_code"):
        run(data, tmp_path / "out", base_model=model)
    assert not ran.exists()
    with pytest.raises(SystemExit):  # their configuration has no model of its own
        run(data, tmp_path / "out", "--trust_remote_code", base_model=model)
    assert ran.exists()
