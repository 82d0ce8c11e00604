"""kernels/int4.py: the layout, the kernels against the float64 reference, split sums, and the operator's promises."""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernel_checks import DEVICE, dirty_memory, half_rule, random  # noqa: F401  the fixture is used
from kernels import int4
from kernels.int4 import (Int4, int4_dequantize, int4_dequantize_reference, int4_linear, int4_linear_reference,
                          int4_pack, int4_quantize, int4_unpack)


# -------------------------------------------------------------------------------------------------------------- format


def test_layout_worked_by_hand():
    codes = torch.zeros(1, 64, dtype=torch.uint8)
    codes[0, 0], codes[0, 5], codes[0, 31], codes[0, 34] = 3, 9, 15, 1
    words = int4_pack(codes)[0].tolist()
    assert words[0] == 3 and words[1] == 9 << 4  # weight 5 = 4 * 1 + 1: nibble 1 of word 1
    assert words[3] == (15 << 28) - 2**32  # weight 31 = 4 * 7 + 3: the highest nibble of word 3, an int32's sign
    assert words[4:] == [0, 0, 1, 0]  # weight 34 = 32 + 2: word 2 of the next unit


def test_pack_and_unpack_undo_each_other():
    codes = torch.randint(16, (5, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(int4_unpack(int4_pack(codes)), codes.int())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_quantize_rounds_to_the_nearest_of_its_levels(symmetric, group_size):
    w = random(7, 256, dtype=torch.float64)
    q = int4_quantize(w, group_size, symmetric)
    levels = (torch.arange(16, device=DEVICE) - q.zero[..., None]) * q.scale[..., None]  # (7, groups, 16)
    groups = w.unflatten(1, (-1, group_size))
    nearest = (groups[..., None] - levels[:, :, None]).abs().amin(-1)
    error = (groups - int4_dequantize(q).unflatten(1, (-1, group_size))).abs()
    assert (error - nearest).abs().max() < 1e-12
    if symmetric:
        assert (q.zero == 8).all() and (error <= q.scale[..., None] / 2 * (1 + 1e-9)).all()


def test_zeros_and_one_sided_groups():
    w = torch.zeros(2, 64, device=DEVICE)
    w[1, 32:] = torch.linspace(3, 5, 32, device=DEVICE)  # 0 is kept a level: the range becomes 0..5
    q = int4_quantize(w, 32)
    decoded = int4_dequantize(q)
    assert torch.equal(decoded[0], w[0]) and torch.equal(decoded[1, :32], w[1, :32])
    assert q.zero[1, 1] == 0 and (decoded[1, 32:] - w[1, 32:]).abs().max() <= 5 / 15 / 2 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("N, K, group_size", [(3, 32, 32), (65, 96, 32), (9, 384, 128), (5, 192, 96)])
def test_dequantize_equals_the_reference_to_the_bit(N, K, group_size, dtype):
    q = int4_quantize(random(N, K, dtype=dtype), group_size)
    ours, truth = int4_dequantize(q), int4_dequantize_reference(q, dtype)
    assert ours.dtype == dtype and torch.equal(ours, truth)


# -------------------------------------------------------------------------------------------------------------- linear

SHAPES = [  # rows of x, N, K, group_size: short of a tile, over it, many groups
    (1, 3, 32, 32), (1, 9, 4224, 128), (2, 70, 192, 64), (17, 33, 320, 32), (64, 5, 128, 128), (65, 9, 128, 64),
    (1, 5, 192, 96)]


@pytest.mark.parametrize("rows, N, K, group_size", SHAPES)
def test_linear_equals_the_reference(rows, N, K, group_size):
    q = int4_quantize(random(N, K), group_size, symmetric=rows == 17)
    x = random(rows, K, seed=1)
    truth = int4_linear_reference(x.double(), q)
    assert (int4_linear(x, q) - truth).abs().max() <= 1e-5 * truth.abs().max()
    half = int4_quantize(random(N, K, dtype=torch.float16), group_size)
    ours, same = int4_linear(x.half(), half), int4_linear_reference(x.half(), half)
    half_rule(ours, same, int4_linear_reference(x.half().double(), half))
    assert torch.equal(int4_linear(x.double(), q), truth)  # float64 stays float64


@pytest.mark.parametrize("rows", [1, 3])
def test_split_sums(rows, monkeypatch):
    """A K of many tiles, split over programs: still the same number, and the same to the bit at every run."""
    tiles = dict(BLOCK_N=16 if rows > 1 else 4, UNITS=8, num_warps=4)
    q, x = int4_quantize(random(9, 1184), 32), random(rows, 1184, seed=1)  # 37 units: a short last tile
    truth = int4_linear_reference(x.double(), q)
    for programs in (1, 6, 512):
        monkeypatch.setattr(int4, "PROGRAMS", programs)
        ours = int4._launch(x, q, tiles)
        assert (ours - truth).abs().max() <= 1e-5 * truth.abs().max()
        assert torch.equal(int4._launch(x, q, tiles), ours)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-3, 6e4, 1e15])
def test_subnormal_arithmetic_holds_for_large_and_small_x(size):
    """The matvec reads nibbles as subnormal floats: exact from 2^-41 to 2^64, and harmless below."""
    q, x = int4_quantize(random(4, 128), 32), random(1, 128, seed=1) * size
    truth = int4_linear_reference(x.double(), q)
    assert (int4_linear(x, q) - truth).abs().max() <= 1e-5 * truth.abs().max() + 1e-17


def test_zero_points_that_are_no_codes():
    """A zero point is any number: formats with a float zero (HQQ), or one of 16 (GPTQ), fit."""
    q = int4_quantize(random(4, 64), 32)
    q = q._replace(zero=q.zero * 1.37 + 2.5)
    for rows in (1, 2):
        x = random(rows, 64, seed=1)
        truth = int4_linear_reference(x.double(), q).float()
        torch.testing.assert_close(int4_linear(x, q), truth, rtol=1e-5, atol=1e-5)


def test_shapes_of_x_and_empty_batches():
    q = int4_quantize(random(6, 64), 32)
    x, bias = random(2, 3, 64, seed=1), random(6, seed=2)
    assert int4_linear(x, q, bias).shape == (2, 3, 6)
    torch.testing.assert_close(int4_linear(x, q, bias)[1, 2], int4_linear(x[1, 2], q) + bias)
    strided = torch.stack([x, x], -1)[..., 0]
    torch.testing.assert_close(int4_linear(strided, q), int4_linear(x, q))
    empty = x[:0].requires_grad_()
    int4_linear(empty, q).sum().backward()
    assert empty.grad.shape == (0, 3, 64)
    assert int4_linear(x, Int4(q.packed[:0], q.scale[:0], q.zero[:0])).shape == (2, 3, 0)


@pytest.mark.parametrize("rows", [1, 5, 65])
def test_gradient_goes_to_x_and_keeps_no_activations(rows):
    q = int4_quantize(random(24, 128), 64)
    x, dy = random(rows, 128, seed=1).requires_grad_(), random(rows, 24, seed=2)
    hidden = x * 1
    alive = weakref.ref(hidden)
    y = int4_linear(hidden, q)
    del hidden
    assert alive() is None  # the layer keeps nothing of the batch for its backward pass
    y.backward(dy)
    truth = dy.double() @ int4_dequantize_reference(q, torch.float64)
    assert (x.grad - truth).abs().max() <= 1e-4 * truth.abs().max()
    again = x.detach().clone().requires_grad_()
    checkpoint(int4_linear, again, q, use_reentrant=False).backward(dy)
    assert torch.equal(again.grad, x.grad)


def test_gradient_in_float64():
    q, x = int4_quantize(random(4, 32), 32), random(2, 32, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: int4_linear(x, q), x)
    assert torch.autograd.gradgradcheck(lambda x: int4_linear(x, q).sin(), x)


def test_operators_pass_opcheck():
    q, x = int4_quantize(random(6, 64), 32), random(2, 64, seed=1).requires_grad_()
    torch.library.opcheck(torch.ops.glassbox.int4_matmul, (x, *q, True))
    torch.library.opcheck(torch.ops.glassbox.int4_dequantize, (*q, torch.float32))


def test_compiles_as_one_graph():
    q, x = int4_quantize(random(6, 64), 32), random(2, 64, seed=1).requires_grad_()
    compiled = torch.compile(lambda x: int4_linear(x, q).square(), fullgraph=True, backend="aot_eager")
    plain = int4_linear(x, q).square()
    torch.testing.assert_close(compiled(x), plain)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(plain.sum(), x)[0])


def test_autocast_and_flops():
    q, x = int4_quantize(random(6, 64), 32), random(3, 64, seed=1).requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = int4_linear(x, q)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    with FlopCounterMode(display=False) as flops:
        int4_linear(x, q).sum().backward()
    assert flops.get_total_flops() == 2 * (2 * 3 * 6 * 64)


def test_bad_input_is_named():
    q, x = int4_quantize(random(6, 64), 32), random(2, 64)
    for message, call in {
            "w must be": lambda: int4_quantize(random(64)),
            "group_size must be a multiple of 32": lambda: int4_quantize(random(4, 96), 64),
            "group_size must be": lambda: int4_quantize(random(4, 96), 48),
            r"codes must be \(N, K\)": lambda: int4_pack(torch.zeros(2, 40)),
            r"x must be \(..., 64\)": lambda: int4_linear(random(2, 63), q),
            "x must be float16": lambda: int4_linear(x.int(), q),
            "x must be on the device": lambda: int4_linear(x.to("meta"), q),
            "bias must be": lambda: int4_linear(x, q, random(5)),
            "packed must be int32": lambda: int4_linear(x, q._replace(packed=q.packed.float())),
            "scale must be": lambda: int4_linear(x, q._replace(scale=random(6, 3), zero=random(6, 3))),
            "zero must be like scale": lambda: int4_linear(x, q._replace(zero=q.zero.half())),
            "dtype must be": lambda: int4_dequantize(q, torch.int8)}.items():
        with pytest.raises(ValueError, match=message):
            call()


# -------------------------------------------------------------------------------------------------------- compilation

COMPILE = """
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import adam8bit, int4, int8_fp8, nf4

KINDS = {"packed_ptr": "*i32", "words_ptr": "*i32", "sums_ptr": "*i32", "codes_ptr": "*i8", "m_codes_ptr": "*u8",
         "v_codes_ptr": "*u8", "x_ptr": "*bf16", "scale_ptr": "*bf16", "zero_ptr": "*bf16", "out_ptr": "*bf16",
         "w_ptr": "*bf16", "param_ptr": "*bf16", "grad_ptr": "*bf16", "absmax_ptr": "*u8"}


def ptx(kernel, warps=4, kinds={}, **constants):
    names = kernel.arg_names
    numbers = {n: "fp32" if "beta" in n or n in ("decay", "step_size", "v_correction", "eps") else "i32" for n in names}
    kinds = {**{n: "*fp32" for n in names if n.endswith("_ptr")}, **KINDS, **kinds}
    signature = {n: "constexpr" if n in constants else kinds.get(n, numbers[n]) for n in names}
    aligned = [n for n in names if signature[n] == "i32" and n != "M" or signature[n].startswith("*")]
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()},
                       {(names.index(n),): [["tt.divisibility", 16]] for n in aligned})
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    assert not re.search(r"\\b(atom|red)\\.|\\.local\\b", text), kernel.__name__
    return text


def tiles(module, name):
    config = dict(module.CONFIGS[None][name])
    return config.pop("num_warps"), config


warps, config = tiles(int4, "matvec")
matvec = ptx(int4._matvec_kernel, warps, UNITS_PER_GROUP=4, SPLIT=1, **config)
assert len(re.findall(r"ld.global[.\\w]*v4.b32", matvec)) == config["BLOCK_N"], "a unit of 32 weights is one load"
assert not re.search(r"cvt.rn.f32.[us]|ftz", matvec), "no integer is converted, no subnormal number flushed to 0"
warps, config = tiles(int4, "matmul")
parts = {"out_ptr": "*fp32"}
assert "mma.sync" in ptx(int4._matmul_kernel, warps, parts, UNITS_PER_GROUP=4, SPLIT=2, BLOCK_M=16, **config)
assert "wgmma" in ptx(int4._matmul_kernel, warps, UNITS_PER_GROUP=4, SPLIT=1, BLOCK_M=64, **config)
ptx(int4._add_splits_kernel, SPLIT=4, BLOCK=1024)
assert "st.global.v2.b32" in ptx(int4._dequantize_kernel, UNITS_PER_GROUP=4, UNITS=128)

warps, config = tiles(nf4, "matvec")
assert "ld.global.v4.b32" in ptx(nf4._linear_kernel, warps, PER_BLOCK=8, BLOCK_M=1, **config)
warps, config = tiles(nf4, "matmul")
assert "mma.sync" in ptx(nf4._linear_kernel, warps, PER_BLOCK=8, BLOCK_M=16, **config)
assert "wgmma" in ptx(nf4._linear_kernel, warps, PER_BLOCK=8, BLOCK_M=64, **config)
assert "st.global.v4.b32" in ptx(nf4._dequantize_kernel, PER_BLOCK=8, WORDS=1024)
plain = dict(nested_absmax_ptr=None, nested_offset_ptr=None, nested_map_ptr=None)
ptx(nf4._dequantize_kernel, PER_BLOCK=8, WORDS=1024, kinds={"absmax_ptr": "*fp32"}, **plain)
ptx(nf4._quantize_kernel, SIZE=64, BLOCKS=32, kinds={"packed_ptr": "*u8", "absmax_ptr": "*fp32"})

scale = {"scale_ptr": "*fp32"}
ptx(int8_fp8._quantize_rows_kernel, LARGEST=127.0, ROUND=True, BLOCK=4096, kinds=scale)
codes = {"codes_ptr": "*fp8e4nv"}
fp8 = ptx(int8_fp8._quantize_rows_kernel, LARGEST=448.0, ROUND=False, BLOCK=4096, kinds=scale | codes)
assert "cvt.rn.satfinite.e4m3x2" in fp8
ptx(int8_fp8._rescale_kernel, BLOCK=1024)
assert "ld.global.v4.b32" in ptx(adam8bit._update_kernel, BLOCK=256, BLOCKS=8)
"""


@pytest.mark.skipif(int4.triton is None, reason="needs Triton")
def test_four_and_eight_bit_kernels_compile_for_hopper(tmp_path):
    """To PTX, which needs no GPU: what the interpreter lets pass (types, shapes of tiles) and what makes them fast."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=Path(int4.__file__).parents[1], capture_output=True,
                          text=True, env=environment)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 16, 63, 64, 65, 300])
@pytest.mark.parametrize("N, K", [(4096, 4096), (1000, 14336), (777, 32 * 33)])
def test_bfloat16_on_a_gpu(gpu, rows, N, K):
    q = int4_quantize(random(N, K, dtype=torch.bfloat16), 128 if K % 128 == 0 else 32)
    x = random(rows, K, dtype=torch.bfloat16, seed=1).requires_grad_()
    truth = int4_linear_reference(x.detach().double(), q)
    y = int4_linear(x, q)
    half_rule(y, int4_linear_reference(x, q), truth)
    dy = random(rows, N, dtype=torch.bfloat16, seed=2)
    y.backward(dy)
    plain = dy @ int4_dequantize_reference(q, torch.bfloat16)
    half_rule(x.grad, plain, dy.double() @ int4_dequantize_reference(q, torch.float64))
    for _ in range(20):
        assert torch.equal(int4_linear(x, q), y)


@pytest.mark.gpu
def test_more_than_2_to_31_elements(gpu):
    N, K = 2**19 + 8, 4096
    q = Int4(torch.randint(-(2**31), 2**31, (N, K // 8), device=gpu, dtype=torch.int32),
             torch.rand(N, K // 128, device=gpu, dtype=torch.bfloat16),
             torch.full((N, K // 128), 8, device=gpu, dtype=torch.bfloat16))
    last = Int4(*(t[-8:] for t in q))
    assert torch.equal(int4_dequantize(q)[-8:], int4_dequantize_reference(last, torch.bfloat16))
    for rows in (1, 4):
        x = torch.randn(rows, K, device=gpu, dtype=torch.bfloat16)
        half_rule(int4_linear(x, q)[:, -8:], int4_linear_reference(x, last), int4_linear_reference(x.double(), last))
