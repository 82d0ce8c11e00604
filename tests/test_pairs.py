"""Tensor, pipeline, context and expert parallelism together, and with data parallelism, against one process.

float64, three optimizer steps: losses, gradient norms, gradients and parameters to 1e-9; replicas equal to the bit."""

import pytest
import torch
import torch.distributed as dist

from moe import router_loss
from optim import clip_grad_norm
from oracle import TOLERANCE, adamw, assert_same, batches, named, summed_loss, tiny_model
from parallel import context, expert, grads, pipeline, schedules, tensor
from parallel.mesh import Mesh
from processes import run_on

CLIP, AUX = 0.5, (0.1, 0.01)


def one_process(changes: dict) -> list[dict]:
    model = tiny_model(**changes)
    optimizer, history = adamw(model.named_parameters()), []
    for step in batches(length=16):
        counted = sum(int((labels != -100).sum()) for _, labels in step)
        loss = 0.0
        for ids, labels in step:
            part = summed_loss(model(ids), labels) / counted
            (part + router_loss(model, *AUX) / len(step)).backward()
            loss += part.item()
        found, norm = named(model), clip_grad_norm(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": loss, "norm": norm.item(), "grads": found,
                        "params": named(model, "data")})
    return history


def laid_out(world, degrees, changes, options):
    """One rank of a layout -> per step {"loss", "norm", "grads", "params"} of this rank's stages, otherwise whole."""
    mesh, method = Mesh(**degrees), options.get("method", "zigzag")
    dp, pp, tp = mesh.rank("dp"), mesh.size("pp"), mesh.group("tp")
    model = expert.expert_parallel(tiny_model(**changes), mesh.group("ep"))
    model = tensor.tensor_parallel(model, tp, options.get("sequence_parallel", False))
    model = context.context_parallel(model, mesh.group("cp"), method)
    V, sparse = model.config.vocab_size, sum(hasattr(layer.mlp, "experts") for layer in model.model.layers)
    stages = pipeline.cut(model, mesh.rank("pp"), pp, options.get("chunks", 1))
    parameters = [pair for stage in stages.values() for pair in stage.named_parameters()]
    optimizer, history = adamw(parameters), []

    def whole(p, what):
        part = tensor.whole(getattr(p, what), getattr(p, "placement", {}), tp)
        return expert.whole(part, getattr(p, "placement", {}), mesh.group("ep")).clone()

    for step in batches(length=16):
        counted = sum(int((labels != -100).sum()) for _, labels in step)
        mine = [context.split_batch(*pair, mesh.group("cp"), method) for pair in step[dp::mesh.size("dp")]]
        plan = schedules.plan(options.get("schedule", "1f1b"), pp, len(mine), options.get("chunks", 1))

        def loss_of(logits, labels):
            return tensor.vocab_parallel_cross_entropy(logits, labels, tp, V).sum() / counted

        def own_loss(stage):
            here = sum(hasattr(layer.mlp, "experts") for layer in stage.model.layers)
            return router_loss(stage, *AUX) * here / sparse / len(step) if here else None  # it is a mean over them

        loss, _ = pipeline.execute(plan, stages, mine, loss_of, mesh.group("pp"), own_loss)
        if mesh.group("dp", "cp") is not None:
            dist.all_reduce(loss, group=mesh.group("dp", "cp"))
        grads.finalize([p for _, p in parameters], mesh)
        for _, p in parameters:
            axes = ("edp", "cp") if "ep" in getattr(p, "placement", {}).get("shard", {}) else ("dp", "cp")
            if mesh.group(*axes) is not None:
                dist.all_reduce(p.grad, group=mesh.group(*axes))
        found = {n: whole(p, "grad") for n, p in parameters}
        norm = grads.clip_grad_norm([p for _, p in parameters], mesh, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": loss.item(), "norm": norm.item(), "grads": found,
                        "params": {n: whole(p, "data") for n, p in parameters}})
    mesh.destroy()
    return history


EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, mlp_only_layers=[1])
TIED = dict(tie_word_embeddings=True, qk_norm=True)
LAYOUTS = {
    "tp pp": (dict(tp=2, pp=2), TIED, {}),
    "tp pp, sequence parallel, zero bubble": (dict(tp=2, pp=2), TIED, dict(sequence_parallel=True, schedule="zb")),
    "tp pp, interleaved": (dict(tp=2, pp=2), dict(attention_bias=True), dict(schedule="interleaved", chunks=2)),
    "tp cp": (dict(tp=2, cp=2), TIED, {}),
    "tp cp, sequence parallel, ulysses": (dict(tp=2, cp=2), {}, dict(sequence_parallel=True, method="ulysses")),
    "pp cp": (dict(pp=2, cp=2), TIED, dict(method="ring", schedule="zb")),
    "dp tp": (dict(dp=2, tp=2), TIED, {}),
    "dp pp": (dict(dp=2, pp=2), TIED, {}),
    "dp cp": (dict(dp=2, cp=2), TIED, {}),
    "ep tp": (dict(ep=2, tp=2), EXPERTS, {}),
    "ep pp": (dict(ep=2, pp=2), EXPERTS | TIED, dict(schedule="zb")),
    "dp ep": (dict(dp=4, ep=2), EXPERTS, {}),
    "dp tp pp, eight processes": (dict(dp=2, tp=2, pp=2), TIED, dict(sequence_parallel=True)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pair_of_strategies_equals_one_process(layout):
    degrees, changes, options = LAYOUTS[layout]
    world = 1
    for n in (degrees.get(axis, 1) for axis in ("pp", "cp", "tp")):
        world *= n
    world *= degrees.get("dp", degrees.get("ep", 1))
    truth, steps = one_process(changes), []
    for parts in zip(*run_on(world, laid_out, degrees, changes, options)):
        assert len({(part["loss"], part["norm"]) for part in parts}) == 1  # every rank knows the same numbers
        step = {"loss": parts[0]["loss"], "norm": parts[0]["norm"], "grads": {}, "params": {}}
        for kind in ("grads", "params"):
            for part in parts:
                for name, value in part[kind].items():
                    assert torch.equal(step[kind].setdefault(name, value), value), f"{name} differs between replicas"
            if "tie_word_embeddings" in changes and degrees.get("pp", 1) > 1:
                assert torch.equal(step[kind].pop("lm_head.weight"), step[kind]["model.embed_tokens.weight"])
        steps.append(step)
    assert_same(steps, truth)
    for step, true in zip(steps, truth):
        assert abs(step["norm"] - true["norm"]) < TOLERANCE
