"""The truth for the tests of parallel/: three optimizer steps of a tiny float64 model in one process.

Batches have uneven numbers of counted labels, one microbatch none at all; the loss is the sum over counted tokens divided
by their number in the whole batch."""

import torch
import torch.nn.functional as F

from model import CausalLM, ModelConfig
from optim import build_optimizer

TOLERANCE = 1e-9


def tiny_model(seed: int = 1, **changes) -> CausalLM:
    """4 layers, 4 heads, 2 of keys, 16 wide, 37 tokens, unless `changes` say otherwise; biases and norms not trivial."""
    shape = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, initializer_range=0.2)
    model = CausalLM(ModelConfig(**shape | changes), seed).double().train()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def batches(steps: int = 3, microbatches: int = 4, rows: int = 2, length: int = 8, vocab: int = 37) -> list:
    """[step][microbatch] = (input_ids (rows, length), labels); microbatch 1 has no counted label."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(vocab, (steps, microbatches, rows, length + 1), generator=generator)
    labels = ids[..., 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    if microbatches > 1:
        labels[:, 1] = -100
    return [[(ids[s, i, :, :-1].contiguous(), labels[s, i]) for i in range(microbatches)] for s in range(steps)]


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")


def adamw(named_parameters):
    return build_optimizer("adamw", named_parameters, lr=1e-2, weight_decay=0.1)


def named(module, what: str = "grad") -> dict:
    """{parameter's name: a copy of its gradient, or with what="data" of its values}."""
    return {name: getattr(p, what).detach().clone() for name, p in module.named_parameters()}


def train(model: CausalLM, data: list) -> list[dict]:
    """Per step {"loss", "grads", "params" after it}."""
    optimizer, history = adamw(model.named_parameters()), []
    for step in data:
        counted = sum(int((labels != -100).sum()) for _, labels in step)
        loss = 0.0
        for input_ids, labels in step:
            part = summed_loss(model(input_ids), labels) / counted
            part.backward()
            loss += part.item()
        grads = named(model)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": loss, "grads": grads, "params": named(model, "data")})
    return history


def assert_same(ours: list[dict], truth: list[dict]) -> None:
    """Loss, every gradient and every parameter of every step, to 1e-9."""
    assert len(ours) == len(truth)
    for step, (mine, true) in enumerate(zip(ours, truth)):
        assert abs(mine["loss"] - true["loss"]) < TOLERANCE, f"step {step}: loss {mine['loss']}, not {true['loss']}"
        for kind in ("grads", "params"):
            assert mine[kind].keys() == true[kind].keys()
            for name, tensor in true[kind].items():
                error = (mine[kind][name] - tensor).abs().max().item()
                assert error < TOLERANCE, f"step {step}: {kind} of {name} differ by {error:.2e}"
