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

}  // namespace
}  // namespace mllmcl
