"""`dora-plan`: what it prints of a config, and what it refuses."""

import pytest
from transformers import LlamaConfig, ViTConfig

from tests.support.planned import FORMAT_SIZES, SIZES
from training.plan import main


def test_the_command_needs_a_config_alone(tmp_path, capsys):
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    main([f"--base_model={tmp_path}", "--batch_size=4", "--cutoff_len=128", "--quantize", "--card=24"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama, base in NF4; DoRA of rank 16 on 21 layers; 4 × 128 tokens"
    assert "prediction" in lines[1]
    assert [line.split("  ")[0] for line in lines[-3:-1]] == ["peak", "largest batch on 24 GB"]
    assert sum("largest batch" in line for line in lines) == 1
    assert all("MiB" in line and "GiB" not in line for line in lines[2:-2])
    assert "batches of more than 1,048,576 tokens are no advice" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cutoff_len=0"], "should be a positive integer value but the value passed is 0"),
        (["--batch_size=-1"], "should be a positive integer value but the value passed is -1"),
        (["--lora_r=x"], "argument --lora_r: invalid int value: 'x'"),
        (["--card=nan"], "should be a positive number of GiB but the value passed is nan"),
        (["--batch=2"], "unrecognized arguments: --batch=2"),
        (["--use_liger", "--whole_logits"], "`--use_liger` does not go with --whole_logits"),
        (["--keep_weights", "--merge_aware"], "`--keep_weights` does not go with --merge_aware"),
        (["--base_model={tmp}/empty"], "error: `--base_model` {tmp}/empty is not a folder with a config.json"),
        (["--base_model={tmp}/nowhere/at/all"], "error: `--base_model` {tmp}/nowhere/at/all has no config"),
        (["--base_model={tmp}/vit"], "no causal language model can be built of this vit config"),
        (["--base_model={tmp}/llama", "--lora_target_parameters=experts.up"], "Its stacks of experts: it has none"),
        (["--base_model={tmp}/llama", "--lora_target_modules=nothing"], "nothing"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_sentence(arguments, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    ViTConfig().save_pretrained(tmp_path / "vit")
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "llama")
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(tmp=tmp_path) for argument in arguments])
    said = str(stopped.value) if isinstance(stopped.value.code, str) else capsys.readouterr().err
    assert message.format(tmp=tmp_path) in said
    assert "\n" not in said.strip().split("error: ")[-1]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (None, "bf16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
        ({"quant_method": "gptq", "bits": 4}, "int4"),
        ({"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}, "MXFP4"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "NVFP4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "NF4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_format_is_what_the_config_says(fields, expected, tmp_path, capsys):
    LlamaConfig(**SIZES | FORMAT_SIZES, quantization_config=fields).save_pretrained(tmp_path)
    main([f"--base_model={tmp_path}", "--card=24"])
    assert f"llama, base in {expected}; DoRA" in capsys.readouterr().out


def test_a_format_that_is_not_known_is_refused(tmp_path):
    LlamaConfig(**SIZES, quantization_config={"quant_method": "aqlm"}).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="the base is quantised by aqlm, which cannot be planned"):
        main([f"--base_model={tmp_path}"])
    main([f"--base_model={tmp_path}", "--base_format=nf4", "--card=24"])
    with pytest.raises(SystemExit, match="`--quantize` is NF4, and does not go with --base_format fp8"):
        main([f"--base_model={tmp_path}", "--base_format=fp8", "--quantize"])
