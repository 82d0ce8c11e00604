"""ZeRO-1 and ZeRO-2: every rank updates its part of the parameters, and so keeps only that part's optimizer state.

    reduce-scatter the gradients  ->  step on 1/n of the weights  ->  all-gather the weights

                     bytes per weight (float32 Adam)      elements a rank sends, k microbatches, times (n - 1) / n
    DDP              4 + 4 + 8                            2
    ZeRO-1           4 + 4 + 8/n                          2          gradients whole until the last microbatch
    ZeRO-2           4 + 4/n + 8/n                        k + 1      scattered after each: less memory, more traffic

(Rajbhandari et al. 2020, arXiv:1910.02054, sections 5 and 7.) The last microbatch is scattered bucket by bucket while
backward runs; so with one microbatch both stages are the same.

How a weight is divided depends on the optimizer. AdamW and Lion treat each number alone: parameters are laid end to end
in buckets, and rank r has the r-th of n equal parts, wherever that cuts. Muon and Adafactor look at whole matrices:
each has one rank as its owner, which alone gets its gradient and sends it back updated: exact, and no number is sent
twice. An optimizer that is not known is given whole ones.

    zero = Zero(model.parameters(), optimizer, group, stage=2)   # optimizer: built over the whole parameters, as ever
    for k, micro_batch in enumerate(micro_batches):
        with zero.microbatch(last=k + 1 == len(micro_batches)):
            (loss_sum(micro_batch) / counted_by_all_ranks).backward()
    clip zero.parameters(); zero.step(); zero.zero_grad()

    python parallel/zero.py             # how Llama 3 8B's 16 bytes a weight divide
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

ELEMENTWISE = ("AdamW", "Lion", "Adam", "SGD")  # optimizers whose update of a number depends on nothing beside it


def is_whole(optimizer, group: dict) -> bool:
    """Whether the optimizer must see this param group's parameters whole. Muon's groups for AdamW need not be."""
    name = type(optimizer).__name__
    return group["use_muon"] if name == "Muon" else name not in ELEMENTWISE


def is_tied(p: Tensor) -> bool:
    """Whether another pipeline stage has a copy of it."""
    return "tied" in getattr(p, "placement", {})


def named(name: str, before: str):
    """torch.distributed's function of that name, or of the one that it had before torch 2.13."""
    return getattr(dist, name, None) or getattr(dist, before)


def piece_of(p: Tensor, data: Tensor, start: int, axes: tuple) -> torch.nn.Parameter:
    """`data` as the optimizer's parameter for p.flatten()[start : start + len(data)], with its placement.

    "zero": the mesh axes along which each rank has another part of p, so that a norm does not count it as a copy.
    """
    piece = torch.nn.Parameter(data, requires_grad=False)
    piece.placement = dict(getattr(p, "placement", {}), zero=axes)
    piece.whole, piece.start = p, start
    return piece


class Sliced:
    """Parameters laid end to end, zeros at the end, cut in n equal shards. Their values live in the flat buffer."""

    def __init__(self, parameters: list[Tensor], group, axes: tuple, offload: bool):
        self.parameters, self.group = parameters, group
        n, rank = (dist.get_world_size(group), dist.get_rank(group)) if group is not None else (1, 0)
        numel = sum(p.numel() for p in parameters)
        self.size = -(-numel // n)  # of a shard
        self.padding = n * self.size - numel
        self.flat = parameters[0].new_zeros(n * self.size)
        self.shard = self.flat[rank * self.size : (rank + 1) * self.size]  # what this rank updates
        self.gradient = self.work = None
        offset, spans = 0, []
        for p in parameters:
            self.flat[offset : offset + p.numel()] = p.detach().flatten()
            p.data = self.flat[offset : offset + p.numel()].view_as(p)
            first, last = max(offset, rank * self.size), min(offset + p.numel(), (rank + 1) * self.size)
            if first < last:
                spans.append((p, first - offset, first - rank * self.size, last - rank * self.size))
            offset += p.numel()
        self.master = pinned(self.shard) if offload else self.shard
        self.pieces = [piece_of(p, self.master[a:b], start, axes) for p, start, a, b in spans]
        self.spans = [(a, b) for _, _, a, b in spans]

    def launch(self) -> None:
        """Begin to reduce-scatter; the parameters' own gradients are let go. One that is None here counts zeros."""
        self.whole = self.flat.new_zeros(len(self.flat))
        parts = self.whole[: sum(p.numel() for p in self.parameters)].split([p.numel() for p in self.parameters])
        for p, part in zip(self.parameters, parts):
            if p.grad is not None:
                part.copy_(p.grad.flatten())
                p.grad = None
        if self.group is None:
            self.part = self.whole
        else:
            self.part = torch.empty_like(self.shard)
            reduce_scatter = named("reduce_scatter_single", "reduce_scatter_tensor")
            self.work = reduce_scatter(self.part, self.whole, group=self.group, async_op=True)  # SUM

    def finish(self) -> None:
        """Add what arrived to this rank's gradient: the sum over ranks, and over the microbatches so far."""
        if self.work is not None:
            self.work.wait()
        part = self.part.to(self.master.device)
        self.gradient = part if self.gradient is None else self.gradient.add_(part)
        self.work = self.whole = self.part = None
        for piece, (a, b) in zip(self.pieces, self.spans):
            piece.grad = self.gradient[a:b]

    def gather(self):
        """Begin to send the updated shard to all; returns a handle, or None."""
        if self.master is not self.shard:
            self.shard.copy_(self.master)
        if self.group is not None:
            all_gather = named("all_gather_single", "all_gather_into_tensor")
            return all_gather(self.flat, self.shard.clone(), group=self.group, async_op=True)


class Owned:
    """A parameter that one rank of the group, its owner, updates as a whole."""

    def __init__(self, p: Tensor, group, owner: int, axes: tuple, offload: bool):
        self.parameters, self.group, self.owner, self.padding = [p], group, owner, 0
        self.gradient = self.work = None
        self.offload, self.mine = offload, group is None or dist.get_rank(group) == owner
        self.master = pinned(p.data) if offload and self.mine else p.data
        self.pieces = [piece_of(p, self.master, 0, axes)] if self.mine else []

    def launch(self) -> None:
        p = self.parameters[0]
        self.part = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = None
        if self.group is not None:
            owner = dist.get_global_rank(self.group, self.owner)
            self.work = dist.reduce(self.part, owner, group=self.group, async_op=True)

    def finish(self) -> None:
        if self.work is not None:
            self.work.wait()
        if self.mine:
            part = self.part.to(self.master.device)
            self.gradient = part if self.gradient is None else self.gradient.add_(part)
            self.pieces[0].grad = self.gradient
        self.work = self.part = None

    def gather(self):
        p = self.parameters[0]
        if self.mine and self.offload:
            p.data.copy_(self.master)
        if self.group is not None:
            return dist.broadcast(p.data, dist.get_global_rank(self.group, self.owner), group=self.group, async_op=True)


def pinned(t: Tensor) -> Tensor:
    """A copy in the CPU's memory, from where a GPU can fetch it while it computes."""
    copy = t.detach().to("cpu", copy=True)
    return copy.pin_memory() if t.is_cuda else copy


class Zero:
    """Divides the optimizer's work over the ranks of `group`; `stage` is 1 or 2.

    parameters: in the order of the model, as backward goes through them from the end.
    group: where gradients are summed; or a function from a parameter to its group (experts have another one).
    axes: the mesh axes that `group` runs along, kept in the pieces' placement; a function, if group is one.
    overlap=False scatters at the end. offload: the optimizer's weights, gradients and state lie in the CPU's memory.
    What must be summed over other axes than these is summed afterwards, over the pieces, which lie alike on ranks that
    hold the same parameters. One whose placement is "tied" has a bucket alone: its copy, in another pipeline stage,
    stands beside other weights, and both must be cut alike.
    """

    def __init__(self, parameters, optimizer, group, stage: int = 1, *, axes=("dp", "cp"),
                 bucket_bytes: int = 25 * 2**20, overlap: bool = True, offload: bool = False):
        if stage not in (1, 2):
            raise ValueError(f"ZeRO stage {stage} is not in this file: 1 shards the optimizer, 2 gradients too")
        self.optimizer, self.stage = optimizer, stage
        self.hooks, self.active, self.next = [], False, 0
        group_of = group if callable(group) else lambda p: group
        axes_of = axes if callable(axes) else lambda p: axes
        whole, cut = ([p for settings in optimizer.param_groups if is_whole(optimizer, settings) is kind
                       for p in settings["params"]] for kind in (True, False))
        owner, load = {}, {}  # id of a whole parameter -> its owner; group -> weights that each rank owns
        # Tied ones first, to the same rank in both stages; then the largest, each to the rank that has least.
        for p in sorted(whole, key=lambda p: (not is_tied(p), -p.numel())):
            g = group_of(p)
            loads = load.setdefault(g, [0] * (1 if g is None else dist.get_world_size(g)))
            owner[id(p)] = loads.index(min(loads))
            loads[owner[id(p)]] += p.numel()
        filling, known = {}, {id(p) for p in cut}  # kind of parameter -> those of the bucket that is being filled
        self.buckets = []
        for p in reversed(list(parameters)):
            if id(p) in owner:
                self.buckets.append(Owned(p, group_of(p), owner[id(p)], axes_of(p), offload))
            elif id(p) in known:  # frozen ones are not
                kind = p.dtype, p.device, is_tied(p), group_of(p), axes_of(p)
                filling.setdefault(kind, []).append(p)
                if sum(q.numel() * q.element_size() for q in filling[kind]) >= bucket_bytes:
                    self.buckets.append(Sliced(filling.pop(kind), *kind[3:], offload))
        self.buckets += [Sliced(parameters, *kind[3:], offload) for kind, parameters in filling.items()]
        self.padding = sum(bucket.padding for bucket in self.buckets)
        pieces: dict = {}
        for piece in self.parameters():
            pieces.setdefault(id(piece.whole), []).append(piece)
        for settings in optimizer.param_groups:
            settings["params"] = [piece for p in settings["params"] for piece in pieces.get(id(p), [])]
        for bucket in self.buckets if overlap else []:
            bucket.missing = 0
            for p in bucket.parameters:
                self.hooks.append(p.register_post_accumulate_grad_hook(lambda p, bucket=bucket: self._ready(bucket)))

    def parameters(self) -> list[Tensor]:
        """This rank's pieces, what the optimizer updates: `.whole` is the parameter that each is of, from `.start`."""
        return [piece for bucket in self.buckets for piece in bucket.pieces]

    def _ready(self, bucket) -> None:
        """One more gradient of the bucket is complete; buckets leave in the order of the list, on all ranks alike."""
        if not self.active:
            return
        bucket.missing -= 1
        while self.next < len(self.buckets) and self.buckets[self.next].missing <= 0:
            self.buckets[self.next].launch()
            self.next += 1

    @contextmanager
    def microbatch(self, last: bool = True):
        """Around forward and backward of a microbatch; after the last, each piece's .grad is summed over all."""
        reduces = last or self.stage == 2
        self.active, self.next = reduces, 0
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)
        try:
            yield
        finally:
            self.active = False
        if reduces:
            for bucket in self.buckets[self.next:]:
                bucket.launch()
            for bucket in self.buckets:
                bucket.finish()

    def step(self) -> None:
        """Update this rank's pieces, then give all ranks the whole parameters."""
        self.optimizer.step()
        for settings in self.optimizer.param_groups:
            if not settings["params"] and "step" in settings:
                settings["step"] += 1  # a group with no piece here has stepped, too: on the others
        for work in [bucket.gather() for bucket in self.buckets]:
            if work is not None:
                work.wait()

    def zero_grad(self) -> None:
        for bucket in self.buckets:
            bucket.gradient = None
            for p in (*bucket.pieces, *bucket.parameters):
                p.grad = None


def main() -> None:
    weights = 8_030_261_248  # Llama 3 8B
    print("Llama 3 8B, GiB of parameters, gradients and optimizer per GPU, activations apart")
    print("  GPUs      " + "".join(f"{name:>18}" for name in ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")))
    for name, (w, g, s) in {"float32": (4, 4, 8), "bfloat16": (2, 2, 12)}.items():
        for n in (8, 64):
            stages = (w + g + s, w + g + s / n, w + (g + s) / n, (w + g + s) / n)
            print(f"  {n:4}  {name:9}" + "".join(f"{weights * b / 2**30:13.1f} GiB " for b in stages))


if __name__ == "__main__":
    main()
