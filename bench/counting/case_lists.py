"""Which calls are compiled: one for each compiled path, all, and those in the table of roofs."""

from collections.abc import Iterable

import torch

from .cases import BF16, DTYPES, FP4, FP8, FP16, FP32, FP64, INT4, Case


def quick_cases() -> Iterable[Case]:
    """One call per compiled path: every type, both spaces, each class of rank, each class of shape, each option.

    Ranks differ in the blocks they are walked in, in dividing by 16, and in the backward's fused product. Types that
    share their code with others (16-bit adapters, fp64 for gradcheck) get fewer.
    """
    for dtypes in DTYPES:
        for space in _spaces(dtypes[0]):
            for rank in (1, 8, 16, 24, 64, 128) if FP32 in dtypes else (16, 24, 64):
                yield Case(*dtypes, space, rank)
            yield Case(*dtypes, space, 16, 1024, 4096, 1)
            yield Case(*dtypes, space, 100, 1001, 333, 77)
            yield Case(*dtypes, space, 24, 1001, 333, 77)
        # What spilled once: wide values beside masks that no size makes superfluous.
        yield Case(*dtypes, "token", 33)
        yield Case(*dtypes, "token", 1, 1001, 333, 1)
        yield Case(*dtypes, _spaces(dtypes[0])[-1], 16, 1001, 333, 1)
        yield Case(*dtypes, _spaces(dtypes[0])[-1], 24, 1024, 4096, 1)
    yield from _options(DTYPES[:1] + DTYPES[3:5], (16,))
    yield from _nf4(DTYPES[:1], (8, 16, 128), ("nested",))
    yield from _nf4(DTYPES[1:2], (16,), ("plain", "parity"))
    for dtypes in DTYPES:
        yield from _mlps(dtypes, (16, 24, 33, 96) if FP32 in dtypes else (24,))
        yield from _experts(dtypes, (16, 24, 40) if FP32 in dtypes else (24,))
        yield from _siblings(dtypes, (16, 24, 64) if FP32 in dtypes else (24,))
    # What spilled once, and what loaded a number at a time.
    yield Case(FP64, FP64, "token", 16, 1001, 333, 77, mlp="gelu_tanh", bias=True)
    yield Case(FP32, FP32, "weight", 32, mlp="silu")
    yield from _int4(DTYPES[:1], (8, 16, 128))
    yield from _fp8_and_fp4((8, 16, 128))
    yield from _accumulating()


def all_cases() -> Iterable[Case]:
    """Every rank from 1 to 1024; Llama-3-8B's shapes and an odd one; one token to 8192; every option."""
    yield from quick_cases()
    for dtypes in DTYPES:
        for space in _spaces(dtypes[0]):
            for rank in range(1, 1025):
                yield Case(*dtypes, space, rank)
            for shape in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (1001, 333)):
                for tokens in (1, 512, 8192):
                    for rank in (1, 16, 24, 384):
                        yield Case(*dtypes, space, rank, *shape, tokens)
    yield from _options(DTYPES, (1, 16, 24, 100, 384))
    yield from _nf4(DTYPES[:5], (1, 8, 16, 17, 24, 32, 33, 64, 384, 1024), ("plain", "nested", "parity"))
    yield from _int4(DTYPES[:4], (16, 24, 32, 33, 64, 384))
    yield from _fp8_and_fp4((24, 32, 33, 64, 384))
    for dtypes in DTYPES:
        yield from _mlps(dtypes, (1, 8, 16, 17, 24, 32, 33, 64, 100, 384, 1024))
        yield from _experts(dtypes, (1, 8, 16, 17, 24, 32, 33, 64, 100, 384, 1024))
        yield from _siblings(dtypes, (1, 8, 16, 17, 24, 32, 33, 64, 100, 384, 1024))


def roof_cases() -> Iterable[Case]:
    """What the table of roofs shows: 4096 × 4096 at 8192 tokens, three ranks; Llama-3-8B's other shapes; packed
    weights."""
    for space in ("token", "weight"):
        for rank in (16, 64, 384):
            yield Case(BF16, FP32, space, rank, tokens=8192)
        for rank in (16, 64):
            yield Case(BF16, BF16, space, rank, tokens=8192)
    for shape in ((1024, 4096), (14336, 4096), (4096, 14336)):
        yield Case(BF16, FP32, "weight", 16, *shape, 8192)
    for rank in (16, 64):
        yield Case(BF16, FP32, "weight", rank, tokens=8192, nf4="nested")
    for packed in ({"int4": "symmetric"}, {"fp8": "block"}, {"fp4": "NVFP4"}, {"fp4": "MXFP4"}):
        yield Case(BF16, FP32, "weight", 16, tokens=8192, **packed)
    for space in ("token", "weight"):
        for rank in (16, 64):
            yield Case(BF16, FP32, space, rank, 14336, 4096, 8192, mlp="silu")


def _mlps(dtypes, ranks) -> Iterable[Case]:
    """Whole and odd features, both activations, with and without biases, gate and up in two layers and in one."""
    for space in _spaces(dtypes[0]):
        for rank in ranks:
            mlp = Case(*dtypes, space, rank, mlp="silu")
            yield mlp
            yield mlp._replace(mlp="gelu_tanh", bias=True)
            yield mlp._replace(out_features=1001, in_features=333, tokens=77, mlp="gelu_tanh", bias=True)
        mlp = Case(*dtypes, space, ranks[0], mlp="silu", stacked=True)
        yield mlp
        yield mlp._replace(mlp="gelu_tanh", bias=True)


def _siblings(dtypes, ranks) -> Iterable[Case]:
    """Layers whose norms, and whose W', have one launch: three with inputs in parts, and two with odd features."""
    for space in _spaces(dtypes[0]):
        for rank in ranks:
            yield Case(*dtypes, space, rank, siblings=(4096, 1024, 1024))
            yield Case(*dtypes, space, rank, 1001, 333, 77, siblings=(1001, 77))


def _experts(dtypes, ranks) -> Iterable[Case]:
    """Whole and odd features, with and without biases, rounded in both ways; act(gate) ⊙ up in the same pass."""
    for rank in ranks:
        experts = Case(*dtypes, "token", rank, 1536, 2048, 4096, experts=128)
        yield experts
        yield experts._replace(out_features=1001, in_features=333, tokens=77, experts=5, bias=True, rounding="nearest")
        yield experts._replace(mlp="silu")
        yield experts._replace(out_features=1002, in_features=333, tokens=77, experts=5, mlp="gelu_tanh")


def _nf4(dtype_pairs, ranks, kinds) -> Iterable[Case]:
    for dtypes in dtype_pairs:
        for rank in ranks:
            for nf4 in kinds:
                case = Case(*dtypes, _spaces(dtypes[0])[-1], rank, nf4=nf4)
                yield case
                yield case._replace(out_features=1024)
                yield case._replace(out_features=1001, in_features=333, tokens=77)
        # Token space, with an odd and an even number of inputs: what dropout needs.
        yield Case(*dtypes, "token", 16, dropout_mode="lora", nf4="nested")
        yield Case(*dtypes, "token", 16, 1001, 333, 77, dropout_mode="lora", nf4="nested")


def _int4(dtype_pairs, ranks) -> Iterable[Case]:
    for dtypes in dtype_pairs:
        for int4, (_, _, group) in INT4.items():
            for rank in ranks:
                yield Case(*dtypes, _spaces(dtypes[0])[-1], rank, int4=int4)
            # The zeros of the last output features share a word with none; groups divide input features.
            yield Case(*dtypes, _spaces(dtypes[0])[-1], ranks[0], 1001, 3 * group if group else 333, 77, int4=int4)
            yield Case(*dtypes, "token", ranks[0], dropout_mode="lora", int4=int4)


def _fp8_and_fp4(ranks) -> Iterable[Case]:
    for packed in (*({"fp8": kind} for kind in FP8), *({"fp4": kind} for kind in FP4)):
        for rank in ranks:
            yield Case(BF16, FP32, "weight", rank, **packed)
        # Blocks of FP8 may be cut; groups divide input features.
        yield Case(BF16, FP32, "weight", ranks[0], 1001, 3 * 32 if "fp4" in packed else 333, 77, **packed)
        yield Case(BF16, FP32, "token", ranks[0], dropout_mode="lora", **packed)


def _accumulating() -> Iterable[Case]:
    """Each type, ranks of one and of several blocks, inputs in parts, odd sizes, and decoded weights."""
    for dtypes in DTYPES:
        for rank in (16, 64):
            yield Case(*dtypes, "token", rank, accumulating=True)
        yield Case(*dtypes, "token", 16, 1024, 4096, accumulating=True)
        yield Case(*dtypes, "token", 24, 1001, 333, 77, accumulating=True)
        if "weight" in _spaces(dtypes[0]):
            for rank in (16, 24, 64):
                yield Case(*dtypes, "weight", rank, accumulating=True)
            yield Case(*dtypes, "weight", 24, 1001, 333, 77, accumulating=True)
    for packed in ({"nf4": "nested"}, {"int4": "symmetric"}):
        yield Case(BF16, FP32, "weight", 16, accumulating=True, **packed)


def _options(dtype_pairs, ranks) -> Iterable[Case]:
    for dtypes in dtype_pairs:
        for rank in ranks:
            for space in _spaces(dtypes[0]):
                plain = Case(*dtypes, space, rank)
                yield plain._replace(bias=True)
                yield plain._replace(rounding="nearest")
                for trains in ("adapter", "factors", "nothing", "frozen scale"):
                    yield plain._replace(trains=trains)
            token = Case(*dtypes, "token", rank)
            for mode in ("lora", "peft"):
                yield token._replace(dropout_mode=mode)
                yield token._replace(dropout_mode=mode, bias=True)
            for layout in ("expanded", "transposed"):
                yield token._replace(grad_layout=layout)


def _spaces(dtype: torch.dtype) -> tuple[str, ...]:
    # Training in fp16 with a trained magnitude runs in token space only, and `dispatch` says so.
    return ("token",) if dtype == FP16 else ("token", "weight")
