// The launchers: which kernel for which dtype and size, every launch checked.
#include "conr_launch.h"

#include <stdexcept>
#include <string>

#include "conr_rows.cuh"
#include "conr_sweep.cuh"

namespace conr {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("conr_kernels: ") + what + ": " +
                             cudaGetErrorString(error));
}

template <class Args>
void launch(void (*kernel)(Args), Args args, int64_t work, int64_t work_of_block,
            size_t shared_bytes, cudaStream_t stream) {
  const int64_t blocks = (work + work_of_block - 1) / work_of_block;
  if (blocks == 0) return;
  constexpr size_t kSharedByDefault = 48 * 1024;
  if (shared_bytes > kSharedByDefault)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "too little shared memory");
  void* arguments[] = {&args};
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments,
                         shared_bytes, stream),
        "kernel launch failed");
  check(cudaGetLastError(), "kernel launch failed");
}

template <class Engine>
void forward(ForwardArgs args, cudaStream_t stream) {
  const int n_sweeps = args.rows.layout == nullptr ? 1 : 2;
  for (args.which = 0; args.which < n_sweeps; ++args.which)
    launch(conr_forward_kernel<Engine>, args, args.rows.n_anchors, Engine::kRows,
           sizeof(Tile<Engine>), stream);
  launch(conr_finish_rows_kernel<typename Engine::A>, args, args.rows.n_anchors, kThreads, 0,
         stream);
}

template <class Engine, int kPieces>
void backward(BackwardArgs args, cudaStream_t stream) {
  const int n_sweeps = args.rows.layout == nullptr ? 1 : 2;
  for (args.which = 0; args.which < n_sweeps; ++args.which)
    launch(conr_backward_kernel<Engine, kPieces>, args, args.rows.n_anchors, Engine::kRows,
           sizeof(Tile<Engine>), stream);
}

template <class Engine>
void backward_in_registers_or_memory(const BackwardArgs& args, cudaStream_t stream) {
  constexpr int kPieces = 128 / Engine::kDepth;
  if (args.rows.dim <= 128) {
    backward<Engine, kPieces>(args, stream);
  } else {
    backward<Engine, 0>(args, stream);
  }
}

}  // namespace

void launch_prepare(Type x_type, Type q_type, int64_t n, int64_t x_dim, int64_t q_dim,
                    const void* x, void* q, void* scale, void* norm, cudaStream_t stream) {
  const PrepareArgs args{n, x_dim, q_dim, x, q, scale, norm};
  const auto kernel = x_type == Type::kFloat64   ? conr_prepare_kernel<double, double, double>
                      : x_type == Type::kFloat32 ? conr_prepare_kernel<float, float, float>
                      : x_type == Type::kFloat16 ? conr_prepare_kernel<Half, Half, float>
                      : q_type == Type::kFloat32 ? conr_prepare_kernel<BFloat16, float, float>
                                                 : conr_prepare_kernel<BFloat16, BFloat16, float>;
  launch(kernel, args, n, kWarps, 0, stream);
}

void launch_bands(int64_t n_anchors, int64_t n_keys, const float* sorted_i, const float* sorted_j,
                  float reach, int32_t* lo, int32_t* hi, cudaStream_t stream) {
  const BandsArgs args{n_anchors, n_keys, sorted_i, sorted_j, reach, lo, hi};
  launch(conr_bands_kernel, args, n_anchors, kThreads, 0, stream);
}

void launch_forward(Type q_type, const Rows& rows, const Settings& settings,
                    const RowOutputs& outputs, cudaStream_t stream) {
  const ForwardArgs args{rows, settings, outputs, 0};
  switch (q_type) {
    case Type::kFloat64: return forward<ScalarEngine<double>>(args, stream);
    case Type::kFloat32: return forward<ScalarEngine<float>>(args, stream);
    case Type::kFloat16: return forward<TensorEngine<Half>>(args, stream);
    case Type::kBFloat16: return forward<TensorEngine<BFloat16>>(args, stream);
  }
}

void launch_backward(Type q_type, const Rows& rows, const Settings& settings, const void* coef,
                     void* G, cudaStream_t stream) {
  const BackwardArgs args{rows, settings, coef, G, 0};
  switch (q_type) {
    case Type::kFloat64: return backward<ScalarEngine<double>, 0>(args, stream);
    case Type::kFloat32: return backward_in_registers_or_memory<ScalarEngine<float>>(args, stream);
    case Type::kFloat16: return backward_in_registers_or_memory<TensorEngine<Half>>(args, stream);
    case Type::kBFloat16:
      return backward_in_registers_or_memory<TensorEngine<BFloat16>>(args, stream);
  }
}

void launch_finish_gradient(Type x_type, int64_t n, int64_t x_dim, int64_t q_dim, int n_stats,
                            double temperature, const void* x, const void* norm, const void* G,
                            const void* coef, void* gradient, cudaStream_t stream) {
  const FinishGradientArgs args{n, x_dim, q_dim, n_stats, temperature, x, norm, G, coef, gradient};
  const auto kernel = x_type == Type::kFloat64   ? conr_finish_gradient_kernel<double, double>
                      : x_type == Type::kFloat32 ? conr_finish_gradient_kernel<float, float>
                      : x_type == Type::kFloat16 ? conr_finish_gradient_kernel<Half, float>
                                                 : conr_finish_gradient_kernel<BFloat16, float>;
  launch(kernel, args, n, kWarps, 0, stream);
}

}  // namespace conr
