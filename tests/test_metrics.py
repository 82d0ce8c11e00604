"""metrics.py: what is logged is read back exactly, and what the report draws is what was logged."""

import html.parser
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import metrics


def write_rows(path, count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for step in range(1, count + 1):
        noise = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        rows.append({"kind": "train", "step": step, "loss": 2 + 5 / step + noise[0], "lr": 1e-3 * noise[1],
                     "grad_norm": noise[2], "tokens": 768 * step, "tokens_per_second": 1e4 * noise[3],
                     "seconds": 0.07 * step, "memory_bytes": 300 * 2**20})
        if step % 10 == 0:
            rows.append({"kind": "eval", "step": step, "loss": 2 + noise[0], "bits_per_byte": 1.5 + noise[1]})
    for row in rows:
        metrics.append_row(path, row)
    return rows


# ------------------------------------------------------------------------------------------------------- metrics.jsonl


def test_rows_come_back_exactly(tmp_path):
    rows = write_rows(tmp_path / "m.jsonl")
    rows.append({"kind": "train", "step": 41, "loss": 0.1 + 0.2, "note": "Zürich"})
    metrics.append_row(tmp_path / "m.jsonl", rows[-1])
    assert metrics.read_rows(tmp_path / "m.jsonl") == rows
    assert (tmp_path / "m.jsonl").read_bytes().count(b"\n") == len(rows)


def test_not_finite_is_null_and_the_file_strict_json(tmp_path):
    for loss in (math.nan, math.inf, -math.inf):
        metrics.append_row(tmp_path / "m.jsonl", {"step": 1, "loss": loss})
    for line in (tmp_path / "m.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None}
    assert [row["loss"] for row in metrics.read_rows(tmp_path / "m.jsonl")] == [None] * 3


def test_a_file_cut_anywhere_loses_only_the_line_it_was_cut_in(tmp_path):
    path, rows = tmp_path / "m.jsonl", [{"step": 1, "loss": 0.25}, {"step": 2}, {"step": 3, "loss": None}]
    for row in rows:
        metrics.append_row(path, row)
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = whole[:size].count(b"\n")
        got = metrics.read_rows(path)
        assert got[:complete] == rows[:complete]
        assert len(got) <= complete + (whole[size : size + 1] == b"\n")  # only the newline missing: the row is whole
        metrics.drop_rows_after(path, 10**9)
        metrics.append_row(path, {"step": 99})  # after mending, appending is safe
        assert metrics.read_rows(path) == [*got, {"step": 99}]


@pytest.mark.parametrize("bad", [b"{\"step\": 1", b"[1]", b"\xff\xfe", b"3"])
def test_a_malformed_line_is_named(tmp_path, bad):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 3}\n')
    for read in (metrics.read_rows, lambda p: metrics.drop_rows_after(p, 1)):
        with pytest.raises(ValueError, match=r"m\.jsonl:2: ") as error:
            read(path)
        assert "\n" not in str(error.value)


def test_drop_rows_after_keeps_bytes_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "m.jsonl"
    rows = write_rows(path)
    before = path.read_bytes().splitlines(keepends=True)
    metrics.drop_rows_after(path, 20)
    assert metrics.read_rows(path) == [row for row in rows if row["step"] <= 20]
    assert path.read_bytes() == b"".join(before[:22])  # 20 train rows and 2 eval rows
    assert os.listdir(tmp_path) == ["m.jsonl"]
    stamp = path.stat().st_mtime_ns, path.stat().st_ino
    metrics.drop_rows_after(path, 20)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == stamp  # nothing to do: not touched
    metrics.drop_rows_after(path, -1)
    assert path.read_bytes() == b""
    metrics.drop_rows_after(tmp_path / "absent.jsonl", 0)
    assert os.listdir(tmp_path) == ["m.jsonl"]


# --------------------------------------------------------------------------------------- memory, FLOPs, progress, spike


def test_memory_is_the_peak_in_bytes():
    """A process that fills 256 MiB and frees them reports that much more than one that does not, whoever started it."""
    pytest.importorskip("resource", reason="no `resource` on this system: memory_bytes is 0 there")
    code = "import metrics, torch; torch.ones({} * 2**20, dtype=torch.uint8); print(metrics.memory_bytes('cpu'))"
    root = Path(metrics.__file__).parent
    small, large = (int(subprocess.check_output([sys.executable, "-c", code.format(n)], cwd=root)) for n in (1, 256))
    assert 200 * 2**20 < large - small < 320 * 2**20


def test_device_by_name():
    assert metrics.detect_device("cpu") == torch.device("cpu")
    assert metrics.detect_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="--device cuda:77"):
        metrics.detect_device("cuda:77")


def test_published_peaks():
    peak = lambda name, dtype: metrics.peak_flops("cuda", dtype, name=name)  # noqa: E731
    assert peak("NVIDIA H200", torch.bfloat16) == 989.4e12
    assert peak("NVIDIA H100 80GB HBM3", "float16") == 989.4e12
    assert peak("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert peak("Tesla V100-SXM2-16GB", "float16") == 125e12 and peak("Tesla V100-SXM2-16GB", "bfloat16") is None
    assert peak("NVIDIA GeForce RTX 4090", "bfloat16") == 165.2e12
    assert peak("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16") is None
    assert peak("Unheard Of 9000", "bfloat16") is None
    assert metrics.peak_flops("cpu", torch.float32) is None
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert peak("NVIDIA A100-SXM4-40GB", torch.float32) == 19.5e12
        torch.set_float32_matmul_precision("high")
        assert peak("NVIDIA A100-SXM4-40GB", torch.float32) == 156e12
        assert peak("Tesla V100-SXM2-16GB", torch.float32) == 15.7e12  # has no TF32
    finally:
        torch.set_float32_matmul_precision(before)


def test_measured_peak_is_of_the_order_of_a_cpu():
    assert 1e8 < metrics.measured_peak_flops("float32", size=256, seconds=0.02) < 1e14


def test_progress_line():
    row = {"step": 500, "loss": 1.23456, "lr": 3e-4, "grad_norm": 0.5, "tokens_per_second": 12345.6}
    assert metrics.progress_line(row, 2000, 100.0, 0.412) == (
        "step  500/2000  loss 1.2346  lr 3.00e-04  grad 0.50  12,346 tok/s  MFU 41.2 %  ETA 0:05:00")
    resumed = metrics.progress_line(row, 2000, 100.0, start_step=400)  # 100 updates in 100 s, 1500 to go
    assert resumed.endswith("tok/s  ETA 0:25:00")
    assert "ETA" not in metrics.progress_line(row, 2000, 100.0, start_step=500)
    assert metrics.clock(3725.9) == "1:02:05" and metrics.clock(360_000) == "100:00:00"


def test_spike_needs_history_and_threshold():
    history = []
    for k in range(50):  # mean 2, std 0.1
        assert not metrics.is_spike(history[:19], 100.0, 3.0)
        history = metrics.accept_loss(history, 2.1 if k % 2 else 1.9)
    assert not metrics.is_spike(history, 2.2999, 3.0) and metrics.is_spike(history, 2.3001, 3.0)
    assert not metrics.is_spike(history, 2.3001, 4.0)
    assert not metrics.is_spike(history, -100.0, 3.0)  # a loss that falls is welcome
    assert all(metrics.is_spike([], loss, 3.0) for loss in (math.nan, math.inf, -math.inf))
    assert not metrics.is_spike([2.0] * 50, 2.005, 3.0) and metrics.is_spike([2.0] * 50, 2.007, 3.0)
    assert json.loads(json.dumps(history)) == history


def test_spike_window():
    history = [9.0] * 100
    for _ in range(60):
        history = metrics.accept_loss(history, 1.0)
    assert history == [1.0] * 50
    assert metrics.is_spike([9.0] * 30 + [1.0] * 50, 2.0, 3.0)  # the nines have left the window
    assert metrics.is_spike([1.0] * 30 + [9.0] * 30, 20.0, 1.0, window=30)
    assert metrics.accept_loss([1.0, 2.0, 3.0], 4.0, window=2) == [3.0, 4.0]


# --------------------------------------------------------------------------------------------------------- report.html


class Report(html.parser.HTMLParser):
    """Collects the tags, the text and the curves of a report, as a browser would see them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.curves, self.svg = [], "", {}, None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.svg = attributes if tag == "svg" else self.svg
        if "data-series" in attributes:
            axes = json.loads(self.svg["data-x"]), json.loads(self.svg["data-y"])
            self.curves[attributes["data-series"]] = json.loads(attributes["data-points"]), attributes["d"], axes

    def handle_data(self, data):
        self.text += data


def pixels(d):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+?) ([\d.]+)", d)]


@pytest.mark.parametrize("count", [1, 2, 40, 1500])
def test_curves_equal_the_metrics(tmp_path, count):
    rows = write_rows(tmp_path / "metrics.jsonl", count)
    report = Report(metrics.write_report(tmp_path))
    keys = {"train": ("loss", "lr", "grad_norm", "tokens_per_second"), "eval": ("loss", "bits_per_byte")}
    expected = {f"{k}.{key}" for k in keys for key in keys[k] if any(row["kind"] == k for row in rows)}
    assert set(report.curves) == expected
    for name, (points, d, ((x0, x1), (y0, y1))) in report.curves.items():
        kind, key = name.split(".")
        assert points == [[row["step"], row[key]] for row in rows if row["kind"] == kind]  # in full precision
        drawn = pixels(d)
        assert len(drawn) == len(points)
        for (x, y), (step, value) in zip(drawn, points):
            assert abs(x0 + (x - metrics.LEFT) / (metrics.RIGHT - metrics.LEFT) * (x1 - x0) - step) <= 1e-4 * (x1 - x0)
            part = (metrics.BOTTOM - y) / (metrics.BOTTOM - metrics.TOP)
            assert abs(y0 + part * (y1 - y0) - value) <= 1e-4 * (y1 - y0)
            assert -1e-9 <= part <= 1 + 1e-9


def test_a_stage_of_other_quantities_has_their_curves(tmp_path):
    for step in (1, 2):
        row = {"kind": "train", "step": step, "reward": 0.25 * step, "ok": True}
        metrics.append_row(tmp_path / "metrics.jsonl", row)
    assert Report(metrics.write_report(tmp_path)).curves["train.reward"][0] == [[1, 0.25], [2, 0.5]]


def test_values_that_are_not_finite_are_gaps(tmp_path):
    losses = [1.0, 2.0, math.nan, 3.0, math.inf, 4.0]
    for step, loss in enumerate(losses, 1):
        metrics.append_row(tmp_path / "metrics.jsonl", {"kind": "train", "step": step, "loss": loss, "lr": math.nan})
    report = Report(metrics.write_report(tmp_path))
    points, d, _ = report.curves["train.loss"]
    assert points == [[1, 1.0], [2, 2.0], [3, None], [4, 3.0], [5, None], [6, 4.0]]
    assert d.count("M") == 3 and d.count("L") == 1 and len(pixels(d)) == 4
    assert "2 not finite" in report.text and "train.lr" not in report.curves


@pytest.mark.parametrize("values", [[0.0, 0.0], [2.0, 2.0000000000000004], [-3.0], [1e-300, 3e-300], [1e30, -1e30]])
def test_awkward_ranges_are_drawn(tmp_path, values):
    for step, value in enumerate(values, 1):
        metrics.append_row(tmp_path / "metrics.jsonl", {"kind": "train", "step": step, "loss": value})
    _, d, (_, (y0, y1)) = Report(metrics.write_report(tmp_path)).curves["train.loss"]
    assert y0 <= min(values) and max(values) <= y1 and y0 < y1
    assert all(metrics.TOP <= y <= metrics.BOTTOM for _, y in pixels(d))


def test_a_long_curve_is_thinned_but_keeps_its_peaks(tmp_path):
    rows = [[step, math.sin(step / 700) + (step == 7777) * 50 - (step == 3333) * 50] for step in range(20_000)]
    rows[12_345][1] = None
    kept = metrics.thin(rows)
    assert len(kept) <= 2000 and kept == sorted(kept, key=lambda p: p[0])
    assert all(point in (rows[7777], rows[3333], rows[12_345]) or point == rows[point[0]] for point in kept)
    for point in (rows[7777], rows[3333], rows[12_345]):
        assert point in kept
    assert metrics.thin(rows[:2000]) == rows[:2000]


@pytest.mark.parametrize("low, high", [(0, 1), (1.1, 1.2), (-3, 7), (0, 1e-9), (123456, 123999), (5, 5), (0, 0)])
def test_ticks_are_round_and_enclose(low, high):
    t = metrics.ticks(low, high)
    assert t[0] <= low and high <= t[-1] and 2 <= len(t) <= 8
    steps = [b - a for a, b in zip(t, t[1:])]
    assert max(steps) == pytest.approx(min(steps), rel=1e-6)
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert any(mantissa == pytest.approx(m, rel=1e-6) for m in (1, 2, 5, 10))


def test_report_is_self_contained_and_escaped(tmp_path):
    evil = '<script>alert("1")</script> & \'x\' \udc80'
    write_rows(tmp_path / "metrics.jsonl")
    metrics.append_row(tmp_path / "metrics.jsonl", {"kind": 'a"<b>', "step": 1, 'k"<i>': 1.0})
    (tmp_path / "args.json").write_text(json.dumps({"data": [evil], "lr": 0.001}))
    (tmp_path / "samples.json").write_text(json.dumps([{"step": 40, "prompt": "def f", "text": "</pre>" + evil}]))
    report = Report(metrics.write_report(tmp_path))
    tags = {tag for tag, _ in report.tags}
    assert not tags & {"script", "b>", "i", "img", "iframe", "object"} and "pre" in tags
    for tag, attributes in report.tags:
        assert not {"src", "href"} & attributes.keys() and not any(key.startswith("on") for key in attributes)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http" not in source and "url(" not in source and "@import" not in source
    assert "alert(" in report.text and report.text.count("</pre>") == 1  # shown as the text it is
    assert "def f" in report.text and "0.001" in report.text
    assert sorted(os.listdir(tmp_path)) == ["args.json", "metrics.jsonl", "report.html", "samples.json"]


def test_summary_figures(tmp_path):
    rows = write_rows(tmp_path / "metrics.jsonl")
    lines = dict(metrics.summary(rows))
    evals = [row for row in rows if row["kind"] == "eval"]
    assert lines["held-out bits per byte"].startswith(f"{evals[-1]['bits_per_byte']:.4f} ")
    assert f"lowest {min(row['loss'] for row in evals):.4f}" in lines["held-out loss"]
    assert (lines["steps"], lines["tokens"], lines["time"]) == ("40", "30,720", "0:00:02")
    assert lines["peak memory"] == "300 MiB"
    report = Report(metrics.write_report(tmp_path))
    assert all(text in report.text for pair in lines.items() for text in pair)


def test_report_of_an_empty_run_and_of_broken_inputs(tmp_path):
    assert Report(metrics.write_report(tmp_path)).curves == {}
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "args.json").write_text("{")
    with pytest.raises(ValueError, match=r"args\.json: not JSON"):
        metrics.write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before  # a failed report leaves the old one whole
    done = subprocess.run([sys.executable, metrics.__file__, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
