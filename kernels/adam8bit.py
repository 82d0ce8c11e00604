"""Adam whose two moments take one byte each, instead of four: a block-wise 8-bit state.

    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2                       in float32
    p = p (1 - lr weight_decay) - lr m^ / (sqrt(v^) + eps),   m^ = m / (1 - beta1^t), v^ = v / (1 - beta2^t)

Between steps each block of 256 numbers keeps its absmax, and a byte for each number: the nearest of the 256 levels of
`dynamic_map`, signed for m, unsigned for v (there is no level -1: -absmax becomes -0.993 absmax). The step uses m and v
before they are rounded. State: 2 + 8/256 bytes a weight; a step moves 10 bytes of a bf16 parameter (AdamW in float32,
24 or more).

One thing is not as in bitsandbytes: here a positive v never becomes 0. Where v is 0 and m is not, sqrt(v) + eps is eps
and the step m / eps, thousands of times lr. Rounding up to the lowest level only makes a step that is too small.

Small tensors (fewer than 4096 numbers: norms, biases) are not worth it; keep theirs in float32.

    python kernels/adam8bit.py     # checks against the reference, then times (on a GPU)

Sources: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861); AdamW: arXiv:1711.05101.
"""

from __future__ import annotations

import argparse
import math
import warnings

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a Mac, Windows: the reference serves
    triton = None
jit = triton.jit if triton else lambda function: function

BLOCK = 256  # numbers that share an absmax
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ----------------------------------------------------------------------------------------------------------- reference


def dynamic_map(signed: bool) -> Tensor:
    """The 256 sorted levels of the 8-bit dynamic data type, float32: 0, 1, and 7 decades of even steps.

    Decade d = 0..6 reaches from 10^(d - 7) to 10^(d - 6); its levels are the middles of 2^d equal parts (2^(d + 1)
    without a sign). So small numbers get range and large ones precision, and 0 is exact.
    """
    levels = [0.0, 1.0]
    for d in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (d if signed else d + 1) + 1, dtype=torch.float32)
        middles = (10 ** (d - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        levels += middles + [-m for m in middles] * signed
    return torch.tensor(sorted(levels))


def dequantize_state(codes: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
    """codes (any shape, n numbers), absmax (ceil(n / 256),), levels (256,) -> the numbers they stand for."""
    return levels[codes.int()] * absmax.repeat_interleave(BLOCK)[:codes.numel()].view(codes.shape)


def quantize_state(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """codes (x's shape) uint8 and absmax float32 of x: the nearest level, but the lowest positive one for any positive
    x if no level is negative."""
    blocks = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp_min(2.0**-126)[:, None]
    codes = torch.bucketize(scaled, ((levels[:-1] + levels[1:]) / 2).to(x.dtype), out_int32=True)
    if levels[0] == 0:
        codes = codes.where(blocks <= 0, codes.clamp_min(1))
    return codes.to(torch.uint8).flatten()[:x.numel()].view(x.shape), absmax.float()


def adam8bit_update_reference(param, grad, m_codes, m_absmax, v_codes, v_absmax, lr, beta1, beta2, eps, weight_decay,
                              step) -> None:
    """One step in place, in float32, or float64 for a float64 parameter: the slow truth."""
    wide = torch.promote_types(param.dtype, torch.float32)
    signed, unsigned = dynamic_map(True).to(param.device), dynamic_map(False).to(param.device)
    p, g = param.to(wide), grad.to(wide)
    m = dequantize_state(m_codes, m_absmax.to(wide), signed).mul_(beta1).add_(g, alpha=1 - beta1)
    v = dequantize_state(v_codes, v_absmax.to(wide), unsigned).mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = v.sqrt() / math.sqrt(1 - beta2**step) + eps
    param.copy_(p * (1 - lr * weight_decay) - lr / (1 - beta1**step) * (m / denominator))
    for x, codes, absmax, levels in ((m, m_codes, m_absmax, signed), (v, v_codes, v_absmax, unsigned)):
        new_codes, new_absmax = quantize_state(x, levels)
        codes.copy_(new_codes)
        absmax.copy_(new_absmax)


# -------------------------------------------------------------------------------------------------------------- kernel


@jit
def _place(x, FIRST: tl.constexpr):
    """The place of the level nearest to x in 0..1; the first decade's levels have the places FIRST..2 FIRST - 1.

    A search among 256 levels would cost 8 look-ups. But decade d holds the places from start = FIRST 2^d up to
    2 start - 1, in even steps: there the place is what lies below the line start (10^(6 - d) x / 0.9 + 8 / 9). Each
    decade's line is flatter than the one before and meets it at the border: the right line is always the lowest.
    """
    place = x * (FIRST * 1e6 / 0.9) + FIRST * 8 / 9
    for d in tl.static_range(1, 7):
        place = tl.minimum(place, x * (FIRST * 2.0**d * 10.0 ** (6 - d) / 0.9) + FIRST * 2.0**d * 8 / 9)
    start = (place.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # power of two: no mantissa
    place = tl.where(place - start < 0.2, place - 0.2, place)  # nearer to the last level of the decade before
    place = tl.where(place > 128 * FIRST - 0.25, 128.0 * FIRST, place)  # nearer to 1 than to the last level
    return place.to(tl.int32)  # downwards


@jit
def _level(place, FIRST: tl.constexpr):
    """The level at a place, undoing `_place`: the middle of its step, on the lines turned round: the highest."""
    middle = place + 0.5
    level = middle * (0.9e-6 / FIRST) - 0.8e-6
    for d in tl.static_range(1, 7):
        level = tl.maximum(level, middle * (0.9 * 10.0 ** (d - 6) / (FIRST * 2.0**d)) - 0.8 * 10.0 ** (d - 6))
    return tl.where(place < FIRST, 0.0, tl.where(place == 128 * FIRST, 1.0, level))


@jit
def _update_kernel(param_ptr, grad_ptr, m_codes_ptr, m_absmax_ptr, v_codes_ptr, v_absmax_ptr, n, beta1,
                   beta2, one_minus_beta1, one_minus_beta2, decay, step_size, v_correction, eps,
                   BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """BLOCKS blocks of the state: read once, written once."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # (BLOCKS, BLOCK)
    mask = at < n
    has_block = block * BLOCK < n
    g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(param_ptr + at, mask=mask, other=0.0).to(tl.float32)
    m_code = tl.load(m_codes_ptr + at, mask=mask, other=127).to(tl.int32)  # 127 and 0: the codes of 0
    v_code = tl.load(v_codes_ptr + at, mask=mask, other=0).to(tl.int32)
    m_absmax = tl.load(m_absmax_ptr + block, mask=has_block, other=0.0)
    v_absmax = tl.load(v_absmax_ptr + block, mask=has_block, other=0.0)
    code = tl.arange(0, 256)  # both tables are computed anew by each program: cheaper than to carry them about
    m_levels = tl.where(code < 127, -_level(127 - code, 1), _level(code - 127, 1))
    m = tl.reshape(tl.gather(m_levels, tl.reshape(m_code, (BLOCKS * BLOCK,)), 0), (BLOCKS, BLOCK)) * m_absmax[:, None]
    v_levels = _level(code + 1, 2)
    v = tl.reshape(tl.gather(v_levels, tl.reshape(v_code, (BLOCKS * BLOCK,)), 0), (BLOCKS, BLOCK)) * v_absmax[:, None]

    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * g * g
    p = p * decay - step_size * (m / (tl.sqrt(v) * v_correction + eps))
    tl.store(param_ptr + at, p.to(param_ptr.dtype.element_ty), mask=mask)

    m_absmax = tl.max(tl.abs(m), 1)
    v_absmax = tl.max(v, 1)
    tl.store(m_absmax_ptr + block, m_absmax, mask=has_block)
    tl.store(v_absmax_ptr + block, v_absmax, mask=has_block)
    place = _place(tl.abs(m) * (1 / tl.maximum(m_absmax, 2.0**-126))[:, None], 1)
    m_code = 127 + tl.where(m < 0, -tl.minimum(place, 127), place)  # 127 negative levels, 0, 127 positive ones and 1
    place = _place(v * (1 / tl.maximum(v_absmax, 2.0**-126))[:, None], 2)
    v_code = tl.where(v > 0, tl.maximum(place, 2) - 1, 0)
    tl.store(m_codes_ptr + at, m_code.to(tl.uint8), mask=mask)
    tl.store(v_codes_ptr + at, v_code.to(tl.uint8), mask=mask)


def _runs_kernel(param: Tensor) -> bool:
    """Whether the Triton kernel runs: on a GPU, or interpreted (TRITON_INTERPRET=1) on a CPU; never for float64."""
    if param.dtype == torch.float64:  # nothing is cast down
        return False
    interpreted = triton is not None and not isinstance(_update_kernel, triton.runtime.JITFunction)
    if triton and (param.is_cuda or param.device.type == "cpu" and interpreted and param.dtype != torch.bfloat16):
        return True  # (Triton's interpreter computes wrongly in bfloat16, and does not say so)
    warnings.warn(f"kernels/adam8bit.py: plain PyTorch serves on {param.device.type}, not the Triton kernel")
    return False


# ------------------------------------------------------------------------------------------------------------ operator


@torch.library.custom_op(
    "glassbox::adam8bit_update", mutates_args=("param", "m_codes", "m_absmax", "v_codes", "v_absmax"),
    schema="(Tensor(a!) param, Tensor grad, Tensor(b!) m_codes, Tensor(c!) m_absmax, Tensor(d!) v_codes, "
           "Tensor(e!) v_absmax, float lr, float beta1, float beta2, float eps, float weight_decay, int step) -> ()")
def _adam8bit_update(param, grad, m_codes, m_absmax, v_codes, v_absmax, lr, beta1, beta2, eps, weight_decay, step):
    if not param.numel():
        return
    if not _runs_kernel(param):
        adam8bit_update_reference(param, grad, m_codes, m_absmax, v_codes, v_absmax, lr, beta1, beta2, eps,
                                  weight_decay, step)
        return
    BLOCKS = 8
    with torch.cuda.device_of(param):  # Triton launches on the current device
        _update_kernel[(triton.cdiv(param.numel(), BLOCK * BLOCKS),)](
            param, grad.contiguous(), m_codes, m_absmax, v_codes, v_absmax, param.numel(), beta1,
            beta2, 1 - beta1, 1 - beta2, 1 - lr * weight_decay, lr / (1 - beta1**step),
            1 / math.sqrt(1 - beta2**step), eps, BLOCK, BLOCKS, num_warps=4)


@_adam8bit_update.register_fake
def _(*args):
    return None


# ---------------------------------------------------------------------------------------------------- public functions


def _check(right: bool, name: str, accepted: str, got) -> None:
    if not right:
        raise ValueError(f"{name} must be {accepted}, got {got}")


def adam8bit_state(param: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(m_codes, m_absmax, v_codes, v_absmax) of a parameter before its first step: all m and v are 0."""
    absmax = torch.zeros(-(-param.numel() // BLOCK), dtype=torch.float32, device=param.device)
    zeros = torch.zeros(param.shape, dtype=torch.uint8, device=param.device)
    return zeros + 127, absmax, zeros, absmax.clone()  # 127 is the place of 0 in the signed map


@torch.no_grad()
def adam8bit_update(param: Tensor, grad: Tensor, m_codes: Tensor, m_absmax: Tensor, v_codes: Tensor, v_absmax: Tensor,
                    *, lr: float, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.0,
                    step: int) -> None:
    """One AdamW step of `param`, in place, as are its codes (param's shape, uint8) and absmax (ceil(n / 256), float32).

    `step` counts from 1; `adam8bit_state` gives the state before it. grad may have another dtype than param.
    ValueError names what does not fit.
    """
    _check(param.dtype in DTYPES and param.is_contiguous(), "param", "contiguous float16, bfloat16, float32 or float64",
           f"{param.dtype} with strides {param.stride()}")
    _check(grad.shape == param.shape and grad.dtype in DTYPES, "grad", f"floating-point {tuple(param.shape)}",
           f"{grad.dtype} {tuple(grad.shape)}")
    blocks = -(-param.numel() // BLOCK)
    for name, tensor, dtype, shape in (("m_codes", m_codes, torch.uint8, param.shape),
                                       ("m_absmax", m_absmax, torch.float32, (blocks,)),
                                       ("v_codes", v_codes, torch.uint8, param.shape),
                                       ("v_absmax", v_absmax, torch.float32, (blocks,)),
                                       ("grad", grad, grad.dtype, param.shape)):
        _check(tensor.dtype == dtype and tensor.shape == shape and tensor.device == param.device
               and (tensor is grad or tensor.is_contiguous()), name,
               f"contiguous {dtype} {tuple(shape)} on {param.device}",
               f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}")
    _check(step >= 1, "step", "at least 1", step)
    _check(0 <= beta1 < 1 and 0 <= beta2 < 1, "beta1 and beta2", "in [0, 1)", (beta1, beta2))
    _adam8bit_update(param, grad, m_codes, m_absmax, v_codes, v_absmax, float(lr), beta1, beta2, eps,
                     float(weight_decay), step)


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    argparse.ArgumentParser(description="Check adam8bit_update against its reference; time it on a GPU.").parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    ours = torch.randn(5000, device=device)
    truth, state = ours.double(), adam8bit_state(ours)
    truth_state = adam8bit_state(truth)
    for step in range(1, 4):
        grad = torch.randn(5000, device=device) * 10 ** torch.empty(5000, device=device).uniform_(-4, 0)
        adam8bit_update(ours, grad, *state, lr=1e-2, step=step)
        adam8bit_update(truth, grad.double(), *truth_state, lr=1e-2, step=step)
        error = (ours.double() - truth).abs().max().item()
        codes = max((a.int() - b.int()).abs().max().item() for a, b in zip(state[::2], truth_state[::2]))
        moved = sum((a != b).sum().item() for a, b in zip(state[::2], truth_state[::2]))
        print(f"step {step}: error {error:.1e}, allowed 1e-05; {moved} of 10000 codes differ, by at most {codes}")
        assert error <= 1e-5 and codes <= 1
        for a, b in zip(truth_state, state):  # a code on the edge must not add up over steps
            a.copy_(b)
    if device.type == "cpu":
        print("no GPU: nothing is timed (Triton's interpreter and the plain reference say nothing about speed)")
        return
    param = torch.randn(2**28, device=device, dtype=torch.bfloat16)
    grad, state = torch.randn_like(param), adam8bit_state(param)
    ms = triton.testing.do_bench(lambda: adam8bit_update(param, grad, *state, lr=1e-3, step=1), return_mode="median")
    moved = param.numel() * (10 + 16 / BLOCK)
    print(f"{param.numel():.1e} bfloat16 parameters: {ms:.3f} ms, {moved / ms / 1e9:.2f} TB/s")


if __name__ == "__main__":
    main()
