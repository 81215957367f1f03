"""Errors against fp64, ours and the installed PEFT's, case for case, in the mixes of dtypes that people train in."""

import math

import torch

from tests.support.oracle import errors, exact, relative_error, solve, solve_peft

# Base dtype, adapter dtype, autocast dtype of both runs (fp32 adapters train under autocast in the HF Trainer).
MIXES = {
    "fp32": (torch.float32, torch.float32, None),
    "bf16": (torch.bfloat16, torch.bfloat16, None),
    "bf16-autocast": (torch.bfloat16, torch.float32, torch.bfloat16),
    "bf16-fp32-adapters": (torch.bfloat16, torch.float32, None),
    "fp16": (torch.float16, torch.float16, None),
    "fp16-autocast": (torch.float16, torch.float32, torch.float16),
}


def draw(random):
    """What `make_problem` takes beside the dtypes.

    Sizes from 16 on: in a layer of a few numbers one that cancels outweighs all other cases, and whose it is is chance.
    Smaller layers are held against fp64 alone, in `tests.scorecard.properties`.
    """
    M, N, K = (random.randint(16, 96) for _ in range(3))
    rank, bias, update = random.randint(1, 40), random.random() < 0.5, random.choice([1e-3, 1e-2, 0.1, 1.0])
    return {"M": M, "N": N, "K": K, "R": rank, "bias": bias, "update": update, "seed": random.randrange(2**32)}


def ways(dtype):
    """The (space, rounding) that a base of this dtype runs in; fp32 is never dithered."""
    spaces = ["token"] if dtype == torch.float16 else ["token", "weight"]
    roundings = ["nearest"] if dtype == torch.float32 else ["nearest", "dithered"]
    return [(space, rounding) for space in spaces for rounding in roundings]


def errors_of_all(problem, autocast, salt):
    """{"peft" or (space, rounding): {name: relative error}}."""
    truth = exact(problem)
    found = {"peft": errors(solve_peft(problem, autocast), truth)}
    for space, rounding in ways(problem.x.dtype):
        ours = solve(problem, autocast, space=space, rounding=rounding, impl="triton", salt=salt)
        found[space, rounding] = errors(ours, truth)
    return found


def root_mean_square(values):
    return math.sqrt(sum(value * value for value in values) / len(values))


def errors_of_two_roundings(problem):
    """{space: relative error of y} if all is exact but what every form stores in the base's dtype: z or W', then y."""
    dtype, truth = problem.x.dtype, exact(problem)["y"]
    weight, update = problem.weight.double(), problem.scaling * problem.lora_B.double() @ problem.lora_A.double()
    scale = problem.magnitude.double() / (weight + update).norm(dim=1)
    x, bias = problem.x.double(), 0 if problem.bias is None else problem.bias.double()
    base_out, merged = (x @ weight.T).to(dtype), (scale[:, None] * (weight + update)).to(dtype)
    token = scale * (base_out.double() + x @ update.T) + bias
    weight_space = x @ merged.double().T + bias
    return {
        "token": relative_error(token.to(dtype), truth),
        "weight": relative_error(weight_space.to(dtype), truth),
    }
