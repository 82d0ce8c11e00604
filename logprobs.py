"""Log-probabilities of tokens, and what is made of them: the pure functions under every post-training loss.

    log p(y_t | y_<t, x) = logits[t, y_t] - logsumexp(logits[t, :])          token_logprobs     (B, S, V) -> (B, S)
    log p(y | x)         = sum over the tokens that count                    sequence_logprobs  (B, S, V) -> (B,)
                           ... when several sequences share a row            segment_sums       (B, S)    -> (n,)

Labels are aligned: labels[b, t] is the token that logits[b, t] predicts, -100 where nothing counts, such as a prompt.
So a stage is a few lines on top:

    SFT        loss = -token_logprobs(logits, labels).sum() / number of counted tokens of the global batch
    DPO        sums, lengths = sequence_logprobs(logits, labels); ratio = sums - the reference model's sums
    PPO, GRPO  logp = token_logprobs(logits, labels, temperature); mask = labels != -100; masked_mean(..., mask)

Nothing is computed below the precision of its input, or below float32 for 16-bit logits.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # label of a position that does not count
BLOCK = 1 << 24  # logits taken at a time: 64 MiB in float32


def padded(sequences: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """(ids, mask) of each sequence, mask 1 where the token counts -> input_ids, labels (B, S) int64, one a row.

    Padded on the right, where a causal model's other positions do not look; S = the longest sequence's length - 1.
    """
    S = max(len(ids) for ids, _ in sequences) - 1
    input_ids = torch.zeros(len(sequences), S, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE)
    for row, (ids, mask) in enumerate(sequences):
        input_ids[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels[row, : len(ids) - 1] = torch.tensor([i if m else IGNORE for i, m in zip(ids[1:], mask[1:])])
    return input_ids, labels


def by_length(order, items: list, size: int, rank: int = 0, ranks: int = 1) -> list[list[int]]:
    """The numbers of items in `order`, those of the smallest .length first, in micro batches of `size`: hardly anything
    is padding then. Of several ranks each takes every ranks-th, and so has as much work."""
    order = sorted(order, key=lambda k: items[k].length)[rank::ranks]
    return [order[i : i + size] for i in range(0, len(order), size)]


@torch.no_grad()
def score_all(score, items: list, size: int, run=None) -> Tensor:
    """score(some items) -> (B, ...), for all of them, `size` of like .length at a time -> (N, ...), on every rank.

    run: of parallel.parallelize; its data-parallel ranks share the work."""
    batches, found = by_length(range(len(items)), items, size), None
    rank, ranks = (run.mesh.rank("dp"), run.mesh.size("dp")) if run else (0, 1)
    for k in range(rank, -(-len(batches) // ranks) * ranks, ranks):
        scores = score([items[i] for i in batches[k % len(batches)]])  # some at last in vain: ZeRO-3 gathers in step
        found = scores.new_zeros(len(items), *scores.shape[1:]) if found is None else found
        if k < len(batches):
            found[batches[k]] = scores
    return run.total(found).to(found) if run else found


def _in_blocks(function, logits: Tensor, *rest: Tensor) -> Tensor:
    """function((rows, V) logits, (rows,) each of the rest) -> (rows,), block by block; logits (..., V) -> (...).

    A softmax keeps a second array of the logits' size for its backward pass: gigabytes at a vocabulary of 128k.
    Here each block is computed again in the backward pass, so that only the logits themselves are kept.
    """
    rows = max(1, BLOCK // logits.shape[-1])
    blocks = zip(*(x.split(rows) for x in (logits.flatten(0, -2), *(x.flatten() for x in rest))))
    parts = [checkpoint(function, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    return torch.cat(parts).view(logits.shape[:-1])


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))  # float64 stays


def token_logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the labels: logits (..., V), labels (...) int64 -> (...), 0 where -100.

    `temperature` is the one that the tokens were sampled at: at another one the policy of PPO and GRPO would not be
    the one that acted, and the ratio of the first step not 1. ValueError: shapes that do not fit, temperature <= 0.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels must have the shape {tuple(logits.shape[:-1])}, not {tuple(labels.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}: at 0 one token has all the probability")

    def logprobs(logits: Tensor, labels: Tensor) -> Tensor:  # (rows, V), (rows,) -> (rows,)
        return -F.cross_entropy(_precise(logits) / temperature, labels, ignore_index=IGNORE, reduction="none")

    return _in_blocks(logprobs, logits, labels)


def sequence_logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log p of each row's counted tokens: logits (B, S, V), labels (B, S) -> sums (B,) and lengths (B,) int64.

    The mean log-probability of a token, of IPO, SimPO and ORPO, is sums / lengths; a row without labels has 0 and 0.
    """
    return token_logprobs(logits, labels, temperature).sum(-1), (labels != IGNORE).sum(-1)


def segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums over the sequences of a packed batch: values of N elements in all, cu_seqlens (n + 1,) from 0 to N -> (n,).

    `segment_sums(token_logprobs(logits, labels), cu_seqlens)` is sequence_logprobs of each packed sequence, and
    `segment_sums(labels != -100, cu_seqlens)` their lengths (bool and integers sum to int64). Empty segments give 0.
    """
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if (first, last) != (0, values.numel()):
        raise ValueError(f"cu_seqlens must go from 0 to {values.numel()}, not from {first} to {last}")
    values = values.flatten() if values.is_floating_point() else values.flatten().long()
    lengths = cu_seqlens.diff().to(values.device, torch.int64)
    segment = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)  # (N,): whose element it is
    return values.new_zeros(len(lengths)).index_add(0, segment, values)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of x where mask is not 0 (any dtype, broadcast to x), over all or over `dim`.

    Nothing unmasked gives 0 with gradient 0. What is masked is never touched: NaN and inf may stand there.
    """
    mask = mask.bool().expand_as(x)
    dim = tuple(range(x.ndim)) if dim is None else dim
    return x.where(mask, 0).sum(dim) / mask.sum(dim).clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over all unmasked elements; 0 where masked. PPO's advantages and rewards.

    The variance is the unbiased one (n - 1). `shift_mean=False` adds the mean again. A single element, or equal ones,
    become 0 (or their mean), not NaN.
    """
    mask = mask.bool().expand_as(x)
    mean = masked_mean(x, mask)
    centred = (x - mean).where(mask, 0)
    variance = centred.square().sum() / (mask.sum() - 1).clamp(min=1)
    whitened = centred * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else (whitened + mean).where(mask, 0)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str = "k1") -> Tensor:
    """Estimates of KL(policy || reference) from samples of the policy, element by element (Schulman 2020,
    http://joschu.net/blog/kl-approx.html), with D = logp - ref_logp:

        k1 = D                  unbiased, often negative      as a loss: its expected gradient is 0, it does nothing
        k2 = D^2 / 2            biased, never negative        as a loss: the gradient of KL(policy || reference)
        k3 = exp(-D) - 1 + D    unbiased, never negative      as a loss: the gradient of KL(reference || policy)

    So k1 or k3 to report or to put into a reward, k2 to minimise the reverse KL by autograd on the policy's samples.
    """
    difference = logp - ref_logp
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        return torch.expm1(-difference) + difference  # expm1: exact near 0, where most tokens lie
    raise ValueError(f"kind must be k1, k2 or k3, not {kind!r}")


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, finite and precise up to 0 (Maechler 2012): the log of "not this token"."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny ** 0.5)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats: (..., V) -> (...). A logit of -inf is a token that cannot occur."""

    def of_rows(logits: Tensor) -> Tensor:  # (rows, V) -> (rows,)
        logp = _precise(logits).log_softmax(-1)
        return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)  # 0 log 0 = 0, also for the gradient

    return _in_blocks(of_rows, logits)
