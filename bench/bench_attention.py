"""Attention, forward and backward: ours against PyTorch's flash and cuDNN kernels, FlexAttention, flash-attention.

    python bench/bench_attention.py             # on a GPU the table's sizes; on a CPU small ones
    python bench/bench_attention.py --record    # writes bench/results/attention.json from a CPU too
    python bench/bench_attention.py --memory    # without a GPU: counts bytes, writes attention_memory.json

Every side gets the same tensors, laid out (B, S, H, D) as a model makes them, in the same run, and must first agree
with float64 on a small problem of the same mask. Times are medians between CUDA events, with 10th and 90th percentile;
q is larger than the 60 MB L2. TFLOP/s count the pairs that the mask lets through, 4 D for each in forward and 10 D in
backward; the floor is that work at the speed of a large matmul measured here.

Bytes can be counted without a GPU: our operators run and allocate what they do there, while the kernels, which allocate
nothing, are left out. The peak is that of forward and backward above the inputs; PyTorch's plain way runs in earnest.
"""

import argparse
import importlib.util
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # ours is then checked, in the interpreter, and not timed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.memory import peak_bytes  # noqa: E402
from bench.results_io import write_results  # noqa: E402
from kernels import flash_attention as kernel  # noqa: E402

CASES = [  # (mask, B, S, H, Hkv, D); the window is 1024 wide, documents are about 1000 long
    ("causal", 2, 8192, 32, 32, 128), ("causal", 2, 8192, 32, 32, 64), ("causal", 2, 8192, 32, 8, 128),
    ("causal", 8, 2048, 32, 32, 128), ("full", 2, 8192, 32, 32, 128), ("window", 2, 8192, 32, 32, 128),
    ("documents", 1, 16384, 32, 32, 128), ("documents", 1, 16384, 32, 8, 64)]
SMOKE = [(mask, 1, 256, 2, 1, 32) for mask in ("causal", "full", "window", "documents")]


def documents(S: int, device) -> torch.Tensor:
    """(n + 1,) int32 offsets of documents that are 64 tokens to about an eighth of S long."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(min(64, S // 8), S // 8 + 1, (64,), generator=generator)
    ends = lengths.cumsum(0)
    return torch.tensor([0, *ends[ends < S].tolist(), S], dtype=torch.int32, device=device)


def window_of(S: int) -> int:
    return min(1024, S // 4)


def ours(mask: str, S: int, device):
    """Function of q, k, v (B, S, H, D)."""
    if mask == "documents":
        cu = documents(S, device)
        longest = int(cu.diff().max())
        return lambda q, k, v: kernel.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, longest, longest,
                                                             causal=True)[None]
    window = (window_of(S) - 1, 0) if mask == "window" else (-1, -1)
    return lambda q, k, v: kernel.flash_attn_func(q, k, v, causal=mask != "full", window_size=window)


def reference(mask: str, S: int, device):
    """The plain way of the kernel's own file."""
    left, right = window_of(S) - 1 if mask == "window" else -1, -1 if mask == "full" else 0
    lengths = documents(S, device).diff().tolist() if mask == "documents" else [S]

    def attend(q, k, v):
        parts = zip(*(x.split(lengths, dim=1) for x in (q, k, v)))
        return torch.cat([kernel.attention_reference(*part, 1 / math.sqrt(q.shape[-1]), left, right)[0]
                          for part in parts], dim=1)
    return attend


def sdpa(backend, causal: bool):
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal,
                                                  enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)
    return attend


def flex(mask: str, S: int, device):
    """Compiled FlexAttention; its block mask is made once and not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    cu, window = documents(S, device), window_of(S)
    owner = torch.searchsorted(cu, torch.arange(S, device=device, dtype=torch.int32), right=True)
    masks = {"causal": lambda b, h, i, j: j <= i, "window": lambda b, h, i, j: (j <= i) & (j > i - window),
             "documents": lambda b, h, i, j: (j <= i) & (owner[i] == owner[j])}
    block_mask = None if mask == "full" else create_block_mask(masks[mask], None, None, S, S, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=block_mask,
                                    enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)


def sides(mask: str, S: int, device) -> dict:
    """Name -> function of q, k, v; the first is what the others' times are compared with."""
    if device.type == "cpu":
        found = {"ours": ours(mask, S, device), "reference": reference(mask, S, device)}
        if mask in ("causal", "full"):
            found["SDPA"] = sdpa(SDPBackend.MATH, mask == "causal")
        return found
    found = {"ours": ours(mask, S, device)}
    if mask in ("causal", "full"):
        found["SDPA flash"] = sdpa(SDPBackend.FLASH_ATTENTION, mask == "causal")
        found["SDPA cuDNN"] = sdpa(SDPBackend.CUDNN_ATTENTION, mask == "causal")
    torch._dynamo.reset()  # a second shape would be compiled with dynamic sizes, and slower
    found["FlexAttention"] = flex(mask, S, device)
    if importlib.util.find_spec("flash_attn"):
        import flash_attn
        if mask == "documents":
            cu = documents(S, device)
            longest = int(cu.diff().max())
            found["flash-attention 2"] = lambda q, k, v: flash_attn.flash_attn_varlen_func(
                q[0], k[0], v[0], cu, cu, longest, longest, causal=True)[None]
        else:
            window = (window_of(S) - 1, 0) if mask == "window" else (-1, -1)
            found["flash-attention 2"] = lambda q, k, v: flash_attn.flash_attn_func(
                q, k, v, causal=mask != "full", window_size=window)
    return found


def pairs(mask: str, S: int, device) -> int:
    if mask == "documents":
        return sum(kernel.visible_pairs(n, n, right=0) for n in documents(S, device).diff().tolist())
    return kernel.visible_pairs(S, S, window_of(S) - 1 if mask == "window" else -1, -1 if mask == "full" else 0)


def spread(run, device, seconds: float = 1.0) -> dict:
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


def problem(B, S, H, Hkv, D, device):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    *inputs, dout = (torch.randn(B, S, heads, D, device=device, dtype=dtype, requires_grad=True)
                     for heads in (H, Hkv, Hkv, H))
    return inputs, dout.detach()


def wrong(function, mask: str, H, Hkv, D, S: int, device) -> float:
    """Largest relative error (norms) of O, dQ, dK, dV against float64."""
    inputs, dout = problem(1, S, H, Hkv, D, device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found, truth = function(*inputs), ours(mask, S, device)(*exact)  # float64 runs the reference
    results = zip((found.detach(), *torch.autograd.grad(found, inputs, dout)),
                  (truth.detach(), *torch.autograd.grad(truth, exact, dout.double())))
    return max(float((a.double() - b).norm() / b.norm()) for a, b in results)


def rows_of(case, device, matmul_tflops: float | None) -> list[dict]:
    mask, B, S, H, Hkv, D = case
    small = 512 if device.type == "cuda" else 64
    functions, errors = [], {}
    for name, function in sides(mask, small, device).items():
        try:
            error = wrong(function, mask, 2 * H // Hkv, 2, D, small, device)
        except Exception as failure:  # a peer that refuses these inputs is named, and left out
            if name.startswith("ours"):
                raise
            print(f"{case} {name} is left out: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
            continue
        print(f"{case} {name}: relative error {error:.1e}", flush=True)
        if not error <= (0.02 if device.type == "cuda" else 1e-4):  # NaN is wrong too
            if name.startswith("ours"):
                raise SystemExit(f"{name} differs from float64 by {error:.1e}")
            print(f"{case} {name} is left out: it differs from float64", flush=True)
            continue
        functions.append(name)
        errors[name] = float(f"{error:.2g}")
    everyone = sides(mask, S, device)
    inputs, dout = problem(B, S, H, Hkv, D, device)
    work = 4 * D * H * B * pairs(mask, S, device)
    rows = []
    for name in functions:
        row = {"what": name, "mask": mask, "batch_size": B, "seq_len": S, "heads": H, "key_value_heads": Hkv,
               "head_dim": D, "error": errors[name]}
        if device.type == "cpu" and name == "ours":
            rows.append(row | {"what": "ours, interpreted", "seq_len": small, "heads": 2 * H // Hkv,
                               "key_value_heads": 2})
            continue
        attend = everyone[name]
        out = attend(*inputs)
        ways = {"forward": (lambda: attend(*inputs), work),
                "backward": (lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True), work * 5 // 2)}
        for way, (run, flops) in ways.items():
            row = row | {"way": way} | spread(run, device)
            row["tflops"] = round(flops / row["ms"] / 1e9, 1)
            row["floor_ms"] = matmul_tflops and round(flops / matmul_tflops / 1e9, 3)
            first = next((other for other in rows if other.get("way") == way), row)
            row["ours_is_faster_by"] = round(row["ms"] / first["ms"], 3)
            rows.append(row)
    return rows


def memory_rows() -> list[dict]:
    """Peaks of one causal attention of 4 heads of 64 in float16, forward and backward, by length."""
    def peak(S: int, attend) -> int:
        q, k, v, dout = (torch.empty(1, S, 4, 64, dtype=torch.float16) for _ in range(4))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        return peak_bytes(lambda: torch.autograd.grad(attend(*inputs), inputs, dout))

    kept, rows = (kernel._launch, kernel._kernel_runs_on), []
    kernel._launch, kernel._kernel_runs_on = lambda *_: None, lambda _: True
    try:
        found = [("ours", S, peak(S, ours("causal", S, None))) for S in (1024, 4096, 16384, 65536, 262144)]
    finally:
        kernel._launch, kernel._kernel_runs_on = kept
    found += [("PyTorch, plain", S, peak(S, sdpa(SDPBackend.MATH, True))) for S in (1024, 2048, 4096)]
    for what, S, size in found:
        rows.append({"what": what, "seq_len": S, "peak_mb": round(size / 1e6, 1), "bytes_per_token": round(size / S)})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the results of a CPU too")
    parser.add_argument("--memory", action="store_true", help="count bytes instead, which needs no GPU")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.memory:
        if device.type == "cuda":
            parser.error("--memory is for machines without a GPU; a test has it there (pytest -m gpu -k linear)")
        write_results("attention_memory", memory_rows())
        return
    rows, matmul_tflops = [], None
    if device.type == "cpu":
        print("no GPU: small sizes; ours is checked in Triton's interpreter, whose time means nothing", flush=True)
    else:
        a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
        matmul_tflops = 2 * 8192 ** 3 / spread(lambda: a @ b, device)["ms"] / 1e9
        rows.append({"what": "speed of light", "tflops": round(matmul_tflops)})
    for case in CASES if device.type == "cuda" else SMOKE:
        rows += rows_of(case, device, matmul_tflops)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items() if value is not None), flush=True)
    if device.type == "cuda" or args.record:
        write_results("attention", rows, quiet=True)


if __name__ == "__main__":
    main()
