"""The process mesh: every rank has a place in a small array, and talks along its axes.

    ranks = torch.arange(world).view(pp, edp, ep, cp, tp)          dp = edp x ep

A row along an axis is a group: the ranks whose places differ in that coordinate alone. tp changes fastest, for its
messages are the most and its ranks should share a node; pp slowest, for its messages are the fewest.

    axis   splits                                        its ranks exchange
    pp     the layers                                    activations, between neighbours
    dp     the batch                                     gradients, once a step
    ep     the experts of MoE layers; part of dp         tokens; dense weights see it as dp
    edp    the rest of dp                                gradients of experts
    cp     the sequence                                  keys and values; weights see it as dp
    tp     each matrix                                   activations, several times a layer

    mesh = Mesh(tp=2, pp=2)              # the rest is dp
    mesh.rank("tp"), mesh.size("tp"), mesh.group("tp")
    mesh.group("dp", "cp")               # the joined axes over which loss and gradients are summed

    torchrun --nproc_per_node 8 parallel/mesh.py --tp 2 --pp 2        # draws the mesh; so does python parallel/mesh.py
"""

import argparse
import os
from math import prod

import torch
import torch.distributed as dist

AXES = ("pp", "edp", "ep", "cp", "tp")  # slowest first
# What has a group: each axis; dp; dp with cp, where gradients are summed, and those of experts; and everything.
GROUPS = (*((axis,) for axis in AXES), ("edp", "ep"), ("edp", "cp"), ("edp", "ep", "cp"), AXES)


def degrees(world: int, dp: int | None, pp: int, cp: int, tp: int, ep: int) -> dict[str, int]:
    """The size of each of AXES, `dp=None` being what the others leave; ValueError says what would fit."""
    for name, n in dict(dp=1 if dp is None else dp, pp=pp, cp=cp, tp=tp, ep=ep).items():
        if n < 1:
            raise ValueError(f"{name} is {n}; it must be at least 1")
    others = pp * cp * tp
    if world % others or (dp is not None and dp * others != world):
        if world % others == 0:
            advice = f"dp {world // others} would"
        else:
            advice = "pp x cp x tp must divide it: " + ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        dp = "" if dp is None else f"dp {dp} x "
        raise ValueError(f"{dp}pp {pp} x cp {cp} x tp {tp} do not make {world} processes; {advice}")
    dp = world // others
    if dp % ep:
        divisors = ", ".join(str(n) for n in range(1, dp + 1) if dp % n == 0)
        raise ValueError(f"ep {ep} does not divide dp {dp}; these do: {divisors}")
    return dict(pp=pp, edp=dp // ep, ep=ep, cp=cp, tp=tp)


class Mesh:
    """This process's place, and its groups; torch.distributed must be initialised, unless the world is one process.

    All processes call it alike. Groups of one process are None. No group is made twice: where cp is 1, the group of
    ("dp", "cp") is that of "dp". `destroy` frees them.
    """

    def __init__(self, dp: int | None = None, pp: int = 1, cp: int = 1, tp: int = 1, ep: int = 1):
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self.sizes = degrees(world, dp, pp, cp, tp, ep)
        self.ranks = torch.arange(world).view(*self.sizes.values())
        self.here = rank
        self.place = dict(zip(AXES, (self.ranks == rank).nonzero()[0].tolist()))
        self.groups = {}  # axes longer than one, in the order of AXES -> group
        for names in GROUPS:
            if (axes := self._axes(names)) and axes not in self.groups:
                # All ranks make all groups in the same order, also those that they are not in: torch counts on it.
                for members in self.rows(*axes):
                    group = dist.new_group(members)
                    if rank in members:
                        self.groups[axes] = group

    def _axes(self, names) -> tuple[str, ...]:
        """Names, "dp" among them, as those of AXES that are longer than one."""
        for name in names:
            if name not in (*AXES, "dp"):
                raise ValueError(f"the mesh has no axis {name!r}; it has dp, {', '.join(AXES)}")
        wanted = {axis for name in names for axis in (("edp", "ep") if name == "dp" else (name,))}
        return tuple(axis for axis in AXES if axis in wanted and self.sizes[axis] > 1)

    def size(self, *names: str) -> int:
        """How many ranks there are along an axis, or along several taken as one."""
        return prod(self.sizes[axis] for axis in self._axes(names))

    def rank(self, *names: str) -> int:
        """This rank's place along an axis, or along several taken as one: its rank in `group(*names)`."""
        rank = 0
        for axis in self._axes(names):
            rank = rank * self.sizes[axis] + self.place[axis]
        return rank

    def rows(self, *names: str) -> list[list[int]]:
        """The world's ranks, by groups along an axis, or along several taken as one."""
        axes = self._axes(names)
        last = [AXES.index(axis) for axis in axes]
        first = [k for k in range(len(AXES)) if k not in last]
        return self.ranks.permute(*first, *last).reshape(-1, self.size(*names)).tolist()

    def members(self, *names: str) -> list[int]:
        """The world's ranks in `group(*names)`, in its order."""
        return next(row for row in self.rows(*names) if self.here in row)

    def group(self, *names: str):
        """The process group along an axis, or along several taken as one; None if that is this process alone."""
        axes = self._axes(names)
        if axes and axes not in self.groups:
            raise ValueError(f"the mesh joins dp and cp, edp and cp, or all its axes, but not {' and '.join(names)}")
        return self.groups.get(axes)

    def destroy(self) -> None:
        for group in reversed(self.groups.values()):
            dist.destroy_process_group(group)
        self.groups = {}

    def __repr__(self) -> str:
        return "Mesh(" + ", ".join(f"{axis}={self.size(axis)}" for axis in ("dp", "pp", "cp", "tp", "ep")) + ")"


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the mesh, each rank with the ranks of its groups.")
    for axis in ("pp", "cp", "tp", "ep"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    args = parser.parse_args()
    if "RANK" in os.environ:  # under torchrun
        dist.init_process_group("gloo")
    mesh = Mesh(**vars(args))
    lines = [f"{mesh}, rank {mesh.here}:"]
    for axis in ("dp", *AXES):
        lines.append(f"  {axis:3} {mesh.rank(axis)} of {mesh.size(axis)}: ranks {mesh.members(axis)}")
    print("\n".join(lines), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
