"""Head and cross-entropy, forward and backward: ours against full logits and other chunked losses, time and memory.

    python bench/bench_cross_entropy.py            # on a GPU the table's sizes; on a CPU small ones, printed only
    python bench/bench_cross_entropy.py --record   # writes bench/results/cross_entropy.json from a CPU too
    python bench/bench_cross_entropy.py --memory   # without a GPU: counts bytes, writes cross_entropy_memory.json

Every side gets the same tensors in the same run, and must first agree with float64 on a small problem. Times are
medians between CUDA events, with 10th and 90th percentile; GBs move in each repetition, so the L2 holds nothing of the
one before. Memory is the peak above what was allocated before the call: gradients count, inputs do not. The floor of
head and loss is three matmuls at the speed measured here; that of the loss alone, reading the logits twice and writing
their gradient once at the speed of a copy.

Bytes can be counted without a GPU. Ours allocates all that it does at the full size, while matmuls and kernels, which
allocate nothing, are left out; PyTorch's ways run in earnest, with each dimension a sixteenth and so each term a 256th.
Full logits at their best hold three arrays: the logits, which their gradient takes the place of, and two gradients.
"""

import argparse
import contextlib
import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # ours is then checked, in the interpreter, and not timed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.memory import peak_bytes  # noqa: E402
from bench.results_io import write_results  # noqa: E402
from kernels import cross_entropy as kernel  # noqa: E402

CASES = [  # (tokens, hidden, vocabulary, dtype of the weight: float32 runs under bf16 autocast)
    (16384, 4096, 128256, torch.bfloat16), (16384, 4096, 128256, torch.float32), (16384, 2048, 32000, torch.float32)]
SMOKE = [(256, 64, 1000, torch.float32)]


def eager(hidden, weight, target):
    """The loss by PyTorch, all logits in memory, in float32 from 16-bit logits on, as training code writes it."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


def sides(device, weight_dtype) -> dict:
    """Name -> loss function of (hidden, weight, target); those that are not installed are left out."""
    if device.type == "cpu":
        return {"PyTorch, all logits": eager, "our reference": kernel.linear_cross_entropy_reference,
                "ours, interpreted": kernel.linear_cross_entropy}
    torch._dynamo.reset()  # a second shape would be compiled with dynamic sizes, and slower
    found = {"torch.compile, all logits": torch.compile(eager, dynamic=False), "PyTorch, all logits": eager,
             "ours": kernel.linear_cross_entropy}
    if weight_dtype != torch.float32:
        found["ours, weight gradient summed in bf16"] = lambda h, w, t: kernel.linear_cross_entropy(
            h, w, t, sum_dtype=weight_dtype)
    for tokens in (1024, 4096):
        found[f"ours, chunks of {tokens}"] = lambda h, w, t, tokens=tokens: kernel.linear_cross_entropy(
            h, w, t, chunk_size=tokens)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # PyTorch 2.13
        found["F.linear_cross_entropy, chunked"] = lambda h, w, t: F.linear_cross_entropy(
            h, w, t, options=torch.nn.LinearCrossEntropyOptions())
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
        found["Liger"] = lambda h, w, t: liger(h, w, t)
        found["Liger, sums in fp32"] = lambda h, w, t: liger(h, w, t, accum_dtype=torch.float32)
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut
        found["Cut Cross-Entropy"] = lambda h, w, t: cut(h, w, t)
    return found


def spread(run, device, seconds: float = 2.0) -> dict:
    """Milliseconds of run(): median, 10th and 90th percentile of at least 5 repetitions after a warm-up."""
    for _ in range(3):
        run()
    times, begin = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            now = time.perf_counter()
            run()
            times.append((time.perf_counter() - now) * 1e3)
    deciles = statistics.quantiles(times, n=10)
    return {"ms": round(statistics.median(times), 3), "ms_p10": round(deciles[0], 3), "ms_p90": round(deciles[-1], 3)}


def speed_of_light(device) -> dict:
    """Measured here and now: TFLOP/s of a large bf16 matmul, TB/s of a large copy."""
    if device.type == "cpu":
        return {}
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    matmul = 2 * 8192 ** 3 / spread(lambda: a @ b, device)["ms"] / 1e9
    x, y = torch.empty(2, 2 ** 30, device=device, dtype=torch.bfloat16)
    copy = 2 * x.nbytes / spread(lambda: y.copy_(x), device)["ms"] / 1e9
    return {"matmul_tflops": round(matmul), "copy_tb_per_s": round(copy, 2)}


def problem(tokens, hidden_size, vocabulary, weight_dtype, device):
    """Hidden states as a network under these weights gives them (bf16 under autocast); one target in 16 is ignored."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else weight_dtype
    hidden = torch.randn(tokens, hidden_size, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, device=device) * 2 / hidden_size ** 0.5).to(weight_dtype)
    target = torch.randint(vocabulary, (tokens,), device=device)
    target[::16] = -100
    return hidden, weight.requires_grad_(), target


def gradients(function, hidden, weight, target):
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=weight.dtype != hidden.dtype):
        loss = function(hidden, weight, target)
    return torch.autograd.grad(loss, (hidden, weight))


def errors(function, weight_dtype, device) -> list[float]:
    """Relative errors (norms) of the two gradients against float64, on 3000 tokens (in chunks) and 5000 words."""
    hidden, weight, target = problem(3000 if device.type == "cuda" else 100, 256, 5000, weight_dtype, device)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    truth = gradients(eager, *exact, target)
    found = gradients(function, hidden, weight, target)
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, truth)]


def linear_rows(case, device, light) -> list[dict]:
    tokens, hidden_size, vocabulary, weight_dtype = case
    functions = sides(device, weight_dtype)
    tolerance = 1e-5 if device.type == "cpu" else 0.02
    errors_of = {}
    for name, function in list(functions.items()):
        try:
            wrong = max(errors(function, weight_dtype, device))
        except Exception as failure:  # a peer that refuses these inputs is named, and left out
            if name.startswith("ours"):
                raise
            print(f"{name} is left out: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
            del functions[name]
            continue
        print(f"{name}: relative error of the gradients {wrong:.1e}", flush=True)
        if wrong > tolerance:
            raise SystemExit(f"{name} differs from float64 by {wrong:.1e}; at most {tolerance} is allowed")
        errors_of[name] = float(f"{wrong:.2g}")
    rows, tensors = [], problem(*case, device)
    flops = 6 * tokens * hidden_size * vocabulary
    for name, function in functions.items():
        def run():
            gradients(function, *tensors)

        row = {"what": name, "tokens": tokens, "hidden_size": hidden_size, "vocab_size": vocabulary,
               "weight_dtype": str(weight_dtype)[6:], "error": errors_of[name]}
        if "interpreted" in name:
            rows.append(row)
            continue
        row |= spread(run, device)
        peak = peak_bytes(run)
        row["peak_gb"] = round(peak / 1e9, 4)
        row["tflops"] = round(flops / row["ms"] / 1e9, 1)
        rows.append(row)
    for row in (row for row in rows if "ms" in row):  # the first is what the goals compare with
        row["time_ratio"] = round(row["ms"] / rows[0]["ms"], 3)
        row["memory_ratio"] = round(row["peak_gb"] / rows[0]["peak_gb"], 3)
        if light:
            row["floor_ms"] = round(flops / light["matmul_tflops"] / 1e9, 2)
    return rows


def plain_rows(tokens, vocabulary, device, light) -> list[dict]:
    """cross_entropy of logits that exist anyway."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    logits = torch.randn(tokens, vocabulary, device=device, dtype=dtype).requires_grad_()
    target = torch.randint(vocabulary, (tokens,), device=device)

    def torch_way(logits, target):
        return F.cross_entropy(logits.float(), target)

    functions = {"PyTorch": torch_way, "our reference": kernel.cross_entropy_reference}
    if device.type == "cuda":
        functions = {"torch.compile": torch.compile(torch_way, dynamic=False), "PyTorch": torch_way,
                     "ours": kernel.cross_entropy}
    rows = []
    for name, function in functions.items():
        def run():
            return torch.autograd.grad(function(logits, target), logits)

        row = {"what": f"plain: {name}", "tokens": tokens, "vocab_size": vocabulary} | spread(run, device)
        peak = peak_bytes(run)
        row |= {"peak_gb": round(peak / 1e9, 4)}
        row["time_ratio"] = round(row["ms"] / (rows[0]["ms"] if rows else row["ms"]), 3)
        if light:
            row["floor_ms"] = round(3 * logits.nbytes / light["copy_tb_per_s"] / 1e9, 2)
        rows.append(row)
    return rows


@contextlib.contextmanager
def nothing_computed():
    """On a CPU: our operator runs, autograd too, and allocates what it does on a GPU; no number is written."""
    kept = {name: getattr(kernel, name) for name in ("runs_kernel", "launch", "add_product", "scale_op")}
    for name in kept:
        setattr(kernel, name, lambda *args, **options: True)
    matmul, torch.mm = torch.mm, lambda a, b, out: out  # always into memory that is there
    try:
        yield
    finally:
        torch.mm = matmul
        for name, function in kept.items():
            setattr(kernel, name, function)


def memory_rows() -> list[dict]:
    """Peaks of loss and both gradients of a bfloat16 weight, and their share of what full logits need at their best."""
    rows = []

    def add(what: str, sizes: tuple[int, int, int], peak: int | None = None) -> None:
        M, H, V = sizes
        least = 2 * (M * V + V * H + M * H)
        peak = peak or least
        rows.append({"what": what, "tokens": M, "hidden_size": H, "vocab_size": V, "peak_mb": round(peak / 1e6),
                     "share": round(peak / least, 3)})

    def measured(function, sizes) -> int:
        M, H, V = sizes
        hidden, weight = (torch.empty(n, H, dtype=torch.bfloat16, requires_grad=True) for n in (M, V))
        target = torch.zeros(M, dtype=torch.int64)

        def run():
            return torch.autograd.grad(function(hidden, weight, target), (hidden, weight))
        if "ours" not in function.__name__:
            run()  # compiles
        return peak_bytes(run)

    def ours(hidden, weight, target, **options):
        return kernel.linear_cross_entropy(hidden, weight, target, reduction="sum", **options)

    def ours_in_fp32(hidden, weight, target):
        return ours(hidden, weight, target, sum_dtype=torch.float32)

    goal = 16384, 4096, 128256
    sixteenth = tuple(n // 16 for n in goal)
    add("full logits at their best, by formula", goal)
    with nothing_computed():
        for sizes in (goal, (32768, *goal[1:]), (65536, *goal[1:])):
            add("ours", sizes, measured(ours, sizes))
        add("ours, weight gradient summed in float32", goal, measured(ours_in_fp32, goal))
    try:
        add("torch.compile, all logits", sixteenth, measured(torch.compile(eager, dynamic=False), sixteenth))
    except Exception as failure:  # no C++ compiler, for one
        print(f"torch.compile is left out: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
    add("PyTorch, all logits", sixteenth, measured(eager, sixteenth))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the results of a CPU too")
    parser.add_argument("--memory", action="store_true", help="count bytes instead, which needs no GPU")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.memory:
        if device.type == "cuda":
            parser.error("--memory is for machines without a GPU; on one, each row of the table has its peak")
        write_results("cross_entropy_memory", memory_rows())
        return
    if device.type == "cpu":
        print("no GPU: small sizes; ours is checked in Triton's interpreter, whose time means nothing", flush=True)
    light = speed_of_light(device)
    rows = [{"what": "speed of light"} | light] if light else []
    for case in CASES if device.type == "cuda" else SMOKE:
        rows += linear_rows(case, device, light)
    rows += plain_rows(*((8192, 128256) if device.type == "cuda" else (256, 1000)), device, light)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items() if value is not None), flush=True)
    if device.type == "cuda" or args.record:
        write_results("cross_entropy", rows, quiet=True)


if __name__ == "__main__":
    main()
