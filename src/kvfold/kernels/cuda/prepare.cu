#include "common.cuh"

// Queries made ready for packed pages, for sm_90: the launch before attention.
//
// A program takes one row and KV head and a run of pages. The head's tables (the key matrix by columns,
// the gain term, R_i mu of a page's tokens) lie in shared memory as operands of products [16 rows x 16
// channels]. A warp turns the queries back to the starts of 4 pages and multiplies its share of the
// tables with them: all of them, or every `share`-th where a run has fewer pages than the warps take.
// Queries of columns become 16-bit fixed point, their two bytes neighbouring rows of `out`; the unit
// follows from norms, which turning keeps, so that all pages share it.
//
// Constants come as macros, see __init__.py: HEADS, M, D, K4, K2, K1 (slots of 16 columns of a section),
// MEAN_N, DTYPE, PAGED, MEAN, TURN, ROPE_D (row length of `rope`).

#define PAGES 4  // of a warp at once
#define WARPS 16
#define KC (K4 + K2 + K1)
#define KS (D / 16)
#define PAIRS (PAGES / 2)  // products of 8 columns: two pages of four queries
#define TILES (KC + 1 + (MEAN ? BLOCK / 16 : 0))
#define PAD (D + 16)    // rows of queries lie in different banks
#define MAGIC 12582912.0f  // 1.5 * 2^23: the low 16 bits of a sum with it are the rounded number

__device__ __forceinline__ void product(float* d, uint4 a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float sum_of_rows(float x) {
    for (int o = 4; o < 32; o <<= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

struct Part {  // what a thread holds of B's columns: two of the queries of one page of two
    float inverse[2], unit[2];
};

// product with the queries of two pages a pair, in two chains: it waits for itself otherwise
template <int N>
__device__ __forceinline__ void products(float (*d)[4], const uint4* operands, const u32 (*b)[KS][2]) {
    float other[N][4] = {};
#pragma unroll
    for (int k = 0; k < KS; ++k) {
        uint4 a = operands[k * 32];
#pragma unroll
        for (int h = 0; h < N; ++h) product(k & 1 ? other[h] : d[h], a, b[h][k][0], b[h][k][1]);
    }
#pragma unroll
    for (int h = 0; h < N; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) d[h][i] += other[h][i];
}

// two bytes of 16-bit numbers, one in each half: the upper one rounded for a signed lower one
__device__ __forceinline__ u32 fixed(float x, float y, float* sum, float center, const Part& p) {
    float a = x * p.inverse[0] + MAGIC, b = y * p.inverse[1] + MAGIC;
    sum[0] += (a - MAGIC) * center, sum[1] += (b - MAGIC) * center;
    u32 i = __float_as_uint(a), j = __float_as_uint(b);
    u32 low = bytes_of(i, j, 0x5140), high = bytes_of(i + 128, j + 128, 0x5140);
    return bytes_of(low, high, 0x7160);  // x low, x high, y low, y high
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) prepare(
    const State* q, const int* heads, const uint4* tables, const float* centers, const float* reach, const float* rope,
    const int* block, const int* folded, const int* first, u8* out, u8* means,
    int capacity, int query_heads, int queries, int group, int tiles, int sinks, int run_pages, int share, double scale_,
    double unscale_) {
    extern __shared__ __align__(128) u8 shared[];
    uint4* operands = (uint4*)shared;                                   // [TILES][KS][32]
    float* plain = (float*)(shared + TILES * KS * 512);                 // [M][PAD] queries
    float* mates = plain + M * PAD;                                     // [M][PAD] partners, signed
    float* center = mates + M * PAD;                                    // [KC * 16]
    float* units = center + KC * 16;                                    // [4]
    float* sums = units + 4;                                            // [2][WARPS][PAGES][4]
    float2* turns = (float2*)(sums + 2 * WARPS * PAGES * 4);            // [WARPS][PAGES][D] cosine, sine
    const int BARRIER_AT = TILES * KS * 512 + (2 * M * PAD + KC * 16 + 4 + WARPS * PAGES * (8 + 2 * D)) * 4;
    int place = blockIdx.x, head = place % HEADS, tile = place / HEADS % tiles, row = place / (HEADS * tiles);
    int pages = folded[row], from = blockIdx.y * run_pages, to = min(from + run_pages, pages);
    if (from >= pages && (PAGED || blockIdx.y)) {
        wait_for_launch_before();  // as the next launch counts on it
        return;
    }
    int thread = threadIdx.x, warp = thread / 32, lane = thread & 31, g = lane >> 2, c = lane & 3;
    float scale = (float)scale_, unscale = (float)unscale_;

    tables += (u64)head * (TILES * KS * 32);
    // the columns' tables are of no use to runs that have none of them to do
    const int skip = PAGED || blockIdx.y == 0 ? 0 : (KC + 1) * KS * 32;
    const u32 barrier = (u32)__cvta_generic_to_shared(shared + BARRIER_AT);
    if (thread == 0) {
        const u32 bytes = (TILES * KS * 32 - skip) * 16;
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier));
        asm volatile("fence.mbarrier_init.release.cluster;");
        asm volatile("fence.proxy.async.shared::cta;");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                     : "memory");
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
            ::"r"((u32)__cvta_generic_to_shared(operands + skip)), "l"((u64)(tables + skip)), "r"(bytes),
            "r"(barrier) : "memory");
    }
    for (int i = thread; i < KC * 16; i += 32 * WARPS) center[i] = centers[head * KC * 16 + i];
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

    asm volatile(
        "{ .reg .pred p; again%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0;\n"
        "@!p bra again%=; }" ::"r"(barrier) : "memory");
    Part p;
    const int n0 = 2 * c & 3;  // the thread's queries in D, of page c / 2; in B: g % 4, of page g / 4
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        p.unit[i] = units[min(n0 + i, M - 1)];
        p.inverse[i] = unscale / p.unit[i];
    }
    const int mine = min(g & 3, M - 1), row0 = 4 * (g >> 1) + (g & 1);
    const u64 page0 = (u64)place * capacity;
    const int PAGE_Q = KC * 128 + 32;  // with what is added to each query's sums, and their unit

    // columns of queries from the sums of a tile: [query][quarter of the columns][two bytes][4 columns]
    auto store = [&](u8* to_, const float* d, float* z, int t, bool there) {
        u32 x = transposed(fixed(d[0], d[1], z, center[t * 16 + row0], p));
        u32 y = transposed(fixed(d[2], d[3], z, center[t * 16 + row0 + 2], p));
        if (there) *(uint2*)to_ = make_uint2(bytes_of(x, y, 0x7531), bytes_of(x, y, 0x6420));
    };
    if (!PAGED && blockIdx.y == 0) {  // queries of columns once, a tile a warp
        u32 b[1][KS][2];
#pragma unroll
        for (int k = 0; k < KS; ++k) {
            float4 x = *(const float4*)(plain + mine * PAD + 16 * k + 4 * c);
            b[0][k][0] = half2_of(x.x, x.y), b[0][k][1] = half2_of(x.z, x.w);
        }
        u8* of = out + (u64)place * PAGE_Q;
        float z[2] = {};
        for (int t = warp; t < KC + 1; t += WARPS) {
            float d[1][4] = {};
            products<1>(d, operands + t * KS * 32 + lane, b);
            if (t < KC) store(of + t * 128 + g * 32 + c * 8, d[0], z, t, g < M);
            // rows 0 and 1: the gain term's float16 parts
            else if (g < 2) z[0] += d[0][0] / p.unit[0], z[1] += d[0][1] / p.unit[1];
        }
        z[0] = sum_of_rows(z[0]), z[1] = sum_of_rows(z[1]);
        if (g == 0 && c < 2) sums[warp * 4 + n0] = z[0], sums[warp * 4 + n0 + 1] = z[1];
        __syncthreads();
        if (thread < M) {
            float x = 0.0f;
            for (int w = 0; w < WARPS; ++w) x += sums[w * 4 + thread];
            ((float2*)(of + KC * 128))[thread] = make_float2(x * units[thread], units[thread]);
        }
    }
    if (!PAGED && !MEAN) return;

    // chunks of columns that the head has: of each section the first ones
    const int* counts = heads + head * 16 + 6;
    const int n4 = (counts[0] + 15) / 16, n2 = n4 + (counts[1] + 15) / 16, n1 = n2 + (counts[2] + 15) / 16;
    float2* turn = turns + warp * PAGES * D;
    const int part = warp % share;
    const int start = first[row] + sinks;
    const int step = PAGES * (WARPS / share);
    int turn_of_sums = 0;
    for (int base = from; base < to; base += step) {
        const int page = base + PAGES * (warp / share);
        float z[PAIRS][2] = {};
        if (page < to) {
            float at_[PAGES];
#pragma unroll
            for (int i = 0; i < PAGES; ++i)
                at_[i] = TURN ? (float)(start + block[row * capacity + min(page + i, to - 1)] * BLOCK) : 0.0f;
            for (int d = lane; d < D; d += 32) {
                float freq = TURN ? rope[d] : 0.0f;
#pragma unroll
                for (int i = 0; i < PAGES; ++i) turn[i * D + d] = turn_of(at_[i] * freq);
            }
            __syncwarp();
            u32 b[PAIRS][KS][2];
#pragma unroll
            for (int k = 0; k < KS; ++k) {
                int d = 16 * k + 4 * c;
                float4 x = *(const float4*)(plain + mine * PAD + d), y = *(const float4*)(mates + mine * PAD + d);
#pragma unroll
                for (int t = 0; t < PAIRS; ++t) {
                    const float4* cs = (const float4*)(turn + (2 * t + (g >> 2)) * D + d);
                    float4 u = cs[0], v = cs[1];
                    b[t][k][0] = half2_of(x.x * u.x + y.x * u.y, x.y * u.z + y.y * u.w);
                    b[t][k][1] = half2_of(x.z * v.x + y.z * v.y, x.w * v.z + y.w * v.w);
                }
            }
            if (PAGED) {
                u8* of[PAIRS];
                bool there[PAIRS];
#pragma unroll
                for (int h = 0; h < PAIRS; ++h) {
                    const int at = page + 2 * h + (g >> 2);
                    of[h] = out + (page0 + at) * PAGE_Q + (g & 3) * 32 + c * 8;
                    there[h] = at < to && (g & 3) < M;
                }
#pragma unroll 1
                for (int u = part; u < n1; u += share) {
                    const int t = u < n4 ? u : u < n2 ? u - n4 + K4 : u - n2 + K4 + K2;
                    float d[PAIRS][4] = {};
                    products<PAIRS>(d, operands + t * KS * 32 + lane, b);
#pragma unroll
                    for (int h = 0; h < PAIRS; ++h) store(of[h] + t * 128, d[h], z[h], t, there[h]);
                }
                if (part == share - 1) {
                    float d[PAIRS][4] = {};
                    products<PAIRS>(d, operands + KC * KS * 32 + lane, b);
#pragma unroll
                    for (int h = 0; h < PAIRS; ++h)
                        if (g < 2) z[h][0] += d[h][0] / p.unit[0], z[h][1] += d[h][1] / p.unit[1];
                }
            }
            if (MEAN) {
                // a lane has one token's four queries: its own two and its neighbour's; or its own alone
                u8* of[PAIRS];
#pragma unroll
                for (int h = 0; h < PAIRS; ++h)
                    of[h] = means + ((page0 + page + 2 * h + (c >> 1)) * BLOCK + row0) * (MEAN_N * 2) +
                            (MEAN_N == 4 ? 16 * (c & 1) : n0 * 2);
#pragma unroll 1
                for (int u = share - 1 - part; u < BLOCK / 16; u += share) {
                    float d[PAIRS][4] = {};
                    products<PAIRS>(d, operands + (KC + 1 + u) * KS * 32 + lane, b);
#pragma unroll
                    for (int h = 0; h < PAIRS; ++h) {
                        const bool there = page + 2 * h + (c >> 1) < to;
                        u8* to_ = of[h] + u * (16 * MEAN_N * 2);
                        u32 first = half2_of(d[h][0], d[h][1]), second = half2_of(d[h][2], d[h][3]);
                        if (MEAN_N == 4) {
                            u32 got = __shfl_xor_sync(0xffffffffu, c & 1 ? first : second, 1);
                            if (there) *(uint2*)to_ = c & 1 ? make_uint2(got, second) : make_uint2(first, got);
                        } else if (there && n0 < MEAN_N) {
                            *(u32*)to_ = first, *(u32*)(to_ + 2 * MEAN_N * 2) = second;
                        }
                    }
                }
            }
        }
        __syncwarp();
        if (!PAGED) continue;
        // what warps with a share of the tables have of the gain term and of rounded columns
        float* mine_ = sums + (turn_of_sums * WARPS + warp) * PAGES * 4;
#pragma unroll
        for (int h = 0; h < PAIRS; ++h)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float x = sum_of_rows(z[h][i]);
                if (g == 0) mine_[(2 * h + (c >> 1)) * 4 + n0 + i] = x;
            }
        if (share > 1) __syncthreads();
        else __syncwarp();
        const int at = page + lane / 4, n = lane & 3;
        if (part == 0 && lane < PAGES * 4 && at < to && n < M) {
            float x = 0.0f;
            for (int w = 0; w < share; ++w) x += mine_[w * PAGES * 4 + lane];
            ((float2*)(out + (page0 + at) * PAGE_Q + KC * 128))[n] = make_float2(x * units[n], units[n]);
        }
        turn_of_sums ^= 1;
    }
}
