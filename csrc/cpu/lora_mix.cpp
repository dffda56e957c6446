// Rank space of lora_mix: gates on [T, R], their gradient, and dropout as a function of (seed, row, column).
// T tokens, R sum of ranks, E experts, G rows of gates (T is a multiple of G), K width of x.

#include <algorithm>
#include <cmath>

#include "../checks.h"
#include "few_rows.h"

namespace mllmcl {
namespace {

constexpr int64_t kBlock = 256;  // tokens of one partial sum: the same for any number of threads

// The gate of every rank: a row of [R] factors from one row of gates.
struct Gates {
  const float* values = nullptr;   // [G, E]
  const int64_t* ids = nullptr;    // [G]
  const int64_t* starts = nullptr; // [E + 1], first rank of each expert
  const float* scaling = nullptr;  // [E]
  int64_t experts = 0;
  int64_t rows_per_gate = 1;

  void factors(int64_t token, float* out) const {
    const int64_t row = token / rows_per_gate;
    for (int64_t e = 0; e < experts; ++e) {
      float factor = scaling[e];
      if (values != nullptr) factor *= values[row * experts + e];
      if (ids != nullptr && ids[row] != e) factor = 0.0f;
      for (int64_t j = starts[e]; j < starts[e + 1]; ++j) out[j] = factor;
    }
  }
  bool same_as_before(int64_t token) const {
    return (values == nullptr && ids == nullptr) || token % rows_per_gate != 0;
  }
};

Gates read_gates(const std::optional<Tensor>& gates, const Tensor& starts, const Tensor& scaling, int64_t tokens,
                 int64_t ranks) {
  Gates found;
  need(starts.is_contiguous() && starts.scalar_type() == Dtype::Long, "starts must be contiguous int64");
  need(scaling.is_contiguous() && scaling.scalar_type() == Dtype::Float, "scaling must be contiguous float32");
  found.experts = scaling.numel();
  need(starts.numel() == found.experts + 1, "starts must have one entry more than scaling");
  found.starts = static_cast<const int64_t*>(starts.const_data_ptr());
  found.scaling = static_cast<const float*>(scaling.const_data_ptr());
  need(found.starts[0] == 0 && found.starts[found.experts] == ranks, "starts must run from 0 to R");
  for (int64_t e = 0; e < found.experts; ++e) need(found.starts[e] <= found.starts[e + 1], "starts must not fall");
  if (!gates.has_value()) return found;
  need(gates->is_contiguous(), "gates must be contiguous");
  const bool soft = gates->scalar_type() == Dtype::Float;
  need(soft || gates->scalar_type() == Dtype::Long, "gates must be float32 or int64");
  const int64_t rows = soft ? gates->numel() / std::max<int64_t>(1, found.experts) : gates->numel();
  need(!soft || gates->numel() == rows * found.experts, "gates must be [G, E]");
  need(tokens == 0 || (rows > 0 && tokens % rows == 0), "T must be a multiple of G");
  found.rows_per_gate = rows > 0 ? std::max<int64_t>(1, tokens / rows) : 1;
  if (soft) found.values = static_cast<const float*>(gates->const_data_ptr());
  else found.ids = static_cast<const int64_t*>(gates->const_data_ptr());
  return found;
}

MLLMCL_CLONES void multiply(const float* a, const float* b, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = a[i] * b[i];
}

MLLMCL_CLONES void multiply_two(const float* u, const float* s, const float* f, float* ds, float* mixed, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float factor = f[i];
    ds[i] = u[i] * factor;
    mixed[i] = s[i] * factor;
  }
}

MLLMCL_CLONES float dot(const float* a, const float* b, int64_t count) {
  float lanes[16] = {0.0f};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int64_t l = 0; l < 16; ++l) lanes[l] += a[i + l] * b[i + l];
  float total = 0.0f;
  for (int64_t l = 0; l < 16; ++l) total += lanes[l];
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

void check_rows(const Tensor& t, int64_t tokens, int64_t width, Dtype dtype, const char* what) {
  need(t.is_contiguous() && t.numel() == tokens * width && t.scalar_type() == dtype, what);
}

// mixed = s * factor of every rank, in float32
void mix(const Gates& rule, const float* s, int64_t tokens, int64_t ranks, float* mixed) {
  std::vector<float> factor(ranks);
  for (int64_t t = 0; t < tokens; ++t) {
    if (t == 0 || !rule.same_as_before(t)) rule.factors(t, factor.data());
    multiply(s + t * ranks, factor.data(), mixed + t * ranks, ranks);
  }
}

const float* matrix(const Tensor& t, int64_t rows, int64_t columns, const char* what) {
  check_rows(t, rows, columns, Dtype::Float, what);
  return static_cast<const float*>(t.const_data_ptr());
}

Tensor in_a_row(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

std::optional<Tensor> in_a_row(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(in_a_row(*t)) : t;
}

// The whole forward of few tokens: y = x W^T + bias + (s * factor) B^T and s = x_dropped A^T
void mix_few(Tensor x, Tensor dropped, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b,
             std::optional<Tensor> gates, Tensor starts, Tensor scaling, Tensor s, Tensor y) {
  need(x.dim() == 2 && weight.dim() == 2 && lora_a.dim() == 2, "x, weight and lora_a must be matrices");
  const int64_t tokens = x.size(0), width = x.size(1), out = weight.size(0), ranks = lora_a.size(0);
  // B by columns is B^T by rows
  const bool by_columns = lora_b.dim() == 2 && lora_b.size(0) == out && lora_b.size(1) == ranks &&
                          lora_b.stride(0) == 1 && lora_b.stride(1) == out && ranks > 1;
  for (Tensor* t : {&x, &dropped, &weight, &lora_a}) *t = in_a_row(*t);
  if (!by_columns) lora_b = in_a_row(lora_b);
  bias = in_a_row(bias);
  gates = in_a_row(gates);
  const Gates rule = read_gates(gates, starts, scaling, tokens, ranks);
  matrix(s, tokens, ranks, "s must be contiguous float32 [T, R]");
  matrix(y, tokens, out, "y must be contiguous float32 [T, N]");
  auto *to_s = static_cast<float*>(s.mutable_data_ptr()), *to_y = static_cast<float*>(y.mutable_data_ptr());
  const Factors shrink{matrix(dropped, tokens, width, "dropped must be float32 [T, K]"),
                       matrix(lora_a, ranks, width, "lora_a must be float32 [R, K]"), width};
  const Factors base{matrix(x, tokens, width, "x must be float32 [T, K]"),
                     matrix(weight, out, width, "weight must be float32 [N, K]"), width};
  need(lora_b.numel() == out * ranks && lora_b.scalar_type() == Dtype::Float, "lora_b must be float32 [N, R]");
  const float* b = static_cast<const float*>(lora_b.const_data_ptr());
  const float* add = bias.has_value() ? matrix(*bias, 1, out, "bias must be float32 [N]") : nullptr;
  few_rows_product(&shrink, 1, nullptr, tokens, ranks, to_s);
  std::vector<float> mixed(tokens * ranks);
  mix(rule, to_s, tokens, ranks, mixed.data());
  const Factors pairs[] = {base, {mixed.data(), b, ranks}};
  if (by_columns) few_rows_product(pairs, 1, add, tokens, out, to_y, pairs + 1);
  else few_rows_product(pairs, 2, add, tokens, out, to_y);
}

// mixed = s * factor
void rank_gate(Tensor s, std::optional<Tensor> gates, Tensor starts, Tensor scaling, Tensor mixed) {
  need(s.dim() == 2 && is_row_dtype(s.scalar_type()), "s must be [T, R] in float32, bfloat16 or float16");
  const int64_t tokens = s.size(0), ranks = s.size(1);
  const Dtype dtype = s.scalar_type();
  check_rows(s, tokens, ranks, dtype, "s must be contiguous");
  check_rows(mixed, tokens, ranks, dtype, "mixed must be like s");
  const Gates rule = read_gates(gates, starts, scaling, tokens, ranks);
  const void* from = s.const_data_ptr();
  void* to = mixed.mutable_data_ptr();
  torch::stable::parallel_for(0, tokens, grain(ranks), [&](int64_t begin, int64_t end) {
    std::vector<float> memory(3 * ranks);
    float *factor = memory.data(), *in = factor + ranks, *out = in + ranks;
    for (int64_t t = begin; t < end; ++t) {
      if (t == begin || !rule.same_as_before(t)) rule.factors(t, factor);
      const float* row = load_row(from, dtype, t * ranks, ranks, in);
      multiply(row, factor, open_row(to, dtype, t * ranks, out), ranks);
      store_row(to, dtype, t * ranks, ranks, out);
    }
  });
}

// ds = u * factor, mixed = s * factor, and dgates[g, e] = scaling_e * sum over tokens of g and ranks of e of u * s; rows
// of ds may lie apart
void rank_gate_backward(Tensor u, Tensor s, std::optional<Tensor> gates, Tensor starts, Tensor scaling, Tensor ds,
                        Tensor mixed, Tensor dgates) {
  need(u.dim() == 2 && is_row_dtype(u.scalar_type()), "u must be [T, R] in float32, bfloat16 or float16");
  const int64_t tokens = u.size(0), ranks = u.size(1);
  const Dtype dtype = u.scalar_type();
  for (const Tensor* t : {&u, &s, &mixed}) check_rows(*t, tokens, ranks, dtype, "u, s, ds, mixed must be alike");
  need(ds.dim() == 2 && ds.size(0) == tokens && ds.size(1) == ranks && ds.scalar_type() == dtype &&
           (ds.stride(1) == 1 || ranks <= 1) && (ds.stride(0) >= ranks || tokens <= 1),
       "ds must be like u, rows any distance apart");
  const int64_t step = tokens > 1 ? ds.stride(0) : ranks;
  const Gates rule = read_gates(gates, starts, scaling, tokens, ranks);
  const bool wants = dgates.numel() > 0;
  const int64_t experts = rule.experts, span = rule.rows_per_gate, rows = tokens / span;
  if (wants) {
    need(rule.values != nullptr && dgates.scalar_type() == Dtype::Float && dgates.is_contiguous() &&
             dgates.numel() == rows * experts, "dgates must be float32 [G, E] beside soft gates");
  }
  const int64_t blocks = (span + kBlock - 1) / kBlock;
  std::vector<float> partial(wants && blocks > 1 ? rows * blocks * experts : 0);
  float* sums = wants ? static_cast<float*>(dgates.mutable_data_ptr()) : nullptr;
  float* target = partial.empty() ? sums : partial.data();
  const void *from_u = u.const_data_ptr(), *from_s = s.const_data_ptr();
  void *to_ds = ds.mutable_data_ptr(), *to_mixed = mixed.mutable_data_ptr();
  torch::stable::parallel_for(0, rows * blocks, grain(ranks * std::min(span, kBlock)), [&](int64_t begin, int64_t end) {
    std::vector<float> memory(5 * ranks);
    float *factor = memory.data(), *in_u = factor + ranks, *in_s = in_u + ranks, *out_a = in_s + ranks,
          *out_b = out_a + ranks;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = (item / blocks) * span + (item % blocks) * kBlock;
      const int64_t last = std::min(first + kBlock, (item / blocks + 1) * span);
      float* sum = wants ? target + item * experts : nullptr;
      for (int64_t e = 0; wants && e < experts; ++e) sum[e] = 0.0f;
      if (first < last) rule.factors(first, factor);
      for (int64_t t = first; t < last; ++t) {
        const float* row_u = load_row(from_u, dtype, t * ranks, ranks, in_u);
        const float* row_s = load_row(from_s, dtype, t * ranks, ranks, in_s);
        for (int64_t e = 0; wants && e < experts; ++e) {
          const int64_t a = rule.starts[e];
          sum[e] += rule.scaling[e] * dot(row_u + a, row_s + a, rule.starts[e + 1] - a);
        }
        multiply_two(row_u, row_s, factor, open_row(to_ds, dtype, t * step, out_a),
                     open_row(to_mixed, dtype, t * ranks, out_b), ranks);
        store_row(to_ds, dtype, t * step, ranks, out_a);
        store_row(to_mixed, dtype, t * ranks, ranks, out_b);
      }
    }
  });
  for (int64_t g = 0; !partial.empty() && g < rows; ++g) {
    for (int64_t e = 0; e < experts; ++e) {
      float total = 0.0f;
      for (int64_t b = 0; b < blocks; ++b) total += partial[(g * blocks + b) * experts + e];
      sums[g * experts + e] = total;
    }
  }
}

inline uint32_t mix_bits(uint32_t h) {
  h ^= h >> 16;
  h *= 0x85EBCA6Bu;
  h ^= h >> 13;
  h *= 0xC2B2AE35u;
  return h ^ (h >> 16);
}

// out = keep ? from * scale : 0, or out += that
MLLMCL_CLONES void drop_row(const float* from, float* out, int64_t count, uint32_t key, uint32_t high, uint32_t below,
                            float scale) {
  for (int64_t c = 0; c < count; ++c) {
    const uint32_t h = mix_bits(key ^ (static_cast<uint32_t>(c) * 0x85EBCA77u + high));
    out[c] = h >= below ? from[c] * scale : 0.0f;
  }
}

MLLMCL_CLONES void drop_row_add(const float* from, float* out, int64_t count, uint32_t key, uint32_t high,
                                uint32_t below, float scale) {
  for (int64_t c = 0; c < count; ++c) {
    const uint32_t h = mix_bits(key ^ (static_cast<uint32_t>(c) * 0x85EBCA77u + high));
    out[c] += h >= below ? from[c] * scale : 0.0f;
  }
}

// out = drop(x), or out += drop(x) where `add` is set
void dropout(Tensor x, Tensor seed, int64_t below, double scale, bool add, Tensor out) {
  need(x.dim() == 2 && is_row_dtype(x.scalar_type()), "x must be [T, K] in float32, bfloat16 or float16");
  const int64_t tokens = x.size(0), width = x.size(1);
  const Dtype dtype = x.scalar_type();
  check_rows(x, tokens, width, dtype, "x must be contiguous");
  check_rows(out, tokens, width, dtype, "out must be like x");
  need(seed.numel() == 1 && seed.scalar_type() == Dtype::Long, "seed must be one int64");
  const uint64_t value = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const uint32_t low = static_cast<uint32_t>(value), high = static_cast<uint32_t>(value >> 32);
  const void* from = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  torch::stable::parallel_for(0, tokens, grain(width), [&](int64_t begin, int64_t end) {
    std::vector<float> memory(dtype == Dtype::Float ? 0 : 2 * width);
    float *in = memory.data(), *buffer = in + width;
    for (int64_t t = begin; t < end; ++t) {
      const uint32_t key = mix_bits(static_cast<uint32_t>(t) * 0x9E3779B1u + low);
      const float* row = load_row(from, dtype, t * width, width, in);
      float* target = open_row(to, dtype, t * width, buffer);
      if (add) {
        if (dtype != Dtype::Float) load_row(to, dtype, t * width, width, buffer);
        drop_row_add(row, target, width, key, high, static_cast<uint32_t>(below), static_cast<float>(scale));
      } else {
        drop_row(row, target, width, key, high, static_cast<uint32_t>(below), static_cast<float>(scale));
      }
      store_row(to, dtype, t * width, width, buffer);
    }
  });
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CPU, m) {
  m.impl("mix_few", TORCH_BOX(&mllmcl::mix_few));
  m.impl("rank_gate", TORCH_BOX(&mllmcl::rank_gate));
  m.impl("rank_gate_backward", TORCH_BOX(&mllmcl::rank_gate_backward));
  m.impl("dropout", TORCH_BOX(&mllmcl::dropout));
}
