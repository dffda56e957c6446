// Load, importance and auxiliary losses of a routing, and their gradient, on [T, E] float32; formulas in
// ops/routing_statistics/README.md.

#include <cmath>

#include "rows.h"

namespace mllmcl {
namespace {

constexpr float kTiny = std::numeric_limits<float>::min();

// Rows [T, width] that may lie apart.
template <class T>
struct Rows {
  const T* data;
  int64_t apart;
  const T* operator[](int64_t t) const { return data + t * apart; }
};

template <class T>
Rows<T> rows_of(const Tensor& table, Dtype dtype, int64_t tokens, int64_t width, const char* what) {
  need(table.dim() == 2 && table.scalar_type() == dtype && table.size(0) == tokens && table.size(1) == width, what);
  need(width <= 1 || table.stride(1) == 1, what);
  return {static_cast<const T*>(table.const_data_ptr()), table.stride(0)};
}

const uint8_t* mask_of(const std::optional<Tensor>& mask, int64_t tokens) {
  if (!mask.has_value()) return nullptr;
  need(mask->is_contiguous() && mask->scalar_type() == Dtype::Byte && mask->numel() == tokens, "mask must be uint8 [T]");
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

const float* numbers(const Tensor& from, int64_t count, const char* what) {
  need(from.is_contiguous() && from.scalar_type() == Dtype::Float && from.numel() == count, what);
  return static_cast<const float*>(from.const_data_ptr());
}

float* floats(Tensor& out, int64_t count, const char* what) {
  need(out.is_contiguous() && out.scalar_type() == Dtype::Float && out.numel() == count, what);
  return static_cast<float*>(out.mutable_data_ptr());
}

// Rows whose sums are float32: few enough for exact counts and small errors, whatever the number of threads.
int64_t chunk_rows(int64_t experts) { return std::clamp<int64_t>(grain(4 * experts), 16, 256); }

// sum q y with q = p / mass, which is 1 exactly where there is but one p
MLLMCL_INLINE float mean(const float* p, float mass, const float* y, int64_t count) {
  Lanes sums = {};
  int64_t e = 0;
  for (; e + kLanes <= count; e += kLanes) sums += lanes(p + e) / mass * lanes(y + e);
  float all = total(sums);
  for (; e < count; ++e) all += p[e] / mass * y[e];
  return all;
}

// log sum e^x, infinite where x is, NaN where one of x is; the e^(x - largest) go to `powers`, their sum to `mass`.
MLLMCL_INLINE float log_sum(const float* x, int64_t count, float* powers, float* mass) {
  float trace;
  const float top = largest_of(x, count, &trace);
  const float from = std::isfinite(top) ? top : 0.0f;
  for (int64_t e = 0; e < count; ++e) powers[e] = exponential(x[e] - from);
  *mass = sum_of(powers, count);
  if (std::isnan(*mass)) return *mass;
  return std::isfinite(top) ? logarithm(*mass) + top : top;
}

// The sum of p, 1 for a row where nothing is allowed.
MLLMCL_INLINE float mass_of(const float* p, int64_t count) {
  const float all = sum_of(p, count);
  return all == 0.0f ? 1.0f : all;
}

// sum q log q; the logarithms go to `logs`
MLLMCL_INLINE float negative_entropy(const float* p, int64_t count, float* logs) {
  const float mass = mass_of(p, count);
  for (int64_t e = 0; e < count; ++e) {
    const float q = p[e] / mass;
    logs[e] = logarithm(q > kTiny ? q : kTiny);
  }
  return mean(p, mass, logs, count);
}

MLLMCL_INLINE void add_row(const float* from, int64_t count, float* to) {
  for (int64_t e = 0; e < count; ++e) to[e] += from[e];
}

struct Sums {
  double z = 0.0, entropy = 0.0;
  int64_t tokens = 0;
  bool sound = true;
};

struct Tables {
  Rows<float> logits, probs, gates;
  Rows<int32_t> indices;
  const uint8_t* mask;
  int64_t tokens, experts, top_k;
};

// Rows begin..end into sums [3, E] of choices, gates and probabilities, and into those of single numbers.
MLLMCL_CLONES void add_rows(const Tables& from, int64_t begin, int64_t end, float* room, float* sums, Sums& all) {
  const int64_t experts = from.experts;
  for (int64_t t = begin; t < end; ++t) {
    if (from.mask != nullptr && !from.mask[t]) continue;
    const int32_t* slots = from.indices[t];
    for (int64_t slot = 0; slot < from.top_k; ++slot) {
      if (slots[slot] < 0) continue;
      if (slots[slot] < experts) sums[slots[slot]] += 1.0f;
      else all.sound = false;
    }
    add_row(from.gates[t], experts, sums + experts);
    add_row(from.probs[t], experts, sums + 2 * experts);
    float mass;
    const double lse = log_sum(from.logits[t], experts, room, &mass);
    all.z += lse * lse;
    all.entropy -= negative_entropy(from.probs[t], experts, room);
    ++all.tokens;
  }
}

void routing_statistics(Tensor logits, Tensor probs, Tensor gates, Tensor indices, std::optional<Tensor> mask,
                        Tensor load, Tensor importance, Tensor balance, Tensor z, Tensor entropy, Tensor count) {
  need(gates.dim() == 2 && indices.dim() == 2, "gates must be [T, E], indices [T, k]");
  const int64_t tokens = gates.size(0), experts = gates.size(1), top_k = indices.size(1);
  const Tables from{
      rows_of<float>(logits, Dtype::Float, tokens, experts, "logits must be float32 [T, E]"),
      rows_of<float>(probs, Dtype::Float, tokens, experts, "probs must be float32 [T, E]"),
      rows_of<float>(gates, Dtype::Float, tokens, experts, "gates must be float32 [T, E]"),
      rows_of<int32_t>(indices, Dtype::Int, tokens, top_k, "indices must be int32 [T, k]"),
      mask_of(mask, tokens), tokens, experts, top_k};
  float* to_load = floats(load, experts, "load must be float32 [E]");
  float* to_importance = floats(importance, experts, "importance must be float32 [E]");
  float* to[] = {floats(balance, 1, "a loss is float32"), floats(z, 1, "a loss is float32"),
                 floats(entropy, 1, "a loss is float32"), floats(count, 1, "the count is float32")};
  const int64_t step = chunk_rows(experts), chunks = (tokens + step - 1) / step;
  std::vector<float> sums(chunks * 3 * experts);
  std::vector<Sums> singles(chunks);
  const int64_t least = std::max<int64_t>(1, grain(8 * experts) / step);
  torch::stable::parallel_for(0, chunks, least, [&](int64_t begin, int64_t end) {
    std::vector<float> room(experts);
    for (int64_t c = begin; c < end; ++c)
      add_rows(from, c * step, std::min(tokens, (c + 1) * step), room.data(), sums.data() + c * 3 * experts, singles[c]);
  });
  Sums all;
  std::vector<double> table(3 * experts);
  for (int64_t c = 0; c < chunks; ++c) {
    all.z += singles[c].z;
    all.entropy += singles[c].entropy;
    all.tokens += singles[c].tokens;
    all.sound = all.sound && singles[c].sound;
    for (int64_t e = 0; e < 3 * experts; ++e) table[e] += sums[c * 3 * experts + e];
  }
  need(all.sound, "an index is out of range");
  const auto counted = static_cast<double>(std::max<int64_t>(1, all.tokens));
  double slots = 0.0, even = 0.0;
  for (int64_t e = 0; e < experts; ++e) slots += table[e];
  for (int64_t e = 0; e < experts; ++e) {
    to_load[e] = static_cast<float>(table[e]);
    to_importance[e] = static_cast<float>(table[experts + e]);
    even += table[e] / std::max(slots, 1.0) * table[2 * experts + e];
  }
  const double found[] = {experts * even / counted, all.z / counted, all.entropy / counted, counted};
  for (int64_t i = 0; i < 4; ++i) *to[i] = static_cast<float>(found[i]);
}

MLLMCL_INLINE void z_row(const float* x, int64_t count, float factor, float* out) {
  float mass;
  const float lse = log_sum(x, count, out, &mass);
  if (!std::isfinite(lse)) {
    for (int64_t e = 0; e < count; ++e) out[e] = factor * lse * std::exp(x[e] - lse);
    return;
  }
  const float scale = factor * lse / mass;
  for (int64_t e = 0; e < count; ++e) out[e] *= scale;
}

// The slope of the balance loss is the same in every row; that of the entropy is added unless its factor is zero.
MLLMCL_INLINE void probs_row(const float* p, int64_t count, const float* balance, float factor, float* out) {
  if (factor == 0.0f) {
    for (int64_t e = 0; e < count; ++e) out[e] = balance[e];
    return;
  }
  const float mass = mass_of(p, count);
  // of q log q; below the clamp no gradient passes through the logarithm
  for (int64_t e = 0; e < count; ++e) {
    const float q = p[e] / mass;
    out[e] = logarithm(q > kTiny ? q : kTiny) + (q < kTiny ? 0.0f : 1.0f);
  }
  const float middle = mean(p, mass, out, count), scale = factor / mass;
  for (int64_t e = 0; e < count; ++e) out[e] = balance[e] - scale * (out[e] - middle);
}

// What every row is given, and where its gradients go: null where they are not wanted.
struct Slopes {
  Rows<float> logits, probs;
  const uint8_t* mask;
  const float *balance, *importance;
  float z, entropy;
  float *to_logits, *to_probs, *to_gates;
};

MLLMCL_CLONES void write_rows(const Slopes& from, int64_t begin, int64_t end, int64_t experts) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t at = t * experts;
    const bool counts = from.mask == nullptr || from.mask[t];
    for (float* to : {from.to_logits, from.to_probs, from.to_gates})
      if (to != nullptr && (!counts || to == from.to_logits)) std::fill(to + at, to + at + experts, 0.0f);
    if (!counts) continue;
    if (from.to_logits != nullptr && from.z != 0.0f) z_row(from.logits[t], experts, from.z, from.to_logits + at);
    if (from.to_probs != nullptr) probs_row(from.probs[t], experts, from.balance, from.entropy, from.to_probs + at);
    if (from.to_gates != nullptr) std::copy(from.importance, from.importance + experts, from.to_gates + at);
  }
}

// A number that came, or zero.
float number(const std::optional<Tensor>& value) {
  if (!value.has_value()) return 0.0f;
  return *numbers(*value, 1, "a loss has a float32 gradient");
}

void routing_statistics_backward(std::optional<Tensor> d_importance, std::optional<Tensor> d_balance,
                                 std::optional<Tensor> d_z, std::optional<Tensor> d_entropy, Tensor logits,
                                 Tensor probs, std::optional<Tensor> mask, Tensor load, Tensor count, Tensor d_logits,
                                 Tensor d_probs, Tensor d_gates) {
  need(probs.dim() == 2, "probs must be [T, E]");
  const int64_t tokens = probs.size(0), experts = probs.size(1);
  const auto x = rows_of<float>(logits, Dtype::Float, tokens, experts, "logits must be float32 [T, E]");
  const auto p = rows_of<float>(probs, Dtype::Float, tokens, experts, "probs must be float32 [T, E]");
  const uint8_t* counted = mask_of(mask, tokens);
  const auto target = [&](Tensor& out) {
    return out.numel() == 0 ? nullptr : floats(out, tokens * experts, "gradients must be float32 [T, E]");
  };
  float *to_logits = target(d_logits), *to_probs = target(d_probs), *to_gates = target(d_gates);
  const float* loads = numbers(load, experts, "load must be float32 [E]");
  const float share = 1.0f / *numbers(count, 1, "count must be float32");
  std::vector<float> balance(experts), importance(experts);
  float slots = 0.0f;
  for (int64_t e = 0; e < experts; ++e) slots += loads[e];
  const float slope = number(d_balance) * experts * share / std::max(slots, 1.0f);
  for (int64_t e = 0; e < experts; ++e) balance[e] = slope * loads[e];
  if (d_importance.has_value()) {
    const float* from = numbers(*d_importance, experts, "d_importance must be float32 [E]");
    std::copy(from, from + experts, importance.begin());
  }
  const float z = 2.0f * number(d_z) * share, entropy = number(d_entropy) * share;
  const Slopes slopes{x, p, counted, balance.data(), importance.data(), z, entropy, to_logits, to_probs, to_gates};
  torch::stable::parallel_for(0, tokens, grain(8 * experts), [&](int64_t begin, int64_t end) {
    write_rows(slopes, begin, end, experts);
  });
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CPU, m) {
  m.impl("routing_statistics", TORCH_BOX(&mllmcl::routing_statistics));
  m.impl("routing_statistics_backward", TORCH_BOX(&mllmcl::routing_statistics_backward));
}
