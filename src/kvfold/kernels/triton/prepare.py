"""Queries made ready for packed pages, and the pages' addresses: the launch before attention."""

# device code: pyright reads Triton's constants and ranges as what they are on the host
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportReturnType=false

import triton
import triton.language as tl

COS = tl.constexpr("cos.approx.ftz.f32 $0, $1;")
SIN = tl.constexpr("sin.approx.ftz.f32 $0, $1;")


@triton.jit
def near(x, ASM: tl.constexpr, PLAIN: tl.constexpr):
    """Cosine or sine of -pi to pi: within 2^-20.9 by the device's instruction."""
    if PLAIN:
        return tl.cos(x) if ASM == COS else tl.sin(x)
    else:
        return tl.inline_asm_elementwise(ASM, "=f,f", [x], tl.float32, True, 1)


@triton.jit
def turn_back(q, partner, sign, position, freq, PLAIN: tl.constexpr):
    """R_n^-1 q: the angle is rounded to float32 as the model rounds it, then reduced exactly.

    PLAIN: without inline assembly, as Triton's interpreter needs it.
    """
    angle = position * freq
    turns = tl.floor(angle * 0.15915494309189535 + 0.5)
    # 2 pi in three parts, the first of which times a whole number of turns is exact
    angle = tl.fma(turns, -6.28125, angle)
    angle = tl.fma(turns, -0.0019350051879882812, angle)
    angle = tl.fma(turns, -3.0199159819930186e-07, angle)
    return q * near(angle, COS, PLAIN) + partner * sign * near(angle, SIN, PLAIN)


@triton.jit
def prepare_kernel(
    q_ptr, matrix_ptr, gain_ptr, center_ptr, mean_ptr, rope_ptr,
    table_ptr, block_ptr, folded_ptr, first_ptr, slabs_ptr, addresses_ptr,
    out_ptr, z_ptr, scores_ptr,
    capacity, slab_pages, page_bytes, zero_at, query_heads, queries, group, tiles, sinks, scale,
    unscale,
    HEADS: tl.constexpr, M: tl.constexpr, P_M: tl.constexpr, MEAN_N: tl.constexpr,
    D: tl.constexpr, C: tl.constexpr, P_C: tl.constexpr, B: tl.constexpr, PAGES: tl.constexpr,
    PAGED: tl.constexpr, SEGMENTS: tl.constexpr, Z: tl.constexpr, MEAN: tl.constexpr,
    TURN: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """One run of PAGES pages of one row and KV head, for up to M queries of the head's group.

    Grid `(rows * tiles * HEADS, runs of pages)`. Writes columns' queries (float16 `[chunks of 16,
    M, 16]`; once a page if PAGED, else by the first run alone), gain terms (float32) and the mean's
    scores (float16). The products are float16 x float16 with float32 sums.
    """
    P_D: tl.constexpr = triton.next_power_of_2(D)
    place = tl.program_id(0)
    run = tl.program_id(1)
    head = place % HEADS
    tile = place // HEADS % tiles
    row = place // (HEADS * tiles)
    pages = tl.load(folded_ptr + row)
    if (run * PAGES < pages) | (run == 0):
        page = run * PAGES + tl.arange(0, PAGES)
        there = page < pages
        number = tl.load(table_ptr + row * capacity + page, mask=there, other=0)
        address = tl.load(slabs_ptr + number // slab_pages, mask=there, other=0)
        address += (number % slab_pages).to(tl.int64) * page_bytes
        if (head == 0) & (tile == 0):
            tl.store(addresses_ptr + row * capacity + page, address, mask=there)

        d = tl.arange(0, P_D)
        n = tl.arange(0, P_M)
        which = tile * M + n
        real = (n < M) & (which < group * queries)
        q_row = (row * query_heads + head * group + which // queries) * queries + which % queries
        q_at = q_ptr + q_row.to(tl.int64)[:, None] * D
        inside = real[:, None] & (d[None, :] < D)
        q = tl.load(q_at + d[None, :], mask=inside, other=0.0).to(tl.float32) * scale
        # rows of the products: the queries of page 0, of page 1, ...
        r = tl.arange(0, PAGES * P_M)
        r_page = run * PAGES + r // P_M
        r_n = r % P_M
        r_there = (r_page < pages) & (r_n < M)
        still = tl.broadcast_to(q[None], (PAGES, P_M, P_D)).reshape(PAGES * P_M, P_D)
        if TURN:
            freq = tl.load(rope_ptr + d)
            sign = tl.load(rope_ptr + P_D + d)
            mate = tl.load(rope_ptr + 2 * P_D + d).to(tl.int32)
            other = tl.load(q_at + mate[None, :], mask=inside, other=0.0).to(tl.float32) * scale
            block = tl.load(block_ptr + row * capacity + page, mask=there, other=0)
            position = (tl.load(first_ptr + row) + sinks + block * B).to(tl.float32)
            turned = turn_back(
                q[None], other[None], sign[None, None, :], position[:, None, None],
                freq[None, None, :], PLAIN,
            ).reshape(PAGES * P_M, P_D)  # fmt: skip
        else:
            turned = still
        wide = r_page.to(tl.int64)
        if PAGED:
            columns_q = turned
            out_at = out_ptr + (place.to(tl.int64) * capacity + wide) * (M * C) + r_n * 16
            z_at = z_ptr + (place.to(tl.int64) * capacity + wide) * M + r_n
            mine = r_there
        else:
            columns_q = still
            out_at = out_ptr + place.to(tl.int64) * (M * C) + r_n * 16
            z_at = z_ptr + place.to(tl.int64) * M + r_n
            mine = (r < P_M) & (r_n < M) & (run == 0)
        if PAGED | (run == 0):
            half = columns_q.to(tl.float16)
            z = tl.zeros([PAGES * P_M], tl.float32)
            for c0 in tl.range(0, P_C, 64, num_stages=1):
                c = c0 + tl.arange(0, 64)
                matrix = tl.load(
                    matrix_ptr + (head * D + d[:, None]) * C + c[None, :],
                    mask=(d[:, None] < D) & (c[None, :] < C), other=0.0,
                )  # fmt: skip
                found = (tl.dot(half, matrix) * unscale).to(tl.float16)
                # chunks of 16 columns one after the other, each with all M queries
                at = (c // 16 * (16 * M) + c % 16)[None, :]
                tl.store(out_at[:, None] + at, found, mask=mine[:, None] & (c[None, :] < C))
                if Z and SEGMENTS == 1:
                    # digits are about their middle: what rounding did to the query cancels there
                    center = tl.load(center_ptr + head * C + c, mask=c < C, other=0.0)
                    z += tl.sum(found.to(tl.float32) * center[None, :], 1)
            if Z and SEGMENTS == 1:
                gain = tl.load(gain_ptr + head * D + d, mask=d < D, other=0.0)
                tl.store(z_at, z + tl.sum(columns_q * gain[None, :], 1), mask=mine)
        if SEGMENTS > 1:
            # zero points of this page's runs of tokens meet the query here, once
            r_number = tl.load(table_ptr + row * capacity + r_page, mask=r_there, other=0)
            r_address = tl.load(slabs_ptr + r_number // slab_pages, mask=r_there, other=0)
            r_address += (r_number % slab_pages).to(tl.int64) * page_bytes + zero_at
            zeros_at = r_address.to(tl.pointer_type(tl.float16))
            z_at = z_ptr + (place.to(tl.int64) * capacity + wide) * (SEGMENTS * M) + r_n
            for segment in tl.static_range(SEGMENTS):
                at = zeros_at[:, None] + (head * SEGMENTS + segment) * D + d[None, :]
                zero = tl.load(at, mask=r_there[:, None] & (d[None, :] < D), other=0.0)
                tl.store(z_at + segment * M, tl.sum(still * zero.to(tl.float32), 1), mask=r_there)
        if MEAN:
            half = turned.to(tl.float16)
            at = scores_ptr + (place.to(tl.int64) * capacity + wide) * (B * MEAN_N) + r_n
            for t0 in tl.range(0, B, 64, num_stages=1):
                t = t0 + tl.arange(0, 64)
                means = tl.load(
                    mean_ptr + (head * B + t[:, None]) * D + d[None, :], mask=d[None, :] < D,
                    other=0.0,
                )  # fmt: skip
                found = tl.dot(means, tl.trans(half))
                tl.store(
                    at[None, :] + t[:, None] * MEAN_N, found.to(tl.float16),
                    mask=(r_there & (r_n < MEAN_N))[None, :],
                )  # fmt: skip


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n, from 1."""
    return 1 << (n - 1).bit_length()


def prepare(q, layer, located, into, *, m, mean_n, scale, plain):
    """Launch `prepare_kernel` for queries `[rows, query_heads, queries, dim]` of a layer.

    Args:
        q: the queries, contiguous.
        layer: `kvfold.kernels.triton.decode.Layer`.
        located: pages of each row.
        into: where page addresses, queries of columns, what is added to sums, and products with
            the mean go.
        m: queries of a program.
        mean_n: queries for which products with the mean have room.
        scale: factor on the queries.
        plain: without inline assembly.
    """
    rows, query_heads, queries, _ = q.shape
    group = query_heads // layer.heads
    tiles = -(-group * queries // m)
    capacity, key, c = located.table.shape[1], layer.key, layer.constants
    p_m = power_of_two(m)
    run = 64 // p_m
    prepare_kernel[(rows * tiles * layer.heads, -(-capacity // run))](
        q, key.matrix, key.gain, key.center, layer.mean if layer.mean is not None else layer.table,
        layer.rope if layer.rope is not None else layer.table,
        located.table, located.block, located.folded, located.first, layer.pool.addresses, *into,
        capacity, layer.pool.slab_pages, layer.page_bytes,
        key.operand.bytes.get(key.operand.stored.page_zero or "", 0),
        query_heads, queries, group, tiles, layer.sinks, scale, 2.0**-key.exponent,
        HEADS=layer.heads, M=m, P_M=p_m, MEAN_N=mean_n, D=layer.key_dim,
        C=key.columns, P_C=64 * -(-key.columns // 64), B=layer.block, PAGES=run,
        PAGED=c["PAGED"], SEGMENTS=c["SEGMENTS"], Z=c["Z"], MEAN=c["MEAN"],
        TURN=layer.rope is not None, PLAIN=plain, num_warps=4,
    )  # fmt: skip
