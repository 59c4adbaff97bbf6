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

INLINE int code_at(const int32_t* term, const uint8_t* digits, int block, int t) {
  int code = 0;
  for (int i = 0; i < 3; ++i)
    if (term[2 * i] >= 0) code += digits[int64_t(term[2 * i]) * block + t] << term[2 * i + 1];
  return code;
}

// Column `c` of a head's page, [block] floats, from its digits. A polar column also needs the
// terms of its angle, which stand behind those of the radius.
static void decode_column(const Side& side, int head, int c, const uint8_t* digits, float* out) {
  const int block = side.block;
  if (side.kind == kPolar) {
    const int32_t* radius = side.term + (int64_t(head) * side.columns + c / 2 * 2) * 6;
    const int32_t* angle = radius + 6;
    const float* unit = side.table + (c % 2 ? side.sin_at : side.cos_at);
    for (int t = 0; t < block; ++t)
      out[t] = side.table[code_at(radius, digits, block, t)] *
               unit[code_at(angle, digits, block, t)];
    return;
  }
  const int at = side.table_at[head * side.columns + c];
  if (at < 0) return zero(out, block);
  const int32_t* term = side.term + (int64_t(head) * side.columns + c) * 6;
  const float* table = side.table + at;
  if (term[2] < 0) {  // one digit, the usual case
    const uint8_t* code = digits + int64_t(term[0]) * block;
    for (int t = 0; t < block; ++t) out[t] = table[code[t]];
  } else {
    for (int t = 0; t < block; ++t) out[t] = table[code_at(term, digits, block, t)];
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

// One token's parameters of a head, gathered by group: out [groups][block].
static void read_gains(const Side& side, const uint8_t* page, int head, const float* gain_table,
                       float* out) {
  const int n = side.block * side.groups;
  if (!side.gain_size) {
    for (int i = 0; i < n; ++i) out[i] = 1.0f;
  } else if (side.gain_size == 1) {
    const uint8_t* from = page + side.gain_at + int64_t(head) * n;
    for (int i = 0; i < n; ++i) out[i] = gain_table[from[i]];
  } else if (side.groups == 1 || side.gain_next) {
    for (int g = 0; g < side.groups; ++g)
      widen(page + side.gain_at + g * side.gain_next + 2 * int64_t(head) * side.block, kFloat16,
            side.block, out + g * side.block);
  } else {
    const uint8_t* from = page + side.gain_at + 2 * int64_t(head) * n;
    for (int t = 0; t < side.block; ++t)
      for (int g = 0; g < side.groups; ++g)
        out[g * side.block + t] = half(load<uint16_t>(from + 2 * (t * side.groups + g)));
  }
}

static void read_offsets(const Side& side, const uint8_t* page, int head, float* out) {
  const int n = side.block * side.groups;
  const uint8_t* from = page + side.offset_at + 2 * int64_t(head) * n;
  if (side.groups == 1) return widen(from, kFloat16, n, out);
  for (int t = 0; t < side.block; ++t)
    for (int g = 0; g < side.groups; ++g)
      out[g * side.block + t] = half(load<uint16_t>(from + 2 * (t * side.groups + g)));
}

}  // namespace
}  // namespace KVFOLD_NAMESPACE
}  // namespace kvfold
