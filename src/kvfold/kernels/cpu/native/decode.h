// Columns that are no digits, as floats: codebooks, polar points, stored states.
#pragma once

#include "digits.h"

namespace kvfold {
namespace KVFOLD_NAMESPACE {
namespace {

// All digits of a head's page, [columns][block] bytes; `column` is scratch of `block` words.
static void unpack_head(const Side& side, const uint8_t* page, int head, bool keys, uint8_t* out,
                        uint16_t* column) {
  for (int i = 0; i < side.sections; ++i) {
    const Section& s = side.section[head * side.sections + i];
    if (s.count)
      unpack(page + s.at, s.width, s.count, side.block, keys, out + int64_t(s.start) * side.block,
             column);
  }
}

constexpr int kPart = 64;  // tokens that are worked on together

// Codes of `n` tokens from their digits: where there is one digit, the digits themselves.
INLINE const uint8_t* codes_of(const int32_t* term, const uint8_t* digits, int block, int n,
                               uint8_t* room) {
  const uint8_t* first = digits + int64_t(term[0]) * block;
  if (term[2] < 0) return first;
  for (int t = 0; t < n; ++t) room[t] = static_cast<uint8_t>(first[t] << term[1]);
  for (int i = 1; i < 3 && term[2 * i] >= 0; ++i) {
    const uint8_t* digit = digits + int64_t(term[2 * i]) * block;
    for (int t = 0; t < n; ++t) room[t] |= static_cast<uint8_t>(digit[t] << term[2 * i + 1]);
  }
  return room;
}

// out[t] = table[code[t]]; `brief`: codes are below 16, as many as the table can be read for.
INLINE void look_up(const float* table, const uint8_t* code, int n, bool brief, float* out) {
  int t = 0;
#if KVFOLD_BITS == 512
  const __m512 all_of_it = _mm512_loadu_ps(table);
  for (; brief && t + 16 <= n; t += 16) {
    const __m512i at =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(code + t)));
    _mm512_storeu_ps(out + t, _mm512_permutexvar_ps(at, all_of_it));
  }
#elif KVFOLD_BITS == 256
  const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
  for (; brief && t + 8 <= n; t += 8) {
    const __m256i at =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(code + t)));
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));  // bit 3 as the sign
    _mm256_storeu_ps(out + t, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at),
                                               _mm256_permutevar8x32_ps(high, at), upper));
  }
#endif
  for (; t < n; ++t) out[t] = table[code[t]];
}

// Column `c` of a head's page, [block] floats, from its digits. A polar column also needs the
// terms of its angle, which stand behind those of the radius.
static void decode_column(const Side& side, int head, int c, const uint8_t* digits, float* out) {
  const int block = side.block;
  const bool polar = side.kind == kPolar;
  const int at = polar ? 0 : side.table_at[head * side.columns + c];
  if (at < 0) return zero(out, block);
  const int32_t* term = side.term + (int64_t(head) * side.columns + (polar ? c / 2 * 2 : c)) * 6;
  for (int t = 0; t < block; t += kPart) {
    const int n = block - t < kPart ? block - t : kPart;
    uint8_t room[kPart];
    look_up(side.table + at, codes_of(term, digits + t, block, n, room), n, side.brief, out + t);
    if (polar) {
      float by[kPart];
      look_up(side.table + (c % 2 ? side.sin_at : side.cos_at),
              codes_of(term + 6, digits + t, block, n, room), n, side.brief, by);
      for (int i = 0; i < n; ++i) out[t + i] *= by[i];
    }
  }
}

// `n` numbers of a type, as floats.
static void widen(const void* from, int type, int n, float* out) {
  if (type == kFloat32) {
    memcpy(out, from, sizeof(float) * static_cast<size_t>(n));
  } else if (type == kE4M3) {
    const uint8_t* x = static_cast<const uint8_t*>(from);
    for (int i = 0; i < n; ++i) out[i] = e4m3(x[i]);
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(from);
    if (type == kBFloat16) {
      for (int i = 0; i < n; ++i) out[i] = brain(x[i]);
      return;
    }
    int i = 0;
#if KVFOLD_BITS == 512
    for (; i + 16 <= n; i += 16)
      store(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(
                         reinterpret_cast<const __m256i*>(x + i))));
#elif KVFOLD_BITS == 256
    for (; i + 8 <= n; i += 8)
      store(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
    for (; i < n; ++i) out[i] = half(x[i]);
  }
}

INLINE int64_t type_size(int type) { return type == kFloat32 ? 4 : type == kE4M3 ? 1 : 2; }

INLINE void fetch_run(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) fetch(p + i);
}

// What a head's page has beside columns, and the first bytes of those, into the cache.
static void fetch_parameters(const Side& side, const uint8_t* page, int head, int64_t columns) {
  const int64_t n = int64_t(side.block) * side.groups, steps = 2LL * side.segments * side.columns;
  if (side.gain_size && !side.gain_next)
    fetch_run(page + side.gain_at + head * n * side.gain_size, n * side.gain_size);
  if (side.offset_at >= 0) fetch_run(page + side.offset_at + 2 * head * n, 2 * n);
  fetch_run(page + side.scale_at + head * steps, steps);
  fetch_run(page + side.zero_at + head * steps, steps);
  for (int i = 0; i < side.sections; ++i) {
    const Section& s = side.section[head * side.sections + i];
    const int64_t bytes = int64_t(s.count) * side.block * s.width / 8;
    fetch_run(page + s.at, bytes < columns ? bytes : columns);
  }
}

// float16 [tokens][groups] to floats [groups][tokens]
static void widen_groups(const uint8_t* from, int tokens, int groups, float* out) {
  constexpr int kMost = 8;
  int t = 0;
  const bool halves = groups <= kMost && !(groups & (groups - 1));
  for (; halves && t + kLanes <= tokens; t += kLanes) {
    F x[kMost], y[kMost];
    float room[kMost * kLanes];
    widen(from + 2LL * t * groups, kFloat16, groups * kLanes, room);
    int group[kMost] = {};  // that the vectors hold in the end
    for (int i = 0; i < groups; ++i) x[i] = load<F>(room + i * kLanes);
    for (int run = groups; run > 1; run /= 2) {
      for (int i = 0; i < groups; i += run)
        for (int j = 0; j < run / 2; ++j) {
          apart(x[i + 2 * j], x[i + 2 * j + 1], &y[i + j], &y[i + run / 2 + j]);
          group[i + run / 2 + j] += groups / run;
        }
      memcpy(x, y, sizeof(F) * static_cast<size_t>(groups));
    }
    for (int i = 0; i < groups; ++i) store(out + group[i] * tokens + t, x[i]);
  }
  for (; t < tokens; ++t)
    for (int g = 0; g < groups; ++g)
      out[g * tokens + t] = half(load<uint16_t>(from + 2 * (t * groups + g)));
}

// Gains that are stored as bytes: 2^((byte - 128) / 16), and 0 for 0.
static void log_gains(const uint8_t* from, int n, const float* gain_table, float* out) {
  int i = 0;
#if KVFOLD_BITS == 512
  const __m512 steps = _mm512_loadu_ps(gain_table + 128);  // from 1 to 2
  for (; i + 16 <= n; i += 16) {
    const __m512i code =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    const __m512i step = bits<__m512i>(_mm512_permutexvar_ps(code, steps));
    const __m512i octave = _mm512_sub_epi32(_mm512_srli_epi32(code, 4), _mm512_set1_epi32(8));
    const __m512i gain = _mm512_add_epi32(step, _mm512_slli_epi32(octave, 23));
    store(out + i, _mm512_maskz_mov_epi32(_mm512_test_epi32_mask(code, code), gain));
  }
#endif
  for (; i < n; ++i) out[i] = gain_table[from[i]];
}

// One token's parameters of a head, gathered by group: out [groups][block].
static void read_gains(const Side& side, const uint8_t* page, int head, const float* gain_table,
                       float* out) {
  const int n = side.block * side.groups;
  if (!side.gain_size) {
    for (int i = 0; i < n; ++i) out[i] = 1.0f;
  } else if (side.gain_size == 1) {
    log_gains(page + side.gain_at + int64_t(head) * n, n, gain_table, out);
  } else if (side.gain_next) {
    for (int g = 0; g < side.groups; ++g)
      widen(page + side.gain_at + g * side.gain_next + 2 * int64_t(head) * side.block, kFloat16,
            side.block, out + g * side.block);
  } else {
    widen_groups(page + side.gain_at + 2 * int64_t(head) * n, side.block, side.groups, out);
  }
}

static void read_offsets(const Side& side, const uint8_t* page, int head, float* out) {
  const int64_t n = int64_t(side.block) * side.groups;
  widen_groups(page + side.offset_at + 2 * head * n, side.block, side.groups, out);
}

}  // namespace
}  // namespace KVFOLD_NAMESPACE
}  // namespace kvfold
