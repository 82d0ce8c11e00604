"""The pretraining stage as a user meets it: each flag changes what it says it changes, and a run survives anything."""

import html
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import metrics
import stages
import train_pretrain
from stages import assert_same_run, kill_at_random_moments, lasting, losses, rows, run_stage
from train_pretrain import PRESETS, Args, main, next_token_loss

ROOT = Path(__file__).resolve().parents[1]
TEXT = "".join(f"{a} plus {b} is {a + b}; {a} times {b} is {a * b}.\n" for a in range(40) for b in range(20))
TINY = {"tokenizer": "char", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "seq_len": 16,
        "global_batch_size": 4, "micro_batch_size": 4, "max_steps": 12, "warmup_steps": 2, "log_every": 1, "eval_every": 0,
        "save_every": 0, "sample_tokens": 0, "device": "cpu"}
NO_SHAPE = {"hidden_size": None, "num_hidden_layers": None, "num_attention_heads": None}


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "sums.txt"
    path.write_text(TEXT)
    return str(path)


def flags(data: str, out, **changes) -> list[str]:
    return stages.flags(TINY | {"data": data, "out": str(out)} | changes)


def train(data: str, out, **changes) -> Path:
    return run_stage(main, TINY | {"data": data, "out": str(out)} | changes)


def weights(run) -> dict[str, torch.Tensor]:
    return checkpoint.read_safetensors(checkpoint.latest(run) / "model.safetensors")


# ---- what a run is


def test_it_learns_and_leaves_what_the_contract_names(text, tmp_path):
    run = train(text, tmp_path / "run", max_steps=60, lr=1e-2, eval_every=20, save_every=20, sample_tokens=8, keep_last=0)
    assert {p.name for p in run.iterdir()} == {"args.json", "metrics.jsonl", "report.html", "samples.json", "latest", "data",
                                               "step_00000020", "step_00000040", "step_00000060"}
    assert (run / "latest").read_text() == "step_00000060"
    row = rows(run)[-1]
    assert row.keys() == {"kind", "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds", "memory_bytes", "skipped"}
    assert row["step"] == 60 and 0 <= 60 * 4 * 16 - row["tokens"] < 16  # the epoch's last window is a short one
    evaluations = rows(run, "eval")
    assert [row["step"] for row in evaluations] == [0, 20, 40, 60]
    vocabulary = json.loads((run / "step_00000060" / "config.json").read_text())["vocab_size"]
    assert abs(evaluations[0]["loss"] - math.log(vocabulary)) < 0.05  # before training: uniform
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] - 1.0
    # One byte per character here, and one token: bits per byte is the loss in bits, but for the separator at the end.
    n = len(TEXT) - int(len(TEXT) * 0.9)
    assert evaluations[-1]["bits_per_byte"] == pytest.approx(evaluations[-1]["loss"] / math.log(2) * (n + 1) / n, rel=1e-12)
    assert len(json.loads((run / "samples.json").read_text())) == 3


def test_the_whole_configuration_is_in_args_json(text, tmp_path):
    run = train(text, tmp_path / "run", max_steps=1)
    saved = json.loads((run / "args.json").read_text())
    assert saved.keys() == Args.__dataclass_fields__.keys()
    assert saved["hidden_size"] == 16 and saved["lr"] == 3e-3


def test_first_steps_equal_a_loop_written_out_by_hand(text, tmp_path):
    """The same data and AdamW from torch, float64: loss, gradient norm and weights to 1e-9."""
    from data.loader import Loader
    from model import CausalLM
    run = train(text, tmp_path / "run", dtype="float64", max_steps=4, schedule="constant", warmup_steps=0, grad_clip=0.5, lr=1e-2)
    args = train_pretrain.parse(Args, argv=flags(text, run, dtype="float64"))
    index = json.loads((run / "data" / "index.json").read_text())
    model = CausalLM(train_pretrain.model_config(args, index["vocab_size"])).double()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}],
                                  lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    loader = Loader(run / "data", "train", seq_len=16, global_batch_size=4)
    for row in rows(run):
        (input_ids, labels, cu_seqlens), = next(loader)
        loss = torch.nn.functional.cross_entropy(model(input_ids, cu_seqlens=cu_seqlens).flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-9)
        assert row["grad_norm"] == pytest.approx(norm.item(), abs=1e-9)
    for name, tensor in weights(run).items():
        assert (tensor - model.get_parameter(name)).abs().max() < 1e-9, name


def test_next_token_loss_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [5.0, 5.0], [1.0, 2.0]]], dtype=torch.float64)
    labels = torch.tensor([[1, 0, -100]])
    assert next_token_loss(logits, labels).item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 2), abs=1e-12)
    assert next_token_loss(logits, torch.full((1, 3), -100)).item() == 0.0


# ---- accumulation, checkpointing, masks: another way to the same numbers


def test_accumulated_equals_one_batch(text, tmp_path):
    whole = train(text, tmp_path / "whole", dtype="float64")
    for size in (1, 3):  # 3: the last micro batch is smaller
        parts = train(text, tmp_path / f"parts{size}", dtype="float64", micro_batch_size=size)
        for a, b in zip(rows(whole), rows(parts)):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-9) and a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-9)
        for name, tensor in weights(whole).items():
            assert (tensor - weights(parts)[name]).abs().max() < 1e-9, name


def test_accumulation_weighs_tokens_not_micro_batches(tmp_path):
    """Two shards' worth of ragged windows: a micro batch with few counted tokens must not count as much as a full one."""
    data = tmp_path / "short.txt"
    data.write_text(TEXT[:300])  # its last window is short, and comes up in every epoch
    runs = [train(str(data), tmp_path / f"run{n}", dtype="float64", micro_batch_size=n, max_steps=8) for n in (4, 1)]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-9)
    assert any(b["tokens"] - a["tokens"] < 64 for a, b in zip(rows(runs[0]), rows(runs[0])[1:]))  # there was a ragged batch


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_memory_not_numbers(text, tmp_path, mode, monkeypatch):
    calls = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(k) or original(*a, **k))
    plain = train(text, tmp_path / "plain", dtype="float64", max_steps=3)
    assert not calls
    other = train(text, tmp_path / mode, dtype="float64", max_steps=3, activation_checkpointing=mode)
    assert len(calls) == 3 * 2 and all(("context_fn" in k) == (mode == "selective") for k in calls)
    assert losses(plain) == pytest.approx(losses(other), abs=1e-9)


def test_compile_changes_the_code_that_runs_not_its_results(text, tmp_path, monkeypatch):
    """Traced forward and backward; without the code generator, which takes a minute for these few numbers."""
    import torch._dynamo
    plain = train(text, tmp_path / "plain", max_steps=3)
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train(text, tmp_path / "compiled", max_steps=3, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1 and not torch._dynamo.utils.counters["graph_break"]
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
    assert weights(compiled).keys() == weights(plain).keys()  # no _orig_mod prefix


# ---- flags that must change the outcome


@pytest.mark.parametrize("change", [
    dict(lr=1e-2), dict(min_lr=1e-3), dict(warmup_steps=6), dict(schedule="linear"), dict(schedule="wsd"), dict(schedule="constant"),
    dict(optimizer="muon"), dict(optimizer="lion"), dict(optimizer="adafactor", lr=1e-2), dict(weight_decay=3.0), dict(beta1=0.5),
    dict(beta2=0.5), dict(grad_clip=0.01), dict(seed=1), dict(global_batch_size=8), dict(seq_len=8), dict(dtype="float64"),
    dict(dtype="bfloat16"), dict(dtype="float16"), dict(hidden_size=32), dict(intermediate_size=96), dict(num_hidden_layers=3),
    dict(num_attention_heads=4), dict(num_key_value_heads=1), dict(head_dim=4), dict(rope_theta=3.0), dict(sliding_window=2),
    dict(qk_norm=False), dict(attention_bias=True, qk_norm=False), dict(tie_word_embeddings=False), dict(attention_dropout=0.5),
    dict(initializer_range=0.1), dict(val_fraction=0.5), dict(tokenizer="", vocab_size=270),
    dict(tokenizer="", vocab_size=300), dict(num_experts=4, num_experts_per_tok=1, moe_intermediate_size=8),
    dict(num_experts=4, router_aux_loss_coef=0.5), dict(optimizer="adamw8bit", hidden_size=64),
], ids=str)
def test_flag_changes_the_training(text, tmp_path, change, baseline=[]):
    if not baseline:  # one plain run serves all cases
        baseline.append(losses(train(text, tmp_path / "plain", max_steps=5)))
    changed = losses(train(text, tmp_path / "changed", max_steps=5, **change))
    assert len(changed) == 5 and all(map(math.isfinite, changed))
    assert changed != baseline[0]


def test_the_balance_loss_moves_the_router_and_stays_out_of_the_log(text, tmp_path):
    told = {coefficient: rows(train(text, tmp_path / str(coefficient), max_steps=1, num_experts=4, grad_clip=0.0,
                                    router_aux_loss_coef=coefficient))[0] for coefficient in (0.0, 100.0)}
    assert told[0.0]["loss"] == told[100.0]["loss"] and told[100.0]["grad_norm"] > 2 * told[0.0]["grad_norm"]


@pytest.mark.parametrize("change", [{}, dict(activation_checkpointing="selective"), dict(compile=True)], ids=str)
def test_kernels_give_the_same_run(text, tmp_path, change, monkeypatch):
    real = torch.compile  # Inductor would compile C++ for a minute; the graph is the same
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="aot_eager"))
    plain = train(text, tmp_path / "plain", dtype="float64", max_steps=3, eval_every=3)
    ours = train(text, tmp_path / "ours", dtype="float64", max_steps=3, eval_every=3, attention="triton", kernels="triton", **change)
    for kind in ("train", "eval"):
        assert losses(ours, kind) == pytest.approx(losses(plain, kind), abs=1e-9)
    assert [row["grad_norm"] for row in rows(ours)] == pytest.approx([row["grad_norm"] for row in rows(plain)], abs=1e-9)


def test_kernels_in_float32_stay_close(text, tmp_path):
    """In Triton's interpreter where there is no GPU: the kernels themselves, the fused loss included."""
    runs = [train(text, tmp_path / name, max_steps=2, attention=attention, kernels=name)
            for name, attention in (("torch", "sdpa"), ("triton", "triton"))]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=1e-5)


def test_eager_and_sdpa_give_the_same_run_by_different_code(text, tmp_path, monkeypatch):
    import model
    calls = []
    original = model.eager_attention
    monkeypatch.setattr(model, "eager_attention", lambda *a: calls.append(1) or original(*a))
    sdpa = train(text, tmp_path / "sdpa", dtype="float64", max_steps=3)
    assert not calls
    eager = train(text, tmp_path / "eager", dtype="float64", max_steps=3, attention="eager")
    assert len(calls) == 6 and losses(eager) == pytest.approx(losses(sdpa), abs=1e-9)


def test_document_mask_changes_the_loss_when_documents_meet(tmp_path):
    data = tmp_path / "lines.jsonl"
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines()))
    on, off = (train(str(data), tmp_path / str(mask), document_mask=mask, max_steps=4) for mask in (True, False))
    assert losses(on)[0] != losses(off)[0]


def test_learning_rate_in_the_log_is_the_schedule(text, tmp_path):
    run = train(text, tmp_path / "run", schedule="linear", lr=1.0, min_lr=0.1, warmup_steps=2, max_steps=11)
    assert [row["lr"] for row in rows(run)] == pytest.approx([0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_log_eval_and_save_happen_when_asked(text, tmp_path):
    run = train(text, tmp_path / "run", log_every=5, eval_every=4, save_every=3, keep_last=2, max_steps=13)
    assert [row["step"] for row in rows(run)] == [5, 10, 13]
    assert [row["step"] for row in rows(run, "eval")] == [0, 4, 8, 12, 13]
    best = min(rows(run, "eval"), key=lambda row: row["loss"])["step"]
    assert set(checkpoint.step_folders(run)) == {12, 13, best}


def test_the_best_checkpoint_is_kept_and_early_stopping_stops(text, tmp_path):
    """Held-out text of another kind: learning the training text makes it worse, so an early checkpoint is the best."""
    other = tmp_path / "other.txt"
    other.write_text("".join(random.Random(0).choices("0123456789;. \n", k=400)))
    run = train(text, tmp_path / "run", val_data=str(other), lr=3e-2, max_steps=400, eval_every=10, save_every=10, keep_last=1, early_stopping=3)
    evaluations = rows(run, "eval")
    best = min(evaluations[1:], key=lambda row: row["loss"])["step"]
    assert evaluations[-1]["step"] == best + 30 < 400  # three evaluations without a better one
    assert set(checkpoint.step_folders(run)) == {best, best + 30}
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
    train(text, run, val_data=str(other), lr=3e-2, max_steps=400, eval_every=10, save_every=10, keep_last=1, early_stopping=3, resume="auto")
    assert before == sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))  # finished is finished


def test_samples_go_on_from_the_prompts_and_are_as_long_as_asked(text, tmp_path):
    run = train(text, tmp_path / "run", max_steps=2, sample_tokens=7, sample_prompt=["2 plus", "3"])
    samples = json.loads((run / "samples.json").read_text())
    assert [sample["prompt"] for sample in samples] == ["2 plus", "3"]
    assert all(0 < len(re.sub(r"<\|\w+\|>", "#", sample["text"])) <= 7 for sample in samples)  # a token is a character
    report = (run / "report.html").read_text()
    assert all(html.escape(sample["text"]) in report for sample in samples)
    with pytest.raises(ValueError, match="leaves no room within --seq_len 16"):
        train(text, tmp_path / "long", sample_tokens=7, sample_prompt=["1 plus 2 is 3; 1 times 2"])


def test_every_flag_is_tried_somewhere_in_this_file():
    here = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in Args.__dataclass_fields__ if f"{name}=" not in here and f'"{name}"' not in here] == []


# ---- bad losses


def poisoned(monkeypatch, at: set[int], value: float, times: int = 10**9):
    """Let the loss of the updates `at` be multiplied by `value`, `times` times in all."""
    original, left = train_pretrain.next_token_loss, [times]
    step = [0]
    real_rate = train_pretrain.learning_rate

    def rate(now, **settings):
        step[0] = now
        return real_rate(now, **settings)

    def loss(logits, labels):
        if step[0] in at and left[0]:
            left[0] -= 1
            return original(logits, labels) * value
        return original(logits, labels)

    monkeypatch.setattr(train_pretrain, "learning_rate", rate)
    monkeypatch.setattr(train_pretrain, "next_token_loss", loss)


def test_a_spike_is_skipped(text, tmp_path, monkeypatch):
    poisoned(monkeypatch, {40}, 50.0)
    plain = train(text, tmp_path / "plain", max_steps=42)
    skipped = train(text, tmp_path / "skip", max_steps=42, spike_action="skip")
    assert [row["skipped"] for row in rows(skipped)] == [0] * 40 + [1, 1]
    assert rows(plain)[-1]["skipped"] == 0
    assert losses(skipped)[:41] == losses(plain)[:41] and losses(skipped)[41] != losses(plain)[41]


def test_spike_threshold_decides_what_a_spike_is(text, tmp_path, monkeypatch):
    poisoned(monkeypatch, {40}, 1.6)
    strict = train(text, tmp_path / "strict", max_steps=42, spike_action="skip", spike_threshold=2.0)
    loose = train(text, tmp_path / "loose", max_steps=42, spike_action="skip", spike_threshold=1000.0)
    assert rows(strict)[-1]["skipped"] >= 1 and rows(loose)[-1]["skipped"] == 0


def test_a_spike_rolls_back_at_half_the_learning_rate(text, tmp_path, monkeypatch):
    poisoned(monkeypatch, {40}, 50.0, times=1)
    run = train(text, tmp_path / "run", max_steps=45, spike_action="rollback", save_every=30, schedule="constant", warmup_steps=0)
    assert [row["step"] for row in rows(run)] == list(range(1, 46))  # the rows after the checkpoint are gone, once
    assert [row["lr"] for row in rows(run)] == [3e-3] * 30 + [1.5e-3] * 15


def test_a_batch_that_spikes_again_after_the_rollback_is_skipped(text, tmp_path, monkeypatch):
    poisoned(monkeypatch, {40}, 50.0)
    run = train(text, tmp_path / "run", max_steps=45, spike_action="rollback", save_every=30)
    assert rows(run)[-1]["skipped"] == 1 and [row["step"] for row in rows(run)] == list(range(1, 46))


def test_a_nan_is_never_applied_and_many_in_a_row_end_the_run(text, tmp_path, monkeypatch):
    poisoned(monkeypatch, {5}, math.nan)
    run = train(text, tmp_path / "one", max_steps=8)
    assert metrics.read_rows(run / "metrics.jsonl")[5]["loss"] is None
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())
    poisoned(monkeypatch, set(range(3, 100)), math.nan)
    with pytest.raises(ValueError, match="not finite 21 times in a row.*lower --lr"):
        train(text, tmp_path / "many", max_steps=60)


def test_float16_halves_its_loss_scale_on_overflow_and_goes_on(text, tmp_path):
    run = train(text, tmp_path / "run", dtype="float16", max_steps=30, save_every=30)
    state = checkpoint.read_state(checkpoint.latest(run))
    single = train(text, tmp_path / "single", max_steps=30)
    assert losses(run)[-1] == pytest.approx(losses(single)[-1], abs=0.05)
    assert state["loss_scale"] == 2.0**16 / 2 ** state["skipped"]


# ---- going on


def test_resumed_equals_undisturbed_to_the_bit(text, tmp_path):
    settings = dict(attention_dropout=0.2, optimizer="muon", eval_every=4, save_every=3)
    whole = train(text, tmp_path / "whole", **settings)
    run = tmp_path / "parts"
    for steps in (5, 6, 12):
        train(text, run, **settings | dict(max_steps=12), resume="auto") if steps == 12 else interrupted(text, run, steps, **settings)
    assert_same_run(whole, run)


def interrupted(data, out, after: int, **settings) -> None:
    """Run until `after` updates are done, then as if Ctrl-C were pressed."""
    real = train_pretrain.learning_rate

    def rate(step, **schedule):
        if step == after - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(step, **schedule)

    train_pretrain.learning_rate = rate
    try:
        with pytest.raises(KeyboardInterrupt, match="--resume auto"):
            train(data, out, **settings, resume="auto")
    finally:
        train_pretrain.learning_rate = real
    assert (Path(out) / "latest").read_text() == f"step_{after:08d}"


def test_resume_from_an_earlier_checkpoint_abandons_the_later_ones(text, tmp_path):
    run = train(text, tmp_path / "run", save_every=4, keep_last=0)
    expected = lasting(run)
    train(text, run, save_every=4, keep_last=0, resume=str(run / "step_00000004"))
    assert lasting(run) == expected and (run / "latest").read_text() == "step_00000012"


def test_a_finished_run_can_be_made_longer(text, tmp_path):
    run = train(text, tmp_path / "run", schedule="constant")
    train(text, run, schedule="constant", max_steps=15, resume="auto")
    assert_same_run(run, train(text, tmp_path / "whole", schedule="constant", max_steps=15))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: starting 20 fresh interpreters would take minutes")
def test_killed_at_20_random_moments_ends_as_if_undisturbed(text, tmp_path, monkeypatch):
    """SIGKILL, in saves too (a save every second update makes up most of the time): the last bits are the same."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = dict(max_steps=60, save_every=2, eval_every=7, attention_dropout=0.1, optimizer="muon", sample_tokens=4)
    whole, killed = kill_at_random_moments("train_pretrain", TINY | {"data": text} | settings, tmp_path, kills=20)
    assert_same_run(whole, killed)
    assert (killed / "samples.json").read_text() == (whole / "samples.json").read_text()


# ---- continual pretraining


def test_going_on_from_a_model_starts_at_its_loss_and_mixes_replayed_text(text, tmp_path):
    base = train(text, tmp_path / "base", max_steps=60, lr=1e-2, eval_every=60)
    new = tmp_path / "new.txt"
    new.write_text(TEXT.replace("plus", "times")[:6000])
    settings = dict(model=str(base), tokenizer="", **NO_SHAPE, lr=1e-2, eval_every=30, max_steps=60, val_data=text)
    forgetful = train(str(new), tmp_path / "forgetful", **settings)
    replayed = train(str(new), tmp_path / "replayed", **settings, replay=text, replay_fraction=0.5)
    shape = ("hidden_size", "vocab_size", "num_hidden_layers")
    other = train(str(new), tmp_path / "other", **settings, replay=text, replay_fraction=0.1)
    assert losses(other) != losses(replayed)
    config = [json.loads((checkpoint.latest(run) / "config.json").read_text()) for run in (base, replayed)]
    assert [config[0][name] for name in shape] == [config[1][name] for name in shape]
    assert rows(replayed, "eval")[0]["loss"] < rows(base, "eval")[0]["loss"] - 1.0  # not from scratch
    assert rows(replayed, "eval")[-1]["loss"] < rows(forgetful, "eval")[-1]["loss"]  # the old text is remembered better


# ---- bad input: one line, exit code 2, nothing half-written


@pytest.mark.parametrize("change, complaint", [
    (dict(data="no_such_file.txt"), "no_such_file.txt"),
    (dict(attention="triton", attention_dropout=0.1), "--attention triton: has no dropout"),
    (dict(tp=2), "pp 1 x cp 1 x tp 2 do not make 1 processes"),
    (dict(pp=2, pp_schedule="zb"), "torchrun --nproc_per_node N starts N"),
    (dict(cp=2, cp_method="ring"), "do not make 1 processes"),
    (dict(ep=2), "ep 2 does not divide dp 1"),
    (dict(dp=2), "dp 2 x pp 1 x cp 1 x tp 1 do not make 1 processes; dp 1 would"),
    (dict(zero=4), "--zero 4: choose 0, 1, 2 or 3"),
    (dict(offload=True), "--offload True: moves ZeRO's part of the state, so it needs --zero 1, 2 or 3"),
    (dict(zero=1, compile=True, activation_checkpointing="selective"), "--compile True: hides from --activation"),
    (dict(zero=3, optimizer="muon"), "--zero 3: cuts matrices, and muon needs them whole"),
    (dict(engine="torch"), "--engine torch: needs processes"),
    (dict(pp_schedule="interleaved", pp_chunks=1), "--pp_chunks 1: interleaving takes 2 or more"),
    (dict(sequence_parallel=True, tp=3), "do not make 1 processes"),
    (dict(model="nowhere", tokenizer="", rope_scaling="cubic"), "cubic"),
    (dict(preset="7t"), "choose from 1m"),
    (dict(num_attention_heads=3), "no multiple of num_attention_heads 3"),
    (dict(num_key_value_heads=4), "num_key_value_heads 4"),
    (dict(device="cuda:99"), "cuda:99"),
    (dict(global_batch_size=0), "--global_batch_size 0: must be at least 1"),
    (dict(max_steps=0), "at least 1"),
    (dict(tokenizer="", vocab_size=258), "--vocab_size 258: bytes and special tokens alone are 259"),
    (dict(lr=-1.0), "--lr -1.0"),
    (dict(lr="fast"), "fast"),
    (dict(schedule="square"), "square"),
    (dict(early_stopping=2), "--eval_every"),
    (dict(spike_action="rollback"), "--save_every"),
    (dict(val_fraction=1.5), "--val_fraction 1.5"),
    (dict(no_such_flag=1), "unknown flag --no_such_flag"),
    (dict(model="nowhere", tokenizer="", **NO_SHAPE), "nowhere"),
    (dict(model="nowhere"), "the shape is that of --model nowhere"),
    (dict(resume="nowhere"), "nowhere"),
], ids=str)
def test_bad_flags_are_refused_before_anything_is_written(text, tmp_path, change, complaint):
    with pytest.raises((ValueError, OSError)) as error:
        train(*([] if "data" in change else [text]), out=tmp_path / "run", **change)
    assert complaint in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content, complaint", [
    (b"", "empty"), (b"abc\0def" * 99, "binary"), (b"caf\xe9 " * 99, "not UTF-8"),
], ids=["empty", "binary", "latin-1"])
def test_unreadable_text_is_named(tmp_path, content, complaint):
    data = tmp_path / "bad.txt"
    data.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.txt.*{complaint}"):
        train(str(data), tmp_path / "run")
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_a_malformed_line_is_named_with_file_and_number(tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"text": "fine"}\n{"text": "torn\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2"):
        train(str(data), tmp_path / "run")


def test_a_used_folder_is_refused_without_resume(text, tmp_path):
    run = train(text, tmp_path / "run", max_steps=1)
    with pytest.raises(ValueError, match="not empty.*--resume auto"):
        train(text, run)


def test_resuming_with_another_seed_is_refused(text, tmp_path):
    run = train(text, tmp_path / "run", max_steps=1)
    with pytest.raises(ValueError, match="--seed 5: the run in .* was started with 0"):
        train(text, run, seed=5, max_steps=3, resume="auto")


def test_a_damaged_checkpoint_is_named_and_the_previous_one_offered(text, tmp_path):
    run = train(text, tmp_path / "run", save_every=4, keep_last=0)
    file = run / "step_00000012" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"step_00000012.model.safetensors is damaged.*--resume .*step_00000008"):
        train(text, run, max_steps=20, save_every=4, keep_last=0, resume="auto")


def test_tokenizer_and_model_that_disagree_are_refused(text, tmp_path):
    base = train(text, tmp_path / "base", max_steps=1)
    other = tmp_path / "other.txt"
    other.write_text("".join(chr(c) for c in range(33, 500)) * 3)
    with pytest.raises(ValueError, match="the tokenizer has .* tokens"):
        train(str(other), tmp_path / "run", model=str(base), tokenizer="char", **NO_SHAPE)


def test_command_line_errors_are_one_line_and_exit_code_2(tmp_path):
    for words in (["--max_stepz", "3"], ["--data", str(tmp_path / "absent.txt")]):
        done = subprocess.run([sys.executable, str(ROOT / "train_pretrain.py"), *words, "--out", str(tmp_path / "run")],
                              capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="file size limits, which stand in for a full disk, are a POSIX thing")
def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint(text, tmp_path):
    import resource
    run = train(text, tmp_path / "run", schedule="constant", save_every=4)
    size = (run / "step_00000012" / "optimizer.safetensors").stat().st_size
    command = [sys.executable, str(ROOT / "train_pretrain.py"), *flags(text, run, schedule="constant", save_every=4, max_steps=20, resume="auto")]
    done = subprocess.run(command, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, size - 100)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "step_00000016" in done.stderr and "step_00000012 is intact" in done.stderr
    assert not list(run.glob(".tmp*")) and checkpoint.damage(checkpoint.latest(run)) is None
    train(text, run, schedule="constant", save_every=4, max_steps=20, resume="auto")  # once there is room again
    assert_same_run(run, train(text, tmp_path / "whole", schedule="constant", save_every=4, max_steps=20))


def test_presets_have_the_sizes_they_are_named_after():
    from model import ModelConfig, num_parameters
    usual = {"1m": 2048, "10m": 4096, "124m": 50304, "350m": 50304, "1b": 128256, "3b": 128256, "8b": 128256}
    for name, shape in PRESETS.items():
        size = num_parameters(ModelConfig(usual[name], **shape))
        stated = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
        assert 0.85 < size / stated < 1.4, (name, size)
    chosen = train_pretrain.model_config(Args(preset="10m", num_hidden_layers=3), 4096)
    assert (chosen.hidden_size, chosen.num_hidden_layers) == (320, 3)  # single flags lie over the preset
