// What is done row by row, before and after the sweeps.
#pragma once

#include "conr_layout.cuh"
#include "conr_sweep.cuh"

namespace conr {
namespace {

__device__ float load(const float* x) {
  return *x;
}
__device__ double load(const double* x) {
  return *x;
}
__device__ float load(const Half* x) {
  return to_float(*x);
}
__device__ float load(const BFloat16* x) {
  return __uint_as_float(static_cast<uint32_t>(x->bits) << 16);
}
__device__ void save(float* x, float value) {
  *x = value;
}
__device__ void save(double* x, double value) {
  *x = value;
}
__device__ void save(Half* x, float value) {
  *x = to_half(value);
}
__device__ void save(BFloat16* x, float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  x->bits = static_cast<uint16_t>((value == value ? rounded : bits | 0x400000) >> 16);
}

template <class A>
__device__ bool is_finite(A x) {
  return x - x == A(0);
}

// Calls work(k) for all k < n, shared among the threads that prepare.
template <class Work>
__device__ void share_out(const Args& args, int64_t n, Work work) {
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; k < n;
       k += prepare_blocks(args.rows.n_keys) * kThreads)
    work(k);
}

// One warp a row: norms, and rows of q with q·scale = x/‖x‖. 16-bit rows are scaled by a power of
// two only, which loses nothing and keeps every product in range. Then, one thread a number, what
// else is to be read or written before the sweeps.
template <class X, class Q, class A>
__global__ void __launch_bounds__(kThreads, 8) conr_prepare_kernel(Args args) {
  const Rows& rows = args.rows;
  const int lane = threadIdx.x % 32;
  bool is_bad = false;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
       row < rows.n_keys; row += prepare_blocks(args.rows.n_keys) * kWarps) {
    const X* x = static_cast<const X*>(args.x) + row * args.x_dim;
    Sum<A> squares;
    for (int64_t d = lane; d < args.x_dim; d += 32) {
      const A value = load(x + d);
      squares.add(value * value);
    }
    const A norm = sqrt(row_sum(squares.value(), 32));
    const A inverse = norm > A(0) ? A(1) / norm : A(0);
    A factor = inverse, scale = norm > A(0) ? A(1) : A(0);
    if (sizeof(Q) == 2 && norm > A(0) && norm < A(INFINITY)) {
      const int exponent = ilogb(norm);
      factor = ldexp(A(1), -exponent);
      scale = ldexp(inverse, exponent);
    }
    Q* q = static_cast<Q*>(rows.q) + row * rows.dim;
    for (int64_t d = lane; d < rows.dim; d += 32)
      save(q + d, d < args.x_dim ? static_cast<A>(load(x + d)) * factor : A(0));
    if (lane == 0) {
      static_cast<A*>(rows.scale)[row] = scale;
      static_cast<A*>(args.norm)[row] = norm;
    }
    is_bad |= !is_finite(norm);
  }

  const int64_t N = rows.n_anchors, K = rows.n_keys, L = rows.n_components;
  share_out(args, K * L, [&](int64_t n) {
    is_bad |= !is_finite(rows.y[n]) || !is_finite(rows.p[n]);
    if (args.labels == nullptr) return;
    args.labels[n] = rows.y[n];
    args.labels[K * L + n] = rows.p[n];
  });
  if (args.values != nullptr) {
    const int64_t of_y = widest_component(args, 0), of_p = widest_component(args, 1);
    share_out(args, K, [&](int64_t j) {
      args.values[j] = rows.y[j * L + of_y];
      args.values[K + j] = rows.p[j * L + of_p];
    });
  }
  if (args.w != nullptr)
    share_out(args, N, [&](int64_t i) { is_bad |= !is_finite(read<A>(args.w, i)); });
  if (args.G != nullptr)
    share_out(args, N * rows.dim, [&](int64_t n) { static_cast<A*>(args.G)[n] = A(0); });
  is_bad = __syncthreads_or(is_bad);
  if (args.verdicts != nullptr && threadIdx.x == 0) args.verdicts[blockIdx.x] = is_bad;
}

// One thread a row.
template <class A>
__global__ void __launch_bounds__(kThreads) conr_finish_rows_kernel(Args args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  bool is_bad = false;
  for (int64_t k = threadIdx.x; k < prepare_blocks(args.rows.n_keys); k += kThreads)
    is_bad |= args.verdicts[k];
  const double poison = __syncthreads_or(is_bad) ? NAN : 0.0;
  double loss = 0.0;
  if (i < args.rows.n_anchors) {
    const int flags = args.settings.flags;
    const A* sums = static_cast<const A*>(args.sums) + i * 5;
    const double w = args.w ? static_cast<double>(read<A>(args.w, i)) : 1.0;
    const double rate = (flags & kRateIsScaled ? args.settings.push_scale : 1.0) *
                        (flags & kRateIsWeighted ? w : 1.0);
    RowSums row;
    row.log_E = static_cast<double>(sums[0]) * kLn2 + log(static_cast<double>(sums[1]));
    row.log_B = static_cast<double>(sums[2]) * kLn2 + log(static_cast<double>(sums[3]));
    row.s_sum = sums[4];
    row.n = args.counts[i * 2];
    row.m = args.counts[i * 2 + 1];
    Coefficients<double> stats;
    const int64_t n_absent = args.n_absent ? *args.n_absent : 0;
    finish_row(row, args.rows.n_keys - n_absent, w, rate, flags, &loss, &stats);
    loss += poison;
    if (args.loss != nullptr) static_cast<A*>(args.loss)[i] = static_cast<A>(loss);
    A* out = static_cast<A*>(args.stats) + i * (flags & kShifted ? 5 : 3);
    if (flags & kShifted) {
      out[3] = static_cast<A>(stats.log_alpha + poison);
      out[4] = static_cast<A>(stats.log_gamma + poison);
    } else {
      stats.alpha *= exp(stats.log_alpha);
      stats.gamma *= exp(stats.log_gamma);
    }
    out[0] = static_cast<A>(stats.alpha + poison);
    out[1] = static_cast<A>(stats.beta + poison);
    out[2] = static_cast<A>(stats.gamma + poison);
  }
  if (args.total == nullptr) return;
  loss = row_sum(loss, 32);
  if (threadIdx.x % 32 == 0) args.subtotals[i / 32] = loss;
}

// One warp: the reduced loss.
template <class A>
__global__ void __launch_bounds__(32) conr_total_kernel(Args args) {
  const double total = sum_of(args.subtotals, blocks_of(args.rows.n_anchors, 32));
  if (threadIdx.x == 0) *static_cast<A*>(args.total) = static_cast<A>(total * args.factor);
}

// One warp a row: ∂L/∂x_i = (∂L/∂q_i − q_i (q_i·∂L/∂q_i)) / ‖x_i‖.
template <class X, class A>
__global__ void __launch_bounds__(kThreads) conr_finish_gradient_kernel(Args args) {
  const Rows& rows = args.rows;
  const int lane = threadIdx.x % 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= rows.n_anchors) return;
  const int64_t id = i + rows.self_offset;
  const X* x = static_cast<const X*>(args.x) + id * args.x_dim;
  const A* G = static_cast<const A*>(args.G) + i * rows.dim;
  X* gradient = static_cast<X*>(args.gradient) + i * args.x_dim;
  const A norm = read<A>(args.norm, id);
  const A inverse = norm > A(0) ? A(1) / norm : A(0);
  const int n_stats = args.settings.flags & kShifted ? 5 : 3;
  A poison = upstream_of<A>(args) * A(0);
  for (int k = 0; k < 3; ++k) poison += read<A>(args.coef, id * n_stats + k) * A(0);
  Sum<A> products;
  for (int64_t d = lane; d < args.x_dim; d += 32)
    products.add(static_cast<A>(load(x + d)) * inverse * G[d]);
  const A radial = row_sum(products.value(), 32);
  const A rate = A(1 / args.settings.temperature);
  for (int64_t d = lane; d < args.x_dim; d += 32) {
    const A q = static_cast<A>(load(x + d)) * inverse;
    save(gradient + d, (G[d] - q * radial) * rate * inverse + poison);
  }
}

}  // namespace
}  // namespace conr
