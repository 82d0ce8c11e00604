"""Pretraining: a base model from raw text, by next-token prediction.

    loss = sum of -log p(token | the tokens before it) over the global batch / number of its counted tokens

    python train_pretrain.py                                     # the embedded corpus, a million weights, on a CPU
    python train_pretrain.py --data my.txt --tokenizer char --max_steps 2000
    python train_pretrain.py --data corpus/ --preset 124m --dtype bfloat16 --compile --out out/124m
    python train_pretrain.py --data corpus/ ... --out out/124m --resume auto       # go on after a crash or Ctrl-C
    python train_pretrain.py --model some/hf_folder --data new.jsonl --replay old.jsonl --replay_fraction 0.2
    torchrun --nproc_per_node 8 train_pretrain.py --tp 2 --pp 2 --zero 1           # on GPUs, or on a CPU all the same

Flags, the loss, checks, the model, evaluation; then the loop, in `main`. All randomness is a function of
(seed, step), so a resumed run repeats the undisturbed one to the bit.
"""

import contextlib
import math
import os
import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import checkpoint
import metrics
import parallel
import shards
from cli import parse, run
from data.loader import Loader, eval_batches
from data.prepare import SPECIAL_TOKENS, prepare
from evaluate import bits_per_byte, evaluate_loss
from flags import PRESETS, check_ranges
from generate import generate_text
from model import CausalLM, ModelConfig, flops_per_token, num_parameters
from moe import router_loss_share
from optim import build_optimizer, clip_grad_norm, learning_rate
from parallel.launch import joined


@dataclass
class Args(parallel.Flags):  # those for many processes come first
    # data and run
    data: list[str] = field(default_factory=lambda: ["stdlib"])  # text, Python, JSONL; folders; shards; stdlib
    val_data: list[str] = field(default_factory=list)  # held-out text of its own, instead of a part of --data
    val_fraction: float = 0.1  # share of --data that is held out: the tail of a single file, else whole documents
    tokenizer: str = ""  # a tokenizer's file or folder, or char; empty: train a BPE on the training split
    vocab_size: int = 2048  # size of the BPE to train, special tokens included
    seq_len: int = 256  # input positions per sequence, each with a target
    document_mask: bool = True  # tokens see their own document only, and positions restart in each
    out: str = "out/pretrain"  # folder of the run
    resume: str = "none"  # none: --out must be empty; auto: go on from its latest checkpoint; or a checkpoint's folder
    # model
    model: str = ""  # go on training this model's folder, ours or Hugging Face's, instead of a new one
    rope_scaling: Literal["", "linear", "dynamic", "yarn"] = ""  # how its RoPE takes a --seq_len beyond what it knows
    replay: list[str] = field(default_factory=list)  # old text to mix in while doing so
    replay_fraction: float = 0.1  # share of the sequences that come from --replay
    preset: str = "1m"  # shape of a new model: 1m 10m 124m 350m 1b 3b 8b; the flags below override single numbers
    hidden_size: int | None = None  # width of the residual stream
    intermediate_size: int | None = None  # width inside the SwiGLU
    num_hidden_layers: int | None = None  # depth
    num_attention_heads: int | None = None  # query heads
    num_key_value_heads: int | None = None  # key and value heads
    head_dim: int | None = None  # width of a head
    rope_theta: float | None = None  # base of RoPE's wavelengths
    sliding_window: int | None = None  # how many tokens a token sees, itself included
    qk_norm: bool | None = None  # normalise the query and key of each head
    attention_bias: bool | None = None  # biases in the attention's projections
    tie_word_embeddings: bool | None = None  # one table serves as embedding and head
    attention_dropout: float | None = None  # dropout of attention weights
    initializer_range: float | None = None  # standard deviation of the initial weights
    num_experts: int | None = None  # of each mixture; 0: plain MLPs
    num_experts_per_tok: int | None = None  # how many of them see a token
    moe_intermediate_size: int | None = None  # width of an expert
    router_aux_loss_coef: float | None = None  # how much an even load of the experts weighs beside the loss
    # optimization
    global_batch_size: int = 16  # sequences per update
    micro_batch_size: int = 16  # at most so many per forward pass (and data-parallel rank); the rest is accumulated
    max_steps: int = 1000  # number of updates
    optimizer: Literal["adamw", "muon", "lion", "adafactor", "adamw8bit"] = "adamw"  # see optim.py
    lr: float = 3e-3  # peak learning rate
    min_lr: float = 0.0  # learning rate of the last update
    warmup_steps: int = 50  # updates of linear warm-up
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # the learning rate after the warm-up
    weight_decay: float = 0.1  # decoupled, on matrices only
    beta1: float = 0.9  # decay of the average gradient (not in muon, adafactor)
    beta2: float = 0.95  # decay of the average squared gradient (not in adafactor)
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    spike_action: Literal["none", "skip", "rollback"] = "none"  # rollback: to the last checkpoint, half --lr
    spike_threshold: float = 6.0  # a spike lies this many standard deviations above the mean of the last 50 losses
    early_stopping: int = 0  # stop after so many evaluations without a better loss; 0: never
    # execution
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"  # 16 bits: by autocast
    attention: Literal["eager", "sdpa", "triton"] = "sdpa"  # eager is the readable one
    kernels: Literal["torch", "triton"] = "torch"  # the other fused operations
    compile: bool = False  # torch.compile the model; on many processes layer by layer
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute activations to save memory
    seed: int = 0  # of initial weights, data order, dropout and samples
    # reporting
    log_every: int = 10  # updates between rows of metrics.jsonl
    eval_every: int = 250  # updates between evaluations; 0: never
    save_every: int = 250  # updates between checkpoints; 0: only the last
    keep_last: int = 2  # how many checkpoints stay, besides the best; 0: all
    sample_prompt: list[str] = field(default_factory=lambda: [""] * 3)  # what the final samples go on from
    sample_tokens: int = 64  # length of a sample; 0: none


SHAPE = {f.name for f in fields(Args)} & {f.name for f in fields(ModelConfig)}
SHAPE -= {"vocab_size", "attention", "kernels", "rope_scaling"}
# A run is only itself with the same values of these; the other flags may change when it is resumed.
FIXED = SHAPE | {"data", "val_data", "val_fraction", "tokenizer", "vocab_size", "seq_len", "document_mask", "model",
                 "rope_scaling", "replay", "replay_fraction", "preset", "global_batch_size", "optimizer", "seed"}
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in nats: logits (B, S, V), aligned labels (B, S), -100 = not counted -> scalar."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def batch_loss(model: CausalLM, input_ids, labels, cu_seqlens, counted: torch.Tensor) -> torch.Tensor:
    """next_token_loss / counted, the global batch's (); 0 if that is. --kernels triton keeps no logits in memory.

    counted is a tensor, for torch.compile would make code anew for each new number."""
    if model.config.kernels == "torch":
        return next_token_loss(model(input_ids, cu_seqlens=cu_seqlens), labels) / counted.clamp(min=1)
    from kernels.cross_entropy import linear_cross_entropy
    return linear_cross_entropy(model.hidden(input_ids, cu_seqlens=cu_seqlens), model.lm_head.weight, labels,
                                num_tokens=counted)


def check(args: Args, processes: int) -> None:
    """Refuse what cannot work before any data is read. Raises ValueError with one line."""
    def expect(true: bool, name: str, rule: str) -> None:
        if not true:
            raise ValueError(f"--{name} {getattr(args, name)}: {rule}")

    check_ranges(args)
    expect(not args.early_stopping or args.eval_every, "early_stopping", "needs evaluations: set --eval_every")
    expect(args.spike_action != "rollback" or args.save_every, "spike_action", "needs checkpoints: set --save_every")
    expect(args.tokenizer or args.model or args.vocab_size >= 256 + len(SPECIAL_TOKENS), "vocab_size",
           f"bytes and special tokens alone are {256 + len(SPECIAL_TOKENS)}")
    expect(args.attention != "triton" or not args.attention_dropout, "attention", "has no dropout")
    expect(args.preset in PRESETS, "preset", f"choose from {', '.join(PRESETS)}")
    metrics.detect_device(args.device)
    parallel.check(args, processes)
    if args.model:
        for name in sorted(SHAPE):
            expect(getattr(args, name) is None, name, f"the shape is that of --model {args.model}")
    else:
        model_config(args, args.vocab_size)


def model_config(args: Args, vocab_size: int) -> ModelConfig:
    """The preset's shape with the flags that were given laid over it."""
    given = {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
    shape = dict(PRESETS[args.preset])
    if "hidden_size" in given:
        del shape["intermediate_size"]  # the preset's is for its own width
    if "num_attention_heads" in given:
        del shape["num_key_value_heads"]
    return ModelConfig(vocab_size, max_position_embeddings=args.seq_len, attention=args.attention,
                       kernels=args.kernels, **(shape | given))


def build_model(args: Args, tokenizer) -> CausalLM:
    """A new model, or the one of --model, with float32 weights (float64 under --dtype float64)."""
    dtype = torch.float64 if args.dtype == "float64" else torch.float32
    if not args.model:
        model = CausalLM(model_config(args, tokenizer.vocab_size), args.seed).to(dtype)
        model.config.bos_token_id = model.config.eos_token_id = tokenizer.eos_token_id  # it stands before each document
    else:
        model = checkpoint.load_model(checkpoint.find_checkpoint(args.model), dtype=dtype, attention=args.attention,
                                      kernels=args.kernels, seq_len=args.seq_len, rope_scaling=args.rope_scaling)
        if model.config.vocab_size < tokenizer.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, {args.model} {model.config.vocab_size}")
    model.model.activation_checkpointing = args.activation_checkpointing
    return model.train()


def evaluate(args: Args, model: CausalLM, run, index: dict, autocast, step: int) -> dict:
    """A row of metrics.jsonl: loss per token and bits per byte over all held-out windows."""
    batches = eval_batches(index["directory"], "val", args.seq_len, args.micro_batch_size)
    masked = ((ids, labels, cu_seqlens if args.document_mask else None) for ids, labels, cu_seqlens in batches)
    total = run.evaluate(masked) if run else evaluate_loss(model, masked, autocast)
    return {"kind": "eval", "step": step, "loss": total["nats"] / total["tokens"],
            "bits_per_byte": bits_per_byte(total["nats"], index["splits"]["val"]["bytes"])}


def train(world, args: Args) -> None:
    check(args, world.size)
    out, device, first = Path(args.out), world.own(metrics.detect_device(args.device)), world.rank == 0
    mesh = parallel.mesh_of(args)
    log = out / "metrics.jsonl" if first else Path(os.devnull)
    state = metrics.new_state(float16=args.dtype == "float16")
    resume_from = checkpoint.resume_point(out, args.resume, asdict(args), FIXED)
    if resume_from:
        state = checkpoint.read_state(resume_from)
        if state["stopped"] or state["step"] >= args.max_steps:
            print(f"{resume_from}: finished after {state['step']} steps, nothing to do")
            return

    # Data, model, optimizer.
    source = args.tokenizer or (str(checkpoint.find_checkpoint(args.model)) if args.model else None)
    with world.first_ahead():  # the others find the shards made
        tokenizer, index = prepare(out / "data", data=args.data, val_data=args.val_data, tokenizer=source,
                                   val_fraction=args.val_fraction, vocab_size=args.vocab_size)
    for prompt in args.sample_prompt if args.sample_tokens else []:  # told before the training, not after
        if len(tokenizer.encode(prompt)) + 1 >= args.seq_len:
            raise ValueError(f"--sample_prompt {prompt[:20]!r}... leaves no room within --seq_len {args.seq_len}")
    replay = None
    if args.replay and args.replay_fraction:
        with world.first_ahead():
            _, replay = prepare(out / "replay", data=args.replay, val_fraction=0.0, tokenizer=index["directory"])
    loader = Loader(index["directory"], "train", seq_len=args.seq_len, global_batch_size=args.global_batch_size,
                    micro_batch_size=args.micro_batch_size, seed=args.seed, replay=replay and replay["directory"],
                    replay_fraction=args.replay_fraction if replay else 0.0, rank=mesh.rank("dp"),
                    world_size=mesh.size("dp"))
    model, run = build_model(args, tokenizer), None
    optimizer_of = partial(build_optimizer, args.optimizer, lr=args.lr, weight_decay=args.weight_decay,
                           betas=(args.beta1, args.beta2))
    routers = partial(router_loss_share, config=model.config, tokens=args.global_batch_size * args.seq_len)
    if world.size > 1 or args.zero:
        run = parallel.parallelize(model, mesh, optimizer_of, **args.options(), compile=args.compile,
                                   autocast=HALF.get(args.dtype), own_loss=routers, device=device)
    optimizer = run.optimizer if run else optimizer_of(model.to(device).named_parameters())
    whole = None if run else model  # run has it in parts, and puts them together at the end
    loss_of = torch.compile(batch_loss) if args.compile else batch_loss
    autocast = torch.autocast(device.type, HALF[args.dtype]) if args.dtype in HALF else contextlib.nullcontext()
    flops, on_cpu = flops_per_token(model.config, args.seq_len), device.type == "cpu"
    peak = metrics.measured_peak_flops(args.dtype) if on_cpu and first else metrics.peak_flops(device, args.dtype)
    print(f"{num_parameters(model.config):,} parameters, {index['splits']['train']['tokens']:,} training tokens, "
          f"{device}, {args.dtype}, attention {args.attention}, kernels {args.kernels}, peak "
          + (f"{peak / 1e12:.3g} TFLOP/s {'measured' if on_cpu else 'published'}" if peak else "unknown"))

    def restore(folder: Path) -> dict:
        state = shards.load_checkpoint(folder, model, optimizer, run)
        loader.load_state_dict({"step": state["step"]})
        metrics.drop_rows_after(log, state["step"])
        print(f"going on from {folder}")
        return state

    def save() -> Path:
        best = [] if state["best_step"] is None else [state["best_step"]]
        return shards.save_checkpoint(out, state["step"], model=whole, optimizer=optimizer, run=run, state=state,
                                      tokenizer=tokenizer, keep_last=args.keep_last, keep=best)

    out.mkdir(parents=True, exist_ok=True)
    if resume_from:
        state = restore(resume_from)
    else:
        metrics.drop_rows_after(log, -1)  # of a run that was killed before its first checkpoint
    if first:
        checkpoint.write_json(out / "args.json", asdict(args))
    if args.eval_every and not resume_from:
        metrics.append_row(log, evaluate(args, model, run, index, autocast, 0))
    caught = checkpoint.catch_signals()
    window_tokens, window_seconds = 0, 0.0  # since the last row of the log
    while state["step"] < args.max_steps and not state["stopped"]:
        if world.any(caught):
            raise KeyboardInterrupt(f"interrupted; {save()} is saved: the same command with --resume auto goes on")
        start = time.perf_counter()
        seed = args.seed * 1_000_003 + state["step"]  # dropout, too, depends on (seed, step); and on the rank's data
        torch.manual_seed(seed if world.size == 1 else seed * 4096 + mesh.rank("dp", "cp"))
        lr = state["lr_scale"] * learning_rate(state["step"], schedule=args.schedule, lr=args.lr, min_lr=args.min_lr,
                                               warmup_steps=args.warmup_steps, max_steps=args.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Forward and backward, one micro batch after the other: each counted token of the global batch weighs the same.
        micro_batches = [(ids, labels, cu_seqlens if args.document_mask and len(cu_seqlens) > len(ids) + 1 else None)
                         for ids, labels, cu_seqlens in next(loader)]  # None: no document begins inside a row
        counted = sum(int((labels != -100).sum()) for _, labels, _ in micro_batches)
        if run:
            counted = run.count(labels for _, labels, _ in micro_batches)
            loss = run.backward(micro_batches, counted, state["loss_scale"])
            grad_norm = run.clip_grad_norm(args.grad_clip)
        else:
            denominator = torch.tensor(counted, dtype=model.lm_head.weight.dtype, device=device)
            loss = torch.zeros((), device=device)
            for input_ids, labels, cu_seqlens in micro_batches:
                with autocast:
                    part = loss_of(model, input_ids.to(device), labels.to(device),
                                   None if cu_seqlens is None else cu_seqlens.to(device), denominator)
                loss = loss + part.detach()
                if model.config.num_experts:  # what keeps their load even; not in the loss that is logged
                    part = part + routers(model)
                (part * state["loss_scale"]).backward()
            if state["loss_scale"] != 1.0:
                torch._foreach_mul_([p.grad for p in model.parameters()], 1 / state["loss_scale"])
            grad_norm = clip_grad_norm(model.parameters(), args.grad_clip)
        loss, grad_norm = float(loss), float(grad_norm)

        action = metrics.verdict(state, loss, grad_norm, args.spike_action, args.spike_threshold)
        if action == "rollback" and state["step"] != state["rolled_back_at"] and (good := checkpoint.latest(out)):
            state = restore(good) | {"lr_scale": state["lr_scale"] / 2, "rolled_back_at": state["step"]}
            print(f"because of a loss spike ({loss:.4f}), with {state['lr_scale']:g} of the learning rate")
            (run or optimizer).zero_grad()
            continue  # if the same batch spikes again, it is the batch: the second time it is skipped
        if action == "apply":
            (run or optimizer).step()
        else:
            state["skipped"] += 1
            print(f"step {state['step'] + 1}: update skipped, loss {loss:.4f}, gradient norm {grad_norm:.4g}")
        (run or optimizer).zero_grad()

        # The step is done: count, log, evaluate, save.
        seconds = time.perf_counter() - start
        window_tokens, window_seconds = window_tokens + counted, window_seconds + seconds
        state |= {"step": state["step"] + 1, "tokens": state["tokens"] + counted, "seconds": state["seconds"] + seconds}
        step, better = state["step"], False
        if step % args.log_every == 0 or step == args.max_steps:
            speed = window_tokens / window_seconds
            row = metrics.train_row(state, device, loss=loss, lr=lr, grad_norm=grad_norm, speed=speed)
            metrics.append_row(log, row)
            mfu = peak and speed * flops / (peak * world.size)
            print(metrics.progress_line(row, args.max_steps, state["seconds"], mfu), flush=True)
            window_tokens, window_seconds = 0, 0.0
        if args.eval_every and (step % args.eval_every == 0 or step == args.max_steps):
            row = evaluate(args, model, run, index, autocast, step)
            metrics.append_row(log, row)
            print(f"step {step}: held-out loss {row['loss']:.4f}, {row['bits_per_byte']:.4f} bits per byte", flush=True)
            better = metrics.note_evaluation(state, row["loss"], args.early_stopping)
        last = step == args.max_steps or state["stopped"]
        if last and run:
            whole = run.whole_model()
        if last and args.sample_tokens and first:
            texts = generate_text(whole, tokenizer, args.sample_prompt, max_new_tokens=args.sample_tokens,
                                  temperature=0.8, top_p=0.95, seed=args.seed)
            samples = [dict(step=step, prompt=p, text=text) for p, text in zip(args.sample_prompt, texts)]
            checkpoint.write_json(out / "samples.json", samples)
        if last or (args.save_every and (better or step % args.save_every == 0)):
            if first:
                metrics.write_report(out)
            save()  # after this step's rows, samples and report: a checkpoint means that they are there
    print(f"done: {checkpoint.latest(out)}; curves and samples in {out / 'report.html'}")


def main(argv: list[str] | None = None) -> None:
    with joined() as world:
        train(world, parse(Args, __doc__, argv))


if __name__ == "__main__":
    run(main)
