// AdamW and gradient masking over a list of tensors, touching only what the masks allow.

#include <algorithm>
#include <cmath>

#include "../checks.h"

namespace mllmcl {
namespace {

constexpr int64_t kNone = -3, kElements = -2, kOwner = -1;
constexpr int64_t kChunk = 32768;  // numbers of one unit of work
constexpr int64_t kTile = 1024;    // numbers converted at a time where they are not float32

struct Adam {
  float rate_decay, beta1, rest1, beta2, rest2, eps, step_size, inverse_root, scale;
};

// Consecutive slices that may change, within dimension `n` of a tensor seen as [outer, n, inner].
struct Plan {
  int64_t total = 0, n = 1, inner = 1, kind = kNone, active = 0;
  const uint8_t* mask = nullptr;
  std::vector<std::pair<int64_t, int64_t>> runs;
};

Plan make_plan(const Tensor& tensor, const Tensor& mask, int64_t kind, int64_t active) {
  Plan plan;
  plan.total = tensor.numel();
  plan.kind = kind;
  plan.active = active;
  need(tensor.is_contiguous(), "tensors must be contiguous");
  if (kind == kNone) return plan;
  need(mask.is_contiguous() && mask.scalar_type() == Dtype::Byte, "masks must be contiguous uint8");
  plan.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  if (kind == kElements || kind == kOwner) {
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

// `blocks` stretches of `count` numbers, `stride` apart: one expert's columns of every row in a single call
MLLMCL_CLONES void adam_span(float* p, const float* g, float* m, float* v, int64_t count, int64_t stride,
                             int64_t blocks, const Adam& a) {
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = block * stride;
    for (int64_t i = start; i < start + count; ++i) {
      const float grad = g[i] * a.scale;
      const float mean = m[i] * a.beta1 + grad * a.rest1;
      const float square = v[i] * a.beta2 + grad * grad * a.rest2;
      m[i] = mean;
      v[i] = square;
      p[i] = p[i] * a.rate_decay - a.step_size * mean / (std::sqrt(square) * a.inverse_root + a.eps);
    }
  }
}

// Everything is computed, then the masked-out numbers are taken from what was there: no branch for each number.
MLLMCL_CLONES void adam_span_masked(float* p, const float* g, float* m, float* v, const uint8_t* mask, uint8_t want,
                                    int64_t count, const Adam& a) {
  float moved[kTile], means[kTile], squares[kTile];
  for (int64_t from = 0; from < count; from += kTile) {
    const int64_t n = std::min(kTile, count - from);
    float *pt = p + from, *mt = m + from, *vt = v + from;
    const float* gt = g + from;
    const uint8_t* keep = mask + from;
    for (int64_t i = 0; i < n; ++i) {
      const float grad = gt[i] * a.scale;
      const float mean = mt[i] * a.beta1 + grad * a.rest1;
      const float square = vt[i] * a.beta2 + grad * grad * a.rest2;
      means[i] = mean;
      squares[i] = square;
      moved[i] = pt[i] * a.rate_decay - a.step_size * mean / (std::sqrt(square) * a.inverse_root + a.eps);
    }
    for (int64_t i = 0; i < n; ++i) pt[i] = keep[i] == want ? moved[i] : pt[i];
    for (int64_t i = 0; i < n; ++i) mt[i] = keep[i] == want ? means[i] : mt[i];
    for (int64_t i = 0; i < n; ++i) vt[i] = keep[i] == want ? squares[i] : vt[i];
  }
}

struct Slot {
  void *p, *m, *v;
  const void* g;
  Dtype p_dtype, m_dtype;
};

// [begin, end) of one tensor; element masks are looked at, row masks are not
void update(const Slot& slot, const Plan& plan, int64_t begin, int64_t end, const Adam& a) {
  float p[kTile], g[kTile], m[kTile], v[kTile];
  const bool plain = slot.p_dtype == Dtype::Float && slot.m_dtype == Dtype::Float;
  const bool by_element = plan.kind == kElements || plan.kind == kOwner;
  const uint8_t want = plan.kind == kOwner ? static_cast<uint8_t>(plan.active) : 1;
  for (int64_t at = begin; at < end; at += plain ? end - begin : kTile) {
    const int64_t count = plain ? end - at : std::min(kTile, end - at);
    const float* grad = load_row(slot.g, slot.p_dtype, at, count, g);
    float* param = open_row(slot.p, slot.p_dtype, at, p);
    float* mean = open_row(slot.m, slot.m_dtype, at, m);
    float* square = open_row(slot.v, slot.m_dtype, at, v);
    if (!plain) {
      load_row(slot.p, slot.p_dtype, at, count, p);
      load_row(slot.m, slot.m_dtype, at, count, m);
      load_row(slot.v, slot.m_dtype, at, count, v);
    }
    if (by_element) adam_span_masked(param, grad, mean, square, plan.mask + at, want, count, a);
    else adam_span(param, grad, mean, square, count, count, 1, a);
    store_row(slot.p, slot.p_dtype, at, count, p);
    store_row(slot.m, slot.m_dtype, at, count, m);
    store_row(slot.v, slot.m_dtype, at, count, v);
  }
}

// Whole blocks [begin, end) of a tensor whose masked dimension is not the first: run by run, all blocks in one call.
void update_blocks(const Slot& slot, const Plan& plan, int64_t begin, int64_t end, const Adam& a) {
  const int64_t block = plan.n * plan.inner, blocks = (end - begin) / block;
  for (const auto& run : plan.runs) {
    const int64_t at = begin + run.first * plan.inner, count = (run.second - run.first) * plan.inner;
    adam_span(static_cast<float*>(slot.p) + at, static_cast<const float*>(slot.g) + at,
              static_cast<float*>(slot.m) + at, static_cast<float*>(slot.v) + at, count, block, blocks, a);
  }
}

// Numbers of one unit of work: whole blocks where several fit.
int64_t chunk_of(const Plan& plan) {
  const int64_t block = plan.n * plan.inner;
  return plan.kind >= 0 && block > 0 && block <= kChunk ? kChunk / block * block : kChunk;
}

// Units of work (tensor, first number) over all tensors; tensors without a number that may change have none.
std::vector<std::pair<int64_t, int64_t>> units(const std::vector<Plan>& plans) {
  std::vector<std::pair<int64_t, int64_t>> found;
  for (size_t i = 0; i < plans.size(); ++i) {
    if (plans[i].kind >= 0 && plans[i].runs.empty()) continue;
    for (int64_t at = 0; at < plans[i].total; at += chunk_of(plans[i])) found.emplace_back(static_cast<int64_t>(i), at);
  }
  return found;
}

double number(const Tensor& t) {
  need(t.numel() == 1 && t.scalar_type() == Dtype::Double, "step, lr and grad_scale must be one float64");
  return *static_cast<const double*>(t.const_data_ptr());
}

void masked_adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> means,
                  std::vector<Tensor> squares, std::vector<Tensor> masks, std::vector<int64_t> kinds,
                  std::vector<int64_t> actives, Tensor step, Tensor lr, Tensor grad_scale, double beta1, double beta2,
                  double eps, double weight_decay) {
  const size_t count = params.size();
  need(grads.size() == count && means.size() == count && squares.size() == count && masks.size() == count &&
           kinds.size() == count && actives.size() == count, "lists must be equally long");
  const double t = number(step), rate = number(lr);
  // 1 - beta is taken in double: in float32 it would be off by 5e-5 for 0.999
  const Adam a{static_cast<float>(1.0 - rate * weight_decay), static_cast<float>(beta1),
               static_cast<float>(1.0 - beta1), static_cast<float>(beta2), static_cast<float>(1.0 - beta2),
               static_cast<float>(eps), static_cast<float>(rate / (1.0 - std::pow(beta1, t))),
               static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, t))), static_cast<float>(number(grad_scale))};
  std::vector<Plan> plans;
  std::vector<Slot> slots;
  for (size_t i = 0; i < count; ++i) {
    plans.push_back(make_plan(params[i], masks[i], kinds[i], actives[i]));
    for (const Tensor* other : {&grads[i], &means[i], &squares[i]})
      need(other->is_contiguous() && other->numel() == params[i].numel(), "tensors must be contiguous and alike");
    const Dtype dtype = params[i].scalar_type(), moment = means[i].scalar_type();
    need(is_row_dtype(dtype) && grads[i].scalar_type() == dtype, "gradients must have the parameter's dtype");
    need(is_row_dtype(moment) && squares[i].scalar_type() == moment, "moments must have one dtype");
    slots.push_back({params[i].mutable_data_ptr(), means[i].mutable_data_ptr(), squares[i].mutable_data_ptr(),
                     grads[i].const_data_ptr(), dtype, moment});
  }
  const auto work = units(plans);
  torch::stable::parallel_for(0, static_cast<int64_t>(work.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Plan& plan = plans[work[unit].first];
      const Slot& slot = slots[work[unit].first];
      const int64_t from = work[unit].second, to = std::min(from + chunk_of(plan), plan.total);
      const bool plain = slot.p_dtype == Dtype::Float && slot.m_dtype == Dtype::Float;
      if (plan.kind >= 0 && plain && plan.n * plan.inner <= kChunk) update_blocks(slot, plan, from, to, a);
      else if (plan.kind >= 0) for_each_run(plan, from, to, [&](int64_t b, int64_t e) { update(slot, plan, b, e, a); });
      else update(slot, plan, from, to, a);
    }
  });
}

// everything of [from, to) that the mask does not let through becomes zero
void clear(char* data, int64_t size, const Plan& plan, int64_t from, int64_t to) {
  if (plan.kind >= 0) {
    int64_t at = from;
    for_each_run(plan, from, to, [&](int64_t b, int64_t e) {
      std::memset(data + at * size, 0, (b - at) * size);
      at = e;
    });
    std::memset(data + at * size, 0, (to - at) * size);
    return;
  }
  const uint8_t want = plan.kind == kOwner ? static_cast<uint8_t>(plan.active) : 1;
  for (int64_t i = from; i < to; ++i)
    if (plan.mask[i] != want) std::memset(data + i * size, 0, size);
}

void mask_grads(std::vector<Tensor> grads, std::vector<Tensor> masks, std::vector<int64_t> kinds,
                std::vector<int64_t> actives) {
  need(masks.size() == grads.size() && kinds.size() == grads.size() && actives.size() == grads.size(),
       "lists must be equally long");
  std::vector<std::pair<int64_t, int64_t>> work;
  std::vector<Plan> plans;
  for (size_t i = 0; i < grads.size(); ++i) {
    need(is_row_dtype(grads[i].scalar_type()), "gradients must be float32, bfloat16 or float16");
    plans.push_back(make_plan(grads[i], masks[i], kinds[i], actives[i]));
    if (kinds[i] == kNone) continue;
    for (int64_t at = 0; at < plans[i].total; at += kChunk) work.emplace_back(static_cast<int64_t>(i), at);
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(work.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t i = work[unit].first, from = work[unit].second;
      clear(static_cast<char*>(grads[i].mutable_data_ptr()), dtype_size(grads[i].scalar_type()), plans[i], from,
            std::min(from + kChunk, plans[i].total));
    }
  });
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CPU, m) {
  m.impl("masked_adamw", TORCH_BOX(&mllmcl::masked_adamw));
  m.impl("mask_grads", TORCH_BOX(&mllmcl::mask_grads));
}
