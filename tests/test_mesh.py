"""Tests of parallel/mesh.py: every rank's place and groups, against the array drawn by hand."""

import pytest
import torch
import torch.distributed as dist
from parallel.mesh import AXES, Mesh, degrees
from processes import run_on


def describe(world, shape):
    mesh = Mesh(**shape)
    found = {"place": dict(mesh.place), "repr": repr(mesh)}
    for axes in (("dp",), ("pp",), ("cp",), ("tp",), ("ep",), ("edp",), ("dp", "cp"), ("edp", "cp"), ("cp", "dp"), ("dp", *AXES)):
        group = mesh.group(*axes)
        x = torch.tensor([2.0 ** dist.get_rank()])
        if group is not None:
            assert dist.get_rank(group) == mesh.rank(*axes) and dist.get_world_size(group) == mesh.size(*axes)
            assert dist.get_process_group_ranks(group) == mesh.members(*axes)
            dist.all_reduce(x, group=group)  # the sum of 2^rank names the members
        found[axes] = int(x), mesh.members(*axes), mesh.rank(*axes)
    found["groups"] = len(mesh.groups)
    mesh.destroy()
    return found


def test_groups_of_2x2x2():
    ranks = run_on(8, describe, dict(dp=2, pp=2, tp=2))
    for rank, found in enumerate(ranks):
        pp, dp, tp = rank // 4, rank // 2 % 2, rank % 2
        assert found["place"] == dict(pp=pp, edp=dp, ep=0, cp=0, tp=tp)
        want = {("tp",): [4 * pp + 2 * dp, 4 * pp + 2 * dp + 1], ("dp",): [4 * pp + tp, 4 * pp + 2 + tp],
                ("pp",): [2 * dp + tp, 4 + 2 * dp + tp], ("cp",): [rank], ("dp", "cp"): [4 * pp + tp, 4 * pp + 2 + tp],
                ("cp", "dp"): [4 * pp + tp, 4 * pp + 2 + tp], ("dp", *AXES): list(range(8))}
        for axes, members in want.items():
            assert found[axes] == (sum(2**r for r in members), members, members.index(rank))
        assert found["groups"] == 4  # dp, pp, tp, all: none is made twice
        assert found["repr"] == "Mesh(dp=2, pp=2, cp=1, tp=2, ep=1)"


def test_experts_split_the_data_axis():
    for rank, found in enumerate(run_on(8, describe, dict(cp=2, ep=2))):  # dp = 4 = edp 2 x ep 2
        edp, ep, cp = rank // 4, rank // 2 % 2, rank % 2
        assert found[("ep",)][1] == [4 * edp + cp, 4 * edp + 2 + cp]
        assert found[("edp",)][1] == [2 * ep + cp, 4 + 2 * ep + cp]
        assert found[("dp",)][1:] == ([cp, 2 + cp, 4 + cp, 6 + cp], 2 * edp + ep)
        assert found[("edp", "cp")][1] == [2 * ep, 2 * ep + 1, 4 + 2 * ep, 5 + 2 * ep]
        assert found[("dp", "cp")][0] == 255


def test_one_process_needs_no_torch_distributed():
    mesh = Mesh()
    assert mesh.group("dp", "cp") is None and mesh.rank("tp") == 0 and mesh.size("dp", "pp") == 1
    assert mesh.members("dp", *AXES) == [0]
    mesh.destroy()


@pytest.mark.parametrize("shape, line", [
    (dict(dp=3, tp=2), "dp 3 x pp 1 x cp 1 x tp 2 do not make 8 processes; dp 4 would"),
    (dict(tp=3), "pp 1 x cp 1 x tp 3 do not make 8 processes; pp x cp x tp must divide it: 1, 2, 4, 8"),
    (dict(ep=3), "ep 3 does not divide dp 8; these do: 1, 2, 4, 8"),
    (dict(pp=0), "pp is 0; it must be at least 1")])
def test_degrees_that_do_not_multiply_to_the_world_size(shape, line):
    with pytest.raises(ValueError) as error:
        degrees(8, **(dict(dp=None, pp=1, cp=1, tp=1, ep=1) | shape))
    assert str(error.value) == line


def test_an_unknown_axis_is_named():
    with pytest.raises(ValueError, match="no axis 'xp'"):
        Mesh().group("xp")

