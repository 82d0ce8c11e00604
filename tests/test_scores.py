"""Scores against figures worked out by hand, brute force, sacrebleu, rouge-score and lm-evaluation-harness."""

import ast
import itertools
import math
import random
import warnings
from pathlib import Path

import pytest

from data.benchmarks import Item, read_benchmark
from data.contamination import contaminated, words
from data.needle import CITIES, haystack_cells, heat_map, report_page, share_found
from data.scores import (bleu, choice_scores, common_subsequence, gsm8k_flexible, gsm8k_strict, last_boxed,
                         likelihood_record, majority_vote, math_equal, math_flexible, math_strict, mean_and_error,
                         normal_formula, number, pass_at_k, rouge, summarize, swapped_positions, text_record, true_share,
                         words_13a)

# Likelihoods


def test_acc_divides_by_nothing_acc_norm_by_characters_acc_bytes_by_bytes():
    """"ja" has 2 characters and 2 bytes, "né" 2 and 3, "nein" 4 and 4: three different winners."""
    choices, logprobs = ["ja", "né", "nein"], [-3.0, -3.2, -6.0]
    assert choice_scores(logprobs, choices, 0) == {"acc": 1, "acc_norm": 1, "acc_bytes": 0}  # -3, -1.5, -1.5
    assert choice_scores(logprobs, choices, 1) == {"acc": 0, "acc_norm": 0, "acc_bytes": 1}  # -3.2 / 3 = -1.067
    assert choice_scores([-3.0, -3.2, -5.9], choices, 2) == {"acc": 0, "acc_norm": 1, "acc_bytes": 0}  # -1.475
    assert choice_scores([-1.0, -1.0], ["a", "b"], 0)["acc"] == 1 and choice_scores([-1.0, -1.0], ["a", "b"], 1)["acc"] == 0


def test_mc2_is_the_share_of_the_true_answers():
    assert true_share([math.log(0.2), math.log(0.1), math.log(0.3)], [0, 1]) == pytest.approx(0.5, rel=1e-15)
    far = [-5000.0, -5000.0 + math.log(3)]  # both e^-5000, which is 0 in float64
    assert true_share(far, [1]) == pytest.approx(0.75, rel=1e-12)


def test_standard_error_is_the_samples_own():
    assert mean_and_error([1, 0, 0, 1]) == (0.5, pytest.approx(math.sqrt(1 / 3) / 2, rel=1e-15))
    assert mean_and_error([0.25]) == (0.25, None)
    theirs = pytest.importorskip("lm_eval.api.metrics", reason="lm_eval is not installed")
    values = [random.Random(n).random() for n in range(50)]
    assert mean_and_error(values)[1] == pytest.approx(theirs.mean_stderr(values), rel=1e-12)


@pytest.mark.parametrize("n, c, k", [(5, 0, 1), (5, 2, 1), (5, 2, 2), (6, 3, 4), (6, 1, 6), (7, 7, 3)])
def test_pass_at_k_equals_all_subsets(n, c, k):
    right = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(right, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-14)


def test_pass_at_k_does_not_overflow_and_refuses_too_few_samples():
    assert pass_at_k(100_000, 1, 1000) == pytest.approx(0.01, rel=1e-12)
    with pytest.raises(ValueError, match="pass@3 needs at least 3 samples"):
        pass_at_k(2, 1, 3)


def test_majority_vote():
    assert majority_vote(["7", "8", None, "8", "7", "8"]) == "8"
    assert majority_vote(["9", "3", "3", "9"]) == "9"  # a tie: what came first
    assert majority_vote([None, None, "4"]) == "4" and majority_vote([None]) is None and majority_vote([]) is None


def test_an_always_first_judge_scores_half():
    assert swapped_positions([(1.0, 1.0)] * 7) == {"pairs": 7, "win_rate": 0.5, "win_rate_stderr": 0.0,
                                                   "consistent": 0.0, "first": 1.0}
    fair = swapped_positions([(1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])  # wins, loses, wins, first always
    assert (fair["win_rate"], fair["consistent"], fair["first"]) == (0.625, 0.75, 0.625)


# GSM8K and MATH

def test_gsm8k_extraction():
    assert gsm8k_strict("So 3.\n#### 1,234.") == "1234" and gsm8k_strict("#### -5 #### 6") == "-5"
    assert gsm8k_strict("The answer is 18") is None
    assert gsm8k_flexible("She makes 9 * 2 = $18.") == "18" and gsm8k_flexible("1 or 2, then 3") == "3"
    assert gsm8k_flexible("it costs $1,200.50!") == "1200.50" and gsm8k_flexible("none") is None


def test_gsm8k_equals_the_harness_on_its_own_answers(shared_data):
    extraction = pytest.importorskip("lm_eval.filters.extraction", reason="lm_eval is not installed")
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="lm_eval is not installed")
    items = read_benchmark("gsm8k", shared_data / "gsm8k", shots=0, limit=200)
    rng = random.Random(0)
    texts = [rng.choice((item.target, item.target.replace("####", "The answer is"), item.target + " or 7, or $3,000."))
             for item in items]
    for ours, settings in ((gsm8k_strict, {"regex_pattern": r"#### (\-?[0-9\.\,]+)"}),
                           (gsm8k_flexible, {"regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)", "group_select": -1})):
        found = extraction.RegexFilter(**settings).apply([[text] for text in texts], [{}] * len(texts))
        for item, text, (theirs,) in zip(items, texts, found):
            exact = metrics.exact_match_hf_evaluate([theirs], [item.target], ignore_case=True,
                                                    regexes_to_ignore=[",", r"\$", "(?s).*#### ", r"\.$"])["exact_match"]
            assert (ours(text) == gsm8k_strict(item.target)) == bool(exact), text


def test_gsm8k_record_with_votes():
    texts = ["#### 4", "so 5", "I say 5.", "#### 5", "no idea"]
    record = text_record("gsm8k", "2 + 3.\n#### 5", texts)
    assert record == {"answers": texts, "strict": 0.2, "flexible": 0.6, "majority": 1.0}
    assert text_record("gsm8k", "#### 5", ["nothing"]) == {"answers": ["nothing"], "strict": 0.0, "flexible": 0.0}


@pytest.mark.parametrize("text, answer", [
    (r"so \boxed{\frac{1}{2}} and", r"\frac{1}{2}"), (r"\boxed{1} then \boxed{2}", "2"), (r"\fbox{3}", "3"),
    (r"$\boxed 5$", "5"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{1", None), ("none", None)])
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


SAME = [(r"\dfrac{1}{2}", r"\frac12"), ("1/2", r"\frac{1}{2}"), ("0.5", r"\frac12"), (".5", "0.50"), (r"\sqrt3", r"\sqrt{3}"),
        ("1,000", "1000"), (r"10\%", "10"), (r"\$5", "5"), (r"90^\circ", "90"), ("x = 7", "7"), (r"\left( 3, \frac{\pi}{2} \right)",
        r"(3,\frac{\pi}{2})"), (r"\text{even}", "even"), (r"5\text{ cm}", "5"), (r"-\frac{2}{3}", r"\frac{-2}{3}"), ("5.", "5"),
        (r"\frac{50}{100}", "1/2"), ("2{,}000", "2000"), (r"3 \sqrt {2}", r"3\sqrt2"), ("1,2", "1, 2")]


@pytest.mark.parametrize("a, b", SAME)
def test_math_equal(a, b):
    assert math_equal(a, b) and math_equal(b, a)


@pytest.mark.parametrize("a, b", [("1", "2"), ("x+1", "1+x"), ("1,2", "12"), (r"\frac{1}{0}", "0"), (None, None), ("", "0"),
                                  (r"\sqrt{2}", "1.4142"), ("-5", "5"), ("1,000", "1,00")])
def test_math_unequal(a, b):
    assert not math_equal(a, b)


def test_math_answers_of_the_real_file_are_themselves(shared_data):
    """MATH-500 gives each answer twice: in the box of the solution, and by itself."""
    import json
    rows = json.loads((shared_data / "math500" / "math500_test.json").read_text(encoding="utf-8"))
    wrong = [row["answer"] for row in rows if not math_equal(last_boxed(row["solution"]), row["answer"])]
    assert wrong == [] and len(rows) == 500
    others = sum(math_equal(a["answer"], b["answer"]) for a, b in zip(rows, rows[1:]))
    assert others < 25  # neighbours agree by chance only: small numbers


def test_math_strict_and_flexible():
    solution = r"We get $\boxed{24}.$" + "\nFinal Answer: The final answer is $24$. I hope it is correct."
    assert math_strict(solution) == "24" and math_flexible(solution) == "24"
    assert math_strict(r"\boxed{24}") is None and math_flexible(r"\boxed{24}") == "24"
    assert math_flexible("The final answer is: $7$.\nDone") == "7" and math_flexible("seven") is None
    assert text_record("math", r"It is $\boxed{\frac12}$.", ["Final Answer: The final answer is $0.5$. I hope it is correct."]
                       )["strict"] == 1.0


def test_math_normal_form_is_never_narrower_than_hendrycks(shared_data):
    """What the harness's string comparison of Hendrycks et al. takes for equal is equal here, too."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    source = Path(lm_eval.__file__).with_name("tasks") / "hendrycks_math" / "utils.py"
    scope, left_out = {}, ("process_docs", "process_results")
    with warnings.catch_warnings():  # it has an unknown escape
        warnings.simplefilter("ignore")
        tree = ast.parse(source.read_text(encoding="utf-8"))
        body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name not in left_out]
        exec(compile(ast.Module(body, []), str(source), "exec"), scope)
    path = shared_data / "core_eval" / "symbolic_problem_solving" / "math.jsonl"
    answers = [last_boxed(item.target) for item in read_benchmark("math", path, shots=0, limit=600)]
    by_form = {}
    for answer in answers:
        by_form.setdefault(scope["strip_string"](answer), []).append(answer)
    for same in by_form.values():
        for other in same[1:]:
            assert math_equal(same[0], other), (same[0], other)
    assert normal_formula("x=5") == "5" and number("5") == 5 and number("x") is None


# Records

def test_records_and_summary_by_hand():
    item = Item("f:1", ("c",), ("ab", "cdef"), (1,))
    record = likelihood_record("choice", item, [(-2.0, True), (-3.0, False)])
    assert record == {"logprobs": [-2.0, -3.0], "acc": 0.0, "acc_norm": 1.0, "acc_bytes": 1.0}
    partial = Item("f:1", ("c1", "c2"), ("end",), (0,))
    assert likelihood_record("partial", partial, [(-2.0, False), (-3.0, False)]) == {"logprobs": [-2.0, -3.0], "acc": 1.0}
    word = likelihood_record("last_word", Item("f:1", ("c",), ("w",), (0,)), [(-1.5, True)])
    assert word == {"logprob": -1.5, "acc": 1.0}
    figures = summarize("last_word", [word, {"logprob": -0.5, "acc": 0.0}])
    assert figures == {"questions": 2, "acc": 0.5, "acc_stderr": 0.5, "perplexity": pytest.approx(math.e)}
    text = likelihood_record("text", Item("f:1", ("",), ("two wörds",)), [(-3.0, False), (-1.0, False)])
    assert text == {"logprob": -4.0, "words": 2, "bytes": 10}
    assert summarize("text", [text]) == {"questions": 1, "word_perplexity": pytest.approx(math.exp(2)),
                                         "byte_perplexity": pytest.approx(math.exp(0.4)),
                                         "bits_per_byte": pytest.approx(0.4 / math.log(2))}
    code = [{"passed": [True] + [False] * 9}, {"passed": [False] * 10}]
    assert summarize("code", code) == {"questions": 2, "pass@1": pytest.approx(0.05), "pass@1_stderr": pytest.approx(0.05),
                                       "pass@10": 0.5, "pass@10_stderr": 0.5}


# BLEU and ROUGE

def test_bleu_by_hand():
    """the cat sat on the mat / the cat is on the mat: 5/6, 3/5, 1/4 and no four words; NIST's smoothing gives 1/(2*3)."""
    expected = 100 * math.exp(sum(map(math.log, (5 / 6, 3 / 5, 1 / 4, 1 / 6))) / 4)
    assert bleu(["the cat sat on the mat"], [["the cat is on the mat"]]) == pytest.approx(expected, rel=1e-14)
    assert bleu(["a b c d"], [["a b c d e"]]) == pytest.approx(100 * math.exp(1 - 5 / 4), rel=1e-14)  # brevity alone
    assert bleu(["a b c d e"], [["a b c d"], ]) == pytest.approx(100 * math.exp(sum(map(math.log, (4/5, 3/4, 2/3, 1/2))) / 4))
    assert bleu(["x"], [["y"]]) == 0.0 == bleu(["the"], [["the"]])  # too short for four words
    with pytest.raises(ValueError, match="as many lists of references"):
        bleu(["a"], [])


SENTENCES = ["The cat sat on the mat.", "It cost $1,234.50 (i.e. 5-10% more), didn't it?", "Ein \"Zitat\" & mehr: a-b, 3-4!",
             "A line\nbroken, and hyphen-\nated.", "&quot;Quoted&quot; &lt;tag&gt; &amp; U.S. e.g. 3.14", "", "ünïcödé — dashes – €5",
             "the the the the the the the", "The cat is on the mat . The cat sat ."]


def test_bleu_equals_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    rng = random.Random(0)
    tokenizer = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    for sentence in SENTENCES:
        assert words_13a(sentence) == tokenizer(sentence).split()
    for _ in range(60):
        n, k = rng.randrange(1, 5), rng.randrange(1, 4)
        shuffled = lambda text: " ".join(rng.sample(text.split(" "), len(text.split(" "))))  # noqa: E731
        mix = lambda: f"{rng.choice(SENTENCES)} {shuffled(rng.choice(SENTENCES))}"  # noqa: E731
        texts, references = [mix() for _ in range(n)], [[mix() for _ in range(k)] for _ in range(n)]
        theirs = sacrebleu.corpus_bleu(texts, [list(column) for column in zip(*references)]).score
        assert bleu(texts, references) == pytest.approx(theirs, abs=1e-9)


def test_rouge_by_hand():
    """5 of 6 words, 3 of 5 pairs; the longest common subsequence is the cat _ on the mat."""
    assert rouge("the cat sat on the mat", "The cat is on the mat!") == {
        "rouge1": pytest.approx(5 / 6), "rouge2": pytest.approx(3 / 5), "rougeL": pytest.approx(5 / 6)}
    assert rouge("a b", "a b c d")["rouge1"] == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert rouge("", "a") == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


def test_common_subsequence_equals_brute_force():
    rng = random.Random(1)
    for _ in range(50):
        a, b = ([rng.choice("ab c") for _ in range(rng.randrange(7))] for _ in range(2))
        subsets = {s for n in range(len(a) + 1) for s in itertools.combinations(a, n)}
        others = {s for n in range(len(b) + 1) for s in itertools.combinations(b, n)}
        assert common_subsequence(a, b) == max(map(len, subsets & others))


def test_rouge_equals_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    scorer = scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for a, b in itertools.product(SENTENCES, SENTENCES):
        theirs = scorer.score(b, a)
        assert rouge(a, b) == {name: pytest.approx(theirs[name].fmeasure, abs=1e-12) for name in theirs}


# Contamination

BOOK = "It was the best of times, it was the worst of times; it was the age of wisdom -- it was the age of foolishness."


def test_thirteen_words_whatever_case_and_punctuation():
    assert words("It's 3.5 km, OK? 北京") == ["it", "s", "3", "5", "km", "ok", "北", "京"]
    twelve = "Q: the WORST of times! It was (the) age of wisdom, it was"  # 12 of the book's words in a row
    assert contaminated([twelve, "was " + twelve[3:], "the worst of times it was the age of wisdom it was never"],
                        [BOOK]) == [False, True, False]


def test_short_questions_are_looked_up_whole_or_not_at_all():
    assert contaminated(["the age of wisdom", "the age of wisdom, it was the age", "the age of wisdom, it was the rage"],
                        ["nothing here", BOOK]) == [None, True, False]
    assert contaminated(["best of times it was"], [BOOK], n=5) == [True]
    assert contaminated([], [BOOK]) == [] and contaminated([BOOK], []) == [False]


def test_contamination_equals_brute_force():
    rng = random.Random(2)
    documents = [" ".join(rng.choice("abc") for _ in range(60)) for _ in range(4)]
    questions = [" ".join(rng.choice("abc") for _ in range(14)) for _ in range(300)]
    documents += [questions[5] + " a", "b " + questions[9][2:]]

    def brute(question):
        found = question.split()
        return any(f" {' '.join(found[i:i + 13])} " in f" {document} " for i in range(2) for document in documents)

    flags = contaminated(questions, iter(documents))
    assert flags == [brute(question) for question in questions] and flags[5] and flags[9]


# Needle in a haystack

def reader(seen):
    """Answers from the last `seen` words of a prompt, as a model with that context would; the city is asked for last."""
    def answer(prompt):
        city, text = prompt[-2], prompt[-seen:]
        for i, word in enumerate(text[:-6]):
            if text[i:i + 5] == ["The", "magic", "number", "of", city] and text[i + 5] == "is":
                return " " + text[i + 6]
        return " unknown"
    return answer


def test_grid_of_a_reader_that_sees_the_last_half():
    filler = "It rained . Nobody came . The cat slept .".split()
    cells = haystack_cells([60, 100], [0, 50, 100], filler, str.split, seed=3, ends=lambda word: word == ".")
    assert [(cell.length, cell.depth) for cell in cells] == list(itertools.product([60, 100], [0, 50, 100]))
    assert all(len(prompt) == cell.length for cell in cells for prompt in cell.prompts)
    for cell in cells:
        place = cell.prompts[0].index(cell.answers[0] + ".")  # 6 words before it are the needle's, too
        assert place == {0: 6, 100: cell.length - 7}.get(cell.depth, place)
        assert cell.depth != 50 or cell.prompts[0][place - 7] == "."  # moved back to a sentence's end
    found = {(cell.length, cell.depth): share_found(cell.answers, [reader(55)(prompt) for prompt in cell.prompts])
             for cell in cells}
    assert found == {(60, 0): 0, (60, 50): 1, (60, 100): 1, (100, 0): 0, (100, 50): 0, (100, 100): 1}


def test_several_needles_each_asked_for():
    filler = ["hay"] * 7
    (cell,) = haystack_cells([120], [0], filler, str.split, needles=3)
    assert len(cell.prompts) == len(cell.answers) == len(set(cell.answers)) == 3
    places = [cell.prompts[0].index(answer + ".") for answer in cell.answers]
    room = 120 - 3 * 7 - 6
    assert places == [6, round(room / 3) + 7 + 6, round(room * 2 / 3) + 14 + 6]  # depth 0, 1/3, 2/3 of the filler
    answers = [reader(999)(prompt) for prompt in cell.prompts]
    assert share_found(cell.answers, answers) == 1 and share_found(cell.answers, [answers[0], "", answers[0]]) == 1 / 3
    assert share_found(["4817"], [" 4817. The"]) == 1 and share_found(["4817"], [" not 4817"]) == 0


def test_what_a_haystack_refuses():
    for lengths, depths, filler, needles, message in (
            ([50], [0], [], 1, "no text to make a haystack"), ([50], [101], ["a"], 1, "a depth of 101"),
            ([12], [0], ["a"], 1, "a length of 12 tokens: needles and question alone take 13"),
            ([500], [0], ["a"], len(CITIES) + 1, "needles is 13; it must be from 1 to 12")):
        with pytest.raises(ValueError, match=message):
            haystack_cells(lengths, depths, filler, str.split, needles=needles)


def test_heat_map_carries_its_numbers():
    rows = [{"length": n, "depth": d, "found": f} for n, d, f in ((512, 0.0, 1.0), (512, 50.0, 0.5), (1024, 0.0, 0.0))]
    page = report_page("a < b", {"model": "m", "benchmarks": {"x": {"acc": 0.5}}, "needles": rows}, "p {}")
    assert 'data-length="512" data-depth="50" data-found="0.5"' in page and page.count("<rect") == 3
    assert "benchmarks · x · acc</th><td>0.5000" in page and "a &lt; b" in page and "<script" not in page
    assert heat_map(rows) in page and "hsl(0 55% 60%)" in heat_map(rows)
