"""A whole training step with our kernels and with PyTorch's: tokens per second, MFU, peak memory, in one run.

    python bench/bench_train_step.py                # on a GPU: Llama 3.2 1B's shape, 32k words, 4096 tokens, bfloat16
    python bench/bench_train_step.py --steps 3      # on a CPU: a toy, to see that it runs; --record writes it too

A step is what train_pretrain.py does: forward under autocast, backward, clipping, AdamW; both ways compiled. Before it
is timed, the losses of the first steps of both ways are compared. MFU counts 6 N + 12 L H D S FLOPs per token
(model.flops_per_token), no recomputation, over the dense bfloat16 peak of the GPU's data sheet.
"""

import argparse
import contextlib
import gc
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.results_io import write_results  # noqa: E402
from metrics import peak_flops  # noqa: E402
from model import CausalLM, ModelConfig, flops_per_token, num_parameters  # noqa: E402
from optim import build_optimizer, clip_grad_norm  # noqa: E402
from train_pretrain import PRESETS, batch_loss  # noqa: E402

WAYS = {"PyTorch": {"attention": "sdpa", "kernels": "torch"}, "ours": {"attention": "triton", "kernels": "triton"},
        "ours, PyTorch's attention": {"attention": "sdpa", "kernels": "triton"}}


def prepare(way: dict, args, device: torch.device):
    """A function that makes one step and returns its loss, a tensor."""
    shape = PRESETS["1b" if device.type == "cuda" else "1m"]
    config = ModelConfig(args.vocab_size, max_position_embeddings=args.seq_len, **shape | way)
    model = CausalLM(config).to(device)
    model.model.activation_checkpointing = args.activation_checkpointing
    optimizer = build_optimizer("adamw", model.named_parameters(), lr=1e-4, weight_decay=0.1)
    loss_of = torch.compile(batch_loss) if device.type == "cuda" else batch_loss
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    generator = torch.Generator().manual_seed(0)
    counted = torch.tensor(float(args.batch_size * args.seq_len), device=device)

    def step() -> torch.Tensor:
        tokens = torch.randint(args.vocab_size, (args.batch_size, args.seq_len + 1), generator=generator).to(device)
        with autocast:
            loss = loss_of(model, tokens[:, :-1], tokens[:, 1:], None, counted)
        loss.backward()
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return config, step


def measure(name: str, way: dict, args, device: torch.device) -> dict:
    config, step = prepare(way, args, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    losses = [step().item() for _ in range(3)]  # compiles, fills caches
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - start)
    seconds.sort()
    speed = args.batch_size * args.seq_len / statistics.median(seconds)
    peak = peak_flops(device, "bfloat16")
    return {"way": name, "parameters": num_parameters(config), "seq_len": args.seq_len, "batch_size": args.batch_size,
            "ms": 1e3 * statistics.median(seconds), "ms_p10": 1e3 * seconds[len(seconds) // 10],
            "ms_p90": 1e3 * seconds[len(seconds) * 9 // 10], "tokens_per_second": speed,
            "mfu": peak and speed * flops_per_token(config, args.seq_len) / peak,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None, "losses": losses}


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("seq_len", 4096 if cuda else 64), ("batch_size", 4 if cuda else 2),
                        ("vocab_size", 32768 if cuda else 512), ("steps", 20 if cuda else 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--activation_checkpointing", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--record", action="store_true", help="write the results of a CPU too")
    args = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    rows = []
    for name, way in WAYS.items():
        rows.append(measure(name, way, args, device))
        print({key: value for key, value in rows[-1].items() if value is not None}, flush=True)
        torch.compiler.reset()
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    losses = [row.pop("losses") for row in rows]
    apart = max(abs(a - b) / a for some in losses for a, b in zip(losses[0], some))
    if not apart < 1e-2:  # 16 bits; on a CPU it is 1e-6
        sys.exit(f"the losses of the first steps differ by {apart:.1e} of their size: {losses}")
    for row in rows:
        row["times_pytorch"] = rows[0]["ms"] / row["ms"]
    if cuda or args.record:
        write_results("train_step", rows)


if __name__ == "__main__":
    main()
