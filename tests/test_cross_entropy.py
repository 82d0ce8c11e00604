"""kernels/cross_entropy.py: the reference against PyTorch and by hand, the kernels against the reference in float64."""

import math
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bench.memory import peak_bytes
from kernels import cross_entropy as ce
from kernels.cross_entropy import (cross_entropy, cross_entropy_reference, linear_cross_entropy,
                                   linear_cross_entropy_reference)

kernels_run = pytest.mark.skipif(not (ce.INTERPRETED or torch.cuda.is_available()),
                                 reason="needs Triton, interpreted or on a GPU")
# the interpreter computes in NumPy, which remarks on what lies in the rows' padding
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = [{}, {"reduction": "sum"}, {"softcap": 3.0, "z_loss": 0.01}, {"num_tokens": 37}]


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of some hundred logits then take several blocks, and the last is not full."""
    monkeypatch.setattr(ce, "CONFIGS", dict.fromkeys(ce.CONFIGS, (128, 4)))


def problem(M, H, V, dtype=torch.float32, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) / math.sqrt(H) * 2
    target = torch.randint(0, V, (M,), generator=generator)
    if M > 2:
        target[1], target[-1] = -100, V - 1
    return hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(), target.to(device)


def exact(function, *tensors, **options):
    """Value and gradients of function in float64, over the same (rounded) inputs."""
    tensors = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]
    value = function(*tensors, **{k: v.double() if torch.is_tensor(v) else v for k, v in options.items()})
    leaves = [t for t in tensors if t.requires_grad]
    return value.detach(), torch.autograd.grad(value.sum(), leaves)


def assert_near(ours, truth, tolerance):
    assert ours.isfinite().all()
    assert (ours.double() - truth).abs().max() <= tolerance * max(1.0, truth.abs().max())


# ---- the reference

def test_reference_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0], [1.0, 2.0]], dtype=torch.float64)
    target = torch.tensor([0, 1, -100])  # probabilities 1/4 and 1/2; the third row does not count
    each = cross_entropy_reference(logits, target, reduction="none")
    torch.testing.assert_close(each, torch.tensor([math.log(4), math.log(2), 0.0], dtype=torch.float64))
    assert math.isclose(cross_entropy_reference(logits, target), (math.log(4) + math.log(2)) / 2)
    assert math.isclose(cross_entropy_reference(logits, target, num_tokens=10), math.log(8) / 10)
    weighted = cross_entropy_reference(logits, target, token_weight=torch.tensor([3.0, 1.0, 9.0], dtype=torch.float64))
    assert math.isclose(weighted, (3 * math.log(4) + math.log(2)) / 4)
    z_loss = cross_entropy_reference(logits[:1], target[:1], z_loss=0.5)  # lse = ln 4
    assert math.isclose(z_loss, math.log(4) + 0.5 * math.log(4) ** 2)
    capped = cross_entropy_reference(logits[1:2], target[1:2], softcap=1.0, z_loss=1.0)  # lse = tanh 5 + ln 2
    assert math.isclose(capped, math.log(2) + (math.tanh(5) + math.log(2)) ** 2)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reference_is_torchs(reduction):
    hidden, weight, target = problem(7, 5, 11, device="cpu")
    hidden, weight = hidden.double(), weight.double()
    ours = linear_cross_entropy_reference(hidden, weight, target, reduction=reduction)
    torchs = F.cross_entropy(hidden @ weight.T, target, reduction=reduction)
    torch.testing.assert_close(ours, torchs, rtol=1e-13, atol=0)


def test_float64_is_never_cast_down():
    hidden, weight, target = problem(6, 4, 9)
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and nothing needs to be said about it
        loss = linear_cross_entropy(hidden, weight, target)
        loss.backward()
        plain = cross_entropy(hidden @ weight.T, target)
    assert loss.dtype == plain.dtype == hidden.grad.dtype == torch.float64
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, target), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, target, softcap=2.0, z_loss=0.1),
                                    (hidden, weight))


# ---- the kernels

@kernels_run
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plain_equals_float64(small_blocks, options):
    hidden, weight, target = problem(5, 8, 300)
    logits = (hidden @ weight.T).detach().requires_grad_()
    loss = cross_entropy(logits, target, **options)
    truth, (gradient,) = exact(cross_entropy_reference, logits, target, **options)
    assert_near(loss, truth, 1e-5)
    loss.backward()
    assert_near(logits.grad, gradient, 1e-4)
    assert not logits.grad[1].any()


@kernels_run
@pytest.mark.parametrize("options", OPTIONS + [{"weighted": True}], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 128])
def test_linear_equals_float64(small_blocks, options, chunk_size):
    M, V = (6, 300) if chunk_size is None else (130, 100)  # 130 rows: a chunk of 128 and one of 2
    hidden, weight, target = problem(M, 24, V)
    if options == {"weighted": True}:
        options = {"token_weight": torch.linspace(0, 2, M, device=DEVICE)}
    loss = linear_cross_entropy(hidden, weight, target, chunk_size=chunk_size, **options)
    truth, gradients = exact(linear_cross_entropy_reference, hidden, weight, target, **options)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert_near(loss, truth, 1e-5)
    loss.backward()
    for ours, gradient in zip((hidden.grad, weight.grad), gradients):
        assert_near(ours, gradient, 1e-4)


def assert_as_good_as_torch(ours, theirs, truth, dtype):
    """flash-attention's rule: twice PyTorch's error in the same dtype, and twice the rounding of the truth itself."""
    rounding = ((truth.to(dtype) + 0.3 - 0.3) - truth).abs().max()
    assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 2 * rounding


def compare_in_16_bits(M, H, V, dtype, **options):
    hidden, weight, target = problem(M, H, V, dtype)
    truth = exact(linear_cross_entropy_reference, hidden, weight, target, reduction="sum")
    theirs = F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="sum")
    their_gradients = torch.autograd.grad(theirs, (hidden, weight))
    ours = linear_cross_entropy(hidden, weight, target, reduction="sum", **options)
    gradients = torch.autograd.grad(ours, (hidden, weight))
    assert gradients[0].dtype == gradients[1].dtype == dtype
    assert_as_good_as_torch(ours, theirs, truth[0], dtype)
    for our, their, exactly in zip(gradients, their_gradients, truth[1]):
        assert_as_good_as_torch(our, their, exactly, dtype)


@kernels_run
def test_float16_errs_no_more_than_twice_as_torch(small_blocks):
    compare_in_16_bits(140, 32, 200, torch.float16, chunk_size=128)


def launch_in_torch(kernel, tensors, width, ignore_index, softcap, z_loss, **_):
    """What ce.launch lets the loss kernel do, for bfloat16, which the interpreter computes wrongly."""
    logits, target, _, loss, _ = tensors
    probabilities, counted = logits.double().softmax(-1), target != ignore_index
    hot = F.one_hot(target.where(counted, 0), logits.shape[1])
    loss.copy_(-(probabilities.log() * hot).sum(-1) * counted)
    logits.copy_((probabilities - hot) * counted[:, None])


@kernels_run
@pytest.mark.parametrize("frequencies", ["even", "zipf"])
def test_bfloat16_sums_err_no_more_than_twice_as_torch(monkeypatch, frequencies):
    """The default for a bf16 weight: its gradient is rounded with each of 8 chunks. Held to twice PyTorch's error in
    norm as well as in the largest; words as frequent as in text, and hidden states with a mean, make sums grow."""
    monkeypatch.setattr(ce, "CHUNK_TOKENS", 128)
    monkeypatch.setattr(ce, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(ce, "runs_kernel", lambda *_: True)
    chunks = []
    monkeypatch.setattr(ce, "launch", lambda kernel, tensors, *a, **k: (chunks.append(len(tensors[0])),
                                                                      launch_in_torch(kernel, tensors, *a, **k)))
    hidden, weight, target = problem(1024, 64, 1000, torch.bfloat16, device="cpu")
    if frequencies == "zipf":
        generator = torch.Generator().manual_seed(1)
        target = torch.multinomial(1 / torch.arange(1.0, 1001), 1024, replacement=True, generator=generator)
        hidden = (hidden.detach() + 1).requires_grad_()
    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, reduction="sum"), (hidden, weight))
    assert chunks == [128] * 8 and ours[1].dtype == torch.bfloat16
    plain = F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="sum")
    _, truth = exact(linear_cross_entropy_reference, hidden, weight, target, reduction="sum")
    for our, their, exactly in zip(ours, torch.autograd.grad(plain, (hidden, weight)), truth):
        assert_as_good_as_torch(our, their, exactly, torch.bfloat16)
        assert (our - exactly).norm() <= 2 * (their - exactly).norm()
    wide = linear_cross_entropy(hidden, weight, target, reduction="sum", sum_dtype=torch.float32)
    assert (torch.autograd.grad(wide, weight)[0] - truth[1]).norm() <= 0.8 * (ours[1] - truth[1]).norm()


def test_chunks_and_sums_as_planned():
    """A bf16 sum is rounded 8 times at most; float32 takes over where larger chunks would cost more than it."""
    bf16, H, V = torch.bfloat16, 4096, 128256

    def peak(tokens, dtype):  # bytes per word
        return 2 * H + 2 * tokens if dtype == bf16 else 4 * H + max(2 * H, 2 * tokens)

    for M in range(1, 200_000, 997):
        tokens, dtype = ce.plan(M, H, V, bf16, None, None)
        wide, fp32 = ce.plan(M, H, V, bf16, torch.float32, None)
        assert fp32 == torch.float32 and wide <= 2176 and tokens % 128 == wide % 128 == 0
        assert dtype == torch.float32 or tokens * 8 >= M
        assert peak(tokens, dtype) <= peak(wide, fp32) + 2 * 128
    assert ce.plan(16384, H, V, bf16, None, None) == (2048, bf16)
    assert ce.plan(16384, H, V, bf16, None, 1024) == (1024, torch.float32)  # 16 chunks, because the caller wants them
    assert ce.plan(16384, H, V, torch.float32, None, None) == ce.plan(16384, H, V, torch.float16, None, None)
    assert ce.plan(0, H, V, bf16, None, None) == (0, bf16)


@kernels_run
def test_a_third_of_full_logits_in_memory(monkeypatch):
    """16384 tokens x 4096 x 128256 words in bfloat16, every dimension a sixteenth, all bytes counted as they are
    allocated, both gradients included. Full logits: at their best, overwritten by their gradient (torch.compile)."""
    M, H, V = 1024, 256, 8016
    monkeypatch.setattr(ce, "CHUNK_TOKENS", ce.CHUNK_TOKENS // 16)
    monkeypatch.setattr(ce, "CHUNK_LOGITS", ce.CHUNK_LOGITS // 256)
    monkeypatch.setattr(ce, "runs_kernel", lambda *_: True)
    monkeypatch.setattr(ce, "launch", lambda *_, **__: None)  # the kernel allocates nothing
    hidden, weight, target = problem(M, H, V, torch.bfloat16, device="cpu")

    def peak(**options):
        return peak_bytes(lambda: torch.autograd.grad(
            linear_cross_entropy(hidden, weight, target, reduction="sum", **options), (hidden, weight)))

    full = 2 * (M * V + M * H + V * H)
    assert peak() <= full / 3 < peak(sum_dtype=torch.float32)
    assert full <= peak(chunk_size=M) <= 1.03 * full


@kernels_run
@pytest.mark.parametrize("V", [1, 127, 128, 129])
def test_last_block_full_or_not(small_blocks, V):
    hidden, weight, target = problem(2, 4, V)
    loss = linear_cross_entropy(hidden, weight, target)
    truth, gradients = exact(linear_cross_entropy_reference, hidden, weight, target)
    assert_near(loss, truth, 1e-5)
    loss.backward()
    assert_near(hidden.grad, gradients[0], 1e-4)
    assert_near(weight.grad, gradients[1], 1e-4)


@kernels_run
def test_any_strides_and_dirty_memory(small_blocks):
    """Transposed operands, rows wider than V, a batch of two dimensions; all fresh memory is filled with NaN."""
    hidden, weight, target = problem(6, 10, 150)
    loose = hidden.detach().t().contiguous().t().view(2, 3, 10).requires_grad_()
    head = weight.detach().t().contiguous().t().requires_grad_()
    wide = torch.randn(2, 3, 170, device=DEVICE)
    logits = wide[..., :150].detach().requires_grad_()
    torch.use_deterministic_algorithms(True)  # also: torch.utils.deterministic.fill_uninitialized_memory
    try:
        loss = linear_cross_entropy(loose, head, target.view(2, 3))
        plain = cross_entropy(logits, target.view(2, 3), reduction="none")
        (loss + plain.sum()).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    truth, gradients = exact(linear_cross_entropy_reference, loose, head, target.view(2, 3))
    assert_near(loss, truth, 1e-5)
    assert_near(loose.grad, gradients[0], 1e-4)
    assert_near(head.grad, gradients[1], 1e-4)
    truth, (gradient,) = exact(cross_entropy_reference, logits, target.view(2, 3), reduction="none")
    assert_near(plain, truth, 1e-5)
    assert_near(logits.grad, gradient, 1e-4)


@kernels_run
def test_forbidden_words_and_huge_logits(small_blocks):
    logits = torch.randn(3, 300, device=DEVICE)
    logits[0, :200] = -math.inf  # the first block holds nothing else
    logits[1] *= 1e4  # exp would overflow
    logits[2] = math.nan  # ignored: harmless
    target = torch.tensor([250, 7, -100], device=DEVICE)
    logits.requires_grad_()
    loss = cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, reduction="none"))
    loss.sum().backward()
    expected = torch.autograd.grad(F.cross_entropy(logits[:2], target[:2], reduction="sum"), logits)[0]
    torch.testing.assert_close(logits.grad[:2], expected[:2], rtol=1e-4, atol=1e-6)
    assert not logits.grad[2].any()


@kernels_run
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"num_tokens": 0}, {"z_loss": 0.1}], ids=str)
def test_all_ignored_gives_zero(options):
    hidden, weight, target = problem(3, 4, 10)
    target[:] = -100
    loss = linear_cross_entropy(hidden, weight, target, **options)
    plain = cross_entropy(hidden @ weight.T, target, **options)
    (loss + plain).backward()
    assert loss == plain == 0 and not hidden.grad.any() and not weight.grad.any()


@kernels_run
def test_empty_batch():
    hidden, weight, target = problem(0, 4, 10)
    loss = linear_cross_entropy(hidden, weight, target) + cross_entropy(hidden @ weight.T, target)
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, 4) and not weight.grad.any()
    assert cross_entropy(hidden @ weight.T, target, reduction="none").shape == (0,)


@kernels_run
def test_micro_batches_divided_by_the_global_count_equal_one_batch():
    hidden, weight, target = problem(12, 8, 40)
    whole = linear_cross_entropy(hidden, weight, target)
    expected = torch.autograd.grad(whole, (hidden, weight))
    count = (target != -100).sum()
    parts = [linear_cross_entropy(hidden[i:i + 4], weight, target[i:i + 4], num_tokens=count) for i in (0, 4, 8)]
    for part in parts:
        part.backward()
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close((hidden.grad, weight.grad), expected)
    same = linear_cross_entropy(hidden, weight, target, num_tokens=int(count))
    assert same == whole


@kernels_run
def test_loss_scale_reaches_the_gradients_exactly():
    hidden, weight, target = problem(5, 8, 40)
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), (hidden, weight))
    scaled = torch.autograd.grad(linear_cross_entropy(hidden, weight, target) * 1024, (hidden, weight))
    assert all(torch.equal(a * 1024, b) for a, b in zip(once, scaled))
    third = torch.autograd.grad(linear_cross_entropy(hidden, weight, target) / 3, (hidden, weight))
    torch.testing.assert_close(third, tuple(a / 3 for a in once))


@kernels_run
@pytest.mark.parametrize("size", [0, 7, 2 ** 20 + 5])
def test_loss_scale_reaches_gradients_of_any_size(size):
    """The interpreter takes tiles of 2^20 numbers at most, and the gradient of a head is larger."""
    gradient = torch.ones(size, device=DEVICE)
    torch.ops.glassbox.scale_(gradient, torch.tensor(3.0, device=DEVICE))
    assert (gradient == 3).all()


@kernels_run
def test_small_gradients_survive_float16_until_the_loss_scale_comes():
    """Divided by 2^22 tokens before backward, every gradient here would be 0 in float16."""
    hidden, weight, target = problem(5, 8, 40, torch.float16)
    _, truth = exact(linear_cross_entropy_reference, hidden, weight, target, num_tokens=2 ** 22)
    assert max(t.abs().max() for t in truth) < 2 ** -20
    (linear_cross_entropy(hidden, weight, target, num_tokens=2 ** 22) * 2 ** 22).backward()
    assert_near(hidden.grad, truth[0] * 2 ** 22, 2e-3)
    assert_near(weight.grad, truth[1] * 2 ** 22, 2e-3)


@kernels_run
def test_autocast_keeps_the_gradient_of_a_float32_weight_in_float32():
    hidden, weight, target = problem(130, 16, 60)
    with torch.autocast(DEVICE, torch.float16):
        loss = linear_cross_entropy(hidden.half(), weight, target, chunk_size=128)
        expected = F.cross_entropy(F.linear(hidden, weight), target)
    loss.backward()
    truth = torch.autograd.grad(expected, weight)[0]
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, truth, rtol=2e-2, atol=2e-4)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-3, atol=0)


@kernels_run
def test_logits_are_never_whole(monkeypatch):
    shapes = []
    launch = ce.launch
    monkeypatch.setattr(ce, "launch", lambda kernel, tensors, *a, **k: (shapes.append(tensors[0].shape),
                                                                      launch(kernel, tensors, *a, **k)))
    hidden, weight, target = problem(300, 4, 20)
    linear_cross_entropy(hidden, weight, target, chunk_size=128)
    assert [shape[0] for shape in shapes] == [128, 128, 44]


@kernels_run
def test_nothing_is_computed_that_nobody_asks_for():
    def flops(*leaves):
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(*leaves, target)
        return counter.get_total_flops()

    hidden, weight, target = problem(5, 8, 40)
    assert flops(hidden, weight) == 3 * 2 * 5 * 8 * 40
    assert flops(hidden, weight.detach()) == 2 * 2 * 5 * 8 * 40  # a frozen head
    with torch.no_grad():
        assert flops(hidden, weight) == 2 * 5 * 8 * 40
        _, *gradients = torch.ops.glassbox.linear_cross_entropy(
            hidden, weight, target, None, -100, 0.0, 0.0, torch.float32, None, None, False, False)
    assert [g.numel() for g in gradients] == [0, 0]


@kernels_run
def test_targets_out_of_range_are_not_read():
    """On a GPU nobody looks at the targets beforehand: the loss must be NaN then, not what lies beyond the row."""
    logits = torch.zeros(3, 10, device=DEVICE)
    loss, _ = torch.ops.glassbox.cross_entropy(logits, torch.tensor([3, 10, -1], device=DEVICE), -100, 0.0, 0.0)
    assert loss[0] == pytest.approx(math.log(10)) and loss[1:].isnan().all()


# ---- as operators

@kernels_run
def test_opcheck():
    hidden, weight, target = problem(4, 8, 30)
    options = (-100, 5.0, 0.01, torch.float32, torch.float32, 128)
    for leaves, flags in (((hidden, weight), (True, True)), ((hidden, weight.detach()), (True, False)),
                          ((hidden.detach(), weight.detach()), (False, False))):
        factor = torch.rand(4, device=DEVICE) if flags[1] else None
        torch.library.opcheck(torch.ops.glassbox.linear_cross_entropy, (*leaves, target, factor, *options, *flags))
    logits, each = torch.randn(4, 30, device=DEVICE), torch.rand(4, device=DEVICE)
    torch.library.opcheck(torch.ops.glassbox.cross_entropy, (logits.clone().requires_grad_(), target, -100, 0.0, 0.0))
    torch.library.opcheck(torch.ops.glassbox.cross_entropy_backward, (each, logits, target, each + 4, -100, 0.0, 0.0))
    torch.library.opcheck(torch.ops.glassbox.scale_, (logits, torch.tensor(2.0, device=DEVICE)))


@kernels_run
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    def step(hidden, weight, target):
        linear = linear_cross_entropy(hidden, weight, target, num_tokens=7, softcap=4.0)
        return linear + cross_entropy(hidden @ weight.T, target, z_loss=0.1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for M in (4, 6):
        hidden, weight, target = problem(M, 8, 30)
        plain, fast = step(hidden, weight, target), compiled(hidden, weight, target)
        torch.testing.assert_close(fast, plain)
        torch.testing.assert_close(torch.autograd.grad(fast * 3, (hidden, weight)),
                                   torch.autograd.grad(plain * 3, (hidden, weight)))


def test_the_reference_compiles_into_one_graph(monkeypatch):
    monkeypatch.setattr(ce, "INTERPRETED", False)
    hidden, weight, target = problem(4, 8, 30)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight, target), F.cross_entropy(hidden @ weight.T, target))


@kernels_run
def test_activation_checkpointing():
    hidden, weight, target = problem(4, 8, 30)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, target) * 5, (hidden, weight))
    loss = checkpoint(linear_cross_entropy, hidden, weight, target, use_reentrant=False)
    (loss * 5).backward()
    assert torch.equal(hidden.grad, expected[0]) and torch.equal(weight.grad, expected[1])


@kernels_run
def test_second_backward_and_second_derivative_are_refused():
    hidden, weight, target = problem(4, 8, 30)
    loss = linear_cross_entropy(hidden, weight, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    gradient, = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


# ---- bad input, other machines

@pytest.mark.parametrize("change, message", [
    ({"target": torch.zeros(4, dtype=torch.int32)}, "target is torch.int32"),
    ({"target": torch.zeros(5, dtype=torch.int64)}, r"must be torch.int64 of shape \(4,\)"),
    ({"target": torch.tensor([0, 30, 1, 2])}, "target holds 30; it must be 0 to 29"),
    ({"target": torch.tensor([0, -1, 1, 2])}, "target holds -1"),
    ({"weight": torch.zeros(30, 7)}, r"weight has shape \(30, 7\); it must be \(V, 8\)"),
    ({"weight": torch.zeros(30, 8, dtype=torch.float16)}, "weight is torch.float16, hidden torch.float32"),
    ({"weight": torch.zeros(30, 8, device="meta")}, "weight is on meta"),
    ({"hidden": torch.zeros(4, 8, dtype=torch.int64)}, "it must be floating point"),
    ({"reduction": "none"}, "must be one of mean, sum"),
    ({"reduction": "sum", "num_tokens": 3}, "num_tokens is what 'mean' divides by"),
    ({"num_tokens": torch.ones(2)}, r"num_tokens has shape \(2,\)"),
    ({"token_weight": torch.ones(4, 1)}, r"token_weight has shape \(4, 1\)"),
    ({"token_weight": torch.ones(4, requires_grad=True)}, "be a constant"),
    ({"softcap": -1.0}, "softcap is -1.0"),
    ({"chunk_size": 0}, "chunk_size is 0"),
    ({"sum_dtype": torch.bfloat16}, "sum_dtype is torch.bfloat16; it must be torch.float32"),
    ({"weight": torch.zeros(30, 8).half(), "hidden": torch.zeros(4, 8).half(), "sum_dtype": torch.float16},
     "sum_dtype is torch.float16"),
])
def test_bad_input(change, message):
    hidden, weight, target = problem(4, 8, 30, device="cpu")
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**({"hidden": hidden, "weight": weight, "target": target} | change))


def test_without_kernels_the_reference_serves_and_says_so(monkeypatch):
    monkeypatch.setattr(ce, "INTERPRETED", False)
    hidden, weight, target = problem(4, 8, 30, device="cpu")
    with pytest.warns(UserWarning, match="linear_cross_entropy has no kernel for torch.float32 on cpu"):
        loss = linear_cross_entropy(hidden, weight, target, softcap=2.0)
    assert loss == linear_cross_entropy_reference(hidden, weight, target, softcap=2.0)


def test_runs_alone_without_triton(tmp_path):
    shutil.copy(ce.__file__, tmp_path / "cross_entropy.py")
    code = "import sys, runpy; sys.modules['triton'] = None; runpy.run_path('cross_entropy.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0 and "weight.grad" in done.stdout, done.stderr


@kernels_run
def test_kernels_compile_for_hopper_with_wide_accesses(tmp_path):
    """To PTX, which needs no GPU. A vocabulary of 50257 in padded rows is still read 16 bytes at a time."""
    code = """if True:
        import re, triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from kernels import cross_entropy as ce

        def ptx(kernel, multiples_of_16, **constants):
            kinds = {"logits_ptr": "*bf16", "gradient_ptr": "*bf16", "tensor_ptr": "*bf16", "target_ptr": "*i64",
                     "softcap": "fp32", "z_loss": "fp32"}
            names = kernel.arg_names
            signature = {n: "constexpr" if n in constants else kinds.get(n, "*fp32" if n.endswith("_ptr") else "i32")
                         for n in names}
            aligned = [n for n in names if n.endswith("_ptr") or n in multiples_of_16]
            source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()},
                               {(names.index(n),): [["tt.divisibility", 16]] for n in aligned})
            return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16}).asm["ptx"]

        for softcap in (False, True):
            loss = ptx(ce.loss_kernel, ["row_stride", "width"], WEIGHTED=True, SOFTCAP=softcap, GRADIENT=True,
                       BLOCK=8192)
            assert len(re.findall(r"ld.global.b16", loss)) == 1, "only the label's logit is read alone"
            assert "ld.global.v4" in loss and "st.global.v4" in loss and "st.global.b16" not in loss
            assert "v4" in ptx(ce.gradient_kernel, ["row_stride", "V", "width"], SOFTCAP=softcap, BLOCK=8192)
        assert "v4" in ptx(ce.scale_kernel, ["size"], BLOCK=4096)
        """
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(os.path.dirname(ce.__file__)),
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# ---- what only a GPU can show

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M, H, V", [(1, 64, 1000), (799, 96, 50257), (4100, 512, 32000)])
def test_gpu_16_bits(gpu, M, H, V, dtype):
    compare_in_16_bits(M, H, V, dtype)
    compare_in_16_bits(M, H, V, dtype, chunk_size=1024)


@pytest.mark.gpu
def test_gpu_twenty_runs_are_bitwise_equal(gpu):
    hidden, weight, target = problem(3000, 256, 50257, torch.bfloat16)

    def run():
        loss = linear_cross_entropy(hidden, weight, target, chunk_size=1024)
        return loss, *torch.autograd.grad(loss / 3, (hidden, weight))

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.gpu
def test_gpu_more_than_two_to_the_31_logits(gpu):
    rows, V = 2 ** 31 // 131072 + 3, 131072
    logits = torch.randn(rows, V, device=gpu, dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(0, V, (rows,), device=gpu)
    loss = cross_entropy(logits, target, reduction="none")
    loss.sum().backward()
    tail = logits[-4:].detach().double().requires_grad_()
    truth = F.cross_entropy(tail, target[-4:], reduction="none")
    torch.testing.assert_close(loss[-4:], truth.float(), rtol=1e-5, atol=1e-5)
    expected, = torch.autograd.grad(truth.sum(), tail)
    torch.testing.assert_close(logits.grad[-4:].double(), expected, rtol=1e-2, atol=1e-6)
    del logits, loss
    head = torch.zeros(V, 8, device=gpu, dtype=torch.bfloat16, requires_grad=True)  # one chunk of > 2^31 logits
    uniform = linear_cross_entropy(torch.ones(rows, 8, device=gpu, dtype=torch.bfloat16), head, target, chunk_size=rows)
    assert abs(uniform.item() - math.log(V)) < 1e-3


@pytest.mark.gpu
def test_gpu_memory_is_a_third_of_the_compiled_logits(gpu):
    hidden, weight, target = problem(16384, 1024, 128256, torch.bfloat16)

    def peak(function):
        hidden.grad = weight.grad = None
        function(hidden, weight).backward()  # warm: compiles, makes cuBLAS's workspace
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(hidden, weight).backward()
        return torch.cuda.max_memory_allocated() - before

    compiled = torch.compile(lambda h, w: F.cross_entropy(F.linear(h, w).float(), target))
    assert peak(lambda h, w: linear_cross_entropy(h, w, target)) <= peak(compiled) / 3  # gradients included


@pytest.mark.gpu
def test_gpu_inductor_and_autocast(gpu):
    hidden, weight, target = problem(500, 128, 5000)

    def step(hidden, weight):
        with torch.autocast("cuda", torch.bfloat16):
            return linear_cross_entropy(hidden, weight, target, num_tokens=333)

    plain, fast = step(hidden, weight), torch.compile(step, fullgraph=True)(hidden, weight)
    torch.testing.assert_close(fast, plain)
    expected = torch.autograd.grad(plain, (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(fast, (hidden, weight)), expected)
    assert expected[1].dtype == torch.float32


@pytest.mark.gpu
def test_gpu_waits_for_nothing(gpu):
    hidden, weight, target = problem(500, 128, 5000, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, target, num_tokens=333).backward()
        cross_entropy(hidden @ weight.T, target).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
