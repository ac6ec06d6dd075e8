// 16-bit storage and the warp-wide matrix instructions, one function each. The host shim of the
// tests replaces this one file.
#pragma once

#include <cstdint>

namespace conr {

struct Half {
  static constexpr int kExponentBits = 5;
  uint16_t bits;
};
struct BFloat16 {
  static constexpr int kExponentBits = 8;
  uint16_t bits;
};

__device__ __forceinline__ float to_float(Half x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
}

__device__ __forceinline__ Half to_half(float f) {
  Half x;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x.bits) : "f"(f));
  return x;
}

// Two values side by side in a register, the first in the low half.
__device__ __forceinline__ uint32_t pack(Half, float first, float second) {
  return static_cast<uint32_t>(to_half(second).bits) << 16 | to_half(first).bits;
}

__device__ __forceinline__ uint32_t pack(BFloat16, float first, float second) {
  uint32_t both = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
#endif
  return both;
}

// c [16, 8] += a [16, 16] · b [16, 8] over a warp, in the fragment layouts of mma.m16n8k16.
__device__ __forceinline__ void mma(Half, float& c0, float& c1, float& c2, float& c3,
                                    const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// Below sm_80 bfloat16 rows are computed as float32 (backend.py), so that this is never reached.
__device__ __forceinline__ void mma(BFloat16, float& c0, float& c1, float& c2, float& c3,
                                    const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm volatile("trap;");
#endif
}

// Begins to copy 16 bytes from global to shared memory, from sm_80 on past the registers; zeros
// where they are not there. They are to be waited for.
__device__ __forceinline__ void copy_16_bytes(void* shared, const void* global, bool is_there) {
#if __CUDA_ARCH__ >= 800
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(address), "l"(__cvta_generic_to_global(global)), "r"(is_there ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) =
      is_there ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}

// This thread's copies have arrived; a barrier shows them to the others.
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}

// Four 8×8 matrices of 16-bit elements from shared memory; lane l points to row l % 8 of matrix l
// / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address));
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address));
}

}  // namespace conr
