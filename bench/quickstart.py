"""The main job, stage by stage, each a command that you could type; then the table of what each one gained.

    bash quickstart.sh

Exits with 1 if a stage misses the figure that it ships with. A second call finds the finished stages and repeats only
the table; delete out/quickstart to start again. With --record the table goes into bench/results/quickstart.json.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.results_io import write_results  # noqa: E402
from metrics import read_rows  # noqa: E402

OUT = "out/quickstart"
STAGES = {
    "tokenizer": f"-m data.prepare --data stdlib --vocab_size 2048 --out {OUT}/data",
    "pretrain": f"train_pretrain.py --data {OUT}/data --out {OUT}/pretrain --optimizer muon --lr 4e-3 --schedule wsd "
                "--seq_len 256 --global_batch_size 8 --max_steps 1200 --warmup_steps 30 --eval_every 400 "
                "--save_every 400 --log_every 50 --resume auto",
    "evaluate": f"evaluate.py --model {OUT}/pretrain --data {OUT}/data --baselines --out {OUT}/evaluation.json",
    "samples": f"generate.py --model {OUT}/pretrain --prompt 'def main(' 'class Test' 'The ' --max_new_tokens 80 "
               "--top_p 0.95 --temperature 0.7",
}


def run_stage(command: str) -> tuple[float, int]:
    """Run one command, shown as one would type it: (seconds, peak bytes of memory, 0 where that cannot be asked)."""
    import shlex
    print(f"\n$ python {command}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT)
    if not hasattr(os, "wait4"):  # Windows
        code, peak = process.wait(), 0
    else:
        _, status, usage = os.wait4(process.pid, 0)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if code:
        sys.exit(f"error: stage failed with exit code {code}")
    return time.perf_counter() - start, peak


def main() -> None:
    measured = {stage: run_stage(command) for stage, command in STAGES.items()}
    out = ROOT / OUT
    index = json.loads((out / "data" / "index.json").read_text())["splits"]
    evaluation = json.loads((out / "evaluation.json").read_text())
    log = read_rows(out / "pretrain" / "metrics.jsonl")
    before = next(row for row in log if row["kind"] == "eval")["bits_per_byte"]
    last = [row for row in log if row["kind"] == "train"][-1]
    bytes_per_token = index["train"]["bytes"] / index["train"]["tokens"]
    after, gzip, xz = (evaluation[name] for name in ("bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte"))

    rows = [{"stage": stage, "seconds": round(seconds, 1), "peak_memory_mb": round(peak / 2**20)}
            for stage, (seconds, peak) in measured.items()]
    rows[1] |= {"bits_per_byte_before": before, "bits_per_byte_after": after,
                "tokens_per_second": last["tokens"] / last["seconds"], "training_seconds": round(last["seconds"], 1)}
    rows[2] |= {"gzip_bits_per_byte": gzip, "xz_bits_per_byte": xz}
    if "--record" in sys.argv[1:]:
        write_results("quickstart", rows, quiet=True)

    print(f"\n{'stage':<12}{'seconds':>9}{'bits per byte':>20}{'tokens/s':>11}{'peak memory':>14}")
    for row in rows:
        gain = f"{before:.3f} -> {after:.3f}" if row["stage"] == "pretrain" else ""
        speed = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else ""
        print(f"{row['stage']:<12}{row['seconds']:>9.1f}{gain:>20}{speed:>11}{row['peak_memory_mb']:>11,} MB")
    print(f"held-out text by gzip -9: {gzip:.3f} bits per byte, by xz -9: {xz:.3f}; by the model: {after:.3f}")

    expected = {  # figure: (what it is, what it must at most be)
        "tokens per byte of the tokenizer": (1 / bytes_per_token, 1 / 3.0),
        "bits per byte of the base model": (after, 1.50),
        "bits per byte, against xz -9": (after, xz),
    }
    missed = [f"{name}: {value:.4f}, expected at most {limit:.4f}"
              for name, (value, limit) in expected.items() if not value <= limit]
    if missed:
        sys.exit("MISSED\n" + "\n".join(missed))
    print(f"all as expected; curves and samples in {OUT}/pretrain/report.html")


if __name__ == "__main__":
    main()
