"""How long a Hugging Face folder of 1 GB takes to load, and in how much memory, beside just reading its files.

    python bench/bench_load.py

A Llama in bfloat16, in 4 shards, in a temporary folder. Each load is a process of its own; the ways take turns, so that
a busy machine slows all alike, and a row has its way's best times, the processor's own (kernel included) beside the
clock's. All find the files in the system's cache (they have just been written). `read` reads every shard into memory
that is asked for anew, as a model's must be. Of the memory that the process grew by, the pages mapped from the files
(which the system may drop) are counted apart.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WAYS = ("read", "load_model", "load_model, float32", "load_model, mapped")


def make_folder(folder: Path, gigabytes: float, shards: int = 4) -> None:
    import torch
    from checkpoint import write_json, write_safetensors
    from model import CausalLM, ModelConfig, num_parameters
    shape = dict(vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_attention_heads=16)
    layers = 1
    while 2 * num_parameters(ModelConfig(num_hidden_layers=layers + 1, **shape)) <= gigabytes * 1e9:
        layers += 1
    config = ModelConfig(num_hidden_layers=layers, **shape)
    with torch.device("meta"):
        names = [(name, p.shape) for name, p in CausalLM(config).named_parameters()]
    write_json(folder / "config.json", config.to_hf() | {"torch_dtype": "bfloat16"})
    weight_map = {name: f"model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors"
                  for i, (name, _) in enumerate(names)}
    noise = torch.randn(1 << 20, dtype=torch.bfloat16)  # drawing 500 million numbers would take minutes
    for file in sorted(set(weight_map.values())):
        write_safetensors(folder / file, {
            name: noise.repeat(size.numel() // len(noise) + 1)[:size.numel()].view(size)
            for name, size in names if weight_map[name] == file}, {"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def memory() -> dict[str, int]:
    """Bytes of this process: its own and those mapped from files, and its peak of both; empty where /proc is not."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    return {key: int(value.split()[0]) * 1024 for key, _, value in (line.partition(":") for line in lines)
            if key in ("RssAnon", "RssFile", "VmHWM")}


def measure(way: str, folder: Path) -> dict:
    """In a process of its own: seconds, and how memory grew."""
    import torch
    from checkpoint import load_model
    torch.set_num_threads(1)
    before, begin, begin_cpu = memory(), time.perf_counter(), time.process_time()
    if way == "read":
        kept = []
        for file in sorted(folder.glob("*.safetensors")):
            kept.append(torch.empty(file.stat().st_size, dtype=torch.uint8))
            with open(file, "rb", buffering=0) as opened:
                assert opened.readinto(kept[-1].numpy()) == len(kept[-1])
    else:
        kept = load_model(folder, dtype=torch.float32 if "float32" in way else None, mapped="mapped" in way)
        if "mapped" in way:
            begin_use, begin_cpu_use = time.perf_counter(), time.process_time()
            sum(float(p.view(-1)[::2048].sum()) for p in kept.parameters())  # touch every page, as a forward would
            begin += time.perf_counter() - begin_use
            begin_cpu += time.process_time() - begin_cpu_use
    seconds, cpu_seconds, after = time.perf_counter() - begin, time.process_time() - begin_cpu, memory()
    grown = {key: after[key] - before[key] for key in before}
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "own": grown.get("RssAnon", 0),
            "mapped": grown.get("RssFile", 0), "peak": grown.get("VmHWM", 0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help="one load, in this process")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]))))
        return
    from bench.results_io import write_results
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), args.gigabytes)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        found = {way: [] for way in WAYS}
        for _ in range(args.runs):
            for way in WAYS:
                command = [sys.executable, str(ROOT / "bench" / "bench_load.py"), "--measure", way, folder]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[way].append(json.loads(done.stdout))
    best = {way: {key: min(run[key] for run in runs) for key in runs[0]} for way, runs in found.items()}
    rows = [{"way": way, "gigabytes": round(size / 1e9, 3), "seconds": round(row["seconds"], 3),
             "times_reading": round(row["seconds"] / best["read"]["seconds"], 2),
             "times_reading_cpu": round(row["cpu_seconds"] / best["read"]["cpu_seconds"], 2)}
            | {f"gigabytes_{kind}": round(row[kind] / 1e9, 3) for kind in ("own", "mapped", "peak")}
            for way, row in best.items()]
    write_results("load", rows)


if __name__ == "__main__":
    main()
