"""Prompts, prefixes, bottlenecks, IA3, BitFit: their counts, what they compute, and the peft package's folders."""

import copy

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import lora
from adapters import (add_bottleneck, add_ia3, add_prefix_tuning, add_prompt_tuning, bitfit, disable_adapters, drawn_ids,
                      from_peft, merge_ia3, remove_adapters, to_peft, with_prompt)
from generate import generate
from model import CausalLM, KVCache, ModelConfig

ADD = {
    "prompt": lambda m: add_prompt_tuning(m, 3),
    "p-tuning": lambda m: add_prompt_tuning(m, 3, hidden=10),
    "p-tuning v2": lambda m: add_prefix_tuning(m, 5),
    "prefix": lambda m: add_prefix_tuning(m, 5, hidden=10),
    "houlsby": lambda m: add_bottleneck(m, 6),
    "pfeiffer": lambda m: add_bottleneck(m, 6, where="pfeiffer"),
    "ia3": add_ia3,
    "bitfit": bitfit,
}
COUNT = {  # with hidden size 32, 2 layers, 2 key heads of 8, an MLP of 48
    "prompt": 3 * 32,
    "p-tuning": 3 * 32 + (32 + 1) * 10 + (10 + 1) * 10 + (10 + 1) * 32,
    "p-tuning v2": 2 * 5 * 2 * 2 * 8,
    "prefix": 5 * 32 + (32 + 1) * 10 + (10 + 1) * 2 * 2 * 2 * 8,
    "houlsby": 2 * 2 * (2 * 6 * 32 + 6 + 32),
    "pfeiffer": 2 * (2 * 6 * 32 + 6 + 32),
    "ia3": 2 * (2 * 2 * 8 + 48),
    "bitfit": 2 * (32 + 2 * 16),
}
STARTS_AS_BASE = ("houlsby", "pfeiffer", "ia3", "bitfit")


def tiny(dtype=torch.float64, **shape) -> CausalLM:
    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, model_type="qwen2",
                 attention_bias=True) | shape
    model = CausalLM(ModelConfig(**shape)).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


def shaken(model, size=0.3):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype), alpha=size)
    return model


def tokens(B=2, S=9, seed=3) -> torch.Tensor:
    return torch.randint(0, 61, (B, S), generator=torch.Generator().manual_seed(seed))


def logits_of(model, kind, ids, **more):
    """Logits of the text, whatever stands before it."""
    return model(with_prompt(model, ids), **more)[:, 3:] if kind in ("prompt", "p-tuning") else model(ids, **more)


@pytest.mark.parametrize("kind", ADD)
def test_number_of_trained_parameters_by_formula_and_nothing_else_changes(kind):
    model = tiny(torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ADD[kind](model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == COUNT[kind]
    start, ids = {name: p.detach().clone() for name, p in trained.items()}, tokens()
    optimizer, losses = torch.optim.Adam(trained.values(), lr=0.01), []
    for _ in range(6):
        loss = F.cross_entropy(logits_of(model, kind, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, start[name]) for name, p in trained.items())
    now = {name.replace("embed_tokens.base_layer", "embed_tokens"): p for name, p in model.named_parameters()}
    for name, p in before.items():
        assert torch.equal(now[name], p) or (kind == "bitfit" and name.endswith("bias")), name


@pytest.mark.parametrize("kind", ADD)
def test_switched_off_and_taken_off_the_base_is_there_bit_for_bit(kind):
    model, ids = tiny(torch.float32), tokens()
    base, names = model(ids), list(dict(model.named_parameters()))
    ADD[kind](model)
    if kind in STARTS_AS_BASE:
        assert torch.equal(logits_of(model, kind, ids), base)
    if kind == "bitfit":
        return  # the biases are the model's own
    shaken(model)
    assert not torch.allclose(logits_of(model, kind, ids), base, atol=1e-2)
    with disable_adapters(model):
        assert torch.equal(model(ids), base)
    with pytest.raises(ValueError, match="has an adapter already: remove_adapters first"):
        ADD[kind](model)
    remove_adapters(model)
    assert torch.equal(model(ids), base) and list(dict(model.named_parameters())) == names


@pytest.mark.parametrize("kind", [kind for kind in ADD if kind != "bitfit"])
def test_a_deep_copy_uses_its_own_adapters(kind):
    model = tiny()
    ADD[kind](model)
    twin, ids = copy.deepcopy(model), tokens()
    before = logits_of(model, kind, ids)
    shaken(twin)
    assert torch.equal(logits_of(model, kind, ids), before) and not torch.allclose(logits_of(twin, kind, ids), before)
    remove_adapters(twin)
    assert torch.equal(logits_of(model, kind, ids), before) and torch.equal(twin(ids), tiny()(ids))


@pytest.mark.parametrize("kind", [kind for kind in ADD if kind != "bitfit"])
@pytest.mark.parametrize("how", ["selective", "full", "compiled", "eager attention"])
def test_checkpointing_compilation_and_attention_kinds_change_nothing(kind, how):
    model, ids = tiny(), tokens()
    ADD[kind](model)
    shaken(model)
    ids = with_prompt(model, ids) if kind in ("prompt", "p-tuning") else ids

    def gradients(call):
        model.zero_grad()
        call(ids).sin().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain, call = gradients(model), model
    if how == "compiled":
        torch._dynamo.reset()
        call = torch.compile(model, fullgraph=True, backend="aot_eager")
    elif how == "eager attention":
        call = tiny(attention="eager")
        ADD[kind](call)
        call.load_state_dict(model.state_dict())
        named = dict(call.named_parameters())
        for name, p in model.named_parameters():
            if p.requires_grad:  # so that its gradients come here
                named[name].register_hook(lambda g, p=p: setattr(p, "grad", g))
    else:
        model.model.activation_checkpointing = how
    for ours, theirs in zip(gradients(call), plain):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------------------------ prompts, prefixes


def test_a_prompt_made_of_tokens_is_those_tokens():
    model, ids = tiny(), tokens()
    text = [7, 8, 9]
    whole = model(torch.cat((torch.tensor([text, text]), ids), 1))
    add_prompt_tuning(model, 3, init_ids=text)
    assert torch.equal(model(with_prompt(model, ids)), whole)


@pytest.mark.parametrize("shape", [{}, dict(model_type="qwen3", attention_bias=False, qk_norm=True, head_dim=6)], ids=["qwen2", "qwen3"])
def test_a_prefix_made_of_tokens_is_those_tokens_in_context(shape):
    """Keys unrotated, positions from n on: only then does the model answer as if the text stood before."""
    model, ids, text = tiny(**shape), tokens(), [7, 8, 9, 10]
    whole = model(torch.cat((torch.tensor([text, text]), ids), 1))[:, 4:]
    add_prefix_tuning(model, 4, init_ids=text)
    assert torch.allclose(model(ids), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["p-tuning v2", "prefix"])
def test_a_prefix_stands_before_each_packed_document(kind):
    model, ids = tiny(), tokens(B=2, S=10)
    ADD[kind](model)
    cu_seqlens = torch.tensor([0, 4, 13, 20], dtype=torch.int32)  # the second document runs over the row's end
    packed = model(ids, cu_seqlens=cu_seqlens)
    for row, begin, end in ((0, 0, 4), (0, 4, 10), (1, 0, 3), (1, 3, 10)):
        assert torch.allclose(packed[row:row + 1, begin:end], model(ids[row:row + 1, begin:end]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [kind for kind in ADD if kind != "bitfit"])
def test_with_a_kv_cache_as_without(kind):
    model, ids = tiny(), tokens(B=2, S=9)
    ADD[kind](model)
    shaken(model).eval()
    if kind in ("prompt", "p-tuning"):
        ids = with_prompt(model, ids)
    cache = KVCache(model.config, 2, 16, torch.float64)
    with torch.no_grad():
        whole = model(ids)
        parts = [model(part, kv_cache=cache) for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:])]
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


def test_prompts_and_prefixes_start_as_tokens_drawn_by_the_seed():
    """Both methods draw the same ones, so their models say the same; and every part of the vocabulary is drawn from."""
    prompt, prefix, other, ids = tiny(), tiny(), tiny(), tokens()
    add_prompt_tuning(prompt, 5)
    add_prefix_tuning(prefix, 5)
    add_prefix_tuning(other, 5, seed=1)
    assert torch.allclose(prefix(ids), prompt(with_prompt(prompt, ids))[:, 5:], rtol=0, atol=1e-10)
    assert not torch.allclose(prefix(ids), other(ids))
    drawn = torch.tensor(drawn_ids(prompt, 6100, 0))
    assert torch.bincount(drawn, minlength=61).min() > 50 and len(torch.bincount(drawn)) == 61  # 100 each in the mean


def test_generation_continues_a_prefix_as_it_would_the_text():
    model = tiny().eval()
    said = generate(model, [[7, 8, 9, 10, 3, 4]], max_new_tokens=8, temperature=0.0, stop_token_ids=())[0]
    add_prefix_tuning(model, 4, init_ids=[7, 8, 9, 10])
    assert generate(model, [[3, 4]], max_new_tokens=8, temperature=0.0, stop_token_ids=())[0] == said


@pytest.mark.parametrize("add, message", [
    (lambda m: add_prompt_tuning(m, 0), "prompt tuning with 0 virtual tokens"),
    (lambda m: add_prompt_tuning(m, 2, init_ids=[1]), "2 virtual tokens from 1 token ids"),
    (lambda m: add_prefix_tuning(m, 0), "a prefix of 0"),
    (lambda m: add_prefix_tuning(m, 2, init_ids=[1, 2], hidden=4), "give n >= 1 and n init_ids, or hidden"),
    (lambda m: add_bottleneck(m, 4, where="lora"), "houlsby or pfeiffer"),
    (lambda m: add_ia3(m, ["key"]), "no layer's name ends in 'key'; there are: down_proj, gate_proj"),
    (lambda m: from_peft(m, {"peft_type": "LORA"}, {}), "'LORA' is not among .*see lora.py"),
    (lambda m: from_peft(m, {"peft_type": "PREFIX_TUNING"}, {"prompt_embeddings": torch.zeros(4, 32)}),
     r"another model: PREFIX_TUNING with .*\(4, 32\)}, this one needs prompt_embeddings \(n, 64\)"),
    (lambda m: from_peft(m, {"peft_type": "IA3", "target_modules": ["k_proj"]}, {"x": torch.zeros(1)}),
     "another model: base_model.model.model.layers.0.self_attn.k_proj.ia3_l is missing"),
])
def test_what_cannot_be_is_refused_in_one_line(add, message):
    model = tiny()
    with pytest.raises(ValueError, match=message) as caught:
        add(model)
    assert "\n" not in str(caught.value) and torch.equal(model(tokens()), tiny()(tokens()))
    assert "missing" in message or all(p.requires_grad for p in model.parameters())


def test_models_that_cannot_take_a_method():
    with pytest.raises(ValueError, match="this model has none"):
        bitfit(tiny(model_type="llama", attention_bias=False))
    with pytest.raises(ValueError, match="sliding_window 4: the prefix would slide out of sight"):
        add_prefix_tuning(tiny(model_type="mistral", attention_bias=False, sliding_window=4), 3)
    with pytest.raises(ValueError, match="IA3: target_modules must be a list"):
        from_peft(tiny(), {"peft_type": "IA3", "target_modules": ".*"}, {})


# ------------------------------------------------------------------------------------------------------- bottleneck, IA3


@pytest.mark.parametrize("where", ["houlsby", "pfeiffer"])
def test_bottlenecks_stand_where_the_papers_put_them(where):
    """The block written out by hand: on each sublayer's output, before it is added to the residual stream."""
    model, ids = tiny(num_hidden_layers=1), tokens()
    add_bottleneck(model, 6, where=where)
    shaken(model)
    layer, seen = model.model.layers[0], {}
    layer.register_forward_pre_hook(lambda m, args: seen.update(args=args))
    out = model.hidden(ids)

    def bottleneck(adapter, y):
        return y + F.gelu(y @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias

    adapters = {host: getattr(getattr(layer, host), "adapter", None) for host in ("self_attn", "mlp")}
    with disable_adapters(model):
        x, rope, mask, *_ = seen["args"]
        y = layer.self_attn(layer.input_layernorm(x), rope, mask, None, None)
        x = x + (y if adapters["self_attn"] is None else bottleneck(adapters["self_attn"], y))
        x = x + bottleneck(adapters["mlp"], layer.mlp(layer.post_attention_layernorm(x)))
    assert (adapters["self_attn"] is None) == (where == "pfeiffer")
    assert torch.allclose(model.model.norm(x), out, rtol=0, atol=1e-10)


def test_ia3_scales_keys_values_and_inner_states_and_merges():
    model, ids = tiny(), tokens()
    add_ia3(model)
    shaken(model)
    attention, x = model.model.layers[0].self_attn, torch.randn(4, 32, dtype=torch.float64)
    k = F.linear(x, attention.k_proj.weight, attention.k_proj.bias) * attention.k_proj.ia3.ia3_l[:, 0]
    assert torch.allclose(attention.k_proj(x), k, rtol=0, atol=1e-12)
    down, x = model.model.layers[1].mlp.down_proj, torch.randn(4, 48, dtype=torch.float64)
    assert torch.allclose(down(x), (x * down.ia3.ia3_l[0]) @ down.weight.T, rtol=0, atol=1e-12)
    apart = model(ids)
    merge_ia3(model)
    assert torch.allclose(model(ids), apart, rtol=0, atol=1e-10)
    assert list(dict(model.named_parameters())) == list(dict(tiny().named_parameters()))


# --------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("kind", [kind for kind in ADD if kind != "bitfit"])
def test_folders_come_back_as_the_same_function_bit_for_bit(kind, tmp_path):
    model, ids = tiny(torch.float32), tokens()
    ADD[kind](model)
    shaken(model)
    lora.write_peft(tmp_path, *to_peft(model))
    other = tiny(torch.float32)
    from_peft(other, *lora.read_peft(tmp_path))
    if kind == "prefix":  # its MLP multiplied one layer's rows at a time, here all at once
        assert torch.allclose(logits_of(other, kind, ids), logits_of(model, kind, ids), atol=1e-4)
    else:
        assert torch.equal(logits_of(other, kind, ids), logits_of(model, kind, ids))
    tensors = to_peft(other)[1]
    assert all(torch.equal(t, tensors[name]) for name, t in to_peft(model)[1].items())
    with pytest.raises(ValueError, match="an adapter of another model"):
        from_peft(tiny(hidden_size=16, num_attention_heads=2, num_key_value_heads=1), *lora.read_peft(tmp_path))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The same tiny model in transformers, made anew each time."""
    pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("base")
    checkpoint.save_model(folder, tiny(torch.float32))
    return lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "p-tuning v2", "prefix", "ia3"])
def test_peft_computes_the_same_from_our_folder_and_gives_it_back(kind, theirs, tmp_path):
    from peft import PeftModel
    model, ids = tiny(torch.float32), tokens()
    ADD[kind](model)
    shaken(model)
    lora.write_peft(tmp_path / "ours", *to_peft(model))
    other = PeftModel.from_pretrained(theirs(), tmp_path / "ours")
    expected = other(ids).logits[:, -ids.shape[1]:]
    assert (logits_of(model, kind, ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    other.save_pretrained(tmp_path / "theirs")
    (_, a), (_, b) = lora.read_peft(tmp_path / "ours"), lora.read_peft(tmp_path / "theirs")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name, settings, kind", [
    ("PromptTuningConfig", dict(num_virtual_tokens=3), "prompt"),
    ("PromptEncoderConfig", dict(num_virtual_tokens=3, encoder_hidden_size=10), "p-tuning"),
    ("PrefixTuningConfig", dict(num_virtual_tokens=5), "prefix"),
    ("PrefixTuningConfig", dict(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=10), "prefix"),
    ("IA3Config", dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"],
                       init_ia3_weights=False), "ia3")])
def test_folders_that_peft_made_by_itself(name, settings, kind, theirs, tmp_path):
    import peft
    other, ids = peft.get_peft_model(theirs(), getattr(peft, name)(task_type="CAUSAL_LM", **settings)).eval(), tokens()
    other.save_pretrained(tmp_path)
    model = tiny(torch.float32)
    from_peft(model, *lora.read_peft(tmp_path))
    expected = other(ids).logits[:, -ids.shape[1]:]
    assert (logits_of(model, kind, ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["prompt", "p-tuning v2", "ia3"])
def test_gradients_equal_peft_s(kind, theirs, tmp_path):
    from peft import PeftModel
    model, ids = tiny(torch.float32), tokens()
    ADD[kind](model)
    shaken(model)
    lora.write_peft(tmp_path, *to_peft(model))
    other = PeftModel.from_pretrained(theirs(), tmp_path, is_trainable=kind == "ia3")
    if kind != "ia3":  # PEFT will not train prompts that were loaded, until told so
        other.prompt_encoder.requires_grad_(True)
    for logits in (logits_of(model, kind, ids), other(ids).logits[:, -ids.shape[1]:]):
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    ours = [p.grad for p in model.parameters() if p.requires_grad]
    expected = [p.grad for p in other.parameters() if p.requires_grad]
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max()))
