"""Machine instructions per KV element of the CUDA decode-attention loop, counted without a GPU.

Compiles sketches of the inner loop (scores, online softmax, P.V over packed pages) with Triton for
sm_90, disassembles them and counts the loop. Nothing is launched: only the count is the result.

    instructions per element = loop instructions * warps * 32 / (tokens * head_dim * 2)

that is, instructions issued per lane for each K or V element, all instructions in the loop counted
once. The same convention gives 2.20 for bf16 with queries in M and 1.55 for the 4-bit prototype.
`head_dim` counts elements, not columns: 3 bits are two columns (2 + 1) but one element.

Two ways to pack the digits of a column into 16-bit lanes are compared:

fields    A lane has 16 / bits fields. K: the fields split the columns (`fields-columns`) or the
          tokens (`fields-tokens`); V: the fields split the tokens. Warps share a tile, P crosses
          them through shared memory.
quarters  A column of a page is B/4 lanes of 4 * bits bits, for every width: field f of lane u is
          token u + f * B/4. A 16-bit word holds 1, 2 or 4 such lanes: lane u sits in word u % w,
          part u // w, w = B * bits / 16. Warp i owns lanes 16 i to 16 i + 15 of all four quarters,
          in K and in V, with its own running maximum, sum and output: B / 64 warps a page. Scores
          of sections of any width fall into the same four accumulators. A section is a run of
          chunks of 16 columns (K: [w, 16], V: [16, w], both 16 w words); chunk counts per head
          come from a table at run time, the kernel is compiled for their ceilings and loads (but
          does not skip) the missing chunks under a mask.

In both, tokens are in the M dimension and 4 query heads are padded to N = 8; operands are fp16,
P.V starts from zero on every page, a gain is one byte per token (2**((byte - 128) / 16)).
The page's own query product and mean table of the `fisher` tile form are not part of the loop.

    python benchmarks/sketch_decode_loop.py --out benchmarks/results/sketch_decode_loop.csv
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)

import argparse
import csv
import datetime
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HEADS = tl.constexpr(8)


# ---------------------------------------------------------------------------- unpacking


def _lop3(out: int, source: str, bits: int, position: int, exponent: int) -> str:
    """(source & digit mask) | exponent on both halves: two fp16 `offset + code * 2**k`."""
    mask = ((1 << bits) - 1) << position
    return f"lop3.b32 ${out}, {source}, 0x{mask * 0x10001:08x}, 0x{exponent * 0x10001:08x}, 0xea;"


def fields_asm(bits: int) -> str:
    """All 16 / bits fields of two lanes; value 1024 + (code << position), undone in the query."""
    fields = 16 // bits
    in_place = {4: 2, 2: 5, 1: 10}[bits]  # fields inside the 10 mantissa bits
    lines = []
    for f in range(fields):
        group, position = divmod(f, in_place)
        if group and not position:
            lines.append(f"shr.b32 t, ${fields}, {16 // 2 if bits == 4 else 10};")
        lines.append(_lop3(f, "t" if group else f"${fields}", bits, position * bits, 0x6400))
    return "{ .reg .b32 t; " + " ".join(lines) + " }"


def quarters_asm(bits: int, words: int) -> str:
    """The 4 fields of this warp's lanes, from two words; value 2**(10 - position) + code.

    The exponent follows the field's position, so every field has weight 1 and all fields and
    sections share one copy of the query. The part of the word is warp // (words // 16): taken from
    %tid because a second tensor operand stops Triton from unpacking in the operand's registers.
    """
    lines = []
    if bits == 4:
        lines.append("shr.b32 t, $4, 8;")
        digits = [("$4" if f < 2 else "t", 4 * (f % 2)) for f in range(4)]
    else:
        parts, log_groups = 4 // bits, (words // 16).bit_length() - 1
        lines.append("mov.u32 s, %tid.x;")
        lines.append(f"shr.b32 s, s, {5 + log_groups}; and.b32 s, s, {parts - 1};")
        lines.append(f"shl.b32 s, s, {bits.bit_length() + 1}; shr.b32 t, $4, s;")
        digits = [("t", bits * f) for f in range(4)]
    for f, (source, position) in enumerate(digits):
        lines.append(_lop3(f, source, bits, position, 0x6400 - (position << 10)))
    return "{ .reg .b32 s, t; " + " ".join(lines) + " }"


def gains_asm() -> str:
    """Four gain bytes of a word to four floats: prmt makes 2**23 + byte, ex2 the power."""
    lines = []
    for f in range(4):
        lines.append(f"prmt.b32 t, $4, 0x4b000000, 0x755{f}; mov.b32 x, t;")
        # x / 16 - (2**23 + 128) / 16, exact
        lines.append(f"fma.rn.f32 x, x, 0f3D800000, 0fC9000080; ex2.approx.ftz.f32 ${f}, x;")
    return "{ .reg .b32 t; .reg .f32 x; " + " ".join(lines) + " }"


FIELDS_ASM = {bits: tl.constexpr(fields_asm(bits)) for bits in (4, 2, 1)}
FIELDS_4, FIELDS_2, FIELDS_1 = FIELDS_ASM[4], FIELDS_ASM[2], FIELDS_ASM[1]
GAINS = tl.constexpr(gains_asm())
OUT_4 = tl.constexpr("=r,=r,=r,=r,r")
OUT_8 = tl.constexpr(",".join(["=r"] * 8 + ["r"]))
OUT_16 = tl.constexpr(",".join(["=r"] * 16 + ["r"]))
OUT_GAINS = tl.constexpr("=f,=f,=f,=f,r")


@triton.jit
def unpack_fields(w, BITS: tl.constexpr):
    """All fields of the lanes w."""
    if BITS == 4:
        return tl.inline_asm_elementwise(FIELDS_4, OUT_4, [w], (tl.float16,) * 4, True, 2)
    elif BITS == 2:
        return tl.inline_asm_elementwise(FIELDS_2, OUT_8, [w], (tl.float16,) * 8, True, 2)
    else:
        return tl.inline_asm_elementwise(FIELDS_1, OUT_16, [w], (tl.float16,) * 16, True, 2)


@triton.jit
def byte_gain(ptr):
    """2**((byte - 128) / 16)."""
    return tl.exp2(tl.load(ptr).to(tl.float32) * 0.0625 - 8.0)


@triton.jit
def word_gains(ptr):
    """Gains of tokens u, u + B/4, u + B/2, u + 3B/4, which share one 32-bit word."""
    return tl.inline_asm_elementwise(GAINS, OUT_GAINS, [tl.load(ptr)], (tl.float32,) * 4, True, 1)


# ---------------------------------------------------------------------------- fields


@triton.jit
def split_rows(x, PARTS: tl.constexpr):
    """PARTS equal runs of rows of x, in order."""
    if PARTS == 1:
        return (x,)
    else:
        rows: tl.constexpr = x.shape[0]
        a, b = tl.split(x.reshape(2, rows // 2, x.shape[1]).permute(1, 2, 0))
        return split_rows(a, PARTS // 2) + split_rows(b, PARTS // 2)


@triton.jit
def fields_loop(
    q_ptr, z_ptr, table_ptr, pool_ptr, out_ptr, state_ptr, num_pages,
    BITS: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One uniform section of BITS; K fields split columns, or tokens with SPLIT_TOKENS."""
    F: tl.constexpr = 16 // BITS
    K_WORDS: tl.constexpr = B * D // F
    T: tl.constexpr = B // F
    ROWS: tl.constexpr = T if SPLIT_TOKENS else B
    L: tl.constexpr = D if SPLIT_TOKENS else D // F
    h = tl.arange(0, HEADS)
    q = ()
    for f in tl.static_range(F):
        q = q + (tl.load(q_ptr + (f * L + tl.arange(0, L))[:, None] * HEADS + h[None, :]),)
    z = tl.load(z_ptr + h)[None, :]
    m = tl.full([HEADS], -1e30, tl.float32)
    norm = tl.zeros([T, HEADS], tl.float32)
    p_sum = tl.zeros([T, HEADS], tl.float32)
    out = tl.zeros([D, HEADS], tl.float32)
    k_words = tl.arange(0, ROWS)[:, None] * L + tl.arange(0, L)[None, :]
    v_words = tl.arange(0, D)[:, None] * T + tl.arange(0, T)[None, :]
    next_page = tl.load(table_ptr)
    for i in tl.range(0, num_pages, num_stages=STAGES):
        page = pool_ptr + next_page.to(tl.int64) * (2 * K_WORDS + B)
        next_page = tl.load(table_ptr + i + 1)
        k = unpack_fields(tl.load(page + k_words), BITS)
        v_packed = tl.load(page + K_WORDS + v_words)
        gain_ptr = (page + 2 * K_WORDS).to(tl.pointer_type(tl.uint8))
        k_gain = byte_gain(gain_ptr + tl.arange(0, B))[:, None]
        v_gain = byte_gain(gain_ptr + B + tl.arange(0, B))[:, None]
        if SPLIT_TOKENS:
            k_gains = split_rows(k_gain, F)
            v_gains = split_rows(v_gain, F)
            s = ()
            for f in tl.static_range(F):
                s = s + ((tl.dot(k[f], q[f]) + z) * k_gains[f],)
            top = s[0]
            for f in tl.static_range(1, F):
                top = tl.maximum(top, s[f])
        else:
            acc = tl.zeros([B, HEADS], tl.float32)
            for f in tl.static_range(F):
                acc = tl.dot(k[f], q[f], acc)
            top = (acc + z) * k_gain
        m_new = tl.maximum(m, tl.max(top, 0))
        alpha = tl.exp2(m - m_new)[None, :]
        m = m_new
        norm *= alpha
        p_sum *= alpha
        v = unpack_fields(v_packed, BITS)
        fresh = tl.zeros([D, HEADS], tl.float32)
        if SPLIT_TOKENS:
            for f in tl.static_range(F):
                p = tl.exp2(s[f] - m[None, :])
                pg = (p * v_gains[f]).to(tl.float16)
                norm += p
                p_sum += pg.to(tl.float32)
                fresh = tl.dot(v[f], pg, fresh)
        else:
            p_all = tl.exp2(top - m[None, :])
            ps = split_rows(p_all, F)
            pgs = split_rows((p_all * v_gain).to(tl.float16), F)
            for f in tl.static_range(F):
                norm += ps[f]
                p_sum += pgs[f].to(tl.float32)
                fresh = tl.dot(v[f], pgs[f], fresh)
        out = out * alpha + fresh
    tl.store(out_ptr + tl.arange(0, D)[:, None] * HEADS + h[None, :], out)
    tl.store(state_ptr + h, m)
    tl.store(state_ptr + HEADS + h, tl.sum(norm, 0))
    tl.store(state_ptr + 2 * HEADS + h, tl.sum(p_sum, 0))


# ---------------------------------------------------------------------------- quarters


@triton.jit
def load_chunk(ptr, present, WORDS: tl.constexpr, W: tl.constexpr, KEYS: tl.constexpr):
    """The words of 16 columns, loaded once, seen by every warp that reads a part: [W, 16, 16]."""
    G: tl.constexpr = WORDS // 16
    word = tl.arange(0, WORDS)
    column = tl.arange(0, 16)
    if KEYS:
        x = tl.load(ptr + word[:, None] * 16 + column[None, :], mask=present, other=0)
        x = x.reshape(1, G, 16, 16)
    else:
        x = tl.load(ptr + column[:, None] * WORDS + word[None, :], mask=present, other=0)
        x = x.reshape(16, 1, G, 16).permute(1, 2, 0, 3)
    return tl.broadcast_to(x, (W // G, G, 16, 16)).reshape(W, 16, 16)


@triton.jit
def unpack_quarters(w, ASM: tl.constexpr):
    """The four quarters' digits of this warp's lanes."""
    return tl.inline_asm_elementwise(ASM, OUT_4, [w], (tl.float16,) * 4, True, 2)


@triton.jit
def add_scores(s, ptr, q, present, ASM: tl.constexpr, WORDS: tl.constexpr):
    """The four quarters' scores s plus one chunk of 16 key columns."""
    W: tl.constexpr = s[0].shape[0]
    k = unpack_quarters(load_chunk(ptr, present, WORDS, W, True), ASM)
    q = tl.broadcast_to(q[None], (W, 16, HEADS))
    return (
        tl.dot(k[0], q, s[0]),
        tl.dot(k[1], q, s[1]),
        tl.dot(k[2], q, s[2]),
        tl.dot(k[3], q, s[3]),
    )


@triton.jit
def add_values(out, alpha, ptr, p, present, ASM: tl.constexpr, WORDS: tl.constexpr):
    """One chunk of 16 value columns: out * alpha + P.V of this page."""
    v = unpack_quarters(load_chunk(ptr, present, WORDS, out.shape[0], False), ASM)
    fresh = tl.dot(v[0], p[0])
    fresh = tl.dot(v[1], p[1], fresh)
    fresh = tl.dot(v[2], p[2], fresh)
    fresh = tl.dot(v[3], p[3], fresh)
    return out * alpha + fresh


@triton.jit
def quarters_loop(
    q_ptr, z_ptr, table_ptr, pool_ptr, out_ptr, state_ptr, count_ptr, num_pages, page_words,
    N4: tl.constexpr, N2: tl.constexpr, N1: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
    ASM_4: tl.constexpr, ASM_2: tl.constexpr, ASM_1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sections of at most N4, N2 and N1 chunks of 16 columns, in K and in V; W = B / 64 warps."""
    W4: tl.constexpr = B // 4
    W2: tl.constexpr = B // 8
    W1: tl.constexpr = B // 16
    h = tl.arange(0, HEADS)
    k4, k2, k1 = tl.load(count_ptr), tl.load(count_ptr + 1), tl.load(count_ptr + 2)
    v4, v2, v1 = tl.load(count_ptr + 3), tl.load(count_ptr + 4), tl.load(count_ptr + 5)
    k2_at = tl.multiple_of(k4 * 16 * W4, 16)
    k1_at = tl.multiple_of(k2_at + k2 * 16 * W2, 16)
    v4_at = tl.multiple_of(k1_at + k1 * 16 * W1, 16)
    v2_at = tl.multiple_of(v4_at + v4 * 16 * W4, 16)
    v1_at = tl.multiple_of(v2_at + v2 * 16 * W2, 16)
    gains_at = tl.multiple_of(v1_at + v1 * 16 * W1, 16)

    zero = tl.zeros([W, 16, HEADS], tl.float32)
    chunk = tl.arange(0, 16)[:, None] * HEADS + h[None, :]
    q4 = ()
    q2 = ()
    q1 = ()
    out4 = ()
    out2 = ()
    out1 = ()
    for j in tl.static_range(N4):
        q4 = q4 + (tl.load(q_ptr + j * 16 * HEADS + chunk),)
        out4 = out4 + (zero,)
    for j in tl.static_range(N2):
        q2 = q2 + (tl.load(q_ptr + (k4 + j) * 16 * HEADS + chunk),)
        out2 = out2 + (zero,)
    for j in tl.static_range(N1):
        q1 = q1 + (tl.load(q_ptr + (k4 + k2 + j) * 16 * HEADS + chunk),)
        out1 = out1 + (zero,)
    # one offset per field: the fields' magic numbers differ, the sections' are summed beforehand
    z0 = tl.load(z_ptr + h)[None, None, :]
    z1 = tl.load(z_ptr + HEADS + h)[None, None, :]
    z2 = tl.load(z_ptr + 2 * HEADS + h)[None, None, :]
    z3 = tl.load(z_ptr + 3 * HEADS + h)[None, None, :]
    m = tl.full([W, HEADS], -1e30, tl.float32)
    norm = zero
    t0 = zero  # sums of the rounded p, by quarter, for the offsets of V
    t1 = zero
    t2 = zero
    t3 = zero
    lane = (tl.arange(0, W) * 16)[:, None, None] + tl.arange(0, 16)[None, :, None]
    next_page = tl.load(table_ptr)
    for i in tl.range(0, num_pages, num_stages=STAGES):
        page = pool_ptr + next_page.to(tl.int64) * page_words
        next_page = tl.load(table_ptr + i + 1)
        gain_ptr = (page + gains_at).to(tl.pointer_type(tl.int32))
        s = (zero, zero, zero, zero)
        for j in tl.static_range(N4):
            s = add_scores(s, page + j * 16 * W4, q4[j], j < k4, ASM_4, W4)
        for j in tl.static_range(N2):
            s = add_scores(s, page + k2_at + j * 16 * W2, q2[j], j < k2, ASM_2, W2)
        for j in tl.static_range(N1):
            s = add_scores(s, page + k1_at + j * 16 * W1, q1[j], j < k1, ASM_1, W1)
        g = word_gains(gain_ptr + lane)
        s0, s1 = (s[0] + z0) * g[0], (s[1] + z1) * g[1]
        s2, s3 = (s[2] + z2) * g[2], (s[3] + z3) * g[3]
        top = tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3))
        m_new = tl.maximum(m, tl.max(top, 1))
        alpha = tl.exp2(m - m_new)[:, None, :]
        m = m_new
        p0, p1 = tl.exp2(s0 - m[:, None, :]), tl.exp2(s1 - m[:, None, :])
        p2, p3 = tl.exp2(s2 - m[:, None, :]), tl.exp2(s3 - m[:, None, :])
        norm = norm * alpha + ((p0 + p1) + (p2 + p3))
        g = word_gains(gain_ptr + B // 4 + lane)
        h0, h1 = (p0 * g[0]).to(tl.float16), (p1 * g[1]).to(tl.float16)
        h2, h3 = (p2 * g[2]).to(tl.float16), (p3 * g[3]).to(tl.float16)
        t0, t1 = t0 * alpha + h0.to(tl.float32), t1 * alpha + h1.to(tl.float32)
        t2, t3 = t2 * alpha + h2.to(tl.float32), t3 * alpha + h3.to(tl.float32)
        p = (h0, h1, h2, h3)
        new = ()
        for j in tl.static_range(N4):
            ptr = page + v4_at + j * 16 * W4
            new = new + (add_values(out4[j], alpha, ptr, p, j < v4, ASM_4, W4),)
        out4 = new
        new = ()
        for j in tl.static_range(N2):
            ptr = page + v2_at + j * 16 * W2
            new = new + (add_values(out2[j], alpha, ptr, p, j < v2, ASM_2, W2),)
        out2 = new
        new = ()
        for j in tl.static_range(N1):
            ptr = page + v1_at + j * 16 * W1
            new = new + (add_values(out1[j], alpha, ptr, p, j < v1, ASM_1, W1),)
        out1 = new
    # the warps' outputs and states merge like splits do
    warp = tl.arange(0, W)
    at = out_ptr + warp[:, None, None] * 512 * HEADS + chunk[None]
    for j in tl.static_range(N4):
        tl.store(at + j * 16 * HEADS, out4[j])
    for j in tl.static_range(N2):
        tl.store(at + (v4 + j) * 16 * HEADS, out2[j], mask=j < v2)
    for j in tl.static_range(N1):
        tl.store(at + (v4 + v2 + j) * 16 * HEADS, out1[j], mask=j < v1)
    at = state_ptr + warp[:, None] * HEADS + h[None, :]
    tl.store(at, m)
    tl.store(at + W * HEADS, tl.sum(norm, 1))
    tl.store(at + 2 * W * HEADS, tl.sum(t0, 1))
    tl.store(at + 3 * W * HEADS, tl.sum(t1, 1))
    tl.store(at + 4 * W * HEADS, tl.sum(t2, 1))
    tl.store(at + 5 * W * HEADS, tl.sum(t3, 1))


# ---------------------------------------------------------------------------- compile and count


@dataclass(frozen=True)
class Variant:
    """One kernel to compile; `columns` are the widths' column counts (C4, C2, C1) of K and of V."""

    rule: str
    head_dim: int
    page: int
    warps: int
    columns: tuple[int, int, int]
    stages: int = 3

    @property
    def bits_per_element(self) -> float:
        """Stored digits and gains, without the padding of missing chunks."""
        digits = sum(b * c for b, c in zip((4, 2, 1), self.columns, strict=True))
        return (digits + 8) / self.head_dim

    def source(self) -> ASTSource:
        """The kernel with its constants, or ValueError if the rule does not fit the page."""
        pointers = {"q_ptr": "*fp16", "z_ptr": "*fp32", "table_ptr": "*i32", "pool_ptr": "*i16"}
        pointers |= {"out_ptr": "*fp32", "state_ptr": "*fp32"}
        if self.rule == "quarters":
            if self.warps * 64 != self.page:
                raise ValueError(f"quarters need page / 64 warps, got {self.warps}")
            if self.columns[2] and self.page // 16 < 16:
                raise ValueError("1-bit digits have fewer than 16 words per column")
            kernel, n = quarters_loop, [c // 16 for c in self.columns]
            signature = pointers | {"count_ptr": "*i32", "num_pages": "i32", "page_words": "i32"}
            asm = {b: quarters_asm(b, self.page * b // 16) for b in (4, 2, 1)}
            constants = {"N4": n[0], "N2": n[1], "N1": n[2], "B": self.page, "W": self.warps}
            constants |= {"ASM_4": asm[4], "ASM_2": asm[2], "ASM_1": asm[1], "STAGES": self.stages}
        else:
            (bits,) = (b for b, c in zip((4, 2, 1), self.columns, strict=True) if c)
            kernel, signature = fields_loop, pointers | {"num_pages": "i32"}
            constants = {"BITS": bits, "B": self.page, "D": self.head_dim}
            constants |= {"SPLIT_TOKENS": self.rule == "fields-tokens", "STAGES": self.stages}
        # without a page stride known to be a multiple of 16 bytes Triton does not pipeline a load
        aligned = [i for i, (n, t) in enumerate(signature.items()) if "*" in t or n == "page_words"]
        aligned = {(i,): [["tt.divisibility", 16]] for i in aligned}
        signature = signature | dict.fromkeys(constants, "constexpr")
        return ASTSource(kernel, signature, constants, aligned)


def variants() -> Iterator[Variant]:
    """Every row of the table."""
    uniform = {4: (1, 0, 0), 2: (0, 1, 0), 1: (0, 0, 1)}
    for head_dim in (128, 64):
        for one in uniform.values():
            columns = tuple(head_dim * x for x in one)
            for page in (256, 128):
                for rule in ("fields-columns", "fields-tokens"):
                    for warps in (2, 4, 8):
                        yield Variant(rule, head_dim, page, warps, columns)
                yield Variant("quarters", head_dim, page, page // 64, columns)
        mixed = {
            128: [
                (0, 128, 128),
                (32, 80, 16),
                (16, 64, 32),
                (48, 64, 16),
                (48, 96, 32),
                (96, 48, 16),
            ],
            64: [(0, 64, 64), (16, 32, 16), (16, 48, 16), (32, 48, 16), (48, 32, 16)],
        }
        for columns in mixed[head_dim]:
            for stages in (2, 3):
                yield Variant("quarters", head_dim, 256, 4, columns, stages)
    # 2- and 4-bit sections alone also fit the smaller page
    yield Variant("quarters", 128, 128, 2, (32, 96, 0))
    yield Variant("quarters", 64, 128, 2, (16, 48, 0))


def tool(name: str, *arguments: str) -> str:
    """The output of a disassembler of Triton's package."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    command = [str(folder / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def hot_loop(sass: str) -> list[str]:
    """The instructions between the farthest backward branch and its target."""
    labels: dict[str, int] = {}
    code: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if found := re.match(r"\s*(\.L\w+):", line):
            labels[found[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found[1])
            target = re.search(r"BRA.*`\((\.L\w+)\)", found[1])
            if target and labels.get(target[1], len(code)) < len(code) - 1:
                loops.append((labels[target[1]], len(code)))
    start, end = max(loops, key=lambda loop: loop[1] - loop[0])
    return code[start:end]


def measure(variant: Variant) -> dict[str, object]:
    """Compile one variant; a kernel that Triton refuses is a row with the reason."""
    try:
        options = {"num_warps": variant.warps}
        kernel = triton.compile(variant.source(), target=GPUTarget("cuda", 90, 32), options=options)
    except Exception as error:  # Triton's own errors have no common class
        return {"note": str(error).strip().splitlines()[-1]}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        loop = hot_loop(tool("nvdisasm", "-c", file.name))
        usage = tool("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    elements = variant.page * variant.head_dim * 2
    return {
        "loop_instructions": len(loop),
        "instructions_per_element": f"{len(loop) * variant.warps * 32 / elements:.2f}",
        "registers": found[1],
        "spill_bytes": found[2],
        "spill_instructions_in_loop": sum("STL" in i or "LDL" in i for i in loop),
        "barriers_in_loop": sum("BAR." in i for i in loop),
        "shared_bytes": kernel.metadata.shared,
        "note": "",
    }


def commit() -> str:
    """The checkout's commit."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() if found.returncode == 0 else "uncommitted"


COLUMNS = [
    "variant",
    "head_dim",
    "page",
    "warps",
    "stages",
    "c4",
    "c2",
    "c1",
    "bits_per_element",
    "instructions_per_element",
    "loop_instructions",
    "registers",
    "spill_bytes",
    "spill_instructions_in_loop",
    "barriers_in_loop",
    "shared_bytes",
    "note",
    "triton",
    "commit",
    "date",
]


def main() -> None:
    """Compile every variant and write its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the CSV to write")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    where = {"triton": triton.__version__, "commit": commit(), "date": datetime.date.today()}
    with arguments.out.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="")
        table.writeheader()
        for v in variants():
            c4, c2, c1 = v.columns
            row = {"variant": v.rule, "head_dim": v.head_dim, "page": v.page, "warps": v.warps}
            row |= {"stages": v.stages, "c4": c4, "c2": c2, "c1": c1}
            row["bits_per_element"] = f"{v.bits_per_element:.3f}"
            row |= measure(v) | where
            table.writerow(row)
            print(",".join(str(row.get(c, "")) for c in COLUMNS[:17]), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="sketch_decode_loop_"))
    main()
