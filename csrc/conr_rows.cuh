// What is done row by row, before and after the sweeps.
#pragma once

#include "conr_sweep.cuh"

namespace conr {
namespace {

// One thread a row.
template <class A>
__global__ void __launch_bounds__(kThreads) conr_finish_rows_kernel(ForwardArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.rows.n_anchors) return;
  const int flags = args.settings.flags;
  const A* sums = static_cast<const A*>(args.out.sums) + i * 5;
  const double w = args.out.w ? static_cast<double>(read<A>(args.out.w, i)) : 1.0;
  const double rate = (flags & kRateIsScaled ? args.settings.push_scale : 1.0) *
                      (flags & kRateIsWeighted ? w : 1.0);
  RowSums row;
  row.log_E = static_cast<double>(sums[0]) * kLn2 + log(static_cast<double>(sums[1]));
  row.log_B = static_cast<double>(sums[2]) * kLn2 + log(static_cast<double>(sums[3]));
  row.s_sum = sums[4];
  row.n = args.out.counts[i * 2];
  row.m = args.out.counts[i * 2 + 1];
  double loss;
  Coefficients<double> stats;
  const double poison = read<A>(args.out.poison, 0), n_absent = read<A>(args.out.poison, 1);
  finish_row(row, args.rows.n_keys - n_absent, w, rate, flags, &loss, &stats);
  static_cast<A*>(args.out.loss)[i] = static_cast<A>(loss + poison);
  A* out = static_cast<A*>(args.out.stats);
  if (flags & kShifted) {
    out += i * 5;
    out[0] = static_cast<A>(stats.alpha + poison);
    out[1] = static_cast<A>(stats.beta + poison);
    out[2] = static_cast<A>(stats.gamma + poison);
    out[3] = static_cast<A>(stats.log_alpha + poison);
    out[4] = static_cast<A>(stats.log_gamma + poison);
  } else {
    out += i * 3;
    out[0] = static_cast<A>(stats.alpha * exp(stats.log_alpha) + poison);
    out[1] = static_cast<A>(stats.beta + poison);
    out[2] = static_cast<A>(stats.gamma * exp(stats.log_gamma) + poison);
  }
}

struct PrepareArgs {
  int64_t n, x_dim, q_dim;
  const void* x;
  void *q, *scale, *norm;
};

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

constexpr int kWarps = kThreads / 32;

// One warp a row: norms, and rows of q with q·scale = x/‖x‖. 16-bit rows are scaled by a power of
// two only, which loses nothing and keeps every product in range.
template <class X, class Q, class A>
__global__ void __launch_bounds__(kThreads) conr_prepare_kernel(PrepareArgs args) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= args.n) return;
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
  Q* q = static_cast<Q*>(args.q) + row * args.q_dim;
  for (int64_t d = lane; d < args.q_dim; d += 32)
    save(q + d, d < args.x_dim ? static_cast<A>(load(x + d)) * factor : A(0));
  if (lane == 0) {
    static_cast<A*>(args.scale)[row] = scale;
    static_cast<A*>(args.norm)[row] = norm;
  }
}

struct FinishGradientArgs {
  int64_t n, x_dim, q_dim;
  int n_stats;
  double temperature;
  const void *x, *norm, *G, *coef;
  void* gradient;
};

// One warp a row: ∂L/∂x_i = (∂L/∂q_i − q_i (q_i·∂L/∂q_i)) / ‖x_i‖.
template <class X, class A>
__global__ void __launch_bounds__(kThreads) conr_finish_gradient_kernel(FinishGradientArgs args) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= args.n) return;
  const X* x = static_cast<const X*>(args.x) + row * args.x_dim;
  const A* G = static_cast<const A*>(args.G) + row * args.q_dim;
  X* gradient = static_cast<X*>(args.gradient) + row * args.x_dim;
  const A norm = read<A>(args.norm, row);
  const A inverse = norm > A(0) ? A(1) / norm : A(0);
  A poison = 0;
  for (int k = 0; k < 3; ++k) poison += read<A>(args.coef, row * args.n_stats + k) * A(0);
  Sum<A> products;
  for (int64_t d = lane; d < args.x_dim; d += 32)
    products.add(static_cast<A>(load(x + d)) * inverse * G[d]);
  const A radial = row_sum(products.value(), 32);
  const A rate = A(1 / args.temperature);
  for (int64_t d = lane; d < args.x_dim; d += 32) {
    const A q = static_cast<A>(load(x + d)) * inverse;
    save(gradient + d, (G[d] - q * radial) * rate * inverse + poison);
  }
}

struct BandsArgs {
  int64_t n_anchors, n_keys;
  const float *sorted_i, *sorted_j;
  float reach;
  int32_t *lo, *hi;
};

// One thread an anchor: binary searches on the predicate |y_i − y_j| ≤ reach itself, as in
// sweep.py.
__global__ void __launch_bounds__(kThreads) conr_bands_kernel(BandsArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.n_anchors) return;
  const float y_i = args.sorted_i[i];
  int64_t bounds[2];
  for (int side = 0; side < 2; ++side) {
    int64_t low = 0, high = args.n_keys;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      const float y_j = args.sorted_j[middle];
      const bool found = side == 0 ? y_i - y_j <= args.reach : !(y_j - y_i <= args.reach);
      if (found) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    bounds[side] = low;
  }
  args.lo[i] = static_cast<int32_t>(bounds[0]);
  args.hi[i] = static_cast<int32_t>(bounds[1] > bounds[0] ? bounds[1] : bounds[0]);
}

}  // namespace
}  // namespace conr
