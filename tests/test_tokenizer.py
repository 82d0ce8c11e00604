"""Tokenizers against slow truths: brute-force training, pure-Python merging, tiktoken's own, files of others."""

import json
import random
import shutil
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import regex
import sentencepiece
import tiktoken
from tiktoken_ext import openai_public

from data.pieces import json_of_pieces, pieces_of_model
from data.tokenizer import (CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, BPETokenizer, CharTokenizer, PieceTokenizer,
                            SentencePieceTokenizer, load_tokenizer, merge_bytes, merge_pairs, train_bpe)

STDLIB = Path(sysconfig.get_path("stdlib"))
SAMPLES = [
    "def f(x):\n    return [i**2 for i in range(10)]  # don't\n\n\n\tclass A: pass\n",
    "敏捷的棕色狐狸跳过了懒狗。我们在二〇二四年见面,价格是123.45元!",
    "吾輩は猫である。名前はまだ無い。カタカナとひらがな、漢字ー。",
    "It's WE'LL they'RE, naïve café — “quotes” … ½ ² ٣ हिन्दी עברית 한국어 🙂👨‍👩‍👧 e\u0301",
    "a\n  ", "  \n \n\n x", "\t \u3000\u00a0\r\n\r\n  y  ", "x" * 300 + " " * 300 + "1" * 50, "",
    "<|endoftext|> and <|im_start|>user", "\x00\x01\x1c\x85\x7f",
]


def fuzzed(count: int, seed: int = 0) -> list[str]:
    """Random strings. Unassigned code points are left out: tiktoken's, `regex`'s and Python's Unicode tables are of
    different years, and a code point that one does not know yet is a letter only to the others. Surrogates are no text.
    """
    rng = random.Random(seed)
    known = [c for c in map(chr, range(0x20, 0x20000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    pools = [[chr(c) for c in range(32, 127)], "aA1 '\n\r\t.!_sS", " \n\t\r\u00a0\u3000\u2028\x85\x1c", known,
             [c for c in known if "\u3040" <= c < "\ua000"], "0123456789+-*/=() \n",
             ["the ", " of", "def ", "return", "'ll", "'S", "<|endoftext|>", "\n    ", "\n\n  ", "import "]]
    return ["".join("".join(rng.choices(rng.choice(pools), k=rng.randint(1, 8))) for _ in range(rng.randint(1, 5)))
            for _ in range(count)]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    paths = sorted(STDLIB.glob("*.py"))[:60]
    return [path.read_text(encoding="utf-8") for path in paths] + SAMPLES


@pytest.fixture(scope="module")
def bpe(texts) -> BPETokenizer:
    return BPETokenizer.train(texts, 2000, ("<|endoftext|>", "<|im_start|>"))


# Training

def brute_force_merges(words: dict[bytes, int], num_merges: int) -> list[tuple[bytes, bytes]]:
    """Recount every pair before every merge."""
    sequences = {word: [bytes([b]) for b in word] for word in words}
    merges = []
    for _ in range(num_merges):
        counts = Counter()
        for word, parts in sequences.items():
            for pair in zip(parts, parts[1:]):
                counts[pair] += words[word]
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for parts in sequences.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i:i + 2] = [best[0] + best[1]]
                i += 1
    return merges


@pytest.mark.parametrize("seed", range(20))
def test_training_equals_recounting_every_pair(seed):
    rng = random.Random(seed)
    alphabet = b"ab" if seed % 2 else b"abc\x00\xfe\xff"  # two letters: many ties, many runs like aaa
    words = {bytes(rng.choices(alphabet, k=rng.randint(1, 12))): rng.randint(1, 5) for _ in range(60)}
    expected = brute_force_merges(words, 120)
    assert train_bpe(words, 120) == expected
    assert len({left + right for left, right in expected}) == len(expected)  # no token is made twice


def test_training_equals_a_published_reference(shared_data):
    # Stanford CS336's expected merges (GPT-2 pattern, vocabulary 500); `bytes` spelled in GPT-2's printable alphabet
    folder = shared_data / "bpe_parity"
    tokenizer = BPETokenizer.train([(folder / "corpus.en").read_text(encoding="utf-8")], 500, pattern=GPT2_PATTERN)
    lines = (folder / "train-bpe-reference-merges.txt").read_text(encoding="utf-8").splitlines()
    expected = [tuple(line.rstrip().split(" ")) for line in lines if line.strip()]
    spell = {v: k for k, v in gpt2_alphabet().items()}
    pairs = [merge_bytes(token, tokenizer.ranks, tokenizer.ranks[token]) for token in tokenizer.merge_order]
    merges = [tuple("".join(spell[b] for b in part) for part in pair) for pair in pairs]
    assert merges == expected and len(expected) == 243


def gpt2_alphabet() -> dict[str, int]:
    """tiktoken's own table: data_gym_to_mergeable_bpe_ranks builds it from printable Latin-1, then U+0100 upwards."""
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}


def test_ids_are_bytes_then_merges_then_special_tokens(bpe):
    assert bpe.vocab_size == 2000 and bpe.special_tokens == {"<|endoftext|>": 1998, "<|im_start|>": 1999}
    assert all(bpe.vocab[bytes([b])] == b for b in range(256))
    assert [bpe.vocab[token] for token in bpe.merge_order] == list(range(256, 1998))
    assert (bpe.bos_token_id, bpe.eos_token_id, bpe.pad_token_id) == (1998, 1998, 1998)


def test_a_pair_is_counted_within_pretokens_and_never_across_special_tokens():
    tokenizer = BPETokenizer.train(["ab<|endoftext|>ab<|endoftext|>ab"], 300)
    assert tokenizer.merge_order == [b"ab"]  # nothing else to learn: a small text gives a smaller vocabulary
    assert tokenizer.vocab_size == 256 + 1 + 1
    assert BPETokenizer.train(["aa 11"], 300, ()).merge_order == [b"aa"]  # QWEN2 keeps digits (and " 1") apart


def test_training_reads_its_texts_once_and_in_any_order(texts):
    forward = BPETokenizer.train(iter(texts), 600)
    assert BPETokenizer.train(reversed(texts), 600).vocab == forward.vocab


@pytest.mark.parametrize("arguments, message", [
    ((["abc"], 256), "at least 257"), (("abc", 300), "not one string"), ((["a\ud800"], 300), "surrogate"),
    ((["abc"], 300, ("a",)), "spelled like an ordinary token")])
def test_training_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        BPETokenizer.train(*arguments)


# Encoding

def test_encode_equals_the_plain_python_encoder_on_100_000_strings(bpe):
    strings = fuzzed(100_000)
    ids = bpe.encode_batch(strings)
    assert [i for i, text in enumerate(strings) if ids[i] != bpe.encode_reference(text)] == []
    assert [i for i, text in enumerate(strings) if bpe.decode(ids[i]) != text] == []


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, CL100K_PATTERN, O200K_PATTERN])
def test_encode_equals_the_plain_python_encoder_with_other_patterns(texts, pattern):
    tokenizer = BPETokenizer.train(texts[-30:], 700, pattern=pattern)
    for text in fuzzed(5_000, seed=1) + SAMPLES + texts[:5]:
        assert tokenizer.encode(text) == tokenizer.encode_reference(text)


def test_encode_equals_on_code_chinese_and_japanese(bpe, texts, shared_data):
    with open(shared_data / "chinese_poetry" / "all_poems.jsonl", encoding="utf-8") as file:
        poems = file.read(50_000)
    for text in SAMPLES + texts + [poems]:
        assert bpe.encode(text) == bpe.encode_reference(text)
        assert bpe.decode(bpe.encode(text)) == text


def test_a_million_blanks_do_not_overflow_the_regex_engine(bpe):
    for text in (" " * 1_100_000 + "x", "a" + "\t" * 1_100_000):
        assert bpe.decode(bpe.encode(text)) == text
    text = " " * 900_001 + "x"  # long enough for the detour, short enough for tiktoken's engine
    assert bpe.encode(text) == bpe._tiktoken.encode_ordinary(text)


def test_text_of_a_special_token_is_plain_text_unless_allowed(bpe):
    end = bpe.special_tokens["<|endoftext|>"]
    text = "a<|endoftext|>b"
    assert end not in bpe.encode(text) and bpe.decode(bpe.encode(text)) == text
    assert bpe.encode(text, ["<|endoftext|>"]) == [97, end, 98] == bpe.encode(text, "all")
    assert end not in bpe.encode(text, ["<|im_start|>"])
    with pytest.raises(ValueError, match="'<|nope|>' is no special token"):
        bpe.encode(text, ["<|nope|>"])


def test_half_a_surrogate_pair_is_refused(bpe):
    for tokenizer in (bpe, CharTokenizer.train(["ab"])):
        with pytest.raises(ValueError, match=r"'\\ud800' at character 2"):
            tokenizer.encode("ab\ud800")


def test_decoding_bytes_and_unknown_ids(bpe):
    assert bpe.decode([0xE4, 0xB8]) == "\ufffd" and bpe.decode_bytes([0xE4, 0xB8]) == b"\xe4\xb8"
    assert bpe.decode([104, 105, bpe.eos_token_id]) == "hi<|endoftext|>"
    for wrong in (-1, 2000):
        with pytest.raises(ValueError, match=f"token id {wrong} is not in the vocabulary"):
            bpe.decode([104, wrong])


def test_ids_out_of_merge_order_keep_their_ranks(bpe, tmp_path):
    """tiktoken takes the rank for the id; a tokenizer.json may number its tokens as it likes."""
    bpe.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    swap = {i: 1997 - i for i in range(1998)} | {1998: 1998, 1999: 1999}
    data["model"]["vocab"] = {token: swap[i] for token, i in data["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    other = load_tokenizer(tmp_path)
    for text in SAMPLES + fuzzed(300):
        assert other.encode(text) == [swap[i] for i in bpe.encode(text)] == other.encode_reference(text)
        assert other.decode(other.encode(text)) == text
    other.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").encode(SAMPLES[0]) == other.encode(SAMPLES[0])


# Saving and loading our own

@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_saved_and_loaded_is_the_same_tokenizer(kind, bpe, tmp_path):
    tokenizer = bpe if kind == "bpe" else CharTokenizer.train(SAMPLES + fuzzed(200), ("<|endoftext|>", "<|pad|>"))
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert type(loaded) is type(tokenizer)
        for text in SAMPLES + fuzzed(200):
            assert loaded.encode(text) == tokenizer.encode(text)
        for name in ("vocab_size", "special_tokens", "bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(loaded, name) == getattr(tokenizer, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["eos_token"] == "<|endoftext|>"
    assert config["clean_up_tokenization_spaces"] is False and "model_max_length" not in config


def test_hugging_face_reads_our_file_and_gives_the_same_ids(bpe, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="Hugging Face's tokenizers is not installed")
    strings = [text for text in SAMPLES + fuzzed(3_000) if "<|" not in text]  # it always finds special tokens in text
    for tokenizer in (bpe, CharTokenizer.train(strings)):
        tokenizer.save(tmp_path)
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert theirs.get_vocab_size() == tokenizer.vocab_size
        for text in strings:
            assert theirs.encode(text).ids == tokenizer.encode(text)
            assert theirs.decode(tokenizer.encode(text)) == text


# Characters

def test_characters_are_numbered_by_code_point_with_special_tokens_last():
    tokenizer = CharTokenizer.train(["ba<|endoftext|>", "中a"])
    assert tokenizer.encode("ab中") == [0, 1, 2] and tokenizer.special_tokens == {"<|endoftext|>": 3}
    assert tokenizer.vocab_size == 4 and tokenizer.decode([2, 3]) == "中<|endoftext|>"
    assert tokenizer.encode("a<|endoftext|>", "all") == [0, 3]
    with pytest.raises(ValueError, match="character '<' is not in this tokenizer's vocabulary"):
        tokenizer.encode("a<|endoftext|>")


# Files made by others

def test_gpt2_in_three_formats_gives_equal_ids(shared_data):
    folder = shared_data / "tokenizers"
    json_form, bpe_form, rank_form = (load_tokenizer(folder / name) for name in (
        "gpt2/tokenizer.json", "gpt2/vocab.bpe", "tiktoken/r50k_base.tiktoken"))
    assert json_form.encode("Hello world!") == [15496, 995, 0]  # as published
    for text in SAMPLES + fuzzed(2_000):
        assert json_form.encode(text) == bpe_form.encode(text) == rank_form.encode(text)
    for text in SAMPLES:
        assert json_form.encode(text) == json_form.encode_reference(text)
    for tokenizer in (json_form, bpe_form, rank_form):
        assert tokenizer.vocab_size == 50257 and tokenizer.eos_token_id == 50256
        assert tokenizer.encode("<|endoftext|>", "all") == [50256]


@pytest.mark.parametrize("name", ["r50k_base", "p50k_base", "cl100k_base", "o200k_base"])
def test_tiktoken_files_give_the_ids_of_tiktokens_own_definitions(name, shared_data, monkeypatch):
    ours = load_tokenizer(shared_data / "tokenizers" / "tiktoken" / f"{name}.tiktoken")
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: ours.ranks)  # no download
    theirs = tiktoken.Encoding(**getattr(openai_public, name)())
    assert ours.vocab_size == theirs.n_vocab and ours.special_tokens == theirs._special_tokens
    # tiktoken's newer cl100k takes "newline, blanks, end of text" as one piece: the original did not, nor do others
    end = "x" if name == "cl100k_base" else ""
    for text in SAMPLES + fuzzed(3_000):
        assert ours.encode(text + end) == theirs.encode_ordinary(text + end)


def test_cl100k_and_p50k(shared_data):
    folder = shared_data / "tokenizers" / "tiktoken"
    cl100k, p50k = (load_tokenizer(folder / f"{name}_base.tiktoken") for name in ("cl100k", "p50k"))
    assert cl100k.encode("hello world") == [15339, 1917]        # as published in tiktoken's tests
    assert cl100k.encode("<|endofprompt|>", "all") == [100276] and cl100k.vocab_size == 100277
    assert cl100k.decode(cl100k.encode("a\n  ")[1:2]) == "\n"    # the original pattern ends a line break at its break
    assert p50k.vocab_size == 50281 and p50k.decode([50256]) == "<|endoftext|>"  # the file leaves this id free
    for text in SAMPLES:
        assert cl100k.encode(text) == cl100k.encode_reference(text) and cl100k.decode(cl100k.encode(text)) == text
    with pytest.raises(ValueError, match="token id 100256 is not"):
        cl100k.decode([100256])


def test_loaded_files_saved_again_give_equal_ids(shared_data, tmp_path):
    for name in ("gpt2/tokenizer.json", "minimind/tokenizer.json", "torchtune/tiny_bpe_tokenizer.json"):
        tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
        tokenizer.save(tmp_path)
        again = load_tokenizer(tmp_path)
        for text in SAMPLES[:1] + ["Hello <think> there <|im_end|>"]:
            assert again.encode(text.replace("\t", " ")) == tokenizer.encode(text.replace("\t", " "))
        assert (again.special_tokens, again.added_tokens) == (tokenizer.special_tokens, tokenizer.added_tokens)
        assert again.eos_token_id == tokenizer.eos_token_id


def test_minimind_takes_its_ends_from_the_config_and_always_finds_added_words(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "minimind")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert "<think>" in tokenizer.added_tokens and "<|im_start|>" in tokenizer.special_tokens
    ids = tokenizer.encode("<|im_start|><think>")
    assert ids[-1] == 25 and 1 not in ids and ids == tokenizer.encode_reference("<|im_start|><think>")
    assert tokenizer.encode("<|im_start|><think>", "all") == [1, 25]


def test_olmo_pretokenizes_by_removed_and_inverted(shared_data):
    olmo = load_tokenizer(shared_data / "tokenizers" / "olmo" / "allenai_dolma2.json")
    assert olmo.pattern == CL100K_PATTERN and olmo.eos_token_id == 100257
    cl100k = load_tokenizer(shared_data / "tokenizers" / "tiktoken" / "cl100k_base.tiktoken")
    for text in SAMPLES + fuzzed(500):
        assert olmo.encode(text) == cl100k.encode(text)  # dolma2 is cl100k with other special tokens


def test_a_vocabulary_without_all_bytes_refuses_what_it_cannot_spell(shared_data):
    titan = load_tokenizer(shared_data / "tokenizers" / "torchtitan")
    assert titan.encode("hello") == [104, 101, 108, 108, 111] and titan.decode([2019]) == "[PAD]"
    with pytest.raises(ValueError, match=r"no token for byte 0x20 \(' '\)"):
        titan.encode("hello world")
    tiny = load_tokenizer(shared_data / "tokenizers" / "torchtune" / "tiny_bpe_tokenizer.json")
    assert tiny.decode(tiny.encode("Hello world!")) == "Hello world!" and tiny.nfc


def test_nfc_composes_accents_before_splitting(bpe, tmp_path):
    def normalize(data):
        data["normalizer"] = {"type": "NFC"}
    composed = edited(bpe, tmp_path, normalize)
    assert composed.encode("cafe\u0301") == bpe.encode("caf\u00e9") != bpe.encode("cafe\u0301")
    composed.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").nfc


@pytest.mark.parametrize("name", ["sentencepiece/test_model.model", "sentencepiece/test_ja_model.model",
                                  "torchtune/m.model", "mistral/tokenizer.model.v1",
                                  "mistral/mistral_instruct_tokenizer_240323.model.v3"])
def test_sentencepiece_equals_the_package(name, shared_data, tmp_path):
    path = shared_data / "tokenizers" / name
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = load_tokenizer(path)
    ours.save(tmp_path)
    assert isinstance(ours, SentencePieceTokenizer) and (tmp_path / "tokenizer.model").read_bytes() == path.read_bytes()
    loaded = load_tokenizer(tmp_path)
    for text in SAMPLES + fuzzed(200):
        ids = theirs.encode(text)
        assert ours.encode(text) == loaded.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
        if theirs.unk_id() not in ids:
            assert ours.decode_bytes(ids).decode() == theirs.decode(ids)
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_id) == (len(theirs), theirs.bos_id(), theirs.eos_id())
    assert ours.encode("<s>a</s>", "all") == [theirs.bos_id(), *theirs.encode("a"), theirs.eos_id()]
    assert theirs.bos_id() not in ours.encode("<s>a")
    assert ours.decode([]) == "" and ours.decode_bytes([]) == b""
    for wrong in (-1, len(theirs)):
        with pytest.raises(ValueError, match=f"token id {wrong} is not"):
            ours.decode([wrong])


def test_mistral_gives_the_ids_published_for_its_samples(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "mistral" / "tokenizer.model.v1")
    folder = shared_data / "tokenizers" / "mistral" / "samples" / "no_tools"
    text = (folder / "text_v1.txt").read_text(encoding="utf-8")  # a blank after <s> and </s> is implied
    text = text.replace("<s>\u2581", "<s>").replace("</s>\u2581", "</s>").replace("\u2581", " ")
    expected = json.loads((folder / "tokens_v1.json").read_text(encoding="utf-8"))["tokens"]
    assert tokenizer.encode(text, "all") == expected and len(expected) > 100



# Refusals

def edited(tokenizer, folder, change):
    """Save, change the JSON, load."""
    tokenizer.save(folder)
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return load_tokenizer(folder)


def put(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(data):
        for key in keys:
            data = data[key]
        data[last] = value
    return change


@pytest.mark.parametrize("change, message", [
    (put("model", "type", "Unigram"), "model Unigram is not supported"),
    (put("model", "type", "WordPiece"), "model WordPiece is not supported"),
    (put("model", "byte_fallback", True), "byte_fallback with .*ByteLevel.* is not supported"),
    (put("model", "dropout", 0.1), "model dropout is not supported"),
    (put("model", "continuing_subword_prefix", "##"), "model continuing_subword_prefix is not supported"),
    (put("model", "end_of_word_suffix", "</w>"), "model end_of_word_suffix is not supported"),
    (put("normalizer", {"type": "Lowercase"}), "normalizer .*Lowercase.* is not supported"),
    (put("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}), "NFC.*Strip"),
    (put("post_processor", {"type": "RobertaProcessing"}), "post_processor RobertaProcessing is not supported"),
    (put("pre_tokenizer", {"type": "Metaspace"}), "pre_tokenizer .*Metaspace.* is not supported"),
    (put("pre_tokenizer", None), r"pre_tokenizer \[\] is not supported"),
    (put("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}), "add_prefix_space.* is not supported"),
    (put("pre_tokenizer", "pretokenizers", 0, {"type": "Digits"}), "Digits.* is not supported"),
    (put("pre_tokenizer", "pretokenizers", 0, "behavior", "MergedWithNext"), "MergedWithNext.* is not supported"),
    (put("pre_tokenizer", "pretokenizers", 0, "pattern", {"Regex": "[a-z]+"}), "leaves parts of the text out"),
    (put("pre_tokenizer", "pretokenizers", 0, "pattern", {"Regex": "("}), "is no regular expression"),
    (put("added_tokens", 0, "id", 5), "two tokens of the vocabulary have the same id"),
    (put("added_tokens", 0, {}), "not a readable tokenizer"),
    (put("model", "merges", 0, "a"), r"merge 0 \('a'\)"),
    (put("model", "merges", 1, ["zq", "x"]), r"merge 1 .*two tokens of the vocabulary"),
    (put("model", "vocab", "a", "1"), "not a whole number"),
    (put("model", {}), "no model with a vocab"),
    (put("model", "vocab", []), "not a readable tokenizer"),
])
def test_what_would_change_ids_is_refused_by_name(change, message, bpe, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        edited(bpe, tmp_path, change)
    assert str(error.value).count(str(tmp_path / "tokenizer.json")) == 1 and "\n" not in str(error.value)


def test_merges_as_pairs_and_ignore_merges(bpe, tmp_path):
    def as_pairs(data):
        data["model"]["merges"] = [merge.split(" ") for merge in data["model"]["merges"]]
    assert edited(bpe, tmp_path, as_pairs).merge_order == bpe.merge_order

    def without_merge_of_zqzq(data):  # a token that no merge makes, found as a whole pre-token only
        data["model"]["vocab"]["zqzq"] = 2000
        data["model"]["ignore_merges"] = whole
    for whole, expected in ((True, [2000]), (False, bpe.encode("zqzq"))):
        tokenizer = edited(bpe, tmp_path, without_merge_of_zqzq)
        assert tokenizer.encode("zqzq") == tokenizer.encode_reference("zqzq") == expected
        assert tokenizer.encode("zqzqz") == bpe.encode("zqzqz") and tokenizer.decode([2000]) == "zqzq"


def test_end_tokens_come_as_string_or_object_and_must_exist(bpe, tmp_path):
    bpe.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"eos_token": {"content": "<|im_start|>"}, "bos_token": "<|endoftext|>", "pad_token": null}')
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1998, 1999, None)
    config.write_text('{"eos_token": "<|nope|>"}')
    with pytest.raises(ValueError, match=r"tokenizer_config.json: eos_token '<\|nope\|>' is not in the vocabulary"):
        load_tokenizer(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json: not JSON"):
        load_tokenizer(tmp_path)
    config.unlink()
    assert load_tokenizer(tmp_path).eos_token_id == 1998  # <|endoftext|>, for want of a config


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.bpe", "r50k_base.tiktoken", "x.tiktoken",
                                  "notes.txt"])
@pytest.mark.parametrize("content", [None, b"", b"\x00\xff\xfe\x80garbage", b"plain words\n", b"[1, 2]", b'{"a": '])
def test_missing_empty_and_corrupt_files_give_one_line(name, content, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
        (tmp_path / "encoder.json").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_tokenizer(path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_missing_neighbours_and_empty_folders(shared_data, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer in this folder"):
        load_tokenizer(tmp_path)
    shutil.copy(shared_data / "tokenizers" / "gpt2" / "vocab.bpe", tmp_path)
    with pytest.raises(FileNotFoundError, match="encoder.json: no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "cl100k_base.tiktoken").write_text("IQ== 0\nIg== one\n")
    with pytest.raises(ValueError, match="cl100k_base.tiktoken:2: expected 'base64 rank'"):
        load_tokenizer(tmp_path / "cl100k_base.tiktoken")


def test_an_interrupted_save_leaves_the_old_files(bpe, tmp_path, monkeypatch):
    bpe.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        CharTokenizer.train(["abc"]).save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


# Chat: special tokens added later, and the template's text

def test_special_tokens_added_later_get_the_next_ids_and_survive_the_file(texts, tmp_path):
    for tokenizer in (BPETokenizer.train(texts[:3], 400), CharTokenizer.train(texts)):
        size, text = tokenizer.vocab_size, "<|im_start|>user <think> you"
        plain = tokenizer.encode(text)
        assert tokenizer.add_special_tokens(["<|im_start|>", "<|endoftext|>", "<think>", "<|im_start|>"]) == 2
        assert tokenizer.special_tokens == {"<|endoftext|>": size - 1, "<|im_start|>": size, "<think>": size + 1}
        assert tokenizer.vocab_size == size + 2
        assert tokenizer.encode(text) == plain  # typed by a user it stays text
        assert tokenizer.encode("<|im_start|>u", allowed_special="all") == [size, *tokenizer.encode("u")]
        assert tokenizer.add_special_tokens(["<think>"]) == 0
        tokenizer.save(tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert loaded.special_tokens == tokenizer.special_tokens and loaded.vocab_size == size + 2
        assert loaded.encode(text) == plain and loaded.decode([size, size + 1]) == "<|im_start|><think>"


def test_word_that_was_always_found_in_text_becomes_special_under_its_id():
    tokenizer = BPETokenizer({bytes([b]): b for b in range(256)}, {}, {"<tool>": 256})
    assert tokenizer.encode("<tool>") == [256]
    assert tokenizer.add_special_tokens(["<tool>", "<end>"]) == 1
    assert tokenizer.special_tokens == {"<tool>": 256, "<end>": 257} and not tokenizer.added_tokens
    assert tokenizer.encode("<tool>") == list(b"<tool>")


def test_special_token_that_cannot_be_added_is_one_clear_line(shared_data):
    with pytest.raises(ValueError, match="'a' is spelled like an ordinary token"):
        BPETokenizer.train([], 300).add_special_tokens(["<x>", "a"])
    sentencepiece_model = load_tokenizer(shared_data / "tokenizers/mistral/tokenizer.model.v1")
    with pytest.raises(ValueError, match=r"takes no further special tokens: <\|im_end\|>"):
        sentencepiece_model.add_special_tokens(["</s>", "<|im_end|>"])
    assert sentencepiece_model.add_special_tokens(["</s>"]) == 0


# BPE with byte fallback, BOS, flags of added tokens: as Hugging Face has them

WORDS = ["▁", *"thenéa", "▁t", "he", "▁the", "▁then", "aa", "▁▁"]
BYTES = [f"<0x{b:02X}>" for b in range(256)]
MERGES = [["▁", "t"], ["h", "e"], ["▁t", "he"], ["▁the", "n"], ["a", "a"], ["▁", "▁"]]
WRITE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
READ = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
LEGACY = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, WRITE]}


def bos_before(name: str, i: int) -> dict:
    return {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": name, "type_id": 0}},
                                                     {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}}}


def token(i: int, content: str, special=True, **flags) -> dict:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, "special": special, **usual, **flags}


def piece_json(normalizer=LEGACY, pre_tokenizer=None, added=(), strip=True, post_processor=None, **model) -> dict:
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *BYTES, *WORDS])}
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [token(0, "<unk>"), token(1, "<s>"), token(2, "</s>"), *added],
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": post_processor,
            "decoder": {"type": "Sequence", "decoders": READ + [STRIP] * strip},
            "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                      "vocab": vocab, "merges": MERGES} | model}


def metaspace(**how) -> dict:
    return {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", **how}}


def load_data(data: dict, folder: Path, **config):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder)


def test_byte_fallback_by_hand(tmp_path):
    """'then zé': ▁t h e n -> ▁t he n -> ▁the n -> ▁then (rank 0, 1, 2, 3); ▁ and z stay, z as a byte; é is a piece."""
    tokenizer = load_data(piece_json(), tmp_path)
    piece = lambda text: 259 + WORDS.index(text)  # noqa: E731
    assert tokenizer.encode("then zé") == [piece("▁then"), piece("▁"), 3 + ord("z"), piece("é")]
    assert tokenizer.encode("") == [] and tokenizer.encode("中") == [piece("▁"), *(3 + b for b in "中".encode())]
    assert tokenizer.decode([piece("▁then"), piece("▁"), 3 + ord("z")]) == "then z"
    assert tokenizer.decode_bytes([3 + 0xE4, 3 + 0xB8]) == b"\xe4\xb8" and tokenizer.decode([3 + 0xE4]) == "\ufffd"
    a = [piece("▁"), piece("a")]
    assert tokenizer.encode("a<s>a") != tokenizer.encode("a<s>a", "all") == [*a, 1, *a]


@pytest.mark.parametrize("steps, two_blanks, after_special", [
    (dict(normalizer=LEGACY), ["▁▁", "▁t"], ["▁t"]),  # ▁▁▁t: the two leftmost blanks join, rank 5, after ▁t, rank 0
    (dict(normalizer=WRITE), ["▁", "▁t"], ["t"]),
    (metaspace(prepend_scheme="first", split=False), ["▁", "▁t"], ["t"]),
    (metaspace(prepend_scheme="always", split=False), ["▁", "▁t"], ["▁t"]),
    (metaspace(add_prefix_space=True), ["▁", "▁t"], ["▁t"])])
def test_where_a_blank_is_put_before_the_text(steps, two_blanks, after_special, tmp_path):
    tokenizer = load_data(piece_json(**steps), tmp_path)
    assert [WORDS[i - 259] for i in tokenizer.encode("  t")] == two_blanks
    assert [WORDS[i - 259] for i in tokenizer.encode("<s>t", "all")[1:]] == after_special


def test_pairs_have_ranks_and_long_words_take_no_square_of_time():
    """Merging by a heap equals looking for the best pair before every step, runs and overlaps included."""
    def slow(parts, ranks):
        while pairs := [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]:
            i = min(pairs)[1]
            parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2:]]
        return list(parts)

    rng = random.Random(0)
    for _ in range(300):
        pieces = list("ab▁")
        pieces += {a + b for a, b in (rng.choices(pieces, k=2) for _ in range(4))}
        pieces += {a + b for a, b in (rng.choices(pieces, k=2) for _ in range(6))}
        pairs = [(a, b) for a in pieces for b in pieces if a + b in pieces]
        ranks = {pair: rank for rank, pair in enumerate(rng.sample(pairs, len(pairs)))}
        for _ in range(20):
            text = "".join(rng.choices("aab▁", k=rng.randint(0, 20)))
            assert merge_pairs(text, ranks) == slow(list(text), ranks)
    assert merge_pairs("ab" * 100_000, {("a", "b"): 0}) == ["ab"] * 100_000


def test_tokenizer_json_is_preferred_to_tokenizer_model_because_added_tokens_stand_there_only(shared_data, tmp_path):
    shutil.copy(shared_data / "tokenizers/mistral/tokenizer.model.v1", tmp_path / "tokenizer.model")
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    tokenizer = load_data(piece_json(added=[token(len(WORDS) + 259, "<|im_end|>")]), tmp_path)
    assert isinstance(tokenizer, PieceTokenizer) and tokenizer.special_tokens["<|im_end|>"] == len(WORDS) + 259


def test_every_byte_must_have_a_piece_to_fall_back_on(tmp_path):
    data = piece_json()
    data["model"]["vocab"]["<0x41> "] = data["model"]["vocab"].pop("<0x41>")
    with pytest.raises(ValueError, match="tokenizer.json: byte_fallback without <0x41> is not supported"):
        load_data(data, tmp_path)
    for steps in (dict(normalizer=None), dict(normalizer={"type": "NFKC"}), dict(pre_tokenizer={"type": "Metaspace"})):
        with pytest.raises(ValueError, match="byte_fallback with .* is not supported"):
            load_data(piece_json(**steps), tmp_path)


def test_bos_of_the_post_processor_is_told_and_never_added(bpe, tmp_path):
    bos = bos_before("<|im_start|>", 1999)
    sequence = {"type": "Sequence", "processors": [{"type": "ByteLevel", "add_prefix_space": True}, bos]}
    for post_processor in (bos, sequence):  # Llama 2's, Llama 3's
        tokenizer = edited(bpe, tmp_path, put("post_processor", post_processor))
        assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ([1999], [])
        assert tokenizer.encode("hi") == bpe.encode("hi")
        tokenizer.save(tmp_path / "again")
        assert json.loads((tmp_path / "again/tokenizer.json").read_text())["post_processor"] == post_processor
        assert load_tokenizer(tmp_path / "again").prefix_ids == [1999]
    assert bpe.prefix_ids == bpe.suffix_ids == []


def test_add_bos_token_counts_where_there_is_no_post_processor_and_is_kept(shared_data, tmp_path):
    """As in transformers: beside a tokenizer.json its post-processor decides, a tokenizer.model has none."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    data = piece_json(post_processor=bos_before("<s>", 1))
    tokenizer = load_data(data, tmp_path / "j", add_bos_token=False, **config)
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ([1], [])
    shutil.copy(shared_data / "tokenizers/mistral/tokenizer.model.v1", tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).prefix_ids == []
    for adds, around in (({}, ([], [])), ({"add_bos_token": True, "add_eos_token": True}, ([1], [2])),
                         ({"add_bos_token": False}, ([], [])), ({"add_eos_token": True}, ([], [2]))):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | adds))
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.save(tmp_path / "again")
        for one in (tokenizer, load_tokenizer(tmp_path / "again")):
            assert (one.prefix_ids, one.suffix_ids) == around
            assert one.chat_template == "{{ messages }}" and (one.bos_token_id, one.eos_token_id) == (1, 2)
    with pytest.raises(ValueError, match="eos_token '<.im_end.>' is not in the vocabulary"):
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
        load_tokenizer(tmp_path)


def test_flags_of_added_tokens(bpe, tmp_path):
    def add(data):
        data["added_tokens"] += [token(2000, "<l>", False, lstrip=True), token(2001, "<r>", rstrip=True),
                                 token(2002, "zqzq", False, single_word=True),
                                 token(2003, "<n\u00e9>", False, normalized=True)]
        data["normalizer"] = {"type": "NFC"}
    tokenizer = edited(bpe, tmp_path, add)
    hi = bpe.encode("hi")
    assert tokenizer.encode("hi \n <l> hi") == [*hi, 2000, *bpe.encode(" hi")]
    assert tokenizer.encode("hi <r> \n hi", "all") == [*bpe.encode("hi "), 2001, *hi]
    assert tokenizer.encode("hi<r> hi") == bpe.encode("hi<r> hi")  # special: only where it is allowed
    assert tokenizer.encode("hi (zqzq)") == [*bpe.encode("hi ("), 2002, *bpe.encode(")")]
    assert 2002 not in tokenizer.encode("zqzqs szqzq zqzq_")
    assert tokenizer.encode("<ne\u0301>hi") == [2003, *hi]  # found in the text as it is normalized
    tokenizer.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.flags == tokenizer.flags and again.flags["<r>"] == {"rstrip"}


def test_smollms_digits_stand_apart_before_gpt2s_pattern_is_applied(bpe, tmp_path):
    steps = [{"type": "Digits", "individual_digits": True},
             {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
    tokenizer = edited(bpe, tmp_path, put("pre_tokenizer", {"type": "Sequence", "pretokenizers": steps}))
    assert tokenizer.split("a  12  b 3's\n 4") == ["a", "  ", "1", "2", " ", " b", " ", "3", "'s", "\n ", "4"]
    gpt2 = BPETokenizer({bytes([b]): b for b in range(256)}, {}, pattern=GPT2_PATTERN)
    for text in SAMPLES + fuzzed(2_000):
        stretches = [part for part in regex.split(r"(\p{N})", text) if part]
        assert tokenizer.split(text) == [piece for part in stretches for piece in gpt2.split(part)]


def test_template_in_a_list_or_a_file_of_its_own(bpe, tmp_path):
    tokenizer = edited(bpe, tmp_path, lambda data: None)
    assert tokenizer.chat_template is None
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert load_tokenizer(tmp_path).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert load_tokenizer(tmp_path).chat_template == "J"


# Against the packages themselves, on text of many scripts

def multilingual(count: int, names: Iterable[str] = ()) -> list[str]:
    """Seeded strings: scripts, emoji with joiners, combining marks, control characters, white space, special text."""
    rng = random.Random(2)

    def script(begin: int, end: int) -> list[str]:
        return [c for c in map(chr, range(begin, end)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]

    pools = [script(0x20, 0x7f), script(0xa0, 0x250), script(0x370, 0x530), script(0x590, 0x700), script(0x900, 0xe00),
             script(0x3040, 0x3100), script(0x4e00, 0x9000), script(0xac00, 0xd000), script(0x1f300, 0x1f650),
             ["👩‍👩‍👧", "👍🏽", "🇫🇷", "❤️", "1️⃣", "\u200d", "क्ष"], ["e\u0301", "n\u0303", "\u0338", "a\u0323\u0307"],
             "\x00\x01\x07\x1b\x7f\x85\xad\ufeff", [" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u3000"],
             ["the ", " of", "'ll", "'S", "\n    ", "▁", "<0x41>", "aaaa", "12345", "²½"], [*names] or [" "]]
    return ["".join("".join(rng.choices(rng.choice(pools), k=rng.randint(1, 8))) for _ in range(rng.randint(1, 5)))
            for _ in range(count)]


PUBLISHED = ["gpt2/tokenizer.json", "minimind/tokenizer.json", "olmo/allenai_dolma2.json"]


@pytest.mark.parametrize("kind", [*PUBLISHED, "v1", "v1 first", "v1 always", "v3", "v3 never"])
def test_ids_and_text_equal_the_tokenizers_package(kind, shared_data, tmp_path):
    """The published files, and Mistral's models in the forms in which Hugging Face writes Llama 2's kind."""
    tokenizers = pytest.importorskip("tokenizers", reason="compares with Hugging Face's tokenizers package")
    path = shared_data / "tokenizers" / kind
    if kind not in PUBLISHED:
        version, *scheme = kind.split()
        name = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}[version]
        data = json_of_pieces(pieces_of_model((shared_data / "tokenizers/mistral" / name).read_bytes()))
        data |= metaspace(prepend_scheme=scheme[0], split=False) if scheme else {}
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(data), encoding="utf-8")
    ours, theirs = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    ours.save(tmp_path / "again")
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "again/tokenizer.json"))
    names = [*ours.special_tokens, *ours.added_tokens][:8]
    for text in multilingual(500, names):
        ids = ours.encode(text)
        for one in (theirs, again):
            one.encode_special_tokens = True  # the text of special tokens stays text
            assert one.encode(text, add_special_tokens=False).ids == ids, text
            assert one.decode(ids, skip_special_tokens=False) == ours.decode(ids), text
            one.encode_special_tokens = False
            assert one.encode(text).ids == ours.prefix_ids + ours.encode(text, "all") + ours.suffix_ids, text


@pytest.mark.parametrize("version, name", [("v1", "tokenizer.model.v1"),
                                           ("v3", "mistral_instruct_tokenizer_240323.model.v3")])
def test_pieces_of_a_tokenizer_json_equal_the_sentencepiece_package(version, name, shared_data, tmp_path):
    path = shared_data / "tokenizers/mistral" / name
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = load_data(json_of_pieces(pieces_of_model(path.read_bytes())), tmp_path)
    for text in multilingual(500):
        if "\x00" not in text:  # where that package ends a text
            assert ours.encode(text) == theirs.encode(text), text
            assert ours.decode(ours.encode(text)) == text.replace("▁", " ")


def test_transformers_opens_what_is_saved_with_equal_ids(bpe, tmp_path):
    transformers = pytest.importorskip("transformers", reason="opens a saved folder in transformers")
    loaded = load_data(piece_json(post_processor=bos_before("<s>", 1)), tmp_path, bos_token="<s>", eos_token="</s>")
    loaded.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    for number, tokenizer in enumerate((loaded, bpe)):
        tokenizer.save(tmp_path / str(number))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / str(number))
        for text in multilingual(100, list(tokenizer.special_tokens)):
            assert theirs(text)["input_ids"] == tokenizer.prefix_ids + tokenizer.encode(text, "all"), text
        assert len(theirs) == tokenizer.vocab_size


def test_chat_template_is_kept_in_tokenizer_config(bpe, tmp_path):
    bpe.save(tmp_path)
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert load_tokenizer(tmp_path).chat_template is None
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = "{{ messages[0]['content'] }}\n"
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == tokenizer.chat_template
    assert load_tokenizer(tmp_path).chat_template == tokenizer.chat_template


def test_published_chat_template_is_read(shared_data):
    config = json.loads((shared_data / "tokenizers/minimind/tokenizer_config.json").read_text())
    assert load_tokenizer(shared_data / "tokenizers/minimind").chat_template == config["chat_template"]
