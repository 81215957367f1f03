"""`gradcheck` in fp64 through the kernels, of the operation with the norm given.

DoRA detaches the norm: with it inside, the forward has another derivative. That it is detached is in `properties`.
"""

from random import Random

from .row import Row, Verdict, failures

SLOW, FAST = 40, 400


def cases():
    return [f"slow/{number}" for number in range(SLOW)] + [f"fast/{number}" for number in range(FAST)]


def run(case):
    import torch

    from dora_kernels.ops import kernels
    from dora_kernels.ops.dora_linear import Call, DoraLinearFunction
    from dora_kernels.ops.types import NormScale, Rounding
    from tests.support.oracle import make_problem

    random = Random(case)
    slow = case.startswith("slow")
    M, N, K = (random.randint(1, 4 if slow else 20) for _ in range(3))
    rank = random.choice([1, 2, 3, 7]) if slow else random.choice([1, 3, 7, 17])
    dropout = random.choice([None, None, "lora", "peft"])
    space = "token" if dropout else random.choice(["token", "weight"])
    seed = random.randrange(2**32)
    problem = make_problem(M, N, K, rank, torch.float64, bias=random.random() < 0.5, seed=seed)
    factors = problem.weight, problem.lora_A, problem.lora_B
    frozen, _ = kernels.weight_norm(*factors, problem.magnitude, problem.scaling)
    mask = torch.rand(M, K, generator=torch.Generator().manual_seed(seed)).lt(0.7).double() / 0.7
    call = Call(space, "triton", problem.scaling, Rounding("dithered", seed), dropout, True)

    def function(x, lora_A, lora_B, magnitude, bias=None):
        # g follows m, and n does not.
        given = NormScale(frozen[0], magnitude.detach() / frozen[0])
        x_dropped = x * mask if dropout else None
        return DoraLinearFunction.apply(x, x_dropped, lora_A, lora_B, magnitude, bias, problem.weight, given, call)

    assert torch.autograd.gradcheck(function, problem.leaves(), fast_mode=not slow)
    return {}


def judge(records):
    slow = sum(record["case"].startswith("slow") for record in records)
    failed = len(failures(records))
    measured = f"{slow} slow and {len(records) - slow} fast, {failed} failures"
    return Verdict(measured, slow >= 40 and len(records) - slow >= 400 and not failed)


ROW = Row(
    what="gradcheck in fp64 through the kernels, with n given: both forms, with and without bias, both dropouts",
    target="40 slow-mode + 400 fast-mode, 0 failures",
    cases=cases,
    run=run,
    judge=judge,
)
