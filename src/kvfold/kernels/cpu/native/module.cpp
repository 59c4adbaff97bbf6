// The Python face: structs from dicts of numbers, and two calls. Pointers come as integers from
// tensors that the caller keeps alive; nothing here links to torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "fold.h"
#include "operand.h"

namespace nb = nanobind;
using kvfold::Blocks;
using kvfold::Call;
using kvfold::Side;

namespace {

// instruction sets that were compiled in and that this machine has, best first
std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
#if defined(KVFOLD_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni"))
    found.push_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    found.push_back("avx2");
#endif
  found.push_back("portable");
  return found;
}

using Attend = void (*)(const Call&);
using Fold = void (*)(const Blocks&);

struct Entries {
  Attend attend;
  Fold fold;
};

Entries entries_of(const std::string& name) {
  for (const std::string& known : instruction_sets()) {
    if (known != name) continue;
#if defined(KVFOLD_X86)
    if (name == "avx512") return {kvfold::avx512::attend, kvfold::avx512::fold};
    if (name == "avx2") return {kvfold::avx2::attend, kvfold::avx2::fold};
#endif
    return {kvfold::portable::attend, kvfold::portable::fold};
  }
  throw std::invalid_argument("no instruction set '" + name + "' here");
}

template <class T>
T number(const nb::dict& d, const char* name) {
  return nb::cast<T>(d[name]);
}

template <class T>
const T* pointer(const nb::dict& d, const char* name) {
  return reinterpret_cast<const T*>(nb::cast<uintptr_t>(d[name]));
}

Side side_of(const nb::dict& d) {
  Side s{};
#define NUMBER(field) s.field = number<int32_t>(d, #field)
#define POINTER(field, type) s.field = pointer<type>(d, #field)
  NUMBER(kind), NUMBER(heads), NUMBER(dim), NUMBER(block), NUMBER(columns), NUMBER(groups);
  NUMBER(gain_at), NUMBER(gain_size), NUMBER(gain_next), NUMBER(offset_at), NUMBER(sections);
  NUMBER(centred);
  POINTER(section, kvfold::Section), POINTER(matrix, float), POINTER(gain, float);
  POINTER(offset, float), POINTER(mean, float), POINTER(order, int32_t);
  POINTER(short_matrix, int16_t), POINTER(short_unit, float), NUMBER(short_columns);
  NUMBER(turns), NUMBER(pairs), NUMBER(scale_at), NUMBER(zero_at), NUMBER(segments);
  NUMBER(share), POINTER(limbs, int8_t), POINTER(limb_scale, float), POINTER(turn, float);
  NUMBER(waves), NUMBER(fast), POINTER(wave, float), POINTER(slow, float), POINTER(middle, float);
  POINTER(frequency, float), POINTER(term, int32_t), POINTER(table_at, int32_t);
  POINTER(table, float), NUMBER(plain), NUMBER(brief), NUMBER(cos_at), NUMBER(sin_at), NUMBER(states_at), NUMBER(states_type);
#undef NUMBER
#undef POINTER
  return s;
}

// one layer: its two sides and where its pages lie
struct Layer {
  Side key, value;
  int64_t page_bytes, slab_pages;
  int32_t sinks;
  std::vector<const uint8_t*> slabs;
};

kvfold::Code code_of(const nb::dict& d) {
  kvfold::Code c{};
#define NUMBER(field) c.field = number<int32_t>(d, #field)
#define POINTER(field, type) c.field = pointer<type>(d, #field)
  NUMBER(heads), NUMBER(dim), NUMBER(block), NUMBER(nbytes), NUMBER(gain_at), NUMBER(search);
  POINTER(coordinate, kvfold::Coordinate), POINTER(first_coordinate, int32_t);
  POINTER(column, kvfold::Column), POINTER(first_column, int32_t);
  POINTER(gain, float), POINTER(level, float), POINTER(threshold, float);
#undef NUMBER
#undef POINTER
  return c;
}

// what all layers of a model's step share
struct Step {
  int32_t rows, queries;
  const int64_t* query_tokens;
  const int64_t* tokens;
  int32_t exact;
  const int32_t* folded;
  const int32_t* first;
  const int32_t* table;
  const int32_t* block;
  int64_t table_stride;
};

template <class T>
const T* at(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

void attend(const Layer& layer, const Step& step, uintptr_t isa, uintptr_t page_turn, uintptr_t q,
            uintptr_t out, int type, int query_heads, int64_t q_row, int64_t q_head,
            int64_t q_query, int64_t out_row, int64_t out_head, int64_t out_query,
            uintptr_t keys, uintptr_t values, int exact_type, int64_t key_row, int64_t key_head,
            int64_t key_token, int64_t value_row, int64_t value_head, int64_t value_token,
            double scaling, double softcap, uintptr_t sink_logits, int threads) {
  Call c{};
  c.key = &layer.key, c.value = &layer.value;
  c.page_bytes = layer.page_bytes, c.slab_pages = layer.slab_pages;
  c.slabs = layer.slabs.data(), c.sinks = layer.sinks;
  c.rows = step.rows, c.queries = step.queries, c.query_heads = query_heads, c.threads = threads;
  c.q = at<void>(q), c.out = reinterpret_cast<void*>(out), c.type = type;
  c.q_stride[0] = q_row, c.q_stride[1] = q_head, c.q_stride[2] = q_query;
  c.out_stride[0] = out_row, c.out_stride[1] = out_head, c.out_stride[2] = out_query;
  c.exact_keys = at<void>(keys), c.exact_values = at<void>(values);
  c.exact_type = exact_type, c.exact = step.exact;
  c.key_stride[0] = key_row, c.key_stride[1] = key_head, c.key_stride[2] = key_token;
  c.value_stride[0] = value_row, c.value_stride[1] = value_head, c.value_stride[2] = value_token;
  c.tokens = step.tokens, c.query_tokens = step.query_tokens;
  c.folded = step.folded, c.first = step.first;
  c.table = step.table, c.block = step.block, c.table_stride = step.table_stride;
  c.page_turn = at<float>(page_turn);
  c.scaling = static_cast<float>(scaling), c.softcap = static_cast<float>(softcap);
  c.sink_logits = at<float>(sink_logits);
  nb::gil_scoped_release release;
  reinterpret_cast<Attend>(isa)(c);
}

void fold(const kvfold::Code& code, uintptr_t isa, uintptr_t states, uintptr_t out, int64_t blocks,
          int threads) {
  nb::gil_scoped_release release;
  reinterpret_cast<Fold>(isa)(
      {&code, at<float>(states), reinterpret_cast<uint8_t*>(out), blocks, threads});
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Attention on packed pages, and folding into them.";
  nb::class_<Layer>(m, "Layer")
      .def("__init__",
           [](Layer* self, nb::dict key, nb::dict value, int64_t page_bytes, int64_t slab_pages,
              int32_t sinks) {
             new (self) Layer{side_of(key), side_of(value), page_bytes, slab_pages, sinks, {}};
           })
      .def("place", [](Layer& self, const std::vector<uintptr_t>& slabs) {
        self.slabs.clear();
        for (uintptr_t slab : slabs) self.slabs.push_back(at<uint8_t>(slab));
      });
  nb::class_<Step>(m, "Step")
      .def("__init__", [](Step* self, int32_t rows, int32_t queries, uintptr_t query_tokens,
                          uintptr_t tokens, int32_t exact, uintptr_t folded, uintptr_t first,
                          uintptr_t table, uintptr_t block, int64_t table_stride) {
        new (self) Step{rows, queries, at<int64_t>(query_tokens), at<int64_t>(tokens), exact,
                        at<int32_t>(folded), at<int32_t>(first), at<int32_t>(table), at<int32_t>(block),
                        table_stride};
      });
  nb::class_<kvfold::Code>(m, "Code").def("__init__", [](kvfold::Code* self, nb::dict numbers) {
    new (self) kvfold::Code(code_of(numbers));
  });
  m.def("instruction_sets", &instruction_sets);
  m.def("entry", [](const std::string& name) {
    return reinterpret_cast<uintptr_t>(entries_of(name).attend);
  });
  m.def("fold_entry", [](const std::string& name) {
    return reinterpret_cast<uintptr_t>(entries_of(name).fold);
  });
  m.def("attend", &attend);
  m.def("fold", &fold);
}
