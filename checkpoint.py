"""Checkpoints that survive any kill: safetensors and JSON files, in folders that every Hugging Face tool can open.

    out/latest              the name of the newest folder: step_00000240
    out/step_00000240/      config.json, generation_config.json, model.safetensors, tokenizer: a Hugging Face folder
                            optimizer.safetensors ("<parameter>.<key>"), state.json: what resuming needs besides
                            manifest.json {"files": {name: {"bytes", "sha256"}}}: the proof that all of it is there

A folder is written under a temporary name, synced to the disk and renamed; only then does `latest` name it. Whenever
the process is killed, `latest` names a whole checkpoint (the tests kill it at every step).

    save_checkpoint("out/x", 240, model=model, optimizer=optimizer, tokenizer=tokenizer, state={"tokens": 9})
    state = load_checkpoint(latest("out/x"), model, optimizer)
    model = load_model("a/hugging-face/folder", dtype=torch.bfloat16)
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor

import lora
from data.chat import stop_ids
from data.quantized_files import encode, install
from hf_config import extend_context
from model import CausalLM, ModelConfig
from quant import quantize_model
from tensor_files import (DTYPES, Boxes, Entry, atomic_file, read_distributed, read_json, read_safetensors,
                          read_safetensors_header, sha256, sync_folder, write_json, write_safetensors)

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DISTRIBUTED = "shard-*-model-*.safetensors"  # of PyTorch's distributed checkpoints, a file for each rank
IMPLIED = (".rotary_emb.inv_freq",)  # a buffer in old files; config.json says as much

# ------------------------------------------------------------------------------------------------- Hugging Face folders


def hf_names(name: str, parameter: Tensor, config: ModelConfig) -> list[str]:
    """The names in a Hugging Face folder of a parameter, or of each expert in a stack of them, in order.

    mlp.experts.up_proj (E, out, in) -> mlp.experts.0.up_proj.weight ...; in Mixtral block_sparse_moe.experts.0.w3 ...
    """
    stem, _, matrix = name.rpartition(".")
    names = [f"{stem}.{e}.{matrix}.weight" for e in range(len(parameter))] if parameter.dim() == 3 else [name]
    if config.model_type == "mixtral":
        for ours, its in ((".mlp.", ".block_sparse_moe."), ("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            names = [name.replace(ours, its) for name in names]
    return names


def hf_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's parameters under their names in a Hugging Face folder, as views: to read from, or to write into."""
    found = {}
    for name, parameter in model.named_parameters():
        p = parameter.detach()
        found |= zip(hf_names(name, p, model.config), p if p.dim() == 3 else [p])
    return found


def save_model(folder, model: CausalLM, tokenizer=None, format: str = "auto") -> None:
    """Write a Hugging Face folder, tied weights once; of a model with adapters a PEFT folder, the adapter alone.

    Quantized layers are written as data/quantized_files.py lays them out in that format."""
    folder = Path(folder)
    if tokenizer is not None:
        tokenizer.save(folder)
    if lora.adapted(model):
        return lora.save_adapter(model, folder)
    config = model.config.to_hf() | {"torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    config |= {name: getattr(tokenizer, name, None) for name in SPECIAL_IDS if config[name] is None}
    codes, quantization = encode(model, format)  # {} and None without layers of quant.py
    write_json(folder / "config.json", config | ({"quantization_config": quantization} if codes else {}))
    ends = {name: config[name] for name in SPECIAL_IDS if config[name] is not None}
    write_json(folder / "generation_config.json", ends)
    write_safetensors(folder / "model.safetensors", hf_tensors(model) | codes, {"format": "pt"})


def load_model(folder, *, dtype: torch.dtype | None = None, device="cpu", attention: str = "sdpa",
               kernels: str = "torch", seq_len: int = 1, rope_scaling: str | None = None,
               mapped: bool = False) -> CausalLM:
    """The model of a Hugging Face folder, of a family in model.FAMILIES; in eval mode. Its weights may lie in several
    files, also of a distributed checkpoint of PyTorch's (in safetensors, see read_distributed).

    dtype: to convert to; None keeps the file's. seq_len, rope_scaling: see extend_context. Takes the memory of the
    model and, in passing, of one tensor; mapped=True leaves the weights in the file, to be read as they are used (but
    experts and what is converted). ValueError for what is no such folder, a config.json that model.py cannot honour,
    and tensors missing, unknown or of another shape.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: not a Hugging Face model folder: no config.json")
    if (folder / "manifest.json").is_file():
        verify(folder, contents=False)
    try:
        values = read_json(folder / "config.json")
        if (folder / "generation_config.json").is_file():  # what ends a text stands there, often several tokens
            ends = read_json(folder / "generation_config.json")
            values |= {name: ends[name] for name in SPECIAL_IDS if ends.get(name) is not None}
        quantization = values.pop("quantization_config", None)
        config = ModelConfig.from_hf(values)
        config = dataclasses.replace(config, attention=attention, kernels=kernels)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{folder}: no model can be built from its config.json: {error}") from None
    config = extend_context(config, seq_len, rope_scaling)
    with torch.device("meta"):  # shapes only: the weights come from the file
        model = CausalLM(config)
    entries = {name: entry for name, entry in _entries(folder).items() if not name.endswith(IMPLIED)}
    if quantization:
        rest = install(model, quantization, {name: entry.read() for name, entry in entries.items()}, quantize_model)
        entries = {name: entries[name] for name in rest}
    table = "model.embed_tokens.weight"
    head = entries.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    _check(folder, entries, hf_tensors(model))
    if head is not None and not torch.equal(head.read(), entries[table].read()):
        raise ValueError(f"{folder}: config.json ties lm_head.weight to {table}, but the two differ")
    weights, maps = {}, {}  # maps: file -> its tensors
    for name, p in model.named_parameters():
        parts = [entries[part] for part in hf_names(name, p, config)]
        weight_dtype = dtype or parts[0].dtype
        whole = weight_dtype == parts[0].dtype and not config.num_experts and not quantization  # of codes there are copies
        at_once = (mapped or whole) and isinstance(parts[0], Entry)  # no memory is spent in passing
        if at_once and p.dim() < 3 and str(device) == "cpu":
            maps[parts[0].path] = maps.get(parts[0].path) or read_safetensors(parts[0].path, mapped)
            weights[name] = maps[parts[0].path][hf_names(name, p, config)[0]].to(weight_dtype)
        else:
            weights[name] = torch.empty(p.shape, dtype=weight_dtype, device=device)
            for part, target in zip(parts, weights[name] if p.dim() == 3 else [weights[name]]):
                part.read(target)
    model.load_state_dict(weights, strict=False, assign=True)  # not strict about a tied head only; _check was
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device).eval()  # quantized layers, too


def open_model(path, **how) -> CausalLM:
    """load_model of find_checkpoint(path); of an adapter's folder its base, the adapter merged: plain too."""
    folder = find_checkpoint(path)
    if not (folder / "adapter_config.json").is_file():
        return load_model(folder, **how)
    settings, tensors = lora.read_peft(folder)
    if not (base := settings.get("base_model_name_or_path")) or not Path(base).is_dir():
        raise ValueError(f"{folder}: an adapter of {base!r}, and there is no such folder here")
    model = open_model(base, **how)
    rows = [len(tensor) for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")]
    grow_vocabulary(model, max([model.config.vocab_size, *rows]))
    return lora.merge_lora(lora.load_adapter(model, folder), final=True).requires_grad_(True).eval()


def load_chat_model(path, tokenizer, template: str, *, seq_len: int = 1, load_in: str = "",
                    adapter: lora.LoRAConfig | None = None, seed: int = 0, **how) -> CausalLM:
    """open_model(path), made ready for conversations that `tokenizer` (see prepare_tokenizer) renders.

    Its vocabulary grows by the tokens that the template added, and its turns end where the template's do. load_in: how
    to quantize it (quant.METHODS); adapter, seed: what lora.apply_lora puts on. `how`, ValueError: as in load_model."""
    model = open_model(path, seq_len=seq_len, **how)
    new = fit_to_chat(model, tokenizer, template)
    model = quantize_model(model, load_in) if load_in else model
    if adapter is not None:
        more = {"modules_to_save": ["embed_tokens", "lm_head"]} if new > 0 else {}  # new rows, alike, would stay alike
        more["base_model"] = str(find_checkpoint(path).resolve())
        lora.apply_lora(model, dataclasses.replace(adapter, **more), seed=seed)
    return model


def fit_to_chat(model: CausalLM, tokenizer, template: str) -> int:
    """Give the model the template's new tokens and its ends of turns, in place -> how many tokens are new."""
    if (new := tokenizer.vocab_size - model.config.vocab_size) > 0:
        grow_vocabulary(model, tokenizer.vocab_size)
        print(f"the embedding grew by {new} tokens, each the mean of all others", file=sys.stderr)
    model.config.eos_token_id = sorted(stop_ids(tokenizer, template))
    return max(new, 0)


@torch.no_grad()
def grow_vocabulary(model: CausalLM, vocab_size: int) -> None:
    """Give the model rows for new tokens, in place: each the mean of the old ones, so that none starts out likely."""
    for module, name in ((model.model.embed_tokens, "embed_tokens"), (model.lm_head, "lm_head")):
        old = module.weight
        if len(old) < vocab_size:  # a tied head has grown already
            new = old.mean(dim=0, keepdim=True).expand(vocab_size - len(old), -1)
            module.weight = torch.nn.Parameter(torch.cat((old, new)))
        if name == "embed_tokens" and model.config.tie_word_embeddings:
            model.lm_head.weight = module.weight
    model.model.embed_tokens.num_embeddings = model.lm_head.out_features = model.config.vocab_size = vocab_size


def _entries(folder: Path) -> dict[str, Entry | Boxes]:
    """{name: where its numbers are}."""
    entries = {}
    if (shards := sorted(folder.glob(DISTRIBUTED))) and not (folder / "model.safetensors").is_file():
        tensors, first = read_distributed(shards), "model.embed_tokens.weight"
        root = next((name.removesuffix(first) for name in tensors if name.endswith(f".{first}")), "")  # of nested dicts
        return {name.removeprefix(root): entry for name, entry in tensors.items()
                if name.startswith((f"{root}model.", f"{root}lm_head."))}  # the optimizer stays out
    for file in _weight_files(folder):
        header, _, start = read_safetensors_header(file)
        if twice := header.keys() & entries.keys():
            raise ValueError(f"{folder}: {min(twice)} stands in {file.name} and in {entries[min(twice)].path.name}")
        entries |= {name: Entry(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0])
                    for name, entry in header.items()}
    return entries


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():
        names = {"model.safetensors"}
    else:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index}: weight_map must map tensors to files")
        names = set(weight_map.values())
    for name in names:
        if not (folder / name).is_file():
            pickled = next((p.name for p in sorted(folder.glob("*")) if p.suffix in (".bin", ".pt", ".pth")), None)
            raise ValueError(f"{folder / name} is missing" + (
                f"; {pickled} is pickle, which can run code and is not read: open the folder once with transformers "
                "and write it by save_pretrained(folder, safe_serialization=True)" if pickled else ""))
    return [folder / name for name in sorted(names)]


def _check(where: Path, tensors: dict, parameters: dict[str, Tensor], dtypes: bool = False) -> None:
    """ValueError unless `tensors` are the model's parameters by name, shape and, if asked for, dtype."""
    missing, unknown = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    for names, what in ((missing, "missing"), (unknown, "unknown")):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise ValueError(f"{where}: {what} tensors: {', '.join(names[:4])}{more}")
    for name, p in parameters.items():
        t = tensors[name]
        if t.shape != p.shape or (t.dtype != p.dtype if dtypes else not t.is_floating_point()):
            theirs, ours = f"{t.dtype} {tuple(t.shape)}", f"{p.dtype} {tuple(p.shape)}"
            raise ValueError(f"{where}: {name} is {theirs}, but {ours} in the model")


# ---------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(out, step: int, *, model, optimizer, tokenizer, state: dict, keep_last: int = 0, keep=()) -> Path:
    """Write out/step_XXXXXXXX, let `latest` name it, remove what is no longer wanted; returns the folder.

    state: JSON values, for load_checkpoint to return. keep_last: how many folders stay (0: all), besides those of the
    steps in `keep`. Folders of later steps go: a run resumed from an earlier one abandons them. model: the bare one,
    not torch.compile's wrapper. Raises OSError, the previous checkpoint being intact, when the disk is full.
    """
    out, name = Path(out), f"step_{step:08d}"
    temporary = out / f".tmp-{name}-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
        temporary.mkdir()
        tensors, description = _describe(model, optimizer)
        save_model(temporary, model, tokenizer)
        write_safetensors(temporary / "optimizer.safetensors", tensors)
        write_json(temporary / "state.json", state | {"step": step, "optimizer": description})
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(temporary.iterdir())}
        write_json(temporary / "manifest.json", {"files": files})
        put_in_place(temporary, out / name)
    except OSError as error:
        intact = f"; the previous checkpoint {latest(out)} is intact" if latest(out) else ""
        raise OSError(f"cannot write checkpoint {out / name}: {error.strerror or error}{intact}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    remove_old(out, step, keep_last, keep)
    return out / name


def load_checkpoint(folder, model, optimizer=None) -> dict:
    """Set model and optimizer in place, bit for bit, to what was saved; returns save_checkpoint's `state` and "step".

    All is checked before anything changes. ValueError names the file that was truncated, edited or lost, and the newest
    intact checkpoint before it; or the tensor that does not fit. The optimizer's tensors and counters are restored; its
    settings (lr, betas ...) stay as they were built, so that a flag changed on resuming counts.
    """
    folder = Path(folder)
    verify(folder)
    parameters, file, weights = dict(model.named_parameters()), folder / "model.safetensors", hf_tensors
    if adapted := lora.adapted(model):
        file, weights = folder / "adapter_model.safetensors", lora.adapter_tensors
        bases = {config.base_model for module in adapted.values() for config in module.config.values()}
        if (base := read_json(folder / "adapter_config.json")["base_model_name_or_path"]) not in bases:
            raise ValueError(f"{folder}: an adapter of {base}; the model was loaded from {min(bases)}")
    saved, weights = read_safetensors(file), weights(model)
    _check(file, saved, weights, dtypes=True)
    state = read_json(folder / "state.json")
    theirs = state.pop("optimizer")
    if optimizer is not None:
        _, ours = _describe(model, optimizer)
        if (ours["name"], ours["params"]) != (theirs["name"], theirs["params"]):
            raise ValueError(f"{folder}: {ours['name']} cannot go on from {theirs['name']}, or from other groups")
        optimizer.state.clear()
        for key, tensor in read_safetensors(folder / "optimizer.safetensors").items():
            name, _, key = key.rpartition(".")
            optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device, copy=True)
        for group, counters in zip(optimizer.param_groups, theirs["counters"]):
            group.update(counters)
    for name, weight in weights.items():
        weight.copy_(saved[name])
    return state


def read_state(folder) -> dict:
    """The state alone that load_checkpoint would return, at once: only the sizes of the files are checked."""
    verify(folder, contents=False)
    return {key: value for key, value in read_json(Path(folder) / "state.json").items() if key != "optimizer"}


def _describe(model, optimizer) -> tuple[dict[str, Tensor], dict]:
    """An optimizer's tensors by name; and for JSON its kind, its groups' parameters and counters (their integers)."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"{names[p]}.{key}": tensor for p, values in optimizer.state.items() for key, tensor in values.items()}
    params = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    counters = [{key: value for key, value in group.items() if type(value) is int} for group in optimizer.param_groups]
    return tensors, {"name": type(optimizer).__name__, "counters": counters, "params": params}


def put_in_place(temporary: Path, final: Path) -> None:
    """Rename a whole, synced folder, then let `latest` name it. At no moment does `latest` name what is not there."""
    out = final.parent
    if final.exists():
        if latest(out) == final:  # the step is saved once more: meanwhile `latest` names a copy of the old one
            copy = out / f"{final.name}.old"
            shutil.copytree(final, copy, copy_function=_link)
            _point(out, copy)
        _discard(final)
    os.replace(temporary, final)
    _point(out, final)


def _point(out: Path, folder: Path) -> None:
    sync_folder(out)  # the folder's own name must not reach the disk after this one
    with atomic_file(out / "latest") as file:
        file.write(folder.name.encode())


def _link(source, target) -> None:
    try:
        os.link(source, target)  # a second name for the same bytes: costs nothing
    except OSError:
        shutil.copy2(source, target)  # a file system without hard links


def _discard(folder: Path) -> None:
    """Remove a folder; under its own name it is whole or gone, never half there."""
    trash = folder.with_name(f".tmp-{folder.name}-old")
    os.replace(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)  # what resists is swept at the next save


def remove_old(out: Path, step: int, keep_last: int, keep=()) -> None:
    """Of the checkpoints besides this step's, those in `keep` and the `keep_last` newest stay (0: all up to it)."""
    folders = step_folders(out)
    wanted = {step, *keep, *[n for n in folders if n <= step][-keep_last:]}  # [-0:] is all of them
    for n in folders.keys() - wanted:
        _discard(folders[n])
    sweep(out)


def sweep(out: Path) -> None:
    """Remove what killed runs left."""
    for folder in (*out.glob(".tmp-step_*"), *out.glob("step_*.old")):
        if folder != latest(out):
            shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- finding and checking


def step_folders(out) -> dict[int, Path]:
    """A run's checkpoints by step, in order."""
    return {int(path.name[5:]): path for path in sorted(Path(out).glob("step_*")) if path.name[5:].isdecimal()}


def damage(folder: Path, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, in one line, or None. `contents=False` compares only the sizes of its files."""
    try:
        files = read_json(folder / "manifest.json")["files"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{folder} is not a whole checkpoint: no manifest.json in it"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / 'manifest.json'} is damaged"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if (found := path.stat().st_size) != size:
            return f"{path} is {'truncated' if found < size else 'damaged'}: {found} bytes instead of {size}"
        if contents and sha256(path) != digest:
            return f"{path} is damaged: it changed since it was written"
    return None


def verify(folder, contents: bool = True) -> None:
    """ValueError if a checkpoint is not as it was written: which file, and the newest intact checkpoint before it."""
    folder = Path(folder)
    if why := damage(folder, contents):
        step = re.match(r"step_(\d+)", folder.name)
        older = [path for n, path in step_folders(folder.parent).items() if step and n < int(step[1])]
        intact = next((path for path in reversed(older) if damage(path) is None), None)
        offer = f"resume with --resume {intact}" if intact else "no earlier checkpoint is intact"
        raise ValueError(f"{why}; {offer}")


def latest(out) -> Path | None:
    """The checkpoint that a run's file `latest` names, None without such a file. `verify` tells whether it is whole."""
    try:
        return Path(out) / (Path(out) / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def resume_point(out, resume: str, flags: dict, fixed: set[str]) -> Path | None:
    """The checkpoint that a stage with `--out out --resume resume` goes on from; None to start afresh.

    ValueError if `none` meets a folder in use, or if one of the flags `fixed`, without which a run is not itself, is
    not as in out/args.json.
    """
    out = Path(out)
    if resume == "none":
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"--out {out} is not empty: go on from it with --resume auto, or choose another")
        return None
    before = read_json(out / "args.json") if (out / "args.json").exists() else flags
    for name in sorted(fixed):
        if flags[name] != before.get(name):
            raise ValueError(f"--{name} {flags[name]}: the run in {out} was started with {before.get(name)}")
    return latest(out) if resume == "auto" else find_checkpoint(resume)


def catch_signals() -> list[int]:
    """From now on Ctrl-C and SIGTERM fill the list, for the loop to look at; a second one stops at once."""
    caught = []

    def handler(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    return caught


def find_checkpoint(path) -> Path:
    """A run's folder -> its newest checkpoint; a checkpoint or Hugging Face folder -> itself; else ValueError."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    if any((path / name).is_file() for name in ("config.json", "manifest.json", "adapter_config.json")):
        return path
    if any(path.glob(DISTRIBUTED)):
        raise ValueError(f"{path}: a distributed checkpoint, of weights alone: put the model's config.json and its "
                         "tokenizer into it")
    if (path / ".metadata").is_file():
        raise ValueError(f"{path}: a distributed checkpoint in pickle, which can run code and is not read: load it once "
                         "where it was made and save it with torch.distributed.checkpoint's HuggingFaceStorageWriter")
    newest = latest(path)
    if newest is None:
        raise ValueError(f"{path}: neither a run with checkpoints nor a model: no `latest` and no config.json in it")
    verify(newest, contents=False)
    return newest
