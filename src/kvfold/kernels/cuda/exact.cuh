// Attention to the sinks and the window: items of 16 exact tokens, a warp each.
//
// States of 16 bits are the operands of products as they lie, 16 bytes of a row a lane:
//
//   scores   A = keys    [16 tokens x 16 channels],  B = queries [16 channels x 8]
//   values   A = weights [16 x 16 tokens],           B = values  [16 tokens x 8 channels]
//
// A weight is the sum of two such numbers, the second in the rows from 8 on. What is read of an item is
// asked for before any of it is used, up to 128 channels of it, or 64 where keys are decoded, which needs the
// registers; positions an item earlier, as slots that are all empty are not read. States of 32 bits are
// multiplied one by one.

struct ExactTokens {  // of all items
    const State *q, *keys, *values;
    const int *tokens, *query_tokens;  // positions, -1: an empty slot, a query of padding
    float *out, *state;                // [items][M][D_V], [items][2][M]
    int count, splits, tiles, query_heads, queries, group;
    float scale, cap;
};

struct ExactItem {
    Place place;
    int first;
    u64 base;  // its row and head's first token

    __device__ __forceinline__ ExactItem(const ExactTokens& x, u32 item) {
        const int split = item % x.splits, where = item / x.splits, line = where / HEADS;
        place.row = line / x.tiles, place.tile = line % x.tiles, place.head = where % HEADS, first = split * EXACT;
        base = (u64)(place.row * HEADS + place.head) * x.count;
    }
    __device__ __forceinline__ u64 slot(const ExactTokens& x, int t) const {
        return base + min(first + t, x.count - 1);  // of those behind the last, any
    }
    __device__ __forceinline__ bool has(const ExactTokens& x, int n) const {
        return n < M && place.tile * M + n < x.group * x.queries;
    }
    __device__ __forceinline__ const State* query(const ExactTokens& x, int n) const {
        return query_at(x.q, place, n, x.query_heads, x.queries, x.group);
    }
    __device__ __forceinline__ int token(const ExactTokens& x, int t) const {
        return first + t < x.count ? x.tokens[place.row * x.count + first + t] : -1;
    }
    __device__ __forceinline__ int asker(const ExactTokens& x, int n) const {
        return has(x, n) ? x.query_tokens[place.row * x.queries + (place.tile * M + n) % x.queries] : -1;
    }
};

#if DTYPE != 2
#define KEY_CHUNKS ((D_K / 8 + 3) / 4)  // 16 bytes of a row each, of a lane
#define VALUE_CHUNKS ((D_V / 8 + 7) / 8)
#define AT_ONCE (TOKEN || MADE ? 2 : 4)
#define KEYS_AT_ONCE (KEY_CHUNKS < AT_ONCE ? KEY_CHUNKS : AT_ONCE)
#define VALUES_AT_ONCE (VALUE_CHUNKS < AT_ONCE / 2 ? VALUE_CHUNKS : AT_ONCE / 2)

__device__ __forceinline__ void product_s(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if DTYPE == 1
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint4 once(const uint4* p) { return ONCE ? __ldcs(p) : *p; }

struct Exact {
    uint4 key[2][KEYS_AT_ONCE], query[KEYS_AT_ONCE], value[4][VALUES_AT_ONCE];
    int token, next_token, asker[2];  // positions of a lane's token, here and in the next item

    __device__ __forceinline__ void ask_keys(const ExactTokens& x, const ExactItem& item, int from, int lane) {
        const int g = lane >> 2, c = lane & 3;
#pragma unroll
        for (int i = 0; i < KEYS_AT_ONCE; ++i) {
            const int chunk = c + 4 * (from + i);
            const bool there = D_K % (32 * KEYS_AT_ONCE) == 0 || chunk < D_K / 8;
#pragma unroll
            for (int r = 0; r < 2; ++r)
                key[r][i] = there ? once((const uint4*)(x.keys + item.slot(x, g + 8 * r) * D_K) + chunk) : uint4{};
            query[i] = there && item.has(x, g) ? ((const uint4*)item.query(x, g))[chunk] : uint4{};
        }
    }
    __device__ __forceinline__ void ask_values(const ExactTokens& x, const ExactItem& item, int from, int lane) {
        const int g = lane >> 2, c = lane & 3;
#pragma unroll
        for (int i = 0; i < VALUES_AT_ONCE; ++i) {
            const int chunk = g + 8 * (from + i);
            const bool there = D_V % (64 * VALUES_AT_ONCE) == 0 || chunk < D_V / 8;
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                const u64 slot = item.slot(x, 2 * c + (t & 1) + 8 * (t >> 1));
                value[t][i] = there ? once((const uint4*)(x.values + slot * D_V) + chunk) : uint4{};
            }
        }
    }
    __device__ __forceinline__ void ask_askers(const ExactTokens& x, const ExactItem& item, int lane) {
#pragma unroll
        for (int i = 0; i < 2; ++i) asker[i] = item.asker(x, 2 * (lane & 3) + i);
    }
    __device__ __forceinline__ static int token_of(const ExactTokens& x, u32 number, u32 to, int lane) {
        return number < to ? ExactItem(x, number).token(x, lane & 15) : -1;
    }
    __device__ __forceinline__ static bool has(int token) { return __any_sync(0xffffffffu, token >= 0); }

    // positions of the first item
    __device__ __forceinline__ void begin(const ExactTokens& x, u32 number, u32 to, int lane) {
        token = token_of(x, number, to, lane);
    }
    // the first item, of which there is one
    __device__ __forceinline__ void ask(const ExactTokens& x, u32 number, u32 next, u32 to, int lane) {
        const ExactItem item(x, number);
        if (has(token)) ask_keys(x, item, 0, lane), ask_values(x, item, 0, lane), ask_askers(x, item, lane);
        next_token = token_of(x, next, to, lane);
    }
    // an item that has been asked for; then the next one is, if there is one
    __device__ __forceinline__ void attend(const ExactTokens& x, u32 number, u32 by, u32 to, int lane) {
        const u32 next = number + by;
        const bool more = has(next_token);
        const ExactItem item(x, number), next_item(x, next < to ? next : number);
        if (has(token)) {
            attend(x, item, next_item, number, more, lane);
        } else {
            float* state = x.state + (u64)number * (2 * M);
            if (lane < M) state[lane] = LOWEST, state[M + lane] = 0.0f;
            if (more) ask_keys(x, next_item, 0, lane), ask_values(x, next_item, 0, lane);
        }
        if (more) ask_askers(x, next_item, lane);
        token = next_token, next_token = token_of(x, next + by, to, lane);
    }
    __device__ __forceinline__ void attend(const ExactTokens& x, const ExactItem& item, const ExactItem& next_item,
                                           u32 number, bool more, int lane) {
        const int g = lane >> 2, c = lane & 3;
        float d[4] = {}, other[4] = {};
#pragma unroll
        for (int from = 0; from < KEY_CHUNKS; from += KEYS_AT_ONCE) {
            if (from) ask_keys(x, item, from, lane);
#pragma unroll
            for (int i = 0; i < KEYS_AT_ONCE; ++i) {
                const uint4 u = key[0][i], v = key[1][i], w = query[i];
                product_s(d, u.x, v.x, u.y, v.y, w.x, w.y);
                product_s(other, u.z, v.z, u.w, v.w, w.z, w.w);
            }
        }
        if (more) ask_keys(x, next_item, 0, lane);
        // rows g and g + 8, queries 2c and 2c + 1
        const int tokens[2] = {__shfl_sync(0xffffffffu, token, g), __shfl_sync(0xffffffffu, token, g + 8)};
        u32 a[2][2];
        float p[2][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int n = 2 * c + i;
            float s[2], top = LOWEST, norm = 0.0f;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                s[r] = (d[2 * r + i] + other[2 * r + i]) * x.scale;
                if (CAP) s[r] = soft_cap(s[r], x.cap);
                if (tokens[r] >= 0 && tokens[r] <= asker[i]) top = fmaxf(top, s[r]);
                else s[r] = 2 * LOWEST;
            }
            for (int o = 4; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, o));
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                p[r][i] = exp2_(s[r] - top);
                norm += p[r][i];
            }
            for (int o = 4; o < 32; o <<= 1) norm += __shfl_xor_sync(0xffffffffu, norm, o);
            float* state = x.state + (u64)number * (2 * M);
            if (g == 0 && n < M) state[n] = top, state[M + n] = norm;
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const State high[2] = {narrow(p[r][0]), narrow(p[r][1])};
            const State low[2] = {narrow(p[r][0] - wide(high[0])), narrow(p[r][1] - wide(high[1]))};
            a[r][0] = transposed(high[0] | (u32)high[1] << 16), a[r][1] = transposed(low[0] | (u32)low[1] << 16);
        }
        const u32 real = __ballot_sync(0xffffffffu, token >= 0);  // what an empty slot holds may be anything
        float* out = x.out + (u64)number * (M * D_V) + g * D_V;
#pragma unroll
        for (int from = 0; from < VALUE_CHUNKS; from += VALUES_AT_ONCE) {
            if (from) ask_values(x, item, from, lane);
#pragma unroll
            for (int i = 0; i < VALUES_AT_ONCE; ++i) {
#pragma unroll
                for (int t = 0; t < 4; ++t)
                    if (!(real >> (2 * c + (t & 1) + 8 * (t >> 1)) & 1)) value[t][i] = uint4{};
                float o[2][8];
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const u32 pick = e & 1 ? 0x7632 : 0x5410;
                    auto word = [&](int t) { return (&value[t][i].x)[e / 2]; };
                    float y[4] = {};
                    product_s(y, a[0][0], a[0][1], a[1][0], a[1][1], bytes_of(word(0), word(1), pick),
                              bytes_of(word(2), word(3), pick));
                    o[0][e] = y[0] + y[2], o[1][e] = y[1] + y[3];
                }
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int chunk = 2 * c + k + 8 * (from + i);
                    if (g < M && chunk < D_V / 8) {
                        *(float4*)(out + 8 * chunk) = make_float4(o[k][0], o[k][1], o[k][2], o[k][3]);
                        *(float4*)(out + 8 * chunk + 4) = make_float4(o[k][4], o[k][5], o[k][6], o[k][7]);
                    }
                }
            }
        }
        if (more) ask_values(x, next_item, 0, lane);
    }
};

// items of which the first has been asked for
__device__ __forceinline__ void attend_exact(Exact& exact, const ExactTokens& x, u32 from, u32 to, int by, float*,
                                             int lane) {
#pragma unroll 1
    for (u32 i = from; i < to; i += by) exact.attend(x, i, by, to, lane);
}
#else
struct Exact {
    __device__ __forceinline__ void begin(const ExactTokens&, u32, u32, int) {}
    __device__ __forceinline__ void ask(const ExactTokens&, u32, u32, u32, int) {}
};

// two lanes a token for scores, then a lane has pairs of channels of all tokens
__device__ __forceinline__ void attend_exact(Exact&, const ExactTokens& x, u32 begin, u32 to, int by, float* scratch,
                                             int lane) {
#pragma unroll 1
    for (u32 number = begin; number < to; number += by) {
        const ExactItem item(x, number);
        const int CHUNKS = D_K / 8, BATCH = CHUNKS > 4 ? 4 : CHUNKS, PAIRS = (D_V + 63) / 64;
        const int half = lane & 1, token = item.token(x, lane >> 1);
        float* state = x.state + (u64)number * (2 * M);
        if (!__any_sync(0xffffffffu, token >= 0)) {
            if (lane < M) state[lane] = LOWEST, state[M + lane] = 0.0f;
            continue;
        }
        const uint4* k = (const uint4*)(x.keys + item.slot(x, lane >> 1) * D_K) + half;
        uint4 chunk[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) chunk[i] = k[2 * i];
        float2 value[EXACT];
        auto fetch = [&](int d) {
#pragma unroll
            for (int t = 0; t < EXACT; ++t) value[t] = *(const float2*)(x.values + item.slot(x, t) * D_V + d);
        };
        fetch(min(2 * lane, D_V - 2));
        auto wanted = [&](int d) { return (float4*)scratch + d + d / 4; };  // chunks begin in other banks
        float4* p = wanted(D_K);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const bool there = item.has(x, n);
            const State* from = item.query(x, n);
            for (int d = lane; d < D_K; d += 32) ((float*)wanted(d))[n] = there ? from[d] * x.scale : 0.0f;
        }
        __syncwarp();
        float s[4] = {};
#pragma unroll 1
        for (int from = 0; from < CHUNKS; from += BATCH) {
            if (from) {
#pragma unroll
                for (int i = 0; i < BATCH; ++i) chunk[i] = k[2 * min(from + i, CHUNKS - 1)];
            }
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const float4* w = wanted((2 * (from + i) + half) * 4);
                if (CHUNKS % BATCH && from + i >= CHUNKS) continue;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float y = __uint_as_float((&chunk[i].x)[j]);
                    s[0] += y * w[j].x, s[1] += y * w[j].y, s[2] += y * w[j].z, s[3] += y * w[j].w;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            s[n] += __shfl_xor_sync(0xffffffffu, s[n], 1);
            if (CAP) s[n] = soft_cap(s[n], x.cap);
            const bool seen = token >= 0 && token <= item.asker(x, n);
            float top = seen ? s[n] : LOWEST;
            for (int o = 2; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, o));
            s[n] = seen ? exp2_(s[n] - top) : 0.0f;
            float norm = s[n];
            for (int o = 2; o < 32; o <<= 1) norm += __shfl_xor_sync(0xffffffffu, norm, o);
            if (lane == 0 && n < M) state[n] = top, state[M + n] = norm;
        }
        if (!half) p[lane >> 1] = make_float4(s[0], s[1], s[2], s[3]);
        const u32 real = __ballot_sync(0xffffffffu, token >= 0);  // what an empty slot holds may be anything
        __syncwarp();
        float* out = x.out + (u64)number * (M * D_V);
#pragma unroll 1
        for (int i = 0; i < PAIRS; ++i) {
            const int d = 2 * lane + 64 * i;
            if (i) fetch(min(d, D_V - 2));
            float u[4] = {}, v[4] = {};
#pragma unroll
            for (int t = 0; t < EXACT; ++t) {
                const float2 y = real >> 2 * t & 1 ? value[t] : make_float2(0.0f, 0.0f);
                const float4 w = p[t];
                u[0] += w.x * y.x, u[1] += w.y * y.x, u[2] += w.z * y.x, u[3] += w.w * y.x;
                v[0] += w.x * y.y, v[1] += w.y * y.y, v[2] += w.z * y.y, v[3] += w.w * y.y;
            }
#pragma unroll
            for (int n = 0; n < M; ++n)
                if (d < D_V) *(float2*)(out + n * D_V + d) = make_float2(u[n], v[n]);
        }
        __syncwarp();
    }
}
#endif
