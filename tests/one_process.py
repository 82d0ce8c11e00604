"""What the tests of data-parallel strategies compare with: the same three steps of a tiny model on one process, float64."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from model import CausalLM, ModelConfig
from optim import build_optimizer, clip_grad_norm

ROWS, LENGTH, STEPS, CLIP = 16, 6, 3, 0.5
LR = {"adamw": 0.01, "lion": 0.003, "muon": 0.01, "adafactor": 0.05}


def tiny_model(**shape) -> CausalLM:
    """Two layers, float64; no size is a multiple of 4 or 8, and the head has an uneven vocabulary."""
    shape = dict(vocab_size=37, hidden_size=10, intermediate_size=14, num_hidden_layers=2, num_attention_heads=1,
                 initializer_range=0.3) | shape
    return CausalLM(ModelConfig(**shape)).double()


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids, labels (16, 6): rows count 0 to 6 tokens, the last four rows none at all (a rank fully masked)."""
    generator = torch.Generator().manual_seed(step)
    ids, labels = torch.randint(37, (2, ROWS, LENGTH), generator=generator)
    labels[torch.rand(ROWS, LENGTH, generator=generator) < torch.arange(ROWS)[:, None] / 12] = -100
    return ids, labels


def loss_sum(model, ids, labels) -> torch.Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def micro_batches(step: int, rank: int, world: int, count: int):
    """This rank's rows of the global batch in `count` microbatches."""
    ids, labels = (x.chunk(world)[rank].chunk(count) for x in global_batch(step))
    return list(zip(ids, labels))


def optimizer_of(model, name: str):
    return build_optimizer(name, model.named_parameters(), lr=LR[name], weight_decay=0.1)


def train_alone(name: str = "adamw", model: CausalLM | None = None, count: int = 1, world: int = 1) -> dict:
    """losses, norms, gradients (before clipping, of each step) and parameters after three steps on the whole batch."""
    model = model or tiny_model()
    optimizer, result = optimizer_of(model, name), {"losses": [], "norms": [], "grads": []}
    for step in range(STEPS):
        counted = int((global_batch(step)[1] != -100).sum())
        loss = loss_sum(model, *global_batch(step)) / counted
        loss.backward()
        result["losses"].append(loss.item())
        result["grads"].append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        result["norms"].append(clip_grad_norm(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    result["parameters"] = {n: p.detach().clone() for n, p in model.named_parameters()}
    return result


def whole_gradients(model, pieces) -> dict:
    """The gradients as one process has them, put together from the pieces of ZeRO that all ranks hold."""
    names = {id(p): name for name, p in model.named_parameters()}
    whole = {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in model.named_parameters() if p.requires_grad}
    for piece in pieces:
        if piece.grad is not None:
            whole[names[id(piece.whole)]].view(-1)[piece.start : piece.start + piece.numel()] = piece.grad.flatten()
    for grad in whole.values():
        dist.all_reduce(grad)
    return whole


def clip_pieces(pieces) -> float:
    """clip_grad_norm over the pieces of all ranks -> the norm before."""
    grads = [piece.grad for piece in pieces if piece.grad is not None]
    total = sum((grad.square().sum() for grad in grads), torch.zeros((), dtype=torch.float64))
    dist.all_reduce(total)
    for grad in grads:
        grad.mul_((CLIP / (total.sqrt() + 1e-6)).clamp_max(1.0))
    return total.sqrt().item()


def assert_close(found: dict, truth: dict, tolerance: float = 1e-9) -> None:
    """Every number that `found` has is the truth's."""
    for key, value in found.items():
        for a, b in zip(value, truth[key]) if isinstance(value, list) else [(value, truth[key])]:
            if isinstance(a, dict):
                assert a.keys() == b.keys()
                for name in a:
                    assert a[name].shape == b[name].shape, name
                    error = (a[name] - b[name]).abs().max().item()
                    assert error <= tolerance, f"{key} {name}: off by {error:.1e}"
            else:
                assert abs(a - b) <= tolerance, f"{key}: {a} instead of {b}"
