"""parallel/pipeline.py: schedules counted on paper, then run on gloo processes and held to one process in float64."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from oracle import adamw, assert_same, batches, named, summed_loss, tiny_model, train
from parallel import pipeline
from parallel.pipeline import Action, balance, cut, draw, execute, schedule, simulate
from processes import run_on

# --------------------------------------------------------------------------------------------------------- on paper


@pytest.mark.parametrize("name, v, slots", [("gpipe", 1, 33), ("1f1b", 1, 33), ("interleaved", 2, 57), ("zb", 1, 27)])
def test_slots_of_four_ranks_and_eight_microbatches(name, v, slots):
    assert simulate(schedule(name, 4, 8, v)).slots == slots


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 16])
def test_slots_idle_and_live_microbatches_are_the_formulas(p, m):
    for name in ("gpipe", "1f1b"):
        s = simulate(schedule(name, p, m))
        assert s.slots == 3 * (m + p - 1) and s.idle == [3 * (p - 1)] * p
        assert s.peak == [m if name == "gpipe" else min(m, p - r) for r in range(p)]
    s = simulate(schedule("zb", p, m))
    if m >= p:
        assert s.slots == 3 * m + p - 1 and s.idle == [p - 1] * p
    assert s.peak == [min(m, p)] * p
    for v in (2, 3):
        if m % p == 0:
            s = simulate(schedule("interleaved", p, m, v))
            assert s.slots == 3 * (m * v + p - 1) and s.idle == [3 * (p - 1)] * p  # (p - 1) / (v m) of the whole
            if m > p:
                assert s.peak == [2 * (p - r - 1) + (v - 1) * p + 1 for r in range(p)]


def test_bubble_shrinks_with_interleaving_by_the_number_of_chunks():
    plain, thin = simulate(schedule("1f1b", 4, 8)), simulate(schedule("interleaved", 4, 8, 2))
    assert plain.idle[0] / (plain.slots - plain.idle[0]) == 3 / 8 and thin.idle[0] / (thin.slots - thin.idle[0]) == 3 / 16


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb"])
def test_fewer_microbatches_than_stages_do_not_hang_on_paper(name):
    for m in (1, 2, 3):
        assert simulate(schedule(name, 4, m)).slots <= 3 * (m + 3)


def test_simulator_finds_deadlocks_and_lost_actions():
    good = schedule("1f1b", 2, 2)
    swapped = [[Action(k, r, i) for i in order for k in "FD"] for r, order in enumerate([(0, 1), (1, 0)])]
    with pytest.raises(ValueError, match="deadlocks: rank 0 waits before Action.kind='D'"):
        simulate(swapped)
    with pytest.raises(ValueError, match="stage 1, microbatch 1 has the actions 'F'; it must have FD or FBW"):
        simulate([good[0], good[1][:-1]])
    with pytest.raises(ValueError, match="stands on rank 0; stage 1 lies on rank 1"):
        simulate([good[1], good[0]])


def test_interleaved_refuses_other_numbers_of_microbatches():
    with pytest.raises(ValueError, match="multiples of its 4 ranks, not 6"):
        schedule("interleaved", 4, 6, 2)


def test_drawing_has_every_action_in_its_slot():
    text = draw(simulate(schedule("zb", 2, 2)))
    assert text == ("rank 0 F0  F1  .   B0  W0  B1  W1\n"
                    "rank 1 .   F0  B0  F1  B1  W0  W1")
    assert draw(simulate(schedule("gpipe", 1, 1))) == "rank 0 F0  D0  =0"


def test_messages_are_posted_in_one_order_that_cannot_deadlock():
    """Each rank posts its messages one after the other, and each waits for both its ends, as on a single NCCL stream."""
    for name, p, m, v in (("gpipe", 3, 2, 1), ("1f1b", 4, 8, 1), ("zb", 4, 3, 1), ("interleaved", 4, 8, 3), ("interleaved", 2, 4, 2)):
        simulation = simulate(schedule(name, p, m, v))
        queue = pipeline.transfers(simulation)
        assert len(queue) == 2 * m * (p * v - 1) and queue == sorted(queue)
        arrived = {(t.stage, t.microbatch, t.gradient): t.time for t in queue}
        for row in simulation.timeline:
            for (kind, s, i), start, _ in row:  # what an action needs comes earlier in that order than what it makes
                source = (s - 1, i, False) if kind == "F" else (s + 1, i, True) if kind in "BD" else None
                assert source not in arrived or arrived[source] <= start


def test_uneven_layers_balanced_by_cost_embedding_and_head_weigh_too():
    assert balance([1.0] * 7, 3) == [2, 2, 3] or max(balance([1.0] * 7, 3)) == 3
    assert balance([1.0] * 8, 4, first=1.0, last=1.0) == [1, 3, 3, 1] or max(balance([1.0] * 8, 4, 1.0, 1.0)[1:3]) <= 3
    assert balance([1.0] * 6, 2, last=4.0) == [5, 1]
    assert balance([3.0, 1.0, 1.0, 1.0], 2) == [1, 3]
    with pytest.raises(ValueError, match="5 pipeline stages for 4 layers; at most 4"):
        balance([1.0] * 4, 5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # against all the ways to cut
        costs = torch.rand(7, generator=generator).tolist()
        ways = [(a, b, 7 - a - b) for a in range(1, 6) for b in range(1, 7 - a)]
        dearest = lambda way: max(sum(costs[:way[0]]) + 0.5, sum(costs[way[0]:way[0] + way[1]]), sum(costs[way[0] + way[1]:]) + 1)  # noqa: E731
        assert dearest(balance(costs, 3, 0.5, 1.0)) == pytest.approx(min(map(dearest, ways)))


# ------------------------------------------------------------------------------------------------ backward in two


def test_input_gradient_first_and_weight_gradients_later_are_the_whole_backward():
    for changes in ({}, dict(qk_norm=True, tie_word_embeddings=True), dict(attention_bias=True, attention="eager")):
        whole, split = tiny_model(**changes), tiny_model(**changes)
        (input_ids, labels), = batches(1, 1)[0]
        summed_loss(whole(input_ids), labels).backward()
        seen = []
        split.model.embed_tokens.register_forward_hook(lambda m, a, out: seen.append(out))
        loss = summed_loss(split(input_ids), labels)
        gradient, later = pipeline.backward_input(loss, None, seen[0])
        assert all(p.grad is None for p in split.parameters())  # B touches no weight
        pipeline.backward_weights(later)
        for name, true in named(whole).items():
            assert torch.equal(named(split)[name], true) or (named(split)[name] - true).abs().max() < 1e-12, name


def test_input_gradient_leaves_out_the_weights_matmuls():
    """FLOPs of B and W are half of the backward each, for linear layers: nothing is computed twice."""
    from torch.utils.flop_counter import FlopCounterMode
    layers = nn.Sequential(nn.Linear(8, 32, bias=False), nn.SiLU(), nn.Linear(32, 8, bias=False)).double()
    x = torch.randn(4, 8, dtype=torch.double, requires_grad=True)
    output = layers(x)
    with FlopCounterMode(display=False) as b:
        gradient, later = pipeline.backward_input(output, torch.ones_like(output), x)
    with FlopCounterMode(display=False) as w:
        pipeline.backward_weights(later)
    assert b.get_total_flops() == w.get_total_flops() == 2 * 2 * 4 * 8 * 32


def test_frozen_embedding_and_frozen_layers_split_too():
    whole, split = tiny_model(), tiny_model()
    (input_ids, labels), = batches(1, 1)[0]
    for model in (whole, split):
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[1].requires_grad_(False)
    summed_loss(whole(input_ids), labels).backward()
    seen = []
    split.model.embed_tokens.register_forward_hook(lambda m, a, out: seen.append(out))
    gradient, later = pipeline.backward_input(summed_loss(split(input_ids), labels), None, seen[0])
    pipeline.backward_weights(later)
    assert gradient is None
    for (name, p), true in zip(split.named_parameters(), whole.parameters()):
        assert (p.grad is None) == (true.grad is None) and (p.grad is None or torch.equal(p.grad, true.grad)), name


# --------------------------------------------------------------------------------------------------- on processes


def pipelined(world, name, v, microbatches, changes, sizes=None):
    """-> per step {"loss", "grads", "params"} of this rank's stages, and the timelines."""
    group, rank = dist.group.WORLD, dist.get_rank()
    stages = cut(tiny_model(**changes), rank, world, v, sizes)
    parameters = [pair for stage in stages.values() for pair in stage.named_parameters()]
    optimizer, history, timelines = adamw(parameters), [], []
    for step in batches(microbatches=microbatches):
        counted = sum(int((labels != -100).sum()) for _, labels in step)
        loss, timeline = execute(schedule(name, world, microbatches, v), stages,
                                 [(dict(input_ids=ids), labels) for ids, labels in step],
                                 lambda logits, labels: summed_loss(logits, labels) / counted, group)
        pipeline.sum_tied_gradients(stages, group)
        grads = {n: p.grad.clone() for n, p in parameters}
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": loss.item(), "grads": grads, "params": {n: p.detach().clone() for n, p in parameters}})
        timelines.append(timeline)
    return history, timelines


def joined(results: list, tied: bool = False) -> list[dict]:
    """The histories of all ranks as one; a tied copy must be bitwise the first, and is left out."""
    steps = []
    for parts in zip(*(history for history, _ in results)):
        assert len({part["loss"] for part in parts}) == 1  # the same loss on all ranks
        step = {"loss": parts[0]["loss"]}
        for kind in ("grads", "params"):
            step[kind] = {}
            for part in parts:
                assert not step[kind].keys() & part[kind].keys()
                step[kind] |= part[kind]
            if tied:
                assert torch.equal(step[kind].pop("lm_head.weight"), step[kind]["model.embed_tokens.weight"])
        steps.append(step)
    return steps


@pytest.mark.parametrize("name, v, microbatches", [("gpipe", 1, 4), ("1f1b", 1, 4), ("zb", 1, 5), ("interleaved", 2, 4)])
@pytest.mark.parametrize("world", [1, 2])
def test_three_steps_equal_one_process(name, v, microbatches, world):
    changes = dict(tie_word_embeddings=True, qk_norm=True)
    truth = train(tiny_model(**changes), batches(microbatches=microbatches))
    if world == 1:
        stages = cut(tiny_model(**changes), 0, 1, v)
        data = batches(microbatches=microbatches)[0]
        counted = sum(int((labels != -100).sum()) for _, labels in data)
        loss, _ = execute(schedule(name, 1, microbatches, v), stages, [(dict(input_ids=i), y) for i, y in data],
                          lambda logits, labels: summed_loss(logits, labels) / counted)
        grads = {n: p.grad for stage in stages.values() for n, p in stage.named_parameters()}
        if v == 1:
            assert grads.keys() == truth[0]["grads"].keys()
        assert abs(loss.item() - truth[0]["loss"]) < 1e-9
        assert all((grads[n] - g).abs().max() < 1e-9 for n, g in truth[0]["grads"].items())
        return
    assert_same(joined(run_on(world, pipelined, name, v, microbatches, changes), tied=True), truth)


@pytest.mark.parametrize("name, v, sizes", [("1f1b", 1, [1, 2, 1, 1]), ("zb", 1, [2, 1, 1, 1]), ("interleaved", 2, None)])
def test_four_ranks_with_uneven_layers_equal_one_process(name, v, sizes):
    changes = dict(num_hidden_layers=9 if v == 2 else 5, attention_bias=True)
    truth = train(tiny_model(**changes), batches(microbatches=4))
    results = run_on(4, pipelined, name, v, 4, changes, sizes)
    assert_same(joined(results), truth)
    for timelines in zip(*(t for _, t in results)):  # the recorded timelines: the list itself, nothing before its time
        found = pipeline.compare(schedule(name, 4, 4, v), list(timelines))
        assert found["same_order"] and found["kept_order"] and found["measured"] > 0
        assert found["predicted"] <= found["measured"] + 1e-9  # sending and waiting cost time; nothing else does


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb"])
def test_fewer_microbatches_than_stages_do_not_hang(name):
    truth = train(tiny_model(), batches(microbatches=2))
    assert_same(joined(run_on(4, pipelined, name, 1, 2, {})), truth)


def test_tied_embeddings_stay_bitwise_equal_and_without_the_sum_they_drift():
    changes = dict(tie_word_embeddings=True)
    stages = cut(tiny_model(**changes), 3, 4)
    copy = stages[3].lm_head.weight
    assert copy.placement == {"tied": "model.embed_tokens.weight"}
    assert cut(tiny_model(), 3, 4)[3].lm_head.weight.__dict__ == {}  # not tied
    whole = tiny_model(**changes)
    assert cut(whole, 0, 1)[0].lm_head.weight is whole.model.embed_tokens.weight  # one rank: one parameter
    results = run_on(2, pipelined, "1f1b", 1, 4, changes)
    ours, theirs = results[0][0][-1]["params"], results[1][0][-1]["params"]
    assert torch.equal(ours["model.embed_tokens.weight"], theirs["lm_head.weight"])
    alone = run_on(2, gradients_before_the_sum, changes)  # each copy sees a part only: the trap is real
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def gradients_before_the_sum(world, changes):
    stages = cut(tiny_model(**changes), dist.get_rank(), world)
    data = [(dict(input_ids=ids), labels) for ids, labels in batches()[0]]
    execute(schedule("1f1b", world, 4), stages, data, summed_loss, dist.group.WORLD)
    return next(p.grad for p in stages[dist.get_rank()].parameters() if "tied" in getattr(p, "placement", {}))


def test_stages_keep_the_names_and_leave_the_model_alone():
    model = tiny_model()
    names = [name for r in range(2) for stage in cut(model, r, 2, 2).values() for name, _ in stage.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    (ids, labels), = batches(1, 1)[0]
    assert torch.equal(model(ids), tiny_model()(ids))
    with pytest.raises(ValueError, match="5 pipeline stages for 4 layers"):
        cut(model, 0, 5)


def documents(world):
    """Packed documents: masks and positions are made on every stage from cu_seqlens. Evaluation runs forward only."""
    stages = cut(tiny_model(), dist.get_rank(), world, 1)
    (ids, labels), = batches(1, 1)[0]
    inputs = dict(input_ids=ids, cu_seqlens=torch.tensor([0, 3, 8, 13, 16], dtype=torch.int32))
    with torch.no_grad():
        loss, _ = execute(pipeline.forward_only(world, 1), stages, [(inputs, labels)], summed_loss, dist.group.WORLD)
    return loss.item(), summed_loss(tiny_model()(**inputs), labels).item()


def test_documents_and_evaluation():
    for ours, truth in run_on(2, documents):
        assert abs(ours - truth) < 1e-9


def test_timeline_of_an_unequal_run_is_predicted_from_its_durations():
    actions = schedule("1f1b", 2, 2)
    times = {Action("F", 0, 0): (0, 2), Action("F", 0, 1): (2, 4), Action("F", 1, 0): (3, 4), Action("D", 1, 0): (4, 6),
             Action("F", 1, 1): (6, 7), Action("D", 1, 1): (7, 9), Action("D", 0, 0): (7, 10), Action("D", 0, 1): (10, 13)}
    found = pipeline.compare(actions, [[(a, *times[a]) for a in row] for row in actions])
    assert found == {"same_order": True, "kept_order": True, "predicted": 11, "measured": 13}
