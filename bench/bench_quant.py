"""What rounding costs and saves on a real model: bits, bytes, perplexity; how long it takes; how fast int8 multiplies.

    python bench/bench_quant.py --model stories260K.bin --text tinystories.txt     # the table -> results/quant.json
    python bench/bench_quant.py --name quickstart --model out/quickstart/pretrain --text stdlib --documents 400
    python bench/bench_quant.py --speed                                            # times -> results/quant_speed.json

--model is whatever convert.py reads. A text is cut into documents at <|endoftext|> (or empty lines). Perplexity is
over the first --documents of them, each after a begin token and cut to the context; calibration takes 128 windows, and
training that rounds its batches, from the documents after those. `stdlib` is the quickstart's corpus: perplexity is of
held-out documents, shuffled, all else takes those that the model was trained on. Bits are of the rounded matrices'
codes and scales, counted in memory without padding: codes, float16 scales and zeros of as many bits as the codes.
"""

import argparse
import copy
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.results_io import write_results  # noqa: E402
from calibrate import calibrate  # noqa: E402
from convert import load_pretrained, load_pretrained_tokenizer  # noqa: E402
from data.corpus import split_documents  # noqa: E402
from model import CausalLM, KVCache, ModelConfig  # noqa: E402
from optim import AdamW, learning_rate  # noqa: E402
from quant import Int4Linear, Int8Linear, METHODS, linear_layers, quantize_cache, quantize_model  # noqa: E402


def stored_bits(model) -> float:
    """Bits a weight of the quantized matrices, as their files hold them."""
    bits = weights = 0
    for module in model.modules():
        if type(module) in {kind for kind, _ in METHODS.values()}:
            n = module.in_features * module.out_features
            weights += n
            if isinstance(module, Int4Linear):
                bits += module.bits * (n + module.zero.numel()) + 16 * module.scale.numel()
            elif hasattr(module, "weight"):  # BitNet: three values
                bits += math.log2(3) * n + 32
            else:
                bits += sum(8 * t.numel() * t.element_size() for name, t in module.named_buffers()
                            if name not in ("levels", "nested_map"))
    return bits / weights if weights else 32.0


@torch.no_grad()
def perplexity(model, rows: list[list[int]], cache_how: dict | None = None) -> float:
    """exp of the mean -log p; with cache_how through a quantized KV cache, 32 tokens at a time."""
    nats = tokens = 0
    for ids in rows:
        x = torch.tensor([ids])
        if cache_how is None:
            logits = model(x[:, :-1])
        else:
            cache = quantize_cache(KVCache(model.config, 1, len(ids)), **cache_how)
            logits = torch.cat([model(part, kv_cache=cache) for part in x[:, :-1].split(32, 1)], 1)
        nats += F.cross_entropy(logits[0], x[0, 1:], reduction="sum").item()
        tokens += len(ids) - 1
    return math.exp(nats / tokens)


def train_rounded(model, windows: torch.Tensor, steps: int, lr: float) -> None:
    """A short training run with rounded weights, on batches of 16 of the windows."""
    optimizer, order = AdamW(model.parameters(), lr=lr, weight_decay=0.0), torch.Generator().manual_seed(0)
    for step in range(steps):
        batch = windows[torch.randint(len(windows), (16,), generator=order)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule="cosine", lr=lr, min_lr=lr / 10, warmup_steps=10,
                                        max_steps=steps)
        optimizer.step()


def table(args) -> list[dict]:
    model, tokenizer = load_pretrained(args.model), load_pretrained_tokenizer(args.model)
    if args.text == "stdlib":
        splits = [[d.text for d in split_documents(["stdlib"], 0.1, split) if d.text.strip()] for split in ("val", "train")]
        for split in splits:
            random.Random(0).shuffle(split)
        documents = splits[0][:args.documents] + splits[1]
    else:
        text = Path(args.text).read_text(encoding="utf-8")
        documents = [d.strip() for d in text.split("<|endoftext|>" if "<|endoftext|>" in text else "\n\n") if d.strip()]
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    context = min(model.config.max_position_embeddings, 512)
    held_out = [([begin] + tokenizer.encode(d))[:context] for d in documents[:args.documents]]
    stream = []
    for document in documents[args.documents:]:
        stream += [begin] + tokenizer.encode(document)
        if len(stream) >= (16 * args.steps if args.text == "stdlib" else 4 * 128) * context:
            break
    windows = torch.tensor(stream[:len(stream) // context * context]).view(-1, context)
    calibration, rows = windows[:128], []
    full_bits = sum(32 * linear.weight.numel() for linear in linear_layers(model).values())
    all_bits = 32 * sum(p.numel() for p in model.parameters())

    def row(name: str, work=lambda m: None, cache_how=None) -> None:
        changed, start = copy.deepcopy(model), time.perf_counter()
        work(changed)
        seconds = time.perf_counter() - start
        bits, value = stored_bits(changed), perplexity(changed.eval(), held_out, cache_how)
        rows.append({"model": args.name, "method": name, "bits": round(bits, 3), "perplexity": round(value, 4),
                     "against_fp32": f"{value / rows[0]['perplexity'] - 1:+.2%}" if rows else "",
                     "bytes": round((all_bits - full_bits + full_bits / 32 * bits) / 8), "seconds": round(seconds, 1)})
        print(rows[-1], flush=True)

    row("fp32")
    for method in ("int8", "w8a8", "llm.int8", "fp8", "nf4", "fp4"):
        row(method, lambda m: quantize_model(m, method))
    row("nf4, scales in float32", lambda m: quantize_model(m, "nf4", double_quant=False))
    for alpha in (0.5, 0.7, 0.9):
        row(f"smoothquant w8a8, alpha {alpha}", lambda m: calibrate(m, calibration, "smoothquant", alpha=alpha))
    for bits in (4, 3):
        how = dict(bits=bits, group_size=64)
        row(f"int{bits} g64 to nearest", lambda m: quantize_model(m, "int4", **how))
        row(f"int{bits} g64 awq", lambda m: calibrate(m, calibration, "awq", **how))
        for act_order in (False, True):
            for group_scales in ("updated", "old"):
                name = f"int{bits} g64 gptq{', act-order' * act_order}, scales of {group_scales} weights"
                row(name, lambda m: calibrate(m, calibration, "gptq", act_order=act_order, group_scales=group_scales,
                                              **how))
    for bits in (8, 4):
        for keys in ("token", "channel"):
            row(f"kv cache int{bits}, keys per {keys}", cache_how=dict(bits=bits, keys=keys))
    for method, settings, lr in (("qat", dict(bits=3), 1e-3), ("bitnet", dict(norm=False), 2e-3)):
        name = f"{method}{settings.get('bits', '')}, {args.steps} training steps"
        row(name, lambda m: (quantize_model(m.train(), method, **settings), train_rounded(m, windows, args.steps, lr),
                             quantize_model(m, "int3") if method == "qat" else None))
    return rows


def speed(gptq_layers: int) -> list[dict]:
    """int8 against float32, in turns; and quantizing a model of 110 M parameters."""
    rows = []
    with torch.no_grad():
        for N, K in ((768, 768), (2048, 2048), (4096, 1024)):
            linear = torch.nn.Linear(K, N, bias=False)
            layers = {"float32": linear, "int8": Int8Linear.from_linear(linear),
                      "w8a8": Int8Linear.from_linear(linear, activations="rounded")}
            for M in (1, 256, 1024):
                x, times = torch.randn(M, K), {name: [] for name in layers}
                for _ in range(30):  # in turns, and the best of each: what else the machine does is left out
                    for name, layer in layers.items():
                        start = time.perf_counter()
                        layer(x)
                        times[name].append(time.perf_counter() - start)
                ms = {name: min(t) * 1e3 for name, t in times.items()}
                for name in layers:
                    rows.append({"what": f"multiply by {N} x {K}", "rows": M, "method": name, "ms": round(ms[name], 3),
                                 "over_float32": round(ms[name] / ms["float32"], 3)})
                    print(rows[-1], flush=True)
    config = ModelConfig(32000, 768, 2048, 12, 12, tie_word_embeddings=True, max_position_embeddings=512)
    model, windows = CausalLM(config), torch.randint(0, 32000, (128, 512), generator=torch.Generator().manual_seed(0))
    works = {method: (lambda m, method=method: quantize_model(m, method)) for method in ("int8", "int4", "nf4")}
    works["gptq int4 g64, 128 x 512 tokens"] = lambda m: calibrate(m, windows, "gptq")
    for name, work in works.items():
        changed = copy.deepcopy(model)
        if "gptq" in name:
            del changed.model.layers[gptq_layers:]
        size, start, cpu = sum(p.numel() for p in changed.parameters()), time.perf_counter(), time.process_time()
        work(changed)
        rows.append({"what": f"quantize {size:,} weights, {len(changed.model.layers)} layers", "method": name,
                     "seconds": round(time.perf_counter() - start, 1),
                     "cpu_seconds": round(time.process_time() - cpu, 1), "threads": torch.get_num_threads()})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="what convert.py reads")
    parser.add_argument("--name", default="stories260K", help="what the table calls it")
    parser.add_argument("--text", help="UTF-8 text with <|endoftext|> between documents; or stdlib")
    parser.add_argument("--documents", type=int, default=100, help="of the text, for the perplexity")
    parser.add_argument("--steps", type=int, default=150, help="of training that rounds")
    parser.add_argument("--speed", action="store_true", help="times alone")
    parser.add_argument("--gptq_layers", type=int, default=12, help="of the big model's 12, to time GPTQ on")
    args = parser.parse_args()
    if args.speed:
        write_results("quant_speed", speed(args.gptq_layers))
    elif args.model and args.text:
        write_results("quant" if args.name == "stories260K" else f"quant_{args.name}", table(args))
    else:
        parser.error("give --model and --text, or --speed")


if __name__ == "__main__":
    main()
