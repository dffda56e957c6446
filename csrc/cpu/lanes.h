// Eight floats at a time, in whatever registers the clone's instruction set has.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__GNUC__)
#define MLLMCL_INLINE inline __attribute__((always_inline))
#else
#define MLLMCL_INLINE inline
#endif

namespace mllmcl {
namespace {

constexpr int64_t kLanes = 8;
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// sixteen, where they fit one register
typedef float Wide __attribute__((vector_size(8 * kLanes), aligned(4), may_alias));

// A function made for each instruction set, which may look at `kRegisters`, the number of its vector registers: 32 are
// of sixteen floats. The loader picks as it does for MLLMCL_CLONES.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(MLLMCL_BASELINE)
#define MLLMCL_VERSION(machine, registers, head, ...) \
  __attribute__((target(machine), noinline)) head {   \
    constexpr int kRegisters = registers;             \
    __VA_ARGS__                                       \
  }
#define MLLMCL_BY_REGISTERS(head, ...)                       \
  MLLMCL_VERSION("default", 16, head, __VA_ARGS__)           \
  MLLMCL_VERSION("arch=x86-64-v3", 16, head, __VA_ARGS__)    \
  MLLMCL_VERSION("arch=x86-64-v4", 32, head, __VA_ARGS__)
#else
#define MLLMCL_BY_REGISTERS(head, ...) \
  head {                               \
    constexpr int kRegisters = 16;     \
    __VA_ARGS__                        \
  }
#endif

// Vectors by name: a template argument would lose the alignment.
struct Eight {
  typedef Lanes Vector;
  static constexpr int64_t kSize = kLanes;
};
struct Sixteen {
  typedef Wide Vector;
  static constexpr int64_t kSize = 2 * kLanes;
};
template <int R>
using Widest = std::conditional_t<R == 32, Sixteen, Eight>;

template <class V>
MLLMCL_INLINE typename V::Vector& as(float* at) {
  return *reinterpret_cast<typename V::Vector*>(at);
}
template <class V>
MLLMCL_INLINE const typename V::Vector& as(const float* at) {
  return *reinterpret_cast<const typename V::Vector*>(at);
}

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

// Eight of a vector's lanes, from lane `at` on.
MLLMCL_INLINE void eight_of(const Lanes& x, int64_t, Lanes& out) { out = x; }
MLLMCL_INLINE void eight_of(const Wide& x, int64_t at, Lanes& out) {
#ifdef MLLMCL_SHUFFLES
  if (at == 0) out = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
  else out = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  for (int64_t i = 0; i < kLanes; ++i) out[i] = x[at + i];
#endif
}

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
