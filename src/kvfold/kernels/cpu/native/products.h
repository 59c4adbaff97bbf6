// Products of small float matrices.
#pragma once

#include "simd.h"

namespace kvfold {
namespace KVFOLD_NAMESPACE {
namespace {

constexpr int kRows = 4;                            // queries worked on together
constexpr int kWide = KVFOLD_BITS == 512 ? 4 : 2;   // vectors of columns worked on together

template <int M, int N>
INLINE void product_block(int depth, const float* a, int64_t lda, const float* w, int64_t ldw,
                          float* out, int64_t ldo, int columns) {
  F acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n)
      acc[m][n] = load_some(out + m * ldo + n * kLanes, columns - n * kLanes);
  if (columns >= N * kLanes) {
    for (int k = 0; k < depth; ++k) {
      F row[N];
      for (int n = 0; n < N; ++n) row[n] = load<F>(w + k * ldw + n * kLanes);
      for (int m = 0; m < M; ++m) {
        const F x = a[m * lda + k] - F{};  // `all` adds, or the sign of -0 were lost
        for (int n = 0; n < N; ++n) acc[m][n] += x * row[n];
      }
    }
  } else {
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < N; ++n) {
        const F row = load_some(w + k * ldw + n * kLanes, columns - n * kLanes);
        for (int m = 0; m < M; ++m) acc[m][n] += all(a[m * lda + k]) * row;
      }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n)
      store_some(out + m * ldo + n * kLanes, acc[m][n], columns - n * kLanes);
}

template <int M>
static void product_rows(int depth, int columns, const float* a, int64_t lda, const float* w,
                         int64_t ldw, float* out, int64_t ldo) {
  int n = 0;
  for (; n + kWide * kLanes <= columns; n += kWide * kLanes)
    product_block<M, kWide>(depth, a, lda, w + n, ldw, out + n, ldo, kWide * kLanes);
  for (; n < columns; n += kLanes)
    product_block<M, 1>(depth, a, lda, w + n, ldw, out + n, ldo, columns - n);
}

// out [rows][columns] += a [rows][depth] . w [depth][columns]
static void add_product(int rows, int depth, int columns, const float* a, int64_t lda,
                        const float* w, int64_t ldw, float* out, int64_t ldo) {
  int m = 0;
  for (; m + 4 <= rows; m += 4)
    product_rows<4>(depth, columns, a + m * lda, lda, w, ldw, out + m * ldo, ldo);
  a += m * lda, out += m * ldo;
  switch (rows - m) {
    case 1: return product_rows<1>(depth, columns, a, lda, w, ldw, out, ldo);
    case 2: return product_rows<2>(depth, columns, a, lda, w, ldw, out, ldo);
    case 3: return product_rows<3>(depth, columns, a, lda, w, ldw, out, ldo);
    default: return;
  }
}

// What two vectors of `kShortNorm` at most, as whole numbers, give is within int32.
constexpr float kShortNorm = 46000.0f;

// `x` [n], n even, as 16-bit numbers of a norm up to kShortNorm; the value of 1
static float to_shorts(const float* x, int n, int16_t* out) {
  F squares{}, most{};
  for (int i = 0; i < n; i += kLanes) {
    const F y = load_some(x + i, n - i);
    squares += y * y, most = larger(most, larger(y, -y));
  }
  const float norm = __builtin_sqrtf(sum(squares)) / kShortNorm, top = top_of(most) / 32767.0f;
  const float unit = norm > top ? norm : top, inverse = unit > 0 ? 1.0f / unit : 0.0f;
  for (int i = 0; i < n; i += kLanes) {
    typedef int16_t S __attribute__((vector_size(kBytes / 2)));
    const S y = __builtin_convertvector(nearest(load_some(x + i, n - i) * inverse), S);
    memcpy(out + i, &y, sizeof(int16_t) * static_cast<size_t>(n - i < kLanes ? n - i : kLanes));
  }
  return unit;
}

template <int M, int N>
INLINE void short_block(int pairs, const int32_t* a, int64_t lda, const int16_t* w, int64_t ldw,
                        const float* unit, const float* by, float* out, int64_t ldo, int columns) {
  I acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = I{};
  for (int k = 0; k < pairs; ++k) {
    I row[N];
    for (int n = 0; n < N; ++n) row[n] = load<I>(w + 2 * (k * ldw + n * kLanes));
    for (int m = 0; m < M; ++m) {
      const I x = I{} + a[m * lda + k];
      for (int n = 0; n < N; ++n) acc[m][n] = dot_pairs(acc[m][n], x, row[n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n)
      store_some(out + m * ldo + n * kLanes,
                 to_float(acc[m][n]) * load<F>(by + n * kLanes) * unit[m], columns - n * kLanes);
}

template <int M>
static void short_rows(int pairs, int columns, const int32_t* a, int64_t lda, const int16_t* w,
                       int64_t ldw, const float* unit, const float* by, float* out, int64_t ldo) {
  int n = 0;
  for (; n + kWide * kLanes <= ldw && n < columns; n += kWide * kLanes)
    short_block<M, kWide>(pairs, a, lda, w + 2 * n, ldw, unit, by + n, out + n, ldo, columns - n);
  for (; n < columns; n += kLanes)
    short_block<M, 1>(pairs, a, lda, w + 2 * n, ldw, unit, by + n, out + n, ldo, columns - n);
}

// out [rows][columns] = a [rows][2 pairs] . w [pairs][ldw][2], each row times `unit`, each column
// times `by`; ldw is a multiple of 16
static void short_product(int rows, int pairs, int columns, const int16_t* a, const int16_t* w,
                          int64_t ldw, const float* unit, const float* by, float* out, int64_t ldo) {
  const int32_t* x = reinterpret_cast<const int32_t*>(a);
  for (int m = 0; m < rows; m += 4, x += 4 * pairs, out += 4 * ldo) {
    switch (rows - m) {
      case 1: short_rows<1>(pairs, columns, x, pairs, w, ldw, unit + m, by, out, ldo); break;
      case 2: short_rows<2>(pairs, columns, x, pairs, w, ldw, unit + m, by, out, ldo); break;
      case 3: short_rows<3>(pairs, columns, x, pairs, w, ldw, unit + m, by, out, ldo); break;
      default: short_rows<4>(pairs, columns, x, pairs, w, ldw, unit + m, by, out, ldo); break;
    }
  }
}

// the sums of four vectors
INLINE F4 sums(F a, F b, F c, F d) {
  const F x = pairs(pairs(a, b), pairs(c, d));
  F4 total = quarter(x, 0);
  for (int i = 1; i < kBytes / 16; ++i) total += quarter(x, i);
  return total;
}

// out [rows][count] += a [rows][depth] . x [count][depth]^T
static void add_dots(int rows, int depth, int count, const float* a, int64_t lda, const float* x,
                     int64_t ldx, float* out, int64_t ldo) {
  for (int m = 0; m < rows; m += kRows) {
    const int some = rows - m < kRows ? rows - m : kRows;
    for (int n = 0; n < count; ++n) {
      F acc[kRows] = {};
      for (int k = 0; k < depth; k += kLanes) {
        const F y = load_some(x + n * ldx + k, depth - k);
        for (int i = 0; i < kRows; ++i)
          if (i < some) acc[i] += load_some(a + (m + i) * lda + k, depth - k) * y;
      }
      const F4 total = sums(acc[0], acc[1], acc[2], acc[3]);
      for (int i = 0; i < some; ++i) out[(m + i) * ldo + n] += total[i];
    }
  }
}

INLINE float dot_float(const float* a, const float* b, int n) {
  F acc{};
  for (int k = 0; k < n; k += kLanes) acc += load_some(a + k, n - k) * load_some(b + k, n - k);
  return sum(acc);
}

INLINE void zero(float* x, int64_t n) { memset(x, 0, sizeof(float) * static_cast<size_t>(n)); }

}  // namespace
}  // namespace KVFOLD_NAMESPACE
}  // namespace kvfold
