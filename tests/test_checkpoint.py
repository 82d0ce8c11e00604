"""Checkpoints: bit-exact, whole after a kill at any step of a save, and readable by the rest of the ecosystem."""

import errno
import io
import json
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import tensor_files
from checkpoint import (extend_context, find_checkpoint, latest, load_checkpoint, load_model, read_safetensors, read_safetensors_header,
                        read_state, save_checkpoint, save_model, verify, write_safetensors)
from model import CausalLM, ModelConfig
from optim import build_optimizer

SHAPES = {
    "llama": dict(num_key_value_heads=2),
    "llama, biases, tied": dict(attention_bias=True, tie_word_embeddings=True),
    "llama, own head_dim and theta": dict(head_dim=16, rope_theta=500000.0),
    "mistral": dict(model_type="mistral", sliding_window=5),
    "mistral without a window": dict(model_type="mistral"),
    "qwen2": dict(attention_bias=True, model_type="qwen2"),
    "qwen2, window, tied": dict(attention_bias=True, model_type="qwen2", sliding_window=5, tie_word_embeddings=True),
    "qwen3": dict(qk_norm=True, model_type="qwen3", head_dim=16),
    "mixtral": dict(num_experts=4, num_key_value_heads=2),
    "qwen3_moe": dict(qk_norm=True, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=16, mlp_only_layers=[0]),
}


class Tokenizer:
    """As much of a tokenizer as a checkpoint asks for."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, None

    def save(self, folder):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (Path(folder) / name).write_text("{}")


def tiny(seed: int = 0, dtype=torch.float32, **shape) -> CausalLM:
    return CausalLM(ModelConfig(**(dict(vocab_size=32, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
                                        num_attention_heads=4) | shape)), seed).to(dtype)


def train(model, optimizer, steps) -> None:
    for step in steps:
        tokens = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(step))
        torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(out, step, model, optimizer, **more) -> Path:
    arguments = dict(model=model, optimizer=optimizer, tokenizer=Tokenizer(), state={}) | more
    return save_checkpoint(out, step, **arguments)


@pytest.fixture
def pair():
    """A model so small that saving it takes no time, and its optimizer after one update."""
    model = tiny(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    optimizer = build_optimizer("adamw", model.named_parameters(), lr=1e-3)
    train(model, optimizer, range(1))
    return model, optimizer


def names(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


# ---------------------------------------------------------------------------------------------------------- safetensors


def by_hand(header, numbers: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_safetensors_bytes_by_hand(tmp_path):
    text = (b'{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            b'"a":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]}}')
    text += b" " * (-len(text) % 8)
    expected = by_hand(text, b"\x00\x00\x80\x3f\x00\x00\x00\xc0" b"\xc0\x3f\x00\xbf")  # 1.0, -2.0; 1.5, -0.5
    tensors = {"a": torch.tensor([[1.5, -0.5]], dtype=torch.bfloat16), "b": torch.tensor([1.0, -2.0])}
    write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == expected
    assert names(tmp_path) == ["x.safetensors"]
    _, metadata, start = read_safetensors_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"} and start == len(expected) - 12
    loaded = read_safetensors(tmp_path / "x.safetensors")
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())


def every_dtype() -> dict[str, torch.Tensor]:
    """Each dtype with each shape: scalar, empty, odd, and a transposed view; values of random bits."""
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for kind, dtype in checkpoint.DTYPES.items():
        for shape in ((), (0, 3), (5,), (3, 7)):
            bits = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), generator=generator)
            bits = bits.to(torch.uint8)
            tensors[f"{kind}.{len(shape)}.{shape[:1]}"] = bits.view(dtype).reshape(shape)
        tensors[f"{kind}.transposed"] = tensors[f"{kind}.2.(3,)"].T
    return tensors


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*bits)


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path):
    tensors = every_dtype()
    write_safetensors(tmp_path / "x", tensors)
    loaded = read_safetensors(tmp_path / "x")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(loaded[name], tensor), name
        assert loaded[name].data_ptr() % tensor.element_size() == 0, "numbers must be aligned"
    write_safetensors(tmp_path / "y", dict(reversed(tensors.items())))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes(), "the order of the dict must not matter"


def test_safetensors_package_agrees_both_ways(tmp_path):
    package = pytest.importorskip("safetensors.torch", reason="the safetensors package is not installed")
    tensors = {name: tensor.contiguous() for name, tensor in every_dtype().items()}
    write_safetensors(tmp_path / "ours", tensors, {"format": "pt"})
    package.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    for loaded in (package.load_file(tmp_path / "ours"), read_safetensors(tmp_path / "theirs")):
        assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())


def test_unpadded_header_and_other_order_are_read(tmp_path):
    header = {"a": entry("U8", [1], [0, 1]), "b": entry("F64", [1], [1, 9])}
    for pad in range(8):
        text = json.dumps(header).encode() + b" " * pad
        (tmp_path / "x").write_bytes(by_hand(text, b"\x07" + struct.pack("<d", 0.1)))
        loaded = read_safetensors(tmp_path / "x")
        assert loaded["a"].item() == 7 and loaded["b"].item() == 0.1 and loaded["b"].data_ptr() % 8 == 0


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path):
    write_safetensors(tmp_path / "x", {"a": torch.zeros(3)})
    read_safetensors(tmp_path / "x")["a"].fill_(1.0)
    assert read_safetensors(tmp_path / "x")["a"].sum() == 0


@pytest.mark.parametrize("content, why", [
    (b"", "truncated"),
    (b"\x01\x02", "truncated"),
    (struct.pack("<Q", 100) + b"{}", "truncated"),
    (struct.pack("<Q", 2**63) + b"{}", "header of 9223372036854775808 bytes"),
    (by_hand(b"{]", b""), "not JSON"),
    (by_hand(b"\xff\xfe", b""), "not JSON"),
    (by_hand(b"[" * 100_000, b""), "not JSON"),
    (by_hand([], b""), "not a JSON object"),
    (by_hand({"__metadata__": {"a": 1}}, b""), "strings to strings"),
    (by_hand(b'{"a":1,"a":1}', b""), "stands twice"),
    (by_hand({"a": 1}, b""), "must have dtype, shape and data_offsets"),
    (by_hand({"a": {"dtype": "F32", "shape": [2]}}, b"8" * 8), "must have dtype, shape and data_offsets"),
    (by_hand({"a": entry("F33")}, b"8" * 8), "unknown dtype 'F33'"),
    (by_hand({"a": entry(["F32"])}, b"8" * 8), "unknown dtype"),
    (by_hand({"a": entry(shape=[-2])}, b"8" * 8), "has shape [-2]"),
    (by_hand({"a": entry(shape=[2.0])}, b"8" * 8), "has shape [2.0]"),
    (by_hand({"a": entry(shape=[True, 2])}, b"8" * 8), "has shape [True, 2]"),
    (by_hand({"a": entry(offsets=[0, 8, 9])}, b"8" * 8), "data_offsets [0, 8, 9]"),
    (by_hand({"a": entry() | {"shape": 2}}, b"8" * 8), "has shape 2"),
    (by_hand({"a": entry(shape=[3])}, b"8" * 8), "12 bytes"),
    (by_hand({"a": entry(shape=[2**62, 4], offsets=[0, 0])}, b""), "bytes, but its data_offsets leave 0"),
    (by_hand({"a": entry(offsets=[8, 0])}, b"8" * 8), "leave -8"),
    (by_hand({"a": entry(), "b": entry(offsets=[4, 12])}, b"8" * 12), "'b' begins at 4"),
    (by_hand({"a": entry(), "b": entry()}, b"8" * 8), "begins at 0"),
    (by_hand({"a": entry(), "b": entry(offsets=[9, 17])}, b"8" * 17), "'b' begins at 9"),
    (by_hand({"a": entry(offsets=[1, 9])}, b"8" * 9), "'a' begins at 1"),
    (by_hand({"a": entry()}, b"8" * 7), "its tensors end at byte"),
    (by_hand({"a": entry()}, b"8" * 9), "its tensors end at byte"),
])
def test_malformed_safetensors_are_refused_in_one_line(tmp_path, content, why):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(why)) as caught:
        read_safetensors(tmp_path / "bad.safetensors")
    assert str(caught.value).startswith(str(tmp_path / "bad.safetensors")) and "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write_safetensors(tmp_path / "x", {"a": torch.arange(3), "b": torch.zeros(2, 2)})
    whole = (tmp_path / "x").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a valid safetensors file"):
            read_safetensors(tmp_path / "x")


# --------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor", "torch.optim.AdamW"])
def test_resumed_training_is_bitwise_the_undisturbed_one(tmp_path, name, dtype):
    def start(seed):
        model = tiny(seed, dtype, tie_word_embeddings=True)
        if name == "torch.optim.AdamW":
            return model, torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, build_optimizer(name, model.named_parameters(), lr=1e-2)

    model, optimizer = start(0)
    train(model, optimizer, range(3))
    state = {"tokens": 12, "best_loss": 0.1 + 0.2, "losses": [1.5, None], "name": "ä"}
    folder = save(tmp_path, 3, model, optimizer, state=state)
    train(model, optimizer, range(3, 6))

    resumed, its_optimizer = start(1)
    train(resumed, its_optimizer, range(7, 9))  # what was there before must leave no trace
    assert load_checkpoint(folder, resumed, its_optimizer) == state | {"step": 3} == read_state(folder)
    train(resumed, its_optimizer, range(3, 6))
    for (key, ours), theirs in zip(model.named_parameters(), resumed.parameters()):
        assert same_bits(ours, theirs), key
        assert optimizer.state[ours].keys() == its_optimizer.state[theirs].keys()
        for part, tensor in optimizer.state[ours].items():
            assert same_bits(tensor, its_optimizer.state[theirs][part]), (key, part)
    assert [g.get("step") for g in optimizer.param_groups] == [g.get("step") for g in its_optimizer.param_groups]
    assert resumed.lm_head.weight is resumed.model.embed_tokens.weight


def test_going_back_to_the_start_forgets_the_optimizers_state(tmp_path):
    model = tiny()
    optimizer = build_optimizer("adamw", model.named_parameters(), lr=1e-3)
    folder = save(tmp_path, 0, model, optimizer)
    train(model, optimizer, range(2))
    load_checkpoint(folder, model, optimizer)
    assert not optimizer.state and {group["step"] for group in optimizer.param_groups} == {0}


def test_settings_of_the_optimizer_stay_as_built(tmp_path, pair):
    model, optimizer = pair
    folder = save(tmp_path, 1, model, optimizer)
    other = build_optimizer("adamw", model.named_parameters(), lr=7.0, weight_decay=0.25, betas=(0.5, 0.6))
    load_checkpoint(folder, model, other)
    group = other.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["step"]) == (7.0, 0.25, (0.5, 0.6), 1)


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path):
    model = tiny()
    folder = save(tmp_path, 1, model, build_optimizer("adamw", model.named_parameters(), lr=1e-3))
    gate = "model.layers.0.mlp.gate_proj.weight is torch.float32 (24, 32), but torch.float32 (40, 32) in the model"
    for other, why in ((tiny(1, intermediate_size=40), gate),
                       (tiny(1, dtype=torch.float64), "(32, 32), but torch.float64 (32, 32) in the model"),
                       (tiny(1, num_hidden_layers=3), "missing tensors: model.layers.2."),
                       (tiny(1, num_hidden_layers=1), "unknown tensors: model.layers.1."),
                       (tiny(1, tie_word_embeddings=True), "unknown tensors: lm_head.weight")):
        before = [p.clone() for p in other.parameters()]
        with pytest.raises(ValueError, match=re.escape(why)):
            load_checkpoint(folder, other, build_optimizer("adamw", other.named_parameters(), lr=1e-3))
        assert all(torch.equal(p, q) for p, q in zip(before, other.parameters()))
    other = tiny(1)
    with pytest.raises(ValueError, match="Lion cannot go on from AdamW"):
        load_checkpoint(folder, other, build_optimizer("lion", other.named_parameters(), lr=1e-3))
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_a_checkpoint_is_a_hugging_face_folder(tmp_path):
    model = tiny(tie_word_embeddings=True, dtype=torch.bfloat16)
    folder = save(tmp_path / "deep" / "out", 240, model, build_optimizer("adamw", model.named_parameters(), lr=1e-3))
    assert folder == tmp_path / "deep" / "out" / "step_00000240"
    assert (tmp_path / "deep" / "out" / "latest").read_bytes() == b"step_00000240"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["torch_dtype"] == "bfloat16"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, None)
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    tensors, metadata, _ = read_safetensors_header(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors and metadata == {"format": "pt"}
    assert {entry["dtype"] for entry in tensors.values()} == {"BF16"}
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(files) + ["manifest.json"] == sorted(names(folder), key=lambda name: (name == "manifest.json", name))
    assert files["config.json"]["bytes"] == (folder / "config.json").stat().st_size
    loaded = load_model(folder)
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), loaded.parameters()))


# ------------------------------------------------------------------------------------------------- kills and full disks


class Killed(BaseException):
    """The process is gone: nothing after this reaches the disk."""


KILL = {"below": None, "left": 0}  # an audit hook cannot be removed, so it reads what to do here


def audit(event: str, arguments: tuple) -> None:
    if KILL["below"] is None:
        return
    writes = event == "open" and str(arguments[0]).startswith(KILL["below"]) and arguments[1] not in (None, "r", "rb")
    if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"):
        if KILL["left"] == 0:
            raise Killed(event)  # and again at every later attempt, in `except` and `finally` too
        KILL["left"] -= 1


sys.addaudithook(audit)


def killed_after(operations: int, out: Path, action) -> bool:
    """Run `action`, letting through only the first `operations` changes to the file system. Was it cut short?"""
    KILL.update(below=str(out), left=operations)
    try:
        action()
        return False
    except Killed:
        return True
    finally:
        KILL["below"] = None


@pytest.mark.parametrize("scenario", ["first", "next", "same step again", "after going back"])
def test_killed_at_every_step_of_a_save_leaves_a_whole_latest(tmp_path, monkeypatch, pair, scenario):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill, unlike a power cut, loses no written byte
    model, optimizer = pair
    past, step, end = {"first": ((), 1, [1]), "next": ((1, 2, 3), 4, [1, 4]), "same step again": ((1, 2), 2, [1, 2]),
                       "after going back": ((1, 2, 3), 2, [1, 2])}[scenario]  # the save keeps step 1, and the last
    for n in past:
        save(tmp_path / "before", n, model, optimizer, state={"written": n})
    (tmp_path / "before").mkdir(exist_ok=True)
    after, seen = ["latest"] + [f"step_{n:08d}" for n in end], set()
    for operations in range(1000):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "before", out)
        again = lambda: save(out, step, model, optimizer, state={"written": "new"}, keep_last=1, keep=[1])  # noqa: E731
        if not killed_after(operations, out, again):
            break
        if latest(out) is None:
            assert not past
        else:
            state = load_checkpoint(latest(out), model, optimizer)  # verifies all of it
            assert state["written"] in ("new", *past[-1:])
            assert state["step"] == (step if state["written"] == "new" else past[-1])
            seen.add(state["written"])
        for folder in checkpoint.step_folders(out).values():
            assert checkpoint.damage(folder) is None, "under its own name, a folder is whole or not there"
        again()
        assert names(out) == after and read_state(latest(out))["written"] == "new", "the next save sweeps what was left"
    assert names(out) == after
    assert operations > 15 and seen == ({"new", past[-1]} if past else set()), "killed before and after the switch"


class SmallDisk:
    """`open`, on a disk with room for so many bytes."""

    def __init__(self, room: int):
        self.room = room

    def __call__(self, path, mode="r"):
        disk = self

        class File(io.FileIO):
            def write(self, data):
                disk.room -= memoryview(data).nbytes
                if disk.room < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(data)

        return File(path, mode) if "w" in mode else open(path, mode)


@pytest.mark.parametrize("before", [True, False])
def test_full_disk_keeps_the_previous_checkpoint_and_leaves_no_rubbish(tmp_path, monkeypatch, pair, before):
    model, optimizer = pair
    if before:
        save(tmp_path, 1, model, optimizer)
    there = names(tmp_path)
    save(tmp_path / "other", 2, model, optimizer)
    needed = sum(path.stat().st_size for path in (tmp_path / "other" / "step_00000002").iterdir())
    shutil.rmtree(tmp_path / "other")
    for part in (0.0, 0.1, 0.3, 0.6, 0.8, 0.99):
        monkeypatch.setattr(tensor_files, "open", SmallDisk(int(needed * part)), raising=False)
        with pytest.raises(OSError) as caught:
            save(tmp_path, 2, model, optimizer)
        monkeypatch.undo()
        message = f"cannot write checkpoint {tmp_path / 'step_00000002'}: {os.strerror(errno.ENOSPC)}"
        intact = f"; the previous checkpoint {tmp_path / 'step_00000001'} is intact" if before else ""
        assert str(caught.value) == message + intact
        assert names(tmp_path) == there
    save(tmp_path, 2, model, optimizer)
    verify(latest(tmp_path))


def test_full_disk_at_every_fsync(tmp_path, monkeypatch, pair):
    model, optimizer = pair
    save(tmp_path, 1, model, optimizer, state={"written": "old"})
    real, count = os.fsync, 0
    for allowed in range(100):
        count = 0

        def fsync(descriptor):
            nonlocal count
            count += 1
            if count > allowed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            save(tmp_path, 1, model, optimizer, state={"written": "new"})
            break
        except OSError as error:
            assert "is intact" in str(error)
        finally:
            monkeypatch.undo()
        verify(latest(tmp_path))
        assert not [name for name in names(tmp_path) if name.startswith(".tmp-step")]
    assert allowed > 10 and read_state(latest(tmp_path))["written"] == "new"
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_same_step_again_without_hard_links(tmp_path, monkeypatch, pair):
    def no_links(source, target):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    for written in ("old", "new"):
        save(tmp_path, 1, *pair, state={"written": written})
    assert read_state(latest(tmp_path))["written"] == "new" and names(tmp_path) == ["latest", "step_00000001"]


# ------------------------------------------------------------------------------------------------- pruning and branches


def test_keep_last_and_the_best(tmp_path, pair):
    for step in (10, 20, 30, 40, 100, 110):
        save(tmp_path, step, *pair, keep_last=2, keep=[20])
    assert list(checkpoint.step_folders(tmp_path)) == [20, 100, 110]
    save(tmp_path, 120, *pair, keep_last=0)
    assert list(checkpoint.step_folders(tmp_path)) == [20, 100, 110, 120], "0 keeps all"
    save(tmp_path, 130, *pair, keep_last=1)
    assert names(tmp_path) == ["latest", "step_00000130"]


def test_an_abandoned_branch_goes(tmp_path, pair):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, *pair)
    load_checkpoint(tmp_path / "step_00000010", *pair)
    save(tmp_path, 20, *pair, keep_last=0)
    assert list(checkpoint.step_folders(tmp_path)) == [10, 20] and latest(tmp_path).name == "step_00000020"


# --------------------------------------------------------------------------------------------------------------- damage


def run_of_three(out, pair) -> Path:
    for step in (10, 20, 30):
        save(out, step, *pair, state={"tokens": step})
    return out / "step_00000030"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"])
def test_damage_is_named_and_the_previous_checkpoint_offered(tmp_path, pair, file):
    folder = run_of_three(tmp_path, pair)
    whole = (folder / file).read_bytes()
    harms = {"is damaged: it changed since it was written": lambda: flip(folder / file),
             "is truncated": lambda: (folder / file).write_bytes(whole[:-1]),
             "is damaged: ": lambda: (folder / file).write_bytes(whole + b" "),
             "is missing": lambda: (folder / file).unlink()}
    for why, harm in harms.items():
        (folder / file).write_bytes(whole)
        verify(folder)
        harm()
        with pytest.raises(ValueError) as caught:
            load_checkpoint(folder, *pair)
        message = str(caught.value)
        assert message.startswith(f"{folder / file} {why}") and "\n" not in message
        assert message.endswith(f"; resume with --resume {tmp_path / 'step_00000020'}")
    flip(tmp_path / "step_00000020" / "state.json")
    (folder / file).write_bytes(whole)
    with pytest.raises(ValueError, match=f"--resume {re.escape(str(tmp_path / 'step_00000010'))}$"):
        verify(tmp_path / "step_00000020")  # later ones are not offered, though whole
    (folder / file).unlink()
    with pytest.raises(ValueError, match=f"--resume {re.escape(str(tmp_path / 'step_00000010'))}$"):
        load_checkpoint(folder, *pair)
    flip(tmp_path / "step_00000010" / "config.json")
    with pytest.raises(ValueError, match="no earlier checkpoint is intact$"):
        load_checkpoint(folder, *pair)


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", "{}", '{"files": []}', '{"files": {"state.json": 3}}'])
def test_damaged_manifest(tmp_path, pair, manifest):
    folder = run_of_three(tmp_path, pair)
    (folder / "manifest.json").unlink()
    if manifest is not None:
        (folder / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=r"manifest.json.*--resume .*step_00000020$"):
        load_checkpoint(folder, *pair)


def test_finding_a_checkpoint(tmp_path, pair):
    assert latest(tmp_path) is None
    folder = run_of_three(tmp_path / "run", pair)
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(folder) == latest(tmp_path / "run") == folder
    with pytest.raises(ValueError, match="neither a run with checkpoints nor a model"):
        find_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        find_checkpoint(tmp_path / "nowhere")
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="step_00000030.*resume with --resume .*step_00000020"):
        find_checkpoint(tmp_path / "run")


# ------------------------------------------------------------------------------------------------- Hugging Face folders


@pytest.mark.parametrize("shape", SHAPES)
def test_a_saved_model_comes_back(tmp_path, shape):
    model = tiny(dtype=torch.float64, **SHAPES[shape]).eval()
    save_model(tmp_path, model, Tokenizer())
    loaded = load_model(tmp_path, attention="eager")
    assert not loaded.training and loaded.config.attention == "eager" and loaded.config.eos_token_id == 2
    tokens = torch.arange(20)[None]
    assert torch.allclose(loaded(tokens), model(tokens), rtol=0, atol=1e-12)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings
    half = load_model(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.model.norm.weight, model.model.norm.weight.bfloat16())


def test_mapped_weights_are_the_files_and_nothing_is_copied(tmp_path):
    model = tiny(num_experts=3, qk_norm=True)
    save_model(tmp_path, model)
    loaded = load_model(tmp_path, mapped=True)
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), loaded.parameters()))
    stacks = {name for name, p in loaded.named_parameters() if p.dim() == 3}
    storages = {p.untyped_storage().data_ptr() for name, p in loaded.named_parameters() if name not in stacks}
    assert len(storages) == 1 and len(stacks) == 6, "one mapping for all but the stacks"
    with torch.no_grad():
        loaded.lm_head.weight.fill_(1.0)  # private: training a mapped model leaves its folder alone
    assert same_bits(load_model(tmp_path).lm_head.weight, model.lm_head.weight)
    assert {p.dtype for p in load_model(tmp_path, mapped=True, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    save_model(tmp_path, model := tiny())
    tensors = dict(model.named_parameters())
    (tmp_path / "model.safetensors").unlink()
    write_safetensors(tmp_path / "a.safetensors", tensors)
    write_safetensors(tmp_path / "b.safetensors", {"lm_head.weight": tensors["lm_head.weight"]})
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {"lm_head.weight": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="lm_head.weight stands in b.safetensors and in a.safetensors"):
        load_model(tmp_path)


def test_generation_config_says_which_tokens_end_a_text(tmp_path):
    """As in Llama 3 and Qwen 2.5 Instruct: one id in config.json, all of them in generation_config.json."""
    save_model(tmp_path, tiny(eos_token_id=7, bos_token_id=1))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "pad_token_id": 3, "temperature": 0.6}))
    config = load_model(tmp_path).config
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == ([7, 9], 1, 3)
    (tmp_path / "again").mkdir()
    save_model(tmp_path / "again", load_model(tmp_path))
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == {
        "bos_token_id": 1, "eos_token_id": [7, 9], "pad_token_id": 3}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match="generation_config.json: not valid JSON"):
        load_model(tmp_path)


def test_pickled_weights_are_refused_and_told_how_to_convert(tmp_path):
    save_model(tmp_path, tiny())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is pickle, .* not read: .*save_pretrained.folder, safe_serialization=True") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_context_is_extended_by_a_factor_of_the_lengths(tmp_path, kind):
    save_model(tmp_path, tiny(max_position_embeddings=16))
    for loaded in (load_model(tmp_path, seq_len=16), load_model(tmp_path, seq_len=9, rope_scaling=kind)):
        assert loaded.config.rope_scaling is None and loaded.config.max_position_embeddings == 16  # nothing to extend
    long = load_model(tmp_path, seq_len=40, rope_scaling=kind)
    assert long.config.rope_scaling == {"rope_type": kind, "factor": 2.5, "original_max_position_embeddings": 16}
    assert long.config.max_position_embeddings == 40 and long.model.layers[0].self_attn.config is long.config
    (tmp_path / "long").mkdir()
    save_model(tmp_path / "long", long)
    again = load_model(tmp_path / "long", seq_len=40)
    assert again.config == long.config and torch.equal(again(torch.arange(30)[None]), long(torch.arange(30)[None]))
    with pytest.raises(ValueError, match=f"--seq_len 41: the model knows 40 positions, scaled by {kind} already"):
        load_model(tmp_path / "long", seq_len=41, rope_scaling="yarn")


def test_a_context_that_cannot_be_extended_says_so(tmp_path):
    config = tiny(max_position_embeddings=16).config
    for kind, but in ((None, "stretch them$"), ("llama3", "stretch them, not 'llama3'$")):
        with pytest.raises(ValueError, match=f"^--seq_len 17: the model knows 16 positions; --rope_scaling linear, dynamic or yarn would {but}"):
            extend_context(config, 17, kind)
    with pytest.raises(ValueError, match="16 positions, a learned vector each"):
        extend_context(tiny(max_position_embeddings=16, position_embedding_type="learned").config, 17, "yarn")
    alibi = extend_context(tiny(max_position_embeddings=16, position_embedding_type="alibi").config, 99, None)
    assert alibi.max_position_embeddings == 99 and alibi.rope_scaling is None


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def test_shards_are_put_together(tmp_path):
    model = tiny()
    save_model(tmp_path, model)
    tensors = dict(read_safetensors(tmp_path / "model.safetensors"))
    weight_map = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        write_safetensors(tmp_path / file, {name: tensors[name] for name in tensors if weight_map[name] == file})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), load_model(tmp_path).parameters()))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors is missing"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match="weight_map must map"):
        load_model(tmp_path)


def test_a_model_does_not_hang_on_its_file(tmp_path):
    save_model(tmp_path, tiny())
    loaded = load_model(tmp_path)
    expected = loaded.lm_head.weight.clone()
    size = (tmp_path / "model.safetensors").stat().st_size
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(b"\xff" * size)
    assert torch.equal(loaded.lm_head.weight, expected)


def test_a_tied_head_stored_twice(tmp_path):
    model = tiny(tie_word_embeddings=True)
    save_model(tmp_path, model)
    tensors = dict(model.named_parameters()) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    write_safetensors(tmp_path / "model.safetensors", tensors | {"lm_head.weight": model.lm_head.weight.clone()})
    assert same_bits(load_model(tmp_path).lm_head.weight, model.lm_head.weight)
    write_safetensors(tmp_path / "model.safetensors", tensors | {"lm_head.weight": model.lm_head.weight + 1})
    with pytest.raises(ValueError, match="ties lm_head.weight to model.embed_tokens.weight, but the two differ"):
        load_model(tmp_path)


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load_model(tmp_path)
    save_model(tmp_path, tiny())
    good = (tmp_path / "config.json").read_text()
    for edit, why in (({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
                      ({"num_attention_heads": None}, "num_attention_heads must be given"),
                      ({"hidden_size": "many"}, "no model can be built from its config.json"),
                      ({"num_attention_heads": 3}, "no multiple of"),
                      ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope scaling 'longrope' is not supported"),
                      ({"intermediate_size": 40}, "model.layers.0.mlp.gate_proj.weight is torch.float32 (24, 32)"),
                      ({"num_hidden_layers": 1}, "unknown tensors: model.layers.1."),
                      ({"num_hidden_layers": 3}, "missing tensors: model.layers.2.")):
        edit_config(tmp_path, **edit)
        with pytest.raises(ValueError, match=re.escape(why)) as caught:
            load_model(tmp_path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
        (tmp_path / "config.json").write_text(good)
    (tmp_path / "config.json").write_text("{nonsense")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(good)
    tensors = dict(tiny().named_parameters())
    tensors["lm_head.weight"] = torch.zeros(32, 32, dtype=torch.int8)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match="lm_head.weight is torch.int8"):
        load_model(tmp_path)


def test_a_truncated_checkpoint_is_not_loaded_as_a_model(tmp_path, pair):
    folder = run_of_three(tmp_path, pair)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="model.safetensors is truncated"):
        load_model(folder)


MADE_BY_TRANSFORMERS = {
    "llama": ("llama", {}), "smollm": ("llama", dict(tie_word_embeddings=True)), "llama, biases": ("llama", dict(attention_bias=True)),
    "mistral": ("mistral", dict(sliding_window=5)), "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=0)), "qwen3": ("qwen3", dict(head_dim=16)),
    "mixtral": ("mixtral", dict(num_local_experts=5, sliding_window=7)),
    "qwen3_moe": ("qwen3_moe", dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=16, norm_topk_prob=True)),
    "qwen3_moe, one layer": ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[0])),
    "qwen3_moe, window": ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=2,
                                            use_sliding_window=True, sliding_window=6, attention_bias=True)),
} | {kind: ("llama", dict(rope_parameters=scaling | {"rope_theta": 10000.0})) for kind, scaling in {
    "linear": dict(rope_type="linear", factor=3.0), "dynamic": dict(rope_type="dynamic", factor=2.0),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    "yarn, as in DeepSeek": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8, beta_slow=2,
                                 mscale=1.3, mscale_all_dim=0.7, truncate=False),
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
}.items()}


@pytest.mark.parametrize("case", MADE_BY_TRANSFORMERS)
def test_models_made_by_transformers(tmp_path, case):
    """Logits, also beyond the trained length; greedy text with a cache and without; our export, reopened there."""
    transformers = pytest.importorskip("transformers", reason="the transformers package is not installed")
    from generate import generate
    family, more = MADE_BY_TRANSFORMERS[case]
    shape = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=64, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **shape | more)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) / 4
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    text, long = torch.randint(0, 97, (2, 40)), torch.randint(0, 97, (1, 120))
    with torch.no_grad():
        assert (ours(text) - theirs(text).logits).abs().max() <= 1e-5
        assert (ours(long) - theirs(long).logits).abs().max() <= 1e-5
        said = generate(ours, [text[0, :9].tolist()], max_new_tokens=30, temperature=0.0, stop_token_ids=())[0]
        uncached = text[:1, :9]
        for _ in said:
            uncached = torch.cat((uncached, ours(uncached)[:, -1:].argmax(-1)), dim=1)
        assert said == uncached[0, 9:].tolist()
        expected = theirs.generate(text[:1, :9], max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert said == expected[0, 9:].tolist()
        (tmp_path / "ours").mkdir()
        save_model(tmp_path / "ours", ours)
        a, b = (read_safetensors(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
        assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
        assert all(torch.equal(p, q) for p, q in zip(theirs.parameters(), back.parameters()))
        assert torch.equal(back(long).logits, theirs(long).logits)


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_agrees_both_ways(tmp_path, shape):
    transformers = pytest.importorskip("transformers", reason="the transformers package is not installed")
    model = tiny(**SHAPES[shape]).eval()
    for parameter in model.parameters():  # norms and biases that matter
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    (tmp_path / "ours").mkdir()
    save_model(tmp_path / "ours", model, Tokenizer())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    tokens = torch.arange(30)[None] * 7 % 32
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, model(tokens), rtol=0, atol=1e-5)
        assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (1, 2)
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
        assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
        back = load_model(tmp_path / "theirs")
        assert torch.equal(back(tokens), model(tokens))
