"""PyTorch's distributed checkpoints: what PyTorch saves on many ranks is merged bit for bit, and no pickle runs anything."""

import io
import os
import pickle
import shutil
from pathlib import Path

import convert
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint import load_model, save_model
from convert import interleaved, load_pretrained, load_pretrained_tokenizer, save_pretrained
from data.dcp_file import METADATA, open_dcp, read_dcp, write_dcp
from data.tokenizer import CharTokenizer
from model import CausalLM, ModelConfig
from parallel import parallelize
from parallel.mesh import Mesh
from processes import run_on
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage")


def tiny(seed=0, dtype=torch.float32, **shape) -> CausalLM:
    """No size but the heads' is a multiple of 4, and norms are no constants."""
    shape = dict(vocab_size=37, hidden_size=20, intermediate_size=14, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=2) | shape
    model = CausalLM(ModelConfig(**shape), seed)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / 4)
    return model.to(dtype).eval()


def hf_folder(path: Path, model: CausalLM) -> Path:
    path.mkdir()
    save_model(path, model)
    return path


def merged(folder: Path, model: CausalLM) -> Path:
    """A folder of PyTorch's through convert.py into one of Hugging Face's, which must be what `model` is saved as."""
    truth, out = hf_folder(folder.with_name(folder.name + "_truth"), model), folder.with_name(folder.name + "_hf")
    if not (folder / "config.json").exists():
        shutil.copy(truth / "config.json", folder.parent)  # beside the folder
    convert.main(["--model", str(folder), "--out", str(out), "--format", "hf"])
    assert (out / "model.safetensors").read_bytes() == (truth / "model.safetensors").read_bytes()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(load_model(out)(ids), model(ids))
    return out


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------- what PyTorch saves on ranks


def fsdp(world, folder, wrap, shape):
    """A step of AdamW under FSDP2, then all of it saved as scripts do -> the whole weights."""
    model = tiny(**shape).train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ids = torch.arange(12).view(2, 6) + dist.get_rank()
    model(ids).float().logsumexp(-1).sum().backward()
    optimizer.step()
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer), "step": 1}
    for name in reversed(wrap):
        state = {name: state}
    dcp.save(state, checkpoint_id=folder)
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("world, wrap, shape", [
    (2, (), dict(tie_word_embeddings=True)), (4, ("app",), dict(dtype=torch.bfloat16)),
    (4, ("state_dict", "x"), dict(intermediate_size=3, dtype=torch.float64))], ids=str)
def test_fsdp2_with_its_optimizer_uneven_shards_tied_or_bf16(world, wrap, shape, tmp_path):
    weights = run_on(world, fsdp, str(tmp_path / "dcp"), wrap, shape)[0]
    model = tiny(**shape)
    assert not torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])
    model.load_state_dict(weights, strict=False)
    merged(tmp_path / "dcp", model)
    assert any("exp_avg" in name for name in open_dcp(tmp_path / "dcp"))
    assert {path.name for path in (tmp_path / "dcp").glob("*.distcp")} == {f"__{rank}_0.distcp" for rank in range(world)}


def dtensors(world, folder, shape):
    """Each matrix cut another way on a mesh of 2 x 2: along both dimensions, along one by all, along one by two."""
    mesh, state = init_device_mesh("cpu", (2, 2)), {}
    ways = [(Shard(0), Shard(1)), (Shard(0), Shard(0)), (Shard(1), Replicate()), (Replicate(), Shard(0)), (Replicate(), Replicate())]
    for i, (name, p) in enumerate(tiny(**shape).named_parameters()):
        way = ways[i % len(ways)] if p.dim() == 2 else (Replicate(), Shard(0))
        state[name] = distribute_tensor(p.detach(), mesh, way)
    dcp.save(state, checkpoint_id=folder)


def test_tensor_parallel_dtensors_of_any_placement(tmp_path):
    shape = dict(dtype=torch.bfloat16)
    run_on(4, dtensors, str(tmp_path / "dcp"), shape)
    merged(tmp_path / "dcp", tiny(**shape))
    assert {len(tensor.boxes) for tensor in open_dcp(tmp_path / "dcp").values()} == {1, 2, 4}  # replicas count once


def native(world, folder, sizes, options, shape):
    run = parallelize(tiny(**shape), Mesh(**sizes), lambda named: torch.optim.SGD([p for _, p in named], 0.1), engine="torch", **options)
    ids = torch.arange(24).view(4, 6)
    run.backward([(ids, ids, None)] if run.mesh.size("pp") == 1 else [(x, x, None) for x in ids.chunk(2)], ids.numel())
    run.step()
    dcp.save({"model": run.sharded}, checkpoint_id=folder)
    state = run.state()
    run.mesh.destroy()
    return state


@pytest.mark.parametrize("world, sizes, options", [
    (4, dict(tp=2), dict(zero=3)), (2, dict(pp=2), {}), (4, dict(tp=2), dict(zero=1, sequence_parallel=True))], ids=str)
def test_what_engine_torch_holds_is_saved_by_pytorch_and_merged(world, sizes, options, tmp_path):
    shape = dict(tie_word_embeddings=True, intermediate_size=18)
    weights = run_on(world, native, str(tmp_path / "dcp"), sizes, options, shape)[0]
    model = tiny(**shape)
    model.load_state_dict(weights, strict=False)
    merged(tmp_path / "dcp", model)


def load_on_ranks(world, folder, truth):
    """torch's own load, into DTensors that are cut as FSDP2 cuts."""
    mesh = init_device_mesh("cpu", (world,))
    state = {name: distribute_tensor(torch.zeros_like(x), mesh, [Shard(0)]) for name, x in truth.items()}
    dcp.load(state, checkpoint_id=folder)
    return all(torch.equal(state[name].full_tensor(), x) for name, x in truth.items())


def test_torch_loads_what_write_dcp_wrote_on_one_process_or_two(tmp_path):
    truth = {name: p.detach() for name, p in tiny(dtype=torch.bfloat16).named_parameters()} | {"ids": torch.arange(7)}
    write_dcp(tmp_path / "x", truth)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [METADATA, "__0_0.distcp"]
    state = {name: torch.zeros_like(x) for name, x in truth.items()}
    dcp.load(state, checkpoint_id=tmp_path / "x", no_dist=True)
    for found in (state, read_dcp(tmp_path / "x")):
        assert found.keys() == truth.keys() and all(found[n].dtype == x.dtype and torch.equal(found[n], x) for n, x in truth.items())
    assert run_on(2, load_on_ranks, str(tmp_path / "x"), truth) == [True, True]


# ------------------------------------------------------------------------------------------------------ names, there and back


@pytest.mark.parametrize("shape", [
    dict(tie_word_embeddings=True), dict(model_type="qwen3", qk_norm=True, dtype=torch.bfloat16),
    dict(model_type="mixtral", num_experts=3), dict(model_type="qwen2", attention_bias=True)], ids=str)
def test_there_and_back_is_bitwise_and_keeps_the_tokenizer(shape, tmp_path):
    model, tokenizer = tiny(**shape), CharTokenizer.train(["abc def"])
    save_pretrained(model, tmp_path / "hf", tokenizer)
    for form, source, out in (("dcp", "hf", "dcp"), ("hf", "dcp", "again")):
        convert.main(["--model", str(tmp_path / source), "--out", str(tmp_path / out), "--format", form])
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files
    assert {path.name for path in (tmp_path / "dcp").iterdir()} == files.keys() - {"model.safetensors"} | {METADATA, "__0_0.distcp"}
    half = load_pretrained(tmp_path / "dcp", dtype=torch.float16)
    assert all(torch.equal(p, q.half()) for p, q in zip(half.parameters(), model.parameters()))


def test_the_tokenizer_beside_a_folder_without_config_comes_along(tmp_path):
    save_pretrained(tiny(), tmp_path / "run", CharTokenizer.train(["abc def"]))
    write_dcp(tmp_path / "run" / "step-1", {name: p for name, p in tiny().named_parameters()})
    assert load_pretrained_tokenizer(tmp_path / "run" / "step-1").decode([1, 2]) == load_pretrained_tokenizer(
        tmp_path / "run").decode([1, 2])


META = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_torchtitan_s_names_and_meta_s_order_of_rows(prefix, tmp_path):
    model, state = tiny(num_attention_heads=4, hidden_size=24), {"train_state": {"step": 3}, prefix + "freqs_cis": torch.ones(3)}
    for name, p in model.named_parameters():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        for ours, theirs in META.items():
            name = name.replace(ours, theirs)
        state[prefix + name] = interleaved(p.detach(), heads) if heads else p.detach()
        state[f"optimizer.state.{name}.exp_avg"] = torch.zeros_like(p)
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    merged(tmp_path / "dcp", model)
    state[prefix + "layers.1.attention.q_norm.weight"] = torch.ones(6)  # would change what the model computes
    dcp.save(state, checkpoint_id=tmp_path / "odd", no_dist=True)
    with pytest.raises(ValueError) as error:
        load_model(tmp_path / "odd")
    assert "unknown tensors: model.layers.1.attention.q_norm.weight" in one_line(error)


def test_names_that_wrappers_leave_are_cleaned(tmp_path):
    state = {f"module.{n}".replace("layers.1.", "layers.1._orig_mod._checkpoint_wrapped_module."): p for n, p in tiny().named_parameters()}
    write_dcp(tmp_path / "dcp", state)
    merged(tmp_path / "dcp", tiny())


# ------------------------------------------------------------------------------------------------------------- bad folders


class Calls:
    """What pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def written(tmp_path, state=None) -> Path:
    folder = tmp_path / "dcp"
    write_dcp(folder, state or dict(tiny().named_parameters()))
    save_model(folder, tiny())
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("place", ["instead", "planner_data", "state_dict_metadata"])
def test_a_pickle_that_would_run_something_is_refused_by_name_and_does_not_run(place, tmp_path):
    folder, proof = written(tmp_path), tmp_path / "proof"
    metadata = dcp.FileSystemReader(folder).read_metadata()
    evil = Calls(os.mkdir, str(proof))
    if place == "planner_data":
        metadata.planner_data = evil
    elif place == "state_dict_metadata":
        metadata.state_dict_metadata["x"] = evil
    (folder / METADATA).write_bytes(pickle.dumps(evil if place == "instead" else metadata))
    with pytest.raises(ValueError) as error:
        load_pretrained(folder)
    assert f"{METADATA}: not the metadata of a distributed checkpoint: it asks for posix.mkdir" in one_line(error).replace("nt.mk", "posix.mk")
    assert not proof.exists()
    dcp.FileSystemReader(folder).read_metadata() if place != "instead" else pickle.loads((folder / METADATA).read_bytes())
    assert proof.exists()  # torch's own reader runs it


@pytest.mark.parametrize("function, arguments", [
    (eval, ("1",)), (getattr, ("x", "join")), (torch.load, ("x",)), (torch.hub.load, ("x", "y")), (dcp.FileSystemReader, ("x",)),
    (Path("x").__class__.unlink, (Path("x"),)), (torch.Tensor, (1 << 62,)), (bytearray, (1 << 62,))], ids=str)
def test_no_function_of_any_module_is_reached(function, arguments, tmp_path):
    (tmp_path / METADATA).write_bytes(pickle.dumps(Calls(function, *arguments)))
    with pytest.raises(ValueError) as error:
        open_dcp(tmp_path)
    assert "it asks for " in one_line(error)


def test_a_box_that_would_run_something_is_refused(tmp_path):
    folder, proof = written(tmp_path), tmp_path / "proof"
    box, file = open_dcp(folder)["model.norm.weight"].boxes[0], folder / "__0_0.distcp"
    torch.save(Calls(os.mkdir, str(proof)), stream := io.BytesIO())
    data = bytearray(file.read_bytes())
    assert len(stream.getvalue()) <= box.length
    data[box.offset : box.offset + box.length] = bytes(box.length - len(stream.getvalue())) + stream.getvalue()
    file.write_bytes(data)
    with pytest.raises(ValueError) as error:
        load_pretrained(folder)
    assert f"__0_0.distcp: damaged at byte {box.offset:,}, in model.norm.weight" in one_line(error) and not proof.exists()


def edited(change):
    """A change of what stands in .metadata."""
    def apply(folder: Path):
        metadata = dcp.FileSystemReader(folder).read_metadata()
        change(metadata, metadata.state_dict_metadata["model.norm.weight"], next(iter(metadata.storage_data.values())))
        (folder / METADATA).write_bytes(pickle.dumps(metadata))
    return apply


@pytest.mark.parametrize("damage, complaint", [
    (lambda f: os.truncate(f / "__0_0.distcp", 9000), r"__0_0.distcp is truncated: 9,000 bytes, but model\..* ends at"),
    (lambda f: (f / "__0_0.distcp").unlink(), r"__0_0.distcp is missing: model\..* lies in it"),
    (lambda f: (f / "config.json").unlink(), r"holds weights alone: put the model's config.json, and its tokenizer, into it or beside it"),
    (lambda f: os.truncate(f / METADATA, 500), "not the metadata of a distributed checkpoint: pickle data was truncated"),
    (lambda f: (f / METADATA).write_bytes(b""), "not the metadata of a distributed checkpoint: Ran out of input"),
    (lambda f: (f / METADATA).write_bytes(b"some text"), "not the metadata of a distributed checkpoint"),
    (lambda f: (f / METADATA).write_bytes(pickle.dumps({"a": 1})), "not the metadata of a distributed checkpoint"),
    (lambda f: (f / "__0_0.distcp").write_bytes(bytes((f / "__0_0.distcp").stat().st_size)), "__0_0.distcp: damaged at byte"),
    (edited(lambda m, norm, place: setattr(norm, "chunks", [])), r"the boxes of model.norm.weight are not \[20\] together"),
    (edited(lambda m, norm, place: setattr(norm.chunks[0], "offsets", (5,))), r"is \[20\], and its box at \[5\] is \[20\]"),
    (edited(lambda m, norm, place: setattr(norm.chunks[0], "sizes", ("x",))), "and its box at"),
    (edited(lambda m, norm, place: setattr(norm.properties, "dtype", 5)), "model.norm.weight has no dtype"),
    (edited(lambda m, norm, place: setattr(norm.properties, "dtype", torch.int32)), "is torch.int32 .* in the model"),
    (edited(lambda m, norm, place: m.storage_data.clear()), r"the box of .* at \[0(, 0)?\] is in no file"),
    (edited(lambda m, norm, place: setattr(place, "relative_path", "../x/__0_0.distcp")), "lies in another folder"),
    (edited(lambda m, norm, place: setattr(place, "offset", -1)), "lies at .* in __0_0.distcp"),
    (edited(lambda m, norm, place: setattr(place, "offset", place.offset + 64)), "__0_0.distcp"),
    (edited(lambda m, norm, place: setattr(place, "transform_descriptors", ["stream.zstd"])), "packed by an extension"),
    (edited(lambda m, norm, place: m.state_dict_metadata.pop("lm_head.weight")), "missing tensors: lm_head.weight"),
    (edited(lambda m, norm, place: m.state_dict_metadata.pop("model.embed_tokens.weight")), "no model: neither model.embed_tokens.weight"),
])
def test_damaged_folders_are_refused_in_one_line(damage, complaint, tmp_path):
    folder = written(tmp_path)
    load_pretrained(folder)
    damage(folder)
    with pytest.raises(ValueError, match=complaint) as error:
        load_pretrained(folder)
    one_line(error)


def test_other_shapes_and_names_and_several_models_are_refused_in_one_line(tmp_path):
    weights = dict(tiny().named_parameters())
    for name, state, complaint in (
            ("shape", weights | {"model.norm.weight": torch.ones(21)}, "model.norm.weight is torch.float32 (21,), but torch.float32 (20,)"),
            ("name", weights | {"model.layers.0.mlp.gate_proj.bias": torch.ones(14)}, "unknown tensors: model.layers.0.mlp.gate_proj.bias"),
            ("two", weights | {f"ema.{n}": p for n, p in weights.items()}, "two: several models, under '', 'ema.'")):
        with pytest.raises(ValueError) as error:
            folder = tmp_path / name
            folder.mkdir()
            written(folder, state)
            load_pretrained(folder / "dcp" if name != "two" else (folder / "dcp").rename(tmp_path / "two_"))
        assert complaint.replace("two:", "two_:") in one_line(error)
    tied = tiny(tie_word_embeddings=True)
    write_dcp(tmp_path / "tied", dict(tied.named_parameters()) | {"lm_head.weight": torch.zeros(37, 20)})
    save_model(tmp_path / "tied", tied)
    with pytest.raises(ValueError, match="ties lm_head.weight to model.embed_tokens.weight, but the two differ"):
        load_pretrained(tmp_path / "tied")


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        for save in (lambda: write_dcp(tmp_path / "x", {"a": torch.ones(2)}),
                     lambda: save_pretrained(tiny(), tmp_path / "x", format="dcp")):
            with pytest.raises(OSError, match="No space left"):
                save()
            assert not list(tmp_path.iterdir())
    write_dcp(tmp_path / "x", {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="there is a distributed checkpoint already"):
        write_dcp(tmp_path / "x", {"a": torch.zeros(2)})
    assert read_dcp(tmp_path / "x")["a"].tolist() == [1, 1] and [path.name for path in tmp_path.iterdir()] == ["x"]
