"""data/quantized_files.py: layouts bit by bit, what a folder holds, round trips, and transformers with bitsandbytes."""

import json

import pytest
import torch

from calibrate import calibrate, save_quantized
from checkpoint import load_model, read_safetensors, save_model
from data.quantized_files import (awq_tensors, encode, gptq_tensors, install, pack_awq, pack_words, read_awq, read_gptq,
                                  unpack_awq, unpack_words)
from model import CausalLM, ModelConfig
from quant import Int4Linear, NF4Linear, quantize_model

TOKENS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def tiny(**changes) -> CausalLM:
    shape = dict(vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=128)
    return CausalLM(ModelConfig(**shape | changes)).eval()


def codes_of(bits: int, *shape) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits))


def reopen(folder) -> CausalLM:
    """As a loader does it: the shapes, then the quantized layers, then the rest."""
    with torch.device("meta"):
        model = tiny()
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    rest = install(model, config, read_safetensors(folder / "model.safetensors"), quantize_model)
    model.load_state_dict(rest, strict=False, assign=True)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_lie_along_k_the_first_in_the_lowest_bits(bits):
    codes, per_word = codes_of(bits, 64, 3), 32 // bits
    words = pack_words(codes, bits)
    for i in range(64):
        for j in range(3):
            assert words[i // per_word, j].item() >> bits * (i % per_word) & 2**bits - 1 == codes[i, j]
    assert words.dtype == torch.int32 and torch.equal(unpack_words(words, bits).long(), codes)


def test_three_bits_fill_three_words_with_32_codes():
    """Written out as AutoGPTQ's kernels read it: ten codes, one across the border, ten, one across, ten."""
    codes = codes_of(3, 32, 1)
    c = codes[:, 0].tolist()
    first = sum(c[i] << 3 * i for i in range(10)) | (c[10] & 3) << 30
    second = c[10] >> 2 | sum(c[11 + i] << 3 * i + 1 for i in range(10)) | (c[21] & 1) << 31
    third = c[21] >> 1 | sum(c[22 + i] << 3 * i + 2 for i in range(10))
    assert [word % 2**32 for word in pack_words(codes, 3)[:, 0].tolist()] == [first, second, third]
    assert torch.equal(unpack_words(pack_words(codes, 3), 3).long(), codes)


def test_awq_nibbles_stand_in_the_order_0_2_4_6_1_3_5_7():
    codes = codes_of(4, 3, 16)
    words = pack_awq(codes)
    for k in range(3):
        for w in range(2):
            for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                assert words[k, w].item() >> 4 * i & 15 == codes[k, 8 * w + column]
    assert torch.equal(unpack_awq(words).long(), codes)


@pytest.mark.parametrize("version, stored", [(1, -1), (2, 0)])
def test_version_1_stores_zero_minus_1(version, stored):
    codes, scale, zero = codes_of(4, 32, 64), torch.rand(32, 2).half(), codes_of(4, 32, 2).clamp_min(1)
    tensors = gptq_tensors(codes, scale, zero, torch.arange(64) // 32, 4, version)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"qweight": (8, 32), "qzeros": (2, 4),
                                                                      "scales": (2, 32), "g_idx": (64,)}
    assert tensors["qzeros"][1, 0].item() >> 12 & 15 == zero[3, 1] + stored  # group 1, column 3
    for ours, theirs in zip(read_gptq(tensors, 4, version), (codes, scale, zero, torch.arange(64) // 32)):
        assert torch.equal(ours.float(), theirs.float())


def test_a_zero_point_of_0_needs_version_2():
    """Readers of version 1 mask the stored zero and then add 1: 0 would come back as 16."""
    parts = codes_of(4, 32, 32), torch.ones(32, 1), torch.zeros(32, 1), torch.zeros(32)
    with pytest.raises(ValueError, match="take gptq_v2"):
        gptq_tensors(*parts, 4)
    assert torch.equal(read_gptq(gptq_tensors(*parts, 4, 2), 4, 2)[2], torch.zeros(32, 1, dtype=torch.int32))
    layer = torch.nn.Sequential(Int4Linear(torch.rand(32, 32) + 1, group_size=32, bits=4))  # all positive: zero is 0
    assert encode(layer)[1]["checkpoint_format"] == "gptq_v2"


def test_awq_tensors_come_back():
    parts = codes_of(4, 32, 64), torch.rand(32, 2).half(), codes_of(4, 32, 2)
    for ours, theirs in zip(read_awq(awq_tensors(*parts)), parts):
        assert torch.equal(ours.float(), theirs.float())


# -------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("method, settings, format, stored", [
    ("nf4", {}, "auto", "bitsandbytes"), ("nf4", dict(double_quant=False), "auto", "bitsandbytes"),
    ("fp4", dict(block_size=128), "auto", "bitsandbytes"), ("int8", {}, "auto", "bitsandbytes"),
    ("w8a8", {}, "auto", "bitsandbytes"), ("llm.int8", {}, "auto", "bitsandbytes"), ("fp8", {}, "auto", "fbgemm_fp8"),
    ("int4", dict(group_size=32), "auto", "gptq"), ("int4", dict(group_size=32, symmetric=True), "gptq", "gptq"),
    ("int4", dict(group_size=None), "gptq_v2", "gptq"), ("int3", dict(group_size=32), "auto", "gptq"),
    ("int2", dict(group_size=32), "gptq_v2", "gptq"), ("int4", dict(group_size=32), "awq", "awq"),
    ("int4", dict(group_size=64), "auto", "glassbox"), ("nf4", {}, "glassbox", "glassbox"),
    ("fp8", {}, "glassbox", "glassbox"), ("int3", dict(group_size=32), "glassbox", "glassbox")])
def test_a_folder_opens_as_the_model_that_it_was(method, settings, format, stored, tmp_path):
    model = quantize_model(tiny(), method, **settings)
    config = save_quantized(tmp_path / "out", model, None, format)
    assert config["quant_method"] == stored
    with torch.no_grad():
        assert torch.equal(reopen(tmp_path / "out")(TOKENS), model(TOKENS))


def test_act_order_is_kept_in_g_idx(tmp_path):
    model = calibrate(tiny(), TOKENS, "gptq", group_size=32, act_order=True)
    config = save_quantized(tmp_path / "out", model)
    assert config["desc_act"] and config["quant_method"] == "gptq"
    g_idx = read_safetensors(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.down_proj.g_idx"]
    assert not torch.equal(g_idx, g_idx.sort().values) and g_idx.bincount().tolist() == [32] * 5
    with torch.no_grad():
        assert torch.equal(reopen(tmp_path / "out")(TOKENS), model(TOKENS))


def test_4_127_bits_per_parameter_are_counted_on_the_file(tmp_path):
    model = quantize_model(tiny(hidden_size=512, intermediate_size=1024, num_hidden_layers=1), "nf4")
    save_quantized(tmp_path / "out", model)
    tensors = read_safetensors(tmp_path / "out" / "model.safetensors")
    stored = [t for name, t in tensors.items() if name.endswith((".weight", ".absmax", ".nested_absmax"))
              and "proj" in name]
    weights = 512 * 512 * 2 + 2 * 512 * 256 + 3 * 512 * 1024
    assert sum(8 * t.numel() * t.element_size() for t in stored) / weights == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize("format, words", [("gptq", "model.layers.0.mlp.gate_proj: 172 x 64 in groups of 64 does not fit a gptq file"),
                                           ("bitsandbytes", "the format of int4 layers must be gptq")])
def test_what_does_not_fit_a_format_is_one_line(format, words):
    with pytest.raises(ValueError, match=words) as error:
        encode(quantize_model(tiny(intermediate_size=172), "int4"), format)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config, tensors, words", [
    ({"quant_method": "hqq"}, {}, "quant_method 'hqq' is not supported; supported: bitsandbytes"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32}, {"a.weight": torch.ones(1)}, "there are no weights of that kind"),
    ({"quant_method": "awq", "bits": 8, "group_size": 32}, {"model.layers.0.mlp.up_proj.qweight": torch.ones(1)}, "awq of 8 bits"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32}, {"model.layers.0.mlp.up_proj.qweight": torch.ones(1)}, "lacks g_idx"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"model.layers.0.mlp.up_proj.weight.absmax": torch.ones(1)},
     "without its quant_state")])
def test_a_folder_of_another_method_is_one_line(config, tensors, words):
    with pytest.raises(ValueError, match=words) as error:
        install(tiny(), config, tensors, quantize_model)
    assert "\n" not in str(error.value)


def test_nothing_quantized_is_nothing_to_write():
    assert encode(tiny()) == ({}, None)


# ---------------------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("method, settings", [("nf4", {}), ("nf4", dict(double_quant=False)), ("fp4", {})])
def test_transformers_opens_the_folder_with_bitsandbytes(method, settings, tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = quantize_model(tiny(intermediate_size=192), method, **settings)
    save_quantized(tmp_path / "out", model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", dtype=torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, NF4Linear):
            weight = theirs.get_submodule(name).weight
            truth = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert (layer.dequantize() - truth).abs().max() <= 1e-6
    with torch.no_grad():  # on a CPU their kernel multiplies in bfloat16
        ours, truth = model(TOKENS), theirs(TOKENS).logits
    assert (ours - truth).norm() < 0.02 * truth.norm()


def test_bitsandbytes_own_folder_opens_here(tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    linear = torch.nn.Linear(64, 64, bias=False)
    theirs = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    tensors = {f"0.{name}": t for name, t in theirs.state_dict().items()}
    model = torch.nn.Sequential(linear)
    rest = install(model, {"quant_method": "bitsandbytes", "load_in_4bit": True}, tensors, quantize_model)
    assert rest == {} and isinstance(model[0], NF4Linear)
    truth = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert (model[0].dequantize() - truth).abs().max() <= 1e-6


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8", "int4", "fp8"])
def test_a_quantized_model_is_saved_and_loaded_like_any_other(method, tmp_path):
    model = CausalLM(ModelConfig(128, 64, 128, 2, 4, 2, tie_word_embeddings=True)).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        full = model(ids)
        rounded = quantize_model(model, method)(ids)
        save_model(tmp_path, model)
        again = load_model(tmp_path)
        assert torch.equal(again(ids), rounded) and not torch.equal(rounded, full)
    kept = {name: tensor for name, tensor in again.state_dict().items() if name in model.state_dict()}
    assert kept.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in kept.items())


@pytest.mark.parametrize("method", ["nf4", "int8", "int4"])
def test_opening_a_folder_keeps_no_second_copy_of_its_codes(tmp_path, method):
    """The embedding as a view of the whole file would keep the codes in memory twice."""
    save_model(tmp_path, quantize_model(tiny(), method))
    model = load_model(tmp_path)
    tensors = [*model.parameters(), *model.buffers()]
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    assert held < 1.02 * sum(t.nbytes for t in {id(t): t for t in tensors}.values())
