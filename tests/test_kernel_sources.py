"""kernels/*.py, read as text: what Triton's interpreter hides or lacks, and what every kernel file owes its users."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for path in (ROOT / "kernels").glob("*.py") if "triton" in path.read_text(encoding="utf-8"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def calls(path: Path, *names: str) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]


@each_file
def test_masked_loads_say_what_is_loaded_elsewhere(path):
    """The interpreter gives 0 there, a GPU whatever lies in the register."""
    for call in calls(path, "tl.load"):
        given = {keyword.arg for keyword in call.keywords}
        assert "mask" not in given or "other" in given, f"{path.name}:{call.lineno}"


@each_file
def test_float32_products_are_not_rounded_to_tf32(path):
    for call in calls(path, "tl.dot"):
        assert any(k.arg == "input_precision" and k.value.value == "ieee" for k in call.keywords), call.lineno


@each_file
def test_nothing_that_some_triton_or_the_interpreter_lacks(path):
    text = path.read_text(encoding="utf-8")
    for name in ("libdevice.", "inline_asm", "make_block_ptr", "atomic_", "autotune", "triton_op", "gluon"):
        assert name not in text, name


@each_file
def test_kernels_launch_on_the_device_of_their_tensors(path):
    """Triton launches on the current device: tensors on a second GPU would be read from the first."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.With) and "torch.cuda.device" in
               ast.unparse(block.items[0].context_expr) for node in ast.walk(block)}
    launches = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
                and ast.unparse(node.func.value).endswith("kernel")]
    assert launches
    for node in launches:
        assert id(node) in guarded, f"{path.name}:{node.lineno}"


@each_file
def test_forward_and_backward_are_operators_with_fakes(path):
    """Opaque to torch.compile, FSDP and checkpointing; each has the shapes that tracing needs."""
    text = path.read_text(encoding="utf-8")
    assert text.count("torch.library.custom_op(") == text.count(".register_fake") >= 1


THRICE = """
import torch
from kernels import adam8bit, cross_entropy, flash_attention, int4, int8_fp8, nf4, rms_norm, rope, swiglu
x, w, q = torch.randn(6, 64), torch.randn(32, 64), torch.randn(1, 6, 2, 8)
int4_w, nf4_w, int8_w = int4.int4_quantize(w, 32), nf4.nf4_quantize(w), int8_fp8.quantize_rows(w)
state, tables = adam8bit.adam8bit_state(w), rope.rope_tables(torch.arange(6)[None], 8)
for step in (1, 2, 3):
    flash_attention.flash_attn_func(q, q, q, causal=True)
    cross_entropy.linear_cross_entropy(x, w, torch.zeros(6, dtype=torch.int64))
    rms_norm.rms_norm(x, w[0]), rope.apply_rope(q, q, *tables), swiglu.swiglu(x, x)
    nf4.nf4_linear(x, nf4_w), int4.int4_linear(x, int4_w), int8_fp8.linear_8bit(x, *int8_w)
    adam8bit.adam8bit_update(w, w, *state, lr=1e-3, step=step)
"""


def test_a_cpu_announces_each_reference_once():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", THRICE], cwd=ROOT, capture_output=True, text=True,
                          env=environment | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "Warning" in line]
    for name in ("flash_attention.py", "cross_entropy", "rms_norm", "rope", "swiglu", "nf4", "int4", "int8_fp8", "adam8bit"):
        assert sum(name in line for line in said) == 1, done.stderr
