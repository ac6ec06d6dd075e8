// The functions of csrc/conr_ptx.cuh for the host: fragment layouts as PTX documents them.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>

namespace conr {

struct Half {
  static constexpr int kExponentBits = 5;
  uint16_t bits;
};
struct BFloat16 {
  static constexpr int kExponentBits = 8;
  uint16_t bits;
};

inline float to_float(Half x) {
  _Float16 value;
  std::memcpy(&value, &x, sizeof(value));
  return static_cast<float>(value);
}

inline float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

inline Half to_half(float f) {
  const auto value = static_cast<_Float16>(f);
  Half x;
  std::memcpy(&x, &value, sizeof(x));
  return x;
}

inline uint32_t pack(Half, float first, float second) {
  return static_cast<uint32_t>(to_half(second).bits) << 16 | to_half(first).bits;
}

inline uint32_t pack(BFloat16, float first, float second) {
  const auto round = [](float f) -> uint32_t {
    const uint32_t bits = __float_as_uint(f);
    return (f == f ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000) >> 16;
  };
  return round(second) << 16 | round(first);
}

template <class T>
float unpack(uint32_t both, unsigned half) {
  return to_float(T{static_cast<uint16_t>(both >> 16 * half)});
}

struct Fragments {
  uint32_t a[4], b[2];
};

template <class T>
void mma(T, float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4], uint32_t b0,
         uint32_t b1) {
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto lanes = simt::exchange(&mine, sizeof(mine), "mma");
  const unsigned lane = threadIdx.x % 32;
  float* const c[4] = {&c0, &c1, &c2, &c3};
  for (unsigned n = 0; n < 4; ++n) {
    const unsigned row = lane / 4 + n / 2 * 8, column = lane % 4 * 2 + n % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const auto of_a = simt::from_lane<Fragments>(lanes, row % 8 * 4 + k % 8 / 2);
      const auto of_b = simt::from_lane<Fragments>(lanes, column * 4 + k % 8 / 2);
      *c[n] += unpack<T>(of_a.a[k / 8 * 2 + row / 8], k % 2) * unpack<T>(of_b.b[k / 8], k % 2);
    }
  }
}

// Copies nothing before it is waited for, so that a missing wait shows.
inline void copy_16_bytes(void* shared, const void* global, bool is_there) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0)
    throw std::runtime_error("copy_16_bytes: an address is not a multiple of 16 bytes");
  simt::copy_later(shared, is_there ? global : nullptr, 16);
}

inline void load_matrices(uint32_t (&out)[4], const void* row, bool transposed = false) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    throw std::runtime_error("ldmatrix: row address is not a multiple of 16 bytes");
  const auto lanes = simt::exchange(&row, sizeof(row), "ldmatrix");
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint32_t both = 0;
    for (unsigned half = 0; half < 2; ++half) {
      const unsigned r = transposed ? 2 * t + half : g, column = transposed ? g : 2 * t + half;
      const auto source = simt::from_lane<const uint16_t*>(lanes, matrix * 8 + r);
      both |= static_cast<uint32_t>(source[column]) << 16 * half;
    }
    out[matrix] = both;
  }
}

inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  load_matrices(out, row, true);
}

}  // namespace conr
