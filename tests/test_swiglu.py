"""kernels/swiglu.py: the kernel against float64, its reference by hand; dirty memory, strides, bad input."""

import math
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernel_checks
from kernel_checks import DEVICE, HALF, assert_close, dirty_memory, random  # noqa: F401  the fixture is used
from kernels import swiglu as module
from kernels.swiglu import swiglu, swiglu_op, swiglu_reference

needs_kernel = kernel_checks.needs_kernel(module)


def output_and_gradients(function, gate, up, dy=None, dtype=None):
    """[y, dgate, dup] of the inputs in `dtype`, with a fixed upstream gradient."""
    gate, up = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (gate, up))
    y = function(gate, up)
    return [y, *torch.autograd.grad(y, (gate, up), (random(*y.shape, seed=9) if dy is None else dy).to(y.dtype))]


@pytest.mark.parametrize("function", [swiglu, swiglu_reference])
def test_by_hand(function):
    gate, up = torch.tensor([0.0, math.log(3), -math.log(3)]), torch.tensor([5.0, 2.0, 2.0])  # sigmoid: 1/2, 3/4, 1/4
    y, dgate, dup = output_and_gradients(function, gate.to(DEVICE), up.to(DEVICE), torch.ones(3, device=DEVICE))
    log3 = math.log(3)
    assert y.tolist() == pytest.approx([0, 1.5 * log3, -0.5 * log3], abs=1e-6)
    assert dup.tolist() == pytest.approx([0, 0.75 * log3, -0.25 * log3], abs=1e-6)
    assert dgate.tolist() == pytest.approx([2.5, 1.5 * (1 + log3 / 4), 0.5 * (1 - 0.75 * log3)], abs=1e-6)


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 40), (2048,), (5, 2050), ()], ids=str)
def test_float32_equals_float64(shape):
    gate, up = random(*shape), random(*shape, seed=1)
    ours = output_and_gradients(swiglu, gate, up)
    assert_close(ours, output_and_gradients(swiglu_reference, gate, up, dtype=torch.float64), [1e-5, 1e-4, 1e-4])


def test_half_errs_at_most_twice_as_much_as_torch():
    inputs = random(5, 1000, dtype=HALF), random(5, 1000, dtype=HALF, seed=1)
    ours, plain = (output_and_gradients(f, *inputs) for f in (swiglu, swiglu_reference))
    for a, b, t in zip(ours, plain, output_and_gradients(swiglu_reference, *inputs, dtype=torch.float32)):
        slack = 2 * (t + 0.3 - 0.3 - t).abs().max()
        assert a.dtype == HALF and (a - t).abs().max() <= 2 * (b - t).abs().max() + slack


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, in the interpreter
def test_large_gates_saturate():
    gate = torch.tensor([-1e4, -200.0, -90.0, 90.0, 200.0, 1e4], device=DEVICE)
    y, dgate, dup = output_and_gradients(swiglu, gate, torch.ones(6, device=DEVICE), torch.ones(6, device=DEVICE))
    step = torch.tensor([0.0, 0, 0, 1, 1, 1], device=DEVICE)
    assert torch.allclose(y, gate * step) and torch.allclose(dup, gate * step) and torch.allclose(dgate, step)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (2, 0)], ids=str)
def test_empty_inputs_have_empty_outputs_and_gradients(shape):
    assert all(t.shape == shape for t in output_and_gradients(swiglu, random(*shape), random(*shape)))


@pytest.mark.parametrize("view", [
    lambda t: t.chunk(2, dim=-1), lambda t: (t[..., ::2], t[..., 1::2]),
    lambda t: (t[:, :, :40], t[:, :, :40].contiguous()), lambda t: t.transpose(0, 1).chunk(2, dim=-1),
    lambda t: (t[:1, :, :7].expand(3, -1, -1), t[:, :, 1:8])],
    ids=["fused projection", "steps", "one contiguous", "transposed", "expanded"])
def test_any_strides(view):
    gate, up = view(random(3, 5, 80))
    truth = output_and_gradients(swiglu_reference, gate, up, dtype=torch.float64)
    assert_close(output_and_gradients(swiglu, gate, up), truth, [1e-5, 1e-4, 1e-4])
    fused = random(3, 5, 80).requires_grad_()
    swiglu(*view(fused)).sum().backward()
    plain = fused.detach().double().requires_grad_()
    swiglu_reference(*view(plain)).sum().backward()
    assert_close([fused.grad], [plain.grad], [1e-4])


def test_strided_upstream_gradients():
    gate, up = random(6, 32), random(6, 32, seed=1)
    one = torch.ones(1, device=DEVICE)
    for dy in (one.expand(6, 32), random(32, 6).t(), random(6, 64)[:, ::2], random(6, 64)[:, :32]):
        assert_close(output_and_gradients(swiglu, gate, up, dy),
                     output_and_gradients(swiglu_reference, gate, up, dy, dtype=torch.float64), [1e-5, 1e-4, 1e-4])


def test_float64_goes_to_the_reference_silently():
    gate, up = random(4, 8, dtype=torch.float64), random(4, 8, dtype=torch.float64, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(swiglu(gate, up), swiglu_reference(gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_says_that_the_reference_serves(monkeypatch, dtype):
    monkeypatch.setattr(module, "INTERPRETED", module.INTERPRETED and dtype == torch.bfloat16)
    gate, up = torch.randn(2, 4, 8, dtype=dtype)
    with pytest.warns(UserWarning, match="swiglu: no Triton kernel for cpu"):
        assert torch.equal(swiglu(gate, up), swiglu_reference(gate, up))


# ---- as an operator
@needs_kernel
def test_opcheck():
    gate, up = random(3, 16), random(3, 16, seed=1)
    torch.library.opcheck(swiglu_op, (gate.clone().requires_grad_(), up.clone().requires_grad_()))
    torch.library.opcheck(module.swiglu_backward_op, (random(3, 16, seed=2), gate, up))


def test_compiles_into_one_graph():
    def block(gate, up):
        return swiglu(gate * 2, swiglu(gate, up))
    inputs = random(6, 32), random(6, 32, seed=1)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_close(output_and_gradients(compiled, *inputs), output_and_gradients(block, *inputs), [0] * 3)


def test_activation_checkpointing_and_autocast_change_nothing():
    inputs = random(6, 32), random(6, 32, seed=1)
    plain = output_and_gradients(swiglu, *inputs)
    assert_close(output_and_gradients(lambda *a: checkpoint(swiglu, *a, use_reentrant=False), *inputs), plain, [0] * 3)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert_close(output_and_gradients(swiglu, *inputs), plain, [0] * 3)


def test_keeps_nothing_but_its_inputs():
    kept = []
    gate, up = random(6, 32).requires_grad_(), random(6, 32, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(gate, up)
    assert {t.data_ptr() for t in kept} == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize("gate, up, message", [
    (torch.ones(2, dtype=torch.int64), torch.ones(2), "gate is torch.int64; it must be float16"),
    (torch.ones(2, 4), torch.ones(4), r"up has shape torch.Size\(\[4\]\); it must be that of gate"),
    (torch.ones(4), torch.ones(4, dtype=HALF), "up has dtype torch.float16"),
    (torch.ones(4), torch.ones(4, device="meta"), "up has device meta")])
def test_bad_input(gate, up, message):
    with pytest.raises(ValueError, match=message):
        swiglu(gate, up)


# ---- on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4096, 14336), (3, 517, 11008), (77, 1003)], ids=str)
def test_gpu_sizes(gpu, dtype, shape):
    error, allowed = module.compare(gpu, dtype, shape)
    assert error <= allowed


@pytest.mark.gpu
def test_gpu_backward_is_deterministic(gpu):
    inputs = random(4096, 4096, dtype=torch.bfloat16), random(4096, 4096, dtype=torch.bfloat16, seed=1)
    first = output_and_gradients(swiglu, *inputs)
    for _ in range(20):
        assert all(map(torch.equal, output_and_gradients(swiglu, *inputs), first))


@pytest.mark.gpu
@pytest.mark.parametrize("contiguous", [True, False])
def test_gpu_more_than_2_to_the_31_elements(gpu, monkeypatch, contiguous):
    monkeypatch.undo()  # filling gigabytes with NaN buys nothing here
    rows = 2**31 // 4096 + 5
    if torch.cuda.mem_get_info()[0] < 15 * rows * 4096:
        pytest.skip("needs 32 GB of GPU memory")
    fused = torch.randn(rows, 8192, device=gpu, dtype=torch.bfloat16)
    gate, up = (t.contiguous() if contiguous else t for t in fused.chunk(2, dim=-1))
    y = swiglu(gate, up)
    assert torch.allclose(y[-9:], swiglu_reference(gate[-9:], up[-9:]), rtol=0.02, atol=0.02)
    dgate, dup = module.swiglu_backward_op(y, gate, up)
    truth = output_and_gradients(swiglu_reference, gate[-9:], up[-9:], y[-9:])[1:]
    assert torch.allclose(dgate[-9:], truth[0], rtol=0.03, atol=0.03)
    assert torch.allclose(dup[-9:], truth[1], rtol=0.03, atol=0.03)


@pytest.mark.gpu
def test_gpu_compiles_with_inductor(gpu):
    inputs = random(64, 512, dtype=torch.bfloat16), random(64, 512, dtype=torch.bfloat16, seed=1)
    compiled = torch.compile(swiglu, fullgraph=True)
    assert all(map(torch.equal, output_and_gradients(compiled, *inputs), output_and_gradients(swiglu, *inputs)))
