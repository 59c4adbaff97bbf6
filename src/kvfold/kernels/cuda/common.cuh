// What all kernels here begin with.
//
// DTYPE (of queries and exact states) comes as a macro: 0 float16, 1 bfloat16, 2 float32.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;
typedef unsigned short u16;

#define BLOCK 128  // tokens of a page
#define LOWEST (-1.0e30f)
#define LOG2E 1.4426950408889634f

__device__ __forceinline__ float float_of_half(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
__device__ __forceinline__ u32 half2_of(float low, float high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ u32 transposed(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
__device__ __forceinline__ u32 bytes_of(u32 a, u32 b, u32 selector) {
    u32 y;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector));
    return y;
}

// cosine and sine of any angle: 2 pi in three parts, the first of which times a whole number is exact
__device__ __forceinline__ float2 turn_of(float angle) {
    float whole = floorf(angle * 0.15915494309189535f + 0.5f);
    angle = fmaf(whole, -6.28125f, angle);
    angle = fmaf(whole, -0.0019350051879882812f, angle);
    angle = fmaf(whole, -3.0199159819930186e-07f, angle);
    return make_float2(__cosf(angle), __sinf(angle));
}

#if DTYPE == 2
typedef float State;
__device__ __forceinline__ float wide(State x) { return x; }
__device__ __forceinline__ State narrow(float x) { return x; }
#elif DTYPE == 1
typedef u16 State;
__device__ __forceinline__ float wide(State x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ State narrow(float x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#else
typedef u16 State;
__device__ __forceinline__ float wide(State x) { return float_of_half(x); }
__device__ __forceinline__ State narrow(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#endif

#if DTYPE == 2
typedef float2 Pair;
__device__ __forceinline__ float2 wide(Pair x) { return x; }
#else
typedef u32 Pair;
__device__ __forceinline__ float2 wide(Pair x) { return make_float2(wide((State)x), wide((State)(x >> 16))); }
#endif

// --- products, and copies to shared memory ---------------------------------------------------------

__device__ __forceinline__ void product(float* d, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}
// a barrier of one arrival, before other threads or copies know of it
__device__ __forceinline__ void begin_barrier(u32 barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier));
    asm volatile("fence.mbarrier_init.release.cluster;");
    asm volatile("fence.proxy.async.shared::cta;");
}
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred p; again%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra again%=; }" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void copy(u32 to, u64 from, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// --- launches that begin before the one before has ended ------------------------------------------

__device__ __forceinline__ void wait_for_launch_before() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void let_next_launch_begin() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// --- which pages are whose ------------------------------------------------------------------------
//
// The pages of all lines (a row and tile of queries) and heads are laid end to end, each as long as
// `costs` says, and every program takes the next piece, all of them equally long. Items of exact tokens
// go round in the same way; a program with one more of them gets shorter pages, by `exact_cost` at
// most. Program b and the place p (line and head) that it works at meet in record b + p: there are
// `programs` + places of them, as both only grow.

struct Cut {
    u32 programs, inverse;  // 2^32 / programs
    u32 total;              // cost of all pages
    u32 items, exact_cost;  // of an item of exact tokens
};

// pages of a row, one a lane
__device__ __forceinline__ int pages_at(const int* folded, int row, int rows) { return row < rows ? folded[row] : 0; }

// here: `pages_at` of the first rows
__device__ __forceinline__ Cut cut_of(const int* folded, int here, int rows, int line_cost, u32 items, u32 exact_cost,
                                      u32 programs, u32 inverse) {
    u32 pages = here;
    for (int i = (threadIdx.x & 31) + 32; i < rows; i += 32) pages += folded[i];
    Cut cut{programs, inverse, __reduce_add_sync(0xffffffffu, pages) * line_cost, items, 0};
    cut.exact_cost = min(exact_cost, __umulhi(cut.total, inverse));  // no piece is shorter than nothing
    return cut;
}
// where a program begins, and its first item of exact tokens
__device__ __forceinline__ u32 begin_of(const Cut& cut, u32 program, u32* item) {
    u64 share = (u64)(program * cut.items) * cut.inverse;
    bool end = program >= cut.programs;
    *item = end ? cut.items : (u32)(share >> 32);
    // not below program / programs, so that a piece that begins with a place has none of the one before
    const u32 x = program * cut.inverse + program;
    return end ? cut.total : __umulhi(cut.total, x) + __umulhi(cut.exact_cost, (u32)share);
}

// where a piece begins: the row and tile of queries, its first page's cost and that of all of them, the head
struct Place {
    u32 line_begin, line_cost;
    int row, tile, head, pages;
};

__device__ __forceinline__ Place place_of(u32 begin, const int* folded, int here, const int* costs, int rows,
                                          int tiles, u32 all_costs, int lane) {
    int row = 0, pages = 0;
    u32 row_begin = 0;
    for (int base = 0; base < rows; base += 32) {
        int n = base ? pages_at(folded, base + lane, rows) : here, sum = n;
        for (int o = 1; o < 32; o <<= 1) {
            int before = __shfl_up_sync(0xffffffffu, sum, o);
            sum += lane >= o ? before : 0;
        }
        u32 here = (u32)__shfl_sync(0xffffffffu, sum, 31) * tiles * all_costs;
        if (begin - row_begin < here) {
            int k = __popc(__ballot_sync(0xffffffffu, sum * tiles * all_costs <= begin - row_begin));
            row = base + k, pages = __shfl_sync(0xffffffffu, n, k);
            row_begin += (__shfl_sync(0xffffffffu, sum, k) - pages) * tiles * all_costs;
            break;
        }
        row_begin += here;
    }
    const u32 line_cost = pages * all_costs;
    const int tile = tiles > 1 && pages ? (begin - row_begin) / line_cost : 0;
    Place place{row_begin + tile * line_cost, line_cost, row, tile, 0, pages};
    for (int h = 1; h < HEADS; h += 32)
        place.head += __popc(__ballot_sync(
            0xffffffffu, h + lane < HEADS && begin - place.line_begin >= costs[h + lane] * pages));
    return place;
}
// pages of the place that belong to a piece, from `low` on
__device__ __forceinline__ void pages_of(const Place& place, u32 begin, u32 end, const int* costs, int* low,
                                         int* high) {
    const u32 first = place.line_begin + costs[place.head] * place.pages;
    const u32 cost = costs[place.head + 1] - costs[place.head];
    *low = begin > first ? (begin - first) / cost : 0;
    *high = min((end - first) / cost, (u32)place.pages);
}
