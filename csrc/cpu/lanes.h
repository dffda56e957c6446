// Eight floats at a time, in whatever registers the clone's instruction set has.
#pragma once

#include <cstdint>

#if defined(__GNUC__)
#define MLLMCL_INLINE inline __attribute__((always_inline))
#else
#define MLLMCL_INLINE inline
#endif

namespace mllmcl {
namespace {

constexpr int64_t kLanes = 8;
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

MLLMCL_INLINE Lanes& lanes(float* at) { return *reinterpret_cast<Lanes*>(at); }
MLLMCL_INLINE const Lanes& lanes(const float* at) { return *reinterpret_cast<const Lanes*>(at); }

MLLMCL_INLINE float total(const Lanes& x) {
  return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MLLMCL_SHUFFLES
#endif
#endif

// Rows become columns.
MLLMCL_INLINE void transpose(Lanes (&x)[kLanes]) {
#ifdef MLLMCL_SHUFFLES
  Lanes y[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 2) {
    y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i = i % 4 == 1 ? i + 3 : i + 1) {
    x[i] = __builtin_shufflevector(y[i], y[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    x[i + 2] = __builtin_shufflevector(y[i], y[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 2; ++i) {
    y[i] = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    y[i + 4] = __builtin_shufflevector(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; ++i) x[i] = y[i];
#else
  float flat[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) flat[j][i] = x[i][j];
  for (int i = 0; i < kLanes; ++i) x[i] = lanes(flat[i]);
#endif
}

}  // namespace
}  // namespace mllmcl
