"""Files that are whole or not there: a writer that no kill can interrupt, JSON, and tensors in the safetensors format.

    u64 little-endian N, N bytes of JSON {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}, the numbers

The header may also hold "__metadata__", a map of strings to strings. Each tensor has its own bytes, row by row, and no
byte is spare: what is not so is refused by name (the format's own rules, and the safetensors package's). No pickle.

    write_safetensors("x.safetensors", {"weight": torch.ones(2, 3)})
    read_safetensors("x.safetensors")["weight"]        # mapped from the file: read from the disk as it is used
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
          "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
          "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "F64": torch.float64,
          "I64": torch.int64, "U64": torch.uint64}  # in the order of the safetensors package
MAX_HEADER = 100_000_000  # bytes; the format's limit

# ---------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_file(path: Path):
    """A binary file to write, which takes the name `path` once it is whole and on the disk."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk: else a power cut may undo a rename. Windows has no such call."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_json(path: Path, value) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict:
    """The JSON object in a file; ValueError naming the file if it holds none."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object {{...}}")
    return value


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------- safetensors


def write_safetensors(path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write named tensors one by one, atomically; the file equals the safetensors package's byte for byte."""
    kinds, order = {dtype: kind for kind, dtype in DTYPES.items()}, list(DTYPES.values())
    # Largest elements first: so every tensor begins at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name))
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(Path(path)) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def read_safetensors_header(path) -> tuple[dict[str, dict], dict[str, str], int]:
    """What a file holds: ({name: {"dtype", "shape", "data_offsets"}}, metadata, offset of the numbers in the file).

    Raises ValueError naming the file and the flaw: in what passes, each tensor has its own bytes, and no byte is spare.
    """
    def expect(true: bool, otherwise: str) -> None:
        if not true:
            raise ValueError(f"{path}: not a valid safetensors file: {otherwise}")

    def unique(pairs: list) -> dict:
        expect(len(dict(pairs)) == len(pairs), f"a name stands twice among {[name for name, _ in pairs][:9]}")
        return dict(pairs)

    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length
        expect(length <= MAX_HEADER and start <= size, f"a header of {length} bytes in a file of {size}; truncated?")
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        expect(False, f"its header is not JSON: {error}")
    expect(isinstance(header, dict), "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    expect(isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()),
           "__metadata__ must map strings to strings")
    for name, entry in header.items():
        expect(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"},
               f"{name!r} must have dtype, shape and data_offsets")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        expect(isinstance(kind, str) and kind in DTYPES, f"{name!r} has the unknown dtype {kind!r}")
        lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
        expect(lists and all(type(n) is int and n >= 0 for n in shape + offsets),
               f"{name!r} has shape {shape!r} and data_offsets {offsets!r}")
        needed, given = math.prod(shape) * DTYPES[kind].itemsize, offsets[1] - offsets[0]
        expect(needed == given, f"{name!r} is {kind} {shape}, so {needed} bytes, but its data_offsets leave {given}")
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin = entry["data_offsets"][0]
        expect(begin == end, f"{name!r} begins at {begin}, but what stands before it ends at {end}")
        end = entry["data_offsets"][1]
    expect(start + end == size, f"its tensors end at byte {start + end}, the file at {size}")
    return header, metadata, start


def read_safetensors(path, mapped: bool = True) -> dict[str, Tensor]:
    """The named tensors of a file, on the CPU, memory-mapped: read from the disk as they are used.

    Writing to one leaves the file alone; the file must stay as it is while they live. mapped=False reads all now, into
    one buffer that they share: one large one is faster to get than many small ones. ValueError as in the header.
    """
    header, _, start = read_safetensors_header(path)
    if mapped:
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private, since torch wants it writable
    else:
        memory = read_into(path, 0, torch.empty(os.path.getsize(path), dtype=torch.uint8)).numpy()
    data, tensors = torch.frombuffer(memory, dtype=torch.uint8)[start:], {}
    for name, entry in header.items():
        dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        raw = data[begin:end]
        if raw.storage_offset() % dtype.itemsize:  # a writer that did not pad its header: torch wants aligned numbers
            raw = raw.clone()
        tensors[name] = raw.view(dtype).view(entry["shape"])
    return tensors


class Entry(NamedTuple):
    """A tensor in a safetensors file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its numbers in the file

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def read(self, target: Tensor | None = None) -> Tensor:
        """The numbers, read into `target` at once if it can hold them as they are, else converted to it."""
        same = target is not None and target.dtype == self.dtype and target.is_cpu
        raw = target if same else torch.empty(self.shape, dtype=self.dtype)
        read_into(self.path, self.offset, raw)
        return raw if same or target is None else target.copy_(raw)


class Boxes(NamedTuple):
    """A tensor in several safetensors files, each of which holds a rectangle of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: list[tuple[tuple[int, ...], Entry]]  # where it starts in the tensor, and what it is

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def read(self, target: Tensor | None = None) -> Tensor:
        """The numbers, joined; in `target`, converted to it, if there is one."""
        target = torch.empty(self.shape, dtype=self.dtype) if target is None else target
        for start, part in self.parts:
            target[tuple(slice(a, a + n) for a, n in zip(start, part.shape))] = part.read()
        return target


def read_distributed(files: list[Path]) -> dict[str, Boxes]:
    """The tensors that torch.distributed.checkpoint's HuggingFaceStorageWriter(save_distributed=True) wrote, a file for
    each rank, whose header tells in DCP_SHARDING_INFO where its parts start. ValueError: it does not; a part is missing.
    """
    found: dict[str, list] = {}
    for file in files:
        header, metadata, begin = read_safetensors_header(file)
        try:
            places = json.loads(metadata["DCP_SHARDING_INFO"])
            starts = {name: tuple(map(int, places[name]["saved_offsets"])) for name in header}
            if any(min(starts[name], default=0) < 0 or len(starts[name]) != len(header[name]["shape"]) for name in header):
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            raise ValueError(f"{file}: no DCP_SHARDING_INFO that tells where each of its tensors starts") from None
        for name, entry in header.items():
            offset = begin + entry["data_offsets"][0]
            part = Entry(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), offset)
            found.setdefault(name, []).append((starts[name], part))
    tensors = {}
    for name, parts in found.items():
        ends = [[a + n for a, n in zip(start, part.shape)] for start, part in parts]
        alike = len({(part.dtype, len(start)) for start, part in parts}) == 1
        if not alike or not tiled(parts, shape := tuple(map(max, zip(*ends)))):
            raise ValueError(f"{files[0].parent}: {name} is cut in {len(parts)} parts that are not one tensor; is a file "
                             "missing?")
        tensors[name] = Boxes(parts[0][1].dtype, shape, parts)
    return tensors


def tiled(parts: list, shape: tuple[int, ...]) -> bool:
    """Whether the parts cover all of the shape, and nothing twice."""
    cuts = [sorted({0, n, *(start[d] for start, _ in parts), *(start[d] + part.shape[d] for start, part in parts)})
            for d, n in enumerate(shape)]  # along each dimension: between two of them nobody begins or ends
    cells = torch.zeros([len(along) - 1 for along in cuts], dtype=torch.int32)
    for start, part in parts:
        cells[tuple(slice(along.index(a), along.index(a + n)) for along, a, n in zip(cuts, start, part.shape))] += 1
    return bool((cells == 1).all())


def read_into(path, offset: int, target: Tensor) -> Tensor:
    """Fill a contiguous CPU tensor with a file's bytes, past the mapping, whose pages would be touched and copied."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        view, done = memoryview(target.view(-1).view(torch.uint8).numpy()), 0
        while done < len(view):  # a read gives 2 GB at most
            if not (count := file.readinto(view[done:])):
                raise ValueError(f"{path}: ends in the middle of a tensor: it was cut while it was read")
            done += count
    return target
