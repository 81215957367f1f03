"""Row 20: every family of models that transformers builds tiny, through a training step, the files and the merge.

A case is a kind and a model type. Its tiny random model, in fp32 and on PyTorch, is adapted on "all-linear", and held
against the same adapter in PEFT's own layers. A family whose untouched model cannot be built or called at these sizes
is counted apart, and one whose adapter the installed PEFT cannot load, of which saving must have warned.
"""

from .row import Record, Row, Verdict, failures

LEAST = 100
SAME, GRADIENT, MERGED = 5e-5, 1e-3, 2e-4
"""Relative differences in fp32, up to a hundred layers deep: of the same adapter in other hands, of which the worst
measured is 2.4e-5 (Swin v2); of its gradients, relative to the largest; and of a merged weight, rounded once more."""
UNREADABLE = "the installed PEFT cannot load"


def call(family, model):
    """The first output, in eval mode."""
    import torch
    from transformers import set_seed

    set_seed(0)  # some draw in eval mode too, and some from numpy
    with torch.no_grad():
        return model.eval()(**family.batch)[0]


def step(family, model) -> dict:
    """{trained parameter: gradient} of a loss over the first output, in training mode; batch statistics stay."""
    import torch
    from transformers import set_seed

    model.train().zero_grad()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    set_seed(0)
    model(**family.batch)[0].square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def move(model) -> None:
    """Every A, B and m leaves its start, as in training."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn_like(parameter)
                parameter.copy_(parameter * (1 + 0.1 * noise) if "magnitude" in name else parameter + 0.05 * noise)


def tiny_family(case: str):
    """The family, if two untouched models of it answer alike and have gradients. Raises whatever it raises."""
    import torch

    from tests.support.families import tiny

    family = tiny(case)
    first, second = call(family, family.model), call(family, tiny(case).model)
    if not (torch.is_floating_point(first) and torch.equal(first, second) and bool(torch.isfinite(first).all())):
        raise ValueError("its first output is no finite function of its input")
    if not all(gradient is None or bool(gradient.isfinite().all()) for gradient in step(family, family.model).values()):
        raise ValueError("its gradients are not finite")
    return family


def check(what: str, actual, expected, bar: float, size: float | None = None) -> None:
    """Raises AssertionError where the difference, relative to `size` or the expected norm, is above `bar`."""
    import torch

    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} for {tuple(expected.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{what}: not finite"
    difference = (actual - expected).norm().item() / max(size or expected.norm().item(), 1e-30)
    assert difference <= bar, f"{what}: {difference:.1e} off"


def worst(actual: dict, expected: dict) -> float:
    """The largest difference of a gradient, relative to the largest gradient."""
    assert actual.keys() == expected.keys()
    given = {name: gradient for name, gradient in expected.items() if gradient is not None}
    assert all(actual[name] is None or not actual[name].any() for name in expected.keys() - given.keys())
    largest = max(gradient.norm().item() for gradient in given.values())
    difference = max((actual[name] - gradient).norm().item() for name, gradient in given.items())
    return difference / max(largest, 1e-30)


def nudge(model) -> None:
    """Moves every B by less than an output may be off."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1 + 1e-6)


def run(case: str) -> dict:
    import tempfile
    import warnings

    import peft

    import dora_kernels as dk
    from tests.support.families import tiny

    try:
        family = tiny_family(case)
    except Exception as error:
        return {"not_built": f"{type(error).__name__}: {error}".splitlines()[0][:200]}

    def model():
        return tiny(case).model

    ours = dk.apply_dora(model(), dk.DoraConfig(r=4, lora_alpha=8))
    check("a fresh adapter", call(family, ours), call(family, family.model), SAME)
    move(ours)
    try:
        gradients = step(family, ours)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        return {"not_built": "its batch, of text alone, reaches no adapted layer"}
    assert any(gradient is not None for gradient in gradients.values()), "nothing is trained"
    output = call(family, ours)
    with tempfile.TemporaryDirectory() as folder:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dk.save_adapter(ours, folder)
        unreadable = any(UNREADABLE in str(warning.message) for warning in caught)
        check("our load_adapter", call(family, dk.load_adapter(model(), folder)), output, 0)
        if not unreadable:
            theirs = peft.PeftModel.from_pretrained(model(), folder, is_trainable=True)
            check("PEFT's own forward", call(family, theirs), output, SAME)
            expected = step(family, theirs)
            dk.patch_peft(theirs)
            check("a patched PEFT model", call(family, theirs), output, SAME)
            difference = worst(step(family, theirs), expected)
            if difference > GRADIENT:  # an ill-conditioned model's own gradients move as far
                dk.unpatch_peft(theirs)
                nudge(theirs)
                bar = 2 * worst(step(family, theirs), expected)
                assert difference <= bar, (
                    f"patched: gradients {difference:.1e} off, and PEFT's by {bar / 2:.1e} if nudged"
                )
    check("merge_dora", call(family, dk.merge_dora(ours)), output, MERGED)
    return {"unreadable": unreadable}


def judge(records: list[Record]) -> Verdict:
    failed = failures(records)
    built = [record for record in records if record["failed"] is None and "not_built" not in record]
    unreadable = sum(record["unreadable"] for record in built)
    apart = len(records) - len(built) - len(failed)
    kinds = {kind: sum(record["case"].startswith(f"{kind} ") for record in built) for kind in _kinds()}
    return Verdict(
        f"{len(built)} families hold ({', '.join(f'{kind} {count}' for kind, count in kinds.items())}), "
        f"{len(failed)} failures; {unreadable} of them PEFT cannot load, and saving says so; {apart} more cannot be "
        "built or called at these sizes",
        len(built) >= LEAST and not failed and all(kinds.values()) and len(records) == len(_cases()),
    )


def _kinds() -> list[str]:
    from tests.support.families import KINDS

    return list(KINDS)


def _cases() -> list[str]:
    from tests.support.families import names

    return names()


ROW = Row(
    what="families of transformers, tiny and random: fresh adapter, step, save, reload here and in PEFT, patch, merge",
    target=f"≥ {LEAST} families of every kind, 0 failures",
    cases=_cases,
    run=run,
    judge=judge,
)
