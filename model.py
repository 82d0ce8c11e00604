"""The decoder-only Transformer (Llama, Mistral, Qwen2, Qwen3 families) with Hugging Face's names, and nothing else.

    x = E[tokens]
    for each layer:   x = x + Attention(RMSNorm(x));   x = x + SwiGLU(RMSNorm(x))
    logits = RMSNorm(x) @ head.T

Each piece stands here once, in reading order: RMSNorm, RoPE, masks, KV cache, grouped-query attention, SwiGLU, layer,
model, initial weights, cost. B, S, H, D = batch, sequence, heads, head_dim; T = keys, Hkv = their heads.
With attention="triton" and kernels="triton" the files of kernels/ compute what the functions of the same names do here.

    python model.py        prints the size and cost of a few shapes
"""

import hashlib
import math
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM"}


@dataclass
class ModelConfig:
    """The shape of a model, under the names of Hugging Face's config.json. ValueError if it is impossible."""

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int | None = None  # None: 8/3 * hidden_size, up to a multiple of 32 (as in a 4x GELU)
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None  # None: as many as query heads; 1: multi-query attention
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048  # the trained length; RoPE itself has no limit
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head's query and key (Qwen3)
    sliding_window: int | None = None  # a token sees itself and the sliding_window - 1 before it
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    model_type: str | None = None  # the family in FAMILIES; None: the one that has these features
    attention: str = "sdpa"  # "eager" is the readable truth, "sdpa" PyTorch's kernels, "triton" ours
    kernels: str = "torch"  # "triton": our fused RMSNorm, RoPE and SwiGLU; this and attention are not in config.json

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                     "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = math.ceil(8 * self.hidden_size / 3 / 32) * 32
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
                             f"{self.num_key_value_heads}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                                 f"{self.num_attention_heads}; give head_dim")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window is {self.sliding_window}; it counts the token itself, so at least 1")
        if self.attention not in ("eager", "sdpa", "triton"):
            raise ValueError(f"attention {self.attention!r} is not available; choose eager, sdpa or triton")
        if self.kernels not in ("torch", "triton"):
            raise ValueError(f"kernels {self.kernels!r} are not available; choose torch or triton")
        if self.model_type is None:
            windowed = "qwen2" if self.attention_bias else "mistral"
            self.model_type = "qwen3" if self.qk_norm else windowed if self.sliding_window else "llama"
        lacks = {"llama": self.qk_norm or self.sliding_window, "mistral": self.qk_norm or self.attention_bias,
                 "qwen2": self.qk_norm or not self.attention_bias, "qwen3": not self.qk_norm}
        if lacks.get(self.model_type, True):
            raise ValueError(f"model_type {self.model_type!r} has no such combination of qk_norm={self.qk_norm}, "
                             f"attention_bias={self.attention_bias}, sliding_window={self.sliding_window}; "
                             f"families: {', '.join(FAMILIES)}")

    @classmethod
    def from_hf(cls, config: dict) -> "ModelConfig":
        """From the dict in a Hugging Face config.json. ValueError names what would change the forward pass unseen."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        sizes += [] if family == "llama" else ["num_key_value_heads"]
        if silent := [name for name in sizes if config.get(name) is None]:  # our defaults are not HF's
            raise ValueError(f"config.json: {', '.join(silent)} must be given")
        unwritten = {"mistral": {"sliding_window": 4096}, "qwen3": {"head_dim": 128}}  # HF's, where a file is silent
        values = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False} | unwritten.get(family, {})
        values |= {f.name: config[f.name] for f in fields(cls) if f.name in config and f.name not in ("attention", "kernels")}
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # the newer and the older dialect
        values["rope_theta"] = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
        values["qk_norm"] = family == "qwen3"
        if family == "qwen2":
            values["attention_bias"] = True  # on q, k and v; its config.json does not say so
        if family.startswith("qwen") and not config.get("use_sliding_window", False):
            values["sliding_window"] = None
        plain = {"hidden_act": ("silu",), "mlp_bias": (False,)}
        if values.get("sliding_window"):
            plain["max_window_layers"] = (0, None)  # the first layers without a window: none
        for name, allowed in plain.items():
            if config.get(name, allowed[0]) not in allowed:
                raise ValueError(f"config.json: {name} = {config[name]!r} is not supported; it must be {allowed[0]!r}")
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"config.json: rope scaling {rope} is not supported yet")
        layer_types = set(config.get("layer_types") or [])
        if layer_types - {"sliding_attention" if values.get("sliding_window") else "full_attention"}:
            raise ValueError(f"config.json: layer_types {sorted(layer_types)}: not supported; all must be alike")
        return cls(**values)

    def to_hf(self) -> dict:
        """The dict to write as config.json: what transformers needs to rebuild this very model."""
        config = asdict(self)
        for ours in ("attention", "kernels", "qk_norm"):
            config.pop(ours)
        if self.model_type == "qwen2":
            config.pop("attention_bias")
        if self.model_type.startswith("qwen"):
            config["use_sliding_window"] = self.sliding_window is not None
            config["max_window_layers"] = 0 if self.sliding_window else self.num_hidden_layers
        elif self.model_type == "llama":
            config.pop("sliding_window")
        return {"architectures": [FAMILIES[self.model_type]], "hidden_act": "silu", "rope_scaling": None,
                "torch_dtype": "float32"} | config


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float, kernels: str = "torch"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.normalize = eps, rms_norm
        if kernels == "triton":
            from kernels.rms_norm import rms_norm as fused
            self.normalize = fused

    def forward(self, x: Tensor, residual: Tensor | None = None):
        """-> the norm of x; with `residual` that of x + residual, and x + residual, for the next skip connection."""
        return self.normalize(x, self.weight, self.eps, residual)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None):
    """What RMSNorm computes, in PyTorch."""
    s = x if residual is None else x + residual
    weight = weight.to(s.dtype)  # under autocast s may be 16 bits wide, and stays so
    y = F.rms_norm(s, weight.shape, weight, eps)  # sums in float32 for half inputs; float64 stays
    return y if residual is None else (y, s)


def rope_tables(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / head_dim) for i < head_dim / 2 (Su et al. 2021, eq. 15).

    position_ids (..., S) integers -> two tables (..., S, 1, head_dim / 2), in float32, or float64 if dtype is.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    inverse_frequency = theta ** (torch.arange(0, head_dim, 2, device=position_ids.device).to(dtype) / -head_dim)
    angles = position_ids[..., None, None].to(dtype) * inverse_frequency
    return angles.cos(), angles.sin()


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (x[i], x[i + D/2]) of each head: the half-split form of Hugging Face. q, k (B, S, H or Hkv, D)."""
    def rotate(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def segment_starts(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """For each token of the flattened (B, S) the index of its document's first token; row ends are boundaries. (B, S)

    cu_seqlens (n + 1,) int32 rising from 0 to B * S, as in flash-attention. Tokens see each other where these agree.
    """
    token = torch.arange(batch * length, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, token, right=True, out_int32=True) - 1
    return torch.maximum(cu_seqlens[document].long(), token - token % length).view(batch, length)


def attention_mask(length: int, window: int | None, starts: Tensor | None, device) -> Tensor | None:
    """True where query i may see key j: (S, S), or (B, 1, S, S) with documents; None when it is plain causal."""
    if window is None and starts is None:
        return None
    i, j = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)
    mask = j <= i
    if window is not None:
        mask = mask & (j > i - window)
    if starts is not None:
        mask = mask & (starts[:, None, :, None] == starts[:, None, None, :])  # (B, 1, S, S)
    return mask


class KVCache:
    """Keys and values of the tokens seen so far, preallocated; the rows of a batch may differ in length.

    The token at position p of a row lies in slot p. To feed prompts of different lengths, pad them on the right, run
    them, then call `set_lengths` with the true ones: the padding lies beyond, unseen, until real tokens overwrite it.
    """

    def __init__(self, config: ModelConfig, batch: int, max_length: int, dtype=torch.float32, device="cpu"):
        shape = (config.num_hidden_layers, batch, max_length, config.num_key_value_heads, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.window = config.sliding_window
        self.set_lengths(torch.zeros(batch, dtype=torch.long, device=device))

    def set_lengths(self, lengths: Tensor) -> None:
        """Say how many tokens of each row count (B,): cuts off padding, or rejected drafts in speculative decoding."""
        self.lengths = lengths.long()
        self.longest = int(lengths.max())  # kept in Python, so that no step waits for the GPU

    def reserve(self, new: int) -> tuple[Tensor, Tensor]:
        """Make room for `new` tokens per row: their slots (B, new), and their mask (B, 1, new, slots in use)."""
        if self.longest + new > self.k.shape[2]:
            raise ValueError(f"the KV cache holds {self.k.shape[2]} tokens per row; {self.longest + new} are needed")
        slots = self.lengths[:, None] + torch.arange(new, device=self.lengths.device)
        self.lengths, self.longest = self.lengths + new, self.longest + new
        keys = torch.arange(self.longest, device=slots.device)
        mask = keys <= slots[:, None, :, None]
        if self.window is not None:
            mask = mask & (keys > slots[:, None, :, None] - self.window)
        return slots, mask

    def update(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, new, Hkv, D) in their slots; return all keys and values in use (B, longest, Hkv, D)."""
        row = torch.arange(len(slots), device=slots.device)[:, None]
        self.k[layer, row, slots] = k.to(self.k.dtype)
        self.v[layer, row, slots] = v.to(self.v.dtype)
        return self.k[layer, :, :self.longest].to(k.dtype), self.v[layer, :, :self.longest].to(v.dtype)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, written out: the truth that every faster attention is tested against.

    q (B, S, H, D); k, v (B, T, Hkv, D), query head h reading key head h // (H / Hkv); mask: see attention_mask -> as q.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)  # (B, T, H, D)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, S, T)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    return (F.dropout(weights, dropout) @ v).transpose(1, 2)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """The same through PyTorch's scaled_dot_product_attention, which picks a fused kernel."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


def triton_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, dropout: float, window: int | None):
    """The same by kernels/flash_attention.py, which takes document borders (see document_ends) and a window, no mask.

    ValueError: any dropout, which it does not know."""
    from kernels.flash_attention import flash_attn_func, flash_attn_varlen_func
    left = -1 if window is None else window - 1  # there a token itself does not count
    how = dict(dropout_p=dropout, causal=True, window_size=(left, 0))
    if documents is None:
        return flash_attn_func(q, k, v, **how)
    B, S = q.shape[:2]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B * S, H, D)
    return flash_attn_varlen_func(q, k, v, documents, documents, S, S, **how).unflatten(0, (B, S))


def document_ends(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """cu_seqlens with the ends of rows among them, in order; one that stood there already is then an empty document."""
    rows = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=cu_seqlens.device)
    return torch.cat((cu_seqlens, rows)).sort().values


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        H, Hkv, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config, self.layer = config, layer
        self.q_proj = nn.Linear(config.hidden_size, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, Hkv * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, Hkv * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, config.hidden_size, bias=config.attention_bias and config.model_type != "qwen2")
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.rms_norm_eps, config.kernels)
            self.k_norm = RMSNorm(D, config.rms_norm_eps, config.kernels)
        self.rotate = apply_rope
        if config.kernels == "triton":
            from kernels.rope import apply_rope as fused
            self.rotate = fused

    def forward(self, x: Tensor, rope, mask: Tensor | None, cache: KVCache | None, slots: Tensor | None) -> Tensor:
        B, S, _ = x.shape
        D = self.config.head_dim
        q = self.q_proj(x).view(B, S, -1, D)  # (B, S, H, D)
        k = self.k_proj(x).view(B, S, -1, D)  # (B, S, Hkv, D)
        v = self.v_proj(x).view(B, S, -1, D)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotate(q, k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, slots, k, v)
        attend = eager_attention if self.config.attention == "eager" else sdpa_attention
        if self.config.attention == "triton" and cache is None:  # a cache's rows differ in length: that takes a mask
            attend = partial(triton_attention, window=self.config.sliding_window)
        out = attend(q, k, v, mask, self.config.attention_dropout if self.training else 0.0)
        return self.o_proj(out.reshape(B, S, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.gated = swiglu
        if config.kernels == "triton":
            from kernels.swiglu import swiglu as fused
            self.gated = fused

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class Layer(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.kernels)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.kernels)

    def forward(self, x, rope, mask, cache=None, slots=None):
        attended = self.self_attn(self.input_layernorm(x), rope, mask, cache, slots)
        y, x = self.post_attention_layernorm(attended, residual=x)  # x + attended, and its norm
        return x + self.mlp(y)


class Transformer(nn.Module):
    """Embedding, layers, final norm. `activation_checkpointing` (none, selective, full) trades time for memory."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = "none"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.kernels)

    def forward(self, input_ids, position_ids=None, cu_seqlens=None, kv_cache=None) -> Tensor:
        B, S = input_ids.shape
        slots = starts = None
        if kv_cache is not None:
            slots, mask = kv_cache.reserve(S)
        else:
            starts = None if cu_seqlens is None else segment_starts(cu_seqlens, B, S)
            if self.config.attention == "triton":  # its kernel makes no mask; layers get the borders in its place
                mask = None if cu_seqlens is None else document_ends(cu_seqlens, B, S)
            else:
                mask = attention_mask(S, self.config.sliding_window, starts, input_ids.device)
        if position_ids is None:
            position_ids = torch.arange(S, device=input_ids.device)[None]  # (1, S)
            if slots is not None:
                position_ids = slots  # (B, S): each row goes on where it stands
            elif starts is not None:
                position_ids = torch.arange(B * S, device=starts.device).view(B, S) - starts  # restart in each document
        x = self.embed_tokens(input_ids)  # (B, S, hidden)
        rope = rope_tables(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        for layer in self.layers:
            if self.activation_checkpointing != "none" and torch.is_grad_enabled():
                x = checkpointed(layer, x, rope, mask, selective=self.activation_checkpointing == "selective")
            else:
                x = layer(x, rope, mask, kv_cache, slots)
        return self.norm(x)


def checkpointed(layer: nn.Module, x: Tensor, rope, mask, selective: bool) -> Tensor:
    """Run a layer without keeping its activations; backward computes them again (Chen et al. 2016).

    Full: keeps only the layer's input. Selective (Korthikanti et al. 2022): keeps what is dear to compute, the outputs
    of matmuls and of attention, and recomputes norms, RoPE and SwiGLU's pointwise part.
    """
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
    if not selective:
        return checkpoint(layer, x, rope, mask, use_reentrant=False)

    def policy(context, operator, *args, **kwargs):
        dear = any(name in str(operator) for name in ("aten.mm.", "aten.addmm.", "aten.bmm.", "scaled_dot_product",
                                                             "glassbox.flash"))
        return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(layer, x, rope, mask, use_reentrant=False, context_fn=contexts)


class CausalLM(nn.Module):
    """The language model: logits of the next token at every position; initial weights by `seed` (see initialize)."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        initialize(self, seed)

    def hidden(self, input_ids: Tensor, position_ids=None, cu_seqlens=None, kv_cache=None) -> Tensor:
        """The states up to and including the final norm (B, S, hidden). Arguments as in forward."""
        return self.model(input_ids, position_ids, cu_seqlens, kv_cache)

    def forward(self, input_ids: Tensor, position_ids=None, cu_seqlens=None, kv_cache: KVCache | None = None) -> Tensor:
        """input_ids (B, S) int64 -> logits (B, S, vocab_size) in the weights' dtype (autocast's under autocast).

        position_ids: (B, S), else 0, 1, 2 ... from each row's, document's or cached text's start.
        cu_seqlens: (n + 1,) int32 document offsets over the flattened B * S; tokens see their own document only.
        kv_cache: the tokens continue what it holds, and are added to it.
        """
        return self.lm_head(self.hidden(input_ids, position_ids, cu_seqlens, kv_cache))


@torch.no_grad()
def initialize(model: CausalLM, seed: int) -> None:
    """Normal(0, initializer_range) weights, zero biases, norms of one. Depends on (seed, name, shape) alone.

    The two projections that write into the residual stream are scaled by 1 / sqrt(2 layers), so that its variance does
    not grow with depth (Radford et al. 2019, section 2.3). No number depends on which other parameters there are.
    """
    std = model.config.initializer_range
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        values = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, 1.0, generator=generator)
        parameter.copy_(values * (std / math.sqrt(2 * model.config.num_hidden_layers) if residual else std))


def num_parameters(config: ModelConfig, embedding: bool = True) -> int:
    """How many weights the model has; `embedding=False` leaves out a table that serves as lookup only."""
    c, D = config, config.head_dim
    attention = 2 * c.hidden_size * D * (c.num_attention_heads + c.num_key_value_heads)
    biases = (c.num_attention_heads + 2 * c.num_key_value_heads) * D + (c.hidden_size if c.model_type != "qwen2" else 0)
    norms = 2 * c.hidden_size + (2 * D if c.qk_norm else 0)
    layer = attention + (biases if c.attention_bias else 0) + 3 * c.hidden_size * c.intermediate_size + norms
    tables = 1 if c.tie_word_embeddings or not embedding else 2
    return c.num_hidden_layers * layer + c.hidden_size + tables * c.vocab_size * c.hidden_size


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Training FLOPs per token, forward and backward, recomputation not counted: 6 N + 12 L H D S (PaLM, appendix B).

    N counts the head, not a table that is only looked up; attention counts the full square, masked half included.
    """
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    return 6 * num_parameters(config, embedding=False) + attention


if __name__ == "__main__":
    for name, shape in (("a toy", ModelConfig(1024, 128, None, 5, 4, 2, qk_norm=True, tie_word_embeddings=True)),
                        ("GPT-2's shape", ModelConfig(50304, 768, None, 12, 12, tie_word_embeddings=True)),
                        ("Llama 3 8B", ModelConfig(128256, 4096, 14336, 32, 32, 8))):
        flops = flops_per_token(shape, seq_len=2048)
        print(f"{name:14} {num_parameters(shape):14,} parameters, {flops / 1e9:8.3f} GFLOP per trained token")
