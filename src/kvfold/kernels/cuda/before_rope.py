"""Tables of keys that were coded before RoPE, which `before_rope.cuh` decodes as it reads them.

A key is `R_i (gain (sum over columns of digit column + gain term) + mean)` as seen from its page's
first position, i its place in the page. Columns come in blocks of 16, the gain term and the mean in
the first; where two sections hold digits of the same 16 coordinates (codes of 3, 5 and 6 bits), a
block is made of both.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.kernels.lowering import NotLoweredError, Operand
from kvfold.packing import CHUNK, SECTIONS
from kvfold.transforms.rope import Rope

#: head dimensions for which there is an instruction, half of them a multiple of 8
HEAD_DIMS = 64, 80, 96, 128
#: columns of a block in the order of the product's rows: four of a thread are two registers
ORDER = tuple(4 * c + 2 * half + i for half in range(2) for c in range(4) for i in range(2))
#: the largest entries of the matrix, the gain term and the mean: with gains up to 2^8 and digits at
#: their ends, keys stay within float16
LARGEST, LARGEST_GAIN, LARGEST_MEAN = 2.0**-4, 2.0**4, 2.0**13
#: warps of a program that bring pages to the others
BRINGERS = 4


@dataclass
class Decoder:
    """The tables of a layer.

    Args:
        blocks: of columns, of the head that has most.
        heads: uint8 `[heads, bytes]`: parts and matrix, see `before_rope.cuh`.
        turns: uint8: cosines and sines of a page's tokens, and the pairs' frequencies (float32).
        channels: int32 `[dim]` the channels in the order of the tables: partners dim / 2 apart.
        exponent: the matrix and the mean are times 2^exponent.
        counts: blocks of each head.
    """

    blocks: int
    heads: Tensor
    turns: Tensor
    channels: Tensor
    exponent: int
    counts: tuple[int, ...]


def decoder(key: Operand) -> Decoder:
    """The tables of keys that are turned token by token.

    Raises:
        NotLoweredError: they are none that the kernel reads; the message says why.
    """
    heads, dim, _ = key.matrix.shape
    _check(key, dim)
    rope, device = key.rope or Rope(()), key.matrix.device
    channels = order(rope, dim).to(device)
    matrix, gain = key.matrix[:, channels].double().cpu(), key.gain[:, channels].double().cpu()
    mean = torch.zeros_like(gain) if key.mean is None else key.mean[:, 0, channels].double().cpu()
    limits = ((LARGEST, matrix), (LARGEST_GAIN, gain), (LARGEST_MEAN, mean))
    exponent = min(
        int((limit / x.abs().max().clamp_min(1e-30)).log2().floor()) for limit, x in limits
    )
    exponent = max(-100, min(exponent, 100))
    found = [blocks(matrix[h], counts) for h, counts in enumerate(key.counts)]
    most = 1 + max(map(len, found))
    rows = [
        head(matrix[h] * 2.0**exponent, gain[h] * 2.0**exponent, mean[h] * 2.0**exponent,
             key.counts[h], found[h], most)
        for h in range(heads)
    ]  # fmt: skip
    return Decoder(
        most,
        torch.stack(rows).to(device),
        turns(rope, dim).to(device),
        channels.int(),
        exponent,
        tuple(1 + len(x) for x in found),
    )


def order(rope: Rope, dim: int) -> Tensor:
    """First channels of all pairs, then their partners; those that are not turned in pairs too."""
    n = len(rope.inv_freq)
    a = torch.arange(n) if rope.pairs == "half" else 2 * torch.arange(n)
    b = a + n if rope.pairs == "half" else a + 1
    still = torch.arange(2 * n, dim)
    half = len(still) // 2
    return torch.cat((a, still[:half], b, still[half:]))


@dataclass(frozen=True)
class Part:
    """Up to 16 columns of a section: the first one's number in its section, and of the matrix."""

    section: int
    first: int
    column: int
    count: int

    @property
    def width(self) -> int:
        """Bits of a digit."""
        return SECTIONS[self.section]


def blocks(matrix: Tensor, counts: tuple[int, int, int]) -> list[list[tuple[Part, float]]]:
    """A head's blocks: parts and their factors on the matrix of the block's first part.

    Args:
        matrix: `[dim, columns]` of the head.
        counts: columns of its sections.
    """
    found: list[list[tuple[Part, float]]] = []
    column = 0
    for section, count in enumerate(counts):
        for first in range(0, count, CHUNK):
            part = Part(section, first, column + first, min(CHUNK, count - first))
            mine = matrix[:, part.column : part.column + part.count]
            for block in found:
                other = block[0][0]
                if len(block) > 1 or other.count != part.count:
                    continue
                theirs = matrix[:, other.column : other.column + other.count]
                factor = 2.0 ** float((mine.norm() / theirs.norm().clamp_min(1e-30)).log2().round())
                if torch.equal(theirs * factor, mine) and bool(mine.any()):
                    block.append((part, factor))
                    break
            else:
                found.append([(part, 1.0)])
        column += count
    return found


def head(
    matrix: Tensor, gain: Tensor, mean: Tensor, counts: tuple[int, int, int],
    found: list[list[tuple[Part, float]]], most: int,
) -> Tensor:  # fmt: skip
    """A head's tables as bytes: parts and matrix of `most` blocks."""
    dim = len(matrix)
    bytes_before = [
        0,
        *torch.tensor([c * w * 16 for c, w in zip(counts, SECTIONS, strict=True)])
        .cumsum(0)
        .tolist(),
    ]
    parts = torch.zeros(most, 2, 16, dtype=torch.int32)
    operand = torch.zeros(most, CHUNK, dim, dtype=torch.float64)
    for e, block in enumerate(found, 1):
        for i, (part, factor) in enumerate(block):
            at = bytes_before[part.section] + part.first * part.width * 16
            parts[e, i, :4] = torch.tensor([at, part.width, part.count, 0])
            parts[e, i, 4:] = digits(part.width, factor).view(torch.int32).flatten()
            columns = matrix[:, part.column : part.column + part.count].mT
            gain = gain + columns.sum(0) * 2 ** (part.width - 1)  # digits are about zero
            if i == 0:
                operand[e, : part.count] = columns
    parts[0, 0, 3] = 1 + len(found)
    operand[0, 0], operand[0, 1] = gain, mean
    operand = operand[:, list(ORDER)].unflatten(1, (2, 8)).unflatten(3, (dim // 8, 8))
    operand = operand.permute(0, 3, 1, 4, 2)  # block, channels / 8, columns / 8, channel, column
    whole = [parts, operand.to(torch.float16)]
    return torch.cat([x.contiguous().flatten().view(torch.uint8) for x in whole])


def digits(width: int, factor: float) -> Tensor:
    """What makes float16 numbers of a part's digits: mask, factor and addend of each quarter.

    A word `x & mask | 0x6400` is the number 1024 + digit 2^position; times `factor` and with
    `addend` it is the digit, about zero, times the part's factor: exactly.
    """
    position = {4: (0, 4, 0, 4), 2: (0, 2, 4, 6), 1: (0, 1, 2, 3)}[width]
    mask = torch.tensor([((1 << width) - 1) << p for p in position], dtype=torch.int16)
    by = torch.tensor([factor * 2.0**-p for p in position])
    addend = -(1024 * by + factor * 2 ** (width - 1))
    whole = torch.stack((by, addend)).to(torch.float16).view(torch.int16)
    return torch.cat((mask[None], whole)).repeat_interleave(2, -1)


def turns(rope: Rope, dim: int) -> Tensor:
    """Cosines and sines of a page's places as a warp reads them, and the frequencies, as bytes.

    float16 `[half, quarter, pairs / 8, lane, row, cosine or sine, pair]`.
    """
    frequency = torch.zeros(dim // 2)
    frequency[: len(rope.inv_freq)] = torch.tensor(rope.inv_freq)
    g = torch.arange(8)
    first = 4 * (g // 2) + g % 2 + 2 * (g // 2 % 2)
    rows = torch.stack((first, first ^ 2), -1)  # [g, row]
    half, quarter = torch.arange(2)[:, None, None, None], torch.arange(4)[:, None, None]
    place = 32 * quarter + 16 * half + rows  # [half, quarter, g, row]
    angle = place[..., None].double() * frequency.double()
    both = torch.stack((angle.cos(), angle.sin()), -2)  # ..., g, row, which, pair
    both = both.unflatten(-1, (dim // 16, 4, 2)).permute(0, 1, 5, 2, 6, 3, 4, 7)
    table = both.to(torch.float16).contiguous().flatten().view(torch.uint8)
    return torch.cat((table, frequency.view(torch.uint8)))


def nbytes(blocks: int, dim: int, m: int) -> int:
    """Shared memory of a program for the tables, its queries, and the warps that bring pages."""
    heads = blocks * 128 + blocks * dim * 32
    return dim * 256 + dim * 2 + heads + (m * (dim + 8) + 4) * 4 + 16 + BRINGERS * (128 + dim * 4)


def _check(key: Operand, dim: int) -> None:
    stored = key.stored
    if stored.share > 1:
        raise NotLoweredError(f"keys coded before RoPE by {stored.share} heads together")
    if dim not in HEAD_DIMS:
        possible = ", ".join(map(str, HEAD_DIMS))
        raise NotLoweredError(f"keys coded before RoPE of head_dim {dim}; {possible} are possible")
    if stored.gain is None or key.sizes[stored.gain] != 1 or stored.levels is not None:
        raise NotLoweredError(
            "keys coded before RoPE other than digits with a gain of one byte a token"
        )
