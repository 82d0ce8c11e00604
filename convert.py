"""Models in and out: Hugging Face folders, GGUF (llama.cpp, Ollama) and llama2.c, each with its tokenizer.

    python convert.py --model some/hf_folder    --out model.gguf --format gguf --quantize q8_0
    python convert.py --model model.gguf        --out folder     --format hf
    python convert.py --model stories260K.bin   --out folder     --format hf       (reads tok512.bin beside it)
    python convert.py --model out/pretrain      --out model.bin  --format llama2c  (writes tokenizer.bin beside it)

In all three a model is the same matrices under other names. What differs is the order of the rows of q and k. RoPE
turns pairs of numbers; Hugging Face pairs x[i] with x[i + D/2], Meta, llama2.c and llama.cpp's `llama` x[2i] with
x[2i + 1]. Attention only sees q . k, which no common reordering changes, so it is enough to permute the rows of both:

    half-split   0 1 2 3 | 4 5 6 7     <->     interleaved   0 4 1 5 2 6 3 7          (one head, D = 8)

llama.cpp's `qwen2`, `qwen3` and `qwen3moe` pair as Hugging Face does. A sentencepiece model, llama2.c's tokenizer.bin
and GGUF's `llama` tokenizer are one list too (see data/pieces.py). Shards, our own or PyTorch's, are merged.
"""

import dataclasses
import json
import math
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from checkpoint import atomic_file, find_checkpoint, open_model, save_model, sync_folder, write_json
from cli import parse, run
from data.gguf_file import (FILE_TYPES, GGUF_KEYS, GGUF_SCALING, MAGIC, dequantize, fitting_kind, gguf_name, hf_name,
                            read_gguf, write_gguf)
from data.pieces import (CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Pieces, json_of_pieces, llama2c_of_pieces,
                         model_of_pieces, pieces_of_json, pieces_of_llama2c, pieces_of_model)
from data.tokenizer import (CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, QWEN2_PATTERN, SMOLLM_PATTERN,
                            SentencePieceTokenizer, Tokenizer, load_tokenizer)
from hf_config import extend_context
from model import CausalLM, ModelConfig, checked_scaling, inverse_frequency, rope_tables
from shards import is_sharded, load_sharded


@dataclass
class Args:
    model: str  # what to convert: a run, a checkpoint, a Hugging Face folder, a .gguf or a llama2.c .bin file
    out: str  # where to: a new folder for hf, a new file for gguf and llama2c
    format: Literal["hf", "gguf", "llama2c"]  # of the output
    quantize: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k"] | None = None  # gguf: its matrices; None: as now
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # hf: of its weights; None = as they are
    tokenizer: str | None = None  # file or folder; None = the model's own
    llama2c_version: Literal[0, 1] = 0  # llama2.c's run.c reads 0


# ------------------------------------------------------------------------------------------------------ the whole thing


def load_pretrained(path, *, dtype: torch.dtype | None = None, device="cpu", attention: str = "sdpa",
                    mapped: bool = False, seq_len: int = 1, rope_scaling: str = "") -> CausalLM:
    """The model of a Hugging Face folder (or run), a GGUF file or a llama2.c .bin (version 0 or 1); in eval mode.

    dtype: to convert to; None keeps the file's, float32 where that is quantized. The others: see load_model.
    ValueError: what is none of these, or not whole; a GGUF of another architecture than those in ARCHITECTURES."""
    path = Path(path)
    if path.is_dir():
        how = dict(dtype=dtype, device=device, attention=attention)
        return load_sharded(path, **how) if is_sharded(path) else open_model(
            path, **how, mapped=mapped, seq_len=seq_len, rope_scaling=rope_scaling)
    config, names, tensor_of = (_open_gguf if _kind_of(path) == "gguf" else _open_llama2c)(path)
    try:
        config = dataclasses.replace(ModelConfig.from_hf(config), attention=attention)
        config = extend_context(config, seq_len, rope_scaling)
        with torch.device("meta"):  # shapes only
            model = CausalLM(config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path}: no model can be built from its header: {error}") from None
    weights, parameters = {}, dict(model.named_parameters())
    for what, odd in (("missing", parameters.keys() - names), ("unknown", names - parameters.keys())):
        if odd:
            raise ValueError(f"{path}: {what} tensors: {', '.join(sorted(odd)[:4])}" + ", ..." * (len(odd) > 4))
    for name, parameter in parameters.items():
        weight = tensor_of(name)
        if weight.shape != parameter.shape:
            raise ValueError(f"{path}: {name} is {list(weight.shape)}, but {list(parameter.shape)} by its header")
        weights[name] = weight.to(device, dtype or weight.dtype)
    model.load_state_dict(weights, strict=False, assign=True)  # not strict about a tied head only
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def load_pretrained_tokenizer(path) -> Tokenizer | None:
    """The tokenizer that comes with what load_pretrained reads; None where there is none."""
    path = Path(path)
    if path.is_dir():
        try:
            tokenizer, pieces = load_tokenizer(folder := find_checkpoint(path)), folder / "tokenizer.model"
            if pieces.is_file() and (same := load_tokenizer(pieces)).vocab_size == tokenizer.vocab_size:
                same.chat_template = tokenizer.chat_template
                return same  # tokenizer.json tells the same pieces, but not their scores
            return tokenizer
        except FileNotFoundError:
            return None
    if _kind_of(path) == "gguf":
        return _tokenizer_from_gguf(path, read_gguf(path)[0])
    config, _, _ = _open_llama2c(path)
    for name in ("tokenizer.bin", f"tok{config['vocab_size']}.bin"):
        if (file := path.with_name(name)).is_file():
            try:
                return SentencePieceTokenizer(model_of_pieces(pieces_of_llama2c(file.read_bytes())))
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"{file}: not a llama2.c tokenizer: {error}") from None
    return None


def save_pretrained(model: CausalLM, directory, tokenizer: Tokenizer | None = None) -> None:
    """Write a Hugging Face folder, which appears whole or not at all. ValueError if `directory` is not empty."""
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty: choose another folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".tmp-{directory.name}-{os.getpid()}")
    try:
        temporary.mkdir()
        save_model(temporary, model, tokenizer)
        if (temporary / "tokenizer.model").exists() and not (temporary / "tokenizer.json").exists():
            _write_json_of_sentencepiece(temporary, tokenizer)
        if directory.exists():
            directory.rmdir()
        os.replace(temporary, directory)
        sync_folder(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_json_of_sentencepiece(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json beside a tokenizer.model, and tokenizer_config.json: what transformers reads."""
    pieces = pieces_of_model((folder / "tokenizer.model").read_bytes())
    ends = {f"{end}_token": pieces.tokens[i] for end, i in pieces.ids.items()}
    template = {} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template}
    write_json(folder / "tokenizer.json", json_of_pieces(pieces))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast",
                                                  "clean_up_tokenization_spaces": False} | ends | template)


def _kind_of(path: Path) -> str:
    """gguf or llama2c; ValueError for the pickles that bear llama2.c's suffix."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    with open(path, "rb") as file:
        start = file.read(4)
    if start == MAGIC:
        return "gguf"
    if start[:2] == b"PK" or start[:1] == b"\x80" or path.suffix in (".pt", ".pth"):
        raise ValueError(f"{path}: is pickle, which can run code and is not read; open it once with transformers and "
                         "write it by save_pretrained(folder, safe_serialization=True)")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: give the folder that holds it and its config.json")
    return "llama2c"


# -------------------------------------------------------------------------------------------------- the rows of q and k


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k (heads * D, ...) from half-split to interleaved order, head by head."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def half_split(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def reordered(name: str, weight: Tensor, config: dict, order: Callable) -> Tensor:
    """`order` applied to q and k (weight or bias), all others as they are. name, config: Hugging Face's."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    return next((order(weight, n) for part, n in heads.items() if f"self_attn.{part}." in name), weight)


# ------------------------------------------------------------------------------------------------------------- llama2.c
# Seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len), then float32: version 0 with the
# tables of RoPE among them and vocab_size < 0 for an untied head; version 1 behind a magic number, in 256 bytes.

LLAMA2C_MAGIC = 0x616B3432
_LAYERS = "model.layers.{}."
_ATTENTION = [_LAYERS + f"self_attn.{part}_proj.weight" for part in "qkvo"]
_NORMS = [_LAYERS + "input_layernorm.weight", _LAYERS + "post_attention_layernorm.weight"]
_MLP = [_LAYERS + f"mlp.{part}_proj.weight" for part in ("gate", "down", "up")]  # w1, w2, w3
LLAMA2C_ORDER = {0: ["model.embed_tokens.weight", _NORMS[0], *_ATTENTION, _NORMS[1], *_MLP, "model.norm.weight", "rope",
                     "lm_head.weight"],
                 1: [*_NORMS, "model.norm.weight", "model.embed_tokens.weight", *_ATTENTION, *_MLP, "lm_head.weight"]}


def _llama2c_layout(config: dict, version: int) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of what stands in a file, in order; a name with {} stands once per layer."""
    c = config
    D = c["hidden_size"] // c["num_attention_heads"]
    sizes = {"q_proj": (c["hidden_size"], c["hidden_size"]), "o_proj": (c["hidden_size"], c["hidden_size"]),
             "k_proj": (c["num_key_value_heads"] * D, c["hidden_size"]), "norm": (c["hidden_size"],),
             "v_proj": (c["num_key_value_heads"] * D, c["hidden_size"]), "embed": (c["vocab_size"], c["hidden_size"]),
             "gate": (c["intermediate_size"], c["hidden_size"]), "up_": (c["intermediate_size"], c["hidden_size"]),
             "down": (c["hidden_size"], c["intermediate_size"]), "lm_head": (c["vocab_size"], c["hidden_size"]),
             "rope": (2, c["max_position_embeddings"], D // 2)}
    found = []
    for name in LLAMA2C_ORDER[version]:
        shape = next(shape for part, shape in sizes.items() if part in name)
        if name != "lm_head.weight" or not c["tie_word_embeddings"]:
            found += [(name.format(layer), shape) for layer in range(c["num_hidden_layers"] if "{}" in name else 1)]
    return found


def _open_llama2c(path: Path) -> tuple[dict, set[str], Callable[[str], Tensor]]:
    """(config, names of the tensors, the function that reads one), with Hugging Face's names and order of rows."""
    with open(path, "rb") as file:
        header = file.read(256)
    version, start = 0, 28
    if len(header) >= 28 and struct.unpack_from("<I", header)[0] == LLAMA2C_MAGIC:
        version, start, header = struct.unpack_from("<i", header, 4)[0], 256, header[8:] + bytes(256 - len(header))
        if version != 1:
            raise ValueError(f"{path}: llama2.c version {version} is not supported (0 and 1 are, which hold float32)")
    if len(header) < 28:
        raise ValueError(f"{path}: not a llama2.c model: {len(header)} bytes")
    dim, hidden, layers, heads, kv_heads, vocab, seq = sizes = struct.unpack_from("<7i", header)
    tied = header[28] == 1 if version else vocab > 0
    sound = all(0 < n < 1 << 24 for n in (dim, hidden, layers, heads, kv_heads, abs(vocab), seq)) and layers < 1 << 12
    if not sound or dim % heads or heads % kv_heads:
        raise ValueError(f"{path}: not a llama2.c model (nor GGUF): its first numbers are {sizes}")
    config = {"model_type": "llama", "vocab_size": abs(vocab), "hidden_size": dim, "intermediate_size": hidden,
              "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
              "max_position_embeddings": seq, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": tied,
              "bos_token_id": 1, "eos_token_id": [1, 2]}  # run.c stops at <s>, which stands between texts in training
    offsets, end = {}, start
    for name, shape in _llama2c_layout(config, version):
        offsets[name] = end, shape
        end += 4 * math.prod(shape)
    if end != (size := path.stat().st_size):
        raise ValueError(f"{path}: a llama2.c model (version {version}) of the sizes {sizes} has {end:,} bytes, "
                         f"the file {size:,}" + ("; truncated?" if size < end else ""))

    def tensor_of(name: str) -> Tensor:
        offset, shape = offsets[name]
        numbers = np.fromfile(path, "<f4", math.prod(shape), offset=offset)
        return reordered(name, torch.from_numpy(numbers).view(shape), config, half_split)

    return config, offsets.keys() - {"rope"}, tensor_of


def write_llama2c(path, model: CausalLM, version: int = 0) -> None:
    """Write a llama2.c .bin, float32. ValueError: a model that is more than llama2.c's code computes."""
    c = model.config.to_hf()
    D = c["hidden_size"] // c["num_attention_heads"]
    must_be = {"model_type": "llama", "attention_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
               "rope_scaling": None, "head_dim": D}
    for name, value in must_be.items():
        if c.get(name) != value:
            raise ValueError(f"llama2.c knows only {name} = {value!r}, but the model has {c.get(name)!r}")
    tied, parameters = c["tie_word_embeddings"], dict(model.named_parameters())
    sizes = [c[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                  "num_key_value_heads", "vocab_size", "max_position_embeddings")]
    if version:
        header = (struct.pack("<Ii7iB", LLAMA2C_MAGIC, version, *sizes, tied)).ljust(256, b"\0")
    else:
        sizes[5] *= 1 if tied else -1
        header = struct.pack("<7i", *sizes)
    with atomic_file(Path(path)) as file:
        file.write(header)
        for name, _ in _llama2c_layout(c, version):
            if name == "rope":
                tables = rope_tables(torch.arange(sizes[6]), D, 10000.0, torch.float32)
                file.write(torch.stack(tables).numpy().astype("<f4").tobytes())
            else:
                weight = reordered(name, parameters[name].detach().cpu().float(), c, interleaved)
                file.write(weight.contiguous().numpy().astype("<f4").tobytes())


# --------------------------------------------------------------------------------------------------------- GGUF: models

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
                 "qwen3_moe": "qwen3moe"}  # model_type -> llama.cpp's
LLAMA3_SCALING = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 8192}  # of Llama 3.1 to 3.3, with factors of 8 and 32
KIND_OF_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F32"}


def write_model_gguf(path, model: CausalLM, tokenizer: Tokenizer | None = None, kind: str | None = None) -> None:
    """Write a GGUF file. kind: a name in FILE_TYPES for the matrices, None for what is nearest to the model's dtype.

    Norms, biases and routers are F32. A row that cannot be cut into blocks falls back (see fitting_kind), and the head,
    or the table that serves as such, is Q8_0 at least: each of its errors goes straight into the logits.
    ValueError: a tokenizer, a RoPE scaling or a router for which llama.cpp has no counterpart."""
    config = model.config.to_hf()
    arch = ARCHITECTURES.get(config["model_type"])
    if arch is None:
        raise ValueError(f"model_type {config['model_type']!r} is not supported in GGUF; supported: "
                         f"{', '.join(ARCHITECTURES)}")
    c = model.config
    if c.num_experts and not (c.norm_topk_prob and all(map(c.is_sparse, range(c.num_hidden_layers)))):
        raise ValueError(f"llama.cpp's {arch!r} has experts in every layer, whose weights add up to 1; the model has "
                         f"norm_topk_prob={c.norm_topk_prob}, decoder_sparse_step={c.decoder_sparse_step}, "
                         f"mlp_only_layers={c.mlp_only_layers}")
    if c.num_experts:
        config["num_experts"] = c.num_experts  # for Mixtral too
    kind = kind or KIND_OF_DTYPE[model.lm_head.weight.dtype]
    metadata = {"general.architecture": arch, "general.type": "model", "general.name": Path(path).stem,
                "general.file_type": FILE_TYPES[kind], "general.quantization_version": 2}
    for key, name in GGUF_KEYS.items():
        if (value := config.get(name)) is not None:
            metadata[f"{arch}.{key}"] = value
    metadata |= _scaling_to_gguf(arch, c.rope_scaling)
    if config.get("sliding_window"):
        print(f"note: llama.cpp has no sliding window in {arch!r}: beyond {config['sliding_window']} tokens results "
              "will differ", file=sys.stderr)
    if tokenizer is not None:
        metadata |= _tokenizer_to_gguf(tokenizer, config)

    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    tensors = {}
    for name, p in model.named_parameters():
        def numbers(name=name, p=p):
            weight = p.detach().float()
            return (reordered(name, weight, config, interleaved) if arch == "llama" else weight).cpu().numpy()
        its_kind = "Q8_0" if name == head and kind.startswith("Q4") else kind
        its_kind = "F32" if name.endswith("mlp.gate.weight") else its_kind
        tensors[gguf_name(name)] = fitting_kind(its_kind, tuple(p.shape)), tuple(p.shape), numbers
    if c.rope_scaling and c.rope_scaling["rope_type"] == "llama3":
        divisors = _rope_freqs(c.head_dim, c.rope_theta, c.rope_scaling)
        tensors["rope_freqs.weight"] = "F32", divisors.shape, lambda: divisors
    write_gguf(path, metadata, tensors)


def _rope_freqs(head_dim: int, theta: float, scaling: dict) -> np.ndarray:
    """By what llama3 scaling divides the frequency of each pair (head_dim / 2,), as llama.cpp wants it."""
    plain, scaled = (inverse_frequency(head_dim, theta, s, None, torch.float64, "cpu")[0] for s in (None, scaling))
    return (plain / scaled).float().numpy()


def _scaling_to_gguf(arch: str, scaling: dict | None) -> dict:
    """The metadata for rope_scaling. llama.cpp's yarn always has `truncate`, and multiplies attn_factor by
    0.1 ln(factor) + 1 itself. llama3 travels as a tensor (see _rope_freqs), its numbers in a key of our own."""
    if scaling is None:
        return {}
    kind, factor = scaling["rope_type"], scaling["factor"]
    if kind == "dynamic" or not scaling.get("truncate", True) or kind == "llama3" and arch != "llama":
        raise ValueError(f"rope_scaling {scaling} has no counterpart in llama.cpp's {arch!r}")
    if kind == "llama3":
        return {"glassbox.rope_scaling": json.dumps(scaling)}
    known = {"rope_type", "factor"} if kind == "linear" else set(GGUF_SCALING.values())
    found = {key: scaling[name] for key, name in GGUF_SCALING.items() if name in known and name in scaling}
    if kind == "yarn":
        _, temperature = inverse_frequency(4, 10000.0, scaling, None, torch.float64, "cpu")
        if (extra := temperature / (0.1 * math.log(factor) + 1)) != 1:
            found["rope.scaling.attn_factor"] = extra
    numbers = {key: float(value) if key.endswith(("factor", "fast", "slow")) else value for key, value in found.items()}
    return {f"{arch}.{key}": value for key, value in numbers.items()}


def _scaling_from_gguf(path: Path, metadata: dict, tensors: dict, config: dict) -> dict | None:
    """rope_scaling. ValueError: a rope_freqs.weight that is not Llama 3's."""
    arch, scaling = metadata["general.architecture"], None
    if metadata.get(f"{arch}.rope.scaling.type", "none") != "none":
        scaling = {name: metadata[f"{arch}.{key}"] for key, name in GGUF_SCALING.items() if f"{arch}.{key}" in metadata}
        if "attention_factor" in scaling:
            temperature = scaling["attention_factor"] * (0.1 * math.log(scaling["factor"]) + 1)
            scaling["attention_factor"] = float(f"{temperature:.7g}")  # as many digits as a float32 has
    if (freqs := tensors.pop("rope_freqs.weight", None)) is not None:
        divisors = dequantize(freqs)
        scaling = LLAMA3_SCALING | {"factor": float(divisors.max())}
        scaling |= json.loads(metadata.get("glassbox.rope_scaling", "{}"))
        ours = _rope_freqs(2 * len(divisors), config["rope_theta"], scaling)
        if not np.allclose(ours, divisors, rtol=1e-4):
            raise ValueError(f"{path}: rope_freqs.weight is not the llama3 scaling {scaling}; others are not supported")
    return scaling


def _open_gguf(path: Path) -> tuple[dict, set[str], Callable[[str], Tensor]]:
    """As _open_llama2c."""
    metadata, tensors = read_gguf(path)
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES.values():
        raise ValueError(f"{path}: architecture {arch!r} is not supported; supported: "
                         f"{', '.join(sorted(set(ARCHITECTURES.values())))}")
    config, ours = {"model_type": "qwen3_moe" if arch == "qwen3moe" else arch}, {
        f"{arch}.{key}": name for key, name in GGUF_KEYS.items()}
    scaling_keys = {f"{arch}.{key}" for key in (*GGUF_SCALING, "rope.scaling.finetuned")}
    for key, value in metadata.items():
        name = ours.get(key)
        if name is None and key.startswith(f"{arch}.") and (key, value) not in _without_effect(arch) and (
                key not in scaling_keys):
            raise ValueError(f"{path}: {key} = {str(value)[:60]} is not supported")
        if name and config.setdefault(name, value) != value:
            raise ValueError(f"{path}: {key} is {value}, but {name} is {config[name]} elsewhere in it")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path}: missing tensors: token_embd.weight")
    layers = len({name.split(".")[1] for name in tensors if name.startswith("blk.")})
    if config.get("num_hidden_layers") != layers:
        raise ValueError(f"{path}: {arch}.block_count is {config.get('num_hidden_layers')}, but it has {layers} blocks")
    config.setdefault("vocab_size", tensors["token_embd.weight"].shape[0])
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    config.setdefault("rope_theta", 10000.0)
    try:
        config["rope_scaling"] = checked_scaling(_scaling_from_gguf(path, metadata, tensors, config),
                                                 config["max_position_embeddings"])
    except (TypeError, KeyError, ArithmeticError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: its RoPE scaling cannot be read: {error!r}") from None
    if config.get("num_experts"):
        config |= {"norm_topk_prob": True} if arch == "qwen3moe" else {"model_type": "mixtral"}
    elif arch == "llama":
        config = {name: value for name, value in config.items() if name not in ("num_experts", "num_experts_per_tok")}
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if config.get("sliding_window"):
        mistral = {"model_type": "mixtral" if config.get("num_experts") else "mistral"}
        config |= mistral if arch == "llama" else {"use_sliding_window": True, "max_window_layers": 0}
    ends = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    config |= {"bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
               "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
               "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id")}
    halves = {"F16": torch.float16, "BF16": torch.bfloat16}  # a file of these gives a model of these, its F32 norms too
    dtype = halves.get(tensors["token_embd.weight"].kind, torch.float32)

    def tensor_of(name: str) -> Tensor:
        weight = torch.from_numpy(dequantize(tensors[gguf_name(name)])).to(dtype)
        return reordered(name, weight, config, half_split) if arch == "llama" else weight

    return config, set(map(hf_name, tensors)), tensor_of


def _without_effect(arch: str) -> list[tuple]:
    return [(f"{arch}.rope.scaling.type", "none"), (f"{arch}.rope.scale_linear", 1.0),
            (f"{arch}.tensor_data_layout", "Meta AI original pth"), (f"{arch}.attention.causal", True)]


# ----------------------------------------------------------------------------------------------------- GGUF: tokenizers

PATTERNS = {"gpt-2": GPT2_PATTERN, "llama-bpe": CL100K_PATTERN, "qwen2": QWEN2_PATTERN, "gpt-4o": O200K_PATTERN,
            "smollm": SMOLLM_PATTERN, "llama3": CL100K_PATTERN, "llama-v3": CL100K_PATTERN,
            "deepseek-r1-qwen": QWEN2_PATTERN}
# tokenizer.ggml.pre names the split pattern, which llama.cpp has in its source. Written are the first five.


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files that tokenizer.save(folder) writes, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _pieces(files: dict[str, bytes]) -> Pieces | None:
    """What a sentencepiece tokenizer consists of, from its files; None for another kind."""
    if "tokenizer.model" in files:
        return pieces_of_model(files["tokenizer.model"])
    data = json.loads(files["tokenizer.json"])
    return pieces_of_json(data) if data["model"].get("byte_fallback") else None


def _tokenizer_to_gguf(tokenizer: Tokenizer, config: dict) -> dict:
    """The metadata of a tokenizer, filled up to the model's vocabulary."""
    files = tokenizer_files(tokenizer)
    if pieces := _pieces(files):
        if pieces.changes:
            print(f"note: this tokenizer {pieces.changes} before it cuts a text; llama.cpp does not", file=sys.stderr)
        tokens, types = pieces.tokens, pieces.types
        metadata = {"model": "llama", "pre": "default", "add_space_prefix": pieces.add_prefix}
        filler = config["vocab_size"] - len(tokens)
        metadata["scores"] = pieces.scores + [-1e9] * filler
        if "unk" in pieces.ids:
            metadata["unknown_token_id"] = pieces.ids["unk"]
    else:
        metadata, tokens, types = _byte_level_to_gguf(json.loads(files["tokenizer.json"]))
        filler = config["vocab_size"] - len(tokens)
    if filler < 0:
        raise ValueError(f"the tokenizer has {len(tokens)} tokens, the model {config['vocab_size']}")
    tokens += [f"[PAD{i}]" for i in range(len(tokens), config["vocab_size"])]
    metadata |= {"tokens": tokens, "token_type": types + [UNUSED] * filler}
    ends = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    ends = [end for end in dict.fromkeys([tokenizer.eos_token_id, *ends]) if end is not None]
    ids = {"bos": tokenizer.bos_token_id, "eos": ends[0] if ends else None, "eot": ends[1] if len(ends) > 1 else None,
           "padding": tokenizer.pad_token_id}
    metadata |= {f"{end}_token_id": i for end, i in ids.items() if i is not None}
    metadata["add_bos_token"] = tokenizer.bos_token_id is not None
    return ({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
            | ({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}))


def _byte_level_to_gguf(data: dict) -> tuple[dict, list[str], list[int]]:
    """(metadata, tokens, types) from a tokenizer.json as data/tokenizer.py writes it."""
    steps = (data["pre_tokenizer"] or {}).get("pretokenizers", [])
    pattern = next((step["pattern"]["Regex"] for step in steps if step["type"] == "Split"), None)
    pre = next((pre for pre, known in PATTERNS.items() if known == pattern), None)
    if pre is None:
        what = "has no split pattern (is it one of characters?)" if pattern is None else f"splits by {pattern!r}"
        raise ValueError(f"this tokenizer {what}; llama.cpp knows patterns by name only, of which these are supported: "
                         f"{', '.join(PATTERNS)}")
    if data["model"]["ignore_merges"] and pre != "llama-bpe":
        print("note: this tokenizer has tokens that no merge makes (ignore_merges), which llama.cpp will not find",
              file=sys.stderr)
    if data["normalizer"]:
        print("note: this tokenizer normalizes text to NFC; llama.cpp does not", file=sys.stderr)
    special = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in data["added_tokens"]}
    by_id = {i: token for token, i in data["model"]["vocab"].items()}
    size = max(by_id) + 1
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    types = [special.get(i, NORMAL if i in by_id else UNUSED) for i in range(size)]
    return {"model": "gpt2", "pre": pre, "merges": data["model"]["merges"]}, tokens, types


def _tokenizer_from_gguf(path: Path, metadata: dict) -> Tokenizer | None:
    """The tokenizer in a GGUF file's metadata; None where there is none. ValueError: another than gpt2 and llama."""
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}.get
    kind, tokens = get("model"), get("tokens")
    if kind is None or kind == "none":
        return None
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{path}: tokenizer {kind!r} is not supported (gpt2 and llama are)")
    try:
        types, ids = get("token_type") or [NORMAL] * len(tokens), {}
        for key, end in (("unknown", "unk"), ("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
            if (i := get(f"{key}_token_id")) is not None and i < len(tokens):
                ids[end] = i
        if kind == "llama":
            pieces = Pieces(tokens, get("scores"), types, {"unk": 0} | ids, get("add_space_prefix", True))
            made = SentencePieceTokenizer(model_of_pieces(pieces))
        else:
            made = _byte_level_from_gguf(get("pre"), tokens, types, get("merges"), ids)
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, struct.error) as error:
        raise ValueError(f"{path}: its tokenizer cannot be read: {error}") from None
    made.chat_template = metadata.get("tokenizer.chat_template")
    return made


def _byte_level_from_gguf(pre: str, tokens: list, types: list, merges: list, ids: dict) -> Tokenizer:
    if pre not in PATTERNS:
        raise ValueError(f"its split pattern {pre!r} is unknown here; known: {', '.join(PATTERNS)}")
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind != UNUSED}
    added = [{"id": i, "content": tokens[i], "special": kind != USER_DEFINED} for i, kind in enumerate(types)
             if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[pre]}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    whole = PATTERNS[pre] == CL100K_PATTERN  # llama.cpp takes these pre-tokens whole if they are tokens
    with tempfile.TemporaryDirectory() as folder:  # by way of Hugging Face's files, for load_tokenizer checks all
        write_json(Path(folder) / "tokenizer.json", {
            "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": whole}, "added_tokens": added,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}, "decoder": byte_level})
        write_json(Path(folder) / "tokenizer_config.json", {f"{end}_token": tokens[i] for end, i in ids.items()})
        return load_tokenizer(folder)


# --------------------------------------------------------------------------------------------------------- command line


def check(args: Args) -> None:
    """Refuse what cannot work before anything is read. ValueError with one line."""
    out = Path(args.out)
    if args.quantize and args.format != "gguf":
        raise ValueError(f"--quantize {args.quantize}: only --format gguf is quantized")
    if args.dtype and args.format != "hf":
        raise ValueError(f"--dtype {args.dtype}: only for --format hf; gguf takes --quantize, llama2c is float32")
    if args.format != "hf" and out.is_dir():
        raise ValueError(f"--out {out}: is a folder; name the file to write")
    if args.format == "hf" and out.is_file() or out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out}: is not empty; choose another")
    beside = [out.with_name("tokenizer.bin")] if args.format == "llama2c" else []
    for file in (out, *beside):
        if file.is_file():
            raise ValueError(f"--out {args.out}: {file} exists already; choose another")


def main(argv: list[str] | None = None) -> None:
    args = parse(Args, __doc__, argv)
    check(args)
    out = Path(args.out)
    model = load_pretrained(args.model, dtype=getattr(torch, args.dtype) if args.dtype else None, mapped=True)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else load_pretrained_tokenizer(args.model)
    if tokenizer is None:
        print("note: no tokenizer was found, so none is written (name one by --tokenizer)", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.format == "hf":
        save_pretrained(model, out, tokenizer)
    elif args.format == "gguf":
        write_model_gguf(out, model, tokenizer, args.quantize and args.quantize.upper())
    else:
        if tokenizer is not None:
            if (pieces := _pieces(tokenizer_files(tokenizer))) is None:
                raise ValueError("llama2.c reads sentencepiece tokenizers only, and this model's is none")
            data = llama2c_of_pieces(pieces, model.config.vocab_size)
            with atomic_file(out.with_name("tokenizer.bin")) as file:
                file.write(data)
        write_llama2c(out, model, args.llama2c_version)
    size = sum(file.stat().st_size for file in ([out] if out.is_file() else out.iterdir()))
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {size:,} bytes")


if __name__ == "__main__":
    run(main)
