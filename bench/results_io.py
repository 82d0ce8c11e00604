"""One shape for every measured table: bench/results/NAME.json = {device, versions, commit, rows}."""

import importlib.util
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("triton", "flash_attn", "liger_kernel", "bitsandbytes", "torchao")  # those that are installed


def device_name() -> str:
    """The GPU's name where there is one, else the CPU's kind and its count of cores."""
    import torch  # late: a bench of data code alone should not wait for torch before it measures

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU, {os.cpu_count()} cores"


def git_commit() -> str:
    """Short hash of HEAD, marked '+' when tracked files differ from it; 'unknown' outside a git checkout."""
    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_results(name: str, rows: list[dict], quiet: bool = False) -> dict:
    """Write `rows` to bench/results/`name`.json with what they were measured on; return it, print it unless quiet."""
    versions = {"python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in ("torch", "numpy", "tiktoken", "sentencepiece")}
    versions |= {package: metadata.version(package) for package in PEERS if importlib.util.find_spec(package)}
    result = {"device": device_name(), "versions": versions, "commit": git_commit(), "rows": rows}
    path = ROOT / "bench" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    if not quiet:
        print(json.dumps(result, indent=1), f"-> {path}", sep="\n")
    return result
