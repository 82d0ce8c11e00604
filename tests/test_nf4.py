"""kernels/nf4.py: the format to the bit, the kernels against the float64 reference, and what the operator promises."""

import statistics
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernel_checks import DEVICE, dirty_memory, half_rule, random as weight  # noqa: F401  the fixture is used
from kernels import nf4
from kernels.nf4 import (NF4_LEVELS, dynamic_map, nf4_dequantize, nf4_dequantize_reference, nf4_linear,
                         nf4_linear_reference, nf4_quantize, nf4_quantize_reference, operands)


# -------------------------------------------------------------------------------------------------------------- format


def test_levels_are_quantiles_of_the_normal_distribution():
    quantile = statistics.NormalDist().inv_cdf

    def tail(points):
        return [quantile(p) for p in torch.linspace(0.9677083, 0.5, points)[:-1].tolist()]

    levels = torch.tensor(sorted(tail(9) + [0.0] + [-q for q in tail(8)]), dtype=torch.float32)
    assert torch.equal(levels / levels.max(), torch.tensor(NF4_LEVELS))


def test_codes_worked_by_hand():
    levels = torch.tensor(NF4_LEVELS)
    w = torch.zeros(64)
    w[:4] = torch.tensor([1.0, -1.0, 0.0, 0.25])  # 0.25 is nearest to 0.2461 (code 10)
    middle = (levels[8] + levels[9]) / 2
    w[4], w[5] = middle, torch.nextafter(middle, torch.tensor(1.0))  # midway goes down, just above goes up
    q = nf4_quantize(w.to(DEVICE), double_quant=False)
    assert q.packed[:4].tolist() == [0xF0, 0x7A, 0x89, 0x77]  # the first code is in the high nibble; 7 stands for 0
    assert q.absmax.tolist() == [1.0]
    decoded = nf4_dequantize(q).cpu()
    assert decoded[:6].tolist() == [1.0, -1.0, 0.0, levels[10].item(), levels[8].item(), levels[9].item()]


def test_a_block_of_zeros_stays_zero_also_when_scales_are_quantized():
    w = weight(3, 64)
    w[1] = 0
    for double_quant in (False, True):
        decoded = nf4_dequantize(nf4_quantize(w, double_quant=double_quant))
        assert torch.equal(decoded[1], torch.zeros_like(w[1])) and decoded[0].abs().min() >= 0


def test_nan_in_a_block_is_not_hidden():
    w = weight(2, 64)
    w[1, 5] = float("nan")
    decoded = nf4_dequantize(nf4_quantize(w, double_quant=False))
    assert decoded[0].isfinite().all() and not decoded[1].isfinite().all()


def test_error_and_size_of_a_normal_weight():
    w = torch.randn(2048, 512, generator=torch.Generator().manual_seed(0))
    packed, absmax = nf4_quantize_reference(w, torch.tensor(NF4_LEVELS), 64)
    error = (nf4_dequantize_reference(nf4.NF4(packed, absmax, torch.tensor(NF4_LEVELS), w.shape, w.dtype)) - w).abs()
    assert abs(error.mean().item() - 0.0728) < 2e-4
    q = nf4_quantize(weight(256, 512))
    tensors = (q.packed, q.absmax, q.nested_absmax)
    bits = sum(t.numel() * t.element_size() * 8 for t in tensors) / (256 * 512)
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))


def test_dynamic_map_holds_an_exact_zero_and_a_one():
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    assert signed.unique().numel() == unsigned.unique().numel() == 256
    assert signed[127] == 0 == unsigned[0] and signed[255] == 1 == unsigned[255]
    assert torch.equal(signed[:127], -signed[128:255].flip(0))  # and no -1
    assert unsigned[-2].item() == pytest.approx(1 - 0.45 / 128) and signed[128].item() == pytest.approx(0.55e-6)


@pytest.mark.parametrize("shape, block_size, dtype", [
    ((3, 64), 64, torch.float32), ((5, 7, 33), 64, torch.float16), ((1,), 64, torch.float32),
    ((4, 100), 32, torch.float32), ((2, 5000), 4096, torch.float32), ((0, 64), 64, torch.float32)])
def test_kernels_equal_the_reference_to_the_bit(shape, block_size, dtype):
    w = weight(*shape, dtype=dtype)
    q = nf4_quantize(w, block_size, double_quant=False)
    packed, absmax = nf4_quantize_reference(w, q.levels, block_size)
    assert torch.equal(q.packed, packed) and torch.equal(q.absmax, absmax)
    q = nf4_quantize(w, block_size)
    decoded, truth = nf4_dequantize(q), nf4_dequantize_reference(q)
    assert decoded.shape == w.shape and decoded.dtype == dtype
    rtol = 0 if DEVICE.type == "cpu" else 1e-3  # a GPU fuses a * b + c
    torch.testing.assert_close(decoded, truth, rtol=rtol, atol=0)


def test_quantize_takes_any_strides_and_codes_any_alignment():
    w = weight(48, 64)
    assert torch.equal(nf4_quantize(w.t()).packed, nf4_quantize(w.t().contiguous()).packed)
    q = nf4_quantize(w)
    shifted = torch.cat([q.packed.new_zeros(1), q.packed])[1:]  # cannot be read as int32
    assert torch.equal(nf4_dequantize(q._replace(packed=shifted)), nf4_dequantize(q))
    x = weight(1, 64)
    torch.testing.assert_close(nf4_linear(x, q._replace(packed=shifted)), nf4_linear(x, q))


# -------------------------------------------------------------------------------------------------------------- linear

SHAPES = [  # rows of x, N, K, block_size: short of a tile, over it, K no multiple of a tile, a block longer than a row
    (1, 5, 64, 64), (1, 19, 4160, 64), (2, 70, 192, 64), (17, 33, 320, 32), (65, 9, 128, 64), (1, 6, 256, 128),
    (3, 6, 40, 64), (1, 6, 7, 64), (2, 3, 512, 512)]


@pytest.mark.parametrize("rows, N, K, block_size", SHAPES)
def test_linear_equals_the_reference(rows, N, K, block_size):
    q = nf4_quantize(weight(N, K), block_size, double_quant=rows != 2)
    x = weight(rows, K, seed=1)
    truth = nf4_linear_reference(x.double(), q)
    assert (nf4_linear(x, q) - truth).abs().max() <= 1e-5 * truth.abs().max()
    half, same = nf4_linear(x.half(), q), nf4_linear_reference(x.half(), q)
    half_rule(half, same, nf4_linear_reference(x.half().double(), q))
    assert torch.equal(nf4_linear(x.double(), q), truth)  # float64 stays float64


def test_shapes_of_x_and_empty_batches():
    q = nf4_quantize(weight(6, 64))
    x = weight(2, 3, 64, seed=1)
    bias = weight(6, seed=2)
    assert nf4_linear(x, q, bias).shape == (2, 3, 6)
    torch.testing.assert_close(nf4_linear(x, q, bias)[1, 2], nf4_linear(x[1, 2], q) + bias)
    strided = torch.stack([x, x], -1)[..., 0]
    torch.testing.assert_close(nf4_linear(strided, q), nf4_linear(x, q))
    empty = x[:0].requires_grad_()
    nf4_linear(empty, q).sum().backward()
    assert empty.grad.shape == (0, 3, 64)


@pytest.mark.parametrize("rows", [1, 5, 65])
def test_gradient_goes_to_x_and_keeps_no_activations(rows):
    q = nf4_quantize(weight(24, 128))
    x, dy = weight(rows, 128, seed=1).requires_grad_(), weight(rows, 24, seed=2)
    hidden = x * 1
    alive = weakref.ref(hidden)
    y = nf4_linear(hidden, q)
    del hidden
    assert alive() is None  # the layer keeps nothing of the batch for its backward pass
    y.backward(dy)
    truth = dy.double() @ nf4_dequantize_reference(q, torch.float64)
    assert (x.grad - truth).abs().max() <= 1e-4 * truth.abs().max()
    again = x.detach().clone().requires_grad_()
    checkpoint(nf4_linear, again, q, use_reentrant=False).backward(dy)
    assert torch.equal(again.grad, x.grad)


def test_gradient_of_the_gradient():
    q = nf4_quantize(weight(4, 64))
    x = weight(2, 64, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: nf4_linear(x, q), x)
    assert torch.autograd.gradgradcheck(lambda x: nf4_linear(x, q).sin(), x)


def test_operators_pass_opcheck():
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    q = nf4_quantize(weight(6, 64))
    x = weight(2, 64, seed=1).requires_grad_()
    torch.library.opcheck(torch.ops.glassbox.nf4_matmul, (x, *operands(q), q.shape, 64, True), test_utils=tests)
    decode = (*operands(q), q.shape, 64, torch.float32)
    torch.library.opcheck(torch.ops.glassbox.nf4_dequantize, decode, test_utils=tests)
    torch.library.opcheck(torch.ops.glassbox.nf4_quantize, (weight(6, 64), q.levels, 64), test_utils=tests)


def test_compiles_as_one_graph():
    q = nf4_quantize(weight(6, 64))
    x = weight(2, 64, seed=1).requires_grad_()
    compiled = torch.compile(lambda x: nf4_linear(x, q).square(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), nf4_linear(x, q).square())
    ours, = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(ours, torch.autograd.grad(nf4_linear(x, q).square().sum(), x)[0])


def test_autocast_and_flops():
    q = nf4_quantize(weight(6, 64))
    x = weight(3, 64, seed=1).requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = nf4_linear(x, q)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    with FlopCounterMode(display=False) as flops:
        nf4_linear(x, q).sum().backward()
    assert flops.get_total_flops() == 2 * (2 * 3 * 6 * 64)


def test_bad_input_is_named():
    q, x = nf4_quantize(weight(6, 64)), weight(2, 64)
    for message, call in {
            "w must be": lambda: nf4_quantize(torch.zeros(64, dtype=torch.int32)),
            "block_size must be": lambda: nf4_quantize(weight(64), block_size=48),
            r"x must be \(..., 64\)": lambda: nf4_linear(weight(2, 63), q),
            "x must be float16": lambda: nf4_linear(x.int(), q),
            "x must be on the device": lambda: nf4_linear(x.to("meta"), q),
            "bias must be": lambda: nf4_linear(x, q, weight(5)),
            "packed must be 192": lambda: nf4_linear(x, q._replace(packed=q.packed[:-1])),
            "absmax must be 6": lambda: nf4_dequantize(q._replace(absmax=q.absmax.float())),
            "nested_offset must be": lambda: nf4_dequantize(q._replace(nested_offset=None)),
            "q.shape must be": lambda: nf4_linear(x, nf4_quantize(weight(64))),
            "dtype must be": lambda: nf4_dequantize(q, torch.int8)}.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_the_reference_announces_itself(monkeypatch):
    monkeypatch.setattr(nf4, "triton", None)
    levels = torch.tensor(NF4_LEVELS)
    q = nf4.NF4(*nf4_quantize_reference(torch.ones(64), levels, 64), levels, (1, 64), torch.float32)
    with pytest.warns(UserWarning, match="plain PyTorch serves on cpu"):
        assert nf4_linear(torch.ones(64), q).item() == 64


# ---------------------------------------------------------------------------------------------------- bitsandbytes


@pytest.mark.parametrize("shape", [(64, 256), (33, 100), (300, 512)])
def test_equals_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    w = weight(*shape)
    theirs, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = nf4_quantize(w)
    assert torch.equal(ours.packed, theirs.flatten()) and torch.equal(ours.levels, state.code)
    assert torch.equal(ours.nested_absmax, state.state2.absmax) and torch.equal(ours.nested_map, state.state2.code)
    assert torch.equal(ours.nested_offset, state.offset)
    # Their CPU path takes a neighbour where a scale lies just beside a midpoint (7 of 2400 here); ours is the nearest.
    assert (ours.absmax.int() - state.absmax.int()).abs().max() <= 1
    assert (ours.absmax != state.absmax).float().mean() < 0.01
    ours = ours._replace(absmax=state.absmax)
    torch.testing.assert_close(nf4_dequantize(ours), functional.dequantize_4bit(theirs, state), rtol=1e-6, atol=0)


# ----------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 16, 63, 64, 65, 300])
@pytest.mark.parametrize("N, K", [(4096, 4096), (1000, 14336), (777, 64 * 33)])
def test_bfloat16_on_a_gpu(gpu, rows, N, K):
    q = nf4_quantize(weight(N, K, dtype=torch.bfloat16))
    x = weight(rows, K, dtype=torch.bfloat16, seed=1).requires_grad_()
    truth = nf4_linear_reference(x.detach().double(), q)
    y = nf4_linear(x, q)
    half_rule(y, nf4_linear_reference(x, q), truth)
    dy = weight(rows, N, dtype=torch.bfloat16, seed=2)
    y.backward(dy)
    plain = dy @ nf4_dequantize_reference(q, torch.bfloat16)
    half_rule(x.grad, plain, dy.double() @ nf4_dequantize_reference(q, torch.float64))
    for _ in range(20):
        assert torch.equal(nf4_linear(x, q), y)


@pytest.mark.gpu
def test_more_than_2_to_31_elements(gpu):
    n = 2**31 + 4096
    packed = torch.randint(256, (n // 2,), dtype=torch.uint8, device=gpu)
    absmax = torch.rand(n // 64, device=gpu)
    q = nf4.NF4(packed, absmax, torch.tensor(NF4_LEVELS, device=gpu), (n,), torch.bfloat16)
    last = q._replace(packed=packed[-2048:], absmax=absmax[-64:], shape=(4096,))
    assert torch.equal(nf4_dequantize(q)[-4096:], nf4_dequantize_reference(last))
    w = torch.zeros(n, dtype=torch.bfloat16, device=gpu)
    w[-64:] = torch.linspace(-1, 1, 64, device=gpu)
    again = nf4_quantize(w, double_quant=False)
    assert torch.equal(again.packed[-32:], nf4_quantize_reference(w[-64:], q.levels, 64)[0])
    assert (again.packed[:-32] == 0x77).all()
    rows = n // 4096
    q = q._replace(shape=(rows, 4096))
    x = torch.randn(1, 4096, device=gpu, dtype=torch.bfloat16)
    truth = nf4_linear_reference(x.double(), last._replace(shape=(1, 4096)))
    assert (nf4_linear(x, q)[0, -1] - truth).abs().max() <= 0.02 * truth.abs().max() + 0.05


@pytest.mark.gpu
def test_memory_of_a_training_step(gpu):
    q = nf4_quantize(weight(4096, 4096, dtype=torch.bfloat16))
    x = torch.randn(4096, 4096, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()
    y = nf4_linear(x, q)
    assert torch.cuda.memory_allocated() - before <= y.numel() * 2 + 2**20  # the decoded weight is gone, x not kept
