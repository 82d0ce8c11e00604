"""Context parallelism: one long sequence shared out over c ranks; only attention needs the others' tokens.

Ring attention: the keys and values travel round the ring, a block a hop, while each rank attends to the block it has.

    softmax over all blocks = blocks merged by their log-sum-exp L:
    L = log(exp L1 + exp L2),   out = exp(L1 - L) out1 + exp(L2 - L) out2            (in float32, or float64)
    forward (c - 1) hops of K and V;   backward (c - 1) hops of K and V, and c of dK and dV, which so come home

Causal attention makes contiguous pieces unequal work. Zigzag cuts the sequence into 2 c chunks and gives rank r the
chunks r and 2 c - 1 - r: the same work everywhere. For c = 4, in pairs (chunk of queries, chunk of keys) that see:

    ring    01 | 23 | 45 | 67     3, 7, 11, 15             zigzag  07 | 16 | 25 | 34     9, 9, 9, 9

Ulysses: four all-to-alls a layer, of q, k, v and out, turn (all heads, some tokens) into (some heads, all tokens), so
that any attention serves. Heads must be a multiple of c; too few key heads are repeated.

    context_parallel(model, group, "zigzag")                                           # in place
    inputs, labels = split_batch(input_ids, labels, group, "zigzag", cu_seqlens)       # labels are shifted already
    logits = model(**inputs)                                                           # (B, S / c, V)

Loss is the sum over this rank's labels / the count of all ranks', gradients are summed over the group.
Sources: Ring Attention (arXiv:2310.01889); zigzag: zhuzilin/ring-flash-attention; Ulysses (arXiv:2309.14509).
"""

import math
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

METHODS = ("zigzag", "ring", "ulysses")

# ------------------------------------------------------------------------------------------------ who has what


def chunks_of(rank: int, ranks: int, method: str) -> tuple[int, int]:
    """The two of the sequence's 2 c equal chunks that a rank holds, in this order."""
    return (rank, 2 * ranks - 1 - rank) if method == "zigzag" else (2 * rank, 2 * rank + 1)


def split(x: Tensor, rank: int, ranks: int, method: str) -> Tensor:
    """(B, S, ...) -> this rank's tokens (B, S / c, ...). ValueError: S is no multiple of 2 c."""
    if x.shape[1] % (2 * ranks):
        raise ValueError(f"sequence length {x.shape[1]} on {ranks} context-parallel ranks: it must be a multiple of "
                         f"{2 * ranks}")
    pieces = x.chunk(2 * ranks, dim=1)
    return torch.cat([pieces[i] for i in chunks_of(rank, ranks, method)], dim=1)


def unsplit(parts: list[Tensor], method: str) -> Tensor:
    """What `split` gave to rank 0, 1 ..., put together again: (B, S, ...)."""
    pieces = {}
    for rank, part in enumerate(parts):
        pieces |= zip(chunks_of(rank, len(parts), method), part.chunk(2, dim=1))
    return torch.cat([pieces[i] for i in sorted(pieces)], dim=1)


def document_starts(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """For each token the index in its row of its document's first token (B, S); row ends are boundaries."""
    token = torch.arange(batch * length, device=cu_seqlens.device)
    start = cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1].long()
    return (start - token + token % length).clamp(min=0).view(batch, length)


def split_batch(input_ids: Tensor, labels: Tensor, group, method: str, cu_seqlens: Tensor | None = None):
    """The whole batch (B, S), the same on all ranks of the group -> (arguments of model's forward, labels (B, S / c)).

    labels[i] is the token after input_ids[i], shifted before this split: at a piece's end it lies in another rank's.
    Positions are global, and restart in each document, as RoPE has them in one process. cu_seqlens stays whole.
    """
    if group is None:
        return dict(input_ids=input_ids, cu_seqlens=cu_seqlens), labels
    B, S = input_ids.shape
    positions = torch.arange(S, device=input_ids.device).expand(B, S)
    if cu_seqlens is not None:
        positions = positions - document_starts(cu_seqlens, B, S)
    input_ids, positions, labels = (
        split(x, dist.get_rank(group), dist.get_world_size(group), method) for x in (input_ids, positions, labels))
    return dict(input_ids=input_ids, position_ids=positions, cu_seqlens=cu_seqlens), labels


# -------------------------------------------------------------------------------------------- attention by blocks
# S, T: length of a chunk of queries, of keys; they are equal. G = H / Hkv query heads share a key head.


def visible_pairs(queries: tuple, keys: tuple, length: int, window: int | None) -> list[tuple[int, int]]:
    """Which of a rank's chunks of queries see which of a block's chunks of keys, at all: [(0 or 1, 0 or 1)]."""
    near = lambda a, b: window is None or (a - b - 1) * length + 1 < window  # noqa: E731  the closest two tokens
    return [(i, j) for i, a in enumerate(queries) for j, b in enumerate(keys) if b <= a and near(a, b)]


def work_units(ranks: int, method: str) -> list[int]:
    """Per rank how many pairs of chunks it computes in one causal ring attention."""
    places = [chunks_of(rank, ranks, method) for rank in range(ranks)]
    return [sum(len(visible_pairs(mine, block, 1, None)) for block in places) for mine in places]


def mask_of(a: int, b: int, length: int, window: int | None, starts: Tensor | None, device) -> Tensor | str | None:
    """What queries of chunk a see of chunk b's keys: None = all, "causal", or True where, (S, T) or (B, 1, 1, S, T)."""
    far = window is not None and (a - b + 1) * length > window
    if not far and starts is None:
        return "causal" if a == b else None
    i = a * length + torch.arange(length, device=device)[:, None]  # positions in the whole sequence
    j = b * length + torch.arange(length, device=device)
    mask = j <= i
    if far:
        mask = mask & (j > i - window)
    if starts is not None:  # not before the query's document
        mask = mask & (j >= starts[:, a * length:(a + 1) * length, None])[:, None, None]
    return mask


def scores_of(q: Tensor, k: Tensor, mask: Tensor | str | None) -> Tensor:
    """q (B, S, H, D), k (B, T, Hkv, D) -> q k^T / sqrt(D), -inf where masked: (B, Hkv, G, S, T)."""
    scores = torch.einsum("bskgd,btkd->bkgst", q.unflatten(2, (k.shape[2], -1)), k) / math.sqrt(q.shape[-1])
    if mask is None:
        return scores
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril() if isinstance(mask, str) else mask
    return scores.masked_fill(~mask, float("-inf"))


def attend_block(q, k, v, mask, kernel=None) -> tuple[Tensor, Tensor]:
    """q (B, S, H, D), k, v (B, T, Hkv, D) -> out as q, normalised within the block, and its log-sum-exp (B, S, H), -inf
    of nothing; both in float32 or 64.

    kernel(q, k, v, causal=) -> (out, log-sum-exp (B, H, S)), both differentiable, computes the blocks without a mask of
    their own; the others keep their scores in memory.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        if kernel and not isinstance(mask, Tensor):
            out, lse = kernel(q, k, v, causal=mask == "causal")
            return out.to(wide), lse.transpose(1, 2)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        scores = scores_of(q, k, mask)
        lse = scores.logsumexp(-1)  # of nothing: -inf
        weights = (scores - lse.clamp(min=torch.finfo(wide).min)[..., None]).exp()  # never -inf - -inf
        out = torch.einsum("bkgst,btkd->bskgd", weights, v)
        return out.flatten(2, 3), lse.permute(0, 3, 1, 2).flatten(2, 3)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmaxes over different keys as one over both; where both saw nothing the result is 0 and -inf."""
    total = torch.logaddexp(lse, more_lse)
    safe = total.clamp(min=torch.finfo(total.dtype).min)
    return out * (lse - safe).exp()[..., None] + more * (more_lse - safe).exp()[..., None], total


def block_gradients(q, k, v, mask, out_gradient, lse, delta, kernel=None):
    """dq, dk, dv of one block, in float32 or 64, given the log-sum-exp over *all* blocks and delta = sum over D of
    out * d out, both (B, S, H)."""
    wide = out_gradient.dtype
    with torch.autocast(q.device.type, enabled=False):
        if kernel and not isinstance(mask, Tensor):  # through merge: out = sum of exp(lse_b - lse) out_b
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in (q, k, v)]
                out, own = attend_block(*inputs, mask, kernel)
            share = (own - lse).exp()
            down = share[..., None] * out_gradient, share * ((out * out_gradient).sum(-1) - delta)
            return [g.to(wide) for g in torch.autograd.grad((out, own), inputs, [x.detach() for x in down])]
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        out_gradient, lse, delta = (x.unflatten(2, (k.shape[2], -1)) for x in (out_gradient, lse, delta))
        weights = (scores_of(q, k, mask) - lse.permute(0, 2, 3, 1)[..., None]).exp()  # (B, Hkv, G, S, T)
        dv = torch.einsum("bkgst,bskgd->btkd", weights, out_gradient)
        dweights = torch.einsum("bskgd,btkd->bkgst", out_gradient, v)
        dscores = weights * (dweights - delta.permute(0, 2, 3, 1)[..., None]) / math.sqrt(q.shape[-1])
        dq = torch.einsum("bkgst,btkd->bskgd", dscores, k).flatten(2, 3)
        return dq, torch.einsum("bkgst,bskgd->btkd", dscores, q.unflatten(2, (k.shape[2], -1))), dv


# ------------------------------------------------------------------------------------------------------- the ring


def hop(x: Tensor, group) -> tuple[Tensor, list]:
    """Start to send x to the next rank and to receive its like from the one before -> (what comes, handles)."""
    rank, ranks, came = dist.get_rank(group), dist.get_world_size(group), torch.empty_like(x)
    return came, dist.batch_isend_irecv([  # batched: on NCCL two ranks that both send first would wait for ever
        dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % ranks),
        dist.P2POp(dist.irecv, came, group=group, group_peer=(rank - 1) % ranks)])


def finish(handles: list) -> None:
    for handle in handles:
        handle.wait()


class RingAttention(torch.autograd.Function):
    """Causal attention of a sequence that lies on the ranks of a group; see ring_attention."""

    @staticmethod
    def forward(ctx, q, k, v, starts, group, method, window, kernel):
        rank, ranks, S = dist.get_rank(group), dist.get_world_size(group), q.shape[1] // 2
        mine, kv = chunks_of(rank, ranks, method), torch.stack((k, v))  # (2, B, 2 S, Hkv, D): one message a hop
        queries, wide = q.chunk(2, dim=1), torch.promote_types(q.dtype, torch.float32)
        outs = [torch.zeros_like(part, dtype=wide) for part in queries]  # of the two chunks (B, S, H, D)
        lses = [part.new_full(part.shape[:-1], float("-inf"), dtype=wide) for part in queries]
        for step in range(ranks):
            coming, handles = hop(kv, group) if step < ranks - 1 else (None, [])
            block = chunks_of((rank - step) % ranks, ranks, method)
            keys, values = (x.chunk(2, dim=1) for x in kv)
            for i, j in visible_pairs(mine, block, S, window):
                mask = mask_of(mine[i], block[j], S, window, starts, q.device)
                outs[i], lses[i] = merge(outs[i], lses[i], *attend_block(queries[i], keys[j], values[j], mask, kernel))
            finish(handles)
            kv = coming
        out, lse = torch.cat(outs, dim=1), torch.cat(lses, dim=1)
        ctx.save_for_backward(q, k, v, out, lse, starts)
        ctx.setting = group, method, window, kernel
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx, out_gradient):
        (q, k, v, out, lse, starts), (group, method, window, kernel) = ctx.saved_tensors, ctx.setting
        rank, ranks, S = dist.get_rank(group), dist.get_world_size(group), q.shape[1] // 2
        mine, kv = chunks_of(rank, ranks, method), torch.stack((k, v))
        out_gradient = out_gradient.to(out.dtype)
        given = [x.chunk(2, dim=1) for x in (out_gradient, lse, (out * out_gradient).sum(-1))]
        queries = q.chunk(2, dim=1)
        dq = [torch.zeros_like(part, dtype=out.dtype) for part in queries]
        dkv, dkv_handles = torch.zeros_like(kv, dtype=out.dtype), []  # of the block that is here
        for step in range(ranks):
            coming, handles = hop(kv, group) if step < ranks - 1 else (None, [])
            block = chunks_of((rank - step) % ranks, ranks, method)
            keys, values = (x.chunk(2, dim=1) for x in kv)
            found = torch.zeros_like(dkv)
            for i, j in visible_pairs(mine, block, S, window):
                mask = mask_of(mine[i], block[j], S, window, starts, q.device)
                more, dk, dv = block_gradients(queries[i], keys[j], values[j], mask, *(x[i] for x in given), kernel)
                dq[i] += more
                found[0, :, j * S:(j + 1) * S] += dk
                found[1, :, j * S:(j + 1) * S] += dv
            finish(dkv_handles)  # what the ranks before found for this block; it travelled while we computed
            dkv, dkv_handles = hop(dkv + found, group)
            finish(handles)
            kv = coming
        finish(dkv_handles)  # the c-th hop: home
        dq = torch.cat(dq, dim=1).to(q.dtype)
        return dq, dkv[0].to(k.dtype), dkv[1].to(v.dtype), None, None, None, None, None


def ring_attention(q, k, v, group, method: str = "zigzag", window: int | None = None, starts: Tensor | None = None,
                   kernel=None) -> Tensor:
    """Causal attention over the whole sequence: q (B, S / c, H, D), k, v (B, S / c, Hkv, D) as `split` gives -> as q.

    method: zigzag or ring. window: a token sees itself and the window - 1 before it. starts (B, S), of the whole
    sequence: the first token of each token's document. kernel: see attend_block. K and V travel in their dtype, their
    gradients in float32 or 64.
    """
    return RingAttention.apply(q, k, v, starts, group, method, window, kernel)


# -------------------------------------------------------------------------------------------------------- Ulysses


class Exchange(torch.autograd.Function):
    """All-to-all: (B, S / c, H, D) -> (B, S, H / c, D), or with to_heads=False back; backward is the other."""

    @staticmethod
    def forward(ctx, x, group, to_heads):
        ctx.group, ctx.to_heads = group, to_heads
        c = dist.get_world_size(group)
        if to_heads:
            x = x.unflatten(2, (c, -1)).permute(2, 0, 1, 3, 4)  # (c heads, B, S / c, H / c, D)
        else:
            x = x.unflatten(1, (c, -1)).transpose(0, 1)  # (c tokens, B, S / c, H / c, D)
        x = x.contiguous()
        came = torch.empty_like(x)
        dist.all_to_all_single(came, x, group=group)
        if to_heads:
            return came.transpose(0, 1).flatten(1, 2)
        return came.permute(1, 2, 0, 3, 4).flatten(2, 3)

    @staticmethod
    def backward(ctx, gradient):
        return Exchange.apply(gradient, ctx.group, not ctx.to_heads), None, None


def ulysses_attention(q, k, v, mask, dropout, attend, group) -> Tensor:
    """q (B, S / c, H, D), k, v (B, S / c, Hkv, D), contiguous pieces -> as q; attend(q, k, v, mask, dropout) sees whole
    sequences of H / c heads."""
    c, H, Hkv = dist.get_world_size(group), q.shape[2], k.shape[2]
    repeats = math.lcm(Hkv, c) // Hkv
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    q, k, v = (Exchange.apply(x, group, True) for x in (q, k, v))  # (B, S, H / c, D)
    return Exchange.apply(attend(q, k, v, mask, dropout), group, False)


def whole_mask(length: int, window: int | None, starts: Tensor | None, device) -> Tensor | None:
    """Of the whole sequence, where it is more than causal: (S, S) or (B, 1, S, S)."""
    mask = mask_of(0, 0, length, window, starts, device)
    return None if isinstance(mask, str) else mask if starts is None else mask[:, 0]


def offsets(starts: Tensor | None) -> Tensor | None:
    """The same for a kernel that takes cu_seqlens: (n + 1,) int32 over the flattened B S, row ends among them."""
    if starts is None:
        return None
    first = (starts == torch.arange(starts.shape[1], device=starts.device)).flatten().nonzero().flatten()
    return torch.cat((first, first.new_tensor([starts.numel()]))).int()


# ------------------------------------------------------------------------------------------------------- the model


def context_parallel(model: nn.Module, group, method: str = "zigzag") -> nn.Module:
    """Let a CausalLM attend across the group, in place -> the model, to be called with what split_batch returns.

    Its layers stay as they are; only `attend` changes. ValueError names what it cannot do.
    """
    if group is None:
        return model
    c, ranks = model.config, dist.get_world_size(group)
    local_heads = model.model.layers[0].self_attn.q_proj.weight.shape[0] // c.head_dim  # tensor parallelism cuts them
    if method not in METHODS:
        raise ValueError(f"context-parallel method {method!r}; choose {', '.join(METHODS)}")
    if method == "ulysses" and local_heads % ranks:
        fitting = [n for n in range(1, local_heads + 1) if local_heads % n == 0]
        raise ValueError(f"ulysses on {ranks} ranks needs query heads in multiples of it, here {local_heads}; "
                         f"these would do: {', '.join(map(str, fitting))}, or zigzag")
    if method != "ulysses" and c.attention_dropout:
        raise ValueError(f"{method} attention has no dropout; take ulysses or attention_dropout 0")
    unknown = {"position_embedding_type": getattr(c, "position_embedding_type", "rope") != "rope",
               "attn_logit_softcapping": method != "ulysses" and bool(getattr(c, "attn_logit_softcapping", None)),
               "rope_scaling": "dynamic" in ((getattr(c, "rope_scaling", None) or {}).get("rope_type"),)}
    if found := [name for name, present in unknown.items() if present]:
        raise ValueError(f"context parallelism ({method}) does not know {found[0]} {getattr(c, found[0])}")
    # Documents reach attention in place of the mask, so that a recomputed layer has its own forward's. The RoPE tables,
    # made anew by each forward and handed to all its layers, tell which that is.
    current, documents = {}, WeakTensorKeyDictionary()

    def take_documents(trunk, arguments):
        """Before a forward: (input_ids, position_ids, cu_seqlens, kv_cache) -> the same without cu_seqlens."""
        input_ids, position_ids, cu_seqlens, cache = arguments
        B, S = len(input_ids), input_ids.shape[1] * ranks
        current["starts"] = None if cu_seqlens is None else document_starts(cu_seqlens, B, S)
        return input_ids, position_ids, None, cache

    def hand_documents(attention, arguments):
        """Before an attention layer: (x, rope, mask, cache, slots), the mask replaced."""
        x, rope, _, *rest = arguments
        key = rope[0]
        if key not in documents:
            documents[key] = current["starts"]  # (B, S) or None
        return x, rope, documents[key], *rest

    kernel = None
    if method != "ulysses" and c.attention == "triton":
        from kernels.flash_attention import flash_attn_func
        kernel = partial(flash_attn_func, return_lse=True)

    def ring(q, k, v, starts, dropout=0.0):
        return ring_attention(q, k, v, group, method, c.sliding_window, starts, kernel)

    def ulysses(attend):
        def attend_(q, k, v, starts, dropout=0.0):
            S = q.shape[1] * ranks
            mask = offsets(starts) if c.attention == "triton" else whole_mask(S, c.sliding_window, starts, q.device)
            return ulysses_attention(q, k, v, mask, dropout, attend, group)
        return attend_

    model.model.register_forward_pre_hook(take_documents)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.register_forward_pre_hook(hand_documents)
        attention.attend = ulysses(attention.attend) if method == "ulysses" else ring
    return model
