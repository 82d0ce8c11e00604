"""Small chat tasks whose answers can be checked, so that what each training stage gains is a number.

    python data/tasks.py --out out/tasks --train 20000 --val 500 --pairs 4000 --val_pairs 400
    python data/tasks.py          # writes nothing: shows counts and examples

    sft_train.jsonl, sft_val.jsonl       {"messages": [user, assistant], "family", "answer"}         make_tasks
    pairs_train.jsonl, pairs_val.jsonl   {"prompt": [user], "chosen": [assistant], "rejected": ...}  preference_pairs
    code_train.jsonl, code_val.jsonl     docstring -> function, signature -> docstring, real code    docstring_tasks

Six families, made for a model of a million weights: what counts is one token each, as digits are in most tokenizers
and letters are when a space stands before them.

    add        What is 27 + 45?                          72
    add_steps  Add 345 and 287 step by step.             5+7=12, 4+8+1=13, 3+2+1=6, Answer: 632    (one step a line)
    compare    Which number is largest: 47 82 19 33?     82
    count      How many a in d a c a f a?                3
    list       Sort the list: 4 7 1 9                    1 4 7 9
    string     Reverse the letters: k a t                t a k

Held out by operands: a task is in "val" if the sha256 of its operands lies in the lowest tenth. Neither the seed nor
the phrasing nor the order of a sum has a part in this: with 12 + 7 held out, no training prompt adds 7 and 12, and a
held-out list is neither sorted nor reversed in training. Code is held out by file, as data/corpus.py does it at its
usual --val_fraction 0.1: no file that the base model has read is asked for in an evaluation. Settings chosen by what
they score on the held-out tenth flatter themselves there: choose them with --fold 1, which holds out the next tenth.
"""

import argparse
import ast
import hashlib
import io
import json
import keyword
import os
import random
import re
import sys
import sysconfig
import textwrap
import tokenize
import warnings
from collections import Counter
from fnmatch import fnmatch
from itertools import cycle, islice
from pathlib import Path
from typing import Iterator, NamedTuple

HELD_OUT = 0.1  # share of operands, and of source files, that training never sees
MARKER = "Answer:"  # what follows its last occurrence is the answer; without one, the whole text is
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "config-*")  # no part of the corpus
BLOCK = re.compile(r"^( *)def .*(?:\n(?:\1 .*|(?=\n)))*", re.MULTILINE)  # def, and what is indented further
OPPOSITE = {"==": "!=", "<": ">", "<=": ">=", "+": "-", "+=": "-=", "and": "or", "True": "False", "min": "max"}
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}  # of operators, and words that act like one


class Task(NamedTuple):
    operands: tuple  # decides the split; the same for all prompts that ask the same thing
    question: str
    answer: str
    wrong: str       # an answer of the same form, as somebody might give who slips once
    steps: str = ""  # what is written before either answer


def held_out(key: str, fold: int = 0) -> bool:
    """Whether what `key` names belongs to "val": fold 0 by the rule of data/corpus.py, sha256 / 2^256 < HELD_OUT."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")
    return fold * HELD_OUT * 2**256 <= place < (fold + 1) * HELD_OUT * 2**256


# ---- families: each draws one task

def add(rng: random.Random) -> Task:
    a, b = rng.randrange(50), rng.randrange(50)
    question = rng.choice((f"What is {a} + {b}?", f"Add {a} and {b}.", f"{a} + {b} = ?"))
    return Task((min(a, b), max(a, b)), question, str(a + b), wrong_sum(rng, a, b))


def add_steps(rng: random.Random) -> Task:
    """Written addition of three-digit numbers, from the last column; the third summand is the carry."""
    a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
    question = rng.choice((f"Add {a} and {b} step by step.", f"What is {a} + {b}? Show the steps."))
    steps, carry = [], 0
    for column in range(3):
        x, y = a // 10**column % 10, b // 10**column % 10
        total = x + y + carry
        steps.append(f"{x}+{y}+{carry}={total}" if column else f"{x}+{y}={total}")
        carry = total // 10
    # The wrong answer comes after right steps: a slip in an early step would change what all later tokens see, and DPO
    # learns from such pairs to doubt right steps, too, which costs this family nearly all of its exact match.
    return Task((min(a, b), max(a, b)), question, str(a + b), wrong_sum(rng, a, b), "\n".join(steps))


def compare(rng: random.Random) -> Task:
    numbers = rng.sample(range(10, 100), 4)
    word, pick = rng.choice((("largest", max), ("smallest", min)))
    question = rng.choice((f"Which number is {word}: {spaced(numbers)}?", f"Find the {word} of {spaced(numbers)}."))
    answer = pick(numbers)
    wrong = rng.choice([n for n in numbers if n != answer])
    return Task(tuple(sorted(numbers)), question, str(answer), str(wrong))


def count(rng: random.Random) -> Task:
    letters = LETTERS[:8]  # few, so that each is met often
    times, letter = rng.randrange(6), rng.choice(letters)  # the count first: so each is as frequent as any other
    others = [rng.choice(letters.replace(letter, "")) for _ in range(rng.randrange(max(0, 3 - times), 8 - times))]
    text = rng.sample([letter] * times + others, times + len(others))
    question = rng.choice((f"How many {letter} in {spaced(text)}?", f"Count the letter {letter}: {spaced(text)}"))
    return Task((letter, *text), question, str(times), str(abs(times + rng.choice((-1, 1)))))


def list_(rng: random.Random) -> Task:
    items = [rng.randrange(10) for _ in range(rng.randrange(3, 6))]
    question, answer = rng.choice((("Sort the list", sorted(items)), ("Reverse the list", items[::-1]),
                                   ("What comes first in the list", items[:1]),
                                   ("What comes last in the list", items[-1:])))
    return Task(tuple(items), f"{question}: {spaced(items)}", spaced(answer), spaced(slip(rng, answer, range(10))))


def string(rng: random.Random) -> Task:
    letters = [rng.choice(LETTERS) for _ in range(rng.randrange(3, 6))]
    question, answer = rng.choice((("Reverse the letters", letters[::-1]), ("Repeat the letters", letters * 2),
                                   ("Double each letter", [c for c in letters for _ in range(2)]),
                                   ("Write in capitals", [c.upper() for c in letters])))
    wrong = slip(rng, answer, LETTERS.upper() if answer[0].isupper() else LETTERS)
    return Task(tuple(letters), f"{question}: {spaced(letters)}", spaced(answer), spaced(wrong))


FAMILIES = {"add": add, "add_steps": add_steps, "compare": compare, "count": count, "list": list_, "string": string}


def wrong_sum(rng: random.Random, a: int, b: int) -> str:
    """a + b with one digit off by one, or with the first carry missed; where there is none, with one too many."""
    if rng.randrange(2):
        return str(a + b - 10 if a % 10 + b % 10 > 9 else a + b + 10)
    digits = str(a + b)
    at = rng.randrange(len(digits))
    lowest = 1 if at == 0 and len(digits) > 1 else 0
    near = [d for d in (int(digits[at]) - 1, int(digits[at]) + 1) if lowest <= d <= 9]
    return f"{digits[:at]}{rng.choice(near)}{digits[at + 1:]}"


def slip(rng: random.Random, items: list, symbols) -> list:
    """`items` with two unequal neighbours exchanged, or with one of them replaced by another of `symbols`."""
    if len(set(items)) > 1 and rng.randrange(2):
        return exchange(rng, items)
    i = rng.randrange(len(items))
    return [*items[:i], rng.choice([s for s in symbols if s != items[i]]), *items[i + 1 :]]


def exchange(rng: random.Random, items: list) -> list:
    """`items` with two unequal neighbours exchanged; unchanged if there are none."""
    places = [i for i in range(len(items) - 1) if items[i] != items[i + 1]]
    i = rng.choice(places) if places else 0
    return [*items[:i], *items[i : i + 2][::-1], *items[i + 2 :]]


def spaced(items) -> str:
    return " ".join(map(str, items))


# ---- rows

def make_tasks(split: str, count: int, seed: int = 0, fold: int = 0) -> Iterator[dict]:
    """`count` rows of `split` ("train" or "val"), families in rotation, no prompt twice; the same for the same seed.

    {"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "family": ..., "answer": ...}
    ValueError: another split; a family that has not so many prompts (`add` has the fewest).
    """
    for family, task in islice(draw_tasks(split, f"tasks {seed}", fold), count):
        yield chat_row(family, task.question, task.answer, task.steps)


def preference_pairs(split: str, count: int, seed: int = 0, of: str = "all", fold: int = 0) -> Iterator[dict]:
    """`count` rows {"prompt": [user], "chosen": [assistant], "rejected": [assistant], "family": ...}, no prompt twice.

    of="tasks": right against wrong answers, families in rotation; "code": docstrings and functions of the standard
    library, real against corrupted; "all": of eight rows six tasks, a docstring and a function.
    ValueError: as `make_tasks`; the library has not so many functions.
    """
    kinds = {"all": (*FAMILIES, "docstring", "function"), "tasks": (*FAMILIES,), "code": ("docstring", "function")}[of]
    tasks, functions = draw_tasks(split, f"pairs {seed}", fold), list(stdlib_functions(split, fold))
    rng = random.Random(f"corruptions {seed}")
    rng.shuffle(functions)
    for i in range(count):
        round_, place = divmod(i, len(kinds))
        if kinds[place] in FAMILIES:
            family, task = next(tasks)
            good = chat_row(family, task.question, task.answer, task.steps)
            bad = chat_row(family, task.question, task.wrong, task.steps)
        elif round_ < len(functions):
            family, question, answer = code_questions(functions[round_])[kinds[place] == "function"]
            corrupt = corrupt_code if family == "function" else corrupt_docstring
            good, bad = chat_row(family, question, answer), chat_row(family, question, corrupt(rng, answer))
        else:
            raise ValueError(f"{count} pairs need more functions than the {len(functions)} of {split!r}")
        (user, chosen), (_, rejected) = good["messages"], bad["messages"]
        yield {"prompt": [user], "chosen": [chosen], "rejected": [rejected], "family": family}


def draw_tasks(split: str, seed: str, fold: int) -> Iterator[tuple[str, Task]]:
    check_split(split)
    rng, seen = random.Random(seed), set()  # a text seeds by its sha512: the same on every machine
    for family in cycle(FAMILIES):
        for _ in range(10_000):
            task = FAMILIES[family](rng)
            if held_out(repr(task.operands), fold) == (split == "val") and task.question not in seen:
                break
        else:
            raise ValueError(f"{split!r} has only {len(seen)} prompts, for {family} has no more: ask for fewer")
        seen.add(task.question)
        yield family, task


def chat_row(family: str, question: str, answer: str, steps: str = "") -> dict:
    messages = [{"role": "user", "content": question},
                {"role": "assistant", "content": f"{steps}\n{MARKER} {answer}" if steps else answer}]
    return {"messages": messages, "family": family, "answer": answer}


def check_split(split: str) -> None:
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", not {split!r}')


def read_tasks(paths: list[str]) -> Iterator[tuple[str, dict]]:
    """(file:line, row) of files of `make_tasks`. ValueError, with file and line: a line that is no such row."""
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    messages = row["messages"]
                    good = messages[:-1] and all(isinstance(message["content"], str) for message in messages)
                    good = good and isinstance(row["family"], str) and isinstance(row["answer"], str)
                except (ValueError, TypeError, KeyError):
                    good = False
                if not good:
                    raise ValueError(f'{path}:{number}: expected a task, {{"messages", "family", "answer"}}')
                yield f"{path}:{number}", row


def grade(row: dict, completion: str) -> bool:
    """Exact match: the text after the last "Answer:", or all of it, outer whitespace aside, is the row's answer."""
    return completion.rsplit(MARKER, 1)[-1].strip() == row["answer"]


def grade_by_family(rows: list[dict], completions: list[str]) -> dict[str, tuple[int, int]]:
    """{family: (right, total)}, in the order in which the families first occur."""
    totals = {}
    for row, completion in zip(rows, completions, strict=True):
        right, total = totals.get(row["family"], (0, 0))
        totals[row["family"]] = right + grade(row, completion), total + 1
    return totals


# ---- code: short functions of the standard library, and how to spoil them

class Function(NamedTuple):
    name: str
    signature: str  # def f(x, y=0):
    docstring: str  # its first paragraph, in one line
    source: str     # signature and body, without the docstring


def docstring_tasks(split: str, fold: int = 0) -> Iterator[dict]:
    """Chats about functions of the running Python's own library, two for each: docstring -> function (family
    "function") and signature -> docstring (family "docstring"). Rows as those of `make_tasks`, but the answer is one of
    many right ones: they are there to train on and for the loss on held-out files, not for exact match."""
    for f in stdlib_functions(split, fold):
        for family, question, answer in code_questions(f):
            yield chat_row(family, question, answer)


def code_questions(f: Function) -> tuple[tuple[str, str, str], ...]:
    return (("docstring", f"Write a docstring for {f.signature}", f.docstring),
            ("function", f"Write the function {f.name}: {f.docstring}", f.source))


def stdlib_functions(split: str, fold: int = 0) -> Iterator[Function]:
    """Functions of at most 400 characters with a docstring of 20 to 200, of the files of one split, sorted by file.

    Where files share a prompt, the first one has it, so none stands on both sides. ValueError: another split; a Python
    that keeps no source files.
    """
    check_split(split)
    root, files, seen = Path(sysconfig.get_path("stdlib")), [], set()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not any(fnmatch(name, pattern) for pattern in LEFT_OUT)]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(f"this Python keeps no source files in {root}")
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        text = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
        for f in functions_of(text):
            prompts = {question for _, question, _ in code_questions(f)}
            if not prompts & seen and held_out(name, fold) == (split == "val"):
                yield f
            seen |= prompts


def functions_of(text: str) -> Iterator[Function]:
    """Found by their indentation and parsed one by one: much faster than to parse all modules whole."""
    for match in BLOCK.finditer(text):
        block = textwrap.dedent(match[0])
        tree = parse(block) if '"""' in block and len(block) < 1000 else None
        docstring = ast.get_docstring(tree.body[0]) if tree else None
        if not docstring:
            continue
        lines, first = block.split("\n"), tree.body[0].body[0]  # the docstring is the first statement
        head = lines[: first.lineno - 1]
        source = "\n".join(line for line in head + lines[first.end_lineno :] if line.strip())
        docstring = " ".join(docstring.split("\n\n")[0].split())
        fits = len(source) <= 400 and 20 <= len(docstring) <= 200 and len(set(docstring.split())) > 1
        if head and fits and parse(source):  # else the docstring was the whole body, or stood on the line of the def
            yield Function(tree.body[0].name, " ".join(map(str.strip, head)), docstring, source)


def parse(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in old modules
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def corrupt_docstring(rng: random.Random, docstring: str) -> str:
    """Two different neighbouring words exchanged."""
    return " ".join(exchange(rng, docstring.split()))


def corrupt_code(rng: random.Random, source: str) -> str:
    """One operator turned round, one name replaced by another of the function's names, one line indented otherwise, or
    two lines of the body exchanged. The result is another program than `source`, or none at all."""
    lines = source.split("\n")
    words = list(tokenize.generate_tokens(io.StringIO(source).readline))
    names = sorted({w.string for w in words if w.type == tokenize.NAME and not keyword.iskeyword(w.string)})
    operators = [w for w in words if w.string in OPPOSITE]
    while True:
        changed, i = list(lines), rng.randrange(1, len(lines))
        kind = rng.choice(("operator", "name", "indent", "order"))
        if kind == "indent":
            changed[i] = rng.choice(("    " + lines[i], lines[i].removeprefix("    ")))
        elif kind == "order":
            changed[1:] = exchange(rng, lines[1:])
        elif kind == "name" or operators:
            word = rng.choice(operators if kind == "operator" else [w for w in words if w.string in names])
            new = OPPOSITE[word.string] if kind == "operator" else rng.choice(names)
            (at, start), (_, end) = word.start, word.end
            changed[at - 1] = lines[at - 1][:start] + new + lines[at - 1][end:]
        tree = parse("\n".join(changed))
        if tree is None or ast.dump(tree) != ast.dump(parse(source)):
            return "\n".join(changed)


# ---- the command

def write_rows(path: Path, rows: list[dict]) -> None:
    """One JSON object a line; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder for the files; without it nothing is written")
    for flag, default, text in (("train", 20_000, "tasks to train on"), ("val", 500, "held-out tasks"),
                                ("pairs", 4_000, "preference pairs to train on"), ("val_pairs", 400, "held-out pairs"),
                                ("seed", 0, "another seed draws other tasks, with the same operands held out"),
                                ("fold", 0, "which tenth is held out: choose settings on one, report on another")):
        parser.add_argument(f"--{flag}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--pairs_of", choices=("all", "tasks", "code"), default="all",
                        help="what the training pairs are of; the held-out ones are of all (default: all)")
    args = parser.parse_args()
    for flag in ("train", "val", "pairs", "val_pairs", "fold"):
        if getattr(args, flag) < 0:
            raise ValueError(f"--{flag} {getattr(args, flag)}: must be at least 0")
    if args.fold > 9:
        raise ValueError(f"--fold {args.fold}: choose from 0 to 9")
    seed, fold = args.seed, args.fold
    files = {"sft_train": make_tasks("train", args.train, seed, fold), "sft_val": make_tasks("val", args.val, seed, fold),
             "pairs_train": preference_pairs("train", args.pairs, seed, args.pairs_of, fold),
             "pairs_val": preference_pairs("val", args.val_pairs, seed, fold=fold),
             "code_train": docstring_tasks("train", fold), "code_val": docstring_tasks("val", fold)}
    files = {name: list(rows) for name, rows in files.items()}  # all of them, before the first file is written
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        if args.out:
            write_rows(Path(args.out, f"{name}.jsonl"), rows)
        families = Counter(row["family"] for row in rows)
        print(f"{name}.jsonl: {len(rows)} rows, {', '.join(f'{family} {n}' for family, n in families.items())}")
        for row in rows[: len(families)] if name.endswith("val") else []:
            texts = row["messages"] if "messages" in row else row["prompt"] + row["chosen"] + row["rejected"]
            print("   ", row["family"].ljust(11), *(json.dumps(text["content"], ensure_ascii=False) for text in texts))
    print(f"written to {args.out}" if args.out else "nothing written: give --out DIR")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)
