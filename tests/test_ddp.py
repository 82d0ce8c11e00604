"""Tests of parallel/ddp.py: against one process in float64, its traffic, and the traps of data parallelism."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from one_process import (CLIP, STEPS, assert_close, global_batch, loss_sum, micro_batches, optimizer_of, tiny_model,
                         train_alone)
from optim import clip_grad_norm
from parallel.ddp import DDP, broadcast_parameters, reduce_gradients
from parallel.ledger import Ledger, data_parallel_elements
from processes import run_on


def train(world, count, bucket_bytes, overlap):
    """Three steps with `count` microbatches -> what train_alone returns, and what was sent in the last step."""
    rank, group, model = dist.get_rank(), dist.group.WORLD, tiny_model()
    optimizer, result = optimizer_of(model, "adamw"), {"losses": [], "norms": [], "grads": []}
    ddp = DDP(model.parameters(), group, bucket_bytes, overlap)
    for step in range(STEPS):
        parts = micro_batches(step, rank, world, count)
        counted = torch.tensor(float(sum((labels != -100).sum() for _, labels in parts)), dtype=torch.float64)
        dist.all_reduce(counted)
        loss = torch.zeros((), dtype=torch.float64)
        with Ledger() as ledger:
            for k, (ids, labels) in enumerate(parts):
                with ddp.microbatch(last=k + 1 == count):
                    part = loss_sum(model, ids, labels) / counted
                    part.backward()
                    loss += part.detach()
        dist.all_reduce(loss)
        result["losses"].append(loss.item())
        result["grads"].append({n: p.grad.clone() for n, p in model.named_parameters()})
        result["norms"].append(clip_grad_norm(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    result["parameters"] = {n: p.detach().clone() for n, p in model.named_parameters()}
    return result, ledger.sent(), ledger.count(), len(ddp.buckets)


@pytest.mark.parametrize("world, count, bucket_bytes, overlap", [(2, 1, 2000, True), (4, 2, 2000, True),
                                                                 (4, 4, 10**9, True), (4, 2, 2000, False), (2, 8, 1, True)])
def test_three_steps_equal_one_process_with_uneven_counted_tokens_and_a_fully_masked_rank(world, count, bucket_bytes, overlap):
    if world == 4:
        assert not (global_batch(0)[1][-4:] != -100).any(), "the last rank counts nothing"
    truth, ranks = train_alone(), run_on(world, train, count, bucket_bytes, overlap)
    numel = sum(p.numel() for p in truth["parameters"].values())
    for result, sent, calls, buckets in ranks:
        assert_close(result, truth)
        for key in ("parameters", "grads"):  # replicas are bitwise equal
            some, others = result[key], ranks[0][0][key]
            for a, b in zip(some if key == "grads" else [some], others if key == "grads" else [others]):
                assert all(torch.equal(a[name], b[name]) for name in a)
        assert sent == 8 * data_parallel_elements(numel, world, stage=0, microbatches=count)  # whatever count is
        assert calls == buckets


def test_the_loss_scale_bug_would_be_seen():
    """A mean of each rank's mean, as many trainers did, is no loss of the global batch: here it is off by percents."""
    model = tiny_model()
    ids, labels = global_batch(0)
    counted = (labels != -100).sum()
    right = loss_sum(model, ids, labels) / counted
    wrong = sum(loss_sum(model, i, y) / (y != -100).sum() for i, y in zip(ids[:12].chunk(3), labels[:12].chunk(3))) / 3
    assert abs(right - wrong) > 0.01 * right


class Branches(torch.nn.Module):
    """Rank 1 never uses `b`; nobody uses `c`."""

    def __init__(self):
        super().__init__()
        for name in "abcd":
            self.register_parameter(name, torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))

    def forward(self, rank):
        return (self.d * (self.a + (self.b if rank == 0 else 0))).sum()


def unused(world):
    model, group = Branches(), dist.group.WORLD
    ddp = DDP(model.parameters(), group, bucket_bytes=24)  # a bucket each
    for _ in range(2):
        with ddp.microbatch():
            model(dist.get_rank()).backward()
        grads = [p.grad.tolist() for p in model.parameters()]
        model.zero_grad()
    plain = Branches()
    plain(dist.get_rank()).backward()
    reduce_gradients(plain.parameters(), group)
    assert grads == [p.grad.tolist() for p in plain.parameters()]
    return grads


def test_a_parameter_unused_on_one_rank_does_not_hang():
    for a, b, c, d in run_on(2, unused, timeout=30):
        assert (a, b, c, d) == ([2.0] * 3, [1.0] * 3, [0.0] * 3, [3.0] * 3)


def buffers(world):
    """Gradients that stay, that are forgotten, and that somebody sets, before the first microbatch or after it."""
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    ddp, seen = DDP([a, b, c], dist.group.WORLD), []
    for grads in ((None, None, None), ("stays", None, torch.full((2,), 5.0)), ("stays", "stays", None)):
        for p, grad in zip((a, b, c), grads):
            p.grad = p.grad if grad == "stays" else grad
        with ddp.microbatch(last=False):
            (a + b + c).sum().backward()
        if len(seen) == 2:
            b.grad = b.grad + 1
        with ddp.microbatch():
            pass
        seen.append([p.grad[0].item() for p in (a, b, c)])
        assert {p.grad.untyped_storage().data_ptr() for p in (a, b, c)} == {ddp.buckets[0].buffer.data_ptr()}
    return seen


def test_gradients_live_in_the_buckets_alone_and_start_from_what_is_there():
    """Two ranks: (0 + 1) x 2 of each; (2 + 1) x 2, (0 + 1) x 2, (5 + 1) x 2; (6 + 1) x 2, (2 + 1 + 1) x 2, (0 + 1) x 2."""
    assert run_on(2, buffers) == [[[2, 2, 2], [6, 2, 12], [14, 8, 2]]] * 2


def hooks(world):
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(model.weight, dist.get_rank() + 1.0)
    given = []
    model.weight.register_post_accumulate_grad_hook(lambda p: given.append(p is model.weight))
    ddp = DDP(model.parameters(), dist.group.WORLD)
    with ddp.microbatch():
        model(torch.ones(1, 2)).sum().backward()
    return given, model.weight.tolist(), model.weight.grad.tolist()


def test_post_accumulate_hooks_receive_the_parameter_and_the_gradient_is_what_is_reduced():
    for rank, (given, weight, grad) in enumerate(run_on(2, hooks)):
        assert given == [True] and weight == [[rank + 1.0] * 2], "the weights are left alone"
        assert grad == [[2.0, 2.0]]


def overlap(world):
    """How many buckets were on their way before backward had made the last gradient."""
    model = tiny_model()
    ddp = DDP(model.parameters(), dist.group.WORLD, bucket_bytes=1)
    begun = []
    model.model.embed_tokens.weight.register_post_accumulate_grad_hook(lambda p: begun.append(ddp.next))
    with ddp.microbatch(last=False):
        loss_sum(model, *micro_batches(0, dist.get_rank(), world, 1)[0]).backward()
    with ddp.microbatch():
        loss_sum(model, *micro_batches(0, dist.get_rank(), world, 1)[0]).backward()
    ddp.remove()
    assert not any(p._post_accumulate_grad_hooks for p in model.model.layers.parameters())
    first = [next(n for n, q in model.named_parameters() if q is b.parameters[0]) for b in ddp.buckets]
    return begun, len(ddp.buckets), first


def test_buckets_leave_in_reverse_order_while_backward_still_runs():
    for begun, buckets, order in run_on(2, overlap):
        assert order[0] == "lm_head.weight" and order[-1] == "model.embed_tokens.weight"
        assert begun[0] == 0 and begun[1] >= buckets - 2, "all but the embedding's had been launched"


def test_one_process_has_nothing_to_do():
    model = tiny_model()
    ddp = DDP(model.parameters(), None)
    with ddp.microbatch():
        loss_sum(model, *global_batch(0)).backward()
    assert not ddp.buckets and not model.lm_head.weight._post_accumulate_grad_hooks


def broadcast(world):
    torch.manual_seed(dist.get_rank())
    model = torch.nn.Linear(3, 3)
    broadcast_parameters(model.parameters(), dist.group.WORLD)
    return model.weight.detach()


def test_broadcast_gives_all_ranks_the_first_one_s_weights():
    first, second = run_on(2, broadcast)
    assert torch.equal(first, second)


def frozen(world):
    model = tiny_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    ddp = DDP(model.parameters(), dist.group.WORLD, bucket_bytes=1)
    with ddp.microbatch():
        loss_sum(model, *micro_batches(0, dist.get_rank(), world, 1)[0]).backward()
    return model.model.embed_tokens.weight.grad, sum(b.buffer.numel() for b in ddp.buckets)


def test_frozen_parameters_are_left_out():
    numel = sum(p.numel() for p in tiny_model().parameters()) - 37 * 10
    assert run_on(2, frozen) == [(None, numel)] * 2


def test_no_collective_averages():
    """Older gloo's reduce-scatter with AVG silently sums (pytorch #162338): every file sums; the loss is divided."""
    files = list((Path(__file__).resolve().parents[1] / "parallel").glob("*.py"))
    assert len(files) > 10 and not [f.name for f in files if "ReduceOp.AVG" in f.read_text(encoding="utf-8")]
