"""Codes of 0 to 8 bits as columns of 4-, 2- and 1-bit digits in 16-bit lanes, and back, exactly.

A coordinate of `b` bits becomes digits of 4, 2 and 1 bits, most significant first (8 = 4 + 4,
6 = 4 + 2, 5 = 4 + 1, 3 = 2 + 1). A digit's weight `2**shift` belongs to its column, so attention
folds it into the prepared query (keys) or into the output transform (values) and reads three
sections of uniform width, whatever the widths of the coordinates:

    code[i] = sum over the columns c of coordinate i of  2**shift[c] * digit[c]

Attention works on quarters of a block. In a column of width `w` (4, 2, 1), lane `u` holds the
digits of the tokens `u + f * block_len / 4`, f = 0 to 3, field f in its bits `w*f .. w*f + w - 1`.
A 16-bit word holds 1, 2 or 4 lanes of `4 * w` bits: with `words = block_len * w / 16` of them a
column, lane u is part `u // words` of word `u % words`. So the rows that one matrix product takes
from K are the rows that it takes from V, whatever the widths, and unpacking is one and/shift a
field. The words of a section lie head after head:

- values (`axis="token"`): `[columns, words]`;
- keys (`axis="channel"`): chunks of 16 columns (the last has the rest), each `[words, columns]`.

Counts of columns may differ between heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from kvfold.layout import Field

#: widths of the sections in the order in which they are stored.
SECTIONS = (4, 2, 1)
DIGITS = {
    0: (),
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (4, 4),
}
MAX_BITS = 8
#: modules whose `pack` takes the place of `DigitPlan.pack`, by device type; imported when needed.
PACKERS = {"cuda": "kvfold.kernels.triton.fold"} if find_spec("triton") else {}
#: columns of keys that are stored together: what one matrix product contracts over.
CHUNK = 16
_WORD_BITS = 16
_QUARTERS = 4


@dataclass(frozen=True)
class Column:
    """One digit column of a head: `digit = (code[coordinate] >> shift) & (2**width - 1)`."""

    width: int
    coordinate: int
    shift: int


@dataclass(frozen=True)
class DigitPlan:
    """Which digit columns the coordinates of each head have, and how they lie in words.

    Args:
        bits: `[heads][coordinates]` code widths, 0 to 8; a 0-bit coordinate is not stored.
        block_len: tokens of a block, a multiple of 16.
        axis: the contraction axis of attention: `"channel"` for keys, `"token"` for values.
    """

    bits: tuple[tuple[int, ...], ...]
    block_len: int
    axis: Literal["channel", "token"]

    def __post_init__(self) -> None:
        if self.block_len <= 0 or self.block_len % _WORD_BITS:
            raise ValueError(f"block_len ({self.block_len}) must be a multiple of {_WORD_BITS}")
        wrong = sorted({b for head in self.bits for b in head} - set(DIGITS))
        if wrong:
            raise ValueError(f"code widths {wrong} are not possible; widths are 0 to {MAX_BITS}")

    @classmethod
    def uniform(
        cls,
        bits: int,
        heads: int,
        coordinates: int,
        block_len: int,
        axis: Literal["channel", "token"],
    ) -> "DigitPlan":
        """The plan of a code with the same width everywhere; equal plans are one object."""
        return _uniform(bits, heads, coordinates, block_len, axis)

    # --- columns ---------------------------------------------------------------------------

    @cached_property
    def heads(self) -> tuple[dict[int, tuple[Column, ...]], ...]:
        """Per head and section, the columns in stored order (coarse digits first)."""
        return tuple(_columns_of(head) for head in self.bits)

    @cached_property
    def counts(self) -> tuple[tuple[int, int, int], ...]:
        """Per head, the number of columns in the 4-, 2- and 1-bit section."""
        return tuple((len(h[4]), len(h[2]), len(h[1])) for h in self.heads)

    @cached_property
    def padded(self) -> dict[int, int]:
        """Per section, the largest count of any head: the width of `columns`' slice."""
        return {w: max(len(head[w]) for head in self.heads) for w in SECTIONS}

    @property
    def num_columns(self) -> int:
        """Width of `columns`: the sections' largest counts, summed."""
        return sum(self.padded.values())

    @cached_property
    def plain(self) -> bool:
        """Whether column c of every head is just coordinate c with weight 1."""
        width = self.bits[0][0]
        return width in SECTIONS and all(b == width for head in self.bits for b in head)

    @cached_property
    def _index(self) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinate, shift and mask `[heads, num_columns]`; padding has mask 0."""
        rows = []
        for head in self.heads:
            row = []
            for w in SECTIONS:
                row += [(c.coordinate, c.shift, 2**w - 1) for c in head[w]]
                row += [(0, 0, 0)] * (self.padded[w] - len(head[w]))
            rows.append(row)
        table = torch.tensor(rows, dtype=torch.int64).reshape(len(self.heads), self.num_columns, 3)
        return table[..., 0], table[..., 1], table[..., 2]

    def _index_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        cache = self.__dict__.setdefault("_by_device", {})
        if device not in cache:
            cache[device] = tuple(t.to(device) for t in self._index)
        return cache[device]

    # --- words -----------------------------------------------------------------------------

    def words(self, width: int) -> int:
        """16-bit words of one column of this width."""
        return self.block_len * width // _WORD_BITS

    def fields(self, prefix: str = "digits") -> list[Field]:
        """The stored sections, empty ones left out; each one flat, head after head."""
        stored = []
        for w in SECTIONS:
            words = sum(len(head[w]) for head in self.heads) * self.words(w)
            if words:
                stored.append(Field(f"{prefix}{w}", (words,), torch.int16))
        return stored

    def pack(self, codes: Tensor, prefix: str = "digits") -> dict[str, Tensor]:
        """Codes `[blocks, heads, block_len, coordinates]` (integers) to the stored sections."""
        if codes.device.type in PACKERS:  # the same words in one launch
            return import_module(PACKERS[codes.device.type]).pack(self, codes, prefix)
        columns = self.to_columns(codes)
        stored, start = {}, 0
        for w in SECTIONS:
            part = columns[..., start : start + self.padded[w]]
            start += self.padded[w]
            flat = [
                self._pack_words(part[:, heads, :, :count], w).flatten(1)
                for heads, count in self._runs(w)
                if count
            ]
            if flat:
                stored[f"{prefix}{w}"] = flat[0] if len(flat) == 1 else torch.cat(flat, 1)
        return stored

    def unpack(self, stored: Mapping[str, Tensor], prefix: str = "digits") -> Tensor:
        """The stored sections to codes `[blocks, heads, block_len, coordinates]` (int16)."""
        return self.from_columns(self.columns(stored, prefix))

    def columns(self, stored: Mapping[str, Tensor], prefix: str = "digits") -> Tensor:
        """The stored sections to digits `[blocks, heads, block_len, num_columns]` (int16).

        Sections follow one another, each padded with zero columns to the largest head's count.
        For values the result is a transposed view: its tokens are contiguous. A section that is
        left out of `stored` reads as the middle of its digits (the result is float32 then): leading
        sections alone are a coarser code.
        """
        parts = []
        for w in SECTIONS:
            if not self.padded[w]:
                continue
            if f"{prefix}{w}" in stored:
                parts.append(self._unpack_section(stored[f"{prefix}{w}"], w))
            else:
                other = next(iter(stored.values()))
                shape = (other.shape[0], len(self.bits), self.block_len, self.padded[w])
                middle = torch.tensor((2**w - 1) / 2, device=other.device)
                parts.append(middle.expand(shape))
        if not parts:  # every coordinate has 0 bits
            other = next(iter(stored.values()))
            shape = (other.shape[0], len(self.bits), self.block_len, 0)
            return other.new_zeros(shape, dtype=torch.int16)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def to_columns(self, codes: Tensor) -> Tensor:
        """Codes to digits `[blocks, heads, block_len, num_columns]` (int16)."""
        codes = codes.to(torch.int16)
        if self.plain:
            return codes
        coordinate, shift, mask = self._index_on(codes.device)
        index = coordinate[None, :, None].expand(*codes.shape[:3], -1)
        shift, mask = shift[:, None].to(torch.int16), mask[:, None].to(torch.int16)
        return (codes.gather(-1, index) >> shift) & mask

    def from_columns(self, columns: Tensor) -> Tensor:
        """Digits to codes, the inverse of `to_columns` (any integer or float dtype)."""
        if self.plain:
            return columns
        return self.gathered(columns)

    def spread(self, x: Tensor) -> Tensor:
        """Fold the digits' weights into `x` `[blocks, heads, ..., coordinates]`, a prepared query.

        Returns `[blocks, heads, ..., num_columns]`, so that `spread(x) . columns == x . codes`.
        """
        if self.plain:
            return x
        index, weight = self._index_like(x)
        return x.gather(-1, index) * weight

    def gathered(self, sums: Tensor) -> Tensor:
        """Sums over columns `[rows, heads, ..., num_columns]` to sums over codes.

        The transpose of `spread`: `gathered(p @ columns) == p @ codes`.
        """
        if self.plain:
            return sums
        index, weight = self._index_like(sums)
        out = sums.new_zeros(*sums.shape[:-1], len(self.bits[0]))
        return out.scatter_add_(-1, index, sums * weight)

    def _index_like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates and weights of the columns, shaped for `x` `[blocks, heads, ..., any]`."""
        coordinate, shift, mask = self._index_on(x.device)
        shape = (1, len(self.bits), *(1,) * (x.ndim - 3), -1)
        weight = torch.where(mask > 0, 2**shift, 0).to(x.dtype)
        return coordinate.view(shape).expand(*x.shape[:-1], -1), weight.view(shape)

    # --- one section -----------------------------------------------------------------------

    def _runs(self, width: int) -> Sequence[tuple[slice, int]]:
        """Runs of neighbouring heads with the same count of columns, worked on together."""
        runs: list[tuple[slice, int]] = []
        for h, head in enumerate(self.heads):
            count = len(head[width])
            if runs and runs[-1][1] == count:
                runs[-1] = (slice(runs[-1][0].start, h + 1), count)
            else:
                runs.append((slice(h, h + 1), count))
        return runs

    def _pack_words(self, digits: Tensor, width: int) -> Tensor:
        """Digits `[blocks, heads, block_len, count]` to words `[blocks, heads, n]`."""
        parts = _QUARTERS // width
        # token = (f * parts + part) * words + word
        split = digits.unflatten(2, (_QUARTERS, parts, -1))
        words = torch.zeros_like(split[:, :, 0, 0])  # [blocks, heads, words, count]
        for f in range(_QUARTERS):
            for part in range(parts):
                words |= split[:, :, f, part] << (_QUARTERS * width * part + width * f)
        if self.axis == "token":
            return words.mT.flatten(2)
        return torch.cat([chunk.flatten(2) for chunk in words.split(CHUNK, -1)], -1)

    def _unpack_section(self, stored: Tensor, width: int) -> Tensor:
        parts, start = [], 0
        for heads, count in self._runs(width):
            n = (heads.stop - heads.start) * count * self.words(width)
            words = stored[:, start : start + n].unflatten(1, (heads.stop - heads.start, -1))
            start += n
            part = self._unpack_words(words, width, count)
            if count < self.padded[width]:
                part = torch.nn.functional.pad(part, (0, self.padded[width] - count))
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _unpack_words(self, words: Tensor, width: int, count: int) -> Tensor:
        """Words `[blocks, heads, n]` to digits `[blocks, heads, block_len, count]`.

        The result is a transposed view for values: their tokens are contiguous.
        """
        rows = self.words(width)
        shifts = torch.arange(0, _WORD_BITS, width, dtype=torch.int16, device=words.device)
        shifts = shifts.view(-1, _QUARTERS).T.reshape(-1)  # token order: f, then part
        if self.axis == "token":
            split = words.unflatten(-1, (count, 1, rows)) >> shifts[:, None]
            return (split & (2**width - 1)).flatten(-2).mT
        whole = count // CHUNK * CHUNK
        chunks = []  # [blocks, heads, rows, columns]
        if whole:
            part = words[..., : whole * rows].unflatten(-1, (-1, rows, CHUNK))
            chunks.append(part.movedim(-3, -2).flatten(-2))
        if count > whole:
            chunks.append(words[..., whole * rows :].unflatten(-1, (rows, -1)))
        if not chunks:
            return words.new_zeros(*words.shape[:2], self.block_len, 0)
        split = (chunks[0] if len(chunks) == 1 else torch.cat(chunks, -1)).unsqueeze(-3)
        # the mask also cuts off the sign that an arithmetic shift drags in
        return ((split >> shifts[:, None, None]) & (2**width - 1)).flatten(-3, -2)


def _columns_of(bits: Sequence[int]) -> dict[int, tuple[Column, ...]]:
    """The columns of one head by section, coarse digits before fine ones."""
    found: dict[int, list[tuple[int, Column]]] = {w: [] for w in SECTIONS}
    for coordinate, b in enumerate(bits):
        shift = b
        for rank, width in enumerate(DIGITS[b]):
            shift -= width
            found[width].append((rank, Column(width, coordinate, shift)))
    return {
        w: tuple(c for _, c in sorted(ranked, key=lambda rc: (rc[0], rc[1].coordinate)))
        for w, ranked in found.items()
    }


@lru_cache(maxsize=256)
def _uniform(
    bits: int, heads: int, coordinates: int, block_len: int, axis: Literal["channel", "token"]
) -> DigitPlan:
    return DigitPlan(((bits,) * coordinates,) * heads, block_len, axis)
