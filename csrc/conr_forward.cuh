// The forward sweeps: what the rows sum up over their positives and negatives.
#pragma once

#include "conr_sweep.cuh"

namespace conr {
namespace {

// One block for some anchors in each sweep.
template <class Engine>
__global__ void __launch_bounds__(kThreads, 2) conr_forward_kernel(Args args) {
  using A = typename Engine::A;
  constexpr int kR = Engine::kR, kC = Engine::kC;
  CONR_SHARED_BYTES(bytes);
  const int64_t n_blocks = blocks_of(args.rows.n_anchors, Engine::kRows);
  Walk<Engine> walk(bytes, args, blockIdx.x / n_blocks, blockIdx.x % n_blocks * Engine::kRows, {});
  const int serves = walk.sweep.serves;
  if (serves == 0) return;
  const auto& tile = walk.tile;
  const int flags = args.settings.flags;
  const A push = A(args.settings.push_scale * kLog2E);

  LogSum<A> E[kR], B[kR];
  Sum<A> s_sum[kR];
  int n[kR] = {}, m[kR] = {};  // positives; whether there are negatives
#pragma unroll
  for (int r = 0; r < kR; ++r) E[r].shift = B[r].shift = walk.shifted ? -A(INFINITY) : A(0);

  walk.visit_tiles([&](A(&s)[kR][kC], bool full) {
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int i = Engine::row(r);
#pragma unroll
      for (int c = 0; c < kC; ++c)
        s[r][c] *=
            Engine::kRowsAreUnit ? tile.i.scale[i] : tile.i.scale[i] * tile.j.scale[Engine::col(c)];
    }
    walk.decide(full, [&](auto is_shifted, auto of_sweep, auto kind_of) {
      constexpr bool kIsShifted = decltype(is_shifted)::value;
      constexpr int kServes = decltype(of_sweep)::value;
      const int served = kServes == (kPositives | kNegatives) ? serves : kServes;
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const auto kind = [&](int c) { return kind_of(Engine::row(r), Engine::col(c)); };
        if (served & kPositives) {
          if (kIsShifted) {
            A top = E[r].shift;
#pragma unroll
            for (int c = 0; c < kC; ++c) top = kind(c).positive && s[r][c] > top ? s[r][c] : top;
            E[r].raise(top);
          }
          const A shift = kIsShifted ? E[r].shift : A(0);
          A part_E = 0, part_s = 0;
#pragma unroll
          for (int c = 0; c < kC; ++c) {
            const bool positive = kind(c).positive;
            part_E += positive ? exp2_of(s[r][c] - shift) : A(0);
            part_s += positive ? s[r][c] : A(0);
            n[r] += positive;
          }
          E[r].sum.add(part_E);
          s_sum[r].add(part_s);
        }
        if (served & kNegatives) {
          if (kIsShifted) {
            A top = B[r].shift;
#pragma unroll
            for (int c = 0; c < kC; ++c) {
              s[r][c] = negative_exponent(s[r][c], kind(c).d, push, flags);
              top = kind(c).negative && s[r][c] > top ? s[r][c] : top;
            }
            B[r].raise(top);
          }
          const A shift = kIsShifted ? B[r].shift : A(0);
          A part_B = 0, heaviest = 0;
#pragma unroll
          for (int c = 0; c < kC; ++c) {
            const Kind<A> pair = kind(c);
            const A weight = pair.negative ? phi(pair.d, flags) : A(0);
            part_B += pair.negative || !kIsShifted ? weight * exp2_of(s[r][c] - shift) : A(0);
            heaviest = fmax(heaviest, weight);
          }
          B[r].sum.add(part_B);
          m[r] |= heaviest > A(0);
        }
      }
    });
  });

#pragma unroll
  for (int r = 0; r < kR; ++r) {
    for (int lane = 1; lane < Engine::kLanes; lane *= 2) {
      E[r].raise(__shfl_xor_sync(kAllLanes, E[r].shift, lane));
      B[r].raise(__shfl_xor_sync(kAllLanes, B[r].shift, lane));
    }
    const A E_sum = row_sum(E[r].sum.value(), Engine::kLanes);
    const A B_sum = row_sum(B[r].sum.value(), Engine::kLanes);
    const A positives_sum = row_sum(s_sum[r].value(), Engine::kLanes);
    const int n_all = row_sum(n[r], Engine::kLanes);
    const int m_all = row_sum(m[r], Engine::kLanes);  // > 0: some
    const int i = Engine::row(r);
    if (threadIdx.x % Engine::kLanes != 0 || i >= walk.n_i) continue;
    A* sums = static_cast<A*>(args.sums) + walk.anchor(i) * 5;
    int32_t* counts = args.counts + walk.anchor(i) * 2;
    if (serves & kPositives) {
      sums[0] = E[r].shift;
      sums[1] = E_sum;
      sums[4] = positives_sum * A(kLn2);
      counts[0] = n_all;
    }
    if (serves & kNegatives) {
      sums[2] = B[r].shift;
      sums[3] = B_sum;
      counts[1] = m_all;
    }
  }
}

}  // namespace
}  // namespace conr
