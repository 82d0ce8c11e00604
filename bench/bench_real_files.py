"""Instruction and preference files as they are published, through SFT and DPO: what their held-out rows say before and after.

    python bench/bench_real_files.py --data FOLDER                  # FOLDER holds the files of SETS
    python bench/bench_real_files.py --data FOLDER --model out/quickstart/pretrain --record

Each set is one of the field's forms of row. The base model is the quickstart's, of a million parameters that know Python
sources: what counts is that every form goes through and that the held-out figures move the right way, not how far.
DPO starts from a model fine-tuned on the chosen answers of the same file, as usual; its loss is that of the mean token,
for answers are up to a whole window long. Reward accuracy is that of the log-ratios to the reference, 50 % by chance;
preference accuracy is the model's own, by the mean log-probability of an answer's tokens. Exits with 1 if a held-out
loss or a preference accuracy is no better than before.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.results_io import write_results  # noqa: E402
from metrics import read_rows  # noqa: E402

SETS = {  # files: (updates of SFT, of DPO or 0, learning rate of DPO, held-out share)
    "rasbt_instruction/instruction-data.json": (200, 0, 0.0, 0.1),  # Alpaca
    "self_instruct/seed_tasks.jsonl": (60, 0, 0.0, 0.1),  # instruction and instances
    "rasbt_instruction/instruction-data-with-preference.json": (200, 150, 1e-4, 0.1),  # instruction, chosen, rejected
    "llamafactory_pref/dpo_en_demo.json llamafactory_pref/dpo_zh_demo.json": (60, 60, 3e-4, 0.3),  # ShareGPT pairs
    "hh_rlhf/test.jsonl.gz": (200, 100, 1e-4, 0.1),  # transcripts, compressed
}


def train(command: str) -> tuple[dict, dict]:
    """Run a stage; its first and its last evaluation."""
    print(f"\n$ python {command}", flush=True)
    words = command.split()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    rows = [row for row in read_rows(Path(ROOT, words[words.index("--out") + 1], "metrics.jsonl")) if row["kind"] == "eval"]
    return rows[0], rows[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the files")
    parser.add_argument("--model", default="out/quickstart/pretrain", help="base model (default: the quickstart's)")
    parser.add_argument("--record", action="store_true", help="write bench/results/real_files.json")
    args = parser.parse_args()
    rows, data = [], Path(args.data).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, (sft_steps, dpo_steps, lr, val_fraction)) in enumerate(SETS.items()):
            sft, dpo = f"{scratch}/sft{number}", f"{scratch}/dpo{number}"
            files = " ".join(str(data / file) for file in name.split())
            common = f"--data {files} --val_fraction {val_fraction} --save_every 0 --log_every 50"
            before, after = train(f"train_sft.py --model {args.model} --out {sft} --optimizer muon --lr 2e-3 --schedule linear "
                                  f"--max_steps {sft_steps} --eval_every {sft_steps} {common}")
            rows.append({"file": name, "stage": "SFT", "steps": sft_steps, "loss_before": before["loss"],
                         "loss_after": after["loss"]})
            if dpo_steps:
                before, after = train(f"train_dpo.py --model {sft} --out {dpo} --loss_type sigmoid_norm --beta 5 --lr {lr} "
                                      f"--max_steps {dpo_steps} --eval_every {dpo_steps} {common}")
                rows.append({"file": name, "stage": "DPO", "steps": dpo_steps, "loss_before": before["loss"],
                             "loss_after": after["loss"], "accuracy_before": before["preference_accuracy"],
                             "accuracy_after": after["preference_accuracy"], "reward_accuracy": after["accuracy"]})
    if args.record:
        write_results("real_files", rows)
    worse = [f"{row['file']} ({row['stage']})" for row in rows if row["loss_after"] >= row["loss_before"]
             or row.get("accuracy_after", 1) <= row.get("accuracy_before", 0)]
    for row in rows:
        print(row)
    sys.exit(f"no better than before: {', '.join(worse)}" if worse else 0)


if __name__ == "__main__":
    main()
