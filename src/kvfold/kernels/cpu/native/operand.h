// What the kernel is told of a layer and of a call; filled by kvfold/kernels/cpu/__init__.py.
// Plain data only: this header is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace kvfold {

// how the columns of a side come from the page's bytes
enum Kind : int32_t {
  kDigits = 0,  // a column is a digit
  kCodes = 1,   // a column is an entry of a codebook; the index is put together from digits
  kPolar = 2,   // two columns are radius * (cos, sin) of an angle; both indices from digits
  kStates = 3,  // a column is a stored float
};

// what takes the query turned back by RoPE (keys)
enum Turns : int32_t { kNothing = 0, kMean = 1, kPage = 2, kToken = 3 };

enum Type : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kE4M3 = 3 };

constexpr int kLimbs = 3;     // int8 limbs of a fixed-point number, at most
constexpr int kBatch = 4;     // pages whose softmax and values are worked on together
constexpr int kSplit = 8;     // pages of a task; results do not depend on threads or rows

struct Section {
  int32_t width;  // bits of a digit
  int32_t count;  // columns
  int32_t at;     // first byte, from the start of the page
  int32_t start;  // first column
};

struct Side {
  int32_t kind, heads, dim, block, columns;
  int32_t groups;                  // gains and offsets of a token
  int32_t gain_at, gain_size;      // size 0: no gains; 1: byte, log scale; 2: float16
  int32_t gain_next;               // bytes to the next group's field; 0: groups side by side
  int32_t offset_at;               // -1: none
  int32_t centred;                 // values: digits count from the middle, and `gain` with them
  int32_t sections;                // sections of a head
  const Section* section;          // [heads][sections]
  const float* matrix;             // keys [heads][dim][columns], values [heads][columns][dim]
  // the matrix of keys that are turned page by page as 16-bit numbers, and their values of 1
  const int16_t* short_matrix;     // [heads][dim / 2][short_columns][2], or null
  const float* short_unit;         // [heads][short_columns]
  int32_t short_columns;           // a multiple of 16
  const float* gain;               // [heads][dim]
  const float* offset;             // [heads][groups][dim] or null
  const float* mean;               // keys [heads][dim][block] ([heads][dim] per token),
                                   // values [heads][dim]; or null
  // keys: a mean that RoPE turns is a sum of waves over the places in a page, around its middle
  int32_t waves, fast;             // rows of `wave`; pairs with a row of their own. waves 0: `mean`
  const float* wave;               // [2][waves][block / 2] even ones, odd ones; then powers
  const float* slow;               // [2][waves - fast][pairs - fast] of the slow pairs' waves
  const float* middle;             // [heads][dim] the mean in the middle of a page
  int32_t turns, pairs;            // channels i and pairs + i turn together
  const int32_t* order;            // [dim] channel that stands at each place, or null
  int32_t scale_at, zero_at, segments;  // steps of a page's segments of tokens; segments 0: none
  // per token: keys are put together as fixed-point products, and turned
  int32_t share;                   // heads whose columns make one head's keys
  const int8_t* limbs;             // [heads][dim][share][columns / 4][kLimbs][4]
  const float* limb_scale;         // [heads][dim][share]
  const float* turn;               // [3][pairs][block] cosine, sine, angle of a token in its page
  const float* frequency;          // [pairs]
  // codes and polar
  const int32_t* term;             // [heads][columns][3][2] column and shift of the digits; -1
  const int32_t* table_at;         // [heads][columns] where a column's codebook starts; -1: zeros
  const float* table;
  int32_t plain;                   // codes of one digit each, in order, one codebook a head
  int32_t brief;                   // no codebook has more than 16 entries
  int32_t cos_at, sin_at;          // polar: the angles' tables
  // states
  int32_t states_at, states_type;
};

struct Call {
  const Side* key;
  const Side* value;
  int64_t page_bytes, slab_pages;
  const uint8_t* const* slabs;
  int32_t rows, query_heads, queries, threads;
  const void* q;
  int64_t q_stride[3];  // row, head, query, in elements
  void* out;
  int64_t out_stride[3];
  int32_t type;         // of q and out
  const void* exact_keys;
  const void* exact_values;
  int32_t exact_type, exact;
  int64_t key_stride[3], value_stride[3];  // row, head, token
  const int64_t* tokens;        // [rows][exact]
  const int64_t* query_tokens;  // [rows][queries]
  const int32_t* folded;        // [rows]
  const int32_t* first;         // [rows]
  const int32_t* table;         // [rows][table_stride] page numbers
  const int32_t* block;         // [rows][table_stride] which block of its row a page is
  int64_t table_stride;
  const float* page_turn;       // [rows][table_stride][2][pairs] cosine, sine of pages' starts
  int32_t sinks;
  float scaling, softcap;       // softcap 0: none
  const float* sink_logits;     // [query_heads] or null
};

// Runs `work(context, task)` for every task below `tasks`, on up to `threads` threads.
void parallel(void (*work)(void*, int64_t), void* context, int64_t tasks, int threads);

// Memory of the calling thread that lasts until its next call with the same slot.
void* scratch(int slot, int64_t bytes);

namespace portable { void attend(const Call& call); }
namespace avx2 { void attend(const Call& call); }
namespace avx512 { void attend(const Call& call); }

}  // namespace kvfold
