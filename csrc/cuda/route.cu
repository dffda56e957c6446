// Scores, choice and gates of a router for up to 64 experts with the planes of its tables, and the gradient of the logits:
// a warp owns a row, a lane two experts.

#include "device.cuh"

namespace mllmcl {
namespace {

constexpr int kWarps = 4;       // rows of a block
constexpr int kPlaneRows = 16;  // those of a block that makes a plane, as PLANE_ROWS in ops/routing_planes/reference.py
constexpr int kMaxExperts = 64;
constexpr float kTiny = 1.17549435e-38f;  // the smallest normal number
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

// the lane's part of a row; `other` stands where there are no more experts
__device__ inline Pair pair_of(const float* row, int experts, int lane, float other) {
  return {{lane < experts ? row[lane] : other, lane + 32 < experts ? row[lane + 32] : other}};
}

// log sum e^x of a row that -inf fills up; infinite where the largest is, NaN where a number is
__device__ inline float log_sum(const Pair& x) {
  float top = warp_max(fmaxf(x.value[0], x.value[1]));
  if (!isfinite(top)) top = 0.0f;
  return logf(warp_sum(expf(x.value[0] - top) + expf(x.value[1] - top))) + top;
}

// q = p / sum p and log q of a row; the sum, 1 where nothing is allowed
__device__ inline float normalised(const Pair& p, Pair& q, Pair& log_q) {
  float total = warp_sum(p.value[0] + p.value[1]);
  if (total == 0.0f) total = 1.0f;
  for (int half = 0; half < 2; ++half) {
    q.value[half] = p.value[half] / total;
    log_q.value[half] = logf(q.value[half] < kTiny ? kTiny : q.value[half]);
  }
  return total;
}

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

// What a row adds to its plane.
struct Made {
  Pair gate, prob, taken;
};

// A row of the tables; everything is written.
__device__ Made route_row(const float* logits, const float* noise, const uint8_t* mask, int64_t mask_stride, int64_t row,
                          int lane, const Rule& rule, float* gates, int32_t* indices, float* values, float* probs) {
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
  return {gate, prob, {{taken[0] ? 1.0f : 0.0f, taken[1] ? 1.0f : 0.0f}}};
}

__global__ void __launch_bounds__(32 * kPlaneRows)
router_gates_kernel(const float* logits, const float* noise, const uint8_t* mask, int64_t mask_stride,
                    const uint8_t* counted, int64_t tokens, Rule rule, float* gates, int32_t* indices, float* values,
                    float* probs, float* planes) {
  __shared__ float sums[kPlaneRows][3 * kMaxExperts + 3];
  const int lane = threadIdx.x % 32, experts = rule.experts, width = 3 * experts + 3;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kPlaneRows + threadIdx.x / 32;
  const bool counts = row < tokens && (counted == nullptr || counted[row]);
  Made made{};
  float lse = 0.0f, entropy = 0.0f;
  if (row < tokens)
    made = route_row(logits, noise, mask, mask_stride, row, lane, rule, gates, indices, values, probs);
  if (counts) {
    Pair q, log_q;
    lse = log_sum(pair_of(logits + row * experts, experts, lane, -INFINITY));
    normalised(made.prob, q, log_q);
    entropy = -warp_sum(q.value[0] * log_q.value[0] + q.value[1] * log_q.value[1]);
  } else {
    made = Made{};
  }
  float* own = sums[threadIdx.x / 32];
  for (int half = 0; half < 2; ++half) {
    const int e = lane + 32 * half;
    if (e >= experts) continue;
    own[e] = made.taken.value[half];
    own[experts + e] = made.gate.value[half];
    own[2 * experts + e] = made.prob.value[half];
  }
  if (lane == 0) {
    own[3 * experts] = lse * lse;
    own[3 * experts + 1] = entropy;
    own[3 * experts + 2] = counts ? 1.0f : 0.0f;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    float sum = 0.0f;
    for (int warp = 0; warp < kPlaneRows; ++warp) sum += sums[warp][i];
    planes[static_cast<int64_t>(blockIdx.x) * width + i] = sum;
  }
}

// What rows are given for their gradient: null where none came.
struct Slopes {
  const float *gates, *values, *logits, *probs, *planes;
  int64_t apart;  // between two planes
};

// What rows keep from their forward pass.
struct Kept {
  const float *gates, *logits, *probs;
  const int32_t* indices;
  const uint8_t* counted;
};

// What gates, probabilities and logits of a row get from the gradient of its plane; nothing from a zero.
__device__ inline void add_slopes(const float* d_plane, const Pair& x, const Pair& p, int experts, int lane, Pair& gates,
                                  Pair& probs, Pair& logits) {
  const float squares = d_plane[3 * experts], entropy = d_plane[3 * experts + 1];
  const Pair to_gates = pair_of(d_plane + experts, experts, lane, 0.0f);
  const Pair to_probs = pair_of(d_plane + 2 * experts, experts, lane, 0.0f);
  for (int half = 0; half < 2; ++half) {
    gates.value[half] += to_gates.value[half];
    probs.value[half] += to_probs.value[half];
  }
  if (squares != 0.0f) {
    const float lse = log_sum(x);
    for (int half = 0; half < 2; ++half) logits.value[half] += 2.0f * squares * lse * expf(x.value[half] - lse);
  }
  if (entropy != 0.0f) {
    Pair q, slope;
    const float total = normalised(p, q, slope);
    // a q below the clamp passes no gradient through its logarithm
    for (int half = 0; half < 2; ++half) slope.value[half] += q.value[half] < kTiny ? 0.0f : 1.0f;
    const float mean = warp_sum(q.value[0] * slope.value[0] + q.value[1] * slope.value[1]);
    for (int half = 0; half < 2; ++half) probs.value[half] -= entropy * (slope.value[half] - mean) / total;
  }
}

__global__ void router_backward_kernel(Slopes from, Kept kept, int64_t tokens, Rule rule, float inverse_temperature,
                                       float* d_scores) {
  const int lane = threadIdx.x % 32, experts = rule.experts;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= tokens) return;
  const int64_t at = row * experts;
  const auto given = [&](const float* table) {
    return table == nullptr ? Pair{} : pair_of(table + at, experts, lane, 0.0f);
  };
  const Pair p = given(kept.probs), g = given(kept.gates);
  Pair h = given(from.gates), d = given(from.probs), x = given(from.logits);
  if (from.planes != nullptr && (kept.counted == nullptr || kept.counted[row])) {
    const Pair logits = pair_of(kept.logits + at, experts, lane, -INFINITY);
    add_slopes(from.planes + row / kPlaneRows * from.apart, logits, p, experts, lane, h, d, x);
  }
  bool taken[2] = {false, false};
  for (int slot = 0; slot < rule.top_k; ++slot) {
    const int64_t place = row * rule.top_k + slot;
    const int chosen = kept.indices[place];
    for (int half = 0; half < 2; ++half) {
      if (chosen >= 0 && chosen == lane + 32 * half) {
        taken[half] = true;
        h.value[half] += from.values == nullptr ? 0.0f : from.values[place];
      }
    }
  }
  const float total = warp_sum((taken[0] ? p.value[0] : 0.0f) + (taken[1] ? p.value[1] : 0.0f));
  const float along =
      warp_sum((taken[0] ? h.value[0] * g.value[0] : 0.0f) + (taken[1] ? h.value[1] * g.value[1] : 0.0f));
  for (int half = 0; half < 2; ++half) {
    float through = taken[half] ? h.value[half] : 0.0f;
    if (rule.straight) through = h.value[half];
    else if (rule.renormalize && taken[half]) through = (h.value[half] - along) / total;
    d.value[half] += through;
  }
  const float mean = warp_sum(p.value[0] * d.value[0] + p.value[1] * d.value[1]);
  for (int half = 0; half < 2; ++half) {
    const int e = lane + 32 * half;
    if (e >= experts) continue;
    const float probability = p.value[half];
    const float slope = rule.score == kSigmoid ? (1.0f - probability) * d.value[half] : d.value[half] - mean;
    d_scores[at + e] = (probability * slope + x.value[half]) * inverse_temperature;
  }
}

const float* floats(const Tensor& t, int64_t count, const char* what) {
  need(t.is_cuda() && t.is_contiguous() && t.scalar_type() == Dtype::Float && t.numel() == count, what);
  return static_cast<const float*>(t.const_data_ptr());
}

const float* floats(const std::optional<Tensor>& t, int64_t count, const char* what) {
  return t.has_value() ? floats(*t, count, what) : nullptr;
}

const uint8_t* bytes(const std::optional<Tensor>& mask, const char* what) {
  if (!mask.has_value()) return nullptr;
  need(mask->is_cuda() && mask->is_contiguous() && mask->scalar_type() == Dtype::Byte, what);
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

const uint8_t* mask_of(const std::optional<Tensor>& counted, int64_t tokens) {
  need(!counted.has_value() || counted->numel() == tokens, "the token mask must be uint8 [T]");
  return bytes(counted, "the token mask must be uint8 [T]");
}

int64_t num_planes(int64_t tokens) { return (tokens + kPlaneRows - 1) / kPlaneRows; }

void router_gates(Tensor logits, std::optional<Tensor> noise, std::optional<Tensor> mask, std::optional<Tensor> counted,
                  int64_t top_k, int64_t score, bool renormalize, bool straight, Tensor gates, Tensor indices,
                  Tensor values, Tensor probs, Tensor planes) {
  const int64_t tokens = logits.size(0), experts = logits.size(1), count = tokens * experts;
  need(experts <= kMaxExperts && top_k >= 1 && top_k <= experts, "up to 64 experts, top_k in 1..E");
  const float* from = floats(logits, count, "logits must be float32 [T, E]");
  const float* jitter = floats(noise, count, "noise must be float32 [T, E]");
  const uint8_t* may = bytes(mask, "mask must be uint8");
  const int64_t stride = mask.has_value() && mask->size(0) != 1 ? experts : 0;
  if (mask.has_value()) need(mask->numel() == experts || mask->numel() == count, "mask must be [1, E] or [T, E]");
  const uint8_t* counts = mask_of(counted, tokens);
  floats(gates, count, "gates must be float32 [T, E]");
  floats(probs, count, "probs must be float32 [T, E]");
  floats(values, tokens * top_k, "values must be float32 [T, k]");
  floats(planes, num_planes(tokens) * (3 * experts + 3), "planes must be float32 [P, 3 E + 3]");
  need(indices.is_cuda() && indices.is_contiguous() && indices.scalar_type() == Dtype::Int &&
           indices.numel() == tokens * top_k, "indices must be int32 [T, k]");
  if (tokens == 0) return;
  const OnDeviceOf device(logits);
  const Rule rule{static_cast<int>(experts), static_cast<int>(top_k), static_cast<int>(score), renormalize, straight};
  const auto blocks = static_cast<unsigned>(num_planes(tokens));
  router_gates_kernel<<<blocks, 32 * kPlaneRows, 0, stream_of(logits)>>>(
      from, jitter, may, stride, counts, tokens, rule, static_cast<float*>(gates.mutable_data_ptr()),
      static_cast<int32_t*>(indices.mutable_data_ptr()), static_cast<float*>(values.mutable_data_ptr()),
      static_cast<float*>(probs.mutable_data_ptr()), static_cast<float*>(planes.mutable_data_ptr()));
  launched();
}

void router_backward(std::optional<Tensor> d_gates, std::optional<Tensor> d_values, std::optional<Tensor> d_logits,
                     std::optional<Tensor> d_probs, std::optional<Tensor> d_planes, Tensor gates, Tensor indices,
                     Tensor logits, Tensor probs, std::optional<Tensor> counted, int64_t score, bool renormalize,
                     bool straight, double inverse_temperature, Tensor d_scores) {
  const int64_t tokens = gates.size(0), experts = gates.size(1), top_k = indices.size(1), count = tokens * experts;
  need(experts <= kMaxExperts, "up to 64 experts");
  need(indices.is_cuda() && indices.is_contiguous() && indices.scalar_type() == Dtype::Int &&
           indices.numel() == tokens * top_k, "indices must be int32 [T, k]");
  Slopes from{floats(d_gates, count, "d_gates"), floats(d_values, tokens * top_k, "d_values"),
              floats(d_logits, count, "d_logits"), floats(d_probs, count, "d_probs"), nullptr, 0};
  if (d_planes.has_value()) {
    need(d_planes->is_cuda() && d_planes->scalar_type() == Dtype::Float && d_planes->dim() == 2 &&
             d_planes->size(0) == num_planes(tokens) && d_planes->size(1) == 3 * experts + 3 &&
             d_planes->stride(1) == 1, "d_planes must be float32 [P, 3 E + 3]");
    from.planes = static_cast<const float*>(d_planes->const_data_ptr());
    from.apart = d_planes->stride(0);
  }
  const Kept kept{floats(gates, count, "gates"), floats(logits, count, "logits"), floats(probs, count, "probs"),
                  static_cast<const int32_t*>(indices.const_data_ptr()), mask_of(counted, tokens)};
  const Rule rule{static_cast<int>(experts), static_cast<int>(top_k), static_cast<int>(score), renormalize, straight};
  floats(d_scores, count, "d_scores");
  if (tokens == 0) return;
  const OnDeviceOf device(gates);
  const auto blocks = static_cast<unsigned>((tokens + kWarps - 1) / kWarps);
  router_backward_kernel<<<blocks, 32 * kWarps, 0, stream_of(gates)>>>(
      from, kept, tokens, rule, static_cast<float>(inverse_temperature),
      static_cast<float*>(d_scores.mutable_data_ptr()));
  launched();
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cuda, CUDA, m) {
  m.impl("router_gates", TORCH_BOX(&mllmcl::router_gates));
  m.impl("router_backward", TORCH_BOX(&mllmcl::router_backward));
}
