"""What the tests of all stages share: run one in this process, look at what it left, kill it and go on."""

import importlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import checkpoint
import metrics

ROOT = Path(__file__).resolve().parents[1]
WALL_CLOCK = {"seconds", "tokens_per_second", "memory_bytes"}


def flags(settings: dict) -> list[str]:
    """{"lr": 0.1, "compile": False, "data": [a, b], "model": None} -> --lr 0.1 --no_compile --data a b"""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run_stage(main, settings: dict) -> Path:
    """Run a stage's main in this process; returns the run's folder. Signal handlers are put back afterwards."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        main(flags(settings))
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)
    return Path(settings["out"])


def rows(run, kind="train") -> list[dict]:
    return [row for row in metrics.read_rows(Path(run) / "metrics.jsonl") if row["kind"] == kind]


def losses(run, kind="train") -> list[float]:
    return [row["loss"] for row in rows(run, kind)]


def lasting(run) -> list[dict]:
    """All rows without the three fields that depend on the clock and the machine."""
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in metrics.read_rows(Path(run) / "metrics.jsonl")]


def as_rank(world: int, stage: str, settings: dict) -> None:
    """A job of processes.py: the stage, in processes that are joined already."""
    import torch.distributed as dist
    from parallel.launch import World
    store = dist.PrefixStore(str(settings["out"]), dist.distributed_c10d._get_default_store())
    world = World(dist.get_rank(), world, store)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    module = importlib.import_module(stage)
    module.train(world, module.parse(module.Args, argv=flags(settings)))


def compiled(world, function, *args):
    """A job of processes.py with torch.compile's graphs, but not its code generator, which takes a minute -> (result, graphs, breaks)."""
    import torch._dynamo
    real, counters = torch.compile, torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    torch.compile = partial(real, backend="aot_eager")
    try:
        return function(world, *args), counters["stats"]["unique_graphs"], list(counters["graph_break"])
    finally:
        torch.compile = real


def assert_close_logs(run, truth, tolerance: float = 1e-9) -> None:
    """All rows: losses, gradient norms, counted tokens, evaluations."""
    ours, theirs = lasting(run), lasting(truth)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], abs=tolerance) for key in a), (a, b)


def assert_close_weights(run, truth, file: str = "model.safetensors", tolerance: float = 1e-9) -> None:
    """Those of the last checkpoints."""
    ours, theirs = (checkpoint.read_safetensors(checkpoint.latest(r) / file) for r in (run, truth))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() < tolerance, name


def assert_refused(stage, settings: dict, processes: int, line: str) -> None:
    """The stage's module refuses the flags for so many processes with one line, which holds this one."""
    args = stage.parse(stage.Args, argv=flags(settings))
    with pytest.raises(ValueError) as error:
        stage.check(args, processes=processes)
    assert line in str(error.value) and "\n" not in str(error.value)


def assert_bad_degrees_are_one_line(script: str, settings: dict) -> None:
    """From a shell, one process with tp=2: exit code 2, and nothing is written."""
    command = [sys.executable, str(ROOT / script), *flags(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "error: pp 1 x cp 1 x tp 2 do not make 1 processes; pp x cp x tp must divide it: 1; torchrun --nproc_per_node N "
        "starts N"]
    assert not Path(settings["out"]).exists()


def assert_same_run(a, b) -> None:
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (checkpoint.latest(a) / name).read_bytes() == (checkpoint.latest(b) / name).read_bytes(), name
    assert lasting(a) == lasting(b)


def _in_child(stage: str, words: list[str]) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    importlib.import_module(stage).main(words)


def kill_at_random_moments(stage: str, settings: dict, folder: Path, kills: int) -> tuple[Path, Path]:
    """The stage undisturbed, and the stage sent SIGKILL at `kills` random moments and started again: (whole, killed)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_pretrain", "train_sft", "train_dpo", "torch._dynamo"])  # all that children need

    def start(out: str):
        process = context.Process(target=_in_child, args=(stage, flags(settings | {"out": folder / out, "resume": "auto"})))
        process.start()
        return process

    start("warm").join()
    begin = time.monotonic()
    start("whole").join()
    duration, delays, done = time.monotonic() - begin, random.Random(0), 0
    while done < kills:
        process = start("killed")
        process.join(delays.uniform(0.05, 0.5) * duration)
        if process.exitcode is not None:
            assert process.exitcode == 0
            if done >= 3:
                break  # it got to the end between two kills
            shutil.rmtree(folder / "killed")  # the machine was busier when its duration was measured
            done, duration = 0, duration / 2
            continue
        process.kill()
        process.join()
        done += 1
    process = start("killed")
    process.join()
    assert process.exitcode == 0
    return folder / "whole", folder / "killed"
