"""Tokenizer speed: train on the whole standard library, encode it, and compare 100,000 fuzzed strings with the truth.

    python bench/bench_tokenizer.py         # writes bench/results/tokenizer.json
"""

import random
import sys
import sysconfig
import time
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.results_io import write_results
from data.tokenizer import BPETokenizer, CharTokenizer

VOCAB_SIZE = 8192


def standard_library() -> list[str]:
    """Every .py file of the installed Python, its tests included, site-packages left out."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts)
    return [path.read_bytes().decode("utf-8", errors="replace") for path in paths]


def fuzzed(count: int) -> list[str]:
    """Random strings of assigned code points: of one plane, of ASCII, of blanks, of Chinese and Japanese."""
    rng = random.Random(0)
    known = [c for c in map(chr, range(0x20, 0x20000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    pools = [known, [c for c in known if c < "\x7f"], [c for c in known if "\u3040" <= c < "\ua000"],
             " \n\t\r\u00a0\u3000", ["the ", " of", "def ", "'ll", "<|endoftext|>", "\n    "]]
    return ["".join("".join(rng.choices(rng.choice(pools), k=rng.randint(1, 8))) for _ in range(rng.randint(1, 5)))
            for _ in range(count)]


def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def main() -> None:
    texts = standard_library()
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer, seconds = timed(BPETokenizer.train, texts, VOCAB_SIZE)
    rows = [{"what": f"train BPE, vocabulary {tokenizer.vocab_size}", "files": len(texts), "megabytes": megabytes,
             "seconds": seconds}]
    characters, _ = timed(CharTokenizer.train, texts)
    for what, encoder in (("encode BPE, one thread", tokenizer), ("encode characters, one thread", characters)):
        ids, seconds = timed(encoder.encode_batch, texts)
        tokens = sum(map(len, ids))
        rows.append({"what": what, "seconds": seconds, "megabytes_per_second": megabytes / seconds,
                     "bytes_per_token": megabytes * 1e6 / tokens})
    strings = fuzzed(100_000)
    unequal = sum(tokenizer.encode(text) != tokenizer.encode_reference(text) for text in strings)
    unequal_code = sum(tokenizer.encode(text) != tokenizer.encode_reference(text) for text in texts)
    rows.append({"what": "encode (tiktoken) against encode_reference (Python)", "strings": len(strings),
                 "unequal": unequal, "files": len(texts), "unequal_files": unequal_code})
    write_results("tokenizer", rows)


if __name__ == "__main__":
    main()
