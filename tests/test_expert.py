"""parallel/expert.py on gloo processes, held to one process in float64."""

import pytest
import torch
import torch.distributed as dist

from moe import Experts, combine, dispatch, grouped_matmul_loop, router_loss
from oracle import adamw, assert_same, batches, named, summed_loss, tiny_model
from parallel import expert
from parallel.ledger import Ledger
from parallel.mesh import Mesh
from processes import run_on

SHAPE = dict(num_hidden_layers=3, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=6, model_type="qwen3_moe",
             qk_norm=True, mlp_only_layers=[1])


def step_loss(model, ids, labels, counted, share):
    """Cross-entropy and the routers' own losses; share: of the step's tokens."""
    return summed_loss(model(ids), labels) / counted + share * router_loss(model, 0.1, 0.01)


def truth(changes):
    model = tiny_model(**changes)
    optimizer, history = adamw(model.named_parameters()), []
    for step in batches():
        counted = sum(int((labels != -100).sum()) for _, labels in step)
        losses = [step_loss(model, ids, labels, counted, 1 / len(step)) for ids, labels in step]
        torch.stack(losses).sum().backward()
        grads = named(model)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": sum(loss.item() for loss in losses), "grads": grads, "params": named(model, "data")})
    return history


def spread(world, ep, changes):
    """Four data-parallel ranks, one microbatch each; the experts over `ep` of them."""
    mesh = Mesh(ep=ep)
    model = expert.expert_parallel(tiny_model(**changes), mesh.group("ep"))
    optimizer, history = adamw(model.named_parameters()), []
    for step in batches():
        counted = sum(int((labels != -100).sum()) for _, labels in step)
        ids, labels = step[mesh.rank("dp")]
        loss = step_loss(model, ids, labels, counted, 1 / len(step))
        loss.backward()
        loss = loss.detach()
        dist.all_reduce(loss)
        for p in model.parameters():
            spread_out = "ep" in getattr(p, "placement", {}).get("shard", {})
            if (group := mesh.group("edp") if spread_out else mesh.group("dp")) is not None:
                dist.all_reduce(p.grad, group=group)
        grads = {n: expert.whole(p.grad, getattr(p, "placement", {}), mesh.group("ep")).clone()
                 for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        params = {n: p.clone() for n, p in expert.full_state(model, mesh.group("ep")).items()}
        history.append({"loss": loss.item(), "grads": grads, "params": params})
    mesh.destroy()
    return history


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_router_gradient_and_balance_loss_do_not_depend_on_the_expert_parallel_degree(ep):
    """Three steps, each degree against one process that takes the ranks' batches in turn: router gradients included."""
    true = truth(SHAPE)
    assert true[0]["grads"]["model.layers.0.mlp.gate.weight"].abs().max() > 1e-3
    for history in run_on(4, spread, ep, SHAPE):
        assert_same(history, true)


@pytest.mark.parametrize("changes", [dict(num_experts=4, num_experts_per_tok=1),
                                     dict(n_shared_experts=1, model_type="glassbox")])
def test_one_choice_and_shared_experts(changes):
    for history in run_on(4, spread, 4, SHAPE | changes):
        assert_same(history, truth(SHAPE | changes))


def answers(world, chosen):
    """Tokens of this rank sent to `chosen` (ranks, N, k) -> errors of answers and gradients; the load; the messages."""
    torch.manual_seed(0)
    rank, E = dist.get_rank(), 4
    whole = Experts(E, 5, 3).double()
    local = Experts(E, 5, 3).double()
    local.load_state_dict(whole.state_dict())
    local.multiply = whole.multiply = grouped_matmul_loop
    for name, p in list(local.named_parameters()):
        setattr(local, name, expert.shard(p, rank, world))
    tokens = torch.randn(world, chosen.shape[1], 5, dtype=torch.double)
    weights = torch.rand(world, *chosen.shape[1:], dtype=torch.double)
    truths, mine = [], None
    for r in range(world):  # one process: the ranks' tokens in turn
        x = tokens[r].clone().requires_grad_()
        rows, counts, order = dispatch(x, chosen[r], E)
        y = combine(whole(rows, counts), order, weights[r])
        y.square().sum().backward()
        truths.append((y, x.grad))
    x = tokens[rank].clone().requires_grad_()
    rows, counts, order = dispatch(x, chosen[rank], E)
    with Ledger() as ledger:
        y = combine(expert.exchanged(local, dist.group.WORLD, rows, counts), order, weights[rank])
        y.square().sum().backward()
    pairs = [(y, truths[rank][0]), (x.grad, truths[rank][1])]
    pairs += [(p.grad, q.grad.chunk(world)[rank]) for p, q in zip(local.parameters(), whole.parameters())]
    errors = [(a - b).abs().max().item() for a, b in pairs]
    return errors, counts.tolist(), [(e.op, e.shape, e.sent) for e in ledger.entries]


def test_a_zero_token_expert():
    chosen = torch.tensor([[[0, 3], [3, 0]], [[3, 0], [0, 3]]])  # experts 1 and 2, one on each rank, get nothing
    for errors, counts, _ in run_on(2, answers, chosen):
        assert counts == [2, 0, 0, 2] and max(errors) < 1e-12


@pytest.mark.parametrize("everyone", [0, 2])
def test_all_tokens_on_one_expert(everyone):
    """One rank computes everything; the other's experts see no row at all, and have gradients of zero."""
    for errors, counts, _ in run_on(2, answers, torch.full((2, 3, 1), everyone)):
        assert counts == [3 * (e == everyone) for e in range(4)] and max(errors) < 1e-12


def test_only_chosen_rows_travel():
    """Counts once, then rows there and back, and the same in backward: uneven, and what stays is not sent."""
    chosen = torch.tensor([[[0], [1], [2]], [[0], [0], [0]]])  # rank 0 sends one row, rank 1 three
    for rank, (_, _, entries) in enumerate(run_on(2, answers, chosen)):
        row = 5 * 8
        sent, received = (1, 3) if rank == 0 else (3, 1)
        assert [op for op, _, _ in entries] == ["all_to_all"] * 5
        assert [bytes_ for _, _, bytes_ in entries] == [2 * 8, sent * row, received * row, sent * row, received * row]


def refusals(world):
    said = []
    for changes in (dict(num_experts=6), None):
        with pytest.raises(ValueError) as error:
            expert.expert_parallel(tiny_model(**SHAPE | changes) if changes else tiny_model(), dist.group.WORLD)
        said.append(str(error.value))
    return said


def test_experts_that_do_not_divide_are_refused_with_one_line():
    for said in run_on(4, refusals):
        assert said == ["ep 4 does not divide 6 experts; these do: 1, 2, 3, 6", "ep 4: the model has no experts"]


def placements(world):
    model = expert.expert_parallel(tiny_model(**SHAPE), dist.group.WORLD)
    return {n: (p.placement, tuple(p.shape)) for n, p in model.named_parameters() if hasattr(p, "placement")}


def test_placement_names_the_axis_and_the_whole_shape():
    for found in run_on(2, placements):
        shape = {"gate_proj": (6, 16), "up_proj": (6, 16), "down_proj": (16, 6)}
        assert found == {f"model.layers.{i}.mlp.experts.{n}": ({"shard": {"ep": 0}, "global_shape": (8, *s)}, (4, *s))
                         for i in (0, 2) for n, s in shape.items()}
