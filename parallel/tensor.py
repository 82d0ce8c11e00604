"""Tensor parallelism: every matrix of a layer is cut over t ranks; two all-reduces a layer and direction join them.

    column parallel   W = [W_1; ...; W_t] cut by outputs   y_r = x W_r^T             each rank has some of the outputs
    row parallel      W = [W_1, ..., W_t] cut by inputs    y = sum over r x_r W_r^T  each rank has one term of the sum

    x -- f -- q, k, v (columns) -- attention of this rank's heads -- o (rows) ---- g -- + x
    x -- f -- gate, up (columns) -- silu(gate) * up ---------------- down (rows) - g -- + x

f hands x on and, backward, sums the gradient over the ranks: once for q, k and v together. g sums forward and hands the
gradient on. With the vocabulary cut too, g after the embedding and f before the head: 4 L + 2 all-reduces a step.
Sequence parallel: between g and f the ranks share out the positions, (B, S / t, hidden), so that norms and residuals
are not kept t times. g becomes a reduce-scatter, f an all-gather: together the bytes of the all-reduce.

Cross-entropy never gathers logits: three reductions of one number per token (maximum, sum of exponentials, target).
Replicated parameters with a part of the gradient say so in their placement, and grads.py sums.

    model = tensor_parallel(CausalLM(config), group)           # in place; the same names, thinner tensors
    loss = vocab_parallel_cross_entropy(model(input_ids), labels, group, vocab_size).sum() / counted
    weights = full_state(model, group)                         # whole again, to save

Sources: Shoeybi et al. (arXiv:1909.08053), section 3; Korthikanti et al. (arXiv:2205.05198), section 4.
"""

import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------- f and g


def summed(x: Tensor, group) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, dist.ReduceOp.SUM, group)
    return x


def gathered(x: Tensor, group) -> Tensor:
    """(B, S / t, ...) of each rank -> (B, S, ...)."""
    t = dist.get_world_size(group)
    parts = x.new_empty(t * x.shape[0], *x.shape[1:])  # (t * B, S / t, ...)
    dist.all_gather_into_tensor(parts, x.contiguous(), group)
    return torch.cat(parts.chunk(t), dim=1)


def scattered(x: Tensor, group) -> Tensor:
    """(B, S, ...) terms of a sum -> this rank's positions of the sum (B, S / t, ...)."""
    t = dist.get_world_size(group)
    if x.shape[1] % t:
        raise ValueError(f"sequence parallelism: sequence length {x.shape[1]} is no multiple of tp {t}")
    part = x.new_empty(x.shape[0], x.shape[1] // t, *x.shape[2:])
    dist.reduce_scatter_tensor(part, torch.cat(x.chunk(t, dim=1)), dist.ReduceOp.SUM, group)
    return part


class Enter(torch.autograd.Function):
    """f: before a block of column-parallel layers."""

    @staticmethod
    def forward(ctx, x, group, sequence):
        ctx.group, ctx.sequence = group, sequence
        return gathered(x, group) if sequence else x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return (scattered if ctx.sequence else summed)(gradient, ctx.group), None, None


class Leave(torch.autograd.Function):
    """g: after a row-parallel layer."""

    @staticmethod
    def forward(ctx, x, group, sequence):
        ctx.group, ctx.sequence = group, sequence
        return (scattered if sequence else summed)(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return gathered(gradient, ctx.group) if ctx.sequence else gradient, None, None


# ------------------------------------------------------------------------------------------------------ layers


class RowParallelLinear(nn.Linear):
    """y = sum over ranks x_r W_r^T + b; x_r (..., in / t). A column-parallel layer is an nn.Linear with fewer rows."""

    def forward(self, x: Tensor) -> Tensor:
        y = Leave.apply(F.linear(x, self.weight), self.group, self.sequence)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # once, not once per rank


class VocabParallelEmbedding(nn.Embedding):
    """Rank r looks up the rows [r n, (r + 1) n), n = ceil(V / t); the others' tokens give zeros, and g adds up."""

    def forward(self, input_ids: Tensor) -> Tensor:
        local = input_ids - self.start
        mine = (local >= 0) & (local < self.weight.shape[0])
        rows = F.embedding(local.where(mine, 0), self.weight) * mine[..., None]
        return Leave.apply(rows, self.group, self.sequence)


class VocabParallelCrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] where each rank has a slice of the logits; see vocab_parallel_cross_entropy."""

    @staticmethod
    def forward(ctx, logits, labels, group, vocab_size):
        n, start = logits.shape[-1], dist.get_rank(group) * logits.shape[-1]
        z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        z[..., max(0, vocab_size - start):] = float("-inf")  # the padding of an uneven vocabulary
        highest = z.amax(-1)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        z.sub_(highest[..., None])
        local = labels - start
        mine = (local >= 0) & (local < n)  # never true of -100
        target = z.gather(-1, local.where(mine, 0)[..., None]).squeeze(-1).where(mine, 0)
        z.exp_()
        total = z.sum(-1)
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
        dist.all_reduce(target, dist.ReduceOp.SUM, group)
        ctx.save_for_backward(z.div_(total[..., None]), local, mine, labels)  # softmax, in place of the logits
        ctx.dtype = logits.dtype
        return (total.log() - target).where(labels != -100, 0)

    @staticmethod
    def backward(ctx, gradient):
        softmax, local, mine, labels = ctx.saved_tensors
        hit = torch.zeros_like(softmax).scatter_(-1, local.where(mine, 0)[..., None], mine[..., None].to(softmax.dtype))
        gradient = gradient.where(labels != -100, 0)
        return ((softmax - hit) * gradient[..., None]).to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, group, vocab_size: int) -> Tensor:
    """logits (B, S, ceil(V / t)), this rank's slice; labels (B, S), -100 = not counted -> nats (B, S), the same on all
    ranks, 0 where not counted; in float32, or float64 if the logits are. group=None: the whole vocabulary is here."""
    if group is None:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return VocabParallelCrossEntropy.apply(logits, labels, group, vocab_size)


def gather_logits(logits: Tensor, group, vocab_size: int) -> Tensor:
    """All logits (B, S, V) from each rank's slice, without gradient: to sample from."""
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits.detach().contiguous(), group)
    return torch.cat(parts, dim=-1)[..., :vocab_size]


@contextlib.contextmanager
def own_randomness(rank: int, device: torch.device):
    """Inside, random numbers of this rank's own: for dropout of what is cut, such as heads. Outside all ranks draw the
    same, as what is replicated must be dropped alike. The seed comes from the generator that they share, so after the
    block they still agree, and recomputation, which restores that one, repeats the block's masks too."""
    seed = int(torch.empty((), dtype=torch.int64).random_())  # from the CPU's generator
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((seed + 1 + rank) % 2**63)
        yield


# ------------------------------------------------------------------------------------------ cut, and put together


def shard(parameter: nn.Parameter, dim: int, group, pad: bool = False) -> nn.Parameter:
    """This rank's equal slice along dim, with its placement; `pad` fills up with zeros what does not divide."""
    t, rank = dist.get_world_size(group), dist.get_rank(group)
    whole = parameter.detach()
    n = -(-whole.shape[dim] // t)
    assert pad or n * t == whole.shape[dim]
    piece = whole.narrow(dim, min(rank * n, whole.shape[dim]), max(0, min(n, whole.shape[dim] - rank * n)))
    shape = list(whole.shape)
    shape[dim] = n
    slice_ = piece.new_zeros(shape)
    slice_.narrow(dim, 0, piece.shape[dim]).copy_(piece)
    result = nn.Parameter(slice_, parameter.requires_grad)
    known = getattr(parameter, "placement", {})
    result.placement = known | {"shard": known.get("shard", {}) | {"tp": dim},
                                "global_shape": known.get("global_shape", tuple(whole.shape))}
    return result


def tensor_parallel(model: nn.Module, group, sequence_parallel: bool = False) -> nn.Module:
    """Cut a CausalLM, the same on all ranks, in place: each keeps its part, and the names -> the model.

    model(input_ids) then returns this rank's slice of the logits, (B, S, ceil(V / t)). sequence_parallel: S must be a
    multiple of t. A parameter that stays whole but sees only a part of the gradient, because it works on this rank's
    heads or positions, says so: placement {"partial": ("tp",)}. Of experts each rank has a slice of every one, between
    an f and a g of their own (of k rows a token: `ep` sends less). ValueError names what does not divide.
    """
    if group is None:
        return model
    t, rank, c = dist.get_world_size(group), dist.get_rank(group), model.config
    check(model, t)
    if sequence_parallel and any(hasattr(layer.mlp, "experts") for layer in model.model.layers):
        raise ValueError("sequence parallelism cannot cut layers with experts; take tp without it, or ep")

    def partial(parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            known = getattr(parameter, "placement", {})
            parameter.placement = known | {"partial": known.get("partial", ()) + ("tp",)}

    def column(linear: nn.Linear) -> None:
        linear.weight = shard(linear.weight, 0, group)
        linear.out_features = linear.weight.shape[0]
        if linear.bias is not None:
            linear.bias = shard(linear.bias, 0, group)

    def row(linear: nn.Linear) -> None:
        linear.__class__ = RowParallelLinear
        linear.group, linear.sequence = group, sequence_parallel
        linear.weight = shard(linear.weight, 1, group)
        linear.in_features = linear.weight.shape[1]
        if sequence_parallel:
            partial(linear.bias)

    def enter(module: nn.Module, arguments: tuple) -> tuple:
        return Enter.apply(arguments[0], group, sequence_parallel), *arguments[1:]

    def cut_mlp(mlp: nn.Module) -> None:
        mlp.register_forward_pre_hook(enter)
        column(mlp.gate_proj)
        column(mlp.up_proj)
        row(mlp.down_proj)

    def cut_experts(experts: nn.Module) -> None:  # stacked matrices (E, out, in)
        experts.register_forward_pre_hook(enter)
        experts.gate_proj, experts.up_proj = shard(experts.gate_proj, 1, group), shard(experts.up_proj, 1, group)
        experts.down_proj = shard(experts.down_proj, 2, group)
        experts.register_forward_hook(lambda module, arguments, rows: Leave.apply(rows, group, False))

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.register_forward_pre_hook(enter)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            column(linear)
        row(attention.o_proj)
        attention.attend = attend_with_own_heads(attention.attend, c.num_attention_heads, rank, t)
        if c.qk_norm:  # on this rank's heads only, with or without sequence parallelism
            partial(attention.q_norm.weight)
            partial(attention.k_norm.weight)
        if sequence_parallel:
            partial(layer.input_layernorm.weight)
            partial(layer.post_attention_layernorm.weight)
        if hasattr(mlp, "experts"):  # the router stays whole, before f: each rank has its whole gradient
            cut_experts(mlp.experts)
            if mlp.shared_experts is not None:
                cut_mlp(mlp.shared_experts)
        else:
            cut_mlp(mlp)
    embed, head = model.model.embed_tokens, model.lm_head
    tied = head.weight is embed.weight
    embed.__class__ = VocabParallelEmbedding
    embed.weight = shard(embed.weight, 0, group, pad=True)
    embed.group, embed.sequence, embed.start = group, sequence_parallel, rank * embed.weight.shape[0]
    embed.sequence_shards = t if sequence_parallel else 1  # what a pipeline sends on is so much shorter
    head.weight = embed.weight if tied else shard(head.weight, 0, group, pad=True)
    head.out_features = head.weight.shape[0]
    head.register_forward_pre_hook(enter)
    if sequence_parallel:
        partial(model.model.norm.weight)
        if hasattr(model.model, "embed_positions"):  # learned positions: of this rank's tokens
            partial(model.model.embed_positions.weight)
            model.model.embed_positions.register_forward_hook(lambda module, arguments, x: x.chunk(t, dim=1)[rank])
    return model


def check(model: nn.Module, t: int) -> None:
    """ValueError: a number of heads, or a width between f and g, that t does not divide; a layer that is no Linear."""
    c = model.config
    sizes = {"num_attention_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads}
    for layer in model.model.layers:
        for name, module in layer.named_modules():
            if name.endswith("_proj") and type(module) is not nn.Linear:
                raise ValueError(f"tensor parallelism cuts nn.Linear, and {name} is {type(module).__name__}: merge "
                                 "adapters, or take another axis")
        sparse = hasattr(layer.mlp, "experts")
        sizes["moe_intermediate_size" if sparse else "intermediate_size"] = (
            layer.mlp.experts.gate_proj.shape[1] if sparse else layer.mlp.gate_proj.out_features)
    for name, size in sizes.items():
        if size % t:
            fitting = [str(n) for n in range(1, size + 1) if all(other % n == 0 for other in sizes.values())]
            raise ValueError(f"tp {t} does not divide {name} {size}; these would: {', '.join(fitting)}")


def attend_with_own_heads(attend, heads: int, rank: int, t: int):
    """attend(q, k, v, mask, dropout) with this rank's part of what each head has: ALiBi's biases, dropout's masks."""
    def own(q, k, v, mask, dropout=0.0):
        if mask is not None and mask.dim() == 4 and mask.shape[1] == heads:  # (B, H, S, T)
            mask = mask.chunk(t, dim=1)[rank]
        if not dropout:
            return attend(q, k, v, mask, dropout)
        with own_randomness(rank, q.device):
            return attend(q, k, v, mask, dropout)

    return own


def whole(tensor: Tensor, placement: dict, group) -> Tensor:
    """A parameter's slice (or its gradient's, its optimizer state's) from all ranks, without padding."""
    if group is None or "tp" not in placement.get("shard", {}):
        return tensor.detach()
    dim = placement["shard"]["tp"]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.detach().contiguous(), group)
    return torch.cat(parts, dim).narrow(dim, 0, placement["global_shape"][dim])


def full_state(model: nn.Module, group) -> dict[str, Tensor]:
    """{name: whole tensor} of all parameters, on every rank; tied ones once."""
    return {name: whole(p, getattr(p, "placement", {}), group) for name, p in model.named_parameters()}
