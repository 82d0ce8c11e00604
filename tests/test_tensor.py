"""parallel/tensor.py on gloo processes, held to one process in float64, its collectives counted."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from oracle import adamw, assert_same, batches, summed_loss, tiny_model, train
from parallel import grads, tensor
from parallel.ledger import Ledger
from parallel.mesh import Mesh
from processes import run_on

GROUP = lambda: dist.group.WORLD  # noqa: E731


def sharded(world, changes, sequence_parallel, data=None):
    """-> per step {"loss", "grads", "params"}, all whole; this rank's head."""
    mesh = Mesh(tp=world)
    model = tensor.tensor_parallel(tiny_model(**changes), mesh.group("tp"), sequence_parallel)
    optimizer, history, V = adamw(model.named_parameters()), [], model.config.vocab_size
    for step in data or batches():
        counted, loss = sum(int((labels != -100).sum()) for _, labels in step), 0.0
        for ids, labels in step:
            part = tensor.vocab_parallel_cross_entropy(model(ids), labels, mesh.group("tp"), V).sum() / counted
            part.backward()
            loss += part.item()
        grads.finalize(model.parameters(), mesh)
        whole = {n: tensor.whole(p.grad, getattr(p, "placement", {}), mesh.group("tp")).clone()
                 for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        params = {n: p.clone() for n, p in tensor.full_state(model, mesh.group("tp")).items()}
        history.append({"loss": loss, "grads": whole, "params": params})
    mesh.destroy()
    return history, model.lm_head.weight.detach(), getattr(model.lm_head.weight, "placement", None)


FAMILIES = {"llama": {}, "qwen2": dict(attention_bias=True, model_type="qwen2"), "biases": dict(attention_bias=True),
            "qwen3": dict(qk_norm=True, tie_word_embeddings=True), "alibi": dict(position_embedding_type="alibi"),
            "learned": dict(position_embedding_type="learned", final_logit_softcapping=3.0, attn_logit_softcapping=2.0)}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, num_hidden_layers=2, mlp_only_layers=[0])


def test_experts_cut_too_equal_one_process():
    changes = EXPERTS | dict(n_shared_experts=1)
    truth = train(tiny_model(**changes), batches())
    assert truth[0]["grads"]["model.layers.1.mlp.gate.weight"].abs().max() > 1e-3  # the router's: whole on every rank
    for history, *_ in run_on(2, sharded, changes, False):
        assert_same(history, truth)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_three_steps_equal_one_process(family, sequence_parallel):
    truth = train(tiny_model(**FAMILIES[family]), batches())
    results = [history for history, *_ in run_on(2, sharded, FAMILIES[family], sequence_parallel)]
    for history in results:
        assert_same(history, truth)
    for ours, theirs in zip(*results):  # replicas bitwise equal
        assert ours["loss"] == theirs["loss"]
        assert all(torch.equal(p, theirs["params"][name]) for name, p in ours["params"].items())


@pytest.mark.parametrize("vocab_size", [37, 33, 41, 9])
def test_uneven_vocabulary_is_padded_masked_and_dropped_on_save(vocab_size):
    """On 4 ranks 37 tokens are 10 + 10 + 10 + 7, 33 are 9 + 9 + 9 + 6, and 9 are 3 + 3 + 3 + 0."""
    changes = dict(num_key_value_heads=4, vocab_size=vocab_size)
    data = [[(ids % vocab_size, labels.where(labels < 0, labels % vocab_size)) for ids, labels in step]
            for step in batches(1)]
    truth, n = train(tiny_model(**changes), data), -(-vocab_size // 4)
    for rank, (history, head, placement) in enumerate(run_on(4, sharded, changes, False, data)):
        assert_same(history, truth)
        assert head.shape == (n, 16) and placement == {"global_shape": (vocab_size, 16), "shard": {"tp": 0}}
        assert (head[max(0, vocab_size - rank * n):] == 0).all()  # padding stays zero after the step


# ---------------------------------------------------------------------------------------------------- counts


def counts(world, changes, sequence_parallel):
    model = tensor.tensor_parallel(tiny_model(**changes), GROUP(), sequence_parallel)
    (ids, labels), = batches(1, 1)[0]
    with Ledger() as forward:
        logits = model(ids)
    with Ledger() as entropy:
        loss = tensor.vocab_parallel_cross_entropy(logits, labels, GROUP(), 37).sum()
    with Ledger() as backward:
        loss.backward()
    return [[(e.op, e.shape, int(e.sent)) for e in ledger.entries] for ledger in (forward, entropy, backward)]


@pytest.mark.parametrize("layers", [1, 4])
def test_activation_all_reduces_are_4_per_layer_and_2(layers):
    """q, k, v share one backward, as gate and up do; picotron's one each would be 9 L + 2."""
    changes = dict(num_hidden_layers=layers, attention_bias=True, qk_norm=False)
    for forward, entropy, backward in run_on(2, counts, changes, False):
        activation = ("all_reduce", (2, 8, 16), 2 * 8 * 16 * 8)
        assert forward == [activation] * (2 * layers + 1) and backward == [activation] * (2 * layers + 1)
        assert entropy == [("all_reduce", (2, 8), 2 * 8 * 8)] * 3  # numbers per token, never logits


def test_sequence_parallel_sends_the_same_bytes_by_reduce_scatter_and_all_gather():
    L = 2
    plain = run_on(2, counts, dict(num_hidden_layers=L), False)
    for (forward, _, backward), (before, _, after) in zip(run_on(2, counts, dict(num_hidden_layers=L), True), plain):
        assert [op for op, _, _ in forward].count("reduce_scatter") == 2 * L + 1
        assert [op for op, _, _ in forward].count("all_gather") == 2 * L + 1
        assert {op for op, _, _ in forward + backward} == {"reduce_scatter", "all_gather"}
        assert len(backward) == 4 * L + 2
        assert sum(sent for *_, sent in forward) == sum(sent for *_, sent in before)
        assert sum(sent for *_, sent in backward) == sum(sent for *_, sent in after)


# ----------------------------------------------------------------------------------------------------- traps


def first_gradients(world, sequence_parallel):
    """What a replicated parameter sees before the sum over its parts."""
    model = tensor.tensor_parallel(tiny_model(attention_bias=True), GROUP(), sequence_parallel)
    (ids, labels), = batches(1, 1)[0]
    tensor.vocab_parallel_cross_entropy(model(ids), labels, GROUP(), 37).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if "shard" not in getattr(p, "placement", {})}, [
        n for n, p in model.named_parameters() if getattr(p, "placement", {}).get("partial") == ("tp",)]


def test_partial_gradients_of_replicated_norms_and_biases_are_declared():
    """Without the sum they are wrong (Megatron-LM #1446): the record must name exactly those that are."""
    whole = tiny_model(attention_bias=True)
    (ids, labels), = batches(1, 1)[0]
    summed_loss(whole(ids), labels).backward()
    truth = {n: p.grad for n, p in whole.named_parameters()}
    for sequence_parallel in (False, True):
        for grads, declared in run_on(2, first_gradients, sequence_parallel):
            wrong = [n for n, g in grads.items() if (g - truth[n]).abs().max() > 1e-9]
            assert wrong == declared and len(wrong) == (4 * 3 + 1 if sequence_parallel else 0)


def norms_of_heads(world):
    model = tensor.tensor_parallel(tiny_model(qk_norm=True), GROUP())
    return [n for n, p in model.named_parameters() if getattr(p, "placement", {}).get("partial") == ("tp",)]


def test_q_norm_and_k_norm_are_partial_even_without_sequence_parallelism():
    names = [f"model.layers.{i}.self_attn.{n}_norm.weight" for i in range(4) for n in "qk"]
    assert run_on(2, norms_of_heads) == [names, names]


def row_bias(world):
    linear = torch.nn.Linear(4, 3).double()
    x = torch.randn(2, 4, dtype=torch.double)
    truth = linear(x)
    linear.__class__, linear.group, linear.sequence = tensor.RowParallelLinear, GROUP(), False
    linear.weight = tensor.shard(linear.weight, 1, GROUP())
    return (linear(x.chunk(world, dim=-1)[dist.get_rank()]) - truth).abs().max().item()


def test_bias_of_a_row_parallel_layer_is_added_once():
    assert max(run_on(2, row_bias)) < 1e-12


def heads_that_do_not_divide(world):
    messages = []
    for changes in (dict(num_key_value_heads=2), dict(num_attention_heads=6, num_key_value_heads=6, hidden_size=12),
                    dict(num_key_value_heads=4, intermediate_size=26), EXPERTS):
        with pytest.raises(ValueError) as error:
            tensor.tensor_parallel(tiny_model(**dict(num_key_value_heads=4) | changes), GROUP())
        messages.append(str(error.value))
    return messages


def test_fewer_key_heads_than_ranks_are_refused_with_one_line():
    for messages in run_on(4, heads_that_do_not_divide):
        assert messages == ["tp 4 does not divide num_key_value_heads 2; these would: 1, 2",
                            "tp 4 does not divide num_attention_heads 6; these would: 1, 2, 3, 6",
                            "tp 4 does not divide intermediate_size 26; these would: 1, 2",
                            "tp 4 does not divide moe_intermediate_size 6; these would: 1, 2"]


class Adapted(torch.nn.Linear):
    pass


def adapted(world):
    model = tiny_model()
    model.model.layers[2].mlp.up_proj.__class__ = Adapted
    with pytest.raises(ValueError, match="cuts nn.Linear, and mlp.up_proj is Adapted: merge adapters"):
        tensor.tensor_parallel(model, GROUP())
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)  # nothing was cut


def test_adapters_are_refused_before_anything_is_cut():
    run_on(2, adapted)


def odd_length(world):
    model = tensor.tensor_parallel(tiny_model(), GROUP(), sequence_parallel=True)
    with pytest.raises(ValueError, match="sequence parallelism: sequence length 7 is no multiple of tp 2"):
        model(torch.zeros(1, 7, dtype=torch.long))


def test_sequence_length_that_does_not_divide_is_refused():
    run_on(2, odd_length)


def masks(world):
    """What dropout draws: on replicated activations, inside own_randomness, and again after it."""
    drop = lambda: F.dropout(torch.ones(64), 0.5)  # noqa: E731
    torch.manual_seed(7)
    before = drop()
    state = torch.get_rng_state()
    with tensor.own_randomness(dist.get_rank(), torch.device("cpu")):
        inside = drop()
    after = drop()
    torch.set_rng_state(state)
    with tensor.own_randomness(dist.get_rank(), torch.device("cpu")):  # as recomputation would
        again = drop()
    return before, inside, after, again


def test_rng_replicas_share_dropout_masks_and_shards_do_not():
    (before, inside, after, again), (before_, inside_, after_, again_) = run_on(2, masks)
    assert torch.equal(before, before_) and torch.equal(after, after_) and not torch.equal(before, after)
    assert not torch.equal(inside, inside_) and not torch.equal(inside, after)
    assert torch.equal(inside, again) and torch.equal(inside_, again_)


def dropped(world, attention):
    """Attention weights dropped, with and without recomputation -> loss, both gradients, the next random number."""
    grads = []
    for checkpointing in ("none", "full"):
        torch.manual_seed(3)
        model = tensor.tensor_parallel(tiny_model(attention_dropout=0.5, attention=attention), GROUP())
        model.model.activation_checkpointing = checkpointing
        (ids, labels), = batches(1, 1)[0]
        loss = tensor.vocab_parallel_cross_entropy(model(ids), labels, GROUP(), 37).sum()
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    return loss.item(), grads, torch.rand(1).item()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_recomputation_restores_rng(attention):
    results = run_on(2, dropped, attention)
    for loss, (kept, recomputed), after in results:
        assert loss == results[0][0] and after == results[0][2]
        assert all(torch.equal(kept[n], recomputed[n]) for n in kept)


# ------------------------------------------------------------------------------------------------- cross-entropy


def entropies(world):
    torch.manual_seed(1)
    V, n = 11, -(-11 // world)
    logits = (30 * torch.randn(3, 5, V, dtype=torch.double)).requires_grad_()
    labels = torch.randint(V, (3, 5))
    labels[0], labels[1, 2] = -100, -100  # one row fully masked
    weights = torch.rand(3, 5, dtype=torch.double)
    truth = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, 5)
    (truth * weights).sum().backward()
    rank = dist.get_rank()
    padded = F.pad(logits.detach(), (0, n * world - V), value=1e9)  # garbage where padding is
    local = padded[..., rank * n:(rank + 1) * n].clone().requires_grad_()
    ours = tensor.vocab_parallel_cross_entropy(local, labels, GROUP(), V)
    (ours * weights).sum().backward()
    found = tensor.gather_logits(local.grad, GROUP(), V)
    half = tensor.vocab_parallel_cross_entropy(local.detach().bfloat16(), labels, GROUP(), V)
    errors = (ours - truth).abs().max().item(), (found - logits.grad).abs().max().item()
    return *errors, half.dtype, ours[0].abs().sum().item()


@pytest.mark.parametrize("world", [2, 4])
def test_vocab_parallel_cross_entropy_and_its_gradient(world):
    for loss, gradient, dtype, masked in run_on(world, entropies):
        assert loss < 1e-9 and gradient < 1e-9 and dtype == torch.float32 and masked == 0


def test_one_process_needs_no_group():
    model = tiny_model()
    assert tensor.tensor_parallel(model, None) is model
    assert tensor.full_state(model, None).keys() == dict(model.named_parameters()).keys()
    (ids, labels), = batches(1, 1)[0]
    loss = tensor.vocab_parallel_cross_entropy(model(ids), labels, None, 37)
    assert abs(loss.sum().item() - summed_loss(model(ids), labels).item()) < 1e-9
