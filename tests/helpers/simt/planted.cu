// Kernels with one fault each, which simt.cpp must catch; `fault` 0 is the same kernel without it.
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>

namespace {

struct Args {
  const float* x;
  float* reversed;
  int n, fault;
};

// Reverses blocks of 64 numbers through shared memory.
void reverse_kernel(Args args) {
  CONR_SHARED_BYTES(bytes);
  auto* shared = reinterpret_cast<float*>(bytes);
  const int t = static_cast<int>(threadIdx.x), i = static_cast<int>(blockIdx.x) * 64 + t;
  shared[t] = args.fault == 2 || i < args.n ? args.x[i] : 0.0f;
  if (args.fault == 3 && t == 5) return;
  if (args.fault != 1) __syncthreads();
  if (args.fault == 4 && t == 5) __syncthreads();
  if (args.fault != 5 || t != 40) __shfl_xor_sync(~0u, t, 1);
  if (args.fault == 6 && t == 9) shared[-1] = 1.0f;
  args.reversed[i] = shared[63 - t];
}

}  // namespace

// Empty where the run was clean, else what the shim says.
extern "C" const char* run_planted(const float* x, float* reversed, int n, int fault) {
  static char message[512];
  message[0] = '\0';
  Args args{x, reversed, n, fault};
  void* arguments[] = {&args};
  try {
    const unsigned n_blocks = static_cast<unsigned>(n + 63) / 64;
    cudaLaunchKernel(reverse_kernel, dim3(n_blocks), dim3(64), arguments, 64 * sizeof(float),
                     nullptr);
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof(message), "%s", error.what());
  }
  return message;
}
