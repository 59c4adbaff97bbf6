// What folding is told of a code and of some blocks; filled by kvfold/kernels/cpu/fold.py.
// Plain data only: this header is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace kvfold {

// One coordinate that has bits. Affine codes: (code * step + offset) * gain.
struct Coordinate {
  int32_t at;     // its place in a state
  int32_t level;  // where its codebook starts; -1: affine
  float top;      // its largest code
  float share;    // of its square in the gain's
  float cost;     // of a squared error
  float step, offset, divisor, inverse, moved;  // inverse = 1 / divisor, moved = offset * inverse
};

// One column of digits: `(code >> shift) & (2^width - 1)`, in 16-bit words (kvfold/packing.py).
struct Column {
  int32_t coordinate;  // among those of its head that have bits
  int32_t width, shift;
  int32_t at, next;    // its first byte in a block, and the bytes from a word to the next
};

struct Code {
  int32_t heads, dim, block, nbytes, gain_at, search;
  const Coordinate* coordinate;     // of all heads
  const int32_t* first_coordinate;  // [heads + 1]
  const Column* column;
  const int32_t* first_column;      // [heads + 1]
  const float* gain;                // [3][256] of a byte: gain, divisor (1 for byte 0), 1 / divisor
  const float* level;
  const float* threshold;           // between a level and the next
};

struct Blocks {
  const Code* code;
  const float* states;  // [blocks][heads][block][dim], in the code's basis
  uint8_t* out;         // [blocks][nbytes], zeros
  int64_t blocks;
  int32_t threads;
};

namespace portable { void fold(const Blocks& blocks); }
namespace avx2 { void fold(const Blocks& blocks); }
namespace avx512 { void fold(const Blocks& blocks); }

}  // namespace kvfold
