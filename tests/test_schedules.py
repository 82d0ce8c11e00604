"""parallel/schedules.py: slots, idle time and live microbatches against the formulas; order, drawing, comparison."""

import pytest

from parallel.schedules import Action, compare, draw, forward_only, plan, schedule, simulate

@pytest.mark.parametrize("name, v, slots", [("gpipe", 1, 33), ("1f1b", 1, 33), ("interleaved", 2, 57), ("zb", 1, 27)])
def test_slots_of_four_ranks_and_eight_microbatches(name, v, slots):
    assert simulate(schedule(name, 4, 8, v)).slots == slots


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 16])
def test_slots_idle_and_live_microbatches_are_the_formulas(p, m):
    for name in ("gpipe", "1f1b"):
        s = simulate(schedule(name, p, m))
        assert s.slots == 3 * (m + p - 1) and s.idle == [3 * (p - 1)] * p
        assert s.peak == [m if name == "gpipe" else min(m, p - r) for r in range(p)]
    s = simulate(schedule("zb", p, m))
    if m >= p:
        assert s.slots == 3 * m + p - 1 and s.idle == [p - 1] * p
    assert s.peak == [min(m, p)] * p
    for v in (2, 3):
        if m % p == 0:
            s = simulate(schedule("interleaved", p, m, v))
            assert s.slots == 3 * (m * v + p - 1) and s.idle == [3 * (p - 1)] * p  # (p - 1) / (v m) of the whole
            if m > p:
                assert s.peak == [2 * (p - r - 1) + (v - 1) * p + 1 for r in range(p)]


def test_bubble_shrinks_with_interleaving_by_the_number_of_chunks():
    for schedules, bubble in ((schedule("1f1b", 4, 8), 3 / 8), (schedule("interleaved", 4, 8, 2), 3 / 16)):
        s = simulate(schedules)
        assert s.idle[0] / (s.slots - s.idle[0]) == bubble  # (p - 1) / m, (p - 1) / (v m)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb"])
def test_fewer_microbatches_than_stages_do_not_hang_on_paper(name):
    for m in (1, 2, 3):
        assert simulate(schedule(name, 4, m)).slots <= 3 * (m + 3)


def test_simulator_finds_deadlocks_and_lost_actions():
    good = schedule("1f1b", 2, 2)
    swapped = [[Action(k, r, i) for i in order for k in "FD"] for r, order in enumerate([(0, 1), (1, 0)])]
    with pytest.raises(ValueError, match="deadlocks: rank 0 waits before Action.kind='D'"):
        simulate(swapped)
    with pytest.raises(ValueError, match="stage 1, microbatch 1 has the actions 'F'; it must have FD or FBW"):
        simulate([good[0], good[1][:-1]])
    with pytest.raises(ValueError, match="stands on rank 0; stage 1 lies on rank 1"):
        simulate([good[1], good[0]])


def test_interleaved_refuses_other_numbers_of_microbatches():
    with pytest.raises(ValueError, match="multiples of its 4 ranks, not 6"):
        schedule("interleaved", 4, 6, 2)


def test_drawing_has_every_action_in_its_slot():
    text = draw(simulate(schedule("zb", 2, 2)))
    assert text == ("rank 0 F0  F1  .   B0  W0  B1  W1\n"
                    "rank 1 .   F0  B0  F1  B1  W0  W1")
    assert draw(simulate(schedule("gpipe", 1, 1))) == "rank 0 F0  D0  =0"


def stuck(plan) -> list[int]:
    """Runs a plan where each rank has one serial stream, as on NCCL: a message is done when it is the first of both its
    ranks' streams. -> the ranks that do not finish."""
    ranks = len(plan.actions)
    todo = [list(actions) for actions in plan.actions]
    queue = [[m for m in plan.messages if r in (m.source, m.target)] for r in range(ranks)]
    stream, made, arrived, moved = [[] for _ in range(ranks)], set(), set(), True
    while moved:
        moved = False
        for r in range(ranks):
            while queue[r] and (queue[r][0].source != r or queue[r][0][1:4] in made):  # as the executor posts them
                stream[r].append(queue[r].pop(0))
            if stream[r] and stream[stream[r][0].source][:1] == stream[stream[r][0].target][:1]:
                message = stream[r][0]
                for end in {message.source, message.target}:
                    stream[end].pop(0)
                arrived.add(message[1:4])
                moved = True
            if todo[r]:
                kind, s, i = todo[r][0]
                needed = {"F": (s - 1, i, False), "W": None}.get(kind, (s + 1, i, True))
                if needed is None or not any(m[1:4] == needed for m in plan.messages) or needed in arrived:
                    todo[r].pop(0)
                    made |= {(s, i, kind != "F")} if kind != "W" else set()
                    moved = True
    return [r for r in range(ranks) if todo[r] or stream[r] or queue[r]]


def test_messages_are_posted_in_one_order_that_cannot_deadlock():
    for name, p, m, v in (("gpipe", 3, 2, 1), ("1f1b", 4, 8, 1), ("1f1b", 2, 8, 1), ("zb", 4, 3, 1), ("zb", 2, 8, 1),
                          ("interleaved", 4, 8, 3), ("interleaved", 2, 4, 2), ("interleaved", 2, 2, 3),
                          ("forward", 3, 4, 2)):
        good = plan(name, p, m, v)
        assert len(good.messages) == (1 if name == "forward" else 2) * m * (p * v - 1)
        assert stuck(good) == [], name
    good = plan("1f1b", 2, 2)
    assert stuck(good._replace(messages=good.messages[::-1]))  # another order does deadlock


def test_timeline_of_an_unequal_run_is_predicted_from_its_durations():
    actions = schedule("1f1b", 2, 2)
    times = {Action("F", 0, 0): (0, 2), Action("F", 0, 1): (2, 4), Action("F", 1, 0): (3, 4), Action("D", 1, 0): (4, 6),
             Action("F", 1, 1): (6, 7), Action("D", 1, 1): (7, 9), Action("D", 0, 0): (7, 10),
             Action("D", 0, 1): (10, 13)}
    found = compare(actions, [[(a, *times[a]) for a in row] for row in actions])
    assert found == {"same_order": True, "kept_order": True, "predicted": 11, "measured": 13}


def test_evaluation_runs_forward_only():
    assert simulate(forward_only(4, 8)).slots == 11 and plan("forward", 2, 3, 2).actions == forward_only(2, 3, 2)


def test_bad_requests_are_refused_with_one_line():
    for bad, message in ((("zb", 4, 8, 2), "'zb' with 2 stages per rank; choose gpipe, 1f1b or zb with 1"),
                         (("dualpipe", 4, 8, 1), "'dualpipe'"), (("gpipe", 4, 0, 1), "0 microbatches")):
        with pytest.raises(ValueError, match=message):
            plan(*bad)
