// Queries made ready for packed pages, for sm_90: the launch before attention.
//
// A program takes one row and KV head and a run of pages. The head's tables (the key matrix by columns,
// the gain term, R_i mu of a page's tokens) lie in shared memory as operands of products [16 rows x 16
// channels]; a warp turns the queries back to the starts of PAGES pages and multiplies all tables with them. Queries of columns become 16-bit fixed point, their two bytes
// neighbouring rows of `out`; the unit follows from norms, which turning keeps, so that all pages share it.
//
// Constants come as macros, see __init__.py: HEADS, M, D, K4, K2, K1 (slots of 16 columns
// of a section), MEAN_N, DTYPE, PAGED,
// MEAN, TURN, PAGES (of a warp at once), ROPE_D (row length of `rope`).

#define WARPS (64 / PAGES)
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
    const int* table, const int* block, const int* folded, const int* first, const u64* slabs,
    u64* addresses, u8* out, float* terms, u8* means, int capacity, int slab_pages, int page_bytes,
    int query_heads, int queries, int group, int tiles, int sinks, int run_pages, double scale_,
    double unscale_) {
    extern __shared__ __align__(128) u8 shared[];
    uint4* operands = (uint4*)shared;                                   // [TILES][KS][32]
    float* plain = (float*)(shared + TILES * KS * 512);                 // [M][PAD] queries
    float* mates = plain + M * PAD;                                     // [M][PAD] partners, signed
    float* center = mates + M * PAD;                                    // [KC * 16]
    float* units = center + KC * 16;                                    // [4]
    float2* turns = (float2*)(units + 4);                               // [WARPS][PAGES][D] cosine, sine
    float* sums = (float*)turns;                                        // [WARPS][4], before turns
    const int BARRIER_AT = TILES * KS * 512 + (2 * M * PAD + KC * 16 + 4 + WARPS * 2 * PAGES * D) * 4;
    int place = blockIdx.x, head = place % HEADS, tile = place / HEADS % tiles, row = place / (HEADS * tiles);
    int pages = folded[row], from = blockIdx.y * run_pages, to = min(from + run_pages, pages);
    if (from >= pages && (PAGED || blockIdx.y)) return;
    int thread = threadIdx.x, warp = thread / 32, lane = thread & 31, g = lane >> 2, c = lane & 3;
    float scale = (float)scale_, unscale = (float)unscale_;

    if (head == 0 && tile == 0)
        for (int page = from + thread; page < to; page += 32 * WARPS) {
            int number = table[row * capacity + page];
            addresses[(u64)row * capacity + page] =
                slabs[number / slab_pages] + (u64)(number % slab_pages) * page_bytes;
        }
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
    const int PAGE_Q = KC * 128;

    if (!PAGED && blockIdx.y == 0) {  // queries of columns once, a tile a warp
        u32 b[KS][2];
#pragma unroll
        for (int k = 0; k < KS; ++k) {
            float4 x = *(const float4*)(plain + mine * PAD + 16 * k + 4 * c);
            b[k][0] = half2_of(x.x, x.y), b[k][1] = half2_of(x.z, x.w);
        }
        float z[2] = {};
        for (int t = warp; t < KC + 1; t += WARPS) {
            float d[4] = {};
#pragma unroll
            for (int k = 0; k < KS; ++k) product(d, operands[(t * KS + k) * 32 + lane], b[k][0], b[k][1]);
            if (t == KC) {  // rows 0 and 1: the gain term's float16 parts
                if (g < 2) z[0] += d[0] / p.unit[0], z[1] += d[1] / p.unit[1];
                continue;
            }
            u32 x = transposed(fixed(d[0], d[1], z, center[t * 16 + row0], p));
            u32 y = transposed(fixed(d[2], d[3], z, center[t * 16 + row0 + 2], p));
            if (g < M) {
                u32* at = (u32*)(out + (u64)place * PAGE_Q + t * 128 + 2 * g * 16 + 4 * c);
                at[0] = bytes_of(x, y, 0x7531), at[4] = bytes_of(x, y, 0x6420);
            }
        }
        z[0] = sum_of_rows(z[0]), z[1] = sum_of_rows(z[1]);
        if (g == 0 && c < 2) sums[warp * 4 + n0] = z[0], sums[warp * 4 + n0 + 1] = z[1];
        __syncthreads();
        if (thread < M) {
            float x = 0.0f;
            for (int w = 0; w < WARPS; ++w) x += sums[w * 4 + thread];
            terms[((u64)place * M + thread) * 2] = x * units[thread];
            terms[((u64)place * M + thread) * 2 + 1] = units[thread];
        }
        __syncthreads();
    }
    if (!PAGED && !MEAN) return;

    // chunks of columns that the head has: of each section the first ones
    const int k4 = heads[head * 16 + 6], k2 = heads[head * 16 + 7], k1 = heads[head * 16 + 8];
    float2* turn = turns + warp * PAGES * D;
    const int start = first[row] + sinks;
    for (int page = from + PAGES * warp; page < to; page += PAGES * WARPS) {
        float at_[PAGES];
#pragma unroll
        for (int i = 0; i < PAGES; ++i)
            at_[i] = TURN ? (float)(start + block[row * capacity + min(page + i, to - 1)] * BLOCK) : 0.0f;
        for (int d = lane; d < D; d += 32) {
            float freq = TURN ? rope[d] : 0.0f;
#pragma unroll
            for (int i = 0; i < PAGES; ++i) {
                // 2 pi in three parts, the first of which times a whole number of turns is exact
                float angle = at_[i] * freq, whole = floorf(angle * 0.15915494309189535f + 0.5f);
                angle = fmaf(whole, -6.28125f, angle);
                angle = fmaf(whole, -0.0019350051879882812f, angle);
                angle = fmaf(whole, -3.0199159819930186e-07f, angle);
                turn[i * D + d] = make_float2(__cosf(angle), __sinf(angle));
            }
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
        float z[PAIRS][2] = {};
        for (int t = PAGED ? 0 : KC + 1; t < TILES; ++t) {
            int at_column = 16 * (t < K4 ? t : t < K4 + K2 ? t - K4 : t - K4 - K2);
            if (t < KC && at_column >= (t < K4 ? k4 : t < K4 + K2 ? k2 : k1)) continue;
            float d[PAIRS][4] = {};
#pragma unroll
            for (int k = 0; k < KS; ++k) {
                uint4 a = operands[(t * KS + k) * 32 + lane];
#pragma unroll
                for (int h = 0; h < PAIRS; ++h) product(d[h], a, b[h][k][0], b[h][k][1]);
            }
            if (t < KC) {
                float low = center[t * 16 + row0], high = center[t * 16 + row0 + 2];
#pragma unroll
                for (int h = 0; h < PAIRS; ++h) {
                    u32 x = transposed(fixed(d[h][0], d[h][1], z[h], low, p));
                    u32 y = transposed(fixed(d[h][2], d[h][3], z[h], high, p));
                    int at = page + 2 * h + (g >> 2);
                    if (at < to && (g & 3) < M) {
                        u32* to_ = (u32*)(out + (page0 + at) * PAGE_Q + t * 128 + 2 * (g & 3) * 16 + 4 * c);
                        to_[0] = bytes_of(x, y, 0x7531), to_[4] = bytes_of(x, y, 0x6420);
                    }
                }
            } else if (t == KC) {
#pragma unroll
                for (int h = 0; h < PAIRS; ++h)
                    if (g < 2) z[h][0] += d[h][0] / p.unit[0], z[h][1] += d[h][1] / p.unit[1];
            } else {
                int token = (t - KC - 1) * 16 + row0;
#pragma unroll
                for (int h = 0; h < PAIRS; ++h) {
                    int at = page + 2 * h + (c >> 1);
                    if (at < to && n0 < MEAN_N) {
                        u8* to_ = means + (page0 + at) * (BLOCK * MEAN_N * 2) + n0 * 2;
                        *(u32*)(to_ + token * (MEAN_N * 2)) = half2_of(d[h][0], d[h][1]);
                        *(u32*)(to_ + (token + 2) * (MEAN_N * 2)) = half2_of(d[h][2], d[h][3]);
                    }
                }
            }
        }
        if (PAGED) {
#pragma unroll
            for (int h = 0; h < PAIRS; ++h)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float x = sum_of_rows(z[h][i]) * p.unit[i];
                    int at = page + 2 * h + (c >> 1), n = n0 + i;
                    if (g == 0 && at < to && n < M) {
                        terms[((page0 + at) * M + n) * 2] = x;
                        terms[((page0 + at) * M + n) * 2 + 1] = p.unit[i];
                    }
                }
        }
        __syncwarp();
    }
}
