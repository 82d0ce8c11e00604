"""Greedy generation, batched against one prompt at a time: first the same tokens, then tokens per second.

    OMP_NUM_THREADS=1 python bench/bench_generate.py
    OMP_NUM_THREADS=1 python bench/bench_generate.py --model out/sft

64 prompts of 8 to 64 random tokens, 64 new tokens each, all in batches of 1, 4, 16, 64; prompts of a batch differ in
length. Without --model: the shape of the quickstart's model, initial weights, float32. Each figure is the median of
rounds in which the batch sizes take turns, so that the machine's moods meet all alike. Exits with 1 if a token differs,
or if batches of 16 are less than five times as fast as single prompts.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.results_io import write_results  # noqa: E402
from checkpoint import find_checkpoint, load_model  # noqa: E402
from generate import generate  # noqa: E402
from model import CausalLM, ModelConfig  # noqa: E402

PROMPTS, NEW_TOKENS, BATCH_SIZES, ENOUGH = 64, 64, (1, 4, 16, 64), 5.0  # ENOUGH: at a batch of 16
SHAPE = dict(vocab_size=2048, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             qk_norm=True, tie_word_embeddings=True, max_position_embeddings=256)


def in_batches(model: CausalLM, prompts: list[list[int]], size: int) -> tuple[list[list[int]], float]:
    """The new tokens of all prompts, `size` at a time, and the seconds that it took."""
    start, tokens = time.perf_counter(), []
    for i in range(0, len(prompts), size):
        tokens += generate(model, prompts[i : i + size], max_new_tokens=NEW_TOKENS, temperature=0.0)
    return tokens, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's folder instead of random weights")
    parser.add_argument("--rounds", type=int, default=7, help="of which each figure is the median")
    args = parser.parse_args()
    model = load_model(find_checkpoint(args.model)) if args.model else CausalLM(ModelConfig(**SHAPE))
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 65, (PROMPTS,), generator=generator).tolist()
    prompts = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]

    alone, _ = in_batches(model, prompts, 1)
    unequal = {size: sum(a != b for a, b in zip(alone, in_batches(model, prompts, size)[0])) for size in BATCH_SIZES}
    seconds = {size: [] for size in BATCH_SIZES}
    for _ in range(args.rounds):
        for size in BATCH_SIZES:
            seconds[size].append(in_batches(model, prompts, size)[1])
    speed = {size: sum(map(len, alone)) / statistics.median(seconds[size]) for size in BATCH_SIZES}
    write_results("generate", [
        {"batch_size": size, "tokens_per_second": speed[size], "times_batch_of_1": speed[size] / speed[1],
         "prompts": PROMPTS, "unequal_to_one_by_one": unequal[size], "model": args.model or "quickstart's shape",
         "threads": torch.get_num_threads()} for size in BATCH_SIZES])
    if any(unequal.values()):
        sys.exit("a batch gave other tokens than its prompts one by one")
    if speed[16] < ENOUGH * speed[1]:
        sys.exit(f"batches of 16 are {speed[16] / speed[1]:.1f} times as fast as single prompts, not {ENOUGH}")


if __name__ == "__main__":
    main()
