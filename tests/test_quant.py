"""quant.py: formats by hand and against bitsandbytes, layers against plain products, whole models, KV cache, STE."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quant
from kernels import int4, int8_fp8, nf4
from model import CausalLM, KVCache, ModelConfig
from quant import (METHODS, BitLinear, Int4Linear, Int8Linear, NF4Linear, QATLinear, dequantize_affine, dequantize_nf4,
                   fake_quantize, fp8_linear, model_bytes, quantize_affine, quantize_cache, quantize_fp4,
                   quantize_model, quantize_nf4, quantize_rows)

POST_TRAINING = [method for method in METHODS if method not in ("qat", "bitnet")]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tiny(**changes) -> CausalLM:
    shape = dict(vocab_size=90, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=128)
    return CausalLM(ModelConfig(**shape | changes)).eval()


TOKENS = torch.randint(0, 90, (3, 24), generator=torch.Generator().manual_seed(0))

# -------------------------------------------------------------------------------------------------------------- affine


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity, size", [("tensor", 900), ("channel", 90), ("group", 32)])
def test_affine_equals_a_loop_over_its_groups(bits, symmetric, granularity, size):
    w = random(10, 90, dtype=torch.float64)
    q = quantize_affine(w, bits=bits, symmetric=symmetric, granularity=granularity, group_size=32)
    rows = w.reshape(1, -1) if granularity == "tensor" else w
    truth, ours = torch.empty_like(rows), dequantize_affine(q).view(rows.shape)
    for i, row in enumerate(rows):
        for a in range(0, len(row), size):
            x = row[a : a + size]
            if symmetric:
                top, zero = 2 ** (bits - 1) - 1, 0
                scale, least, most = x.abs().max() / top, -top, top
            else:
                scale, least, most = (max(x.max(), 0) - min(x.min(), 0)) / (2**bits - 1), 0, 2**bits - 1
                zero = torch.round(-min(x.min(), x.new_zeros(())) / scale)
            truth[i, a : a + size] = ((x / scale + zero).round().clamp(least, most) - zero) * scale
    assert torch.equal(ours, truth)
    assert q.codes.shape == w.shape and (ours.view(w.shape) - w).abs().max() <= q.scale.max() / 2 * (1 + 1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zero_and_a_short_last_group_is_its_own(symmetric):
    w = random(4, 70)
    w[2] = 0
    w[:, 64:] *= 1e-3  # a last group of 6, far smaller: a scale shared with zeros, not with its neighbours
    decoded = dequantize_affine(quantize_affine(w, bits=4, symmetric=symmetric, granularity="group", group_size=64))
    assert torch.equal(decoded[2], torch.zeros(70))
    assert ((decoded - w)[:, 64:].norm() / w[:, 64:].norm()) < 0.15


def test_shape_and_dtype_come_back_and_other_settings_are_refused():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        q = quantize_affine(random(2, 3, 8, dtype=dtype), bits=8, symmetric=False, granularity="group", group_size=4)
        assert dequantize_affine(q, bits=8, symmetric=False).dtype == dtype and dequantize_affine(q).shape == (2, 3, 8)
    with pytest.raises(ValueError, match="bits must be 8"):
        dequantize_affine(q, bits=4)


@pytest.mark.parametrize("call, words", [
    (lambda w: quantize_affine(w, bits=9), "bits must be 2 to 8, got 9"),
    (lambda w: quantize_affine(w, granularity="row"), "granularity must be"),
    (lambda w: quantize_affine(w, granularity="group", group_size=0), "group_size must be at least 1"),
    (lambda w: quantize_affine(w.int()), "the weight must be float16"),
    (lambda w: quantize_nf4(w, block_size=48), "block_size must be a power of two"),
    (lambda w: Int4Linear(w, group_size=40), "group_size must be a multiple of 32"),
    (lambda w: Int4Linear(w, bits=5), "bits must be 2, 3 or 4"),
    (lambda w: Int8Linear(w, outliers=6.0), "outliers must be None"),
    (lambda w: quantize_model(tiny(), "int7"), "method must be int8,"),
    (lambda w: quantize_model(tiny(), "int4", group_size=40), "model.layers.0.self_attn.q_proj: group_size"),
    (lambda w: quantize_model(tiny(), "nf4", layers=["nothing"]), "no linear layer.*model.layers.0.self_attn.q_proj"),
    (lambda w: quantize_model(nn.Sequential(nn.ReLU()), "nf4"), "no linear layer"),
    (lambda w: quantize_cache(KVCache(tiny().config, 1, 8), bits=3), "bits must be 4 or 8")])
def test_bad_input_is_one_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(random(4, 64))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", POST_TRAINING)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_or_infinity_in_a_weight_is_named(method, bad):
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = bad
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj: .*NaN or infinity") as error:
        quantize_model(model, method)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", POST_TRAINING)
def test_a_weight_of_zeros_gives_zeros(method):
    kind, settings = METHODS[method]
    layer = kind(torch.zeros(64, 96), **settings)
    assert torch.equal(layer.dequantize(), torch.zeros(64, 96))
    assert torch.equal(layer(random(2, 96)), torch.zeros(2, 64))


# ------------------------------------------------------------------------------------------------------------ NF4, FP4


@pytest.mark.parametrize("shape, block_size", [((64, 192), 64), ((5, 77), 32), ((3, 5, 7), 64), ((1,), 64)])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.filterwarnings("ignore:kernels/nf4.py")
def test_nf4_is_the_kernel_s_format_to_the_bit(shape, block_size, double_quant):
    w = random(*shape)
    ours, theirs = quantize_nf4(w, block_size, double_quant), nf4.nf4_quantize(w, block_size, double_quant)
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert torch.equal(dequantize_nf4(ours), nf4.nf4_dequantize_reference(theirs))


def test_midpoints_go_down():
    levels = torch.tensor(quant.NF4_LEVELS)
    w = torch.cat(((levels[:-1] + levels[1:]) / 2, torch.ones(49)))  # absmax 1
    assert torch.equal(dequantize_nf4(quantize_nf4(w, double_quant=False))[:15], levels[:-1])


def test_fp4_levels_are_a_sign_two_exponent_bits_and_one_of_mantissa():
    for code in range(16):
        exponent, mantissa = code >> 1 & 3, code & 1
        small = {0: 0.0, 1: 0.0625}[mantissa]  # bitsandbytes' subnormals
        value = small if exponent == 0 else {1: 8, 2: 4, 3: 2}[exponent] * (1 + mantissa / 2)
        assert quant.FP4_LEVELS[code] == pytest.approx((-1) ** (code >> 3) * value / 12)


def test_error_of_a_normal_weight_is_the_known_one():
    w = random(1024, 512)
    decoded = dequantize_nf4(quantize_nf4(w, double_quant=False))
    assert (decoded - w).abs().mean().item() == pytest.approx(0.0728, abs=2e-4)
    assert ((decoded - w).abs().mean(1) / w.abs().mean(1)).mean().item() == pytest.approx(0.0913, abs=1e-3)
    assert ((dequantize_nf4(quantize_nf4(w)) - decoded).norm() / decoded.norm()) < 0.01  # what double quantization adds


def test_double_quantization_costs_4_127_bits():
    q = quantize_nf4(random(512, 512))
    stored = (q.packed, q.absmax, q.nested_absmax)
    bits = sum(8 * t.numel() * t.element_size() for t in stored) / 512**2
    assert bits == 4 + 8 / 64 + 32 / (64 * 256) == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_codes_and_scales_equal_bitsandbytes(kind, double_quant):
    bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    w = random(96, 320)
    packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=double_quant, quant_type=kind)
    q = {"nf4": quantize_nf4, "fp4": quantize_fp4}[kind](w, 64, double_quant)
    assert torch.equal(q.absmax, state.absmax)
    if double_quant:
        assert torch.equal(q.nested_absmax, state.state2.absmax) and torch.equal(q.nested_offset, state.offset)
    values = [q.levels[torch.stack((p.flatten() >> 4, p.flatten() & 15), 1).int()] for p in (packed, q.packed)]
    assert torch.equal(*values)  # codes, but that FP4 has two of them for 0
    assert (bnb.dequantize_4bit(packed, state) - dequantize_nf4(q)).abs().max() <= 1e-6


# ------------------------------------------------------------------------------------------------------- eight-bit rows


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_rows_are_the_kernel_s_format_to_the_bit(dtype):
    x = random(9, 100)
    x[4] = 0
    for ours, theirs in zip(quantize_rows(x, dtype), int8_fp8.quantize_rows_reference(x, dtype)):
        assert torch.equal(ours.float(), theirs.float())


def test_e5m2_reaches_further_and_e4m3_is_finer():
    x = torch.tensor([1.0, 1.07, 2.0**-20])
    decoded = {}
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes, scale = quantize_rows(x, dtype)
        decoded[dtype] = codes.float() * scale
    e4m3, e5m2 = decoded.values()
    assert (e4m3 - x)[:2].abs().sum() < (e5m2 - x)[:2].abs().sum() and e4m3[2] == 0 and e5m2[2] > 0


def test_full_activations_multiply_the_decoded_weight():
    layer, x = Int8Linear(random(700, 96, dtype=torch.float64)), random(2, 5, 96, seed=1, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().t(), rtol=1e-12, atol=1e-12)
    assert Int8Linear(random(700, 96)).half()(x.half()).dtype == torch.float16


def test_a_sum_of_codes_does_not_overflow_float16():
    layer = Int8Linear(torch.full((4, 1024), 0.01))
    y = layer(torch.full((1, 1024), 2.0, dtype=torch.float16))  # 1024 * 127 * 2 is above 65504
    torch.testing.assert_close(y, torch.full((1, 4), 20.48, dtype=torch.float16), rtol=2e-3, atol=0)


def test_w8a8_is_exact_in_integers():
    w, x = random(40, 96, dtype=torch.float64), random(7, 96, seed=1, dtype=torch.float64)
    layer = Int8Linear(w, activations="rounded")
    codes, scale = quantize_rows(x)
    truth = (codes.long() @ layer.codes.long().t()).double() * scale[:, None] * layer.scale.double()
    torch.testing.assert_close(layer(x), truth, rtol=1e-12, atol=0)
    reference = int8_fp8.linear_reference(x.float(), layer.codes, layer.scale)
    torch.testing.assert_close(layer(x.float()), reference, rtol=1e-5, atol=1e-5)


def test_outlier_columns_are_multiplied_in_full_precision():
    """LLM.int8(): one huge column would take the other columns' bits, since a token has one scale."""
    w, x = random(40, 96), random(16, 96, seed=1)
    x[3, 17] = 300.0
    plain, mixed = Int8Linear(w, activations="rounded"), Int8Linear(w, activations="rounded", outliers=6.0)
    truth = x @ plain.dequantize().t()
    assert (plain(x) - truth)[3].norm() > 20 * (mixed(x) - truth)[3].norm()
    rest, column = x.clone(), x[:, 17:18]
    rest[:, 17] = 0
    by_hand = plain(rest) + column @ plain.dequantize()[:, 17:18].t()
    torch.testing.assert_close(mixed(x), by_hand, rtol=1e-5, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- layers


def test_int4_packing_is_the_kernel_s_layout():
    codes = torch.randint(0, 16, (6, 96), generator=torch.Generator().manual_seed(0))
    assert torch.equal(quant.pack_int4(codes), int4.int4_pack(codes))
    assert torch.equal(quant.unpack_int4(quant.pack_int4(codes)).long(), codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_layer_holds_what_affine_rounding_gives(symmetric):
    w = random(20, 172)  # no multiple of 64: the last group is filled up in memory
    layer = Int4Linear(w, group_size=64, symmetric=symmetric)
    truth = dequantize_affine(quantize_affine(w, 4, symmetric, "group", 64, scale_dtype=torch.float16))
    assert torch.equal(layer.dequantize(), truth) and layer.packed.shape == (20, 192 // 8)
    theirs = int4.int4_dequantize_reference(int4.Int4(layer.packed, layer.scale, layer.zero), torch.float32)
    assert torch.equal(theirs[:, :172], truth)


def test_int4_layer_takes_columns_in_scattered_groups():
    g = torch.Generator().manual_seed(0)
    codes, g_idx = torch.randint(0, 16, (8, 96), generator=g), (torch.arange(96) // 32)[torch.randperm(96, generator=g)]
    scale, zero = torch.rand(8, 3, generator=g).half(), torch.randint(0, 16, (8, 3), generator=g)
    layer = Int4Linear(torch.zeros(8, 96), group_size=32, act_order=True)
    layer.set_codes(codes, scale, zero, g_idx)
    truth = (codes - zero[:, g_idx]) * scale.float()[:, g_idx]
    assert torch.equal(layer.dequantize(), truth)
    assert all(torch.equal(a.long(), b) for a, b in zip(layer.codes(), (codes, g_idx)))


@pytest.mark.parametrize("method", POST_TRAINING)
def test_layer_passes_gradients_to_x_and_keeps_nothing_of_the_batch(method):
    kind, settings = METHODS[method]
    linear = nn.Linear(96, 64)
    layer = kind.from_linear(linear, **settings)
    assert (layer.in_features, layer.out_features) == (96, 64) and layer.bias is linear.bias
    x, dy = random(4, 7, 96).requires_grad_(), random(4, 7, 64, seed=1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ layer.dequantize(), rtol=1e-5, atol=1e-5)
    assert not saved
    torch.testing.assert_close(linear.bias.grad, dy.sum((0, 1)))
    error = (y - F.linear(x, linear.weight, linear.bias)).norm() / y.norm()
    assert error < {"int2": 0.5, "int3": 0.2}.get(method, 0.12)


@pytest.mark.parametrize("method", POST_TRAINING)
def test_casting_a_model_leaves_codes_and_scales(method):
    kind, settings = METHODS[method]
    layer = kind(random(64, 96), **settings)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    layer.to(torch.bfloat16).double()
    for name, t in layer.state_dict().items():
        assert t.dtype == before[name].dtype and torch.equal(t.float(), before[name].float())
    assert layer(random(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(random(2, 96)).dtype == torch.bfloat16


@pytest.mark.parametrize("method, settings", [("nf4", {}), ("int4", {}), ("w8a8", {})])
@pytest.mark.filterwarnings("ignore:kernels/")
def test_kernels_give_the_same_and_the_same_gradient(method, settings):
    weight, results = random(64, 128), []
    for kernels in ("torch", "triton"):
        kind, defaults = METHODS[method]
        layer, x = kind(weight, kernels=kernels, **defaults | settings), random(3, 128, seed=1).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("method", POST_TRAINING)
def test_model_is_quantized_but_for_embedding_head_and_norms_and_its_state_dict_comes_back(method):
    model = tiny()
    full = model(TOKENS)
    table = model.model.embed_tokens.weight
    assert quantize_model(model, method) is model
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    assert kinds == {METHODS[method][0].__name__}
    assert model.lm_head.weight is table is model.model.embed_tokens.weight  # the tied head
    with torch.no_grad():
        rounded = model(TOKENS)
    assert 0 < (rounded - full).norm() / full.norm() < {"int2": 0.5, "int3": 0.2}.get(method, 0.1)
    with torch.device("meta"):
        other = tiny()
    quantize_model(other, method).load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other.eval()(TOKENS), rounded)


def test_a_tied_head_is_refused_and_an_untied_one_can_be_asked_for():
    with pytest.raises(ValueError, match="lm_head is tied to model.embed_tokens"):
        quantize_model(tiny(), "nf4", skip=())
    model = quantize_model(tiny(tie_word_embeddings=False), "nf4", skip=("embed_tokens",))
    assert isinstance(model.lm_head, NF4Linear)


def test_bytes_in_memory():
    model = quantize_model(tiny(), "int8")
    matrices = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 172)
    rows = 2 * (64 + 32 + 32 + 64 + 172 + 172 + 64)
    assert model_bytes(model) == matrices + 4 * rows + 4 * (90 * 64 + 5 * 64)


def test_what_stays_in_full_precision_does_not_keep_the_whole_file_in_memory():
    """A loaded model's weights may be views of one buffer: the embedding alone would hold all 16-bit weights alive."""
    model = tiny()
    buffer, at = torch.empty(sum(p.numel() for p in model.parameters())), 0
    for p in model.parameters():
        view = buffer[at : at + p.numel()].view_as(p).copy_(p.detach())
        p.data, at = view, at + p.numel()
    logits = quantize_model(copy.deepcopy(model), "int8")(TOKENS)
    model = quantize_model(model, "int8")
    assert torch.equal(model(TOKENS), logits) and model.lm_head.weight is model.model.embed_tokens.weight
    for p in model.parameters():
        assert p.untyped_storage().nbytes() == p.nbytes


# ------------------------------------------------------------------------------------------------------------ KV cache


@pytest.mark.parametrize("bits, allowed", [(8, 0.004), (4, 0.06)])
@pytest.mark.parametrize("keys", ["token", "channel"])
def test_quantized_cache_serves_a_model_as_a_full_one_does(bits, allowed, keys):
    """Rows of different lengths, a prompt, single tokens, several at once, and rejected drafts."""
    model, results = tiny(), []
    for quantized in (False, True):
        cache = KVCache(model.config, 3, 100)
        cache = quantize_cache(cache, bits, keys, block=16) if quantized else cache
        outs = [model(TOKENS, kv_cache=cache)]
        cache.set_lengths(torch.tensor([24, 17, 3]))
        for n in (1, 1, 5, 40):
            outs.append(model(TOKENS.repeat(1, 2)[:, :n], kv_cache=cache))
        cache.set_lengths(cache.lengths - 30)  # far behind the block that is filling
        outs.append(model(TOKENS, kv_cache=cache))
        cache.k, cache.v = cache.k[:, [0, 2]], cache.v[:, [0, 2]]  # generate() drops rows that ended
        cache.set_lengths(cache.lengths[[0, 2]])
        outs.append(model(TOKENS[:2], kv_cache=cache))
        results.append(outs)
    for full, rounded in zip(*results):
        assert 0 < (full - rounded).norm() / full.norm() < allowed


def test_cache_stores_each_token_and_head_on_its_own_scale():
    store = quantize_cache(KVCache(tiny().config, 1, 8), 8, "token").k
    x = random(1, 2, 2, 16) * torch.tensor([1.0, 1e3]).view(1, 2, 1, 1)
    store[0, torch.tensor([[0]]), torch.tensor([[0, 1]])] = x
    step = (x.amax(-1) - x.amin(-1)) / 255
    assert ((store[0, :, :2] - x).abs().amax(-1) <= step * 0.51 + x.abs().amax(-1) * 2**-10).all()


def test_keys_with_a_large_channel_want_a_scale_per_channel():
    """KIVI's observation: one channel that is large for all tokens spoils a token's other channels, not its own."""
    x = random(1, 64, 2, 16)
    x[..., 5] += 40
    errors = {}
    for keys in ("token", "channel"):
        store = quantize_cache(KVCache(tiny().config, 1, 64), 4, keys).k
        store[0, torch.tensor([[0]]), torch.arange(64)[None]] = x
        errors[keys] = (store[0, :, :64] - x).norm()
    assert errors["channel"] < errors["token"] / 5


def test_channels_are_rounded_once_however_the_tokens_arrive():
    """A block that fills token by token must not be rounded over and over: it ends as if written at once."""
    x, stores = random(2, 48, 2, 16), []
    for pieces in ((48,), (1,) * 48, (5, 20, 1, 22)):
        store, at = quantize_cache(KVCache(tiny().config, 2, 48), 4, "channel", 16).k, 0
        for n in pieces:
            store[1, torch.arange(2)[:, None], torch.arange(at, at + n).expand(2, n)] = x[:, at : at + n]
            at += n
        stores.append(store[1, :, :48])
    assert torch.equal(stores[0], stores[1]) and torch.equal(stores[0], stores[2])


def test_cache_bytes():
    cache = quantize_cache(KVCache(tiny().config, 2, 64), 4)
    assert cache.v.nbytes == 2 * 2 * 64 * 2 * (16 // 2 + 2 + 2)  # layers, rows, tokens, heads; half a byte, low and step


# ------------------------------------------------------------------------------------------------ training that rounds


def test_straight_through_the_value_is_rounded_and_the_gradient_is_not():
    w = random(6, 64, dtype=torch.float64).requires_grad_()
    y = fake_quantize(w, bits=3, granularity="group", group_size=32)
    torch.testing.assert_close(y, dequantize_affine(quantize_affine(w, 3, True, "group", 32)), rtol=0, atol=1e-15)
    y.backward(random(6, 64, seed=1, dtype=torch.float64))
    assert torch.equal(w.grad, random(6, 64, seed=1, dtype=torch.float64))


def test_qat_trains_what_int4_will_be():
    model = quantize_model(tiny(), "qat", bits=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    plain = copy.deepcopy(model)
    quantize_model(plain, "int3")
    torch.testing.assert_close(plain(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
    assert isinstance(plain.model.layers[0].mlp.up_proj, Int4Linear) and isinstance(model.model.layers[0].mlp.up_proj, QATLinear)


def test_bitnet_by_hand():
    layer = BitLinear.from_linear(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, -2.0, 0.9, 0.3], [-0.2, 0.5, 0.0, 4.0]]))  # mean |w| is 1
    assert layer.dequantize().tolist() == [[0, -1, 1, 0], [0, 0, 0, 1]]  # 0.5 rounds to even
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0]])  # RMS 2.5: 1.2, 1.6; in steps of 1.6 / 127: 95.25 -> 95, 127
    torch.testing.assert_close(layer(x), torch.tensor([[-1.6, 0.0]]), rtol=1e-5, atol=1e-5)
    layer(x).sum().backward()
    grad = torch.tensor([95 / 127 * 1.6, 1.6, 0, 0])
    torch.testing.assert_close(layer.weight.grad, torch.stack((grad, grad)), rtol=1e-4, atol=1e-5)


def test_fp8_training_rounds_forward_to_e4m3_and_gradients_to_e5m2():
    x, w, dy = (random(*shape, seed=i) for i, shape in enumerate(((3, 5, 32), (16, 32), (3, 5, 16))))
    x.requires_grad_(), w.requires_grad_()

    def rounded(t, dtype):
        scale = t.abs().max() / torch.finfo(dtype).max
        return (t / scale).to(dtype).float() * scale

    y = fp8_linear(x, w)
    x8, w8, dy8 = rounded(x.detach(), torch.float8_e4m3fn), rounded(w.detach(), torch.float8_e4m3fn), rounded(dy, torch.float8_e5m2)
    y.backward(dy)
    torch.testing.assert_close(y, x8 @ w8.t())
    torch.testing.assert_close(x.grad, dy8 @ w8)
    torch.testing.assert_close(w.grad, torch.einsum("bsn,bsk->nk", dy8, x8))
