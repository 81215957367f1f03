"""Row 17: 32 steps of AdamW from a fresh adapter, losses held against those of the installed PEFT, in fp32.

A case is a family of models and an engine: `kernels` (PEFT's model, patched, the kernels interpreted), `reference` (the
same on PyTorch), `apply_dora` (our own layers with PEFT's initial A) and `wrong`, whose magnitude does not train, as
others' did not: the control, which must be seen. Data, the models' own dropout and the initial state are equal.
"""

import math

from .row import Record, Row, Verdict, failures

FAMILIES = ("llama", "gpt2", "bert", "t5")
ENGINES = ("kernels", "reference", "apply_dora", "wrong")
STEPS, LEARNING_RATE = 32, 2e-2
BAR = 1e-5
LEARNED = 0.01
"""By which the loss must fall, between the means of the first and the last eight steps."""


def batch(model, number: int) -> dict:
    """Another one for each step: four sequences that count by sevens, which can be learned."""
    import torch

    from tests.support.tiny_models import VOCAB

    generator = torch.Generator().manual_seed(number)
    tokens = (torch.randint(VOCAB, (4, 1), generator=generator) + 7 * torch.arange(9)) % VOCAB
    if model.config.model_type == "bert":
        return {"input_ids": tokens, "labels": tokens[:, 0] % 2}
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    return {"input_ids": tokens, "labels": tokens, **decoder}


def losses(model) -> list[float]:
    """Of each step."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE)
    curve = []
    for number in range(STEPS):
        torch.manual_seed(number)
        loss = model(**batch(model, number)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


def peft_model(family: str):
    import peft
    import torch

    from tests.support.peft_models import dora_config
    from tests.support.tiny_models import FAMILIES as MODELS

    torch.manual_seed(0)
    return peft.get_peft_model(MODELS[family](), dora_config(target_modules=TARGETS[family]))


# By name, so that both engines adapt the same layers.
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "key", "value", "dense"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}


def own_model(family: str):
    """The same adapter in layers of our own."""
    import tempfile

    import dora_kernels as dk
    from tests.support.tiny_models import FAMILIES as MODELS

    with tempfile.TemporaryDirectory() as folder:
        peft_model(family).save_pretrained(folder)
        return dk.load_adapter(MODELS[family](), folder)


def trained(family: str, engine: str) -> list[float]:
    from contextlib import nullcontext

    import dora_kernels as dk
    from tests.support.peft_models import frozen_magnitude

    if engine == "apply_dora":
        return losses(own_model(family))
    model = peft_model(family)
    report = dk.patch_peft(model, impl="triton" if engine == "kernels" else "reference")
    assert not report.skipped, f"left to PEFT: {report.skipped}"
    with frozen_magnitude() if engine == "wrong" else nullcontext():
        return losses(model)


def run(case: str) -> dict:
    family, engine = case.split()
    expected, found = losses(peft_model(family)), trained(family, engine)
    # max() may drop a NaN.
    assert all(map(math.isfinite, (*expected, *found))), f"a loss is not finite: {found}, PEFT's {expected}"
    learned = (sum(expected[:8]) - sum(expected[-8:])) / 8
    assert learned > LEARNED, f"the loss fell by {learned:.2g} only: nothing to compare"
    return {
        "difference": max(abs(ours - theirs) / theirs for ours, theirs in zip(found, expected, strict=True)),
        "learned": learned,
    }


def judge(records: list[Record]) -> Verdict:
    measured = [record for record in records if record["failed"] is None]
    right, wrong = (
        [record["difference"] for record in measured if record["case"].endswith("wrong") == control]
        for control in (False, True)
    )
    worst, least = max(right, default=float("nan")), min(wrong, default=float("nan"))
    # max() and min() may drop a NaN.
    complete = len(records) == len(FAMILIES) * len(ENGINES) and not failures(records)
    complete &= all(math.isfinite(record["difference"]) for record in measured)
    return Verdict(
        f"{worst:.1e} at most in {len(right)} runs (AdamW, learning rate {LEARNING_RATE}); where the magnitude "
        f"does not train, {least:.1e} at least",
        complete and worst <= BAR < least,
    )


ROW = Row(
    what=f"convergence against PEFT: {STEPS} steps × {len(FAMILIES)} mini models, fp32 relative loss difference",
    target="≤ 1e-5; a wrong engine above it",
    cases=lambda: [f"{family} {engine}" for family in FAMILIES for engine in ENGINES],
    run=run,
    judge=judge,
)
