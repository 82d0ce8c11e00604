"""What every strategy holds and sends in a step, counted, beside what its formula says: exact, on any machine.

    python bench/bench_ledger.py            # writes bench/results/ledger.json; python -m parallel.ledger prints the same

Rank 0 of four gloo processes and a model of four layers, 32 wide; parallel/ledger.py tells how it is counted.
"""

import json
import socket
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.results_io import write_results  # noqa: E402
from parallel.ledger import STRATEGIES, measure  # noqa: E402

RANKS = 4
IDEAS = {
    "ddp": "each rank has all; gradients are summed in buckets while backward runs",
    "zero1": "the optimizer's state is divided; each rank updates its part and sends it round",
    "zero2": "the gradients too: each is summed where it is needed",
    "zero3": "the weights too: a layer's are fetched before it computes, then freed",
    "tp": "matrices are divided by columns, then rows: one sum for each pair",
    "pp": "layers are divided; microbatches follow one another through them",
    "cp": "the sequence is divided; keys and values go round a ring",
    "ep": "experts are divided; tokens travel to theirs and back",
}


def as_rank(rank: int, port: int, path: str) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, RANKS, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    rows = []
    for strategy in STRATEGIES:
        idea = {"idea": IDEAS[strategy]}  # told once
        for row in measure(strategy, RANKS):
            rows.append({"strategy": strategy, **idea, "ranks": RANKS, **row._asdict()})
            idea = {}
    if rank == 0:
        Path(path).write_text(json.dumps(rows))
    dist.destroy_process_group()


def main() -> None:
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port, path = free.getsockname()[1], f"{folder}/rows.json"
        free.close()
        torch.multiprocessing.spawn(as_rank, (port, path), nprocs=RANKS)
        rows = json.loads(Path(path).read_text())
    write_results("ledger", rows)
    apart = [row for row in rows if row["measured"] != row["predicted"] and "at most" not in row["what"]]
    if apart or any(row["measured"] > row["predicted"] for row in rows):
        sys.exit(f"not what the formulas say: {apart or rows}")


if __name__ == "__main__":
    main()
