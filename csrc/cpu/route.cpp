// Scores, choice and gates of routers side by side with the planes of their tables, and the gradient of their logits, on
// [T, L * E] float32: a row for each token and router.

#include "planes.h"

namespace mllmcl {
namespace {

constexpr int64_t kSoftmax = 0;
constexpr int64_t kSigmoid = 1;
constexpr int64_t kFew = 16;  // experts up to which a choice one by one is as fast

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

// softmax or sigmoid over the allowed experts; true if the row has numbers. Logits that are not allowed become 0; `lse`
// becomes log sum e^x of a softmax, NaN where there is none.
bool scores(float* noisy, const uint8_t* allowed, const Row& rule, float* probs, float* lse) {
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
  *lse = std::numeric_limits<float>::quiet_NaN();
  if (sound && rule.score == kSoftmax) {
    const float mass = sum(probs, count);
    scale_row(probs, 1.0f / mass, count);
    *lse = top + logarithm(mass);
  }
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

// What every row of a router reads beside the logits: noise and the experts it may choose, null where there is none.
struct Given {
  const float *logits, *noise;
  const uint8_t* allowed;
  int64_t apart;  // between the allowed experts of two tokens
};

// What a thread writes on.
struct Room {
  std::vector<float> noisy, best;
  std::vector<int32_t> place;
  explicit Room(const Row& rule)
      : noisy(rule.experts + kLanes, -std::numeric_limits<float>::infinity()), best(rule.top_k),
        place(rule.experts + kLanes) {}
};

// Row `r` of the tables, that of token `t`; `lse` as in `scores`.
void route_row(const Given& from, int64_t r, int64_t t, const Row& rule, Room& room, float* gates, int32_t* indices,
               float* values, float* probs, float* lse) {
  const int64_t at = r * rule.experts;
  const uint8_t* allowed = from.allowed == nullptr ? nullptr : from.allowed + t * from.apart;
  float* noisy = room.noisy.data();
  for (int64_t e = 0; e < rule.experts; ++e)
    noisy[e] = from.logits[at + e] + (from.noise == nullptr ? 0.0f : from.noise[at + e]);
  int32_t* index = indices + r * rule.top_k;
  const bool sound = scores(noisy, allowed, rule, probs + at, lse);
  if (sound && allowed == nullptr && rule.experts > kFew) choose_of_many(noisy, rule, room.place.data(), index);
  else choose(noisy, allowed, sound, rule, room.best.data(), index);
  fill_gates(probs + at, sound, rule, index, gates + at, values + r * rule.top_k);
}

MLLMCL_CLONES void fill_plane(const Tables& from, int64_t begin, int64_t end, const float* known, float* room,
                              float* plane) {
  sum_rows(from, begin, end, known, room, plane);
}

void router_gates(Tensor logits, std::optional<Tensor> noise, std::optional<Tensor> mask, std::optional<Tensor> counted,
                  int64_t routers, int64_t top_k, int64_t score, bool renormalize, bool straight, Tensor gates,
                  Tensor indices, Tensor values, Tensor probs, Tensor planes) {
  need(logits.dim() == 2 && routers >= 1 && logits.size(1) % routers == 0, "logits must be [T, L * E]");
  const int64_t tokens = logits.size(0), experts = logits.size(1) / routers, rows = tokens * routers;
  const int64_t count = rows * experts, blocks = num_planes(tokens), width = plane_width(experts);
  const Row rule{experts, top_k, score, renormalize, straight};
  need(top_k >= 1 && top_k <= experts, "top_k must be in 1..E");
  const float* jitter = numbers(noise, count, "noise must be float32 [T, L * E]");
  Given from{numbers(logits, count, "logits must be contiguous float32"), jitter, nullptr, 0};
  if (mask.has_value()) {
    need(mask->is_contiguous() && mask->scalar_type() == Dtype::Byte, "mask must be contiguous uint8");
    need(mask->numel() == experts || mask->numel() == tokens * experts, "mask must be [1, E] or [T, E]");
    from.allowed = static_cast<const uint8_t*>(mask->const_data_ptr());
    from.apart = mask->size(0) == 1 ? 0 : experts;
  }
  float* to_gates = floats(gates, count, "gates must be float32 [T, L * E]");
  float* to_probs = floats(probs, count, "probs must be float32 [T, L * E]");
  float* to_values = floats(values, rows * top_k, "values must be float32 [T, L * k]");
  float* to_planes = floats(planes, blocks * routers * width, "planes must be float32 [P, L * (3 E + 3)]");
  need(indices.is_contiguous() && indices.scalar_type() == Dtype::Int && indices.numel() == rows * top_k,
       "indices must be int32 [T, L * k]");
  auto* to_indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  const uint8_t* counts = mask_of(counted, tokens);
  // a softmax over all logits without noise has their log sum e^x already
  const bool is_known = jitter == nullptr && from.allowed == nullptr && score == kSoftmax;
  const int64_t least = std::max<int64_t>(1, grain(8 * experts) / (kPlaneRows * routers));
  torch::stable::parallel_for(0, blocks, least, [&](int64_t begin, int64_t end) {
    Room room(rule);
    std::vector<float> logs(experts);
    float lse[kPlaneRows];
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * kPlaneRows, last = std::min(tokens, first + kPlaneRows);
      for (int64_t l = 0; l < routers; ++l) {
        for (int64_t t = first; t < last; ++t)
          route_row(from, t * routers + l, t, rule, room, to_gates, to_indices, to_values, to_probs, lse + t - first);
        const auto side = [&](const float* table) { return Rows<float>{table + l * experts, routers * experts}; };
        const Tables tables{side(from.logits), side(to_probs), side(to_gates),
                            {to_indices + l * top_k, routers * top_k}, counts, tokens, experts, top_k};
        fill_plane(tables, first, last, is_known ? lse : nullptr, logs.data(), to_planes + (p * routers + l) * width);
      }
    }
  });
}

MLLMCL_INLINE void through_scores(const float* d, const float* p, const float* from_logits, int64_t experts,
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

// Adds to the gradient `d` of the probabilities what reaches them through the gates, whose gradient is `h`.
MLLMCL_INLINE void through_gates(const float* h, const float* from_values, const float* p, const float* g,
                                 const int32_t* chosen, const Row& rule, float* d) {
  const auto value = [&](int64_t slot) { return from_values == nullptr ? 0.0f : from_values[slot]; };
  if (rule.straight) {
    add_row(h, rule.experts, d);
    for (int64_t slot = 0; slot < rule.top_k; ++slot)
      if (chosen[slot] >= 0) d[chosen[slot]] += value(slot);
    return;
  }
  float kept = 0.0f, along = 0.0f;
  for (int64_t slot = 0; slot < rule.top_k && chosen[slot] >= 0; ++slot) {
    const int64_t e = chosen[slot];
    kept += p[e];
    along += (h[e] + value(slot)) * g[e];
  }
  for (int64_t slot = 0; slot < rule.top_k && chosen[slot] >= 0; ++slot) {
    const float through = h[chosen[slot]] + value(slot);
    d[chosen[slot]] += rule.renormalize ? (through - along) / kept : through;
  }
}

// What rows are given for their gradient: null where none came.
struct Slopes {
  const float *gates, *values, *logits, *probs;
  Rows<float> planes;
};

// What rows keep from their forward pass.
struct Kept {
  const float *gates, *logits, *probs;
  const int32_t* indices;
  const uint8_t* counted;
};

// A row [count], or zeros.
MLLMCL_INLINE void copy_row(const float* from, int64_t at, int64_t count, float* to) {
  if (from == nullptr) std::fill(to, to + count, 0.0f);
  else std::copy(from + at, from + at + count, to);
}

// Gradient of rows begin..end; `room` is [4, E].
MLLMCL_CLONES void backward_rows(const Slopes& from, const Kept& kept, const Row& rule, int64_t routers, int64_t begin,
                                 int64_t end, float scale, float* room, float* out) {
  const int64_t experts = rule.experts;
  float *h = room, *d = h + experts, *x = d + experts, *logs = x + experts;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = r * experts, t = r / routers;
    const float* p = kept.probs + at;
    copy_row(from.gates, at, experts, h);
    copy_row(from.probs, at, experts, d);
    copy_row(from.logits, at, experts, x);
    if (from.planes.data != nullptr && (kept.counted == nullptr || kept.counted[t])) {
      const float* d_plane = from.planes[t / kPlaneRows] + (r - t * routers) * plane_width(experts);
      add_slopes(d_plane, kept.logits + at, p, experts, logs, h, d, x);
    }
    const float* from_values = from.values == nullptr ? nullptr : from.values + r * rule.top_k;
    through_gates(h, from_values, p, kept.gates + at, kept.indices + r * rule.top_k, rule, d);
    through_scores(d, p, x, experts, rule.score, scale, out + at);
  }
}

// Gradient of the logits; the formula is in ops/route/README.md.
void router_backward(std::optional<Tensor> d_gates, std::optional<Tensor> d_values, std::optional<Tensor> d_logits,
                     std::optional<Tensor> d_probs, std::optional<Tensor> d_planes, Tensor gates, Tensor indices,
                     Tensor logits, Tensor probs, std::optional<Tensor> counted, int64_t routers, int64_t score,
                     bool renormalize, bool straight, double inverse_temperature, Tensor d_scores) {
  need(gates.dim() == 2 && indices.dim() == 2 && routers >= 1, "gates must be [T, L * E], indices [T, L * k]");
  need(gates.size(1) % routers == 0 && indices.size(1) % routers == 0, "routers are of the same size");
  const int64_t tokens = gates.size(0), experts = gates.size(1) / routers, top_k = indices.size(1) / routers;
  const int64_t rows = tokens * routers, count = rows * experts;
  const Row rule{experts, top_k, score, renormalize, straight};
  Slopes from{numbers(d_gates, count, "d_gates must be float32 [T, L * E]"),
              numbers(d_values, rows * top_k, "d_values must be float32 [T, L * k]"),
              numbers(d_logits, count, "d_logits must be float32 [T, L * E]"),
              numbers(d_probs, count, "d_probs must be float32 [T, L * E]"), {nullptr, 0}};
  if (d_planes.has_value())
    from.planes = rows_of<float>(*d_planes, Dtype::Float, num_planes(tokens), routers * plane_width(experts),
                                 "d_planes must be float32 [P, L * (3 E + 3)]");
  need(indices.is_contiguous() && indices.scalar_type() == Dtype::Int && indices.size(0) == tokens,
       "indices must be contiguous int32");
  const auto* index = static_cast<const int32_t*>(indices.const_data_ptr());
  for (int64_t i = 0; i < rows * top_k; ++i) need(index[i] >= -1 && index[i] < experts, "an index is out of range");
  const Kept kept{numbers(gates, count, "gates must be float32 [T, L * E]"),
                  numbers(logits, count, "logits must be float32 [T, L * E]"),
                  numbers(probs, count, "probs must be float32 [T, L * E]"), index, mask_of(counted, tokens)};
  float* out = floats(d_scores, count, "d_scores must be float32 [T, L * E]");
  const float scale = static_cast<float>(inverse_temperature);
  torch::stable::parallel_for(0, rows, grain(8 * experts), [&](int64_t begin, int64_t end) {
    std::vector<float> room(4 * experts);
    backward_rows(from, kept, rule, routers, begin, end, scale, room.data(), out);
  });
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CPU, m) {
  m.impl("router_gates", TORCH_BOX(&mllmcl::router_gates));
  m.impl("router_backward", TORCH_BOX(&mllmcl::router_backward));
}
