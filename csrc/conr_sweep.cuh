// The sweeps. A block owns its anchors: it walks their band of keys tile by tile, keeps sums or
// gradients in registers and stores them once. No atomics, no order that depends on scheduling.
#pragma once

#include <type_traits>

#include "conr_launch.h"
#include "conr_math.cuh"
#include "conr_tile.cuh"

// The host shim of the tests defines its own.
#ifndef CONR_SHARED_BYTES
#define CONR_SHARED_BYTES(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace conr {
namespace {

// One of the two sweeps: which keys the anchors of a block meet, in which order, and as what.
struct Sweep {
  const int32_t *keys = nullptr, *anchors = nullptr;  // key ids in this sweep's order
  int serves = kPositives | kNegatives;
  int64_t first = 0, last;                // the band of the block's anchors
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

// Labels and scale of key `id`; coefficients too where there are any.
template <class A>
__device__ Entry<A> fetch(int id, const Rows& rows, const void* coef, bool shifted, A unit) {
  Entry<A> entry{Label{NAN, NAN, id}, A(0), {}};
  if (id < 0) return entry;
  if (rows.n_components == 1) {
    entry.label.y = rows.y[id];
    entry.label.p = rows.p[id];
  }
  entry.scale = unit * read<A>(rows.scale, id);
  if (coef == nullptr) return entry;
  const int n_stats = shifted ? 5 : 3;
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    if (k >= n_stats) break;
    const A value = read<A>(coef, static_cast<int64_t>(id) * n_stats + k);
    entry.coef[k] = k < 3 ? value : value * A(kLog2E);
  }
  return entry;
}

// A thread's key of the next tile, on its way while the present tile is computed, and the id of the
// one after it.
template <class Engine>
struct NextKey {
  using A = typename Engine::A;
  const Sweep& sweep;
  const Rows& rows;
  const void* coef;
  const bool shifted;
  int64_t j;  // of id
  int id;
  Entry<A> entry;

  __device__ NextKey(const Sweep& sweep, const Rows& rows, const void* coef, bool shifted)
      : sweep(sweep), rows(rows), coef(coef), shifted(shifted), j(sweep.first + threadIdx.x) {
    id = id_at_j();
    advance();
  }
  __device__ int id_at_j() const {
    return threadIdx.x < Engine::kCols && j < sweep.last ? sweep.key(j) : -1;
  }
  __device__ void advance() {
    entry = fetch(id, rows, coef, shifted, A(1));
    j += Engine::kCols;
    id = id_at_j();
  }
  // Puts it into the tile.
  __device__ void stage(Tile<Engine>& tile) {
    if (threadIdx.x < Engine::kCols) tile.j.put(threadIdx.x, entry);
    advance();
  }
};

// Decides d_ij ≤ h and δ_ij ≤ h for every pair of the tile, by the reference's own operations.
template <class Engine>
__device__ void classify(Tile<Engine>& tile, const Rows& rows, const Settings& settings,
                         int serves) {
  constexpr int kStep = kThreads / Engine::kCols;
  const bool positives = serves & kPositives, negatives = serves & kNegatives;
  const bool all = settings.flags & kAllNegatives, rmse = settings.flags & kRmse;
  const float h = settings.window;
  const int64_t L = rows.n_components;
  const int j = threadIdx.x % Engine::kCols, first = threadIdx.x / Engine::kCols;
  const Label key = tile.j.label[j];
  const auto kind = [&](int id_i, float d, float delta) {
    const bool positive = positives && d <= h && id_i != key.id;
    const bool negative = negatives && d > h && (all || delta <= h);
    return positive ? kPositive : (negative ? d : 0.0f);
  };
  if (L == 1) {
#pragma unroll 4
    for (int i = first; i < Engine::kRows; i += kStep) {
      const Label anchor = tile.i.label[i];
      const float d = absolute_difference(anchor.y, key.y),
                  delta = absolute_difference(anchor.p, key.p);
      tile.pairs[i * Engine::kPairPitch + j] = kind(anchor.id, d, delta);
    }
    return;
  }
#pragma unroll 1
  for (int i = first; i < Engine::kRows; i += kStep) {
    const int id_i = tile.i.label[i].id;
    float d = NAN, delta = 0;
    if (id_i >= 0 && key.id >= 0) {
      const int64_t at_i = id_i * L, at_j = key.id * L;
      d = label_distance(rows.y + at_i, rows.y + at_j, L, rmse);
      if (negatives && !all && d > h) delta = label_distance(rows.p + at_i, rows.p + at_j, L, rmse);
    }
    tile.pairs[i * Engine::kPairPitch + j] = kind(id_i, d, delta);
  }
}

// What a pair is in a sweep of one kind, decided by its scalar labels (L = 1) in registers. Where
// there is no row, y is NaN and neither holds. Without branches: "&", not "&&".
struct ScalarLabels {
  float h, reach_of_p;

  __device__ explicit ScalarLabels(const Settings& settings)
      : h(settings.window),
        reach_of_p(settings.flags & kAllNegatives ? INFINITY : settings.window) {}
  __device__ bool is_positive(const Label& i, const Label& j) const {
    return (absolute_difference(i.y, j.y) <= h) & (i.id != j.id);
  }
  __device__ bool is_negative(const Label& i, const Label& j, float d) const {
    return (d > h) & (absolute_difference(i.p, j.p) <= reach_of_p);
  }
};

// Whether the pairs of a sweep are decided there; else classify() leaves them in the tile.
__device__ inline bool decides_in_registers(const Sweep& sweep, const Rows& rows, bool shifted) {
  return rows.n_components == 1 && !shifted && sweep.serves != (kPositives | kNegatives);
}

// Whether all pairs of a tile are positives of different rows, so that none needs to be decided.
template <class Engine>
__device__ bool is_full(const Sweep& sweep, const Rows& rows, int64_t i0, int n_i, int64_t j0) {
  const bool has_no_self = rows.n_anchors == rows.n_keys &&  // then both are in the same order
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
__device__ void similarities(typename Engine::A (&s)[Engine::kR][Engine::kC], Tile<Engine>& tile,
                             const Rows& rows, bool q_i_is_there) {
  const auto* q = static_cast<const typename Engine::T*>(rows.q);
  for (int64_t d0 = 0; d0 < rows.dim; d0 += Engine::kDepth) {
    if (d0 > 0) __syncthreads();
    if (!q_i_is_there) load_rows<Engine>(tile.q_i, q, tile.i.label, rows.dim, d0);
    load_rows<Engine>(tile.q_j, q, tile.j.label, rows.dim, d0);
    wait_for_copies();
    __syncthreads();
    Engine::product(s, tile.q_i, tile.q_j, depth_from<Engine>(rows.dim, d0));
  }
}

template <class Engine>
__device__ void stage_anchors(Tile<Engine>& tile, const Sweep& sweep, int64_t i0, int n_i,
                              const Rows& rows, const void* coef, const Settings& settings) {
  using A = typename Engine::A;
  const int n = threadIdx.x;
  if (n < Engine::kRows) {
    const int id = n < n_i ? sweep.anchor(i0 + n, rows.self_offset) : -1;
    const A unit = A(kLog2E / settings.temperature);
    tile.i.put(n, fetch(id, rows, coef, settings.flags & kShifted, unit));
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
  const int n_i =
      rows.n_anchors - i0 < Engine::kRows ? static_cast<int>(rows.n_anchors - i0) : Engine::kRows;
  const Sweep sweep(rows, args.which, i0, n_i);
  if (sweep.serves == 0) return;
  const A push = A(settings.push_scale * kLog2E);
  const bool one_piece = rows.dim <= Engine::kDepth;
  const bool in_registers = decides_in_registers(sweep, rows, shifted);
  const ScalarLabels labels(settings);

  LogSum<A> E[kR], B[kR];
  Sum<A> s_sum[kR];
  int n[kR] = {}, m[kR] = {};  // positives; whether there are negatives
#pragma unroll
  for (int r = 0; r < kR; ++r) E[r].shift = B[r].shift = shifted ? -A(INFINITY) : A(0);

  stage_anchors(tile, sweep, i0, n_i, rows, nullptr, settings);
  NextKey<Engine> next(sweep, rows, nullptr, shifted);
  for (int64_t j0 = sweep.first; j0 < sweep.last; j0 += Engine::kCols) {
    __syncthreads();
    next.stage(tile);
    __syncthreads();
    if (!in_registers) classify(tile, rows, settings, sweep.serves);
    const bool full = in_registers && is_full<Engine>(sweep, rows, i0, n_i, j0);
    A s[kR][kC] = {};
    similarities(s, tile, rows, one_piece && j0 > sweep.first);
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int i = Engine::row(r);
#pragma unroll
      for (int c = 0; c < kC; ++c)
        s[r][c] *=
            Engine::kRowsAreUnit ? tile.i.scale[i] : tile.i.scale[i] * tile.j.scale[Engine::col(c)];
      const auto add_positives = [&](bool is_shifted, auto is_positive) {
        if (is_shifted) {
          A top = E[r].shift;
#pragma unroll
          for (int c = 0; c < kC; ++c) top = is_positive(c) && s[r][c] > top ? s[r][c] : top;
          E[r].raise(top);
        }
        const A shift = is_shifted ? E[r].shift : A(0);
        A part_E = 0, part_s = 0;
#pragma unroll
        for (int c = 0; c < kC; ++c) {
          const bool positive = is_positive(c);
          part_E += positive ? exp2_of(s[r][c] - shift) : A(0);
          part_s += positive ? s[r][c] : A(0);
          n[r] += positive;
        }
        E[r].sum.add(part_E);
        s_sum[r].add(part_s);
      };
      if (in_registers) {
        const Label anchor = tile.i.label[i];
        const auto key = [&](int c) -> const Label& { return tile.j.label[Engine::col(c)]; };
        if (full) {
          add_positives(false, [](int) { return true; });
        } else if (sweep.serves == kPositives) {
          add_positives(false, [&](int c) { return labels.is_positive(anchor, key(c)); });
        } else {
          A part_B = 0, heaviest = 0;
#pragma unroll
          for (int c = 0; c < kC; ++c) {
            const float d = absolute_difference(anchor.y, key(c).y);
            const A weight = labels.is_negative(anchor, key(c), d) ? phi(A(d), flags) : A(0);
            part_B += weight * exp2_of(s[r][c]);
            heaviest = fmax(heaviest, weight);
          }
          B[r].sum.add(part_B);
          m[r] |= heaviest > A(0);
        }
      } else {
        const A* pairs = tile.pairs + i * Engine::kPairPitch;
        if (sweep.serves & kPositives)
          add_positives(shifted, [&](int c) { return pairs[Engine::col(c)] < A(0); });
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
    const int n_all = row_sum(n[r], Engine::kLanes),
              m_all = row_sum(m[r], Engine::kLanes);  // > 0: some
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

// What a pair is; d_ij is a negative's.
template <class A>
struct Kind {
  bool positive, negative;
  A d;
};

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

struct BackwardArgs {
  Rows rows;
  Settings settings;
  const void* coef;
  void* G;
  int which;
};

// kPieces > 0: G stays in registers, kPieces·kDepth columns at most. 0: any D, G is added to in
// memory.
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
  const bool shifted = flags & kShifted;
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) * Engine::kRows;
  const int n_i =
      rows.n_anchors - i0 < Engine::kRows ? static_cast<int>(rows.n_anchors - i0) : Engine::kRows;
  const Sweep sweep(rows, args.which, i0, n_i);
  if (sweep.serves == 0) return;
  const A push = A(settings.push_scale * kLog2E);
  const T* q = static_cast<const T*>(rows.q);
  const bool one_piece = rows.dim <= Engine::kDepth;
  const bool in_registers = decides_in_registers(sweep, rows, shifted);
  const ScalarLabels labels(settings);
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
  NextKey<Engine> next(sweep, rows, args.coef, shifted);
  for (int64_t j0 = sweep.first; j0 < sweep.last; j0 += Engine::kCols) {
    __syncthreads();
    next.stage(tile);
    __syncthreads();
    if (!in_registers) classify(tile, rows, settings, sweep.serves);
    const bool full = in_registers && is_full<Engine>(sweep, rows, i0, n_i, j0);
    A H[kR][kC] = {};
    similarities(H, tile, rows, one_piece && j0 > sweep.first);
    // Turns similarities into H.
    const auto weigh = [&](auto is_shifted, auto of_sweep, auto kind_of) {
      constexpr bool kIsShifted = decltype(is_shifted)::value;
      constexpr int kServes = decltype(of_sweep)::value;
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const int j = Engine::col(c);
        const A scale_j = Engine::kRowsAreUnit ? A(1) : tile.j.scale[j];
        const Coefficients<A> coef_j = tile.j.coefficients(j);
#pragma unroll
        for (int r = 0; r < kR; ++r) {
          const int i = Engine::row(r);
          const Kind<A> kind = kind_of(i, j);
          const Coefficients<A> coef_i = tile.i.coefficients(i);
          const A t = H[r][c] * tile.i.scale[i] * scale_j;
          A H_ij = 0;
          if (kServes & kPositives) {
            const A value = positive_gradient<kIsShifted>(t, coef_i, coef_j);
            H_ij = kind.positive ? value : A(0);
          }
          if (kServes & kNegatives) {
            const A value = negative_gradient<kIsShifted>(t, kind.d, coef_i, coef_j, push, flags);
            H_ij = kind.negative ? value : H_ij;
          }
          H[r][c] = H_ij * scale_j;
          if (Engine::kHIsShared) tile.pairs[i * Engine::kPairPitch + j] = H[r][c];
        }
      }
    };
    const auto of_tile = [&](int i, int j) {
      const A d = tile.pairs[i * Engine::kPairPitch + j];
      return Kind<A>{d == A(kPositive), d > A(0), d};
    };
    if (shifted) {
      weigh(Constant<true>{}, Constant<kPositives | kNegatives>{}, of_tile);
    } else if (!in_registers) {
      weigh(Constant<false>{}, Constant<kPositives | kNegatives>{}, of_tile);
    } else if (full) {
      weigh(Constant<false>{}, Constant<kPositives>{},
            [](int, int) { return Kind<A>{true, false, A(0)}; });
    } else if (sweep.serves == kPositives) {
      weigh(Constant<false>{}, Constant<kPositives>{}, [&](int i, int j) {
        return Kind<A>{labels.is_positive(tile.i.label[i], tile.j.label[j]), false, A(0)};
      });
    } else {
      weigh(Constant<false>{}, Constant<kNegatives>{}, [&](int i, int j) {
        const float d = absolute_difference(tile.i.label[i].y, tile.j.label[j].y);
        return Kind<A>{false, labels.is_negative(tile.i.label[i], tile.j.label[j], d), A(d)};
      });
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
          wait_for_copies();
          __syncthreads();
        }
        Engine::apply(G[piece], H, tile.pairs, tile.q_j, depth_from<Engine>(rows.dim, d0));
      }
    } else {
      for (int64_t d0 = 0; d0 < rows.dim; d0 += Engine::kDepth) {
        if (!one_piece) {
          __syncthreads();
          load_rows<Engine>(tile.q_j, q, tile.j.label, rows.dim, d0);
          wait_for_copies();
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

}  // namespace
}  // namespace conr
