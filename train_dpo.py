"""Direct preference optimization: from pairs of answers, of which one is preferred, without a reward model.

    c, r = log p(answer) - log p_reference(answer), summed over the chosen and the rejected answer's tokens
    loss = - log sigmoid(beta * (c - r))                    (Rafailov et al. 2023, eq. 7; others in preference_loss)

    python train_dpo.py --model out/sft --data pairs.jsonl
    python train_dpo.py --model out/sft --data pairs.jsonl --loss_type ipo --reference online
    python train_dpo.py --model out/sft --data pairs.jsonl --lr 2e-4 --lora_r 16 --load_in nf4  # QLoRA
    torchrun --nproc_per_node 4 train_dpo.py --model hf_folder --data pairs.jsonl --tp 2 --zero 1

The reference is --model itself (or --ref_model), scored once before training; with --lora_r the model with its adapters
off. No dropout, so the first step's loss is exactly ln 2. All randomness depends on (seed, step), so resuming is exact.
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
from torch import Tensor

import checkpoint
import metrics
import parallel
import shards
from cli import parse, run
from data.chat import OWN, TEMPLATES, prepare_tokenizer, template_of
from data.loader import shuffled
from data.prepare import Pair, read_pairs
from data.tokenizer import load_tokenizer
from flags import check_ranges
from logprobs import by_length, log1mexp, padded, score_all, sequence_logprobs
from lora import LoRAConfig, disable_adapters, parameter_report
from model import CausalLM
from optim import build_optimizer, clip_grad_norm, learning_rate
from parallel.launch import joined

BY_LENGTH = ("ipo", "sigmoid_norm", "simpo", "orpo")  # losses of the mean log-probability of a token
NO_REFERENCE = ("simpo", "orpo")


@dataclass(kw_only=True)
class Args(parallel.Flags):  # those for many processes come first
    # data and run
    model: str  # the folder of the model to train: a run's, a checkpoint's or Hugging Face's
    data: list[str]  # preference pairs: prompt, chosen, rejected in any form that data/chat.py reads
    ref_model: str = ""  # the reference's folder; empty: --model as it is at the start
    reference: Literal["precomputed", "online"] = "precomputed"  # score the reference once before, or beside each step
    val_data: list[str] = field(default_factory=list)  # held-out pairs, instead of a part of --data
    val_fraction: float = 0.1  # share of the prompts that is held out, chosen by their text
    tokenizer: str = ""  # a tokenizer's file or folder; empty: the model's
    template: str = ""  # chatml llama2 llama3 mistral vicuna alpaca; empty: that of --model's tokenizer, else chatml
    seq_len: int = 256  # longest prompt and answer, in tokens; a longer one is cut
    rope_scaling: Literal["", "linear", "dynamic", "yarn"] = ""  # how RoPE takes a --seq_len beyond the model's
    out: str = "out/dpo"  # folder of the run
    resume: str = "none"  # none: --out must be empty; auto: go on from its latest checkpoint; or a checkpoint's folder
    # loss
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "simpo", "orpo"] = "sigmoid"  # its formula
    beta: float = 0.1  # how dear it is to leave the reference (for orpo: weight beside the NLL; for simpo take 2)
    label_smoothing: float = 0.0  # share of the pairs that may be the wrong way round (sigmoid, robust)
    gamma: float = 0.5  # margin of simpo
    nll_weight: float = 0.0  # weight of the chosen answers' mean NLL beside the loss (Llama 3 takes 0.2; orpo always 1)
    # optimization
    global_batch_size: int = 16  # pairs per update
    micro_batch_size: int = 16  # at most so many pairs per forward pass (and data-parallel rank)
    max_steps: int = 200  # number of updates
    optimizer: Literal["adamw", "muon", "lion", "adafactor", "adamw8bit"] = "adamw"  # see optim.py
    lr: float = 1e-5  # peak learning rate; for a large model about 5e-7
    min_lr: float = 0.0  # learning rate of the last update
    warmup_steps: int = 10  # updates of linear warm-up
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "linear"  # the learning rate after the warm-up
    weight_decay: float = 0.0  # decoupled, on matrices only
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    # adapters and execution
    lora_r: int = 0  # rank of LoRA adapters, which alone are then trained; 0: train the whole model
    lora_alpha: float = 16.0  # an adapter counts alpha / r times
    lora_targets: list[str] = field(default_factory=lambda: ["all-linear"])  # layers, such as q_proj v_proj
    load_in: Literal["", "nf4", "fp4", "int8", "int4"] = ""  # round the frozen model to this (QLoRA: nf4)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"  # 16 bits: by autocast
    attention: Literal["eager", "sdpa", "triton"] = "sdpa"  # eager is the readable one
    kernels: Literal["torch", "triton"] = "torch"  # the other fused operations
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute activations to save memory
    seed: int = 0  # of the order of the pairs
    # reporting
    log_every: int = 10  # updates between rows of metrics.jsonl
    eval_every: int = 50  # updates between evaluations; 0: never
    save_every: int = 50  # updates between checkpoints; 0: only the last
    keep_last: int = 2  # how many checkpoints stay, besides the best; 0: all


FIXED = {"model", "data", "ref_model", "val_data", "val_fraction", "tokenizer", "template", "seq_len", "loss_type",
         "beta", "label_smoothing", "gamma", "nll_weight", "global_batch_size", "optimizer", "seed", "lora_r",
         "lora_alpha", "lora_targets", "load_in", "rope_scaling"}  # else it is another run


def preference_loss(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *,
                    loss_type: str = "sigmoid", beta: float = 0.1, label_smoothing: float = 0.0,
                    chosen_lengths: Tensor | None = None, rejected_lengths: Tensor | None = None,
                    gamma: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Summed log-probabilities of the answers (B,) -> losses (B,), rewards of the chosen and of the rejected (B,).

    With c, r the log-ratios to the reference, D = c - r, and p the policy's mean log-probability of an answer's token:
      sigmoid        -log s(beta D), smoothed: (1 - e) of it + e times -log s(-beta D)  (DPO; cDPO, Mitchell 2023)
      robust         ((1 - e) * -log s(beta D) - e * -log s(-beta D)) / (1 - 2 e)       (arXiv:2403.00409)
      hinge          max(0, 1 - beta D)                                                 (SLiC, arXiv:2305.10425)
      ipo            (D - 1 / (2 beta))^2, with c and r per token as its authors meant  (arXiv:2310.12036, TRL #1265)
      sigmoid_norm   as sigmoid, with c and r per token                                 (Tulu 3, arXiv:2411.15124)
      simpo          -log s(beta (p_chosen - p_rejected) - gamma), no reference         (arXiv:2405.14734)
      orpo           beta * -log s(log odds ratio), no reference; the stage adds the NLL (arXiv:2403.07691)
    Rewards are beta c and beta r (without a reference: beta p), detached. ValueError: unknown type, lengths missing.
    """
    if loss_type in BY_LENGTH and (chosen_lengths is None or rejected_lengths is None):
        raise ValueError(f"loss_type {loss_type} needs chosen_lengths and rejected_lengths")
    e = label_smoothing
    c, r = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    if loss_type in NO_REFERENCE:
        c, r = policy_chosen, policy_rejected
    if loss_type in BY_LENGTH:
        c, r = c / chosen_lengths, r / rejected_lengths
    logits = beta * (c - r)
    if loss_type in ("sigmoid", "sigmoid_norm"):
        losses = -(1 - e) * F.logsigmoid(logits) - e * F.logsigmoid(-logits)
    elif loss_type == "robust":
        losses = (-(1 - e) * F.logsigmoid(logits) + e * F.logsigmoid(-logits)) / (1 - 2 * e)
    elif loss_type == "hinge":
        losses = (1 - logits).relu()
    elif loss_type == "ipo":
        losses = (c - r - 1 / (2 * beta)).square()
    elif loss_type == "simpo":
        losses = -F.logsigmoid(logits - gamma)
    elif loss_type == "orpo":
        losses = -beta * F.logsigmoid(c - r - (log1mexp(c) - log1mexp(r)))
    else:
        raise ValueError(f"loss_type {loss_type!r}: choose sigmoid, hinge, ipo, robust, sigmoid_norm, simpo or orpo")
    return losses, beta * c.detach(), beta * r.detach()


def kto_loss(policy_logps: Tensor, ref_logps: Tensor, desirable: Tensor, kl: Tensor, *, beta: float = 0.1,
             desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """KTO (arXiv:2402.01306, eq. 8), for answers that are good or bad, not paired: (B,) each, desirable bool -> losses (B,).

    kl: log-ratios (n,) of mismatched answers, each prompt's to the next prompt in the batch, or their mean over all
    ranks; max(0, mean), detached, is the point from which a gain or a loss is felt, 0 if n = 0.
    """
    z = (kl.sum() / max(kl.numel(), 1)).clamp(min=0).detach()
    gain = beta * (policy_logps - ref_logps - z)
    return torch.where(desirable, desirable_weight * gain.neg().sigmoid(), undesirable_weight * gain.sigmoid())


def score(model: CausalLM, pairs: list[Pair], device, autocast, run=None) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities and lengths of the answers: (B, 2) each, chosen first. run: what has cut the model."""
    input_ids, labels = padded([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])
    if run:
        sums, lengths = run.sequence_logprobs(input_ids, labels)
    else:
        with autocast:
            logits = model(input_ids.to(device))
        sums, lengths = sequence_logprobs(logits, labels.to(device))
    return sums.view(2, -1).T, lengths.view(2, -1).T


def losses_of(args: Args, sums: Tensor, lengths: Tensor, reference: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses (B,) of scored pairs, with the NLL of the chosen, and what the log tells of them, detached, (B,) each."""
    losses, chosen, rejected = preference_loss(*sums.T, *reference.T, loss_type=args.loss_type, beta=args.beta,
                                               label_smoothing=args.label_smoothing, chosen_lengths=lengths[:, 0],
                                               rejected_lengths=lengths[:, 1], gamma=args.gamma)
    losses = losses - (1.0 if args.loss_type == "orpo" else args.nll_weight) * sums[:, 0] / lengths[:, 0]
    per_token, drift = (sums / lengths).detach(), ((sums - reference) / lengths).detach()
    return losses, {"chosen_reward": chosen, "rejected_reward": rejected, "margin": chosen - rejected,
                    "accuracy": (chosen > rejected).double(), "kl": drift.mean(1),
                    "preference_accuracy": (per_token[:, 0] > per_token[:, 1]).double()}


def check(args: Args, processes: int) -> None:
    """Refuse what cannot work before any data is read. Raises ValueError with one line."""
    def expect(true: bool, name: str, rule: str) -> None:
        if not true:
            raise ValueError(f"--{name} {getattr(args, name)}: {rule}")

    check_ranges(args)
    expect(args.beta > 0, "beta", "must be above 0")
    expect(0 <= args.label_smoothing < 0.5, "label_smoothing", "must be at least 0 and below 0.5")
    smoothed = not args.label_smoothing or args.loss_type in ("sigmoid", "robust", "sigmoid_norm")
    expect(smoothed, "label_smoothing", f"has no meaning for --loss_type {args.loss_type}")
    expect(args.template in ("", OWN, *TEMPLATES), "template", f"choose from {', '.join(TEMPLATES)}")
    expect(args.lora_r or not args.load_in, "load_in", "rounded weights stay as they are: add adapters, by --lora_r 16")
    parallel.check(args, processes, without=("pp", "cp", "ep"))
    for folder in filter(None, (args.model, args.ref_model)):
        checkpoint.find_checkpoint(folder)


def load(args: Args, folder: str, tokenizer, adapter: LoRAConfig | None = None) -> CausalLM:
    """A model in eval mode, and it stays there: dropout would blur the ratio."""
    model = checkpoint.load_chat_model(folder, tokenizer, args.template, seq_len=args.seq_len,
                                       dtype=torch.float64 if args.dtype == "float64" else torch.float32,
                                       attention=args.attention, kernels=args.kernels, load_in=args.load_in,
                                       adapter=adapter, seed=args.seed, rope_scaling=args.rope_scaling)
    model.model.activation_checkpointing = args.activation_checkpointing
    return model.eval()


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
        if state["step"] >= args.max_steps:
            print(f"{resume_from}: finished after {state['step']} steps, nothing to do")
            return

    # Data, model, reference, optimizer.
    if added := prepare_tokenizer(tokenizer, args.template):
        print(f"the tokenizer lacked {' '.join(added)}, which the template needs: added")
    read = partial(read_pairs, tokenizer, data=args.data, val_data=args.val_data, val_fraction=args.val_fraction,
                   template=args.template, seq_len=args.seq_len)
    pairs, held_out = read("train"), read("val")
    half = getattr(torch, args.dtype) if "16" in args.dtype else None
    autocast = torch.autocast(device.type, half, enabled=half is not None)
    adapter = LoRAConfig(args.lora_r, args.lora_alpha, target_modules=args.lora_targets) if args.lora_r else None
    model, run, frozen_run = load(args, args.model, tokenizer, adapter), None, None
    own = adapter and not args.ref_model  # the model without its adapters is the reference
    frozen = model if own else load(args, args.ref_model or args.model, tokenizer).requires_grad_(False)
    print(f"{parameter_report(model)['trainable']:,} trained parameters, loss {args.loss_type}, reference "
          f"{args.reference}, {device}, {args.dtype}, attention {args.attention}, kernels {args.kernels}")
    optimizer_of = partial(build_optimizer, args.optimizer, lr=args.lr, weight_decay=args.weight_decay)
    if world.size > 1 or args.zero:
        cut = partial(parallel.parallelize, mesh=mesh, **args.options(), autocast=half, device=device)
        run = cut(model, optimizer_of=optimizer_of)
        frozen_run = run if own else cut(frozen, optimizer_of=None)
    else:
        model.to(device), frozen.to(device)
    optimizer = run.optimizer if run else optimizer_of(model.named_parameters())
    whole = None if run else model  # run has it in parts, and puts them together at the end
    policy = partial(score, model, device=device, autocast=autocast, run=run)
    score_each = partial(score_all, size=args.micro_batch_size, run=run)

    @torch.no_grad()
    def ask(some: list[Pair]) -> Tensor:  # the reference
        with disable_adapters(frozen):
            return score(frozen, some, device, autocast, frozen_run)[0]

    val_reference = score_each(ask, held_out)
    if args.reference == "precomputed":
        reference = score_each(ask, pairs)
        frozen = frozen_run = None  # gives the memory back

    def evaluate() -> dict:
        rows, found = [], score_each(lambda some: torch.cat(policy(some), 1), held_out)
        for some in by_length(range(len(held_out)), held_out, args.micro_batch_size):
            sums, lengths = found[some].split(2, 1)
            losses, told = losses_of(args, sums, lengths, val_reference[some])
            rows.append({"loss": losses, "nats": -sums[:, 0], **told})
        means = {name: float(torch.cat([row[name] for row in rows]).double().mean()) for name in rows[0]}
        bits = means.pop("nats") * len(held_out) / math.log(2)
        return {"kind": "eval", "step": state["step"], **means,
                "bits_per_byte": bits / max(sum(pair.num_bytes for pair in held_out), 1)}

    def save() -> Path:
        best = [] if state["best_step"] is None else [state["best_step"]]
        return shards.save_checkpoint(out, state["step"], model=whole, optimizer=optimizer, run=run, state=state,
                                      tokenizer=tokenizer, keep_last=args.keep_last, keep=best)

    out.mkdir(parents=True, exist_ok=True)
    if resume_from:
        state = shards.load_checkpoint(resume_from, model, optimizer, run)
        print(f"going on from {resume_from}")
    metrics.drop_rows_after(log, state["step"] if resume_from else -1)
    if first:
        checkpoint.write_json(out / "args.json", asdict(args))
    if args.eval_every and not resume_from:
        metrics.append_row(log, evaluate())
    caught, G = checkpoint.catch_signals(), args.global_batch_size
    while state["step"] < args.max_steps:
        if world.any(caught):
            raise KeyboardInterrupt(f"interrupted; {save()} is saved: the same command with --resume auto goes on")
        start = time.perf_counter()
        lr = learning_rate(state["step"], schedule=args.schedule, lr=args.lr, min_lr=args.min_lr,
                           warmup_steps=args.warmup_steps, max_steps=args.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        order = shuffled(state["step"] * G, G, len(pairs), args.seed).tolist()
        told, tokens = [], 0
        batches = by_length(order, pairs, args.micro_batch_size, mesh.rank("dp"), mesh.size("dp"))
        for numbers in batches:
            some = [pairs[k] for k in numbers]
            theirs = reference[numbers] if frozen is None else ask(some)
            with run.microbatch(last=numbers is batches[-1]) if run else contextlib.nullcontext():
                sums, lengths = policy(some)
                losses, values = losses_of(args, sums, lengths, theirs)
                (losses.sum() / G * state["loss_scale"]).backward()
            told.append({"loss": losses.detach(), **values})
            tokens += int(lengths.sum())
        if run:
            run.finish(state["loss_scale"])
        elif state["loss_scale"] != 1.0:
            torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 1 / state["loss_scale"])
        clip = run.clip_grad_norm if run else partial(clip_grad_norm, model.parameters())
        total = run.total if run else float  # over the data-parallel ranks
        grad_norm, tokens = float(clip(args.grad_clip)), int(total(tokens))
        means = {name: float(total(torch.cat([row[name] for row in told]).double().sum())) / G for name in told[0]}
        if metrics.verdict(state, means["loss"], grad_norm, "none", math.inf) == "apply":
            (run or optimizer).step()
        else:
            state["skipped"] += 1
        (run or optimizer).zero_grad()

        seconds = time.perf_counter() - start
        state |= {"step": state["step"] + 1, "tokens": state["tokens"] + tokens, "seconds": state["seconds"] + seconds}
        step, better = state["step"], False
        if step % args.log_every == 0 or step == args.max_steps:
            row = metrics.train_row(state, device, lr=lr, grad_norm=grad_norm, speed=tokens / seconds, **means)
            metrics.append_row(log, row)
            print(metrics.progress_line(row, args.max_steps, state["seconds"])
                  + f"  accuracy {means['accuracy']:.2f}  margin {means['margin']:.3f}", flush=True)
        if args.eval_every and (step % args.eval_every == 0 or step == args.max_steps):
            row = evaluate()
            metrics.append_row(log, row)
            print(f"step {step}: held-out loss {row['loss']:.4f}, accuracy {row['accuracy']:.3f}, "
                  f"without the reference {row['preference_accuracy']:.3f}", flush=True)
            better = metrics.note_evaluation(state, row["loss"], 0)
        if step == args.max_steps or (args.save_every and (better or step % args.save_every == 0)):
            if first:
                metrics.write_report(out)
            if run and step == args.max_steps:
                whole = run.whole_model(load(args, args.model, tokenizer, adapter) if adapter else None)
            save()  # after this step's rows: a checkpoint means that they are there
    print(f"done: {checkpoint.latest(out)}; curves in {out / 'report.html'}")


def main(argv: list[str] | None = None) -> None:
    with joined() as world:
        train(world, parse(Args, __doc__, argv))


if __name__ == "__main__":
    run(main)
