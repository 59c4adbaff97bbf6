"""The decode-attention kernel: scores, online softmax and sums over the columns of packed pages."""

# device code: pyright reads Triton's constants and ranges as what they are on the host
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportReturnType=false

# ruff: noqa: RUF005, B007, E501, SIM114 (Triton has no starred tuples; signatures by topic)

import triton
import triton.language as tl

from kvfold.kernels.triton.unpack import quarters

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def byte_gain(ptr, SHIFT: tl.constexpr):
    """2**((byte - 128) / 16 + SHIFT), 0 for byte 0: 2**23 + byte is made of bits, not converted."""
    byte = tl.load(ptr).to(tl.int32)
    x = (byte | 0x4B000000).to(tl.float32, bitcast=True) * 0.0625 - (524288.0 + 8.0 - SHIFT)
    return tl.exp2(tl.where(byte == 0, -1000.0, x))


@triton.jit
def load_gain(ptr, token, BYTES: tl.constexpr, GROUPS: tl.constexpr, SHIFT: tl.constexpr):
    """Gains of tokens from the field at ptr (bytes), times 2**SHIFT."""
    if BYTES == 1:
        return byte_gain(ptr + token, SHIFT)
    else:
        half = ptr.to(tl.pointer_type(tl.float16))
        return tl.load(half + token * GROUPS).to(tl.float32) * (2.0**SHIFT)


@triton.jit
def load_chunk(page, start, chunk, count, WORDS: tl.constexpr, W: tl.constexpr,
               KEYS: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """The words of up to 16 columns, seen by every warp that reads a part: `[W, 16, 16]`.

    Args:
        page: pointer to the page's 16-bit words.
        start: first word of the section of this head.
        chunk: number of the chunk in the section.
        count: columns of the section.
        WORDS: 16-bit words of a column.
        W: warps.
        KEYS: `[words, columns]` in the page, else `[columns, words]`.
        WHOLE: 1 where all sections are multiples of 16 columns, 2 where besides every head has all
            chunks; else 0.
    """
    G: tl.constexpr = WORDS // 16 if WORDS >= 16 else 1
    P: tl.constexpr = 1 if WORDS >= 16 else 16 // WORDS
    LANES: tl.constexpr = 16 if WORDS >= 16 else WORDS
    word = tl.arange(0, WORDS)
    column = tl.arange(0, 16)
    at = page + tl.multiple_of(start + chunk * (16 * WORDS), 8)
    if KEYS:
        if WHOLE == 2:
            x = tl.load(at + word[:, None] * 16 + column[None, :])
        elif WHOLE == 1:
            x = tl.load(at + word[:, None] * 16 + column[None, :], mask=chunk * 16 < count, other=0)
        else:
            have = tl.minimum(count - chunk * 16, 16)
            x = tl.load(
                at + word[:, None] * have + column[None, :], mask=column[None, :] < have, other=0
            )
        x = x.reshape(1, G, 1, LANES, 16)
        x = tl.broadcast_to(x, (W // G, G, P, LANES, 16))
    else:
        if WHOLE == 2:
            x = tl.load(at + column[:, None] * WORDS + word[None, :])
        elif WHOLE == 1:
            have = chunk * 16 < count
            x = tl.load(at + column[:, None] * WORDS + word[None, :], mask=have, other=0)
        else:
            present = chunk * 16 + column[:, None] < count
            x = tl.load(at + column[:, None] * WORDS + word[None, :], mask=present, other=0)
        x = x.reshape(16, 1, G, 1, LANES).permute(1, 2, 0, 3, 4)
        x = tl.broadcast_to(x, (W // G, G, 16, P, LANES))
    return x.reshape(W, 16, 16)


@triton.jit
def load_section(page, start, count, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, W: tl.constexpr,
                 KEYS: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """The words of a section's chunks: all loads stand before the first branch, so that Triton
    waits for them together.
    """
    x = ()
    for j in tl.static_range(CHUNKS):
        x = x + (load_chunk(page, start, j, count, 4 * W * WIDTH, W, KEYS, WHOLE),)
    return x


@triton.jit
def add_scores(s, x, chunk, count, q, levels_ptr, ASM: tl.constexpr, WIDTH: tl.constexpr,
               LEVELS: tl.constexpr, SKIP: tl.constexpr):  # fmt: skip
    """The four quarters' scores s plus one chunk of key columns; q has a query for each quarter.

    With SKIP a missing chunk costs a branch; without, it is multiplied as zeros.
    """
    if SKIP:
        if chunk * 16 < count:
            s0, s1, s2, s3 = chunk_scores(s, x, q, levels_ptr, ASM, WIDTH, LEVELS)
        else:
            s0 = s[0]
            s1 = s[1]
            s2 = s[2]
            s3 = s[3]
        return (s0, s1, s2, s3)
    else:
        return chunk_scores(s, x, q, levels_ptr, ASM, WIDTH, LEVELS)


@triton.jit
def chunk_scores(s, x, q, levels_ptr, ASM: tl.constexpr, WIDTH: tl.constexpr,
                 LEVELS: tl.constexpr):  # fmt: skip
    """The four quarters' scores s plus one chunk that is there."""
    k = quarters(x, levels_ptr, ASM, WIDTH, 4 * WIDTH * x.shape[0], True, LEVELS)
    return (
        tl.dot(k[0], q[0], s[0]),
        tl.dot(k[1], q[1], s[1]),
        tl.dot(k[2], q[2], s[2]),
        tl.dot(k[3], q[3], s[3]),
    )


@triton.jit
def add_values(out, alpha, x, chunk, count, p, levels_ptr, ASM: tl.constexpr, WIDTH: tl.constexpr,
               LEVELS: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """One chunk of value columns: out * alpha + P.V of this page, begun afresh."""
    if WHOLE == 2:  # not one condition: a constant leaves no branch in the kernel
        out = out * alpha + chunk_values(x, p, levels_ptr, ASM, WIDTH, LEVELS)
    elif chunk * 16 < count:
        out = out * alpha + chunk_values(x, p, levels_ptr, ASM, WIDTH, LEVELS)
    return out


@triton.jit
def chunk_values(x, p, levels_ptr, ASM: tl.constexpr, WIDTH: tl.constexpr,
                 LEVELS: tl.constexpr):  # fmt: skip
    """P.V of one chunk that is there."""
    v = quarters(x, levels_ptr, ASM, WIDTH, 4 * WIDTH * x.shape[0], False, LEVELS)
    fresh = tl.dot(v[0], p[0])
    fresh = tl.dot(v[1], p[1], fresh)
    fresh = tl.dot(v[2], p[2], fresh)
    return tl.dot(v[3], p[3], fresh)


@triton.jit
def load_queries(at, have, CHUNKS: tl.constexpr, M: tl.constexpr):
    """Operands `[16, N]` of the prepared query `[CHUNKS, M, 16]`, one a chunk of columns."""
    q = ()
    for j in tl.static_range(CHUNKS):
        q = q + (tl.load(at + j * (16 * M), mask=have, other=0.0),)
    return q


@triton.jit
def same(x):
    """One operand for all four quarters."""
    return (x, x, x, x)


@triton.jit
def zeros4(W: tl.constexpr, N: tl.constexpr):
    """Four sums of `[W, 16, N]` to begin with."""
    zero = tl.zeros([W, 16, N], tl.float32)
    return (zero, zero, zero, zero)


@triton.jit
def attend_exact(
    q_ptr, keys_ptr, values_ptr, tokens_ptr, query_tokens_ptr, exact_ptr, state_ptr,
    row, head, split, exact_tokens, query_heads, queries, group, tile, scale, cap,
    D_K: tl.constexpr, D_V: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    TOKENS: tl.constexpr, CAP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """TOKENS of the sinks and the hot window, in the model's dtype (float16 for float32)."""
    P_K: tl.constexpr = triton.next_power_of_2(D_K)
    P_V: tl.constexpr = triton.next_power_of_2(D_V)
    n = tl.arange(0, N)
    t = split * TOKENS + tl.arange(0, TOKENS)
    dk = tl.arange(0, P_K)
    dv = tl.arange(0, P_V)
    which = tile * M + n
    real = (n < M) & (which < group * queries)
    token = tl.load(tokens_ptr + row * exact_tokens + t, mask=t < exact_tokens, other=-1)
    asker = tl.load(query_tokens_ptr + row * queries + which % queries, mask=real, other=-1)
    base = (row * HEADS + head).to(tl.int64) * exact_tokens
    there = token >= 0
    k = tl.load(keys_ptr + (base + t[:, None]) * D_K + dk[None, :],
                mask=there[:, None] & (dk[None, :] < D_K), other=0.0)  # fmt: skip
    v = tl.load(values_ptr + (base + t[:, None]) * D_V + dv[None, :],
                mask=there[:, None] & (dv[None, :] < D_V), other=0.0)  # fmt: skip
    q_row = (row * query_heads + head * group + which // queries) * queries + which % queries
    q = tl.load(q_ptr + q_row.to(tl.int64)[None, :] * D_K + dk[:, None],
                mask=real[None, :] & (dk[:, None] < D_K), other=0.0)  # fmt: skip
    s = tl.dot(k.to(DTYPE), q.to(DTYPE)) * scale
    if CAP:
        s = soft_cap(s, cap)
    s = tl.where(there[:, None] & (token[:, None] <= asker[None, :]), s, LOWEST)
    m = tl.max(s, 0)
    p = tl.where(s > LOWEST * 0.5, tl.exp2(s - m[None, :]), 0.0)
    out = tl.dot(tl.trans(v.to(DTYPE)), p.to(DTYPE))  # [P_V, N]
    tl.store(exact_ptr + n[None, :] * D_V + dv[:, None], out,
             mask=(n[None, :] < M) & (dv[:, None] < D_V))  # fmt: skip
    tl.store(state_ptr + n, m, mask=n < M)
    tl.store(state_ptr + M + n, tl.sum(p, 0), mask=n < M)


@triton.constexpr_function
def back_to_digits(width, gain_bytes, levels):
    """What sums of digit * 2**(top position - 24) are multiplied with; with levels nothing."""
    top = 0 if gain_bytes == 2 else (4 if width == 4 else 3 * width)
    return 1.0 if levels else 2.0 ** (24 - top)


@triton.jit
def soft_cap(s, cap):
    """Cap * tanh(s / cap), from exp2."""
    return cap - 2.0 * cap / (1.0 + tl.exp2(s * (2.0 * LOG2E / cap)))


@triton.jit
def quarter_gains(page_bytes, lane, B: tl.constexpr, BYTES: tl.constexpr, GROUPS: tl.constexpr,
                  S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr):  # fmt: skip
    """Gains of the four quarters' tokens `[W, 16, 1]`, each times its power of two."""
    Q: tl.constexpr = B // 4
    return (
        load_gain(page_bytes, lane, BYTES, GROUPS, S0),
        load_gain(page_bytes, lane + Q, BYTES, GROUPS, S1),
        load_gain(page_bytes, lane + 2 * Q, BYTES, GROUPS, S2),
        load_gain(page_bytes, lane + 3 * Q, BYTES, GROUPS, S3),
    )


@triton.jit
def decode_kernel(
    items_ptr, heads_ptr, folded_ptr, addresses_ptr, capacity,
    q_ptr, z_ptr, mean_ptr, k_levels_ptr, v_levels_ptr,
    raw_q_ptr, keys_ptr, values_ptr, tokens_ptr, query_tokens_ptr, exact_tokens,
    query_heads, queries, group, tiles, scale, cap,
    sums_ptr, state_ptr, exact_ptr, exact_state_ptr, splits, exact_splits,
    HEADS: tl.constexpr, N: tl.constexpr, M: tl.constexpr, MEAN_N: tl.constexpr,
    D_K: tl.constexpr, D_V: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
    K4: tl.constexpr, K2: tl.constexpr, K1: tl.constexpr,
    V4: tl.constexpr, V2: tl.constexpr, V1: tl.constexpr,
    K_WHOLE: tl.constexpr, V_WHOLE: tl.constexpr,
    ASM_K4: tl.constexpr, ASM_K2: tl.constexpr, ASM_K1: tl.constexpr,
    ASM_V4: tl.constexpr, ASM_V2: tl.constexpr, ASM_V1: tl.constexpr,
    K_LEVELS: tl.constexpr, V_LEVELS: tl.constexpr,
    K_GAIN: tl.constexpr, V_GAIN: tl.constexpr, V_GROUPS: tl.constexpr,
    V_GAIN_SUM: tl.constexpr, V_OFFSET: tl.constexpr,
    PAGED: tl.constexpr, SEGMENTS: tl.constexpr, Z: tl.constexpr, MEAN: tl.constexpr,
    CAP: tl.constexpr, EXACT_TOKENS: tl.constexpr, DTYPE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial attention of one item of work for one row and up to M queries of a KV head's group.

    Grid `(items, rows * tiles)`; an item is a run of a head's pages, or EXACT_TOKENS of the exact
    tokens. A program keeps running maxima for each of its W = B / 64 warps and merges them at its
    end. Products are float16 x float16 with float32 sums (the exact part's in the model's dtype).
    Reads the head's sections and gains once, of pages that exist.

    `heads_ptr` `[HEADS, 16]`: first words of K's and V's sections, their counts of columns, then
    the first bytes of the K gain, V gain, V offset and K page scale (zero where there are none).
    """
    item = tl.program_id(0)
    kind = tl.load(items_ptr + item * 4)
    head = tl.load(items_ptr + item * 4 + 1)
    split = tl.load(items_ptr + item * 4 + 2)
    parts = tl.load(items_ptr + item * 4 + 3)
    row = tl.program_id(1) // tiles
    tile = tl.program_id(1) % tiles
    place = (row * tiles + tile) * HEADS + head
    if kind == 1:
        record = place * exact_splits + split
        attend_exact(
            raw_q_ptr, keys_ptr, values_ptr, tokens_ptr, query_tokens_ptr,
            exact_ptr + record.to(tl.int64) * (M * D_V), exact_state_ptr + record * (2 * M),
            row, head, split, exact_tokens, query_heads, queries, group, tile, scale, cap,
            D_K, D_V, HEADS, N, M, EXACT_TOKENS, CAP, DTYPE,
        )  # fmt: skip
    else:
        pages = tl.load(folded_ptr + row)
        low = split * pages // parts
        high = (split + 1) * pages // parts
        record = place * splits + split
        C: tl.constexpr = (K4 + K2 + K1) * 16
        C_V: tl.constexpr = (V4 + V2 + V1) * 16
        # state: maximum, sum of p, sums of p * gain by group, sums of p * offset by group
        STATE: tl.constexpr = 2 + 2 * V_GROUPS
        state_ptr += record * (STATE * M)
        sums_ptr += record.to(tl.int64) * (M * C_V)
        n = tl.arange(0, N)
        if low >= high:
            tl.store(state_ptr + n, tl.full([N], LOWEST, tl.float32), mask=n < M)
            tl.store(state_ptr + M + n, tl.zeros([N], tl.float32), mask=n < M)
        else:
            about = heads_ptr + head * 16
            k4_at, k2_at, k1_at = tl.load(about), tl.load(about + 1), tl.load(about + 2)
            v4_at, v2_at, v1_at = tl.load(about + 3), tl.load(about + 4), tl.load(about + 5)
            k4, k2, k1 = tl.load(about + 6), tl.load(about + 7), tl.load(about + 8)
            v4, v2, v1 = tl.load(about + 9), tl.load(about + 10), tl.load(about + 11)
            k_gain_at, v_gain_at = tl.load(about + 12), tl.load(about + 13)
            v_offset_at, k_scale_at = tl.load(about + 14), tl.load(about + 15)

            # powers of two by quarter: what the first section's values lack, keys then values
            KB: tl.constexpr = 4 if K4 > 0 else (2 if K2 > 0 else 1)
            VB: tl.constexpr = 4 if V4 > 0 else (2 if V2 > 0 else 1)
            E0: tl.constexpr = 0 if K_LEVELS else 24
            E1: tl.constexpr = 0 if K_LEVELS else 24 - (4 if KB == 4 else KB)
            E2: tl.constexpr = 0 if K_LEVELS else 24 - (0 if KB == 4 else 2 * KB)
            E3: tl.constexpr = 0 if K_LEVELS else 24 - (4 if KB == 4 else 3 * KB)
            # a gain of one byte is below 2**8 and may go up, a float16 gain only down
            TOP: tl.constexpr = 0 if V_LEVELS or V_GAIN == 2 else (4 if VB == 4 else 3 * VB)
            H0: tl.constexpr = TOP
            H1: tl.constexpr = 0 if V_LEVELS else TOP - (4 if VB == 4 else VB)
            H2: tl.constexpr = 0 if V_LEVELS else TOP - (0 if VB == 4 else 2 * VB)
            H3: tl.constexpr = 0 if V_LEVELS else TOP - (4 if VB == 4 else 3 * VB)

            zero = tl.zeros([W, 16, N], tl.float32)
            column = tl.arange(0, 16)
            have = (n < M)[None, :]
            chunk = n[None, :] * 16 + column[:, None]
            warp = tl.arange(0, W)
            lane = (warp * 16)[:, None, None] + tl.arange(0, 16)[None, :, None]
            q_row = place.to(tl.int64)
            if PAGED:
                q_ptr += q_row * capacity * (M * C)
            else:
                q_ptr += q_row * (M * C)
            if Z:
                z_ptr += q_row * (capacity * (SEGMENTS * M) if (PAGED or SEGMENTS > 1) else M)
            if MEAN:
                mean_ptr += q_row * capacity * (B * MEAN_N)
            q = load_queries(q_ptr + chunk, have, 0 if PAGED else K4 + K2 + K1, M)
            out = ()
            for j in tl.static_range(V4 + V2 + V1):
                out = out + (zero,)
            m = tl.full([W, N], LOWEST, tl.float32)
            norm = zero
            gain_sum = zero
            offset_sum = ()
            if V_OFFSET:
                for g in tl.static_range(V_GROUPS):
                    offset_sum = offset_sum + (zero,)
            addresses_ptr += row * capacity
            address = tl.load(addresses_ptr + low)
            for i in tl.range(low, high, num_stages=STAGES):
                page = tl.multiple_of(address, 16).to(tl.pointer_type(tl.int16))
                page = tl.multiple_of(page, 16)
                page_bytes = page.to(tl.pointer_type(tl.uint8))
                address = tl.load(addresses_ptr + tl.minimum(i + 1, high - 1))
                qs = q
                if PAGED:
                    at = q_ptr + tl.cast(i, tl.int64) * (M * C)
                    qs = load_queries(at + chunk, have, K4 + K2 + K1, M)
                s = zeros4(W, N)
                x4 = load_section(page, k4_at, k4, K4, 4, W, True, K_WHOLE)
                x2 = load_section(page, k2_at, k2, K2, 2, W, True, K_WHOLE)
                x1 = load_section(page, k1_at, k1, K1, 1, W, True, K_WHOLE)
                # other sections first, in units of the first one, whose chunk 0 comes last and is
                # never skipped: a product must stand between the branches and the softmax, or
                # Triton moves the layout change of p into every branch
                k_scale = page_bytes + k_scale_at
                if K1 > 0 and KB > 1:
                    s = section_scores(s, x1, k1, qs, K4 + K2, 0, K1, K_WHOLE < 2, k_scale, k_levels_ptr,
                                       ASM_K1, 1, K_LEVELS, SEGMENTS, B, D_K)  # fmt: skip
                    if K2 > 0:
                        s = (s[0], s[1] * 2.0, s[2] * 4.0, s[3] * 8.0)
                    else:
                        s = (s[0], s[1] * 8.0, s[2] * 0.25, s[3] * 2.0)
                if K2 > 0 and KB > 2:
                    s = section_scores(s, x2, k2, qs, K4, 0, K2, K_WHOLE < 2, k_scale, k_levels_ptr,
                                       ASM_K2, 2, K_LEVELS, SEGMENTS, B, D_K)  # fmt: skip
                    s = (s[0], s[1] * 4.0, s[2] * 0.0625, s[3] * 0.25)
                if Z:
                    z = first_terms(
                        z_ptr, i, lane, W, N, M, B, PAGED or SEGMENTS > 1, SEGMENTS, E0, E1, E2, E3
                    )
                    s = (s[0] + z[0], s[1] + z[1], s[2] + z[2], s[3] + z[3])
                x = x4 if KB == 4 else (x2 if KB == 2 else x1)
                kb = k4 if KB == 4 else (k2 if KB == 2 else k1)
                ASM_KB: tl.constexpr = ASM_K4 if KB == 4 else (ASM_K2 if KB == 2 else ASM_K1)
                KBS: tl.constexpr = K4 if KB == 4 else (K2 if KB == 2 else K1)
                s = section_scores(s, x, kb, qs, 0, 1, KBS, K_WHOLE < 2, k_scale, k_levels_ptr,
                                   ASM_KB, KB, K_LEVELS, SEGMENTS, B, D_K)  # fmt: skip
                s = section_scores(s, x, kb, qs, 0, 0, 1, False, k_scale, k_levels_ptr,
                                   ASM_KB, KB, K_LEVELS, SEGMENTS, B, D_K)  # fmt: skip
                if K_GAIN > 0:
                    g = quarter_gains(page_bytes + k_gain_at, lane, B, K_GAIN, 1, E0, E1, E2, E3)
                    s0, s1, s2, s3 = s[0] * g[0], s[1] * g[1], s[2] * g[2], s[3] * g[3]
                else:
                    s0, s1 = s[0] * (2.0**E0), s[1] * (2.0**E1)
                    s2, s3 = s[2] * (2.0**E2), s[3] * (2.0**E3)
                if MEAN:
                    at = (
                        mean_ptr
                        + tl.cast(i, tl.int64) * (B * MEAN_N)
                        + lane * MEAN_N
                        + n[None, None, :]
                    )
                    in_mean = (n < MEAN_N)[None, None, :]
                    Q: tl.constexpr = B // 4 * MEAN_N
                    s0 += tl.load(at, mask=in_mean, other=0.0).to(tl.float32)
                    s1 += tl.load(at + Q, mask=in_mean, other=0.0).to(tl.float32)
                    s2 += tl.load(at + 2 * Q, mask=in_mean, other=0.0).to(tl.float32)
                    s3 += tl.load(at + 3 * Q, mask=in_mean, other=0.0).to(tl.float32)
                if CAP:
                    s0, s1, s2, s3 = (
                        soft_cap(s0, cap), soft_cap(s1, cap), soft_cap(s2, cap), soft_cap(s3, cap)
                    )  # fmt: skip
                top = tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3))
                higher = tl.maximum(m, tl.max(top, 1))
                alpha = tl.exp2(m - higher)[:, None, :]
                m = higher
                p0, p1 = tl.exp2(s0 - m[:, None, :]), tl.exp2(s1 - m[:, None, :])
                p2, p3 = tl.exp2(s2 - m[:, None, :]), tl.exp2(s3 - m[:, None, :])
                norm = norm * alpha + ((p0 + p1) + (p2 + p3))
                if V_OFFSET:
                    new = ()
                    for g in tl.static_range(V_GROUPS):
                        o = quarter_gains(page_bytes + v_offset_at + 2 * g, lane, B, 2, V_GROUPS,
                                          0, 0, 0, 0)  # fmt: skip
                        part = (p0 * o[0] + p1 * o[1]) + (p2 * o[2] + p3 * o[3])
                        new = new + (offset_sum[g] * alpha + part,)
                    offset_sum = new
                x4 = load_section(page, v4_at, v4, V4, 4, W, False, V_WHOLE)
                x2 = load_section(page, v2_at, v2, V2, 2, W, False, V_WHOLE)
                x1 = load_section(page, v1_at, v1, V1, 1, W, False, V_WHOLE)
                x = x4 if VB == 4 else (x2 if VB == 2 else x1)
                vb = v4 if VB == 4 else (v2 if VB == 2 else v1)
                ASM_VB: tl.constexpr = ASM_V4 if VB == 4 else (ASM_V2 if VB == 2 else ASM_V1)
                new = ()
                FIRST: tl.constexpr = V4 if V4 > 0 else (V2 if V2 > 0 else V1)
                for g in tl.static_range(V_GROUPS):
                    if V_GAIN > 0:
                        w = quarter_gains(page_bytes + v_gain_at + V_GAIN * g, lane, B, V_GAIN,
                                          V_GROUPS, H0, H1, H2, H3)  # fmt: skip
                        h = ((p0 * w[0]).to(tl.float16), (p1 * w[1]).to(tl.float16),
                             (p2 * w[2]).to(tl.float16), (p3 * w[3]).to(tl.float16))  # fmt: skip
                    else:
                        h = ((p0 * (2.0**H0)).to(tl.float16), (p1 * (2.0**H1)).to(tl.float16),
                             (p2 * (2.0**H2)).to(tl.float16), (p3 * (2.0**H3)).to(tl.float16))  # fmt: skip
                    if V_GAIN_SUM:
                        one0 = tl.full([W, 16, 16], 2.0 ** (TOP - H0), tl.float16)
                        one1 = tl.full([W, 16, 16], 2.0 ** (TOP - H1), tl.float16)
                        one2 = tl.full([W, 16, 16], 2.0 ** (TOP - H2), tl.float16)
                        one3 = tl.full([W, 16, 16], 2.0 ** (TOP - H3), tl.float16)
                        fresh = tl.dot(one0, h[0])
                        fresh = tl.dot(one1, h[1], fresh)
                        fresh = tl.dot(one2, h[2], fresh)
                        fresh = tl.dot(one3, h[3], fresh)
                        gain_sum = gain_sum * alpha + fresh
                    for j in tl.static_range(FIRST // V_GROUPS):
                        new = new + (
                            add_values(
                                out[g * (FIRST // V_GROUPS) + j], alpha,
                                x[g * (FIRST // V_GROUPS) + j], g * (FIRST // V_GROUPS) + j, vb, h,
                                v_levels_ptr, ASM_VB, VB, V_LEVELS, V_WHOLE,
                            ),
                        )  # fmt: skip
                if V4 > 0 and V2 > 0:
                    # positions 0, 4, 0, 4 to 0, 2, 4, 6, all up by 2 (bytes) or none (float16)
                    UP: tl.constexpr = 4.0 if V_GAIN != 2 else 1.0
                    h2 = (h[0] * UP, h[1] * (UP * 4.0), h[2] * (UP / 16.0), h[3] * (UP / 4.0))
                    for j in tl.static_range(V2):
                        new = new + (
                            add_values(out[V4 + j], alpha, x2[j], j, v2, h2, v_levels_ptr, ASM_V2,
                                       2, V_LEVELS, V_WHOLE),
                        )  # fmt: skip
                if V1 > 0 and (V4 + V2) > 0:
                    if V4 > 0:  # 0, 4, 0, 4 to 0, 1, 2, 3
                        D1: tl.constexpr = 0.5 if V_GAIN != 2 else 1.0
                        h1 = (h[0] * D1, h[1] * (D1 * 8.0), h[2] * (D1 / 4.0), h[3] * (D1 * 2.0))
                    else:  # 0, 2, 4, 6 to 0, 1, 2, 3
                        D2: tl.constexpr = 0.125 if V_GAIN != 2 else 1.0
                        h1 = (h[0] * D2, h[1] * (D2 * 2.0), h[2] * (D2 * 4.0), h[3] * (D2 * 8.0))
                    for j in tl.static_range(V1):
                        new = new + (
                            add_values(out[V4 + V2 + j], alpha, x1[j], j, v1, h1, v_levels_ptr,
                                       ASM_V1, 1, V_LEVELS, V_WHOLE),
                        )  # fmt: skip
                out = new

            # the warps of a program merge as splits do
            best = tl.max(m, 0)
            factor = tl.exp2(m - best[None, :])[:, None, :]
            at = sums_ptr + n[None, :] * C_V + column[:, None]
            for j in tl.static_range(V4 + V2 + V1):
                back = back_to_digits(4 if j < V4 else (2 if j < V4 + V2 else 1), V_GAIN, V_LEVELS)
                tl.store(at + j * 16, tl.sum(out[j] * factor, 0) * back, mask=have)
            mine = n < M
            tl.store(state_ptr + n, best, mask=mine)
            tl.store(state_ptr + M + n, tl.sum(tl.sum(norm * factor, 0), 0), mask=mine)
            if V_GAIN_SUM:  # all 16 rows of the product with ones are the same
                total = tl.sum(tl.sum(gain_sum * factor, 0), 0) * (2.0 ** (-4 - TOP))
                tl.store(state_ptr + 2 * M + n, total, mask=mine)
            if V_OFFSET:
                for g in tl.static_range(V_GROUPS):
                    total = tl.sum(tl.sum(offset_sum[g] * factor, 0), 0)
                    tl.store(state_ptr + (2 + V_GROUPS + g) * M + n, total, mask=mine)


@triton.jit
def first_terms(z_ptr, i, lane, W: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
                B: tl.constexpr, PAGED: tl.constexpr, SEGMENTS: tl.constexpr,
                E0: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, E3: tl.constexpr):  # fmt: skip
    """The query's gain term, where sums of scores begin, in the units of each quarter."""
    n = tl.arange(0, N)[None, None, :]
    if PAGED:
        z_ptr += i * (SEGMENTS * M)
    LEN: tl.constexpr = B // SEGMENTS
    return (
        first_term(z_ptr, lane, n, W, N, M, LEN, SEGMENTS, 2.0**-E0),
        first_term(z_ptr, lane + B // 4, n, W, N, M, LEN, SEGMENTS, 2.0**-E1),
        first_term(z_ptr, lane + 2 * (B // 4), n, W, N, M, LEN, SEGMENTS, 2.0**-E2),
        first_term(z_ptr, lane + 3 * (B // 4), n, W, N, M, LEN, SEGMENTS, 2.0**-E3),
    )


@triton.jit
def first_term(z_ptr, token, n, W: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
               LEN: tl.constexpr, SEGMENTS: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """`first_terms` of one quarter."""
    at = token // LEN * M if SEGMENTS > 1 else token * 0
    z = tl.load(z_ptr + at + n, mask=n < M, other=0.0) * UNIT
    return tl.broadcast_to(z, (W, 16, N))


@triton.jit
def section_scores(s, x, count, q, FIRST: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
                   SKIP: tl.constexpr, scale_ptr, levels_ptr, ASM: tl.constexpr,
                   WIDTH: tl.constexpr, LEVELS: tl.constexpr, SEGMENTS: tl.constexpr,
                   B: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Scores of chunks LOW to HIGH of a section, whose queries are q[FIRST:], added to s."""
    W: tl.constexpr = s[0].shape[0]
    N: tl.constexpr = s[0].shape[2]
    for j in tl.static_range(LOW, HIGH):
        wide = tl.broadcast_to(q[FIRST + j][None], (W, 16, N))
        if SEGMENTS > 1:
            # steps of this page's run of tokens, one for each column
            half = scale_ptr.to(tl.pointer_type(tl.float16))
            columns = j * 16 + tl.arange(0, 16)[None, :, None]
            queries = ()
            for f in tl.static_range(4):
                segment = (tl.arange(0, W) * 16 + f * (B // 4)) // (B // SEGMENTS)
                at = half + segment[:, None, None] * COLUMNS + columns
                step = tl.load(at, mask=columns < COLUMNS, other=0.0)
                queries = queries + ((wide * step).to(tl.float16),)
        else:
            queries = same(wide)
        s = add_scores(s, x[j], j, count, queries, levels_ptr, ASM, WIDTH, LEVELS, SKIP)
    return s
