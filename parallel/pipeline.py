"""Pipeline parallelism: layers on different ranks, microbatches flowing through, by schedules that are plain data.

    stage s of p * v lies on rank s % p;   F = forward,  D = whole backward,  or B = gradient of the input, then W = of
    the weights;   a schedule = for every rank a list of Action(kind, stage, microbatch), in the order it runs them

    schedule       slots (F = B = W = 1, D = 2)     idle per rank       live microbatches on rank r
    gpipe          3 (m + p - 1)                    3 (p - 1)           m
    1f1b           3 (m + p - 1)                    3 (p - 1)           min(m, p - r)
    interleaved    3 (m v + p - 1) of a chunk       3 (p - 1)           2 (p - r - 1) + (v - 1) p + 1 chunks  (m > p)
    zb (ZB-H1)     3 m + p - 1                      p - 1 (F + B - W)   min(m, p)

`simulate` checks such a list against the dependencies and counts; `execute` runs the very same list on real ranks and
times it; `draw` prints it. `cut` makes the stages of a CausalLM: the model with the other stages' pieces taken out.

    python parallel/pipeline.py               draws the four schedules for 4 ranks and 8 microbatches

Sources: GPipe (arXiv:1811.06965); 1F1B: PipeDream (arXiv:1806.03377); interleaved: Megatron-LM (arXiv:2104.04473),
section 2.2; ZB-H1: Qi et al. (arXiv:2401.10241), section 2. Between two stages only one activation or gradient
(B, S, hidden) per microbatch travels.
"""

import copy
import time
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

# ------------------------------------------------------------------------------------------------------------ schedules


class Action(NamedTuple):
    kind: str  # F, D = B + W in one, B or W
    stage: int  # among all p * v
    microbatch: int


SLOTS = {"F": 1, "D": 2, "B": 1, "W": 1}


def gpipe(p: int, m: int) -> list[list[Action]]:
    """All forwards, then all backwards: simple, and every microbatch is alive at once."""
    return [[Action("F", r, i) for i in range(m)] + [Action("D", r, i) for i in range(m)] for r in range(p)]


def one_f_one_b(p: int, m: int) -> list[list[Action]]:
    """As soon as a microbatch can go back, it does: at most p - r are alive on rank r."""
    def rank(r: int) -> list[Action]:
        warm = min(m, p - r - 1)
        actions = [Action("F", r, i) for i in range(warm)]
        for i in range(m - warm):
            actions += [Action("F", r, warm + i), Action("D", r, i)]
        return actions + [Action("D", r, i) for i in range(m - warm, m)]

    return [rank(r) for r in range(p)]


def interleaved(p: int, m: int, v: int = 2) -> list[list[Action]]:
    """1F1B where each rank holds v thinner stages, r, r + p, r + 2 p ...: the bubble shrinks to 1 / v of it."""
    if m % p:
        raise ValueError(f"the interleaved schedule needs microbatches in multiples of its {p} ranks, not {m}")
    n = m * v

    def forward(r: int, k: int) -> Action:  # the k-th of a rank: p microbatches through a chunk, then the next chunk
        return Action("F", k % (p * v) // p * p + r, k // (p * v) * p + k % p)

    def backward(r: int, k: int) -> Action:
        return Action("D", (v - 1 - k % (p * v) // p) * p + r, k // (p * v) * p + k % p)

    def rank(r: int) -> list[Action]:
        warm = min(n, 2 * (p - r - 1) + (v - 1) * p)
        actions = [forward(r, k) for k in range(warm)]
        for k in range(n - warm):
            actions += [forward(r, warm + k), backward(r, k)]
        return actions + [backward(r, k) for k in range(n - warm, n)]

    return [rank(r) for r in range(p)]


def zb_h1(p: int, m: int) -> list[list[Action]]:
    """1F1B with the backward cut in two: the next rank waits only for B, and the W, put off, fill the bubble.

    Rank r puts off r of them: then p microbatches are alive on each rank, no more than 1F1B has on its first.
    """
    def rank(r: int) -> list[Action]:
        warm, actions, done = min(m, p - r - 1), [], 0
        actions += [Action("F", r, i) for i in range(warm)]
        for i in range(m):
            actions += [Action("F", r, warm + i)] if warm + i < m else []
            actions += [Action("B", r, i)]
            if i >= r:
                actions, done = actions + [Action("W", r, done)], done + 1
        return actions + [Action("W", r, i) for i in range(done, m)]

    return [rank(r) for r in range(p)]


def forward_only(p: int, m: int, v: int = 1) -> list[list[Action]]:
    """Evaluation: no backward."""
    return [[Action("F", c * p + r, i) for c in range(v) for i in range(m)] for r in range(p)]


def schedule(name: str, p: int, m: int, v: int = 1) -> list[list[Action]]:
    """The actions of every rank. name: gpipe, 1f1b, interleaved, zb; p ranks, m microbatches, v stages per rank."""
    if p < 1 or m < 1 or v < 1:
        raise ValueError(f"a pipeline of {p} ranks, {m} microbatches, {v} stages per rank: each must be at least 1")
    if name == "interleaved":
        return interleaved(p, m, v)
    makers = {"gpipe": gpipe, "1f1b": one_f_one_b, "zb": zb_h1}
    if name not in makers or v != 1:
        raise ValueError(f"pipeline schedule {name!r} with {v} stages per rank; choose gpipe, 1f1b, zb with 1, or interleaved")
    return makers[name](p, m)


# ------------------------------------------------------------------------------------------------------------ simulator


class Simulation(NamedTuple):
    timeline: list[list[tuple[Action, float, float]]]  # per rank (action, start, end)
    slots: float  # from the first start to the last end
    idle: list[float]  # per rank
    peak: list[int]  # per rank: the most (stage, microbatch) pairs that were alive, from F's start to the end of D or W


def needs(action: Action, stages: int) -> list[tuple[str, int, int]]:
    """What must be done before; "G" stands for the gradient to the input, which B and D make."""
    kind, s, i = action
    if kind == "F":
        return [("F", s - 1, i)] if s else []
    if kind == "W":
        return [("G", s, i)]
    return [("F", s, i)] + ([("G", s + 1, i)] if s + 1 < stages else [])


def simulate(actions: list[list[Action]], slots: dict | Callable = SLOTS) -> Simulation:
    """Run a schedule on paper: each action starts once its rank is free and what it needs is there; sending costs none.

    slots: the duration by kind, or of an Action (measured seconds, say). ValueError: a deadlock, or an action that is
    missing, doubled or on a wrong rank.
    """
    duration = slots if callable(slots) else lambda action: slots[action.kind]
    ranks = len(actions)
    stages = 1 + max(a.stage for rank in actions for a in rank)
    check_complete(actions, stages)
    done, timeline, clock, nothing_moved = {}, [[] for _ in actions], [0] * ranks, False
    while any(len(timeline[r]) < len(actions[r]) for r in range(ranks)):
        if nothing_moved:
            r = next(r for r in range(ranks) if len(timeline[r]) < len(actions[r]))
            raise ValueError(f"the schedule deadlocks: rank {r} waits before {actions[r][len(timeline[r])]}")
        nothing_moved = True
        for r in range(ranks):
            while len(timeline[r]) < len(actions[r]):
                action = actions[r][len(timeline[r])]
                before = needs(action, stages)
                if any(key not in done for key in before):
                    break
                start = max([clock[r], *(done[key] for key in before)])
                clock[r] = start + duration(action)
                done["G" if action.kind in "BD" else action.kind, action.stage, action.microbatch] = clock[r]
                timeline[r].append((action, start, clock[r]))
                nothing_moved = False
    total = max(clock)
    return Simulation(timeline, total, [total - sum(e - s for _, s, e in row) for row in timeline],
                      [peak_live(rank) for rank in actions])


def check_complete(actions: list[list[Action]], stages: int) -> None:
    counts: dict = {}
    for r, rank in enumerate(actions):
        for a in rank:
            if a.stage % len(actions) != r:
                raise ValueError(f"{a} stands on rank {r}; stage {a.stage} lies on rank {a.stage % len(actions)}")
            counts[a.stage, a.microbatch] = counts.get((a.stage, a.microbatch), "") + a.kind
    microbatches = 1 + max(i for _, i in counts)
    allowed = ("F",) if set(counts.values()) == {"F"} else ("FD", "FBW")  # forward alone: evaluation
    for s in range(stages):
        for i in range(microbatches):
            if (found := counts.get((s, i), "")) not in allowed:
                raise ValueError(f"stage {s}, microbatch {i} has the actions {found!r}; it must have {' or '.join(allowed)}")


def peak_live(rank: list[Action]) -> int:
    alive = peak = 0
    for action in rank:
        alive += {"F": 1, "D": -1, "B": 0, "W": -1}[action.kind]
        peak = max(peak, alive)
    return peak


def draw(simulation: Simulation) -> str:
    """One line per rank, one cell per slot: F3 = forward of microbatch 3; D3 =3 its whole backward, two slots long;
    B3, W3 the halves; a' marks the later chunks of an interleaved schedule; dots are idle."""
    rows = []
    for r, row in enumerate(simulation.timeline):
        cells = ["."] * int(simulation.slots)
        for (kind, stage, i), start, end in row:
            cells[int(start):int(end)] = [k + str(i) + "'" * (stage // len(simulation.timeline))
                                          for k in (kind + "=")[:int(end - start)]]
        rows.append(f"rank {r} " + "".join(f"{cell:<4}" for cell in cells).rstrip())
    return "\n".join(rows)


class Transfer(NamedTuple):
    time: float  # when its sender has it, in the simulation
    stage: int  # that makes it
    microbatch: int
    gradient: bool  # from stage to stage - 1; else an activation, from stage to stage + 1
    source: int  # ranks
    target: int


def transfers(simulation: Simulation) -> list[Transfer]:
    """All messages in one total order, that of the simulated time.

    Every rank posts its own in this order. So each pair of ranks agrees on theirs (needed by NCCL, which matches
    messages by order, on one stream), and the earliest outstanding message always has both its ends posted: no deadlock.
    """
    ranks = len(simulation.timeline)
    stages = 1 + max(a.stage for row in simulation.timeline for a, _, _ in row)
    found = []
    for r, row in enumerate(simulation.timeline):
        for (kind, s, i), _, end in row:
            if kind == "F" and s + 1 < stages:
                found.append(Transfer(end, s, i, False, r, (s + 1) % ranks))
            elif kind in "BD" and s:
                found.append(Transfer(end, s, i, True, r, (s - 1) % ranks))
    return sorted(found)


# --------------------------------------------------------------------------------------------- the model, cut in stages


class Received(nn.Module):
    """Stands where a later stage has no embedding: gives out the activations that came from the stage before."""

    def __init__(self, width: int, dtype: torch.dtype, shards: int):
        super().__init__()
        self.width, self.dtype, self.shards = width, dtype, shards  # shards: of the sequence, by sequence parallelism
        self.x = None

    def buffer(self, input_ids: Tensor) -> Tensor:
        B, S = input_ids.shape
        return torch.empty(B, S // self.shards, self.width, dtype=self.dtype, device=input_ids.device)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, self.x = self.x, None
        return x


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
    """The stages of one rank {stage: module}, cut from a CausalLM of any initial weights. The model is not changed.

    A stage is the model with the other stages' pieces taken out: same class, same forward, same parameter names. The
    first alone has the embedding, the last alone norm and head. sizes: layers of each stage; default `balance` by
    parameters: embedding and head weigh too, the former not by time but by memory, which is scarcest on rank 0.
    Tied weights: if first and last stage lie apart, each has its copy and placement {"tied": name of the other}, and
    their gradients must be summed before the optimizer sees them (`sum_tied_gradients`).
    """
    weigh = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    trunk, stages = model.model, ranks * v
    embed, head = trunk.embed_tokens, model.lm_head
    sizes = sizes or balance([weigh(layer) for layer in trunk.layers], stages, weigh(embed), weigh(head))
    if len(sizes) != stages or sum(sizes) != len(trunk.layers) or min(sizes) < 1:
        raise ValueError(f"{stages} stages of {sizes} layers do not make up {len(trunk.layers)} layers")
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
        if s < stages - 1:
            stage.model.norm = stage.lm_head = nn.Identity()
        found[s] = stage
    return found


def shell(module: nn.Module) -> nn.Module:
    """A copy of the module alone, whose children and parameters, the same objects, can be exchanged."""
    twin = copy.copy(module)
    twin._modules, twin._parameters = dict(module._modules), dict(module._parameters)
    return twin


def sum_tied_gradients(stages: dict[int, nn.Module], group=None) -> None:
    """Embedding and head of a tied model each saw a part of the gradient: first and last rank exchange theirs, and both
    hold the same sum. Before clipping, and before ZeRO scatters gradients (Megatron-LM #844), or the copies drift."""
    tied = [p for stage in stages.values() for p in stage.parameters() if "tied" in getattr(p, "placement", {})]
    if not tied or group is None:
        return
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    peer, mine, other = ranks - 1 - rank, tied[0].grad, torch.empty_like(tied[0].grad)
    both = [dist.P2POp(dist.isend, mine, group=group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=group, group_peer=peer)]
    for handle in dist.batch_isend_irecv(both):
        handle.wait()
    tied[0].grad = mine + other  # two terms: the same in either order, to the bit


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
    """Nodes on a path from root to end, the latter excluded -> ({node: True}, {node: numbers of its outputs in use})."""
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


def execute(actions: list[list[Action]], stages: dict[int, nn.Module], microbatches: list[tuple[dict, Tensor]],
            loss_of: Callable[[Tensor, Tensor], Tensor], group=None) -> tuple[Tensor, list]:
    """Run this rank's list of a schedule; gradients are added to .grad -> (loss, timeline).

    stages: from `cut`. microbatches, the same on all ranks of the group: (keyword arguments of the model's forward, with
    input_ids (B, S); labels (B, S)). loss_of(logits, labels) -> scalar, summed over tokens and divided by the number
    counted in the *global* batch, so that those of microbatches add up. loss: their sum, float64, on every rank.
    timeline: (action, start, end) in seconds of the machine's clock, without the wait for what the action needs.
    """
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    if len(actions) != ranks:
        raise ValueError(f"a schedule of {len(actions)} ranks on {ranks}")
    simulation = simulate(actions)
    last = max(a.stage for row in actions for a in row)
    to_post = [t for t in transfers(simulation) if rank in (t.source, t.target)]
    made, arriving, sending = {}, {}, []  # by (stage that makes it, microbatch, is it a gradient)
    alive, later, timeline = {}, {}, []  # alive: (output, x) of a stage and microbatch
    loss = torch.zeros((), dtype=torch.float64, device=microbatches[0][1].device)

    def post() -> None:
        """Start the next messages in the total order, up to a send whose tensor is still to be made."""
        while to_post and (to_post[0].source != rank or to_post[0][1:4] in made):
            t = to_post.pop(0)
            key = t[1:4]
            if t.source == t.target:
                arriving[key] = made.pop(key), None
            elif t.source == rank:
                tensor = made.pop(key).contiguous()
                sending.append((tensor, dist.isend(tensor, group=group, group_dst=t.target)))
            else:  # a gradient looks like the output it belongs to
                tensor = (torch.empty_like(alive[t.stage - 1, t.microbatch][0]) if t.gradient else
                          stages[t.stage + 1].model.embed_tokens.buffer(microbatches[t.microbatch][0]["input_ids"]))
                arriving[key] = tensor, dist.irecv(tensor, group=group, group_src=t.source)

    def take(key) -> Tensor:
        tensor, handle = arriving.pop(key)
        if handle is not None:
            handle.wait()
        return tensor

    for action in actions[rank]:
        kind, s, i = action
        post()
        came = take((s - 1, i, False)) if kind == "F" and s > 0 else take((s + 1, i, True)) if kind in "BD" and s < last else None
        start = time.perf_counter()
        if kind == "F":
            output, x = forward(stages[s], came, microbatches[i][0])
            if s == last:
                output = loss_of(output, microbatches[i][1])
                loss += output.detach()
            else:
                made[s, i, False] = output.detach()
            if torch.is_grad_enabled():
                alive[s, i] = output, x
        elif kind == "W":
            backward_weights(later.pop((s, i)))
        else:
            output, x = alive.pop((s, i))
            gradient = None
            if kind == "B":
                gradient, later[s, i] = backward_input(output, came, x)
            elif output.requires_grad:  # unless all of the first stage is frozen
                torch.autograd.backward(output, came)
                gradient = x.grad if s > 0 else None
            if s > 0:
                made[s, i, True] = gradient
            del output, x
        timeline.append((action, start, time.perf_counter()))
        sending = [(tensor, handle) for tensor, handle in sending if not handle.is_completed()]
    post()
    for _, handle in sending:
        handle.wait()
    if ranks > 1:
        dist.all_reduce(loss, dist.ReduceOp.SUM, group)
    return loss, timeline


def forward(stage: nn.Module, came: Tensor | None, inputs: dict) -> tuple[Tensor, Tensor]:
    """-> (logits or activations for the next stage, x: what came, or on the first stage the embedding's output)."""
    entry, seen = stage.model.embed_tokens, []
    if came is not None:
        entry.x = came.requires_grad_(torch.is_grad_enabled())
    hook = entry.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        return stage(**inputs), seen[0]
    finally:
        hook.remove()


def compare(actions: list[list[Action]], timelines: list[list]) -> dict:
    """Recorded timelines of all ranks beside the simulation, which here takes the measured durations as its slots.

    -> {"same_order", "kept_order": no action began before what it needs had ended, "predicted", "measured": seconds}.
    """
    stages = 1 + max(a.stage for row in actions for a in row)
    seconds = {action: end - start for row in timelines for action, start, end in row}
    ends = {("G" if a.kind in "BD" else a.kind, a.stage, a.microbatch): e for row in timelines for a, _, e in row}
    return {"same_order": [[a for a, _, _ in row] for row in timelines] == actions,
            "kept_order": all(ends[key] <= start for row in timelines for a, start, _ in row for key in needs(a, stages)),
            "predicted": simulate(actions, lambda action: seconds[action]).slots,
            "measured": max(e for row in timelines for _, _, e in row) - min(s for row in timelines for _, s, _ in row)}


if __name__ == "__main__":
    for name, chunks in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb", 1)):
        on_paper = simulate(schedule(name, 4, 8, chunks))
        print(f"{name}: {on_paper.slots} slots, idle {on_paper.idle}, live {on_paper.peak}\n{draw(on_paper)}\n")
