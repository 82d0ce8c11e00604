"""kernels/int8_fp8.py: rounding of rows, the products against the float64 reference, and the operator's promises."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels.int8_fp8 import (MAX_K, dequantize_rows, linear_8bit, linear_reference, quantize_rows,
                              quantize_rows_reference)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # without a GPU the int8 kernels are interpreted
BOTH = pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
BFLOAT16 = 2**-8  # fp8 products with a scale per row come out of a GPU rounded to bfloat16


@pytest.fixture(autouse=True)
def dirty_memory():
    """Fill what torch.empty gives with NaN: a kernel that leaves a place unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def test_rows_worked_by_hand():
    x = torch.tensor([[127.0, -63.5, 0.5, 1.5], [0, 0, 0, 0], [-254, 1, 3, 5]], device=DEVICE)
    codes, scale = quantize_rows(x)
    assert codes.tolist() == [[127, -64, 0, 2], [0, 0, 0, 0], [-127, 0, 2, 2]]  # ties go to even
    assert scale.tolist() == [1, 1, 2]
    codes, scale = quantize_rows(torch.tensor([[448.0, 17, 19, -0.3]], device=DEVICE), torch.float8_e4m3fn)
    assert codes.float().tolist() == [[448, 16, 20, -0.3125]] and scale.tolist() == [1]  # 4 significant bits


@BOTH
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 130), (2, 5000), (0, 8), (4, 0)])
def test_quantize_equals_the_reference_to_the_bit(shape, dtype):
    x = random(*shape, dtype=torch.float16) * 100
    codes, scale = quantize_rows(x, dtype)
    assert codes.shape == shape and scale.shape == shape[:-1]
    rows = x.reshape(scale.numel(), shape[-1])
    truth, truth_scale = quantize_rows_reference(rows, dtype)
    assert torch.equal(codes.view(rows.shape).float(), truth.float()) and torch.equal(scale.flatten(), truth_scale)
    step = 1 / 254 if dtype == torch.int8 else 1 / 28  # half a step of the largest code: 1/127 / 2, 32/448 / 2
    error = dequantize_rows(codes.view(rows.shape), scale.flatten()) - rows.float()
    assert not rows.numel() or (error.abs().amax(1) <= rows.float().abs().amax(1) * step * 1.001).all()


def test_strides_and_nan():
    x = random(64, 5)
    assert torch.equal(quantize_rows(x.t())[0], quantize_rows(x.t().contiguous())[0])
    x[3, 2] = float("nan")
    scale = quantize_rows(x)[1]
    assert not scale[3].isfinite() and scale[:3].isfinite().all()


@BOTH
@pytest.mark.parametrize("rows, N, K", [(1, 16, 32), (5, 7, 33), (40, 24, 1040), (17, 1030, 16)])
def test_linear_equals_the_reference(rows, N, K, dtype):
    codes, scale = quantize_rows(random(N, K), dtype)
    x = random(rows, K, seed=1)
    truth = linear_reference(x.double(), codes, scale)
    allowed = BFLOAT16 if DEVICE.type == "cuda" and dtype != torch.int8 else 1e-5
    assert (linear_8bit(x, codes, scale) - truth).abs().max() <= allowed * truth.abs().max()
    half = linear_8bit(x.half(), codes, scale)
    truth = linear_reference(x.half().double(), codes, scale)
    assert half.dtype == torch.float16 and (half - truth).abs().max() <= max(allowed, 1e-3) * truth.abs().max()
    assert linear_8bit(x.double(), codes, scale).dtype == torch.float64
    plain = x.double() @ random(N, K).double().t()
    error = ((truth - plain).norm() / plain.norm()).item()
    assert error < (0.015 if dtype == torch.int8 else 0.05)  # of rounding both factors, normal numbers


def test_int8_sums_are_exact():
    K = 4096
    x = torch.full((20, K), 127.0, device=DEVICE)  # scale 1, codes 127: the largest sums there are
    codes = torch.full((8, K), 127, dtype=torch.int8, device=DEVICE)
    codes[1, 0] = 126
    y = linear_8bit(x, codes, torch.ones(8, device=DEVICE))
    assert y[0].tolist()[:2] == torch.tensor([127 * 127 * K, 127 * 127 * K - 127]).float().tolist()  # rounded but once


@BOTH
def test_gradient_passes_straight_through(dtype):
    codes, scale = quantize_rows(random(24, 64), dtype)
    x, dy, bias = random(5, 64, seed=1).requires_grad_(), random(5, 24, seed=2), random(24, seed=3).requires_grad_()
    linear_8bit(x, codes, scale, bias).backward(dy)
    truth = dy.double() @ dequantize_rows(codes, scale, torch.float64)
    assert (x.grad - truth).abs().max() <= 1e-4 * truth.abs().max()
    torch.testing.assert_close(bias.grad, dy.sum(0))
    again = x.detach().clone().requires_grad_()
    checkpoint(linear_8bit, again, codes, scale, use_reentrant=False).backward(dy)
    assert torch.equal(again.grad, x.grad)
    empty = x[:0].detach().requires_grad_()
    linear_8bit(empty, codes, scale).sum().backward()
    assert empty.grad.shape == (0, 64)


def test_operators_pass_opcheck():
    codes, scale = quantize_rows(random(16, 32))
    x = random(3, 32, seed=1)
    torch.library.opcheck(torch.ops.glassbox.linear_8bit, (x.requires_grad_(), codes, scale))
    torch.library.opcheck(torch.ops.glassbox.quantize_rows, (x.detach(), torch.int8))


@BOTH
def test_compiles_as_one_graph(dtype):
    codes, scale = quantize_rows(random(16, 32), dtype)
    x = random(3, 32, seed=1).requires_grad_()
    compiled = torch.compile(lambda x: linear_8bit(x, codes, scale).square(), fullgraph=True, backend="aot_eager")
    plain = linear_8bit(x, codes, scale).square()
    torch.testing.assert_close(compiled(x), plain)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(plain.sum(), x)[0])


def test_autocast_and_flops():
    codes, scale = quantize_rows(random(16, 32))
    x = random(3, 32, seed=1).requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = linear_8bit(x, codes, scale)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    with FlopCounterMode(display=False) as flops:
        linear_8bit(x, codes, scale)
    assert flops.get_total_flops() == 2 * 3 * 16 * 32


def test_bad_input_is_named():
    codes, scale = quantize_rows(random(16, 32))
    x = random(3, 32)
    for message, call in {
            "dtype must be": lambda: quantize_rows(x, torch.uint8),
            "x must be floating-point": lambda: quantize_rows(codes),
            "codes must be int8": lambda: linear_8bit(x, codes.float(), scale),
            "at most 133144": lambda: linear_8bit(x, codes[:, :1].expand(16, MAX_K + 1), scale),
            "scale must be": lambda: linear_8bit(x, codes, scale[:-1]),
            r"x must be \(..., 32\)": lambda: linear_8bit(x[:, :-1], codes, scale),
            "x must be float16": lambda: linear_8bit(x.int(), codes, scale),
            "on one device": lambda: linear_8bit(x.to("meta"), codes, scale),
            "bias must be": lambda: linear_8bit(x, codes, scale, scale[:-1])}.items():
        with pytest.raises(ValueError, match=message):
            call()


# ----------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("rows", [1, 16, 17, 1000])
@pytest.mark.parametrize("N, K", [(4096, 4096), (1000, 14336), (777, 1001)])
def test_bfloat16_on_a_gpu(gpu, rows, N, K, dtype):
    codes, scale = quantize_rows(random(N, K, dtype=torch.bfloat16), dtype)
    x = random(rows, K, dtype=torch.bfloat16, seed=1)
    truth = linear_reference(x.double(), codes, scale)
    y = linear_8bit(x, codes, scale)
    assert (y - truth).abs().max() <= BFLOAT16 * truth.abs().max()
    for _ in range(20):
        assert torch.equal(linear_8bit(x, codes, scale), y)


@pytest.mark.gpu
def test_more_than_2_to_31_elements(gpu):
    x = torch.randn(2**19 + 8, 4096, device=gpu, dtype=torch.bfloat16)
    codes, scale = quantize_rows(x)
    truth, truth_scale = quantize_rows_reference(x[-8:], torch.int8)
    assert torch.equal(codes[-8:], truth) and torch.equal(scale[-8:], truth_scale)
