// AdamW and gradient masking over a list of tensors in one launch, touching only what the masks allow.
//
// A table on the device describes the tensors, another one the chunks of work; a block owns a chunk. A thread looks at
// the mask of its four numbers before it loads any of them, so a frozen row costs its mask and nothing else.

#include "device.cuh"

namespace mllmcl {
namespace {

// how a mask is read; -2 is one byte for each number, and 0 or more the dimension whose rows it selects
constexpr int64_t kNone = -3, kOwner = -1;
constexpr int kThreads = 256;

// one row of the tensor table; the Python side writes it as int64 [n, 10]
struct Entry {
  int64_t param, grad, mean, square, mask, kind, active, inner, rows, numel;
};
static_assert(sizeof(Entry) == 80, "the table is int64 [n, 10]");

struct Chunk {
  int64_t tensor, start;
};

struct Adam {
  float rate_decay, beta1, rest1, beta2, rest2, eps, step_size, inverse_root, scale;
};

struct Numbers {
  const double *step, *lr, *scale;  // on the device, or null: then the value beside
  double step_value, lr_value, scale_value, beta1, beta2, eps, weight_decay;
  bool on_host;  // all three are values, so that the host could compute what a step needs
  Adam ready;
};

__host__ __device__ inline Adam constants(const Numbers& n) {
  const double step = n.step ? *n.step : n.step_value, rate = n.lr ? *n.lr : n.lr_value;
  const double scale = n.scale ? *n.scale : n.scale_value;
  // 1 - beta is taken in double: in float32 it would be off by 5e-5 for 0.999
  return {static_cast<float>(1.0 - rate * n.weight_decay), static_cast<float>(n.beta1),
          static_cast<float>(1.0 - n.beta1), static_cast<float>(n.beta2), static_cast<float>(1.0 - n.beta2),
          static_cast<float>(n.eps), static_cast<float>(rate / (1.0 - pow(n.beta1, step))),
          static_cast<float>(1.0 / sqrt(1.0 - pow(n.beta2, step))), static_cast<float>(scale)};
}

// the entry's mask row of number `at`; a division of 64 bits costs more than the memory it waits for
__device__ int64_t row_of(const Entry& e, int64_t at) {
  if (e.numel >= (int64_t{1} << 32)) return at / e.inner % e.rows;
  return static_cast<uint32_t>(at) / static_cast<uint32_t>(e.inner) % static_cast<uint32_t>(e.rows);
}

// which of the four numbers from `at` on may change, as bits
__device__ unsigned kept(const Entry& e, int64_t at, int count) {
  if (e.kind == kNone) return (1u << count) - 1u;
  const auto* mask = reinterpret_cast<const uint8_t*>(e.mask);
  // `at` is a multiple of four, so that the four lie in one row where the rows' length is
  if (e.kind >= 0 && e.inner % 4 == 0) return mask[row_of(e, at)] != 0 ? (1u << count) - 1u : 0u;
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= count) break;
    const uint8_t value = mask[e.kind < 0 ? at + i : row_of(e, at + i)];
    const bool keep = e.kind == kOwner ? value == static_cast<uint8_t>(e.active) : value != 0;
    bits |= static_cast<unsigned>(keep) << i;
  }
  return bits;
}

// Whether the mask forbids all of [from, to): told for stretches of a few rows, where a block asks it once. An expert's
// rows of A come by the thousand, and nothing of a frozen one is computed or loaded.
__device__ bool frozen(const Entry& e, int64_t from, int64_t to) {
  constexpr int64_t kFewRows = 8;
  if (e.kind < 0 || (to - from) / e.inner >= kFewRows) return false;
  const auto* mask = reinterpret_cast<const uint8_t*>(e.mask);
  const int64_t last = (to - 1) / e.inner;
  for (int64_t row = from / e.inner; row <= last; ++row)
    if (mask[row % e.rows] != 0) return false;
  return true;
}

// registers have no addresses: every index below is a constant once the loops are unrolled
template <class T>
__device__ void load_four(const T* from, int count, float* out) {
  if (count == 4 && reinterpret_cast<uintptr_t>(from) % sizeof(Four<T>) == 0) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = to_float(four.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

template <class T>
__device__ void store_four(T* to, unsigned bits, const float* values) {
  if (bits == 15u && reinterpret_cast<uintptr_t>(to) % sizeof(Four<T>) == 0) {
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) from_float(values[i], &four.value[i]);
    *reinterpret_cast<Four<T>*>(to) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (bits >> i & 1u) from_float(values[i], to + i);
  }
}

template <class P, class M>
__global__ void __launch_bounds__(kThreads) masked_adamw_kernel(const Entry* entries, const Chunk* chunks,
                                                                int64_t chunk_size, Numbers numbers) {
  const Chunk chunk = chunks[blockIdx.x];
  const Entry e = entries[chunk.tensor];
  const int64_t end = min(chunk.start + chunk_size, e.numel);
  if (frozen(e, chunk.start, end)) return;
  // where numbers lie on the device, one thread does the double precision of the whole block
  __shared__ Adam shared;
  if (!numbers.on_host) {
    if (threadIdx.x == 0) shared = constants(numbers);
    __syncthreads();
  }
  const Adam a = numbers.on_host ? numbers.ready : shared;
  for (int64_t at = chunk.start + 4 * threadIdx.x; at < end; at += 4 * kThreads) {
    const int count = static_cast<int>(min(static_cast<int64_t>(4), end - at));
    const unsigned bits = kept(e, at, count);
    if (bits == 0) continue;
    P* param = reinterpret_cast<P*>(e.param) + at;
    M* mean = reinterpret_cast<M*>(e.mean) + at;
    M* square = reinterpret_cast<M*>(e.square) + at;
    float p[4], g[4], m[4], v[4];
    load_four(param, count, p);
    load_four(reinterpret_cast<const P*>(e.grad) + at, count, g);
    load_four(mean, count, m);
    load_four(square, count, v);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float grad = g[i] * a.scale;
      m[i] = m[i] * a.beta1 + grad * a.rest1;
      v[i] = v[i] * a.beta2 + grad * grad * a.rest2;
      p[i] = p[i] * a.rate_decay - a.step_size * m[i] / (sqrtf(v[i]) * a.inverse_root + a.eps);
    }
    store_four(param, bits, p);
    store_four(mean, bits, m);
    store_four(square, bits, v);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) mask_grads_kernel(const Entry* entries, const Chunk* chunks,
                                                              int64_t chunk_size) {
  const Chunk chunk = chunks[blockIdx.x];
  const Entry e = entries[chunk.tensor];
  const int64_t end = min(chunk.start + chunk_size, e.numel);
  const float zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int64_t at = chunk.start + 4 * threadIdx.x; at < end; at += 4 * kThreads) {
    const int count = static_cast<int>(min(static_cast<int64_t>(4), end - at));
    const unsigned drop = ((1u << count) - 1u) & ~kept(e, at, count);
    if (drop != 0) store_four(reinterpret_cast<T*>(e.grad) + at, drop, zeros);
  }
}

void check_tables(const Tensor& entries, const Tensor& chunks) {
  need(entries.is_cuda() && chunks.is_cuda(), "tables must be on the device");
  need(entries.is_contiguous() && entries.scalar_type() == Dtype::Long && entries.size(1) == 10, "entries: int64 [n, 10]");
  need(chunks.is_contiguous() && chunks.scalar_type() == Dtype::Long && chunks.size(1) == 2, "chunks: int64 [c, 2]");
}

const double* device_number(const std::optional<Tensor>& number) {
  if (!number.has_value()) return nullptr;
  need(number->is_cuda() && number->numel() == 1 && number->scalar_type() == Dtype::Double, "numbers: one float64");
  return static_cast<const double*>(number->const_data_ptr());
}

template <class P, class M>
void launch_adamw(const Tensor& entries, const Tensor& chunks, int64_t chunk_size, const Numbers& numbers) {
  const auto* table = static_cast<const Entry*>(entries.const_data_ptr());
  const auto* work = static_cast<const Chunk*>(chunks.const_data_ptr());
  masked_adamw_kernel<P, M><<<chunks.size(0), kThreads, 0, stream_of(entries)>>>(table, work, chunk_size, numbers);
  launched();
}

// dtypes: 0 float32, 1 bfloat16, 2 float16
void masked_adamw(Tensor entries, Tensor chunks, int64_t chunk_size, int64_t param_dtype, bool wide_moments,
                  std::optional<Tensor> step, std::optional<Tensor> lr, std::optional<Tensor> scale, double step_value,
                  double lr_value, double scale_value, double beta1, double beta2, double eps, double weight_decay) {
  check_tables(entries, chunks);
  need(chunk_size > 0 && chunk_size % 4 == 0, "chunk_size must be a multiple of 4");
  if (chunks.size(0) == 0) return;
  const OnDeviceOf device(entries);
  Numbers numbers{device_number(step), device_number(lr), device_number(scale), step_value, lr_value, scale_value,
                  beta1, beta2, eps, weight_decay, !step && !lr && !scale, {}};
  if (numbers.on_host) numbers.ready = constants(numbers);
  if (param_dtype == 0) launch_adamw<float, float>(entries, chunks, chunk_size, numbers);
  else if (param_dtype == 1 && wide_moments) launch_adamw<__nv_bfloat16, float>(entries, chunks, chunk_size, numbers);
  else if (param_dtype == 1) launch_adamw<__nv_bfloat16, __nv_bfloat16>(entries, chunks, chunk_size, numbers);
  else if (param_dtype == 2 && wide_moments) launch_adamw<__half, float>(entries, chunks, chunk_size, numbers);
  else if (param_dtype == 2) launch_adamw<__half, __half>(entries, chunks, chunk_size, numbers);
  else need(false, "param_dtype must be 0, 1 or 2");
}

void mask_grads(Tensor entries, Tensor chunks, int64_t chunk_size, int64_t dtype) {
  check_tables(entries, chunks);
  need(chunk_size > 0 && chunk_size % 4 == 0, "chunk_size must be a multiple of 4");
  if (chunks.size(0) == 0) return;
  const OnDeviceOf device(entries);
  const auto* table = static_cast<const Entry*>(entries.const_data_ptr());
  const auto* work = static_cast<const Chunk*>(chunks.const_data_ptr());
  const cudaStream_t stream = stream_of(entries);
  const auto blocks = static_cast<unsigned>(chunks.size(0));
  if (dtype == 0) mask_grads_kernel<float><<<blocks, kThreads, 0, stream>>>(table, work, chunk_size);
  else if (dtype == 1) mask_grads_kernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(table, work, chunk_size);
  else if (dtype == 2) mask_grads_kernel<__half><<<blocks, kThreads, 0, stream>>>(table, work, chunk_size);
  else need(false, "dtype must be 0, 1 or 2");
  launched();
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cuda, CUDA, m) {
  m.impl("masked_adamw", TORCH_BOX(&mllmcl::masked_adamw));
  m.impl("mask_grads", TORCH_BOX(&mllmcl::mask_grads));
}
