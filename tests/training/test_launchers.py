"""FSDP and DeepSpeed: what of them is refused, and why, before work starts."""

import json

import pytest

from tests.support.training_runs import arguments, data  # noqa: F401
from training import demo
from training.__main__ import main
from training.distributed.launchers import zero_config
from training.flags import Flags

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
ZERO2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    "launched, flags, reason",
    [
        ({"ACCELERATE_USE_FSDP": "true"}, [], "FSDP1 flattens .*: set `fsdp_version: 2` in accelerate's configuration"),
        (FSDP2, [], "`--fsdp` needs GPUs .on a CPU accelerate runs DDP .*: `torchrun --nproc_per_node N -m training"),
        ({}, ["--fsdp"], "`--fsdp` needs GPUs"),
        (
            FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"},
            [],
            "should have `fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP`",
        ),
        (
            FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            [],
            "should have `fsdp_offload_params: false`, `fsdp_activation_checkpointing: false`",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "DeepSpeed is configured by a flag: `torchrun .* --deepspeed"),
        ({}, ["--deepspeed", "absent.json"], "`--deepspeed` absent.json is not a readable JSON object: .*No such file"),
        (
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            [],
            "mixed precision in fp16, but the base is in float32: leave it out",
        ),
    ],
    ids=["FSDP1", "FSDP2", "--fsdp", "no wrap", "offload", "DeepSpeed by the launcher", "--deepspeed", "fp16"],
)
def test_on_a_cpu(data, tmp_path, monkeypatch, launched, flags, reason):  # noqa: F811
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=reason):
        main(arguments(data, tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def two_gpus(monkeypatch):
    """As far as flags are checked: the second process of two, each with a GPU, and DeepSpeed installed."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("training.flags.flags.find_spec", lambda name: name)
    monkeypatch.setenv("LOCAL_RANK", "1")


def flags_of(tmp_path, data, config=ZERO2, **given):  # noqa: F811
    """Flags for DeepSpeed with `config`, or as they are given."""
    (tmp_path / "zero.json").write_text(json.dumps(config))
    given = {name: str(tmp_path / "zero.json") if value == "zero.json" else value for name, value in given.items()}
    return Flags(base_model=str(demo.BASE), data_path=str(data), output_dir=str(tmp_path / "out"), **given)


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"fsdp": True, "quantize": True}, "`--fsdp` does not go with --quantize: leave one of them out"),
        ({"deepspeed": "zero.json", "use_compile": True}, "`--deepspeed` does not go with --use_compile"),
        ({"fsdp": True, "deepspeed": "zero.json"}, "`--deepspeed` does not go with --fsdp"),
        ({"deepspeed": "zero.json", "resume": True}, "`--resume` does not go with --deepspeed, whose optimizer state"),
    ],
    ids=["fsdp quantize", "deepspeed compile", "both", "resume"],
)
def test_what_does_not_go_together(data, tmp_path, two_gpus, given, reason):  # noqa: F811
    with pytest.raises(ValueError, match=reason):
        flags_of(tmp_path, data, **given).check()


@pytest.mark.parametrize("engine, value", [("fsdp", True), ("deepspeed", "zero.json")])
def test_one_process_has_nobody_to_share_with(data, tmp_path, two_gpus, monkeypatch, engine, value):  # noqa: F811
    flags = flags_of(tmp_path, data, **{engine: value})
    flags.check()
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match=rf"`--{engine}` shards over processes: `torchrun .* --{engine} \.\.\.`"):
        flags.check()


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"zero_optimization": {"stage": 3}}, "ZeRO-3 leaves a layer's parameters empty.*: use --fsdp, or stage 2"),
        ({}, "zero_optimization.stage should be 1 or 2, got 0"),
        ([1], "is not a readable JSON object"),
        (ZERO2 | {"optimizer": {"type": "AdamW"}}, "leave `optimizer` out, magnitudes train in a group without decay"),
        (ZERO2 | {"bf16": {"enabled": True}}, "leave `bf16` out, it would round the fp32 adapters"),
    ],
    ids=["ZeRO-3", "no stage", "list", "optimizer", "bf16"],
)
def test_a_zero_configuration_that_does_not_work(data, tmp_path, two_gpus, config, reason):  # noqa: F811
    with pytest.raises(ValueError, match=reason):
        flags_of(tmp_path, data, config, deepspeed="zero.json").check()


def test_an_absent_deepspeed(data, tmp_path, two_gpus, monkeypatch):  # noqa: F811
    monkeypatch.setattr("training.flags.flags.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`--deepspeed` needs deepspeed: pip install deepspeed"):
        flags_of(tmp_path, data, deepspeed="zero.json").check()


def test_deepspeed_on_a_cpu(data, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="`--deepspeed` needs GPUs"):
        flags_of(tmp_path, data, deepspeed="zero.json", device="cpu").check()


def test_what_the_runs_own_flags_decide_is_left_to_them(tmp_path, two_gpus):
    """DeepSpeed would clip and accumulate nothing; a value that contradicts the flags is transformers' to refuse."""
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(ZERO2 | {"gradient_clipping": 0.5}))
    auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    assert zero_config(str(path)) == ZERO2 | auto | {"gradient_clipping": 0.5}
