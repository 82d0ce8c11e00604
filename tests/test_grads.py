"""Tests of parallel/grads.py: partial and tied gradients, and one norm under every layout, in float64."""

import pytest
import torch
import torch.distributed as dist
from optim import clip_grad_norm as clip_alone
from parallel.ddp import DDP
from parallel.fsdp import FSDP
from parallel.grads import clip_grad_norm, finalize, total
from parallel.ledger import Ledger
from parallel.mesh import Mesh
from parallel.zero import Zero
from processes import run_on

SHAPES = {"norm": (6,), "matrix": (8, 5), "expert": (4, 3), "tied": (5, 3), "first": (7,), "last": (2, 2)}


def whole_gradient(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name) * 31 + ord(name[0]))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def parameters_on(mesh) -> dict:
    """This rank's part of a model: a norm per stage, a matrix cut by tp, experts cut by ep, a table tied over stages."""
    placements = {"norm": {}, "matrix": {"shard": {"tp": 0}}, "expert": {"shard": {"ep": 0}}}
    if mesh.size("pp") > 1:
        ends = mesh.rank("pp") in (0, mesh.size("pp") - 1)
        placements |= {"tied": {"tied": "the other"}} if ends else {}
        placements |= {"first": {}} if mesh.rank("pp") == 0 else {"last": {}} if ends else {}
        if mesh.rank("pp"):  # these three are of the first stage
            [placements.pop(name) for name in ("norm", "matrix", "expert")]
    else:
        placements |= {"tied": {}, "first": {}, "last": {}}
    found = {}
    for name, placement in placements.items():
        grad = whole_gradient(name)
        for axis, dim in placement.get("shard", {}).items():
            grad = grad.chunk(mesh.size(axis), dim)[mesh.rank(axis)]
        p = torch.nn.Parameter(torch.zeros_like(grad))
        p.grad, p.placement = grad.clone(), placement
        found[name] = p
    return found


def norm_under(world, shape, nan_on=None):
    mesh = Mesh(**shape)
    parameters = parameters_on(mesh)
    if nan_on == dist.get_rank():
        next(iter(parameters.values())).grad[0] = float("nan")
    with Ledger() as ledger:
        norm = clip_grad_norm(parameters.values(), mesh, 0.5)
    mesh.destroy()
    return norm, {name: p.grad for name, p in parameters.items()}, ledger.count()


LAYOUTS = [dict(dp=2), dict(tp=2), dict(pp=2), dict(cp=2), dict(ep=2), dict(dp=2, tp=2, pp=2), dict(pp=4),
           dict(ep=2, tp=2, cp=2), dict(dp=4, ep=2, pp=2)]


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_clip_grad_norm_counts_every_parameter_once_and_is_identical_on_all_ranks(shape):
    alone = [torch.nn.Parameter(torch.zeros(SHAPES[name], dtype=torch.float64)) for name in SHAPES]
    for name, p in zip(SHAPES, alone):
        p.grad = whole_gradient(name)
    truth = clip_alone(alone, 0.5)
    world = max(shape.get("dp", 1), shape.get("ep", 1)) * shape.get("tp", 1) * shape.get("pp", 1) * shape.get("cp", 1)
    ranks = run_on(world, norm_under, shape)
    clipped = dict(zip(SHAPES, alone))
    for norm, grads, calls in ranks:
        assert norm.item() == ranks[0][0].item() and abs(norm - truth) < 1e-12 and calls == 1
        for name, grad in grads.items():
            want = clipped[name].grad
            if grad.shape != want.shape:
                assert any(torch.allclose(grad, part, rtol=1e-12, atol=0) for part in want.chunk(want.shape[0] // grad.shape[0]))
            else:
                assert torch.allclose(grad, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rank", [0, 3])
def test_one_rank_with_nan_and_every_rank_skips_the_step_together(rank):
    """Also where the NaN is in a copy, such as a replicated norm's, that another rank has sound."""
    assert [bool(norm.isfinite()) for norm, *_ in run_on(4, norm_under, dict(tp=2), rank)] == [False] * 4
    assert all(norm.isfinite() for norm, *_ in run_on(4, norm_under, dict(tp=2)))


def partial(world):
    mesh = Mesh(tp=2)
    rank = dist.get_rank()
    norm, bias, matrix = (torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (3, 2, 4))
    for p, placement in ((norm, {"partial": ("tp",)}), (bias, {"partial": ("tp",)}), (matrix, {"shard": {"tp": 0}})):
        p.placement, p.grad = placement, torch.full_like(p, 10.0**rank)
    bias.grad = None if rank % 2 else bias.grad
    with Ledger() as ledger:
        finalize([norm, bias, matrix], mesh)
    mesh.destroy()
    return norm.grad.tolist(), bias.grad.tolist(), matrix.grad.tolist(), ledger.count()


def test_partial_gradients_of_replicated_parameters_are_summed():
    """Megatron #1446. In one message; the ranks of another tensor-parallel group, and what is cut, are left alone."""
    for rank, (norm, bias, matrix, calls) in enumerate(run_on(4, partial)):
        first = 10.0 ** (rank // 2 * 2)
        assert norm == [first * 11] * 3 and bias == [first] * 2 and matrix == [10.0**rank] * 4 and calls == 1


def tied(world, strategy):
    """embed on stage 0, head on stage 1, two data-parallel replicas; three steps of SGD with momentum."""
    mesh = Mesh(pp=2)
    pp, dp = mesh.rank("pp"), mesh.rank("dp")
    table = torch.nn.Parameter(torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3))
    other = torch.nn.Parameter(torch.ones(2 + 5 * pp, dtype=torch.float64))
    table.placement = {"tied": ("lm_head.weight", "model.embed_tokens.weight")[pp]}
    parameters = [table, other] if pp == 0 else [other, table]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    if strategy == "ddp":
        sync, held = DDP(parameters, mesh.group("dp"), overlap=False), parameters
    else:
        sync = Zero(parameters, optimizer, mesh.group("dp"), stage=int(strategy[-1]), overlap=False)
        held = sync.parameters()
    norms = []
    for step in range(3):
        for last in (False, True):
            with sync.microbatch(last):
                weight = torch.linspace(1, 2, 15, dtype=torch.float64).view(5, 3) ** (1 + pp + 2 * dp + step)
                ((table * weight).sum() + (table.square() * (pp + 1)).sum() + other.sum()).backward()
        finalize(held, mesh)
        norms.append(clip_grad_norm(held, mesh, 1.0).item())
        (optimizer if strategy == "ddp" else sync).step()
        (optimizer if strategy == "ddp" else sync).zero_grad()
    mesh.destroy()
    return table.detach(), norms


def tied_alone():
    """The same in one process: there is one table, and its gradient has eight parts a step."""
    table = torch.nn.Parameter(torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3))
    first, last = (torch.nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (2, 7))
    optimizer, norms = torch.optim.AdamW([table, first, last], lr=0.1), []
    for step in range(3):
        for pp in (0, 1):
            for dp in (0, 1):
                weight = torch.linspace(1, 2, 15, dtype=torch.float64).view(5, 3) ** (1 + pp + 2 * dp + step)
                loss = (table * weight).sum() + (table.square() * (pp + 1)).sum() + (first, last)[pp].sum()
                (2 * loss).backward()
        norms.append(clip_alone([table, first, last], 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    return table.detach(), norms


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2"])
def test_tied_copies_agree_to_the_bit_and_with_one_process(strategy):
    truth, truth_norms = tied_alone()
    ranks = run_on(4, tied, strategy)
    for table, norms in ranks:
        assert torch.equal(table, ranks[0][0]) and norms == ranks[0][1]
        assert (table - truth).abs().max() < 1e-12 and max(abs(a - b) for a, b in zip(norms, truth_norms)) < 1e-12


def pieces(world):
    """Under FSDP over dp and ZeRO over dp, with a matrix cut by tp as well."""
    mesh, norms = Mesh(tp=2), []
    for strategy in ("zero", "fsdp"):
        module = torch.nn.Linear(5, 4, bias=True).double()
        module.weight.placement = {"shard": {"tp": 0}}
        module.bias.placement = {"partial": ("tp",)}
        x = torch.linspace(-1, 1, 5, dtype=torch.float64)[None] * (1 + mesh.rank("dp"))
        if strategy == "zero":
            optimizer = torch.optim.AdamW(module.parameters())
            sync = Zero(module.parameters(), optimizer, mesh.group("dp", "cp"))
        else:
            sync = FSDP([module], mesh.group("dp", "cp"))
        with sync.microbatch():
            ((module(x) * (1 + mesh.rank("tp"))).sum()).backward()
        finalize(sync.parameters(), mesh)
        norms.append(clip_grad_norm(sync.parameters(), mesh, 0.0).item())
    mesh.destroy()
    return norms


def test_pieces_of_zero_and_fsdp_are_counted_once_with_tensor_parallelism():
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[None].expand(4, 5)
    weight = 3 * torch.cat((x, 2 * x))  # dp ranks add x and 2 x; rows of tp rank 1 weigh 2
    bias = torch.full((4,), 2.0 * (1 + 2), dtype=torch.float64)  # partial over tp
    truth = torch.cat((weight.flatten(), bias)).norm().item()
    for norms in run_on(4, pieces):
        assert all(abs(norm - truth) < 1e-12 for norm in norms) and norms[0] == pytest.approx(norms[1])


def test_one_process_equals_optim_and_clips_alike():
    mesh, ours, theirs = Mesh(), parameters_on(Mesh()), parameters_on(Mesh())
    for dtype in (torch.float64, torch.float32):
        for p in (*ours.values(), *theirs.values()):
            p.data, p.grad = p.data.to(dtype), None
        for name in ours:
            ours[name].grad, theirs[name].grad = (whole_gradient(name).to(dtype) for _ in range(2))
        a, b = clip_grad_norm(ours.values(), mesh, 0.5), clip_alone(theirs.values(), 0.5)
        assert a.dtype == torch.float64 and torch.allclose(a, b.double(), rtol=1e-6)
        assert all(torch.allclose(p.grad, q.grad, rtol=1e-6) for p, q in zip(ours.values(), theirs.values()))
    assert clip_grad_norm([], mesh, 1.0) == 0


def counted(world):
    mesh = Mesh(tp=2)
    n = total(dist.get_rank() * 5, mesh.group("dp", "cp"))
    mesh.destroy()
    return n.item()


def test_counted_tokens_are_summed_over_the_data_axes_only():
    assert run_on(4, counted) == [10.0, 20.0, 10.0, 20.0]
    assert total(3, None).item() == 3.0
