#include "common.cuh"

// Queries made ready for packed pages, for sm_90: the launch before attention.
//
// A program takes one row and KV head and a run of pages. The head's tables (R_i mu of a page's tokens,
// the key matrix by columns, the gain term) lie in shared memory, 16 rows a tile. The queries turned back
// to the starts of PASS pages are columns of the other operand of their products: four warps take four
// tiles and 32 pages at a time, with wgmma where there is one; where programs are few, others than those of
// columns have the mean's. Queries of columns become 16-bit fixed
// point, their two bytes neighbouring rows of `out`; the unit follows from norms, which turning keeps, so
// that all pages share it. WHOLE: they do; else they are float16 numbers, for codes with tables and steps
// that change within a page.
//
// Operands of products lie as wgmma wants them, [step of 16 channels][8 rows][2][8][8 channels]. Rows of a
// tile are such that a thread's two are neighbours after a transposition: see __init__.py, `operands`.
//
// Constants come as macros, see __init__.py: HEADS, M, D, K4, K2, K1 (slots of 16 columns of a section),
// GROUPS (of four tiles, of all heads' most), PASS (0: nothing is turned), MEAN_N, DTYPE, WHOLE, PAGED,
// MEAN, TURN, ROPE_D (row length of `rope`).

#define WARPS 16
#define KC (K4 + K2 + K1)
#define KS (D / 16)
#define MEANS (MEAN ? BLOCK / 16 : 0)  // tiles
#define GROUP_BYTES (KS * 2048)
#define STEP_BYTES (PASS * 128)  // of the turned queries
#define PAIRS 16       // of pages, that four warps take at once
#define SHARERS (PASS > 32 ? 2 : 4)  // fours of warps that share 32 pages
#define SUMS (PASS ? SHARERS * 4 * PASS * 4 : WARPS * 4)
#define PAD (D + 8)    // rows of queries lie in different banks
#define MAGIC 8421376.0f  // 2^23 + 2^15: the low 16 bits of a sum with it are the rounded number and 2^15

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

// rounded numbers of two queries, one in each half; of two columns of one query where a lane's is
__device__ __forceinline__ u32 fixed(float x, float y, const float* inverse) {
    float a = x * inverse[0] + MAGIC, b = y * inverse[1] + MAGIC;
    return transposed(bytes_of(__float_as_uint(a), __float_as_uint(b), 0x5410));
}
// sum + the two numbers of x, unsigned, times signed bytes 0 and 1, or 2 and 3, of y
__device__ __forceinline__ int dot_low(u32 x, u32 y, int sum) {
    asm("dp2a.lo.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(x), "r"(y));
    return sum;
}
__device__ __forceinline__ int dot_high(u32 x, u32 y, int sum) {
    asm("dp2a.hi.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(x), "r"(y));
    return sum;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) prepare(
    const State* q, const int* heads, const u8* tables, const u32* centers, const float* reach, const float* rope,
    const int* block, const int* folded, const int* first, u8* out, u8* means,
    int capacity, int query_heads, int queries, int group, int tiles, int sinks, int run_pages, double scale_,
    double unscale_) {
    extern __shared__ __align__(128) u8 shared[];
    u8* turned = shared + GROUPS * GROUP_BYTES;                         // [KS][PASS / 2][2][8][8 channels]
    float* plain = (float*)(turned + KS * STEP_BYTES);                  // [M][PAD] queries
    float* mates = plain + M * PAD;                                     // [M][PAD] partners, signed
    u32* center = (u32*)(mates + M * PAD);                              // [KC * 4] four bytes
    float* units = (float*)(center + KC * 4);                           // [4]
    float* gains = units + 4;                                           // [PASS or 1][4] gain terms
    int* sums = (int*)gains + (PASS ? PASS : 1) * 4;                    // [warps][PASS or 1][4] of columns
    const int BARRIER_AT = GROUPS * GROUP_BYTES + KS * STEP_BYTES +
                           (2 * M * PAD + KC * 4 + 4 + (PASS ? PASS : 1) * 4 + SUMS) * 4;
    int place = blockIdx.x, head = place % HEADS, tile = place / HEADS % tiles, row = place / (HEADS * tiles);
    int pages = folded[row], from = blockIdx.y * run_pages, to = min(from + run_pages, pages);
    if (from >= pages && (PAGED || blockIdx.y)) {
        wait_for_launch_before();  // as the next launch counts on it
        return;
    }
    int thread = threadIdx.x, warp = thread / 32, lane = thread & 31, g = lane >> 2, c = lane & 3;
    float scale = (float)scale_, unscale = (float)unscale_;

    // the head's tiles: of the mean, of the columns that it has (of each section the first ones), of the gain
    const int* counts = heads + head * 16 + 6;
    const int n4 = (counts[0] + 15) / 16, n2 = n4 + (counts[1] + 15) / 16, n1 = n2 + (counts[2] + 15) / 16;
    const bool once = !PAGED && blockIdx.y == 0;  // queries of columns, for all pages
    const bool apart = gridDim.z > 1, means_only = apart && blockIdx.z;
    const int all = (PAGED || once) && !means_only ? MEANS + n1 + 1 : MEANS, skipped = apart && !means_only ? MEANS / 4 : 0;
    auto slot = [&](int u) { return u < n4 ? u : u < n2 ? u - n4 + K4 : u - n2 + K4 + K2; };
    const u32 barrier = shared_address(shared + BARRIER_AT);
    const u32 tables_in = shared_address(shared), turned_in = shared_address(turned);
    if (thread == 0) {
        const u32 bytes = ((all + 3) / 4 - skipped) * GROUP_BYTES;
        begin_barrier(barrier);
        expect(barrier, bytes);
        copy(tables_in + skipped * GROUP_BYTES,
             (u64)(tables + ((u64)head * GROUPS + skipped) * GROUP_BYTES), bytes, barrier);
    }
    for (int i = thread; i < KC * 4; i += 32 * WARPS) center[i] = centers[head * KC * 4 + i];
    wait_for_launch_before();
    let_next_launch_begin();
    for (int i = thread; i < M * D; i += 32 * WARPS) {
        int n = i / D, d = i % D, which = tile * M + n;
        float x = 0.0f, y = 0.0f;
        if (which < group * queries) {
            const State* at = q + ((u64)((row * query_heads + head * group + which / queries) * queries +
                                         which % queries)) * D;
            x = wide(at[d]) * scale;
            if (TURN) y = wide(at[(int)rope[2 * ROPE_D + d]]) * scale * rope[ROPE_D + d];
        }
        plain[n * PAD + d] = x, mates[n * PAD + d] = y;
    }
    __syncthreads();
    if (warp < M) {
        float x = 0.0f;
        for (int d = lane; d < D; d += 32) x += plain[warp * PAD + d] * plain[warp * PAD + d];
        for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
        // |query of a column| is at most |q| times the length of the longest column
        if (lane == 0) units[warp] = fmaxf(sqrtf(x) * reach[head], 1e-30f) * (1.0f / 32000.0f);
    }
    __syncthreads();
    float inverse[2];
    const int n0 = 2 * c & 3;  // the thread's queries in a product, of page c / 2
#pragma unroll
    for (int i = 0; i < 2; ++i) inverse[i] = unscale / units[min(n0 + i, M - 1)];
    const int row0 = 4 * (g >> 1) + (g & 1);
    // a page's queries of columns, by chunks; before them what is added to each one's sums, and their unit
    const int TERMS = WHOLE ? 32 : 0, Q_TILE = WHOLE ? 128 : M * 32, PAGE_Q = TERMS + KC * Q_TILE;

    // columns of queries from a tile's sums: [query][quarter of the columns][two bytes][4 columns], or
    // [query][16 columns] of float16, of the page g / 4 of two, or c / 2; z: of the numbers times twice
    // the middle of their columns' digits, negative
    auto store = [&](u8* to_, const float* d, int* z, u32 middle, bool there) {
        if (!WHOLE) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int n = n0 + (i & 1), column = row0 + (i & 2);
                if (there && n < M) *(u16*)(to_ + n * 32 + column * 2) = (u16)half2_of(d[i] * unscale, 0.0f);
            }
            return;
        }
        const u32 x = fixed(d[0], d[1], inverse), y = fixed(d[2], d[3], inverse);
        *z = dot_high(y, middle, dot_low(x, middle, *z));
        // the upper byte is rounded for a signed lower one, and loses the 2^15
        const u32 high = bytes_of(x + 0x00800080u, y + 0x00800080u, 0x7531) ^ 0x80808080u;
        if (there) *(uint2*)(to_ + (g & 3) * 32 + c * 8) = make_uint2(high, bytes_of(x, y, 0x6420));
    };
    // the gain term's two float16 parts, rows 0 and 1
    auto store_gain = [&](float* to_, const float* d, bool there) {
        const float x = d[0] + __shfl_xor_sync(0xffffffffu, d[0], 4), y = d[1] + __shfl_xor_sync(0xffffffffu, d[1], 4);
        if (there && g == 0) *(float2*)(to_ + n0) = make_float2(x, y);
    };
    auto sum_of_columns = [&](int x) {
        x += __shfl_xor_sync(0xffffffffu, x, 1);
        return x + __shfl_xor_sync(0xffffffffu, x, 2);
    };
    // what is added to the sums of a query: digits are about their middle, so that rounding cancels there
    int bias = 0;  // what the 2^15 have added
    for (int i = lane; WHOLE && i < n1 * 4; i += 32) {
        const u32 middle = center[slot(i / 4) * 4 + i % 4];
        bias = dot_high(0x80008000u, middle, dot_low(0x80008000u, middle, bias));
    }
    bias = __reduce_add_sync(0xffffffffu, bias);
    auto term = [&](float gain, int sum, float unit) { return gain + 0.5f * unit * (float)(sum - bias); };
    if (once) {  // a tile a warp
        wait(barrier, 0);
        u32 b[KS][2];
#pragma unroll
        for (int k = 0; k < KS; ++k) {
            const float* x = plain + min(g & 3, M - 1) * PAD + 16 * k + 2 * c;
            b[k][0] = half2_of(x[0], x[1]), b[k][1] = half2_of(x[8], x[9]);
        }
        u8* of = out + (u64)place * PAGE_Q;
        int z = 0;
        for (int u = warp; u < n1 + 1; u += WARPS) {
            float d[4] = {};
#pragma unroll
            for (int k = 0; k < KS; ++k) {
                u32 a[4];
                load_blocks(a, tile_at(tables_in + (MEANS + u) / 4 * GROUP_BYTES, u % 4, lane) + k * 2048);
                product(d, a, b[k][0], b[k][1]);
            }
            if (u < n1) store(of + TERMS + u * Q_TILE, d, &z, center[slot(u) * 4 + c], WHOLE ? g < M : c < 2);
            else store_gain(gains, d, c < 2);
        }
        if (WHOLE) {
            z = sum_of_columns(z);
            if (c == 0 && g < 4) sums[warp * 4 + g] = z;
            __syncthreads();
            if (thread < M) {
                int sum = 0;
                for (int w = 0; w < WARPS; ++w) sum += sums[w * 4 + thread];
                ((float2*)of)[thread] = make_float2(term(gains[thread], sum, units[thread]), units[thread]);
            }
        }
    }
#if PASS
    const u64 page0 = (u64)place * capacity;
    const int start = first[row] + sinks, mine = warp & 3;  // a tile of each group
    const int part = warp / 4 / SHARERS, share = warp / 4 % SHARERS;  // 32 of the pages, of their groups
    for (int base = from; base < to; base += PASS) {
        __syncthreads();  // nobody reads what was turned before
        for (int i = thread; i < PASS * (D / 8); i += 32 * WARPS) {
            const int at = i % PASS, d = i / PASS * 8;
            if (base + at >= to) continue;
            const float position = TURN ? (float)(start + block[row * capacity + base + at] * BLOCK) : 0.0f;
            float2 turn[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) turn[j] = turn_of(TURN ? position * rope[d + j] : 0.0f);
            u8* to_ = turned + d / 16 * STEP_BYTES + (at >> 1) * 256 + (d & 8) * 16 + (at & 1) * 64;
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int n = (r + (at >> 1)) & 3;  // lanes write to different banks
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
            for (int k = skipped + share; k < (PAGED ? all + 3 : MEANS) / 4; k += SHARERS) {
                float d[PAIRS][4];
                multiply(d, tables_in + k * GROUP_BYTES, turned_in + part * 4096, mine, lane);
                const int u = 4 * k + mine - MEANS;
                if (u < 0) {
                    // a lane has one token's four queries: its own two and its neighbour's; or its own alone
                    u8* of = means + ((page0 + page + (c >> 1)) * BLOCK + row0 + 16 * (u + MEANS)) * (MEAN_N * 2) +
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
                } else if (PAGED && u < n1) {
                    const u32 middle = center[slot(u) * 4 + c];
                    u8* of = out + (page0 + page + (WHOLE ? g >> 2 : c >> 1)) * PAGE_Q + TERMS + u * Q_TILE;
#pragma unroll
                    for (int h = 0; h < PAIRS; ++h, of += 2 * PAGE_Q) {
                        const int at = page + 2 * h + (WHOLE ? g >> 2 : c >> 1);
                        store(of, d[h], &z[h], middle, at < to && (!WHOLE || (g & 3) < M));
                    }
                } else if (PAGED && WHOLE && u == n1) {
#pragma unroll
                    for (int h = 0; h < PAIRS; ++h) store_gain(gains + (32 * part + 2 * h + (c >> 1)) * 4, d[h], true);
                }
            }
        }
        if (!PAGED || !WHOLE || means_only) continue;
        int* mine_ = sums + (share * 4 + mine) * (PASS * 4) + part * 128;
#pragma unroll
        for (int h = 0; h < PAIRS; ++h) {
            const int x = sum_of_columns(z[h]);
            if (c == 0) mine_[2 * h * 4 + g] = x;
        }
        __syncthreads();
        const int at = base + thread / 4, n = thread & 3;
        if (thread < 4 * PASS && at < to && n < M) {
            int sum = 0;
            for (int w = 0; w < SHARERS * 4; ++w) sum += sums[w * PASS * 4 + thread];
            ((float2*)(out + (page0 + at) * PAGE_Q))[n] = make_float2(term(gains[thread], sum, units[n]), units[n]);
        }
    }
#endif
}
