// One look at the tensors of some lists: hundreds of tensors are seen in the time of two questions from Python.

#include <array>

#include "handles.h"

namespace mllmcl {
namespace {

constexpr int64_t kLists = 4;

// Writes what `list_table` in Python makes of lists without masks; false, and a table of no use, where the lists are not
// equally long, one has several dtypes, or a tensor is unusual or not laid as that of the first list.
bool look_at(const std::array<Handles, kLists>& all, int64_t lists, const Tensor& table) {
  const int64_t count = all[0].size();
  need(lists >= 1 && lists <= kLists, "one to four lists");
  need(table.is_contiguous() && table.scalar_type() == Dtype::Long &&
       table.numel() == 2 + lists + count * (1 + lists), "the table must be contiguous int64 of its length");
  const auto unlike = [&](const Handles& list) { return list.size() != count; };
  if (count == 0 || std::any_of(all.begin(), all.begin() + lists, unlike)) return false;
  int64_t *head = static_cast<int64_t*>(table.mutable_data_ptr()), *sizes = head + 2 + lists;
  head[0] = count;
  head[1] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Facts first(all[0][i]);
    if (!first.is_usual()) return false;
    aoti_torch_get_numel(all[0][i], sizes + i);
    for (int64_t k = 0; k < lists; ++k) {
      const Facts facts = k == 0 ? first : Facts(all[k][i]);
      if (i == 0) head[2 + k] = facts.dtype;
      if (head[2 + k] != facts.dtype || !facts.is_usual() || !facts.lies_like(first)) return false;
      void* address = nullptr;
      aoti_torch_get_data_ptr(all[k][i], &address);
      sizes[(1 + k) * count + i] = reinterpret_cast<int64_t>(address);
    }
  }
  return true;
}

// look(Tensor[] a, Tensor[] b, Tensor[] c, Tensor[] d, int lists, Tensor(a!) table) -> bool
void look(StableIValue* stack, uint64_t, uint64_t) {
  const std::array<Handles, kLists> all{Handles(stack[0]), Handles(stack[1]), Handles(stack[2]), Handles(stack[3])};
  const Tensor table = to<Tensor>(stack[5]);
  stack[0] = torch::stable::detail::from(look_at(all, to<int64_t>(stack[4]), table));
}

}  // namespace
}  // namespace mllmcl

STABLE_TORCH_LIBRARY_IMPL(mllmcl_cpu, CompositeImplicitAutograd, m) { m.impl("look", &mllmcl::look); }
