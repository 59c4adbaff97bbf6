#include "common.cuh"

// The launch after attention, for sm_90: partial results by their log-sum-exp, turned back to states.
//
// One program a row, tile of queries and KV head, and PER of its M queries. It finds the programs of
// attention that had pages of its place, from `Cut`. A warp has one query and every SPLIT_GROUPS-th part,
// whose weights it finds by itself; their sums over columns, in a fixed order, are multiplied with the
// head's matrix, all in float32. The matrix comes to shared memory while attention is still running, where
// there is room.
//
// Constants come as macros, see __init__.py: HEADS, M, PER, D, C (columns), GROUPS, DTYPE, and the flags
// GAIN_SUM, OFFSET, MEAN, SINK_LOGITS, STAGED (the matrix fits into shared memory).

#define THREADS 512
#define WARPS (THREADS / 32)
#define SPLIT_GROUPS (WARPS / PER)
#define PARTS (THREADS / (D / 2))  // threads that share two channels of the product
#define EACH ((C + PARTS - 1) / PARTS)
#define STATE (2 + 2 * GROUPS)
#define FOUND (SPLIT_GROUPS * C > PARTS * D ? SPLIT_GROUPS * C : PARTS * D)

// Sum over every SPLIT_GROUPS-th part of its weight times COLUMNS numbers, four a lane. The first are
// asked for before weights are known.
template <int COLUMNS, int AHEAD>
struct Parts {
    static const int CHUNKS = (COLUMNS + 127) / 128;
    const float *from, *states;
    int count, stride, state_stride, first, lane;
    float4 ahead[AHEAD][CHUNKS];
    float state[AHEAD];

    __device__ __forceinline__ void ask(int s, float* state, float4* y) const {
        *state = states[(u64)s * state_stride];
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            const int c = 4 * lane + 128 * i;
            y[i] = c < COLUMNS ? *(const float4*)(from + (u64)s * stride + c) : float4{};
        }
    }
    __device__ __forceinline__ void ask_first() {
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            state[k] = LOWEST;
            const int s = first + k * SPLIT_GROUPS;
            if (s < count) ask(s, &state[k], ahead[k]);
        }
    }
    // real: which of the first 32 parts have tokens
    __device__ __forceinline__ void add_all(float* to, float top, u32 real) const {
        float4 x[CHUNKS] = {};
        auto add = [&](float state, const float4* y) {
            if (state <= LOWEST * 0.5f) return;  // without tokens nothing is there
            const float w = exp2f(state - top);
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i)
                x[i].x += w * y[i].x, x[i].y += w * y[i].y, x[i].z += w * y[i].z, x[i].w += w * y[i].w;
        };
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) add(state[k], ahead[k]);
#pragma unroll 4
        for (int s = first + AHEAD * SPLIT_GROUPS; s < count; s += SPLIT_GROUPS) {
            float state = LOWEST;
            float4 y[CHUNKS];
            if (s > 31 || real >> s & 1) ask(s, &state, y);
            add(state, y);
        }
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i)
            if (4 * lane + 128 * i < COLUMNS) *(float4*)(to + 4 * lane + 128 * i) = x[i];
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, PER > 2 ? 2 : 1) merge(
    const float* sums, const float* states, const float* exact, const float* exact_state,
    const int* folded, const int* costs_, const u16* matrix, const float* gain, const float* center,
    const float* offset, const float* mean, const State* sink_logits, const int* query_tokens,
    State* out, int rows, int exact_splits, int start_cost, int exact_cost, int programs, int inverse, int query_heads,
    int queries, int group, int tiles, double unscale_) {
    extern __shared__ __align__(128) float shared[];
    float* columns = shared;                  // [C][PER]
    float* found = columns + PER * C;         // [SPLIT_GROUPS][PER][C], later [PARTS][PER][D]
    float* fresh = found + PER * FOUND;       // [SPLIT_GROUPS][PER][D] of exact tokens
    float* about = fresh + PER * SPLIT_GROUPS * D;  // [PER][2 + STATE]: 1 / norm, sums
    u16* staged = (u16*)(shared + (PER * (C + FOUND + SPLIT_GROUPS * D + 2 + STATE) + 31) / 32 * 32);
    const u32 barrier = shared_address(staged + C * D);
    int place = blockIdx.x, head = place % HEADS, tile = place / HEADS % tiles, row = place / (HEADS * tiles);
    int thread = threadIdx.x, lane = thread & 31, warp = thread / 32, n0 = blockIdx.y * PER;
    exact += (u64)place * exact_splits * (M * D), exact_state += (u64)place * exact_splits * (2 * M);
    matrix += (u64)head * C * D;
    if (STAGED && thread == 0) {
        begin_barrier(barrier);
        expect(barrier, C * D * 2);
        copy(shared_address(staged), (u64)matrix, C * D * 2, barrier);
    }

    // what is added comes nearer meanwhile
    auto near = [&](const float* from, int count) {
        for (int i = 8 * thread; i < count; i += 8 * THREADS) bring_near(from + i);
    };
    if (thread == 0) bring_near(query_tokens + row * queries);
    if (GAIN_SUM) near(center + head * C, C), near(gain + head * D, D);
    if (MEAN) near(mean + head * D, D);
    if (OFFSET) near(offset + head * GROUPS * D, GROUPS * D);

    // the programs that had pages of this place
    const Costs costs{costs_, (u32)costs_[HEADS], (u32)start_cost};
    const Cut cut = cut_of(folded, pages_at(folded, lane, rows), rows, tiles, costs,
                           rows * tiles * HEADS * exact_splits, exact_cost, programs, inverse);
    u32 before = 0;
    for (int i = lane; i < row; i += 32) before += costs.line(folded[i]);
    before = __reduce_add_sync(0xffffffffu, before) * tiles + costs.line(folded[row]) * tile;
    const u32 begin = before + costs.begin(head, folded[row]), end = before + costs.begin(head + 1, folded[row]);
    const u32 second = begin + costs.start + costs.page(head);  // where the first page ends
    int from = 0, last = 0;  // of all programs that begin before it and before the end, the last ones
    for (int step = 1024; step; step >>= 5) {
        u32 item;
        int a = from + lane * step, b = last + lane * step;
        from += (__popc(__ballot_sync(0xffffffffu, a < programs && begin_of(cut, a, &item) < second)) - 1) * step;
        last += (__popc(__ballot_sync(0xffffffffu, b < programs && begin_of(cut, b, &item) < end)) - 1) * step;
    }
    const int parts = folded[row] ? last - from + 1 : 0;
    states += (u64)(from + place) * (STATE * M), sums += (u64)(from + place) * (M * C);
    wait_for_launch_before();

    const int k = warp % PER, n = n0 + k, which = tile * M + n, first = warp / PER;
    if (first < SPLIT_GROUPS) {
        Parts<C, (PER > 2 ? 1 : PER > 1 ? 2 : 3)> pages{sums + n * C, states + n, parts, M * C, STATE * M, first, lane};
        Parts<D, (PER > 2 ? 1 : PER)> tokens{exact + n * D, exact_state + n, exact_splits, M * D, 2 * M, first, lane};
        pages.ask_first(), tokens.ask_first();
        // a lane's part: what its sums of weights are; of more parts than lanes the first
        float mine[STATE] = {LOWEST}, exact_mine[2] = {LOWEST}, logit = LOWEST;
        if (lane < parts)
#pragma unroll
            for (int i = 0; i < STATE; ++i) mine[i] = states[lane * (STATE * M) + i * M + n];
        if (lane < exact_splits)
#pragma unroll
            for (int i = 0; i < 2; ++i) exact_mine[i] = exact_state[lane * (2 * M) + i * M + n];
        float top = fmaxf(mine[0], exact_mine[0]);
        for (int s = lane + 32; s < parts; s += 32) top = fmaxf(top, states[s * (STATE * M) + n]);
        for (int s = lane + 32; s < exact_splits; s += 32) top = fmaxf(top, exact_state[s * (2 * M) + n]);
        if (SINK_LOGITS && which < group * queries) {
            logit = wide(sink_logits[head * group + which / queries]) * LOG2E;
            top = fmaxf(top, logit);
        }
        for (int o = 16; o; o >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, o));
        const u32 real = __ballot_sync(0xffffffffu, exact_mine[0] > LOWEST * 0.5f);
        pages.add_all(found + (first * PER + k) * C, top, 0xffffffffu);
        tokens.add_all(fresh + (first * PER + k) * D, top, real);
        if (first == SPLIT_GROUPS - 1) {
            auto weight = [&](float state) { return state > LOWEST * 0.5f ? exp2f(state - top) : 0.0f; };
            float total[STATE];  // of the pages alone: index 1 is the norm
            float norm = weight(exact_mine[0]) * exact_mine[1];
#pragma unroll
            for (int i = 1; i < STATE; ++i) total[i] = mine[0] > LOWEST * 0.5f ? weight(mine[0]) * mine[i] : 0.0f;
            for (int s = lane + 32; s < parts; s += 32) {
                const float* at = states + s * (STATE * M) + n;
                const float w = weight(at[0]);
#pragma unroll
                for (int i = 1; i < STATE; ++i)
                    if (w > 0.0f) total[i] += w * at[i * M];
            }
            for (int s = lane + 32; s < exact_splits; s += 32) {
                const float* at = exact_state + s * (2 * M) + n;
                norm += weight(at[0]) * at[M];
            }
            for (int o = 16; o; o >>= 1) {
                norm += __shfl_xor_sync(0xffffffffu, norm, o);
#pragma unroll
                for (int i = 1; i < STATE; ++i) total[i] += __shfl_xor_sync(0xffffffffu, total[i], o);
            }
            norm += total[1] + (SINK_LOGITS && logit > LOWEST ? exp2f(logit - top) : 0.0f);
            if (lane == 0) {
                about[k * (2 + STATE)] = norm > 0.0f ? 1.0f / norm : 1.0f;
#pragma unroll
                for (int i = 1; i < STATE; ++i) about[k * (2 + STATE) + 1 + i] = total[i];
            }
        }
    }
    __syncthreads();
    for (int i = thread; i < PER * C; i += THREADS) {
        int k = i / C, c = i % C;
        const float* of = about + k * (2 + STATE);
        float x = 0.0f;
#pragma unroll
        for (int j = 0; j < SPLIT_GROUPS; ++j) x += found[j * PER * C + i];
        // digits about their middle: what rounding did to the matrix does not add up there
        if (GAIN_SUM) x += of[3] * center[head * C + c];
        columns[c * PER + k] = x * of[0];
    }
    if (STAGED) wait(barrier, 0);
    __syncthreads();
    const int d = thread % (D / 2) * 2, part = thread / (D / 2);
    const u16* rows_of = (STAGED ? staged : matrix) + d;
    if (part < PARTS) {
        float x[PER][2] = {};
#pragma unroll 8
        for (int i = 0; i < EACH; ++i) {
            int c = part + i * PARTS;
            if (C % PARTS && c >= C) break;
            u32 two = *(const u32*)(rows_of + c * D);
            float low = float_of_half((u16)two), high = float_of_half((u16)(two >> 16));
#pragma unroll
            for (int k = 0; k < PER; ++k) {
                float y = columns[c * PER + k];
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
