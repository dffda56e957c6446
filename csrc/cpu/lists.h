// Walking over the tensors of a list, visiting only the entries that their masks allow.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "../checks.h"

namespace mllmcl {
namespace {

// how a mask is read; 0 or more is the dimension whose slices it selects
constexpr int64_t kNone = -3, kElements = -2, kOwner = -1;
constexpr int64_t kChunk = 32768;  // numbers of one unit of work
constexpr int64_t kTile = 1024;    // numbers converted at a time where they are not float32

// Consecutive slices that may change, within dimension `n` of a tensor seen as [outer, n, inner].
struct Plan {
  int64_t total = 0, n = 1, inner = 1, kind = kNone, active = 0;
  const uint8_t* mask = nullptr;
  std::vector<std::pair<int64_t, int64_t>> runs;

  bool by_element() const { return kind == kElements || kind == kOwner; }
  uint8_t want() const { return kind == kOwner ? static_cast<uint8_t>(active) : 1; }
  bool frozen() const { return kind >= 0 && runs.empty(); }
};

inline Plan make_plan(const Tensor& tensor, const Tensor& mask, int64_t kind, int64_t active) {
  Plan plan;
  plan.total = tensor.numel();
  plan.kind = kind;
  plan.active = active;
  need(tensor.is_contiguous(), "tensors must be contiguous");
  if (kind == kNone) return plan;
  need(mask.is_contiguous() && mask.scalar_type() == Dtype::Byte, "masks must be contiguous uint8");
  plan.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  if (plan.by_element()) {
    need(mask.numel() == plan.total, "a mask must have the tensor's size");
    return plan;
  }
  need(kind >= 0 && kind < tensor.dim() && mask.numel() == tensor.size(kind), "a row mask must fit its dimension");
  plan.n = tensor.size(kind);
  for (int64_t d = kind + 1; d < tensor.dim(); ++d) plan.inner *= tensor.size(d);
  for (int64_t row = 0; row < plan.n; ++row) {
    if (!plan.mask[row]) continue;
    if (!plan.runs.empty() && plan.runs.back().second == row) plan.runs.back().second = row + 1;
    else plan.runs.emplace_back(row, row + 1);
  }
  return plan;
}

// Calls visit(begin, end) for every stretch of [from, to) that a row mask lets through.
template <class Visit>
void for_each_run(const Plan& plan, int64_t from, int64_t to, const Visit& visit) {
  const int64_t block = plan.n * plan.inner;
  if (block == 0) return;
  for (int64_t base = from / block * block; base < to; base += block) {
    const int64_t first_row = from > base ? (from - base) / plan.inner : 0;
    auto run = std::lower_bound(plan.runs.begin(), plan.runs.end(), first_row,
                                [](const std::pair<int64_t, int64_t>& r, int64_t row) { return r.second <= row; });
    for (; run != plan.runs.end(); ++run) {
      const int64_t begin = std::max(from, base + run->first * plan.inner);
      if (begin >= to) break;
      const int64_t end = std::min(to, base + run->second * plan.inner);
      if (begin < end) visit(begin, end);
    }
  }
}

// Numbers of one unit of work: whole blocks where several fit.
inline int64_t chunk_of(const Plan& plan) {
  const int64_t block = plan.n * plan.inner;
  return plan.kind >= 0 && block > 0 && block <= kChunk ? kChunk / block * block : kChunk;
}

// A part of one tensor, which one thread works on at a time.
struct Unit {
  int64_t tensor, from, to;
};

// Units of all tensors; those without a number that may change have none.
inline std::vector<Unit> units(const std::vector<Plan>& plans) {
  std::vector<Unit> found;
  for (size_t i = 0; i < plans.size(); ++i) {
    if (plans[i].frozen()) continue;
    const int64_t chunk = chunk_of(plans[i]);
    for (int64_t at = 0; at < plans[i].total; at += chunk)
      found.push_back({static_cast<int64_t>(i), at, std::min(at + chunk, plans[i].total)});
  }
  return found;
}

template <class Work>
void for_each_unit(const std::vector<Unit>& work, const Work& run) {
  torch::stable::parallel_for(0, static_cast<int64_t>(work.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) run(work[unit]);
  });
}

[[maybe_unused]] MLLMCL_CLONES void load_tile(const void* source, Dtype dtype, int64_t start, int64_t count,
                                              float* buffer) {
  const float* from = load_row(source, dtype, start, count, buffer);
  if (from != buffer) std::memcpy(buffer, from, count * sizeof(float));
}

// Numbers whose `keep` is not `want` stay what they are, bit for bit; without `keep` all are written.
[[maybe_unused]] MLLMCL_CLONES void store_tile(void* target, Dtype dtype, int64_t start, int64_t count,
                                               const float* __restrict__ buffer, const uint8_t* __restrict__ keep,
                                               uint8_t want) {
  if (dtype == Dtype::Float) {
    float* __restrict__ to = static_cast<float*>(target) + start;
    if (!keep) std::memcpy(to, buffer, count * sizeof(float));
    else for (int64_t i = 0; i < count; ++i) to[i] = keep[i] == want ? buffer[i] : to[i];
  } else if (!keep) {
    store_row(target, dtype, start, count, buffer);
  } else {
    uint16_t bits[kTile];
    store_row(bits, dtype, 0, count, buffer);
    uint16_t* __restrict__ to = static_cast<uint16_t*>(target) + start;
    for (int64_t i = 0; i < count; ++i) to[i] = keep[i] == want ? bits[i] : to[i];
  }
}

// The tensors that an elementwise update reads and writes at the same places.
template <int N>
struct Streams {
  std::array<void*, N> data;
  std::array<Dtype, N> dtype;

  bool plain() const {
    return std::all_of(dtype.begin(), dtype.end(), [](Dtype d) { return d == Dtype::Float; });
  }
};

// Tensors as streams; all must be contiguous, of one size and of a dtype that the kernels convert.
template <class... Tensors>
Streams<sizeof...(Tensors)> streams_of(const Tensors&... tensors) {
  constexpr int count = sizeof...(Tensors);
  const std::array<const Tensor*, count> all{&tensors...};
  for (const Tensor* tensor : all) {
    need(tensor->is_contiguous() && tensor->numel() == all[0]->numel(), "tensors must be contiguous and alike");
    need(is_row_dtype(tensor->scalar_type()), "tensors must be float32, bfloat16 or float16");
  }
  // what is only read is never written through these
  return {{const_cast<void*>(tensors.const_data_ptr())...}, {tensors.scalar_type()...}};
}

// [begin, end) of one tensor, tile by tile where numbers have to be converted or put back
template <int W, int N, class Span>
void visit_run(const Streams<N>& s, const Plan& plan, int64_t begin, int64_t end, const Span& span) {
  alignas(64) float buffers[N][kTile];
  const bool blends = W > 0 && plan.by_element(), whole = s.plain() && !blends;
  for (int64_t at = begin, count = 0; at < end; at += count) {
    count = whole ? end - at : std::min(kTile, end - at);
    float* x[N];
    for (int k = 0; k < N; ++k) {
      const bool direct = s.dtype[k] == Dtype::Float && !(blends && k < W);
      x[k] = direct ? static_cast<float*>(s.data[k]) + at : buffers[k];
      if (!direct) load_tile(s.data[k], s.dtype[k], at, count, buffers[k]);
    }
    span(x, at, count, count, 1);
    for (int k = 0; k < W; ++k)
      if (x[k] == buffers[k])
        store_tile(s.data[k], s.dtype[k], at, count, buffers[k], blends ? plan.mask + at : nullptr, plan.want());
  }
}

// Calls span(x, at, count, stride, blocks) for everything of a unit that the mask lets change: `blocks` stretches of
// `count` numbers, `stride` apart, the first at entry `at`; x[k] points to stream k's number there. The first W
// streams are written; what an element mask forbids is put back afterwards.
template <int W, int N, class Span>
void visit(const Streams<N>& s, const Plan& plan, int64_t from, int64_t to, const Span& span) {
  const int64_t block = plan.n * plan.inner;
  if (plan.kind < 0) {
    visit_run<W>(s, plan, from, to, span);
  } else if (block <= kChunk && s.plain() && from % block == 0) {
    for (const auto& run : plan.runs) {
      const int64_t at = from + run.first * plan.inner;
      float* x[N];
      for (int k = 0; k < N; ++k) x[k] = static_cast<float*>(s.data[k]) + at;
      span(x, at, (run.second - run.first) * plan.inner, block, (to - from) / block);
    }
  } else {
    for_each_run(plan, from, to, [&](int64_t begin, int64_t end) { visit_run<W>(s, plan, begin, end, span); });
  }
}

}  // namespace
}  // namespace mllmcl
