// What the CUDA kernels share: dtypes, the current stream, and the checks that memory safety needs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

namespace mllmcl {

using torch::stable::Tensor;
using Dtype = torch::headeronly::ScalarType;

inline void need(bool condition, const char* what) { STD_TORCH_CHECK(condition, "mllmcl_cuda: ", what); }

// launches go to the current device: while one of these lives, that is the tensor's
struct OnDeviceOf : torch::stable::accelerator::DeviceGuard {
  explicit OnDeviceOf(const Tensor& tensor) : DeviceGuard(tensor.get_device_index()) {}
};

// the stream that torch works on, on the tensor's device
inline cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  need(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0, "no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void launched() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "mllmcl_cuda: ", cudaGetErrorString(error));
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline void from_float(float value, float* out) { *out = value; }
__device__ inline void from_float(float value, __nv_bfloat16* out) { *out = __float2bfloat16(value); }
__device__ inline void from_float(float value, __half* out) { *out = __float2half(value); }

// four numbers that lie together, in one load or store
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

}  // namespace mllmcl
