"""The decoder-only Transformer (Llama, Mistral, Qwen2, Qwen3, Mixtral, Qwen3-MoE) with Hugging Face's names.

    x = E[tokens]
    for each layer:   x = x + Attention(RMSNorm(x));   x = x + SwiGLU(RMSNorm(x)), or a mixture of experts (moe.py)
    logits = RMSNorm(x) @ head.T

Each piece stands here once, in reading order. B, S, H, D = batch, sequence, heads, head_dim; T = keys, Hkv = their
heads. With attention="triton" and kernels="triton" the files of kernels/ compute what the functions of the same names
do here. Beside this file, models with experts need moe.py, and reading and writing config.json needs hf_config.py.

    python model.py        prints the size and cost of a few shapes
"""

import hashlib
import math
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM", "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
            "glassbox": "GlassboxForCausalLM"}  # the last: what no other can express; transformers does not know it
TEACHING = ("n_shared_experts", "position_embedding_type", "attn_logit_softcapping", "final_logit_softcapping")
SCALINGS = {"linear": set(), "dynamic": set(), "llama3": {"low_freq_factor", "high_freq_factor"},
            "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}}


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
    max_position_embeddings: int = 2048  # the length that the model takes, scaling of RoPE included
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
    model_type: str | None = None  # the family in FAMILIES; None: the first that has these features
    attention: str = "sdpa"  # "eager" is the readable truth, "sdpa" PyTorch's kernels, "triton" ours
    kernels: str = "torch"  # "triton": our fused RMSNorm, RoPE and SwiGLU; this and attention are not in config.json
    rope_scaling: dict | None = None  # {"rope_type": linear, dynamic, yarn or llama3, "factor": ...}: inverse_frequency
    num_experts: int = 0  # of each mixture (moe.py); 0: plain MLPs
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None  # the width of one expert; None: intermediate_size
    norm_topk_prob: bool = True  # the weights of a token's experts add up to 1
    router_aux_loss_coef: float = 0.001  # how much of moe.load_balancing_loss, and of moe.router_z_loss, joins the loss
    router_z_loss_coef: float = 0.0
    decoder_sparse_step: int = 1  # every n-th layer has experts ...
    mlp_only_layers: list[int] | None = None  # ... but not these, counted from 0
    n_shared_experts: int = 0  # this many experts' width sees every token besides (DeepSeekMoE)
    position_embedding_type: str = "rope"  # or "alibi", "learned"
    attn_logit_softcapping: float | None = None  # scores <- cap tanh(scores / cap) (Gemma 2); sdpa then is eager
    final_logit_softcapping: float | None = None  # the same on the logits

    def __post_init__(self):
        def expect(true: bool, otherwise: str) -> None:
            if not true:
                raise ValueError(otherwise)

        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
                     "num_experts_per_tok", "decoder_sparse_step"):
            expect(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        H = self.num_attention_heads
        Hkv = self.num_key_value_heads = H if self.num_key_value_heads is None else self.num_key_value_heads
        expect(Hkv >= 1 and H % Hkv == 0, f"num_attention_heads {H} is no multiple of num_key_value_heads {Hkv}")
        expect(self.head_dim is not None or self.hidden_size % H == 0,
               f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {H}; give head_dim")
        self.head_dim = self.head_dim or self.hidden_size // H
        expect(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd; RoPE rotates pairs")
        self.intermediate_size = self.intermediate_size or math.ceil(8 * self.hidden_size / 3 / 32) * 32
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
        self.mlp_only_layers = list(self.mlp_only_layers or ())
        window, qk, bias, moe = self.sliding_window, self.qk_norm, self.attention_bias, self.num_experts > 0
        expect(window is None or window >= 1, f"sliding_window is {window}; it counts the token itself, so at least 1")
        expect(0 <= self.attention_dropout < 1, f"attention_dropout is {self.attention_dropout}; it must be in [0, 1)")
        expect(not moe or self.num_experts_per_tok <= self.num_experts,
               f"num_experts_per_tok {self.num_experts_per_tok} is more than num_experts {self.num_experts}")
        for name, known in (("attention", ("eager", "sdpa", "triton")), ("kernels", ("torch", "triton")),
                            ("position_embedding_type", ("rope", "alibi", "learned"))):
            value = getattr(self, name)
            expect(value in known, f"{name} {value!r} is not available; choose {', '.join(known[:-1])} or {known[-1]}")
        lacking = self.attn_logit_softcapping or self.final_logit_softcapping or self.position_embedding_type == "alibi"
        expect("triton" not in (self.attention, self.kernels) or not lacking,
               "attention and kernels 'triton' know no ALiBi and no soft-capping; choose eager or sdpa, and torch")
        self.rope_scaling = checked_scaling(self.rope_scaling, self.max_position_embeddings)
        expect(not self.rope_scaling or self.position_embedding_type == "rope", "rope_scaling is for RoPE, not for "
               f"position_embedding_type {self.position_embedding_type!r}")
        simple = self.norm_topk_prob and self.decoder_sparse_step == 1 and not self.mlp_only_layers
        simple = simple and self.moe_intermediate_size == self.intermediate_size
        plain = all(getattr(self, f.name) == f.default for f in fields(self) if f.name in TEACHING)
        fits = {"llama": not (qk or moe or window), "mistral": not (qk or moe or bias),
                "qwen2": bias and not (qk or moe), "qwen3": qk and not moe,
                "mixtral": moe and simple and not (qk or bias), "qwen3_moe": moe and qk}
        fits = {family: fit and plain for family, fit in fits.items()} | {"glassbox": True}
        self.model_type = self.model_type or next(family for family, fit in fits.items() if fit)
        expect(fits.get(self.model_type, False), f"model_type {self.model_type!r} has no such combination of "
               f"qk_norm={qk}, attention_bias={bias}, sliding_window={window}, num_experts={self.num_experts} and "
               f"{', '.join(TEACHING)}; families: {', '.join(FAMILIES)}")

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer, counted from 0, has experts."""
        every = self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        return every and layer not in self.mlp_only_layers

    @classmethod
    def from_hf(cls, config: dict) -> "ModelConfig":
        """From the dict in a Hugging Face config.json. ValueError names what would change the forward pass unseen."""
        from hf_config import fields_of
        if (family := config.get("model_type")) not in FAMILIES:
            raise ValueError(f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
        return cls(**fields_of(config, {f.name for f in fields(cls)}))

    def to_hf(self) -> dict:
        """The dict to write as config.json: what transformers needs (or we, if a "glassbox") to rebuild this model."""
        from hf_config import config_of
        return {"architectures": [FAMILIES[self.model_type]]} | config_of(asdict(self))


def checked_scaling(scaling: dict | None, trained: int) -> dict | None:
    """rope_scaling with kind, factor and trained length spelled out; None if it scales nothing. ValueError: unknown."""
    given = {"original_max_position_embeddings": trained}
    given |= {name: value for name, value in (scaling or {}).items() if value is not None}
    given["rope_type"] = kind = given.get("rope_type", given.pop("type", "default"))  # `type`: in the oldest files
    if kind not in ("default", *SCALINGS):
        raise ValueError(f"rope scaling {kind!r} is not supported; supported: default, {', '.join(SCALINGS)}")
    needed = {"factor", "original_max_position_embeddings"} | (SCALINGS[kind] if kind == "llama3" else set())
    if odd := given.keys() - {"rope_type"} - needed - SCALINGS.get(kind, set()):
        raise ValueError(f"rope scaling {kind!r}: {', '.join(sorted(odd))}: unknown here")
    if kind == "default":
        return None
    given.setdefault("factor", trained / given["original_max_position_embeddings"] if kind == "yarn" else None)
    for name in needed:
        if not isinstance(given.get(name), (int, float)) or given[name] < (1 if name == "factor" else 1e-9):
            raise ValueError(f"rope scaling {kind!r}: {name} is {given.get(name)!r}; it must be a number, factor >= 1")
    return given


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


def inverse_frequency(head_dim: int, theta: float, scaling: dict | None, reach: Tensor | None, dtype, device):
    """The angle per position of each pair i, theta^(-2i / D), scaled -> (..., D / 2), and a factor for cos and sin.

    In float32 equal, bit for bit, to transformers' modeling_rope_utils. The kinds of ModelConfig.rope_scaling:
    linear   1 / factor of it (position interpolation, Chen et al. 2023, arXiv:2306.15595)
    dynamic  a theta that grows with `reach` (...), the length of the text, beyond the trained one ("NTK", bloc97 2023)
    yarn     linear for pairs that turn fewer than beta_slow times in the trained length, unscaled for those that turn
             beta_fast times, mixed between; and a temperature of the softmax, as q and k are multiplied by
             0.1 ln(factor) + 1 (Peng et al. 2023, arXiv:2309.00071, eqs. 17 to 22)
    llama3   the same by wavelengths, without temperature (Llama 3.1)
    """
    power = torch.arange(0, head_dim, 2, device=device).to(dtype) / head_dim
    plain = 1.0 / theta**power  # (D / 2,)
    if not scaling:
        return plain, 1.0
    kind, factor, trained = (scaling[name] for name in ("rope_type", "factor", "original_max_position_embeddings"))
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "dynamic":
        reach = reach[..., None]
        grown = theta * (factor * reach.to(dtype) / trained - (factor - 1)) ** (head_dim / (head_dim - 2))
        return torch.where(reach > trained, 1.0 / grown**power, plain), 1.0
    if kind == "llama3":
        low, high, wavelength = scaling["low_freq_factor"], scaling["high_freq_factor"], 2 * math.pi / plain
        mix = (trained / wavelength - low) / (high - low)  # 1: as it was; 0: interpolated
        scaled = torch.where(wavelength > trained / low, plain / factor, (1 - mix) * plain / factor + mix * plain)
        return torch.where(wavelength < trained / high, plain, scaled), 1.0

    def pair_that_turns(times: float) -> float:  # eq. 23: the i with trained * theta^(-2i / D) = 2 pi times
        return head_dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = (pair_that_turns(scaling.get(name) or usual) for name, usual in (("beta_fast", 32), ("beta_slow", 1)))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    keep = 1 - ((torch.arange(head_dim // 2, device=device).to(dtype) - low) / (high - low or 0.001)).clamp(0, 1)
    scales = [scaling.get(name) or 0 for name in ("mscale", "mscale_all_dim")]
    over, under = (0.1 * m * math.log(factor) + 1 for m in (scales if all(scales) else (1, 0)))
    return 1.0 / (factor * theta**power) * (1 - keep) + plain * keep, scaling.get("attention_factor", over / under)


def rope_tables(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: dict | None = None,
                reach: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / head_dim) for i < head_dim / 2 (Su et al. 2021, eq. 15), or scaled.

    position_ids (..., S) integers -> two tables (..., S, 1, head_dim / 2), in float32, or float64 if dtype is.
    scaling, reach (..., S or 1): see inverse_frequency.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    frequency, factor = inverse_frequency(head_dim, theta, scaling, reach, dtype, position_ids.device)
    angles = position_ids[..., None, None].to(dtype) * frequency.unsqueeze(-2)
    return angles.cos() * factor, angles.sin() * factor


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (x[i], x[i + D/2]) of each head: Hugging Face's half-split form. q, k (B, S, H or Hkv, D)."""
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


def alibi(mask: Tensor | None, positions: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Attention with linear biases, -slope_h (i - j) where `mask` is true, else -inf (Press et al. 2022): (B, H, S, T).

    positions (B, S) of the queries; mask as from attention_mask. slope_h = 2^(-8 h / H), h = 1 .. H; if H is no power
    of two, those of the power below, then every other one of the power above."""
    n = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * h / n) for h in range(1, n + 1)] + [2 ** (-4 * h / n) for h in range(1, 2 * n + 1, 2)]
    slopes = torch.tensor(slopes[:heads], dtype=dtype, device=positions.device)[:, None, None]
    keys = torch.arange(positions.shape[1] if mask is None else mask.shape[-1], device=positions.device)
    distance = positions[:, None, :, None] - keys  # (B, 1, S, T)
    return (-slopes * distance).masked_fill(distance < 0 if mask is None else ~mask, float("-inf"))


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


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0, cap: float | None = None
                    ) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, written out: the truth that every faster attention is tested against.

    q (B, S, H, D); k, v (B, T, Hkv, D), query head h reading key head h // (H / Hkv) -> as q. mask: see attention_mask,
    or alibi, which is added. cap: scores <- cap * tanh(scores / cap) (Gemma 2).
    """
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)  # (B, T, H, D)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, S, T)
    scores = cap * torch.tanh(scores / cap) if cap else scores
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    return (F.dropout(weights, dropout) @ v).transpose(1, 2)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """The same, but for cap, through PyTorch's scaled_dot_product_attention, which picks a fused kernel."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    mask = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
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
        self.attend = self.attend_cached = eager_attention if config.attention == "eager" else sdpa_attention
        if config.attention == "triton":  # not with a cache: its rows differ in length, which takes a mask
            self.attend = partial(triton_attention, window=config.sliding_window)
        if config.attn_logit_softcapping:
            self.attend = self.attend_cached = partial(eager_attention, cap=config.attn_logit_softcapping)

    def forward(self, x: Tensor, rope, mask: Tensor | None, cache: KVCache | None, slots: Tensor | None) -> Tensor:
        B, S, _ = x.shape
        D = self.config.head_dim
        q = self.q_proj(x).view(B, S, -1, D)  # (B, S, H, D)
        k = self.k_proj(x).view(B, S, -1, D)  # (B, S, Hkv, D)
        v = self.v_proj(x).view(B, S, -1, D)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self.rotate(q, k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, slots, k, v)
        attend = self.attend if cache is None else self.attend_cached
        out = attend(q, k, v, mask, self.config.attention_dropout if self.training else 0.0)
        return self.o_proj(out.reshape(B, S, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.gated = swiglu
        if config.kernels == "triton":
            from kernels.swiglu import swiglu as fused
            self.gated = fused

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def mixture(config: ModelConfig) -> nn.Module:
    """A mixture of experts in the place of an MLP: moe.py, which only a model that has one needs beside this file."""
    from moe import MoE
    width = config.moe_intermediate_size
    shared = MLP(config, config.n_shared_experts * width) if config.n_shared_experts else None
    return MoE(config.hidden_size, width, config.num_experts, config.num_experts_per_tok, config.norm_topk_prob, shared)


class Layer(nn.Module):
    """Pre-norm residual block: attention, then MLP or experts."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = mixture(config) if config.is_sparse(layer) else MLP(config, config.intermediate_size)
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
        table = torch.empty(config.vocab_size, config.hidden_size)  # nn.Embedding would draw numbers: slow on "meta"
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.kernels)

    def forward(self, input_ids, position_ids=None, cu_seqlens=None, kv_cache=None) -> Tensor:
        (B, S), c = input_ids.shape, self.config
        slots = starts = None
        if kv_cache is not None:
            slots, mask = kv_cache.reserve(S)
        else:
            starts = None if cu_seqlens is None else segment_starts(cu_seqlens, B, S)
            if c.attention == "triton":  # its kernel makes no mask; layers get the borders in its place
                mask = None if cu_seqlens is None else document_ends(cu_seqlens, B, S)
            else:
                mask = attention_mask(S, c.sliding_window, starts, input_ids.device)
        column = torch.arange(S, device=input_ids.device)[None] if slots is None else slots  # (1 or B, S)
        if position_ids is None:  # each row goes on where it stands, or restarts in each document
            position_ids = column
            if starts is not None:
                position_ids = torch.arange(B * S, device=starts.device).view(B, S) - starts
        x = self.embed_tokens(input_ids)  # (B, S, hidden)
        rope = None
        if c.position_embedding_type == "rope":
            reach = position_ids.amax(-1, keepdim=True) + 1  # how far each token's text goes (1 or B, 1) ...
            if starts is not None and c.rope_scaling:  # ... or its document (B, S)
                reach = torch.zeros_like(starts.flatten()).scatter_reduce(
                    0, starts.flatten(), position_ids.flatten() + 1, "amax")[starts]
            rope = rope_tables(position_ids, c.head_dim, c.rope_theta, x.dtype, c.rope_scaling, reach)
        elif c.position_embedding_type == "learned":
            x = x + self.embed_positions(position_ids)
        else:
            mask = alibi(mask, column, c.num_attention_heads, x.dtype)
        for layer in self.layers:
            if self.training and hasattr(layer.mlp, "record"):
                layer.mlp.record = torch.is_grad_enabled()  # of its router's logits, for moe.router_loss
            if self.activation_checkpointing != "none" and torch.is_grad_enabled() and kv_cache is None:
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
        dear = any(name in str(operator) for name in ("aten.mm.", "aten.addmm.", "aten.bmm.", "grouped_mm",
                                                             "scaled_dot_product", "glassbox.flash"))
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
        if cap := config.final_logit_softcapping:
            self.lm_head.register_forward_hook(lambda head, states, logits: cap * torch.tanh(logits / cap))
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

    The projections that write into the residual stream are scaled by 1 / sqrt(2 layers), so that its variance does not
    grow with depth (Radford et al. 2019, section 2.3). Each expert of a stack is drawn by itself, as "name.number": no
    number depends on which other parameters, or how many experts, there are.
    """
    std = model.config.initializer_range
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        scale = std / math.sqrt(2 * model.config.num_hidden_layers) if "o_proj" in name or "down_proj" in name else std
        stack = [(name, parameter)] if parameter.dim() == 2 else [(f"{name}.{e}", p) for e, p in enumerate(parameter)]
        for name, matrix in stack:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            matrix.copy_(torch.empty(matrix.shape, dtype=torch.float32).normal_(0.0, 1.0, generator=generator) * scale)


def num_parameters(config: ModelConfig, embedding: bool = True, active: bool = False) -> int:
    """How many weights the model has; `embedding=False` leaves out tables that serve as lookup only, `active=True` the
    experts that a token does not see."""
    with torch.device("meta"):  # shapes without numbers
        model = CausalLM(replace(config, attention="sdpa", kernels="torch"))
    total = 0
    for name, p in model.named_parameters():
        lookup = "embed_positions" in name or "embed_tokens" in name and not config.tie_word_embeddings
        share = config.num_experts_per_tok if active and p.dim() == 3 else p.shape[0]
        total += 0 if lookup and not embedding else p.numel() // p.shape[0] * share
    return total


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Training FLOPs per token, forward and backward, recomputation not counted: 6 N + 12 L H D S (PaLM, appendix B).

    N counts the head, not a table that is only looked up, and of experts those that a token sees; attention counts the
    full square, masked half included.
    """
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    return 6 * num_parameters(config, embedding=False, active=True) + attention


if __name__ == "__main__":
    for name, shape in (("a toy", ModelConfig(1024, 128, None, 5, 4, 2, qk_norm=True, tie_word_embeddings=True)),
                        ("GPT-2's shape", ModelConfig(50304, 768, None, 12, 12, tie_word_embeddings=True)),
                        ("Llama 3 8B", ModelConfig(128256, 4096, 14336, 32, 32, 8))):
        cost = f"{flops_per_token(shape, seq_len=2048) / 1e9:8.3f} GFLOP per trained token"
        print(f"{name:14} {num_parameters(shape):14,} parameters, {cost}")
