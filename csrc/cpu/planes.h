// Sums of a routing's tables over blocks of rows, and their gradient: what a router's own pass and the one over given
// tables share. Formulas in ops/routing_planes/README.md.
#pragma once

#include <cmath>

#include "rows.h"

namespace mllmcl {
namespace {

constexpr int64_t kPlaneRows = 16;  // as PLANE_ROWS in ops/routing_planes/reference.py
constexpr float kTiny = std::numeric_limits<float>::min();

inline int64_t num_planes(int64_t tokens) { return (tokens + kPlaneRows - 1) / kPlaneRows; }
inline int64_t plane_width(int64_t experts) { return 3 * experts + 3; }

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

inline const uint8_t* mask_of(const std::optional<Tensor>& mask, int64_t tokens) {
  if (!mask.has_value()) return nullptr;
  need(mask->is_contiguous() && mask->scalar_type() == Dtype::Byte && mask->numel() == tokens, "mask must be uint8 [T]");
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

inline const float* numbers(const Tensor& from, int64_t count, const char* what) {
  need(from.is_contiguous() && from.scalar_type() == Dtype::Float && from.numel() == count, what);
  return static_cast<const float*>(from.const_data_ptr());
}

inline const float* numbers(const std::optional<Tensor>& from, int64_t count, const char* what) {
  return from.has_value() ? numbers(*from, count, what) : nullptr;
}

inline float* floats(Tensor& out, int64_t count, const char* what) {
  return const_cast<float*>(numbers(out, count, what));
}

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

// The tables of one router; the mask tells which tokens count, null where all do.
struct Tables {
  Rows<float> logits, probs, gates;
  Rows<int32_t> indices;
  const uint8_t* mask;
  int64_t tokens, experts, top_k;
};

// The plane of rows begin..end; `known` holds log sum e^logits of these rows, NaN or no array where it is not known.
// False where an index is out of range.
MLLMCL_INLINE bool sum_rows(const Tables& from, int64_t begin, int64_t end, const float* known, float* room,
                            float* plane) {
  const int64_t experts = from.experts;
  std::fill(plane, plane + 3 * experts, 0.0f);
  double squares = 0.0, entropy = 0.0;
  int64_t tokens = 0;
  bool sound = true;
  for (int64_t t = begin; t < end; ++t) {
    if (from.mask != nullptr && !from.mask[t]) continue;
    const int32_t* slots = from.indices[t];
    for (int64_t slot = 0; slot < from.top_k; ++slot) {
      if (slots[slot] < 0) continue;
      if (slots[slot] < experts) plane[slots[slot]] += 1.0f;
      else sound = false;
    }
    add_row(from.gates[t], experts, plane + experts);
    add_row(from.probs[t], experts, plane + 2 * experts);
    float mass;
    double lse = known == nullptr ? NAN : known[t - begin];
    if (std::isnan(lse)) lse = log_sum(from.logits[t], experts, room, &mass);
    squares += lse * lse;
    entropy -= negative_entropy(from.probs[t], experts, room);
    ++tokens;
  }
  float* singles = plane + 3 * experts;
  singles[0] = static_cast<float>(squares);
  singles[1] = static_cast<float>(entropy);
  singles[2] = static_cast<float>(tokens);
  return sound;
}

// out += factor lse e^(x - lse)
MLLMCL_INLINE void add_squares(const float* x, int64_t count, float factor, float* room, float* out) {
  float mass;
  const float lse = log_sum(x, count, room, &mass);
  if (!std::isfinite(lse)) {
    for (int64_t e = 0; e < count; ++e) out[e] += factor * lse * std::exp(x[e] - lse);
    return;
  }
  const float scale = factor * lse / mass;
  for (int64_t e = 0; e < count; ++e) out[e] += scale * room[e];
}

// out -= factor times the gradient of sum q log q; below the clamp none passes through the logarithm
MLLMCL_INLINE void add_entropy(const float* p, int64_t count, float factor, float* room, float* out) {
  const float mass = mass_of(p, count);
  for (int64_t e = 0; e < count; ++e) {
    const float q = p[e] / mass;
    room[e] = logarithm(q > kTiny ? q : kTiny) + (q < kTiny ? 0.0f : 1.0f);
  }
  const float middle = mean(p, mass, room, count), scale = factor / mass;
  for (int64_t e = 0; e < count; ++e) out[e] -= scale * (room[e] - middle);
}

// What a row's gates, probabilities and logits get from the gradient of its plane; nothing from a zero.
MLLMCL_INLINE void add_slopes(const float* d_plane, const float* x, const float* p, int64_t count, float* room,
                              float* gates, float* probs, float* logits) {
  const float squares = d_plane[3 * count], entropy = d_plane[3 * count + 1];
  add_row(d_plane + count, count, gates);
  add_row(d_plane + 2 * count, count, probs);
  if (squares != 0.0f) add_squares(x, count, 2.0f * squares, room, logits);
  if (entropy != 0.0f) add_entropy(p, count, entropy, room, probs);
}

}  // namespace
}  // namespace mllmcl
