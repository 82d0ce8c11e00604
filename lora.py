"""Low-rank adapters: a frozen model learns through two thin matrices beside each linear layer.

    y = W x + s B A x                                LoRA: A (r, in), B (out, r), s = alpha / r       arXiv:2106.09685
    s = alpha / sqrt(r)                              rsLoRA: a larger r learns no slower              arXiv:2312.03732
    y = m (W + s B A) x / |W + s B A|                DoRA: m (out,), | | the norm of each row         arXiv:2402.09353
    W in 4 bits, gradient to x, A, B only            QLoRA: W is any layer with .dequantize()         arXiv:2305.14314

    model = apply_lora(model, LoRAConfig(r=16, alpha=32, target_modules=["q_proj", "v_proj"]))     # freezes the rest
    optimizer = AdamW(p for p in model.parameters() if p.requires_grad)
    with disable_adapters(model):                    # the base, bit for bit: DPO's reference without a second model
        reference = model(input_ids)
    save_adapter(model, "folder")                    # as the peft package writes it; load_adapter(model, "folder")
    merge_lora(model, final=True)                    # plain layers again, W + s B A, as fast as before

    python lora.py                                   prints what the adapters of a 7B model cost

A starts Kaiming-uniform, B zero (and m as the norms of W), so an adapted model starts out bit-identical to its base.
"""

import contextlib
import copy
import hashlib
import json
import math
import os
import re
import struct
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEFT_OUT = ("lm_head", "embed_out", "score", "classifier", "gate")  # by "all-linear": heads as in PEFT, and routers


@dataclass
class LoRAConfig:
    """What to adapt, and how strongly. ValueError for what cannot be."""

    r: int = 8  # rank of the update
    alpha: float = 16.0  # the update counts alpha / r times
    dropout: float = 0.0  # on what A reads, in training mode
    target_modules: str | list[str] = "all-linear"  # ends of names ("q_proj"), regexes of whole names, or this
    use_rslora: bool = False  # alpha / sqrt(r)
    use_dora: bool = False  # the direction is learned by A and B, the length of each row apart
    modules_to_save: list[str] = field(default_factory=list)  # to train whole, such as "embed_tokens", "lm_head"
    rank_pattern: dict[str, int] = field(default_factory=dict)  # another r for layers whose name ends so (a regex)
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # another alpha, likewise
    base_model: str | None = None  # folder or hub name of the model without adapters, for the reader of the files

    def __post_init__(self):
        for name, r in {"r": self.r, **self.rank_pattern}.items():
            if type(r) is not int or r < 1:
                raise ValueError(f"LoRA rank {name} = {r!r}: must be a whole number, at least 1")
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
                raise ValueError(f"LoRA {name} = {alpha!r}: must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout = {self.dropout}: must be at least 0 and below 1")

    def of(self, path: str) -> tuple[int, float]:
        """Rank r and scale s of the layer at `path`."""
        def value(pattern: dict, otherwise):
            return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)  # as PEFT

        r, alpha = value(self.rank_pattern, self.r), value(self.alpha_pattern, self.alpha)
        return r, alpha / (math.sqrt(r) if self.use_rslora else r)


# ----------------------------------------------------------------------------------------------------------- the layers


class LoRALinear(nn.Module):
    """A frozen linear layer with adapters by name, of which one at most acts.

    `base_layer` is an nn.Linear, or a quantized layer: anything called like one that has in_features, out_features,
    bias and dequantize() -> (out, in). A and B are float32 at least, for small steps vanish in 16 bits; they are
    multiplied in the dtype of x, as autocast would.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B, self.lora_magnitude_vector = (nn.ParameterDict() for _ in range(3))  # PEFT's names
        self.config: dict[str, LoRAConfig] = {}
        self.scale: dict[str, float] = {}
        self.active: str | None = None  # the adapter that acts; None: the base alone
        self.merged: str | None = None  # the adapter that base_layer has taken in
        self.kept: tuple[nn.Module, ...] = ()  # meanwhile the base as it was; in a tuple, so that it is no submodule

    in_features = property(lambda self: self.base_layer.in_features)
    out_features = property(lambda self: self.base_layer.out_features)
    bias = property(lambda self: self.base_layer.bias)

    def add(self, name: str, config: LoRAConfig, r: int, scale: float) -> None:
        """A new adapter that does nothing yet: A = B = 0."""
        base = self.base
        tensor = [*base.parameters(), *base.buffers()][0]
        dtype = torch.promote_types(base.weight.dtype, torch.float32) if isinstance(base, nn.Linear) else torch.float32
        new = dict(dtype=dtype, device=tensor.device)
        self.lora_A[name] = nn.Parameter(torch.zeros(r, self.in_features, **new))
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, r, **new))
        self.config[name], self.scale[name] = config, scale
        if config.use_dora:
            self.lora_magnitude_vector[name] = nn.Parameter(self.row_norms(name))

    @property
    def base(self) -> nn.Module:
        """The layer without any adapter, merged or not."""
        return self.kept[0] if self.kept else self.base_layer

    def update(self, name: str) -> Tensor:
        """s B A (out, in)."""
        return self.scale[name] * (self.lora_B[name] @ self.lora_A[name])

    @torch.no_grad()
    def row_norms(self, name: str) -> Tensor:
        """|W + s B A| (out,), a constant to the gradient (DoRA, section 4.3). Never 0: a row of zeros stays so."""
        with torch.autocast(self.lora_A[name].device.type, enabled=False):  # at the start m / norm is exactly 1
            W = weight_of(self.base).to(self.lora_A[name].dtype) + self.update(name)
            return torch.linalg.vector_norm(W, dim=1).clamp_min(torch.finfo(W.dtype).tiny)

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in) that the layer stands for, adapter included and with gradients: forward's slow truth.

        So a fused cross-entropy that asks an adapted head for its weight is right too."""
        if self.active == self.merged:
            return weight_of(self.base_layer)
        W, name = weight_of(self.base), self.active
        if name not in self.lora_A:
            return W
        adapted = W.to(self.lora_A[name].dtype) + self.update(name)
        if name in self.lora_magnitude_vector:
            adapted = (self.lora_magnitude_vector[name] / self.row_norms(name))[:, None] * adapted
        return adapted.to(W.dtype)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if self.active == self.merged:
            return self.base_layer(x)
        y, name = self.base(x), self.active
        if name not in self.lora_A:  # no adapter, or one of other layers
            return y
        A, B, p = self.lora_A[name].to(x.dtype), self.lora_B[name].to(x.dtype), self.config[name].dropout
        low = F.linear(F.dropout(x, p, self.training) if p else x, A)  # (..., r)
        update = F.linear(low, B) * self.scale[name]
        if name in self.lora_magnitude_vector:
            # g (Wx + update) + b as y + (g - 1) Wx + g update, which is y to the bit while g = 1 and update = 0.
            # PEFT drops out what W reads here, too, by a second product with W; here dropout is for the update alone.
            gain = (self.lora_magnitude_vector[name] / self.row_norms(name)).to(y.dtype)
            return y + (gain - 1) * (y if self.bias is None else y - self.bias.to(y.dtype)) + gain * update
        return y + update

    def _apply(self, fn, recurse=True):  # .to(device): what is kept goes along
        for base in self.kept:
            base._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"adapters={list(self.lora_A)}, active={self.active}, merged={self.merged}"


class TrainedWhole(nn.Module):
    """A module with whole trained copies by name (PEFT's modules_to_save): for embeddings and heads of new tokens."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.original_module, self.modules_to_save = module, nn.ModuleDict()
        self.config: dict[str, LoRAConfig] = {}
        self.active: str | None = None

    base = property(lambda self: self.original_module)
    weight = property(lambda self: self.now.weight)

    def add(self, name: str, config: LoRAConfig, module: nn.Module) -> None:
        self.modules_to_save[name], self.config[name] = module, config

    @property
    def now(self) -> nn.Module:
        return self.modules_to_save[self.active] if self.active in self.modules_to_save else self.original_module

    def forward(self, *args, **kwargs):
        return self.now(*args, **kwargs)


def is_quantized(module: nn.Module) -> bool:
    return callable(getattr(module, "dequantize", None)) and hasattr(module, "in_features")


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_quantized(module)


def weight_of(layer: nn.Module) -> Tensor:
    """(out, in), as the layer multiplies by it."""
    return layer.dequantize() if is_quantized(layer) else layer.weight


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The LoRALinear and TrainedWhole modules of a model by the names that the layers had before."""
    return {path: module for path, module in model.named_modules() if isinstance(module, (LoRALinear, TrainedWhole))}


def _bare(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name as if no adapter were there."""
    inner, found = tuple(f"{path}." for path in adapted(model)), {}
    for path, module in model.named_modules():
        if path and not path.startswith(inner or "\0"):
            found[path] = module.base if isinstance(module, (LoRALinear, TrainedWhole)) else module
    return found


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


# ------------------------------------------------------------------------------------------------ putting adapters on


def _matches(target: str, path: str) -> bool:
    try:
        return path == target or path.endswith(f".{target}") or re.fullmatch(target, path) is not None
    except re.error as error:
        raise ValueError(f"target_modules: {target!r} is no regular expression: {error}") from None


def find_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The names of the layers that config.target_modules means. ValueError where that is none, with those there are."""
    modules = _bare(model)
    linear = [path for path, module in modules.items() if is_linear(module)]
    targets = [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules)
    whole = {path for name in config.modules_to_save for path in modules if _matches(name, path)}
    if [target.lower() for target in targets] == ["all-linear"]:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return [path for path in linear if path.rpartition(".")[2] not in LEFT_OUT and modules[path] is not head
                and path not in whole]
    for target in targets:
        for path, p in model.named_parameters():
            if p.dim() > 2 and _matches(target, path):
                raise ValueError(f"target_modules: {target!r} means {path}, stacked experts of shape {tuple(p.shape)}, "
                                 "which take no adapters here; name layers beside them by more of their names")
        if not any(_matches(target, path) for path in linear):
            others = [f"{path} is a {type(modules[path]).__name__}" for path in modules if _matches(target, path)]
            kinds = sorted({path.rpartition(".")[2] for path in linear})
            other = f" ({others[0]})" if others else ""
            raise ValueError(f"target_modules: {target!r} matches no linear layer{other}; there are: "
                             + ", ".join(kinds))
    return [path for path in linear if path not in whole and any(_matches(target, path) for target in targets)]


def _install(model: nn.Module, name: str, config: LoRAConfig, paths: list[str], whole: list[str]) -> dict:
    """Give the layers at `paths` an adapter `name` that does nothing yet, and modules at `whole` a copy to train."""
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter name {name!r}: must be a name such as default, of letters, digits and _")
    if any(name in module.config for module in adapted(model).values()):
        raise ValueError(f"the model has an adapter {name!r} already: choose another name, or remove_lora first")
    owners, modules = {}, _bare(model)
    for path, module in model.named_modules(remove_duplicate=False):
        for p in module._parameters.values():
            if p is not None and not isinstance(module, nn.ParameterDict):
                owners.setdefault(id(p), []).append(path)
    for path in paths:
        shared = owners.get(id(getattr(modules[path], "weight", None)), [])
        if len(shared) > 1:
            raise ValueError(f"{path} shares its weight with {next(p for p in shared if p != path)}: an adapter on it "
                             "could not be merged; leave it out, or train both whole by modules_to_save")
    # Tied modules go together: copied in one call, their copies are tied as well.
    whole = sorted({owner.removesuffix(".original_module") for path in whole
                    for p in modules[path].parameters(recurse=False) for owner in owners[id(p)]})
    for path in (*paths, *whole):
        if isinstance(there := model.get_submodule(path), LoRALinear if path in whole else TrainedWhole):
            raise ValueError(f"{path} is a {type(there).__name__} of another adapter, and cannot be both kinds")
    copies = dict(zip(whole, copy.deepcopy([modules[path] for path in whole])))
    for path in (*whole, *paths):
        there, kind = model.get_submodule(path), TrainedWhole if path in copies else LoRALinear
        module = there if isinstance(there, kind) else kind(there)
        module.add(name, config, *([copies[path]] if path in copies else config.of(path)))
        _put(model, path, module.train(there.training))
    set_adapter(model, name)
    return {path: model.get_submodule(path) for path in paths}


@torch.no_grad()
def apply_lora(model: nn.Module, config: LoRAConfig, name: str = "default", seed: int = 0) -> nn.Module:
    """Put adapters on the model, in place, and return it: they alone are trained, all else is frozen.

    A linear layer `q_proj` becomes a LoRALinear with the parameters q_proj.base_layer.weight, q_proj.lora_A.default and
    q_proj.lora_B.default. A second call with another `name` adds another adapter. A depends on (seed, layer's name,
    shape) alone. ValueError: targets that match no layer (naming those there are), layers with tied weights, and
    stacked experts, which are no linear layers ("all-linear" leaves them and their router out).
    """
    modules, whole = _bare(model), []
    for target in config.modules_to_save:
        whole += (found := [path for path in modules if _matches(target, path) and modules[path]._parameters])
        if not found:
            raise ValueError(f"modules_to_save: {target!r} matches no module with weights of its own")
    for path, layer in _install(model, name, config, find_targets(model, config), whole).items():
        A = layer.lora_A[name]
        if not A.is_meta:
            digest = hashlib.sha256(f"{seed}/{path}.lora_A".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            bound = 1 / math.sqrt(layer.in_features)  # Kaiming with a = sqrt(5), nn.Linear's own start
            A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=generator))
    return model


def set_adapter(model: nn.Module, name: str) -> None:
    """From now on adapter `name` acts, and it alone is trained. ValueError naming those there are."""
    names = {n: None for module in adapted(model).values() for n in module.config}
    if name not in names:
        raise ValueError(f"the model has no adapter {name!r}; it has: {', '.join(names) or 'none'}")
    model.requires_grad_(False)
    for module in adapted(model).values():
        module.active = name
        for key in ("lora_A", "lora_B", "lora_magnitude_vector", "modules_to_save"):
            if name in (held := getattr(module, key, {})):
                held[name].requires_grad_(True)


@contextlib.contextmanager
def use_adapter(model: nn.Module, name: str | None):
    """Inside the `with`, adapter `name` acts; with None the base alone, bit for bit, merged adapters or not."""
    modules = list(adapted(model).values())
    before = [module.active for module in modules]
    try:
        for module in modules:
            module.active = name
        yield model
    finally:
        for module, active in zip(modules, before):
            module.active = active


def disable_adapters(model: nn.Module):
    """`with disable_adapters(model):` the model is its base, bit for bit: a reference for DPO, GRPO and PPO."""
    return use_adapter(model, None)


def parameter_report(model: nn.Module) -> dict:
    """{trainable, total, share, trainable_bytes, bytes}: numbers of weights, a quantized layer's counted as if it were
    plain, with their share; and the bytes that parameters and buffers take, as they lie in memory."""
    tensors = [*model.parameters(), *model.buffers()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    quantized = [m for m in model.modules() if is_linear(m) and not isinstance(m, nn.Linear)]
    packed = {id(p) for m in quantized for p in m.parameters()}
    total = sum(p.numel() for p in model.parameters() if id(p) not in packed)
    total += sum(m.in_features * m.out_features + (0 if m.bias is None else m.out_features) for m in quantized)
    count = sum(p.numel() for p in trainable)
    return {"trainable": count, "total": total, "share": count / total,
            "trainable_bytes": sum(p.nbytes for p in trainable), "bytes": sum(t.nbytes for t in tensors)}


# --------------------------------------------------------------------------------------------------- merging, removing


@torch.no_grad()
def merge_lora(model: nn.Module, final: bool = False) -> nn.Module:
    """Add the adapter that acts to the weights, in place: no more cost per token. Returns the model.

    The weights as they were are kept, so that unmerge_lora and disable_adapters give them back bit for bit; this takes
    their memory once more. (To subtract the update again would be cheaper but inexact: W + D - D is not W in floating
    point.) final=True keeps nothing and leaves plain layers, under their names of before: what one saves as a model.

    A quantized layer is dequantized, then added to, and becomes an nn.Linear in full precision: rounding the sum to
    4 bits again would lose most of what was learned. The model grows accordingly (quantize it anew if you must).
    ValueError: merged already; an update that is not finite; a layer that rounds its input besides (BitNet, QAT).
    """
    layers = {path: m for path, m in adapted(model).items() if isinstance(m, LoRALinear)}
    for path, layer in layers.items():
        if layer.merged not in (None, layer.active):
            raise ValueError(f"{path}: adapter {layer.merged!r} is merged already: unmerge_lora first")
        if isinstance(layer.base, nn.Linear) and type(layer.base) is not nn.Linear:
            raise ValueError(f"{path}: a {type(layer.base).__name__} does more than multiply: it cannot take one in")
    for key, tensor in adapter_tensors(model).items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key.removeprefix(PREFIX)} is not finite: the adapter is not merged")
    for path, layer in layers.items():
        if layer.active not in layer.lora_A or layer.merged:
            continue
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(layer.weight.detach(), requires_grad=False), layer.bias
        linear.train(layer.training)
        if final:
            _put(model, path, linear)
        else:
            layer.kept, layer.base_layer, layer.merged = (layer.base_layer,), linear, layer.active
    if final:
        for path, module in adapted(model).items():
            _put(model, path, module.now if isinstance(module, TrainedWhole) else module.base_layer)
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Take merged adapters out of the weights again, in place, bit for bit. Returns the model."""
    for layer in adapted(model).values():
        if isinstance(layer, LoRALinear) and layer.kept:
            layer.base_layer, layer.kept, layer.merged = layer.kept[0], (), None
    return model


def remove_lora(model: nn.Module) -> nn.Module:
    """Drop all adapters, in place: the base in its own names, bit for bit (but still frozen). Returns the model."""
    for path, module in adapted(unmerge_lora(model)).items():
        _put(model, path, module.base)
    return model


# --------------------------------------------------------------------------------------------------------- PEFT folders

PREFIX = "base_model.model."  # of every name in a PEFT file
READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save",
        "peft_type", "base_model_name_or_path"}
IMPLIED = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}  # by the names of the tensors
HARMLESS = {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "megatron_core",
            "qalora_group_size", "ensure_weight_tying", "eva_config"}
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave the base as it is


def adapter_tensors(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The weights of adapter `name` (None: of the one that acts) under their names in a PEFT file; not copies."""
    tensors = {}
    for path, module in adapted(model).items():
        if (n := name or module.active) not in module.config:
            continue
        if isinstance(module, TrainedWhole):
            parts = module.modules_to_save[n].state_dict()
        else:
            parts = {"lora_A.weight": module.lora_A[n], "lora_B.weight": module.lora_B[n]}
            parts |= {"lora_magnitude_vector": module.lora_magnitude_vector[n]} if module.config[n].use_dora else {}
        tensors |= {f"{PREFIX}{path}.{part}": tensor.detach() for part, tensor in parts.items()}
    if not tensors:
        raise ValueError(f"there is no adapter {name!r}" if name else "there is no adapter that acts: name one")
    return tensors


def save_adapter(model: nn.Module, folder, name: str | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as PeftModel.from_pretrained reads them.

    name: which adapter; None: the one that acts. base_model_name_or_path is its configuration's base_model.
    """
    tensors, modules = adapter_tensors(model, name), adapted(model)
    mine = {path: m for path, m in modules.items() if any(key.startswith(f"{PREFIX}{path}.") for key in tensors)}
    layers, whole = ([path for path, m in mine.items() if isinstance(m, kind)] for kind in (LoRALinear, TrainedWhole))
    config = next(m.config[name or m.active] for m in mine.values())
    ends = sorted({path.rpartition(".")[2] for path in layers})
    alike = [path for path, m in _bare(model).items() if is_linear(m) and path.rpartition(".")[2] in ends]
    write_peft(folder, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": config.base_model,
        "inference_mode": True, "r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        "target_modules": ends if len(alike) == len(layers) else sorted(layers), "bias": "none",
        "modules_to_save": sorted(whole) or None,
        "use_rslora": config.use_rslora, "use_dora": config.use_dora, "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern, "fan_in_fan_out": False, "init_lora_weights": True}, tensors)


@torch.no_grad()
def load_adapter(model: nn.Module, folder, name: str = "default") -> nn.Module:
    """Put the adapter of a PEFT folder on the model, in place, as apply_lora would: it acts, and it alone is trained.

    The tensors' names tell which layers it has. Nothing changes unless all fits. ValueError: no such folder, a
    feature that would change the result unseen, another rank than the configuration's, layers the model lacks.
    """
    theirs, tensors = read_peft(folder)
    where = Path(folder) / "adapter_config.json"
    if theirs.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {theirs.get('peft_type')!r}, not LORA (see adapters.py for others)")
    inert = {"bias": ("none",), "init_lora_weights": STARTS}
    for key, value in theirs.items():
        known = value in inert[key] if key in inert else not value or key in READ | IMPLIED | HARMLESS
        if not known:
            raise ValueError(f"{where}: {key} = {value!r} is not supported")
    try:
        config = LoRAConfig(theirs["r"], theirs["lora_alpha"], theirs.get("lora_dropout") or 0.0, [],
                            bool(theirs.get("use_rslora")), bool(theirs.get("use_dora")), [],
                            theirs.get("rank_pattern") or {}, theirs.get("alpha_pattern") or {},
                            theirs.get("base_model_name_or_path"))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not a LoRA configuration: {error!r}") from None
    where, modules, needed = Path(folder) / "adapter_model.safetensors", _bare(model), {}  # needed: name -> shape
    layers = sorted({key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors if ".lora_" in key})
    whole = sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in tensors if ".lora_" not in key})
    for path in layers:
        if not is_linear(layer := modules.get(path)):
            raise ValueError(f"{where}: an adapter of another model: this one has no linear layer {path}")
        r, _ = config.of(path)
        shapes = {"lora_A.weight": (r, layer.in_features), "lora_B.weight": (layer.out_features, r)}
        shapes |= {"lora_magnitude_vector": (layer.out_features,)} if config.use_dora else {}
        needed |= {f"{PREFIX}{path}.{part}": shape for part, shape in shapes.items()}
    for path in whole:
        state = modules[path].state_dict() if path in modules else {}
        needed |= {f"{PREFIX}{path}.{part}": tuple(tensor.shape) for part, tensor in state.items()}
    for key in sorted({*needed, *tensors}):
        shape = tuple(tensors[key].shape) if key in tensors else "missing"
        if shape != needed.get(key):
            raise ValueError(f"{where}: an adapter of another model or rank: {key} is {shape}, and should be "
                             f"{needed.get(key, 'absent')} for this model and configuration")
    _install(model, name, replace(config, modules_to_save=whole), layers, whole)
    for key, tensor in adapter_tensors(model, name).items():
        tensor.copy_(tensors[key])
    return model


def write_peft(folder, config: dict, tensors: dict[str, Tensor]) -> None:
    """Write the two files of a PEFT folder, each put in its place at once and whole (adapters.py's come here too)."""
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header, data = {"__metadata__": {"format": "pt"}}, bytearray()
    for key in sorted(tensors, key=lambda key: (-tensors[key].element_size(), key)):  # so each lies aligned
        raw = tensors[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[key] = {"dtype": kinds[tensors[key].dtype], "shape": list(tensors[key].shape),
                       "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in (("adapter_model.safetensors", struct.pack("<Q", len(text)) + text + data),
                          ("adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())):
        handle, temporary = tempfile.mkstemp(prefix=f".{file}-", dir=folder)
        try:
            with open(handle, "wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, folder / file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_peft(folder) -> tuple[dict, dict[str, Tensor]]:
    """adapter_config.json and the tensors of adapter_model.safetensors. ValueError for what is no such folder or file.

    Each tensor has its own bytes, and no byte is spare; the numbers are copied, for an adapter is small.
    """
    folder = Path(folder)
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config, file):
        if not path.is_file():
            pickled = (folder / "adapter_model.bin").exists()
            raise ValueError(f"{folder}: not a PEFT adapter: no {path.name}"
                             + " (adapter_model.bin is pickle, which is not read)" * pickled)
    try:
        settings = json.loads(config.read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("not an object {...}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config}: not valid JSON: {error}") from None
    raw, tensors, end = file.read_bytes(), {}, 0
    try:
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (begin, stop), shape, dtype = entry["data_offsets"], entry["shape"], DTYPES[entry["dtype"]]
            if begin != end or any(type(n) is not int or n < 0 for n in (begin, stop, *shape)) \
                    or stop - begin != math.prod(shape) * dtype.itemsize or start + stop > len(raw):
                raise ValueError(f"{key} does not lie where it should")
            numbers = torch.frombuffer(bytearray(raw[start + begin:start + stop]) or bytearray(8), dtype=torch.uint8)
            tensors[key], end = numbers[:stop - begin].view(dtype).view(shape), stop
        if start + end != len(raw):
            raise ValueError(f"its tensors end at byte {start + end}, the file at {len(raw)}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: not a valid safetensors file of floats: {error}") from None
    return settings, tensors


if __name__ == "__main__":
    with torch.device("meta"):  # Llama 2 7B's linear layers: shapes, no memory
        sizes = dict(q_proj=(4096, 4096), k_proj=(4096, 4096), v_proj=(4096, 4096), o_proj=(4096, 4096),
                     gate_proj=(4096, 11008), up_proj=(4096, 11008), down_proj=(11008, 4096))
        layers = [nn.ModuleDict({n: nn.Linear(*shape, bias=False) for n, shape in sizes.items()}) for _ in range(32)]
        model = nn.ModuleDict({"layers": nn.ModuleList(layers), "embed_tokens": nn.Embedding(32000, 4096),
                               "lm_head": nn.Linear(4096, 32000, bias=False)})
    for targets in (["q_proj", "v_proj"], "all-linear"):
        for r in (8, 64):
            told = parameter_report(apply_lora(model, LoRAConfig(r=r, target_modules=targets)))
            print(f"{str(targets):22} r = {r:2}: {told['trainable']:11,} of {told['total']:,} weights trained, "
                  f"{told['share']:.2%}; AdamW and gradients take {3 * told['trainable_bytes'] / 2**20:,.0f} MiB")
            remove_lora(model)
