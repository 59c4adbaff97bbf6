// What all kernels here begin with.
//
// DTYPE (of queries and exact states: 0 float16, 1 bfloat16, 2 float32) and HEADS come as macros.

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
// copies may know of barriers that have been shown
__device__ __forceinline__ void init_barrier(u32 barrier, u32 arrivals = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void show_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;");
    asm volatile("fence.proxy.async.shared::cta;");
}
__device__ __forceinline__ void begin_barrier(u32 barrier) {
    init_barrier(barrier);
    show_barriers();
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

// what will be read comes nearer, a sector of 32 bytes
__device__ __forceinline__ void bring_near(const void* from) {
    asm volatile("prefetch.global.L1 [%0];" ::"l"(from));
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
// The places (a row, tile of queries and head) are laid end to end, each as long as what it takes to begin
// and its pages, and every program takes the next piece, all of them equally long: one that goes on to
// another place has fewer pages. Items of exact tokens go round in the same way; a program with one more of
// them gets a shorter piece, by `exact_cost` at most. Program b and the place p that it works at meet in
// record b + p: there are `programs` + places of them, as both only grow.

struct Costs {
    const int* heads;  // of a page of all heads before
    u32 all, start;    // of a page of all heads; of beginning at a place

    __device__ __forceinline__ u32 line(int pages) const { return pages ? pages * all + HEADS * start : 0; }
    __device__ __forceinline__ u32 page(int head) const { return heads[head + 1] - heads[head]; }
    // where a head of a line begins
    __device__ __forceinline__ u32 begin(int head, int pages) const { return heads[head] * pages + head * start; }
};

struct Cut {
    u32 programs, inverse;  // 2^32 / programs
    u32 total;              // cost of all places
    u32 items, exact_cost;  // of an item of exact tokens
};

// pages of a row, one a lane
__device__ __forceinline__ int pages_at(const int* folded, int row, int rows) { return row < rows ? folded[row] : 0; }

// here: `pages_at` of the first rows
__device__ __forceinline__ Cut cut_of(const int* folded, int here, int rows, int tiles, const Costs& costs, u32 items,
                                      u32 exact_cost, u32 programs, u32 inverse) {
    u32 lines = costs.line(here);
    for (int i = (threadIdx.x & 31) + 32; i < rows; i += 32) lines += costs.line(folded[i]);
    Cut cut{programs, inverse, __reduce_add_sync(0xffffffffu, lines) * tiles, items, 0};
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

// where a piece begins: the row and tile of queries, the begin of that line and its cost, the head
struct Place {
    u32 line_begin, line_cost;
    int row, tile, head, pages;
};

__device__ __forceinline__ Place place_of(u32 begin, const int* folded, int here, const Costs& costs, int rows,
                                          int tiles, int lane) {
    Place place{};
    for (int base = 0; base < rows; base += 32) {
        const int n = base ? pages_at(folded, base + lane, rows) : here;
        const u32 mine = costs.line(n) * tiles;
        u32 sum = mine;
        for (int o = 1; o < 32; o <<= 1) {
            u32 before = __shfl_up_sync(0xffffffffu, sum, o);
            sum += lane >= o ? before : 0;
        }
        const u32 all = __shfl_sync(0xffffffffu, sum, 31), rest = begin - place.line_begin;
        if (rest < all) {
            const int k = __popc(__ballot_sync(0xffffffffu, sum <= rest));
            place.row = base + k, place.pages = __shfl_sync(0xffffffffu, n, k);
            place.line_begin += __shfl_sync(0xffffffffu, sum - mine, k);
            break;
        }
        place.line_begin += all;
    }
    place.line_cost = costs.line(place.pages);
    if (tiles > 1 && place.pages) {
        place.tile = (begin - place.line_begin) / place.line_cost;
        place.line_begin += place.tile * place.line_cost;
    }
    for (int h = 1; h < HEADS; h += 32)
        place.head += __popc(__ballot_sync(0xffffffffu, h + lane < HEADS && begin - place.line_begin >=
                                                            costs.begin(h + lane, place.pages)));
    return place;
}
// pages of the place that belong to a piece, from `low` on: a page is of the piece that its end lies in
__device__ __forceinline__ void pages_of(const Place& place, u32 begin, u32 end, const Costs& costs, int* low,
                                         int* high) {
    const u32 first = place.line_begin + costs.begin(place.head, place.pages) + costs.start;
    const u32 cost = costs.page(place.head);
    *low = begin > first ? (begin - first) / cost : 0;
    *high = end > first ? min((end - first) / cost, (u32)place.pages) : 0;
}
