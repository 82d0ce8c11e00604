"""Tests of parallel/__init__.py: strategies together against one process, float64, three steps; and what is refused."""

from dataclasses import replace
from functools import partial

import parallel
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import train_pretrain
from model import CausalLM, ModelConfig
from moe import router_loss_share
from one_process import CLIP, LR, STEPS, assert_close, global_batch
from optim import build_optimizer, clip_grad_norm
from parallel import parallelize
from parallel.mesh import Mesh
from processes import run_on


def model_of(**changes) -> CausalLM:
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    return CausalLM(ModelConfig(**shape | dict(vocab_size=38, qk_norm=True, initializer_range=0.3) | changes)).double()


def batch(step: int):
    """16 rows of 8 tokens, with uneven counted ones."""
    ids, labels = global_batch(step)
    return torch.cat((ids, ids[:, :2]), 1), torch.cat((labels, labels[:, :2]), 1)


def optimizer_of(named):
    return build_optimizer("adamw", named, lr=LR["adamw"], weight_decay=0.1)


def routers_of(model):
    return partial(router_loss_share, config=model.config, tokens=batch(0)[0].numel())


def alone(changes: dict, parts: int = 1) -> dict:
    """parts: micro batches of a step, each of which balances its experts by itself."""
    model = model_of(**changes)
    optimizer, result = optimizer_of(model.named_parameters()), {"losses": [], "norms": [], "grads": []}
    for step in range(STEPS):
        ids, labels = batch(step)
        counted, loss = (labels != -100).sum(), 0.0
        for x, y in zip(ids.chunk(parts), labels.chunk(parts)):
            part = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum") / counted
            (part + (routers_of(model)(model) or 0.0)).backward()
            loss += part.item()
        result["losses"].append(loss)
        result["grads"].append({name: p.grad.clone() for name, p in model.named_parameters()})
        result["norms"].append(clip_grad_norm(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        ids, labels = batch(0)
        result["nats"] = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum").item()
    return result | {"parameters": {n: p.detach() for n, p in model.named_parameters()}}


def train(world, shape, changes, count, options):
    mesh, model = Mesh(**shape), model_of(**changes)
    run = parallelize(model, mesh, optimizer_of, own_loss=routers_of(model), **options)
    result = {"losses": [], "norms": [], "grads": []}

    def micro_batches(step):
        mine = [x.chunk(mesh.size("dp"))[mesh.rank("dp")].chunk(count) for x in batch(step)]
        return [(ids, labels, None) for ids, labels in zip(*mine)]

    for step in range(STEPS):
        parts = micro_batches(step)
        result["losses"].append(run.backward(parts, run.count(labels for _, labels, _ in parts)).item())
        result["grads"].append(whole_gradients(run))
        result["norms"].append(run.clip_grad_norm(CLIP).item())
        run.step()
        run.zero_grad()
    total = run.evaluate([(ids, labels, None) for ids, labels in zip(*[x.split(3) for x in batch(0)])])  # 6, one shorter
    assert total["tokens"] == int((batch(0)[1] != -100).sum())
    result["nats"] = total["nats"]
    result["parameters"] = run.state()
    mesh.destroy()
    return result


def whole_gradients(run) -> dict:
    """Of this rank's stages, put together from ZeRO's pieces and from the slices of tp and ep."""
    found = {}
    for name, p in run.named.items():
        grad = p.grad
        if run.zero:
            grad = torch.zeros(p.shape, dtype=p.dtype)
            for piece in (piece for piece in run.parameters() if piece.whole is p):
                grad.view(-1)[piece.start : piece.start + piece.numel()] = piece.grad.flatten()
            axes = ("edp", "cp") if "ep" in getattr(p, "placement", {}).get("shard", {}) else ("dp", "cp")
            if run.mesh.group(*axes) is not None:
                dist.all_reduce(grad, group=run.mesh.group(*axes))
        grad.placement = getattr(p, "placement", {})
        found[name] = run._whole(grad)
    return found


TIED, UNEVEN = dict(tie_word_embeddings=True), dict(vocab_size=37, tie_word_embeddings=True)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, mlp_only_layers=[1], router_aux_loss_coef=0.1,
               router_z_loss_coef=0.01)
LAYOUTS = [  # processes, of which dp is what the other axes leave; axes; model; micro batches of a rank; options
    (4, dict(tp=2), UNEVEN, 2, dict()),
    (4, dict(tp=2), TIED, 2, dict(zero=2)),
    (4, dict(tp=2), TIED, 2, dict(zero=3, sequence_parallel=True)),
    (4, dict(pp=2), TIED, 4, dict()),
    (4, dict(pp=2), TIED, 4, dict(zero=1, pp_schedule="zb")),
    (4, dict(cp=2), TIED, 2, dict()),
    (4, dict(cp=2), TIED, 2, dict(zero=1)),
    (4, dict(cp=2), TIED, 1, dict(cp_method="ulysses")),
    (4, dict(), TIED, 2, dict(zero=3, offload=True)),
    (4, dict(tp=2, pp=2), UNEVEN, 2, dict()),
    (4, dict(tp=2, pp=2), UNEVEN, 4, dict(pp_schedule="zb", sequence_parallel=True)),
    (4, dict(tp=2, pp=2), dict(attention_bias=True), 4, dict(pp_schedule="interleaved")),
    (4, dict(tp=2, cp=2), TIED, 2, dict()),
    (4, dict(tp=2, cp=2), dict(), 2, dict(cp_method="ulysses", sequence_parallel=True)),
    (4, dict(pp=2, cp=2), TIED, 4, dict(cp_method="ring", pp_schedule="zb")),
    (4, dict(ep=2, tp=2), EXPERTS, 2, dict()),
    (4, dict(ep=2, pp=2), EXPERTS | TIED, 4, dict(pp_schedule="zb")),
    (4, dict(ep=2, cp=2), EXPERTS | dict(router_aux_loss_coef=0.0), 2, dict()),  # a part of a row has its own balance
    (4, dict(ep=2), EXPERTS, 2, dict()),
    (4, dict(ep=2), EXPERTS, 2, dict(zero=2)),
    (8, dict(tp=2, pp=2), UNEVEN, 4, dict(sequence_parallel=True)),
    (8, dict(tp=2, pp=2), TIED, 4, dict(zero=1)),
    (8, dict(tp=2, pp=2), TIED, 4, dict(zero=2, offload=True, sequence_parallel=True)),
    (8, dict(tp=2, cp=2), dict(), 2, dict(zero=3)),
    (8, dict(pp=2, cp=2), TIED, 4, dict(pp_schedule="interleaved"))]


@pytest.mark.parametrize("world, shape, changes, count, options", LAYOUTS, ids=str)
def test_strategies_together_equal_one_process(world, shape, changes, count, options):
    ranks = run_on(world, train, shape, changes, count, options)
    dp = world
    for axis in ("tp", "pp", "cp"):
        dp //= shape.get(axis, 1)
    truth, grads = alone(changes, dp * count), [{} for _ in range(STEPS)]
    for result in ranks:
        for step, mine in zip(grads, result.pop("grads")):
            for name, grad in mine.items():
                assert torch.equal(step.setdefault(name, grad), grad), f"the gradient of {name} differs between replicas"
        assert_close(result, truth)
        assert all(result[name] == ranks[0][name] for name in ("losses", "norms", "nats"))
        assert all(torch.equal(result["parameters"][n], ranks[0]["parameters"][n]) for n in truth["parameters"])
    for step in grads if "pp" in shape and "tie_word_embeddings" in changes else []:
        assert torch.equal(step.pop("lm_head.weight"), step["model.embed_tokens.weight"])
    assert_close({"grads": grads}, truth)


def test_one_process_is_left_as_it_is():
    model, truth = model_of(**TIED), alone(TIED)
    run = parallelize(model, Mesh(), optimizer_of)
    assert run.stages[0] is model and not run.sync.buckets
    losses = []
    for step in range(STEPS):
        ids, labels = batch(step)
        losses.append(run.backward([(ids, labels, None)], run.count([labels])).item())
        run.clip_grad_norm(CLIP)
        run.step()
        run.zero_grad()
    assert_close({"losses": losses, "parameters": run.state()}, truth)


class Pretended(Mesh):
    """A mesh of several ranks in one process, for what is refused before a group is needed."""

    def __init__(self, **sizes):
        super().__init__()
        self.sizes |= sizes


@pytest.mark.parametrize("sizes, options, line", [
    (dict(pp=2), dict(zero=3), "--zero 3 would gather every layer for each microbatch of a pipeline"),
    (dict(edp=1, ep=2), dict(zero=3), "--zero 3 gathers whole layers, --ep has cut them"),
    (dict(), dict(offload=True), "--offload moves ZeRO's part of the state: it needs --zero 1, 2 or 3"),
    (dict(pp=8), dict(), "--pp 8 with 1 chunks makes 8 stages of 4 layers; at most 4 would do"),
    (dict(pp=4), dict(pp_schedule="interleaved"), "makes 8 stages of 4 layers; at most 2 would do")])
def test_what_does_not_go_together_is_refused_with_one_line(sizes, options, line):
    mesh = Pretended(**sizes)
    mesh.group = lambda *names: None
    with pytest.raises(ValueError) as error:
        parallelize(model_of(), mesh, optimizer_of, **options)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("optimizer, flag", [("muon", "tp"), ("adafactor", "tp"), ("muon", "zero"), ("adafactor", "zero")])
def test_optimizers_that_need_whole_matrices_are_refused_where_they_are_cut(optimizer, flag):
    args = train_pretrain.Args(optimizer=optimizer, **{flag: {"tp": 2, "zero": 3}[flag]})
    with pytest.raises(ValueError) as error:
        parallel.check(args, 2)
    assert f"--{flag} {getattr(args, flag)}: cuts matrices, and {optimizer} needs them whole" in str(error.value)
    assert "\n" not in str(error.value)
    for optimizer in ("adamw", "lion"):
        parallel.check(replace(args, optimizer=optimizer), 2)
