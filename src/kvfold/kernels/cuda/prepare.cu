#include "common.cuh"

#define WARPS 16
#define OWN_AT_ONCE 1
#include "columns.cuh"

// Queries made ready for pages, for sm_90: the launch before attention.
//
// A program takes one row and KV head and a run of pages. The head's tables (R_i mu of a page's tokens;
// PAGED: the key matrix by columns, the gain term) lie in shared memory, 16 rows a tile. Not PAGED: one of
// them makes the queries of columns for all pages. The queries turned
// back to the starts of PASS pages are columns of the other operand of their products: four warps take four
// tiles and 32 pages at a time, with wgmma where there is one; where programs are few, others than those of
// columns have the mean's.
//
// Operands of products lie as wgmma wants them, [step of 16 channels][8 rows][2][8][8 channels]: see
// __init__.py, `operands`.
//
// Constants come as macros, see __init__.py: HEADS, M, D_K, Q_BYTES, K4, K2, K1 (slots of 16 columns of a
// section), GROUPS (of four tiles, of all heads' most), PASS, MEAN_N, DTYPE, WHOLE_KEYS, PAGED, MEAN, TURN,
// ROPE_D (row length of `rope`), HALVES (channels that are D_K / 2 apart turn by the same angle).

#define GROUP_BYTES (KS * 2048)
#define STEP_BYTES (PASS * 128)  // of the turned queries
#define PAIRS 16       // of pages, that four warps take at once
#define SHARERS (PASS > 32 ? 2 : 4)  // fours of warps that share 32 pages
#define SUMS (SHARERS * 4 * PASS * 4)

// four blocks of 8 x 8 numbers, whose rows lanes point at
__device__ __forceinline__ void load_blocks(u32* x, u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at));
}
// a tile of a group: rows of 16, for a lane of `load_blocks`
__device__ __forceinline__ u32 tile_at(u32 group, int tile, int lane) {
    return group + tile * 512 + (lane >> 3 & 1) * 256 + (lane >> 4) * 128 + (lane & 7) * 16;
}

// d[pair of pages][row g, row g + 8][two queries] of this warp's tile of a group, for 32 pages
__device__ __forceinline__ void multiply(float (*d)[4], u32 group, u32 queries, int tile, int lane) {
#if __CUDA_ARCH_FEAT_SM90_ALL
    const u64 about = (u64)(128 >> 4) << 16 | (u64)(256 >> 4) << 32;
    u64 a = about | group >> 4, b = about | queries >> 4;
    float* x = d[0];
#define F4(i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < KS; ++k) {
        asm volatile(
            "{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
            "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
            "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"
            "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, p, 1, 1, 0, 0; }"
            : F16(0), F16(16), F16(32), F16(48)
            : "l"(a), "l"(b), "r"(k));
        a += 2048 >> 4, b += STEP_BYTES >> 4;
    }
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 4 * PAIRS; ++i) asm volatile("" : "+f"(x[i]));  // not before they are there
#else
#pragma unroll
    for (int h = 0; h < PAIRS; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) d[h][i] = 0.0f;
    for (int k = 0; k < KS; ++k) {
        u32 a[4];
        load_blocks(a, tile_at(group, tile, lane) + k * 2048);
#pragma unroll
        for (int h = 0; h < PAIRS; h += 2) {
            u32 b[4];
            load_blocks(b, queries + k * STEP_BYTES + h * 256 + (lane >> 3) * 128 + (lane & 7) * 16);
            product(d[h], a, b[0], b[1]);
            product(d[h + 1], a, b[2], b[3]);
        }
    }
#endif
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) prepare(
    const State* q, const int* heads, const u8* tables, const uint4* operands, const u32* centers,
    const float2* about, const float* rope,
    const int* block, const int* folded, const int* first, u8* out, u8* means,
    int capacity, int query_heads, int queries, int group, int tiles, int sinks, int run_pages, double scale_,
    double unscale_) {
    extern __shared__ __align__(128) u8 shared[];
    u8* turned = shared + GROUPS * GROUP_BYTES;                         // [KS][PASS / 2][2][8][8 channels]
    float* plain = (float*)(turned + KS * STEP_BYTES);                  // [M][PAD] queries
    float* mates = plain + M * PAD;                                     // [M][PAD] partners, signed
    u32* center = (u32*)(mates + M * PAD);                              // [KC * 4] four bytes
    float* units = (float*)(center + KC * 4);                           // [4]
    float* gains = units + 4;                                           // [PASS][4] gain terms
    int* sums = (int*)gains + PASS * 4;                                 // [warps][PASS][4] of columns
    const int BARRIER_AT = GROUPS * GROUP_BYTES + KS * STEP_BYTES + (2 * M * PAD + KC * 4 + 4 + PASS * 4 + SUMS) * 4;
    // attention may begin: it reads what launches before this one have written, and waits for this one's
    wait_for_launch_before();
    let_next_launch_begin();
    int thread = threadIdx.x, warp = thread / 32, lane = thread & 31, g = lane >> 2, c = lane & 3;
    int place = blockIdx.x, head = place % HEADS, tile = place / HEADS % tiles, row = place / (HEADS * tiles);
    int from = blockIdx.y * run_pages;
    float scale = (float)scale_, unscale = (float)unscale_;

    // what is read first is asked for at once
    const int pages = folded[row], start = first[row] + sinks;
    const int mine_at = thread % PASS, STRIDE = 32 * WARPS / PASS;  // a thread's page, and threads of one
    auto block_at = [&](int base) {
        return TURN && base + mine_at < capacity ? block[row * capacity + base + mine_at] : 0;
    };
    int next_block = block_at(from);
    const Place at{0, 0, row, tile, head, pages};
    const int EACH = (M * D_K + 32 * WARPS - 1) / (32 * WARPS);  // channels of queries of a thread
    float x[EACH], sign[EACH];
    int partner[EACH];
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int i = thread + k * 32 * WARPS, n = min(i / D_K, M - 1), d = i % D_K;
        const bool has = tile * M + n < group * queries;
        x[k] = has ? wide(query_at(q, at, n, query_heads, queries, group)[d]) * scale : 0.0f;
        sign[k] = TURN ? rope[ROPE_D + d] : 0.0f, partner[k] = TURN ? (int)rope[2 * ROPE_D + d] : 0;
    }

    // the head's tiles: of the mean, of the columns that it has, of the gain
    const int columns = tiles_of(heads, head);
    const bool apart = gridDim.z > 1, means_only = apart && blockIdx.z;
    const int all = PAGED && !means_only ? MEANS + columns + 1 : MEANS, skipped = apart && !means_only ? MEANS / 4 : 0;
    const int to = min(from + run_pages, pages);
    if (from >= to) return;
    const u32 barrier = shared_address(shared + BARRIER_AT);
    const u32 tables_in = shared_address(shared), turned_in = shared_address(turned);
    if (thread == 0) {
        const u32 bytes = ((all + 3) / 4 - skipped) * GROUP_BYTES;
        begin_barrier(barrier);
        expect(barrier, bytes);
        copy(tables_in + skipped * GROUP_BYTES,
             (u64)(tables + ((u64)head * GROUPS + skipped) * GROUP_BYTES), bytes, barrier);
    }
#if !PAGED
    static_assert(OWN_BYTES <= SUMS * 4, "queries of all pages lie where sums of columns do");
    Own own;
    const bool once = blockIdx.y == 0, has = own_query(lane) + tile * M < group * queries;
    if (once)
        own.ask(query_at(q, at, has ? own_query(lane) : 0, query_heads, queries, group), head, operands, centers, about,
                warp, lane);
#endif
    for (int i = thread; PAGED && i < KC * 4; i += 32 * WARPS) center[i] = centers[head * KC * 4 + i];
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int i = thread + k * 32 * WARPS;
        if (i < M * D_K) plain[i / D_K * PAD + i % D_K] = x[k];
    }
#if !PAGED
    if (once) own.make((u8*)sums, has ? scale : 0.0f, head, columns, operands, centers, unscale, warp, lane);
#endif
    __syncthreads();
#if !PAGED
    if (once && warp == 0) own.finish((u8*)sums, (uint4*)(out + (u64)place * Q_BYTES), lane);
#endif
    if (PAGED && warp < M) {
        float x = 0.0f;
        for (int d = lane; d < D_K; d += 32) x += plain[warp * PAD + d] * plain[warp * PAD + d];
        for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
        if (lane == 0) units[warp] = unit_of(x, about[head].x);
    }
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int i = thread + k * 32 * WARPS, n = i / D_K;
        if (i < M * D_K) mates[n * PAD + i % D_K] = plain[n * PAD + partner[k]] * sign[k];
    }
    __syncthreads();
    float inverse[2];
    const int n0 = 2 * c & 3;  // the thread's queries in a product, of page c / 2
#pragma unroll
    for (int i = 0; PAGED && i < 2; ++i) inverse[i] = unscale / units[min(n0 + i, M - 1)];
    const u64 page0 = (u64)place * capacity;
    const int mine = warp & 3;  // a tile of each group
    const int part = warp / 4 / SHARERS, share = warp / 4 % SHARERS;  // 32 of the pages, of their groups
    for (int base = from; base < to; base += PASS) {
        const float position = (float)(start + next_block * BLOCK);
        next_block = block_at(base + PASS);
        __syncthreads();  // nobody reads what was turned before
        float2 turn[8];
#pragma unroll
        for (int k = 0; k * 32 * WARPS < PASS * (D_K / 8); ++k) {
            const int d = (thread / PASS + k * STRIDE) * 8;
            if (base + mine_at >= to || d >= D_K) continue;
            if (k == 0 || !(HALVES && STRIDE * 16 == D_K)) {
#pragma unroll
                for (int j = 0; j < 8; ++j) turn[j] = turn_of(TURN ? position * rope[d + j] : 0.0f);
            }
            u8* to_ = turned + d / 16 * STEP_BYTES + (mine_at >> 1) * 256 + (d & 8) * 16 + (mine_at & 1) * 64;
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int n = (r + (mine_at >> 1)) & 3;  // lanes write to different banks
                const float *x = plain + min(n, M - 1) * PAD + d, *y = mates + min(n, M - 1) * PAD + d;
                u32 made[4];
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    made[j] = half2_of(x[2 * j] * turn[2 * j].x + y[2 * j] * turn[2 * j].y,
                                       x[2 * j + 1] * turn[2 * j + 1].x + y[2 * j + 1] * turn[2 * j + 1].y);
                *(uint4*)(to_ + n * 16) = make_uint4(made[0], made[1], made[2], made[3]);
            }
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        wait(barrier, 0);
        int z[PAIRS] = {};
        const int page = base + 32 * part;
        if (page < to) {
#pragma unroll 1
            for (int k = skipped + share; k < (all + 3) / 4; k += SHARERS) {
                float d[PAIRS][4];
                multiply(d, tables_in + k * GROUP_BYTES, turned_in + part * 4096, mine, lane);
                const int u = 4 * k + mine - MEANS;
                if (u < 0) {
                    // a lane has one token's four queries: its own two and its neighbour's; or its own alone
                    const int token = 16 * (u + MEANS) + 4 * (g >> 1) + (g & 1);
                    u8* of = means + ((page0 + page + (c >> 1)) * BLOCK + token) * (MEAN_N * 2) +
                             (MEAN_N == 4 ? 16 * (c & 1) : n0 * 2);
#pragma unroll
                    for (int h = 0; h < PAIRS; ++h, of += 2 * BLOCK * MEAN_N * 2) {
                        const bool there = page + 2 * h + (c >> 1) < to;
                        u32 first = half2_of(d[h][0], d[h][1]), second = half2_of(d[h][2], d[h][3]);
                        if (MEAN_N == 4) {
                            u32 got = __shfl_xor_sync(0xffffffffu, c & 1 ? first : second, 1);
                            if (there) *(uint2*)of = c & 1 ? make_uint2(got, second) : make_uint2(first, got);
                        } else if (there && n0 < MEAN_N) {
                            *(u32*)of = first, *(u32*)(of + 2 * MEAN_N * 2) = second;
                        }
                    }
                } else if (PAGED && u < columns) {
                    const u32 middle = center[u * 4 + c];
                    u8* of = out + (page0 + page + (WHOLE_KEYS ? g >> 2 : c >> 1)) * Q_BYTES + TERMS_BYTES;
                    of += u * Q_CHUNK;
#pragma unroll
                    for (int h = 0; h < PAIRS; ++h, of += 2 * Q_BYTES) {
                        const int at = page + 2 * h + (WHOLE_KEYS ? g >> 2 : c >> 1);
                        store_queries(of, d[h], &z[h], middle, inverse, unscale, at < to, lane);
                    }
                } else if (PAGED && WHOLE_KEYS && u == columns) {
#pragma unroll
                    for (int h = 0; h < PAIRS; ++h)
                        store_gain(gains + (32 * part + 2 * h + (c >> 1)) * 4, d[h], true, lane);
                }
            }
        }
        if (!PAGED || !WHOLE_KEYS || means_only) continue;
        int* mine_ = sums + (share * 4 + mine) * (PASS * 4) + part * 128;
#pragma unroll
        for (int h = 0; h < PAIRS; ++h) {
            const int x = sum_of_columns(z[h]);
            if (c == 0) mine_[2 * h * 4 + g] = x;
        }
        __syncthreads();
        const int which = base + thread / 4, n = thread & 3;
        if (thread < 4 * PASS && which < to && n < M) {
            int sum = 0;
            for (int w = 0; w < SHARERS * 4; ++w) sum += sums[w * PASS * 4 + thread];
            ((float2*)(out + (page0 + which) * Q_BYTES))[n] =
                make_float2(term_of(gains[thread], sum, about[head].y, units[n]), units[n]);
        }
    }
}
