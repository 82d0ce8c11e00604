"""parallel/context.py on gloo processes: each method held to one process in float64, its messages counted."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from kernels.flash_attention import flash_attn_func
from model import eager_attention
from oracle import adamw, assert_same, batches, named, summed_loss, tiny_model, train
from parallel import context
from parallel.ledger import Ledger
from processes import run_on

GROUP = lambda: dist.group.WORLD  # noqa: E731
DOCUMENTS = torch.tensor([0, 5, 16, 17, 23, 32], dtype=torch.int32)  # in two rows of 16


# --------------------------------------------------------------------------------------------------------- on paper


def test_zigzag_work_is_equal_on_all_ranks():
    assert context.work_units(4, "zigzag") == [9, 9, 9, 9] and context.work_units(4, "ring") == [3, 7, 11, 15]
    for ranks in (1, 2, 3, 8):
        assert context.work_units(ranks, "zigzag") == [2 * ranks + 1] * ranks
        assert context.work_units(ranks, "ring") == [4 * r + 3 for r in range(ranks)]


@pytest.mark.parametrize("method", context.METHODS)
def test_split_and_its_inverse(method):
    x = torch.arange(24).view(1, 24)
    parts = [context.split(x, rank, 3, method) for rank in range(3)]
    assert torch.equal(context.unsplit(parts, method), x)
    assert parts[0].tolist() == [[0, 1, 2, 3, 20, 21, 22, 23] if method == "zigzag" else [*range(8)]]
    with pytest.raises(ValueError, match="sequence length 20 on 3 context-parallel ranks: it must be a multiple of 6"):
        context.split(x[:, :20], 0, 3, method)


def random_attention(seed=0, S=6, T=6, Hkv=2, G=2, D=4):
    generator = torch.Generator().manual_seed(seed)
    return [10 * torch.randn(shape, generator=generator, dtype=torch.double)
            for shape in ((2, S, Hkv * G, D), (2, T, Hkv, D), (2, T, Hkv, D))]


def test_blocks_merged_by_their_log_sum_exp_are_one_softmax():
    q, k, v = random_attention(T=9)
    whole, lse = context.attend_block(q, k, v, None)
    out, total = torch.zeros_like(q), q.new_full(q.shape[:-1], float("-inf"))
    for part in (slice(0, 2), slice(2, 3), slice(3, 9)):
        out, total = context.merge(out, total, *context.attend_block(q, k[:, part], v[:, part], None))
    assert (out - whole).abs().max() < 1e-12 and (total - lse).abs().max() < 1e-12


def test_a_fully_masked_block_stays_finite():
    q, k, v = random_attention()
    nothing = torch.zeros(6, 6, dtype=torch.bool)
    empty, empty_lse = context.attend_block(q, k, v, nothing)
    assert (empty == 0).all() and (empty_lse == float("-inf")).all()
    out, lse = context.attend_block(q, k, v, None)
    for both in (context.merge(out, lse, empty, empty_lse), context.merge(empty, empty_lse, out, lse)):
        assert torch.equal(both[0], out) and torch.equal(both[1], lse)
    twice, twice_lse = context.merge(empty, empty_lse, empty, empty_lse)
    assert (twice == 0).all() and (twice_lse == float("-inf")).all()
    gradients = context.block_gradients(q, k, v, nothing, torch.ones_like(q), lse, (out * torch.ones_like(q)).sum(-1))
    assert all((g == 0).all() for g in gradients)


# ---------------------------------------------------------------------------------------- attention on processes


def ring_alone(world, method, window, documents, kernel=None):
    """-> (error of out, errors of dq, dk, dv) against eager attention over the whole sequence."""
    generator = torch.Generator().manual_seed(2)
    q, k, v, weight = (torch.randn(2, 16, heads, 4, generator=generator, dtype=torch.double).requires_grad_()
                       for heads in (4, 2, 2, 4))
    starts = context.document_starts(DOCUMENTS, 2, 16) if documents else None
    truth = eager_attention(q, k, v, context.whole_mask(16, window, starts, q.device))
    true_gradients = torch.autograd.grad((truth * weight).sum(), (q, k, v))
    place = dist.get_rank(), world, method
    mine = [context.split(x, *place).detach().requires_grad_() for x in (q, k, v)]
    kernel = partial(flash_attn_func, return_lse=True) if kernel else None
    out = context.ring_attention(*mine, GROUP(), method, window, starts, kernel)
    gradients = torch.autograd.grad((out * context.split(weight, *place)).sum(), mine)
    pairs = zip((out, *gradients), (truth, *true_gradients))
    return [(a - context.split(b, *place)).abs().max().item() for a, b in pairs]


@pytest.mark.parametrize("method", ["zigzag", "ring"])
@pytest.mark.parametrize("window", [None, 1, 3, 7])
@pytest.mark.parametrize("documents", [False, True])
def test_ring_attention_and_its_gradients(method, window, documents):
    for errors in run_on(4, ring_alone, method, window, documents):
        assert max(errors) < 1e-9


@pytest.mark.parametrize("documents", [False, True])
def test_blocks_by_the_kernel(documents):
    """In float64 the kernel's reference computes them; blocks with documents' borders stay with PyTorch."""
    for errors in run_on(4, ring_alone, "zigzag", None, documents, True):
        assert max(errors) < 1e-9


def messages(world, method, key_heads):
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 16 // world, heads, 4, generator=generator).requires_grad_()
               for heads in (4, key_heads, key_heads))
    units, counted = [], context.attend_block
    context.attend_block = lambda *arguments: units.append(1) or counted(*arguments)
    try:
        with Ledger() as forward:
            if method == "ulysses":
                out = context.ulysses_attention(q, k, v, None, 0.0, eager_attention, GROUP())
            else:
                out = context.ring_attention(q, k, v, GROUP(), method)
        with Ledger() as backward:
            out.sum().backward()
    finally:
        context.attend_block = counted
    return [[(e.op, e.shape) for e in ledger.entries] for ledger in (forward, backward)], sum(units)


@pytest.mark.parametrize("world", [2, 4])
def test_hops_of_ring_attention(world):
    block = ("send", (2, 1, 16 // world, 2, 4))  # K and V together
    for method in ("zigzag", "ring"):
        results = run_on(world, messages, method, 2)
        for (forward, backward), _ in results:
            assert forward == [block] * (world - 1) and backward == [block] * (2 * world - 1)
        assert [units for _, units in results] == context.work_units(world, method)  # blocks that were computed


def test_ulysses_exchanges_q_k_v_and_out_and_repeats_too_few_key_heads():
    for (forward, backward), _ in run_on(4, messages, "ulysses", 2):
        assert forward == backward == [("all_to_all", (4, 1, 4, 1, 4))] * 4  # 2 key heads became 4
    for (forward, backward), _ in run_on(2, messages, "ulysses", 2):
        keys, queries = ("all_to_all", (2, 1, 8, 1, 4)), ("all_to_all", (2, 1, 8, 2, 4))
        assert sorted(forward) == sorted(backward) == [keys] * 2 + [queries] * 2


# ----------------------------------------------------------------------------------------------- whole models


def shared_out(world, method, changes, cu_seqlens=None, checkpointing="none"):
    model = tiny_model(**changes)
    model.model.activation_checkpointing = checkpointing
    context.context_parallel(model, GROUP(), method)
    optimizer, history = adamw(model.named_parameters()), []
    for step in batches(length=16):
        counted = sum(int((labels != -100).sum()) for _, labels in step)
        parts = []
        for ids, labels in step:  # all forwards, then all backwards: as in a pipeline
            inputs, mine = context.split_batch(ids, labels, GROUP(), method, cu_seqlens)
            parts.append(summed_loss(model(**inputs), mine) / counted)
        loss = torch.stack(parts).sum()
        loss.backward()
        loss = loss.detach()
        for tensor in (loss, *(p.grad for p in model.parameters())):
            dist.all_reduce(tensor)
        grads = named(model)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": loss.item(), "grads": grads, "params": named(model, "data")})
    return history


def one_process(changes, cu_seqlens=None):
    model = tiny_model(**changes)
    if cu_seqlens is not None:
        forward = model.forward
        model.forward = lambda ids: forward(ids, cu_seqlens=cu_seqlens)
    return train(model, batches(length=16))


@pytest.mark.parametrize("method", context.METHODS)
@pytest.mark.parametrize("world", [2, 4])
def test_three_steps_equal_one_process(method, world):
    changes = dict(qk_norm=True, tie_word_embeddings=True)
    truth = one_process(changes)
    results = run_on(world, shared_out, method, changes)
    for history in results:
        assert_same(history, truth)
        assert all(torch.equal(p, results[0][-1]["params"][n]) for n, p in history[-1]["params"].items())


@pytest.mark.parametrize("method", context.METHODS)
def test_documents_windows_and_recomputation_equal_one_process(method):
    """Labels, positions and documents cross the pieces' borders; a recomputed layer has its own forward's documents."""
    changes = dict(sliding_window=6, num_hidden_layers=2)
    truth = one_process(changes, DOCUMENTS)
    for history in run_on(4 if method != "ulysses" else 2, shared_out, method, changes, DOCUMENTS, "full"):
        assert_same(history, truth)


@pytest.mark.parametrize("method", ["zigzag", "ulysses"])
def test_the_model_attends_by_the_kernel(method):
    changes = dict(attention="triton", sliding_window=6, num_hidden_layers=2)
    truth = one_process(changes | dict(attention="eager"), DOCUMENTS)
    for history in run_on(2, shared_out, method, changes, DOCUMENTS):
        assert_same(history, truth)


def mixed_microbatches(world, method):
    """One microbatch with documents, one without, both forwards first, layers recomputed in backward."""
    def gradients(model, forward):
        data = zip(batches(1, 2, length=16)[0], (DOCUMENTS, None))
        parts = [summed_loss(*forward(ids, labels, cu_seqlens)) for (ids, labels), cu_seqlens in data]
        torch.stack(parts).sum().backward()
        return {n: p.grad for n, p in model.named_parameters()}

    whole, ours = tiny_model(), tiny_model()
    truth = gradients(whole, lambda ids, labels, cu: (whole(ids, cu_seqlens=cu), labels))
    ours.model.activation_checkpointing = "full"
    context.context_parallel(ours, GROUP(), method)

    def forward(ids, labels, cu):
        inputs, labels = context.split_batch(ids, labels, GROUP(), method, cu)
        return ours(**inputs), labels

    found = gradients(ours, forward)
    for g in found.values():
        dist.all_reduce(g)
    return max((found[n] - g).abs().max().item() for n, g in truth.items())


@pytest.mark.parametrize("method", ["zigzag", "ulysses"])
def test_a_recomputed_layer_has_the_documents_of_its_own_forward(method):
    assert max(run_on(2, mixed_microbatches, method)) < 1e-9


def test_labels_are_shifted_before_the_split():
    """Shifted after it, a piece would lose its last target, which lies in another piece, or take a wrong one."""
    tokens = torch.arange(17)[None]
    for method in context.METHODS:
        for rank in range(2):
            labels = context.split(tokens[:, 1:], rank, 2, method)
            ids = context.split(tokens[:, :-1], rank, 2, method)
            assert torch.equal(labels, ids + 1)
            after = torch.cat((ids[:, 1:], torch.tensor([[-100]])), 1)  # the wrong way
            assert (after != labels).sum() == (1 if method != "zigzag" or rank == 1 else 2)


def positions(world):
    ids = torch.zeros(2, 16, dtype=torch.long)
    inputs, _ = context.split_batch(ids, ids, GROUP(), "zigzag")
    packed, _ = context.split_batch(ids, ids, GROUP(), "zigzag", DOCUMENTS)
    return inputs["position_ids"][0].tolist(), packed["position_ids"].tolist()


def test_rope_positions_are_global():
    (first, packed), (second, _) = run_on(2, positions)
    assert first == [0, 1, 2, 3, 12, 13, 14, 15] and second == [4, 5, 6, 7, 8, 9, 10, 11]
    assert packed == [[0, 1, 2, 3, 7, 8, 9, 10], [0, 0, 1, 2, 5, 6, 7, 8]]  # 0 to 4, 5 to 15 | 0, 1 to 6, 7 to 15


def refusals(world):
    said = []
    for changes, method in ((dict(num_attention_heads=2), "ulysses"), (dict(attention_dropout=0.1), "zigzag"),
                            (dict(position_embedding_type="alibi"), "ring"), ({}, "star")):
        with pytest.raises(ValueError) as error:
            context.context_parallel(tiny_model(**changes), GROUP(), method)
        said.append(str(error.value))
    return said


def test_what_cannot_be_done_is_refused_with_one_line():
    for said in run_on(4, refusals):
        assert said == ["ulysses on 4 ranks needs query heads in multiples of it, here 2; these would do: 1, 2, or "
                        "zigzag", "zigzag attention has no dropout; take ulysses or attention_dropout 0",
                        "context parallelism (ring) does not know position_embedding_type alibi",
                        "context-parallel method 'star'; choose zigzag, ring, ulysses"]


def test_one_process_needs_no_group():
    model = tiny_model()
    assert context.context_parallel(model, None) is model
    (ids, labels), = batches(1, 1, length=16)[0]
    inputs, labels_ = context.split_batch(ids, labels, None, "zigzag", DOCUMENTS)
    assert labels_ is labels and torch.equal(model(**inputs), model(ids, cu_seqlens=DOCUMENTS))
