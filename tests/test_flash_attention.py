"""kernels/flash_attention.py: the reference against PyTorch, the kernels against the reference, bad input, one GPU."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from bench.memory import peak_bytes
from kernels import flash_attention as fa
from kernels.flash_attention import flash_attn_func, flash_attn_varlen_func

interpreter = pytest.mark.skipif(torch.cuda.is_available() or fa.triton is None,
                                 reason="the kernels run in Triton's interpreter where there is Triton and no GPU")


def make(B, Sq, Sk, H, Hkv, D, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, Sq, H, D), (B, Sk, Hkv, D), (B, Sk, Hkv, D))
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def sdpa(q, k, v, mask, scale=None):
    """PyTorch's own attention, written out for any mask, in q's dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def mask_of(Sq, Sk, causal, window):
    """The mask pair by pair, from the words of the docstring."""
    rows = []
    for i in range(Sq):
        at = i + Sk - Sq
        rows.append([(window[0] < 0 or j >= at - window[0]) and (window[1] < 0 or j <= at + window[1])
                     and (not causal or j <= at) for j in range(Sk)])
    return torch.tensor(rows, dtype=torch.bool).view(Sq, Sk)


def with_gradients(function, inputs, dout, dlse=None):
    """out, lse, dq, dk, dv. A weight on LSE, whose rows of -inf count nothing, tests its gradient too."""
    out, lse = function(*inputs)
    loss = (out.double() * dout.double()).sum()
    if dlse is not None:
        loss = loss + (lse.masked_fill(lse == -math.inf, 0.0).double() * dlse.double()).sum()
    return [x.detach() for x in (out, lse, *torch.autograd.grad(loss, inputs))]


def largest(a, b):
    assert a.shape == b.shape and torch.equal(a == -math.inf, b == -math.inf)
    difference = torch.where(a == -math.inf, 0.0, a.double() - b.double()).abs()
    return float(difference.max()) if difference.numel() else 0.0


@pytest.fixture
def dirty(monkeypatch):
    """Memory that nobody wrote is NaN, as it may be on a GPU: what a kernel forgets to write is seen."""
    real_empty, real_new = torch.empty, torch.Tensor.new_empty

    def poison(x):
        return x.fill_(math.nan) if x.is_floating_point() else x
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(real_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda x, **k: poison(real_empty(x.shape, dtype=x.dtype, device=x.device)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: poison(real_new(self, *a, **k)))


# ---- the reference


@pytest.mark.parametrize("Sq, Sk, H, Hkv, causal, window", [
    (5, 5, 2, 2, False, (-1, -1)), (5, 9, 4, 2, True, (-1, -1)), (9, 5, 3, 1, False, (2, 1)),
    (7, 7, 2, 1, True, (3, 0))])
def test_reference_is_torchs_attention_in_float64(Sq, Sk, H, Hkv, causal, window):
    """Rows that see nothing are 0 here; PyTorch, whose answer to them varies from release to release, is not asked."""
    inputs = make(2, Sq, Sk, H, Hkv, 8, torch.float64)
    mask = mask_of(Sq, Sk, causal, window)
    seeing = mask.any(1)
    dout = torch.randn(2, Sq, H, 8, dtype=torch.float64)

    def torchs(q, k, v):
        scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(H // Hkv, 2)) / math.sqrt(8)
        out = torch.zeros_like(q)
        out[:, seeing] = sdpa(q[:, seeing], k, v, mask[seeing])
        return out, scores.masked_fill(~mask, -math.inf).logsumexp(-1)

    def ours(q, k, v):
        return flash_attn_func(q, k, v, causal=causal, window_size=window, return_lse=True)
    for a, b in zip(with_gradients(ours, inputs, dout), with_gradients(torchs, inputs, dout), strict=True):
        assert largest(a, b) < 1e-12


def test_gradients_of_reference_by_finite_differences():
    inputs = make(1, 3, 4, 2, 1, 4, torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v: flash_attn_func(q, k, v, causal=True, softmax_scale=0.7, return_lse=True), inputs)


def test_hand_worked_numbers():
    """Scores 0 and log 3: weights 1/4 and 3/4, LSE log 4."""
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1)
    out, lse = flash_attn_func(q, k, torch.tensor([4.0, 8.0]).view(1, 2, 1, 1), softmax_scale=1.0, return_lse=True)
    assert out.item() == pytest.approx(7.0) and lse.item() == pytest.approx(math.log(4))


def test_causal_is_bottom_right():
    assert fa.visible(2, 4, -1, 0).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert fa.visible(3, 2, 0, 0).tolist() == [[False, False], [True, False], [False, True]]


def test_visible_pairs_counts_the_mask():
    for Sq, Sk, left, right in ((5, 7, -1, -1), (5, 7, -1, 0), (7, 5, -1, 0), (9, 4, 2, 1), (4, 9, 0, 3), (3, 8, 9, 0)):
        assert fa.visible_pairs(Sq, Sk, left, right) == int(fa.visible(Sq, Sk, left, right).sum())


# ---- the kernels, in the interpreter on a CPU. Its tiles are 32 x 16 rows: no length below is a multiple of both


CASES = [  # B, Sq, Sk, H, Hkv, D, causal, window
    (1, 40, 40, 1, 1, 64, False, (-1, -1)), (2, 37, 53, 2, 1, 24, True, (-1, -1)),
    (1, 50, 18, 2, 2, 40, True, (-1, -1)),
    (1, 1, 61, 4, 1, 32, True, (-1, -1)), (1, 61, 1, 1, 1, 16, False, (-1, -1)), (1, 64, 64, 1, 1, 16, True, (-1, -1)),
    (1, 45, 70, 2, 1, 16, True, (17, 0)), (1, 70, 45, 1, 1, 16, False, (9, 20)), (1, 45, 45, 1, 1, 16, False, (0, -1)),
    (1, 40, 90, 1, 1, 5, False, (-1, 3)), (1, 33, 33, 4, 4, 1, True, (-1, -1)), (1, 20, 34, 1, 1, 256, True, (-1, -1)),
    (1, 34, 20, 1, 1, 80, False, (-1, -1)), (1, 34, 20, 8, 1, 96, True, (3, 0)), (1, 0, 5, 2, 1, 16, False, (-1, -1)),
    (1, 33, 0, 2, 1, 16, False, (-1, -1)), (0, 5, 5, 2, 1, 16, True, (-1, -1)), (1, 96, 96, 1, 1, 16, False, (-1, -1))]


@interpreter
@pytest.mark.parametrize("B, Sq, Sk, H, Hkv, D, causal, window", CASES)
def test_kernel_equals_float64(dirty, B, Sq, Sk, H, Hkv, D, causal, window):
    """O, LSE and all gradients, that of LSE among them; rows that see nothing give 0, -inf and no NaN."""
    inputs = make(B, Sq, Sk, H, Hkv, D)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    dout, dlse = torch.randn(B, Sq, H, D), torch.randn(B, H, Sq)

    def attend(q, k, v):
        return flash_attn_func(q, k, v, causal=causal, window_size=window, return_lse=True)
    ours, true = with_gradients(attend, inputs, dout, dlse), with_gradients(attend, wide, dout, dlse)
    for name, a, b, allowed in zip(("out", "lse", "dq", "dk", "dv"), ours, true, (1e-5, 1e-5, 1e-4, 1e-4, 1e-4)):
        assert a.isfinite().all() or name == "lse"
        assert largest(a, b) <= allowed, name


PUBLISHED = [  # flash-attention's own test shapes: Sq, Sk, H, Hkv, D, causal, window
    (1, 239, 1, 1, 32, False, (-1, -1)), (113, 203, 2, 1, 80, True, (-1, -1)), (127, 513, 1, 1, 64, False, (57, 31)),
    (239, 1, 8, 1, 96, False, (-1, -1)), (799, 3, 4, 1, 128, True, (-1, -1))]


@pytest.fixture
def large_tiles(monkeypatch):
    """Long sequences in few tiles: the interpreter takes 18 ms for one of any size."""
    monkeypatch.setattr(fa, "INTERPRETER_CONFIG", {"forward": (128, 64, 4, 1), "dq": (64, 128, 4, 1),
                                                   "dkdv": (128, 64, 4, 1)})


@interpreter
@pytest.mark.parametrize("Sq, Sk, H, Hkv, D, causal, window", PUBLISHED)
def test_flash_attentions_own_shapes(dirty, large_tiles, Sq, Sk, H, Hkv, D, causal, window):
    """1 to 8 heads per key head; in float32 against float64, in float16 by the rule; dirty memory, dO not contiguous."""
    inputs = make(1, Sq, Sk, H, Hkv, D)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    dout = torch.randn(1, H, D, Sq).permute(0, 3, 1, 2)

    def run(inputs):
        out = flash_attn_func(*inputs, causal=causal, window_size=window)
        return out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))
    for a, b, allowed in zip(run(inputs), run(wide), (1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        assert a.isfinite().all() and largest(a, b) <= allowed
    by_the_rule(1, Sq, Sk, H, Hkv, D, causal, window, torch.float16)


def within_twice_torchs_error(ours, theirs, true):
    """flash-attention's rule for half precision: |ours - ref32| <= 2 |torch in that dtype - ref32| + atol, and what is
    allowed in float32: with a single key dQ and dK are 0, which PyTorch meets exactly and float32 sums do not."""
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), ours, theirs, true, strict=True):
        low = c.to(b.dtype)
        rounding = 2 * float(((low + 0.3 - 0.3) - low).abs().max())
        assert a.isfinite().all()
        assert largest(a.float(), c) <= 2 * largest(b.float(), c) + rounding + (1e-5 if name == "out" else 1e-4), name


def by_the_rule(B, Sq, Sk, H, Hkv, D, causal, window, dtype, device="cpu"):
    inputs = make(B, Sq, Sk, H, Hkv, D, dtype, device)
    mask = fa.visible(Sq, Sk, window[0], 0 if causal else window[1], device)
    dout = torch.randn(B, Sq, H, D, dtype=dtype, device=device)
    blind = (~mask.any(1))[:, None, None]

    def plain(q, k, v):  # as _probabilities, in q's own dtype
        k, v = (x.repeat_interleave(H // Hkv, dim=2) for x in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q / math.sqrt(D), k).masked_fill(~mask, -math.inf)
        p = scores.masked_fill(~mask.any(1)[:, None], 0.0).softmax(-1, dtype=torch.float32).to(v.dtype)
        return torch.einsum("bhij,bjhd->bihd", p, v).masked_fill(blind, 0.0), None

    def attend(q, k, v):
        return flash_attn_func(q, k, v, causal=causal, window_size=window, return_lse=True)
    ours = with_gradients(attend, inputs, dout)
    wide = [x.detach().float().requires_grad_() for x in inputs]

    def run(x):
        out, _ = plain(*x)
        return [y.detach() for y in (out, *torch.autograd.grad(out, x, dout.to(out.dtype)))]
    within_twice_torchs_error([ours[0], *ours[2:]], run(inputs), run(wide))


@interpreter
@pytest.mark.parametrize("case", [(2, 37, 53, 2, 1, 40, True, (-1, -1)), (1, 50, 18, 2, 2, 64, True, (-1, -1)),
                                  (1, 45, 70, 1, 1, 32, False, (17, 5))])
def test_half_precision_by_flash_attentions_rule(case):
    by_the_rule(*case, torch.float16)


def test_a_cpu_without_the_kernel_is_announced_and_right():
    """bfloat16 never runs in the interpreter, which computes it wrongly without a word."""
    inputs = make(1, 20, 20, 2, 1, 16, torch.bfloat16)
    with pytest.warns(UserWarning, match="bfloat16 on cpu; the PyTorch reference serves"):
        out = flash_attn_func(*inputs, causal=True)
    wide = flash_attn_func(*(x.double() for x in inputs), causal=True)
    assert out.dtype == torch.bfloat16 and largest(out.detach(), wide.detach()) < 0.02


@interpreter
def test_any_strides():
    """Heads before sequence, a slice of packed qkv, a head_dim with a stride, a gradient that is expanded."""
    B, S, H, D = 1, 40, 2, 16
    torch.manual_seed(0)
    qkv = torch.randn(B, S, 3, H, D)
    for inputs in (qkv.unbind(2), [torch.randn(B, H, S, D).transpose(1, 2) for _ in range(3)],
                   [torch.randn(B, S, H, 2 * D)[..., ::2] for _ in range(3)],
                   [torch.randn(S, D, H, B).permute(3, 0, 2, 1) for _ in range(3)]):
        plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in inputs]
        strided = [x.detach().requires_grad_() for x in inputs]
        a, b = flash_attn_func(*strided, causal=True), flash_attn_func(*plain, causal=True)
        weight = torch.randn(S, B, D, H).permute(1, 0, 3, 2)
        assert torch.equal(a, b)
        for dout in (weight, torch.ones(1).expand(B, S, H, D)):
            for x, y in zip(torch.autograd.grad(a, strided, dout, retain_graph=True),
                            torch.autograd.grad(b, plain, dout.contiguous(), retain_graph=True)):
                assert torch.equal(x, y)


DOCUMENTS = [([33, 0, 1, 16, 50], [33, 0, 1, 16, 50]), ([5, 40, 0], [20, 17, 9]), ([34], [1]), ([0, 0], [0, 3])]


@interpreter
@pytest.mark.parametrize("rows, keys", DOCUMENTS)
@pytest.mark.parametrize("window", [(-1, -1), (10, 0)])
def test_packed_documents_equal_each_alone(dirty, rows, keys, window):
    q, k, v = make(1, sum(rows), sum(keys), 2, 1, 16)
    q, k, v = (x.detach()[0].requires_grad_() for x in (q, k, v))
    cu_q, cu_k = (torch.tensor([0, *x], dtype=torch.int32).cumsum(0, dtype=torch.int32) for x in (rows, keys))
    dout, dlse = torch.randn_like(q), torch.randn(2, sum(rows))

    def packed(q, k, v):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max(rows), max(keys), causal=True, window_size=window,
                                      return_lse=True)

    def one_by_one(q, k, v):
        parts = [flash_attn_func(a[None], b[None], c[None], causal=True, window_size=window, return_lse=True)
                 for a, b, c in zip(q.split(rows), k.split(keys), v.split(keys))]
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=-1)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    ours, true = with_gradients(packed, [q, k, v], dout, dlse), with_gradients(one_by_one, wide, dout, dlse)
    assert all(largest(a, b) < 1e-4 for a, b in zip(ours, true))
    reference = with_gradients(packed, wide, dout, dlse)  # float64: the reference's own loop over documents
    assert all(largest(a, b) < 1e-12 for a, b in zip(reference, true))


@interpreter
def test_no_document_sees_what_another_holds():
    """Not even NaN crosses: a tile that reaches into the next document must not multiply 0 by what lies there."""
    q, k, v = (x.detach()[0] for x in make(1, 60, 60, 1, 1, 16))
    cu = torch.tensor([0, 23, 60], dtype=torch.int32)
    clean = flash_attn_varlen_func(q, k, v, cu, cu, 37, 37, causal=True)
    for x in (q, k, v):
        x[23:] = math.nan
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_varlen_func(*inputs, cu, cu, 37, 37, causal=True)
    assert torch.equal(out[:23], clean[:23])
    assert all(x[:23].isfinite().all() for x in torch.autograd.grad(out, inputs, torch.ones_like(out)))


@interpreter
def test_split_keys_merge_through_lse():
    """Attention over two halves of the keys, weighted by exp(LSE), is attention over all, gradients included."""
    q, k, v = make(1, 20, 40, 1, 1, 16)

    def merged(q, k, v):
        parts = [flash_attn_func(q, x, y, return_lse=True) for x, y in zip(k.split(20, 1), v.split(20, 1))]
        lse = torch.stack([s for _, s in parts])
        weights = lse.softmax(0).transpose(2, 3)[..., None]  # (2, B, S, H, 1)
        return sum(w * o for w, (o, _) in zip(weights, parts)), lse.logsumexp(0)
    dout, dlse = torch.randn(1, 20, 1, 16), torch.randn(1, 1, 20)
    whole = with_gradients(lambda *x: flash_attn_func(*x, return_lse=True), [q, k, v], dout, dlse)
    assert all(largest(a, b) < 1e-5 for a, b in zip(with_gradients(merged, [q, k, v], dout, dlse), whole))


def test_memory_is_linear_in_length(monkeypatch):
    """Above inputs: out, dq, dk, dv, and per row and head LSE, its gradient and two companions. The kernels, which
    allocate nothing, are left out, so that lengths whose scores would take 69 GB can be counted."""
    monkeypatch.setattr(fa, "_launch", lambda *_: None)
    monkeypatch.setattr(fa, "_kernel_runs_on", lambda _: True)
    for S in (1000, 131072):
        q, k, v, dout = (torch.empty(1, S, 2, 64, dtype=torch.float16) for _ in range(4))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        peak = peak_bytes(lambda: torch.autograd.grad(flash_attn_func(*inputs, causal=True), inputs, dout))
        assert peak == 4 * S * 2 * 64 * 2 + 4 * 4 * S * 2


@interpreter
def test_backward_gives_the_same_bits_each_time():
    inputs = make(1, 70, 70, 4, 1, 16)
    dout = torch.randn(1, 70, 4, 16)
    runs = [with_gradients(lambda *x: flash_attn_func(*x, causal=True, return_lse=True), inputs, dout)
            for _ in range(3)]
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again))


# ---- the operator


@interpreter
@pytest.mark.filterwarnings("ignore")
def test_opcheck():
    q, k, v = make(1, 20, 36, 2, 1, 16)
    torch.library.opcheck(torch.ops.glassbox.flash_attention, (q, k, v, None, None, 0.25, -1, 0))
    cu_q, cu_k = torch.tensor([0, 5, 20], dtype=torch.int32), torch.tensor([0, 30, 36], dtype=torch.int32)
    q, k, v = (x.detach()[0].requires_grad_() for x in (q, k, v))
    torch.library.opcheck(torch.ops.glassbox.flash_attention, (q, k, v, cu_q, cu_k, 0.25, 7, 0))
    out, lse = torch.ops.glassbox.flash_attention(q, k, v, cu_q, cu_k, 0.25, 7, 0)
    arguments = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, cu_q, cu_k, 0.25, 7, 0)
    torch.library.opcheck(torch.ops.glassbox.flash_attention_backward, tuple(
        x.detach() if isinstance(x, torch.Tensor) else x for x in arguments))


@interpreter
def test_full_graph_compile_and_checkpointing():
    q, k, v = (x.detach()[0].requires_grad_() for x in make(1, 40, 40, 2, 1, 16))
    cu = torch.tensor([0, 15, 40], dtype=torch.int32)

    def block(q, k, v):
        out, lse = flash_attn_varlen_func(q * 2, k, v, cu, cu, 25, 25, causal=True, return_lse=True)
        return out * 3, lse
    dout, dlse = torch.randn_like(q), torch.randn(2, 40)
    plain = with_gradients(block, [q, k, v], dout, dlse)
    compiled = with_gradients(torch.compile(block, fullgraph=True, backend="aot_eager"), [q, k, v], dout, dlse)
    again = with_gradients(lambda *x: checkpoint(block, *x, use_reentrant=False), [q, k, v], dout, dlse)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, compiled, again))


@interpreter
def test_selective_checkpointing_keeps_its_output_and_runs_it_once(monkeypatch):
    """What an operator opaque to autograd is for: a policy can name it."""
    launched, launch, operator = [], fa._launch, torch.ops.glassbox.flash_attention.default
    monkeypatch.setattr(fa, "_launch", lambda kernel, name, *rest: (launched.append(name), launch(kernel, name, *rest)))
    q, k, v = make(1, 8, 8, 1, 1, 16)

    def block(q, k, v):
        return flash_attn_func(q * 2, k, v, causal=True).sin().sum()
    expected = torch.autograd.grad(block(q, k, v), (q, k, v))
    for policy, runs in ((CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.MUST_RECOMPUTE, 2)):
        launched.clear()
        contexts = partial(create_selective_checkpoint_contexts,
                           lambda ctx, op, *a, **o: policy if op == operator else CheckpointPolicy.PREFER_RECOMPUTE)
        grads = torch.autograd.grad(checkpoint(block, q, k, v, use_reentrant=False, context_fn=contexts), (q, k, v))
        assert all(map(torch.equal, grads, expected)) and launched.count("forward") == runs


def test_flash_attentions_arguments_are_taken():
    """Those of its 2.x, by keyword as its users pass them; what is not offered is refused unless it is switched off."""
    q, k, v = (x.detach().double() for x in make(1, 5, 5, 2, 1, 8))
    cu = torch.tensor([0, 5], dtype=torch.int32)
    out, lse = flash_attn_func(q, k, v, 0.0, 0.3, True, (2, 0), return_lse=True)
    theirs = dict(dropout_p=0.0, softmax_scale=0.3, causal=True, window_size=(2, 0), softcap=0.0, alibi_slopes=None,
                  deterministic=False)
    again, again_lse, nothing = flash_attn_func(q, k, v, **theirs, return_attn_probs=True)
    packed = flash_attn_varlen_func(q[0], k[0], v[0], cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=5, max_seqlen_k=5,
                                    **theirs, block_table=None)
    assert torch.equal(out, again) and torch.equal(lse, again_lse) and nothing is None and torch.equal(out[0], packed)
    for name, value in (("softcap", 30.0), ("alibi_slopes", torch.ones(2))):
        with pytest.raises(ValueError, match=f"{name} is .*leave it out"):
            flash_attn_func(q, k, v, **{name: value})
    with pytest.raises(ValueError, match="block_table is"):
        flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 5, 5, block_table=torch.zeros(1, 1))


def test_autocast_narrows_as_pytorchs_attention_does():
    q, k, v = make(1, 8, 8, 1, 1, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning):
        out = flash_attn_func(q, k.bfloat16(), v)
        theirs = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    assert out.dtype == theirs.dtype == torch.bfloat16
    assert largest(out.detach(), theirs.transpose(1, 2).detach()) < 0.02


def test_flops_count_visible_pairs():
    inputs = make(2, 6, 10, 4, 2, 8, torch.float64)
    pairs = int(mask_of(6, 10, True, (3, 0)).sum())
    with FlopCounterMode(display=False) as counter:
        flash_attn_func(*inputs, causal=True, window_size=(3, 0)).sum().backward()
    assert counter.get_total_flops() == 4 * 8 * 4 * 2 * pairs * 7 // 2
    q, k, v = (x.detach()[0] for x in inputs)
    cu_q, cu_k = torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([0, 9, 10], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, 4, 9)
    assert counter.get_total_flops() == 4 * 8 * 4 * (2 * 9 + 4 * 1)


# ---- bad input


def bad(change):
    """flash_attn_func on good arguments with `change` made to them."""
    arguments = dict(zip("qkv", (x.detach() for x in make(2, 6, 6, 4, 2, 8))))
    return flash_attn_func(**{**arguments, **change(arguments)})


@pytest.mark.parametrize("says, change", [
    ("q has shape", lambda a: {"q": a["q"][0]}), ("v has shape", lambda a: {"v": a["v"][:, :5]}),
    ("k has batch 1", lambda a: {"k": a["k"][:1], "v": a["v"][:1]}), ("q has 4 heads and k 3", lambda a: {
        "k": a["k"][:, :, [0, 1, 1]], "v": a["v"][:, :, [0, 1, 1]]}),
    ("q has 4 heads and k 0", lambda a: {"k": a["k"][:, :, :0], "v": a["v"][:, :, :0]}),
    ("head_dim of q is 8, of k 7", lambda a: {"k": a["k"][..., :7], "v": a["v"][..., :7]}),
    ("from 1 to 256", lambda a: {n: torch.zeros(1, 2, 1, 257) for n in "qkv"}),
    ("k is torch.float16", lambda a: {"k": a["k"].half()}), ("q is torch.int64", lambda a: {n: a[n].long() for n in a}),
    ("k is on meta and q on cpu", lambda a: {"k": a["k"].to("meta")}),
    ("dropout_p is 0.1", lambda a: {"dropout_p": 0.1}),
    ("softmax_scale is -1.0", lambda a: {"softmax_scale": -1.0}), ("softmax_scale is nan", lambda a: {
        "softmax_scale": math.nan}),
    ("window_size is", lambda a: {"window_size": (-2, 0)}), ("window_size is", lambda a: {"window_size": (1,)})])
def test_bad_input_is_named(says, change):
    with pytest.raises(ValueError, match=says):
        bad(change)


@pytest.mark.parametrize("cu_q, cu_k, says", [
    ([0, 4, 3, 6], [0, 1, 2, 6], "cu_seqlens_q is .* must rise from 0 to the number of rows, 6"),
    ([0, 4, 6], [0, 2, 5], "cu_seqlens_k is"), ([1, 4, 6], [0, 2, 6], "cu_seqlens_q is"),
    ([0, 6], [0, 2, 6], "names 1 documents, cu_seqlens_k 2"),
    ([[0, 6]], [0, 6], "cu_seqlens_q is torch.int32 of shape")])
def test_bad_offsets_are_named(cu_q, cu_k, says):
    x = torch.zeros(6, 2, 8)
    with pytest.raises(ValueError, match=says):
        flash_attn_varlen_func(x, x, x, *(torch.tensor(c, dtype=torch.int32) for c in (cu_q, cu_k)), 6, 6)
    with pytest.raises(ValueError, match="cu_seqlens_q is torch.int64"):
        flash_attn_varlen_func(x, x, x, torch.tensor([0, 6]), torch.tensor([0, 6]), 6, 6)


def test_file_lives_alone_and_refuses_bad_flags(tmp_path):
    """Copied into an empty folder it checks itself, in a Python that cannot import Triton."""
    text = Path(fa.__file__).read_text(encoding="utf-8")
    (tmp_path / "flash_attention.py").write_text(text, encoding="utf-8")
    (tmp_path / "triton.py").write_text("raise ImportError('none here')", encoding="utf-8")
    run = subprocess.run([sys.executable, "-c", "import flash_attention, torch; x = torch.randn(1, 4, 2, 8).double(); "
                          "print(flash_attention.flash_attn_func(x, x, x).shape)"],
                         cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "[1, 4, 2, 8]" in run.stdout, run.stderr
    run = subprocess.run([sys.executable, "flash_attention.py", "--tune", "77"], cwd=tmp_path, capture_output=True)
    assert run.returncode == 2


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from kernels import flash_attention as fa

class Hopper:  # what Triton asks of a GPU before it compiles
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device=None: 0

class Compiled:  # stands for a kernel; compiles instead of running
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        def compile(*arguments, **options):
            made = self.kernel.warmup(*arguments, grid=grid, **options)
            print(self.kernel.__name__, made.metadata.shared, made.asm["ptx"].count("wgmma.mma_async"))
        return compile

driver.set_active(Hopper())
fa._kernel_runs_on = lambda x: True
fa._config = lambda kernel, q: dict(zip(("M", "N", "num_warps", "num_stages"), fa.CONFIGS[9, 128, kernel]), BLOCK_D=128)
for name in ("_forward_kernel", "_dq_kernel", "_dkdv_kernel", "_tiles_kernel"):
    setattr(fa, name, Compiled(getattr(fa, name)))
x = torch.zeros(2, 64, 2, 128, dtype=torch.bfloat16, requires_grad=True)
fa.flash_attn_func(x, x, x, causal=True).sum().backward()
cu = torch.tensor([0, 64], dtype=torch.int32)
fa.flash_attn_varlen_func(x[0], x[0], x[0], cu, cu, 64, 64, causal=True, window_size=(9, 0)).sum().backward()
"""


@pytest.mark.skipif(fa.triton is None, reason="needs Triton")
def test_kernels_compile_for_a_hopper_gpu():
    """No GPU is needed for it, and it finds what the interpreter lets pass. Tensor cores serve all products, each tile
    set fits the 227 KB of shared memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=Path(fa.__file__).parents[1], env=environment,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    made = [line.split() for line in run.stdout.splitlines()]
    assert [name for name, *_ in made] == ["_forward_kernel", "_dq_kernel", "_dkdv_kernel", "_tiles_kernel",
                                           "_forward_kernel", "_tiles_kernel", "_dq_kernel", "_tiles_kernel",
                                           "_dkdv_kernel"]
    assert all(int(shared) <= 227 * 1024 for _, shared, _ in made)
    assert all(int(wgmma) > 0 for name, _, wgmma in made if name != "_tiles_kernel")


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("H, Hkv", [(4, 4), (4, 1)])
@pytest.mark.parametrize("D", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("Sq, Sk", [(1, 239), (113, 203), (127, 513), (239, 1), (799, 3), (1024, 1024)])
def test_gpu_by_flash_attentions_rule(gpu, dtype, H, Hkv, D, Sq, Sk):
    poison = torch.full((64 << 20,), math.nan, device=gpu)  # what the allocator hands out next is dirty
    del poison
    for causal, window in ((False, (-1, -1)), (True, (-1, -1)), (False, (57, 31)), (True, (64, 0))):
        by_the_rule(2, Sq, Sk, H, Hkv, D, causal, window, dtype, gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128, 256])
def test_gpu_float32_equals_float64(gpu, D):
    inputs = make(1, 300, 333, 4, 2, D, device=gpu)
    dout, dlse = torch.randn(1, 300, 4, D, device=gpu), torch.randn(1, 4, 300, device=gpu)

    def attend(q, k, v):
        return flash_attn_func(q, k, v, causal=True, window_size=(200, 0), return_lse=True)
    ours = with_gradients(attend, inputs, dout, dlse)
    true = with_gradients(attend, [x.detach().double().requires_grad_() for x in inputs], dout, dlse)
    assert all(largest(a, b) <= 1e-5 for a, b in zip(ours[:2], true[:2]))
    assert all(largest(a, b) <= 1e-4 for a, b in zip(ours[2:], true[2:]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_packed_documents_equal_each_alone(gpu, dtype):
    lengths = [700, 0, 1, 129, 64, 1030]
    q, k, v = (x.detach()[0].requires_grad_() for x in make(1, sum(lengths), sum(lengths), 4, 2, 128, dtype, gpu))
    cu = torch.tensor([0, *lengths], device=gpu).cumsum(0, dtype=torch.int32)
    dout = torch.randn_like(q)
    out = flash_attn_varlen_func(q, k, v, cu, cu, 1030, 1030, causal=True)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    parts = [flash_attn_func(a[None], b[None], c[None], causal=True)[0]
             for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths))]
    alone = torch.cat(parts)
    assert torch.equal(out, alone)
    assert all(torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(alone, (q, k, v), dout)))


@pytest.mark.gpu
def test_gpu_backward_gives_the_same_bits_20_times(gpu):
    inputs = make(2, 1000, 1000, 8, 2, 128, torch.bfloat16, gpu)
    dout = torch.randn(2, 1000, 8, 128, dtype=torch.bfloat16, device=gpu)

    def run():
        return with_gradients(lambda *x: flash_attn_func(*x, causal=True, return_lse=True), inputs, dout)
    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.gpu
def test_gpu_more_than_two_to_the_31_elements(gpu):
    """The last rows of q, k, v (2^31 elements and some each, 13 GB together) come out as they do alone."""
    S, H, D = 2**17 + 64, 128, 128
    if torch.cuda.get_device_properties(gpu).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    q, k, v = (torch.randn(1, S, H, D, dtype=torch.bfloat16, device=gpu, requires_grad=True) for _ in range(3))
    out = flash_attn_func(q, k, v, causal=True, window_size=(255, 0))
    grads = torch.autograd.grad(out, (q, k, v), torch.ones(1, device=gpu, dtype=out.dtype).expand_as(out))
    tail = [x.detach()[:, -1024:].clone().requires_grad_() for x in (q, k, v)]
    alone = flash_attn_func(*tail, causal=True, window_size=(255, 0))
    expected = torch.autograd.grad(alone, tail, torch.ones_like(alone))
    assert largest(out[:, -512:].detach(), alone[:, -512:].detach()) < 1e-2
    assert all(largest(a[:, -512:], b[:, -512:]) < 5e-2 for a, b in zip(grads, expected))


@pytest.mark.gpu
def test_gpu_memory_is_linear_in_length(gpu):
    """Above inputs, output and gradients only LSE and its two companions are held: 12 bytes per row and head."""
    def extra(S):
        q, k, v = (torch.randn(1, S, 4, 64, dtype=torch.bfloat16, device=gpu, requires_grad=True) for _ in range(3))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = flash_attn_func(q, k, v, causal=True)
        torch.autograd.grad(out, (q, k, v), torch.ones(1, device=gpu, dtype=out.dtype).expand_as(out))
        return torch.cuda.max_memory_allocated() - before
    extra(4096)
    for S in (4096, 16384):
        assert extra(S) <= 4 * S * 4 * 64 * 2 + 4 * 4 * S * 4 + (4 << 20)  # out, dq, dk, dv; lse and three like it


@pytest.mark.gpu
def test_gpu_graph_capture_and_other_devices(gpu):
    """Nothing waits for the GPU once the offsets were checked, so a CUDA graph can hold it."""
    q, k, v = (x.detach()[0] for x in make(1, 512, 512, 4, 2, 64, torch.bfloat16, gpu))
    cu = torch.tensor([0, 100, 512], dtype=torch.int32, device=gpu)
    expected = flash_attn_varlen_func(q, k, v, cu, cu, 412, 412, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_varlen_func(q, k, v, cu, cu, 412, 412, causal=True)
    out.fill_(math.nan)
    graph.replay()
    assert torch.equal(out, expected)
    with pytest.raises(ValueError, match="cu_seqlens_q is on cpu"):
        flash_attn_varlen_func(q, k, v, cu.cpu(), cu, 412, 412)


def test_operators_own_the_layout_that_compiled_graphs_expect():
    """In float64 the references gave transposed results: a compiled model that views them as (B, S, hidden) failed."""
    q, k, v = (torch.randn(2, 5, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def step(q, k, v):
        return flash_attn_func(q, k, v, causal=True).view(2, 5, 32).sin().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(q, k, v), (q, k, v)), torch.autograd.grad(step(q, k, v), (q, k, v))):
        assert a.is_contiguous() and torch.equal(a, b)
