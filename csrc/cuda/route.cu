// Scores, choice and gates of a router for up to 64 experts, and their gradient: a warp owns a row, a lane two experts.

#include "device.cuh"

namespace mllmcl {
namespace {

constexpr int kWarps = 4;      // rows of a block
constexpr int kMaxExperts = 64;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kSigmoid = 1;

struct Rule {
  int experts, top_k, score;
  bool renormalize, straight;
};

__device__ inline float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kAll, value, step));
  return value;
}

// the lane's two experts: lane and lane + 32
struct Pair {
  float value[2];
};

// the best of what is left: the largest key, the lowest expert among equals; -1 where nothing is left
__device__ int best_expert(const Pair& key, const bool* open, int lane) {
  float top = 0.0f;
  int where = -1;
  for (int half = 0; half < 2; ++half) {
    if (open[half] && (where < 0 || key.value[half] > top)) {
      top = key.value[half];
      where = lane + 32 * half;
    }
  }
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kAll, top, step);
    const int place = __shfl_xor_sync(kAll, where, step);
    if (place >= 0 && (where < 0 || other > top || (other == top && place < where))) {
      top = other;
      where = place;
    }
  }
  return where;
}

__global__ void router_gates_kernel(const float* logits, const float* noise, const uint8_t* mask, int64_t mask_stride,
                                    int64_t tokens, Rule rule, float* gates, int32_t* indices, float* values,
                                    float* probs) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= tokens) return;
  const int64_t at = row * rule.experts;
  Pair noisy, prob;
  bool may[2];
  bool sound = true;
  float top = -INFINITY;
  for (int half = 0; half < 2; ++half) {
    const int e = lane + 32 * half;
    may[half] = e < rule.experts && (mask == nullptr || mask[row * mask_stride + e]);
    noisy.value[half] = may[half] ? logits[at + e] + (noise == nullptr ? 0.0f : noise[at + e]) : 0.0f;
    if (!may[half]) continue;
    sound = sound && (rule.score == kSigmoid ? isfinite(noisy.value[half]) : !isnan(noisy.value[half]));
    top = fmaxf(top, noisy.value[half]);
  }
  top = warp_max(top);
  const bool any = __any_sync(kAll, may[0] || may[1]);
  sound = __all_sync(kAll, sound) && (rule.score == kSigmoid || !any || isfinite(top));
  float total = 0.0f;
  for (int half = 0; half < 2; ++half) {
    const float x = noisy.value[half];
    const float raw = rule.score == kSigmoid ? 1.0f / (1.0f + expf(-x)) : expf(x - top);
    prob.value[half] = !may[half] ? 0.0f : sound ? raw : NAN;
    total += may[half] && sound ? raw : 0.0f;
  }
  total = warp_sum(total);
  if (rule.score != kSigmoid && sound && any) {
    prob.value[0] /= total;
    prob.value[1] /= total;
  }
  bool open[2] = {may[0], may[1]};
  bool taken[2] = {false, false};
  // a row without numbers takes its lowest experts: all keys alike
  Pair key = noisy;
  if (!sound) key.value[0] = key.value[1] = 0.0f;
  for (int slot = 0; slot < rule.top_k; ++slot) {
    const int best = best_expert(key, open, lane);
    if (lane == 0) indices[row * rule.top_k + slot] = best;
    for (int half = 0; half < 2; ++half) {
      if (best == lane + 32 * half) {
        open[half] = false;
        taken[half] = true;
      }
    }
  }
  Pair gate;
  for (int half = 0; half < 2; ++half)
    gate.value[half] = !taken[half] ? 0.0f : rule.straight && sound ? 1.0f : prob.value[half];
  if (rule.renormalize) {
    const float sum = warp_sum(gate.value[0] + gate.value[1]);
    for (int half = 0; half < 2; ++half)
      if (taken[half]) gate.value[half] /= sum;
  }
  for (int half = 0; half < 2; ++half) {
    const int e = lane + 32 * half;
    if (e < rule.experts) {
      gates[at + e] = gate.value[half];
      probs[at + e] = prob.value[half];
    }
  }
  __syncwarp();
  for (int slot = 0; slot < rule.top_k; ++slot) {
    // every lane sees the chosen expert through the lane that holds it
    const int chosen = __shfl_sync(kAll, lane == 0 ? indices[row * rule.top_k + slot] : 0, 0);
    const float low = __shfl_sync(kAll, gate.value[0], chosen & 31), high = __shfl_sync(kAll, gate.value[1], chosen & 31);
    if (lane == 0) values[row * rule.top_k + slot] = chosen < 0 ? 0.0f : chosen < 32 ? low : high;
  }
}

__global__ void router_backward_kernel(const float* d_gates, const float* d_values, const float* d_logits,
                                       const float* d_probs, const float* gates, const int32_t* indices,
                                       const float* probs, int64_t tokens, Rule rule, float inverse_temperature,
                                       float* d_scores) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= tokens) return;
  const int64_t at = row * rule.experts;
  float h[2], p[2], g[2], d[2];
  bool taken[2] = {false, false};
  for (int half = 0; half < 2; ++half) {
    const int e = lane + 32 * half;
    const bool here = e < rule.experts;
    h[half] = here ? d_gates[at + e] : 0.0f;
    p[half] = here ? probs[at + e] : 0.0f;
    g[half] = here ? gates[at + e] : 0.0f;
  }
  for (int slot = 0; slot < rule.top_k; ++slot) {
    const int chosen = indices[row * rule.top_k + slot];
    for (int half = 0; half < 2; ++half) {
      if (chosen >= 0 && chosen == lane + 32 * half) {
        taken[half] = true;
        h[half] += d_values[row * rule.top_k + slot];
      }
    }
  }
  const float kept = warp_sum((taken[0] ? p[0] : 0.0f) + (taken[1] ? p[1] : 0.0f));
  const float along = warp_sum((taken[0] ? h[0] * g[0] : 0.0f) + (taken[1] ? h[1] * g[1] : 0.0f));
  for (int half = 0; half < 2; ++half) {
    const int e = lane + 32 * half;
    float through = taken[half] ? h[half] : 0.0f;
    if (rule.straight) through = h[half];
    else if (rule.renormalize && taken[half]) through = (h[half] - along) / kept;
    d[half] = e < rule.experts ? through + d_probs[at + e] : 0.0f;
  }
  const float mean = warp_sum(p[0] * d[0] + p[1] * d[1]);
  for (int half = 0; half < 2; ++half) {
    const int e = lane + 32 * half;
    if (e >= rule.experts) continue;
    const float inner = rule.score == kSigmoid ? p[half] * (1.0f - p[half]) * d[half] : p[half] * (d[half] - mean);
    d_scores[at + e] = (inner + d_logits[at + e]) * inverse_temperature;
  }
}

const float* floats(const Tensor& t, int64_t count, const char* what) {
  need(t.is_cuda() && t.is_contiguous() && t.scalar_type() == Dtype::Float && t.numel() == count, what);
  return static_cast<const float*>(t.const_data_ptr());
}

unsigned blocks_for(int64_t tokens) { return static_cast<unsigned>((tokens + kWarps - 1) / kWarps); }

void router_gates(Tensor logits, std::optional<Tensor> noise, std::optional<Tensor> mask, int64_t top_k, int64_t score,
                  bool renormalize, bool straight, Tensor gates, Tensor indices, Tensor values, Tensor probs) {
  const int64_t tokens = logits.size(0), experts = logits.size(1), count = tokens * experts;
  need(experts <= kMaxExperts && top_k >= 1 && top_k <= experts, "up to 64 experts, top_k in 1..E");
  const float* from = floats(logits, count, "logits must be float32 [T, E]");
  const float* jitter = noise.has_value() ? floats(*noise, count, "noise must be float32 [T, E]") : nullptr;
  const uint8_t* may = nullptr;
  int64_t stride = 0;
  if (mask.has_value()) {
    need(mask->is_cuda() && mask->is_contiguous() && mask->scalar_type() == Dtype::Byte, "mask must be uint8");
    need(mask->numel() == experts || mask->numel() == count, "mask must be [1, E] or [T, E]");
    may = static_cast<const uint8_t*>(mask->const_data_ptr());
    stride = mask->size(0) == 1 ? 0 : experts;
  }
  floats(gates, count, "gates must be float32 [T, E]");
  floats(probs, count, "probs must be float32 [T, E]");
  floats(values, tokens * top_k, "values must be float32 [T, k]");
  need(indices.is_cuda() && indices.is_contiguous() && indices.scalar_type() == Dtype::Int &&
           indices.numel() == tokens * top_k, "indices must be int32 [T, k]");
  if (tokens == 0) return;
  const OnDeviceOf device(logits);
  const Rule rule{static_cast<int>(experts), static_cast<int>(top_k), static_cast<int>(score), renormalize, straight};
  router_gates_kernel<<<blocks_for(tokens), 32 * kWarps, 0, stream_of(logits)>>>(
      from, jitter, may, stride, tokens, rule, static_cast<float*>(gates.mutable_data_ptr()),
      static_cast<int32_t*>(indices.mutable_data_ptr()), static_cast<float*>(values.mutable_data_ptr()),
      static_cast<float*>(probs.mutable_data_ptr()));
  launched();
}

void router_backward(Tensor d_gates, Tensor d_values, Tensor d_logits, Tensor d_probs, Tensor gates, Tensor indices,
                     Tensor probs, int64_t score, bool renormalize, bool straight, double inverse_temperature,
                     Tensor d_scores) {
  const int64_t tokens = gates.size(0), experts = gates.size(1), top_k = indices.size(1), count = tokens * experts;
  need(experts <= kMaxExperts, "up to 64 experts");
  need(indices.is_cuda() && indices.is_contiguous() && indices.scalar_type() == Dtype::Int &&
           indices.numel() == tokens * top_k, "indices must be int32 [T, k]");
  const Rule rule{static_cast<int>(experts), static_cast<int>(top_k), static_cast<int>(score), renormalize, straight};
  const float *a = floats(d_gates, count, "d_gates"), *b = floats(d_values, tokens * top_k, "d_values"),
              *c = floats(d_logits, count, "d_logits"), *d = floats(d_probs, count, "d_probs"),
              *g = floats(gates, count, "gates"), *p = floats(probs, count, "probs");
  floats(d_scores, count, "d_scores");
  if (tokens == 0) return;
  const OnDeviceOf device(gates);
  router_backward_kernel<<<blocks_for(tokens), 32 * kWarps, 0, stream_of(gates)>>>(
      a, b, c, d, g, static_cast<const int32_t*>(indices.const_data_ptr()), p, tokens, rule,
      static_cast<float>(inverse_temperature), static_cast<float*>(d_scores.mutable_data_ptr()));
  launched();
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cuda, CUDA, m) {
  m.impl("router_gates", TORCH_BOX(&mllmcl::router_gates));
  m.impl("router_backward", TORCH_BOX(&mllmcl::router_backward));
}
