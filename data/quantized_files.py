"""Quantized weights in files: the layouts of bitsandbytes, GPTQ and AWQ folders, which transformers and vLLM load.

    bitsandbytes  weight uint8 (N K / 2, 1), weight.absmax, weight.quant_map, weight.nested_absmax,
                  weight.nested_quant_map, weight.quant_state.bitsandbytes__nf4 (JSON, as bytes)
                  eight bits: weight int8 (N, K), SCB float32 (N,) = max|w| of the row
    GPTQ          qweight int32 (K bits / 32, N), qzeros int32 (G, N bits / 32), scales float16 (G, N), g_idx int32 (K,)
                  codes lie along K, the first in the lowest bits; version 1 ("gptq") stores zero - 1, "gptq_v2" zero
    AWQ           qweight int32 (K, N / 8), qzeros (G, N / 8), scales float16 (G, N); eight columns to a word, from the
                  lowest nibble up: 0 2 4 6 1 3 5 7 ("gemm")
    fbgemm_fp8    weight float8_e4m3fn (N, K), weight_scale float32 (N, 1)

Beside them stands config.json's `quantization_config`, which says which layout it is. What fits none of them (a K that
is no multiple of 32, say) is stored as it lies in memory, under the method "glassbox", which only this project reads.

    tensors, config = encode(model)                               # of quant.py's layers
    rest = install(model, config, tensors, quant.quantize_model)  # puts such layers into a model, from a file's tensors

Sources: bitsandbytes functional.QuantState.as_dict; AutoGPTQ qlinear pack(); llm-awq WQLinear_GEMM.
"""

import json

import torch
from torch import Tensor, nn

KINDS = ("NF4Linear", "Int8Linear", "Int4Linear")  # quant.py's, known by name, so that this file stands alone
FORMATS = ("bitsandbytes", "gptq", "gptq_v2", "awq", "fbgemm_fp8", "glassbox")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


# ---------------------------------------------------------------------------------------------------------------- words


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes (n, m) in 0..2^bits - 1 -> int32 (n bits / 32, m): a stream of bits down each column, the lowest first.

    n bits must be a multiple of 32. Three bits: 32 codes fill three words, and two of them lie across a border."""
    n, m = codes.shape
    stream = codes.to(torch.int64)[:, None] >> torch.arange(bits)[:, None] & 1  # (n, bits, m)
    words = (stream.reshape(-1, 32, m) << torch.arange(32)[:, None]).sum(1)
    return words.to(torch.int32)  # keeps the low 32 bits: bit 31 becomes the sign


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Undo pack_words: uint8 (n, m)."""
    stream = words.to(torch.int64)[:, None] >> torch.arange(32)[:, None] & 1  # (words, 32, m)
    return (stream.reshape(-1, bits, words.shape[1]) << torch.arange(bits)[:, None]).sum(1).to(torch.uint8)


def pack_awq(codes: Tensor) -> Tensor:
    """Codes 0..15 (n, N) -> int32 (n, N / 8): nibble i of a word is column AWQ_ORDER[i] of its eight."""
    nibbles = codes.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].to(torch.int64)
    return (nibbles << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)


def unpack_awq(words: Tensor) -> Tensor:
    """Undo pack_awq: uint8 (n, N)."""
    nibbles = words[..., None] >> torch.arange(0, 32, 4) & 15  # (n, words, 8)
    return nibbles[..., torch.tensor(AWQ_ORDER).argsort()].flatten(1).to(torch.uint8)


# --------------------------------------------------------------------------------------------------------------- layers


def gptq_tensors(codes: Tensor, scale: Tensor, zero: Tensor, g_idx: Tensor, bits: int, version: int = 1) -> dict:
    """codes (N, K), scale and zero (N, G), g_idx (K,) -> the four tensors of a layer in a GPTQ file.

    Version 1 has no way to say zero = 0 (readers add 1 after masking): ValueError, version 2 has."""
    if version == 1 and (zero < 1).any():
        raise ValueError("a zero point is 0, which version 1 of GPTQ's format cannot store: take gptq_v2")
    zeros = zero.t().to(torch.int32) - (1 if version == 1 else 0)  # (G, N)
    return {"qweight": pack_words(codes.t(), bits), "qzeros": pack_words(zeros.t(), bits).t().contiguous(),
            "scales": scale.t().to(torch.float16).contiguous(), "g_idx": g_idx.to(torch.int32)}


def read_gptq(tensors: dict, bits: int, version: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> codes (N, K) uint8, scale (N, G), zero (N, G) int32, g_idx (K,)."""
    zero = unpack_words(tensors["qzeros"].t(), bits).int() + (1 if version == 1 else 0)  # (N, G)
    return unpack_words(tensors["qweight"], bits).t(), tensors["scales"].t(), zero, tensors["g_idx"].long()


def awq_tensors(codes: Tensor, scale: Tensor, zero: Tensor) -> dict:
    """codes (N, K), scale and zero (N, G) -> the three tensors of a layer in an AWQ file."""
    scales = scale.t().to(torch.float16).contiguous()
    return {"qweight": pack_awq(codes.t()), "qzeros": pack_awq(zero.t()), "scales": scales}


def read_awq(tensors: dict) -> tuple[Tensor, Tensor, Tensor]:
    """-> codes (N, K) uint8, scale (N, G), zero (N, G)."""
    return unpack_awq(tensors["qweight"]).t(), tensors["scales"].t(), unpack_awq(tensors["qzeros"]).t()


def bnb_tensors(layer: nn.Module) -> dict:
    """An NF4Linear's tensors as bitsandbytes' Linear4bit saves them."""
    kind = "fp4" if layer.levels[0] == 0 else "nf4"
    state = {"quant_type": kind, "blocksize": layer.block_size, "dtype": str(layer.dtype).removeprefix("torch."),
             "shape": [layer.out_features, layer.in_features]}
    tensors = {"weight": layer.packed[:, None], "weight.absmax": layer.absmax, "weight.quant_map": layer.levels}
    if layer.nested_map is not None:
        tensors |= {"weight.nested_absmax": layer.nested_absmax, "weight.nested_quant_map": layer.nested_map}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": layer.nested_offset.item()}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors | {f"weight.quant_state.bitsandbytes__{kind}": text}


def read_bnb_state(tensors: dict) -> dict:
    """The JSON of a 4-bit layer's quant_state: quant_type, blocksize, shape, nested_offset ..."""
    name = next((name for name in tensors if name.startswith("weight.quant_state.bitsandbytes__")), None)
    if name is None:
        raise ValueError("a 4-bit weight of bitsandbytes without its quant_state")
    return json.loads(bytes(tensors[name].tolist()))


# --------------------------------------------------------------------------------------------------------- whole models


def best_format(layers: dict[str, nn.Module]) -> str:
    """The layout for these layers that most programs read."""
    one = next(iter(layers.values()))
    if type(one).__name__ == "NF4Linear":
        return "bitsandbytes"
    if type(one).__name__ == "Int8Linear":
        return "bitsandbytes" if one.codes.dtype == torch.int8 else "fbgemm_fp8"
    if any(layer.in_features % 32 or layer.out_features % 32 or layer.in_features % layer.group_size
           for layer in layers.values()):
        return "glassbox"
    return "gptq" if all((layer.zero >= 1).all() for layer in layers.values()) else "gptq_v2"


def encode(model: nn.Module, format: str = "auto") -> tuple[dict[str, Tensor], dict | None]:
    """The tensors of a model's quantized layers (their biases are parameters, and not among them), and the dict that
    config.json names `quantization_config`; {} and None if nothing is quantized.

    format: one of FORMATS; "auto": see best_format. ValueError: layers of two kinds or with two settings, a format that
    cannot hold them."""
    layers = {name: module for name, module in model.named_modules() if type(module).__name__ in KINDS}
    if not layers:
        return {}, None
    whole_rows = all(layer.scale.shape[1] == 1 for layer in layers.values() if hasattr(layer, "order"))
    ways = {(method_of(layer), *settings_of(layer, whole_rows).items()) for layer in layers.values()}
    if len(ways) > 1:
        raise ValueError(f"layers quantized in {len(ways)} different ways cannot be saved in one folder")
    format = best_format(layers) if format == "auto" else format
    one, tensors = next(iter(layers.values())), {}
    method, settings = method_of(one), settings_of(one, whole_rows)
    allowed = {"nf4": ("bitsandbytes",), "int4": ("gptq", "gptq_v2", "awq"), "int8": ("bitsandbytes",),
               "fp8": ("fbgemm_fp8",)}[method]
    if format not in (*allowed, "glassbox"):
        raise ValueError(f"the format of {method} layers must be {', '.join(allowed)} or glassbox, not {format!r}")
    skip = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, layer in layers.items():
        try:
            parts = _layer_tensors(layer, format)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    if format == "glassbox":
        return tensors, {"quant_method": "glassbox", "method": method, "layers": list(layers), "settings": settings}
    if format == "fbgemm_fp8":
        return tensors, {"quant_method": format, "activation_scale_ub": 1200.0, "modules_to_not_convert": skip,
                         "activations": one.activations}
    if format == "bitsandbytes" and method == "nf4":
        return tensors, {"quant_method": format, "load_in_4bit": True, "load_in_8bit": False,
                         "llm_int8_skip_modules": skip, "bnb_4bit_quant_type": settings["levels"],
                         "bnb_4bit_use_double_quant": one.nested_map is not None, "bnb_4bit_quant_storage": "uint8",
                         "bnb_4bit_compute_dtype": str(one.dtype).removeprefix("torch.")}
    if format == "bitsandbytes":  # `activations` is ours: bitsandbytes always rounds them
        return tensors, {"quant_method": format, "load_in_4bit": False, "load_in_8bit": True,
                         "llm_int8_skip_modules": skip, "llm_int8_threshold": one.outliers or 0.0,
                         "activations": one.activations}
    config = {"quant_method": format.removesuffix("_v2"), "bits": one.bits, "group_size": settings["group_size"] or -1}
    if format == "awq":
        return tensors, config | {"zero_point": True, "version": "gemm", "modules_to_not_convert": skip}
    return tensors, config | {"desc_act": one.order is not None, "sym": bool((one.zero == 2 ** (one.bits - 1)).all()),
                              "checkpoint_format": format, "lm_head": False, "true_sequential": False}


def method_of(layer: nn.Module) -> str:
    """quantize_model's method for such layers, but for its settings."""
    if type(layer).__name__ == "Int8Linear":
        return "int8" if layer.codes.dtype == torch.int8 else "fp8"
    return "nf4" if type(layer).__name__ == "NF4Linear" else "int4"


def settings_of(layer: nn.Module, whole_rows: bool) -> dict:
    """And the settings. whole_rows: each group is a row, whatever its length."""
    if type(layer).__name__ == "NF4Linear":
        return {"block_size": layer.block_size, "double_quant": layer.nested_map is not None,
                "levels": "fp4" if layer.levels[0] == 0 else "nf4"}
    if type(layer).__name__ == "Int8Linear":
        return {"activations": layer.activations, "outliers": layer.outliers}
    size = None if whole_rows else layer.group_size
    return {"bits": layer.bits, "group_size": size, "act_order": layer.order is not None}


def _layer_tensors(layer: nn.Module, format: str) -> dict[str, Tensor]:
    if format == "glassbox":
        return dict(layer.named_buffers())
    if format == "bitsandbytes" and type(layer).__name__ == "NF4Linear":
        return bnb_tensors(layer)
    if format == "bitsandbytes":
        return {"weight": layer.codes, "SCB": layer.scale * 127, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    if format == "fbgemm_fp8":
        return {"weight": layer.codes, "weight_scale": layer.scale[:, None]}
    (codes, g_idx), N, K = layer.codes(), layer.out_features, layer.in_features
    if K % 32 or N % 32 or K % layer.group_size:
        raise ValueError(f"{N} x {K} in groups of {layer.group_size} does not fit a {format} file: both must be "
                         "multiples of 32, and K of the group (the format glassbox takes it)")
    if format == "awq":
        if layer.bits != 4 or layer.order is not None:
            raise ValueError("an AWQ file holds 4 bits, without act_order")
        return awq_tensors(codes, layer.scale, layer.zero)
    return gptq_tensors(codes, layer.scale, layer.zero, g_idx, layer.bits, 2 if format == "gptq_v2" else 1)


def install(model: nn.Module, config: dict, tensors: dict[str, Tensor], quantize_model) -> dict[str, Tensor]:
    """Put quantized layers into a model (on the meta device, or any) from a file's tensors; return the other tensors.

    config: `quantization_config` of config.json; quantize_model: that of quant.py. ValueError: a method that is none of
    these, or tensors that do not make up its layers."""
    method, mark = config.get("quant_method"), None
    if method == "bitsandbytes":
        mark = ".weight.absmax" if config.get("load_in_4bit") else ".SCB"
    elif method in ("gptq", "awq", "fbgemm_fp8"):
        mark = ".weight_scale" if method == "fbgemm_fp8" else ".qweight"
    elif method != "glassbox":
        raise ValueError(f"quant_method {method!r} is not supported; supported: {', '.join(FORMATS)}")
    names = config["layers"] if mark is None else [n.removesuffix(mark) for n in tensors if n.endswith(mark)]
    parts = {name: {} for name in names}  # layer -> {what stands after its name: tensor}
    for key, tensor in tensors.items():
        name = next((key[:i] for i, letter in enumerate(key) if letter == "." and key[:i] in parts), None)
        if name is not None and not key.endswith(".bias"):
            parts[name][key[len(name) + 1:]] = tensor
    if not parts or not all(parts.values()):
        raise ValueError(f"quant_method is {method!r}, but there are no weights of that kind")
    taken = {f"{name}.{part}" for name, found in parts.items() for part in found}
    try:
        kind, settings = _plan(config, method, parts)
        quantize_model(model, kind, layers=names, **settings)
        for name, found in parts.items():
            _fill(model.get_submodule(name), found, config)
    except KeyError as error:
        raise ValueError(f"a {method} layer lacks {error.args[0]}") from None
    return {key: tensor for key, tensor in tensors.items() if key not in taken}


def _plan(config: dict, method: str, parts: dict) -> tuple[str, dict]:
    """quantize_model's method and settings."""
    first = next(iter(parts.values()))
    if method == "glassbox":
        return config["method"], config["settings"]
    if method == "fbgemm_fp8":
        return "fp8", {"activations": config.get("activations", "rounded")}
    if method == "bitsandbytes" and config.get("load_in_4bit"):
        state = read_bnb_state(first)
        if state.get("nested_blocksize", 256) != 256 or state["quant_type"] not in ("nf4", "fp4"):
            raise ValueError(f"a bitsandbytes weight with quant_state {state} cannot be read")
        return state["quant_type"], {"block_size": state["blocksize"], "double_quant": "weight.nested_absmax" in first}
    if method == "bitsandbytes":
        threshold = config.get("llm_int8_threshold", 6.0) or None
        rounded = config.get("activations", "rounded") == "rounded"
        return ("llm.int8", {"outliers": threshold}) if rounded else ("int8", {})
    bits, size = config["bits"], config["group_size"]
    if bits not in (2, 3, 4) or method == "awq" and (bits != 4 or config.get("version", "gemm") != "gemm"):
        raise ValueError(f"{method} of {bits} bits, version {config.get('version')!r}, is not supported: GPTQ files "
                         "may have 2, 3 and 4 bits, AWQ files 4 and version 'gemm'")
    settings = {"bits": bits, "group_size": size if size > 0 else None}
    if method == "gptq":
        every = [found["g_idx"] for found in parts.values()]
        plain = [torch.arange(len(g)) // (size if size > 0 else len(g)) for g in every]
        settings["act_order"] = not all(torch.equal(g.long(), p) for g, p in zip(every, plain))
    return "int4", settings


def _fill(layer: nn.Module, found: dict, config: dict) -> None:
    """Give a layer what a file holds of it."""
    buffers = {}
    if config["quant_method"] == "glassbox":
        buffers = found
    elif config["quant_method"] == "gptq":
        version = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
        codes, scale, zero, g_idx = read_gptq(found, config["bits"], version)
        layer.set_codes(codes, scale, zero, None if layer.order is None else g_idx)
    elif config["quant_method"] == "awq":
        layer.set_codes(*read_awq(found))
    elif config["quant_method"] == "fbgemm_fp8":
        buffers = {"codes": found["weight"], "scale": found["weight_scale"].flatten()}
    elif config.get("load_in_4bit"):
        state = read_bnb_state(found)
        buffers = {"packed": found["weight"].flatten(), "absmax": found["weight.absmax"],
                   "levels": found["weight.quant_map"]}
        if "nested_offset" in state:
            buffers |= {"nested_absmax": found["weight.nested_absmax"], "nested_map": found["weight.nested_quant_map"],
                        "nested_offset": torch.tensor(state["nested_offset"])}
    else:
        buffers = {"codes": found["weight"], "scale": found["SCB"] / 127}
    for name, tensor in buffers.items():
        ours = getattr(layer, name)
        if ours is None or ours.shape != tensor.shape or ours.dtype != tensor.dtype:
            needed = None if ours is None else f"{ours.dtype} {tuple(ours.shape)}"
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, but must be {needed}")
        setattr(layer, name, tensor)
