// Products of few rows: sums stay in registers, x lies as the sums read it, W is read as it lies.
// T rows of x, K depth, N columns (rows of W)

#include "few_rows.h"

#include <algorithm>

#include "../checks.h"
#include "lanes.h"

namespace mllmcl {
namespace {

constexpr int64_t kSpan = 24;  // columns of one piece of work: a multiple of the columns of every tile
constexpr int64_t kMostPairs = 2;
constexpr int64_t kLine = 16;  // numbers in a line of the cache: a load across two of them counts twice

// The registers of a tile. Types of vectors lose their alignment as template arguments, members of a struct do not.
struct WideTile {
  typedef Wide V;
  static constexpr int64_t count = 2 * kLanes;
  static MLLMCL_INLINE const Wide& load(const float* at) { return as<Sixteen>(at); }
  static MLLMCL_INLINE void halve(const Wide& x, Lanes& out) {
    Lanes low, high;
    eight_of(x, 0, low);
    eight_of(x, kLanes, high);
    out = low + high;
  }
};

struct NarrowTile {
  typedef Lanes V;
  static constexpr int64_t count = kLanes;
  static MLLMCL_INLINE const Lanes& load(const float* at) { return lanes(at); }
  static MLLMCL_INLINE void halve(const Lanes& x, Lanes& out) { out = x; }
};

// One of the pairs with x in panels: B rows a panel, of each of them L neighbours, then the next L.
struct Panels {
  const float* x;
  const float* w;
  int64_t depth;
  int64_t padded;  // depth as a multiple of L, filled up with zeros
};

template <typename S, int B, int C>
MLLMCL_INLINE void accumulate(typename S::V (&sums)[B * C], const float* x, const float* w, int64_t stride, int64_t depth) {
  constexpr int64_t L = S::count;
  for (int64_t k = 0; k < depth; k += L, x += B * L) {
    typename S::V columns[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) columns[c] = S::load(w + c * stride + k);
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      const typename S::V row = S::load(x + b * L);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[b * C + c] += row * columns[c];
    }
  }
}

// B rows times C columns from column n on; `out` is the first of `rows` rows
template <typename S, int B, int C>
MLLMCL_INLINE void tile(const Panels* pairs, int64_t count, int64_t panel, const float* bias, int64_t n, int64_t rows,
                        float* out, int64_t columns) {
  constexpr int64_t L = S::count;
  typename S::V sums[B * C] = {};
  for (int64_t pair = 0; pair < count; ++pair) {
    const Panels& from = pairs[pair];
    const float *x = from.x + panel * B * from.padded, *w = from.w + n * from.depth;
    const int64_t whole = from.depth / L * L;
    accumulate<S, B, C>(sums, x, w, from.depth, whole);
    if (whole == from.depth) continue;
    float tail[C * L] = {0.0f};
    for (int c = 0; c < C; ++c) std::copy_n(w + c * from.depth + whole, from.depth - whole, tail + c * L);
    accumulate<S, B, C>(sums, x + B * whole, tail, L, L);
  }
#pragma GCC unroll 8
  for (int first = 0; first < B * C; first += kLanes) {
    Lanes group[kLanes] = {};
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; ++i)
      if (first + i < B * C) S::halve(sums[first + i], group[i]);
    transpose(group);
    const Lanes totals = ((group[0] + group[4]) + (group[1] + group[5])) + ((group[2] + group[6]) + (group[3] + group[7]));
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; ++i) {
      const int64_t b = (first + i) / C, c = (first + i) % C;
      if (first + i < B * C && b < rows) out[b * columns + n + c] = totals[i] + (bias == nullptr ? 0.0f : bias[n + c]);
    }
  }
}

// Columns [n, last) of `panels` panels of B rows: the columns of a tile are read from memory for the first panel alone.
template <typename S, int B, int C>
MLLMCL_INLINE void columns_of(const Panels* pairs, int64_t count, int64_t panels, const float* bias, int64_t n,
                              int64_t last, int64_t rows, float* out, int64_t columns) {
  for (; n + C <= last; n += C)
    for (int64_t panel = 0; panel < panels; ++panel)
      tile<S, B, C>(pairs, count, panel, bias, n, rows - panel * B, out + panel * B * columns, columns);
  for (; n < last; ++n)
    for (int64_t panel = 0; panel < panels; ++panel)
      tile<S, B, 1>(pairs, count, panel, bias, n, rows - panel * B, out + panel * B * columns, columns);
}

#define MLLMCL_SLICE                                                                                                 \
  const Panels *pairs, int64_t count, int64_t panels, const float *bias, int64_t n, int64_t last, int64_t rows,       \
      float *out, int64_t columns
#define MLLMCL_GIVEN pairs, count, panels, bias, n, last, rows, out, columns

// 32 registers of 16 numbers
MLLMCL_CLONES void wide_slice(int64_t height, MLLMCL_SLICE) {
  switch (height) {
    case 1: return columns_of<WideTile, 1, 8>(MLLMCL_GIVEN);
    case 2: return columns_of<WideTile, 2, 8>(MLLMCL_GIVEN);
    case 4: return columns_of<WideTile, 4, 4>(MLLMCL_GIVEN);
    default: return columns_of<WideTile, 8, 3>(MLLMCL_GIVEN);
  }
}

// 16 registers of 8 numbers
MLLMCL_CLONES void narrow_slice(int64_t height, MLLMCL_SLICE) {
  switch (height) {
    case 1: return columns_of<NarrowTile, 1, 8>(MLLMCL_GIVEN);
    case 2: return columns_of<NarrowTile, 2, 4>(MLLMCL_GIVEN);
    default: return columns_of<NarrowTile, 4, 2>(MLLMCL_GIVEN);
  }
}

// out += f[0] w[0] + f[1] w[1] + ..., one after the other: zeros among the factors leave the bits of the rest
MLLMCL_CLONES void add_four(const float* f, const float* w, int64_t stride, int64_t count, float* __restrict__ out) {
  const float *w0 = w, *w1 = w + stride, *w2 = w + 2 * stride, *w3 = w + 3 * stride;
  const float f0 = f[0], f1 = f[1], f2 = f[2], f3 = f[3];
  for (int64_t i = 0; i < count; ++i) {
    float sum = out[i];
    sum += f0 * w0[i];
    sum += f1 * w1[i];
    sum += f2 * w2[i];
    sum += f3 * w3[i];
    out[i] = sum;
  }
}

MLLMCL_CLONES void add_one(float f, const float* w, int64_t count, float* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) out[i] += f * w[i];
}

// out += x w on columns [n, last), w [depth, columns] as it lies. Rows of w that no row of x needs are not read.
void add_rows(const Factors& more, int64_t first, int64_t rows, int64_t n, int64_t last, int64_t columns, float* out) {
  const float* x = more.x + first * more.depth;
  for (int64_t j = 0; j < more.depth; j += 4) {
    const int64_t group = std::min<int64_t>(4, more.depth - j);
    for (int64_t row = 0; row < rows; ++row) {
      const float *factors = x + row * more.depth + j, *w = more.w + j * columns + n;
      float* to = out + row * columns + n;
      if (std::all_of(factors, factors + group, [](float f) { return f == 0.0f; })) continue;
      if (group == 4) add_four(factors, w, columns, last - n, to);
      else for (int64_t i = 0; i < group; ++i) add_one(factors[i], w + i * columns, last - n, to);
    }
  }
}

bool has_wide_registers() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(MLLMCL_BASELINE)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

// Rows [first, first + count) of a product, in panels of `height` rows.
struct Group {
  int64_t first, count, height;
  int64_t panels() const { return (count + height - 1) / height; }
};

// Panels as high as registers allow, and a lower one for what is left.
std::vector<Group> groups_of(int64_t rows, int64_t most) {
  std::vector<Group> found;
  const int64_t left = rows % most, whole = left > most / 2 ? rows : rows - left;
  if (whole > 0) found.push_back({0, whole, most});
  if (whole < rows) found.push_back({whole, left, left == 3 ? 4 : left});
  return found;
}

float* on_a_line(float* at) {
  const auto place = reinterpret_cast<uintptr_t>(at);
  return at + (-place % (4 * kLine)) / 4;
}

void pack(const float* x, int64_t depth, int64_t padded, int64_t lane_count, const Group& group, float* out) {
  torch::stable::parallel_for(0, group.panels(), grain(group.height * depth), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t b = 0; b < group.height; ++b) {
        const int64_t row = panel * group.height + b;
        float* to = out + panel * group.height * padded + b * lane_count;
        for (int64_t k = 0; k < padded; k += lane_count, to += group.height * lane_count) {
          const int64_t here = row < group.count ? std::max<int64_t>(0, std::min(lane_count, depth - k)) : 0;
          if (here > 0) std::copy_n(x + (group.first + row) * depth + k, here, to);
          std::fill(to + here, to + lane_count, 0.0f);
        }
      }
  });
}

}  // namespace

void few_rows_product(const Factors* given, int64_t count, const float* bias, int64_t rows, int64_t columns, float* out,
                      const Factors* more) {
  need(0 < count && count <= kMostPairs, "few_rows_product takes one or two pairs");
  static const bool wide = has_wide_registers();
  const int64_t lane_count = wide ? 16 : 8, most = wide ? 8 : 4;
  for (const Group& group : groups_of(rows, most)) {
    std::vector<float> memory[kMostPairs];
    Panels pairs[kMostPairs];
    int64_t depth = 0;
    for (int64_t pair = 0; pair < count; ++pair) {
      const Factors& from = given[pair];
      const int64_t padded = (from.depth + lane_count - 1) / lane_count * lane_count;
      memory[pair].resize(group.panels() * group.height * padded + kLine);
      float* panels = on_a_line(memory[pair].data());
      pack(from.x, from.depth, padded, lane_count, group, panels);
      pairs[pair] = {panels, from.w, from.depth, padded};
      depth += from.depth;
    }
    torch::stable::parallel_for(0, (columns + kSpan - 1) / kSpan, grain(kSpan * depth * group.panels()),
                                [&](int64_t begin, int64_t end) {
      const int64_t n = begin * kSpan, last = std::min(end * kSpan, columns), height = group.height;
      float* to = out + group.first * columns;
      if (wide) wide_slice(height, pairs, count, group.panels(), bias, n, last, group.count, to, columns);
      else narrow_slice(height, pairs, count, group.panels(), bias, n, last, group.count, to, columns);
      if (more != nullptr) add_rows(*more, group.first, group.count, n, last, columns, to);
    });
  }
}

namespace {

const float* floats(const Tensor& t, const char* what) {
  need(t.scalar_type() == Dtype::Float && t.is_contiguous(), what);
  return static_cast<const float*>(t.const_data_ptr());
}

// out = x W^T + bias
void few_rows(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor out) {
  need(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), "x must be [T, K] and weight [N, K]");
  const int64_t rows = x.size(0), columns = weight.size(0);
  need(out.numel() == rows * columns, "out must be [T, N]");
  need(!bias.has_value() || bias->numel() == columns, "bias must be [N]");
  const Factors pair{floats(x, "x must be contiguous float32"), floats(weight, "weight must be contiguous float32"),
                     x.size(1)};
  floats(out, "out must be contiguous float32");
  few_rows_product(&pair, 1, bias.has_value() ? floats(*bias, "bias must be contiguous float32") : nullptr, rows, columns,
                   static_cast<float*>(out.mutable_data_ptr()));
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CPU, m) { m.impl("few_rows", TORCH_BOX(&mllmcl::few_rows)); }
