"""What overlap gains, on gloo processes of this machine, in turns within one run.

    python bench/bench_parallel.py                     # 2 processes; the best of several rounds of each way, in turns

DDP: a model of many small tensors; the same step with one all-reduce per parameter after backward, with one flat
all-reduce of everything after backward, and with parallel/ddp.py's buckets. ZeRO-3: larger layers, and a link on which
each all-gather takes as long as a unit's forward (measured first); with and without prefetch, and with no delay beside
them. gloo's own speed says nothing about a GPU's; the ratios show that messages travel while ranks compute.
"""

import argparse
import socket
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.results_io import write_results  # noqa: E402
from model import CausalLM, ModelConfig  # noqa: E402
from parallel.ddp import DDP, reduce_gradients  # noqa: E402
from parallel.fsdp import FSDP, named, units  # noqa: E402

SMALL = dict(vocab_size=512, hidden_size=64, num_hidden_layers=16, num_attention_heads=2, intermediate_size=128)
LARGE = dict(vocab_size=512, hidden_size=128, num_hidden_layers=8, num_attention_heads=4)


def flat_reduce(parameters: list) -> None:
    """One message: copy all gradients together, sum, copy back."""
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p))


class SlowLink:
    """Within, what an all-gather brings is there `seconds` after it began: as over a long cable."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"

    def __enter__(self):
        original = self.original = named("all_gather_single", "all_gather_into_tensor")
        seconds = self.seconds

        class Arriving:
            def __init__(self, work):
                self.work, self.at = work, time.perf_counter() + seconds

            def wait(self):
                self.work.wait()
                time.sleep(max(0.0, self.at - time.perf_counter()))

        setattr(dist, self.name, lambda *args, **kwargs: Arriving(original(*args, **kwargs)))

    def __exit__(self, *error):
        setattr(dist, self.name, self.original)


def timed(step, repeats: int) -> float:
    """Seconds of a step, all ranks together."""
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    dist.barrier()
    return (time.perf_counter() - begin) / repeats


def ddp_ways(batch: int, length: int) -> tuple[dict, dict]:
    ways = {}
    ids = torch.randint(512, (batch, length))
    for name in ("backward alone", "all-reduce per parameter", "one flat all-reduce", "buckets (DDP)"):
        model = CausalLM(ModelConfig(**SMALL))
        parameters = list(model.parameters())
        ddp = DDP(parameters, dist.group.WORLD if "DDP" in name else None, bucket_bytes=2**21)

        def step(name=name, model=model, parameters=parameters, ddp=ddp):
            with ddp.microbatch():
                model(ids).square().mean().backward()
            if "per parameter" in name:
                reduce_gradients(parameters, dist.group.WORLD)
            elif "flat" in name:
                flat_reduce(parameters)
            model.zero_grad()

        ways[name] = step
    return ways, {"parameters": len(parameters), "numbers": sum(p.numel() for p in parameters), "buckets": len(ddp.buckets)}


def fsdp_ways(batch: int, length: int) -> tuple[dict, dict]:
    ids, steps = torch.randint(512, (batch, length)), {}
    for prefetch in (False, True):
        model = CausalLM(ModelConfig(**LARGE))
        fsdp = FSDP(units(model), dist.group.WORLD, prefetch=prefetch)

        def step(delay=0.0, model=model, fsdp=fsdp):
            with SlowLink(delay), fsdp.microbatch():
                model(ids).square().mean().backward()
            fsdp.zero_grad()

        step()
        steps[prefetch] = step
    delay = torch.tensor(min(timed(steps[False], 1) for _ in range(5)) / (3 * len(fsdp.units)))  # forward is a third
    dist.broadcast(delay, 0)
    ways = {f"ZeRO-3, {'with' if prefetch else 'without'} prefetch, {link} link": partial(steps[prefetch], seconds)
            for link, seconds in (("fast", 0.0), ("slow", delay.item())) for prefetch in (False, True)}
    return ways, {"units": len(fsdp.units), "delay_ms": 1000 * delay.item()}


def work(rank: int, ranks: int, port: int, args, answers) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    torch.manual_seed(rank)
    rows = []
    for title, (ways, facts), repeats in (("ddp", ddp_ways(2, 32), 3), ("zero3", fsdp_ways(2, 64), 1)):
        seconds = {name: [] for name in ways}
        for step in ways.values():
            step()
        for _ in range(args.rounds):
            for name, step in ways.items():
                seconds[name].append(timed(step, repeats))
        for name, found in seconds.items():
            rows.append(dict(what=title, way=name, ms_best=1000 * min(found), ms_median=1000 * sorted(found)[len(found) // 2],
                             ranks=ranks, **facts))
    if rank == 0:
        answers.put(rows)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(work, (args.ranks, port, args, answers), nprocs=args.ranks)
    rows = answers.get()
    of = {row["way"]: row for row in rows}
    slow = [name for name in of if "slow link" in name]
    for slower, faster in (("all-reduce per parameter", "buckets (DDP)"), ("one flat all-reduce", "buckets (DDP)"), slow):
        best, median = (of[slower][which] / of[faster][which] for which in ("ms_best", "ms_median"))
        rows.append(dict(what="ratio", way=f"{slower} / {faster}", ranks=args.ranks, ratio_best=best, ratio_median=median))
    for row in rows:
        a, b, unit = ("ratio_best", "ratio_median", "x") if row["what"] == "ratio" else ("ms_best", "ms_median", "ms")
        print(f"{row['way']:80} {row[a]:8.2f} {unit} best, {row[b]:8.2f} {unit} median")
    write_results("parallel", rows, quiet=True)


if __name__ == "__main__":
    main()
