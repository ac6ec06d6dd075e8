// The backward sweeps: τ ∂L/∂q_i, the row-owner sum over the same pairs.
#pragma once

#include "conr_sweep.cuh"

namespace conr {
namespace {

// One block for some anchors. kPieces > 0: G stays in registers, kPieces·kDepth columns at most.
// 0: any D, G is added to in memory.
template <class Engine, int kPieces>
__global__ void __launch_bounds__(kThreads, 2) conr_backward_kernel(Args args) {
  using A = typename Engine::A;
  constexpr int kR = Engine::kR, kC = Engine::kC, kG = Engine::kG;
  constexpr int kHeld = kPieces > 0 ? kPieces : 1;
  CONR_SHARED_BYTES(bytes);
  const Rows& rows = args.rows;
  const Coefs<A> coefs{args.coef, args.settings.flags & kShifted ? 5 : 3, upstream_of<A>(args)};
  Walk<Engine> walk(bytes, args, args.which, static_cast<int64_t>(blockIdx.x) * Engine::kRows,
                    coefs);
  if (walk.sweep.serves == 0) return;
  auto& tile = walk.tile;
  const int flags = args.settings.flags;
  const A push = A(args.settings.push_scale * kLog2E);
  typename Engine::Scaling scaling;
  A G[kHeld][kR][kG] = {};

  const auto store = [&](int piece, int64_t d0) {
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int i = Engine::row(r);
      if (i >= walk.n_i) continue;
      A* G_i = static_cast<A*>(args.G) + walk.anchor(i) * rows.dim;
#pragma unroll
      for (int g = 0; g < kG; ++g) {
        const int64_t d = d0 + Engine::depth(g);
        if (d < rows.dim) G_i[d] += G[piece][r][g] * scaling.undo(r);
        G[piece][r][g] = A(0);
      }
    }
  };

  walk.visit_tiles([&](A(&H)[kR][kC], bool full) {
    // Turns similarities into H.
    walk.decide(full, [&](auto is_shifted, auto of_sweep, auto kind_of) {
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
    });
    scaling.fit(H, G);
    if (Engine::kHIsShared && walk.one_piece) __syncthreads();
#pragma unroll
    for (int piece = 0; piece < kHeld || kPieces == 0; ++piece) {
      const int64_t d0 = static_cast<int64_t>(piece) * Engine::kDepth;
      if (d0 >= rows.dim) break;
      if (!walk.one_piece) {
        __syncthreads();
        walk.load(tile.q_j, tile.j.label, d0);
        wait_for_copies();
        __syncthreads();
      }
      const int held = kPieces > 0 ? piece : 0;
      Engine::apply(G[held], H, tile.pairs, tile.q_j, walk.depth_from(d0));
      if (kPieces == 0) store(held, d0);
    }
  });
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) store(piece, piece * Engine::kDepth);
}

}  // namespace
}  // namespace conr
