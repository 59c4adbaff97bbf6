// Pages' queries and the mean's scores, made for the warps of a program that walk its pages.
//
// Four warps make those of the next page of each, and are a page ahead. Queries turned back to the pages' first
// positions are the columns of products whose rows, 16 a tile, are the mean turned by the places of a page
// (MEAN), the key matrix by columns and the gain term. A maker keeps every fourth tile of the head in
// registers. What is made goes to one of two places in the part of the warp that walks the page, where
// barriers say that it has come, from each of the makers, and that it has been used: all warps go through as
// many, also those that have no page at the end.
//
// MADE_TILES are those of the head that has most; the operands are those of __init__.py, `made_operands`.

#define MAKER_TILES ((MADE_TILES + MAKERS - 1) / MAKERS)  // of a warp
#define ANGLES (HALVES ? D_K / 4 : D_K / 2)               // pairs of neighbouring channels with their own angles
#define SIDES (32 * MAKERS / ANGLES)                      // pages that threads turn queries for at once
#define OF_LANE ((D_K + 31) / 32)                         // channels of a query
#define TURNED_BYTES (WARPS / 2 * KS * 256)               // [two pages][D_K / 8][page][4 queries][8 channels]
#define MAKER_BYTES (MAKERS * 128 + TURNED_BYTES + (2 * M * PAD + 4 + 2 * WARPS + KC * 4) * 4)
#define MANY (MAKER_TILES * KS > 28 && WARPS > 4)  // tiles for the registers that all warps have

struct Maker {
    const int *heads, *folded, *block, *first_position;
    const uint4* operands;
    const u32* centers;
    const float2* about;
    const float* rope;
    const State* q;
    int capacity, sinks, tiles, query_heads, queries, group, warp_bytes;
    Costs costs;
    float scale, unscale;
    u8 *warps, *area;  // parts of those that walk pages; of the makers
};

#define M4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#if WARPS == 8
#define MADE_SHAPE "m64n32k16"
#define MADE_LIST "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p"
#define MADE_REGISTERS M4(0), M4(4), M4(8), M4(12)
#define MADE_ADDS "%21"
#else
#define MADE_SHAPE "m64n16k16"
#define MADE_LIST "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p"
#define MADE_REGISTERS M4(0), M4(4)
#define MADE_ADDS "%13"
#endif

// A tile of each maker times all pages' queries, [two pages][row g, row g + 8][2c, 2c + 1]
// turned: its shared address
__device__ __forceinline__ void multiply(float* d, const uint4* a, u32 turned) {
    u64 queries = (u64)(turned >> 4) | (u64)(128 >> 4) << 16 | (u64)(KS * 256 >> 4) << 32;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < KS; ++k) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, " MADE_ADDS ", 0;\n"
                     "wgmma.mma_async.sync.aligned." MADE_SHAPE ".f32.f16.f16 " MADE_LIST ", 1, 1, 0; }"
                     : MADE_REGISTERS
                     : "r"(a[k].x), "r"(a[k].y), "r"(a[k].z), "r"(a[k].w), "l"(queries), "r"(k));
        queries += 256 >> 4;
    }
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 2 * WARPS; ++i) asm volatile("" : "+f"(d[i]));  // not before they are there
}

// the mean's scores of a tile of 16 tokens, from d[row g, row g + 8][queries 2c % 4, 2c % 4 + 1] of page c / 2
__device__ __forceinline__ void store_means(u8* means, int tile, const float* d, int lane) {
    const int g = lane >> 2, n0 = 2 * lane & 3;
    u8* to = means + (16 * tile + 4 * (g >> 1) + (g & 1)) * (MEAN_N * 2) + n0 * 2;
    if (n0 < MEAN_N) *(u32*)to = half2_of(d[0], d[1]), *(u32*)(to + 4 * MEAN_N) = half2_of(d[2], d[3]);
}

__device__ __forceinline__ void make_pages(Walk* walk, const Maker& b, int maker, int lane) {
    const int g = lane >> 2, c = lane & 3, thread = maker * 32 + lane, n0 = 2 * c & 3;
    u8* turned = b.area + MAKERS * 128;
    float* plain = (float*)(turned + TURNED_BYTES);  // [M][PAD]
    float *mates = plain + M * PAD, *units = mates + M * PAD;
    auto together = [] { asm volatile("bar.sync 2, %0;" ::"n"(32 * MAKERS) : "memory"); };
    int* blocks = (int*)units + 4;                   // [2][WARPS] of the pages
    u32* centers = (u32*)(blocks + 2 * WARPS);       // [KC * 4] four bytes
    const int side = thread / ANGLES, channel = 2 * (thread % ANGLES);  // that a thread turns
    const float frequency[2] = {TURN ? b.rope[channel] : 0.0f, TURN ? b.rope[channel + 1] : 0.0f};
    u32 round = 0;
    while (true) {
        int low, high;
        pages_of(*walk, walk->begin, walk->end, b.costs, &low, &high);
        const int head = walk->head;
        const int* block = b.block + (u64)walk->row * b.capacity;
        auto block_at = [&](int page) { return TURN && low < high ? block[min(page, high - 1)] : 0; };
        // what the first pages need is asked for before the operands
        const int first_position = b.first_position[walk->row], first_block = block_at(low + thread);
        const int query = min(maker, M - 1);
        const bool has = walk->tile * M + query < b.group * b.queries;
        const State* from = query_at(b.q, *walk, has ? query : 0, b.query_heads, b.queries, b.group);
        State own[OF_LANE], partner[OF_LANE];
#pragma unroll
        for (int i = 0; i < OF_LANE; ++i) {
            const int d = min(lane + 32 * i, D_K - 1);
            own[i] = from[d], partner[i] = TURN ? from[(int)b.rope[2 * ROPE_D + d]] : own[i];
        }
        const int columns = tiles_of(b.heads, head), all = MEANS + columns + 1;  // tiles
        const float2 about = b.about[head];
        const u32 center = b.centers[head * KC * 4 + min(thread, KC * 4 - 1)];
        uint4 a[MAKER_TILES][KS];
#pragma unroll
        for (int i = 0; i < MAKER_TILES; ++i) {
            const int u = i * MAKERS + maker;
#pragma unroll
            for (int k = 0; k < KS; ++k)
                a[i][k] = u < MADE_TILES ? b.operands[((head * MADE_TILES + u) * KS + k) * 32 + lane] : uint4{};
        }
        const int start = first_position + b.sinks;
        together();  // nobody reads the queries before
        if (thread < WARPS) blocks[(round & 1) * WARPS + thread] = first_block;
        if (thread < KC * 4) centers[thread] = center;
        float square = 0.0f;
#pragma unroll
        for (int i = 0; i < OF_LANE; ++i) {
            const int d = lane + 32 * i;
            if (d >= D_K || maker >= M) continue;
            const float x = has ? wide(own[i]) * b.scale : 0.0f;
            plain[query * PAD + d] = x, square += x * x;
            mates[query * PAD + d] = TURN && has ? wide(partner[i]) * b.scale * b.rope[ROPE_D + d] : 0.0f;
        }
        for (int o = 16; o; o >>= 1) square += __shfl_xor_sync(0xffffffffu, square, o);
        if (lane == 0 && maker < M) units[maker] = unit_of(square, about.x);
        together();
        float inverse[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) inverse[i] = b.unscale / units[min(n0 + i, M - 1)];
        const int middles = maker == 0 ? (int)about.y * SHIFT : 0;
        for (int base = low; base < high; base += WARPS, ++round) {
            const int count = min(high - base, WARPS);
            const int next_block = block_at(base + WARPS + thread);
            if (base > low) together();  // nobody reads what was turned before
            if (side < SIDES) {
#pragma unroll 1
                for (int i = 0; i < WARPS; i += SIDES) {
                    const int page = i + side;
                    if (page >= count) break;
                    const float position = (float)(start + blocks[(round & 1) * WARPS + page] * BLOCK);
                    const float2 one = turn_of(position * frequency[0]), two = turn_of(position * frequency[1]);
#pragma unroll
                    for (int d = channel; d < D_K; d += 2 * ANGLES) {
                        u8* to = turned + (page >> 1) * (KS * 256) + (page & 1) * 64 + (d >> 3) * 128 + (d & 6) * 2;
#pragma unroll
                        for (int r = 0; r < 4; ++r) {
                            const int n = (r + (d >> 3)) & 3;  // lanes write to different banks
                            const float2 x = *(const float2*)(plain + min(n, M - 1) * PAD + d);
                            const float2 y = *(const float2*)(mates + min(n, M - 1) * PAD + d);
                            *(u32*)(to + n * 16) =
                                half2_of(x.x * one.x + y.x * one.y, x.y * two.x + y.y * two.y);
                        }
                    }
                }
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            together();
            const u32 half = round & 1;  // of two places for what is made
            const u32 barrier = shared_address(b.warps) + min(lane, WARPS - 1) * b.warp_bytes + 8 * half;
            if (lane < WARPS) wait(barrier + FREE_AT, (round >> 1 & 1) ^ 1);
            __syncwarp();
            const int TWO = 2 * b.warp_bytes;
            u8* part = b.warps + half * MADE_PAGE;
            u8* of_column = part + (c >> 1) * b.warp_bytes;            // the page's that a lane's sums are of
            u8* of_query = part + (g >> 2) * b.warp_bytes + QUERY_AT;  // the same, transposed
            int z[WARPS / 2] = {};
#pragma unroll
            for (int i = 0; i < MAKER_TILES; ++i) {
                const int u = i * MAKERS + maker;
                const u32 middle = i * MAKERS >= MEANS ? centers[min(u - MEANS, KC - 1) * 4 + c] : 0;
                if (i * MAKERS >= all) break;
                float d[2 * WARPS];
                multiply(d, a[i], shared_address(turned));
                // what is made where there is no page is not read
                if (i * MAKERS < MEANS) {
#pragma unroll
                    for (int h = 0; h < WARPS / 2; ++h)
                        store_means(of_column + h * TWO + MEANS_AT, u, d + 4 * h, lane);
                } else if (u - MEANS < columns) {
#pragma unroll
                    for (int h = 0; h < WARPS / 2; ++h)
                        store_queries(of_query + h * TWO + PAGE_TERMS + (u - MEANS) * Q_CHUNK, d + 4 * h, &z[h], middle,
                                      inverse, b.unscale, true, lane);
                } else if (u - MEANS == columns) {
#pragma unroll
                    for (int h = 0; h < WARPS / 2; ++h) {
                        float* gain = (float*)(of_column + h * TWO + QUERY_AT) + MAKERS * 4;
                        store_gain(gain, d + 4 * h, true, lane);
                        if (lane < 4) *(float2*)(gain + 4 + n0) = *(const float2*)(units + n0);
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < WARPS / 2; ++h) {
                const int sum = sum_of_columns(z[h]) - middles;
                if (c == 0 && (g & 3) < M) ((int*)(of_query + h * TWO))[(g & 3) * MAKERS + maker] = sum;
            }
            __syncwarp();
            if (lane < WARPS) arrive(barrier + MADE_AT);
            if (thread < WARPS) blocks[(round & 1 ^ 1) * WARPS + thread] = next_block;
        }
        const bool last = is_last(walk, b.costs);
        __syncwarp();  // all have read where it was
        if (last) return;
        go_on(walk, b.folded, b.tiles, b.costs, lane);
    }
}

#undef M4
