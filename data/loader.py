"""Training batches from memory-mapped token shards, deterministic, with one integer as the whole state.

The folder is the one that data/pack.py writes: shards EOS d1 EOS d2 ... EOS, the starts of their documents, index.json.

    windows   A shard of n + 1 tokens has n targets: window k reads tokens [kS, kS + S) and predicts those one later.
              Nothing is dropped: a shard's last window may be short, the rest of its row has labels -100.
    order     Sample g of a run is window P_e(g mod n) of epoch e = g div n, for n windows. P_e is a keyed permutation
              (a Feistel network), computed where it is needed: no shuffled list, a new order each epoch.
    batch     Step t takes samples [tG, (t+1)G); rank r of W the part [rG div W, (r+1)G div W) of them. So the state is
              t alone, and a run may go on with any number of ranks and any micro batch.
    replay    Sample g comes from a second folder iff floor((g+1)p) > floor(gp), for a share p: at any moment the
              count so far is within one of its target. Both folders keep their own order.
    documents `cu_seqlens` are the ends of the documents inside a batch: a segment starts at each row start and at
              each EOS that opens a document, so attention can be kept within documents.

    loader = Loader("out/data", "train", seq_len=256, global_batch_size=32, micro_batch_size=8)
    for input_ids, labels, cu_seqlens in next(loader): ...
"""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

LOOKAHEAD = 4096  # samples whose order is computed at once, as NumPy is slow on short arrays; changes no result
ROUNDS = 8


class Loader:
    """Endless iterator; `next(loader)` -> this rank's share of global batch `step` as a list of micro batches

        input_ids   (b, S) int64
        labels      (b, S) int64   aligned: labels[i, j] is the token after input_ids[i, j], -100 where there is none
        cu_seqlens  (n + 1,) int32 from 0 to b * S: where the documents of the flattened batch begin and end

    In folders of conversations (pack.write_chats) only what the assistant says is labelled; with prompt_labels=True the
    rest of a conversation is too, as -101 - token, for a loss that gives it a weight of its own.
    b is micro_batch_size (default: the rank's whole share), less in the last one if it does not divide the share.
    A split shorter than seq_len is one padded window. `index` is the folder's index.json (vocab_size, ...).
    ValueError or FileNotFoundError, naming the file: an unfinished or truncated folder, a split that it does not have,
    sizes that make no batch.
    """

    def __init__(self, directory, split: str, *, seq_len: int, global_batch_size: int,
                 micro_batch_size: int | None = None, seed: int = 0, rank: int = 0, world_size: int = 1,
                 replay=None, replay_fraction: float = 0.0, prompt_labels: bool = False):
        if not 0 <= rank < world_size <= global_batch_size:
            raise ValueError(f"rank {rank} of {world_size} has no share of global_batch_size {global_batch_size}")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, not {micro_batch_size}")
        if not 0 <= replay_fraction < 1 or (replay is None) != (replay_fraction == 0):
            raise ValueError(f"replay takes a folder and a fraction in (0, 1), got {replay} and {replay_fraction}")
        self.index = read_index(directory, split)
        self.windows = Windows([(directory, self.index)], split, seq_len, prompt_labels)
        self.n_windows = self.windows.count  # of the main folder: one epoch
        if replay is not None:
            other = read_index(replay, split)
            for key in ("vocab_size", "eos_token_id"):
                if other[key] != self.index[key]:
                    raise ValueError(f"{replay}: {key} {other[key]}, but {directory} has {self.index[key]}: "
                                     "replayed data must be made with the same tokenizer")
            self.windows = Windows([(directory, self.index), (replay, other)], split, seq_len, prompt_labels)
        self.share = Fraction(replay_fraction).limit_denominator(10**6)  # 0.1 is 1/10: floor(g p) is exact for any g
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.step = 0
        self._known = (0, np.empty(0, np.int64))  # (first sample, windows from it on): what was looked ahead

    def __iter__(self):
        return self

    def __next__(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        first = self.step * self.global_batch_size
        low = first + self.rank * self.global_batch_size // self.world_size
        high = first + (self.rank + 1) * self.global_batch_size // self.world_size
        windows = self.order(low, high)
        b = self.micro_batch_size or len(windows)
        batches = [self.windows.batch(windows[i : i + b]) for i in range(0, len(windows), b)]
        self.step += 1
        return batches

    def state_dict(self) -> dict:
        return {"step": self.step}

    def load_state_dict(self, state: dict):
        if not isinstance(state.get("step"), int) or state["step"] < 0:
            raise ValueError(f"loader state must be {{'step': an integer >= 0}}, not {state}")
        self.step = state["step"]

    def order(self, low: int, high: int) -> np.ndarray:
        """The windows of samples [low, high), int64; those of the replay folder are numbered after the main ones."""
        first, windows = self._known
        if not first <= low <= high <= first + len(windows):
            first, windows = low, self._order(low, max(high - low, LOOKAHEAD))
            self._known = first, windows
        return windows[low - first : high - first]

    def _order(self, low: int, count: int) -> np.ndarray:
        n, p = self.n_windows, self.share
        # replayed before sample g: floor(g p), split as floor(low p) + the rest so that int64 holds it for any low
        before, rest = divmod(low * p.numerator, p.denominator)
        replayed = (rest + np.arange(count + 1) * p.numerator) // p.denominator  # since `low`, (count + 1,)
        is_replay = np.diff(replayed) > 0
        windows = np.empty(count, np.int64)
        windows[~is_replay] = shuffled(low - before, int((~is_replay).sum()), n, self.seed)
        if is_replay.any():
            windows[is_replay] = n + shuffled(before, int(is_replay.sum()), self.windows.count - n, ~self.seed)
        return windows


def eval_batches(directory, split: str, seq_len: int, batch_size: int):
    """Yield (input_ids, labels, cu_seqlens), as in `Loader`, over all windows of a split, each once, in order."""
    windows = Windows([(directory, read_index(directory, split))], split, seq_len)
    for start in range(0, windows.count, batch_size):
        yield windows.batch(np.arange(start, min(start + batch_size, windows.count)))


# ---- order

def shuffled(low: int, count: int, n: int, seed: int) -> np.ndarray:
    """Windows of samples [low, low + count) of an endless run of epochs over n windows, each a permutation of range(n).

    A Feistel network on pairs (l, r), l < a, r < b, with a b >= n: each round adds a hash of one half to the other,
    modulo its size, which can be undone and so permutes [0, a b). An image outside [0, n) is sent through again until
    it falls inside (cycle walking), which leaves a permutation of [0, n); since a b < n + a, that is rare.
    Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.
    """
    epoch, position = divmod(low, n)
    position = position + np.arange(count)
    key = mix(np.uint64(seed % 2**64)) + (np.uint64(epoch % 2**64) + (position // n).astype(np.uint64))
    x = (position % n).astype(np.uint64)
    a = np.uint64(max(1, round(n**0.5)))
    b = np.uint64(-(-n // int(a)))
    walking = np.arange(count)
    while len(walking):
        left, right, k = x[walking] % a, x[walking] // a, mix(key[walking])
        for i in range(0, ROUNDS, 2):
            left = (left + mix(right ^ mix(k + np.uint64(i)))) % a
            right = (right + mix(left ^ mix(k + np.uint64(i + 1)))) % b
        x[walking] = left + right * a
        walking = walking[x[walking] >= n]
    return x.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer, a hash of uint64 (Steele et al., 2014); wraps around modulo 2^64 on purpose."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


# ---- windows

class Windows:
    """All windows of a split in one or more folders, numbered through; files are mapped when first touched."""

    def __init__(self, folders: list, split: str, seq_len: int, prompt_labels: bool = False):
        self.prompt_labels = prompt_labels
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, not {seq_len}")
        self.seq_len = seq_len
        self.shards = [(Path(directory) / entry["file"], np.dtype(index["dtype"]).newbyteorder("<"), entry["tokens"])
                       for directory, index in folders for entry in index["splits"][split]["shards"]]
        self.eos = folders[0][1]["eos_token_id"]
        per_shard = [-(-(tokens - 1) // seq_len) for _, _, tokens in self.shards]
        self.first = np.cumsum([0] + per_shard)  # first window of each shard, and the end
        self.count = int(self.first[-1])
        self._mapped = {}

    def mapped(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        if shard not in self._mapped:
            path, dtype, _ = self.shards[shard]
            mask = path.with_suffix(".mask")  # of conversations: which targets count
            self._mapped[shard] = (np.memmap(path, dtype, "r").view(np.ndarray),
                                   np.memmap(path.with_suffix(".idx"), "<i8", "r").view(np.ndarray),
                                   np.memmap(mask, np.uint8, "r").view(np.ndarray) if mask.exists() else None)
        return self._mapped[shard]

    def batch(self, windows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows (b,) of window numbers -> (input_ids (b, S), labels (b, S), cu_seqlens (n + 1,)), see `Loader`."""
        S = self.seq_len
        tokens = np.empty((len(windows), S + 1), np.int64)
        counts = None  # (b, S) 1 = a target, 2 = one of the prompt, 0 = none; None: all are targets
        boundaries = [np.arange(len(windows) + 1) * S]  # each row's start, and the end of the batch
        padded = []  # (row, length) of short windows
        shards = np.searchsorted(self.first, windows, side="right") - 1
        for shard in np.unique(shards):
            stream, documents, mask = self.mapped(shard)
            rows = np.flatnonzero(shards == shard)  # (m,)
            start = (windows[rows] - self.first[shard]) * S  # (m,) inputs are stream[start:stop], targets one later
            stop = np.minimum(start + S, len(stream) - 1)
            at = start[:, None] + np.arange(S + 1)  # (m, S + 1)
            tokens[rows] = stream[np.minimum(at, len(stream) - 1, out=at)]
            if mask is not None:
                counts = np.ones((len(windows), S), np.uint8) if counts is None else counts
                counts[rows] = mask[at[:, 1:]]
            padded += [(row, n) for row, n in zip(rows.tolist(), (stop - start).tolist()) if n < S]
            # documents d whose opening EOS, at d - 1, lies inside the window: start < d - 1 < stop
            low = np.searchsorted(documents, start + 1, side="right")
            count = np.searchsorted(documents, stop + 1, side="left") - low  # (m,)
            each = np.repeat(low - np.cumsum(count) + count, count) + np.arange(count.sum())  # low, low + 1, ...
            boundaries.append(documents[each] - 1 + np.repeat(rows * S - start, count))
        input_ids, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        if counts is not None:
            labels[counts == 2] = -101 - labels[counts == 2] if self.prompt_labels else -100
            labels[counts == 0] = -100
        for row, n in padded:  # the rest of the row is a document of its own, so that nothing can attend to it
            input_ids[row, n:] = self.eos
            labels[row, n:] = -100
            boundaries.append(np.array([row * S + n]))
        cu_seqlens = np.sort(np.concatenate(boundaries)).astype(np.int32)
        return torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(cu_seqlens)


def read_index(directory, split: str) -> dict:
    """index.json of a folder of shards; checks that it has `split` and that the files have the recorded sizes."""
    path = Path(directory) / "index.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: no index.json, so no token shards (python -m data.prepare makes them)")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        splits, width = index["splits"], np.dtype(index["dtype"]).itemsize
        files = [(path.with_name(entry["file"]), {".bin": entry["tokens"] * width, ".idx": entry["documents"] * 8}
                  | ({".mask": entry["tokens"]} if "mask_sha256" in entry else {}))
                 for entry in splits.get(split, {"shards": []})["shards"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, not the index of token shards ({error!r})") from None
    if not files:
        raise ValueError(f"{directory}: has no split {split!r}, only {', '.join(splits)}")
    for file, sizes in files:
        for suffix, expected in sizes.items():
            name = file.with_suffix(suffix)
            found = name.stat().st_size if name.is_file() else "no"
            if found != expected:
                raise ValueError(f"{name}: {found} bytes instead of {expected}: truncated, or not of this folder")
    return index
