"""Lines on equal layers are one."""

import dora_kernels as dk
from dora_kernels.layers.listing import grouped, total
from tests.support.tiny_models import llama


def test_lines_that_differ_in_a_place_alone_are_one():
    lines = ["a.0.q: fused", "a.1.q: fused", "a.2.q: left: 3 adapters", "a.0.k2: fused", "a.1.k2: fused", "b: fused"]
    assert grouped(lines) == [
        "a.*.q: fused [2 alike]", "a.2.q: left: 3 adapters", "a.*.k2: fused [2 alike]", "b: fused",
    ]  # fmt: skip


def test_numbers_that_are_no_places_stay():
    assert grouped(["a.0.q (8×4): 1.5 ms", "a.1.q (8×5): 1.5 ms"]) == ["a.0.q (8×4): 1.5 ms", "a.1.q (8×5): 1.5 ms"]


def test_a_total():
    assert total({"fused": 3, "left to PEFT": 0}) == "3 layers: 3 fused"


def test_explain_has_a_line_for_equal_layers_and_ends_with_the_total():
    model = dk.apply_dora(llama(layers=3), dk.DoraConfig(r=2))
    explained = dk.explain(model, tokens=8)
    *lines, last = str(explained).splitlines()
    assert len(explained) == 21 and sum("[3 alike]" in line for line in lines) >= 7 and len(lines) < 12
    assert any(line.startswith("model.layers.*.mlp.down_proj (") for line in lines)
    assert last.startswith("21 layers: ") and last.endswith("by reference")
    assert len(repr(explained)) < 80
