"""The ledger: what a parallel step sends and holds, counted, beside what the formula says that it must.

    bytes a rank sends = logical payload M x ring factor of n ranks        (a ring moves the least that can be)
        all-reduce 2 (n - 1) / n      reduce-scatter, all-gather, all-to-all, broadcast, reduce (n - 1) / n   send 1

    with Ledger() as ledger:            # counts this process's calls of torch.distributed within
        train_step()
    ledger.sent(), ledger.sent("all_reduce"), ledger.count("all_reduce"), ledger.entries

The payload is logical: what gloo really moves differs (its reduce-scatter is an all-reduce). Bytes held are those of
distinct storages: views of one buffer count once, and a buffer that was freed counts nothing.

    python -m parallel.ledger                                   # every strategy on 2 gloo processes
    python -m parallel.ledger --strategy zero3 --ranks 4        # formula, prediction, measurement, difference
    python -m parallel.ledger --schedule 1f1b --stages 4 --microbatches 8         # draws a pipeline schedule as text
"""

import argparse
import inspect
from fractions import Fraction
from functools import wraps
from typing import NamedTuple

import torch
import torch.distributed as dist

# ------------------------------------------------------------------------------------------------------------ formulas


def ring_bytes(op: str, payload: int, n: int) -> Fraction:
    """Bytes that each of n ranks in a ring sends; payload: the whole tensor's, before a scatter or after a gather."""
    if op == "send":
        return Fraction(payload)
    return Fraction(payload * (2 if op == "all_reduce" else 1) * (n - 1), n)


def state_bytes(numel: int, ranks: int, stage: int, param: int = 4, grad: int = 4, state: int = 8) -> dict:
    """Bytes that a rank holds under ZeRO `stage` (0 is DDP) between backward and the step, padding and units apart.

    param, grad, state: bytes per weight; Adam has 4, 4, 8 in float32, and 2, 2, 12 in bfloat16 with float32 masters.
    Rajbhandari et al. 2020 (arXiv:1910.02054), figure 1.
    """
    split = [Fraction(1, ranks if stage >= least else 1) for least in (3, 2, 1)]
    parts = [numel * size * share for size, share in zip((param, grad, state), split)]
    return dict(zip(("parameters", "gradients", "optimizer"), parts))


def data_parallel_elements(numel: int, ranks: int, stage: int, microbatches: int = 1) -> Fraction:
    """Elements that a rank sends in a step of k microbatches: DDP and ZeRO-1 2, ZeRO-2 k + 1, ZeRO-3 3 k, of each
    (n - 1) / n numel. ZeRO-3 gathers twice and scatters once for each microbatch."""
    k = microbatches
    return (2, 2, k + 1, 3 * k)[stage] * Fraction(numel * (ranks - 1), ranks)


def tensor_parallel_all_reduces(layers: int, vocab_parallel: bool = True) -> int:
    """Activation all-reduces of a step without recomputation: per layer one after each row-parallel matrix, forward,
    and one before each block of column-parallel ones, backward; and one each for embedding and head."""
    return 4 * layers + (2 if vocab_parallel else 0)


def pipeline_slots(schedule: str, stages: int, microbatches: int, chunks: int = 1) -> int:
    """Slots from first to last action, forward = backward to the input = backward to the weights = 1 slot.

    gpipe, 1f1b: 3 (m + p - 1); interleaved: slots of a chunk, 3 (v m + p - 1); zb (ZB-H1): 3 m + p - 1.
    """
    p, m, v = stages, microbatches, chunks
    return {"gpipe": 3 * (m + p - 1), "1f1b": 3 * (m + p - 1), "interleaved": 3 * (v * m + p - 1),
            "zb": 3 * m + p - 1}[schedule]


def pipeline_peak(schedule: str, stages: int, microbatches: int, rank: int, chunks: int = 1) -> int:
    """Microbatches (interleaved: chunks of them, for m > p) whose activations rank holds at most."""
    p, m, v, r = stages, microbatches, chunks, rank
    return {"gpipe": m, "1f1b": min(m, p - r), "interleaved": min(v * m, 2 * (p - r - 1) + (v - 1) * p + 1),
            "zb": min(m, p)}[schedule]


# -------------------------------------------------------------------------------------------------------------- ledger


class Entry(NamedTuple):
    """One call of a collective by this process."""

    op: str  # all_reduce, reduce_scatter, all_gather, all_to_all, broadcast, reduce or send
    ranks: int  # of the group
    payload: int  # logical bytes
    sent: Fraction  # payload x ring factor
    shape: tuple[int, ...]  # of the (first) tensor that is the payload


# torch.distributed's function -> what it is, and the argument that is the payload
COUNTED = {"all_reduce": ("all_reduce", "tensor"), "broadcast": ("broadcast", "tensor"), "reduce": ("reduce", "tensor"),
           "reduce_scatter_tensor": ("reduce_scatter", "input"), "reduce_scatter": ("reduce_scatter", "input_list"),
           "all_gather_into_tensor": ("all_gather", "output_tensor"), "all_gather": ("all_gather", "tensor_list"),
           "reduce_scatter_single": ("reduce_scatter", "input"), "all_gather_single": ("all_gather", "output_tensor"),
           "all_to_all_single": ("all_to_all", "input"), "all_to_all": ("all_to_all", "input_tensor_list"),
           "isend": ("send", "tensor"), "send": ("send", "tensor")}


class Ledger:
    """Counts this process's communication while the context lasts, by standing in for torch.distributed's functions.

    live: a function that returns tensors; the bytes they hold are looked up before each collective, and `peak` keeps
    the most. Files that keep a function of their own (`from torch.distributed import all_reduce`) are not counted.
    """

    def __init__(self, live=None):
        self.entries: list[Entry] = []
        self.live, self.peak = live, 0

    def __enter__(self) -> "Ledger":
        names = [name for name in COUNTED if hasattr(dist, name)]  # two exist since torch 2.13
        self._originals = {name: getattr(dist, name) for name in (*names, "batch_isend_irecv", "P2POp")}
        for name in names:
            setattr(dist, name, self._counting(name))
        isend, P2POp, batch = (self._originals[name] for name in ("isend", "P2POp", "batch_isend_irecv"))
        counting_isend = dist.isend

        def counting_batch(p2p_op_list):
            for p2p in p2p_op_list:
                if p2p.op is isend:
                    self._enter("send", [p2p.tensor], p2p.group)
            return batch(p2p_op_list)

        dist.batch_isend_irecv = counting_batch
        dist.P2POp = lambda op, *args, **kwargs: P2POp(isend if op is counting_isend else op, *args, **kwargs)
        return self

    def __exit__(self, *error) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _counting(self, name: str):
        original, (op, payload) = self._originals[name], COUNTED[name]
        signature = inspect.signature(original)

        @wraps(original)
        def counting(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            tensors = given[payload] if isinstance(given[payload], (list, tuple)) else [given[payload]]
            self._enter(op, tensors, given.get("group"), given.get("input_split_sizes"))
            return original(*args, **kwargs)

        return counting

    def _enter(self, op: str, tensors: list, group, splits=None) -> None:
        n, payload = dist.get_world_size(group), sum(t.numel() * t.element_size() for t in tensors)
        sent = ring_bytes(op, payload, n)
        if op == "all_to_all":  # what stays on this rank is not sent, and parts may be uneven
            own = dist.get_rank(group)
            if len(tensors) > 1:
                sent = Fraction(payload - tensors[own].numel() * tensors[own].element_size())
            elif splits:
                sent = payload - Fraction(payload * splits[own], max(sum(splits), 1))
        self.entries.append(Entry(op, n, payload, sent, tuple(tensors[0].shape)))
        if self.live is not None:
            self.peak = max(self.peak, held(self.live()))

    def sent(self, op: str | None = None) -> Fraction:
        """Bytes that this rank has sent, in all or by one op."""
        return sum((entry.sent for entry in self.entries if op in (None, entry.op)), Fraction())

    def count(self, op: str | None = None, at_least: int = 0) -> int:
        """Calls of an op, or of any; those with a payload of fewer than `at_least` bytes are not counted."""
        return sum(op in (None, entry.op) and entry.payload >= at_least for entry in self.entries)


def held(tensors) -> int:
    """Bytes of the distinct storages under the tensors; None among them is passed over."""
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors if t is not None)}
    return sum(storages.values())


def held_by(parameters, optimizer, gradients=None) -> dict[str, int]:
    """Bytes of parameters, of gradients (else their .grad) and of the optimizer's state: compare with state_bytes."""
    parameters = list(parameters)
    gradients = [p.grad for p in parameters] if gradients is None else gradients
    states = [t for values in optimizer.state.values() for t in values.values() if torch.is_tensor(t)]
    return {"parameters": held(parameters), "gradients": held(gradients), "optimizer": held(states)}


# ---------------------------------------------------------------------------------------------------------------- main

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "tp", "pp", "cp", "ep")
B, S, K = 4, 16, 4  # sequences of a data-parallel rank, their length, microbatches
SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=4)
MIXTURE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)  # under ep


class Row(NamedTuple):
    what: str
    formula: str
    predicted: float
    measured: float


def measure(strategy: str, ranks: int, schedule: str = "1f1b") -> list[Row]:
    """One step of a tiny model under a strategy, on this rank of an initialised world: what was held and sent."""
    from model import CausalLM, ModelConfig
    from optim import AdamW
    from parallel import parallelize
    from parallel.mesh import Mesh

    axis = strategy if strategy in ("tp", "pp", "cp", "ep") else "dp"
    mesh, model = Mesh(**{axis: ranks}), CausalLM(ModelConfig(**SHAPE | (MIXTURE if axis == "ep" else {})))
    numel, L, h = sum(p.numel() for p in model.parameters()), SHAPE["num_hidden_layers"], SHAPE["hidden_size"]
    stage = int(strategy[-1]) if strategy.startswith("zero") else 0
    run = parallelize(model, mesh, lambda named: AdamW([p for _, p in named]), zero=stage, pp_schedule=schedule)
    ids = torch.randint(SHAPE["vocab_size"], (B, S))
    micro_batches = [(x, x, None) for x in ids.chunk(K)]
    if axis == "dp":
        rows = _data_parallel(strategy, stage, run, micro_batches, numel, ranks)
    else:
        counted = run.count([ids])
        with Ledger() as ledger:
            run.backward(micro_batches, counted)
        activation = B // K * S * h * 4  # bytes of a microbatch's
        if strategy == "tp":
            n = K * tensor_parallel_all_reduces(L)
            rows = [Row("activation all-reduces", "k (4 L + 2)", n, ledger.count("all_reduce", activation)),
                    Row("bytes sent by them", "2 (n-1)/n each", float(n * ring_bytes("all_reduce", activation, ranks)),
                        float(sum(e.sent for e in ledger.entries if e.payload >= activation)))]
        elif strategy == "pp":
            borders = (mesh.rank("pp") > 0) + (mesh.rank("pp") < ranks - 1)
            rows = [Row("bytes sent", "m per border", K * activation * borders, float(ledger.sent("send")))]
        elif strategy == "ep":  # tokens to their experts and back, forward and backward; how many stay here is chance
            moved = [entry for entry in ledger.entries if entry.op == "all_to_all" and entry.shape[-1] == h]
            routed = ranks * B * S * MIXTURE["num_experts_per_tok"] * h * 4  # bytes, of all ranks
            rows = [Row("all-to-alls of tokens", "4 L k", 4 * L * K, len(moved)),
                    Row("their bytes, all ranks", "4 L of each token's copies", 4 * L * routed,
                        _over_ranks(sum(entry.payload for entry in moved)))]
        else:
            hop = 2 * activation // ranks  # keys and values of this rank's tokens; as many bytes are their gradients
            rows = [Row("bytes sent by attention", "L k (3 c - 2) KV", L * K * (3 * ranks - 2) * hop,
                        float(ledger.sent("send")))]
    mesh.destroy()
    return rows


def _data_parallel(strategy: str, stage: int, run, micro_batches: list, numel: int, ranks: int) -> list[Row]:
    """DDP and ZeRO: bytes between the first and second microbatch, where gradients accumulate, and sent in the step."""
    parameters, sync = list(run.named.values()), run.sync
    own, numel = numel, numel + (sync.padding if stage else 0)  # the formulas leave padding out, the table names it
    with Ledger(live=sync.live if stage == 3 else None) as ledger:
        for k, (ids, labels, _) in enumerate(micro_batches):
            with sync.microbatch(last=k + 1 == len(micro_batches)):
                logits = run.stages[0](ids)
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
            if k == 0:
                gradients = [p.grad for p in (*parameters, *(sync.parameters() if stage else []))]
                held_gradients = held(gradients)
        run.step()
    states = [t for values in run.optimizer.state.values() for t in values.values()]
    predicted = state_bytes(numel, ranks, stage)
    weights = [unit.shard for unit in sync.units] if stage == 3 else parameters
    shares = ["/n" if stage >= least else "" for least in (3, 2, 1)]
    sent = ("2", "2", "(k + 1)", "3 k")[stage]
    rows = [Row("parameters held", f"4 P{shares[0]}", float(predicted["parameters"]), held(weights)),
            Row("gradients held, accumulating", f"4 P{shares[1]}", float(predicted["gradients"]), held_gradients),
            Row("optimizer held, all ranks", f"8 P{'' if stage else ' n'}", 8.0 * own * (1 if stage else ranks),
                _over_ranks(sum(t.numel() * 4 for t in states))),
            Row("bytes sent in the step", f"4 {sent} P (n-1)/n",
                float(4 * data_parallel_elements(numel, ranks, stage, len(micro_batches))), float(ledger.sent()))]
    if stage == 3:
        sizes = [4 * unit.flat.numel() for unit in sync.units]
        pair = max(a + b for a, b in zip(sizes, sizes[1:]))
        rows.append(Row("weights held at most", "4 P/n + 2 units", held(weights) + pair, ledger.peak))
    padding = getattr(sync, "padding", 0)
    return rows + [Row("padding, counted in P above", "< n a bucket or unit", padding, padding)] * (stage > 0)


def _over_ranks(number: int) -> int:
    total = torch.tensor(float(number), dtype=torch.float64)
    dist.all_reduce(total)
    return int(total)


def _serve(rank: int, ranks: int, port: int, strategies: list[str], schedule: str) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    for strategy in strategies:
        rows = measure(strategy, ranks, schedule)
        if rank == 0:
            print(f"\n{strategy} on {ranks} ranks, {K} microbatches\n  {'on rank 0':30}{'formula':26}{'predicted':>12}"
                  f"{'measured':>12}{'difference':>12}")
            for what, formula, predicted, measured in rows:
                print(f"  {what:30}{formula:26}{predicted:12,.0f}{measured:12,.0f}{measured - predicted:12,.0f}",
                      flush=True)
    dist.destroy_process_group()


def _draw(name: str, p: int, m: int, v: int) -> None:
    from parallel.schedules import draw, schedule, simulate
    v = v if name == "interleaved" else 1
    simulation = simulate(schedule(name, p, m, v))
    print(draw(simulation))
    print(f"\n  {'':30}{'predicted':>12}{'simulated':>12}")
    for what, predicted, simulated in (("slots", pipeline_slots(name, p, m, v), simulation.slots),
                                       *((f"live at most on rank {r}", pipeline_peak(name, p, m, r, v), n)
                                         for r, n in enumerate(simulation.peak))):
        print(f"  {what:30}{predicted:12}{simulated:12}")


def main() -> None:
    import socket
    import torch.multiprocessing

    parser = argparse.ArgumentParser(description="Count what each strategy holds and sends, beside the formula.")
    parser.add_argument("--strategy", choices=STRATEGIES, nargs="*", default=list(STRATEGIES))
    parser.add_argument("--ranks", type=int, default=2, help="gloo processes to start")
    parser.add_argument("--schedule", choices=("gpipe", "1f1b", "interleaved", "zb"),
                        help="only draw this pipeline schedule")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=2, help="of a rank, under interleaved")
    args = parser.parse_args()
    try:
        if args.schedule:
            return _draw(args.schedule, args.stages, args.microbatches, args.chunks)
        if args.ranks not in (2, 4):
            raise ValueError(f"--ranks {args.ranks}: the model of this table has 4 heads and 4 layers; take 2 or 4")
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_serve, (args.ranks, port, args.strategy, "1f1b"), nprocs=args.ranks)


if __name__ == "__main__":
    main()
