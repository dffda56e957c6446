// Scores, choice and gates of a router, and their gradient, on [T, E] float32.

#include <algorithm>
#include <cmath>
#include <limits>

#include "../checks.h"
#include "rows.h"

namespace mllmcl {
namespace {

constexpr int64_t kSoftmax = 0;
constexpr int64_t kSigmoid = 1;
constexpr int64_t kFew = 16;  // experts up to which a choice one by one is as fast

const float* floats(const Tensor& t, int64_t count, const char* what) {
  need(t.is_contiguous() && t.scalar_type() == Dtype::Float && t.numel() == count, what);
  return static_cast<const float*>(t.const_data_ptr());
}

struct Row {
  int64_t experts, top_k, score;
  bool renormalize, straight;
};

MLLMCL_CLONES void softmax_weights(const float* x, float top, float* out, int64_t count) {
  for (int64_t e = 0; e < count; ++e) out[e] = exponential(x[e] - top);
}

MLLMCL_CLONES void sigmoids(const float* x, float* out, int64_t count) {
  for (int64_t e = 0; e < count; ++e) out[e] = 1.0f / (1.0f + exponential(-x[e]));
}

MLLMCL_CLONES float largest(const float* x, int64_t count, float* trace) { return largest_of(x, count, trace); }

MLLMCL_CLONES float sum(const float* x, int64_t count) { return sum_of(x, count); }

MLLMCL_CLONES void scale_row(float* x, float factor, int64_t count) {
  for (int64_t e = 0; e < count; ++e) x[e] *= factor;
}

// softmax or sigmoid over the allowed experts; true if the row has numbers. Logits that are not allowed become 0.
bool scores(float* noisy, const uint8_t* allowed, const Row& rule, float* probs) {
  const int64_t count = rule.experts;
  float top;
  bool sound;
  if (allowed == nullptr) {
    float trace;
    top = largest(noisy, count, &trace);
    sound = trace == 0.0f;
    // -inf is a number for a softmax
    for (int64_t e = 0; !sound && rule.score == kSoftmax && e < count; ++e) {
      if (std::isnan(noisy[e])) break;
      sound = e + 1 == count;
    }
  } else {
    top = -std::numeric_limits<float>::infinity();
    sound = true;
    for (int64_t e = 0; e < count; ++e) {
      if (!allowed[e]) continue;
      sound = sound && !std::isnan(noisy[e]) && (rule.score == kSoftmax || std::isfinite(noisy[e]));
      top = std::max(top, noisy[e]);
    }
  }
  sound = sound && (rule.score == kSigmoid || std::isfinite(top));
  if (!sound) {
    std::fill(probs, probs + count, std::numeric_limits<float>::quiet_NaN());
  } else {
    for (int64_t e = 0; allowed != nullptr && e < count; ++e)
      if (!allowed[e]) noisy[e] = 0.0f;
    if (rule.score == kSigmoid) sigmoids(noisy, probs, count);
    else softmax_weights(noisy, top, probs, count);
  }
  for (int64_t e = 0; allowed != nullptr && e < count; ++e)
    if (!allowed[e]) probs[e] = 0.0f;
  if (sound && rule.score == kSoftmax) scale_row(probs, 1.0f / sum(probs, count), count);
  return sound;
}

typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));

// The place of every number in falling order, ties to the lowest index: how many numbers come before it.
MLLMCL_CLONES void places(const float* x, int64_t blocks, int32_t* place) {
  for (int64_t block = 0; block < blocks; ++block) {
    const Lanes own = lanes(x + block * kLanes);
    IntLanes before = {};
    for (int64_t j = 0; j < block * kLanes; ++j) before -= (x[j] - Lanes{} >= own);
    for (int64_t j = (block + 1) * kLanes; j < blocks * kLanes; ++j) before -= (x[j] - Lanes{} > own);
    for (int32_t j = 0; j < kLanes; ++j) {
      const Lanes other = x[block * kLanes + j] - Lanes{};
      before -= (other > own) | ((other == own) & (IntLanes{0, 1, 2, 3, 4, 5, 6, 7} > j));
    }
    std::memcpy(place + block * kLanes, &before, sizeof(before));
  }
}

// `choose` for many experts that may all be chosen; behind the last one `noisy` is -inf up to a whole block
void choose_of_many(const float* noisy, const Row& rule, int32_t* place, int32_t* indices) {
  places(noisy, (rule.experts + kLanes - 1) / kLanes, place);
  for (int64_t e = 0; e < rule.experts; ++e)
    if (place[e] < rule.top_k) indices[place[e]] = static_cast<int32_t>(e);
}

// the k best allowed experts, best first, ties to the lowest index; the lowest allowed ones of a row without numbers
void choose(const float* noisy, const uint8_t* allowed, bool sound, const Row& rule, float* best, int32_t* indices) {
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
  std::fill(indices + found, indices + rule.top_k, int32_t{-1});
}

void fill_gates(const float* probs, bool sound, const Row& rule, const int32_t* indices, float* gates, float* values) {
  std::fill(gates, gates + rule.experts, 0.0f);
  float total = 0.0f;
  for (int64_t slot = 0; slot < rule.top_k; ++slot) {
    const int32_t e = indices[slot];
    values[slot] = e < 0 ? 0.0f : (rule.straight && sound ? 1.0f : probs[e]);
    total += values[slot];
  }
  for (int64_t slot = 0; slot < rule.top_k && indices[slot] >= 0; ++slot) {
    if (rule.renormalize) values[slot] /= total;
    gates[indices[slot]] = values[slot];
  }
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
    std::vector<float> noisy(experts + kLanes, -std::numeric_limits<float>::infinity()), best(top_k);
    std::vector<int32_t> place(experts + kLanes);
    for (int64_t t = begin; t < end; ++t) {
      const float* row = from + t * experts;
      const uint8_t* allowed = may == nullptr ? nullptr : may + t * stride;
      for (int64_t e = 0; e < experts; ++e) noisy[e] = row[e] + (jitter == nullptr ? 0.0f : jitter[t * experts + e]);
      float* prob = to_probs + t * experts;
      int32_t* index = to_indices + t * top_k;
      const bool sound = scores(noisy.data(), allowed, rule, prob);
      if (sound && allowed == nullptr && experts > kFew) choose_of_many(noisy.data(), rule, place.data(), index);
      else choose(noisy.data(), allowed, sound, rule, best.data(), index);
      fill_gates(prob, sound, rule, index, to_gates + t * experts, to_values + t * top_k);
    }
  });
}

MLLMCL_CLONES void through_scores(const float* d, const float* p, const float* from_logits, int64_t experts,
                                  int64_t score, float scale, float* out) {
  if (score == kSigmoid) {
    for (int64_t e = 0; e < experts; ++e) out[e] = (p[e] * (1.0f - p[e]) * d[e] + from_logits[e]) * scale;
    return;
  }
  Lanes sums = {};
  int64_t place = 0;
  for (; place + kLanes <= experts; place += kLanes) sums += lanes(p + place) * lanes(d + place);
  float mean = total(sums);
  for (; place < experts; ++place) mean += p[place] * d[place];
  for (int64_t e = 0; e < experts; ++e) out[e] = (p[e] * (d[e] - mean) + from_logits[e]) * scale;
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
    std::vector<float> d(experts);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = t * experts;
      const int32_t* chosen = index + t * top_k;
      const float* from_value = from_values + t * top_k;
      std::copy(from_probs + at, from_probs + at + experts, d.begin());
      if (straight) {
        for (int64_t e = 0; e < experts; ++e) d[e] += from_gates[at + e];
        for (int64_t slot = 0; slot < top_k; ++slot)
          if (chosen[slot] >= 0) d[chosen[slot]] += from_value[slot];
      } else {
        float kept = 0.0f, along = 0.0f;
        for (int64_t slot = 0; slot < top_k && chosen[slot] >= 0; ++slot) {
          const int64_t e = at + chosen[slot];
          kept += p[e];
          along += (from_gates[e] + from_value[slot]) * g[e];
        }
        for (int64_t slot = 0; slot < top_k && chosen[slot] >= 0; ++slot) {
          const float h = from_gates[at + chosen[slot]] + from_value[slot];
          d[chosen[slot]] += renormalize ? (h - along) / kept : h;
        }
      }
      through_scores(d.data(), p + at, from_logits + at, experts, score, scale, out + at);
    }
  });
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CPU, m) {
  m.impl("router_gates", TORCH_BOX(&mllmcl::router_gates));
  m.impl("router_backward", TORCH_BOX(&mllmcl::router_backward));
}
