// The operators, on PyTorch's stable ABI: tensors, allocated by backend.py, are checked here, what
// else the kernels need is allocated, and one call of each launches them all.
#include "conr_launch.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>

#include <conr_scratch.h>

#ifndef CONR_DISPATCH_KEY
#define CONR_DISPATCH_KEY CUDA
#endif

namespace {

using conr::Part;
using conr::Type;
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

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Type::kFloat64;
    case ScalarType::Float: return Type::kFloat32;
    case ScalarType::Half: return Type::kFloat16;
    case ScalarType::BFloat16: return Type::kBFloat16;
    default: STD_TORCH_CHECK(false, "conr_kernels: features must be of a floating dtype");
  }
  return Type::kFloat32;
}

int64_t bytes_of(Type type) {
  return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2;
}

// Of sums and statistics.
ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The tensor's memory, where it is what it has to be.
template <class T>
T* numbers(const Tensor& tensor, const char* name, ScalarType asked, int64_t numel,
           const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == asked, "conr_kernels: ", name, " has a wrong dtype");
  STD_TORCH_CHECK(tensor.numel() == numel, "conr_kernels: ", name, " has ", tensor.numel(),
                  " elements, not ", numel);
  STD_TORCH_CHECK(tensor.is_contiguous(), "conr_kernels: ", name, " must be contiguous");
  STD_TORCH_CHECK(tensor.get_device_index() == like.get_device_index(), "conr_kernels: ", name,
                  " is on another device");
  return static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

template <class T>
T* numbers(const std::optional<Tensor>& tensor, const char* name, ScalarType asked, int64_t numel,
           const Tensor& like) {
  return tensor ? numbers<T>(*tensor, name, asked, numel, like) : nullptr;
}

// What both operators are given.
conr::Args args_of(const Tensor& x, const Tensor& y, const Tensor& p, const Tensor& layout,
                   int64_t n_anchors, int64_t self_offset, const conr::Settings& settings) {
  conr::Args args{};
  args.x_type = type_of(x);
  args.q_type = settings.flags & conr::kWidened ? Type::kFloat32 : args.x_type;
  args.settings = settings;
  const int64_t K = x.size(0), D = x.size(1), L = y.size(1);
  STD_TORCH_CHECK(args.q_type == args.x_type || args.x_type == Type::kBFloat16,
                  "conr_kernels: float32 stands for bfloat16 alone");
  STD_TORCH_CHECK(D <= INT32_MAX / 16, "conr_kernels: x must have fewer than 2^27 columns");
  STD_TORCH_CHECK(self_offset >= 0 && self_offset + n_anchors <= K && K < INT32_MAX,
                  "conr_kernels: anchors must be among the keys, and fewer than 2^31");
  const int64_t n_layout = layout.numel() == 0 ? 0 : 2 + 2 * (K + 3 * n_anchors);
  auto* given_layout = numbers<int32_t>(layout, "layout", ScalarType::Int, n_layout, x);
  const auto* of_y = numbers<const float>(y, "y", ScalarType::Float, K * L, x);
  const auto* of_p = numbers<const float>(p, "p", ScalarType::Float, K * L, x);
  args.rows = {n_anchors, K,    (D + 7) / 8 * 8, L,    self_offset, nullptr,
               nullptr,   of_y, of_p,            n_layout == 0 ? nullptr : given_layout};
  args.x_dim = D;
  args.x = numbers<const void>(x, "x", x.scalar_type(), K * D, x);
  return args;
}

// Sorts each row: its numbers in their order, and where they were.
std::array<Tensor, 2> sorted(const Tensor& values) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(values), from(std::optional<bool>(true)),
                                    from(int64_t{-1}), from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// Prepares the rows; sorts them, and writes the layout.
void prepare_banded(conr::Args& args, const Tensor& x, double window, cudaStream_t stream) {
  const conr::Rows& rows = args.rows;
  Tensor values = torch::stable::new_empty(x, {2, rows.n_keys}, ScalarType::Float);
  args.values = static_cast<float*>(values.mutable_data_ptr());
  conr::launch_prepare(args, stream);
  const std::array<Tensor, 2> keys = sorted(values);
  const std::array<Tensor, 2> anchors =
      rows.n_anchors == rows.n_keys
          ? keys
          : sorted(torch::stable::narrow(values, 1, rows.self_offset, rows.n_anchors));
  args.sorted_i = static_cast<const float*>(anchors[0].const_data_ptr());
  args.sorted_j = static_cast<const float*>(keys[0].const_data_ptr());
  args.order_i = static_cast<const int64_t*>(anchors[1].const_data_ptr());
  args.order_j = static_cast<const int64_t*>(keys[1].const_data_ptr());
  // |Δ_c| ≤ L·d (mae), √L·d (rmse) for every component c; the margin covers d's rounding, down to
  // squares that underflow.
  const auto L = static_cast<double>(rows.n_components);
  const double widening = args.settings.flags & conr::kRmse ? std::sqrt(L) : L;
  args.reach = static_cast<float>(L > 1 ? window * widening * (1 + 1e-5) + 1e-18 : window);
  conr::launch_layout(args, stream);
}

void forward(Tensor x, Tensor y, Tensor p, std::optional<Tensor> w, std::optional<Tensor> n_absent,
             int64_t self_offset, double window, double temperature, double push_scale,
             int64_t flags, double share, double factor, Tensor layout, Tensor stats,
             std::optional<Tensor> labels, std::optional<Tensor> loss, std::optional<Tensor> total,
             int64_t stream_address) {
  const int64_t N = stats.size(0), K = x.size(0), L = y.size(1);
  const ScalarType dtype = accumulation_type(x);
  conr::Args args = args_of(
      x, y, p, layout, N, self_offset,
      {static_cast<float>(window), temperature, push_scale, static_cast<int>(flags)});
  args.factor = factor;
  args.share = share;
  args.w = numbers<const void>(w, "w", dtype, N, x);
  args.n_absent = numbers<const int64_t>(n_absent, "n_absent", ScalarType::Long, 1, x);
  args.labels = numbers<float>(labels, "labels", ScalarType::Float, 2 * K * L, x);
  args.stats = numbers<void>(stats, "stats", dtype, N * (flags & conr::kShifted ? 5 : 3), x);
  args.loss = numbers<void>(loss, "loss", dtype, N, x);
  args.total = numbers<void>(total, "total", dtype, 1, x);
  if (N == 0) return;

  const DeviceGuard guard(x);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  const bool is_banded = args.rows.layout != nullptr, has_extents = is_banded && L > 1;
  const int64_t a = dtype == ScalarType::Double ? 8 : 4;
  const auto warps_of = [](int64_t n) {
    return conr::blocks_of(n, conr::kThreads) * conr::kWarps;
  };
  const auto memory = conr::allocate(
      x, {Part("q", args.rows.q, K * args.rows.dim, bytes_of(args.q_type)),
          Part("scale", args.rows.scale, K, a), Part("norm", args.norm, K, a),
          Part("verdicts", args.verdicts, conr::prepare_blocks(K)),
          Part("sums", args.sums, N * 5, a), Part("counts", args.counts, N * 2),
          Part("subtotals", args.subtotals, warps_of(N)),
          Part("sizes", args.sizes, is_banded ? 2 * warps_of(K) : 0),
          Part("extents", args.extents, has_extents ? 2 * L * conr::kExtentWarps * 2 : 0)});
  if (!has_extents) args.extents = nullptr;
  if (is_banded) {
    prepare_banded(args, x, window, stream);
  } else {
    conr::launch_prepare(args, stream);
  }
  conr::launch_forward(args, stream);
}

void backward(Tensor x, Tensor y, Tensor p, int64_t self_offset, double window, double temperature,
              double push_scale, int64_t flags, double factor, Tensor layout, Tensor coef,
              std::optional<Tensor> upstream, Tensor gradient, int64_t stream_address) {
  const int64_t N = gradient.size(0), K = x.size(0);
  const ScalarType dtype = accumulation_type(x);
  conr::Args args = args_of(
      x, y, p, layout, N, self_offset,
      {static_cast<float>(window), temperature, push_scale, static_cast<int>(flags)});
  args.factor = factor;
  args.coef = numbers<const void>(coef, "coef", dtype, K * (flags & conr::kShifted ? 5 : 3), x);
  args.upstream = numbers<const void>(upstream, "upstream", dtype, 1, x);
  args.gradient = numbers<void>(gradient, "gradient", x.scalar_type(), N * args.x_dim, x);
  if (N == 0) return;

  const DeviceGuard guard(x);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  const int64_t a = dtype == ScalarType::Double ? 8 : 4;
  const auto memory =
      conr::allocate(x, {Part("q", args.rows.q, K * args.rows.dim, bytes_of(args.q_type)),
                         Part("scale", args.rows.scale, K, a), Part("norm", args.norm, K, a),
                         Part("G", args.G, N * args.rows.dim, a)});
  conr::launch_prepare(args, stream);
  conr::launch_sweeps_backward(args, stream);
  conr::launch_finish_gradient(args, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY(conr_kernels_cuda, m) {
  m.def(
      "forward(Tensor x, Tensor y, Tensor p, Tensor? w, Tensor? n_absent, int self_offset,"
      " float window, float temperature, float push_scale, int flags, float share, float factor,"
      " Tensor(a!) layout, Tensor(b!) stats, Tensor(c!)? labels, Tensor(d!)? loss,"
      " Tensor(e!)? total, int stream) -> ()");
  m.def(
      "backward(Tensor x, Tensor y, Tensor p, int self_offset, float window, float temperature,"
      " float push_scale, int flags, float factor, Tensor layout, Tensor coef, Tensor? upstream,"
      " Tensor(a!) gradient, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(conr_kernels_cuda, CONR_DISPATCH_KEY, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}
