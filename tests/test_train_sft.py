"""Supervised fine-tuning: what is trained, that packing changes nothing, that flags do, and that a run can be resumed."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import metrics
import train_sft
from data.chat import render
from data.tokenizer import BPETokenizer, load_tokenizer
from model import CausalLM, ModelConfig
from stages import assert_same_run, kill_at_random_moments, losses, rows, run_stage
from train_sft import Args, main, sft_loss, weight_of

TINY = {"seq_len": 48, "global_batch_size": 4, "micro_batch_size": 4, "max_steps": 6, "warmup_steps": 1, "log_every": 1,
        "eval_every": 0, "save_every": 0, "sample_tokens": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny model's folder, with a tokenizer that lacks ChatML's tokens."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = BPETokenizer.train(["user says hi, assistant adds 1 and 2. " * 30], 280)
    config = ModelConfig(tokenizer.vocab_size, 32, 48, 2, 4, 2, max_position_embeddings=48, tie_word_embeddings=True)
    checkpoint.save_model(folder, CausalLM(config), tokenizer)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "sums.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": str(a + b)}]}
            for a in range(8) for b in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(base, chats, out, **changes) -> Path:
    return run_stage(main, TINY | {"model": base, "data": chats, "out": out} | changes)


def test_the_loss_weighs_answers_prompts_and_nothing_else_by_hand():
    logits = torch.randn(1, 4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[2, -101 - 5, -100, 0]])  # trained 2, prompt 5, nothing, trained 0
    nll = -logits.detach().log_softmax(-1)[0]
    trained, prompt = nll[0, 2] + nll[3, 0], nll[1, 5]
    assert sft_loss(logits, labels).item() == pytest.approx(trained.item(), abs=1e-12)
    assert sft_loss(logits, labels, 0.25).item() == pytest.approx((trained + 0.25 * prompt).item(), abs=1e-12)
    assert (weight_of(labels, 0.0), weight_of(labels, 0.25)) == (2, 2.25)


def test_all_masked_batch_gives_loss_0_and_no_nan():
    logits = torch.randn(1, 3, 7, requires_grad=True)
    loss = sft_loss(logits, torch.full((1, 3), -100)) / (weight_of(torch.full((1, 3), -100), 0.0) or 1)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_packed_training_equals_each_conversation_alone(base, chats, tmp_path):
    """One update over everything, float64: loss and gradient norm from a loop over single, unpacked conversations."""
    run = train(base, chats, tmp_path / "run", dtype="float64", global_batch_size=100, max_steps=1, micro_batch_size=3)
    index = json.loads((run / "data" / "index.json").read_text())["splits"]["train"]
    n_rows = index["tokens"] // 48
    run = train(base, chats, tmp_path / "epoch", dtype="float64", global_batch_size=n_rows, max_steps=1, micro_batch_size=3)
    tokenizer = load_tokenizer(run / "step_00000001")
    model = checkpoint.load_model(base, dtype=torch.float64)
    checkpoint.grow_vocabulary(model, tokenizer.vocab_size)
    stream = {tuple(part) for part in documents(run / "data", "train")}
    total, count = 0.0, 0
    for line in chats.read_text().splitlines():
        ids, mask = render(json.loads(line)["messages"], tokenizer)
        if tuple(ids) not in stream:
            continue  # held out
        logits = model(torch.tensor([ids[:-1]]))[0]
        nll = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        total = total + nll[torch.tensor(mask[1:], dtype=torch.bool)].sum()
        count += sum(mask)
    (total / count).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert count == rows(run)[0]["tokens"] == index["trained_tokens"]
    assert rows(run)[0]["loss"] == pytest.approx((total / count).item(), abs=1e-9)
    assert rows(run)[0]["grad_norm"] == pytest.approx(norm.item(), abs=1e-9)


def documents(folder, split) -> list[list[int]]:
    from data.loader import eval_batches
    found = []
    for ids, _, cu_seqlens in eval_batches(folder, split, 48, 8):
        found += [ids.flatten()[a:b].tolist() for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:])]
    return found


def test_it_learns_to_answer_and_to_stop(base, chats, tmp_path):
    run = train(base, chats, tmp_path / "run", max_steps=120, lr=1e-2, eval_every=40, save_every=40, sample_tokens=8,
                sample_prompt="3+4", val_data=str(chats))
    evaluations = rows(run, "eval")
    assert [row["step"] for row in evaluations] == [0, 40, 80, 120]
    assert evaluations[-1]["loss"] < 0.5 * evaluations[0]["loss"]
    folder = checkpoint.latest(run)
    tokenizer, config = load_tokenizer(folder), json.loads((folder / "generation_config.json").read_text())
    assert tokenizer.special_tokens["<|im_end|>"] in config["eos_token_id"]  # so that any engine stops there
    assert "<|im_start|>" in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    text, = [sample["text"] for sample in json.loads((run / "samples.json").read_text())]
    assert text.isdigit()  # and nothing after the number: it stops


def test_new_tokens_start_as_the_mean_of_the_old(base):
    model = checkpoint.load_model(base)
    old = model.model.embed_tokens.weight.detach().clone()
    checkpoint.grow_vocabulary(model, len(old) + 3)
    table = model.model.embed_tokens.weight
    assert model.lm_head.weight is table and model.config.vocab_size == len(old) + 3
    assert torch.equal(table[: len(old)], old) and torch.allclose(table[len(old):], old.mean(0).expand(3, -1))
    assert model(torch.tensor([[len(old) + 2]])).shape == (1, 1, len(old) + 3)


def test_neftune_is_bounded_noise_in_training_only():
    embedding = torch.nn.Embedding(10, 16)
    embedding.register_forward_hook(train_sft.neftune(5.0, 8))
    ids = torch.arange(8)[None]
    noise = embedding(ids) - embedding.weight[ids]
    bound = 5.0 / math.sqrt(8 * 16)
    assert 0.9 * bound < noise.abs().max().item() <= bound and abs(noise.mean().item()) < 0.1 * bound
    embedding.eval()
    assert torch.equal(embedding(ids), embedding.weight[ids])


@pytest.mark.parametrize("change", [
    dict(lr=1e-2), dict(min_lr=1e-3, max_steps=6), dict(schedule="linear"), dict(warmup_steps=4), dict(optimizer="muon"),
    dict(optimizer="lion"), dict(optimizer="adafactor", lr=1e-2), dict(weight_decay=10.0), dict(beta1=0.5), dict(beta2=0.5),
    dict(grad_clip=0.01), dict(seed=1), dict(global_batch_size=2), dict(seq_len=32), dict(dtype="float64"),
    dict(dtype="bfloat16"), dict(dtype="float16"), dict(template="alpaca"), dict(template="llama3"), dict(neftune_alpha=5.0),
    dict(prompt_loss_weight=0.5), dict(val_fraction=0.5),
], ids=str)
def test_flag_changes_the_training(base, chats, tmp_path, change, baseline=[]):
    if not baseline:
        baseline.append(losses(train(base, chats, tmp_path / "plain")))
    changed = losses(train(base, chats, tmp_path / "changed", **change))
    assert len(changed) == 6 and all(map(math.isfinite, changed)) and changed != baseline[0]


def test_compile_and_tokenizer_are_taken(base, chats, tmp_path, monkeypatch):
    compiled, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or real(model, backend="eager"))
    plain = train(base, chats, tmp_path / "plain", max_steps=2)
    assert losses(train(base, chats, tmp_path / "compiled", max_steps=2, compile=True)) == pytest.approx(losses(plain), abs=1e-5)
    assert len(compiled) == 1
    tokenizer = BPETokenizer.train(["0 1 2 3 4 5 6 7 8 9 " * 30], 262)
    tokenizer.save(tmp_path / "other")
    other = train(base, chats, tmp_path / "run", max_steps=2, tokenizer=tmp_path / "other")
    assert load_tokenizer(checkpoint.latest(other)).encode("user says") == tokenizer.encode("user says")


@pytest.mark.parametrize("change", [dict(micro_batch_size=1), dict(activation_checkpointing="full"), dict(attention="eager"),
                                    dict(attention="triton", kernels="triton"), dict(kernels="triton", prompt_loss_weight=0.3)], ids=str)
def test_flag_changes_the_way_not_the_result(base, chats, tmp_path, change):
    same = {name: value for name, value in change.items() if name == "prompt_loss_weight"}
    plain = train(base, chats, tmp_path / "plain", dtype="float64", **same)
    other = train(base, chats, tmp_path / "other", dtype="float64", **change)
    assert losses(other) == pytest.approx(losses(plain), abs=1e-9)


def test_replayed_text_is_mixed_in_and_remembered(base, chats, tmp_path):
    text = tmp_path / "old.txt"
    text.write_text("user says hi, assistant adds 1 and 2. " * 60)
    plain = train(base, chats, tmp_path / "plain", max_steps=40, lr=1e-2)
    mixed = train(base, chats, tmp_path / "mixed", max_steps=40, lr=1e-2, replay=str(text), replay_fraction=0.5)
    tokenizer = load_tokenizer(checkpoint.latest(plain))
    ids = torch.tensor([tokenizer.encode("user says hi, assistant adds 1 and 2. ")])
    loss = [F.cross_entropy(checkpoint.load_model(checkpoint.latest(run))(ids)[0, :-1], ids[0, 1:]).item() for run in (plain, mixed)]
    assert loss[1] < loss[0] - 1.0


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_resumed_equals_undisturbed_to_the_bit(base, chats, tmp_path, optimizer):
    settings = dict(optimizer=optimizer, max_steps=10, save_every=3, eval_every=4, neftune_alpha=5.0, keep_last=0, schedule="constant")
    whole = train(base, chats, tmp_path / "whole", **settings)
    parts = train(base, chats, tmp_path / "parts", **settings | dict(max_steps=5))
    train(base, chats, parts, **settings, resume=str(parts / "step_00000003"))
    assert_same_run(whole, parts)


def test_a_longer_window_needs_a_scaling_of_rope_and_hands_it_on(base, chats, tmp_path):
    with pytest.raises(ValueError, match="--seq_len 96: the model knows 48 positions; --rope_scaling"):
        train(base, chats, tmp_path / "refused", seq_len=96)
    run = train(base, chats, tmp_path / "run", seq_len=96, rope_scaling="yarn", max_steps=1)
    config = json.loads((checkpoint.latest(run) / "config.json").read_text())
    assert config["max_position_embeddings"] == 96
    assert (config["rope_scaling"]["rope_type"], config["rope_scaling"]["factor"]) == ("yarn", 2.0)


def test_the_balance_loss_moves_the_router_and_stays_out_of_the_log(chats, tmp_path):
    runs = {}
    for coefficient in (0.0, 100.0):
        folder = tmp_path / f"base{coefficient}"
        folder.mkdir()
        tokenizer = BPETokenizer.train(["user says hi, assistant adds 1 and 2. " * 30], 280)
        config = ModelConfig(tokenizer.vocab_size, 32, 48, 2, 4, 2, max_position_embeddings=48, num_experts=4,
                             router_aux_loss_coef=coefficient)
        checkpoint.save_model(folder, CausalLM(config), tokenizer)
        run = train(folder, chats, tmp_path / f"run{coefficient}", max_steps=1, grad_clip=0.0, optimizer="adafactor")
        runs[coefficient] = losses(run)[0], rows(run)[0]["grad_norm"]
    assert runs[0.0][0] == runs[100.0][0] and runs[100.0][1] > 2 * runs[0.0][1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: starting 10 fresh interpreters would take minutes")
def test_killed_at_10_random_moments_ends_as_if_undisturbed(base, chats, tmp_path):
    settings = dict(model=base, data=chats, max_steps=60, save_every=2, eval_every=7, neftune_alpha=5.0, sample_tokens=4)
    whole, killed = kill_at_random_moments("train_sft", TINY | settings, tmp_path, kills=10)
    assert_same_run(whole, killed)
    assert (killed / "samples.json").read_text() == (whole / "samples.json").read_text()
    assert (killed / "report.html").exists()


def test_rows_left_by_a_killed_run_with_another_template_are_not_used(base, chats, tmp_path):
    """Before the first checkpoint there may be rows but no args.json to compare with."""
    run = train(base, chats, tmp_path / "run", max_steps=1)
    for name in ("args.json", "latest"):
        (run / name).unlink()
    with pytest.raises(ValueError, match="made with .*chatml.*, not .*alpaca"):
        train(base, chats, run, max_steps=1, template="alpaca", resume="auto")


def test_early_stopping_and_the_best_checkpoint(base, chats, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "1+1", "completion": "zebra zebra"}) + "\n")
    run = train(base, chats, tmp_path / "run", val_data=str(other), lr=3e-2, max_steps=300, eval_every=5, save_every=5,
                keep_last=1, early_stopping=2)
    evaluations = rows(run, "eval")
    best = min(evaluations[1:], key=lambda row: row["loss"])["step"]
    assert evaluations[-1]["step"] == best + 10 < 300 and set(checkpoint.step_folders(run)) == {best, best + 10}


@pytest.mark.parametrize("change, complaint", [
    (dict(template="gpt"), "choose from chatml"),
    (dict(seq_len=4096), "knows 48 positions"),
    (dict(model="nowhere"), "nowhere"),
    (dict(data="nowhere.jsonl"), "nowhere.jsonl"),
    (dict(prompt_loss_weight=-1.0), "at least 0"),
    (dict(early_stopping=1), "--eval_every"),
], ids=str)
def test_bad_flags_are_refused(base, chats, tmp_path, change, complaint):
    with pytest.raises((ValueError, OSError), match=complaint):
        train(**{"base": base, "chats": chats, "out": tmp_path / "run"} | change)


@pytest.mark.parametrize("line, complaint", [
    ('{"messages": []}', "bad.jsonl:2"),
    ('{"messages": [{"role": "user", "content": "hi"}]}', "bad.jsonl:2"),
    ('{"messages": [{"role": "wizard", "content": "hi"}]}', "bad.jsonl:2.*wizard"),
    ("{", "bad.jsonl:2"),
], ids=["empty", "no assistant", "unknown role", "malformed"])
def test_bad_conversations_are_named_by_file_and_line(base, chats, tmp_path, line, complaint):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chats.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(ValueError, match=complaint):
        train(base, bad, tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()


def test_a_long_conversation_is_cut_and_counted(base, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    turns = [{"role": "user", "content": "hi " * 30}, {"role": "assistant", "content": "hello " * 30}]
    short = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": short}) + "\n")
    train(base, path, tmp_path / "run", val_data=str(path), max_steps=1)
    assert "2 cut, 0 nothing to train on at --seq_len 48" in capsys.readouterr().out  # once for each split
    assert rows(tmp_path / "run")[0]["tokens"] > 0


def test_every_flag_is_tried_somewhere_in_this_file():
    names = (Path(__file__).name, "test_train_adapters.py", "test_train_sft_parallel.py")
    here = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names)
    untried = [name for name in Args.__dataclass_fields__ if f"{name}=" not in here and f'"{name}"' not in here]
    assert untried == []
