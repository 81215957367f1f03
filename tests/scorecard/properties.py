"""Generated calls of the real kernels, forward and backward, held against fp64: every dimension at once.

A case is drawn from its seed, so that `draw(Random("17/3"))` is the fourth of batch 17 wherever it is called.
"""

import math
from dataclasses import dataclass
from random import Random

from .row import Row, Verdict, failures

BATCHES, BATCH = 64, 50
# Base dtype, adapter dtype and autocast dtype by name.
MIXES = {
    "fp64": ("float64", "float64", None),
    "fp32": ("float32", "float32", None),
    "bf16": ("bfloat16", "bfloat16", None),
    "bf16, fp32 adapters": ("bfloat16", "float32", None),
    "bf16 autocast": ("bfloat16", "float32", "bfloat16"),
    "fp32, bf16 autocast": ("float32", "float32", "bfloat16"),
    "fp16": ("float16", "float16", None),
    "fp16, fp32 adapters": ("float16", "float32", None),
    "fp32, fp16 autocast": ("float32", "float32", "float16"),
}
SIZES = (1, 2, 3, 5, 7, 13, 16, 17, 31, 32, 37, 53, 64, 65, 97, 128)
RANKS = (1, 3, 7, 17, 2, 16, 33, 40)


@dataclass(frozen=True)
class Case:
    """One call. `lead` are the dimensions of x before the last; `features` what is odd about some output features."""

    lead: tuple[int, ...]
    N: int
    K: int
    R: int
    mix: str
    bias: bool
    dropout: float
    mode: str
    x_layout: str
    grad_layout: str
    space: str
    rounding: str
    features: str
    update: float
    seed: int


def draw(random: Random) -> Case:
    from tests.support.buffers import LAYOUTS

    mix = random.choice(list(MIXES))
    dropout = random.choice([0.0, 0.0, 0.1, 0.5])
    only_token = dropout or "float16" in MIXES[mix]
    return Case(
        lead=random.choice([(), *_leads(random)]),
        N=random.choice(SIZES),
        K=random.choice(SIZES),
        R=random.choice(RANKS),
        mix=mix,
        bias=random.random() < 0.5,
        dropout=dropout,
        mode=random.choice(["lora", "peft"]),
        x_layout=random.choice(list(LAYOUTS)),
        grad_layout=random.choice(list(LAYOUTS)),
        space=random.choice(["token", "auto"] if only_token else ["token", "weight", "auto"]),
        rounding=random.choice(["nearest", "dithered"]),
        features=random.choice(["plain", "plain", "without weight", "magnitude 0", "magnitude below 0"]),
        update=random.choice([0.0, 1e-3, 1e-2, 0.1, 1.0]),
        seed=random.randrange(2**32),
    )


def _leads(random):
    """Shapes of one to three dimensions, among them those of no token and of one."""
    tokens = random.choice([0, 1, *SIZES])
    return [(tokens,), (random.choice([1, 2, 3]), tokens), (2, random.choice([1, 2]), min(tokens, 37))]


def worst(case: Case, impl: str = "triton") -> tuple[float, str]:
    """The largest error as a share of its bar, and of which value: y, dx, dA, dB, dm or db."""
    import torch
    from torch.nn.functional import dropout

    from tests.support.oracle import errors, exact, solve, term_sizes
    from tests.tolerances import SINGLE_CASE

    problem = _problem(case)
    drops = case.dropout > 0
    torch.manual_seed(case.seed)
    mask = dropout(torch.ones_like(problem.x), case.dropout).ne(0).double() / (1 - case.dropout)
    dropped = (mask if drops else None, case.mode)
    dtype = getattr(torch, MIXES[case.mix][2] or MIXES[case.mix][0])
    keeps_bias = case.bias and dtype.itemsize >= 4 and case.space != "weight" and not (drops and case.mode == "peft")
    truth = exact(problem, *dropped)
    sizes = term_sizes(problem, torch.finfo(dtype).smallest_normal, *dropped, keeps_bias=keeps_bias)
    torch.manual_seed(case.seed)
    autocast = MIXES[case.mix][2]
    with torch.autocast("cpu", getattr(torch, autocast or "bfloat16"), enabled=autocast is not None):
        ours = solve(
            problem, impl=impl, space=case.space, rounding=case.rounding, salt=case.seed,
            lora_dropout=case.dropout, dropout_mode=case.mode, training=drops,
        )  # fmt: skip
    for name, expected in truth.items():
        assert ours[name].shape == expected.shape, f"{name} is {list(ours[name].shape)}"
    shares = {name: error / SINGLE_CASE[dtype] for name, error in errors(ours, truth, sizes).items()}
    # NaN is larger than any number.
    name = max(shares, key=lambda name: math.inf if math.isnan(shares[name]) else shares[name])
    return shares[name], name


def _problem(case):
    import torch

    from tests.support.buffers import LAYOUTS
    from tests.support.oracle import make_problem

    dtype, adapter_dtype, autocast = (name and getattr(torch, name) for name in MIXES[case.mix])
    problem = make_problem(
        math.prod(case.lead), case.N, case.K, case.R, dtype, adapter_dtype, case.bias, case.update, case.seed
    )
    if case.features == "without weight":
        problem.weight[::3] = problem.lora_B[::3] = 0
    elif case.features == "magnitude below 0":
        problem.magnitude[::3] *= -1
    elif case.features == "magnitude 0":
        # Not all of them: the engine takes 2⁻⁴⁰ of the norm for 0, which is small beside the others alone.
        problem.magnitude[1::3] = 0
    problem.x = LAYOUTS[case.x_layout](problem.x.view(*case.lead, case.K))
    grad_y = problem.grad_y.view(*case.lead, case.N).to(autocast or dtype)
    problem.grad_y = LAYOUTS[case.grad_layout](grad_y)
    return problem


def run(batch):
    from tests.support.buffers import poisoned_memory

    with poisoned_memory():
        return {"worst": max(_shares(batch))}


def _shares(batch):
    for number in range(BATCH):
        case = draw(Random(f"{batch}/{number}"))
        try:
            share, name = worst(case)
            assert share <= 1, f"{name} is off by {share:.2f} times its bar"
        except Exception as error:
            raise AssertionError(f"{batch}/{number}: {type(error).__name__}: {error}; {case}") from error
        yield share


def judge(records):
    failed = failures(records)
    count = BATCH * len(records)
    if failed:
        return Verdict(f"{count:,} generated cases, failures in {len(failed)} of {len(records)} batches", False)
    share = max(record["worst"] for record in records)
    return Verdict(f"{count:,} cases, 0 failures; the worst at {share:.2f} of its bar", count >= 3000)


ROW = Row(
    what="generated cases (shape × dtypes × rank × bias × dropout × layouts × form × rounding) through the real "
    "kernels, forward and backward, against fp64",
    target="≥ 3,000, 0 failures",
    cases=lambda: map(str, range(BATCHES)),
    run=run,
    judge=judge,
)
