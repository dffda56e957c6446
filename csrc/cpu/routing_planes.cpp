// Planes of a routing's tables [T, E] float32, and their gradient.

#include "planes.h"

namespace mllmcl {
namespace {

MLLMCL_CLONES bool fill_plane(const Tables& from, int64_t begin, int64_t end, float* room, float* plane) {
  return sum_rows(from, begin, end, nullptr, room, plane);
}

void routing_planes(Tensor logits, Tensor probs, Tensor gates, Tensor indices, std::optional<Tensor> mask,
                    Tensor planes) {
  need(gates.dim() == 2 && indices.dim() == 2, "gates must be [T, E], indices [T, k]");
  const int64_t tokens = gates.size(0), experts = gates.size(1), top_k = indices.size(1);
  const int64_t count = num_planes(tokens), width = plane_width(experts);
  const Tables from{
      rows_of<float>(logits, Dtype::Float, tokens, experts, "logits must be float32 [T, E]"),
      rows_of<float>(probs, Dtype::Float, tokens, experts, "probs must be float32 [T, E]"),
      rows_of<float>(gates, Dtype::Float, tokens, experts, "gates must be float32 [T, E]"),
      rows_of<int32_t>(indices, Dtype::Int, tokens, top_k, "indices must be int32 [T, k]"),
      mask_of(mask, tokens), tokens, experts, top_k};
  float* to = floats(planes, count * width, "planes must be float32 [P, 3 E + 3]");
  std::vector<uint8_t> sound(count);
  torch::stable::parallel_for(0, count, grain(8 * experts * kPlaneRows), [&](int64_t begin, int64_t end) {
    std::vector<float> room(experts);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * kPlaneRows, last = std::min(tokens, first + kPlaneRows);
      sound[p] = fill_plane(from, first, last, room.data(), to + p * width);
    }
  });
  for (uint8_t one : sound) need(one, "an index is out of range");
}

// Where gradients go.
struct Targets {
  float *logits, *probs, *gates;
};

MLLMCL_CLONES void slopes_of_rows(const Rows<float>& d_planes, const Rows<float>& x, const Rows<float>& p,
                                  const uint8_t* mask, int64_t begin, int64_t end, int64_t experts, float* room,
                                  const Targets& to) {
  for (int64_t t = begin; t < end; ++t) {
    float* rows[] = {to.gates + t * experts, to.probs + t * experts, to.logits + t * experts};
    for (float* row : rows) std::fill(row, row + experts, 0.0f);
    if (mask != nullptr && !mask[t]) continue;
    add_slopes(d_planes[t / kPlaneRows], x[t], p[t], experts, room, rows[0], rows[1], rows[2]);
  }
}

void routing_planes_backward(Tensor d_planes, Tensor logits, Tensor probs, std::optional<Tensor> mask, Tensor d_logits,
                             Tensor d_probs, Tensor d_gates) {
  need(probs.dim() == 2, "probs must be [T, E]");
  const int64_t tokens = probs.size(0), experts = probs.size(1), count = tokens * experts;
  const auto x = rows_of<float>(logits, Dtype::Float, tokens, experts, "logits must be float32 [T, E]");
  const auto p = rows_of<float>(probs, Dtype::Float, tokens, experts, "probs must be float32 [T, E]");
  const auto from = rows_of<float>(d_planes, Dtype::Float, num_planes(tokens), plane_width(experts),
                                   "d_planes must be float32 [P, 3 E + 3]");
  const uint8_t* counted = mask_of(mask, tokens);
  const char* what = "gradients must be float32 [T, E]";
  const Targets to{floats(d_logits, count, what), floats(d_probs, count, what), floats(d_gates, count, what)};
  torch::stable::parallel_for(0, tokens, grain(8 * experts), [&](int64_t begin, int64_t end) {
    std::vector<float> room(experts);
    slopes_of_rows(from, x, p, counted, begin, end, experts, room.data(), to);
  });
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CPU, m) {
  m.impl("routing_planes", TORCH_BOX(&mllmcl::routing_planes));
  m.impl("routing_planes_backward", TORCH_BOX(&mllmcl::routing_planes_backward));
}
