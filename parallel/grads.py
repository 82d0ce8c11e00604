"""From this rank's gradients to the model's: what is partial is summed, what is tied agrees, the norm is everyone's.

All of it follows from the record that a parameter carries, `parameter.placement`; one without is whole everywhere:

    {"shard": {axis: dim}       this rank has its slice of dimension dim along a mesh axis (tp; ep for experts)
     "partial": (axis, ...)     whole, but each rank along these axes saw only a part of its gradient (a norm that works
                                on its rank's positions or heads): the parts must be summed
     "tied": name               a copy of a parameter in another pipeline stage: both gradients are one sum
     "zero": (axis, ...)        a piece made by ZeRO: each rank along these axes has another one
     "global_shape": tuple}     of the whole parameter, where slices are padded

Over the data axes, dp and cp, every gradient is partial: DDP, ZeRO and FSDP sum there (experts' over edp and cp).

    with strategy.microbatch(...): backward                    # sums over the data axes
    finalize(parameters, mesh)                                 # this rank's, or its pieces under ZeRO and FSDP
    norm = clip_grad_norm(parameters, mesh, max_norm)          # the same number on all ranks, to the bit
    if norm.isfinite(): optimizer.step()                       # so all ranks step, or none does

    python parallel/grads.py        # how often a parameter is held, and counted
"""

from collections import defaultdict
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

DATA = {"dp": ("edp", "ep")}  # the mesh's dp is two axes: experts are cut along one of them


def primitive(axes) -> set[str]:
    return {part for axis in axes for part in DATA.get(axis, (axis,))}


def total(value, group, dtype=torch.float64, device="cpu") -> Tensor:
    """A number summed over a group, as a 0-d tensor: counted tokens over ("dp", "cp"), before they divide the loss."""
    value = torch.as_tensor(value, dtype=dtype, device=device).detach().clone()
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


@torch.no_grad()
def sum_tied(parameters, mesh) -> None:
    """First and last pipeline stage exchange the gradients of the copies they share, and both hold the sum.

    Of ZeRO's pieces too, as it cuts both copies alike; were they cut where other weights put them, piece would be added
    to another piece (Megatron-LM #844).
    """
    tied = [p for p in parameters if "tied" in getattr(p, "placement", {})]
    group = mesh.group("pp")
    if not tied or group is None:
        return
    peer = mesh.size("pp") - 1 - mesh.rank("pp")
    for p in tied:
        mine = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
        other = torch.empty_like(mine)
        for handle in dist.batch_isend_irecv([  # batched: on NCCL two ranks that both send first would wait for ever
                dist.P2POp(dist.isend, mine, group=group, group_peer=peer),
                dist.P2POp(dist.irecv, other, group=group, group_peer=peer)]):
            handle.wait()
        p.grad = mine + other  # of two terms, in either order: the copies stay equal to the bit


@torch.no_grad()
def sum_partial(parameters, mesh) -> None:
    """All-reduce the gradients that are partial over some mesh axes: one message for all of the same axes and dtype."""
    together = defaultdict(list)
    for p in parameters:
        axes = getattr(p, "placement", {}).get("partial", ())
        if p.requires_grad or p.grad is not None:  # (ZeRO's pieces ask for no gradient, and have one)
            if mesh.group(*axes) is not None:
                together[tuple(axes), p.dtype, p.device].append(p)
    for (axes, *_), members in together.items():
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in members])
        dist.all_reduce(flat, group=mesh.group(*axes))
        for p, part in zip(members, flat.split([p.numel() for p in members])):
            p.grad = part.view_as(p)


def finalize(parameters, mesh) -> None:
    """Make the gradients whole along all axes but the data axes."""
    parameters = list(parameters)
    sum_tied(parameters, mesh)
    sum_partial(parameters, mesh)


def copies(p: Tensor, mesh) -> int:
    """On how many ranks of the mesh each number of this rank's part of p lies."""
    placement = getattr(p, "placement", {})
    divided = primitive((*placement.get("shard", {}), *placement.get("zero", ())))
    same = prod(mesh.size(axis) for axis in ("edp", "ep", "cp", "tp") if axis not in divided)
    return same * (2 if "tied" in placement and mesh.size("pp") > 1 else 1)  # pipeline stages have different layers


@torch.no_grad()
def clip_grad_norm(parameters, mesh, max_norm: float) -> Tensor:
    """Scale this rank's gradients so that the whole model's L2 norm is at most max_norm; returns the norm before, 0-d.

    parameters: this rank's, or its pieces under ZeRO and FSDP. Where a number lies on R ranks, each of them adds 1/R of
    its square: every parameter counts once under any layout, and a NaN on a single rank is in everyone's norm.
    max_norm=0 measures only. Equal to optim.clip_grad_norm on one process; the norm is float64.
    """
    held = [p for p in parameters if p.grad is not None]
    grads = [p.grad for p in held]
    device = grads[0].device if grads else "cpu"
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
    squares = [n.double().square() / copies(p, mesh) for n, p in zip(norms, held)]
    square = torch.stack([s.to(device) for s in squares]).sum() if squares else torch.zeros((), dtype=torch.float64)
    if (world := mesh.group("pp", "edp", "ep", "cp", "tp")) is not None:
        dist.all_reduce(square, group=world)  # in float64 on every rank, also on one that holds nothing
    norm = square.sqrt()
    if max_norm > 0 and grads:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp_max(1.0))
    return norm


def main() -> None:
    class EightRanks:  # a mesh of dp 2 (all of it ep), tp 2, pp 2
        sizes = dict(pp=2, edp=1, ep=2, cp=1, tp=2)

        def size(self, axis):
            return self.sizes[axis]

    for what, placement in (("a norm", {}),
                            ("a tied embedding, cut by tp", {"shard": {"tp": 0}, "tied": "lm_head.weight"}),
                            ("a matrix, cut by tp", {"shard": {"tp": 1}}), ("an expert", {"shard": {"ep": 0, "tp": 1}}),
                            ("a piece of a norm under ZeRO", {"zero": ("dp", "cp")})):
        p = torch.zeros(1)
        p.placement = placement
        n = copies(p, EightRanks())
        print(f"{what:30} each number on {n} of 8 ranks, each adds 1/{n} of its square to the norm")


if __name__ == "__main__":
    main()
