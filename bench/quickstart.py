"""The main job, stage by stage, each a command that you could type; then the table of what each one gained.

    bash quickstart.sh

Exits with 1 if a stage misses the figure that it ships with. A second call finds the finished stages and repeats only
the rest; delete out/quickstart to start again. With --record the table goes into bench/results/quickstart.json.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.results_io import write_results  # noqa: E402
from metrics import read_rows  # noqa: E402

OUT = "out/quickstart"
ANSWERED = f"--tasks {OUT}/tasks/sft_val.jsonl --batch_size 64 --max_new_tokens 64"
GRADED = f"{ANSWERED} --pairs {OUT}/tasks/pairs_val.jsonl"
STAGES = {
    "tokenizer": f"-m data.prepare --data stdlib --vocab_size 2048 --out {OUT}/data",
    "pretrain": f"train_pretrain.py --data {OUT}/data --out {OUT}/pretrain --optimizer muon --lr 4e-3 --schedule wsd "
                "--seq_len 256 --global_batch_size 8 --max_steps 1200 --warmup_steps 30 --eval_every 400 "
                "--save_every 400 --log_every 50 --resume auto",
    "samples": f"generate.py --model {OUT}/pretrain --prompt 'def main(' 'class Test' 'The ' --max_new_tokens 80 "
               "--top_p 0.95 --temperature 0.7",
    "tasks": f"data/tasks.py --out {OUT}/tasks --train 20000 --val 1200 --pairs 2000 --pairs_of code --val_pairs 800",
    "base model": f"evaluate.py --model {OUT}/pretrain --data {OUT}/data --baselines {GRADED} --out {OUT}/base.json",
    "sft": f"train_sft.py --model {OUT}/pretrain --data {OUT}/tasks/sft_train.jsonl --val_data {OUT}/tasks/sft_val.jsonl "
           f"--replay stdlib --replay_fraction 0.1 --out {OUT}/sft --optimizer muon --lr 4e-3 --schedule linear "
           "--global_batch_size 8 --max_steps 1500 --eval_every 500 --save_every 500 --log_every 50 --resume auto",
    "sft model": f"evaluate.py --model {OUT}/sft {GRADED} --out {OUT}/sft.json",
    "new tasks": f"data/tasks.py --out {OUT}/new_tasks --seed 1 --train 8000 --val 0 --pairs 0 --val_pairs 0",
    "own answers": f"sample_pairs.py --model {OUT}/sft --tasks {OUT}/new_tasks/sft_train.jsonl --out {OUT}/own_pairs.jsonl",
    "dpo": f"train_dpo.py --model {OUT}/sft --data {OUT}/own_pairs.jsonl {OUT}/tasks/pairs_train.jsonl "
           f"--val_data {OUT}/tasks/pairs_val.jsonl --out {OUT}/dpo --beta 3 --lr 1e-4 --global_batch_size 32 "
           "--max_steps 120 --eval_every 120 --resume auto",
    "dpo model": f"evaluate.py --model {OUT}/dpo {GRADED} --out {OUT}/dpo.json",
    "4 bits": f"calibrate.py --model {OUT}/dpo --method nf4 --out {OUT}/nf4 --resume auto",
    "4-bit model": f"evaluate.py --model {OUT}/nf4 {ANSWERED} --out {OUT}/nf4.json",
    "lora": f"train_sft.py --model {OUT}/nf4 --data {OUT}/new_tasks/sft_train.jsonl --out {OUT}/lora --lora_r 16 "
            "--optimizer muon --lr 1e-3 --schedule linear --warmup_steps 5 --global_batch_size 8 --max_steps 40 "
            "--eval_every 0 --resume auto",
    "lora model": f"evaluate.py --model {OUT}/lora {ANSWERED} --out {OUT}/lora.json",
    "chat": f"generate.py --model {OUT}/dpo --chat --temperature 0 --max_new_tokens 64 --prompt 'What is 27 + 45?' /reset "
            "'Add 345 and 287 step by step.' /reset 'Which number is largest: 47 82 19 33?' /reset "
            "'How many a in d a c a f a?' /reset 'Sort the list: 4 7 1 9' /reset 'Reverse the letters: k a t'",
}


def run_stage(command: str) -> tuple[float, int]:
    """Run one command, shown as one would type it: (seconds, peak bytes of memory, 0 where that cannot be asked)."""
    print(f"\n$ python {command}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT, stdin=subprocess.DEVNULL)
    if not hasattr(os, "wait4"):  # Windows
        code, peak = process.wait(), 0
    else:
        _, status, usage = os.wait4(process.pid, 0)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if code:
        sys.exit(f"error: stage failed with exit code {code}")
    return time.perf_counter() - start, peak


def table(measured: dict, out: Path) -> list[dict]:
    """A row for each stage: what it cost, and the figures of the model that it began with and of the one that it left."""
    graded = {name: json.loads((out / f"{name}.json").read_text()) for name in ("base", "sft", "dpo", "nf4", "lora")}
    log = read_rows(out / "pretrain" / "metrics.jsonl")
    rows = {stage: {"stage": stage, "seconds": round(seconds, 1), "peak_memory_mb": round(peak / 2**20)}
            for stage, (seconds, peak) in measured.items()}
    for stage in ("pretrain", "sft", "dpo", "lora"):
        steps = [row for row in read_rows(out / stage / "metrics.jsonl") if row["kind"] == "train"]
        rows[stage] |= {"tokens_per_second": statistics.median(row["tokens_per_second"] for row in steps),
                        "training_seconds": round(steps[-1]["seconds"], 1)}
    rows["pretrain"] |= {"bits_per_byte_before": next(row for row in log if row["kind"] == "eval")["bits_per_byte"],
                         "bits_per_byte_after": graded["base"]["bits_per_byte"]}
    rows["base model"] |= {name: graded["base"][name] for name in ("gzip_bits_per_byte", "xz_bits_per_byte")}
    for stage, before, after in (("sft", "base", "sft"), ("dpo", "sft", "dpo"), ("4 bits", "dpo", "nf4"),
                                 ("lora", "nf4", "lora")):
        for figure in ("exact_match", "preference_accuracy"):
            if figure in graded[after]:
                rows[stage] |= {f"{figure}_before": graded[before][figure], f"{figure}_after": graded[after][figure]}
        rows[stage]["families"] = {name: right / total for name, (right, total) in graded[after]["families"].items()}
    rows["all"] = {"stage": "all", "seconds": round(sum(seconds for seconds, _ in measured.values()), 1)}
    return list(rows.values())


def show(rows: list[dict]) -> None:
    def gain(row: dict, figure: str, spec: str) -> str:
        before, after = (row.get(f"{figure}_{when}") for when in ("before", "after"))
        return "" if after is None else f"{before:{spec}} -> {after:{spec}}"

    print(f"\n{'stage':<12}{'seconds':>9}{'bits per byte':>20}{'exact match':>18}{'preferences':>18}{'tokens/s':>11}"
          f"{'memory':>10}")
    for row in rows:
        speed = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else ""
        memory = f"{row['peak_memory_mb']:,} MB" if "peak_memory_mb" in row else ""
        print(f"{row['stage']:<12}{row['seconds']:>9.1f}{gain(row, 'bits_per_byte', '.3f'):>20}"
              f"{gain(row, 'exact_match', '.1%'):>18}{gain(row, 'preference_accuracy', '.1%'):>18}{speed:>11}{memory:>10}")


def main() -> None:
    measured, out = {stage: run_stage(command) for stage, command in STAGES.items()}, ROOT / OUT
    rows = table(measured, out)
    if "--record" in sys.argv[1:]:
        write_results("quickstart", rows, quiet=True)
    show(rows)
    of = {row["stage"]: row for row in rows}
    sft, dpo, after = of["sft"], of["dpo"], of["pretrain"]["bits_per_byte_after"]
    lost, regained = (of[stage]["exact_match_after"] - of[stage]["exact_match_before"] for stage in ("4 bits", "lora"))
    gzip, xz = (of["base model"][f"{name}_bits_per_byte"] for name in ("gzip", "xz"))
    print(f"held-out text by gzip -9: {gzip:.3f} bits per byte, by xz -9: {xz:.3f}; by the base model: {after:.3f}")
    print("exact match after SFT: " + ", ".join(f"{name} {share:.0%}" for name, share in sft["families"].items()))

    index = json.loads((out / "data" / "index.json").read_text())["splits"]["train"]
    gained = dpo["preference_accuracy_after"] - dpo["preference_accuracy_before"]
    expected = {  # what: (figure, the least that it must be)
        "bytes per token of the tokenizer": (index["bytes"] / index["tokens"], 3.0),
        "1.50 - bits per byte of the base model": (1.50 - after, 0.0),
        "xz -9 - bits per byte of the base model": (xz - after, 0.0),
        "5 % - exact match of the base model": (0.05 - sft["exact_match_before"], 0.0),
        "exact match after SFT": (sft["exact_match_after"], 0.60),
        "exact match of the worst family after SFT": (min(sft["families"].values()), 0.30),
        "preference accuracy gained by DPO": (gained, 1e-9 if dpo["preference_accuracy_after"] >= 0.90 else 0.15),
        "exact match gained by DPO": (dpo["exact_match_after"] - dpo["exact_match_before"], 0.0),
        "exact match gained by 4 bits": (lost, -0.05),
        "exact match gained by LoRA beside 4 bits": (regained, 0.0),
    }
    missed = [f"{what}: {figure:.4f}, expected at least {least:.4f}" for what, (figure, least) in expected.items()
              if not figure >= least]
    if missed:
        sys.exit("MISSED\n" + "\n".join(missed))
    print(f"all as expected; curves and samples in {OUT}/*/report.html")
    print(f"talk to it: python generate.py --model {OUT}/dpo --chat")


if __name__ == "__main__":
    main()
