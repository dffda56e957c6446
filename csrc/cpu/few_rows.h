// A product whose left matrix has few rows: it waits for the right one to come from memory, so that is read once, unpacked.
#pragma once

#include <cstdint>

namespace mllmcl {

// x [rows, depth] and w [columns, depth], both contiguous
struct Factors {
  const float* x;
  const float* w;
  int64_t depth;
};

// out [rows, columns] = bias + the sum of x w^T over `count` pairs, + more.x w of `more` with w [depth, columns], where it
// is given; the same bits for any number of threads or rows
void few_rows_product(const Factors* pairs, int64_t count, const float* bias, int64_t rows, int64_t columns, float* out,
                      const Factors* more = nullptr);

}  // namespace mllmcl
