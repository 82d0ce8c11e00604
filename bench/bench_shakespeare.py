"""tinyshakespeare by characters, against nanoGPT at its own CPU budget, both measured here, in turns.

    git clone https://github.com/karpathy/nanoGPT
    python bench/bench_shakespeare.py --nanogpt nanoGPT --text tinyshakespeare/input.txt

The budget is that of nanoGPT's README for a CPU: 4 layers, width 128, 4 heads, block 64, batch 12, 2000 steps, the last
10 % held out. nanoGPT trains by its own settings (config/train_shakespeare_char.py: AdamW, lr 1e-3 -> 1e-4, beta2 0.99,
warm-up of 100, no dropout); ours is the stage itself, with the flags below. Held-out loss: all windows of 64, disjoint.
Without --nanogpt only our side is measured.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_pretrain  # noqa: E402
from bench.results_io import write_results  # noqa: E402
from metrics import read_rows  # noqa: E402
from model import CausalLM, ModelConfig, num_parameters  # noqa: E402
from optim import build_optimizer, clip_grad_norm  # noqa: E402

STEPS, BATCH, BLOCK, TARGET = 2000, 12, 64, 1.886  # TARGET: what nanoGPT reaches with this budget
FLAGS = ("--tokenizer char --hidden_size 128 --num_hidden_layers 4 --num_attention_heads 4 --num_key_value_heads 2 "
         "--seq_len 64 --global_batch_size 12 --max_steps 2000 --optimizer muon --lr 3e-3 --schedule linear "
         "--eval_every 100 --save_every 0 --log_every 50 --sample_tokens 0 --device cpu").split()


def load_nanogpt(folder: Path):
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def nanogpt_step(nanogpt):
    """(its model, a function that does one training step) with nanoGPT's own optimizer, clipping and settings."""
    torch.manual_seed(1337)
    with contextlib.redirect_stdout(io.StringIO()):
        shape = dict(n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False)
        model = nanogpt.GPT(nanogpt.GPTConfig(block_size=BLOCK, vocab_size=65, **shape))
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def step(x, y, lr=1e-3):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return model, step


def our_step(optimizer_name: str):
    args = train_pretrain.parse(train_pretrain.Args, argv=FLAGS)
    model = CausalLM(train_pretrain.model_config(args, 68))
    optimizer = build_optimizer(optimizer_name, model.named_parameters(), lr=args.lr, weight_decay=args.weight_decay)

    def step(x, y):
        loss = train_pretrain.next_token_loss(model(x), y) / y.numel()
        loss.backward()
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def step_times(sides: dict, data: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of a step of each side, taken in turns so that the machine's moods meet all alike."""
    times = {name: [] for name in sides}
    for number in range(rounds):
        at = torch.randint(len(data) - BLOCK - 1, (BATCH,))
        x, y = (torch.stack([data[i + shift : i + shift + BLOCK] for i in at]) for shift in (0, 1))
        for name, step in sides.items():
            start = time.perf_counter()
            step(x, y)
            if number >= 10:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def train_nanogpt(nanogpt, train_data: torch.Tensor, val_data: torch.Tensor) -> float:
    """nanoGPT's held-out loss after STEPS steps, by its own recipe."""
    model, step = nanogpt_step(nanogpt)
    for number in range(STEPS):
        cosine = 0.5 * (1 + math.cos(math.pi * (number - 100) / (STEPS - 100)))
        lr = 1e-3 * (number + 1) / 101 if number < 100 else 1e-4 + 9e-4 * cosine
        at = torch.randint(len(train_data) - BLOCK, (BATCH,))
        step(*(torch.stack([train_data[i + shift : i + shift + BLOCK] for i in at]) for shift in (0, 1)), lr)
    windows = (len(val_data) - 1) // BLOCK
    x, y = (val_data[shift : shift + windows * BLOCK].view(windows, BLOCK) for shift in (0, 1))
    with torch.no_grad():
        nats = sum(F.cross_entropy(model(a, b)[0].flatten(0, 1), b.flatten(), reduction="sum").item()
                   for a, b in zip(x.split(64), y.split(64)))
    return nats / (windows * BLOCK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="tinyshakespeare's input.txt")
    parser.add_argument("--nanogpt", help="a clone of nanoGPT")
    parser.add_argument("--rounds", type=int, default=200, help="timed steps of each side")
    options = parser.parse_args()
    text = Path(options.text).read_text()
    characters = sorted(set(text))
    data = torch.tensor([characters.index(c) for c in text])
    cut = int(len(data) * 0.9)

    sides = {"ours adamw": our_step("adamw"), "ours muon": our_step("muon")}
    nanogpt = load_nanogpt(Path(options.nanogpt)) if options.nanogpt else None
    if nanogpt:
        sides["nanogpt"] = nanogpt_step(nanogpt)[1]
    seconds = step_times(sides, data[:cut], options.rounds)

    with tempfile.TemporaryDirectory() as folder:
        train_pretrain.main([*FLAGS, "--data", options.text, "--out", f"{folder}/run"])
        log = read_rows(f"{folder}/run/metrics.jsonl")
        config = json.loads((Path(folder) / "run" / "step_00002000" / "config.json").read_text())
    evaluations = [row for row in log if row["kind"] == "eval"]
    reached = next((row["step"] for row in evaluations if row["loss"] <= TARGET), None)
    rows = [{"side": "ours muon", "held_out_loss": evaluations[-1]["loss"], "step_ms": 1e3 * seconds["ours muon"],
             "parameters": num_parameters(ModelConfig.from_hf(config)), "steps_to_target": reached}]
    rows.append({"side": "ours adamw", "step_ms": 1e3 * seconds["ours adamw"]})
    if nanogpt:
        loss = train_nanogpt(nanogpt, data[:cut], data[cut:])
        rows.append({"side": "nanogpt", "held_out_loss": loss, "step_ms": 1e3 * seconds["nanogpt"]})
        for row in rows[:2]:
            row["step_ratio_to_nanogpt"] = row["step_ms"] / rows[2]["step_ms"]
        share = reached and reached * seconds["ours muon"] / (STEPS * seconds["nanogpt"])
        rows[0]["share_of_nanogpt_time_to_target"] = share
    write_results("shakespeare", rows)


if __name__ == "__main__":
    main()
