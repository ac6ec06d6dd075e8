// Host stand-in for the CUDA runtime: enough of it to compile csrc/ with a C++ compiler and run a
// block's threads as fibers (simt.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __syncthreads_or(vote) ::simt::any_of_block(vote)
#define __syncthreads() ::simt::block_barrier(__LINE__)
#define wait_for_copies() ::simt::finish_copies(__LINE__)
#define CONR_SHARED_BYTES(name) unsigned char* name = ::simt::shared_bytes()

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

extern dim3 thread, block;

void launch(unsigned n_blocks, unsigned n_threads, std::size_t shared_size,
            const std::function<void()>& body);
void block_barrier(int line);
void warp_barrier(const char* operation);
bool any_of_block(bool vote);
unsigned char* shared_bytes();
void copy_later(void* to, const void* from, std::size_t size);  // zeros where `from` is null
void finish_copies(int line);

// Parts of a call's scratch memory (conr_scratch.h).
void* allocate_part(const char* name, std::size_t size);
void release_part(void* part);

// Publishes `size` bytes of this lane, waits for the warp and returns a lane's bytes by number.
const unsigned char* const* exchange(const void* value, std::size_t size, const char* operation);

template <class T>
T from_lane(const unsigned char* const* lanes, unsigned lane) {
  T value;
  std::memcpy(&value, lanes[lane], sizeof(T));
  return value;
}

}  // namespace simt

#define threadIdx ::simt::thread
#define blockIdx ::simt::block

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const auto lanes = simt::exchange(&value, sizeof(T), "shuffle");
  return simt::from_lane<T>(lanes, threadIdx.x % 32 ^ static_cast<unsigned>(mask));
}

inline float __uint_as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline std::uint32_t __float_as_uint(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

using std::ilogb;
using std::ldexp;
using std::max;

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline const char* cudaGetErrorString(cudaError_t) {
  return "a host stand-in's error";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  return *device = 0, cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= 64 * 1024 ? cudaSuccess : cudaErrorInvalidValue;  // sm_75 has no more
}

template <class Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 threads, void** args,
                             std::size_t shared_size, cudaStream_t) {
  simt::launch(grid.x, threads.x, shared_size, [&] { kernel(*static_cast<Args*>(args[0])); });
  return cudaSuccess;
}
