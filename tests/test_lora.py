"""Adapters: the layers against their own slow truth and the peft package, merging, folders, and what must stay as it was."""

import copy
import json
import math
import struct

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
from logprobs import sequence_logprobs
from lora import (LoRAConfig, LoRALinear, adapted, apply_lora, disable_adapters, load_adapter, merge_lora, parameter_report,
                  read_peft, remove_lora, save_adapter, set_adapter, unmerge_lora, use_adapter)
from model import CausalLM, ModelConfig
from quant import quantize_model
from train_dpo import preference_loss

KINDS = {"lora": {}, "rslora": dict(use_rslora=True), "dora": dict(use_dora=True)}
LINEAR = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
          "mlp.down_proj"]


def tiny(dtype=torch.float64, seed=0, **shape) -> CausalLM:
    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3) | shape
    return CausalLM(ModelConfig(**shape), seed).to(dtype)


def shaken(model, seed=1, size=0.1):
    """Adapters as after some training: B and m no longer at their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype), alpha=size)
    return model


def tokens(B=2, S=9, vocab=61) -> torch.Tensor:
    return torch.randint(0, vocab, (B, S), generator=torch.Generator().manual_seed(3))


def weights(model) -> dict:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class RoundedLinear(nn.Module):
    """Stands for any quantized layer: int8 codes, one scale a row, and what lora.py asks for."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("codes", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def dequantize(self):
        return self.codes * self.scale

    def forward(self, x):
        return F.linear(x, self.dequantize(), self.bias)


def rounded(model):
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, RoundedLinear(module))
    return model


# ------------------------------------------------------------------------------------------------------------ the layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "quantized"])
def test_a_layer_multiplies_by_the_matrix_that_the_paper_writes_down(kind, quantized):
    """Outputs and gradients of x, A, B and m against autograd on the formula, written here once more."""
    torch.manual_seed(0)
    base = nn.Linear(12, 7).double()
    model = nn.ModuleDict({"f": RoundedLinear(base) if quantized else base})
    shaken(apply_lora(model, LoRAConfig(r=3, alpha=5, target_modules=["f"], **KINDS[kind])), size=0.5)
    layer, x = model["f"], torch.randn(4, 5, 12, dtype=torch.float64, requires_grad=True)
    W = (model["f"].base_layer.dequantize() if quantized else base.weight).detach()
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    weight = W + (5 / math.sqrt(3) if kind == "rslora" else 5 / 3) * B @ A
    parameters = [x, A, B]
    if kind == "dora":
        parameters += [m := layer.lora_magnitude_vector["default"]]
        weight = m[:, None] * weight / weight.detach().norm(dim=1, keepdim=True)
    truth = x @ weight.T + base.bias
    assert torch.allclose(layer(x), truth, rtol=0, atol=1e-6 if quantized else 1e-12)  # there adapters are float32
    assert torch.allclose(layer.weight, weight, rtol=0, atol=1e-6 if quantized else 1e-12)
    for ours, theirs in zip(torch.autograd.grad(layer(x).sin().sum(), parameters),
                            torch.autograd.grad(truth.sin().sum(), parameters)):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 if quantized else 1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [lambda: tiny(torch.float32), lambda: tiny(torch.bfloat16), lambda: rounded(tiny(torch.float32)),
                                  lambda: tiny(torch.float32, attention_bias=True)], ids=["float32", "bfloat16", "int8", "bias"])
def test_an_adapted_model_starts_out_bit_identical(kind, make):
    model = make()
    before = model(tokens())
    apply_lora(model, LoRAConfig(dropout=0.5, **KINDS[kind]))
    assert torch.equal(model(tokens()), before)
    with torch.autocast("cpu", torch.bfloat16):
        with disable_adapters(model):
            base = model(tokens())
        assert torch.equal(model(tokens()), base)


def test_initial_weights_depend_on_seed_name_and_shape_alone():
    few = apply_lora(tiny(), LoRAConfig(r=4, target_modules=["v_proj"]))
    torch.manual_seed(7)
    many = apply_lora(tiny(), LoRAConfig(r=4))
    name = "model.layers.1.self_attn.v_proj.lora_A.default"
    assert torch.equal(weights(few)[name], weights(many)[name])
    assert not torch.equal(weights(many)[name], weights(many)[name.replace("v_proj", "k_proj")])
    assert not torch.equal(weights(many)[name], weights(apply_lora(tiny(), LoRAConfig(r=4), seed=1))[name])
    wide = apply_lora(nn.ModuleDict({"f": nn.Linear(400, 3)}), LoRAConfig(r=50))["f"]
    A = wide.lora_A["default"]  # Kaiming-uniform with a = sqrt(5): uniform in +- 1 / sqrt(400)
    assert 0.0499 < A.abs().max() <= 0.05 and abs(A.std() - 0.05 / math.sqrt(3)) < 3e-4
    assert not wide.lora_B["default"].any()


def test_a_quantized_or_half_base_gets_float32_adapters_and_gradients_to_x():
    for model in (rounded(tiny(torch.float32)), tiny(torch.bfloat16)):
        apply_lora(model, LoRAConfig(r=2))
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens()).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads.values())
        assert grads["model.layers.0.self_attn.q_proj.lora_B.default"].any()  # through all that lies above


def test_dropout_is_on_the_update_alone_and_in_training_only():
    model = shaken(apply_lora(tiny(), LoRAConfig(r=8, dropout=0.25, target_modules=["q_proj"])))
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(1, 32, dtype=torch.float64)
    model.eval()
    whole = layer(x).detach()
    assert torch.equal(whole, layer(x))
    layer.train()
    torch.manual_seed(0)
    mean = torch.stack([layer(x).detach() for _ in range(4000)]).mean(0)
    assert not torch.equal(layer(x), layer(x))
    assert torch.allclose(mean, whole, atol=0.02 * float(whole.abs().max()))  # in expectation the same
    with disable_adapters(model):
        assert torch.equal(layer(x), layer.base_layer(x))


def test_a_row_of_zeros_gives_dora_no_nan():
    linear = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        linear.weight[1] = 0
    model = apply_lora(nn.ModuleDict({"f": linear}), LoRAConfig(r=2, use_dora=True))
    y = model["f"](torch.randn(5, 4))
    y.square().sum().backward()
    assert not y[:, 1].any() and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------------- what is trained


def test_names_and_number_of_what_is_trained():
    model = apply_lora(tiny(), LoRAConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"]))
    trainable = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    expected = {}
    for i in range(2):
        for path, out, inside in ((f"model.layers.{i}.self_attn.q_proj", 32, 32), (f"model.layers.{i}.mlp.down_proj", 32, 48)):
            expected |= {f"{path}.lora_A.default": (4, inside), f"{path}.lora_B.default": (out, 4),
                         f"{path}.lora_magnitude_vector.default": (out,)}
    assert trainable == expected
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" in dict(model.named_parameters())


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "quantized"])
def test_the_report_counts_by_formula(quantized):
    bare = tiny(torch.float32)
    total, r = sum(p.numel() for p in bare.parameters()), 4
    model = apply_lora(rounded(bare) if quantized else bare, LoRAConfig(r=r))
    added = 2 * r * sum(i + o for i, o in ((32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)))
    told = parameter_report(model)
    assert told["trainable"] == added and told["total"] == total + added and told["share"] == added / (total + added)
    assert told["trainable_bytes"] == 4 * added
    linear = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48)
    rows = 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    assert told["bytes"] == 4 * (total + added) - (3 * linear - 4 * rows if quantized else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_adapters_only_and_lowers_the_loss(kind):
    model = apply_lora(tiny(torch.float32, initializer_range=0.05), LoRAConfig(r=4, **KINDS[kind]))
    before, ids = weights(model), tokens()
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(8):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    after = weights(model)
    assert losses[-1] < losses[0] - 0.3
    for name, p in model.named_parameters():
        assert torch.equal(before[name], after[name]) != p.requires_grad, name
        assert p.requires_grad or p.grad is None


def test_the_base_with_adapters_off_is_dpo_s_reference():
    """No second model: scores, loss and gradients equal those with a frozen copy; the first step's loss is ln 2."""
    model = tiny()
    frozen = copy.deepcopy(model)
    apply_lora(model, LoRAConfig(r=4))
    ids = tokens(B=4)
    labels = ids.roll(-1, 1).masked_fill(torch.arange(9) < 4, -100)

    def loss(reference_of):
        sums, _ = sequence_logprobs(model(ids), labels)
        reference = reference_of()
        return preference_loss(sums[:2], sums[2:], reference[:2], reference[2:])[0].mean(), reference

    @torch.no_grad()
    def copied():
        return sequence_logprobs(frozen(ids), labels)[0]

    @torch.no_grad()
    def switched_off():
        with disable_adapters(model):
            return sequence_logprobs(model(ids), labels)[0]

    assert float(loss(switched_off)[0].detach()) == math.log(2)
    shaken(model)
    results = []
    for reference_of in (copied, switched_off):
        model.zero_grad()
        value, reference = loss(reference_of)
        value.backward()
        results.append([value, reference, *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results)) and float(results[0][0]) != math.log(2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["selective", "full", "compiled"])
def test_activation_checkpointing_and_fullgraph_compilation_change_nothing(kind, how):
    model, ids = shaken(apply_lora(tiny(), LoRAConfig(r=4, **KINDS[kind]))), tokens()

    def gradients(call):
        model.zero_grad()
        call(ids).sin().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients(model)
    if how == "compiled":
        torch._dynamo.reset()
        call = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        model.model.activation_checkpointing, call = how, model
    for ours, theirs in zip(gradients(call), plain):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)
    if how == "compiled":
        with torch.no_grad(), disable_adapters(model):  # the compiled model heeds the switch
            assert torch.allclose(call(ids), remove_lora(copy.deepcopy(model))(ids), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ several adapters


def test_several_adapters_switch_by_name():
    model, ids = tiny(), tokens()
    base = model(ids)
    shaken(apply_lora(model, LoRAConfig(r=4, target_modules=["q_proj"]), name="first"))
    first = model(ids)
    shaken(apply_lora(model, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True), name="second"))
    second = model(ids)
    assert not torch.equal(first, base) and not torch.equal(first, second)
    with use_adapter(model, "first"):
        assert torch.equal(model(ids), first)
        with disable_adapters(model):
            assert torch.equal(model(ids), base)
        assert torch.equal(model(ids), first)
    assert torch.equal(model(ids), second)
    with pytest.raises(ZeroDivisionError), disable_adapters(model):
        1 / 0
    assert torch.equal(model(ids), second)  # switched on again after an error, too
    set_adapter(model, "first")
    assert torch.equal(model(ids), first)
    assert all(name.endswith("first") for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="no adapter 'third'; it has: first, second"):
        set_adapter(model, "third")
    with pytest.raises(ValueError, match="has an adapter 'first' already"):
        apply_lora(model, LoRAConfig(), name="first")
    for name in ("a.b", "keys", "", "a-b"):
        with pytest.raises(ValueError, match="must be a name such as default"):
            apply_lora(model, LoRAConfig(), name=name)


# --------------------------------------------------------------------------------------------------------------- targets


def test_targets_by_ending_regex_and_all_linear():
    def paths(targets, **more):
        return set(adapted(apply_lora(tiny(), LoRAConfig(target_modules=targets, **more))))

    everything = {f"model.layers.{i}.{name}" for i in range(2) for name in LINEAR}
    assert paths("all-linear") == paths(["all-linear"]) == everything  # not the head, as PEFT
    assert paths(["v_proj"]) == {f"model.layers.{i}.self_attn.v_proj" for i in range(2)}
    assert paths(["layers.1.mlp.up_proj", "lm_head"]) == {"model.layers.1.mlp.up_proj", "lm_head"}
    assert paths(r"model\.layers\.0\..*(q|v)_proj") == {f"model.layers.0.self_attn.{x}_proj" for x in "qv"}


@pytest.mark.parametrize("targets, message", [
    (["q_proj", "query"], r"'query' matches no linear layer; there are: down_proj, gate_proj, k_proj, lm_head, o_proj"),
    ("q_proj|v_proj", r"'q_proj\|v_proj' matches no linear layer"),  # a regex is of the whole name, as PEFT's
    (["embed_tokens"], r"'embed_tokens' matches no linear layer \(model.embed_tokens is a Embedding\)"),
    (["("], r"'\(' is no regular expression"),
])
def test_a_target_that_matches_no_layer_is_refused_naming_what_there_is(targets, message):
    model = tiny()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, LoRAConfig(target_modules=targets))
    assert same(weights(model), before) and all(p.requires_grad for p in model.parameters())


def test_stacked_experts_are_refused_by_name():
    """Not left out in silence where the same name means plain layers, too; all-linear leaves out them and their router."""
    mixed = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"mlp": nn.Module()}) for _ in range(2)), "q": nn.Linear(4, 4)})
    mixed["layers"][0]["mlp"].down_proj = nn.Linear(4, 4)
    mixed["layers"][1]["mlp"].down_proj = nn.Parameter(torch.zeros(8, 4, 4))
    mixed["layers"][1]["mlp"].gate = nn.Linear(4, 8)
    message = r"'down_proj' means layers.1.mlp.down_proj, stacked experts of shape \(8, 4, 4\), which take no adapters here"
    with pytest.raises(ValueError, match=message):
        apply_lora(mixed, LoRAConfig(target_modules=["q", "down_proj"]))
    assert set(adapted(apply_lora(mixed, LoRAConfig()))) == {"layers.0.mlp.down_proj", "q"}


@pytest.mark.parametrize("settings, message", [
    (dict(r=0), "rank r = 0"), (dict(r=1.5), "rank r = 1.5"), (dict(alpha=0), "alpha = 0"), (dict(dropout=1.0), "dropout = 1.0"),
    (dict(rank_pattern={"q_proj": -1}), "rank q_proj = -1"), (dict(alpha=math.inf), "alpha = inf")])
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


# ------------------------------------------------------------------------------------------------- merging, whole modules


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_the_same_function_and_unmerging_the_same_bits(kind):
    model, ids = tiny(attention_bias=True), tokens()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(generator=torch.Generator().manual_seed(0))
    shaken(apply_lora(model, LoRAConfig(r=4, **KINDS[kind])))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.float())
    with disable_adapters(model):
        base = model(ids)
    apart, before = model(ids), weights(model)
    merge_lora(model)
    assert torch.allclose(model(ids), apart, rtol=0, atol=1e-11) and not torch.equal(model(ids), base)
    assert torch.equal(merge_lora(model)(ids), model(ids))  # merging what is merged adds nothing
    with disable_adapters(model):
        assert torch.equal(model(ids), base)
    model.to(torch.float32).to(torch.float64)  # as a move to another device would: what is kept goes along
    with disable_adapters(model):
        assert model(ids).dtype == torch.float64
    unmerge_lora(model)
    assert torch.equal(model(ids), apart) and same(weights(model), before)
    bare = weights(tiny(attention_bias=True))
    merge_lora(model, final=True)
    assert weights(model).keys() == bare.keys() and not adapted(model)
    assert torch.allclose(model(ids), apart, rtol=0, atol=1e-11)


def test_a_finally_merged_model_is_saved_as_any_other(tmp_path):
    model = shaken(apply_lora(tiny(torch.float32), LoRAConfig(r=4)))
    merge_lora(model, final=True)
    checkpoint.save_model(tmp_path, model)
    assert torch.equal(checkpoint.load_model(tmp_path)(tokens()), model(tokens()))


def test_a_quantized_base_merges_into_full_precision_and_comes_back():
    model, ids = rounded(tiny(torch.float32)), tokens()
    base = model(ids)
    shaken(apply_lora(model, LoRAConfig(r=4)))
    apart, buffers = model(ids), {name: b.clone() for name, b in model.named_buffers()}
    layer = model.model.layers[0].mlp.up_proj
    expected = layer.base_layer.dequantize() + layer.update("default")
    merge_lora(model)
    assert type(layer.base_layer) is nn.Linear and torch.equal(layer.base_layer.weight, expected)
    assert torch.allclose(model(ids), apart, atol=1e-4)
    unmerge_lora(model)
    assert same(dict(model.named_buffers()), buffers) and torch.equal(model(ids), apart)
    remove_lora(model)
    assert torch.equal(model(ids), base) and isinstance(model.model.layers[0].mlp.up_proj, RoundedLinear)


def test_a_layer_that_does_more_than_multiply_is_adapted_but_not_merged():
    class Rounding(nn.Linear):
        def forward(self, x):
            return F.linear(x.round(), self.weight, self.bias)

    model = apply_lora(nn.ModuleDict({"f": Rounding(4, 4)}), LoRAConfig(r=2))
    assert torch.equal(model["f"](torch.ones(1, 4)), model["f"].base_layer(torch.ones(1, 4)))
    with pytest.raises(ValueError, match="f: a Rounding does more than multiply"):
        merge_lora(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["nf4", "int8", "int4"])
def test_qlora_is_lora_on_the_dequantized_weights(method, kind):
    """quant.py's layers under adapters: outputs, gradients and the merged model equal those on plain layers W ~ Q(W)."""
    shape, ids = dict(dtype=torch.float32, hidden_size=64, initializer_range=0.1), tokens()
    quantized, plain = quantize_model(tiny(**shape), method), tiny(**shape)
    with torch.no_grad():
        for path, module in quantized.named_modules():
            if callable(getattr(module, "dequantize", None)):
                plain.get_submodule(path).weight.copy_(module.dequantize())
    base, results = quantized(ids), []
    for model in (quantized, plain):
        apply_lora(model, LoRAConfig(r=4, **KINDS[kind]))
        assert model is plain or torch.equal(model(ids), base)
        shaken(model)
        model.model.activation_checkpointing = "full"
        (out := model(ids)).sin().sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, theirs in zip(*results):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert parameter_report(quantized)["total"] == parameter_report(plain)["total"]
    merge_lora(quantized, final=True)
    assert {type(m) for m in quantized.modules()} == {type(m) for m in tiny().modules()}
    assert torch.allclose(quantized(ids), results[0][0], atol=1e-3)


def test_merging_refuses_what_is_not_finite_or_merged_with_another():
    model = apply_lora(apply_lora(tiny(), LoRAConfig(r=2), name="a"), LoRAConfig(r=2), name="b")
    merge_lora(model)
    set_adapter(model, "a")
    with pytest.raises(ValueError, match="adapter 'b' is merged already: unmerge_lora first"):
        merge_lora(model)
    unmerge_lora(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_B["a"][0] = math.nan
    before = weights(model)
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.lora_B.weight is not finite: the adapter is not merged"):
        merge_lora(model)
    assert not any(m.kept for m in adapted(model).values())
    assert weights(model).keys() == before.keys()


def test_an_adapter_on_a_tied_head_is_refused():
    with pytest.raises(ValueError, match="lm_head shares its weight with model.embed_tokens"):
        apply_lora(tiny(tie_word_embeddings=True), LoRAConfig(target_modules=["lm_head"]))


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_trained_whole_stay_tied_if_they_were(tied):
    model, ids = tiny(tie_word_embeddings=tied), tokens()
    base, count = model(ids), sum(p.numel() for p in model.parameters())
    apply_lora(model, LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"] + ["lm_head"] * (not tied)))
    assert torch.equal(model(ids), base)
    embed = "model.embed_tokens.modules_to_save.default.weight"
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert trained == ({embed} if tied else {embed, "lm_head.modules_to_save.default.weight"})
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    shaken(model)
    after = model(ids)
    with disable_adapters(model):
        assert torch.equal(model(ids), base)
    merge_lora(model, final=True)
    assert torch.allclose(model(ids), after, rtol=0, atol=1e-11)
    assert sum(p.numel() for p in model.parameters()) == count
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_new_tokens_cannot_be_told_apart_unless_embedding_and_head_are_trained():
    """Rows added to a vocabulary start equal (checkpoint.grow_vocabulary), and LoRA freezes them: their logits stay equal."""
    def gap(modules_to_save):
        model = tiny(torch.float32)
        checkpoint.grow_vocabulary(model, 63)
        apply_lora(model, LoRAConfig(r=4, modules_to_save=modules_to_save))
        optimizer, ids = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), tokens()
        for _ in range(5):
            F.cross_entropy(model(ids).flatten(0, 1), torch.full((18,), 61)).backward()
            optimizer.step()
            optimizer.zero_grad()
        logits = model(ids)
        return float((logits[..., 61] - logits[..., 62]).abs().max())

    assert gap([]) == 0.0 and gap(["embed_tokens", "lm_head"]) > 0.1


def test_a_fused_loss_that_asks_an_adapted_head_for_its_weight_is_right():
    model = shaken(apply_lora(tiny(), LoRAConfig(r=4, target_modules=["lm_head", "q_proj"])))
    hidden = model.hidden(tokens())
    assert torch.allclose(F.linear(hidden, model.lm_head.weight), model(tokens()), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_are_bitwise(kind, tmp_path):
    config = LoRAConfig(r=4, alpha=7, dropout=0.1, modules_to_save=["lm_head"], rank_pattern={"v_proj": 2},
                        alpha_pattern={"layers.1.mlp.up_proj": 3.0}, base_model="some/base", **KINDS[kind])
    model = shaken(apply_lora(tiny(torch.float32), config))
    save_adapter(model, tmp_path / "a")
    other = load_adapter(tiny(torch.float32), tmp_path / "a")
    assert same(weights(model), weights(other))
    model.eval(), other.eval()
    assert torch.equal(model(tokens()), other(tokens()))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, p in other.named_parameters() if p.requires_grad}
    save_adapter(other, tmp_path / "b")
    assert read_peft(tmp_path / "b")[0]["base_model_name_or_path"] == "some/base"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_file_is_the_one_that_checkpoint_py_would_write(tmp_path):
    save_adapter(apply_lora(tiny(torch.float32), LoRAConfig(r=4)), tmp_path)
    config, tensors = read_peft(tmp_path)
    checkpoint.write_safetensors(tmp_path / "again", tensors, {"format": "pt"})
    assert (tmp_path / "again").read_bytes() == (tmp_path / "adapter_model.safetensors").read_bytes()
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert tuple(tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape) == (4, 48)


def test_targets_that_no_ending_describes_are_written_out(tmp_path):
    save_adapter(apply_lora(tiny(), LoRAConfig(target_modules=["layers.1.self_attn.q_proj"])), tmp_path)
    assert read_peft(tmp_path)[0]["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_several_folders_on_one_model(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        save_adapter(shaken(apply_lora(tiny(), LoRAConfig(r=2)), seed), tmp_path / name)
    model = load_adapter(load_adapter(tiny(), tmp_path / "a", name="a"), tmp_path / "b", name="b")
    for name in "ab":
        alone = load_adapter(tiny(), tmp_path / name)
        with use_adapter(model, name):
            assert torch.equal(model(tokens()), alone(tokens()))
    save_adapter(model, tmp_path / "again", name="a")
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (tmp_path / "a/adapter_model.safetensors").read_bytes()


def test_there_must_be_an_adapter_to_save(tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match="there is no adapter that acts: name one"):
        save_adapter(model, tmp_path / "a")
    apply_lora(model, LoRAConfig())
    with pytest.raises(ValueError, match="there is no adapter 'b'"):
        save_adapter(model, tmp_path / "a", name="b")
    assert not (tmp_path / "a").exists()


def saved(folder, **changes):
    """A good adapter folder with some settings changed."""
    save_adapter(apply_lora(tiny(torch.float32), LoRAConfig(r=4)), folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("changes, message", [
    (dict(r=8), r"another model or rank: .*down_proj.lora_A.weight is \(4, 48\), and should be \(8, 48\)"),
    (dict(use_dora=True), r"down_proj.lora_magnitude_vector is missing, and should be \(32,\)"),
    (dict(peft_type="IA3"), "peft_type is 'IA3', not LORA"),
    (dict(bias="all"), "bias = 'all' is not supported"),
    (dict(fan_in_fan_out=True), "fan_in_fan_out = True is not supported"),
    (dict(init_lora_weights="pissa"), "init_lora_weights = 'pissa' is not supported"),
    (dict(trainable_token_indices=[3]), r"trainable_token_indices = \[3\] is not supported"),
    (dict(something_new=1), "something_new = 1 is not supported"),
    (dict(lora_alpha="x"), "alpha = 'x'"), (dict(r=None), "rank r = None")])
def test_a_folder_with_another_rank_or_feature_is_refused(tmp_path, changes, message):
    model = tiny(torch.float32)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, saved(tmp_path, **changes))
    assert "\n" not in str(caught.value) and not adapted(model)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"down_proj.lora_B.weight is \(32, 4\), and should be \(64, 4\) for this model"):
        load_adapter(tiny(hidden_size=64), tmp_path)
    with pytest.raises(ValueError, match="an adapter of another model: this one has no linear layer model.layers.1.mlp.down_proj"):
        load_adapter(tiny(num_hidden_layers=1), tmp_path)
    save_adapter(apply_lora(tiny(), LoRAConfig(modules_to_save=["lm_head"])), tmp_path)
    with pytest.raises(ValueError, match=r"lm_head.weight is \(61, 32\), and should be \(63, 32\)"):
        load_adapter(tiny(vocab_size=63), tmp_path)


def test_a_damaged_folder_is_refused_in_one_line(tmp_path):
    good = (saved(tmp_path) / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(good[:8], "little")

    def header(change):
        entries = json.loads(good[8:8 + length])
        change(entries, next(k for k in entries if k != "__metadata__"))
        text = json.dumps(entries).encode()
        return struct.pack("<Q", len(text)) + text + good[8 + length:]

    def expect(raw, message):
        (tmp_path / "adapter_model.safetensors").write_bytes(raw)
        with pytest.raises(ValueError, match=message) as caught:
            load_adapter(tiny(torch.float32), tmp_path)
        assert "\n" not in str(caught.value)

    for raw in (b"", good[:7], good[:100], struct.pack("<Q", 2**62) + good[8:], good[:8] + b"\xff" + good[9:],
                header(lambda h, k: h[k].update(dtype="I9")), header(lambda h, k: h[k].pop("shape")),
                header(lambda h, k: h.update({k: 5})), header(lambda h, k: h[k].update(data_offsets=[0]))):
        expect(raw, "not a valid safetensors file")
    for raw in (good[:-1], header(lambda h, k: h[k].update(shape=[4, 31])), header(lambda h, k: h[k].update(shape=[-4, -32])),
                header(lambda h, k: h[k].update(data_offsets=[-4, 508]))):
        expect(raw, "does not lie where it should")
    expect(good + b"\0", "its tensors end at byte")
    (tmp_path / "adapter_config.json").write_text("[")
    expect(good, "adapter_config.json: not valid JSON")
    (tmp_path / "adapter_config.json").unlink()
    expect(good, "not a PEFT adapter: no adapter_config.json")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no adapter_model.safetensors .adapter_model.bin is pickle, which is not read"):
        load_adapter(tiny(), tmp_path)


# ------------------------------------------------------------------------------------------------------ the peft package


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Our model, and the same one as transformers sees it, by whether head and embedding are tied."""
    pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    def make(**shape):
        folder = tmp_path_factory.mktemp("base")
        model = tiny(torch.float32, **shape)
        checkpoint.save_model(folder, model)
        return model, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_peft_s(bases, kind, tmp_path):
    from peft import PeftModel
    ours, theirs = bases(attention_bias=True, model_type="qwen2")
    shaken(apply_lora(ours, LoRAConfig(r=4, alpha=9, rank_pattern={"up_proj": 6}, alpha_pattern={"v_proj": 5}, **KINDS[kind])))
    save_adapter(ours, tmp_path / "ours")
    theirs, ids = PeftModel.from_pretrained(theirs, tmp_path / "ours", is_trainable=True), tokens()
    a, b = ours(ids), theirs(ids).logits
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    for logits in (a, b):
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    grads = {name.removeprefix("base_model.model.").removesuffix(".weight"): p.grad for name, p in theirs.named_parameters()
             if p.requires_grad}
    mine = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert grads.keys() == mine.keys()
    scale = max(float(g.abs().max()) for g in grads.values())
    for name, g in grads.items():
        assert (mine[name] - g).abs().max() <= 1e-5 * max(scale, 1), name


@pytest.mark.parametrize("kind", [*KINDS, "whole", "whole, tied"])
def test_folders_go_to_peft_and_back_bit_for_bit(bases, kind, tmp_path):
    from peft import PeftModel
    ours, theirs = bases(tie_word_embeddings="tied" in kind)
    whole = ["embed_tokens", "lm_head"] if "whole" in kind else []
    shaken(apply_lora(ours, LoRAConfig(r=4, rank_pattern={"k_proj": 2}, modules_to_save=whole, **KINDS.get(kind, {}))))
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "ours")
    assert (ours(tokens()) - theirs(tokens()).logits).abs().max() <= 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    (_, a), (_, b) = read_peft(tmp_path / "ours"), read_peft(tmp_path / "theirs")
    assert same(a, b)
    again = load_adapter(tiny(torch.float32, tie_word_embeddings="tied" in kind), tmp_path / "theirs")
    assert same(weights(ours), weights(again)) and torch.equal(ours(tokens()), again(tokens()))


def test_a_folder_that_peft_made_by_itself(bases, tmp_path):
    import peft
    ours, theirs = bases()
    config = peft.LoraConfig(r=3, lora_alpha=10, target_modules="all-linear", use_rslora=True, init_lora_weights=False,
                             task_type="CAUSAL_LM", layers_to_transform=None, lora_dropout=0.1)
    theirs = peft.get_peft_model(theirs, config)
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    assert {path for path in adapted(ours)} == {f"model.layers.{i}.{name}" for i in range(2) for name in LINEAR}
    assert (ours.eval()(tokens()) - theirs.eval()(tokens()).logits).abs().max() <= 1e-4
    told, trainable = parameter_report(ours), theirs.get_nb_trainable_parameters()
    assert (told["trainable"], told["total"]) == trainable


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_transformers_takes_our_layers(bases, kind, tmp_path):
    """Not only model.py's: on the very same base our layers compute what PEFT's do, and all-linear leaves out its head."""
    from peft import PeftModel
    _, base = bases()
    ids, twin = tokens(), copy.deepcopy(base)
    shaken(apply_lora(base, LoRAConfig(r=4, **KINDS[kind])))
    assert {path for path in adapted(base)} == {f"model.layers.{i}.{name}" for i in range(2) for name in LINEAR}
    save_adapter(base, tmp_path)
    assert torch.allclose(base(ids).logits, PeftModel.from_pretrained(twin, tmp_path)(ids).logits, rtol=1e-5, atol=1e-5)


def test_merged_weights_equal_peft_s(bases, tmp_path):
    from peft import PeftModel
    ours, theirs = bases()
    shaken(apply_lora(ours, LoRAConfig(r=4, use_dora=True)))
    save_adapter(ours, tmp_path)
    theirs = dict(PeftModel.from_pretrained(theirs, tmp_path).merge_and_unload().named_parameters())
    for name, p in merge_lora(ours, final=True).named_parameters():
        assert torch.allclose(p, theirs[name], rtol=0, atol=1e-6), name
