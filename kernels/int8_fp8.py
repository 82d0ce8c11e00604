"""Eight-bit matrix products: activations quantized token by token, weights by output channel (W8A8).

    scale_m = max|x_m| / Q          codes_m = round(x_m / scale_m)        Q = 127 (int8) or 448 (fp8, e4m3)
    y_mn = scale_m scale_n sum_k codes_mk codes_nk

Both scales leave the sum over k, so the product itself runs on 8-bit tensor cores, at twice the bf16 rate, in
torch._int_mm (int32 sums, exact) and torch._scaled_mm (fp32 sums, scales included). What is ours here: the pass that
finds a row's maximum and rounds the row, and for int8 the one that scales the int32 sums. A weight takes half of bf16.

A round to integers or to e4m3 has no useful derivative: the gradient passes straight through it, dx = dy W with the
decoded W. The weight gets none; dy is not quantized.

    python kernels/int8_fp8.py     # checks against the reference, then times (on a GPU)

Sources: Dettmers et al., LLM.int8() (arXiv:2208.07339), section 2; Xiao et al., SmoothQuant (arXiv:2211.10438);
Micikevicius et al., FP8 formats (arXiv:2209.05433).
"""

from __future__ import annotations

import argparse
import warnings

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
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # of each code: what a row's maximum becomes
MAX_K = (2**31 - 1) // 127**2  # 133,144: a longer row could overflow int32


# ----------------------------------------------------------------------------------------------------------- reference


def quantize_rows_reference(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (M, K) -> codes (M, K) of `dtype`, scale (M,) float32; to nearest, ties to even; a row of zeros has scale 1."""
    x = x.float()
    scale = x.abs().amax(1) / LARGEST[dtype] if x.shape[1] else x.new_ones(x.shape[0])
    scale = scale.where(scale != 0, 1)
    codes = (x / scale[:, None]).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def dequantize_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes (M, K), scale (M,) -> (M, K)."""
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * scale.to(wide)[:, None]).to(dtype)


def linear_reference(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x (M, K), its rows rounded to 8 bits, times the decoded W^T: all that the fast path does, in x's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rounded = dequantize_rows(*quantize_rows_reference(x, codes.dtype), dtype)
    return (rounded @ dequantize_rows(codes, scale, dtype).t()).to(x.dtype)


# ------------------------------------------------------------------------------------------------------------- kernels


@jit
def _quantize_rows_kernel(x_ptr, codes_ptr, scale_ptr, K, LARGEST: tl.constexpr, ROUND: tl.constexpr,
                          BLOCK: tl.constexpr):
    """One program, one row: its maximum, then its codes; the second reading comes from cache."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * K
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        x = tl.abs(tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.where(x == x, x, float("inf")))  # a NaN must not vanish: its row turns NaN
    scale = tl.div_rn(tl.max(largest, 0), LARGEST)
    scale = tl.where(scale == 0, 1.0, scale)
    tl.store(scale_ptr + row, scale)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        x = tl.div_rn(tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32), scale)
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)  # conversion to e4m3 overflows to NaN
        if ROUND:
            x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23, where float32 has steps of 1: to nearest, ties to even
        tl.store(codes_ptr + row * K + k, x.to(codes_ptr.dtype.element_ty), mask=k < K)


@jit
def _rescale_kernel(sums_ptr, row_scale_ptr, column_scale_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """out[m, n] = sums[m, n] * row_scale[m] * column_scale[n]."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.load(sums_ptr + row * N + n, mask=n < N, other=0).to(tl.float32)
    out = sums * tl.load(row_scale_ptr + row) * tl.load(column_scale_ptr + n, mask=n < N, other=0.0)
    tl.store(out_ptr + row * N + n, out.to(out_ptr.dtype.element_ty), mask=n < N)


def _has_fp8(device: torch.device) -> bool:
    """e4m3 tensor cores: NVIDIA's Ada (8.9), Hopper and later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def _runs_kernel(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x goes to the Triton kernels: on a GPU, or interpreted (TRITON_INTERPRET=1) on a CPU; never float64."""
    if x.dtype == torch.float64:  # nothing is cast down
        return False
    interpreted = triton is not None and not isinstance(_quantize_rows_kernel, triton.runtime.JITFunction)
    # Triton's interpreter rounds wrongly to bfloat16 and e4m3, and does not say so.
    on_cpu = x.device.type == "cpu" and interpreted and x.dtype != torch.bfloat16 and dtype == torch.int8
    if triton and (on_cpu or x.is_cuda and (dtype == torch.int8 or _has_fp8(x.device))):
        return True
    warnings.warn(f"kernels/int8_fp8.py: plain PyTorch serves {dtype} on {x.device.type}, not the Triton kernel")
    return False


def _quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    if not (x.numel() and _runs_kernel(x, dtype)):
        return quantize_rows_reference(x, dtype)
    codes = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    scale = x.new_empty(M, dtype=torch.float32)
    BLOCK = min(4096, triton.next_power_of_2(K))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _quantize_rows_kernel[(M,)](x.contiguous(), codes, scale, K, LARGEST[dtype], dtype == torch.int8, BLOCK)
    return codes, scale


# ----------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("glassbox::quantize_rows", mutates_args=(),
                         schema="(Tensor x, ScalarType dtype) -> (Tensor, Tensor)")
def _quantize_rows(x, dtype):
    return _quantize(x, dtype)


@_quantize_rows.register_fake
def _(x, dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("glassbox::linear_8bit", mutates_args=(),
                         schema="(Tensor x, Tensor codes, Tensor scale) -> Tensor")
def _linear_8bit(x, codes, scale):
    """x (M, K), codes (N, K) int8 or e4m3, scale (N,) -> (M, N)."""
    (M, K), N = x.shape, codes.shape[0]
    if not x.numel() or not N or not _runs_kernel(x, codes.dtype):
        return linear_reference(x, codes, scale)
    x_codes, x_scale = _quantize(x, codes.dtype)
    if codes.dtype == torch.float8_e4m3fn:
        if K % 16 or N % 16:  # what torch._scaled_mm does not take
            return (dequantize_rows(x_codes, x_scale) @ dequantize_rows(codes, scale).t()).to(x.dtype)
        # With a scale per row cuBLAS and CUTLASS write bfloat16 alone; its rounding is 1/16 of e4m3's.
        y = torch._scaled_mm(x_codes, codes.t(), scale_a=x_scale[:, None], scale_b=scale[None, :],
                             out_dtype=torch.bfloat16, use_fast_accum=False)  # "fast" keeps 14 bits of a sum
        return y.to(x.dtype)
    if x.is_cuda:  # there torch._int_mm wants more than 16 rows, and multiples of 8
        x_codes = torch.nn.functional.pad(x_codes, (0, -K % 8, 0, max(0, 17 - M)))
        codes = torch.nn.functional.pad(codes, (0, -K % 8, 0, -N % 8))
    sums = torch._int_mm(x_codes, codes.t())[:M, :N].contiguous()  # int32, exact
    out, BLOCK = x.new_empty((M, N)), 1024
    with torch.cuda.device_of(x):
        _rescale_kernel[(M, triton.cdiv(N, BLOCK))](sums, x_scale, scale, out, N, BLOCK)
    return out


@_linear_8bit.register_fake
def _(x, codes, scale):
    return x.new_empty(x.shape[0], codes.shape[0])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])  # x is not needed


def _backward(ctx, grad):
    codes, scale = ctx.saved_tensors
    return grad @ dequantize_rows(codes, scale, grad.dtype), None, None


_linear_8bit.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.glassbox.linear_8bit)
def _flops(x_shape, codes_shape, scale_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * codes_shape[0] * codes_shape[1]


# ---------------------------------------------------------------------------------------------------- public functions


def _check(right: bool, name: str, accepted: str, got) -> None:
    if not right:
        raise ValueError(f"{name} must be {accepted}, got {got}")


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Codes (..., K) of `dtype` (int8 or float8_e4m3fn) and scale (...) float32, one for each row of x (..., K).

    x ~ codes * scale[..., None]. Activations take it token by token, a weight (N, K) by output channel. No gradient.
    """
    _check(dtype in LARGEST, "dtype", "torch.int8 or torch.float8_e4m3fn", dtype)
    _check(x.dtype in DTYPES and x.ndim > 0, "x", "floating-point (..., K)", f"{x.dtype} {tuple(x.shape)}")
    rows = torch.Size(x.shape[:-1]).numel()
    codes, scale = _quantize_rows(x.detach().reshape(rows, x.shape[-1]), dtype)
    return codes.view(x.shape), scale.view(x.shape[:-1])


def linear_8bit(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) W^T + bias -> (..., N) in x's dtype, for W ~ codes (N, K) * scale (N,)[:, None], int8 or e4m3.

    Rows of x are rounded to the weight's code on the way. The gradient goes to x, straight through the rounding, and to
    the bias. Under autocast x is cast as torch.nn.functional.linear would. ValueError names what does not fit.
    """
    _check(codes.dtype in LARGEST and codes.ndim == 2, "codes", "int8 or float8_e4m3fn (N, K)",
           f"{codes.dtype} {tuple(codes.shape)}")
    N, K = codes.shape
    _check(codes.dtype != torch.int8 or K <= MAX_K, "codes", f"of at most {MAX_K} columns (int32 sums)", K)
    _check(scale.shape == (N,) and scale.dtype == torch.float32, "scale", f"float32 ({N},)",
           f"{scale.dtype} {tuple(scale.shape)}")
    _check(x.dtype in DTYPES, "x", "float16, bfloat16, float32 or float64", x.dtype)
    _check(x.ndim > 0 and x.shape[-1] == K, "x", f"(..., {K})", tuple(x.shape))
    _check(x.device == codes.device == scale.device, "x, codes and scale", "on one device",
           f"{x.device}, {codes.device}, {scale.device}")
    _check(bias is None or bias.shape == (N,), "bias", f"({N},)", None if bias is None else tuple(bias.shape))
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows = torch.Size(x.shape[:-1]).numel()
    y = _linear_8bit(x.reshape(rows, K), codes.contiguous(), scale.contiguous()).view(*x.shape[:-1], N)
    return y if bias is None else y + bias.to(y.dtype)


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    argparse.ArgumentParser(description="Check linear_8bit against its reference, then time it on a GPU.").parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    w = torch.randn(96, 256, device=device)
    for dtype, allowed in ((torch.int8, 1e-5), (torch.float8_e4m3fn, 1e-2 if device.type == "cuda" else 1e-5)):
        codes, scale = quantize_rows(w, dtype)
        for rows in (1, 40):
            x = torch.randn(rows, 256, device=device)
            truth = linear_reference(x.double(), codes, scale)
            error = ((linear_8bit(x, codes, scale).double() - truth).abs().max() / truth.abs().max()).item()
            plain = x.double() @ w.double().t()
            rounding = ((truth - plain).norm() / plain.norm()).item()
            print(f"{dtype}, {rows:2} rows: error {error:.1e}, allowed {allowed:.0e}; of the 8 bits {rounding:.1e}")
            assert error <= allowed
    if device.type == "cpu":
        print("no GPU: nothing is timed (Triton's interpreter and the plain reference say nothing about speed)")
        return
    w = torch.randn(14336, 4096, device=device, dtype=torch.bfloat16)
    for dtype in LARGEST:
        codes, scale = quantize_rows(w, dtype)
        for rows in (16, 512, 8192):
            x = torch.randn(rows, 4096, device=device, dtype=torch.bfloat16)
            ours, plain = (triton.testing.do_bench(function, return_mode="median") * 1e3 for function in
                           (lambda: linear_8bit(x, codes, scale), lambda: torch.nn.functional.linear(x, w)))
            print(f"W (14336, 4096), {rows} rows: {dtype} {ours:.1f} us, bfloat16 {plain:.1f} us, {plain / ours:.2f}x")


if __name__ == "__main__":
    main()
