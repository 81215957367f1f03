"""`python -m training.export`: what a plain LoRA adapter keeps of a DoRA update, and what it says that it loses."""

import peft
import pytest
import torch
from safetensors.torch import load_file

import dora_kernels as dk
from tests.support.adapter_folders import PREFIX, base_folder, load, our_adapter, pefts_adapter, printed_errors, updates
from tests.support.images import TARGETS, batch, image_model, trained
from tests.support.marks import slow
from tests.support.oracle import relative_error
from tests.support.tiny_models import VOCAB, logits
from tests.tolerances import SAME_FP32
from training import merge
from training.export import low_rank, main, write_lora

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def run(adapter, output, *flags):
    main(["--adapter", str(adapter), "--output_dir", str(output), *map(str, flags)])


@pytest.mark.parametrize("write", [our_adapter, pefts_adapter], ids=["ours", "pefts"])
@pytest.mark.parametrize("family", ["llama", "gpt2", slow("t5")])
def test_at_full_rank_the_lora_adapter_is_the_dora_adapter(family, write, tmp_path):
    base = base_folder(tmp_path / "base", family)
    expected = logits(write(base, tmp_path / "adapter", family, use_rslora=True))
    # More than the smaller side of any weight.
    run(tmp_path / "adapter", tmp_path / "lora", "--to", "lora", "--rank", 50, "--base_model", base)
    model = peft.PeftModel.from_pretrained(load(base, family), tmp_path / "lora")
    config = model.peft_config["default"]
    assert (config.use_dora, config.use_rslora, config.r) == (False, False, 50)
    assert not any("magnitude" in key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    # An fp32 SVD reproduces ΔW to about 1e-6 of its norm.
    tolerance = SAME_FP32 * expected.abs().max()
    assert (logits(load(base, family)) - expected).abs().max() > 100 * tolerance, "the adapter says something"
    assert (logits(model.eval()) - expected).abs().max() <= tolerance


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_printed_error_is_what_the_file_misses_and_the_least_that_its_rank_allows(family, tmp_path, capsys):
    rank = 5
    base = base_folder(tmp_path / "base", family)
    our_adapter(base, tmp_path / "adapter", family)
    run(tmp_path / "adapter", tmp_path / "lora", "--to", "lora", "--rank", rank)
    printed = printed_errors(capsys.readouterr().out)
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    squares = torch.zeros(2, dtype=torch.float64)
    found = updates(base, tmp_path / "adapter", transposed=family == "gpt2")
    assert printed.keys() == {*found, "total"}
    for path, (_, update) in found.items():
        a, b = (stored[f"{PREFIX}{path}.lora_{x}.weight"].double() for x in "AB")
        assert a.shape[0] == rank
        error, norm = (update - b @ a).norm(), update.norm()
        # Three digits are printed.
        assert printed[path] == pytest.approx((error / norm).item(), rel=6e-3)
        least = torch.linalg.svdvals(update)[rank:].norm()
        # The randomised SVD's own loss, as its docstring says.
        assert least <= error * (1 + 1e-6)
        assert error <= 1.001 * least
        squares += torch.stack((error, norm)).square()
    assert printed["total"] == pytest.approx((squares[0] / squares[1]).sqrt().item(), rel=6e-3)
    assert printed["total"] > 0.05, "there is something to lose"


def test_embeddings_and_convolutions_keep_pefts_names_and_shapes(tmp_path):
    model = trained(dk.apply_dora(image_model(), dk.DoraConfig(r=4, target_modules=TARGETS))).eval()
    errors = write_lora(model, 24, tmp_path)
    assert errors.total < SAME_FP32, "of full rank"
    loaded = peft.PeftModel.from_pretrained(image_model(), tmp_path).eval()
    with torch.no_grad():
        assert relative_error(loaded(*batch()), model(*batch())) <= SAME_FP32


def test_the_error_falls_with_the_rank_and_a_plain_lora_update_loses_nothing():
    torch.manual_seed(0)
    product = torch.randn(40, 3) @ torch.randn(3, 30)
    lora_A, lora_B = low_rank(product, 3)
    torch.testing.assert_close(lora_B @ lora_A, product)
    update = torch.randn(40, 30)
    errors = []
    for rank in (1, 10, 29, 30):
        lora_A, lora_B = low_rank(update, rank)
        errors.append((update - lora_B @ lora_A).norm() / update.norm())
    assert errors[0] > errors[1] > errors[2] > 1e-3
    assert errors[3] < SAME_FP32
    first = low_rank(update, 10)[0]
    torch.manual_seed(1)
    assert torch.equal(low_rank(update, 10)[0], first), "the same file every time"
    assert not any(factor.any() for factor in low_rank(torch.zeros(4, 6), 2))


def test_modules_to_save_are_kept(tmp_path):
    base = base_folder(tmp_path / "base")
    expected = logits(
        our_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"], target_modules=["q_proj", "down_proj"])
    )
    run(tmp_path / "adapter", tmp_path / "lora", "--to", "lora", "--rank", 48)
    model = peft.PeftModel.from_pretrained(load(base), tmp_path / "lora").eval()
    assert torch.allclose(logits(model), expected, atol=SAME_FP32 * expected.abs().max().item())
    assert f"{PREFIX}lm_head.weight" in load_file(tmp_path / "lora" / "adapter_model.safetensors")


def test_a_vocabulary_that_grew_is_kept(tmp_path):
    model = load(base_folder(tmp_path / "base"))
    model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    dk.save_adapter(dk.apply_dora(model, dk.DoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "adapter")
    run(tmp_path / "adapter", tmp_path / "lora", "--to", "lora")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for path in ("model.embed_tokens", "lm_head"):
        assert torch.equal(stored[f"{PREFIX}{path}.weight"], model.get_submodule(path).weight)


def test_merged_is_what_training_merge_writes(tmp_path):
    base = base_folder(tmp_path / "base", dtype=torch.bfloat16)
    our_adapter(base, tmp_path / "adapter", dtype=torch.bfloat16)
    run(tmp_path / "adapter", tmp_path / "exported")
    merge.main(["--adapter", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")])
    names = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == names
    for name in names:
        assert (tmp_path / "exported" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes(), name


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_one_is_refused(rank, tmp_path):
    with pytest.raises(SystemExit, match=f"`--rank` should be a positive integer value but the value passed is {rank}"):
        run(tmp_path, tmp_path / "lora", "--to", "lora", "--rank", rank)


def test_nothing_is_overwritten(tmp_path):
    base = base_folder(tmp_path / "base")
    our_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    for to in ("lora", "merged"):
        with pytest.raises(SystemExit, match="adapter exists already"):
            run(tmp_path / "adapter", tmp_path / "adapter", "--to", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--output_dir", "/proc/x", "--rank", "2"], "`--output_dir` /proc/x cannot be made there"),
        (
            ["--output_dir", "OUT", "--rank", "1000000000"],
            "`--rank` 1000000000 is far more than 32, from which on nothing is lost",
        ),
    ],
    ids=["no place", "a rank beyond any layer"],
)
def test_what_cannot_be_written_is_said_in_the_flags_names(words, message, tmp_path):
    base = base_folder(tmp_path / "base")
    our_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    words = [word.replace("OUT", str(tmp_path / "out")) for word in words]
    with pytest.raises(SystemExit, match=message):
        main(["--base_model", str(base), "--adapter", str(tmp_path / "adapter"), "--to", "lora", *words])
    assert not (tmp_path / "out").exists()
