"""README: its blocks run, its table is measured, and its first screen and its sentences stay short."""

import json
import re
import weakref
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dora_kernels as dk
from dora_kernels.ops import chunked
from tests.support.doc_blocks import ROOT, blocks
from tests.support.tiny_models import llama

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
LINES = TEXT.split("\n")

# No two alike, and none a multiple of another: a shape tells what a tensor is.
M, N, K, R = 104, 152, 384, 3


def test_the_blocks_run_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    of_peft, plain = blocks(README, "python")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(use_dora=True, target_modules="all-linear"))
    for block, model, files in ((of_peft, adapted, "FusedLinear"), (plain, llama(), "Linear")):
        names = {"dk": dk, "model": model}
        exec(block.text, names)
        assert files in {type(module).__name__ for module in names["model"].modules()}
        assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()
        (tmp_path / "out/adapter/adapter_model.safetensors").unlink()
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(re.search(r": (fused|one block)( \[\d+ alike\])?$", line) for line in lines) and len(lines) < 10
    assert last == "14 layers: 14 fused"


# The table


def table() -> dict[str, tuple[str, str]]:
    rows = [line.strip("|").split(" | ") for line in LINES if line.startswith("| ") and line.count(" | ") == 2]
    return {name.strip(): (theirs.strip(), ours.strip()) for name, theirs, ours in rows}


def layer(engine, *, weight=None, bias=False, dropout=0.0, space="token"):
    """A PEFT DoRA layer on a bf16 base, fp32 adapters, as it is or patched; or one of ours."""
    linear = nn.Linear(K, N, bias=bias, dtype=torch.bfloat16)
    if weight is not None:
        linear = nn.Linear(*reversed(weight.shape), bias=False, dtype=torch.bfloat16)
        linear.weight.data.copy_(weight)
    if engine == "ours":
        options = {"impl": "reference", "space": space, "lora_dropout": dropout, "target_modules": ["0"]}
        return dk.apply_dora(nn.Sequential(linear), dk.DoraConfig(r=R, **options))
    config = peft.LoraConfig(r=R, lora_alpha=R, use_dora=True, lora_dropout=dropout, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(linear), config)
    if engine == "patched":
        dk.patch_peft(model, impl="reference", space=space)
    return model


def run(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


class Saved:
    """What autograd keeps, held by the graph alone."""

    def __init__(self, tensor):
        self.tensor = tensor


def kept(model):
    """How many [M, N] tensors outlive a forward, its output left out and included."""
    x, saved = torch.randn(M, K, dtype=torch.bfloat16, requires_grad=True), []

    def pack(tensor):
        box = Saved(tensor)
        saved.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        y = run(model.train(), x)
    alive = [reference().tensor for reference in saved if reference() is not None]
    pointers = {tensor.untyped_storage().data_ptr() for tensor in alive if tensor.shape == y.shape}
    return len(pointers - {y.untyped_storage().data_ptr()}), len(pointers)


def test_what_is_kept_for_the_backward_pass():
    assert table()["output-sized tensors kept for the backward pass"] == (
        "2",
        "1, the output itself where there is no bias",
    )
    assert kept(layer("peft")) == (2, 2)
    for engine in ("patched", "ours"):
        for space in ("token", "weight"):
            assert kept(layer(engine, space=space)) == (0, 1), (engine, space)
            assert kept(layer(engine, space=space, bias=True)) == (1, 1), (engine, space)


def kept_by_an_mlp(patched):
    """How many bytes for each token and intermediate feature outlive a forward of Llama's MLP; of tensors of that size
    alone."""
    torch.manual_seed(0)
    model = llama(torch.bfloat16, layers=1)
    config = peft.LoraConfig(r=R, use_dora=True, target_modules=["gate_proj", "up_proj", "down_proj"])
    model = peft.get_peft_model(model, config)
    if patched:
        dk.patch_peft(model, impl="reference")
    mlp, saved = model.base_model.model.model.layers[0].mlp.train(), []
    x = torch.randn(M, 32, dtype=torch.bfloat16, requires_grad=True)

    def pack(tensor):
        box = Saved(tensor)
        saved.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        y = run(mlp, x[None])
    alive = {box.tensor.untyped_storage() for reference in saved if (box := reference()) is not None}
    del y
    sizes = {storage.data_ptr(): storage.nbytes() for storage in alive}
    return sum(size for size in sizes.values() if size >= M * 48 * 2) / (M * 48)


def test_what_a_gated_mlp_keeps():
    theirs, ours = kept_by_an_mlp(False), kept_by_an_mlp(True)
    assert table()["bytes that a Llama MLP keeps of each intermediate value"] == (f"{theirs:.0f}", f"{ours:.0f}")


class Operations(TorchDispatchMode):
    """Counts fresh bf16 and fp32 tensors by size, and products of x with a matrix of W's size."""

    def __init__(self):
        super().__init__()
        self.made, self.base_gemms = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.base_gemms += {tuple(tensor.shape) for tensor in given[-2:]} == {(M, K), (K, N)}
        pointers = {tensor.untyped_storage().data_ptr() for tensor in given}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in pointers:
                self.made[tensor.numel()] += tensor.dtype in (torch.bfloat16, torch.float32)
        return result


def operations(engine, **options):
    model, x = layer(engine, **options).train(), torch.randn(M, K, dtype=torch.bfloat16)
    with Operations() as counter:
        run(model, x)
    return counter


def test_matrices_of_the_weights_size(monkeypatch):
    """Ours with blocks of rows that are smaller than the matrix, as they are beside real ones."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", N // 2 * K)
    assert table()["weight-sized matrices made in a forward"] == ("5", "0 in token space, 1 in weight space")
    assert operations("peft").made[N * K] == 5
    for engine in ("patched", "ours"):
        assert [operations(engine, space=space).made[N * K] for space in ("token", "weight")] == [0, 1], engine


def test_base_gemms_with_dropout():
    assert "With dropout a forward takes one base GEMM. PEFT takes two, and so does a patched PEFT model." in TEXT
    found = {engine: operations(engine, dropout=0.5).base_gemms for engine in ("peft", "ours", "patched")}
    assert found == {"peft": 2, "ours": 1, "patched": 2}


def share_kept(engine, space, seed, update=4e-5):
    """⟨measured change, true change⟩ / ‖true change‖² of the output when an update of size ‖sBA‖/‖W‖ is switched on."""
    torch.manual_seed(seed)
    out_features, in_features = 512, 1024
    weight = (torch.randn(out_features, in_features) * 0.02).bfloat16()
    lora_A, lora_B = torch.randn(R, in_features) / in_features**0.5, torch.randn(out_features, R)
    lora_B *= update * weight.float().norm() / (lora_B @ lora_A).norm()
    # x correlates with A's rows, as trained adapters do with their inputs.
    x = (torch.randn(16, R) @ lora_A * in_features**0.5 + torch.randn(16, in_features) * 0.1).bfloat16()
    magnitude = weight.double().norm(dim=1)

    def measured(lora_B):
        model = layer("peft", weight=weight)
        adapter = model.base_model.model[0]
        adapter.lora_A["default"].weight.data.copy_(lora_A)
        adapter.lora_B["default"].weight.data.copy_(lora_B)
        adapter.lora_magnitude_vector["default"].weight.data.copy_(magnitude)
        if engine == "patched":
            dk.patch_peft(model, impl="reference", space=space)
        with torch.no_grad():
            return run(model.eval(), x).double()

    def true(lora_B):
        adapted = weight.double() + lora_B.double() @ lora_A.double()
        return x.double() @ (adapted * (magnitude / adapted.norm(dim=1))[:, None]).T

    nothing = torch.zeros_like(lora_B)
    expected, change = true(lora_B) - true(nothing), measured(lora_B) - measured(nothing)
    return ((change * expected).sum() / expected.square().sum()).item()


def test_small_updates_are_kept():
    theirs, ours = table()["share that is kept of a bf16 update of 4·10⁻⁵ of W"]
    for engine, space, cell in (("peft", None, theirs), ("patched", "token", ours), ("patched", "weight", ours)):
        mean = sum(share_kept(engine, space, seed) for seed in range(2)) / 2
        assert f"{mean:.1f}" == cell, (engine, space, mean)


def test_a_fresh_adapter():
    assert table()["fresh adapter on a bf16 base equals the base"] == ("no", "bit for bit")
    x = torch.randn(M, K, dtype=torch.bfloat16)
    theirs, ours = layer("peft").eval(), layer("ours").eval()
    with torch.no_grad():
        assert not torch.equal(theirs(x), x @ theirs.base_model.model[0].base_layer.weight.T)
        assert torch.equal(ours(x), x @ ours[0].weight.T)


def test_a_zero_row():
    assert table()["output feature whose weight is zero"] == ("NaN", "its bias")
    x = torch.randn(M, K)
    linear = nn.Linear(K, N)
    linear.weight.data[7] = 0
    model = peft.get_peft_model(nn.Sequential(linear), peft.LoraConfig(r=R, use_dora=True, target_modules=["0"]))
    assert model(x)[:, 7].isnan().all()
    dk.patch_peft(model, impl="reference")
    assert torch.equal(model(x)[:, 7], linear.bias[7].expand(M))


def test_the_cpu_rows():
    """The newest committed rows of each layer, medians."""
    rows = {}
    for line in (ROOT / "bench/results/cpu.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["command"] == "layer":
            rows[row["case"]["layer"], row["contestant"]] = row
    contestants = ("PEFT DoRA fp32", "ours fp32, token, reference")
    times, peaks = [], []
    for contestant in contestants:
        found = [rows[layer, contestant] for layer in ("q,o_proj", "gate,up_proj", "down_proj")]
        assert {row["stamp"]["threads"] for row in found} == {2} and {row["case"]["dtype"] for row in found} == {"fp32"}
        times.append(", ".join(f"{row['seconds']['total']['median'] * 1e3:.0f}" for row in found) + " ms")
        peaks.append(", ".join(f"{row['peak_bytes'] / 1e6:.0f}" for row in found) + " MB")
    assert table()["CPU: time of TinyLlama's q, gate, down"] == tuple(times)
    assert table()["CPU: peak memory of TinyLlama's q, gate, down"] == tuple(peaks)


# Its size


def test_the_first_screen():
    first = "\n".join(LINES[:40])
    assert len(LINES) <= 121 and max(map(len, LINES)) <= 120
    for part in ("pip install", "dk.patch_peft(model)", "dk.apply_dora(model", "| PEFT 0.21 |", "none committed yet"):
        assert part in first, part
    assert "make demo" in first and "](docs/forms.svg)" in first
    assert all(block.text.strip().count("\n") < 4 for block in blocks(README, "python"))


def sentences(text):
    """The prose of a page: without code, tables, headings and pictures; a bullet is a paragraph of its own."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    prose = [line for line in text.split("\n") if not re.match(r"    |\||#|!\[", line)]
    paragraphs = re.split(r"\n\s*\n|\n(?=- )", "\n".join(prose))
    found = (sentence for part in paragraphs for sentence in re.split(r"(?<=[.!?])\s+", part.strip("- \n")))
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def test_the_sentences_are_found():
    text = (
        "# A b c\n\nOne two three. Four\nfive!\n\n- Six.\n- Seven eight\n\n| a | b |\n\n```bash\nx y z\n```\n    code\n"
    )
    assert sentences(text) == ["One two three.", "Four\nfive!", "Six.", "Seven eight"]


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem)
def test_sentences_are_short(page):
    lengths = [len(sentence.split()) for sentence in sentences(Path(page).read_text(encoding="utf-8"))]
    assert lengths and sum(lengths) / len(lengths) <= 20
    assert max(lengths) <= 40, "one fact a sentence"
