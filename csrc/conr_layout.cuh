// The layout of the two sweeps: which component to sort by, exact bands, and what the sweeps serve.
#pragma once

#include "conr_tile.cuh"

namespace conr {
namespace {

__device__ float warp_max(float x) {
  for (int lane = 1; lane < 32; lane *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lane));
  return x;
}

// kExtentWarps warps for each component of y and then of p: max and −min over the keys.
__global__ void __launch_bounds__(kThreads) conr_extents_kernel(Args args) {
  const int64_t L = args.rows.n_components, lane = threadIdx.x % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t component = warp / kExtentWarps, part = warp % kExtentWarps;
  const float* column = component < L ? args.rows.y + component : args.rows.p + (component - L);
  float top = -INFINITY, bottom = -INFINITY;
  for (int64_t j = part * 32 + lane; j < args.rows.n_keys; j += kExtentWarps * 32) {
    top = fmaxf(top, column[j * L]);
    bottom = fmaxf(bottom, -column[j * L]);
  }
  top = warp_max(top);
  bottom = warp_max(bottom);
  if (lane == 0) {
    args.extents[warp * 2] = top;
    args.extents[warp * 2 + 1] = bottom;
  }
}

// The component of y (which = 0) or p (1) that differs most among the keys; asked by whole warps.
__device__ int widest_component(const Args& args, int which) {
  const int L = static_cast<int>(args.rows.n_components);
  if (args.extents == nullptr) return 0;
  int widest = 0;
  float width = -1;
  for (int component = 0; component < L; ++component) {
    const int part = (which * L + component) * kExtentWarps + threadIdx.x % kExtentWarps;
    const float top = warp_max(args.extents[part * 2]);
    const float bottom = warp_max(args.extents[part * 2 + 1]);
    if (top + bottom > width) {
      widest = component;
      width = top + bottom;
    }
  }
  return widest;
}

// One thread for a key, and an anchor, of one order: binary searches on |y_i − y_j| ≤ reach itself,
// as in sweep.py.
__global__ void __launch_bounds__(kThreads) conr_bands_kernel(Args args) {
  const int64_t N = args.rows.n_anchors, K = args.rows.n_keys, n_blocks = blocks_of(K, kThreads);
  const int64_t which = blockIdx.x / n_blocks;
  const int64_t n = blockIdx.x % n_blocks * kThreads + threadIdx.x;
  int32_t* keys = args.rows.layout + 2 + which * (K + 3 * N);
  int32_t *anchors = keys + K, *lo = anchors + N, *hi = lo + N;
  if (n < K) keys[n] = static_cast<int32_t>(args.order_j[which * K + n]);
  int64_t size = 0;
  if (n < N) {
    anchors[n] = static_cast<int32_t>(args.order_i[which * N + n] + args.rows.self_offset);
    const float y_i = args.sorted_i[which * N + n];
    int64_t bounds[2];
    for (int side = 0; side < 2; ++side) {
      int64_t low = 0, high = K;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        const float y_j = args.sorted_j[which * K + middle];
        const bool found = side == 0 ? y_i - y_j <= args.reach : !(y_j - y_i <= args.reach);
        if (found) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      bounds[side] = low;
    }
    size = bounds[1] > bounds[0] ? bounds[1] - bounds[0] : 0;
    lo[n] = static_cast<int32_t>(bounds[0]);
    hi[n] = static_cast<int32_t>(bounds[0] + size);
  }
  size = row_sum(size, 32);
  if (threadIdx.x % 32 == 0)
    args.sizes[static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32] = size;
}

// One warp: two sweeps, or one over all pairs for both masks where the bands hold most of them.
__global__ void __launch_bounds__(32) conr_choose_kernel(Args args) {
  const int64_t N = args.rows.n_anchors, K = args.rows.n_keys;
  const auto size = static_cast<double>(sum_of(args.sizes, 2 * blocks_of(K, kThreads) * kWarps));
  const bool is_dense = size > args.share * static_cast<double>(N) * static_cast<double>(K);
  if (threadIdx.x != 0) return;
  args.rows.layout[0] = is_dense ? kPositives | kNegatives : kPositives;
  args.rows.layout[1] = is_dense ? 0 : kNegatives;
}

}  // namespace
}  // namespace conr
