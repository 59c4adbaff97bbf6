// Attention of one to a few queries a row over packed pages, sinks and ring, in one pass.
//
// A task is (row, key/value head, run of kSplit pages) or a head's exact part. All query heads of
// the group share what a task unpacks. Tasks leave sums in the space of codes; the last one of a
// head merges them, applies the inverse transform of the values once a query, and writes. Runs of
// pages do not depend on threads or on other rows, so neither do results.
#include "codes.h"

namespace kvfold {
namespace KVFOLD_NAMESPACE {
namespace {

INLINE int lower(int a, int b) { return a < b ? a : b; }
INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Pieces of one allocation, each aligned to a cache line.
struct Layout {
  char* base;
  int64_t used;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base + used);
    used += up(n * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
};

struct Shape {
  int M, D, V, B, C, G, O, limbs;  // queries, key dim, value dim, block, key columns; groups; ...
  int chunks;                      // of 16 key columns, over all sections
  int sets, run[3];                // patterns of a page's queries, and words that share one
  int64_t set_bytes, pattern_bytes;
};

// What the pages of a head need of its queries.
struct Queries {
  float* states;     // [M][D] scaled, channels in the order of the turns
  float* code;       // [M][C] where every page takes the same
  float* gain;       // [M] likewise
  float* offset;     // [M][groups]
  float* scale;      // [M] of the limbs
  int8_t* pattern;   // limbs as key_rows takes them
};

// Sums of a task; `columns` in the values' column space, or of states for the exact part.
struct Sums {
  float* top;      // [M]
  float* one;      // [M]
  float* gain;     // [M][groups]
  float* offset;   // [M][groups]
  float* columns;  // [M][width]
};

struct Work {
  const Call* call;
  Shape shape;
  int group, splits, width;
  const float* gain_table;
  char* memory;
  int64_t per_head, per_sums;
  int32_t* ready;  // [rows * heads] 0 untouched, 1 being prepared, 2 prepared
  int32_t* left;   // [rows * heads] tasks that are not done
};

INLINE const uint8_t* page_of(const Call& call, int row, int block) {
  const int32_t number = call.table[row * call.table_stride + block];
  return call.slabs[number / call.slab_pages] + (number % call.slab_pages) * call.page_bytes;
}

Queries queries_of(const Work& w, int64_t at) {
  const Shape& s = w.shape;
  Layout l{w.memory + at * w.per_head, 0};
  Queries q;
  q.states = l.take<float>(int64_t(s.M) * s.D);
  q.code = l.take<float>(int64_t(s.M) * s.C);
  q.gain = l.take<float>(s.M);
  q.offset = l.take<float>(int64_t(s.M) * s.G);
  q.scale = l.take<float>(s.M);
  q.pattern = l.take<int8_t>(s.pattern_bytes);
  return q;
}

int64_t queries_bytes(const Shape& s) {
  return up(4LL * s.M * s.D, 64) + up(4LL * s.M * s.C, 64) + up(4LL * s.M, 64) * 2 +
         up(4LL * s.M * s.G, 64) + up(s.pattern_bytes, 64);
}

Sums sums_of(const Work& w, int64_t at, int part) {
  const Shape& s = w.shape;
  Layout l{w.memory + at * w.per_head + queries_bytes(s) + part * w.per_sums, 0};
  Sums t;
  t.top = l.take<float>(s.M);
  t.one = l.take<float>(s.M);
  t.gain = l.take<float>(int64_t(s.M) * s.O);
  t.offset = l.take<float>(int64_t(s.M) * s.O);
  t.columns = l.take<float>(int64_t(s.M) * w.width);
  return t;
}

// --- queries -------------------------------------------------------------------------------------

// Limbs of prepared queries as the sections of a head take them: of [M][C], or of
// [M][segments][C padded to 64] where segments of a page's tokens have queries of their own.
void make_patterns(const Call& call, const Shape& s, int head, const float* code, float* scale,
                   int8_t* pattern) {
  const Side& key = *call.key;
  const int segments = key.segments ? key.segments : 1;
  const int64_t stride = up(s.C, 64), of_limb = segments * stride, of_query = s.limbs * of_limb;
  int8_t* limbs = static_cast<int8_t*>(scratch(2, s.M * of_query + kBytes));
  const int64_t n = segments == 1 ? s.C : of_limb;  // one scale for all segments
  for (int m = 0; m < s.M; ++m)
    scale[m] = to_limbs(code + m * n, static_cast<int>(n), largest(code + m * n, static_cast<int>(n)),
                        s.limbs, limbs + m * of_query, of_limb);
  int chunk0 = 0;
  for (int i = 0; i < key.sections; ++i) {
    const Section& part = key.section[head * key.sections + i];
    const int planes = 8 / part.width, words = key.block * part.width / 16;
    const int runs = segments == 1 ? 1 : words / s.run[part.width / 2];
    const int sets = segments == 1 ? 1 : planes * runs;
    for (int set = 0; set < sets; ++set) {
      int lower = 0, upper = 0;
      if (segments > 1) {
        const int plane = set / runs, u = set % runs * s.run[part.width / 2];
        const int len = key.block / segments;
        lower = (token_of(plane, key.block, words) + u) / len;
        upper = (token_of(planes + plane, key.block, words) + u) / len;
      }
      for (int j = 0; j < s.M * s.limbs; ++j) {
        const int8_t* from = limbs + j * of_limb + part.start;
        key_pattern(from + lower * stride, from + upper * stride, part.count,
                    pattern + set * s.set_bytes + j * kPatternRow + 32 * chunk0);
      }
    }
    chunk0 += (part.count + 15) / 16;
  }
}

void prepare(const Work& w, int row, int head) {
  const Call& call = *w.call;
  const Side& key = *call.key;
  const Shape& s = w.shape;
  Queries q = queries_of(w, int64_t(row) * key.heads + head);
  const int64_t size = type_size(call.type);
  float* raw = static_cast<float*>(scratch(2, 4LL * s.D));
  for (int m = 0; m < s.M; ++m) {
    const int64_t at = row * call.q_stride[0] +
                       (int64_t(head) * w.group + m / call.queries) * call.q_stride[1] +
                       (m % call.queries) * call.q_stride[2];
    widen(static_cast<const char*>(call.q) + at * size, call.type, s.D, raw);
    for (int d = 0; d < s.D; ++d)
      q.states[m * s.D + d] = raw[key.order ? key.order[d] : d] * call.scaling;
  }
  const float* offset = key.offset ? key.offset + int64_t(head) * key.groups * s.D : nullptr;
  for (int m = 0; m < s.M; ++m) {
    const float* x = q.states + m * s.D;
    q.gain[m] = dot_float(x, key.gain + int64_t(head) * s.D, s.D);
    for (int g = 0; g < s.G; ++g)
      q.offset[m * s.G + g] = offset ? dot_float(x, offset + int64_t(g) * s.D, s.D) : 0.0f;
  }
  if (key.kind == kStates || key.turns == kPage || key.turns == kToken || key.segments) return;
  zero(q.code, int64_t(s.M) * s.C);
  add_product(s.M, s.D, s.C, q.states, s.D, key.matrix + int64_t(head) * s.D * s.C, s.C, q.code,
              s.C);
  if (key.kind == kDigits) make_patterns(call, s, head, q.code, q.scale, q.pattern);
}

// --- scores of a page ----------------------------------------------------------------------------

// What a task works in.
struct Room {
  float* scores;     // [M][kBatch * B]
  float* weights;    // [M][kBatch * B] p g of a group of columns
  float* turned;     // [M][D]
  float* code;       // [M][C], or [M][segments][padded C]
  float* page_gain;  // [M], or [M][segments]
  float* scale;      // [M]
  int8_t* pattern;
  float* part;       // [M][B] scores of one group
  float* gains;      // [kBatch][groups][B]
  float* offsets;    // [kBatch][groups][B]
  float* tile;       // decoded columns or states
  uint8_t* digits;   // [columns][B] of up to kBatch pages
  uint16_t* column;
  uint8_t* copy;     // sections with their rows widened to whole vectors
  int8_t* limbs;     // of weights, and their patterns
  int8_t* value_patterns;
  float* by;         // [M] largest weights, and then the scales of their limbs
};

int widest(const Side& side) {
  int most = 0;
  for (int i = 0; i < side.heads * side.sections; ++i) {
    const Section& s = side.section[i];
    if (s.start + s.count > most) most = s.start + s.count;
  }
  return most;
}

Room room_of(const Work& w, bool measure, int64_t* bytes) {
  const Call& call = *w.call;
  const Side& key = *call.key;
  const Side& value = *call.value;
  const Shape& s = w.shape;
  Layout l{measure ? nullptr : static_cast<char*>(scratch(1, *bytes)), 0};
  if (!measure) l.base = reinterpret_cast<char*>(up(reinterpret_cast<int64_t>(l.base), 64));
  const int64_t tokens = int64_t(kBatch) * s.B, M = s.M;
  const int segments = key.segments ? key.segments : 1;
  const int most = widest(key) > widest(value) ? widest(key) : widest(value);
  const int64_t G = s.G > s.O ? s.G : s.O;
  const int64_t dims = s.D > s.V ? s.D : s.V;
  Room r;
  r.scores = l.take<float>(M * tokens);
  r.weights = l.take<float>(M * tokens);
  r.turned = l.take<float>(M * s.D);
  r.code = l.take<float>(M * segments * up(s.C, 64));
  r.page_gain = l.take<float>(M * segments);
  r.scale = l.take<float>(M);
  r.pattern = l.take<int8_t>(s.pattern_bytes);
  r.part = l.take<float>(M * s.B);
  r.gains = l.take<float>(kBatch * G * s.B * (key.share > 1 ? key.share : 1));
  r.offsets = l.take<float>(kBatch * G * s.B * (key.share > 1 ? key.share : 1));
  // columns of 16 coordinates, a row of states a token, or keys of a token's own position
  r.tile = l.take<float>(up(s.B, 16) * (dims > 16 ? dims : 16) + kBatch * s.B + M * s.D);
  r.digits = l.take<uint8_t>(int64_t(most) * s.B * kBatch * (key.share > 1 ? key.share : 1) + 256);
  r.column = l.take<uint16_t>(s.B);
  r.copy = l.take<uint8_t>(64 * (int64_t(s.B) + 16) * ((most + 15) / 16 + 3) * kBatch + 256);
  r.limbs = l.take<int8_t>(int64_t(M) * kLimbs * tokens);
  r.value_patterns = l.take<int8_t>(int64_t(kBatch) * M * kLimbs * 8 * (up(s.B, 64) + 64));
  r.by = l.take<float>(M);
  *bytes = l.used + 128;
  return r;
}

// R^-1 of the page's first position, on all queries.
void turn_back(const Call& call, const Shape& s, int row, int block, const float* q, float* out) {
  const int n = call.key->pairs;
  const float* cosine = call.page_turn + (row * call.table_stride + block) * 2 * n;
  const float* sine = cosine + n;
  for (int m = 0; m < s.M; ++m) {
    const float* x = q + m * s.D;
    float* y = out + m * s.D;
    for (int i = 0; i < n; ++i) {
      y[i] = x[i] * cosine[i] + x[n + i] * sine[i];
      y[n + i] = x[n + i] * cosine[i] - x[i] * sine[i];
    }
    memcpy(y + 2 * n, x + 2 * n, sizeof(float) * static_cast<size_t>(s.D - 2 * n));
  }
}

// Sums of digits for every token: scores [M][stride] += .
void digit_scores(const Work& w, const Room& r, const uint8_t* page, int64_t next,
                  int head, const int8_t* pattern, const float* scale, float* scores,
                  int64_t stride) {
  const Call& call = *w.call;
  const Side& key = *call.key;
  const Shape& s = w.shape;
  const uint8_t* chunk[64];
  int chunk0 = 0;
  for (int i = 0; i < key.sections; ++i) {
    const Section& part = key.section[head * key.sections + i];
    if (!part.count) continue;
    const int words = key.block * part.width / 16, chunks = (part.count + 15) / 16;
    const int64_t bytes = 32LL * up(words, kWords);  // whole vectors of words are read
    uint8_t* copy = r.copy;
    for (int k = 0; k < chunks; ++k) {
      const uint8_t* from = page + part.at + 32LL * k * words;
      const int across = lower(16, part.count - 16 * k);
      chunk[k] = from;
      if (across < 16 || part.at + 32LL * k * words + bytes > call.page_bytes) {
        memset(copy, 0, static_cast<size_t>(bytes));
        for (int u = 0; u < words; ++u)
          memcpy(copy + 32 * u, from + 2LL * u * across, 2 * static_cast<size_t>(across));
        chunk[k] = copy;
        copy += bytes;
      }
    }
    const KeyPatterns patterns{pattern + 32LL * chunk0, s.set_bytes,
                               key.segments > 1 ? s.run[part.width / 2] : 0};
#define KEYS(W, L) \
  key_section<W, L>(chunk, chunks, key.block, next, patterns, s.M, scale, scores, stride)
    if (s.limbs == 2) {
      if (part.width == 4) KEYS(4, 2);
      if (part.width == 2) KEYS(2, 2);
      if (part.width == 1) KEYS(1, 2);
    } else {
      if (part.width == 4) KEYS(4, 3);
      if (part.width == 2) KEYS(2, 3);
      if (part.width == 1) KEYS(1, 3);
    }
#undef KEYS
    chunk0 += chunks;
  }
}

// Keys put together per token as fixed-point products, turned, and met with the queries.
template <int L>
void token_scores(const Work& w, const Room& r, const uint8_t* page, int row, int head, int block,
                  const float* q, float* scores, int64_t stride) {
  const Side& key = *w.call->key;
  const Shape& s = w.shape;
  const int B = s.B, C4 = s.C / 4, n = key.pairs;
  constexpr int kVectors = KVFOLD_BITS == 512 ? 4 : 1;
  // digits as [columns / 4][tokens][4], so that four columns meet in one product
  uint8_t* digits = r.digits;
  const int first_head = head / key.share * key.share;
  for (int i = 0; i < key.share; ++i) {
    uint8_t* flat = r.copy;
    uint8_t* to = digits + int64_t(i) * s.C * B;
    memset(flat, 0, static_cast<size_t>(s.C) * B);
    unpack_head(key, page, first_head + i, true, flat, r.column);
    for (int c = 0; c < C4; ++c) {
      const uint8_t* x = flat + 4LL * c * B;
      uint8_t* y = to + 4LL * c * B;
      for (int t = 0; t < B; ++t)
        for (int j = 0; j < 4; ++j) y[4 * t + j] = x[j * B + t];
    }
    read_gains(key, page, first_head + i, w.gain_table, r.gains + i * B);
    if (key.offset_at >= 0) read_offsets(key, page, first_head + i, r.offsets + i * B);
  }
  const int32_t place = w.call->block[row * w.call->table_stride + block];
  const float start = static_cast<float>(w.call->first[row] + w.call->sinks + place * B);
  const float* mean = key.mean ? key.mean + int64_t(head) * s.D : nullptr;
  const float* gain = key.gain + int64_t(head) * s.D;
  const float* offset = key.offset ? key.offset + int64_t(head) * key.share * s.D : nullptr;
  for (int t = 0; t < B; t += kVectors * kLanes) {
    const int vectors = lower(kVectors, (B - t + kLanes - 1) / kLanes);
    for (int d = 0; d < s.D; ++d) {
      if (d >= n && d < 2 * n) continue;  // with its partner
      const int channels = d < n ? 2 : 1;
      F x[2][kVectors] = {};
      for (int j = 0; j < channels; ++j)
        for (int v = 0; v < vectors; ++v) x[j][v] = all(mean ? mean[d + j * n] : 0.0f);
      for (int i = 0; i < key.share; ++i) {
        I acc[2][kVectors][L] = {};
        const uint8_t* code = digits + int64_t(i) * s.C * B + 4 * t;
        const int8_t* limb[2];
        for (int j = 0; j < 2; ++j)
          limb[j] = key.limbs + ((int64_t(head) * s.D + d + (j < channels ? j * n : 0)) * key.share +
                                 i) * C4 * kLimbs * 4 + 4 * (kLimbs - L);
        for (int c = 0; c < C4; ++c) {
          U y[kVectors];
          for (int v = 0; v < kVectors; ++v) y[v] = load<U>(code + 4LL * c * B + v * kBytes);
          for (int j = 0; j < 2; ++j)
            for (int l = 0; l < L; ++l) {
              const U m = repeated<4>(limb[j] + (c * kLimbs + l) * 4);
              for (int v = 0; v < kVectors; ++v) acc[j][v][l] = dot(acc[j][v][l], y[v], m);
            }
        }
        for (int j = 0; j < channels; ++j) {
          const int at = d + j * n;
          const float by = key.limb_scale[(int64_t(head) * s.D + at) * key.share + i] *
                           (L == 2 ? 256.0f : 1.0f);
          for (int v = 0; v < vectors; ++v) {
            const int here = t + v * kLanes;
            const F g = load_some(r.gains + i * B + here, B - here);
            x[j][v] += g * (joined<L>(acc[j][v]) * by + (key.share == 1 ? gain[at] : 0.0f));
            if (offset)
              x[j][v] += load_some(r.offsets + i * B + here, B - here) * offset[i * s.D + at];
          }
        }
      }
      for (int v = 0; v < vectors; ++v) {
        const int here = t + v * kLanes;
        F a = x[0][v], b = x[1][v];
        if (channels == 2) {
          // the angle is what float32 makes of position times frequency, as where it was coded
          F cosine = load_some(key.turn + int64_t(d) * B + here, B - here);
          F sine = load_some(key.turn + (int64_t(n) + d) * B + here, B - here);
          F position = all(start + static_cast<float>(here));
          for (int i = 0; i < kLanes; ++i) position[i] += static_cast<float>(i);
          const float f = key.frequency[d];
          const F in_page = load_some(key.turn + (int64_t(2 * n) + d) * B + here, B - here);
          const float base = start * f;
          F angle = position * f;
          // not contracted into one operation: float32 rounds the product
          asm volatile("" : "+m"(angle));
          const F more = (angle - base) - in_page;
          const F c = cosine - sine * more, si = sine + cosine * more;
          const F turned = a * c - b * si;
          b = b * c + a * si;
          a = turned;
        }
        for (int m = 0; m < s.M; ++m) {
          float* to = scores + m * stride + here;
          F y = load_some(to, B - here) + a * q[m * s.D + d];
          if (channels == 2) y += b * q[m * s.D + n + d];
          store_some(to, y, B - here);
        }
      }
    }
  }
}

// scores [M][stride] += products with a mean that turns: waves around the middle of the page.
void wave_scores(const Side& key, const Shape& s, const Room& r, int head, const float* states,
                 float* scores, int64_t stride) {
  const int n = key.pairs, half = s.B / 2, slow = n - key.fast, powers = key.waves - key.fast;
  const float* mean = key.middle + int64_t(head) * s.D;
  float* even = r.tile;  // heights of the waves [M][pairs]
  float* odd = r.tile + int64_t(s.M) * n;
  for (int m = 0; m < s.M; ++m) {
    const float* q = states + m * s.D;
    float* a = even + m * n;
    float* b = odd + m * n;
    for (int i = 0; i < n; i += kLanes) {
      const F q1 = load_some(q + i, n - i), q2 = load_some(q + n + i, n - i);
      const F m1 = load_some(mean + i, n - i), m2 = load_some(mean + n + i, n - i);
      store_some(a + i, q1 * m1 + q2 * m2, n - i);
      store_some(b + i, q2 * m1 - q1 * m2, n - i);
    }
    float power[2][8];
    for (int k = 0; k < powers; ++k) {
      power[0][k] = dot_float(a + key.fast, key.slow + k * slow, slow);
      power[1][k] = dot_float(b + key.fast, key.slow + (powers + k) * slow, slow);
    }
    for (int k = 0; k < powers; ++k) a[key.fast + k] = power[0][k], b[key.fast + k] = power[1][k];
  }
  float* sums = r.part;  // [M][even and odd][half]
  zero(sums, int64_t(s.M) * s.B);
  add_product(s.M, key.waves, half, even, n, key.wave, half, sums, s.B);
  add_product(s.M, key.waves, half, odd, n, key.wave + int64_t(key.waves) * half, half, sums + half,
              s.B);
  for (int m = 0; m < s.M; ++m) {
    const float rest = dot_float(states + m * s.D + 2 * n, mean + 2 * n, s.D - 2 * n);
    const float* a = sums + int64_t(m) * s.B;
    float* to = scores + m * stride;
    int i = 0;
    for (; i + kLanes <= half; i += kLanes) {
      const F x = load<F>(a + i) + rest, y = load<F>(a + half + i);
      float* after = to + half + i;
      float* before = to + half - i - kLanes;
      store(after, load<F>(after) + x + y);
      store(before, load<F>(before) + reversed(x - y));
    }
    for (; i < half; ++i) {
      to[half + i] += a[i] + rest + a[half + i];
      to[half - 1 - i] += a[i] + rest - a[half + i];
    }
  }
}

// Scores [M][stride] of one page.
void page_scores(const Work& w, const Queries& q, const Room& r, const uint8_t* page,
                 int64_t next, int row, int head, int block, float* scores, int64_t stride) {
  const Call& call = *w.call;
  const Side& key = *call.key;
  const Shape& s = w.shape;
  const int B = s.B, M = s.M;
  fetch_parameters(key, page + next, head, 0);
  fetch_parameters(*call.value, page, head, 1024);
  for (int m = 0; m < M; ++m) zero(scores + m * stride, B);
  const float* states = q.states;
  if (key.turns != kNothing) {
    turn_back(call, s, row, block, q.states, r.turned);
    states = r.turned;
  }
  if (key.turns == kToken) {
    if (s.limbs == 2) {
      token_scores<2>(w, r, page, row, head, block, states, scores, stride);
    } else {
      token_scores<3>(w, r, page, row, head, block, states, scores, stride);
    }
    return;
  }
  read_gains(key, page, head, w.gain_table, r.gains);
  const float* constant = q.gain;
  int constants = 1;
  const int8_t* pattern = q.pattern;
  const float* scale = q.scale;
  if (key.kind == kDigits && key.turns == kPage) {
    const float* gain = key.gain + int64_t(head) * s.D;
    for (int m = 0; m < M; ++m) r.page_gain[m] = dot_float(states + m * s.D, gain, s.D);
    if (s.limbs == 2 && key.short_matrix) {
      const int64_t columns = key.short_columns, at = head * columns;
      int16_t* shorts = reinterpret_cast<int16_t*>(r.limbs);  // [M][D]
      for (int m = 0; m < M; ++m)
        r.scale[m] = to_shorts(states + m * s.D, s.D, shorts + m * s.D);
      short_product(M, s.D / 2, s.C, shorts, key.short_matrix + at * s.D, columns, r.scale,
                    key.short_unit + at, r.code, s.C);
    } else {
      zero(r.code, int64_t(M) * s.C);
      add_product(M, s.D, s.C, states, s.D, key.matrix + int64_t(head) * s.D * s.C, s.C, r.code, s.C);
    }
    make_patterns(call, s, head, r.code, r.scale, r.pattern);
    constant = r.page_gain, pattern = r.pattern, scale = r.scale;
  } else if (key.segments) {
    // a page of one segment is laid out like a query for the whole page
    const int64_t padded = key.segments > 1 ? up(s.C, 64) : s.C;
    const int n = key.segments * s.C;
    const uint8_t* steps = page + key.scale_at + 2LL * head * n;
    const uint8_t* zeros = page + key.zero_at + 2LL * head * n;
    for (int g = 0; g < key.segments; ++g) {
      widen(steps + 2LL * g * s.C, kFloat16, s.C, r.tile);
      widen(zeros + 2LL * g * s.C, kFloat16, s.C, r.tile + s.C);
      for (int m = 0; m < M; ++m) {
        float* to = r.code + (int64_t(m) * key.segments + g) * padded;
        F zeros_part{};
        int c = 0;
        for (; c < s.C; c += kLanes) {
          const F x = load_some(states + int64_t(m) * s.D + c, s.C - c);
          store_some(to + c, x * load_some(r.tile + c, s.C - c), s.C - c);
          zeros_part += x * load_some(r.tile + s.C + c, s.C - c);
        }
        if (padded > s.C) zero(to + s.C, padded - s.C);
        r.page_gain[m * key.segments + g] = sum(zeros_part);
      }
    }
    make_patterns(call, s, head, r.code, r.scale, r.pattern);
    constant = r.page_gain, pattern = r.pattern, scale = r.scale;
    constants = key.segments;
  }
  if (key.kind == kDigits) {
    digit_scores(w, r, page, next, head, pattern, scale, scores, stride);
    const int run = B / constants;
    for (int m = 0; m < M; ++m)
      for (int g = 0; g < constants; ++g) {
        const float more = constant[m * constants + g];
        float* to = scores + m * stride + g * run;
        const float* gain = r.gains + g * run;
        for (int t = 0; t < run; ++t) to[t] = (to[t] + more) * gain[t];
      }
  } else if (key.kind == kStates) {
    widen(page + key.states_at + int64_t(head) * B * s.D * type_size(key.states_type),
          key.states_type, B * s.D, r.tile);
    add_dots(M, s.D, B, states, s.D, r.tile, s.D, scores, stride);
    for (int m = 0; m < M; ++m)
      for (int t = 0; t < B; ++t) scores[m * stride + t] *= r.gains[t];
  } else {
    const Section* section = whole_section(key, head, true);
    if (!section) unpack_head(key, page, head, true, r.digits, r.column);
    const int run = s.C / s.G;
    for (int g = 0; g < s.G; ++g) {
#if KVFOLD_BITS >= 256
      if (section) {
        const uint8_t* from = page + section->at;
        const Codebook book =
            codebook(key.table + key.table_at[int64_t(head) * s.C], section->width);
        const float* x = q.code + g * run;
        if (section->width == 4) code_scores<4>(from, B, g * run, run, book, M, x, s.C, r.part);
        if (section->width == 2) code_scores<2>(from, B, g * run, run, book, M, x, s.C, r.part);
        if (section->width == 1) code_scores<1>(from, B, g * run, run, book, M, x, s.C, r.part);
      }
#endif
      if (!section) zero(r.part, int64_t(M) * B);
      for (int c = 0; c < run && !section; c += 16) {
        const int some = lower(16, run - c);
        for (int i = 0; i < some; ++i)
          decode_column(key, head, g * run + c + i, r.digits, r.tile + int64_t(i) * B);
        add_product(M, some, B, q.code + g * run + c, s.C, r.tile, B, r.part, B);
      }
      for (int m = 0; m < M; ++m)
        for (int t = 0; t < B; ++t)
          scores[m * stride + t] += r.part[m * B + t] * r.gains[g * B + t];
    }
  }
  if (key.offset_at >= 0) {
    read_offsets(key, page, head, r.offsets);
    for (int m = 0; m < M; ++m)
      for (int g = 0; g < s.G; ++g) {
        const float by = q.offset[m * s.G + g];
        for (int t = 0; t < B; ++t) scores[m * stride + t] += by * r.offsets[g * B + t];
      }
  }
  if (key.waves) {
    wave_scores(key, s, r, head, states, scores, stride);
  } else if (key.mean) {
    add_product(M, s.D, B, states, s.D, key.mean + int64_t(head) * s.D * B, B, scores, stride);
  }
}

// --- values of some pages ------------------------------------------------------------------------

void digit_values(const Work& w, const Room& r, const uint8_t* const* page, int pages, int head,
                  int first, int count, const float* weights, int64_t stride,
                  const Sums& t) {
  const Call& call = *w.call;
  const Side& value = *call.value;
  const Shape& s = w.shape;
  const int B = s.B, M = s.M, tokens = pages * B;
  for (int m = 0; m < M; ++m)
    r.by[m] = to_limbs(weights + m * stride, tokens, r.by[m], s.limbs,
                       r.limbs + int64_t(m) * s.limbs * tokens, tokens);
  // the widths that the run of columns has
  for (int i = 0; i < value.sections; ++i) {
    const Section& part = value.section[head * value.sections + i];
    const int low = part.start > first ? part.start : first;
    const int high = lower(part.start + part.count, first + count);
    if (low >= high) continue;
    const int bytes = column_bytes(B, part.width), stored = B * part.width / 8;
    const int planes = 8 / part.width;
    const int64_t of_query = int64_t(planes) * s.limbs * bytes;  // of a page
    if (bytes != stored) memset(r.value_patterns, 0, static_cast<size_t>(of_query * M * pages));
    const int piece = lower(bytes, kPiece);  // of a column
    for (int m = 0; m < M; ++m) {
      const int first_row = m / kRows * kRows, rows = lower(kRows, M - first_row) * s.limbs;
      for (int p = 0; p < pages; ++p)
        for (int l = 0; l < s.limbs; ++l) {
          const int8_t* from = r.limbs + (int64_t(m) * s.limbs + l) * tokens + p * B;
          int8_t* to = r.value_patterns + of_query * (first_row * pages + p * rows / s.limbs) +
                       ((m - first_row) * s.limbs + l) * piece;
          if (part.width == 4) value_pattern<4>(from, B, piece, rows, to);
          if (part.width == 2) value_pattern<2>(from, B, piece, rows, to);
          if (part.width == 1) value_pattern<1>(from, B, piece, rows, to);
        }
    }
    const uint8_t* column[kBatch];
    const int n = high - low;
    uint8_t* copy = r.copy;
    for (int p = 0; p < pages; ++p) {
      const int64_t at = part.at + int64_t(low - part.start) * stored;
      column[p] = page[p] + at;
      // whole vectors of columns are read
      if (bytes != stored || at + up(n, kLanes) * stored > call.page_bytes) {
        for (int c = 0; c < n; ++c) {
          memcpy(copy + c * bytes, column[p] + c * stored, static_cast<size_t>(stored));
          memset(copy + c * bytes + stored, 0, static_cast<size_t>(bytes - stored));
        }
        column[p] = copy;
        copy += up(n, kLanes) * bytes;
      }
    }
    const int centre = value.centred ? 1 << (part.width - 1) : 0;
#define VALUES(W, L)                                                                          \
  value_section<W, L>(column, pages, n, bytes, r.value_patterns, M, r.by, centre, \
                      t.columns + low, w.width)
    if (s.limbs == 2) {
      if (part.width == 4) VALUES(4, 2);
      if (part.width == 2) VALUES(2, 2);
      if (part.width == 1) VALUES(1, 2);
    } else {
      if (part.width == 4) VALUES(4, 3);
      if (part.width == 2) VALUES(2, 3);
      if (part.width == 1) VALUES(1, 3);
    }
#undef VALUES
  }
}

void page_values(const Work& w, const Room& r, const uint8_t* const* page, int pages, int head,
                 const Sums& t) {
  const Side& value = *w.call->value;
  const Shape& s = w.shape;
  const int B = s.B, M = s.M, G = s.O, tokens = pages * B;
  const int64_t stride = int64_t(kBatch) * B;
  for (int p = 0; p < pages; ++p) read_gains(value, page[p], head, w.gain_table, r.gains + p * G * B);
  if (value.offset_at >= 0)
    for (int p = 0; p < pages; ++p) read_offsets(value, page[p], head, r.offsets + p * G * B);
  const int run = value.columns / G;
  const bool coded = value.kind == kCodes || value.kind == kPolar;
  const Section* section = coded ? whole_section(value, head, false) : nullptr;
  if (coded && !section)
    for (int p = 0; p < pages; ++p)
      unpack_head(value, page[p], head, false, r.digits + int64_t(p) * widest(value) * B, r.column);
  for (int g = 0; g < G; ++g) {
    for (int m = 0; m < M; ++m) {
      F gain{}, offset{}, most{};
      for (int p = 0; p < pages; ++p)
        for (int i = 0; i < B; i += kLanes) {
          const int64_t at = m * stride + p * B + i;
          const F weight = load_some(r.scores + at, B - i);
          const F x = weight * load_some(r.gains + (p * G + g) * B + i, B - i);
          store_some(r.weights + at, x, B - i);
          gain += x, most = larger(most, larger(x, -x));
          if (value.offset_at >= 0)
            offset += weight * load_some(r.offsets + (p * G + g) * B + i, B - i);
        }
      r.by[m] = top_of(most);
      t.gain[m * G + g] += sum(gain);
      t.offset[m * G + g] += sum(offset);
    }
    if (value.kind == kDigits) {
      digit_values(w, r, page, pages, head, g * run, run, r.weights, stride, t);
    } else if (value.kind == kStates) {
      for (int p = 0; p < pages; ++p) {
        widen(page[p] + value.states_at +
                  int64_t(head) * B * s.V * type_size(value.states_type),
              value.states_type, B * s.V, r.tile);
        add_product(M, B, s.V, r.weights + p * B, stride, r.tile, s.V, t.columns, w.width);
      }
#if KVFOLD_BITS >= 256
    } else if (section) {
      const Codebook book =
          codebook(value.table + value.table_at[int64_t(head) * value.columns], section->width);
      const uint8_t* from[kBatch];
      for (int p = 0; p < pages; ++p)
        from[p] = page[p] + section->at + int64_t(g) * run * (B * section->width / 8);
      float* to = t.columns + g * run;
      if (section->width == 4)
        code_values<4>(from, pages, B, run, book, M, r.weights, stride, to, w.width);
      if (section->width == 2)
        code_values<2>(from, pages, B, run, book, M, r.weights, stride, to, w.width);
      if (section->width == 1)
        code_values<1>(from, pages, B, run, book, M, r.weights, stride, to, w.width);
#endif
    } else {
      for (int c = g * run; c < (g + 1) * run; ++c) {
        for (int p = 0; p < pages; ++p)
          decode_column(value, head, c, r.digits + int64_t(p) * widest(value) * B,
                        r.tile + p * B);
        add_dots(M, tokens, 1, r.weights, stride, r.tile, 0, t.columns + c, w.width);
      }
    }
  }
}

// --- softmax -------------------------------------------------------------------------------------

// Scores to weights e^(s - top); raises `top`, and shrinks what was summed under the old one.
void weigh(const Work& w, float* scores, int64_t stride, int tokens, int row, const Sums& t,
           int width) {
  const Call& call = *w.call;
  const Shape& s = w.shape;
  for (int m = 0; m < s.M; ++m) {
    float* x = scores + m * stride;
    const bool padding =
        call.query_tokens[row * int64_t(call.queries) + m % call.queries] < 0;
    if (call.softcap > 0)
      for (int i = 0; i < tokens; i += kLanes) {
        const F y = load_some(x + i, tokens - i);
        const F capped = hyperbolic_tangent(y * (1.0f / call.softcap)) * call.softcap;
        store_some(x + i, y < all(-3e38f) ? y : capped, tokens - i);  // unseen tokens stay so
      }
    F most = all(-__builtin_inff());
    for (int i = 0; i < tokens; i += kLanes)
      most = larger(most, first(load_some(x + i, tokens - i), tokens - i, -__builtin_inff()));
    const float before = t.top[m];
    float top = top_of(most);
    if (padding || top < before) top = before;
    if (top > before) {
      const float shrink = before > -3e38f ? exponential(all(before - top))[0] : 0.0f;
      t.one[m] *= shrink;
      for (int g = 0; g < s.O; ++g) t.gain[m * s.O + g] *= shrink, t.offset[m * s.O + g] *= shrink;
      for (int c = 0; c < width; ++c) t.columns[int64_t(m) * w.width + c] *= shrink;
      t.top[m] = top;
    }
    if (padding) {
      zero(x, tokens);
      continue;
    }
    F total{};
    for (int i = 0; i < tokens; i += kLanes) {
      const F y = exponential(load_some(x + i, tokens - i) - top);
      store_some(x + i, y, tokens - i);
      total += first(y, tokens - i, 0.0f);
    }
    t.one[m] += sum(total);
  }
}

void clear(const Work& w, const Sums& t) {
  const Shape& s = w.shape;
  for (int m = 0; m < s.M; ++m) t.top[m] = -__builtin_inff();
  zero(t.one, s.M);
  zero(t.gain, int64_t(s.M) * s.O);
  zero(t.offset, int64_t(s.M) * s.O);
  zero(t.columns, int64_t(s.M) * w.width);
}

void packed_part(const Work& w, const Room& r, int row, int head, int split, const Sums& t) {
  const Call& call = *w.call;
  const Shape& s = w.shape;
  const Queries q = queries_of(w, int64_t(row) * call.key->heads + head);
  const int end = lower(call.folded[row], (split + 1) * kSplit);
  const int64_t stride = int64_t(kBatch) * s.B;
  fetch_parameters(*call.key, page_of(call, row, split * kSplit), head, call.page_bytes);
  for (int b = split * kSplit; b < end; b += kBatch) {
    const int pages = lower(kBatch, end - b);
    const uint8_t* page[kBatch];
    for (int p = 0; p < pages; ++p) page[p] = page_of(call, row, b + p);
    for (int p = 0; p < pages; ++p) {
      const int64_t next = b + p + 1 < end ? page_of(call, row, b + p + 1) - page[p] : 0;
      page_scores(w, q, r, page[p], next, row, head, b + p, r.scores + p * s.B, stride);
    }
    weigh(w, r.scores, stride, pages * s.B, row, t, call.value->columns);
    page_values(w, r, page, pages, head, t);
  }
}

void exact_part(const Work& w, const Room& r, int row, int head, const Sums& t) {
  const Call& call = *w.call;
  const Shape& s = w.shape;
  const Queries q = queries_of(w, int64_t(row) * call.key->heads + head);
  const int64_t size = type_size(call.exact_type), stride = int64_t(kBatch) * s.B;
  // the queries' channels stand in the order of the turns, and so must the keys'
  const int32_t* order = call.key->order;
  for (int first = 0; first < call.exact; first += s.B) {
    const int some = lower(s.B, call.exact - first);
    const int64_t* tokens = call.tokens + int64_t(row) * call.exact + first;
    const char* keys = static_cast<const char*>(call.exact_keys) +
                       size * (row * call.key_stride[0] + head * call.key_stride[1] +
                               first * call.key_stride[2]);
    for (int i = 0; i < some; ++i) {
      float* to = r.tile + int64_t(i) * s.D;
      const char* from = keys + size * i * call.key_stride[2];
      if (!order) {
        widen(from, call.exact_type, s.D, to);
      } else {
        widen(from, call.exact_type, s.D, r.turned);
        for (int d = 0; d < s.D; ++d) to[d] = r.turned[order[d]];
      }
    }
    for (int m = 0; m < s.M; ++m) zero(r.scores + m * stride, some);
    add_dots(s.M, s.D, some, q.states, s.D, r.tile, s.D, r.scores, stride);
    for (int m = 0; m < s.M; ++m) {
      const int64_t until = call.query_tokens[row * int64_t(call.queries) + m % call.queries];
      for (int i = 0; i < some; ++i)
        if (tokens[i] < 0 || tokens[i] > until) r.scores[m * stride + i] = -__builtin_inff();
    }
    weigh(w, r.scores, stride, some, row, t, s.V);
    const char* values = static_cast<const char*>(call.exact_values) +
                         size * (row * call.value_stride[0] + head * call.value_stride[1] +
                                 first * call.value_stride[2]);
    for (int i = 0; i < some; ++i)
      widen(values + size * i * call.value_stride[2], call.exact_type, s.V,
            r.tile + int64_t(i) * s.V);
    add_product(s.M, some, s.V, r.scores, stride, r.tile, s.V, t.columns, w.width);
  }
}

// --- merging -------------------------------------------------------------------------------------

void finish(const Work& w, const Room& r, int row, int head) {
  const Call& call = *w.call;
  const Side& value = *call.value;
  const Shape& s = w.shape;
  const int64_t at = int64_t(row) * call.key->heads + head;
  const int splits = (call.folded[row] + kSplit - 1) / kSplit;
  const Sums exact = sums_of(w, at, 0);
  float* out = r.tile;
  for (int m = 0; m < s.M; ++m) {
    float top = exact.top[m];
    for (int i = 1; i <= splits; ++i) {
      const float other = sums_of(w, at, i).top[m];
      top = other > top ? other : top;
    }
    float sink = 0;
    const float* logit = call.sink_logits;
    if (logit) {
      logit += head * w.group + m / call.queries;
      top = *logit > top ? *logit : top;
    }
    if (!(top > -3e38f)) top = 0;  // a padding query: sees nothing
    if (logit) sink = exponential(all(*logit - top))[0];
    // the packed parts together, in the first one's place
    Sums cold{};
    if (splits) {
      cold = sums_of(w, at, 1);
      for (int i = 1; i <= splits; ++i) {
        const Sums part = sums_of(w, at, i);
        const float by = exponential(all(part.top[m] - top))[0];
        const float keep = i == 1 ? 0.0f : 1.0f;
        cold.one[m] = keep * cold.one[m] + by * part.one[m];
        for (int g = 0; g < s.O; ++g) {
          const int j = m * s.O + g;
          cold.gain[j] = keep * cold.gain[j] + by * part.gain[j];
          cold.offset[j] = keep * cold.offset[j] + by * part.offset[j];
        }
        const int64_t base = int64_t(m) * w.width;
        for (int c = 0; c < value.columns; ++c)
          cold.columns[base + c] = keep * cold.columns[base + c] + by * part.columns[base + c];
      }
    }
    const float by = exponential(all(exact.top[m] - top))[0];
    for (int d = 0; d < s.V; ++d) out[d] = by * exact.columns[int64_t(m) * w.width + d];
    float norm = by * exact.one[m] + sink;
    if (splits) {
      norm += cold.one[m];
      if (value.kind == kStates) {
        for (int d = 0; d < s.V; ++d) out[d] += cold.columns[int64_t(m) * w.width + d];
      } else {
        add_product(1, value.columns, s.V, cold.columns + int64_t(m) * w.width, w.width,
                    value.matrix + int64_t(head) * value.columns * s.V, s.V, out, s.V);
        const float* gain = value.gain + int64_t(head) * s.V;
        for (int d = 0; d < s.V; ++d) out[d] += cold.gain[m * s.O] * gain[d];
        if (value.offset)
          add_product(1, s.O, s.V, cold.offset + m * s.O, s.O,
                      value.offset + int64_t(head) * s.O * s.V, s.V, out, s.V);
        if (value.mean)
          for (int d = 0; d < s.V; ++d) out[d] += cold.one[m] * value.mean[int64_t(head) * s.V + d];
      }
    }
    const float inverse = norm > 0 ? 1.0f / norm : 1.0f;
    char* to = static_cast<char*>(call.out) +
               type_size(call.type) *
                   (row * call.out_stride[0] +
                    (int64_t(head) * w.group + m / call.queries) * call.out_stride[1] +
                    (m % call.queries) * call.out_stride[2]);
    for (int d = 0; d < s.V; ++d) {
      const float y = out[d] * inverse;
      if (call.type == kFloat32) {
        store(to + 4 * d, y);
      } else {
        store(to + 2 * d, call.type == kFloat16 ? to_half(y) : to_brain(y));
      }
    }
  }
}

void task(void* context, int64_t index) {
  const Work& w = *static_cast<const Work*>(context);
  const Call& call = *w.call;
  const int heads = call.key->heads, parts = w.splits + 1;
  // a head's longest tasks first, its exact part last
  const int part = static_cast<int>(parts - 1 - index / (int64_t(call.rows) * heads));
  const int64_t at = index % (int64_t(call.rows) * heads);
  const int row = static_cast<int>(at / heads), head = static_cast<int>(at % heads);
  if (part > (call.folded[row] + kSplit - 1) / kSplit) return;
  int32_t untouched = 0;
  if (__atomic_compare_exchange_n(&w.ready[at], &untouched, 1, false, __ATOMIC_ACQUIRE,
                                  __ATOMIC_ACQUIRE)) {
    prepare(w, row, head);
    __atomic_store_n(&w.ready[at], 2, __ATOMIC_RELEASE);
  } else {
    while (__atomic_load_n(&w.ready[at], __ATOMIC_ACQUIRE) != 2) {
    }
  }
  int64_t bytes = 0;
  room_of(w, true, &bytes);
  const Room r = room_of(w, false, &bytes);
  const Sums t = sums_of(w, at, part);
  clear(w, t);
  if (part) {
    packed_part(w, r, row, head, part - 1, t);
  } else {
    exact_part(w, r, row, head, t);
  }
  if (__atomic_sub_fetch(&w.left[at], 1, __ATOMIC_ACQ_REL) == 0) finish(w, r, row, head);
}

}  // namespace

void attend(const Call& call) {
  const Side& key = *call.key;
  const Side& value = *call.value;
  Work w{};
  w.call = &call;
  w.group = call.query_heads / key.heads;
  Shape& s = w.shape;
  s.M = w.group * call.queries;
  s.D = key.dim, s.V = value.dim, s.B = key.block, s.C = key.columns;
  s.G = key.groups, s.O = value.groups;
  s.limbs = call.type == kFloat32 ? 3 : 2;
  const int len = key.segments ? key.block / key.segments : key.block;
  s.sets = 1;
  for (int h = 0; h < key.heads; ++h) {
    int chunks = 0;
    for (int i = 0; i < key.sections; ++i) chunks += (key.section[h * key.sections + i].count + 15) / 16;
    if (chunks > s.chunks) s.chunks = chunks;
  }
  for (int width = 1; width <= 4; width *= 2) {
    const int words = key.block * width / 16;
    s.run[width / 2] = lower(words, len);
    const int sets = 8 / width * (words / s.run[width / 2] ? words / s.run[width / 2] : 1);
    if (key.segments && sets > s.sets) s.sets = sets;
  }
  s.set_bytes = s.M * s.limbs * kPatternRow;
  s.pattern_bytes = s.set_bytes * s.sets;
  int most = 0;
  for (int r = 0; r < call.rows; ++r) most = call.folded[r] > most ? call.folded[r] : most;
  w.splits = (most + kSplit - 1) / kSplit;
  w.width = static_cast<int>(up(value.columns > s.V ? value.columns : s.V, 16));
  w.per_sums = up(4LL * s.M, 64) * 2 + up(4LL * s.M * s.O, 64) * 2 + up(4LL * s.M * w.width, 64);
  w.per_head = queries_bytes(s) + (w.splits + 1) * w.per_sums;
  const int64_t heads = int64_t(call.rows) * key.heads;
  char* memory = static_cast<char*>(scratch(0, heads * (w.per_head + 8) + 1024 + 256));
  w.memory = reinterpret_cast<char*>(up(reinterpret_cast<int64_t>(memory), 64));
  w.ready = reinterpret_cast<int32_t*>(w.memory + heads * w.per_head);
  w.left = w.ready + heads;
  float gains[256];
  for (int i = 0; i < 256; ++i)
    gains[i] = i ? static_cast<float>(__builtin_exp2((i - 128) / 16.0)) : 0.0f;
  w.gain_table = gains;
  for (int64_t i = 0; i < heads; ++i) {
    w.ready[i] = 0;
    w.left[i] = 1 + (call.folded[i / key.heads] + kSplit - 1) / kSplit;
  }
  parallel(task, &w, heads * (w.splits + 1), call.threads);
}

}  // namespace KVFOLD_NAMESPACE
}  // namespace kvfold
