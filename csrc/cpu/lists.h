// Walking over the tensors of a list, visiting only the entries that their masks allow.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <utility>

#include "../checks.h"

namespace mllmcl {
namespace {

// how a mask is read; 0 or more is the dimension whose slices it selects
constexpr int64_t kNone = -3, kElements = -2, kOwner = -1;
constexpr int64_t kChunk = 32768;     // numbers of one unit of work that a mask of rows cuts out
constexpr int64_t kStretch = 131072;  // the same where all lie one behind the other: streams begin anew less often
constexpr int64_t kTile = 1024;       // numbers converted at a time where they are not float32

// Consecutive slices that may change, within dimension `n` of a tensor seen as [outer, n, inner].
struct Plan {
  int64_t total = 0, n = 1, inner = 1, kind = kNone, active = 0;
  const uint8_t* mask = nullptr;
  std::vector<std::pair<int64_t, int64_t>> runs;

  bool by_element() const { return kind == kElements || kind == kOwner; }
  uint8_t want() const { return kind == kOwner ? static_cast<uint8_t>(active) : 1; }
};

// Finds the consecutive slices of a row mask.
inline void find_runs(Plan& plan) {
  for (int64_t row = 0; row < plan.n; ++row) {
    if (!plan.mask[row]) continue;
    if (!plan.runs.empty() && plan.runs.back().second == row) plan.runs.back().second = row + 1;
    else plan.runs.emplace_back(row, row + 1);
  }
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

// A part of one tensor, which one thread works on at a time.
struct Unit {
  int64_t tensor, from, to;
};

// Units of one tensor that hold about as many numbers that may change, and begin with such a number where the mask is
// one of rows and its blocks are large: what is frozen costs no unit.
inline void add_units(int64_t tensor, const Plan& plan, std::vector<Unit>& found) {
  const auto cut = [&](int64_t step) {
    for (int64_t at = 0; at < plan.total; at += step) found.push_back({tensor, at, std::min(at + step, plan.total)});
  };
  if (plan.kind < 0) return cut(kStretch);
  int64_t rows = 0;
  for (const auto& run : plan.runs) rows += run.second - run.first;
  const int64_t block = plan.n * plan.inner, active = rows * plan.inner;
  if (active == 0) return;
  if (block <= kChunk) return cut(std::max<int64_t>(1, kChunk / active) * block);
  for (int64_t base = 0; base < plan.total; base += block) {
    int64_t from = 0, at = 0, taken = 0;
    for (const auto& run : plan.runs) {
      const int64_t end = base + run.second * plan.inner;
      for (at = base + run.first * plan.inner; at < end;) {
        if (taken == 0) from = at;
        const int64_t step = std::min(end - at, kChunk - taken);
        at += step;
        taken += step;
        if (taken < kChunk) continue;
        found.push_back({tensor, from, at});
        taken = 0;
      }
    }
    if (taken > 0) found.push_back({tensor, from, at});
  }
}

// Units of all tensors; those without a number that may change have none.
inline std::vector<Unit> units(const std::vector<Plan>& plans) {
  std::vector<Unit> found;
  for (size_t i = 0; i < plans.size(); ++i) add_units(static_cast<int64_t>(i), plans[i], found);
  return found;
}

// Runs each unit once. A thread takes the next one when it is done with its last, so that none waits for one that
// began late or runs slowly.
template <class Work>
void for_each_unit(const std::vector<Unit>& work, const Work& run) {
  const int64_t count = static_cast<int64_t>(work.size());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t unit = next++; unit < count; unit = next++) run(work[unit]);
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

// The tensors of a call, from a table of int64 that `list_table` in Python makes, describes and vouches for.
template <int N>
struct Lists {
  std::vector<Plan> plans;
  std::vector<Streams<N>> streams;

  explicit Lists(const Tensor& table) {
    need(table.is_contiguous() && table.scalar_type() == Dtype::Long && table.numel() >= N + 2,
         "the table must be contiguous int64 with a head");
    const int64_t* head = static_cast<const int64_t*>(table.const_data_ptr());
    const int64_t count = head[0], masked = head[1], *sizes = head + N + 2;
    const int64_t several = std::count(head + 2, sizes, -1);
    need(table.numel() == N + 2 + count * (1 + N + several + (masked ? 5 : 0)), "the table must be of its length");
    plans.resize(count);
    streams.resize(count);
    const int64_t* row = sizes;
    for (int64_t i = 0; i < count; ++i) plans[i].total = row[i];
    for (int k = 0; k < N; ++k) {
      row += count;
      for (int64_t i = 0; i < count; ++i) streams[i].data[k] = reinterpret_cast<void*>(row[i]);
      const bool one = head[2 + k] >= 0;
      if (!one) row += count;
      for (int64_t i = 0; i < count; ++i) {
        streams[i].dtype[k] = static_cast<Dtype>(one ? head[2 + k] : row[i]);
        need(is_row_dtype(streams[i].dtype[k]), "tensors must be float32, bfloat16 or float16");
      }
    }
    if (masked) read_masks(row + count, count);
  }

 private:
  void read_masks(const int64_t* rows, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      Plan& plan = plans[i];
      plan.mask = reinterpret_cast<const uint8_t*>(rows[i]);
      plan.kind = rows[count + i];
      plan.active = rows[2 * count + i];
      plan.n = rows[3 * count + i];
      plan.inner = rows[4 * count + i];
      if (plan.kind >= 0) find_runs(plan);
    }
  }
};

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

// Whether an element mask can be applied where the numbers lie: float32 alone.
template <int N>
bool blends_in_place(const Streams<N>& s, const Plan& plan) {
  return plan.by_element() && s.plain();
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
