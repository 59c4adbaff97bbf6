"""A layer's codes as the C++ kernel takes them: numbers, and tables whose addresses it is given."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvfold.cache.store import LayerStore
from kvfold.codec import BoundCodec, States, Tabled
from kvfold.kernels.lowering import (
    NotLoweredError,
    lower_keys,
    lower_values,
    probe_keys,
    probe_values,
)
from kvfold.packing import SECTIONS
from kvfold.transforms.rope import Rope

#: dtypes of queries and of exact states, as native/operand.h numbers them.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
STORED_TYPES = TYPES | {torch.float8_e4m3fn: 3}
_DIGITS, _CODES, _POLAR, _STATES = range(4)
_TURNS = {"nothing": 0, "mean": 1, "all": 2, "token": 3}
#: columns of a head of keys, at most.
MAX_COLUMNS = 1000
_LIMBS = 3
#: norm of a column as 16-bit numbers: products with queries of the same norm are within int32.
_SHORT_NORM = 46_000.0
#: angle in half a page up to which a wave is a sum of a few powers, to 1e-7.
_SLOW, _POWERS = 0.5, 4
#: what the extension takes of a side, as numbers and addresses; 0 where there is none.
NUMBERS = """
    kind columns gain_at gain_size gain_next centred sections section
    matrix short_matrix short_unit short_columns gain offset mean order turns pairs
    waves fast wave slow middle
    scale_at zero_at segments limbs limb_scale turn frequency
    term table_at table plain brief cos_at sin_at states_at states_type
"""


@dataclass
class LayerTables:
    """The extension's layer, and the tensors whose addresses it holds.

    Args:
        native: the extension.
        layer: its object.
        rope: what turns queries back to pages' first positions, None where nothing does.
        value_dim: channels of a value head.
        tensors: the tables, float32 mostly.
        placed: addresses of the pool's slabs that the layer knows.
    """

    native: Any
    layer: Any
    rope: Rope | None
    value_dim: int
    tensors: list[Tensor]
    placed: list[int] = field(default_factory=list)

    @staticmethod
    def of(store: LayerStore) -> "LayerTables":
        """Lower a layer.

        Raises:
            NotLoweredError: the kernel does not serve one of its codes.
        """
        from kvfold.kernels.cpu import _native  # type: ignore[attr-defined]

        key = _key_side(store.key)
        value = _value_side(store.value, store.layout.keys.nbytes)
        layer = _native.Layer(
            key.numbers,
            value.numbers,
            store.pool.page_bytes,
            store.pool.slab_pages,
            store.timeline.sinks,
        )
        tensors = [*key.tensors, *value.tensors]
        return LayerTables(_native, layer, key.rope, store.value.site.head_dim, tensors)


def tensors_of(store: LayerStore) -> list[Tensor]:
    """The tables of a layer that is served, made for their sizes."""
    return [*_key_side(store.key).tensors, *_value_side(store.value, 0).tensors]


def unserved(store: LayerStore) -> str | None:
    """Why the kernel does not serve a layer's codes; None where it does."""
    try:
        for bound in (store.key, store.value):
            if bound.decoded is None:
                lower_keys(bound, per_token=True) if bound is store.key else lower_values(bound, 0)
        _key_side(store.key)
        _value_side(store.value, 0)
    except NotLoweredError as error:
        return str(error)
    return None


# --- sides -----------------------------------------------------------------------------------


@dataclass
class _Side:
    """Numbers of a `kvfold::Side`; tables are held beside their addresses."""

    numbers: dict[str, int]
    tensors: list[Tensor] = field(default_factory=list)
    rope: Rope | None = None

    def point(self, name: str, table: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        """Give the kernel a table's address."""
        if table is None:
            return
        table = table.to(dtype).contiguous()
        self.tensors.append(table)
        self.numbers[name] = table.data_ptr()


def _side(bound: BoundCodec) -> _Side:
    """A side with everything absent."""
    site = bound.site
    none = dict.fromkeys(NUMBERS.split(), 0)
    numbers = none | {
        "heads": site.num_kv_heads,
        "dim": site.head_dim,
        "block": site.block_len,
        "groups": 1,
        "offset_at": -1,
        "share": 1,
    }
    return _Side(numbers)


def _key_side(bound: BoundCodec) -> _Side:
    if bound.decoded is not None:
        return _decoded_side(bound, 0)
    operand = lower_keys(bound, per_token=True)
    stored, site, side = operand.stored, bound.site, _side(bound)
    share = stored.share
    groups = 1 if operand.offset is None else operand.offset.shape[1]
    if groups != share:
        raise NotLoweredError(f"{bound!r}: keys with {groups} groups of channels a token")
    if stored.levels is not None:
        return _levels_side(bound, operand.stored.plan, operand.stored.gain, stored.levels, 0)
    order = None
    if operand.rope is not None and operand.rope.inv_freq:
        side.rope = operand.rope
        side.numbers["pairs"] = len(operand.rope.inv_freq)
        order = _order(operand.rope, site.head_dim)
        side.numbers["turns"] = _TURNS[stored.turns]
    elif stored.turns == "token":  # a model without RoPE: turned by nothing
        side.numbers["turns"] = _TURNS["token"]
    matrix, gain, offset, mean = operand.matrix, operand.gain, operand.offset, operand.mean
    if order is not None:
        matrix, gain = matrix[:, order], gain[:, order]
        offset = None if offset is None else offset[..., order]
        mean = None if mean is None else mean[..., order]
        side.point("order", order, torch.int32)
    _sections(side, operand.counts, operand.sections)
    _parameters(side, bound, 0, stored.gain, stored.offset)
    side.point("gain", gain)
    side.point("offset", offset)
    if stored.turns == "token":
        matrix = matrix.unflatten(-1, (share, -1)).transpose(1, 2)  # [heads, share, dim, columns]
        matrix = torch.nn.functional.pad(matrix, (0, -matrix.shape[-1] % 4))
        side.numbers |= {"columns": matrix.shape[-1], "share": share}
        limbs, scale = _limbs(matrix.transpose(1, 2))  # [heads, dim, share, ...]
        side.point("limbs", limbs, torch.int8)
        side.point("limb_scale", scale)
        side.point("mean", None if mean is None else mean[:, 0])
        rope = operand.rope or Rope(())
        in_page = torch.arange(site.block_len)
        frequency = torch.tensor(rope.inv_freq, dtype=torch.float32)
        angle = in_page.float() * frequency[:, None]  # [pairs, block]
        side.point("turn", torch.stack((angle.cos(), angle.sin(), angle)))
        side.point("frequency", frequency)
    else:
        side.numbers["columns"] = matrix.shape[-1]
        side.point("matrix", matrix)
        if stored.turns == "all" and side.rope is not None and site.dtype != torch.float32:
            _shorts(side, matrix)
        if mean is not None and side.rope is not None:
            _waves(side, mean, side.rope)
        else:
            side.point("mean", None if mean is None else mean.mT)  # [heads, dim, block]
    if stored.page_scale is not None:
        assert stored.page_zero is not None
        shape = {f.name: f.shape for f in bound.layout.fields}[stored.page_scale]
        if site.block_len & (site.block_len - 1):
            raise NotLoweredError(
                f"groups of tokens in pages of {site.block_len}; powers of two are possible"
            )
        side.numbers |= {
            "segments": shape[1],
            "scale_at": operand.bytes[stored.page_scale],
            "zero_at": operand.bytes[stored.page_zero],
        }
    if side.numbers["columns"] * share > MAX_COLUMNS:
        raise NotLoweredError(f"{side.numbers['columns']} columns a head, at most {MAX_COLUMNS}")
    return side


def _value_side(bound: BoundCodec, start: int) -> _Side:
    if bound.decoded is not None:
        return _decoded_side(bound, start)
    operand = lower_values(bound, start)
    stored, side = operand.stored, _side(bound)
    if stored.levels is not None:
        return _levels_side(bound, stored.plan, stored.gain, stored.levels, start)
    shapes = {f.name: f.shape for f in bound.layout.fields}
    groups = shapes[stored.gain][2] if stored.gain and len(shapes[stored.gain]) == 3 else 1
    side.numbers |= {"columns": operand.matrix.shape[1], "groups": groups}
    _sections(side, operand.counts, operand.sections)
    _parameters(side, bound, start, stored.gain, stored.offset)
    gain = operand.gain
    if groups == 1:
        # the kernel sums digits less 2^(width - 1); in float64, as the two nearly cancel
        middle = operand.matrix.new_zeros(operand.matrix.shape[:2], dtype=torch.float64)
        for h, counts in enumerate(operand.counts):
            widths = torch.tensor(SECTIONS).repeat_interleave(torch.tensor(counts))
            middle[h, : len(widths)] = 2.0 ** (widths - 1)
        gain = (gain + (middle[:, None] @ operand.matrix.double())[:, 0]).float()
        side.numbers["centred"] = 1
    side.point("matrix", operand.matrix)
    side.point("gain", gain)
    side.point("offset", operand.offset)
    side.point("mean", operand.mean)
    return side


def _levels_side(
    bound: BoundCodec, plan: Any, gain: str | None, levels: Tensor, start: int
) -> _Side:
    """Levels of digits as a table for each column."""
    heads, columns = len(plan.bits), len(plan.bits[0])
    at = torch.arange(len(levels))[:, None] * levels.shape[1]
    at = at.expand(len(levels), columns).expand(heads, columns)
    gains = () if gain is None else (gain,)
    tabled = Tabled((("digits", plan),), gains, levels.flatten(), at)
    return _tabled_side(bound, tabled, start)


def _decoded_side(bound: BoundCodec, start: int) -> _Side:
    if isinstance(bound.decoded, Tabled):
        return _tabled_side(bound, bound.decoded, start)
    assert isinstance(bound.decoded, States)
    side, site = _side(bound), bound.site
    fields = {f.name: f for f in bound.layout.fields}
    dtype = fields["states"].dtype
    if dtype not in STORED_TYPES:
        raise NotLoweredError(f"states stored as {dtype}; possible: {tuple(STORED_TYPES)}")
    side.numbers |= {
        "kind": _STATES,
        "columns": site.head_dim,
        "states_at": start + _at(bound)["states"],
        "states_type": STORED_TYPES[dtype],
    }
    _parameters(side, bound, start, bound.decoded.gain, None)
    side.point("gain", torch.zeros(site.num_kv_heads, site.head_dim))
    return side


def _tabled_side(bound: BoundCodec, tabled: Tabled, start: int) -> _Side:
    side, site = _side(bound), bound.site
    heads, polar = site.num_kv_heads, tabled.start is None
    groups = max(1, len(tabled.gains))
    if site.side == "key":
        matrix, gain, offset, mean = probe_keys(bound)
        columns = matrix.shape[-1]
        side.point("mean", None if mean is None else mean.mT)
    else:
        columns = sum(len(plan.bits[0]) for _, plan in tabled.plans)
        matrix, gain, offset, mean = probe_values(bound, columns, groups)
        side.point("mean", mean if bool(mean.any()) else None)
        offset = None
    assert offset is None
    counts: list[list[tuple[int, int, int]]] = [[] for _ in range(heads)]
    terms = torch.full((heads, columns, 3, 2), -1, dtype=torch.int32)
    first_column, first_coordinate = [0] * heads, 0
    for prefix, plan in tabled.plans:
        ends = {w: start + _at(bound).get(f"{prefix}{w}", 0) for w in SECTIONS}
        for h, head in enumerate(plan.heads):
            for w in SECTIONS:
                for i, column in enumerate(head[w]):
                    # polar: a radius and its angle stand on neighbouring columns
                    c = 2 * column.coordinate if polar else column.coordinate
                    c += (1 if first_coordinate else 0) if polar else first_coordinate
                    free = int((terms[h, c, :, 0] >= 0).sum())
                    terms[h, c, free, 0] = first_column[h] + i
                    terms[h, c, free, 1] = column.shift
                counts[h].append((w, len(head[w]), ends[w]))
                ends[w] += 2 * len(head[w]) * plan.words(w)
                first_column[h] += len(head[w])
        first_coordinate += len(plan.bits[0])
    section, total = [], max(first_column)
    for head in counts:
        at = 0
        for width, count, begin in head:
            section.append((width, count, begin if count else 0, at))
            at += count
    if total > MAX_COLUMNS:
        raise NotLoweredError(f"{total} columns a head, at most {MAX_COLUMNS}")
    side.numbers |= {
        "kind": _POLAR if polar else _CODES,
        "columns": columns,
        "groups": groups,
        "sections": len(counts[0]),
        "plain": int(not polar and _is_plain(terms, tabled.start)),
        "brief": int(max(b for _, plan in tabled.plans for head in plan.bits for b in head) <= 4),
        "cos_at": max(tabled.cos_at, 0),
        "sin_at": max(tabled.sin_at, 0),
    }
    side.point("section", torch.tensor(section), torch.int32)
    side.point("term", terms, torch.int32)
    side.point("table_at", tabled.start, torch.int32)
    # whole registers of a table are read
    side.point("table", torch.nn.functional.pad(tabled.table, (0, 16)))
    side.point("matrix", matrix)
    side.point("gain", gain)
    _parameters(side, bound, start, tabled.gains[0] if tabled.gains else None, None)
    if groups > 1:
        at = _at(bound)
        steps = {at[b] - at[a] for a, b in zip(tabled.gains, tabled.gains[1:], strict=False)}
        if len(steps) != 1:
            raise NotLoweredError(f"{bound!r}: fields of gains that lie unevenly")
        side.numbers["gain_next"] = steps.pop()
    return side


def _is_plain(terms: Tensor, start: Tensor | None) -> bool:
    """Whether column c of every head is its digit c, by one table a head."""
    assert start is not None
    wanted = torch.full_like(terms, -1)
    wanted[:, :, 0, 0] = torch.arange(terms.shape[1])
    wanted[:, :, 0, 1] = 0
    return bool((terms == wanted).all() and (start == start[:, :1]).all() and (start >= 0).all())


# --- parts -----------------------------------------------------------------------------------


def _at(bound: BoundCodec) -> dict[str, int]:
    layout = bound.layout
    return {f.name: at for f, at in zip(layout.fields, layout.offsets, strict=True)}


def _parameters(
    side: _Side, bound: BoundCodec, start: int, gain: str | None, offset: str | None
) -> None:
    """Where the gains and offsets of tokens lie."""
    sizes = {f.name: f.dtype.itemsize for f in bound.layout.fields}
    if gain is not None:
        side.numbers |= {"gain_at": start + _at(bound)[gain], "gain_size": sizes[gain]}
    if offset is not None:
        side.numbers["offset_at"] = start + _at(bound)[offset]


def _sections(
    side: _Side,
    counts: Sequence[tuple[int, int, int]],
    starts: Sequence[tuple[int, int, int]],
) -> None:
    rows = []
    for count, start in zip(counts, starts, strict=True):
        first = 0
        for w, n, at in zip(SECTIONS, count, start, strict=True):
            rows.append((w, n, at, first))
            first += n
    side.numbers["sections"] = len(SECTIONS)
    side.point("section", torch.tensor(rows), torch.int32)


def _shorts(side: _Side, matrix: Tensor) -> None:
    """A matrix [heads, dim, columns] as 16-bit numbers, for queries turned page by page."""
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[-1] % 16)).double()
    unit = torch.maximum(padded.norm(dim=1) / _SHORT_NORM, padded.abs().amax(1) / 32_767)
    whole = (padded / unit.clamp_min(1e-300)[:, None]).round()
    side.point("short_matrix", whole.unflatten(1, (-1, 2)).transpose(2, 3), torch.int16)
    side.point("short_unit", unit)
    side.numbers["short_columns"] = padded.shape[-1]


def _waves(side: _Side, mean: Tensor, rope: Rope) -> None:
    """A mean [heads, block, dim] that RoPE turns, as waves around the middle of a page.

        q . R_x m = (q1 m1 + q2 m2) cos(theta x) + (q2 m1 - q1 m2) sin(theta x)

    for each pair of channels, m the mean in the middle and x the distance from there. Cosines are
    even and sines odd, so half a page tells the rest; pairs that turn little within a page share
    a few powers of x. Together a quarter of the product with the whole table.
    """
    block, pairs = mean.shape[1], len(rope.inv_freq)
    theta = torch.tensor(rope.inv_freq, dtype=torch.float64)
    angle, first = theta * (block - 1) / 2, mean[:, 0].double()
    a, b, rest = first.split([pairs, pairs, mean.shape[2] - 2 * pairs], -1)
    cos, sin = angle.cos(), angle.sin()
    middle = torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
    x = torch.arange(block // 2, dtype=torch.float64) + 0.5
    reach = theta * block / 2
    turned = (reach > _SLOW).nonzero()
    fast = int(turned[-1]) + 1 if len(turned) else 0
    if pairs - fast < _POWERS:
        fast = pairs
    waves, slow = [], []
    for odd, wave in enumerate((torch.cos, torch.sin)):
        waves.append(wave(theta[:fast, None] * x))
        if fast < pairs:
            power = 2 * torch.arange(_POWERS, dtype=torch.float64)[:, None] + odd
            waves.append((2 * x / block) ** power)
            sign = (-1.0) ** torch.arange(_POWERS, dtype=torch.float64)[:, None]
            slow.append(sign * reach[fast:] ** power / (power + 1).lgamma().exp())
    side.numbers |= {"waves": len(torch.cat(waves)) // 2, "fast": fast}
    side.point("wave", torch.cat(waves))
    side.point("slow", torch.cat(slow) if slow else None)
    side.point("middle", middle)


def _order(rope: Rope, dim: int) -> Tensor | None:
    """Channels with the first ones of all pairs, then the second ones; None where they stand so."""
    if rope.pairs == "half":
        return None
    turned = torch.arange(rope.rotary_dim)
    return torch.cat((turned[0::2], turned[1::2], torch.arange(rope.rotary_dim, dim)))


def _limbs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[..., columns]` as int8 limbs `[..., columns / 4, limbs, 4]`, and their scales `[...]`.

    row = scale * (limb0 + 256 limb1 + 65536 limb2), each limb from -128 to 127.
    """
    limit = 127 * (1 + 256 + 65536)
    scale = matrix.double().abs().amax(-1) / limit
    fixed = matrix.double() / torch.where(scale > 0, scale, 1.0)[..., None]
    middle = 0x808080
    code = (fixed.round().to(torch.int32) + middle) ^ middle
    limbs = torch.stack(
        [(code >> 8 * k) & 0xFF for k in range(_LIMBS)], -2
    )  # [..., limbs, columns]
    limbs = limbs.to(torch.uint8).view(torch.int8)
    return limbs.unflatten(-1, (-1, 4)).transpose(-3, -2).contiguous(), scale.float()
