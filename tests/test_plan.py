"""Tests of parallel/plan.py: its formulas against the model, the ledger's, and published runs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model import CausalLM, ModelConfig, flops_per_token, num_parameters, rope_tables
from parallel.ledger import data_parallel_elements, state_bytes
from parallel.plan import (PRESETS, Layout, Machine, Shape, activation_bytes, days_and_cost, memory, plans, stage_weights,
                           step_seconds, traffic)

TINY = Shape(64, 160, 4, 8, 4, 100)


def config_of(shape: Shape) -> ModelConfig:
    return ModelConfig(shape.vocab, shape.hidden, shape.intermediate, shape.layers, shape.heads, shape.kv_heads,
                       tie_word_embeddings=shape.tied)


@pytest.mark.parametrize("name", PRESETS)
def test_weights_and_flops_are_the_model_s(name):
    shape = PRESETS[name]
    assert shape.numel == num_parameters(config_of(shape))
    assert shape.flops_per_token(4096) == flops_per_token(config_of(shape), 4096)


def test_activation_bytes_are_what_autograd_keeps_of_a_layer():
    model, (B, S) = CausalLM(config_of(TINY)), (2, 128)
    x, rope = torch.randn(B, S, 64, requires_grad=True), rope_tables(torch.arange(S)[None], 8, 1e4, torch.float32)
    weights = {p.numel() for p in model.parameters()}  # autocast's copies of them are counted apart
    others, kept = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *rope)}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in others and not (t.dtype == torch.bfloat16 and t.numel() in weights):
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.model.layers[0](x, rope, None)
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) == B * S * activation_bytes(TINY)


@pytest.mark.parametrize("zero", range(4))
def test_states_and_data_parallel_traffic_are_the_ledger_s_formulas(zero):
    layout = Layout(dp=4, cp=2, zero=zero, micro_batch=2)
    held, P = memory(TINY, layout, 128, microbatches=5), stage_weights(TINY, layout)
    assert P == TINY.numel - 64  # the final norm is left out
    assert {name: held[name] for name in ("parameters", "gradients", "optimizer")} == \
        {name: float(n) for name, n in state_bytes(P, 8, zero).items()}
    assert traffic(TINY, layout, 128, 5)["dp"] == float(4 * data_parallel_elements(P, 8, zero, 5))


def test_tensor_parallel_traffic_is_4_all_reduces_a_layer_and_2():
    sent = traffic(TINY, Layout(tp=4, micro_batch=2), 128, microbatches=3)["tp"]
    assert sent == 3 * (4 * 4 + 2) * 2 * 3 / 4 * (2 * 128 * 64 * 2)


def test_ring_attention_sends_2_c_minus_1_hops_and_c_of_gradients():
    sent = traffic(TINY, Layout(cp=4), 128, microbatches=1)["cp"]
    keys_and_values = 2 * 2 * 32 * 4 * 8  # bytes of this rank's: 32 tokens, 4 heads of 8
    assert sent == 4 * keys_and_values * (3 + 3 + 4)


def test_the_bubble_is_p_minus_1_over_m():
    seconds = step_seconds(TINY, Layout(pp=4), 128, microbatches=8, machine=Machine())
    assert seconds["bubble"] == pytest.approx(seconds["compute"] * 3 / 8)


@pytest.mark.parametrize("name, gpus, seq_len, published", [("8b", 8, 8192, 6667), ("70b", 256, 8192, 876),
                                                            ("405b", 512, 8192, 128)])
def test_estimates_are_near_torchtitan_s_published_runs(name, gpus, seq_len, published):
    """Tokens/s per H100 of its bfloat16 runs, the best of each size (arXiv:2410.06511): within a third."""
    speed, *_ = plans(PRESETS[name], gpus, Machine(), seq_len, {8: 16, 256: 1024, 512: 1024}[gpus])[0]
    assert 0.75 < speed / gpus / published < 1.34


def test_every_plan_fits_and_the_fastest_comes_first():
    machine = Machine(memory=24e9)
    found = plans(PRESETS["1b"], 8, machine, 2048, 64)
    assert all(sum(needs.values()) <= 0.9 * 24e9 for _, _, needs, _ in found)
    assert all(layout.dp * layout.tp * layout.pp * layout.cp == 8 for _, layout, _, _ in found)
    assert found[0][0] >= 0.999 * max(speed for speed, *_ in found)
    speed, layout, *_ = found[0]
    assert days_and_cost(speed * 86400, speed, 8, 2.0) == pytest.approx((1.0, 8 * 24 * 2.0))


def test_of_equally_fast_plans_the_simplest_is_recommended():
    _, layout, *_ = plans(PRESETS["124m"], 1, Machine(), 1024, 64)[0]
    assert layout == Layout(micro_batch=16) and layout.flags() == "--micro_batch_size 16"


def test_a_model_that_does_not_fit_gives_one_line():
    run = subprocess.run([sys.executable, "parallel/plan.py", "--preset", "405b", "--gpus", "8"], capture_output=True,
                         text=True, cwd=Path(__file__).resolve().parents[1])
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert "405.9B weights do not fit 8 GPUs of 86 GB: the leanest layout needs" in run.stderr
