"""What the tests of several kernels share. Without a GPU the kernels run in Triton's interpreter."""

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.float16  # the interpreter computes bfloat16 wrongly; the gpu tests have it


def needs_kernel(module):
    """Skips a test where the kernels of `module` cannot run."""
    return pytest.mark.skipif(DEVICE.type == "cpu" and not module.INTERPRETED,
                              reason="needs Triton, and TRITON_INTERPRET=1 without a GPU")


@pytest.fixture(autouse=True)
def dirty_memory(monkeypatch):
    """Whatever a kernel forgets to write into torch.empty's memory is NaN. For the files that import it."""
    empty = torch.empty

    def dirty(*size, **options):
        tensor = empty(*size, **options)
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))  # checkpoint() makes an empty leaf, which no in-place call may change
        return tensor

    torch.use_deterministic_algorithms(True, warn_only=True)  # fills the memory that C++ asks for, as new_empty does
    monkeypatch.setattr(torch, "empty", dirty)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def assert_close(ours, truth, tolerances=(1e-5, 1e-5, 1e-4, 1e-4)):
    for index, (a, b) in enumerate(zip(ours, truth, strict=True)):
        assert a.shape == b.shape
        assert not a.isnan().any() and (not a.numel() or (a - b).abs().max() <= tolerances[index]), index


def half_rule(ours, same_dtype, truth):
    """flash-attention's: at most twice the error that plain PyTorch makes in the same dtype."""
    truth = truth.float()
    rounding = 2 * ((truth.to(ours.dtype) + 0.3 - 0.3).float() - truth).abs().max()
    assert (ours.float() - truth).abs().max() <= 2 * (same_dtype.float() - truth).abs().max() + rounding
