// Tiles of kRows anchors × kCols keys on a block of 128 threads: staging in shared memory and the
// two matrix products of a tile, on CUDA cores (float32, float64) or tensor cores (16-bit).
#pragma once

#include <cstdint>

#include "conr_launch.h"

#include <conr_ptx.cuh>

namespace conr {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

// CUDA cores: thread (ty, tx) owns rows ty + 8r and columns tx + 16c; 16 lanes share a row.
template <class T_>
struct ScalarEngine {
  using T = T_;
  using A = T_;
  using V = Vector<T>;
  static constexpr bool kWide = sizeof(T) == 8;
  static constexpr int kR = kWide ? 4 : 8;
  static constexpr int kC = kWide ? 2 : 4;
  static constexpr int kRows = 8 * kR;
  static constexpr int kCols = 16 * kC;
  static constexpr int kDepth = 32;  // columns of q in shared memory at once
  static constexpr int kPitch = kDepth + V::kSize;
  static constexpr int kPairPitch = kCols + 16 / static_cast<int>(sizeof(A));
  static constexpr int kG = kDepth / 16;  // gradient columns of a thread
  static constexpr int kLanes = 16;
  static constexpr bool kHIsShared = true;    // H passes through shared memory
  static constexpr bool kRowsAreUnit = true;  // scale_j = 1

  static __device__ int row(int r) { return static_cast<int>(threadIdx.x) / 16 + 8 * r; }
  static __device__ int col(int c) { return static_cast<int>(threadIdx.x) % 16 + 16 * c; }
  static __device__ int depth(int g) { return static_cast<int>(threadIdx.x) % 16 * kG + g; }

  static __device__ void product(A (&s)[kR][kC], const T* q_i, const T* q_j, int depth) {
#pragma unroll 1
    for (int k = 0; k < depth; k += V::kSize) {
      V a[kR], b[kC];
#pragma unroll
      for (int r = 0; r < kR; ++r) a[r] = *reinterpret_cast<const V*>(q_i + row(r) * kPitch + k);
#pragma unroll
      for (int c = 0; c < kC; ++c) b[c] = *reinterpret_cast<const V*>(q_j + col(c) * kPitch + k);
#pragma unroll
      for (int v = 0; v < V::kSize; ++v)
#pragma unroll
        for (int r = 0; r < kR; ++r)
#pragma unroll
          for (int c = 0; c < kC; ++c) s[r][c] += a[r].v[v] * b[c].v[v];
    }
  }

  static __device__ void apply(A (&G)[kR][kG], const A (&)[kR][kC], const A* H, const T* q_j, int) {
#pragma unroll 1
    for (int j = 0; j < kCols; j += V::kSize) {
      V h[kR];
#pragma unroll
      for (int r = 0; r < kR; ++r) h[r] = *reinterpret_cast<const V*>(H + row(r) * kPairPitch + j);
#pragma unroll
      for (int v = 0; v < V::kSize; ++v) {
        T b[kG];
#pragma unroll
        for (int g = 0; g < kG; ++g) b[g] = q_j[(j + v) * kPitch + depth(g)];
#pragma unroll
        for (int r = 0; r < kR; ++r)
#pragma unroll
          for (int g = 0; g < kG; ++g) G[r][g] += h[r].v[v] * b[g];
      }
    }
  }

  // 16-bit products need their left operand scaled; these do not.
  struct Scaling {
    template <int kN>
    __device__ void fit(A (&)[kR][kC], A (&)[kN][kR][kG]) {}
    __device__ A undo(int) const { return A(1); }
  };
};

// Tensor cores: a warp owns 16 rows, in the accumulator layout of mma.m16n8k16; 4 lanes share a
// row.
template <class T_>
struct TensorEngine {
  using T = T_;
  using A = float;
  using V = Vector<T>;
  static constexpr int kR = 2;
  static constexpr int kC = 16;
  static constexpr int kRows = 64;
  static constexpr int kCols = 64;
  static constexpr int kDepth = 128;
  static constexpr int kPitch = kDepth + V::kSize;
  static constexpr int kPairPitch = kCols + 16 / static_cast<int>(sizeof(A));
  static constexpr int kG = kDepth / 4;
  static constexpr int kLanes = 4;
  static constexpr bool kHIsShared = false;
  static constexpr bool kRowsAreUnit = false;

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ int first_row() { return static_cast<int>(threadIdx.x) / 32 * 16; }
  static __device__ int row(int r) { return first_row() + lane() / 4 + 8 * r; }
  static __device__ int col(int c) { return c / 2 * 8 + lane() % 4 * 2 + c % 2; }
  static __device__ int depth(int g) { return col(g); }

  static __device__ void product(A (&s)[kR][kC], const T* q_i, const T* q_j, int depth) {
    const int l = lane();
    const T* a_row = q_i + (first_row() + l % 16) * kPitch + l / 16 * 8;
    const T* b_row = q_j + (l % 8 + l / 16 * 8) * kPitch + l / 8 % 2 * 8;
#pragma unroll 2
    for (int k = 0; k < depth; k += 16) {
      uint32_t a[4];
      load_matrices(a, a_row + k);
#pragma unroll
      for (int n = 0; n < kCols / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, b_row + n * 16 * kPitch + k);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int c = n * 4 + half * 2;
          mma(T{}, s[0][c], s[0][c + 1], s[1][c], s[1][c + 1], a, b[2 * half], b[2 * half + 1]);
        }
      }
    }
  }

  // The accumulators of H are, rounded to 16 bits, the left operand of the second product.
  static __device__ void apply(A (&G)[kR][kG], const A (&H)[kR][kC], const A*, const T* q_j,
                               int depth) {
    const int l = lane();
    const T* b_row = q_j + l % 16 * kPitch + l / 16 * 8;
#pragma unroll
    for (int k = 0; k < kCols / 16; ++k) {
      const uint32_t a[4] = {
          pack(T{}, H[0][4 * k], H[0][4 * k + 1]), pack(T{}, H[1][4 * k], H[1][4 * k + 1]),
          pack(T{}, H[0][4 * k + 2], H[0][4 * k + 3]), pack(T{}, H[1][4 * k + 2], H[1][4 * k + 3])};
#pragma unroll
      for (int n = 0; n < kDepth / 16; ++n) {
        if (n * 16 >= depth) break;
        uint32_t b[4];
        load_matrices_transposed(b, b_row + k * 16 * kPitch + n * 16);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int g = n * 4 + half * 2;
          mma(T{}, G[0][g], G[0][g + 1], G[1][g], G[1][g + 1], a, b[2 * half], b[2 * half + 1]);
        }
      }
    }
  }

  // float16 has 5 bits of exponent, H any magnitude: each row of H is scaled by a power of two that
  // brings its largest element so far below 2^15. bfloat16 has float32's exponents and needs
  // nothing.
  struct Scaling {
    static constexpr bool kNeeded = T::kExponentBits < 8;
    int exponent[kR];

    __device__ Scaling() {
      for (int r = 0; r < kR; ++r) exponent[r] = -100;
    }

    template <int kN>
    __device__ void fit(A (&H)[kR][kC], A (&G)[kN][kR][kG]) {
      if constexpr (kNeeded) {
#pragma unroll
        for (int r = 0; r < kR; ++r) {
          A top = 0;
#pragma unroll
          for (int c = 0; c < kC; ++c) top = fmaxf(top, fabsf(H[r][c]));
          for (int lane = 1; lane < kLanes; lane *= 2)
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lane));
          const int needed = top > 0 && top < INFINITY ? ilogbf(top) : -100;
          if (needed > exponent[r]) {
            const A factor = ldexpf(1.0f, max(exponent[r] - needed, -126));
            exponent[r] = needed;
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
              for (int g = 0; g < kG; ++g) G[n][r][g] *= factor;
          }
          const A factor = ldexpf(1.0f, 14 - exponent[r]);
#pragma unroll
          for (int c = 0; c < kC; ++c) H[r][c] *= factor;
        }
      }
    }
    __device__ A undo(int r) const { return kNeeded ? ldexpf(1.0f, exponent[r] - 14) : 1.0f; }
  };
};

// A row's key id and, for L = 1, its label and prediction; id −1 and NaN: no such row.
struct alignas(16) Label {
  float y, p;
  int id;
};

template <class T>
__device__ T read(const void* p, int64_t n) {
  return static_cast<const T*>(p)[n];
}

template <class T>
__device__ T row_sum(T x, int lanes) {
  for (int lane = 1; lane < lanes; lane *= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

// Σ of n numbers, by one warp.
template <class T>
__device__ T sum_of(const T* parts, int64_t n) {
  T sum = 0;
  for (int64_t k = threadIdx.x % 32; k < n; k += 32) sum += parts[k];
  return row_sum(sum, 32);
}

template <class A>
struct Entry {
  Label label;
  A scale, coef[5];
};

// Labels, scales and coefficients of the rows or columns of a tile.
template <class A, int kN>
struct Side {
  Label label[kN];
  A scale[kN];
  A coef[5][kN];

  __device__ void put(int n, const Entry<A>& entry) {
    label[n] = entry.label;
    scale[n] = entry.scale;
#pragma unroll
    for (int k = 0; k < 5; ++k) coef[k][n] = entry.coef[k];
  }
  __device__ Coefficients<A> coefficients(int n) const {
    return {coef[0][n], coef[1][n], coef[2][n], coef[3][n], coef[4][n]};
  }
};

template <class Engine>
struct Tile {
  using T = typename Engine::T;
  using A = typename Engine::A;
  alignas(16) T q_i[Engine::kRows * Engine::kPitch];
  alignas(16) T q_j[Engine::kCols * Engine::kPitch];
  alignas(16) A pairs[Engine::kRows * Engine::kPairPitch];  // what each pair is; then H
  Side<A, Engine::kRows> i;
  Side<A, Engine::kCols> j;
};

// Begins to copy columns d0 … of the rows of q to shared memory; zeros where there is no row or
// column. The copies are there after wait_for_copies() and a barrier.
template <class Engine, int kN>
__device__ void load_rows(typename Engine::T* shared, const typename Engine::T* q,
                          const Label (&label)[kN], int64_t dim, int64_t d0) {
  using V = typename Engine::V;
  constexpr int kVectors = Engine::kDepth / V::kSize;
  constexpr int kStep = kThreads / kVectors;
  const int first = threadIdx.x / kVectors, column = threadIdx.x % kVectors * V::kSize;
  const int64_t d = d0 + column;
  if (d >= (dim + 15) / 16 * 16) return;  // beyond what the products read
  const bool is_column = d < dim;
  const auto* source = reinterpret_cast<const unsigned char*>(q + (is_column ? d : 0));
  // 32 bits each, so that a row costs one multiplication with a 64-bit result.
  const auto row_bytes = static_cast<uint32_t>(dim * static_cast<int64_t>(sizeof(*q)));
#pragma unroll 4
  for (int row = first; row < kN; row += kStep) {
    const int id = label[row].id;
    const bool is_there = is_column && id >= 0;
    const auto row_of_q = static_cast<uint32_t>(is_there ? id : 0);
    copy_16_bytes(shared + row * Engine::kPitch + column,
                  source + static_cast<uint64_t>(row_of_q) * row_bytes, is_there);
  }
}

}  // namespace conr
