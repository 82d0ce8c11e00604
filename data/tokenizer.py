"""Text to token ids and back: byte-level BPE (trained here, or loaded), characters, and sentencepiece's pieces.

Byte-pair encoding (Sennrich et al. 2016; over bytes: GPT-2, 2019) in three steps:

    split     a regular expression cuts the text into pre-tokens ("Hello", " world", "!"); no token ever crosses a cut
    bytes     a pre-token starts as its UTF-8 bytes, so every string can be encoded and nothing is ever "unknown"
    merge     again and again, the two neighbours whose union is the *lowest-ranked* token become that token

Training finds the ranks: count all neighbouring pairs, make the most frequent one a token, repeat. The whole tokenizer
is then one table {token bytes: rank}. `BPETokenizer.encode_reference` applies it in a few lines of Python; `encode`
hands it to tiktoken, which does the same in Rust (by another regex engine: where the Unicode tables of the two are of
different years, so are the cuts). Llama 2's kind merges characters, and spells as bytes those that no token has.

    tokenizer = BPETokenizer.train(texts, vocab_size=8192)
    tokenizer.save("out/tokenizer")                    # a Hugging Face tokenizer.json
    tokenizer = load_tokenizer("out/tokenizer")        # that, or a GPT-2, tiktoken or sentencepiece file

Special tokens ("<|endoftext|>") never come out of plain text, unless the caller names them in `allowed_special`.
"""

import base64
import functools
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
# SmolLM's: each digit apart first, then GPT-2's on the stretches between, whose ends are ends of a text for \s+(?!\S).
SMOLLM_PATTERN = r"""\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"""
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
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # what a tokenizer.json says of a token that it adds
PARTS = ("normalizer", "pre_tokenizer", "decoder")
BLANK = "\u2581"  # stands for a blank in sentencepiece's pieces

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


def merge_pairs(parts: Iterable[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """The same where pairs have the ranks, in O(n log n): Chinese has no blanks, so its pre-tokens are long."""
    parts = list(parts)
    left, right = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
    heap = [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = right[i]
        if j == len(parts) or ranks.get((parts[i], parts[j])) != rank:  # one of the two has been merged since
            continue
        parts[i], parts[j], right[i] = parts[i] + parts[j], "", right[j]
        if right[i] < len(parts):
            left[right[i]] = i
        for a, b in ((left[i], i), (i, right[i])):
            if a >= 0 and b < len(parts) and (parts[a], parts[b]) in ranks:
                heapq.heappush(heap, (ranks[parts[a], parts[b]], a))
    return [part for part in parts if part]


# ------------------------------------------------------------------------------------------ text, special tokens, bytes

def _cut_out(text: str, names: Iterable[str], flags: dict[str, set[str]]) -> Iterator[tuple[str, str | None]]:
    """Cut `text` around each name (the longest that fits, from the left): (stretch, None), (stretch, its name) ...
    By its flags a name takes the white space beside it along (lstrip, rstrip), or touches no other word."""
    def pattern(name: str) -> str:
        found, how = f"({regex.escape(name)})", flags.get(name, ())
        found = rf"(?<!\w){found}(?!\w)" if "single_word" in how else found
        return r"(?:(?<!\s)\s+)?" * ("lstrip" in how) + found + r"\s*" * ("rstrip" in how)

    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair: {text[error.start]!r} at character {error.start}") from None
    at, names = 0, sorted(names, key=len, reverse=True)
    for match in regex.finditer("|".join(map(pattern, names)), text) if names else ():
        yield text[at:match.start()], None
        yield match.group(), match[match.lastindex]
        at = match.end()
    yield text[at:], None


def _training_text(texts: Iterable[str], special_tokens: list[str]) -> Iterator[str]:
    """The stretches of text between special tokens."""
    if isinstance(texts, str):
        raise ValueError("texts must be several texts (a list, a generator ...), not one string")
    for text in texts:
        yield from (part for part, name in _cut_out(text, special_tokens, {}) if not name)


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
    """What all tokenizers share. A subclass adds `_encode_plain(text, first)`, which knows no special tokens (`first`:
    nothing stands before), and `save(directory)`, which writes what `load_tokenizer(directory)` reads, atomically."""

    def __init__(self, tokens: list[tuple[bytes, int]], special_tokens: dict[str, int], added_tokens=None, *,
                 bos: int | None = None, eos: int | None = None, pad: int | None = None):
        self.special_tokens = special_tokens      # text -> id; found in text only when `allowed_special` says so
        self.added_tokens = added_tokens or {}    # text -> id; whole words of the vocabulary, always found in text
        self.flags: dict[str, set[str]] = {}      # of both: FLAGS that hold; "normalized": looked for in such text
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, pad
        self.prefix_ids, self.suffix_ids = [], []  # BOS, EOS that Hugging Face puts around a text: encode does not
        self.chat_template: str | None = None     # Jinja text for Hugging Face's apply_chat_template
        self._post_processor, self._config = None, {}  # of the files, to be written back
        self._strip = False                       # whether a blank at the beginning is the one put before the text
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
        return self._encode(text, whole, self._encode_plain)

    def _encode(self, text: str, whole: dict[str, int], encode_plain) -> list[int]:
        """Cut out the tokens that are found in the text as it is, normalize the rest, cut out those found in that."""
        late = {self._normalize(name): name for name in whole if "normalized" in self.flags.get(name, ())}
        flags = {name: self.flags[original] for name, original in late.items()}
        ids: list[int] = []
        for part, name in _cut_out(text, whole.keys() - late.values(), self.flags):
            if name:
                ids.append(whole[name])
            elif part:
                for piece, found in _cut_out(self._normalize(part), late, flags):
                    ids += [whole[late[found]]] if found else encode_plain(piece, not ids) if piece else []
        return ids

    def _normalize(self, text: str) -> str:
        return text

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each text. (No threads: they measured no faster, lists of ids are made under Python's lock.)"""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 (half a character) become U+FFFD. ValueError: an unknown id."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of `ids`; one token may hold part of a character. ValueError: an unknown id."""
        try:
            raw = b"".join([self._bytes[i] for i in ids])
        except KeyError as error:
            raise ValueError(f"token id {error.args[0]} is not in the vocabulary (size {self.vocab_size})") from None
        return raw[1:] if self._strip and raw[:1] == b" " else raw

    def _save_json(self, directory: str | os.PathLike, model: dict, **steps) -> None:
        """Hugging Face's tokenizer.json, and tokenizer_config.json for transformers' AutoTokenizer."""
        names = self.special_tokens | self.added_tokens
        added = [{"id": i, "content": name, **{flag: flag in self.flags.get(name, ()) for flag in FLAGS},
                  "special": name in self.special_tokens}
                 for name, i in sorted(names.items(), key=lambda item: item[1])]
        # Added tokens stand in the vocabulary too: else Hugging Face numbers them anew, from its end.
        vocab = dict(sorted((model["vocab"] | names).items(), key=lambda item: item[1]))
        usual = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
        data = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                "pre_tokenizer": None, "post_processor": self._post_processor, **steps,
                "model": usual | model | {"vocab": vocab}}
        _write(Path(directory) / "tokenizer.json", data)
        self._save_config(directory, tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)

    def _save_config(self, directory: str | os.PathLike, **config) -> None:
        names = {i: name for name, i in (self.special_tokens | self.added_tokens).items()}
        for end, i in (("bos", self.bos_token_id), ("eos", self.eos_token_id), ("pad", self.pad_token_id)):
            config[f"{end}_token"] = None if i is None else names.get(i) or self.decode([i])
        config |= self._config | ({} if self.chat_template is None else {"chat_template": self.chat_template})
        _write(Path(directory) / "tokenizer_config.json", config)


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
        def encode_plain(part: str, first: bool) -> list[int]:
            pieces = [piece.encode() for piece in self.split(part)]
            merged = [[piece] if piece in self.ranks else merge_bytes(piece, self.ranks) for piece in pieces]
            return [self.vocab[token] for token in itertools.chain.from_iterable(merged)]

        return self._encode(text, self.added_tokens, encode_plain)

    def _encode_plain(self, text: str, first: bool) -> list[int]:
        if len(text) > 900_000 and regex.search(r"\s{900000}", text):  # a million blanks overflow tiktoken's stack
            ranks = [rank for piece in self.split(text) for rank in self._tiktoken._encode_single_piece(piece)]
        else:
            ranks = self._tiktoken.encode_ordinary(text)
        return ranks if self._id_of_rank is None else [self._id_of_rank[rank] for rank in ranks]

    def _normalize(self, text: str) -> str:
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
        model = {"vocab": {spelled[token]: i for token, i in self.vocab.items()} | self.unreachable, "merges": merges,
                 "ignore_merges": len(merges) < len(parts)}
        self._save_json(directory, model, normalizer={"type": "NFC"} if self.nfc else None, decoder=byte_level,
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

    def _encode_plain(self, text: str, first: bool) -> list[int]:
        try:
            return list(map(self.vocab.__getitem__, text))
        except KeyError as missing:
            raise ValueError(f"character {missing} is not in this tokenizer's vocabulary: unseen in training") from None

    def save(self, directory: str | os.PathLike) -> None:
        """Write tokenizer.json (to Hugging Face: BPE without merges, whose decoder just joins) and its config."""
        self._save_json(directory, {"vocab": self.vocab, "merges": []}, decoder={"type": "Fuse"})


class PieceTokenizer(Tokenizer):
    """Llama 2's kind as a tokenizer.json: BPE over characters with U+2581 for a blank, and bytes to fall back on.

    prefix    who puts a blank before a text: "normalizer" and "always" before each part between special tokens too,
              the latter unless there is one; "first" as that, but only where the text begins; or "never"
    split     whether no token crosses a blank (one of several has none before it)
    strip     whether decoding takes that blank away"""

    def __init__(self, data: dict, special_tokens: dict[str, int], added_tokens: dict[str, int], *, prefix: str,
                 split: bool, strip: bool, **ends: int | None):
        self._model, self._steps = data["model"], {key: data.get(key) for key in PARTS}
        names = special_tokens | added_tokens
        self.vocab = {piece: i for piece, i in self._model["vocab"].items() if piece not in names}
        self._byte_ids = [self.vocab.get(f"<0x{b:02X}>") for b in range(256)]
        if None in self._byte_ids:
            raise ValueError(f"byte_fallback without <0x{self._byte_ids.index(None):02X}> is not supported")
        spelled = {i: bytes([b]) for b, i in enumerate(self._byte_ids)}
        super().__init__([(spelled.get(i) or piece.replace(BLANK, " ").encode(), i) for piece, i in self.vocab.items()],
                         special_tokens, added_tokens, **ends)
        self.prefix, self._strip = prefix, strip
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(_pairs(self._model["merges"], self.vocab))}
        # Where no token goes from a letter to a blank, the words of a text are merged apart, and the same one once.
        apart = not any(regex.search(f"[^{BLANK}]{BLANK}", a + b) for a, b in self.ranks)
        self._words = regex.compile(f"{BLANK}{'?' if split else '*'}[^{BLANK}]*" if split or apart else "(?s).*")
        self._ids_of_word = functools.lru_cache(1 << 16)(self._merge)

    def _normalize(self, text: str) -> str:
        return BLANK * (self.prefix == "normalizer") + text.replace(" ", BLANK)

    def _encode_plain(self, text: str, first: bool) -> list[int]:
        if (self.prefix == "always" or self.prefix == "first" and first) and text[0] != BLANK:
            text = BLANK + text
        return [i for word in self._words.findall(text) for i in self._ids_of_word(word)]

    def _merge(self, word: str) -> list[int]:
        pieces = [word] if self._model.get("ignore_merges") and word in self.vocab else merge_pairs(word, self.ranks)
        return [i for piece in pieces for i in ([self.vocab[piece]] if piece in self.vocab else
                                                [self._byte_ids[b] for b in piece.encode()])]

    def save(self, directory: str | os.PathLike) -> None:
        """Write tokenizer.json, with the merges and steps that were read, and its config."""
        self._save_json(directory, self._model, **self._steps)


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
        tokens = [(bytes([int(piece[1:-1], 16)]) if model.is_byte(i) else piece.replace(BLANK, " ").encode(), i)
                  for i, piece in enumerate(pieces) if piece not in special]
        ends = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
        super().__init__(tokens, special, **{end: i for end, i in ends.items() if i >= 0})
        self._bytes |= dict.fromkeys(special.values(), b"")  # sentencepiece decodes them to nothing

    def add_special_tokens(self, names: Iterable[str]) -> int:
        if missing := [name for name in names if name not in self.special_tokens]:
            raise ValueError(f"a sentencepiece model takes no further special tokens: {' '.join(missing)}")
        return 0

    def _encode_plain(self, text: str, first: bool) -> list[int]:
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
        """Write `directory`/tokenizer.model, and tokenizer_config.json for what that has no place for."""
        _write(Path(directory) / "tokenizer.model", self._model_proto)
        self._save_config(directory)


# ---------------------------------------------------------------------------------------------------------------- files

def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Read a tokenizer from a file, or from the folder that holds one:

        tokenizer.json (any *.json)   ours, or Hugging Face's BPE, byte-level or with byte fallback
        tokenizer.model (*.model*)    sentencepiece
        vocab.bpe (*.bpe)             GPT-2's, with encoder.json beside it
        r50k_base.tiktoken ...        ranks of tiktoken's published encodings, known by their names

    Beside the first two, tokenizer_config.json tells BOS, EOS, padding and the chat template; without it <|endoftext|>
    is EOS if it exists. Tokens that a tokenizer.json adds are `special_tokens`, or, if it marks them as not special,
    always found in text, as Hugging Face does. ValueError: a broken file, or a part unknown here, by its name."""
    loaders = {".json": _load_json, ".bpe": _load_gpt2, ".tiktoken": _load_tiktoken}
    path = Path(path)
    if path.is_dir():  # tokenizer.json before tokenizer.model: tokens that were added later stand there only
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
        if path.suffix in loaders:
            return loaders[path.suffix](path)
        if ".model" in path.name:
            return _configure(SentencePieceTokenizer(path.read_bytes()), path, {})
        raise ValueError("unknown kind of tokenizer file (known: *.json, *.model, *.bpe, *.tiktoken)")
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, UnicodeError) as error:
        raise ValueError(f"{path}: not a readable tokenizer ({type(error).__name__}: {error})") from None
    except ValueError as error:  # (what is wrong), or (where, what is wrong)
        where, what = (path, *error.args)[-2:]
        raise ValueError(f"{where}: {what}") from None


def _load_json(path: Path) -> Tokenizer:
    """Hugging Face's tokenizer.json: BPE, byte-level or with byte fallback, or our characters; else refused by name."""
    data = _read_json(path)
    if "vocab" not in (data.get("model") or {}):
        raise ValueError("not a tokenizer.json: it has no model with a vocab")
    model, tokens = data["model"], data.get("added_tokens") or []
    unknown = [model["type"]] if model.get("type", "BPE") != "BPE" else []
    unknown += [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if unknown:
        raise ValueError(f"model {unknown[0]} is not supported (byte-level BPE is, and BPE with byte fallback)")
    special = {token["content"]: token["id"] for token in tokens if token.get("special")}
    added = {token["content"]: token["id"] for token in tokens if not token.get("special")}
    steps = {part: _steps(data.get(part)) for part in PARTS}
    if model.get("byte_fallback"):
        made = PieceTokenizer(data, special, added, **_blanks(steps))
    elif steps["decoder"] == [{"type": "Fuse"}] and not (steps["pre_tokenizer"] or model.get("merges") or added):
        made = CharTokenizer({token: i for token, i in model["vocab"].items() if token not in special}, special)
    else:
        if not (nfc := steps["normalizer"] == [{"type": "NFC"}]) and steps["normalizer"]:
            raise ValueError(f"normalizer {_named(steps['normalizer'])} is not supported (NFC is)")
        made = _from_merges(model["vocab"], model["merges"], special, added, whole=bool(model.get("ignore_merges")),
                            pattern=_split_pattern(steps["pre_tokenizer"]), nfc=nfc)
    made.flags = {token["content"]: {flag for flag in FLAGS if token.get(flag)} for token in tokens}
    return _configure(made, path, model["vocab"], data.get("post_processor"))


def _steps(part: dict | None) -> list[dict]:
    """The steps of a part of tokenizer.json, which may be a Sequence of them, or null."""
    lists = [part[key] for key in ("normalizers", "pretokenizers", "decoders", "processors") if key in (part or {})]
    return [inner for step in lists[0] for inner in _steps(step)] if lists else [part] if part else []


def _named(steps: list[dict]) -> str:
    return json.dumps(steps if len(steps) != 1 else steps[0], ensure_ascii=False)


def _split_pattern(steps: list[dict]) -> str:
    """The pattern of a byte-level pre-tokenizer: ByteLevel (GPT-2's own), or [Split(pattern), ByteLevel]."""
    match [{"use_regex": True, "invert": False, **step} for step in steps]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2_PATTERN
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return SMOLLM_PATTERN
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
              | {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return pattern
    raise ValueError(f"pre_tokenizer {_named(steps)} is not supported")


def _blanks(steps: dict[str, list[dict]]) -> dict:
    """What a tokenizer.json with byte fallback does about blanks: arguments of PieceTokenizer."""
    read = [{"type": "Replace", "pattern": {"String": BLANK}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    prepend = {"type": "Prepend", "prepend": BLANK}
    write = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    match steps["normalizer"], steps["pre_tokenizer"]:
        case [*before, last], [] if last == write and before in ([], [prepend]):
            found = {"prefix": "normalizer" if before else "never", "split": False}
        case [], [{"type": "Metaspace", "replacement": "\u2581", **how}]:
            scheme = how.get("prepend_scheme", "always" if how.get("add_prefix_space", True) else "never")
            found = {"prefix": scheme, "split": how.get("split", True)}
        case _:
            found = {}
    if not found or steps["decoder"] not in (read, read[:3]):
        raise ValueError(f"byte_fallback with {_named([steps])} is not supported")
    return found | {"strip": steps["decoder"] == read}


def _configure(made: Tokenizer, path: Path, vocab: dict[str, int], post_processor: dict | None = None) -> Tokenizer:
    """Set what the post-processor, and the files beside `path`, say of BOS, EOS, padding and the chat template."""
    for step in _steps(post_processor):
        if step["type"] == "TemplateProcessing":
            ids = [step["special_tokens"][part["SpecialToken"]["id"]]["ids"] if "SpecialToken" in part else None
                   for part in step["single"]]  # None stands for the text
            made.prefix_ids = sum(ids[:ids.index(None)], made.prefix_ids)
            made.suffix_ids = sum(ids[ids.index(None) + 1:], made.suffix_ids)
        elif step["type"] != "ByteLevel":
            raise ValueError(f"post_processor {step['type']} is not supported")
    made._post_processor = post_processor
    ids, config_path = vocab | made.special_tokens | made.added_tokens, path.with_name("tokenizer_config.json")
    default = {"eos_token": "<|endoftext|>"} if "<|endoftext|>" in ids else {}
    config = _read_json(config_path) if config_path.is_file() else default
    for end in ("bos", "eos", "pad"):
        if f"{end}_token" in config:
            token = config[f"{end}_token"]
            token = token["content"] if isinstance(token, dict) else token
            if token is not None and token not in ids:
                raise ValueError(config_path, f"{end}_token {token!r} is not in the vocabulary")
            setattr(made, f"{end}_token_id", ids.get(token))
    if isinstance(made, SentencePieceTokenizer):  # has no post-processor; transformers does not ask it of other files
        made._config = {key: bool(config[key]) for key in ("add_bos_token", "add_eos_token") if key in config}
        made.prefix_ids = [i for i in [made.bos_token_id] if made._config.get("add_bos_token") and i is not None]
        made.suffix_ids = [i for i in [made.eos_token_id] if made._config.get("add_eos_token") and i is not None]
    template = config.get("chat_template")  # a text, or several by name, or, in newer folders, a file
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}.get("default")
    beside = path.with_name("chat_template.jinja")
    template = beside.read_text(encoding="utf-8") if beside.is_file() else template
    made.chat_template = template if isinstance(template, str) else None
    return made


def _pairs(merges: list, vocab: dict[str, int]) -> list[list[str]]:
    """Merges, written "a b" or, later, ["a", "b"]."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for number, pair in enumerate(pairs):
        if len(pair) != 2 or not all(token in vocab for token in (*pair, "".join(pair))):
            raise ValueError(f"merge {number} ({merges[number]!r}): not two tokens of the vocabulary that make a third")
    return pairs


def _from_merges(vocab: dict[str, int], merges: list, special: dict, added: dict, whole=False, **more) -> BPETokenizer:
    """A tokenizer from a vocabulary in printable spelling and its merges.

    tiktoken merges any neighbours whose union is a token, Hugging Face only the listed pairs. With merges that training
    made (or that list every pair of a token) these are the same: a token's bytes have one way to be merged.
    `whole` (HF: ignore_merges): a pre-token that is a token is taken whole, even if no merge leads to it."""
    if not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
        raise ValueError("an id in the vocabulary is not a whole number")
    order = dict.fromkeys(map("".join, _pairs(merges, vocab)))  # a set in its order: a token's first merge decides
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


def _write(path: Path, content: bytes | dict) -> None:
    """Atomically: a reader, or a crash, sees the old file or the new one, never half of it."""
    text = "" if isinstance(content, bytes) else json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(text.encode() or content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
