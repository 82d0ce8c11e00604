"""Expert parallelism: the experts of MoE layers shared out over n ranks; tokens travel to the experts that they chose.

    rows of this rank, sorted by expert      e0 e0 e1 | e2 e3 e3        (M, hidden), counts (E,) of each expert
    all-to-all of the counts                 how many rows of each of its experts a rank gets from each rank
    all-to-all of the rows                   uneven: as many as were chosen, none dropped, none padded
    put in order of expert, compute, put back, all-to-all of the answers

A rank holds E / n experts, matrices (E / n, out, in), placement {"shard": {"ep": 0}}. The group is a part of data
parallelism: its ranks have tokens of their own. So when backward is done an expert's gradient has come from all of
them, and is summed over the *other* data ranks only. The router, on every rank, sees its own tokens as ever; neither
its gradient nor the balance loss knows how far the experts are spread. Per layer rows travel twice, forward, and their
gradients twice, backward: those chosen elsewhere only. Counts must reach the host: each layer waits for the GPU once.

    model = expert_parallel(CausalLM(config), group)              # in place
    weights = full_state(model, group)                            # all experts again, to save

Sources: GShard (arXiv:2006.16668), section 3; dropless: MegaBlocks (arXiv:2211.15841).
"""

from functools import partial
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class AllToAll(torch.autograd.Function):
    """rows (sum(send), ...) in the order of the ranks they go to -> (sum(receive), ...), of those they came from."""

    @staticmethod
    def forward(ctx, rows, send, receive, group):
        ctx.send, ctx.receive, ctx.group = send, receive, group
        came = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(came, rows.contiguous(), receive, send, group=group)
        return came

    @staticmethod
    def backward(ctx, gradient):
        return AllToAll.apply(gradient, ctx.receive, ctx.send, ctx.group), None, None, None


def exchanged(experts: Callable[[Tensor, Tensor], Tensor], group, rows: Tensor, counts: Tensor) -> Tensor:
    """What all experts answer to this rank's rows (M, hidden), sorted by expert, counts (E,) int64 -> (M, hidden).

    experts(rows, counts): the same for this rank's own E / n, from rank * E / n on, and rows of all ranks.
    """
    n = dist.get_world_size(group)
    arriving = torch.empty_like(counts).view(n, -1)  # (ranks, E / n): from each rank, for each of our experts
    dist.all_to_all_single(arriving, counts.view(n, -1).contiguous(), group=group)
    send, receive = torch.stack((counts.view(n, -1).sum(1), arriving.sum(1))).tolist()
    rows = AllToAll.apply(rows, send, receive, group)  # sorted by rank, then by expert
    expert = torch.arange(arriving.shape[1], device=rows.device).repeat(n)
    by_expert = expert.repeat_interleave(arriving.flatten(), output_size=len(rows)).argsort(stable=True)
    answers = experts(rows[by_expert], arriving.sum(0))
    back = torch.empty_like(by_expert)
    back[by_expert] = torch.arange(len(rows), device=rows.device)
    return AllToAll.apply(answers[back], receive, send, group)


def shard(parameter: nn.Parameter, rank: int, n: int) -> nn.Parameter:
    """This rank's experts of a stack (E, ...)."""
    known = getattr(parameter, "placement", {})
    result = nn.Parameter(parameter.detach().chunk(n)[rank].clone(), parameter.requires_grad)
    result.placement = known | {"shard": known.get("shard", {}) | {"ep": 0},
                                "global_shape": known.get("global_shape", tuple(parameter.shape))}
    return result


def expert_parallel(model: nn.Module, group) -> nn.Module:
    """Share out the experts of a CausalLM's MoE layers, in place -> the model. Dense layers stay whole.

    ValueError: there are no experts, or n does not divide their number."""
    if group is None:
        return model
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    sparse = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    if not sparse:
        raise ValueError(f"ep {n}: the model has no experts")
    for experts in sparse:
        E = next(experts.parameters()).shape[0]
        if E % n:
            fitting = ", ".join(str(d) for d in range(1, E + 1) if E % d == 0)
            raise ValueError(f"ep {n} does not divide {E} experts; these do: {fitting}")
        for name, parameter in list(experts.named_parameters()):
            setattr(experts, name, shard(parameter, rank, n))
        experts.forward = partial(exchanged, experts.forward, group)
    return model


def whole(tensor: Tensor, placement: dict, group) -> Tensor:
    """A parameter (or its gradient, its optimizer state) with the experts of all ranks."""
    if group is None or placement.get("shard", {}).get("ep") != 0:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.detach().contiguous(), group)
    return torch.cat(parts)


def full_state(model: nn.Module, group) -> dict[str, Tensor]:
    """{name: tensor} of all parameters, with all experts, on every rank."""
    return {name: whole(p, getattr(p, "placement", {}), group) for name, p in model.named_parameters()}
