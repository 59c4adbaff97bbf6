"""Folding on CUDA devices: codes in one pass over the states, digits packed in one launch.

In torch a block of `fisher` is read and written about 150 times while its gains are searched, one
of `kivi` 20 times, and mixed widths are packed head by head. Here `quantise_kernel` (`fisher`) and
`group_kernel` (`kivi`) read the states once and write a byte a code and what a token or a group has
besides, and `pack_kernel` turns the codes of all heads and widths into words. They give the bytes
of the reference but where another order of a sum or a gain's search without divisions moves a tie.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.codec import BoundCodec
from kvfold.codecs.fisher import BoundFisher, BoundFisherKeys
from kvfold.codecs.kivi import BoundKivi
from kvfold.packing import CHUNK, SECTIONS, DigitPlan

#: tokens of a program of `quantise_kernel`: with more of them fewer programs run at once.
TOKENS = 16


# --- digits to words -------------------------------------------------------------------------


@triton.jit
def pack_kernel(
    codes_ptr, columns_ptr, about_ptr, out_ptr, out_words,
    HEADS: tl.constexpr, B: tl.constexpr, D: tl.constexpr, P_D: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Digits of one width and head of one block. Grid `(blocks, passes)`.

    Reads codes `[blocks, HEADS, B, D]` (a byte each), writes 16-bit words. `about` has width and
    head of each pass, `columns` for each pass shift, first word (-1: no digit) and distance of its
    words of each coordinate.
    """
    block = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1)
    width = tl.load(about_ptr + 2 * at)
    head = tl.load(about_ptr + 2 * at + 1)
    words = B * width // 16
    parts = 4 // width
    n = tl.arange(0, P_D)
    columns_ptr += at * (3 * D) + n
    shift = tl.load(columns_ptr, mask=n < D, other=0)
    first = tl.load(columns_ptr + D, mask=n < D, other=-1)
    stride = tl.load(columns_ptr + 2 * D, mask=n < D, other=0)
    u = tl.arange(0, U)
    inside = (u < words)[:, None] & (n < D)[None, :]
    from_ptr = codes_ptr + (block * HEADS + head) * (B * D) + n[None, :]
    found = tl.zeros([U, P_D], tl.int32)
    for j in tl.static_range(16):
        if j * width < 16:
            token = ((j % 4) * parts + j // 4) * words + u
            code = tl.load(from_ptr + token[:, None] * D, mask=inside, other=0).to(tl.int32)
            digit = (code >> shift[None, :]) & ((1 << width) - 1)
            found |= digit << (j * width)
    to_ptr = out_ptr + block * out_words + first[None, :] + u[:, None] * stride[None, :]
    tl.store(to_ptr, found.to(tl.int16), mask=inside & (first >= 0)[None, :])


@dataclass(frozen=True)
class Columns:
    """A plan's columns as `pack_kernel` reads them.

    Args:
        table: int32 `[passes, 3, coordinates]`.
        about: int32 `[passes, 2]`.
        sizes: words of each stored section, by its width.
    """

    table: Tensor
    about: Tensor
    sizes: dict[int, int]

    @classmethod
    def of(
        cls, plan: DigitPlan, device: torch.device, starts: Mapping[int, int] | None = None
    ) -> "Columns":
        """The columns of every head and section: a pass for those of different coordinates.

        Args:
            plan: what they are.
            device: where they are read.
            starts: first word of the section of each width; one behind the other by default.
        """
        tables: list[Tensor] = []
        about: list[tuple[int, int]] = []
        sizes: dict[int, int] = {}
        start = 0
        for w in SECTIONS:
            start = start if starts is None else starts.get(w, 0)
            words, begin = plan.words(w), start
            for h, head in enumerate(plan.heads):
                count, passes = len(head[w]), 0
                for i, column in enumerate(head[w]):
                    first, stride = start + i * words, 1
                    if plan.axis == "channel":
                        low = i - i % CHUNK
                        first, stride = start + low * words + i - low, min(CHUNK, count - low)
                    c = column.coordinate
                    of = next((t for t in tables[len(tables) - passes :] if t[1, c] < 0), None)
                    if of is None:  # the head's first, or second digits of this width
                        of = torch.tensor([[0], [-1], [0]], dtype=torch.int32)
                        of = of.repeat(1, len(plan.bits[h]))
                        tables.append(of)
                        about.append((w, h))
                        passes += 1
                    of[:, c] = torch.tensor([column.shift, first, stride])
                start += count * words
            if start > begin:
                sizes[w] = start - begin
        table = torch.stack(tables) if tables else torch.zeros(0, 3, 1, dtype=torch.int32)
        about_ = torch.tensor(about, dtype=torch.int32).view(-1, 2)
        return cls(table.to(device), about_.to(device), sizes)


def pack(plan: DigitPlan, codes: Tensor, prefix: str = "digits") -> dict[str, Tensor]:
    """What `DigitPlan.pack` gives: codes `[blocks, heads, block_len, coordinates]` to sections."""
    cache = plan.__dict__.setdefault("_columns", {})
    if codes.device not in cache:
        cache[codes.device] = Columns.of(plan, codes.device)
    columns: Columns = cache[codes.device]
    out = torch.empty(
        len(codes), sum(columns.sizes.values()), dtype=torch.int16, device=codes.device
    )
    _pack(columns, codes.to(torch.uint8).contiguous(), out)
    parts = out.split(list(columns.sizes.values()), 1)
    return {f"{prefix}{w}": part for w, part in zip(columns.sizes, parts, strict=True)}


def _pack(columns: Columns, codes: Tensor, out: Tensor) -> None:
    """Words of codes `[blocks, heads, block_len, dim]` into rows of words."""
    blocks, heads, block_len, dim = codes.shape
    if blocks and len(columns.about):
        pack_kernel[(blocks, len(columns.about))](
            codes, columns.table, columns.about, out, out.stride(0),
            HEADS=heads, B=block_len, D=dim, P_D=triton.next_power_of_2(dim),
            U=triton.next_power_of_2(block_len // 4),
            num_warps=4,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip


def _page(bound: BoundCodec, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Columns]:
    """Bytes `[blocks, nbytes]` of zeros, their fields, and the columns as they lie there."""
    layout = bound.layout
    page = torch.zeros(len(x), layout.nbytes, dtype=torch.uint8, device=x.device)
    if bound not in _COLUMNS:
        begin = {f.name: at // 2 for f, at in zip(layout.fields, layout.offsets, strict=True)}
        starts = {w: begin.get(f"digits{w}", 0) for w in SECTIONS}
        _COLUMNS[bound] = Columns.of(bound.plan, x.device, starts)  # type: ignore[attr-defined]
    return page, layout.split(page), _COLUMNS[bound]


# --- states to codes -------------------------------------------------------------------------


@triton.jit
def nearest(x):
    """Round to the nearest integer, ties to even, |x| < 2^22: adding 1.5 * 2^23 leaves no bits."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quantise_kernel(
    x_ptr, matrix_ptr, mean_ptr, turn_ptr, mate_ptr, tables_ptr, gains_ptr, codes_ptr, bytes_ptr,
    x_block, x_head, x_token, byte_block, scaling,
    HEADS: tl.constexpr, B: tl.constexpr, D: tl.constexpr, P_D: tl.constexpr, T: tl.constexpr,
    K: tl.constexpr, RUN: tl.constexpr, TURN: tl.constexpr, TURN_MEAN: tl.constexpr,
    SEARCH: tl.constexpr,
):  # fmt: skip
    """T tokens of one block and head. Grid `(blocks * HEADS, B / T)`; sums in float32.

    y = A (R^-1 x - mean) for the tile and pre forms (TURN), A (x - R mean) for post (TURN_MEAN),
    A (x - mean) for values. `turn` has cosine and signed sine of each RUN of tokens and channel,
    `mean` a row for each token of a run (or one row), `tables` step, offset, top, share and cost
    of each head and coordinate. Reads the states once, writes a byte a code and a byte a gain.
    """
    place = tl.program_id(0)
    block = (place // HEADS).to(tl.int64)
    head = place % HEADS
    t = tl.program_id(1) * T + tl.arange(0, T)
    n = tl.arange(0, P_D)
    in_n = n < D
    x_ptr += block * x_block + head * x_head
    runs: tl.constexpr = B // RUN
    turn_row = (block * runs + t // RUN) * (2 * D)
    mean_row = head * (D if TURN_MEAN or not TURN else RUN * D)
    y = tl.zeros([T, P_D], tl.float32)
    for k0 in range(0, P_D, K):
        k = k0 + tl.arange(0, K)
        in_k = (k < D)[None, :]
        x = tl.load(x_ptr + t[:, None] * x_token + k[None, :], mask=in_k, other=0.0)
        x = x.to(tl.float32) / scaling
        if TURN or TURN_MEAN:
            mate = tl.load(mate_ptr + k, mask=k < D, other=0)
            cos = tl.load(turn_ptr + turn_row[:, None] + k[None, :], mask=in_k, other=0.0)
            sin = tl.load(turn_ptr + turn_row[:, None] + D + k[None, :], mask=in_k, other=0.0)
        if TURN:
            other = tl.load(x_ptr + t[:, None] * x_token + mate[None, :], mask=in_k, other=0.0)
            x = x * cos + other.to(tl.float32) / scaling * sin
            row = mean_row + (t % RUN) * D
            x -= tl.load(mean_ptr + row[:, None] + k[None, :], mask=in_k, other=0.0)
        else:
            mean = tl.load(mean_ptr + mean_row + k, mask=k < D, other=0.0)
            if TURN_MEAN:
                other = tl.load(mean_ptr + mean_row + mate, mask=k < D, other=0.0)
                x -= mean[None, :] * cos + other[None, :] * sin
            else:
                x -= mean[None, :]
        matrix = tl.load(
            matrix_ptr + (head * D + k[:, None]) * D + n[None, :],
            mask=(k < D)[:, None] & in_n[None, :], other=0.0,
        )  # fmt: skip
        y = tl.dot(x, matrix, y, input_precision="tf32x3")
    tables_ptr += head * D + n
    step = tl.load(tables_ptr, mask=in_n, other=0.0)
    offset = tl.load(tables_ptr + HEADS * D, mask=in_n, other=0.0)
    top = tl.load(tables_ptr + 2 * HEADS * D, mask=in_n, other=0.0)
    share = tl.load(tables_ptr + 3 * HEADS * D, mask=in_n, other=0.0)
    cost = tl.load(tables_ptr + 4 * HEADS * D, mask=in_n, other=0.0)
    divisor = tl.where(step > 0.0, step, 1.0)
    inverse = 1.0 / divisor
    moved = offset * inverse

    rms = tl.sqrt(tl.sum(y * y * share[None, :], 1))
    level = 16.0 * tl.log2(tl.maximum(rms, 1e-30)) + 128.0
    start = nearest(tl.minimum(tl.maximum(level, -1.0), 256.0))
    start = tl.minimum(tl.maximum(start, 0.0), 255.0).to(tl.int32)
    best = start
    least = tl.full([T], float("inf"), tl.float32)
    for i in tl.static_range(2 * SEARCH + 1):
        move = (i + 1) // 2 if i % 2 == 0 else -((i + 1) // 2)
        tried = tl.where(start > 0, tl.minimum(tl.maximum(start + move, 1), 255), 0)
        gain = tl.load(gains_ptr + tried)
        # no divisions: a code that rounds the other way at a half has the same error
        z = y * (1.0 / tl.where(gain > 0.0, gain, 1.0))[:, None]
        code = z * inverse[None, :] - moved[None, :]
        code = nearest(tl.minimum(tl.maximum(code, 0.0), top[None, :]))
        error = y - (code * step[None, :] + offset[None, :]) * gain[:, None]
        total = tl.sum(error * error * cost[None, :], 1)
        best = tl.where(total < least, tried, best)
        least = tl.minimum(total, least)
    gain = tl.load(gains_ptr + best)
    z = y / tl.where(gain > 0.0, gain, 1.0)[:, None]
    code = (z - offset[None, :]) / divisor[None, :]
    code = nearest(tl.minimum(tl.maximum(code, -1.0), 256.0))
    code = tl.minimum(tl.maximum(code, 0.0), top[None, :])
    at = place.to(tl.int64) * (B * D) + t[:, None] * D + n[None, :]
    tl.store(codes_ptr + at, code.to(tl.int32).to(tl.uint8), mask=in_n[None, :])
    tl.store(bytes_ptr + block * byte_block + head * B + t, best.to(tl.uint8))


@triton.jit
def group_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, x_block, x_head, x_token, scale_block,
    HEADS: tl.constexpr, B: tl.constexpr, D: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
    ALONG: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """`uniform.asymmetric` of T tokens by N channels, each row or column of them a group.

    ALONG 0: groups are columns (T tokens of a channel), 1: rows (N channels of a token). Grid
    `(blocks * HEADS, B / T, D / N)`, where columns have N as a power of two that may exceed D.
    """
    place = tl.program_id(0)
    t = tl.program_id(1) * T + tl.arange(0, T)
    n = tl.program_id(2) * N + tl.arange(0, N)
    inside = (n < D)[None, :]
    block, head = (place // HEADS).to(tl.int64), place % HEADS
    x_ptr += block * x_block + head * x_head
    x = tl.load(x_ptr + t[:, None] * x_token + n[None, :], mask=inside, other=0.0).to(tl.float32)
    low, high = tl.min(x, ALONG), tl.max(x, ALONG)
    zero = tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16)
    scale = tl.div_rn(high - low, tl.zeros_like(low) + TOP)
    scale = tl.minimum(tl.maximum(scale, -65504.0), 65504.0).to(tl.float16)
    step, base = scale.to(tl.float32), zero.to(tl.float32)
    step, base = tl.expand_dims(step, ALONG), tl.expand_dims(base, ALONG)
    code = tl.div_rn(x - base, tl.broadcast_to(tl.where(step > 0.0, step, 1.0), [T, N]))
    code = nearest(tl.minimum(tl.maximum(code, -1.0), 256.0))
    code = tl.where(step > 0.0, tl.minimum(tl.maximum(code, 0.0), TOP), 0.0)
    at = place.to(tl.int64) * (B * D)
    tl.store(
        codes_ptr + at + t[:, None] * D + n[None, :], code.to(tl.int32).to(tl.uint8), mask=inside
    )
    if ALONG == 0:
        to = block * scale_block + head * (B // T * D) + tl.program_id(1) * D + n
        tl.store(scale_ptr + to, scale, mask=n < D)
        tl.store(zero_ptr + to, zero, mask=n < D)
    else:
        to = block * scale_block + head * (B * (D // N)) + t * (D // N) + tl.program_id(2)
        tl.store(scale_ptr + to, scale)
        tl.store(zero_ptr + to, zero)


@dataclass(frozen=True)
class Tables:
    """What `quantise_kernel` reads of a layer's codec besides its matrix.

    Args:
        tables: `[5, heads, dim]` step, offset, top, share, cost.
        mean: `[heads, run, dim]`, or `[heads, 1, dim]`.
        mate: int32 `[dim]` the other channel of each RoPE pair; itself where none is.
        frequency: `[dim]` radians per position, 0 where nothing turns.
        sign: `[dim]` of the sine in R^-1.
        run: tokens that turn together.
        turns: what turns: the states back, the mean along, or nothing.
    """

    tables: Tensor
    mean: Tensor
    mate: Tensor
    frequency: Tensor
    sign: Tensor
    run: int
    turns: str

    @classmethod
    def of(cls, bound: BoundFisher) -> "Tables":
        """The tables of a bound codec."""
        heads, _, dim = bound.step.shape
        device = bound.step.device
        parts = (bound.step, bound.offset, bound.top, bound.share, bound.cost)
        tables = torch.stack([part.expand(heads, 1, dim)[:, 0] for part in parts]).contiguous()
        mate, frequency = torch.arange(dim), torch.zeros(dim)
        sign = torch.zeros(dim)
        run, turns, mean = 1, "nothing", bound.mean[:, None]
        if isinstance(bound, BoundFisherKeys) and bound.rope.inv_freq:
            pairs = len(bound.rope.inv_freq)
            a = torch.arange(pairs) * (1 if bound.rope.pairs == "half" else 2)
            b = a + (pairs if bound.rope.pairs == "half" else 1)
            mate[a], mate[b] = b, a
            frequency[a] = frequency[b] = torch.tensor(bound.rope.inv_freq, dtype=torch.float32)
            sign[a], sign[b] = 1.0, -1.0
            turns = "mean" if bound.form == "post" else "states"
            if bound.form == "tile":
                run, mean = bound.tile, bound.run_mean
        return cls(
            tables,
            mean.contiguous(),
            mate.to(torch.int32).to(device),
            frequency.to(device),
            sign.to(device),
            run,
            turns,
        )

    def turn(self, positions: Tensor) -> Tensor:
        """Cosine and signed sine `[blocks, runs, 2, dim]`, in float32 as `Rope` computes them."""
        angle = positions[:, :: self.run, None].float() * self.frequency
        # states are turned back, the mean is turned on
        sign = self.sign if self.turns == "states" else -self.sign
        return torch.stack((angle.cos(), angle.sin() * sign), 2).contiguous()


_TABLES: "WeakKeyDictionary[BoundFisher, Tables]" = WeakKeyDictionary()
_COLUMNS: "WeakKeyDictionary[BoundCodec, Columns]" = WeakKeyDictionary()


def serves(bound: BoundCodec) -> bool:
    """Whether `encoded` gives this codec's bytes."""
    if isinstance(bound, BoundKivi):
        size = bound.codec.group_size
        return size & (size - 1) == 0 and bound.site.block_len % TOKENS == 0
    return isinstance(bound, BoundFisher) and bound.site.block_len % TOKENS == 0


def encoded(bound: BoundCodec, x: Tensor, positions: Tensor) -> Tensor:
    """Bytes `[blocks, nbytes]` of states `[blocks, heads, block_len, dim]`, as `encode` gives them.

    Args:
        bound: a codec that `serves` names.
        x: states on the device, channels side by side.
        positions: `[blocks, block_len]`.
    """
    if isinstance(bound, BoundKivi):
        return _grouped(bound, x)
    assert isinstance(bound, BoundFisher)
    if bound not in _TABLES:
        _TABLES[bound] = Tables.of(bound)
    tables = _TABLES[bound]
    blocks, heads, block_len, dim = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    turn = tables.turn(positions) if tables.turns != "nothing" else tables.tables
    codes = torch.empty(blocks, heads, block_len, dim, dtype=torch.uint8, device=x.device)
    page, fields, columns = _page(bound, x)
    gain = fields["gain"]
    quantise_kernel[(blocks * heads, block_len // TOKENS)](
        x, bound.forward, tables.mean, turn, tables.mate, tables.tables, bound.gains, codes, gain,
        x.stride(0), x.stride(1), x.stride(2), gain.stride(0), getattr(bound, "scaling", 1.0),
        HEADS=heads, B=block_len, D=dim, P_D=triton.next_power_of_2(dim), T=TOKENS, K=16,
        RUN=tables.run, TURN=tables.turns == "states", TURN_MEAN=tables.turns == "mean",
        SEARCH=bound.codec.search, num_warps=4,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    _pack(columns, codes, page.view(torch.int16))
    return page


def _grouped(bound: BoundKivi, x: Tensor) -> Tensor:
    """`encoded` of groups along tokens or channels."""
    blocks, heads, block_len, dim = x.shape
    size, along = bound.codec.group_size, 0 if bound.along_tokens else 1
    x = x if x.stride(3) == 1 else x.contiguous()
    tokens, channels = (TOKENS, size) if along else (size, min(32, triton.next_power_of_2(dim)))
    codes = torch.empty(blocks, heads, block_len, dim, dtype=torch.uint8, device=x.device)
    page, fields, columns = _page(bound, x)
    scale, zero = fields["scale"], fields["zero"]
    if blocks:
        group_kernel[(blocks * heads, block_len // tokens, triton.cdiv(dim, channels))](
            x, codes, scale, zero, x.stride(0), x.stride(1), x.stride(2), scale.stride(0),
            HEADS=heads, B=block_len, D=dim, T=tokens, N=channels, ALONG=along,
            TOP=2.0**bound.codec.bits - 1, num_warps=4,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    _pack(columns, codes, page.view(torch.int16))
    return page
