// Lists of tensors as the dispatcher hands them over, for kernels that take hundreds.
#pragma once

#include <algorithm>

#include "../checks.h"

namespace mllmcl {
namespace {

using torch::stable::detail::to;

// A list as the dispatcher hands it over. A `Tensor` for each element has a shared pointer to make and to drop, which
// takes longer than all questions about it.
class Handles {
 public:
  explicit Handles(StableIValue value) : list_(to<StableListHandle>(value)) {
    size_t size = 0;
    torch_list_size(list_, &size);
    handles_.resize(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue element;
      torch_list_get_item(list_, i, &element);
      handles_[i] = to<AtenTensorHandle>(element);
    }
  }
  Handles(const Handles&) = delete;
  Handles& operator=(const Handles&) = delete;
  ~Handles() {
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
    torch_delete_list(list_);
  }

  int64_t size() const { return static_cast<int64_t>(handles_.size()); }
  AtenTensorHandle operator[](int64_t i) const { return handles_[i]; }

 private:
  StableListHandle list_;
  std::vector<AtenTensorHandle> handles_;
};

// What a kernel has to know of a tensor, sizes and strides in torch's memory.
struct Facts {
  int32_t device = -1, dtype = -1, layout = -1;
  bool by_rows = false;
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;

  explicit Facts(AtenTensorHandle t) {
    aoti_torch_get_device_type(t, &device);
    aoti_torch_get_layout(t, &layout);
    if (device != aoti_torch_device_type_cpu() || layout != aoti_torch_layout_strided()) return;
    aoti_torch_get_dtype(t, &dtype);
    aoti_torch_is_contiguous(t, &by_rows);
    aoti_torch_get_dim(t, &dim);
    aoti_torch_get_sizes(t, &sizes);
    if (!by_rows) aoti_torch_get_strides(t, &strides);
  }

  bool by_columns() const { return !by_rows && dim == 2 && strides[0] == 1 && strides[1] == sizes[0]; }
  // whether a kernel takes it as it is: a dtype that it converts, without gaps
  bool is_usual() const {
    const bool is_row = dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_bfloat16() ||
                        dtype == aoti_torch_dtype_float16();
    return is_row && (by_rows || by_columns());
  }
  bool lies_like(const Facts& other) const {
    return by_rows == other.by_rows && std::equal(sizes, sizes + dim, other.sizes, other.sizes + other.dim);
  }
};

}  // namespace
}  // namespace mllmcl
