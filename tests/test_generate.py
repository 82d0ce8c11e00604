"""Sampling against slow written-out references, the cached batch against one row without cache, text in bits, chat."""

import io
import math
import os
import random
import subprocess
import sys

import pytest
import torch

import checkpoint
import convert
import generate
from data.chat import prepare_tokenizer, read_chats, render, render_prompt, stop_ids
from data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer
from generate import TextStream, generate_text, next_token_probs, penalize_repetition, row_generator, sample_token
from model import CausalLM, ModelConfig

ROOT = os.path.dirname(generate.__file__)


# One step

def log(*probs):
    return torch.tensor(probs, dtype=torch.float64).log()


def close(probs, *expected):
    torch.testing.assert_close(probs, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_temperature():
    close(next_token_probs(log(0.5, 0.3, 0.2)), 0.5, 0.3, 0.2)
    total = 0.5**2 + 0.3**2 + 0.2**2
    close(next_token_probs(log(0.5, 0.3, 0.2), temperature=0.5), 0.5**2 / total, 0.3**2 / total, 0.2**2 / total)
    close(next_token_probs(log(0.5, 0.3, 0.2), temperature=math.inf), 1 / 3, 1 / 3, 1 / 3)


@pytest.mark.parametrize("temperature", [0, 1e-300, 5e-324])
def test_temperature_towards_zero_is_the_argmax(temperature):
    close(next_token_probs(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64), temperature=temperature), 0, 1, 0)


def test_top_k_keeps_exactly_k():
    close(next_token_probs(log(0.2, 0.5, 0.3), top_k=2), 0, 0.625, 0.375)
    close(next_token_probs(log(0.2, 0.5, 0.3), top_k=1), 0, 1, 0)
    close(next_token_probs(log(0.25, 0.25, 0.25, 0.25), top_k=2), 0.5, 0.5, 0, 0)  # among equals the lower ids
    close(next_token_probs(log(0.2, 0.5, 0.3), top_k=9), 0.2, 0.5, 0.3)


def test_top_p_keeps_the_token_that_crosses_p():
    probs = log(0.15, 0.5, 0.05, 0.3)
    close(next_token_probs(probs, top_p=0.01), 0, 1, 0, 0)
    close(next_token_probs(probs, top_p=0.49), 0, 1, 0, 0)
    close(next_token_probs(probs, top_p=0.51), 0, 0.625, 0, 0.375)
    close(next_token_probs(probs, top_p=0.79), 0, 0.625, 0, 0.375)
    close(next_token_probs(probs, top_p=0.81), 0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95)
    close(next_token_probs(torch.zeros(4, dtype=torch.float64), top_p=0.5), 0.5, 0.5, 0, 0)  # 1/4 + 1/4 reaches it


def test_min_p_is_a_share_of_the_largest():
    probs = log(0.15, 0.5, 0.05, 0.3)
    close(next_token_probs(probs, min_p=0.29), 0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95)
    close(next_token_probs(probs, min_p=0.31), 0, 0.625, 0, 0.375)
    close(next_token_probs(probs, min_p=1.0), 0, 1, 0, 0)


def test_top_p_counts_what_top_k_left():
    probs = log(0.5, 0.3, 0.15, 0.05)  # top 3 renormalised: 0.526, 0.316, 0.158
    close(next_token_probs(probs, top_p=0.82), 0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0)
    close(next_token_probs(probs, top_p=0.82, top_k=3), 0.625, 0.375, 0, 0)


def test_top_p_of_one_cuts_nothing_where_rounding_reaches_one():
    logits = torch.tensor([0.0] + [-18.0] * 999)  # float32: the running sum stops growing long before the end
    assert (next_token_probs(logits, top_k=1000) > 0).all()


def slow_probs(logits, temperature, top_k, top_p, min_p):
    """The definition, token by token."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: -weights[i])
    ranked = ranked[:top_k] if top_k else ranked
    total, reached, nucleus = sum(weights[i] for i in ranked), 0.0, []
    for i in ranked:
        if top_p == 1 or reached < top_p:
            nucleus.append(i)
        reached += weights[i] / total
    kept = [i for i in nucleus if weights[i] >= min_p * weights[ranked[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


def test_all_filters_together_against_the_definition():
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(300):
        settings = dict(temperature=rng.choice([0.3, 1.0, 2.0]), top_k=rng.choice([0, 1, 5, 12, 40]),
                        top_p=rng.choice([0.1, 0.5, 0.9, 0.99, 1.0]), min_p=rng.choice([0.0, 0.05, 0.3]))
        logits = 2 * torch.randn(2, 20, dtype=torch.float64, generator=generator)
        expected = [slow_probs(row.tolist(), **settings) for row in logits]
        torch.testing.assert_close(next_token_probs(logits, **settings), torch.tensor(expected, dtype=torch.float64),
                                   atol=1e-12, rtol=0)


def test_half_precision_logits_become_float32_probabilities():
    probs = next_token_probs(torch.randn(3, 50_000).bfloat16(), top_p=0.9)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(-1), torch.ones(3))


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0], [1.0, 2.0, 3.0, 4.0]])
    seen = torch.tensor([[True, True, False, False], [False, False, False, True]])
    expected = torch.tensor([[1.6, -2.5, 2.0, -2.0], [1.0, 2.0, 3.0, 3.2]])
    torch.testing.assert_close(penalize_repetition(logits, seen, 1.25), expected)


def test_draws_follow_the_distribution_and_spare_what_was_cut():
    n = 20_000
    logits = log(0.5, 0.2, 0.2, 0.1).expand(n, 4)
    draws = sample_token(logits, generators=[torch.Generator().manual_seed(1)] * n, top_k=3)
    counts = draws.bincount(minlength=4) / n
    torch.testing.assert_close(counts, torch.tensor([5 / 9, 2 / 9, 2 / 9, 0]), atol=0.015, rtol=0)
    assert counts[3] == 0


def test_rows_have_random_numbers_of_their_own():
    first = {torch.rand(1, generator=row_generator(seed, row)).item() for seed in range(8) for row in range(8)}
    assert len(first) == 64  # (1, 0) is not (0, 1)


# The loop over tokens

def tiny(dtype=torch.float64, **changes):
    """A small model with large random weights, so that its distributions are far from uniform."""
    settings = dict(vocab_size=23, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=40, initializer_range=0.5)
    return CausalLM(ModelConfig(**settings | changes), seed=3).to(dtype)


PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [3, 3, 3], [22, 0, 5, 11, 2]]


@torch.no_grad()
def slow_generate(model, prompt, generator, *, max_new_tokens, temperature=1.0, repetition_penalty=1.0, stop=(),
                  **shape):
    """One row, no cache: the whole text goes through the model for every token."""
    tokens, end = list(prompt), min(len(prompt) + max_new_tokens, model.config.max_position_embeddings)
    while len(tokens) < end and not (len(tokens) > len(prompt) and tokens[-1] in stop):
        logits = model.eval()(torch.tensor([tokens]))[0, -1]
        for token in set(tokens):
            logits[token] *= 1 / repetition_penalty if logits[token] > 0 else repetition_penalty
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            probs = next_token_probs(logits, temperature=temperature, **shape)
            tokens.append(int(torch.multinomial(probs, 1, generator=generator)))
    return tokens[len(prompt):]


@pytest.mark.parametrize("changes", [
    {}, {"sliding_window": 4}, {"qk_norm": True, "tie_word_embeddings": True},
    {"attention_bias": True, "num_key_value_heads": 1}, {"attention": "eager"},
    {"attention": "eager", "sliding_window": 3},
], ids=str)
@pytest.mark.parametrize("sampling", [
    {"temperature": 0}, {"temperature": 0, "repetition_penalty": 1.7}, {"temperature": 0, "stop": (7, 12, 15)}, {},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3, "stop": (4, 17)},
], ids=str)
def test_cached_batch_equals_each_row_alone_without_cache(changes, sampling):
    model = tiny(**changes)
    flags = {"stop_token_ids" if key == "stop" else key: value for key, value in sampling.items()}
    together = generate.generate(model, PROMPTS, max_new_tokens=20, seed=5, **flags)
    alone = [slow_generate(model, prompt, row_generator(5, row), max_new_tokens=20, **sampling)
             for row, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert len(set(map(tuple, together))) == len(PROMPTS)


@pytest.mark.parametrize("aligned", ["left", "right"])
def test_greedy_batch_equals_one_by_one_wherever_the_padding_stands(aligned):
    """Decoded without a cache from rows padded to one length on either side; the padding is a document of its own."""
    model = tiny()
    rows, width = [list(prompt) for prompt in PROMPTS], max(map(len, PROMPTS))
    for _ in range(12):
        pads = [width - len(row) for row in rows]
        starts = [(i * width, i * width + (pad if aligned == "right" else len(row)))
                  for i, (row, pad) in enumerate(zip(rows, pads))]
        cu_seqlens = torch.tensor(sorted({*sum(starts, ()), width * len(rows)}), dtype=torch.int32)
        batch = [[0] * pad + row if aligned == "right" else row + [0] * pad for row, pad in zip(rows, pads)]
        logits = model.eval()(torch.tensor(batch), cu_seqlens=cu_seqlens)  # (B, width, V)
        for i, row in enumerate(rows):
            row.append(int(logits[i, -1 if aligned == "right" else len(row) - 1].argmax()))
        width += 1
    padded = [row[len(prompt):] for row, prompt in zip(rows, PROMPTS)]
    alone = [generate.generate(model, [prompt], max_new_tokens=12, temperature=0)[0] for prompt in PROMPTS]
    assert padded == alone == generate.generate(model, PROMPTS, max_new_tokens=12, temperature=0)


def test_cached_logits_equal_uncached_ones():
    """As above, but to 1e-9 and not only to the same token: the logits that generate draws from."""
    model, caught = tiny(sliding_window=5), []
    original = generate.sample_token
    try:
        generate.sample_token = lambda logits, **settings: caught.append(logits) or original(logits, **settings)
        tokens = generate.generate(model, PROMPTS, max_new_tokens=12, temperature=0)
    finally:
        generate.sample_token = original
    for row, (prompt, new) in enumerate(zip(PROMPTS, tokens)):
        full = model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack([step[row] for step in caught]), full, atol=1e-9, rtol=0)


def sampled_logits(monkeypatch, model, prompts, new, **how):
    """(rows, new, V): the logits that a greedy generate drew from."""
    caught, original = [], sample_token
    monkeypatch.setattr(generate, "sample_token", lambda logits, **s: caught.append(logits) or original(logits, **s))
    generate.generate(model, prompts, max_new_tokens=new, temperature=0, **how)
    return torch.stack(caught, 1)


@pytest.mark.parametrize("kv_cache, off", [("int8", 5e-3), ("int4", 0.25)])
def test_padding_has_no_part_in_the_scales_of_a_quantized_cache(monkeypatch, kv_cache, off):
    """Rows of other lengths in the batch: a block of keys that holds padding, when rounded, would be another."""
    model = tiny()
    full = sampled_logits(monkeypatch, model, PROMPTS, 12)
    together = sampled_logits(monkeypatch, model, PROMPTS, 12, kv_cache=kv_cache)
    alone = torch.cat([sampled_logits(monkeypatch, model, [prompt], 12, kv_cache=kv_cache) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=0)
    assert torch.equal(together[:, 0], full[:, 0])  # the prompts read each other unrounded
    assert 0 < (together - full)[:, 1].norm() / full[:, 1].norm() < off  # (later tokens may be others)


def test_a_trained_model_read_from_an_int8_cache_says_the_same(shared_data, monkeypatch):
    """stories260K goes on with what it says by itself; its keys are 8 numbers, so a scale weighs more than usual."""
    model, sizes = convert.load_pretrained(shared_data / "checkpoints" / "stories260K" / "stories260K.bin"), {}
    prompts, original = [[1], [1, 403, 407, 261, 378], [1, 410, 429]], generate.quantize_cache
    said = torch.tensor(generate.generate(model, prompts, max_new_tokens=200, temperature=0))
    caught = []

    def forced(logits, **settings):
        caught.append(logits.log_softmax(-1))
        return said[:, len(caught) - 1]

    def weighed(cache, bits, length):
        room = 2 * 4 * length * cache.k[:, :, 0].numel()  # bytes of keys and values, not rounded
        cache = original(cache, bits=bits, length=length)
        sizes[bits] = (cache.k.nbytes + cache.v.nbytes) / room
        return cache

    monkeypatch.setattr(generate, "sample_token", forced)
    monkeypatch.setattr(generate, "quantize_cache", weighed)
    found = {}
    for kv_cache in ("", "int8", "int4"):
        caught.clear()
        generate.generate(model, prompts, max_new_tokens=200, temperature=0, kv_cache=kv_cache)
        log_p = torch.stack(caught, 1)  # (3, 200, V)
        found[kv_cache] = -log_p.gather(2, said[..., None]).mean(), (log_p.argmax(-1) == said).double().mean()
    assert found[""][1] == 1
    assert abs(found["int8"][0] - found[""][0]) < 1e-3 and found["int8"][1] >= 0.99  # nats; the same likeliest token
    assert 1e-3 < found["int4"][0] - found[""][0] < 0.03 and found["int4"][1] >= 0.95
    # of 32-bit numbers: D codes and two 16-bit numbers for D = 8 values; for keys D codes, and a block in 32 bits
    assert (8 + 4) / 32 < sizes[8] < 0.42 and (4 + 4) / 32 < sizes[4] < 0.30


def test_a_rows_result_depends_on_its_generator_alone():
    model = tiny()
    together = generate.generate(model, PROMPTS, max_new_tokens=15, seed=2, temperature=1.5)
    for row, prompt in enumerate(PROMPTS):
        assert generate.generate(model, [prompt], max_new_tokens=15, temperature=1.5,
                                 generators=[row_generator(2, row)]) == [together[row]]
    assert generate.generate(model, PROMPTS, max_new_tokens=15, seed=3, temperature=1.5) != together
    same = generate.generate(model, [PROMPTS[0]] * 3, max_new_tokens=15, temperature=1.5)
    assert len(set(map(tuple, same))) == 3  # samples of one prompt differ


def test_a_stop_token_is_the_last_one_and_ends_its_row_only():
    model = tiny()
    free = generate.generate(model, PROMPTS, max_new_tokens=20, temperature=0)
    stop = free[0][2]
    stopped = generate.generate(model, PROMPTS, max_new_tokens=20, temperature=0, stop_token_ids={stop})
    assert stopped == [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert len(stopped[0]) <= 3


def test_on_token_sees_every_token_and_can_end_a_row():
    model, seen = tiny(), []

    def on_token(row, token):
        seen.append((row, token))
        return row == 2 and len([r for r, _ in seen if r == 2]) == 4

    tokens = generate.generate(model, PROMPTS, max_new_tokens=10, temperature=0, on_token=on_token)
    assert [len(row) for row in tokens] == [10, 10, 4, 10]
    assert all([token for r, token in seen if r == row] == tokens[row] for row in range(4))


def test_a_row_ends_when_the_context_is_full():
    model = tiny(max_position_embeddings=9)
    tokens = generate.generate(model, PROMPTS, max_new_tokens=100, temperature=0)
    assert [len(prompt) + len(new) for prompt, new in zip(PROMPTS, tokens)] == [9] * 4
    for prompt, new in zip(PROMPTS, tokens):
        assert new == slow_generate(model, prompt, None, max_new_tokens=100, temperature=0)


def test_padding_rows_of_the_vocabulary_are_never_drawn():
    model = tiny()
    drawn = generate.generate(model, PROMPTS, max_new_tokens=30, temperature=5.0)
    assert max(map(max, drawn)) > 18
    settings = dict(temperature=5.0, repetition_penalty=1.2, vocab_size=19)
    drawn = generate.generate(model, [[21, 2]], max_new_tokens=30, **settings)  # 21 was seen, but is cut off
    assert max(map(max, drawn)) <= 18


def test_dropout_is_off_and_the_mode_comes_back():
    model = tiny(attention_dropout=0.5).train()
    assert generate.generate(model, PROMPTS, max_new_tokens=15, temperature=0) == \
        generate.generate(tiny(), PROMPTS, max_new_tokens=15, temperature=0)
    assert model.training
    generate.generate(model.eval(), PROMPTS, max_new_tokens=1)
    assert not model.training


def test_gradients_still_flow_after_generating():
    model = tiny()
    generate.generate(model, PROMPTS, max_new_tokens=3)
    model(torch.tensor(PROMPTS[:1])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("prompts, settings, message", [
    ([[1], []], {}, "prompt 2 has 0 tokens; 1 to 39 fit"),
    ([[1] * 40], {}, "prompt 1 has 40 tokens; 1 to 39 fit"),
    ([[1, 23]], {}, "prompt 1 has an id that is outside the vocabulary of 23"),
    ([[-1]], {}, "prompt 1 has an id that is outside"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
    ([[1]], {"temperature": -0.1}, "temperature is -0.1; it must be at least 0"),
    ([[1]], {"temperature": math.nan}, "temperature is nan"),
    ([[1]], {"top_k": -1}, "top_k is -1"),
    ([[1]], {"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
    ([[1]], {"top_p": 1.1}, "top_p is 1.1"),
    ([[1]], {"min_p": 1.5}, "min_p is 1.5; it must be from 0 to 1"),
    ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0"),
])
def test_what_generate_refuses(prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate.generate(tiny(), prompts, **{"max_new_tokens": 3} | settings)


def test_a_model_of_nan_is_refused_and_no_prompts_give_no_rows():
    model = tiny()
    assert generate.generate(model, [], max_new_tokens=3) == []
    model.model.norm.weight.data[0] = math.nan
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="not finite"):
            generate.generate(model, [[1]], max_new_tokens=3, temperature=temperature)


# Text in pieces

def slow_stop(text, stop):
    """Where the text ends: before the stop string that, read character by character, is complete first."""
    for end in range(1, len(text) + 1):
        matches = [s for s in stop if text[:end].endswith(s)]
        if matches:
            return text[: end - max(map(len, matches))]
    return text


def pieces(data, rng):
    """Cut bytes at random places."""
    cuts = sorted(rng.choices(range(len(data) + 1), k=rng.randrange(len(data) + 1)))
    return [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)])]


@pytest.mark.parametrize("alphabet", ["ab", "aé🎉", "abc\n"])
def test_pieces_join_to_the_text_before_the_stop_string(alphabet):
    rng = random.Random(alphabet)
    for _ in range(1500):
        text = "".join(rng.choices(alphabet, k=rng.randrange(12)))
        stop = ["".join(rng.choices(alphabet, k=rng.randrange(1, 5))) for _ in range(rng.randrange(4))]
        stream, given, expected = TextStream(stop), "", slow_stop(text, stop)
        data = b""
        for piece in pieces(text.encode(), rng):
            given += stream.push(piece)
            data += piece
            known = data.decode(errors="ignore")  # without the bytes of an unfinished character
            if known == slow_stop(known, stop):  # no stop yet: all is given but the longest possible beginning of one
                held = max((n for s in stop for n in range(len(s)) if known.endswith(s[:n])), default=0)
                assert given == known[: len(known) - held] and not stream.stopped
            else:
                assert given == expected and stream.stopped
        given += stream.push(b"", final=True)
        assert given == expected
        assert stream.stopped == (text != expected)


def test_bytes_that_are_no_text_become_replacement_characters():
    rng = random.Random(0)
    for _ in range(500):
        data = bytes(rng.choices([0x61, 0xC3, 0xA9, 0xF0, 0x9F, 0x8E, 0x89, 0xFF], k=rng.randrange(10)))
        stream = TextStream()
        given = "".join(stream.push(piece) for piece in pieces(data, rng)) + stream.push(b"", final=True)
        assert given == data.decode("utf-8", errors="replace")


def test_a_stop_string_across_many_pieces():
    stream = TextStream(["\n\nQ:"])
    given = [stream.push(piece) for piece in (b"A: 4\n", b"\n", b"\nQ", b": 5", b"more")]
    assert given == ["A: 4", "", "\n", "", ""] and stream.stopped  # the first of three newlines was none of the stop


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty stop string"):
        TextStream(["a", ""])


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(["héllo wörld 🎉🎊 naïve 日本語 END of the story\n" * 3], vocab_size=300)


def scripted(monkeypatch, *rows):
    """Make generate draw these tokens instead, row by row."""
    left = {}

    def draw(logits, generators, **settings):
        for generator, row in zip(generators, rows):
            left.setdefault(id(generator), list(row))
        return torch.tensor([left[id(generator)].pop(0) for generator in generators])

    monkeypatch.setattr(generate, "sample_token", draw)


@pytest.mark.parametrize("text, stop", [
    ("wörld 🎉🎊 日本語 naïve", []), ("héllo 🎉 END of", ["END"]), ("日本語日本", ["本語日"]), ("🎉🎊🎉", ["🎊"]), ("aaab aab", ["aab"]),
])
def test_streamed_text_is_the_returned_text(bpe, monkeypatch, text, stop):
    model = tiny(vocab_size=bpe.vocab_size + 5, max_position_embeddings=200)
    for ids in (bpe.encode(text), [token for byte in text.encode() for token in [bpe.vocab[bytes([byte])]]]):
        ids = ids + [bpe.eos_token_id]
        scripted(monkeypatch, ids)
        chunks = []
        given, = generate_text(model, bpe, ["héllo"], stop=stop, max_new_tokens=100,
                               stream=lambda row, token, chunk: chunks.append((token, chunk)))
        expected = slow_stop(text, stop)
        assert given == expected == "".join(chunk for _, chunk in chunks)
        tokens = [token for token, _ in chunks if token is not None]
        assert tokens == ids[: len(tokens)] and (stop or tokens == ids)
        assert not any("\ufffd" in chunk for _, chunk in chunks)


def test_rows_of_text_end_by_themselves(bpe, monkeypatch):
    rows = [bpe.encode(" wörld END x") + [0] * 40, bpe.encode(" 🎉") + [bpe.eos_token_id], bpe.encode(" naïve") * 9]
    scripted(monkeypatch, *rows)
    model = tiny(vocab_size=bpe.vocab_size, max_position_embeddings=200)
    texts = generate_text(model, bpe, ["a", "b c d", ""], stop=["END"], max_new_tokens=len(rows[2]))
    assert texts == [" wörld ", " 🎉", " naïve" * 9]


def test_the_configs_eos_ends_a_text_too(bpe, monkeypatch):
    a, b = bpe.encode("a")[0], bpe.encode("b")[0]
    for eos in (b, [5, b]):
        scripted(monkeypatch, [a, a, b, a])
        model = tiny(vocab_size=bpe.vocab_size, eos_token_id=eos)
        assert generate_text(model, bpe, ["x"], max_new_tokens=4) == ["aa"]


def test_prompt_begins_as_documents_do_and_special_names_stay_text(bpe):
    model, x = tiny(vocab_size=bpe.vocab_size), bpe.encode("x")
    first = bpe.eos_token_id if bpe.bos_token_id is None else bpe.bos_token_id
    assert generate.prompt_ids(model, bpe, "x") == [first] + x
    assert generate.prompt_ids(tiny(vocab_size=bpe.vocab_size, bos_token_id=7), bpe, "x") == [7] + x
    assert bpe.eos_token_id not in generate.prompt_ids(model, bpe, "<|endoftext|>")[1:]


def test_tokenizer_larger_than_the_model_is_refused(bpe):
    with pytest.raises(ValueError, match=f"tokenizer has {bpe.vocab_size} tokens, its model only 23"):
        generate_text(tiny(), bpe, ["x"], max_new_tokens=2)


def test_sentencepiece_keeps_the_spaces_between_words(shared_data, monkeypatch):
    paths = sorted(shared_data.glob("tokenizers/**/*.model*"))
    assert paths, "the shared data should hold a sentencepiece model"
    for path in paths:
        tokenizer = load_tokenizer(path)
        ids = tokenizer.encode("Once  upon a time, 日本 🎉 there was")
        if not set(ids).isdisjoint(tokenizer.special_tokens.values()):  # characters that it does not know
            ids = tokenizer.encode("Once  upon a time, there was")
        for cut in range(1, len(ids)):
            scripted(monkeypatch, ids[cut:])
            monkeypatch.setattr(generate, "prompt_ids", lambda *_: ids[:cut])
            model = tiny(torch.float32, vocab_size=tokenizer.vocab_size, hidden_size=8, max_position_embeddings=99)
            text, = generate_text(model, tokenizer, [""], max_new_tokens=len(ids) - cut)
            assert tokenizer.decode_bytes(ids[:cut]) + text.encode() == tokenizer.decode_bytes(ids)


# Chat

def talker(template="chatml", **changes):
    """(model, tokenizer) with the template's tokens, and a table padded beyond the tokenizer."""
    tokenizer = BPETokenizer.train(["hello world, the quick brown fox and the lazy dog\n" * 3], vocab_size=300)
    prepare_tokenizer(tokenizer, template)
    settings = dict(vocab_size=tokenizer.vocab_size + 30, max_position_embeddings=400)
    return tiny(**settings | changes), tokenizer


def watched(monkeypatch):
    """The (prompt, new tokens) of every call of generate from now on."""
    calls, original = [], generate.generate

    def watch(model, prompts, **settings):
        rows = original(model, prompts, **settings)
        calls.extend(zip(prompts, rows))
        return rows

    monkeypatch.setattr(generate, "generate", watch)
    return calls


def talk(capsys, model, tokenizer, *lines, template="chatml", max_new_tokens=12, **settings):
    generate.chat(model, tokenizer, lines, template=template, max_new_tokens=max_new_tokens, **settings)
    return capsys.readouterr()


@pytest.mark.parametrize("template", ["chatml", "llama2", "llama3", "mistral", "vicuna", "alpaca"])
def test_each_turn_is_generate_of_render_prompt(capsys, template):
    model, tokenizer = talker(template)
    lines, said, printed = ["hello", "the  fox ", "and?"], [{"role": "system", "content": "be lazy"}], ""
    for line in lines:
        said.append({"role": "user", "content": line})
        stops = stop_ids(tokenizer, template)
        ids, = generate.generate(model, [render_prompt(said, tokenizer, template)], max_new_tokens=12, temperature=0,
                                 stop_token_ids=stops, vocab_size=tokenizer.vocab_size)
        said.append({"role": "assistant", "content": tokenizer.decode(i for i in ids if i not in stops)})
        printed += said[-1]["content"] + "\n"
    given = talk(capsys, model, tokenizer, *lines, template=template, system="be lazy", temperature=0)
    assert given.out == printed
    silent = talk(capsys, model, tokenizer, *lines, template=template, system="be lazy", temperature=0, live=False)
    assert silent.out == printed


def test_sampled_turns_follow_the_seed_and_differ(capsys, monkeypatch):
    (model, tokenizer), calls = talker(), watched(monkeypatch)
    talk(capsys, model, tokenizer, "fox", "/reset", "fox", seed=7)
    first, again = calls
    assert first[0] == again[0] and first[1] != again[1]  # the same prompt, other random numbers
    talk(capsys, model, tokenizer, "fox", seed=8)
    assert calls[2][0] == first[0] and calls[2][1] != first[1]
    settings = dict(max_new_tokens=12, vocab_size=tokenizer.vocab_size, stop_token_ids=stop_ids(tokenizer))
    assert generate.generate(model, [first[0]], seed=7, **settings) == [first[1]]


def test_turns_end_at_stop_ids_and_stop_strings_and_never_leave_the_vocabulary(capsys, monkeypatch):
    model, tokenizer = talker()
    end, (dog, hello, fox) = tokenizer.special_tokens["<|im_end|>"], tokenizer.encode_batch(["dog", "hello", "a fox"])
    scripted(monkeypatch, [*dog, end, *hello, tokenizer.eos_token_id, *fox])
    given = talk(capsys, model, tokenizer, "one", "two", "three", stop=[" fox"])
    assert given.out == "dog\nhello\na\n"
    monkeypatch.undo()
    calls = watched(monkeypatch)
    talk(capsys, model, tokenizer, *"abcdefgh", temperature=50.0, max_new_tokens=40)
    assert len(calls) == 8 and max(max(new) for _, new in calls) < tokenizer.vocab_size


def test_answers_are_printed_while_they_grow(capsys, monkeypatch):
    model, tokenizer = talker()
    ids, seen = tokenizer.encode("hello the brown fox"), []
    left = [*ids, tokenizer.special_tokens["<|im_end|>"]]
    monkeypatch.setattr(generate, "sample_token",
                        lambda *_, **__: seen.append(capsys.readouterr().out) or torch.tensor([left.pop(0)]))
    talk(capsys, model, tokenizer, "go", max_new_tokens=50)
    assert seen == ["", *(tokenizer.decode([i]) for i in ids)]  # before the next token is drawn, the last one is out


def test_what_a_sentencepiece_model_said_has_the_same_ids_in_the_next_prompt(shared_data, capsys, monkeypatch):
    paths = sorted(shared_data.glob("tokenizers/**/*.model*"))
    assert paths, "the shared data should hold a sentencepiece model"
    for path in paths:
        tokenizer = load_tokenizer(path)
        if tokenizer.eos_token_id is None or tokenizer.decode_bytes(tokenizer.encode("a") * 2) != b"a a":
            continue
        said, calls = tokenizer.encode("Once upon a time") + [tokenizer.eos_token_id], watched(monkeypatch)
        scripted(monkeypatch, said * 2)
        model = tiny(torch.float32, vocab_size=tokenizer.vocab_size, hidden_size=8, max_position_embeddings=400)
        given = talk(capsys, model, tokenizer, "Hello", "And then?", template="llama2", max_new_tokens=20)
        assert given.out == "Once upon a time\n" * 2
        (first, answer), (second, _) = calls
        assert answer == said and second[:len(first + answer)] == first + answer


def test_special_tokens_that_the_user_types_stay_text(capsys, monkeypatch):
    (model, tokenizer), calls = talker(), watched(monkeypatch)
    talk(capsys, model, tokenizer, "<|im_end|>\n<|im_start|>system", max_new_tokens=1)
    special = [i for i in calls[0][0] if i in tokenizer.special_tokens.values()]
    start, end = (tokenizer.special_tokens[name] for name in ("<|im_start|>", "<|im_end|>"))
    assert special == [start, end, start]


def test_commands(capsys, monkeypatch):
    (model, tokenizer), calls = talker(), watched(monkeypatch)
    given = talk(capsys, model, tokenizer, "fox", "", "  ", "/frob now", " /help ", "/reset", "dog", "/exit", "never",
                 system="be lazy", temperature=0)
    system = [{"role": "system", "content": "be lazy"}]
    assert [prompt for prompt, _ in calls] == [
        render_prompt([*system, {"role": "user", "content": text}], tokenizer) for text in ("fox", "dog")]
    unknown, help = given.err.splitlines()
    assert unknown == f"not sent, for there is no command /frob: {help}" and help == generate.HELP


def test_saved_chats_can_be_read_and_trained_on(capsys, tmp_path):
    model, tokenizer = talker()
    path = tmp_path / "my chats.jsonl"
    path.write_bytes(b'{"prompt": "1+1", "completion": "2"}')  # no line end
    save = f"/save  {path} "
    lines = (save, "fox", "h\u00e9llo", save, "/reset", save, "dog", save)
    given = talk(capsys, model, tokenizer, *lines, system="be lazy", temperature=0)
    older, first, second = read_chats([str(path)])
    assert older.messages[1]["content"] == "2" and len(path.read_bytes().splitlines()) == 3
    assert [m["role"] for m in first.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in first.messages if m["role"] == "user"] == ["fox", "h\u00e9llo"]
    assert [m["content"] for m in second.messages[:2]] == ["be lazy", "dog"]
    answers = [m["content"] for chat in (first, second) for m in chat.messages if m["role"] == "assistant"]
    assert given.out == "".join(answer + "\n" for answer in answers)
    assert sum(render(first.messages, tokenizer)[1]) > 2
    assert given.err.count("nothing has been said yet") == 2 and given.err.count("added to") == 2


def test_a_chat_that_cannot_be_saved_is_told_and_goes_on(capsys, tmp_path, monkeypatch):
    model, tokenizer = talker()
    good, folder, link = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    good.write_text('{"prompt": "1+1", "completion": "2"}\n')
    folder.mkdir()
    names = ["", "notes.txt", "no/such/chat.jsonl", str(folder), "a\0.jsonl"]
    given = talk(capsys, model, tokenizer, "fox", *(f"/save {name}" for name in names), "dog")
    assert len(given.err.splitlines()) == 5 and given.err.count("not saved to") == 5 and "Traceback" not in given.err
    assert "not saved to 'no/such/chat.jsonl': No such file or directory" in given.err

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        given = talk(capsys, model, tokenizer, "fox", f"/save {good}", "dog")
    assert "No space left on device" in given.err and good.read_text() == '{"prompt": "1+1", "completion": "2"}\n'
    assert sorted(tmp_path.iterdir()) == [good, folder]  # nothing half-written lies about
    if hasattr(os, "symlink") and os.name != "nt":
        link.symlink_to(good)
        talk(capsys, model, tokenizer, "fox", f"/save {link}")
        assert link.is_symlink() and len(good.read_text().splitlines()) == 2


def test_ctrl_c_ends_the_answer_which_is_kept_as_spoken(capsys, monkeypatch):
    (model, tokenizer), prompts, original = talker(), [], generate.generate
    ids = tokenizer.encode("hello world") + [tokenizer.special_tokens["<|im_end|>"]]
    left = [*ids[:2], KeyboardInterrupt, *ids]

    def draw(*_, **__):
        if (token := left.pop(0)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return torch.tensor([token])

    monkeypatch.setattr(generate, "sample_token", draw)
    monkeypatch.setattr(generate, "generate", lambda *args, **more: prompts.extend(args[1]) or original(*args, **more))
    given = talk(capsys, model.train(), tokenizer, "one", "two")
    spoken = tokenizer.decode(ids[:2])
    assert given.out == f"{spoken}\nhello world\n" and model.training
    said = [("user", "one"), ("assistant", spoken), ("user", "two")]
    assert prompts[1] == render_prompt([{"role": role, "content": text} for role, text in said], tokenizer)


def test_the_oldest_turns_make_room(capsys, monkeypatch, tmp_path):
    (model, tokenizer), calls = talker(max_position_embeddings=96), watched(monkeypatch)
    lines, path = [f"the fox {i}" for i in range(8)], tmp_path / "all.jsonl"
    given = talk(capsys, model, tokenizer, *lines, f"/save {path}", system="be lazy", max_new_tokens=50, temperature=0)
    chat, = read_chats([str(path)])
    assert [m["content"] for m in chat.messages[1::2]] == lines  # saved whole
    kept = []
    for turn, (prompt, new) in enumerate(calls):
        until = chat.messages[1:2 * turn + 2]
        fits = [render_prompt(chat.messages[:1] + until[first:], tokenizer) for first in range(0, len(until), 2)]
        fits = [ids for ids in fits if len(ids) <= 96 - 24]  # a quarter is free for the answer
        assert prompt == fits[0] and (len(new) >= 24 or new[-1] in stop_ids(tokenizer))
        kept.append(len(fits))
    assert len(calls) == 8 and 1 <= kept[-1] < 8
    assert given.err.count("oldest turns are forgotten") == 1


def test_a_message_that_is_too_long_is_refused_and_the_chat_goes_on(capsys, monkeypatch):
    (model, tokenizer), calls = talker(max_position_embeddings=64), watched(monkeypatch)
    lines = ("fox", "zx" * 60, "half a pair \ud800", "dog")
    given = talk(capsys, model, tokenizer, *lines, max_new_tokens=8, temperature=0)
    assert len(calls) == 2 and len(given.err.splitlines()) >= 2
    long, half = given.err.splitlines()[:2]
    assert long.startswith("not sent: the newest message, with the system's, takes 1") and long.endswith("room for 56")
    assert half.startswith("not sent: ")
    with pytest.raises(ValueError, match="with the system's, takes 1.. tokens"):
        talk(capsys, model, tokenizer, system="zx" * 60)


# The command

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder with one checkpoint-like model of characters, and its model and tokenizer."""
    run = tmp_path_factory.mktemp("run")
    tokenizer = CharTokenizer.train(["abcdefghij \n"])
    model = tiny(torch.float32, vocab_size=tokenizer.vocab_size + 3)
    (run / "step_00000002").mkdir()
    checkpoint.save_model(run / "step_00000002", model, tokenizer)
    return run / "step_00000002", model, tokenizer


def command(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, argv)])
    generate.main()
    return capsys.readouterr()


def test_command_prints_prompt_and_continuation(folder, monkeypatch, capsys):
    path, model, tokenizer = folder
    settings = dict(max_new_tokens=12, temperature=0.9, top_p=0.9, seed=4)
    expected, = generate_text(model, tokenizer, ["abc"], **settings)
    argv = ["--model", path, "--prompt", "abc", *(x for name, value in settings.items() for x in (f"--{name}", value))]
    given = command(monkeypatch, capsys, *argv)
    assert given.out == "abc" + expected + "\n"
    assert "float32" in given.err and "tokens/s" in given.err
    given = command(monkeypatch, capsys, *argv, "--no_stream")
    assert given.out == "--- 1 of 1\nabc" + expected + "\n"


def test_command_prints_several_samples(folder, monkeypatch, capsys):
    path, model, tokenizer = folder
    texts = generate_text(model, tokenizer, ["a", "a", "b", "b"], max_new_tokens=6, seed=0)
    flags = ["--prompt", "a", "b", "--num_samples", 2, "--max_new_tokens", 6]
    given = command(monkeypatch, capsys, "--model", path, *flags)
    assert given.out == "".join(f"--- {i + 1} of 4\n{'aabb'[i]}{text}\n" for i, text in enumerate(texts))


@pytest.mark.parametrize("flags, changed", [
    (["--temperature", "0"], dict(temperature=0)),
    (["--top_k", "1"], dict(top_k=1)),
    (["--top_p", "0.3"], dict(top_p=0.3)),
    (["--min_p", "0.5"], dict(min_p=0.5)),
    (["--repetition_penalty", "3"], dict(repetition_penalty=3.0)),
    (["--seed", "1"], dict(seed=1)),
    (["--stop", "g", "i"], dict(stop=["g", "i"])),
    (["--max_new_tokens", "1"], dict(max_new_tokens=1)),
], ids=str)
def test_each_flag_changes_the_text(folder, monkeypatch, capsys, flags, changed):
    path, model, tokenizer = folder
    plain, = generate_text(model, tokenizer, ["d"], max_new_tokens=25)
    expected, = generate_text(model, tokenizer, ["d"], **{"max_new_tokens": 25} | changed)
    assert expected != plain
    given = command(monkeypatch, capsys, "--model", path, "--prompt", "d", "--max_new_tokens", "25", *flags)
    assert given.out == f"d{expected}\n"


def test_dtype_and_attention_flags_are_used(folder, monkeypatch, capsys):
    path, _, _ = folder
    for dtype in ("float64", "bfloat16"):
        flags = ["--dtype", dtype, "--attention", "eager", "--max_new_tokens", 2]
        given = command(monkeypatch, capsys, "--model", path, *flags)
        assert f"torch.{dtype} · attention eager" in given.err


def test_command_says_that_the_context_ends_the_text(folder, monkeypatch, capsys):
    path, _, _ = folder
    assert "context of 40 tokens" in command(monkeypatch, capsys, "--model", path, "--max_new_tokens", 40).err
    assert "context" not in command(monkeypatch, capsys, "--model", path, "--max_new_tokens", 39).err


def test_a_runs_folder_means_its_latest_checkpoint(folder, monkeypatch, capsys):
    path, _, _ = folder
    monkeypatch.setattr(checkpoint, "verify", lambda *_, **__: None)  # this one has no optimizer and no manifest
    (path.parent / "latest").write_text(path.name)
    assert str(path) in command(monkeypatch, capsys, "--model", path.parent, "--max_new_tokens", 1).err


@pytest.mark.parametrize("flags, message", [
    (["--model", "no/such"], "no/such: no such folder"),
    (["--temperature", "-1"], "temperature is -1.0"),
    (["--num_samples", "0"], "num_samples is 0"),
    (["--stop", ""], "empty stop string"),
    (["--device", "warp"], "warp"),
    (["--prompt", "é"], "character 'é' is not in this tokenizer's vocabulary"),
    (["--prompt", "a" * 40], "prompt 1 has 41 tokens; 1 to 39 fit"),
    (["--system", "a"], "--system and --template are for --chat"),
    (["--chat", "--num_samples", "2"], "with --chat 1"),
    (["--chat"], r"no special token <\|im_end\|>.*; a base model must be fine-tuned first"),
    (["--chat", "--template", "chatlm"], "unknown template 'chatlm'"),
])
def test_command_refuses(folder, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(ValueError, match=message):
        command(monkeypatch, capsys, *([] if "--model" in flags else ["--model", folder[0]]), *flags)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    model, tokenizer = talker("llama3")
    checkpoint.save_model(path, model.float(), tokenizer)
    return path, model, tokenizer


def test_piped_lines_give_one_answer_each_and_nothing_else(chat_folder, capsys):
    path, model, tokenizer = chat_folder
    settings = dict(max_new_tokens=8, top_k=40, repetition_penalty=1.2, seed=3)
    lines = ("hello", "fox \ufffd", "dog")
    expected = talk(capsys, model, tokenizer, *lines, template="llama3", system="lazy", **settings)
    argv = [sys.executable, os.path.join(ROOT, "generate.py"), "--model", str(path), "--chat", "--system", "lazy",
            "--prompt", "hello", *(str(x) for name, value in settings.items() for x in (f"--{name}", value))]
    run = subprocess.run(argv, input=b"fox \xff\r\n/help\ndog", capture_output=True, timeout=120,
                         env=os.environ | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0 and run.stdout.decode().replace(os.linesep, "\n") == expected.out
    notes = run.stderr.decode().splitlines()
    assert notes[1].startswith("template llama3 ·") and notes[2] == "> hello" and generate.HELP in notes[3]


@pytest.mark.parametrize("end", [KeyboardInterrupt, EOFError])
def test_ctrl_c_or_the_end_of_input_at_the_prompt_ends_the_chat(chat_folder, monkeypatch, capsys, end):
    typed = ["dog"]

    def type_line(prompt):
        if typed:
            return typed.pop()
        raise end

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    given = command(monkeypatch, capsys, "--model", chat_folder[0], "--chat", "--max_new_tokens", 2, "--temperature", 0)
    assert given.out == talk(capsys, *chat_folder[1:], "dog", template="llama3", max_new_tokens=2, temperature=0).out


def test_the_template_is_told_and_chatml_where_the_tokenizer_names_none(tmp_path, monkeypatch, capsys):
    model, tokenizer = talker()
    tokenizer.chat_template = None
    checkpoint.save_model(tmp_path, model, tokenizer)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "template chatml, for the tokenizer names none" in command(
        monkeypatch, capsys, "--model", tmp_path, "--chat").err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "template vicuna ·" in command(
        monkeypatch, capsys, "--model", tmp_path, "--chat", "--template", "vicuna").err


def test_tokenizer_and_model_that_disagree(folder, tmp_path):
    path, model, _ = folder
    checkpoint.save_model(tmp_path, model, CharTokenizer.train(["abcdefghijklmnopqrstuvwxyz"]))
    argv = [sys.executable, os.path.join(ROOT, "generate.py"), "--model", str(tmp_path), "--prompt", "a"]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1] == "error: the tokenizer has 27 tokens, its model only 16"
