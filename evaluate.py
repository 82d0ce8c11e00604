"""How good a model is: bits per byte on text beside gzip's and xz's, published benchmarks, tasks, preferences.

    loss          = sum of -ln p(token | the tokens before it) / number of tokens, in nats
    perplexity    = exp(loss)
    bits per byte = sum of -log2 p / number of UTF-8 bytes of the text
    exact match   = share of the tasks whose greedy answer is the right one
    preference accuracy = share of the pairs where the chosen answer has the higher mean log p of a token
    benchmarks    = see data/benchmarks.py for what is asked, data/scores.py for what an answer is worth

    python evaluate.py --model out/pretrain --data out/pretrain/data --baselines
    python evaluate.py --model some/hf_folder --data book.txt more.jsonl --seq_len 1024 --out book.json
    python evaluate.py --model out/sft --tasks out/tasks/sft_val.jsonl --pairs out/tasks/pairs_val.jsonl
    python evaluate.py --model some/hf_folder --benchmarks hellaswag=hellaswag_val.jsonl mmlu=mmlu/ --out scores.json
    python evaluate.py --model model.gguf --benchmarks humaneval=HumanEval.jsonl.gz --num_samples 20 --temperature 0.8
    python evaluate.py --model some/hf_folder --needle_lengths 512 1024 2048 --needles 3 --out needle.json

Loss and perplexity depend on how a tokenizer cuts the text: one with longer tokens has fewer, harder ones to predict.
Bits per byte does not, so models with different vocabularies compare; and so do compressors, because a model that
gives a text probability p can, with an arithmetic coder, store it in -log2 p bits. Each token of the text counts once,
and so does the separator after each document, which the model must predict too; it adds nats but no bytes.

The text is cut into windows of --seq_len tokens, one after the other, so a token sees between 0 and seq_len - 1 tokens
before it: longer windows give better figures. That is why seq_len stands in the result.

Preference accuracy asks the model alone, without the reference model of DPO: it can be compared between any two models,
a base model too. The mean, not the sum, so that it does not ask which answer is shorter.

Benchmarks are scored as by lm-evaluation-harness: equal log-likelihoods, whatever the batch size. With --out the record
of each question is appended to OUT.partial.jsonl as soon as it is answered, and the same command goes on from there.
"""

import contextlib
import hashlib
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import atomic_file, find_checkpoint, fit_to_chat, write_json
from cli import parse, run
from convert import load_pretrained, load_pretrained_tokenizer
from data.benchmarks import BENCHMARKS, Item, read_benchmark
from data.chat import (OWN, TEMPLATES, Preference, prepare_tokenizer, read_preferences, render, render_prompt, stop_ids,
                       template_of, truncate)
from data.contamination import contaminated
from data.corpus import read_documents, split_documents
from data.likelihood import Pair, encode_pair, fit, likelihoods, rolling_windows
from data.loader import eval_batches
from data.needle import haystack_cells, report_page, share_found
from data.pack import read_index, write_shards
from data.prepare import tokens_of
from data.scores import (bits_per_byte, compressed_bits_per_byte, likelihood_record, perplexity, summarize,
                         swapped_positions, text_record)
from data.tasks import grade_by_family, read_tasks
from data.tokenizer import load_tokenizer
from generate import TextStream, generate, row_generator
from logprobs import padded, sequence_logprobs
from metrics import STYLE, append_row, clock, detect_device, drop_rows_after, read_rows
from model import CausalLM, KVCache
from sandbox import check_solution, run_batch


@dataclass
class Args:
    model: str  # folder of a run (its latest checkpoint), a checkpoint or a Hugging Face model; a .gguf or .bin file
    data: list[str] = field(default_factory=list)  # one prepared folder; or text, JSONL, folders, stdlib (if all is empty)
    tasks: list[str] = field(default_factory=list)  # tasks to answer, as data/tasks.py writes them
    pairs: list[str] = field(default_factory=list)  # preference pairs, in any form that data/chat.py reads
    benchmarks: list[str] = field(default_factory=list)  # NAME=FILE or NAME=FOLDER; data/benchmarks.py lists them
    judge: list[str] = field(default_factory=list)  # pairs: the model is asked which answer is better, both ways round
    needle_lengths: list[int] = field(default_factory=list)  # needle in a haystack: lengths of the prompt in tokens
    split: Literal["val", "train", "all"] | None = None  # None = val of a prepared folder and of stdlib, all of others
    val_fraction: float = 0.1  # the share that was held out, where the text is not prepared
    seq_len: int | None = None  # window in tokens; None = the model's context
    rope_scaling: Literal["", "linear", "dynamic", "yarn"] = ""  # how RoPE takes a --seq_len beyond the model's
    batch_size: int = 16  # windows, tasks or pairs per forward pass
    document_mask: bool = True  # tokens see their own document only
    baselines: bool = False  # compress the same text by gzip -9 and xz -9
    template: str = ""  # of tasks and pairs: chatml llama2 llama3 mistral vicuna alpaca; empty: the model's, else chatml
    max_new_tokens: int | None = None  # longest answer; None: 96 to a task, 256 to a benchmark, 1024 to HumanEval
    num_fewshot: int | None = None  # examples before each question; None: as many as lm-evaluation-harness shows
    fewshot: list[str] = field(default_factory=list)  # NAME=FILE that they come from, if not the benchmark's folder
    limit: int | None = None  # the first so many questions only (MMLU, C-Eval: of each subject)
    num_samples: int = 1  # answers to each question that is answered in text: for pass@k and the majority vote
    temperature: float = 0.0  # of these answers; several need more than 0
    seed: int = 0  # of these answers, and of the needles
    add_bos_token: bool | None = None  # before the prompts of benchmarks; None: if the tokenizer's own files say so
    contamination: str | None = None  # a prepared folder: which questions stand in its documents?
    needle_depths: list[float] = field(default_factory=lambda: [0.0, 25.0, 50.0, 75.0, 100.0])  # per cent of the text
    needles: int = 1  # in each haystack
    haystack: list[str] = field(default_factory=lambda: ["stdlib"])  # text to hide them in
    out: str | None = None  # file for the result, as JSON; a page with tables and the needles' heat map lies beside it
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
                                  max_new_tokens=args.max_new_tokens or 96)
        families = ", ".join(f"{family} {right / total:.0%}" for family, (right, total) in result["families"].items())
        tell(f"exact match {result['exact_match']:.1%} of {len(rows)} tasks: {families}")
    if args.pairs:
        result |= preference_accuracy(model, tokenizer, read_preferences(args.pairs), args.template,
                                      batch_size=args.batch_size, seq_len=args.seq_len,
                                      autocast=autocast_of(args.dtype, model))
        tell("preference accuracy {preference_accuracy:.1%} of {pairs} pairs, {ties} ties left out".format(**result))
    return result


# Benchmarks -----------------------------------------------------------------------------------------------------------

def scored(args: Args, model: CausalLM, pairs: list[Pair]) -> Iterator[tuple[int, tuple[float, bool]]]:
    """data.likelihood.likelihoods of pairs that are made to fit the model's context, under args."""
    weight, size = next(model.parameters()), args.seq_len or model.config.max_position_embeddings
    fitted = [fit(*pair, size) for pair in pairs]
    if cut := sum(len(a[0]) < len(b[0]) for a, b in zip(fitted, pairs)):
        tell(f"note: {cut} of {len(pairs)} contexts are too long for {size} tokens: cut at their beginning")
    return likelihoods(model, fitted, batch_size=args.batch_size, autocast=autocast_of(args.dtype, model),
                       new_cache=lambda rows, tokens: KVCache(model.config, rows, tokens, weight.dtype, weight.device))


def likelihood_records(args: Args, model: CausalLM, tokenizer, kind: str, todo: dict[int, Item]) -> Iterator:
    """(place, record) of each question that is scored by likelihood, as they come."""
    size = args.seq_len or model.config.max_position_embeddings
    begin, prefix, pairs, owners = first_token(tokenizer), prefix_ids(args, tokenizer), [], []
    for place, item in todo.items():
        try:
            asked = []
            if kind == "text":
                asked = rolling_windows(tokenizer.encode(item.choices[0]), begin, size)
            for context in item.contexts if kind != "text" else ():  # one for all choices; partial: one for each
                asked += [encode_pair(tokenizer, context, f" {option}", begin, prefix) for option in item.choices]
            fit([], max((rest for _, rest in asked), key=len), size)
        except ValueError as error:
            raise ValueError(f"{item.where}: {error}") from None
        pairs += asked
        owners += [place] * len(asked)
    waiting, found = Counter(owners), {place: {} for place in todo}
    for i, result in scored(args, model, pairs):
        place = owners[i]
        found[place][i] = result
        waiting[place] -= 1
        if not waiting[place]:
            results = found.pop(place)
            yield place, likelihood_record(kind, todo[place], [results[j] for j in sorted(results)])


def text_records(args: Args, model: CausalLM, tokenizer, name: str, todo: dict[int, Item]) -> Iterator:
    """(place, record) of each question that is answered in text, as they come."""
    benchmark, size = BENCHMARKS[name], args.seq_len or model.config.max_position_embeddings
    new = min(args.max_new_tokens or benchmark.max_new_tokens, size // 2)
    prefix = prefix_ids(args, tokenizer)
    prompts = {place: [*prefix, *tokenizer.encode(item.contexts[0])] for place, item in todo.items()}
    if cut := sum(len(ids) > size - new for ids in prompts.values()):
        tell(f"note: {cut} of {len(prompts)} prompts leave no room for {new} tokens of {size}: cut at their beginning")
    order, step = sorted(todo, key=lambda place: len(prompts[place])), max(1, args.batch_size // args.num_samples)
    for places in (order[i : i + step] for i in range(0, len(order), step)):
        rows = [(place, sample) for place in places for sample in range(args.num_samples)]
        random = [row_generator(args.seed, place * args.num_samples + k, next(model.parameters()).device)
                  for place, k in rows]  # of the question, not of its place in the batch
        with autocast_of(args.dtype, model) or contextlib.nullcontext():
            texts = complete(model, tokenizer, [prompts[place][new - size :] for place, _ in rows], stop=benchmark.stop,
                             max_new_tokens=new, temperature=args.temperature, generators=random)
        for place in places:
            item, answers = todo[place], [text for (owner, _), text in zip(rows, texts) if owner == place]
            yield place, (code_record(item, answers) if benchmark.kind == "code" else
                          text_record(benchmark.kind, item.target, answers))


def code_record(item: Item, texts: list[str]) -> dict:
    """The record of one programming question: its programs, and what became of each in the sandbox."""
    check = {key: value for key, value in item.check.items() if key != "before"}
    runs = run_batch(check_solution, [{"program": item.check["before"] + text, **check} for text in texts])
    return {"answers": texts, "passed": [run.passed for run in runs], "status": [run.status for run in runs]}


def complete(model: CausalLM, tokenizer, prompts: list[list[int]], *, stop: Iterable[str] = (), **how) -> list[str]:
    """What the model goes on with, up to a string of `stop` or its end-of-text token. `how`: see generate."""
    eos = model.config.eos_token_id
    ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    streams, texts, last = [TextStream(list(stop)) for _ in prompts], [""] * len(prompts), [ids[-1:] for ids in prompts]

    def on_token(row: int, token: int) -> bool:
        before = tokenizer.decode_bytes(last[row])  # decoded alone, a sentencepiece word would lose its blank
        data = b"" if token in ends else tokenizer.decode_bytes(last[row] + [token])[len(before):]
        last[row] = [token]
        texts[row] += streams[row].push(data)
        return streams[row].stopped

    generate(model, prompts, stop_token_ids=ends, vocab_size=tokenizer.vocab_size, on_token=on_token, **how)
    return [text + stream.push(b"", final=True) for text, stream in zip(texts, streams)]


def first_token(tokenizer) -> int:
    """What stands before a text: BOS, else EOS, which is what our token shards have there."""
    return next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)


def prefix_ids(args: Args, tokenizer) -> list[int]:
    return tokenizer.prefix_ids if args.add_bos_token is None else [first_token(tokenizer)] * args.add_bos_token


def evaluate_benchmarks(args: Args, model: CausalLM, tokenizer, partial: Path | None) -> tuple[dict, dict]:
    """({benchmark: figures}, {benchmark: records}) for --benchmarks; the records are kept in `partial` on the way."""
    benchmarks = {name: read_benchmark(name, path, shots=args.num_fewshot, limit=args.limit,
                                       shots_path=sources(args.fewshot).get(name))
                  for name, path in sources(args.benchmarks).items()}
    done = {name: {} for name in benchmarks}
    if partial:
        settings = {name: digest(repr(items).encode()) for name, items in benchmarks.items()}
        settings |= {"model": fingerprint(args.model)} | {name: getattr(args, name) for name in (
            "seq_len", "rope_scaling", "dtype", "max_new_tokens", "num_samples", "temperature", "seed", "add_bos_token")}
        for row in resume(partial, settings):
            done[row["benchmark"]][row["question"]] = row
    figures, records = {}, {}
    for name, items in benchmarks.items():
        kind, groups = BENCHMARKS[name].kind, dict.fromkeys(item.group for item in items)
        todo = {i: item for i, item in enumerate(items) if i not in done[name]}
        answered = (text_records(args, model, tokenizer, name, todo) if kind in ("gsm8k", "math", "code") else
                    likelihood_records(args, model, tokenizer, kind, todo))
        for place, record in progress(answered, name, len(todo)):
            done[name][place] = {"benchmark": name, "question": place, "where": items[place].where,
                                 "group": items[place].group} | record
            if partial:
                append_row(partial, done[name][place])
        records[name] = [done[name][i] for i in range(len(items))]
        figures[name] = summarize(kind, records[name])
        if 1 < len(groups) < len(items):
            figures[name]["groups"] = {group: summarize(kind, [r for r in records[name] if r["group"] == group])
                                       for group in groups}
        tell(f"{name}: " + ", ".join(f"{key} {x:.4f}" for key, x in figures[name].items() if isinstance(x, float)))
    if args.contamination:
        mark_contaminated(args, benchmarks, figures, records)
    return figures, records


def progress(answered: Iterable, name: str, total: int) -> Iterator:
    """Give on what comes, and tell how far it is: in place on a terminal, else every half minute."""
    live, start, told = sys.stderr.isatty(), time.monotonic(), time.monotonic()
    for count, answer in enumerate(answered, start=1):
        yield answer
        now = time.monotonic()
        if now - told > (0.5 if live else 30) or live and count == total:
            told, left = now, clock((now - start) / count * (total - count))
            line = f"{name} {count}/{total}, {count / (now - start):.1f} per second, {left} left"
            end = "" if live and count < total else "\n"
            print(f"\r{line}   " if live else line, end=end, file=sys.stderr, flush=True)


def mark_contaminated(args: Args, benchmarks: dict, figures: dict, records: dict) -> None:
    """Add to each record whether its question stands in the documents of --contamination, and figures without those."""
    index, tokenizer = read_index(args.contamination), load_tokenizer(args.contamination)
    asked = [(name, i, item) for name, items in benchmarks.items() for i, item in enumerate(items)]
    documents = (text for split in index["splits"] for text in shard_texts(index, split, tokenizer))
    for (name, i, _), flag in zip(asked, contaminated([item.text for _, _, item in asked], documents)):
        records[name][i]["contaminated"] = flag
    for name in benchmarks:
        flags = [record["contaminated"] for record in records[name]]
        clean = [record for record in records[name] if record["contaminated"] is False]
        figures[name]["contaminated"], figures[name]["too_short_to_tell"] = flags.count(True), flags.count(None)
        figures[name]["clean"] = summarize(BENCHMARKS[name].kind, clean) if clean else None
        tell(f"{name}: {flags.count(True)} of {len(flags)} questions stand in {args.contamination}")


# A file of records: the first line tells the settings, each further one is the record of a question

def resume(path: Path, settings: dict) -> list[dict]:
    """The records that an interrupted run with these settings left; else begin the file. ValueError: other settings."""
    drop_rows_after(path, math.inf)  # mends a line that a kill tore
    rows = read_rows(path) if path.exists() else []
    if not rows:
        append_row(path, {"settings": settings})
        return []
    before = rows[0].get("settings", {})
    if changed := [name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name)]:
        raise ValueError(f"{path}: was begun with other {', '.join(sorted(changed))}: delete it, or change --out")
    tell(f"going on after {len(rows) - 1} questions that are answered in {path}")
    return rows[1:]


def fingerprint(model: str) -> str:
    """Changes when the model's files do: a hash of their names, sizes, first and last MiB."""
    path, parts = Path(model), []
    for file in sorted(find_checkpoint(path).iterdir()) if path.is_dir() else [path]:
        if file.suffix in (".json", ".model", ".safetensors", ".gguf", ".bin") and file.stat().st_size:
            data = np.memmap(file, np.uint8, mode="r")
            parts.append(f"{file.name} {len(data)} {digest(bytes(data[: 1 << 20]) + bytes(data[-(1 << 20) :]))}")
    return digest("\n".join(parts).encode())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# Needle in a haystack, judge ------------------------------------------------------------------------------------------

def evaluate_needles(args: Args, model: CausalLM, tokenizer) -> list[dict]:
    """One row for each length and depth: the share of the needles that the model finds, and what it answered."""
    filler, new = [], min(args.max_new_tokens or 16, model.config.max_position_embeddings // 2)
    for document in read_documents(args.haystack):
        filler += tokenizer.encode(document.text + "\n" * document.final)
        if len(filler) > max(args.needle_lengths):
            break
    cells = haystack_cells(args.needle_lengths, args.needle_depths, filler, tokenizer.encode, needles=args.needles,
                           seed=args.seed, ends=lambda token: tokenizer.decode([token]).rstrip(" ")[-1:] in ".\n")
    rows = []
    for cell in cells:
        prompts = [[*prefix_ids(args, tokenizer), *ids] for ids in cell.prompts]
        with autocast_of(args.dtype, model) or contextlib.nullcontext():
            texts = complete(model, tokenizer, prompts, max_new_tokens=new, temperature=0.0)
        rows.append({"length": cell.length, "depth": cell.depth, "found": share_found(cell.answers, texts),
                     "numbers": cell.answers, "answers": texts})
        tell("needle at {depth:g} % of {length} tokens: {found:.0%} found".format(**rows[-1]))
    return rows


JUDGE = """\
Which answer to the question is better, A or B?

Question: {question}

Answer A: {first}

Answer B: {second}

The better answer is"""


def evaluate_judge(args: Args, ask: Callable[[list[str]], list[float]]) -> dict:
    """How often the judge takes `chosen` for the better answer, shown first and shown second.

    ask(prompts) -> for each 1.0 if the judge says A, 0.0 if B, 0.5 if neither (see judge_by_likelihood)."""
    words = lambda messages: "\n\n".join(message["content"] for message in messages)  # noqa: E731
    prompts = []
    for pair in read_preferences(args.judge):
        sides = words(pair.chosen), words(pair.rejected)
        prompts += [JUDGE.format(question=words(pair.prompt), first=first, second=second)
                    for first, second in (sides, sides[::-1])]
    verdicts = ask(prompts)
    return swapped_positions(list(zip(verdicts[::2], verdicts[1::2])))


def judge_by_likelihood(args: Args, model: CausalLM, tokenizer, prompts: list[str]) -> list[float]:
    """1.0 where " A" is likelier than " B", 0.0 where it is less likely, 0.5 where they are equally likely."""
    begin, prefix = first_token(tokenizer), prefix_ids(args, tokenizer)
    found = dict(scored(args, model, [encode_pair(tokenizer, prompt, f" {letter}", begin, prefix)
                                      for prompt in prompts for letter in "AB"]))
    logprobs = [found[i][0] for i in range(len(found))]
    return [0.5 if a == b else float(a > b) for a, b in zip(logprobs[::2], logprobs[1::2])]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def sources(words: list[str]) -> dict[str, str]:
    """["hellaswag=file", ...] -> {"hellaswag": "file", ...}; ValueError: another form, a name twice or unknown."""
    found = {}
    for word in words:
        name, equals, path = word.partition("=")
        if name not in BENCHMARKS:
            raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
        if not path or name in found:
            raise ValueError(f"{word}: give NAME=FILE or NAME=FOLDER, and each name once")
        found[name] = path
    return found


def check(args: Args) -> None:
    """ValueError for settings that cannot work, before anything is read."""
    if args.template not in ("", OWN, *TEMPLATES):
        raise ValueError(f"--template {args.template}: choose from {', '.join(TEMPLATES)}")
    if args.pairs and args.seq_len == 1:
        raise ValueError("--seq_len 1: leaves nothing of a pair to predict; it must be at least 2")
    for name in ("seq_len", "batch_size", "max_new_tokens", "limit", "num_samples", "needles"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}; it must be at least 1")
    if args.num_fewshot is not None and args.num_fewshot < 0 or args.temperature < 0:
        raise ValueError("num_fewshot and temperature must be at least 0")
    if args.num_samples > 1 and args.temperature == 0:
        raise ValueError(f"--num_samples {args.num_samples} at temperature 0 would be one answer several times; set "
                         "--temperature, such as 0.8")
    if unused := sources(args.fewshot).keys() - sources(args.benchmarks).keys():
        raise ValueError(f"--fewshot {unused.pop()}: is not among --benchmarks")
    if args.contamination and not args.benchmarks:
        raise ValueError("--contamination looks for the questions of --benchmarks; give some")
    if args.out and Path(args.out).is_dir():
        raise ValueError(f"--out {args.out}: is a folder; name a file")


def main() -> None:
    args = parse(Args, __doc__)
    check(args)
    if not (args.data or args.tasks or args.pairs or args.benchmarks or args.judge or args.needle_lengths):
        args.data = ["stdlib"]
    device, path = detect_device(args.device), Path(args.model)
    folder = path if path.is_file() else find_checkpoint(path)
    tokenizer = load_pretrained_tokenizer(path) if path.is_file() else load_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{path}: no tokenizer comes with this file; convert.py --tokenizer can add one")
    model = load_pretrained(folder, dtype=torch.float64 if args.dtype == "float64" else torch.float32, device=device,
                            attention=args.attention, seq_len=args.seq_len or 1, rope_scaling=args.rope_scaling)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{folder}: tokenizer of {tokenizer.vocab_size} tokens, model of {model.config.vocab_size}")
    context = model.config.max_position_embeddings
    if args.needle_lengths and max(args.needle_lengths) + len(prefix_ids(args, tokenizer)) >= context:
        raise ValueError(f"--needle_lengths {max(args.needle_lengths)}: the model's context is {context} tokens, in "
                         "which the answer must fit, too")
    tell(f"{folder} · {device} · {args.dtype} · attention {args.attention}")
    result = {"model": args.model}
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if args.data:
        with tempfile.TemporaryDirectory() as scratch:
            result |= evaluate_text(args, model, tokenizer, Path(scratch) / "shards")
        beside = "gzip {gzip_bits_per_byte:.4f}, xz {xz_bits_per_byte:.4f}, " if args.baselines else ""
        tell(("loss {loss:.4f} nats per token, perplexity {perplexity:.3f}, {bits_per_byte:.4f} bits per byte, "
              + beside + "{tokens:,} tokens, {bytes:,} bytes").format(**result))
    records, partial = {}, args.out and Path(args.out + ".partial.jsonl")
    if args.benchmarks:
        result["benchmarks"], records = evaluate_benchmarks(args, model, tokenizer, partial)
    if args.judge:
        result["judge"] = evaluate_judge(args, lambda prompts: judge_by_likelihood(args, model, tokenizer, prompts))
        tell("judge: `chosen` wins {win_rate:.1%} of {pairs} pairs, {consistent:.0%} both ways round".format(
            **result["judge"]))
    if args.needle_lengths:
        result["needles"] = evaluate_needles(args, model, tokenizer)
    if args.tasks or args.pairs:
        args.template = args.template or template_of(tokenizer) or "chatml"
        if added := prepare_tokenizer(tokenizer, args.template):
            tell(f"the tokenizer lacks {' '.join(added)}, which the template needs: added")
        fit_to_chat(model, tokenizer, args.template)
        result |= evaluate_chat(args, model, tokenizer)
    if args.out:
        write_json(Path(args.out), result | ({"records": records} if records else {}))
        if args.benchmarks or args.needle_lengths or args.judge:
            with atomic_file(Path(args.out).with_suffix(".html")) as file:
                file.write(report_page(f"{Path(args.out).stem}: {args.model}", result, STYLE).encode())
        if partial.exists():
            partial.unlink()
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
