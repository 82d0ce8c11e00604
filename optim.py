"""Optimizers and learning-rate schedules: each a plain statement of its paper's algorithm, and fast.

    AdamW      m = EMA(g), v = EMA(g^2)         W -= lr * m^ / (sqrt(v^) + eps)        2 numbers of state per weight
    AdamW8bit  the same, m and v kept in bytes                                         0.51 (of 4 bytes)
    Lion       m = EMA(g)                       W -= lr * sign(b1 m + (1 - b1) g)      1
    Adafactor  rows, columns of EMA(g^2)        W -= lr * RMS(W) * clip(g / sqrt(v))   (r + c) / rc
    Muon       m = EMA(g)                       W -= lr * 0.2 sqrt(max(r, c)) * UV^T of m = USV^T     1

Weight decay is decoupled everywhere (Loshchilov & Hutter, 2019): W *= 1 - lr * weight_decay, apart from the gradient.

State is kept simple, so that a checkpoint is too: `optimizer.state[p]` holds only tensors, in the parameter's dtype
(keep the weights in float32 or float64: a bfloat16 moment loses small gradients), and the step count is the int
`group["step"]`. A parameter whose gradient is None is passed over and keeps its state.

    python optim.py        # each optimizer on a small ill-conditioned problem
"""

import math
from collections import defaultdict

import torch
from torch import Tensor


def _with_gradients(group: dict) -> list[Tensor]:
    """The group's parameters that take part in this step; the group's count moves only if there are any."""
    params = [p for p in group["params"] if p.grad is not None]
    group["step"] += bool(params)
    return params


def _state(optimizer, params: list[Tensor], name: str) -> list[Tensor]:
    """The state tensor `name` of each parameter, zeros at first."""
    for p in params:
        if name not in optimizer.state[p]:
            optimizer.state[p][name] = torch.zeros_like(p)
    return [optimizer.state[p][name] for p in params]


# --------------------------------------------------------------------------------------------------------------- AdamW


def adamw_step(optimizer: torch.optim.Optimizer, group: dict) -> None:
    """One AdamW update of a group with lr, betas, eps and weight_decay (arXiv:1711.05101, algorithm 2)."""
    params = _with_gradients(group)
    if not params:
        return
    grads = [p.grad for p in params]
    m, v = _state(optimizer, params, "exp_avg"), _state(optimizer, params, "exp_avg_sq")
    (beta1, beta2), lr, t = group["betas"], group["lr"], group["step"]
    # `_foreach_` = one call over the whole list: a model has hundreds of small tensors, and Python would dominate.
    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(m, grads, 1 - beta1)  # m = b1 m + (1 - b1) g
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, grads, grads, 1 - beta2)  # v = b2 v + (1 - b2) g^2
    denominator = torch._foreach_sqrt(v)
    torch._foreach_div_(denominator, math.sqrt(1 - beta2**t))  # EMAs that start at zero are short by 1 - beta^t
    torch._foreach_add_(denominator, group["eps"])
    torch._foreach_addcdiv_(params, m, denominator, -lr / (1 - beta1**t))


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay; equal to torch.optim.AdamW."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=0))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            adamw_step(self, group)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose m and v lie in 8 bits between steps, a float32 scale to each 256: kernels/adam8bit.py, which steps.

    2.03 bytes of state a weight instead of 8. Parameters under 4096 numbers (norms, biases) keep float32 moments.
    paged=True keeps the state in the CPU's memory, and brings each parameter's to its device for its step only: slower
    by the time that 4 bytes a weight take over the bus, and on the device there is never more than one parameter's.
    """

    SMALL = 4096  # numbers; below, bytes save nothing worth the rounding

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, paged=False):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=0))
        self.paged = paged

    @torch.no_grad()
    def step(self) -> None:
        from kernels.adam8bit import adam8bit_state, adam8bit_update
        names = ("exp_avg_codes", "exp_avg_absmax", "exp_avg_sq_codes", "exp_avg_sq_absmax")
        for group in self.param_groups:
            params = _with_gradients(group)
            small = [p for p in params if p.numel() < self.SMALL]
            adamw_step(self, group | {"params": small, "step": group["step"] - 1})  # this copy of the group counts again
            (beta1, beta2), settings = group["betas"], {k: group[k] for k in ("lr", "eps", "weight_decay", "step")}
            for p in (p for p in params if p.numel() >= self.SMALL):
                state = self.state[p]
                if not state:
                    state.update(zip(names, adam8bit_state(p)))
                here = [state[name].to(p.device, non_blocking=True) for name in names]
                adam8bit_update(p, p.grad, *here, beta1=beta1, beta2=beta2, **settings)
                for name, tensor in zip(names, here):
                    if self.paged and p.is_cuda and not state[name].is_pinned():
                        state[name] = torch.empty_like(tensor, device="cpu", pin_memory=True)
                    state[name] = state[name].copy_(tensor) if self.paged else tensor


# ---------------------------------------------------------------------------------------------------------------- Lion


class Lion(torch.optim.Optimizer):
    """Evolved sign momentum (Chen et al., 2023, arXiv:2302.06675, algorithm 2): every weight moves by exactly lr.

    The sign makes the update larger than AdamW's, so take lr 3 to 10 times smaller and weight_decay as much larger.
    """

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=1.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, step=0))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = _with_gradients(group)
            if not params:
                continue
            grads, m = [p.grad for p in params], _state(self, params, "exp_avg")
            (beta1, beta2), lr = group["betas"], group["lr"]
            update = torch._foreach_lerp(m, grads, 1 - beta1)  # b1 m + (1 - b1) g, sharper than the m that is kept
            torch._foreach_sign_(update)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, update, alpha=-lr)
            torch._foreach_lerp_(m, grads, 1 - beta2)


# ----------------------------------------------------------------------------------------------------------- Adafactor


class Adafactor(torch.optim.Optimizer):
    """Factored second moment (Shazeer & Stern, 2018, arXiv:1804.04235, algorithm 4); equal to torch.optim.Adafactor.

    A matrix keeps the mean of g^2 of each row and of each column (R, C); v = R C / mean(R) is their rank-1 estimate.
    Steps are relative to the weights: lr (at most 1 / sqrt(t)) times max(eps2, RMS(W)), so lr is ~1e-2, not ~1e-3.
    `d` clips the RMS of an update. As in torch, and unlike the paper, eps1 (None: the dtype's epsilon) bounds the
    divisors from below and is not added to g^2. No first moment. Of a stack (experts, r, c) each matrix goes by itself.
    """

    def __init__(self, params, lr=1e-2, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, weight_decay=weight_decay, step=0))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = _with_gradients(group)
            lr, t, (eps1, eps2) = group["lr"], group["step"], group["eps"]
            for p in params:
                g, state = p.grad, self.state[p]
                tiny = torch.finfo(p.dtype).eps if eps1 is None else eps1
                each = tuple(range(-min(p.ndim, 2), 0))  # a stack of matrices (experts): each has its own RMS
                alpha = p.square().mean(each, keepdim=True).sqrt().clamp_min(eps2) * min(lr, t**-0.5)
                p.mul_(1 - lr * group["weight_decay"])
                fresh = t ** group["beta2_decay"]  # 1 - beta2 of this step: 1 at t = 1, so no bias to correct
                if p.ndim >= 2:
                    if not state:
                        state["row_var"] = torch.zeros_like(p[..., :1])
                        state["col_var"] = torch.zeros_like(p[..., :1, :])
                    R, C = state["row_var"], state["col_var"]  # (..., r, 1), (..., 1, c)
                    R.lerp_(g.square().mean(-1, keepdim=True), fresh)
                    C.lerp_(g.square().mean(-2, keepdim=True), fresh)
                    v = (R @ C).div_(R.mean(-2, keepdim=True).clamp_min(tiny))
                else:
                    v = _state(self, [p], "variance")[0].lerp_(g.square(), fresh).clone()
                update = v.clamp_(min=tiny * tiny).rsqrt_().mul_(g)
                rms = update.square().mean(each, keepdim=True).sqrt()
                p.sub_(update.mul_(alpha / (rms / group["d"]).clamp_min(1.0)))


# ---------------------------------------------------------------------------------------------------------------- Muon

# X <- a X + b (X X^T) X + c (X X^T)^2 X pulls every singular value s in (0, 1] towards 1: s <- a s + b s^3 + c s^5.
# Keller Jordan's triple (kellerjordan.github.io/posts/muon) is steepest at zero; five steps end in about [0.7, 1.2].
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


def newton_schulz_reference(M: Tensor, coefficients=NEWTON_SCHULZ) -> Tensor:
    """Approximate U V^T of M = U S V^T, for one matrix (r, c), as published: the truth beside `newton_schulz`."""
    X = M.T if M.size(0) > M.size(1) else M
    X = X / X.norm().clamp_min(1e-7)  # Frobenius norm >= spectral norm
    for a, b, c in coefficients:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if M.size(0) > M.size(1) else X


def newton_schulz(X: Tensor, coefficients=NEWTON_SCHULZ) -> Tensor:
    """The same for a stack of wide matrices (N, r, c), r <= c, at once: small matrices one by one leave the cores idle.

    With p(A) = a I + b A + c A^2, each step is X <- p(A) X and A <- p(A) A p(A), so a stack much wider than tall may
    stay in the small r x r matrices: 17 r^3 + 2 r^2 c multiplications instead of 5 (r^3 + 2 r^2 c), less if c > 1.5 r.
    In half precision A's rounding errors would grow in that form, about twelvefold a step: it keeps to the first.
    """
    N, r, c = X.shape
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    if c <= 1.5 * r or X.dtype in (torch.bfloat16, torch.float16):
        for a, b, c in coefficients:
            A = torch.bmm(X, X.mT)  # (N, r, r)
            P = torch.baddbmm(A, A, A, beta=b, alpha=c)
            X = torch.baddbmm(X, P, X, beta=a)
        return X
    A, Q = torch.bmm(X, X.mT), None  # Q = the product of all p(A) so far
    for k, (a, b, c) in enumerate(coefficients):
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=1, dim2=2).add_(a)
        Q = P if Q is None else torch.bmm(P, Q)
        if k + 1 < len(coefficients):
            A = torch.bmm(torch.bmm(P, A), P)
    return torch.bmm(Q, X)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Keller Jordan, 2024): every direction of a weight matrix moves at the same speed.

    For hidden matrices (r, c), or stacks of them (experts, r, c); a param group with use_muon=False (embeddings, head,
    norms, biases) gets AdamW with the same lr. The update is scaled by 0.2 sqrt(max(r, c)), which gives it AdamW's
    usual RMS, so AdamW's lr and weight decay carry over (Moonlight, arXiv:2502.16982, eq. 4). Equal to
    torch.optim.Muon(adjust_lr_fn="match_rms_adamw") but for the dtype of Newton-Schulz: `ns_dtype`, by default bfloat16
    on CUDA as there (float64 excepted), the parameter's own elsewhere. ValueError for a vector in a use_muon group.
    """

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True, ns_coefficients=NEWTON_SCHULZ,
                 ns_dtype=None, betas=(0.9, 0.95), eps=1e-8):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
                                      ns_coefficients=ns_coefficients, ns_dtype=ns_dtype, betas=betas, eps=eps,
                                      use_muon=True, step=0))
        for group in self.param_groups:
            for p in group["params"] if group["use_muon"] else ():
                if p.ndim < 2:
                    raise ValueError(f"Muon orthogonalises matrices, not shape {tuple(p.shape)}: set use_muon=False")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            self._muon_step(group) if group["use_muon"] else adamw_step(self, group)

    def _muon_step(self, group: dict) -> None:
        params = _with_gradients(group)
        if not params:
            return
        grads, m = [p.grad for p in params], _state(self, params, "momentum_buffer")
        torch._foreach_lerp_(m, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, m, group["momentum"]) if group["nesterov"] else m
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        stacks = defaultdict(list)  # matrices of one shape, tall ones transposed, are orthogonalised together
        for p, update in zip(params, updates):
            tall = p.size(-2) > p.size(-1)
            X = update.mT if tall else update
            stacks[X.shape[-2:], p.device, p.dtype].append((p, X.reshape(-1, *X.shape[-2:]), tall))
        for ((r, c), device, dtype), members in stacks.items():
            half = device.type == "cuda" and dtype != torch.float64
            ns_dtype = group["ns_dtype"] or (torch.bfloat16 if half else dtype)
            scale = 0.2 * math.sqrt(c)  # c = max(r, c)
            at_once = max(1, 2**24 // members[0][0].numel())  # 16 M elements: bounds the copies; more is no faster
            for k in range(0, len(members), at_once):
                some, Xs, talls = zip(*members[k : k + at_once])
                UVt = newton_schulz(torch.cat(Xs).to(ns_dtype), group["ns_coefficients"]).to(dtype)  # (N, r, c)
                UVt = [(O.mT if tall else O).view(p.shape)
                       for p, O, tall in zip(some, UVt.split([len(X) for X in Xs]), talls)]
                torch._foreach_add_(some, UVt, alpha=-group["lr"] * scale)


# -------------------------------------------------------------------------------------------------- what a stage calls


def build_optimizer(name, named_parameters, *, lr, weight_decay=0.1, betas=None, eps=1e-8, momentum=0.95,
                    ns_dtype=None, paged=False) -> torch.optim.Optimizer:
    """Optimizer `name` (adamw, adamw8bit, muon, lion, adafactor) over `named_parameters` [(name, tensor)], in groups.

    Weight decay falls on matrices (ndim >= 2) only: pulling a norm's gain or a bias to zero serves nothing. Muon takes
    the hidden matrices; the embedding and the head, whose rows are tokens and not directions, stay with AdamW.
    `betas=None` is each optimizer's own default. `eps` is AdamW's, `paged` AdamW8bit's. The lr of one suits not the
    other: Lion wants 3 to 10 times less than AdamW, Adafactor about 1e-2 (it is relative to the weights), Muon and
    AdamW8bit the same as AdamW.
    """
    groups = defaultdict(list)  # (is a hidden matrix for Muon, is decayed) -> parameters
    for key, p in named_parameters:
        if p.requires_grad:
            hidden = p.ndim >= 2 and "embed_" not in key and "lm_head" not in key
            groups[name == "muon" and hidden, p.ndim >= 2].append(p)
    params = [dict(params=ps, use_muon=muon, weight_decay=weight_decay if decayed else 0.0)
              for (muon, decayed), ps in groups.items()]
    betas = {} if betas is None else {"betas": tuple(betas)}
    if name == "adamw":
        return AdamW(params, lr=lr, eps=eps, **betas)
    if name == "muon":
        return Muon(params, lr=lr, momentum=momentum, ns_dtype=ns_dtype, eps=eps, **betas)
    if name == "lion":
        return Lion(params, lr=lr, **betas)
    if name == "adafactor":
        return Adafactor(params, lr=lr)
    if name == "adamw8bit":
        return AdamW8bit(params, lr=lr, eps=eps, paged=paged, **betas)
    raise ValueError(f"--optimizer must be adamw, adamw8bit, muon, lion or adafactor, not {name!r}")


def learning_rate(step: int, *, schedule: str, lr: float, min_lr: float, warmup_steps: int, max_steps: int,
                  decay_fraction: float = 0.2) -> float:
    """Learning rate of update `step` (0-based). All but constant rise to lr, then reach min_lr at update max_steps - 1.

    warm-up   lr (step + 1) / warmup_steps, so that update warmup_steps - 1 has lr; without warm-up update 0 has it
    cosine    half a cosine from lr to min_lr (Loshchilov & Hutter, arXiv:1608.03983)
    linear    a straight line from lr to min_lr
    wsd       warm-up, stable, decay (MiniCPM, arXiv:2404.06395): lr, then a straight line to min_lr over the last
              `decay_fraction` of all steps; what stands before the decay may be trained on for longer
    constant  warm-up, then lr
    """
    if schedule not in ("cosine", "linear", "wsd", "constant"):
        raise ValueError(f"--schedule must be cosine, linear, wsd or constant, not {schedule!r}")
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    decay_steps = max_steps - max(warmup_steps, 1)  # from the last update with lr to the last of all
    if schedule == "wsd":
        decay_steps = min(decay_steps, round(decay_fraction * max_steps))
    left = max(max_steps - 1 - step, 0)  # updates to come after this one
    part = min(left / decay_steps, 1.0) if decay_steps > 0 else 1.0  # of the way from min_lr up to lr
    if schedule == "cosine":
        part = 0.5 - 0.5 * math.cos(math.pi * part)
    return min_lr + (lr - min_lr) * part


@torch.no_grad()
def clip_grad_norm(parameters, max_norm: float) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most max_norm; returns the norm before (a 0-d tensor).

    Equal to torch.nn.utils.clip_grad_norm_. Summed in float64 if there are float64 gradients, else in float32.
    max_norm=0 measures only. A norm that is not finite leaves gradients that are not: check before the step.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    norms = torch._foreach_norm([g if g.dtype == dtype else g.to(dtype) for g in grads])
    norm = torch.linalg.vector_norm(torch.stack([n.to(grads[0].device) for n in norms]))
    if max_norm > 0:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp_max(1.0))
    return norm


def main() -> None:
    """|W X - Y|^2 with inputs X of very unequal sizes: where a plain gradient step crawls along the small ones."""
    print(f"{'optimizer':<10} {'lr':>6}   loss after 0, 50, 100, 200 updates")
    for name, lr in (("adamw", 0.03), ("lion", 0.01), ("adafactor", 0.1), ("muon", 0.03)):
        torch.manual_seed(0)
        W = torch.nn.Parameter(torch.randn(32, 64) / 8)
        X = torch.logspace(0, -2, 64)[:, None] * torch.randn(64, 256)
        Y = torch.randn(32, 64) @ X
        optimizer, losses = build_optimizer(name, [("W", W)], lr=lr, weight_decay=0.0), []
        for step in range(201):
            optimizer.zero_grad()
            loss = (W @ X - Y).square().mean()
            loss.backward()
            losses.append(loss.item())
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, schedule="linear", lr=lr, min_lr=0.0, warmup_steps=10, max_steps=201)
            optimizer.step()
        print(f"{name:<10} {lr:>6g}   " + "  ".join(f"{losses[k]:.2e}" for k in (0, 50, 100, 200)))


if __name__ == "__main__":
    main()
