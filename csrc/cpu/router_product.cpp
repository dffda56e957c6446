// Products of a router with few experts: x W^T and its gradients, memory read once where a general product is slow.
// T tokens, D width of x, E experts

#include <algorithm>

#include "../checks.h"
#include "lanes.h"

namespace mllmcl {
namespace {

constexpr int64_t kGroup = 8;     // experts whose sums stay in registers
constexpr int64_t kTile = 16;     // tokens that stay in the cache
constexpr int64_t kPartials = 64; // most partial sums of the weight's gradient: the same for any number of threads

// The function made for this number of experts; a switch, so that it becomes part of the clone that calls it.
#define MLLMCL_BY_COUNT(count, function, ...)       \
  switch (count) {                                  \
    case 1: return function<1>(__VA_ARGS__);        \
    case 2: return function<2>(__VA_ARGS__);        \
    case 3: return function<3>(__VA_ARGS__);        \
    case 4: return function<4>(__VA_ARGS__);        \
    case 5: return function<5>(__VA_ARGS__);        \
    case 6: return function<6>(__VA_ARGS__);        \
    case 7: return function<7>(__VA_ARGS__);        \
    default: return function<8>(__VA_ARGS__);       \
  }

// out0[e] and out1[e] = two rows of x times N rows of W
template <int N>
MLLMCL_INLINE void two_rows(const float* x0, const float* x1, const float* w, int64_t width, float* out0, float* out1) {
  Lanes sums0[N] = {}, sums1[N] = {};
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    const Lanes from0 = lanes(x0 + k), from1 = lanes(x1 + k);
#pragma GCC unroll 8
    for (int e = 0; e < N; ++e) {
      const Lanes row = lanes(w + e * width + k);
      sums0[e] += from0 * row;
      sums1[e] += from1 * row;
    }
  }
  for (int e = 0; e < N; ++e) {
    float total0 = total(sums0[e]), total1 = total(sums1[e]);
    for (int64_t tail = k; tail < width; ++tail) {
      total0 += x0[tail] * w[e * width + tail];
      total1 += x1[tail] * w[e * width + tail];
    }
    out0[e] = total0;
    out1[e] = total1;
  }
}

MLLMCL_CLONES void product(const float* x0, const float* x1, const float* w, int64_t width, int64_t count, float* out0,
                           float* out1) {
  MLLMCL_BY_COUNT(count, two_rows, x0, x1, w, width, out0, out1)
}

// dw[e] += sum over the rows of d[t, e] x[t], for N experts
template <int N>
MLLMCL_INLINE void add_outer(const float* d, int64_t stride, const float* x, int64_t rows, int64_t width, float* dw) {
  int64_t k = 0;
  for (; k + 2 * kLanes <= width; k += 2 * kLanes) {
    Lanes low[N], high[N];
#pragma GCC unroll 8
    for (int e = 0; e < N; ++e) {
      low[e] = lanes(dw + e * width + k);
      high[e] = lanes(dw + e * width + k + kLanes);
    }
    for (int64_t t = 0; t < rows; ++t) {
      const Lanes from_low = lanes(x + t * width + k), from_high = lanes(x + t * width + k + kLanes);
  #pragma GCC unroll 8
    for (int e = 0; e < N; ++e) {
        const float factor = d[t * stride + e];
        low[e] += factor * from_low;
        high[e] += factor * from_high;
      }
    }
#pragma GCC unroll 8
    for (int e = 0; e < N; ++e) {
      lanes(dw + e * width + k) = low[e];
      lanes(dw + e * width + k + kLanes) = high[e];
    }
  }
  for (; k < width; ++k)
#pragma GCC unroll 8
    for (int e = 0; e < N; ++e)
      for (int64_t t = 0; t < rows; ++t) dw[e * width + k] += d[t * stride + e] * x[t * width + k];
}

MLLMCL_CLONES void weight_gradient(const float* d, int64_t stride, const float* x, int64_t rows, int64_t width,
                                   int64_t count, float* dw) {
  MLLMCL_BY_COUNT(count, add_outer, d, stride, x, rows, width, dw)
}

// dx[t] = sum over N experts of d[t, e] W[e], or added to it
template <int N>
MLLMCL_INLINE void mix_rows(const float* d, int64_t stride, const float* w, int64_t rows, int64_t width, bool add,
                            float* dx) {
  int64_t k = 0;
  for (; k + 2 * kLanes <= width; k += 2 * kLanes) {
    Lanes low[N], high[N];
#pragma GCC unroll 8
    for (int e = 0; e < N; ++e) {
      low[e] = lanes(w + e * width + k);
      high[e] = lanes(w + e * width + k + kLanes);
    }
    for (int64_t t = 0; t < rows; ++t) {
      float* to = dx + t * width + k;
      Lanes sum_low = add ? lanes(to) : Lanes{}, sum_high = add ? lanes(to + kLanes) : Lanes{};
  #pragma GCC unroll 8
    for (int e = 0; e < N; ++e) {
        const float factor = d[t * stride + e];
        sum_low += factor * low[e];
        sum_high += factor * high[e];
      }
      lanes(to) = sum_low;
      lanes(to + kLanes) = sum_high;
    }
  }
  for (; k < width; ++k)
    for (int64_t t = 0; t < rows; ++t) {
      float sum = add ? dx[t * width + k] : 0.0f;
  #pragma GCC unroll 8
    for (int e = 0; e < N; ++e) sum += d[t * stride + e] * w[e * width + k];
      dx[t * width + k] = sum;
    }
}

MLLMCL_CLONES void input_gradient(const float* d, int64_t stride, const float* w, int64_t rows, int64_t width,
                                  int64_t count, bool add, float* dx) {
  MLLMCL_BY_COUNT(count, mix_rows, d, stride, w, rows, width, add, dx)
}

MLLMCL_CLONES void add_row(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

const float* table(const Tensor& t, int64_t rows, int64_t columns, const char* what) {
  need(t.is_contiguous() && t.scalar_type() == Dtype::Float && t.numel() == rows * columns, what);
  return static_cast<const float*>(t.const_data_ptr());
}

// out = x W^T in float32, whatever the dtype of x
void router_product(Tensor x, Tensor weight, Tensor out) {
  need(x.dim() == 2 && x.is_contiguous() && is_row_dtype(x.scalar_type()), "x must be contiguous [T, D]");
  need(weight.dim() == 2, "weight must be [E, D]");
  const int64_t tokens = x.size(0), width = x.size(1), experts = weight.size(0);
  const Dtype dtype = x.scalar_type();
  const float* w = table(weight, experts, width, "weight must be contiguous float32 [E, D]");
  table(out, tokens, experts, "out must be contiguous float32 [T, E]");
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  const void* from = x.const_data_ptr();
  torch::stable::parallel_for(0, (tokens + 1) / 2, grain(2 * width), [&](int64_t begin, int64_t end) {
    std::vector<float> memory(2 * width), spare(experts);
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t t = 2 * pair;
      const bool whole = t + 1 < tokens;
      const float* x0 = load_row(from, dtype, t * width, width, memory.data());
      const float* x1 = whole ? load_row(from, dtype, (t + 1) * width, width, memory.data() + width) : x0;
      for (int64_t e = 0; e < experts; e += kGroup)
        product(x0, x1, w + e * width, width, std::min(kGroup, experts - e), to + t * experts + e,
                (whole ? to + (t + 1) * experts : spare.data()) + e);
    }
  });
}

// dx = d W in x's dtype and dW = d^T x in float32; an empty tensor where one is not wanted
void router_product_backward(Tensor d, Tensor x, Tensor weight, Tensor dx, Tensor dweight) {
  need(x.dim() == 2 && x.is_contiguous() && is_row_dtype(x.scalar_type()), "x must be contiguous [T, D]");
  need(weight.dim() == 2, "weight must be [E, D]");
  const int64_t tokens = x.size(0), width = x.size(1), experts = weight.size(0);
  const Dtype dtype = x.scalar_type();
  const float* w = table(weight, experts, width, "weight must be contiguous float32 [E, D]");
  const float* rows_d = table(d, tokens, experts, "d must be contiguous float32 [T, E]");
  const bool wants_x = dx.numel() > 0, wants_weight = dweight.numel() > 0;
  need(!wants_x || (dx.is_contiguous() && dx.scalar_type() == dtype && dx.numel() == tokens * width), "dx must be like x");
  if (wants_weight) table(dweight, experts, width, "dweight must be contiguous float32 [E, D]");
  const void* from = x.const_data_ptr();
  void* to = wants_x ? dx.mutable_data_ptr() : nullptr;
  const int64_t tiles = (tokens + kTile - 1) / kTile;
  const int64_t part = std::max<int64_t>(16, (tiles + kPartials - 1) / kPartials);  // tiles of one partial sum
  const int64_t parts = (tiles + part - 1) / part;
  std::vector<float> partial(wants_weight ? parts * experts * width : 0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const bool narrow = dtype != Dtype::Float;
    std::vector<float> memory(narrow ? 2 * kTile * width : 0);
    float *in = memory.data(), *out = in + kTile * width;
    for (int64_t tile = begin * part; tile < std::min(end * part, tiles); ++tile) {
      const int64_t first = tile * kTile, rows = std::min(kTile, tokens - first);
      const float* tile_d = rows_d + first * experts;
      if (wants_weight) {
        const float* tile_x = load_row(from, dtype, first * width, rows * width, in);
        float* sums = partial.data() + tile / part * experts * width;
        for (int64_t e = 0; e < experts; e += kGroup)
          weight_gradient(tile_d + e, experts, tile_x, rows, width, std::min(kGroup, experts - e), sums + e * width);
      }
      if (wants_x) {
        float* tile_dx = open_row(to, dtype, first * width, out);
        for (int64_t e = 0; e < experts; e += kGroup)
          input_gradient(tile_d + e, experts, w + e * width, rows, width, std::min(kGroup, experts - e), e > 0, tile_dx);
        store_row(to, dtype, first * width, rows * width, out);
      }
    }
  });
  if (!wants_weight) return;
  auto* total_dw = static_cast<float*>(dweight.mutable_data_ptr());
  std::fill(total_dw, total_dw + experts * width, 0.0f);
  for (int64_t place = 0; place < parts; ++place)
    add_row(partial.data() + place * experts * width, experts * width, total_dw);
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CPU, m) {
  m.impl("router_product", TORCH_BOX(&mllmcl::router_product));
  m.impl("router_product_backward", TORCH_BOX(&mllmcl::router_product_backward));
}
