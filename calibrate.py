"""Rounding that looks at data: GPTQ and AWQ to four bits and fewer, SmoothQuant to eight-bit weights and activations.

All want the layer's *output* to change little, not W: E = |W X - Q X|^2 = tr((W - Q) H (W - Q)^T), with H = X X^T.

    GPTQ         rounds column after column of W and lets the columns to come make up for each error:
                     e_k = (w_k - q_k) / U_kk,   w_j -= e_k U_kj  for j > k,   H^-1 = U^T U;   then E = sum of e^2
    AWQ          multiplies columns that meet large x by s > 1 before rounding, and divides x by s; then clips outliers
                     s = (mean |x|)^r, r searched for;  s is folded into what comes before (a norm, v, up)
    SmoothQuant  moves what is large in x into W:  s = max|x|^a / max|w|^(1 - a), folded into the norm

    python calibrate.py --model DIR --data text.txt --method gptq --bits 4 --group_size 64 --out DIR4

The model goes through layer by layer: only the hidden states before one layer, of all the calibration text, are in
memory, and later layers see what the rounded ones before them put out. --method also takes the methods that look at no
data (int8, int4, int3, nf4, fp4 ...).

Sources: Frantar et al., GPTQ (arXiv:2210.17323), algorithm 1; Lin et al., AWQ (arXiv:2306.00978), section 3.2;
Xiao et al., SmoothQuant (arXiv:2211.10438), eq. 4.
"""

import contextlib
import itertools
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import find_checkpoint, load_model, save_model
from cli import parse, run
from data.corpus import read_documents
from data.quantized_files import FORMATS, encode
from data.tokenizer import load_tokenizer
from quant import METHODS, affine_codes, affine_grid, linear_layers, model_bytes, quantize_model

DATA_METHODS = ("gptq", "awq", "smoothquant")
AT_ONCE = 8  # windows that run through a layer together
WINDOWS = 128  # what GPTQ, AWQ and SmoothQuant were published with; fewer are warned of


@dataclass
class Args:
    model: str  # folder of a run, a checkpoint or a Hugging Face model
    out: str  # a new folder
    data: list[str] = field(default_factory=list)  # text to calibrate with: files, JSONL, folders
    method: str = "gptq"  # gptq, awq, smoothquant; without data int8 w8a8 llm.int8 fp8 int4 int3 int2 nf4 fp4
    bits: Literal[2, 3, 4] = 4  # gptq, awq
    group_size: int = 64  # weights that share a scale, a multiple of 32; 0: a whole row (gptq, awq, int4, int3, int2)
    symmetric: bool = False  # zero in the middle (gptq, awq, int4, int3, int2)
    act_order: bool = False  # gptq: the columns that matter most first
    group_scales: Literal["updated", "old"] = "updated"  # gptq: of the weights as they are then, or before their block
    damping: float = 0.01  # gptq: share of the mean diagonal that is added to it
    alpha: float = 0.5  # smoothquant: how much of the activations' size goes to the weights, 0.5 to 0.9
    windows: int = 128  # calibration samples
    seq_len: int | None = None  # of a sample; None: the model's context, at most 2048
    format: str = "auto"  # bitsandbytes gptq gptq_v2 awq fbgemm_fp8 glassbox; auto: what most programs read
    resume: Literal["none", "auto"] = "none"  # auto: leaves an --out alone that is finished
    device: str = "cpu"  # or cuda, cuda:1, mps
    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None  # of what is not rounded


# ---------------------------------------------------------------------------------------------------------------- GPTQ


class Rounded(NamedTuple):
    """A weight (N, K) as Int4Linear.set_codes takes it."""

    codes: Tensor  # (N, K) uint8 in 0..2^bits - 1
    scale: Tensor  # (N, groups)
    zero: Tensor  # (N, groups)
    g_idx: Tensor  # (K,) the group of each column
    error: float  # sum of e^2 = tr((W - Q) H (W - Q)^T), H damped


def gptq(w: Tensor, H: Tensor, *, bits: int = 4, group_size: int | None = 64, symmetric: bool = False,
         act_order: bool = False, group_scales: str = "updated", damping: float = 0.01, block: int = 128,
         scale_dtype: torch.dtype | None = torch.float16) -> Rounded:
    """Round w (N, K) given H (K, K), any multiple of X X^T over calibration inputs (GPTQ, algorithm 1).

    act_order: columns with the largest H_kk first, while many others can still make up for them. group_scales: a
    group's scale is taken when its first column is reached, from the "updated" weights; or from the "old" ones, as they
    were when the block began (what the published code does). damping: share of the mean diagonal added to it. block:
    columns after which the updates of all later ones are made up for, in one product. group_size None: the whole row.
    """
    if group_scales not in ("updated", "old"):
        raise ValueError(f"group_scales must be updated or old, not {group_scales!r}")
    wide = torch.promote_types(w.dtype, torch.float32)
    (N, K), W, H = w.shape, w.detach().to(wide, copy=True), H.to(wide, copy=True)
    dead = H.diagonal() == 0  # inputs that never were anything but 0
    H[dead, dead], W[:, dead] = 1, 0
    order = H.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(K, device=w.device)
    W, H = W[:, order], H[order][:, order]
    H.diagonal().add_(damping * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)  # H^-1 = U^T U

    size, middle = group_size or K, 2 ** (bits - 1)
    codes, E = torch.empty(N, K, dtype=torch.uint8, device=w.device), torch.zeros_like(W)
    scales, zeros = [], []
    for start in range(0, K, block):
        end = min(start + block, K)
        now = W[:, start:end].clone()  # the block, updated at every column; W itself is updated when it ends
        for k in range(start, end):
            if k % size == 0:
                group = W[:, k : k + size]
                if group_scales == "updated":
                    rest = W[:, end : k + size] - E[:, start:k] @ U[start:k, end : k + size]  # of a group that goes on
                    group = torch.cat((now[:, k - start : k - start + size], rest), 1)
                scale, zero = affine_grid(group, bits, symmetric, scale_dtype)
                scales.append(scale)
                zeros.append(torch.full_like(scale, middle) if symmetric else zero)
            column = now[:, k - start]
            code = affine_codes(column, scale, zero, bits) + (middle if symmetric else 0)
            codes[:, k] = code
            e = (column - (code.to(wide) - zeros[-1]) * scale) / U[k, k]
            now[:, k - start + 1 :] -= e[:, None] * U[k, k + 1 : end]
            E[:, k] = e
        W[:, end:] -= E[:, start:end] @ U[start:end, end:]
    back = order.argsort()
    g_idx = (torch.arange(K, device=w.device) // size)[back]
    return Rounded(codes[:, back], torch.stack(scales, 1), torch.stack(zeros, 1), g_idx, float(E.square().sum()))


# ----------------------------------------------------------------------------------------------------------------- AWQ


def round_weight(w: Tensor, bits: int, group_size: int | None, symmetric: bool) -> Tensor:
    """w (N, K) as Int4Linear would decode it again: to the nearest, scales in float16."""
    wide = w.to(torch.promote_types(w.dtype, torch.float32))
    groups = in_groups(wide, group_size)
    scale, zero = (None if t is None else t[..., None] for t in affine_grid(groups, bits, symmetric, torch.float16))
    codes = affine_codes(groups, scale, zero, bits).to(wide.dtype)
    return ((codes if symmetric else codes - zero) * scale).flatten(1)[:, :w.shape[1]].to(w.dtype)


def in_groups(x: Tensor, group_size: int | None) -> Tensor:
    """(n, K) -> (n, groups, group_size), the last one filled with zeros."""
    size = group_size or x.shape[1]
    return F.pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size))


def scale_pairs(layer: nn.Module) -> list[tuple[nn.Module, list[str], str]]:
    """(what comes before, the linear layers that read it, the block whose output counts), by AWQ's rules.

    v comes before o only if each value head feeds one query head: with GQA one row of v would have several scales."""
    pairs = [(layer.input_layernorm, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn")]
    attention, mlp = layer.self_attn, layer.mlp
    if attention.v_proj.out_features == attention.o_proj.in_features:
        pairs.append((attention.v_proj, ["self_attn.o_proj"], "self_attn.o_proj"))
    if hasattr(mlp, "gate_proj"):  # an MoE's experts keep their weights
        pairs.append((layer.post_attention_layernorm, ["mlp.gate_proj", "mlp.up_proj"], "mlp"))
        pairs.append((mlp.up_proj, ["mlp.down_proj"], "mlp.down_proj"))
    return pairs


@torch.no_grad()
def fold(before: nn.Module, linears: Iterable[nn.Module], s: Tensor) -> None:
    """Divide what `before` (a norm, or a linear layer) puts out by s (K,), and multiply the linears' columns by it:
    what they compute together does not change."""
    before.weight.div_(s if before.weight.ndim == 1 else s[:, None])
    if getattr(before, "bias", None) is not None:
        before.bias.div_(s)
    for linear in linears:
        linear.weight.mul_(s)


def awq_scale(block: nn.Module, calls: list, linears: list[nn.Module], size: Tensor, rounding: dict):
    """s (K,) = size^r, r of 0, 0.05 ... 0.95, with which rounded `linears` change the block's output least; that error.

    calls: the arguments that the block was called with; size (K,): mean |x| of the linears' input. r = 0 is s = 1,
    plain rounding, so the error is never above that of rounding to the nearest."""
    truth = [block(*args, **kwargs) for args, kwargs in calls]
    kept, best, least = [linear.weight.data for linear in linears], None, float("inf")
    for step in range(20):
        s = size.pow(step / 20).clamp_min(1e-4)
        s = s / (s.max() * s.min()).sqrt()
        for linear, weight in zip(linears, kept):
            linear.weight.data = round_weight(weight * s, **rounding) / s
        error = sum(float((block(*args, **kwargs) - y).square().sum()) for (args, kwargs), y in zip(calls, truth))
        if error < least:
            best, least = s, error
    for linear, weight in zip(linears, kept):
        linear.weight.data = weight
    return best, least


def awq_clip(w: Tensor, x: Tensor, *, bits: int, group_size: int | None, symmetric: bool, rows: int = 64) -> Tensor:
    """w (N, K) with each group clipped to the share 1, 0.95 ... 0.55 of its largest |w| that serves x (T, K) best.

    Error: that of the group's own part of the output. 1 is among them: never worse than no clipping."""
    X = in_groups(x, group_size).transpose(0, 1)  # (groups, T, size)
    clipped = []
    for part in w.split(rows):  # errors are (rows, groups, T): a part of the rows at a time
        W = in_groups(part, group_size)  # (rows, groups, size)
        largest, best, least = W.abs().amax(-1, keepdim=True), W, torch.full(W.shape[:2], float("inf"), device=w.device)
        for step in range(10):
            limit = largest * (1 - step / 20)
            C = torch.maximum(torch.minimum(W, limit), -limit)
            Q = round_weight(C.flatten(0, 1), bits, None, symmetric).view_as(C)
            error = torch.einsum("ngk,gtk->ngt", Q - W, X).square().sum(-1)
            better = error < least
            best, least = torch.where(better[..., None], C, best), torch.where(better, error, least)
        clipped.append(best.flatten(1)[:, :w.shape[1]])
    return torch.cat(clipped)


# ---------------------------------------------------------------------------------------------- a model, layer by layer


class _Stop(Exception):
    """A hook has seen enough: what comes after it need not run."""


def first_states(model: nn.Module, windows: Tensor) -> tuple[Tensor, list]:
    """The hidden states before the first layer (n, S, hidden), and the further arguments of each layer's call.

    windows (n, S) token ids. The arguments (RoPE tables, mask) are those of one window, and the same for all."""
    layers, calls, states = model.model.layers, {}, []

    def note(layer, args, kwargs):
        calls[layer] = args[1:], kwargs

    def stop(layer, args, kwargs):
        states.append(args[0])
        raise _Stop

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    model.hidden(windows[:1])
    hooks.append(layers[0].register_forward_pre_hook(stop, with_kwargs=True))
    for window in windows:
        with contextlib.suppress(_Stop):
            model.hidden(window[None])
    for hook in hooks:
        hook.remove()
    return torch.cat(states), [calls[layer] for layer in layers]


def run_layer(layer: nn.Module, states: Tensor, call, watch: dict | None = None, out: Tensor | None = None) -> None:
    """Run the layer over states (n, S, hidden), some windows at a time, into `out`; before each module of
    `watch` {module: function}, function(args, kwargs) sees what it is called with, and may raise _Stop."""
    hooks = [module.register_forward_pre_hook(lambda _, args, kwargs, f=f: f(args, kwargs), with_kwargs=True)
             for module, f in (watch or {}).items()]
    for i in range(0, len(states), AT_ONCE):
        with contextlib.suppress(_Stop):
            y = layer(states[i : i + AT_ONCE], *call[0], **call[1])
            if out is not None:
                out[i : i + AT_ONCE] = y
    for hook in hooks:
        hook.remove()


@contextlib.contextmanager
def remembered(module: nn.Module, calls: int):
    """Inside, `module` computes what its first `calls` calls ask for, and from then on puts out the same over again."""
    outputs, count, forward = [], itertools.count(), module.forward

    def recall(*args, **kwargs):
        turn = next(count)
        if turn < calls:
            outputs.append(forward(*args, **kwargs))
        return outputs[turn % calls]

    module.forward = recall  # hides the class's
    try:
        yield
    finally:
        del module.forward


def sharing(layer: nn.Module, states: Tensor, call, linears: dict[str, nn.Linear]) -> list[list[str]]:
    """The names of the linear layers in groups that read the very same tensor: q, k and v; gate and up."""
    readers = {}

    def note(name):
        def f(args, kwargs):  # the tensor is kept alive, so that no later one gets its id
            readers.setdefault(id(args[0]), (args[0], []))[1].append(name)
        return f

    run_layer(layer, states[:1], call, {module: note(name) for name, module in linears.items()})
    return [names for _, names in readers.values()]


@torch.no_grad()
def calibrate(model: nn.Module, windows: Tensor, method: str = "gptq", *, bits: int = 4, group_size: int | None = 64,
              symmetric: bool = False, act_order: bool = False, group_scales: str = "updated", damping: float = 0.01,
              alpha: float = 0.5, search_windows: int = 32, report=lambda line: None) -> nn.Module:
    """Quantize a model.CausalLM in place by "gptq", "awq" or "smoothquant", from calibration windows (n, S) of tokens.

    gptq and awq put Int4Linear in, smoothquant Int8Linear with rounded activations. alpha: SmoothQuant's.
    search_windows: how many AWQ's search looks at (it runs each block 20 times). report: gets a line for each layer.
    """
    if method not in DATA_METHODS:
        raise ValueError(f"method must be {', '.join(DATA_METHODS)}, not {method!r}")
    rounding = dict(bits=bits, group_size=group_size, symmetric=symmetric)
    model.eval()
    states, calls = first_states(model, windows)
    for number, (layer, call) in enumerate(zip(model.model.layers, calls)):
        linears = linear_layers(layer)
        if method == "gptq":
            settings = dict(act_order=act_order, group_scales=group_scales, damping=damping, **rounding)
            error = _gptq_layer(layer, states, call, linears, settings)
        elif method == "awq":
            error = _awq_layer(layer, states[:search_windows], call, linears, rounding)
        else:
            error = _smooth_layer(layer, states, call, alpha)
            quantize_model(layer, "w8a8")
        if method != "gptq":
            run_layer(layer, states, call, out=states)
        report(f"layer {number}: {error}")
    return model


def _gptq_layer(layer, states, call, linears, settings) -> str:
    """q, k and v first, then o on what they put out when rounded, then gate and up, then down; the states at the end."""
    groups = sharing(layer, states, call, linears)
    early = [names for names in groups if names[0].startswith("self_attn.")]
    errors = [_gptq_group(layer, states, call, names, **settings) for names in early]
    with remembered(layer.self_attn, -(-len(states) // AT_ONCE)):  # it is done: else it would run three times more
        errors += [_gptq_group(layer, states, call, names, **settings) for names in groups if names not in early]
        run_layer(layer, states, call, out=states)
    return ", ".join(errors)


def _gptq_group(layer, states, call, names, act_order, group_scales, damping, **rounding) -> str:
    """Round the linear layers `names`, which read the same tensor."""
    first, errors = layer.get_submodule(names[0]), []
    K = first.in_features
    H = torch.zeros(K, K, dtype=torch.promote_types(states.dtype, torch.float32), device=states.device)

    def add(args, kwargs):
        x = args[0].flatten(0, -2).to(H.dtype)
        H.addmm_(x.t(), x, alpha=2 / (states.shape[0] * states.shape[1]))  # H = (2 / n) sum x x^T
        raise _Stop  # what comes after is of no use now

    run_layer(layer, states, call, {first: add})
    for name in names:
        rounded = gptq(layer.get_submodule(name).weight, H, act_order=act_order, group_scales=group_scales,
                       damping=damping, **rounding)
        quantize_model(layer, "int4", layers=[name], act_order=act_order, **rounding)
        layer.get_submodule(name).set_codes(*rounded[:3], rounded.g_idx if act_order else None)
        errors.append(f"{name} {rounded.error:.3g}")
    return ", ".join(errors)


def _awq_layer(layer, states, call, linears, rounding) -> str:
    pairs, calls, errors = scale_pairs(layer), {}, []
    for _, _, name in pairs:
        calls[layer.get_submodule(name)] = []
    run_layer(layer, states, call,
              {block: (lambda args, kwargs, seen=seen: seen.append((args, kwargs))) for block, seen in calls.items()})
    found = []
    for before, names, name in pairs:  # all searches come before the first fold: the calls are of the layer as it was
        block = layer.get_submodule(name)
        size = torch.cat([args[0].abs().flatten(0, -2) for args, _ in calls[block]]).mean(0)
        s, error = awq_scale(block, calls[block], [linears[n] for n in names], size, rounding)
        found.append((before, [linears[n] for n in names], s))
        errors.append(f"{name} {error:.3g}")
    for before, readers, s in found:
        fold(before, readers, s)
    calls.clear()
    seen, every = {name: [] for name in linears}, max(1, len(states) * states.shape[1] // 512)  # 512 tokens serve
    run_layer(layer, states, call, {module: (lambda args, kwargs, n=name: seen[n].append(args[0].flatten(0, -2)))
                                    for name, module in linears.items()})
    for name, linear in linears.items():
        if not name.endswith(("q_proj", "k_proj")):  # q . k is too sensitive to clipping
            linear.weight.data = awq_clip(linear.weight, torch.cat(seen[name])[::every], **rounding)
    quantize_model(layer, "int4", layers=list(linears), **rounding)
    return ", ".join(errors)


def smooth_scale(largest_x: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """s (K,) = max|x_k|^alpha / max|w_k|^(1 - alpha), over all weights (N, K) that read x (SmoothQuant, eq. 4)."""
    largest_w = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp_min(1e-5)
    return (largest_x.clamp_min(1e-5) ** alpha / largest_w ** (1 - alpha)).clamp_min(1e-5)


def _smooth_layer(layer, states, call, alpha) -> str:
    pairs = [pair for pair in scale_pairs(layer) if pair[0].weight.ndim == 1]  # only norms take an s in without a cost
    largest = {}

    def note(name):
        def f(args, kwargs):
            x = args[0].abs().flatten(0, -2).amax(0)
            largest[name] = torch.maximum(largest.get(name, x), x)
        return f

    run_layer(layer, states, call, {layer.get_submodule(name): note(name) for _, _, name in pairs})
    for before, names, name in pairs:
        linears = [layer.get_submodule(n) for n in names]
        fold(before, linears, smooth_scale(largest[name], [linear.weight for linear in linears], alpha))
    return ", ".join(f"{name}: |x| up to {float(x.max()):.3g}" for name, x in largest.items())


# --------------------------------------------------------------------------------------------------------- command line


def calibration_windows(texts: Iterable[str], tokenizer, seq_len: int, count: int = WINDOWS) -> Tensor:
    """The first `count` windows (n, seq_len) of the texts, each after a begin (or end) token, end to end.

    Too little text for `count` is warned of; too little for one is a ValueError."""
    separator = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = []
    for text in texts:
        ids += ([] if separator is None else [separator]) + tokenizer.encode(text)
        if len(ids) >= count * seq_len:
            break
    n = min(len(ids) // seq_len, count)
    if n == 0:
        raise ValueError(f"{len(ids)} tokens of calibration text are too few for one sample of {seq_len}: --seq_len")
    if n < WINDOWS:
        print(f"warning: {n} calibration samples of {seq_len} tokens; {WINDOWS} are usual", file=sys.stderr)
    return torch.tensor(ids[:n * seq_len]).view(n, seq_len)


def save_quantized(directory, model: nn.Module, tokenizer=None, format: str = "auto") -> dict:
    """Write a folder as data/quantized_files.py lays it out, whole or not at all; returns its quantization_config."""
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty: choose another folder")
    _, quantization = encode(model, format)  # ValueError before anything is written
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".tmp-{directory.name}-{os.getpid()}")
    try:
        temporary.mkdir()
        save_model(temporary, model, tokenizer, format)
        if directory.exists():
            directory.rmdir()
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return quantization


def main(argv: list[str] | None = None) -> None:
    args = parse(Args, __doc__, argv)
    looks = args.method in DATA_METHODS
    if not looks and args.method not in METHODS.keys() - {"qat", "bitnet"}:  # those two are trained
        raise ValueError(f"--method {args.method}: must be gptq, awq, smoothquant, or one of quant.METHODS")
    if args.format not in ("auto", *FORMATS):
        raise ValueError(f"--format {args.format}: must be auto, {', '.join(FORMATS)}")
    if looks != bool(args.data):
        raise ValueError(f"--data: {args.method} {'needs text to calibrate with' if looks else 'looks at no text'}")
    if args.group_size < 0 or args.group_size % 32:
        raise ValueError(f"--group_size {args.group_size}: must be a multiple of 32, or 0 for a whole row")
    if args.resume == "auto" and (Path(args.out) / "config.json").is_file():  # it came whole, by one renaming
        print(f"{args.out}: finished, nothing to do")
        return
    if Path(args.out).exists() and (not Path(args.out).is_dir() or any(Path(args.out).iterdir())):
        raise ValueError(f"--out {args.out}: is not empty; choose another")
    folder = find_checkpoint(args.model)
    model = load_model(folder, dtype=args.dtype and getattr(torch, args.dtype), device=args.device)
    try:
        tokenizer = load_tokenizer(folder)
    except FileNotFoundError:
        tokenizer = None
    before = model_bytes(model)
    rounding = dict(group_size=args.group_size or None, symmetric=args.symmetric)
    if looks:
        if tokenizer is None:
            raise ValueError(f"{folder}: has no tokenizer, which calibration text needs")
        seq_len = args.seq_len or min(model.config.max_position_embeddings, 2048)
        texts = (document.text for document in read_documents(args.data))
        windows = calibration_windows(texts, tokenizer, seq_len, args.windows).to(args.device)
        calibrate(model, windows, args.method, bits=args.bits, act_order=args.act_order, alpha=args.alpha,
                  group_scales=args.group_scales, damping=args.damping, **rounding,
                  report=lambda line: print(line, file=sys.stderr))
    else:
        quantize_model(model, args.method, **(rounding if METHODS[args.method][0].__name__ == "Int4Linear" else {}))
    quantization = save_quantized(args.out, model, tokenizer, args.format)
    size = (Path(args.out) / "model.safetensors").stat().st_size
    kind = quantization["quant_method"]
    print(f"{args.out}: a {kind} folder of {size:,} bytes; in memory {before:,} -> {model_bytes(model):,}")
    if kind == "glassbox":
        print("note: its shapes or bits fit no format of other programs; only this project reads it", file=sys.stderr)


if __name__ == "__main__":
    run(main)
