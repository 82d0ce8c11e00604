"""Sharded checkpoints: any layout loads into any other bit for bit, and a rank that dies while saving costs nothing."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import checkpoint
import shards
from checkpoint import latest
from model import CausalLM, ModelConfig
from moe import router_loss_share
from one_process import global_batch
from optim import build_optimizer
from parallel import parallelize
from parallel.mesh import Mesh
from processes import run_on
from shards import Box, flat_boxes, load_checkpoint, load_sharded, overlap, save_checkpoint, saved_tensors
from test_checkpoint import Tokenizer

DENSE = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
             qk_norm=True, initializer_range=0.3, tie_word_embeddings=True)
WIDE = DENSE | dict(hidden_size=64, intermediate_size=80, num_hidden_layers=2)  # matrices that have their moments in 8 bits
MIXED = DENSE | dict(num_experts=4, moe_intermediate_size=8, tie_word_embeddings=False)


def model_of(shape: dict) -> CausalLM:
    return CausalLM(ModelConfig(38, **shape)).double()  # 38 tokens: padded under tp 4


def batch(step: int):
    """16 rows of 8 tokens, with uneven counted ones."""
    ids, labels = global_batch(step)
    return torch.cat((ids, ids[:, :2]), 1), torch.cat((labels, labels[:, :2]), 1)


def optimizer_of(name: str):
    return lambda named: build_optimizer(name, named, lr=0.01, weight_decay=0.1)


class Started:
    """A run in a layout: mesh sizes, parallelize's options, the optimizer's name."""

    def __init__(self, layout):
        sizes, options, optimizer, shape = layout
        self.mesh = Mesh(**sizes)
        own = lambda stage: router_loss_share(stage, self.run.config, 16 * 8)  # noqa: E731
        self.run = parallelize(model_of(shape), self.mesh, optimizer_of(optimizer), own_loss=own, **options)

    def train(self, steps) -> float:
        for step in steps:
            # Microbatches of the same rows in every layout: each balances its own experts.
            mine = [x.chunk(self.mesh.size("dp"))[self.mesh.rank("dp")].split(2) for x in batch(step)]
            parts = [(ids, labels, None) for ids, labels in zip(*mine)]
            loss = self.run.backward(parts, self.run.count(y for _, y, _ in parts))
            self.run.clip_grad_norm(1.0)
            self.run.step()
            self.run.zero_grad()
        return float(loss)

    def save(self, out, step, **more):
        return save_checkpoint(out, step, run=self.run, tokenizer=Tokenizer(), state={"tokens": 5}, **more)


def saving(world, layout, out):
    """Two steps, a checkpoint, a third step -> its loss."""
    started = Started(layout)
    started.train(range(2))
    started.save(out, 2)
    loss = started.train([2])
    started.mesh.destroy()
    return loss


def loading(world, layout, folder, out):
    """Load, save again elsewhere, go on: the third step -> its loss, and the state that was saved."""
    started = Started(layout)
    state = load_checkpoint(folder, run=started.run)
    started.save(out, 2)
    loss = started.train([2])
    started.mesh.destroy()
    return loss, state


def loading_alone(layout, folder, out):
    _, _, optimizer, shape = layout
    model = model_of(shape)
    model.train()
    optimizer = optimizer_of(optimizer)(model.named_parameters())
    state = load_checkpoint(folder, model, optimizer)
    checkpoint.save_checkpoint(out, 2, model=model, optimizer=optimizer, tokenizer=Tokenizer(), state={"tokens": 5})
    loss, counted = 0.0, (batch(2)[1] != -100).sum()
    for ids, labels in zip(*[x.split(2) for x in batch(2)]):
        nats = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        loss += (nats / counted).item()
    return loss, state


def contents(folder, shape: dict) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    model, found = model_of(shape), {}
    saved = saved_tensors(Path(folder), model.config, {name: tuple(p.shape) for name, p in model.named_parameters()})
    for section, entries in saved.items():
        for name, whole in entries.items():
            nothing = float("nan") if whole.dtype.is_floating_point else 99
            found[f"{section} {name}"] = torch.full(whole.shape, nothing, dtype=whole.dtype)
            whole.read(name, Box((0,) * len(whole.shape), whole.shape), found[f"{section} {name}"])
    return found


def assert_same_contents(a, b, shape: dict) -> None:
    a, b = contents(a, shape), contents(b, shape)
    assert a.keys() == b.keys() and any(name.endswith("exp_avg") or "momentum" in name for name in a)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# ---- boxes


def test_flat_boxes_by_brute_force():
    for shape in ((7,), (3, 5), (2, 3, 4), (3, 1, 2), (1, 4)):
        numbers = torch.arange(torch.Size(shape).numel())
        for first in range(len(numbers) + 1):
            for last in range(first, len(numbers) + 1):
                boxes = flat_boxes(first, last, shape)
                parts = [numbers.view(shape)[box.within(Box((0,) * len(shape), shape))].flatten() for box in boxes]
                assert torch.cat([*parts, numbers[:0]]).tolist() == list(range(first, last))
                assert len(boxes) <= 2 * len(shape) - 1
    assert flat_boxes(3, 12, (4, 5)) == [Box((0, 3), (1, 2)), Box((1, 0), (1, 5)), Box((2, 0), (1, 2))]


def test_overlap_of_boxes():
    assert overlap(Box((0, 3), (2, 4)), Box((1, 0), (5, 5))) == Box((1, 3), (1, 2))
    assert overlap(Box((0,), (2,)), Box((2,), (2,))) is None


# ---- any layout into any other


TP_PP = (dict(tp=2, pp=2), dict(), "adamw", DENSE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run of TP_PP with a checkpoint; left as it is by every test."""
    out = tmp_path_factory.mktemp("saved")
    run_on(4, saving, TP_PP, str(out))
    return out


@pytest.mark.parametrize("world, layout, others", [
    (4, TP_PP, [(4, dict(), dict(zero=1)), (4, dict(tp=4), dict()), (4, dict(), dict(zero=3)), (2, dict(pp=2), dict(zero=2))]),
    (8, (dict(tp=2, pp=2), dict(zero=1), "adamw", DENSE), [(4, dict(tp=2), dict(zero=3)), (2, dict(cp=2), dict())]),
    (4, (dict(), dict(zero=3), "lion", DENSE), [(4, dict(tp=2), dict(zero=1)), (2, dict(), dict(zero=2, offload=True))]),
    (4, (dict(), dict(zero=1), "muon", DENSE), [(2, dict(pp=2), dict()), (2, dict(), dict(zero=2))]),
    (2, (dict(), dict(zero=1), "adamw8bit", WIDE), [(2, dict(pp=2), dict()), (2, dict(), dict(zero=2))]),
    (4, (dict(tp=2, ep=2), dict(zero=1), "adamw", MIXED), [(4, dict(ep=4), dict()), (2, dict(tp=2), dict()), (2, dict(), dict(zero=3))]),
], ids=["tp2.pp2", "dp2.tp2.pp2 zero 1", "zero 3", "muon zero 1", "adamw8bit zero 1", "tp2.ep2 zero 1"])
def test_saved_in_one_layout_loads_into_others_and_one_process(tmp_path, world, layout, others):
    _, _, optimizer, shape = layout
    truth = set(run_on(world, saving, layout, str(tmp_path / "saved")))
    assert len(truth) == 1
    truth, saved = truth.pop(), latest(tmp_path / "saved")
    for k, (processes, sizes, options) in enumerate(others):
        out = tmp_path / f"again{k}"
        for loss, state in run_on(processes, loading, (sizes, options, optimizer, shape), saved, str(out)):
            assert abs(loss - truth) < 1e-9, (sizes, options)
            assert state == {"step": 2, "tokens": 5}
        assert_same_contents(saved, latest(out), shape)
    loss, state = loading_alone(layout, saved, tmp_path / "alone")
    assert abs(loss - truth) < 1e-9 and state == {"step": 2, "tokens": 5}
    assert_same_contents(saved, latest(tmp_path / "alone"), shape)
    for loss, _ in run_on(world, loading, layout, latest(tmp_path / "alone"), str(tmp_path / "back")):  # one process's, cut
        assert abs(loss - truth) < 1e-9
    assert_same_contents(saved, latest(tmp_path / "back"), shape)


def test_every_number_is_written_once_and_padding_not_at_all(tmp_path):
    run_on(8, saving, (dict(tp=4), dict(zero=1), "adamw", DENSE), str(tmp_path))
    index = json.loads((latest(tmp_path) / "index.json").read_text())
    sizes = {name: p.numel() for name, p in model_of(DENSE).named_parameters()}
    assert {name: sum(torch.Size(box["shape"]).numel() for box in entry["boxes"]) for name, entry in index["model"].items()} == sizes
    assert index["model"]["model.embed_tokens.weight"]["shape"] == [38, 16]  # each of 4 ranks holds 10 rows
    files = {box["file"] for entry in index["model"].values() for box in entry["boxes"]}
    assert len(files) == 8  # all ranks write
    stored = sum(path.stat().st_size for path in latest(tmp_path).glob("shard_*.safetensors"))
    assert 3 * 8 * sum(sizes.values()) < stored < 3.5 * 8 * sum(sizes.values()) + 8 * 20000


def test_the_whole_model_from_shards(saved):
    model = load_sharded(latest(saved))
    truth = contents(latest(saved), DENSE)
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.training
    assert all(torch.equal(p, truth[f"model {name}"]) for name, p in model.named_parameters())
    assert load_sharded(saved, dtype=torch.float32).lm_head.weight.dtype == torch.float32


def test_convert_makes_one_folder_of_shards(saved, tmp_path):
    import convert
    convert.save_pretrained(convert.load_pretrained(saved), tmp_path, Tokenizer())
    one, whole = checkpoint.load_model(tmp_path), contents(latest(saved), DENSE)
    assert all(torch.equal(p, whole[f"model {name}"]) for name, p in one.named_parameters())


# ---- what may happen


def dying(world, layout, out, how):
    """A checkpoint of step 1; then rank 1 is killed, or its disk is full, while it writes that of step 2."""
    started = Started(layout)
    started.train([0])
    started.save(out, 1)

    def write(*arguments):
        os._exit(9) if how == "killed" else None
        raise OSError(28, "No space left on device")

    real = shards.write_safetensors
    shards.write_safetensors = write if started.mesh.here == 1 else real
    try:
        started.save(out, 2)
    except OSError as error:
        return str(error)
    finally:
        shards.write_safetensors = real
        started.mesh.destroy()


def test_a_rank_killed_while_saving_loses_nothing(tmp_path):
    two = (dict(pp=2), dict(zero=1), "adamw", DENSE)  # the processes that are left have to be begun anew
    with pytest.raises(RuntimeError, match="rank . of 2"):
        run_on(2, dying, two, str(tmp_path), "killed")
    assert latest(tmp_path).name == "step_00000001" and checkpoint.damage(latest(tmp_path)) is None
    (loss, state), *_ = run_on(4, loading, TP_PP, latest(tmp_path), str(tmp_path / "again"))
    assert state["step"] == 1
    run_on(2, saving, two, str(tmp_path))  # the same folder goes on: what the killed run left is swept
    assert latest(tmp_path).name == "step_00000002" and not list(tmp_path.glob(".tmp*"))


def test_a_full_disk_on_one_rank_is_told_by_all_and_leaves_nothing(tmp_path):
    lines = run_on(4, dying, TP_PP, str(tmp_path), "full")
    assert "No space left" in lines[1] and all("another rank" in lines[r] for r in (0, 2, 3))
    assert all("step_00000001 is intact" in line for line in lines)
    assert latest(tmp_path).name == "step_00000001" and not list(tmp_path.glob(".tmp*"))


def test_another_model_another_optimizer_and_damage_are_refused_with_one_line(saved, tmp_path):
    folder, wider = shutil.copytree(latest(saved), tmp_path / "copy"), model_of(DENSE | {"intermediate_size": 32})
    with pytest.raises(ValueError, match=r"mlp.gate_proj.weight is \(24, 16\), but \(32, 16\) in the model"):
        load_checkpoint(folder, wider)
    with pytest.raises(ValueError, match="layers.4.* is missing"):
        load_checkpoint(folder, model_of(DENSE | {"num_hidden_layers": 5}))
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        load_checkpoint(folder, model_of(DENSE | {"tie_word_embeddings": False}))
    model = model_of(DENSE)
    with pytest.raises(ValueError, match="Lion cannot go on from AdamW"):
        load_checkpoint(folder, model, optimizer_of("lion")(model.named_parameters()))
    file = folder / "shard_00002.safetensors"
    good, data = file.read_bytes(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="shard_00002.safetensors is damaged"):
        load_checkpoint(folder, model)
    file.write_bytes(good[:-8])
    with pytest.raises(ValueError, match="shard_00002.safetensors is truncated"):
        load_checkpoint(folder, model)
    file.unlink()
    with pytest.raises(ValueError, match="shard_00002.safetensors is missing"):
        load_checkpoint(folder, model)


def opening(world, layout, folder):
    """What a rank says of another model's checkpoint."""
    started = Started(layout)
    try:
        load_checkpoint(folder, run=started.run)
    except ValueError as error:
        return str(error)
    finally:
        started.mesh.destroy()


def test_another_model_is_refused_by_all_ranks_in_the_same_words(saved):
    """So rank 0 says it once for all (parallel/launch.py)."""
    for change, words in (({"intermediate_size": 32}, "mlp.gate_proj.weight is (24, 16), but (32, 16) in the model"),
                          ({"num_hidden_layers": 2}, "is unknown to this model")):
        said = run_on(4, opening, (dict(tp=2), dict(zero=1), "adamw", DENSE | change), latest(saved))
        assert len(set(said)) == 1 and words in said[0] and "\n" not in said[0]


def test_a_box_that_no_shard_holds_is_named(saved, tmp_path):
    folder = shutil.copytree(latest(saved), tmp_path / "copy")
    index = json.loads((folder / "index.json").read_text())
    index["model"]["model.norm.weight"]["boxes"] = []
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(ValueError, match="a part of model.norm.weight is in no shard"):
        load_checkpoint(folder, model_of(DENSE))
