r"""Text from a model: the next-token distribution is reshaped, one token is drawn, and fed back.

    p = softmax(penalised logits / temperature), cut to the top k, then to the nucleus p, then to min-p, renormalised

    python generate.py --model out/pretrain --prompt "def main(" --max_new_tokens 200 --temperature 0.8 --top_p 0.95
    python generate.py --model some/hf_folder --prompt "Once upon a time" "The end" --num_samples 2 --stop $'\n\n'
    python generate.py --model out/sft --chat --system "Be brief." --max_new_tokens 500

Order of the file: one step, logits to token; the loop over tokens with a KV cache; text in and out; chat; the command.
Each row of a batch has its own random numbers, seeded by (seed, row), so what else is in the batch does not matter.
"""

import codecs
import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import atomic_file, find_checkpoint, open_model
from cli import parse, run
from data.chat import render_prompt, stop_ids, template_of
from data.tokenizer import load_tokenizer
from metrics import detect_device
from model import CausalLM, KVCache
from quant import quantize_cache


@dataclass
class Args:
    model: str  # folder of a run (its latest checkpoint), of a checkpoint, or of a Hugging Face model
    prompt: list[str] = field(default_factory=list)  # texts to go on from (none: begin a document); with --chat: turns
    chat: bool = False  # talk: each line you type, or pipe in, is a turn that the model answers; /help there
    system: str = ""  # system message of the chat
    template: str = ""  # of the chat: chatml llama2 llama3 mistral vicuna alpaca; empty: the one the tokenizer tells
    num_samples: int = 1  # continuations of each prompt
    max_new_tokens: int = 200  # longest continuation, in tokens
    seq_len: int = 1  # positions to make room for; beyond what the model knows with --rope_scaling
    rope_scaling: Literal["", "linear", "dynamic", "yarn"] = ""  # how RoPE takes a --seq_len beyond the model's
    temperature: float = 1.0  # below 1 sharpens the distribution; 0 takes the likeliest token
    top_k: int = 0  # keep the k likeliest tokens; 0 = all
    top_p: float = 1.0  # keep the fewest tokens that together have this probability; 1 = all
    min_p: float = 0.0  # keep tokens with at least this share of the likeliest one's probability; 0 = all
    repetition_penalty: float = 1.0  # above 1 makes tokens that occurred less likely; 1 = off
    stop: list[str] = field(default_factory=list)  # a continuation ends before any of these strings
    seed: int = 0  # of the random numbers
    stream: bool = True  # print the text while it grows (of a single continuation)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None  # of weights and cache; None = as stored
    kv_cache: Literal["", "int8", "int4"] = ""  # round the keys and values of a text's tokens; empty: as --dtype
    attention: Literal["eager", "sdpa"] = "sdpa"  # eager is the readable one


# One step: logits (B, V) -> probabilities (B, V) -> tokens (B,)

def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL's penalty (Keskar et al. 2019, section 4.1): logits of tokens in `seen` (B, V) bool become less likely.

    They are divided by `penalty` where positive and multiplied where negative: dividing alone would favour the latter.
    """
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def next_token_probs(logits: Tensor, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> Tensor:
    """The distribution that is sampled from: logits (..., V) -> probabilities (..., V), float32 or float64, sum 1.

    In this order: temperature (0: all on the argmax); top-k (exactly k tokens; among equals the lower id); top-p, the
    smallest set of the likeliest whose probability, after top-k, reaches p, so the token that crosses p is kept
    (Holtzman et al. 2020); min-p, what has at least min_p times the largest probability (Nguyen et al. 2024).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = logits - logits.max(-1, keepdim=True).values  # first, or a tiny temperature gives inf - inf
    probs = (logits / temperature).softmax(-1)
    if top_k == 0 and top_p == 1 and min_p == 0:
        return probs
    probs, order = probs.sort(dim=-1, descending=True, stable=True)  # likeliest first
    if top_k:
        probs[..., top_k:] = 0
        probs = probs / probs.sum(-1, keepdim=True)
    before = F.pad(probs.cumsum(-1)[..., :-1], (1, 0))  # probability of all likelier tokens
    keep = (before < top_p) | (top_p == 1)  # for at 1 nothing is cut, though `before` may round up to 1
    probs = probs * (keep & (probs >= min_p * probs[..., :1]))
    return torch.zeros_like(probs).scatter(-1, order, probs / probs.sum(-1, keepdim=True))


def sample_token(logits: Tensor, *, generators: list[torch.Generator], temperature=1.0, **shape) -> Tensor:
    """Draw each row's next token: logits (B, V) -> (B,) int64; row i uses generators[i]. `shape`: next_token_probs."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = next_token_probs(logits, temperature=temperature, **shape)
    return torch.cat([torch.multinomial(p, 1, generator=generator) for p, generator in zip(probs, generators)])


def row_generator(seed: int, row: int, device="cpu") -> torch.Generator:
    """The random numbers of row `row` of a batch; like model.initialize, a hash keeps (1, 0) apart from (0, 1)."""
    digest = hashlib.sha256(f"{seed}/{row}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def check_sampling(max_new_tokens=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0) -> None:
    """ValueError, one line, for a value out of its range."""
    for good, rule in ((max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}; it must be at least 1"),
                       (temperature >= 0, f"temperature is {temperature}; it must be at least 0"),
                       (top_k >= 0, f"top_k is {top_k}; it must be at least 0"),
                       (0 < top_p <= 1, f"top_p is {top_p}; it must be above 0 and at most 1"),
                       (0 <= min_p <= 1, f"min_p is {min_p}; it must be from 0 to 1"),
                       (repetition_penalty > 0, f"repetition_penalty is {repetition_penalty}; it must be above 0")):
        if not good:
            raise ValueError(rule)


# The loop over tokens

@torch.inference_mode()
def generate(model: CausalLM, prompts: list[list[int]], *, max_new_tokens: int, temperature=1.0, top_k=0, top_p=1.0,
             min_p=0.0, repetition_penalty=1.0, stop_token_ids=(), vocab_size: int | None = None, seed: int = 0,
             generators: list[torch.Generator] | None = None, kv_cache: str = "",
             on_token: Callable[[int, int], bool] | None = None) -> list[list[int]]:
    """Continue token sequences, as one batch; returns the new tokens of each row.

    A row ends with a token of `stop_token_ids` (which is its last), after `max_new_tokens`, when prompt and new tokens
    fill model.config.max_position_embeddings, or when on_token(row, token), called for every new token, returns True.
    vocab_size: ids at or above it are never drawn (a model's table is often padded beyond its tokenizer).
    generators: one per row, on the model's device; default row_generator(seed, row). The penalty counts the prompt too.
    kv_cache: "int8" or "int4" rounds keys and values once the prompts, still exact to each other, have been read.
    ValueError: a prompt that is empty or as long as the context, an id out of range, logits that are not finite.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
    if kv_cache not in ("", "int8", "int4"):
        raise ValueError(f"kv_cache is {kv_cache!r}; it must be int8, int4 or empty")
    context, dtype = model.config.max_position_embeddings, next(model.parameters()).dtype
    device, vocab_size = next(model.parameters()).device, vocab_size or model.config.vocab_size
    for row, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < context:
            raise ValueError(f"prompt {row + 1} has {len(prompt)} tokens; 1 to {context - 1} fit the model's context")
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise ValueError(f"prompt {row + 1} has an id that is outside the vocabulary of {model.config.vocab_size}")
    if not prompts:
        return []
    rows = range(len(prompts))
    generators = generators or [row_generator(seed, row, device) for row in rows]
    limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)  # (B, V)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True

    training = model.training
    model.eval()
    try:
        # Prefill: all prompts at once, padded on the right (nothing sees the padding); logits of their last tokens.
        room = max(len(prompt) + limit for prompt, limit in zip(prompts, limits))
        width = max(map(len, prompts))
        cache = KVCache(model.config, len(prompts), width if kv_cache else room, dtype, device)
        padded = [prompt + [0] * (width - len(prompt)) for prompt in prompts]
        hidden = model.hidden(torch.tensor(padded, device=device), kv_cache=cache)  # (B, width, hidden)
        cache.set_lengths(lengths)
        if kv_cache:  # only now: padding would have a part in the scales
            quantize_cache(cache, bits=int(kv_cache[3:]), length=room)
        logits = model.lm_head(hidden[rows, lengths - 1])[:, :vocab_size]  # (B, V)

        new_tokens = [[] for _ in prompts]
        running = list(rows)  # the caller's numbers of the rows in the batch
        while True:
            if not logits.isfinite().all():
                raise ValueError("the model's logits are not finite: its weights are damaged, or its dtype overflowed")
            logits = penalize_repetition(logits, seen[:, :vocab_size], repetition_penalty)
            tokens = sample_token(logits, generators=[generators[row] for row in running],
                                  temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)  # (B,)
            seen.scatter_(1, tokens[:, None], True)
            going_on = []  # places in the batch
            for place, (row, token) in enumerate(zip(running, tokens.tolist())):
                new_tokens[row].append(token)
                ended = on_token is not None and on_token(row, token)
                if not (ended or token in stop_token_ids or len(new_tokens[row]) == limits[row]):
                    going_on.append(place)
            if not going_on:
                return new_tokens
            if len(going_on) < len(running):  # finished rows leave the batch
                running = [running[place] for place in going_on]
                kept = torch.tensor(going_on, device=device)
                cache.k, cache.v, tokens, seen = cache.k[:, kept], cache.v[:, kept], tokens[kept], seen[kept]
                cache.set_lengths(cache.lengths[kept])
            logits = model(tokens[:, None], kv_cache=cache)[:, 0, :vocab_size]
    finally:
        model.train(training)


# Text in and out

class TextStream:
    """Bytes of tokens in, text out, ending before the first stop string; what it gives, joined, is the whole text.

    It gives text once that is certain: bytes that are part of a character wait for the rest, and text that may be the
    beginning of a stop string waits until that is decided. Where the borders of tokens lie makes no difference.
    Bytes that are no UTF-8 become U+FFFD. `stopped` says that a stop string came.
    """

    def __init__(self, stop: list[str] = ()):
        if "" in stop:
            raise ValueError("an empty stop string would end every text at once")
        self.stop, self.stopped, self.held = list(stop), False, ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes, final: bool = False) -> str:
        """More bytes; `final` when there will be no others. Returns the text that has become certain."""
        if self.stopped:
            return ""
        self.held += self.decoder.decode(data, final)
        found = [(self.held.find(s) + len(s), self.held.find(s)) for s in self.stop if s in self.held]
        if found:  # the string that is complete first stops; of two that end together, the longer
            self.stopped = True
            return self.held[: min(found)[1]]
        beginnings = (n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n]))
        certain = len(self.held) - (0 if final else max(beginnings, default=0))
        text, self.held = self.held[:certain], self.held[certain:]
        return text


def prompt_ids(model: CausalLM, tokenizer, prompt: str) -> list[int]:
    """The first token of a document, then the prompt's; names of special tokens in it are plain text.

    The first token is the one that the model was trained to begin with: its config's BOS, else the tokenizer's, else
    EOS, which comes before every document in our token shards.
    """
    candidates = (model.config.bos_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return [i for i in candidates if i is not None][:1] + tokenizer.encode(prompt)


def generate_text(model: CausalLM, tokenizer, prompts: list[str | list[int]], *, stop=(), stop_token_ids=(),
                  stream: Callable[[int, int | None, str], None] | None = None, **sampling) -> list[str]:
    """Continue texts, as one batch; returns the continuations, without the prompts. `sampling`: as in `generate`.

    A prompt of token ids is taken as it is, and the text after it stands for itself, as an answer does.
    A row also ends where a string of `stop` would begin, and at a token of `stop_token_ids`, the model's or the
    tokenizer's EOS, which is not text.
    stream(row, token, text) is called for each new token with the text that became certain by it, often "", and with
    token None for the rest at the end; joined, these are the returned texts.
    ValueError: see `generate`; an empty stop string; a tokenizer that is not the model's.
    """
    if tokenizer.vocab_size > model.config.vocab_size:  # less is usual: tables are padded to round sizes
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, its model only {model.config.vocab_size}")
    eos = model.config.eos_token_id
    ends = {*stop_token_ids, tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    ids = [prompt_ids(model, tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    streams = [TextStream(stop) for _ in prompts]
    last = [row[-1:] if isinstance(prompt, str) else [] for row, prompt in zip(ids, prompts)]
    texts = [""] * len(prompts)

    def emit(row: int, token: int | None, text: str) -> None:
        texts[row] += text
        if stream is not None:
            stream(row, token, text)

    def on_token(row: int, token: int) -> bool:
        before = tokenizer.decode_bytes(last[row])  # for sentencepiece drops the space of a text's first word
        data = b"" if token in ends else tokenizer.decode_bytes(last[row] + [token])[len(before):]
        last[row] = [token]
        emit(row, token, streams[row].push(data))
        return streams[row].stopped

    generate(model, ids, stop_token_ids=ends, vocab_size=tokenizer.vocab_size, on_token=on_token, **sampling)
    for row, text in enumerate(streams):
        emit(row, None, text.push(b"", final=True))
    return texts


# Chat

HELP = "/reset forgets the conversation · /save FILE.jsonl adds it to a file · /exit · Ctrl-C ends an answer"


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # apart from the answers, so that these can be piped


def chat_prompt(messages: list[dict], tokenizer, template: str, room: int) -> tuple[list[int], int]:
    """(ids, dropped): the prompt for the next answer, without the `dropped` oldest messages (the system's stays), so
    that it fits in `room`. ValueError: the newest alone does not."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system):]  # user, assistant, ..., user
    for dropped in range(0, len(turns), 2):
        ids = render_prompt(system + turns[dropped:], tokenizer, template)
        if len(ids) <= room:
            return ids, dropped
    raise ValueError(f"the newest message, with the system's, takes {len(ids)} tokens; the context has room for {room}")


def save_chat(name: str, messages: list[dict]) -> None:
    """Append a row to a file of conversations (see data.chat.read_chats): all of it, or nothing if that fails."""
    if not name.endswith(".jsonl"):
        raise ValueError("a file's name that ends in .jsonl is expected")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("nothing has been said yet")
    path = Path(os.path.realpath(os.path.expanduser(name)))  # a link stays a link
    before = path.read_bytes() if path.exists() else b""
    gap = b"\n" if before and not before.endswith(b"\n") else b""
    with atomic_file(path) as file:
        file.write(before + gap + json.dumps({"messages": messages}).encode() + b"\n")


def typed_lines(first: list[str]) -> Iterator[str]:
    """`first`, then what is typed behind a "> ", or piped in without it, until that ends or Ctrl-C comes."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys; Windows has them anyway
    sys.stdin.reconfigure(errors="replace", newline=None)  # any line end; bytes that are no text become U+FFFD
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    for line in first:
        tell(f"> {line}")
        yield line
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input(prompt)
    print(end="\n" if prompt else "")


def chat(model: CausalLM, tokenizer, lines: Iterable[str], *, template: str, system: str = "", max_new_tokens: int,
         seed: int = 0, live: bool = True, **sampling) -> None:
    """Answer each line on stdout, all as one conversation; those that begin with "/" are commands (HELP).

    An answer is what `generate` makes of `render_prompt`; the random numbers go on from turn to turn. The oldest turns
    are left out where they take the room for max_new_tokens, or for a quarter of the context if that is less.
    sampling: as in `generate_text`. ValueError: a template that the tokenizer lacks tokens for, too long a `system`."""
    messages = beginning = [{"role": "system", "content": system}] if system else []
    context, told = model.config.max_position_embeddings, False
    room = context - max(1, min(max_new_tokens, context // 4))
    empty = {"role": "user", "content": ""}
    try:
        stops, _ = stop_ids(tokenizer, template), render_prompt([empty], tokenizer, template)
    except ValueError as error:
        raise ValueError(f"{error}; a base model must be fine-tuned first (train_sft.py)") from None
    chat_prompt([*beginning, empty], tokenizer, template, room)  # refuses a system message that is too long
    generators = [row_generator(seed, 0, next(model.parameters()).device)]
    for line in lines:
        command, _, name = map(str.strip, line.strip().partition(" "))
        if command == "/exit":
            return
        if command == "/reset":
            messages = beginning
        elif command == "/save":
            try:
                save_chat(name, messages)
                tell(f"added to {name}")
            except (OSError, ValueError) as error:
                tell(f"not saved to {name!r}: {getattr(error, 'strerror', None) or error}")
        elif command.startswith("/"):
            tell(HELP if command == "/help" else f"not sent, for there is no command {command}: {HELP}")
        elif command:
            asked, spoken = [*messages, {"role": "user", "content": line}], []
            try:
                ids, dropped = chat_prompt(asked, tokenizer, template, room)
            except ValueError as error:
                tell(f"not sent: {error}")
                continue
            if dropped and not told:
                told = True
                tell(f"note: the conversation outgrew the context of {context} tokens: its oldest turns are forgotten")

            def stream(row: int, token: int | None, text: str) -> None:
                spoken.append(text)
                print(text if live else "", end="", flush=True)

            with contextlib.suppress(KeyboardInterrupt):  # ends the answer; what was spoken is kept
                generate_text(model, tokenizer, [ids], stop_token_ids=stops, stream=stream, generators=generators,
                              max_new_tokens=max_new_tokens, **sampling)
            print("" if live else "".join(spoken), flush=True)
            messages = [*asked, {"role": "assistant", "content": "".join(spoken)}]


# The command

def main() -> None:
    args = parse(Args, __doc__)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = {name: getattr(args, name) for name in names}
    check_sampling(**sampling)
    sampling["kv_cache"] = args.kv_cache
    TextStream(args.stop)  # refuses an empty stop string
    if args.num_samples < 1 or args.chat and args.num_samples > 1:
        raise ValueError(f"num_samples is {args.num_samples}; it must be at least 1, and with --chat 1")
    if not args.chat and (args.system or args.template):
        raise ValueError("--system and --template are for --chat")
    prompts = [prompt for prompt in args.prompt or [""] for _ in range(args.num_samples)]
    device, folder = detect_device(args.device), find_checkpoint(args.model)
    dtype = args.dtype and getattr(torch, args.dtype)
    model = open_model(folder, dtype=dtype, device=device, attention=args.attention, seq_len=args.seq_len,
                       rope_scaling=args.rope_scaling)
    tokenizer = load_tokenizer(folder)
    context = model.config.max_position_embeddings
    tell(f"{folder} · {device} · {next(model.parameters()).dtype} · attention {args.attention}")
    sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks shall not end the run
    if args.chat:
        template = args.template or template_of(tokenizer)
        tell(f"template {template or 'chatml, for the tokenizer names none that is known'} · {HELP}")
        return chat(model, tokenizer, typed_lines(args.prompt), template=template or "chatml", system=args.system,
                    stop=args.stop, seed=args.seed, live=args.stream, **sampling)
    if max(len(prompt_ids(model, tokenizer, prompt)) for prompt in prompts) + args.max_new_tokens > context:
        tell(f"note: the text ends when the model's context of {context} tokens is full")

    live = args.stream and len(prompts) == 1  # several would run into each other
    tokens = 0

    def stream(row: int, token: int | None, text: str) -> None:
        nonlocal tokens
        tokens += token is not None
        print(text if live else "", end="", flush=True)

    if live:
        print(prompts[0], end="", flush=True)
    start = time.perf_counter()
    texts = generate_text(model, tokenizer, prompts, stop=args.stop, stream=stream, seed=args.seed, **sampling)
    seconds = time.perf_counter() - start
    for number, (prompt, text) in enumerate(zip(prompts, texts), start=1):
        print("" if live else f"--- {number} of {len(prompts)}\n{prompt}{text}")
    tell(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s")


if __name__ == "__main__":
    run(main)
