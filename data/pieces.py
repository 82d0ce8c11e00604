"""Sentencepiece tokenizers as a list of pieces, and the files that hold such a list.

    piece     a text with U+2581 for blanks ("▁the"), or a control piece ("<s>"), or one byte ("<0x0A>")
    encoding  start from single characters; merge, again and again, the two neighbours whose union has the highest
              score; spell a character that is no piece as bytes (sentencepiece's kind "BPE", Kudo & Richardson 2018)

    tokenizer.model    sentencepiece's own: a protocol buffers message
    tokenizer.json     Hugging Face's: merges in the place of scores
    tokenizer.bin      llama2.c's: int32 length of the longest, then for each piece float32 score, int32 length, bytes

    pieces = pieces_of_model(open("tokenizer.model", "rb").read())
    data = llama2c_of_pieces(pieces)

    python data/pieces.py tokenizer.model     lists the pieces; without a file: how a text is cut, step by step
"""

import json
import struct
import sys
from typing import NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the same numbers in sentencepiece and in GGUF
BLANK = "\u2581"  # what stands for a blank in a piece
BYTES = [f"<0x{b:02X}>" for b in range(256)]


class Pieces(NamedTuple):
    tokens: list[str]
    scores: list[float]
    types: list[int]
    ids: dict[str, int]  # of unk, bos, eos and pad, as far as there are such
    add_prefix: bool = True  # put a blank before the text
    changes: str = ""  # what else the model does to a text before it is cut, in words


def encode(pieces: Pieces, text: str) -> list[int]:
    """Ids of a text, in plain Python: the slow truth. Pieces that are not normal are never made by merging."""
    score = {token: (score, i) for i, (token, score, kind) in enumerate(zip(*pieces[:3])) if kind == NORMAL}
    byte_of = {token: i for i, (token, kind) in enumerate(zip(pieces.tokens, pieces.types)) if kind == BYTE}
    parts = list((" " * (pieces.add_prefix and text != "") + text).replace(" ", BLANK))
    while True:
        pairs = [(score[a + b][0], -i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in score]
        if not pairs:
            break
        i = -max(pairs)[1]  # of equal scores the leftmost
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = []
    for part in parts:
        ids += [score[part][1]] if part in score else [byte_of[BYTES[b]] for b in part.replace(BLANK, " ").encode()]
    return ids


# ------------------------------------------------------------------------------------------------------ tokenizer.model


def pieces_of_model(data: bytes) -> Pieces:
    """From the contents of a sentencepiece `tokenizer.model`. ValueError: another kind than BPE, or no such message."""
    pieces, trainer, normalizer = [], {}, {}  # fields by number, as in sentencepiece_model.proto
    try:
        for number, value in _fields(data):
            if number == 1:
                pieces.append({1: b"", 2: 0.0, 3: NORMAL} | dict(_fields(value)))
            elif number in (2, 3):
                (trainer if number == 2 else normalizer).update(_fields(value))
        tokens = [piece[1].decode() for piece in pieces]
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError, struct.error):
        raise ValueError("not a sentencepiece model") from None
    if trainer.get(3, 1) != 2:
        raise ValueError("a sentencepiece model of another kind than BPE, which merges differently")
    ids = {}
    for name, at, usual in (("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1)):
        if 0 <= (i := trainer.get(at, usual)) < len(pieces):  # -1, none, is written as 2^64 - 1
            ids[name] = i
    changes = "normalizes characters" if normalizer.get(2) else "joins blanks" if normalizer.get(4, 1) else ""
    return Pieces(tokens, [float(piece[2]) for piece in pieces], [piece[3] for piece in pieces], ids,
                  bool(normalizer.get(3, 1)), changes)


def model_of_pieces(pieces: Pieces) -> bytes:
    """A sentencepiece `tokenizer.model` of the kind BPE that leaves a text's characters and blanks as they are."""
    data = b"".join(_field(1, _field(1, token) + _field(2, float(score)) + _field(3, kind))
                    for token, score, kind in zip(*pieces[:3]))
    trainer = _field(3, 2) + _field(4, len(pieces.tokens)) + _field(35, int(BYTE in pieces.types))
    for at, name in enumerate(("unk", "bos", "eos", "pad")):
        i = pieces.ids.get(name, -1)
        trainer += _field(40 + at, i % (1 << 64))
        if i >= 0:
            trainer += _field(45 + at, pieces.tokens[i])
    normalizer = _field(1, "identity") + _field(3, int(pieces.add_prefix)) + _field(4, 0) + _field(5, 1)
    return data + _field(2, trainer) + _field(3, normalizer)


def _varint(n: int) -> bytes:
    """Protocol buffers' integers: seven bits a byte, the lowest first."""
    parts = []
    while n > 127:
        parts.append(n & 127 | 128)
        n >>= 7
    return bytes([*parts, n])


def _field(number: int, value) -> bytes:
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _fields(data: bytes):
    """(number, value) of each field of a message: an integer, a float, or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        n = shift = 0
        while True:
            n |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                return n

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else {5: 4, 1: 8}[wire]
        if at + size > len(data):
            raise IndexError
        at += size
        value = data[at - size : at]
        yield number, value if wire == 2 else struct.unpack("<f" if wire == 5 else "<d", value)[0]


# ------------------------------------------------------------------------------------------------------- tokenizer.json


def json_of_pieces(pieces: Pieces) -> dict:
    """Hugging Face's tokenizer.json that gives the same ids, with the BOS before them if there is one.

    It has merges in the place of scores: of all ways to cut a piece in two pieces, the best piece first."""
    index = {token: i for i, token in enumerate(pieces.tokens)}
    normal = [i for i, kind in enumerate(pieces.types) if kind == NORMAL]
    mergeable = {pieces.tokens[i] for i in normal}
    merges = [[token[:cut], token[cut:]] for i in sorted(normal, key=lambda i: -pieces.scores[i])
              for token in [pieces.tokens[i]] for cut in range(1, len(token))
              if token[:cut] in mergeable and token[cut:] in mergeable]
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": kind != USER_DEFINED}
             for i, (token, kind) in enumerate(zip(pieces.tokens, pieces.types))
             if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    prefix = [{"type": "Prepend", "prepend": BLANK}] if pieces.add_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if pieces.add_prefix else []
    post_processor = None
    if (bos := pieces.ids.get("bos")) is not None:
        token, text = pieces.tokens[bos], {"Sequence": {"id": "A", "type_id": 0}}
        special = {"SpecialToken": {"id": token, "type_id": 0}}
        second = {"Sequence": {"id": "B", "type_id": 1}}
        post_processor = {"type": "TemplateProcessing", "single": [special, text], "pair": [special, text, second],
                          "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}}}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [*prefix, blank]}, "pre_tokenizer": None,
            "post_processor": post_processor,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": BLANK}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, *strip]},
            "model": {"type": "BPE", "dropout": None, "unk_token": pieces.tokens[pieces.ids.get("unk", 0)],
                      "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                      "byte_fallback": BYTE in pieces.types, "ignore_merges": False, "vocab": index, "merges": merges}}


def pieces_of_json(data: dict) -> Pieces:
    """The inverse, for a tokenizer.json whose BPE has a byte fallback. Scores are minus the rank of the first merge.

    Of the special ids such a file holds the unknown's and, in its post-processor, BOS. ValueError: no such file."""
    try:
        by_id = {i: token for token, i in data["model"]["vocab"].items()}
        added = {token["id"]: token for token in data["added_tokens"]}
        by_id |= {i: token["content"] for i, token in added.items()}
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in data["model"]["merges"]]
        tokens = [by_id.get(i, f"[PAD{i}]") for i in range(max(by_id) + 1)]
        unknown, steps = data["model"]["unk_token"], json.dumps(data["normalizer"]) + json.dumps(data["pre_tokenizer"])
        add_prefix = any(f'"{word}"' in steps for word in ("Prepend", "first", "always"))  # the latter: prepend_scheme
        post = data.get("post_processor") or {}  # which may be a Sequence, one step of which is a template
        single = next((step["single"] for step in post.get("processors", [post]) if step.get("single")), [{}])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a tokenizer.json of a BPE with byte fallback: {error}") from None
    rank = {}
    for number, merge in enumerate(merges):
        rank.setdefault("".join(merge), number)
    types = []
    for i, token in enumerate(tokens):
        types.append(UNUSED if i not in by_id else UNKNOWN if token == unknown else BYTE if token in BYTES else
                     NORMAL if i not in added else CONTROL if added[i]["special"] else USER_DEFINED)
    ids = {"unk": tokens.index(unknown)} if unknown in tokens else {}
    if (bos := single[0].get("SpecialToken", {}).get("id")) in tokens:
        ids["bos"] = tokens.index(bos)
    return Pieces(tokens, [-float(rank.get(token, len(merges))) for token in tokens], types, ids, add_prefix)


# -------------------------------------------------------------------------------------------------------- tokenizer.bin


def pieces_of_llama2c(data: bytes) -> Pieces:
    """From the contents of llama2.c's tokenizer.bin: <unk>, <s>, </s>, 256 bytes, then normal pieces, blanks as blanks.

    The end of a text is <s>, as run.c has it: in its training data <s> stands before each text and nothing behind.
    ValueError: truncated, or it begins otherwise."""
    at, tokens, scores = 4, [], []
    while at < len(data):
        score, size = struct.unpack("<fi", data[at : at + 8].ljust(8, b"\xff"))
        if size < 0 or at + 8 + size > len(data):
            raise ValueError(f"token {len(tokens)} ends behind the end of the file; truncated?")
        try:
            tokens.append(data[at + 8 : at + 8 + size].decode().replace(" ", BLANK))
        except UnicodeDecodeError:
            raise ValueError(f"token {len(tokens)} is not UTF-8") from None
        scores.append(score)
        at += 8 + size
    tokens[:3] = [token.strip("\n") for token in tokens[:3]]  # run.c prints <s> between two line ends
    if tokens[:3] != ["<unk>", "<s>", "</s>"] or tokens[3:259] != BYTES:
        raise ValueError(f"it must begin with <unk>, <s>, </s> and <0x00> to <0xFF>, not {str(tokens[:4])[:80]}")
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(tokens) - 259)
    return Pieces(tokens, scores, types, {"unk": 0, "bos": 1, "eos": 1})


def llama2c_of_pieces(pieces: Pieces, vocab_size: int = 0) -> bytes:
    """The inverse, filled up to vocab_size. ValueError: pieces that begin otherwise."""
    if pieces.tokens[3:259] != BYTES or pieces.types[:3] != [UNKNOWN, CONTROL, CONTROL]:
        raise ValueError("llama2.c reads only tokenizers that begin with <unk>, <s>, </s> and 256 bytes")
    tokens = ["<unk>", "\n<s>\n", "\n</s>\n", *(token.replace(BLANK, " ") for token in pieces.tokens[3:])]
    tokens = [token.encode() for token in tokens + [f"<unused{i}>" for i in range(len(tokens), vocab_size)]]
    scores = pieces.scores + [-1e9] * (len(tokens) - len(pieces.scores))
    data = b"".join(struct.pack("<fi", score, len(token)) + token for score, token in zip(scores, tokens))
    return struct.pack("<i", max(map(len, tokens))) + data


def main() -> None:
    if len(sys.argv) > 1:
        with open(sys.argv[1], "rb") as file:
            pieces = pieces_of_model(file.read())
        for i, (token, score, kind) in enumerate(zip(*pieces[:3])):
            print(i, repr(token), score, kind)
        return
    words = [BLANK, "a", "n", "b", "an", BLANK + "b", "ana", BLANK + "ban"]
    pieces = Pieces(BYTES + words, [0.0] * 256 + [-float(i) for i in range(len(words))],
                    [BYTE] * 256 + [NORMAL] * len(words), {})
    for text in ("a", "an", "banana", "bé"):
        print(repr(text), [pieces.tokens[i] for i in encode(pieces, text)])


if __name__ == "__main__":
    main()
