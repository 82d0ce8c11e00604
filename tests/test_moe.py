"""Mixtures of experts: the fast products against the loop, the layer against sums written out, the losses against their
formulas and against transformers."""

import math

import pytest
import torch
import torch.nn.functional as F

import moe
from checkpoint import hf_tensors, load_model, read_safetensors, save_model, load_checkpoint, save_checkpoint
from model import CausalLM, KVCache, ModelConfig, flops_per_token, num_parameters
from moe import MoE, blocked_matmul, combine, dispatch, grouped_matmul, grouped_matmul_loop, route, router_loss
from optim import build_optimizer

SHAPES = {
    "mixtral": dict(num_experts=4, sliding_window=9),
    "qwen3_moe": dict(qk_norm=True, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, norm_topk_prob=False),
    "qwen3_moe, some layers": dict(qk_norm=True, num_experts=5, moe_intermediate_size=8, decoder_sparse_step=2, mlp_only_layers=[3],
                                   num_hidden_layers=4, tie_word_embeddings=True),
    "shared experts": dict(num_experts=4, moe_intermediate_size=12, n_shared_experts=2),
}
LOADS = {"even": [3, 3, 3, 3], "uneven": [1, 7, 2, 5], "empty ones": [0, 9, 0, 4], "all on one": [0, 0, 11, 0], "one row": [0, 0, 0, 1],
         "none at all": [0, 0, 0, 0]}


def tiny(seed=0, **shape) -> CausalLM:
    config = ModelConfig(**(dict(vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                                 num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3) | shape))
    return CausalLM(config, seed).double()


def tokens(*shape, seed=0) -> torch.Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-9):
    assert (a - b).abs().max().item() <= tolerance


def layers(model) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


# ---------------------------------------------------------------------------------------------------------- the products


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("sizes", [(8, 16), (5, 7)], ids=["aligned", "odd"])  # the first may go by grouped_mm
def test_products_at_once_equal_the_loop_with_gradients(load, dtype, tolerance, sizes):
    counts, generator = torch.tensor(LOADS[load]), torch.Generator().manual_seed(0)
    rows = torch.randn(int(counts.sum()), sizes[0], generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(4, sizes[1], sizes[0], generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    found = []
    for multiply in (grouped_matmul_loop, grouped_matmul, blocked_matmul):
        out = multiply(rows, weight, counts)
        assert out.shape == (len(rows), sizes[1]) and out.dtype == dtype
        found.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), (rows, weight))])
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=tolerance, rtol=tolerance)
    assert torch.equal(found[1][2].abs().amax((1, 2)) > 0, counts > 0), "an expert without rows has a gradient of zeros"


def test_blocks_stay_within_twice_the_rows_and_twice_the_matrices(monkeypatch):
    sizes, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: sizes.append((a.shape, b.shape)) or bmm(a, b))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        M, E = int(torch.randint(1, 200, (), generator=generator)), int(torch.randint(1, 20, (), generator=generator))
        share = torch.rand(E, generator=generator) ** 6 + 1e-6  # very uneven
        counts = torch.bincount(torch.multinomial(share, M, replacement=True, generator=generator), minlength=E)
        blocked_matmul(torch.zeros(M, 2), torch.zeros(E, 3, 2), counts)
        (blocks, size, _), _ = sizes.pop()
        assert blocks <= 2 * E and blocks * size <= 2 * M + 2 * E


def test_autocast_reaches_the_experts():
    """Autocast does not know grouped_mm: without a cast of our own they would run in float32."""
    layer = MoE(16, 16, 4, 2, True)
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.experts(x[0], torch.tensor([2, 0, 2, 1])).dtype == torch.bfloat16
        half = layer(x)
    close(half.float(), layer(x), 0.02)


# ------------------------------------------------------------------------------------------------------------- the layer


def by_hand(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """One token after the other, one of its experts after the other."""
    out = torch.zeros_like(x)
    e = layer.experts
    for n, token in enumerate(x):
        p = torch.exp(layer.gate.weight @ token)
        p = p / p.sum()
        best = sorted(range(len(p)), key=lambda i: -p[i].item())[:layer.k]
        scale = sum(p[i] for i in best) if layer.normalize else 1.0
        for i in best:
            h = F.silu(e.gate_proj[i] @ token) * (e.up_proj[i] @ token)
            out[n] = out[n] + p[i] / scale * (e.down_proj[i] @ h)
        if layer.shared_experts is not None:
            out[n] = out[n] + layer.shared_experts(token)
    return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_the_layer_is_its_sum_with_gradients(normalize, shared):
    torch.manual_seed(0)
    layer = MoE(6, 10, 5, 3, normalize, torch.nn.Linear(6, 6) if shared else None).double()
    torch.nn.init.normal_(layer.gate.weight)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    assert layer(x.view(1, 7, 6)).shape == (1, 7, 6)
    results = []
    for out in (layer(x), by_hand(layer, x)):
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])])
    for a, b in zip(*results):
        close(a, b, 1e-12)


def test_route_dispatch_combine_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]], dtype=torch.float64))
    weights, chosen = route(logits, 2, normalize=True)
    assert chosen.tolist() == [[0, 2], [1, 2]]
    assert torch.allclose(weights, torch.tensor([[0.625, 0.375], [2 / 3, 1 / 3]], dtype=torch.float64))
    assert torch.allclose(route(logits, 2, normalize=False)[0], torch.tensor([[0.5, 0.3], [0.6, 0.3]], dtype=torch.float64))
    rows, counts, order = dispatch(torch.tensor([[1.0], [2.0]], dtype=torch.float64), chosen, 4)
    assert rows.flatten().tolist() == [1, 2, 1, 2] and counts.tolist() == [1, 1, 2, 0] and order.tolist() == [0, 2, 1, 3]
    y = combine(rows * torch.tensor([[10.0], [100.0], [1000.0], [1000.0]], dtype=torch.float64), order, weights)
    assert torch.allclose(y.flatten(), torch.tensor([0.625 * 10 + 0.375 * 1000, 2 / 3 * 200 + 1 / 3 * 2000], dtype=torch.float64))


def test_the_router_is_never_narrower_than_float32():
    logits = torch.tensor([[1.0, 1.003, 0.0]])  # in bfloat16 the first two are one number
    assert route(logits, 1, False)[1].item() == 1 and route(logits.bfloat16(), 1, False)[0].dtype == torch.float32
    assert route(logits.double(), 1, False)[0].dtype == torch.float64


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("load", ["as it comes", "all on one", "one never"])
def test_a_model_is_the_same_by_loop_and_at_once_with_gradients(shape, load):
    results = []
    for multiply in (grouped_matmul_loop, grouped_matmul):
        model = tiny(**SHAPES[shape])
        for layer in layers(model):
            layer.experts.multiply = multiply
            if load == "all on one":
                layer.gate.weight.data.zero_()[0] = 0.0  # ties: the first k experts take all
            elif load == "one never":
                layer.gate.weight.data[1] = layer.gate.weight.data[0] * 1e-3 - 1e3 * layer.gate.weight.data[2].abs()
        logits = model(tokens(2, 16), cu_seqlens=torch.tensor([0, 5, 32], dtype=torch.int32))
        logits.sin().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        close(a, b)


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_packed_and_recomputed_equal_plain(shape):
    model, ids = tiny(**SHAPES[shape]).eval(), tokens(2, 20)
    truth = model(ids)
    cache = KVCache(model.config, batch=2, max_length=20, dtype=torch.float64)
    close(torch.cat([model(ids[:, a:b], kv_cache=cache) for a, b in ((0, 9), (9, 10), (10, 20))], dim=1), truth)
    packed = model(ids, cu_seqlens=torch.tensor([0, 7, 40], dtype=torch.int32))
    close(packed[:1, :7], model(ids[:1, :7]))
    close(packed[0, 7:], model(ids[:1, 7:])[0])
    gradients = []
    for mode in ("none", "selective", "full"):
        model.train().zero_grad()
        model.model.activation_checkpointing = mode
        (model(ids).sin().sum() + router_loss(model, 10.0, 0.1)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        for a, b in zip(gradients[0], gradients[-1]):
            close(a, b)
        assert all(layer.router_logits is None for layer in layers(model)), "the recomputed forward must leave nothing behind"


def test_float64_stays_float64():
    from torch.utils._python_dispatch import TorchDispatchMode
    model, seen = tiny(**SHAPES["shared experts"]), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.update(t.dtype for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t) and t.is_floating_point())
            return out

    with Watch():
        (model.train()(tokens(1, 9)).sum() + router_loss(model, 1.0, 1.0)).backward()
    assert seen == {torch.float64}


# ------------------------------------------------------------------------------------------------------------ the losses


def test_load_balancing_loss_by_hand():
    """Two tokens, three experts, k = 1: choices 0 and 1, so f = (1/2, 1/2, 0)."""
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]], dtype=torch.float64))
    assert moe.load_balancing_loss(logits, 1).item() == pytest.approx(3 * (0.5 * 0.3 + 0.5 * 0.4), abs=1e-12)
    assert moe.load_balancing_loss(logits, 1, torch.tensor([True, False])).item() == pytest.approx(3 * 0.5, abs=1e-12)
    assert moe.load_balancing_loss(torch.zeros(6, 4), 2).item() == pytest.approx(2)  # even probabilities: k
    collapsed = torch.tensor([[50.0, 0, 0, 0]]).expand(6, 4)
    assert moe.load_balancing_loss(collapsed, 1).item() == pytest.approx(4)  # all on one of four: E


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    a, b = math.log(2) ** 2, (1 + math.log(2)) ** 2
    assert moe.router_z_loss(logits).item() == pytest.approx((a + b) / 2, abs=1e-12)
    assert moe.router_z_loss(logits, torch.tensor([[False, True]])).item() == pytest.approx(b, abs=1e-12)


def test_load_balancing_loss_equals_that_of_transformers():
    theirs = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="transformers is not installed").load_balancing_loss_func
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(24, 6, generator=generator) for _ in range(3))
    mask = torch.rand(2, 12, generator=generator) < 0.7
    for k in (1, 2, 4):
        assert moe.load_balancing_loss(torch.cat(logits), k).item() == pytest.approx(float(theirs(logits, 6, k)), rel=1e-6)
        masked = moe.load_balancing_loss(torch.cat(logits), k, mask.flatten().repeat(3)).item()
        assert masked == pytest.approx(float(theirs(logits, 6, k, mask)), rel=1e-6)
        one = moe.load_balancing_loss(logits[0], k, mask).item()
        assert one == pytest.approx(float(theirs(logits[:1], 6, k, mask)), rel=1e-6)


def test_losses_are_of_the_last_forward_in_training_and_taken_once():
    model, ids = tiny(**SHAPES["mixtral"]), tokens(2, 8)
    model.train()(ids)
    expected = sum(0.5 * moe.load_balancing_loss(layer.router_logits, 2) + 0.25 * moe.router_z_loss(layer.router_logits)
                   for layer in layers(model)) / 2
    assert expected.item() == pytest.approx(router_loss(model, 0.5, 0.25).item(), abs=1e-12) and expected.requires_grad
    assert router_loss(model, 0.5) == 0.0
    model.eval()(ids)
    assert router_loss(model, 0.5) == 0.0, "evaluation leaves no logits"
    with torch.no_grad():
        model.train()(ids)
    assert router_loss(model, 0.5) == 0.0, "nor does a forward without gradients"
    assert router_loss(tiny(), 0.5) == 0.0, "nor a model without experts"


def test_z_loss_of_accumulated_micro_batches_is_that_of_the_batch():
    model, ids = tiny(**SHAPES["mixtral"]).train(), tokens(6, 8)
    model(ids)
    whole = torch.autograd.grad(router_loss(model, 0.0, 1.0), [p for p in model.parameters() if p is not model.lm_head.weight],
                                allow_unused=True)
    parts = []
    for i in (0, 4):
        part = ids[i : i + 4]
        model(part)
        share = part.numel() / ids.numel()  # 4 and 2 rows of 6
        parts.append(torch.autograd.grad(share * router_loss(model, 0.0, 1.0), [p for p in model.parameters() if p is not model.lm_head.weight],
                                         allow_unused=True))
    for a, *b in zip(whole, *parts):
        if a is not None:
            close(a, sum(b))


def test_the_loss_evens_out_a_router_that_had_collapsed():
    """All tokens share a direction, and the router sends that to expert 0; a hundred steps on the loss alone undo it."""
    torch.manual_seed(0)
    layer, x = MoE(8, 8, 4, 1, True).double(), torch.randn(256, 8, dtype=torch.float64)
    x[:, 0] += 3
    layer.gate.weight.data = torch.randn(4, 8, dtype=torch.float64) / 8
    layer.gate.weight.data[0, 0] = 1.0
    optimizer = torch.optim.Adam([layer.gate.weight], lr=0.05)

    def loads() -> list[int]:
        return dispatch(x, route(layer.gate(x), 1, True)[1], 4)[1].tolist()

    assert max(loads()) > 200
    for _ in range(100):
        optimizer.zero_grad()
        moe.load_balancing_loss(layer.gate(x), 1).backward()
        optimizer.step()
    assert max(loads()) < 100 and min(loads()) > 30


# ------------------------------------------------------------------------------------- weights, names, optimizers, counts


def test_initial_weights_of_an_expert_do_not_depend_on_how_many_there_are():
    few, many = tiny(num_experts=4), tiny(num_experts=7)
    for name in ("gate_proj", "up_proj", "down_proj"):
        a, b = (model.get_parameter(f"model.layers.1.mlp.experts.{name}") for model in (few, many))
        assert torch.equal(a, b[:4]) and not torch.equal(a[0], a[1])
    down, up = many.model.layers[0].mlp.experts.down_proj, many.model.layers[0].mlp.experts.up_proj
    assert down.std().item() / up.std().item() == pytest.approx(1 / math.sqrt(2 * 2), rel=0.05)  # 2 layers


@pytest.mark.parametrize("shape", SHAPES)
def test_folders_have_hugging_faces_names_and_come_back(shape, tmp_path):
    model = tiny(**SHAPES[shape]).float()
    save_model(tmp_path, model)
    stored, E = read_safetensors(tmp_path / "model.safetensors"), model.config.num_experts
    block, up = ("block_sparse_moe", "w3") if shape == "mixtral" else ("mlp", "up_proj")
    stack = model.model.layers[1].mlp.experts.up_proj
    for e in range(E):
        assert torch.equal(stored[f"model.layers.1.{block}.experts.{e}.{up}.weight"], stack[e])
    assert f"model.layers.1.{block}.gate.weight" in stored and not any(name.endswith("experts.up_proj") for name in stored)
    assert stored.keys() == hf_tensors(model).keys() == {n for n in stored if stored[n].dim() <= 2}
    back = load_model(tmp_path)
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters()))


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])
def test_resumed_training_of_experts_is_bitwise_the_undisturbed_one(name, tmp_path):
    def train(model, optimizer, steps):
        for step in steps:
            ids = tokens(2, 9, seed=step)
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()) + router_loss(model, 0.01, 0.001)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    class Tokenizer:
        bos_token_id = eos_token_id = pad_token_id = None

        def save(self, folder):
            pass

    models = [tiny(**SHAPES["qwen3_moe, some layers"]).train() for _ in range(2)]
    optimizers = [build_optimizer(name, model.named_parameters(), lr=1e-2) for model in models]
    train(models[0], optimizers[0], range(4))
    train(models[1], optimizers[1], range(2))
    folder = save_checkpoint(tmp_path, 2, model=models[1], optimizer=optimizers[1], tokenizer=Tokenizer(), state={})
    resumed = tiny(seed=5, **SHAPES["qwen3_moe, some layers"]).train()
    optimizer = build_optimizer(name, resumed.named_parameters(), lr=1e-2)
    load_checkpoint(folder, resumed, optimizer)
    train(resumed, optimizer, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), resumed.parameters()))


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_each_expert_is_a_matrix_of_its_own_to_the_optimizer(name):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1])[:, None, None]
    gradients = [torch.randn(3, 6, 4, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 3.0, 1.0])[:, None, None] for _ in range(3)]
    stack, alone = torch.nn.Parameter(start.clone()), [torch.nn.Parameter(start[e].clone()) for e in range(3)]
    optimizers = (build_optimizer(name, [("mlp.experts.up_proj", stack)], lr=0.05),
                  build_optimizer(name, [(f"mlp.experts.{e}.up_proj.weight", p) for e, p in enumerate(alone)], lr=0.05))
    for gradient in gradients:
        stack.grad = gradient.clone()
        for p, g in zip(alone, gradient):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    close(stack, torch.stack([p.detach() for p in alone]), 1e-12)
    assert (stack - start).abs().amax((1, 2)).min() > 1e-4


def test_counts_are_of_all_experts_and_of_those_a_token_sees():
    for shape in SHAPES.values():
        model = tiny(**shape)
        c = model.config
        assert num_parameters(c) == sum(p.numel() for p in model.parameters())
        unseen = len(layers(model)) * (c.num_experts - c.num_experts_per_tok) * 3 * c.hidden_size * c.moe_intermediate_size
        assert num_parameters(c, active=True) == num_parameters(c) - unseen
        lookup = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
        attention = 12 * c.num_hidden_layers * c.hidden_size * 16
        assert flops_per_token(c, 16) == 6 * (num_parameters(c) - unseen - lookup) + attention


def test_published_sizes():
    mixtral = ModelConfig(32000, 4096, 14336, 32, 32, 8, num_experts=8)
    assert mixtral.model_type == "mixtral" and num_parameters(mixtral) == 46_702_792_704  # "46.7B total parameters
    assert round(num_parameters(mixtral, active=True) / 1e9, 1) == 12.9  # ... but only uses 12.9B parameters per token"
    qwen = ModelConfig(151936, 2048, 6144, 48, 32, 4, 128, qk_norm=True, num_experts=128, num_experts_per_tok=8,
                       moe_intermediate_size=768)
    assert qwen.model_type == "qwen3_moe" and round(num_parameters(qwen) / 1e9, 1) == 30.5
    assert int(num_parameters(qwen, active=True) / 1e8) == 33  # Qwen3-30B-A3B's card: 30.5 B in total, 3.3 B activated


@pytest.mark.parametrize("change, complaint", [
    (dict(num_experts=2, num_experts_per_tok=3), "num_experts_per_tok 3 is more than num_experts 2"),
    (dict(num_experts=4, model_type="llama"), "model_type 'llama' has no such combination .*num_experts=4"),
    (dict(num_experts=4, model_type="mixtral", norm_topk_prob=False), "no such combination"),
    (dict(num_experts=4, decoder_sparse_step=0), "decoder_sparse_step is 0; it must be at least 1"),
    (dict(num_experts=4, n_shared_experts=1, model_type="mixtral"), "no such combination"),
])
def test_impossible_mixtures_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        tiny(**change)
