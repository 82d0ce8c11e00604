"""Attention whose memory grows with the length, not with its square: FlashAttention-2 in Triton.

    S = softmax_scale * Q K^T (hidden pairs: -inf)     P = exp(S - LSE)      O = P V
    LSE = log(sum(exp(S)))  per query                  delta = rowsum(dO * O) - dLSE
    dV = P^T dO      dP = dO V^T      dS = P * (dP - delta)      dQ = scale * dS K      dK = scale * dS^T Q

S and P (Sq x Sk numbers per head) never leave the chip. A program takes one tile of queries through the keys it may
see, keeping of each row only the running maximum m, the running sum l and the unnormalized output: when m grows, what
was summed so far shrinks by exp(m_old - m_new). Backward computes P again from Q, K and the one number LSE per row;
one kernel walks the keys for dQ (and leaves delta), another the queries for dK and dV. Each writes what it alone owns: no
atomics, so every run gives the same bits, at the price of 7 matrix products instead of 5.

    python kernels/flash_attention.py            checks against float64, then times beside PyTorch's attention
    python kernels/flash_attention.py --tune     measures the tile sizes and prints CONFIGS for this GPU

B, S, H, D = batch, sequence, heads, head_dim; M, N = rows of a tile of queries, of keys.
Sources: Dao 2023 (FlashAttention-2, algorithms 1 and 2); Milakov & Gimelshein 2018 (the running softmax).
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

try:
    import triton
    import triton.language as tl
except ImportError:  # a Mac, Windows: the reference serves
    triton = None


def jit(function):
    """triton.jit that compiles one kernel for all lengths and windows, not one for each divisibility of them."""
    names = ["seqlen_q", "seqlen_k", "left", "right", "count", "slots"]
    return triton.jit(function, do_not_specialize=names) if triton else function


# (architecture, head_dim up to, kernel): (M, N, num_warps, num_stages). Architecture: the major version of the compute
# capability, 8 standing for all not listed. What a table of --tune prints can be pasted here.
CONFIGS = {
    (8, 64, "forward"): (128, 64, 4, 2), (8, 64, "dq"): (64, 64, 4, 2), (8, 64, "dkdv"): (64, 64, 4, 2),
    (8, 128, "forward"): (64, 64, 4, 2), (8, 128, "dq"): (64, 32, 4, 2), (8, 128, "dkdv"): (32, 64, 4, 2),
    (8, 256, "forward"): (64, 32, 8, 1), (8, 256, "dq"): (32, 32, 4, 1), (8, 256, "dkdv"): (32, 32, 4, 1),
    (9, 64, "forward"): (128, 128, 8, 3), (9, 64, "dq"): (128, 64, 8, 3), (9, 64, "dkdv"): (32, 128, 8, 3),
    (9, 128, "forward"): (128, 128, 8, 2), (9, 128, "dq"): (128, 64, 8, 2), (9, 128, "dkdv"): (32, 128, 8, 3),
    (9, 256, "forward"): (128, 64, 8, 2), (9, 256, "dq"): (64, 64, 8, 2), (9, 256, "dkdv"): (64, 64, 8, 2),
}
FLOAT32_CONFIG = (32, 32, 4, 1)  # exact float32 has no tensor cores: small tiles, that registers suffice
INTERPRETER_CONFIG = {"forward": (32, 16, 4, 1), "dq": (32, 16, 4, 1), "dkdv": (16, 32, 4, 1)}


# ---- the slow truth


def visible(seqlen_q: int, seqlen_k: int, left: int, right: int, device=None) -> Tensor:
    """(Sq, Sk) bool: query i sees the keys from i + Sk - Sq - left to i + Sk - Sq + right; a negative bound is none.

    Sk - Sq aligns the last query with the last key ("bottom-right"), which is what decoding with a cache needs.
    """
    i = torch.arange(seqlen_q, device=device)[:, None] + seqlen_k - seqlen_q
    j = torch.arange(seqlen_k, device=device)
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= j >= i - left
    if right >= 0:
        mask &= j <= i + right
    return mask


def _probabilities(q: Tensor, k: Tensor, softmax_scale: float, left: int, right: int) -> tuple[Tensor, Tensor]:
    """P (B, H, Sq, Sk) and LSE (B, H, Sq); a row that sees nothing has P = 0 and LSE = -inf."""
    scores = softmax_scale * torch.einsum("bihd,bjhd->bhij", q, k)
    scores = scores.masked_fill(~visible(q.shape[1], k.shape[1], left, right, q.device), -math.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]), lse


def _widen(q: Tensor, *keys: Tensor) -> list[Tensor]:
    """All in float32 at least, keys and values once for each query head that reads them."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return [q.to(dtype)] + [x.to(dtype).repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in keys]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, left: int = -1, right: int = -1):
    """out as q (B, Sq, H, D) and LSE (B, H, Sq), of k, v (B, Sk, Hkv, D): all of S at once, in float32 at least."""
    dtype = q.dtype
    q, k, v = _widen(q, k, v)
    p, lse = _probabilities(q, k, softmax_scale, left, right)
    return torch.einsum("bhij,bjhd->bihd", p, v).to(dtype), lse


def attention_backward_reference(dout, dlse, q, k, v, out, softmax_scale: float, left: int = -1, right: int = -1):
    """dq, dk, dv by the formulas on top of this file; dout as out, dlse (B, H, Sq) as LSE."""
    dtype, kv_shape = q.dtype, (*k.shape[:3], -1, k.shape[3])  # (B, Sk, Hkv, group, D)
    q, k, v, dout, out = _widen(q, k, v, dout, out)
    p, lse = _probabilities(q, k, softmax_scale, left, right)
    delta = (dout * out).sum(-1).transpose(1, 2) - dlse  # (B, H, Sq)
    delta = delta.masked_fill(lse == -math.inf, 0.0)  # nothing flows through a row that saw nothing, NaN neither
    ds = p * (torch.einsum("bihd,bjhd->bhij", dout, v) - delta[..., None]) * softmax_scale
    dq, dk = torch.einsum("bhij,bjhd->bihd", ds, k), torch.einsum("bhij,bihd->bjhd", ds, q)
    dv = torch.einsum("bhij,bihd->bjhd", p, dout)
    group = (*kv_shape[:3], q.shape[2] // kv_shape[2], kv_shape[4])
    return dq.to(dtype), dk.view(group).sum(3).to(dtype), dv.view(group).sum(3).to(dtype)


# ---- the kernels. A tensor comes as a pointer and its strides (batch, sequence, head, dim). Packed documents have a
# batch stride of 0 and begin at row `start`: so one text serves both.


@jit
def _locate(slot, tiles, cu, length, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Which tile a program works on: its sequence, that one's first row and length, and the tile's index in it."""
    if PACKED:
        b = tl.load(tiles + slot)
        start = tl.minimum(tl.maximum(tl.load(cu + b), 0), length)  # clamped: bad offsets must not lead outside
        size = tl.minimum(tl.maximum(tl.load(cu + b + 1), start), length) - start
        block = slot - (start // BLOCK + b)
    else:
        blocks = tl.cdiv(length, BLOCK)
        b, start, size, block = slot // blocks, slot * 0, length, slot % blocks
    return b, start, size, block


@jit
def _bounds(cu, b, length, PACKED: tl.constexpr):
    """First row and length of sequence b on the other side (keys for a program of queries, and the reverse)."""
    start, size = b * 0, length
    if PACKED:
        start = tl.minimum(tl.maximum(tl.load(cu + b), 0), length)
        size = tl.minimum(tl.maximum(tl.load(cu + b + 1), start), length) - start
    return start, size


@jit
def _base(x, strides, b, start, head):
    """Pointer to row 0 of one head of one sequence. In int64: tensors may hold more than 2^31 elements."""
    b, start, head = tl.cast(b, tl.int64), tl.cast(start, tl.int64), tl.cast(head, tl.int64)
    return x + b * strides[0] + start * strides[1] + head * strides[2]


@jit
def _pointers(base, strides, row, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """(ROWS, BLOCK_D) pointers to a tile from `row` on. Only the scalar needs int64; within a tile int32 is enough."""
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    return base + tl.cast(row, tl.int64) * strides[1] + (rows[:, None] * strides[1] + dims[None, :] * strides[3])


@jit
def _load(base, strides, row, length, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr):
    """A (ROWS, BLOCK_D) tile; zeros beyond `length`, unless FULL promises that no row lies there, and beyond D."""
    pointers = _pointers(base, strides, row, ROWS, BLOCK_D)
    inside = (tl.arange(0, BLOCK_D) < D)[None, :]
    if not FULL:
        inside = inside & (row + tl.arange(0, ROWS) < length)[:, None]
    if FULL and D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=inside, other=0.0)


@jit
def _store(base, strides, row, length, x, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    inside = (row + tl.arange(0, ROWS) < length)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(_pointers(base, strides, row, ROWS, BLOCK_D), x.to(base.dtype.element_ty), mask=inside)


@jit
def _span(first, offset, before, after, length, SIZE: tl.constexpr, STEP: tl.constexpr,
          BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """Where to walk: tiles of STEP over y < length that some x in [first, first + SIZE) sees, if x sees y from
    x + offset - before to x + offset + after. Three walks, as (begins, ends): the last tiles and the first ones, with
    hidden pairs among them, then those between, which need no mask. The first walk is never empty, and comes first:
    else ptxas serializes the tensor cores (its warning C7515), as accumulators then have two origins.
    """
    lo, hi, full, rest = first * 0, length, first * 0, length // STEP * STEP
    if BEFORE:  # all that is divided is >= 0: // rounds toward zero
        lo = tl.minimum(tl.maximum(first + offset - before, 0), length) // STEP * STEP
        full = tl.cdiv(tl.minimum(tl.maximum(first + SIZE - 1 + offset - before, 0), length), STEP) * STEP
    if AFTER:
        hi = tl.minimum(tl.maximum(first + SIZE + offset + after, 0), length)
        rest = tl.minimum(tl.maximum(first + 1 + offset + after, 0), length) // STEP * STEP
    hi = tl.maximum(hi, lo + 1)
    rest = tl.maximum(tl.minimum(rest, (hi - 1) // STEP * STEP), lo)
    if BEFORE:
        full = tl.minimum(full, rest)
    tl.assume(rest < hi)
    return (rest, lo, full), (hi, full, rest)


@jit
def _sees(i, j, offset, left, right, seqlen_k, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether query i sees key j, where i and j broadcast."""
    seen = j < seqlen_k
    if LEFT:
        seen = seen & (j >= i + offset - left)
    if RIGHT:
        seen = seen & (j <= i + offset + right)
    return seen


@jit
def _forward_kernel(Q, K, V, OUT, LSE, stride_q, stride_k, stride_v, stride_o, stride_l, tiles, cu_q, cu_k,
                    seqlen_q, seqlen_k, left, right, scale, GROUP: tl.constexpr, D: tl.constexpr,
                    BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                    PACKED: tl.constexpr):
    """O and LSE of one tile of M queries of one head. Grid: (tiles of all sequences, H)."""
    b, start_q, len_q, block = _locate(tl.program_id(0), tiles, cu_q, seqlen_q, M, PACKED)
    start_k, len_k = _bounds(cu_k, b, seqlen_k, PACKED)
    if (block < 0) | (block * M >= len_q):
        return
    head = tl.program_id(1)
    row = (tl.cdiv(len_q, M) - 1 - block) * M  # last tile first: under a causal mask it has the most to do
    i, offset = row + tl.arange(0, M), len_k - len_q
    k_base = _base(K, stride_k, b, start_k, head // GROUP)
    v_base = _base(V, stride_v, b, start_k, head // GROUP)
    q = _load(_base(Q, stride_q, b, start_q, head), stride_q, row, len_q, M, D, BLOCK_D, False)
    scale2 = scale * 1.4426950408889634  # log2(e): the chip's exponential has base 2
    acc = tl.zeros((M, BLOCK_D), tl.float32)  # sum of exp(s - m) v over the keys so far
    m = tl.full((M,), float("-inf"), tl.float32)  # maximum of s, in base 2
    l = tl.zeros((M,), tl.float32)  # sum of exp(s - m)
    begins, ends = _span(row, offset, left, right, len_k, M, N, LEFT, RIGHT)
    for walk in tl.static_range(3):  # three copies of the loop, of which the last one has no mask
        for n in range(begins[walk], ends[walk], N):
            k = _load(k_base, stride_k, n, len_k, N, D, BLOCK_D, walk == 2)
            s = tl.dot(q, k.T, input_precision="ieee")  # (M, N)
            if walk == 2:
                new_m = tl.maximum(m, tl.max(s, 1) * scale2)  # scale > 0: s * scale - m below is one instruction
                finite = new_m
                p = tl.exp2(s * scale2 - finite[:, None])
            else:
                seen = _sees(i[:, None], (n + tl.arange(0, N))[None, :], offset, left, right, len_k, LEFT, RIGHT)
                s = tl.where(seen, s * scale2, float("-inf"))
                new_m = tl.maximum(m, tl.max(s, 1))
                finite = tl.where(new_m == float("-inf"), 0.0, new_m)  # nothing seen yet: -inf - -inf is NaN
                p = tl.exp2(s - finite[:, None])
            shrink = tl.exp2(m - finite)
            m, l = new_m, l * shrink + tl.sum(p, 1)
            v = _load(v_base, stride_v, n, len_k, N, D, BLOCK_D, walk == 2)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    empty = l == 0.0  # a row that saw no key: O = 0, LSE = -inf
    l = tl.where(empty, 1.0, l)
    lse = tl.where(empty, float("-inf"), (m + tl.log2(l)) * 0.6931471805599453)  # ln(2): to the natural logarithm
    _store(_base(OUT, stride_o, b, start_q, head), stride_o, row, len_q, acc / l[:, None], M, D, BLOCK_D)
    tl.store(_base(LSE, stride_l, b, start_q, head) + i, lse, mask=i < len_q)


@jit
def _dq_kernel(Q, K, V, OUT, DOUT, DQ, LSE, DLSE, LSE2, DELTA, stride_q, stride_k, stride_v, stride_o, stride_do,
               stride_dl, stride_l, tiles, cu_q, cu_k, seqlen_q, seqlen_k, left, right, scale, GROUP: tl.constexpr,
               D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, LEFT: tl.constexpr,
               RIGHT: tl.constexpr, PACKED: tl.constexpr):
    """delta and dQ (strides of OUT) of one tile of M queries of one head. Grid as in forward. LSE2: LSE in base 2."""
    b, start_q, len_q, block = _locate(tl.program_id(0), tiles, cu_q, seqlen_q, M, PACKED)
    start_k, len_k = _bounds(cu_k, b, seqlen_k, PACKED)
    if (block < 0) | (block * M >= len_q):
        return
    head = tl.program_id(1)
    row = (tl.cdiv(len_q, M) - 1 - block) * M
    i, offset = row + tl.arange(0, M), len_k - len_q
    k_base = _base(K, stride_k, b, start_k, head // GROUP)
    v_base = _base(V, stride_v, b, start_k, head // GROUP)
    q = _load(_base(Q, stride_q, b, start_q, head), stride_q, row, len_q, M, D, BLOCK_D, False)
    dout = _load(_base(DOUT, stride_do, b, start_q, head), stride_do, row, len_q, M, D, BLOCK_D, False)
    out = _load(_base(OUT, stride_o, b, start_q, head), stride_o, row, len_q, M, D, BLOCK_D, False)
    lse = tl.load(_base(LSE, stride_l, b, start_q, head) + i, mask=i < len_q, other=float("-inf"))
    dlse = tl.load(_base(DLSE, stride_dl, b, start_q, head) + i * stride_dl[1], mask=i < len_q, other=0.0)
    empty = lse == float("-inf")
    lse2 = tl.where(empty, float("inf"), lse * 1.4426950408889634)  # +inf: P = exp2(... - inf) = 0
    delta = tl.where(empty, 0.0, tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1) - dlse)
    tl.store(_base(LSE2, stride_l, b, start_q, head) + i, lse2, mask=i < len_q)
    tl.store(_base(DELTA, stride_l, b, start_q, head) + i, delta, mask=i < len_q)
    scale2 = scale * 1.4426950408889634
    dq = tl.zeros((M, BLOCK_D), tl.float32)
    begins, ends = _span(row, offset, left, right, len_k, M, N, LEFT, RIGHT)
    for walk in tl.static_range(3):
        for n in range(begins[walk], ends[walk], N):
            k = _load(k_base, stride_k, n, len_k, N, D, BLOCK_D, walk == 2)
            v = _load(v_base, stride_v, n, len_k, N, D, BLOCK_D, walk == 2)
            p = tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale2 - lse2[:, None])  # (M, N)
            if walk < 2:
                seen = _sees(i[:, None], (n + tl.arange(0, N))[None, :], offset, left, right, len_k, LEFT, RIGHT)
                p = tl.where(seen, p, 0.0)
            ds = p * (tl.dot(dout, v.T, input_precision="ieee") - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    _store(_base(DQ, stride_o, b, start_q, head), stride_o, row, len_q, dq * scale, M, D, BLOCK_D)


@jit
def _dkdv_kernel(Q, K, V, DOUT, DK, DV, LSE2, DELTA, stride_q, stride_k, stride_v, stride_do, stride_dk, stride_l,
                 tiles, cu_q, cu_k, seqlen_q, seqlen_k, left, right, scale, GROUP: tl.constexpr, D: tl.constexpr,
                 BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                 PACKED: tl.constexpr):
    """dK and dV of one tile of N keys of one key head, summed over the GROUP query heads that read it.

    Grid: (tiles of all sequences, Hkv). The first keys, seen by most queries under a causal mask, come first.
    """
    b, start_k, len_k, block = _locate(tl.program_id(0), tiles, cu_k, seqlen_k, N, PACKED)
    start_q, len_q = _bounds(cu_q, b, seqlen_q, PACKED)
    if (block < 0) | (block * N >= len_k):
        return
    kv_head, row = tl.program_id(1), block * N
    j, offset = row + tl.arange(0, N), len_k - len_q
    k = _load(_base(K, stride_k, b, start_k, kv_head), stride_k, row, len_k, N, D, BLOCK_D, False)
    v = _load(_base(V, stride_v, b, start_k, kv_head), stride_v, row, len_k, N, D, BLOCK_D, False)
    scale2 = scale * 1.4426950408889634
    dk, dv = tl.zeros((N, BLOCK_D), tl.float32), tl.zeros((N, BLOCK_D), tl.float32)
    begins, ends = _span(row, -offset, right, left, len_q, N, M, RIGHT, LEFT)  # the mask seen from the keys
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        q_base, do_base = _base(Q, stride_q, b, start_q, head), _base(DOUT, stride_do, b, start_q, head)
        lse_base, delta_base = _base(LSE2, stride_l, b, start_q, head), _base(DELTA, stride_l, b, start_q, head)
        for walk in tl.static_range(3):
            for m in range(begins[walk], ends[walk], M):
                i = m + tl.arange(0, M)
                q = _load(q_base, stride_q, m, len_q, M, D, BLOCK_D, walk == 2)
                dout = _load(do_base, stride_do, m, len_q, M, D, BLOCK_D, walk == 2)
                if walk == 2:
                    lse2, delta = tl.load(lse_base + i), tl.load(delta_base + i)
                else:  # +inf makes P = 0 in rows beyond the end
                    lse2 = tl.load(lse_base + i, mask=i < len_q, other=float("inf"))
                    delta = tl.load(delta_base + i, mask=i < len_q, other=0.0)
                p = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * scale2 - lse2[None, :])  # (N, M): P transposed
                if walk < 2:
                    p = tl.where(_sees(i[None, :], j[:, None], offset, left, right, len_k, LEFT, RIGHT), p, 0.0)
                dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
                ds = p * (tl.dot(v, dout.T, input_precision="ieee") - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    _store(_base(DK, stride_dk, b, start_k, kv_head), stride_dk, row, len_k, dk * scale, N, D, BLOCK_D)
    _store(_base(DV, stride_dk, b, start_k, kv_head), stride_dk, row, len_k, dv, N, D, BLOCK_D)


@jit
def _tiles_kernel(cu, tiles, count, slots, steps, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """tiles[slot] = the document b that works there: the last one with cu[b] // BLOCK + b <= slot, by bisection.

    Document b needs cdiv(length, BLOCK) slots; from its first one to the next document's there are never fewer.
    """
    slot = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    low = tl.zeros((SIZE,), tl.int32)
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        begun = tl.load(cu + middle) // BLOCK + middle <= slot
        low, high = tl.where(begun, middle, low), tl.where(begun, high, middle)
    tl.store(tiles + slot, low, mask=slot < slots)


# ---- launching them


def _config(kernel: str, q: Tensor) -> dict:
    """Tile sizes and launch options for the GPU that q lies on."""
    width = max(16, triton.next_power_of_2(q.shape[-1]))  # tl.dot wants at least 16
    if not q.is_cuda:
        M, N, warps, stages = INTERPRETER_CONFIG[kernel]
    elif q.dtype == torch.float32:
        M, N, warps, stages = FLOAT32_CONFIG
    else:
        major = 8 if torch.version.hip else torch.cuda.get_device_capability(q.device)[0]
        size = next(size for size in (64, 128, 256) if width <= size)
        M, N, warps, stages = CONFIGS.get((major, size, kernel)) or CONFIGS[8, size, kernel]
    return {"M": M, "N": N, "BLOCK_D": width, "num_warps": warps, "num_stages": stages}


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of (B, S, H, D), or of packed (total, H, D), which has no batch."""
    return x.stride() if x.dim() == 4 else (0, *x.stride())


def _row_strides(x: Tensor) -> tuple[int, ...]:
    """(batch, sequence, head) of LSE's (B, H, S), or of packed (H, total)."""
    return (x.stride(0), x.stride(2), x.stride(1)) if x.dim() == 3 else (0, x.stride(1), x.stride(0))


def _tiles(cu: Tensor | None, x: Tensor, block: int) -> tuple[Tensor, int]:
    """How many programs the sequences of x need at `block` rows each, and for packed ones the document of each."""
    if cu is None:
        return x, x.shape[0] * triton.cdiv(x.shape[1], block)
    count = len(cu) - 1
    slots = x.shape[0] // block + count  # known without asking the GPU for the lengths
    tiles = torch.empty(slots, dtype=torch.int32, device=x.device)
    _tiles_kernel[(triton.cdiv(slots, 256),)](cu, tiles, count, slots, count.bit_length(), BLOCK=block, SIZE=256)
    return tiles, slots


def _common(q: Tensor, k: Tensor, cu_q, cu_k, left: int, right: int, scale: float) -> dict:
    """The arguments that all three kernels share."""
    side = 1 if cu_q is None else 0  # the dimension of the sequence
    return {"cu_q": cu_q, "cu_k": cu_k, "seqlen_q": q.shape[side], "seqlen_k": k.shape[side], "left": max(left, 0),
            "right": max(right, 0), "scale": scale, "GROUP": q.shape[-2] // k.shape[-2], "D": q.shape[-1],
            "LEFT": left >= 0, "RIGHT": right >= 0, "PACKED": cu_q is not None}


def _addressable(x: Tensor) -> Tensor:
    """x, or a compact copy if the elements of one tile lie more than 2^31 apart."""
    return x if max(abs(stride) for stride in x.stride()[-3:]) < 2**22 or x.is_contiguous() else x.contiguous()


def _kernel_runs_on(x: Tensor) -> bool:
    """Whether the kernel takes x: on a GPU, or on a CPU in Triton's interpreter, which computes bfloat16 wrongly."""
    if x.dtype == torch.float64 or triton is None:
        return False
    interpreted = not isinstance(_forward_kernel, triton.runtime.JITFunction)
    return x.is_cuda or (interpreted and x.device.type == "cpu" and x.dtype != torch.bfloat16)


# ---- the operators: opaque to torch.compile, which needs to know their shapes and gradients only

_ARGUMENTS = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float softmax_scale, int left, int right"


def _documents(cu_q: Tensor | None, cu_k: Tensor | None):
    """For each document the slices of its queries and of its keys."""
    q_ends, k_ends = cu_q.tolist(), cu_k.tolist()
    return [(slice(*q_ends[b:b + 2]), slice(*k_ends[b:b + 2])) for b in range(len(q_ends) - 1)]


@torch.library.custom_op("glassbox::flash_attention", mutates_args=(),
                         schema=f"(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor, Tensor)")
def _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, left, right):
    out, lse = _attention_shapes(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, left, right)
    if not _kernel_runs_on(q):
        if q.dtype != torch.float64:
            warnings.warn(f"flash attention: no kernel for {q.dtype} on {q.device.type}; the PyTorch reference serves, "
                          "whose memory grows with the square of the length")
        if cu_seqlens_q is None:
            return attention_reference(q, k, v, softmax_scale, left, right)
        for rows, keys in _documents(cu_seqlens_q, cu_seqlens_k):
            o, s = attention_reference(q[None, rows], k[None, keys], v[None, keys], softmax_scale, left, right)
            out[rows], lse[:, rows] = o[0], s[0]
        return out, lse
    if q.numel():
        q, k, v = _addressable(q), _addressable(k), _addressable(v)
        config = _config("forward", q)
        with torch.cuda.device_of(q):  # Triton launches on the current device
            tiles, slots = _tiles(cu_seqlens_q, q, config["M"])
            _forward_kernel[(slots, q.shape[-2])](
                q, k, v, out, lse, _strides(q), _strides(k), _strides(v), _strides(out), _row_strides(lse), tiles,
                **_common(q, k, cu_seqlens_q, cu_seqlens_k, left, right, softmax_scale), **config)
    return out, lse


@_attention.register_fake
def _attention_shapes(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, left, right):
    rows = (q.shape[1], q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("glassbox::flash_attention_backward", mutates_args=(),
                         schema="(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
                                f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
def _attention_backward(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, left, right):
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if not _kernel_runs_on(q):
        if cu_seqlens_q is None:
            return attention_backward_reference(dout, dlse, q, k, v, out, softmax_scale, left, right)
        for rows, keys in _documents(cu_seqlens_q, cu_seqlens_k):
            inputs = (dout[None, rows], dlse[None, :, rows], q[None, rows], k[None, keys], v[None, keys],
                      out[None, rows])
            grads = attention_backward_reference(*inputs, softmax_scale, left, right)
            dq[rows], dk[keys], dv[keys] = (x[0] for x in grads)
        return dq, dk, dv
    q, k, v, dout = _addressable(q), _addressable(k), _addressable(v), _addressable(dout)
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)  # what dq's kernel leaves for dkdv's
    common = _common(q, k, cu_seqlens_q, cu_seqlens_k, left, right, softmax_scale)
    with torch.cuda.device_of(q):
        if q.numel():
            config = _config("dq", q)
            tiles, slots = _tiles(cu_seqlens_q, q, config["M"])
            _dq_kernel[(slots, q.shape[-2])](
                q, k, v, out, dout, dq, lse, dlse, lse2, delta, _strides(q), _strides(k), _strides(v),
                _strides(out), _strides(dout), _row_strides(dlse), _row_strides(lse), tiles, **common, **config)
        if k.numel():
            config = _config("dkdv", q)
            tiles, slots = _tiles(cu_seqlens_k, k, config["N"])
            _dkdv_kernel[(slots, k.shape[-2])](
                q, k, v, dout, dk, dv, lse2, delta, _strides(q), _strides(k), _strides(v), _strides(dout),
                _strides(dk), _row_strides(lse), tiles, **common, **config)
    return dq, dk, dv


@_attention_backward.register_fake
def _attention_backward_shapes(dout, dlse, q, k, v, *others):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.softmax_scale, ctx.left, ctx.right = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, dout, dlse):
    q, k, v, cu_q, cu_k, out, lse = ctx.saved_tensors
    grads = _attention_backward(dout, dlse, q, k, v, out, lse, cu_q, cu_k, ctx.softmax_scale, ctx.left, ctx.right)
    return *grads, None, None, None, None, None


_attention.register_autograd(_gradients, setup_context=_save)


def visible_pairs(seqlen_q: int, seqlen_k: int, left: int = -1, right: int = -1) -> int:
    """How many (query, key) pairs the mask lets through: what attention's work is proportional to. No loop."""
    def up_to(bound):  # the sum over i < Sq of how many keys j <= i + bound there are
        def below(x):  # the sum over y < x of y clamped to [0, Sk]
            inner = min(max(x, 0), seqlen_k)
            return inner * (inner - 1) // 2 + seqlen_k * max(x - seqlen_k, 0)
        return below(bound + 1 + seqlen_q) - below(bound + 1)
    offset = seqlen_k - seqlen_q
    too_early = up_to(offset - left - 1) if left >= 0 else 0
    return (up_to(offset + right) if right >= 0 else seqlen_q * seqlen_k) - too_early


def _forward_flops(q, k, cu_q, cu_k, left: int, right: int) -> int:
    """4 D per visible pair. Documents whose lengths cannot be read (a trace) count as equally long."""
    if cu_q is None:
        pairs = q.shape[0] * visible_pairs(q.shape[1], k.shape[1], left, right)
    elif type(cu_q) is Tensor and not cu_q.is_meta:
        lengths = zip(cu_q.diff().tolist(), cu_k.diff().tolist())
        pairs = sum(visible_pairs(rows, keys, left, right) for rows, keys in lengths)
    else:
        count = max(len(cu_q) - 1, 1)
        pairs = count * visible_pairs(q.shape[0] // count, k.shape[0] // count, left, right)
    return 4 * q.shape[-1] * q.shape[-2] * pairs


@register_flop_formula(torch.ops.glassbox.flash_attention, get_raw=True)
def _(q, k, v, cu_q, cu_k, softmax_scale, left, right, *args, **kwargs) -> int:
    return _forward_flops(q, k, cu_q, cu_k, left, right)


@register_flop_formula(torch.ops.glassbox.flash_attention_backward, get_raw=True)
def _(dout, dlse, q, k, v, out, lse, cu_q, cu_k, softmax_scale, left, right, *args, **kwargs) -> int:
    return _forward_flops(q, k, cu_q, cu_k, left, right) * 5 // 2  # 5 products are needed (we do 7), forward has 2


# ---- what users call


def _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p, softmax_scale, causal, window_size, return_lse):
    layout = "(batch, seqlen, heads, head_dim)" if cu_seqlens_q is None else "(total, heads, head_dim)"
    if q.is_floating_point() and torch.is_autocast_enabled(q.device.type):  # as PyTorch's own attention does
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != layout.count(",") + 1:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {layout}")
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}; q, k and v must all be float16, bfloat16, float32 or float64 "
                             f"alike (q is {q.dtype})")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}; they must be on one device")
    if k.shape != v.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}; it must have k's, {tuple(k.shape)}")
    if cu_seqlens_q is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"k has batch {k.shape[0]}; it must have q's, {q.shape[0]}")
    if k.shape[-1] != q.shape[-1] or not 1 <= q.shape[-1] <= 256:
        raise ValueError(f"head_dim of q is {q.shape[-1]}, of k {k.shape[-1]}; it must be the same, from 1 to 256")
    if not k.shape[-2] or not q.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"q has {q.shape[-2]} heads and k {k.shape[-2]}; q's must be a multiple of k's")
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p is {dropout_p}; there is no dropout here: it must be 0")
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if not 0.0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale is {softmax_scale}; it must be positive and finite")
    if len(window_size) != 2 or not all(isinstance(size, int) and size >= -1 for size in window_size):
        raise ValueError(f"window_size is {window_size}; it must be (left, right), integers from 0, or -1 for no bound")
    seq = 1 if cu_seqlens_q is None else 0
    left, right = window_size[0], 0 if causal else window_size[1]
    left = -1 if left >= k.shape[seq] else left  # a window that hides nothing costs nothing
    right = -1 if right >= q.shape[seq] else right
    out, lse = _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, float(softmax_scale), left, right)
    return (out, lse) if return_lse else out


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
                    causal: bool = False, window_size: tuple[int, int] = (-1, -1), return_lse: bool = False):
    """softmax(softmax_scale * q k^T + mask) v, with flash-attention's signature (Dao 2023).

    q (B, Sq, H, D); k, v (B, Sk, Hkv, D), H a multiple of Hkv: query head h reads key head h // (H / Hkv). D <= 256.
    float16, bfloat16, float32, or float64 (the reference computes it); any strides.
    softmax_scale: 1 / sqrt(D) unless given. dropout_p: 0 only.
    causal: query i sees keys up to i + Sk - Sq: the last query sees all of them ("bottom-right").
    window_size (left, right): and only those from i + Sk - Sq - left to i + Sk - Sq + right; -1 is no bound.
    -> out as q; with return_lse also LSE (B, H, Sq), the natural logarithm of each row's sum of exp(scores), in float32
    (float64 for float64), differentiable. A query that sees nothing gets 0, LSE = -inf and no gradient.
    ValueError names the argument that is wrong.
    """
    return _attend(q, k, v, None, None, dropout_p, softmax_scale, causal, window_size, return_lse)


def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                           max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
                           softmax_scale: float | None = None, causal: bool = False,
                           window_size: tuple[int, int] = (-1, -1), return_lse: bool = False):
    """flash_attn_func for documents packed one after the other: no token sees another document.

    q (total_q, H, D); k, v (total_k, Hkv, D). cu_seqlens_q, cu_seqlens_k (documents + 1,) int32 on the same device:
    document b has rows cu_seqlens[b] ... cu_seqlens[b + 1] - 1; they rise from 0 to the total (equal neighbours: an
    empty document). That is checked once per tensor on a GPU, as it waits for it; not under torch.compile.
    max_seqlen_q, max_seqlen_k are flash-attention's; nothing here depends on them.
    -> out as q; with return_lse also LSE (H, total_q). The rest as in flash_attn_func.
    """
    for name, cu, x in (("cu_seqlens_q", cu_seqlens_q, q), ("cu_seqlens_k", cu_seqlens_k, k)):
        if cu.dtype != torch.int32 or cu.dim() != 1 or len(cu) < 1 or not cu.is_contiguous():
            raise ValueError(f"{name} is {cu.dtype} of shape {tuple(cu.shape)}; it must be contiguous int32 "
                             "(documents + 1,)")
        if cu.device != q.device:
            raise ValueError(f"{name} is on {cu.device} and q on {q.device}; they must be on one device")
        if not torch.compiler.is_compiling() and getattr(cu, "_rises_to", None) != x.shape[0]:
            ends = cu.tolist()
            if ends[0] != 0 or ends[-1] != x.shape[0] or any(a > b for a, b in zip(ends, ends[1:])):
                raise ValueError(f"{name} is {cu}; it must rise from 0 to the number of rows, {x.shape[0]}")
            cu._rises_to = x.shape[0]  # this very tensor serves every layer
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(f"cu_seqlens_q names {len(cu_seqlens_q) - 1} documents, cu_seqlens_k "
                         f"{len(cu_seqlens_k) - 1}; there must be as many")
    return _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p, softmax_scale, causal, window_size, return_lse)


def _median_ms(function) -> float:
    from triton.testing import do_bench  # clears the L2 cache before each run, times with events
    return do_bench(function, warmup=20, rep=100, return_mode="median")


def check(device: torch.device) -> bool:
    """Prints our error beside what is allowed, for shapes that have been traps: uneven, windowed, grouped, packed."""
    fine = True
    on_gpu = device.type == "cuda"
    for dtype in (torch.float32, torch.float16) + ((torch.bfloat16,) if on_gpu else ()):
        for Sq, Sk, D, causal, window in ((33, 75, 40, True, (-1, -1)), (75, 33, 64, True, (-1, -1)),
                                          (70, 90, 32, False, (20, 13))):
            if on_gpu:
                Sq, Sk = 8 * Sq, 8 * Sk
            torch.manual_seed(0)
            q, k, v = (torch.randn(2, length, heads, D, device=device, dtype=dtype, requires_grad=True)
                       for length, heads in ((Sq, 2), (Sk, 1), (Sk, 1)))
            right = 0 if causal else window[1]
            out = flash_attn_func(q, k, v, causal=causal, window_size=window)
            dout = torch.randn_like(out)
            ours = (out, *torch.autograd.grad(out, (q, k, v), dout))
            wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
            true = attention_reference(*wide, D ** -0.5, window[0], right)[0]
            true = (true, *torch.autograd.grad(true, wide, dout.double()))
            error = max(float((a.double() - b).abs().max()) for a, b in zip(ours, true, strict=True))
            allowed = max(float(b.abs().max()) for b in true) * (4 * torch.finfo(dtype).eps + 1e-5)
            fine &= error <= allowed
            print(f"{str(dtype)[6:]:9} Sq {Sq:4} Sk {Sk:4} D {D:3} causal {causal!s:5} window {window!s:8}: largest "
                  f"error of O, dQ, dK, dV {error:.1e}, allowed {allowed:.1e}{'' if error <= allowed else '  WRONG'}")
    return fine


def compare(device: torch.device) -> None:
    """Times ours beside PyTorch's attention."""
    print("milliseconds, bfloat16, causal, batch 2, 32 heads, 8192 tokens (medians)")
    for D in (64, 128):
        q, k, v = (torch.randn(2, 8192, 32, D, device=device, dtype=torch.bfloat16, requires_grad=True)
                   for _ in range(3))
        dout = torch.randn_like(q)
        flops = 4 * D * 32 * 2 * visible_pairs(8192, 8192, right=0)

        def torch_attention(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        for name, function in (("ours", lambda q, k, v: flash_attn_func(q, k, v, causal=True)),
                               ("torch", torch_attention)):
            out = function(q, k, v)
            forward = _median_ms(lambda: function(q, k, v))
            backward = _median_ms(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
            print(f"D {D:3} {name:5} forward {forward:7.3f} ({flops / forward / 1e9:4.0f} TFLOP/s)   "
                  f"backward {backward:7.3f} ({2.5 * flops / backward / 1e9:4.0f} TFLOP/s)")


def tune(device: torch.device, head_dims: list[int]) -> None:
    """Tries tile sizes for each kernel on a causal bfloat16 problem, the others as they stand; prints lines of CONFIGS.

    A candidate that does not fit the chip is left out, and so is one whose result differs from the present one's.
    """
    major = 8 if torch.version.hip else torch.cuda.get_device_capability(device)[0]
    sizes = {"forward": [(M, N) for M in (64, 128) for N in (32, 64, 128)],
             "dq": [(M, N) for M in (64, 128) for N in (32, 64, 128)],
             "dkdv": [(M, N) for M in (32, 64, 128) for N in (64, 128)]}
    for D in head_dims:
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 4096, 16, D, device=device, dtype=torch.bfloat16, requires_grad=True)
                   for _ in range(3))
        dout = torch.randn_like(q)
        out = flash_attn_func(q, k, v, causal=True)
        present = (out, *torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
        for kernel in ("forward", "dq", "dkdv"):
            def run():
                if kernel == "forward":
                    return (flash_attn_func(q, k, v, causal=True),)
                return torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
            key, times = (major, D, kernel), {}
            before = CONFIGS.get(key, CONFIGS[8, D, kernel])
            candidates = [(M, N, warps, stages) for M, N in sizes[kernel] for warps in (4, 8) for stages in (1, 2, 3)]
            for CONFIGS[key] in dict.fromkeys([before] + candidates):
                try:
                    results = run()
                except Exception as error:  # too much shared memory, or a compiler's limit
                    print(f"  {CONFIGS[key]}: {type(error).__name__}", file=sys.stderr)
                    continue
                expected = present[:1] if kernel == "forward" else present[1:]
                if all(torch.allclose(a, b, atol=0.03, rtol=0.03) for a, b in zip(results, expected, strict=True)):
                    times[CONFIGS[key]] = _median_ms(run)
                    print(f"  {key} {CONFIGS[key]}: {times[CONFIGS[key]]:.3f} ms", file=sys.stderr)
                else:
                    print(f"  {CONFIGS[key]}: wrong result", file=sys.stderr)
            CONFIGS[key] = min(times, key=times.get)
            print(f"    {key}: {CONFIGS[key]},  # {times[CONFIGS[key]]:.3f} ms, was {times[before]:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", type=int, nargs="*", choices=(64, 128, 256), metavar="HEAD_DIM",
                        help="measure tile sizes on this GPU, for head_dim 64, 128 and 256 unless given")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.tune is not None:
        if device.type != "cuda" or triton is None:
            parser.error("--tune needs a GPU and Triton")
        return tune(device, args.tune or [64, 128, 256])
    fine = check(device)
    if device.type == "cuda":
        compare(device)
    else:
        print("no GPU here: nothing is timed (Triton's interpreter, TRITON_INTERPRET=1, checks but does not hurry)")
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
