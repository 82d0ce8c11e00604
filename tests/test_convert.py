"""Real models in and out: the reference ids and logits of stories260K, and each format read back bit for bit."""

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import convert
import evaluate
from checkpoint import find_checkpoint, save_model
from convert import (half_split, interleaved, load_pretrained, load_pretrained_tokenizer, save_pretrained,
                     write_llama2c, write_model_gguf)
from data.gguf_file import GGUFTensor, KINDS, dequantize, quantize, read_gguf, write_gguf
from data.tokenizer import (CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, QWEN2_PATTERN, SMOLLM_PATTERN, BPETokenizer, CharTokenizer,
                            load_tokenizer)
from generate import generate
from model import CausalLM, ModelConfig, apply_rope, rope_tables
from tensor_files import read_safetensors, write_safetensors

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {
    "llama": dict(num_key_value_heads=2),
    "llama, tied": dict(tie_word_embeddings=True, num_key_value_heads=1),
    "llama, biases, own head_dim and theta": dict(attention_bias=True, head_dim=16, rope_theta=500000.0),
    "mistral, window": dict(model_type="mistral", sliding_window=5),
    "qwen2": dict(attention_bias=True, model_type="qwen2", num_key_value_heads=2),
    "qwen2, window": dict(attention_bias=True, model_type="qwen2", sliding_window=5),
    "qwen3": dict(qk_norm=True, model_type="qwen3", head_dim=16, num_key_value_heads=2, rms_norm_eps=1e-6),
    "mixtral": dict(num_experts=4, num_key_value_heads=2),
    "mixtral, window": dict(num_experts=3, num_experts_per_tok=1, sliding_window=7),
    "qwen3_moe": dict(qk_norm=True, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32, rms_norm_eps=1e-6),
    "llama, linear": dict(rope_scaling={"rope_type": "linear", "factor": 2.5}),
    "llama, yarn": dict(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    "llama, yarn with settings": dict(rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0, "beta_slow": 2.0,
        "attention_factor": 1.5}),
    "llama, llama3": dict(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                        "original_max_position_embeddings": 32}, rope_theta=500000.0, num_key_value_heads=2),
    "qwen3, yarn": dict(qk_norm=True, rope_scaling={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}),
}


def tiny(seed=0, dtype=torch.float32, **shape) -> CausalLM:
    """A model whose biases and norms are no constants."""
    model = CausalLM(ModelConfig(**(dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                         num_attention_heads=4, max_position_embeddings=64, eos_token_id=2) | shape)), seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) / 4)
    return model.to(dtype).eval()


def same_weights(a: CausalLM, b: CausalLM) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(p.dtype == theirs[n].dtype and torch.equal(p, theirs[n]) for n, p in ours.items())


def same_model(a: CausalLM, b: CausalLM) -> bool:
    ids = torch.randint(0, a.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return same_weights(a, b) and torch.equal(a(ids), b(ids))


def fuzz(n=200) -> list[str]:
    rng = random.Random(0)
    parts = ["Once upon a time", " the", "there's", "  ", "\n\n", "é", "中文", "😀", "123456", "!?", "<|endoftext|>", "a", "\t"]
    return ["".join(rng.choices(parts, k=rng.randint(0, 8))) for _ in range(n)]


# ----------------------------------------------------------------------------------------------------------- stories260K


@pytest.fixture(scope="module")
def stories(shared_data) -> Path:
    return shared_data / "checkpoints" / "stories260K"


@pytest.fixture(scope="module")
def reference(stories) -> dict:
    return json.loads((stories / "reference_float64.json").read_text())


@pytest.mark.parametrize("file", ["stories260K.bin", "stories260K_v1.bin"])
def test_stories260k_says_and_thinks_what_the_reference_does(stories, reference, file):
    model, tokenizer = load_pretrained(stories / file), load_pretrained_tokenizer(stories / file)
    with torch.no_grad():
        logits = model(torch.tensor([reference["greedy_ids"][:64]]))[0]
    assert (logits - torch.tensor(reference["logits_for_first_64_ids"])).abs().max() <= 1e-4
    said = generate(model, [[1]], max_new_tokens=255, temperature=0.0, stop_token_ids=())[0]
    assert [1, *said][-256:] == reference["greedy_ids"]
    assert tokenizer.decode(reference["greedy_ids"]) == reference["greedy_text"]
    assert [1, *tokenizer.encode(reference["greedy_text"].strip())] == reference["greedy_ids"]


def test_stories260k_goes_through_every_format_and_comes_back_bit_for_bit(stories, reference, tmp_path):
    origin = stories / "stories260K.bin"
    flags = [("hf", origin, "folder"), ("gguf", tmp_path / "folder", "x.gguf"), ("hf", tmp_path / "x.gguf", "again"),
             ("llama2c", tmp_path / "again", "stories260K.bin")]
    for form, model, out in flags:
        convert.main(["--model", str(model), "--out", str(tmp_path / out), "--format", form])
        assert same_weights(load_pretrained(origin), load_pretrained(tmp_path / out)), out
        tokenizer = load_pretrained_tokenizer(tmp_path / out)
        assert tokenizer.encode(reference["greedy_text"].strip()) == reference["greedy_ids"][1:], out
        assert tokenizer.bos_token_id == tokenizer.eos_token_id == 1  # <s> is what its training put between texts
    assert (tmp_path / "stories260K.bin").read_bytes() == origin.read_bytes()
    assert (tmp_path / "tokenizer.bin").read_bytes() == (stories / "tok512.bin").read_bytes()
    write_llama2c(tmp_path / "v1.bin", load_pretrained(tmp_path / "again"), version=1)
    assert (tmp_path / "v1.bin").read_bytes() == (stories / "stories260K_v1.bin").read_bytes()


def test_a_folder_of_several_files_becomes_one_of_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        save_model(folder, tiny())
    tensors = dict(read_safetensors(parts / "model.safetensors"))
    weight_map = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        write_safetensors(parts / file, {name: t for name, t in tensors.items() if weight_map[name] == file})
    (parts / "model.safetensors").unlink()
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert.main(["--model", str(parts), "--out", str(tmp_path / "one"), "--format", "hf"])
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_its_loss_on_tinystories(stories, shared_data, tmp_path, capsys, monkeypatch):
    """Published is 1.297 on TinyStories' first version; these ten stories are of the second, by GPT-4, and longer words."""
    convert.main(["--model", str(stories / "stories260K.bin"), "--out", str(tmp_path / "hf"), "--format", "hf"])
    data = shared_data / "tinystories/cs336_tinystories_sample.txt"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(tmp_path / "hf"), "--data", str(data)])
    capsys.readouterr()
    evaluate.main()
    assert 1.2 < json.loads(capsys.readouterr().out)["loss"] < 1.7


LLAMA_CPP = """
import json, sys, urllib.request, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.warmup, p.cpuparams.n_threads = sys.argv[1], 512, False, 1
p.cache_type_k = p.cache_type_v = p.flash_attn_type = 0  # float32 keys and values, and no rounding of them by fused attention
server = xllamacpp.Server(p)
body = {"prompt": json.loads(sys.argv[2]), "n_predict": int(sys.argv[3]), "temperature": 0, "top_k": 1, "ignore_eos": True,
        "return_tokens": True}
request = urllib.request.Request(server.listening_address.rstrip("/") + "/completion", json.dumps(body).encode(),
                                 {"Content-Type": "application/json"})
answer = json.loads(urllib.request.urlopen(request).read())
print("answer", json.dumps([answer["tokens_evaluated"], answer["tokens"]]))
"""


def said_by_llama_cpp(path, prompt, n: int) -> tuple[int, list[int]]:
    """(tokens of the prompt, the n tokens that follow it greedily), by a build from PyPI in a process of its own."""
    pytest.importorskip("xllamacpp", reason="llama.cpp (the xllamacpp package) is not installed")
    done = subprocess.run([sys.executable, "-c", LLAMA_CPP, str(path), json.dumps(prompt), str(n)], capture_output=True, text=True)
    assert "answer" in done.stdout, done.stderr[-2000:]
    return json.loads(next(line[7:] for line in done.stdout.splitlines() if line.startswith("answer ")))


def test_llama_cpp_says_what_the_reference_says(stories, reference, tmp_path):
    convert.main(["--model", str(stories / "stories260K.bin"), "--out", str(tmp_path / "x.gguf"), "--format", "gguf"])
    assert said_by_llama_cpp(tmp_path / "x.gguf", [1], 255) == [1, reference["greedy_ids"][1:]]


@pytest.mark.parametrize("family", [family for family in FAMILIES if "window" not in family])  # it has none in these
def test_llama_cpp_cuts_texts_and_continues_them_as_we_do(family, tmp_path):
    pattern = {"qwen2": QWEN2_PATTERN, "qwen3": CL100K_PATTERN}.get(family, GPT2_PATTERN)
    model, tokenizer = tiny(initializer_range=0.2, eos_token_id=None, **FAMILIES[family]), BPETokenizer.train(fuzz(), 300, pattern=pattern)
    text = "Once upon a time there's 123 dogs,\n\n  and 中文"
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
    write_model_gguf(tmp_path / "x.gguf", model, tokenizer)
    ours = generate(model, [ids], max_new_tokens=20, temperature=0.0, stop_token_ids=())[0]
    assert said_by_llama_cpp(tmp_path / "x.gguf", text, 20) == [len(ids), ours]
    if scaling := model.config.rope_scaling:  # and the scaling matters to these 20 tokens
        plain = tiny(initializer_range=0.2, **FAMILIES[family] | {"rope_scaling": None})
        assert generate(plain, [ids], max_new_tokens=20, temperature=0.0, stop_token_ids=())[0] != ours, scaling


# ---------------------------------------------------------------------------------------------------------------- orders


def test_rows_are_reordered_as_the_docstring_draws_it():
    rows = torch.arange(8)[:, None]
    assert interleaved(rows, 1).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    two = interleaved(torch.arange(16), 2)  # biases too, head by head
    assert two.tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert torch.equal(half_split(two, 2), torch.arange(16))


def test_interleaved_rope_on_reordered_rows_gives_the_same_scores():
    """Meta's RoPE: numbers 2i and 2i + 1 are a complex number, turned by position * theta^(-2i / D)."""
    H, D, S = 3, 8, 5
    generator = torch.Generator().manual_seed(0)
    x, wq, wk = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((S, 16), (H * D, 16), (H * D, 16)))
    cos, sin = rope_tables(torch.arange(S)[None], D, 10000.0, torch.float64)
    q, k = apply_rope((x @ wq.T).view(1, S, H, D), (x @ wk.T).view(1, S, H, D), cos, sin)
    ours = torch.einsum("bshd,bthd->hst", q, k)
    turn = torch.polar(torch.ones(S, D // 2, dtype=torch.float64),
                       torch.outer(torch.arange(S).double(), 10000.0 ** (-torch.arange(0, D, 2).double() / D)))

    def meta(w):
        pairs = torch.view_as_complex((x @ interleaved(w, H).T).view(S, H, D // 2, 2)) * turn[:, None]
        return torch.view_as_real(pairs).flatten(2)

    assert (torch.einsum("shd,thd->hst", meta(wq), meta(wk)) - ours).abs().max() < 1e-12


# ------------------------------------------------------------------------------------------------------------------ GGUF


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gguf_gives_every_family_back_bit_for_bit(family, dtype, tmp_path):
    model = tiny(dtype=dtype, **FAMILIES[family])
    write_model_gguf(tmp_path / "x.gguf", model)
    back = load_pretrained(tmp_path / "x.gguf")
    assert same_model(model, back)
    expected = model.config.to_hf()
    assert {k: v for k, v in back.config.to_hf().items() if k not in ("eos_token_id", "attention_dropout")} == {
        k: v for k, v in expected.items() if k not in ("eos_token_id", "attention_dropout")}
    arch = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe"}.get(model.config.model_type, model.config.model_type)
    assert read_gguf(tmp_path / "x.gguf")[0]["general.architecture"] == arch


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K"])
def test_quantized_matrices_are_those_of_the_format_and_the_rest_is_float32(kind, tmp_path):
    model = tiny(hidden_size=256, intermediate_size=176, tie_word_embeddings=True, num_key_value_heads=2)
    write_model_gguf(tmp_path / "x.gguf", model, kind=kind)
    back, tensors = dict(load_pretrained(tmp_path / "x.gguf").named_parameters()), read_gguf(tmp_path / "x.gguf")[1]
    for name, p in model.named_parameters():
        its = "F32" if p.dim() < 2 else "F16" if "down_proj" in name else "Q8_0" if "embed" in name else kind
        assert tensors[convert.gguf_name(name)].kind == its, name  # 176 is no multiple of 32
        weight, heads = p.detach(), {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        weight = interleaved(weight, heads) if heads else weight  # blocks run along rows, so order does not matter
        data = quantize(its, weight.numpy().reshape(-1, KINDS[its][1]))
        expected = torch.from_numpy(dequantize(GGUFTensor(its, tuple(p.shape), data)))
        assert torch.equal(back[name], half_split(expected, heads) if heads else expected), name


def test_the_gguf_package_reads_it(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    from gguf.quants import dequantize as theirs
    tokenizer = BPETokenizer.train(fuzz(), 300)
    for kind in ("F32", "BF16", "F16", "Q8_0", "Q4_0", "Q4_K"):
        write_model_gguf(path := tmp_path / f"{kind}.gguf", tiny(hidden_size=256, num_key_value_heads=2), tokenizer, kind)
        reader, ours = gguf.GGUFReader(path), read_gguf(path)
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        names = {known.get_name(name, (".weight", ".bias")) for name, _ in tiny().named_parameters()}
        assert {tensor.name.removesuffix(".weight") for tensor in reader.tensors} == {n.removesuffix(".weight") for n in names}
        for tensor in reader.tensors:
            assert np.array_equal(theirs(tensor.data, tensor.tensor_type), dequantize(ours[1][tensor.name])), tensor.name
        for key, value in ours[0].items():
            found = reader.get_field(key).contents()
            assert found == value or found == pytest.approx(value), key


def test_routers_stay_float32_and_experts_fall_back_by_their_rows(tmp_path):
    model = tiny(hidden_size=256, intermediate_size=96, num_experts=3, num_key_value_heads=2)
    write_model_gguf(tmp_path / "x.gguf", model, kind="Q4_K")
    tensors = read_gguf(tmp_path / "x.gguf")[1]
    assert tensors["blk.0.ffn_gate_inp.weight"].kind == "F32"
    assert (tensors["blk.0.ffn_up_exps.weight"].kind, tensors["blk.0.ffn_up_exps.weight"].shape) == ("Q4_K", (3, 96, 256))
    assert (tensors["blk.0.ffn_down_exps.weight"].kind, tensors["blk.0.ffn_down_exps.weight"].shape) == ("Q8_0", (3, 256, 96))


def test_rope_freqs_by_hand(tmp_path):
    """Llama 3.1: wavelengths beyond 8192 / 1 are stretched eightfold, those below 8192 / 4 stay, between a ramp."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    model = tiny(hidden_size=512, rope_theta=500000.0, rope_scaling=scaling, max_position_embeddings=131072)  # head_dim 128
    write_model_gguf(tmp_path / "x.gguf", model)
    metadata, tensors = read_gguf(tmp_path / "x.gguf")
    found = dequantize(tensors["rope_freqs.weight"])
    for i, divisor in enumerate(found):
        wavelength = 2 * np.pi * 500000.0 ** (2 * i / 128)
        if wavelength < 2048 or wavelength > 8192:
            assert divisor == pytest.approx(1 if wavelength < 2048 else 8, rel=1e-6)
        else:
            smooth = (8192 / wavelength - 1) / 3
            assert divisor == pytest.approx(1 / ((1 - smooth) / 8 + smooth), rel=1e-5)
    assert set(found[:28]) == {1.0} and min(found[-20:]) == 8.0
    del metadata["glassbox.rope_scaling"]  # as other programs write it
    write_gguf(tmp_path / "y.gguf", metadata, {n: (t.kind, t.shape, lambda t=t: dequantize(t)) for n, t in tensors.items()})
    assert load_pretrained(tmp_path / "y.gguf").config.rope_scaling == scaling


@pytest.mark.parametrize("shape, complaint", [
    (dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "has no counterpart in llama.cpp's 'llama'"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0, "truncate": False}), "has no counterpart"),
    (dict(qk_norm=True, rope_scaling={"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
     "no counterpart in llama.cpp's 'qwen3'"),
    (dict(qk_norm=True, num_experts=4, norm_topk_prob=False), "the model has norm_topk_prob=False"),
    (dict(qk_norm=True, num_experts=4, mlp_only_layers=[0]), r"mlp_only_layers=\[0\]"),
    (dict(position_embedding_type="alibi"), "model_type 'glassbox' is not supported in GGUF"),
], ids=str)
def test_models_that_llama_cpp_would_compute_differently_are_refused(shape, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        write_model_gguf(tmp_path / "x.gguf", tiny(**shape))
    assert not list(tmp_path.iterdir())


def test_float64_is_written_as_float32_and_dtype_and_attention_are_taken(tmp_path):
    model = tiny(dtype=torch.float64)
    write_model_gguf(tmp_path / "x.gguf", model)
    assert same_weights(load_pretrained(tmp_path / "x.gguf"), tiny())
    half = load_pretrained(tmp_path / "x.gguf", dtype=torch.bfloat16, attention="eager")
    assert half.config.attention == "eager" and {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_several_ends_of_text_and_a_vocabulary_larger_than_the_tokenizer(tmp_path):
    tokenizer = BPETokenizer.train(fuzz(), 280, special_tokens=["<|endoftext|>", "<|im_end|>"])
    model = tiny(eos_token_id=[tokenizer.special_tokens["<|im_end|>"], tokenizer.eos_token_id])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    write_model_gguf(tmp_path / "x.gguf", model, tokenizer)
    metadata = read_gguf(tmp_path / "x.gguf")[0]
    assert len(metadata["tokenizer.ggml.tokens"]) == len(metadata["tokenizer.ggml.token_type"]) == 300
    assert sorted(load_pretrained(tmp_path / "x.gguf").config.eos_token_id) == sorted(model.config.eos_token_id)
    back = load_pretrained_tokenizer(tmp_path / "x.gguf")
    assert back.vocab_size == tokenizer.vocab_size and back.chat_template == tokenizer.chat_template
    assert back.special_tokens == tokenizer.special_tokens and back.bos_token_id == tokenizer.bos_token_id


# ------------------------------------------------------------------------------------------------------------ tokenizers


@pytest.mark.parametrize("pre, pattern", [("gpt-2", GPT2_PATTERN), ("llama-bpe", CL100K_PATTERN), ("qwen2", QWEN2_PATTERN),
                                          ("gpt-4o", O200K_PATTERN), ("smollm", SMOLLM_PATTERN)])
def test_byte_level_tokenizers_travel_in_gguf(pre, pattern, tmp_path):
    tokenizer = BPETokenizer.train(fuzz(), 300, pattern=pattern)
    write_model_gguf(tmp_path / "x.gguf", tiny(), tokenizer)
    assert read_gguf(tmp_path / "x.gguf")[0]["tokenizer.ggml.pre"] == pre
    back = load_pretrained_tokenizer(tmp_path / "x.gguf")
    assert all(back.encode(text) == tokenizer.encode(text) for text in fuzz())
    assert back.encode("a<|endoftext|>", "all") == tokenizer.encode("a<|endoftext|>", "all")
    assert back.decode(tokenizer.encode("é中")) == "é中"


@pytest.mark.parametrize("name", ["gpt2/tokenizer.json", "minimind/tokenizer.json", "tiktoken/r50k_base.tiktoken",
                                  "mistral/tokenizer.model.v1", "torchtune/m.model"])
def test_published_tokenizers_travel_in_gguf(name, shared_data, tmp_path):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    model = tiny(vocab_size=tokenizer.vocab_size, hidden_size=8, num_attention_heads=1, eos_token_id=None)
    try:
        write_model_gguf(tmp_path / "x.gguf", model, tokenizer)
    except ValueError as error:
        assert "another kind than BPE" in str(error) and name.startswith("torchtune")  # a unigram model
        return
    back = load_pretrained_tokenizer(tmp_path / "x.gguf")
    assert back.vocab_size == tokenizer.vocab_size and back.special_tokens == tokenizer.special_tokens
    for text in fuzz() + ["naïve café", "The quick brown fox's 1234 jumps\n\n  over"]:
        assert back.encode(text) == tokenizer.encode(text), text


def test_tokenizers_without_a_counterpart_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no split pattern .*characters.*supported: gpt-2, llama-bpe"):
        write_model_gguf(tmp_path / "x.gguf", tiny(), CharTokenizer.train(["abc"]))
    with pytest.raises(ValueError, match=r"splits by '\.\|\\\\n'; llama.cpp knows"):
        write_model_gguf(tmp_path / "x.gguf", tiny(), BPETokenizer.train(["abc"], 270, pattern=r".|\n"))
    with pytest.raises(ValueError, match="the tokenizer has 300 tokens, the model 280"):
        write_model_gguf(tmp_path / "x.gguf", tiny(vocab_size=280), BPETokenizer.train(fuzz(), 300))
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- folders, flags


def test_a_run_a_folder_and_a_dtype(tmp_path):
    model, tokenizer = tiny(), BPETokenizer.train(fuzz(), 300)
    save_pretrained(model, tmp_path / "a", tokenizer)
    assert same_model(model, load_pretrained(tmp_path / "a")) and find_checkpoint(tmp_path / "a") == tmp_path / "a"
    assert load_pretrained_tokenizer(tmp_path / "a").encode("the time") == tokenizer.encode("the time")
    (tmp_path / "empty").mkdir()
    convert.main(["--model", str(tmp_path / "a"), "--out", str(tmp_path / "empty"), "--format", "hf", "--dtype", "bfloat16"])
    assert same_weights(load_pretrained(tmp_path / "empty"), tiny(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="a exists and is not empty"):
        save_pretrained(model, tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty"]


def test_untied_llama2c_of_both_versions(tmp_path):
    for version in (0, 1):
        model = tiny(num_key_value_heads=2)
        write_llama2c(tmp_path / "x.bin", model, version)
        assert struct.unpack_from("<i", (tmp_path / "x.bin").read_bytes(), 28 if version else 20)[0] == (300 if version else -300)
        assert same_model(model, load_pretrained(tmp_path / "x.bin")) and load_pretrained_tokenizer(tmp_path / "x.bin") is None


@pytest.mark.parametrize("shape", [dict(rms_norm_eps=1e-6), dict(rope_theta=5e5), dict(head_dim=32), dict(attention_bias=True),
                                   dict(model_type="mistral", sliding_window=5), dict(qk_norm=True, model_type="qwen3")], ids=str)
def test_llama2c_refuses_what_its_code_does_not_compute(shape, tmp_path):
    with pytest.raises(ValueError, match="llama2.c knows only"):
        write_llama2c(tmp_path / "x.bin", tiny(**shape))
    assert not list(tmp_path.iterdir())


def damaged(tmp_path, change) -> Path:
    """A GGUF of a tiny model after `change(metadata, tensors)`."""
    write_model_gguf(tmp_path / "x.gguf", tiny(hidden_size=32, vocab_size=290), BPETokenizer.train(fuzz(), 290))
    metadata, tensors = read_gguf(tmp_path / "x.gguf")
    change(metadata, tensors)
    write_gguf(tmp_path / "y.gguf", metadata, {n: (t.kind, t.shape, lambda t=t: dequantize(t)) for n, t in tensors.items()})
    return tmp_path / "y.gguf"


@pytest.mark.parametrize("change, complaint", [
    (lambda m, t: m.update({"general.architecture": "mamba"}), "architecture 'mamba' is not supported; supported: llama, qwen2"),
    (lambda m, t: m.pop("general.architecture"), "architecture None is not supported"),
    (lambda m, t: t.pop("blk.1.attn_k.weight"), "missing tensors: model.layers.1.self_attn.k_proj.weight"),
    (lambda m, t: t.pop("token_embd.weight"), "missing tensors: token_embd.weight"),
    (lambda m, t: t.update({"blk.1.attn_q_norm.weight": t["output_norm.weight"]}), "unknown tensors: model.layers.1.self_attn.q_norm"),
    (lambda m, t: t.update({"blk.0.odd.weight": t["output_norm.weight"]}), "unknown tensors: blk.0.odd.weight"),
    (lambda m, t: t.update({"output_norm.weight": t["blk.0.attn_q.weight"]}), r"model.norm.weight is \[32, 32\], but \[32\] by"),
    (lambda m, t: m.update({"llama.block_count": 1 << 31}), "block_count is 2147483648, but it has 2 blocks"),
    (lambda m, t: m.update({"llama.expert_count": 8, "llama.expert_used_count": 2}), "missing tensors: model.layers.0.mlp.exp"),
    (lambda m, t: m.update({"llama.expert_weights_scale": 2.5}), "llama.expert_weights_scale = 2.5 is not supported"),
    (lambda m, t: m.update({"llama.rope.scaling.type": "longrope"}), "rope scaling 'longrope' is not supported; supported"),
    (lambda m, t: m.update({"llama.rope.scaling.type": "linear"}), "rope scaling 'linear': factor is None"),
    (lambda m, t: m.update({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": "x"}), "factor is 'x'"),
    (lambda m, t: t.update({"rope_freqs.weight": t["blk.0.attn_norm.weight"]}), "rope_freqs.weight is not the llama3 scaling"),
    (lambda m, t: m.update({"llama.attention.value_length": 4}), "llama.attention.value_length is 4, but head_dim is 8"),
    (lambda m, t: m.update({"llama.feed_forward_length": [96, 96]}), "no model can be built from its header"),
    (lambda m, t: m.pop("llama.embedding_length"), "hidden_size must be given"),
    (lambda m, t: m.update({"llama.attention.head_count": 0, "llama.attention.head_count_kv": 0}), "num_attention_heads is 0"),
])
def test_malformed_gguf_models_are_refused_in_one_line(change, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        load_pretrained(damaged(tmp_path, change))


@pytest.mark.parametrize("change, complaint", [
    ({"tokenizer.ggml.model": "t5"}, "tokenizer 't5' is not supported"),
    ({"tokenizer.ggml.pre": "bloom"}, "split pattern 'bloom' is unknown here; known: gpt-2"),
    ({"tokenizer.ggml.merges": ["a"]}, "its tokenizer cannot be read: .*merge 0"),
    ({"tokenizer.ggml.tokens": 5}, "its tokenizer cannot be read"),
    ({"tokenizer.ggml.model": "llama"}, "its tokenizer cannot be read"),
    ({"tokenizer.ggml.token_type": "x"}, "its tokenizer cannot be read"),
])
def test_malformed_gguf_tokenizers_are_refused_in_one_line(change, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        load_pretrained_tokenizer(damaged(tmp_path, lambda m, t: m.update(change)))


def test_files_that_are_no_models_are_refused(tmp_path):
    write_llama2c(tmp_path / "x.bin", tiny())
    data = (tmp_path / "x.bin").read_bytes()
    for content, complaint in ((data[:-1], "truncated?"), (data + b"\0" * 4, "has [0-9,]+ bytes, the file"), (data[:20], "20 bytes"),
                               (b"", "0 bytes"), (b"PK\x03\x04" + data, "is pickle"), (b"\x80\x02}" + data, "is pickle"),
                               (b"Once upon a time there was a text in a file", "not a llama2.c model"),
                               (struct.pack("<Ii", 0x616B3432, 2) + bytes(300), "version 2 is not supported")):
        (tmp_path / "y.bin").write_bytes(content)
        with pytest.raises(ValueError, match=complaint):
            load_pretrained(tmp_path / "y.bin")
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="is pickle, .*save_pretrained"):
        load_pretrained(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="nowhere.gguf: no such file or folder"):
        load_pretrained(tmp_path / "nowhere.gguf")
    (tmp_path / "tokenizer.bin").write_bytes(b"\5\0\0\0broken")
    with pytest.raises(ValueError, match="tokenizer.bin: not a llama2.c tokenizer"):
        load_pretrained_tokenizer(tmp_path / "x.bin")


@pytest.mark.parametrize("flags, complaint", [
    (["--format", "hf", "--out", "full"], "--out full: is not empty"),
    (["--format", "gguf", "--out", "full"], "--out full: is a folder; name the file to write"),
    (["--format", "gguf", "--out", "full/a"], "full/a exists already"),
    (["--format", "llama2c", "--out", "here/model.bin"], "tokenizer.bin exists already"),
    (["--format", "hf", "--out", "new", "--quantize", "q8_0"], "only --format gguf is quantized"),
    (["--format", "gguf", "--out", "new", "--dtype", "float16"], "only for --format hf"),
    (["--format", "onnx", "--out", "new"], "--format"),
])
def test_flags_that_cannot_work_are_refused_before_anything_is_read(flags, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("full/a", "here/tokenizer.bin"):
        Path(file).parent.mkdir()
        Path(file).write_text("x")
    with pytest.raises(ValueError, match=complaint):
        convert.main(["--model", "nowhere", *flags])


def test_a_failed_conversion_leaves_nothing_and_exits_with_2(tmp_path):
    save_pretrained(tiny(), tmp_path / "m", CharTokenizer.train(["abc"]))
    done = subprocess.run([sys.executable, str(ROOT / "convert.py"), "--model", str(tmp_path / "m"), "--out", str(tmp_path / "x.gguf"),
                           "--format", "gguf"], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_disk_that_fails_in_the_middle_leaves_no_folder(tmp_path, monkeypatch):
    def fails(folder, model, tokenizer):
        save_model(folder, model)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "save_model", fails)
    with pytest.raises(OSError):
        save_pretrained(tiny(), tmp_path / "a")
    assert not list(tmp_path.iterdir())
