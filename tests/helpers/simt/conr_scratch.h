// csrc/conr_scratch.h for the host: every part is a buffer of its own, between inaccessible pages.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <memory>
#include <vector>

namespace conr {

struct Part {
  const char* name;
  int64_t bytes;
  void* pointer;

  template <class T>
  Part(const char* name, T*& pointer, int64_t n)
      : name(name), bytes(n * static_cast<int64_t>(sizeof(T))), pointer(&pointer) {}
  Part(const char* name, void*& pointer, int64_t n, int64_t size)
      : name(name), bytes(n * size), pointer(&pointer) {}
};

inline std::vector<std::shared_ptr<void>> allocate(const torch::stable::Tensor&,
                                                   std::initializer_list<Part> parts) {
  std::vector<std::shared_ptr<void>> buffers;
  for (const Part& part : parts) {
    void* buffer = simt::allocate_part(part.name, static_cast<std::size_t>(part.bytes));
    buffers.emplace_back(buffer, simt::release_part);
    std::memcpy(part.pointer, &buffer, sizeof(buffer));
  }
  return buffers;
}

}  // namespace conr
