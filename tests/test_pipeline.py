"""parallel/pipeline.py: stages and the backward in two by themselves, then plans run on gloo processes, held to one
process in float64."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe import router_loss
from oracle import adamw, assert_same, batches, named, summed_loss, tiny_model, train
from parallel import grads, pipeline, schedules
from parallel.mesh import Mesh
from parallel.pipeline import balance, cut, execute
from processes import run_on

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

        def dearest(sizes):
            a, b, _ = sizes
            return max(sum(costs[:a]) + 0.5, sum(costs[a:a + b]), sum(costs[a + b:]) + 1)

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
    mesh = Mesh(pp=world)
    stages = cut(tiny_model(**changes), mesh.rank("pp"), world, v, sizes)
    parameters = [pair for stage in stages.values() for pair in stage.named_parameters()]
    optimizer, history, timelines = adamw(parameters), [], []
    for step in batches(microbatches=microbatches):
        counted = sum(int((labels != -100).sum()) for _, labels in step)
        loss, timeline = execute(schedules.plan(name, world, microbatches, v), stages,
                                 [(dict(input_ids=ids), labels) for ids, labels in step],
                                 lambda logits, labels: summed_loss(logits, labels) / counted, mesh.group("pp"))
        grads.finalize([p for _, p in parameters], mesh)
        found = {n: p.grad.clone() for n, p in parameters}
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": loss.item(), "grads": found, "params": {n: p.detach().clone() for n, p in parameters}})
        timelines.append(timeline)
    mesh.destroy()
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


NAMED = [("gpipe", 1, 4), ("1f1b", 1, 4), ("zb", 1, 5), ("interleaved", 2, 4)]


@pytest.mark.parametrize("name, v, microbatches", NAMED)
def test_three_steps_equal_one_process(name, v, microbatches):
    changes = dict(tie_word_embeddings=True, qk_norm=True)
    truth = train(tiny_model(**changes), batches(microbatches=microbatches))
    assert_same(joined(run_on(2, pipelined, name, v, microbatches, changes), tied=True), truth)


@pytest.mark.parametrize("name, v, microbatches", NAMED)
def test_one_rank_needs_no_group(name, v, microbatches):
    changes, data = dict(tie_word_embeddings=True), batches(1, microbatches)
    truth, counted = train(tiny_model(**changes), data), sum(int((labels != -100).sum()) for _, labels in data[0])
    stages = cut(tiny_model(**changes), 0, 1, v)
    loss, _ = execute(schedules.plan(name, 1, microbatches, v), stages, [(dict(input_ids=i), y) for i, y in data[0]],
                      lambda logits, labels: summed_loss(logits, labels) / counted)
    found = {n: p.grad for stage in stages.values() for n, p in stage.named_parameters()}
    assert abs(loss.item() - truth[0]["loss"]) < 1e-9
    assert all((found[n] - g).abs().max() < 1e-9 for n, g in truth[0]["grads"].items())


@pytest.mark.parametrize("name, v, sizes", [("1f1b", 1, [1, 2, 1, 1]), ("zb", 1, [2, 1, 1, 1]),
                                            ("interleaved", 2, None)])
def test_uneven_layers_on_four_ranks_equal_one_process(name, v, sizes):
    changes = dict(num_hidden_layers=9 if v == 2 else 5, attention_bias=True, position_embedding_type="learned")
    truth = train(tiny_model(**changes), batches(microbatches=4))
    results = run_on(4, pipelined, name, v, 4, changes, sizes)
    assert_same(joined(results), truth)
    for timelines in zip(*(t for _, t in results)):  # the recorded timelines: the list itself, nothing before its time
        found = schedules.compare(schedules.schedule(name, 4, 4, v), list(timelines))
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
    execute(schedules.plan("1f1b", world, 4), stages, data, summed_loss, dist.group.WORLD)
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
        plan = schedules.plan("forward", world, 1)
        loss, _ = execute(plan, stages, [(inputs, labels)], summed_loss, dist.group.WORLD)
    return loss.item(), summed_loss(tiny_model()(**inputs), labels).item()


def test_documents_and_evaluation():
    for ours, truth in run_on(2, documents):
        assert abs(ours - truth) < 1e-9


def routed(world, name, chunks):
    """Experts on a pipeline: each stage adds its routers' own loss to the gradient that comes to it."""
    mesh, changes = Mesh(pp=world), dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6)
    data, whole = batches(1)[0], tiny_model(**changes)
    counted = sum(int((labels != -100).sum()) for _, labels in data)
    loss = 0.0
    for ids, labels in data:
        part = summed_loss(whole(ids), labels) / counted
        (part + router_loss(whole, 0.5, 0.1) / len(data)).backward()
        loss += part.item()  # what is told is the loss of the tokens
    stages = cut(tiny_model(**changes), mesh.rank("pp"), world, chunks)

    def own_loss(stage):
        share = len(stage.model.layers) / whole.config.num_hidden_layers  # router_loss is a mean over its layers
        return share * router_loss(stage, 0.5, 0.1) / len(data)

    ours, _ = execute(schedules.plan(name, world, len(data), chunks), stages, [(dict(input_ids=i), y) for i, y in data],
                      lambda logits, labels: summed_loss(logits, labels) / counted, mesh.group("pp"), own_loss)
    mesh.destroy()
    truth = named(whole)
    errors = [(p.grad - truth[n]).abs().max().item() for stage in stages.values() for n, p in stage.named_parameters()]
    return max(errors), abs(ours.item() - loss)


@pytest.mark.parametrize("name, chunks", [("1f1b", 1), ("zb", 1), ("interleaved", 2)])
def test_router_losses_of_all_stages_count(name, chunks):
    for errors in run_on(2, routed, name, chunks):
        assert max(errors) < 1e-9


def test_zero_bubble_refuses_recomputation():
    model = tiny_model()
    model.model.activation_checkpointing = "full"
    (ids, labels), = batches(1, 1)[0]
    with pytest.raises(ValueError, match="zero bubble keeps activations until W"):
        execute(schedules.plan("zb", 1, 1), cut(model, 0, 1), [(dict(input_ids=ids), labels)], summed_loss)
