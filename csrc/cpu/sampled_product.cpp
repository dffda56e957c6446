// Chosen entries of a low-rank product: sums of their absolute values and the gradient, one destination row at a time.
// D destination rows, S source rows, r rank (a multiple of 8), n entries sorted by destination.

#include <cmath>

#include "../checks.h"
#include "lanes.h"

namespace mllmcl {
namespace {

MLLMCL_INLINE float dot(const float* a, const float* b, int64_t rank) {
  Lanes sum = lanes(a) * lanes(b);
  for (int64_t k = kLanes; k < rank; k += kLanes) sum += lanes(a + k) * lanes(b + k);
  return total(sum);
}

// Entries of one destination, in their order.
struct Entries {
  const float* sources;
  const int32_t* places;
  int64_t count;
};

MLLMCL_INLINE float absolute_sum(const float* own, const Entries& e, int64_t rank) {
  float sum = 0.0f;
  for (int64_t i = 0; i < e.count; ++i) sum += std::fabs(dot(own, e.sources + e.places[i] * rank, rank));
  return sum;
}

MLLMCL_INLINE void slope(const float* own, const Entries& e, float weight, float* out, int64_t rank) {
  for (int64_t k = 0; k < rank; ++k) out[k] = 0.0f;
  for (int64_t i = 0; i < e.count; ++i) {
    const float* source = e.sources + e.places[i] * rank;
    const float entry = dot(own, source, rank);
    // signs come at random: nothing to branch on
    const float share = weight * static_cast<float>((entry > 0.0f) - (entry < 0.0f));
    for (int64_t k = 0; k < rank; k += kLanes) lanes(out + k) += share * lanes(source + k);
  }
}

// A rank known to the compiler keeps rows in registers.
MLLMCL_CLONES float absolute_sum_of(const float* own, const Entries& e, int64_t rank) {
  if (rank == 8) return absolute_sum(own, e, 8);
  if (rank == 16) return absolute_sum(own, e, 16);
  if (rank == 32) return absolute_sum(own, e, 32);
  return absolute_sum(own, e, rank);
}

MLLMCL_CLONES void slope_of(const float* own, const Entries& e, float weight, float* out, int64_t rank) {
  float sums[32];
  if (rank == 8) slope(own, e, weight, sums, 8);
  else if (rank == 16) slope(own, e, weight, sums, 16);
  else if (rank == 32) slope(own, e, weight, sums, 32);
  else return slope(own, e, weight, out, rank);
  std::memcpy(out, sums, rank * sizeof(float));
}

const float* floats(const Tensor& t, int64_t count, const char* what) {
  need(t.is_contiguous() && t.scalar_type() == Dtype::Float && t.numel() == count, what);
  return static_cast<const float*>(t.const_data_ptr());
}

// Calls run(destination, its entries) in parallel; every destination is one thread's alone.
template <class Run>
void for_each_destination(const Tensor& own, const Tensor& sources, const Tensor& starts, const Tensor& places,
                          const Run& run) {
  need(own.dim() == 2 && sources.dim() == 2 && own.size(1) == sources.size(1), "factors must be [D, r] and [S, r]");
  const int64_t count = own.size(0), rank = own.size(1), entries = places.numel(), limit = sources.size(0);
  need(rank > 0 && rank % kLanes == 0, "the rank must be a multiple of 8");
  floats(own, count * rank, "factors must be contiguous float32");
  const float* from = floats(sources, limit * rank, "factors must be contiguous float32");
  need(starts.is_contiguous() && starts.scalar_type() == Dtype::Long && starts.numel() == count + 1,
       "starts must be contiguous int64 [D + 1]");
  need(places.is_contiguous() && places.scalar_type() == Dtype::Int, "places must be contiguous int32");
  const auto* start = static_cast<const int64_t*>(starts.const_data_ptr());
  const auto* place = static_cast<const int32_t*>(places.const_data_ptr());
  need(start[0] == 0 && start[count] == entries, "starts must run from 0 to n");
  const int64_t each = count > 0 ? entries / count * rank : 0;
  torch::stable::parallel_for(0, count, grain(each), [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d) {
      need(start[d] <= start[d + 1] && start[d + 1] <= entries, "starts must not fall");
      for (int64_t i = start[d]; i < start[d + 1]; ++i)
        need(place[i] >= 0 && place[i] < limit, "an entry is out of range");
      run(d, Entries{from, place + start[d], start[d + 1] - start[d]});
    }
  });
}

// sums[d] = sum of |<own_d, source>|
void sampled_product_sums(Tensor own, Tensor sources, Tensor starts, Tensor places, Tensor sums) {
  floats(sums, own.size(0), "sums must be float32 [D]");
  const auto* rows = static_cast<const float*>(own.const_data_ptr());
  auto* out = static_cast<float*>(sums.mutable_data_ptr());
  const int64_t rank = own.size(1);
  for_each_destination(own, sources, starts, places, [&](int64_t d, const Entries& entries) {
    out[d] = absolute_sum_of(rows + d * rank, entries, rank);
  });
}

// grad[d] = weight_d * sum of sign(<own_d, source>) source
void sampled_product_slope(Tensor own, Tensor sources, Tensor starts, Tensor places, Tensor weights, Tensor grad) {
  floats(grad, own.numel(), "the gradient must be float32 like its factor");
  const float* weight = floats(weights, own.size(0), "weights must be float32 [D]");
  const auto* rows = static_cast<const float*>(own.const_data_ptr());
  auto* out = static_cast<float*>(grad.mutable_data_ptr());
  const int64_t rank = own.size(1);
  for_each_destination(own, sources, starts, places, [&](int64_t d, const Entries& entries) {
    slope_of(rows + d * rank, entries, weight[d], out + d * rank, rank);
  });
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CPU, m) {
  m.impl("sampled_product_sums", TORCH_BOX(&mllmcl::sampled_product_sums));
  m.impl("sampled_product_slope", TORCH_BOX(&mllmcl::sampled_product_slope));
}
