// Kernels and launchers. A block owns its anchors: it walks their band of keys tile by tile, keeps sums or
// gradients in registers and stores them once. No atomics, no order that depends on scheduling.
#include "conr_launch.h"
#include "conr_math.cuh"
#include "conr_tile.cuh"

#include <stdexcept>
#include <string>

// The host shim of the tests defines its own.
#ifndef CONR_SHARED_BYTES
#define CONR_SHARED_BYTES(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace conr {
namespace {

template <class T>
__device__ T read(const void* p, int64_t n) {
  return static_cast<const T*>(p)[n];
}

template <class T>
__device__ T row_sum(T x, int lanes) {
  for (int lane = 1; lane < lanes; lane *= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

// One of the two sweeps: which keys the anchors of a block meet, in which order, and as what.
struct Sweep {
  const int32_t *keys = nullptr, *anchors = nullptr;  // key ids in this sweep's order
  int serves = kPositives | kNegatives;
  int64_t first = 0, last;  // the band of the block's anchors
  int64_t full_first = 0, full_last = 0;  // what lies in the bands of all of them

  __device__ Sweep(const Rows& rows, int which, int64_t i0, int n_i) : last(rows.n_keys) {
    if (rows.layout == nullptr) return;
    const int32_t* section = rows.layout + 2 + which * (rows.n_keys + 3 * rows.n_anchors);
    keys = section;
    anchors = keys + rows.n_keys;
    serves = rows.layout[which];
    if (serves == (kPositives | kNegatives)) return;
    const int32_t *lo = anchors + rows.n_anchors, *hi = lo + rows.n_anchors;
    first = lo[i0];
    last = hi[i0 + n_i - 1];
    full_first = lo[i0 + n_i - 1];
    full_last = hi[i0];
  }
  __device__ int key(int64_t j) const { return keys ? keys[j] : static_cast<int>(j); }
  __device__ int anchor(int64_t i, int64_t offset) const {
    return anchors ? anchors[i] : static_cast<int>(i + offset);
  }
};

// Labels and scale of key `id` as entry n of a side; coefficients too where there are any.
template <class A, int kN>
__device__ void stage(
    Side<A, kN>& side, int n, int id, const Rows& rows, const void* coef, bool shifted, A unit) {
  side.label[n] = Label{NAN, NAN, id};
  side.scale[n] = A(0);
#pragma unroll
  for (int k = 0; k < 5; ++k) side.coef[k][n] = A(0);
  if (id < 0) return;
  if (rows.n_components == 1) {
    side.label[n].y = rows.y[id];
    side.label[n].p = rows.p[id];
  }
  side.scale[n] = unit * read<A>(rows.scale, id);
  if (coef == nullptr) return;
  const int n_stats = shifted ? 5 : 3;
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    if (k >= n_stats) break;
    const A value = read<A>(coef, static_cast<int64_t>(id) * n_stats + k);
    side.coef[k][n] = k < 3 ? value : value * A(kLog2E);
  }
}

// Decides d_ij ≤ h and δ_ij ≤ h for every pair of the tile, by the reference's own operations.
template <class Engine>
__device__ void classify(Tile<Engine>& tile, const Rows& rows, const Settings& settings, int serves) {
  const bool positives = serves & kPositives, negatives = serves & kNegatives;
  const bool all = settings.flags & kAllNegatives, rmse = settings.flags & kRmse;
  const float h = settings.window;
  const int64_t L = rows.n_components;
  const int j = threadIdx.x % Engine::kCols;
  const Label key = tile.j.label[j];
#pragma unroll 4
  for (int i = threadIdx.x / Engine::kCols; i < Engine::kRows; i += kThreads / Engine::kCols) {
    const Label anchor = tile.i.label[i];
    float d = absolute_difference(anchor.y, key.y), delta = absolute_difference(anchor.p, key.p);
    if (L > 1 && anchor.id >= 0 && key.id >= 0) {
      const int64_t at_i = anchor.id * L, at_j = key.id * L;
      d = label_distance(rows.y + at_i, rows.y + at_j, L, rmse);
      delta = d > h && negatives && !all ? label_distance(rows.p + at_i, rows.p + at_j, L, rmse) : 0;
    }
    const bool positive = positives && d <= h && anchor.id != key.id;
    const bool negative = negatives && d > h && (all || delta <= h);
    tile.pairs[i * Engine::kPairPitch + j] = positive ? kPositive : (negative ? d : 0.0f);
  }
}

// Whether all pairs of a tile are positives of different rows, so that nothing needs to be decided.
template <class Engine>
__device__ bool is_full(const Sweep& sweep, const Rows& rows, int64_t i0, int n_i, int64_t j0) {
  const bool has_no_self = rows.n_anchors == rows.n_keys && // then both are in the same order
      (j0 + Engine::kCols <= i0 || j0 >= i0 + Engine::kRows);
  return sweep.serves == kPositives && rows.n_components == 1 && n_i == Engine::kRows &&
      has_no_self && j0 >= sweep.full_first && j0 + Engine::kCols <= sweep.full_last;
}

template <class Engine>
__device__ int depth_from(int64_t dim, int64_t d0) {
  return dim - d0 < Engine::kDepth ? static_cast<int>(dim - d0) : Engine::kDepth;
}

// q_i·q_j of a tile, over all columns of q in pieces of kDepth.
template <class Engine>
__device__ void similarities(
    typename Engine::A (&s)[Engine::kR][Engine::kC], Tile<Engine>& tile, const Rows& rows,
    bool q_i_is_there) {
  const auto* q = static_cast<const typename Engine::T*>(rows.q);
  for (int64_t d0 = 0; d0 < rows.dim; d0 += Engine::kDepth) {
    if (d0 > 0) __syncthreads();
    if (!q_i_is_there) load_rows<Engine>(tile.q_i, q, tile.i.label, rows.dim, d0);
    load_rows<Engine>(tile.q_j, q, tile.j.label, rows.dim, d0);
    __syncthreads();
    Engine::product(s, tile.q_i, tile.q_j, depth_from<Engine>(rows.dim, d0));
  }
}

template <class Engine>
__device__ void stage_keys(
    Tile<Engine>& tile, const Sweep& sweep, int64_t j0, const Rows& rows, const void* coef,
    bool shifted) {
  const int n = threadIdx.x;
  if (n < Engine::kCols) {
    const int id = j0 + n < sweep.last ? sweep.key(j0 + n) : -1;
    stage(tile.j, n, id, rows, coef, shifted, typename Engine::A(1));
  }
}

template <class Engine>
__device__ void stage_anchors(
    Tile<Engine>& tile, const Sweep& sweep, int64_t i0, int n_i, const Rows& rows, const void* coef,
    const Settings& settings) {
  using A = typename Engine::A;
  const int n = threadIdx.x;
  if (n < Engine::kRows) {
    const int id = n < n_i ? sweep.anchor(i0 + n, rows.self_offset) : -1;
    stage(tile.i, n, id, rows, coef, settings.flags & kShifted, A(kLog2E / settings.temperature));
  }
}

struct ForwardArgs {
  Rows rows;
  Settings settings;
  RowOutputs out;
  int which;
};

template <class Engine>
__global__ void __launch_bounds__(kThreads, 2) conr_forward_kernel(ForwardArgs args) {
  using A = typename Engine::A;
  constexpr int kR = Engine::kR, kC = Engine::kC;
  CONR_SHARED_BYTES(bytes);
  auto& tile = *reinterpret_cast<Tile<Engine>*>(bytes);
  const Rows& rows = args.rows;
  const Settings& settings = args.settings;
  const int flags = settings.flags;
  const bool shifted = flags & kShifted;
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) * Engine::kRows;
  const int n_i = rows.n_anchors - i0 < Engine::kRows ? static_cast<int>(rows.n_anchors - i0) : Engine::kRows;
  const Sweep sweep(rows, args.which, i0, n_i);
  if (sweep.serves == 0) return;
  const A push = A(settings.push_scale * kLog2E);
  const bool one_piece = rows.dim <= Engine::kDepth;

  LogSum<A> E[kR], B[kR];
  Sum<A> s_sum[kR];
  int n[kR] = {}, m[kR] = {};
#pragma unroll
  for (int r = 0; r < kR; ++r) E[r].shift = B[r].shift = shifted ? -A(INFINITY) : A(0);

  stage_anchors(tile, sweep, i0, n_i, rows, nullptr, settings);
  for (int64_t j0 = sweep.first; j0 < sweep.last; j0 += Engine::kCols) {
    __syncthreads();
    stage_keys(tile, sweep, j0, rows, nullptr, shifted);
    __syncthreads();
    const bool full = is_full<Engine>(sweep, rows, i0, n_i, j0);
    if (!full) classify(tile, rows, settings, sweep.serves);
    A s[kR][kC] = {};
    similarities(s, tile, rows, one_piece && j0 > sweep.first);
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int i = Engine::row(r);
      const A* pairs = tile.pairs + i * Engine::kPairPitch;
#pragma unroll
      for (int c = 0; c < kC; ++c)
        s[r][c] *= Engine::kRowsAreUnit ? tile.i.scale[i] : tile.i.scale[i] * tile.j.scale[Engine::col(c)];
      const auto add_positives = [&](auto is_positive) {
        if (shifted) {
          A top = E[r].shift;
#pragma unroll
          for (int c = 0; c < kC; ++c) top = is_positive(c) && s[r][c] > top ? s[r][c] : top;
          E[r].raise(top);
        }
        A part_E = 0, part_s = 0;
#pragma unroll
        for (int c = 0; c < kC; ++c) {
          const bool positive = is_positive(c);
          part_E += positive ? exp2_of(s[r][c] - E[r].shift) : A(0);
          part_s += positive ? s[r][c] : A(0);
          n[r] += positive;
        }
        E[r].sum.add(part_E);
        s_sum[r].add(part_s);
      };
      if (full) {
        add_positives([](int) { return true; });
      } else if (sweep.serves & kPositives) {
        add_positives([&](int c) { return pairs[Engine::col(c)] < A(0); });
      }
      if (sweep.serves & kNegatives) {
        A top = B[r].shift;
#pragma unroll
        for (int c = 0; c < kC; ++c) {
          const A d = pairs[Engine::col(c)];
          s[r][c] = negative_exponent(s[r][c], d, push, flags);
          top = d > A(0) && s[r][c] > top ? s[r][c] : top;
        }
        if (shifted) B[r].raise(top);
        A part_B = 0;
#pragma unroll
        for (int c = 0; c < kC; ++c) {
          const A d = pairs[Engine::col(c)];
          part_B += d > A(0) ? phi(d, flags) * exp2_of(s[r][c] - B[r].shift) : A(0);
          m[r] += d > A(0);
        }
        B[r].sum.add(part_B);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kR; ++r) {
    for (int lane = 1; lane < Engine::kLanes; lane *= 2) {
      const A E_shift = __shfl_xor_sync(kAllLanes, E[r].shift, lane);
      const A B_shift = __shfl_xor_sync(kAllLanes, B[r].shift, lane);
      E[r].raise(E_shift);
      B[r].raise(B_shift);
    }
    const A E_sum = row_sum(E[r].sum.value(), Engine::kLanes);
    const A B_sum = row_sum(B[r].sum.value(), Engine::kLanes);
    const A positives_sum = row_sum(s_sum[r].value(), Engine::kLanes);
    const int n_all = row_sum(n[r], Engine::kLanes), m_all = row_sum(m[r], Engine::kLanes);
    const int i = Engine::row(r);
    if (threadIdx.x % Engine::kLanes != 0 || i >= n_i) continue;
    const int64_t anchor = tile.i.label[i].id - rows.self_offset;
    A* sums = static_cast<A*>(args.out.sums) + anchor * 5;
    if (sweep.serves & kPositives) {
      sums[0] = E[r].shift;
      sums[1] = E_sum;
      sums[4] = positives_sum * A(kLn2);
      args.out.counts[anchor * 2] = n_all;
    }
    if (sweep.serves & kNegatives) {
      sums[2] = B[r].shift;
      sums[3] = B_sum;
      args.out.counts[anchor * 2 + 1] = m_all;
    }
  }
}

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
  finish_row(row, args.rows.n_keys, w, rate, flags, &loss, &stats);
  const double poison = read<A>(args.out.poison, 0);
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

struct BackwardArgs {
  Rows rows;
  Settings settings;
  const void* coef;
  void* G;
  int which;
};

// kPieces > 0: G stays in registers, kPieces·kDepth columns at most. 0: any D, G is added to in memory.
template <class Engine, int kPieces>
__global__ void __launch_bounds__(kThreads, 2) conr_backward_kernel(BackwardArgs args) {
  using A = typename Engine::A;
  using T = typename Engine::T;
  constexpr int kR = Engine::kR, kC = Engine::kC, kG = Engine::kG;
  constexpr int kHeld = kPieces > 0 ? kPieces : 1;
  CONR_SHARED_BYTES(bytes);
  auto& tile = *reinterpret_cast<Tile<Engine>*>(bytes);
  const Rows& rows = args.rows;
  const Settings& settings = args.settings;
  const int flags = settings.flags;
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) * Engine::kRows;
  const int n_i = rows.n_anchors - i0 < Engine::kRows ? static_cast<int>(rows.n_anchors - i0) : Engine::kRows;
  const Sweep sweep(rows, args.which, i0, n_i);
  if (sweep.serves == 0) return;
  const A push = A(settings.push_scale * kLog2E);
  const T* q = static_cast<const T*>(rows.q);
  const bool one_piece = rows.dim <= Engine::kDepth;
  typename Engine::Scaling scaling;
  A G[kHeld][kR][kG] = {};

  const auto store = [&](int piece, int64_t d0) {
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int i = Engine::row(r);
      if (i >= n_i) continue;
      A* G_i = static_cast<A*>(args.G) + (tile.i.label[i].id - rows.self_offset) * rows.dim;
#pragma unroll
      for (int g = 0; g < kG; ++g) {
        const int64_t d = d0 + Engine::depth(g);
        if (d < rows.dim) G_i[d] += G[piece][r][g] * scaling.undo(r);
        G[piece][r][g] = A(0);
      }
    }
  };

  stage_anchors(tile, sweep, i0, n_i, rows, args.coef, settings);
  for (int64_t j0 = sweep.first; j0 < sweep.last; j0 += Engine::kCols) {
    __syncthreads();
    stage_keys(tile, sweep, j0, rows, args.coef, flags & kShifted);
    __syncthreads();
    const bool full = is_full<Engine>(sweep, rows, i0, n_i, j0);
    if (!full) classify(tile, rows, settings, sweep.serves);
    A H[kR][kC] = {};
    similarities(H, tile, rows, one_piece && j0 > sweep.first);
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      const int j = Engine::col(c);
      const A scale_j = Engine::kRowsAreUnit ? A(1) : tile.j.scale[j];
      const Coefficients<A> coef_j = tile.j.coefficients(j);
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const int i = Engine::row(r);
        A* pair = tile.pairs + i * Engine::kPairPitch + j;
        const Coefficients<A> coef_i = tile.i.coefficients(i);
        const A t = H[r][c] * tile.i.scale[i] * scale_j;
        A H_ij = 0;
        if (full || *pair < A(0)) {
          H_ij = positive_gradient(t, coef_i, coef_j, flags);
        } else if (*pair > A(0)) {
          H_ij = negative_gradient(t, *pair, coef_i, coef_j, push, flags);
        }
        H[r][c] = H_ij * scale_j;
        if (Engine::kHIsShared) *pair = H[r][c];
      }
    }
    scaling.fit(H, G);
    if (Engine::kHIsShared && one_piece) __syncthreads();
    if constexpr (kPieces > 0) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int64_t d0 = piece * Engine::kDepth;
        if (d0 >= rows.dim) break;
        if (!one_piece) {
          __syncthreads();
          load_rows<Engine>(tile.q_j, q, tile.j.label, rows.dim, d0);
          __syncthreads();
        }
        Engine::apply(G[piece], H, tile.pairs, tile.q_j, depth_from<Engine>(rows.dim, d0));
      }
    } else {
      for (int64_t d0 = 0; d0 < rows.dim; d0 += Engine::kDepth) {
        if (!one_piece) {
          __syncthreads();
          load_rows<Engine>(tile.q_j, q, tile.j.label, rows.dim, d0);
          __syncthreads();
        }
        Engine::apply(G[0], H, tile.pairs, tile.q_j, depth_from<Engine>(rows.dim, d0));
        store(0, d0);
      }
    }
  }
  if constexpr (kPieces > 0) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) store(piece, piece * Engine::kDepth);
  }
}

struct PrepareArgs {
  int64_t n, x_dim, q_dim;
  const void* x;
  void *q, *scale, *norm;
};

__device__ float load(const float* x) { return *x; }
__device__ double load(const double* x) { return *x; }
__device__ float load(const Half* x) { return to_float(*x); }
__device__ float load(const BFloat16* x) { return __uint_as_float(static_cast<uint32_t>(x->bits) << 16); }
__device__ void save(float* x, float value) { *x = value; }
__device__ void save(double* x, double value) { *x = value; }
__device__ void save(Half* x, float value) { *x = to_half(value); }
__device__ void save(BFloat16* x, float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  x->bits = static_cast<uint16_t>((value == value ? rounded : bits | 0x400000) >> 16);
}

constexpr int kWarps = kThreads / 32;

// One warp a row: norms, and rows of q with q·scale = x/‖x‖. 16-bit rows are scaled by a power of two only, which
// loses nothing and keeps every product in range.
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

// One thread an anchor: binary searches on the predicate |y_i − y_j| ≤ reach itself, as in sweep.py.
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

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("conr_kernels: ") + what + ": " + cudaGetErrorString(error));
}

template <class Args>
void launch(
    void (*kernel)(Args), Args args, int64_t work, int64_t work_of_block, size_t shared_bytes,
    cudaStream_t stream) {
  const int64_t blocks = (work + work_of_block - 1) / work_of_block;
  if (blocks == 0) return;
  constexpr size_t kSharedByDefault = 48 * 1024;
  if (shared_bytes > kSharedByDefault)
    check(
        cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        "too little shared memory");
  void* arguments[] = {&args};
  check(
      cudaLaunchKernel(
          kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, shared_bytes, stream),
      "kernel launch failed");
  check(cudaGetLastError(), "kernel launch failed");
}

template <class Engine>
void forward(ForwardArgs args, cudaStream_t stream) {
  const int n_sweeps = args.rows.layout == nullptr ? 1 : 2;
  for (args.which = 0; args.which < n_sweeps; ++args.which)
    launch(conr_forward_kernel<Engine>, args, args.rows.n_anchors, Engine::kRows,
           sizeof(Tile<Engine>), stream);
  launch(conr_finish_rows_kernel<typename Engine::A>, args, args.rows.n_anchors, kThreads, 0, stream);
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

void launch_prepare(
    Type x_type, Type q_type, int64_t n, int64_t x_dim, int64_t q_dim, const void* x, void* q,
    void* scale, void* norm, cudaStream_t stream) {
  const PrepareArgs args{n, x_dim, q_dim, x, q, scale, norm};
  const auto kernel = x_type == Type::kFloat64 ? conr_prepare_kernel<double, double, double>
      : x_type == Type::kFloat32               ? conr_prepare_kernel<float, float, float>
      : x_type == Type::kFloat16               ? conr_prepare_kernel<Half, Half, float>
      : q_type == Type::kFloat32               ? conr_prepare_kernel<BFloat16, float, float>
                                               : conr_prepare_kernel<BFloat16, BFloat16, float>;
  launch(kernel, args, n, kWarps, 0, stream);
}

void launch_bands(
    int64_t n_anchors, int64_t n_keys, const float* sorted_i, const float* sorted_j, float reach,
    int32_t* lo, int32_t* hi, cudaStream_t stream) {
  const BandsArgs args{n_anchors, n_keys, sorted_i, sorted_j, reach, lo, hi};
  launch(conr_bands_kernel, args, n_anchors, kThreads, 0, stream);
}

void launch_forward(
    Type q_type, const Rows& rows, const Settings& settings, const RowOutputs& outputs,
    cudaStream_t stream) {
  const ForwardArgs args{rows, settings, outputs, 0};
  switch (q_type) {
    case Type::kFloat64: return forward<ScalarEngine<double>>(args, stream);
    case Type::kFloat32: return forward<ScalarEngine<float>>(args, stream);
    case Type::kFloat16: return forward<TensorEngine<Half>>(args, stream);
    case Type::kBFloat16: return forward<TensorEngine<BFloat16>>(args, stream);
  }
}

void launch_backward(
    Type q_type, const Rows& rows, const Settings& settings, const void* coef, void* G,
    cudaStream_t stream) {
  const BackwardArgs args{rows, settings, coef, G, 0};
  switch (q_type) {
    case Type::kFloat64: return backward<ScalarEngine<double>, 0>(args, stream);
    case Type::kFloat32: return backward_in_registers_or_memory<ScalarEngine<float>>(args, stream);
    case Type::kFloat16: return backward_in_registers_or_memory<TensorEngine<Half>>(args, stream);
    case Type::kBFloat16:
      return backward_in_registers_or_memory<TensorEngine<BFloat16>>(args, stream);
  }
}

void launch_finish_gradient(
    Type x_type, int64_t n, int64_t x_dim, int64_t q_dim, int n_stats, double temperature,
    const void* x, const void* norm, const void* G, const void* coef, void* gradient,
    cudaStream_t stream) {
  const FinishGradientArgs args{n, x_dim, q_dim, n_stats, temperature, x, norm, G, coef, gradient};
  const auto kernel = x_type == Type::kFloat64 ? conr_finish_gradient_kernel<double, double>
      : x_type == Type::kFloat32               ? conr_finish_gradient_kernel<float, float>
      : x_type == Type::kFloat16               ? conr_finish_gradient_kernel<Half, float>
                                               : conr_finish_gradient_kernel<BFloat16, float>;
  launch(kernel, args, n, kWarps, 0, stream);
}

}  // namespace conr
