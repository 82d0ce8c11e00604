"""Pipeline schedules: plain lists of actions, checked and counted on paper before any rank runs them.

    stage s of p v lies on rank s % p; a schedule = for each rank a list, in its order, of (kind, stage, microbatch)
    F = forward;   D = the whole backward;   or in its place   B = gradient of the input, and later W = of the weights

    schedule       slots (F = B = W = 1, D = 2)     idle per rank        live microbatches on rank r
    gpipe          3 (m + p - 1)                    3 (p - 1)            m
    1f1b           3 (m + p - 1)                    3 (p - 1)            min(m, p - r)
    interleaved    3 (m v + p - 1) of a chunk       3 (p - 1)            2 (p - r - 1) + (v - 1) p + 1 chunks, if m > p
    zb (ZB-H1)     3 m + p - 1, if m >= p           (p - 1)(F + B - W)   min(m, p)

`simulate` runs such lists on paper: dependencies, slots, idle time, live microbatches. `transfers` puts the messages in
an order that cannot deadlock, `draw` prints, `compare` holds what really happened to the paper. pipeline.py executes.

    python parallel/schedules.py                  draws the four for 4 ranks and 8 microbatches

Sources: GPipe (arXiv:1811.06965); 1F1B: PipeDream (arXiv:1806.03377); interleaved: Megatron-LM (arXiv:2104.04473),
section 2.2; ZB-H1: Qi et al. (arXiv:2401.10241), section 2.
"""

from typing import Callable, NamedTuple

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
        raise ValueError(f"pipeline schedule {name!r} with {v} stages per rank; choose gpipe, 1f1b or zb with 1, or "
                         "interleaved with more")
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
                raise ValueError(f"stage {s}, microbatch {i} has the actions {found!r}; it must have "
                                 f"{' or '.join(allowed)}")


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

    Every rank posts its own in this order. So each pair of ranks agrees on theirs, as NCCL needs, which matches them
    by order, on one stream; and the earliest that is outstanding always has both its ends posted: no deadlock.
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


class Plan(NamedTuple):
    """What pipeline.execute runs."""

    actions: list[list[Action]]  # per rank
    messages: list[Transfer]


def plan(name: str, p: int, m: int, v: int = 1) -> Plan:
    """A named schedule, checked, with its messages; "forward" for evaluation."""
    actions = forward_only(p, m, v) if name == "forward" else schedule(name, p, m, v)
    return Plan(actions, transfers(simulate(actions)))


def compare(actions: list[list[Action]], timelines: list[list]) -> dict:
    """Recorded timelines of all ranks beside the simulation, which here takes the measured durations as its slots.

    -> {"same_order", "kept_order": no action began before what it needs had ended, "predicted", "measured": seconds}.
    The ranks' clocks must be one machine's.
    """
    stages = 1 + max(a.stage for row in actions for a in row)
    seconds = {action: end - start for row in timelines for action, start, end in row}
    ends = {("G" if a.kind in "BD" else a.kind, a.stage, a.microbatch): e for row in timelines for a, _, e in row}
    return {"same_order": [[a for a, _, _ in row] for row in timelines] == actions,
            "kept_order": all(ends[k] <= start for row in timelines for a, start, _ in row for k in needs(a, stages)),
            "predicted": simulate(actions, lambda action: seconds[action]).slots,
            "measured": max(row[-1][2] for row in timelines) - min(row[0][1] for row in timelines)}


if __name__ == "__main__":
    for name, chunks in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb", 1)):
        on_paper = simulate(schedule(name, 4, 8, chunks))
        print(f"{name}: {on_paper.slots} slots, idle {on_paper.idle}, live {on_paper.peak}\n{draw(on_paper)}\n")
