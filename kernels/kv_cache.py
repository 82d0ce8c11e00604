"""Keys and values of a cache in 8 or 4 bits: half or a quarter of the memory that long contexts fill.

    x ~ low + code step        per token: low and step for each token and head (D numbers)
                               per channel: for each channel and 32 tokens

Keys have channels that are large for every token: one scale for a token's head lets these few spoil the others, one for
a channel does not. Values have no such channels. So: keys per channel, values per token (KIVI).

    cache = model.KVCache(config, batch, length)
    cache.k, cache.v = QuantizedStore(cache.k, 4, "channel"), QuantizedStore(cache.v, 4)      # quant.quantize_cache

Plain PyTorch: attention reads decoded numbers. Source: Liu et al., KIVI (arXiv:2402.02750), sections 3 and 4.
"""

import math

import torch
from torch import Tensor


def _check(right: bool, name: str, accepted: str, got) -> None:
    if not right:
        raise ValueError(f"{name} must be {accepted}, got {got}")


class QuantizedStore:
    """Keys or values (layers, B, T, Hkv, D) in 8 or 4 bits, as model.KVCache uses its tensors k and v:

        store[layer, row, slots] = x   # x (B, new, Hkv, D); slots (B, new) rising by one in each row
        store[layer, :, :n]            # (B, n, Hkv, D), decoded
        store[:, rows]                 # another store, of these rows; of a slice, it shares the memory

    x ~ low + code step. per "token": low and step for each token and head. per "channel": for each channel and `block`
    tokens, since keys have channels that are large for all tokens (KIVI); a block's values are kept in full precision
    until it is full, and rounded anew as it fills. low and step are float16: numbers above 65504 do not fit.

    length: T, if other than like's. filled (B,): so many tokens of each row of `like` are taken over.
    """

    def __init__(self, like: Tensor, bits: int, per: str = "token", block: int = 32, length: int | None = None,
                 filled: Tensor | None = None):
        L, B, T, H, D = *like.shape[:2], length or like.shape[2], *like.shape[3:]
        _check(bits in (4, 8), "bits", "4 or 8", bits)
        _check(per in ("token", "channel"), "per", "token or channel", repr(per))
        _check(bits == 8 or D % 2 == 0, "head_dim", "even for 4 bits", D)
        self.shape, self.dtype, self.bits, self.per, self.block = (L, B, T, H, D), like.dtype, bits, per, block
        self.packed = like.new_zeros((L, B, T, H, D * bits // 8), dtype=torch.uint8)
        grid = (L, B, T, H, 1) if per == "token" else (L, B, -(-T // block), H, D)
        self.low, self.step = like.new_zeros(grid, dtype=torch.float16), like.new_ones(grid, dtype=torch.float16)
        if per == "channel":
            self.recent = like.new_zeros((L, B, block, H, D))  # the block that each row is filling
            self.filling = torch.full((L, B), -1, device=like.device)  # which one that is
        for row, n in enumerate([] if filled is None else filled.tolist()):  # each alone: what lies beyond is padding
            part, slots = self[:, row : row + 1], torch.arange(n, device=like.device)[None]
            for layer in range(L if n else 0):
                part[layer, torch.zeros_like(slots[:, :1]), slots] = like[layer, row : row + 1, :n]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in vars(self).values() if isinstance(t, Tensor))

    def _encode(self, x: Tensor, low: Tensor, high: Tensor):
        top = 2**self.bits - 1
        low, step = low.half(), ((high - low) / top).clamp_min(2.0**-24).half()
        codes = ((x - low.to(x.dtype)) / step.to(x.dtype)).round().clamp(0, top).to(torch.uint8)
        return codes if self.bits == 8 else codes[..., ::2] << 4 | codes[..., 1::2], low, step

    def _decode(self, packed: Tensor, low: Tensor, step: Tensor) -> Tensor:
        codes = packed if self.bits == 8 else torch.stack((packed >> 4, packed & 15), -1).flatten(-2)
        return codes.to(self.dtype) * step.to(self.dtype) + low.to(self.dtype)

    def __setitem__(self, place, x: Tensor) -> None:
        layer, row, slots = place
        if self.per == "token":
            encoded = self._encode(x, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))
            self.packed[layer, row, slots], self.low[layer, row, slots], self.step[layer, row, slots] = encoded
            return
        rows, first = torch.arange(len(slots), device=x.device), slots[:, :1] // self.block  # (B,), (B, 1)
        for i in range((slots.shape[1] - 1) // self.block + 2):  # the blocks that a row may touch, one by one
            self._fill(layer, rows, first + i, slots, x)

    def _fill(self, layer: int, rows: Tensor, block: Tensor, slots: Tensor, x: Tensor) -> None:
        """Write those of x that lie in block (B, 1) of each row."""
        T, start, end = self.shape[2], slots[:, :1], slots[:, -1:]
        touched = (block * self.block <= end)[:, 0]
        rows, block, start, end, x = rows[touched], block[touched], start[touched], end[touched], x[touched]
        if not len(rows):
            return
        token = block * self.block + torch.arange(self.block, device=x.device)  # (B, block): its slots
        new = ((token >= start) & (token <= end))[..., None, None]
        index = (token - start).clamp(0, x.shape[1] - 1)
        at = (layer, rows[:, None], token.clamp_max(T - 1))
        kept = (self.filling[layer, rows] == block[:, 0])[:, None, None, None]
        grid = layer, rows, block[:, 0]
        before = self._decode(self.packed[at], self.low[grid][:, None], self.step[grid][:, None])
        before = torch.where(kept, self.recent[layer, rows], before)
        each = torch.arange(len(rows), device=x.device)[:, None]
        values = torch.where(new, x[each, index], before)  # (B, block, H, D)
        unwritten = (token > end)[..., None, None]
        packed, low, step = self._encode(values, values.masked_fill(unwritten, math.inf).amin(1, keepdim=True),
                                         values.masked_fill(unwritten, -math.inf).amax(1, keepdim=True))
        inside = token < T
        self.packed[layer, rows[:, None].expand_as(token)[inside], token[inside]] = packed[inside]
        self.low[grid], self.step[grid] = low[:, 0], step[:, 0]
        self.recent[layer, rows], self.filling[layer, rows] = values, block[:, 0]

    def __getitem__(self, place):
        if isinstance(place[0], slice):  # [:, rows]
            store = object.__new__(QuantizedStore)
            store.__dict__ |= {name: t[place] if isinstance(t, Tensor) else t for name, t in vars(self).items()}
            store.shape = store.packed.shape[:-1] + self.shape[-1:]
            return store
        layer, row, slots = place
        packed, n = self.packed[place], len(range(self.shape[2])[slots])
        if self.per == "token":
            return self._decode(packed, self.low[place], self.step[place])
        low, step = (t[layer, row].repeat_interleave(self.block, 1)[:, slots] for t in (self.low, self.step))
        return self._decode(packed, low[:, :n], step[:, :n])
