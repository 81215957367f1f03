"""Triton's interpreter, as the tests use it, against PyTorch bit for bit in bf16: the suite's own checks, counted."""

from unittest.mock import patch

from .row import Row, Verdict, failures

COUNT = 8192
CASES = ("rounding", "add", "mul", "dot")


def run(case):
    import torch

    from tests.support import test_interpreter as checks

    torch.manual_seed(0)
    compared = 0
    compare = checks.assert_same_bits

    def counted(got, expected):
        nonlocal compared
        compare(got, expected)
        compared += got.numel()

    with patch.object(checks, "assert_same_bits", counted):
        while compared < COUNT:
            before = compared
            if case == "rounding":
                checks.test_cast(torch.float32, torch.bfloat16, "cpu")
            elif case == "dot":
                checks.test_dot(torch.bfloat16, "cpu")
            else:
                checks.test_arithmetic(case, torch.bfloat16, "cpu")
            assert compared > before, f"the check of {case} compares nothing"
    return {"compared": compared}


def judge(records):
    if failed := failures(records):
        return Verdict("; ".join(f"{record['case']}: {record['failed']}" for record in failed), False)
    texts = [f"{record['case']} 0 of {record['compared']}" for record in records]
    return Verdict(f"wrong: {', '.join(texts)}", all(record["compared"] == COUNT for record in records))


ROW = Row(
    what="interpreter shim: bf16 rounding, arithmetic and dot against torch",
    target=f"0 of {COUNT} wrong",
    cases=lambda: CASES,
    run=run,
    judge=judge,
    fast=True,
)
