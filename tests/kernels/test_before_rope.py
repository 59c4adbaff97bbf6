"""The tables of keys coded before RoPE, read from page bytes as the CUDA kernel reads them."""

import pytest
import torch

import kvfold
from kvfold.codec import Site
from kvfold.kernels.cuda import before_rope
from kvfold.kernels.lowering import NotLoweredError, lower_keys
from kvfold.transforms.rope import Rope
from tests.gpu.test_decode import mixed, plain

BLOCK, HEADS = 128, 3


def bound(name, dim, rope, tables):
    codec = kvfold.get(name).keys
    site = Site("key", HEADS, dim, BLOCK, rope=rope)
    return codec.bind(site, tables(codec, site))


def half(x):
    return x.contiguous().view(torch.float16).double()


def read(page, operand, by, h):
    """Keys `[block, dim]` as seen from the page's first position, in the order of `by.channels`."""
    dim = len(by.channels)
    raw = by.heads[h]
    parts = raw[: by.blocks * 128].contiguous().view(torch.int32).view(by.blocks, 2, 16)
    at = by.blocks * 128
    matrix = half(raw[at:]).view(by.blocks, dim // 8, 2, 8, 8)
    matrix = matrix.permute(0, 2, 4, 1, 3).reshape(by.blocks, 16, dim)  # rows as the product's
    first = operand.sections[h]
    start = {4: first[0], 2: first[1], 1: first[2]}
    before, counts = {}, dict(zip((4, 2, 1), operand.counts[h], strict=True))
    before[4], before[2], before[1] = 0, counts[4] * 64, counts[4] * 64 + counts[2] * 32
    token, keys = torch.arange(BLOCK), torch.zeros(BLOCK, dim, dtype=torch.float64)
    gain, mean = matrix[0, :2]
    for e in range(1, int(parts[0, 0, 3])):
        digits = torch.zeros(BLOCK, 16, dtype=torch.float64)
        for offset, width, have, _, *numbers in parts[e].tolist():
            if not width or not counts[width]:
                continue
            table = torch.tensor(numbers, dtype=torch.int32).view(3, 4)
            mask, factor, addend = table[0] & 0xFFFF, half(table[1]), half(table[2])
            begin = start[width] + offset - before[width]
            words = page[begin : begin + 16 * width * have].view(torch.int16).view(-1, have)
            u, f = token % 32, token // 32
            shift = (u // (8 * width)) * (4 * width) + 8 * (f // 2) * (width == 4)
            x = (words[u % (8 * width)].int() & 0xFFFF) >> shift[:, None]
            made = ((x & mask[f][:, None]) | 0x6400).to(torch.int16).view(torch.float16).double()
            made = made * factor.view(4, 2)[f, :1] + addend.view(4, 2)[f, :1]
            digits[:, :have] += made
        keys += digits[:, list(before_rope.ORDER)] @ matrix[e]
    g = page[operand.bytes["gain"] + h * BLOCK :][:BLOCK].double()
    g = torch.where(g > 0, 2 ** ((g - 128) / 16), 0)[:, None]
    keys = g * (keys + gain) + mean
    table = half(by.turns[: dim * 256]).view(2, 4, dim // 16, 8, 4, 2, 2, 2)
    # half, quarter, pairs, g, c, row, which, pair -> which, token, pair
    table = table.permute(6, 1, 0, 3, 5, 2, 4, 7).reshape(2, 4, 2, 8, 2, dim // 2)
    lane = torch.arange(8)
    row = 4 * (lane // 2) + lane % 2 + 2 * (lane // 2 % 2)
    rows = torch.stack((row, row ^ 2), -1).flatten()
    cos, sin = table.flatten(3, 4)[:, :, :, rows.argsort()].reshape(2, BLOCK, dim // 2)
    a, b = keys.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1) * 2.0**-by.exponent


@pytest.mark.parametrize("tables", [plain, mixed])
@pytest.mark.parametrize(
    ("dim", "pairs", "turned"),
    [(64, "half", 64), (80, "half", 80), (96, "half", 48), (128, "interleaved", 128)],
)
@pytest.mark.parametrize("name", ["fisher2-pre", "fisher4-pre"])
def test_keys_come_out_of_the_tables(name, dim, pairs, turned, tables):
    rope = Rope(tuple(1e4 ** (-2 * i / turned) for i in range(turned // 2)), pairs=pairs)
    codec = bound(name, dim, rope, tables)
    x = torch.randn(1, HEADS, BLOCK, dim, generator=torch.Generator().manual_seed(3)) * 3
    x[0, :, 5] = 0
    positions = torch.arange(BLOCK)[None]
    page = codec.layout.join(codec.encode(x, positions))[0]
    operand = lower_keys(codec, per_token=True)
    by = before_rope.decoder(operand)
    tables = by.heads.shape[1] + len(by.turns)
    assert before_rope.nbytes(by.blocks, dim, 4) == tables + (dim + 8) * 16 + 32 + 4 * (
        128 + dim * 4
    )
    wanted = codec.decode(codec.layout.split(page[None]), positions)[0][..., by.channels.long()]
    for h in range(HEADS):
        found = read(page, operand, by, h)
        error = float((found - wanted[h]).norm() / wanted[h].norm())
        assert error < 1e-3, (h, error)


def test_digits_of_a_coordinate_share_a_block():
    codec = bound("fisher3-pre", 128, Rope(tuple(1e4 ** (-i / 64) for i in range(64))), plain)
    operand = lower_keys(codec, per_token=True)
    assert operand.counts[0] == (0, 128, 128)
    assert before_rope.decoder(operand).counts == (9, 9, 9)


def test_what_is_not_read_is_refused():
    rope = Rope(tuple(1e4 ** (-i / 128) for i in range(128)))
    with pytest.raises(NotLoweredError, match=r"head_dim 256; 64, 80, 96, 128 are possible"):
        before_rope.decoder(lower_keys(bound("fisher2-pre", 256, rope, plain), per_token=True))


def test_huge_gains_and_means_stay_within_float16():
    rope = Rope(tuple(1e4 ** (-i / 64) for i in range(64)))
    codec = bound("fisher4-pre", 128, rope, mixed)
    codec.mean *= 1e4
    codec.offset *= 1e3
    operand = lower_keys(codec, per_token=True)
    by = before_rope.decoder(operand)
    matrix = half(by.heads[:, by.blocks * 128 :]).view(HEADS, by.blocks, 16, 2, 8, 8)
    matrix = matrix.permute(0, 1, 2, 4, 3, 5).reshape(HEADS, by.blocks, 128, 16).abs()
    gain, mean = matrix[:, 0, :, 0], matrix[:, 0, :, 1]
    keys = 2.0**8 * (8.5 * matrix[:, 1:].sum((1, 3)) + gain) + mean
    assert float(keys.max()) * 2**0.5 < 65504
