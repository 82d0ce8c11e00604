"""Tests of parallel/fsdp.py: against one process in float64, bytes sent, bytes held at any moment, and the traps."""

import pytest
import torch
import torch.distributed as dist
from one_process import (STEPS, assert_close, clip_pieces, global_batch, loss_sum, micro_batches, optimizer_of, tiny_model,
                         train_alone, whole_gradients)
from parallel.fsdp import FSDP, units
from parallel.ledger import Ledger, data_parallel_elements, held, state_bytes
from processes import run_on
from torch import nn


def train(world, name="adamw", count=1, shape=(), checkpointing="none", frozen=False, **options):
    rank, model = dist.get_rank(), tiny_model(**dict(shape))
    model.model.activation_checkpointing = checkpointing
    if frozen:
        model.model.embed_tokens.weight.requires_grad_(False)
    optimizer, result = optimizer_of(model, name), {"losses": [], "norms": [], "grads": []}
    fsdp = FSDP(units(model), dist.group.WORLD, **options)
    optimizer, found = fsdp.shard(optimizer), {"gradient_peak": 0}

    def watch():
        whole = [unit.full for unit in fsdp.units if getattr(unit, "full", None) is not None]
        found["gradient_peak"] = max(found["gradient_peak"], held([*whole, *(p.grad for p in model.parameters())]))
        return fsdp.live()

    for step in range(STEPS):
        parts = micro_batches(step, rank, world, count)
        counted = torch.tensor(float(sum((labels != -100).sum() for _, labels in parts)), dtype=torch.float64)
        dist.all_reduce(counted)
        loss = torch.zeros((), dtype=torch.float64)
        with Ledger(live=watch) as ledger:
            for k, (ids, labels) in enumerate(parts):
                with fsdp.microbatch(last=k + 1 == count):
                    part = loss_sum(model, ids, labels) / counted
                    part.backward()
                    loss += part.detach()
        at_rest = held(fsdp.live())
        dist.all_reduce(loss)
        result["losses"].append(loss.item())
        result["grads"].append(whole_gradients(model, fsdp.parameters()))
        gradients = held(p.grad for p in (*model.parameters(), *fsdp.parameters()))
        result["norms"].append(clip_pieces(fsdp.parameters()))
        optimizer.step()
        fsdp.zero_grad()
    states = [t for values in optimizer.state.values() for t in values.values()]
    with fsdp.gathered():
        result["parameters"] = {n: p.detach().clone() for n, p in model.named_parameters()}
    sizes = [8 * unit.flat.numel() for unit in fsdp.units]
    return result, found | dict(sent=ledger.sent(), peak=ledger.peak, at_rest=at_rest, gradients=gradients, sizes=sizes,
                                shards=held(u.shard for u in fsdp.units), state=sum(t.numel() * 8 for t in states),
                                padding=fsdp.padding)


CASES = [(2, dict()), (4, dict(count=4)), (8, dict(count=2)), (4, dict(count=2, prefetch=False)),
         (4, dict(count=4, offload=True)), (4, dict(name="lion", count=2)), (2, dict(frozen=True)),
         (4, dict(count=2, checkpointing="full")), (2, dict(checkpointing="selective")),
         (4, dict(count=2, shape=(("tie_word_embeddings", True),)))]


@pytest.mark.parametrize("world, options", CASES, ids=str)
def test_three_steps_equal_one_process(world, options):
    model = tiny_model(**dict(options.get("shape", ())))
    model.model.embed_tokens.weight.requires_grad_(not options.get("frozen", False))
    truth, ranks = train_alone(options.get("name", "adamw"), model), run_on(world, train_with, options)
    for result, _ in ranks:
        assert_close(result, truth)
        assert all(torch.equal(result["parameters"][n], ranks[0][0]["parameters"][n]) for n in truth["parameters"])


def train_with(world, options):
    return train(world, **options)


@pytest.mark.parametrize("world, count", [(2, 1), (4, 4)])
def test_bytes_held_and_sent_are_the_formulas_and_no_more_than_two_units_are_live(world, count):
    numel = sum(p.numel() for p in tiny_model().parameters())
    for _, found in run_on(world, train_with, dict(count=count)):
        padded = numel + found["padding"]
        assert found["padding"] < world * len(found["sizes"])
        formula = state_bytes(padded, world, 3, 8, 8, 16)
        assert (found["shards"], found["gradients"]) == (formula["parameters"], formula["gradients"])
        assert abs(found["state"] - formula["optimizer"]) <= 16 * found["padding"]  # pieces leave the padding out
        assert found["sent"] == 8 * data_parallel_elements(padded, world, 3, count)
        assert found["at_rest"] == found["shards"], "after the microbatches all is freed"
        pairs = [a + b for a, b in zip(found["sizes"], found["sizes"][1:])]  # a unit, and the next one being fetched
        assert found["peak"] == found["shards"] + max(pairs)
        assert found["gradient_peak"] <= 2 * sum(sorted(found["sizes"])[-2:]), "whole gradients: of two units, twice"


def test_without_prefetch_one_unit_is_live():
    for _, found in run_on(2, train_with, dict(prefetch=False)):
        assert found["peak"] == found["shards"] + max(found["sizes"])


@pytest.mark.parametrize("prefetch", [True, False])
def test_tied_embeddings_are_one_unit_and_travel_as_often_as_any_other(prefetch):
    """Used twice, they would be gathered four times for each microbatch."""
    shape = (("tie_word_embeddings", True),)
    for _, found in run_on(2, train_with, dict(shape=shape, count=3, prefetch=prefetch)):
        numel = sum(found["sizes"]) // 8
        assert found["sent"] == 8 * data_parallel_elements(numel, 2, 3, 3)
        assert found["peak"] <= found["shards"] + sum(sorted(found["sizes"])[-2 if prefetch else -1:])
        assert found["at_rest"] == found["shards"]


def test_accumulation_with_offload_keeps_every_microbatch():
    """DeepSpeed #6550 kept the last microbatch alone."""
    (one, _), _ = run_on(2, train_with, dict(count=1, offload=True))
    (eight, _), _ = run_on(2, train_with, dict(count=8, offload=True))
    assert_close(eight, one, 1e-12)


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_optimizers_that_need_whole_matrices_are_refused(name):
    model = tiny_model()
    optimizer = optimizer_of(model, name)
    with pytest.raises(ValueError, match=f"ZeRO-3 cuts matrices, and {type(optimizer).__name__} needs them whole"):
        FSDP(units(model), None).shard(optimizer)


class Odd(nn.Module):
    """A layer of which one rank leaves a part unused."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)

    def forward(self, x, both):
        return self.a(x) + (self.b(x) if both else 0)


def unused(world):
    layers = [Odd().double() for _ in range(3)]
    with torch.no_grad():
        for p in nn.ModuleList(layers).parameters():
            p.fill_(1.0)
    fsdp = FSDP(layers, dist.group.WORLD)
    with fsdp.microbatch():
        x = torch.ones(1, 3, dtype=torch.float64)
        for layer in layers:
            x = layer(x, both=dist.get_rank() == 0)
        x.sum().backward()
    return {piece.start + 9 * (piece.whole is layers[0].b.weight): piece.grad.tolist()
            for piece in fsdp.units[0].pieces}, layers[0].a.weight.grad


def test_a_parameter_unused_on_one_rank_does_not_hang():
    (first, _), (second, grad) = run_on(2, unused, timeout=30)
    assert grad is None
    # by hand: x = 1; rank 0 multiplies by 6 in each layer, rank 1 by 3: d/dw = 6^2 and 3^2; of b only rank 0's
    assert first == {0: [45.0] * 9} and second == {9: [36.0] * 9}


def test_no_gradient_is_lost_where_backward_is_called_outside():
    model = tiny_model()
    FSDP(units(model), None)
    with pytest.raises(ValueError, match="inside `with fsdp.microbatch"):
        loss_sum(model, *global_batch(0)).backward()


def test_units_are_the_layers_and_what_stands_beside_them():
    model = tiny_model()
    assert units(model) == [model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head]
    model.model.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="Transformer has parameters of its own beside its layers"):
        units(model)


def test_units_out_of_order_or_used_twice_are_refused_as_gradients_would_be_lost():
    model = tiny_model()
    fsdp = FSDP(units(model)[::-1], None)
    with pytest.raises(ValueError, match="unit 3 came after unit 4"), fsdp.microbatch():
        model(global_batch(0)[0])
    model = tiny_model()
    fsdp = FSDP(units(model), None)
    with pytest.raises(ValueError, match="unit 0 came after unit 4"), fsdp.microbatch():
        with torch.no_grad():
            model(global_batch(0)[0])  # a reference's pass has no gradients to lose
        model(global_batch(0)[0])
        model(global_batch(1)[0])


def test_half_shared_units_are_refused():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    with pytest.raises(ValueError, match="Linear shares some of its parameters with another unit, not all"):
        FSDP([a, b], None)


def test_evaluation_gathers_and_frees():
    model, truth = tiny_model(), tiny_model()
    ids = global_batch(0)[0]
    fsdp = FSDP(units(model), None, offload=True)
    with torch.no_grad():
        assert torch.equal(model(ids), truth(ids))
    assert held(unit.flat for unit in fsdp.units) == 0
    with fsdp.gathered(write=True), torch.no_grad():
        model.lm_head.weight.zero_()
    with torch.no_grad():
        assert not model(ids).any(), "what was written while gathered is kept"


def test_weights_gathered_in_bfloat16_give_float32_gradients():
    model, plain = tiny_model().float(), tiny_model().bfloat16()
    fsdp = FSDP(units(model), None, dtype=torch.bfloat16)
    ids, labels = global_batch(0)
    with fsdp.microbatch():
        loss = loss_sum(model, ids, labels)
        loss.backward()
    truth = loss_sum(plain, ids, labels)
    truth.backward()
    assert loss.dtype == torch.bfloat16 and torch.equal(loss, truth)
    for piece, p in zip(fsdp.parameters(), plain.parameters()):
        assert piece.dtype == piece.grad.dtype == torch.float32
        assert torch.equal(piece.grad, p.grad.float().flatten())
