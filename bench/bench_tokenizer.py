"""Tokenizer speed: train on the whole standard library, encode it, and compare 100,000 fuzzed strings with the truth.

    python bench/bench_tokenizer.py                            # writes bench/results/tokenizer.json
    python bench/bench_tokenizer.py tokenizer.json x.model     # these files instead: bench/results/tokenizer_files.json

Of each file: time to load, speed, and how many of 20,000 fuzzed strings get other ids, or another text back, than from
the package that the file belongs to, `tokenizers` (where it is installed) or `sentencepiece`.
"""

import json
import random
import sys
import sysconfig
import time
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.results_io import write_results
from data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer

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


def peer(path: Path):
    """(encode, decode) of the package that wrote the file; None where it is not installed, or is tiktoken."""
    if ".model" in path.name:
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return model.encode, model.decode
    try:
        import tokenizers
    except ImportError:
        return None
    if path.suffix != ".json" or "vocab" not in json.loads(path.read_text(encoding="utf-8")).get("model", {}):
        return None
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True  # the text of special tokens stays text, as here
    return (lambda text: theirs.encode(text, add_special_tokens=False).ids,
            lambda ids: theirs.decode(ids, skip_special_tokens=False))


def measure_file(path: Path, texts: list[str], strings: list[str]) -> dict:
    tokenizer, seconds = timed(load_tokenizer, path)
    row = {"file": "/".join(path.parts[-2:]), "kind": type(tokenizer).__name__, "load_seconds": seconds}
    ids, seconds = timed(tokenizer.encode_batch, texts)
    row["megabytes_per_second"] = sum(len(text.encode()) for text in texts) / 1e6 / seconds
    if theirs := peer(path):
        encode, decode = theirs
        ids = [tokenizer.encode(text) for text in strings]
        row |= {"strings": len(strings), "unequal_ids": sum(ours != encode(text) for ours, text in zip(ids, strings)),
                "unequal_texts": sum(tokenizer.decode(one) != decode(one) for one in ids)}
    return row


def main() -> None:
    texts = standard_library()
    if sys.argv[1:]:
        strings = [text for text in fuzzed(20_000) if "\0" not in text]
        write_results("tokenizer_files", [measure_file(Path(path), texts[:300], strings) for path in sys.argv[1:]])
        return
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
