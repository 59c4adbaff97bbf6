"""Digits of a page's words as float16 operands of a matrix product.

A digit stays where it lies in the mantissa of a float16 whose exponent is 0: field f of a lane is
the subnormal number digit * 2**(position - 24), exact, and tensor cores multiply subnormals as they
do any other number. So unpacking is one `and` a field, and no offset has to be taken off again; the
powers of two go into gains (keys) and into the weights p (values):

    width 4: positions 0, 4, 0, 4 (the upper half of the lane is shifted down)
    width 2: positions 0, 2, 4, 6        width 1: positions 0, 1, 2, 3

Codes with levels have them looked up by `prmt` instead, as ordinary numbers.

The inline assembly takes the lane's part of a word from %tid: batch entry i of a product `[W, 16,
16]` belongs to warp i, as in all kernels here. Triton's interpreter knows no assembly: it runs
`plain`, which gives the same numbers.
"""

# device code: pyright reads Triton's constants and ranges as what they are on the host
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportReturnType=false

# ruff: noqa: RUF005 (Triton has no starred tuples; signatures by topic)

from collections.abc import Sequence

import numpy as np
import triton
import triton.language as tl

#: position in the mantissa of each field, by width.
POSITIONS = {4: (0, 4, 0, 4), 2: (0, 2, 4, 6), 1: (0, 1, 2, 3)}
#: what a field's weight is short of 1, by width: values are digit * 2**(position - 24).
EXPONENT = 24

_REGISTERS = 4  # of a 16 x 16 operand of 16-bit numbers: rows +0, +8, columns +8, both
OUT_16 = tl.constexpr(",".join(["=r"] * 16 + ["r"] * 4))
CODES = tl.constexpr((tl.float16,) * 4)


def assembly(
    width: int, words: int, side: str, levels: Sequence[float] | None = None
) -> tl.constexpr:
    """The four quarters of a 16 x 16 operand from its four registers of words.

    Args:
        width: 4, 2 or 1.
        words: 16-bit words of a column.
        side: `"key"`, whose tokens are the operand's rows, or `"value"`, whose tokens are columns.
        levels: values of the digits, None for the digits themselves.
    """
    lines = []
    parts = 4 // width
    inputs = [f"${16 + r}" for r in range(_REGISTERS)]
    if parts > 1:
        # the warp's first lane is 16 * warp, its part of the word that over `words`
        lines.append("mov.u32 s, %tid.x; shr.u32 s, s, 5;")
        if words > 16:
            lines.append(f"shr.u32 s, s, {(words // 16).bit_length() - 1};")
        lanes_parts = max(1, 16 // words)  # parts that the warp's own 16 lanes have
        step = 4 * width * lanes_parts
        lines.append(f"shl.b32 s, s, {step.bit_length() - 1};")
        if lanes_parts > 1:
            lines.append(f"add.u32 z, s, {4 * width};")
    for r, source in enumerate(inputs):
        if parts > 1:
            # where a column has 8 words, tokens 8 to 15 of the warp are in the next part
            second = r in ((1, 3) if side == "key" else (2, 3)) and words < 16
            lines.append(f"shr.b32 t, {source}, {'z' if second else 's'};")
            source = "t"
        outputs = [f"${_REGISTERS * f + r}" for f in range(4)]
        if levels is None:
            lines += _digits(width, source, outputs)
        elif width == 4:
            lines += _look_up_16(source, outputs, levels)
        else:
            lines += _look_up_4(source, outputs, levels)
    registers = "s, z, t, u, v, a, b, c, d, e, f, h"
    return tl.constexpr("{ .reg .b32 " + registers + "; " + " ".join(lines) + " }")


def _digits(width: int, source: str, outputs: list[str]) -> list[str]:
    lines = []
    if width == 4:
        lines.append(f"shr.b32 u, {source}, 8;")
    for f, out in enumerate(outputs):
        mask = ((1 << width) - 1) << POSITIONS[width][f]
        origin = "u" if width == 4 and f >= 2 else source
        lines.append(f"and.b32 {out}, {origin}, 0x{mask * 0x10001:08x};")
    return lines


def _halves(levels: Sequence[float]) -> list[int]:
    return [int(x) for x in np.asarray(levels, np.float16).view(np.uint16)]


def _look_up_4(source: str, outputs: list[str], levels: Sequence[float]) -> list[str]:
    """Two digits select the bytes of two of four float16 levels."""
    h = _halves(levels)
    low, high = h[0] | h[1] << 16, h[2] | h[3] << 16
    lines = [f"mov.b32 a, 0x{low:08x}; mov.b32 b, 0x{high:08x};"]
    for f, out in enumerate(outputs):
        # digits d, e in bits 0 and 16: (2e + 1, 2e, 2d + 1, 2d) as nibbles, in the upper half
        lines.append(f"and.b32 u, {source}, 0x{0x00030003 << 2 * f:08x};")
        lines.append(f"mad.lo.u32 u, u, 0x{0x00222200 >> 2 * f:08x}, 0x10100000;")
        lines.append(f"shr.u32 u, u, 16; prmt.b32 {out}, a, b, u;")
    return lines


def _look_up_16(source: str, outputs: list[str], levels: Sequence[float]) -> list[str]:
    """A column's four digits select four bytes at once; upper and lower bytes of levels apart."""
    h = _halves(levels)

    def table(shift: int, first: int) -> int:
        return sum(((h[first + i] >> shift) & 0xFF) << 8 * i for i in range(4))

    # u: digits without their top bits; v: 4 bytes of ones where the top bit is set, per column
    lines = [f"and.b32 u, {source}, 0x77777777;"]
    for column, (low, high) in enumerate((("a", "b"), ("c", "d"))):
        if column:
            lines.append("shr.u32 u, u, 16;")
        shifted = source if not column else "f"
        if column:
            lines.append(f"shr.u32 f, {source}, 16;")
        # nibble 9 spreads the sign of byte 1, nibble 0 is byte 0: ones where the top bit is set
        lines.append(f"and.b32 v, {shifted}, 0x8888; shr.u32 h, v, 3; or.b32 v, v, h;")
        lines.append("prmt.b32 v, 0x00008000, 0, v;")
        for out, shift in ((low, 0), (high, 8)):
            lines.append(f"prmt.b32 {out}, 0x{table(shift, 0):08x}, 0x{table(shift, 4):08x}, u;")
            lines.append(f"prmt.b32 e, 0x{table(shift, 8):08x}, 0x{table(shift, 12):08x}, u;")
            lines.append(f"lop3.b32 {out}, v, e, {out}, 0xca;")
    # a, b: lower and upper bytes of one column's quarters; c, d: of the other's
    lines.append("prmt.b32 e, a, b, 0x5140; prmt.b32 f, a, b, 0x7362;")
    lines.append("prmt.b32 u, c, d, 0x5140; prmt.b32 v, c, d, 0x7362;")
    lines.append(f"prmt.b32 {outputs[0]}, e, u, 0x5410; prmt.b32 {outputs[1]}, e, u, 0x7632;")
    lines.append(f"prmt.b32 {outputs[2]}, f, v, 0x5410; prmt.b32 {outputs[3]}, f, v, 0x7632;")
    return lines


@triton.jit
def plain(x, levels_ptr, WIDTH: tl.constexpr, WORDS: tl.constexpr, KEYS: tl.constexpr,
          LEVELS: tl.constexpr):  # fmt: skip
    """What the assembly gives for words x `[W, 16, 16]`, without it."""
    W: tl.constexpr = x.shape[0]
    if KEYS:
        lane = (tl.arange(0, W) * 16)[:, None, None] + tl.arange(0, 16)[None, :, None]
    else:
        lane = (tl.arange(0, W) * 16)[:, None, None] + tl.arange(0, 16)[None, None, :]
    t = (x.to(tl.int32) & 0xFFFF) >> (lane // WORDS * (4 * WIDTH))
    out = ()
    for f in tl.static_range(4):
        digit = (t >> (WIDTH * f)) & ((1 << WIDTH) - 1)
        if LEVELS:
            value = tl.load(levels_ptr + digit).to(tl.float16)
        else:
            at: tl.constexpr = (f % 2) * 4 if WIDTH == 4 else WIDTH * f
            value = (digit << at).to(tl.int16).to(tl.float16, bitcast=True)
        out = out + (value,)
    return out


@triton.jit
def quarters(x, levels_ptr, ASM: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr,
             KEYS: tl.constexpr, LEVELS: tl.constexpr):  # fmt: skip
    """The operands of the four quarters of a block from words x `[W, 16, 16]`."""
    if ASM == "":
        return plain(x, levels_ptr, WIDTH, WORDS, KEYS, LEVELS)
    else:
        return tl.inline_asm_elementwise(ASM, OUT_16, [x], (tl.float16,) * 4, True, 8)
