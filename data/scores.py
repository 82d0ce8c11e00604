r"""What an answer is worth: pure functions from texts and log-likelihoods to numbers. No model, no file.

    multiple choice    acc: argmax of log p(choice); acc_norm: of log p / characters; acc_bytes: of log p / UTF-8 bytes
    truthful (mc2)     sum of p over the true answers / sum of p over all
    standard error     sd / sqrt(n), sd with n - 1                         (n = 1: none)
    pass@k             1 - C(n - c, k) / C(n, k), c of n samples right         (Chen et al. 2021, eq. 1)
    GSM8K              strict: the number behind "####"; flexible: the last number in the text
    MATH               strict: the formula in "The final answer is ... I hope it is correct."; flexible: in the last
                       \boxed{}, or behind "final answer is"; compared after normalisation
    majority vote      the answer that most samples give                   (Wang et al. 2023, self-consistency)
    BLEU, ROUGE        as sacrebleu 2.x (13a, exp smoothing) and rouge-score (no stemming) compute them

    python data/scores.py        works a few out
"""

import lzma
import math
import re
import zlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from fractions import Fraction

# Likelihoods ----------------------------------------------------------------------------------------------------------


def choice_scores(logprobs: Sequence[float], choices: Sequence[str], gold: int) -> dict[str, float]:
    """{"acc", "acc_norm", "acc_bytes"} of one question, each 0 or 1; of equal values the first choice is taken.

    logprobs: of each choice's tokens, summed. Lengths are those of the choice without the blank before it; a choice
    without characters counts as one, or its quotient would be infinite."""
    lengths = {"acc": [1] * len(choices), "acc_norm": [len(choice) or 1 for choice in choices],
               "acc_bytes": [len(choice.encode()) or 1 for choice in choices]}
    best = {name: max(range(len(choices)), key=lambda i: logprobs[i] / n[i]) for name, n in lengths.items()}
    return {name: float(i == gold) for name, i in best.items()}


def true_share(logprobs: Sequence[float], gold: Iterable[int]) -> float:
    """TruthfulQA's mc2 (Lin et al. 2022): the share of probability on the true answers.

    Taken relative to the largest: e^-1000 itself is 0 in float64, and 0 / 0 no score."""
    weights = [math.exp(logp - max(logprobs)) for logp in logprobs]
    return sum(weights[i] for i in gold) / sum(weights)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error sd / sqrt(n); None for a single value, whose sd is unknown."""
    n, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(variance / (n - 1) / n) if n > 1 else None


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k samples is right, estimated without bias from n samples with c right ones.

    1 - prod (1 - k / i), i = n - c + 1 ... n: the quotient of binomials without their overflow. ValueError: k > n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples and 0 to n right ones; there are {n}, {c} right")
    return 1.0 if n - c < k else 1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))


def majority_vote(answers: Sequence[Hashable | None]) -> Hashable | None:
    """The most frequent answer; of equally frequent ones the earliest. None (no answer found) has no vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.get, default=None)  # max takes the first, a Counter keeps the order of arrival


# Text -----------------------------------------------------------------------------------------------------------------


def perplexity(nats: float, tokens: int) -> float:
    """The size of a vocabulary that would be as hard to guess from if all its tokens were equally likely."""
    return math.exp(nats / tokens)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """nats: of all tokens together, separators included; num_bytes: of the text in UTF-8."""
    return nats / (math.log(2) * num_bytes)


def compressed_bits_per_byte(texts: Iterable[str]) -> dict:
    """{"gzip": ..., "xz": ...}: bits that `gzip -9` and `xz -9` need per UTF-8 byte of the texts, joined into one."""
    gzip = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)  # 16 asks for gzip's header and checksum
    xz = lzma.LZMACompressor(preset=9)
    num_bytes, sizes = 0, {"gzip": 0, "xz": 0}
    for text in texts:
        data = text.encode()
        num_bytes += len(data)
        sizes["gzip"] += len(gzip.compress(data))
        sizes["xz"] += len(xz.compress(data))
    sizes["gzip"] += len(gzip.flush())
    sizes["xz"] += len(xz.flush())
    if not num_bytes:
        raise ValueError("there is no text to compress")
    return {name: 8 * size / num_bytes for name, size in sizes.items()}


def swapped_positions(first_wins: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """A judge that saw each pair of answers both ways round: (A shown first, B shown first) -> how often A wins.

    first_wins: 1 where the judge preferred the answer shown first, 0 the second, 0.5 neither. A's score on a pair is
    the mean of its two games, so a judge that always takes the first answer gives exactly 0.5. "consistent": share of
    the pairs where both games name the same winner; "first": how often the first answer won; 0.5 is no bias."""
    scores = [(a + 1 - b) / 2 for a, b in first_wins]
    win_rate, error = mean_and_error(scores)
    return {"pairs": len(scores), "win_rate": win_rate, "win_rate_stderr": error,
            "consistent": sum(a == 1 - b for a, b in first_wins) / len(scores),
            "first": sum(a + b for a, b in first_wins) / (2 * len(scores))}


# GSM8K ----------------------------------------------------------------------------------------------------------------


def gsm8k_strict(text: str) -> str | None:
    """The first number behind "####" in its normal form, or None."""
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return normal_number(found[1]) if found else None


def gsm8k_flexible(text: str) -> str | None:
    """The last number in the text in its normal form, or None."""
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return normal_number(found[-1]) if found else None


def normal_number(text: str) -> str:
    """Without commas, dollar signs and one final full stop: "$1,234." -> "1234"."""
    return re.sub(r"\.$", "", text.strip().replace(",", "").replace("$", ""))


# MATH -----------------------------------------------------------------------------------------------------------------


def math_strict(text: str) -> str | None:
    """What stands in the sentence that Minerva's examples end with, in its normal form, or None."""
    found = re.search(r"Final Answer: The final answer is(.*?)\. I hope it is correct", text)
    return normal_formula(found[1]) if found else None


def math_flexible(text: str) -> str | None:
    r"""The last \boxed{...}, else what stands behind "final answer is" up to the line's end; normal form, or None."""
    found = re.findall(r"(?i)final answer is:?(.*?)(?:\. I hope|\.?$)", text, re.MULTILINE)
    boxed = last_boxed(text)
    return normal_formula(boxed if boxed is not None else found[-1]) if boxed is not None or found else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...}, braces matched; also of "\boxed 5"; None without one."""
    starts = [found.end() for found in re.finditer(r"\\boxed|\\fbox", text)]
    if not starts:
        return None
    rest = text[starts[-1]:].lstrip()
    if not rest.startswith("{"):
        return re.match(r"[^$\s]*", rest)[0] or None
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i]
    return None  # never closed


def math_equal(a: str | None, b: str | None) -> bool:
    """Whether two formulas are the same answer: equal after `normal_formula`, or two equal numbers (1/2, 0.5, 50/100).

    There is no computer algebra: x + 1 and 1 + x differ. None equals nothing."""
    if a is None or b is None:
        return False
    a, b = normal_formula(a), normal_formula(b)
    x, y = number(a), number(b)
    return a == b or x is not None and x == y


REPLACED = (("\n", ""), ("\\!", ""), ("\\,", ""), ("\\;", ""), ("\\:", ""), ("\\ ", ""), ("\\\\", "\\"),
            ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""),
            ("\\$", ""), ("$", ""), ("\\%", ""), ("%", ""), ("{,}", ","), ("mbox", "text"), ("mathrm", "text"))


def normal_formula(formula: str) -> str:
    r"""One spelling for the many of a MATH answer, after Hendrycks et al. 2021 and Lewkowycz et al. 2022, appendix D.

    Spaces, \left and \right, degrees, dollars, percent signs and units go; \dfrac12, \frac{1}{2} and 1/2 are one; so
    are \sqrt2 and \sqrt{2}, .5 and 0.5, 1,000 and 1000; "x = 5" is 5; a final full stop goes."""
    for old, new in REPLACED:
        formula = formula.replace(old, new)
    formula = re.sub(r"\\text\{ .*", "", formula.strip())  # a blank first: a unit behind the number
    formula = re.sub(r"\\text(?:bf|it)?\{(.*?)\}", r"\1", formula).replace(" ", "").rstrip(".")
    name, equals, value = formula.partition("=")
    if equals and len(name) <= 2 and "=" not in value:
        formula = value
    formula = re.sub(r"\\sqrt([^{\[])", r"\\sqrt{\1}", formula)
    formula = re.sub(r"\\frac([^{])", r"\\frac{\1}", formula)
    formula = re.sub(r"(\\frac\{[^{}]*\})([^{])", r"\1{\2}", formula)
    formula = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", formula)
    formula = re.sub(r"(^|[^\d])\.(\d)", r"\g<1>0.\2", formula)
    return re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", formula) if re.fullmatch(r"-?[\d,.]+", formula) else formula


def number(formula: str) -> Fraction | None:
    """The value of a normal formula that is a decimal or a fraction of whole numbers; else None."""
    found = re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}", formula)
    if found and int(found[3]):
        return Fraction(int(found[2]), int(found[3])) * (-1 if found[1] else 1)
    return Fraction(formula) if re.fullmatch(r"-?\d+(\.\d+)?", formula) else None


# BLEU -----------------------------------------------------------------------------------------------------------------


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU from 0 to 100 (Papineni et al. 2002) of n texts, each with one or more references.

        BP * exp(mean over n = 1..4 of log p_n),  p_n = matched n-grams / n-grams,  BP = min(1, e^(1 - r / c))

    c: words of all hypotheses, r: of the references nearest to them in length (of two the shorter). The m-th order that
    has n-grams but no match counts 2^-m matches (NIST's smoothing). Words as mteval-v13a cuts them."""
    if len(hypotheses) != len(references) or not hypotheses or not all(references):
        raise ValueError("as many lists of references as hypotheses are needed, and none empty")
    matched, total, c, r = [0] * 4, [0] * 4, 0, 0
    for hypothesis, texts in zip(hypotheses, references):
        words, others = words_13a(hypothesis), [words_13a(text) for text in texts]
        c += len(words)
        r += min((abs(len(words) - len(other)), len(other)) for other in others)[1]
        for n in range(1, 5):
            allowed = Counter()
            for other in others:
                allowed |= ngrams(other, n)  # the most that one reference has
            found = ngrams(words, n)
            matched[n - 1] += (found & allowed).total()
            total[n - 1] += found.total()
    if not any(matched) or not all(total):
        return 0.0
    logs, smooth = 0.0, 1.0
    for m, t in zip(matched, total):
        smooth = smooth * 2 if m == 0 else smooth
        logs += math.log(m / t if m else 1 / (smooth * t)) / 4
    return 100 * min(1.0, math.exp(1 - r / c)) * math.exp(logs)


def words_13a(text: str) -> list[str]:
    """Words and punctuation marks, as NIST's mteval-v13a.pl cuts Western languages."""
    for old, new in (("<skipped>", ""), ("-\n", ""), ("\n", " "), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"),
                     ("&gt;", ">")):
        text = text.replace(old, new)
    text = f" {text} "
    for pattern, new in ((r"([{-~\[-` -&(-+:-@/])", r" \1 "), (r"([^0-9])([.,])", r"\1 \2 "),
                         (r"([.,])([^0-9])", r" \1 \2"), (r"([0-9])(-)", r"\1 \2 ")):
        text = re.sub(pattern, new, text)
    return text.split()


def ngrams(words: Sequence[Hashable], n: int) -> Counter:
    return Counter(zip(*(words[i:] for i in range(n))))


# ROUGE ----------------------------------------------------------------------------------------------------------------


def rouge(hypothesis: str, reference: str) -> dict[str, float]:
    """{"rouge1", "rouge2", "rougeL"}: F-measures from 0 to 1 (Lin 2004) of common words, word pairs, subsequence.

        F = 2 P R / (P + R),  P = common / in the hypothesis,  R = common / in the reference"""
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (hypothesis, reference))

    def f(common: int, of_a: int, of_b: int) -> float:
        return 2 * common / (of_a + of_b) if common else 0.0  # = 2 P R / (P + R)

    scores = {}
    for n in (1, 2):
        x, y = ngrams(a, n), ngrams(b, n)
        scores[f"rouge{n}"] = f((x & y).total(), x.total(), y.total())
    return scores | {"rougeL": f(common_subsequence(a, b), len(a), len(b))}


def common_subsequence(a: Sequence, b: Sequence) -> int:
    """Length of the longest common subsequence, one row of the table at a time."""
    row = [0] * (len(b) + 1)
    for x in a:
        above = row
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


# Records --------------------------------------------------------------------------------------------------------------


def likelihood_record(kind: str, item, results: list[tuple[float, bool]]) -> dict:
    """The record of one question from its continuations' (log p, greedy). kind, item: as in data/benchmarks.py."""
    logprobs = [logp for logp, _ in results]
    if kind == "text":
        document = item.choices[0]
        return {"logprob": sum(logprobs), "words": len(re.split(r"\s+", document)), "bytes": len(document.encode())}
    if kind == "last_word":
        return {"logprob": logprobs[0], "acc": float(results[0][1])}
    if kind == "mc2":
        return {"logprobs": logprobs, "acc": true_share(logprobs, item.gold)}
    scores = choice_scores(logprobs, item.choices if kind == "choice" else item.contexts, item.gold[0])
    return {"logprobs": logprobs} | (scores if kind == "choice" else {"acc": scores["acc"]})


def text_record(kind: str, target: str, texts: list[str]) -> dict:
    """The record of one gsm8k or math question: its answers and the share of them that is right, extracted either way;
    with several answers also whether the majority of the flexibly extracted ones is right."""
    strict, flexible = (gsm8k_strict, gsm8k_flexible) if kind == "gsm8k" else (math_strict, math_flexible)
    right, record = gsm8k_strict(target) if kind == "gsm8k" else last_boxed(target), {"answers": texts}

    def is_right(answer: str | None) -> float:
        return float(answer == right if kind == "gsm8k" else math_equal(answer, right))

    for way, extract in (("strict", strict), ("flexible", flexible)):
        record[way] = sum(is_right(extract(text)) for text in texts) / len(texts)
    if len(texts) > 1:
        record["majority"] = is_right(majority_vote([flexible(text) for text in texts]))
    return record


def summarize(kind: str, records: list[dict]) -> dict:
    """The figures of a benchmark: means over its records, each with its standard error."""
    result = {"questions": len(records)}
    if kind == "text":
        nats, words, size = (sum(record[key] for record in records) for key in ("logprob", "words", "bytes"))
        return result | {"word_perplexity": math.exp(-nats / words), "byte_perplexity": math.exp(-nats / size),
                         "bits_per_byte": bits_per_byte(-nats, size)}
    if kind == "code":
        n = len(records[0]["passed"])
        columns = {f"pass@{k}": [pass_at_k(n, sum(record["passed"]), k) for record in records]
                   for k in sorted({1, 10, 100, n}) if k <= n}
    else:
        names = ("acc", "acc_norm", "acc_bytes", "strict", "flexible", "majority")
        columns = {key: [record[key] for record in records] for key in names if key in records[0]}
    for key, values in columns.items():
        result[key], result[f"{key}_stderr"] = mean_and_error(values)
    if kind == "last_word":
        result["perplexity"] = math.exp(-sum(record["logprob"] for record in records) / len(records))
    return result


def main() -> None:
    print("pass@1, pass@10 with 5 of 20 right:", pass_at_k(20, 5, 1), round(pass_at_k(20, 5, 10), 4))
    print("GSM8K:", gsm8k_flexible("She has 3 + 4 = 7 left, so $1,234."), "MATH:", math_equal("\\dfrac12", "0.50"))
    print("BLEU:", round(bleu(["the cat sat on the mat"], [["the cat is on the mat"]]), 2),
          "ROUGE:", rouge("the cat sat on the mat", "the cat is on the mat"))


if __name__ == "__main__":
    main()
