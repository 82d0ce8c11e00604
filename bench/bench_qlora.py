"""QLoRA against full fine-tuning on the quickstart's tasks: what each answers rightly, and the bytes that each holds.

    python bench/bench_qlora.py --model out/quickstart/pretrain        # after quickstart.sh; an hour on one core

Both begin with the base model, which answers no task, and read the same conversations in the same order for as many
updates. The learning rate of each is the one of its list that, after half as many, answers most tasks of another tenth
of the operands (data/tasks.py --fold 1); what is reported is fold 0. Finished runs in --out are not repeated. QLoRA's
base is a folder that calibrate.py rounded, so that its adapter is graded on the weights that it learned beside.

Bytes are counted on the tensors of an update: weights (NF4 codes and their scales, the embedding in float32, A and B),
gradients, optimizer state. Peak memory is what a process grew by (getrusage's ru_maxrss) from before the model was
there until two updates were done: activations, too, which in a small model outweigh all else. So a second pair of
rows tells the same of 110 million parameters, drawn at random, and one row of 128 tokens. Exits with 1 if the exact
match is more than 5 points apart, or the bytes are more than a quarter.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIDES = {  # flags of train_sft.py: (rank or 0, alpha, learning rates to choose from)
    "full": (0, 0, (4e-3, 8e-3, 1.6e-2)),
    "qlora": (16, 16, (4e-3, 8e-3, 1.6e-2)),
}
BIG = dict(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
           tie_word_embeddings=True)


def python(*words) -> str:
    print("$ python", *words, flush=True)
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, stdout=subprocess.PIPE,
                          text=True).stdout


def base(args, side: str) -> Path:
    """The folder that a side begins with."""
    if not SIDES[side][0]:
        return Path(args.model)
    folder = args.out / "nf4"
    if not folder.is_dir():
        python("calibrate.py", "--model", args.model, "--method", "nf4", "--out", folder)
    return folder


def exact_match(args, side: str, lr: float, fold: int, steps: int) -> dict:
    """Train, unless that is done, and grade: evaluate.py's figures."""
    r, alpha, _ = SIDES[side]
    tasks, out = args.out / f"tasks{fold}", args.out / f"{side}_lr{lr:g}_fold{fold}"
    if not (tasks / "sft_val.jsonl").is_file():
        python("data/tasks.py", "--out", tasks, "--train", 20000, "--val", 1200, "--pairs", 0, "--val_pairs", 0,
               "--fold", fold)
    adapter = ("--lora_r", r, "--lora_alpha", alpha) if r else ()
    python("train_sft.py", "--model", base(args, side), "--data", tasks / "sft_train.jsonl", "--val_data",
           tasks / "sft_val.jsonl", "--out", out, "--optimizer", "muon", "--lr", lr, "--schedule", "linear",
           "--global_batch_size", 8, "--max_steps", steps, "--eval_every", 0, "--save_every", 250,
           "--log_every", 50, "--sample_tokens", 0, "--resume", "auto", *adapter)
    graded = out / "graded.json"
    if not graded.is_file():
        python("evaluate.py", "--model", out, "--tasks", tasks / "sft_val.jsonl", "--batch_size", 64,
               "--max_new_tokens", 64, "--out", graded)
    print(f"{side}, lr {lr:g}, fold {fold}: {json.loads(graded.read_text())['exact_match']:.1%}", flush=True)
    return json.loads(graded.read_text())


def measure(side: str, folder: str) -> dict:
    """In a process of its own: two updates; the bytes of all tensors that outlive one, and how far memory grew."""
    import resource

    import torch

    import checkpoint
    import train_sft
    from data.chat import prepare_tokenizer
    from data.tokenizer import load_tokenizer
    from lora import LoRAConfig, apply_lora
    from model import CausalLM, ModelConfig
    from optim import build_optimizer
    from quant import quantize_model

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    before, (r, alpha, _) = peak(), SIDES[side]
    adapter = LoRAConfig(r, alpha) if r else None
    if folder:
        tokenizer, rows, length = load_tokenizer(checkpoint.find_checkpoint(folder)), 8, 256
        prepare_tokenizer(tokenizer, "chatml")
        model = checkpoint.load_chat_model(folder, tokenizer, "chatml", adapter=adapter)
    else:
        rows, length, model = 1, 128, CausalLM(ModelConfig(**BIG))
        model = apply_lora(quantize_model(model, "nf4"), adapter) if r else model
    optimizer = build_optimizer("muon", model.train().named_parameters(), lr=1e-3, weight_decay=0.0)
    cu_seqlens = torch.tensor([0, rows * length], dtype=torch.int32)
    for _ in range(2):
        optimizer.zero_grad()
        ids = torch.randint(model.config.vocab_size, (rows, length))
        weight = torch.tensor(float(ids.numel()))
        train_sft.batch_loss(model, ids, ids, cu_seqlens, weight, 0.0).backward()
        optimizer.step()

    def count(tensors) -> int:
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    trained = [p for p in model.parameters() if p.requires_grad]
    held = {"weights": count([*model.parameters(), *model.buffers()]),
            "gradients": count(p.grad for p in model.parameters() if p.grad is not None),
            "optimizer": count(t for state in optimizer.state.values() for t in state.values())}
    return {"trained": sum(p.numel() for p in trained), **held, "bytes": sum(held.values()),
            "peak_memory": peak() - before}


def memory_rows(what: str, folder_of) -> list[dict]:
    rows = []
    for side in SIDES:
        found = json.loads(python("bench/bench_qlora.py", "--measure", side, "--model", folder_of(side)).splitlines()[-1])
        rows.append({"what": what, "side": side, **found})
        rows[-1]["share_of_full"] = found["bytes"] / rows[0]["bytes"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/quickstart/pretrain", help="the base model; empty with --measure: 110 M")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench_qlora")
    parser.add_argument("--max_steps", type=int, default=1500)
    parser.add_argument("--measure", choices=list(SIDES), help="bytes and memory, in this process")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.model)))
        return
    from bench.results_io import write_results
    rows = memory_rows("quickstart", lambda side: base(args, side))
    for row in rows:
        searched = {f"{lr:g}": exact_match(args, row["side"], lr, 1, args.max_steps // 2)["exact_match"]
                    for lr in SIDES[row["side"]][2]}
        lr = float(max(searched, key=searched.get))
        graded = exact_match(args, row["side"], lr, 0, args.max_steps)
        row |= {"lr": lr, "exact_match": graded["exact_match"], "families": graded["families"], "searched": searched,
                "updates": args.max_steps}
    rows += memory_rows("110 M weights", lambda side: "")
    write_results("qlora", rows)
    full, qlora = rows[:2]
    apart = full["exact_match"] - qlora["exact_match"]
    print(f"exact match {apart:+.1%} apart, bytes {qlora['share_of_full']:.1%} of full fine-tuning's")
    if apart > 0.05 or max(row["share_of_full"] for row in rows if row["side"] == "qlora") > 0.25:
        sys.exit("MISSED")


if __name__ == "__main__":
    main()
