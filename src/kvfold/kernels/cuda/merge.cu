#include "common.cuh"

// The launch after attention, for sm_90: partial results by their log-sum-exp, turned back to states.
//
// One program a row, tile of queries and KV head, and PER of its M queries. It finds the programs of
// attention that had pages of its place, from `Cut`. Weights of all splits first, then the sums over
// columns, in a fixed order, then their product with the head's matrix, all in float32.
//
// Constants come as macros, see __init__.py: HEADS, M, PER, D, C (columns), GROUPS, DTYPE, and the flags
// GAIN_SUM, OFFSET, MEAN, SINK_LOGITS.

#define THREADS 512
#define PARTS (THREADS / (D / 2))  // threads that share two channels of the product
#define EACH ((C + PARTS - 1) / PARTS)
#define SPLIT_GROUPS 4
#define AHEAD (PER == 1)  // few programs: registers for latency
#define STATE (2 + 2 * GROUPS)
extern "C" __global__ void __launch_bounds__(THREADS, PER > 1 ? 2 : 1) merge(
    const float* sums, const float* states, const float* exact, const float* exact_state,
    const int* folded, const int* costs, const u16* matrix, const float* gain, const float* center,
    const float* offset, const float* mean, const State* sink_logits, const int* query_tokens,
    State* out, int rows, int programs, int inverse, int exact_splits, int exact_cost, int query_heads,
    int queries, int group, int tiles, double unscale_) {
    extern __shared__ __align__(16) float shared[];
    float* columns = shared;                       // [PER][C]
    float* found = columns + PER * C;              // [SPLIT_GROUPS][PER][C], later [PARTS][PER][D]
    float* fresh = found + PER * (SPLIT_GROUPS * C + PARTS * D);  // [SPLIT_GROUPS][PER][D] of exact tokens
    float* about = fresh + PER * SPLIT_GROUPS * D;  // [PER][1 + STATE]: 1 / norm, sums
    float* weights = about + PER * (2 + STATE);    // [programs + exact_splits][PER]
    int place = blockIdx.x, head = place % HEADS, tile = place / HEADS % tiles, row = place / (HEADS * tiles);
    int thread = threadIdx.x, lane = thread & 31, n0 = blockIdx.y * PER;
    exact += (u64)place * exact_splits * (M * D), exact_state += (u64)place * exact_splits * (2 * M);
    // the thread's part of the matrix, on its way while weights are found
    int d = thread % (D / 2) * 2, part = thread / (D / 2);
    matrix += (u64)head * C * D + d;
    u32 mine[AHEAD ? EACH : 1];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        int c = part + i * PARTS;
        if (AHEAD) mine[i] = part < PARTS && c < C ? *(const u32*)(matrix + c * D) : 0;
    }

    // the programs that had pages of this place
    const u32 all_costs = costs[HEADS];
    const Cut cut = cut_of(folded, rows, tiles * all_costs, rows * tiles * HEADS * exact_splits, exact_cost,
                           programs, inverse);
    u32 before = 0;
    for (int i = lane; i < row; i += 32) before += folded[i];
    before = __reduce_add_sync(0xffffffffu, before) * tiles * all_costs + folded[row] * tile * all_costs;
    const u32 begin = before + folded[row] * costs[head], end = before + folded[row] * costs[head + 1];
    int from = 0, last = 0;  // of all programs that begin at or before them, the last ones
    for (int step = 1024; step; step >>= 5) {
        u32 item;
        int a = from + lane * step, b = last + lane * step;
        from += (__popc(__ballot_sync(0xffffffffu, a < programs && begin_of(cut, a, &item) <= begin)) - 1) * step;
        last += (__popc(__ballot_sync(0xffffffffu, b < programs && begin_of(cut, b, &item) < end)) - 1) * step;
    }
    const int parts = begin < end ? last - from + 1 : 0;
    states += (u64)(from + place) * (STATE * M), sums += (u64)(from + place) * (M * C);
    wait_for_launch_before();

    for (int k = thread / 32; k < PER; k += THREADS / 32) {
        int n = n0 + k, which = tile * M + n;
        float top = LOWEST, logit = LOWEST;
#pragma unroll 4
        for (int s = lane; s < parts; s += 32) top = fmaxf(top, states[s * (STATE * M) + n]);
        for (int s = lane; s < exact_splits; s += 32) top = fmaxf(top, exact_state[s * (2 * M) + n]);
        if (SINK_LOGITS && which < group * queries) {
            logit = wide(sink_logits[head * group + which / queries]) * LOG2E;
            top = fmaxf(top, logit);
        }
        for (int o = 16; o; o >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, o));
        float total[STATE] = {};  // of the pages alone: index 1 is the norm
        float norm = 0.0f;
#pragma unroll 4
        for (int s = lane; s < parts; s += 32) {
            const float* at = states + s * (STATE * M) + n;
            float w = at[0] > LOWEST * 0.5f ? exp2f(at[0] - top) : 0.0f;
            weights[s * PER + k] = w;
            if (w > 0.0f) {
                total[1] += w * at[M];
                if (GAIN_SUM) total[2] += w * at[2 * M];
#pragma unroll
                for (int g = 0; g < GROUPS; ++g)
                    if (OFFSET) total[2 + GROUPS + g] += w * at[(2 + GROUPS + g) * M];
            }
        }
        for (int s = lane; s < exact_splits; s += 32) {
            const float* at = exact_state + s * (2 * M) + n;
            float w = at[0] > LOWEST * 0.5f ? exp2f(at[0] - top) : 0.0f;
            weights[(programs + s) * PER + k] = w;
            if (w > 0.0f) norm += w * at[M];
        }
        for (int o = 16; o; o >>= 1) {
            norm += __shfl_xor_sync(0xffffffffu, norm, o);
#pragma unroll
            for (int g = 1; g < STATE; ++g) total[g] += __shfl_xor_sync(0xffffffffu, total[g], o);
        }
        norm += total[1] + (SINK_LOGITS && logit > LOWEST ? exp2f(logit - top) : 0.0f);
        if (lane == 0) {
            about[k * (2 + STATE)] = norm > 0.0f ? 1.0f / norm : 1.0f;
#pragma unroll
            for (int g = 1; g < STATE; ++g) about[k * (2 + STATE) + 1 + g] = total[g];
        }
    }
    __syncthreads();
    // four columns a thread, every SPLIT_GROUPS-th split
    for (int i = thread; i < SPLIT_GROUPS * PER * (C / 4); i += THREADS) {
        int c = i % (C / 4) * 4, k = i / (C / 4) % PER, first = i / (C / 4 * PER);
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const float* at = sums + (n0 + k) * C + c;
#pragma unroll 8
        for (int s = first; s < parts; s += SPLIT_GROUPS) {
            float w = weights[s * PER + k];
            if (w > 0.0f) {  // without pages nothing is there
                float4 y = *(const float4*)(at + (u64)s * (M * C));
                x.x += w * y.x, x.y += w * y.y, x.z += w * y.z, x.w += w * y.w;
            }
        }
        *(float4*)(found + (first * PER + k) * C + c) = x;
    }
    for (int i = thread; i < SPLIT_GROUPS * PER * (D / 2); i += THREADS) {
        int e = i % (D / 2) * 2, k = i / (D / 2) % PER, first = i / (D / 2 * PER);
        float2 x = make_float2(0.0f, 0.0f);
        const float* at = exact + (n0 + k) * D + e;
#pragma unroll 4
        for (int s = first; s < exact_splits; s += SPLIT_GROUPS) {
            float w = weights[(programs + s) * PER + k];
            float2 y = *(const float2*)(at + s * (M * D));
            x.x += w * y.x, x.y += w * y.y;
        }
        *(float2*)(fresh + (first * PER + k) * D + e) = x;
    }
    __syncthreads();
    for (int i = thread; i < PER * C; i += THREADS) {
        int k = i / C, c = i % C;
        const float* of = about + k * (2 + STATE);
        float x = 0.0f;
        for (int j = 0; j < SPLIT_GROUPS; ++j) x += found[j * PER * C + i];
        // digits about their middle: what rounding did to the matrix does not add up there
        if (GAIN_SUM) x += of[3] * center[head * C + c];
        columns[i] = x * of[0];
    }
    __syncthreads();
    if (part < PARTS) {
        float x[PER][2] = {};
#pragma unroll(AHEAD ? EACH : 8)
        for (int i = 0; i < EACH; ++i) {
            int c = part + i * PARTS;
            u32 two = AHEAD ? mine[AHEAD ? i : 0] : c < C ? *(const u32*)(matrix + c * D) : 0;
            float low = float_of_half((u16)two), high = float_of_half((u16)(two >> 16));
#pragma unroll
            for (int k = 0; k < PER; ++k) {
                float y = c < C ? columns[k * C + c] : 0.0f;
                x[k][0] += y * low, x[k][1] += y * high;
            }
        }
#pragma unroll
        for (int k = 0; k < PER; ++k)
            *(float2*)(found + (part * PER + k) * D + d) = make_float2(x[k][0], x[k][1]);
    }
    __syncthreads();
    for (int i = thread; i < D * PER; i += THREADS) {
        int k = i / D, e = i % D, n = n0 + k, which = tile * M + n;
        if (n >= M || which >= group * queries) continue;
        const float* of = about + k * (2 + STATE);
        float x = 0.0f, y = 0.0f;
        for (int j = 0; j < PARTS; ++j) x += found[(j * PER + k) * D + e];
        x *= (float)unscale_;
        for (int j = 0; j < SPLIT_GROUPS; ++j) y += fresh[(j * PER + k) * D + e];
        if (GAIN_SUM) y += of[3] * gain[head * D + e];
        if (MEAN) y += of[2] * mean[head * D + e];
#pragma unroll
        for (int g = 0; g < GROUPS; ++g)
            if (OFFSET) y += of[3 + GROUPS + g] * offset[(head * GROUPS + g) * D + e];
        x += y * of[0];
        bool there = query_tokens[row * queries + which % queries] >= 0;  // padding sees nothing
        u64 at = ((u64)(row * query_heads + head * group + which / queries) * queries + which % queries) * D;
        out[at + e] = narrow(there ? x : 0.0f);
    }
}
