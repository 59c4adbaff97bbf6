// Queries of columns, as pages' digits are multiplied with them: `prepare.cu` makes those of each page,
// `attend.cu` those that hold for all.
//
// WHOLE_KEYS: 16-bit fixed point; the unit follows from norms, which turning keeps. A tile of 16 columns is
// [query][quarter of the columns][two bytes][4 columns]; before the tiles come what is added to each query's
// sums, and its unit, [4][2]. Else a tile is float16 [query][16 columns]. Tiles are the chunks that the head
// has, of each section the first ones.
//
// A tile of operands has its columns 4 (g / 2) + g % 2 and that + 2 as rows g and g + 8, so that a thread's
// two are neighbours after a transposition.

#define KC (K4 + K2 + K1)  // slots of 16 columns
#define TERMS_BYTES (WHOLE_KEYS ? 32 : 0)
#define Q_CHUNK (WHOLE_KEYS ? 128 : M * 32)
#define Q_BYTES (TERMS_BYTES + KC * Q_CHUNK)
#define MAGIC 8421376.0f  // 2^23 + 2^15: the low 16 bits of a sum with it are the rounded number and 2^15

__device__ __forceinline__ int chunks(int columns) { return (columns + 15) >> 4; }

__device__ __forceinline__ int tiles_of(const int* counts) {  // of 4, 2 and 1 bits
    return chunks(counts[0]) + chunks(counts[1]) + chunks(counts[2]);
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
    // the upper byte is rounded for a signed lower one, and loses the 2^15
    const u32 high = bytes_of(x + 0x00800080u, y + 0x00800080u, 0x7531) ^ 0x80808080u;
    if (there && (g & 3) < M) *(uint2*)(to + (g & 3) * 32 + c * 8) = make_uint2(high, bytes_of(x, y, 0x6420));
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
// middles: the sum of all columns', which the 2^15 have been multiplied with
__device__ __forceinline__ float term_of(float gain, int sum, float middles, float unit) {
    return gain + 0.5f * unit * (float)(sum - ((int)middles << 15));
}
