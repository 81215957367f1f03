"""The one table of tolerances. Bars are relative wherever a peer or a twin exists; each number has its reason."""

import torch

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-9,
}

PEFT_FACTOR = {
    # Our relative error against fp64, root mean square over the cases, at most this many times PEFT's. To nearest we
    # round no more often than PEFT does. A dithered rounding has √2 the error of one to nearest, and only some of the
    # roundings are ours.
    ("nearest", torch.float16): 1.0,
    ("nearest", torch.bfloat16): 1.0,
    ("dithered", torch.float16): 1.3,
    ("dithered", torch.bfloat16): 1.3,
    # Nothing is rounded to a smaller type in fp32: both errors are summation noise of one size, and which of two such
    # is larger is chance.
    ("nearest", torch.float32): 1.05,
}

PEFT_FACTOR_FP32_ADAPTERS = {"dA": 2.5, "dB": 2.5}
"""16-bit base, fp32 adapters, no autocast: PEFT copies x to fp32 and runs the adapter in fp32 GEMMs, so its dA and dB
carry no 16-bit rounding. Ours do, as under autocast: h and dh are handed over in 16 bits. Their bar is this many unit
roundoffs: those of A's cast and h, or of B's cast and dh, dithered."""

PEFT_TARGET = {"fp32": (1.05, 1.05), "bf16": (0.85, 0.90), "fp16": (0.85, 0.90)}
"""What the scorecard asks for beyond PEFT_FACTOR, to nearest: output, gradients. PEFT rounds norm, scale and sum to 16
bits too, we do not."""

SINGLE_CASE_FACTOR = 6.0
"""A single small case may round unluckily where PEFT is lucky; beyond this it is no longer rounding."""

ORACLE_FP64 = 1e-12
"""fp64 against the fp64 oracle: another order of the same sums, up to thousands of terms, some of which cancel."""

ORACLE_FP64_MODEL = 1e-10
"""A gradient through a whole model in fp64 against the fp64 oracle: the last bits of a layer are amplified by the
layers and the loss behind it. A wrong term is 1e6 times more."""

ORACLE_FP32 = 2e-6
"""fp32 arithmetic against the fp64 oracle: some thirty unit roundoffs for sums of a few thousand products."""

TWIN = {
    # A kernel against its reference twin: the same roundings in the same places, fp32 sums in another order. Where
    # that differs in the last bit, a value at a rounding boundary moves by one unit of the stored type.
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.float16: 2e-4,
    torch.bfloat16: 2e-3,
}

IN_PIECES = 2.0**-16
"""Of ‖s B A‖: the error of n, and of a row of W', that products of fp32 factors in bf16 pieces may add. Each factor is
cut into two pieces of 8 bits, so that a term errs by 2⁻¹⁷ of its size twice for what is left, and by up to 2⁻¹⁶ for the
product of both lower pieces, which is left out; errors of a root mean square of 2⁻¹⁸ remain, of either sign. A 16-bit
weight is 2⁷ or more times less exact."""

SAME_FP32 = 1e-5
"""Two fp32 programs of one layer or model, relative: another engine, form, batch, or number of processes. Each order of
a sum is worth some unit roundoffs (6e-8), and two layers pass through a hundred of them; for loss curves beside PEFT's
or one process's it is what users are promised. A term that is missing or wrong is a thousand times more."""

AFTER_ADAM = 1e-4
"""The same for parameters, logits and losses after a few steps of Adam, whose division by small second moments
amplifies the last bits of a gradient."""

AFTER_ADAM_FP64 = 1e-7
"""The same in fp64."""

MERGED_LOGITS = {
    # A merged model's worst logit against the unmerged one's, relative to the largest. fp32: a few hundred rounded
    # products; bf16: W' is rounded once, by up to half an ulp (2⁻⁹), where the unmerged layer rounds z and y instead,
    # through two layers.
    torch.float32: 5e-6,
    torch.bfloat16: 3e-2,
}

FUSED_LOSS_BF16 = 8 * UNIT_ROUNDOFF[torch.bfloat16]
"""Liger's fused cross-entropy against transformers' over bf16 logits: it rounds the logits' gradient to bf16, the
head's product, and the scaling by the number of items, where transformers rounds fp32 once; two layers pass it on."""

PLAN = 0.015
"""Predicted against counted memory, of what depends on the tokens, in tiny models. Left out are the token ids, which
weigh less in a real one. All that is compared lies within 1 %, but for a tiled loss whose step keeps all: 1.4 %."""

SINGLE_CASE = {
    # Of one call against fp64 or beside PEFT's, per value: of its size, or, where its terms cancel, of theirs. fp64: a
    # magnitude of 0 is taken for 2⁻⁴⁰ of the norm. fp32: as above. 16 bits: a value passes up to five roundings (A's
    # cast, h, B's cast, dh, its own), of one unit each to nearest and two dithered; rarely do they all point one way.
    torch.float64: 1e-11,
    torch.float32: ORACLE_FP32,
    torch.float16: SINGLE_CASE_FACTOR * UNIT_ROUNDOFF[torch.float16],
    torch.bfloat16: SINGLE_CASE_FACTOR * UNIT_ROUNDOFF[torch.bfloat16],
}
