#include "common.cuh"

#define WARPS 8  // half of a multiprocessor's registers, as a program of attention
#define OWN_AT_ONCE (D_K > 128 ? 1 : 2)
#include "columns.cuh"

// Queries of columns that hold for all pages of a row and KV head, for sm_90: the launch before attention
// where rows are few, so that each program of attention need not make them, while it finds its pages.
//
// Constants come as macros, see __init__.py: HEADS, M, D_K, Q_BYTES, K4, K2, K1 (slots of 16 columns of a
// section), DTYPE, WHOLE_KEYS.

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) send(
    const State* q, const int* heads, const uint4* operands, const u32* centers, const float2* about, u8* out,
    int query_heads, int queries, int group, int tiles, double scale, double unscale) {
    __shared__ __align__(16) u8 made[OWN_BYTES];
    // attention may begin: it reads what launches before this one have written, and waits for this one's
    wait_for_launch_before();
    let_next_launch_begin();
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, line = blockIdx.x / HEADS;
    const Place place{0, 0, line / tiles, line % tiles, (int)(blockIdx.x % HEADS), 0};
    const bool has = own_query(lane) + place.tile * M < group * queries;
    Own own;
    own.ask(query_at(q, place, has ? own_query(lane) : 0, query_heads, queries, group), place.head, operands, centers,
            about, warp, lane);
    own.make(made, has ? (float)scale : 0.0f, place.head, tiles_of(heads, place.head), operands, centers,
             (float)unscale, warp, lane);
    __syncthreads();
    if (warp == 0) own.finish(made, (uint4*)(out + (u64)blockIdx.x * Q_BYTES), lane);
}
