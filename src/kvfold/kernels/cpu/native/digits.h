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

// `x` [n] to limbs [limbs][stride], behind n zeros up to `stride`; the value of the last limb's 1
static float to_limbs(const float* x, int n, int limbs, int8_t* out, int64_t stride) {
  F most{};
  for (int i = 0; i < n; i += kLanes) {
    const F y = load_some(x + i, n - i);
    most = larger(most, larger(y, -y));
  }
  const float top = top_of(most);
  // what limbs of -128 to 127 hold, less what rounding may add
  const float limit = limbs == 3 ? 8355000.0f : 32638.0f;
  const float inverse = top > 0 ? limit / top : 0.0f;
  const int32_t middle = limbs == 3 ? 0x808080 : 0x8080;
  for (int i = 0; i < stride; i += kLanes) {
    const F y = i < n ? load_some(x + i, n - i) * inverse : F{};
    const F away = y < F{} ? all(-0.5f) : all(0.5f);
    const I code = (__builtin_convertvector(y + away, I) + middle) ^ middle;
    for (int l = 0; l < limbs; ++l) {
      typedef int8_t B __attribute__((vector_size(kLanes)));
      const B bytes = __builtin_convertvector(code >> (8 * l), B);
      const int64_t rest = stride - i;
      memcpy(out + l * stride + i, &bytes, static_cast<size_t>(rest < kLanes ? rest : kLanes));
    }
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

// Limbs of a chunk's 16 columns as `key_rows` meets them: for either half of the digits of a byte
// pair, 8 columns, then the other 8. The halves may belong to segments with queries of their own.
INLINE void key_pattern(const int8_t* even, const int8_t* odd, int columns, int8_t* out) {
  if (columns >= 16) {
    memcpy(out, even, 8), memcpy(out + 8, odd, 8);
    memcpy(out + 16, even + 8, 8), memcpy(out + 24, odd + 8, 8);
    return;
  }
  int8_t both[2][16] = {};
  memcpy(both[0], even, static_cast<size_t>(columns));
  memcpy(both[1], odd, static_cast<size_t>(columns));
  for (int i = 0; i < 4; ++i) memcpy(out + 8 * i, both[i & 1] + 8 * (i >> 1), 8);
}

struct KeyPatterns {
  const int8_t* data;   // [sets][chunks][queries][limbs][32]
  int64_t set;          // bytes of a set
  int run;              // words that share a set; 0: one set for all
};

// z [M][planes / 2][words][4]: sums over a section's columns, per word and pair of digits
template <int W, int L, int M, bool kSegments>
static void key_rows(const uint8_t* const* chunk, int chunks, int words, KeyPatterns patterns,
                     int queries, float* z, int64_t z_words) {
  constexpr int kPlanes = 8 / W;
  constexpr int kStep = kBytes > 32 ? kBytes / 32 : 1;
  constexpr int kHalves = kBytes < 32 ? 2 : 1;
  for (int u = 0; u < words; u += kStep) {
#pragma GCC unroll 4
    for (int s = 0; s < kPlanes; s += 2) {
      const int8_t* even = patterns.data;
      const int8_t* odd = patterns.data;
      if (kSegments) {
        const int runs = words / patterns.run, at = u / patterns.run;
        even += (s * runs + at) * patterns.set;
        odd += ((s + 1) * runs + at) * patterns.set;
      }
      I x[M][L] = {}, y[M][L] = {};
      for (int k = 0; k < chunks; ++k)
        for (int half = 0; half < kHalves; ++half) {
          const U raw = split(load<U>(chunk[k] + 32 * u + 16 * half));
          const U a = digit<W>(raw, s), b = digit<W>(raw, s + 1);
          for (int m = 0; m < M; ++m)
            for (int l = 0; l < L; ++l) {
              const int64_t at = ((int64_t(k) * queries + m) * L + l) * 32 + 16 * half;
              const U q = repeated<32>(even + at);
              x[m][l] = dot(x[m][l], a, q);
              y[m][l] = dot(y[m][l], b, kSegments ? repeated<32>(odd + at) : q);
            }
        }
      for (int m = 0; m < M; ++m) {
        const F both = pairs(joined<L>(x[m]), joined<L>(y[m]));
        float* to = z + ((m * (kPlanes / 2) + s / 2) * z_words + u) * 4;
        if constexpr (kBytes == 16) {
          store(to, both);
        } else {
          for (int i = 0; i < kStep; ++i)
            store(to + 4 * i, quarter(both, 2 * i) + quarter(both, 2 * i + 1));
        }
      }
    }
  }
}

// scores [queries][stride] += scale * sums over the columns of a section
template <int W, int L>
static void key_section(const uint8_t* const* chunk, int chunks, int block, KeyPatterns patterns,
                        int queries, const float* scale, float* scores, int64_t stride, float* z) {
  constexpr int kPlanes = 8 / W;
  constexpr int kMost = kBytes == 32 ? 2 : kRows;
  const int words = block * W / 16;
  const int64_t z_words = words + 1;  // an odd one is computed along
  for (int m = 0; m < queries; m += kMost) {
    const int some = queries - m < kMost ? queries - m : kMost;
    KeyPatterns here = patterns;
    here.data += m * L * 32;
    switch (some + (patterns.run ? 4 : 0)) {
      case 1: key_rows<W, L, 1, false>(chunk, chunks, words, here, queries, z, z_words); break;
      case 2: key_rows<W, L, 2, false>(chunk, chunks, words, here, queries, z, z_words); break;
      case 3: key_rows<W, L, 3, false>(chunk, chunks, words, here, queries, z, z_words); break;
      case 4: key_rows<W, L, 4, false>(chunk, chunks, words, here, queries, z, z_words); break;
      case 5: key_rows<W, L, 1, true>(chunk, chunks, words, here, queries, z, z_words); break;
      case 6: key_rows<W, L, 2, true>(chunk, chunks, words, here, queries, z, z_words); break;
      case 7: key_rows<W, L, 3, true>(chunk, chunks, words, here, queries, z, z_words); break;
      case 8: key_rows<W, L, 4, true>(chunk, chunks, words, here, queries, z, z_words); break;
    }
    for (int i = 0; i < some; ++i)
      for (int s = 0; s < kPlanes; s += 2) {
        const float* from = z + (i * (kPlanes / 2) + s / 2) * z_words * 4;
        float* to[4];
        for (int j = 0; j < 4; ++j) {
          const int k = kPlanes * (j & 1) + s + (j >> 1);
          to[j] = scores + (m + i) * stride + token_of(k, block, words);
        }
        const float by = scale[m + i];
        int u = 0;
        for (; u + kLanes <= words; u += kLanes) {
          F column[4];
          every_fourth(from + 4 * u, column);
          for (int j = 0; j < 4; ++j) store(to[j] + u, load<F>(to[j] + u) + column[j] * by);
        }
        for (; u < words; ++u)
          for (int j = 0; j < 4; ++j) to[j][u] += by * from[4 * u + j];
      }
  }
}

// --- values: [columns][words] --------------------------------------------------------------------

// Bytes of a column as `value_columns` reads it.
INLINE int column_bytes(int block, int width) {
  const int bytes = block * width / 8;
  return bytes <= 16 ? 16 : bytes <= 32 ? 32 : (bytes + 63) / 64 * 64;
}

// Limbs of a page's tokens as they meet the digits of a column: [planes][column_bytes].
template <int W>
static void value_pattern(const int8_t* limbs, int block, int8_t* out, int64_t plane_stride) {
  constexpr int kPlanes = 8 / W;
  const int words = block * W / 16;
  for (int s = 0; s < kPlanes; ++s) {
    const int8_t* even = limbs + token_of(s, block, words);
    const int8_t* odd = limbs + token_of(kPlanes + s, block, words);
    interleave(even, odd, words, out + s * plane_stride);
  }
}

// Columns in the order in which `value_columns` leaves their sums: four vectors side by side.
INLINE int columns_of_vector(int bytes) { return bytes < kBytes ? kBytes / bytes : 1; }
INLINE int padded_columns(int count, int bytes) {
  const int group = 4 * columns_of_vector(bytes);
  return (count + group - 1) / group * group;
}
// out [count] += the sums in their own order
INLINE void add_columns(const float* sums, int count, int bytes, float* out) {
  const int per = columns_of_vector(bytes);
  if (per == 1) {
    for (int c = 0; c < count; ++c) out[c] += sums[c];
    return;
  }
  for (int first = 0; first < count; first += 4 * per)
    for (int sub = 0; sub < per; ++sub)
      for (int i = 0; i < 4; ++i) {
        const int c = first + i * per + sub;
        if (c < count) out[c] += sums[first + sub * 4 + i];
      }
}

// out [M][stride] += scale * sums over the tokens of `pages` pages, for every column of a section, of
// digits less `centre`: taken off the integers, or the sums of large digits lose what the codes hold
template <int W, int L, int M, int kColumn>
static void value_columns(const uint8_t* const* page, int pages, int count, int bytes,
                          const int8_t* pattern, int queries, const float* scale, int centre,
                          float* out, int64_t stride) {
  constexpr int kPlanes = 8 / W;
  constexpr int kTogether = KVFOLD_BITS == 512 ? 2 : 1;
  constexpr int kPer = kColumn < kBytes ? kBytes / kColumn : 1;
  const int vectors = (count + kPer - 1) / kPer;
  const int parts = bytes > kBytes ? bytes / kBytes : 1;
  const int64_t step = bytes > kBytes ? bytes : kBytes;
  I start[M][L] = {};
  if (centre)
    for (int p = 0; p < pages; ++p)
      for (int part = 0; part < parts; ++part)
        for (int s = 0; s < kPlanes; ++s)
          for (int m = 0; m < M; ++m)
            for (int l = 0; l < L; ++l) {
              const int8_t* limb = pattern + (int64_t(p) * kPlanes + s) * queries * L * bytes +
                                   part * kBytes + (m * L + l) * bytes;
              start[m][l] = dot(start[m][l], U{} + 1, repeated<kColumn>(limb));
            }
  for (int m = 0; m < M; ++m)
    for (int l = 0; l < L; ++l) start[m][l] *= -centre;
  for (int v = 0; v < vectors; v += 4) {
    F found[4][M] = {};
    for (int i = 0; i < 4; i += kTogether) {
      if (v + i >= vectors) break;
      // a second vector that is not there is read again, and dropped
      const int second = v + i + kTogether - 1 < vectors ? kTogether - 1 : 0;
      I acc[kTogether][M][L];
      for (int j = 0; j < kTogether; ++j)
        for (int m = 0; m < M; ++m)
          for (int l = 0; l < L; ++l) acc[j][m][l] = start[m][l];
      for (int p = 0; p < pages; ++p)
        for (int part = 0; part < parts; ++part) {
          const uint8_t* from = page[p] + (v + i) * step + part * kBytes;
          U raw[kTogether];
          raw[0] = load<U>(from);
          if (kTogether == 2) raw[kTogether - 1] = load<U>(from + second * step);
#pragma GCC unroll 8
          for (int s = 0; s < kPlanes; ++s) {
            U d[kTogether];
            for (int j = 0; j < kTogether; ++j) d[j] = digit<W>(raw[j], s);
            const int8_t* limb =
                pattern + (int64_t(p) * kPlanes + s) * queries * L * bytes + part * kBytes;
            for (int m = 0; m < M; ++m)
              for (int l = 0; l < L; ++l) {
                const U x = repeated<kColumn>(limb + (m * L + l) * bytes);
                for (int j = 0; j < kTogether; ++j) acc[j][m][l] = dot(acc[j][m][l], d[j], x);
              }
          }
        }
      for (int j = 0; j < kTogether; ++j)
        if (j == 0 || second)
          for (int m = 0; m < M; ++m) found[i + j][m] = joined<L>(acc[j][m]);
    }
    for (int m = 0; m < M; ++m) {
      const F x = pairs(pairs(found[0][m], found[1][m]), pairs(found[2][m], found[3][m]));
      float* to = out + m * stride + v * kPer;
      constexpr int kQuarters = kBytes / 16 / kPer;
      for (int sub = 0; sub < kPer; ++sub) {
        F4 total = quarter(x, sub * kQuarters);
        for (int i = 1; i < kQuarters; ++i) total += quarter(x, sub * kQuarters + i);
        store(to + 4 * sub, load<F4>(to + 4 * sub) + total * scale[m]);
      }
    }
  }
}

template <int W, int L, int kColumn>
static void value_queries(const uint8_t* const* page, int pages, int count, int bytes,
                          const int8_t* pattern, int queries, const float* scale, int centre,
                          float* out, int64_t stride) {
  for (int m = 0; m < queries; m += kRows) {
    const int8_t* limb = pattern + int64_t(m) * L * bytes;
    const float* by = scale + m;
    float* to = out + m * stride;
#define VALUES(M) \
  value_columns<W, L, M, kColumn>(page, pages, count, bytes, limb, queries, by, centre, to, stride)
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
  if (bytes >= kBytes) {
    value_queries<W, L, kBytes>(page, pages, count, bytes, pattern, queries, scale, centre, out,
                                stride);
  } else if (bytes == 16) {
    value_queries<W, L, 16>(page, pages, count, bytes, pattern, queries, scale, centre, out,
                                stride);
  } else {
    value_queries<W, L, 32>(page, pages, count, bytes, pattern, queries, scale, centre, out,
                                stride);
  }
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
