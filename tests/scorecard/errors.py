"""Our error against fp64 as a share of the installed PEFT's, over generated layers, per mix of dtypes."""

import math
from collections import defaultdict
from random import Random

from .row import Row, Verdict, failures

BATCHES, BATCH = 5, 20
# By name in `beside_peft.MIXES`. Last the one in which PEFT runs the adapter in fp32 products, and we, as under
# autocast, in 16 bits: its dA and dB carry no 16-bit rounding and are no measure for ours; y, dx and dm are.
MIXES = ("fp32", "bf16", "fp16", "bf16-autocast", "fp16-autocast", "bf16-fp32-adapters")
FP32_PRODUCTS = MIXES[-1]
GRADIENTS = ("dx", "dA", "dB", "dm")


def cases():
    return [f"{mix}/{batch}" for mix in MIXES for batch in range(BATCHES)]


def run(case):
    """{who: {name: sum of the squared errors}} over a batch."""
    from tests.support.beside_peft import MIXES, draw, errors_of_all, errors_of_two_roundings
    from tests.support.oracle import make_problem

    dtype, adapter_dtype, autocast = MIXES[case.split("/")[0]]
    squares = defaultdict(lambda: defaultdict(float))
    for number in range(BATCH):
        layer = draw(Random(f"{case}/{number}"))
        problem = make_problem(dtype=dtype, adapter_dtype=adapter_dtype, **layer)
        for who, errors in errors_of_all(problem, autocast, salt=layer["seed"]).items():
            for name, error in errors.items():
                assert math.isfinite(error), f"{who} {name} is {error} in case {number}"
                squares[who if who == "peft" else " ".join(who)][name] += error**2
        for space, error in errors_of_two_roundings(problem).items():
            if f"{space} nearest" in squares:
                squares[f"{space} floor"]["y"] += error**2
    return {"squares": squares}


def ratios(records):
    """{mix: {rounding: (worst ratio of the outputs, worst of the gradients)}} over the forms.

    "floor" is no rounding: the output alone, of `errors_of_two_roundings`.
    """
    squares = defaultdict(lambda: defaultdict(float))
    for record in records:
        mix = record["case"].split("/")[0]
        for who, values in record["squares"].items():
            for name, value in values.items():
                squares[mix, who][name] += value
    found = defaultdict(dict)
    for (mix, who), values in squares.items():
        if who == "peft":
            continue
        rounding = who.split()[1]
        of = {name: math.sqrt(value / squares[mix, "peft"][name]) for name, value in values.items()}
        names = GRADIENTS if mix != FP32_PRODUCTS else ("dx", "dm")
        pair = of["y"], max(of.get(name, 0.0) for name in names)
        found[mix][rounding] = tuple(map(max, pair, found[mix].get(rounding, pair)))
    return found


def judge(records):
    from tests.tolerances import PEFT_TARGET

    if failed := failures(records):
        return Verdict(f"{len(failed)} of {len(records)} batches failed", False)
    texts, missed = [], []
    for mix, found in ratios(records).items():
        y, gradients = found["nearest"]
        text = f"{mix} {y:.2f} / {gradients:.2f}"
        texts.append(text if mix == "fp32" else text + " ({:.2f} / {:.2f})".format(*found["dithered"]))
        bars = PEFT_TARGET[mix.split("-")[0]]
        if not (y <= bars[0] and gradients <= bars[1]):
            missed.append(f"{mix} (its two roundings alone: {found['floor'][0]:.2f})")
    measured = f"{BATCH * len(records):,} layers; worst output / gradient (dithered): {', '.join(texts)}"
    if missed:
        measured += f"; above the target: {', '.join(missed)}"
    return Verdict(measured, not missed)


ROW = Row(
    what="rel-L2 error ÷ PEFT's own for y and dx, dA, dB, dm, root mean square over generated layers, worst form; "
    "-autocast: adapters in fp32, both sides under it; bf16-fp32-adapters without dA, dB, which PEFT computes in fp32; "
    "two roundings: z or W', and y, all else exact",
    target="fp32 ≤ 1.05; bf16 and fp16 ≤ 0.85 output, ≤ 0.90 gradients, to nearest",
    cases=cases,
    run=run,
    judge=judge,
)
