"""How well a model predicts text: loss, perplexity, and bits per byte beside gzip's and xz's.

    loss          = sum of -ln p(token | the tokens before it) / number of tokens, in nats
    perplexity    = exp(loss)
    bits per byte = sum of -log2 p / number of UTF-8 bytes of the text

    python evaluate.py --model out/pretrain --data out/pretrain/data --baselines
    python evaluate.py --model some/hf_folder --data book.txt more.jsonl --seq_len 1024 --out book.json

Loss and perplexity depend on how a tokenizer cuts the text: one with longer tokens has fewer, harder ones to predict.
Bits per byte does not, so models with different vocabularies compare; and so do compressors, because a model that
gives a text probability p can, with an arithmetic coder, store it in -log2 p bits. Each token of the text counts once,
and so does the separator after each document, which the model must predict too; it adds nats but no bytes.

The text is cut into windows of --seq_len tokens, one after the other, so a token sees between 0 and seq_len - 1 tokens
before it: longer windows give better figures. That is why seq_len stands in the result.
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

from checkpoint import find_checkpoint, load_model, write_json
from cli import parse, run
from data.corpus import read_documents, split_documents
from data.loader import eval_batches
from data.pack import read_index, write_shards
from data.prepare import tokens_of
from data.tokenizer import load_tokenizer
from metrics import detect_device
from model import CausalLM


@dataclass
class Args:
    model: str  # folder of a run (its latest checkpoint), of a checkpoint, or of a Hugging Face model
    data: list[str] = field(default_factory=lambda: ["stdlib"])  # one prepared folder; or text, JSONL, folders, stdlib
    split: Literal["val", "train", "all"] | None = None  # None = val of a prepared folder and of stdlib, all of others
    val_fraction: float = 0.1  # the share that was held out, where the text is not prepared
    seq_len: int | None = None  # window in tokens; None = the model's context
    batch_size: int = 16  # windows per forward pass
    document_mask: bool = True  # tokens see their own document only
    baselines: bool = False  # compress the same text by gzip -9 and xz -9
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


def evaluate(args: Args, model: CausalLM, tokenizer, scratch: Path) -> dict:
    """The result for --data; `scratch` is an empty folder for the shards of text that is not prepared."""
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
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(args.dtype)
    device = next(model.parameters()).device
    batches = (batch for name in splits for batch in eval_batches(index["directory"], name, seq_len, args.batch_size))
    total = evaluate_loss(model, ((ids, labels, cu if args.document_mask else None) for ids, labels, cu in batches),
                          torch.autocast(device.type, half) if half else None)
    num_bytes = sum(index["splits"][name]["bytes"] for name in splits)
    loss = total["nats"] / total["tokens"]
    if not loss < 700:  # e^700 is near the largest float64; NaN fails as well
        raise ValueError(f"the model's loss is {loss}: its weights are damaged, or --dtype {args.dtype} overflowed")
    result = {"model": str(args.model), "data": args.data, "split": split, "seq_len": seq_len, "loss": loss,
              "perplexity": perplexity(**total), "bits_per_byte": bits_per_byte(total["nats"], num_bytes),
              "tokens": total["tokens"], "bytes": num_bytes}
    if args.baselines:
        texts = (text for name in splits for text in shard_texts(index, name, tokenizer))
        result |= {f"{name}_bits_per_byte": value for name, value in compressed_bits_per_byte(texts).items()}
    return result


def main() -> None:
    args = parse(Args, __doc__)
    for name in ("seq_len", "batch_size"):
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
    with tempfile.TemporaryDirectory() as scratch:
        result = evaluate(args, model, tokenizer, Path(scratch) / "shards")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.out), result)
    beside = "gzip {gzip_bits_per_byte:.4f}, xz {xz_bits_per_byte:.4f}, " if args.baselines else ""
    print(("loss {loss:.4f} nats per token, perplexity {perplexity:.3f}, {bits_per_byte:.4f} bits per byte, " + beside
           + "{tokens:,} tokens, {bytes:,} bytes").format(**result), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
