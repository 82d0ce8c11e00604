"""Puts the project on the import path, and finds the real-data folder that some tests compare with."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the models in tests are tiny: one thread is faster, and deterministic
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: kernels then run on the CPU, slowly


@pytest.fixture
def gpu() -> torch.device:
    """The CUDA device, for tests marked `gpu`, which skip themselves where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real corpora, tokenizers and checkpoints beside the project; $GLASSBOX_DATA names another place."""
    path = Path(os.environ.get("GLASSBOX_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real data not found at {path} (set GLASSBOX_DATA to its folder)")
    return path
