"""Number formats for weights, the linear layers that hold them, and a cache and training that round.

    affine   w ~ (code - zero) scale          int8, 4, 3, 2 per tensor, row or group of a row; symmetric: zero = 0
    nf4, fp4 w ~ levels[code] absmax_block    16 levels, blocks of 64; double quantization: absmax in 8 bits too
    fp8      w ~ code scale_row               e4m3 (4 bits of exponent) forward, e5m2 for gradients
    bitnet   w ~ {-1, 0, 1} mean|w|           trained so: rounded forward, the gradient straight through (STE)

A quantized layer keeps codes, decodes them to multiply, and lets the gradient through to x: a frozen base for LoRA.

    model = quantize_model(model, "nf4")      # in place; embedding, head and norms stay as they are
    quantize_cache(model.KVCache(...), bits=8)
    python quant.py                           # bits and errors of the formats on N(0, 1)

Sources: QLoRA (arXiv:2305.14314): NF4, double quantization; LLM.int8() (arXiv:2208.07339); BitNet b1.58
(arXiv:2402.17764); FP8 (arXiv:2209.05433); STE: Bengio et al. (arXiv:1308.3432). Rounding by data: calibrate.py.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FULL_PRECISION = ("embed_tokens", "lm_head", "norm", "gate")  # parts of names; `gate` is an MoE router, not gate_proj
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(right: bool, name: str, accepted: str, got) -> None:
    if not right:
        raise ValueError(f"{name} must be {accepted}, got {got}")


def _check_weight(w: Tensor) -> None:
    _check(w.dtype in FLOATS, "the weight", "float16, bfloat16, float32 or float64", w.dtype)
    if not w.is_meta and not w.isfinite().all():
        raise ValueError(f"the weight {tuple(w.shape)} holds NaN or infinity, for which there is no code")


# -------------------------------------------------------------------------------------------------------------- affine


class Affine(NamedTuple):
    """A rounded tensor, what `quantize_affine` returns: (codes - zero) * scale, group by group."""

    codes: Tensor  # in the tensor's shape: int8 (symmetric), else uint8
    scale: Tensor  # (rows, groups): per tensor (1, 1), channel (shape[0], 1), group (rest, ceil(K / group_size))
    zero: Tensor | None  # like scale: the code of 0, an integer in 0..2^bits - 1; None when symmetric
    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int
    granularity: str
    group_size: int  # means nothing but with granularity "group"

    @property
    def symmetric(self) -> bool:
        return self.zero is None


def _grouped(x: Tensor, granularity: str, group_size: int) -> Tensor:
    """x -> (rows, groups, size): what shares a scale lies along the last dimension. Zeros fill a last, short group."""
    if granularity == "tensor":
        return x.reshape(1, 1, -1)
    if granularity == "channel":
        return x.reshape(x.shape[0], 1, -1)
    x = x.reshape(-1, x.shape[-1])
    return F.pad(x, (0, -x.shape[1] % group_size)).unflatten(1, (-1, group_size))


def _ungrouped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.flatten(1)[:, :math.prod(shape) // max(x.shape[0], 1)].reshape(shape)


def quantize_affine(w: Tensor, bits: int = 8, symmetric: bool = True, granularity: str = "channel",
                    group_size: int = 64, scale_dtype: torch.dtype | None = None) -> Affine:
    """Round w to the nearest of 2^bits evenly spaced numbers.

    symmetric: scale = max|w| / top, codes -top..top, top = 2^(bits-1) - 1. Else scale = (max - min) / (2^bits - 1), the
    range widened to hold 0, so that 0 has a code (`zero`) and stays 0.
    granularity: one scale for the "tensor", for each "channel" (index of the first dimension; the outputs of a linear
    layer) or for each "group" of group_size numbers along the last dimension; a last group may be shorter.
    scale_dtype: what scales are rounded to before the weights are (default: float32, of float64 weights float64).
    What is all zero stays zero. ValueError: bits outside 2..8, NaN or infinity in w.
    """
    _check_weight(w)
    _check(bits in range(2, 9), "bits", "2 to 8", bits)
    _check(granularity in ("tensor", "channel", "group"), "granularity", "tensor, channel or group", repr(granularity))
    _check(granularity != "group" or group_size > 0, "group_size", "at least 1", group_size)
    wide = _grouped(w.detach().to(torch.promote_types(w.dtype, torch.float32)), granularity, group_size)
    scale, zero = affine_grid(wide, bits, symmetric, scale_dtype)
    codes, shape = affine_codes(wide, scale[..., None], None if symmetric else zero[..., None], bits), tuple(w.shape)
    return Affine(_ungrouped(codes, shape), scale, zero, shape, w.dtype, bits, granularity, group_size)


def affine_grid(w: Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype | None = None):
    """scale and zero (None if symmetric), each (...), of the numbers along the last dimension of w (..., size)."""
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
    scale = torch.maximum(-low, high) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
    if scale_dtype is not None:  # a scale too small for it becomes the least that it has
        least = torch.finfo(scale_dtype).smallest_normal
        scale = scale.clamp_min(least).where(scale > 0, 0).to(scale_dtype).to(w.dtype)
    scale = scale.where(scale > 0, 1)  # nothing but zeros
    return scale, None if symmetric else (-low / scale).round().clamp(0, 2**bits - 1)


def affine_codes(w: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The nearest code of each number (ties to even): int8 if zero is None, else uint8. All broadcast."""
    if zero is None:
        top = 2 ** (bits - 1) - 1
        return (w / scale).round().clamp(-top, top).to(torch.int8)
    return (w / scale + zero).round().clamp(0, 2**bits - 1).to(torch.uint8)


def dequantize_affine(q: Affine, *, dtype: torch.dtype | None = None, **settings) -> Tensor:
    """The tensor that q stands for, in its shape, and in `dtype` or that of the original.

    q knows its settings (bits, symmetric, granularity, group_size); ValueError if they are given and are others."""
    for name, value in settings.items():
        _check(value == getattr(q, name, None), name, f"{getattr(q, name, None)}, as in quantize_affine", value)
    wide = torch.promote_types(dtype or q.dtype, torch.float32)
    codes = _grouped(q.codes, q.granularity, q.group_size).to(wide)
    if q.zero is not None:
        codes = codes - q.zero.to(wide)[..., None]
    return _ungrouped(codes * q.scale.to(wide)[..., None], q.shape).to(dtype or q.dtype)


# ---------------------------------------------------------------------------------------------------- NF4, FP4 and FP8

# Quantiles of N(0, 1) at 8 even steps above 1/2 and 7 below, and 0, over the largest (see kernels/nf4.py).
NF4_LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
              0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
              1.0)
# A sign, 2 bits of exponent, 1 of mantissa, over 12: not sorted, because the code is the bits. Code 8 is -0.
FP4_LEVELS = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FP4_LEVELS += tuple(-level for level in FP4_LEVELS)
NESTED_BLOCK = 256  # absmax values to a block of the second quantization


class NF4(NamedTuple):
    """What `quantize_nf4` and `quantize_fp4` return; kernels/nf4.py's NF4, field by field."""

    packed: Tensor  # (ceil(n / 2),) uint8: codes 2 b and 2 b + 1 in byte b, the first one in the high nibble
    absmax: Tensor  # (ceil(n / block_size),) float32, or uint8 codes of the nested map
    levels: Tensor  # (16,) float32
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int = 64
    nested_absmax: Tensor | None = None  # (ceil(blocks / 256),) float32; None, as the rest, without double quantization
    nested_offset: Tensor | None = None  # () float32: mean(absmax)
    nested_map: Tensor | None = None  # (256,) float32: dynamic_map()


def dynamic_map() -> Tensor:
    """The 256 sorted levels of the signed 8-bit dynamic type, float32: 0, 1 and 7 decades of 2^i even steps each."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        levels += middles + [-m for m in middles]
    return torch.tensor(sorted(levels))


def _in_blocks(x: Tensor, size: int) -> Tensor:
    """x flattened -> (blocks, size), the last block filled with zeros."""
    return F.pad(x.flatten(), (0, -x.numel() % size)).view(-1, size)


def _blockwise(x: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Places (n,) among the *sorted* levels (the lower one midway) and absmax (blocks,) float32."""
    blocks = _in_blocks(x.float(), block_size)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp_min(2.0**-126))[:, None]).clamp(-1, 1)  # bitsandbytes multiplies by 1 / absmax
    return torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True).flatten()[:x.numel()], absmax


def _quantize_4bit(w: Tensor, levels: tuple, block_size: int, double_quant: bool) -> NF4:
    _check_weight(w)
    _check(block_size in [2**i for i in range(5, 13)], "block_size", "a power of two in 32..4096", block_size)
    levels = torch.tensor(levels, device=w.device)
    ordered, code = levels.sort(stable=True)
    codes, absmax = _blockwise(w.detach(), ordered, block_size)
    codes = code.to(torch.uint8)[codes]
    codes = F.pad(codes, (0, codes.numel() % 2), value=int((levels == 0).nonzero()[0]) if not w.is_meta else 0)
    q = NF4(codes[::2] << 4 | codes[1::2], absmax, levels, tuple(w.shape), w.dtype, block_size)
    if not double_quant:
        return q
    nested_map, offset = dynamic_map().to(w.device), absmax.mean()
    codes, nested_absmax = _blockwise(absmax - offset, nested_map, NESTED_BLOCK)
    return q._replace(absmax=codes.to(torch.uint8), nested_absmax=nested_absmax, nested_offset=offset,
                      nested_map=nested_map)


def quantize_nf4(w: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4:
    """w of any shape -> 4 + 8/64 + 32/(64*256) = 4.127 bits a number (4.5 without double_quant), as bitsandbytes does.

    ValueError: a block_size that is no power of two in 32..4096; NaN or infinity in w.
    """
    return _quantize_4bit(w, NF4_LEVELS, block_size, double_quant)


def quantize_fp4(w: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4:
    """The same with the levels of a 4-bit float."""
    return _quantize_4bit(w, FP4_LEVELS, block_size, double_quant)


def dequantize_nf4(q: NF4, dtype: torch.dtype | None = None) -> Tensor:
    """levels[code] * absmax in float32 (float64 if asked for), then rounded once to `dtype` or the original's."""
    dtype, absmax, n = dtype or q.dtype, q.absmax, math.prod(q.shape)
    wide = torch.promote_types(dtype, torch.float32)
    if q.nested_map is not None:
        nested = _in_blocks(q.nested_map[absmax.int()], NESTED_BLOCK) * q.nested_absmax[:, None]
        absmax = nested.flatten()[:absmax.numel()] + q.nested_offset
    codes = torch.stack((q.packed >> 4, q.packed & 15), 1).flatten()[:n]
    values = _in_blocks(q.levels[codes.int()], q.block_size).to(wide) * absmax[:, None].to(wide)
    return values.flatten()[:n].view(q.shape).to(dtype)


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """x (..., K) -> codes (..., K) of int8, float8_e4m3fn or float8_e5m2 and scale (...): x ~ codes * scale[..., None].

    A row's largest number becomes the code's largest. Activations take it token by token, a weight row by row.
    """
    top = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max  # 448 of e4m3, 57344 of e5m2
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(-1) / top
    scale = scale.where(scale != 0, 1)
    codes = (wide / scale[..., None]).clamp(-top, top)  # a conversion to e4m3 overflows to NaN
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


# ------------------------------------------------------------------------------------------------ training that rounds


def fake_quantize(w: Tensor, **settings) -> Tensor:
    """w rounded as quantize_affine(**settings) would; the gradient passes as if nothing had happened."""
    return w + (dequantize_affine(quantize_affine(w, **settings)) - w).detach()


def fake_quantize_tokens(x: Tensor) -> Tensor:
    """x (..., K) with each token rounded to int8 by its own scale; straight-through."""
    codes, scale = quantize_rows(x)
    return x + ((codes.to(scale.dtype) * scale[..., None]).to(x.dtype) - x).detach()


def fake_ternary(w: Tensor) -> Tensor:
    """BitNet b1.58, eq. 1-3: round(w / mean|w|) clipped to -1, 0, 1, times mean|w|; straight-through."""
    scale = w.detach().abs().mean().clamp_min(1e-5)
    return w + ((w / scale).round().clamp(-1, 1) * scale - w).detach()


class QATLinear(nn.Linear):
    """A linear layer in training that will be rounded: it multiplies by rounded weights and learns the full ones.

    Its result is that of Int4Linear(weight) to the bit; int8_activations rounds each token of x as well."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, bits: int = 4, group_size: int = 64, symmetric: bool = False,
                    int8_activations: bool = False):
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.settings = dict(bits=bits, symmetric=symmetric, granularity="group", group_size=group_size,
                              scale_dtype=torch.float16)
        layer.int8_activations = int8_activations
        return layer

    def forward(self, x: Tensor) -> Tensor:
        x = fake_quantize_tokens(x) if self.int8_activations else x
        return F.linear(x, fake_quantize(self.weight, **self.settings), self.bias)


class BitLinear(nn.Linear):
    """BitNet b1.58: ternary weights, 8-bit tokens, RMSNorm before (norm=False: the model has one there already)."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, norm: bool = True):
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias, layer.norm = linear.weight, linear.bias, norm
        return layer

    def dequantize(self) -> Tensor:
        return fake_ternary(self.weight).detach()

    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, x.shape[-1:]) if self.norm else x
        return F.linear(fake_quantize_tokens(x), fake_ternary(self.weight), self.bias)


class _FP8Linear(torch.autograd.Function):
    """x, w to e4m3 (range 448, 3 bits of mantissa), dy to e5m2 (range 57344, 2 bits): gradients vary more in size."""

    @staticmethod
    def forward(ctx, x, w):
        x, w = (_round_fp8(t, torch.float8_e4m3fn) for t in (x, w))
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, dy):
        (x, w), dy = ctx.saved_tensors, _round_fp8(dy, torch.float8_e5m2)
        return dy @ w, dy.flatten(0, -2).t() @ x.flatten(0, -2)


def _round_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    codes, scale = quantize_rows(x.flatten(), dtype)  # one scale for the tensor
    return (codes.to(scale.dtype) * scale).view(x.shape).to(x.dtype)


def fp8_linear(x: Tensor, w: Tensor) -> Tensor:
    """x (..., K) w (N, K)^T as FP8 training has it, in all three products; numbers are rounded, sums in x's dtype."""
    return _FP8Linear.apply(x, w)


# -------------------------------------------------------------------------------------------------------------- layers


class _Frozen(torch.autograd.Function):
    """y = x W^T with the gradient to x only; nothing of the batch is kept, W is decoded again on the way back."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer.multiply(x)

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.layer.dequantize(dy.dtype), None


class QuantizedLinear(nn.Module):
    """What all quantized layers share. Their codes are buffers: no optimizer sees them, and `.to(dtype)` leaves them.

    in_features, out_features and bias are nn.Linear's; dequantize(dtype=None) -> W (N, K); kernels: "torch", or
    "triton" for those of kernels/ (which say what they cannot run).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: str):
        super().__init__()
        _check(weight.ndim == 2, "the weight", "(N, K)", tuple(weight.shape))
        _check(kernels in ("torch", "triton"), "kernels", "torch or triton", repr(kernels))
        self.out_features, self.in_features = weight.shape
        self.dtype, self.kernels = weight.dtype, kernels
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings):
        """The layer that rounds linear.weight; takes over its bias."""
        return cls(linear.weight.detach(), linear.bias, **settings)

    def _apply(self, fn, recurse=True):
        """Moves go to the codes and scales; casts do not: they would round them once more."""
        fixed = {name: buffer for name, buffer in self.named_buffers(recurse=False)}
        super()._apply(fn, recurse)
        for name, buffer in fixed.items():
            if getattr(self, name).dtype != buffer.dtype:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def multiply(self, x: Tensor) -> Tensor:
        """x (..., K) W^T in x's dtype, without bias or gradient."""
        return x @ self.dequantize(x.dtype).t()

    def forward(self, x: Tensor) -> Tensor:
        _check(x.shape[-1] == self.in_features, "x", f"(..., {self.in_features})", tuple(x.shape))
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = self.fused(x) if self.kernels == "triton" else _Frozen.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class NF4Linear(QuantizedLinear):
    """bitsandbytes' Linear4bit: 16 levels ("nf4", or "fp4"), blocks over the flattened weight, double quantization."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, block_size: int = 64, double_quant: bool = True,
                 levels: str = "nf4", kernels: str = "torch"):
        super().__init__(weight, bias, kernels)
        q = {"nf4": quantize_nf4, "fp4": quantize_fp4}[levels](weight, block_size, double_quant)
        self.block_size = block_size
        for name in ("packed", "absmax", "levels", "nested_absmax", "nested_offset", "nested_map"):
            self.register_buffer(name, getattr(q, name))

    @property
    def quantized(self) -> NF4:
        return NF4(self.packed, self.absmax, self.levels, (self.out_features, self.in_features), self.dtype,
                   self.block_size, self.nested_absmax, self.nested_offset, self.nested_map)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return dequantize_nf4(self.quantized, dtype)

    def fused(self, x: Tensor) -> Tensor:
        from kernels import nf4
        return nf4.nf4_linear(x, nf4.NF4(*self.quantized))


class Int8Linear(QuantizedLinear):
    """A row of W ~ codes scale_row, codes in int8 (or e4m3: code_dtype=torch.float8_e4m3fn).

    activations: "full"; or "rounded", each token of x to the same code (W8A8, as SmoothQuant wants it), the product
    then in integers. outliers: with rounded activations, columns where any |x| exceeds it are multiplied in full
    precision (LLM.int8(), where it is 6); the gradient goes straight through the rounding.
    """

    BLOCK = 512  # rows of W decoded at a time: they stay in the cache, and no full W is ever made

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, activations: str = "full",
                 outliers: float | None = None, code_dtype: torch.dtype = torch.int8, kernels: str = "torch"):
        super().__init__(weight, bias, kernels)
        _check(activations in ("full", "rounded"), "activations", "full or rounded", repr(activations))
        _check(outliers is None or activations == "rounded", "outliers", "None with full activations", outliers)
        _check_weight(weight)
        self.activations, self.outliers = activations, outliers
        codes, scale = quantize_rows(weight, code_dtype)
        self.register_buffer("codes", codes)  # (N, K)
        self.register_buffer("scale", scale.float())  # (N,)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        wide = torch.promote_types(dtype, torch.float32)
        return (self.codes.to(wide) * self.scale.to(wide)[:, None]).to(dtype)

    def multiply(self, x: Tensor) -> Tensor:
        if self.activations == "full":
            if x.dtype == torch.float16:  # the sum of codes could overflow
                return super().multiply(x)
            y = torch.cat([x @ codes.to(x.dtype).t() for codes in self.codes.split(self.BLOCK)], -1)
            return (y * self.scale).to(x.dtype)  # the row's scale leaves the sum
        x, rows, extra = x.reshape(-1, x.shape[-1]), x.shape[:-1], 0
        if self.outliers is not None:
            columns = (x.abs() > self.outliers).any(0).nonzero()[:, 0]
            extra = x[:, columns] @ (self.codes[:, columns].to(x.dtype) * self.scale[:, None].to(x.dtype)).t()
            x = x.index_fill(1, columns, 0)
        codes, scale = quantize_rows(x, self.codes.dtype)
        if x.device.type == "cpu" and codes.dtype == torch.int8 and codes.numel():
            sums = torch._int_mm(codes, self.codes.t())  # int32, exact: 4 times as fast as float32 with VNNI
        else:
            wide = torch.float32 if codes.dtype != torch.int8 or x.shape[1] <= 2**24 // 127**2 else torch.float64
            sums = codes.to(wide) @ self.codes.to(wide).t()
        return (sums * (scale[:, None] * self.scale) + extra).to(x.dtype).view(*rows, -1)

    def fused(self, x: Tensor) -> Tensor:
        from kernels.int8_fp8 import linear_8bit
        if self.activations == "full" or self.outliers is not None:  # the kernel rounds x
            return _Frozen.apply(x, self)
        return linear_8bit(x, self.codes, self.scale)


class Int4Linear(QuantizedLinear):
    """4 (or 3, or 2) bits in groups of a row with a float16 scale and an integer zero: what GPTQ and AWQ files hold.

    In memory in the layout of kernels/int4.py, a nibble to a code whatever `bits` is. K is filled up to whole groups,
    of a multiple of 32 numbers (group_size=None: one for the row). With `act_order` groups gather scattered columns:
    `order` says which column of W stands at each place. Weights are rounded to the nearest; `set_codes` puts in what
    calibrate.py chose.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, bits: int = 4, group_size: int | None = 64,
                 symmetric: bool = False, act_order: bool = False, kernels: str = "torch"):
        super().__init__(weight, bias, kernels)
        N, K = weight.shape
        _check(bits in (2, 3, 4), "bits", "2, 3 or 4", bits)
        _check(not group_size or group_size > 0 and group_size % 32 == 0, "group_size", "a multiple of 32", group_size)
        self.bits, self.group_size = bits, min(group_size or K, K) + -min(group_size or K, K) % 32
        q = quantize_affine(weight, bits, symmetric, "group", self.group_size, scale_dtype=torch.float16)
        middle = 2 ** (bits - 1)  # of symmetric codes: the place of 0
        codes, zero = (q.codes + middle, torch.full_like(q.scale, middle)) if symmetric else (q.codes, q.zero)
        self.register_buffer("order", torch.arange(K, device=weight.device) if act_order else None)
        self.set_codes(codes, q.scale, zero)

    def set_codes(self, codes: Tensor, scale: Tensor, zero: Tensor, g_idx: Tensor | None = None) -> None:
        """codes (N, K) 0..2^bits - 1, scale, zero (N, groups); column k is in group g_idx[k], else k // group_size."""
        if g_idx is not None:  # columns of a group together, in the order of the groups
            self.order = g_idx.long().argsort(stable=True)
            sizes = g_idx.bincount(minlength=scale.shape[1])
            _check(bool((sizes[:-1] == self.group_size).all()), "g_idx", f"groups of {self.group_size}", sizes.tolist())
            codes = codes[:, self.order]
        codes = F.pad(codes.to(torch.int32), (0, -codes.shape[1] % self.group_size))
        self.register_buffer("packed", pack_int4(codes))  # (N, K' / 8) int32
        self.register_buffer("scale", scale.to(torch.float16))  # (N, groups)
        self.register_buffer("zero", zero.to(torch.float16))

    def codes(self) -> tuple[Tensor, Tensor]:
        """codes (N, K) uint8 and g_idx (K,), as set_codes takes them."""
        codes = unpack_int4(self.packed)[:, :self.in_features].to(torch.uint8)
        group = torch.arange(self.in_features, device=codes.device) // self.group_size
        if self.order is None:
            return codes, group
        natural = self.order.argsort()
        return codes[:, natural], group[natural]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        wide = torch.promote_types(dtype or self.dtype, torch.float32)
        codes = unpack_int4(self.packed).unflatten(1, (-1, self.group_size)).to(wide)
        w = ((codes - self.zero.to(wide)[..., None]) * self.scale.to(wide)[..., None]).flatten(1)[:, :self.in_features]
        return (w if self.order is None else w[:, self.order.argsort()]).to(dtype or self.dtype)

    def fused(self, x: Tensor) -> Tensor:
        from kernels.int4 import Int4, int4_linear
        x = x if self.order is None else x[..., self.order]
        x = F.pad(x, (0, self.packed.shape[1] * 8 - self.in_features))
        return int4_linear(x, Int4(self.packed, self.scale, self.zero))


def pack_int4(codes: Tensor) -> Tensor:
    """Codes 0..15 (N, K), K a multiple of 32 -> int32 (N, K / 8): weight 4 i + j of 32 is nibble i of word j."""
    shift = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)[:, None]
    nibbles = codes.to(torch.int32).unflatten(1, (-1, 8, 4)) << shift  # (N, units, nibble, word)
    return nibbles.sum(2, dtype=torch.int32).flatten(1)


def unpack_int4(packed: Tensor) -> Tensor:
    shift = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)[:, None]
    return (packed.unflatten(1, (-1, 1, 4)) >> shift & 15).flatten(1)


# --------------------------------------------------------------------------------------------------------- whole models

METHODS = {  # --load_in and quantize_model's `method` -> the layer and its settings, which can be overruled
    "int8": (Int8Linear, {}), "w8a8": (Int8Linear, dict(activations="rounded")),
    "llm.int8": (Int8Linear, dict(activations="rounded", outliers=6.0)),
    "fp8": (Int8Linear, dict(code_dtype=torch.float8_e4m3fn)),
    "int4": (Int4Linear, {}), "int3": (Int4Linear, dict(bits=3)), "int2": (Int4Linear, dict(bits=2)),
    "nf4": (NF4Linear, {}), "fp4": (NF4Linear, dict(levels="fp4")),
    "qat": (QATLinear, {}), "bitnet": (BitLinear, {}),
}


def linear_layers(model: nn.Module, skip=FULL_PRECISION) -> dict[str, nn.Linear]:
    """The layers to quantize, by name: every nn.Linear of which no part of the name is in `skip`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
            and not set(name.split(".")) & set(skip)}


@torch.no_grad()
def quantize_model(model: nn.Module, method: str, *, skip=FULL_PRECISION, layers=None, **settings) -> nn.Module:
    """Put quantized layers in the place of model's linear ones, one by one, and return it.

    method: a key of METHODS; "qat" and "bitnet" give layers to train. skip: parts of names that stay in full precision
    (head and embedding by default: a tied head is the embedding). layers: the names to take instead. settings: of the
    layer. Works on the meta device too, to load a state dict into. ValueError: no layer left to quantize, one that
    shares its weight with another module, and what the layer refuses, with its name.
    """
    _check(method in METHODS, "method", ", ".join(METHODS), repr(method))
    kind, defaults = METHODS[method]
    found = linear_layers(model, skip if layers is None else ())
    chosen = list(found) if layers is None else list(layers)
    if not chosen or not found.keys() >= set(chosen):
        raise ValueError(f"no linear layer to quantize {'but for ' + ', '.join(skip) if layers is None else ''}; "
                         f"there are: {', '.join(list(linear_layers(model, ()))[:8]) or 'none'}")
    owners = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(name)
    for name in chosen:
        if len(tied := owners[found[name].weight]) > 1:
            raise ValueError(f"{name} is tied to {tied[0]}: leave both in full precision")
        try:
            layer = kind.from_linear(found[name], **defaults | settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from None
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.train(found[name].training))
    for p in model.parameters():  # a view of a buffer that it shared with what was rounded would keep all of that
        p.data = p.data.clone() if p.untyped_storage().nbytes() > p.nbytes else p.data
    return model


def model_bytes(model: nn.Module) -> int:
    """Bytes of all weights and codes in memory, tied ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return sum(t.numel() * t.element_size() for t in tensors)


def quantize_cache(cache, bits: int = 8, keys: str = "channel", block: int = 32, length: int | None = None):
    """Let a cache (model.KVCache) keep its keys and values in 8 or 4 bits, in place, and return it.

    keys: one scale for each "channel" and `block` tokens, or for each "token" and head; values always by token.
    length: room for so many tokens from now on. What the cache holds, up to its lengths, is rounded too.
    """
    from kernels.kv_cache import QuantizedStore
    cache.k = QuantizedStore(cache.k, bits, keys, block, length, cache.lengths)
    cache.v = QuantizedStore(cache.v, bits, "token", block, length, cache.lengths)
    return cache


def main() -> None:
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    linear = nn.Linear(1024, 1024, bias=False)
    linear.weight = nn.Parameter(w)
    print("format     bits   relative error of N(0, 1)")
    for method, (kind, settings) in METHODS.items():
        if issubclass(kind, QuantizedLinear):
            layer = kind.from_linear(linear, **settings)
            error = (layer.dequantize() - w).norm() / w.norm()
            print(f"{method:9} {8 * model_bytes(layer) / w.numel():5.2f}   {error:.4f}")


if __name__ == "__main__":
    main()
