// Folding: states in their code's basis to gain bytes and packed digits, in one pass.
//
// A task is a head of a block. Lanes are tokens: a token's sums run over its coordinates one after
// the other, whatever the vector width, and no product is fused with a sum. So bytes do not depend
// on the instruction set, on threads or on other blocks. Coordinates without bits are left out.
#include "fold.h"

#include <cmath>

#include "operand.h"
#include "simd.h"

namespace kvfold {
namespace KVFOLD_NAMESPACE {
namespace {

constexpr int kTogether = 3;  // gains that are tried together

// Nearest integer, ties to even, |x| < 2^22: adding 1.5 * 2^23 leaves no bits.
INLINE F rounded(F x) { return (x + 12582912.0f) - 12582912.0f; }
INLINE F inside(F code, float top) { return smaller(larger(code, F{}), all(top)); }

// Gains of kLanes bytes, each with what divides by it.
struct Gain {
  F size, divisor, inverse;
};
INLINE Gain gain_of(const Code& code, I byte) {
  Gain g;
  for (int i = 0; i < kLanes; ++i) {
    const float* at = code.gain + byte[i];
    g.size[i] = at[0], g.divisor[i] = at[256], g.inverse[i] = at[512];
  }
  return g;
}

struct Affine {
  // Without divisions: a code that rounds the other way at a half has the same error.
  INLINE F point(const Code&, const Coordinate& c, F y, const Gain& g) {
    const F code = rounded(inside(y * g.inverse * c.inverse - c.moved, c.top));
    return (code * c.step + c.offset) * g.size;
  }
  INLINE I code(const Code&, const Coordinate& c, F y, const Gain& g) {
    const F z = (y / g.divisor - c.offset) / c.divisor;
    return __builtin_convertvector(rounded(inside(z, c.top)), I);
  }
};

struct Levels {
  INLINE F point(const Code& code, const Coordinate& c, F y, const Gain& g) {
    const float* level = code.level + c.level;
    const float* threshold = code.threshold + c.level;
    const F z = y / g.divisor;
    F x = all(level[0]);
    for (int i = 0; i < static_cast<int>(c.top); ++i)
      x = z > all(threshold[i]) ? all(level[i + 1]) : x;
    return x * g.size;
  }
  INLINE I code(const Code& code, const Coordinate& c, F y, const Gain& g) {
    const float* threshold = code.threshold + c.level;
    const F z = y / g.divisor;
    I found{};
    for (int i = 0; i < static_cast<int>(c.top); ++i) found -= z > all(threshold[i]);
    return found;
  }
};

// The bytes of the tokens' RMS: 2^((byte - 128) / 16) is nearest on a log scale.
INLINE I root_mean_square(const Coordinate* coordinate, int count, const float* y) {
  F squares{};
  for (int j = 0; j < count; ++j) {
    const F x = load<F>(y + j * kLanes);
    squares += x * x * coordinate[j].share;
  }
  I byte;
  for (int i = 0; i < kLanes; ++i) {
    const float level = std::nearbyint(16.0f * std::log2(std::sqrt(squares[i])) + 128.0f);
    byte[i] = static_cast<int32_t>(level > 0.0f ? (level < 255.0f ? level : 255.0f) : 0.0f);
  }
  return byte;
}

// Of the bytes around `start`, the nearest first, those whose codes cost least; 0 stays 0.
template <class Q>
static I cheapest(const Code& code, const Coordinate* coordinate, int count, const float* y,
                  I start) {
  I best = start;
  F least = all(__builtin_inff());
  for (int i = 0; i < 2 * code.search + 1; i += kTogether) {
    I tried[kTogether];
    Gain gain[kTogether];
    F total[kTogether] = {};
    for (int k = 0; k < kTogether; ++k) {
      // 0, -1, 1, -2, 2, ...; behind the last one the first again, which is not cheaper
      const int n = i + k <= 2 * code.search ? i + k : 0;
      const I moved = start + (n % 2 ? -(n + 1) / 2 : n / 2);
      const I high = moved > 255 ? I{} + 255 : moved, low = high < 1 ? I{} + 1 : high;
      tried[k] = start > 0 ? low : I{};
      gain[k] = gain_of(code, tried[k]);
    }
    for (int j = 0; j < count; ++j) {
      const F x = load<F>(y + j * kLanes);
      for (int k = 0; k < kTogether; ++k) {
        const F error = Q::point(code, coordinate[j], x, gain[k]) - x;
        total[k] += error * error * coordinate[j].cost;
      }
    }
    for (int k = 0; k < kTogether; ++k) {
      best = total[k] < least ? tried[k] : best;
      least = smaller(total[k], least);
    }
  }
  return best;
}

// Codes [count][block] and gain bytes [block] of a head's states [block][dim].
template <class Q>
static void quantise(const Code& code, const Coordinate* coordinate, int count,
                     const float* states, float* y, uint8_t* codes, uint8_t* bytes) {
  typedef uint8_t B __attribute__((vector_size(kLanes)));
  for (int t = 0; t < code.block; t += kLanes) {
    const float* from = states + int64_t(t) * code.dim;
    for (int j = 0; j < count; ++j)
      for (int i = 0; i < kLanes; ++i) y[j * kLanes + i] = from[i * code.dim + coordinate[j].at];
    I byte = root_mean_square(coordinate, count, y);
    if (code.search) byte = cheapest<Q>(code, coordinate, count, y, byte);
    const Gain gain = gain_of(code, byte);
    store(bytes + t, __builtin_convertvector(byte, B));
    for (int j = 0; j < count; ++j) {
      const I found = Q::code(code, coordinate[j], load<F>(y + j * kLanes), gain);
      store(codes + int64_t(j) * code.block + t, __builtin_convertvector(found, B));
    }
  }
}

// The words of a column from the codes of its coordinate. Digit k of word u is that of the token
// u + (k % 4) * block / 4 + (k / 4) * words: a quarter of the block is a field of a lane.
INLINE void pack(const Column& column, int block, const uint8_t* codes, uint8_t* out) {
  const int width = column.width, words = block * width / 16;
  const uint16_t mask = static_cast<uint16_t>((1 << width) - 1);
  const uint16_t shift = static_cast<uint16_t>(column.shift);
  uint16_t word[8];
  for (int u = 0; u < words; u += 8) {
    const int some = words - u < 8 ? words - u : 8;
    H8 found{};
    for (int k = 0; k < 16 / width; ++k) {
      U8 part{};
      const uint8_t* from = codes + (k & 3) * (block / 4) + (k >> 2) * words + u;
      memcpy(&part, from, static_cast<size_t>(some));
      const H8 digit = (__builtin_convertvector(part, H8) >> shift) & mask;
      found |= digit << static_cast<uint16_t>(width * k);
    }
    store(word, found);
    for (int i = 0; i < some; ++i) memcpy(out + int64_t(u + i) * column.next, word + i, 2);
  }
}

void fold_head(void* context, int64_t task) {
  const Blocks& blocks = *static_cast<const Blocks*>(context);
  const Code& code = *blocks.code;
  const int head = static_cast<int>(task % code.heads);
  uint8_t* out = blocks.out + task / code.heads * code.nbytes;
  const float* states = blocks.states + task * code.block * code.dim;
  const Coordinate* coordinate = code.coordinate + code.first_coordinate[head];
  const int count = code.first_coordinate[head + 1] - code.first_coordinate[head];
  float* y = static_cast<float*>(scratch(0, int64_t(count) * kLanes * 4));
  uint8_t* codes = static_cast<uint8_t*>(scratch(1, int64_t(count) * code.block));
  uint8_t* bytes = out + code.gain_at + head * code.block;
  if (code.level) {
    quantise<Levels>(code, coordinate, count, states, y, codes, bytes);
  } else {
    quantise<Affine>(code, coordinate, count, states, y, codes, bytes);
  }
  for (int i = code.first_column[head]; i < code.first_column[head + 1]; ++i) {
    const Column& column = code.column[i];
    pack(column, code.block, codes + int64_t(column.coordinate) * code.block, out + column.at);
  }
}

}  // namespace

void fold(const Blocks& blocks) {
  Blocks context = blocks;
  parallel(fold_head, &context, blocks.blocks * blocks.code->heads, blocks.threads);
}

}  // namespace KVFOLD_NAMESPACE
}  // namespace kvfold
