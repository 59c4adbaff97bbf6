// One vector width, chosen by KVFOLD_BITS: 512 (AVX-512 VNNI), 256 (AVX2), 128 (SSE2, NEON, any).
// Arithmetic is the compiler's own on vector types; only what it cannot say is written by hand.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace kvfold {
namespace KVFOLD_NAMESPACE {
namespace {

constexpr int kBytes = KVFOLD_BITS / 8;
constexpr int kLanes = kBytes / 4;

typedef float F __attribute__((vector_size(kBytes)));
typedef int32_t I __attribute__((vector_size(kBytes)));
typedef uint32_t W32 __attribute__((vector_size(kBytes)));
typedef uint16_t H __attribute__((vector_size(kBytes)));
typedef uint8_t U __attribute__((vector_size(kBytes)));
typedef float F4 __attribute__((vector_size(16)));
typedef uint16_t H8 __attribute__((vector_size(16)));
typedef uint8_t U8 __attribute__((vector_size(8)));

#define INLINE static inline __attribute__((always_inline))

template <class T>
INLINE T load(const void* p) {
  T x;
  memcpy(&x, p, sizeof(T));
  return x;
}
template <class T>
INLINE void store(void* p, T x) {
  memcpy(p, &x, sizeof(T));
}
template <class To, class From>
INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}
INLINE F all(float x) { return F{} + x; }
INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
INLINE F larger(F a, F b) { return a > b ? a : b; }
INLINE F smaller(F a, F b) { return a < b ? a : b; }

// the first n lanes, zeros behind them
INLINE F load_some(const float* p, int n) {
  if (n >= kLanes) return load<F>(p);
#if KVFOLD_BITS == 512
  return bits<F>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << n) - 1), p));
#else
  F x{};
  memcpy(&x, p, sizeof(float) * static_cast<unsigned>(n));
  return x;
#endif
}
INLINE void store_some(float* p, F x, int n) {
  if (n >= kLanes) return store(p, x);
#if KVFOLD_BITS == 512
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1 << n) - 1), bits<__m512>(x));
#else
  memcpy(p, &x, sizeof(float) * static_cast<unsigned>(n));
#endif
}

// the first n lanes, `other` behind them
INLINE F first(F x, int n, float other) {
  if (n >= kLanes) return x;
  I lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < I{} + n ? x : all(other);
}

// the nearest whole numbers, those half-way away from zero
INLINE I nearest(F x) {
  const W32 sign = bits<W32>(x) & 0x80000000u;
  return __builtin_convertvector(x + bits<F>(sign | bits<W32>(all(0.5f))), I);
}

typedef float Half __attribute__((vector_size(kBytes / 2)));

// the lower or upper half
INLINE Half half_of(F x, int i) {
#if KVFOLD_BITS == 512
  return bits<Half>(i ? _mm512_extractf32x8_ps(bits<__m512>(x), 1)
                      : _mm512_castps512_ps256(bits<__m512>(x)));
#elif KVFOLD_BITS == 256
  return bits<Half>(i ? _mm256_extractf128_ps(bits<__m256>(x), 1)
                      : _mm256_castps256_ps128(bits<__m256>(x)));
#else
  return i ? Half{x[2], x[3]} : Half{x[0], x[1]};
#endif
}

// 16 bytes number `i`
INLINE F4 quarter(F x, int i) {
#if KVFOLD_BITS == 512
  const __m512 y = bits<__m512>(x);
  switch (i) {  // the compiler's own way goes through memory
    case 0: return bits<F4>(_mm512_castps512_ps128(y));
    case 1: return bits<F4>(_mm512_extractf32x4_ps(y, 1));
    case 2: return bits<F4>(_mm512_extractf32x4_ps(y, 2));
    default: return bits<F4>(_mm512_extractf32x4_ps(y, 3));
  }
#elif KVFOLD_BITS == 256
  return bits<F4>(half_of(x, i));
#else
  return i ? F4{} : bits<F4>(x);
#endif
}

INLINE float sum(F x) {
  F4 y = quarter(x, 0);
  for (int i = 1; i < kBytes / 16; ++i) y += quarter(x, i);
  return (y[0] + y[1]) + (y[2] + y[3]);
}
INLINE float top_of(F x) {
  F4 y = quarter(x, 0);
  for (int i = 1; i < kBytes / 16; ++i) {
    const F4 z = quarter(x, i);
    y = z > y ? z : y;
  }
  const float a = y[0] > y[1] ? y[0] : y[1], b = y[2] > y[3] ? y[2] : y[3];
  return a > b ? a : b;
}

// the lowest bytes of the lanes to `out`, the next ones to `out + stride`, ...
INLINE void store_limbs(I x, int limbs, int8_t* out, int64_t stride) {
#if KVFOLD_BITS == 512
  // all limbs with two shuffles; a narrowing store of each is slow
  const __m512i bytes = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i words = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const F y = bits<F>(_mm512_permutexvar_epi32(words, _mm512_shuffle_epi8(bits<__m512i>(x), bytes)));
  store(out, quarter(y, 0)), store(out + stride, quarter(y, 1));
  if (limbs == 3) store(out + 2 * stride, quarter(y, 2));
#else
  typedef int8_t B __attribute__((vector_size(kLanes)));
  for (int l = 0; l < limbs; ++l)
    store(out + l * stride, __builtin_convertvector(x >> (8 * l), B));
#endif
}

// towards the second-level cache: the first one holds what is being worked on
INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// even bytes of each 16, then odd ones
INLINE U split(U x) {
#if KVFOLD_BITS == 512
  const __m512i order = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  return bits<U>(_mm512_shuffle_epi8(bits<__m512i>(x), order));
#elif KVFOLD_BITS == 256
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  return bits<U>(_mm256_shuffle_epi8(bits<__m256i>(x), order));
#elif defined(__SSE2__)
  const __m128i y = bits<__m128i>(x);
  return bits<U>(_mm_packus_epi16(_mm_and_si128(y, _mm_set1_epi16(0xff)), _mm_srli_epi16(y, 8)));
#elif defined(__ARM_NEON)
  const uint8x16_t y = bits<uint8x16_t>(x);
  return bits<U>(vuzp1q_u8(y, y), vuzp2q_u8(y, y));
#else
  U y;
  for (int i = 0; i < kBytes; ++i) {
    const int in = i & 15, from = in < 8 ? 2 * in : 2 * (in - 8) + 1;
    y[i] = x[(i & ~15) + from];
  }
  return y;
#endif
}

// digit number `at` of each byte
template <int kWidth>
INLINE U digit(U x, int at) {
  constexpr uint8_t mask = (1 << kWidth) - 1;
  return bits<U>(bits<H>(x) >> static_cast<uint16_t>(kWidth * at)) & mask;
}

// acc + sums of products of four neighbours, digits (0 to 127) times signed bytes
INLINE I dot(I acc, U digits, U limbs) {
#if KVFOLD_BITS == 512
  return bits<I>(_mm512_dpbusd_epi32(bits<__m512i>(acc), bits<__m512i>(digits),
                                     bits<__m512i>(limbs)));
#elif KVFOLD_BITS == 256
  const __m256i pairs = _mm256_maddubs_epi16(bits<__m256i>(digits), bits<__m256i>(limbs));
  return acc + bits<I>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__SSE2__)
  const __m128i d = bits<__m128i>(digits), s = bits<__m128i>(limbs), zero = _mm_setzero_si128();
  const __m128i low = _mm_madd_epi16(_mm_unpacklo_epi8(d, zero),
                                     _mm_srai_epi16(_mm_unpacklo_epi8(zero, s), 8));
  const __m128i high = _mm_madd_epi16(_mm_unpackhi_epi8(d, zero),
                                      _mm_srai_epi16(_mm_unpackhi_epi8(zero, s), 8));
  const F4 a = bits<F4>(low), b = bits<F4>(high);
  const __m128i even = bits<__m128i>(_mm_shuffle_ps(bits<__m128>(a), bits<__m128>(b), 0x88));
  const __m128i odd = bits<__m128i>(_mm_shuffle_ps(bits<__m128>(a), bits<__m128>(b), 0xdd));
  return acc + bits<I>(_mm_add_epi32(even, odd));
#elif defined(__ARM_FEATURE_DOTPROD)
  return bits<I>(vdotq_s32(bits<int32x4_t>(acc), bits<int8x16_t>(digits),
                           bits<int8x16_t>(limbs)));
#elif defined(__ARM_NEON)
  const int8x16_t d = bits<int8x16_t>(digits), s = bits<int8x16_t>(limbs);
  const int16x8_t low = vmull_s8(vget_low_s8(d), vget_low_s8(s));
  const int16x8_t high = vmull_s8(vget_high_s8(d), vget_high_s8(s));
  const int32x4_t pairs = vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
  return bits<I>(vaddq_s32(bits<int32x4_t>(acc), pairs));
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j)
      acc[i] += int32_t(digits[4 * i + j]) * int32_t(int8_t(limbs[4 * i + j]));
  return acc;
#endif
}

// acc + sums of products of two neighbours, 16 bits each
INLINE I dot_pairs(I acc, I a, I b) {
#if KVFOLD_BITS == 512
  return bits<I>(_mm512_dpwssd_epi32(bits<__m512i>(acc), bits<__m512i>(a), bits<__m512i>(b)));
#elif KVFOLD_BITS == 256
  return acc + bits<I>(_mm256_madd_epi16(bits<__m256i>(a), bits<__m256i>(b)));
#elif defined(__SSE2__)
  return acc + bits<I>(_mm_madd_epi16(bits<__m128i>(a), bits<__m128i>(b)));
#else
  return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// `size` bytes (4, 8, 16, 32 or 64), repeated
template <int kSize>
INLINE U repeated(const void* p) {
  if constexpr (kSize >= kBytes) return load<U>(p);
#if KVFOLD_BITS == 512
  if constexpr (kSize == 32)
    return bits<U>(_mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
  if constexpr (kSize == 16)
    return bits<U>(_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  if constexpr (kSize == 8) return bits<U>(_mm512_set1_epi64(load<int64_t>(p)));
#elif KVFOLD_BITS == 256
  if constexpr (kSize == 16)
    return bits<U>(
        _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  if constexpr (kSize == 8) return bits<U>(_mm256_set1_epi64x(load<int64_t>(p)));
#else
  if constexpr (kSize == 8) {
    const uint64_t x = load<uint64_t>(p);
    typedef uint64_t D __attribute__((vector_size(16)));
    return bits<U>(D{x, x});
  }
#endif
  return bits<U>(W32{} + load<uint32_t>(p));
}

// within each 16 bytes: a0 + a1, a2 + a3, b0 + b1, b2 + b3
INLINE F pairs(F a, F b) {
#if KVFOLD_BITS == 512
  const __m512 x = bits<__m512>(a), y = bits<__m512>(b);
  return bits<F>(_mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd)));
#elif KVFOLD_BITS == 256
  return bits<F>(_mm256_hadd_ps(bits<__m256>(a), bits<__m256>(b)));
#elif defined(__SSE2__)
  const __m128 x = bits<__m128>(a), y = bits<__m128>(b);
  return bits<F>(_mm_add_ps(_mm_shuffle_ps(x, y, 0x88), _mm_shuffle_ps(x, y, 0xdd)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return bits<F>(vpaddq_f32(bits<float32x4_t>(a), bits<float32x4_t>(b)));
#else
  return F{a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]};
#endif
}

// out [2 n]: a0 b0 a1 b1 ...
INLINE void interleave(const int8_t* a, const int8_t* b, int n, int8_t* out) {
  int i = 0;
#if defined(__SSE2__)
  for (; i + 16 <= n; i += 16) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i));
    const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i), _mm_unpacklo_epi8(x, y));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i + 16), _mm_unpackhi_epi8(x, y));
  }
  for (; i + 8 <= n; i += 8) {
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(a + i));
    const __m128i y = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i), _mm_unpacklo_epi8(x, y));
  }
#endif
  for (; i < n; ++i) out[2 * i] = a[i], out[2 * i + 1] = b[i];
}

// out [2 kLanes] words of 4 bytes: a0 b0 a1 b1 ...
INLINE void interleave_words(const void* a, const void* b, void* out) {
  const I x = load<I>(a), y = load<I>(b);
#if KVFOLD_BITS == 512
  const __m512i first =
      _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  store(out, _mm512_permutex2var_epi32(bits<__m512i>(x), first, bits<__m512i>(y)));
  store(static_cast<char*>(out) + kBytes,
        _mm512_permutex2var_epi32(bits<__m512i>(x), second, bits<__m512i>(y)));
#else
  int32_t* to = static_cast<int32_t*>(out);
  for (int i = 0; i < kLanes; ++i) to[2 * i] = x[i], to[2 * i + 1] = y[i];
#endif
}

// Of kLanes / 2 rows of 16 words, four columns each: per row their low bytes, then their high ones.
// With 512 bits the rows stand as 0 2 1 3 4 6 5 7.
INLINE void by_token(const uint8_t* p, U* out) {
  F x[4];
  for (int i = 0; i < 4; ++i) x[i] = bits<F>(split(load<U>(p + i * kBytes)));
#if KVFOLD_BITS == 512
  for (int i = 0; i < 2; ++i) {
    __m512 y[2];
    for (int j = 0; j < 2; ++j) {
      const __m512 a = bits<__m512>(x[2 * j]), b = bits<__m512>(x[2 * j + 1]);
      y[j] = i ? _mm512_shuffle_ps(a, b, 0xdd) : _mm512_shuffle_ps(a, b, 0x88);
    }
    out[i] = bits<U>(_mm512_shuffle_f32x4(y[0], y[1], 0x88));
    out[i + 2] = bits<U>(_mm512_shuffle_f32x4(y[0], y[1], 0xdd));
  }
#elif KVFOLD_BITS == 256
  for (int i = 0; i < 2; ++i) {
    __m256 y[2];
    for (int j = 0; j < 2; ++j) {
      const __m256 a = bits<__m256>(x[2 * j]), b = bits<__m256>(x[2 * j + 1]);
      y[j] = i ? _mm256_shuffle_ps(a, b, 0xdd) : _mm256_shuffle_ps(a, b, 0x88);
    }
    out[i] = bits<U>(_mm256_permute2f128_ps(y[0], y[1], 0x20));
    out[i + 2] = bits<U>(_mm256_permute2f128_ps(y[0], y[1], 0x31));
  }
#elif defined(__SSE2__)
  for (int i = 0; i < 2; ++i) {
    const __m128 a = bits<__m128>(x[i]), b = bits<__m128>(x[2 + i]);
    out[2 * i] = bits<U>(_mm_shuffle_ps(a, b, 0x88));
    out[2 * i + 1] = bits<U>(_mm_shuffle_ps(a, b, 0xdd));
  }
#else
  for (int i = 0; i < 4; ++i) {
    const F a = x[i >> 1], b = x[2 + (i >> 1)];
    out[i] = bits<U>(F{a[i & 1], a[2 + (i & 1)], b[i & 1], b[2 + (i & 1)]});
  }
#endif
}

// the even lanes of two vectors, and the odd ones
INLINE void apart(F a, F b, F* even, F* odd) {
#if KVFOLD_BITS == 512
  const __m512i at =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i next = _mm512_add_epi32(at, _mm512_set1_epi32(1));
  *even = bits<F>(_mm512_permutex2var_ps(bits<__m512>(a), at, bits<__m512>(b)));
  *odd = bits<F>(_mm512_permutex2var_ps(bits<__m512>(a), next, bits<__m512>(b)));
#else
  for (int i = 0; i < kLanes / 2; ++i) {
    (*even)[i] = a[2 * i], (*even)[kLanes / 2 + i] = b[2 * i];
    (*odd)[i] = a[2 * i + 1], (*odd)[kLanes / 2 + i] = b[2 * i + 1];
  }
#endif
}

INLINE F reversed(F x) {
#if KVFOLD_BITS == 512
  const __m512i at = _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return bits<F>(_mm512_permutexvar_ps(at, bits<__m512>(x)));
#elif KVFOLD_BITS == 256
  const __m256i at = _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  return bits<F>(_mm256_permutevar8x32_ps(bits<__m256>(x), at));
#else
  return F{x[3], x[2], x[1], x[0]};
#endif
}

// Within each 16 bytes of four vectors: the words of 4 bytes transposed.
INLINE void transpose_words(const F* x, F* out) {
#if KVFOLD_BITS == 512
#define KVFOLD_UNPACK(half, a, b) \
  bits<F>(_mm512_unpack##half##_epi32(bits<__m512i>(a), bits<__m512i>(b)))
#define KVFOLD_UNPACK2(half, a, b) \
  bits<F>(_mm512_unpack##half##_epi64(bits<__m512i>(a), bits<__m512i>(b)))
#elif KVFOLD_BITS == 256
#define KVFOLD_UNPACK(half, a, b) \
  bits<F>(_mm256_unpack##half##_epi32(bits<__m256i>(a), bits<__m256i>(b)))
#define KVFOLD_UNPACK2(half, a, b) \
  bits<F>(_mm256_unpack##half##_epi64(bits<__m256i>(a), bits<__m256i>(b)))
#endif
#if KVFOLD_BITS >= 256
  const F a = KVFOLD_UNPACK(lo, x[0], x[1]), b = KVFOLD_UNPACK(lo, x[2], x[3]);
  const F c = KVFOLD_UNPACK(hi, x[0], x[1]), d = KVFOLD_UNPACK(hi, x[2], x[3]);
  out[0] = KVFOLD_UNPACK2(lo, a, b), out[1] = KVFOLD_UNPACK2(hi, a, b);
  out[2] = KVFOLD_UNPACK2(lo, c, d), out[3] = KVFOLD_UNPACK2(hi, c, d);
#undef KVFOLD_UNPACK
#undef KVFOLD_UNPACK2
#elif defined(__SSE2__)
  __m128 y[4];
  for (int i = 0; i < 4; ++i) y[i] = bits<__m128>(x[i]);
  _MM_TRANSPOSE4_PS(y[0], y[1], y[2], y[3]);
  for (int i = 0; i < 4; ++i) out[i] = bits<F>(y[i]);
#else
  for (int i = 0; i < 4; ++i) out[i] = F{x[0][i], x[1][i], x[2][i], x[3][i]};
#endif
}

constexpr int kPiece = KVFOLD_BITS == 512 ? 64 : 16;  // bytes of a column taken at a time, at most

// kLanes columns of kColumn bytes, `stride` bytes apart: 4 bytes of every column in each of
// kColumn / 4 vectors, a column a lane, in the order that `columns_in_order` undoes.
template <int kColumn>
INLINE void by_column(const uint8_t* p, int64_t stride, U* out) {
  constexpr int kVectors = kColumn / 4;
  [[maybe_unused]] constexpr int kPer = kBytes / kColumn;
  F x[kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i += 4) {
    F y[4];
    for (int j = 0; j < 4; ++j) {
#if KVFOLD_BITS == 256
      y[j] = bits<F>(_mm256_inserti128_si256(
          _mm256_castsi128_si256(load<__m128i>(p + j * stride)), load<__m128i>(p + (4 + j) * stride), 1));
#else
      y[j] = load<F>(p + (i + j) * kPer * stride);
#endif
    }
    transpose_words(y, x + i);
  }
  if constexpr (kVectors == 4) {
    for (int i = 0; i < 4; ++i) out[i] = bits<U>(x[i]);
  }
#if KVFOLD_BITS == 512
#define KVFOLD_LANES(a, b, i) bits<F>(_mm512_shuffle_f32x4(bits<__m512>(a), bits<__m512>(b), i))
  if constexpr (kVectors == 8) {
    for (int i = 0; i < 4; ++i) {
      out[i] = bits<U>(KVFOLD_LANES(x[i], x[4 + i], 0x88));
      out[4 + i] = bits<U>(KVFOLD_LANES(x[i], x[4 + i], 0xdd));
    }
  }
  if constexpr (kVectors == 16) {
    for (int i = 0; i < 4; ++i) {
      const F a = KVFOLD_LANES(x[i], x[4 + i], 0x44), b = KVFOLD_LANES(x[8 + i], x[12 + i], 0x44);
      const F c = KVFOLD_LANES(x[i], x[4 + i], 0xee), d = KVFOLD_LANES(x[8 + i], x[12 + i], 0xee);
      out[i] = bits<U>(KVFOLD_LANES(a, b, 0x88)), out[4 + i] = bits<U>(KVFOLD_LANES(a, b, 0xdd));
      out[8 + i] = bits<U>(KVFOLD_LANES(c, d, 0x88));
      out[12 + i] = bits<U>(KVFOLD_LANES(c, d, 0xdd));
    }
  }
#undef KVFOLD_LANES
#endif
}

template <int kColumn>
INLINE F columns_in_order(F x) {
#if KVFOLD_BITS == 512
  constexpr int kPer = kBytes / kColumn;  // columns that lie side by side in a vector
  if constexpr (kPer > 1) {
    I at;
    for (int c = 0; c < kLanes; ++c)
      at[c] = 4 * (c / (4 * kPer) * kPer + c % kPer) + c / kPer % 4;
    return bits<F>(_mm512_permutexvar_ps(bits<__m512i>(at), bits<__m512>(x)));
  }
#endif
  return x;
}

// low [n] += the even lanes, high [n] += the odd ones, of rows as `by_token` leaves them
INLINE void add_halves(F x, float* low, float* high, int n) {
#if KVFOLD_BITS == 512
  const __m512i order = _mm512_setr_epi32(0, 4, 2, 6, 8, 12, 10, 14, 1, 5, 3, 7, 9, 13, 11, 15);
  x = bits<F>(_mm512_permutexvar_ps(order, bits<__m512>(x)));
#elif KVFOLD_BITS == 256
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  x = bits<F>(_mm256_permutevar8x32_ps(bits<__m256>(x), order));
#else
  x = F{x[0], x[2], x[1], x[3]};
#endif
  if (n == kLanes / 2) {
    store(low, load<Half>(low) + half_of(x, 0));
    store(high, load<Half>(high) + half_of(x, 1));
  } else {
    for (int i = 0; i < n; ++i) low[i] += x[i], high[i] += x[kLanes / 2 + i];
  }
}

INLINE float half(uint16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x);
#else
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, rest = x & 0x7fff;
  if (rest >= 0x7c00) return bits<float>(sign | 0x7f800000u | ((rest & 0x3ff) << 13));
  // as a float whose exponent is 112 too small: exact, subnormals too
  const float scaled = bits<float>(rest << 13) * 0x1p112f;
  return bits<float>(bits<uint32_t>(scaled) | sign);
#endif
}

INLINE uint16_t to_half(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, 0);
#else
  const uint32_t u = bits<uint32_t>(x), sign = (u >> 16) & 0x8000;
  const uint32_t rest = u & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
  if (rest < 0x38800000u) {  // subnormal: the addition rounds
    const uint32_t sum = bits<uint32_t>(bits<float>(rest) + 0.5f);
    return static_cast<uint16_t>(sign | (sum - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfff + ((rest >> 13) & 1)) >> 13));
#endif
}

INLINE float brain(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }
INLINE uint16_t to_brain(float x) {
  const uint32_t u = bits<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

INLINE float e4m3(uint8_t x) {
  if ((x & 0x7f) == 0x7f) return bits<float>(0x7fc00000u);
  const float y = bits<float>(static_cast<uint32_t>(x & 0x7f) << 20) * 0x1p120f;
  return (x & 0x80) ? -y : y;
}

// e^x, to about 1e-7; 0 below -87
INLINE F exponential(F x) {
  const F t = larger(x, all(-87.0f)) * 1.44269504f + 12582912.0f;
  const F n = t - 12582912.0f;
  const F r = larger(x, all(-87.0f)) - n * 0.693359375f - n * -2.12194440e-4f;
  F y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const I scale = (bits<I>(t) << 23) + 0x3f800000;
  return x < all(-87.0f) ? F{} : y * bits<F>(scale);
}

// tanh x, a rational approximation to a few units in the last place (Eigen's)
INLINE F hyperbolic_tangent(F x) {
  x = smaller(larger(x, all(-7.9053111f)), all(7.9053111f));
  const F s = x * x;
  F p = s * -2.76076847742355e-16f + 2.00018790482477e-13f;
  p = p * s + -8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = (p * s + 4.89352455891786e-03f) * x;
  F q = s * 1.19825839466702e-06f + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  return p / q;
}

}  // namespace
}  // namespace KVFOLD_NAMESPACE
}  // namespace kvfold
