"""What a kernel needs to know of a layer's codes: matrices for the query and the output, and bytes.

A codec prepares a query, and turns sums of columns back, with functions that are linear (see
`kvfold.codec`). Given unit vectors they give their matrices, so that one kernel serves them all:

    score(q, n) = g_n (q_page . y_n + q_page . gain) + o_n . (offset q) + mean_i . q_mean

with q_page = matrix^T q, of a query turned back to the page's first position where `turns` says so,
and i the token's place in its page (`turns="token"`: of a query turned back to the token's own
position, one mean for all tokens). Values: out = matrix^T sum(p g y) + gain^T sum(p g) + ...
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvfold.codec import BoundCodec, Stored, Total
from kvfold.packing import SECTIONS
from kvfold.transforms.rope import Rope


class NotLoweredError(NotImplementedError):
    """No kernel reads this code; the message says why."""


@dataclass(frozen=True)
class Operand:
    """One side of a layer; tables in float32, bytes counted from the start of the page.

    Args:
        stored: what the columns are.
        counts: `[heads][3]` columns of 4, 2 and 1 bits.
        sections: `[heads][3]` first byte of each head's section; 0 where it has none.
        matrix: keys `[heads, head_dim, columns]`, values `[heads, columns, head_dim]`; a head's
            columns are its sections' side by side, zeros behind them. Where heads share columns
            (`stored.share`), those of each of them in turn: `columns` times `share`.
        gain: `[heads, head_dim]` (keys: the query's gain term; values: what sum(p g) adds).
        offset: `[heads, groups, head_dim]`, likewise for per-token offsets; None without.
        mean: keys `[heads, block_len, head_dim]` (`[heads, 1, head_dim]` per token), whose product
            with the query is added to the scores; values `[heads, head_dim]`, added once for each
            unit of weight. None: no mean.
        bytes: first byte of the fields `gain`, `offset`, `page_scale` and `page_zero`.
        sizes: bytes of an element of those fields.
        rope: what turns the query, None where nothing does.
    """

    stored: Stored
    counts: tuple[tuple[int, int, int], ...]
    sections: tuple[tuple[int, int, int], ...]
    matrix: Tensor
    gain: Tensor
    offset: Tensor | None
    mean: Tensor | None
    bytes: dict[str, int]
    sizes: dict[str, int]
    rope: Rope | None = None


def lower_keys(bound: BoundCodec, *, per_token: bool = False) -> Operand:
    """The operand of a layer's keys.

    Args:
        bound: their codec.
        per_token: whether the kernel turns the query to each token's own position, as keys that
            were coded before RoPE need.

    Raises:
        NotLoweredError: the code has no columns that a kernel could read.
    """
    stored = _stored(bound)
    if stored.turns == "token" and not per_token:
        raise NotLoweredError(
            f"{_name(bound)}: keys coded before RoPE are decoded when they are read"
        )
    columns, gain, offset, mean = probe_keys(bound)
    parts = [_compact(part, bound) for part in columns.chunk(stored.share, -1)]
    rope = getattr(bound, "rope", None) if stored.turns != "nothing" else None
    if rope is not None:  # the matrices hold attention's scaling
        rope = replace(rope, scaling=1.0)
    return Operand(
        stored,
        *_sections(bound, 0),
        torch.cat(parts, -1),
        gain,
        offset,
        mean,
        _bytes(bound, 0),
        _sizes(bound),
        rope,
    )


def probe_keys(bound: BoundCodec) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What unit queries become: columns, gain, offset and mean as in `Operand`, not compacted."""
    stored, site = bound.stored, bound.site
    heads, dim, device = site.num_kv_heads, site.head_dim, site.device
    eye = torch.eye(dim, device=device).expand(1, heads, -1, -1)
    positions = torch.arange(site.block_len, device=device)[None]  # a page that starts at 0
    fields = {}
    if stored is not None and stored.page_scale is not None:
        at = {field.name: field for field in bound.layout.fields}
        for name, value in ((stored.page_scale, 1.0), (stored.page_zero, 0.0)):
            assert name is not None
            fields[name] = torch.full((1, *at[name].shape), value, device=device)
    if stored is not None and stored.turns == "token":
        query = bound.token_query(eye)
    else:
        query = bound.query(eye, fields, positions)
    gain = torch.zeros(heads, dim, device=device)
    if query.gain is not None:
        gain = query.gain[0, :, 0].sum(-1)
    offset = None if query.offset is None else query.offset[0].mT.contiguous()
    mean = None if query.mean is None else query.mean[0].mT.contiguous()
    return query.columns[0, :, 0], gain, offset, mean


def lower_values(bound: BoundCodec, start: int) -> Operand:
    """The operand of a layer's values, whose fields begin at byte `start` of the page.

    Raises:
        NotLoweredError: the code has no columns that a kernel could read.
    """
    stored = _stored(bound)
    groups = 1
    for field in bound.layout.fields:
        if field.name == stored.gain and len(field.shape) == 3:
            groups = field.shape[2]
    columns, gain, offset, mean = probe_values(bound, stored.plan.num_columns, groups)
    return Operand(
        stored,
        *_sections(bound, start),
        _compact(columns.mT, bound).mT.contiguous(),
        gain,
        offset if stored.offset is not None else None,
        mean if bool(mean.any()) else None,
        _bytes(bound, start),
        _sizes(bound),
    )


def probe_values(
    bound: BoundCodec, width: int, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What unit sums become: columns, gain, offset and mean as in `Operand`, not compacted."""
    heads, device = bound.site.num_kv_heads, bound.site.device

    def probe(columns: int = 0, gain: int = 0, offset: int = 0, one: int = 0) -> Tensor:
        """The outputs `[heads, n, dim]` of unit sums of one kind."""
        n = columns or gain or offset or one
        sums = []
        for size, wanted in ((width, columns), (groups, gain), (groups, offset), (1, one)):
            eye = torch.eye(size, device=device) if wanted else torch.zeros(n, size, device=device)
            sums.append(eye.expand(1, heads, -1, -1))
        return bound.output(Total(*sums))[0]

    gain = probe(gain=groups).sum(1)  # groups that have offsets of their own have no such term
    return probe(columns=width), gain, probe(offset=groups), probe(one=1)[:, 0]


def _stored(bound: BoundCodec) -> Stored:
    if bound.stored is None:
        raise NotLoweredError(
            f"{_name(bound)}: its {bound.site.side}s are decoded when they are read"
        )
    return bound.stored


def _name(bound: BoundCodec) -> str:
    return str(getattr(bound, "codec", type(bound).__name__))


def _compact(columns: Tensor, bound: BoundCodec) -> Tensor:
    """Columns with every section padded to its widest head, to sections side by side."""
    plan = _stored(bound).plan
    width = max(sum(counts) for counts in plan.counts)
    out = columns.new_zeros(*columns.shape[:-1], width)
    for h, counts in enumerate(plan.counts):
        to = start = 0
        for w, count in zip(SECTIONS, counts, strict=True):
            out[h, ..., to : to + count] = columns[h, ..., start : start + count]
            to, start = to + count, start + plan.padded[w]
    return out


def _bytes(bound: BoundCodec, start: int) -> dict[str, int]:
    layout = bound.layout
    return {f.name: start + at for f, at in zip(layout.fields, layout.offsets, strict=True)}


def _sizes(bound: BoundCodec) -> dict[str, int]:
    return {f.name: f.dtype.itemsize for f in bound.layout.fields}


Counts = tuple[tuple[int, int, int], ...]


def _sections(bound: BoundCodec, start: int) -> tuple[Counts, Counts]:
    """Counts and first bytes of each head's sections."""
    plan, at = _stored(bound).plan, _bytes(bound, start)
    ends = {w: at.get(f"digits{w}", 0) for w in SECTIONS}
    sections = []
    for counts in plan.counts:
        row: list[int] = []
        for w, count in zip(SECTIONS, counts, strict=True):
            row.append(ends[w] if count else 0)
            ends[w] += 2 * count * plan.words(w)
        sections.append((row[0], row[1], row[2]))
    return plan.counts, tuple(sections)
