// g - (g M) M^T in place over a list of gradients; no column of M is copied where it has whole lanes of float32.
// n rows of g, K width, k columns of M

#include <algorithm>

#include "../checks.h"
#include "lanes.h"

namespace mllmcl {
namespace {

constexpr int64_t kBlock = 64;  // rows of one piece of work, which share what is left of M in the cache
constexpr int64_t kMost = 16;   // rows that share a pass over M, one in each lane on the way back

// out[i, c] = sum over K of g[i] M[:, c], for N rows and L vectors of columns
template <class V, int N, int L>
MLLMCL_INLINE void coefficients_of(float* const* g, const float* m, int64_t stride, int64_t width, float* out) {
  typename V::Vector sums[N][L] = {};
  for (int64_t at = 0; at < width; ++at) {
    const float* from = m + at * stride;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const float factor = g[i][at];
#pragma GCC unroll 2
      for (int l = 0; l < L; ++l) sums[i][l] += factor * as<V>(from + l * V::kSize);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int l = 0; l < L; ++l) as<V>(out + i * stride + l * V::kSize) = sums[i][l];
}

// Eight rows where the sums of sixteen vectors stay in registers, else four.
template <int R>
MLLMCL_INLINE void coefficients_with(float* const* g, int64_t rows, const float* m, int64_t stride, int64_t width,
                                     float* out) {
  using V = Widest<R>;
  constexpr int64_t kRows = R / 4, kSize = V::kSize;
  for (int64_t i = 0; i < rows; i += kRows) {
    float* to = out + i * stride;
    int64_t c = 0;
    for (; c + 2 * kSize <= stride; c += 2 * kSize) coefficients_of<V, kRows, 2>(g + i, m + c, stride, width, to + c);
    for (; c + kSize <= stride; c += kSize) coefficients_of<V, kRows, 1>(g + i, m + c, stride, width, to + c);
    if (c < stride) coefficients_of<Eight, kRows, 1>(g + i, m + c, stride, width, to + c);
  }
}

// out[i] = g[i] M for eight or sixteen rows; `stride` columns, a multiple of eight
MLLMCL_BY_REGISTERS(void coefficients(float* const* g, int64_t rows, const float* m, int64_t stride, int64_t width,
                                      float* out),
                    coefficients_with<kRegisters>(g, rows, m, stride, width, out);)

// g[i] -= out[i] M^T for as many rows as V has lanes, J columns of g at a time; by_row holds out's columns, kMost apart
template <class V, int J>
MLLMCL_INLINE void take_out_of(const float* by_row, const float* m, int64_t stride, int64_t width, float* const* g) {
  constexpr int64_t kRows = V::kSize;
  int64_t at = 0;
  for (; at + J <= width; at += J) {
    typename V::Vector sums[J] = {};
    const float* from = m + at * stride;
    for (int64_t c = 0; c < stride; ++c) {
      const typename V::Vector factor = as<V>(by_row + c * kMost);
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j) sums[j] += from[j * stride + c] * factor;
    }
#pragma GCC unroll 2
    for (int64_t j = 0; j < J; j += kLanes)
#pragma GCC unroll 2
      for (int64_t i = 0; i < kRows; i += kLanes) {
        Lanes square[kLanes];
#pragma GCC unroll 8
        for (int64_t l = 0; l < kLanes; ++l) eight_of(sums[j + l], i, square[l]);
        transpose(square);
#pragma GCC unroll 8
        for (int64_t l = 0; l < kLanes; ++l) lanes(g[i + l] + at + j) -= square[l];
      }
  }
  for (; at < width; ++at) {
    typename V::Vector sum = {};
    for (int64_t c = 0; c < stride; ++c) sum += m[at * stride + c] * as<V>(by_row + c * kMost);
    for (int64_t i = 0; i < kRows; ++i) g[i][at] -= sum[i];
  }
}

template <int R>
MLLMCL_INLINE void take_out_with(const float* by_row, int64_t rows, const float* m, int64_t stride, int64_t width,
                                 float* const* g) {
  constexpr int kColumns = R / 2;
  if (R == 32 && rows == kMost) return take_out_of<Sixteen, kColumns>(by_row, m, stride, width, g);
  for (int64_t i = 0; i < rows; i += kLanes) take_out_of<Eight, kColumns>(by_row + i, m, stride, width, g + i);
}

// eight or sixteen rows
MLLMCL_BY_REGISTERS(void take_out(const float* by_row, int64_t rows, const float* m, int64_t stride, int64_t width,
                                  float* const* g),
                    take_out_with<kRegisters>(by_row, rows, m, stride, width, g);)

// M in float32 with whole lanes of columns: the memory itself where it is so, else in `buffer`, zeros behind.
const float* whole_lanes(const Tensor& basis, int64_t stride, std::vector<float>& buffer) {
  const int64_t width = basis.size(0), columns = basis.size(1);
  const Dtype dtype = basis.scalar_type();
  if (dtype == Dtype::Float && columns == stride) return static_cast<const float*>(basis.const_data_ptr());
  buffer.assign(width * stride, 0.0f);
  std::vector<float> memory(columns);
  for (int64_t at = 0; at < width; ++at)
    std::copy_n(load_row(basis.const_data_ptr(), dtype, at * columns, columns, memory.data()), columns,
                buffer.data() + at * stride);
  return buffer.data();
}

struct Unit {
  int64_t layer, first, rows;
};

void run_unit(const Unit& unit, const Tensor& grad, const Tensor& basis) {
  const int64_t width = basis.size(0), stride = (basis.size(1) + kLanes - 1) / kLanes * kLanes;
  const Dtype dtype = grad.scalar_type();
  void* to = grad.mutable_data_ptr();
  // rows that are not real are worked on in vain, and rows that are not float32 converted, in memory of their own
  const bool converts = dtype != Dtype::Float;
  const int64_t spares = converts ? kMost : (kLanes - unit.rows % kLanes) % kLanes;
  std::vector<float> columns, memory(spares * width), out(kMost * stride), by_row(kMost * stride);
  const float* m = whole_lanes(basis, stride, columns);
  for (int64_t row = unit.first; row < unit.first + unit.rows; row += kMost) {
    const int64_t real = std::min(kMost, unit.first + unit.rows - row), rows = real > kLanes ? kMost : kLanes;
    float* g[kMost];
    for (int64_t i = 0; i < rows; ++i) {
      float* spare = !converts && i < real ? nullptr : memory.data() + (converts ? i : i - real) * width;
      g[i] = i < real ? const_cast<float*>(load_row(to, dtype, (row + i) * width, width, spare)) : spare;
    }
    coefficients(g, rows, m, stride, width, out.data());
    for (int64_t c = 0; c < stride; ++c)
      for (int64_t i = 0; i < rows; ++i) by_row[c * kMost + i] = out[i * stride + c];
    take_out(by_row.data(), rows, m, stride, width, g);
    for (int64_t i = 0; i < real; ++i) store_row(to, dtype, (row + i) * width, width, g[i]);
  }
}

// grads: contiguous [n, K]; bases: contiguous [K, k]
void project_grads(std::vector<Tensor> grads, std::vector<Tensor> bases) {
  need(grads.size() == bases.size(), "lists must be equally long");
  std::vector<Unit> units;
  for (size_t i = 0; i < grads.size(); ++i) {
    for (const Tensor* t : {&grads[i], &bases[i]})
      need(t->dim() == 2 && t->is_contiguous() && is_row_dtype(t->scalar_type()), "grads and bases must be contiguous");
    need(grads[i].size(1) == bases[i].size(0), "widths must agree");
    for (int64_t row = 0; row < grads[i].size(0); row += kBlock)
      units.push_back({static_cast<int64_t>(i), row, std::min(kBlock, grads[i].size(0) - row)});
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(units.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) run_unit(units[u], grads[units[u].layer], bases[units[u].layer]);
  });
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CPU, m) { m.impl("project_grads", TORCH_BOX(&mllmcl::project_grads)); }
