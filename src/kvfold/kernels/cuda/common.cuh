// What all kernels here begin with; `source` in __init__.py puts it before each of them.
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
