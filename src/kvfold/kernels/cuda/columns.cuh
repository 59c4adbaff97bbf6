// Queries of columns, as pages' digits are multiplied with them: `prepare.cu` or `makers.cuh` make those of each
// page, `attend.cu`, `send.cu` or, where the mean has scores for each page, `prepare.cu` those that hold for all.
//
// WHOLE_KEYS: 16-bit fixed point; the unit follows from norms, which turning keeps. A tile of 16 columns is
// [query][quarter of the columns][two bytes][4 columns]; before the tiles come what is added to each query's
// sums, and its unit, [4][2]. Else a tile is float16 [query][16 columns]. Tiles are the chunks that the head
// has, of each section the first ones. Q_BYTES are whole lines of the L2 cache where another launch makes them.
//
// A tile of operands has its columns 4 (g / 2) + g % 2 and that + 2 as rows g and g + 8, so that a thread's
// two are neighbours after a transposition.

#define KC (K4 + K2 + K1)  // slots of 16 columns
#define MEANS (MEAN ? BLOCK / 16 : 0)  // tiles of products with the mean
#define PAD (D_K + 8)  // of a query in float32: rows lie in different banks
#define TERMS_BYTES (WHOLE_KEYS ? 32 : 0)
#define Q_CHUNK (WHOLE_KEYS ? 128 : M * 32)
// 2^23 + SHIFT: the low 16 bits of a sum with it are the rounded number and SHIFT, 2^15 + 2^7, which leaves its
// bytes, the lower one signed, with their upper bits flipped
#define MAGIC 8421504.0f
#define SHIFT 32896

__device__ __forceinline__ int chunks(int columns) { return (columns + 15) >> 4; }

__device__ __forceinline__ int tiles_of(int k4, int k2, int k1) { return chunks(k4) + chunks(k2) + chunks(k1); }
// of a head's entry in the layer's table
__device__ __forceinline__ int tiles_of(const int* heads, int head) {
    const int* counts = heads + head * 16 + 6;
    return tiles_of(counts[0], counts[1], counts[2]);
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
// rounded numbers of two queries, one in each half; of two columns of one query where a lane's is
__device__ __forceinline__ u32 fixed(float x, float y, const float* inverse) {
    float a = x * inverse[0] + MAGIC, b = y * inverse[1] + MAGIC;
    return transposed(bytes_of(__float_as_uint(a), __float_as_uint(b), 0x5410));
}
// |query of a column| is at most |q|, whose square this is, times `reach`, the length of the longest column
__device__ __forceinline__ float unit_of(float square, float reach) {
    return fmaxf(sqrtf(square) * reach, 1e-30f) * (1.0f / 32000.0f);
}

// A tile from its sums d[row g, row g + 8][queries 2c % 4, 2c % 4 + 1] of two pages, or of one twice: of the
// page g / 4, or c / 2 where they are float16. z: of the numbers times twice the middle of their columns'
// digits, negative
__device__ __forceinline__ void store_queries(u8* to, const float* d, int* z, u32 middle, const float* inverse,
                                              float unscale, bool there, int lane) {
    const int g = lane >> 2, c = lane & 3;
#if WHOLE_KEYS
    const u32 x = fixed(d[0], d[1], inverse), y = fixed(d[2], d[3], inverse);
    *z = dot_high(y, middle, dot_low(x, middle, *z));
    const u32 a = x ^ 0x80808080u, b = y ^ 0x80808080u;
    if (there && (g & 3) < M)
        *(uint2*)(to + (g & 3) * 32 + c * 8) = make_uint2(bytes_of(a, b, 0x7531), bytes_of(a, b, 0x6420));
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int n = (2 * c & 3) + (i & 1), column = 4 * (g >> 1) + (g & 1) + (i & 2);
        if (there && n < M) *(u16*)(to + n * 32 + column * 2) = (u16)half2_of(d[i] * unscale, 0.0f);
    }
#endif
}
// the gain term's two float16 parts, rows 0 and 1 of a tile of their own
__device__ __forceinline__ void store_gain(float* to, const float* d, bool there, int lane) {
    const float x = d[0] + __shfl_xor_sync(0xffffffffu, d[0], 4), y = d[1] + __shfl_xor_sync(0xffffffffu, d[1], 4);
    if (there && lane < 4) *(float2*)(to + (2 * lane & 3)) = make_float2(x, y);
}
template <class T>
__device__ __forceinline__ T sum_of_columns(T x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
// what is added to the sums of a query: digits are about their middle, so that rounding cancels there.
// middles: the sum of all columns', which SHIFT has been multiplied with
__device__ __forceinline__ float term_of(float gain, int sum, float middles, float unit) {
    return gain + 0.5f * unit * (float)(sum - (int)middles * SHIFT);
}

// query n of a place's tile
__device__ __forceinline__ const State* query_at(const State* q, const Place& place, int n, int query_heads,
                                                 int queries, int group) {
    const int which = place.tile * M + n;
    const int at = (place.row * query_heads + place.head * group + which / queries) * queries + which % queries;
    return q + (u64)at * D_K;
}

// --- those of all pages, by all warps of a program ------------------------------------------------

#define KS (D_K / 16)  // steps of a product
#define OWN_TILES (KC + WHOLE_KEYS)  // each head's, zeros behind its own; with the gain's
#define OWN_BYTES (Q_BYTES + (WARPS + 1) * 16)

__device__ __forceinline__ int own_query(int lane) { return min(lane >> 2 & 3, M - 1); }  // a lane's

struct Own {
    uint4 a[OWN_AT_ONCE][KS];
    u32 middle[OWN_AT_ONCE];  // of a tile's columns' digits, twice, negative
    Pair q[KS][2];
    float2 about;  // the head's `reach`, and the sum of all middles
    float unit;    // of query lane % 4

    __device__ __forceinline__ void ask_tiles(int head, const uint4* operands, const u32* centers, int tile, int lane) {
#pragma unroll
        for (int i = 0; i < OWN_AT_ONCE; ++i) {
            const int u = min(tile + i * WARPS, OWN_TILES - 1), place = head * OWN_TILES + u;
#pragma unroll
            for (int k = 0; k < KS; ++k) a[i][k] = operands[(place * KS + k) * 32 + lane];
            middle[i] = centers[(head * KC + min(u, KC - 1)) * 4 + (lane & 3)];
        }
    }
    // from: the lane's query
    __device__ __forceinline__ void ask(const State* from, int head, const uint4* operands, const u32* centers,
                                        const float2* heads, int warp, int lane) {
        about = heads[head];
#pragma unroll
        for (int k = 0; k < KS; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half) q[k][half] = ((const Pair*)from)[8 * k + 4 * half + (lane & 3)];
        ask_tiles(head, operands, centers, warp, lane);
    }
    // A tile a warp, of `columns`. They are whole when all warps have been here and at `finish`. scale: of
    // the lane's query, 0 where there is none
    __device__ __forceinline__ void make(u8* to, float scale, int head, int columns, const uint4* operands,
                                         const u32* centers, float unscale, int warp, int lane) {
        const int g = lane >> 2, c = lane & 3, all = columns + WHOLE_KEYS;
        u32 b[KS][2];
        float square = 0.0f;
#pragma unroll
        for (int k = 0; k < KS; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float2 y = wide(q[k][half]);
                y.x *= scale, y.y *= scale;
                square += y.x * y.x + y.y * y.y;
                b[k][half] = half2_of(y.x, y.y);
            }
        const float mine = unit_of(sum_of_columns(square), about.x);
        float inverse[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            inverse[i] = unscale / __shfl_sync(0xffffffffu, mine, min((2 * c & 3) + i, M - 1) * 4);
        unit = __shfl_sync(0xffffffffu, mine, c * 4);
        int z = 0;
#pragma unroll 1
        for (int u = warp; u < all; u += OWN_AT_ONCE * WARPS) {
            if (u != warp) ask_tiles(head, operands, centers, u, lane);
#pragma unroll
            for (int i = 0; i < OWN_AT_ONCE; ++i) {
                const int tile = u + i * WARPS;
                float d[4] = {};
#pragma unroll
                for (int k = 0; k < KS; ++k) product(d, &a[i][k].x, b[k][0], b[k][1]);
                if (tile < columns)
                    store_queries(to + TERMS_BYTES + tile * Q_CHUNK, d, &z, middle[i], inverse, unscale,
                                  WHOLE_KEYS ? g < 4 : c < 2, lane);
                else if (tile < all)
                    store_gain((float*)(to + Q_BYTES) + WARPS * 4, d, c < 2, lane);
            }
        }
        z = sum_of_columns(z);
        if (WHOLE_KEYS && c == 0 && g < 4) ((int*)(to + Q_BYTES))[warp * 4 + g] = z;
    }
    // by one warp, which copies what has been made
    __device__ __forceinline__ void finish(u8* made, uint4* to, int lane) const {
        finish(made, lane);
        for (int i = lane; i < Q_BYTES / 16; i += 32) to[i] = ((const uint4*)made)[i];
    }
    // the terms, by each warp: all write the same
    __device__ __forceinline__ void finish(u8* to, int lane) const {
        if (!WHOLE_KEYS) return;
        if (lane < M) {
            const int* sums = (const int*)(to + Q_BYTES) + lane;
            int sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum += sums[w * 4];
            const float gain = ((const float*)(to + Q_BYTES))[WARPS * 4 + lane];
            ((float2*)to)[lane] = make_float2(term_of(gain, sum, about.y, unit), unit);
        }
        __syncwarp();
    }
};
