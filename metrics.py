"""What a run leaves to be read: metrics.jsonl, the progress line, the loss-spike watch and report.html.

metrics.jsonl holds one JSON object per line, appended as it happens: {"kind": "train", "step": 240, "loss": 1.83, ...}.
Floats keep all their digits. It is strict JSON, which has no NaN: a value that is not finite is written as null and is
read back as None; in the report it is a gap in the curve. `tokens` and `seconds` count from the start of the run.

    python metrics.py out/pretrain        # writes out/pretrain/report.html anew
"""

import html
import json
import math
import os
import sys
import time
from pathlib import Path

import torch

# -------------------------------------------------------------------------------------------------------- metrics.jsonl


def append_row(path, row: dict) -> None:
    """Add one line to `path`, in one write. After a kill call `drop_rows_after` first: it mends a torn line."""
    strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(strict, allow_nan=False) + "\n")


def _parse(path) -> list[tuple[bytes, dict]]:
    """The (line without its newline, row) of each row. A kill may tear the last line, so there alone it is left out."""
    lines, rows = Path(path).read_bytes().split(b"\n"), []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            if number == len(lines):  # no newline after it: torn
                break
            raise ValueError(f"{path}:{number}: not a JSON object; each line of a metrics file must be one") from None
        rows.append((line, row))
    return rows


def read_rows(path) -> list[dict]:
    """All rows of `path`, but a half-written last line. ValueError names file and line of any other malformed one."""
    return [row for _, row in _parse(path)]


def drop_rows_after(path, step: int) -> None:
    """Keep the rows up to `step`, byte for byte, and no torn last line: for resume and rollback.

    Atomic; a file that needs no change, or is not there, is left alone.
    """
    if not os.path.exists(path):
        return
    kept = b"".join(line + b"\n" for line, row in _parse(path) if row.get("step", 0) <= step)
    if kept != Path(path).read_bytes():
        _write_atomically(path, kept)


def _write_atomically(path, data: bytes) -> None:
    """All of `data` or nothing, whenever the process dies: a temporary file in the same folder, fsync, rename."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there only if something failed


# ---------------------------------------------------------------------------------------------- memory, FLOPs, progress


def detect_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is the first of cuda, mps, cpu that is there. ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # unknown name, no driver, no such index, torch built without CUDA
        raise ValueError(f"--device {name}: not on this machine, or not in this build of torch (cpu is)") from None


def memory_bytes(device) -> int:
    """Peak memory so far: allocated on a CUDA device; elsewhere this process's largest resident size."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux: its ru_maxrss would start at the size of the process that forked us
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0  # Windows: the standard library cannot tell; 0 means not measured
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, else KiB


# Published dense peaks in TFLOP/s (no 2:4 sparsity; 16 bits accumulated in float32), from NVIDIA's data sheets and
# white papers. The first key whose words are all in the device's name counts.
#   the name     bf16   fp16   tf32   fp32  fp64 (on tensor cores where it has such)
GPU_TFLOPS = {
    "B200":      (2250,  2250,  1125,  75,   37),
    "H200 NVL":  (835.5, 835.5, 417.5, 60,   60),
    "H200":      (989.4, 989.4, 494.7, 66.9, 66.9),
    "H100 PCIe": (756,   756,   378,   51.2, 51.2),
    "H100 NVL":  (835.5, 835.5, 417.5, 60,   60),
    "H100":      (989.4, 989.4, 494.7, 66.9, 66.9),
    "A100":      (312,   312,   156,   19.5, 19.5),
    "L40S":      (362,   362,   183,   91.6, None),
    "V100 SXM2": (None,  125,   None,  15.7, 7.8),
    "RTX 4090":  (165.2, 165.2, 82.6,  82.6, None),
    "RTX 3090":  (71,    71,    35.6,  35.6, None),
}  # fmt: skip


def peak_flops(device, dtype: torch.dtype | str, name: str | None = None) -> float | None:
    """Published dense matmul FLOP/s of a CUDA device in `dtype`, or None where none is known here (on a CPU, say).

    float32 counts as TF32 where torch.set_float32_matmul_precision allows that. `name` stands in for the device's own.
    """
    if name is None and torch.device(device).type != "cuda":
        return None
    words = set((name or torch.cuda.get_device_name(device)).replace("-", " ").upper().split())
    column = ("bfloat16", "float16", "tf32", "float32", "float64").index(str(dtype).removeprefix("torch."))
    for key, peaks in GPU_TFLOPS.items():
        if set(key.upper().split()) <= words and not words & {"LAPTOP", "D", "TI"}:  # other chips of the same number
            if column == 3 and peaks[2] and torch.get_float32_matmul_precision() != "highest":
                column = 2
            return peaks[column] and peaks[column] * 1e12
    return None


def measured_peak_flops(dtype: torch.dtype | str, size: int = 1024, seconds: float = 0.2) -> float:
    """FLOP/s of the best of many square matmuls on this CPU, whose clock no data sheet knows: call it "measured"."""
    a, b = torch.rand(2, size, size).to(getattr(torch, str(dtype).removeprefix("torch.")))
    best, end = math.inf, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def clock(seconds: float) -> str:
    """3725.4 -> '1:02:05'"""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def progress_line(row: dict, max_steps: int, elapsed: float, mfu: float | None = None, start_step: int = 0) -> str:
    """One line on a train row. `elapsed` seconds have passed since update `start_step`; `mfu` is a fraction of 1."""
    done = row["step"] - start_step
    parts = [f"step {row['step']:>{len(str(max_steps))}}/{max_steps}", f"loss {row['loss']:.4f}", f"lr {row['lr']:.2e}"]
    parts += [f"grad {row['grad_norm']:.2f}", f"{row['tokens_per_second']:,.0f} tok/s"]
    parts += [] if mfu is None else [f"MFU {100 * mfu:.1f} %"]
    parts += [f"ETA {clock(elapsed / done * (max_steps - row['step']))}"] if done > 0 else []
    return "  ".join(parts)


# ----------------------------------------------------------------------------------------------------- loss-spike watch


def is_spike(history: list[float], loss: float, threshold: float, window: int = 50, minimum: int = 20) -> bool:
    """Whether `loss` exceeds mean + threshold * std of the last `window` accepted losses.

    A loss that is not finite is always a spike; before `minimum` losses were seen, nothing else is. The std counts as
    at least 0.1 % of the mean: after a flat stretch not every wiggle is a spike.
    """
    if not math.isfinite(loss):
        return True
    seen = history[-window:]
    if len(seen) < minimum:
        return False
    mean = sum(seen) / len(seen)
    std = math.sqrt(sum((x - mean) ** 2 for x in seen) / len(seen))
    return loss > mean + threshold * max(std, 1e-3 * abs(mean))


def accept_loss(history: list[float], loss: float, window: int = 50) -> list[float]:
    """The history after a loss that was no spike: its last `window` entries, JSON-able as they are."""
    return [*history, loss][-window:]


def new_state(float16: bool) -> dict:
    """What a run must remember besides weights, optimizer and data position; JSON-able, the same in all stages."""
    return {"step": 0, "tokens": 0, "seconds": 0.0, "skipped": 0, "stopped": False,
            "best_step": None, "best_loss": None, "evals_since_best": 0, "lr_scale": 1.0, "rolled_back_at": None,
            "losses": [], "good_steps": 0, "bad_steps": 0, "loss_scale": 2.0**16 if float16 else 1.0}


def note_evaluation(state: dict, loss: float, patience: int) -> bool:
    """Book an evaluation after state["step"] updates; returns whether it is the best so far.

    state["stopped"] becomes true after `patience` evaluations without a better one (0: never).
    """
    better = state["best_loss"] is None or loss < state["best_loss"]
    state["evals_since_best"] = 0 if better else state["evals_since_best"] + 1
    if better:
        state["best_step"], state["best_loss"] = state["step"], loss
    state["stopped"] = 0 < patience <= state["evals_since_best"]
    return better


def train_row(state: dict, device, *, loss: float, lr: float, grad_norm: float, speed: float, **more: float) -> dict:
    """The row of metrics.jsonl for the update just booked in `state`; speed in tokens per second."""
    return {"kind": "train", "step": state["step"], "loss": loss, "lr": lr, "grad_norm": grad_norm, **more,
            "tokens": state["tokens"], "tokens_per_second": speed, "seconds": state["seconds"],
            "memory_bytes": memory_bytes(device), "skipped": state["skipped"]}


def verdict(state: dict, loss: float, grad_norm: float, action: str, threshold: float) -> str:
    """What becomes of an update: "apply", "skip" or "rollback". One that is not finite is never applied.

    state (JSON-able, kept from step to step): losses (accepted ones), good_steps and bad_steps in a row, loss_scale (1
    but for float16: halved when a gradient overflows, doubled after 1000 good steps; Micikevicius et al. 2018).
    action: none, skip or rollback, for a loss that is_spike.
    ValueError after 20 bad steps in a row: the weights are past help.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        state["good_steps"], state["bad_steps"] = 0, state["bad_steps"] + 1
        state["loss_scale"] = max(state["loss_scale"] / 2, 1.0)  # so a scale of 1 stays what it is
        if state["bad_steps"] > 20:
            raise ValueError(f"loss or gradient were not finite {state['bad_steps']} times in a row, up to step "
                             f"{state['step'] + 1}: go on from the last checkpoint with a lower --lr")
        return "skip"
    if action != "none" and is_spike(state["losses"], loss, threshold):
        return action
    state["losses"] = accept_loss(state["losses"], loss)
    state["good_steps"], state["bad_steps"] = state["good_steps"] + 1, 0
    if state["loss_scale"] > 1 and state["good_steps"] % 1000 == 0:
        state["loss_scale"] *= 2
    return "apply"


# ---------------------------------------------------------------------------------------------------------- report.html

TITLES = {"loss": "Loss (nats per token)", "bits_per_byte": "Bits per byte", "lr": "Learning rate",
          "grad_norm": "Gradient norm before clipping", "tokens_per_second": "Tokens per second",
          "skipped": "Updates skipped"}  # fmt: skip
NO_CURVE = {"kind", "step", "tokens", "seconds", "memory_bytes"}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 260, 64, 12, 708, 232  # the svg, and the plot inside it, in pixels

STYLE = """
:root { color-scheme: light dark; --ink: #1d1f21; --soft: #6b7075; --line: #d9dcdf; --page: #fff; --a: #1f6feb }
:root { --b: #d9480f } @media (prefers-color-scheme: dark) { :root {
  --ink: #e6e6e6; --soft: #9aa0a6; --line: #3a3f44; --page: #16181a; --a: #6cb0ff; --b: #ff9457 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 45rem;
  margin: 2rem auto; padding: 0 1rem } h1 { font-size: 1.5rem } h2 { font-size: 1.05rem; margin: 2rem 0 .3rem }
th, td { text-align: left; padding: .1rem 1.2rem .1rem 0; overflow-wrap: anywhere; vertical-align: top }
th, .note { font-weight: normal; color: var(--soft); margin: 0 } .note .train { color: var(--a) }
svg { width: 100%; height: auto; font-size: 11px; fill: var(--soft) } .grid { stroke: var(--line) }
.curve { fill: none; stroke: var(--a); stroke-width: 1.5; stroke-linejoin: round; stroke-linecap: round }
.curve.eval { stroke: var(--b); stroke-width: 2.5 } .note .eval { color: var(--b) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line); padding-left: .8rem }
"""


def thin(points: list, limit: int = 2000) -> list:
    """At most `limit` of the [step, value | None] points: the lowest and highest of each bucket, so no peak is lost."""
    buckets, kept = limit // 3, []
    for k in range(buckets if len(points) > limit else 0):
        part = range(k * len(points) // buckets, (k + 1) * len(points) // buckets)
        value = {i: points[i][1] for i in part if points[i][1] is not None}
        gap = next((i for i in part if i not in value), None)
        chosen = {min(value, key=value.get), max(value, key=value.get)} if value else set()
        kept += [points[i] for i in sorted(chosen | ({gap} - {None}))]
    return kept or points


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that enclose low .. high."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # flat
        low, high = low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * power for m in (1, 2, 5, 10, 20) if (high - low) / (m * power) <= count)
    return [k * step for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def curve_svg(series: dict[str, list]) -> str:
    """{"train.loss": [[step, value | None], ...], ...} as one inline SVG.

    Each path carries what it draws, exactly: data-points. The svg's data-x and data-y, [lowest, highest] of each axis,
    give its pixels: x = LEFT + (step - x0) / (x1 - x0) * (RIGHT - LEFT), and y downwards from BOTTOM to TOP.
    """
    real = [(s, v) for points in series.values() for s, v in points if v is not None]
    x0, x1 = min(s for s, _ in real), max(s for s, _ in real)
    x1 += x1 == x0
    y0, *_, y1 = ys = ticks(min(v for _, v in real), max(v for _, v in real))
    X = lambda s: LEFT + (s - x0) / (x1 - x0) * (RIGHT - LEFT)  # noqa: E731
    Y = lambda v: BOTTOM - (v - y0) / (y1 - y0) * (BOTTOM - TOP)  # noqa: E731
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-x="[{x0}, {x1}]" data-y="[{y0!r}, {y1!r}]">']
    for y in ys:
        out.append(f'<path class="grid" d="M{LEFT} {Y(y):.1f}H{RIGHT}"/>'
                   f'<text x="{LEFT - 6}" y="{Y(y) + 4:.1f}" text-anchor="end">{y:.6g}</text>')
    for x in ticks(x0, x1, 8):
        if x0 <= x <= x1:
            out.append(f'<text x="{X(x):.1f}" y="{BOTTOM + 18}" text-anchor="middle">{x:.10g}</text>')
    for name, points in series.items():
        d, pen = [], "M"
        for s, v in points:
            if v is not None:
                d.append(f"{pen}{X(s):.2f} {Y(v):.2f}" + ("h0" if pen == "M" else ""))  # h0: even a lone point is a dot
            pen = "M" if v is None else "L"
        out.append(f'<path class="curve {html.escape(name.split(".")[0])}" data-series="{html.escape(name)}" '
                   f'data-points="{json.dumps(points)}" d="{"".join(d)}"/>')
    return "\n".join([*out, "</svg>"])


def curves_html(rows: list[dict]) -> str:
    """One figure per logged quantity, train and eval in the same one."""
    keys = dict.fromkeys([*TITLES, *(key for row in rows for key in row if key not in NO_CURVE)])  # ordered, once each
    out = []
    for key in keys:
        series = {}  # name -> [[step, value | None], ...]
        for row in rows:
            value, kind = row.get(key, ""), row.get("kind", "train")
            if "step" in row and (value is None or isinstance(value, (int, float)) and not isinstance(value, bool)):
                series.setdefault(f"{kind}.{key}", []).append([row["step"], value])
        series = {name: points for name, points in series.items() if any(v is not None for _, v in points)}
        if key == "skipped" and not any(v for points in series.values() for _, v in points):
            continue  # a run without trouble
        out += [f"<h2>{html.escape(TITLES.get(key, key))}</h2>"] if series else []
        for name, points in series.items():
            real = [(v, s) for s, v in points if v is not None]
            (low, low_step), (high, high_step), (last, _) = min(real), max(real), real[-1]
            gaps = f", {len(points) - len(real)} not finite" if len(real) < len(points) else ""
            kind = html.escape(name.split(".")[0])
            out.append(f'<p class="note"><b class="{kind}">{kind}</b> last {last:.6g}, lowest {low:.6g} at step '
                       f"{low_step}, highest {high:.6g} at step {high_step}{gaps}</p>")
        out += [curve_svg({name: thin(points) for name, points in series.items()})] if series else []
    return "\n".join(out)


def _table(pairs) -> str:
    rows = (f"<tr><th>{html.escape(str(key))}</th><td>{html.escape(str(value))}</td></tr>" for key, value in pairs)
    return f"<table>{''.join(rows)}</table>"


def _read_json(path: Path, default):
    try:
        return json.loads(path.read_bytes().decode("utf-8")) if path.exists() else default
    except ValueError:
        raise ValueError(f"{path}: not JSON") from None


def summary(rows: list[dict]) -> list[tuple[str, str]]:
    """(what, figure) pairs on a whole run; what was never logged is left out."""
    lines = []

    def add(label: str, kind: str, key: str, show) -> None:
        if v := [row[key] for row in rows if row.get("kind") == kind and row.get(key) is not None]:
            lines.append((label, show(v)))

    course = lambda v: f"{v[-1]:.4f} (first {v[0]:.4f}, lowest {min(v):.4f})"  # noqa: E731
    add("train loss", "train", "loss", course)
    add("held-out loss", "eval", "loss", course)
    add("held-out bits per byte", "eval", "bits_per_byte", course)
    add("steps", "train", "step", lambda v: f"{v[-1]:,}")
    add("tokens", "train", "tokens", lambda v: f"{v[-1]:,}")
    add("time", "train", "seconds", lambda v: clock(max(v)))
    add("tokens per second", "train", "tokens_per_second", lambda v: f"{sorted(v)[len(v) // 2]:,.0f} (median)")
    add("peak memory", "train", "memory_bytes", lambda v: f"{max(v) / 2**20:,.0f} MiB")
    return lines


def write_report(run_dir) -> Path:
    """`run_dir`/report.html from metrics.jsonl, args.json and samples.json (a list of {"step", "prompt", "text"}).

    One file without script or network, written atomically. Missing inputs leave their part out; ValueError names a
    malformed one. Returns the path.
    """
    run, log = Path(run_dir), Path(run_dir, "metrics.jsonl")
    rows = read_rows(log) if log.exists() else []
    args, samples = _read_json(run / "args.json", {}), _read_json(run / "samples.json", [])
    title, escape = html.escape(run.resolve().name), lambda value: html.escape(str(value))
    parts = [f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
             '<meta name="viewport" content="width=device-width">',
             f"<style>{STYLE}</style></head><body><h1>{title}</h1>", _table(summary(rows)), curves_html(rows)]
    parts += ["<h2>Samples</h2>"] if samples else []
    for sample in samples:
        step, prompt, text = (escape(sample[key]) for key in ("step", "prompt", "text"))
        parts.append(f'<p class="note">step {step}</p><pre><b>{prompt}</b>{text}</pre>')
    if args:
        parts += ["<h2>Settings</h2>", _table(args.items())]
    _write_atomically(run / "report.html", "\n".join(parts + ["</body></html>\n"]).encode("utf-8", "replace"))
    return run / "report.html"


def main() -> None:
    try:
        print(write_report(sys.argv[1]) if len(sys.argv) == 2 else __doc__)
    except (ValueError, OSError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)


if __name__ == "__main__":
    main()
