"""How fast the loader makes batches, document boundaries included, on one core.

    python bench/bench_loader.py

Synthetic corpus in a temporary folder: documents of about 500 tokens, vocabulary 8192. Each row is the best of several
runs, as the machine may be busy with other things.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.results_io import write_results  # noqa: E402
from data.loader import Loader  # noqa: E402
from data.pack import write_shards  # noqa: E402


class Tokens(NamedTuple):
    text: str  # a document number, which the "tokenizer" below turns into random ids
    final: bool = True


class RandomTokenizer:
    vocab_size, eos_token_id = 8192, 8191

    def encode(self, text):
        rng = np.random.default_rng(int(text))
        return rng.integers(0, 8191, int(rng.exponential(500)) + 1)


def tokens_per_second(loader: Loader, tokens_per_step: int, seconds: float) -> float:
    for _ in range(5):
        next(loader)
    begin, steps = time.perf_counter(), 0
    while (now := time.perf_counter()) - begin < seconds:
        next(loader)
        steps += 1
    return steps * tokens_per_step / (now - begin)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the loader itself is one thread of NumPy
    with tempfile.TemporaryDirectory() as folder:
        documents = (Tokens(str(i)) for i in range(args.tokens // 500))
        index = write_shards(Path(folder, "data"), {"train": documents}, RandomTokenizer())
        rows = []
        for seq_len in (64, 256, 1024, 4096):
            loader = Loader(Path(folder, "data"), "train", seq_len=seq_len, global_batch_size=32)
            speed = max(tokens_per_second(loader, 32 * seq_len, args.seconds) for _ in range(args.runs))
            train = index["splits"]["train"]
            rows.append({"seq_len": seq_len, "batch_size": 32, "million_tokens_per_second": round(speed / 1e6, 1),
                         "corpus_tokens": train["tokens"], "shards": len(train["shards"])})
        write_results("loader", rows)


if __name__ == "__main__":
    main()
