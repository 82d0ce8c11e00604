"""The model against itself, computed another way: cached, packed, checkpointed, by formula. All in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

import model as m
from model import CausalLM, KVCache, ModelConfig

FAMILIES = {  # each exercises other branches of the forward pass
    "llama": dict(num_key_value_heads=2),
    "llama-bias": dict(attention_bias=True, tie_word_embeddings=True),
    "mistral": dict(sliding_window=5, num_key_value_heads=1),
    "qwen2": dict(model_type="qwen2", attention_bias=True, num_key_value_heads=2),
    "qwen3": dict(qk_norm=True, head_dim=6, num_key_value_heads=2, tie_word_embeddings=True),
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 40}
OPTIONS = {  # what other lengths and other minds add to these; not all of it is in our kernels
    "linear": dict(rope_scaling={"rope_type": "linear", "factor": 2.5}),
    "dynamic": dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}),
    "yarn": dict(rope_scaling=YARN, qk_norm=True),
    "llama3": dict(rope_scaling=LLAMA3, num_key_value_heads=2),
    "alibi": dict(position_embedding_type="alibi", num_key_value_heads=2),
    "alibi, window, six heads": dict(position_embedding_type="alibi", sliding_window=6, num_attention_heads=6, head_dim=4),
    "learned": dict(position_embedding_type="learned"),
    "capped": dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
}


def tiny(attention="sdpa", seed=0, **shape) -> CausalLM:
    config = ModelConfig(**(dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                                 max_position_embeddings=64, initializer_range=0.2, attention=attention) | shape))
    return CausalLM(config, seed).double()


def tokens(*shape, seed=0) -> torch.Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-9):
    assert (a - b).abs().max().item() <= tolerance


@pytest.fixture(params=FAMILIES, ids=str)
def shape(request) -> dict:
    return FAMILIES[request.param]


# ---- one thing computed two ways


def test_eager_and_sdpa_agree_in_logits_and_gradients(shape):
    models = [tiny(attention, **shape) for attention in ("eager", "sdpa")]
    ids, cu_seqlens = tokens(2, 24), torch.tensor([0, 7, 24, 31, 48], dtype=torch.int32)
    for offsets in (None, cu_seqlens):
        logits = [model(ids, cu_seqlens=offsets) for model in models]
        close(*logits)
        for model, x in zip(models, logits):
            model.zero_grad()
            x.sin().sum().backward()
        for p, q in zip(models[0].parameters(), models[1].parameters()):
            close(p.grad, q.grad)


def logits_and_gradients(model, ids, cu_seqlens) -> list:
    logits = model(ids, cu_seqlens=cu_seqlens)
    return [logits, *torch.autograd.grad(logits.sin().sum(), list(model.parameters()))]


@pytest.mark.parametrize("offsets", [None, [0, 7, 24, 31, 48], [0, 7, 31, 48]], ids=str)  # a row ends at 24, said or not
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
def test_kernels_agree_in_logits_and_gradients(shape, offsets, dtype, tolerance):
    """float32 in Triton's interpreter (or on a GPU: the other tests' business); in float64 their references, wired the same."""
    ids, cu_seqlens = tokens(2, 24), None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    truth = logits_and_gradients(tiny("eager", **shape), ids, cu_seqlens)
    ours = logits_and_gradients(tiny("triton", kernels="triton", **shape).to(dtype), ids, cu_seqlens)
    for a, b in zip(ours, truth):
        close(a, b, tolerance * max(1.0, b.abs().max().item()))


def test_kernel_without_dropout_refuses_it_in_training_only():
    model, ids = tiny("triton", attention_dropout=0.1), tokens(1, 8)
    close(model.eval()(ids), tiny("eager")(ids))
    with pytest.raises(ValueError, match="dropout_p"):
        model.train()(ids)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "triton"])
def test_packed_documents_equal_single_ones_in_loss_and_gradients(shape, attention):
    model, ids = tiny(attention, **shape), tokens(2, 20)
    ends = [0, 3, 4, 17, 20, 29, 40]  # offsets over the flattened 2 x 20; the third row end (20) is one of them
    labels = tokens(2, 20, seed=1)
    packed = F.cross_entropy(model(ids, cu_seqlens=torch.tensor(ends, dtype=torch.int32)).flatten(0, 1), labels.flatten(), reduction="sum")
    packed.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    single = sum(F.cross_entropy(model(ids.flatten()[None, a:b])[0], labels.flatten()[a:b], reduction="sum") for a, b in zip(ends, ends[1:]))
    single.backward()
    close(packed, single)
    for p, gradient in zip(model.parameters(), gradients):
        close(p.grad, gradient)


def test_row_ends_are_boundaries_even_if_cu_seqlens_does_not_say_so():
    model, ids = tiny(), tokens(2, 10)
    close(model(ids, cu_seqlens=torch.tensor([0, 4, 20], dtype=torch.int32)),
          model(ids, cu_seqlens=torch.tensor([0, 4, 10, 20], dtype=torch.int32)))


def test_editing_one_document_changes_no_other():
    model, ids, cu_seqlens = tiny(), tokens(1, 20), torch.tensor([0, 8, 20], dtype=torch.int32)
    edited = ids.clone()
    edited[0, :8] = (edited[0, :8] + 1) % 61
    before, after = model(ids, cu_seqlens=cu_seqlens), model(edited, cu_seqlens=cu_seqlens)
    assert torch.equal(before[:, 8:], after[:, 8:])
    assert not torch.equal(before[:, :8], after[:, :8])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_steps_equal_the_full_forward(shape, attention):
    model, ids = tiny(attention, **shape).eval(), tokens(3, 20)
    cache = KVCache(model.config, batch=3, max_length=20, dtype=torch.float64)
    pieces = [model(ids[:, a:b], kv_cache=cache) for a, b in ((0, 9), (9, 10), (10, 13), (13, 14), (14, 20))]
    close(torch.cat(pieces, dim=1), model(ids))


def test_cached_prompts_of_different_length_equal_each_alone(shape):
    model, lengths = tiny(**shape).eval(), [3, 9, 6]
    prompts, answers = tokens(3, 9), tokens(3, 5, seed=1)
    cache = KVCache(model.config, batch=3, max_length=14, dtype=torch.float64)
    model(prompts, kv_cache=cache)  # padded on the right with whatever stands there
    cache.set_lengths(torch.tensor(lengths))
    steps = torch.cat([model(answers[:, i : i + 1], kv_cache=cache) for i in range(5)], dim=1)
    for row, length in enumerate(lengths):
        whole = torch.cat((prompts[row, :length], answers[row]))[None]
        close(steps[row], model(whole)[0, length:])


def test_a_cut_cache_forgets_what_was_cut():
    model, ids = tiny().eval(), tokens(1, 12)
    cache = KVCache(model.config, batch=1, max_length=12, dtype=torch.float64)
    model(ids, kv_cache=cache)
    cache.set_lengths(torch.tensor([4]))
    close(model(ids[:, 4:8], kv_cache=cache), model(ids[:, :8])[:, 4:])


def test_a_full_cache_says_so():
    model = tiny()
    cache = KVCache(model.config, batch=1, max_length=4, dtype=torch.float64)
    with pytest.raises(ValueError, match="holds 4 tokens per row; 5 are needed"):
        model(tokens(1, 5), kv_cache=cache)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_equals_plain_and_keeps_less(shape, mode):
    losses, gradients, kept = [], [], []
    for setting in ("none", mode):
        model = tiny(**shape)
        model.model.activation_checkpointing = setting
        saved = set()

        def pack(tensor):
            saved.add((tensor.data_ptr(), tensor.numel()))
            return tensor

        parameters = {(p.data_ptr(), p.numel()) for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model.hidden(tokens(4, 32))
        kept.append(sum(size for pointer, size in saved if (pointer, size) not in parameters))
        hidden.sin().sum().backward()
        losses.append(hidden)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    close(*losses)
    for p, q in zip(*gradients):
        close(p, q)
    if mode == "full":  # what selective keeps, it keeps out of this hook's sight
        assert kept[1] < kept[0] / 3


def test_accumulated_micro_batches_equal_one_batch():
    model, ids, labels = tiny(), tokens(6, 16), tokens(6, 16, seed=1)
    labels[0, 3:] = labels[4] = -100  # uneven counts: dividing each micro batch by its own would be wrong
    count = (labels != -100).sum()
    whole = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum") / count
    whole.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for i in range(0, 6, 2):
        (F.cross_entropy(model(ids[i : i + 2]).flatten(0, 1), labels[i : i + 2].flatten(), reduction="sum") / count).backward()
    for p, gradient in zip(model.parameters(), gradients):
        close(p.grad, gradient)


# ---- RoPE for longer texts


def frequencies_by_hand(D: int, theta: float, s: dict, L: int) -> tuple[list[float], float]:
    """One pair after the other, as the papers say it, in Python's floats."""
    kind, factor, trained, found = s["rope_type"], s["factor"], s["original_max_position_embeddings"], []
    if kind == "dynamic" and L > trained:  # bloc97's base, for the length at hand
        theta *= (factor * L / trained - (factor - 1)) ** (D / (D - 2))
    for i in range(D // 2):
        f = theta ** (-2 * i / D)
        turns = trained * f / (2 * math.pi)  # in the trained length
        if kind == "linear":
            f /= factor
        elif kind == "llama3":
            low, high = s["low_freq_factor"], s["high_freq_factor"]
            keep = min(1.0, max(0.0, (turns - low) / (high - low)))
            f = keep * f + (1 - keep) * f / factor
        elif kind == "yarn":
            border = [D * math.log(trained / (2 * math.pi * beta)) / (2 * math.log(theta)) for beta in (s.get("beta_fast", 32), s.get("beta_slow", 1))]
            if s.get("truncate", True):
                border = [math.floor(border[0]), math.ceil(border[1])]
            low, high = max(border[0], 0), min(border[1], D - 1)
            interpolate = min(1.0, max(0.0, (i - low) / (high - low if high != low else 0.001)))
            f = interpolate * f / factor + (1 - interpolate) * f
        found.append(f)
    if kind != "yarn":
        return found, 1.0
    if s.get("mscale") and s.get("mscale_all_dim"):
        usual = (0.1 * s["mscale"] * math.log(factor) + 1) / (0.1 * s["mscale_all_dim"] * math.log(factor) + 1)
    else:
        usual = 0.1 * math.log(factor) + 1
    return found, s.get("attention_factor", usual)


SCALED = [  # head_dim, theta, trained and new length as in published models, and odd ones
    (128, 5e5, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, 131072),
    (64, 5e5, {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, 131072),
    (128, 1e6, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
    (64, 1e4, {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.707}, 163840),
    (16, 1e4, {"rope_type": "yarn", "factor": 3.3, "original_max_position_embeddings": 100, "beta_fast": 5.0, "beta_slow": 2.0, "truncate": False}, 330),
    (16, 1e4, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 1.25}, 128),
    (8, 1e4, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4}, 8),  # low = high = 0
    (128, 1e4, {"rope_type": "linear", "factor": 2.5, "original_max_position_embeddings": 4096}, 10240),
    (128, 1e4, {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2048}, 2048),
    (128, 1e4, {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2048}, 2049),
    (64, 1e4, {"rope_type": "dynamic", "factor": 3.3, "original_max_position_embeddings": 2048}, 9000),
]


@pytest.mark.parametrize("D, theta, scaling, length", SCALED)
def test_scaled_frequencies_are_their_papers(D, theta, scaling, length):
    expected, factor = frequencies_by_hand(D, theta, scaling, length)
    position_ids = torch.tensor([[0, 1, 7, length - 1]])
    cos, sin = m.rope_tables(position_ids, D, theta, torch.float64, scaling, torch.tensor([[length]]))
    angles = position_ids[..., None, None].double() * torch.tensor(expected, dtype=torch.float64)
    close(cos, factor * angles.cos(), 1e-9)
    close(sin, factor * angles.sin(), 1e-9)


@pytest.mark.parametrize("D, theta, scaling, length", SCALED)
def test_scaled_tables_equal_those_of_transformers_bit_for_bit(D, theta, scaling, length):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    from transformers import LlamaConfig
    theirs = dict(scaling)
    known = theirs.pop("original_max_position_embeddings") if scaling["rope_type"] in ("linear", "dynamic") else length
    config = LlamaConfig(hidden_size=D, num_attention_heads=1, max_position_embeddings=known, rope_parameters=theirs | {"rope_theta": theta})
    position_ids = torch.cat((torch.arange(0, length, max(1, length // 999)), torch.tensor([length - 1])))[None]
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), position_ids)
    ours = m.rope_tables(position_ids, D, theta, torch.float32, scaling, torch.tensor([[length]]))
    for table, theirs in zip(ours, (cos, sin)):
        assert torch.equal(table[:, :, 0], theirs[..., : D // 2])


def test_dynamic_scaling_is_rope_of_a_larger_base_beyond_the_trained_length_only():
    ids, scaling = tokens(2, 24), OPTIONS["dynamic"]["rope_scaling"]
    assert torch.equal(tiny(rope_scaling=scaling)(ids[:, :8]), tiny()(ids[:, :8]))
    grown = 10000.0 * (2.0 * 24 / 8 - 1) ** (8 / 6)  # head_dim 8
    close(tiny(rope_scaling=scaling)(ids), tiny(rope_theta=grown)(ids))


def test_dynamic_scaling_takes_the_length_of_each_document_not_of_the_batch():
    model, ids = tiny(**OPTIONS["dynamic"]), tokens(1, 40)
    packed = model(ids, cu_seqlens=torch.tensor([0, 6, 30, 40], dtype=torch.int32))
    for a, b in ((0, 6), (6, 30), (30, 40)):
        close(packed[:, a:b], model(ids[:, a:b]))


# ---- other positions, capped scores


def option(name, attention="sdpa", **more) -> CausalLM:
    return tiny(attention, **OPTIONS[name], **more)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_agree_eager_sdpa_packed_cached_and_checkpointed(name):
    model, ids, labels = option(name), tokens(2, 20), tokens(2, 20, seed=1)
    ends = [0, 3, 4, 17, 20, 29, 40]
    offsets = torch.tensor(ends, dtype=torch.int32)
    truth = logits_and_gradients(option(name, "eager"), ids, offsets)
    for mode in ("none", "selective", "full"):
        model.model.activation_checkpointing = mode
        for a, b in zip(logits_and_gradients(model, ids, offsets), truth):
            close(a, b)
    for a, b in zip(ends, ends[1:]):
        close(truth[0].flatten(0, 1)[a:b], model(ids.flatten()[None, a:b])[0])
    model.eval()
    length = 8 if name == "dynamic" else 20  # beyond its trained length each call scales by how far it reaches, as in transformers
    cache = KVCache(model.config, batch=2, max_length=20, dtype=torch.float64)
    pieces = [model(ids[:, a:b], kv_cache=cache) for a, b in ((0, 5), (5, 6), (6, 8), (8, length)) if a < b]
    close(torch.cat(pieces, dim=1), model(ids[:, :length]))


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3", "learned"])
def test_scaled_and_learned_positions_pass_through_our_kernels(name):
    ids, offsets = tokens(2, 24), torch.tensor([0, 7, 24, 31, 48], dtype=torch.int32)
    for a, b in zip(logits_and_gradients(option(name, "triton", kernels="triton"), ids, offsets),
                    logits_and_gradients(option(name, "eager"), ids, offsets)):
        close(a, b, 1e-9 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("heads, expected", [(8, [2.0**-h for h in range(1, 9)]), (2, [2**-4, 2**-8]),
                                             (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
                                             (12, [2.0**-h for h in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])])
def test_alibi_slopes_are_those_of_the_paper(heads, expected):
    bias = m.alibi(None, torch.arange(3)[None], heads, torch.float64)  # (1, H, 3, 3)
    for h, slope in enumerate(expected):
        assert bias[0, h, 2].tolist() == pytest.approx([-2 * slope, -slope, 0]) and bias[0, h, 0].tolist() == [0, -math.inf, -math.inf]


def test_alibi_slopes_equal_those_of_transformers():
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom", reason="transformers is not installed")
    for heads in range(1, 40):
        theirs = bloom.build_alibi_tensor(torch.ones(1, 5), heads, torch.float32)[:, 0]  # (H, 5): slope * position
        ours = m.alibi(None, torch.arange(5)[None], heads, torch.float32)[0, :, 4]
        assert torch.allclose(ours, theirs - theirs[:, 4:], atol=1e-6)


def test_learned_positions_restart_in_each_document_and_matter():
    model, ids = option("learned", num_hidden_layers=1), tokens(1, 10)
    swapped = ids[:, [1, 0, *range(2, 10)]]
    assert not torch.allclose(model(ids)[0, 9], model(swapped)[0, 9])
    model.model.embed_positions.weight.data.zero_()
    close(model(ids)[0, 9], model(swapped)[0, 9])  # without them attention sees a bag of words
    assert model.model.embed_positions.weight.shape == (64, 32)


def test_soft_caps_are_tanh():
    """With one layer of one head whose scores are known: q = k = sqrt(8) * x for x of one number."""
    q, k, v = torch.tensor([1.0, 5.0]), torch.tensor([2.0, -3.0]), torch.tensor([1.0, 0.0])
    out = m.eager_attention(*(t.double().view(1, 2, 1, 1) for t in (q, k, v)), None, cap=4.0)
    a, b = 4 * math.tanh(10 / 4), 4 * math.tanh(-15 / 4)
    assert out.flatten().tolist() == pytest.approx([1.0, math.exp(a) / (math.exp(a) + math.exp(b))], abs=1e-12)
    plain, capped = tiny(), tiny(final_logit_softcapping=3.0)
    close(capped(tokens(1, 9)), 3 * torch.tanh(plain(tokens(1, 9)) / 3))
    close(capped.lm_head(torch.ones(2, 32).double()), 3 * torch.tanh(plain.lm_head(torch.ones(2, 32).double()) / 3))


@pytest.mark.parametrize("name", ["alibi", "learned", "capped"])
def test_what_no_family_has_is_written_as_our_own_and_never_as_theirs(name):
    config = option(name).config
    written = config.to_hf()
    assert config.model_type == written["model_type"] == "glassbox" and written["architectures"] == ["GlassboxForCausalLM"]
    assert ModelConfig.from_hf(written) == config
    with pytest.raises(ValueError, match="model_type 'llama' has no such combination"):
        ModelConfig.from_hf({k: v for k, v in written.items() if k != "qk_norm"} | {"model_type": "llama"})


def test_what_our_kernels_do_not_compute_is_refused():
    for name in ("alibi", "capped"):
        for triton in (dict(attention="triton"), dict(kernels="triton")):
            with pytest.raises(ValueError, match="'triton' know no ALiBi and no soft-capping; choose eager or sdpa, and torch"):
                option(name, **triton)


# ---- the pieces against formulas


def test_rms_norm_is_its_formula():
    x, norm = torch.randn(5, 7, dtype=torch.float64), m.RMSNorm(7, 1e-5).double()
    norm.weight.data.uniform_(0.5, 2)
    close(norm(x), x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * norm.weight, 1e-14)


def test_rope_is_a_rotation_of_complex_pairs():
    D, theta, positions = 6, 100.0, torch.tensor([[0, 1, 5, 1000]])
    x = torch.randn(1, 4, 2, D, dtype=torch.float64)
    turned, same = m.apply_rope(x, x[:, :, :1], *m.rope_tables(positions, D, theta, torch.float64))
    assert torch.equal(same, turned[:, :, :1])
    for s, position in enumerate(positions[0].tolist()):
        for i in range(D // 2):
            z = torch.complex(x[0, s, :, i], x[0, s, :, i + D // 2])
            angle = torch.tensor(position * theta ** (-2 * i / D), dtype=torch.float64)
            expected = z * torch.polar(torch.ones((), dtype=torch.float64), angle)
            close(turned[0, s, :, i], expected.real, 1e-12)
            close(turned[0, s, :, i + D // 2], expected.imag, 1e-12)


def test_attention_depends_on_relative_position_only():
    model, ids = tiny(), tokens(1, 12)
    close(model(ids), model(ids, position_ids=torch.arange(12)[None] + 37))


def test_sliding_window_counts_the_token_itself():
    model, ids = tiny(sliding_window=3, num_hidden_layers=1), tokens(1, 10)
    before = model(ids)
    for edited in range(10):
        other = ids.clone()
        other[0, edited] = (other[0, edited] + 1) % 61
        changed = (model(other) - before).abs().amax(-1)[0] > 1e-12
        assert changed.nonzero().flatten().tolist() == [i for i in range(edited, edited + 3) if i < 10]


def test_no_token_sees_the_future(shape):
    model, ids = tiny(**shape), tokens(1, 16)
    edited = ids.clone()
    edited[0, 9] = (edited[0, 9] + 1) % 61
    assert torch.equal(model(ids)[:, :9], model(edited)[:, :9])


def test_float64_is_never_cast_down():
    """A cast to float32 anywhere would leave an error near 1e-7; against a float64 numpy-like evaluation it must be ~1e-15."""
    model, ids = tiny("eager", num_hidden_layers=1, num_key_value_heads=2), tokens(1, 8)
    seen = []
    torch.utils._python_dispatch  # noqa: B018  (present since torch 2.0)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.extend(t.dtype for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t) and t.is_floating_point())
            return out

    with Watch():
        F.cross_entropy(model(ids)[0], ids[0]).backward()
    assert set(seen) == {torch.float64}


def test_bfloat16_autocast_stays_near_float32():
    model, ids = tiny(qk_norm=True, initializer_range=0.05).float(), tokens(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(ids)
    assert half.dtype == torch.bfloat16
    close(half.float(), model(ids), 0.05)


def test_attention_dropout_acts_in_training_only():
    for attention in ("eager", "sdpa"):
        model, ids = tiny(attention, attention_dropout=0.5), tokens(1, 16)
        assert not torch.equal(model(ids), model(ids))
        model.eval()
        assert torch.equal(model(ids), model(ids))


# ---- weights, counts, configuration


def test_initial_weights_depend_on_seed_name_and_shape_alone():
    small, deep = tiny(seed=3).float(), tiny(seed=3, num_hidden_layers=5, vocab_size=70).float()
    name = "model.layers.1.mlp.gate_proj.weight"
    assert torch.equal(small.get_parameter(name), deep.get_parameter(name))
    assert not torch.equal(small.get_parameter(name), tiny(seed=4).float().get_parameter(name))
    torch.manual_seed(99)
    assert torch.equal(small.get_parameter(name), tiny(seed=3).float().get_parameter(name))


def test_initial_variance_is_scaled_by_depth():
    model = CausalLM(ModelConfig(vocab_size=500, hidden_size=256, num_hidden_layers=8, num_attention_heads=4, attention_bias=True))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p))
        else:
            expected = 0.02 / math.sqrt(2 * 8) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert abs(p.std().item() / expected - 1) < 0.02, name


def test_untrained_loss_is_ln_vocabulary():
    model = CausalLM(ModelConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    ids = torch.randint(0, 1000, (8, 64), generator=torch.Generator().manual_seed(0))
    loss = F.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten())
    assert abs(loss.item() - math.log(1000)) < 0.02


def test_parameter_count_is_the_formula(shape):
    model = tiny(**shape)
    assert m.num_parameters(model.config) == sum(p.numel() for p in model.parameters())
    table = model.model.embed_tokens.weight.numel()
    assert m.num_parameters(model.config, embedding=False) == m.num_parameters(model.config) - (0 if model.config.tie_word_embeddings else table)


def test_published_sizes():
    llama3_8b = ModelConfig(128256, 4096, 14336, 32, 32, 8)
    assert m.num_parameters(llama3_8b) == 8_030_261_248  # the model card's 8.03 B
    llama32_1b = ModelConfig(128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True)
    assert m.num_parameters(llama32_1b) == 1_235_814_400
    qwen3_06b = ModelConfig(151936, 1024, 3072, 28, 16, 8, head_dim=128, qk_norm=True, tie_word_embeddings=True)
    assert m.num_parameters(qwen3_06b) == 596_049_920


def test_flops_are_counted_by_hand():
    """2 FLOPs per multiply-add of each matmul, forward once and backward twice; attention as the full square."""
    config = tiny().config
    D, S = config.head_dim, 16
    matmuls = 3 * (4 * 32 * 32 + 3 * 32 * 48) + 32 * 61
    norms = 3 * 2 * 32 + 32  # counted by the 6 N rule though no matmul: the convention's error, small in real models
    attention = 3 * 4 * S * D * 2  # layers x heads x (q k^T and weights v), multiply-adds per token
    assert m.flops_per_token(config, S) == 3 * 2 * (matmuls + norms + attention)


def test_intermediate_size_defaults_to_eight_thirds_in_steps_of_32():
    assert ModelConfig(hidden_size=128, num_attention_heads=4).intermediate_size == 352  # 341.3 -> 352
    assert ModelConfig(hidden_size=768, num_attention_heads=12).intermediate_size == 2048


def test_config_survives_the_way_to_hugging_face_and_back(shape):
    config = tiny(**shape).config
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("change, complaint", [
    (dict(num_attention_heads=3, head_dim=None), "hidden_size 32 is no multiple of num_attention_heads 3"),
    (dict(num_attention_heads=4, num_key_value_heads=3), "no multiple of num_key_value_heads 3"),
    (dict(head_dim=5), "odd"),
    (dict(vocab_size=0), "vocab_size is 0"),
    (dict(sliding_window=0), "at least 1"),
    (dict(model_type="llama", qk_norm=True), "no such combination"),
    (dict(model_type="gpt2"), "gpt2"),
    (dict(attention="flash"), "choose eager, sdpa or triton"),
    (dict(kernels="cuda"), "choose torch or triton"),
])
def test_impossible_shapes_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        tiny(**change)


@pytest.mark.parametrize("change, complaint", [
    (dict(model_type="gpt_neox"), "'gpt_neox' is not supported; supported: llama, mistral, qwen2, qwen3, mixtral, qwen3_moe"),
    (dict(hidden_act="gelu"), "hidden_act = 'gelu' is not supported; it must be 'silu'"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5 is not supported; it must be 1"),
    (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.25}, rope_scaling=None), "partial_rotary_factor = 0.25"),
    (dict(attention_dropout=1.5), "attention_dropout is 1.5"),
    (dict(rope_interleaved=True), "rope_interleaved = True"),
    (dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.1), "router_jitter_noise = 0.1"),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2), "max_window_layers = 2"),
    (dict(embedding_multiplier=12.0, zeta=1), "config.json: embedding_multiplier, zeta: unknown here, and may change"),
    (dict(quantization_config={"bits": 4}), "quantization_config: unknown here"),
    (dict(attn_logit_softcapping=50.0), "model_type 'llama' has no such combination"),
    (dict(qk_norm=True), "qk_norm: unknown here"),
    (dict(rope_scaling={"rope_type": "linear"}), "rope scaling 'linear': factor is None; it must be a number, factor >= 1"),
    (dict(rope_scaling={"rope_type": "linear", "factor": 0.5}), "factor is 0.5"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope scaling 'llama3': (low|high)_freq_factor is None"),
    (dict(rope_scaling={"rope_type": "linear", "factor": 2.0, "beta_fast": 3}), "rope scaling 'linear': beta_fast: unknown here"),
    (dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}, rope_scaling=None), "rope scaling 'default': full_attention: unknown"),
    (dict(mlp_bias=True), "mlp_bias"),
    (dict(rope_scaling={"rope_type": "longrope", "factor": 4.0}), "rope scaling 'longrope' is not supported; supported: default, linear"),
    (dict(model_type="qwen3", layer_types=["full_attention", "sliding_attention"]), "layer_types"),
])
def test_hugging_face_settings_that_would_change_the_output_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        ModelConfig.from_hf(tiny().config.to_hf() | change)


def test_both_dialects_of_rope_theta_are_read():
    config = tiny(rope_theta=12345.0).config.to_hf()
    assert ModelConfig.from_hf(config).rope_theta == 12345.0
    config.pop("rope_theta")
    assert ModelConfig.from_hf(config | {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}).rope_theta == 777.0


@pytest.mark.parametrize("name", OPTIONS)
def test_options_survive_the_way_to_hugging_face_and_back(name):
    config = option(name).config
    if name == "dynamic":  # there the file has the trained length, and the config the length it is stretched to
        config.max_position_embeddings = 16
        assert config.to_hf()["max_position_embeddings"] == 8
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_rope_scaling_is_read_from_each_dialect():
    config = {k: v for k, v in tiny().config.to_hf().items() if k not in ("rope_scaling", "rope_theta")}
    dialects = (dict(rope_theta=5e5, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
                dict(rope_theta=5e5, rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": None}),
                dict(rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5e5}),
                dict(rope_theta=5e5, rope_scaling={"rope_type": "yarn", "factor": 4.0}, original_max_position_embeddings=16),
                dict(rope_theta=5e5, rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 16}))  # 64 / 16
    for dialect in dialects:
        read = ModelConfig.from_hf(config | dialect)
        assert read.rope_theta == 5e5
        assert read.rope_scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    for nothing in (None, {}, {"rope_type": "default"}, {"rope_type": "default", "rope_theta": 1e4}):
        assert ModelConfig.from_hf(config | {"rope_scaling": nothing}).rope_scaling is None


def test_experts_are_read_from_both_dialects():
    config = {k: v for k, v in tiny(num_experts=4, qk_norm=True).config.to_hf().items() if k != "num_experts"}
    assert ModelConfig.from_hf(config | {"num_experts": 4}) == ModelConfig.from_hf(config | {"num_local_experts": 4})
    silent = ModelConfig.from_hf({k: v for k, v in config.items() if "expert" not in k and "moe" not in k and k != "norm_topk_prob"})
    assert (silent.num_experts, silent.num_experts_per_tok, silent.moe_intermediate_size, silent.norm_topk_prob) == (128, 8, 768, False)


def test_fields_without_effect_are_passed_over():
    noise = {"transformers_version": "4.40.0", "use_cache": True, "pretraining_tp": 1, "_name_or_path": "x", "torch_dtype": "bfloat16",
             "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}, "mlp_bias": False}
    assert ModelConfig.from_hf(tiny().config.to_hf() | noise) == tiny().config


def test_what_a_hugging_face_file_leaves_out_has_hugging_face_s_value_not_ours():
    config = tiny(**FAMILIES["mistral"]).config.to_hf()
    del config["sliding_window"], config["rms_norm_eps"]
    read = ModelConfig.from_hf(config)
    assert (read.sliding_window, read.rms_norm_eps) == (4096, 1e-6)
    config = tiny(**FAMILIES["qwen3"]).config.to_hf()
    del config["head_dim"]
    assert ModelConfig.from_hf(config).head_dim == 128
    del config["num_key_value_heads"]
    with pytest.raises(ValueError, match="num_key_value_heads must be given"):
        ModelConfig.from_hf(config)
