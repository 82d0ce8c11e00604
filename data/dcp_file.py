"""PyTorch's distributed checkpoints (DCP) in and out: what FSDP and DTensor scripts, torchtitan and accelerate save.

    folder/.metadata       a pickle: each tensor's shape, dtype and boxes (offsets, sizes), into which it was cut;
                           each box's file, offset and length there
    folder/__0_0.distcp    the boxes that rank 0 wrote, one torch.save behind the other; __1_0.distcp rank 1's ...

Whoever writes a pickle chooses what its reader calls, and with which arguments; torch's own reader of .metadata would
run any program. Ours knows the dozen names that such a file needs and takes a stand-in for each, which keeps what it is
handed and does nothing; every other name is refused. Boxes are read by torch.load(weights_only=True).

    tensors = read_dcp("checkpoint/step-1000")     # {name: Tensor}, each put together from its boxes
    write_dcp("new_folder", tensors)               # for torch.distributed.checkpoint.load, on any number of ranks

    python data/dcp_file.py folder     lists the folder; without one it writes one and reads it
"""

import io
import math
import os
import pickle
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

METADATA = ".metadata"

# -------------------------------------------------------------------------------------------------------- the metadata


class Record:
    """What stands for a class, or a function, of torch's: it keeps what the pickle hands over."""

    def __init__(self, *given):
        self.given = given

    def __setstate__(self, state):
        self.__dict__ = state if isinstance(state, dict) else {"state": state}


NEEDED = {"torch.distributed.checkpoint.metadata": (
              "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
              "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
          "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),  # once
          "torch.distributed.checkpoint.filesystem": ("_StorageInfo",), "torch.serialization": ("_get_layout",),
          "pathlib": ("PosixPath", "WindowsPath"), "pathlib._local": ("PosixPath", "WindowsPath")}  # where it was saved


class Vetted(pickle.Unpickler):
    """Reads a pickle, which can call nothing but stand-ins and make tuples."""

    def find_class(self, module, name):
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if (module, name) == ("torch", "Size"):
            return tuple
        if name not in NEEDED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no distributed checkpoint needs")
        return Record


class Box(NamedTuple):
    """A rectangle of a tensor, and where it lies."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    offset: int  # in bytes, in the file
    length: int


class DCPTensor(NamedTuple):
    name: str  # in the folder
    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: list[Box]
    heads: int = 0  # of q and k in Meta's order: what `read` puts into Hugging Face's

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def read(self, target: Tensor | None = None) -> Tensor:
        """The numbers, in `target` if there is one (of the same shape). ValueError: a box that holds something else."""
        target = torch.empty(self.shape, dtype=self.dtype) if target is None else target
        for box in self.boxes:
            with open(box.file, "rb") as file:
                file.seek(box.offset)
                data = io.BytesIO(file.read(box.length))
            try:
                part = torch.load(data, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever damaged bytes lead to
                why = f"{type(error).__name__}: {error}".split("\n")[0]
                raise ValueError(f"{box.file}: damaged at byte {box.offset:,}, in {self.name}: {why[:200]}") from None
            if not isinstance(part, Tensor) or (part.shape, part.dtype) != (box.shape, self.dtype):
                raise ValueError(f"{box.file}: at byte {box.offset:,} is not {self.name}'s box of {list(box.shape)}")
            target[tuple(slice(a, a + n) for a, n in zip(box.start, box.shape))] = part
        if self.heads:  # each head's rows 0 1 2 3 ... become 0 2 ... | 1 3 ...
            target.copy_(target.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2))
        return target


def open_dcp(folder) -> dict[str, DCPTensor]:
    """The tensors in a folder, to be read one by one; what is none (step counts, settings) is left out.

    ValueError, naming the file and the flaw: a .metadata that asks for other classes than it needs or is none at all,
    boxes that lie outside of their tensor or leave some of it open, files that are missing or too short."""
    path = Path(folder) / METADATA
    data = path.read_bytes()
    try:
        metadata, tensors = Vetted(io.BytesIO(data)).load(), {}
        places = {(index.fqn, index.__dict__.get("offset")): place for index, place in metadata.storage_data.items()}
        for name, entry in metadata.state_dict_metadata.items():
            if hasattr(entry, "chunks"):
                boxes = [_box(name, entry.size, chunk, places, path.parent) for chunk in entry.chunks]
                tensors[name] = DCPTensor(name, entry.properties.state[0], entry.size, boxes)
                _expect(isinstance(tensors[name].dtype, torch.dtype), f"{name} has no dtype")
                _expect(sum(math.prod(box.shape) for box in boxes) == math.prod(entry.size),
                        f"the boxes of {name} are not {list(entry.size)} together")
    except Exception as error:  # whatever a file leads to that is something else, or damaged
        why = (str(error) or repr(error)).split("\n")[0]
        raise ValueError(f"{path}: not the metadata of a distributed checkpoint: {why[:200]}") from None
    sizes = {}
    for tensor in tensors.values():
        for box in tensor.boxes:
            if box.file not in sizes:
                if not box.file.is_file():
                    raise ValueError(f"{box.file} is missing: {tensor.name} lies in it")
                sizes[box.file] = box.file.stat().st_size
            if box.offset + box.length > sizes[box.file]:
                raise ValueError(f"{box.file} is truncated: {sizes[box.file]:,} bytes, but {tensor.name} ends at "
                                 f"{box.offset + box.length:,}")
    return tensors


def _box(name: str, shape: tuple, chunk: Record, places: dict, folder: Path) -> Box:
    start, size = chunk.offsets, chunk.sizes
    rows = [(a, n, whole) for a, n, whole in zip(start, size, shape)]
    _expect(len(start) == len(size) == len(shape) == len(rows), f"a box of {name} has other dimensions")
    _expect(all(type(a) is type(n) is type(w) is int and 0 <= a <= a + n <= w for a, n, w in rows),
            f"{name} is {list(shape)}, and its box at {list(start)} is {list(size)}")
    _expect((place := places.get((name, start))) is not None, f"the box of {name} at {list(start)} is in no file")
    file, numbers = place.relative_path, (place.offset, place.length)
    _expect(Path(file).name == file, f"{name} lies in another folder, {file}")
    _expect(all(type(n) is int and n >= 0 for n in numbers), f"{name} lies at {numbers} in {file}")
    _expect(not place.__dict__.get("transform_descriptors"), f"{name} was packed by an extension, unknown here")
    return Box(start, size, folder / file, *numbers)


def _expect(true: bool, otherwise: str) -> None:
    if not true:
        raise ValueError(otherwise)


def read_dcp(folder) -> dict[str, Tensor]:
    """{name: Tensor} of all tensors in a folder, whole, on the CPU. ValueError: see open_dcp and DCPTensor.read."""
    return {name: tensor.read() for name, tensor in open_dcp(folder).items()}


def write_dcp(folder, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as one rank would. A new folder appears whole or not at all; in one that is there already
    .metadata comes last, without which there is no checkpoint. ValueError: there is one already. OSError: disk full."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    folder = Path(folder)
    if (folder / METADATA).exists():
        raise ValueError(f"{folder}: there is a distributed checkpoint already; choose another folder")
    temporary = folder.with_name(f".tmp-dcp-{folder.name}-{os.getpid()}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process only, as there should be
            dcp.save({name: tensor.detach() for name, tensor in tensors.items()},
                     storage_writer=dcp.FileSystemWriter(temporary), no_dist=True)
        if folder.is_dir():
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == METADATA):
                os.replace(file, folder / file.name)
        else:
            os.replace(temporary, folder)
    except CheckpointException as error:  # a BaseException; in it each rank's own
        raise next(iter(error.failures.values()))[0] from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ a model's own tensors

WRAPPERS = re.compile(r"\b_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")  # of torch.compile and others
TITAN_TENSORS = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
TITAN_LAYER = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
               "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
               "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
               "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}  # of its llama3: Meta's


def hf_name(name: str) -> str:
    """layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight; a part in neither table stays."""
    stem, _, ending = name.rpartition(".")
    if stem.startswith("layers.") and stem.count(".") > 1:
        _, layer, part = stem.split(".", 2)
        return f"model.layers.{layer}.{TITAN_LAYER.get(part, part)}.{ending}"
    return f"{TITAN_TENSORS.get(stem, stem)}.{ending}"


def model_tensors(folder, heads: dict[str, int]) -> dict[str, DCPTensor]:
    """The tensors of the language model in a folder, under Hugging Face's names; optimizer states and others stay out.

    A model may lie anywhere in a nested state dict: "app.model.embed_tokens.weight" tells that the prefix is "app.".
    heads: {"q_proj": n, "k_proj": m}, for names of torchtitan's, whose q and k have Meta's order of rows.
    ValueError: there is no model, or there are several; and as open_dcp."""
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in open_dcp(folder).items()}
    prefixes = {}  # -> whether the names are torchtitan's
    for sign, titan in (("model.embed_tokens.weight", False), ("tok_embeddings.weight", True)):
        prefixes |= {name.removesuffix(sign): titan for name in tensors if f".{name}".endswith(f".{sign}")}
    if len(prefixes) != 1:
        raise ValueError(f"{folder}: " + (
            f"several models, under {', '.join(map(repr, sorted(prefixes)))}" if prefixes else
            "no model: neither model.embed_tokens.weight, Hugging Face's name, nor torchtitan's tok_embeddings.weight"))
    (prefix, titan), found = prefixes.popitem(), {}
    for name, tensor in tensors.items():
        own = name.removeprefix(prefix)
        own = hf_name(own) if titan else own
        if name.startswith(prefix) and own.startswith(("model.", "lm_head.")):
            part = own.split(".")[-2]
            found[own] = tensor._replace(heads=heads.get(part, 0)) if titan else tensor
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        if not (folder := sys.argv[1] if len(sys.argv) > 1 else None):
            tensors = {"weight": torch.randn(4, 3), "bias": torch.ones(3, dtype=torch.bfloat16)}
            write_dcp(folder := Path(scratch) / "example", tensors)
            assert all(torch.equal(tensors[name], tensor) for name, tensor in read_dcp(folder).items())
        for name, tensor in sorted(open_dcp(folder).items()):
            kind, count = str(tensor.dtype).removeprefix("torch."), len(tensor.boxes)
            print(f"{kind:9}{str(list(tensor.shape)):20}{count:4} {'box  ' if count == 1 else 'boxes'}  {name}")


if __name__ == "__main__":
    main()
