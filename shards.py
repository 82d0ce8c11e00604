"""Checkpoints of many processes: each writes what it holds; any number of them, cut in any other way, reads it.

    out/step_00000240/      config.json, tokenizer, state.json, manifest.json, all as checkpoint.py writes them
                            shard_00003.safetensors   rank 3's part of weights and optimizer, as boxes
                            index.json                name -> {"shape", "dtype" of the whole, "boxes": [{"start",
                                                      "shape", "file"}]}, for "model" and for "optimizer"
                            model.safetensors         in a run's last checkpoint: the whole model, for everyone else

With adapters (lora.py) what is not trained is left out, and the last checkpoint has adapter_model.safetensors instead.

A box is a rectangle of a whole tensor. What a rank holds is known from each parameter's placement and from where in it
ZeRO's piece starts; a piece of a flattened matrix is the end of a row, whole rows and the beginning of one:

    . . . # #       start (0, 3) shape (1, 2)
    # # # # #       start (1, 0) shape (1, 5)         loading intersects the boxes that a rank needs with those that lie
    # # . . .       start (2, 0) shape (1, 2)         in the files, and copies; no rank ever has a whole tensor

What several ranks have alike, one of them writes. Padding is not written. Checkpoints of one process, which are Hugging
Face folders, are read the same way: each of their tensors is one box.

    save_checkpoint("out/x", 240, run=run, tokenizer=tokenizer, state={})     # by all ranks; run: what parallelize gave
    state = load_checkpoint(latest("out/x"), run=run)                         # in this layout or another
    model = load_sharded(latest("out/x"))                                     # the whole model, in one process
"""

import re
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import checkpoint
import lora
from checkpoint import SPECIAL_IDS, find_checkpoint, latest, put_in_place, remove_old, save_model, sweep, verify
from model import CausalLM, ModelConfig
from tensor_files import DTYPES, read_json, read_safetensors, sha256, write_json, write_safetensors

# ---------------------------------------------------------------------------------------------------------------- boxes


class Box(NamedTuple):
    """A rectangle of a tensor."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """Where this box, a part of `outer`, lies in it."""
        return tuple(slice(a - o, a - o + n) for a, o, n in zip(self.start, outer.start, self.shape))


def overlap(a: Box, b: Box) -> Box | None:
    start = tuple(max(x, y) for x, y in zip(a.start, b.start))
    stop = tuple(min(x + n, y + m) for x, n, y, m in zip(a.start, a.shape, b.start, b.shape))
    return Box(start, tuple(q - p for p, q in zip(start, stop))) if all(p < q for p, q in zip(start, stop)) else None


def flat_boxes(first: int, last: int, shape: tuple[int, ...]) -> list[Box]:
    """Numbers first to last - 1 of a flattened tensor as boxes of it, in order: at most 2 d - 1 for d dimensions."""
    if first >= last:
        return []
    if len(shape) < 2:
        return [Box((first,), (last - first,)) if shape else Box((), ())]
    row = prod(shape[1:])
    (top, left), (bottom, right) = divmod(first, row), divmod(last, row)

    def of_row(i: int, a: int, b: int) -> list[Box]:
        return [Box((i, *box.start), (1, *box.shape)) for box in flat_boxes(a, b, shape[1:])]

    if top == bottom:
        return of_row(top, left, right)
    head = of_row(top, left, row) if left else []
    top += bool(left)
    whole = [Box((top, *(0 for _ in shape[1:])), (bottom - top, *shape[1:]))] if bottom > top else []
    return head + whole + of_row(bottom, 0, right)


# ---------------------------------------------------------------------------------------------------- what a rank holds


class Part(NamedTuple):
    """What a rank holds of a parameter, as the optimizer knows it: whole.flatten()[start : start + piece.numel()]."""

    name: str
    piece: Tensor
    whole: Tensor  # of this rank: a slice of the parameter under tensor or expert parallelism
    start: int

    def placement(self) -> dict:
        return getattr(self.piece, "placement", {})

    def global_shape(self) -> tuple[int, ...]:
        return tuple(self.placement().get("global_shape", self.whole.shape))


def parts_of(run=None, model=None) -> list[Part]:
    """This rank's parts of a Run's parameters; of a plain model's, which is all of it."""
    named = run.named if run else dict(model.named_parameters())
    names = {id(p): name for name, p in named.items()}
    pieces, divided = [], set()
    if run and run.zero:
        pieces = [Part(names[id(p.whole)], p, p.whole, p.start) for p in run.sync.parameters()]
        buckets = run.sync.units if run.zero == 3 else run.sync.buckets
        divided = {id(p) for bucket in buckets for p in bucket.parameters}
    return pieces + [Part(name, p, getattr(p, "whole", p), getattr(p, "start", 0)) for name, p in named.items()
                     if id(p) not in divided]


def kept(run=None, model=None) -> dict[str, tuple[int, ...]]:
    """{name: whole shape} of the parameters that a checkpoint holds: all, or of a model with adapters the trained."""
    model = next(iter(run.stages.values())) if run else model
    shapes = run.shapes if run else {name: tuple(p.shape) for name, p in model.named_parameters()}
    if not lora.adapted(model):
        return shapes
    return {name: shapes[name] for name, p in model.named_parameters() if p.requires_grad}


def places(part: Part, tensor: Tensor, mesh) -> tuple[tuple[int, ...], list[tuple[Box, Tensor]]]:
    """Where `tensor`, the part's numbers or a state of its optimizer, belongs -> (shape of the whole, [(box, view)]).

    A state has the part's shape, or is of the whole matrix with some sizes 1 (Adafactor's rows and columns)."""
    local, placement = tuple(part.whole.shape), part.placement()
    shape, offset = list(part.global_shape()), [0] * len(local)
    if tensor.shape == part.piece.shape:
        boxes = flat_boxes(part.start, part.start + tensor.numel(), local)
    else:
        if tensor.dim() != len(local):
            shape, offset, placement = list(tensor.shape), [0] * tensor.dim(), {}
        shape = [n if m == k else m for n, m, k in zip(shape, tensor.shape, local)] if placement else list(tensor.shape)
        boxes = [Box((0,) * tensor.dim(), tuple(tensor.shape))]
    for axis, dim in placement.get("shard", {}).items():
        if tensor.shape == part.piece.shape or tensor.shape[dim] == local[dim]:
            offset[dim] = mesh.rank(axis) * local[dim]
    found, views = [], tensor.detach().reshape(-1).split([prod(box.shape) for box in boxes])
    for box, view in zip(boxes, views):
        moved = Box(tuple(a + o for a, o in zip(box.start, offset)), box.shape)
        if kept := (overlap(moved, Box((0,) * len(shape), tuple(shape))) if shape else moved):  # without the padding
            found.append((kept, view.view(box.shape)[kept.within(moved)]))
    return tuple(shape), found


def writes(part: Part, mesh, shapes: dict) -> bool:
    """Whether this rank writes the part: of those that have the same, the first; of tied copies, the embedding."""
    both = (*part.placement().get("shard", {}), *part.placement().get("zero", ()))
    divided = {axis for name in both for axis in (("edp", "ep") if name == "dp" else (name,))}
    return part.name in shapes and all(mesh.rank(a) == 0 for a in ("edp", "ep", "cp", "tp") if a not in divided)


# --------------------------------------------------------------------------------------------------------------- saving


def save_checkpoint(out, step: int, *, tokenizer, state: dict, keep_last: int = 0, keep=(), model=None, optimizer=None,
                    run=None) -> Path:
    """As checkpoint.save_checkpoint, and that itself unless there is a `run`; then by all its ranks, on a file system
    that they share. With a run, `model` is the whole one on rank 0, to be written too; None: the shards alone.

    OSError on all ranks if one of them cannot write: the previous checkpoint is intact.
    """
    if run is None:
        return checkpoint.save_checkpoint(out, step, model=model, optimizer=optimizer, tokenizer=tokenizer, state=state,
                                          keep_last=keep_last, keep=keep)
    out, name = Path(out), f"step_{step:08d}"
    temporary, first, failure = out / f".tmp-{name}-shards", run.mesh.here == 0, None
    try:
        if first:
            sweep(out)
            temporary.mkdir(parents=True)
        run.wait()  # for the folder to be there
        try:
            write_shard(temporary, run)
        except OSError as error:
            failure = error
        if run.any(failure):
            raise failure or OSError("another rank could not write its shard")
        if first:
            write_rest(temporary, run, model, tokenizer, state | {"step": step})
            put_in_place(temporary, out / name)
    except OSError as error:
        intact = f"; the previous checkpoint {latest(out)} is intact" if latest(out) else ""
        raise OSError(f"cannot write checkpoint {out / name}: {error.strerror or error}{intact}") from error
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
    if first:
        remove_old(out, step, keep_last, keep)
    run.wait()  # for `latest` to name it
    return out / name


def write_rest(folder: Path, run, model: CausalLM | None, tokenizer, state: dict) -> None:
    """What rank 0 writes when all shards are there: the index, what the folder needs besides, and the manifest."""
    index, files = {"model": {}, "optimizer": {}}, {}
    for file in sorted(folder.glob("shard_*.json")):
        own = read_json(file)
        files[f"{file.stem}.safetensors"] = own["file"]
        for section, entries in index.items():
            for name, entry in own[section].items():
                entries.setdefault(name, entry | {"boxes": []})["boxes"] += entry["boxes"]
        file.unlink()
    write_json(folder / "index.json", index)
    settings = {"name": type(run.optimizer).__name__, "step": step_count(run.optimizer)}
    write_json(folder / "state.json", state | {"optimizer": settings})
    if model is not None:
        save_model(folder, model, tokenizer)
    else:
        ids = {name: getattr(tokenizer, name, None) for name in SPECIAL_IDS if getattr(run.config, name) is None}
        write_json(folder / "config.json", run.config.to_hf() | ids)
        tokenizer.save(folder)
    for path in sorted(folder.iterdir()):  # each rank has told the digest of its own
        files.setdefault(path.name, {"bytes": path.stat().st_size, "sha256": sha256(path)})
    write_json(folder / "manifest.json", {"files": files})


def write_shard(folder: Path, run) -> None:
    """This rank's shard_00003.safetensors, and beside it shard_00003.json, for rank 0 to make the index of."""
    tensors, index = {}, {"model": {}, "optimizer": {}}
    file, kinds = folder / f"shard_{run.mesh.here:05d}.safetensors", {dtype: kind for kind, dtype in DTYPES.items()}
    shapes = kept(run)
    for part in parts_of(run):
        if writes(part, run.mesh, shapes):
            states = {f"{part.name}.{key}": t for key, t in run.optimizer.state.get(part.piece, {}).items()}
            for section, found in (("model", {part.name: part.piece}), ("optimizer", states)):
                for name, tensor in found.items():
                    shape, boxes = places(part, tensor, run.mesh)
                    entry = index[section].setdefault(name, {"shape": shape, "dtype": kinds[tensor.dtype], "boxes": []})
                    for box, view in boxes:
                        tensors[key_of(section, name, box.start)] = view
                        entry["boxes"].append({"start": box.start, "shape": box.shape, "file": file.name})
    if tensors:
        write_safetensors(file, tensors)
        index["file"] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        write_json(file.with_suffix(".json"), index)


def key_of(section: str, name: str, start) -> str:
    """Of a box in a file: "optimizer/model.norm.weight.exp_avg@0"."""
    return f"{section}/{name}@{','.join(map(str, start))}"


def step_count(optimizer) -> int:
    return max((group.get("step", 0) for group in optimizer.param_groups), default=0)


# -------------------------------------------------------------------------------------------------------------- loading


class Whole(NamedTuple):
    """A saved tensor, as the boxes that lie in the files."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: list[tuple[Box, Tensor]]  # memory-mapped

    def read(self, name: str, wanted: Box, target: Tensor) -> None:
        """Copy a box of it into `target`. ValueError if some of it is in no file."""
        left = target.numel()
        for box, tensor in self.boxes:
            if common := (overlap(box, wanted) if box.shape else box):
                part = tensor[common.within(box)]
                target[common.within(wanted)].copy_(part)
                left -= part.numel()
        if left:
            raise ValueError(f"a part of {name} is in no shard, start {wanted.start}, shape {wanted.shape}")


def saved_tensors(folder: Path, config: ModelConfig, shapes: dict) -> dict[str, dict[str, Whole]]:
    """{"model": {name: Whole}, "optimizer": {name.key: Whole}} of a checkpoint of many processes or of one."""
    if not (folder / "index.json").is_file():
        return plain_tensors(folder, config, shapes)
    index, files, found = read_json(folder / "index.json"), {}, {}
    try:
        for section in ("model", "optimizer"):
            found[section] = {}
            for name, entry in index[section].items():
                boxes = []
                for box in entry["boxes"]:
                    if box["file"] not in files:
                        files[box["file"]] = read_safetensors(folder / box["file"])
                    tensor = files[box["file"]][key_of(section, name, box["start"])]
                    boxes.append((Box(tuple(box["start"]), tuple(box["shape"])), tensor))
                found[section][name] = Whole(tuple(entry["shape"]), DTYPES[entry["dtype"]], boxes)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'index.json'}: not the index of its shards ({error!r})") from None
    return found


def plain_tensors(folder: Path, config: ModelConfig, shapes: dict) -> dict[str, dict[str, Whole]]:
    """The same of one process's checkpoint: a box for each tensor, of stacked experts one for each expert."""
    def one(tensor: Tensor) -> Whole:
        return Whole(tuple(tensor.shape), tensor.dtype, [(Box((0,) * tensor.dim(), tuple(tensor.shape)), tensor)])

    found, adapter = {}, folder / "adapter_model.safetensors"
    saved = read_safetensors(adapter if adapter.is_file() else folder / "model.safetensors")
    if adapter.is_file():  # under PEFT's names; of tied copies one is a parameter
        saved = {name: saved[key] for name in shapes if (key := peft_name(name)) in saved}
    for name, shape in shapes.items():
        names = checkpoint.hf_names(name, torch.empty(shape, device="meta"), config)
        if len(shape) < 3 and name in saved:
            found[name] = one(saved.pop(name))
        elif len(shape) == 3 and all(n in saved for n in names):
            experts = [saved.pop(n) for n in names]
            boxes = [(Box((e, 0, 0), (1, *t.shape)), t[None]) for e, t in enumerate(experts)]
            found[name] = Whole((len(experts), *experts[0].shape), experts[0].dtype, boxes)
    found |= {name: one(tensor) for name, tensor in saved.items()}  # unknown ones, to be named
    states = read_safetensors(folder / "optimizer.safetensors") if (folder / "optimizer.safetensors").exists() else {}
    return {"model": found, "optimizer": {name: one(tensor) for name, tensor in states.items()}}


def peft_name(name: str) -> str:
    """...q_proj.lora_A.default -> base_model.model...q_proj.lora_A.weight; lm_head.modules_to_save.default.weight ->
    base_model.model.lm_head.weight"""
    return lora.PREFIX + re.sub(r"\.(lora_[AB])\.default$", r".\1.weight", name).replace(".modules_to_save.default", "")


@torch.no_grad()
def load_checkpoint(folder, model=None, optimizer=None, run=None) -> dict:
    """Set a run, or a plain model and its optimizer, bit for bit to a checkpoint's, however it was cut -> its state.

    By all ranks, each reading its own part. ValueError: damaged files, another model's, another optimizer's.
    """
    folder = Path(folder)
    if run is None and not (folder / "index.json").is_file():
        return checkpoint.load_checkpoint(folder, model, optimizer)
    from parallel.mesh import Mesh
    mesh = run.mesh if run else Mesh()
    verify(folder, contents=mesh.here == 0)
    config, optimizer = run.config if run else model.config, run.optimizer if run else optimizer
    shapes = kept(run, model)
    saved, state = saved_tensors(folder, config, shapes), read_json(folder / "state.json")
    theirs = state.pop("optimizer")
    for name in sorted(shapes.keys() ^ saved["model"].keys()):
        raise ValueError(f"{folder}: {name} is {'missing' if name in shapes else 'unknown to this model'}")
    for name, shape in shapes.items():
        if (whole := saved["model"][name]).shape != tuple(shape):
            raise ValueError(f"{folder}: {name} is {whole.shape}, but {tuple(shape)} in the model")
    if optimizer is not None and theirs["name"] != type(optimizer).__name__:
        raise ValueError(f"{folder}: {type(optimizer).__name__} cannot go on from {theirs['name']}")
    states = {}  # name -> {key: Whole}
    for name, whole in saved["optimizer"].items():
        states.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = whole

    def read(part: Part, name: str, whole: Whole, tensor: Tensor) -> None:
        for box, view in places(part, tensor, mesh)[1]:
            whole.read(name, box, view)

    if optimizer is not None:
        optimizer.state.clear()
    for part in parts_of(run, model):
        name = part.name if part.name in shapes else part.placement().get("tied")  # a copy in another pipeline stage
        if name is None:  # frozen, beside adapters
            continue
        read(part, name, saved["model"][name], part.piece)
        for key, whole in states.get(name, {}).items() if optimizer is not None and part.whole.requires_grad else []:
            tensor = empty_state(part, whole)
            read(part, f"{name}.{key}", whole, tensor)
            optimizer.state[part.piece][key] = tensor
    step = theirs["step"] if "step" in theirs else max((c.get("step", 0) for c in theirs["counters"]), default=0)
    for group in optimizer.param_groups if optimizer is not None else []:
        group["step"] = step
    if run and run.zero in (1, 2):  # each rank has read its pieces: now they send them round
        for work in [bucket.gather() for bucket in run.sync.buckets]:
            if work is not None:
                work.wait()
    return state


def empty_state(part: Part, whole: Whole) -> Tensor:
    """A tensor for what this rank holds of an optimizer's state; zeros, as its padding must be."""
    shape = part.global_shape()
    if whole.shape == shape:
        return torch.zeros_like(part.piece, dtype=whole.dtype, requires_grad=False)
    own = [k if n == m else m for n, m, k in zip(shape, whole.shape, part.whole.shape)]
    local = own if len(shape) == len(whole.shape) else whole.shape
    return torch.zeros(local, dtype=whole.dtype, device=part.piece.device)


def is_sharded(path) -> bool:
    """Whether a run's newest checkpoint, or a checkpoint, is in shards alone."""
    folder = find_checkpoint(path)
    whole = (folder / name for name in ("model.safetensors", "adapter_model.safetensors"))
    return (folder / "index.json").is_file() and not any(file.is_file() for file in whole)


def load_sharded(path, *, dtype: torch.dtype | None = None, device="cpu", attention: str = "sdpa",
                 kernels: str = "torch") -> CausalLM:
    """The whole model of a checkpoint of many processes, or of a run's newest, in eval mode; see load_model."""
    folder = find_checkpoint(path)
    config = replace(ModelConfig.from_hf(read_json(folder / "config.json")), attention=attention, kernels=kernels)
    saved = read_json(folder / "index.json")["model"]
    if any(".lora_A." in name for name in saved):
        raise ValueError(f"{folder}: shards of adapters alone, for --resume; the run's last checkpoint has the adapter")
    kind = next(iter(saved.values()))["dtype"]
    with torch.device("meta"):
        model = CausalLM(config)
    model = model.to(dtype or DTYPES[kind]).to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    load_checkpoint(folder, model)
    return model.eval()
