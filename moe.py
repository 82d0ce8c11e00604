"""Mixture of experts: many SwiGLUs, of which each token sees a few, without a Python loop over them and without loss.

    p = softmax(gate(x));   y = sum over the k likeliest experts e of  w_e Expert_e(x),   w = p, or p / their sum

(Shazeer et al. 2017; Fedus et al. 2021; Mixtral and Qwen3-MoE.) Dropless: no expert has a capacity, every token gets
its k. Four steps, so that expert parallelism can put an all-to-all around the third:

    route     logits -> weights (N, k), chosen experts (N, k)
    dispatch  tokens (N, hidden) -> rows (N k, hidden), sorted by expert, with how many each has
    experts   rows -> rows, one matrix product for all experts (grouped_matmul)
    combine   rows -> (N, hidden), in the tokens' order, weighted and added

A router left alone sends all to few experts. Two losses of its logits are its counterweights; a forward in training
leaves the logits with the layers, and router_loss collects them. N = tokens, E = experts, M = rows.

    python moe.py        the products of a few loads: the loop's time and the fast path's
"""

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def router_probabilities(logits: Tensor) -> Tensor:
    """(N, E) -> (N, E), in float32 or wider: in 16 bits near ties would be decided by rounding."""
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def route(logits: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Router logits (N, E) -> weights (N, k), in float32 or wider, and chosen experts (N, k), the likeliest first."""
    weights, chosen = router_probabilities(logits).topk(k, dim=-1)
    return weights / weights.sum(-1, keepdim=True) if normalize else weights, chosen


def dispatch(tokens: Tensor, chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> rows (N k, hidden) sorted by expert, how many each expert has (E,), order (N k,).

    Row r is token order[r] // k, sent there by its choice order[r] % k."""
    order = chosen.flatten().argsort(stable=True)
    counts = torch.zeros(num_experts, dtype=torch.long, device=chosen.device)
    counts = counts.scatter_add(0, chosen.flatten(), torch.ones_like(order))  # as bincount, which waits for the GPU
    return tokens[order // chosen.shape[1]], counts, order


def combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The experts' answers (N k, hidden), put back in the tokens' order, times weights (N, k), added: (N, hidden)."""
    answers = rows[order.argsort()].unflatten(0, weights.shape)  # (N, k, hidden)
    return (answers * weights[..., None].to(rows.dtype)).sum(dim=1)


# ------------------------------------------------------------------------------------------- each expert times its rows
# rows (M, in), sorted by expert, counts (E,) of them for each; weight (E, out, in) -> (M, out).


def grouped_matmul_loop(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """One expert after the other: the truth."""
    return torch.cat([part @ matrix.T for part, matrix in zip(rows.split(counts.tolist()), weight)])


def grouped_matmul(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The same at once: by PyTorch's grouped_mm where that takes the device, dtype and sizes, else in blocks."""
    device = rows.device.type
    if torch.is_autocast_enabled(device):  # which does not know grouped_mm
        half = torch.get_autocast_dtype(device)
        rows, weight = rows.to(half), weight.to(half)
    if takes_grouped_mm(rows, weight):
        return F.grouped_mm(rows, weight.mT, offs=counts.cumsum(0).to(torch.int32))
    return blocked_matmul(rows, weight, counts)


def takes_grouped_mm(rows: Tensor, weight: Tensor) -> bool:
    """Public since PyTorch 2.10; it wants rows that begin at multiples of 16 bytes, and on a GPU bfloat16."""
    kinds = {"cuda": (torch.bfloat16,), "cpu": (torch.float32, torch.bfloat16, torch.float16)}
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    return hasattr(F, "grouped_mm") and aligned and len(rows) > 0 and rows.dtype in kinds.get(rows.device.type, ())


def blocked_matmul(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """As one bmm of equal blocks, padded with zeros. A block has the rows of an even load, M / E, so that there are at
    most 2 E blocks however uneven the load: at most twice the rows, and twice the matrices, are copied."""
    (M, E), device = (len(rows), len(weight)), rows.device
    size = max(1, math.ceil(M / E))
    blocks = (counts + size - 1) // size  # of each expert (E,)
    padding = (blocks * size - counts).cumsum(0) - (blocks * size - counts)  # that stands before its rows (E,)
    expert = torch.repeat_interleave(counts, output_size=M)  # of each row (M,)
    place = torch.arange(M, device=device) + padding[expert]  # of each row among the blocks (M,)
    matrices = weight[torch.repeat_interleave(blocks)]  # (blocks, out, in)
    padded = rows.new_zeros(len(matrices) * size, rows.shape[1]).index_copy(0, place, rows)
    return torch.bmm(padded.view(-1, size, rows.shape[1]), matrices.mT).flatten(0, 1)[place]


# ---------------------------------------------------------------------------------------------------------- the modules


class Experts(nn.Module):
    """E SwiGLUs as stacked matrices (E, out, in); expert parallelism shards dimension 0."""

    def __init__(self, num_experts: int, hidden: int, width: int):
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.up_proj = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.multiply = grouped_matmul
        for parameter in self.parameters():  # else what empty left there; model.py's initialize does better
            if not parameter.is_meta:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows (M, hidden) sorted by expert, counts (E,) of each -> (M, hidden)."""
        gate, up = self.multiply(rows, self.gate_proj, counts), self.multiply(rows, self.up_proj, counts)
        return self.multiply(F.silu(gate) * up, self.down_proj, counts)


class MoE(nn.Module):
    """Router and experts, in the place of an MLP: (..., hidden) -> (..., hidden). shared: a module that sees every
    token besides (DeepSeekMoE, Dai et al. 2024), its answer added.

    A forward with `record` set leaves the router's logits (N, E) in router_logits and clears it. Once: what backward
    computes again under activation checkpointing belongs to another graph."""

    def __init__(self, hidden: int, width: int, num_experts: int, k: int, normalize: bool, shared=None):
        super().__init__()
        self.k, self.normalize, self.record, self.router_logits = k, normalize, False, None
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        self.experts = Experts(num_experts, hidden, width)
        self.shared_experts = shared

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (N, hidden)
        logits = self.gate(tokens)  # (N, E)
        if self.record:
            self.router_logits, self.record = logits, False
        weights, chosen = route(logits, self.k, self.normalize)
        rows, counts, order = dispatch(tokens, chosen, logits.shape[1])
        y = combine(self.experts(rows, counts), order, weights)
        return (y if self.shared_experts is None else y + self.shared_experts(tokens)).view(x.shape)


# ----------------------------------------------------------------------------------------------------------- the losses


def load_balancing_loss(logits: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    """E sum_e f_e P_e with f_e = choices of expert e per token and P_e = its mean probability: k where the load is
    even, up to E where it is not (Fedus et al. 2021, eqs. 4 to 6).

    logits (N, E) of one layer; mask (N,) or (B, S): the tokens that count. transformers' load_balancing_loss_func is
    this of all layers' logits, concatenated; there one layer's load can hide another's."""
    p = router_probabilities(logits)  # (N, E)
    counts = torch.ones_like(p[:, 0]) if mask is None else mask.flatten().to(p.dtype)  # (N,) of ones and zeros
    chosen = p.topk(k, dim=-1).indices.flatten()
    f = torch.zeros_like(p[0]).index_add(0, chosen, counts.repeat_interleave(k))
    return p.shape[1] * (f @ (counts @ p)) / counts.sum().clamp(min=1) ** 2


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of logsumexp(logits)^2 over the tokens, which keeps logits small (Zoph et al. 2022, eq. 5)."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(dim=-1).square()
    return z.mean() if mask is None else (z * mask.flatten()).sum() / mask.sum().clamp(min=1)


def router_loss(model: nn.Module, aux_coef: float, z_coef: float = 0.0, mask: Tensor | None = None) -> Tensor | float:
    """Both losses with their coefficients, a mean over the layers, of the last forward in training, whose logits the
    layers then forget. 0.0 if there are none.

    It is a mean over the forward's tokens, packed or not (mask (B, S): False on padding). Where several micro batches
    or ranks make one step, each adds its own times its share of the step's tokens: then the z loss is that of the whole
    batch, and each micro batch balances its own load, as in Switch Transformers and transformers."""
    layers = [module for module in model.modules() if isinstance(module, MoE) and module.router_logits is not None]
    total = 0.0
    for layer in layers:
        logits, layer.router_logits = layer.router_logits, None
        loss = aux_coef * load_balancing_loss(logits, layer.k, mask) + z_coef * router_z_loss(logits, mask)
        total = total + loss / len(layers)
    return total


def router_loss_share(stage: nn.Module, config, tokens: int) -> Tensor | None:
    """router_loss of one forward as a part of its step's, which has `tokens` tokens in all, with config's coefficients;
    stage: the model, or a part with some of its layers. None if it has no experts."""
    seen = [m for m in stage.modules() if isinstance(m, MoE) and m.router_logits is not None]
    if not seen:
        return None
    share = len(seen) / sum(map(config.is_sparse, range(config.num_hidden_layers))) * len(seen[0].router_logits) / tokens
    return share * router_loss(stage, config.router_aux_loss_coef, config.router_z_loss_coef)


def main() -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(64, 128, 256), torch.randn(2048, 256)
    even = torch.full((64,), 32)
    one = torch.zeros(64, dtype=torch.long).index_fill(0, torch.tensor([5]), 2048)
    drawn = torch.bincount(torch.randint(64, (2048,)), minlength=64)
    print("load             loop   at once  blocks (ms)   largest difference")
    for name, counts in (("even", even), ("random", drawn), ("all on one", one)):
        times, answers = [], []
        for multiply in (grouped_matmul_loop, grouped_matmul, blocked_matmul):
            answers.append(multiply(rows, weight, counts))
            begin = time.perf_counter()
            for _ in range(5):
                multiply(rows, weight, counts)
            times.append((time.perf_counter() - begin) / 5 * 1000)
        apart = max((answer - answers[0]).abs().max().item() for answer in answers)
        print(f"{name:12} {times[0]:8.2f} {times[1]:9.2f} {times[2]:7.2f} {apart:26.1e}")


if __name__ == "__main__":
    main()
