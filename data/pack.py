"""Documents -> token shards: the one on-disk format that the loader maps into memory.

A folder holds, for each split, shards of a little-endian token stream and where its documents start:

    train_00000.bin    uint16 (uint32 if vocab_size > 65536): EOS d1 EOS d2 EOS ... dn EOS
    train_00000.idx    int64: position in the .bin of the first token of d1, d2, ... dn
    index.json         {"vocab_size", "dtype", "eos_token_id", "settings",
                        "splits": {"train": {"tokens", "documents", "bytes", "skipped_documents",
                                             "shards": [{"file", "tokens", "documents", "sha256", "idx_sha256"}]}}}

The model sees a document as inputs [EOS d] and targets [d EOS]: EOS plays the part of BOS, so the first token is
predicted too, and the last one predicts the end. k shards of N tokens in all have exactly N - k targets: each token of
each document and its EOS once. Documents never cross shards; a shard is closed once it holds `shard_tokens`.

Conversations (write_chats) go into the same format, in rows of exactly seq_len tokens, so that the loader's windows
are the rows: whole conversations, then padding. There a third file tells what the loss counts, and an entry of .idx is
the *second* token of a conversation, for its first one plays the part of the opening EOS:

    train_00000.mask   uint8 per token: 1 = a target that counts, 2 = a target of the prompt, 0 = none (first, padding)

The folder appears as a whole or not at all: everything is written to NAME.partial beside it, synced, then renamed.
Whatever `tokenizer.save` writes lies in it too, so it can be moved, and read without asking how it was made.
"""

import contextlib
import hashlib
import json
import os
import shutil
from array import array
from bisect import bisect_left, insort
from itertools import islice
from pathlib import Path

import numpy as np

BATCH = 1 << 22  # characters encoded at a time, which bounds the memory


def write_shards(directory, splits, tokenizer, shard_tokens: int = 100_000_000, settings: dict | None = None) -> dict:
    """Tokenize `splits` into the new folder `directory`; return its index (see `read_index`).

    splits     {"train": documents, ...}: iterables of objects with .text (str) and .final (bool; False: the next one
               continues this document). A document without a token is skipped and counted.
    tokenizer  has .vocab_size, .eos_token_id and .encode(text) -> list[int] without special tokens; .encode_batch and
               .save(folder) are used where it has them
    settings   JSON values kept in the index, for whoever asks later how the folder was made
    ValueError: a split without documents, no EOS, an id outside the vocabulary, `directory` not empty. OSError: a full
    disk. Either way nothing is left behind.
    """
    return write_folder(directory, tokenizer, settings, {
        split: lambda folder, dtype, split=split, documents=documents:
            write_split(folder, split, documents, tokenizer, dtype, shard_tokens)
        for split, documents in splits.items()})


def write_chats(directory, splits, tokenizer, seq_len: int, shard_tokens: int = 100_000_000, settings: dict | None = None) -> dict:
    """The same for conversations: `splits` {"train": iterable of (ids, loss_mask)}, each of at most seq_len tokens.

    index: "tokens" counts padding too; "documents" are conversations and paddings; "bytes" the UTF-8 bytes of what is
    trained on, special tokens apart; "trained_tokens"; "conversations". ValueError: a longer one, a split without any.
    """
    return write_folder(directory, tokenizer, (settings or {}) | {"seq_len": seq_len}, {
        split: lambda folder, dtype, split=split, chats=chats:
            write_chat_split(folder, split, chats, tokenizer, dtype, seq_len, shard_tokens)
        for split, chats in splits.items()})


def write_folder(directory, tokenizer, settings: dict | None, writers: dict) -> dict:
    """Make the folder by the `writers` {split: function(folder, dtype) -> entry of the index}; all of it or nothing."""
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory}: exists and is not empty; name another folder or delete this one")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token_id) to separate documents with")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
    try:
        partial.mkdir(parents=True)
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        index = {"vocab_size": tokenizer.vocab_size, "dtype": dtype, "eos_token_id": tokenizer.eos_token_id,
                 "settings": settings or {}, "splits": {}}
        for split, write in writers.items():
            index["splits"][split] = write(partial, dtype)
        if hasattr(tokenizer, "save"):
            tokenizer.save(partial)
        with open(partial / "index.json", "w", encoding="utf-8") as file:
            json.dump(index, file, indent=1)
            sync(file)
        if directory.exists():
            directory.rmdir()  # empty, as seen above; Windows does not rename over it
        os.replace(partial, directory)
    except BaseException as error:  # Ctrl-C too
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # a failed write does not say where
            raise OSError(error.errno, error.strerror, str(directory)) from None
        raise
    return index | {"directory": str(directory)}


def write_split(folder: Path, split: str, documents, tokenizer, dtype: str, shard_tokens: int) -> dict:
    total = {"tokens": 0, "documents": 0, "bytes": 0, "skipped_documents": 0, "shards": []}
    shard = None
    length = size = 0  # tokens and UTF-8 bytes of the document so far
    try:
        for text, final, ids in encoded(documents, tokenizer):
            if shard is None:
                shard = Shard(folder, f"{split}_{len(total['shards']):05d}", dtype, tokenizer.eos_token_id)
            shard.append(ids)
            length += len(ids)
            size += len(text.encode())
            if not final:
                continue
            if length:
                shard.end_document(length)
                total["documents"] += 1
                total["bytes"] += size
            else:
                total["skipped_documents"] += 1
            length = size = 0
            if shard.starts and shard.tokens >= shard_tokens:
                total["shards"].append(shard.close())
                shard = None
        if length:
            raise ValueError(f"split {split!r}: the last document was never ended (its last piece has final=False)")
        if shard is not None and shard.starts:
            total["shards"].append(shard.close())
        elif shard is not None:  # all that was left had no token
            shard.file.close()
            shard.path.unlink()
    finally:
        if shard is not None:
            with contextlib.suppress(OSError):  # on a full disk even closing fails; the first error is the one to show
                shard.file.close()
    if not total["documents"]:
        raise ValueError(f"the {split} split holds no text: give more --data, another --val_fraction, or --val_data")
    total["tokens"] = sum(entry["tokens"] for entry in total["shards"])
    return total


def write_chat_split(folder: Path, split: str, chats, tokenizer, dtype: str, seq_len: int, shard_tokens: int) -> dict:
    total = {"tokens": 0, "documents": 0, "conversations": 0, "trained_tokens": 0, "bytes": 0, "shards": []}
    special = set(tokenizer.special_tokens.values())
    shard = None
    try:
        for row in packed_rows(chats, seq_len, split):
            shard = shard or Shard(folder, f"{split}_{len(total['shards']):05d}", dtype, tokenizer.eos_token_id, masked=True)
            for ids, mask in row:
                mask = np.where(np.asarray(mask, bool), 1, 2).astype(np.uint8)
                mask[0] = 0  # nothing stands before the first token
                shard.starts.append(shard.tokens + 1)
                shard.append(np.asarray(ids), mask)
                trained = [i for i, m in zip(ids, mask) if m == 1]
                total["trained_tokens"] += len(trained)
                total["bytes"] += len(tokenizer.decode_bytes([i for i in trained if i not in special]))
            total["conversations"] += len(row)
            if padding := -shard.tokens % seq_len:
                shard.starts.append(shard.tokens + 1)  # a document of its own: nothing attends to it
                shard.append(np.full(padding, tokenizer.eos_token_id), np.zeros(padding, np.uint8))
            if shard.tokens >= shard_tokens:
                total["shards"].append(shard.close())
                shard = None
        if shard is not None:
            total["shards"].append(shard.close())
    finally:
        if shard is not None:
            with contextlib.suppress(OSError):
                shard.file.close()
    if not total["conversations"]:
        raise ValueError(f"the {split} split holds no conversation to train on: give more --data or another --val_fraction")
    total["tokens"] = sum(entry["tokens"] for entry in total["shards"])
    total["documents"] = sum(entry["documents"] for entry in total["shards"])
    return total


def packed_rows(chats, seq_len: int, split: str, at_once: int = 4096):
    """Lists of (ids, mask) that fit into seq_len tokens together: best fit, decreasing, among `at_once` conversations."""
    chats = iter(chats)
    while some := list(islice(chats, at_once)):
        rows = []  # (room left, the row), by room
        for ids, mask in sorted(some, key=lambda chat: -len(chat[0])):  # stable: equal lengths keep their order
            if not 0 < len(ids) <= seq_len:
                raise ValueError(f"split {split!r}: a conversation of {len(ids)} tokens; rows hold {seq_len}")
            place = bisect_left(rows, len(ids), key=lambda row: row[0])  # the fullest row that still has room
            room, row = rows.pop(place) if place < len(rows) else (seq_len, [])
            row.append((ids, mask))
            insort(rows, (room - len(ids), row), key=lambda row: row[0])
        for _, row in rows:
            yield row


def encoded(documents, tokenizer):
    """(text, final, ids as an int64 array) of each piece, tokenized BATCH characters at a time."""
    encode_batch = getattr(tokenizer, "encode_batch", lambda texts: [tokenizer.encode(text) for text in texts])

    def flush():
        for (text, final), ids in zip(batch, encode_batch([text for text, _ in batch])):
            ids = np.asarray(ids, dtype=np.int64)
            if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:  # would wrap around in uint16
                raise ValueError(f"the tokenizer gave id {ids.max()}, but its vocab_size is {tokenizer.vocab_size}")
            yield text, final, ids

    batch, characters = [], 0
    for document in documents:
        batch.append((document.text, document.final))
        characters += len(document.text) + 1  # so that a million empty documents fill a batch too
        if characters >= BATCH:
            yield from flush()
            batch, characters = [], 0
    yield from flush()


class Shard:
    """One .bin file under way; the starts of its documents are kept (8 bytes each) and written at the end, as is the
    mask of a `masked` one (a byte per token), which begins without an EOS and ends with one."""

    def __init__(self, folder: Path, name: str, dtype: str, eos: int, masked: bool = False):
        self.path = folder / f"{name}.bin"
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.eos = np.array([eos])
        self.file = open(self.path, "wb")
        self.sha256 = hashlib.sha256()
        self.tokens = 0
        self.starts = array("q")
        self.mask = [] if masked else None
        if not masked:
            self.append(self.eos)

    def append(self, ids: np.ndarray, mask: np.ndarray | None = None):
        if self.mask is not None:
            self.mask.append(mask)
        data = ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.sha256.update(data)
        self.tokens += len(ids)

    def end_document(self, length: int):
        self.starts.append(self.tokens - length)
        self.append(self.eos)

    def close(self) -> dict:
        beside = {"idx": np.array(self.starts, dtype="<i8").tobytes()}
        if self.mask is not None:
            self.append(self.eos, np.zeros(1, np.uint8))  # the last row's last token needs one after it
            beside["mask"] = np.concatenate(self.mask).tobytes()
        sync(self.file)
        self.file.close()
        for suffix, data in beside.items():
            with open(self.path.with_suffix(f".{suffix}"), "wb") as file:
                file.write(data)
                sync(file)
        return {"file": self.path.name, "tokens": self.tokens, "documents": len(self.starts),
                "sha256": self.sha256.hexdigest(),
                **{f"{suffix}_sha256": hashlib.sha256(data).hexdigest() for suffix, data in beside.items()}}


def sync(file):
    file.flush()
    os.fsync(file.fileno())


def read_index(directory, verify: bool = False) -> dict:
    """index.json of a finished folder plus "directory", its path; ValueError or FileNotFoundError, naming the file, if
    a shard is missing or its size is not the recorded one. verify=True also reads everything and compares SHA-256."""
    directory = Path(directory)
    if not (directory / "index.json").is_file():
        raise FileNotFoundError(f"{directory}: no index.json, so no token shards (python -m data.prepare makes them)")
    try:
        index = json.loads((directory / "index.json").read_text(encoding="utf-8"))
        width = np.dtype(index["dtype"]).itemsize
        expected = []  # (path, bytes, sha256)
        for entry in (entry for split in index["splits"].values() for entry in split["shards"]):
            path = directory / entry["file"]
            expected.append((path, entry["tokens"] * width, entry["sha256"]))
            expected.append((path.with_suffix(".idx"), entry["documents"] * 8, entry["idx_sha256"]))
            if "mask_sha256" in entry:
                expected.append((path.with_suffix(".mask"), entry["tokens"], entry["mask_sha256"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / 'index.json'}: damaged, not the index of token shards ({error!r})") from None
    for path, size, sha256 in expected:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing, but listed in index.json")
        if path.stat().st_size != size:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, but index.json says {size}: truncated or replaced")
        if verify and file_sha256(path) != sha256:
            raise ValueError(f"{path}: its SHA-256 is not the one in index.json: edited or damaged")
    return index | {"directory": str(directory)}


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
