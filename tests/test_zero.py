"""Tests of parallel/zero.py: every optimizer against one process in float64, bytes held and sent, and the traps."""

import pytest
import torch
import torch.distributed as dist
from one_process import (CLIP, STEPS, assert_close, clip_pieces, loss_sum, micro_batches, optimizer_of, tiny_model,
                         train_alone, whole_gradients)
from optim import AdamW
from parallel.ledger import Ledger, data_parallel_elements, held, state_bytes
from parallel.zero import Sliced, Zero
from processes import run_on


def train(world, name, stage, count, bucket_bytes, offload=False, frozen=False, overlap=True):
    rank, model = dist.get_rank(), tiny_model()
    if frozen:
        model.model.embed_tokens.weight.requires_grad_(False)
    optimizer, result = optimizer_of(model, name), {"losses": [], "norms": [], "grads": []}
    zero = Zero(model.parameters(), optimizer, dist.group.WORLD, stage, bucket_bytes=bucket_bytes, offload=offload,
                overlap=overlap)
    for step in range(STEPS):
        parts = micro_batches(step, rank, world, count)
        counted = torch.tensor(float(sum((labels != -100).sum() for _, labels in parts)), dtype=torch.float64)
        dist.all_reduce(counted)
        loss = torch.zeros((), dtype=torch.float64)
        with Ledger() as backward:
            for k, (ids, labels) in enumerate(parts):
                with zero.microbatch(last=k + 1 == count):
                    part = loss_sum(model, ids, labels) / counted
                    part.backward()
                    loss += part.detach()
                if k == 0:  # what is held while gradients accumulate
                    gradients = held(p.grad for p in (*model.parameters(), *zero.parameters()))
        dist.all_reduce(loss)
        result["losses"].append(loss.item())
        result["grads"].append(whole_gradients(model, zero.parameters()))
        result["norms"].append(clip_pieces(zero.parameters()))
        with Ledger() as gather:
            zero.step()
        zero.zero_grad()
    result["parameters"] = {n: p.detach().clone() for n, p in model.named_parameters()}
    states = [t for values in optimizer.state.values() for t in values.values()]
    return result, dict(sent=backward.sent() + gather.sent(), gradients=gradients, state=held(states),
                        state_numbers=sum(t.numel() for t in states), parameters=held(model.parameters()),
                        padding=zero.padding, kinds={type(b).__name__ for b in zero.buckets},
                        steps=[g["step"] for g in optimizer.param_groups])


@pytest.mark.parametrize("name, world, stage, count, bucket_bytes, offload", [
    ("adamw", 2, 1, 1, 2000, False), ("adamw", 4, 1, 4, 2000, False), ("adamw", 4, 2, 4, 2000, False),
    ("adamw", 8, 2, 2, 10**9, False), ("adamw", 4, 2, 4, 2000, True),
    ("lion", 4, 2, 2, 2000, False), ("muon", 4, 1, 2, 2000, False), ("muon", 4, 2, 2, 2000, True),
    ("adafactor", 4, 2, 2, 2000, False)])
def test_three_steps_equal_one_process_and_bytes_the_formulas(name, world, stage, count, bucket_bytes, offload):
    truth, ranks = train_alone(name), run_on(world, train, name, stage, count, bucket_bytes, offload)
    numel = sum(p.numel() for p in truth["parameters"].values())
    assert world == 2 or numel % world, "a number of weights that the ranks do not divide"
    for result, found in ranks:
        assert_close(result, truth)
        assert all(torch.equal(result["parameters"][n], ranks[0][0]["parameters"][n]) for n in truth["parameters"])
        padded = numel + found["padding"]
        assert found["sent"] == 8 * data_parallel_elements(padded, world, stage, count)
        assert found["steps"] == [STEPS] * len(found["steps"])
        if name in ("adamw", "lion"):  # all of it is cut in equal parts
            assert found["padding"] < world * 6 and found["kinds"] == {"Sliced"}
            formula = state_bytes(padded, world, stage, 8, 8, 8 * (2 if name == "adamw" else 1))
            assert found["parameters"] == formula["parameters"]
            if count > 1 and stage == 2:
                assert found["gradients"] == formula["gradients"]
            elif count > 1:
                assert found["gradients"] == state_bytes(numel, world, stage, 8, 8)["gradients"]
    numbers = sum(found["state_numbers"] for _, found in ranks)
    if name in ("adamw", "lion"):  # each weight's state lies on one rank, and on no other
        assert numbers == numel * (2 if name == "adamw" else 1)


def test_optimizers_that_need_whole_matrices_get_them_and_each_number_is_sent_once():
    for name, kinds in (("muon", {"Sliced", "Owned"}), ("adafactor", {"Owned"})):
        ranks = run_on(2, train, name, 1, 1, 2000)
        assert all(found["kinds"] == kinds for _, found in ranks)
        matrices = sum(p.numel() for n, p in tiny_model().named_parameters() if p.ndim == 2 and "layers" in n)
        if name == "muon":
            rest = sum(p.numel() for p in tiny_model().parameters()) - matrices
            assert sum(found["state_numbers"] for _, found in ranks) == matrices + 2 * rest


def test_accumulation_with_offload_keeps_every_microbatch():
    """DeepSpeed #6550: ZeRO-2 with offload trained on the last microbatch alone. The gradients must not depend on count."""
    (one, _), *_ = run_on(2, train, "adamw", 2, 1, 500, True)
    (eight, _), *_ = run_on(2, train, "adamw", 2, 8, 500, True)
    assert_close(eight, one, 1e-12)


@pytest.mark.parametrize("stage", [1, 2])
def test_numel_not_divisible_tensors_smaller_than_the_world_and_frozen_parameters(stage):
    model = tiny_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    truth = train_alone("adamw", model)
    for result, found in run_on(8, train, "adamw", stage, 2, 100, False, True):
        assert_close(result, truth)
        assert torch.equal(result["parameters"]["model.embed_tokens.weight"], tiny_model().model.embed_tokens.weight)


def slices(world):
    rank = dist.get_rank()
    parameters = [torch.nn.Parameter(torch.full(shape, k + 1.0)) for k, shape in enumerate([(1,), (2, 5), (3,), ()])]
    bucket = Sliced(parameters, dist.group.WORLD, ("dp",), False)
    assert all(p.eq(k + 1).all() for k, p in enumerate(parameters)), "moving into the flat buffer changes nothing"
    found = [(p.whole is parameters[k], p.start, p.tolist()) for p in bucket.pieces for k in [int(p[0]) - 1]]
    for piece in bucket.pieces:
        piece.mul_(10)
    bucket.gather().wait()
    assert all(p.eq(10 * (k + 1)).all() for k, p in enumerate(parameters)), "the pieces are the parameters' own memory"
    return rank, bucket.size, bucket.padding, found


def test_pieces_cover_each_parameter_once():
    """Numbers 1, 2 x 10, 3 x 3, 4 over 4 ranks: shards of 4, one number of padding."""
    want = [[(0, [1.0]), (0, [2.0] * 3)], [(3, [2.0] * 4)], [(7, [2.0] * 3), (0, [3.0])], [(1, [3.0] * 2), (0, [4.0])]]
    for rank, size, padding, found in run_on(4, slices):
        assert (size, padding) == (4, 1) and found == [(True, start, values) for start, values in want[rank]]


def unknown(world):
    w = torch.nn.Parameter(torch.ones(5, 3))
    optimizer = type("Unheard", (AdamW,), {})([w])
    zero = Zero([w], optimizer, dist.group.WORLD)
    return [p.shape for p in zero.parameters()]


def test_an_unknown_optimizer_gets_whole_parameters():
    assert run_on(2, unknown) == [[(5, 3)], []]


def unused(world):
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    zero = Zero([a, b], torch.optim.SGD([a, b], lr=1.0), dist.group.WORLD, stage=2, bucket_bytes=1)
    for last in (False, True):
        with zero.microbatch(last):
            (a.sum() + (b.sum() if dist.get_rank() else 0)).backward()
    zero.step()
    return a.tolist(), b.tolist()


def test_a_parameter_unused_on_one_rank_does_not_hang():
    assert run_on(2, unused, timeout=30) == [([1.0 - 4] * 3, [1.0 - 2] * 3)] * 2


def tied(world, name, offload):
    """Two tied copies of one table, on two stages: rank r has copy r // 2; its data group is {r, r ^ 1}."""
    rank = dist.get_rank()
    groups = [dist.new_group(g) for g in ([0, 1], [2, 3], [0, 2], [1, 3])]
    data, tie = groups[rank // 2], groups[2 + rank % 2]
    table = torch.nn.Parameter(torch.arange(7.0))
    other = torch.nn.Parameter(torch.ones(2 if rank < 2 else 10))
    table.placement = {"tied": "the other"}
    kind = torch.optim.SGD if name == "SGD" else type(name, (torch.optim.SGD,), {})  # of the latter whole ones
    zero = Zero([other, table], kind([other, table], lr=1.0), data, bucket_bytes=10**6, offload=offload)
    with zero.microbatch():
        ((table * torch.arange(7.0)).sum() * (rank + 1) + other.sum()).backward()
    pieces = [p for p in zero.parameters() if p.whole is table]
    for p in pieces:
        dist.all_reduce(p.grad, group=tie)
    zero.step()
    [dist.destroy_process_group(g) for g in groups]
    return table.tolist(), [(p.start, p.numel()) for p in pieces]


@pytest.mark.parametrize("name, offload", [("SGD", False), ("SGD", True), ("Unheard", False)])
def test_tied_copies_are_cut_alike_whatever_else_their_stages_hold(name, offload):
    """Megatron #844: cut at different places, the sum of the pieces that two stages exchange would be wrong."""
    ranks = run_on(4, tied, name, offload)
    assert all(table == [x - 10 * x for x in range(7)] for table, _ in ranks)
    assert ranks[0][1] == ranks[2][1] == ([(0, 4)] if name == "SGD" else [(0, 7)])
    assert ranks[1][1] == ranks[3][1] == ([(4, 3)] if name == "SGD" else [])


def test_a_stage_that_is_not_here_is_refused():
    w = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="ZeRO stage 3 is not in this file"):
        Zero([w], AdamW([w]), None, stage=3)


def test_one_process_trains_the_same_with_offload():
    model, truth = tiny_model(), train_alone("muon")
    optimizer = optimizer_of(model, "muon")
    zero = Zero(model.parameters(), optimizer, None, stage=2, offload=True)
    losses = []
    for step in range(STEPS):
        (ids, labels), = micro_batches(step, 0, 1, 1)
        with zero.microbatch():
            loss = loss_sum(model, ids, labels) / (labels != -100).sum()
            loss.backward()
        norm = torch.stack([p.grad.norm() for p in zero.parameters()]).norm()
        for p in zero.parameters():
            p.grad.mul_((CLIP / (norm + 1e-6)).clamp_max(1.0))
        zero.step()
        zero.zero_grad()
        losses.append(loss.item())
    assert_close({"losses": losses, "parameters": dict(model.named_parameters())}, truth)
