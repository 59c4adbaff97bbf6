"""Folding on CPUs: gains searched, codes and digits written in one pass over the states, in C++.

In torch the search of `fisher` walks about 100 times over a block's states in their basis, and that
of `spectral` about 200 times, most of them slow. Here a token's states are read once, by
`native/fold.cpp`, on the threads that torch uses; the transform before it stays torch's. The bytes
are the reference's but where another order of a sum moves a gain whose neighbour is as good (2 of
2.2 million gains of the demo model on a text), and the same on every instruction set, on any number
of threads, and whatever else is encoded.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvfold.codec import BoundCodec
from kvfold.codecs.fisher import BoundFisher
from kvfold.codecs.spectral import BoundSpectral
from kvfold.kernels.cpu import fold_entry, native
from kvfold.packing import CHUNK, SECTIONS, DigitPlan
from kvfold.quantizers.gain import gain_table

_WORD = 2


def serves(bound: BoundCodec) -> bool:
    """Whether `encoded` gives this codec's bytes; never without the extension."""
    if native() is None:
        return False
    if isinstance(bound, BoundSpectral):
        return bound.codec.gain and not bound.codec.qjl
    return isinstance(bound, BoundFisher)


def encoded(bound: BoundCodec, x: Tensor, positions: Tensor, *, isa: str | None = None) -> Tensor:
    """Bytes `[blocks, nbytes]` of states `[blocks, heads, block_len, dim]`, as `encode` gives them.

    Args:
        bound: a codec that `serves` names.
        x: states in any layout.
        positions: `[blocks, block_len]`.
        isa: instruction set; None for the best.
    """
    assert isinstance(bound, BoundFisher | BoundSpectral)
    tables = tables_of(bound)
    y = bound.whitened(x, positions).contiguous()
    out = torch.zeros(len(x), bound.layout.nbytes, dtype=torch.uint8)
    tables.native.fold(
        tables.code,
        fold_entry(isa),
        y.data_ptr(),
        out.data_ptr(),
        len(y),
        torch.get_num_threads(),
    )
    return out


def held_by(bound: BoundCodec) -> list[Tensor]:
    """What the extension will hold to fold by a codec; empty where it does not serve it."""
    if not serves(bound):
        return []
    assert isinstance(bound, BoundFisher | BoundSpectral)
    return tables_of(bound).tensors


# --- tables ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """A codec as the extension knows it, and the tensors whose addresses it holds."""

    native: Any
    code: Any
    tensors: list[Tensor]

    @classmethod
    def of(cls, bound: BoundFisher | BoundSpectral) -> "Tables":
        """The tables of a bound codec: `kvfold::Code` of native/fold.h."""
        extension, site = native(), bound.site
        assert extension is not None
        at = {f.name: at for f, at in zip(bound.layout.fields, bound.layout.offsets, strict=True)}
        coordinate, first_coordinate = _coordinates(bound)
        column, first_column = _columns(bound.plan, at)
        tensors = {
            "coordinate": coordinate,
            "first_coordinate": first_coordinate,
            "column": column,
            "first_column": first_column,
            "gain": _gains(),
        }
        if isinstance(bound, BoundSpectral):
            level = bound.levels.contiguous()
            between = (level[1:] + level[:-1]) / 2
            tensors |= {"level": level, "threshold": between}
        numbers = {"level": 0, "threshold": 0}
        numbers |= {name: table.data_ptr() for name, table in tensors.items()}
        numbers |= {
            "heads": site.num_kv_heads,
            "dim": site.head_dim,
            "block": site.block_len,
            "nbytes": bound.layout.nbytes,
            "gain_at": at["gain"],
            "search": bound.codec.search,
        }
        return cls(extension, extension.Code(numbers), list(tensors.values()))


def tables_of(bound: BoundFisher | BoundSpectral) -> Tables:
    """The tables of a bound codec, kept with it: so they count as its tables do."""
    if "fold_tables" not in bound.__dict__:
        bound.__dict__["fold_tables"] = Tables.of(bound)
    return bound.__dict__["fold_tables"]


@cache
def _gains() -> Tensor:
    """`[3, 256]` of each byte: its gain, what divides by it (1 for the gain 0), and 1 over that."""
    gain = gain_table()
    divisor = torch.where(gain > 0, gain, 1.0)
    return torch.stack((gain, divisor, 1.0 / divisor))


def _coordinates(bound: BoundFisher | BoundSpectral) -> tuple[Tensor, Tensor]:
    """Coordinates that have bits, int32 `[n, 10]` (floats by their bits), and each head's first."""
    widths = torch.tensor(bound.plan.bits)
    head, at = (widths > 0).nonzero().unbind(-1)
    top = 2.0**widths - 1
    if isinstance(bound, BoundSpectral):
        level = bound.start[:, 0]
        step, offset = torch.zeros_like(top), torch.zeros_like(top)
    else:
        level = torch.full_like(widths, -1)
        step, offset = bound.step[:, 0], bound.offset[:, 0]
    divisor = torch.where(step > 0, step, 1.0)
    inverse = 1.0 / divisor
    share, cost = bound.share[:, 0], bound.cost[:, 0]
    floats = (top, share, cost, step, offset, divisor, inverse, offset * inverse)
    floats = torch.stack([part.float()[head, at] for part in floats], -1)
    ints = torch.stack((at, level[head, at]), -1).to(torch.int32)
    first = torch.zeros(len(widths) + 1, dtype=torch.int32)
    first[1:] = (widths > 0).sum(-1).cumsum(0)
    return torch.cat((ints, floats.view(torch.int32)), -1).contiguous(), first


def _columns(plan: DigitPlan, at: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Columns of digits, int32 `[n, 5]`, and each head's first one."""
    rows: list[tuple[int, int, int, int, int]] = []
    first, start = [0], {w: at.get(f"digits{w}", 0) for w in SECTIONS}
    for bits, head in zip(plan.bits, plan.heads, strict=True):
        rank = {c: i for i, c in enumerate(c for c, b in enumerate(bits) if b)}
        for w in SECTIONS:
            size, count = _WORD * plan.words(w), len(head[w])
            for i, column in enumerate(head[w]):
                begin, step = start[w] + i * size, _WORD
                if plan.axis == "channel":  # chunks of columns, word after word
                    low = i - i % CHUNK
                    begin = start[w] + low * size + (i - low) * _WORD
                    step = min(CHUNK, count - low) * _WORD
                rows.append((rank[column.coordinate], w, column.shift, begin, step))
            start[w] += count * size
        first.append(len(rows))
    table = torch.tensor(rows, dtype=torch.int32).view(-1, 5)
    return table, torch.tensor(first, dtype=torch.int32)
