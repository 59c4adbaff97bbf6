#include "common.cuh"

// Decode attention on packed pages for sm_90: a warp walks whole pages on its own.
//
// A program takes a run of pages, which may go on from one head or row to the next (`Cut`), for up to
// 4 queries of the head's group; the warps take turns. Items of 16 exact tokens, a warp each, come while
// the first pages are on their way, or before where keys are decoded. Bulk copies bring what a warp reads
// of a page into its part of shared memory: keys, and values behind them; the next page's take the places
// of what has been used, so that half a page's work lies between a copy and its use. The loop over pages
// reads addresses of 32 pages at once and nothing else from global memory, which would wait behind the
// copies, and so must not spill, or next to nothing where registers go to makers. Registers of packed words
// are the operands of products after one `and` a field: field f of a 16-bit lane is the subnormal float16
// number digit * 2^(position - 24). Products are float16 x float16 with float32 sums.
//
//   scores   A = keys   [16 tokens x 32 columns],  B = queries [32 columns x 8]
//   values   A = values [16 columns x 32 tokens],  B = weights [32 tokens x 8]
//
// Digits are bytes of an operand after one `and` (keys: a byte permutation before it). Queries and
// weights are 16-bit fixed-point numbers whose two bytes are neighbouring columns of B: four queries
// fill its eight, the sums are exact in int32, and a thread holds the scores of one query. Codes with
// tables, and keys whose steps change within a page, are products of float16 instead, queries twice.
//
// The order of columns within a product is free, that of tokens too: a thread (g = lane / 4,
// c = lane % 4) takes columns 4c..4c+3, so that eight bytes of a row are two registers, and tokens of
// row g are `4 (g / 2) + g % 2 + 2 (g / 2 % 2)`, of row g + 8 that ^ 2, so that rows lie in different
// banks and the weights, transposed by movmatrix, are those of tokens 4c..4c+3.
//
// What pages have of their own, queries of columns and scores of the mean, comes from the launch before, or
// from four warps of the program where there would be room for few others otherwise (MADE: makers.cuh).
//
// Constants come as macros, see __init__.py: WARPS, PROGRAMS, EXACT (exact tokens of an item), HEADS, M,
// MADE, ONCE (no other program reads its pages), SENT (queries of columns hold for all pages, and come from the
// launch before), Q_BYTES (of columns' queries), D_K, D_V, K4.. (slots of 16 columns of a section), K_WHOLE
// (sections are multiples of 16), FULL (all heads have all columns of all slots), K_GAIN.. (bytes), V_GROUPS,
// SEGMENTS, K_LEVELS.., ZERO_AT (first byte of keys' zero points), TOKEN (keys were coded before RoPE:
// before_rope.cuh), and flags.

#define VC (V4 + V2 + V1)
#define STATE (2 + 2 * V_GROUPS)
#define WHOLE_KEYS (!TOKEN && !K_LEVELS && SEGMENTS == 1)  // products of bytes, else of float16
#define WHOLE_VALUES (!V_LEVELS)
#define OWN (!PAGED && !SENT && !TOKEN)  // queries of columns hold for all pages, and are made here
#define OWN_AT_ONCE (D_K > 128 || WARPS * PROGRAMS > 8 ? 1 : 2)
// before a page's columns' queries: where they are made here, what each maker adds to the sums of each
// query, gain terms and units
#define PAGE_TERMS (MADE ? 96 : TERMS_BYTES)
// barriers in a warp's part, of the two places for what is made for its pages: it has come, has been used
#define MADE_AT 16
#define FREE_AT 112

#include "columns.cuh"

// --- instructions --------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ u32 times2(u32 a, u32 b) {
    u32 y;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
// int32 += unsigned bytes x signed (queries) or unsigned (weights) bytes
__device__ __forceinline__ void product_q(int* d, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void product_p(int* d, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void expect_more(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// of a page, which nobody reads again where ONCE: what the launch before wrote stays in the L2 cache
__device__ __forceinline__ void copy_page(u32 to, u64 from, u32 bytes, u32 barrier) {
    if (!ONCE) return copy(to, from, bytes, barrier);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(0x12F0000000000000ull) : "memory");  // evict first
}
__device__ __forceinline__ uint2 pair(const u8* p) { return *(const uint2*)p; }

// --- digits --------------------------------------------------------------------------------------

// position in the mantissa of each field, by width
__device__ constexpr int position(int width, int f) {
    return width == 4 ? 4 * (f & 1) : width == 2 ? 2 * f : f;
}
__device__ __forceinline__ float power(int n) { return __int_as_float((127 + n) << 23); }

// values of a table of 16 float16 numbers: bytes are looked up, upper and lower bytes apart
struct Table {
    u32 low[4], high[4];
};
#if K_LEVELS
__device__ constexpr Table K_TABLE = {{K_TABLE_LOW}, {K_TABLE_HIGH}};
#else
__device__ constexpr Table K_TABLE = {};
#endif
#if V_LEVELS
__device__ constexpr Table V_TABLE = {{V_TABLE_LOW}, {V_TABLE_HIGH}};
#else
__device__ constexpr Table V_TABLE = {};
#endif

// The four quarters of two columns' words, where a column has four digits in 16 bits
__device__ __forceinline__ void look_up(u32* out, u32 x, const Table& t) {
    u32 low[2], high[2];
    u32 without = x & 0x77777777u;
#pragma unroll
    for (int column = 0; column < 2; ++column) {
        u32 sign = (column ? x >> 16 : x) & 0x8888u;
        u32 which = column ? without >> 16 : without;
        // nibble 9 spreads the sign of byte 1, nibble 0 is byte 0: ones where the top bit is set
        u32 mask = bytes_of(0x00008000u, 0u, sign | sign >> 3);
        u32 a = bytes_of(t.low[0], t.low[1], which), b = bytes_of(t.low[2], t.low[3], which);
        low[column] = (mask & b) | (~mask & a);
        a = bytes_of(t.high[0], t.high[1], which), b = bytes_of(t.high[2], t.high[3], which);
        high[column] = (mask & b) | (~mask & a);
    }
    u32 a = bytes_of(low[0], high[0], 0x5140), b = bytes_of(low[0], high[0], 0x7362);
    u32 c = bytes_of(low[1], high[1], 0x5140), d = bytes_of(low[1], high[1], 0x7362);
    out[0] = bytes_of(a, c, 0x5410), out[1] = bytes_of(a, c, 0x7632);
    out[2] = bytes_of(b, d, 0x5410), out[3] = bytes_of(b, d, 0x7632);
}

// operands of the four quarters from the four registers of words, shifted to the tokens' part:
// float16 values of a table, or the subnormal numbers digit * 2^(position - 24)
template <int WIDTH, bool LEVELS>
__device__ __forceinline__ void quarters(u32 (*a)[4], const u32* x, const Table& t) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        if (LEVELS) {
            u32 word = x[r];
            if (WIDTH < 4) {  // spread digits to nibbles: tables have 16 entries
                word &= WIDTH == 2 ? 0x00ff00ffu : 0x000f000fu;
                if (WIDTH == 2) {
                    word = (word | word << 4) & 0x0f0f0f0fu;
                    word = (word | word << 2) & 0x33333333u;
                } else {
                    word = (word | word << 6) & 0x03030303u;
                    word = (word | word << 3) & 0x11111111u;
                }
            }
            u32 out[4];
            look_up(out, word, t);
#pragma unroll
            for (int f = 0; f < 4; ++f) a[f][r] = out[f];
        } else {
            u32 upper = WIDTH == 4 ? x[r] >> 8 : x[r];
#pragma unroll
            for (int f = 0; f < 4; ++f)
                a[f][r] = (f < 2 ? x[r] : upper) &
                          (u32)(((1 << WIDTH) - 1) << position(WIDTH, f)) * 0x10001u;
        }
    }
}

// --- one section of a page -----------------------------------------------------------------------

struct Lane {
    int g, c, first, second;  // tokens of rows g and g + 8 within 16
};

// eight bytes of a row of a chunk of keys: columns 4c..4c+3; what lies behind the last is not used
__device__ __forceinline__ uint2 row_of(const u8* words, int row, int have, int c) {
    if (K_WHOLE || have == 16) return pair(words + row * 32 + c * 8);
    const u32* x = (const u32*)(words + (row * have + 4 * c) * 2);
    return make_uint2(x[0], x[1]);
}

// scores of 128 tokens for one query: s[half of the lanes][quarter][row g, row g + 8]
template <int WIDTH>
__device__ __forceinline__ void add_scores(float (*s)[4][2], const u8* words, int count,
                                           const u8* queries, const Lane& l) {
    const int ROWS = 8 * WIDTH, SETS = WIDTH == 4 ? 2 : 1;  // 16-bit words of a column
    queries += (l.g >> 1) * 32 + l.c * 8 + (l.g & 1) * 4;
    int sums[2][4][4] = {};
    const int shift = WIDTH == 1 ? 4 * (l.first >> 3) : 0;
#pragma unroll (FULL ? 2 : 1)
    for (int j = 0; j < count; j += 32) {
        u32 b[2], low[SETS][4], high[SETS][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            bool there = h == 0 || count > j + 16;
            int have = K_WHOLE || !there ? 16 : min(count - j - 16 * h, 16);
            b[h] = there ? *(const u32*)(queries + h * 128) : 0;
#pragma unroll
            for (int r = 0; r < SETS; ++r) {
                uint2 x = row_of(words, (16 * r + l.first) % ROWS, have, l.c);
                uint2 y = row_of(words, (16 * r + l.second) % ROWS, have, l.c);
                low[r][2 * h] = bytes_of(x.x, x.y, 0x6420), high[r][2 * h] = bytes_of(x.x, x.y, 0x7531);
                low[r][2 * h + 1] = bytes_of(y.x, y.y, 0x6420);
                high[r][2 * h + 1] = bytes_of(y.x, y.y, 0x7531);
            }
            words += ROWS * 32;
        }
        queries += 256;
        if (WIDTH == 1) {
#pragma unroll
            for (int i = 0; i < 4; ++i) low[0][i] >>= shift, high[0][i] >>= shift;
        }
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int f = 0; f < 4; ++f) {
                const u32* x = WIDTH == 4 ? (f < 2 ? low[WIDTH == 4 ? r : 0] : high[WIDTH == 4 ? r : 0])
                                          : (r == 0 ? low[0] : high[0]);
                const u32 mask = (u32)(((1 << WIDTH) - 1) << position(WIDTH, f)) * 0x01010101u;
                u32 a[4] = {x[0] & mask, x[1] & mask, x[2] & mask, x[3] & mask};
                product_q(sums[r][f], a, b[0], b[1]);
            }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int f = 0; f < 4; ++f)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                s[r][f][i] += (float)(sums[r][f][2 * i] * 256 + sums[r][f][2 * i + 1]) *
                              power(-position(WIDTH, f));
}

// the same by products of float16; zeros: row k of a product is the zero points of segment k
template <int WIDTH>
__device__ __forceinline__ void add_scores_half(float (*s)[4][2], float* zeros, const u8* words,
                                                int count, const u8* queries, const u8* steps,
                                                const Lane& l) {
    const int ROWS = 8 * WIDTH, SETS = WIDTH == 4 ? 2 : 1;
    const int query = min(l.g >> 1, M - 1);
    float sums[2][4][4] = {};
    queries += query * 32 + l.c * 8;
#pragma unroll 1
    for (int j = 0; j * 16 < count; ++j) {
        int have = K_WHOLE ? 16 : min(count - 16 * j, 16);
        uint2 q = pair(queries + j * (M * 32));
        u32 x[SETS][4];
#pragma unroll
        for (int r = 0; r < SETS; ++r) {
            uint2 y = row_of(words, (16 * r + l.first) % ROWS, have, l.c);
            uint2 z = row_of(words, (16 * r + l.second) % ROWS, have, l.c);
            x[r][0] = y.x, x[r][2] = y.y, x[r][1] = z.x, x[r][3] = z.y;
        }
        words += ROWS * 32;
        u32 b0[SEGMENTS], b1[SEGMENTS];
#pragma unroll
        for (int k = 0; k < SEGMENTS; ++k) {
            b0[k] = q.x, b1[k] = q.y;
            if (SEGMENTS > 1) {
                uint2 step = pair(steps + (k * D_K + 16 * j + 4 * l.c) * 2);
                b0[k] = times2(q.x, step.x), b1[k] = times2(q.y, step.y);
            }
        }
        if (SEGMENTS > 1) {
            uint2 zero = pair(steps + ((SEGMENTS + l.g % SEGMENTS) * D_K + 16 * j + 4 * l.c) * 2);
            u32 a[4] = {zero.x, 0, zero.y, 0};
            product(zeros, a, q.x, q.y);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            u32 y[4], a[4][4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                y[i] = WIDTH == 4   ? x[WIDTH == 4 ? r : 0][i]
                       : WIDTH == 2 ? x[0][i] >> (8 * r)
                                    : x[0][i] >> (4 * (2 * r + (l.first >> 3)));
            quarters<WIDTH, K_LEVELS>(a, y, K_TABLE);
#pragma unroll
            for (int f = 0; f < 4; ++f)
                product(sums[r][f], a[f], b0[f * SEGMENTS / 4], b1[f * SEGMENTS / 4]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int f = 0; f < 4; ++f)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                s[r][f][i] += sums[r][f][2 * i] * (K_LEVELS ? 1.0f : power(24 - position(WIDTH, f)));
}

__device__ __forceinline__ void add_sum(float* at, float alpha, float fresh) {
    *at = *at * alpha + fresh;
}

// Sums over the tokens of a page for columns: weights by the token pairs that share a byte mask.
// Width 4: h[0 or 1][half of the lanes], quarters f and f + 2; else h[quarter][0], both halves. A chunk is
// multiplied before the one in front of it is added, and the one behind it is read in between; what lies
// behind the last is not used.
template <int WIDTH>
__device__ __forceinline__ void add_values(float* sums, const u8* words, int count,
                                           const u32 (*h)[2], float unit, float alpha, const Lane& l) {
    const int ROWS = 8 * WIDTH, SETS = WIDTH == 4 ? 2 : 1;
    if (count <= 0) return;
    words += l.g * (ROWS * 2) + (WIDTH == 1 ? (l.c & 1) * 8 : l.c * 8);
    sums += l.g * 4 + l.c;
    const int part = WIDTH == 1 ? 4 * (l.c >> 1) : 0;
    const float below = unit * power(-WIDTH);
    u32 x[SETS][4];
    auto read = [&] {
#pragma unroll
        for (int r = 0; r < SETS; ++r) {
            uint2 low = pair(words + 32 * r), high = pair(words + 8 * (ROWS * 2) + 32 * r);
            x[r][0] = low.x >> part, x[r][2] = low.y >> part, x[r][1] = high.x >> part, x[r][3] = high.y >> part;
        }
        words += 16 * ROWS * 2;
    };
    // quarters in the lower and in the upper place of a pair: their sums are 2^WIDTH apart
    auto multiply = [&](int (*fresh)[4]) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {  // quarters, or width 4: fields of halves
            const int r = WIDTH == 4 ? k & 1 : 0, f = WIDTH == 4 ? k >> 1 : k;
            const u32 mask = ((1 << WIDTH) - 1) * 0x01010101u << (WIDTH * (f & 1));
            u32 a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = x[r][i] >> (WIDTH * (f & 2)) & mask;
            product_p(fresh[f & 1], a, h[k][0], h[k][1]);
        }
    };
    auto add = [&](const int (*fresh)[4]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int high = (fresh[0][2 * i] << WIDTH) + fresh[1][2 * i];
            int low = (fresh[0][2 * i + 1] << WIDTH) + fresh[1][2 * i + 1];
            add_sum(sums + 32 * i, alpha, (float)(high * 256 + low) * below);
        }
        sums += 64;
    };
    int before[2][4] = {};
    read(), multiply(before), read();
#pragma unroll (FULL ? 4 : 2)
    for (int j = 16; j < count; j += 16) {
        int fresh[2][4] = {};
        multiply(fresh), read(), add(before);
#pragma unroll
        for (int i = 0; i < 4; ++i) before[0][i] = fresh[0][i], before[1][i] = fresh[1][i];
    }
    add(before);
}

// the same by products of float16; weights h[half of the lanes][quarter][2]
template <int WIDTH>
__device__ __forceinline__ void add_values_half(float* sums, const u8* words, int count,
                                                const u32 (*h)[4][2], float alpha, const Lane& l) {
    const int ROWS = 8 * WIDTH;
    words += l.g * (ROWS * 2) + (WIDTH == 1 ? (l.c & 1) * 8 : l.c * 8);
    sums += l.g * 4 + l.c;
#pragma unroll 1
    for (int j = 0; j < count; j += 16) {
        float fresh[2][4] = {};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            u32 y[4], a[4][4];
            uint2 low = pair(words + (WIDTH == 4 ? 32 * r : 0));
            uint2 high = pair(words + 8 * (ROWS * 2) + (WIDTH == 4 ? 32 * r : 0));
            y[0] = low.x, y[2] = low.y, y[1] = high.x, y[3] = high.y;
            if (WIDTH < 4) {
                int shift = WIDTH == 2 ? 8 * r : 4 * (2 * r + (l.c >> 1));
#pragma unroll
                for (int i = 0; i < 4; ++i) y[i] >>= shift;
            }
            quarters<WIDTH, V_LEVELS>(a, y, V_TABLE);
#pragma unroll
            for (int f = 0; f < 4; ++f) product(fresh[r], a[f], h[r][f][0], h[r][f][1]);
        }
        add_sum(sums, alpha, fresh[0][0] + fresh[1][0]);
        add_sum(sums + 32, alpha, fresh[0][2] + fresh[1][2]);
        words += 16 * ROWS * 2, sums += 64;
    }
}

// numbers of a thread's tokens: out[half of the lanes][quarter][row g, row g + 8]
template <int BYTES, int GROUPS>
__device__ __forceinline__ void numbers(float (*out)[4][2], const u8* field, int group, float* room,
                                        const Lane& l) {
    if (BYTES == 1) {  // a lane makes four of them, for all
        u32 four = ((const u32*)field)[l.g * 4 + l.c];
        float made[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // 2^23 + byte is made of bits, not converted
            u32 bits = bytes_of(four, 0x4B000000u, 0x7540u | i);
            float y = exp2_(__uint_as_float(bits) * 0.0625f - (524288.0f + 8.0f));
            made[i] = bits == 0x4B000000u ? 0.0f : y;
        }
        ((float4*)room)[l.g * 4 + l.c] = make_float4(made[0], made[1], made[2], made[3]);
        __syncwarp();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int f = 0; f < 4; ++f) {
            if (BYTES == 1) {
                out[r][f][0] = room[32 * f + 16 * r + l.first], out[r][f][1] = room[32 * f + 16 * r + l.second];
                continue;
            }
            const u8* at = field + (32 * f + 16 * r) * (BYTES * GROUPS) + group * BYTES;
            out[r][f][0] = float_of_half(*(const u16*)(at + l.first * (2 * GROUPS)));
            out[r][f][1] = float_of_half(*(const u16*)(at + l.second * (2 * GROUPS)));
        }
}

__device__ __forceinline__ float soft_cap(float s, float cap) {
    return cap - 2.0f * cap / (1.0f + exp2_(s * (2.0f * LOG2E / cap)));
}

#include "exact.cuh"

// --- pages ---------------------------------------------------------------------------------------

// where a warp is; it lies in shared memory, as registers are few
struct Walk : Place {
    u32 begin, end;
    int k4, k2, k1, v4, v2, v1;  // columns of the head
    u32 key_bytes, value_bytes;  // that copies bring
    u32 done, places;            // pages of the warp that it has been through, and places
    u32 rounds;                  // in which each warp has a page, or none at the end
};

// whether the program has no page of the next place
__device__ __forceinline__ bool is_last(const Walk* walk, const Costs& costs) {
    const int next = walk->head + 1;
    const u32 first = walk->line_begin + costs.begin(next, walk->pages) + costs.start;
    return walk->end < first + costs.page(next < HEADS ? next : 0);
}
// on to the next place, of which there is one
__device__ __forceinline__ void go_on(Walk* walk, const int* folded, int tiles, const Costs& costs, int lane) {
    if (lane == 0) {
        Walk w = *walk;
        if (++w.head == HEADS) {
            w.head = 0, w.line_begin += w.line_cost;
            if (++w.tile == tiles) {
                w.tile = 0;
                do w.pages = folded[++w.row];
                while (!w.pages);
                w.line_cost = costs.line(w.pages);
            }
        }
        *walk = w;
    }
    __syncwarp();
}

// places in a warp's part of shared memory
#define EXTRA_AT 128  // copies to whole lines are much faster
#define K_EXTRA (K_GAIN ? BLOCK * K_GAIN : SEGMENTS > 1 ? 2 * SEGMENTS * D_K * 2 : 0)
#define QUERY_AT (EXTRA_AT + K_EXTRA)
#define MEANS_AT (QUERY_AT + (TOKEN ? D_K * 8 : PAGED ? Q_BYTES : 0))
#define MEANS_END (MEANS_AT + (MEAN ? BLOCK * MEAN_N * 2 : 0))
#define MADE_PAGE (MEANS_END - QUERY_AT)  // bytes that are made for a page
#define V_EXTRA (BLOCK * V_GAIN * V_GROUPS)
#define COLUMNS_AT ((MEANS_END + (MADE ? MADE_PAGE : 0) + 127) / 128 * 128)

#if TOKEN
#include "before_rope.cuh"
#define THREADS (32 * (WARPS + BRINGERS))
#elif MADE
#define MAKERS 4
#define THREADS (32 * (WARPS + MAKERS))
#include "makers.cuh"
#else
#define THREADS (32 * WARPS)
#endif

// what each lane copies of a page: keys' parts lanes 0 to 6, values' 8 to 12
struct Copies {
    u32 from, to, key_bytes, value_bytes;
    u64 other;   // where the part is not in the page: its first byte, and bytes a page
    u32 stride;
    int values_at;
    bool apart;  // values lie behind keys, or over them where a head has more than most
};

__device__ __forceinline__ Copies copies_of(Walk* walk, const int* heads, int sums_at, const u8* q,
                                            const u8* means, u64 first_page, int lane) {
    const int head = walk->head;
    const int* about = heads + head * 16;
    const int k4 = about[6], k2 = about[7], k1 = about[8], v4 = about[9], v2 = about[10], v1 = about[11];
    u32 weights_at = v4 * 64 + v2 * 32 + v1 * 16, bytes = 0;
    const int behind = COLUMNS_AT + (k4 * 64 + k2 * 32 + k1 * 16 + 127) / 128 * 128;
    const int last = (sums_at - (int)weights_at - V_EXTRA - (V_OFFSET ? BLOCK * 2 * V_GROUPS : 0)) / 128 * 128;
    Copies c{};
    c.apart = behind <= last;
    c.values_at = c.apart ? behind : last;
    if (lane == 0) c.from = about[0] * 2, c.to = COLUMNS_AT, bytes = k4 * 64;
    if (lane == 1) c.from = about[1] * 2, c.to = COLUMNS_AT + k4 * 64, bytes = k2 * 32;
    if (lane == 2) c.from = about[2] * 2, c.to = COLUMNS_AT + k4 * 64 + k2 * 32, bytes = k1 * 16;
    const int ZEROS = SEGMENTS > 1 ? K_EXTRA / 2 : 0;  // bytes of a page's zero points
    if (lane == 3) c.from = K_GAIN ? about[12] : about[15], c.to = EXTRA_AT, bytes = K_EXTRA - ZEROS;
    if (lane == 6) c.from = ZERO_AT + head * ZEROS, c.to = EXTRA_AT + ZEROS, bytes = ZEROS;
    if (PAGED && !MADE && lane == 4) {
        c.other = (u64)q + first_page * Q_BYTES, c.stride = Q_BYTES;
        c.to = QUERY_AT, bytes = TERMS_BYTES + (chunks(k4) + chunks(k2) + chunks(k1)) * Q_CHUNK;
    }
    if (MEAN && !MADE && lane == 5) {
        c.stride = BLOCK * MEAN_N * 2, c.other = (u64)means + first_page * c.stride;
        c.to = MEANS_AT, bytes = c.stride;
    }
    if (lane == 8) c.from = about[3] * 2, c.to = c.values_at, bytes = v4 * 64;
    if (lane == 9) c.from = about[4] * 2, c.to = c.values_at + v4 * 64, bytes = v2 * 32;
    if (lane == 10) c.from = about[5] * 2, c.to = c.values_at + v4 * 64 + v2 * 32, bytes = v1 * 16;
    if (lane == 11) c.from = about[13], c.to = c.values_at + weights_at, bytes = V_EXTRA;
    if (V_OFFSET && lane == 12)
        c.from = about[14], c.to = c.values_at + weights_at + V_EXTRA, bytes = BLOCK * 2 * V_GROUPS;
    c.key_bytes = lane < 8 ? bytes : 0, c.value_bytes = lane < 8 ? 0 : bytes;
    const u32 all_keys = __reduce_add_sync(0xffffffffu, c.key_bytes);
    const u32 all_values = __reduce_add_sync(0xffffffffu, c.value_bytes);
    if (lane == 0) {
        walk->k4 = k4, walk->k2 = k2, walk->k1 = k1, walk->v4 = v4, walk->v2 = v2, walk->v1 = v1;
        walk->key_bytes = all_keys, walk->value_bytes = all_values;
    }
    __syncwarp();
    return c;
}

#if TOKEN
// Brings the pages of WARPS / BRINGERS warps, and the queries for them. Barriers lie in those warps'
// parts: of keys and of values that have come, and of those that have been used.
struct Bringer {
    const int *heads, *folded, *table, *block, *first_position, *channels;
    const u64* slabs;
    const State* q;
    int capacity, slab_pages, page_bytes, sinks, tiles, query_heads, queries, group, sums_at, warp_bytes, which;
    Costs costs;
    float scale, unscale;
    u8* warps;         // their parts
    float* plain;      // [M][PLAIN]
    float2* angles;    // [D_K / 2] of this warp
    const float* frequency;
};

__device__ __forceinline__ void bring(Walk* walk, const Bringer& b, int lane) {
    const int EACH = WARPS / BRINGERS;
    u32 brought[EACH] = {};
    float* units = b.plain + M * PLAIN;
    while (true) {
        int low, high;
        pages_of(*walk, walk->begin, walk->end, b.costs, &low, &high);
        const Copies c = copies_of(walk, b.heads, b.sums_at, nullptr, nullptr, 0, lane);
        asm volatile("bar.sync 2, %0;" ::"n"(32 * BRINGERS) : "memory");  // nobody reads the queries before
        for (int n = b.which; n < M; n += BRINGERS) {
            float unit = load_query(b.plain, b.q, b.channels, walk, n, b.query_heads, b.queries, b.group, b.scale,
                                    b.unscale, lane);
            if (lane == 0) units[n] = unit;
        }
        asm volatile("bar.sync 2, %0;" ::"n"(32 * BRINGERS) : "memory");
        const u64 row_at = (u64)walk->row * b.capacity;
        const int start = b.first_position[walk->row] + b.sinks;
        u64 held = 0;  // pages low + 32 k and on, one a lane
        int held_block = 0;
        for (int base = low; base < high; base += WARPS) {
            if ((base - low) % 32 == 0) {
                const int page = min(base + lane, high - 1), number = b.table[row_at + page];
                held = b.slabs[number / b.slab_pages] + (u64)(number % b.slab_pages) * b.page_bytes;
                held_block = b.block[row_at + page];
            }
#pragma unroll
            for (int side = 0; side < 2; ++side)
#pragma unroll
                for (int i = 0; i < EACH; ++i) {
                    const int warp = b.which * EACH + i, page = base + warp;
                    if (page >= high) continue;
                    const u64 address = __shfl_sync(0xffffffffu, held, (page - low) & 31) + c.from;
                    u8* theirs = b.warps + warp * b.warp_bytes;
                    const u32 barrier = shared_address(theirs), to = barrier + c.to;
                    const u32 before = (brought[i] & 1) ^ 1;
                    if (side == 0) {
                        const int at = __shfl_sync(0xffffffffu, held_block, (page - low) & 31);
                        wait(barrier + 16, before);
                        if (!c.apart || base == low) wait(barrier + 24, before);  // where they are now
                        if (lane == 0) expect_more(barrier, walk->key_bytes);
                        __syncwarp();
                        if (c.key_bytes) copy_page(to, address, c.key_bytes, barrier);
                        turn_queries((uint2*)(theirs + QUERY_AT), b.plain, b.frequency, (float)(start + at * BLOCK),
                                     b.angles, lane);
                        if (lane < M) ((float*)(theirs + UNITS_AT))[lane] = units[lane];
                        __syncwarp();
                        if (lane == 0) arrive(barrier);
                    } else {
                        wait(barrier + 24, before);
                        if (!c.apart) wait(barrier + 16, before ^ 1);
                        if (lane == 0) expect(barrier + 8, walk->value_bytes);
                        __syncwarp();
                        if (c.value_bytes) copy_page(to, address, c.value_bytes, barrier + 8);
                        ++brought[i];
                    }
                }
        }
        const bool last = is_last(walk, b.costs);
        __syncwarp();  // all have read where it was
        if (last) return;
        go_on(walk, b.folded, b.tiles, b.costs, lane);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) attend(
    const int* heads, const int* costs_, const int* folded, const int* table, const u64* slabs, int capacity,
    int slab_pages, int page_bytes, const u8* q, const u8* means,
    const State* raw_q, const State* keys, const State* values, const int* tokens,
    const int* query_tokens, int exact_tokens, int rows, int query_heads, int queries, int group, int tiles,
    double scale_, double cap_, float* sums, float* states, float* exact, float* exact_state,
    int exact_splits,
#if TOKEN
    const u8* decoders, const u8* turns, const int* channels,
#else
    const uint4* operands, const u32* centers, const float2* about,
#endif
#if MADE
    const float* rope,
#endif
    const int* block, const int* first_position, int sinks, double unscale, int start_cost, int exact_cost,
    int inverse, int warp_bytes, int sums_at) {
    extern __shared__ __align__(128) u8 shared[];
    float scale = (float)scale_, cap = (float)cap_;
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    if (!capacity || TOKEN || OWN || MADE) wait_for_launch_before();  // no launch before has waited
    const int here = pages_at(folded, lane, rows);  // it is on its way
    const Costs costs{costs_, (u32)costs_[HEADS], (u32)start_cost};
    for (int i = lane; i < 2 * HEADS; i += 32) bring_near(heads + i * 8);
    for (int i = lane; i <= HEADS / 8; i += 32) bring_near(costs_ + i * 8);
    if (lane == 0) bring_near(slabs);
#if MADE
    for (int i = lane; TURN && i < 3 * ROPE_D / 8; i += 32) bring_near(rope + i * 8);
#endif

    // shared: queries of the columns, of all pages, and what warps add up of them; then each warp's part:
    // barriers, what else belongs to keys, columns of keys and then of values, sums (before them: queries and
    // weights of exact float32 tokens)
#if TOKEN  // of all warps: turns and the head's tables; queries, walks and angles of those that bring pages
    const int HEAD_AT = TURNS_BYTES, PLAIN_AT = HEAD_AT + HEAD_BYTES, BARRIER_AT = PLAIN_AT + (M * PLAIN + 4) * 4;
    const int BRINGERS_AT = BARRIER_AT + 16, WARPS_AT = (BRINGERS_AT + BRINGERS * BRINGER_BYTES + 127) / 128 * 128;
    const u32 head_barrier = shared_address(shared + BARRIER_AT);
    if (threadIdx.x == 0) init_barrier(head_barrier);
    const Decoder decoder{(const Part*)(shared + HEAD_AT), shared_address(shared + HEAD_AT + TOKEN * 128),
                          (const uint4*)shared};
#else
    const int OWN_END = PAGED ? 0 : (OWN_BYTES + 127) / 128 * 128;
#if MADE
    const int WARPS_AT = OWN_END + (MAKER_BYTES + 127) / 128 * 128;
#else
    const int WARPS_AT = OWN_END;
#endif
#endif
#if SENT
    const u32 q_barrier = shared_address(shared + OWN_END) - 16;
    if (threadIdx.x == 0) begin_barrier(q_barrier);
#endif

    const u32 ENDS = VC * 16 * 4 * 4;
#if TOKEN
    const bool brings = warp >= WARPS;
    u8* mine = brings ? shared + BRINGERS_AT + (warp - WARPS) * BRINGER_BYTES : shared + WARPS_AT + warp * warp_bytes;
    auto together = [] { asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory"); };
#elif MADE
    const bool makes = warp >= WARPS;
    u8* mine = makes ? shared + OWN_END + (warp - WARPS) * 128 : shared + WARPS_AT + warp * warp_bytes;
    auto together = [] { asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory"); };
#else
    u8* mine = shared + WARPS_AT + warp * warp_bytes;
    auto together = [] { __syncthreads(); };
#endif
    u32 key_barrier = shared_address(mine), value_barrier = key_barrier + 8;
    u8* columns_in = mine + COLUMNS_AT;
    float* sums_in = (float*)(mine + sums_at);
    float* ends = (float*)(mine + sums_at + ENDS);  // [STATE][4] of this warp
    float* room = ends + STATE * 4;                 // [BLOCK] for `numbers`
    if (lane == 0) {
        init_barrier(key_barrier), init_barrier(value_barrier);
        if (TOKEN) init_barrier(key_barrier + 16), init_barrier(value_barrier + 16);
#if MADE
        for (int i = 0; !makes && i < 16; i += 8)
            init_barrier(key_barrier + MADE_AT + i, MAKERS), init_barrier(key_barrier + FREE_AT + i);
#endif
        show_barriers();
    }
    __syncwarp();
    const Cut cut = cut_of(folded, here, rows, tiles, costs, rows * tiles * HEADS * exact_splits, exact_cost,
                           gridDim.x, inverse);
    u32 exact_from, exact_to;
    const u32 begin = begin_of(cut, blockIdx.x, &exact_from), end = begin_of(cut, blockIdx.x + 1, &exact_to);
    Lane l;
    l.g = lane >> 2, l.c = lane & 3;
    l.first = 4 * (l.g >> 1) + (l.g & 1) + 2 * ((l.g >> 1) & 1);
    l.second = l.first ^ 2;
    const int query = min(l.c, M - 1);

    const bool any = begin < cut.total;
    Walk* walk = (Walk*)(mine + 32);
    {
        const Place place = any ? place_of(begin, folded, here, costs, rows, tiles, lane) : Place{};
        if (lane == 0) *walk = {place, begin, end, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
        __syncwarp();
    }

#if TOKEN
    auto load_head = [&] {
        if (threadIdx.x) return;
        const u32 to = shared_address(shared);
        asm volatile("fence.proxy.async.shared::cta;");
        expect(head_barrier, HEAD_BYTES + (walk->places ? 0 : TURNS_BYTES));
        copy(to + HEAD_AT, (u64)decoders + (u64)walk->head * HEAD_BYTES, HEAD_BYTES, head_barrier);
        if (!walk->places) copy(to, (u64)turns, TURNS_BYTES, head_barrier);
    };
    if (any) load_head();
    __syncthreads();  // the barriers are there
    if (brings) {
        if (WARPS > 4) asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (any) {
            wait(head_barrier, 0);  // the frequencies are
            const Bringer bringer{
                heads, folded, table, block, first_position, channels, slabs, raw_q, capacity, slab_pages,
                page_bytes, sinks, tiles, query_heads, queries, group, sums_at, warp_bytes, warp - WARPS, costs,
                scale, (float)unscale, shared + WARPS_AT, (float*)(shared + PLAIN_AT), (float2*)(mine + 128),
                (const float*)(shared + D_K * 256)};
            bring(walk, bringer, lane);
        }
        return;
    }
    if (WARPS > 4) asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
#elif MADE
    __syncthreads();  // the barriers are there
    if (makes) {
        if (MANY) asm volatile("setmaxnreg.inc.sync.aligned.u32 248;");
        if (any) {
            const Maker maker{heads, folded, block, first_position, operands, centers, about, rope, raw_q,
                              capacity, sinks, tiles, query_heads, queries, group, warp_bytes, costs, scale,
                              (float)unscale, shared + WARPS_AT, shared + OWN_END};
            make_pages(walk, maker, warp - WARPS, lane);
        }
        return;
    }
    if (MANY) asm volatile("setmaxnreg.dec.sync.aligned.u32 128;");
#elif SENT
    __syncthreads();  // the barrier is there
#endif

    // exact tokens: by the last warps first, as the first ones have a page more; where keys are decoded
    // by half of the warps, so that the halves are at different parts of their pages
    const int BY = TOKEN && WARPS > 4 ? WARPS / 2 : WARPS;
    const u32 mine_from = WARPS - 1 - warp < BY ? exact_from + (WARPS - 1 - warp) : exact_to;
    const ExactTokens exact_of{raw_q, keys, values, tokens, query_tokens, exact, exact_state, exact_tokens,
                               exact_splits, tiles, query_heads, queries, group, scale, cap};
    Exact asked;
    asked.begin(exact_of, mine_from, exact_to, lane);
    if (TOKEN) {
        if (mine_from < exact_to) asked.ask(exact_of, mine_from, mine_from + BY, exact_to, lane);
        attend_exact(asked, exact_of, mine_from, exact_to, BY, sums_in, lane);
    }

    // where the warp is: its page, the next one's address, and those of more, one a lane, page p's in
    // lane p / WARPS % 32
    int high = 0, page = 0;
    u64 next = 0, held = 0;
    Copies c{};
    auto fetch_values = [&](u64 address) {
        if (lane == 0) expect(value_barrier, walk->value_bytes);
        __syncwarp();
        if (c.value_bytes) copy_page(c.to, address + c.from, c.value_bytes, value_barrier);
    };
    auto fetch_columns = [&](u64 address) {
        if (lane == 0) expect(key_barrier, walk->key_bytes);
        __syncwarp();
        if (lane < 3 && c.key_bytes) copy_page(c.to, address + c.from, c.key_bytes, key_barrier);
    };
    auto fetch_extras = [&](int page, u64 address) {
        if (lane < 3 || !c.key_bytes) return;
        if (c.other) copy(c.to, c.other + (u64)page * c.stride, c.key_bytes, key_barrier);
        else copy_page(c.to, address + c.from, c.key_bytes, key_barrier);
    };
    auto place = [&] { return (walk->row * tiles + walk->tile) * HEADS + walk->head; };
    // Pages' queries are more than the L2 cache holds beside pages; what is not read again need not go back
    // to memory
    auto forget_others = [&](int page) {
        const u64 at = (u64)place() * capacity + page;
        auto forget = [&](const u8* from, int bytes) {
            for (int i = lane * 128; i < bytes; i += 32 * 128)
                asm volatile("discard.global.L2 [%0], 128;" ::"l"(from + i) : "memory");
        };
        if (PAGED && !MADE) forget(q + at * Q_BYTES, TERMS_BYTES + tiles_of(walk->k4, walk->k2, walk->k1) * Q_CHUNK);
        if (PAGED && MEAN && !MADE) forget(means + at * (BLOCK * MEAN_N * 2), BLOCK * MEAN_N * 2);
    };
    auto fetch_others = [&] {  // what comes from the launch before
        if (!TOKEN && page < high && c.key_bytes && c.other)
            copy(c.to, c.other + (u64)page * c.stride, c.key_bytes, key_barrier);
    };
    auto numbers_from = [&](int page) {
        int mine = min(page + WARPS * max(lane - (page / WARPS & 31), 0), high - 1);
        return table[(u64)walk->row * capacity + mine];
    };
    auto hold = [&](int number) {
        held = slabs[number / slab_pages] + (u64)(number % slab_pages) * page_bytes;
    };
#if OWN
    Own own;
    bool own_has;  // a query, of a lane
    auto make_queries = [&] {
        if (any)
            own.make(shared, own_has ? scale : 0.0f, walk->head, tiles_of(walk->k4, walk->k2, walk->k1), operands,
                     centers, (float)unscale, warp, lane);
    };
#endif
    auto begin_place = [&] {
        int low = 0;
        if (any) pages_of(*walk, walk->begin, walk->end, costs, &low, &high);
        page = low + warp;
        const bool there = !TOKEN && page < high;
        const int number = there ? numbers_from(page) : 0;  // used when it has come
#if OWN
        own_has = own_query(lane) + walk->tile * M < group * queries;
        own.ask(query_at(raw_q, *walk, own_has ? own_query(lane) : 0, query_heads, queries, group), walk->head, operands,
                centers, about, warp, lane);
#endif
        c = copies_of(walk, heads, sums_at, q, means, (u64)place() * capacity, lane);
        c.to += shared_address(mine);
        if (there) {
            hold(number);
            next = __shfl_sync(0xffffffffu, held, page / WARPS & 31);
            if (lane == 0) expect(key_barrier, walk->key_bytes);
            __syncwarp();
            if (c.key_bytes && !c.other) copy_page(c.to, next + c.from, c.key_bytes, key_barrier);
            if (c.apart) fetch_values(next);
        }
    };
    begin_place();
#if OWN
    make_queries();
#endif
    if (!TOKEN && mine_from < exact_to) asked.ask(exact_of, mine_from, mine_from + BY, exact_to, lane);
#if OWN
    together();
#endif
    if (!TOKEN) attend_exact(asked, exact_of, mine_from, exact_to, BY, sums_in, lane);
    auto no_sums = [&] {
        for (int i = lane; i < VC * 16; i += 32) ((float4*)sums_in)[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        __syncwarp();
    };
    no_sums();
    wait_for_launch_before();
    let_next_launch_begin();
    fetch_others();
    while (any) {
#if TOKEN
        wait(head_barrier, walk->places & 1);
#elif OWN
        own.finish(shared, lane);
#elif SENT
        if (threadIdx.x == 0) {
            asm volatile("fence.proxy.async.shared::cta;");
            expect(q_barrier, Q_BYTES);
            copy(shared_address(shared), (u64)q + (u64)place() * Q_BYTES, Q_BYTES, q_barrier);
        }
        wait(q_barrier, walk->places & 1);
#endif
        const bool apart = c.apart;
        const u8* values_in = mine + c.values_at;
        float first_terms[SEGMENTS] = {}, q_unit = 1.0f;
        auto find_terms = [&](const u8* queries) {
#if MADE
            const int4 sums = ((const int4*)queries)[query];
            const float* terms = (const float*)(queries + 64);
            q_unit = terms[4 + query];
            first_terms[0] = terms[query] + 0.5f * q_unit * (float)(sums.x + sums.y + sums.z + sums.w);
#else
            float2 x = ((const float2*)queries)[query];
            first_terms[0] = x.x, q_unit = x.y;
#endif
        };
        if (TOKEN || SENT) __syncwarp();  // all have read it
        if (lane == 0) ++walk->places;

        float m = LOWEST, norm = 0.0f, gain_sum = 0.0f, offset_sum[V_GROUPS] = {};
        // products of keys take pages of four warps at once, and makers make those of all: all walk as many
        for (; page - (TOKEN || MADE ? warp : 0) < high; page += WARPS) {
            const u64 address = next;
            if (!TOKEN && page + WARPS < high) {
                const int at = (page + WARPS) / WARPS & 31;
                if (!at) hold(numbers_from(page + WARPS));
                next = __shfl_sync(0xffffffffu, held, at);
            }
            float s[2][4][2] = {};
            if (page < high) wait(key_barrier, walk->done & 1);
            const u32 made_barrier = key_barrier + 8 * (walk->rounds & 1);
            const u8* made_in = mine + (MADE ? (walk->rounds & 1) * MADE_PAGE : 0);
            if (MADE) wait(made_barrier + MADE_AT, walk->rounds >> 1 & 1);
            if (MADE && page >= high) {
                __syncwarp();
                if (lane == 0) ++walk->rounds, arrive(made_barrier + FREE_AT);
                __syncwarp();
                break;
            }
            const u8* queries_in = PAGED ? made_in + QUERY_AT : shared;
            const u8* steps = mine + EXTRA_AT;
            const int k4 = FULL ? K4 * 16 : walk->k4, k2 = FULL ? K2 * 16 : walk->k2, k1 = FULL ? K1 * 16 : walk->k1;
            const u8 *k2_in = columns_in + k4 * 64, *k1_in = k2_in + k2 * 32;
            const u8 *q4 = queries_in + PAGE_TERMS, *q2 = q4 + chunks(k4) * Q_CHUNK, *q1 = q2 + chunks(k2) * Q_CHUNK;
#if TOKEN
            float w[2][4][2];
            numbers<1, 1>(w, steps, 0, room, l);
#pragma unroll 1
            for (int part = 0; part < 8 / QUARTERS; ++part) {
                float made[QUARTERS][2];
                decoded(made, decoder, columns_in, (const uint2*)(mine + QUERY_AT), room, part * QUARTERS / 4, part * QUARTERS % 4, lane, l);
#pragma unroll
                for (int f = 0; f < 8; ++f)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        if (part == f / QUARTERS) s[f / 4][f % 4][i] = made[f % QUARTERS][i];
            }
            if (page >= high) break;
#else
            if (WHOLE_KEYS) {
                if (K4) add_scores<4>(s, columns_in, k4, q4, l);
                if (K2) add_scores<2>(s, k2_in, k2, q2, l);
                if (K1) add_scores<1>(s, k1_in, k1, q1, l);
            } else {
                float zeros[4] = {};
                if (K4) add_scores_half<4>(s, zeros, columns_in, k4, q4, steps, l);
                if (K2) add_scores_half<2>(s, zeros, k2_in, k2, q2, steps, l);
                if (K1) add_scores_half<1>(s, zeros, k1_in, k1, q1, steps, l);
#pragma unroll
                for (int k = 0; k < SEGMENTS; ++k)
                    if (SEGMENTS > 1) first_terms[k] = __shfl_sync(0xffffffffu, zeros[0], 4 * k + l.c);
            }
#endif
#if TOKEN
            q_unit = ((const float*)(mine + UNITS_AT))[query];
            __syncwarp();
            if (lane == 0) arrive(key_barrier + 16);
#else
            __syncwarp();
            if (!apart) fetch_values(address);
            else if (page + WARPS < high) fetch_columns(next);
            forget_others(page);
            if (WHOLE_KEYS) find_terms(queries_in);
            float w[2][4][2];
            if (K_GAIN) numbers<K_GAIN, 1>(w, steps, 0, room, l);
#endif
            float top = LOWEST;
            const u8* means_in = made_in + MEANS_AT + l.c * 2;
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int f = 0; f < 4; ++f)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float x = s[r][f][i];
                        if (TOKEN) x = x * q_unit;
                        if (WHOLE_KEYS || SEGMENTS > 1) x = x * q_unit + first_terms[f * SEGMENTS / 4];
                        float mean = 0.0f;
                        if (MEAN)
                            mean = float_of_half(*(const u16*)(
                                means_in + (32 * f + 16 * r + (i ? l.second : l.first)) * (MEAN_N * 2)));
                        x = K_GAIN && !TOKEN ? x * w[r][f][i] + mean : x + mean;
                        if (CAP) x = soft_cap(x, cap);
                        s[r][f][i] = x;
                        top = fmaxf(top, x);
                    }
            __syncwarp();
            if (MADE && lane == 0) arrive(made_barrier + FREE_AT);
            if (!TOKEN && page + WARPS < high) fetch_extras(page + WARPS, next);
            for (int o = 4; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, o));
            top = fmaxf(top, m);
            float alpha = exp2_(m - top), sum = 0.0f;
            m = top;
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int f = 0; f < 4; ++f)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        s[r][f][i] = exp2_(s[r][f][i] - m);
                        sum += s[r][f][i];
                    }
            norm = norm * alpha + sum;

            wait(value_barrier, walk->done & 1);
            const int FIRST = V4 ? V4 : V2 ? V2 : V1, VB = V4 ? 4 : V2 ? 2 : 1;
            const int v4 = FULL ? V4 * 16 : walk->v4, v2 = FULL ? V2 * 16 : walk->v2, v1 = FULL ? V1 * 16 : walk->v1;
            const int weights_at = v4 * 64 + v2 * 32 + v1 * 16;
            const u8 *v2_in = values_in + v4 * 64, *v1_in = v2_in + v2 * 32;
#pragma unroll
            for (int group = 0; group < V_GROUPS; ++group) {
                if (V_OFFSET) {
                    numbers<2, V_GROUPS>(w, values_in + weights_at + V_EXTRA, group, room, l);
                    float sum = 0.0f;
#pragma unroll
                    for (int r = 0; r < 2; ++r)
#pragma unroll
                        for (int f = 0; f < 4; ++f) sum += s[r][f][0] * w[r][f][0] + s[r][f][1] * w[r][f][1];
                    offset_sum[group] = offset_sum[group] * alpha + sum;
                }
                if (V_GAIN) numbers<V_GAIN, V_GROUPS>(w, values_in + weights_at, group, room, l);
#pragma unroll
                for (int r = 0; r < 2; ++r)
#pragma unroll
                    for (int f = 0; f < 4; ++f)
#pragma unroll
                        for (int i = 0; i < 2; ++i) w[r][f][i] = V_GAIN ? s[r][f][i] * w[r][f][i] : s[r][f][i];
                const int EACH = V_GROUPS > 1 ? FIRST / V_GROUPS : 0;  // runs of columns of one width
                float* sums_of = sums_in + group * EACH * 64;
                const u8* first_in = values_in + group * EACH * 16 * (16 * VB);
                const int first_count = V_GROUPS > 1 ? EACH * 16 : V4 ? v4 : V2 ? v2 : v1;
                if (WHOLE_VALUES) {
                    // 16 bits a weight, the largest of the page and query near 2^16
                    float most = 1e-30f;
#pragma unroll
                    for (int r = 0; r < 2; ++r)
#pragma unroll
                        for (int f = 0; f < 4; ++f) most = fmaxf(most, fmaxf(w[r][f][0], w[r][f][1]));
                    for (int o = 4; o < 32; o <<= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
                    float scale = 65280.0f * __frcp_rn(most), unit = most * (1.0f / 65280.0f);
                    u32 bits[2][4][2];
#pragma unroll
                    for (int r = 0; r < 2; ++r)
#pragma unroll
                        for (int f = 0; f < 4; ++f)
#pragma unroll
                            for (int i = 0; i < 2; ++i)
                                bits[r][f][i] = __float_as_uint(w[r][f][i] * scale + 8388608.0f);
                    u32 h[4][2];  // quarters: tokens of both halves of the lanes share a register
                    auto weights = [&](u32* out, int r0, int f0, int r1, int f1) {
                        u32 x = transposed(bytes_of(bits[r0][f0][0], bits[r1][f1][0], 0x4051));
                        u32 y = transposed(bytes_of(bits[r0][f0][1], bits[r1][f1][1], 0x4051));
                        // rows 2c, 2c + 1 are tokens 4c.. where c is even, else 4c + 2..
                        out[0] = l.c & 1 ? y : x, out[1] = l.c & 1 ? x : y;
                    };
                    if (V4) {  // fields f and f + 2 share a register
#pragma unroll
                        for (int k = 0; k < 4; ++k) weights(h[k], k & 1, k >> 1, k & 1, (k >> 1) + 2);
                        add_values<4>(VB == 4 ? sums_of : sums_in, VB == 4 ? first_in : values_in,
                                      VB == 4 ? first_count : v4, h, unit, alpha, l);
                    }
                    if (V2 || V1) {
#pragma unroll
                        for (int k = 0; k < 4; ++k) weights(h[k], 0, k, 1, k);
                    }
                    if (V2)
                        add_values<2>(VB == 2 ? sums_of : sums_in + V4 * 64, VB == 2 ? first_in : v2_in,
                                      VB == 2 ? first_count : v2, h, unit, alpha, l);
                    if (V1)
                        add_values<1>(VB == 1 ? sums_of : sums_in + (V4 + V2) * 64, VB == 1 ? first_in : v1_in,
                                      VB == 1 ? first_count : v1, h, unit, alpha, l);
                    if (V_GAIN_SUM) {
                        int fresh[4] = {};
                        u32 ones[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
#pragma unroll
                        for (int k = 0; k < 4; ++k) product_p(fresh, ones, h[k][0], h[k][1]);
                        gain_sum = gain_sum * alpha + (float)(fresh[0] * 256 + fresh[1]) * unit;
                    }
                } else {
                    u32 h[2][4][2];
#pragma unroll
                    for (int r = 0; r < 2; ++r)
#pragma unroll
                        for (int f = 0; f < 4; ++f) {
                            u32 x = transposed(half2_of(w[r][f][0], w[r][f][0]));
                            u32 y = transposed(half2_of(w[r][f][1], w[r][f][1]));
                            h[r][f][0] = l.c & 1 ? y : x, h[r][f][1] = l.c & 1 ? x : y;
                        }
                    if (VB == 4) add_values_half<4>(sums_of, first_in, first_count, h, alpha, l);
                    if (V2)
                        add_values_half<2>(VB == 2 ? sums_of : sums_in + V4 * 64, VB == 2 ? first_in : v2_in,
                                           VB == 2 ? first_count : v2, h, alpha, l);
                    if (V1)
                        add_values_half<1>(VB == 1 ? sums_of : sums_in + (V4 + V2) * 64,
                                           VB == 1 ? first_in : v1_in, VB == 1 ? first_count : v1, h, alpha, l);
                    if (V_GAIN_SUM) {
                        float fresh[4] = {};
                        u32 ones[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
#pragma unroll
                        for (int r = 0; r < 2; ++r)
#pragma unroll
                            for (int f = 0; f < 4; ++f) product(fresh, ones, h[r][f][0], h[r][f][1]);
                        gain_sum = gain_sum * alpha + fresh[0];
                    }
                }
            }
            __syncwarp();
            if (lane == 0) ++walk->done, ++walk->rounds;
            __syncwarp();
#if TOKEN
            if (lane == 0) arrive(value_barrier + 16);
#else
            if (page + WARPS < high) {
                if (apart) fetch_values(next);
                else fetch_columns(next);
            }
#endif
        }

        // the warps of an item merge as splits do
        for (int o = 4; o < 32; o <<= 1) {
            norm += __shfl_xor_sync(0xffffffffu, norm, o);
#pragma unroll
            for (int k = 0; k < V_GROUPS; ++k)
                if (V_OFFSET) offset_sum[k] += __shfl_xor_sync(0xffffffffu, offset_sum[k], o);
        }
        if (l.g == 0) {
            ends[l.c] = m, ends[4 + l.c] = norm, ends[8 + l.c] = gain_sum;
#pragma unroll
            for (int k = 0; k < V_GROUPS; ++k)
                if (V_OFFSET) ends[(2 + V_GROUPS + k) * 4 + l.c] = offset_sum[k];
        }
        const u64 record = blockIdx.x + place();
        const int v4 = walk->v4, v2 = walk->v2, v1 = walk->v1;
        const bool last = is_last(walk, costs);
        __syncwarp();  // all have read where it was
        if (!last) {  // the next place's first pages come while this one's sums are added up
            go_on(walk, folded, tiles, costs, lane);
            begin_place();
            fetch_others();
        }
        together();
        const u8* all = shared + WARPS_AT + sums_at;
        float* state = states + record * (STATE * M);
        float* total = sums + record * (M * VC * 16);
        float best[M], factor[WARPS][M];
#pragma unroll
        for (int n = 0; n < M; ++n) {
            best[n] = LOWEST;
#pragma unroll
            for (int k = 0; k < WARPS; ++k)
                best[n] = fmaxf(best[n], ((const float*)(all + k * warp_bytes + ENDS))[n]);
#pragma unroll
            for (int k = 0; k < WARPS; ++k)
                factor[k][n] = exp2_(((const float*)(all + k * warp_bytes + ENDS))[n] - best[n]);
        }
        if (threadIdx.x == 0) {
#pragma unroll
            for (int n = 0; n < M; ++n) {
                state[n] = best[n];
                for (int k = 1; k < STATE; ++k) {
                    float x = 0.0f;
#pragma unroll
                    for (int w = 0; w < WARPS; ++w)
                        x += factor[w][n] * ((const float*)(all + w * warp_bytes + ENDS))[k * 4 + n];
                    state[k * M + n] = x;
                }
            }
        }
        for (int column = threadIdx.x; column < VC * 16; column += 32 * WARPS) {
            int slot = column / 16, at = slot < V4 ? slot * 16 : slot < V4 + V2 ? (slot - V4) * 16 : (slot - V4 - V2) * 16;
            int count = slot < V4 ? v4 : slot < V4 + V2 ? v2 : v1;
            bool there = at + column % 16 < count;
            float x[4] = {};
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float4 y = ((const float4*)(all + w * warp_bytes))[column];
                const float part[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
                for (int n = 0; n < M; ++n) x[n] += factor[w][n] * part[n];
            }
#pragma unroll
            for (int n = 0; n < M; ++n) total[n * (VC * 16) + column] = there ? x[n] : 0.0f;
        }
        if (last) break;
#if OWN
        make_queries();
#endif
        together();  // queries are made; sums, and tables of the head before, are read
        no_sums();
#if TOKEN
        load_head();
#endif
    }
}
