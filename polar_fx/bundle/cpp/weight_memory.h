// Memory for weights, in pages of 2 MB where Linux gives them: each token reads all of it, and in pages of 4 KB a part of that time goes to
// the translation of addresses.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

class WeightMemory {
 public:
  static size_t bytes_of(const std::vector<int64_t>& size, at::ScalarType dtype) {
    return at::detail::computeStorageNbytesContiguous(size, c10::elementSize(dtype));  // refuses sizes whose product overflows
  }

  // A dense tensor with no values yet. It keeps the memory it lies in.
  at::Tensor take(const std::vector<int64_t>& size, at::ScalarType dtype) {
    const size_t num_bytes = padded(bytes_of(size, dtype), kAlignment);
    if (num_bytes > left_) add(num_bytes);
    char* const place = part_.get() + used_;
    used_ += num_bytes;
    left_ -= num_bytes;
    return at::from_blob(place, size, [part = part_](void*) {}, at::TensorOptions(dtype));
  }

 private:
  static constexpr size_t kPage = 2 << 20, kLeast = 64 << 20, kAlignment = 64;

  static size_t padded(size_t num_bytes, size_t unit) { return (num_bytes + unit - 1) / unit * unit; }

  void add(size_t num_bytes) {
    left_ = padded(std::max(num_bytes, kLeast), kPage);
    used_ = 0;
    part_.reset(static_cast<char*>(std::aligned_alloc(kPage, left_)), std::free);
    if (!part_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(part_.get(), left_, MADV_HUGEPAGE);  // where it is refused, pages stay small
#endif
  }

  std::shared_ptr<char> part_;
  size_t used_ = 0, left_ = 0;
};
