"""logprobs.py against loops written out by hand, in float64, and its gradients on enumerable distributions."""

import math

import pytest
import torch

import logprobs
from logprobs import (entropy, kl_estimate, masked_mean, masked_whiten, padded, segment_sums, sequence_logprobs,
                      token_logprobs)

B, S, V = 3, 5, 11


def batch(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, S, V, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(V, (B, S), generator=generator)
    labels[0, :2], labels[1, 3], labels[2] = -100, -100, -100  # a prompt, a gap, a row where nothing counts
    return logits.requires_grad_(), labels


def by_hand(logits, labels, temperature=1.0):
    """The formula, one token at a time, in Python's floats."""
    rows = []
    for row, targets in zip(logits.tolist(), labels.tolist()):
        rows.append([])
        for z, y in zip(row, targets):
            normaliser = math.log(sum(math.exp(v / temperature) for v in z))
            rows[-1].append(0.0 if y == -100 else z[y] / temperature - normaliser)
    return torch.tensor(rows, dtype=torch.float64)


# ---- log-probabilities

@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("block", [1 << 24, 2 * V])  # all at once; two rows at a time, the last block shorter
def test_token_logprobs_and_their_gradient(temperature, block, monkeypatch):
    monkeypatch.setattr(logprobs, "BLOCK", block)
    logits, labels = batch()
    logp = token_logprobs(logits, labels, temperature)
    assert torch.allclose(logp, by_hand(logits, labels, temperature), rtol=0, atol=1e-12)
    assert (logp[labels == -100] == 0).all() and (logp[labels != -100] < 0).all()

    weights = torch.randn(B, S, dtype=torch.float64)
    (logp * weights).sum().backward()  # d logp / d logits = (onehot - softmax) / temperature, 0 where nothing counts
    onehot = torch.nn.functional.one_hot(labels.clamp(min=0), V)
    expected = (onehot - (logits / temperature).softmax(-1)) / temperature * (weights * (labels != -100))[..., None]
    assert torch.allclose(logits.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_normalised_in_float32(dtype):
    logits, labels = batch(dtype)
    logp = token_logprobs(logits, labels)
    assert logp.dtype == torch.float32 and entropy(logits).dtype == torch.float32
    assert (logp - by_hand(logits.double(), labels)).abs().max() < 1e-5  # in bfloat16 it would be off by 1e-2
    logp.sum().backward()
    assert logits.grad.dtype == dtype


def test_only_the_logits_are_kept_for_the_backward_pass():
    """A plain log_softmax would keep a second array of their size: at a 128k vocabulary gigabytes."""
    logits, labels = batch()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        token_logprobs(logits, labels), entropy(logits)
    kept = [t for t in kept if t.is_floating_point() and t.numel() >= V]
    assert kept and all(t.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr() for t in kept)


def test_impossible_tokens_stay_finite():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    logp, H = token_logprobs(logits, torch.tensor([0])), entropy(logits)
    p = 1 / (1 + math.e)
    assert logp.item() == pytest.approx(math.log(p))
    assert H.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))
    (logp + H).sum().backward()
    assert logits.grad.isfinite().all()


def test_nothing_that_counts_gives_zero_and_no_gradient():
    logits = torch.randn(2, 3, V, requires_grad=True)
    sums, lengths = sequence_logprobs(logits, torch.full((2, 3), -100))
    assert sums.tolist() == [0, 0] and lengths.tolist() == [0, 0]
    sums.sum().backward()
    assert (logits.grad == 0).all()
    assert token_logprobs(torch.randn(2, 0, V), torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)


def test_what_cannot_be_meant_is_refused():
    logits, labels = batch()
    with pytest.raises(ValueError, match=r"shape \(3, 5\), not \(3, 4\)"):
        token_logprobs(logits, labels[:, 1:])
    with pytest.raises(ValueError, match="temperature must be above 0"):
        token_logprobs(logits, labels, temperature=0.0)
    with pytest.raises(ValueError, match="k1, k2 or k3, not 'k4'"):
        kl_estimate(logits, logits, "k4")
    with pytest.raises(ValueError, match="from 0 to 6, not from 0 to 5"):
        segment_sums(torch.ones(6), torch.tensor([0, 2, 5]))


def test_sequence_sums_and_lengths():
    logits, labels = batch()
    sums, lengths = sequence_logprobs(logits, labels, temperature=1.3)
    assert torch.allclose(sums, by_hand(logits, labels, 1.3).sum(-1), rtol=0, atol=1e-12)
    assert lengths.tolist() == [3, 4, 0] and lengths.dtype == torch.int64


def test_packed_sequences_have_the_sums_of_separate_ones():
    """Each document's sum and length, and the gradients, as if it stood alone; empty documents give 0."""
    logits, labels = batch()
    cu_seqlens = torch.tensor([0, 4, 4, 5, 9, 15], dtype=torch.int32)  # over the flattened rows, across their ends
    sums = segment_sums(token_logprobs(logits, labels), cu_seqlens)
    lengths = segment_sums(labels != -100, cu_seqlens)
    weights = torch.randn(5, dtype=torch.float64)
    (sums * weights).sum().backward()
    packed = logits.grad.clone()
    logits.grad = None
    alone = [sequence_logprobs(logits.flatten(0, 1)[None, a:b], labels.flatten()[None, a:b])
             for a, b in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])]
    assert torch.allclose(sums, torch.cat([s for s, _ in alone]), rtol=0, atol=1e-12) and sums[1] == 0
    assert lengths.tolist() == [int(n) for _, n in alone] == [2, 0, 1, 3, 1]
    sum(s * w for (s, _), w in zip(alone, weights)).backward()
    assert torch.allclose(packed, logits.grad, rtol=0, atol=1e-12)


# ---- masked statistics

@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_masked_mean_along_each_dim(mask_dtype):
    x = torch.randn(B, S, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]]).to(mask_dtype)
    kept = [[v for v, m in zip(row, keep) if m] for row, keep in zip(x.tolist(), mask.tolist())]
    flat = sum(kept, [])
    assert masked_mean(x, mask).item() == pytest.approx(sum(flat) / len(flat), abs=1e-12)
    assert masked_mean(x, mask, dim=1).tolist() == pytest.approx([sum(k) / len(k) if k else 0 for k in kept], abs=1e-12)
    columns = [[row[j] for row, keep in zip(x.tolist(), mask.tolist()) if keep[j]] for j in range(S)]
    assert masked_mean(x, mask, dim=0).tolist() == pytest.approx([sum(c) / len(c) for c in columns], abs=1e-12)
    assert masked_mean(x, mask[:, :1], dim=(0, 1)).item() == pytest.approx(x[0].mean().item(), abs=1e-12)  # broadcast


def test_what_is_masked_never_reaches_value_or_gradient():
    x = torch.tensor([1.0, torch.nan, 3.0, torch.inf], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True, False])
    masked_mean(x, mask).backward()
    assert masked_mean(x, mask) == 2 and x.grad.tolist() == [0.5, 0, 0.5, 0]
    assert masked_whiten(x, mask).tolist() == pytest.approx([-0.5**0.5, 0, 0.5**0.5, 0])


def test_an_all_masked_batch_gives_zero_and_no_gradient():
    x = torch.full((2, 3), torch.nan, requires_grad=True)
    total = masked_mean(x, torch.zeros(2, 3)) + masked_whiten(x, torch.zeros(2, 3)).sum()
    assert total == 0
    total.backward()
    assert (x.grad == 0).all()


def test_masked_whiten():
    x = torch.randn(B, S, dtype=torch.float64) * 4 + 7
    mask = torch.rand(B, S) < 0.7
    kept = x[mask]
    expected = (kept - kept.mean()) / (kept.var(correction=1) + 1e-8).sqrt()
    for shift_mean, offset in ((True, 0), (False, kept.mean())):
        whitened = masked_whiten(x, mask, shift_mean)
        assert torch.allclose(whitened[mask], expected + offset, rtol=0, atol=1e-12)
        assert (whitened[~mask] == 0).all()
    assert masked_whiten(torch.tensor([5.0, 9.0]), torch.tensor([0, 1])).tolist() == [0, 0]  # one element: no NaN
    assert masked_whiten(torch.full((4,), 0.25), torch.ones(4), shift_mean=False).tolist() == [0.25] * 4


# ---- divergence and entropy

def test_kl_estimates_equal_their_formulas():
    logp, ref = torch.randn(2, 1000, dtype=torch.float64) * 2
    D = logp - ref
    assert torch.equal(kl_estimate(logp, ref, "k1"), D) and torch.equal(kl_estimate(logp, ref), D)
    assert torch.allclose(kl_estimate(logp, ref, "k2"), D**2 / 2, rtol=0, atol=1e-12)
    assert torch.allclose(kl_estimate(logp, ref, "k3"), torch.exp(-D) - 1 + D, rtol=1e-12, atol=1e-12)
    assert (kl_estimate(logp, ref, "k3") > 0).all() and (kl_estimate(logp, logp, "k3") == 0).all()
    tiny = kl_estimate(torch.tensor(1e-3), torch.tensor(0.0), "k3")  # float32: exp(-D) - 1 would be off by a tenth
    assert tiny.item() == pytest.approx(math.expm1(-1e-3) + 1e-3, rel=1e-3)


def test_kl_estimates_in_expectation_and_as_losses():
    """Over an enumerated vocabulary: k1 and k3 average to the reverse KL; as losses on samples of the policy k1 has no
    gradient at all, k2 that of the reverse KL, k3 that of the forward KL."""
    logits = torch.randn(V, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(V, dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    probability = logp.exp().detach()  # how often each token is sampled: autograd does not see it

    def gradient(loss):
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    reverse, forward = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    mean = {kind: (probability * kl_estimate(logp, ref, kind)).sum() for kind in ("k1", "k2", "k3")}
    assert mean["k1"].item() == pytest.approx(reverse.item(), abs=1e-12)
    assert mean["k3"].item() == pytest.approx(reverse.item(), abs=1e-12)
    assert gradient(mean["k1"]).abs().max() < 1e-12
    assert torch.allclose(gradient(mean["k2"]), gradient(reverse), rtol=0, atol=1e-12)
    assert torch.allclose(gradient(mean["k3"]), gradient(forward), rtol=0, atol=1e-12)
    assert (gradient(reverse) - gradient(forward)).abs().max() > 1e-2  # so the three can be told apart


def test_entropy_and_its_gradient(monkeypatch):
    monkeypatch.setattr(logprobs, "BLOCK", 4 * V)
    logits, _ = batch()
    p = logits.softmax(-1)
    H = entropy(logits)
    expected = [[-sum(q * math.log(q) for q in token) for token in row] for row in p.tolist()]
    assert torch.allclose(H, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    H.sum().backward()  # dH / dz_i = -p_i (log p_i + H)
    assert torch.allclose(logits.grad, -p * (p.log() + H[..., None]), rtol=0, atol=1e-12)
    assert entropy(torch.zeros(4, 8)).tolist() == pytest.approx([math.log(8)] * 4)


def test_padded_by_hand_aligns_labels_with_what_predicts_them():
    input_ids, labels = padded([([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 4], [1, 1])])
    assert input_ids.tolist() == [[5, 6, 7], [9, 0, 0]]
    assert labels.tolist() == [[-100, 7, 8], [4, -100, -100]]  # a first token has nothing that predicts it
