"""Cross-entropy of a language model without its logits: the head's matmul and the loss in one, chunk by chunk.

    z_t = cap * tanh(h_t W^T / cap)                                  (no soft-cap: z_t = h_t W^T)
    loss = scale * sum_t w_t (lse_t - z_t[y_t] + z_loss * lse_t^2)    lse_t = log sum_v exp z_t[v]
    dloss/dz_t = scale * w_t (softmax(z_t) (1 + 2 z_loss lse_t) - onehot(y_t))        w_t = 0 where y_t is ignored

At 16384 tokens and 128256 words the logits are 4.2 GB in 16 bits. Here a chunk of tokens at a time goes through: matmul
(cuBLAS), one kernel that turns the chunk's logits into their gradient in place, and the two matmuls that turn that into
the gradients of hidden and weight. So the gradients exist before backward begins, which only multiplies them by the
gradient of the loss: three matmuls in all, as without chunks. Keeping lse alone and computing the logits again in
backward would need no room between the passes, but a fourth matmul: 4/3 of the time. Chunks are as large as half a GB
of 16-bit logits allows, at least 2048 tokens: each adds to the whole weight gradient, 4 or 8 bytes read and written per
6 * chunk FLOPs, which a chunk of 512 tokens does not hide. What is left in memory is the weight gradient's sum, that of
hidden, and one chunk: with a bf16 weight 0.32 of what full logits need at 16384 tokens x 4096 x 128256 (see `plan`).

    python kernels/cross_entropy.py           checks against the reference in float64; on a GPU, times too
    python kernels/cross_entropy.py --tune    on a GPU: prints CONFIGS anew

`cross_entropy(logits, target)` is the loss alone, for logits that exist anyway.

Sources: Hsu et al. 2024 (Liger Kernel, arXiv 2410.10989) for gradients in the forward pass; Wijmans et al. 2024 (Cut
Cross-Entropy, arXiv 2411.09009) for what the logits cost; Milakov & Gimelshein 2018 (online softmax, arXiv 1805.02867);
Gemma 2 (arXiv 2408.00118) for the soft-cap; PaLM (arXiv 2204.02311, section 5) for the z-loss.
"""

from __future__ import annotations

import argparse
import contextlib
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

try:
    import triton
    import triton.language as tl
except ImportError:  # a Mac, Windows: the reference serves
    triton = None
jit = triton.jit if triton else lambda function: function

# {GPU architecture: (columns of a row read at once, warps)}; one program walks along one row. Print anew: --tune
CONFIGS = {"other": (8192, 16), 9: (16384, 32)}
CHUNK_LOGITS, CHUNK_TOKENS = 2 ** 28, 2048  # a chunk holds so many logits, but never fewer tokens than that
ROUNDINGS = 8  # of a bf16 sum at most: with 8 it errs 1.6 to 1.8 times as much as one rounding, with 16 over 2 times


# ---- the slow truth

def cross_entropy_reference(logits: Tensor, target: Tensor, ignore_index: int = -100, *, reduction: str = "mean",
                            num_tokens=None, token_weight=None, softcap=None, z_loss: float = 0.0) -> Tensor:
    """What `cross_entropy` computes, in plain PyTorch; float64 stays float64, all else is computed in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    counted = target != ignore_index
    lse = logits.logsumexp(-1)
    label_logits = logits.gather(-1, torch.where(counted, target, 0).unsqueeze(-1)).squeeze(-1)
    loss = torch.where(counted, lse - label_logits + z_loss * lse ** 2, 0.0)  # target's shape
    return reduced(loss, target, ignore_index, reduction, num_tokens, token_weight)


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, target: Tensor, *args, **options) -> Tensor:
    """What `linear_cross_entropy` computes, with all the logits in memory."""
    return cross_entropy_reference(F.linear(hidden, weight), target, *args, **options)


def reduced(loss: Tensor, target: Tensor, ignore_index: int, reduction: str, num_tokens, token_weight) -> Tensor:
    """Per-token losses -> none: themselves, weighted; sum; mean: their sum / token_count."""
    loss = loss if token_weight is None else loss * token_weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / token_count(target, ignore_index, num_tokens, token_weight, loss.dtype)


def token_count(target: Tensor, ignore_index: int, num_tokens, token_weight, dtype: torch.dtype) -> Tensor:
    """What "mean" divides by: num_tokens, else the sum of the counted tokens' weights; 1 in place of 0."""
    if num_tokens is None:
        counted = target != ignore_index
        num_tokens = counted.sum() if token_weight is None else (token_weight * counted).sum()
    elif not torch.is_tensor(num_tokens):
        num_tokens = torch.full((), num_tokens, dtype=dtype, device=target.device)  # filled there: nothing is copied
    num_tokens = num_tokens.to(target.device, dtype).reshape(())
    return num_tokens + (num_tokens == 0)  # nothing counted: the sum is 0, and so is the loss


# ---- the kernels: one program per row of V logits. Of a row, `width` >= V may be read and written: where it is a
# multiple of 16 and V is odd, masks by width leave 16-byte accesses, while masks by V would make them 2 bytes wide.

@jit
def soft_cap(z, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(z / softcap), by exp: libdevice's tanh is absent from the interpreter."""
    if SOFTCAP:
        z = softcap * (2.0 / (1.0 + tl.exp(-2.0 * z / softcap)) - 1.0)
    return z


@jit
def log_sum_exp(row_ptr, V, width, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """Online softmax: when the running maximum rises, the sums so far shrink. Lanes are summed once, at the end."""
    maximum = tl.full((), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
        z = tl.where(columns < V, soft_cap(z, softcap, SOFTCAP), float("-inf"))
        new = tl.maximum(maximum, tl.max(z, 0))
        base = tl.where(new == float("-inf"), 0.0, new)  # all masked so far: -inf - -inf would be NaN
        sums = sums * tl.exp(maximum - base) + tl.exp(z - base)
        maximum = new
    return maximum + tl.log(tl.sum(sums, 0))


@jit
def store_gradient(from_ptr, to_ptr, V, width, target, factor, lse, softcap, z_loss, SOFTCAP: tl.constexpr,
                   BLOCK: tl.constexpr):
    """factor * dloss/dlogits of one row. The pointers may be equal: each block is read before it is written."""
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(from_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
        z = soft_cap(z, softcap, SOFTCAP)
        gradient = tl.exp(z - lse) * (1.0 + 2.0 * z_loss * lse) - tl.where(columns == target, 1.0, 0.0)
        if SOFTCAP:
            gradient = gradient * (1.0 - (z / softcap) * (z / softcap))  # the derivative of tanh
        tl.store(to_ptr + columns, (gradient * factor).to(to_ptr.dtype.element_ty), mask=columns < width)


@jit
def store_zeros(row_ptr, width, BLOCK: tl.constexpr):
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(row_ptr + columns, tl.zeros((BLOCK,), row_ptr.dtype.element_ty), mask=columns < width)


@jit
def loss_kernel(logits_ptr, target_ptr, factor_ptr, loss_ptr, lse_ptr, row_stride, V, width, ignore_index, softcap,
                z_loss, WEIGHTED: tl.constexpr, SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr,
                BLOCK: tl.constexpr):
    """Loss and lse of a row; with GRADIENT its logits are overwritten by the loss's gradient to them."""
    row = tl.program_id(0).to(tl.int64)  # rows * V passes 2^31
    logits_ptr += row * row_stride
    target = tl.load(target_ptr + row)
    if target == ignore_index:  # nothing is read: such rows cost a third, and garbage in them does no harm
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if GRADIENT:
            store_zeros(logits_ptr, width, BLOCK)
        return
    valid = (target >= 0) & (target < V)
    factor = tl.where(valid, 1.0, float("nan"))  # out of range: a NaN that is seen, not a stray read
    if WEIGHTED:
        factor *= tl.load(factor_ptr + row)
    label_logit = tl.load(logits_ptr + target, mask=valid, other=0.0).to(tl.float32)  # before it is overwritten
    label_logit = soft_cap(label_logit, softcap, SOFTCAP)
    lse = log_sum_exp(logits_ptr, V, width, softcap, SOFTCAP, BLOCK)
    tl.store(loss_ptr + row, factor * (lse - label_logit + z_loss * lse * lse))
    tl.store(lse_ptr + row, lse)
    if GRADIENT:
        store_gradient(logits_ptr, logits_ptr, V, width, target, factor, lse, softcap, z_loss, SOFTCAP, BLOCK)


@jit
def gradient_kernel(logits_ptr, gradient_ptr, target_ptr, factor_ptr, lse_ptr, row_stride, V, width, ignore_index,
                    softcap, z_loss, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """The backward of cross_entropy: factor is the gradient of the row's loss; gradient (rows, V) is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    gradient_ptr += row * V
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        store_zeros(gradient_ptr, width, BLOCK)
        return
    factor, lse = tl.load(factor_ptr + row), tl.load(lse_ptr + row)
    store_gradient(logits_ptr + row * row_stride, gradient_ptr, V, width, target, factor, lse, softcap, z_loss,
                   SOFTCAP, BLOCK)


@jit
def scale_kernel(tensor_ptr, scale_ptr, size, BLOCK: tl.constexpr):
    """tensor *= scale, the product in fp32 (torch would round the scale to 16 bits); a scale of 1 moves no byte."""
    scale = tl.load(scale_ptr)
    if scale != 1.0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(tensor_ptr + index, mask=index < size, other=0.0).to(tl.float32)
        tl.store(tensor_ptr + index, (value * scale).to(tensor_ptr.dtype.element_ty), mask=index < size)


INTERPRETED = triton is not None and not isinstance(loss_kernel, triton.runtime.JITFunction)


def launch(kernel, tensors: tuple, width: int, *arguments, **constants) -> None:
    """One program per row of tensors[0] (rows, V), whose last dimension must be contiguous; width: see above."""
    logits = tensors[0]
    rows, V = logits.shape
    if rows == 0:
        return
    arch = torch.cuda.get_device_capability(logits.device)[0] if logits.is_cuda and not torch.version.hip else "other"
    block, warps = CONFIGS.get(arch, CONFIGS["other"])
    with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
        kernel[(rows,)](*tensors, logits.stride(0), V, width, *arguments, **constants,
                        BLOCK=min(block, triton.next_power_of_2(V)), num_warps=warps)


# ---- the plain loss as an operator: per-token losses out, reduced by PyTorch

@torch.library.custom_op("glassbox::cross_entropy", mutates_args=(),
                         schema="(Tensor logits, Tensor target, int ignore_index, float softcap, float z_loss)"
                                " -> (Tensor, Tensor)")
def cross_entropy_op(logits, target, ignore_index, softcap, z_loss):
    """logits (M, V), target (M,) -> loss and lse, both (M,) fp32; softcap 0: none."""
    loss = logits.new_empty(len(logits), dtype=torch.float32)
    lse = torch.empty_like(loss)
    launch(loss_kernel, (logits, target, loss, loss, lse), logits.shape[1], ignore_index, softcap, z_loss,
           WEIGHTED=False, SOFTCAP=softcap != 0, GRADIENT=False)
    return loss, lse


@cross_entropy_op.register_fake
def _(logits, target, ignore_index, softcap, z_loss):
    return (logits.new_empty(logits.shape[0], dtype=torch.float32),
            logits.new_empty(logits.shape[0], dtype=torch.float32))


@torch.library.custom_op("glassbox::cross_entropy_backward", mutates_args=(),
                         schema="(Tensor grad_loss, Tensor logits, Tensor target, Tensor lse, int ignore_index, "
                                "float softcap, float z_loss) -> Tensor")
def cross_entropy_backward_op(grad_loss, logits, target, lse, ignore_index, softcap, z_loss):
    """grad_loss (M,) fp32 -> the gradient of the logits (M, V), contiguous, in their dtype."""
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    launch(gradient_kernel, (logits, gradient, target, grad_loss.contiguous(), lse), logits.shape[1], ignore_index,
           softcap, z_loss, SOFTCAP=softcap != 0)
    return gradient


@cross_entropy_backward_op.register_fake
def _(grad_loss, logits, target, lse, ignore_index, softcap, z_loss):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def save_for_cross_entropy(ctx, inputs, output):
    logits, target, *ctx.options = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def backward_of_cross_entropy(ctx, grad_loss, _):
    logits, target, lse = ctx.saved_tensors
    gradient = None if grad_loss is None else cross_entropy_backward_op(grad_loss, logits, target, lse, *ctx.options)
    return gradient, None, None, None, None


cross_entropy_op.register_autograd(backward_of_cross_entropy, setup_context=save_for_cross_entropy)


# ---- head and loss as an operator: the summed loss and the gradients out

@torch.library.custom_op("glassbox::linear_cross_entropy", mutates_args=(),
                         schema="(Tensor hidden, Tensor weight, Tensor target, Tensor? factor, int ignore_index, "
                                "float softcap, float z_loss, ScalarType dtype, ScalarType? sum_dtype, int? chunk_size,"
                                " bool hidden_gradient, bool weight_gradient) -> (Tensor, Tensor, Tensor)")
def linear_cross_entropy_op(hidden, weight, target, factor, ignore_index, softcap, z_loss, dtype, sum_dtype, chunk_size,
                            hidden_gradient, weight_gradient):
    """hidden (M, H), weight (V, H), target (M,), factor (M,) fp32 or None -> sum of factor * loss, and its gradients.

    dtype: of the matmuls and logits. A gradient not asked for has size 0. The weight's comes in weight's dtype; in fp32
    for fp16, where a sum over tokens may overflow before it is divided by their number.
    """
    (M, H), V = hidden.shape, weight.shape[0]
    narrow_weight = weight.to(dtype)  # a copy under autocast; else the same tensor
    rows, sum_dtype = plan(M, H, V, weight.dtype, sum_dtype, chunk_size)
    loss = hidden.new_empty(M, dtype=torch.float32)
    lse = torch.empty_like(loss)
    buffer = hidden.new_empty(min(rows, M), triton.cdiv(V, 64) * 64, dtype=dtype)  # odd rows are slow in cuBLAS
    grad_hidden = hidden.new_empty((M, H) if hidden_gradient else 0)
    grad_dtype = weight_gradient_dtype(weight)
    sums = loss.new_empty((V, H) if weight_gradient else 0, dtype=grad_dtype if M <= rows else sum_dtype)
    if M == 0:
        sums.zero_()
    for start in range(0, M, max(rows, 1)):
        here = slice(start, start + rows)
        x = hidden[here].to(dtype)  # (C, H)
        logits = buffer[:len(x), :V]
        torch.mm(x, narrow_weight.t(), out=logits)  # (C, V)
        launch(loss_kernel, (logits, target[here], loss if factor is None else factor[here], loss[here], lse[here]),
               buffer.shape[1], ignore_index, softcap, z_loss, WEIGHTED=factor is not None, SOFTCAP=softcap != 0,
               GRADIENT=hidden_gradient or weight_gradient)  # logits now hold their gradient
        if hidden_gradient and hidden.dtype == dtype:
            torch.mm(logits, narrow_weight, out=grad_hidden[here])
        elif hidden_gradient:
            grad_hidden[here] = torch.mm(logits, narrow_weight)
        if weight_gradient:
            add_product(sums, logits.t(), x, first=start == 0)
    buffer = logits = None  # freed before the next line may need memory
    return loss.sum(), grad_hidden, sums.to(grad_dtype)


def plan(M: int, H: int, V: int, weight_dtype: torch.dtype, sum_dtype, chunk_size) -> tuple[int, torch.dtype]:
    """Tokens per chunk, and the dtype in which the chunks' weight gradients add up, where the caller leaves them open.

    Bytes per word of a bf16 weight: summed in bf16 its gradient takes 2 H beside the chunk's 2 * tokens; in float32 4 H
    beside the chunk or, at last, beside the bf16 copy of 2 H. But a bf16 sum is rounded with each chunk: so there must
    be few, ROUNDINGS at most. The way with less memory is taken: bf16 up to 8 (H + max(H, tokens)) tokens in all.
    (Slices of words, each summed over all tokens in one matmul, are rounded once; but they need the logits twice.)
    """
    tokens = chunk_size or max(CHUNK_TOKENS, CHUNK_LOGITS // V)
    if sum_dtype is None:
        enough, room = -(-M // ROUNDINGS), tokens if chunk_size else H + max(H, tokens)
        narrow = weight_dtype == torch.bfloat16 and enough <= room
        tokens, sum_dtype = (max(tokens, enough), torch.bfloat16) if narrow else (tokens, torch.float32)
    chunks = max(1, -(-M // tokens))
    return -(-M // (128 * chunks)) * 128, sum_dtype  # chunks of one size, about


def weight_gradient_dtype(weight: Tensor) -> torch.dtype:
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


def add_product(sums: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """sums (V, H) = (0 if first, else sums) + a (V, C) @ b (C, H), the product unrounded if possible."""
    beta = 0 if first else 1  # 0: cuBLAS does not read sums, which may hold anything
    if sums.dtype == a.dtype:
        torch.addmm(sums, a, b, beta=beta, out=sums)
    elif sums.dtype == torch.float32 and a.is_cuda and not torch.version.hip and torch.__version__ >= (2, 10):
        torch.addmm(sums, a, b, out_dtype=torch.float32, beta=beta, out=sums)
    else:  # here no matmul adds 16-bit products to fp32: each is rounded to 16 bits first, a slice of them at a time
        for total, slice_of_a in zip(sums.split(8192), a.split(8192)):
            product = torch.mm(slice_of_a, b)
            total.copy_(product) if first else total.add_(product)


@linear_cross_entropy_op.register_fake
def _(hidden, weight, target, factor, ignore_index, softcap, z_loss, dtype, sum_dtype, chunk_size, hidden_gradient,
      weight_gradient):
    return (hidden.new_empty((), dtype=torch.float32),
            hidden.new_empty(hidden.shape if hidden_gradient else 0),
            hidden.new_empty(weight.shape if weight_gradient else 0, dtype=weight_gradient_dtype(weight)))


@torch.library.custom_op("glassbox::scale_", mutates_args=("tensor",), schema="(Tensor(a!) tensor, Tensor scale) -> ()")
def scale_op(tensor, scale):
    """tensor (contiguous) *= scale (one fp32 number), on the device: nobody waits to see whether it is 1."""
    block = 4096 if tensor.is_cuda else min(triton.next_power_of_2(max(tensor.numel(), 1)), 2 ** 20)  # Triton's largest
    with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
        if tensor.numel():
            scale_kernel[(triton.cdiv(tensor.numel(), block),)](tensor, scale, tensor.numel(), BLOCK=block)


scale_op.register_fake(lambda tensor, scale: None)


def save_for_linear_cross_entropy(ctx, inputs, output):
    ctx.flags, ctx.dtypes = inputs[-2:], (inputs[0].dtype, inputs[1].dtype)
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros as large as the weight would be made for them


def backward_of_linear_cross_entropy(ctx, grad_loss, *_):
    """The gradients wait; scale them in place: a copy would be what the peak of memory is made of.

    PyTorch then refuses a second backward through the same graph. A tracer's stand-ins (torch.compile) are not written
    to: Inductor sees by itself that it may reuse the memory.
    """
    gradients = [None] * 12
    for i, (wanted, gradient) in enumerate(zip(ctx.flags, ctx.saved_tensors)):
        if wanted and grad_loss is not None:
            if type(gradient) is Tensor:
                scale_op(gradient, grad_loss)
            else:
                gradient = (gradient.float() * grad_loss).to(gradient.dtype)
            gradients[i] = gradient.to(ctx.dtypes[i])
    return tuple(gradients)


linear_cross_entropy_op.register_autograd(backward_of_linear_cross_entropy, setup_context=save_for_linear_cross_entropy)


@register_flop_formula(torch.ops.glassbox.linear_cross_entropy)
def linear_cross_entropy_flops(hidden, weight, *args, out_shape=None, **kwargs) -> int:
    """2 M H V for the logits, and as much for each gradient (all of them run inside the forward operator)."""
    return 2 * hidden[0] * hidden[1] * weight[0] * (1 + args[-2] + args[-1])


# ---- what users call

def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100, *,
                         reduction: str = "mean", num_tokens: int | float | Tensor | None = None,
                         token_weight: Tensor | None = None, softcap: float | None = None, z_loss: float = 0.0,
                         sum_dtype: torch.dtype | None = None, chunk_size: int | None = None) -> Tensor:
    """cross_entropy(hidden @ weight.T, target) without the logits in memory. A scalar in float32 (or float64).

    hidden (..., H) and weight (V, H), Hugging Face's lm_head layout, of one float dtype, or any under autocast, which
    decides the matmuls' dtype as for F.linear; the gradient of a float32 weight stays float32 throughout.
    target (...): int64 classes, or ignore_index. Out of range: ValueError on a CPU; on a GPU the loss is NaN.
    reduction: "mean" or "sum" ("none" would need the logits twice; token_weight does what it is used for).
    num_tokens: what "mean" divides the sum by, e.g. the count over all micro batches and ranks: a number, or a tensor
        of one element. Default: the counted tokens' weights, summed, i.e. their count. If it is 0, so is the loss.
    token_weight (...): factors of the tokens' losses; a constant. softcap: see above; None or 0 for none.
    z_loss: the factor of lse^2. chunk_size: tokens per chunk, up to a multiple of 128.
    sum_dtype: in what the weight gradient's chunks add up. Default: float32, but a bf16 weight's own dtype while that
        takes less memory and rounds at most 8 times (`plan`). A float16 sum might overflow before it is divided.
    Deterministic. No gradient is computed for what does not require one, nor under no_grad. One backward per forward,
    and no second derivatives (the gradients are made in the forward pass and scaled in place).
    """
    check(hidden, target, hidden.shape[:-1], reduction, ("mean", "sum"), num_tokens, token_weight, softcap)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or len(weight) == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be (V, {hidden.shape[-1]}): hidden's last "
                         f"dimension, and V at least 1")
    if weight.device != hidden.device:
        raise ValueError(f"weight is on {weight.device}, hidden on {hidden.device}; they must be on one device")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    if sum_dtype not in (None, torch.float32) and not sum_dtype == weight.dtype == torch.bfloat16:
        raise ValueError(f"sum_dtype is {sum_dtype}; it must be torch.float32, or torch.bfloat16 for a weight that is "
                         f"bfloat16 (this one is {weight.dtype})")
    dtype, V = matmul_dtype(hidden, weight), len(weight)
    check_range(target, ignore_index, V)
    if not runs_kernel(hidden.device, dtype, "linear_cross_entropy"):
        return linear_cross_entropy_reference(hidden, weight, target, ignore_index, reduction=reduction, z_loss=z_loss,
                                              num_tokens=num_tokens, token_weight=token_weight, softcap=softcap)

    flat = target.reshape(-1).contiguous()
    factor = None if token_weight is None else token_weight.reshape(-1).float().contiguous()
    power = None
    if reduction == "mean":
        # The scale 1/count enters before the gradients are rounded to 16 bits, so that they are rounded once. But only
        # its mantissa: small gradients would underflow in fp16, for the loss scale comes with backward, too late for
        # them. Its power of two waits until then, when it is multiplied by the loss scale, and rounds nothing.
        scale = 1.0 / token_count(flat, ignore_index, num_tokens, factor, torch.float32)
        mantissa = torch.frexp(scale).mantissa
        power = scale / mantissa
        factor = mantissa.expand(len(flat)).contiguous() if factor is None else factor * mantissa
    recording = torch.is_grad_enabled()
    loss, _, _ = linear_cross_entropy_op(
        hidden.reshape(-1, hidden.shape[-1]), weight, flat, factor, ignore_index, softcap or 0.0, z_loss, dtype,
        sum_dtype, chunk_size, recording and hidden.requires_grad, recording and weight.requires_grad)
    return loss if power is None else loss * power


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int = -100, *, reduction: str = "mean",
                  num_tokens: int | float | Tensor | None = None, token_weight: Tensor | None = None,
                  softcap: float | None = None, z_loss: float = 0.0) -> Tensor:
    """F.cross_entropy for (..., V) logits of any float dtype: one pass forward, one back, in float32 inside.

    Arguments as in linear_cross_entropy; reduction also "none": losses in target's shape. Returns float32 (or float64).
    The gradient has an array of its own (others may still read the logits). Rows must be contiguous in memory, or all
    logits are copied: shift the targets, not the logits.
    """
    check(logits, target, logits.shape[:-1], reduction, ("mean", "sum", "none"), num_tokens, token_weight, softcap)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; the last dimension must be at least 1")
    options = dict(reduction=reduction, num_tokens=num_tokens, token_weight=token_weight)
    check_range(target, ignore_index, logits.shape[-1])
    if not runs_kernel(logits.device, logits.dtype, "cross_entropy"):
        return cross_entropy_reference(logits, target, ignore_index, softcap=softcap, z_loss=z_loss, **options)
    flat = logits.reshape(-1, logits.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    loss, _ = cross_entropy_op(flat, target.reshape(-1).contiguous(), ignore_index, softcap or 0.0, z_loss)
    return reduced(loss.view(target.shape), target, ignore_index, **options)


def check(states: Tensor, target: Tensor, shape, reduction, reductions, num_tokens, token_weight, softcap) -> None:
    """What both functions demand of their arguments."""
    if states.dim() < 1 or not states.is_floating_point():
        raise ValueError(f"the first argument is {states.dtype} of shape {tuple(states.shape)}; it must be floating "
                         f"point, with at least one dimension")
    if target.dtype != torch.int64 or target.shape != shape:
        raise ValueError(f"target is {target.dtype} of shape {tuple(target.shape)}; it must be torch.int64 of shape "
                         f"{tuple(shape)}")
    if reduction not in reductions:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(reductions)}")
    if num_tokens is not None and reduction != "mean":
        raise ValueError(f"num_tokens is what 'mean' divides by; reduction is {reduction!r}")
    if torch.is_tensor(num_tokens) and num_tokens.numel() != 1:
        raise ValueError(f"num_tokens has shape {tuple(num_tokens.shape)}; it must be one number")
    if token_weight is not None and (token_weight.shape != shape or token_weight.requires_grad):
        raise ValueError(f"token_weight has shape {tuple(token_weight.shape)}, requires_grad "
                         f"{token_weight.requires_grad}; it must have target's shape {tuple(shape)}, and be a constant")
    if softcap is not None and softcap < 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None for none")
    for name, tensor in (("target", target), ("token_weight", token_weight)):
        if tensor is not None and tensor.device != states.device:
            raise ValueError(f"{name} is on {tensor.device}, the first argument on {states.device}: not on one device")


def check_range(target: Tensor, ignore_index: int, V: int) -> None:
    """On a CPU, where looking costs nothing: every target is a class or ignore_index."""
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= V))]
    if len(wrong):
        raise ValueError(f"target holds {int(wrong[0])}; it must be 0 to {V - 1}, or ignore_index {ignore_index}")


def matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which F.linear would multiply them here."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"weight is {weight.dtype}, hidden {hidden.dtype}; without autocast they must be of one dtype")
    return hidden.dtype


def runs_kernel(device: torch.device, dtype: torch.dtype, name: str) -> bool:
    """Whether the kernel can serve: on a GPU, or interpreted on a CPU (which is wrong in bf16). Never in float64."""
    if dtype == torch.float64:
        return False
    if triton and (device.type == "cuda" or INTERPRETED and device.type == "cpu" and dtype != torch.bfloat16):
        return True
    if not torch.compiler.is_compiling():  # a warning would break the graph
        warnings.warn(f"{name} has no kernel for {dtype} on {device.type}; the reference serves", stacklevel=3)
    return False


# ---- python kernels/cross_entropy.py

def example(M: int, H: int, V: int, dtype: torch.dtype, device) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden and weight, which require gradients, and target; the logits have a spread of 2."""
    torch.manual_seed(0)
    hidden = torch.randn(M, H, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(V, H, device=device, dtype=dtype) * (2 / H ** 0.5)).requires_grad_()
    return hidden, weight, torch.randint(V, (M,), device=device)


def check_example(device, dtype: torch.dtype) -> bool:
    """Print the errors against float64 beside what is allowed: fixed in fp32, in 16 bits by flash-attention's rule."""
    hidden, weight, target = example(300, 64, 500, dtype, device)
    target[::8] = -100

    def results(function, *leaves):
        loss = function(*leaves)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def torch_way(hidden, weight):
        logits = F.linear(hidden, weight)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target, reduction="sum")

    truths = results(torch_way, hidden.double(), weight.double())
    ours = results(lambda h, w: linear_cross_entropy(h, w, target, reduction="sum", chunk_size=128), hidden, weight)
    theirs = results(torch_way, hidden, weight)
    good = True
    for name, our, their, truth in zip(("loss", "hidden.grad", "weight.grad"), ours, theirs, truths):
        error, their_error = (our - truth).abs().max().item(), (their - truth).abs().max().item()
        rounding = ((truth.to(dtype) + 0.3 - 0.3) - truth).abs().max().item()
        fixed = (1e-5 if name == "loss" else 1e-4) * max(1.0, truth.abs().max().item())
        allowed = fixed if dtype == torch.float32 else 2 * their_error + 2 * rounding
        good &= error <= allowed
        print(f"{str(dtype)[6:]:9} {name:12} error {error:.1e}, PyTorch's {their_error:.1e}, allowed {allowed:.1e}")
    return good


def tune(device) -> None:
    """Print CONFIGS for this GPU: the fastest way through rows of 128256 logits."""
    arch, times = torch.cuda.get_device_capability(device)[0], {}
    logits = torch.randn(CHUNK_TOKENS, 128256, device=device, dtype=torch.bfloat16)
    target = torch.zeros(len(logits), dtype=torch.int64, device=device)
    loss, lse = torch.empty(2, len(logits), device=device)
    for config in [(block, warps) for block in (4096, 8192, 16384, 32768) for warps in (8, 16, 32)]:
        CONFIGS[arch] = config
        times[config] = triton.testing.do_bench(
            lambda: launch(loss_kernel, (logits, target, loss, loss, lse), 128256, -100, 0.0, 0.0,
                           WEIGHTED=False, SOFTCAP=False, GRADIENT=True), return_mode="median")
        print(f"{config}: {times[config] * 1e3:.0f} us, {3 * logits.nbytes / times[config] / 1e9:.2f} TB/s")
    CONFIGS[arch] = min(times, key=times.get)
    print(f"CONFIGS = {CONFIGS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="on a GPU: time the kernel's configurations")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.tune and device.type == "cpu":
        parser.error("--tune needs a GPU")
    if args.tune:
        return tune(device)
    dtypes = (torch.float32, torch.float16) + (torch.bfloat16,) * (device.type == "cuda")
    if not all([check_example(device, dtype) for dtype in dtypes]):
        raise SystemExit("an error is larger than allowed")
    if device.type == "cpu":
        print("no GPU: nothing is timed; the kernels " + ("ran in Triton's interpreter" if INTERPRETED else
              "did not run, the reference did (TRITON_INTERPRET=1 runs them interpreted)"))
        return
    hidden, weight, target = example(8192, 4096, 128256, torch.bfloat16, device)
    compiled = torch.compile(lambda h, w: F.cross_entropy(F.linear(h, w).float(), target))
    for name, function in (("linear_cross_entropy", lambda h, w: linear_cross_entropy(h, w, target)),
                           ("torch.compile, all logits", compiled)):
        step = lambda: torch.autograd.grad(function(hidden, weight), (hidden, weight))  # noqa: E731
        milliseconds = triton.testing.do_bench(step, return_mode="median")
        print(f"{name:26} {milliseconds:.2f} ms for 8192 tokens x 4096 x 128256, forward and backward, bf16")


if __name__ == "__main__":
    main()
