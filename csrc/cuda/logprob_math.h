// The arithmetic of a token's log-likelihood, without the machinery that feeds it, so that it can be checked on the
// host.
//
//   z = softcap * tanh(logit_scale * (x + bias) / softcap)        logprob = (z_y - m) - log s,  s = sum exp(z - m)
//   lse = m + log s                                               entropy = log s - w / s,      w = sum exp(z - m) (z -
//   m)
//
// The maximum m is kept finite (clamped to +-FLT_MAX). That alone makes the infinities come out right, with no case for
// them: an empty sum has s = 0 and lse = -inf, a logit of +inf makes s and lse +inf, a NaN makes s NaN.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define LLDFAST_HD __host__ __device__ __forceinline__
#else
#define LLDFAST_HD inline
#endif

namespace lldfast {

// What stands between a logit as given and the z that is scored.
struct Transform {
  float scale;
  float softcap;          // <= 0: none
  float inverse_softcap;  // read only where there is a softcap
};

// A product that the compiler must not fuse with a following sum: z has to be one value, the same wherever it is used,
// or exp(z - m) of the largest z is not exactly 1 and logprob can exceed 0.
LLDFAST_HD float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// e^d for d <= 0 (or NaN), within a few 1e-7 of it; exactly 1 at 0, 0 below -88.
LLDFAST_HD float exp_below(float d) {
  const float power = rounded_product(d, 1.4426950408889634f);
#ifdef __CUDA_ARCH__
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(power));
  return value;
#else
  return std::exp2(power);
#endif
}

// Writes dz/dx to *slope where that is wanted.
LLDFAST_HD float transform(float x, float bias, const Transform& f, float* slope = nullptr) {
  const float z = rounded_product(x + bias, f.scale);
  if (!(f.softcap > 0)) {
    if (slope) *slope = f.scale;
    return z;
  }
  const float t = tanhf(rounded_product(z, f.inverse_softcap));
  if (slope) *slope = f.scale * ((1 - t) * (1 + t));
  return rounded_product(f.softcap, t);
}

// A part of a row's sums. `w`, `best` and `at` are kept only where argmax, the largest logit or the entropy is asked
// for.
struct Partial {
  float m;
  float s;
  float w;
  float best;  // the largest z; NaN counts as larger than any number, as in torch
  int at;      // its column, the lowest of a tie; -1: all are -inf so far
};

LLDFAST_HD Partial empty_partial() {
  return {-FLT_MAX, 0, 0, -INFINITY, -1};
}

LLDFAST_HD float finite(float m) {
  return fminf(fmaxf(m, -FLT_MAX), FLT_MAX);
}

// For factors of exp(d): keeps 0 * -inf, a NaN, out of w.
LLDFAST_HD float bounded(float d) {
  return fmaxf(d, -128.0f);
}

LLDFAST_HD bool is_better(float z, float best) {
  return z > best || (z != z && best == best);
}

// a becomes the sums of a and b. The fused products are spelled out: every kernel must round alike.
template <bool kExtras>
LLDFAST_HD void merge(Partial& a, const Partial& b) {
  const float m = fmaxf(a.m, b.m);
  const float of_a = exp_below(a.m - m), of_b = exp_below(b.m - m);
  if (kExtras) {
    const float w_a = fmaf(bounded(a.m - m), a.s, a.w), w_b = fmaf(bounded(b.m - m), b.s, b.w);
    a.w = fmaf(w_a, of_a, rounded_product(w_b, of_b));
    const bool tie = a.best == b.best || (a.best != a.best && b.best != b.best);
    if (is_better(b.best, a.best) || (tie && b.at < a.at)) {
      a.best = b.best;
      a.at = b.at;
    }
  }
  a.s = fmaf(a.s, of_a, rounded_product(b.s, of_b));
  a.m = m;
}

struct TokenScore {
  float logprob;
  float lse;
  float entropy;
};

// z_y is read only where the label is owned, that is, where it lies in this shard of the vocabulary.
LLDFAST_HD TokenScore finish(const Partial& total, float z_y, bool owned) {
  const float log_s = logf(total.s);
  return {owned ? (z_y - total.m) - log_s : -INFINITY, total.m + log_s, log_s - total.w / total.s};
}

// Gradient of g * logprob + h * lse by x, for the column of logit x.
LLDFAST_HD float logit_grad(float x, float bias, const Transform& f, float lse, float g, float h, bool is_label) {
  float slope;
  const float z = transform(x, bias, f, &slope);
  return fmaf(h - g, exp_below(z - lse), is_label ? g : 0.0f) * slope;
}

}  // namespace lldfast
