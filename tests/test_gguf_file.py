"""GGUF files: quantization against the formulas written out one number at a time, and every way of being cut short."""

import struct

import numpy as np
import pytest

from data.gguf_file import (KINDS, GGUFTensor, dequantize, fitting_kind, quantize, read_gguf, write_gguf)

WRITTEN = [kind for kind in KINDS if kind != "Q6_K"]


def half(data) -> np.float32:
    return np.float32(np.frombuffer(bytes(data), "<f2")[0])


def numbers(seed=0, rows=12) -> np.ndarray:
    """Rows of 512, of very different sizes; one of zeros, one constant, one without negative numbers."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, 512)) * 10.0 ** rng.integers(-1, 4, (rows, 1))).astype(np.float32)
    x[0], x[1], x[2] = 0, -0.25, np.abs(x[2])
    return x


def block_by_hand(kind: str, b: np.ndarray) -> list:
    """The numbers of one block of bytes, from llama.cpp's structs."""
    if kind == "Q8_0":
        return [half(b[:2]) * np.int8(q) for q in b[2:].view(np.int8)]
    if kind == "Q4_0":  # number j in the low half of byte j, number j + 16 in its high half
        return [half(b[:2]) * (int(b[2 + j % 16] >> (4 if j >= 16 else 0) & 15) - 8) for j in range(32)]
    if kind == "Q4_K":
        d, m, packed, q = half(b[:2]), half(b[2:4]), [int(v) for v in b[4:16]], b[16:]
        found = []
        for j in range(256):
            group = j // 32
            if group < 4:
                s, t = packed[group] & 63, packed[group + 4] & 63
            else:
                s = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
                t = packed[group + 4] >> 4 | packed[group] >> 6 << 4
            nibble = int(q[j // 64 * 32 + j % 32] >> (4 if group % 2 else 0) & 15)
            found.append(np.float32(d * np.float32(s)) * nibble - np.float32(m * np.float32(t)))
        return found
    ql, qh, scales, d = b[:128], b[128:192], b[192:208].view(np.int8), half(b[208:])
    found = []
    for j in range(256):  # halves of 128: their four quarters share 64 low bytes and 32 high ones
        part, quarter, i = j // 128, j % 128 // 32, j % 32
        low = int(ql[part * 64 + quarter % 2 * 32 + i]) >> (4 if quarter >= 2 else 0) & 15
        high = int(qh[part * 32 + i]) >> 2 * quarter & 3
        found.append(np.float32(d * np.float32(scales[j // 16])) * ((low | high << 4) - 32))
    return found


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_blocks_mean_what_the_format_says(kind):
    _, block, size = KINDS[kind]
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (9, size), dtype=np.uint8)
    for at in {"Q4_K": [0, 2], "Q6_K": [208]}.get(kind, [0]):  # where float16 stands: finite ones
        raw[:, at : at + 2] = rng.standard_normal((9, 1)).astype("<f2").view(np.uint8)
    ours = dequantize(GGUFTensor(kind, (9, block), raw))
    assert ours.dtype == np.float32 and np.array_equal(ours, np.array([block_by_hand(kind, b) for b in raw], np.float32))


@pytest.mark.parametrize("kind, bound", [("F32", 0), ("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 1 / 254 + 2**-11),
                                         ("Q4_0", 1 / 8 + 2**-11)])
def test_no_number_is_further_off_than_its_type_allows(kind, bound):
    """Half a step of the block's largest number; Q4_0 has a whole one at the end that its 8 steps do not reach."""
    x, block = numbers(), KINDS[kind][1]
    y = dequantize(GGUFTensor(kind, x.shape, quantize(kind, x.reshape(-1, block))))
    largest = np.abs(x.reshape(-1, block)).max(1, keepdims=True)
    error = np.abs(x - y).reshape(-1, block)
    assert (error <= bound * largest + (2**-25 if kind == "F16" else 0)).all()  # float16 ends at 2^-24
    assert (y[0] == 0).all()


def test_q4_k_is_nearer_than_the_plain_grid_and_than_q4_0():
    """What its search for scales is for: less error, weighted by size as it weighs, than (min, max) / 15."""
    x = numbers(rows=40)[3:]
    groups = x.reshape(-1, 32)
    low, high = np.minimum(groups.min(1, keepdims=True), 0), groups.max(1, keepdims=True)
    step = (high - low) / 15
    grid = np.rint((groups - low) / step) * step + low
    y = dequantize(GGUFTensor("Q4_K", x.shape, quantize("Q4_K", x.reshape(-1, 256))))
    other = dequantize(GGUFTensor("Q4_0", x.shape, quantize("Q4_0", x.reshape(-1, 32))))

    def error(z):
        weight = np.abs(groups) + np.sqrt((groups**2).mean(1, keepdims=True))
        return ((weight * (z.reshape(-1, 32) - groups) ** 2).sum(1) / (weight * groups**2).sum(1)).mean()

    assert error(y) < 0.9 * error(grid) and error(y) < 0.9 * error(other)
    zero = quantize("Q4_K", np.zeros((1, 256), np.float32))
    assert (dequantize(GGUFTensor("Q4_K", (1, 256), zero)) == 0).all()


def test_equal_to_the_gguf_package(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    from gguf.quants import dequantize as theirs, quantize as quantized_by_them
    x, tensors = numbers(), {}
    for kind in WRITTEN:
        tensors[f"{kind}.weight"] = kind, x.shape, lambda: x
        if kind != "Q4_K":  # which that package only reads
            ours = quantize(kind, x.reshape(-1, KINDS[kind][1]))
            their = quantized_by_them(x, getattr(gguf.GGMLQuantizationType, kind))
            assert ours.tobytes() == np.ascontiguousarray(their).tobytes(), kind
    metadata = {"general.architecture": "llama", "n": 7, "minus": -7, "eps": 1e-5, "yes": True, "words": ["a", "é", ""],
                "ints": [1, -2], "floats": [0.5, -1.0]}
    write_gguf(tmp_path / "x.gguf", metadata, tensors)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    mapped = read_gguf(tmp_path / "x.gguf")[1]
    assert [t.name for t in reader.tensors] == list(tensors)
    for tensor in reader.tensors:
        assert np.array_equal(theirs(tensor.data, tensor.tensor_type).reshape(x.shape), dequantize(mapped[tensor.name]))
    for key, value in metadata.items():
        assert reader.get_field(key).contents() == pytest.approx(value, rel=1e-7) if key == "eps" else value


def test_what_is_written_is_read_back(tmp_path):
    metadata = {"general.architecture": "llama", "n": 7, "minus": -7, "eps": 1e-5, "yes": True, "no": False, "text": "é\n",
                "words": ["a", "é", ""], "ints": [1, -2], "floats": [0.5, -1.0], "none": []}
    x = numbers()
    write_gguf(tmp_path / "x.gguf", metadata, {"a.weight": ("F32", (3, 4, 512), lambda: x.reshape(3, 4, 512)),
                                               "b.weight": ("F16", (3,), lambda: x[3, :3]),
                                               "c.weight": ("F32", (512,), lambda: x[4])})
    back, tensors = read_gguf(tmp_path / "x.gguf")
    assert back == metadata and type(back["yes"]) is bool  # eps too: not 9.999999747378752e-06
    assert np.array_equal(dequantize(tensors["a.weight"]), x.reshape(3, 4, 512))
    assert np.array_equal(dequantize(tensors["c.weight"]), x[4])
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_the_bytes_of_a_small_file(tmp_path):
    """Written out from the format's description: little-endian, sizes innermost first, data at a multiple of 32."""
    write_gguf(tmp_path / "x.gguf", {"k": 5}, {"t": ("F32", (2, 3), lambda: np.arange(6, dtype=np.float32).reshape(2, 3))})
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<II", 4, 5)
    head += struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 3, 2, 0, 0)
    expected = head + bytes(-len(head) % 32) + np.arange(6, dtype="<f4").tobytes()
    assert (tmp_path / "x.gguf").read_bytes() == expected + bytes(-len(expected) % 32)


def test_rows_that_are_no_whole_blocks_fall_back():
    assert fitting_kind("Q4_K", (4, 512)) == "Q4_K" and fitting_kind("Q4_K", (4, 64)) == "Q8_0"
    assert fitting_kind("Q4_K", (4, 172)) == fitting_kind("Q8_0", (4, 172)) == fitting_kind("Q4_0", (4, 172)) == "F16"
    assert fitting_kind("Q4_0", (64,)) == fitting_kind("BF16", (64,)) == "F32" and fitting_kind("BF16", (4, 3)) == "BF16"


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path):
    whole, cut = tmp_path / "x.gguf", tmp_path / "cut.gguf"
    write_gguf(whole, {"general.architecture": "llama", "words": ["a", "bc"], "floats": [0.5]},
               {"a.weight": ("F32", (2, 16), lambda: np.ones((2, 16))), "b.weight": ("Q8_0", (1, 32), lambda: np.ones((1, 32)))})
    data = whole.read_bytes()
    needed = len(data) - (-34 % 32)  # what follows the last tensor is padding
    for size in range(needed):
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf: not a(\svalid)? GGUF file"):
            read_gguf(cut)
    cut.write_bytes(data[: needed - 1])
    with pytest.raises(ValueError, match=r"tensor 'b.weight' ends at byte [\d,]+, the file at [\d,]+; truncated"):
        read_gguf(cut)
    cut.write_bytes(data[:60])
    with pytest.raises(ValueError, match="in the middle of metadata"):
        read_gguf(cut)


def test_a_damaged_header_never_raises_anything_else(tmp_path):
    path = tmp_path / "x.gguf"
    write_gguf(path, {"general.architecture": "llama", "words": ["a", "bc"], "general.alignment": 32},
               {"a.weight": ("F32", (2, 16), lambda: np.ones((2, 16)))})
    data, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(3000):
        damaged = bytearray(data)
        for at in rng.integers(4, len(data) - 128, rng.integers(1, 4)):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read_gguf(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 1000


@pytest.mark.parametrize("change, complaint", [
    (lambda d: d.replace(b"GGUF", b"GGML", 1), "does not begin with 'GGUF'"),
    (lambda d: d[:4] + struct.pack("<I", 1) + d[8:], "version 1 is not supported"),
    (lambda d: d[:4] + struct.pack(">I", 3) + d[8:], "version 50331648 is not supported .*little-endian"),
    (lambda d: d.replace(struct.pack("<IQ", 0, 128), struct.pack("<IQ", 0, 96)), "'b' begins at 96, but .* ends at 128"),
    (lambda d: d.replace(struct.pack("<IQ", 0, 128), struct.pack("<IQ", 13, 128)), "'b' is of type Q5_K; supported: F32"),
    (lambda d: d.replace(struct.pack("<IQ", 0, 128), struct.pack("<IQ", 8, 128)), "multiples of 32"),
    (lambda d: d.replace(b"\1\0\0\0\0\0\0\0b", b"\1\0\0\0\0\0\0\0a"), "tensor 'a' stands twice"),
])
def test_other_flaws_are_named(tmp_path, change, complaint):
    path = tmp_path / "x.gguf"
    write_gguf(path, {"k": 1}, {"a": ("F32", (2, 16), lambda: np.ones((2, 16))), "b": ("F32", (2, 4), lambda: np.ones((2, 4)))})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=complaint):
        read_gguf(path)


@pytest.mark.parametrize("kind", WRITTEN)
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_left(tmp_path, kind):
    x = numbers()
    x[3, 7] = np.nan
    with pytest.raises(ValueError, match="tensor 'a': holds numbers that are not finite"):
        write_gguf(tmp_path / "x.gguf", {}, {"a": (kind, x.shape, lambda: x)})
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="too large for float16; choose BF16 or F32"):
        quantize("F16", np.full((1, 1), 1e5, np.float32))
