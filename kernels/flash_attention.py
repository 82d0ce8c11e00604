"""Attention whose memory grows with the length, not with its square: FlashAttention-2 in Triton.

    S = softmax_scale * Q K^T (hidden pairs: -inf)     P = exp(S - LSE)      O = P V
    LSE = log(sum(exp(S)))  per query                  delta = rowsum(dO * O) - dLSE
    dV = P^T dO      dP = dO V^T      dS = P * (dP - delta)      dQ = scale * dS K      dK = scale * dS^T Q

S and P (Sq x Sk numbers per head) never leave the chip. A program takes one tile of queries through the keys it may
see, keeping of each row only the running maximum m, the running sum l and the unnormalized output: when m grows, what
was summed so far shrinks by exp(m_old - m_new). Backward computes P again from Q, K and the one number LSE per row;
one kernel walks the keys for dQ (and leaves delta), another the queries for dK and dV. Each writes what it alone owns:
no atomics, so every run gives the same bits, at the price of 7 matrix products instead of 5.

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
    (9, 256, "forward"): (128, 64, 8, 2), (9, 256, "dq"): (64, 64, 8, 2), (9, 256, "dkdv"): (32, 64, 8, 2),
}
FLOAT32_CONFIGS = {128: (32, 32, 8, 1), 256: (16, 16, 4, 1)}  # no tensor cores: small tiles, that registers suffice
INTERPRETER_CONFIG = {"forward": (32, 16, 4, 1), "dq": (32, 16, 4, 1), "dkdv": (16, 32, 4, 1)}


# ---- the slow truth
def visible(seqlen_q: int, seqlen_k: int, left: int, right: int, device=None) -> Tensor:
    """(Sq, Sk) bool: query i sees the keys from i + Sk - Sq - left to i + Sk - Sq + right; a negative bound is none.
    The last query stands at the last key ("bottom-right"), which is what decoding with a cache needs."""
    i = torch.arange(seqlen_q, device=device)[:, None] + seqlen_k - seqlen_q
    j = torch.arange(seqlen_k, device=device)
    return ((j >= i - left) | (left < 0)) & ((j <= i + right) | (right < 0))


def _probabilities(q: Tensor, k: Tensor, softmax_scale: float, left: int, right: int) -> tuple[Tensor, Tensor]:
    """P (B, H, Sq, Sk) and LSE (B, H, Sq); a row that sees nothing has P = 0 and LSE = -inf."""
    scores = softmax_scale * torch.einsum("bihd,bjhd->bhij", q, k)
    scores = scores.masked_fill(~visible(q.shape[1], k.shape[1], left, right, q.device), -math.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]), lse


def _widen(heads: int, *tensors: Tensor) -> list[Tensor]:
    """In float32 at least, and keys and values once for each query head that reads them."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)).repeat_interleave(heads // x.shape[2], dim=2)
            for x in tensors]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, left: int = -1, right: int = -1):
    """out as q (B, Sq, H, D) and LSE (B, H, Sq), of k, v (B, Sk, Hkv, D): all of S at once, in float32 at least."""
    wide_q, k, v = _widen(q.shape[2], q, k, v)
    p, lse = _probabilities(wide_q, k, softmax_scale, left, right)
    return torch.einsum("bhij,bjhd->bihd", p, v).to(q.dtype), lse


def attention_backward_reference(dout, dlse, q, k, v, out, softmax_scale: float, left: int = -1, right: int = -1):
    """dq, dk, dv by the formulas on top of this file; dout as out, dlse (B, H, Sq) as LSE."""
    dtype, groups = q.dtype, (k.shape[2], q.shape[2] // k.shape[2])
    q, k, v, dout, out = _widen(q.shape[2], q, k, v, dout, out)
    p, lse = _probabilities(q, k, softmax_scale, left, right)
    delta = ((dout * out).sum(-1).transpose(1, 2) - dlse).masked_fill(lse == -math.inf, 0.0)  # (B, H, Sq); never NaN
    ds = p * (torch.einsum("bihd,bjhd->bhij", dout, v) - delta[..., None]) * softmax_scale
    dq, dk = torch.einsum("bhij,bjhd->bihd", ds, k), torch.einsum("bhij,bihd->bjhd", ds, q)
    dv = torch.einsum("bhij,bihd->bjhd", p, dout)
    dk, dv = (x.unflatten(2, groups).sum(3) for x in (dk, dv))  # over the query heads of each key head
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


# ---- the kernels. A tensor comes as a pointer and its strides (batch, sequence, head, dim). Packed documents have a
# batch stride of 0 and begin at row `start`: so one text serves both.
@jit
def _bounds(cu, b, length, PACKED: tl.constexpr):
    """First row and length of sequence b. Bad offsets are clamped: they must not lead outside."""
    start, size = b * 0, length
    if PACKED:
        start = tl.minimum(tl.maximum(tl.load(cu + b), 0), length)
        size = tl.minimum(tl.maximum(tl.load(cu + b + 1), start), length) - start
    return start, size


@jit
def _locate(slot, tiles, cu, length, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """The tile that a program works on: its sequence, that one's first row and length, the tile's index in it."""
    b = tl.load(tiles + slot) if PACKED else slot // tl.cdiv(length, BLOCK)
    start, size = _bounds(cu, b, length, PACKED)
    return b, start, size, slot - (start // BLOCK + b if PACKED else b * tl.cdiv(length, BLOCK))


@jit
def _base(x, strides, b, start, head):
    """Pointer to row 0 of one head of one sequence. In int64: tensors may hold more than 2^31 elements."""
    b, start, head = tl.cast(b, tl.int64), tl.cast(start, tl.int64), tl.cast(head, tl.int64)
    return x + b * strides[0] + start * strides[1] + head * strides[2]


@jit
def _load(base, strides, row, length, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr):
    """(ROWS, BLOCK_D) from `row` on; zeros beyond D and, unless FULL promises that there are none, beyond `length`."""
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)  # only the scalar part of a pointer needs int64
    pointers = base + tl.cast(row, tl.int64) * strides[1] + (rows[:, None] * strides[1] + dims[None, :] * strides[3])
    if FULL and D == BLOCK_D:
        x = tl.load(pointers)
    else:
        inside = (dims < D)[None, :] if FULL else (row + rows < length)[:, None] & (dims < D)[None, :]
        x = tl.load(pointers, mask=inside, other=0.0)
    return x


@jit
def _store(base, strides, row, length, x, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(row, tl.int64) * strides[1] + (rows[:, None] * strides[1] + dims[None, :] * strides[3])
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(row + rows < length)[:, None] & (dims < D)[None, :])


@jit
def _span(first, offset, before, after, length, SIZE: tl.constexpr, STEP: tl.constexpr,
          BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """Where to walk: tiles of STEP over y < length that some x in [first, first + SIZE) sees, if x sees y from
    x + offset - before to x + offset + after. Three walks, as (begins, ends): the last tiles and the first ones, with
    hidden pairs among them, then those between, which need no mask. The first walk is never empty, and comes first:
    else ptxas serializes the tensor cores (its warning C7515), as accumulators then have two origins."""
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
def _sees(i, j, offset, left, right, seqlen_k):
    """Whether query i sees key j, where i and j broadcast."""
    return (j < seqlen_k) & (j >= i + offset - left) & (j <= i + offset + right)


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
    k_base, v_base = _base(K, stride_k, b, start_k, head // GROUP), _base(V, stride_v, b, start_k, head // GROUP)
    q = _load(_base(Q, stride_q, b, start_q, head), stride_q, row, len_q, M, D, BLOCK_D, False)
    scale2 = scale * 1.4426950408889634  # log2(e): the chip's exponential has base 2
    acc = tl.zeros((M, BLOCK_D), tl.float32)  # sum of exp(s - m) v over the keys so far
    m, l = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)  # max of s in base 2, sum of exp(s - m)
    begins, ends = _span(row, offset, left, right, len_k, M, N, LEFT, RIGHT)
    for walk in tl.static_range(3):  # three copies of the loop, of which the last one has no mask
        for n in range(begins[walk], ends[walk], N):
            k = _load(k_base, stride_k, n, len_k, N, D, BLOCK_D, walk == 2)
            s = tl.dot(q, k.T, input_precision="ieee")  # (M, N)
            if walk < 2:
                seen = _sees(i[:, None], (n + tl.arange(0, N))[None, :], offset, left, right, len_k)
                s = tl.where(seen, s, float("-inf"))
            new_m = tl.maximum(m, tl.max(s, 1) * scale2)  # scale > 0, so the maximum may come first
            finite = tl.where(new_m == float("-inf"), 0.0, new_m) if walk < 2 else new_m  # -inf - -inf would be NaN
            p = tl.exp2(s * scale2 - finite[:, None])
            shrink = tl.exp2(m - finite)
            m, l = new_m, l * shrink + tl.sum(p, 1)
            v = _load(v_base, stride_v, n, len_k, N, D, BLOCK_D, walk == 2)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    l = tl.where(l == 0.0, 1.0, l)  # a row that saw no key: O = 0 / 1, LSE = -inf + 0
    lse = (m + tl.log2(l)) * 0.6931471805599453  # ln(2): to the natural logarithm
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
    k_base, v_base = _base(K, stride_k, b, start_k, head // GROUP), _base(V, stride_v, b, start_k, head // GROUP)
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
    scale2, dq = scale * 1.4426950408889634, tl.zeros((M, BLOCK_D), tl.float32)
    begins, ends = _span(row, offset, left, right, len_k, M, N, LEFT, RIGHT)
    for walk in tl.static_range(3):
        for n in range(begins[walk], ends[walk], N):
            k = _load(k_base, stride_k, n, len_k, N, D, BLOCK_D, walk == 2)
            v = _load(v_base, stride_v, n, len_k, N, D, BLOCK_D, walk == 2)
            p = tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale2 - lse2[:, None])  # (M, N)
            if walk < 2:
                seen = _sees(i[:, None], (n + tl.arange(0, N))[None, :], offset, left, right, len_k)
                p = tl.where(seen, p, 0.0)
            ds = p * (tl.dot(dout, v.T, input_precision="ieee") - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    _store(_base(DQ, stride_o, b, start_q, head), stride_o, row, len_q, dq * scale, M, D, BLOCK_D)


@jit
def _dkdv_kernel(Q, K, V, DOUT, DK, DV, LSE2, DELTA, stride_q, stride_k, stride_v, stride_do, stride_dk, stride_l,
                 tiles, cu_q, cu_k, seqlen_q, seqlen_k, left, right, scale, GROUP: tl.constexpr, D: tl.constexpr,
                 BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                 PACKED: tl.constexpr):
    """dK and dV of one tile of N keys, summed over the GROUP query heads that read it. Grid: (tiles, Hkv). First tile
    first: under a causal mask most queries see it."""
    b, start_k, len_k, block = _locate(tl.program_id(0), tiles, cu_k, seqlen_k, N, PACKED)
    start_q, len_q = _bounds(cu_q, b, seqlen_q, PACKED)
    if (block < 0) | (block * N >= len_k):
        return
    kv_head, row = tl.program_id(1), block * N
    j, offset = row + tl.arange(0, N), len_k - len_q
    k = _load(_base(K, stride_k, b, start_k, kv_head), stride_k, row, len_k, N, D, BLOCK_D, False)
    v = _load(_base(V, stride_v, b, start_k, kv_head), stride_v, row, len_k, N, D, BLOCK_D, False)
    scale2, dk, dv = scale * 1.4426950408889634, tl.zeros((N, BLOCK_D), tl.float32), tl.zeros((N, BLOCK_D), tl.float32)
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
                    p = tl.where(_sees(i[None, :], j[:, None], offset, left, right, len_k), p, 0.0)
                dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
                ds = p * (tl.dot(v, dout.T, input_precision="ieee") - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    _store(_base(DK, stride_dk, b, start_k, kv_head), stride_dk, row, len_k, dk * scale, N, D, BLOCK_D)
    _store(_base(DV, stride_dk, b, start_k, kv_head), stride_dk, row, len_k, dv, N, D, BLOCK_D)


@jit
def _tiles_kernel(cu, tiles, count, slots, steps, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """tiles[slot] = the document b that works there: the last one with cu[b] // BLOCK + b <= slot, by bisection. (From
    there to the next document's first slot there are never fewer than the cdiv(length, BLOCK) slots that b needs.)"""
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
    """Tile sizes and launch options for the device that q lies on."""
    width = max(16, triton.next_power_of_2(q.shape[-1]))  # tl.dot wants at least 16
    if not q.is_cuda or q.dtype == torch.float32:
        M, N, warps, stages = FLOAT32_CONFIGS[max(width, 128)] if q.is_cuda else INTERPRETER_CONFIG[kernel]
    else:
        arch, key = torch.cuda.get_device_capability(q.device)[0], (max(width, 64), kernel)
        M, N, warps, stages = CONFIGS.get((8 if torch.version.hip else arch, *key), CONFIGS[(8, *key)])
    return {"M": M, "N": N, "BLOCK_D": width, "num_warps": warps, "num_stages": stages}


def _launch(kernel, name: str, tensors: tuple, strided: tuple, q, k, cu_q, cu_k, scale, left: int, right: int) -> None:
    """Run a kernel over the tiles of queries, or of keys for "dkdv". `strided`: the tensors whose strides it takes."""
    config = _config(name, q)
    x, cu, block = (k, cu_k, config["N"]) if name == "dkdv" else (q, cu_q, config["M"])
    if not x.numel():
        return
    strides = [x.stride() if x.dim() == 4 else (0, *x.stride()) for x in strided]  # (batch, sequence, head, dim)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        tiles, slots = None, math.prod(x.shape[:-3]) * triton.cdiv(x.shape[-3], block)
        if cu is not None:
            count = len(cu) - 1
            slots = x.shape[0] // block + count  # enough, and known without asking the GPU for the lengths
            tiles = torch.empty(slots, dtype=torch.int32, device=x.device)
            _tiles_kernel[(triton.cdiv(slots, 256),)](cu, tiles, count, slots, count.bit_length(), block, SIZE=256)
        kernel[(slots, x.shape[-2])](
            *tensors, *strides, tiles, cu_q, cu_k, q.shape[-3], k.shape[-3], left if left >= 0 else 2**30,
            right if right >= 0 else 2**30, scale, GROUP=q.shape[-2] // k.shape[-2], D=q.shape[-1], LEFT=left >= 0,
            RIGHT=right >= 0, PACKED=cu is not None, **config)


def _addressable(*tensors: Tensor) -> list[Tensor]:
    """Each, or its compact copy where the elements of one tile would lie more than 2^31 apart."""
    return [x.contiguous() if max(x.stride()[-3:]) >= 2**22 else x for x in tensors]


def _kernel_runs_on(x: Tensor) -> bool:
    """Whether the kernel takes x: on a GPU, or on a CPU in Triton's interpreter, which computes bfloat16 wrongly."""
    if x.is_cuda or triton is None or x.device.type != "cpu":
        return x.is_cuda and triton is not None and x.dtype != torch.float64
    return not isinstance(_forward_kernel, triton.runtime.JITFunction) and x.dtype in (torch.float16, torch.float32)


# ---- the operators: opaque to torch.compile, which needs to know their shapes and gradients only
_ARGUMENTS = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float softmax_scale, int left, int right"


def _documents(cu_q: Tensor, cu_k: Tensor):
    """For each document the slices of its queries and of its keys."""
    q, k = cu_q.tolist(), cu_k.tolist()
    return zip(map(slice, q, q[1:]), map(slice, k, k[1:]))


@torch.library.custom_op("glassbox::flash_attention", mutates_args=(),
                         schema=f"(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor, Tensor)")
def _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *mask):  # mask: softmax_scale, left, right
    out, lse = _attention_shapes(q)
    if not _kernel_runs_on(q):
        if q.dtype != torch.float64:
            warnings.warn(f"no kernel for {q.dtype} on {q.device.type}; the PyTorch reference serves (slow)")
        if cu_seqlens_q is None:
            return tuple(x.contiguous() for x in attention_reference(q, k, v, *mask))  # as the fake says
        for rows, keys in _documents(cu_seqlens_q, cu_seqlens_k):
            o, s = attention_reference(q[None, rows], k[None, keys], v[None, keys], *mask)
            out[rows], lse[:, rows] = o[0], s[0]
    else:
        q, k, v = _addressable(q, k, v)
        _launch(_forward_kernel, "forward", (q, k, v, out, lse), (q, k, v, out, lse.mT[..., None]), q, k, cu_seqlens_q,
                cu_seqlens_k, *mask)
    return out, lse


@_attention.register_fake
def _attention_shapes(q, *others):
    rows = (*q.shape[:-3], q.shape[-2], q.shape[-3])  # (B, H, S) or (H, total)
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("glassbox::flash_attention_backward", mutates_args=(),
                         schema="(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
                                f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
def _attention_backward(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *mask):
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if not _kernel_runs_on(q):
        if cu_seqlens_q is None:
            return tuple(x.contiguous() for x in attention_backward_reference(dout, dlse, q, k, v, out, *mask))
        for rows, keys in _documents(cu_seqlens_q, cu_seqlens_k):
            inputs = dout[None, rows], dlse[None, :, rows], q[None, rows], k[None, keys], v[None, keys], out[None, rows]
            dq[rows], dk[keys], dv[keys] = (x[0] for x in attention_backward_reference(*inputs, *mask))
        return dq, dk, dv
    q, k, v, dout = _addressable(q, k, v, dout)
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)  # what the first kernel leaves for the second
    rows, drows = lse.mT[..., None], dlse.mT[..., None]  # (B, S, H, 1) or (total, H, 1)
    _launch(_dq_kernel, "dq", (q, k, v, out, dout, dq, lse, dlse, lse2, delta), (q, k, v, out, dout, drows, rows),
            q, k, cu_seqlens_q, cu_seqlens_k, *mask)
    _launch(_dkdv_kernel, "dkdv", (q, k, v, dout, dk, dv, lse2, delta), (q, k, v, dout, dk, rows),
            q, k, cu_seqlens_q, cu_seqlens_k, *mask)
    return dq, dk, dv


_attention_backward.register_fake(lambda dout, dlse, *qkv: tuple(x.new_empty(x.shape) for x in qkv[:3]))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.mask = inputs[5:]


def _gradients(ctx, dout, dlse):
    q, k, v, cu_q, cu_k, out, lse = ctx.saved_tensors
    return *_attention_backward(dout, dlse, q, k, v, out, lse, cu_q, cu_k, *ctx.mask), None, None, None, None, None


_attention.register_autograd(_gradients, setup_context=_save)


def visible_pairs(seqlen_q: int, seqlen_k: int, left: int = -1, right: int = -1) -> int:
    """How many (query, key) pairs the mask lets through: attention's work."""
    at = range(seqlen_k - seqlen_q, seqlen_k)  # the key that each query stands at
    ends = (min(max(i + right + 1, 0), seqlen_k) if right >= 0 else seqlen_k for i in at)
    return sum(max(end - max(i - left, 0), 0) if left >= 0 else end for i, end in zip(at, ends))


def _forward_flops(q, k, v, cu_q, cu_k, softmax_scale, left: int, right: int, **_) -> int:
    """4 D per visible pair. Documents whose lengths cannot be read (while tracing) count as one."""
    lengths = [(q.shape[-3], k.shape[-3])] * math.prod(q.shape[:-3])
    if cu_q is not None and type(cu_q) is Tensor and not cu_q.is_meta:
        lengths = zip(cu_q.diff().tolist(), cu_k.diff().tolist())
    return 4 * q.shape[-1] * q.shape[-2] * sum(visible_pairs(*pair, left, right) for pair in lengths)


register_flop_formula(torch.ops.glassbox.flash_attention, get_raw=True)(_forward_flops)
register_flop_formula(torch.ops.glassbox.flash_attention_backward, get_raw=True)(  # needs 5 products (we do 7) to 2
    lambda dout, dlse, q, k, v, out, lse, *others, **_: _forward_flops(q, k, v, *others) * 5 // 2)


# ---- what users call
def _require(fine: bool, message: str) -> None:
    if not fine:
        raise ValueError(message)


def _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p, softmax_scale, causal, window_size, return_lse,
            return_attn_probs, **absent):
    layout = "(batch, seqlen, heads, head_dim)" if cu_seqlens_q is None else "(total, heads, head_dim)"
    if torch.is_autocast_enabled(q.device.type):  # as PyTorch's own attention does
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.dtype.is_floating_point and x.dtype != torch.float64 else x for x in (q, k, v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        _require(x.dim() == layout.count(",") + 1, f"{name} has shape {tuple(x.shape)}; it must be {layout}")
        _require(x.dtype == q.dtype and x.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64),
                 f"{name} is {x.dtype} (q is {q.dtype}); all must be float16, bfloat16, float32 or float64 alike")
        _require(x.device == q.device, f"{name} is on {x.device} and q on {q.device}; they must be on one device")
    _require(k.shape == v.shape, f"v has shape {tuple(v.shape)}; it must have k's, {tuple(k.shape)}")
    _require(k.shape[:-3] == q.shape[:-3], f"k has batch {k.shape[0]}; it must have q's, {q.shape[0]}")
    _require(k.shape[-1] == q.shape[-1] and 1 <= q.shape[-1] <= 256,
             f"head_dim of q is {q.shape[-1]}, of k {k.shape[-1]}; it must be the same, from 1 to 256")
    _require(q.shape[-2] > 0 and k.shape[-2] > 0 and q.shape[-2] % k.shape[-2] == 0,
             f"q has {q.shape[-2]} heads and k {k.shape[-2]}; q's must be a multiple of k's")
    _require(dropout_p == 0.0, f"dropout_p is {dropout_p}; there is no dropout here: it must be 0")
    for name, value in absent.items():
        _require(not isinstance(value, Tensor) and not value, f"{name} is {value}; there is none here: leave it out")
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    _require(0.0 < softmax_scale < math.inf, f"softmax_scale is {softmax_scale}; it must be positive and finite")
    _require(len(window_size) == 2 and all(isinstance(size, int) and size >= -1 for size in window_size),
             f"window_size is {window_size}; it must be (left, right), integers from 0, or -1 for no bound")
    left, right = window_size[0], 0 if causal else window_size[1]
    left = -1 if left >= k.shape[-3] else left  # a window that hides nothing costs nothing
    right = -1 if right >= q.shape[-3] else right
    out, lse = _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, float(softmax_scale), left, right)
    return (out, lse, None) if return_attn_probs else (out, lse) if return_lse else out


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
                    causal: bool = False, window_size: tuple[int, int] = (-1, -1), return_lse: bool = False, *,
                    softcap: float = 0.0, alibi_slopes=None, deterministic=True, return_attn_probs: bool = False):
    """softmax(softmax_scale * q k^T + mask) v, with flash-attention's signature (Dao 2023).

    q (B, Sq, H, D); k, v (B, Sk, Hkv, D), H a multiple of Hkv: query head h reads key head h // (H / Hkv). D <= 256.
    float16, bfloat16, float32, or float64 (the reference computes it); any strides.
    softmax_scale: 1 / sqrt(D) unless given. dropout_p: 0 only. ValueError names the argument that is wrong.
    causal: query i sees keys up to i + Sk - Sq: the last query sees all of them ("bottom-right"). window_size (left,
    right): it sees only those from i + Sk - Sq - left to i + Sk - Sq + right; -1 is no bound.
    -> out as q; with return_lse also LSE (B, H, Sq), the natural logarithm of each row's sum of exp(scores), in float32
    (float64 for float64), differentiable. A query that sees nothing gets 0, LSE = -inf and no gradient.
    The last four are flash-attention's: deterministic it always is; softcap and alibi_slopes must be off;
    return_attn_probs returns (out, LSE, None)."""
    return _attend(q, k, v, None, None, dropout_p, softmax_scale, causal, window_size, return_lse, return_attn_probs,
                   softcap=softcap, alibi_slopes=alibi_slopes)


def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                           max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
                           softmax_scale: float | None = None, causal: bool = False,
                           window_size: tuple[int, int] = (-1, -1), return_lse: bool = False, *, softcap: float = 0.0,
                           alibi_slopes=None, deterministic=True, return_attn_probs: bool = False, block_table=None):
    """flash_attn_func for documents packed one after the other: no token sees another document.

    q (total_q, H, D); k, v (total_k, Hkv, D). cu_seqlens_q, cu_seqlens_k (documents + 1,) int32 on the same device:
    document b has rows cu_seqlens[b] ... cu_seqlens[b + 1] - 1; they rise from 0 to the total (equal neighbours: an
    empty document). That is checked once per tensor on a GPU, as it waits for it; not under torch.compile. Nothing
    depends on max_seqlen_q and max_seqlen_k, which flash-attention needs. LSE (H, total_q), else as flash_attn_func."""
    for name, cu, x in (("cu_seqlens_q", cu_seqlens_q, q), ("cu_seqlens_k", cu_seqlens_k, k)):
        _require(cu.dtype == torch.int32 and cu.dim() == 1 and len(cu) >= 1 and cu.is_contiguous(),
                 f"{name} is {cu.dtype} of shape {tuple(cu.shape)}; it must be contiguous int32 (documents + 1,)")
        _require(cu.device == q.device, f"{name} is on {cu.device} and q on {q.device}; they must be on one device")
        if not torch.compiler.is_compiling() and not (cu.is_cuda and getattr(cu, "_rises_to", None) == x.shape[0]):
            ends = cu.tolist()
            _require(ends[0] == 0 and ends[-1] == x.shape[0] and ends == sorted(ends),
                     f"{name} is {cu}; it must rise from 0 to the number of rows, {x.shape[0]}")
            cu._rises_to = x.shape[0]  # this very tensor serves every layer
    _require(len(cu_seqlens_q) == len(cu_seqlens_k), f"cu_seqlens_q names {len(cu_seqlens_q) - 1} documents, "
             f"cu_seqlens_k {len(cu_seqlens_k) - 1}; there must be as many")
    return _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p, softmax_scale, causal, window_size, return_lse,
                   return_attn_probs, softcap=softcap, alibi_slopes=alibi_slopes, block_table=block_table)


def check(device: torch.device) -> bool:
    """Prints our error beside what is allowed, for shapes that have been traps: uneven, windowed, grouped."""
    fine, scale = True, 8 if device.type == "cuda" else 1
    for dtype in (torch.float32, torch.float16) + ((torch.bfloat16,) if device.type == "cuda" else ()):
        for Sq, Sk, D, window in ((33, 75, 40, (-1, 0)), (75, 33, 64, (-1, 0)), (70, 90, 32, (20, 13))):
            Sq, Sk = scale * Sq, scale * Sk
            *inputs, dout = (torch.randn(2, S, H, D, device=device, dtype=dtype, requires_grad=True)
                             for S, H in ((Sq, 2), (Sk, 1), (Sk, 1), (Sq, 2)))

            def run(inputs):
                out = flash_attn_func(*inputs, window_size=window)
                return out, *torch.autograd.grad(out, inputs, dout.to(out.dtype))
            true = run([x.detach().double().requires_grad_() for x in inputs])
            error = max((a.double() - b).abs().max().item() for a, b in zip(run(inputs), true))
            allowed = max(b.abs().max().item() for b in true) * (4 * torch.finfo(dtype).eps + 1e-5)
            fine &= error <= allowed
            print(f"{str(dtype)[6:]:9} {Sq:3} x {Sk:3} D {D} window {window!s:8}: largest error of O, dQ, dK, dV "
                  f"{error:.1e}, allowed {allowed:.1e}{'' if error <= allowed else '  WRONG'}")
    return fine


def torchs(q, k, v, causal: bool):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def measure(attend, S: int, H: int, D: int):
    """Median milliseconds of causal forward and backward (bfloat16, batch 2), and out, dq, dk, dv."""
    torch.manual_seed(0)
    *inputs, dout = (torch.randn(2, S, H, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(4))
    out = attend(*inputs, causal=True)
    runs = (lambda: attend(*inputs, causal=True), lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True))
    return [triton.testing.do_bench(run, return_mode="median") for run in runs], (out, *runs[1]())


def tune(head_dims: list[int]) -> None:
    """Tries tile sizes for each kernel, the others as they stand; prints this GPU's lines of CONFIGS. Left out are
    candidates that do not fit the chip, or whose results are not PyTorch's."""
    for D in head_dims:
        expected = measure(torchs, 4096, 16, D)[1]
        for kernel in ("forward", "dq", "dkdv"):
            key, times = (8 if torch.version.hip else torch.cuda.get_device_capability()[0], D, kernel), {}
            others = [(*(a, b)[::-1 if kernel == "dkdv" else 1], warps, stages)  # a: the side of the accumulators
                      for a in (64, 128) for b in (32, 64, 128) for warps in (4, 8) for stages in (2, 3)]
            for CONFIGS[key] in dict.fromkeys([CONFIGS.get(key, CONFIGS[8, D, kernel])] + others):
                try:
                    ms, results = measure(flash_attn_func, 4096, 16, D)
                    right = all(torch.allclose(a, b, atol=0.05, rtol=0.05) for a, b in zip(results, expected))
                except Exception as error:  # too much shared memory, or a limit of the compiler
                    ms, right = [math.inf] * 2, type(error).__name__
                times[CONFIGS[key]] = ms[kernel != "forward"] if right is True else math.inf
                print(f"  {key} {CONFIGS[key]}: {times[CONFIGS[key]]:.3f} ms, right: {right}", file=sys.stderr)
            CONFIGS[key] = min(times, key=times.get)
            print(f"    {key}: {CONFIGS[key]},  # {times[CONFIGS[key]]:.3f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", type=int, nargs="*", choices=(64, 128, 256), metavar="HEAD_DIM", help="measure tiles")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and triton else "cpu")
    if args.tune is not None:
        return tune(args.tune or [64, 128, 256]) if device.type == "cuda" else parser.error("--tune needs a GPU")
    fine = check(device)
    if device.type == "cpu":
        print("no GPU here: nothing is timed (Triton's interpreter, by TRITON_INTERPRET=1, checks but does not hurry)")
    for D, attend in ((D, f) for D in (64, 128) for f in (flash_attn_func, torchs) if device.type == "cuda"):
        forward, backward = measure(attend, 8192, 32, D)[0]
        print(f"2 x 8192, 32 heads of {D}, {attend.__name__:15} forward {forward:7.3f} ms, backward {backward:7.3f} ms")
    sys.exit(not fine)


if __name__ == "__main__":
    main()
