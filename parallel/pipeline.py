"""Pipeline parallelism: the layers lie on different ranks, in stages, and microbatches flow through.

    stage s of p v lies on rank s % p; between neighbours travels one activation or its gradient, (B, S, hidden)

`cut` makes the stages of a CausalLM: the model with the other stages' pieces taken out. `execute` runs a plan of
schedules.py, exactly: per rank a list of (kind, stage, microbatch), kind being

    F   forward                                            D   the whole backward
    B   backward to the input: the stage before can go on  W   later, backward to the weights     (zero bubble)

    plan = schedules.plan("1f1b", ranks, microbatches)
    stages = cut(model, rank, ranks)                                                # {number: module}
    loss, timeline = execute(plan, stages, microbatches, loss_of, group)            # leaves gradients in .grad

Loss is the sum over counted tokens / the count of the whole batch, so microbatches add up whatever they count. The two
copies of tied embeddings each have a part of the gradient: grads.py sums by their placement, before the optimizer.
"""

import copy
import time
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

# --------------------------------------------------------------------------------------------- the model, cut in stages


class Received(nn.Module):
    """Stands where a later stage has no embedding: gives out the activations that came from the stage before."""

    def __init__(self, width: int, dtype: torch.dtype, shards: int):
        super().__init__()
        self.width, self.dtype, self.x = width, dtype, None
        self.shards = shards  # into which sequence parallelism divides the positions

    def buffer(self, input_ids: Tensor) -> Tensor:
        B, S = input_ids.shape
        return torch.empty(B, S // self.shards, self.width, dtype=self.dtype, device=input_ids.device)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, self.x = self.x, None
        return x


class NoPositions(nn.Module):
    """Stands where a later stage would add learned positions a second time."""

    def forward(self, position_ids: Tensor) -> float:
        return 0.0


class Layers(nn.ModuleDict):
    """Some of the layers under their numbers in the whole model, so that every parameter keeps its name."""

    def __iter__(self):
        return iter(self.values())


def balance(costs: list[float], stages: int, first: float = 0.0, last: float = 0.0) -> list[int]:
    """How many layers each stage gets, in order, each at least one, so that the dearest stage is as cheap as can be.

    costs of the layers; `first` and `last` are what embedding and head add to the first and last stage. Exact, by
    dynamic programming over (stage, layers given out); among equals the sum of squares decides.
    """
    L = len(costs)
    if stages > L:
        raise ValueError(f"{stages} pipeline stages for {L} layers; at most {L}")
    best = {0: ((0.0, 0.0), [])}  # layers given out -> ((dearest stage, sum of squares), sizes)
    for s in range(stages):
        after = {}
        for given, ((dearest, squares), sizes) in best.items():
            for upto in range(given + 1, L - (stages - s - 1) + 1):
                cost = sum(costs[given:upto]) + (first if s == 0 else 0) + (last if s == stages - 1 else 0)
                option = ((max(dearest, cost), squares + cost * cost), sizes + [upto - given])
                if upto not in after or option < after[upto]:
                    after[upto] = option
        best = after
    return best[L][1]


def cut(model: nn.Module, rank: int, ranks: int, v: int = 1, sizes: list[int] | None = None) -> dict[int, nn.Module]:
    """One rank's stages of a CausalLM {number: module}, which share its parameters; the model itself is not changed.

    Same class, same forward, same parameter names; the first stage alone has the embedding, the last norm and head.
    sizes: layers of each stage; default: `balance` by parameters, where embedding and head weigh too (the former costs
    no time, but memory, which is scarcest on rank 0). Tied weights, if first and last stage lie apart, become two
    copies that name each other, placement {"tied": name}. After tensor_parallel and the like, before ZeRO.
    """
    weigh = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    trunk, stages = model.model, ranks * v
    embed, head = trunk.embed_tokens, model.lm_head
    positions = getattr(trunk, "embed_positions", None)
    entry = weigh(embed) + (weigh(positions) if positions else 0)
    sizes = sizes or balance([weigh(layer) for layer in trunk.layers], stages, entry, weigh(head))
    if len(sizes) != stages or sum(sizes) != len(trunk.layers) or min(sizes) < 1:
        raise ValueError(f"{stages} pipeline stages of {sizes} layers: the model has {len(trunk.layers)}")
    tied, found = head.weight is embed.weight and ranks > 1, {}
    if tied and rank == ranks - 1:
        head = shell(head)
        head.weight = nn.Parameter(embed.weight.detach().clone())
        head.weight.placement = getattr(embed.weight, "placement", {}) | {"tied": "model.embed_tokens.weight"}
    elif tied and rank == 0:
        embed.weight.placement = getattr(embed.weight, "placement", {}) | {"tied": "lm_head.weight"}
    for s in range(rank, stages, ranks):
        stage, start = shell(model), sum(sizes[:s])
        stage.model = shell(trunk)
        stage.model.layers = Layers({str(i): trunk.layers[i] for i in range(start, start + sizes[s])})
        stage.lm_head = head
        if s > 0:
            stage.model.embed_tokens = Received(embed.weight.shape[1], embed.weight.dtype,
                                                getattr(embed, "sequence_shards", 1))
            if positions:
                stage.model.embed_positions = NoPositions()
        if s < stages - 1:
            stage.model.norm = stage.lm_head = nn.Identity()
        found[s] = stage
    return found


def shell(module: nn.Module) -> nn.Module:
    """A copy of the module alone, whose children and parameters, the same objects, can be exchanged."""
    twin = copy.copy(module)
    twin._modules, twin._parameters = dict(module._modules), dict(module._parameters)
    return twin


# -------------------------------------------------------------------------------------------- backward, cut in B and W


class Later(NamedTuple):
    """What B leaves for W."""

    joins: list  # (edges into a node of the trunk, the gradients that arrived there, its edges towards weights only)
    tail: tuple | None  # (edge of x, its gradient) if x is computed itself: the embedding's weights lie behind it


def backward_input(output: Tensor, gradient: Tensor | None, x: Tensor) -> tuple[Tensor | None, Later]:
    """B: the gradient of x, and of no weight -> (gradient, what backward_weights needs).

    In autograd's graph the nodes on the paths from output to x form the trunk; weights hang on it by side branches.

        output <- mm <- silu <- mm <- x       The gradient of x takes the trunk alone: autograd leaves out the product
                  |             |             of each mm that nobody asked for. What arrives at each join (mm) is kept:
                  W2            W1            there W starts, and goes down the side branches alone.

    Where x needs no gradient (a frozen embedding) there is no trunk: all of the backward is done here.
    """
    if not x.requires_grad:
        torch.autograd.backward(output, gradient)
        return None, Later([], None)
    end = get_gradient_edge(x)
    trunk, entries = trunk_between(get_gradient_edge(output), end)
    joins = []
    for node in trunk:
        sides = [GradientEdge(child, n) for child, n in node.next_functions
                 if child is not None and child not in trunk and child is not end.node]
        if sides:
            joins.append(([GradientEdge(node, n) for n in sorted(entries[node])], sides))
    edges = [edge for into, _ in joins for edge in into]
    to_x, *arrived = torch.autograd.grad(output, [x, *edges], gradient, retain_graph=True, allow_unused=True)
    arrived = iter(arrived)
    kept = [(into, [next(arrived) for _ in into], sides) for into, sides in joins]
    return to_x, Later(kept, None if x.is_leaf else (end, to_x))


def trunk_between(root: GradientEdge, end: GradientEdge) -> tuple[dict, dict]:
    """Nodes on a path from root to end, the latter excluded -> ({node: True}, {node: numbers of its outputs used})."""
    entries, leads, stack = {root.node: {root.output_nr}}, {end.node: True}, [(root.node, False)]
    while stack:  # depth first; a loop, for a deep model's graph exceeds Python's recursion
        node, below_done = stack.pop()
        children = [(child, n) for child, n in node.next_functions if child is not None]
        if below_done:
            leads[node] = any(leads[child] for child, _ in children)
        elif node not in leads:
            leads[node] = False
            stack.append((node, True))
            for child, n in children:
                entries.setdefault(child, set()).add(n)
                stack.append((child, False))
    del leads[end.node]
    return {node: True for node, leads_there in leads.items() if leads_there}, entries


def backward_weights(later: Later) -> None:
    """W: add the gradients of the stage's weights to their .grad; each join runs once more, for its side branches."""
    edges, grads = [], []
    for into, arrived, sides in later.joins:
        known = [(edge, g) for edge, g in zip(into, arrived) if g is not None]
        if known:
            found = torch.autograd.grad([e for e, _ in known], sides, [g for _, g in known], allow_unused=True)
            edges += [edge for edge, g in zip(sides, found) if g is not None]
            grads += [g for g in found if g is not None]
    if later.tail is not None:
        edges, grads = edges + [later.tail[0]], grads + [later.tail[1]]
    if edges:
        torch.autograd.backward(edges, grads)


# ------------------------------------------------------------------------------------------------------------- executor


class Beside(torch.autograd.Function):
    """Hands x on, and backward sends 1 to the scalar beside it: a stage's own loss joins the gradient that comes."""

    @staticmethod
    def forward(ctx, x, scalar):
        ctx.one = torch.ones_like(scalar)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, ctx.one


def forward(stage: nn.Module, came: Tensor | None, inputs: dict) -> tuple[Tensor, Tensor]:
    """-> (logits or activations for the next stage, x: what came, or on the first stage the embedding's output)."""
    entry, seen = stage.model.embed_tokens, []
    if came is not None:
        entry.x = came.requires_grad_(torch.is_grad_enabled())
    hook = entry.register_forward_hook(lambda module, arguments, output: seen.append(output))
    try:
        return stage(**inputs), seen[0]
    finally:
        hook.remove()


def execute(plan, stages: dict[int, nn.Module], microbatches: list[tuple[dict, Tensor]],
            loss_of: Callable[[Tensor, Tensor], Tensor], group=None, own_loss: Callable | None = None):
    """Run this rank's list of a plan; gradients are added to .grad, unless they are disabled -> (loss, timeline).

    plan: schedules.plan's .actions and .messages. stages: from `cut`. microbatches, the same on all ranks of the group:
    (keyword arguments of the model's forward, with input_ids (B, S); labels (B, S)). loss_of(logits, labels) -> scalar,
    summed over tokens and divided by the number counted in the *global* batch. own_loss(stage) -> scalar or None, asked
    for after each forward: what a stage trains besides, such as its routers' balance, likewise divided. loss: the sum
    of loss_of alone, float64, on every rank. timeline: (action, start, end) in seconds of the machine's clock, without
    the wait for what the action needs; on a GPU, of its launch. ValueError: a plan for other ranks, or zero bubble with
    recomputation.
    """
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    if len(plan.actions) != ranks:
        raise ValueError(f"a pipeline schedule of {len(plan.actions)} ranks on {ranks}")
    recomputing = any(stage.model.activation_checkpointing != "none" for stage in stages.values())
    if recomputing and any(kind == "W" for kind, *_ in plan.actions[rank]):
        raise ValueError("zero bubble keeps activations until W: it does not go with activation checkpointing")
    last = max(s for actions in plan.actions for _, s, _ in actions)
    to_post = [message for message in plan.messages if rank in (message.source, message.target)]
    made, arriving, sending = {}, {}, []  # tensors by (stage that makes it, microbatch, is it a gradient)
    alive, later, timeline = {}, {}, []  # (output, x), and what B left, by (stage, microbatch)
    loss = torch.zeros((), dtype=torch.float64, device=microbatches[0][1].device)

    def post() -> None:
        """Start this rank's next messages, in the plan's order, up to a send whose tensor is still to be made."""
        while to_post and (to_post[0].source != rank or to_post[0][1:4] in made):
            _, s, i, gradient, source, target = to_post.pop(0)
            if source == target:
                arriving[s, i, gradient] = made.pop((s, i, gradient)), None
            elif source == rank:
                tensor = made.pop((s, i, gradient)).contiguous()
                sending.append((tensor, dist.isend(tensor, group=group, group_dst=target)))
            else:  # a gradient looks like the output it belongs to, which was sent before it
                tensor = (torch.empty_like(alive[s - 1, i][0]) if gradient else
                          stages[s + 1].model.embed_tokens.buffer(microbatches[i][0]["input_ids"]))
                arriving[s, i, gradient] = tensor, dist.irecv(tensor, group=group, group_src=source)

    def take(kind: str, s: int, i: int) -> Tensor | None:
        """Wait for what an action needs from another stage."""
        key = {"F": (s - 1, i, False), "W": None}.get(kind, (s + 1, i, True))
        if key is None or not 0 <= key[0] <= last:
            return None
        tensor, handle = arriving.pop(key)
        if handle is not None:
            handle.wait()
        return tensor

    for action in plan.actions[rank]:
        kind, s, i = action
        post()
        came = take(kind, s, i)
        start = time.perf_counter()
        if kind == "F":
            inputs, labels = microbatches[i]
            output, x = forward(stages[s], came, inputs)
            output = loss_of(output, labels) if s == last else output
            own = own_loss(stages[s]) if own_loss else None
            loss += output.detach() if s == last else 0
            if own is not None and torch.is_grad_enabled():
                output = output + own if s == last else Beside.apply(output, own)
            if s < last:
                made[s, i, False] = output.detach()
            if torch.is_grad_enabled():
                alive[s, i] = output, x
        elif kind == "W":
            backward_weights(later.pop((s, i)))
        else:
            output, x = alive.pop((s, i))
            if kind == "B":
                gradient, later[s, i] = backward_input(output, came, x)
            else:
                if output.requires_grad:  # unless all of the first stage is frozen
                    torch.autograd.backward(output, came)
                gradient = x.grad if s > 0 else None
            if s > 0:
                made[s, i, True] = gradient
            del output, x
        timeline.append((action, start, time.perf_counter()))
        sending[:] = [(tensor, handle) for tensor, handle in sending if not handle.is_completed()]
    post()
    for _, handle in sending:
        handle.wait()
    if ranks > 1:
        dist.all_reduce(loss, dist.ReduceOp.SUM, group)
    return loss, timeline
