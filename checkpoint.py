"""Checkpoints that survive anything: safetensors files and JSON, in folders that any Hugging Face tool can open.

    out/latest              the name of the newest folder: "step_00000240"
    out/step_00000240/      config.json, generation_config.json, model.safetensors, tokenizer files    = a Hugging Face folder
                            optimizer.safetensors ("<parameter>.<key>"), state.json                    + what resuming needs
                            manifest.json ({"files": {name: {"bytes", "sha256"}}})                     + proof of being whole

A folder is written under a temporary name, synced to the disk, renamed, and only then does `latest` name it; so whenever the
process is killed, `latest` names a whole checkpoint. A safetensors file is

    u64 little-endian N | N bytes of JSON {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...} | the numbers

    python checkpoint.py out/pretrain       checks every checkpoint of a run against its manifest
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import cli
from model import CausalLM, ModelConfig

# In the order of the safetensors package, which stores the last kinds first, so that every tensor stays aligned.
DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
          "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
          "U32": torch.uint32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64}
MAX_HEADER = 100_000_000  # bytes; the format's limit
HARMLESS = re.compile(r"\.rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$")  # buffers in old files, which config.json implies


# ------------------------------------------------------------------------------------------------------ files and folders


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
    """Bring the names in a folder to the disk: without it, a power cut may undo a rename. Windows has no such call."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict:
    """The JSON object in a file; ValueError naming the file if there is none in it."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object {{...}}")
    return value


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ safetensors


def write_safetensors(path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write named tensors, one after the other, byte for byte as the safetensors package does. Atomic."""
    path, kinds = Path(path), {dtype: kind for kind, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in kinds:
            raise ValueError(f"{path}: safetensors has no kind for {name}, which is {tensor.dtype}")
    order = list(kinds)
    names = sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name))
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def read_safetensors_header(path) -> tuple[dict[str, dict], dict[str, str], int]:
    """What a file holds: ({name: {"dtype", "shape", "data_offsets"}}, metadata, where the numbers begin).

    Raises ValueError naming the file and what is malformed: whatever passes can be read without leaving the file.
    """
    path = Path(path)

    def refuse(why: str):
        raise ValueError(f"{path}: not a valid safetensors file: {why}")

    def without_duplicates(pairs: list) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice")
        return dict(pairs)

    def is_sizes(value) -> bool:
        return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)

    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length
        if size < 8 or length > MAX_HEADER or start > size:
            refuse(f"a header of {length} bytes does not fit into a file of {size} bytes; truncated?")
        try:
            header = json.loads(file.read(length).decode(), object_pairs_hook=without_duplicates)
        except (ValueError, RecursionError) as error:
            refuse(f"the header is no JSON: {error}")
    if not isinstance(header, dict):
        refuse("the header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse("__metadata__ must map strings to strings")
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            refuse(f"{name!r} must have dtype, shape and data_offsets, and nothing else")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
            refuse(f"{name!r} has the unknown dtype {entry['dtype']!r}")
        if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2:
            refuse(f"{name!r} has shape {shape} and data_offsets {offsets}, which are no sizes")
        needed = math.prod(shape) * DTYPES[entry["dtype"]].itemsize
        if offsets[1] - offsets[0] != needed:
            refuse(f"{name!r} needs {needed} bytes for {entry['dtype']} {shape}, but data_offsets give {offsets[1] - offsets[0]}")
    end, before = 0, "the header"
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["data_offsets"][0] != end:
            refuse(f"{name!r} begins at {entry['data_offsets'][0]}, but {before} ends at {end}")
        end, before = entry["data_offsets"][1], repr(name)
    if start + end != size:
        refuse(f"the tensors end at byte {start + end}, the file at {size}; {'truncated' if size < start + end else 'longer'}")
    return header, metadata, start


def read_safetensors(path) -> dict[str, Tensor]:
    """The named tensors of a file, on the CPU, memory-mapped: read from the disk when used. Writing to one does not change the file.

    The file must stay as it is while they live. ValueError naming the file if it is malformed.
    """
    header, _, start = read_safetensors_header(path)
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: torch wants its tensors writable
    tensors = {}
    for name, entry in header.items():
        dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        if begin == end:
            tensors[name] = torch.empty(entry["shape"], dtype=dtype)
            continue
        raw = torch.frombuffer(memory, dtype=torch.uint8, count=end - begin, offset=start + begin)
        if (start + begin) % dtype.itemsize:
            raw = raw.clone()  # a header that was not padded: a float32 at an odd address is slow, or a crash
        tensors[name] = raw.view(dtype).view(entry["shape"])
    return tensors


# ---------------------------------------------------------------------------------------------------- Hugging Face folders


def save_model(folder, model: CausalLM, tokenizer=None) -> None:
    """Write config.json, generation_config.json, model.safetensors (tied weights once) and the tokenizer into a folder."""
    folder = Path(folder)
    config = model.config.to_hf() | {"torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    for name in ids:
        if config[name] is None:
            config[name] = getattr(tokenizer, name, None)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {name: config[name] for name in ids if config[name] is not None})
    write_safetensors(folder / "model.safetensors", dict(model.named_parameters()), {"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(folder)


def load_model(folder, *, dtype: torch.dtype | None = None, device="cpu", attention: str = "sdpa") -> CausalLM:
    """The model of a Hugging Face folder (one file or sharded) of the families in model.FAMILIES, in eval mode.

    `dtype` converts; None keeps what the file has. Holds one model and one tensor in memory. Raises ValueError for a folder
    that is not one, a config.json that this code cannot honour, and tensors that are missing, unknown or of another shape.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json in it, so it is not a Hugging Face model folder")
    if (folder / "manifest.json").is_file() and (why := damage(folder, contents=False)):
        raise ValueError(why)
    raw = read_json(folder / "config.json")
    if raw.get("quantization_config"):
        raise ValueError(f"{folder / 'config.json'}: quantized weights are not supported; take the unquantized model")
    try:
        config = dataclasses.replace(ModelConfig.from_hf(raw), attention=attention)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    with torch.device("meta"):
        model = CausalLM(config)
    parameters, tensors, unknown = dict(model.named_parameters()), {}, []
    for file in _weight_files(folder):
        for name, tensor in read_safetensors(file).items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                tensors[name] = tensor  # some files store the tied table twice; compared below
            elif name in parameters:
                _check_tensor(file, name, tensor, parameters[name].shape, None)
                tensors[name] = tensor.to(device, dtype or tensor.dtype, copy=True)
            elif not HARMLESS.search(name):
                unknown.append(name)
    head, table = tensors.pop("lm_head.weight", None) if config.tie_word_embeddings else None, "model.embed_tokens.weight"
    _check_names(folder, parameters, tensors, unknown)
    if head is not None and not torch.equal(head.to(device, tensors[table].dtype), tensors[table]):
        raise ValueError(f"{folder}: config.json ties lm_head.weight to {table}, but the two differ")
    model.load_state_dict(tensors, strict=False, assign=True)  # strict about all but a tied head, above
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        raise ValueError(f"{folder}: no model.safetensors in it (pytorch_model.bin is pickle, which is never read)")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index}: weight_map must map tensor names to file names")
    files = [folder / file for file in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing; {index.name} names it")
    return files


def _check_names(where, wanted, found, unknown=()) -> None:
    for names, what in ((sorted(set(wanted) - set(found)), "are missing"), (sorted(unknown), "are not part of this model")):
        if names:
            raise ValueError(f"{where}: {len(names)} tensors {what}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}")


def _check_tensor(where, name: str, tensor: Tensor, shape, dtype) -> None:
    if tensor.shape != shape or tensor.dtype != (dtype or tensor.dtype) or not tensor.is_floating_point():
        ours = f"{dtype or 'a float dtype'} {tuple(shape)}".removeprefix("torch.")
        theirs = f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.")
        raise ValueError(f"{where}: {name} is {theirs} in the file, but {ours} in the model")


# -------------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(out, step: int, *, model, optimizer, tokenizer, state: dict, keep_last: int = 0, keep=()) -> Path:
    """Write out/step_XXXXXXXX, let `latest` name it, and remove what is no longer wanted. Returns the folder.

    state: JSON values, given back by load_checkpoint. keep_last: how many folders stay (0 = all), besides those named in
    `keep`. Folders of later steps belong to a branch that was abandoned (by resuming from an earlier one), and go.
    Raises OSError, with the previous checkpoint intact, if the disk is full. Give the bare model, not torch.compile's wrapper.
    """
    out, name = Path(out), f"step_{step:08d}"
    temporary = out / f".tmp-{name}-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        temporary.mkdir()
        tensors, description = _describe(model, optimizer)
        save_model(temporary, model, tokenizer)
        write_safetensors(temporary / "optimizer.safetensors", tensors)
        write_json(temporary / "state.json", state | {"step": step, "optimizer": description})
        _write_manifest(temporary)
        _put_in_place(temporary, out / name)
    except OSError as error:
        intact = f"; the previous checkpoint {out / _pointed(out)} is intact" if _pointed(out) else ""
        raise OSError(f"cannot write checkpoint {out / name}: {error.strerror or error}{intact}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    kept = {Path(other).name for other in keep} | {name}
    steps = step_folders(out)
    expired = {n for n in steps if n <= step} - set([n for n in steps if n <= step][-keep_last:])  # [-0:] is all
    for n, folder in steps.items():
        if folder.name not in kept and (n > step or n in expired):
            _discard(folder)
    _sweep(out)
    return out / name


def load_checkpoint(folder, model, optimizer=None) -> dict:
    """Set model and optimizer, in place, bit for bit, to what save_checkpoint was given; returns its state plus "step".

    Everything is checked before anything changes: ValueError naming the file that was truncated, edited or lost, with the
    newest intact earlier checkpoint; or the tensor that does not fit. The optimizer's counters and tensors are restored, its
    settings (lr, betas ...) stay as built: a flag changed on resuming must count.
    """
    folder = Path(folder)
    verify(folder)
    parameters, saved = dict(model.named_parameters()), read_safetensors(folder / "model.safetensors")
    _check_names(folder / "model.safetensors", parameters, saved, set(saved) - set(parameters))
    for name, parameter in parameters.items():
        _check_tensor(folder / "model.safetensors", name, saved[name], parameter.shape, parameter.dtype)
    state = read_json(folder / "state.json")
    description = state.pop("optimizer")
    if optimizer is not None:
        _, ours = _describe(model, optimizer)
        if ours["name"] != description["name"]:
            raise ValueError(f"{folder}: was trained with {description['name']}; {ours['name']} cannot continue from its state")
        if [group["params"] for group in ours["groups"]] != [group["params"] for group in description["groups"]]:
            raise ValueError(f"{folder}: the optimizer's parameter groups are not those of the checkpoint")
        optimizer.state.clear()
        for key, tensor in read_safetensors(folder / "optimizer.safetensors").items():
            name, _, key = key.rpartition(".")
            optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device, copy=True)
        for group, record in zip(optimizer.param_groups, description["groups"]):
            group.update({key: value for key, value in record.items() if key != "params"})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    return state


def _describe(model: nn.Module, optimizer) -> tuple[dict[str, Tensor], dict]:
    """An optimizer's tensors by name, and its kind, groups and counters as JSON."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"{names[p]}.{key}": tensor for p, values in optimizer.state.items() for key, tensor in values.items()}
    groups = [{"params": [names[p] for p in group["params"]], **{k: v for k, v in group.items() if type(v) is int}}
              for group in optimizer.param_groups]
    return tensors, {"name": type(optimizer).__name__, "groups": groups}


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        with open(path, "r+b") as file:
            os.fsync(file.fileno())  # the tokenizer writes its own files
    write_json(folder / "manifest.json", {"files": files})


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename a whole, synced folder and let `latest` name it. At no moment does `latest` name a folder that is not there."""
    out = final.parent
    if final.exists():
        if _pointed(out) == final.name:  # saved once more: meanwhile, `latest` names a copy of the old one
            spare = out / f"{final.name}.old"
            shutil.copytree(final, spare, copy_function=_link)
            _point(out, spare.name)
        _discard(final)
    os.replace(temporary, final)
    sync_folder(out)
    _point(out, final.name)


def _link(source, target) -> None:
    try:
        os.link(source, target)  # a second name for the same bytes: at once, and free
    except OSError:
        shutil.copy2(source, target)


def _discard(folder: Path) -> None:
    """Remove a folder so that it is either whole or gone under its name."""
    trash = folder.with_name(f".tmp-{folder.name}-old")
    os.replace(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)  # what is left, the next save sweeps


def _sweep(out: Path) -> None:
    """Remove what killed runs left behind."""
    for folder in [*out.glob(".tmp-step_*"), *out.glob("step_*.old")]:
        if folder.name != _pointed(out):
            shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------- finding and checking


def _pointed(out: Path) -> str | None:
    """The name in the file `latest`."""
    try:
        return (out / "latest").read_text(encoding="utf-8", errors="replace").strip() or None
    except FileNotFoundError:
        return None


def _point(out: Path, name: str) -> None:
    with atomic_file(out / "latest") as file:
        file.write(name.encode())


def step_folders(out) -> dict[int, Path]:
    """The checkpoints of a run by step, in order."""
    found = {int(path.name[5:]): path for path in Path(out).glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)}
    return dict(sorted(found.items()))


def damage(folder, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, in one line; None if it is whole. `contents=False` compares only the sizes of its files."""
    folder = Path(folder)
    try:
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in read_json(folder / "manifest.json")["files"].items()}
    except FileNotFoundError:
        return f"{folder}: no manifest.json in it, so it is not a checkpoint of a run, or not all of it"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / 'manifest.json'} is damaged: it is no list of files"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            found = path.stat().st_size
            return f"{path} is {'truncated' if found < size else 'damaged'}: {found} bytes instead of {size}"
        if contents and sha256(path) != digest:
            return f"{path} is damaged: its contents changed after it was written"
    return None


def verify(folder) -> None:
    """Compare a checkpoint with its manifest; ValueError names the damaged file, and the newest intact earlier checkpoint."""
    why = damage(folder)
    if why:
        raise ValueError(f"{why}; {_offer(Path(folder))}")


def _offer(folder: Path) -> str:
    step = re.match(r"step_(\d+)", folder.name)
    for n, older in reversed(step_folders(folder.parent).items()):
        if (step is None or n < int(step[1])) and damage(older) is None:
            return f"resume with --resume {older}"
    return "no earlier checkpoint beside it is intact"


def latest(out) -> Path | None:
    """The newest checkpoint of a run's folder, None if it has none. ValueError if that folder is gone."""
    name = _pointed(Path(out))
    if name is None:
        return None
    folder = Path(out) / name
    if not folder.is_dir():
        raise ValueError(f"{Path(out) / 'latest'} names {name!r}, which is missing; {_offer(folder)}")
    return folder


def find_checkpoint(path) -> Path:
    """A run's folder -> its newest checkpoint; a checkpoint or Hugging Face folder -> itself. Else ValueError."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    if (path / "config.json").is_file():
        return path
    if folder := latest(path):
        return folder
    if (path / "manifest.json").is_file():
        verify(path)
    raise ValueError(f"{path}: neither a run with checkpoints nor a model folder (no `latest` and no config.json in it)")


def main() -> None:
    if len(sys.argv) != 2:
        raise ValueError("usage: python checkpoint.py FOLDER")
    folder = Path(sys.argv[1])
    for checkpoint in step_folders(folder).values() or [find_checkpoint(folder)]:
        print(damage(checkpoint) or f"{checkpoint} is intact")


if __name__ == "__main__":
    cli.run(main)
