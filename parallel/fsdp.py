"""ZeRO-3, fully sharded data parallel: a rank keeps 1/n of the weights and borrows the rest, one unit at a time.

    forward of a unit     all-gather its weights, compute, free them
    backward of a unit    all-gather them again, compute, free them, reduce-scatter its gradients

                 bytes per weight (float32 Adam)      elements a rank sends for each microbatch, times (n - 1) / n
    ZeRO-3       16/n  + two gathered units           3   (two all-gathers and a reduce-scatter)

(Rajbhandari et al. 2020, arXiv:1910.02054, section 5.3; Zhao et al. 2023, PyTorch FSDP, arXiv:2304.11277.) A unit is a
module, such as a decoder layer. While one computes, the next one's weights are on their way: that is why two are held.

    weights of a unit, flat:  [ p1 ......... | p2 ... p3 ..... | ....... p4 0 ]     zeros at the end
                                shard of rank 0   shard of rank 1   shard of rank 2

The parameters are views of the flat buffer; freeing it takes the memory from under them, gathering puts it back, so
what autograd has saved for backward stays valid. The optimizer gets this rank's pieces of the parameters, which suits
those that treat each number alone (AdamW, Lion). Muon and Adafactor need whole matrices and are refused: use ZeRO-1, 2.

    fsdp = FSDP(units(model), group)                        # [embedding, layer 0, layer 1 ..., norm, head]
    optimizer = fsdp.shard(build_optimizer("adamw", model.named_parameters(), ...))      # built over whole parameters
    for k, micro_batch in enumerate(micro_batches):
        with fsdp.microbatch(last=k + 1 == len(micro_batches)):
            (loss_sum(micro_batch) / counted_by_all_ranks).backward()
    clip fsdp.parameters(); optimizer.step(); fsdp.zero_grad()

Weights are there only inside their unit's forward and backward: elsewhere (saving, sampling) `with fsdp.gathered():`.

    python parallel/fsdp.py             # trains alone with weights offloaded, against plain training
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

ELEMENTWISE = ("AdamW", "Lion", "Adam", "SGD")  # optimizers whose update of a number depends on nothing beside it


def named(name: str, before: str):
    """torch.distributed's function of that name, or of the one that it had before torch 2.13."""
    return getattr(dist, name, None) or getattr(dist, before)


class Unit:
    """The parameters of some modules, laid end to end and cut in n equal shards of which this rank keeps one."""

    def __init__(self, parameters: list[Tensor], group, axes: tuple, offload: bool, dtype, device):
        self.parameters, self.group = parameters, group
        n, rank = (dist.get_world_size(group), dist.get_rank(group)) if group is not None else (1, 0)
        numel = sum(p.numel() for p in parameters)
        self.size = -(-numel // n)  # of a shard
        self.padding = n * self.size - numel
        first = parameters[0]
        device = torch.device(device or first.device)
        flat = torch.cat([p.detach().flatten() for p in parameters] + [first.new_zeros(self.padding)])
        self.shard = flat[rank * self.size : (rank + 1) * self.size].to("cpu" if offload else device, copy=True)
        if offload and device.type == "cuda":
            self.shard = self.shard.pin_memory()  # from where the GPU can fetch it without the CPU
        self.flat = torch.empty(n * self.size, dtype=dtype or first.dtype, device=device)
        self.pieces, self.spans, offset = [], [], 0
        for p in parameters:
            p.data = self.flat[offset : offset + p.numel()].view_as(p)
            a, b = max(offset, rank * self.size), min(offset + p.numel(), (rank + 1) * self.size)
            if a < b:
                piece = nn.Parameter(self.shard[a - rank * self.size : b - rank * self.size], requires_grad=False)
                # "zero": the mesh axes along which each rank has another part, so that a norm counts no copies
                piece.placement = dict(getattr(p, "placement", {}), zero=axes)
                piece.whole, piece.start = p, a - offset  # = p.flatten()[start : start + len(piece)]
                self.pieces.append(piece)
                self.spans.append((a - rank * self.size, b - rank * self.size))
            offset += p.numel()
        self.arrival = self.departure = self.gradient = None  # handles of gather and scatter; this rank's gradient
        self.present, self.backward = True, False  # whether the weights are here; whether its backward is going on
        self.free()

    def gather(self) -> None:
        """Begin to fetch the weights, if they are neither here nor on their way."""
        if self.present:
            return
        self.present = True
        self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.element_size())
        source = self.shard.to(self.flat.device, self.flat.dtype, non_blocking=True)
        if self.group is None:
            self.flat.copy_(source)
        else:
            all_gather = named("all_gather_single", "all_gather_into_tensor")
            self.arrival = all_gather(self.flat, source, group=self.group, async_op=True)

    def wait(self) -> None:
        self.gather()
        if self.arrival is not None:
            self.arrival.wait()
            self.arrival = None

    def free(self) -> None:
        """Give the memory back. A handle that nobody waited for is waited for first: its data would be written."""
        if self.present:
            if self.arrival is not None:
                self.wait()
            self.flat.untyped_storage().resize_(0)
            self.present = False

    def scatter(self) -> None:
        """Begin to reduce-scatter the gradients, in the shard's dtype. One that is None here counts zeros."""
        self.full = self.shard.new_zeros(self.flat.numel(), device=self.flat.device)
        parts = self.full.split([p.numel() for p in self.parameters] + [self.padding])
        for p, part in zip(self.parameters, parts):
            if p.grad is not None:
                part.copy_(p.grad.flatten())
                p.grad = None
        self.part = self.full
        if self.group is not None:
            self.part = self.full.new_empty(self.size)
            reduce_scatter = named("reduce_scatter_single", "reduce_scatter_tensor")
            self.departure = reduce_scatter(self.part, self.full, group=self.group, async_op=True)  # SUM

    def finish(self) -> None:
        """Add the gradients that arrived to this rank's: sums over ranks, and over microbatches."""
        if self.departure is not None:
            self.departure.wait()
        part = self.part.to(self.shard.device)
        self.gradient = part if self.gradient is None else self.gradient.add_(part)
        self.departure = self.full = self.part = None
        for piece, (a, b) in zip(self.pieces, self.spans):
            if piece.whole.requires_grad:
                piece.grad = self.gradient[a:b]


def units(model: nn.Module) -> list[nn.Module]:
    """Modules to gather one at a time: the members of every nn.ModuleList, and what has parameters beside them.

    In the order of the model, which is that of forward. ValueError if a parameter belongs to no such module.
    """
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        lists = any(isinstance(m, nn.ModuleList) for m in module.modules())
        if isinstance(module, nn.ModuleList) or lists:
            if list(module.parameters(recurse=False)):
                raise ValueError(f"{type(module).__name__} has parameters of its own beside its layers: no unit has "
                                 "them")
            for child in module.children():
                if isinstance(module, nn.ModuleList):
                    found.append(child)
                else:
                    walk(child)
        elif list(module.parameters()):
            found.append(module)

    walk(model)
    return found


class FSDP:
    """Shards the parameters of `modules` over `group` (None: one process, which makes sense with offload).

    modules: the units, in the order of forward, which uses each once; together they hold every parameter. Modules that
    share parameters make one unit: a tied embedding and head travel three times like any other, as the last unit stays
    till its backward, and an embedding's takes no weights. axes: mesh axes of `group`, kept in the pieces' placement.
    prefetch: fetch the next unit's weights while one computes. offload: weights, gradients and the optimizer's state
    live in the CPU's memory. dtype, device: of the gathered weights, if not the parameters' own: so a model may be
    built on the CPU that is too large for the GPU. All ranks run the same units in the same order.
    """

    def __init__(self, modules: list[nn.Module], group, *, axes=("dp", "cp"), prefetch: bool = True,
                 offload: bool = False, dtype: torch.dtype | None = None, device=None):
        self.prefetch = prefetch
        self.calls: list[Unit] = []  # the unit of each module, in the order of forward
        self.units: list[Unit] = []
        self.pending: list[Unit] | None = None  # in a microbatch: units whose gradients are still to be scattered
        self.leaving: list[Unit] = []  # on their way
        taken: dict[int, Unit] = {}
        for call, module in enumerate(modules):
            parameters = list(module.parameters())
            known = {id(taken[id(p)]): taken[id(p)] for p in parameters if id(p) in taken}
            if len(known) > 1 or known and any(id(p) not in taken for p in parameters):
                raise ValueError(f"{type(module).__name__} shares some of its parameters with another unit, not all")
            if known:
                unit, = known.values()
            else:
                unit = Unit(parameters, group, axes, offload, dtype, device)
                unit.first = call
                self.units.append(unit)
                taken |= {id(p): unit for p in parameters}
            unit.last = call
            self.calls.append(unit)
            module.register_forward_pre_hook(lambda module, args, call=call: self._before_forward(call))
            module.register_forward_hook(lambda module, args, output, call=call: self._after_forward(call, output))
        self.padding = sum(unit.padding for unit in self.units)
        self.lookups = {call for call, unit in enumerate(self.calls)  # of tied tables: backward only adds up rows
                        if call < unit.last and isinstance(modules[call], nn.Embedding)}

    def parameters(self) -> list[Tensor]:
        """This rank's pieces, for optimizer and clipping: `.whole` is the parameter each is of, from `.start`."""
        return [piece for unit in self.units for piece in unit.pieces]

    def live(self) -> list[Tensor]:
        """What holds weights on this rank: shards and gathered units. For Ledger(live=fsdp.live)."""
        return [t for unit in self.units for t in (unit.shard, unit.flat)]

    def shard(self, optimizer):
        """Let an optimizer over the whole parameters have this rank's pieces; ValueError if it needs whole ones."""
        if type(optimizer).__name__ not in ELEMENTWISE:
            raise ValueError(f"ZeRO-3 cuts matrices, and {type(optimizer).__name__} needs them whole: "
                             "take adamw or lion, or ZeRO-1 or 2")
        pieces = {id(piece.whole): piece for piece in self.parameters()}
        for settings in optimizer.param_groups:
            settings["params"] = [pieces[id(p)] for p in settings["params"] if id(p) in pieces]
        return optimizer

    def _before_forward(self, call: int) -> None:
        unit = self.calls[call]
        if self.pending is not None and torch.is_grad_enabled() and not unit.backward:
            if call <= self.reached:  # its gradients would be scattered before they are whole
                raise ValueError(f"FSDP runs its units in the order given, each once in a microbatch: unit {call} came "
                                 f"after unit {self.reached}")
            self.reached = call
        unit.wait()
        if self.prefetch and not unit.backward and call + 1 < len(self.calls):
            self.calls[call + 1].gather()

    def _after_forward(self, call: int, output) -> None:
        unit = self.calls[call]
        if unit.backward:  # activation checkpointing runs forward once more inside backward, which needs the weights
            return
        made = [t for t in (output if isinstance(output, (tuple, list)) else (output,))
                if torch.is_tensor(t) and t.requires_grad]
        if not (made and self.pending is not None and unit.first < call == len(self.calls) - 1):  # else it stays
            unit.free()
        for t in made:  # a gradient of it arrives just before the unit's backward begins
            t.register_hook(lambda grad: self._before_backward(call))

    def _before_backward(self, call: int) -> None:
        if self.pending is None:
            raise ValueError("under FSDP backward runs inside `with fsdp.microbatch():`")
        if call + 1 < len(self.calls):
            self._after_backward(call + 1)
        unit = self.calls[call]
        if call not in self.lookups:
            unit.wait()
        unit.backward = True
        if self.prefetch and call > 0 and call - 1 not in self.lookups:
            self.calls[call - 1].gather()

    def _after_backward(self, call: int) -> None:
        """Of one unit when the one before it begins: autograd runs what was made later first, so all is done.

        Not when the last gradient is there: where one never comes, this rank would scatter later than the others."""
        unit = self.calls[call]
        unit.free()
        unit.backward = False
        if unit in self.pending and call == unit.first:  # a tied one is not through before its first use
            self._scatter(unit)

    def _scatter(self, unit: Unit) -> None:
        self.pending.remove(unit)
        unit.scatter()
        self.leaving.append(unit)
        while len(self.leaving) > 1:  # while one travels, the next one's gradients are made: no more are held whole
            self.leaving.pop(0).finish()

    @contextmanager
    def microbatch(self, last: bool = True):
        """Around forward and backward of a microbatch. Each one's gradients are scattered: no rank could hold all."""
        self.pending = [unit for unit in reversed(self.units) if any(p.requires_grad for p in unit.parameters)]
        self.reached = -1  # the last unit that forward has come to
        try:
            yield
            for unit in self.units:
                unit.free()
                unit.backward = False
            for unit in self.pending[:]:  # the first unit; and those that backward has not passed through
                self._scatter(unit)
            while self.leaving:
                self.leaving.pop(0).finish()
        finally:
            self.pending = None

    @contextmanager
    def gathered(self, write: bool = False):
        """Within, every parameter is whole, as for saving or sampling; `write` keeps what was changed in them."""
        for unit in self.units:
            unit.wait()
        yield
        for unit in self.units:
            if write:
                rank = dist.get_rank(unit.group) if unit.group is not None else 0
                unit.shard.copy_(unit.flat[rank * unit.size : (rank + 1) * unit.size])
            unit.free()

    def zero_grad(self) -> None:
        for unit in self.units:
            unit.gradient = None
            for p in unit.pieces:
                p.grad = None


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    losses, held = {}, {}
    for sharded in (False, True):
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8))
        fsdp = FSDP(list(layers), None, offload=True) if sharded else None
        optimizer = torch.optim.AdamW(fsdp.parameters() if sharded else layers.parameters(), lr=1e-3)
        peak = 0
        for step in range(10):
            x = torch.randn(16, 64)
            with fsdp.microbatch() if sharded else nullcontext():
                y = x
                for layer in layers:
                    y = layer(y)
                    if sharded:
                        peak = max(peak, sum(unit.flat.untyped_storage().nbytes() for unit in fsdp.units))
                (y - x).square().mean().backward()
            optimizer.step()
            (fsdp or optimizer).zero_grad()
        losses[sharded] = (y - x).square().mean().item()
        held[sharded] = peak or sum(4 * p.numel() for p in layers.parameters())
    print(f"8 layers, loss after 10 steps: whole {losses[False]:.9f}, sharded {losses[True]:.9f}")
    print(f"bytes of weights at once: whole {held[False]:,}, gathered units {held[True]:,}")


if __name__ == "__main__":
    main()
