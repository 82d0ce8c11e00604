"""SwiGLU's pointwise half in one pass: silu(gate) * up (Shazeer 2020, eq. 6, between the matmuls).

    y = silu(g) * u,   silu(g) = g * sigmoid(g)
    du = dy * silu(g)
    dg = dy * u * sigmoid(g) * (1 + g * (1 - sigmoid(g)))

Memory is all that counts: three numbers move per element forward, five backward. Plain PyTorch writes silu(g), reads it
back and keeps it for the backward pass; here only g and u are kept, which the matmuls before made anyway, and
sigmoid(g) is computed again. Everything between load and store is float32: one rounding, at the end.

    python kernels/swiglu.py            checks against float64, and on a GPU times it beside PyTorch
    python kernels/swiglu.py --tune     measures the table CONFIGS anew (GPU)

gate and up may be the two halves of one fused projection, `gate, up = gate_up.chunk(2, dim=-1)`: no copy is made.
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

# compute capability's major number: (elements, warps) per program, forward and backward. Written by --tune.
CONFIGS = {}
DEFAULT = ((2048, 4), (1024, 4))  # 16-byte loads: two of each tensor forward, one backward


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The same in plain PyTorch: the truth the kernel is tested against."""
    return torch.nn.functional.silu(gate) * up


@jit
def forward_kernel(gate, up, y, size, tiles, gate_stride, up_stride, BLOCK: tl.constexpr):
    """One program: BLOCK elements of one row of `size`; `tiles` programs share a row."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)  # offsets may pass 2^31
    col = (program % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = col < size
    g = tl.load(gate + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * size + col, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=mask)


@jit
def backward_kernel(dy, gate, up, dgate, dup, size, tiles, dy_stride, gate_stride, up_stride, BLOCK: tl.constexpr):
    """The same tile of both gradients; sigmoid(gate) is computed again."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    col = (program % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = col < size
    d = tl.load(dy + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    dg = d * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(dgate + row * size + col, dg.to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + row * size + col, (d * g * sigmoid).to(dup.dtype.element_ty), mask=mask)


INTERPRETED = bool(triton) and not isinstance(forward_kernel, triton.runtime.JITFunction)  # TRITON_INTERPRET=1


def config(device: torch.device, backward: bool) -> tuple[int, int]:
    major = 0 if INTERPRETED else torch.cuda.get_device_capability(device)[0]
    return CONFIGS.get(major, DEFAULT)[backward]


def as_rows(*tensors: Tensor) -> list[Tensor]:
    """All as (rows, size) with the columns side by side: one long row where all are contiguous, else a row of each."""
    shape = (1, -1) if all(t.is_contiguous() for t in tensors) else (-1, tensors[0].shape[-1])
    rows = [t.reshape(shape) for t in tensors]  # copied only where strides leave no other way
    return [t if t.stride(1) == 1 else t.contiguous() for t in rows]


def launch_forward(gate: Tensor, up: Tensor, setting: tuple[int, int] | None = None) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        block, warps = setting or config(gate.device, backward=False)
        gate, up = as_rows(gate, up)
        block = min(block, triton.next_power_of_2(gate.shape[1]))
        tiles = triton.cdiv(gate.shape[1], block)
        with torch.cuda.device_of(gate):  # Triton launches on the current device
            forward_kernel[(len(gate) * tiles,)](
                gate, up, y, gate.shape[1], tiles, gate.stride(0), up.stride(0), block, num_warps=warps)
    return y


def launch_backward(dy: Tensor, gate: Tensor, up: Tensor, setting: tuple[int, int] | None = None):
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if gate.numel():
        block, warps = setting or config(gate.device, backward=True)
        dy, gate, up = as_rows(dy, gate, up)
        block = min(block, triton.next_power_of_2(gate.shape[1]))
        tiles = triton.cdiv(gate.shape[1], block)
        with torch.cuda.device_of(gate):
            backward_kernel[(len(gate) * tiles,)](dy, gate, up, dgate, dup, gate.shape[1], tiles, dy.stride(0),
                                                  gate.stride(0), up.stride(0), block, num_warps=warps)
    return dgate, dup


# The operators: what torch.compile, activation checkpointing and autograd see.
@torch.library.custom_op("glassbox::swiglu", mutates_args=(), schema="(Tensor gate, Tensor up) -> Tensor")
def swiglu_op(gate, up):
    return launch_forward(gate, up)


@swiglu_op.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("glassbox::swiglu_backward", mutates_args=(),
                         schema="(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)")
def swiglu_backward_op(dy, gate, up):
    return launch_backward(dy, gate, up)


@swiglu_backward_op.register_fake
def _(dy, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


swiglu_op.register_autograd(lambda ctx, dy: swiglu_backward_op(dy, *ctx.saved_tensors),
                            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element.

    gate, up (..., D) of one shape, dtype (float16, bfloat16, float32; float64: the reference) and device, any strides
    -> as gate, contiguous. ValueError for anything else.
    """
    if gate.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"gate is {gate.dtype}; it must be float16, bfloat16, float32 or float64")
    for name in ("shape", "dtype", "device"):
        if getattr(up, name) != getattr(gate, name):
            raise ValueError(f"up has {name} {getattr(up, name)}; it must be that of gate, {getattr(gate, name)}")
    if not uses_kernel(gate):
        return swiglu_reference(gate, up)
    return swiglu_op(gate, up)


def uses_kernel(x: Tensor) -> bool:
    """Whether the kernel serves such a tensor; warns where it cannot. float64 is the reference's, without a word."""
    device = x.device.type
    if x.dtype == torch.float64:
        return False
    if triton and (device == "cuda" or device == "cpu" and INTERPRETED and x.dtype != torch.bfloat16):
        return True  # Triton's interpreter computes bfloat16 wrongly, and does not say so
    if not torch.compiler.is_compiling():
        warnings.warn(f"swiglu: no Triton kernel for {device} tensors here; plain PyTorch serves instead")
    return False


def compare(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[float, float]:
    """(largest error of the output and the gradients against float64, the allowed one), each over its tensor's maximum.

    Allowed: 1e-5 in float32; in 16 bits twice the error of plain PyTorch in that dtype, and a rounding of the result.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]

    def run(function, cast):
        gate, up, dy = (tensor.to(cast).detach().requires_grad_() for tensor in inputs)
        y = function(gate, up)
        return [y, *torch.autograd.grad(y, (gate, up), dy)]

    error, allowed = 0.0, 1e-5
    three = run(swiglu, dtype), run(swiglu_reference, dtype), run(swiglu_reference, torch.float64)
    for ours, plain, truth in zip(*three):
        limit = truth.abs().max().item()
        error = max(error, (ours - truth).abs().max().item() / limit)
        if dtype != torch.float32:
            allowed = max(allowed, 2 * (plain - truth).abs().max().item() / limit + torch.finfo(dtype).eps)
    return error, allowed


def tune(device: torch.device) -> None:
    """Print CONFIGS for this GPU: the fastest settings at 8192 x 14336 in 16 bits."""
    dy, gate, up = (torch.randn(8192, 14336, device=device, dtype=torch.bfloat16) for _ in range(3))
    clock = triton.testing.do_bench_cudagraph
    settings = list(itertools.product((512, 1024, 2048, 4096, 8192), (2, 4, 8, 16)))
    forward = {s: clock(lambda: launch_forward(gate, up, s), return_mode="median") for s in settings}
    backward = {s: clock(lambda: launch_backward(dy, gate, up, s), return_mode="median") for s in settings}
    best = min(forward, key=forward.get), min(backward, key=backward.get)
    print(f"CONFIGS = {{{torch.cuda.get_device_capability(device)[0]}: {best}}}"
          f"  # {forward[best[0]] * 1e3:.0f} and {backward[best[1]] * 1e3:.0f} us")


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
        for shape in ((5, 96), (3, 1001)) + (((4096, 4096),) if device.type == "cuda" else ()):
            error, allowed = compare(device, dtype, shape)
            wrong |= not error <= allowed  # NaN is wrong
            print(f"{str(dtype)[6:]:9} {str(shape):14} error {error:.1e}, allowed {allowed:.1e}")
    if wrong:
        raise SystemExit("the error is larger than allowed")
    if device.type == "cpu":
        return print("no GPU: nothing is timed (the interpreter's time means nothing)")
    dy, gate, up = (torch.randn(16384, 14336, device=device, dtype=torch.bfloat16) for _ in range(3))
    gate, up = gate.requires_grad_(), up.requires_grad_()
    ways = {"ours": swiglu, "plain": swiglu_reference, "compiled": torch.compile(swiglu_reference)}
    for name, function in ways.items():
        forward = triton.testing.do_bench_cudagraph(lambda: function(gate.detach(), up.detach()), return_mode="median")
        both = triton.testing.do_bench_cudagraph(
            lambda: torch.autograd.grad(function(gate, up), (gate, up), dy), return_mode="median")
        print(f"{name:9} 16384 x 14336 bfloat16: forward {forward * 1e3:.0f} us, with backward {both * 1e3:.0f} us")


if __name__ == "__main__":
    main()
