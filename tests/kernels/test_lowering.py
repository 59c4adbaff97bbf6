"""The matrices of a lowered layer give what the codec's own query, read and output give."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kvfold
from kvfold.attention.paged import accumulate, score
from kvfold.codec import BoundCodec, Site
from kvfold.kernels.lowering import NotLoweredError, Operand, lower_keys, lower_values
from kvfold.packing import SECTIONS
from kvfold.transforms.rope import Rope

HEADS, DIM, BLOCK = 3, 64, 128
START = 777
ROPE = Rope(tuple(1e4 ** (-i / 32) for i in range(32)))
LOWERED = {
    "key": {"fisher4", "fisher2", "fisher1", "fisher2-post", "int8", "kivi2-g32", "turboquant4"},
    "value": {"fisher2", "fisher2-pre", "fisher3", "int8", "kivi2-g32", "rotatekv3", "turboquant2"},
}
for names in LOWERED.values():
    names |= {f"turboquant{bits}-uniform" for bits in (2, 3, 4)}


def bound(name: str, side: str) -> BoundCodec:
    preset = kvfold.get(name)
    codec = preset.keys if side == "key" else preset.values
    site = Site(side, HEADS, DIM, BLOCK, rope=ROPE)  # type: ignore[arg-type]
    return codec.bind(site, codec.example(site))


def columns_of(operand: Operand, page: Tensor) -> Tensor:
    """The columns `[heads, block_len, columns]` from the page's bytes, with Python loops."""
    plan = operand.stored.plan
    out = torch.zeros(HEADS, BLOCK, max(sum(c) for c in operand.counts))
    token = torch.arange(BLOCK)
    lane, field = token % (BLOCK // 4), token // (BLOCK // 4)
    for h in range(HEADS):
        at = 0
        for w, count, start in zip(SECTIONS, operand.counts[h], operand.sections[h], strict=True):
            words = plan.words(w)
            raw = page[start : start + 2 * count * words].view(torch.int16).int() & 0xFFFF
            for c in range(count):
                if plan.axis == "token":
                    column = raw[c * words : (c + 1) * words]
                else:
                    first = c // 16 * 16
                    chunk = raw[first * words : (first + min(16, count - first)) * words]
                    column = chunk.view(words, -1)[:, c - first]
                digit = column[lane % words] >> (4 * w * (lane // words) + w * field)
                out[h, :, at + c] = (digit & (2**w - 1)).float()
            at += count
    if operand.stored.levels is not None:
        return operand.stored.levels.flatten()[out.long()]
    return out


def scalars(operand: Operand, page: Tensor, name: str | None, like: tuple[int, ...]) -> Tensor:
    """A field of gains or offsets from the page's bytes, ones where it has no name."""
    if name is None:
        return torch.ones(HEADS, BLOCK, 1)
    start, count = operand.bytes[name], torch.Size(like).numel()
    if len(like) == 2 and operand.stored.gain == name and operand.sizes[name] == 1:
        byte = page[start : start + count].float()
        return torch.where(byte > 0, torch.exp2((byte - 128) / 16), 0.0).view(*like, 1)
    return page[start : start + 2 * count].view(torch.float16).float().view(*like[:2], -1)


@pytest.mark.parametrize("name", kvfold.presets())
@pytest.mark.parametrize("side", ["key", "value"])
def test_the_matrices_are_the_codec(name: str, side: str) -> None:
    b = bound(name, side)
    if b.stored is None:
        assert name not in LOWERED[side], f"{name} is not lowered"
        with pytest.raises(NotLoweredError, match="decoded when they are read"):
            lower_keys(b) if side == "key" else lower_values(b, 0)
        return
    if b.stored.turns == "token":
        with pytest.raises(NotLoweredError, match="before RoPE"):
            lower_keys(b)
        return
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, HEADS, BLOCK, DIM, generator=generator)
    positions = START + torch.arange(BLOCK)[None]
    fields = b.encode(x, positions)
    page = torch.cat((torch.zeros(48, dtype=torch.uint8), b.layout.join(fields)[0]))
    shapes = {f.name: f.shape for f in b.layout.fields}
    reading = b.read(fields, positions)
    if side == "key":
        operand = lower_keys(b)
        page = page[48:]
        q = torch.randn(1, HEADS, 2, DIM, generator=generator)
        expected = score(b.query(q, fields, positions), reading)[0]
        turned = q[0]
        if operand.rope is not None:
            turned = operand.rope.unrotate(q, torch.full((1, 2), START))[0]
        column_query = turned if operand.stored.turns == "all" else q[0]
        prepared = column_query @ operand.matrix
        gain_term = (column_query @ operand.gain[..., None])[:, None]  # [heads, 1, queries, 1]
        columns = columns_of(operand, page)
        gain = scalars(
            operand, page, operand.stored.gain, shapes.get(operand.stored.gain or "", ())
        )
        if operand.stored.page_scale is not None:
            scale = fields[operand.stored.page_scale][0].float()  # [heads, segments, columns]
            zero = fields[operand.stored.page_zero or ""][0].float()
            repeat = BLOCK // scale.shape[1]
            columns = columns * scale.repeat_interleave(repeat, 1)
            gain_term = q[0] @ zero.repeat_interleave(repeat, 1).mT
        else:
            gain_term = gain_term[:, 0].expand(-1, -1, BLOCK)
        if gain.shape[-1] == 1:
            gain = gain.expand(-1, -1, columns.shape[-1])
        else:
            gain = gain.repeat_interleave(columns.shape[-1] // gain.shape[-1], -1)
        found = prepared @ (gain * columns).mT + gain_term * gain[..., 0][:, None]
        if operand.offset is not None:
            offsets = scalars(operand, page, operand.stored.offset, shapes["zero"])
            found = found + q[0] @ operand.offset.mT @ offsets.mT
        if operand.mean is not None:
            found = found + turned @ operand.mean.mT
    else:
        operand = lower_values(b, 48)
        p = torch.rand(1, HEADS, 2, BLOCK, generator=generator)
        expected = b.output(accumulate(p, reading))[0]
        columns = columns_of(operand, page)
        gain = scalars(
            operand, page, operand.stored.gain, shapes.get(operand.stored.gain or "", ())
        )
        wide = gain.repeat_interleave(columns.shape[-1] // gain.shape[-1], -1)
        found = p[0] @ (wide * columns) @ operand.matrix
        found = found + (p[0] @ gain).mean(-1, keepdim=True) * operand.gain[:, None]
        if operand.offset is not None:
            offsets = scalars(operand, page, operand.stored.offset, shapes["zero"])
            found = found + p[0] @ offsets @ operand.offset
        if operand.mean is not None:
            found = found + p[0].sum(-1, keepdim=True) * operand.mean[:, None]
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < 1e-4, f"{name} {side}: off by {error:.2g}"


@pytest.mark.parametrize("name", ["fisher3-pre", "rotatekv3", "rotatekv4"])
@pytest.mark.parametrize("heads", [3, 4])
def test_keys_coded_before_rope_meet_the_query_at_their_own_position(name: str, heads: int) -> None:
    codec = kvfold.get(name).keys
    site = Site("key", heads, DIM, BLOCK, rope=replace(ROPE, scaling=1.3))
    b = codec.bind(site, codec.example(site))
    operand = lower_keys(b, per_token=True)
    assert operand.rope is not None
    assert operand.rope.scaling == 1.0
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, heads, BLOCK, DIM, generator=generator)
    positions = START + torch.arange(BLOCK)[None]
    fields = b.encode(x, positions)
    q = torch.randn(1, heads, 2, DIM, generator=generator)
    expected = (q @ b.decode(fields, positions).mT)[0]
    plan, share = operand.stored.plan, operand.stored.share
    digits = plan.columns(fields)[0].float()
    gain = gains_of(operand, fields)
    group = torch.arange(heads) // share * share
    found = torch.zeros(heads, 2, BLOCK)
    for t in range(BLOCK):
        turned = operand.rope.unrotate(q, torch.full((1, 2), START + t))[0]  # [heads, 2, dim]
        prepared = (turned @ operand.matrix).unflatten(-1, (share, -1))
        for s in range(share):
            y, g = digits[group + s, t], gain[group + s, t]
            found[:, :, t] += g[:, None] * (prepared[:, :, s] @ y[..., None])[..., 0]
            found[:, :, t] += g[:, None] * (turned @ operand.gain[..., None])[..., 0]
            if operand.offset is not None:
                o = fields["zero"][0, group + s, t].float()
                found[:, :, t] += o[:, None] * (turned @ operand.offset[:, s, :, None])[..., 0]
        if operand.mean is not None:
            found[:, :, t] += (turned @ operand.mean.mT)[..., 0]
    error = float((found - expected).norm() / expected.norm())
    assert error < 1e-4, f"{name}: off by {error:.2g}"


def gains_of(operand: Operand, fields: dict[str, Tensor]) -> Tensor:
    gain = fields[operand.stored.gain or ""][0].float()
    if operand.sizes[operand.stored.gain or ""] == 1:
        return torch.where(gain > 0, torch.exp2((gain - 128) / 16), 0.0)
    return gain
