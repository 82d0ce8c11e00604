"""PyTorch's own engine behind the same flags, `--engine torch`: for scale; the files beside this one are its oracle.

    flag                  becomes
    --tp                 DTensor: parallelize_module with Colwise and Rowwise, the loss under loss_parallel
    --sequence_parallel  the residual in Shard(1), and norms on DTensors, as q_norm and k_norm always are
    --zero 0             FSDP2's fully_shard on a mesh of (dp, 1): one all-reduce (DDP takes no DTensors)
    --zero 1             fully_shard: weights are gathered once, gradients scattered once a step
    --zero 2             ... gradients are scattered after each microbatch           (FSDP's SHARD_GRAD_OP)
    --zero 3             ... weights are freed after forward, reshard_after_forward=True      (FULL_SHARD)
    --offload            CPUOffloadPolicy
    --dtype bfloat16     MixedPrecisionPolicy: weights and activations of 16 bits, sums over ranks in float32
    --pp, --pp_schedule  PipelineStage; ScheduleGPipe, Schedule1F1B, ScheduleInterleaved1F1B of --pp_chunks, or for zb
                         ScheduleInterleavedZeroBubble of one stage a rank
    --cp, --ep           refused: torch's context_parallel has no attention for CPUs; experts are not cut here

FSDP2 cuts weights at every stage of ZeRO but 0; the stage decides how long they, and whole gradients, stay. So k
microbatches send what they should: 2, 2, k + 1 and 3 k times the weights. Sums are not divided by the ranks, as FSDP
would: our loss is a sum / (count of all ranks). Here the model is cut; native_run.py trains what comes out.

    run = parallelize(model, mesh, optimizer_of, zero=2, engine="torch")    # in parallel/__init__.py, which calls both
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def check(args, dp: int) -> None:
    """ValueError with one line: flags of a stage that this engine does not take. dp: the data-parallel ranks."""
    rows, b = args.global_batch_size // dp, args.micro_batch_size
    name, m, whole = args.pp_schedule, rows // b, args.optimizer not in ("adamw", "lion")
    refuse((
        (getattr(args, "lora_r", 0), "has no adapters: leave out --lora_r"),
        (args.cp > 1 or args.ep > 1, "has no --cp, which torch cannot do on a CPU, and no --ep"),
        (whole and args.zero, f"cuts matrices under --zero, and {args.optimizer} needs them whole"),
        (args.tp > 1 and getattr(args, "attention_dropout", 0), "would drop alike on all ranks of --tp"),
        (args.tp > 1 and args.kernels != "torch", "gives DTensors to --kernels triton under --tp"),
        (args.tp > 1 and getattr(args, "compile", False), "gives DTensors to --compile under --tp"),
        (args.pp > 1 and args.zero > 1, "keeps gradients whole till the last microbatch under --pp: take --zero 1"),
        (args.pp > 1 and rows % b, f"takes equal microbatches under --pp: {b} does not divide a rank's {rows} rows"),
        (args.pp > 1 and m < args.pp, f"takes at least --pp {args.pp} microbatches, not {m}"),
        (args.pp > 1 and m % args.pp and name in ("interleaved", "zb"),
         f"takes microbatches in multiples of --pp {args.pp} for --pp_schedule {name}, not {m}")))


def refuse(reasons) -> None:
    for wrong, line in reasons:
        if wrong:
            raise ValueError(f"--engine torch {line}")


def stages_of(model: nn.Module, mesh, *, zero: int = 0, offload: bool = False, sequence_parallel: bool = False,
              chunks: int = 1, dtype=None, device=None) -> dict[int, "Stage"]:
    """Cut a CausalLM, built alike on all ranks, by PyTorch's means -> this rank's stages by number, `chunks` of them.

    mesh: mesh.py's. dtype: of weights and activations in forward, if not their own. ValueError: what it cannot be cut
    into."""
    from torch.distributed.device_mesh import init_device_mesh
    c, t, p, dp = model.config, mesh.size("tp"), mesh.size("pp"), mesh.size("dp")
    stages = p * chunks
    refuse((
        (c.num_experts or mesh.size("cp", "ep") > 1, "has no experts and no --cp"),
        (c.position_embedding_type != "rope" and t * p > 1, "takes no other positions than RoPE with --tp and --pp"),
        (t > 1 and c.attention_dropout and model.training, "would drop alike on all ranks of --tp"),
        (c.num_key_value_heads % t, f"gives whole heads to ranks: --tp {t} does not divide {c.num_key_value_heads}"),
        (stages > c.num_hidden_layers, f"makes {stages} stages of {c.num_hidden_layers} layers under --pp {p}")))
    device = torch.device(device or "cpu")
    sizes = (p, *((1, dp) if zero else (dp, 1)), t)  # tp changes fastest, as in mesh.py
    device_mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("pp", "replicate", "shard", "tp"))
    if t > 1:
        tensor_parallel(model, device_mesh["tp"], sequence_parallel)
    mine = {s: Stage(cut(model, s, stages), s == stages - 1, t if sequence_parallel else 1)
            for s in range(mesh.rank("pp"), stages, p)}
    for stage in mine.values():
        data_parallel(stage, device_mesh, zero, offload, dtype)
    return mine


# ------------------------------------------------------------------------------------------------------- strategies


def tensor_parallel(model: nn.Module, mesh, sequence_parallel: bool) -> None:
    """Weights become DTensors on a mesh of one axis; between the blocks activations stay plain tensors."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
    from torch.distributed.tensor.parallel import (ColwiseParallel, PrepareModuleInput, RowwiseParallel,
                                                   parallelize_module)
    whole, residual = Replicate(), Shard(1) if sequence_parallel else Replicate()

    def enter(more: int) -> PrepareModuleInput:  # once for all columns: else each of q, k, v sums its own gradient
        return PrepareModuleInput(input_layouts=(residual, *[None] * more),
                                  desired_input_layouts=(whole, *[None] * more))

    def on_parts(norm: nn.Module, dim: int) -> None:
        """The norm of what lies cut along dim: its weight's gradient is then a part, as DTensor knows."""
        def parts(x):
            return DTensor.from_local(x, mesh, [Shard(dim)]) if isinstance(x, Tensor) else x

        distribute_module(norm, mesh)
        norm.register_forward_pre_hook(lambda module, args, kwargs: (
            tuple(map(parts, args)), {name: parts(x) for name, x in kwargs.items()}), with_kwargs=True)
        norm.register_forward_hook(lambda module, args, y: (
            tuple(x.to_local() for x in y) if isinstance(y, tuple) else y.to_local()))

    tied = model.lm_head.weight is model.model.embed_tokens.weight
    plan = {"model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=residual),
            "lm_head": ColwiseParallel(input_layouts=residual, output_layouts=Shard(-1), use_local_output=False)}
    for block, more, columns, rows in (("self_attn", 4, ("q_proj", "k_proj", "v_proj"), "o_proj"),
                                       ("mlp", 0, ("gate_proj", "up_proj"), "down_proj")):
        block = f"model.layers.*.{block}"
        plan |= {block: enter(more), f"{block}.{rows}": RowwiseParallel(output_layouts=residual)}
        plan |= {f"{block}.{name}": ColwiseParallel() for name in columns}
    parallelize_module(model, mesh, plan)
    if tied:  # each of the two modules has had its own copy cut
        model.lm_head.weight = model.model.embed_tokens.weight
    for layer in model.model.layers:
        for name, norm in layer.named_modules():
            if name.endswith(("q_norm", "k_norm")):
                on_parts(norm, dim=2)  # (B, S, heads, head_dim)
            elif name.endswith("layernorm") and sequence_parallel:
                on_parts(norm, dim=1)
    if sequence_parallel:
        on_parts(model.model.norm, dim=1)


def data_parallel(stage: nn.Module, mesh, zero: int, offload: bool, dtype) -> None:
    """FSDP2 around each layer, and around the stage for what is left; see the table above."""
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    how = dict(mesh=mesh["shard"] if zero else mesh["replicate", "shard"], reshard_after_forward=zero == 3,
               mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32),
               offload_policy=CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy())
    for layer in stage.model.model.layers:
        fully_shard(layer, **how)
    fully_shard(stage, **how)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo's AVG sums, silently (pytorch #162338)


class Received(nn.Module):
    """In the place of the embedding on a later stage: gives out what came from the stage before."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x, self.x = self.x, None
        return x


def cut(model: nn.Module, s: int, stages: int) -> nn.Module:
    """Stage s: a model of the same class and names, with its part of the layers; embedding first, norm and head last.

    Tied weights become two parameters, each with the other's name as `tied`."""
    if stages == 1:
        return model
    n, trunk = len(model.model.layers), model.model
    with torch.device("meta"):
        stage = type(model)(model.config).train(model.training)
    head, tied = model.lm_head, model.lm_head.weight is trunk.embed_tokens.weight
    stage.model.layers, stage.model.activation_checkpointing = nn.ModuleList(), trunk.activation_checkpointing
    for i in range(s * n // stages, (s + 1) * n // stages):
        stage.model.layers.add_module(str(i), trunk.layers[i])  # under its number in the whole model
    stage.model.embed_tokens = trunk.embed_tokens if s == 0 else Received()
    stage.model.norm = trunk.norm if s == stages - 1 else nn.Identity()
    if tied and s == stages - 1:
        head.weight = nn.Parameter(head.weight.detach().clone())
        head.weight.tied = "model.embed_tokens.weight"
    elif tied and s == 0:
        trunk.embed_tokens.weight.tied = "lm_head.weight"
    stage.lm_head = head if s == stages - 1 else nn.Identity()
    return stage


class Stage(nn.Module):
    """What FSDP wraps and PipelineStage runs: x, tokens or what came from the stage before -> activations for the next,
    or on the last stage the nats of each target (B, S), so that no logits are kept. `feed` has the model's arguments,
    the targets and their weights of each microbatch, in order."""

    def __init__(self, model: nn.Module, last: bool, shards: int):
        super().__init__()
        self.model, self.last, self.shards, self.feed = model, last, shards, iter(())
        # Of every parameter, before FSDP: its shape, the dimension that tp cuts, its tied copy in another stage.
        self.records = {name: (tuple(p.shape), next((place.dim for place in getattr(p, "placements", ())
                                                     if place.is_shard()), None), getattr(p, "tied", None))
                        for name, p in model.named_parameters()}

    def forward(self, x: Tensor) -> Tensor:
        arguments, targets, _ = next(self.feed)
        if isinstance(self.model.model.embed_tokens, Received):
            self.model.model.embed_tokens.x = x
        y = self.model(**arguments)
        if not self.last:
            return y
        y = y.to(torch.promote_types(y.dtype, torch.float32))  # (B, S, V); under tp a DTensor, cut along V
        nats = F.cross_entropy(y.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        nats = nats.to_local() if hasattr(nats, "to_local") else nats
        return nats.view_as(targets).clone()  # FSDP warns of views: the hook that begins backward could be lost

    def between(self, ids: Tensor, dtype: torch.dtype, device) -> Tensor:
        """Memory for the activations of tokens (B, S) that come from the stage before; sequence parallel has 1/tp."""
        B, S = ids.shape
        return torch.empty(B, S // self.shards, self.model.config.hidden_size, dtype=dtype, device=device)
