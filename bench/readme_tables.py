"""Fills README.md's tables from bench/results/*.json, so that no figure in it was typed.

    python bench/readme_tables.py            # rewrites README.md
    python bench/readme_tables.py --check    # exit 1 if README.md is not what would be written
    python bench/readme_tables.py --show layers     # prints a table that README.md need not have

In README.md a table stands between `<!-- table NAME -->` and `<!-- end -->`. Below it a line tells where the figures
were measured. A cell is empty where a row lacks the key.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLES = {  # name of the results file: [(heading, key of the row, format)]
    "quickstart": [("stage", "stage", ""), ("seconds", "seconds", ".1f"),
                   ("bits per byte before", "bits_per_byte_before", ".3f"), ("after", "bits_per_byte_after", ".3f"),
                   ("gzip -9", "gzip_bits_per_byte", ".3f"), ("xz -9", "xz_bits_per_byte", ".3f"),
                   ("exact match before", "exact_match_before", ".1%"), ("after", "exact_match_after", ".1%"),
                   ("preference accuracy before", "preference_accuracy_before", ".1%"),
                   ("after", "preference_accuracy_after", ".1%"), ("training seconds", "training_seconds", ".1f"), ("tokens/s", "tokens_per_second", ",.0f"),
                   ("peak memory, MB", "peak_memory_mb", ",d")],
    "shakespeare": [("side", "side", ""), ("parameters", "parameters", ",d"), ("held-out loss", "held_out_loss", ".3f"),
                    ("a step, ms", "step_ms", ".1f"), ("step / nanoGPT's", "step_ratio_to_nanogpt", ".2f"),
                    ("steps to 1.886", "steps_to_target", "d"),
                    ("share of nanoGPT's time", "share_of_nanogpt_time_to_target", ".0%")],
    "tokenizer": [("what", "what", ""), ("MB", "megabytes", ".1f"), ("seconds", "seconds", ".1f"),
                  ("MB/s", "megabytes_per_second", ".1f"), ("bytes per token", "bytes_per_token", ".2f"),
                  ("strings compared", "strings", ",d"), ("unequal", "unequal", "d")],
    "real_files": [("file", "file", ""), ("stage", "stage", ""), ("updates", "steps", "d"),
                   ("held-out loss before", "loss_before", ".3f"), ("after", "loss_after", ".3f"),
                   ("reward accuracy", "reward_accuracy", ".1%"),
                   ("preference accuracy before", "accuracy_before", ".1%"), ("after", "accuracy_after", ".1%")],
    "loader": [("sequence length", "seq_len", "d"), ("batch size", "batch_size", "d"),
               ("million tokens/s, one core", "million_tokens_per_second", ".0f")],
    "generate": [("batch size", "batch_size", "d"), ("tokens/s, one thread", "tokens_per_second", ",.0f"),
                 ("times a batch of 1", "times_batch_of_1", ".1f"), ("prompts", "prompts", "d"),
                 ("unequal to one by one", "unequal_to_one_by_one", "d")],
    "quant": [("model", "model", ""), ("method", "method", ""), ("bits per weight", "bits", ".2f"), ("bytes", "bytes", ",d"),
              ("perplexity", "perplexity", ".4f"), ("against float32", "against_fp32", "")],
    "quant_speed": [("what", "what", ""), ("rows", "rows", "d"), ("method", "method", ""), ("seconds", "seconds", ".1f"),
                    ("threads", "threads", "d"), ("seconds of both cores together", "cpu_seconds", ".1f"), ("ms", "ms", ".2f"), ("times float32", "over_float32", ".2f")],
    "qlora": [("model", "what", ""), ("training", "side", ""), ("trained weights", "trained", ",d"),
              ("learning rate", "lr", "g"), ("exact match", "exact_match", ".1%"), ("weights, bytes", "weights", ",d"),
              ("gradients", "gradients", ",d"), ("optimizer", "optimizer", ",d"), ("together", "bytes", ",d"),
              ("of full", "share_of_full", ".1%"), ("peak memory", "peak_memory", ",d")],
    "evaluate": [("benchmark", "benchmark", ""), ("examples shown", "num_fewshot", "d"), ("requests", "requests", "d"),
                 ("ours, s", "ours_seconds", ".2f"), ("lm-evaluation-harness, s", "lm_eval_seconds", ".2f"),
                 ("times as fast", "times_as_fast", ".2f"),
                 ("largest difference per token, nats", "largest_difference_per_token", ".0e")],
    "load": [("way", "way", ""), ("GB", "gigabytes", ".2f"), ("seconds", "seconds", ".2f"),
             ("times reading the files", "times_reading", ".2f"), ("GB of its own memory", "gigabytes_own", ".2f")],
    "attention": [("mask", "mask", ""), ("length", "seq_len", ",d"), ("heads", "heads", "d"),
                  ("key heads", "key_value_heads", "d"), ("head_dim", "head_dim", "d"), ("way", "what", ""),
                  ("pass", "way", ""), ("error", "error", ".0e"), ("ms", "ms", ".3f"), ("10 %", "ms_p10", ".3f"),
                  ("90 %", "ms_p90", ".3f"), ("floor, ms", "floor_ms", ".3f"), ("TFLOP/s", "tflops", ",.1f"),
                  ("times ours", "ours_is_faster_by", ".2f")],
    "cross_entropy": [("way", "what", ""), ("tokens", "tokens", ",d"), ("hidden size", "hidden_size", ",d"),
                      ("words", "vocab_size", ",d"), ("weight", "weight_dtype", ""), ("error", "error", ".0e"),
                      ("ms", "ms", ".2f"), ("10 %", "ms_p10", ".2f"), ("90 %", "ms_p90", ".2f"),
                      ("floor, ms", "floor_ms", ".2f"), ("time / first's", "time_ratio", ".2f"),
                      ("peak, GB", "peak_gb", ".4f"), ("peak / first's", "memory_ratio", ".3f")],
    "layers": [("kernel", "kernel", ""), ("shape", "shape", ""), ("pass", "pass", ""), ("way", "way", ""),
               ("error", "error", ".0e"), ("us", "microseconds", ",.1f"), ("10 %", "p10", ",.1f"), ("90 %", "p90", ",.1f"),
               ("GB/s", "gb_per_second", ",.1f"), ("share of copy", "share_of_copy", ".2f")],
    "low_bit": [("kernel", "kernel", ""), ("shape", "shape", ""), ("way", "way", ""), ("error", "error", ".0e"),
                ("us", "microseconds", ",.1f"), ("10 %", "p10", ",.1f"), ("90 %", "p90", ",.1f"),
                ("share of floor", "share_of_floor", ".2f")],
    "train_step": [("way", "way", ""), ("parameters", "parameters", ",d"), ("length", "seq_len", ",d"),
                   ("batch size", "batch_size", "d"), ("ms", "ms", ",.1f"), ("10 %", "ms_p10", ",.1f"),
                   ("90 %", "ms_p90", ",.1f"), ("tokens/s", "tokens_per_second", ",.0f"), ("MFU", "mfu", ".1%"),
                   ("peak, GB", "peak_gb", ".1f"), ("times PyTorch", "times_pytorch", ".2f")],
    "attention_memory": [("way", "what", ""), ("length", "seq_len", ",d"), ("peak, MB", "peak_mb", ",.1f"),
                         ("bytes per token", "bytes_per_token", ",d")],
    "cross_entropy_memory": [("way", "what", ""), ("tokens", "tokens", ",d"), ("hidden size", "hidden_size", ",d"),
                             ("words", "vocab_size", ",d"), ("peak, MB", "peak_mb", ",d"),
                             ("share of full logits at their best", "share", ".3f")],
    "ledger": [("strategy", "strategy", ""), ("idea", "idea", ""), ("on rank 0 of four", "what", ""), ("formula", "formula", ""),
               ("predicted", "predicted", ",.0f"), ("measured", "measured", ",.0f")],
    "parallel": [("what", "what", ""), ("way", "way", ""), ("ranks", "ranks", "d"), ("ms, best", "ms_best", ".0f"),
                 ("ms, median", "ms_median", ".0f"), ("ratio of bests", "ratio_best", ".2f"),
                 ("ratio of medians", "ratio_median", ".2f")],
}

TABLES["quant_quickstart"] = TABLES["quant"]


def table(name: str) -> str:
    """The Markdown table of bench/results/`name`.json."""
    result = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    columns = TABLES[name]
    lines = ["| " + " | ".join(heading for heading, _, _ in columns) + " |", "|" + "---|" * len(columns)]
    for row in result["rows"]:
        cells = ["" if row.get(key) is None else format(row[key], spec) for _, key, spec in columns]
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{package} {result['versions'][package]}" for package in ("python", "torch"))
    return "\n".join(lines) + f"\n\n<sub>{result['device']}, {versions}, commit {result['commit']}</sub>"


def filled(readme: str) -> str:
    def fill(match: re.Match) -> str:
        return f"{match[1]}\n{table(match[2])}\n{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", fill, readme, flags=re.DOTALL)


def main() -> None:
    if "--show" in sys.argv[1:]:
        return print(table(sys.argv[-1]))
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if before == after else "README.md's tables differ: run python bench/readme_tables.py")
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
