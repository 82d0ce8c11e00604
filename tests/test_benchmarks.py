"""What is asked: rows of every format against prompts written by hand, against OLMES' and lm-evaluation-harness's own."""

import ast
import csv
import gzip
import json
import os
import random
from pathlib import Path

import pytest

from data.benchmarks import BENCHMARKS, MATH_SHOTS, TRUTHFUL_QA, Item, clean, read_benchmark


def write(path, *rows, array=False):
    text = json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


HELLASWAG = {"ind": 4, "activity_label": "How to bake", "ctx_a": "[header] Bake. [title] Mix it.", "ctx_b": "then stir",
             "ctx": "unused", "endings": ["Stop.", "Go  on. [step] Now.", "a", "b"], "label": "1"}
FOUR = {"text": ["w", "x", "y", "z"], "label": ["A", "B", "C", "D"]}
LISTED = [{"text": text, "label": label} for text, label in zip("wxyz", "1234")]
WINO = {"sentence": "Ann thanked Bea because _ had helped.", "option1": "Ann", "option2": "Bea", "answer": "2"}
MC = {"question": "Is it?", "mc1_targets": {"choices": ["yes", "no", "maybe"], "labels": [1, 0, 0]},
      "mc2_targets": {"choices": ["yes", "aye", "no"], "labels": [1, 1, 0]}}
OWN_MC = {"question": "Is it?", "mc1_targets": {"yes": 1, "no": 0, "maybe": 0}, "mc2_targets": {"yes": 1, "aye": 1, "no": 0}}
ASKED = TRUTHFUL_QA + "\n\nQ: Is it?\nA:"

FORMATS = [  # name, row, contexts, choices, gold
    ("hellaswag", HELLASWAG, ["How to bake: Bake.. Mix it. Then stir"], ["Stop.", "Go on. Now.", "a", "b"], [1]),
    ("hellaswag", {"query": "Q", "choices": list("wxyz"), "gold": 3}, ["Q"], list("wxyz"), [3]),
    ("arc_easy", {"question": "Why?", "choices": FOUR, "answerKey": "B"}, ["Question: Why?\nAnswer:"], list("wxyz"), [1]),
    ("arc_challenge", {"question": {"stem": "Why?", "choices": LISTED}, "answerKey": "3"}, ["Question: Why?\nAnswer:"],
     list("wxyz"), [2]),
    ("arc_easy", {"query": "Question: Why?", "choices": ["a", "b"], "gold": 0}, ["Question: Why?\nAnswer:"], ["a", "b"], [0]),
    ("openbookqa", {"question_stem": "The sun is", "choices": FOUR, "answerKey": "D"}, ["The sun is"], list("wxyz"), [3]),
    ("openbookqa", {"question": {"stem": "The sun is", "choices": LISTED}, "answerKey": "1"}, ["The sun is"], list("wxyz"), [0]),
    ("piqa", {"goal": "open it", "sol1": "push", "sol2": "pull", "label": 1}, ["Question: open it\nAnswer:"],
     ["push", "pull"], [1]),
    ("piqa", {"query": "Question: open it\n", "choices": ["push", "pull"], "gold": 0}, ["Question: open it\nAnswer:"],
     ["push", "pull"], [0]),
    ("boolq", {"passage": "Ice floats.", "question": "does ice float", "answer": True},
     ["Ice floats.\nQuestion: does ice float?\nAnswer:"], ["no", "yes"], [1]),
    ("boolq", {"passage": "Ice floats.", "question": "does ice sink", "label": 0},
     ["Ice floats.\nQuestion: does ice sink?\nAnswer:"], ["no", "yes"], [0]),
    ("boolq", {"query": "Passage: Ice floats.\nQuestion: does ice float?\n", "choices": ["no", "yes"], "gold": 1},
     ["Ice floats.\nQuestion: does ice float?\nAnswer:"], ["no", "yes"], [1]),
    ("winogrande", WINO, ["Ann thanked Bea because Ann", "Ann thanked Bea because Bea"], ["had helped."], [1]),
    ("winogrande", {"context_options": ["so Ann", "so Bea"], "continuation": "left.", "gold": 0}, ["so Ann", "so Bea"],
     ["left."], [0]),
    ("mmlu", {"subject": "high_school_physics", "question": " What is it? ", "choices": list("wxyz"), "answer": 2},
     ["The following are multiple choice questions (with answers) about high school physics.\n\n"
      "What is it?\nA. w\nB. x\nC. y\nD. z\nAnswer:"], list("ABCD"), [2]),
    ("truthfulqa_mc1", MC, [ASKED], ["yes", "no", "maybe"], [0]),
    ("truthfulqa_mc2", MC, [ASKED], ["yes", "aye", "no"], [0, 1]),
    ("truthfulqa_mc1", OWN_MC, [ASKED], ["yes", "no", "maybe"], [0]),
    ("truthfulqa_mc2", OWN_MC, [ASKED], ["yes", "aye", "no"], [0, 1]),
    ("lambada", {"text": "He saw the  sea."}, ["He saw the "], ["sea."], [0]),
    ("lambada", {"context": "He saw the", "continuation": "sea."}, ["He saw the"], ["sea."], [0]),
]


@pytest.mark.parametrize("name, row, contexts, choices, gold", FORMATS, ids=lambda x: x if isinstance(x, str) else "")
def test_formats_of_choice(tmp_path, name, row, contexts, choices, gold):
    for array in (False, True):
        (item,) = read_benchmark(name, write(tmp_path / "a.jsonl", row, array=array))
        assert (list(item.contexts), list(item.choices), list(item.gold)) == (contexts, choices, gold)


def test_mmlu_and_ceval_folders_of_csv(tmp_path):
    """The authors' folders: MMLU's files have no header; a subject's first examples come from its own dev file."""
    for split, rows in (("dev", [["1+1?", "1", "2", "3", "4", "B"], ["2+2?", "1", "2", "3", "4", "D"]]),
                        ("test", [['a "quoted",\nquestion', "p", "q", "r", "s", "C"]])):
        (tmp_path / split).mkdir()
        for subject in ("abstract_algebra", "law"):
            with open(tmp_path / split / f"{subject}_{split}.csv", "w", newline="") as file:
                csv.writer(file).writerows(rows if subject == "law" or split == "test" else rows[::-1])
    items = read_benchmark("mmlu", tmp_path, shots=1)
    assert [item.group for item in items] == ["abstract_algebra", "law"]
    assert items[1].contexts[0] == (
        "The following are multiple choice questions (with answers) about law.\n\n"
        "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        'a "quoted",\nquestion\nA. p\nB. q\nC. r\nD. s\nAnswer:')
    assert "2+2?" in items[0].contexts[0] and items[0].gold == (2,)
    with pytest.raises(ValueError, match="3 examples before the question are wanted; there are only 2 of 'abstract_alg"):
        read_benchmark("mmlu", tmp_path, shots=3)
    val = tmp_path / "ceval" / "val"
    val.mkdir(parents=True)
    (val / "logic_val.csv").write_text("id,question,A,B,C,D,answer\n0,甲？,一,二,三,四,D\n", encoding="utf-8")
    (item,) = read_benchmark("ceval", tmp_path / "ceval")
    assert item.contexts[0] == "以下是中国关于逻辑学的单项选择题，请选出其中的正确答案。\n\n甲？\nA. 一\nB. 二\nC. 三\nD. 四\n答案："
    assert item.gold == (3,) and item.group == "logic"


def test_truthfulqa_csv(tmp_path):
    (tmp_path / "t.csv").write_text("Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
                                    'x,y,Is it?,yes,"yes; aye;",no; never,z\n')
    one, = read_benchmark("truthfulqa_mc1", tmp_path / "t.csv")
    two, = read_benchmark("truthfulqa_mc2", tmp_path / "t.csv")
    assert (one.contexts, one.choices, one.gold) == ((ASKED,), ("yes", "no", "never"), (0,))
    assert (two.choices, two.gold) == (("yes", "aye", "no", "never"), (0, 1))


def test_hellaswag_brackets():
    assert clean(" [header] How to x [title] Do y. [step]  Now. ") == " How to x. Do y.  Now."
    assert clean("a  b [substeps] c") == "a b c"


def test_piqa_labels_lie_beside(tmp_path):
    rows = [{"goal": "g", "sol1": "a", "sol2": "b"}] * 2
    write(tmp_path / "valid.jsonl", *rows)
    with pytest.raises(ValueError, match="valid.jsonl:1: no row of piqa .'label' is missing"):
        read_benchmark("piqa", tmp_path)
    (tmp_path / "valid-labels.lst").write_text("1\n0\n")
    assert [item.gold for item in read_benchmark("piqa", tmp_path)] == [(1,), (0,)]


def test_generation_prompts(tmp_path):
    row = {"question": "1+1?", "answer": "It is 2.\n#### 2"}
    write(tmp_path / "train.jsonl", *({"question": f"{n}?", "answer": f"#### {n}"} for n in range(9)))
    write(tmp_path / "test.jsonl", row)
    write(tmp_path / "test_socratic.jsonl", row, row)  # is another data set, and no part of the test split
    (item,) = read_benchmark("gsm8k", tmp_path, shots=0)
    assert item.contexts == ("Question: 1+1?\nAnswer:",) and item.target == row["answer"]
    (item,) = read_benchmark("gsm8k", tmp_path)
    drawn = random.Random(1234).sample(range(9), 5)
    assert item.contexts[0] == "".join(f"Question: {n}?\nAnswer: #### {n}\n\n" for n in drawn) + "Question: 1+1?\nAnswer:"

    problem = {"problem": "What is $x$?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{5}$."}
    folder = tmp_path / "MATH" / "test" / "algebra"
    folder.mkdir(parents=True)
    (folder / "1.json").write_text(json.dumps(problem, indent=1))
    (item,) = read_benchmark("math", tmp_path / "MATH")
    assert len(MATH_SHOTS) == 4 and item.contexts[0].count("I hope it is correct.\n\nProblem:\n") == 4
    assert item.contexts[0].endswith("\n\nProblem:\nWhat is $x$?\n\nSolution:") and item.group == "Algebra"

    mbpp = [{"task_id": n, "text": f"Do {n}.", "code": f"def f{n}(): pass", "test_setup_code": "",
             "test_list": [f"assert f{n}({i})" for i in range(3)]} for n in (2, 3, 4, 10, 11, 510, 511)]
    write(tmp_path / "mbpp.jsonl", *mbpp)
    items = read_benchmark("mbpp", tmp_path / "mbpp.jsonl")
    assert [item.group for item in items] == ["11", "510"]  # the test split of the paper
    block = ("You are an expert Python programmer, and here is your task: Do {0}. Your code should pass these tests:\n\n"
             "assert f{0}(0)\nassert f{0}(1)\nassert f{0}(2)\n[BEGIN]\n")
    assert items[0].contexts[0] == "".join(block.format(n) + f"def f{n}(): pass\n[DONE]\n\n" for n in (2, 3, 4)) + block.format(11)
    assert items[0].check == {"before": "", "test": "assert f11(0)\nassert f11(1)\nassert f11(2)", "setup": ""}


def test_random_examples_never_hold_the_question_itself(tmp_path):
    write(tmp_path / "a.jsonl", *({"query": f"q{n}", "choices": ["a", "b", "c", "d"], "gold": n % 4} for n in range(7)))
    items = read_benchmark("hellaswag", tmp_path / "a.jsonl", shots=5)
    for n, item in enumerate(items):
        *shots, own = item.contexts[0].split("\n\n")
        assert own == f"q{n}" and len({*shots}) == 5 and not any(shot.startswith(own + " ") for shot in shots)
    assert read_benchmark("hellaswag", tmp_path / "a.jsonl", shots=5, limit=3) == items[:3]
    with pytest.raises(ValueError, match="7 examples before the question are wanted; there are only 6"):
        read_benchmark("hellaswag", tmp_path / "a.jsonl", shots=7)
    other = write(tmp_path / "b.jsonl", {"query": "x", "choices": ["a", "b", "c", "d"], "gold": 2})
    assert read_benchmark("hellaswag", tmp_path / "a.jsonl", shots=1, shots_path=other)[0].contexts == ("x c\n\nq0",)


# Real files

@pytest.mark.parametrize("name, file, count", [
    ("hellaswag", "hellaswag/hellaswag_val_1000.jsonl", 1000), ("mmlu", "mmlu", 14042),
    ("truthfulqa_mc1", "truthfulqa/TruthfulQA.csv", 813), ("truthfulqa_mc2", "truthfulqa/TruthfulQA.csv", 813),
    ("gsm8k", "gsm8k", 1319), ("math", "math500/math500_test.json", 500),
    ("math", "core_eval/symbolic_problem_solving/math.jsonl", 5000), ("humaneval", "humaneval/HumanEval.jsonl.gz", 164),
    ("humaneval", "core_eval/programming/human_eval.jsonl", 164),
    ("arc_easy", "core_eval/world_knowledge/arc_easy.jsonl", 2376),
    ("arc_challenge", "core_eval/world_knowledge/arc_challenge.jsonl", 1172),
    ("piqa", "core_eval/commonsense_reasoning/piqa.jsonl", 1838),
    ("openbookqa", "core_eval/commonsense_reasoning/openbook_qa.jsonl", 500),
    ("boolq", "core_eval/reading_comprehension/boolq.jsonl", 3270),
    ("winogrande", "core_eval/language_understanding/winogrande.jsonl", 1267),
    ("lambada", "core_eval/language_understanding/lambada_openai.jsonl", 5153)])
def test_every_row_of_the_real_files_parses(shared_data, name, file, count):
    items = read_benchmark(name, shared_data / file)
    assert len(items) == count
    assert all(item.target and item.text for item in items)


def test_real_rows_by_hand(shared_data):
    item = read_benchmark("gsm8k", shared_data / "gsm8k", shots=0, limit=2)[1]
    assert item.contexts == ("Question: A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts "
                             "in total does it take?\nAnswer:",) and item.target.endswith("\n#### 3")
    item = read_benchmark("mmlu", shared_data / "mmlu", shots=5, limit=1)[0]
    assert item.contexts[0].count("\nAnswer: ") == 5 and item.contexts[0].startswith(
        "The following are multiple choice questions (with answers) about abstract algebra.\n\nFind all c in Z_3")
    item = read_benchmark("humaneval", shared_data / "humaneval" / "HumanEval.jsonl.gz", limit=1)[0]
    assert item.check["entry_point"] == "has_close_elements" and item.check["setup"] == item.contexts[0]


def test_hellaswag_is_asked_as_in_olmes(shared_data):
    """OLMES recorded what it sends to a model: the last paragraph is our context, the continuation a blank and a choice."""
    path = shared_data / "hellaswag" / "olmes_rc_5shot_requests.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        sent = [json.loads(next(file)) for _ in range(400)]
    items = read_benchmark("hellaswag", shared_data / "hellaswag" / "hellaswag_val_1000.jsonl")
    for row in sent:
        item, request = items[row["doc_id"]], row["request"]
        assert request["context"].endswith("\n\n" + item.contexts[0]) and row["label"] == item.gold[0]
        assert request["continuation"] == " " + item.choices[row["idx"]]


# lm-evaluation-harness: its own tasks, on rows in the hub's form

def harness_requests(file, splits, folder, shots):
    """[(context, continuation), ...] of each row as a task of the harness makes them, its data set replaced by rows."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml
    data_files = {split: str(write(folder / f"{split}.jsonl", *rows)) for split, rows in splits.items()}
    config = load_yaml(os.path.join(os.path.dirname(lm_eval.tasks.__file__), file))
    config |= {"dataset_path": "json", "dataset_name": None, "num_fewshot": shots,
               "dataset_kwargs": {"data_files": data_files, "cache_dir": str(folder / "cache")}}
    task = ConfigurableTask(config={key: value for key, value in config.items() if key not in ("tag", "group", "include")})
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    found = {}
    for request in task.instances:
        found.setdefault(request.doc_id, []).append(request.args)
    return [found[i] for i in sorted(found)]


def rows_for(name, count):
    """Rows in the hub's form, each unlike the others, with blanks and brackets where the harness does something to them."""
    rows = []
    for n in range(count):
        four = {"text": [f"{word} {n}" for word in "wxyz"], "label": list("ABCD")}
        rows.append({
            "hellaswag": HELLASWAG | {"ctx_a": f"[header] Bake {n}. [title] Mix  it.", "label": str(n % 4), "ind": n},
            "arc": {"id": f"{n}", "question": f"Why {n}?", "choices": four, "answerKey": "ABCD"[n % 4]},
            "openbookqa": {"id": f"{n}", "question_stem": f"The sun {n}", "choices": four, "answerKey": "ABCD"[n % 4]},
            "piqa": {"goal": f"open {n}", "sol1": "push", "sol2": "pull it", "label": n % 2},
            "winogrande": WINO | {"sentence": f"Ann {n} thanked Bea because _ had helped.", "answer": str(n % 2 + 1)},
            "boolq": {"question": f"is {n} odd", "passage": f"A text on {n}.", "label": n % 2, "idx": n},
            "truthfulqa": MC | {"question": f"Is it {n}?"},
            "lambada": {"text": f"He saw {n} the sea"},
            "gsm8k": {"question": f"{n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"},
            "mmlu": {"question": f" What is {n}? ", "subject": "anatomy", "choices": [f"{c}{n}" for c in "wxyz"], "answer": n % 4},
            "ceval": {"id": n, "question": f" 甲{n}？", "A": "一", "B": "二", "C": "三", "D": "四", "answer": "ABCD"[n % 4]},
        }[name])
    return rows


@pytest.mark.parametrize("ours, file, name, asked, examples, shots", [
    ("hellaswag", "hellaswag/hellaswag.yaml", "hellaswag", "validation", "train", 0),
    ("hellaswag", "hellaswag/hellaswag.yaml", "hellaswag", "validation", "train", 3),
    ("arc_easy", "arc/arc_easy.yaml", "arc", "test", "train", 3), ("piqa", "piqa/piqa.yaml", "piqa", "validation", "train", 2),
    ("openbookqa", "openbookqa/openbookqa.yaml", "openbookqa", "test", "train", 2),
    ("winogrande", "winogrande/default.yaml", "winogrande", "validation", "train", 2),
    ("boolq", "super_glue/boolq/default.yaml", "boolq", "validation", "train", 2),
    ("truthfulqa_mc1", "truthfulqa/truthfulqa_mc1.yaml", "truthfulqa", "validation", None, 0),
    ("truthfulqa_mc2", "truthfulqa/truthfulqa_mc2.yaml", "truthfulqa", "validation", None, 0),
    ("lambada", "lambada/lambada_openai.yaml", "lambada", "test", None, 0),
    ("gsm8k", "gsm8k/gsm8k.yaml", "gsm8k", "test", "train", 5),
    ("mmlu", "mmlu/default/mmlu_anatomy.yaml", "mmlu", "test", "dev", 3),
    ("ceval", "ceval/ceval-valid_accountant.yaml", "ceval", "val", "dev", 2)], ids=lambda x: str(x))
def test_prompts_equal_the_harness(tmp_path, ours, file, name, asked, examples, shots):
    rows = rows_for(name, 21)
    splits = {asked: rows[:6]} | ({examples: rows[6:]} if examples else {})
    theirs = harness_requests(file, splits, tmp_path, shots)
    if ours == "ceval":  # the authors' form is CSV, and a file bears its subject's name
        (tmp_path / "cev").mkdir()
        for split, part in splits.items():
            with open(tmp_path / "cev" / f"accountant_{split}.csv", "w", newline="", encoding="utf-8") as sheet:
                csv.writer(sheet).writerows([list(part[0]), *(row.values() for row in part)])
    items = read_benchmark(ours, tmp_path / "cev" if ours == "ceval" else tmp_path, shots=shots)
    assert len(items) == len(theirs) == 6
    for item, requests in zip(items, theirs):
        if BENCHMARKS[ours].kind == "gsm8k":
            assert [item.contexts[0]] == [args[0] for args in requests]
            assert set(BENCHMARKS[ours].stop) == set(requests[0][1]["until"])
        else:
            assert [(c, " " + choice) for c in item.contexts for choice in item.choices] == [tuple(args) for args in requests]


def test_math_examples_equal_the_harness():
    """Its module needs a parser of LaTeX; the function with the examples does not."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    source = Path(lm_eval.__file__).with_name("tasks") / "minerva_math" / "utils.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples":
            scope = {}
            exec(compile(ast.Module([node], []), str(source), "exec"), scope)
    assert MATH_SHOTS == [(shot["problem"], shot["solution"]) for shot in scope["list_fewshot_samples"]()]


# Bad input

@pytest.mark.parametrize("name, text, message", [
    ("hellaswig", "{}", "there is no benchmark 'hellaswig'; there are hellaswag, arc_easy, .*mbpp, text"),
    ("hellaswag", "", "a.jsonl: the file is empty"),
    ("hellaswag", "\n \n", "a.jsonl: the file is empty"),
    ("hellaswag", '{"query": "q", "choices": ["a", "b", "c", "d"], "gold": 1}\n{"query": ', "a.jsonl:2: no valid JSON"),
    ("hellaswag", "[1]", "a.jsonl: entry 1: no row of hellaswag, but a int; a row has"),
    ("hellaswag", "[]", "a.jsonl: has no rows"),
    ("hellaswag", json.dumps(HELLASWAG | {"label": ""}), "a.jsonl:1: no row of hellaswag .*a row has .activity_label"),
    ("hellaswag", json.dumps(HELLASWAG | {"label": "4"}), "there is no choice 4 among its 4"),
    ("hellaswag", json.dumps(HELLASWAG | {"endings": ["a", 1, "b", "c"]}), "a.jsonl:1: no row of hellaswag"),
    ("boolq", '{"query": "Question: x", "choices": ["a", "b"], "gold": 0}', "its query does not begin with 'Passage: '"),
    ("piqa", '{"question": "q", "answer": "#### 2"}', "a.jsonl:1: no row of piqa .'goal' is missing"),
    ("gsm8k", '{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}', "no row of gsm8k .'answer' is missing"),
    ("gsm8k", '{"question": "q", "answer": "2"}', 'its answer has no "#### number"'),
    ("math", '{"problem": "p", "solution": "5"}', "its solution has no .boxed answer"),
    ("arc_easy", '{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}', "a.jsonl:1"),
    ("truthfulqa_mc1", json.dumps(MC | {"mc1_targets": {"choices": ["a", "b"], "labels": [0, 0]}}), "true and false answers"),
    ("lambada", '{"text": "word"}', "its text has no two words"),
    ("mmlu", json.dumps({"question": "q", "choices": ["a"], "answer": 0}), "it has 1 choices, not 4"),
    ("text", '{"text": " "}', "its text is empty")])
def test_rows_that_do_not_parse(tmp_path, name, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_benchmark(name, tmp_path / "a.jsonl", shots=0)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such file"):
        read_benchmark("piqa", tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no file or folder named val or validation or valid or test in this folder"):
        read_benchmark("piqa", tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="a.jsonl: not readable as UTF-8"):
        read_benchmark("piqa", tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="a.jsonl.gz: not readable"):
        read_benchmark("piqa", tmp_path / "a.jsonl.gz")
    (tmp_path / "law_val.csv").write_text("id,question,A,B,C,D,answer\n0,q,a,b,c,d,A\n1,q,a,b,c\n")
    with pytest.raises(ValueError, match="law_val.csv:3: 5 fields, not 7"):
        read_benchmark("ceval", tmp_path / "law_val.csv")
    (tmp_path / "law_val.csv").write_text("id,question,A,B,C,D,answer\n0,q,a,b,c,d,\n")
    with pytest.raises(ValueError, match="law_val.csv:2: no row of ceval"):
        read_benchmark("ceval", tmp_path / "law_val.csv")
    write(tmp_path / "t.jsonl", MC)
    with pytest.raises(ValueError, match="truthfulqa_mc1 takes no examples"):
        read_benchmark("truthfulqa_mc1", tmp_path / "t.jsonl", shots=2)


def test_text_is_a_file_or_rows(tmp_path):
    (tmp_path / "a.txt").write_text("One.\nTwo.\n")
    assert read_benchmark("text", tmp_path / "a.txt") == [
        Item(f"{tmp_path / 'a.txt'}:1", ("",), ("One.\nTwo.\n",), text=" One.\nTwo.\n")]
    assert len(read_benchmark("text", write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b\u2028c"}))) == 2
