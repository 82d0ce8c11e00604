"""NF4: four-bit weights whose 16 levels are quantiles of the normal distribution, as QLoRA stores a frozen model.

    absmax_b = max |w| in a block of 64 numbers         code = nearest of NF4_LEVELS to w / absmax_b
    w ~ NF4_LEVELS[code] * absmax_b

Double quantization stores the absmax of a block, 32 bits for 64 weights, in 8 bits as well: minus their mean, in blocks
of 256 with an absmax of their own, rounded to a `dynamic_map`. Together 4 + 8/64 + 32/(64*256) = 4.127 bits a weight.

The format is that of bitsandbytes, to the bit: two codes a byte, the first in the high nibble; blocks run over the
flattened weight; a value midway between two levels takes the lower one; a block of zeros stays zero.

`nf4_linear` has a gradient to x only and keeps nothing of the batch for it. One to FUSED_ROWS rows of x, as in
decoding, multiply W as it is read, a quarter of the bytes; for more, W is decoded into memory and cuBLAS multiplies.

    python kernels/nf4.py          # checks against the reference, then times (on a GPU)
    python kernels/nf4.py --tune   # prints the CONFIGS of this GPU

Sources: Dettmers et al., QLoRA (arXiv:2305.14314), section 3; 8-bit maps: Dettmers et al. (arXiv:2110.02861),
section 2 and appendix; dynamic exponents: Dettmers (arXiv:1511.04561).
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

# Quantiles of N(0, 1) at 8 even steps above 1/2 and 7 below, and 0, over the largest; not what Eq. 4 says literally.
NF4_LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
              0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
              1.0)
NESTED_BLOCK = 256  # absmax values to a block of the second quantization
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FUSED_ROWS = 64  # with more rows than this in x, decode W and leave the product to cuBLAS

# GPU generation (compute capability, major) -> tiles; WORDS counts 8 weights along K. `--tune` prints a new line.
CONFIGS = {
    None: {"matvec": dict(BLOCK_N=8, WORDS=512, num_warps=4), "matmul": dict(BLOCK_N=64, WORDS=32, num_warps=4)},
}


class NF4(NamedTuple):
    """A quantized tensor, what `nf4_quantize` returns. The last three are None without double quantization."""

    packed: Tensor  # (ceil(n / 2),) uint8: codes 2 b and 2 b + 1 in byte b, the first one high
    absmax: Tensor  # (ceil(n / block_size),) float32, or uint8 codes of the nested map
    levels: Tensor  # (16,) float32: NF4_LEVELS on the device
    shape: tuple[int, ...]  # of what was quantized
    dtype: torch.dtype
    block_size: int = 64
    nested_absmax: Tensor | None = None  # (ceil(blocks / 256),) float32
    nested_offset: Tensor | None = None  # () float32: mean(absmax)
    nested_map: Tensor | None = None  # (256,) float32: dynamic_map() on the device


def operands(q: NF4) -> tuple:
    """What the operators take of q. (PyTorch 2.8 compiles neither a property nor a slice of a NamedTuple.)"""
    return q.packed, q.absmax, q.levels, q.nested_absmax, q.nested_offset, q.nested_map


# ----------------------------------------------------------------------------------------------------------- reference


def dynamic_map(signed: bool = True) -> Tensor:
    """The 256 sorted levels of the 8-bit dynamic data type, float32: 0, 1, and 7 decades of even steps.

    Decade i = 0..6 reaches from 10^(i - 7) to 10^(i - 6); its levels are the middles of 2^i equal parts (2^(i + 1)
    without a sign). So small numbers get range and large ones precision, and 0 is exact.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        middles = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        levels += middles + [-m for m in middles] * signed
    return torch.tensor(sorted(levels))


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Index, uint8, of the nearest of the sorted `levels`; the lower one midway."""
    return torch.bucketize(x, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)


def _in_blocks(x: Tensor, size: int) -> Tensor:
    """x flattened -> (blocks, size), the last block filled with zeros."""
    return torch.nn.functional.pad(x.flatten(), (0, -x.numel() % size)).view(-1, size)


def _quantize_blocks(x: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8 and absmax (blocks,) float32 of any x."""
    blocks = _in_blocks(x.float(), block_size)
    absmax = blocks.abs().amax(1)
    inverse = 1 / absmax.clamp_min(2.0**-126)  # multiplied by, as bitsandbytes does: division rounds otherwise
    scaled = (blocks * inverse[:, None]).clamp(-1, 1)
    return _nearest(scaled, levels).flatten()[:x.numel()], absmax


def nf4_quantize_reference(w: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """packed (ceil(n / 2),) and absmax (blocks,) of any w; an odd last byte is filled with the code of 0."""
    codes, absmax = _quantize_blocks(w, levels, block_size)
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=7)
    return codes[::2] << 4 | codes[1::2], absmax


def nf4_dequantize_reference(q: NF4, dtype: torch.dtype | None = None) -> Tensor:
    """levels[code] * absmax in float32 (float64 if that is asked for), then rounded once to `dtype`."""
    dtype = dtype or q.dtype
    wide, n = torch.promote_types(dtype, torch.float32), torch.Size(q.shape).numel()
    absmax = q.absmax
    if q.nested_map is not None:
        nested = _in_blocks(q.nested_map[absmax.int()], NESTED_BLOCK) * q.nested_absmax[:, None]
        absmax = nested.flatten()[:absmax.numel()] + q.nested_offset
    codes = torch.stack((q.packed >> 4, q.packed & 15), 1).flatten()[:n]
    values = _in_blocks(q.levels[codes.int()], q.block_size).to(wide) * absmax[:, None].to(wide)
    return values.flatten()[:n].view(q.shape).to(dtype)


def nf4_linear_reference(x: Tensor, q: NF4, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times the decoded W^T (+ bias): the slow truth."""
    return torch.nn.functional.linear(x, nf4_dequantize_reference(q, x.dtype), bias)


# ------------------------------------------------------------------------------------------------------------- kernels


@jit
def _quantize_kernel(w_ptr, levels_ptr, packed_ptr, absmax_ptr, n, blocks, SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """BLOCKS quantization blocks of SIZE numbers."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte = block[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]  # (BLOCKS, SIZE / 2)
    first = tl.load(w_ptr + byte * 2, mask=byte * 2 < n, other=0.0).to(tl.float32)
    second = tl.load(w_ptr + byte * 2 + 1, mask=byte * 2 + 1 < n, other=0.0).to(tl.float32)
    larger = tl.maximum(tl.abs(first), tl.abs(second), propagate_nan=tl.PropagateNan.ALL)
    absmax = tl.max(tl.where(larger == larger, larger, float("inf")), 1)  # a NaN must not vanish: its block turns inf
    inverse = tl.div_rn(1.0, tl.maximum(absmax, 2.0**-126))[:, None]  # correctly rounded, or codes would differ
    first_code = tl.zeros((BLOCKS, SIZE // 2), tl.int32)
    second_code = tl.zeros((BLOCKS, SIZE // 2), tl.int32)
    for i in tl.static_range(15):  # the code counts the midpoints that lie below
        middle = (tl.load(levels_ptr + i) + tl.load(levels_ptr + i + 1)) / 2
        first_code = tl.where(first * inverse > middle, i + 1, first_code)
        second_code = tl.where(second * inverse > middle, i + 1, second_code)
    tl.store(packed_ptr + byte, (first_code << 4 | second_code).to(tl.uint8), mask=byte * 2 < n)
    tl.store(absmax_ptr + block, absmax, mask=block < blocks)


@jit
def _load_absmax(block, mask, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_map_ptr):
    """The absmax of each block, decoded first where it is itself quantized."""
    absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
    if nested_map_ptr is not None:
        scale = tl.load(nested_absmax_ptr + block // 256, mask=mask, other=0.0)
        absmax = tl.load(nested_map_ptr + absmax.to(tl.int32)) * scale + tl.load(nested_offset_ptr)
    return absmax


@jit
def _dequantize_kernel(words_ptr, absmax_ptr, levels_ptr, nested_absmax_ptr, nested_offset_ptr, nested_map_ptr,
                       out_ptr, all_words, PER_BLOCK: tl.constexpr, WORDS: tl.constexpr):
    """The codes come as int32 words of 8, PER_BLOCK words to a quantization block: a thread's 8 results lie together.

    The table is looked up by tl.gather, in shared memory: a load of one address each would cost more instructions.
    """
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    first = tl.program_id(0).to(tl.int64) * WORDS
    block = first // PER_BLOCK + tl.arange(0, WORDS // PER_BLOCK)
    absmax = _load_absmax(block, block * PER_BLOCK < all_words, absmax_ptr, nested_absmax_ptr, nested_offset_ptr,
                          nested_map_ptr)[:, None]
    absmax = tl.reshape(tl.broadcast_to(absmax, (WORDS // PER_BLOCK, PER_BLOCK)), (WORDS,))
    word = first + tl.arange(0, WORDS)
    words = tl.load(words_ptr + word, mask=word < all_words, other=0)
    element = tl.arange(0, 8)[None, :]
    shift = element // 2 * 8 + 4 - element % 2 * 4  # byte element // 2 of a little-endian word, the high nibble first
    code = words[:, None] >> shift & 15  # (WORDS, 8)
    w = tl.reshape(tl.gather(levels, tl.reshape(code, (WORDS * 8,)), 0), (WORDS, 8)) * absmax[:, None]
    tl.store(out_ptr + word[:, None] * 8 + element, w.to(out_ptr.dtype.element_ty), mask=(word < all_words)[:, None])


@jit
def _linear_kernel(x_ptr, words_ptr, absmax_ptr, levels_ptr, nested_absmax_ptr, nested_offset_ptr, nested_map_ptr,
                   out_ptr, M, N, row_words, PER_BLOCK: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr):
    """out (M, N) = x W^T, W (N, 8 * row_words) decoded on the way; x is (M, 8, row_words): what meets element i of
    each word lies together, and so K runs in another order. BLOCK_M = 1: sums of products, else tensor cores."""
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_blocks = row_words // PER_BLOCK
    total = tl.zeros((BLOCK_N, WORDS) if BLOCK_M == 1 else (BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, row_words, WORDS):
        block = first // PER_BLOCK + tl.arange(0, WORDS // PER_BLOCK)
        mask = (n < N)[:, None] & (block < row_blocks)[None, :]
        absmax = _load_absmax(n[:, None] * row_blocks + block[None, :], mask, absmax_ptr, nested_absmax_ptr,
                              nested_offset_ptr, nested_map_ptr)[:, :, None]
        absmax = tl.reshape(tl.broadcast_to(absmax, (BLOCK_N, WORDS // PER_BLOCK, PER_BLOCK)), (BLOCK_N, WORDS))
        word = first + tl.arange(0, WORDS)
        inside = word // PER_BLOCK < row_blocks  # said by blocks, so that the compiler sees that words come together
        words = tl.load(words_ptr + n[:, None] * row_words + word[None, :],
                        mask=(n < N)[:, None] & inside[None, :], other=0)  # (BLOCK_N, WORDS)
        part = tl.zeros((BLOCK_N, WORDS), tl.float32)
        for i in tl.static_range(8):
            code = words >> (i // 2 * 8 + 4 - i % 2 * 4) & 15
            w = tl.reshape(tl.gather(levels, tl.reshape(code, (BLOCK_N * WORDS,)), 0), (BLOCK_N, WORDS))
            x = tl.load(x_ptr + (m[:, None] * 8 + i) * row_words + word[None, :],
                        mask=(m < M)[:, None] & inside[None, :], other=0.0)  # (BLOCK_M, WORDS)
            if BLOCK_M == 1:
                part += w * x.to(tl.float32)
            else:
                total = tl.dot(x, tl.trans((w * absmax).to(x.dtype)), total, input_precision="ieee")
        if BLOCK_M == 1:
            total += part * absmax
    if BLOCK_M == 1:
        out = tl.sum(total, 1)[None, :]
    else:
        out = total
    tl.store(out_ptr + m[:, None] * N + n[None, :], out.to(out_ptr.dtype.element_ty),
             mask=(m < M)[:, None] & (n < N)[None, :])


def _runs_kernel(x: Tensor) -> bool:
    """Whether x goes to the Triton kernels: on a GPU, or interpreted (TRITON_INTERPRET=1) on a CPU; never float64."""
    if x.dtype == torch.float64:  # nothing is cast down
        return False
    interpreted = triton is not None and not isinstance(_linear_kernel, triton.runtime.JITFunction)
    if triton and (x.is_cuda or x.device.type == "cpu" and interpreted and x.dtype != torch.bfloat16):
        return True  # (Triton's interpreter computes wrongly in bfloat16, and does not say so)
    warnings.warn(f"kernels/nf4.py: plain PyTorch serves on {x.device.type}, not the Triton kernel")
    return False


def _config(name: str, device: torch.device) -> dict:
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    return CONFIGS.get(major, CONFIGS[None])[name]


def _readable_as_words(q: NF4) -> bool:
    """Whether eight codes can be read at once: no odd end, and aligned in memory."""
    return torch.Size(q.shape).numel() % 8 == 0 and q.packed.storage_offset() % 4 == 0


def _launch(x: Tensor, q: NF4, config: dict) -> Tensor:
    """x (M, K) W^T by the fused kernel, with the tiles of `config`."""
    (M, K), N = x.shape, q.shape[0]
    BLOCK_M = 1 if M == 1 else max(16, triton.next_power_of_2(M))  # 16 rows are the least that a tensor core takes
    out = x.new_empty((M, N))
    x = x.view(M, K // 8, 8).transpose(1, 2).contiguous()  # see the kernel
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _linear_kernel[(triton.cdiv(N, config["BLOCK_N"]), 1)](
            x, q.packed.view(torch.int32), *operands(q)[1:], out, M, N, K // 8, q.block_size // 8, BLOCK_M=BLOCK_M,
            **config)
    return out


def _dequantize(q: NF4, dtype: torch.dtype, runs_kernel: bool) -> Tensor:
    if not (runs_kernel and _readable_as_words(q)):
        return nf4_dequantize_reference(q, dtype)
    out = torch.empty(q.shape, dtype=dtype, device=q.packed.device)
    all_words, WORDS = out.numel() // 8, 1024
    if all_words:
        with torch.cuda.device_of(out):
            _dequantize_kernel[(triton.cdiv(all_words, WORDS),)](
                q.packed.view(torch.int32), *operands(q)[1:], out, all_words, q.block_size // 8, WORDS)
    return out


# ----------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("glassbox::nf4_quantize", mutates_args=(),
                         schema="(Tensor w, Tensor levels, int block_size) -> (Tensor, Tensor)")
def _nf4_quantize(w, levels, block_size):
    n, w = w.numel(), w.contiguous()
    if not (n and _runs_kernel(w)):
        return nf4_quantize_reference(w, levels, block_size)
    blocks, BLOCKS = triton.cdiv(n, block_size), max(1, 2048 // block_size)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=w.device)
    with torch.cuda.device_of(w):
        _quantize_kernel[(triton.cdiv(blocks, BLOCKS),)](w, levels, packed, absmax, n, blocks, block_size, BLOCKS)
    return packed, absmax


@_nf4_quantize.register_fake
def _(w, levels, block_size):
    n = w.numel()
    return w.new_empty((n + 1) // 2, dtype=torch.uint8), w.new_empty(-(-n // block_size), dtype=torch.float32)


Q = "Tensor packed, Tensor absmax, Tensor levels, Tensor? nested_absmax, Tensor? nested_offset, Tensor? nested_map"


@torch.library.custom_op("glassbox::nf4_dequantize", mutates_args=(),
                         schema=f"({Q}, int[] shape, int block_size, ScalarType dtype) -> Tensor")
def _nf4_dequantize(packed, absmax, levels, nested_absmax, nested_offset, nested_map, shape, block_size, dtype):
    q = NF4(packed, absmax, levels, shape, dtype, block_size, nested_absmax, nested_offset, nested_map)
    return _dequantize(q, dtype, _runs_kernel(torch.empty(0, dtype=dtype, device=packed.device)))


@_nf4_dequantize.register_fake
def _(packed, absmax, levels, nested_absmax, nested_offset, nested_map, shape, block_size, dtype):
    return packed.new_empty(shape, dtype=dtype)


@torch.library.custom_op("glassbox::nf4_matmul", mutates_args=(),
                         schema=f"(Tensor x, {Q}, int[] shape, int block_size, bool transpose) -> Tensor")
def _nf4_matmul(x, packed, absmax, levels, nested_absmax, nested_offset, nested_map, shape, block_size, transpose):
    """x (M, K) W^T if transpose, else x (M, N) W. Each is the other's gradient: one operator does both ways."""
    x, runs_kernel = x.contiguous(), _runs_kernel(x)
    q = NF4(packed, absmax, levels, shape, x.dtype, block_size, nested_absmax, nested_offset, nested_map)
    config = _config("matvec" if x.shape[0] == 1 else "matmul", x.device)
    if (runs_kernel and transpose and 0 < x.shape[0] <= FUSED_ROWS and shape[0] and shape[1] % block_size == 0
            and block_size <= config["WORDS"] * 8 and _readable_as_words(q)):
        return _launch(x, q, config)
    w = _dequantize(q, x.dtype, runs_kernel)
    return x @ (w.t() if transpose else w)


@_nf4_matmul.register_fake
def _(x, packed, absmax, levels, nested_absmax, nested_offset, nested_map, shape, block_size, transpose):
    return x.new_empty(x.shape[0], shape[0] if transpose else shape[1])


def _setup_context(ctx, inputs, output):
    _, *tensors, ctx.shape, ctx.block_size, ctx.transpose = inputs
    ctx.save_for_backward(*tensors)  # x is not needed: the layer keeps nothing of the batch


def _backward(ctx, grad):
    grad_x = _nf4_matmul(grad, *ctx.saved_tensors, ctx.shape, ctx.block_size, not ctx.transpose)
    return grad_x, *[None] * 9


_nf4_matmul.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.glassbox.nf4_matmul)
def _flops(x_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * args[6][0] * args[6][1]  # args[6]: W's shape


# ---------------------------------------------------------------------------------------------------- public functions


def _check(right: bool, name: str, accepted: str, got) -> None:
    if not right:
        raise ValueError(f"{name} must be {accepted}, got {got}")


def _check_q(q: NF4) -> None:
    n = torch.Size(q.shape).numel()
    blocks = -(-n // q.block_size)
    sizes = {"packed": (-(-n // 2), torch.uint8), "levels": (16, torch.float32),
             "absmax": (blocks, torch.float32 if q.nested_map is None else torch.uint8)}
    if q.nested_map is not None:
        sizes |= {"nested_absmax": (-(-blocks // NESTED_BLOCK), torch.float32), "nested_offset": (1, torch.float32),
                  "nested_map": (256, torch.float32)}
    for name, (size, dtype) in sizes.items():
        tensor = getattr(q, name)
        _check(tensor is not None and tensor.numel() == size and tensor.dtype == dtype and tensor.is_contiguous()
               and tensor.device == q.packed.device, name, f"{size} contiguous {dtype} numbers on {q.packed.device}",
               tensor if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}")


def nf4_quantize(w: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4:
    """Quantize a floating tensor of any shape; a last block may be short. Codes equal those of bitsandbytes.

    block_size is a power of two from 32 to 4096. The scales are float32 (8-bit codes if double_quant), whatever w is.
    A block that holds NaN or infinity decodes to numbers that are not finite.
    """
    _check(w.dtype in DTYPES, "w", "float16, bfloat16, float32 or float64", w.dtype)
    _check(block_size in (32, 64, 128, 256, 512, 1024, 2048, 4096), "block_size", "a power of two in 32..4096",
           block_size)
    levels = torch.tensor(NF4_LEVELS, device=w.device)
    packed, absmax = _nf4_quantize(w.detach(), levels, block_size)
    q = NF4(packed, absmax, levels, tuple(w.shape), w.dtype, block_size)
    if not double_quant:
        return q
    nested_map = dynamic_map().to(w.device)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    codes, nested_absmax = _quantize_blocks(absmax - offset, nested_map, NESTED_BLOCK)
    return q._replace(absmax=codes, nested_absmax=nested_absmax, nested_offset=offset, nested_map=nested_map)


def nf4_dequantize(q: NF4, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor that `q` stands for, in its shape, and in `dtype` or that of the original."""
    _check_q(q)
    dtype = dtype or q.dtype
    _check(dtype in DTYPES, "dtype", "float16, bfloat16, float32 or float64", dtype)
    return _nf4_dequantize(*operands(q), q.shape, q.block_size, dtype)


def nf4_linear(x: Tensor, q: NF4, bias: Tensor | None = None) -> Tensor:
    """x (..., K) W^T + bias -> (..., N) in x's dtype, for q of a weight (N, K); a gradient to x (and bias) only.

    Under autocast x is cast as torch.nn.functional.linear would. ValueError names what does not fit.
    """
    _check(len(q.shape) == 2, "q.shape", "(N, K)", q.shape)
    _check_q(q)
    N, K = q.shape
    _check(x.dtype in DTYPES, "x", "float16, bfloat16, float32 or float64", x.dtype)
    _check(x.ndim > 0 and x.shape[-1] == K, "x", f"(..., {K})", tuple(x.shape))
    _check(x.device == q.packed.device, "x", f"on the device of the weight, {q.packed.device}", x.device)
    _check(bias is None or bias.shape == (N,), "bias", f"({N},)", None if bias is None else tuple(bias.shape))
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows = torch.Size(x.shape[:-1]).numel()
    y = _nf4_matmul(x.reshape(rows, K), *operands(q), q.shape, q.block_size, True).view(*x.shape[:-1], N)
    return y if bias is None else y + bias.to(y.dtype)


# ---------------------------------------------------------------------------------------------------------------- main


def _tune(device: torch.device) -> None:
    """Time every tile on W (14336, 4096) and print the line of CONFIGS for this GPU."""
    q, best = nf4_quantize(torch.randn(14336, 4096, device=device, dtype=torch.bfloat16)), {}
    for name, rows, all_n, all_words, all_warps in (("matvec", 1, (4, 8, 16), (64, 128, 256, 512), (1, 2, 4)),
                                                    ("matmul", 16, (32, 64, 128), (16, 32, 64), (4, 8))):
        x, timed = torch.randn(rows, 4096, device=device, dtype=torch.bfloat16), []
        for BLOCK_N, WORDS, num_warps in itertools.product(all_n, all_words, all_warps):
            config = dict(BLOCK_N=BLOCK_N, WORDS=WORDS, num_warps=num_warps)
            try:
                ms = triton.testing.do_bench(lambda: _launch(x, q, config), return_mode="median")
            except triton.runtime.errors.OutOfResources:
                continue
            timed.append((ms, config))
        ms, best[name] = min(timed, key=lambda pair: pair[0])
        print(f"{name}, {rows} row(s): {ms * 1e3:.1f} us with {best[name]}")
    print(f"    {torch.cuda.get_device_capability(device)[0]}: {best},")


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the NF4 kernels against their reference; time them on a GPU.")
    parser.add_argument("--tune", action="store_true", help="find the fastest tiles on this GPU, print CONFIGS")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.tune:
        if device.type == "cpu":
            parser.error("--tune needs a GPU")
        return _tune(device)
    torch.manual_seed(0)
    w = torch.randn(96, 256, device=device)
    q = nf4_quantize(w)
    error = (nf4_dequantize(q) - w).abs().mean().item()
    print(f"mean |w - decoded w| of N(0, 1): {error:.4f} (0.0728 for long tensors)")
    for dtype, allowed in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        for rows in (1, 5, FUSED_ROWS + 1):
            x = torch.randn(rows, 256, device=device).to(dtype)
            truth = nf4_linear_reference(x.double(), q)
            error = ((nf4_linear(x, q).double() - truth).abs().max() / truth.abs().max()).item()
            print(f"{dtype}, {rows:3} rows: relative error {error:.1e}, allowed {allowed:.0e}")
            assert error <= allowed
    if device.type == "cpu":
        print("no GPU: nothing is timed (Triton's interpreter and the plain reference say nothing about speed)")
        return
    w = torch.randn(14336, 4096, device=device, dtype=torch.bfloat16)
    q = nf4_quantize(w)
    ms = triton.testing.do_bench(lambda: nf4_dequantize(q), return_mode="median")
    print(f"decode W (14336, 4096): {ms * 1e3:.1f} us, {w.numel() * (2 + 4.127 / 8) / ms / 1e9:.2f} TB/s")
    for rows in (1, 4, 16, 64, 2048, 8192):
        x = torch.randn(rows, 4096, device=device, dtype=torch.bfloat16)
        ours, plain = (triton.testing.do_bench(function, return_mode="median") * 1e3
                       for function in (lambda: nf4_linear(x, q), lambda: torch.nn.functional.linear(x, w)))
        print(f"W (14336, 4096), {rows:4} rows: nf4 {ours:.1f} us, bfloat16 {plain:.1f} us, {plain / ours:.2f}x")


if __name__ == "__main__":
    main()
