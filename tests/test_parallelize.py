"""Tests of parallel/__init__.py: strategies together against one process, float64, three steps; and what is refused."""

from dataclasses import replace

import parallel
import pytest
import torch
import torch.nn.functional as F
import train_pretrain
from model import CausalLM, ModelConfig
from one_process import CLIP, LR, STEPS, assert_close, global_batch
from optim import build_optimizer, clip_grad_norm
from parallel import parallelize
from parallel.mesh import Mesh
from processes import run_on


def model_of(tied: bool) -> CausalLM:
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    return CausalLM(ModelConfig(38, **shape, qk_norm=True, initializer_range=0.3, tie_word_embeddings=tied)).double()


def batch(step: int):
    """16 rows of 8 tokens, with uneven counted ones."""
    ids, labels = global_batch(step)
    return torch.cat((ids, ids[:, :2]), 1), torch.cat((labels, labels[:, :2]), 1)


def optimizer_of(named):
    return build_optimizer("adamw", named, lr=LR["adamw"], weight_decay=0.1)


def alone(tied: bool) -> dict:
    model = model_of(tied)
    optimizer, result = optimizer_of(model.named_parameters()), {"losses": [], "norms": []}
    for step in range(STEPS):
        ids, labels = batch(step)
        loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        result["losses"].append(loss.item())
        result["norms"].append(clip_grad_norm(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        ids, labels = batch(0)
        result["nats"] = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum").item()
    return result | {"parameters": {n: p.detach() for n, p in model.named_parameters()}}


def train(world, shape, tied, count, options):
    mesh = Mesh(**shape)
    run = parallelize(model_of(tied), mesh, optimizer_of, **options)
    result = {"losses": [], "norms": []}

    def micro_batches(step):
        mine = [x.chunk(mesh.size("dp"))[mesh.rank("dp")].chunk(count) for x in batch(step)]
        return [(ids, labels, None) for ids, labels in zip(*mine)]

    for step in range(STEPS):
        parts = micro_batches(step)
        result["losses"].append(run.backward(parts, run.count(labels for _, labels, _ in parts)).item())
        result["norms"].append(run.clip_grad_norm(CLIP).item())
        run.step()
        run.zero_grad()
    total = run.evaluate([(ids, labels, None) for ids, labels in zip(*[x.split(3) for x in batch(0)])])  # 6, one shorter
    assert total["tokens"] == int((batch(0)[1] != -100).sum())
    result["nats"] = total["nats"]
    result["parameters"] = run.state()
    mesh.destroy()
    return result


@pytest.mark.parametrize("shape, tied, count, options", [
    (dict(tp=2, pp=2), True, 4, dict(zero=1)),  # 8 ranks: dp 2 x tp 2 x pp 2
    (dict(tp=2, pp=2), True, 4, dict(zero=2, offload=True, sequence_parallel=True)),
    (dict(tp=2, cp=2), False, 2, dict(zero=3)),
    (dict(pp=2, cp=2), True, 4, dict(pp_schedule="interleaved"))], ids=str)
def test_three_axes_on_8_ranks_equal_one_process(shape, tied, count, options):
    check(8, shape, tied, count, options)


@pytest.mark.parametrize("shape, count, options", [
    (dict(tp=2), 2, dict(zero=2)), (dict(tp=2), 2, dict(zero=3, sequence_parallel=True)), (dict(cp=2), 2, dict(zero=1)),
    (dict(pp=2), 4, dict(pp_schedule="zb", zero=1)), (dict(tp=2, pp=2), 2, dict()), (dict(cp=2), 1, dict(cp_method="ulysses")),
    (dict(), 2, dict(zero=3, offload=True))], ids=str)
def test_pairs_on_4_ranks_equal_one_process(shape, count, options):
    check(4, shape, True, count, options)


def check(world, shape, tied, count, options):
    truth, ranks = alone(tied), run_on(world, train, shape, tied, count, options)
    for result in ranks:
        assert_close(result, truth)
        assert result["losses"] == ranks[0]["losses"] and result["norms"] == ranks[0]["norms"]
        assert all(torch.equal(result["parameters"][n], ranks[0]["parameters"][n]) for n in truth["parameters"])


def test_one_process_is_left_as_it_is():
    model, truth = model_of(True), alone(True)
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
        parallelize(model_of(True), mesh, optimizer_of, **options)
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
