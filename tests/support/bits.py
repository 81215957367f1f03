"""Numbers that round badly, what they round to, and comparison bit for bit."""

import torch

COUNT = 8192
_INT_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}


def assert_same_bits(got, expected):
    """Equal bit for bit, except that every NaN is the same NaN."""
    assert got.dtype == expected.dtype
    bits = _INT_OF_SIZE[got.itemsize]
    mismatch = (got.view(bits) != expected.view(bits)) & ~(got.isnan() & expected.isnan())
    examples = list(zip(got[mismatch][:3].tolist(), expected[mismatch][:3].tolist(), strict=True))
    assert not mismatch.any(), f"{int(mismatch.sum())} of {mismatch.numel()} differ, (got, expected) = {examples}"


def awkward(dtype, device="cpu"):
    """COUNT numbers of every kind: all binades and signs, subnormals, ties both ways, near-ties, +-0, +-inf, NaN."""
    if dtype == torch.int32:
        # Exact in fp32, so that PyTorch's way through it rounds only once.
        return torch.randint(-(2**24), 2**24, (COUNT,)).int().to(device)
    if dtype in _MANTISSA_BITS:
        # Every eighth of the 65,536 patterns, and so every exponent, in a random lane.
        return ((torch.arange(COUNT) * 8 + torch.randint(8, (COUNT,))).short()).view(dtype).to(device)
    x = torch.randint(-(2**31), 2**31 - 1, (COUNT,), dtype=torch.int64).int().view(torch.float32).to(dtype)
    # 2^-30 … 2^18 includes the whole range of fp16, its subnormals and its overflow.
    x[:4096] = torch.randn(4096, dtype=dtype) * 2.0 ** torch.randint(-30, 18, (4096,))
    for start, target in ((0, torch.bfloat16), (1024, torch.float16)):
        value = x[start : start + 1024].to(target)
        ties = (value.double() + torch.nextafter(value, torch.full_like(value, torch.inf)).double()) / 2
        # One third a tie, one third just under, one third just over: by less than fp32 can see, if the dtype is fp64.
        nudge = 2.0 ** (-22 if dtype == torch.float32 else -40)
        x[start : start + 1024] = ties * (1 + nudge * (torch.arange(1024, dtype=dtype) % 3 - 1))
    tiny, huge = torch.finfo(torch.bfloat16).smallest_normal, torch.finfo(torch.bfloat16).max
    specials = [
        0.0,
        -0.0,
        torch.inf,
        -torch.inf,
        torch.nan,
        tiny / 128,
        -tiny / 256,
        tiny / 3,
        huge * 1.001,
        huge * 1.01,
    ]
    x[-10:] = torch.tensor(specials, dtype=dtype)
    if dtype == torch.float32:
        # A NaN whose payload lies in the half that bf16 drops: cut off, it would be infinity.
        x.view(torch.int32)[-11] = 0x7F800001
    return x.to(device)


def neighbours(x, dtype):
    """The numbers of `dtype` next to each x: below, above (both x itself where it is exact), found in fp64."""
    x = x.double()
    nearest = x.to(dtype)
    down = torch.nextafter(nearest, torch.full_like(nearest, -torch.inf))
    up = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    below = torch.where(nearest.double() <= x, nearest, down)
    above = torch.where(nearest.double() >= x, nearest, up)
    return below, above


def rounded_once(x, dtype):
    """Nearest even of fp64 x: the nearer neighbour, and in a tie the one whose pattern is even."""
    below, above = neighbours(x, dtype)
    to_below, to_above = x - below.double(), above.double() - x
    below_is_even = (below.view(torch.int16) & 1) == 0
    nearer = torch.where((to_below < to_above) | ((to_below == to_above) & below_is_even), below, above)
    # Infinity starts half a step beyond the largest number.
    largest = torch.finfo(dtype).max
    step = 2.0 ** (torch.tensor(largest).double().log2().floor() - _MANTISSA_BITS[dtype])
    beyond = torch.where(x.abs() >= largest + step / 2, x.sign() * torch.inf, x.sign() * largest).to(dtype)
    return torch.where(x.isnan(), x.to(dtype), torch.where(x.abs() > largest, beyond, nearer))
