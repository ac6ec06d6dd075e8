// What conr_ops.cpp hands to the launchers of conr_cuda.cu. All pointers are device pointers, rows
// are contiguous, offsets are 64-bit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace conr {

enum class Type { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Anchors i are the keys with ids self_offset … self_offset + n_anchors − 1.
struct Rows {
  int64_t n_anchors, n_keys;
  int64_t dim;           // columns of q and G, a multiple of 8
  int64_t n_components;  // L
  int64_t self_offset;
  const void* q;          // [n_keys, dim] Type: q_j / scale_j
  const void* scale;      // [n_keys] accumulation type
  const float* y;         // [n_keys, L]
  const float* p;         // [n_keys, L]
  const int32_t* layout;  // cuda_backend.py's, or null: one sweep over all pairs in the given order
};

struct Settings {
  float window;
  double temperature, push_scale;
  int flags;  // conr_math.cuh
};

struct RowOutputs {
  const void* w;       // [n_anchors] accumulation type, or null for 1
  const void* poison;  // [2] accumulation type: 0, or NaN where an input is not finite; absent keys
  void* sums;          // [n_anchors, 5] accumulation type: shift and sum of E, of B; Σ_P s
  int32_t* counts;     // [n_anchors, 2]: n_i; positive where m_i is
  void* loss;          // [n_anchors]
  void* stats;         // [n_anchors, 3 or 5]
};

void launch_prepare(Type x_type, Type q_type, int64_t n, int64_t x_dim, int64_t q_dim,
                    const void* x, void* q, void* scale, void* norm, cudaStream_t stream);

void launch_bands(int64_t n_anchors, int64_t n_keys, const float* sorted_i, const float* sorted_j,
                  float reach, int32_t* lo, int32_t* hi, cudaStream_t stream);

void launch_forward(Type q_type, const Rows& rows, const Settings& settings,
                    const RowOutputs& outputs, cudaStream_t stream);

// Adds τ ∂L/∂q_i to G [n_anchors, dim]; coef [n_keys, 3 or 5].
void launch_backward(Type q_type, const Rows& rows, const Settings& settings, const void* coef,
                     void* G, cudaStream_t stream);

void launch_finish_gradient(Type x_type, int64_t n, int64_t x_dim, int64_t q_dim, int n_stats,
                            double temperature, const void* x, const void* norm, const void* G,
                            const void* coef, void* gradient, cudaStream_t stream);

}  // namespace conr
