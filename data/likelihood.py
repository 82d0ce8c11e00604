"""Log-likelihoods of continuations, as multiple choice by likelihood and rolling perplexity need them.

    log p(continuation | context) = sum over its tokens t of log softmax(logits)[t], each given all tokens before it

    pairs = [encode_pair(tokenizer, "The sky is", " " + choice) for choice in ("blue", "green")]
    for place, (logp, greedy) in likelihoods(model, pairs, batch_size=16):      # greedy: is it what argmax would give?
        print(place, logp)

Texts become tokens as in lm-evaluation-harness, so that its figures are met exactly. What makes it faster: a context is
read once for all its continuations (a KV cache holds it), examples with which all contexts of a batch begin are read
once for all of them, and logits are computed for the continuations' tokens alone.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

HEAD = 32  # contexts that begin with the same so many tokens are scored together
Pair = tuple[list[int], list[int]]  # token ids of a context and of its continuation


def encode_pair(tokenizer, context: str, continuation: str, begin: int, prefix: Sequence[int] = ()) -> Pair:
    """Token ids of a context and of what follows, as lm-evaluation-harness cuts them.

    Blanks at the context's end move to the continuation, for most tokens begin with theirs. Both are encoded as one
    text, and what lies behind the context's own tokens is the continuation. `prefix` comes before the context; an empty
    one is the token `begin`, for something must come before. ValueError: no token is left for the continuation."""
    blanks = len(context) - len(context.rstrip())
    context, continuation = context[: len(context) - blanks], context[len(context) - blanks :] + continuation
    first = tokenizer.encode(context)
    rest = tokenizer.encode(context + continuation)[len(first):]
    if not rest:
        raise ValueError(f"the continuation {continuation!r} has no tokens of its own")
    return ([*prefix, *first] if first else [begin]), rest


def rolling_windows(ids: list[int], prefix: int, size: int) -> list[Pair]:
    """(context, continuation) pairs that predict each token once, in inputs of at most `size` tokens.

    Windows are disjoint, with one token of context, first `prefix`; only the last, shorter one sees more before it."""
    windows = [([prefix], ids[:size])]
    for start in range(size, len(ids), size):
        end = min(start + size, len(ids))
        windows.append((ids[end - size - 1 : start], ids[start:end]))
    return windows


def fit(context: list[int], continuation: list[int], size: int) -> Pair:
    """Cut the context at its beginning, so that all tokens but the last, which is only predicted, are at most `size`.

    ValueError: a continuation that alone is longer."""
    if len(continuation) > size:
        raise ValueError(f"a continuation of {len(continuation)} tokens does not fit into {size}")
    return context[max(0, len(context) + len(continuation) - size - 1) :], continuation


def likelihood_batches(pairs: list[Pair], batch_size: int) -> Iterator[list[int]]:
    """The places of all pairs, up to batch_size at a time: those of one context together, with those whose contexts
    begin alike (the same examples), with those of similar length; the longest first, so that memory fails early."""
    groups = {}
    for i, (context, _) in enumerate(pairs):
        groups.setdefault(tuple(context), []).append(i)
    heads = Counter(context[:HEAD] for context in groups if len(context) > HEAD)

    def head(context: tuple) -> tuple:
        return context[:HEAD] if heads[context[:HEAD]] > 3 else ()

    def order(context: tuple):
        return head(context), len(context) + max(len(pairs[i][1]) for i in groups[context])

    batch, last = [], ()
    for context in sorted(groups, key=order, reverse=True):
        group = sorted(groups[context], key=lambda i: -len(pairs[i][1]))
        if batch and (len(batch) + len(group) > batch_size or head(context) != last):
            yield batch
            batch = []
        last = head(context)
        for i in group:
            if len(batch) == batch_size:
                yield batch
                batch = []
            batch.append(i)
    if batch:
        yield batch


def likelihoods(model, pairs: list[Pair], *, batch_size: int = 16, new_cache: Callable | None = None,
                autocast=None) -> Iterator[tuple[int, tuple[float, bool]]]:
    """(place, (log p(continuation | context), whether greedy decoding gives the continuation)) of each pair, as they
    come: in the order of likelihood_batches. No figure depends on batch_size, but for rounding.

    model: has hidden(input_ids, kv_cache=None) -> (B, S, hidden), lm_head and parameters(). new_cache(rows, tokens):
    an empty KV cache for it; without one every context is read anew for each continuation. No side of a pair may be
    empty. Log-probabilities are float32 (float64 for such a model), their sums float64. ValueError: one that is not
    finite."""
    training = model.training
    model.eval()
    try:
        for batch in likelihood_batches(pairs, batch_size):
            yield from zip(batch, score(model, [pairs[i] for i in batch], new_cache, autocast))
    finally:
        model.train(training)


@torch.no_grad()
def score(model, batch: list[Pair], new_cache: Callable | None = None, autocast=None) -> list[tuple[float, bool]]:
    """(log p, greedy) of each pair of a batch."""
    with autocast or contextlib.nullcontext():
        contexts = list(dict.fromkeys(tuple(context) for context, _ in batch))
        shared = shared_beginning(contexts)
        repeated = sum(len(context) for context, _ in batch) - sum(map(len, contexts)) + shared * (len(contexts) - 1)
        if new_cache and 4 * repeated > sum(len(context) + len(rest) for context, rest in batch):
            states = states_with_cache(model, batch, contexts, shared, new_cache)
        else:  # a cache costs more than it saves
            states = plain_states(model, batch)
        targets = torch.tensor([token for _, rest in batch for token in rest], device=states.device)  # (N,)
        logprobs, hits = [], []
        for part, target in zip(states.split(2048), targets.split(2048)):  # as logits of a large vocabulary are large
            logits = model.lm_head(part)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logprobs.append(logits.log_softmax(-1).gather(1, target[:, None])[:, 0])
            hits.append(logits.argmax(-1) == target)
    lengths = [len(rest) for _, rest in batch]
    found = [(float(logp.double().sum()), bool(hit.all())) for logp, hit in
             zip(torch.cat(logprobs).cpu().split(lengths), torch.cat(hits).cpu().split(lengths))]
    if not all(math.isfinite(logp) for logp, _ in found):
        raise ValueError("a log-likelihood is not finite: the model's weights are damaged, or --dtype overflowed")
    return found


def plain_states(model, batch: list[Pair]) -> Tensor:
    """The final states (N, hidden) that predict each continuation's tokens, pair after pair: the slow truth."""
    hidden = model.hidden(padded_ids(model, [context + rest[:-1] for context, rest in batch]))
    return torch.cat([row[len(context) - 1 :][: len(rest)] for row, (context, rest) in zip(hidden, batch)])


def states_with_cache(model, batch: list[Pair], contexts: list[tuple], shared: int, new_cache: Callable) -> Tensor:
    """The same states by way of a KV cache: the contexts' shared beginning once, the rest of each context once, then
    the continuations, each on a copy of its context's keys and values."""
    room = max(map(len, contexts)) + max(len(rest) for _, rest in batch)
    cache = new_cache(1 if shared else len(contexts), room)
    device = cache.lengths.device

    def copy_rows(rows: list[int]) -> None:
        at = torch.tensor(rows, device=device)
        cache.k, cache.v = cache.k[:, at], cache.v[:, at]
        cache.set_lengths(cache.lengths[at])

    if shared:
        model.hidden(padded_ids(model, [contexts[0][:shared]]), kv_cache=cache)
        copy_rows([0] * len(contexts))
    hidden = model.hidden(padded_ids(model, [context[shared:] for context in contexts]), kv_cache=cache)
    cache.set_lengths(torch.tensor([len(context) for context in contexts], device=device))  # padding is forgotten
    first = {context: hidden[i, len(context) - shared - 1] for i, context in enumerate(contexts)}
    longer = [i for i, (_, rest) in enumerate(batch) if len(rest) > 1]
    after = {}
    if longer:
        place = {context: i for i, context in enumerate(contexts)}
        copy_rows([place[tuple(batch[i][0])] for i in longer])
        after = dict(zip(longer, model.hidden(padded_ids(model, [batch[i][1][:-1] for i in longer]), kv_cache=cache)))
    states = []
    for i, (context, rest) in enumerate(batch):
        states.append(first[tuple(context)][None])
        if i in after:
            states.append(after[i][: len(rest) - 1])
    return torch.cat(states)


def shared_beginning(contexts: list[tuple]) -> int:
    """How many tokens all contexts begin with, leaving one of each to read; 0 if these are too few to matter."""
    low, high = min(contexts), max(contexts)  # all others lie between them in the order of words in a dictionary
    same = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    same = min(same, min(map(len, contexts)) - 1)
    return same if same >= HEAD // 2 and len(contexts) > 1 else 0


def padded_ids(model, rows: list) -> Tensor:
    """(B, S) int64 on the model's device, padded on the right, where a causal model's other tokens do not look."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=next(model.parameters()).device)
