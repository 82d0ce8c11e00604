"""calibrate.py: GPTQ against brute force and its own algebra, AWQ's and SmoothQuant's promises, whole models."""

import contextlib
import copy
import json

import pytest
import torch
from torch import nn

import calibrate
from calibrate import (awq_clip, awq_scale, calibration_windows, fold, gptq, in_groups, round_weight, save_quantized,
                       scale_pairs, smooth_scale)
from model import CausalLM, ModelConfig
from quant import Int4Linear, Int8Linear, dequantize_affine, linear_layers, quantize_affine, quantize_model


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(n: int, K: int, seed=5) -> torch.Tensor:
    """(n, K) with correlated columns of very unequal sizes, as activations have."""
    return random(n, K, seed=seed) @ random(K, K, seed=seed + 1) * torch.logspace(-1, 1, K, dtype=torch.float64)


def decoded(r) -> torch.Tensor:
    return (r.codes.double() - r.zero.double()[:, r.g_idx]) * r.scale.double()[:, r.g_idx]


def tiny(dtype=torch.float32, **changes) -> CausalLM:
    shape = dict(vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1)
    model = CausalLM(ModelConfig(**shape | changes)).to(dtype).eval()
    with torch.no_grad():  # unequal channels, as trained norms have
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.mul_(torch.logspace(-1, 1, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(3))])
    return model


WINDOWS = torch.randint(0, 90, (6, 32), generator=torch.Generator().manual_seed(0))

# ---------------------------------------------------------------------------------------------------------------- GPTQ


@pytest.mark.parametrize("group_scales", ["updated", "old"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_is_optimal_brain_quantization_one_column_at_a_time(group_scales, act_order, symmetric):
    """Brute force (OBQ, eq. 2 and 3 of the paper): the inverse of H for the columns that are left is made anew each time."""
    K, bits, size, block = 24, 3, 8, 12
    w, X = random(5, K), inputs(60, K)
    H = X.T @ X * 2 / 60
    ours = gptq(w, H, bits=bits, group_size=size, symmetric=symmetric, act_order=act_order, group_scales=group_scales,
                block=block, scale_dtype=None)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    order = H.diagonal().argsort(descending=True) if act_order else torch.arange(K)
    W, old = w[:, order].clone(), w[:, order].clone()
    damped, Q = damped[order][:, order], torch.empty(5, K, dtype=torch.float64)
    for k in range(K):
        if k % block == 0:
            old = W.clone()
        if k % size == 0:
            group = (W if group_scales == "updated" else old)[:, k : k + size]
            q = quantize_affine(group, bits, symmetric)
        rounded = dequantize_affine(q._replace(codes=_codes_of(W[:, k], q), shape=(5, 1)))[:, 0]
        inverse = torch.linalg.inv(damped[k:, k:])
        W[:, k:] -= ((W[:, k] - rounded) / inverse[0, 0])[:, None] * inverse[0]
        Q[:, k] = rounded
    torch.testing.assert_close(decoded(ours), Q[:, order.argsort()], rtol=1e-9, atol=1e-9)


def _codes_of(column, q):
    from quant import affine_codes
    return affine_codes(column[:, None], q.scale, q.zero, q.bits)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_error_is_the_trace_of_what_it_did(act_order):
    """With H^-1 = U^T U, W - Q = E U, so tr((W - Q) H (W - Q)^T) = sum of e^2."""
    w, X = random(7, 40), inputs(100, 40)
    H = X.T @ X
    r = gptq(w, H, bits=4, group_size=16, act_order=act_order)
    D = w - decoded(r)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    assert r.error == pytest.approx(torch.trace(D @ damped @ D.T).item(), rel=1e-9)


@pytest.mark.parametrize("bits, size", [(4, 32), (3, None), (2, 16)])
def test_gptq_of_uncorrelated_inputs_rounds_to_the_nearest(bits, size):
    w = random(9, 80)
    r = gptq(w, torch.eye(80, dtype=torch.float64), bits=bits, group_size=size)
    nearest = quantize_affine(w, bits, False, "group", size or 80, scale_dtype=torch.float16)
    assert torch.equal(decoded(r), dequantize_affine(nearest))


def test_block_size_does_not_change_the_result():
    w, X = random(6, 70), inputs(100, 70)
    results = [decoded(gptq(w, X.T @ X, bits=4, group_size=32, block=block)) for block in (1, 16, 24, 128)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-9)


def test_gptq_changes_the_output_less_than_rounding_to_the_nearest():
    w, X = random(32, 64), inputs(300, 64) / torch.logspace(-1, 1, 64)
    plain = dequantize_affine(quantize_affine(w, 3, False, "group", 32))
    errors = [((w - q) @ X.T).square().sum() for q in
              (plain, *(decoded(gptq(w, X.T @ X, bits=3, group_size=32, act_order=a)) for a in (False, True)))]
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.7 * errors[0]


def test_inputs_that_are_always_zero_get_weight_zero_and_do_no_harm():
    w, X = random(4, 32), inputs(50, 32)
    X[:, [3, 9]] = 0
    r = gptq(w, X.T @ X, bits=4, group_size=32)
    assert torch.equal(decoded(r)[:, [3, 9]], torch.zeros(4, 2, dtype=torch.float64)) and decoded(r).isfinite().all()


def test_fewer_samples_than_columns_still_factorise():
    w, X = random(4, 64), inputs(5, 64)
    assert decoded(gptq(w, X.T @ X, bits=4, group_size=32)).isfinite().all()


# ----------------------------------------------------------------------------------------------------------------- AWQ


def test_rounded_weight_is_what_the_layer_decodes():
    w = random(12, 172, dtype=torch.float32)
    for bits, size, symmetric in ((4, 64, False), (3, 32, True), (4, None, False)):
        layer = Int4Linear(w, bits=bits, group_size=size, symmetric=symmetric)
        assert torch.equal(round_weight(w, bits, size, symmetric), layer.dequantize())


def test_awq_scale_is_never_worse_than_rounding_to_the_nearest():
    rounding = dict(bits=3, group_size=32, symmetric=False)
    for seed in range(4):
        block = nn.Linear(64, 16, bias=False, dtype=torch.float64)
        block.weight.data = random(16, 64, seed=seed)
        x = inputs(100, 64, seed=seed) if seed else random(100, 64)
        kept = block.weight.data.clone()
        with torch.no_grad():
            s, error = awq_scale(block, [((x,), {})], [block], x.abs().mean(0), rounding)
        plain = ((round_weight(kept, **rounding) - kept) @ x.T).square().sum().item()
        ours = ((round_weight(kept * s, **rounding) / s - kept) @ x.T).square().sum().item()
        assert ours == pytest.approx(error) and error <= plain * (1 + 1e-12)
        assert torch.equal(block.weight.data, kept)
        assert seed == 0 or error < 0.8 * plain


def test_awq_clip_is_the_best_of_its_ten_shares_and_never_worse_than_none():
    w, x, rounding = random(70, 64) ** 3, inputs(50, 64), dict(bits=3, group_size=32, symmetric=False)
    clipped = awq_clip(w, x, **rounding)
    X = in_groups(x, 32)

    def errors(c):  # (rows, groups)
        D = in_groups(round_weight(c, **rounding) - w, 32)
        return torch.einsum("ngk,tgk->ngt", D, X).square().sum(-1)

    assert (errors(clipped) <= errors(w) * (1 + 1e-9)).all() and errors(clipped).sum() < 0.9 * errors(w).sum()
    share = in_groups(clipped, 32).abs().amax(-1) / in_groups(w, 32).abs().amax(-1)
    assert torch.allclose((share * 20).round(), share * 20) and share.min() >= 0.55 - 1e-9 and share.max() == 1


def test_no_scale_goes_between_v_and_o_with_grouped_queries():
    pairs = {tuple(names): block for _, names, block in scale_pairs(tiny().model.layers[0])}
    assert ("self_attn.o_proj",) not in pairs and ("mlp.down_proj",) in pairs
    full = scale_pairs(tiny(num_key_value_heads=4).model.layers[0])
    assert ["self_attn.o_proj"] in [names for _, names, _ in full]


def test_q_and_k_are_not_clipped(monkeypatch):
    seen = []
    monkeypatch.setattr(calibrate, "awq_clip", lambda w, x, **how: seen.append(w.shape) or w)
    calibrate.calibrate(tiny(), WINDOWS, "awq", group_size=32)
    assert seen == 2 * [(32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]  # v, o, gate, up, down


@pytest.mark.parametrize("kv_heads, bias", [(2, False), (4, True)])
def test_folded_scales_leave_the_function_as_it_is(kv_heads, bias):
    model = tiny(torch.float64, num_key_value_heads=kv_heads, attention_bias=bias)
    with torch.no_grad():
        before = model(WINDOWS)
        for layer in model.model.layers:
            if bias:
                layer.self_attn.v_proj.bias.normal_()
                before = model(WINDOWS)
            for i, (previous, names, _) in enumerate(scale_pairs(layer)):
                linears = [layer.get_submodule(name) for name in names]
                fold(previous, linears, random(linears[0].in_features, seed=i).exp())
        torch.testing.assert_close(model(WINDOWS), before, rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------------------------- SmoothQuant


def test_smoothing_makes_both_sides_equally_large_at_one_half():
    x, w = inputs(50, 16), random(8, 16)
    s = smooth_scale(x.abs().amax(0), [w], 0.5)
    torch.testing.assert_close((x / s).abs().amax(0), (w * s).abs().amax(0))
    torch.testing.assert_close(smooth_scale(x.abs().amax(0), [w], 1.0), x.abs().amax(0))  # all of it to the weights


@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_smoothquant_folds_exactly(alpha, monkeypatch):
    model = tiny(torch.float64)
    before, weights = model(WINDOWS), copy.deepcopy(model.state_dict())
    monkeypatch.setattr(calibrate, "quantize_model", lambda layer, method: layer)
    calibrate.calibrate(model, WINDOWS, "smoothquant", alpha=alpha)
    torch.testing.assert_close(model(WINDOWS), before, rtol=1e-9, atol=1e-9)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.state_dict()[name], weights[name])


def test_smoothquant_serves_w8a8():
    model = tiny()
    with torch.no_grad():  # outlier channels, which a token's one scale cannot hold beside the others
        for layer in model.model.layers:
            layer.input_layernorm.weight[:2] *= 50
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).weight[:, :2] /= 50
        full = model(WINDOWS)
        errors = []
        for quantize in (lambda m: quantize_model(m, "w8a8"), lambda m: calibrate.calibrate(m, WINDOWS, "smoothquant")):
            rounded = quantize(copy.deepcopy(model))
            assert isinstance(rounded.model.layers[1].self_attn.q_proj, Int8Linear)
            errors.append((rounded(WINDOWS) - full).norm() / full.norm())
    assert errors[1] < 0.7 * errors[0]


# --------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("method, settings", [("gptq", {}), ("gptq", dict(act_order=True)), ("gptq", dict(symmetric=True)),
                                              ("awq", {})])
def test_model_by_data_beats_rounding_to_the_nearest(method, settings):
    model = tiny()
    rounding = dict(bits=3, group_size=32, symmetric=settings.get("symmetric", False))
    with torch.no_grad():
        full = model(WINDOWS)
        nearest = quantize_model(copy.deepcopy(model), "int4", **rounding)
        lines = []
        ours = calibrate.calibrate(copy.deepcopy(model), WINDOWS, method, report=lines.append, **rounding | settings)
        assert (ours(WINDOWS) - full).norm() < 0.9 * (nearest(WINDOWS) - full).norm()
    assert len(lines) == 2 and not linear_layers(ours)
    assert isinstance(ours.model.layers[1].mlp.down_proj, Int4Linear)


def test_each_layer_is_calibrated_on_what_the_rounded_layers_before_it_put_out():
    model = tiny()
    ours = calibrate.calibrate(copy.deepcopy(model), WINDOWS, "gptq", bits=3, group_size=32)
    seen = {}
    hook = ours.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    with torch.no_grad():
        ours(WINDOWS)
    hook.remove()
    x = seen["x"].flatten(0, 1)
    linear = model.model.layers[1].self_attn.q_proj
    by_hand = gptq(linear.weight, 2 / len(x) * x.T @ x, bits=3, group_size=32)
    same = (decoded(by_hand) - ours.model.layers[1].self_attn.q_proj.dequantize()).abs() < 1e-6
    assert same.float().mean() > 0.99  # sums in another order may round a number differently


def test_o_is_rounded_on_what_the_rounded_q_k_and_v_put_out():
    model = tiny(num_hidden_layers=1)
    ours = calibrate.calibrate(copy.deepcopy(model), WINDOWS, "gptq", bits=3, group_size=32)
    seen = {}
    ours.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    with torch.no_grad():
        ours(WINDOWS)
    x = seen["x"].flatten(0, 1)
    by_hand = gptq(model.model.layers[0].self_attn.o_proj.weight, 2 / len(x) * x.T @ x, bits=3, group_size=32)
    same = (decoded(by_hand) - ours.model.layers[0].self_attn.o_proj.dequantize()).abs() < 1e-6
    assert same.float().mean() > 0.99


def test_only_one_layer_s_states_are_kept():
    model, alive = tiny(num_hidden_layers=3), []
    original = calibrate.run_layer

    def watched(layer, states, call, watch=None, out=None):
        assert out is None or out is states  # written over, not kept beside
        alive.append(states.data_ptr())
        original(layer, states, call, watch, out)

    calibrate.run_layer = watched
    try:
        calibrate.calibrate(model, WINDOWS, "gptq", group_size=32)
    finally:
        calibrate.run_layer = original
    assert len(alive) == 3 * 6 and len(set(alive)) == 1  # who reads what, four inputs, the output


# --------------------------------------------------------------------------------------------------------- command line


def test_an_attention_that_is_remembered_gives_each_window_its_own(monkeypatch):
    """19 windows run 8 at a time: in the passes after the first, each part must get what it got then."""
    windows, models = torch.randint(0, 90, (19, 12), generator=torch.Generator().manual_seed(3)), []
    for how in (calibrate.remembered, lambda module, calls: contextlib.nullcontext()):
        monkeypatch.setattr(calibrate, "remembered", how)
        models.append(calibrate.calibrate(tiny(), windows, "gptq", group_size=32))
        assert all("forward" not in vars(layer.self_attn) for layer in models[-1].model.layers)
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values()):
        assert torch.equal(a, b)


class Bytes:
    bos_token_id, eos_token_id = 1, 2

    def encode(self, text):
        return list(text.encode())


def test_windows_run_through_the_texts_with_a_begin_token_before_each(capsys):
    windows = calibration_windows(iter(["abcd", "efghijk"]), Bytes(), 4)
    assert windows.tolist() == [[1, *b"abc"], [*b"d", 1, *b"ef"], [*b"ghij"]]
    assert capsys.readouterr().err == "warning: 3 calibration samples of 4 tokens; 128 are usual\n"


def test_too_little_calibration_text_is_one_line():
    with pytest.raises(ValueError, match="^3 tokens of calibration text are too few for one sample of 8"):
        calibration_windows(["ab"], Bytes(), 8)


@pytest.mark.parametrize("flags, words", [
    (["--method", "gptq"], "--data: gptq needs text"), (["--method", "nf4", "--data", "x"], "--data: nf4 looks at no text"),
    (["--method", "int5"], "--method int5: must be gptq"), (["--method", "nf4", "--group_size", "40"], "--group_size 40"),
    (["--method", "nf4", "--format", "gguf"], "--format gguf: must be auto"),
    (["--method", "qat"], "--method qat: must be"), (["--method", "nf4", "--model", "nowhere"], "nowhere: no such folder")])
def test_bad_flags_are_one_line(flags, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        calibrate.main(["--model", str(tmp_path), "--out", str(tmp_path / "out"), *flags])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_command_line_writes_a_folder(tmp_path, capsys):
    from checkpoint import save_model
    from data.tokenizer import BPETokenizer
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    tokenizer = BPETokenizer.train(["the cat sat on the mat. " * 50], 280, ["<eos>"])
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", tiny(vocab_size=tokenizer.vocab_size), tokenizer)
    calibrate.main(["--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--group_size", "32",
                    "--seq_len", "16", "--windows", "8", "--out", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gptq" and config["group_size"] == 32 and (tmp_path / "out" / "tokenizer.json").exists()
    again = ["--model", str(tmp_path / "model"), "--method", "nf4", "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="is not empty"):
        calibrate.main(again)
    calibrate.main([*again, "--resume", "auto"])  # finished, by whichever method
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == config
    assert "warning: 8 calibration samples" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not empty"):
        save_quantized(tmp_path / "out", tiny())
