"""data/loader.py: every target once an epoch, in an order that depends on (seed, step) alone, documents apart."""

import json
import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from data import loader as loader_module
from data.loader import Loader, Windows, eval_batches, shuffled

EOS = 999


def write_folder(folder: Path, shards: list[list[list[int]]], split: str = "train", vocab_size: int = 1000) -> Path:
    """Shards of documents, written from the format's description, without data/pack.py."""
    folder.mkdir(exist_ok=True)
    entries = []
    for number, documents in enumerate(shards):
        stream, starts = [EOS], []
        for document in documents:
            starts.append(len(stream))
            stream += document + [EOS]
        name = f"{split}_{number:05d}"
        np.array(stream, "<u2").tofile(folder / f"{name}.bin")
        np.array(starts, "<i8").tofile(folder / f"{name}.idx")
        entries.append({"file": f"{name}.bin", "tokens": len(stream), "documents": len(documents)})
    index = {"vocab_size": vocab_size, "dtype": "uint16", "eos_token_id": EOS, "splits": {split: {"shards": entries}}}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def random_shards(seed: int, sizes=(30, 7, 1), longest: int = 40, base: int = 0) -> list[list[list[int]]]:
    rng = random.Random(seed)
    return [[[base + rng.randrange(400) for _ in range(rng.randrange(1, longest))] for _ in range(n)] for n in sizes]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data", random_shards(0))


@pytest.fixture
def other(tmp_path):
    return write_folder(tmp_path / "other", random_shards(1, sizes=(9, 4), base=500))


def rows(batches) -> list[tuple]:
    """Micro batches as a list of rows: (input_ids, labels, boundaries inside the row)."""
    result = []
    for input_ids, labels, cu_seqlens in batches:
        b, S = input_ids.shape
        assert input_ids.dtype == labels.dtype == torch.int64 and cu_seqlens.dtype == torch.int32
        assert labels.shape == (b, S)
        ends = cu_seqlens.tolist()
        assert ends[0] == 0 and ends[-1] == b * S and all(x < y for x, y in zip(ends, ends[1:]))
        assert set(range(0, b * S, S)) <= set(ends)  # row starts are boundaries
        for r in range(b):
            inside = tuple(e - r * S for e in ends if r * S <= e < (r + 1) * S)
            result.append((tuple(input_ids[r].tolist()), tuple(labels[r].tolist()), inside))
    return result


def brute_force_rows(shards, S: int) -> list[tuple]:
    """Every window, token by token: documents as segments [EOS d] -> [d EOS], laid end to end and cut every S."""
    result = []
    for documents in shards:
        pairs = [(x, y, j == 0) for d in documents for j, (x, y) in enumerate(zip([EOS] + d, d + [EOS]))]
        for start in range(0, len(pairs), S):
            window = pairs[start : start + S]
            starts = [j for j, (_, _, opens) in enumerate(window) if opens or j == 0]
            pad = S - len(window)
            starts += [len(window)] if pad else []
            inputs, labels, _ = map(tuple, zip(*window))
            result.append((inputs + (EOS,) * pad, labels + (-100,) * pad, tuple(starts)))
    return result


# ---- windows

@pytest.mark.parametrize("S", [1, 2, 5, 16, 64, 5000])
def test_windows_and_boundaries_equal_brute_force(folder, S):
    expected = brute_force_rows(random_shards(0), S)
    for batch_size in (1, 3, 64):
        assert rows(eval_batches(folder, "train", S, batch_size)) == expected


def test_segments_are_the_documents(folder):
    """With one window per shard, the segments read from cu_seqlens are exactly [EOS d], their labels [d EOS]."""
    documents = [d for shard in random_shards(0) for d in shard]
    found = []
    for input_ids, labels, cu_seqlens in eval_batches(folder, "train", 1500, 2):
        for a, b in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
            segment, targets = input_ids.view(-1)[a:b].tolist(), labels.view(-1)[a:b].tolist()
            if targets[0] == -100:
                assert set(targets) == {-100} and set(segment) == {EOS}  # padding is a segment of its own
            else:
                assert segment[0] == EOS and targets[-1] == EOS and segment[1:] == targets[:-1]
                found.append(segment[1:])
    assert found == documents


@pytest.mark.parametrize("S", [3, 17, 64])
def test_an_epoch_has_every_window_once_and_the_next_another_order(folder, S):
    expected = Counter(brute_force_rows(random_shards(0), S))
    n = sum(expected.values())
    loader = Loader(folder, "train", seq_len=S, global_batch_size=1, seed=5)
    assert loader.n_windows == n
    epochs = [[rows(next(loader))[0] for _ in range(n)] for _ in range(3)]
    assert all(Counter(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != brute_force_rows(random_shards(0), S)


def test_split_shorter_than_the_window_is_one_padded_row(tmp_path):
    write_folder(tmp_path / "d", [[[1, 2, 3]]])
    (input_ids, labels, cu_seqlens), = next(Loader(tmp_path / "d", "train", seq_len=6, global_batch_size=2))
    assert input_ids.tolist() == [[EOS, 1, 2, 3, EOS, EOS]] * 2  # both rows: n_windows = 1, so each is an epoch
    assert labels.tolist() == [[1, 2, 3, EOS, -100, -100]] * 2
    assert cu_seqlens.tolist() == [0, 4, 6, 10, 12]


# ---- order

@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 30, 1000, 65_537])
def test_each_epoch_is_a_permutation(n):
    for seed in (0, 1, -3, 2**70):
        for epoch in (0, 1, 10**9):
            assert sorted(shuffled(epoch * n, n, n, seed).tolist()) == list(range(n))


def test_order_does_not_depend_on_where_it_is_asked_from():
    whole = shuffled(0, 500, 37, seed=3)
    for low in (0, 1, 36, 37, 38, 400):
        assert shuffled(low, 100, 37, seed=3).tolist() == whole[low : low + 100].tolist()
    far = 10**30  # past int64: the state is a Python integer
    assert shuffled(far, 50, 37, seed=3).tolist()[10:] == shuffled(far + 10, 40, 37, seed=3).tolist()


@pytest.mark.parametrize("n", [3, 4, 6, 10, 100])
def test_permutations_look_uniform(n):
    """Chi-square over epochs, for the window at one position and for the step from it to its neighbour."""
    epochs = 10_000
    order = shuffled(0, n * epochs, n, seed=1).reshape(epochs, n)
    for counted, cells in ((order[:, 0], n), (order[:, n // 2], n), ((order[:, 1] - order[:, 0]) % n - 1, n - 1)):
        counts = np.bincount(counted, minlength=cells)
        chi2 = ((counts - epochs / cells) ** 2 / (epochs / cells)).sum()
        assert abs(chi2 - (cells - 1)) < 5 * (2 * (cells - 1)) ** 0.5  # mean k, variance 2k for k degrees of freedom
    by_seed = np.array([shuffled(0, n, n, seed)[0] for seed in range(3000)])  # seeds 0, 1, 2 ... are independent too
    counts = np.bincount(by_seed, minlength=n)
    assert abs(((counts - 3000 / n) ** 2 / (3000 / n)).sum() - (n - 1)) < 5 * (2 * (n - 1)) ** 0.5


def test_small_domains_reach_every_permutation():
    orders = Counter(map(tuple, shuffled(0, 4 * 24_000, 4, seed=0).reshape(-1, 4).tolist()))
    assert len(orders) == 24 and 800 < min(orders.values()) and max(orders.values()) < 1200


def test_lookahead_changes_nothing(folder, other, monkeypatch):
    def batches():
        loader = Loader(folder, "train", seq_len=8, global_batch_size=5, replay=other, replay_fraction=0.3)
        return [rows(next(loader)) for _ in range(40)]

    expected = batches()
    monkeypatch.setattr(loader_module, "LOOKAHEAD", 7)
    assert batches() == expected


# ---- one integer is the state

@pytest.mark.parametrize("replayed", [False, True])
def test_resumed_at_world_sizes_1_2_4_3_yields_exactly_the_rest(folder, other, replayed):
    """At each of several stops the run goes on with other ranks and micro batches; epochs are crossed on the way."""
    def make(rank=0, world_size=1, micro=None):
        replay = {"replay": other, "replay_fraction": 0.3} if replayed else {}
        return Loader(folder, "train", seq_len=8, global_batch_size=12, micro_batch_size=micro, seed=7, rank=rank,
                      world_size=world_size, **replay)

    straight = make()
    steps = 4 * straight.n_windows // 12  # four epochs
    expected = [rows(next(straight)) for _ in range(steps)]
    assert len(expected) > 20

    for stops in ([1, 2, 3], [5, 6, 17], [steps // 4, steps // 2, steps - 1], range(1, steps)):  # the last: every step
        found, state = [], {"step": 0}
        for i, (begin, end) in enumerate(zip([0, *stops], [*stops, steps])):
            world_size, micro = [(1, None), (2, 3), (4, 3), (3, 1)][i % 4]
            ranks = [make(rank, world_size, micro) for rank in range(world_size)]
            for loader in ranks:
                loader.load_state_dict(json.loads(json.dumps(state)))
            for _ in range(begin, end):
                shares = [next(loader) for loader in ranks]
                assert all(len(batch[0]) == (micro or 12) for share in shares for batch in share)
                found.append([row for share in shares for row in rows(share)])
            state = ranks[-1].state_dict()
            assert state == {"step": end}
        assert found == expected


def test_shares_of_a_batch_that_does_not_divide(folder):
    whole = rows(next(Loader(folder, "train", seq_len=9, global_batch_size=11, seed=2)))
    shares = [next(Loader(folder, "train", seq_len=9, global_batch_size=11, micro_batch_size=2, seed=2, rank=r,
                          world_size=3)) for r in range(3)]
    assert [row for share in shares for row in rows(share)] == whole
    assert [[len(batch[0]) for batch in share] for share in shares] == [[2, 1], [2, 2], [2, 2]]


def test_seed_changes_the_order_and_nothing_else(folder):
    def epoch(seed):
        loader = Loader(folder, "train", seq_len=16, global_batch_size=1, seed=seed)
        return [rows(next(loader))[0] for _ in range(loader.n_windows)]

    assert epoch(1) != epoch(2) and epoch(1) == epoch(1) and sorted(epoch(1)) == sorted(epoch(2))


# ---- replay

@pytest.mark.parametrize("p", [0.05, 0.1, 0.25, 1 / 3, 0.7])  # fractions with small denominators, as floats
def test_replayed_share_is_within_one_of_its_target_at_every_prefix(folder, other, p):
    loader = Loader(folder, "train", seq_len=8, global_batch_size=1, seed=3, replay=other, replay_fraction=p)
    alone = Loader(folder, "train", seq_len=8, global_batch_size=1, seed=3)
    main, replayed = [], 0
    exact = Fraction(p).limit_denominator(1000)
    for g in range(600):
        row, = rows(next(loader))
        from_other = any(500 <= token < 900 for token in row[1])  # its documents are made of 500 ... 899
        assert from_other == ((g + 1) * exact // 1 > g * exact // 1)
        replayed += from_other
        assert abs(replayed - (g + 1) * exact) < 1
        if not from_other:
            main.append(row)
    assert main == [rows(next(alone))[0] for _ in main]  # the main order is the same as without replay


def test_replay_epochs_hold_every_replayed_window_once(folder, other):
    loader = Loader(folder, "train", seq_len=8, global_batch_size=1, replay=other, replay_fraction=0.5)
    expected = Counter(brute_force_rows(random_shards(1, sizes=(9, 4), base=500), 8))
    drawn = [rows(next(loader))[0] for _ in range(2 * sum(expected.values()))][1::2]
    assert Counter(drawn) == expected


def test_exact_arithmetic_far_out(folder, other):
    """Floats would lose the fraction of g p long before: the choice at 10^18 must still follow the rule."""
    loader = Loader(folder, "train", seq_len=8, global_batch_size=1, replay=other, replay_fraction=0.1)
    for far in (10**15, 10**18 + 7, 10**25):  # samples; also 20,000 at once, which must not overflow inside
        assert (loader.order(far, far + 20_000) >= loader.n_windows).sum() == 2000
        loader.step = far
        chosen = [any(500 <= token < 900 for token in rows(next(loader))[0][1]) for _ in range(20)]
        assert chosen == [(g + 1) // 10 > g // 10 for g in range(far, far + 20)]


# ---- bad input

def test_bad_sizes(folder, other, tmp_path):
    def make(**kwargs):
        return Loader(folder, "train", **({"seq_len": 8, "global_batch_size": 4} | kwargs))

    for kwargs, word in [({"seq_len": 0}, "seq_len"), ({"global_batch_size": 0}, "global_batch_size"),
                         ({"micro_batch_size": 0}, "micro_batch_size"), ({"rank": 2, "world_size": 2}, "rank"),
                         ({"global_batch_size": 2, "world_size": 3}, "global_batch_size"),
                         ({"replay": other}, "replay"), ({"replay_fraction": 0.1}, "replay"),
                         ({"replay": other, "replay_fraction": 1.0}, "replay")]:
        with pytest.raises(ValueError, match=word):
            make(**kwargs)
    write_folder(tmp_path / "more", [[[1]]], vocab_size=2000)
    with pytest.raises(ValueError, match="vocab_size 2000.*1000"):
        make(replay=tmp_path / "more", replay_fraction=0.1)
    for state in ({}, {"step": -1}, {"step": "3"}):
        with pytest.raises(ValueError, match="step"):
            make().load_state_dict(state)


def test_bad_folders_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no index.json"):
        Loader(tmp_path, "train", seq_len=8, global_batch_size=4)
    with pytest.raises(ValueError, match="no split 'val', only train"):
        next(eval_batches(folder, "val", 8, 4))
    shard = folder / "train_00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=re.escape(str(shard)) + ".*truncated"):
        Loader(folder, "train", seq_len=8, global_batch_size=4)
    shard.unlink()
    with pytest.raises(ValueError, match=re.escape(str(shard)) + ": no bytes"):
        Loader(folder, "train", seq_len=8, global_batch_size=4)
    (folder / "index.json").write_text('{"splits": 3}')
    with pytest.raises(ValueError, match="index.json: damaged"):
        Loader(folder, "train", seq_len=8, global_batch_size=4)


# ---- files

def test_shards_are_mapped_when_touched_and_never_read_whole(folder):
    windows = Windows([(folder, json.loads((folder / "index.json").read_text()))], "train", 8)
    assert not windows._mapped
    windows.batch(np.array([windows.count - 1]))
    assert list(windows._mapped) == [2]
    stream, _, _ = windows.mapped(2)
    assert isinstance(stream.base, np.memmap) or not stream.flags.owndata


def test_reads_what_pack_writes(tmp_path):
    from data.pack import write_shards
    from test_pack import ByteTokenizer, Document, stories

    write_shards(tmp_path / "d", {"val": map(Document, stories(80))}, ByteTokenizer(), shard_tokens=700)
    text, targets = b"", 0
    for _, labels, _ in eval_batches(tmp_path / "d", "val", 32, 4):
        real = labels[labels != -100].tolist()
        targets += len(real)
        text += bytes(10 if token == 256 else token for token in real)
    expected = "".join(story + "\n" for story in stories(80)).encode()
    assert text == expected and targets == len(expected)  # each token and each end of a document exactly once


# ---- conversations (pack.write_chats)

def chats(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """(ids, loss mask) of random lengths 2 .. 30; the first id of each is 300 + its number, so that it can be found."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        ids = [300 + number, *rng.integers(0, 256, rng.integers(1, 30)).tolist()]
        made.append((ids, [0, *rng.integers(0, 2, len(ids) - 1).tolist()]))
    return made


class ChatTokenizer:
    vocab_size, eos_token_id, special_tokens = 1000, 256, {"end": 256}

    def decode_bytes(self, ids):
        return bytes(i % 256 for i in ids)


@pytest.fixture
def chat_folder(tmp_path):
    from data.pack import write_chats

    write_chats(tmp_path / "chats", {"train": chats(200), "val": chats(9, seed=1)}, ChatTokenizer(), 32, shard_tokens=1500)
    return tmp_path / "chats"


def test_rows_of_conversations_hold_each_one_whole_and_label_what_is_trained(chat_folder):
    for split, expected in (("train", chats(200)), ("val", chats(9, seed=1))):
        index, seen, trained = json.loads((chat_folder / "index.json").read_text())["splits"][split], [], 0
        for input_ids, labels, cu_seqlens in eval_batches(chat_folder, split, 32, 3):
            flat, flat_labels = input_ids.flatten().tolist(), labels.flatten().tolist()
            for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
                if flat[a] == 256:  # padding
                    assert set(flat[a:b]) == {256} and set(flat_labels[a:b]) == {-100}
                    continue
                ids, mask = expected[flat[a] - 300]
                assert flat[a:b] == ids
                assert flat_labels[a:b] == [i if m else -100 for i, m in zip(ids[1:], mask[1:])] + [-100]
                seen.append(flat[a] - 300)
                trained += sum(mask)
        assert sorted(seen) == list(range(len(expected)))  # each once, none cut, none dropped
        assert index["trained_tokens"] == index["bytes"] == trained and index["conversations"] == len(expected)
        assert index["tokens"] < 1.25 * sum(len(ids) for ids, _ in expected)  # little padding


def test_prompt_labels_can_be_told_from_trained_ones(chat_folder):
    settings = dict(seq_len=32, global_batch_size=4, seed=3)
    for (ids, plain, _), (same_ids, coded, _) in zip(next(Loader(chat_folder, "train", **settings)),
                                                     next(Loader(chat_folder, "train", **settings, prompt_labels=True))):
        assert torch.equal(ids, same_ids) and torch.equal(plain, coded.clamp_min(-100))
        prompt = coded < -100
        assert prompt.any() and torch.equal((-101 - coded[prompt]), ids.roll(-1, 1)[prompt])
        assert not (prompt & (plain != -100)).any()


def test_a_truncated_mask_is_named(chat_folder):
    (chat_folder / "train_00000.mask").write_bytes(b"")
    with pytest.raises(ValueError, match="train_00000.mask: 0 bytes instead of"):
        Loader(chat_folder, "train", seq_len=32, global_batch_size=4)


def test_conversations_longer_than_a_row_and_empty_splits_are_refused(tmp_path):
    from data.pack import write_chats

    with pytest.raises(ValueError, match="conversation of 40 tokens; rows hold 32"):
        write_chats(tmp_path / "long", {"train": [(list(range(40)), [0] + [1] * 39)]}, ChatTokenizer(), 32)
    with pytest.raises(ValueError, match="holds no conversation"):
        write_chats(tmp_path / "none", {"train": []}, ChatTokenizer(), 32)
    assert list(tmp_path.iterdir()) == []
