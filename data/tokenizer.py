"""Text to token ids and back: byte-level BPE (trained here, or loaded), characters, and sentencepiece.

Byte-pair encoding (Sennrich et al. 2016; over bytes: GPT-2, 2019) in three steps:

    split     a regular expression cuts the text into pre-tokens ("Hello", " world", "!"); no token ever crosses a cut
    bytes     a pre-token starts as its UTF-8 bytes, so every string can be encoded and nothing is ever "unknown"
    merge     again and again, the two neighbours whose union is the *lowest-ranked* token become that token

Training finds the ranks: count all neighbouring pairs, make the most frequent one a token, repeat. The whole tokenizer
is then one table {token bytes: rank}. `BPETokenizer.encode_reference` applies it in a few lines of Python; `encode`
hands it to tiktoken, which does the same in Rust (by another regex engine: where the Unicode tables of the two are of
different years, so are the cuts).

    tokenizer = BPETokenizer.train(texts, vocab_size=8192)
    tokenizer.save("out/tokenizer")                    # a Hugging Face tokenizer.json
    tokenizer = load_tokenizer("out/tokenizer")        # that, or a GPT-2, tiktoken or sentencepiece file

Special tokens ("<|endoftext|>") never come out of plain text, unless the caller names them in `allowed_special`.
"""

import base64
import heapq
import itertools
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
TIKTOKEN_FILES = {
    "r50k_base": (GPT2_PATTERN, {"<|endoftext|>": 50256}),
    "p50k_base": (GPT2_PATTERN, {"<|endoftext|>": 50256}),
    "cl100k_base": (CL100K_PATTERN, {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259,
                                     "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}),
    "o200k_base": (O200K_PATTERN, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}


# ------------------------------------------------------------------------------------------------- training and merging

def train_bpe(words: dict[bytes, int], num_merges: int) -> list[tuple[bytes, bytes]]:
    """Learn merges from pre-tokens and how often each occurs (Sennrich et al. 2016, algorithm 1).

    Each step merges the most frequent pair; among equals, the one whose (left, right) byte strings are greatest, so the
    result never depends on order. Fewer than `num_merges` come back when no pair is left to merge. A step touches only
    the words that hold its pair, found by the inverted index `where`. The best pair is on top of a heap that is
    corrected lazily: old pairs only ever become rarer (a merge makes new pairs, all with the new token in them), so an
    entry's count is an upper bound, checked when it comes to the top."""
    # In here a token is one character, chr(id): a word is a string, a pair is two characters, str.replace merges them.
    tokens = {chr(b): bytes([b]) for b in range(256)}
    order = {chr(b): chr(255 - b) + "\u0100" for b in range(256)}  # sort keys, greatest bytes first: their complements,
    sequences = [word.decode("latin-1") for word in words]         # and an end above all, for b"ab" is before b"a"
    frequency = list(words.values())
    counts: dict[str, int] = defaultdict(int)
    where: dict[str, set[int]] = defaultdict(set)
    for index, sequence in enumerate(sequences):
        for pair in map(str.__add__, sequence, sequence[1:]):
            counts[pair] += frequency[index]
            where[pair].add(index)

    def entry(pair):
        return -counts[pair], order[pair[0]], order[pair[1]], pair

    heap = [entry(pair) for pair in counts]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < num_merges and heap and heap[0][0] < 0:
        count, _, _, best = heapq.heappop(heap)
        if -count != counts[best]:                                 # became rarer since it was pushed
            heapq.heappush(heap, entry(best))
            continue
        left, right = best
        merges.append((tokens[left], tokens[right]))
        new = chr(len(tokens))
        tokens[new] = tokens[left] + tokens[right]
        order[new] = order[left][:-1] + order[right]
        created = set()
        for index in where.pop(best):
            before = sequences[index]
            after = sequences[index] = before.replace(best, new)   # left to right: (a, a) in a a a gives new a
            for pair in map(str.__add__, before, before[1:]):
                counts[pair] -= frequency[index]
            for pair in map(str.__add__, after, after[1:]):
                counts[pair] += frequency[index]
                if new in pair:
                    where[pair].add(index)
                    created.add(pair)
        for pair in created:
            heapq.heappush(heap, entry(pair))
    return merges


def merge_bytes(piece: bytes, ranks: dict[bytes, int], below: float = float("inf")) -> list[bytes]:
    """Encode one pre-token: merge the lowest-ranked neighbours, leftmost first, while their rank is under `below`."""
    parts = [bytes([b]) for b in piece]
    while len(parts) > 1:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1))
        if rank >= below:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


# ------------------------------------------------------------------------------------------ text, special tokens, bytes

def _cut_out(text: str, names: Iterable[str]) -> list[str]:
    """Cut `text` around each occurrence of a name (the longest that fits, from the left); the names stay as parts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair: {text[error.start]!r} at character {error.start}") from None
    alternatives = "|".join(map(regex.escape, sorted(names, key=len, reverse=True)))
    return [part for part in regex.split(f"({alternatives})", text) if part] if alternatives else [text]


def _training_text(texts: Iterable[str], special_tokens: list[str]) -> Iterator[str]:
    """The stretches of text between special tokens."""
    if isinstance(texts, str):
        raise ValueError("texts must be several texts (a list, a generator ...), not one string")
    for text in texts:
        yield from (part for part in _cut_out(text, special_tokens) if part not in special_tokens)


# Files spell a token's bytes in GPT-2's printable alphabet: visible Latin-1 characters, and U+0100 on for the others.
_HIDDEN = [b for b in range(256) if chr(b) == " " or not chr(b).isprintable()]
_CHARACTER_OF_BYTE = {b: chr(256 + _HIDDEN.index(b)) if b in _HIDDEN else chr(b) for b in range(256)}
_BYTE_OF_CHARACTER = {character: b for b, character in _CHARACTER_OF_BYTE.items()}


def _from_printable(token: str) -> bytes:
    """A token spelled otherwise (only one that no merge can make) stands for its own UTF-8 bytes."""
    spelled = all(character in _BYTE_OF_CHARACTER for character in token)
    return bytes(map(_BYTE_OF_CHARACTER.__getitem__, token)) if spelled else token.encode()


# ----------------------------------------------------------------------------------------------------------- tokenizers

class Tokenizer:
    """What all tokenizers share. A subclass adds `_encode_plain(text)`, which knows no special tokens, and
    `save(directory)`, which writes the files that `load_tokenizer(directory)` reads, each atomically."""

    def __init__(self, tokens: list[tuple[bytes, int]], special_tokens: dict[str, int], added_tokens=None, *,
                 bos: int | None = None, eos: int | None = None, pad: int | None = None):
        self.special_tokens = special_tokens      # text -> id; found in text only when `allowed_special` says so
        self.added_tokens = added_tokens or {}    # text -> id; whole words of the vocabulary, always found in text
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, pad
        self.chat_template: str | None = None     # Jinja text for Hugging Face's apply_chat_template; unused here
        tokens = tokens + [(name.encode(), i) for name, i in (special_tokens | self.added_tokens).items()]
        if not all(isinstance(i, int) and i >= 0 for _, i in tokens):
            raise ValueError("an id in the vocabulary is not a whole number")
        self._bytes = {i: token for token, i in tokens}
        if len(self._bytes) < len(tokens):
            raise ValueError("two tokens of the vocabulary have the same id")
        self.vocab_size = max(self._bytes, default=-1) + 1

    def add_special_tokens(self, names: Iterable[str]) -> int:
        """Append those of `names` that are no special tokens yet, with ids from `vocab_size` on; how many ids are new.
        (A word that is always found in text becomes special under its old id.) A model's embedding must grow along.
        ValueError: a name that is spelled like an ordinary token."""
        missing = [name for name in dict.fromkeys(names) if name not in self.special_tokens]
        ordinary = {token for i, token in self._bytes.items() if i not in self.added_tokens.values()}
        if clash := [name for name in missing if not name or _from_printable(name) in ordinary]:
            raise ValueError(f"special token {clash[0]!r} is spelled like an ordinary token")
        before = self.vocab_size
        for name in missing:
            self.special_tokens[name] = i = self.added_tokens.pop(name, self.vocab_size)
            self._bytes[i] = name.encode()
            self.vocab_size = max(self.vocab_size, i + 1)
        return self.vocab_size - before

    def encode(self, text: str, allowed_special: str | Iterable[str] = ()) -> list[int]:
        """Token ids of `text`; no BOS or EOS is added. A special token's text is plain text, unless `allowed_special`
        (names, or "all") lists it. ValueError: an unknown name, half a surrogate pair, a character without a token."""
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

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of `ids`; one token may hold part of a character. ValueError: an unknown id."""
        try:
            return b"".join([self._bytes[i] for i in ids])
        except KeyError as error:
            raise ValueError(f"token id {error.args[0]} is not in the vocabulary (size {self.vocab_size})") from None

    def _save_json(self, directory: str | os.PathLike, vocab: dict[str, int], merges: list[str], decoder: dict, *,
                   ignore_merges=False, nfc=False, pre_tokenizer=None) -> None:
        """Hugging Face's tokenizer.json, and tokenizer_config.json for transformers' AutoTokenizer."""
        names = self.special_tokens | self.added_tokens
        added = [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                  "normalized": False, "special": name in self.special_tokens}
                 for name, i in sorted(names.items(), key=lambda item: item[1])]
        # Added tokens stand in the vocabulary too: else Hugging Face numbers them anew, from its end.
        vocab = dict(sorted((vocab | names).items(), key=lambda item: item[1]))
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges,
                 "vocab": vocab, "merges": merges}
        ends = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id, "pad_token": self.pad_token_id}
        tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
                     "normalizer": {"type": "NFC"} if nfc else None, "pre_tokenizer": pre_tokenizer,
                     "post_processor": None, "decoder": decoder, "model": model}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                  **{end: None if i is None else self.decode([i]) for end, i in ends.items()},
                  **({} if self.chat_template is None else {"chat_template": self.chat_template})}
        for name, data in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
            _write(Path(directory) / name, (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode())


class BPETokenizer(Tokenizer):
    """Byte-level BPE. Build one by `train` or `load_tokenizer`; the constructor takes, besides what Tokenizer takes,

    vocab          token bytes -> id: the single bytes, and each token that merging can make, in the order of merging
    pattern        regular expression whose matches are the pre-tokens; it must leave nothing out
    unreachable    vocabulary entries (as spelled in the file) that no merge makes: decoded, never encoded
    nfc            compose accents first (Unicode NFC), as Qwen's files ask"""

    def __init__(self, vocab: dict[bytes, int], special_tokens: dict[str, int],
                 added_tokens: dict[str, int] | None = None, *, pattern: str = QWEN2_PATTERN,
                 unreachable: dict[str, int] | None = None, nfc: bool = False, **ends: int | None):
        self.vocab, self.pattern, self.nfc, self.unreachable = vocab, pattern, nfc, unreachable or {}
        if clash := [name for name in special_tokens | (added_tokens or {}) if _from_printable(name) in vocab]:
            raise ValueError(f"special token {clash[0]!r} is spelled like an ordinary token")
        never_made = [(_from_printable(token), i) for token, i in self.unreachable.items()]
        super().__init__([*vocab.items(), *never_made], special_tokens, added_tokens, **ends)

        # tiktoken gives out ranks. They are the ids if those rise from merge to merge; else ids are looked up by rank.
        self.merge_order = [token for token in vocab if len(token) > 1]
        ids = [vocab[token] for token in self.merge_order]
        self.ranks, self._id_of_rank = vocab, None
        if ids != sorted(ids):
            self.ranks, self._id_of_rank = {token: rank for rank, token in enumerate(vocab)}, list(vocab.values())
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

        Ids: 256 bytes, then merges in order, then special tokens. `vocab_size` counts all; a small text gives fewer.
        Special tokens are cut out of the text, nothing is merged across them. The first is EOS, BOS and padding."""
        names = list(dict.fromkeys(special_tokens))
        if vocab_size < 256 + len(names):
            raise ValueError(f"vocab_size {vocab_size}: bytes and special tokens alone are at least {256 + len(names)}")
        vocab = {bytes([b]): b for b in range(256)}
        split = cls(vocab, {}, pattern=pattern).split
        pieces = Counter(itertools.chain.from_iterable(map(split, _training_text(texts, names))))
        merges = train_bpe({piece.encode(): count for piece, count in pieces.items()}, vocab_size - 256 - len(names))
        vocab = vocab | {left + right: 256 + i for i, (left, right) in enumerate(merges)}
        special = {name: len(vocab) + i for i, name in enumerate(names)}
        end = special[names[0]] if names else None
        return cls(vocab, special, pattern=pattern, bos=end, eos=end, pad=end)

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
            for piece in map(str.encode, self.split(self._prepare(part))):
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

    def save(self, directory: str | os.PathLike) -> None:
        """Write `directory`/tokenizer.json and tokenizer_config.json, as Hugging Face's `tokenizers` reads them."""
        spelled = {token: token.decode("latin-1").translate(_CHARACTER_OF_BYTE) for token in self.vocab}
        # The pair that makes a token is what its bytes had merged to just before. A token that no pair makes is found
        # only where it is a pre-token as it stands, which Hugging Face calls ignore_merges.
        parts = [merge_bytes(token, self.ranks, below=self.ranks[token]) for token in self.merge_order]
        merges = [" ".join(map(spelled.get, pair)) for pair in parts if len(pair) == 2 and spelled.keys() >= set(pair)]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        self._save_json(directory, {spelled[token]: i for token, i in self.vocab.items()} | self.unreachable, merges,
                        byte_level, ignore_merges=len(merges) < len(parts), nfc=self.nfc,
                        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]})


class CharTokenizer(Tokenizer):
    """One token per character (code point), in the order of the code points; then the special tokens. No token stands
    for "unknown": a character that the training text never showed is a ValueError that names it."""

    def __init__(self, vocab: dict[str, int], special_tokens: dict[str, int], **ends: int | None):
        super().__init__([(character.encode(), i) for character, i in vocab.items()], special_tokens, **ends)
        self.vocab = vocab

    @classmethod
    def train(cls, texts: Iterable[str], special_tokens: Iterable[str] = ("<|endoftext|>",)) -> "CharTokenizer":
        """Collect the characters of `texts`, special tokens cut out; the first of these is EOS, BOS and padding."""
        names = list(dict.fromkeys(special_tokens))
        characters = sorted(set(itertools.chain.from_iterable(_training_text(texts, names))))
        special = {name: len(characters) + i for i, name in enumerate(names)}
        end = special[names[0]] if names else None
        return cls({character: i for i, character in enumerate(characters)}, special, bos=end, eos=end, pad=end)

    def _encode_plain(self, text: str) -> list[int]:
        try:
            return list(map(self.vocab.__getitem__, text))
        except KeyError as missing:
            raise ValueError(f"character {missing} is not in this tokenizer's vocabulary: unseen in training") from None

    def save(self, directory: str | os.PathLike) -> None:
        """Write tokenizer.json (to Hugging Face: BPE without merges, whose decoder just joins) and its config."""
        self._save_json(directory, self.vocab, [], {"type": "Fuse"})


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `tokenizer.model` (Llama 2, Mistral, T5 ...): a thin coat over the sentencepiece package. Control
    pieces ("<s>", "</s>", "<unk>") are the special tokens. Text around an allowed one is encoded part by part, so the
    blank that most models put before the text comes before each part, as in Meta's and Mistral's own code."""

    def __init__(self, model_proto: bytes):
        self._model_proto = model_proto
        self._model = model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(model_proto)
        pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
        special = {piece: i for i, piece in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)}
        # A byte is spelled "<0x0A>"; in other pieces U+2581 stands for a blank.
        tokens = [(bytes([int(piece[1:-1], 16)]) if model.is_byte(i) else piece.replace("\u2581", " ").encode(), i)
                  for i, piece in enumerate(pieces) if piece not in special]
        ends = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
        super().__init__(tokens, special, **{end: i for end, i in ends.items() if i >= 0})
        self._bytes |= dict.fromkeys(special.values(), b"")  # sentencepiece decodes them to nothing

    def add_special_tokens(self, names: Iterable[str]) -> int:
        if missing := [name for name in names if name not in self.special_tokens]:
            raise ValueError(f"a sentencepiece model takes no further special tokens: {' '.join(missing)}")
        return 0

    def _encode_plain(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        super().decode_bytes(ids)  # an unknown id is a ValueError that names it, not sentencepiece's IndexError
        return self._model.decode(ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = list(ids)
        raw, text = super().decode_bytes(ids), self._model.decode(ids)
        implied = (len(raw) - len(raw.lstrip(b" "))) - (len(text) - len(text.lstrip(" ")))  # the blank put before text
        return raw[max(implied, 0):]

    def save(self, directory: str | os.PathLike) -> None:
        """Write `directory`/tokenizer.model, which has no place for a chat template."""
        _write(Path(directory) / "tokenizer.model", self._model_proto)


# ---------------------------------------------------------------------------------------------------------------- files

def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Read a tokenizer from a file, or from the folder that holds one:

        tokenizer.json (any *.json)   ours, or Hugging Face's byte-level BPE; BOS, EOS and padding come from
                                      tokenizer_config.json beside it; without one, <|endoftext|> is EOS if it exists
        tokenizer.model (*.model*)    sentencepiece
        vocab.bpe (*.bpe)             GPT-2's, with encoder.json beside it
        r50k_base.tiktoken ...        ranks of tiktoken's published encodings, known by their names

    Tokens that a tokenizer.json marks as special are `special_tokens`; those it marks as not special are always found
    in text, as Hugging Face does. ValueError: a broken file, or a feature that would change ids and is unknown here."""
    loaders = {".json": _load_json, ".bpe": _load_gpt2, ".tiktoken": _load_tiktoken}
    path = Path(path)
    if path.is_dir():
        names = ["tokenizer.model", "tokenizer.json", "vocab.bpe", *(name + ".tiktoken" for name in TIKTOKEN_FILES)]
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: no tokenizer in this folder (looked for {', '.join(names)})")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer file")
    try:
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        if path.suffix in loaders:
            return loaders[path.suffix](path)
        if ".model" in path.name:
            return SentencePieceTokenizer(path.read_bytes())
        raise ValueError("unknown kind of tokenizer file (known: *.json, *.model, *.bpe, *.tiktoken)")
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, UnicodeError) as error:
        raise ValueError(f"{path}: not a readable tokenizer ({type(error).__name__}: {error})") from None
    except ValueError as error:  # (what is wrong), or (where, what is wrong)
        where, what = (path, *error.args)[-2:]
        raise ValueError(f"{where}: {what}") from None


def _load_json(path: Path) -> Tokenizer:
    """Hugging Face's tokenizer.json: byte-level BPE, or our characters. Everything else is refused by name."""
    data = _read_json(path)
    if "vocab" not in (data.get("model") or {}):
        raise ValueError("not a tokenizer.json: it has no model with a vocab")
    model, splitter, normalizer = data["model"], data.get("pre_tokenizer"), data.get("normalizer")
    tokens = data.get("added_tokens") or []
    special = {token["content"]: token["id"] for token in tokens if token.get("special")}
    added = {token["content"]: token["id"] for token in tokens if not token.get("special")}
    joins = (data.get("decoder") or {}).get("type") == "Fuse"
    characters = joins and splitter is None and not model.get("merges") and not added
    pattern = _split_pattern(splitter or {})

    unknown = [f"model {model['type']}"] if model.get("type", "BPE") != "BPE" else []
    unknown += [f"model.{key}" for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix",
                                           "byte_fallback") if model.get(key)]
    unknown += [f"normalizer {normalizer['type']}"] if normalizer and normalizer["type"] != "NFC" else []
    unknown += [f"{key} of added token {token['content']!r}" for token in tokens
                for key in ("lstrip", "rstrip", "single_word") if token.get(key)]
    unknown += [f"pre_tokenizer {json.dumps(splitter)}"] if not (characters or pattern) else []
    if unknown:
        raise ValueError(f"{unknown[0]} is not supported (byte-level BPE is)")

    ids, ends = model["vocab"] | special | added, {}
    config_path = path.with_name("tokenizer_config.json")
    default = {"eos_token": "<|endoftext|>"} if "<|endoftext|>" in ids else {}
    config = _read_json(config_path) if config_path.is_file() else default
    for end in ("bos", "eos", "pad"):
        token = config.get(f"{end}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token is not None and token not in ids:
            raise ValueError(config_path, f"{end}_token {token!r} is not in the vocabulary")
        ends[end] = ids.get(token)
    if characters:
        made = CharTokenizer({token: i for token, i in model["vocab"].items() if token not in special}, special, **ends)
    else:
        made = _from_merges(model["vocab"], model["merges"], special, added, whole=bool(model.get("ignore_merges")),
                            pattern=pattern, nfc=bool(normalizer), **ends)
    template = config.get("chat_template")
    made.chat_template = template if isinstance(template, str) else None  # older files may hold a list of several
    return made


def _split_pattern(splitter: dict) -> str | None:
    """The pattern of ByteLevel (GPT-2's own), or of Sequence[Split(pattern), ByteLevel]; None for any other."""
    match [{"use_regex": True, "invert": False, **step} for step in splitter.get("pretokenizers") or [splitter]]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2_PATTERN
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
              | {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return pattern
    return None


def _from_merges(vocab: dict[str, int], merges: list, special: dict, added: dict, whole=False, **more) -> BPETokenizer:
    """A tokenizer from a vocabulary in printable spelling and its merges ("a b", or ["a", "b"]).

    tiktoken merges any neighbours whose union is a token, Hugging Face only the listed pairs. With merges that training
    made (or that list every pair of a token) these are the same: a token's bytes have one way to be merged.
    `whole` (HF: ignore_merges): a pre-token that is a token is taken whole, even if no merge leads to it."""
    if not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
        raise ValueError("an id in the vocabulary is not a whole number")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for number, pair in enumerate(pairs):
        if len(pair) != 2 or not all(token in vocab for token in (*pair, "".join(pair))):
            raise ValueError(f"merge {number} ({merges[number]!r}): not two tokens of the vocabulary that make a third")
    order = dict.fromkeys(map("".join, pairs))  # a set that keeps its order: the token's first merge decides
    single = [token for token in vocab if token in _BYTE_OF_CHARACTER]
    rest = vocab.keys() - {*single, *order, *special, *added}
    for token in sorted(rest, key=vocab.__getitem__) if whole else ():
        if any(token[:i] in vocab and token[i:] in vocab for i in range(1, len(token))):
            raise ValueError(f"ignore_merges with {token!r}, which two tokens make but no merge, is not supported")
        order[token] = None
    return BPETokenizer({_from_printable(token): vocab[token] for token in [*single, *order]}, special, added,
                        unreachable={token: vocab[token] for token in rest if token not in order}, **more)


def _load_gpt2(path: Path) -> BPETokenizer:
    """GPT-2's own files: vocab.bpe lists the merges under a #version line, encoder.json the ids."""
    vocab = _read_json(path.with_name("encoder.json"))
    merges = [line for line in path.read_text(encoding="utf-8").split("\n") if line and not line.startswith("#version")]
    end = vocab["<|endoftext|>"]
    return _from_merges(vocab, merges, {"<|endoftext|>": end}, {}, pattern=GPT2_PATTERN, eos=end)


def _load_tiktoken(path: Path) -> BPETokenizer:
    """Lines of 'base64(token bytes) rank'; rank = id."""
    if path.stem not in TIKTOKEN_FILES:
        raise ValueError(f"the split pattern is known only for {', '.join(TIKTOKEN_FILES)}: name the file so")
    (pattern, special), ranks = TIKTOKEN_FILES[path.stem], {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path}:{number}", f"expected 'base64 rank', got {line[:60]!r}") from None
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    return BPETokenizer(ranks, dict(special), pattern=pattern, eos=special["<|endoftext|>"])


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8
        raise ValueError(path, f"not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(path, f"expected a JSON object, got {type(data).__name__}")
    return data


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
