"""data/pack.py: the shards hold every token once, appear whole or not at all, and damage is named."""

import errno
import hashlib
import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from data import pack
from data.pack import read_index, write_shards


class Document(NamedTuple):
    text: str
    final: bool = True


class ByteTokenizer:
    vocab_size, eos_token_id = 257, 256

    def encode(self, text):
        return list(text.encode())

    def save(self, folder):
        Path(folder, "tokenizer.json").write_text("{}")


class WideTokenizer(ByteTokenizer):
    """Ids above 65535."""
    vocab_size, eos_token_id = 100_000, 99_999

    def encode(self, text):
        return [90_000 + b for b in text.encode()]


def test_an_error_of_the_documents_keeps_its_words(tmp_path):
    """A FileNotFoundError made with a sentence alone has neither errno nor filename; it came out as `[Errno None] None`."""
    def documents():
        raise FileNotFoundError("chats.jsonl: no such file")
        yield

    with pytest.raises(FileNotFoundError, match="^chats.jsonl: no such file$"):
        write_shards(tmp_path / "d", {"train": documents()}, ByteTokenizer())


def stories(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice("ab \né中") for _ in range(rng.randrange(1, 60))) for _ in range(count)]


def documents_of(folder, split) -> list[list[list[int]]]:
    """By the format's description alone: for each shard its documents, as ids."""
    index = json.loads(Path(folder, "index.json").read_text())
    shards = []
    for entry in index["splits"][split]["shards"]:
        stream = np.fromfile(Path(folder, entry["file"]), "<u2" if index["dtype"] == "uint16" else "<u4").tolist()
        starts = np.fromfile(Path(folder, entry["file"]).with_suffix(".idx"), "<i8").tolist()
        eos = index["eos_token_id"]
        assert len(stream) == entry["tokens"] and len(starts) == entry["documents"]
        assert stream[0] == eos and stream[-1] == eos
        assert [i + 1 for i, token in enumerate(stream[:-1]) if token == eos] == starts
        shards.append([stream[a : b - 1] for a, b in zip(starts, starts[1:] + [len(stream)])])
    return shards


@pytest.mark.parametrize("tokenizer, dtype", [(ByteTokenizer(), "uint16"), (WideTokenizer(), "uint32")])
def test_every_document_once_in_order(tmp_path, tokenizer, dtype):
    train, val = stories(500), stories(20, seed=1)
    index = write_shards(tmp_path / "d", {"train": map(Document, train), "val": map(Document, val)}, tokenizer,
                         shard_tokens=1000, settings={"data": ["x"]})
    assert (index["dtype"], index["vocab_size"]) == (dtype, tokenizer.vocab_size)
    assert index["settings"] == {"data": ["x"]}
    for split, texts in (("train", train), ("val", val)):
        shards = documents_of(tmp_path / "d", split)
        assert [document for shard in shards for document in shard] == [tokenizer.encode(text) for text in texts]
        total = index["splits"][split]
        assert total["documents"] == len(texts) and total["bytes"] == sum(len(text.encode()) for text in texts)
        assert total["tokens"] - len(shards) == sum(len(tokenizer.encode(text)) + 1 for text in texts)  # the targets
        assert all(entry["tokens"] >= 1000 for entry in total["shards"][:-1]) and len(shards) > (split == "train") * 10
    assert (tmp_path / "d" / "tokenizer.json").exists()
    assert index == read_index(tmp_path / "d", verify=True) and index["directory"] == str(tmp_path / "d")


def test_pieces_are_joined_without_a_separator_and_empty_documents_counted(tmp_path):
    pieces = [Document(""), Document("ab", False), Document("", False), Document("cd"), Document("", False),
              Document(""), Document("e", False), Document("")]
    index = write_shards(tmp_path / "d", {"train": pieces}, ByteTokenizer(), shard_tokens=1)
    assert documents_of(tmp_path / "d", "train") == [[list(b"abcd")], [list(b"e")]]
    assert index["splits"]["train"]["skipped_documents"] == 2
    assert sorted(p.name for p in (tmp_path / "d").glob("*.bin")) == ["train_00000.bin", "train_00001.bin"]
    index = write_shards(tmp_path / "e", {"train": [Document("a"), Document("")]}, ByteTokenizer(), shard_tokens=1)
    assert len(index["splits"]["train"]["shards"]) == len(list((tmp_path / "e").glob("*.bin"))) == 1


def test_batches_do_not_change_the_result(tmp_path, monkeypatch):
    class Batched(ByteTokenizer):
        sizes = []

        def encode_batch(self, texts):
            self.sizes.append(len(texts))
            return [self.encode(text) for text in texts]

    monkeypatch.setattr(pack, "BATCH", 100)
    batched = Batched()
    a = write_shards(tmp_path / "a", {"train": map(Document, stories(300))}, ByteTokenizer())
    b = write_shards(tmp_path / "b", {"train": map(Document, stories(300))}, batched)
    assert a["splits"] == b["splits"] and max(batched.sizes) < 60 and sum(batched.sizes) == 300


def test_documents_are_pulled_as_they_are_written(tmp_path, monkeypatch):
    """Streaming: while the corpus is still being read, its beginning is already in the partial folder."""
    monkeypatch.setattr(pack, "BATCH", 1000)
    seen = []

    def source():
        for i in range(50):
            seen.append(sum(p.stat().st_size for p in tmp_path.glob("d.partial/*.bin")))
            yield Document("x" * 20_000)

    write_shards(tmp_path / "d", {"train": source()}, ByteTokenizer())
    assert seen[-1] > 40 * 20_000 * 2


def nothing_left(folder: Path) -> bool:
    return not list(folder.iterdir())


def test_split_without_text_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="val split.*--val_fraction.*--val_data"):
        write_shards(tmp_path / "d", {"train": [Document("a")], "val": [Document("")]}, ByteTokenizer())
    assert nothing_left(tmp_path)


def test_bad_tokenizers(tmp_path):
    class NoEnd(ByteTokenizer):
        eos_token_id = None

    class TooSmall(ByteTokenizer):
        vocab_size = 100

    with pytest.raises(ValueError, match="end-of-text"):
        write_shards(tmp_path / "d", {"train": [Document("a")]}, NoEnd())
    with pytest.raises(ValueError, match="id 122.*vocab_size is 100"):
        write_shards(tmp_path / "d", {"train": [Document("az")]}, TooSmall())
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_full_disk_or_ctrl_c_leaves_nothing(tmp_path, monkeypatch, error):
    synced = []

    def failing(file):
        synced.append(file.name)
        if len(synced) == 3:
            raise error

    monkeypatch.setattr(pack.os, "fsync", lambda number: None)
    monkeypatch.setattr(pack, "sync", failing)
    with pytest.raises(type(error)) as caught:
        write_shards(tmp_path / "d", {"train": map(Document, stories(100))}, ByteTokenizer(), shard_tokens=100)
    assert nothing_left(tmp_path)
    if isinstance(error, OSError):
        assert str(tmp_path / "d") in str(caught.value) and "No space left" in str(caught.value)


def test_real_full_disk(tmp_path):
    """/dev/full refuses every write: the same path through the kernel as a disk without space."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    real_open = open

    def to_full(path, *args):
        return real_open("/dev/full" if str(path).endswith(".bin") else path, *args)

    pack.open = to_full
    try:
        with pytest.raises(OSError, match="No space left"):
            write_shards(tmp_path / "d", {"train": map(Document, stories(3000))}, ByteTokenizer())
    finally:
        del pack.open
    assert nothing_left(tmp_path)


def test_existing_folders(tmp_path):
    leftover = tmp_path / "d.partial"
    leftover.mkdir()
    (leftover / "train_00077.bin").write_bytes(b"half a shard")  # of a killed run
    (tmp_path / "d").mkdir()  # empty: may be used
    write_shards(tmp_path / "d", {"train": [Document("a")]}, ByteTokenizer())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["index.json", "tokenizer.json", "train_00000.bin",
                                                                  "train_00000.idx"]
    with pytest.raises(ValueError, match="not empty"):
        write_shards(tmp_path / "d", {"train": [Document("b")]}, ByteTokenizer())
    assert documents_of(tmp_path / "d", "train") == [[[97]]]


def test_read_index_names_what_is_damaged(tmp_path):
    folder = tmp_path / "d"
    with pytest.raises(FileNotFoundError, match="no index.json"):
        read_index(folder)
    write_shards(folder, {"train": map(Document, stories(100))}, ByteTokenizer(), shard_tokens=500)
    shard, starts = folder / "train_00001.bin", folder / "train_00000.idx"
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match="train_00001.bin.*truncated"):
        read_index(folder)
    edited = bytearray(whole)
    edited[40] ^= 1
    shard.write_bytes(edited)
    read_index(folder)  # the size is right
    with pytest.raises(ValueError, match="train_00001.bin.*SHA-256"):
        read_index(folder, verify=True)
    shard.write_bytes(whole)
    read_index(folder, verify=True)
    starts.write_bytes(starts.read_bytes()[::-1])
    with pytest.raises(ValueError, match="train_00000.idx.*SHA-256"):
        read_index(folder, verify=True)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="train_00001.bin"):
        read_index(folder)
    for text in ("{", "[]", "{}", '{"dtype": "uint16", "splits": []}'):
        (folder / "index.json").write_text(text)
        with pytest.raises(ValueError, match="index.json: damaged"):
            read_index(folder)


def test_same_input_gives_the_same_bytes(tmp_path):
    hashes = []
    for name in "ab":
        write_shards(tmp_path / name, {"train": map(Document, stories(100))}, ByteTokenizer())
        hashes.append([hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((tmp_path / name).iterdir())])
    assert hashes[0] == hashes[1]
