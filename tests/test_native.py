"""--engine torch against one process and against the scratch engine: losses, norms, parameters, and bytes sent."""

from collections import Counter
from pathlib import Path

import checkpoint
import pytest
import stages
import torch
import torch.distributed as dist
import train_pretrain
from model import CausalLM, ModelConfig
from one_process import CLIP, STEPS, assert_close
from parallel import parallelize
from parallel.ledger import ring_bytes
from parallel.mesh import Mesh
from processes import run_on
from stages import assert_close_logs, run_stage
from test_parallelize import Pretended, alone, batch, model_of, optimizer_of
from test_train_parallel import on, settings_of
from test_train_pretrain import TEXT
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# Collectives as torch's dispatcher sees them, whoever calls: what they are, and which argument (or -1: the result) is
# the whole payload.
OPERATIONS = {"c10d::allreduce_": ("all_reduce", 0), "c10d::_allgather_base_": ("all_gather", 0),
              "c10d::allgather_": ("all_gather", 0), "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
              "c10d::broadcast_": ("broadcast", 0), "c10d::send": ("send", 0),
              "_c10d_functional::all_reduce": ("all_reduce", 0),
              "_c10d_functional::all_gather_into_tensor": ("all_gather", -1),
              "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0)}
SILENT = ("recv_", "wait_tensor", "_wrap_tensor", "barrier")


class Wire(TorchDispatchMode):
    """Counts what this rank sends by operation, logical payload times ring factor, beneath both engines."""

    def __init__(self):
        super().__init__()
        self.sent = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # what it does with its parts comes by again
        result, (space, name) = function(*args, **(kwargs or {})), function.name().split("::")
        if space in ("c10d", "_c10d_functional") and not name.startswith(SILENT):
            op, place = OPERATIONS[function.name()]
            tensors = torch.utils._pytree.tree_leaves(result if place < 0 else args[place])
            payload = sum(t.numel() * t.element_size() for t in tensors)
            boxed = next((a for a in args if isinstance(a, torch.ScriptObject)), None)
            group = dist.ProcessGroup.unbox(boxed) if boxed is not None else dist.distributed_c10d._resolve_process_group(args[-1])
            self.sent[op] += int(ring_bytes(op, payload, group.size())) if payload > 8 else 0  # the loss, a number
        return result


def train(world, shape, tied, count, options):
    """Three steps as in test_parallelize, and what the second of them sent."""
    mesh = Mesh(**shape)
    run = parallelize(model_of(tie_word_embeddings=tied), mesh, optimizer_of, **options)
    result = {"losses": [], "norms": []}
    for step in range(STEPS):
        mine = [x.chunk(mesh.size("dp"))[mesh.rank("dp")].chunk(count) for x in batch(step)]
        parts = [(ids, labels, None) for ids, labels in zip(*mine)]
        counted = run.count(labels for _, labels, _ in parts)
        with Wire() as wire:
            result["losses"].append(run.backward(parts, counted).item())
        result["norms"].append(run.clip_grad_norm(CLIP).item())
        with wire:
            run.step()
        run.zero_grad()
        result["sent"] = dict(wire.sent)
        if step == 0:  # between the steps, so that weights which it gathered must not stay
            total = run.evaluate([(ids, labels, None) for ids, labels in zip(*[x.split(3) for x in batch(0)])])
            result["after a step"] = [total["nats"] / total["tokens"]]
    result["parameters"] = run.state()
    mesh.destroy()
    return result


@pytest.mark.parametrize("world, shape, tied, count, options", [
    (2, dict(), False, 2, dict()), (2, dict(), True, 2, dict(zero=2)), (2, dict(), False, 2, dict(zero=3)),
    (2, dict(tp=2), True, 2, dict()), (2, dict(pp=2), True, 4, dict(pp_schedule="interleaved")),
    (2, dict(pp=2), True, 4, dict(pp_schedule="zb")), (4, dict(tp=2), True, 2, dict()),
    (4, dict(tp=2), False, 2, dict(zero=3, sequence_parallel=True)), (4, dict(tp=2, pp=2), True, 4, dict()),
    (4, dict(pp=2), False, 4, dict(zero=1)), (2, dict(), True, 2, dict(zero=3, offload=True)),
    (4, dict(pp=2), True, 4, dict(zero=1, pp_schedule="gpipe"))], ids=str)
def test_same_as_one_process_and_scratch_sends_no_more(world, shape, tied, count, options):
    truth, torchs = alone(dict(tie_word_embeddings=tied)), run_on(world, train, shape, tied, count, options | {"engine": "torch"})
    scratch = run_on(world, train, shape, tied, count, options | {"engine": "scratch"})
    for result in torchs:
        assert_close({name: result[name] for name in ("losses", "norms", "parameters")}, truth)
        assert all(result[name] == torchs[0][name] for name in ("losses", "norms", "after a step"))
        assert all(torch.equal(result["parameters"][n], torchs[0]["parameters"][n]) for n in truth["parameters"])
    for rank, (a, b) in enumerate(zip(torchs, scratch)):
        assert_close({name: a[name] for name in ("losses", "norms", "after a step")}, b)
        print("rank", rank, "torch", a["sent"], "scratch", b["sent"])
        assert 0 < sum(b["sent"].values()) <= sum(a["sent"].values())


# ---- the stage: its checkpoints go from engine to engine, and what it refuses


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    (folder / "sums.txt").write_text(TEXT)
    return folder


def test_checkpoints_go_from_engine_to_engine_and_layout_to_layout(folder):
    settings = dict(schedule="constant", warmup_steps=0, save_every=2, eval_every=2, val_fraction=0.02, micro_batch_size=2)
    truth = run_stage(train_pretrain.main, settings_of(folder, "alone", **settings, max_steps=10))
    for world, steps, flags in ((2, 2, dict(tp=2, activation_checkpointing="full")), (2, 4, dict(pp=2, engine="scratch")),
                                (2, 6, dict(zero=3, activation_checkpointing="selective")), (1, 8, dict(engine="scratch")),
                                (2, 10, dict(pp=2, pp_schedule="interleaved"))):
        now = settings_of(folder, "moved", **settings, max_steps=steps, resume="auto", **{"engine": "torch"} | flags)
        on(world, now) if world > 1 else run_stage(train_pretrain.main, now)
    assert_close_logs(folder / "moved", truth)
    truth, ours = (checkpoint.read_safetensors(checkpoint.latest(r) / "model.safetensors") for r in (truth, folder / "moved"))
    assert truth.keys() == ours.keys() and all((truth[n] - ours[n]).abs().max() < 1e-9 for n in truth)


def test_float16_scales_its_loss_as_one_process_does(folder):
    settings = dict(dtype="float16", max_steps=3, lr=1e-2, save_every=0, eval_every=0, micro_batch_size=4)
    one = run_stage(train_pretrain.main, settings_of(folder, "half", **settings))
    two = on(2, settings_of(folder, "half2", **settings, engine="torch", zero=2))
    states = [checkpoint.read_state(checkpoint.latest(run)) for run in (one, two)]
    assert states[0]["loss_scale"] == states[1]["loss_scale"]
    assert stages.losses(two) == pytest.approx(stages.losses(one), abs=0.02)


@pytest.mark.parametrize("world, flags, line", [
    (1, {}, "--engine torch: needs processes: torchrun --nproc_per_node N starts N"),
    (2, dict(cp=2), "--engine torch has no --cp"), (2, dict(ep=2), "and no --ep"),
    (2, dict(zero=1, optimizer="muon"), "cuts matrices under --zero, and muon needs them whole"),
    (2, dict(tp=2, attention_dropout=0.1), "would drop alike on all ranks of --tp"),
    (2, dict(pp=2, zero=2), "keeps gradients whole till the last microbatch under --pp: take --zero 1"),
    (2, dict(pp=2, micro_batch_size=3), "takes equal microbatches under --pp: 3 does not divide a rank's 16 rows"),
    (4, dict(pp=4, micro_batch_size=8), "takes at least --pp 4 microbatches, not 2"),
    (2, dict(pp=2, pp_schedule="zb", global_batch_size=3, micro_batch_size=1), "in multiples of --pp 2 for --pp_schedule zb")])
def test_what_torch_s_engine_lacks_is_refused_with_one_line(world, flags, line):
    with pytest.raises(ValueError) as error:
        train_pretrain.check(train_pretrain.Args(engine="torch", **flags), world)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("sizes, shape, line", [
    (dict(tp=4), dict(num_key_value_heads=2), "--tp 4 does not divide 2"),
    (dict(tp=1), dict(num_experts=2), "has no experts"),
    (dict(tp=2), dict(attention_dropout=0.1), "would drop alike on all ranks of --tp"),
    (dict(pp=4), dict(num_hidden_layers=3), "makes 4 stages of 3 layers under --pp 4"),
    (dict(tp=2), dict(position_embedding_type="alibi"), "takes no other positions than RoPE")])
def test_models_that_torch_s_engine_does_not_cut_are_refused_with_one_line(sizes, shape, line):
    model = CausalLM(ModelConfig(38, **dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=4) | shape))
    with pytest.raises(ValueError) as error:
        parallelize(model, Pretended(**sizes), optimizer_of, engine="torch")
    assert line in str(error.value) and "\n" not in str(error.value)
