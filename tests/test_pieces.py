"""Sentencepiece models as lists of pieces: the same ids as the sentencepiece package, from every file."""

import json
import random

import pytest
import sentencepiece

from data.pieces import (BYTE, BYTES, CONTROL, NORMAL, UNKNOWN, Pieces, encode, json_of_pieces, llama2c_of_pieces,
                         model_of_pieces, pieces_of_json, pieces_of_llama2c, pieces_of_model)
from data.tokenizer import load_tokenizer

WORDS = ["▁", "t", "h", "e", "▁t", "he", "▁the", "n", "▁then", "é", "aa", "a"]
SMALL = Pieces(["<unk>", "<s>", "</s>", *BYTES, *WORDS], [0.0] * 259 + [-float(i) for i in range(len(WORDS))],
               [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(WORDS), {"unk": 0, "bos": 1, "eos": 2})


def processor(pieces: Pieces) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model_of_pieces(pieces))


def fuzz(n=400, seed=0) -> list[str]:
    rng = random.Random(seed)
    parts = ["the", "then", "he", "aaa", " ", "  ", "\n", "é", "中文", "😀", "<s>", "<0x41>", "▁", "\x00", "Once upon", "n", ""]
    return ["".join(rng.choices(parts, k=rng.randint(0, 9))) for _ in range(n)]


def test_a_word_cut_by_hand():
    """'then': th is no piece, he is (score -5), ▁t too (-4): ▁t first, leaving h e n; he; then ▁t + he = ▁the; ▁then."""
    token = SMALL.tokens.index
    assert encode(SMALL, "then") == [token("▁then")]
    assert encode(SMALL, "thé") == [token("▁t"), token("h"), token("é")]
    assert encode(SMALL, "aaa") == [token("▁"), token("aa"), token("a")]  # of equal scores the leftmost
    assert encode(SMALL, "z") == [token("▁"), token("<0x7A>")] and encode(SMALL, "") == []


@pytest.mark.parametrize("add_prefix", [True, False])
def test_ids_are_those_of_the_sentencepiece_package(add_prefix):
    pieces = SMALL._replace(add_prefix=add_prefix)
    model = processor(pieces)
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    for text in fuzz():
        if "\x00" not in text:  # where the package ends a text
            assert encode(pieces, text) == model.encode(text), text


def test_the_real_tokenizer_of_llama2c(shared_data):
    data = (shared_data / "checkpoints/stories260K/tok512.bin").read_bytes()
    reference = json.loads((shared_data / "checkpoints/stories260K/reference_float64.json").read_text())
    pieces = pieces_of_llama2c(data)
    assert llama2c_of_pieces(pieces) == data and len(pieces.tokens) == 512
    text = reference["greedy_text"].strip()
    assert [1, *encode(pieces, text)] == reference["greedy_ids"]
    model = processor(pieces)
    for text in fuzz() + text.split("."):
        assert encode(pieces, text) == model.encode(text)


def test_every_file_gives_the_pieces_back():
    assert pieces_of_model(model_of_pieces(SMALL)) == SMALL
    assert pieces_of_llama2c(llama2c_of_pieces(SMALL)) == SMALL._replace(ids={"unk": 0, "bos": 1, "eos": 1})
    longer = pieces_of_llama2c(llama2c_of_pieces(SMALL, 300))
    assert len(longer.tokens) == 300 and all(encode(longer, text) == encode(SMALL, text) for text in fuzz(50))
    back = pieces_of_json(json_of_pieces(SMALL))
    assert back._replace(scores=[]) == SMALL._replace(scores=[], ids={"unk": 0, "bos": 1})  # scores become ranks
    assert all(encode(back, text) == encode(SMALL, text) for text in fuzz())


def test_json_read_as_a_tokenizer_gives_the_same_ids_and_the_pieces_back(tmp_path):
    """The file that data/tokenizer.py writes for it, too, and one whose BOS stands in a Sequence, as in Llama 3's."""
    data = json_of_pieces(SMALL)
    sequence = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, data["post_processor"]]}
    for post_processor in (data["post_processor"], sequence):
        text = json.dumps(data | {"post_processor": post_processor})
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.save(tmp_path)
        pieces = pieces_of_json(json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8")))
        assert pieces._replace(scores=[]) == SMALL._replace(scores=[], ids={"unk": 0, "bos": 1})
        for text in fuzz():
            assert tokenizer.encode(text) == encode(SMALL, text) == encode(pieces, text), text


def test_json_equals_the_tokenizers_package():
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(json_of_pieces(SMALL)))
    for text in fuzz():
        if "<s>" not in text:  # which that package always takes for the special token
            assert theirs.encode(text, add_special_tokens=False).ids == encode(SMALL, text), text
    assert theirs.encode("then").ids == [1, *encode(SMALL, "then")]
    assert theirs.decode(encode(SMALL, "the é中")) == "the é中"


def test_a_published_model_is_read(shared_data):
    for name in ("mistral/tokenizer.model.v1", "torchtune/m.model"):
        data = (shared_data / "tokenizers" / name).read_bytes()
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        try:
            pieces = pieces_of_model(data)
        except ValueError as error:
            assert "another kind than BPE" in str(error)
            continue
        assert pieces.tokens == [model.id_to_piece(i) for i in range(model.vocab_size())]
        assert pieces.scores == [model.get_score(i) for i in range(model.vocab_size())]
        kinds = [(model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_byte, BYTE)]
        for i, kind in enumerate(pieces.types):
            assert all(test(i) == (kind == meant) for test, meant in kinds)
        again = processor(pieces)
        for text in ("Hello, world", "naïve 中文 😀", "a\nb", "x"):
            assert again.encode(text) == model.encode(text)


def test_broken_files_are_value_errors(shared_data):
    data = (shared_data / "checkpoints/stories260K/tok512.bin").read_bytes()
    for size in range(5, len(data), 7):
        try:
            assert len(pieces_of_llama2c(data[:size]).tokens) < 512  # cut between two tokens: fewer of them
        except ValueError:
            pass
    with pytest.raises(ValueError, match="token 511 ends behind the end of the file; truncated?"):
        pieces_of_llama2c(data[:-1])
    with pytest.raises(ValueError, match="must begin with <unk>"):
        pieces_of_llama2c(data[:4] + data[17:])
    rng, model = random.Random(0), model_of_pieces(SMALL)
    for _ in range(1000):
        damaged = bytearray(model)
        damaged[rng.randrange(len(model))] = rng.randrange(256)
        try:
            pieces_of_model(bytes(damaged[: rng.randrange(1, len(model))]))
        except ValueError:
            pass
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        pieces_of_model(b"\xff" * 9)
    with pytest.raises(ValueError, match="another kind than BPE"):
        pieces_of_model(b"")
    with pytest.raises(ValueError, match="begin with <unk>, <s>, </s> and 256 bytes"):
        llama2c_of_pieces(SMALL._replace(tokens=SMALL.tokens[1:]))
