"""Weights of four and eight bits, and Adam with eight-bit state: our kernels beside PyTorch, bitsandbytes, torchao.

    python bench/bench_low_bit.py           # with a GPU: writes bench/results/low_bit.json
    python bench/bench_low_bit.py --smoke   # small sizes; chosen by itself without a GPU: ours is then checked in
                                            # Triton's interpreter, and only PyTorch is timed
    python bench/bench_low_bit.py --record  # writes bench/results/low_bit.json from a CPU too

Every way is first compared with float64: the largest error over the largest number. Times are those of CUDA graphs of
several calls, which go round sets of inputs larger than the L2 cache: median, and the 10th and 90th percentile of the
replays. `share_of_floor` is the least time, from the speed of a copy and of a bf16 matmul that the same run measures,
over the time measured: the greater of (bytes that must move / copy speed) and (FLOPs / matmul speed). "Plain weight" is
F.linear, which is cuBLAS on a GPU. torchao rounds weights in its own way, so its error counts that too.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.results_io import write_results  # noqa: E402
from kernels.adam8bit import adam8bit_state, adam8bit_update, adam8bit_update_reference  # noqa: E402
from kernels.int4 import (int4_dequantize, int4_dequantize_reference, int4_linear, int4_linear_reference,  # noqa: E402
                          int4_quantize, int4_unpack)
from kernels.int8_fp8 import linear_8bit, linear_reference, quantize_rows  # noqa: E402
from kernels.nf4 import (nf4_dequantize, nf4_dequantize_reference, nf4_linear, nf4_linear_reference,  # noqa: E402
                         nf4_quantize)

SETS, REPLAYS = 6, 30  # sets of inputs in a graph: 6 of 30 MB, at the least, go round a cache of 60 MB
ADAM = dict(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def gpu_times(calls) -> list[float]:
    """Seconds per call, one for each replay of a graph of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return times[3:]


def cpu_times(calls) -> list[float]:
    times = []
    for call in calls * 5:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def speeds(device) -> tuple[float, float]:
    """Bytes per second of a copy of 1 GB (read and written ones), FLOP/s of a bf16 matmul of 8192^3."""
    source, target = (torch.empty(2**30, dtype=torch.uint8, device=device).random_() for _ in range(2))
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy, matmul = (statistics.median(gpu_times([call] * 3)) for call in (lambda: target.copy_(source), lambda: a @ b))
    return 2 * 2**30 / copy, 2 * 8192**3 / matmul


def bitsandbytes():
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        return None
    return functional


def torchao(w, kind: str):
    """torchao's own linear layer of that kind for the weight w (it rounds w itself), or None where it is absent."""
    try:
        from torchao import quantization as ao
    except ImportError:
        return None
    config = {"int4": lambda: ao.Int4WeightOnlyConfig(group_size=128),
              "int8": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
              "float8_e4m3fn": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())}[kind]()
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta", dtype=w.dtype)
    layer.weight = torch.nn.Parameter(w, requires_grad=False)
    try:
        ao.quantize_(layer, config)
    except Exception as failure:  # kernels of its own that are not installed, for one
        print(f"torchao {kind} is left out: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
        return None
    return layer


def torch_int4(q):
    """PyTorch's own W4A16: x -> x W^T of the same numbers, in its layout (w = (code - 8) scale + zero there)."""
    codes = int4_unpack(q.packed).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    scale, zero = q.scale.float(), q.zero.float()
    scales = torch.stack([scale, (8 - zero) * scale], -1).transpose(0, 1).contiguous().bfloat16()  # (groups, N, 2)
    group_size = codes.shape[1] // scale.shape[1]
    return lambda x: torch._weight_int4pack_mm(x, packed, group_size, scales)


def cases(N: int, K: int, big: int, device, dtype, on_gpu: bool):
    """(name, shape, {way: [a call for each set]}, truth, error allowed for ours, bytes, FLOPs): one after the other."""
    def each(function):
        return [lambda *args, i=i: function(i) for i in range(SETS)]

    w = [torch.randn(N, K, device=device, dtype=dtype) for _ in range(SETS)]
    bytes_of = {"nf4": N * K * 4.127 / 8, "int4": N * K * (4 + 32 / 128) / 8, "8 bit": N * K}
    element = w[0].element_size()
    functional = bitsandbytes() if on_gpu else None

    q = [nf4_quantize(t) for t in w]
    ways = {"ours": each(lambda i: nf4_dequantize(q[i])),
            "reference": each(lambda i: nf4_dequantize_reference(q[i], dtype))}
    if functional:
        pairs = [functional.quantize_4bit(t, blocksize=64, quant_type="nf4", compress_statistics=True) for t in w]
        ways["bitsandbytes"] = each(lambda i: functional.dequantize_4bit(*pairs[i]))
    truth = nf4_dequantize_reference(q[0], torch.float64)
    yield "nf4 dequantize", f"({N}, {K})", ways, truth, 2**-8, bytes_of["nf4"] + N * K * element, 0

    for rows in (1, 4, 16, 64, big):
        x = [torch.randn(rows, K, device=device, dtype=dtype) for _ in range(SETS)]
        ways = {"ours": each(lambda i: nf4_linear(x[i], q[i])),
                "reference": each(lambda i: nf4_linear_reference(x[i], q[i])),
                "plain weight": each(lambda i: F.linear(x[i], w[i]))}
        if functional:
            import bitsandbytes as bnb
            ways["bitsandbytes"] = each(lambda i: bnb.matmul_4bit(x[i], pairs[i][0].t(), quant_state=pairs[i][1]))
        moved, truth = bytes_of["nf4"] + rows * (N + K) * element, nf4_linear_reference(x[0].double(), q[0])
        yield "nf4 linear", f"({rows}, {K}) x ({N}, {K})", ways, truth, 2**-6, moved, 2 * rows * N * K
    del q, ways

    q = [int4_quantize(t) for t in w]
    ways = {"ours": each(lambda i: int4_dequantize(q[i])),
            "reference": each(lambda i: int4_dequantize_reference(q[i], dtype))}
    truth = int4_dequantize_reference(q[0], torch.float64)
    yield "int4 dequantize", f"({N}, {K})", ways, truth, 2**-8, bytes_of["int4"] + N * K * element, 0
    theirs = [torch_int4(t) for t in q] if on_gpu else None
    layers = [torchao(t, "int4") for t in w] if on_gpu else [None]
    for rows in (1, 4, 16, 64, big):
        x = [torch.randn(rows, K, device=device, dtype=dtype) for _ in range(SETS)]
        ways = {"ours": each(lambda i: int4_linear(x[i], q[i])),
                "reference": each(lambda i: int4_linear_reference(x[i], q[i])),
                "plain weight": each(lambda i: F.linear(x[i], w[i]))}
        if theirs:
            ways["_weight_int4pack_mm"] = each(lambda i: theirs[i](x[i]))
        if None not in layers:
            ways["torchao"] = each(lambda i: layers[i](x[i]))
        moved, truth = bytes_of["int4"] + rows * (N + K) * element, int4_linear_reference(x[0].double(), q[0])
        yield "int4 linear, groups of 128", f"({rows}, {K}) x ({N}, {K})", ways, truth, 2**-6, moved, 2 * rows * N * K
    del q, ways, theirs, layers

    for code in (torch.int8, torch.float8_e4m3fn):
        q = [quantize_rows(t, code) for t in w]
        layers = [torchao(t, str(code)[6:]) for t in w] if on_gpu else [None]
        for rows in (16, big):
            x = [torch.randn(rows, K, device=device, dtype=dtype) for _ in range(SETS)]
            ways = {"ours": each(lambda i: linear_8bit(x[i], *q[i])),
                    "reference": each(lambda i: linear_reference(x[i], *q[i])),
                    "plain weight": each(lambda i: F.linear(x[i], w[i]))}
            if None not in layers:
                ways["torchao"] = each(lambda i: layers[i](x[i]))
            moved, truth = bytes_of["8 bit"] + rows * (N + K) * element, linear_reference(x[0].double(), *q[0])
            flops = rows * N * K  # counted half: 8-bit tensor cores have twice the rate of bf16
            yield f"{str(code)[6:]} linear", f"({rows}, {K}) x ({N}, {K})", ways, truth, 2**-6, moved, flops
    del q, ways


def check(way: str, call, truth, allowed: float) -> float:
    error = ((call().double() - truth).abs().max() / truth.abs().max()).item()
    if way == "ours" and not error <= allowed:
        raise SystemExit(f"error {error:.1e}, allowed {allowed:.1e}")
    return error


def adam_error(device, dtype) -> float:
    """Of the parameters after one step of ours, against float64: the largest, over the largest parameter."""
    param, grad = (torch.randn(4096, device=device, dtype=dtype) for _ in range(2))
    truth, state = param.double(), adam8bit_state(param)
    adam8bit_update_reference(truth, grad.double(), *(t.clone() for t in state), *ADAM.values(), 1)
    adam8bit_update(param, grad, *state, **ADAM, step=1)
    return ((param.double() - truth).abs().max() / truth.abs().max()).item()


def adam(n: int, device, dtype, on_gpu: bool):
    """{way: call} of one optimizer step over n numbers; the least bytes it moves."""
    param = torch.randn(n, device=device, dtype=dtype)
    grad, state = torch.randn_like(param), adam8bit_state(param)
    element = param.element_size()
    yield ("ours", lambda: adam8bit_update(param, grad, *state, **ADAM, step=10)) if on_gpu else (
        "reference", lambda: adam8bit_update_reference(param, grad, *state, *ADAM.values(), 10))
    if functional := bitsandbytes() if on_gpu else None:
        signed, unsigned = (functional.create_dynamic_map(s).to(device) for s in (True, False))
        yield "bitsandbytes", lambda: functional.optimizer_update_8bit_blockwise(
            "adam", grad, param, state[0], state[2], 0.9, 0.95, 0.0, 0.0, 1e-8, 10, 1e-3, signed, unsigned, state[1],
            state[3], 0.1, 1.0, False)
    del state
    parameter = torch.nn.Parameter(param)
    parameter.grad = grad
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.95), fused=True, capturable=on_gpu)
    if importlib.util.find_spec("torchao") and on_gpu:
        from torchao.optim import AdamW8bit
        yield "torchao AdamW8bit", AdamW8bit([parameter], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1).step
    yield f"AdamW fused, state of {element * 8} bits", optimizer.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, and nothing is written")
    parser.add_argument("--record", action="store_true", help="write the results of a CPU too")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    smoke = options.smoke or not on_gpu
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    if not on_gpu:
        print("no GPU: small sizes; ours is checked in Triton's interpreter, whose time means nothing")
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    N, K, big, n = (256, 512, 128, 2**16) if smoke else (14336, 4096, 8192, 10**9)
    copy, matmul = speeds(device) if on_gpu else (None, None)
    rows = [{"kernel": "copy", "tb_per_second": round(copy / 1e12, 3)},
            {"kernel": "bf16 matmul", "tflops": round(matmul / 1e12)}] if on_gpu else []

    def measure(name, shape, way, calls, error, moved, flops):
        times = (gpu_times if on_gpu else cpu_times)(calls)
        median, low, high = statistics.median(times), *statistics.quantiles(times, n=10)[::8]
        row = {"kernel": name, "shape": shape, "dtype": str(dtype)[6:], "way": way,
               "error": error and float(f"{error:.2g}"), "microseconds": round(median * 1e6, 2),
               "p10": round(low * 1e6, 2), "p90": round(high * 1e6, 2)}
        if on_gpu:
            row["share_of_floor"] = round(max(moved / copy, flops / matmul) / median, 3)
        rows.append(row)
        print(f"{name:28} {shape:30} {way:28} {row['microseconds']:10.2f} us ({row['p10']:.2f} .. {row['p90']:.2f})"
              + (f", {row['share_of_floor']:.2f} of the floor" if on_gpu else ""), flush=True)

    for name, shape, ways, truth, allowed, moved, flops in cases(N, K, big, device, dtype, on_gpu):
        for way, calls in ways.items():
            try:
                error = check(way, calls[0], truth, allowed)
                if way != "ours" or on_gpu:
                    measure(name, shape, way, calls, error, moved, flops)
                    continue
                note = "ours, the reference serves" if "float8" in name else "ours, interpreted"
                rows.append({"kernel": name, "shape": shape, "way": note, "error": float(f"{error:.2g}")})
                print(f"{name:28} {shape:30} {note:28} error {error:.1e}, allowed {allowed:.1e}", flush=True)
            except Exception as failure:  # a peer that refuses these inputs is named, and left out
                if way == "ours":
                    raise
                print(f"{name} {shape} {way} is left out: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
    element = torch.finfo(dtype).bits // 8
    error = adam_error(device, dtype)
    print(f"{'Adam step':28} {'':30} {'ours':28} error {error:.1e}, allowed {torch.finfo(dtype).eps:.1e}", flush=True)
    if not error <= torch.finfo(dtype).eps:
        raise SystemExit("Adam's error is larger than allowed")
    if not on_gpu:
        rows.append({"kernel": "Adam step", "way": "ours, interpreted", "error": float(f"{error:.2g}")})
    for way, call in adam(n, device, dtype, on_gpu):
        least = n * (3 * element + (4 * element if "fused" in way else 4 + 16 / 256))
        measure("Adam step", f"{n:.0e} numbers", way, [call], error if way == "ours" else None, least, 0)
    if options.record or on_gpu and not smoke:
        write_results("low_bit", rows, quiet=True)


if __name__ == "__main__":
    main()
