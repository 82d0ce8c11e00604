r"""Text to token ids and back: byte-level BPE (trained here, or loaded), characters, and sentencepiece.

Byte-pair encoding (Sennrich et al. 2016; over bytes: GPT-2, 2019) in three steps:

    split     a regular expression cuts the text into pre-tokens ("Hello", " world", "!"); no token ever crosses a cut
    bytes     a pre-token starts as its UTF-8 bytes, so every string can be encoded and nothing is ever "unknown"
    merge     again and again, the two neighbours whose union is the *lowest-ranked* token become that token

Training finds the ranks: count all neighbouring pairs, make the most frequent one a token, repeat. The whole tokenizer
is then one table {token bytes: rank}, and `BPETokenizer.encode_reference` applies it in a few lines of Python; `encode`
hands the same table to tiktoken, which does the same in Rust. A token's rank (when it merges) is usually its id as
well, but need not be in files made by others: the two are kept apart.

    tokenizer = BPETokenizer.train(texts, vocab_size=8192)
    tokenizer.save("out/tokenizer")                    # a Hugging Face tokenizer.json
    tokenizer = load_tokenizer("out/tokenizer")        # that, or a GPT-2, tiktoken or sentencepiece file

Special tokens ("<|endoftext|>") have ids, but never come out of plain text: a user who types one gets its letters,
unless the caller names it in `allowed_special`.

Two Unicode traps: `train` and `encode_reference` split by Python's `regex`, `encode` by tiktoken's engine, and their
Unicode tables are of different years: they agree on the code points that both know. And half a surrogate pair
("\ud800") is no text: ValueError.
"""

import base64
import heapq
import json
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import regex
import sentencepiece
import tiktoken

# How published tokenizers cut text. QWEN2 is the default: it keeps each digit apart, which helps arithmetic.
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
CL100K_PATTERN = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
                  r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""")
QWEN2_PATTERN = CL100K_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K_PATTERN = (rf"""[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
                 rf"""|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
                 r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""")

# A *.tiktoken file holds ranks only; its pattern and special tokens are published in tiktoken's source, by name.
_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
TIKTOKEN_FILES = {
    "r50k_base": (GPT2_PATTERN, {"<|endoftext|>": 50256}),
    "p50k_base": (GPT2_PATTERN, {"<|endoftext|>": 50256}),
    "cl100k_base": (CL100K_PATTERN, {"<|endoftext|>": 100257, **dict(zip(_FIM, (100258, 100259, 100260))),
                                     "<|endofprompt|>": 100276}),
    "o200k_base": (O200K_PATTERN, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}


# ---------------------------------------------------------------------------------------------------------------------
# Training and merging: two functions on bytes

def train_bpe(words: dict[bytes, int], num_merges: int) -> list[tuple[bytes, bytes]]:
    """Learn merges from pre-tokens and how often each occurs (Sennrich et al. 2016, algorithm 1).

    Each step merges the most frequent pair; among equals, the one whose (left, right) byte strings are greatest, so the
    result never depends on order. Fewer than `num_merges` come back when no pair is left to merge.

    A step touches only the words that hold its pair: `where` is the inverted index pair -> words. The best pair is on
    top of a heap that is corrected lazily: old pairs only ever become rarer (a merge makes new pairs, all with the new
    token in them), so an entry's count is an upper bound, checked when it comes to the top.
    """
    tokens = [bytes([b]) for b in range(256)]                      # id -> bytes
    order = [_descending(token) for token in tokens]               # id -> sort key, greatest byte string first
    frequency = list(words.values())
    sequences = [list(word) for word in words]                     # each word as token ids
    counts: dict[tuple[int, int], int] = defaultdict(int)
    where: dict[tuple[int, int], set[int]] = defaultdict(set)
    for index, sequence in enumerate(sequences):
        for pair in zip(sequence, sequence[1:]):
            counts[pair] += frequency[index]
            where[pair].add(index)

    def entry(pair):
        return -counts[pair], order[pair[0]], order[pair[1]], pair

    heap = [entry(pair) for pair in counts]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < num_merges and heap:
        count, _, _, pair = heapq.heappop(heap)
        if -count != counts[pair]:                                 # became rarer since it was pushed
            if counts[pair] > 0:
                heapq.heappush(heap, entry(pair))
            continue
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        order.append(_descending(tokens[new]))
        created = set()
        for index in where.pop(pair):
            before = sequences[index]
            after = sequences[index] = _merge(before, pair, new)
            for old in zip(before, before[1:]):
                counts[old] -= frequency[index]
            for pair_now in zip(after, after[1:]):
                counts[pair_now] += frequency[index]
                if new in pair_now:
                    where[pair_now].add(index)
                    created.add(pair_now)
        for pair_now in created:
            heapq.heappush(heap, entry(pair_now))
    return merges


def _merge(sequence: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace `pair` by `new`, left to right: (a, a) in a a a gives new a."""
    merged, i, (left, right) = [], 0, pair
    while i < len(sequence):
        if sequence[i] == left and i + 1 < len(sequence) and sequence[i + 1] == right:
            merged.append(new)
            i += 2
        else:
            merged.append(sequence[i])
            i += 1
    return merged


def _descending(token: bytes) -> str:
    """A key that sorts byte strings from greatest to least: complemented bytes, then an end mark above them all."""
    return "".join(chr(255 - b) for b in token) + "\u0100"


def merge_bytes(piece: bytes, ranks: dict[bytes, int], below: float = float("inf")) -> list[bytes]:
    """Encode one pre-token: merge the lowest-ranked neighbours, leftmost first, while their rank is under `below`."""
    parts = [bytes([b]) for b in piece]
    while len(parts) > 1:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1))
        if rank >= below:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizers

class Tokenizer:
    """What all tokenizers share. A subclass adds three methods: `_encode_plain(text)` encodes without special tokens;
    `decode_bytes(ids)` gives UTF-8 bytes (one token may hold part of a character; ValueError: an unknown id);
    `save(directory)` writes the files that `load_tokenizer(directory)` reads, each atomically.
    """

    def __init__(self, vocab_size: int, special_tokens: dict[str, int], bos: int | None, eos: int | None,
                 pad: int | None, added_tokens: dict[str, int] | None = None):
        self.vocab_size = vocab_size              # highest id + 1, special tokens included
        self.special_tokens = special_tokens      # text -> id; found in text only when `allowed_special` says so
        self.added_tokens = added_tokens or {}    # text -> id; whole words of the vocabulary, always found in text
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, pad

    def encode(self, text: str, allowed_special: str | Iterable[str] = ()) -> list[int]:
        """Token ids of `text`; no BOS or EOS is added.

        The text of a special token is plain text, unless `allowed_special` (names, or "all") lists it.
        ValueError: an unknown name, half a surrogate pair, or a character that the vocabulary cannot spell.
        """
        _utf8(text)
        whole = dict(self.added_tokens)
        for name in self.special_tokens if allowed_special == "all" else allowed_special:
            if name not in self.special_tokens:
                raise ValueError(f"allowed_special: {name!r} is no special token of this tokenizer")
            whole[name] = self.special_tokens[name]
        ids: list[int] = []
        for part in _cut_out(text, whole):
            ids += [whole[part]] if part in whole else self._encode_plain(part)
        return ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each text. (No threads: they measured no faster, lists of ids are made under Python's lock.)"""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 (half a character) become U+FFFD. ValueError: an unknown id."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def _lookup(self, table: dict, ids: Iterable[int]) -> list:
        try:
            return [table[i] for i in ids]
        except KeyError as error:
            raise ValueError(f"token id {error.args[0]} is not in the vocabulary (size {self.vocab_size})") from None

    def _save_json(self, directory, vocab: dict[str, int], merges: list[str], decoder: dict, pre_tokenizer=None,
                   normalizer=None, ignore_merges=False) -> None:
        """Hugging Face's tokenizer.json, and tokenizer_config.json for transformers' AutoTokenizer."""
        added = [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                  "normalized": False, "special": name in self.special_tokens}
                 for name, i in (self.special_tokens | self.added_tokens).items()]
        # Added tokens stand in the vocabulary too: else Hugging Face numbers them anew, from its end.
        vocab = vocab | {token["content"]: token["id"] for token in added}
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges,
                 "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])), "merges": merges}
        _write_json(Path(directory) / "tokenizer.json", {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": sorted(added, key=lambda token: token["id"]), "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder, "model": model})
        ends = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id, "pad_token": self.pad_token_id}
        _write_json(Path(directory) / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            **{name: None if i is None else self.decode([i]) for name, i in ends.items()}})


class BPETokenizer(Tokenizer):
    """Byte-level BPE. Build one by `train` or `load_tokenizer`; what the constructor takes:

    vocab          token bytes -> id: the single bytes, and each token that merging can make
    merge_order    the merged tokens, first merge first; by default in the order of their ids
    pattern        regular expression whose matches are the pre-tokens; it must leave nothing out
    special_tokens, added_tokens, bos, eos, pad: as in Tokenizer
    unreachable    vocabulary entries (as spelled in the file) that no merge makes: decoded, never encoded
    nfc            compose accents first (Unicode NFC), as Qwen's files ask
    """

    def __init__(self, vocab: dict[bytes, int], special_tokens: dict[str, int], *, pattern: str = QWEN2_PATTERN,
                 merge_order: list[bytes] | None = None, bos: int | None = None, eos: int | None = None,
                 pad: int | None = None, added_tokens: dict[str, int] | None = None,
                 unreachable: dict[str, int] | None = None, nfc: bool = False):
        self.vocab, self.pattern, self.nfc, self.unreachable = vocab, pattern, nfc, unreachable or {}
        names = special_tokens | (added_tokens or {})
        if clash := [name for name in names if _from_printable(name) in vocab]:
            raise ValueError(f"special token {clash[0]!r} is spelled like an ordinary token")
        self._bytes = {i: token for token, i in vocab.items()}
        self._bytes |= {i: _from_printable(token) for token, i in self.unreachable.items()}
        self._bytes |= {i: name.encode() for name, i in names.items()}
        if len(self._bytes) < len(vocab) + len(self.unreachable) + len(names):
            raise ValueError("two tokens of the vocabulary have the same id")
        super().__init__(max(self._bytes) + 1, special_tokens, bos, eos, pad, added_tokens)

        # tiktoken gives out ranks. They are the ids if those rise from merge to merge; else ids are looked up by rank.
        self.merge_order = merge_order or sorted((token for token in vocab if len(token) > 1), key=vocab.__getitem__)
        ids = [vocab[token] for token in self.merge_order]
        self.ranks, self._id_of_rank = vocab, None
        if ids != sorted(ids):
            single = [token for token in vocab if len(token) == 1]
            self.ranks = {token: rank for rank, token in enumerate(single + self.merge_order)}
            self._id_of_rank = [vocab[token] for token in self.ranks]
        self._missing_bytes = {b for b in range(256) if bytes([b]) not in vocab}
        try:
            self._pattern = regex.compile(pattern)
            self._tiktoken = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens={})
        except (regex.error, ValueError) as error:
            raise ValueError(f"split pattern {pattern!r} is no regular expression: {error}") from None
        probe = "Word's 123  \t!\n\n _é́中文́ \u00a0½²\x00\U0001f600 "
        if "".join(self.split(probe)) != probe:
            raise ValueError(f"split pattern {pattern!r} leaves parts of the text out")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special_tokens: Iterable[str] = ("<|endoftext|>",), *,
              pattern: str = QWEN2_PATTERN) -> "BPETokenizer":
        """Learn a vocabulary from `texts`, which are read once, one at a time; only distinct pre-tokens are kept.

        Ids: 256 bytes, then merges in order, then the special tokens. `vocab_size` counts all of them; a text too small
        to give so many merges gives a smaller vocabulary (read `.vocab_size`). Special tokens in the text are cut out,
        nothing is merged across them. The first special token ends documents: it is EOS, and serves as BOS and padding.
        """
        special_tokens = list(dict.fromkeys(special_tokens))
        num_merges = vocab_size - 256 - len(special_tokens)
        if num_merges < 0:
            raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(special_tokens)} special "
                             f"tokens need at least {256 + len(special_tokens)}")
        split = cls({bytes([b]): b for b in range(256)}, {}, pattern=pattern).split
        pieces: Counter[str] = Counter()
        for part in _training_text(texts, special_tokens):
            pieces.update(split(part))
        merges = train_bpe({piece.encode(): count for piece, count in pieces.items()}, num_merges)
        tokens = [bytes([b]) for b in range(256)] + [left + right for left, right in merges]
        special = {name: len(tokens) + i for i, name in enumerate(special_tokens)}
        end = len(tokens) if special else None
        return cls({token: i for i, token in enumerate(tokens)}, special, pattern=pattern, bos=end, eos=end, pad=end)

    def split(self, text: str) -> list[str]:
        """The pre-tokens of `text`."""
        return [match.group() for match in self._pattern.finditer(text)]

    def encode_reference(self, text: str) -> list[int]:
        """The same ids as `encode(text)`, in plain Python: split, then merge, unless a piece is a token as it is."""
        ids: list[int] = []
        for part in _cut_out(text, self.added_tokens):
            if part in self.added_tokens:
                ids.append(self.added_tokens[part])
                continue
            for piece in map(_utf8, self.split(self._prepare(part))):
                tokens = [piece] if piece in self.ranks else merge_bytes(piece, self.ranks)
                ids += [self.vocab[token] for token in tokens]
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        text = self._prepare(text)
        if len(text) > 900_000 and regex.search(r"\s{900000}", text):  # a million blanks overflow tiktoken's stack
            ranks = [rank for piece in self.split(text) for rank in self._tiktoken._encode_single_piece(piece)]
        else:
            ranks = self._tiktoken.encode_ordinary(text)
        return ranks if self._id_of_rank is None else [self._id_of_rank[rank] for rank in ranks]

    def _prepare(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if self._missing_bytes and (missing := self._missing_bytes.intersection(text.encode())):
            raise ValueError(f"this tokenizer has no token for byte {min(missing):#04x} ({chr(min(missing))!r})")
        return text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._lookup(self._bytes, ids))

    def save(self, directory: str | os.PathLike) -> None:
        """Write `directory`/tokenizer.json and tokenizer_config.json, as Hugging Face's `tokenizers` reads them."""
        merges, whole = [], False
        for token in self.merge_order:  # the pair that makes a token: what its bytes had merged to just before
            parts = merge_bytes(token, self.ranks, below=self.ranks[token])
            if len(parts) == 2:
                merges.append(" ".join(map(_to_printable, parts)))
            else:
                whole = True  # no pair makes it: only a pre-token that is this token gives it
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        self._save_json(directory, {_to_printable(token): i for token, i in self.vocab.items()} | self.unreachable,
                        merges, decoder=byte_level, normalizer={"type": "NFC"} if self.nfc else None,
                        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]}, ignore_merges=whole)


class CharTokenizer(Tokenizer):
    """One token per character (code point): ids in the order of the code points, then the special tokens.

    There is no "unknown" token: a character that the training text never showed is a ValueError that names it.
    """

    def __init__(self, vocab: dict[str, int], special_tokens: dict[str, int], *, bos: int | None = None,
                 eos: int | None = None, pad: int | None = None):
        self.vocab = vocab
        self._text = {i: token for token, i in (vocab | special_tokens).items()}
        if len(self._text) < len(vocab) + len(special_tokens):
            raise ValueError("two tokens of the vocabulary have the same id")
        super().__init__(max(self._text, default=-1) + 1, special_tokens, bos, eos, pad)

    @classmethod
    def train(cls, texts: Iterable[str], special_tokens: Iterable[str] = ("<|endoftext|>",)) -> "CharTokenizer":
        """Collect the characters of `texts`, special tokens cut out; the first of these is EOS, BOS and padding."""
        special_tokens = list(dict.fromkeys(special_tokens))
        characters = set().union(*_training_text(texts, special_tokens))
        end = len(characters) if special_tokens else None
        return cls({character: i for i, character in enumerate(sorted(characters))},
                   {name: len(characters) + i for i, name in enumerate(special_tokens)}, bos=end, eos=end, pad=end)

    def _encode_plain(self, text: str) -> list[int]:
        try:
            return list(map(self.vocab.__getitem__, text))
        except KeyError as error:
            raise ValueError(f"character {error.args[0]!r} is not in this tokenizer's vocabulary: the text that it "
                             "was trained on never showed it") from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self._lookup(self._text, ids)).encode()

    def save(self, directory: str | os.PathLike) -> None:
        """Write tokenizer.json (to Hugging Face: BPE without merges, whose decoder just joins) and its config."""
        self._save_json(directory, self.vocab, [], decoder={"type": "Fuse"})


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `tokenizer.model` (Llama 2, Mistral, T5 ...): a thin coat over the sentencepiece package.

    Control pieces ("<s>", "</s>", "<unk>") are the special tokens. Text around an allowed one is encoded part by part,
    so the blank that most models put before the text comes before each part, as in Meta's and Mistral's own code.
    """

    def __init__(self, model_proto: bytes):
        self._model_proto = model_proto
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(model_proto)
        size, piece = self._model.vocab_size(), self._model.id_to_piece
        special = {piece(i): i for i in range(size) if self._model.is_control(i) or self._model.is_unknown(i)}
        ends = (self._model.bos_id(), self._model.eos_id(), self._model.pad_id())
        super().__init__(size, special, *(i if i >= 0 else None for i in ends))
        self._bytes = {i: piece(i).replace("\u2581", " ").encode() for i in range(size)}
        self._bytes |= {i: bytes([int(piece(i)[1:-1], 16)]) for i in range(size) if self._model.is_byte(i)}
        self._bytes |= {i: b"" for i in special.values()}

    def _encode_plain(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        self._lookup(self._bytes, ids)  # sentencepiece would raise an IndexError without the id
        return self._model.decode(ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        raw, text = b"".join(self._lookup(self._bytes, ids := list(ids))), self._model.decode(ids)
        implied = (len(raw) - len(raw.lstrip(b" "))) - (len(text) - len(text.lstrip(" ")))  # the blank put before text
        return raw[max(implied, 0):]

    def save(self, directory: str | os.PathLike) -> None:
        """Write `directory`/tokenizer.model."""
        _write(Path(directory) / "tokenizer.model", self._model_proto)


# ---------------------------------------------------------------------------------------------------------------------
# Loading

def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Read a tokenizer from a file, or from the folder that holds one:

        tokenizer.json (any *.json)   ours, or Hugging Face's byte-level BPE; BOS, EOS and padding come from
                                      tokenizer_config.json beside it; without one, <|endoftext|> is EOS if it exists
        tokenizer.model (*.model*)    sentencepiece
        vocab.bpe                     GPT-2's, with encoder.json beside it
        r50k_base.tiktoken ...        ranks of tiktoken's published encodings, known by their names

    Tokens that a tokenizer.json marks as special are `special_tokens`; those it marks as not special are always found
    in text, as Hugging Face does. ValueError: a broken file, or a feature that would change ids and is not known here.
    """
    path = Path(path)
    if path.is_dir():
        names = ["tokenizer.json", "tokenizer.model", "vocab.bpe", *(name + ".tiktoken" for name in TIKTOKEN_FILES)]
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: no tokenizer in this folder (looked for {', '.join(names)})")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer file")
    try:
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        if path.suffix == ".json":
            return _load_json(path)
        if path.suffix == ".tiktoken":
            return _load_tiktoken(path)
        if path.name == "vocab.bpe":
            return _load_gpt2(path)
        if ".model" in path.name:
            return SentencePieceTokenizer(path.read_bytes())
        raise ValueError("unknown kind of tokenizer file (known: *.json, *.model, vocab.bpe, *.tiktoken)")
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: not a readable tokenizer ({type(error).__name__}: {error})") from None
    except ValueError as error:
        named = str(error).startswith(str(path.parent / ""))  # by the reader of this file, or of the one beside it
        raise ValueError(str(error) if named else f"{path}: {error}") from None


def _load_json(path: Path) -> Tokenizer:
    """Hugging Face's tokenizer.json: byte-level BPE, or our characters. Everything else is refused by name."""
    data = _read_json(path)
    if "vocab" not in (data.get("model") or {}):
        raise ValueError("not a tokenizer.json: it has no model with a vocab")
    model, splitter, normalizer = data["model"], data.get("pre_tokenizer"), data.get("normalizer")
    unknown = [f"model {model['type']}"] if model.get("type", "BPE") != "BPE" else []
    unknown += [f"model.{key}" for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix",
                                           "byte_fallback") if model.get(key)]
    unknown += [f"normalizer {normalizer['type']}"] if normalizer and normalizer["type"] != "NFC" else []
    special: dict[str, int] = {}
    added: dict[str, int] = {}
    for token in data.get("added_tokens") or []:
        (special if token.get("special") else added)[token["content"]] = token["id"]
        unknown += [f"{key} of added token {token['content']!r}" for key in ("lstrip", "rstrip", "single_word")
                    if token.get(key)]
    joins = (data.get("decoder") or {}).get("type") == "Fuse"
    characters = splitter is None and not model.get("merges") and not added and joins
    pattern = _split_pattern(splitter or {})
    unknown += [f"pre_tokenizer {json.dumps(splitter)}"] if not (characters or pattern) else []
    if unknown:
        raise ValueError(f"{unknown[0]} is not supported (byte-level BPE is)")

    ends = _end_tokens(path.with_name("tokenizer_config.json"), special | added | model["vocab"])
    if characters:
        return CharTokenizer({token: i for token, i in model["vocab"].items() if token not in special}, special, **ends)
    tables = _merge_tables(model["vocab"], model["merges"], special | added, bool(model.get("ignore_merges")))
    return BPETokenizer(**tables, special_tokens=special, added_tokens=added, pattern=pattern, nfc=bool(normalizer),
                        **ends)


def _split_pattern(splitter: dict) -> str | None:
    """The pattern of ByteLevel (GPT-2's own), or of Sequence[Split(pattern), ByteLevel]; None for any other."""
    *before, last = splitter.get("pretokenizers") or [splitter]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if not before:
        return GPT2_PATTERN if last.get("use_regex", True) else None
    split = before[0]
    keeps_matches = (split.get("behavior"), split.get("invert", False)) in (("Isolated", False), ("Removed", True))
    if len(before) > 1 or split.get("type") != "Split" or not keeps_matches or last.get("use_regex", True):
        return None
    return split["pattern"].get("Regex")


def _end_tokens(config_path: Path, ids: dict[str, int]) -> dict[str, int | None]:
    """{"bos": id, "eos": id, "pad": id} from tokenizer_config.json, whose tokens are strings or {"content": ...}."""
    if not config_path.is_file():
        return {"eos": ids.get("<|endoftext|>")}
    config, ends = _read_json(config_path), {}
    for end in ("bos", "eos", "pad"):
        token = config.get(f"{end}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token is not None and token not in ids:
            raise ValueError(f"{config_path}: {end}_token {token!r} is not in the vocabulary")
        ends[end] = ids.get(token)
    return ends


def _merge_tables(vocab: dict[str, int], merges: list, names: dict[str, int], whole: bool) -> dict:
    """BPETokenizer's vocab, merge_order and unreachable, from a printable vocabulary and its merges.

    tiktoken merges any neighbours whose union is a token, Hugging Face only the listed pairs. With merges that
    training made (or that list every pair of a token) these are the same: a token's bytes have one way to be merged.
    `whole` (HF: ignore_merges): a pre-token that is a token is taken whole, even if no merge leads to it.
    """
    if not all(isinstance(i, int) and i >= 0 for i in (*vocab.values(), *names.values())):
        raise ValueError("an id in the vocabulary is not a whole number")
    order: dict[str, None] = {}  # a set that keeps its order: the token's first merge decides
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2 or not all(token in vocab for token in (*pair, "".join(pair))):
            raise ValueError(f"merge {number} ({merge!r}) is not two tokens of the vocabulary that make a third one")
        order["".join(pair)] = None
    rest = {token: i for token, i in vocab.items()
            if token not in order and token not in names and token not in _BYTE_OF_CHARACTER}
    if whole:
        for token in sorted(rest, key=rest.__getitem__):
            if any(token[:i] in vocab and token[i:] in vocab for i in range(1, len(token))):
                raise ValueError(f"ignore_merges with {token!r}, which two tokens could make but no merge does, "
                                 "is not supported")
            order[token] = None
        rest = {}
    reachable = [token for token in vocab if token in _BYTE_OF_CHARACTER] + list(order)
    return {"vocab": {_from_printable(token): vocab[token] for token in reachable},
            "merge_order": [_from_printable(token) for token in order], "unreachable": rest}


def _load_gpt2(path: Path) -> BPETokenizer:
    """GPT-2's own files: vocab.bpe lists the merges under a #version line, encoder.json the ids."""
    vocab = _read_json(path.with_name("encoder.json"))
    merges = [line for line in _read_text(path).split("\n") if line and not line.startswith("#version")]
    special = {"<|endoftext|>": vocab["<|endoftext|>"]}
    return BPETokenizer(**_merge_tables(vocab, merges, special, False), special_tokens=special,
                        pattern=GPT2_PATTERN, eos=vocab["<|endoftext|>"])


def _load_tiktoken(path: Path) -> BPETokenizer:
    """Lines of 'base64(token bytes) rank'; rank = id."""
    if path.stem not in TIKTOKEN_FILES:
        raise ValueError(f"the split pattern is known only for {', '.join(TIKTOKEN_FILES)}: name the file so")
    pattern, special = TIKTOKEN_FILES[path.stem]
    ranks = {}
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path}:{number}: expected 'base64 rank', got {line[:60]!r}") from None
    return BPETokenizer(ranks, dict(special), pattern=pattern, eos=special["<|endoftext|>"])


# ---------------------------------------------------------------------------------------------------------------------
# Small things

def _cut_out(text: str, names: Iterable[str]) -> list[str]:
    """Cut `text` around each occurrence of a name (the longest that fits, from the left); the names stay as parts."""
    alternatives = "|".join(map(regex.escape, sorted(names, key=len, reverse=True)))
    return [part for part in regex.split(f"({alternatives})", text) if part] if alternatives else [text]


def _training_text(texts: Iterable[str], special_tokens: list[str]) -> Iterator[str]:
    """The stretches of text between special tokens."""
    if isinstance(texts, str):
        raise ValueError("texts must be several texts (a list, a generator ...), not one string")
    for text in texts:
        _utf8(text)
        yield from (part for part in _cut_out(text, special_tokens) if part not in special_tokens)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds half a surrogate pair, {text[error.start]!r} at character {error.start}: "
                         "it cannot be written as UTF-8") from None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable spelling of bytes: visible Latin-1 characters stand for themselves, the rest for U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_alphabet()
_CHARACTER_OF_BYTE = {b: character for character, b in _BYTE_OF_CHARACTER.items()}


def _to_printable(token: bytes) -> str:
    return "".join(map(_CHARACTER_OF_BYTE.__getitem__, token))


def _from_printable(token: str) -> bytes:
    """A token spelled otherwise (only one that no merge can make) stands for its own UTF-8 bytes."""
    spelled = all(character in _BYTE_OF_CHARACTER for character in token)
    return bytes(map(_BYTE_OF_CHARACTER.__getitem__, token)) if spelled else token.encode()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        data = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _write_json(path: Path, data: dict) -> None:
    _write(path, (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    """Atomically: a reader, or a crash, sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
