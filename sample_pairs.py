"""Preference pairs of a model's own making, for DPO: of several answers to a task, a right one against a wrong one.

    python data/tasks.py --seed 1 --train 8000 --out out/tasks1                        # tasks that SFT has not seen
    python sample_pairs.py --model out/sft --tasks out/tasks1/sft_train.jsonl --out own.jsonl
    python train_dpo.py --model out/sft --data own.jsonl --beta 3 --lr 1e-4

Where the model is of two minds, it is taught to trust the better one. Both answers are its own, so DPO neither pulls up
what it would never say nor pushes down what it says most: against the answers of others it loses right ones, too
(NOTES.md has the figures). Tasks that it gets right always, or never, give no pair.

A row is {"prompt": [user ...], "chosen": [assistant], "rejected": [assistant], "family": ...}, the first right and the
first wrong answer in the order of drawing. Each answer has its own random numbers, by (seed, task, number of answer),
so that the batch size changes nothing.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from checkpoint import atomic_file, find_checkpoint, load_model
from cli import parse, run
from data.chat import render_prompt, stop_ids, template_of
from data.tasks import grade, read_tasks
from data.tokenizer import load_tokenizer
from generate import generate, row_generator
from metrics import detect_device
from model import CausalLM


@dataclass
class Args:
    model: str  # folder of a run (its latest checkpoint), of a checkpoint, or of a Hugging Face model
    tasks: list[str]  # tasks with known answers, as data/tasks.py writes them
    out: str  # file for the pairs (JSON lines)
    num_samples: int = 4  # answers to each task
    temperature: float = 1.0  # of the answers; 1 asks the model what it believes
    max_new_tokens: int = 64  # longest answer, in tokens
    batch_size: int = 128  # answers drawn at a time
    template: str = ""  # chatml llama2 llama3 mistral vicuna alpaca; empty: the model's, else chatml
    seed: int = 0  # of the random numbers
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None  # of weights and cache; None = as stored


def sample_pairs(model: CausalLM, tokenizer, rows: list[dict], template: str, *, num_samples: int = 4,
                 temperature: float = 1.0, max_new_tokens: int = 64, batch_size: int = 128,
                 seed: int = 0) -> list[dict]:
    """Pairs (see above) of tasks as data.tasks.make_tasks gives them, in their order. ValueError: see generate."""
    prompts = [render_prompt(row["messages"][:-1], tokenizer, template) for row in rows]
    stops = stop_ids(tokenizer, template)
    device, step = next(model.parameters()).device, max(1, batch_size // num_samples)
    lengths = [len(row["messages"][-1]["content"]) for row in rows]
    order, pairs = sorted(range(len(rows)), key=lengths.__getitem__), {}  # a batch ends with its longest
    for tasks in (order[i : i + step] for i in range(0, len(order), step)):
        drawn = generate(model, [prompts[task] for task in tasks for _ in range(num_samples)], temperature=temperature,
                         max_new_tokens=max_new_tokens, stop_token_ids=stops, vocab_size=tokenizer.vocab_size,
                         generators=[row_generator(seed, task * num_samples + number, device)
                                     for task in tasks for number in range(num_samples)])
        texts = [tokenizer.decode([token for token in ids if token not in stops]) for ids in drawn]
        for place, task in enumerate(tasks):
            answers, row = texts[place * num_samples : (place + 1) * num_samples], rows[task]
            first = {grade(row, text): text for text in reversed(answers)}  # of each kind the first
            if len(first) == 2:
                chosen, rejected = ([{"role": "assistant", "content": first[right]}] for right in (True, False))
                pairs[task] = {"prompt": row["messages"][:-1], "chosen": chosen, "rejected": rejected,
                               "family": row["family"]}
    return [pairs[task] for task in sorted(pairs)]


def main(argv: list[str] | None = None) -> None:
    args = parse(Args, __doc__, argv)
    for name in ("max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.num_samples < 2 or args.temperature <= 0:
        raise ValueError(f"--num_samples {args.num_samples} --temperature {args.temperature}: a pair takes at least 2 "
                         "answers, drawn at a temperature above 0")
    rows, device = [row for _, row in read_tasks(args.tasks)], detect_device(args.device)
    folder = find_checkpoint(args.model)
    model = load_model(folder, dtype=args.dtype and getattr(torch, args.dtype), device=device)
    tokenizer = load_tokenizer(folder)
    template = args.template or template_of(tokenizer) or "chatml"
    pairs = sample_pairs(model, tokenizer, rows, template, num_samples=args.num_samples, seed=args.seed,
                         temperature=args.temperature, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size)
    if not pairs:
        raise ValueError(f"{folder}: no task of {len(rows)} had both a right and a wrong answer among "
                         f"{args.num_samples}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(Path(args.out)) as file:
        file.writelines(json.dumps(pair, ensure_ascii=False).encode() + b"\n" for pair in pairs)
    families = Counter(pair["family"] for pair in pairs)
    print(f"{args.out}: {len(pairs)} pairs of {len(rows)} tasks, "
          + ", ".join(f"{name} {n}" for name, n in families.items()))


if __name__ == "__main__":
    run(main)
