"""data/tasks.py: answers against a solver of the test's own, splits that share nothing, pairs that differ in a slip."""

import ast
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data import tasks
from data.corpus import split_documents

ROOT = Path(__file__).resolve().parents[1]


def prompt(row):
    return (row["messages"] if "messages" in row else row["prompt"])[0]["content"]


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def operands(family, text):
    """What the prompt asks about, read from the prompt alone; the order of summands and of compared numbers is none."""
    if family in ("add", "add_steps", "compare"):
        return tuple(sorted(numbers(text)))
    if family == "count":
        letter, letters = re.fullmatch(r"(?:How many|Count the letter) (\w)(?: in|:) ([a-z ]+)\??", text).groups()
        return letter, *letters.split()
    return tuple(text.split(": ")[1].split())


def solve(family, text):
    found = operands(family, text)
    if family in ("add", "add_steps"):
        return str(sum(found))
    if family == "compare":
        return str(found[-1] if "largest" in text else found[0])
    if family == "count":
        return str(Counter(found[1:])[found[0]])
    return {"Sort the list": lambda x: " ".join(sorted(x)), "Reverse the list": lambda x: " ".join(reversed(x)),
            "What comes first in the list": lambda x: x[0], "What comes last in the list": lambda x: x[-1],
            "Reverse the letters": lambda x: " ".join(reversed(x)), "Repeat the letters": lambda x: " ".join(x + x),
            "Double each letter": lambda x: " ".join(f"{c} {c}" for c in x),
            "Write in capitals": lambda x: " ".join(x).upper()}[text.split(":")[0]](found)


@pytest.fixture(scope="module")
def rows():
    return {"train": list(tasks.make_tasks("train", 24_000)), "val": list(tasks.make_tasks("val", 1_800))}


@pytest.fixture(scope="module")
def pairs():
    return {"train": list(tasks.preference_pairs("train", 4_000)), "val": list(tasks.preference_pairs("val", 400))}


# ---- tasks

def test_every_answer_is_right_and_no_other_is_graded_so(rows):
    for row in rows["train"] + rows["val"]:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        right = solve(row["family"], user["content"])
        assert row["answer"] == right and tasks.grade(row, assistant["content"]), row
        assert tasks.grade(row, f" {right}\n") and not tasks.grade(row, right + "1") and not tasks.grade(row, "")


def test_worked_steps_are_true_sums_that_lead_to_the_answer(rows):
    for row in rows["train"]:
        if row["family"] != "add_steps":
            continue
        *steps, last = row["messages"][1]["content"].split("\n")
        sums = [step.split("=") for step in steps]
        assert len(steps) == 3 and all(sum(numbers(left)) == int(right) for left, right in sums)
        a, b = numbers(prompt(row))
        assert [numbers(left)[:2] for left, _ in sums] == [[a // 10**k % 10, b // 10**k % 10] for k in range(3)]
        carries = [numbers(left)[2] for left, _ in sums[1:]]
        assert carries == [int(right) // 10 for _, right in sums[:2]]
        assert last == f"Answer: {a + b}"


def test_grading_takes_what_follows_the_last_marker():
    row = {"family": "add_steps", "answer": "632"}
    assert tasks.grade(row, "5+7=12\nAnswer: 631\nAnswer: 632 ") and tasks.grade(row, "632")
    assert not tasks.grade(row, "Answer: 632\nAnswer: 631") and not tasks.grade(row, "Answer: 632.")
    assert not tasks.grade(row, "It is 632")
    rows = [row, {"family": "add", "answer": "3"}, {"family": "add_steps", "answer": "4"}]
    assert tasks.grade_by_family(rows, ["632", "2", "5"]) == {"add_steps": (1, 2), "add": (0, 1)}
    with pytest.raises(ValueError):
        tasks.grade_by_family(rows, ["632"])


def test_more_than_ten_thousand_prompts_and_none_twice(rows):
    prompts = [prompt(row) for split in rows.values() for row in split]
    assert len(set(prompts)) == len(prompts) == 25_800
    for split in rows.values():
        assert set(Counter(row["family"] for row in split).values()) == {len(split) // 6}


def test_no_operands_are_shared_by_the_splits(rows, pairs):
    """Of the pairs, too: what DPO trains on is not what it is measured on, nor what SFT is measured on."""
    seen = {split: {(row["family"] in ("add", "add_steps"), operands(row["family"], prompt(row)))
                    for row in rows[split] + pairs[split] if row["family"] in tasks.FAMILIES} for split in rows}
    assert not seen["train"] & seen["val"] and len(seen["train"]) > 15_000
    again = {operands(row["family"], prompt(row)) for seed in (1, 2) for row in tasks.make_tasks("val", 600, seed)}
    assert not again & {found for _, found in seen["train"]}  # another seed holds out the same operands


def test_a_sum_and_its_commuted_form_fall_on_one_side():
    sides = {split: {tuple(numbers(prompt(row))) for row in tasks.make_tasks(split, n) if row["family"] == "add"}
             for split, n in (("train", 18_000), ("val", 2_000))}
    assert sum((b, a) in sides["val"] for a, b in sides["val"] if a != b) > 20  # it does happen
    assert not any((b, a) in sides["train"] for a, b in sides["val"])


def test_the_held_out_share_is_a_tenth_by_the_stated_rule():
    keys = [repr((a, b)) for a in range(100) for b in range(a, 100)]
    share = sum(map(tasks.held_out, keys)) / len(keys)
    assert 0.085 < share < 0.115  # 5050 keys: a standard deviation is 0.004
    for key in keys[:100]:
        assert tasks.held_out(key) == (int(hashlib.sha256(key.encode()).hexdigest(), 16) < 0.1 * 2**256)


def test_each_fold_holds_out_another_tenth_and_together_they_are_all():
    keys = [repr((a, b)) for a in range(50) for b in range(a, 50)]
    folds = [{key for key in keys if tasks.held_out(key, fold)} for fold in range(10)]
    assert sum(map(len, folds)) == len(set().union(*folds)) == len(keys)
    held = {operands("add", prompt(row)) for row in tasks.make_tasks("val", 600, fold=1) if row["family"] == "add"}
    assert not held & {operands("add", prompt(row)) for row in tasks.make_tasks("val", 600) if row["family"] == "add"}
    learned = {operands("add", prompt(row)) for row in tasks.make_tasks("train", 18_000, fold=1) if row["family"] == "add"}
    assert held and not held & learned


def test_a_seed_decides_everything(pairs):
    first = list(tasks.make_tasks("val", 60, seed=3))
    assert first == list(tasks.make_tasks("val", 120, seed=3))[:60]
    assert first != list(tasks.make_tasks("val", 60, seed=4))
    assert list(tasks.preference_pairs("val", 40)) == pairs["val"][:40]
    assert list(tasks.preference_pairs("val", 40, seed=4)) != pairs["val"][:40]
    digest = hashlib.sha256(json.dumps(first).encode()).hexdigest()
    assert digest.startswith("c17e388b6eb509d3")  # on every machine and Python version


def test_no_single_answer_is_a_good_guess(rows):
    for family in tasks.FAMILIES:
        answers = Counter(row["answer"] for row in rows["train"] if row["family"] == family)
        assert answers.most_common(1)[0][1] < 0.2 * sum(answers.values()), (family, answers.most_common(3))


def test_what_cannot_be_had_is_refused():
    with pytest.raises(ValueError, match='"train" or "val", not \'test\''):
        next(tasks.make_tasks("test", 1))
    with pytest.raises(ValueError, match='"train" or "val", not \'test\''):
        next(tasks.docstring_tasks("test"))
    with pytest.raises(ValueError, match="'val' has only .* prompts, for add has no more"):
        list(tasks.make_tasks("val", 9_000))
    with pytest.raises(ValueError, match="more functions than the"):
        list(tasks.preference_pairs("val", 20_000))


# ---- pairs

def test_the_rejected_answer_is_wrong_and_of_the_same_form(rows, pairs):
    forms = {"add": r"\d+", "add_steps": r"(\d\+\d(\+\d)?=\d+\n){3}Answer: [1-9]\d+", "compare": r"\d\d",
             "count": r"\d", "list": r"\d( \d)*", "string": r"([a-z]( [a-z])+|[A-Z]( [A-Z])+)"}
    for row in pairs["train"] + pairs["val"]:
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        assert chosen["role"] == rejected["role"] == "assistant" and chosen["content"] != rejected["content"]
        if (family := row["family"]) in tasks.FAMILIES:
            answered = {"family": family, "answer": solve(family, prompt(row))}
            assert tasks.grade(answered, chosen["content"]) and not tasks.grade(answered, rejected["content"]), row
            assert all(re.fullmatch(forms[family], side["content"]) for side in (chosen, rejected)), row
            if family in ("list", "string", "compare", "count"):
                assert len(chosen["content"]) == len(rejected["content"])
            if family == "add_steps":  # the same steps: what differs is the last thing written
                assert chosen["content"].split("\n")[:3] == rejected["content"].split("\n")[:3]
        else:
            assert abs(len(chosen["content"]) - len(rejected["content"])) <= 40, row


def test_pairs_come_from_all_families_and_no_prompt_twice(pairs):
    for split, count in (("train", 4_000), ("val", 400)):
        families = dict.fromkeys((*tasks.FAMILIES, "docstring", "function"), count // 8)
        assert Counter(row["family"] for row in pairs[split]) == families
        assert len({prompt(row) for row in pairs[split]}) == count
    assert not {prompt(row) for row in pairs["train"]} & {prompt(row) for row in pairs["val"]}


def test_corrupted_code_is_another_program(pairs):
    kinds = Counter()
    for row in pairs["train"]:
        if row["family"] == "function":
            real, corrupted = row["chosen"][0]["content"], row["rejected"][0]["content"]
            ast.parse(real)
            a, b = real.split("\n"), corrupted.split("\n")
            assert len(a) == len(b)
            changed = [i for i in range(len(a)) if a[i] != b[i]]
            assert len(changed) == 1 or (len(changed) == 2 and sorted(a) == sorted(b))  # one slip, not a mess
            only_indent = a[changed[0]].strip() == b[changed[0]].strip()
            kinds["order" if len(changed) == 2 else "indent" if only_indent else "word"] += 1
            try:
                assert ast.dump(ast.parse(corrupted)) != ast.dump(ast.parse(real))
            except SyntaxError:
                pass
    assert min(kinds["order"], kinds["indent"], kinds["word"]) > 50
    words = [[side[0]["content"].split() for side in (row["chosen"], row["rejected"])]
             for row in pairs["train"] if row["family"] == "docstring"]
    assert len(words) == 500 and all(a != b and sorted(a) == sorted(b) for a, b in words)


# ---- code

def test_code_is_held_out_by_file_like_the_embedded_corpus():
    code = {split: list(tasks.docstring_tasks(split)) for split in ("train", "val")}
    assert len(code["train"]) > 2_000 and len(code["val"]) > 100
    assert not {prompt(row) for row in code["train"]} & {prompt(row) for row in code["val"]}
    files = {split: [d.text for d in split_documents(["stdlib:modules"], 0.1, split)] for split in code}
    text = {split: "".join(texts) for split, texts in files.items()}
    for split, rows in code.items():
        heads = [row["answer"].split("\n")[0] for row in rows if row["family"] == "function"]
        assert sum(head in text[split] for head in heads) > 0.95 * len(heads)  # the corpus leaves a few files out
    read = {f.source for module in files["train"] for f in tasks.functions_of(module)}
    asked = [row["answer"] for row in code["val"] if row["family"] == "function"]
    assert sum(answer in read for answer in asked) < 0.05 * len(asked)  # one-liners that many files have, at most


def test_code_chats_fit_together():
    by_name = {}
    for row in tasks.docstring_tasks("val"):
        by_name.setdefault(row["family"], []).append(row)
    for doc, function in zip(by_name["docstring"], by_name["function"], strict=True):
        node = ast.parse(function["answer"]).body[0]
        assert prompt(function) == f"Write the function {node.name}: {doc['answer']}"
        assert prompt(doc).startswith(f"Write a docstring for def {node.name}(")
        assert ast.get_docstring(node) is None and function["messages"][1]["content"] == function["answer"]


def test_functions_are_found_as_python_sees_them():
    text = '''
class A:
    def method(self, x):
        """Return twice the
        given x.

        More."""
        # by addition

        return x + x

    def silent(self):
        return 1

    def only(self):
        """Nothing else is in this one."""

def long(
    a,
    b=2,
):
    """Takes several lines."""
    return (a,
            b)
'''
    found = list(tasks.functions_of(text))
    assert found[0] == ("method", "def method(self, x):", "Return twice the given x.",
                        "def method(self, x):\n    # by addition\n    return x + x")
    assert [f.name for f in found] == ["method"]  # `long` ends its signature at the left edge


# ---- the command

def run(*arguments):
    command = [sys.executable, str(ROOT / "data" / "tasks.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_writes_what_it_prints(tmp_path):
    done = run("--out", tmp_path / "tasks", "--train", 60, "--val", 12, "--pairs", 16, "--val_pairs", 8, "--seed", 5)
    assert done.returncode == 0, done.stderr
    files = {path.name: [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
             for path in (tmp_path / "tasks").iterdir()}
    assert set(files) == {f"{kind}_{split}.jsonl" for kind in ("sft", "pairs", "code") for split in ("train", "val")}
    assert files["sft_train.jsonl"] == list(tasks.make_tasks("train", 60, 5))
    assert files["pairs_val.jsonl"] == list(tasks.preference_pairs("val", 8, 5))
    for name, rows in files.items():
        families = Counter(row["family"] for row in rows)
        counts = ", ".join(f"{family} {n}" for family, n in families.items())
        assert f"{name}: {len(rows)} rows, {counts}\n" in done.stdout
        for row in rows[: len(families)] if "_val" in name else []:
            assert json.dumps(prompt(row), ensure_ascii=False) in done.stdout


@pytest.mark.parametrize("arguments, message", [
    (("--train", -1), "error: --train -1: must be at least 0"),
    (("--val", 50_000), "error: 'val' has only"),
])
def test_bad_input_gets_one_line_and_leaves_nothing(arguments, message, tmp_path):
    done = run("--out", tmp_path / "tasks", *arguments)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert not (tmp_path / "tasks").exists()


@pytest.mark.parametrize("of, families", [("code", {"docstring", "function"}), ("tasks", set(tasks.FAMILIES)),
                                          ("all", {*tasks.FAMILIES, "docstring", "function"})])
def test_pairs_are_of_what_was_asked_for_in_equal_shares(of, families):
    found = Counter(row["family"] for row in tasks.preference_pairs("val", 48, of=of))
    assert found == {family: 48 // len(families) for family in families}


def test_tasks_are_read_back_and_a_wrong_line_is_named(tmp_path):
    rows = list(tasks.make_tasks("val", 12))
    path = tmp_path / "t.jsonl"
    tasks.write_rows(path, rows)
    assert list(tasks.read_tasks([str(path)])) == [(f"{path}:{i}", row) for i, row in enumerate(rows, 1)]
    for line in ("{", "[]", '{"messages": [], "family": "a", "answer": "b"}', '{"messages": [{"role": "user"}], "family": 1}',
                 json.dumps(rows[0] | {"answer": 3})):
        path.write_text(json.dumps(rows[0]) + "\n" + line + "\n")
        with pytest.raises(ValueError, match="t.jsonl:2: expected a task"):
            list(tasks.read_tasks([str(path)]))
