"""Has the model seen the test? Questions whose words stand in the training data.

    a question is contaminated if 13 consecutive words of it occur in a training document, case and punctuation aside

After Brown et al. 2020, appendix C. A question of 8 to 12 words counts as one n-gram of its own length; shorter ones
are not looked up: "What is the capital of France" stands everywhere. Where no blanks stand between words (Chinese,
Japanese, Thai) each character is one; there 13 are few, so take a larger n.

    flags = contaminated(["question and answer", ...], training_documents)    # True, False, or None: too short
"""

import re
from collections.abc import Iterable

SHORTEST = 8  # words
UNSPACED = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"  # Thai and Lao, Japanese, Chinese


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; each character of a script that writes no blanks between words is one."""
    return re.findall(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+", text.lower())


def contaminated(questions: list[str], documents: Iterable[str], n: int = 13) -> list[bool | None]:
    """For each question whether it shares an n-gram of words with a document; None if it has fewer than 8 words.

    The questions' n-grams are held in memory, the documents stream by."""
    owners: dict[int, dict[tuple, list[int]]] = {}  # length of the n-gram -> n-gram -> questions that have it
    flags: list[bool | None] = []
    for i, question in enumerate(questions):
        found = words(question)
        flags.append(False if len(found) >= min(n, SHORTEST) else None)
        if flags[i] is not None:
            size = min(n, len(found))
            for gram in zip(*(found[k:] for k in range(size))):
                owners.setdefault(size, {}).setdefault(gram, []).append(i)
    for document in documents:
        found = words(document)
        for size, grams in owners.items():
            for gram in set(zip(*(found[k:] for k in range(size)))) & grams.keys():
                for i in grams[gram]:
                    flags[i] = True
    return flags


if __name__ == "__main__":
    book = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of folly."
    print(contaminated(["IT WAS THE AGE of wisdom -- it was the age of folly!", "the age of wisdom",
                        "it was the best of all times and it was the worst of them"], [book]))
