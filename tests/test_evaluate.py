"""Loss, perplexity and bits per byte against figures worked out by hand, gzip and xz against the real programs."""

import gzip
import itertools
import json
import lzma
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import evaluate
from data.chat import Preference, prepare_tokenizer, render
from data.corpus import Document
from data.loader import eval_batches
from data.pack import read_index, write_shards
from data.prepare import prepare
from data.tokenizer import BPETokenizer, CharTokenizer
from evaluate import (answers, bits_per_byte, compressed_bits_per_byte, evaluate_loss, exact_match, perplexity,
                      preference_accuracy)
from model import CausalLM, ModelConfig

ROOT = os.path.dirname(evaluate.__file__)


def tiny(vocab_size, dtype=torch.float64, **changes):
    settings = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    max_position_embeddings=32, initializer_range=0.3)
    return CausalLM(ModelConfig(vocab_size, **settings | changes), seed=1).to(dtype)


def uniform(vocab_size, dtype=torch.float64):
    """A model that finds every token equally likely."""
    model = tiny(vocab_size, dtype)
    model.lm_head.weight.data.zero_()
    return model


def bigram(table):
    """A model whose logits are row i of `table` after token i: embeddings are one-hot, and the layers add nothing."""
    V = len(table)
    model = CausalLM(ModelConfig(V, V + V % 2, 4, 1, 1, max_position_embeddings=64, rms_norm_eps=1e-300)).double()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data.zero_()
    model.model.embed_tokens.weight.data[:, :V] = torch.eye(V)
    norm = math.sqrt(V + V % 2)  # what RMSNorm makes of a one
    model.lm_head.weight.data[:, :V] = torch.tensor(table, dtype=torch.float64).T / norm
    return model


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three documents by characters, in two shards: "hello", "he", "world" with the val text "low role"."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    tokenizer = CharTokenizer.train(["hello world"])
    train = [Document("a", "hello"), Document("b", "he"), Document("c", "world")]
    write_shards(folder, {"train": train, "val": [Document("d", "low role")]}, tokenizer, shard_tokens=9)
    return folder, tokenizer


# Figures

def test_bits_per_byte_and_perplexity_by_hand():
    assert perplexity(nats=3 * math.log(7), tokens=3) == pytest.approx(7, rel=1e-15)
    assert bits_per_byte(8 * math.log(2), 4) == 2.0
    assert bits_per_byte(3 * math.log(256), len("né".encode())) == pytest.approx(8.0, rel=1e-15)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(shards):
    folder, tokenizer = shards
    total = evaluate_loss(uniform(tokenizer.vocab_size), eval_batches(folder, "train", 4, 2))
    assert total["tokens"] == len("hello") + len("he") + len("world") + 3  # each document and its separator
    assert total["nats"] == pytest.approx(15 * math.log(tokenizer.vocab_size), rel=1e-14)
    assert perplexity(**total) == pytest.approx(tokenizer.vocab_size, rel=1e-14)
    assert bits_per_byte(total["nats"], 12) == pytest.approx(15 / 12 * math.log2(tokenizer.vocab_size), rel=1e-14)


def test_a_bigram_model_gets_the_sum_of_its_table(shards):
    folder, tokenizer = shards
    V = tokenizer.vocab_size
    table = [[math.sin(3 * i + 5 * j) for j in range(V)] for i in range(V)]
    expected = tokens = 0
    for text in ("hello", "he", "world"):
        ids = [tokenizer.eos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id]
        for i, j in zip(ids, ids[1:]):
            expected -= table[i][j] - math.log(sum(map(math.exp, table[i])))
            tokens += 1
    for seq_len in (1, 3, 50):
        total = evaluate_loss(bigram(table), eval_batches(folder, "train", seq_len, 2))
        assert total == {"nats": pytest.approx(expected, abs=1e-9), "tokens": tokens}


def test_bits_per_byte_do_not_depend_on_how_text_is_cut_into_tokens(tmp_path):
    """A uniform coin per byte costs 8 bits; two tokenizers that split bytes apart must agree."""
    text = "aé🎉b" * 5
    nats = {}
    tokenizers = {"bytes": BPETokenizer.train(["x"], vocab_size=257), "chars": CharTokenizer.train([text])}
    for name, tokenizer in tokenizers.items():
        write_shards(tmp_path / name, {"val": [Document("a", text)]}, tokenizer)
        total = evaluate_loss(uniform(tokenizer.vocab_size), eval_batches(tmp_path / name, "val", 8, 4))
        assert total["tokens"] == len(tokenizer.encode(text)) + 1
        nats[name] = bits_per_byte(total["nats"], read_index(tmp_path / name)["splits"]["val"]["bytes"])
    assert nats["bytes"] == pytest.approx(41 / 40 * math.log2(257), rel=1e-14)
    assert nats["chars"] == pytest.approx(21 / 40 * math.log2(5), rel=1e-14)


# evaluate_loss

def test_batch_size_and_chunks_do_not_matter(shards):
    folder, tokenizer = shards
    model = tiny(tokenizer.vocab_size)
    reference = evaluate_loss(model, eval_batches(folder, "train", 3, 1))
    for batch_size, chunk in ((1, 1), (2, 3), (100, 2048), (3, 4)):
        total = evaluate_loss(model, eval_batches(folder, "train", 3, batch_size), chunk=chunk)
        assert total == {"nats": pytest.approx(reference["nats"], abs=1e-9), "tokens": 15}


def test_equals_cross_entropy_of_the_full_logits():
    model = tiny(11)
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(0, 11, (2, 3, 8), generator=generator)
    labels[0, 5:] = -100
    cu_seqlens = torch.tensor([0, 3, 8, 16, 20, 24], dtype=torch.int32)
    for cu in (None, cu_seqlens):
        logits = model(ids, cu_seqlens=cu)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        total = evaluate_loss(model, [(ids, labels, cu)])
        assert total == {"nats": pytest.approx(expected.item(), abs=1e-9), "tokens": 21}
    with_mask, without = (evaluate_loss(model, [(ids, labels, cu)])["nats"] for cu in (cu_seqlens, None))
    assert abs(with_mask - without) > 0.01


def test_row_starts_alone_are_no_document_mask(monkeypatch):
    """Windows without a boundary inside take the fast causal path, with the same result."""
    model, seen = tiny(11), []
    forward = model.hidden

    def hidden(ids, cu_seqlens):
        seen.append(cu_seqlens)
        return forward(ids, cu_seqlens=cu_seqlens)

    monkeypatch.setattr(model, "hidden", hidden)
    ids = torch.arange(8).view(2, 4)
    first = evaluate_loss(model, [(ids, ids, torch.tensor([0, 4, 8], dtype=torch.int32))])
    assert seen == [None]
    seen.clear()
    second = evaluate_loss(model, [(ids, ids, torch.tensor([0, 4, 6, 8], dtype=torch.int32))])
    assert seen[0] is not None and abs(first["nats"] - second["nats"]) > 1e-3


def test_a_batch_without_targets_counts_nothing():
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert evaluate_loss(tiny(11), [(ids, torch.full_like(ids, -100), None)]) == {"nats": 0.0, "tokens": 0}


def test_mode_and_gradients_are_left_alone():
    model = tiny(11, attention_dropout=0.5).train()
    ids = torch.arange(8).view(2, 4)
    assert evaluate_loss(model, [(ids, ids, None)]) == evaluate_loss(tiny(11), [(ids, ids, None)])  # dropout was off
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    evaluate_loss(model, [(ids, ids, None)])
    assert not model.training


def test_autocast_is_used():
    model = tiny(11, torch.float32)
    ids = torch.arange(8).view(2, 4)
    plain = evaluate_loss(model, [(ids, ids, None)])["nats"]
    half = evaluate_loss(model, [(ids, ids, None)] * 2, torch.autocast("cpu", torch.bfloat16))["nats"] / 2
    assert 0 < abs(plain - half) < 0.1 * plain


# Compressors

TEXTS = ["The quick brown fox. " * 40, "Zwölf Boxkämpfer jagen Viktor. ", "日本語" * 30]


def test_compressors_equal_pythons_own_files():
    data = "".join(TEXTS).encode()
    given = compressed_bits_per_byte(iter(TEXTS))
    sizes = {"gzip": len(gzip.compress(data, 9)), "xz": len(lzma.compress(data, preset=9))}
    assert given == {name: 8 * size / len(data) for name, size in sizes.items()}
    assert given == compressed_bits_per_byte(["".join(TEXTS)])
    with pytest.raises(ValueError, match="no text"):
        compressed_bits_per_byte([""])


@pytest.mark.parametrize("program", ["gzip", "xz"])
def test_compressors_equal_the_programs(program):
    if not shutil.which(program):
        pytest.skip(f"no {program} on this machine")
    data = Path(shutil.__file__).with_name("_pydecimal.py").read_bytes()  # 230 kB; gzip -6 needs 1.2 % more
    size = len(subprocess.run([program, "-9", "-c"], input=data, capture_output=True, check=True).stdout)
    ours = compressed_bits_per_byte([data.decode()])[program] * len(data) / 8
    assert abs(ours - size) <= 0.01 * size  # zlib may come in another version than gzip has built in


def test_documents_come_back_from_shards(shards):
    folder, tokenizer = shards
    index = read_index(folder)
    assert list(evaluate.shard_texts(index, "train", tokenizer)) == ["hello", "he", "world"]
    assert list(evaluate.shard_texts(index, "val", tokenizer)) == ["low role"]
    assert len(index["splits"]["train"]["shards"]) == 2


# The command

@pytest.fixture(scope="module")
def folder(tmp_path_factory, shards):
    path = tmp_path_factory.mktemp("model")
    checkpoint.save_model(path, tiny(shards[1].vocab_size, torch.float32), shards[1])
    return path


def command(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    evaluate.main()
    given = capsys.readouterr()
    assert len(given.out.splitlines()) == 1
    return json.loads(given.out), given.err


def test_command_on_a_prepared_folder(folder, shards, monkeypatch, capsys, tmp_path):
    data, tokenizer = shards
    out = tmp_path / "new" / "result.json"
    result, line = command(monkeypatch, capsys, "--model", folder, "--data", data, "--dtype", "float64", "--seq_len", 4,
                           "--baselines", "--out", out)
    total = evaluate_loss(checkpoint.load_model(folder, dtype=torch.float64), eval_batches(data, "val", 4, 3))
    assert result.pop("loss") == pytest.approx(total["nats"] / 9, abs=1e-12)
    assert result.pop("perplexity") == pytest.approx(math.exp(total["nats"] / 9), abs=1e-9)
    assert result.pop("bits_per_byte") == pytest.approx(total["nats"] / 8 / math.log(2), abs=1e-12)
    assert result == {"model": str(folder), "data": [str(data)], "split": "val", "seq_len": 4, "tokens": 9, "bytes": 8,
                      "gzip_bits_per_byte": float(len(gzip.compress(b"low role", 9))),
                      "xz_bits_per_byte": float(len(lzma.compress(b"low role", preset=9)))}
    assert json.loads(out.read_text())["tokens"] == 9 and os.listdir(out.parent) == ["result.json"]
    assert "bits per byte" in line and "gzip" in line and "9 tokens, 8 bytes" in line


def test_command_on_text_packs_it_and_leaves_nothing(folder, monkeypatch, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("hello world")
    (tmp_path / "b.jsonl").write_text('{"text": "role"}\n{"text": "hell"}\n')
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    result, line = command(monkeypatch, capsys, "--model", folder, "--data", tmp_path / "a.txt", tmp_path / "b.jsonl")
    assert (result["split"], result["tokens"], result["bytes"], result["seq_len"]) == ("all", 12 + 5 + 5, 19, 32)
    assert "gzip" not in line and "gzip_bits_per_byte" not in result
    assert os.listdir(tmp_path / "scratch") == [] and sorted(os.listdir(tmp_path)) == ["a.txt", "b.jsonl", "scratch"]


def test_splits_of_text_are_those_of_training(folder, monkeypatch, capsys, tmp_path):
    text = "hello world " * 50
    (tmp_path / "a.txt").write_text(text)
    flags = ["--model", folder, "--data", tmp_path / "a.txt", "--val_fraction", 0.25]
    val, _ = command(monkeypatch, capsys, *flags, "--split", "val")
    train, _ = command(monkeypatch, capsys, *flags, "--split", "train")
    assert (val["bytes"], train["bytes"]) == (150, 450)
    prepare(tmp_path / "data", data=[str(tmp_path / "a.txt")], val_fraction=0.25, tokenizer=str(folder))
    capsys.readouterr()
    prepared, _ = command(monkeypatch, capsys, "--model", folder, "--data", tmp_path / "data")
    assert {**prepared, "data": 0} == {**val, "data": 0}
    both, _ = command(monkeypatch, capsys, "--model", folder, "--data", tmp_path / "data", "--split", "all")
    assert both["tokens"] == val["tokens"] + train["tokens"] and both["bytes"] == 600
    nats = val["loss"] * val["tokens"] + train["loss"] * train["tokens"]
    assert both["loss"] * both["tokens"] == pytest.approx(nats, rel=1e-6)


@pytest.mark.parametrize("flags", [["--seq_len", "2"], ["--no_document_mask"], ["--dtype", "bfloat16"],
                                   ["--split", "train"]], ids=str)
def test_each_flag_changes_the_figure(folder, shards, monkeypatch, capsys, flags):
    base = ["--model", folder, "--data", shards[0]] + (["--split", "train"] if flags == ["--no_document_mask"] else [])
    assert command(monkeypatch, capsys, *base)[0]["loss"] != command(monkeypatch, capsys, *base, *flags)[0]["loss"]


@pytest.mark.parametrize("flags", [["--batch_size", "1"], ["--attention", "eager"], ["--device", "cpu"],
                                   ["--dtype", "float64"]], ids=str)
def test_each_other_flag_does_not(folder, shards, monkeypatch, capsys, flags):
    base = ["--model", folder, "--data", shards[0]]
    loss = command(monkeypatch, capsys, *base)[0]["loss"]
    assert command(monkeypatch, capsys, *base, *flags)[0]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("flags, message", [
    (["--data", "no/such"], "no/such"),
    (["--data", "{tmp}/empty.txt"], "empty.txt: the file is empty"),
    (["--data", "{tmp}/bad.jsonl"], "bad.jsonl:2"),
    (["--data", "{tmp}/q.txt"], "character 'q' is not in this tokenizer's vocabulary"),
    (["--data", "{tmp}/other"], "other: was prepared with another tokenizer than that of"),
    (["--data", "{shards}", "--seq_len", "0"], "seq_len is 0; it must be at least 1"),
    (["--data", "{shards}", "--batch_size", "0"], "batch_size is 0"),
    (["--data", "{shards}", "--out", "{tmp}"], "is a folder; name a file"),
    (["--data", "{shards}", "--device", "warp"], "warp"),
    (["--data", "{tmp}/onlytrain"], "has no split 'val'; it has train"),
])
def test_what_the_command_refuses(folder, shards, monkeypatch, capsys, tmp_path, flags, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "hello"}\n{"text": \n')
    (tmp_path / "q.txt").write_text("q")
    another = CharTokenizer.train(["helo wrz"])  # as large, but with a z instead of the d
    assert another.vocab_size == shards[1].vocab_size
    write_shards(tmp_path / "other", {"val": [Document("a", "hello")]}, another)
    write_shards(tmp_path / "onlytrain", {"train": [Document("a", "hello")]}, shards[1])
    flags = [flag.format(tmp=tmp_path, shards=shards[0]) for flag in flags]
    with pytest.raises((ValueError, OSError), match=message):
        command(monkeypatch, capsys, "--model", folder, *flags)


def test_a_model_of_nan_and_a_tokenizer_too_large(shards, tmp_path, monkeypatch, capsys):
    model = tiny(shards[1].vocab_size, torch.float32)
    model.model.norm.weight.data[0] = math.nan
    checkpoint.save_model(tmp_path, model, shards[1])
    with pytest.raises(ValueError, match="loss is nan: its weights are damaged"):
        command(monkeypatch, capsys, "--model", tmp_path, "--data", shards[0])
    CharTokenizer.train(["abcdefghijklmnop"]).save(tmp_path)
    with pytest.raises(ValueError, match="tokenizer of 17 tokens, model of 9"):
        command(monkeypatch, capsys, "--model", tmp_path, "--data", shards[0])


def test_from_a_shell_bad_input_is_one_line_and_code_2(folder):
    argv = [sys.executable, os.path.join(ROOT, "evaluate.py"), "--model", str(folder), "--data", "no/such.txt"]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and run.stdout == "" and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: no/such.txt: no such file")


# Chat: exact match on tasks, accuracy on preferences

def chat_folder(path, seed=1, **changes):
    """A model with random weights and a tokenizer of bytes that knows ChatML: (model, tokenizer, folder)."""
    tokenizer = BPETokenizer.train([], 257)
    prepare_tokenizer(tokenizer, "chatml")
    model = tiny(tokenizer.vocab_size, torch.float64, max_position_embeddings=64, **changes)
    path.mkdir()
    checkpoint.save_model(path, model, tokenizer)
    return model.eval(), tokenizer, path


def parrot(tokenizer, text):
    """A bigram model that answers `text`, in which no letter comes twice, whatever it is asked."""
    ids = [tokenizer.encode("\n")[0], *tokenizer.encode(text), tokenizer.special_tokens["<|im_end|>"]]
    table = torch.zeros(tokenizer.vocab_size, tokenizer.vocab_size)
    for a, b in zip(ids, ids[1:]):
        table[a, b] = 50
    return bigram(table.tolist()).eval()


def task(question, answer, family):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "family": family, "answer": answer}


def test_exact_match_counts_right_answers_by_family(tmp_path):
    _, tokenizer, _ = chat_folder(tmp_path / "m")
    model = parrot(tokenizer, "7 up")
    rows = [task("3+4", "7 up", "sum"), task("1+1", "2", "sum"), task("say it", "7 up", "word")]
    assert answers(model, tokenizer, [row["messages"][:-1] for row in rows], "chatml", batch_size=2) == ["7 up"] * 3
    result = exact_match(model, tokenizer, rows, "chatml", batch_size=2)
    assert result == {"exact_match": 2 / 3, "families": {"sum": (1, 2), "word": (1, 1)}}
    cut = exact_match(model, tokenizer, rows, "chatml", max_new_tokens=1)
    assert cut["exact_match"] == 0  # "7" alone is not the answer


def test_answers_do_not_depend_on_the_batch(tmp_path):
    model, tokenizer, _ = chat_folder(tmp_path / "m")
    prompts = [[{"role": "user", "content": "a" * n}] for n in (1, 9, 4, 20, 2)]
    alone = answers(model, tokenizer, prompts, "chatml", batch_size=1, max_new_tokens=12)
    assert answers(model, tokenizer, prompts, "chatml", batch_size=3, max_new_tokens=12) == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_preference_accuracy_equals_each_answer_scored_alone(tmp_path, batch_size):
    model, tokenizer, _ = chat_folder(tmp_path / "m", initializer_range=0.5)
    texts = ["yes", "no, never", "a", "bc" * 3, "ok then", "hm"]
    pairs = [Preference(f"{i}", [{"role": "user", "content": "q" * i}], [{"role": "assistant", "content": a}],
                        [{"role": "assistant", "content": b}])
             for i, (a, b) in enumerate(itertools.permutations(texts, 2), 1) if i < 25]

    def mean_logprob(prompt, answer):
        ids, mask = render(prompt + answer, tokenizer, "chatml")
        logp = model(torch.tensor([ids])).log_softmax(-1)[0]
        scores = [logp[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t]]
        return sum(scores) / len(scores)

    right = sum(mean_logprob(pair.prompt, pair.chosen) > mean_logprob(pair.prompt, pair.rejected) for pair in pairs)
    result = preference_accuracy(model, tokenizer, pairs, "chatml", batch_size=batch_size)
    assert result == {"preference_accuracy": right / 24, "pairs": 24, "ties": 0} and 0 < right < 24


def test_ties_are_counted_equal_scores_are_half_and_long_texts_are_cut(tmp_path):
    model, tokenizer, _ = chat_folder(tmp_path / "m")
    model.lm_head.weight.data.zero_()  # all tokens equally likely: every mean is the same

    def pair(prompt, chosen, rejected):
        return Preference("", [{"role": "user", "content": prompt}], [{"role": "assistant", "content": chosen}],
                          [{"role": "assistant", "content": rejected}])

    pairs = [pair("a", "b", "c"), pair("a", "b", "b"), pair("a" * 100, "b" * 100, "c")]
    assert preference_accuracy(model, tokenizer, pairs, "chatml") == {"preference_accuracy": 0.5, "pairs": 2, "ties": 1}
    with pytest.raises(ValueError, match="no pair to compare"):
        preference_accuracy(model, tokenizer, pairs[1:2], "chatml")


def test_command_on_tasks_and_pairs(tmp_path, monkeypatch, capsys):
    *_, folder = chat_folder(tmp_path / "m")
    tasks, pairs = tmp_path / "tasks.jsonl", tmp_path / "pairs.jsonl"
    tasks.write_text("".join(json.dumps(task(f"{a}+1", str(a + 1), "sum")) + "\n" for a in range(5)))
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    flags = ["--model", folder, "--tasks", tasks, "--pairs", pairs, "--max_new_tokens", 4]
    result, line = command(monkeypatch, capsys, *flags)
    assert result["exact_match"] == 0 and result["families"] == {"sum": [0, 5]} and result["pairs"] == 1
    assert result["template"] == "chatml" and "data" not in result and "loss" not in result
    assert "exact match 0.0% of 5 tasks: sum 0%" in line and "of 1 pairs, 0 ties left out" in line
    assert command(monkeypatch, capsys, *flags, "--dtype", "bfloat16")[0]["pairs"] == 1
    other, line = command(monkeypatch, capsys, *flags, "--template", "llama3")  # a base model: its tokens are added
    assert other["template"] == "llama3" and "<|eot_id|>" in line and "embedding grew by 4 tokens" in line
    tasks.write_text('{"messages": []}\n')
    with pytest.raises(ValueError, match="tasks.jsonl:1: expected a task"):
        command(monkeypatch, capsys, *flags)
    with pytest.raises(ValueError, match="choose from chatml"):
        command(monkeypatch, capsys, *flags, "--template", "gpt")
