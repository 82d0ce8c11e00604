"""RMSNorm, RoPE and SwiGLU: our kernels beside PyTorch, torch.compile and Liger, forward and backward.

    python bench/bench_layers.py            # with a GPU: writes bench/results/layers.json
    python bench/bench_layers.py --smoke    # small sizes; chosen by itself without a GPU: ours is then checked in
                                            # Triton's interpreter, and only PyTorch is timed
    python bench/bench_layers.py --record   # writes bench/results/layers.json from a CPU too

Every way is first compared with float64: the largest error of outputs and gradients over the tensor's maximum. Times
are those of CUDA graphs of several calls, which go round a few sets of inputs larger than the L2 cache: median, and the
10th and 90th percentile of the replays. `share_of_copy` is the time in which this GPU, in the same run, copies as many
bytes as the pass must move at least (each input read once, each output written once), over the time measured.
"""

import argparse
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch._functorch.config

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.results_io import write_results  # noqa: E402
from kernels.rms_norm import rms_norm, rms_norm_reference  # noqa: E402
from kernels.rope import apply_rope, rope_reference, rope_tables, token_positions  # noqa: E402
from kernels.swiglu import swiglu, swiglu_reference  # noqa: E402

SETS, ROUNDS, REPLAYS = 3, 3, 30  # sets of inputs; calls per set in a graph; timed replays


def liger(name: str):
    """Liger's function of that name, or None where Liger is not installed or too old to have it."""
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        return None
    return getattr(functional, name, None)


def cases(smoke: bool, device: torch.device):
    """(name, shapes of the differentiable inputs, constants, plain function, {way: function}) of each row group."""
    tokens, hidden, intermediate = (64, 256, 512) if smoke else (16384, 4096, 14336)
    heads, kv_heads, D = (4, 2, 32) if smoke else (32, 8, 128)  # Llama 3 8B's

    def norm(x, weight):
        return rms_norm_reference(x, weight)

    def add_norm(x, residual, weight):
        return rms_norm_reference(x, weight, residual=residual)

    def liger_rope(function, q, k, cos, sin):
        cos, sin = (torch.cat((t, t), dim=-1)[:, :, 0].to(q.dtype) for t in (cos, sin))
        return tuple(t.transpose(1, 2) for t in function(q.transpose(1, 2), k.transpose(1, 2), cos, sin)[:2])

    norms = {"ours": rms_norm, "torch rms_norm": lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-6)}
    if function := liger("liger_rms_norm"):
        norms["liger"] = lambda x, w: function(x, w, 1e-6)
    add_norms = {"ours": lambda x, residual, w: rms_norm(x, w, residual=residual)}
    if fused := liger("liger_fused_add_rms_norm"):
        add_norms["liger"] = lambda x, residual, w: fused(x, residual, w, 1e-6)
    ropes = {"ours": apply_rope} | ({"liger": partial(liger_rope, turn)} if (turn := liger("liger_rope")) else {})
    gates = {"ours": swiglu} | ({"liger": gate} if (gate := liger("liger_swiglu")) else {})

    S = min(tokens, 4096)
    tables = rope_tables(token_positions(1, S, device=device), D)
    yield "rms_norm", [(tokens, hidden), (hidden,)], (), norm, norms
    yield "rms_norm + residual", [(tokens, hidden), (tokens, hidden), (hidden,)], (), add_norm, add_norms
    yield "rms_norm of heads", [(tokens // S, S, heads, D), (D,)], (), norm, norms
    yield "rope", [(tokens // S, S, heads, D), (tokens // S, S, kv_heads, D)], tables, rope_reference, ropes
    yield "swiglu", [(tokens, intermediate)] * 2, (), swiglu_reference, gates


def as_tuple(out) -> tuple:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def make_set(shapes, constants, plain, device, dtype):
    """Leaves of these shapes, and upstream gradients for the outputs of `plain`."""
    leaves = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
    with torch.no_grad():
        upstream = [torch.randn_like(out) for out in as_tuple(plain(*leaves, *constants))]
    return leaves, upstream


def error(function, plain, shapes, constants, device, dtype) -> float:
    """The largest error of outputs and gradients against float64, over the tensor's maximum, on fresh inputs."""
    leaves, upstream = make_set(shapes, constants, plain, device, dtype)

    def run(function, dtype, constants):
        inputs = [leaf.detach().clone().to(dtype).requires_grad_() for leaf in leaves]
        # Liger turns q and k, and its norm the upstream gradient, in place: give it copies that are no leaves
        out = as_tuple(function(*(t * 1 for t in inputs), *constants))
        gradients = torch.autograd.grad(out, inputs, [u.to(dtype) * 1 for u in upstream])
        return [*out, *gradients]

    truths = run(plain, torch.float64, [c.double() for c in constants])
    return max(((ours - truth).abs().max() / truth.abs().max()).item()
               for ours, truth in zip(run(function, dtype, constants), truths))


def gpu_times(function, sets, constants, backward: bool) -> list[float]:
    """Seconds per call, one for each replay of a graph of SETS * ROUNDS calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # backward runs on the stream of its forward pass, so both belong to the graph's
        if backward:
            outs = [as_tuple(function(*(leaf.view_as(leaf) for leaf in leaves), *constants)) for leaves, _ in sets]
            calls = [partial(torch.autograd.grad, out, leaves, upstream, retain_graph=True)
                     for out, (leaves, upstream) in zip(outs, sets)]
        else:
            calls = [partial(function, *(leaf.detach() for leaf in leaves), *constants) for leaves, _ in sets]
        for call in calls:  # compiles, and warms up
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls * ROUNDS:
            call()
    times = []
    for replay in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls) / ROUNDS)
    return times[3:]


def cpu_times(function, sets, constants, backward: bool) -> list[float]:
    times = []
    for leaves, upstream in sets * 10:
        out = as_tuple(function(*leaves, *constants)) if backward else ()
        start = time.perf_counter()
        torch.autograd.grad(out, leaves, upstream) if backward else function(*(t.detach() for t in leaves), *constants)
        times.append(time.perf_counter() - start)
    return times


def copy_speed(device: torch.device) -> float:
    """Bytes per second, read and written ones together, of the device's own copy of a GB."""
    source, target = (torch.empty(2**30, dtype=torch.uint8, device=device).random_(0, 255) for _ in range(2))
    times = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * 2**30 / statistics.median(times[3:])


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
    speed = copy_speed(device) if on_gpu else None
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # else a compiled backward pass runs but once
    rows = [{"kernel": "copy", "gb_per_second": round(speed / 1e9)}] if on_gpu else []
    for name, shapes, constants, plain, ways in cases(smoke, device):
        torch._dynamo.reset()  # each group starts with no shapes seen, or the limit of recompilations would be met
        ways = {"plain": plain} | ({"compiled": torch.compile(plain, dynamic=False)} | ways if on_gpu else
                                   {"ours": ways["ours"]})
        small = [(shape[0] // 8, *shape[1:]) if len(shape) == 2 and not smoke else shape for shape in shapes]
        allowed = 2 * error(plain, plain, small, constants, device, dtype) + torch.finfo(dtype).eps
        sets = [make_set(shapes, constants, plain, device, dtype) for _ in range(SETS)]
        leaves, upstream = sets[0]
        read, written = (sum(t.numel() * t.element_size() for t in tensors) for tensors in (leaves, upstream))
        saved = 0 if name == "rope" else read  # what backward reads besides the upstream gradient; it writes as much
        for way, function in ways.items():
            wrong = error(function, plain, small, constants, device, dtype)
            if way == "ours" and not wrong <= allowed:
                raise SystemExit(f"{name}: error {wrong:.1e}, allowed {allowed:.1e}")
            row = {"kernel": name, "shape": " + ".join(map(str, shapes)), "dtype": str(dtype)[6:], "way": way,
                   "error": float(f"{wrong:.2g}")}
            if way == "ours" and not on_gpu:
                rows.append(row | {"way": "ours, interpreted"})
                print(f"{name:20} {'':8} ours, interpreted: error {wrong:.1e}, allowed {allowed:.1e}")
                continue
            for backward, least in ((False, read + written), (True, saved + written + read)):
                if name == "rms_norm + residual" and backward:  # reads the sum; one gradient for x and residual
                    least = 4 * leaves[0].numel() * leaves[0].element_size()
                times = (gpu_times if on_gpu else cpu_times)(function, sets, constants, backward)
                median, low, high = statistics.median(times), *statistics.quantiles(times, n=10)[::8]
                row = row | {"pass": "backward" if backward else "forward", "microseconds": round(median * 1e6, 1),
                             "p10": round(low * 1e6, 1), "p90": round(high * 1e6, 1),
                             "gb_per_second": round(least / median / 1e9, 1)}
                row |= {"share_of_copy": round(least / speed / median, 3)} if on_gpu else {}
                rows.append(row)
                print(f"{name:20} {row['pass']:8} {way:14} {row['microseconds']:9.1f} us ({row['p10']:.1f} .. "
                      f"{row['p90']:.1f}), {row['gb_per_second']:6.1f} GB/s, error {wrong:.1e}")
        del sets, leaves, upstream
    if options.record or on_gpu and not smoke:
        write_results("layers", rows, quiet=True)


if __name__ == "__main__":
    main()
