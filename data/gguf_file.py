"""GGUF, the file format of llama.cpp and Ollama: metadata and (quantized) tensors, read memory-mapped and written.

    "GGUF", u32 version 3, u64 number of tensors, u64 number of metadata entries
    metadata       key, u32 type, value            (a string is u64 length and UTF-8; an array is type, length, values)
    tensors        name, u32 dimensions, u64 sizes from the innermost to the outermost, u32 type, u64 offset
    data           from the next multiple of 32 on, each tensor at a multiple of 32

All numbers are little-endian. A matrix is stored row by row, a row in blocks that are quantized by themselves:

    Q8_0  32 numbers in 34 bytes: float16 d, int8 q                                     x = d q
    Q4_0  32 numbers in 18 bytes: float16 d, 4-bit q                                    x = d (q - 8)
    Q4_K  256 numbers in 144 bytes: float16 d and m, 6-bit s and t for every 32, 4-bit q     x = d s q - m t
    Q6_K  256 numbers in 210 bytes: 6-bit q, int8 s for every 16, float16 d (read only)      x = d s (q - 32)

    metadata, tensors = read_gguf("model.gguf")
    weights = dequantize(tensors["token_embd.weight"])      # float32

    python data/gguf_file.py model.gguf     lists the file; without a file: the error of each type on normal numbers
"""

import math
import mmap
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC, ALIGNMENT = b"GGUF", 32
KINDS = {"F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "Q8_0": (8, 32, 34), "Q4_0": (2, 32, 18),
         "Q4_K": (12, 256, 144), "Q6_K": (14, 256, 210)}  # number in the file, numbers per block, bytes per block
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
UNREADABLE = {3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS",
              17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
              24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}


class GGUFTensor(NamedTuple):
    kind: str  # a name in KINDS
    shape: tuple[int, ...]  # as in NumPy and PyTorch: the innermost dimension last
    data: np.ndarray  # (blocks, bytes per block) uint8, mapped from the file


# ------------------------------------------------------------------------------------------------- llama.cpp's own names

GGUF_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GGUF_LAYER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
              "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
              "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
              "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate",
              "ffn_gate_exps": "mlp.experts.gate_proj", "ffn_up_exps": "mlp.experts.up_proj",
              "ffn_down_exps": "mlp.experts.down_proj"}  # the last three: stacks, whose names here lack the .weight
GGUF_KEYS = {"context_length": "max_position_embeddings", "embedding_length": "hidden_size", "vocab_size": "vocab_size",
             "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
             "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
             "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.key_length": "head_dim",
             "attention.value_length": "head_dim", "rope.dimension_count": "head_dim", "rope.freq_base": "rope_theta",
             "attention.sliding_window": "sliding_window", "expert_count": "num_experts",
             "expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size"}
# ... behind "llama." or "qwen2." ..., and for what ModelConfig.rope_scaling holds:
GGUF_SCALING = {"rope.scaling.type": "rope_type", "rope.scaling.factor": "factor",
                "rope.scaling.original_context_length": "original_max_position_embeddings",
                "rope.scaling.attn_factor": "attention_factor", "rope.scaling.yarn_beta_fast": "beta_fast",
                "rope.scaling.yarn_beta_slow": "beta_slow"}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K": 14, "BF16": 32}  # llama.cpp's general.file_type


def gguf_name(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight"""
    name = name + ".weight" if ".experts." in name else name
    stem, _, ending = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{next(short for short, long in GGUF_LAYER.items() if long == part)}.{ending}"
    return f"{next(short for short, long in GGUF_TENSORS.items() if long == stem)}.{ending}"


def hf_name(name: str) -> str:
    """The inverse of gguf_name; a name that is in neither table stays."""
    stem, _, ending = name.rpartition(".")
    if stem.startswith("blk.") and stem.count(".") == 2:
        _, layer, part = stem.split(".")
        ending = "" if part.endswith("_exps") else f".{ending}"
        return f"model.layers.{layer}.{GGUF_LAYER[part]}{ending}" if part in GGUF_LAYER else name
    return f"{GGUF_TENSORS[stem]}.{ending}" if stem in GGUF_TENSORS else name


# ----------------------------------------------------------------------------------------------------------------- read


class _Cursor:
    """Reads a buffer from the front; ValueError, naming what was being read, where it ends too early."""

    def __init__(self, path, memory):
        self.path, self.memory, self.at, self.what = path, memory, 0, "the header"

    def fail(self, flaw: str):
        raise ValueError(f"{self.path}: not a valid GGUF file: {flaw}")

    def take(self, size: int) -> int:
        begin = self.at
        if size > len(self.memory) - begin:
            self.fail(f"it ends at byte {len(self.memory):,} in the middle of {self.what}; truncated?")
        self.at += size
        return begin

    def number(self, code: str):
        return struct.unpack_from("<" + code, self.memory, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        size = self.number("Q")
        begin = self.take(size)
        try:
            return self.memory[begin : begin + size].decode()
        except UnicodeDecodeError:
            self.fail(f"a text of {self.what} is not UTF-8")

    def value(self, kind: int):
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, length = self.number("I"), self.number("Q")
            if inner == STRING:
                return [self.text() for _ in range(length)]
            if inner not in SCALARS:
                self.fail(f"{self.what} is an array of the unknown type {inner}")
            dtype = np.dtype(SCALARS[inner]).newbyteorder("<")
            return np.frombuffer(self.memory, dtype, length, self.take(length * dtype.itemsize)).tolist()
        if kind not in SCALARS:
            self.fail(f"{self.what} has the unknown type {kind}")
        value = self.number(SCALARS[kind])
        return float(str(np.float32(value))) if kind == 6 else value  # 1e-05, not 9.999999747378752e-06


def read_gguf(path) -> tuple[dict, dict[str, GGUFTensor]]:
    """(metadata, tensors by name) of a GGUF file, version 2 or 3. The tensors are read from the disk as they are used.

    ValueError, naming the file and the flaw: no GGUF, truncated, a type that is not in KINDS, tensors that overlap."""
    with open(path, "rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{path}: not a GGUF file: it does not begin with 'GGUF'")
        cursor = _Cursor(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    cursor.take(4)
    if (version := cursor.number("I")) not in (2, 3):
        cursor.fail(f"version {version} is not supported (2 and 3 are, little-endian)")
    num_tensors, num_entries = cursor.number("Q"), cursor.number("Q")
    metadata, entries = {}, {}
    for i in range(num_entries):
        cursor.what = f"metadata entry {i + 1} of {num_entries}"
        key = cursor.text()
        cursor.what = f"metadata {key!r}"
        if key in metadata:
            cursor.fail(f"{cursor.what} stands twice")
        metadata[key] = cursor.value(cursor.number("I"))
    for i in range(num_tensors):
        cursor.what = f"the description of tensor {i + 1} of {num_tensors}"
        name = cursor.text()
        cursor.what = f"the description of tensor {name!r}"
        if name in entries:
            cursor.fail(f"tensor {name!r} stands twice")
        if (dimensions := cursor.number("I")) > 4:
            cursor.fail(f"tensor {name!r} has {dimensions} dimensions; 4 is the most")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        entries[name] = shape, cursor.number("I"), cursor.number("Q")
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        cursor.fail(f"general.alignment is {alignment!r}")
    return metadata, _map_tensors(cursor, entries, cursor.at + -cursor.at % alignment, alignment)


def _map_tensors(cursor: _Cursor, entries: dict, start: int, alignment: int) -> dict[str, GGUFTensor]:
    memory, kinds, tensors, end = cursor.memory, {number: kind for kind, (number, _, _) in KINDS.items()}, {}, 0
    for name, (shape, number, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
        if number not in kinds:
            cursor.fail(f"tensor {name!r} is of type {UNREADABLE.get(number, number)}; supported: {', '.join(KINDS)}")
        kind = kinds[number]
        _, block, size = KINDS[kind]
        if not shape or shape[-1] % block:
            cursor.fail(f"tensor {name!r} is {kind} {list(shape)}, but its rows must be multiples of {block}")
        if offset < end or offset % alignment:
            cursor.fail(f"tensor {name!r} begins at {offset}, but what stands before it ends at {end}, "
                        f"and offsets are multiples of {alignment}")
        blocks = math.prod(shape) // block
        end = offset + blocks * size
        if start + end > len(memory):
            cursor.fail(f"tensor {name!r} ends at byte {start + end:,}, the file at {len(memory):,}; truncated?")
        data = np.frombuffer(memory, np.uint8, blocks * size, start + offset).reshape(blocks, size)
        tensors[name] = GGUFTensor(kind, shape, data)
    return {name: tensors[name] for name in entries}


# ---------------------------------------------------------------------------------------------------------------- write


def fitting_kind(kind: str, shape: tuple[int, ...]) -> str:
    """`kind`, or what llama.cpp takes for rows that are no whole blocks: Q8_0 for Q4_K, else F16. Vectors: F32."""
    if len(shape) < 2:
        return "F32"
    if kind == "Q4_K" and shape[-1] % 256:
        kind = "Q8_0"
    return "F16" if shape[-1] % KINDS[kind][1] else kind


def write_gguf(path, metadata: dict, tensors: dict[str, tuple[str, tuple[int, ...], Callable]]) -> None:
    """Write a GGUF file, version 3, atomically: the name is there once the file is whole and on the disk.

    metadata: str, bool, int (written as uint32, or int64 if that is too small), float (float32), and lists of str, int
    (int32) or float (float32). tensors: name -> (kind, shape, a function that gives the numbers), which is called when
    the tensor's turn comes, so that one at a time is in memory. ValueError: numbers that are not finite."""
    head = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    head += [_text(key) + _value(key, value) for key, value in metadata.items()]
    offset = 0
    for name, (kind, shape, _) in tensors.items():
        number, block, size = KINDS[kind]
        head.append(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], number, offset))
        offset += math.prod(shape) // block * size
        offset += -offset % ALIGNMENT
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(b"".join(head))
            for name, (kind, shape, numbers) in tensors.items():
                file.write(bytes(-file.tell() % ALIGNMENT))
                values = np.asarray(numbers(), np.float32)
                if values.shape != tuple(shape):
                    raise ValueError(f"tensor {name!r} is {list(values.shape)}, announced as {list(shape)}")
                values = values.reshape(-1, KINDS[kind][1])  # (blocks, numbers)
                for i in range(0, len(values), step := max(1, (1 << 20) // values.shape[1])):
                    try:
                        file.write(quantize(kind, values[i : i + step]))
                    except ValueError as error:
                        raise ValueError(f"tensor {name!r}: {error}") from None
            file.write(bytes(-file.tell() % ALIGNMENT))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value) -> bytes:
    """The type and the value."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list):
        kinds = {type(v) for v in value}
        if kinds <= {str}:
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
        kind, dtype = (6, "<f4") if float in kinds else (5, "<i4")
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + np.array(value, dtype).tobytes()
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if 0 <= value < 1 << 32 else struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    raise ValueError(f"metadata {key!r}: GGUF has no place for {value!r}")


# --------------------------------------------------------------------------------------------------------- quantization


def dequantize(tensor: GGUFTensor) -> np.ndarray:
    """The numbers of a tensor, float32, in its shape (a copy)."""
    return _FROM_BLOCKS[tensor.kind](tensor.data).reshape(tensor.shape)


def quantize(kind: str, values: np.ndarray) -> np.ndarray:
    """values (blocks, numbers per block) float32 -> (blocks, bytes per block) uint8. ValueError: inf or NaN."""
    if not np.isfinite(values).all():
        raise ValueError("holds numbers that are not finite")
    with np.errstate(over="ignore"):  # said below
        blocks = _TO_BLOCKS[kind](values)
    if kind == "F16" and not np.isfinite(blocks.view("<f2")).all():
        raise ValueError("holds numbers too large for float16; choose BF16 or F32")
    return blocks


def _halves(data: np.ndarray) -> np.ndarray:
    """(n, 2 k) bytes -> (n, k) float32 from float16."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _half_bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.astype("<f2")).view(np.uint8)


def _inverse(x: np.ndarray) -> np.ndarray:
    return np.divide(1, x, out=np.zeros_like(x), where=x != 0)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """(n, k) bytes -> (n, 2, k): all the low halves, then all the high ones."""
    return np.stack((data & 15, data >> 4), axis=1)


def _from_bf16(data: np.ndarray) -> np.ndarray:
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # to the nearest, ties to even
    return bits.astype("<u2").view(np.uint8)


def _from_q8_0(data: np.ndarray) -> np.ndarray:
    return _halves(data[:, :2]) * data[:, 2:].view(np.int8)


def _to_q8_0(x: np.ndarray) -> np.ndarray:
    d = np.abs(x).max(1, keepdims=True) / np.float32(127)
    q = x * _inverse(d)
    q = np.trunc(q + np.copysign(np.float32(0.5), q))  # half away from zero, as C's roundf
    return np.concatenate((_half_bytes(d), q.astype(np.int8).view(np.uint8)), axis=1)


def _from_q4_0(data: np.ndarray) -> np.ndarray:
    return _halves(data[:, :2]) * (_nibbles(data[:, 2:]).reshape(-1, 32).astype(np.int8) - 8)


def _to_q4_0(x: np.ndarray) -> np.ndarray:
    largest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], axis=1)  # with its sign: it becomes exactly -8 d
    d = largest / np.float32(-8)
    q = np.minimum(np.trunc(x.astype(np.float64) * _inverse(d) + 8.5), 15).astype(np.uint8)
    return np.concatenate((_half_bytes(d), q[:, :16] | q[:, 16:] << 4), axis=1)


def _from_q4_k(data: np.ndarray) -> np.ndarray:
    d, m = _halves(data[:, 0:2]), _halves(data[:, 2:4])
    low, middle, high = data[:, 4:8], data[:, 8:12], data[:, 12:16]
    s = np.concatenate((low & 63, (high & 15) | (low >> 6) << 4), axis=1)  # (n, 8), six bits each
    t = np.concatenate((middle & 63, high >> 4 | (middle >> 6) << 4), axis=1)
    q = _nibbles(data[:, 16:].reshape(-1, 32)).reshape(-1, 8, 32)
    return (d * s)[:, :, None] * q - (m * t)[:, :, None]


def _to_q4_k(x: np.ndarray) -> np.ndarray:
    x = x.reshape(-1, 8, 32)
    scale, offset = _fit_16_levels(x)  # (n, 8) each: x = scale q - offset
    d, m = scale.max(1, keepdims=True) / np.float32(63), offset.max(1, keepdims=True) / np.float32(63)
    s, t = np.rint(scale * _inverse(d)).astype(np.uint8), np.rint(offset * _inverse(m)).astype(np.uint8)  # six bits
    halves = _half_bytes(np.concatenate((d, m), axis=1))
    step, shift = _halves(halves[:, :2]) * s, _halves(halves[:, 2:]) * t  # what a reader will see
    q = np.rint((x + shift[:, :, None]) * _inverse(step)[:, :, None]).clip(0, 15).astype(np.uint8)
    low, middle = s[:, :4] | s[:, 4:] >> 4 << 6, t[:, :4] | t[:, 4:] >> 4 << 6
    high = s[:, 4:] & 15 | t[:, 4:] << 4
    q = q.reshape(-1, 4, 2, 32)
    return np.concatenate((halves, low, middle, high, (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)), axis=1)


def _fit_16_levels(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """scale and offset, both >= 0, that make sum of w (scale q - offset - x)^2 small over the last axis, q in 0 .. 15.

    The search of llama.cpp: for 21 spacings round x to q, then solve for the best line through (q, x). Weights
    w = |x| + rms(x), for large weights matter most."""
    low, high = np.minimum(x.min(-1), 0), x.max(-1)
    w = np.abs(x) + np.sqrt((x * x).mean(-1, keepdims=True))
    inverse_range = _inverse(high - low)
    scale, offset = (high - low) / np.float32(15), -low
    best = np.full(low.shape, np.inf, np.float32)
    for levels in (15, *(np.float32(14 + 0.1 * i) for i in range(21))):
        q = np.rint((x - low[..., None]) * (levels * inverse_range)[..., None]).clip(0, 15)
        sw, sq, sqq, sx, sqx = (v.sum(-1) for v in (w, w * q, w * q * q, w * x, w * q * x))
        determinant = _inverse(sw * sqq - sq * sq)
        a, b = (sw * sqx - sq * sx) * determinant, (sqq * sx - sq * sqx) * determinant
        a, b = np.where(b > 0, sqx * _inverse(sqq), a), np.minimum(b, 0)
        flat = (determinant <= 0) | (a <= 0)  # all q alike, or a line that falls: keep the plain grid
        a, b = np.where(flat, (high - low) / np.float32(15), a), np.where(flat, low, b)
        error = (w * (a[..., None] * q + b[..., None] - x) ** 2).sum(-1)
        better = error < best
        scale, offset, best = np.where(better, a, scale), np.where(better, -b, offset), np.minimum(error, best)
    return scale, offset


def _from_q6_k(data: np.ndarray) -> np.ndarray:
    low = _nibbles(data[:, :128].reshape(-1, 64)).reshape(-1, 8, 32)
    pairs = data[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    q = (low | pairs.reshape(-1, 8, 32) << 4).astype(np.int8).reshape(-1, 16, 16) - 32
    return (_halves(data[:, 208:]) * data[:, 192:208].view(np.int8))[:, :, None] * q


_FROM_BLOCKS = {"F32": lambda data: data.view("<f4").astype(np.float32), "F16": _halves, "BF16": _from_bf16,
                "Q8_0": _from_q8_0, "Q4_0": _from_q4_0, "Q4_K": _from_q4_k, "Q6_K": _from_q6_k}
_TO_BLOCKS = {"F32": lambda x: np.ascontiguousarray(x, "<f4").view(np.uint8), "F16": _half_bytes, "BF16": _to_bf16,
              "Q8_0": _to_q8_0, "Q4_0": _to_q4_0, "Q4_K": _to_q4_k}


def main() -> None:
    if len(sys.argv) > 1:
        metadata, tensors = read_gguf(sys.argv[1])
        for key, value in metadata.items():
            text = repr(value)
            print(f"{key} = {text if len(text) < 90 else text[:80] + ' ...'}")
        for name, tensor in tensors.items():
            print(f"{tensor.kind:5}{str(list(tensor.shape)):20}{name}")
        return
    x = np.random.default_rng(0).standard_normal((1024, 256), np.float32)
    print("type   bits per weight   rms error / rms")
    for kind, (_, block, size) in KINDS.items():
        if kind in _TO_BLOCKS:
            y = dequantize(GGUFTensor(kind, x.shape, quantize(kind, x.reshape(-1, block))))
            print(f"{kind:7}{8 * size / block:15.4g}{np.sqrt(((x - y) ** 2).mean() / (x * x).mean()):18.2e}")


if __name__ == "__main__":
    main()
