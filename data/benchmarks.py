r"""Benchmark files in their own formats -> what a model is asked, as lm-evaluation-harness 0.4.13 asks it.

    kind         asked of the model                                           right if
    choice       log p(" " + choice | context) of each choice                 the largest is the right one's
    partial      log p(" " + ending | context with that choice)  Winogrande   the same: the choice is in the context
    mc2          as choice, several may be true                  TruthfulQA   score: the true ones' share of probability
    last_word    log p(" " + word | context)                     LAMBADA      the word is what greedy decoding gives
    gsm8k, math  a text, after worked examples                                the number or formula in it is right
    code         a text                                          HumanEval    the program passes the tests
    text         log p of whole documents                                     score: perplexity of a word, of a byte

    for item in read_benchmark("hellaswag", "hellaswag_val.jsonl"): print(item.contexts[0], item.choices, item.gold)

    python data/benchmarks.py                         lists the benchmarks, and the fields that their rows must have
    python data/benchmarks.py mmlu mmlu/ --shots 5    shows the first prompt as the model gets it

A file is JSON lines, a JSON array or CSV, as the authors or the Hugging Face hub publish it, or gzipped; for several
benchmarks also llm-foundry's {"query", "choices", "gold"}. A folder holds splits: files or folders named test, val(id),
dev, train, or *_test and so on. Prompts and choices undergo what the harness does to them, such as the cleaning of
HellaSwag's brackets. With examples before the question ("shots") these are the same too: the first ones of the subject
for MMLU and C-Eval, the papers' own for MATH and MBPP, else drawn by random.Random(1234), anew for each question.
"""

import csv
import gzip
import io
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Item(NamedTuple):
    """One question. `choices` go without the blank before them; `contexts` are one, or in `partial` one per choice."""
    where: str  # FILE:LINE
    contexts: tuple[str, ...]
    choices: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()  # places of the right choices: one, in mc2 several
    target: str = ""  # what an example shows as its answer; of generation, what the answer is compared with
    group: str = ""  # subject
    check: dict | None = None  # code: "before" (goes in front of the completion), and arguments of a sandbox
    text: str = ""  # question and right answer without examples, to be looked for in training data


class Benchmark(NamedTuple):
    kind: str
    read: Callable[[dict], Item]  # row -> Item; KeyError, ValueError, TypeError, IndexError: it is no such row
    fields: str  # what a row has, for error messages
    split: tuple[str, ...] = ("val", "validation", "valid", "test")  # of a folder: the first that exists is asked
    shots: int = 0  # examples that the harness shows by default
    shots_from: tuple[str, ...] = ("train",)  # of a folder
    which: str = "random"  # examples: "first" of all, first of the "subject" (which then is counted by itself), random
    spare: int = 0  # the harness draws one more where its task names no test split
    stop: tuple[str, ...] = ()  # where a generated answer ends
    max_new_tokens: int = 256


# One function per format: row -> Item ---------------------------------------------------------------------------------

def hellaswag(row: dict) -> Item:
    if "query" in row:
        return four(ready(row, ""))
    prompt = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return four(choice(prompt, [clean(ending) for ending in row["endings"]], int(row["label"])))


def clean(text: str) -> str:
    """Remove what WikiHow left in HellaSwag: "[header] How to x [title] Do y." -> "How to x. Do y."."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def arc(row: dict) -> Item:
    if "query" in row:
        return ready(row, "Question: ", "\nAnswer:")
    question = row["question"]
    if isinstance(question, dict):  # the authors' form; else the hub's
        return labelled(f"Question: {question['stem']}\nAnswer:", question["choices"], row["answerKey"])
    return labelled(f"Question: {question}\nAnswer:", row["choices"], row["answerKey"])


def openbookqa(row: dict) -> Item:
    if "query" in row:
        return four(ready(row, ""))
    if isinstance(row.get("question"), dict):
        return four(labelled(row["question"]["stem"], row["question"]["choices"], row["answerKey"].strip()))
    return four(labelled(row["question_stem"], row["choices"], row["answerKey"].strip()))


def piqa(row: dict) -> Item:
    if "query" in row:
        return ready(row, "Question: ", "\nAnswer:")
    return choice(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def boolq(row: dict) -> Item:
    if "query" in row:
        item = ready(row, "Passage: ", "\nAnswer:")
        if item.choices != ("no", "yes"):
            raise ValueError("its choices are not no and yes")
        return item._replace(contexts=(item.contexts[0].removeprefix("Passage: "),))
    answer = row["label"] if "label" in row else row["answer"]
    if answer not in (True, False):  # 0 and 1 are, too
        raise ValueError(f"the answer {answer!r} is neither true nor false")
    return choice(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], int(answer))


def winogrande(row: dict) -> Item:
    """The end of the sentence is scored after either name: partial evaluation (Trinh & Le 2018)."""
    if "context_options" in row:
        options, end, gold = row["context_options"], row["continuation"], row["gold"]
    else:
        before, end = row["sentence"].split("_", 1)
        options, gold = [before + row["option1"], before + row["option2"]], {"1": 0, "2": 1}[str(row["answer"])]
    if len(options) != 2 or gold not in (0, 1):
        raise ValueError("it has no two options, of which one is right")
    text(*options, end)
    return Item("", tuple(options), (end.strip(),), (gold,), f"{end.strip()}")


def mmlu(row: dict) -> Item:
    choices = row["choices"] if "choices" in row else [row[letter] for letter in "ABCD"]
    answer = row["answer"]
    gold = "ABCD".index(answer) if isinstance(answer, str) and answer in tuple("ABCD") else int(answer)
    if len(choices) != 4:
        raise ValueError(f"it has {len(choices)} choices, not 4")
    subject = text(row.get("subject", ""))
    return choice(letters(row["question"], choices) + "\nAnswer:", list("ABCD"), gold)._replace(group=subject)


def ceval(row: dict) -> Item:
    row = {key.lower(): value for key, value in row.items()}
    prompt = letters(row["question"], [row[letter] for letter in "abcd"]) + "\n\u7b54\u6848\uff1a"  # "Answer:"
    return choice(prompt, list("ABCD"), "ABCD".index(row["answer"] or "none"))._replace(group=row["subject"])


def letters(question: str, choices: list[str]) -> str:
    text(*choices)
    return "\n".join([question.strip(), *(f"{letter}. {option}" for letter, option in zip("ABCD", choices))])


def truthful(row: dict, targets: str) -> Item:
    """`targets`: mc1_targets or mc2_targets. The first choice of mc1 is its only true one."""
    if "Best Answer" in row:  # the authors' CSV: the questions for generation, whose answers are these choices
        split = lambda key: [answer for answer in map(str.strip, row[key].split(";")) if answer]  # noqa: E731
        right = [row["Best Answer"].strip()] if targets == "mc1_targets" else split("Correct Answers")
        answers = {answer: 1 for answer in right} | {answer: 0 for answer in split("Incorrect Answers")}
    else:
        answers = row[targets]
        if "labels" in answers:  # the hub's
            answers = dict(zip(answers["choices"], answers["labels"], strict=True))
    gold = tuple(i for i, label in enumerate(answers.values()) if label == 1)
    if not 0 < len(gold) < len(answers) or not set(answers.values()) <= {0, 1}:
        raise ValueError("true and false answers are needed")
    question = text(row["Question" if "Question" in row else "question"])
    return Item("", (f"{TRUTHFUL_QA}\n\nQ: {question}\nA:",), tuple(answers), gold, list(answers)[gold[0]])


def lambada(row: dict) -> Item:
    if "continuation" in row:
        word = text(row["continuation"]).strip()
        return Item("", (text(row["context"]),), (word,), (0,), word)
    words = row["text"].split(" ")
    if len(words) < 2:
        raise ValueError("its text has no two words")
    return Item("", (" ".join(words[:-1]),), (words[-1],), (0,), words[-1])


def gsm8k(row: dict) -> Item:
    if "####" not in row["answer"]:
        raise ValueError('its answer has no "#### number"')
    return Item("", (f"Question: {text(row['question'])}\nAnswer:",), target=row["answer"])


def math_problem(row: dict) -> Item:
    if "problem" in row:
        problem, solution, group = row["problem"], row["solution"], row.get("type", row.get("subject", ""))
        if "\\boxed" not in solution and "\\fbox" not in solution:
            raise ValueError("its solution has no \\boxed answer")
    else:  # llm-foundry's
        problem, solution, group = row["context"], row["chain_of_thought"], row["category"]
    return Item("", (f"Problem:\n{text(problem)}\n\nSolution:",), target=text(solution), group=group)


def humaneval(row: dict) -> Item:
    prompt, test = text(row["prompt"], row["test"]), row["test"]
    check = {"before": prompt, "test": test, "entry_point": row["entry_point"], "setup": prompt}
    return Item("", (prompt,), target=row["canonical_solution"], check=check)


def mbpp(row: dict) -> Item:
    tests, task = row["test_list"], text(row["text"] if "text" in row else row["prompt"])
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports", []))
    prompt = (f"You are an expert Python programmer, and here is your task: {task} Your code should pass these tests:"
              "\n\n" + "".join(f"{test}\n" for test in tests[:3]) + "[BEGIN]\n")
    return Item("", (prompt,), target=row["code"] + "\n[DONE]", group=str(row["task_id"]),
                check={"before": "", "test": "\n".join(tests), "setup": setup})


def document(row: dict) -> Item:
    if not text(row["text"]).strip():
        raise ValueError("its text is empty")
    return Item("", ("",), (row["text"],))


# What they share

def choice(prompt: str, choices: list[str], gold: int) -> Item:
    text(prompt, *choices)
    if len(choices) < 2 or not 0 <= gold < len(choices):
        raise ValueError(f"there is no choice {gold} among its {len(choices)}")
    return Item("", (prompt,), tuple(choices), (gold,), choices[gold])


def ready(row: dict, begins: str, after: str = "") -> Item:
    """llm-foundry's {"query", "choices", "gold"}; its query has the question as here, and then other words, or none."""
    if not row["query"].startswith(begins):
        raise ValueError(f"its query does not begin with {begins!r}")
    return choice((row["query"].rstrip() if after else row["query"]) + after, row["choices"], int(row["gold"]))


def labelled(prompt: str, choices, key: str) -> Item:
    """Choices as [{"text", "label"}, ...] (the authors') or {"text": [...], "label": [...]} (the hub's)."""
    if isinstance(choices, list):
        choices = {name: [entry[name] for entry in choices] for name in ("text", "label")}
    return choice(prompt, choices["text"], choices["label"].index(key))


def four(item: Item) -> Item:
    if len(item.choices) != 4:
        raise ValueError(f"it has {len(item.choices)} choices, not 4")
    return item


def text(*values) -> str:
    """The first of the values, all of which must be texts."""
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{value!r} is no text")
    return values[0]


TRUTHFUL_QA = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain."""  # Lin et al. 2022, appendix E

MATH_SHOTS = [tuple(pair.split("\nSolution: ")) for pair in r"""
Find the domain of the expression  $\frac{\sqrt{x-2}}{\sqrt{5-x}}$.
Solution: The expressions inside each square root must be non-negative. Therefore, $x-2 \ge 0$, so $x\ge2$, and $5 - x \ge 0$, so $x \le 5$. Also, the denominator cannot be equal to zero, so $5-x>0$, which gives $x<5$. Therefore, the domain of the expression is $\boxed{[2,5)}$.
Final Answer: The final answer is $[2,5)$. I hope it is correct.

If $\det \mathbf{A} = 2$ and $\det \mathbf{B} = 12,$ then find $\det (\mathbf{A} \mathbf{B}).$
Solution: We have that $\det (\mathbf{A} \mathbf{B}) = (\det \mathbf{A})(\det \mathbf{B}) = (2)(12) = \boxed{24}.$
Final Answer: The final answer is $24$. I hope it is correct.

Terrell usually lifts two 20-pound weights 12 times. If he uses two 15-pound weights instead, how many times must Terrell lift them in order to lift the same total weight?
Solution: If Terrell lifts two 20-pound weights 12 times, he lifts a total of $2\cdot 12\cdot20=480$ pounds of weight.  If he lifts two 15-pound weights instead for $n$ times, he will lift a total of $2\cdot15\cdot n=30n$ pounds of weight.  Equating this to 480 pounds, we can solve for $n$:
\begin{align*}
30n&=480\\
\Rightarrow\qquad n&=480/30=\boxed{16}
\end{align*}
Final Answer: The final answer is $16$. I hope it is correct.

If the system of equations

\begin{align*}
6x-4y&=a,\\
6y-9x &=b.
\end{align*}has a solution $(x, y)$ where $x$ and $y$ are both nonzero,
find $\frac{a}{b},$ assuming $b$ is nonzero.
Solution: If we multiply the first equation by $-\frac{3}{2}$, we obtain

$$6y-9x=-\frac{3}{2}a.$$Since we also know that $6y-9x=b$, we have

$$-\frac{3}{2}a=b\Rightarrow\frac{a}{b}=\boxed{-\frac{2}{3}}.$$
Final Answer: The final answer is $-\frac{2}{3}$. I hope it is correct.""".strip().replace(
    "correct.\n\n", "correct.\0").split("\0")]  # Lewkowycz et al. 2022, appendix D.2  # fmt: skip

CEVAL_SUBJECTS = dict(pair.split(":") for pair in """
computer_network:计算机网络 operating_system:操作系统 computer_architecture:计算机组成 college_programming:大学编程
college_physics:大学物理 college_chemistry:大学化学 advanced_mathematics:高等数学 probability_and_statistics:概率统计
discrete_mathematics:离散数学 electrical_engineer:注册电气工程师 metrology_engineer:注册计量师
high_school_mathematics:高中数学 high_school_physics:高中物理 high_school_chemistry:高中化学 high_school_biology:高中生物
middle_school_mathematics:初中数学 middle_school_biology:初中生物 middle_school_physics:初中物理
middle_school_chemistry:初中化学 veterinary_medicine:兽医学 college_economics:大学经济学 business_administration:工商管理
marxism:马克思主义基本原理 mao_zedong_thought:毛泽东思想和中国特色社会主义理论体系概论 education_science:教育学
teacher_qualification:教师资格 high_school_politics:高中政治 high_school_geography:高中地理
middle_school_politics:初中政治 middle_school_geography:初中地理 modern_chinese_history:近代史纲要
ideological_and_moral_cultivation:思想道德修养与法律基础 logic:逻辑学 law:法学
chinese_language_and_literature:中国语言文学 art_studies:艺术学 professional_tour_guide:导游资格
legal_professional:法律职业资格 high_school_chinese:高中语文 high_school_history:高中历史 middle_school_history:初中历史
civil_servant:公务员 sports_science:体育学 plant_protection:植物保护 basic_medicine:基础医学 clinical_medicine:临床医学
urban_and_rural_planner:注册城乡规划师 accountant:注册会计师 fire_engineer:注册消防工程师
environmental_impact_assessment_engineer:环境影响评价工程师 tax_accountant:税务师 physician:医师资格""".split())

READY = 'or "query", "choices", "gold"'
ARC = Benchmark("choice", arc, f'"question", "choices", "answerKey" {READY}', ("test", "val", "validation", "dev"))
BENCHMARKS = {
    "hellaswag": Benchmark("choice", hellaswag, f'"activity_label", "ctx_a", "ctx_b", "endings", "label" {READY}',
                           spare=1),
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "piqa": Benchmark("choice", piqa, f'"goal", "sol1", "sol2", "label" {READY}', spare=1),
    "winogrande": Benchmark("partial", winogrande, '"sentence", "option1", "option2", "answer" or "context_options", '
                            '"continuation", "gold"', ("val", "validation", "dev"), spare=1),
    "openbookqa": Benchmark("choice", openbookqa, f'"question_stem" or "question", "choices", "answerKey" {READY}',
                            ("test", "val", "validation", "dev")),
    "boolq": Benchmark("choice", boolq, f'"passage", "question", "answer" or "label" {READY}',
                       ("val", "validation", "dev"), spare=1),
    "mmlu": Benchmark("choice", mmlu, '"question", "choices" or "A" to "D", "answer", "subject"', ("test", "val"),
                      shots_from=("dev",), which="subject"),
    "ceval": Benchmark("choice", ceval, '"question", "A" to "D", "answer" (CSV)', ("val",), shots_from=("dev",),
                       which="subject"),
    "truthfulqa_mc1": Benchmark("choice", lambda row: truthful(row, "mc1_targets"), '"question", "mc1_targets" or '
                                '"Question", "Best Answer", "Incorrect Answers"'),
    "truthfulqa_mc2": Benchmark("mc2", lambda row: truthful(row, "mc2_targets"), '"question", "mc2_targets" or '
                                '"Question", "Correct Answers", "Incorrect Answers"'),
    "lambada": Benchmark("last_word", lambada, '"text" or "context", "continuation"', ("test", "val")),
    "gsm8k": Benchmark("gsm8k", gsm8k, '"question", "answer" with "#### number"', ("test",), shots=5,
                       stop=("Question:", "</s>", "<|im_end|>")),
    "math": Benchmark("math", math_problem, '"problem", "solution" or "context", "chain_of_thought", "category"',
                      ("test",), shots=4, which="first", stop=("Problem:",)),
    "humaneval": Benchmark("code", humaneval, '"prompt", "entry_point", "canonical_solution", "test"', ("test",),
                           stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"), max_new_tokens=1024),
    "mbpp": Benchmark("code", mbpp, '"task_id", "text" or "prompt", "code", "test_list"', ("test",), shots=3,
                      which="first", stop=("[DONE]",)),
    "text": Benchmark("text", document, '"text", or a .txt file'),
}


# Files ----------------------------------------------------------------------------------------------------------------

def read_benchmark(name: str, path, *, shots: int | None = None, shots_path=None,
                   limit: int | None = None) -> list[Item]:
    """The questions of a benchmark with their examples before them, in the file's order.

    shots: examples before each question; None = the harness's default. shots_path: the file or folder that they come
    from; None = the split for that of a folder, else the file itself, without the question's own row. limit: so many
    questions only, of each subject where there are subjects. ValueError: an unknown name; a row (file and line) that is
    none of this benchmark's, no rows, too few examples."""
    if name not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    benchmark, path = BENCHMARKS[name], Path(path)
    items = read_items(name, path)
    shots = benchmark.shots if shots is None else shots
    if shots and benchmark.kind in ("text", "last_word") or shots and name.startswith("truthfulqa"):
        raise ValueError(f"{name} takes no examples before its questions")
    pool = items
    if shots and name == "math" and shots_path is None:
        pool = [Item("", (f"Problem:\n{problem}\n\nSolution:",), target=solution) for problem, solution in MATH_SHOTS]
    elif shots and name == "mbpp":
        pool = [item for item in (read_items(name, Path(shots_path)) if shots_path else items)
                if item.group in ("2", "3", "4")]  # Austin et al. 2021, section 3.1
    elif shots and shots_path is not None:
        pool = read_items(name, Path(shots_path))
    elif shots and path.is_dir() and split_files(path, benchmark.shots_from):
        pool = read_items(name, path, benchmark.shots_from)
    if name == "mbpp" and any(int(item.group) > 10 for item in items):
        items = [item for item in items if 11 <= int(item.group) <= 510]  # the others are for examples and training
    chosen = choose(items, pool, shots, benchmark) if shots else [[] for _ in items]
    counts, found = Counter(), []
    for item, examples in zip(items, chosen):
        subject = item.group if benchmark.which == "subject" else ""
        counts[subject] += 1
        if limit is None or counts[subject] <= limit:
            found.append(prefixed(name, item, examples))
    return found


def choose(items: list[Item], pool: list[Item], shots: int, benchmark: Benchmark) -> Iterator[list[Item]]:
    """For each item the examples before it, without itself."""
    draw, own, near = random.Random(1234), pool is items, {"": pool}
    for example in pool:
        if benchmark.which == "subject":
            near.setdefault(example.group, []).append(example)
    for item in items:
        subject = item.group if benchmark.which == "subject" else ""
        examples = near.get(subject, [])
        if len(examples) < shots + own:
            raise ValueError(f"{item.where}: {shots} examples before the question are wanted; there are only "
                             f"{max(0, len(examples) - own)}" + f" of {subject!r}" * bool(subject))
        if benchmark.which == "random":  # as the harness draws: perhaps one more; the question itself is left out
            drawn = draw.sample(range(len(examples)), min(len(examples), shots + max(benchmark.spare, own)))
            examples = [examples[i] for i in drawn]
        else:
            examples = examples[: shots + 1]
        yield [example for example in examples if example != item][:shots]


def prefixed(name: str, item: Item, examples: list[Item]) -> Item:
    """The item with the subject's description and the examples in front of its contexts."""
    before = ""
    if name == "mmlu":
        before = f"The following are multiple choice questions (with answers) about {item.group.replace('_', ' ')}.\n\n"
    elif name == "ceval":
        before = f"以下是中国关于{CEVAL_SUBJECTS.get(item.group, item.group)}的单项选择题，请选出其中的正确答案。\n\n"
    for example in examples:
        context = example.contexts[example.gold[0] if len(example.contexts) > 1 else 0]
        before += context + " " * (name != "mbpp") + example.target + "\n\n"
    own = item.contexts[item.gold[0] if len(item.contexts) > 1 else 0].removeprefix(TRUTHFUL_QA)
    return item._replace(contexts=tuple(before + context for context in item.contexts),
                         text=f"{own} {item.target or item.choices[0]}")


def read_items(name: str, path: Path, split: tuple[str, ...] | None = None) -> list[Item]:
    """Every row of a file, or of a folder's split, as an Item."""
    benchmark, items = BENCHMARKS[name], []
    files = [path]
    if path.is_dir():
        files = split_files(path, split or benchmark.split)
        if not files:
            raise ValueError(f"{path}: no file or folder named {' or '.join(split or benchmark.split)} in this folder")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        before = len(items)
        for where, row in rows_of(file, name):
            try:
                items.append(benchmark.read(row)._replace(where=where))
            except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
                reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)
                raise ValueError(f"{where}: no row of {name} ({reason}); a row has {benchmark.fields}") from None
        if len(items) == before:
            raise ValueError(f"{file}: has no rows; a row of {name} has {benchmark.fields}")
    return items


def split_files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of the first split that exists: named so, ending in _NAME or -NAME, or in a folder of that name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()
             and suffix(path) in (".json", ".jsonl", ".csv", ".txt")]
    for name in names:
        found = [path for path in files if name in path.relative_to(folder).parts[:-1]
                 or re.fullmatch(rf"(.*[_-])?{name}", path.name.split(".")[0])]
        if found:
            return found
    return []


def suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def rows_of(path: Path, name: str) -> Iterator[tuple[str, dict]]:
    """(FILE:LINE, row) of JSON lines, a JSON array or object, CSV, a text."""
    data = path.read_bytes()
    try:
        content = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as UTF-8 text ({error})") from None
    if not content.strip():
        raise ValueError(f"{path}: the file is empty")
    if suffix(path) == ".csv":
        yield from csv_rows(path, content, name)
    elif suffix(path) == ".txt" and name == "text":
        yield f"{path}:1", {"text": content}
    elif content.lstrip()[0] == "[" or suffix(path) == ".json":
        try:
            value = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{path}: no valid JSON: {error}") from None
        for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
            yield f"{path}: entry {number}", check_row(row, f"{path}: entry {number}", name)
    else:
        labels = answers_beside(path)
        for number, line in enumerate(content.split("\n"), start=1):  # not splitlines: U+2028 may stand in a text
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: no valid JSON: {error}") from None
                row = check_row(row, f"{path}:{number}", name)
                if labels and "label" not in row and number <= len(labels):
                    row["label"] = labels[number - 1]
                yield f"{path}:{number}", row


def answers_beside(path: Path) -> list[str]:
    """PIQA's authors put the answers of valid.jsonl into valid-labels.lst."""
    beside = path.with_name(path.name.split(".")[0] + "-labels.lst")
    return beside.read_text(encoding="utf-8").split() if beside.is_file() else []


def check_row(row, where: str, name: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: no row of {name}, but a {type(row).__name__}; a row has {BENCHMARKS[name].fields}")
    return row


def csv_rows(path: Path, content: str, name: str) -> Iterator[tuple[str, dict]]:
    """Rows by the names in the first line; MMLU's files have none. A row's subject is the file's: logic_val.csv."""
    lines = csv.reader(io.StringIO(content, newline=""), strict=True)
    header = ["question", *"ABCD", "answer"] if name == "mmlu" else None
    subject = re.sub(r"[_-](test|val|dev|train)$", "", path.name.split(".")[0])
    start = 1
    try:
        for values in lines:
            where, start = f"{path}:{start}", lines.line_num + 1
            if header is None or values[1:] == header[1:] and name == "mmlu":  # a file that has a header after all
                header = values
            elif len(values) != len(header):
                raise ValueError(f"{where}: {len(values)} fields, not {len(header)} ({', '.join(header)})")
            else:
                yield where, {"subject": subject, **dict(zip(header, values))}
    except csv.Error as error:
        raise ValueError(f"{path}:{lines.line_num}: no valid CSV: {error}") from None


def main() -> None:
    words = sys.argv[1:]
    if not words:
        rows = (f"{name:15} {b.kind:10} {b.fields}" for name, b in BENCHMARKS.items())
        return print(__doc__, *rows, sep="\n")
    try:
        shots = int(words[words.index("--shots") + 1]) if "--shots" in words else None
        items = read_benchmark(words[0], words[1], shots=shots)
    except (ValueError, OSError, IndexError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    item = items[0]
    print(f"{len(items):,} questions; the first, {item.where}:")
    for context in item.contexts:
        print(f"---\n{context}")
    for i, option in enumerate(item.choices):
        print("=>" if i in item.gold else "  ", option)
    print("---", item.target if not item.choices else "", sep="\n")


if __name__ == "__main__":
    main()
