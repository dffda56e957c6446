// Sum of |A A_old^T| and sign(A A_old^T) A_old over a list of layers; every old row is read once for both.
// r rows of A, Q rows of A_old, K width

#include <algorithm>
#include <array>
#include <cmath>

#include "handles.h"
#include "lanes.h"

namespace mllmcl {
namespace {

constexpr int64_t kRows = 4;  // rows of A, and old rows, that are multiplied at a time

using Rows = const float* [kRows];
using Products = float[kRows][kRows];

// A vector's sum goes to Lanes first, so that eight sums at a time become one vector.
template <class V>
MLLMCL_INLINE void fold(const typename V::Vector& x, Lanes& out) {
  eight_of(x, 0, out);
  if constexpr (V::kSize > kLanes) {
    Lanes high;
    eight_of(x, kLanes, high);
    out += high;
  }
}

// Four old rows against four of A: more sums than a fused multiply-add has stages, half a load for each.
template <class V>
MLLMCL_INLINE void products_of(const Rows& a, const Rows& old, int64_t width, Products& out) {
  typename V::Vector sums[kRows][kRows] = {};
  int64_t k = 0;
  for (; k + V::kSize <= width; k += V::kSize)
#pragma GCC unroll 4
    for (int64_t i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int64_t q = 0; q < kRows; ++q) sums[i][q] += as<V>(a[i] + k) * as<V>(old[q] + k);
#pragma GCC unroll 2
  for (int64_t i = 0; i < kRows; i += 2) {
    Lanes square[kLanes];
#pragma GCC unroll 8
    for (int64_t j = 0; j < kLanes; ++j) fold<V>(sums[i + j / kRows][j % kRows], square[j]);
    transpose(square);
    const Lanes totals = ((square[0] + square[4]) + (square[1] + square[5])) +
                         ((square[2] + square[6]) + (square[3] + square[7]));
    std::memcpy(out + i, &totals, sizeof(totals));
  }
  for (; k < width; ++k)
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t q = 0; q < kRows; ++q) out[i][q] += a[i][k] * old[q][k];
}

MLLMCL_BY_REGISTERS(void products(const Rows& a, const Rows& old, int64_t width, Products& out),
                    products_of<Widest<kRegisters>>(a, old, width, out);)

// The signs stay in registers; rows that are not real go to `spare`.
template <class V>
MLLMCL_INLINE void add_signed_of(const Products& sign, const Rows& old, int64_t width, int64_t count, float* grad,
                                 float* spare) {
  using Vector = typename V::Vector;
  Vector signs[kRows][kRows];
  float* to[kRows];
  for (int64_t i = 0; i < kRows; ++i) {
    to[i] = i < count ? grad + i * width : spare;
    for (int64_t q = 0; q < kRows; ++q) signs[i][q] = sign[i][q] - Vector{};
  }
  int64_t k = 0;
  for (; k + V::kSize <= width; k += V::kSize) {
    const Vector from[kRows] = {as<V>(old[0] + k), as<V>(old[1] + k), as<V>(old[2] + k), as<V>(old[3] + k)};
#pragma GCC unroll 4
    for (int64_t i = 0; i < kRows; ++i) {
      Vector sum = as<V>(to[i] + k);
#pragma GCC unroll 4
      for (int64_t q = 0; q < kRows; ++q) sum += signs[i][q] * from[q];
      as<V>(to[i] + k) = sum;
    }
  }
  for (; k < width; ++k)
    for (int64_t i = 0; i < count; ++i)
      for (int64_t q = 0; q < kRows; ++q) grad[i * width + k] += sign[i][q] * old[q][k];
}

MLLMCL_BY_REGISTERS(void add_signed(const Products& sign, const Rows& old, int64_t width, int64_t count, float* grad,
                                    float* spare),
                    add_signed_of<Widest<kRegisters>>(sign, old, width, count, grad, spare);)

struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t rows, width;
};

Matrix matrix(AtenTensorHandle tensor) {
  const Facts facts(tensor);
  need(facts.is_usual() && facts.by_rows && facts.dim == 2, "layers must be contiguous [r, K]");
  void* data = nullptr;
  aoti_torch_get_data_ptr(tensor, &data);
  // torch's own numbers of dtypes
  return {data, static_cast<Dtype>(facts.dtype), facts.sizes[0], facts.sizes[1]};
}

// Up to four rows of A of one layer with all of its old rows.
struct Unit {
  int64_t layer, row;
  float* grad;  // null where it is not wanted
};

// Rows `at` to `at + kRows` in float32; behind the last row the last one stands again. Gives how many are real.
int64_t load_rows(const Matrix& from, int64_t at, std::vector<float>& buffer, Rows& rows) {
  const int64_t width = from.width, real = std::min(kRows, from.rows - at);
  for (int64_t i = 0; i < kRows; ++i) {
    const int64_t row = at + std::min(i, real - 1);
    rows[i] = load_row(from.data, from.dtype, row * width, width, buffer.data() + i * width);
  }
  return real;
}

double run_unit(const Unit& unit, const Matrix& lora_a, const Matrix& old) {
  const int64_t width = lora_a.width, olds = old.rows;
  std::vector<float> a_buffer(kRows * width), old_buffer(kRows * width), spare(width);
  Rows a, others;
  Products product;
  const int64_t count = load_rows(lora_a, unit.row, a_buffer, a);
  if (unit.grad) std::fill_n(unit.grad, count * width, 0.0f);
  double sum = 0.0;
  for (int64_t q = 0; q < olds; q += kRows) {
    const int64_t real = load_rows(old, q, old_buffer, others);
    products(a, others, width, product);
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t j = 0; j < kRows; ++j) {
        float& entry = product[i][j];
        if (i >= count || j >= real) entry = 0.0f;
        sum += std::fabs(entry);
        entry = static_cast<float>((entry > 0.0f) - (entry < 0.0f));
      }
    if (unit.grad) add_signed(product, others, width, count, unit.grad, spare.data());
  }
  return sum;
}

// loss: one float32; grad: float32, one layer's [r, K] behind the other, or empty
void run(const Handles& lora_a, const Handles& previous_a, const Tensor& loss, const Tensor& grad) {
  need(lora_a.size() == previous_a.size(), "lists must be equally long");
  need(loss.numel() == 1 && loss.scalar_type() == Dtype::Float, "loss must be one float32");
  need(grad.is_contiguous() && grad.scalar_type() == Dtype::Float, "grad must be contiguous float32");
  auto* slope = grad.numel() > 0 ? static_cast<float*>(grad.mutable_data_ptr()) : nullptr;
  std::vector<std::array<Matrix, 2>> layers;
  std::vector<Unit> units;
  int64_t at = 0;
  for (int64_t i = 0; i < lora_a.size(); ++i) {
    const auto& [now, old] = layers.emplace_back(std::array{matrix(lora_a[i]), matrix(previous_a[i])});
    need(old.width == now.width, "widths must agree");
    for (int64_t row = 0; row < now.rows; row += kRows)
      units.push_back({i, row, slope ? slope + at + row * now.width : nullptr});
    at += now.rows * now.width;
  }
  need(slope == nullptr || grad.numel() == at, "grad must hold all layers");
  std::vector<double> sums(units.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(units.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u)
      sums[u] = run_unit(units[u], layers[units[u].layer][0], layers[units[u].layer][1]);
  });
  double all = 0.0;
  for (const double sum : sums) all += sum;
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(all);
}

// orthogonality(Tensor[] lora_a, Tensor[] previous_a, Tensor(a!) loss, Tensor(b!) slope) -> ()
void orthogonality(StableIValue* stack, uint64_t, uint64_t) {
  const Handles lora_a(stack[0]), previous_a(stack[1]);
  const Tensor loss = to<Tensor>(stack[2]), slope = to<Tensor>(stack[3]);
  run(lora_a, previous_a, loss, slope);
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CPU, m) { m.impl("orthogonality", &mllmcl::orthogonality); }
