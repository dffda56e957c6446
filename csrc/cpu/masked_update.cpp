// AdamW and gradient masking over a list of tensors, touching only what the masks allow.

#include <algorithm>
#include <cmath>

#include "lanes.h"
#include "lists.h"

namespace mllmcl {
namespace {

struct Adam {
  float rate_decay, beta1, rest1, beta2, rest2, eps, step_size, inverse_root, scale;
};

MLLMCL_INLINE void adam_one(float* p, float* m, float* v, const float* g, const Adam& a) {
  const float grad = *g * a.scale;
  const float mean = *m * a.beta1 + grad * a.rest1;
  const float square = *v * a.beta2 + grad * grad * a.rest2;
  *m = mean;
  *v = square;
  *p = *p * a.rate_decay - a.step_size * mean / (std::sqrt(square) * a.inverse_root + a.eps);
}

// A length that the compiler knows becomes whole vectors, however short a stretch is.
template <int64_t kCount>
MLLMCL_INLINE void adam_piece(float* __restrict__ p, float* __restrict__ m, float* __restrict__ v,
                              const float* __restrict__ g, const Adam& a) {
  for (int64_t i = 0; i < kCount; ++i) adam_one(p + i, m + i, v + i, g + i, a);
}

// How far ahead of a stretch the caches are told: four streams at once are more than the hardware follows by itself.
constexpr int64_t kFar = 256;
constexpr int64_t kLine = 16;  // numbers of a line of the caches

MLLMCL_INLINE void fetch(const float* p, const float* m, const float* v, const float* g, int64_t at) {
  __builtin_prefetch(p + at, 1);
  __builtin_prefetch(m + at, 1);
  __builtin_prefetch(v + at, 1);
  __builtin_prefetch(g + at, 0);
}

// `blocks` stretches of `count` numbers, `stride` apart: one expert's columns of every row in a single call
MLLMCL_CLONES void adam_span(float* __restrict__ p, float* __restrict__ m, float* __restrict__ v,
                             const float* __restrict__ g, int64_t count, int64_t stride, int64_t blocks,
                             const Adam& a) {
  constexpr int64_t kPiece = 8, kShort = 128, kAhead = 16;
  if (count > kShort) {
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t i = block * stride;
      const int64_t end = i + count;
      for (; i + kFar < end; i += kLine) {
        fetch(p, m, v, g, i + kFar);
        adam_piece<kLine>(p + i, m + i, v + i, g + i, a);
      }
      for (; i < end; ++i) adam_one(p + i, m + i, v + i, g + i, a);
    }
    return;
  }
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t i = block * stride;
    const int64_t end = i + count;
    if (block + kAhead < blocks) fetch(p, m, v, g, i + kAhead * stride);
    for (; i + kPiece <= end; i += kPiece) adam_piece<kPiece>(p + i, m + i, v + i, g + i, a);
    for (; i < end; ++i) adam_one(p + i, m + i, v + i, g + i, a);
  }
}

// the same where `keep` is `want`; the other numbers keep their bits
MLLMCL_CLONES void adam_where(float* __restrict__ p, float* __restrict__ m, float* __restrict__ v,
                              const float* __restrict__ g, const uint8_t* __restrict__ keep, uint8_t want,
                              int64_t count, const Adam& a) {
  for (int64_t from = 0; from < count; from += kFar) {
    const int64_t to = std::min(from + kFar, count), ahead = std::min(to + kFar, count);
    for (int64_t next = to; next < ahead; next += kLine) fetch(p, m, v, g, next);
    for (int64_t i = from; i < to; ++i) {
      float param = p[i], mean = m[i], square = v[i];
      adam_one(&param, &mean, &square, g + i, a);
      p[i] = keep[i] == want ? param : p[i];
      m[i] = keep[i] == want ? mean : m[i];
      v[i] = keep[i] == want ? square : v[i];
    }
  }
}

double number(const Tensor& t) {
  need(t.numel() == 1 && t.scalar_type() == Dtype::Double, "step, lr and grad_scale must be one float64");
  return *static_cast<const double*>(t.const_data_ptr());
}

void masked_adamw(Tensor table, Tensor step, Tensor lr, Tensor grad_scale, double beta1, double beta2, double eps,
                  double weight_decay) {
  const double t = number(step), rate = number(lr);
  // 1 - beta is taken in double: in float32 it would be off by 5e-5 for 0.999
  const Adam a{static_cast<float>(1.0 - rate * weight_decay), static_cast<float>(beta1),
               static_cast<float>(1.0 - beta1), static_cast<float>(beta2), static_cast<float>(1.0 - beta2),
               static_cast<float>(eps), static_cast<float>(rate / (1.0 - std::pow(beta1, t))),
               static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, t))), static_cast<float>(number(grad_scale))};
  const Lists<4> lists(table);
  for_each_unit(units(lists.plans), [&](const Unit& unit) {
    const Plan& plan = lists.plans[unit.tensor];
    const Streams<4>& s = lists.streams[unit.tensor];  // parameter, moments, gradient
    if (blends_in_place(s, plan)) {
      float* x[4];
      for (int k = 0; k < 4; ++k) x[k] = static_cast<float*>(s.data[k]) + unit.from;
      adam_where(x[0], x[1], x[2], x[3], plan.mask + unit.from, plan.want(), unit.to - unit.from, a);
      return;
    }
    visit<3>(s, plan, unit.from, unit.to, [&](float* const* x, int64_t, int64_t length, int64_t stride, int64_t blocks) {
      adam_span(x[0], x[1], x[2], x[3], length, stride, blocks, a);
    });
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
  for (int64_t i = from; i < to; ++i)
    if (plan.mask[i] != plan.want()) std::memset(data + i * size, 0, size);
}

void mask_grads(Tensor table) {
  const Lists<1> lists(table);
  std::vector<Unit> work;
  for (size_t i = 0; i < lists.plans.size(); ++i) {
    if (lists.plans[i].kind == kNone) continue;
    const int64_t total = lists.plans[i].total;
    for (int64_t at = 0; at < total; at += kChunk)
      work.push_back({static_cast<int64_t>(i), at, std::min(at + kChunk, total)});
  }
  for_each_unit(work, [&](const Unit& unit) {
    const Streams<1>& grad = lists.streams[unit.tensor];
    clear(static_cast<char*>(grad.data[0]), dtype_size(grad.dtype[0]), lists.plans[unit.tensor], unit.from, unit.to);
  });
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CPU, m) {
  m.impl("masked_adamw", TORCH_BOX(&mllmcl::masked_adamw));
  m.impl("mask_grads", TORCH_BOX(&mllmcl::mask_grads));
}
