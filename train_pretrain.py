"""Pretraining: a base model from raw text, by next-token prediction.

    loss = - sum over counted tokens of log p(token | the tokens before it) / number of counted tokens of the global batch

    python train_pretrain.py                                             # the embedded corpus, about a million weights, on a CPU
    python train_pretrain.py --data my.txt --tokenizer char --max_steps 2000
    python train_pretrain.py --data corpus/ --preset 124m --dtype bfloat16 --compile --out out/124m
    python train_pretrain.py --out out/124m --resume auto                # go on after a crash or Ctrl-C, to the bit (with the same flags)
    python train_pretrain.py --model some/hf_folder --data new.jsonl --replay old.jsonl --replay_fraction 0.2

Order of the file: the flags, the presets, the loss, set-up, one function per event of the loop, and the loop itself in `main`.
All randomness is a function of (seed, step), so that a resumed run repeats the undisturbed one bit by bit.
"""

import contextlib
import json
import math
import signal
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import checkpoint
import metrics
from cli import parse, run
from data.loader import Loader, eval_batches
from data.prepare import prepare
from evaluate import bits_per_byte, evaluate_loss
from generate import generate_text
from model import CausalLM, ModelConfig, flops_per_token, num_parameters
from optim import build_optimizer, clip_grad_norm, learning_rate


@dataclass
class Args:
    data: list[str] = field(default_factory=lambda: ["stdlib"])  # text, Markdown, Python or JSONL files, folders, a prepared folder, or stdlib
    val_data: list[str] = field(default_factory=list)  # held-out text of its own, instead of a part of --data
    val_fraction: float = 0.1  # how much of --data is held out: the tail of a single file, else whole documents
    tokenizer: str = ""  # a tokenizer file or folder, or `char`; empty trains a BPE of --vocab_size on the training split
    vocab_size: int = 2048  # size of the trained BPE, special tokens included
    seq_len: int = 256  # input positions per sequence, each with a target
    document_mask: bool = True  # tokens see their own document only, and positions restart in each
    replay: list[str] = field(default_factory=list)  # old text to mix in when training goes on from --model
    replay_fraction: float = 0.1  # share of the sequences drawn from --replay
    out: str = "out/pretrain"  # folder of the run
    resume: str = "none"  # none: --out must be empty; auto: go on from its latest checkpoint; or a checkpoint folder
    # model: --model continues from a folder; else --preset, with single fields overridden by the flags below
    model: str = ""  # folder of a model to go on from, ours or Hugging Face's
    preset: str = "1m"  # shape of a new model: 1m 10m 124m 350m 1b 3b 8b
    hidden_size: int | None = None  # width of the residual stream
    intermediate_size: int | None = None  # width of the SwiGLU
    num_hidden_layers: int | None = None  # depth
    num_attention_heads: int | None = None  # query heads
    num_key_value_heads: int | None = None  # key and value heads
    head_dim: int | None = None  # width of a head
    rope_theta: float | None = None  # base wavelength of RoPE
    sliding_window: int | None = None  # how many tokens a token sees, itself included
    qk_norm: bool | None = None  # normalise each head's query and key
    attention_bias: bool | None = None  # biases on the attention's projections
    tie_word_embeddings: bool | None = None  # one table for embedding and head
    attention_dropout: float | None = None  # dropout on the attention weights
    initializer_range: float | None = None  # standard deviation of the initial weights
    # optimization
    global_batch_size: int = 16  # sequences per update
    micro_batch_size: int = 16  # sequences per forward pass (and data-parallel rank); the rest is accumulated
    max_steps: int = 1000  # number of updates
    optimizer: Literal["adamw", "muon", "lion", "adafactor", "adamw8bit"] = "adamw"  # see optim.py
    lr: float = 3e-3  # peak learning rate
    min_lr: float = 0.0  # learning rate at the last step
    warmup_steps: int = 50  # updates of linear warm-up
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # shape of the learning rate after the warm-up
    weight_decay: float = 0.1  # decoupled, on matrices only
    beta1: float = 0.9  # decay of the gradient's moving average
    beta2: float = 0.95  # decay of the squared gradient's moving average
    grad_clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    spike_action: Literal["none", "skip", "rollback"] = "none"  # at a loss spike: skip the update, or return to the last checkpoint at half the rate
    spike_threshold: float = 6.0  # a spike is this many standard deviations above the last 50 losses
    early_stopping: int = 0  # stop after this many evaluations without a better loss; 0 = never
    # execution
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"  # bfloat16 and float16: float32 weights under autocast
    attention: Literal["eager", "sdpa", "triton"] = "sdpa"  # eager is the readable one
    kernels: Literal["torch", "triton"] = "torch"  # the other fused operations
    compile: bool = False  # torch.compile the model
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute activations in backward to save memory
    dp: int = 0  # data-parallel degree; 0 = all processes that the other degrees leave
    tp: int = 1  # tensor-parallel degree
    pp: int = 1  # pipeline-parallel degree
    cp: int = 1  # context-parallel degree
    ep: int = 1  # expert-parallel degree
    zero: int = 0  # ZeRO stage
    seed: int = 0  # of the initial weights and the data order
    # reporting
    log_every: int = 10  # updates between rows of metrics.jsonl
    eval_every: int = 250  # updates between evaluations; 0 = never
    save_every: int = 250  # updates between checkpoints; 0 = only the last
    keep_last: int = 2  # checkpoints kept, beside the best one; 0 = all
    sample_prompt: list[str] = field(default_factory=lambda: ["def ", "import ", "The "])  # prompts of the samples at the end
    sample_tokens: int = 64  # length of each sample; 0 = no samples


PRESETS = {  # the name is the size with the vocabulary that usually goes with it
    "1m": dict(hidden_size=128, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, qk_norm=True),
    "10m": dict(hidden_size=320, num_hidden_layers=8, num_attention_heads=5, num_key_value_heads=5, tie_word_embeddings=True, qk_norm=True),
    "124m": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, tie_word_embeddings=True),  # GPT-2
    "350m": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, tie_word_embeddings=True),  # GPT-2 medium
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
               rope_theta=500000.0, tie_word_embeddings=True),  # Llama 3.2 1B
    "3b": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
               rope_theta=500000.0, tie_word_embeddings=True),  # Llama 3.2 3B
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
               rope_theta=500000.0),  # Llama 3 8B
}
LATER = dict(optimizer="adamw8bit", attention="triton", kernels="triton")  # named in the contract of flags; the parts do not stand yet
HALF = dict(bfloat16=torch.bfloat16, float16=torch.float16)


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in nats: logits (B, S, V), labels (B, S) already aligned, -100 = not counted -> scalar."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def check(args: Args) -> None:
    """Refuse what cannot work before any data is read. Raises ValueError with one line."""
    for name, value in LATER.items():
        if getattr(args, name) == value:
            raise ValueError(f"--{name} {value} is not available yet")
    for name in ("dp", "tp", "pp", "cp", "ep", "zero"):
        if getattr(args, name) > (0 if name == "zero" else 1):
            raise ValueError(f"--{name} {getattr(args, name)} is not available yet: one process for now")
    for name in ("seq_len", "global_batch_size", "micro_batch_size", "max_steps", "log_every", "tp", "pp", "cp", "ep"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: it must be at least 1")
    for name in ("lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "spike_threshold", "early_stopping", "dp", "zero",
                 "eval_every", "save_every", "keep_last", "sample_tokens"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"--{name} {getattr(args, name)}: it must not be negative")
    if not 0 < args.val_fraction < 1 and not args.val_data:
        raise ValueError(f"--val_fraction {args.val_fraction}: it must lie between 0 and 1")
    if not 0 <= args.replay_fraction < 1:
        raise ValueError(f"--replay_fraction {args.replay_fraction}: it must lie in [0, 1)")
    if args.global_batch_size % args.micro_batch_size:
        raise ValueError(f"--global_batch_size {args.global_batch_size} is no multiple of --micro_batch_size {args.micro_batch_size}")
    if args.early_stopping and not args.eval_every:
        raise ValueError("--early_stopping needs evaluations: give --eval_every")
    if args.spike_action == "rollback" and not args.save_every:
        raise ValueError("--spike_action rollback needs checkpoints: give --save_every")
    if args.preset not in PRESETS:
        raise ValueError(f"--preset {args.preset}: choose from {', '.join(PRESETS)}")
    metrics.detect_device(args.device)
    if not args.model:
        model_config(args, args.vocab_size)


def model_config(args: Args, vocab_size: int) -> ModelConfig:
    """The preset's shape with the flags that were given laid over it."""
    names = {f.name for f in fields(ModelConfig)} & {f.name for f in fields(Args)} - {"vocab_size", "attention"}
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    shape = dict(PRESETS[args.preset]) | given
    if "num_attention_heads" in given and "num_key_value_heads" not in given:
        shape.pop("num_key_value_heads", None)  # the preset's count belongs to the preset's heads
    return ModelConfig(vocab_size=vocab_size, max_position_embeddings=args.seq_len, attention=args.attention, **shape)


def resume_point(args: Args) -> Path | None:
    """The checkpoint to go on from, after comparing its flags with ours; None starts afresh. Raises ValueError."""
    out = Path(args.out)
    if args.resume == "none":
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty; go on from it with --resume auto, or choose another --out")
        return None
    found = checkpoint.latest(out) if args.resume == "auto" else checkpoint.find_checkpoint(args.resume)
    if found is None or not (out / "args.json").exists():
        return found  # --resume auto before the first checkpoint: start again
    before = json.loads((out / "args.json").read_text())
    fixed = ("data", "val_data", "val_fraction", "tokenizer", "vocab_size", "seq_len", "global_batch_size", "seed", "replay",
             "replay_fraction", "document_mask", "optimizer", "model", "preset", *(f.name for f in fields(ModelConfig)))
    for name in fixed:
        if hasattr(args, name) and name != "attention" and getattr(args, name) != before.get(name):
            raise ValueError(f"--{name} {getattr(args, name)}: {out} was started with {before.get(name)}; resume with the same")
    return found


def build_model(args: Args, tokenizer) -> CausalLM:
    """A new model, or the one of --model; float32 weights (float64 under --dtype float64)."""
    if not args.model:
        model = CausalLM(model_config(args, tokenizer.vocab_size), seed=args.seed)
    else:
        model = checkpoint.load_model(checkpoint.find_checkpoint(args.model), dtype=torch.float32, attention=args.attention)
        if model.config.vocab_size < tokenizer.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model of {args.model} {model.config.vocab_size}")
        if model.config.max_position_embeddings < args.seq_len:
            raise ValueError(f"--seq_len {args.seq_len}: {args.model} was trained for {model.config.max_position_embeddings} positions")
    model.model.activation_checkpointing = args.activation_checkpointing
    return model.to(torch.float64 if args.dtype == "float64" else torch.float32).train()


def write_samples(args: Args, model: CausalLM, tokenizer, step: int) -> None:
    """Let the model speak, for the report."""
    if args.sample_tokens:
        texts = generate_text(model, tokenizer, args.sample_prompt, max_new_tokens=args.sample_tokens, temperature=0.8, top_p=0.95, seed=args.seed)
        samples = [{"step": step, "prompt": prompt, "text": text} for prompt, text in zip(args.sample_prompt, texts)]
        (Path(args.out) / "samples.json").write_text(json.dumps(samples, indent=1, ensure_ascii=False), encoding="utf-8")


def evaluate(args: Args, model: CausalLM, shards: Path, index: dict, step: int) -> dict:
    """A row of metrics.jsonl: loss per token and bits per byte over all held-out windows."""
    batches = eval_batches(shards, "val", args.seq_len, args.micro_batch_size)
    total = evaluate_loss(model, ((ids, labels, cu if args.document_mask else None) for ids, labels, cu in batches))
    return {"kind": "eval", "step": step, "loss": total["nats"] / total["tokens"],
            "bits_per_byte": bits_per_byte(total["nats"], index["splits"]["val"]["bytes"])}


def verdict(args: Args, state: dict, loss: float, grad_norm: float) -> str:
    """What becomes of an update: "apply", "skip" or "rollback"; keeps the books on `state`. A NaN is never applied."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        state["bad_steps"] += 1
        state["loss_scale"], state["good_steps"] = max(state["loss_scale"] / 2, 1.0), 0  # float16 overflowed: scale less
        if state["bad_steps"] > 25:
            raise ValueError(f"loss or gradient was not finite {state['bad_steps']} times in a row (step {state['step']}): lower --lr, or "
                             f"set --grad_clip; the last good checkpoint is {checkpoint.latest(Path(args.out))}")
        return "skip"
    if args.spike_action != "none" and metrics.is_spike(state["losses"], loss, args.spike_threshold):
        return args.spike_action
    state["losses"] = (state["losses"] + [loss])[-50:]
    state["bad_steps"], state["good_steps"] = 0, state["good_steps"] + 1
    if args.dtype == "float16" and state["good_steps"] % 1000 == 0:
        state["loss_scale"] *= 2
    return "apply"


def catch_signals() -> list[int]:
    """From now on Ctrl-C and SIGTERM fill the list that is returned, for the loop to see; the second Ctrl-C stops at once."""
    caught = []

    def handler(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return caught


def main() -> None:
    args = parse(Args, __doc__)
    check(args)
    out, device = Path(args.out), metrics.detect_device(args.device)
    log = out / "metrics.jsonl"
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "skipped": 0, "best_step": None, "best_loss": None, "evals_since_best": 0, "stopped": False,
             "lr_scale": 1.0, "loss_scale": 2.0**16 if args.dtype == "float16" else 1.0, "good_steps": 0, "bad_steps": 0, "losses": []}
    resume_from = resume_point(args)
    if resume_from:
        state = checkpoint.read_state(resume_from)
        if state["stopped"] or state["step"] >= args.max_steps:
            print(f"{resume_from} is finished ({state['step']} steps): nothing to do")
            return

    # Data, model, optimizer.
    special = dict(data=args.data, val_data=args.val_data, val_fraction=args.val_fraction, vocab_size=args.vocab_size)
    source = str(checkpoint.find_checkpoint(args.model)) if args.model and not args.tokenizer else args.tokenizer
    tokenizer, index = prepare(out / "data", tokenizer=source, **special)
    shards, replay = Path(index["directory"]), None
    if args.replay:
        replay = prepare(out / "replay", data=args.replay, val_fraction=0.0, tokenizer=shards)[1]["directory"]
    loader = Loader(shards, "train", seq_len=args.seq_len, global_batch_size=args.global_batch_size, micro_batch_size=args.micro_batch_size,
                    seed=args.seed, replay=replay, replay_fraction=args.replay_fraction if replay else 0.0)
    model = build_model(args, tokenizer).to(device)
    optimizer = build_optimizer(args.optimizer, model.named_parameters(), lr=args.lr, weight_decay=args.weight_decay, betas=(args.beta1, args.beta2))
    forward = torch.compile(model) if args.compile else model
    autocast = torch.autocast(device.type, HALF[args.dtype]) if args.dtype in HALF else contextlib.nullcontext()
    flops = flops_per_token(model.config, args.seq_len)
    peak = metrics.peak_flops(device, args.dtype) or metrics.measured_peak_flops(args.dtype)
    print(f"{num_parameters(model.config):,} parameters · {index['splits']['train']['tokens']:,} training tokens · {device} · {args.dtype} · "
          f"attention {args.attention} · kernels {args.kernels} · peak {peak / 1e12:.3g} TFLOP/s{' (measured)' if device.type == 'cpu' else ''}")

    if resume_from:
        state = checkpoint.load_checkpoint(resume_from, model, optimizer)
        loader.load_state_dict({"step": state["step"]})
        print(f"resumed from {resume_from}")
    out.mkdir(parents=True, exist_ok=True)
    metrics.drop_rows_after(log, state["step"] if resume_from else -1)
    checkpoint.write_json(out / "args.json", asdict(args))
    if args.eval_every and not resume_from:
        metrics.append_row(log, evaluate(args, model, shards, index, 0))

    def save() -> Path:
        best = [] if state["best_step"] is None else [state["best_step"]]
        return checkpoint.save_checkpoint(out, state["step"], model=model, optimizer=optimizer, tokenizer=tokenizer, state=state,
                                          keep_last=args.keep_last, keep=best)

    caught = catch_signals()
    window_tokens, window_seconds = 0, 0.0  # since the last row
    while state["step"] < args.max_steps and not state["stopped"]:
        if caught:
            raise KeyboardInterrupt(f"interrupted; saved {save()}; the same command with --resume auto goes on from there")
        start = time.perf_counter()
        torch.manual_seed(args.seed * 1_000_003 + state["step"])  # dropout too depends on (seed, step) alone
        lr = state["lr_scale"] * learning_rate(state["step"], schedule=args.schedule, lr=args.lr, min_lr=args.min_lr,
                                               warmup_steps=args.warmup_steps, max_steps=args.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Forward and backward, micro batch by micro batch; every counted token of the global batch weighs the same.
        micro_batches = next(loader)
        counted = max(1, sum(int((labels != -100).sum()) for _, labels, _ in micro_batches))
        loss = torch.zeros((), device=device)
        for input_ids, labels, cu_seqlens in micro_batches:
            plain = not args.document_mask or len(cu_seqlens) == len(input_ids) + 1  # no boundary inside a row: causal is enough
            with autocast:
                logits = forward(input_ids.to(device), cu_seqlens=None if plain else cu_seqlens.to(device))
                part = next_token_loss(logits, labels.to(device)) / counted
            (part * state["loss_scale"]).backward()
            loss = loss + part.detach()
        if state["loss_scale"] != 1.0:
            torch._foreach_mul_([p.grad for p in model.parameters()], 1 / state["loss_scale"])
        grad_norm = float(clip_grad_norm(model.parameters(), args.grad_clip))
        loss = float(loss)

        action = verdict(args, state, loss, grad_norm)
        if action == "rollback" and (good := checkpoint.latest(out)):
            scale, state = state["lr_scale"] / 2, checkpoint.load_checkpoint(good, model, optimizer)
            state["lr_scale"] = scale
            loader.load_state_dict({"step": state["step"]})
            metrics.drop_rows_after(log, state["step"])
            optimizer.zero_grad()
            print(f"loss spike ({loss:.3f}): back to {good}, learning rate halved to {scale:g} of the schedule")
            continue
        if action == "apply":
            optimizer.step()
        else:
            state["skipped"] += 1
            print(f"step {state['step'] + 1}: update skipped (loss {loss:.3f}, gradient norm {grad_norm:.3g})")
        optimizer.zero_grad()

        seconds = time.perf_counter() - start
        window_tokens, window_seconds = window_tokens + counted, window_seconds + seconds
        state["step"], state["tokens"], state["seconds"] = state["step"] + 1, state["tokens"] + counted, state["seconds"] + seconds
        last = state["step"] == args.max_steps
        if state["step"] % args.log_every == 0 or last:
            speed = window_tokens / window_seconds
            row = {"kind": "train", "step": state["step"], "loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens": state["tokens"],
                   "tokens_per_second": speed, "seconds": state["seconds"], "memory_bytes": metrics.memory_bytes(device), "skipped": state["skipped"]}
            metrics.append_row(log, row)
            print(metrics.progress_line(row, args.max_steps, state["seconds"], speed * flops / peak), flush=True)
            window_tokens, window_seconds = 0, 0.0
        better = False
        if args.eval_every and (state["step"] % args.eval_every == 0 or last):
            row = evaluate(args, model, shards, index, state["step"])
            metrics.append_row(log, row)
            print(f"step {row['step']}: held-out loss {row['loss']:.4f}, {row['bits_per_byte']:.4f} bits per byte", flush=True)
            better = state["best_loss"] is None or row["loss"] < state["best_loss"]
            state["evals_since_best"] = 0 if better else state["evals_since_best"] + 1
            if better:
                state["best_step"], state["best_loss"] = state["step"], row["loss"]
            state["stopped"] = 0 < args.early_stopping <= state["evals_since_best"]
            metrics.write_report(out)
        if last or state["stopped"]:
            write_samples(args, model, tokenizer, state["step"])
            metrics.write_report(out)
        if last or state["stopped"] or (args.save_every and (better or state["step"] % args.save_every == 0)):
            save()  # after the rows of this step, so that a resumed run finds them
    print(f"done: {checkpoint.latest(out)} · report in {out / 'report.html'}")


if __name__ == "__main__":
    run(main)
