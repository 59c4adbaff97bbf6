// Scores of keys that were coded before RoPE: a warp decodes a page's keys as it reads them.
//
// A warp takes two tiles of 16 tokens, four times. Digits become float16 numbers about zero, times the
// token's gain; they are the rows of products with the head's inverse matrix in shared memory: wgmma
// takes 16 rows from each of four warps, each of them at a page of its own of the same head, so all
// warps walk as many pages. What comes out is turned by the token's place in the page and is at once,
// register for register, an operand of the product with the queries, which are turned back to the
// page's first position; a query has two columns of B, so that a thread holds the scores of one.
//
//   keys     A = digits [16 tokens x 16 columns],    B = matrix  [16 columns x D_K]
//   scores   A = keys   [16 tokens x 8 pairs],       B = queries [8 pairs x 8]
//
// Channels are ordered so that a pair is D_K / 2 apart; tables are those of before_rope.py. The first
// block of a matrix adds what digits do not: its columns are the gain's and the mean's. TOKEN is the
// most blocks that a head has. Where two sections hold digits of the same coordinates (codes of 3, 5
// and 6 bits), both are parts of one block.

#define GROUPS_OF_8 (D_K / 16)  // of pairs
#define TURNS_BYTES (D_K * 256 + D_K * 2)
#define BRINGERS 4                     // warps that bring pages to the others
#define BRINGER_BYTES (128 + D_K * 4)  // of shared memory of each
#define UNITS_AT 112                   // of a page's queries, in a warp's part
#define PLAIN (D_K + 8)                // rows of queries lie in different banks
#define HEAD_BYTES (TOKEN * 128 + TOKEN * D_K * 32)

struct Part {  // of a block of columns, 64 bytes
    u32 at, width, have, blocks;  // first byte, bits of a digit (0: no part), columns; blocks of the head
    u32 mask[4], factor[4], addend[4];  // by quarter of the page
};

__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}
__device__ __forceinline__ u32 minus2(u32 a) {
    u32 y;
    asm("neg.f16x2 %0, %1;" : "=r"(y) : "r"(a));
    return y;
}
__device__ __forceinline__ void products_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

#define R4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define R16(i) R4(i), R4(i + 4), R4(i + 8), R4(i + 12)
#define L16 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#if D_K == 64
#define D_LIST L16 "}, {%16,%17,%18,%19}, %20, p"
#define D_REGISTERS R16(0)
#define D_SHAPE "m64n64k16"
#define D_ADDS "%21"
#elif D_K == 80
#define D_LIST L16 ",%16,%17,%18,%19}, {%20,%21,%22,%23}, %24, p"
#define D_REGISTERS R16(0), R4(16)
#define D_SHAPE "m64n80k16"
#define D_ADDS "%25"
#elif D_K == 96
#define D_LIST L16 ",%16,%17,%18,%19,%20,%21,%22,%23}, {%24,%25,%26,%27}, %28, p"
#define D_REGISTERS R16(0), R4(16), R4(20)
#define D_SHAPE "m64n96k16"
#define D_ADDS "%29"
#else
#define D_LIST L16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p"
#define D_REGISTERS R16(0), R16(16)
#define D_SHAPE "m64n128k16"
#define D_ADDS "%37"
#endif

// keys += digits x block; the first of a head's blocks begins at zero
__device__ __forceinline__ void add_block(u32* d, const u32* a, u64 block, int adds) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " D_ADDS ", 0;\n"
                 "wgmma.mma_async.sync.aligned." D_SHAPE ".f16.f16.f16 " D_LIST ", 1, 1, 0; }"
                 : D_REGISTERS
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(block), "r"(adds));
}

// what wgmma is told of a block: its address, and bytes between neighbours of 8 columns and 8 channels
__device__ __forceinline__ u64 block_at(u32 address) {
    return (u64)(address >> 4) | (u64)(128 >> 4) << 16 | (u64)(256 >> 4) << 32;
}

#define QUARTERS 2  // that a warp takes at once, of one half of the lanes

// digits of a part, of a half's quarters `from` and on, as operands times the tokens' gains; SECOND: added
template <bool SECOND>
__device__ __forceinline__ void digits(u32 (*a)[4], const u32 (*gain)[2], const Part* part, const u8* columns,
                                       int half, int from, const Lane& l) {
    const uint4 about = *(const uint4*)part;
    const int width = about.y, rows = 8 * width - 1;
    const u8* words = columns + about.x;
    const uint2 y = row_of(words, (16 * half + l.first) & rows, about.z, l.c);
    const uint2 z = row_of(words, (16 * half + l.second) & rows, about.z, l.c);
    const int shift = width == 4 ? 4 * from : 8 * half + (width == 1 ? 4 * (l.first >> 3) : 0);
    const u32 x[4] = {y.x >> shift, z.x >> shift, y.y >> shift, z.y >> shift};
#pragma unroll
    for (int f = 0; f < QUARTERS; ++f) {
        const u32 mask = part->mask[from + f], factor = part->factor[from + f], addend = part->addend[from + f];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 made = (x[i] & mask) | 0x64006400u;  // 1024 + digit
            made = fma2(made, factor, addend);
            a[f][i] = SECOND ? fma2(made, gain[f][i & 1], a[f][i]) : times2(made, gain[f][i & 1]);
        }
    }
}

struct Decoder {
    const Part* parts;   // [blocks][2]
    u32 matrix;          // address of [blocks][D_K / 8][2][8 channels][8 columns] float16
    const uint4* turns;  // [half][quarter][pairs / 8][lane] cosines and sines of rows g and g + 8
};

// scores of two tiles, of a half's quarters `from` and on, for one query: s[quarter][row g, row g + 8]
__device__ __forceinline__ void decoded(float (*s)[2], const Decoder& by, const u8* columns, const uint2* query,
                                        const float* gains, int half, int from, int lane, const Lane& l) {
    u32 d[QUARTERS][D_K / 4], gain[QUARTERS][2];
    const int blocks = by.parts->blocks;
    auto add = [&](const u32 (*a)[4], int e) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int f = 0; f < QUARTERS; ++f) add_block(d[f], a[f], block_at(by.matrix + e * (D_K * 32)), e);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    };
    auto add_digits = [&](int e) {
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");  // the registers are free
        u32 a[QUARTERS][4];
        const Part* part = by.parts + 2 * e;
        digits<false>(a, gain, part, columns, half, from, l);
        if (part[1].width) digits<true>(a, gain, part + 1, columns, half, from, l);
        add(a, e);
    };
    u32 a[QUARTERS][4] = {};
#pragma unroll
    for (int f = 0; f < QUARTERS; ++f)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float x = gains[32 * (from + f) + 16 * half + (i ? l.second : l.first)];
            gain[f][i] = half2_of(x, x);
            a[f][i] = l.c == 0 ? half2_of(x, 1.0f) : 0;
        }
    add(a, 0);
#pragma unroll 1
    for (int e = 1; e < blocks; e += 2) {  // registers of one are read while the other's are made
        add_digits(e);
        if (e + 1 < blocks) add_digits(e + 1);
    }
    products_wait();
    const uint4* turns = by.turns + (half * 4 + from) * (GROUPS_OF_8 * 32) + lane;
    float sums[QUARTERS][2][4] = {};  // two chains each, as a product waits for the one before
#pragma unroll
    for (int j = 0; j < GROUPS_OF_8; ++j) {
        const uint2 q = query[j * 16 + (l.g >> 1) * 4 + l.c];
#pragma unroll
        for (int f = 0; f < QUARTERS; ++f) {
            const uint4 turn = turns[(f * GROUPS_OF_8 + j) * 32];
            u32 a[4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const u32 cosine = i ? turn.z : turn.x, sine = i ? turn.w : turn.y;
                const u32 x = d[f][2 * j + i], y = d[f][2 * (j + GROUPS_OF_8) + i];
                a[i] = fma2(x, cosine, minus2(times2(y, sine)));
                a[2 + i] = fma2(y, cosine, times2(x, sine));
            }
            product(sums[f][j & 1], a, q.x, q.y);
        }
    }
#pragma unroll
    for (int f = 0; f < QUARTERS; ++f)
#pragma unroll
        for (int i = 0; i < 2; ++i) s[f][i] = sums[f][0][2 * i] + sums[f][1][2 * i];
}

// queries turned back to a page's first position as `decoded` takes them: each in two columns of B
__device__ __forceinline__ void turn_queries(uint2* query, const float* plain, const float* frequency,
                                             float position, float2* angles, int lane) {
    for (int p = lane; p < D_K / 2; p += 32) angles[p] = turn_of(position * frequency[p]);
    __syncwarp();
    const int c = lane & 3;
    const float* mine = plain + min(lane >> 2 & 3, M - 1) * PLAIN;
#pragma unroll 2
    for (int j = lane >> 4; j < GROUPS_OF_8; j += 2) {
        const int p = 8 * j + 2 * c;
        const float4 by = *(const float4*)(angles + p);
        const float2 x = *(const float2*)(mine + p), y = *(const float2*)(mine + D_K / 2 + p);
        query[j * 16 + (lane & 15)] = make_uint2(half2_of(x.x * by.x + y.x * by.y, x.y * by.z + y.y * by.w),
                                                 half2_of(y.x * by.x - x.x * by.y, y.y * by.z - x.y * by.w));
    }
    __syncwarp();
}

// a query of a head in float32, channels in the order of pairs, of norm 256; returns what that stands for
__device__ __forceinline__ float load_query(float* plain, const State* q, const int* channels, const Walk* walk,
                                            int n, int query_heads, int queries, int group, float scale,
                                            float unscale, int lane) {
    const int which = walk->tile * M + n;
    const State* at = query_at(q, *walk, n, query_heads, queries, group);
    float x[(D_K + 31) / 32], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < (D_K + 31) / 32; ++i) {
        const int d = lane + 32 * i;
        x[i] = which < group * queries && d < D_K ? wide(at[channels[d]]) * scale : 0.0f;
        sum += x[i] * x[i];
    }
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    const float norm = fmaxf(sqrtf(sum), 1e-30f);
#pragma unroll
    for (int i = 0; i < (D_K + 31) / 32; ++i)
        if (lane + 32 * i < D_K) plain[n * PLAIN + lane + 32 * i] = x[i] * (256.0f / norm);
    return norm * (1.0f / 256.0f) * unscale;
}
