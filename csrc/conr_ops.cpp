// The operators, on PyTorch's stable ABI: every tensor is checked here and allocated by
// cuda_backend.py.
#include "conr_launch.h"
#include "conr_math.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#ifndef CONR_DISPATCH_KEY
#define CONR_DISPATCH_KEY CUDA
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the tensors' device current, and the former one again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) {
    check(cudaGetDevice(&former_));
    const int device = tensor.get_device_index();
    changed_ = device >= 0 && device != former_;
    if (changed_) check(cudaSetDevice(device));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(former_);
  }

 private:
  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "conr_kernels: ", cudaGetErrorString(error));
  }
  int former_ = 0;
  bool changed_ = false;
};

conr::Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return conr::Type::kFloat64;
    case ScalarType::Float: return conr::Type::kFloat32;
    case ScalarType::Half: return conr::Type::kFloat16;
    case ScalarType::BFloat16: return conr::Type::kBFloat16;
    default: STD_TORCH_CHECK(false, "conr_kernels: features must be of a floating dtype");
  }
  return conr::Type::kFloat32;
}

ScalarType accumulation_type(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel,
           const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "conr_kernels: ", name, " has a wrong dtype");
  STD_TORCH_CHECK(tensor.numel() == numel, "conr_kernels: ", name, " has ", tensor.numel(),
                  " elements, not ", numel);
  STD_TORCH_CHECK(tensor.is_contiguous(), "conr_kernels: ", name, " must be contiguous");
  STD_TORCH_CHECK(tensor.get_device_index() == like.get_device_index(), "conr_kernels: ", name,
                  " is on another device");
}

const void* input(const Tensor& tensor) {
  return tensor.const_data_ptr();
}
void* output(const Tensor& tensor) {
  return tensor.mutable_data_ptr();
}
cudaStream_t stream_of(int64_t stream) {
  return reinterpret_cast<cudaStream_t>(stream);
}

conr::Rows rows_of(const Tensor& q, const Tensor& scale, const Tensor& y, const Tensor& p,
                   const Tensor& layout, int64_t n_anchors, int64_t self_offset) {
  const int64_t n_keys = q.size(0), n_labels = n_keys * y.size(1);
  check(q, "q", q.scalar_type(), n_keys * q.size(1), q);
  check(scale, "scale", accumulation_type(q), n_keys, q);
  check(y, "y", ScalarType::Float, n_labels, q);
  check(p, "p", ScalarType::Float, n_labels, q);
  const int64_t n_layout = layout.numel() == 0 ? 0 : 2 + 2 * (n_keys + 3 * n_anchors);
  check(layout, "layout", ScalarType::Int, n_layout, q);
  STD_TORCH_CHECK(q.size(1) % 8 == 0 && q.size(1) <= INT32_MAX / 8,
                  "conr_kernels: q must have a multiple of 8 columns, fewer than 2^28");
  STD_TORCH_CHECK(self_offset >= 0 && self_offset + n_anchors <= n_keys && n_keys < INT32_MAX,
                  "conr_kernels: anchors must be among the keys, and fewer than 2^31");
  return {
      n_anchors,
      n_keys,
      q.size(1),
      y.size(1),
      self_offset,
      input(q),
      input(scale),
      static_cast<const float*>(input(y)),
      static_cast<const float*>(input(p)),
      n_layout == 0 ? nullptr : static_cast<const int32_t*>(input(layout)),
  };
}

void prepare(Tensor x, Tensor q, Tensor scale, Tensor norm, int64_t stream) {
  const int64_t n = x.size(0);
  check(x, "x", x.scalar_type(), n * x.size(1), q);
  check(q, "q", q.scalar_type(), n * q.size(1), q);
  check(scale, "scale", accumulation_type(q), n, q);
  check(norm, "norm", accumulation_type(q), n, q);
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type() || (x.scalar_type() == ScalarType::BFloat16 &&
                                                         q.scalar_type() == ScalarType::Float),
                  "conr_kernels: q must have x's dtype, or float32 for bfloat16");
  const DeviceGuard guard(x);
  conr::launch_prepare(type_of(x), type_of(q), n, x.size(1), q.size(1), input(x), output(q),
                       output(scale), output(norm), stream_of(stream));
}

void bands(Tensor sorted_i, Tensor sorted_j, double reach, Tensor lo, Tensor hi, int64_t stream) {
  const int64_t n = sorted_i.numel();
  check(sorted_i, "sorted_i", ScalarType::Float, n, lo);
  check(sorted_j, "sorted_j", ScalarType::Float, sorted_j.numel(), lo);
  check(lo, "lo", ScalarType::Int, n, lo);
  check(hi, "hi", ScalarType::Int, n, lo);
  const DeviceGuard guard(lo);
  conr::launch_bands(n, sorted_j.numel(), static_cast<const float*>(input(sorted_i)),
                     static_cast<const float*>(input(sorted_j)), static_cast<float>(reach),
                     static_cast<int32_t*>(output(lo)), static_cast<int32_t*>(output(hi)),
                     stream_of(stream));
}

void forward(Tensor q, Tensor scale, Tensor y, Tensor p, std::optional<Tensor> w, Tensor poison,
             Tensor layout, int64_t self_offset, double window, double temperature,
             double push_scale, int64_t flags, Tensor sums, Tensor counts, Tensor loss,
             Tensor stats, int64_t stream) {
  const ScalarType dtype = accumulation_type(q);
  const int64_t n = loss.numel();
  const conr::Rows rows = rows_of(q, scale, y, p, layout, n, self_offset);
  if (w) check(*w, "w", dtype, n, q);
  check(poison, "poison", dtype, 2, q);
  check(sums, "sums", dtype, n * 5, q);
  check(counts, "counts", ScalarType::Int, n * 2, q);
  check(loss, "loss", dtype, n, q);
  check(stats, "stats", dtype, n * (flags & conr::kShifted ? 5 : 3), q);
  const DeviceGuard guard(q);
  const conr::Settings settings{static_cast<float>(window), temperature, push_scale,
                                static_cast<int>(flags)};
  const conr::RowOutputs outputs{w ? input(*w) : nullptr,
                                 input(poison),
                                 output(sums),
                                 static_cast<int32_t*>(output(counts)),
                                 output(loss),
                                 output(stats)};
  conr::launch_forward(type_of(q), rows, settings, outputs, stream_of(stream));
}

void backward(Tensor q, Tensor scale, Tensor y, Tensor p, Tensor coef_j, Tensor layout,
              int64_t self_offset, double window, double temperature, double push_scale,
              int64_t flags, Tensor G, int64_t stream) {
  const ScalarType dtype = accumulation_type(q);
  const int64_t n = G.size(0);
  const conr::Rows rows = rows_of(q, scale, y, p, layout, n, self_offset);
  check(coef_j, "coef_j", dtype, rows.n_keys * (flags & conr::kShifted ? 5 : 3), q);
  check(G, "G", dtype, n * rows.dim, q);
  const DeviceGuard guard(q);
  const conr::Settings settings{static_cast<float>(window), temperature, push_scale,
                                static_cast<int>(flags)};
  conr::launch_backward(type_of(q), rows, settings, input(coef_j), output(G), stream_of(stream));
}

void finish_gradient(Tensor x, Tensor norm, Tensor G, Tensor coef_i, double temperature,
                     Tensor gradient, int64_t stream) {
  const int64_t n = x.size(0);
  const ScalarType dtype = accumulation_type(x);
  check(x, "x", x.scalar_type(), n * x.size(1), x);
  check(norm, "norm", dtype, n, x);
  check(G, "G", dtype, n * G.size(1), x);
  check(coef_i, "coef_i", dtype, n * coef_i.size(1), x);
  check(gradient, "gradient", x.scalar_type(), n * x.size(1), x);
  STD_TORCH_CHECK(G.size(1) >= x.size(1) && coef_i.size(1) >= 3,
                  "conr_kernels: G or coef_i is too narrow");
  const DeviceGuard guard(x);
  conr::launch_finish_gradient(type_of(x), n, x.size(1), G.size(1),
                               static_cast<int>(coef_i.size(1)), temperature, input(x), input(norm),
                               input(G), input(coef_i), output(gradient), stream_of(stream));
}

}  // namespace

STABLE_TORCH_LIBRARY(conr_kernels_cuda, m) {
  m.def("prepare(Tensor x, Tensor(a!) q, Tensor(b!) scale, Tensor(c!) norm, int stream) -> ()");
  m.def(
      "bands(Tensor sorted_i, Tensor sorted_j, float reach, Tensor(a!) lo, Tensor(b!) hi, int "
      "stream)"
      " -> ()");
  m.def(
      "forward(Tensor q, Tensor scale, Tensor y, Tensor p, Tensor? w, Tensor poison, Tensor layout,"
      " int self_offset, float window, float temperature, float push_scale, int flags,"
      " Tensor(a!) sums, Tensor(b!) counts, Tensor(c!) loss, Tensor(d!) stats, int stream) -> ()");
  m.def(
      "backward(Tensor q, Tensor scale, Tensor y, Tensor p, Tensor coef_j, Tensor layout,"
      " int self_offset, float window, float temperature, float push_scale, int flags, Tensor(a!) "
      "G,"
      " int stream) -> ()");
  m.def(
      "finish_gradient(Tensor x, Tensor norm, Tensor G, Tensor coef_i, float temperature,"
      " Tensor(a!) gradient, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(conr_kernels_cuda, CONR_DISPATCH_KEY, m) {
  m.impl("prepare", TORCH_BOX(&prepare));
  m.impl("bands", TORCH_BOX(&bands));
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("finish_gradient", TORCH_BOX(&finish_gradient));
}
