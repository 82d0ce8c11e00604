"""Raw text -> a finished data folder: read the corpus, train a tokenizer, write token shards.

The training stages do the same into --out/data by themselves; this command is for doing it once, for several runs.

    python -m data.prepare --data story.txt more/ --vocab_size 8192 --out prepared
    python train_pretrain.py --data prepared

The folder holds the shards of both splits with their index.json (data/pack.py) and the tokenizer's own files, so it
needs nothing else. It appears whole or not at all. A second call with the same settings finds it and does nothing.
Conversations are prepared by `prepare_chats`; pairs of answers, which are few, are only read, by `read_pairs`.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # chat needs two more: no resizing later


@dataclass
class Args:
    data: list[str] = field(default_factory=lambda: ["stdlib"])  # text files, folders, .jsonl(.gz), or stdlib
    out: str = "out/prepared"  # folder to make
    val_data: list[str] = field(default_factory=list)  # held-out text from other sources; replaces --val_fraction
    val_fraction: float = 0.1  # held-out share: the tail of a single file, else whole documents
    tokenizer: str | None = None  # a tokenizer's file or folder, or char; default: train a BPE on the training split
    vocab_size: int = 8192  # of the BPE to train, special tokens included


def prepare(out_data_dir, *, data, val_data=None, val_fraction=0.1, tokenizer=None, vocab_size=8192,
            special_tokens=SPECIAL_TOKENS):
    """Return (tokenizer, index) of the token shards of `data`, making them in `out_data_dir` unless they are there.

    data, val_data   lists of sources (data/corpus.py). One prepared folder as the only source is used where it lies.
    val_fraction     0 and no val_data: there is only a train split
    tokenizer        None or "bpe": train one of `vocab_size`; "char": one token per character; else a path to load
    index            index.json plus "directory", the folder to give to the loader
    ValueError, naming the setting, if `out_data_dir` was made with others; and what the parts raise on bad input.
    """
    from data.corpus import expand, read_documents, split_documents
    from data.pack import read_index, write_shards
    from data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer

    data, val_data, tokenizer = list(data), list(val_data or []), str(tokenizer or "bpe")
    if len(data) == 1 and Path(data[0], "index.json").is_file():
        return prepared_folder(data[0], val_data, tokenizer)

    trained = tokenizer in ("bpe", "char")
    settings = {"data": data, "val_data": val_data, "val_fraction": None if val_data else val_fraction,
                "tokenizer": tokenizer, "vocab_size": vocab_size if tokenizer == "bpe" else None,
                "special_tokens": list(special_tokens) if trained else None}
    out_data_dir = Path(out_data_dir)
    if (out_data_dir / "index.json").is_file():
        index = read_index(out_data_dir)
        made_with = index["settings"]
        try:
            settings["file_bytes"] = file_bytes(expand(data + val_data))
        except FileNotFoundError:  # the sources are gone, the shards made from them are not
            settings["file_bytes"] = made_with.get("file_bytes")
        for name, value in settings.items():
            if made_with.get(name) != value:
                raise ValueError(f"{out_data_dir}: made with {name} {made_with.get(name)!r}, not {value!r}: delete it "
                                 "or name another --out")
        print(f"data: using the token shards in {out_data_dir}, made before with the same settings")
        return load_tokenizer(out_data_dir), index
    settings["file_bytes"] = file_bytes(expand(data + val_data))

    def documents(split):
        if val_data:
            return read_documents(data if split == "train" else val_data)
        return split_documents(data, val_fraction, split)

    splits = ("train", "val") if val_data or val_fraction else ("train",)
    if tokenizer == "bpe":
        print(f"tokenizer: training a byte-level BPE of {vocab_size} tokens on the training split", flush=True)
        made = BPETokenizer.train((document.text for document in documents("train")), vocab_size, special_tokens)
    elif tokenizer == "char":  # the alphabet of all the text: a held-out character without an id could not be scored
        made = CharTokenizer.train((document.text for split in splits for document in documents(split)), special_tokens)
    else:
        made = load_tokenizer(tokenizer)
    index = write_shards(out_data_dir, {split: documents(split) for split in splits}, made, settings=settings)
    for split, total in index["splits"].items():
        per_token = total["bytes"] / total["tokens"]
        print(f"data: {split:5} {total['documents']:,} documents, {total['bytes'] / 1e6:.2f} MB, {total['tokens']:,} "
              f"tokens of {per_token:.2f} bytes, vocabulary {made.vocab_size}")
    return made, index


def prepare_chats(out_data_dir, tokenizer, *, data, val_data, val_fraction, template, seq_len) -> dict:
    """The index of `out_data_dir`: conversations rendered, cut to seq_len, split, packed; made once, then reused.

    tokenizer: after data.chat.prepare_tokenizer. val_fraction: the share held out, by text, if there is no val_data."""
    from data.chat import read_chats, render, truncate
    from data.pack import read_index, write_chats

    out_data_dir = Path(out_data_dir)
    settings = dict(data=data, val_data=val_data, val_fraction=val_fraction, template=template, seq_len=seq_len)
    if (out_data_dir / "index.json").exists():  # of a run that is resumed, or that was killed before it began to train
        if (index := read_index(out_data_dir))["settings"] != settings:
            raise ValueError(f"{out_data_dir}: made with {index['settings']}, not {settings}: choose another --out")
        return index
    counts = {"cut": 0, "nothing to train on": 0}

    def chats(sources: list[str], split: str):
        for chat in read_chats(sources):
            ids, mask = render(chat.messages, tokenizer, template, chat.tools)
            held_out = place_of(chat.messages) < val_fraction * 2**256  # copies fall on one side
            if not val_data and held_out != (split == "val"):
                continue
            kept = truncate(ids, mask, seq_len)
            counts["nothing to train on" if kept is None else "cut"] += kept is None or len(kept[0]) < len(ids)
            if kept is not None:
                yield kept

    splits = {"train": chats(data, "train"), "val": chats(val_data or data, "val")}
    index = write_chats(out_data_dir, splits, tokenizer, seq_len, settings=settings)
    for split, total in index["splits"].items():
        print(f"data: {split:5} {total['conversations']:,} conversations, {total['trained_tokens']:,} trained tokens, "
              f"{total['tokens']:,} in all")
    print("data: " + ", ".join(f"{count} {what}" for what, count in counts.items()) + f" at --seq_len {seq_len}")
    return index


class Pair(NamedTuple):
    """Two answers to a prompt, as data.chat.render gives them."""

    chosen: tuple[list[int], list[int]]  # ids of prompt and answer, mask of the answer
    rejected: tuple[list[int], list[int]]
    num_bytes: int  # of the chosen answer's text

    length = property(lambda self: max(len(self.chosen[0]), len(self.rejected[0])))  # of the longer one, in tokens


def read_pairs(tokenizer, split: str, *, data, val_data, val_fraction, template, seq_len) -> list[Pair]:
    """The pairs of "train" or "val", rendered; ties, and those without an answer inside seq_len, are left out."""
    from data.chat import read_preferences, render, truncate

    pairs, ties, lost = [], 0, 0
    for row in read_preferences(val_data if split == "val" and val_data else data):
        held_out = place_of(row.prompt) < val_fraction * 2**256  # all answers to a prompt fall on one side
        if not val_data and held_out != (split == "val"):
            continue
        sides = [render(row.prompt + side, tokenizer, template, train_from=len(row.prompt))
                 for side in (row.chosen, row.rejected)]
        sides = [truncate(ids, mask, seq_len) for ids, mask in sides]
        ties, lost = ties + row.is_tie, lost + (None in sides)
        if not row.is_tie and None not in sides:
            pairs.append(Pair(*sides, len("".join(message["content"] for message in row.chosen).encode())))
    print(f"data: {split:5} {len(pairs):,} pairs; left out: {ties} of two equal answers, {lost} too long for --seq_len")
    if not pairs:
        raise ValueError(f"the {split} split holds no pair: give more --data, another --val_fraction, or --val_data")
    return pairs


def place_of(messages: list[dict]) -> int:
    """A number below 2^256 that depends on the messages alone, evenly spread."""
    return int.from_bytes(hashlib.sha256(repr(messages).encode()).digest(), "big")


def prepared_folder(folder: str, val_data: list[str], tokenizer: str):
    """Use a prepared folder where it lies; a tokenizer named besides must be the folder's own."""
    from data.pack import read_index
    from data.tokenizer import CharTokenizer, load_tokenizer

    index, own = read_index(folder), load_tokenizer(folder)
    if val_data:
        raise ValueError(f"{folder}: is prepared already, held-out split included; --val_data cannot be added to it")
    if tokenizer != "bpe":
        is_char = tokenizer == "char"
        if not (isinstance(own, CharTokenizer) if is_char else tokens_of(load_tokenizer(tokenizer)) == tokens_of(own)):
            raise ValueError(f"{tokenizer}: {folder} was prepared with another tokenizer; leave --tokenizer out")
    print(f"data: using the prepared folder {folder}")
    return own, index


def tokens_of(tokenizer) -> list:
    """Each id's bytes: two tokenizers with equal lists read the same ids as the same text."""
    def token(i):
        try:
            return tokenizer.decode_bytes([i])
        except ValueError:  # a gap: published vocabularies leave some ids unused
            return None

    return [tokenizer.eos_token_id, *map(token, range(tokenizer.vocab_size))]


def file_bytes(items: list) -> int:
    """Total size of the source files: the cheap sign that a text was edited after it was prepared."""
    return sum(item.stat().st_size for item in items if isinstance(item, Path))


def main():
    from cli import parse

    args = parse(Args, __doc__)
    prepare(args.out, data=args.data, val_data=args.val_data, val_fraction=args.val_fraction, tokenizer=args.tokenizer,
            vocab_size=args.vocab_size)


if __name__ == "__main__":
    from cli import run

    run(main)
