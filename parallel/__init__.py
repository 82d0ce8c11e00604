"""Training on many devices: the one place where the strategies of this folder meet, in the order that they need.

    mesh = Mesh(tp=2, pp=2)                                       # under torchrun, after dist.init_process_group
    run = parallelize(model, mesh, optimizer_of, zero=1)          # optimizer_of(named_parameters) -> optimizer
    while training:
        counted = run.count(labels of this rank's microbatches)   # over the global batch
        loss = run.backward(micro_batches, counted)
        norm = run.clip_grad_norm(1.0)
        if norm.isfinite(): run.step()                            # the same on all ranks
        run.zero_grad()

1. compile             each layer by itself, inside of the hooks by which ZeRO-3 gathers its weights
2. tensor parallel     cuts matrices; the loss then takes slices of the vocabulary
3. context parallel    lets attention see the other ranks' part of the sequence
4. expert parallel     shares out experts
5. pipeline            takes out the layers of other stages: after this the model has holes, before it none is missed
6. optimizer           over what is left on this rank
7. data parallel       DDP, ZeRO-1 or 2, or ZeRO-3, around what the others have made of the parameters

All ranks build the whole model first, alike; a mesh of one process leaves it as it is. Imports are late, as the files
of this folder do not know each other.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal


@dataclass
class Flags:
    """The flags of a stage that runs on many processes; its Args begin with them."""

    dp: int = 0  # data-parallel degree; 0: all processes that the other degrees leave
    tp: int = 1  # tensor-parallel degree
    pp: int = 1  # pipeline-parallel degree
    cp: int = 1  # context-parallel degree
    ep: int = 1  # expert-parallel degree, which divides dp
    zero: int = 0  # 1 divides the optimizer's state over dp and cp, 2 gradients too, 3 weights too
    offload: bool = False  # keep what ZeRO divides in the CPU's memory
    sequence_parallel: bool = False  # under tp, norms and residuals divide the sequence
    pp_schedule: Literal["gpipe", "1f1b", "interleaved", "zb"] = "1f1b"  # see parallel/schedules.py
    pp_chunks: int = 2  # stages of each rank under interleaved
    cp_method: Literal["zigzag", "ring", "ulysses"] = "zigzag"  # see parallel/context.py
    engine: Literal["scratch", "torch"] = "scratch"  # ours, or PyTorch's own

    def options(self) -> dict:
        """What of it `parallelize` takes."""
        names = ("zero", "offload", "sequence_parallel", "pp_schedule", "pp_chunks", "cp_method", "engine")
        return {name: getattr(self, name) for name in names}


def parallelize(model, mesh, optimizer_of, *, zero: int = 0, offload: bool = False, sequence_parallel: bool = False,
                cp_method: str = "zigzag", pp_schedule: str = "1f1b", pp_chunks: int = 2, engine: str = "scratch",
                compile: bool = False, autocast=None, own_loss=None, weigh=None, device=None):
    """Cut a CausalLM for this rank of the mesh -> Run. ValueError, before anything is cut: what does not go together.

    autocast: a dtype for forward, None for the parameters' own. own_loss(stage) -> scalar or None, asked for after a
    forward: trained besides (the routers' balance), but not in the loss that is told. weigh(labels) -> (targets, -100
    where nothing counts, and how much each counts), (B, S) both; None: each label counts 1. offload: ZeRO's part of
    weights and state stays in the CPU's memory. optimizer_of None: a frozen model, which is only run; of ZeRO it takes
    stage 3 alone.
    """
    from parallel.context import context_parallel
    from parallel.expert import expert_parallel
    from parallel.tensor import tensor_parallel

    pp, data = mesh.size("pp"), mesh.group("dp", "cp")
    chunks = pp_chunks if pp_schedule == "interleaved" and pp > 1 else 1
    if compile:
        compile_layers(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if optimizer_of is None and zero < 3:  # there is no state to divide
        zero, offload = 0, False
    if engine == "torch":
        from parallel.native import stages_of
        from parallel.native_run import Native
        stages = stages_of(model, mesh, zero=zero, offload=offload, sequence_parallel=sequence_parallel, chunks=chunks,
                           dtype=autocast, device=device)
        return Native(mesh, stages, shapes, optimizer_of, zero, (pp_schedule, chunks), autocast, weigh, device)
    if zero == 3 and pp > 1:
        raise ValueError("--zero 3 would gather every layer for each microbatch of a pipeline: take --zero 1 with --pp")
    if zero == 3 and mesh.size("ep") > 1:
        raise ValueError("--zero 3 gathers whole layers, --ep has cut them: take --zero 1 or 2 with --ep")
    if offload and not zero:
        raise ValueError("--offload moves ZeRO's part of the state: it needs --zero 1, 2 or 3")
    if pp * chunks > model.config.num_hidden_layers:
        layers = model.config.num_hidden_layers
        raise ValueError(f"--pp {pp} with {chunks} chunks makes {pp * chunks} stages of {layers} layers; at most "
                         f"{layers // chunks} would do")
    tensor_parallel(model, mesh.group("tp"), sequence_parallel)
    context_parallel(model, mesh.group("cp"), cp_method)
    expert_parallel(model, mesh.group("ep"))
    stages = {0: model}
    if pp > 1:
        from parallel.pipeline import cut
        stages = cut(model, mesh.rank("pp"), pp, chunks)
    if device is not None and zero != 3:
        for stage in stages.values():
            stage.to(device)
    named = {}  # the chunks of a rank have different layers, and may share none
    for stage in stages.values():
        named |= dict(stage.named_parameters())
    optimizer = optimizer_of(list(named.items())) if optimizer_of else None

    def is_expert(p) -> bool:
        return "ep" in getattr(p, "placement", {}).get("shard", {})

    def group_of(p):
        return mesh.group("edp", "cp") if is_expert(p) else data

    def axes_of(p):
        return ("edp", "cp") if is_expert(p) else ("dp", "cp")

    if zero == 3:
        from parallel.fsdp import FSDP, units
        sync = FSDP(units(model), data, offload=offload, device=device, dtype=autocast)
        if optimizer is not None:
            sync.shard(optimizer)
    elif zero:
        from parallel.zero import Zero
        sync = Zero(named.values(), optimizer, group_of, zero, axes=axes_of, overlap=pp == 1, offload=offload)
    else:
        from parallel.ddp import DDP
        sync = DDP(named.values(), group_of, overlap=pp == 1)
    return Run(mesh, stages, named, shapes, optimizer, sync, zero, (pp_schedule, chunks), cp_method, autocast, own_loss,
               weigh)


def compile_layers(model) -> None:
    """Replace each layer's forward by compiled code, the same for all layers that are alike. Not the whole module: so
    its hooks stay outside. Without gradients the layer runs as it was: each new shape would be compiled anew."""
    import torch

    def either(plain, compiled):
        return lambda *arguments: (compiled if torch.is_grad_enabled() else plain)(*arguments)

    for layer in model.model.layers:
        layer.forward = either(layer.forward, torch.compile(layer.forward))


def mesh_of(flags: Flags):
    from parallel.mesh import Mesh
    return Mesh(flags.dp or None, flags.pp, flags.cp, flags.tp, flags.ep)


def check(args: Flags, world: int, without: tuple[str, ...] = ()) -> None:
    """ValueError unless a stage's flags, those of all stages among them, make a layout of so many processes.

    without: those of them that the stage does not take."""
    from parallel.mesh import degrees
    from parallel.schedules import plan
    try:
        sizes = degrees(world, args.dp or None, args.pp, args.cp, args.tp, args.ep)
    except ValueError as error:
        more = "; torchrun --nproc_per_node N starts N" if world == 1 else ""
        raise ValueError(f"{error}{more}") from None
    dp, G, b = sizes["edp"] * sizes["ep"], args.global_batch_size, args.micro_batch_size
    whole = args.optimizer not in ("adamw", "lion")  # looks at whole matrices
    adapters = getattr(args, "lora_r", 0)
    layers = (world > 1 or args.zero) and getattr(args, "compile", False)  # are compiled one by one
    for name, wrong, rule in (
            *((flag, getattr(args, flag) != getattr(Flags, flag), "this stage does not take it") for flag in without),
            ("engine", args.engine == "torch" and world < 2, "needs processes: torchrun --nproc_per_node N starts N"),
            ("zero", not 0 <= args.zero <= 3, "choose 0, 1, 2 or 3"),
            *((axis, adapters and getattr(args, axis) > 1, "cuts or moves layers that --lora_r has wrapped: take "
               "--dp, --cp or --zero") for axis in ("tp", "pp", "ep")),
            ("zero", adapters and args.load_in and args.zero == 3, "cuts weights, and those of --load_in are packed: "
             "take 1 or 2"),
            ("zero", whole and args.zero == 3, f"cuts matrices, and {args.optimizer} needs them whole: take 1 or 2"),
            ("tp", whole and args.tp > 1, f"cuts matrices, and {args.optimizer} needs them whole: take adamw or lion"),
            ("offload", args.offload and not args.zero, "moves ZeRO's part of the state, so it needs --zero 1, 2 or 3"),
            ("global_batch_size", G % dp, f"no multiple of the {dp} data-parallel ranks"),
            ("seq_len", args.cp > 1 and args.seq_len % (2 * args.cp), f"no multiple of 2 x --cp, {2 * args.cp}"),
            ("seq_len", args.sequence_parallel and args.seq_len // args.cp % args.tp, f"no multiple of --tp {args.tp}"),
            ("compile", layers and args.cp * args.ep > 1, "stops at each message of --cp and --ep: take --dp, --zero, "
             "--tp or --pp"),
            ("compile", layers and args.pp > 1 and args.pp_schedule == "zb", "joins what --pp_schedule zb takes apart: "
             "take gpipe, 1f1b or interleaved"),
            ("compile", layers and args.activation_checkpointing == "selective", "hides from --activation_checkpointing "
             "what it should select: take none or full"),
            ("pp_chunks", args.pp_chunks < 2 and args.pp_schedule == "interleaved", "interleaving takes 2 or more")):
        if wrong:
            raise ValueError(f"--{name} {getattr(args, name)}: {rule}")
    if args.engine == "torch":
        from parallel import native
        native.check(args, dp)
    if args.pp > 1:
        plan(args.pp_schedule, args.pp, -(-G // dp // b), args.pp_chunks if args.pp_schedule == "interleaved" else 1)


class Run:
    """A model in parts, and the steps of training it; each method is called by all ranks."""

    def __init__(self, mesh, stages, named, shapes, optimizer, sync, zero, schedule, cp_method, autocast, own_loss,
                 weigh):
        self.mesh, self.stages, self.named, self.shapes = mesh, stages, named, shapes
        self.optimizer, self.sync, self.zero = optimizer, sync, zero
        self.schedule, self.cp_method, self.loss_scale = schedule, cp_method, 1.0
        self.own_loss, self.weigh = own_loss, weigh
        self.config = next(iter(stages.values())).config
        self.autocast = autocast if zero != 3 else None  # ZeRO-3 gathers weights in that dtype already

    def count(self, labels) -> int:
        """Counted tokens of the global batch, from the labels (B, S) of this data-parallel rank's microbatches."""
        return int(self.total(sum(int((y != -100).sum()) for y in labels)))

    def total(self, mine):
        """The sum of a number, or a tensor of numbers, over the data-parallel ranks, float64, the same on all ranks."""
        from parallel.grads import total
        return total(mine, self.mesh.group("dp"), device=self._device())

    def backward(self, micro_batches, counted: float, loss_scale: float = 1.0):
        """Forward and backward of [(input_ids (B, S), labels (B, S), cu_seqlens or None)], the same on all ranks that
        have the same place along dp -> loss of the global batch, float64 0-d, the same on all ranks.

        counted: what the labels of the global batch count together. loss_scale keeps float16's gradients above its
        smallest number; they are divided by it afterwards."""
        from parallel.grads import total
        inputs, self.loss_scale = self._inputs(micro_batches), loss_scale
        if self.mesh.size("pp") > 1:
            with self.sync.microbatch(last=True):
                loss = self._pipeline(self.schedule[0], inputs, counted)
        else:
            loss = 0.0
            for k, (arguments, labels) in enumerate(inputs):
                with self.sync.microbatch(last=k + 1 == len(inputs)):
                    part = self._loss(self._forward(self.stages[0], arguments), labels, counted)
                    loss += part.detach().double()
                    own = self._own_loss(self.stages[0])
                    (part if own is None else part + own).backward()
        self.finish(loss_scale)
        return total(loss, self.mesh.group("dp", "cp"), device=self._device()) / loss_scale

    def microbatch(self, last: bool):
        """Around forward and backward of one of this rank's micro batches, in a stage whose loss is not one of tokens;
        all ranks have as many. After the last one, `finish`."""
        return self.sync.microbatch(last)

    def finish(self, loss_scale: float = 1.0) -> None:
        """Make the gradients, which are summed over the data axes, those of the whole batch and model."""
        from parallel.grads import finalize
        finalize(self.parameters(), self.mesh)
        if loss_scale != 1.0:
            for p in self.parameters():
                if p.grad is not None:
                    p.grad.mul_(1 / loss_scale)

    def sequence_logprobs(self, input_ids, labels):
        """A forward, and logprobs.sequence_logprobs of its logits, whole or in slices: rows (B, S) -> log p of each
        row's labels, summed (B,), and how many they are (B,). Rows and results are the same on all ranks of tp."""
        from torch.nn.functional import pad
        from logprobs import sequence_logprobs
        more = -input_ids.shape[1] % self.mesh.size("tp")  # sequence parallelism divides the positions
        input_ids, labels = pad(input_ids, (0, more)).to(self._device()), pad(labels, (0, more), value=-100)
        logits, labels = self._forward(self.stages[0], dict(input_ids=input_ids)), labels.to(self._device())
        if self.mesh.size("tp") == 1:
            return sequence_logprobs(logits, labels)
        return -self._nats(logits, labels).sum(-1), (labels != -100).sum(-1)

    def evaluate(self, batches) -> dict:
        """{"nats": float, "tokens": int} over all counted tokens of [(input_ids, labels, cu_seqlens)], which are the
        same on all ranks; dropout is off. Each place along dp takes every n-th batch; in what is left over at the end
        some count nothing, for every rank must run as many forwards."""
        import torch
        from parallel.grads import total
        n, here, at_once = self.mesh.size("dp"), self.mesh.rank("dp"), self.mesh.size("pp")
        mine, nats, tokens, seen = [], 0.0, 0, []
        for stage in self.stages.values():
            seen.append(stage.training)
            stage.eval()
        self.loss_scale = 1.0

        def forward(mine) -> float:
            with torch.no_grad():
                if self.mesh.size("pp") > 1:
                    return float(self._pipeline("forward", self._inputs(mine), 1))
                return sum(float(self._loss(self._forward(self.stages[0], x), y, 1)) for x, y in self._inputs(mine))

        batch = None
        for k, batch in enumerate(batches):
            tokens += int((batch[1] != -100).sum())
            if k % n == here:
                mine.append(batch)
            if k % n == n - 1 and len(mine) == at_once:
                nats, mine = nats + forward(mine), []
        if batch is not None and (k + 1) % n and k % n < here:
            mine.append((batch[0], torch.full_like(batch[1], -100), batch[2]))
        nats += forward(mine) if mine else 0.0
        for stage, training in zip(self.stages.values(), seen):
            stage.train(training)
        return {"nats": float(total(nats, self.mesh.group("dp", "cp"), device=self._device())), "tokens": tokens}

    def parameters(self) -> list:
        """What clipping and the optimizer see: this rank's parameters, or its pieces of them."""
        return list(self.sync.parameters() if self.zero else self.named.values())

    def clip_grad_norm(self, max_norm: float):
        """The whole model's gradient norm before clipping, float64 0-d, the same on all ranks."""
        from parallel.grads import clip_grad_norm
        return clip_grad_norm(self.parameters(), self.mesh, max_norm)

    def step(self) -> None:
        (self.sync if self.zero in (1, 2) else self.optimizer).step()
        for group in self.optimizer.param_groups if self.zero == 3 else []:
            if not group["params"] and "step" in group:
                group["step"] += 1  # no piece of these lies here, but the others have stepped

    def zero_grad(self) -> None:
        (self.sync if self.zero else self.optimizer).zero_grad()

    def state(self) -> dict:
        """{name: whole parameter} on every rank, as one process has them: cut ones joined, padding dropped."""
        import torch
        import torch.distributed as dist
        with self.sync.gathered() if self.zero == 3 else nullcontext():
            found = {name: self._whole(p) for name, p in self.named.items()}
        group, names = self.mesh.group("pp"), sorted(self.shapes)
        if group is not None:
            here = torch.tensor([name in found for name in names], dtype=torch.int64, device=self._device())
            first = here * (self.mesh.size("pp") - self.mesh.rank("pp"))  # of the stages that have it, the first sends
            dist.all_reduce(first, dist.ReduceOp.MAX, group=group)
            sample = next(iter(found.values()))
            for name, place in zip(names, first.tolist()):
                tensor = found[name].contiguous() if name in found else sample.new_empty(self.shapes[name])
                dist.broadcast(tensor, group=group, group_src=self.mesh.size("pp") - place)
                found[name] = tensor
        return {name: found[name] for name in self.shapes}

    def whole_model(self, model=None):
        """The model as one process would have it, on every rank, on the CPU: to sample from and to write. model: one
        built as the first was, to take the weights where a plain CausalLM has not their names: with adapters."""
        import torch
        state = {name: tensor.cpu() for name, tensor in self.state().items()}
        if model is not None:
            model.load_state_dict(state, strict=False)  # in place: what is tied stays so
            return model.eval()
        with torch.device("meta"):
            model = type(next(iter(self.stages.values())))(self.config)
        model.load_state_dict(state, strict=False, assign=True)
        if self.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.eval()

    def any(self, mine) -> bool:
        """Whether it is true on some rank."""
        from parallel.grads import total
        return bool(total(int(bool(mine)), self.mesh.group("pp", "edp", "ep", "cp", "tp"), device=self._device()))

    def wait(self) -> None:
        """For all ranks to come to this point."""
        self.any(False)

    def _whole(self, p):
        import torch
        import torch.distributed as dist
        tensor, placement = p.detach().clone(), getattr(p, "placement", {})
        for axis, dim in placement.get("shard", {}).items():
            parts = [torch.empty_like(tensor) for _ in range(self.mesh.size(axis))]
            dist.all_gather(parts, tensor.contiguous(), group=self.mesh.group(axis))
            tensor = torch.cat(parts, dim).narrow(dim, 0, placement["global_shape"][dim])
        return tensor

    def _forward(self, stage, arguments):
        import torch
        with torch.autocast(self._device().type, self.autocast) if self.autocast else nullcontext():
            return stage(**arguments)

    def _inputs(self, micro_batches) -> list:
        """[(arguments of the model's forward, labels)], of this rank's part of the sequence, on its device."""
        from parallel.context import split_batch
        device, group, method = self._device(), self.mesh.group("cp"), self.cp_method
        batches = ([x if x is None else x.to(device) for x in batch] for batch in micro_batches)
        return [split_batch(ids, labels, group, method, cu_seqlens) for ids, labels, cu_seqlens in batches]

    def _loss(self, logits, labels, counted: float):
        labels, weights = self.weigh(labels) if self.weigh else (labels, 1)
        return (self._nats(logits, labels) * weights).sum() / (counted or 1) * self.loss_scale

    def _nats(self, logits, labels):
        from parallel.tensor import vocab_parallel_cross_entropy
        return vocab_parallel_cross_entropy(logits, labels, self.mesh.group("tp"), self.config.vocab_size)

    def _own_loss(self, stage):
        own = self.own_loss(stage) if self.own_loss else None
        return own if own is None or self.loss_scale == 1.0 else own * self.loss_scale

    def _pipeline(self, name: str, inputs: list, counted: float):
        import torch
        from parallel.pipeline import execute
        from parallel.schedules import plan
        with torch.autocast(self._device().type, self.autocast) if self.autocast else nullcontext():
            actions = plan(name, self.mesh.size("pp"), len(inputs), self.schedule[1])
            loss, _ = execute(actions, self.stages, inputs, lambda logits, labels: self._loss(logits, labels, counted),
                              self.mesh.group("pp"), self._own_loss)
        return loss

    def _device(self):
        return self.sync.units[0].flat.device if self.zero == 3 else next(iter(self.named.values())).device
