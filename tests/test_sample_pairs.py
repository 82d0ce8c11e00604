"""Pairs of a model's own answers, against each answer drawn alone and graded by hand."""

import json

import pytest
import torch

import checkpoint
import sample_pairs
from data.chat import prepare_tokenizer, render_prompt, stop_ids
from data.tokenizer import BPETokenizer
from generate import generate, row_generator
from model import CausalLM, ModelConfig

QUESTIONS = ["hello", "world", "the quick brown fox", "lazy dog", "and"]
K = 3


@pytest.fixture(scope="module")
def talker():
    """A random model that says short things, and its tokenizer."""
    tokenizer = BPETokenizer.train(["hello world, the quick brown fox and the lazy dog\n" * 3], vocab_size=300)
    prepare_tokenizer(tokenizer, "chatml")
    return CausalLM(ModelConfig(tokenizer.vocab_size, 16, 32, 2, 2, initializer_range=0.3)).double().eval(), tokenizer


@pytest.fixture(scope="module")
def alone(talker):
    """answers[task][number]: what the model says when nothing else is in the batch."""
    model, tokenizer = talker
    stops, answers = stop_ids(tokenizer, "chatml"), []
    for task, question in enumerate(QUESTIONS):
        ids = render_prompt([{"role": "user", "content": question}], tokenizer, "chatml")
        drawn = [generate(model, [ids], max_new_tokens=4, stop_token_ids=stops, vocab_size=tokenizer.vocab_size,
                          generators=[row_generator(7, task * K + number)])[0] for number in range(K)]
        answers.append([tokenizer.decode([token for token in row if token not in stops]) for row in drawn])
    return answers


def tasks(answers: list[str]) -> list[dict]:
    return [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
             "family": "words", "answer": answer.strip()} for question, answer in zip(QUESTIONS, answers, strict=True)]


@pytest.mark.parametrize("batch_size", [1, 6, 100])
def test_the_first_right_answer_stands_against_the_first_wrong_one_whatever_the_batch(talker, alone, batch_size):
    assert all(len({text.strip() for text in texts}) == K for texts in alone)  # all differ: one right, two wrong
    rows = tasks([alone[0][0], alone[1][1], alone[2][2], "never said", alone[4][0]])
    pairs = sample_pairs.sample_pairs(*talker, rows, "chatml", num_samples=K, max_new_tokens=4, seed=7,
                                      batch_size=batch_size)
    said = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in pairs]
    assert said == [(alone[0][0], alone[0][1]), (alone[1][1], alone[1][0]), (alone[2][2], alone[2][0]),
                    (alone[4][0], alone[4][1])]
    assert [row["prompt"] for row in pairs] == [rows[i]["messages"][:1] for i in (0, 1, 2, 4)]


@pytest.fixture
def folder(talker, tmp_path):
    (tmp_path / "model").mkdir()
    checkpoint.save_model(tmp_path / "model", *talker)
    return tmp_path / "model"


def command(folder, tmp_path, rows, **flags):
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = dict(model=folder, tasks=tmp_path / "tasks.jsonl", out=tmp_path / "own" / "pairs.jsonl", max_new_tokens=4,
                 num_samples=K, seed=7) | flags
    sample_pairs.main([word for name, value in words.items() for word in (f"--{name}", str(value))])
    return [json.loads(line) for line in words["out"].read_text().splitlines()]


def test_the_command_writes_what_the_function_gives(folder, talker, alone, tmp_path):
    rows = tasks([texts[1] for texts in alone])
    expected = sample_pairs.sample_pairs(*talker, rows, "chatml", num_samples=K, max_new_tokens=4, seed=7)
    assert command(folder, tmp_path, rows) == expected and len(expected) == 5


def test_what_cannot_work_is_refused_and_leaves_no_file(folder, tmp_path):
    with pytest.raises(ValueError, match="no task of 5 had both a right and a wrong answer among 3"):
        command(folder, tmp_path, tasks(["never said"] * 5))
    with pytest.raises(ValueError, match="at least 2 answers"):
        command(folder, tmp_path, tasks(["x"] * 5), num_samples=1)
    with pytest.raises(ValueError, match="above 0"):
        command(folder, tmp_path, tasks(["x"] * 5), temperature=0)
    assert not (tmp_path / "own").exists()
