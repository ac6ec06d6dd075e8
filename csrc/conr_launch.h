// What conr_ops.cpp hands to the launchers of conr_cuda.cu. All pointers are device pointers, rows
// are contiguous, offsets are 64-bit; A is the accumulation type.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "conr_math.cuh"

namespace conr {

enum class Type { kFloat32, kFloat64, kFloat16, kBFloat16 };

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
// Warps that share the keys where a component's extent is found.
constexpr int kExtentWarps = 32;

// ⌈work / share⌉
CONR_HD int64_t blocks_of(int64_t work, int64_t share) {
  return (work + share - 1) / share;
}

// Blocks that prepare this many keys: no more than a GPU runs at once, for few verdicts.
CONR_HD int64_t prepare_blocks(int64_t n_keys) {
  return n_keys < 2048 * kWarps ? blocks_of(n_keys, kWarps) : 2048;
}

// Anchors i are the keys with ids self_offset … self_offset + n_anchors − 1.
struct Rows {
  int64_t n_anchors, n_keys;
  int64_t dim;           // columns of q and G, a multiple of 8
  int64_t n_components;  // L
  int64_t self_offset;
  void* q;          // [n_keys, dim] q_type: q_j / scale_j
  void* scale;      // [n_keys] A
  const float* y;   // [n_keys, L]
  const float* p;   // [n_keys, L]
  int32_t* layout;  // backend.py's, or null: one sweep over all pairs in the given order
};

struct Settings {
  float window;
  double temperature, push_scale;
  int flags;  // conr_math.cuh
};

// All that the kernels of a call are given, each what it names.
struct Args {
  Type x_type, q_type;
  Rows rows;
  Settings settings;
  int64_t x_dim;
  const void* x;       // [n_keys, x_dim]
  void* norm;          // [n_keys] A: ‖x‖
  double factor;       // of the sum of the losses in `total`, and of the coefficients
  // Forward; null where there is none.
  const void* w;            // [n_anchors] A, or null for 1
  const int64_t* n_absent;  // keys that unit terms do not count, or null for 0
  float* labels;            // [2, n_keys, L]: copies of y and p
  int32_t* verdicts;        // [prepare_blocks]: whether some number was not finite
  void* sums;               // [n_anchors, 5] A: shift and sum of E, of B; Σ_P s
  int32_t* counts;          // [n_anchors, 2]: n_i; positive where m_i is
  void* stats;              // [n_anchors, 3 or 5] A
  void* loss;               // [n_anchors] A
  double* subtotals;        // of the losses, for each warp
  void* total;              // A
  // To write the layout.
  float* extents;                    // [2, L, kExtentWarps, 2]: max and −min; null for L = 1
  float* values;                     // [2, n_keys]: what to sort y and p by
  const float *sorted_i, *sorted_j;  // [2, n_anchors], [2, n_keys]: values in their order
  const int64_t *order_i, *order_j;  // likewise: where they were
  float reach;                       // of the bands
  double share;                      // of all pairs that the bands hold from which one sweep serves
  int64_t* sizes;                    // for each warp: keys in the bands of its anchors
  // Backward.
  const void* coef;      // [n_keys, 3 or 5] A
  const void* upstream;  // A: a factor of the coefficients, or null for 1
  void* G;               // [n_anchors, dim] A: τ ∂L/∂q_i
  void* gradient;        // [n_anchors, x_dim]
  int which;             // of the sweeps
};

// q, scale, norm, and what there is of labels, verdicts, values and G = 0.
void launch_prepare(const Args& args, cudaStream_t stream);
void launch_layout(const Args& args, cudaStream_t stream);
void launch_forward(const Args& args, cudaStream_t stream);
// Adds to G.
void launch_sweeps_backward(const Args& args, cudaStream_t stream);
void launch_finish_gradient(const Args& args, cudaStream_t stream);

}  // namespace conr
