"""Tests of parallel/ledger.py: each collective counted by the ring's formula, bytes held, formulas at known points."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from optim import AdamW
from parallel.ledger import (STRATEGIES, Ledger, data_parallel_elements, held, held_by, measure, pipeline_peak, pipeline_slots,
                             ring_bytes, state_bytes, tensor_parallel_all_reduces)
from processes import run_on


def every_collective(world):
    rank, originals = dist.get_rank(), {name: getattr(dist, name) for name in dir(dist)}
    x, parts = torch.ones(12), [torch.ones(3) for _ in range(world)]  # 48 bytes, in 4 parts of 12
    with Ledger() as ledger:
        dist.all_reduce(x)
        dist.all_reduce(x, async_op=True).wait()
        dist.reduce_scatter_tensor(torch.empty(3), x)
        dist.reduce_scatter(torch.empty(3), parts)
        dist.all_gather_into_tensor(torch.empty(12), torch.ones(3))
        dist.all_gather([torch.empty(3) for _ in range(world)], torch.ones(3))
        dist.all_to_all_single(torch.empty(12), x)
        dist.broadcast(x, src=0)
        even = ledger.entries[:]
        splits = [rank + 1, 1, 1, 1]  # to itself: rank 0 keeps 1 of 4, the others 1 of their rank + 4
        receives = [r + 1 if rank == 0 else 1 for r in range(world)]
        dist.all_to_all_single(torch.empty(sum(receives)), torch.ones(sum(splits)), receives, splits)
        handles = [dist.isend(x, (rank + 1) % world), dist.irecv(torch.empty(12), (rank - 1) % world)]
        [h.wait() for h in handles]
        ops = [dist.P2POp(dist.isend, x, (rank + 1) % world), dist.P2POp(dist.irecv, torch.empty(12), (rank - 1) % world)]
        [h.wait() for h in dist.batch_isend_irecv(ops)]
        dist.barrier()
    assert all(getattr(dist, name) is f for name, f in originals.items() if callable(f)), "the originals are back"
    return [tuple(e) for e in even], [tuple(e) for e in ledger.entries[len(even):]], ledger.sent(), ledger.count("all_reduce")


def test_each_collective_is_its_payload_times_the_ring_factor():
    for rank, (even, rest, sent, all_reduces) in enumerate(run_on(4, every_collective)):
        ops = ["all_reduce"] * 2 + ["reduce_scatter"] * 2 + ["all_gather"] * 2 + ["all_to_all", "broadcast"]
        assert [(op, n, payload) for op, n, payload, *_ in even] == [(op, 4, 48) for op in ops]
        assert [e[3] for e in even] == [72, 72] + [36] * 6  # 2 (n - 1) / n and (n - 1) / n of 48 bytes
        uneven, single, batched = rest
        assert uneven[:3] == ("all_to_all", 4, 4 * (rank + 4)) and uneven[3] == (12 if rank == 0 else 4 * (rank + 3))
        assert single[:4] == batched[:4] == ("send", 4, 48, 48) and all_reduces == 2
        assert sent == 72 * 2 + 36 * 6 + uneven[3] + 96


def test_the_ring_itself_sends_what_the_formula_says():
    """A ring all-reduce walked by hand: each rank sends one chunk in each of 2 (n - 1) rounds."""
    n, chunk = 4, 5
    x = torch.randn(n, n, chunk, dtype=torch.float64)  # (rank, chunk, element)
    total, sent = x.sum(0), 0
    for step in range(n - 1):  # reduce-scatter: chunk r - step goes from r to r + 1, and is added there
        moved = [x[r, (r - step) % n].clone() for r in range(n)]
        for r in range(n):
            x[(r + 1) % n, (r - step) % n] += moved[r]
        sent += chunk
    for step in range(n - 1):  # all-gather
        moved = [x[r, (r + 1 - step) % n].clone() for r in range(n)]
        for r in range(n):
            x[(r + 1) % n, (r + 1 - step) % n] = moved[r]
        sent += chunk
    assert all(torch.allclose(x[r], total, rtol=1e-13) for r in range(n))
    assert sent == ring_bytes("all_reduce", n * chunk, n) == Fraction(2 * (n - 1), n) * n * chunk


def test_bytes_held_count_a_storage_once_and_a_freed_one_not():
    x = torch.zeros(100)
    assert held([x, x[:10], x.view(10, 10), None]) == 400
    x.untyped_storage().resize_(0)
    assert held([x]) == 0


def test_adamw_holds_16_bytes_a_weight():
    w = torch.nn.Parameter(torch.randn(7, 11))
    optimizer = AdamW([w])
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert held_by([w], optimizer) == state_bytes(77, ranks=4, stage=0) == dict(parameters=308, gradients=308, optimizer=616)


def test_state_bytes_are_those_of_the_paper():
    n = 8
    for stage, fp32, bf16 in ((0, 16, 16), (1, 8 + Fraction(8, n), 4 + Fraction(12, n)),
                              (2, 4 + Fraction(12, n), 2 + Fraction(14, n)), (3, Fraction(16, n), Fraction(16, n))):
        assert sum(state_bytes(1, n, stage).values()) == fp32
        assert sum(state_bytes(1, n, stage, 2, 2, 12).values()) == bf16
    assert [data_parallel_elements(4, 4, stage, 5) for stage in range(4)] == [6, 6, 18, 45]


def test_pipeline_formulas_at_p4_m8():
    assert [pipeline_slots(s, 4, 8, v) for s, v in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb", 1))] == [33, 33, 57, 27]
    assert [pipeline_peak("1f1b", 4, 8, r) for r in range(4)] == [4, 3, 2, 1]
    assert [pipeline_peak("interleaved", 4, 8, r, 2) for r in range(4)] == [11, 9, 7, 5]
    assert [pipeline_peak(s, 4, 8, 1) for s in ("gpipe", "zb")] == [8, 4]
    assert tensor_parallel_all_reduces(4) == 18


def peak(world):
    x, buffer = torch.ones(4), torch.ones(1000)
    with Ledger(live=lambda: [buffer]) as ledger:
        dist.all_reduce(x)
        buffer.untyped_storage().resize_(8)
        dist.all_reduce(x)
    return ledger.peak


def test_the_peak_is_the_most_that_was_held_at_any_collective():
    assert run_on(2, peak) == [4000, 4000]


def test_an_exception_puts_the_originals_back():
    original = dist.all_reduce
    with pytest.raises(KeyError), Ledger():
        assert dist.all_reduce is not original
        raise KeyError
    assert dist.all_reduce is original


def measured(world, strategy):
    return [tuple(row) for row in measure(strategy, world)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_table_predicts_every_strategy_exactly(strategy):
    for rows in run_on(2, measured, strategy):
        assert len(rows) >= 1 and all(predicted == found > 0 for what, _, predicted, found in rows if "padding" not in what), rows


def command(*flags):
    return subprocess.run([sys.executable, "-m", "parallel.ledger", *flags], capture_output=True, text=True,
                          cwd=Path(__file__).resolve().parents[1])


def test_the_command_draws_a_schedule_with_the_formula_beside_the_simulation():
    lines = command("--schedule", "zb", "--stages", "4", "--microbatches", "8").stdout.splitlines()
    assert lines[0].split()[:5] == ["rank", "0", "F0", "F1", "F2"]
    counts = [line.rsplit(maxsplit=2)[1:] for line in lines[6:]]
    assert counts[0] == ["27", "27"] and all(a == b == "4" for a, b in counts[1:]) and len(counts) == 5


def test_an_impossible_number_of_ranks_gives_one_line():
    run = command("--ranks", "3")
    assert run.returncode == 2 and run.stderr == "error: --ranks 3: the model of this table has 4 heads and 4 layers; take 2 or 4\n"
