"""Pretraining on many processes, as a user starts it: every axis leaves the log of one process; and how a run ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import stages
import train_pretrain
from processes import run_on
from stages import rows, run_stage
from test_train_pretrain import TEXT, TINY

ROOT = Path(__file__).resolve().parents[1]
SHAPE = TINY | {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "global_batch_size": 8,
                "micro_batch_size": 1, "max_steps": 4, "dtype": "float64", "eval_every": 2, "save_every": 2, "keep_last": 0}
MIXTURE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, router_aux_loss_coef=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "sums.txt").write_text(TEXT)
    return folder


def settings_of(folder: Path, out: str, **changes) -> dict:
    return SHAPE | {"data": str(folder / "sums.txt"), "out": str(folder / out)} | changes


def as_rank(world: int, settings: dict) -> None:
    """A job of processes.py: the stage, in processes that are joined already."""
    import torch.distributed as dist
    from parallel.launch import World
    world = World(dist.get_rank(), world, dist.PrefixStore(settings["out"], dist.distributed_c10d._get_default_store()))
    sys.stdout = open(os.devnull, "w")
    train_pretrain.train(world, train_pretrain.parse(train_pretrain.Args, argv=stages.flags(settings)))


def on(world: int, settings: dict) -> Path:
    run_on(world, as_rank, settings, timeout=120)
    return Path(settings["out"])


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    return run_stage(train_pretrain.main, settings_of(folder, "alone"))


def assert_same_log(run, truth) -> None:
    """All rows: losses, gradient norms, counted tokens, evaluations."""
    ours, theirs = stages.lasting(run), stages.lasting(truth)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], abs=1e-9) for key in a), (a, b)


LAYOUTS = [  # processes, flags
    (4, dict(tp=2, pp=2, zero=1)), (4, dict(tp=2, cp=2)), (4, dict(zero=3, offload=True)), (4, dict(zero=2, tp=2)),
    (4, dict(pp=2, cp=2, pp_schedule="zb")), (2, dict(pp=2, pp_schedule="interleaved")),
    (8, dict(tp=2, pp=2, zero=1))]


@pytest.mark.parametrize("world, flags", LAYOUTS, ids=str)
def test_every_axis_leaves_the_log_of_one_process(folder, alone, world, flags):
    run = on(world, settings_of(folder, f"run{LAYOUTS.index((world, flags))}", **flags))
    assert_same_log(run, alone)
    truth, ours = (checkpoint.read_safetensors(checkpoint.latest(r) / "model.safetensors") for r in (alone, run))
    assert truth.keys() == ours.keys()
    assert all((truth[name] - ours[name]).abs().max() < 1e-9 for name in truth)


def test_one_process_with_zero_3_offloaded(folder, alone):
    assert_same_log(run_stage(train_pretrain.main, settings_of(folder, "offloaded", zero=3, offload=True)), alone)
