"""optim.py against torch's own optimizers, against arithmetic by hand, and against the singular value decomposition."""

import math

import pytest
import torch

import optim

SHAPES = [(8, 8), (24, 8), (8, 24), (8, 8), (3, 5), (7,), (1, 6)]


def parameters(shapes=SHAPES, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, dtype=dtype, generator=generator)) for s in shapes]


def train(optimizer, params, steps=25, seed=2, first=0):
    """Random gradients, a function of (seed, step) alone, and a learning rate that changes on the way."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        for p in params:
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + step)
        optimizer.step()


def assert_same_path(ours, theirs, shapes=SHAPES, tolerance=1e-13):
    a, b, start = parameters(shapes), parameters(shapes), parameters(shapes)
    train(ours(a), a)
    train(theirs(b), b)
    for p, q, old in zip(a, b, start):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        assert (p - old).abs().max() > 1e-3


def test_adamw_equals_torch():
    settings = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    assert_same_path(lambda ps: optim.AdamW(ps, **settings), lambda ps: torch.optim.AdamW(ps, **settings))


@pytest.mark.parametrize("settings", [dict(), dict(d=2.0, eps=(1e-4, 0.5), beta2_decay=-0.5, weight_decay=0.3)])
def test_adafactor_equals_torch(settings):
    ours, theirs = lambda ps: optim.Adafactor(ps, **settings), lambda ps: torch.optim.Adafactor(ps, **settings)
    assert_same_path(ours, theirs)  # not for stacks of matrices, which torch clips as one: see test_moe.py


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torch(nesterov, monkeypatch):
    """torch casts to bfloat16 inside Newton-Schulz; with that cast made void, both are float64 and the same."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip(f"torch {torch.__version__} has no Muon: it came with 2.9")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    settings = dict(lr=1e-3, weight_decay=0.1, momentum=0.9, nesterov=nesterov)
    assert_same_path(
        lambda ps: optim.Muon(ps, **settings),
        lambda ps: torch.optim.Muon(ps, **settings, adjust_lr_fn="match_rms_adamw"),
        [s for s in SHAPES if len(s) == 2],
        1e-11,
    )


def test_muon_in_bfloat16_equals_torch():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip(f"torch {torch.__version__} has no Muon: it came with 2.9")
    shapes = [(32, 32), (32, 32), (96, 32), (32, 96)]
    a, b = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
    before = parameters(shapes, torch.float32)
    train(optim.Muon(a, ns_dtype=torch.bfloat16), a, steps=1)
    train(torch.optim.Muon(b, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), b, steps=1)
    for p, q, old in zip(a, b, before):
        assert (p - q).norm() < 0.02 * (q - old).norm()


def test_lion_by_hand():
    """arXiv:2302.06675, algorithm 2, one number at a time."""
    p, m, b1, b2, decay = 0.3, 0.0, 0.9, 0.99, 0.5
    tensor = torch.nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
    optimizer = optim.Lion([tensor], lr=0.1, betas=(b1, b2), weight_decay=decay)
    for step in range(20):
        g, lr = math.sin(3.0 * step + 0.5), 0.1 / (1 + step)
        c = b1 * m + (1 - b1) * g
        p = p - lr * (math.copysign(1.0, c) + decay * p)
        m = b2 * m + (1 - b2) * g
        tensor.grad, optimizer.param_groups[0]["lr"] = torch.tensor([g], dtype=torch.float64), lr
        optimizer.step()
        assert abs(tensor.item() - p) < 1e-15
        assert abs(optimizer.state[tensor]["exp_avg"].item() - m) < 1e-15


# ------------------------------------------------------------------------------------------------------ Newton-Schulz


@pytest.mark.parametrize("shape", [(1, 16, 16), (5, 16, 20), (3, 16, 64), (4, 1, 7), (2, 12, 18), (2, 12, 19)])
def test_newton_schulz_of_a_stack_equals_one_by_one(shape):
    """Both forms (c <= 1.5 r, and the r x r one) against the published loop."""
    stack = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for one, many in zip(stack, optim.newton_schulz(stack)):
        torch.testing.assert_close(many, optim.newton_schulz_reference(one), rtol=0, atol=1e-10)


def test_newton_schulz_keeps_the_singular_vectors():
    """U^T NS(U S V^T) V is diagonal, and every singular value above 1e-3 of the norm lands in [0.68, 1.21]."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(64, 24, dtype=torch.float64, generator=generator))[0]
    S = torch.logspace(0, -2.5, 24, dtype=torch.float64)
    D = U.T @ optim.newton_schulz(((U * S) @ V.T)[None])[0] @ V
    assert (D - D.diag().diag()).abs().max() < 1e-12
    assert 0.68 < D.diag().min() and D.diag().max() < 1.21


def test_newton_schulz_of_rank_deficient_float32_is_bounded():
    """Dead directions must stay dead: rounding errors in the r x r form may not grow into them."""
    for r, c in ((48, 48), (48, 160)):
        M = torch.zeros(2, r, c)
        M[:, :20] = torch.randn(2, 20, c, generator=torch.Generator().manual_seed(0))
        out = optim.newton_schulz(M)
        truth = torch.stack([optim.newton_schulz_reference(m) for m in M.double()])
        assert (out - truth).abs().max() < 1e-4
        assert optim.newton_schulz(torch.zeros(1, r, c)).eq(0).all()


def test_muon_moves_all_directions_alike_whatever_the_gradient():
    """From a gradient of condition number 100, an update of condition number < 2 and RMS ~0.2 lr, like AdamW's."""
    W = torch.nn.Parameter(torch.zeros(32, 64, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    U, _, Vt = torch.linalg.svd(torch.randn(32, 64, dtype=torch.float64, generator=generator), full_matrices=False)
    W.grad = (U * torch.logspace(0, -2, 32, dtype=torch.float64)) @ Vt
    optim.Muon([W], lr=0.1, weight_decay=0.0).step()
    values = torch.linalg.svdvals(W.detach())
    assert torch.linalg.cond(W.grad) > 99 and values.max() / values.min() < 2
    assert 0.15 < W.detach().square().mean().sqrt() / 0.1 < 0.22


def test_muon_on_a_stack_of_experts_equals_its_matrices():
    generator = torch.Generator().manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 20, 8, dtype=torch.float64, generator=generator))
    singles = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    stack.grad = torch.randn(stack.shape, dtype=torch.float64, generator=generator)
    for single, grad in zip(singles, stack.grad):
        single.grad = grad.clone()
    optim.Muon([stack]).step()
    optim.Muon(singles).step()
    torch.testing.assert_close(stack.detach(), torch.stack([s.detach() for s in singles]), rtol=0, atol=1e-12)


def test_muon_refuses_a_vector():
    with pytest.raises(ValueError, match=r"not shape \(4,\)"):
        optim.Muon([torch.nn.Parameter(torch.zeros(4))])


# ------------------------------------------------------------------------------------------------------------- builder

NAMED = {
    "model.embed_tokens.weight": (11, 8), "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.q_proj.bias": (8,), "model.layers.0.mlp.up_proj.weight": (24, 8),
    "model.layers.0.input_layernorm.weight": (8,), "lm_head.weight": (11, 8),
}


def named_parameters(dtype=torch.float64):
    return list(zip(NAMED, parameters(NAMED.values(), dtype)))


def test_weight_decay_falls_on_matrices_only():
    for name in ("adamw", "muon", "lion"):
        named = named_parameters()
        before = [p.detach().clone() for _, p in named]
        optimizer = optim.build_optimizer(name, named, lr=0.1, weight_decay=0.5)
        for _, p in named:
            p.grad = torch.zeros_like(p)
        optimizer.step()  # no gradient: what moves, decayed
        for (_, p), old in zip(named, before):
            torch.testing.assert_close(p.detach(), old * (1 - 0.1 * 0.5) if p.ndim == 2 else old, rtol=1e-15, atol=0)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    a, b = named_parameters(), named_parameters()
    train(optim.build_optimizer("muon", a, lr=0.1), [p for _, p in a])
    train(optim.build_optimizer("adamw", b, lr=0.1), [p for _, p in b])
    for (name, p), (_, q) in zip(a, b):
        assert torch.equal(p, q) == ("proj.weight" not in name), name


def test_every_optimizer_gives_its_own_result():
    results = {}
    for name in ("adamw", "muon", "lion", "adafactor"):
        named = named_parameters()
        train(optim.build_optimizer(name, named, lr=0.1), [p for _, p in named], steps=3)
        results[name] = torch.cat([p.detach().flatten() for _, p in named])
    for one in results:
        for other in results:
            assert (one == other) == torch.equal(results[one], results[other])


def test_builder_options_arrive():
    optimizer = optim.build_optimizer("muon", named_parameters(), lr=0.1, betas=(0.8, 0.9), eps=1e-6, momentum=0.7,
                                      ns_dtype=torch.float64)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["momentum"]) == ((0.8, 0.9), 1e-6, 0.7)
        assert group["ns_dtype"] == torch.float64
    assert optim.build_optimizer("lion", named_parameters(), lr=0.1).param_groups[0]["betas"] == (0.9, 0.99)
    frozen = named_parameters()
    frozen[0][1].requires_grad_(False)
    held = [p for g in optim.build_optimizer("adamw", frozen, lr=0.1).param_groups for p in g["params"]]
    assert len(held) == len(frozen) - 1


def test_unknown_optimizer_is_one_line():
    with pytest.raises(ValueError, match="sgd") as error:
        optim.build_optimizer("sgd", named_parameters(), lr=0.1)
    assert "\n" not in str(error.value) and "adafactor" in str(error.value)


# --------------------------------------------------------------------------------------------------------- 8-bit states


@pytest.mark.filterwarnings("ignore:kernels/adam8bit.py")
@pytest.mark.parametrize("paged", [False, True])
def test_adamw8bit_is_the_kernel_s_reference_to_the_bit(paged):
    from kernels.adam8bit import adam8bit_state, adam8bit_update_reference
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(70, 90, generator=generator, dtype=torch.float64)
    ours, truth, state = torch.nn.Parameter(w.clone()), w.clone(), adam8bit_state(w)
    optimizer = optim.AdamW8bit([ours], lr=0.01, betas=(0.8, 0.9), weight_decay=0.2, paged=paged)
    for step in range(1, 5):
        ours.grad = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        adam8bit_update_reference(truth, ours.grad, *state, 0.01, 0.8, 0.9, 1e-8, 0.2, step)
        assert torch.equal(ours, truth)
    for kept, tensor in zip(optimizer.state[ours].values(), state):
        assert torch.equal(kept, tensor)
    size = sum(t.numel() * t.element_size() for t in optimizer.state[ours].values())
    assert size == 2 * 6300 + 2 * 4 * 25  # two bytes a weight and two float32 for each 256


def test_adamw8bit_leaves_small_parameters_to_adamw_and_counts_steps_once():
    plain, small = torch.nn.Parameter(torch.ones(4095)), torch.nn.Parameter(torch.ones(4095))
    optimizers = optim.AdamW([plain], lr=0.1), optim.AdamW8bit([small], lr=0.1)
    for step in range(3):
        plain.grad = small.grad = torch.full((4095,), step - 0.5)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, small) and optimizers[1].param_groups[0]["step"] == 3
    assert optimizers[1].state[small].keys() == {"exp_avg", "exp_avg_sq"}


@pytest.mark.filterwarnings("ignore:kernels/adam8bit.py")
def test_adamw8bit_follows_adamw():
    """On a noisy quadratic both end at the same loss, though one of them remembers in bytes."""
    losses = {}
    for name in ("adamw", "adamw8bit"):
        generator = torch.Generator().manual_seed(1)
        W, target = torch.nn.Parameter(torch.zeros(64, 80)), torch.randn(64, 80, generator=generator)
        optimizer = optim.build_optimizer(name, [("W", W)], lr=0.02, weight_decay=0.0)
        for _ in range(150):
            W.grad = (W.detach() - target) * (1 + 0.3 * torch.randn(W.shape, generator=generator))
            optimizer.step()
        losses[name] = (W - target).square().mean().item()
    assert losses["adamw8bit"] < 0.01 and losses["adamw8bit"] < 2 * losses["adamw"] + 1e-3


def test_paged_states_live_on_the_cpu_between_steps(gpu):
    p = torch.nn.Parameter(torch.randn(128, 64, device=gpu))
    q = torch.nn.Parameter(p.detach().clone())
    optimizers = optim.AdamW8bit([p], paged=True), optim.AdamW8bit([q])
    for _ in range(3):
        p.grad = q.grad = torch.randn(128, 64, device=gpu)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(p, q)
    assert all(t.is_cpu and t.is_pinned() for t in optimizers[0].state[p].values())


# --------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:kernels/adam8bit.py")
@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor", "adamw8bit"])
def test_resume_from_state_tensors_and_step_is_bit_exact(name, dtype):
    named = named_parameters(dtype)
    optimizer = optim.build_optimizer(name, named, lr=0.1)
    train(optimizer, [p for _, p in named], steps=5)
    copy = named_parameters(dtype)
    resumed = optim.build_optimizer(name, copy, lr=0.1)
    for (_, p), (_, q) in zip(named, copy):
        q.data.copy_(p.data)
        assert all(isinstance(t, torch.Tensor) and t.dtype == dtype for t in optimizer.state[p].values())
        for key, tensor in optimizer.state[p].items():
            resumed.state[q][key] = tensor.clone()
    for ours, theirs in zip(resumed.param_groups, optimizer.param_groups):
        assert type(theirs["step"]) is int and theirs["step"] == 5
        ours["step"] = theirs["step"]
    train(optimizer, [p for _, p in named], steps=5, first=5)
    train(resumed, [p for _, p in copy], steps=5, first=5)
    for (_, p), (_, q) in zip(named, copy):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])
def test_parameter_without_gradient_keeps_value_and_state(name):
    named = named_parameters()
    optimizer = optim.build_optimizer(name, named, lr=0.1)
    train(optimizer, [p for _, p in named], steps=2)
    p = named[1][1]
    value, state = p.detach().clone(), {k: t.clone() for k, t in optimizer.state[p].items()}
    moved = named[3][1].detach().clone()
    p.grad = None
    optimizer.step()
    assert torch.equal(p, value) and not torch.equal(named[3][1], moved)
    assert state.keys() == optimizer.state[p].keys()
    assert all(torch.equal(t, optimizer.state[p][k]) for k, t in state.items())
    steps = [g["step"] for g in optimizer.param_groups]
    for _, q in named:
        q.grad = None
    optimizer.step()  # nothing to do: no group's count may move
    assert steps == [g["step"] for g in optimizer.param_groups]


# ----------------------------------------------------------------------------------------------------------- schedules


def rates(schedule, max_steps=101, warmup_steps=0, **options):
    options |= dict(schedule=schedule, lr=1.0, min_lr=0.1, warmup_steps=warmup_steps, max_steps=max_steps)
    return [optim.learning_rate(step, **options) for step in range(max_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_then_peak_then_minimum(schedule):
    for warmup_steps in (0, 1, 10):
        r = rates(schedule, warmup_steps=warmup_steps)
        assert r[:warmup_steps] == [(k + 1) / warmup_steps for k in range(warmup_steps)]
        assert r[max(warmup_steps - 1, 0)] == 1.0
        assert r[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1, abs=1e-15)
        assert all(a >= b for a, b in zip(r[max(warmup_steps - 1, 0) :], r[max(warmup_steps, 1) :]))


def test_schedule_values():
    assert rates("linear")[50] == pytest.approx(0.55)  # halfway
    assert rates("linear")[75] == pytest.approx(0.1 + 0.9 * 0.25)
    assert rates("cosine")[25] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates("cosine", warmup_steps=11)[10 + 45] == pytest.approx(0.55)
    wsd = rates("wsd", max_steps=100)  # decays over the last 20 updates
    assert wsd[:80] == [1.0] * 80
    assert wsd[80:] == pytest.approx([0.1 + 0.9 * k / 20 for k in range(19, -1, -1)])
    assert rates("wsd", max_steps=100, decay_fraction=0.5)[49:51] == pytest.approx([1.0, 0.1 + 0.9 * 49 / 50])
    assert rates("wsd", max_steps=100, decay_fraction=1.0) == pytest.approx(rates("linear", max_steps=100))


def test_schedule_edges():
    for schedule in ("cosine", "linear", "wsd"):
        assert rates(schedule, max_steps=1) == [1.0]
        assert rates(schedule, max_steps=5, warmup_steps=5)[-1] == 1.0  # warm-up to the end: nothing left to decay
        late = dict(schedule=schedule, lr=1.0, min_lr=0.1, warmup_steps=2, max_steps=10)
        assert optim.learning_rate(500, **late) == pytest.approx(0.1)  # past the end it stays there
    with pytest.raises(ValueError, match="cosine, linear, wsd or constant"):
        rates("cosin")


# ------------------------------------------------------------------------------------------------------------ clipping


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_equals_torch(max_norm, dtype):
    a, b = parameters(dtype=dtype), parameters(dtype=dtype)
    for p, q in zip(a[1:], b[1:]):  # the first has no gradient
        p.grad, q.grad = p.detach().clone(), p.detach().clone()
    norm = optim.clip_grad_norm(iter(a), max_norm)
    truth = torch.nn.utils.clip_grad_norm_(b, max_norm)
    torch.testing.assert_close(norm, truth)
    for p, q in zip(a[1:], b[1:]):
        torch.testing.assert_close(p.grad, q.grad)
    after = math.sqrt(sum(p.grad.double().square().sum().item() for p in a[1:]))
    assert after == pytest.approx(min(max_norm, norm.item()), rel=1e-5)


def test_clip_zero_measures_only():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert optim.clip_grad_norm([p], 0.0).item() == 5.0
    assert p.grad.tolist() == [3.0, 4.0]
    assert optim.clip_grad_norm([torch.nn.Parameter(torch.zeros(2))], 1.0).item() == 0.0


def test_clip_sums_half_precision_in_float32():
    p = torch.nn.Parameter(torch.zeros(300_000, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    norm = optim.clip_grad_norm([p], 1.0)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(math.sqrt(300_000), rel=1e-5)
