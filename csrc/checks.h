// What the CPU kernels share: dtypes, rows in float32, run-time instruction sets, and the checks that memory safety needs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

// One build runs everywhere: the loader picks the clone that the processor has. MLLMCL_BASELINE builds none.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(MLLMCL_BASELINE)
#define MLLMCL_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define MLLMCL_CLONES
#endif

namespace mllmcl {

using torch::stable::Tensor;
using Dtype = torch::headeronly::ScalarType;

// Python checks in words; this only keeps a wrong direct call away from memory.
inline void need(bool condition, const char* what) {
  STD_TORCH_CHECK(condition, "mllmcl_cpu: ", what);
}

inline bool is_row_dtype(Dtype dtype) {
  return dtype == Dtype::Float || dtype == Dtype::BFloat16 || dtype == Dtype::Half;
}

inline int64_t dtype_size(Dtype dtype) { return dtype == Dtype::Float ? 4 : 2; }

// `count` numbers of `source` as float32: the memory itself where it is float32, else converted into `buffer`.
inline const float* load_row(const void* source, Dtype dtype, int64_t start, int64_t count, float* buffer) {
  if (dtype == Dtype::Float) return static_cast<const float*>(source) + start;
  if (dtype == Dtype::BFloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(source) + start;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      std::memcpy(buffer + i, &bits, 4);
    }
    return buffer;
  }
  const auto* from = static_cast<const torch::headeronly::Half*>(source) + start;
  for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<float>(from[i]);
  return buffer;
}

// Where a row of results is written: the memory itself for float32, else `buffer`, which `store_row` then converts.
inline float* open_row(void* target, Dtype dtype, int64_t start, float* buffer) {
  return dtype == Dtype::Float ? static_cast<float*>(target) + start : buffer;
}

inline void store_row(void* target, Dtype dtype, int64_t start, int64_t count, const float* buffer) {
  if (dtype == Dtype::BFloat16) {
    auto* to = static_cast<torch::headeronly::BFloat16*>(target) + start;
    for (int64_t i = 0; i < count; ++i) to[i] = torch::headeronly::BFloat16(buffer[i]);
  } else if (dtype == Dtype::Half) {
    auto* to = static_cast<torch::headeronly::Half*>(target) + start;
    for (int64_t i = 0; i < count; ++i) to[i] = torch::headeronly::Half(buffer[i]);
  }
}

// Rows of work for one call of a parallel loop: about 16k numbers.
inline int64_t grain(int64_t row_length) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, row_length)); }

}  // namespace mllmcl
