"""Three runs of the same: a layer's forward and backward, ten optimizer steps of a tiny model; and no atomics.

The kernels are interpreted; on a GPU the suite's own check of compiled ones is a case too.
"""

import itertools

from .row import Row, Verdict, failures
from .suite import NOT_RUN, outcomes

RUNS, STEPS = 3, 10
# impl, form, dtype, and for a layer its dropout. In fp16 the magnitude trains in token space alone, as under dropout.
FORMS = [
    ("token", "float32"),
    ("token", "bfloat16"),
    ("token", "float16"),
    ("weight", "float32"),
    ("weight", "bfloat16"),
]
LEAST = {"layer": 22, "steps": 8, "source": 1, "gpu": 1}  # both implementations in all of these
DROPOUTS = {"token": ("none", "lora", "peft"), "weight": ("none",)}


def cases():
    for impl, (space, dtype) in itertools.product(("triton", "reference"), FORMS):
        yield from (f"layer {impl} {space} {dtype} {dropout}" for dropout in DROPOUTS[space])
        if dtype != "float16":
            yield f"steps {impl} {space} {dtype}"
    yield from ("source", "gpu")


def run(case):
    import torch

    from tests.test_architecture import test_what_the_engine_does_without

    if case == "source":
        test_what_the_engine_does_without("float atomics")
        return {}
    if case == "gpu":
        return {"gpu": _compiled()}
    kind, *words = case.split()
    first, *others = ({"layer": _layer, "steps": _steps}[kind](*words) for _ in range(RUNS))
    for other, name in itertools.product(others, first):
        assert torch.equal(other[name], first[name]), f"{name} differs"
    return {}


def _compiled():
    """What became of three runs of compiled kernels."""
    import torch

    if not torch.cuda.is_available():
        return NOT_RUN
    found = outcomes("-m", "gpu", "tests/ops/test_gpu.py::test_three_runs_are_bit_equal")
    assert set(found.values()) == {"passed"}, found
    return "passed"


def _layer(impl, space, dtype, dropout):
    import torch

    from tests.support.oracle import make_problem, solve

    # Enough tokens that several programs share a sum.
    problem = make_problem(300, 33, 29, 5, getattr(torch, dtype), torch.float32, bias=True)
    torch.manual_seed(0)
    options = {} if dropout == "none" else {"lora_dropout": 0.3, "dropout_mode": dropout, "training": True}
    return solve(problem, impl=impl, space=space, **options)


def _steps(impl, space, dtype):
    """The losses of ten steps, and what was trained."""
    import torch

    import dora_kernels as dk
    from tests.support.tiny_models import VOCAB, llama

    torch.manual_seed(0)
    model = llama(getattr(torch, dtype), layers=1)
    dropout = 0.1 if space == "token" else 0.0
    dk.apply_dora(model, dk.DoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, space=space, impl=impl))
    trained = {name: parameter for name, parameter in model.train().named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        tokens = torch.randint(VOCAB, (2, 9))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert losses[0] != losses[-1]
    return trained | {"losses": torch.stack(losses)}


def judge(records):
    failed = failures(records)
    counts = {kind: sum(record["case"].split()[0] == kind for record in records) for kind in LEAST}
    compiled = "; ".join(record["gpu"] for record in records if "gpu" in record)
    measured = (
        f"interpreted: {counts['layer']} layers and {counts['steps']} models of {STEPS} steps, {RUNS} runs each, and "
        f"the source for atomics: {len(failed)} failures; compiled: {compiled or 'failed'}"
    )
    return Verdict(measured, not failed and all(counts[kind] >= least for kind, least in LEAST.items()))


ROW = Row(
    what="determinism: three runs of forward, backward and ten steps; both implementations, forms, dtypes, dropouts",
    target='bit-equal interpreted; no atomics in the source; compiled kernels read "not run" where there is no GPU',
    cases=cases,
    run=run,
    judge=judge,
    fast=True,
)
