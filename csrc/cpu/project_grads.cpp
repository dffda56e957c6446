// g - (g M) M^T in place over a list of gradients; no column of M is copied where it has whole lanes of float32.
// n rows of g, K width, k columns of M

#include <algorithm>

#include "../checks.h"
#include "lanes.h"

namespace mllmcl {
namespace {

constexpr int64_t kRows = kLanes;  // rows of g that share a pass over M, one in each lane
constexpr int64_t kHalf = 4;       // of which so many have their sums in registers at a time
constexpr int64_t kBlock = 64;     // rows of one piece of work

// out[i, c] = sum over K of g[i] M[:, c], for four rows and L lanes of columns
template <int L>
MLLMCL_INLINE void coefficients_of(float* const* g, const float* m, int64_t stride, int64_t width, float* out) {
  Lanes sums[kHalf][L] = {};
  for (int64_t at = 0; at < width; ++at) {
    const float* from = m + at * stride;
#pragma GCC unroll 4
    for (int i = 0; i < kHalf; ++i) {
      const float factor = g[i][at];
#pragma GCC unroll 2
      for (int l = 0; l < L; ++l) sums[i][l] += factor * lanes(from + l * kLanes);
    }
  }
  for (int i = 0; i < kHalf; ++i)
    for (int l = 0; l < L; ++l) lanes(out + i * stride + l * kLanes) = sums[i][l];
}

// out[i] = g[i] M for eight rows; `stride` columns, a multiple of the lanes
MLLMCL_CLONES void coefficients(float* const* g, const float* m, int64_t stride, int64_t width, float* out) {
  for (int64_t i = 0; i < kRows; i += kHalf) {
    int64_t c = 0;
    for (; c + 2 * kLanes <= stride; c += 2 * kLanes)
      coefficients_of<2>(g + i, m + c, stride, width, out + i * stride + c);
    if (c < stride) coefficients_of<1>(g + i, m + c, stride, width, out + i * stride + c);
  }
}

// g[i] -= out[i] M^T for eight rows; by_row holds out's columns, eight rows side by side
MLLMCL_CLONES void take_out(const float* by_row, const float* m, int64_t stride, int64_t width, float* const* g) {
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) {
    Lanes sums[kLanes] = {};
    const float* from = m + at * stride;
    for (int64_t c = 0; c < stride; ++c) {
      const Lanes factor = lanes(by_row + c * kRows);
#pragma GCC unroll 8
      for (int j = 0; j < kLanes; ++j) sums[j] += from[j * stride + c] * factor;
    }
    transpose(sums);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) lanes(g[i] + at) -= sums[i];
  }
  for (; at < width; ++at) {
    Lanes sum = {};
    for (int64_t c = 0; c < stride; ++c) sum += m[at * stride + c] * lanes(by_row + c * kRows);
    for (int i = 0; i < kRows; ++i) g[i][at] -= sum[i];
  }
}

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
  std::vector<float> columns, memory(kRows * width), out(kRows * stride), by_row(kRows * stride);
  const float* m = whole_lanes(basis, stride, columns);
  for (int64_t row = unit.first; row < unit.first + unit.rows; row += kRows) {
    const int64_t real = std::min(kRows, unit.first + unit.rows - row);
    float* g[kRows];
    for (int64_t i = 0; i < kRows; ++i) {
      float* spare = memory.data() + i * width;
      g[i] = i < real ? const_cast<float*>(load_row(to, dtype, (row + i) * width, width, spare)) : spare;
    }
    coefficients(g, m, stride, width, out.data());
    for (int64_t c = 0; c < stride; ++c)
      for (int64_t i = 0; i < kRows; ++i) by_row[c * kRows + i] = out[i * stride + c];
    take_out(by_row.data(), m, stride, width, g);
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
