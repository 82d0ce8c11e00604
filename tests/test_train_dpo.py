"""Preference optimization: each loss against its formula, the reference, and a run that can be resumed."""

import contextlib
import json
import math
import os
from pathlib import Path

import pytest
import torch

import checkpoint
import metrics
import train_dpo
from data.chat import render
from data.tokenizer import BPETokenizer, load_tokenizer
from model import CausalLM, ModelConfig
from stages import assert_same_run, kill_at_random_moments, losses, rows, run_stage
from train_dpo import Args, kto_loss, log1mexp, main, preference_loss

TINY = {"seq_len": 48, "global_batch_size": 4, "micro_batch_size": 4, "max_steps": 5, "warmup_steps": 0, "log_every": 1,
        "eval_every": 0, "save_every": 0, "device": "cpu", "lr": 1e-3}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny model that has dropout configured, which must not matter."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = BPETokenizer.train(["user says hi, assistant adds 1 and 2. " * 30], 280)
    config = ModelConfig(tokenizer.vocab_size, 32, 48, 2, 4, 2, max_position_embeddings=48, attention_dropout=0.5)
    checkpoint.save_model(folder, CausalLM(config), tokenizer)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"{a}+{b}", "chosen": f"no {a}", "rejected": str(a + b)} for a in range(8) for b in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(base, pairs, out, **changes) -> Path:
    return run_stage(main, TINY | {"model": base, "data": pairs, "out": out} | changes)


# ---- the losses, from numbers

def sigmoid(x):
    return 1 / (1 + math.exp(-x))


CASE = dict(pc=-5.0, pr=-7.0, rc=-6.0, rr=-6.5, nc=4, nr=2)  # policy and reference, chosen and rejected; lengths


@pytest.mark.parametrize("loss_type, settings, expected", [
    ("sigmoid", {}, -math.log(sigmoid(0.1 * 1.5))),  # c = 1, r = -0.5
    ("sigmoid", dict(label_smoothing=0.2), -0.8 * math.log(sigmoid(0.15)) - 0.2 * math.log(sigmoid(-0.15))),
    ("robust", dict(label_smoothing=0.2), (-0.8 * math.log(sigmoid(0.15)) + 0.2 * math.log(sigmoid(-0.15))) / 0.6),
    ("hinge", {}, 1 - 0.15),
    ("hinge", dict(beta=1.0), 0.0),
    ("ipo", {}, (1 / 4 + 0.5 / 2 - 1 / 0.2) ** 2),
    ("sigmoid_norm", dict(beta=2.0), -math.log(sigmoid(2.0 * (1 / 4 + 0.5 / 2)))),
    ("simpo", dict(beta=2.0, gamma=0.5), -math.log(sigmoid(2.0 * (-5 / 4 + 7 / 2) - 0.5))),
    ("orpo", {}, -0.1 * math.log(sigmoid((-5 / 4 + 7 / 2) - (math.log(1 - math.exp(-5 / 4)) - math.log(1 - math.exp(-7 / 2)))))),
])
def test_each_loss_is_its_formula(loss_type, settings, expected):
    pc, pr, rc, rr = (torch.tensor([CASE[name]], dtype=torch.float64) for name in ("pc", "pr", "rc", "rr"))
    lengths = dict(chosen_lengths=torch.tensor([4]), rejected_lengths=torch.tensor([2]))
    loss, chosen, rejected = preference_loss(pc, pr, rc, rr, loss_type=loss_type, **lengths, **settings)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert chosen.item() > rejected.item()


def test_rewards_are_beta_times_the_log_ratios_and_carry_no_gradient():
    policy = torch.tensor([-5.0], requires_grad=True)
    _, chosen, rejected = preference_loss(policy, policy - 2, torch.tensor([-6.0]), torch.tensor([-6.5]), beta=0.3)
    assert (chosen.item(), rejected.item()) == (pytest.approx(0.3), pytest.approx(-0.15))
    assert not chosen.requires_grad and not rejected.requires_grad


def test_losses_of_lengths_refuse_to_do_without():
    x = torch.zeros(1)
    for loss_type in ("ipo", "sigmoid_norm", "simpo", "orpo"):
        with pytest.raises(ValueError, match="needs chosen_lengths"):
            preference_loss(x, x, x, x, loss_type=loss_type)
    with pytest.raises(ValueError, match="choose sigmoid"):
        preference_loss(x, x, x, x, loss_type="dpo")


def test_the_gradient_pulls_chosen_up_and_rejected_down():
    for loss_type in ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "simpo", "orpo"):
        chosen, rejected = torch.tensor([-3.0], requires_grad=True), torch.tensor([-3.5], requires_grad=True)
        n = torch.tensor([3])
        preference_loss(chosen, rejected, torch.tensor([-3.0]), torch.tensor([-3.0]), loss_type=loss_type,
                        chosen_lengths=n, rejected_lengths=n)[0].sum().backward()
        assert chosen.grad.item() < 0 < rejected.grad.item(), loss_type


@pytest.mark.parametrize("kl, z", [([0.5, 1.0], 0.75), ([-3.0, 1.0], 0.0), ([], 0.0), (0.75, 0.75)], ids=str)
def test_kto_is_its_formula_for_good_and_bad_answers(kl, z):
    """1 - s(beta (ratio - z)) if desirable, 1 - s(beta (z - ratio)) if not; z is no part of the gradient."""
    policy = torch.tensor([-5.0, -7.0], dtype=torch.float64, requires_grad=True)
    kl = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
    loss = kto_loss(policy, torch.tensor([-6.0, -6.5]), torch.tensor([True, False]), kl, beta=0.3, desirable_weight=2.0,
                    undesirable_weight=0.5)
    expected = [2.0 * (1 - sigmoid(0.3 * (1.0 - z))), 0.5 * (1 - sigmoid(0.3 * (z + 0.5)))]
    assert loss.tolist() == pytest.approx(expected, abs=1e-9)
    loss.sum().backward()
    assert policy.grad[0] < 0 < policy.grad[1] and (kl.grad is None or not kl.grad.any())


def test_log1mexp_stays_finite_up_to_zero():
    x = torch.tensor([-1e-300, -1e-20, -1e-3, -math.log(2), -1.0, -50.0, 0.0], dtype=torch.float64)
    y = log1mexp(x)
    assert y.isfinite().all()
    assert y[2].item() == pytest.approx(math.log(-math.expm1(-1e-3)), rel=1e-14)
    assert y[5].item() == pytest.approx(-math.exp(-50), rel=1e-12)
    assert y[1].item() == pytest.approx(math.log(1e-20), rel=1e-12)


# ---- the stage

def test_step_0_loss_is_ln_2_with_dropout_configured(base, pairs, tmp_path):
    run = train(base, pairs, tmp_path / "run", max_steps=1, eval_every=1)
    assert json.loads((base / "config.json").read_text())["attention_dropout"] == 0.5
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert rows(run, "eval")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    first = rows(run, "eval")[0]
    assert (first["margin"], first["kl"]) == (pytest.approx(0, abs=1e-5), pytest.approx(0, abs=1e-5))


def test_precomputed_equals_online(base, pairs, tmp_path):
    runs = [train(base, pairs, tmp_path / kind, reference=kind, dtype="float64", lr=1e-2) for kind in ("precomputed", "online")]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-9)
    assert losses(runs[0])[-1] < losses(runs[0])[0] - 0.1


def pairs_of(args, tokenizer, split):
    return train_dpo.read_pairs(tokenizer, split, data=args.data, val_data=args.val_data, val_fraction=args.val_fraction,
                                template=args.template, seq_len=args.seq_len)


def test_scores_are_those_of_each_answer_alone(base, pairs):
    """Padding on the right changes nothing; only the answer and its end of turn count."""
    tokenizer = load_tokenizer(base)
    train_dpo.prepare_tokenizer(tokenizer, "chatml")
    args = train_dpo.parse(Args, argv=["--model", str(base), "--data", str(pairs), "--dtype", "float64", "--seq_len", "48", "--template", "chatml"])
    model, some = train_dpo.load(args, str(base), tokenizer), pairs_of(args, tokenizer, "train")[:5]
    sums, lengths = train_dpo.score(model, some, "cpu", contextlib.nullcontext())
    for row, pair in enumerate(some):
        for side, (ids, mask) in enumerate((pair.chosen, pair.rejected)):
            logp = model(torch.tensor([ids])).log_softmax(-1)[0]
            expected = sum(logp[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t])
            assert sums[row, side].item() == pytest.approx(expected.item(), abs=1e-9)
            assert lengths[row, side] == sum(mask)
            assert tokenizer.special_tokens["<|im_end|>"] == [i for i, m in zip(ids, mask) if m][-1]


def test_the_nll_of_the_chosen_is_added_at_its_weight(base, pairs, tmp_path):
    run = train(base, pairs, tmp_path / "run", max_steps=1, eval_every=1, val_data=str(pairs), nll_weight=0.5)
    tokenizer = load_tokenizer(base)
    train_dpo.prepare_tokenizer(tokenizer, "chatml")
    args = train_dpo.parse(Args, argv=["--model", str(base), "--data", str(pairs), "--val_data", str(pairs),
                                        "--template", "chatml", "--seq_len", "48"])
    model, held_out = train_dpo.load(args, str(base), tokenizer), pairs_of(args, tokenizer, "val")
    sums, lengths = train_dpo.score(model, held_out, "cpu", contextlib.nullcontext())
    expected = math.log(2) + 0.5 * (-sums[:, 0] / lengths[:, 0]).mean().item()
    assert len(held_out) == 64 and rows(run, "eval")[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_it_learns_the_preference(base, pairs, tmp_path):
    run = train(base, pairs, tmp_path / "run", max_steps=40, lr=1e-2, eval_every=20)
    before, *_, after = rows(run, "eval")
    assert before["preference_accuracy"] < 0.5 and after["preference_accuracy"] > 0.95 and after["accuracy"] > 0.95
    assert after["margin"] == pytest.approx(after["chosen_reward"] - after["rejected_reward"]) and after["margin"] > 0.5


@pytest.mark.parametrize("change", [
    dict(loss_type="ipo"), dict(loss_type="hinge"), dict(loss_type="robust", label_smoothing=0.1), dict(loss_type="sigmoid_norm"),
    dict(loss_type="simpo", beta=2.0), dict(loss_type="orpo"), dict(beta=0.5), dict(label_smoothing=0.1), dict(lr=1e-2),
    dict(nll_weight=0.2), dict(min_lr=1e-4), dict(schedule="constant"), dict(warmup_steps=3), dict(optimizer="muon"), dict(optimizer="lion"),
    dict(weight_decay=10.0), dict(grad_clip=0.01), dict(seed=1), dict(global_batch_size=2), dict(seq_len=11), dict(dtype="float64"),
    dict(dtype="bfloat16"), dict(dtype="float16"), dict(template="alpaca"), dict(val_fraction=0.5),
], ids=str)
def test_flag_changes_the_training(base, pairs, tmp_path, change, baseline=[]):
    if not baseline:
        baseline.append(losses(train(base, pairs, tmp_path / "plain")))
    changed = losses(train(base, pairs, tmp_path / "changed", **change))
    assert len(changed) == 5 and all(map(math.isfinite, changed)) and changed != baseline[0]


def test_simpo_s_gamma_counts(base, pairs, tmp_path):
    a, b = (losses(train(base, pairs, tmp_path / str(g), loss_type="simpo", gamma=g)) for g in (0.5, 1.5))
    assert a != b


@pytest.mark.parametrize("change", [dict(micro_batch_size=1), dict(activation_checkpointing="full"), dict(attention="eager"),
                                    dict(attention="triton", kernels="triton")], ids=str)
def test_flag_changes_the_way_not_the_result(base, pairs, tmp_path, change):
    plain, other = (train(base, pairs, tmp_path / name, dtype="float64", **c) for name, c in (("plain", {}), ("other", change)))
    assert losses(other) == pytest.approx(losses(plain), abs=1e-9)


def test_another_reference_model_and_tokenizer_are_taken(base, pairs, tmp_path):
    trained = train(base, pairs, tmp_path / "trained", max_steps=20, lr=1e-2)
    own = train(trained, pairs, tmp_path / "own", max_steps=1)
    other = train(trained, pairs, tmp_path / "other", max_steps=1, ref_model=base, tokenizer=checkpoint.latest(trained))
    assert losses(own)[0] == pytest.approx(math.log(2), abs=1e-6) and losses(other)[0] < 0.6


def test_resumed_equals_undisturbed_to_the_bit(base, pairs, tmp_path):
    settings = dict(max_steps=10, save_every=3, eval_every=4, keep_last=0, schedule="constant")
    whole = train(base, pairs, tmp_path / "whole", **settings)
    parts = train(base, pairs, tmp_path / "parts", **settings | dict(max_steps=5))
    train(base, pairs, parts, **settings, resume=str(parts / "step_00000003"))
    assert_same_run(whole, parts)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: starting 10 fresh interpreters would take minutes")
def test_killed_at_10_random_moments_ends_as_if_undisturbed(base, pairs, tmp_path):
    settings = dict(model=base, data=pairs, max_steps=60, save_every=2, eval_every=7)
    whole, killed = kill_at_random_moments("train_dpo", TINY | settings, tmp_path, kills=10)
    assert_same_run(whole, killed)
    assert (killed / "report.html").exists()


def test_equal_answers_are_skipped_and_counted(base, pairs, tmp_path, capsys):
    path = tmp_path / "ties.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n" + pairs.read_text())
    train(base, path, tmp_path / "run", val_data=str(path), max_steps=1)
    assert "64 pairs; left out: 1 of two equal answers, 0 too long" in capsys.readouterr().out


@pytest.mark.parametrize("change, complaint", [
    (dict(beta=0.0), "must be above 0"), (dict(label_smoothing=0.5), "below 0.5"), (dict(model="nowhere"), "nowhere"),
    (dict(label_smoothing=0.1, loss_type="ipo"), "no meaning for --loss_type ipo"), (dict(ref_model="nowhere"), "nowhere"),
    (dict(data="nowhere.jsonl"), "nowhere.jsonl"), (dict(template="gpt"), "choose from chatml"), (dict(seq_len=99), "knows 48"),
    (dict(reference="later"), "later"),
], ids=str)
def test_bad_flags_are_refused(base, pairs, tmp_path, change, complaint):
    with pytest.raises((ValueError, OSError), match=complaint):
        train(**{"base": base, "pairs": pairs, "out": tmp_path / "run"} | change)
    assert not (tmp_path / "run").exists()


def test_a_longer_window_takes_a_scaling_of_rope_and_still_begins_at_ln_2(base, pairs, tmp_path):
    run = train(base, pairs, tmp_path / "run", seq_len=96, rope_scaling="linear", max_steps=1)
    config = json.loads((checkpoint.latest(run) / "config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_scaling"]["factor"]) == (96, 2.0)
    assert abs(losses(run)[0] - math.log(2)) < 1e-6  # the reference, too, is stretched


def test_every_flag_is_tried_somewhere_in_this_file():
    names = (Path(__file__).name, "test_train_adapters.py", "test_train_dpo_parallel.py", "test_train_sft_parallel.py")
    here = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names)
    assert [name for name in Args.__dataclass_fields__ if f"{name}=" not in here and f'"{name}"' not in here] == []
