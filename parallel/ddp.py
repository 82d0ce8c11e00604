"""Data parallelism: every rank has the whole model and a part of the batch; gradients are summed over the ranks.

    g = sum over ranks of g_rank            all-reduce: each rank sends 2 (n - 1) / n of the gradients, once a step

The loss of each rank is (sum over its counted tokens) / (count of all ranks), so that gradients are summed and never
averaged: a mean of means is wrong as soon as ranks count different numbers of tokens.

A reduction costs a latency each, so gradients travel in buckets of some megabytes. Backward makes the last layer's
gradients first: buckets are filled in that order, and a full one is on its way while backward computes the next
(Li et al. 2020, PyTorch Distributed, arXiv:2006.15704).

    ddp = DDP(model.parameters(), group)
    for k, micro_batch in enumerate(micro_batches):
        with ddp.microbatch(last=k + 1 == len(micro_batches)):      # only the last one communicates
            (loss_sum(micro_batch) / counted_by_all_ranks).backward()
    clip; optimizer.step(); optimizer.zero_grad()

    torchrun --nproc_per_node 2 parallel/ddp.py         # against one process; python parallel/ddp.py starts two itself
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def broadcast_parameters(parameters, group) -> None:
    """Give all ranks the parameters of the group's first: for models whose initial weights are not alike already."""
    for p in parameters:
        dist.broadcast(p.data, dist.get_global_rank(group, 0), group)


def reduce_gradients(parameters, group) -> None:
    """Sum every gradient over the group, one by one: the slow truth beside DDP."""
    for p in parameters:
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad, group=group)


class Bucket:
    """Parameters whose gradients travel together. They live in one flat buffer, so that none is held twice or copied."""

    def __init__(self, parameters: list[Tensor], group):
        self.parameters, self.group = parameters, group
        self.buffer = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype,
                                  device=parameters[0].device)
        parts = self.buffer.split([p.numel() for p in parameters])
        self.views = [part.view_as(p) for part, p in zip(parts, parameters)]
        self.work, self.missing = None, len(parameters)

    def attach(self) -> None:
        """Where no gradient is yet, let backward add to zeros in the buffer. A parameter that is not used here keeps
        them: another rank may use it."""
        new = all(p.grad is None for p in self.parameters)
        if new:
            self.buffer.zero_()
        for p, view in zip(self.parameters, self.views):
            if p.grad is None:
                p.grad = view if new else view.zero_()

    def launch(self) -> None:
        """Begin to sum this bucket."""
        for p, view in zip(self.parameters, self.views):
            if p.grad is not view:  # somebody set it
                p.grad = view.copy_(p.grad)
        self.work = dist.all_reduce(self.buffer, group=self.group, async_op=True)  # SUM


class DDP:
    """Sums the gradients of `parameters` over `group` (None: one process, nothing to do), overlapping with backward.

    group may be a function from a parameter to its group: experts, cut along a part of dp, have another.
    bucket_bytes: a bucket is closed when it has that many. overlap=False launches all buckets at the end, as is right
    under a pipeline, where each microbatch's backward makes every gradient.

    All ranks hold the same parameters in the same order. A parameter unused on one rank gets the gradient of the
    others; one that is unused on all gets zeros, not None (no message tells that apart), so AdamW goes on decaying it.
    """

    def __init__(self, parameters, group, bucket_bytes: int = 25 * 2**20, overlap: bool = True):
        self.buckets, self.hooks = [], []
        self.active, self.next = False, 0  # whether hooks launch buckets, and the next one to launch
        filling: dict = {}  # kind of parameter -> those of the bucket that is being filled
        for p in reversed([p for p in parameters if p.requires_grad]):
            kind = group(p) if callable(group) else group, p.dtype, p.device
            if kind[0] is not None:
                filling.setdefault(kind, []).append(p)
                if sum(q.numel() * q.element_size() for q in filling[kind]) >= bucket_bytes:
                    self.buckets.append(Bucket(filling.pop(kind), kind[0]))
        self.buckets += [Bucket(members, kind[0]) for kind, members in filling.items()]
        for bucket in self.buckets if overlap else []:
            for p in bucket.parameters:
                self.hooks.append(p.register_post_accumulate_grad_hook(lambda p, bucket=bucket: self._ready(bucket)))

    def _ready(self, bucket: Bucket) -> None:
        """One more gradient of the bucket is complete. (The hook is given the parameter, not its gradient.)"""
        if not self.active:
            return
        bucket.missing -= 1
        # In the order of the list on every rank, or two ranks would sum different buckets with each other. So a bucket
        # waits for the ones before it, and if one of those misses a gradient, for the end of backward.
        while self.next < len(self.buckets) and self.buckets[self.next].missing <= 0:
            self.buckets[self.next].launch()
            self.next += 1

    @contextmanager
    def microbatch(self, last: bool = True):
        """Around forward and backward of a microbatch; after the last one, every p.grad is the sum over all ranks."""
        for bucket in self.buckets:
            bucket.attach()
        if last:
            self.active, self.next = True, 0
            for bucket in self.buckets:
                bucket.missing = len(bucket.parameters)
        try:
            yield
        finally:
            self.active = False
        if last:
            for bucket in self.buckets[self.next:]:  # some rank did not use some parameter, or nothing overlaps
                bucket.launch()
            for bucket in self.buckets:
                bucket.work.wait()

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self.hooks:
            hook.remove()


# ---------------------------------------------------------------------------------------------------------------- main


def _train(rank: int, world: int, port: int) -> None:
    """A small regression on `world` ranks, each with as many rows as its number + 1, against all rows on one."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).double()
    rows = world * (world + 1) // 2
    x = torch.randn(rows, 8, dtype=torch.float64)
    y, mine = x.sum(1, keepdim=True), slice(rank * (rank + 1) // 2, (rank + 1) * (rank + 2) // 2)
    truth = torch.autograd.grad((model(x) - y).square().sum() / rows, list(model.parameters()))
    ddp = DDP(model.parameters(), dist.group.WORLD, bucket_bytes=256)
    with ddp.microbatch():
        ((model(x[mine]) - y[mine]).square().sum() / rows).backward()
    error = max(float((p.grad - g).abs().max()) for p, g in zip(model.parameters(), truth))
    if rank == 0:
        print(f"{world} ranks, {len(ddp.buckets)} buckets: gradients differ from one process by {error:.1e}")
    dist.destroy_process_group()


def main() -> None:
    import os
    import socket
    import torch.multiprocessing

    if "RANK" in os.environ:  # under torchrun
        return _train(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["MASTER_PORT"]) + 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train, (2, port), nprocs=2)


if __name__ == "__main__":
    main()
