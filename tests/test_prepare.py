"""data/prepare.py: corpus to finished folder, made once, reused, and refused when made with other settings."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data.loader import eval_batches
from data.pack import read_index
from data.prepare import SPECIAL_TOKENS, prepare
from data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def settings(tmp_path: Path, **changes) -> dict:
    text = tmp_path / "text.txt"
    if not text.exists():
        rng = random.Random(0)
        words = ["".join(rng.choice("abcdefghijklmnopé") for _ in range(rng.randrange(2, 9))) for _ in range(200)]
        text.write_text("".join(" ".join(rng.choices(words, k=7)) + ".\n" for _ in range(1500)), encoding="utf-8")
    return {"data": [str(text)], "val_data": [], "val_fraction": 0.1, "tokenizer": None, "vocab_size": 300} | changes


def text_of(folder, split: str, tokenizer) -> str:
    labels = [row[row != -100] for _, rows, _ in eval_batches(folder, split, 64, 8) for row in rows]
    return tokenizer.decode(np.concatenate(labels).tolist())


def test_folder_is_complete_and_holds_the_text(tmp_path):
    args = settings(tmp_path)
    tokenizer, index = prepare(tmp_path / "d", **args)
    assert index == read_index(tmp_path / "d", verify=True) and index["vocab_size"] == tokenizer.vocab_size == 300
    loaded = load_tokenizer(tmp_path / "d")
    assert list(loaded.special_tokens) == list(SPECIAL_TOKENS) and loaded.eos_token_id == index["eos_token_id"]
    text = Path(args["data"][0]).read_text(encoding="utf-8")
    cut = int(len(text) * 0.9)
    assert text_of(tmp_path / "d", "train", loaded) == text[:cut] + "<|endoftext|>"
    assert text_of(tmp_path / "d", "val", loaded) == text[cut:] + "<|endoftext|>"
    assert index["splits"]["train"]["bytes"] == len(text[:cut].encode())
    assert index["splits"]["val"]["bytes"] == len(text[cut:].encode())


def test_tokenizer_is_trained_on_the_training_split_alone(tmp_path):
    args = settings(tmp_path)
    tokenizer, _ = prepare(tmp_path / "d", **args)
    text = Path(args["data"][0]).read_text(encoding="utf-8")
    expected = BPETokenizer.train([text[: int(len(text) * 0.9)]], 300, SPECIAL_TOKENS)
    assert [tokenizer.decode_bytes([i]) for i in range(300)] == [expected.decode_bytes([i]) for i in range(300)]


def test_finished_folder_is_reused_untouched(tmp_path, capsys):
    args = settings(tmp_path)
    first, index = prepare(tmp_path / "d", **args)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "d").iterdir()}
    again, index_again = prepare(tmp_path / "d", **args)
    assert "made before with the same settings" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "d").iterdir()} == before and index_again == index
    assert again.encode("twelve times café") == first.encode("twelve times café")
    os.remove(args["data"][0])  # the shards are enough to go on with
    assert prepare(tmp_path / "d", **args)[1] == index


def test_other_settings_are_refused_by_name(tmp_path):
    args = settings(tmp_path)
    prepare(tmp_path / "d", **args)
    (tmp_path / "more.txt").write_text("more")
    for changes, name in [({"vocab_size": 301}, "vocab_size 300, not 301"), ({"val_fraction": 0.2}, "val_fraction"),
                          ({"tokenizer": "char"}, "tokenizer 'bpe', not 'char'"),
                          ({"data": [str(tmp_path / "more.txt")]}, "data"),
                          ({"val_data": [str(tmp_path / "more.txt")]}, "val_data"),
                          ({"special_tokens": ("<|endoftext|>",)}, "special_tokens")]:
        with pytest.raises(ValueError, match=name):
            prepare(tmp_path / "d", **(args | changes))
    with open(args["data"][0], "a", encoding="utf-8") as file:
        file.write("one line more\n")
    with pytest.raises(ValueError, match="file_bytes"):
        prepare(tmp_path / "d", **args)


def test_prepared_folder_as_data(tmp_path, capsys):
    args = settings(tmp_path)
    tokenizer, index = prepare(tmp_path / "d", **args)
    in_place = {"data": [str(tmp_path / "d")], "val_data": []}
    used, used_index = prepare(tmp_path / "unused", **in_place)
    assert used_index == index and used_index["directory"] == str(tmp_path / "d") and not (tmp_path / "unused").exists()
    assert str(tmp_path / "d") in capsys.readouterr().out
    tokenizer.save(tmp_path)
    prepare(tmp_path / "unused", **in_place, tokenizer=str(tmp_path))  # the same one: no objection
    BPETokenizer.train(["other text " * 50], 262).save(tmp_path)
    with pytest.raises(ValueError, match="another tokenizer"):
        prepare(tmp_path / "unused", **in_place, tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="another tokenizer"):
        prepare(tmp_path / "unused", **in_place, tokenizer="char")
    with pytest.raises(ValueError, match="val_data"):
        prepare(tmp_path / "unused", **(in_place | {"val_data": args["data"]}))


def test_val_data_replaces_the_fraction(tmp_path):
    (tmp_path / "held.md").write_text("held-out text")
    args = settings(tmp_path, val_data=[str(tmp_path / "held.md")])
    tokenizer, _ = prepare(tmp_path / "d", **args)
    assert text_of(tmp_path / "d", "val", tokenizer) == "held-out text<|endoftext|>"
    text = Path(args["data"][0]).read_text(encoding="utf-8")
    assert text_of(tmp_path / "d", "train", tokenizer) == text + "<|endoftext|>"


def test_val_fraction_zero_makes_no_val_split(tmp_path):
    _, index = prepare(tmp_path / "d", **settings(tmp_path, val_fraction=0.0))
    assert list(index["splits"]) == ["train"]


def test_char_tokenizer_knows_held_out_characters_too(tmp_path):
    args = settings(tmp_path, tokenizer="char")
    with open(args["data"][0], "a", encoding="utf-8") as file:
        file.write("ŵ only at the end\n")
    text = Path(args["data"][0]).read_text(encoding="utf-8")
    tokenizer, index = prepare(tmp_path / "d", **args)
    assert isinstance(load_tokenizer(tmp_path / "d"), CharTokenizer)
    assert index["vocab_size"] == len(set(text)) + len(SPECIAL_TOKENS)
    assert text_of(tmp_path / "d", "val", tokenizer).removesuffix("<|endoftext|>") == text[int(len(text) * 0.9) :]


def test_tinyshakespeare_by_characters(tmp_path, shared_data):
    path = str(shared_data / "tinyshakespeare" / "input.txt")
    _, index = prepare(tmp_path / "d", **settings(tmp_path, data=[path], tokenizer="char"))
    assert index["vocab_size"] == 65 + 3
    assert {s: index["splits"][s]["tokens"] - 2 for s in ("train", "val")} == {"train": 1003854, "val": 111540}


def test_named_tokenizer_is_loaded(tmp_path):
    own = BPETokenizer.train(["some other text, some other text"], 264)
    own.save(tmp_path)
    tokenizer, index = prepare(tmp_path / "d", **settings(tmp_path, tokenizer=str(tmp_path / "tokenizer.json")))
    assert index["vocab_size"] == own.vocab_size == load_tokenizer(tmp_path / "d").vocab_size
    assert tokenizer.encode("some other café") == own.encode("some other café")


def run(*arguments, cwd) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, "-m", "data.prepare", *map(str, arguments)], cwd=cwd, env=environment,
                          capture_output=True, text=True)


def test_command_line(tmp_path):
    (text,) = settings(tmp_path)["data"]
    done = run("--data", text, "--out", "made", "--vocab-size", 280, "--val_fraction", 0.2, cwd=tmp_path)
    assert done.returncode == 0 and "vocabulary 280" in done.stdout, done.stderr
    assert read_index(tmp_path / "made")["settings"]["val_fraction"] == 0.2

    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    for arguments, message in [(("--data", "bad.jsonl"), "bad.jsonl:2: malformed JSON"),
                               (("--data", "absent"), "absent"), (("--data", text, "--vocab_size", 10), "vocab_size 10"),
                               (("--data", text, "--val_fraction", 2), "val_fraction")]:
        failed = run(*arguments, "--out", "bad", cwd=tmp_path)
        assert failed.returncode == 2 and failed.stderr.startswith("error: ") and message in failed.stderr
        assert failed.stderr.count("\n") == 1
        assert not list(tmp_path.glob("bad*/")) or sorted(p.name for p in tmp_path.glob("bad*")) == ["bad.jsonl"]


@pytest.mark.skipif(not hasattr(__import__("signal"), "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_run_leaves_no_finished_folder_and_the_next_succeeds(tmp_path):
    import signal
    import time

    (tmp_path / "big.txt").write_text("the quick brown fox jumps over the lazy dog 0123456789\n" * 400_000)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "data.prepare", "--data", "big.txt", "--out", "made", "--tokenizer", "char"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("made.partial/*.bin")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "made").exists() and (tmp_path / "made.partial").exists()
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == 0
    assert not (tmp_path / "made.partial").exists()
    read_index(tmp_path / "made", verify=True)
