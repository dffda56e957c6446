// What the kernels of routers do with a row: its sum, its largest number, and exponentials and logarithms that a compiler
// can vectorise, to about 2 units in the last place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../checks.h"
#include "lanes.h"

namespace mllmcl {
namespace {

// e^x of numbers or -inf (Cody and Waite's reduction, a polynomial of degree 7); infinity counts as 88, NaN stays
MLLMCL_INLINE float exponential(float x) {
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

// log x of positive normal numbers: x = 2^n m with m in [sqrt 1/2, sqrt 2), a polynomial of degree 8 in m - 1
MLLMCL_INLINE float logarithm(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  const int32_t n = (bits - 0x3f3504f3) >> 23;
  bits -= n << 23;
  float m;
  std::memcpy(&m, &bits, 4);
  const float r = m - 1.0f, square = r * r, power = static_cast<float>(n);
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const float tail = (r * square * p - power * 2.12194440e-4f) - 0.5f * square;
  return (r + tail) + power * 0.693359375f;
}

// The largest of the numbers; `trace` becomes 0 where all are finite, else NaN.
MLLMCL_INLINE float largest_of(const float* x, int64_t count, float* trace) {
  const float low = -std::numeric_limits<float>::infinity();
  Lanes tops = low - Lanes{}, traces = {};
  int64_t e = 0;
  for (; e + kLanes <= count; e += kLanes) {
    const Lanes from = lanes(x + e);
    tops = from > tops ? from : tops;
    traces += 0.0f * from;
  }
  float top = low;
  *trace = total(traces);
  for (int64_t lane = 0; lane < kLanes; ++lane) top = std::max(top, tops[lane]);
  for (; e < count; ++e) {
    top = x[e] > top ? x[e] : top;
    *trace += 0.0f * x[e];
  }
  return top;
}

MLLMCL_INLINE float sum_of(const float* x, int64_t count) {
  Lanes sums = {};
  int64_t e = 0;
  for (; e + kLanes <= count; e += kLanes) sums += lanes(x + e);
  float all = total(sums);
  for (; e < count; ++e) all += x[e];
  return all;
}

}  // namespace
}  // namespace mllmcl
