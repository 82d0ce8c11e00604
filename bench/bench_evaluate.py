"""Multiple choice by likelihood, ours against lm-evaluation-harness' Hugging Face backend: first the same, then speed.

    OMP_NUM_THREADS=2 python bench/bench_evaluate.py --data hellaswag=hellaswag_val.jsonl mmlu=mmlu/ --num_fewshot 0 5

Needs lm_eval and transformers beside what this project needs. Without --model: a Llama of 8 million random weights and
a tokenizer of 2,048 tokens, trained on the standard library's docstrings. Both get the same questions, the first
--limit, float32, the same batch size and threads, and take turns; each figure is the median of --rounds. Tokenizing
counts, loading does not. Exits with 1 where log-likelihoods differ by 1e-4 per token or ours is not 1.2 times as fast.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.results_io import write_results  # noqa: E402
from convert import load_pretrained, load_pretrained_tokenizer, save_pretrained  # noqa: E402
from data.benchmarks import read_benchmark  # noqa: E402
from data.corpus import read_documents  # noqa: E402
from data.likelihood import encode_pair, fit, likelihoods  # noqa: E402
from data.tokenizer import BPETokenizer  # noqa: E402
from model import CausalLM, KVCache, ModelConfig  # noqa: E402

ENOUGH = 1.2
SHAPE = dict(hidden_size=256, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
             max_position_embeddings=2048, tie_word_embeddings=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, nargs="+", help="NAME=FILE or NAME=FOLDER: multiple choice")
    parser.add_argument("--model", help="a Hugging Face folder, a .gguf or a .bin file")
    parser.add_argument("--num_fewshot", type=int, nargs="+", default=[0], help="examples, one number for each --data")
    parser.add_argument("--limit", type=int, default=40, help="questions of each benchmark")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        sys.exit(f"lm_eval or transformers is missing ({error}): pip install lm_eval transformers")
    with tempfile.TemporaryDirectory() as folder:
        if args.model:
            model, tokenizer = load_pretrained(args.model, dtype=torch.float32), load_pretrained_tokenizer(args.model)
        else:
            texts = [document.text for _, document in zip(range(2000), read_documents(["stdlib"]))]
            tokenizer = BPETokenizer.train(texts, 2048)
            model = CausalLM(ModelConfig(tokenizer.vocab_size, **SHAPE, eos_token_id=tokenizer.eos_token_id)).eval()
        save_pretrained(model, Path(folder) / "hf", tokenizer)
        peer = HFLM(pretrained=str(Path(folder) / "hf"), device="cpu", dtype="float32", batch_size=args.batch_size,
                    add_bos_token=False)

    rows = [measure(args, data, shots, model, tokenizer, peer, Instance)
            for data, shots in zip(args.data, args.num_fewshot, strict=True)]
    write_results("evaluate", rows)
    for row in rows:
        if row["largest_difference_per_token"] > 1e-4:
            sys.exit(f"{row['benchmark']}: log-likelihoods differ by more than 1e-4 per token")
        if row["times_as_fast"] < ENOUGH:
            sys.exit(f"{row['benchmark']}: {row['times_as_fast']:.2f} times as fast as lm_eval, not {ENOUGH}")


def measure(args, data: str, shots: int, model, tokenizer, peer, Instance) -> dict:
    name, path = data.split("=", 1)
    items = read_benchmark(name, path, shots=shots, limit=args.limit)[: args.limit]
    asked = [(context, f" {choice}") for item in items for context in item.contexts for choice in item.choices]
    begin = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None)
    cache = lambda rows, tokens: KVCache(model.config, rows, tokens)  # noqa: E731

    def ours() -> list[float]:
        pairs = [fit(*encode_pair(tokenizer, *pair, begin), model.config.max_position_embeddings) for pair in asked]
        found = dict(likelihoods(model, pairs, batch_size=args.batch_size, new_cache=cache))
        return [found[i][0] for i in range(len(pairs))]

    def theirs() -> list[float]:
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
        return [logp for logp, _ in peer.loglikelihood(requests, disable_tqdm=True)]

    lengths = [len(encode_pair(tokenizer, *pair, begin)[1]) for pair in asked]
    worst = max(abs(a - b) / n for a, b, n in zip(ours(), theirs(), lengths))  # this round warms both up
    seconds = {"ours": [], "lm_eval": []}
    for _ in range(args.rounds):
        for who, run in (("ours", ours), ("lm_eval", theirs)):
            start = time.perf_counter()
            run()
            seconds[who].append(time.perf_counter() - start)
    median = {who: statistics.median(times) for who, times in seconds.items()}
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("lm_eval", "transformers"))
    return {"benchmark": name, "num_fewshot": shots, "questions": len(items), "requests": len(asked),
            "model": Path(args.model).name if args.model else "8 M random weights", "batch_size": args.batch_size,
            "threads": torch.get_num_threads(), "peer": versions,
            "ours_seconds": median["ours"], "lm_eval_seconds": median["lm_eval"],
            "times_as_fast": median["lm_eval"] / median["ours"], "largest_difference_per_token": worst}


if __name__ == "__main__":
    main()
