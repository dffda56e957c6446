// Scores, choice and gates of a router, and their gradient, on [T, E] float32.

#include <algorithm>
#include <cmath>
#include <limits>

#include "../checks.h"

namespace mllmcl {
namespace {

constexpr int64_t kSoftmax = 0;
constexpr int64_t kSigmoid = 1;

const float* floats(const Tensor& t, int64_t count, const char* what) {
  need(t.is_contiguous() && t.scalar_type() == Dtype::Float && t.numel() == count, what);
  return static_cast<const float*>(t.const_data_ptr());
}

struct Row {
  int64_t experts, top_k, score;
  bool renormalize, straight;
};

// e^x of numbers or -inf, to about 2 units in the last place (Cody and Waite's reduction, a polynomial of degree 7)
inline float exponential(float x) {
  const float in = std::min(std::max(x, -87.0f), 88.0f);
  const float n = (in * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
  const float r = (in - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87.0f ? 0.0f : (p * r * r + r + 1.0f) * power;
}

MLLMCL_CLONES void softmax_weights(const float* x, float top, float* out, int64_t count) {
  for (int64_t e = 0; e < count; ++e) out[e] = exponential(x[e] - top);
}

MLLMCL_CLONES void sigmoids(const float* x, float* out, int64_t count) {
  for (int64_t e = 0; e < count; ++e) out[e] = 1.0f / (1.0f + exponential(-x[e]));
}

// softmax or sigmoid over the allowed experts; true if the row has numbers. Logits that are not allowed become 0.
bool scores(float* noisy, const uint8_t* allowed, const Row& rule, float* probs) {
  bool sound = true;
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t e = 0; e < rule.experts; ++e) {
    if (allowed != nullptr && !allowed[e]) continue;
    sound = sound && !std::isnan(noisy[e]) && (rule.score == kSoftmax || std::isfinite(noisy[e]));
    top = std::max(top, noisy[e]);
  }
  sound = sound && (rule.score == kSigmoid || std::isfinite(top));
  if (!sound) {
    std::fill(probs, probs + rule.experts, std::numeric_limits<float>::quiet_NaN());
  } else {
    for (int64_t e = 0; allowed != nullptr && e < rule.experts; ++e)
      if (!allowed[e]) noisy[e] = 0.0f;
    if (rule.score == kSigmoid) sigmoids(noisy, probs, rule.experts);
    else softmax_weights(noisy, top, probs, rule.experts);
  }
  for (int64_t e = 0; allowed != nullptr && e < rule.experts; ++e)
    if (!allowed[e]) probs[e] = 0.0f;
  if (sound && rule.score == kSoftmax) {
    float total = 0.0f;
    for (int64_t e = 0; e < rule.experts; ++e) total += probs[e];
    for (int64_t e = 0; e < rule.experts; ++e) probs[e] /= total;
  }
  return sound;
}

// the k best allowed experts, best first, ties to the lowest index; the lowest allowed ones of a row without numbers
void choose(const float* noisy, const uint8_t* allowed, bool sound, const Row& rule, float* best, uint8_t* taken,
            int32_t* indices) {
  std::fill(taken, taken + rule.experts, uint8_t{0});
  int64_t found = 0;
  for (int64_t e = 0; e < rule.experts; ++e) {
    if (allowed != nullptr && !allowed[e]) continue;
    const float value = sound ? noisy[e] : 0.0f;
    if (found == rule.top_k && !(value > best[found - 1])) continue;
    int64_t place = found < rule.top_k ? found++ : found - 1;
    for (; place > 0 && value > best[place - 1]; --place) {
      best[place] = best[place - 1];
      indices[place] = indices[place - 1];
    }
    best[place] = value;
    indices[place] = static_cast<int32_t>(e);
  }
  for (int64_t slot = 0; slot < found; ++slot) taken[indices[slot]] = 1;
  std::fill(indices + found, indices + rule.top_k, int32_t{-1});
}

void fill_gates(const float* probs, const uint8_t* taken, bool sound, const Row& rule, const int32_t* indices,
                float* gates, float* values) {
  float total = 0.0f;
  for (int64_t e = 0; e < rule.experts; ++e) {
    gates[e] = !taken[e] ? 0.0f : (rule.straight && sound ? 1.0f : probs[e]);
    total += gates[e];
  }
  if (rule.renormalize) {
    for (int64_t e = 0; e < rule.experts; ++e)
      if (taken[e]) gates[e] /= total;
  }
  for (int64_t slot = 0; slot < rule.top_k; ++slot) values[slot] = indices[slot] < 0 ? 0.0f : gates[indices[slot]];
}

void router_gates(Tensor logits, std::optional<Tensor> noise, std::optional<Tensor> mask, int64_t top_k, int64_t score,
                  bool renormalize, bool straight, Tensor gates, Tensor indices, Tensor values, Tensor probs) {
  need(logits.dim() == 2, "logits must be [T, E]");
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const Row rule{experts, top_k, score, renormalize, straight};
  need(top_k >= 1 && top_k <= experts, "top_k must be in 1..E");
  const float* from = floats(logits, tokens * experts, "logits must be contiguous float32");
  const float* jitter = noise.has_value() ? floats(*noise, tokens * experts, "noise must be float32 [T, E]") : nullptr;
  const uint8_t* may = nullptr;
  int64_t stride = 0;
  if (mask.has_value()) {
    need(mask->is_contiguous() && mask->scalar_type() == Dtype::Byte, "mask must be contiguous uint8");
    need(mask->numel() == experts || mask->numel() == tokens * experts, "mask must be [1, E] or [T, E]");
    may = static_cast<const uint8_t*>(mask->const_data_ptr());
    stride = mask->size(0) == 1 ? 0 : experts;
  }
  floats(gates, tokens * experts, "gates must be float32 [T, E]");
  floats(probs, tokens * experts, "probs must be float32 [T, E]");
  floats(values, tokens * top_k, "values must be float32 [T, k]");
  need(indices.is_contiguous() && indices.scalar_type() == Dtype::Int && indices.numel() == tokens * top_k,
       "indices must be int32 [T, k]");
  auto* to_gates = static_cast<float*>(gates.mutable_data_ptr());
  auto* to_probs = static_cast<float*>(probs.mutable_data_ptr());
  auto* to_values = static_cast<float*>(values.mutable_data_ptr());
  auto* to_indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  torch::stable::parallel_for(0, tokens, grain(8 * experts), [&](int64_t begin, int64_t end) {
    std::vector<float> noisy(experts), best(top_k);
    std::vector<uint8_t> taken(experts);
    for (int64_t t = begin; t < end; ++t) {
      const float* row = from + t * experts;
      const uint8_t* allowed = may == nullptr ? nullptr : may + t * stride;
      for (int64_t e = 0; e < experts; ++e) noisy[e] = row[e] + (jitter == nullptr ? 0.0f : jitter[t * experts + e]);
      float* prob = to_probs + t * experts;
      int32_t* index = to_indices + t * top_k;
      const bool sound = scores(noisy.data(), allowed, rule, prob);
      choose(noisy.data(), allowed, sound, rule, best.data(), taken.data(), index);
      fill_gates(prob, taken.data(), sound, rule, index, to_gates + t * experts, to_values + t * top_k);
    }
  });
}

// Gradient of the logits; the formula is in ops/route/README.md.
void router_backward(Tensor d_gates, Tensor d_values, Tensor d_logits, Tensor d_probs, Tensor gates, Tensor indices,
                     Tensor probs, int64_t score, bool renormalize, bool straight, double inverse_temperature,
                     Tensor d_scores) {
  need(gates.dim() == 2 && indices.dim() == 2, "gates must be [T, E], indices [T, k]");
  const int64_t tokens = gates.size(0), experts = gates.size(1), top_k = indices.size(1);
  const int64_t count = tokens * experts;
  const float* g = floats(gates, count, "gates must be float32 [T, E]");
  const float* p = floats(probs, count, "probs must be float32 [T, E]");
  const float* from_gates = floats(d_gates, count, "d_gates must be float32 [T, E]");
  const float* from_logits = floats(d_logits, count, "d_logits must be float32 [T, E]");
  const float* from_probs = floats(d_probs, count, "d_probs must be float32 [T, E]");
  const float* from_values = floats(d_values, tokens * top_k, "d_values must be float32 [T, k]");
  floats(d_scores, count, "d_scores must be float32 [T, E]");
  need(indices.is_contiguous() && indices.scalar_type() == Dtype::Int, "indices must be contiguous int32");
  const auto* index = static_cast<const int32_t*>(indices.const_data_ptr());
  for (int64_t i = 0; i < tokens * top_k; ++i) need(index[i] >= -1 && index[i] < experts, "an index is out of range");
  auto* out = static_cast<float*>(d_scores.mutable_data_ptr());
  const float scale = static_cast<float>(inverse_temperature);
  torch::stable::parallel_for(0, tokens, grain(8 * experts), [&](int64_t begin, int64_t end) {
    std::vector<float> h(experts), d(experts);
    std::vector<uint8_t> taken(experts);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = t * experts;
      std::fill(taken.begin(), taken.end(), uint8_t{0});
      std::copy(from_gates + at, from_gates + at + experts, h.begin());
      for (int64_t slot = 0; slot < top_k; ++slot) {
        const int32_t e = index[t * top_k + slot];
        if (e < 0) continue;
        taken[e] = 1;
        h[e] += from_values[t * top_k + slot];
      }
      float kept = 0.0f, along = 0.0f;
      for (int64_t e = 0; e < experts; ++e) {
        if (!taken[e]) continue;
        kept += p[at + e];
        along += h[e] * g[at + e];
      }
      for (int64_t e = 0; e < experts; ++e) {
        float through = taken[e] ? h[e] : 0.0f;
        if (straight) through = h[e];
        else if (renormalize && taken[e]) through = (h[e] - along) / kept;
        d[e] = through + from_probs[at + e];
      }
      float mean = 0.0f;
      for (int64_t e = 0; e < experts; ++e) mean += p[at + e] * d[e];
      for (int64_t e = 0; e < experts; ++e) {
        const float prob = p[at + e];
        const float inner = score == kSigmoid ? prob * (1.0f - prob) * d[e] : prob * (d[e] - mean);
        out[at + e] = (inner + from_logits[at + e]) * scale;
      }
    }
  });
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CPU, m) {
  m.impl("router_gates", TORCH_BOX(&mllmcl::router_gates));
  m.impl("router_backward", TORCH_BOX(&mllmcl::router_backward));
}
