"""Plans a training run: what each layout holds, sends and takes, which one to choose, and how many days and dollars.

    weights on a GPU     P = layers / pp x weights of a layer / tp + embedding and head, if its stage has them
    states               4 P + 4 P + 8 P bytes, ZeRO dividing what it divides by dp x cp         (float32, autocast)
    activations          tokens x (26 h + 4 (H + Hkv) D + 8 f) bytes of each layer, x microbatches in flight
    sent in a step       dp: 2, 2, k + 1 or 3 k times P; tp: 4 all-reduces of (tokens, h) a layer; pp: (tokens, h) twice
    time                 FLOPs / (peak x efficiency) x (1 + bubble) + what communication compute cannot hide

The numbers of memory are those that the tests measure; time is an estimate that ranks layouts, its constants are flags.

    python parallel/plan.py --preset 8b --gpus 64 --memory_gib 80 --tokens 1e12
    python parallel/plan.py --preset 70b --gpus 256 --memory_gib 80 --seq_len 8192 --global_batch_size 1024

Formulas: ZeRO arXiv:1910.02054; tensor parallelism and activations Korthikanti et al. arXiv:2205.05198, for SwiGLU,
grouped-query attention and a fused attention kernel, which keeps no scores; bubbles arXiv:2104.04473, section 2.2.
"""

import argparse
from typing import NamedTuple


class Shape(NamedTuple):
    """A decoder-only model, its sizes in the order that one writes them."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer(self) -> int:  # weights
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def table(self) -> int:  # weights of the embedding; the head has as many
        return self.vocab * self.hidden

    @property
    def numel(self) -> int:
        return self.layers * self.layer + self.hidden + self.table * (1 if self.tied else 2)

    def flops_per_token(self, seq_len: int) -> int:
        """Forward and backward, recomputation apart: 6 N + 12 L H D S, the table of a lookup left out."""
        attention = 12 * self.layers * self.heads * self.head_dim * seq_len
        return 6 * (self.layers * self.layer + self.hidden + self.table) + attention


PRESETS = {"124m": Shape(768, 2048, 12, 12, 12, 50304, True), "350m": Shape(1024, 2752, 24, 16, 16, 50304, True),
           "1b": Shape(2048, 8192, 16, 32, 8, 128256, True), "8b": Shape(4096, 14336, 32, 32, 8, 128256),
           "70b": Shape(8192, 28672, 80, 64, 8, 128256), "405b": Shape(16384, 53248, 126, 128, 8, 128256)}


class Layout(NamedTuple):
    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    zero: int = 0
    micro_batch: int = 1  # sequences per forward pass and data-parallel rank
    recompute: bool = False  # activation_checkpointing full

    def flags(self) -> str:
        words = [f"--{axis} {n}" for axis, n in zip(("tp", "pp", "cp"), (self.tp, self.pp, self.cp)) if n > 1]
        words += ["--sequence_parallel"] * (self.tp > 1)
        words += [f"--zero {self.zero}"] * (self.zero > 0) + [f"--micro_batch_size {self.micro_batch}"]
        return " ".join(words + ["--activation_checkpointing full"] * self.recompute)


class Machine(NamedTuple):
    memory: float = 80e9  # bytes a GPU has
    peak: float = 989e12  # FLOP/s in bfloat16: an H100
    efficiency: float = 0.5  # of the peak that a GPU reaches alone
    node: int = 8  # GPUs joined by the fast link
    fast: float = 450e9  # bytes/s out of a GPU within its node
    slow: float = 50e9  # between nodes


def activation_bytes(shape: Shape, tp: int = 1) -> float:
    """Bytes that a layer keeps per token for backward, under bfloat16 autocast, a fused attention keeping no scores:

    16 h     float32 input and normalised input of both norms, whose residual stream autocast leaves in float32
    10 h     bfloat16 inputs of q, k, v, gate and up: autocast makes a copy for each; whole on each rank of tp
    rest     q and the attention's output 4 H D, k and v 4 Hkv D, logsumexp 4 H; gate, up, silu, product 8 f; norms 8
    """
    heads = 4 * (shape.heads + shape.kv_heads) * shape.head_dim + 4 * shape.heads
    return 10 * shape.hidden + (16 * shape.hidden + heads + 8 * shape.intermediate + 8) / tp


def stage_weights(shape: Shape, layout: Layout) -> int:
    """Weights on the fullest GPU, before ZeRO: of the first or last pipeline stage."""
    layers = -(-shape.layers // layout.pp) * shape.layer
    tables = shape.table * (1 if shape.tied or layout.pp > 1 else 2)
    return (layers + tables) // layout.tp


def memory(shape: Shape, layout: Layout, seq_len: int, microbatches: int) -> dict[str, float]:
    """Bytes on the fullest GPU: parameters, gradients, optimizer, gathered units, autocast's bfloat16 copies of the
    weights (ZeRO-3 gathers in bfloat16 and has none), activations (with sequence parallelism if tp > 1), logits."""
    P, n = stage_weights(shape, layout), layout.dp * layout.cp
    split = [n if layout.zero >= stage else 1 for stage in (3, 2, 1)]
    tokens = layout.micro_batch * seq_len // layout.cp
    layers = -(-shape.layers // layout.pp)
    of_layer = tokens * activation_bytes(shape, layout.tp)
    border = 4 * tokens * shape.hidden / layout.tp  # the residual stream between layers
    copies = 0 if layout.zero == 3 else 2 * (shape.layer / layout.tp if layout.recompute else P)
    in_flight = min(layout.pp, microbatches)  # 1F1B's first stage
    kept = in_flight * layers * border + of_layer if layout.recompute else in_flight * layers * of_layer
    return {"parameters": 4 * P / split[0], "gradients": 4 * P / split[1], "optimizer": 8 * P / split[2],
            "units": 2 * 2 * shape.layer / layout.tp * (layout.zero == 3 and n > 1), "copies": copies,
            "activations": kept, "logits": 10 * tokens * shape.vocab / layout.tp}  # bfloat16, float32, its gradient


def traffic(shape: Shape, layout: Layout, seq_len: int, microbatches: int) -> dict[str, float]:
    """Bytes that a GPU sends in a step, by axis; rings, gradients and weights in float32, activations in bfloat16."""
    P, n, t, c, k = stage_weights(shape, layout), layout.dp * layout.cp, layout.tp, layout.cp, microbatches
    tokens, layers = layout.micro_batch * seq_len // c, -(-shape.layers // layout.pp)
    ring = lambda ranks: (ranks - 1) / ranks  # noqa: E731
    border = 2 * tokens * shape.hidden
    keys = 2 * 2 * tokens * shape.kv_heads * shape.head_dim / t  # K and V of this rank's tokens
    return {"dp": (2, 2, k + 1, 3 * k)[layout.zero] * 4 * P * ring(n),
            "tp": k * (4 * layers + 2 / layout.pp) * 2 * border * ring(t) * (5 / 4 if layout.recompute else 1),
            "pp": k * 2 * border * (layout.pp > 1),
            "cp": k * layers * keys * (2 * (c - 1) + c * (c > 1))}  # c - 1 hops forward; c - 1 and c of gradients back


def step_seconds(shape: Shape, layout: Layout, seq_len: int, microbatches: int, machine: Machine) -> dict[str, float]:
    """Estimated seconds of a step: compute, bubble, and the communication that is not hidden behind compute.

    Gradients of dp hide behind backward's last microbatch, ZeRO's gathers behind all of it; tp hides behind nothing.
    """
    world = layout.dp * layout.tp * layout.pp * layout.cp
    tokens = layout.micro_batch * seq_len * microbatches * layout.dp
    compute = tokens * shape.flops_per_token(seq_len) / world / (machine.peak * machine.efficiency)
    compute *= 4 / 3 if layout.recompute else 1
    sent = traffic(shape, layout, seq_len, microbatches)
    inside = layout.tp * layout.cp * layout.dp <= machine.node
    dp = sent["dp"] / (machine.fast if inside else machine.slow)
    hidden = 0.9 * compute if layout.zero >= 2 else 2 / 3 * compute / microbatches
    return {"compute": compute, "bubble": compute * (layout.pp - 1) / microbatches,
            "tp": sent["tp"] / (machine.fast if layout.tp <= machine.node else machine.slow),
            "dp": max(dp - hidden, 0.0), "pp": 0.1 * sent["pp"] / machine.slow,
            "cp": 0.2 * sent["cp"] / (machine.fast if layout.tp * layout.cp <= machine.node else machine.slow)}


def divisors(n: int, most: int) -> list[int]:
    return [k for k in range(1, min(n, most) + 1) if n % k == 0]


def plans(shape: Shape, gpus: int, machine: Machine, seq_len: int, global_batch: int) -> list[tuple]:
    """All layouts that fit, the fastest first: (tokens per second, layout, memory, seconds). ValueError: none does."""
    found, least = [], None
    for tp in divisors(gpus, machine.node):
        for pp in divisors(gpus // tp, shape.layers):
            for cp in divisors(gpus // tp // pp, 8 if seq_len >= 16384 else 1):
                dp = gpus // tp // pp // cp
                if shape.heads % tp or shape.kv_heads % tp or global_batch % dp or seq_len % (2 * cp):
                    continue
                for micro in (m for m in (1, 2, 4, 8, 16, 32) if global_batch // dp % m == 0):
                    microbatches = global_batch // dp // micro
                    for zero in (0, 1, 2, 3) if dp * cp > 1 and pp == 1 else (0, 1) if dp * cp > 1 else (0,):
                        for recompute in (False, True):
                            layout = Layout(dp, tp, pp, cp, zero, micro, recompute)
                            needs = memory(shape, layout, seq_len, microbatches)
                            total = sum(needs.values())
                            least = total if least is None else min(least, total)
                            if total <= 0.9 * machine.memory:  # the rest: fragments, workspaces, NCCL
                                seconds = step_seconds(shape, layout, seq_len, microbatches, machine)
                                speed = global_batch * seq_len / sum(seconds.values())
                                found.append((speed, layout, needs, seconds))
    if not found:
        fits = "no layout divides the batch" if least is None else f"the leanest layout needs {least / 1e9:.0f} GB each"
        raise ValueError(f"{shape.numel / 1e9:.1f}B weights do not fit {gpus} GPUs of {machine.memory / 1e9:.0f} GB: "
                         f"{fits}; "
                         "take more GPUs, a shorter --seq_len, or --offload")

    def order(plan: tuple) -> tuple:  # of equally fast ones the simplest, with passes of up to 16 k tokens
        layout = plan[1]
        tokens = min(layout.micro_batch * seq_len, 2**14)
        return -round(plan[0], -2), layout.pp, layout.tp, layout.cp, layout.zero, -tokens

    return sorted(found, key=order)


def days_and_cost(tokens: float, tokens_per_second: float, gpus: int, price: float) -> tuple[float, float]:
    """Days to train on `tokens`, and their cost at `price` per GPU and hour."""
    seconds = tokens / tokens_per_second
    return seconds / 86400, seconds / 3600 * gpus * price


def main() -> None:
    parser = argparse.ArgumentParser(description="Which layout to train with, what it holds and sends, days and cost.")
    parser.add_argument("--preset", choices=PRESETS, default="8b", help="the model's shape")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--memory_gib", type=float, default=80)
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--peak_tflops", type=float, default=989, help="of a GPU in bfloat16 (H100: 989, A100: 312)")
    parser.add_argument("--efficiency", type=float, default=0.5, help="share of the peak that a GPU reaches alone")
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--global_batch_size", type=int, default=1024, help="sequences")
    parser.add_argument("--tokens", type=float, default=1e12, help="to train on")
    parser.add_argument("--price", type=float, default=2.5, help="dollars per GPU and hour")
    parser.add_argument("--rows", type=int, default=6)
    a = parser.parse_args()
    shape = PRESETS[a.preset]
    machine = Machine(a.memory_gib * 2**30, a.peak_tflops * 1e12, a.efficiency, a.gpus_per_node)
    try:
        best = plans(shape, a.gpus, machine, a.seq_len, a.global_batch_size)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{a.preset}: {shape.numel / 1e9:.2f}B weights, {shape.flops_per_token(a.seq_len) / 1e9:.1f} GFLOP a token; "
          f"{a.gpus} GPUs of {a.memory_gib:g} GiB; global batch {a.global_batch_size} x {a.seq_len} tokens\n")
    print(f"{'dp':>4}{'tp':>4}{'pp':>4}{'cp':>4}{'zero':>5}{'micro':>6}{'ckpt':>5} |{'states':>8}{'activ.':>8}"
          f"{'all GiB':>8} |{'compute':>8}{'bubble':>7}{'comm.':>7} s |{'tokens/s/GPU':>13}{'MFU':>5}")
    kinds = {}
    for plan in best:  # of each way to cut, the best
        kinds.setdefault(plan[1][:5], plan)
    for speed, layout, needs, seconds in list(kinds.values())[: a.rows]:
        states = sum(needs[name] for name in ("parameters", "gradients", "optimizer", "units", "copies"))
        kept, other = needs["activations"] + needs["logits"], sum(seconds[name] for name in ("tp", "dp", "pp", "cp"))
        mfu = speed * shape.flops_per_token(a.seq_len) / (a.gpus * machine.peak)
        print(f"{layout.dp:4}{layout.tp:4}{layout.pp:4}{layout.cp:4}{layout.zero:5}{layout.micro_batch:6}"
              f"{'full' if layout.recompute else '-':>5} |{states / 2**30:8.1f}{kept / 2**30:8.1f}"
              f"{sum(needs.values()) / 2**30:8.1f} |{seconds['compute']:8.2f}{seconds['bubble']:7.2f}{other:7.2f}   |"
              f"{speed / a.gpus:13,.0f}{mfu:5.0%}")
    speed, layout, *_ = best[0]
    days, cost = days_and_cost(a.tokens, speed, a.gpus, a.price)
    print(f"\nrecommended: {layout.flags()}\n{a.tokens:.3g} tokens: {days:,.1f} days, {cost:,.0f} dollars at "
          f"{a.price:g} per GPU and hour (estimates: see the docstring)")


if __name__ == "__main__":
    main()
