"""Instruction and preference files as they are published, through SFT and DPO: what their held-out rows say before and after.

    python bench/bench_real_files.py --data FOLDER                  # FOLDER holds the files of SETS
    python bench/bench_real_files.py --data FOLDER --model out/quickstart/pretrain --record

Each set is one of the field's forms of row. The base model is the quickstart's, of a million parameters that know Python
sources: what counts is that every form goes through and that the held-out figures move the right way, not how far.
DPO starts from a model fine-tuned on the chosen answers of the same file, as usual; its loss is that of the mean token,
for answers are up to a whole window long. Reward accuracy is that of the log-ratios to the reference, 50 % by chance;
preference accuracy is the model's own, by the mean log-probability of an answer's tokens. A tenth is held out; of 600
pairs that would be too few to tell, so they are held out in three parts, by models that learn from the other two. Exits
with 1 if a held-out loss or a preference accuracy is no better than before.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.results_io import write_results  # noqa: E402
from metrics import read_rows  # noqa: E402

SETS = {  # files: (updates of SFT, of DPO or 0, learning rate of DPO, parts)
    "rasbt_instruction/instruction-data.json": (200, 0, 0.0, 1),  # Alpaca
    "self_instruct/seed_tasks.jsonl": (60, 0, 0.0, 1),  # instruction and instances
    "rasbt_instruction/instruction-data-with-preference.json": (200, 150, 1e-4, 1),  # instruction, chosen, rejected
    "llamafactory_pref/dpo_en_demo.json llamafactory_pref/dpo_zh_demo.json": (60, 40, 1e-4, 3),  # ShareGPT pairs
    "hh_rlhf/test.jsonl.gz": (200, 100, 1e-4, 1),  # transcripts, compressed
}


def train(command: str) -> list[dict]:
    """Run a stage; its first and its last evaluation."""
    print(f"\n$ python {command}", flush=True)
    words = command.split()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    rows = [row for row in read_rows(Path(ROOT, words[words.index("--out") + 1], "metrics.jsonl")) if row["kind"] == "eval"]
    return [rows[0], rows[-1]]


def splits(files: list[Path], parts: int, scratch: Path) -> list[tuple[str, int]]:
    """What each training is told to learn from and to hold out, and the weight of its figures."""
    if parts == 1:
        return [(f"--data {' '.join(map(str, files))} --val_fraction 0.1", 1)]
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    part_of = [hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()[0] % parts for row in rows]
    told = []
    for part in range(parts):
        paths = {side: scratch / f"{side}{part}.json" for side in ("train", "val")}
        for side, path in paths.items():
            path.write_text(json.dumps([row for row, k in zip(rows, part_of) if (k == part) == (side == "val")]))
        told.append((f"--data {paths['train']} --val_data {paths['val']}", part_of.count(part)))
    return told


def mean(evaluations: list[list[dict]], weights: list[int], figure: str, when: str) -> float:
    return sum(w * e[when == "after"][figure] for e, w in zip(evaluations, weights)) / sum(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the files")
    parser.add_argument("--model", default="out/quickstart/pretrain", help="base model (default: the quickstart's)")
    parser.add_argument("--only", default="", help="only the sets with this in their name")
    parser.add_argument("--record", action="store_true", help="write bench/results/real_files.json")
    args = parser.parse_args()
    rows, data = [], Path(args.data).resolve()
    for name, (sft_steps, dpo_steps, lr, parts) in SETS.items():
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            sft, dpo, weights = [], [], []
            for part, (split, weight) in enumerate(splits([data / file for file in name.split()], parts, Path(scratch))):
                common = f"{split} --save_every 0 --log_every 50"
                sft.append(train(f"train_sft.py --model {args.model} --out {scratch}/sft{part} --optimizer muon --lr 2e-3 "
                                 f"--schedule linear --max_steps {sft_steps} --eval_every {sft_steps} {common}"))
                if dpo_steps:
                    dpo.append(train(f"train_dpo.py --model {scratch}/sft{part} --out {scratch}/dpo{part} --lr {lr} --loss_type "
                                     f"sigmoid_norm --beta 5 --max_steps {dpo_steps} --eval_every {dpo_steps} {common}"))
                weights.append(weight)
        for stage, steps, evaluations in (("SFT", sft_steps, sft), ("DPO", dpo_steps, dpo)):
            row = {"file": name, "stage": stage, "steps": steps}
            for figure, told in (("loss", "loss"), ("preference_accuracy", "accuracy")):
                if evaluations and figure in evaluations[0][0]:
                    row |= {f"{told}_{when}": mean(evaluations, weights, figure, when) for when in ("before", "after")}
            if evaluations:
                rows.append(row | ({"reward_accuracy": mean(dpo, weights, "accuracy", "after")} if stage == "DPO" else {}))
    if args.record:
        write_results("real_files", rows)
    worse = [f"{row['file']} ({row['stage']})" for row in rows if row["loss_after"] >= row["loss_before"]
             or row.get("accuracy_after", 1) <= row.get("accuracy_before", 0)]
    for row in rows:
        print(row)
    sys.exit(f"no better than before: {', '.join(worse)}" if worse else 0)


if __name__ == "__main__":
    main()
