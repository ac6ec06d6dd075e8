// Parts of csrc/ at sizes that no batch of a test has.
#include <sys/mman.h>

#include "conr_tile.cuh"

namespace {

using Engine = conr::ScalarEngine<float>;
constexpr int64_t kDim = 1 << 20, kRow = 1536;

struct Args {
  const float* q;
  float* loaded;
};

void load_kernel(Args args) {
  CONR_SHARED_BYTES(bytes);
  auto* shared = reinterpret_cast<float*>(bytes);
  conr::Label label[Engine::kRows];
  for (auto& row : label) row = {0.0f, 0.0f, kRow};
  conr::load_rows<Engine>(shared, args.q, label, kDim, 0);
  wait_for_copies();
  __syncthreads();
  if (threadIdx.x == 0) *args.loaded = shared[0];
}

}  // namespace

// What a row begins with that lies 6 GiB behind the first, in memory that is there where it is
// touched: 1 if its address is right.
extern "C" float load_far_row() {
  constexpr std::size_t kBytes = (kRow + 1) * kDim * sizeof(float);
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  auto* q = static_cast<float*>(memory);
  q[kRow * kDim] = 1.0f;
  float loaded = 0.0f;
  Args args{q, &loaded};
  void* arguments[] = {&args};
  cudaLaunchKernel(load_kernel, dim3(1), dim3(conr::kThreads), arguments, 64 * 1024, nullptr);
  munmap(memory, kBytes);
  return loaded;
}

extern "C" float sum_of_equal_terms(float term, int n) {
  conr::Sum<float> sum;
  for (int k = 0; k < n; ++k) sum.add(term);
  return sum.value();
}
