"""What the accounts of several kernels share: a launch's traffic, the bytes of W and of V = W + s B A, and rates."""

from typing import NamedTuple

import triton


class Traffic(NamedTuple):
    """Of one launch: bytes, and FLOPs of its matrix products, at the `rate` of their number format."""

    loaded: int
    unique: int
    stored: int
    flops: int = 0
    rate: str = "bf16"

    @property
    def memory(self) -> int:
        """Bytes that must cross the memory bus at least once."""
        return self.unique + self.stored


def adapted_traffic(a, *, programs_k: int, blocks_k: int) -> Traffic:
    """V = W + s B A once: W; A by each program of rows; B's first block by each program, and B again in each block of
    K where one block does not hold the rank."""
    left = min(a.R, a.DOT.block_r) * programs_k + (0 if a.DOT.one_block else a.R * blocks_k)
    (weight_loaded, weight), rows = (
        weight_bytes(a, a.CONFIG.block_n, a.CONFIG.block_k),
        triton.cdiv(a.N, a.CONFIG.block_n),
    )
    return Traffic(
        weight_loaded + rows * a.R * a.K * size(a.a_ptr) + a.N * left * size(a.b_ptr),
        weight + a.R * a.K * size(a.a_ptr) + a.N * a.R * size(a.b_ptr),
        0,
        2 * a.N * a.K * padded_rank(a),
        rate(a),
    )


def weight_bytes(a, block_n: int, block_k: int) -> tuple[int, int]:
    """Bytes loaded, and unique ones, of W once: a matrix, or what is packed with its tables and statistics."""
    elements, form = a.N * a.K, a.FORMAT
    if form.fp8:
        rows, columns = form.scale_rows or a.N, form.scale_columns or a.K
        scales = triton.cdiv(a.N, rows) * triton.cdiv(a.K, columns)
        # Of a block's columns each row loads one scale, or each element its own.
        loads = a.N * triton.cdiv(a.K, block_k) if not form.scale_columns or columns % block_k == 0 else elements
        return elements + 4 * loads, elements + 4 * scales
    if form.int4:
        return _int4(a, block_n, block_k)
    if form.fp4:
        # Each program reads the global scale for its blocks of K, of which each is wider than a group.
        groups, blocks = a.N * (a.K // form.group), triton.cdiv(a.N, block_n) * triton.cdiv(a.K, block_k)
        factor = 4 if " " in form.fp4 else 0
        return elements // 2 + groups + blocks * factor, elements // 2 + groups + factor
    if form.nf4_block == 0:
        return elements * size(a.w_ptr), elements * size(a.w_ptr)
    tiles = triton.cdiv(a.N, block_n) * triton.cdiv(a.K, block_k)
    if form.whole_blocks:
        group = min(form.nf4_block, block_k)
        codes, scales, lookups, tables = elements // 2, a.N * (a.K // group), block_n * (block_k // group), 2
    else:
        codes, scales, lookups, tables = elements, elements, block_n * block_k, 1
    blocks = triton.cdiv(elements, form.nf4_block)
    loaded = codes + scales * size(a.absmax_ptr) + tiles * tables * 16 * size(a.code_ptr)
    unique = triton.cdiv(elements, 2) + blocks * size(a.absmax_ptr) + 16 * size(a.code_ptr)
    if form.nested_block:
        nested, code, offset = (size(p) for p in (a.nested_absmax_ptr, a.nested_code_ptr, a.offset_ptr))
        loaded += scales * nested + tiles * (lookups * code + offset)
        unique += triton.cdiv(blocks, form.nested_block) * nested + 256 * code + offset
    return loaded, unique


def _int4(a, block_n: int, block_k: int) -> tuple[int, int]:
    form, groups = a.FORMAT, a.K // a.FORMAT.group if a.FORMAT.group else 1
    words = triton.cdiv(a.N, 8) * a.K if form.words_along_outputs else a.N * triton.cdiv(a.K, 8)
    if not form.has_groups and form.group % block_k == 0:
        loads = a.N * triton.cdiv(a.K, block_k)
    elif not form.has_groups and block_k % form.group == 0:
        loads = a.N * groups
    else:
        loads = a.N * a.K
    loaded, unique = 4 * words + loads * size(a.absmax_ptr), 4 * words + a.N * groups * size(a.absmax_ptr)
    if form.has_zeros:
        loaded, unique = loaded + 4 * loads, unique + 4 * triton.cdiv(a.N, 8) * groups
    if form.has_groups:
        loaded, unique = loaded + 4 * a.K * triton.cdiv(a.N, block_n), unique + 4 * a.K
    return loaded, unique


def padded_rank(a) -> int:
    """The rank as the blocks of a product cover it."""
    return triton.cdiv(a.R, a.DOT.block_r) * a.DOT.block_r


def size(pointer) -> int:
    return pointer.dtype.itemsize


def rate(a) -> str:
    """Which of a GPU's rates the launch's products run at."""
    return rate_of(a.DOT)


def rate_of(dot) -> str:
    if dot.in_pieces:
        return "bf16x3"
    return "tf32x3" if dot.input_precision == "tf32x3" else "fp64" if str(dot.operand) == "fp64" else "bf16"
