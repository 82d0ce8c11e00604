"""kernels/rms_norm.py: the kernel against float64, its reference against PyTorch; dirty memory, strides, dtypes."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kernel_checks
from kernel_checks import DEVICE, HALF, assert_close, dirty_memory, random  # noqa: F401  the fixture is used
from kernels import rms_norm as module
from kernels.rms_norm import rms_norm, rms_norm_op, rms_norm_reference

needs_kernel = kernel_checks.needs_kernel(module)


def outputs_and_gradients(function, x, weight, residual=None, dtype=None, **options):
    """[y, (s,) dx, dweight, (dresidual)] of the inputs in `dtype`, with fixed upstream gradients."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight, residual) if t is not None]
    out = function(*leaves[:2], residual=leaves[2] if residual is not None else None, **options)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [random(*x.shape, seed=9 + i).to(o.dtype) for i, o in enumerate(out)]
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


# ---- the reference
def test_reference_equals_torch_in_float64():
    x, weight = random(3, 5, 48, dtype=torch.float64), random(48, dtype=torch.float64, seed=1)
    assert torch.allclose(rms_norm_reference(x, weight, 1e-5), F.rms_norm(x, (48,), weight, 1e-5), rtol=0, atol=1e-13)


@pytest.mark.parametrize("function", [rms_norm, rms_norm_reference])
def test_by_hand(function):
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], device=DEVICE)  # mean of squares 12.5, and with eps 0.5 it is 13
    y, s = function(x - 1, torch.tensor([1.0, 2.0], device=DEVICE), 0.5, torch.ones_like(x))
    assert torch.equal(s, x)
    assert y.tolist()[0] == pytest.approx([3 / 13**0.5, 8 / 13**0.5], rel=1e-6) and y.tolist()[1] == [0, 0]


@pytest.mark.parametrize("function", [rms_norm, rms_norm_reference])
def test_rounds_before_the_weight_as_hugging_face_does(function):
    x, weight = random(7, 64, dtype=HALF), random(64, dtype=HALF, seed=1)
    n = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    y = function(x, weight)
    assert (y != n.to(HALF) * weight).float().mean() < 0.01  # a rounding tie may fall otherwise
    assert (y != (n * weight.float()).to(HALF)).float().mean() > 0.1  # what one rounding would give


# ---- the kernel against float64
SHAPES = [(1, 1), (3, 7), (1, 96), (2, 3, 4, 64), (130, 33), (300, 16), (5, 2050), (2, 16384), (9,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_float32_equals_float64(shape, with_residual):
    x, weight = random(*shape), random(shape[-1], seed=1)
    residual = random(*shape, seed=2) if with_residual else None
    ours = outputs_and_gradients(rms_norm, x, weight, residual)
    truth = outputs_and_gradients(rms_norm_reference, x, weight, residual, dtype=torch.float64)
    forward = 2 if with_residual else 1
    assert_close(ours, truth, [1e-5] * forward + [1e-4] * 3)


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 4, 64), (130, 33)], ids=str)
def test_half_errs_at_most_twice_as_much_as_torch(shape):
    inputs = random(*shape, dtype=HALF), random(shape[-1], dtype=HALF, seed=1), random(*shape, dtype=HALF, seed=2)
    ours = outputs_and_gradients(rms_norm, *inputs)
    plain = outputs_and_gradients(rms_norm_reference, *inputs)
    truth = outputs_and_gradients(rms_norm_reference, *inputs, dtype=torch.float32)
    for a, b, t in zip(ours, plain, truth):
        slack = 2 * (t + 0.3 - 0.3 - t).abs().max() + torch.finfo(HALF).eps * t.abs().max()
        assert a.dtype == HALF and (a - t).abs().max() <= 2 * (b - t).abs().max() + slack


def test_norm_is_that_of_the_rounded_sum():
    x, residual, weight = (random(*shape, dtype=HALF, seed=i) for i, shape in enumerate(((20, 64), (20, 64), (64,))))
    y, s = rms_norm(x, weight, residual=residual)
    assert torch.equal(s, x + residual) and torch.equal(y, rms_norm(x + residual, weight))


def test_weight_gradient_adds_up_more_partial_sums_than_a_tile_holds(monkeypatch):
    monkeypatch.setattr(module, "config", lambda device, block: (4, 4, 70, 1))  # 70 programs on the interpreter
    inputs = random(71, 2049), random(2049, seed=1)
    ours = outputs_and_gradients(rms_norm, *inputs)
    assert_close(ours, outputs_and_gradients(rms_norm_reference, *inputs, dtype=torch.float64), [1e-5, 1e-4, 1e-4])


def test_large_and_tiny_rows_do_not_overflow():
    x = torch.tensor([[6e4], [1e-7], [0]], device=DEVICE, dtype=HALF).repeat(1, 64)  # 6e4^2 is infinite in 16 bits
    y, dx, dweight = outputs_and_gradients(rms_norm, x, torch.ones(64, device=DEVICE, dtype=HALF))
    assert torch.allclose(y[0], torch.ones_like(y[0])) and all(t.isfinite().all() for t in (y, dx, dweight))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 3, 4, 8)], ids=str)
def test_empty_batches_have_empty_outputs_and_zero_gradients(shape):
    y, s, dx, dweight, dresidual = outputs_and_gradients(rms_norm, random(*shape), random(8), random(*shape))
    assert y.shape == s.shape == dx.shape == dresidual.shape == shape
    assert dweight.tolist() == [0] * 8


@pytest.mark.parametrize("view", [
    lambda t: t[..., 3:35], lambda t: t.transpose(0, 1)[..., :32], lambda t: t[:, ::2, ::2],
    lambda t: t[:1, :, :32].expand(4, -1, -1)], ids=["columns", "transposed", "steps", "expanded"])
def test_any_strides(view):
    x, residual, weight = view(random(6, 5, 64)), view(random(6, 5, 64, seed=2)), random(64, seed=1)[::2]
    truth = outputs_and_gradients(rms_norm_reference, x, weight, residual, dtype=torch.float64)
    assert_close(outputs_and_gradients(rms_norm, x, weight, residual), truth, [1e-5] * 2 + [1e-4] * 3)


def test_strided_upstream_gradients():
    x, weight = random(6, 32).requires_grad_(), random(32, seed=1).requires_grad_()
    one = torch.ones(1, device=DEVICE)
    for upstream in (one.expand(6, 32), random(32, 6).t(), random(6, 64)[:, ::2], random(6, 64)[:, :32]):
        ours = torch.autograd.grad(rms_norm(x, weight), (x, weight), upstream)
        truth = torch.autograd.grad(rms_norm_reference(x.double(), weight.double()), (x, weight), upstream.double())
        assert_close(ours, truth, [1e-4] * 2)


def test_outputs_nobody_uses():
    x, residual, weight = (random(*s, seed=i).requires_grad_() for i, s in enumerate(((6, 32), (6, 32), (32,))))
    for use in (lambda y, s: y.sum(), lambda y, s: s.square().sum()):
        ours, truth = (torch.autograd.grad(use(*function(x, weight, residual=residual)), (x, residual, weight),
                                           allow_unused=True, materialize_grads=True)
                       for function in (rms_norm, rms_norm_reference))
        assert_close(ours, truth, [1e-4] * 3)


@pytest.mark.parametrize("x_dtype, residual_dtype, weight_dtype, out_dtype", [
    (HALF, torch.float32, torch.float32, None), (HALF, torch.float32, torch.float32, HALF),
    (HALF, None, torch.float32, None), (torch.float32, None, HALF, None),
    (torch.float32, HALF, torch.float32, HALF)], ids=str)
def test_mixed_dtypes_as_torch_mixes_them(x_dtype, residual_dtype, weight_dtype, out_dtype):
    x, weight = random(40, 64, dtype=x_dtype), random(64, dtype=weight_dtype, seed=1)
    residual = None if residual_dtype is None else random(40, 64, dtype=residual_dtype, seed=2)
    ours, plain = (outputs_and_gradients(function, x, weight, residual, out_dtype=out_dtype)
                   for function in (rms_norm, rms_norm_reference))
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype and (a - b).abs().max() <= 2e-3 * b.abs().max()


def test_float64_goes_to_the_reference_silently():
    x, weight = random(4, 8, dtype=torch.float64), random(8, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(rms_norm(x, weight), rms_norm_reference(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_says_that_the_reference_serves(monkeypatch, dtype):
    monkeypatch.setattr(module, "INTERPRETED", module.INTERPRETED and dtype == torch.bfloat16)
    x, weight = torch.randn(4, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    with pytest.warns(UserWarning, match="rms_norm: no Triton kernel for cpu"):
        assert torch.equal(rms_norm(x, weight), rms_norm_reference(x, weight))


# ---- as an operator
@needs_kernel
@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck(with_residual):
    x, weight = random(3, 16).requires_grad_(), random(16, seed=1).requires_grad_()
    residual = random(3, 16, seed=2).requires_grad_() if with_residual else None
    torch.library.opcheck(rms_norm_op, (x, weight, 1e-6, residual, None))


@needs_kernel
def test_opcheck_of_the_backward_pass():
    dy, s, weight, rstd = random(3, 16), random(3, 16, seed=1), random(16, seed=2), random(3, seed=3)
    torch.library.opcheck(module.rms_norm_backward_op, (dy, None, s, weight, rstd))


def test_compiles_into_one_graph():
    inputs = random(6, 32), random(32, seed=1), random(6, 32, seed=2)

    def block(x, weight, residual):
        y, s = rms_norm(x * 2, weight, residual=residual)
        return rms_norm(y, weight), s
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_close(outputs_and_gradients(compiled, *inputs), outputs_and_gradients(block, *inputs), [0] * 5)


def test_activation_checkpointing_changes_nothing():
    def kept(x, weight, residual):
        return checkpoint(lambda *a: rms_norm(*a[:2], residual=a[2]), x, weight, residual, use_reentrant=False)
    inputs = random(6, 32), random(32, seed=1), random(6, 32, seed=2)
    assert_close(outputs_and_gradients(kept, *inputs), outputs_and_gradients(rms_norm, *inputs), [0] * 5)


def test_autocast_leaves_it_alone():
    inputs = random(6, 32), random(32, seed=1), random(6, 32, seed=2)
    plain = outputs_and_gradients(rms_norm, *inputs)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert_close(outputs_and_gradients(rms_norm, *inputs), plain, [0] * 5)


@pytest.mark.parametrize("arguments, message", [
    ((torch.ones(2, 4, dtype=torch.int64), torch.ones(4)), "x is torch.int64; it must be float16"),
    ((torch.ones(2, 4), torch.ones(4, dtype=torch.complex64)), "weight is torch.complex64"),
    ((torch.ones(2, 4), torch.ones(3)), r"weight has shape \(3,\); x \(2, 4\) needs \(4,\)"),
    ((torch.ones(2, 4), torch.ones(1, 4)), r"weight has shape \(1, 4\)"),
    ((torch.ones(2, 4), torch.ones(4), 1e-6, torch.ones(4)), r"residual has shape \(4,\); it must be that of x"),
    ((torch.ones(2, 4), torch.ones(4, device="meta")), "weight is on meta, x on cpu"),
    ((torch.ones(()), torch.ones(())), r"x has shape \(\); its last dimension must be 1 to 32768"),
    ((torch.ones(2, 0), torch.ones(0)), "last dimension must be 1"),
    ((torch.ones(1, 32769), torch.ones(32769)), "1 to 32768")])
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(*arguments)


# ---- on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [
    (4096, 4096), (3, 517, 5120), (257, 16384), (33, 32768), (2, 1000, 8, 128), (70000, 64)], ids=str)
def test_gpu_sizes(gpu, dtype, shape):
    error, allowed = module.compare(gpu, dtype, shape)
    assert error <= allowed


@pytest.mark.gpu
def test_gpu_backward_is_deterministic(gpu):
    shapes = (8192, 2048), (2048,), (8192, 2048)
    inputs = [random(*shape, dtype=torch.bfloat16, seed=i) for i, shape in enumerate(shapes)]
    first = outputs_and_gradients(rms_norm, *inputs)
    for _ in range(20):
        assert all(map(torch.equal, outputs_and_gradients(rms_norm, *inputs), first))


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements(gpu, monkeypatch):
    monkeypatch.undo()  # filling gigabytes with NaN buys nothing here
    rows = 2**31 // 4096 + 5
    if torch.cuda.mem_get_info()[0] < 8 * rows * 4096 + 2**30:
        pytest.skip("needs 18 GB of GPU memory")
    x, dy = (torch.randn(rows, 4096, device=gpu, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    weight = torch.randn(4096, device=gpu, dtype=torch.bfloat16)
    y = rms_norm(x, weight)
    dx, = torch.autograd.grad(y, x, dy.detach())
    tail = x.detach()[-9:].requires_grad_()
    expected = rms_norm_reference(tail, weight)
    assert torch.allclose(y[-9:], expected, rtol=0.02, atol=0.02)
    assert torch.allclose(dx[-9:], torch.autograd.grad(expected, tail, dy[-9:].detach())[0], rtol=0.03, atol=0.03)


@pytest.mark.gpu
def test_gpu_keeps_four_bytes_per_row(gpu):
    x, weight = (torch.randn(*shape, device=gpu, dtype=torch.bfloat16, requires_grad=True)
                 for shape in ((16384, 1024), (1024,)))
    before = torch.cuda.memory_allocated()
    y = rms_norm(x, weight)
    assert torch.cuda.memory_allocated() - before == y.numel() * 2 + 16384 * 4


@pytest.mark.gpu
def test_gpu_compiles_with_inductor(gpu):
    inputs = [random(*shape, dtype=torch.bfloat16, seed=i) for i, shape in enumerate(((64, 512), (512,), (64, 512)))]
    compiled = torch.compile(lambda x, w, residual: rms_norm(x, w, residual=residual), fullgraph=True)
    assert all(map(torch.equal, outputs_and_gradients(compiled, *inputs), outputs_and_gradients(rms_norm, *inputs)))
