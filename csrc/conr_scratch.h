// Memory of one call for its kernels. The host shim of the tests replaces this file: there every
// part is a buffer of its own, between inaccessible pages.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <initializer_list>

namespace conr {

// n numbers, of `size` bytes each where the pointer does not tell, and the pointer to them to set.
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

// One allocation for all parts, each on 256 bytes.
inline torch::stable::Tensor allocate(const torch::stable::Tensor& like,
                                      std::initializer_list<Part> parts) {
  const auto padded = [](const Part& part) { return (part.bytes + 255) / 256 * 256; };
  int64_t size = 0;
  for (const Part& part : parts) size += padded(part);
  auto memory = torch::stable::new_empty(like, {size}, torch::headeronly::ScalarType::Byte);
  auto* next = static_cast<unsigned char*>(memory.mutable_data_ptr());
  for (const Part& part : parts) {
    std::memcpy(part.pointer, &next, sizeof(next));
    next += padded(part);
  }
  return memory;
}

}  // namespace conr
