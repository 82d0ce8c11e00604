"""Four-bit weights in groups, sixteen-bit activations (W4A16): a linear layer that reads a quarter of the bytes.

Each row of a weight W (N, K) is cut into groups of 32..128 numbers, and each group keeps a scale and a zero point:

    w ~ (q - zero) * scale,   q in 0..15        symmetric: zero = 8 everywhere, in the same layout

That is 4 + 32 / group_size bits per weight. Decoding one token multiplies W by a single vector, so its time is the
time to read W: `int4_linear` decodes inside the product and never writes W out. For a long batch the product itself
takes the time, and W is decoded once for cuBLAS.

Layout: a unit of 32 consecutive weights of a row is four int32 words; weight 4 i + j of the unit is nibble i (lowest
first) of word j. A thread reads a unit as one 16-byte load, and what multiplies nibble i of its four words are four
*neighbours* in x. (Along K, one after the other, they would lie eight apart.)

Gradients go to x only. Nothing here uses atomics: a long K is split over programs that write their sums apart, and a
second kernel adds these in order, so a result is always the same to the bit.

    python kernels/int4.py          # checks against the reference, then times (on a GPU)
    python kernels/int4.py --tune   # prints the CONFIGS of this GPU

Sources: Frantar et al., GPTQ (arXiv:2210.17323); Lin et al., AWQ (arXiv:2306.00978); split-K as in Hoque et al.
(arXiv:2402.00025).
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

try:
    import triton
    import triton.language as tl
except ImportError:  # a Mac, Windows: the reference serves
    triton = None
jit = triton.jit if triton else lambda function: function

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FUSED_ROWS = 64  # with more rows than this in x, decode W and leave the product to cuBLAS
PROGRAMS = 512  # K is split until there are so many programs: about four for each multiprocessor of a big GPU

# GPU generation (compute capability, major) -> tiles; UNITS counts 32 weights along K. `--tune` prints a new line.
CONFIGS = {
    None: {"matvec": dict(BLOCK_N=4, UNITS=128, num_warps=4), "matmul": dict(BLOCK_N=64, UNITS=4, num_warps=4)},
}


class Int4(NamedTuple):
    """A quantized weight (N, K): what `int4_quantize` returns; all groups have the same size K / scale.shape[1]."""

    packed: Tensor  # (N, K / 8) int32, in the layout of the file's docstring
    scale: Tensor  # (N, K / group_size)
    zero: Tensor  # (N, K / group_size), the code that stands for 0; any number, in the scale's dtype


# ----------------------------------------------------------------------------------------------------------- reference


def int4_pack(codes: Tensor) -> Tensor:
    """Codes 0..15 (N, K), any integer dtype, K a multiple of 32 -> int32 words (N, K / 8)."""
    _check(codes.ndim == 2 and codes.shape[1] % 32 == 0, "codes", "(N, K) with K a multiple of 32", codes.shape)
    shift = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)[:, None]
    nibbles = codes.to(torch.int32).unflatten(1, (-1, 8, 4)) << shift  # (N, units, nibble, word)
    return nibbles.sum(2, dtype=torch.int32).flatten(1)  # nibbles do not overlap: their sum is their "or"


def int4_unpack(packed: Tensor) -> Tensor:
    """int32 words (N, K / 8) -> codes 0..15 (N, K), int32; undoes `int4_pack`."""
    shift = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)[:, None]
    return (packed.unflatten(1, (-1, 1, 4)) >> shift & 15).flatten(1)


def int4_dequantize_reference(q: Int4, dtype: torch.dtype) -> Tensor:
    """(q - zero) * scale in float32, or in float64 if that is asked for, then rounded once to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    codes = int4_unpack(q.packed).to(wide).unflatten(1, (q.scale.shape[1], -1))  # (N, groups, group_size)
    return ((codes - q.zero.to(wide)[..., None]) * q.scale.to(wide)[..., None]).flatten(1).to(dtype)


def int4_linear_reference(x: Tensor, q: Int4, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times the decoded W^T (+ bias): the slow truth."""
    return torch.nn.functional.linear(x, int4_dequantize_reference(q, x.dtype), bias)


# ------------------------------------------------------------------------------------------------------------- kernels


@jit
def _matvec_kernel(x_ptr, packed_ptr, scale_ptr, zero_ptr, out_ptr, N, units,
                   UNITS_PER_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr, SPLIT: tl.constexpr):
    """out[split, n] = sum of x[k] W[n, k] over this program's share of K, for BLOCK_N rows of W.

    A weight costs two instructions. Masked out of its word and read as a float, nibble i is the *subnormal* number
    q 2^(4 i - 149), exactly; so x is scaled by 2^(64 - 4 i) and the sum by 2^85, and no integer is ever converted.
    (x must lie below 2^64; what is lost of x below 2^-41 is smaller than 2^-64.)
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    split = tl.program_id(1)
    word = tl.arange(0, 4 * UNITS)
    unit = tl.arange(0, UNITS)
    total = tl.zeros((BLOCK_N, UNITS), tl.float32)
    for first in range(split * UNITS, units, SPLIT * UNITS):
        inside = first + word // 4 < units  # said by units, so that the compiler sees that words come in fours
        words = tl.load(packed_ptr + n[:, None] * (units * 4) + (first * 4 + word)[None, :],
                        mask=(n < N)[:, None] & inside[None, :], other=0).to(tl.uint32)  # (BLOCK_N, 4 * UNITS)
        high = words >> 12  # a float's mantissa has 23 bits: nibbles 5, 6, 7 move down to the places of 2, 3, 4
        k = first * 32 + word // 4 * 32 + word % 4
        dot = tl.zeros((BLOCK_N, 4 * UNITS), tl.float32)
        x_sum = tl.zeros((4 * UNITS,), tl.float32)
        for i in tl.static_range(8):
            x = tl.load(x_ptr + k + 4 * i, mask=inside, other=0.0).to(tl.float32)  # (4 * UNITS,)
            x_sum += x
            if i < 5:
                nibble = words & (15 << (4 * i))
                x = x * (2.0 ** (64 - 4 * i))
            else:
                nibble = high & (15 << (4 * i - 12))
                x = x * (2.0 ** (64 - (4 * i - 12)))
            dot += nibble.to(tl.float32, bitcast=True) * x[None, :]
        # sum (q - zero) scale x = scale (sum q x - zero sum x), a group at a time
        group = n[:, None] * (units // UNITS_PER_GROUP) + ((first + unit) // UNITS_PER_GROUP)[None, :]
        mask = (n < N)[:, None] & (first + unit < units)[None, :]
        scale = tl.load(scale_ptr + group, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_N, UNITS)
        zero = tl.load(zero_ptr + group, mask=mask, other=0.0).to(tl.float32)
        q_dot_x = tl.sum(tl.reshape(dot, (BLOCK_N, UNITS, 4)), 2) * (2.0 ** 85)
        total += scale * (q_dot_x - zero * tl.sum(tl.reshape(x_sum, (UNITS, 4)), 1)[None, :])
    out = tl.sum(total, 1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + split * N + n, out, mask=n < N)


@jit
def _matmul_kernel(x_ptr, packed_ptr, scale_ptr, zero_ptr, out_ptr, M, N, units, UNITS_PER_GROUP: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr, SPLIT: tl.constexpr):
    """The same for a few rows of x, on tensor cores: out[split, m, n]. K runs in the order of the nibbles: nibble i of
    all words of a tile against the x that belongs to it, so nothing needs to be put back into order."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    word = tl.arange(0, 4 * UNITS)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(split * UNITS, units, SPLIT * UNITS):
        unit = first + word // 4  # (4 * UNITS,)
        mask = (n < N)[:, None] & (unit < units)[None, :]
        words = tl.load(packed_ptr + n[:, None] * (units * 4) + (first * 4 + word)[None, :], mask=mask, other=0)
        group = n[:, None] * (units // UNITS_PER_GROUP) + (unit // UNITS_PER_GROUP)[None, :]
        scale = tl.load(scale_ptr + group, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_N, 4 * UNITS)
        zero = tl.load(zero_ptr + group, mask=mask, other=0.0).to(tl.float32)
        k = unit * 32 + word % 4
        for i in tl.static_range(8):
            x = tl.load(x_ptr + m[:, None] * (units * 32) + (k + 4 * i)[None, :],
                        mask=(m < M)[:, None] & (unit < units)[None, :], other=0.0)  # (BLOCK_M, 4 * UNITS)
            w = ((words >> (4 * i) & 15).to(tl.float32) - zero) * scale
            total = tl.dot(x, tl.trans(w.to(x.dtype)), total, input_precision="ieee")
    out_ptr += split * M.to(tl.int64) * N
    tl.store(out_ptr + m[:, None] * N + n[None, :], total.to(out_ptr.dtype.element_ty),
             mask=(m < M)[:, None] & (n < N)[None, :])


@jit
def _add_splits_kernel(parts_ptr, out_ptr, size, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """out = sum of the SPLIT partial sums, always in the same order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + split * size + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)


@jit
def _dequantize_kernel(packed_ptr, scale_ptr, zero_ptr, out_ptr, all_units,
                       UNITS_PER_GROUP: tl.constexpr, UNITS: tl.constexpr):
    """Groups divide K, so row ends do not matter: unit u of the whole weight lies in group u // UNITS_PER_GROUP."""
    unit = (tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS))[:, None, None]
    nibble = tl.arange(0, 8)[None, :, None]
    word = tl.arange(0, 4)[None, None, :]
    inside = unit < all_units
    words = tl.load(packed_ptr + unit * 4 + word, mask=inside, other=0)  # (UNITS, 1, 4)
    scale = tl.load(scale_ptr + unit // UNITS_PER_GROUP, mask=inside, other=0.0).to(tl.float32)  # (UNITS, 1, 1)
    zero = tl.load(zero_ptr + unit // UNITS_PER_GROUP, mask=inside, other=0.0).to(tl.float32)
    w = ((words >> (4 * nibble) & 15).to(tl.float32) - zero) * scale  # (UNITS, 8, 4): already in the order of K
    tl.store(out_ptr + unit * 32 + nibble * 4 + word, w.to(out_ptr.dtype.element_ty), mask=inside)


def _runs_kernel(x: Tensor) -> bool:
    """Whether x goes to the Triton kernels: on a GPU, or interpreted (TRITON_INTERPRET=1) on a CPU; never float64."""
    if x.dtype == torch.float64:  # nothing is cast down
        return False
    interpreted = triton is not None and not isinstance(_matvec_kernel, triton.runtime.JITFunction)
    if triton and (x.is_cuda or x.device.type == "cpu" and interpreted and x.dtype != torch.bfloat16):
        return True  # (Triton's interpreter computes wrongly in bfloat16, and does not say so)
    warnings.warn(f"kernels/int4.py: plain PyTorch serves on {x.device.type}, not the Triton kernel")
    return False


def _config(name: str, device: torch.device) -> dict:
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    return CONFIGS.get(major, CONFIGS[None])[name]


def _launch(x: Tensor, q: Int4, config: dict) -> Tensor:
    """x (M, K) W^T by the fused kernel that `config` is for: the matvec for M = 1, else the one with tensor cores."""
    (M, K), N, units_per_group = x.shape, q.scale.shape[0], q.packed.shape[1] // q.scale.shape[1] // 4
    grid = (triton.cdiv(N, config["BLOCK_N"]),)
    tiles = {"UNITS_PER_GROUP": units_per_group, **config}
    if M > 1:
        tiles["BLOCK_M"] = max(16, triton.next_power_of_2(M))  # the least that a tensor core takes
        grid += (1,)
    split = 1  # depends on shapes alone, and so does the order of every sum
    while grid[0] * split < PROGRAMS and split * 2 * config["UNITS"] * 32 <= K:
        split *= 2
    out = x.new_empty((M, N)) if split == 1 else x.new_empty((split, M, N), dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if M == 1:
            _matvec_kernel[(*grid, split)](x, *q, out, N, K // 32, SPLIT=split, **tiles)
        else:
            _matmul_kernel[(*grid, split)](x, *q, out, M, N, K // 32, SPLIT=split, **tiles)
        if split == 1:
            return out
        whole = x.new_empty((M, N))
        _add_splits_kernel[(triton.cdiv(M * N, 1024),)](out, whole, M * N, SPLIT=split, BLOCK=1024)
        return whole


def _dequantize(q: Int4, dtype: torch.dtype, runs_kernel: bool) -> Tensor:
    if not runs_kernel:
        return int4_dequantize_reference(q, dtype)
    (N, words), UNITS = q.packed.shape, 128
    out = torch.empty(N, words * 8, dtype=dtype, device=q.packed.device)
    if out.numel():
        units_per_group = words // q.scale.shape[1] // 4
        with torch.cuda.device_of(out):
            _dequantize_kernel[(triton.cdiv(N * words // 4, UNITS),)](*q, out, N * words // 4, units_per_group, UNITS)
    return out


# ----------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("glassbox::int4_matmul", mutates_args=(),
                         schema="(Tensor x, Tensor packed, Tensor scale, Tensor zero, bool transpose) -> Tensor")
def _int4_matmul(x, packed, scale, zero, transpose):
    """x (M, K) W^T if transpose, else x (M, N) W. Each is the other's gradient: one operator does both ways."""
    x, q = x.contiguous(), Int4(packed.contiguous(), scale.contiguous(), zero.contiguous())
    runs_kernel = _runs_kernel(x)
    if runs_kernel and transpose and 0 < x.shape[0] <= FUSED_ROWS and packed.shape[0]:
        return _launch(x, q, _config("matvec" if x.shape[0] == 1 else "matmul", x.device))
    w = _dequantize(q, x.dtype, runs_kernel)
    return x @ (w.t() if transpose else w)


@_int4_matmul.register_fake
def _(x, packed, scale, zero, transpose):
    return x.new_empty(x.shape[0], packed.shape[0] if transpose else packed.shape[1] * 8)


def _setup_context(ctx, inputs, output):
    _, *q, ctx.transpose = inputs
    ctx.save_for_backward(*q)  # x is not needed: its layer keeps nothing of the batch


def _backward(ctx, grad):
    return _int4_matmul(grad, *ctx.saved_tensors, not ctx.transpose), None, None, None, None


_int4_matmul.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.glassbox.int4_matmul)
def _flops(x_shape, packed_shape, scale_shape, zero_shape, transpose, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * packed_shape[0] * packed_shape[1] * 8


@torch.library.custom_op("glassbox::int4_dequantize", mutates_args=(),
                         schema="(Tensor packed, Tensor scale, Tensor zero, ScalarType dtype) -> Tensor")
def _int4_dequantize(packed, scale, zero, dtype):
    q = Int4(packed.contiguous(), scale.contiguous(), zero.contiguous())
    return _dequantize(q, dtype, _runs_kernel(torch.empty(0, dtype=dtype, device=packed.device)))


@_int4_dequantize.register_fake
def _(packed, scale, zero, dtype):
    return packed.new_empty(packed.shape[0], packed.shape[1] * 8, dtype=dtype)


# ---------------------------------------------------------------------------------------------------- public functions


def _check(right: bool, name: str, accepted: str, got) -> None:
    if not right:
        raise ValueError(f"{name} must be {accepted}, got {got}")


def _check_q(q: Int4) -> None:
    packed, scale, zero = q
    _check(packed.dtype == torch.int32 and packed.ndim == 2 and packed.shape[1] % 4 == 0 and packed.shape[1] > 0,
           "packed", "int32 (N, K / 8) with K a multiple of 32", f"{packed.dtype} {tuple(packed.shape)}")
    groups = scale.shape[1] if scale.ndim == 2 else 0
    _check(groups > 0 and scale.shape[0] == packed.shape[0] and packed.shape[1] // 4 % groups == 0, "scale",
           "(N, K / group_size) with group_size a multiple of 32 that divides K", tuple(scale.shape))
    _check(scale.dtype in DTYPES, "scale", "float16, bfloat16, float32 or float64", scale.dtype)
    _check((zero.shape, zero.dtype) == (scale.shape, scale.dtype), "zero", "like scale",
           f"{zero.dtype} {tuple(zero.shape)} beside {scale.dtype} {tuple(scale.shape)}")
    _check(packed.device == scale.device == zero.device, "packed, scale and zero", "on one device",
           f"{packed.device}, {scale.device}, {zero.device}")


def int4_quantize(w: Tensor, group_size: int = 128, symmetric: bool = False) -> Int4:
    """Round w (N, K) to the nearest of 16 levels in each group of `group_size` along K.

    Asymmetric: scale = (max - min) / 15, the range widened to hold 0, zero = the code of 0 (an integer).
    Symmetric: scale = max|w| / 7, zero = 8. Scale and zero keep w's dtype; the rounding counts with the kept scale.
    ValueError unless w is a floating matrix and group_size a multiple of 32 that divides K.
    """
    _check(w.ndim == 2 and w.dtype in DTYPES, "w", "a floating-point matrix (N, K)", f"{w.dtype} {tuple(w.shape)}")
    _check(group_size >= 32 and group_size % 32 == 0 and w.shape[1] > 0 and w.shape[1] % group_size == 0, "group_size",
           f"a multiple of 32 that divides K = {w.shape[1]}", group_size)
    wide = w.detach().to(torch.promote_types(w.dtype, torch.float32)).unflatten(1, (-1, group_size))
    if symmetric:
        scale = wide.abs().amax(2, keepdim=True) / 7
    else:
        low, high = wide.amin(2, keepdim=True).clamp_max(0), wide.amax(2, keepdim=True).clamp_min(0)
        scale = (high - low) / 15
    scale = scale.to(w.dtype)
    scale[scale == 0] = 1  # a group of zeros
    wide_scale = scale.to(wide.dtype)
    zero = torch.full_like(wide_scale, 8) if symmetric else (-low / wide_scale).round().clamp(0, 15)
    codes = (wide / wide_scale + zero).round().clamp(0, 15)
    return Int4(int4_pack(codes.flatten(1)), scale.squeeze(2), zero.squeeze(2).to(w.dtype))


def int4_dequantize(q: Int4, dtype: torch.dtype | None = None) -> Tensor:
    """The weight (N, K) that `q` stands for, in `dtype` (the scale's by default); exact up to one rounding."""
    _check_q(q)
    dtype = dtype or q.scale.dtype
    _check(dtype in DTYPES, "dtype", "float16, bfloat16, float32 or float64", dtype)
    return _int4_dequantize(*q, dtype)


def int4_linear(x: Tensor, q: Int4, bias: Tensor | None = None) -> Tensor:
    """x (..., K) W^T + bias -> (..., N) in x's dtype, with a gradient to x (and bias) only.

    Up to FUSED_ROWS rows of x W is decoded inside the product; above, and in the backward pass, into memory first.
    Under autocast x is cast as torch.nn.functional.linear would. ValueError names what does not fit.
    """
    _check_q(q)
    N, K = q.packed.shape[0], q.packed.shape[1] * 8
    _check(x.dtype in DTYPES, "x", "float16, bfloat16, float32 or float64", x.dtype)
    _check(x.ndim > 0 and x.shape[-1] == K, "x", f"(..., {K})", tuple(x.shape))
    _check(x.device == q.packed.device, "x", f"on the device of the weight, {q.packed.device}", x.device)
    _check(bias is None or bias.shape == (N,), "bias", f"({N},)", None if bias is None else tuple(bias.shape))
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y = _int4_matmul(x.reshape(-1, K), *q, True).view(*x.shape[:-1], N)
    return y if bias is None else y + bias.to(y.dtype)


# ---------------------------------------------------------------------------------------------------------------- main


def _tune(device: torch.device) -> None:
    """Time every tile on W (14336, 4096) and print the line of CONFIGS for this GPU."""
    q, best = int4_quantize(torch.randn(14336, 4096, device=device, dtype=torch.bfloat16)), {}
    for name, rows, all_n, all_units, all_warps in (("matvec", 1, (2, 4, 8, 16), (32, 64, 128), (1, 2, 4)),
                                                    ("matmul", 16, (32, 64, 128), (4, 8, 16), (4, 8))):
        x, timed = torch.randn(rows, 4096, device=device, dtype=torch.bfloat16), []
        for BLOCK_N, UNITS, num_warps in itertools.product(all_n, all_units, all_warps):
            config = dict(BLOCK_N=BLOCK_N, UNITS=UNITS, num_warps=num_warps)
            try:
                ms = triton.testing.do_bench(lambda: _launch(x, q, config), return_mode="median")
            except triton.runtime.errors.OutOfResources:
                continue
            timed.append((ms, config))
        ms, best[name] = min(timed, key=lambda pair: pair[0])
        print(f"{name}, {rows} row(s): {ms * 1e3:.1f} us with {best[name]}")
    print(f"    {torch.cuda.get_device_capability(device)[0]}: {best},")


def main() -> None:
    parser = argparse.ArgumentParser(description="Check int4_linear against its reference, then time it on a GPU.")
    parser.add_argument("--tune", action="store_true", help="find the fastest tiles on this GPU, print CONFIGS")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.tune:
        if device.type == "cpu":
            parser.error("--tune needs a GPU")
        return _tune(device)
    torch.manual_seed(0)
    w = torch.randn(96, 256, dtype=torch.float64, device=device)
    for dtype, allowed in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        q = int4_quantize(w.to(dtype), group_size=64)
        for rows in (1, 5, FUSED_ROWS + 1):
            x = torch.randn(rows, 256, device=device).to(dtype)
            truth = int4_linear_reference(x.double(), q)
            error = ((int4_linear(x, q).double() - truth).abs().max() / truth.abs().max()).item()
            print(f"{dtype}, {rows:3} rows: relative error {error:.1e}, allowed {allowed:.0e}")
            assert error <= allowed
    if device.type == "cpu":
        print("no GPU: nothing is timed (Triton's interpreter and the plain reference say nothing about speed)")
        return
    w = torch.randn(14336, 4096, device=device, dtype=torch.bfloat16)
    q = int4_quantize(w)
    for rows in (1, 4, 16, 64, 2048):
        x = torch.randn(rows, 4096, device=device, dtype=torch.bfloat16)
        ours, plain = (triton.testing.do_bench(function, return_mode="median") * 1e3
                       for function in (lambda: int4_linear(x, q), lambda: torch.nn.functional.linear(x, w)))
        print(f"W (14336, 4096), {rows:4} rows: int4 {ours:.1f} us, bfloat16 {plain:.1f} us, {plain / ours:.2f}x")


if __name__ == "__main__":
    main()
