// Columns that are entries of one codebook of up to 16: looked up in registers, from the words.
//
// For sides whose columns are one digit each, in order, with one codebook a head. A register holds
// the codebook; a digit's place in a word becomes the lookup's index by a shift alone.
#pragma once

#include "decode.h"
#include "products.h"

namespace kvfold {
namespace KVFOLD_NAMESPACE {
namespace {

#if KVFOLD_BITS >= 256
constexpr bool kLooksUp = true;

struct Codebook {
#if KVFOLD_BITS == 512
  __m512 all_of_it;
#else
  __m256 low, high;
#endif
};

// Periodic in the digit, so that what stands above it in a word does not matter.
INLINE Codebook codebook(const float* table, int width) {
  float x[16];
  for (int i = 0; i < 16; ++i) x[i] = table[i & ((1 << width) - 1)];
#if KVFOLD_BITS == 512
  return {_mm512_loadu_ps(x)};
#else
  return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
#endif
}

// entries at the lowest four bits of each lane
INLINE F entries(const Codebook& book, I at) {
#if KVFOLD_BITS == 512
  return bits<F>(_mm512_permutexvar_ps(bits<__m512i>(at), book.all_of_it));
#else
  const __m256i x = bits<__m256i>(at);
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(x, 28));  // bit 3 as the sign
  return bits<F>(_mm256_blendv_ps(_mm256_permutevar8x32_ps(book.low, x),
                                  _mm256_permutevar8x32_ps(book.high, x), upper));
#endif
}

// kLanes words of 16 bits
INLINE I words_of(const uint8_t* p) {
#if KVFOLD_BITS == 512
  return bits<I>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
  return bits<I>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
}

constexpr int kAcross = 8;  // vectors of columns that wait for their digits

// part [rows][block] = columns `first` to `first + count`, times the queries q [rows][ldq].
template <int W>
static void code_scores(const uint8_t* section, int block, int first, int count,
                        const Codebook& book, int rows, const float* q, int64_t ldq, float* part) {
  const int words = block * W / 16, vectors = count / kLanes;
  constexpr int kEach = 16 / kLanes;  // vectors of a chunk's row
  for (int m = 0; m < rows; m += kRows) {
    const int some = rows - m < kRows ? rows - m : kRows;
    for (int v0 = 0; v0 < vectors; v0 += kAcross) {
      const int across = vectors - v0 < kAcross ? vectors - v0 : kAcross;
      for (int u = 0; u < words; ++u) {
        I row[kAcross];
        for (int v = 0; v < across; ++v) {
          const int at = first / kLanes + v0 + v;
          row[v] = words_of(section + (int64_t(at / kEach) * words + u) * 32 + at % kEach * kLanes * 2);
        }
        for (int k = 0; k < 16 / W; ++k) {
          F acc[kRows] = {};
          for (int v = 0; v < across; ++v) {
            const F y = entries(book, row[v] >> (W * k));
            const float* x = q + m * ldq + (v0 + v) * kLanes;
            for (int i = 0; i < kRows; ++i)
              if (i < some) acc[i] += y * load<F>(x + i * ldq);
          }
          const F4 total = sums(acc[0], acc[1], acc[2], acc[3]);
          const int t = token_of(k, block, words) + u;
          for (int i = 0; i < some; ++i) {
            float* to = part + (m + i) * int64_t(block) + t;
            *to = v0 ? *to + total[i] : total[i];
          }
        }
      }
    }
  }
}

// out [rows][ldo] += the columns of some pages, each [words], times weights [rows][ldw].
template <int W>
static void code_values(const uint8_t* const* section, int pages, int block, int count,
                        const Codebook& book, int rows, const float* weights, int64_t ldw,
                        float* out, int64_t ldo) {
  const int words = block * W / 16;
  for (int m = 0; m < rows; m += kRows) {
    const int some = rows - m < kRows ? rows - m : kRows;
    for (int c = 0; c < count; c += 2) {
      const int two = c + 1 < count;  // two columns share what is loaded of the weights
      F acc[2][kRows] = {};
      for (int p = 0; p < pages; ++p) {
        const uint8_t* column = section[p] + int64_t(c) * words * 2;
        const float* w = weights + m * ldw + p * block;
        for (int u = 0; u < words; u += kLanes) {
          const I x = words_of(column + 2 * u), y = words_of(column + 2 * (u + two * words));
          for (int k = 0; k < 16 / W; ++k) {
            const F a = entries(book, x >> (W * k)), b = entries(book, y >> (W * k));
            const float* from = w + token_of(k, block, words) + u;
            for (int i = 0; i < kRows; ++i)
              if (i < some) {
                const F by = load<F>(from + i * ldw);
                acc[0][i] += a * by, acc[1][i] += b * by;
              }
          }
        }
      }
      for (int j = 0; j <= two; ++j) {
        const F4 total = sums(acc[j][0], acc[j][1], acc[j][2], acc[j][3]);
        for (int i = 0; i < some; ++i) out[(m + i) * ldo + c + j] += total[i];
      }
    }
  }
}
#else
constexpr bool kLooksUp = false;
#endif

// The section with all columns of a plain side's head, where vectors fit it; else null.
INLINE const Section* whole_section(const Side& side, int head, bool keys) {
  if (!kLooksUp || !side.plain) return nullptr;
  const int run = side.columns / side.groups;
  for (int i = 0; i < side.sections; ++i) {
    const Section* s = side.section + head * side.sections + i;
    if (!s->count) continue;
    const int words = side.block * s->width / 16;
    const bool fits = keys ? run % 16 == 0 : words % kLanes == 0;
    return fits ? s : nullptr;
  }
  return nullptr;
}

}  // namespace
}  // namespace KVFOLD_NAMESPACE
}  // namespace kvfold
