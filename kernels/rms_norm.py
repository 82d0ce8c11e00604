"""RMSNorm with the residual add fused: every row is read once forward and once backward.

    s = x + residual                                          (if a residual is given; the next skip connection)
    y = n * weight,   n = s / rms(s),   rms(s) = sqrt(mean(s^2) + eps)      (Zhang & Sennrich 2019, eq. 4)

    ds = (g - n * mean(g * n)) / rms(s) + (what reaches s itself),    g = dy * weight      (means over a row)
    dweight = sum over the rows of dy * n

Memory is all that counts here. In 16-bit numbers the forward pass must move 4 bytes per element (8 with the residual),
the backward pass 6: it computes n again from s and 1/rms(s), which cost 4 bytes per row to keep. Plain PyTorch makes
several passes, in float32. A tile of rows stays in registers between its two uses, so a row must fit into one program.

dweight sums over all rows. Backward starts only as many programs as the GPU runs at once; each adds up its rows in
registers in a fixed order, writes one partial sum, and a second kernel adds these up: no atomics, the same bits always.

    python kernels/rms_norm.py            checks against float64, and on a GPU times it beside PyTorch
    python kernels/rms_norm.py --tune     measures the table CONFIGS anew (GPU)

Casts are those of Hugging Face's LlamaRMSNorm: normalise in float32, round to the dtype of s, multiply by the weight in
that dtype. Mixed dtypes are taken as torch takes them (16-bit x onto a float32 residual under autocast: s is float32).
"""

from __future__ import annotations

import argparse
import itertools
import warnings

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a Mac, Windows: the reference serves
    triton = None

jit = triton.jit if triton else lambda function: function
MAX_SIZE = 32768  # of a row, which must fit into one program's registers

# (compute capability's major number, row size up to a power of two): warps forward; warps, programs per
# multiprocessor, pipeline stages backward. Missing entries follow the rule in `config`. Written by --tune.
CONFIGS = {}


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None,
                       out_dtype: torch.dtype | None = None):
    """The same in plain PyTorch: the truth the kernel is tested against. Arguments as in `rms_norm`."""
    s = x if residual is None else x + residual
    wide = s.to(torch.promote_types(s.dtype, torch.float32))  # float64 stays
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (n.to(s.dtype) * weight.to(s.dtype)).to(out_dtype or s.dtype)
    return y if residual is None else (y, s)


@jit
def forward_kernel(x, residual, weight, y, s, rstd, rows, size, x_stride, residual_stride, eps,
                   ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: ROWS whole rows of BLOCK >= size columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,) int64: offsets may pass 2^31
    col = tl.arange(0, BLOCK)  # (BLOCK,)
    mask = (row < rows)[:, None] & (col < size)[None, :]
    out = row[:, None] * size + col[None, :]  # outputs are contiguous
    value = tl.load(x + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
    if residual is not None:
        skip = tl.load(residual + row[:, None] * residual_stride + col[None, :], mask=mask, other=0.0)
        value = (value.to(tl.float32) + skip.to(tl.float32)).to(s.dtype.element_ty)
        tl.store(s + out, value, mask=mask)
    wide = value.to(tl.float32)  # of the rounded sum: what backward will find
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / size + eps)  # (ROWS,)
    tl.store(rstd + row, scale, mask=row < rows)
    w = tl.load(weight + col, mask=col < size, other=0.0).to(value.dtype).to(tl.float32)
    n = (wide * scale[:, None]).to(value.dtype).to(tl.float32)
    tl.store(y + out, (n * w[None, :]).to(value.dtype), mask=mask)


@jit
def backward_kernel(dy, ds, s, weight, rstd, dx, partial, rows, size, dy_stride, ds_stride, s_stride,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """One of a fixed number of programs: every num_programs-th tile of ROWS rows, and their share of dweight."""
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    in_row = col < size
    w = tl.load(weight + col, mask=in_row, other=0.0).to(s.dtype.element_ty).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(program * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & in_row[None, :]
        upstream = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        n = tl.load(s + row[:, None] * s_stride + col[None, :], mask=mask, other=0.0).to(tl.float32) * scale[:, None]
        g = upstream * w[None, :]
        gradient = (g - n * (tl.sum(g * n, axis=1) / size)[:, None]) * scale[:, None]
        if ds is not None:
            gradient += tl.load(ds + row[:, None] * ds_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + row[:, None] * size + col[None, :], gradient.to(dx.dtype.element_ty), mask=mask)
        dweight += upstream * n
    tl.store(partial + program.to(tl.int64) * size + col, tl.sum(dweight, axis=0), mask=in_row)


@jit
def sum_kernel(partial, dweight, programs, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The second stage: one program adds up BLOCK columns of partial (programs, size)."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & (col < size)[None, :]
        total += tl.load(partial + row[:, None].to(tl.int64) * size + col[None, :], mask=mask, other=0.0)
    tl.store(dweight + col, tl.sum(total, axis=0).to(dweight.dtype.element_ty), mask=col < size)


INTERPRETED = bool(triton) and not isinstance(forward_kernel, triton.runtime.JITFunction)  # TRITON_INTERPRET=1


def config(device: torch.device, block: int) -> tuple[int, int, int, int]:
    """What CONFIGS says of this device, else: 16 elements per thread, 512 threads per multiprocessor, prefetching.

    Backward needs about 110 registers per thread, so 512 threads are what a multiprocessor holds; alone they would not
    keep the memory busy while they reduce and write, so the next two tiles are on their way meanwhile.
    """
    warps = 32 if block > 16384 else min(max(block // 512, 4), 16)
    rule = (warps, warps, max(1, 16 // warps), 3)
    if INTERPRETED:
        return rule
    return CONFIGS.get((torch.cuda.get_device_capability(device)[0], block), rule)


def blocks(size: int) -> tuple[int, int]:
    """(rows, columns) of a tile: a whole row, and as many as make 2048 elements."""
    block = triton.next_power_of_2(size)
    return max(1, 2048 // block), block


def as_rows(x: Tensor) -> Tensor:
    """(..., size) as (rows, size) with the columns side by side; copied only where strides leave no other way."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def launch_forward(x, weight, eps, residual, out_dtype, setting=None):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(x.shape, dtype=out_dtype or dtype, device=x.device)
    s = torch.empty(x.shape if residual is not None else (0,), dtype=dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        x, residual = as_rows(x), None if residual is None else as_rows(residual)
        tile, block = blocks(x.shape[1])
        warps = (setting or config(x.device, block))[0]
        with torch.cuda.device_of(x):  # Triton launches on the current device
            forward_kernel[(triton.cdiv(len(x), tile),)](
                x, residual, weight.contiguous(), y, s, rstd, len(x), x.shape[1], x.stride(0),
                0 if residual is None else residual.stride(0), eps, tile, block, num_warps=warps)
    return y, s, rstd


def launch_backward(dy, ds, s, weight, rstd, setting=None):
    dx, dweight = torch.empty(s.shape, dtype=s.dtype, device=s.device), torch.zeros_like(weight.contiguous())
    if s.numel():
        dy, ds, s = as_rows(dy), None if ds is None else as_rows(ds), as_rows(s)
        rows, size = s.shape
        tile, block = blocks(size)
        _, warps, per_processor, stages = setting or config(s.device, block)
        processors = 1 if INTERPRETED else torch.cuda.get_device_properties(s.device).multi_processor_count
        loaded = tile * block * sum(t.element_size() for t in (dy, ds, s) if t is not None)  # bytes, per stage
        stages = min(stages, 1 + 2**16 // loaded)  # 64 KiB of shared memory: what every GPU has
        programs = min(processors * per_processor, triton.cdiv(rows, tile))  # the same each time: so are the sums
        partial = torch.empty(programs, size, dtype=torch.float32, device=s.device)
        with torch.cuda.device_of(s):
            backward_kernel[(programs,)](
                dy, ds, s, weight.contiguous(), rstd, dx, partial, rows, size, dy.stride(0),
                0 if ds is None else ds.stride(0), s.stride(0), tile, block, stages, num_warps=warps)
            sum_kernel[(triton.cdiv(size, 32),)](partial, dweight, programs, size, 64, 32)
    return dx, dweight


# The operators: what torch.compile, activation checkpointing and autograd see. y, s (empty without a residual), 1/rms.
@torch.library.custom_op("glassbox::rms_norm", mutates_args=(), schema=(
    "(Tensor x, Tensor weight, float eps, Tensor? residual, ScalarType? out_dtype) -> (Tensor, Tensor, Tensor)"))
def rms_norm_op(x, weight, eps, residual, out_dtype):
    return launch_forward(x, weight, eps, residual, out_dtype)


@rms_norm_op.register_fake
def _(x, weight, eps, residual, out_dtype):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    s_shape = (0,) if residual is None else x.shape
    return (x.new_empty(x.shape, dtype=out_dtype or dtype), x.new_empty(s_shape, dtype=dtype),
            x.new_empty(x.shape[:-1], dtype=torch.float32))


@torch.library.custom_op("glassbox::rms_norm_backward", mutates_args=(), schema=(
    "(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor rstd) -> (Tensor, Tensor)"))
def rms_norm_backward_op(dy, ds, s, weight, rstd):
    return launch_backward(dy, ds, s, weight, rstd)


@rms_norm_backward_op.register_fake
def _(dy, ds, s, weight, rstd):
    return s.new_empty(s.shape), weight.new_empty(weight.shape)


def keep(ctx, inputs, output):
    x, weight, _, residual, _ = inputs
    ctx.save_for_backward(x if residual is None else output[1], weight, output[2])
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)  # a sum that nobody uses has gradient None, not a tensor of zeros to read


def differentiate(ctx, dy, ds, _):
    s, weight, rstd = ctx.saved_tensors
    ds = None if ctx.dtypes[1] is None else ds
    dx, dweight = ds, None
    if dy is not None:
        dx, dweight = rms_norm_backward_op(dy, ds, s, weight, rstd)
    dx, dresidual = (None if dtype is None or dx is None else dx.to(dtype) for dtype in ctx.dtypes)
    return dx, dweight, None, dresidual, None


rms_norm_op.register_autograd(differentiate, setup_context=keep)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None,
             out_dtype: torch.dtype | None = None):
    """y = RMSNorm(x) * weight over the last dimension; with `residual`: (RMSNorm(x + residual) * weight, x + residual).

    x (..., D), D <= 32768, float16, bfloat16 or float32 (float64: the reference); weight (D,) of any of these;
    residual as x, its dtype may differ: the sum has the wider one -> y, as x; in the sum's dtype, or in `out_dtype`,
    which saves the cast before the next matmul under autocast. Gradients go to x, weight and residual.
    A hidden state (B, S, hidden) as well as heads (B, S, H, D) for qk-norm. ValueError for anything else.
    """
    tensors = {"x": x, "weight": weight} | ({} if residual is None else {"residual": residual})
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{name} is {tensor.dtype}; it must be float16, bfloat16, float32 or float64")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; they must be on one device")
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_SIZE:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be 1 to {MAX_SIZE}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; x {tuple(x.shape)} needs ({x.shape[-1]},)")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; it must be that of x, {tuple(x.shape)}")
    if not uses_kernel(*tensors.values()):
        return rms_norm_reference(x, weight, eps, residual, out_dtype)
    y, s, _ = rms_norm_op(x, weight, eps, residual, out_dtype)
    return y if residual is None else (y, s)


def uses_kernel(*tensors: Tensor) -> bool:
    """Whether the kernel serves these tensors; warns where it cannot. float64 is the reference's, without a word."""
    dtypes, device = {tensor.dtype for tensor in tensors}, tensors[0].device.type
    if torch.float64 in dtypes:
        return False
    if triton and (device == "cuda" or device == "cpu" and INTERPRETED and torch.bfloat16 not in dtypes):
        return True  # Triton's interpreter computes bfloat16 wrongly, and does not say so
    if not torch.compiler.is_compiling():
        warnings.warn(f"rms_norm: no Triton kernel for {device} tensors here; plain PyTorch serves instead")
    return False


def compare(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[float, float]:
    """(largest error of the outputs and gradients against float64, the allowed one), each over its tensor's maximum.

    Allowed: 1e-5 in float32; in 16 bits twice the error of plain PyTorch in that dtype, and a rounding of the result.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = shape, shape[-1:], shape, shape, shape
    inputs = [torch.randn(size, generator=generator).to(device, dtype) for size in shapes]

    def run(function, cast):
        x, weight, residual, dy, ds = (tensor.to(cast).detach().requires_grad_() for tensor in inputs)
        y, s = function(x, weight, residual=residual)
        return [y, s, *torch.autograd.grad((y, s), (x, weight, residual), (dy, ds))]

    error, allowed = 0.0, 1e-5
    three = run(rms_norm, dtype), run(rms_norm_reference, dtype), run(rms_norm_reference, torch.float64)
    for ours, plain, truth in zip(*three):
        limit = truth.abs().max().item()
        error = max(error, (ours - truth).abs().max().item() / limit)
        if dtype != torch.float32:
            allowed = max(allowed, 2 * (plain - truth).abs().max().item() / limit + torch.finfo(dtype).eps)
    return error, allowed


def tune(device: torch.device) -> None:
    """Print CONFIGS for this GPU: the fastest settings at 2^26 elements, row size by row size."""
    major = torch.cuda.get_device_capability(device)[0]
    for block in (64, 128, 1024, 2048, 4096, 8192, 16384):
        x, dy = (torch.randn(2**26 // block, block, device=device, dtype=torch.bfloat16) for _ in range(2))
        weight = torch.ones(block, device=device, dtype=torch.bfloat16)
        rstd = launch_forward(x, weight, 1e-6, None, None)[2]
        clock = triton.testing.do_bench_cudagraph

        def forward_time(warps):
            return clock(lambda: launch_forward(x, weight, 1e-6, None, None, (warps,)), return_mode="median")

        def backward_time(setting):
            return clock(lambda: launch_backward(dy, None, x, weight, rstd, (0, *setting)), return_mode="median")

        forward = min((1, 2, 4, 8, 16, 32), key=forward_time)
        backward = min(itertools.product((2, 4, 8, 16, 32), (1, 2, 3, 4, 6, 8), (1, 2, 3)), key=backward_time)
        print(f"    ({major}, {block}): {(forward, *backward)},"
              f"  # {forward_time(forward) * 1e3:.0f} and {backward_time(backward) * 1e3:.0f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="measure CONFIGS anew (needs a GPU)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.tune and device.type == "cpu":
        parser.error("--tune needs a GPU")
    if options.tune:
        return tune(device)
    wrong = False
    for dtype in (torch.float32, torch.bfloat16 if device.type == "cuda" else torch.float16):
        for shape in ((5, 96), (2, 3, 4, 64), (33, 1000)) + (((4096, 4096),) if device.type == "cuda" else ()):
            error, allowed = compare(device, dtype, shape)
            wrong |= not error <= allowed  # NaN is wrong
            print(f"{str(dtype)[6:]:9} {str(shape):14} error {error:.1e}, allowed {allowed:.1e}")
    if wrong:
        raise SystemExit("the error is larger than allowed")
    if device.type == "cpu":
        return print("no GPU: nothing is timed (the interpreter's time means nothing)")
    x, dy = (torch.randn(16384, 4096, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight = torch.ones(4096, device=device, dtype=torch.bfloat16, requires_grad=True)
    ways = {"ours": rms_norm, "plain": rms_norm_reference, "compiled": torch.compile(rms_norm_reference)}
    for name, function in ways.items():
        forward = triton.testing.do_bench_cudagraph(lambda: function(x.detach(), weight.detach()), return_mode="median")
        both = triton.testing.do_bench_cudagraph(
            lambda: torch.autograd.grad(function(x, weight), (x, weight), dy), return_mode="median")
        print(f"{name:9} 16384 x 4096 bfloat16: forward {forward * 1e3:.0f} us, with backward {both * 1e3:.0f} us")


if __name__ == "__main__":
    main()
