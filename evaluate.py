"""How good a model is: bits per byte on text beside gzip's and xz's, exact match on tasks, accuracy on preferences.

    loss          = sum of -ln p(token | the tokens before it) / number of tokens, in nats
    perplexity    = exp(loss)
    bits per byte = sum of -log2 p / number of UTF-8 bytes of the text
    exact match   = share of the tasks whose greedy answer is the right one
    preference accuracy = share of the pairs where the chosen answer has the higher mean log p of a token

    python evaluate.py --model out/pretrain --data out/pretrain/data --baselines
    python evaluate.py --model some/hf_folder --data book.txt more.jsonl --seq_len 1024 --out book.json
    python evaluate.py --model out/sft --tasks out/tasks/sft_val.jsonl --pairs out/tasks/pairs_val.jsonl

Loss and perplexity depend on how a tokenizer cuts the text: one with longer tokens has fewer, harder ones to predict.
Bits per byte does not, so models with different vocabularies compare; and so do compressors, because a model that
gives a text probability p can, with an arithmetic coder, store it in -log2 p bits. Each token of the text counts once,
and so does the separator after each document, which the model must predict too; it adds nats but no bytes.

The text is cut into windows of --seq_len tokens, one after the other, so a token sees between 0 and seq_len - 1 tokens
before it: longer windows give better figures. That is why seq_len stands in the result.

Preference accuracy asks the model alone, without the reference model of DPO: it can be compared between any two models,
a base model too. The mean, not the sum, so that it does not ask which answer is shorter.
"""

import contextlib
import json
import lzma
import math
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import find_checkpoint, load_chat_model, load_model, write_json
from cli import parse, run
from data.chat import (TEMPLATES, Preference, prepare_tokenizer, read_preferences, render, render_prompt, stop_ids,
                       template_of, truncate)
from data.corpus import read_documents, split_documents
from data.loader import eval_batches
from data.pack import read_index, write_shards
from data.prepare import tokens_of
from data.tasks import grade_by_family, read_tasks
from data.tokenizer import load_tokenizer
from generate import generate
from logprobs import padded, sequence_logprobs
from metrics import detect_device
from model import CausalLM


@dataclass
class Args:
    model: str  # folder of a run (its latest checkpoint), of a checkpoint, or of a Hugging Face model
    data: list[str] = field(default_factory=list)  # one prepared folder; or text, JSONL, folders, stdlib (if all is empty)
    tasks: list[str] = field(default_factory=list)  # tasks to answer, as data/tasks.py writes them
    pairs: list[str] = field(default_factory=list)  # preference pairs, in any form that data/chat.py reads
    split: Literal["val", "train", "all"] | None = None  # None = val of a prepared folder and of stdlib, all of others
    val_fraction: float = 0.1  # the share that was held out, where the text is not prepared
    seq_len: int | None = None  # window in tokens; None = the model's context
    batch_size: int = 16  # windows, tasks or pairs per forward pass
    document_mask: bool = True  # tokens see their own document only
    baselines: bool = False  # compress the same text by gzip -9 and xz -9
    template: str = ""  # of tasks and pairs: chatml llama2 llama3 mistral vicuna alpaca; empty: the model's, else chatml
    max_new_tokens: int = 96  # longest answer to a task
    out: str | None = None  # file for the result, as JSON
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"  # 16-bit: float32 weights under autocast
    attention: Literal["eager", "sdpa"] = "sdpa"  # eager is the readable one


@torch.no_grad()
def evaluate_loss(model: CausalLM, batches: Iterable, autocast=None, chunk: int = 2048) -> dict:
    """Sum the cross-entropy over all counted tokens: {"nats": float, "tokens": int}. Leaves the model's mode as it was.

    batches: (input_ids (B, S), labels (B, S) aligned, -100 = not counted, cu_seqlens (n + 1,) or None), on any device,
    as data.loader gives them: cu_seqlens holds every row's start. autocast: a context manager for the forward pass.
    chunk: for how many tokens logits are held at a time, so that B * S * V of them need not fit.
    Losses are float32 (float64 for a float64 model), their sum is float64.
    """
    device, training = next(model.parameters()).device, model.training
    nats, tokens = 0.0, 0
    model.eval()
    try:
        for input_ids, labels, cu_seqlens in batches:
            if cu_seqlens is not None and len(cu_seqlens) == len(input_ids) + 1:
                cu_seqlens = None  # no document begins inside a row: plain causal attention, which is faster
            input_ids, labels = input_ids.to(device), labels.to(device)
            with autocast or contextlib.nullcontext():
                hidden = model.hidden(input_ids, cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(device))
                counted = labels != -100
                hidden, labels = hidden[counted], labels[counted]  # (N, hidden), (N,)
                for part, targets in zip(hidden.split(chunk), labels.split(chunk)):
                    logits = model.lm_head(part)
                    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                    losses = F.cross_entropy(logits, targets, reduction="none")
                    nats += float(losses.cpu().double().sum())  # on the CPU, as not every device has float64
            tokens += len(labels)
    finally:
        model.train(training)
    return {"nats": nats, "tokens": tokens}


def perplexity(nats: float, tokens: int) -> float:
    """The size of a vocabulary that would be as hard to guess from if all its tokens were equally likely."""
    return math.exp(nats / tokens)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """nats: of all tokens together, separators included; num_bytes: of the text in UTF-8."""
    return nats / (math.log(2) * num_bytes)


def compressed_bits_per_byte(texts: Iterable[str]) -> dict:
    """{"gzip": ..., "xz": ...}: bits that `gzip -9` and `xz -9` need per UTF-8 byte of the texts, joined into one."""
    gzip = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)  # 16 asks for gzip's header and checksum
    xz = lzma.LZMACompressor(preset=9)
    num_bytes, sizes = 0, {"gzip": 0, "xz": 0}
    for text in texts:
        data = text.encode()
        num_bytes += len(data)
        sizes["gzip"] += len(gzip.compress(data))
        sizes["xz"] += len(xz.compress(data))
    sizes["gzip"] += len(gzip.flush())
    sizes["xz"] += len(xz.flush())
    if not num_bytes:
        raise ValueError("there is no text to compress")
    return {name: 8 * size / num_bytes for name, size in sizes.items()}


def shard_texts(index: dict, split: str, tokenizer) -> Iterator[str]:
    """The documents of a prepared folder (`index`: see data.pack.read_index), decoded again."""
    folder, dtype = Path(index["directory"]), np.dtype(index["dtype"]).newbyteorder("<")
    for shard in index["splits"][split]["shards"]:
        tokens = np.memmap(folder / shard["file"], dtype, mode="r")
        starts = np.fromfile((folder / shard["file"]).with_suffix(".idx"), "<i8")
        for start, end in zip(starts, [*(starts[1:] - 1), len(tokens) - 1]):  # a separator stands behind each document
            yield tokenizer.decode(tokens[start:end].tolist())


def answers(model: CausalLM, tokenizer, prompts: list[list[dict]], template: str, *, batch_size: int = 16,
            max_new_tokens: int = 96) -> list[str]:
    """What the model, greedily, says next in conversations that end with the user; `batch_size` at a time, cached.

    ValueError: see `generate`; a conversation that does not fit the model's context."""
    prompts, found = [render_prompt(messages, tokenizer, template) for messages in prompts], []
    stops = stop_ids(tokenizer, template)
    for i in range(0, len(prompts), batch_size):
        rows = generate(model, prompts[i : i + batch_size], max_new_tokens=max_new_tokens, temperature=0.0,
                        stop_token_ids=stops, vocab_size=tokenizer.vocab_size)
        found += [tokenizer.decode([token for token in ids if token not in stops]) for ids in rows]
    return found


def exact_match(model: CausalLM, tokenizer, rows: list[dict], template: str, **how) -> dict:
    """{"exact_match": share of the tasks answered rightly, "families": {family: (right, total)}}. `how`: see `answers`.

    rows: as data.tasks.make_tasks gives them; all but the last message are shown to the model."""
    families = grade_by_family(rows, answers(model, tokenizer, [row["messages"][:-1] for row in rows], template, **how))
    return {"exact_match": sum(right for right, _ in families.values()) / len(rows), "families": families}


@torch.no_grad()
def preference_accuracy(model: CausalLM, tokenizer, preferences: Iterable[Preference], template: str, *,
                        batch_size: int = 16, seq_len: int | None = None, autocast=None) -> dict:
    """{"preference_accuracy": share of the pairs whose chosen answer has the higher mean log p of a token, "pairs": ...}.

    A pair of equal scores counts half; "ties", pairs of two equal texts, are left out and counted. What is longer than
    seq_len tokens (at least 2; default: the model's context) is cut, an answer at its end, a prompt at its beginning."""
    pairs, ties, seq_len = [], 0, seq_len or model.config.max_position_embeddings
    for row in preferences:
        sides = [render(row.prompt + side, tokenizer, template, train_from=len(row.prompt))
                 for side in (row.chosen, row.rejected)]
        ties += row.is_tie
        if not row.is_tie:
            pairs.append([truncate(ids, mask, seq_len) for ids, mask in sides])
    if not pairs:
        raise ValueError("there is no pair to compare: all are ties")
    pairs.sort(key=lambda sides: max(len(ids) for ids, _ in sides))  # rows of one length need no padding
    device, training, right = next(model.parameters()).device, model.training, 0.0
    model.eval()
    try:
        for i in range(0, len(pairs), batch_size):
            chosen, rejected = zip(*pairs[i : i + batch_size])
            input_ids, labels = padded([*chosen, *rejected])
            with autocast or contextlib.nullcontext():
                logits = model(input_ids.to(device))
            sums, lengths = sequence_logprobs(logits, labels.to(device))  # (2 B,)
            better, worse = (sums / lengths).view(2, -1)
            right += float((better > worse).sum() + 0.5 * (better == worse).sum())
    finally:
        model.train(training)
    return {"preference_accuracy": right / len(pairs), "pairs": len(pairs), "ties": ties}


def evaluate_text(args: Args, model: CausalLM, tokenizer, scratch: Path) -> dict:
    """The figures for --data; `scratch` is an empty folder for the shards of text that is not prepared."""
    prepared = len(args.data) == 1 and (Path(args.data[0]) / "index.json").is_file()
    if prepared:
        index, split = read_index(args.data[0]), args.split or "val"
        if tokens_of(load_tokenizer(args.data[0])) != tokens_of(tokenizer):
            raise ValueError(f"{args.data[0]}: was prepared with another tokenizer than that of {args.model}; "
                             "prepare it again with --tokenizer, or give the text itself")
    else:
        split = args.split or ("val" if args.data == ["stdlib"] else "all")
        documents = read_documents(args.data)
        if split != "all":
            documents = split_documents(args.data, args.val_fraction, split)
        index = write_shards(scratch, {split: documents}, tokenizer)
    splits = list(index["splits"]) if split == "all" else [split]
    if not set(splits) <= set(index["splits"]):
        raise ValueError(f"{args.data[0]}: has no split {split!r}; it has {', '.join(index['splits'])}")

    seq_len = args.seq_len or model.config.max_position_embeddings
    batches = (batch for name in splits for batch in eval_batches(index["directory"], name, seq_len, args.batch_size))
    total = evaluate_loss(model, ((ids, labels, cu if args.document_mask else None) for ids, labels, cu in batches),
                          autocast_of(args.dtype, model))
    num_bytes = sum(index["splits"][name]["bytes"] for name in splits)
    loss = total["nats"] / total["tokens"]
    if not loss < 700:  # e^700 is near the largest float64; NaN fails as well
        raise ValueError(f"the model's loss is {loss}: its weights are damaged, or --dtype {args.dtype} overflowed")
    result = {"data": args.data, "split": split, "seq_len": seq_len, "loss": loss, "perplexity": perplexity(**total),
              "bits_per_byte": bits_per_byte(total["nats"], num_bytes), "tokens": total["tokens"], "bytes": num_bytes}
    if args.baselines:
        texts = (text for name in splits for text in shard_texts(index, name, tokenizer))
        result |= {f"{name}_bits_per_byte": value for name, value in compressed_bits_per_byte(texts).items()}
    return result


def autocast_of(dtype: str, model: CausalLM):
    """The context manager for forward passes in a 16-bit dtype with float32 weights; None for the others."""
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)
    return torch.autocast(next(model.parameters()).device.type, half) if half else None


def evaluate_chat(args: Args, model: CausalLM, tokenizer) -> dict:
    """The figures for --tasks and --pairs, told as they come."""
    result = {"template": args.template}
    if args.tasks:
        rows = [row for _, row in read_tasks(args.tasks)]
        with autocast_of(args.dtype, model) or contextlib.nullcontext():
            result |= exact_match(model, tokenizer, rows, args.template, batch_size=args.batch_size,
                                  max_new_tokens=args.max_new_tokens)
        families = ", ".join(f"{family} {right / total:.0%}" for family, (right, total) in result["families"].items())
        print(f"exact match {result['exact_match']:.1%} of {len(rows)} tasks: {families}", file=sys.stderr)
    if args.pairs:
        result |= preference_accuracy(model, tokenizer, read_preferences(args.pairs), args.template,
                                      batch_size=args.batch_size, seq_len=args.seq_len,
                                      autocast=autocast_of(args.dtype, model))
        print("preference accuracy {preference_accuracy:.1%} of {pairs} pairs, {ties} ties left out".format(**result),
              file=sys.stderr)
    return result


def main() -> None:
    args = parse(Args, __doc__)
    if not (args.data or args.tasks or args.pairs):
        args.data = ["stdlib"]
    if args.template not in ("", *TEMPLATES):
        raise ValueError(f"--template {args.template}: choose from {', '.join(TEMPLATES)}")
    if args.pairs and args.seq_len == 1:
        raise ValueError("--seq_len 1: leaves nothing of a pair to predict; it must be at least 2")
    for name in ("seq_len", "batch_size", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}; it must be at least 1")
    if args.out and Path(args.out).is_dir():
        raise ValueError(f"--out {args.out}: is a folder; name a file")
    device, folder = detect_device(args.device), find_checkpoint(args.model)
    tokenizer = load_tokenizer(folder)
    dtype = torch.float64 if args.dtype == "float64" else torch.float32
    model = load_model(folder, dtype=dtype, device=device, attention=args.attention)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{folder}: tokenizer of {tokenizer.vocab_size} tokens, model of {model.config.vocab_size}")
    print(f"{folder} · {device} · {args.dtype} · attention {args.attention}", file=sys.stderr)
    result = {"model": str(args.model)}
    if args.data:
        with tempfile.TemporaryDirectory() as scratch:
            result |= evaluate_text(args, model, tokenizer, Path(scratch) / "shards")
        beside = "gzip {gzip_bits_per_byte:.4f}, xz {xz_bits_per_byte:.4f}, " if args.baselines else ""
        print(("loss {loss:.4f} nats per token, perplexity {perplexity:.3f}, {bits_per_byte:.4f} bits per byte, "
               + beside + "{tokens:,} tokens, {bytes:,} bytes").format(**result), file=sys.stderr)
    if args.tasks or args.pairs:
        args.template = args.template or template_of(tokenizer) or "chatml"
        if added := prepare_tokenizer(tokenizer, args.template):
            print(f"the tokenizer lacks {' '.join(added)}, which the template needs: added", file=sys.stderr)
        model = load_chat_model(folder, tokenizer, args.template, dtype=dtype, device=device, attention=args.attention)
        result |= evaluate_chat(args, model, tokenizer)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.out), result)
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
