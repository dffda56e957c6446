// Importances of parameters over a list of tensors, and the gradient of the penalty that they weigh.

#include <cmath>

#include "lists.h"

namespace mllmcl {
namespace {

double number(const Tensor& t) {
  need(t.numel() == 1 && t.scalar_type() == Dtype::Double, "count and strength must be one float64");
  return *static_cast<const double*>(t.const_data_ptr());
}

MLLMCL_CLONES void mean_span(float* __restrict__ f, const float* __restrict__ g, bool squares, float share,
                             int64_t count, int64_t stride, int64_t blocks) {
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = block * stride;
    if (squares)
      for (int64_t i = start; i < start + count; ++i) f[i] += share * (g[i] * g[i] - f[i]);
    else
      for (int64_t i = start; i < start + count; ++i) f[i] += share * (std::fabs(g[i]) - f[i]);
  }
}

MLLMCL_CLONES void anchor_span(float* __restrict__ g, const float* __restrict__ p, const float* __restrict__ anchor,
                               const float* __restrict__ f, float strength, int64_t count, int64_t stride,
                               int64_t blocks) {
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = block * stride; i < block * stride + count; ++i) g[i] += strength * f[i] * (p[i] - anchor[i]);
}

MLLMCL_CLONES void power_of(const float* __restrict__ g, bool squares, float* __restrict__ out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = squares ? g[i] * g[i] : std::fabs(g[i]);
}

// 1 where the candidate exceeds, or is the first NaN
MLLMCL_CLONES void exceeds(const float* __restrict__ f, const float* __restrict__ candidate,
                           const uint8_t* __restrict__ keep, uint8_t want, uint8_t* __restrict__ taken,
                           int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    taken[i] = (candidate[i] > f[i]) | ((candidate[i] != candidate[i]) & (f[i] == f[i]));
  if (keep)
    for (int64_t i = 0; i < count; ++i) taken[i] &= keep[i] == want;
}

MLLMCL_CLONES void own(uint8_t* __restrict__ owners, const uint8_t* __restrict__ taken, uint8_t task, int64_t count) {
  for (int64_t i = 0; i < count; ++i) owners[i] = taken[i] ? task : owners[i];
}

// [begin, end) of one tensor: a candidate is compared as it would be stored, so that equal ones change no owner
void take_larger(const Streams<2>& s, uint8_t* owners, uint8_t task, bool squares, const Plan& plan, int64_t begin,
                 int64_t end) {
  alignas(64) float old[kTile], grad[kTile], candidate[kTile];
  uint8_t taken[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = std::min(kTile, end - at);
    power_of(load_row(s.data[1], s.dtype[1], at, count, grad), squares, candidate, count);
    if (s.dtype[0] != Dtype::Float) {
      uint16_t rounded[kTile];
      store_row(rounded, s.dtype[0], 0, count, candidate);
      load_row(rounded, s.dtype[0], 0, count, candidate);
    }
    const float* f = load_row(s.data[0], s.dtype[0], at, count, old);
    exceeds(f, candidate, plan.by_element() ? plan.mask + at : nullptr, plan.want(), taken, count);
    store_tile(s.data[0], s.dtype[0], at, count, candidate, taken, 1);
    if (owners) own(owners + at, taken, task, count);
  }
}

// `owners` holds addresses of uint8 maps of the tensors' sizes; it is empty where there are none.
void importance_update(Tensor table, Tensor owners, int64_t power, bool larger, Tensor count, int64_t task) {
  need(power == 1 || power == 2, "power must be 1 or 2");
  const Lists<2> lists(table);
  need(owners.numel() == 0 || (owners.numel() == static_cast<int64_t>(lists.plans.size()) && owners.scalar_type() == Dtype::Long &&
                               owners.is_contiguous()), "owners must be none or contiguous int64 [n]");
  const int64_t* maps = owners.numel() == 0 ? nullptr : static_cast<const int64_t*>(owners.const_data_ptr());
  const bool squares = power == 2;
  const float share = static_cast<float>(1.0 / number(count));
  for_each_unit(units(lists.plans), [&](const Unit& unit) {
    const Plan& plan = lists.plans[unit.tensor];
    const Streams<2>& s = lists.streams[unit.tensor];
    if (!larger) {
      visit<1>(s, plan, unit.from, unit.to,
               [&](float* const* x, int64_t, int64_t length, int64_t stride, int64_t blocks) {
                 mean_span(x[0], x[1], squares, share, length, stride, blocks);
               });
      return;
    }
    uint8_t* map = maps ? reinterpret_cast<uint8_t*>(maps[unit.tensor]) : nullptr;
    const auto take = [&](int64_t begin, int64_t end) {
      take_larger(s, map, static_cast<uint8_t>(task), squares, plan, begin, end);
    };
    if (plan.kind < 0) take(unit.from, unit.to);
    else for_each_run(plan, unit.from, unit.to, take);
  });
}

void anchor_grad(Tensor table, Tensor strength) {
  const float factor = static_cast<float>(number(strength));
  const Lists<4> lists(table);
  for_each_unit(units(lists.plans), [&](const Unit& unit) {
    visit<1>(lists.streams[unit.tensor], lists.plans[unit.tensor], unit.from, unit.to,
             [&](float* const* x, int64_t, int64_t length, int64_t stride, int64_t blocks) {
               anchor_span(x[0], x[1], x[2], x[3], factor, length, stride, blocks);
             });
  });
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CPU, m) {
  m.impl("importance_update", TORCH_BOX(&mllmcl::importance_update));
  m.impl("anchor_grad", TORCH_BOX(&mllmcl::anchor_grad));
}
