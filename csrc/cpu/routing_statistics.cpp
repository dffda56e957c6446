// Load, importance and auxiliary losses of a routing from its planes [P, 3 E + 3] float32, and the gradient of a plane;
// formulas in ops/routing_statistics/README.md.

#include "planes.h"

namespace mllmcl {
namespace {

MLLMCL_CLONES void add_planes(const Rows<float>& from, int64_t count, int64_t width, double* sums) {
  for (int64_t p = 0; p < count; ++p) {
    const float* plane = from[p];
    for (int64_t i = 0; i < width; ++i) sums[i] += plane[i];
  }
}

// What the losses have in common.
struct Shares {
  double count, slots, balance;  // tokens and choices, at least 1; the sum of choices times probabilities
  bool has_tokens, has_slots;
};

template <class T>
Shares shares_of(const T* sums, int64_t experts) {
  double slots = 0.0, balance = 0.0;
  for (int64_t e = 0; e < experts; ++e) {
    slots += sums[e];
    balance += static_cast<double>(sums[e]) * sums[2 * experts + e];
  }
  const double tokens = sums[3 * experts + 2];
  return {std::max(tokens, 1.0), std::max(slots, 1.0), balance, tokens >= 1.0, slots >= 1.0};
}

void routing_statistics(Tensor planes, Tensor load, Tensor importance, Tensor balance, Tensor z, Tensor entropy,
                        Tensor sums) {
  need(planes.dim() == 2 && planes.size(1) >= 3 && planes.size(1) % 3 == 0, "planes must be [P, 3 E + 3]");
  const int64_t count = planes.size(0), width = planes.size(1), experts = width / 3 - 1;
  const auto from = rows_of<float>(planes, Dtype::Float, count, width, "planes must be float32");
  float* to_load = floats(load, experts, "load must be float32 [E]");
  float* to_importance = floats(importance, experts, "importance must be float32 [E]");
  float* to_sums = floats(sums, width, "sums must be float32 [3 E + 3]");
  float* to[] = {floats(balance, 1, "a loss is float32"), floats(z, 1, "a loss is float32"),
                 floats(entropy, 1, "a loss is float32")};
  std::vector<double> wide(width);
  add_planes(from, count, width, wide.data());
  for (int64_t i = 0; i < width; ++i) to_sums[i] = static_cast<float>(wide[i]);
  std::copy(to_sums, to_sums + experts, to_load);
  std::copy(to_sums + experts, to_sums + 2 * experts, to_importance);
  const Shares shares = shares_of(wide.data(), experts);
  const double losses[] = {experts * shares.balance / shares.slots, wide[3 * experts], wide[3 * experts + 1]};
  for (int64_t i = 0; i < 3; ++i) *to[i] = static_cast<float>(losses[i] / shares.count);
}

// What came times `factor`; zero where nothing did, even times infinity.
double times(const float* came, double factor) { return came == nullptr ? 0.0 : *came * factor; }

void routing_statistics_backward(std::optional<Tensor> d_importance, std::optional<Tensor> d_balance,
                                 std::optional<Tensor> d_z, std::optional<Tensor> d_entropy, Tensor sums,
                                 Tensor d_plane) {
  const int64_t width = sums.numel(), experts = width / 3 - 1;
  need(width >= 3 && width % 3 == 0, "sums must be [3 E + 3]");
  const float* from = numbers(sums, width, "sums must be float32");
  const float* from_importance = numbers(d_importance, experts, "d_importance must be float32 [E]");
  const char* what = "a loss has a float32 gradient";
  const float *balance = numbers(d_balance, 1, what), *z = numbers(d_z, 1, what), *entropy = numbers(d_entropy, 1, what);
  float* out = floats(d_plane, width, "d_plane must be float32 [3 E + 3]");
  const Shares shares = shares_of(from, experts);
  const double share = 1.0 / shares.count, slope = experts / (shares.slots * shares.count);
  const double per_slot = shares.has_slots ? shares.balance / shares.slots : 0.0;
  const float* singles = from + 3 * experts;
  const double lost =
      times(balance, slope * shares.balance) + times(z, share * singles[0]) + times(entropy, share * singles[1]);
  for (int64_t e = 0; e < experts; ++e) {
    out[e] = static_cast<float>(times(balance, slope * (from[2 * experts + e] - per_slot)));
    out[experts + e] = from_importance == nullptr ? 0.0f : from_importance[e];
    out[2 * experts + e] = static_cast<float>(times(balance, slope * from[e]));
  }
  out[3 * experts] = static_cast<float>(times(z, share));
  out[3 * experts + 1] = static_cast<float>(times(entropy, share));
  out[3 * experts + 2] = static_cast<float>(shares.has_tokens ? -lost * share : 0.0);
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CPU, m) {
  m.impl("routing_statistics", TORCH_BOX(&mllmcl::routing_statistics));
  m.impl("routing_statistics_backward", TORCH_BOX(&mllmcl::routing_statistics_backward));
}
