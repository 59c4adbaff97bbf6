"""The launch after attention: partial results by their log-sum-exp, turned back to states."""

# device code: pyright reads Triton's constants and ranges as what they are on the host
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportReturnType=false

# ruff: noqa: E501 (Triton has no starred tuples; signatures by topic)

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def merge_kernel(
    sums_ptr, state_ptr, exact_ptr, exact_state_ptr, parts_ptr, folded_ptr,
    matrix_ptr, gain_ptr, center_ptr, offset_ptr, mean_ptr, sink_logits_ptr, query_tokens_ptr, out_ptr,
    splits, exact_splits, query_heads, queries, group, tiles, unscale,
    HEADS: tl.constexpr, M: tl.constexpr, PER: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    GROUPS: tl.constexpr, GAIN_SUM: tl.constexpr, OFFSET: tl.constexpr, MEAN: tl.constexpr,
    SINK_LOGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PER of the M queries of one row and KV head. Grid `(rows * tiles * HEADS, M / PER)`.

    Weighted sums over columns are added in the order of the splits in float32, then multiplied
    with the head's matrix `[C, D]` (float16; the sums as two float16 parts).
    """
    P_C: tl.constexpr = triton.next_power_of_2(C)
    P_D: tl.constexpr = triton.next_power_of_2(D)
    STATE: tl.constexpr = 2 + 2 * GROUPS
    place = tl.program_id(0)
    head = place % HEADS
    tile = place // HEADS % tiles
    row = place // (HEADS * tiles)
    n = tl.program_id(1) * PER + tl.arange(0, PER)
    which = tile * M + n
    real = (n < M) & (which < group * queries)
    query_head = head * group + which // queries
    asker = tl.load(query_tokens_ptr + row * queries + which % queries, mask=real, other=-1)
    parts = tl.load(parts_ptr + head)
    state_ptr += place * splits * (STATE * M)
    sums_ptr += place.to(tl.int64) * splits * (M * C)
    exact_ptr += place.to(tl.int64) * exact_splits * (M * D)
    exact_state_ptr += place * exact_splits * (2 * M)
    b = tl.arange(0, BLOCK)
    c = tl.arange(0, P_C)
    d = tl.arange(0, P_D)

    top = tl.full([PER], LOWEST, tl.float32)
    for s0 in range(0, parts, BLOCK):
        at = state_ptr + (s0 + b)[:, None] * (STATE * M) + n[None, :]
        ok = ((s0 + b) < parts)[:, None] & real[None, :]
        top = tl.maximum(top, tl.max(tl.load(at, mask=ok, other=LOWEST), 0))
    for s0 in range(0, exact_splits, BLOCK):
        at = exact_state_ptr + (s0 + b)[:, None] * (2 * M) + n[None, :]
        ok = ((s0 + b) < exact_splits)[:, None] & real[None, :]
        top = tl.maximum(top, tl.max(tl.load(at, mask=ok, other=LOWEST), 0))
    norm = tl.zeros([PER], tl.float32)
    if SINK_LOGITS:
        logit = tl.load(sink_logits_ptr + query_head, mask=real, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(top, logit)
        norm += tl.exp2(logit - top)

    sums = tl.zeros([PER, P_C], tl.float32)
    one = tl.zeros([PER], tl.float32)
    gain_sum = tl.zeros([PER], tl.float32)
    for s0 in range(0, parts, BLOCK):
        s = s0 + b
        at = state_ptr + s[:, None] * (STATE * M) + n[None, :]
        ok = (s < parts)[:, None] & real[None, :]
        m = tl.load(at, mask=ok, other=LOWEST)
        ok &= m > LOWEST * 0.5  # a split without pages has written nothing else
        w = tl.where(ok, tl.exp2(m - top[None, :]), 0.0)
        one += tl.sum(w * tl.load(at + M, mask=ok, other=0.0), 0)
        if GAIN_SUM:
            gain_sum += tl.sum(w * tl.load(at + 2 * M, mask=ok, other=0.0), 0)
        x = tl.load(
            sums_ptr + s[:, None, None] * (M * C) + n[None, :, None] * C + c[None, None, :],
            mask=ok[:, :, None] & (c < C)[None, None, :], other=0.0,
        )  # fmt: skip
        sums += tl.sum(w[:, :, None] * x, 0)
    out = tl.zeros([PER, P_D], tl.float32)
    for s0 in range(0, exact_splits, BLOCK):
        s = s0 + b
        at = exact_state_ptr + s[:, None] * (2 * M) + n[None, :]
        ok = (s < exact_splits)[:, None] & real[None, :]
        m = tl.load(at, mask=ok, other=LOWEST)
        ok &= m > LOWEST * 0.5
        w = tl.where(ok, tl.exp2(m - top[None, :]), 0.0)
        norm += tl.sum(w * tl.load(at + M, mask=ok, other=0.0), 0)
        x = tl.load(
            exact_ptr + s[:, None, None] * (M * D) + n[None, :, None] * D + d[None, None, :],
            mask=ok[:, :, None] & (d < D)[None, None, :], other=0.0,
        )  # fmt: skip
        out += tl.sum(w[:, :, None] * x, 0)
    norm += one
    shrink = 1.0 / tl.where(norm > 0.0, norm, 1.0)

    # sums over columns to states; normalised first, so that they fit into float16
    sums *= shrink[:, None]
    gain_sum *= shrink
    if GAIN_SUM:
        # digits about their middle: what rounding did to the matrix does not add up there
        center = tl.load(center_ptr + head * C + c, mask=c < C, other=0.0)
        sums += gain_sum[:, None] * center[None, :]
    high = sums.to(tl.float16)
    rest = (sums - high.to(tl.float32)).to(tl.float16)
    inside = d < D
    matrix = tl.load(
        matrix_ptr + (head * C + c[:, None]) * D + d[None, :],
        mask=(c < C)[:, None] & inside[None, :], other=0.0,
    )  # fmt: skip
    cold = tl.dot(rest, matrix, tl.dot(high, matrix)) * unscale
    if GAIN_SUM:
        gain = tl.load(gain_ptr + head * D + d, mask=inside, other=0.0)
        cold += gain_sum[:, None] * gain[None, :]
    if OFFSET:
        for g in tl.static_range(GROUPS):
            total = tl.zeros([PER], tl.float32)
            for s0 in range(0, parts, BLOCK):
                s = s0 + b
                at = state_ptr + s[:, None] * (STATE * M) + n[None, :]
                ok = (s < parts)[:, None] & real[None, :]
                m = tl.load(at, mask=ok, other=LOWEST)
                ok &= m > LOWEST * 0.5
                w = tl.where(ok, tl.exp2(m - top[None, :]), 0.0)
                total += tl.sum(w * tl.load(at + (2 + GROUPS + g) * M, mask=ok, other=0.0), 0)
            offset = tl.load(offset_ptr + (head * GROUPS + g) * D + d, mask=inside, other=0.0)
            cold += (total * shrink)[:, None] * offset[None, :]
    if MEAN:
        mean = tl.load(mean_ptr + head * D + d, mask=inside, other=0.0)
        cold += (one * shrink)[:, None] * mean[None, :]
    out = out * shrink[:, None] + cold
    # a padding query sees nothing
    out = tl.where((asker >= 0)[:, None], out, 0.0)
    at = ((row * query_heads + query_head) * queries + which % queries).to(tl.int64)[:, None] * D
    tl.store(
        out_ptr + at + d[None, :], out.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & inside[None, :],
    )  # fmt: skip
