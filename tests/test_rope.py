"""kernels/rope.py: the kernel against float64, its reference against complex numbers; positions, strides, bad input."""

import math
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernel_checks
import model
from kernel_checks import DEVICE, HALF, assert_close, dirty_memory, random  # noqa: F401  the fixture is used
from kernels import rope as module
from kernels.rope import apply_rope, rope_op, rope_reference, rope_tables, token_positions

needs_kernel = kernel_checks.needs_kernel(module)


def tables(position_ids, head_dim, dtype=torch.float32):
    return rope_tables(position_ids.to(DEVICE), head_dim, dtype=dtype)


def outputs_and_gradients(function, q, k, *rest, dtype=None):
    """[q, k, dq, dk] of q and k in `dtype`, with fixed upstream gradients."""
    q, k = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (q, k))
    out = function(q, k, *rest)
    upstream = [random(*t.shape, seed=9 + i).to(t.dtype) for i, t in enumerate(out)]
    return [*out, *torch.autograd.grad(out, (q, k), upstream)]


# ---- the reference, tables and positions
def test_reference_multiplies_complex_numbers():
    q, k = random(2, 5, 3, 8, dtype=torch.float64), random(2, 5, 1, 8, dtype=torch.float64, seed=1)
    position_ids = token_positions(2, 5, device=DEVICE)
    angles = torch.outer(torch.arange(5.0, dtype=torch.float64), 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4))
    turn = torch.polar(torch.ones_like(angles), angles).to(DEVICE)[:, None]  # (S, 1, D/2)
    for x, out in zip((q, k), rope_reference(q, k, *rope_tables(position_ids, 8, dtype=torch.float64))):
        turned = torch.complex(*x.chunk(2, dim=-1)) * turn
        assert torch.allclose(out, torch.cat((turned.real, turned.imag), dim=-1), rtol=0, atol=1e-12)


def test_by_hand():
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]], device=DEVICE)
    cos, sin = torch.tensor([[[[0.0, 0.6]]]], device=DEVICE), torch.tensor([[[[1.0, 0.8]]]], device=DEVICE)
    for function in (apply_rope, rope_reference):
        q, k = function(x, 10 * x, cos, sin)
        assert q.flatten().tolist() == pytest.approx([-3, 1.2 - 3.2, 1, 2.4 + 1.6]) and torch.allclose(k, 10 * q)


def test_same_tables_as_the_model():
    for dtype in (HALF, torch.float32, torch.float64):
        arguments = torch.tensor([[0, 1, 7, 100_000]]), 6, 500.0, dtype
        assert all(map(torch.equal, rope_tables(*arguments), model.rope_tables(*arguments)))


def test_token_positions():
    assert token_positions(2, 3).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert token_positions(2, 3, 10).tolist() == [[10, 11, 12], [10, 11, 12]]
    assert token_positions(2, 3, torch.tensor([4, 0])).tolist() == [[4, 5, 6], [0, 1, 2]]
    documents = torch.tensor([0, 2, 2, 5, 8], dtype=torch.int32)  # one is empty, one goes over the end of the first row
    assert token_positions(2, 4, cu_seqlens=documents).tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]
    starts = model.segment_starts(documents, 2, 4)
    assert torch.equal(token_positions(2, 4, cu_seqlens=documents), torch.arange(8).view(2, 4) - starts)
    assert token_positions(0, 4).shape == (0, 4) and token_positions(2, 0, cu_seqlens=torch.tensor([0])).shape == (2, 0)


@pytest.mark.parametrize("cu_seqlens", [[0, 5, 3, 8], [0, 4], [1, 8], [0, 9], [[0, 8]], []], ids=str)
def test_token_positions_refuses_offsets_that_do_not_increase(cu_seqlens):
    with pytest.raises(ValueError, match="cu_seqlens must increase from 0 to batch \\* length = 8"):
        token_positions(2, 4, cu_seqlens=torch.tensor(cu_seqlens))


def test_token_positions_refuses_an_offset_into_documents():
    with pytest.raises(ValueError, match="exclude each other"):
        token_positions(2, 4, 1, torch.tensor([0, 8]))


# ---- the kernel against float64
SHAPES = [(1, 1, 1, 1, 2), (2, 5, 4, 2, 16), (1, 33, 6, 1, 80), (3, 7, 3, 3, 6), (1, 2, 5, 1, 256), (2, 70, 1, 1, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)  # (B, S, H, Hkv, D)
def test_float32_equals_float64(shape):
    B, S, H, Hkv, D = shape
    q, k = random(B, S, H, D), random(B, S, Hkv, D, seed=1)
    for position_ids in (token_positions(1, S), torch.arange(B)[:, None] * 50 + token_positions(B, S)):
        cos, sin = tables(position_ids, D)
        truth = outputs_and_gradients(rope_reference, q, k, cos.double(), sin.double(), dtype=torch.float64)
        assert_close(outputs_and_gradients(apply_rope, q, k, cos, sin), truth)
        table = tables(torch.arange(200), D)  # the same through one table over all positions
        ids = position_ids.to(DEVICE, torch.int32)
        assert_close(outputs_and_gradients(apply_rope, q, k, *table, ids), truth)
        assert_close(outputs_and_gradients(apply_rope, q, k, *(t[:, 0] for t in table), ids.long()), truth)


def test_equals_the_models_own():
    q, k = random(2, 9, 4, 16), random(2, 9, 2, 16, seed=1)
    rope = model.rope_tables(torch.arange(9, device=DEVICE)[None], 16, 1e4, torch.float32)
    assert_close(apply_rope(q, k, *rope), model.apply_rope(q, k, *rope), [1e-6] * 2)


@pytest.mark.parametrize("shape", [(2, 5, 4, 2, 16), (1, 33, 6, 1, 80)], ids=str)
def test_half_errs_at_most_twice_as_much_as_torch(shape):
    B, S, H, Hkv, D = shape
    q, k = random(B, S, H, D, dtype=HALF), random(B, S, Hkv, D, dtype=HALF, seed=1)
    rope = tables(token_positions(B, S, 90), D)
    ours, plain = (outputs_and_gradients(f, q, k, *rope) for f in (apply_rope, rope_reference))
    for a, b, t in zip(ours, plain, outputs_and_gradients(rope_reference, q, k, *rope, dtype=torch.float32)):
        slack = 2 * (t + 0.3 - 0.3 - t).abs().max()
        assert a.dtype == HALF and (a - t).abs().max() <= 2 * (b - t).abs().max() + slack


def test_packed_documents_equal_each_document_alone():
    lengths = (3, 1, 9)
    documents = torch.tensor([0, 3, 4, 13], dtype=torch.int32, device=DEVICE)
    q, k = random(13, 4, 16), random(13, 2, 16, seed=1)
    ids = token_positions(1, 13, cu_seqlens=documents)[0]
    alone = [apply_rope(a[None], b[None], *tables(token_positions(1, n), 16))
             for a, b, n in zip(q.split(lengths), k.split(lengths), lengths)]
    alone = [torch.cat([pair[side][0] for pair in alone]) for side in (0, 1)]
    assert_close(apply_rope(q, k, *tables(ids, 16)), alone, [0, 0])
    assert_close(apply_rope(q, k, *tables(torch.arange(9), 16), ids), alone, [0, 0])


def test_gradients_of_packed_tokens():
    q, k, ids = random(13, 4, 16), random(13, 2, 16, seed=1), torch.arange(13).to(DEVICE) % 5
    cos, sin = tables(torch.arange(5), 16)
    truth = outputs_and_gradients(rope_reference, q, k, cos[:, 0].double(), sin[:, 0].double(), ids, dtype=torch.float64)
    assert_close(outputs_and_gradients(apply_rope, q, k, cos, sin, ids), truth)


def test_scores_depend_on_distance_alone():
    q, k = random(1, 1, 1, 32).expand(1, 6, 1, 32), random(1, 1, 1, 32, seed=1).expand(1, 6, 1, 32)
    near, far = (apply_rope(q, k, *tables(token_positions(1, 6, offset), 32)) for offset in (0, 1000))
    scores = [torch.einsum("bshd,bthd->st", *pair) for pair in (near, far)]
    assert torch.allclose(*scores, atol=1e-3) and not math.isclose(scores[0][0, 0], scores[0][0, 3], rel_tol=0.01)


@pytest.mark.parametrize("view", [
    lambda t: t[:, :, :24].view(2, 5, 3, 8), lambda t: t.view(2, 5, 6, 8)[:, :, ::2],
    lambda t: t.view(5, 2, 6, 8).transpose(0, 1), lambda t: t.view(2, 6, 5, 8).transpose(1, 2),
    lambda t: t.view(2, 5, 6, 8).transpose(2, 3)[:, :, :, :4],
    lambda t: t[:1, :1].expand(2, 5, 48).view(2, 5, 6, 8)],
    ids=["fused projection", "steps", "sequence first", "heads first", "heads inside", "expanded"])
def test_any_strides(view):
    q, k = view(random(2, 5, 48)), view(random(2, 5, 48, seed=1))
    rope = tables(token_positions(1, 5, 3), q.shape[-1])
    truth = outputs_and_gradients(rope_reference, q, k, *(t.double() for t in rope), dtype=torch.float64)
    assert_close(outputs_and_gradients(apply_rope, q, k, *rope), truth)
    half = rope[0].shape[-1]
    for cos in (torch.stack((rope[0],) * 2, dim=-1)[..., 0], torch.cat((rope[0],) * 2, dim=-1)[..., :half]):
        assert_close(outputs_and_gradients(apply_rope, q, k, cos, rope[1]), truth)  # tables of unlike strides
    batch = [t.expand(2, -1, -1, -1) for t in rope]
    assert_close(outputs_and_gradients(apply_rope, q, k, *batch), truth)


def test_strided_upstream_gradients():
    q, k = random(2, 5, 4, 8).requires_grad_(), random(2, 5, 2, 8, seed=1).requires_grad_()
    rope, one = tables(token_positions(1, 5), 8), torch.ones(1, device=DEVICE)
    for upstream in (lambda t: one.expand(t.shape), lambda t: random(*t.shape[::-1]).permute(3, 2, 1, 0)):
        ours, truth = (torch.autograd.grad(f(q, k, *rope), (q, k), [upstream(q), upstream(k)])
                       for f in (apply_rope, rope_reference))
        assert_close(ours, truth, [1e-5] * 2)
    ours, truth = (torch.autograd.grad(f(q, k, *rope)[0].sum(), (q, k), allow_unused=True, materialize_grads=True)
                   for f in (apply_rope, rope_reference))  # k's output is used by nobody
    assert_close(ours, truth, [1e-5] * 2)


def test_backward_turns_back():
    q, k = random(1, 9, 2, 16).requires_grad_(), random(1, 9, 1, 16, seed=1).requires_grad_()
    turned = apply_rope(q, k, *tables(token_positions(1, 9), 16))
    back = torch.autograd.grad(turned, (q, k), [t.detach() for t in turned])
    assert_close(back, (q, k), [1e-5] * 2)
    assert_close((turned[0].norm(dim=-1),), (q.norm(dim=-1),), [1e-5])


@pytest.mark.parametrize("shape", [(0, 5, 4, 16), (2, 0, 4, 16), (0, 4, 16), (2, 5, 0, 16)], ids=str)
def test_empty_inputs_have_empty_outputs_and_gradients(shape):
    rope = tables(token_positions(*shape[:2]) if len(shape) == 4 else torch.arange(0), 16)
    k_shape = (*shape[:-2], shape[-2] // 2, 16)
    out = outputs_and_gradients(apply_rope, random(*shape), random(*k_shape), *rope)
    assert [t.shape for t in out] == [shape, k_shape] * 2


@needs_kernel
def test_a_position_outside_the_table_shows():
    q, k, ids = random(1, 4, 2, 8), random(1, 4, 1, 8), torch.tensor([[0, 4, -1, 3]], device=DEVICE)
    out, _ = apply_rope(q, k, *tables(torch.arange(4), 8), ids)
    assert out[0].isnan().all(dim=(1, 2)).tolist() == [False, True, True, False]
    assert out[0].isnan().any(dim=-1).any(dim=-1).tolist() == [False, True, True, False]


def test_float64_goes_to_the_reference_silently():
    q, k = random(1, 3, 2, 8, dtype=torch.float64), random(1, 3, 1, 8, dtype=torch.float64)
    rope = tables(token_positions(1, 3), 8, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(apply_rope(q, k, *rope), rope_reference(q, k, *rope), [0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_says_that_the_reference_serves(monkeypatch, dtype):
    monkeypatch.setattr(module, "INTERPRETED", module.INTERPRETED and dtype == torch.bfloat16)
    q, k, table = torch.randn(1, 3, 2, 8).to(dtype), torch.randn(1, 3, 1, 8).to(dtype), rope_tables(torch.arange(3), 8)
    with pytest.warns(UserWarning, match="rope: no Triton kernel for cpu"):
        ours = apply_rope(q, k, *table, torch.arange(3)[None])
    assert_close(ours, rope_reference(q, k, *(t[None] for t in table)), [0, 0])


# ---- as an operator
@needs_kernel
def test_opcheck():
    q, k = random(2, 3, 2, 8).requires_grad_(), random(2, 3, 1, 8, seed=1).requires_grad_()
    cos, sin = (t[:, :, 0] for t in tables(token_positions(1, 3), 8))
    torch.library.opcheck(rope_op, (q, k, cos, sin, None, False))
    torch.library.opcheck(rope_op, (q, k, cos[0], sin[0], token_positions(2, 3, device=DEVICE), True))


def test_compiles_into_one_graph():
    q, k, rope = random(2, 5, 4, 16), random(2, 5, 2, 16, seed=1), tables(token_positions(1, 5), 16)
    compiled = torch.compile(apply_rope, fullgraph=True, backend="aot_eager")
    assert_close(outputs_and_gradients(compiled, q, k, *rope), outputs_and_gradients(apply_rope, q, k, *rope), [0] * 4)


def test_activation_checkpointing_and_autocast_change_nothing():
    q, k, rope = random(2, 5, 4, 16), random(2, 5, 2, 16, seed=1), tables(token_positions(1, 5), 16)
    plain = outputs_and_gradients(apply_rope, q, k, *rope)
    again = outputs_and_gradients(lambda *a: checkpoint(apply_rope, *a, use_reentrant=False), q, k, *rope)
    assert_close(again, plain, [0] * 4)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert_close(outputs_and_gradients(apply_rope, q, k, *rope), plain, [0] * 4)


Q, K, T = torch.ones(2, 3, 4, 8), torch.ones(2, 3, 2, 8), torch.ones(1, 3, 1, 4)


@pytest.mark.parametrize("arguments, message", [
    ((Q.long(), K.long(), T, T), "q is torch.int64; it must be float16"),
    ((Q[..., :7], K[..., :7], T, T), r"q has shape \(2, 3, 4, 7\); it must be .* with an even D"),
    ((Q[0, 0], K[0, 0], T, T), r"q has shape \(4, 8\); it must be \(B, S, H, D\) or \(T, H, D\)"),
    ((Q, K[:1], T, T), r"k is torch.float32 \(1, 3, 2, 8\); it may differ from q"),
    ((Q, K[..., :6], T, T), "k is .* in heads only"),
    ((Q, K.half(), T, T), "k is torch.float16"),
    ((Q, K, T, T[:, :2]), r"sin is torch.float32 \(1, 2, 1, 4\); it must be like cos"),
    ((Q, K, T[:, :2], T[:, :2]), r"cos has shape \(1, 2, 1, 4\); q \(2, 3, 4, 8\) needs \(2, 3, 1, 4\) or \(1, 3, 1, 4\)"),
    ((Q, K, T[..., :3], T[..., :3]), "cos has shape"),
    ((Q, K, T.long(), T.long()), "cos and sin must be floating-point constants"),
    ((Q, K, T.clone().requires_grad_(), T), "they get no gradient"),
    ((Q, K, T, T, torch.zeros(2, 3).long()), r"with position_ids it must be \(P, 4\) or \(P, 1, 4\)"),
    ((Q, K, T[0], T[0], torch.zeros(2, 3)), r"position_ids is torch.float32 \(2, 3\); it must be int32 or int64"),
    ((Q, K, T[0], T[0], torch.zeros(3).long()), r"position_ids is torch.int64 \(3,\); it must be .* \(2, 3\) or \(1, 3\)"),
    ((Q, K, T.to("meta"), T), "cos is on meta, q on cpu")])
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        apply_rope(*arguments)


# ---- on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [
    (2, 2048, 32, 8, 128), (1, 1000, 28, 4, 80), (3, 333, 128, 128, 128), (2, 65, 12, 12, 256)], ids=str)
def test_gpu_sizes(gpu, dtype, shape):
    error, allowed = module.compare(gpu, dtype, shape)
    assert error <= allowed


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements(gpu, monkeypatch):
    monkeypatch.undo()  # filling gigabytes with NaN buys nothing here
    tokens = 2**31 // 4096 + 5
    if torch.cuda.mem_get_info()[0] < 7 * tokens * 4096:
        pytest.skip("needs 15 GB of GPU memory")
    q, k = (torch.randn(1, tokens, heads, 128, device=gpu, dtype=torch.bfloat16) for heads in (32, 1))
    rope = rope_tables(token_positions(1, tokens, device=gpu) % 4096, 128)
    out = apply_rope(q, k, *rope)
    tail = rope_reference(q[:, -9:], k[:, -9:], *(t[:, -9:] for t in rope))
    assert all(torch.allclose(a[:, -9:], b, rtol=0.02, atol=0.02) for a, b in zip(out, tail))


@pytest.mark.gpu
def test_gpu_compiles_with_inductor_and_repeats_to_the_bit(gpu):
    q, k = random(2, 65, 8, 64, dtype=torch.bfloat16), random(2, 65, 2, 64, dtype=torch.bfloat16, seed=1)
    rope = tables(token_positions(1, 65), 64)
    first = outputs_and_gradients(torch.compile(apply_rope, fullgraph=True), q, k, *rope)
    for _ in range(20):
        assert all(map(torch.equal, outputs_and_gradients(apply_rope, q, k, *rope), first))
