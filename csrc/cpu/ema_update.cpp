// average += w (param - average) over a list of tensors, with weights made from norms on the way.

#include <cmath>

#include "lists.h"

namespace mllmcl {
namespace {

enum Mode { kConstant, kDema, kPema };
constexpr int kSums = 3;           // what is summed up for each group: |d| and two more
constexpr int64_t kWhole = 65536;  // a tensor up to this size stays in the cache between its sums and its update

struct Weighing {
  Mode mode;
  double weight, factor;  // fallback or base weight; factor of "dema"
};

// One tensor. Its weights belong to slices of [outer, n, inner]; n = 1 is one weight for all of it.
struct Item {
  Plan plan;
  Streams<4> streams;  // average, param and what the mode reads besides; the last may repeat
  bool each = false;   // one weight for each entry
  int64_t n = 1, inner = 1;
  const std::vector<int64_t>* group_of = nullptr;  // of each slice, null: every slice on its own
  std::vector<float> weights;                      // of each slice
  float mean_moved = 0.0f, mean_square = 0.0f;     // over the tensor, where each entry has its own weight
};

MLLMCL_CLONES void lerp(float* __restrict__ a, const float* __restrict__ p, float w, int64_t count, int64_t stride,
                        int64_t blocks) {
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = block * stride; i < block * stride + count; ++i) a[i] += w * (p[i] - a[i]);
}

// the same where `keep` is `want`; the other numbers keep their bits
MLLMCL_CLONES void lerp_where(float* __restrict__ a, const float* __restrict__ p, float w,
                              const uint8_t* __restrict__ keep, uint8_t want, int64_t count) {
  for (int64_t i = 0; i < count; ++i) a[i] = keep[i] == want ? a[i] + w * (p[i] - a[i]) : a[i];
}

MLLMCL_CLONES void lerp_each(float* __restrict__ a, const float* __restrict__ p, const float* __restrict__ w,
                             int64_t count) {
  for (int64_t i = 0; i < count; ++i) a[i] += w[i] * (p[i] - a[i]);
}

MLLMCL_CLONES void lerp_dema(float* __restrict__ a, const float* __restrict__ p, const float* __restrict__ g,
                             const float* __restrict__ old, float factor, float fallback, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float d = p[i] - a[i];
    const float w = factor * (1.0f + std::fabs(g[i])) / (std::fabs(d) * std::fabs(g[i] - old[i]));
    a[i] += (w > 0.0f && w < 1.0f ? w : fallback) * d;
  }
}

MLLMCL_CLONES void lerp_pema(float* __restrict__ a, const float* __restrict__ p, const float* __restrict__ f,
                             float mean_moved, float mean_square, float base, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float d = p[i] - a[i];
    const float w = base * (mean_moved / std::fabs(d)) * (mean_square / f[i]);
    const float low = w < 0.1f * base ? 0.1f * base : w, high = low > 1.0f ? 1.0f : low;
    a[i] += (high == high ? high : base) * d;
  }
}

// |d|, |g| and |g - old|; or |d|, F and 1
MLLMCL_CLONES void terms_of(Mode mode, const float* a, const float* p, const float* g, const float* old, int64_t count,
                            float (*terms)[kTile]) {
  for (int64_t i = 0; i < count; ++i) terms[0][i] = std::fabs(p[i] - a[i]);
  if (mode == kDema) {
    for (int64_t i = 0; i < count; ++i) terms[1][i] = std::fabs(g[i]);
    for (int64_t i = 0; i < count; ++i) terms[2][i] = std::fabs(g[i] - old[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) terms[1][i] = g[i];
    for (int64_t i = 0; i < count; ++i) terms[2][i] = 1.0f;
  }
}

MLLMCL_CLONES void clear_masked(float (*terms)[kTile], const uint8_t* keep, uint8_t want, int64_t count) {
  for (int k = 0; k < kSums; ++k)
    for (int64_t i = 0; i < count; ++i) terms[k][i] = keep[i] == want ? terms[k][i] : 0.0f;
}

MLLMCL_CLONES double sum(const float* values, int64_t count) {
  float lanes[16] = {0.0f};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int64_t l = 0; l < 16; ++l) lanes[l] += values[i + l];
  double total = 0.0;
  for (int64_t l = 0; l < 16; ++l) total += lanes[l];
  for (; i < count; ++i) total += values[i];
  return total;
}

MLLMCL_CLONES void add(double* __restrict__ sums, const float* __restrict__ values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sums[i] += values[i];
}

// Slices that a part of a tensor touches, from that of its first entry on, and their sums.
struct Part {
  int64_t first, slices;
  std::vector<double> sums;  // [kSums, slices]
};

Part open_part(const Item& item, const Unit& unit) {
  const int64_t first = unit.from / item.inner, last = (unit.to - 1) / item.inner;
  const int64_t slices = std::min(last - first + 1, item.n);
  return {first, slices, std::vector<double>(kSums * slices)};
}

// Adds terms of the entries from `at` on to the sums of their slices.
void fold(const Item& item, Part& part, int64_t at, int64_t count, const float (*terms)[kTile]) {
  for (int64_t i = 0, step = 0; i < count; i += step) {
    const int64_t row = (at + i) / item.inner, slot = (row - part.first) % item.n;
    // where a slice is one entry, neighbours are added as a vector, up to the end of the dimension
    step = item.inner == 1 ? std::min(count - i, item.n - slot) : std::min(count - i, (row + 1) * item.inner - at - i);
    for (int k = 0; k < kSums; ++k) {
      double* sums = part.sums.data() + k * part.slices + slot;
      if (item.inner == 1) add(sums, terms[k] + i, step);
      else *sums += sum(terms[k] + i, step);
    }
  }
}

Part sums_of(const Item& item, const Unit& unit, Mode mode) {
  Part part = open_part(item, unit);
  alignas(64) float terms[kSums][kTile];
  visit<0>(item.streams, item.plan, unit.from, unit.to,
           [&](float* const* x, int64_t at, int64_t length, int64_t stride, int64_t blocks) {
             for (int64_t block = 0; block < blocks; ++block)
               for (int64_t i = 0; i < length; i += kTile) {
                 const int64_t from = block * stride + i, count = std::min(kTile, length - i);
                 terms_of(mode, x[0] + from, x[1] + from, x[2] + from, x[3] + from, count, terms);
                 if (item.plan.by_element())
                   clear_masked(terms, item.plan.mask + at + from, item.plan.want(), count);
                 fold(item, part, at + from, count, terms);
               }
           });
  return part;
}

float pema_weight(double ratio, double base) {
  const double w = base * ratio;
  return static_cast<float>(std::isnan(w) ? base : std::min(std::max(w, 0.1 * base), 1.0));
}

// The weight of every slice from the sums of all parts, added up in their order.
void set_weights(Item& item, const std::vector<Part>& parts, const Weighing& how) {
  const int64_t groups = item.group_of ? item.group_of->back() + 1 : item.n;
  std::vector<std::array<double, kSums>> sums(groups);
  std::array<double, kSums> all{};
  for (const Part& part : parts)
    for (int64_t slot = 0; slot < part.slices; ++slot) {
      const int64_t slice = (part.first + slot) % item.n;
      for (int k = 0; k < kSums; ++k) {
        const double value = part.sums[k * part.slices + slot];
        sums[item.group_of ? (*item.group_of)[slice] : slice][k] += value;
        all[k] += value;
      }
    }
  item.mean_moved = static_cast<float>(all[0] / all[2]);
  item.mean_square = static_cast<float>(all[1] / all[2]);
  item.weights.resize(item.n);
  for (int64_t slice = 0; slice < item.n; ++slice) {
    const auto& [moved, second, third] = sums[item.group_of ? (*item.group_of)[slice] : slice];
    if (how.mode == kDema) {
      const double w = how.factor * (1.0 + second) / (moved * third);
      item.weights[slice] = static_cast<float>(w > 0.0 && w < 1.0 ? w : how.weight);
    } else {
      const double ratio = (all[0] / all[2]) / (moved / third) * ((all[1] / all[2]) / (second / third));
      item.weights[slice] = pema_weight(ratio, how.weight);
    }
  }
}

// The weights of `count` entries from `at` on.
void spread(const Item& item, int64_t at, int64_t count, float* weights) {
  for (int64_t i = 0, step = 0; i < count; i += step) {
    const int64_t row = (at + i) / item.inner, slice = row % item.n;
    step = item.inner == 1 ? std::min(count - i, item.n - slice) : std::min(count - i, (row + 1) * item.inner - at - i);
    if (item.inner == 1) std::memcpy(weights + i, item.weights.data() + slice, step * sizeof(float));
    else std::fill_n(weights + i, step, item.weights[slice]);
  }
}

template <int N>
Streams<N> first(const Streams<4>& s) {
  Streams<N> found;
  std::copy_n(s.data.begin(), N, found.data.begin());
  std::copy_n(s.dtype.begin(), N, found.dtype.begin());
  return found;
}

// Moves what the mask lets through by one weight.
void apply_one(const Streams<2>& s, const Plan& plan, const Unit& unit, float weight) {
  if (blends_in_place(s, plan)) {
    float* average = static_cast<float*>(s.data[0]) + unit.from;
    const float* param = static_cast<const float*>(s.data[1]) + unit.from;
    return lerp_where(average, param, weight, plan.mask + unit.from, plan.want(), unit.to - unit.from);
  }
  visit<1>(s, plan, unit.from, unit.to, [&](float* const* x, int64_t, int64_t length, int64_t stride, int64_t blocks) {
    lerp(x[0], x[1], weight, length, stride, blocks);
  });
}

void apply(const Item& item, const Unit& unit, const Weighing& how) {
  const auto each_block = [](int64_t stride, int64_t blocks, const auto& run) {
    for (int64_t block = 0; block < blocks; ++block) run(block * stride);
  };
  const float weight = static_cast<float>(how.weight), factor = static_cast<float>(how.factor);
  if (item.each && how.mode == kDema) {
    visit<1>(item.streams, item.plan, unit.from, unit.to,
             [&](float* const* x, int64_t, int64_t length, int64_t stride, int64_t blocks) {
               each_block(stride, blocks, [&](int64_t at) {
                 lerp_dema(x[0] + at, x[1] + at, x[2] + at, x[3] + at, factor, weight, length);
               });
             });
  } else if (item.each) {
    visit<1>(first<3>(item.streams), item.plan, unit.from, unit.to,
             [&](float* const* x, int64_t, int64_t length, int64_t stride, int64_t blocks) {
               each_block(stride, blocks, [&](int64_t at) {
                 lerp_pema(x[0] + at, x[1] + at, x[2] + at, item.mean_moved, item.mean_square, weight, length);
               });
             });
  } else if (item.n == 1) {
    apply_one(first<2>(item.streams), item.plan, unit, item.weights[0]);
  } else {
    alignas(64) float weights[kTile];
    visit<1>(first<2>(item.streams), item.plan, unit.from, unit.to,
             [&](float* const* x, int64_t at, int64_t length, int64_t stride, int64_t blocks) {
               each_block(stride, blocks, [&](int64_t start) {
                 for (int64_t i = start; i < start + length; i += kTile) {
                   const int64_t count = std::min(kTile, start + length - i);
                   spread(item, at + i, count, weights);
                   lerp_each(x[0] + i, x[1] + i, weights, count);
                 }
               });
             });
  }
}

void set_groups(Item& item, int64_t group, int64_t n, int64_t inner, const std::vector<int64_t>& group_of) {
  item.each = group == kElements;
  item.inner = std::max<int64_t>(item.plan.total, 1);
  if (group < 0) return;
  item.n = n;
  item.inner = inner;
  if (group_of.empty()) return;
  need(static_cast<int64_t>(group_of.size()) == item.n, "ranks must sum up to the dimension");
  item.group_of = &group_of;
}

// Of a table of averages, parameters and what the mode reads besides, streams of four: the last one may repeat.
template <int N>
std::vector<Item> items_of(const Tensor& table) {
  const Lists<N> lists(table);
  std::vector<Item> items(lists.plans.size());
  for (size_t i = 0; i < items.size(); ++i) {
    items[i].plan = lists.plans[i];
    for (int k = 0; k < 4; ++k) {
      items[i].streams.data[k] = lists.streams[i].data[std::min(k, N - 1)];
      items[i].streams.dtype[k] = lists.streams[i].dtype[std::min(k, N - 1)];
    }
  }
  return items;
}

void update_constantly(const Tensor& table, float weight) {
  const Lists<2> lists(table);
  for_each_unit(units(lists.plans), [&](const Unit& unit) {
    apply_one(lists.streams[unit.tensor], lists.plans[unit.tensor], unit, weight);
  });
}

// `groups` is int64 [3 n]: of each tensor how its weights are shared, then numbers of slices, then lengths of one.
void ema_update(Tensor table, Tensor groups, int64_t mode, double weight, double factor, std::vector<int64_t> ranks) {
  need(mode >= kConstant && mode <= kPema, "mode must be 0, 1 or 2");
  if (mode == kConstant) return update_constantly(table, static_cast<float>(weight));
  const Weighing how{static_cast<Mode>(mode), weight, factor};
  std::vector<Item> items = mode == kPema ? items_of<3>(table) : items_of<4>(table);
  const size_t count = items.size();
  need(groups.numel() == static_cast<int64_t>(3 * count) && groups.is_contiguous() &&
       groups.scalar_type() == Dtype::Long, "groups must be contiguous int64 [3 n]");
  const int64_t* of = static_cast<const int64_t*>(groups.const_data_ptr());
  std::vector<int64_t> group_of;
  for (size_t e = 0; e < ranks.size(); ++e) group_of.insert(group_of.end(), ranks[e], static_cast<int64_t>(e));

  std::vector<Unit> work, whole, parts;
  for (size_t i = 0; i < count; ++i) {
    set_groups(items[i], of[i], of[count + i], of[2 * count + i], group_of);
    items[i].weights.assign(1, static_cast<float>(weight));
    add_units(static_cast<int64_t>(i), items[i].plan, work);
  }
  // where nothing is summed up, or what is summed up stays in the cache, a tensor is done in one go
  const auto has_sums = [&](const Item& item) { return !(item.each && mode == kDema); };
  int64_t last = -1;
  for (const Unit& unit : work) {
    const Item& item = items[unit.tensor];
    if (!has_sums(item)) whole.push_back(unit);
    else if (item.plan.total > kWhole) parts.push_back(unit);
    else if (unit.tensor != last) whole.push_back({unit.tensor, 0, item.plan.total});
    last = unit.tensor;
  }
  for_each_unit(whole, [&](const Unit& unit) {
    Item& item = items[unit.tensor];
    if (has_sums(item)) set_weights(item, {sums_of(item, unit, how.mode)}, how);
    apply(item, unit, how);
  });
  std::vector<std::vector<Part>> sums(count);
  std::vector<int64_t> place;
  for (const Unit& unit : parts) {
    place.push_back(static_cast<int64_t>(sums[unit.tensor].size()));
    sums[unit.tensor].emplace_back();
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u)
      sums[parts[u].tensor][place[u]] = sums_of(items[parts[u].tensor], parts[u], how.mode);
  });
  torch::stable::parallel_for(0, static_cast<int64_t>(count), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!sums[i].empty()) set_weights(items[i], sums[i], how);
  });
  for_each_unit(parts, [&](const Unit& unit) { apply(items[unit.tensor], unit, how); });
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CPU, m) { m.impl("ema_update", TORCH_BOX(&mllmcl::ema_update)); }
