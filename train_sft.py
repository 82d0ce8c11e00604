"""Supervised fine-tuning: a base model learns to answer, from conversations.

    loss = sum of w_t * -log p(token t | the conversation before it) / sum of w_t        over the global batch
    w_t  = 1 for what the assistant says and the token that ends its turn; --prompt_loss_weight for all else

    python train_sft.py --model out/pretrain --data chats.jsonl
    python train_sft.py --model hf_folder --data alpaca.json sharegpt.jsonl --template llama3 --lr 2e-5 --dtype bfloat16
    python train_sft.py --model out/pretrain --data chats.jsonl --replay texts/ --replay_fraction 0.1 --neftune_alpha 5
    python train_sft.py --model hf_folder --data chats.jsonl --lora_r 16 --load_in nf4        # QLoRA
    torchrun --nproc_per_node 4 train_sft.py --model hf_folder --data chats.jsonl --tp 2 --zero 1
    python data/chat.py chats.jsonl --show_mask                # see what will be trained

Conversations (any form that data/chat.py reads) are packed whole into rows of --seq_len tokens; each sees itself alone.
All randomness is a function of (seed, step), so a resumed run repeats the undisturbed one to the bit.
"""

import contextlib
import math
import os
import time
from dataclasses import asdict, dataclass, field
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
from data.chat import OWN, TEMPLATES, prepare_tokenizer, template_of
from data.loader import Loader, eval_batches
from data.prepare import prepare, prepare_chats
from data.tokenizer import load_tokenizer
from evaluate import answers, bits_per_byte, evaluate_loss
from flags import check_ranges
from lora import LoRAConfig, parameter_report
from model import CausalLM, flops_per_token
from moe import router_loss_share
from optim import build_optimizer, clip_grad_norm, learning_rate
from parallel.launch import joined


@dataclass(kw_only=True)
class Args(parallel.Flags):  # those for many processes come first
    # data and run
    model: str  # the model's folder to start from: a run's, a checkpoint's or Hugging Face's
    data: list[str]  # conversations: messages, ShareGPT, Alpaca, prompt and completion; .json, .jsonl (.gz), folders
    val_data: list[str] = field(default_factory=list)  # held-out conversations, instead of a part of --data
    val_fraction: float = 0.1  # share of the conversations that is held out, chosen by their text
    tokenizer: str = ""  # a tokenizer's file or folder; empty: the model's
    template: str = ""  # chatml llama2 llama3 mistral vicuna alpaca; empty: that of --model's tokenizer, else chatml
    seq_len: int = 256  # tokens per row; a longer conversation is cut
    rope_scaling: Literal["", "linear", "dynamic", "yarn"] = ""  # how RoPE takes a --seq_len beyond the model's
    prompt_loss_weight: float = 0.0  # weight in the loss of what the assistant does not say
    replay: list[str] = field(default_factory=list)  # pretraining text to mix in
    replay_fraction: float = 0.1  # share of the rows that come from --replay
    out: str = "out/sft"  # folder of the run
    resume: str = "none"  # none: --out must be empty; auto: go on from its latest checkpoint; or a checkpoint's folder
    # adapters (see lora.py)
    lora_r: int = 0  # rank of LoRA adapters, which alone are then trained; 0: train the whole model
    lora_alpha: float = 16.0  # an adapter counts alpha / r times
    lora_targets: list[str] = field(default_factory=lambda: ["all-linear"])  # layers, such as q_proj v_proj
    load_in: Literal["", "nf4", "fp4", "int8", "int4"] = ""  # round the frozen model to this (QLoRA: nf4)
    # optimization
    global_batch_size: int = 16  # rows per update
    micro_batch_size: int = 16  # at most so many per forward pass (and data-parallel rank); the rest is accumulated
    max_steps: int = 500  # number of updates
    optimizer: Literal["adamw", "muon", "lion", "adafactor", "adamw8bit"] = "adamw"  # see optim.py
    lr: float = 1e-3  # peak learning rate; for a large model about 2e-5
    min_lr: float = 0.0  # learning rate of the last update
    warmup_steps: int = 20  # updates of linear warm-up
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # the learning rate after the warm-up
    weight_decay: float = 0.0  # decoupled, on matrices only
    beta1: float = 0.9  # decay of the average gradient (not in muon, adafactor)
    beta2: float = 0.95  # decay of the average squared gradient (not in adafactor)
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    neftune_alpha: float = 0.0  # noise on the embeddings while training, about 5 (NEFTune, arXiv:2310.05914); 0: none
    early_stopping: int = 0  # stop after so many evaluations without a better loss; 0: never
    # execution
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"  # 16 bits: by autocast
    attention: Literal["eager", "sdpa", "triton"] = "sdpa"  # eager is the readable one
    kernels: Literal["torch", "triton"] = "torch"  # the other fused operations
    compile: bool = False  # torch.compile the model; on many processes layer by layer
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute activations to save memory
    seed: int = 0  # of data order, noise, dropout and samples
    # reporting
    log_every: int = 10  # updates between rows of metrics.jsonl
    eval_every: int = 100  # updates between evaluations; 0: never
    save_every: int = 100  # updates between checkpoints; 0: only the last
    keep_last: int = 2  # how many checkpoints stay, besides the best; 0: all
    sample_prompt: list[str] = field(default_factory=lambda: ["Hello!"])  # what a user says to get the final samples
    sample_tokens: int = 64  # length of a sample; 0: none


FIXED = {"model", "data", "val_data", "val_fraction", "tokenizer", "template", "seq_len", "prompt_loss_weight",
         "replay", "replay_fraction", "global_batch_size", "optimizer", "neftune_alpha", "seed", "lora_r", "lora_alpha",
         "lora_targets", "load_in", "rope_scaling"}  # else another run
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def sft_loss(logits: torch.Tensor, labels: torch.Tensor, prompt_weight: float = 0.0) -> torch.Tensor:
    """Summed weighted cross-entropy in nats. logits (B, S, V); labels (B, S) aligned: a token id with weight 1,
    -100 with none, -101 - token id with prompt_weight (as data.loader's prompt_labels gives them) -> scalar."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    labels = labels.flatten()
    loss = F.cross_entropy(logits, labels.clamp_min(-100), ignore_index=-100, reduction="sum")
    if prompt_weight:
        prompt = torch.where(labels < -100, -101 - labels, -100)
        loss = loss + prompt_weight * F.cross_entropy(logits, prompt, ignore_index=-100, reduction="sum")
    return loss


def weigh(labels: torch.Tensor, prompt_weight: float, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """sft_loss's labels (B, S) -> targets, -100 where nothing counts, and how much each counts (B, S)."""
    prompt = labels < -100
    target = torch.where(prompt, -101 - labels if prompt_weight else -100, labels)
    return target, torch.ones_like(labels, dtype=dtype).masked_fill(prompt, prompt_weight)


def batch_loss(model: CausalLM, input_ids, labels, cu_seqlens, weight: torch.Tensor, prompt_weight: float):
    """sft_loss / weight, the global batch's (); 0 if that is. --kernels triton keeps no logits in memory.

    weight is a tensor, for torch.compile would make code anew for each new number."""
    if model.config.kernels == "torch":
        return sft_loss(model(input_ids, cu_seqlens=cu_seqlens), labels, prompt_weight) / (weight + (weight == 0))
    from kernels.cross_entropy import linear_cross_entropy
    target, token_weight = weigh(labels, prompt_weight, weight.dtype)
    return linear_cross_entropy(model.hidden(input_ids, cu_seqlens=cu_seqlens), model.lm_head.weight, target,
                                token_weight=token_weight, num_tokens=weight)


def weight_of(labels: torch.Tensor, prompt_weight: float) -> float:
    """What a batch counts for: its trained tokens, and its prompts' at their weight."""
    return int((labels >= 0).sum()) + prompt_weight * int((labels < -100).sum())


def neftune(alpha: float, seq_len: int, rank: int = 0):
    """A forward hook on the embedding: adds uniform noise in +- alpha / sqrt(seq_len * hidden) while training.

    seq_len is the whole row's: under --cp a rank has a part of it. Under --sequence_parallel the ranks of tp draw the
    same noise for all positions, and number `rank` takes that of its own."""
    def hook(module, inputs, output):  # output (B, S, hidden), of the ids (B, S) or the rank's share of their positions
        if not module.training:
            return output
        bound, shares = alpha / math.sqrt(seq_len * output.shape[2]), inputs[0].shape[1] // output.shape[1]
        noise = output.new_empty(*inputs[0].shape, output.shape[2]).uniform_(-bound, bound)
        return output + noise.chunk(shares, dim=1)[rank % shares]

    return hook


def check(args: Args, processes: int) -> None:
    """Refuse what cannot work before any data is read. Raises ValueError with one line."""
    def expect(true: bool, name: str, rule: str) -> None:
        if not true:
            raise ValueError(f"--{name} {getattr(args, name)}: {rule}")

    check_ranges(args)
    expect(not args.early_stopping or args.eval_every, "early_stopping", "needs evaluations: set --eval_every")
    expect(args.template in ("", OWN, *TEMPLATES), "template", f"choose from {', '.join(TEMPLATES)}")
    expect(args.lora_r or not args.load_in, "load_in", "rounded weights stay as they are: add adapters, by --lora_r 16")
    parallel.check(args, processes)
    metrics.detect_device(args.device)
    checkpoint.find_checkpoint(args.model)


def build_model(args: Args, tokenizer) -> CausalLM:
    """The model of --model in training mode, with what the flags add to its layers."""
    adapter = LoRAConfig(args.lora_r, args.lora_alpha, target_modules=args.lora_targets) if args.lora_r else None
    model = checkpoint.load_chat_model(args.model, tokenizer, args.template, seq_len=args.seq_len,
                                       dtype=torch.float64 if args.dtype == "float64" else torch.float32,
                                       attention=args.attention, kernels=args.kernels, load_in=args.load_in,
                                       adapter=adapter, seed=args.seed, rope_scaling=args.rope_scaling)
    model.model.activation_checkpointing = args.activation_checkpointing
    return model.train()


def evaluate(args: Args, model: CausalLM, run, index: dict, autocast, step: int) -> dict:
    """A row of metrics.jsonl: loss per trained token and bits per byte of what the assistant says, held out."""
    batches = eval_batches(index["directory"], "val", args.seq_len, args.micro_batch_size)
    total = run.evaluate(batches) if run else evaluate_loss(model, batches, autocast)
    return {"kind": "eval", "step": step, "loss": total["nats"] / total["tokens"],
            "bits_per_byte": bits_per_byte(total["nats"], index["splits"]["val"]["bytes"])}


def train(world, args: Args) -> None:
    check(args, world.size)
    out, device, first = Path(args.out), world.own(metrics.detect_device(args.device)), world.rank == 0
    mesh = parallel.mesh_of(args)
    log = out / "metrics.jsonl" if first else Path(os.devnull)
    tokenizer = load_tokenizer(args.tokenizer or checkpoint.find_checkpoint(args.model))
    args.template = args.template or template_of(tokenizer) or "chatml"
    state = metrics.new_state(float16=args.dtype == "float16")
    resume_from = checkpoint.resume_point(out, args.resume, asdict(args), FIXED)
    if resume_from:
        state = checkpoint.read_state(resume_from)
        if state["stopped"] or state["step"] >= args.max_steps:
            print(f"{resume_from}: finished after {state['step']} steps, nothing to do")
            return

    # Data, model, optimizer.
    if added := prepare_tokenizer(tokenizer, args.template):
        print(f"the tokenizer lacked {' '.join(added)}, which the template needs: added")
    replay = None
    with world.first_ahead():  # the others find the shards made
        index = prepare_chats(out / "data", tokenizer, data=args.data, val_data=args.val_data,
                              val_fraction=args.val_fraction, template=args.template, seq_len=args.seq_len)
        if args.replay and args.replay_fraction:
            _, replay = prepare(out / "replay", data=args.replay, val_fraction=0.0, tokenizer=index["directory"])
    loader = Loader(index["directory"], "train", seq_len=args.seq_len, global_batch_size=args.global_batch_size,
                    micro_batch_size=args.micro_batch_size, seed=args.seed, replay=replay and replay["directory"],
                    replay_fraction=args.replay_fraction if replay else 0.0, prompt_labels=args.prompt_loss_weight > 0,
                    rank=mesh.rank("dp"), world_size=mesh.size("dp"))
    model, run = build_model(args, tokenizer), None
    told, flops = parameter_report(model), flops_per_token(model.config, args.seq_len)
    optimizer_of = partial(build_optimizer, args.optimizer, lr=args.lr, weight_decay=args.weight_decay,
                           betas=(args.beta1, args.beta2))
    update_tokens = args.global_batch_size * args.seq_len  # trained or not
    routers = partial(router_loss_share, config=model.config, tokens=update_tokens)
    if world.size > 1 or args.zero:
        run = parallel.parallelize(model, mesh, optimizer_of, **args.options(), compile=args.compile,
                                   autocast=HALF.get(args.dtype), own_loss=routers, device=device,
                                   weigh=partial(weigh, prompt_weight=args.prompt_loss_weight))
    optimizer = run.optimizer if run else optimizer_of(model.to(device).named_parameters())
    if args.neftune_alpha:  # after tensor parallelism's own hooks, which put the embedding together
        model.model.embed_tokens.register_forward_hook(neftune(args.neftune_alpha, args.seq_len, mesh.rank("tp")))
    whole = None if run else model  # run has it in parts, and puts them together at the end
    loss_of = torch.compile(batch_loss) if args.compile else batch_loss
    autocast = torch.autocast(device.type, HALF[args.dtype]) if args.dtype in HALF else contextlib.nullcontext()
    peak = metrics.peak_flops(device, args.dtype)
    print(f"{told['trainable']:,} of {told['total']:,} parameters are trained, template {args.template}, {device}, "
          f"{args.dtype}, attention {args.attention}, kernels {args.kernels}")

    def save() -> Path:
        best = [] if state["best_step"] is None else [state["best_step"]]
        return shards.save_checkpoint(out, state["step"], model=whole, optimizer=optimizer, run=run, state=state,
                                      tokenizer=tokenizer, keep_last=args.keep_last, keep=best)

    if resume_from:
        state = shards.load_checkpoint(resume_from, model, optimizer, run)
        loader.load_state_dict({"step": state["step"]})
        print(f"going on from {resume_from}")
    metrics.drop_rows_after(log, state["step"] if resume_from else -1)
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
        seed, parts = args.seed * 1_000_003 + state["step"], mesh.size("dp", "cp")
        torch.manual_seed(seed if parts == 1 else seed * 4096 + mesh.rank("dp", "cp"))  # of noise and dropout
        lr = learning_rate(state["step"], schedule=args.schedule, lr=args.lr, min_lr=args.min_lr,
                           warmup_steps=args.warmup_steps, max_steps=args.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        micro_batches = next(loader)
        weight = sum(weight_of(labels, args.prompt_loss_weight) for _, labels, _ in micro_batches)
        counted = sum(int((labels >= 0).sum()) for _, labels, _ in micro_batches)
        if run:
            weight, counted = float(run.total(weight)), int(run.total(counted))
            loss = run.backward(micro_batches, weight, state["loss_scale"])
            grad_norm = run.clip_grad_norm(args.grad_clip)
        else:
            denominator = torch.tensor(weight, dtype=model.lm_head.weight.dtype, device=device)
            loss = torch.zeros((), device=device)
            for input_ids, labels, cu_seqlens in micro_batches:
                with autocast:
                    part = loss_of(model, input_ids.to(device), labels.to(device), cu_seqlens.to(device), denominator,
                                   args.prompt_loss_weight)
                loss = loss + part.detach()
                if model.config.num_experts:  # what keeps their load even; not in the loss that is logged
                    part = part + routers(model)
                (part * state["loss_scale"]).backward()
            if state["loss_scale"] != 1.0:
                torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 1 / state["loss_scale"])
            grad_norm = clip_grad_norm(model.parameters(), args.grad_clip)
        loss, grad_norm = float(loss), float(grad_norm)
        if metrics.verdict(state, loss, grad_norm, "none", math.inf) == "apply":
            (run or optimizer).step()
        else:
            state["skipped"] += 1
        (run or optimizer).zero_grad()

        seconds = time.perf_counter() - start
        window_tokens, window_seconds = window_tokens + update_tokens, window_seconds + seconds
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
            print(f"step {step}: held-out loss {row['loss']:.4f}", flush=True)
            better = metrics.note_evaluation(state, row["loss"], args.early_stopping)
        last = step == args.max_steps or state["stopped"]
        if last and run:
            whole = run.whole_model(build_model(args, tokenizer) if args.lora_r else None)
        if last and args.sample_tokens and first:
            prompts = [[{"role": "user", "content": text}] for text in args.sample_prompt]
            texts = answers(whole, tokenizer, prompts, args.template, max_new_tokens=args.sample_tokens)
            checkpoint.write_json(out / "samples.json", [dict(step=step, prompt=prompt, text=text)
                                                         for prompt, text in zip(args.sample_prompt, texts)])
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
