"""Distributed checkpoints of PyTorch's in safetensors: a model's parts, of many ranks, become one model again."""

import json

import checkpoint
import convert
import pytest
import torch
from model import CausalLM, ModelConfig
from parallel import parallelize
from parallel.mesh import Mesh
from processes import run_on
from tensor_files import read_distributed, write_safetensors


def tiny(**changes) -> CausalLM:
    shape = dict(vocab_size=37, hidden_size=16, intermediate_size=22, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, qk_norm=True, model_type="qwen3", initializer_range=0.3)
    return CausalLM(ModelConfig(**shape | changes))


def same(folder, model) -> bool:
    found = dict(checkpoint.load_model(folder).named_parameters())
    return all(torch.equal(found[name], p) for name, p in model.named_parameters())


def name_of(rank: int) -> str:
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def write_parts(folder, parts: list[dict]) -> None:
    """parts: of each rank {name: (where it starts, numbers)}."""
    for rank, own in enumerate(parts):
        places = json.dumps({name: {"saved_offsets": start} for name, (start, _) in own.items()})
        write_safetensors(folder / name_of(rank), {name: part.clone() for name, (_, part) in own.items()},
                          {"DCP_SHARDING_INFO": places, "DCP_VERSION": "1.0", "format": "pt"})


def cut_by_hand(folder, model, prefix="") -> None:
    """Three ranks: vectors lie on the first; rows in 2/3 and 1/3, the upper one's columns cut again at 5."""
    parts: list[dict] = [{}, {}, {}]
    for name, p in checkpoint.hf_tensors(model).items():
        if p.dim() == 1:
            parts[0][prefix + name] = [0], p
        else:
            row = 2 * len(p) // 3
            parts[0][prefix + name] = [0, 0], p[:row, :5]
            parts[1][prefix + name] = [0, 5], p[:row, 5:]
            parts[2][prefix + name] = [row, 0], p[row:]
    if prefix:
        parts[2]["optim.state.model.embed_tokens.weight.exp_avg"] = [0], torch.ones(3)
    write_parts(folder, parts)
    checkpoint.write_json(folder / "config.json", model.config.to_hf())


@pytest.mark.parametrize("changes, prefix", [
    (dict(), ""), (dict(tie_word_embeddings=True), "model."), (dict(), "app.state."),
    (dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=6, model_type="qwen3_moe"), "")], ids=str)
def test_parts_become_one_model(tmp_path, changes, prefix):
    model = tiny(**changes).bfloat16()
    cut_by_hand(tmp_path, model, prefix)
    assert same(tmp_path, model) and checkpoint.load_model(tmp_path).lm_head.weight.dtype == torch.bfloat16
    convert.main(["--model", str(tmp_path), "--out", str(tmp_path / "one"), "--format", "hf"])
    assert (tmp_path / "one" / "model.safetensors").is_file() and same(tmp_path / "one", model)


def test_what_is_not_whole_is_refused_by_name(tmp_path):
    model = tiny()
    cut_by_hand(tmp_path, model)
    files = sorted(tmp_path.glob("*.safetensors"))
    kept = [file.read_bytes() for file in files]
    for missing, line in ((0, "is cut in 2 parts that are not one tensor; is a file missing?"),
                          (1, "is cut in 2 parts that are not one tensor"), (2, r"is torch.float32 \(24, 16\), but")):
        files[missing].unlink()
        with pytest.raises(ValueError, match=line):  # without the last rows it is a whole tensor, but a shorter one
            checkpoint.load_model(tmp_path)
        files[missing].write_bytes(kept[missing])
    for places in ("nonsense", "{}", '{"w": {"saved_offsets": [Infinity, 0]}}', '{"w": {"saved_offsets": [-1, 0]}}'):
        write_safetensors(files[2], {"w": torch.ones(1, 16)}, {"DCP_SHARDING_INFO": places})
        with pytest.raises(ValueError, match="shard-00003.*: no DCP_SHARDING_INFO that tells where each"):
            checkpoint.load_model(tmp_path)
    write_parts(tmp_path, [{"w": ([0], torch.ones(2))}, {"w": ([2, 0], torch.ones(1, 1))}])
    with pytest.raises(ValueError, match="w is cut in 2 parts that are not one tensor"):
        read_distributed(files[:2])


@pytest.mark.parametrize("whole, parts", [
    (True, {(0, 0): (2, 3), (2, 0): (1, 3)}), (True, {(0, 0): (2, 1), (0, 1): (1, 2), (1, 1): (2, 2), (2, 0): (1, 1)}),
    (True, {(): ()}), (True, {(0, 0): (0, 4)}),
    (False, {(0,): (2,), (1,): (2,), (4,): (1,)}),  # five numbers of five, but one twice and one never
    (False, {(0, 0): (2, 2), (2, 2): (2, 2)}), (False, {(1,): (3,)})], ids=str)
def test_parts_must_cover_a_tensor_and_nothing_twice(tmp_path, whole, parts):
    write_parts(tmp_path, [{"w": (list(start), torch.full(shape, k + 1.0))}
                           for k, (start, shape) in enumerate(parts.items())])
    files = sorted(tmp_path.iterdir())
    if whole:
        found = read_distributed(files)["w"].read()
        assert all((found[tuple(slice(a, a + n) for a, n in zip(start, shape))] == k + 1).all()
                   for k, (start, shape) in enumerate(parts.items()))
    else:
        with pytest.raises(ValueError, match="w is cut in . parts that are not one tensor"):
            read_distributed(files)


def test_a_config_is_asked_for_and_pickle_is_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match="in pickle, which can run code and is not read: .* HuggingFaceStorageWriter"):
        checkpoint.find_checkpoint(tmp_path)
    write_parts(tmp_path, [{"w": ([0], torch.ones(2))}])
    with pytest.raises(ValueError, match="of weights alone: put the model's config.json and its tokenizer into it"):
        checkpoint.find_checkpoint(tmp_path)


# ---- against PyTorch's own writer and reader, which need the safetensors package


def optimizer_of(named):
    return torch.optim.AdamW([p for _, p in named])


def saved(world, folder, shape, zero, changes):
    import torch.distributed.checkpoint as dcp
    mesh = Mesh(**shape)
    run = parallelize(tiny(**changes), mesh, optimizer_of, zero=zero, engine="torch")
    dcp.save(dict(run.sharded), storage_writer=dcp.HuggingFaceStorageWriter(folder, save_distributed=True))
    mesh.destroy()


@pytest.mark.parametrize("world, shape, zero, changes", [
    (2, dict(), 3, dict()), (4, dict(), 1, dict(tie_word_embeddings=True)), (4, dict(tp=2), 2, dict()),
    (2, dict(tp=2), 0, dict(tie_word_embeddings=True))], ids=str)
def test_what_pytorch_s_engine_saves_is_merged(tmp_path, world, shape, zero, changes):
    pytest.importorskip("safetensors", reason="torch's HuggingFaceStorageWriter needs the safetensors package")
    run_on(world, saved, str(tmp_path), shape, zero, changes)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) == world
    checkpoint.write_json(tmp_path / "config.json", tiny(**changes).config.to_hf())
    assert same(tmp_path, tiny(**changes))


def loaded(world, folder):
    import torch.distributed.checkpoint as dcp
    mesh, model = Mesh(), tiny()
    truth = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.nn.init.zeros_(model.lm_head.weight)
    run = parallelize(model, mesh, optimizer_of, zero=3, engine="torch")
    dcp.load(dict(run.sharded), storage_reader=dcp.HuggingFaceStorageReader(folder))
    state = run.state()
    mesh.destroy()
    return all(torch.equal(state[name], p) for name, p in truth.items())


def test_pytorch_reads_what_convert_writes_on_any_number_of_ranks(tmp_path):
    pytest.importorskip("safetensors", reason="torch's HuggingFaceStorageReader needs the safetensors package")
    convert.save_pretrained(tiny(), tmp_path / "one")
    assert run_on(3, loaded, str(tmp_path / "one")) == [True] * 3
