// Sections of digits against fixed-point numbers, exactly: 8-bit digits times int8 limbs in int32.
//
// A float becomes two or three int8 limbs under one scale for all that are summed: 16 bits where
// the model is half precision, 24 where it is float32. The sums do not depend on their order.
#pragma once

#include "operand.h"
#include "products.h"

namespace kvfold {
namespace KVFOLD_NAMESPACE {
namespace {

INLINE float largest(const float* x, int n) {
  F most{};
  for (int i = 0; i < n; i += kLanes) {
    const F y = load_some(x + i, n - i);
    most = larger(most, larger(y, -y));
  }
  return top_of(most);
}

// Numbers up to the limit of to_limbs as limbs of -128 to 127, one above the other.
template <int L>
INLINE I fixed_point(F x) {
  constexpr int32_t kMiddle = L == 3 ? 0x808080 : 0x8080;
  // 16 bits are rounded by an addition
  const I code = L == 3 ? nearest(x) : bits<I>(x + 12582912.0f);
  return (code + kMiddle) ^ kMiddle;
}

// `x` [n], none above `top`, to limbs [limbs][stride], behind n zeros up to `stride`, a multiple of
// kLanes; the value of the last limb's 1
static float to_limbs(const float* x, int n, float top, int limbs, int8_t* out, int64_t stride) {
  // what limbs of -128 to 127 hold, less what rounding may add
  const float limit = limbs == 3 ? 8355000.0f : 32638.0f;
  const float inverse = top > 0 ? limit / top : 0.0f;
  for (int i = 0; i < stride; i += kLanes) {
    const F y = i < n ? load_some(x + i, n - i) * inverse : F{};
    store_limbs(limbs == 3 ? fixed_point<3>(y) : fixed_point<2>(y), limbs, out + i, stride);
  }
  return top / limit;
}

template <int L>
INLINE F joined(const I* acc) {
  F x = to_float(acc[L - 1]);
  for (int l = L - 2; l >= 0; --l) x = x * 256.0f + to_float(acc[l]);
  return x;
}

// Token of digit `k` of word `u`, of a block cut into quarters (kvfold/packing.py).
INLINE int token_of(int k, int block, int words) { return (k & 3) * (block / 4) + (k >> 2) * words; }

// --- keys: chunks of 16 columns, each [words][16] ------------------------------------------------

constexpr int kWords = kLanes / 2;  // words of a column worked on together

// Bytes of a query's limbs in a pattern: whole cache lines, an odd number of them, so that the
// queries lie in different sets of the cache. Holds MAX_COLUMNS of tables.py.
constexpr int64_t kPatternRow = 35 * 64;

// Limbs of a query's columns as `key_rows` meets them: of 4 columns for the lower digits of a byte
// pair, then for the upper ones, which may belong to a segment with queries of its own.
INLINE void key_pattern(const int8_t* lower, const int8_t* upper, int columns, int8_t* out) {
  for (int c = 0; c < columns; c += kBytes) interleave_words(lower + c, upper + c, out + 2 * c);
}

struct KeyPatterns {
  const int8_t* data;   // [sets][queries][limbs][kPatternRow]
  int64_t set;          // bytes of a set
  int run;              // words that share a set; 0: one set for all
};

// scores [M][stride] += scale * sums over a section's columns. A vector holds 4 columns of kWords
// words, a lane what belongs to one token, so that nothing is summed across lanes. The next page's
// codes, `next` bytes further on, are fetched meanwhile.
template <int W, int L, int M>
static void key_rows(const uint8_t* const* chunk, int chunks, int block, int64_t next,
                     KeyPatterns patterns, const float* scale, float* scores, int64_t stride) {
  constexpr int kPlanes = 8 / W;
  const int words = block * W / 16;
  for (int u = 0; u < words; u += kWords) {
    const int some = words - u < kWords ? words - u : kWords;
#pragma GCC unroll 4
    for (int s = 0; s < kPlanes; s += 2) {
      const int8_t* first = patterns.data;
      const int8_t* second = patterns.data;
      if (patterns.run) {
        const int runs = words / patterns.run, at = u / patterns.run;
        first += (s * runs + at) * patterns.set;
        second += ((s + 1) * runs + at) * patterns.set;
      }
      I x[M][L], y[M][L];
      for (int m = 0; m < M; ++m)  // `= {}` would go through memory
        for (int l = 0; l < L; ++l) x[m][l] = y[m][l] = I{};
      for (int k = 0; k < chunks; ++k) {
        const uint8_t* from = chunk[k] + 32 * u;
        U raw[4];
        by_token(from, raw);
        if (s == 0)
          for (int i = 0; i < 4 * kBytes; i += 64) fetch(from + next + i);
        for (int j = 0; j < 4; ++j) {
          const U a = digit<W>(raw[j], s), b = digit<W>(raw[j], s + 1);
          for (int m = 0; m < M; ++m)
            for (int l = 0; l < L; ++l) {
              const int64_t at = (m * L + l) * kPatternRow + 32 * k + 8 * j;
              x[m][l] = dot(x[m][l], a, repeated<8>(first + at));
              y[m][l] = dot(y[m][l], b, repeated<8>(second + at));
            }
        }
      }
      for (int m = 0; m < M; ++m) {
        float* to = scores + m * stride + u;
        add_halves(joined<L>(x[m]) * scale[m], to + token_of(s, block, words),
                   to + token_of(kPlanes + s, block, words), some);
        add_halves(joined<L>(y[m]) * scale[m], to + token_of(s + 1, block, words),
                   to + token_of(kPlanes + s + 1, block, words), some);
      }
    }
  }
}

template <int W, int L>
static void key_section(const uint8_t* const* chunk, int chunks, int block, int64_t next,
                        KeyPatterns patterns, int queries, const float* scale, float* scores, int64_t stride) {
  constexpr int kMost = kBytes == 32 ? 2 : kRows;
  for (int m = 0; m < queries; m += kMost) {
    KeyPatterns here = patterns;
    here.data += m * L * kPatternRow;
    const float* by = scale + m;
    float* to = scores + m * stride;
    switch (queries - m < kMost ? queries - m : kMost) {
      case 1: key_rows<W, L, 1>(chunk, chunks, block, next, here, by, to, stride); break;
      case 2: key_rows<W, L, 2>(chunk, chunks, block, next, here, by, to, stride); break;
      case 3: key_rows<W, L, 3>(chunk, chunks, block, next, here, by, to, stride); break;
      case 4: key_rows<W, L, 4>(chunk, chunks, block, next, here, by, to, stride); break;
    }
  }
}

// --- values: [columns][words] --------------------------------------------------------------------

// Bytes of a column as `value_columns` reads it.
INLINE int column_bytes(int block, int width) {
  const int bytes = block * width / 8;
  return bytes <= 16 ? 16 : bytes <= 32 ? 32 : (bytes + 63) / 64 * 64;
}

// Limbs of a page's tokens as they meet the digits of a column, in parts that fill a vector:
// `out` [parts][planes][rows][part], of which this is one row.
template <int W>
static void value_pattern(const int8_t* limbs, int block, int part, int rows, int8_t* out) {
  constexpr int kPlanes = 8 / W;
  const int words = block * W / 16;
  for (int u = 0; u < words; u += part / 2) {
    const int some = words - u < part / 2 ? words - u : part / 2;
    for (int s = 0; s < kPlanes; ++s) {
      const int8_t* even = limbs + token_of(s, block, words) + u;
      const int8_t* odd = limbs + token_of(kPlanes + s, block, words) + u;
      interleave(even, odd, some, out);
      out += rows * part;
    }
  }
}

// out [M][stride] += scale * sums over the tokens of `pages` pages, for every column of a section, of
// digits less `centre`: taken off the integers, or the sums of large digits lose what the codes hold.
// `pattern` [pages][parts of a column][planes][M][L][kColumn] is met in that order. A vector holds 4
// bytes of kLanes columns, a lane what belongs to one column, so that nothing is summed across lanes.
template <int W, int L, int M, int kColumn>
static void value_columns(const uint8_t* const* page, int pages, int count, int bytes,
                          const int8_t* pattern, const float* scale, int centre, float* out,
                          int64_t stride) {
  constexpr int kPlanes = 8 / W;
  const int parts = bytes / kColumn;
  I start[M][L];
  for (int m = 0; m < M; ++m)
    for (int l = 0; l < L; ++l) {
      I total{};
      const int8_t* limb = pattern + (m * L + l) * kColumn;
      if (centre)
        for (int i = 0; i < pages * parts * kPlanes; ++i, limb += M * L * kColumn)
          total = dot(total, U{} + 1, repeated<kColumn>(limb));
      int32_t all_of_it = 0;
      for (int i = 0; i < kColumn / 4; ++i) all_of_it += total[i];
      start[m][l] = I{} - all_of_it * centre;
    }
  for (int c = 0; c < count; c += kLanes) {
    I acc[M][L];
    for (int m = 0; m < M; ++m)
      for (int l = 0; l < L; ++l) acc[m][l] = start[m][l];
    const int8_t* limb = pattern;
    for (int p = 0; p < pages; ++p)
      for (int part = 0; part < parts; ++part) {
        const uint8_t* from = page[p] + int64_t(c) * bytes + part * kColumn;
        U raw[kColumn / 4];
        by_column<kColumn>(from, bytes, raw);
        if (part == 0)
          for (int i = 0; i < kLanes * bytes; i += 64) fetch(from + kLanes * bytes + i);
#pragma GCC unroll 16
        for (int j = 0; j < kColumn / 4; ++j)
#pragma GCC unroll 8
          for (int s = 0; s < kPlanes; ++s) {
            const U d = digit<W>(raw[j], s);
            for (int m = 0; m < M; ++m)
              for (int l = 0; l < L; ++l) {
                const int at = ((s * M + m) * L + l) * kColumn + 4 * j;
                acc[m][l] = dot(acc[m][l], d, repeated<4>(limb + at));
              }
          }
        limb += kPlanes * M * L * kColumn;
      }
    for (int m = 0; m < M; ++m) {
      float* to = out + m * stride + c;
      const F sums = columns_in_order<kColumn>(joined<L>(acc[m])) * scale[m];
      store_some(to, load_some(to, count - c) + sums, count - c);
    }
  }
}

// `pattern` as above for every kRows queries
template <int W, int L, int kColumn>
static void value_queries(const uint8_t* const* page, int pages, int count, int bytes,
                          const int8_t* pattern, int queries, const float* scale, int centre,
                          float* out, int64_t stride) {
  const int64_t of_query = int64_t(pages) * (8 / W) * L * bytes;
  for (int m = 0; m < queries; m += kRows) {
    const int8_t* limb = pattern + m * of_query;
    const float* by = scale + m;
    float* to = out + m * stride;
#define VALUES(M) \
  value_columns<W, L, M, kColumn>(page, pages, count, bytes, limb, by, centre, to, stride)
    switch (queries - m) {
      case 1: VALUES(1); break;
      case 2: VALUES(2); break;
      case 3: VALUES(3); break;
      default: VALUES(4); break;
    }
#undef VALUES
  }
}

template <int W, int L>
static void value_section(const uint8_t* const* page, int pages, int count, int bytes,
                          const int8_t* pattern, int queries, const float* scale, int centre,
                          float* out, int64_t stride) {
#define VALUES(N) \
  value_queries<W, L, N>(page, pages, count, bytes, pattern, queries, scale, centre, out, stride)
  if constexpr (kPiece > 16) {
    if (bytes == 16) return VALUES(16);
    if (bytes == 32) return VALUES(32);
  }
  VALUES(kPiece);
#undef VALUES
}

// --- digits as bytes, for codes that are looked up -----------------------------------------------

// A section's digits [count][block], tokens in order.
static void unpack(const uint8_t* bytes, int width, int count, int block, bool keys, uint8_t* out,
                   uint16_t* column) {
  const int words = block * width / 16;
  const uint16_t mask = static_cast<uint16_t>((1 << width) - 1);
  for (int c = 0; c < count; ++c) {
    if (keys) {
      const int first = c / 16 * 16, across = count - first < 16 ? count - first : 16;
      const uint8_t* from = bytes + 2 * (int64_t(first) * words + c - first);
      for (int u = 0; u < words; ++u) memcpy(column + u, from + 2 * int64_t(u) * across, 2);
    } else {
      memcpy(column, bytes + 2 * int64_t(c) * words, 2 * static_cast<size_t>(words));
    }
    for (int k = 0; k < 16 / width; ++k) {
      uint8_t* to = out + int64_t(c) * block + token_of(k, block, words);
      const uint16_t shift = static_cast<uint16_t>(width * k);
      int u = 0;
      for (; u + 8 <= words; u += 8)
        store(to + u, __builtin_convertvector((load<H8>(column + u) >> shift) & mask, U8));
      for (; u < words; ++u) to[u] = static_cast<uint8_t>((column[u] >> shift) & mask);
    }
  }
}

}  // namespace
}  // namespace KVFOLD_NAMESPACE
}  // namespace kvfold
