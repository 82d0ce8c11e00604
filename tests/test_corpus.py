"""data/corpus.py: what is read, how it is cut and split, and what is said about files that cannot be read."""

import gzip
import hashlib
import json
import random
import sys
import sysconfig
import tracemalloc
from pathlib import Path

import pytest
from data import corpus
from data.corpus import read_documents, split_documents


def whole(documents) -> list[tuple[str, str]]:
    """Pieces joined again: [(name, text)]."""
    joined, open_ = [], False
    for document in documents:
        if open_:
            assert document.name == joined[-1][0]  # a piece belongs to the document before it
            joined[-1] = (document.name, joined[-1][1] + document.text)
        else:
            joined.append((document.name, document.text))
        open_ = not document.final
    assert not open_
    return joined


def texts(documents) -> list[str]:
    return [text for _, text in whole(documents)]


def write(path: Path, data) -> str:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def error_of(*sources) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        list(read_documents(list(sources)))
    message = str(caught.value)
    assert "\n" not in message and str(sources[0]).split("/")[-1] in message
    return message


# ---- plain files

def test_plain_file_is_one_document_byte_for_byte(tmp_path):
    text = "one\r\n\r\ntwo \ttäb 中文 🎉\rthree"  # no line end is translated
    assert texts(read_documents([write(tmp_path / "a.txt", text)])) == [text]


def test_byte_order_mark_is_dropped_at_the_start_only(tmp_path):
    assert texts(read_documents([write(tmp_path / "a.md", "\ufeffa\ufeffb")])) == ["a\ufeffb"]


def test_separator_lines_end_documents_in_txt_only(tmp_path):
    text = "one\n<|endoftext|>\ntwo <|endoftext|>\r\n<|endoftext|>\r\nthree\n<|endoftext|>"
    expected = ["one\n", "two <|endoftext|>\r\n", "three\n"]
    assert [t for t in texts(read_documents([write(tmp_path / "a.txt", text)])) if t] == expected
    assert texts(read_documents([write(tmp_path / "a.md", text)])) == [text]


def test_tinystories_file_gives_its_stories(shared_data):
    path = shared_data / "tinystories" / "tinystories_v2_gpt4_2MiB.txt"
    stories = texts(read_documents([str(path)]))
    assert stories == path.read_bytes().decode().split("<|endoftext|>\n")  # there each separator stands on its own line


def test_long_file_streams_in_flat_memory_and_joins_exactly(tmp_path):
    rng = random.Random(0)
    text = "".join("word é中🎉"[: rng.randrange(1, 9)] + rng.choice([" ", "\n", "\n\n  ", "\n"]) for _ in range(700_000))
    path = write(tmp_path / "a.txt", text)
    pieces = list(read_documents([path]))
    assert len(pieces) >= 3 and [p.final for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert "".join(p.text for p in pieces) == text
    for left, right in zip(pieces, pieces[1:]):  # cut after a lone newline, so that no token straddles
        assert len(left.text) <= corpus.PIECE
        assert left.text[-1] == "\n" and not left.text[-2].isspace() and not right.text[0].isspace()
    big = write(tmp_path / "big.txt", text * 9)
    size = Path(big).stat().st_size
    tracemalloc.start()
    for _ in read_documents([big]):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 40e6 and peak < 32e6


def test_endless_line_is_still_cut(tmp_path):
    for unit in ("abc ", "x"):
        text = unit * (3_000_000 // len(unit))
        pieces = list(read_documents([write(tmp_path / "a.txt", text)]))
        assert len(pieces) >= 3 and "".join(p.text for p in pieces) == text


def test_pieces_depend_on_the_text_alone(tmp_path):
    """A long document is cut at the same places wherever it stands in its file, so its first piece identifies it."""
    story = "".join(f"line {i} of a long story\n" for i in range(60_000))
    alone = [p.text for p in read_documents([write(tmp_path / "a.txt", story)])]
    later = list(read_documents([write(tmp_path / "b.txt", "z" * 777_777 + "\n<|endoftext|>\n" + story)]))
    line = json.dumps({"text": story})
    assert len(alone) > 1
    assert [p.text for p in later[1:]] == alone
    assert [p.text for p in read_documents([write(tmp_path / "c.jsonl", line)])] == alone


# ---- JSONL, folders

def test_jsonl_gz_and_folders(tmp_path):
    rows = [{"text": "first\n"}, {"content": "zwei é"}, {"text": "", "meta": 1}]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / ".hidden" / "no.txt", "no")
    write(tmp_path / "sub" / ".no.txt", "no")
    write(tmp_path / "sub" / "x.bin", b"\0\1")
    write(tmp_path / "sub" / "empty.py", "")
    write(tmp_path / "b.jsonl", lines)
    write(tmp_path / "sub" / "a.jsonl.gz", gzip.compress(lines.encode()))
    write(tmp_path / "sub.txt", "plain")
    expected = ["first\n", "zwei é", "", "plain", "first\n", "zwei é", ""]  # sorted: b.jsonl, sub.txt, sub/...
    assert texts(read_documents([str(tmp_path)])) == expected
    names = [name for name, _ in whole(read_documents([str(tmp_path)]))]
    assert names[0].endswith("b.jsonl:1") and names[2].endswith("b.jsonl:3")


def test_real_files(shared_data):
    demo = shared_data / "pretrain_demo"
    rows = [json.loads(line) for line in open(demo / "c4_demo.jsonl", encoding="utf-8")]
    assert texts(read_documents([str(demo / "c4_demo.jsonl")])) == [row["text"] for row in rows]
    packed = demo / "c4-sample.01.json.gz"
    with gzip.open(packed, "rt", encoding="utf-8") as file:
        assert texts(read_documents([str(packed)])) == [json.loads(line)["text"] for line in file]


# ---- splits

def test_tinyshakespeare_is_cut_as_nanogpt_does(shared_data):
    path = str(shared_data / "tinyshakespeare" / "input.txt")
    text = Path(path).read_text(encoding="utf-8")
    (train,), (val,) = (texts(split_documents([path], 0.1, split)) for split in ("train", "val"))
    assert (len(train), len(val)) == (1003854, 111540)
    assert train + val == text


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1 / 3, 0.5, 0.999])
def test_tail_of_a_file_with_pieces_and_documents(tmp_path, monkeypatch, fraction):
    monkeypatch.setattr(corpus, "PIECE", 100)
    for separator in ("", "<|endoftext|>\n"):
        parts = [f"line {i}\n" * (i % 40) for i in range(50)]
        path = write(tmp_path / "a.txt", separator.join(parts))
        train = "".join(texts(split_documents([path], fraction, "train")))
        val = "".join(texts(split_documents([path], fraction, "val")))
        assert train + val == "".join(parts)
        assert len(train) == int(len(train + val) * (1 - fraction))


def test_every_cut_position_of_a_tail(tmp_path, monkeypatch):
    """Also when it falls on the end of a piece or of a document: both sides stay well-formed (`whole` checks)."""
    monkeypatch.setattr(corpus, "PIECE", 4)
    text = "ab\ncd\nef\n<|endoftext|>\ngh\nij\n<|endoftext|>\n"
    path = write(tmp_path / "a.txt", text)
    n = len("ab\ncd\nef\ngh\nij\n")
    for cut in range(1, n + 1):
        fraction = 1 - (cut + 0.5) / n if cut < n else 0.0
        train, val = (texts(split_documents([path], fraction, split)) for split in ("train", "val"))
        assert "".join(train) == "ab\ncd\nef\ngh\nij\n"[:cut] and "".join(val) == "ab\ncd\nef\ngh\nij\n"[cut:]


def test_documents_split_by_hash_of_their_text(tmp_path):
    rows = [f"document {i % 900}" for i in range(1000)]  # the last hundred repeat the first
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": row}) for row in rows))
    train, val = (texts(split_documents([path], 0.2, split)) for split in ("train", "val"))
    assert sorted(train + val) == sorted(rows) and not set(train) & set(val)  # nothing lost, no copy on both sides
    assert val == [r for r in rows if int(hashlib.sha256(r.encode()).hexdigest(), 16) / 16**64 < 0.2]
    assert 120 < len(val) < 280
    smaller = texts(split_documents([path], 0.1, "val"))
    assert set(smaller) < set(val)  # a document does not change sides when the share grows


def test_pieces_of_a_document_stay_on_one_side(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 50)
    stories = [f"story {i}\n" * (1 + i % 30) for i in range(200)]
    path = write(tmp_path / "a.txt", "<|endoftext|>\n".join(stories))
    other = write(tmp_path / "b.md", "a second file\n")
    train, val = (texts(split_documents([path, other], 0.3, split)) for split in ("train", "val"))
    assert sorted(train + val) == sorted(stories + ["a second file\n"]) and len(val) > 20


def test_folder_with_one_file_is_cut_by_its_tail(tmp_path):
    write(tmp_path / "only.txt", "abcdefghij")
    assert texts(split_documents([str(tmp_path)], 0.3, "val")) == ["hij"]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_impossible_val_fraction(fraction):
    with pytest.raises(ValueError, match="val_fraction"):
        split_documents(["stdlib"], fraction, "train")


# ---- the embedded corpus

def fraction_of(name: str) -> float:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) / 16**64


def test_stdlib_is_the_running_pythons_and_splits_by_file():
    train, val = (whole(split_documents(["stdlib:modules"], 0.1, split)) for split in ("train", "val"))
    names = [name for name, _ in train + val]
    assert names != sorted(names) and sorted(names) == [name for name, _ in whole(read_documents(["stdlib:modules"]))]
    assert all(fraction_of(name) < 0.1 for name, _ in val) and all(fraction_of(name) >= 0.1 for name, _ in train)
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("json/decoder.py", "argparse.py"):
        assert dict(train + val)[name] == (root / name).read_text(encoding="utf-8")
    for name in names:
        folders = name.split("/")
        assert not {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"} & set(folders)
        assert not folders[-1].startswith("_sysconfigdata") and name != "pydoc_data/topics.py"
    size = sum(len(text) for _, text in train + val)
    assert 6e6 < size < 20e6 and 0.03 < sum(len(text) for _, text in val) / size < 0.2


def test_stdlib_is_modules_and_topics():
    both = whole(read_documents(["stdlib"]))
    assert both == whole(read_documents(["stdlib:modules"])) + whole(read_documents(["stdlib:topics"]))


def test_topics_do_not_leak_into_each_other():
    topics = dict(whole(read_documents(["stdlib:topics"])))
    assert "topics/compound" in topics and "topics/while" not in topics  # the latter is a section of the former
    assert len(topics) > 40
    train, val = (texts(split_documents(["stdlib:topics"], 0.2, split)) for split in ("train", "val"))
    lines = {line for text in train for line in text.splitlines() if len(line) > 20}
    for text in val:
        long = {line for line in text.splitlines() if len(line) > 20}
        assert len(long & lines) < 0.5 * len(long)


def test_docstrings_go_with_their_file(monkeypatch):
    import json.decoder
    import inspect
    some = [(key, module) for key, module in corpus.stdlib_modules() if key.startswith(("json/", "asyncio/", "a"))]
    monkeypatch.setattr(corpus, "stdlib_modules", lambda: iter(some))  # parsing all of it takes seconds
    keyed = list(corpus.keyed_documents("stdlib:docstrings"))
    documents = [(document.name, document.text) for _, document in keyed]
    assert dict(documents)["json/decoder.py:JSONDecoder.decode"] == inspect.getdoc(json.decoder.JSONDecoder.decode)
    assert dict(documents)["json/decoder.py:JSONDecoder"] == inspect.getdoc(json.decoder.JSONDecoder)
    assert all(key == document.name.split(":")[0] for key, document in keyed)  # the key decides the side
    assert len(keyed) > 300


# ---- bad input: one line that names the place

def test_bad_files(tmp_path):
    assert "no such file" in error_of(str(tmp_path / "absent.txt"))
    assert "stdlib:modules" in error_of("stdlib:nothing")
    assert "kind of file" in error_of(write(tmp_path / "a.pdf", "x"))
    assert "empty" in error_of(write(tmp_path / "e.txt", ""))
    assert "offset 1048580" in error_of(write(tmp_path / "b.txt", b"a" * 1048580 + b"\0tail"))
    assert "byte 3 " in error_of(write(tmp_path / "l.txt", "abcé\n".encode("latin-1")))
    (tmp_path / "folder").mkdir()
    assert "no file" in error_of(str(tmp_path / "folder"))


def test_offset_of_bad_utf8_is_exact_across_blocks(tmp_path):
    text = ("é中🎉" * 400_000).encode()  # characters straddle the blocks that are read
    for offset in (3, 2**20 - 1, 2**20, 2**20 + 4, len(text)):
        start = len(text[:offset].decode(errors="ignore").encode())  # between two characters
        message = error_of(write(tmp_path / "x.txt", text[:start] + b"\xff" + text[start:]))
        assert f"byte {start} " in message
    assert f"byte {len(text) - 4} " in error_of(write(tmp_path / "cut.txt", text[:-1]))


def test_bad_jsonl_names_file_and_line(tmp_path):
    good = b'{"text": "ok"}\n'
    for line, word in [
        (b'{"text": "oops}', "malformed"), (b'["a"]', "list"), (b'{"body": "a", "id": 3}', "body, id"),
        (b'{"text": 3}', "text"),
        (b'{"text": "\xff"}', "UTF-8"), (b'{"text": "\\ud800"}', "surrogate"), (b"[" * 100_000, "malformed"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "malformed"),
    ]:
        if b"9999" in line and not hasattr(sys, "get_int_max_str_digits"):
            continue  # older patch releases parse integers of any length
        message = error_of(write(tmp_path / "d.jsonl", good * 2 + b"\n" + line + b"\n"))
        assert "d.jsonl:4: " in message and word in message
    assert "gzip" in error_of(write(tmp_path / "d.jsonl.gz", gzip.compress(good * 1000)[:-20]))
    assert "gzip" in error_of(write(tmp_path / "n.json.gz", good))


def test_sources_are_checked_before_any_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):  # by the call itself, not when iterated
        read_documents([write(tmp_path / "a.txt", "text"), str(tmp_path / "absent.txt")])
