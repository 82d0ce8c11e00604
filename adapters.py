"""Other small things to train beside a frozen model: prompts, prefixes, bottlenecks, scales, biases.

    prompt tuning     n trained rows before the text's embeddings            n H                       arXiv:2104.08691
      hidden=...      P-tuning: the rows come out of an MLP while training   (the MLP is thrown away)  arXiv:2103.10385
    P-tuning v2       n trained keys and values before each layer's own      2 n L Hkv D               arXiv:2110.07602
      hidden=...      prefix tuning: they come out of an MLP while training  (the MLP is thrown away)  arXiv:2101.00190
    bottleneck        y + W_up f(W_down y) on what a sublayer gives, with r numbers between
                      Houlsby: on attention and on MLP                       2 L (2 r H + r + H)       arXiv:1902.00751
                      Pfeiffer: on the MLP alone                             half of that              arXiv:2005.00247
    IA3               keys, values and the MLP's inner state, each number    L (2 Hkv D + F)           arXiv:2205.05638
                      times a trained one
    BitFit            the biases that are there                                                        arXiv:2106.10199

    H hidden size, L layers, Hkv D heads times size of keys, F the MLP's inner size. LoRA stands in lora.py.

    add_prefix_tuning(model, 20)                     # freezes the model; model(input_ids) has the prefix from now on
    with disable_adapters(model): ...                # the base, bit for bit
    lora.write_peft("folder", *to_peft(model))       # as the peft package has it (bottlenecks: it has none)
    from_peft(base, *lora.read_peft("folder"))

All work on model.CausalLM without a change to it, by hooks; bottleneck, IA3 and BitFit on any model with its names.
"""

import contextlib
import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """What the methods share: an adapter can be switched off and taken off again."""

    def __init__(self):
        super().__init__()
        self.enabled = True
        self.handles = []  # of hooks; these are plain functions that find the adapter at their host, or a deep copy
        #                    of the model would go on using the adapters of the original


def draw(shape, std: float, seed: int, name: str) -> nn.Parameter:
    """Normal(0, std) that depends on (seed, name, shape) alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return nn.Parameter(torch.empty(shape).normal_(0.0, std, generator=generator))


def drawn_ids(model: nn.Module, n: int, seed: int) -> list[int]:
    """n tokens of the model's vocabulary, each as likely as any other."""
    chance = torch.special.ndtr(draw((n,), 1.0, seed, "tokens").detach())  # even in 0 .. 1
    return (chance * model.config.vocab_size).long().clamp_max(model.config.vocab_size - 1).tolist()


def like(module: nn.Module, model: nn.Module) -> nn.Module:
    """To the model's device, and its dtype if that is no less than float32: small steps vanish in 16 bits."""
    p = next(model.parameters())
    return module.to(p.device, torch.promote_types(p.dtype, torch.float32))


def freeze(model: nn.Module) -> None:
    if any(isinstance(module, Adapter) for module in model.modules()):
        raise ValueError("the model has an adapter already: remove_adapters first")
    model.requires_grad_(False)


@contextlib.contextmanager
def disable_adapters(model: nn.Module):
    """Inside the `with` the model is its base, bit for bit (with prompt tuning: give it no virtual ids)."""
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    before = [adapter.enabled for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.enabled = False
        yield model
    finally:
        for adapter, enabled in zip(adapters, before):
            adapter.enabled = enabled


def remove_adapters(model: nn.Module) -> None:
    """Take off whatever was added: the base in its own names (still frozen)."""
    for host in list(model.modules()):
        for name, child in list(host.named_children()):
            if isinstance(child, Adapter):
                for handle in child.handles:
                    handle.remove()
                if isinstance(child, PromptEmbedding):
                    setattr(host, name, child.base_layer)
                else:
                    delattr(host, name)
        vars(host).pop("prefix_of", None)


# -------------------------------------------------------------------------------------------------------- prompt tuning


class PromptEmbedding(Adapter):
    """An embedding in which the ids -1, -2 ... -n stand for n trained rows, the virtual tokens."""

    def __init__(self, base: nn.Module, rows: Tensor, hidden: int | None, seed: int):
        super().__init__()
        n, H = rows.shape
        self.base_layer, self.prompt_embeddings, self.encoder = base, nn.Parameter(rows), None
        if hidden:
            shapes = ((hidden, H), (hidden, hidden), (H, hidden))
            self.encoder = mlp(shapes, nn.ReLU, seed)

    weight = property(lambda self: self.base_layer.weight)

    def rows(self) -> Tensor:  # (n, hidden)
        return self.prompt_embeddings if self.encoder is None else self.encoder(self.prompt_embeddings)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, rows = self.base_layer(input_ids.clamp_min(0)), self.rows()  # (B, S, H), (n, H)
        virtual = F.embedding((-1 - input_ids).clamp_min(0), rows).to(x.dtype)
        return torch.where((input_ids < 0)[..., None], virtual, x)


def mlp(shapes, activation, seed: int) -> nn.Sequential:
    """Linear layers of the given (out, in), an activation between them."""
    layers = []
    for i, (out, size) in enumerate(shapes):
        linear = nn.utils.skip_init(nn.Linear, size, out)
        linear.weight = draw((out, size), 1 / math.sqrt(size), seed, f"mlp.{i}")
        linear.bias = nn.Parameter(torch.zeros(out))
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def add_prompt_tuning(model: nn.Module, n: int, *, init_ids: list[int] | None = None, hidden: int | None = None,
                      seed: int = 0) -> None:
    """Give model.embed_tokens n virtual tokens and freeze all else; use them by with_prompt.

    init_ids: n token ids whose embeddings they start as; None: tokens drawn from the vocabulary, which beats random
    numbers (Lester et al., section 3.2). hidden: width of P-tuning's MLP. ValueError: n < 1, or not n init_ids.
    """
    table = model.model.embed_tokens.weight
    init_ids = drawn_ids(model, n, seed) if init_ids is None else init_ids
    if n < 1 or len(init_ids) != n:
        raise ValueError(f"prompt tuning with {n} virtual tokens from {len(init_ids)} token ids: give one id for each")
    freeze(model)
    rows = table[torch.tensor(init_ids)].to(torch.promote_types(table.dtype, torch.float32))
    prompt = PromptEmbedding(model.model.embed_tokens, rows, hidden, seed)
    if prompt.encoder is not None:
        like(prompt.encoder, model)
    model.model.embed_tokens = prompt


def with_prompt(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The virtual tokens' ids before each row: (B, S) -> (B, n + S). The logits of the text are model(...)[:, n:].

    They are ids like any others: a packed row has them at the start of each document, a KV cache's prompt at its start.
    """
    n = len(model.model.embed_tokens.prompt_embeddings)
    virtual = torch.arange(-1, -n - 1, -1, device=input_ids.device)
    return torch.cat((virtual.expand(len(input_ids), n), input_ids), dim=1)


# -------------------------------------------------------------------------------------------------------- prefix tuning


class Prefix(Adapter):
    """n keys and values for each layer: the rows of `prompt_embeddings` (n, L * 2 * Hkv * D), by layers, k then v."""

    def __init__(self, n: int, config, hidden: int | None, seed: int):
        super().__init__()
        L, kv = config.num_hidden_layers, config.num_key_value_heads * config.head_dim
        self.shape, self.mlp = (n, L, 2, config.num_key_value_heads, config.head_dim), None
        if hidden:  # Li & Liang, section 4.3: training the keys themselves was less stable
            self.mlp = mlp(((hidden, config.hidden_size), (L * 2 * kv, hidden)), nn.Tanh, seed)
        width = config.hidden_size if hidden else L * 2 * kv
        self.prompt_embeddings = draw((n, width), 1.0, seed, "prefix")

    def table(self) -> Tensor:  # (n, L * 2 * Hkv * D)
        return self.prompt_embeddings if self.mlp is None else self.mlp(self.prompt_embeddings)

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """k and v of one layer, (n, Hkv, D) each."""
        n, L, _, heads, D = self.shape
        if self.mlp is None:
            mine = self.prompt_embeddings.view(self.shape)[:, layer]
        else:  # only its rows of the last matrix
            first, tanh, last = self.mlp
            rows = slice(layer * 2 * heads * D, (layer + 1) * 2 * heads * D)
            inner = tanh(first(self.prompt_embeddings))
            mine = F.linear(inner, last.weight[rows], last.bias[rows]).view(n, 2, heads, D)
        return mine[:, 0], mine[:, 1]


class Before:
    """What stands in for an attention's KV cache: puts a prefix before the keys and values, whoever else keeps them."""

    def __init__(self, k: Tensor, v: Tensor, cache):
        self.k, self.v, self.cache = k, v, cache

    def update(self, layer, slots, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # (B, T, Hkv, D), rotated by RoPE
        if self.cache is not None:
            k, v = self.cache.update(layer, slots, k, v)
        size = (len(k), *self.k.shape)
        return torch.cat((self.k.to(k.dtype).expand(size), k), 1), torch.cat((self.v.to(v.dtype).expand(size), v), 1)


def shift_positions(transformer: nn.Module, args, kwargs):
    """Before the model runs: text begins at position n, behind the prefix, as in PEFT. In each document, if packed."""
    prefix = transformer.prefix
    if not prefix.enabled:
        return None
    ids, *given = (*args, *[None] * 4)[:4]
    position_ids, cu_seqlens, cache = (kwargs.get(name, value) for name, value in
                                       zip(("position_ids", "cu_seqlens", "kv_cache"), given))
    B, S = ids.shape
    if position_ids is None:
        position_ids = torch.arange(S, device=ids.device)[None]
        if cache is not None:
            position_ids = cache.lengths[:, None] + position_ids
        elif cu_seqlens is not None:
            token = torch.arange(B * S, device=ids.device)
            start = cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1]
            position_ids = (token - torch.maximum(start, token - token % S)).view(B, S)
    position_ids = position_ids + prefix.shape[0]
    if len(args) > 1:
        return (ids, position_ids, *args[2:]), kwargs
    return args, kwargs | {"position_ids": position_ids}


def lend_prefix(attention: nn.Module, args):
    """Before an attention runs: all its queries see the prefix, besides what they saw."""
    prefix, layer = attention.prefix_of
    if not prefix.enabled:
        return None
    x, rope, mask, cache, *rest = args
    if mask is None:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    elif mask.dtype != torch.bool:
        raise ValueError("prefix tuning needs a mask: no ALiBi, and packed documents by attention eager or sdpa")
    return x, rope, F.pad(mask, (prefix.shape[0], 0), value=True), Before(*prefix.keys_values(layer), cache), *rest


class Record:
    """Stands in for an attention's KV cache and notes what passes."""

    def __init__(self):
        self.tensors = []

    def update(self, layer, slots, k, v):
        self.tensors += [k, v]
        return k, v


@torch.no_grad()
def add_prefix_tuning(model: nn.Module, n: int, *, init_ids: list[int] | None = None, hidden: int | None = None,
                      seed: int = 0) -> None:
    """Put n trained keys and values before those of each layer (P-tuning v2), and freeze all else.

    The prefix is not rotated by RoPE, and text begins at position n. It starts as the keys and values of the n tokens
    init_ids, so that the model answers just as if they stood there; None: of drawn ones. (PEFT starts it with normal
    numbers, which no model has seen for keys: a worse start, see NOTES.md.) hidden: let an MLP of that width make them
    while training (prefix tuning), not together with init_ids. Not for sliding windows or ALiBi.
    """
    config, transformer = model.config, model.model
    if n < 1 or init_ids is not None and (len(init_ids) != n or hidden):
        raise ValueError(f"a prefix of {n} from {init_ids} with hidden={hidden}: give n >= 1 and n init_ids, or hidden")
    if config.sliding_window:
        raise ValueError(f"prefix tuning, sliding_window {config.sliding_window}: the prefix would slide out of sight")
    freeze(model)
    prefix, record = like(Prefix(n, config, hidden, seed), model), Record()
    if not hidden:
        init_ids = drawn_ids(model, n, seed) if init_ids is None else init_ids
        handles = [layer.self_attn.register_forward_pre_hook(lambda attention, args: (*args[:3], record, *args[4:]))
                   for layer in transformer.layers]
        transformer(torch.tensor([init_ids], device=prefix.prompt_embeddings.device))
        for handle in handles:
            handle.remove()
        prefix.prompt_embeddings.copy_(torch.cat(record.tensors).transpose(0, 1).reshape(n, -1))  # (2 L, n, Hkv, D)
    transformer.prefix = prefix
    prefix.handles = [transformer.register_forward_pre_hook(shift_positions, with_kwargs=True)]
    for i, layer in enumerate(transformer.layers):
        layer.self_attn.prefix_of = (prefix, i)  # in a tuple, so that it is no submodule
        prefix.handles.append(layer.self_attn.register_forward_pre_hook(lend_prefix))


# ----------------------------------------------------------------------------------------------------------- bottleneck


class Bottleneck(Adapter):
    """y + W_up f(W_down y + b_down) + b_up; W_up starts at zero, so the model starts out as its base."""

    def __init__(self, hidden: int, size: int, activation, seed: int, name: str):
        super().__init__()
        self.down, self.up = (nn.utils.skip_init(nn.Linear, *shape) for shape in ((hidden, size), (size, hidden)))
        self.down.weight = draw((size, hidden), 1 / math.sqrt(hidden), seed, name)
        for p in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(p)
        self.activation = activation

    def forward(self, y: Tensor) -> Tensor:
        if not self.enabled:
            return y
        low = self.activation(F.linear(y, self.down.weight.to(y.dtype), self.down.bias.to(y.dtype)))
        return y + F.linear(low, self.up.weight.to(y.dtype), self.up.bias.to(y.dtype)).to(y.dtype)


def add_bottleneck(model: nn.Module, size: int, *, where: str = "houlsby", activation=F.gelu, seed: int = 0) -> None:
    """Adapters of `size` inner numbers on what each sublayer adds to the residual stream; all else is frozen.

    where: houlsby, on attention and MLP, or pfeiffer, on the MLP alone: half the cost for about the same result.
    """
    hosts = {"houlsby": ("self_attn", "mlp"), "pfeiffer": ("mlp",)}.get(where)
    if hosts is None or size < 1:
        raise ValueError(f"bottleneck of size {size}, where={where!r}: size >= 1, where houlsby or pfeiffer")
    freeze(model)
    for i, layer in enumerate(model.model.layers):
        for host in hosts:
            module = getattr(layer, host)
            module.adapter = like(Bottleneck(model.config.hidden_size, size, activation, seed, f"{i}.{host}"), model)
            module.adapter.handles = [module.register_forward_hook(lambda host, args, y: host.adapter(y))]


# ------------------------------------------------------------------------------------------------------- IA3 and biases


class IA3(Adapter):
    def __init__(self, size: tuple[int, int], feedforward: bool):
        super().__init__()
        self.ia3_l, self.feedforward = nn.Parameter(torch.ones(size)), feedforward


def scale_input(linear: nn.Module, args):
    x, ia3 = args[0], linear.ia3
    return ((x * ia3.ia3_l.flatten()).to(x.dtype), *args[1:]) if ia3.enabled else None


def scale_output(linear: nn.Module, args, y: Tensor):
    return (y * linear.ia3.ia3_l.flatten()).to(y.dtype) if linear.ia3.enabled else None


def add_ia3(model: nn.Module, targets=("k_proj", "v_proj"), feedforward=("down_proj",)) -> None:
    """A trained factor, 1 at first, for each output of the layers whose names end in `targets` and each input of those
    in `feedforward`; all else is frozen. ValueError for a name that no layer has."""
    found = {path: module for path, module in model.named_modules() if hasattr(module, "in_features")}
    for name in (*targets, *feedforward):
        if not any(path == name or path.endswith(f".{name}") for path in found):
            raise ValueError(f"IA3: no layer's name ends in {name!r}; there are: "
                             f"{', '.join(sorted({path.rpartition('.')[2] for path in found}))}")
    freeze(model)
    for path, linear in found.items():
        inward = any(path == name or path.endswith(f".{name}") for name in feedforward)
        if inward or any(path == name or path.endswith(f".{name}") for name in targets):
            linear.ia3 = like(IA3((1, linear.in_features) if inward else (linear.out_features, 1), inward), model)
            linear.ia3.handles = [linear.register_forward_pre_hook(scale_input) if inward else
                                  linear.register_forward_hook(scale_output)]


@torch.no_grad()
def merge_ia3(model: nn.Module) -> None:
    """Multiply the factors into weights and biases, in place, and take the adapters off: no more cost per token."""
    hosts = {path: module for path, module in model.named_modules() if isinstance(getattr(module, "ia3", None), IA3)}
    for path, linear in hosts.items():
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{path} is a {type(linear).__name__}: only an nn.Linear can take factors in")
    for linear in hosts.values():
        linear.weight.mul_(linear.ia3.ia3_l)  # (out, 1) scales rows, (1, in) columns
        if linear.bias is not None and not linear.ia3.feedforward:
            linear.bias.mul_(linear.ia3.ia3_l.flatten())
    remove_adapters(model)


def bitfit(model: nn.Module) -> None:
    """Train the biases and nothing else. ValueError for a model without any, such as Llama's."""
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    if not biases:
        raise ValueError("BitFit trains biases, and this model has none (Qwen2's have, on q, k and v)")
    freeze(model)
    for p in biases:
        p.requires_grad_(True)


# --------------------------------------------------------------------------------------------------------- PEFT folders


def to_peft(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """The adapter_config.json and the tensors that the peft package has for the model's adapter.

    An MLP that makes rows or prefixes is not written, as in PEFT: only what it makes. Bottlenecks, which PEFT lacks,
    are written in its manner under peft_type BOTTLENECK; BitFit's biases are the model's own.
    """
    adapters = {path: module for path, module in model.named_modules() if isinstance(module, Adapter)}
    if not adapters:
        raise ValueError("the model has no adapter to write")
    first, config = next(iter(adapters.values())), {"task_type": "CAUSAL_LM", "inference_mode": True}
    if isinstance(first, PromptEmbedding):
        rows = first.rows().detach()
        shape = dict(num_virtual_tokens=len(rows), token_dim=rows.shape[1], num_transformer_submodules=1,
                     num_attention_heads=model.config.num_attention_heads, num_layers=model.config.num_hidden_layers)
        return config | {"peft_type": "PROMPT_TUNING", **shape}, {"prompt_embeddings": rows}
    if isinstance(first, Prefix):
        n, L, _, heads, D = first.shape
        config |= {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": n, "num_layers": L, "token_dim": heads * D,
                   "num_attention_heads": heads, "num_transformer_submodules": 1, "prefix_projection": False}
        return config, {"prompt_embeddings": first.table().detach()}
    if isinstance(first, IA3):
        ends = {path.split(".")[-2]: adapter.feedforward for path, adapter in adapters.items()}
        config |= {"peft_type": "IA3", "target_modules": sorted(ends), "fan_in_fan_out": False,
                   "feedforward_modules": sorted(end for end, inward in ends.items() if inward)}
        return config, {f"base_model.model.{path.removesuffix('.ia3')}.ia3_l": a.ia3_l for path, a in adapters.items()}
    where = "houlsby" if any(path.endswith("self_attn.adapter") for path in adapters) else "pfeiffer"
    config |= {"peft_type": "BOTTLENECK", "size": first.down.out_features, "where": where}
    return config, {f"base_model.model.{path}.{name}": p for path, adapter in adapters.items()
                    for name, p in adapter.named_parameters()}


@torch.no_grad()
def from_peft(model: nn.Module, config: dict, tensors: dict[str, Tensor]) -> None:
    """Put an adapter on the model, as the add_ functions do, from what lora.read_peft gives.

    ValueError: a kind that is not here, or tensors of another model's shape; the model is then as before, but frozen.
    """
    kind, table = config.get("peft_type"), tensors.get("prompt_embeddings")
    if kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"):
        c = model.config
        prefix = c.num_hidden_layers * 2 * c.num_key_value_heads * c.head_dim
        width = prefix if kind == "PREFIX_TUNING" else c.hidden_size
        if table is None or len(tensors) != 1 or table.dim() != 2 or table.shape[1] != width or not len(table):
            held = {name: tuple(t.shape) for name, t in tensors.items()}
            raise ValueError(f"an adapter of another model: {kind} with {held}, this one needs prompt_embeddings "
                             f"(n, {width})")
        if kind == "PREFIX_TUNING":
            add_prefix_tuning(model, len(table))
            model.model.prefix.prompt_embeddings.copy_(table)
        else:
            add_prompt_tuning(model, len(table))
            model.model.embed_tokens.prompt_embeddings.copy_(table)
        return
    if kind == "IA3":
        inward = config.get("feedforward_modules") or []
        targets = config.get("target_modules") or []
        regex, odd = isinstance(targets, str) or isinstance(inward, str), ("fan_in_fan_out", "modules_to_save")
        if regex or any(config.get(name) for name in odd):
            raise ValueError(f"IA3: target_modules must be a list, and {' and '.join(odd)} are not supported")
        add_ia3(model, [name for name in targets if name not in inward], inward)
    elif kind == "BOTTLENECK":
        add_bottleneck(model, config["size"], where=config["where"])
    else:
        raise ValueError(f"peft_type {kind!r} is not among PREFIX_TUNING, PROMPT_TUNING, P_TUNING, IA3, BOTTLENECK "
                         "(LORA: see lora.py)")
    ours = to_peft(model)[1]
    wrong = [name for name in {**ours, **tensors} if name not in ours or name not in tensors
             or ours[name].shape != tensors[name].shape]
    if wrong:
        remove_adapters(model)
        raise ValueError(f"an adapter of another model: {wrong[0]} is missing on one side or has another shape")
    for name, p in ours.items():
        p.copy_(tensors[name])
