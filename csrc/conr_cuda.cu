// The launchers: which kernel for which dtype and size, every launch checked.
#include "conr_launch.h"

#include <stdexcept>
#include <string>

#include "conr_backward.cuh"
#include "conr_forward.cuh"
#include "conr_layout.cuh"
#include "conr_rows.cuh"

namespace conr {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("conr_kernels: ") + what + ": " +
                             cudaGetErrorString(error));
}

void launch(void (*kernel)(Args), Args args, int64_t blocks, cudaStream_t stream,
            size_t shared_bytes = 0, int threads = kThreads) {
  if (blocks == 0) return;
  constexpr size_t kSharedByDefault = 48 * 1024;
  if (shared_bytes > kSharedByDefault)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "too little shared memory");
  void* arguments[] = {&args};
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments,
                         shared_bytes, stream),
        "kernel launch failed");
  check(cudaGetLastError(), "kernel launch failed");
}

int n_sweeps(const Rows& rows) {
  return rows.layout == nullptr ? 1 : 2;
}

template <class Engine>
void forward(const Args& args, cudaStream_t stream) {
  using A = typename Engine::A;
  const int64_t n = args.rows.n_anchors;
  launch(conr_forward_kernel<Engine>, args, n_sweeps(args.rows) * blocks_of(n, Engine::kRows),
         stream, sizeof(Tile<Engine>));
  launch(conr_finish_rows_kernel<A>, args, blocks_of(n, kThreads), stream);
  if (args.total != nullptr) launch(conr_total_kernel<A>, args, 1, stream, 0, 32);
}

// One sweep after the other: both add to G.
template <class Engine, int kPieces>
void backward(Args args, cudaStream_t stream) {
  for (args.which = 0; args.which < n_sweeps(args.rows); ++args.which)
    launch(conr_backward_kernel<Engine, kPieces>, args,
           blocks_of(args.rows.n_anchors, Engine::kRows), stream, sizeof(Tile<Engine>));
}

template <class Engine>
void backward_in_registers_or_memory(const Args& args, cudaStream_t stream) {
  constexpr int kPieces = 128 / Engine::kDepth;
  if (args.rows.dim <= 128) {
    backward<Engine, kPieces>(args, stream);
  } else {
    backward<Engine, 0>(args, stream);
  }
}

}  // namespace

void launch_prepare(const Args& args, cudaStream_t stream) {
  if (args.extents != nullptr)
    launch(conr_extents_kernel, args, 2 * args.rows.n_components * kExtentWarps / kWarps, stream);
  const Type x = args.x_type, q = args.q_type;
  const auto kernel = x == Type::kFloat64   ? conr_prepare_kernel<double, double, double>
                      : x == Type::kFloat32 ? conr_prepare_kernel<float, float, float>
                      : x == Type::kFloat16 ? conr_prepare_kernel<Half, Half, float>
                      : q == Type::kFloat32 ? conr_prepare_kernel<BFloat16, float, float>
                                            : conr_prepare_kernel<BFloat16, BFloat16, float>;
  launch(kernel, args, prepare_blocks(args.rows.n_keys), stream);
}

void launch_layout(const Args& args, cudaStream_t stream) {
  launch(conr_bands_kernel, args, 2 * blocks_of(args.rows.n_keys, kThreads), stream);
  launch(conr_choose_kernel, args, 1, stream, 0, 32);
}

void launch_forward(const Args& args, cudaStream_t stream) {
  switch (args.q_type) {
    case Type::kFloat64: return forward<ScalarEngine<double>>(args, stream);
    case Type::kFloat32: return forward<ScalarEngine<float>>(args, stream);
    case Type::kFloat16: return forward<TensorEngine<Half>>(args, stream);
    case Type::kBFloat16: return forward<TensorEngine<BFloat16>>(args, stream);
  }
}

void launch_sweeps_backward(const Args& args, cudaStream_t stream) {
  switch (args.q_type) {
    case Type::kFloat64: return backward<ScalarEngine<double>, 0>(args, stream);
    case Type::kFloat32: return backward_in_registers_or_memory<ScalarEngine<float>>(args, stream);
    case Type::kFloat16: return backward_in_registers_or_memory<TensorEngine<Half>>(args, stream);
    case Type::kBFloat16:
      return backward_in_registers_or_memory<TensorEngine<BFloat16>>(args, stream);
  }
}

void launch_finish_gradient(const Args& args, cudaStream_t stream) {
  const Type x = args.x_type;
  const auto kernel = x == Type::kFloat64   ? conr_finish_gradient_kernel<double, double>
                      : x == Type::kFloat32 ? conr_finish_gradient_kernel<float, float>
                      : x == Type::kFloat16 ? conr_finish_gradient_kernel<Half, float>
                                            : conr_finish_gradient_kernel<BFloat16, float>;
  launch(kernel, args, blocks_of(args.rows.n_anchors, kWarps), stream);
}

}  // namespace conr
