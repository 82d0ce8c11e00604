"""The steps of training for `--engine torch`: what parallel.Run does, on the stages that native.py has cut.

The optimizer, the norm and shards.py see no DTensors but `pieces`: the numbers of them that lie on this rank, as plain
tensors in the same memory. Checkpoints so are ours, and no pickle. With PyTorch's own (DCP) they trade in safetensors:
convert.py merges what its HuggingFaceStorageWriter has saved, and its HuggingFaceStorageReader loads our folders on any
number of ranks.

    run = Native(mesh, stages, shapes, optimizer_of, zero, ("1f1b", 1), None, None, "cpu")     # parallel/__init__.py does
    loss = run.backward(micro_batches, counted)
    norm = run.clip_grad_norm(1.0)
    run.step()
    run.zero_grad()
"""

import contextlib
from math import prod

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def piece_of(p: nn.Parameter, record: tuple, mesh, zero: int) -> nn.Parameter:
    """This rank's numbers of a DTensor, in the same memory, with their placement as grads.py and shards.py know it.

    Both tp and FSDP cut like torch.chunk: all ranks have ceil(n / ranks) of n rows, but the last ones what is left."""
    shape, dim, tied = record
    whole, rows, cuts = list(shape), shape[0], []
    if dim is not None:
        whole[dim] = -(-shape[dim] // mesh.size("tp"))
        rows = min(max(rows - mesh.rank("tp") * whole[0], 0), whole[0]) if dim == 0 else rows
        cuts = [("tp", dim, shape[dim])]
    own = -(-rows // mesh.size("dp")) if zero else rows
    piece = nn.Parameter(p.to_local().detach())
    piece.cuts = ([("dp", 0, rows)] if zero else []) + cuts  # (axis, dimension, length before), the last cut first
    piece.whole = torch.empty(whole, device="meta", requires_grad=True)  # of which it is a part ...
    piece.start = min(mesh.rank("dp") * own, rows) * prod(whole[1:])  # ... that starts here, flattened
    piece.placement = {"shard": {axis: k for axis, k, _ in cuts}, "global_shape": shape}
    piece.placement |= ({"zero": ("dp",)} if zero else {}) | ({"tied": tied} if tied else {})
    piece.copies = prod(mesh.size(axis) for axis in ("dp", "tp") if axis not in [a for a, *_ in piece.cuts])
    piece.copies *= 2 if tied else 1
    return piece


# --------------------------------------------------------------------------------------------------------------- run


class Native:
    """As parallel.Run: a model in parts, and the steps of training it; each method is called by all ranks.

    mesh: mesh.py's. stages: this rank's, by number. shapes: {name: shape} of the whole model's parameters. schedule:
    (--pp_schedule, stages on a rank). autocast: a dtype for forward, None for the parameters' own. optimizer_of(named
    pieces) -> optimizer; None: a frozen model, which is only run. weigh(labels) -> (targets, -100 where nothing counts,
    and how much each counts), (B, S) both; None: each label counts 1."""

    def __init__(self, mesh, stages: dict, shapes: dict, optimizer_of, zero: int, schedule: tuple, autocast, weigh,
                 device):
        self.mesh, self.stages, self.shapes, self.schedule = mesh, stages, shapes, schedule
        self.weigh = weigh or (lambda labels: (labels, torch.ones_like(labels)))
        self.device = torch.device(device or "cpu")
        self.stage_of_zero, self.pipelines, self.last = zero, {}, list(stages.values())[-1]
        self.config = self.last.model.config
        self.sharded = {name: p for stage in stages.values() for name, p in stage.model.named_parameters()}
        records = {name: record for stage in stages.values() for name, record in stage.records.items()}
        self.named = {name: piece_of(p, records[name], mesh, zero) for name, p in self.sharded.items()}
        self.zero = 0  # to shards.py: what is in `named` is all there is
        self.optimizer = optimizer_of(list(self.named.items())) if optimizer_of else None
        self.dtype = autocast or next(iter(self.named.values())).dtype  # of activations

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def count(self, labels) -> int:
        """Counted tokens of the global batch, from the labels (B, S) of this data-parallel rank's microbatches."""
        return int(self.total(sum(int((y != -100).sum()) for y in labels)))

    def total(self, mine) -> Tensor:
        """The sum of a number over the data-parallel ranks, float64 0-d, the same on all ranks."""
        return self._total(mine, of="dp")

    def backward(self, micro_batches, counted: float, loss_scale: float = 1.0) -> Tensor:
        """Forward and backward of [(input_ids (B, S), labels (B, S), cu_seqlens or None)], the same on all ranks that
        have the same place along dp -> loss of the global batch, float64 0-d, the same on all ranks."""
        inputs, losses = self._feed(micro_batches, loss_scale / (counted or 1)), []
        if self.mesh.size("pp") > 1:
            ids = torch.cat([arguments["input_ids"] for arguments, *_ in inputs])
            last = {"target": torch.cat([weights for *_, weights in inputs]), "losses": losses}
            with self._loss_parallel():
                self._pipeline(inputs).step(*[ids] if self.mesh.rank("pp") == 0 else [],
                                            **last if self.last.last else {})
        else:
            for k, (arguments, _, weights) in enumerate(inputs):
                with self.microbatch(last=k + 1 == len(inputs)):
                    losses.append((self.stages[0](arguments["input_ids"]) * weights).sum())
                    losses[-1].backward()
        self.finish(loss_scale)
        return self._total(sum(float(part.detach()) for part in losses) / loss_scale, of="dp pp")

    @contextlib.contextmanager
    def microbatch(self, last: bool):
        """Around forward and backward of one of this rank's micro batches, where there is no pipeline; all ranks have
        as many. After the last one, `finish`."""
        self.stages[0].set_requires_gradient_sync(last or self.stage_of_zero > 1)
        self.stages[0].set_reshard_after_backward(last or self.stage_of_zero == 3)
        with self._loss_parallel():
            yield

    def finish(self, loss_scale: float = 1.0) -> None:
        """Give the pieces their gradients, those of the whole batch and model."""
        for name, p in self.sharded.items():
            piece = self.named[name]
            piece.data = p.to_local().detach()  # torch 2.8 moves what it has to pad, in the first forward
            if p.grad is not None:  # under tp it may still be a part of the sum
                piece.grad = p.grad.redistribute(placements=p.placements).to_local() / loss_scale
                p.grad = None
        self._sum_tied()

    def sequence_logprobs(self, input_ids, labels) -> tuple[Tensor, Tensor]:
        """A forward, within `microbatch` or without gradients: rows (B, S) -> log p of each row's labels, summed (B,),
        and how many they are (B,). Rows and results are the same on all ranks of tp."""
        more = -input_ids.shape[1] % self.mesh.size("tp")  # sequence parallelism divides the positions
        batch = F.pad(input_ids, (0, more)), F.pad(labels, (0, more), value=-100), None
        with contextlib.nullcontext() if torch.is_grad_enabled() else self._scoring():
            ((arguments, targets, _),) = self._feed([batch], 1.0)
            nats = self.stages[0](arguments["input_ids"])
        return -nats.sum(-1), (targets != -100).sum(-1)

    def evaluate(self, batches) -> dict:
        """{"nats": float, "tokens": int} over all counted tokens of [(input_ids, labels, cu_seqlens)], which are the
        same on all ranks; dropout is off. Each place along dp takes every n-th batch; in what is left over at the end
        some count nothing, for every rank must run as many forwards."""
        n, here, nats, tokens, training = self.mesh.size("dp"), self.mesh.rank("dp"), 0.0, 0, self.last.training
        for stage in self.stages.values():
            stage.eval()
        k = -1
        with self._scoring():
            for k, batch in enumerate(batches):
                tokens += int((batch[1] != -100).sum())
                if k % n == here:
                    nats += self._forward(batch)
            if k % n < here and (k + 1) % n:
                self._forward((batch[0], torch.full_like(batch[1], -100), batch[2]))
        for stage in self.stages.values():
            stage.train(training)
        return {"nats": float(self._total(nats, of="dp pp")), "tokens": tokens}

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """The whole model's gradient norm before clipping, float64 0-d, the same on all ranks."""
        held = [p for p in self.named.values() if p.grad is not None]
        grads = [p.grad for p in held]
        copies = torch.tensor([p.copies for p in held], device=grads[0].device)
        norm = self._total((torch.stack(torch._foreach_norm(grads)).double().square() / copies).sum()).sqrt()
        if max_norm > 0:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp_max(1.0).to(grads[0].device))
        return norm

    def state(self) -> dict:
        """{name: whole parameter} on every rank, as one process has them."""
        found, p = {name: self._whole(piece) for name, piece in self.named.items()}, self.mesh.size("pp")
        if p > 1:
            group, sample = self.mesh.group("pp"), next(iter(found.values()))
            here = torch.tensor([name in found for name in self.shapes], dtype=torch.int64, device=self.device)
            first = here * (p - self.mesh.rank("pp"))  # of the stages that have it, the first sends
            dist.all_reduce(first, dist.ReduceOp.MAX, group=group)
            for (name, shape), place in zip(self.shapes.items(), first.tolist()):
                found.setdefault(name, sample.new_empty(shape))
                dist.broadcast(found[name], group=group, group_src=p - place)
        return {name: found[name] for name in self.shapes}

    def whole_model(self, model=None) -> nn.Module:
        """The model as one process would have it, on every rank, on the CPU: to sample from and to write. model: what
        Run takes where there are adapters; here there are none."""
        with torch.device("meta"):
            model = type(self.last.model)(self.config)
        model.load_state_dict({name: x.cpu() for name, x in self.state().items()}, strict=False, assign=True)
        if self.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.eval()

    def any(self, mine) -> bool:
        """Whether it is true on some rank."""
        return bool(self._total(int(bool(mine))))

    def wait(self) -> None:
        """For all ranks to come to this point."""
        self.any(False)

    def _total(self, value, of: str = "dp pp tp") -> Tensor:
        """The sum, float64 0-d, over these axes of the mesh; along the others the first rank's value counts."""
        value = torch.as_tensor(value, dtype=torch.float64).to(self.device, copy=True)
        if any(self.mesh.rank(axis) for axis in ("dp", "pp", "tp") if axis not in of):
            value.zero_()
        dist.all_reduce(value)
        return value

    def _loss_parallel(self):
        from torch.distributed.tensor.parallel import loss_parallel
        return loss_parallel() if self.mesh.size("tp") > 1 else contextlib.nullcontext()

    @contextlib.contextmanager
    def _scoring(self):
        """Around forwards without gradients. What they gathered goes: the next step makes it old."""
        with torch.no_grad(), self._loss_parallel():
            yield
        for module in (module for stage in self.stages.values() for module in stage.modules()):
            if hasattr(module, "reshard"):
                module.reshard()

    def _feed(self, micro_batches, scale: float) -> list:
        """[(arguments of the model's forward, targets, their weights times scale)] on the device; every stage gets them
        to take from."""
        inputs, dtype = [], torch.promote_types(self.dtype, torch.float32)
        for batch in micro_batches:
            ids, labels, cu_seqlens = (x if x is None else x.to(self.device) for x in batch)
            targets, weights = self.weigh(labels)
            inputs.append(({"input_ids": ids, "cu_seqlens": cu_seqlens}, targets, weights.to(dtype) * scale))
        for stage in self.stages.values():
            stage.feed = iter(inputs)
        return inputs

    def _pipeline(self, inputs: list):
        """torch's schedule for so many microbatches, all of the first one's shape; made once for each shape."""
        from torch.distributed import pipelining
        (name, chunks), (_, labels, weights) = self.schedule, inputs[0]
        key = len(inputs), labels.shape
        if key not in self.pipelines:
            schedule = {"gpipe": pipelining.ScheduleGPipe, "1f1b": pipelining.Schedule1F1B,
                        "interleaved": pipelining.ScheduleInterleaved1F1B,
                        "zb": pipelining.ScheduleInterleavedZeroBubble}[name]
            made = []
            for s, stage in self.stages.items():
                between = stage.between(labels, self.dtype, "meta").requires_grad_()
                made.append(pipelining.PipelineStage(
                    stage, s, chunks * self.mesh.size("pp"), self.device, input_args=between if s else labels.to("meta"),
                    output_args=weights.to("meta") if stage.last else between, group=self.mesh.group("pp")))
            self.pipelines[key] = schedule(made if name in ("interleaved", "zb") else made[0], len(inputs),
                                           loss_fn=lambda nats, weights: (nats * weights).sum(),
                                           scale_grads=False)
        return self.pipelines[key]

    def _forward(self, batch) -> float:
        """A batch through all stages, without gradients -> its nats on the last one's ranks, elsewhere 0."""
        group, p, rank, nats = self.mesh.group("pp"), self.mesh.size("pp"), self.mesh.rank("pp"), 0.0
        ((arguments, _, weights),) = self._feed([batch], 1.0)
        for s, stage in self.stages.items():
            x = arguments["input_ids"]
            if s > 0:
                x = stage.between(x, self.dtype, self.device)
                dist.recv(x, group=group, group_src=(rank - 1) % p)
            y = stage(x)
            if stage.last:
                nats = float((y * weights).sum())
            else:
                dist.send(y.contiguous(), group=group, group_dst=(rank + 1) % p)
        return nats

    @torch.no_grad()
    def _sum_tied(self) -> None:
        """First and last stage exchange the gradients of the embedding that they share, and both hold the sum."""
        group, peer = self.mesh.group("pp"), self.mesh.size("pp") - 1 - self.mesh.rank("pp")
        for p in (p for p in self.named.values() if "tied" in p.placement):
            other = torch.empty_like(p.grad)
            for handle in dist.batch_isend_irecv([dist.P2POp(dist.isend, p.grad, group=group, group_peer=peer),
                                                  dist.P2POp(dist.irecv, other, group=group, group_peer=peer)]):
                handle.wait()
            p.grad = p.grad + other

    def _whole(self, piece: nn.Parameter) -> Tensor:
        """A piece with all others of its parameter: joined along dp, then along tp."""
        x = piece.detach().clone()
        for axis, dim, length in piece.cuts:
            size = list(x.shape)
            size[dim] = -(-length // self.mesh.size(axis))
            padded = x.new_zeros(size)
            padded.narrow(dim, 0, x.shape[dim]).copy_(x)
            parts = [torch.empty_like(padded) for _ in range(self.mesh.size(axis))]
            if len(parts) > 1:
                dist.all_gather(parts, padded, group=self.mesh.group(axis))
                x = torch.cat(parts, dim).narrow(dim, 0, length)
        return x
