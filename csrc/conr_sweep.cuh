// What the sweeps have in common. A block owns its anchors: it walks their band of keys tile by
// tile, keeps sums (conr_forward.cuh) or gradients (conr_backward.cuh) in registers and stores them
// once. No atomics, no order that depends on scheduling.
#pragma once

#include <type_traits>

#include "conr_launch.h"
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

// The gradient coefficients of all keys in memory; none in the forward pass.
template <class A>
struct Coefs {
  const void* rows = nullptr;
  int n_columns = 0;
  A upstream = 0;  // what the first three of a row are multiplied by
};

// What all rows' coefficients are multiplied by.
template <class A>
__device__ A upstream_of(const Args& args) {
  return (args.upstream ? read<A>(args.upstream, 0) : A(1)) * A(args.factor);
}

// Labels and scale of key `id`; coefficients too where there are any.
template <class A>
__device__ Entry<A> fetch(int id, const Rows& rows, const Coefs<A>& coefs, A unit) {
  Entry<A> entry{Label{NAN, NAN, id}, A(0), {}};
  if (id < 0) return entry;
  if (rows.n_components == 1) {
    entry.label.y = rows.y[id];
    entry.label.p = rows.p[id];
  }
  entry.scale = unit * read<A>(rows.scale, id);
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    if (k >= coefs.n_columns) break;
    const A value = read<A>(coefs.rows, static_cast<int64_t>(id) * coefs.n_columns + k);
    entry.coef[k] = value * (k < 3 ? coefs.upstream : A(kLog2E));
  }
  return entry;
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

// What a pair is; d_ij is a negative's.
template <class A>
struct Kind {
  bool positive, negative;
  A d;
};

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// A block's part of one sweep: its anchors, and the tiles of keys that they meet.
template <class Engine>
struct Walk {
  using A = typename Engine::A;
  static constexpr int kR = Engine::kR, kC = Engine::kC, kRows = Engine::kRows;
  static constexpr int kCols = Engine::kCols, kPitch = Engine::kPairPitch;
  Tile<Engine>& tile;
  const Rows& rows;
  const Settings& settings;
  const Coefs<A> coefs;
  const int64_t i0;
  const int n_i;  // anchors
  const Sweep sweep;
  const bool shifted, one_piece;
  const bool in_registers;  // where pairs are decided; else classify() leaves them in the tile

  __device__ Walk(unsigned char* bytes, const Args& args, int which, int64_t i0,
                  const Coefs<A>& coefs)
      : tile(*reinterpret_cast<Tile<Engine>*>(bytes)),
        rows(args.rows),
        settings(args.settings),
        coefs(coefs),
        i0(i0),
        n_i(rows.n_anchors - i0 < kRows ? static_cast<int>(rows.n_anchors - i0) : kRows),
        sweep(rows, which, i0, n_i),
        shifted(settings.flags & kShifted),
        one_piece(rows.dim <= Engine::kDepth),
        in_registers(rows.n_components == 1 && !shifted &&
                     sweep.serves != (kPositives | kNegatives)) {}

  // The row of an anchor in what there is of all anchors; not from the tile, which is not there for
  // all threads where no key was visited.
  __device__ int64_t anchor(int i) const {
    return sweep.anchor(i0 + i, rows.self_offset) - rows.self_offset;
  }
  // Columns of q that are in shared memory from d0 on.
  __device__ int depth_from(int64_t d0) const {
    return rows.dim - d0 < Engine::kDepth ? static_cast<int>(rows.dim - d0) : Engine::kDepth;
  }
  template <int kN>
  __device__ void load(typename Engine::T* shared, const Label (&label)[kN], int64_t d0) const {
    load_rows<Engine>(shared, static_cast<const typename Engine::T*>(rows.q), label, rows.dim, d0);
  }

  // Calls visit(s, full) with the similarities of one tile after another; full: its pairs are all
  // positives.
  template <class Visit>
  __device__ void visit_tiles(Visit visit) {
    const int n = threadIdx.x;
    if (n < kRows) {
      const int id = n < n_i ? sweep.anchor(i0 + n, rows.self_offset) : -1;
      tile.i.put(n, fetch(id, rows, coefs, A(kLog2E / settings.temperature)));
    }
    // A thread's key of the next tile, on its way while the present tile is computed, and the id of
    // the one after it.
    const auto id_at = [&](int64_t j) { return n < kCols && j < sweep.last ? sweep.key(j) : -1; };
    Entry<A> next = fetch(id_at(sweep.first + n), rows, coefs, A(1));
    int id_after = id_at(sweep.first + n + kCols);
    for (int64_t j0 = sweep.first; j0 < sweep.last; j0 += kCols) {
      __syncthreads();
      if (n < kCols) tile.j.put(n, next);
      next = fetch(id_after, rows, coefs, A(1));
      id_after = id_at(j0 + n + 2 * kCols);
      __syncthreads();
      if (!in_registers) classify();
      A s[kR][kC] = {};
      multiply(s, j0 == sweep.first);
      visit(s, in_registers && is_full(j0));
    }
  }

  // q_i·q_j of a tile, over all columns of q in pieces of kDepth.
  __device__ void multiply(A (&s)[kR][kC], bool is_first) const {
    for (int64_t d0 = 0; d0 < rows.dim; d0 += Engine::kDepth) {
      if (d0 > 0) __syncthreads();
      if (is_first || !one_piece) load(tile.q_i, tile.i.label, d0);
      load(tile.q_j, tile.j.label, d0);
      wait_for_copies();
      __syncthreads();
      Engine::product(s, tile.q_i, tile.q_j, depth_from(d0));
    }
  }

  // Whether all pairs of a tile are positives of different rows, so that none needs to be decided.
  __device__ bool is_full(int64_t j0) const {
    const bool has_no_self = rows.n_anchors == rows.n_keys &&  // then both are in the same order
                             (j0 + kCols <= i0 || j0 >= i0 + kRows);
    return sweep.serves == kPositives && n_i == kRows && has_no_self && j0 >= sweep.full_first &&
           j0 + kCols <= sweep.full_last;
  }

  // Decides d_ij ≤ h and δ_ij ≤ h for every pair of the tile, by the reference's own operations.
  __device__ void classify() const {
    constexpr int kStep = kThreads / kCols;
    const bool positives = sweep.serves & kPositives, negatives = sweep.serves & kNegatives;
    const bool all = settings.flags & kAllNegatives, rmse = settings.flags & kRmse;
    const float h = settings.window;
    const int64_t L = rows.n_components;
    const int j = threadIdx.x % kCols, first = threadIdx.x / kCols;
    const Label key = tile.j.label[j];
    const auto kind = [&](int id_i, float d, float delta) {
      const bool positive = positives && d <= h && id_i != key.id;
      const bool negative = negatives && d > h && (all || delta <= h);
      return positive ? kPositive : (negative ? d : 0.0f);
    };
    if (L == 1) {
#pragma unroll 4
      for (int i = first; i < kRows; i += kStep) {
        const Label anchor = tile.i.label[i];
        const float d = absolute_difference(anchor.y, key.y);
        tile.pairs[i * kPitch + j] = kind(anchor.id, d, absolute_difference(anchor.p, key.p));
      }
      return;
    }
#pragma unroll 1
    for (int i = first; i < kRows; i += kStep) {
      const int id_i = tile.i.label[i].id;
      float d = NAN, delta = 0;
      if (id_i >= 0 && key.id >= 0) {
        const int64_t at_i = id_i * L, at_j = key.id * L;
        d = label_distance(rows.y + at_i, rows.y + at_j, L, rmse);
        if (negatives && !all && d > h)
          delta = label_distance(rows.p + at_i, rows.p + at_j, L, rmse);
      }
      tile.pairs[i * kPitch + j] = kind(id_i, d, delta);
    }
  }

  // Calls work(is_shifted, serves, kind_of) with what is known of all pairs of a tile, as
  // constants, and a function that says of each what it is.
  template <class Work>
  __device__ void decide(bool full, Work work) const {
    const ScalarLabels labels(settings);
    const Label *label_i = tile.i.label, *label_j = tile.j.label;
    const A* pairs = tile.pairs;
    const auto of_tile = [=](int i, int j) {
      const A d = pairs[i * kPitch + j];
      return Kind<A>{d == A(kPositive), d > A(0), d};
    };
    if (shifted) {
      work(Constant<true>{}, Constant<kPositives | kNegatives>{}, of_tile);
    } else if (!in_registers) {
      work(Constant<false>{}, Constant<kPositives | kNegatives>{}, of_tile);
    } else if (full) {
      work(Constant<false>{}, Constant<kPositives>{},
           [](int, int) { return Kind<A>{true, false, A(0)}; });
    } else if (sweep.serves == kPositives) {
      work(Constant<false>{}, Constant<kPositives>{}, [=](int i, int j) {
        return Kind<A>{labels.is_positive(label_i[i], label_j[j]), false, A(0)};
      });
    } else {
      work(Constant<false>{}, Constant<kNegatives>{}, [=](int i, int j) {
        const float d = absolute_difference(label_i[i].y, label_j[j].y);
        return Kind<A>{false, labels.is_negative(label_i[i], label_j[j], d), A(d)};
      });
    }
  }
};

}  // namespace
}  // namespace conr
