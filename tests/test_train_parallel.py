"""Pretraining on many processes, as a user starts it: every axis leaves the log of one process; and how a run ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import checkpoint
import stages
import train_pretrain
from processes import run_on
from stages import assert_close_logs, assert_close_weights, rows, run_stage
from test_train_pretrain import TEXT, TINY

ROOT = Path(__file__).resolve().parents[1]
SHAPE = TINY | {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "global_batch_size": 8,
                "micro_batch_size": 1, "max_steps": 4, "dtype": "float64", "eval_every": 2, "save_every": 2, "keep_last": 0,
                "val_fraction": 0.02}  # each rank takes part in each held-out window: a few do
MIXTURE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, router_aux_loss_coef=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "sums.txt").write_text(TEXT)
    return folder


def settings_of(folder: Path, out: str, **changes) -> dict:
    return SHAPE | {"data": str(folder / "sums.txt"), "out": str(folder / out)} | changes


def on(world: int, settings: dict) -> Path:
    run_on(world, stages.as_rank, "train_pretrain", settings, timeout=120)
    return Path(settings["out"])


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    return run_stage(train_pretrain.main, settings_of(folder, "alone"))


@pytest.fixture(scope="module")
def three_axes(folder) -> Path:
    """dp 2, tp 2, pp 2."""
    return on(8, settings_of(folder, "three axes", tp=2, pp=2, zero=1))


LAYOUTS = [  # processes, flags
    (4, dict(tp=2, cp=2)), (4, dict(zero=3, offload=True)), (4, dict(pp=2, cp=2, pp_schedule="zb")),
    (2, dict(pp=2, pp_schedule="interleaved")), (8, None)]


@pytest.mark.parametrize("world, flags", LAYOUTS, ids=str)
def test_every_axis_leaves_the_log_of_one_process(folder, alone, world, flags, request):
    run = on(world, settings_of(folder, f"{world} {flags}", **flags)) if flags else request.getfixturevalue("three_axes")
    assert_close_logs(run, alone)
    assert_close_weights(run, alone)


def test_compiled_layers_leave_the_log_of_one_process(folder, alone):
    settings = settings_of(folder, "compiled", zero=2, compile=True)
    assert run_on(2, stages.compiled, stages.as_rank, "train_pretrain", settings, timeout=120) == [(None, 1, [])] * 2
    assert_close_logs(settings["out"], alone)
    assert_close_weights(settings["out"], alone)


def test_one_process_with_zero_3_offloaded(folder, alone):
    assert_close_logs(run_stage(train_pretrain.main, settings_of(folder, "offloaded", zero=3, offload=True)), alone)


def test_experts_shared_out_balance_as_in_one_process(folder):
    """The micro batches are the same rows everywhere, for each balances its own load."""
    settings = MIXTURE | dict(micro_batch_size=2)
    truth = run_stage(train_pretrain.main, settings_of(folder, "mixture", **settings))
    assert_close_logs(on(4, settings_of(folder, "mixture4", **settings, ep=2, tp=2, zero=1)), truth)
    assert_close_logs(on(2, settings_of(folder, "mixture2", **settings, pp=2)), truth)


def test_float16_scales_its_loss_on_every_rank(folder):
    settings = dict(dtype="float16", max_steps=6, micro_batch_size=4, lr=1e-2, save_every=0)
    one = run_stage(train_pretrain.main, settings_of(folder, "half", **settings))
    four = on(4, settings_of(folder, "half4", **settings, tp=2, zero=2))
    assert checkpoint.read_state(checkpoint.latest(four))["loss_scale"] == checkpoint.read_state(checkpoint.latest(one))["loss_scale"]
    assert stages.losses(four) == pytest.approx(stages.losses(one), abs=0.02)


def test_resumed_at_other_world_sizes_continues_the_same_sample_order(folder):
    settings = dict(schedule="constant", warmup_steps=0, save_every=2, eval_every=0)
    truth = run_stage(train_pretrain.main, settings_of(folder, "whole", **settings, max_steps=8))
    for world, steps, layout in ((4, 2, dict(tp=2, pp=2)), (2, 4, dict(zero=3)), (1, 6, {}), (2, 8, dict(pp=2, zero=1))):
        now = settings_of(folder, "moved", **settings, **layout, max_steps=steps, resume="auto")
        on(world, now) if world > 1 else run_stage(train_pretrain.main, now)
    assert_close_logs(folder / "moved", truth)
    assert (folder / "moved" / "latest").read_text() == "step_00000008"


def test_dropout_differs_along_dp_and_is_the_same_again_after_a_resume(folder):
    settings = dict(attention_dropout=0.3, tp=2, schedule="constant", save_every=2, eval_every=0)
    whole = on(4, settings_of(folder, "dropped", **settings))
    on(4, settings_of(folder, "dropped again", **settings, max_steps=2))
    again = on(4, settings_of(folder, "dropped again", **settings, resume="auto"))
    assert stages.losses(again) == stages.losses(whole)
    weights = [(checkpoint.latest(run) / "model.safetensors").read_bytes() for run in (whole, again)]
    assert weights[0] == weights[1]


def test_the_last_checkpoint_opens_everywhere(three_axes):
    """A Hugging Face folder, besides the shards: evaluated as what the log says; the ones before it are shards alone."""
    from data.loader import eval_batches
    from evaluate import evaluate_loss
    run = three_axes
    model = checkpoint.load_model(checkpoint.find_checkpoint(run))
    total = evaluate_loss(model, eval_batches(run / "data", "val", SHAPE["seq_len"], 4))
    assert total["nats"] / total["tokens"] == pytest.approx(rows(run, "eval")[-1]["loss"], abs=1e-9)
    assert not (run / "step_00000002" / "model.safetensors").exists()


# ---- torchrun: how it begins and ends


def torchrun(processes: int, settings: dict, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *more,
               str(ROOT / "train_pretrain.py"), *stages.flags(settings)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_torchrun_with_degrees_that_do_not_fit_is_one_line_from_rank_0(folder):
    out, err = torchrun(3, settings_of(folder, "refused", tp=2)).communicate(timeout=120)
    assert errors(err) == ["error: pp 1 x cp 1 x tp 2 do not make 3 processes; pp x cp x tp must divide it: 1, 3"]
    assert "exitcode  : 2" in err and not (folder / "refused").exists()


def workers(process: subprocess.Popen) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found if b"train_pretrain" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def when(true, process: subprocess.Popen, seconds: float = 90.0) -> None:
    for _ in range(int(seconds / 0.05)):
        if true():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    raise TimeoutError(process.communicate())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds torchrun's workers in /proc")
def test_a_killed_rank_stops_all_and_is_named(folder):
    run = folder / "killed"
    process = torchrun(4, settings_of(folder, "killed", tp=2, pp=2, max_steps=100000, eval_every=0, save_every=0))
    when(lambda: (run / "metrics.jsonl").exists() and len(rows(run)) > 3, process)
    os.kill(workers(process)[2], signal.SIGKILL)
    begin = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert process.returncode and time.monotonic() - begin < 60
    assert set(errors(err)) == {"error: no answer from rank 2 of 4: it died or hangs"}, err[-3000:]


CHAIN = """
import os, signal, sys
import torch
import torch.distributed as dist
from checkpoint import catch_signals
from cli import run
from parallel.launch import joined

def main():
    with joined() as world:
        caught = catch_signals()  # as the stages do: torchrun's SIGTERM would end the others before they speak
        pair = dist.new_group([0, 2])
        dist.barrier()
        if world.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if world.rank == 1:
            dist.recv(torch.zeros(1), 0)
        dist.all_reduce(torch.zeros(1), group=pair)

run(main)
"""


def test_a_living_rank_that_waits_for_another_is_not_named(tmp_path):
    """Rank 2 dies, rank 0 notices; rank 1 waits for rank 0, whose connection stays open while it asks who has died."""
    (tmp_path / "chain.py").write_text(CHAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3",
               str(tmp_path / "chain.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert set(errors(done.stderr)) == {"error: no answer from rank 2 of 3: it died or hangs"}, done.stderr[-3000:]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds torchrun's workers in /proc")
def test_elastic_restart_ends_as_if_undisturbed(folder):
    """torchrun --max_restarts: a worker is killed after a checkpoint; the job comes back by itself and goes on."""
    settings = dict(pp=2, max_steps=40, save_every=5, eval_every=0, schedule="constant")
    whole = on(2, settings_of(folder, "undisturbed", **settings))
    run = folder / "restarted"
    process = torchrun(2, settings_of(folder, "restarted", **settings, resume="auto"), "--max_restarts", "2")
    when(lambda: (run / "latest").exists(), process)
    os.kill(workers(process)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err[-3000:]
    assert "going on from" in out
    assert stages.lasting(run) == stages.lasting(whole)
