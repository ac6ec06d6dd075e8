// The arithmetic of ConR, once for host and device: label distances and masks of a pair, the sums
// of a row, and a row's loss and gradient coefficients from its sums. Symbols as in
// conr_kernels/MATHEMATICS.md.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define CONR_HD __host__ __device__ __forceinline__
#else
#define CONR_HD inline
#endif

namespace conr {

enum Flags : int {
  kInside = 1,         // log="inside"
  kAllNegatives = 2,   // negatives="all"
  kUnitTerms = 4,      // unit_terms
  kCountSelf = 8,      // count_self
  kWeightedRows = 16,  // weighted_rows
  kRmse = 32,          // distance="rmse"
  kShifted = 64,  // sums relative to a running maximum, five statistics; with kPhiIsExponential
  kPhiIsDistance = 128,     // φ(d) = d
  kPhiIsExponential = 256,  // φ(d) = exp(e·d)
  kRateIsWeighted = 512,    // r_i contains w_i
  kRateIsScaled = 1024,     // r_i contains e
  kWidened = 2048,          // bfloat16 rows are computed as float32
};

enum Serves : int { kPositives = 1, kNegatives = 2 };

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// No product below may be contracted with a sum into one FMA: all backends round d_ij alike.
CONR_HD float multiply_exactly_rounded(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

CONR_HD float absolute_difference(float a, float b) {
  return fabsf(a - b);
}

// d_ij of label rows with L > 1 components, added one after another in their order.
CONR_HD float label_distance(const float* y_i, const float* y_j, int64_t n_components, bool rmse) {
  float total = 0.0f;
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
  for (int64_t c = 0; c < n_components; ++c) {
    const float difference = absolute_difference(y_i[c], y_j[c]);
    total = total + (rmse ? multiply_exactly_rounded(difference, difference) : difference);
  }
#ifdef __CUDA_ARCH__
  const float mean = __fdiv_rn(total, static_cast<float>(n_components));
  return rmse ? __fsqrt_rn(mean) : mean;
#else
  const float mean = total / static_cast<float>(n_components);
  return rmse ? std::sqrt(mean) : mean;
#endif
}

// 2^t to 2 ulp; results below the normal range are 0.
CONR_HD float exp2_of(float t) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(t));
  return result;
#else
  return exp2f(t);
#endif
}
CONR_HD double exp2_of(double t) {
  return exp2(t);
}

// What one pair is to its anchor, as one number: 0 nothing, −1 a positive, d_ij > 0 a negative.
constexpr float kPositive = -1.0f;

template <class A>
CONR_HD A phi(A d, int flags) {
  return flags & kPhiIsDistance ? d : A(1);
}

// Exponent of a negative in base 2: s_ij·log2e, plus e·d·log2e for the exponential pushing weight.
template <class A>
CONR_HD A negative_exponent(A t, A d, A push, int flags) {
  return flags & kPhiIsExponential ? t + push * d : t;
}

// A compensated sum: exact to a few units in the last place however many terms there are.
template <class A>
struct Sum {
  A total = 0;
  A lost = 0;
  CONR_HD void add(A x) {
    const A y = x - lost;
    const A next = total + y;
    lost = (next - total) - y;
    total = next;
  }
  CONR_HD void scale(A factor) {
    total *= factor;
    lost *= factor;
  }
  CONR_HD A value() const { return total - lost; }
};

// Σ 2^t kept as 2^shift · sum.
template <class A>
struct LogSum {
  A shift = 0;  // −∞ before the first term where the shift is to follow the terms
  Sum<A> sum;
  CONR_HD void raise(A top) {
    if (top > shift) {
      sum.scale(exp2_of(shift - top));
      shift = top;
    }
  }
  CONR_HD void merge(A other_shift, A other_sum) {
    if (other_sum == A(0)) return;
    raise(other_shift);
    sum.add(other_sum * exp2_of(other_shift - shift));
  }
};

// The gradient coefficients of one row: (α, β, γ), or (±1, β, ±1, log2|α|, log2|γ|) where shifted.
template <class A>
struct Coefficients {
  A alpha, beta, gamma, log_alpha, log_gamma;
};

template <class A>
CONR_HD A shifted_term(A sign, A exponent) {
  return sign == A(0) ? A(0) : sign * exp2_of(exponent);
}

// H_ij of a positive and of a negative: what the pair contributes to τ ∂L/∂q_i, as a multiple of
// q_j.
template <bool kIsShifted, class A>
CONR_HD A positive_gradient(A t, const Coefficients<A>& i, const Coefficients<A>& j) {
  const A linear = i.beta + j.beta;
  if (kIsShifted)
    return shifted_term(i.alpha, t + i.log_alpha) + shifted_term(j.alpha, t + j.log_alpha) - linear;
  return exp2_of(t) * (i.alpha + j.alpha) - linear;
}

template <bool kIsShifted, class A>
CONR_HD A negative_gradient(A t, A d, const Coefficients<A>& i, const Coefficients<A>& j, A push,
                            int flags) {
  const A weight = phi(d, flags);
  if (kIsShifted) {
    t = negative_exponent(t, d, push, flags);
    return weight *
           (shifted_term(i.gamma, t + i.log_gamma) + shifted_term(j.gamma, t + j.log_gamma));
  }
  return weight * exp2_of(t) * (i.gamma + j.gamma);
}

// log(exp(a) + exp(b)), also for −∞.
CONR_HD double log_add(double a, double b) {
  const double top = a > b ? a : b;
  if (top == -INFINITY) return top;
  return top + log1p(exp(-fabs(a - b)));
}

// What the sweeps know of a row.
struct RowSums {
  double log_E;  // log Σ_P exp s
  double log_B;  // log Σ_M φ exp s
  double s_sum;  // Σ_P s
  int32_t n, m;
};

// Loss and statistics of a row for an upstream gradient of 1, as signs and natural logarithms.
CONR_HD void finish_row(const RowSums& row, double n_keys, double w, double rate, int flags,
                        double* loss, Coefficients<double>* stats) {
  *loss = 0.0;
  *stats = Coefficients<double>{0.0, 0.0, 0.0, -INFINITY, -INFINITY};
  if (row.n <= 0 || row.m <= 0) return;
  const double log_r = log(rate), sign_r = rate == 0.0 ? 0.0 : 1.0;
  double log_T = log_r + row.log_B;  // of Z − E
  if (flags & kUnitTerms) log_T = log_add(log(n_keys - row.n), log_T);
  const double excess = log_add(log_T - row.log_E, 0.0);  // log Z − log E
  const double log_Z = row.log_E + excess;
  const double n = row.n;
  if (flags & kInside) {
    const double c = n + (flags & kCountSelf ? 1.0 : 0.0);
    const double log_alpha = log(n / c) - log_Z;
    *loss = (n * log_Z - row.s_sum) / c;
    *stats = Coefficients<double>{1.0, 1.0 / c, sign_r, log_alpha, log_alpha + log_r};
  } else {
    *loss = log(n) + excess;
    *stats = Coefficients<double>{-1.0, 0.0, sign_r, log_T - log_Z - row.log_E, log_r - log_Z};
  }
  if (flags & kWeightedRows) {
    *loss *= w;
    stats->alpha *= w;
    stats->beta *= w;
    stats->gamma *= w;
  }
}

}  // namespace conr
