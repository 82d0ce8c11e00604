"""Loss, perplexity and bits per byte against figures worked out by hand, gzip and xz against the real programs."""

import gzip
import itertools
import json
import lzma
import math
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import checkpoint
import evaluate
from data.chat import Preference, prepare_tokenizer, render
from data.corpus import Document
from data import likelihood
from data.likelihood import encode_pair, fit, likelihood_batches, likelihoods, rolling_windows
from data.loader import eval_batches
from data.pack import read_index, write_shards
from data.prepare import prepare
from data.tokenizer import BPETokenizer, CharTokenizer
from evaluate import (answers, bits_per_byte, compressed_bits_per_byte, evaluate_loss, exact_match, perplexity,
                      preference_accuracy)
from model import CausalLM, KVCache, ModelConfig

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


# Log-likelihoods

def pairs_for(vocab_size, count, seed=0, shared=0):
    """Random (context, continuation) ids; every context comes three times, and all begin with `shared` equal tokens."""
    rng = random.Random(seed)
    ids = lambda n: [rng.randrange(vocab_size) for _ in range(n)]  # noqa: E731
    head = ids(shared)
    contexts = [head + ids(rng.randrange(1, 9)) for _ in range(count)]
    return [(context, ids(rng.randrange(1, 6))) for context in contexts for _ in range(3)]


def one_by_one(model, pairs):
    found = []
    for context, rest in pairs:
        logp = model(torch.tensor([context + rest]))[0].log_softmax(-1)
        steps = [(logp[len(context) + i - 1, token].item(), logp[len(context) + i - 1].argmax().item() == token)
                 for i, token in enumerate(rest)]
        found.append((sum(step for step, _ in steps), all(hit for _, hit in steps)))
    return found


@pytest.mark.parametrize("shared", [0, 20])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5}], ids=["full", "window"])
def test_likelihoods_equal_one_at_a_time_whatever_the_batch_and_the_cache(changes, shared):
    model = tiny(7, max_position_embeddings=64, **changes).train()
    pairs = pairs_for(7, 9, shared=shared)
    pairs.append((pairs[0][0], [model.eval()(torch.tensor(pairs[0][:1]))[0, -1].argmax().item()]))
    expected = one_by_one(model, pairs)
    model.train()
    assert any(greedy for _, greedy in expected)
    for batch_size in (1, 4, 100):
        for cache in (None, lambda rows, tokens: KVCache(model.config, rows, tokens, torch.float64)):
            found = dict(likelihoods(model, pairs, batch_size=batch_size, new_cache=cache))
            assert [found[i][1] for i in range(len(pairs))] == [greedy for _, greedy in expected]
            assert [found[i][0] for i in range(len(pairs))] == pytest.approx([logp for logp, _ in expected], abs=1e-9)
    assert model.training


def test_contexts_are_read_once(monkeypatch):
    """24 tokens of examples before 4 questions of 5, with 3 choices of 4 each: 24 + 4 * 5 + 12 * 3 tokens, not 12 * 32."""
    model, read, hidden = tiny(7, max_position_embeddings=64), [], CausalLM.hidden
    monkeypatch.setattr(CausalLM, "hidden", lambda self, ids, **how: read.append(ids.numel()) or hidden(self, ids, **how))
    pairs = [([1] * 24 + [n] * 5, [n, k, k, k]) for n in range(2, 6) for k in range(3)]
    cache = lambda rows, tokens: KVCache(model.config, rows, tokens, torch.float64)  # noqa: E731
    assert len(list(likelihoods(model, pairs, batch_size=12, new_cache=cache))) == 12 and read == [24, 20, 36]


def test_batches_hold_each_pair_once_and_keep_contexts_together():
    pairs = pairs_for(50, 40) + [([1, 2], [3])] * 9
    for batch_size in (1, 2, 7, 64):
        batches = list(likelihood_batches(pairs, batch_size))
        assert sorted(i for batch in batches for i in batch) == list(range(len(pairs)))
        assert all(len(batch) <= batch_size for batch in batches)
        if batch_size >= 9:
            assert all(len({n for n, batch in enumerate(batches) for i in batch if pairs[i][0] == context}) == 1
                       for context, _ in pairs)


def test_blanks_at_the_end_of_a_context_move_to_the_continuation():
    tokenizer = BPETokenizer.train(["the cat the dog the cow"] * 9, 270)
    space_cat = tokenizer.encode("the cat")
    assert encode_pair(tokenizer, "the", " cat", 0) == (tokenizer.encode("the"), space_cat[len(tokenizer.encode("the")):])
    assert encode_pair(tokenizer, "the ", "cat", 0) == encode_pair(tokenizer, "the", " cat", 0)
    assert encode_pair(tokenizer, "the \n", "x", 0)[0] == tokenizer.encode("the")
    assert encode_pair(tokenizer, "", " cat", 5) == ([5], tokenizer.encode(" cat"))  # something must come before
    assert encode_pair(tokenizer, "the", " cat", 5, [9, 8])[0] == [9, 8, *tokenizer.encode("the")]


def test_context_and_continuation_are_encoded_as_one_text():
    """"th" + "e" is one token "the": what lies behind the context's own count of tokens is the continuation, or nothing."""
    tokenizer = BPETokenizer.train(["the he"] * 9, 259)  # merges he, the
    assert len(tokenizer.encode("the")) == 1 and len(tokenizer.encode("th")) == 2
    with pytest.raises(ValueError, match="the continuation 'e' has no tokens of its own"):
        encode_pair(tokenizer, "th", "e", 0)
    context, rest = encode_pair(tokenizer, "th", "ex y", 0)
    assert context == tokenizer.encode("th") and rest == tokenizer.encode("thex y")[2:]


def test_rolling_windows_are_disjoint_and_predict_each_token_once():
    """The example of the harness' docstring: ten tokens, a context of four; the last window sees more than one token."""
    assert rolling_windows(list(range(10)), 99, 4) == [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    for length, size in ((1, 4), (4, 4), (5, 4), (8, 4), (9, 1), (3, 100)):
        windows = rolling_windows(list(range(length)), 99, size)
        assert [token for _, rest in windows for token in rest] == list(range(length))
        assert all(1 <= len(context) and len(context) + len(rest) <= size + 1 for context, rest in windows)
        assert all(rest[0] == context[-1] + 1 for context, rest in windows[1:])


def test_long_contexts_are_cut_at_their_beginning():
    assert fit([1, 2, 3], [4, 5], 4) == ([1, 2, 3], [4, 5])  # the last token is predicted, not read
    assert fit([1, 2, 3], [4, 5], 3) == ([2, 3], [4, 5]) and fit([1, 2, 3], [4, 5, 6], 3) == ([3], [4, 5, 6])
    with pytest.raises(ValueError, match="a continuation of 4 tokens does not fit into 3"):
        fit([1], [2, 3, 4, 5], 3)


# Benchmarks: each with a score worked out by hand. A model that finds all V tokens (characters here) equally likely gives
# a text of n characters V^-n, so acc takes the shortest choice, and acc_norm, with (n + 1) / n for the blank, the longest.

LETTERS = "".join(map(chr, range(32, 127))) + "\néö甲乙？答案：" + "以下是中国关于注册会计师的单项选择题，请选出其中的正确答案。"


def letter_folder(path, model=None, **changes):
    tokenizer = CharTokenizer.train([LETTERS])
    model = model or uniform(tokenizer.vocab_size, torch.float32)
    model.config.max_position_embeddings = 4096
    path.mkdir(exist_ok=True)
    checkpoint.save_model(path, model, tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    path = tmp_path_factory.mktemp("letters")
    return path, letter_folder(path)


FOUR = {"text": ["long one", "b", "ccc", "dd"], "label": list("ABCD")}
SCORED = [  # name, row, figures: 1.0 where the right choice is the shortest (acc), the longest (acc_norm, acc_bytes)
    ("hellaswag", {"activity_label": "A", "ctx_a": "b", "ctx_b": "c", "endings": FOUR["text"], "label": "1"}, (1, 0, 0)),
    ("hellaswag", {"activity_label": "A", "ctx_a": "b", "ctx_b": "c", "endings": FOUR["text"], "label": 0}, (0, 1, 1)),
    ("arc_easy", {"question": "Why?", "choices": FOUR, "answerKey": "A"}, (0, 1, 1)),
    ("arc_challenge", {"question": "Why?", "choices": FOUR, "answerKey": "C"}, (0, 0, 0)),
    ("piqa", {"goal": "g", "sol1": "push", "sol2": "no", "label": 1}, (1, 0, 0)),
    ("openbookqa", {"question_stem": "s", "choices": FOUR, "answerKey": "B"}, (1, 0, 0)),
    ("boolq", {"passage": "p", "question": "q", "answer": False}, (1, 0, 0)),  # no is shorter than yes
    ("boolq", {"passage": "p", "question": "q", "answer": True}, (0, 1, 1)),
    ("mmlu", {"subject": "law", "question": "q", "choices": ["a", "bb", "c", "d"], "answer": 0}, (1, 1, 1)),  # a tie: A
    ("truthfulqa_mc1", {"question": "q", "mc1_targets": {"choices": ["yes, it is", "no"], "labels": [1, 0]}}, (0, 1, 1)),
    ("winogrande", {"sentence": "A told _ it.", "option1": "B", "option2": "C", "answer": "1"}, (1,)),
    ("winogrande", {"sentence": "A told _ it.", "option1": "B", "option2": "C", "answer": "2"}, (0,)),
]


@pytest.mark.parametrize("name, row, expected", SCORED, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(SCORED)])
def test_multiple_choice_by_hand(letters, tmp_path, monkeypatch, capsys, name, row, expected):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    result, _ = command(monkeypatch, capsys, "--model", letters[0], "--benchmarks", f"{name}={tmp_path / 'a.jsonl'}")
    figures = result["benchmarks"][name]
    assert [figures[key] for key in ("acc", "acc_norm", "acc_bytes")[: len(expected)]] == list(expected)
    assert figures["questions"] == 1 and figures["acc_stderr"] is None


def test_ceval_mc2_lambada_and_text_by_hand(letters, tmp_path, monkeypatch, capsys):
    V = letters[1].vocab_size
    (tmp_path / "accountant_val.csv").write_text("id,question,A,B,C,D,answer\n0,甲？,a,b,c,d,A\n1,乙？,a,b,c,d,C\n", encoding="utf-8")
    rows = {"mc2": {"question": "q", "mc2_targets": {"choices": ["a", "bb", "b"], "labels": [1, 1, 0]}},
            "lambada": {"text": "He saw the sea"}, "text": {"text": "aé bc"}}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    result, line = command(monkeypatch, capsys, "--model", letters[0], "--out", tmp_path / "r.json", "--benchmarks",
                           f"ceval={tmp_path / 'accountant_val.csv'}", f"truthfulqa_mc2={tmp_path / 'mc2.jsonl'}",
                           f"lambada={tmp_path / 'lambada.jsonl'}", f"text={tmp_path / 'text.jsonl'}")
    given = result["benchmarks"]
    assert (given["ceval"]["acc"], given["ceval"]["acc_stderr"]) == (0.5, pytest.approx(0.5))  # A in a tie; sd 0.7071 / sqrt 2
    share = (V**-2 + V**-3) / (V**-2 + V**-3 + V**-2)
    assert given["truthfulqa_mc2"]["acc"] == pytest.approx(share, rel=1e-6)
    assert given["lambada"] == {"questions": 1, "acc": 0.0, "acc_stderr": None, "perplexity": pytest.approx(V**4.0, rel=1e-5)}
    assert given["text"] == {"questions": 1, "word_perplexity": pytest.approx(V**2.5, rel=1e-5),
                             "byte_perplexity": pytest.approx(V ** (5 / 6), rel=1e-5),
                             "bits_per_byte": pytest.approx(5 / 6 * math.log2(V), rel=1e-6)}
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["records"]["ceval"][1]["where"].endswith("accountant_val.csv:3") and "records" not in result
    assert saved["records"]["lambada"][0]["logprob"] == pytest.approx(-4 * math.log(V), rel=1e-6)
    assert "lambada: acc 0.0000" in line and "ceval · acc</th><td>0.5000" in (tmp_path / "r.html").read_text()
    assert not (tmp_path / "r.json.partial.jsonl").exists()


def test_a_bigram_model_prefers_what_its_table_says(tmp_path, monkeypatch, capsys):
    """log p(" yes") = ln p(blank | :) + ln p(y | blank) + ln p(e | y) + ln p(s | e), each from the table."""
    tokenizer = CharTokenizer.train([LETTERS])
    V = tokenizer.vocab_size
    table = [[math.sin(3 * i + 5 * j) for j in range(V)] for i in range(V)]
    letter_folder(tmp_path / "m", bigram(table).float())
    (tmp_path / "b.jsonl").write_text(json.dumps({"passage": "p", "question": "q", "answer": True}) + "\n")
    command(monkeypatch, capsys, "--model", tmp_path / "m", "--benchmarks", f"boolq={tmp_path / 'b.jsonl'}", "--out",
            tmp_path / "r.json", "--dtype", "float64")
    record = json.loads((tmp_path / "r.json").read_text())["records"]["boolq"][0]

    def logp(text):
        ids = tokenizer.encode(":" + text)
        return sum(table[a][b] - math.log(sum(map(math.exp, table[a]))) for a, b in zip(ids, ids[1:]))

    assert record["logprobs"] == pytest.approx([logp(" no"), logp(" yes")], abs=1e-5)  # the weights were stored in float32
    assert record["acc"] == float(logp(" yes") > logp(" no"))


def spoken(monkeypatch, answer):
    """Let the model say answer(its prompt's text, how often it was asked the same) instead of generating."""
    asked = Counter()

    def complete(model, tokenizer, prompts, *, stop, max_new_tokens, temperature, generators):
        texts = []
        for ids in prompts:
            prompt = tokenizer.decode(ids)
            texts.append(answer(prompt, asked[prompt]))
            asked[prompt] += 1
        return texts

    monkeypatch.setattr(evaluate, "complete", complete)


def test_gsm8k_and_math_with_votes_by_hand(letters, tmp_path, monkeypatch, capsys):
    """Three samples a question. GSM8K: 5 5 4 of 5, 1 2 2 of 3. MATH: the box counts for the flexible reading alone."""
    (tmp_path / "g.jsonl").write_text('{"question": "2+3?", "answer": "#### 5"}\n{"question": "1+2?", "answer": "#### 3"}\n')
    (tmp_path / "m.jsonl").write_text('{"problem": "p", "solution": "$\\\\boxed{0.5}$", "type": "Algebra"}\n')
    said = {"2": ["#### 5", "it is 5.", "#### 4"], "1": ["#### 1", "2", "#### 2"],
            "p": [r"\boxed{\frac12}", r"Final Answer: The final answer is $1/2$. I hope it is correct.", "7"]}
    spoken(monkeypatch, lambda prompt, n: said["p" if "Problem" in prompt else prompt.split("Question: ")[-1][0]][n])
    result, _ = command(monkeypatch, capsys, "--model", letters[0], "--num_fewshot", 0, "--num_samples", 3, "--temperature", 1,
                        "--benchmarks", f"gsm8k={tmp_path / 'g.jsonl'}", f"math={tmp_path / 'm.jsonl'}")
    gsm8k, math_ = result["benchmarks"]["gsm8k"], result["benchmarks"]["math"]
    assert (gsm8k["strict"], gsm8k["flexible"], gsm8k["majority"]) == (pytest.approx(1 / 6), pytest.approx(1 / 3), 0.5)
    assert (math_["strict"], math_["flexible"], math_["majority"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)


def test_humaneval_and_mbpp_by_hand(letters, shared_data, tmp_path, monkeypatch, capsys):
    """Four samples: the first problem's own solution twice, a wrong one, an exit; the second's never. pass@1 = 2/4/2."""
    from data.benchmarks import read_benchmark
    path = shared_data / "humaneval" / "HumanEval.jsonl.gz"
    first, second = read_benchmark("humaneval", path, limit=2)
    said = {first.contexts[0]: [first.target, "    return True\n", first.target, "    import os; os._exit(0)\n"],
            second.contexts[0]: ["    return []\n"] * 4}
    monkeypatch.setattr(CharTokenizer, "encode", lambda self, text: list(text.encode()))  # its letters are not all known
    monkeypatch.setattr(CharTokenizer, "decode", lambda self, ids: bytes(ids).decode())
    spoken(monkeypatch, lambda prompt, n: said[prompt][n])
    result, _ = command(monkeypatch, capsys, "--model", letters[0], "--benchmarks", f"humaneval={path}", "--limit", 2,
                        "--num_samples", 4, "--temperature", 0.8, "--out", tmp_path / "r.json")
    figures = result["benchmarks"]["humaneval"]
    assert figures["pass@1"] == 0.25 and figures["pass@4"] == 0.5
    record = json.loads((tmp_path / "r.json").read_text())["records"]["humaneval"][0]
    assert record["passed"] == [True, False, True, False] and record["status"][3] == "exited"

    rows = [{"task_id": n, "text": "Add.", "code": "def add(a, b): return a + b", "test_setup_code": "import math",
             "test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == math.floor(4.5)", "assert add(0, 0) == 0"]}
            for n in (2, 3, 4, 11)]
    (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for code, passed in (("def add(a, b):\n    return a + b\n", 1.0), ("def add(a, b):\n    return 3\n", 0.0)):
        spoken(monkeypatch, lambda prompt, n: code)
        result, _ = command(monkeypatch, capsys, "--model", letters[0], "--benchmarks", f"mbpp={tmp_path / 'mbpp.jsonl'}")
        assert result["benchmarks"]["mbpp"]["pass@1"] == passed


def test_completions_end_before_stop_strings_and_keep_their_first_blank(tmp_path):
    _, tokenizer, _ = chat_folder(tmp_path / "m")
    model = parrot(tokenizer, " 7 up")  # after a newline, whatever stands before it
    prompts = [tokenizer.encode("a\n"), tokenizer.encode("longer\n")]
    assert evaluate.complete(model, tokenizer, prompts, max_new_tokens=9, temperature=0.0)[0].startswith(" 7")
    for stop, expected in ((["7"], " "), (["zz"], None)):
        texts = evaluate.complete(model, tokenizer, prompts, stop=stop, max_new_tokens=9, temperature=0.0)
        assert texts[0] == texts[1] and (expected is None or texts[0] == expected)


# The run: batches, resume, refusals

@pytest.fixture
def questions(tmp_path):
    rng = random.Random(0)
    rows = [{"query": f"{n} " + "q" * rng.randrange(1, 9) + "?", "gold": 2,
             "choices": [rng.choice("abcd") * rng.randrange(1, 9) for _ in range(4)]} for n in range(30)]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "h.jsonl"


@pytest.fixture(scope="module")
def random_letters(tmp_path_factory):
    path = tmp_path_factory.mktemp("random")
    letter_folder(path, tiny(CharTokenizer.train([LETTERS]).vocab_size, torch.float32))
    return path


def records_of(path, name="hellaswag"):
    return json.loads(Path(path).read_text())["records"][name]


def test_records_do_not_depend_on_the_batch_size(random_letters, questions, tmp_path, monkeypatch, capsys):
    found = {}
    for size in (1, 5, 64):
        out = tmp_path / f"{size}.json"
        command(monkeypatch, capsys, "--model", random_letters, "--benchmarks", f"hellaswag={questions}", "--batch_size", size,
                "--out", out)
        found[size] = records_of(out)
        assert [record["question"] for record in found[size]] == list(range(30))
    for one, five, many in zip(*found.values()):
        assert one["logprobs"] == pytest.approx(five["logprobs"], abs=1e-5)
        assert one["logprobs"] == pytest.approx(many["logprobs"], abs=1e-5)


def test_an_interrupted_run_goes_on_and_refuses_other_settings(random_letters, questions, tmp_path, monkeypatch, capsys):
    flags = ["--model", random_letters, "--benchmarks", f"hellaswag={questions}", "--batch_size", 4, "--out"]
    command(monkeypatch, capsys, *flags, tmp_path / "whole.json")
    scored, score = [], likelihood.score

    def until(batch_count):
        def limited(model, batch, *how):
            if len(scored) == batch_count:
                raise KeyboardInterrupt
            scored.append(len(batch))
            return score(model, batch, *how)
        monkeypatch.setattr(likelihood, "score", limited)

    until(5)
    partial, out = tmp_path / "cut.json.partial.jsonl", tmp_path / "cut.json"
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, capsys, *flags, out)
    rows = partial.read_text().splitlines()
    assert len(rows) == 1 + 5 and not out.exists()  # settings, and a record for each whole batch of four choices
    partial.write_text("\n".join(rows) + '\n{"benchmark": "hella')  # a kill tears the last line
    for more in (["--limit", "9"], ["--dtype", "float64"], ["--num_fewshot", "1"], ["--seed", "1"]):
        with pytest.raises(ValueError, match="cut.json.partial.jsonl: was begun with other .*: delete it, or change --out"):
            command(monkeypatch, capsys, *flags, out, *more)
    until(99)
    result, line = command(monkeypatch, capsys, *flags, out)
    assert "going on after 5 questions" in line and len(scored) == 30 and not partial.exists()
    assert records_of(out) == records_of(tmp_path / "whole.json") and result["benchmarks"]["hellaswag"]["questions"] == 30


def test_contexts_longer_than_the_model_are_cut_counted_and_told(letters, tmp_path, monkeypatch, capsys):
    rows = [{"query": "q" * n, "choices": ["aa", "b", "cc", "dd"], "gold": 1} for n in (3, 40)]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result, line = command(monkeypatch, capsys, "--model", letters[0], "--benchmarks", f"hellaswag={tmp_path / 'h.jsonl'}",
                           "--seq_len", 10)
    assert "note: 4 of 8 contexts are too long for 10 tokens: cut at their beginning" in line
    assert result["benchmarks"]["hellaswag"]["acc"] == 1
    rows[0]["choices"][2] = "c" * 30
    (tmp_path / "h.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match="h.jsonl:1: a continuation of 31 tokens does not fit into 10"):
        command(monkeypatch, capsys, "--model", letters[0], "--benchmarks", f"hellaswag={tmp_path / 'h.jsonl'}", "--seq_len", 10)


@pytest.mark.parametrize("flags, message", [
    (["--benchmarks", "hellaswig=x"], "there is no benchmark 'hellaswig'; there are hellaswag, "),
    (["--benchmarks", "hellaswag"], "hellaswag: give NAME=FILE or NAME=FOLDER"),
    (["--benchmarks", "piqa=x", "piqa=y"], "piqa=y: give NAME=FILE or NAME=FOLDER, and each name once"),
    (["--benchmarks", "piqa=no/such.jsonl"], "no/such.jsonl: no such file"),
    (["--benchmarks", "piqa={file}"], "h.jsonl:1: no row of piqa"),
    (["--benchmarks", "hellaswag={file}", "--num_samples", "4"], "--num_samples 4 at temperature 0"),
    (["--benchmarks", "hellaswag={file}", "--limit", "0"], "limit is 0; it must be at least 1"),
    (["--benchmarks", "hellaswag={file}", "--fewshot", "piqa={file}"], "--fewshot piqa: is not among --benchmarks"),
    (["--benchmarks", "hellaswag={file}", "--contamination", "no"], "no: no index.json"),
    (["--contamination", "x"], "--contamination looks for the questions of --benchmarks"),
    (["--needle_lengths", "9999"], "--needle_lengths 9999: the model's context is 4096 tokens"),
    (["--needle_lengths", "20"], "a length of 20 tokens: needles and question alone take")])
def test_what_benchmarks_refuse(letters, questions, monkeypatch, capsys, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        command(monkeypatch, capsys, "--model", letters[0], *(flag.format(file=questions) for flag in flags))


def test_a_model_without_a_tokenizer_is_refused(letters, questions, tmp_path, monkeypatch, capsys):
    shutil.copytree(letters[0], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(FileNotFoundError, match="bare: no tokenizer in this folder"):
        command(monkeypatch, capsys, "--model", tmp_path / "bare", "--benchmarks", f"hellaswag={questions}")


def test_gguf_and_llama2c_files_are_models_too(shared_data, tmp_path, monkeypatch, capsys):
    path = shared_data / "checkpoints" / "stories260K" / "stories260K.bin"
    (tmp_path / "t.txt").write_text("Once upon a time, there was a little girl named Lily. She loved to play outside.")
    result, _ = command(monkeypatch, capsys, "--model", path, "--benchmarks", f"text={tmp_path / 't.txt'}")
    assert result["benchmarks"]["text"]["bits_per_byte"] < 1.2  # text such as it was trained on
    shutil.copy(path, tmp_path / "alone.bin")
    with pytest.raises(ValueError, match="alone.bin: no tokenizer comes with this file"):
        command(monkeypatch, capsys, "--model", tmp_path / "alone.bin", "--benchmarks", f"text={tmp_path / 't.txt'}")


def test_contaminated_questions_are_marked_and_left_out_of_the_clean_figures(letters, tmp_path, monkeypatch, capsys):
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    rows = [{"query": f"{text} and", "choices": ["aa", "b", "cc", "dd"], "gold": 1},
            {"query": text.replace("two", "2") + " more words here", "choices": ["aa", "b", "cc", "dd"], "gold": 2},
            {"query": "short", "choices": ["aa", "b", "cc", "dd"], "gold": 1}]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_shards(tmp_path / "shards", {"train": [Document("a", f"He said: {text.upper()}!")]}, letters[1])
    result, line = command(monkeypatch, capsys, "--model", letters[0], "--benchmarks", f"hellaswag={tmp_path / 'h.jsonl'}",
                           "--contamination", tmp_path / "shards", "--out", tmp_path / "r.json")
    figures = result["benchmarks"]["hellaswag"]
    assert (figures["contaminated"], figures["too_short_to_tell"]) == (1, 1) and figures["acc"] == pytest.approx(2 / 3)
    assert figures["clean"]["questions"] == 1 and figures["clean"]["acc"] == 0
    assert [record["contaminated"] for record in records_of(tmp_path / "r.json")] == [True, False, None]
    assert "hellaswag: 1 of 3 questions stand in" in line


def test_needles_of_the_command(letters, tmp_path, monkeypatch, capsys):
    (tmp_path / "hay.txt").write_text("It rained. Nobody came. " * 20)
    monkeypatch.setattr(evaluate, "complete", lambda model, tokenizer, prompts, **how: [
        " " + tokenizer.decode(ids).split("is ")[1][:4] if len(ids) < 150 else " no" for ids in prompts])
    result, _ = command(monkeypatch, capsys, "--model", letters[0], "--needle_lengths", 120, 200, "--needle_depths", 0, 100,
                        "--haystack", tmp_path / "hay.txt", "--out", tmp_path / "n.json")
    assert [(row["length"], row["depth"], row["found"]) for row in result["needles"]] == [
        (120, 0, 1), (120, 100, 1), (200, 0, 0), (200, 100, 0)]
    assert (tmp_path / "n.html").read_text().count("<rect") == 4


def test_an_always_first_judge_scores_half(letters, tmp_path, monkeypatch, capsys):
    tokenizer = letters[1]
    table = torch.zeros(tokenizer.vocab_size, tokenizer.vocab_size)
    blank, a, b = (tokenizer.encode(letter)[0] for letter in " AB")
    table[blank, a], table[blank, b] = 3, 1  # always "A", for it looks at the last letter alone
    letter_folder(tmp_path / "m", bigram(table.tolist()).float())
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": "q", "chosen": f"{n}", "rejected": "no"}) + "\n" for n in range(5)))
    result, line = command(monkeypatch, capsys, "--model", tmp_path / "m", "--judge", tmp_path / "p.jsonl")
    assert result["judge"] == {"pairs": 5, "win_rate": 0.5, "win_rate_stderr": 0.0, "consistent": 0.0, "first": 1.0}
    assert "`chosen` wins 50.0% of 5 pairs, 0% both ways round" in line
    fair, _ = command(monkeypatch, capsys, "--model", letters[0], "--judge", tmp_path / "p.jsonl")  # never knows
    assert fair["judge"]["win_rate"] == 0.5 == fair["judge"]["first"] and fair["judge"]["consistent"] == 1.0


def test_a_judge_that_reads_takes_the_better_answer(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "2+2?", "chosen": "4", "rejected": "5"}\n{"prompt": "1?", "chosen": "2", "rejected": "1"}\n')
    right = lambda prompt: 1.0 if ("Answer A: 4" in prompt or "Answer A: 1" in prompt) else 0.0  # noqa: E731
    args = evaluate.Args(model="", judge=[str(tmp_path / "p.jsonl")])
    assert evaluate.evaluate_judge(args, lambda prompts: list(map(right, prompts)))["win_rate"] == 0.5
    assert evaluate.evaluate_judge(args, lambda prompts: [1.0, 0.0] * 2)["win_rate"] == 1.0


# lm-evaluation-harness on the same exported model

def test_log_likelihoods_and_accuracies_equal_the_harness(shared_data, tmp_path, monkeypatch, capsys):
    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval or transformers is not installed")
    from lm_eval.api.instance import Instance
    from convert import load_pretrained, load_pretrained_tokenizer, save_pretrained
    from data.benchmarks import read_benchmark
    path = shared_data / "checkpoints" / "stories260K" / "stories260K.bin"
    save_pretrained(load_pretrained(path), tmp_path / "hf", load_pretrained_tokenizer(path))
    files = {"hellaswag": "hellaswag/hellaswag_val_1000.jsonl", "arc_easy": "core_eval/world_knowledge/arc_easy.jsonl",
             "winogrande": "core_eval/language_understanding/winogrande.jsonl",
             "lambada": "core_eval/language_understanding/lambada_openai.jsonl"}
    peer = huggingface.HFLM(pretrained=str(tmp_path / "hf"), device="cpu", batch_size=8, dtype="float32")
    for bos in (True, False):
        peer.add_bos_token = bos
        for size in (1, 16) if bos else (5,):
            out = tmp_path / f"{bos}{size}.json"
            command(monkeypatch, capsys, "--model", tmp_path / "hf", "--limit", 5, "--batch_size", size, "--out", out,
                    "--add_bos_token" if bos else "--no_add_bos_token",
                    "--benchmarks", *(f"{name}={shared_data / file}" for name, file in files.items()))
            for name, file in files.items():
                items = read_benchmark(name, shared_data / file, limit=5)
                asked = [(context, f" {choice}") for item in items for context in item.contexts for choice in item.choices]
                theirs = iter(peer.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)], True))
                for item, record in zip(items, records_of(out, name)):
                    found = [next(theirs) for _ in range(len(item.contexts) * len(item.choices))]
                    ours = record.get("logprobs", [record.get("logprob")])
                    assert ours == pytest.approx([logp for logp, _ in found], abs=1e-4)
                    best = lambda lengths: max(range(len(found)), key=lambda i: found[i][0] / lengths[i])  # noqa: E731
                    if name in ("hellaswag", "arc_easy"):
                        assert record["acc"] == (best([1] * 9) == item.gold[0])
                        assert record["acc_norm"] == (best([len(choice) for choice in item.choices]) == item.gold[0])
                    elif name == "lambada":
                        assert record["acc"] == found[0][1]
    texts = ["Once upon a time, there was a little girl named Lily. " * 60, "The dog ran. " * 3]
    theirs = peer.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)], True)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command(monkeypatch, capsys, "--model", tmp_path / "hf", "--benchmarks", f"text={tmp_path / 't.jsonl'}", "--out", tmp_path / "t.json")
    assert [record["logprob"] for record in records_of(tmp_path / "t.json", "text")] == pytest.approx(theirs, abs=1e-3)
