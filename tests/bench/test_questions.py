"""`bench questions` on a CPU: each question has an answer, and its ways compute the same."""

import json

import pytest
import torch

from bench.__main__ import main
from bench.contestants.layer import make_problem
from bench.measuring.shapes import layer_shapes
from bench.questions import QUESTIONS, longer_gemm, parts_of_the_norm

CPU = torch.device("cpu")


def test_every_question_that_a_cpu_has_is_answered(tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    assert main(["questions", "--preset", "tiny", "--device", "cpu", "--output", str(path), "--commit", "test"]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row["failed"] is None and row["seconds"]["total"]["median"] > 0 for row in rows)
    answered = {name for name, question in QUESTIONS.items() if not question.on_a_gpu}
    assert len(answered) == 4 and {row["case"]["question"] for row in rows} == answered
    assert "one GEMM, A in W's tail" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [4, 64, 65])
def test_one_long_gemm_is_the_sum_of_two(rank):
    two, one = longer_gemm(make_problem(layer_shapes("tiny")[3], 8, rank, torch.float32, CPU)).values()
    torch.testing.assert_close(two(), one())


def test_the_norm_is_the_same_in_any_number_of_parts():
    """Under Triton's interpreter: n and g, alone and of the merge."""
    ways = parts_of_the_norm(make_problem(layer_shapes("tiny")[0], 8, 4, torch.float32, CPU))
    (first, *others) = (way() for way in ways.values())
    assert len(others) == 5
    for other in others:
        torch.testing.assert_close(other, first)
