// What the sweeps of distill_linear.h over the vocabulary know of a call and of its tokens, and the first of them: what
// StatsEpilogue of linear_logprob_epilogue.h does with blocks of logits (block.h), for two models.
#pragma once

#include <cmath>

#include "cpu/common/block.h"
#include "cpu/distill/distill_linear.h"
#include "cpu/distill/distill_math.h"

namespace lldfast {
namespace {

// What the sweeps know of each token, [blocks * 32] in the order of `rows`; where there is no token, logs are -inf, the
// rest 0.
struct DistillTokens {
  int32_t* label;  // -1 without cross entropy
  float *lse_p, *lse_q, *lse_1;  // of the logits divided by the temperature; of the student's as they are
  float* lse_difference;         // lse_p - lse_q, rounded once
  float* log_r;                  // log sum exp of what mix gives
  float *sum_g, *sum_h;          // G and H of lldfast/ops/distill/math.py
  float *loss, *ce;
  float *g, *g_ce;  // upstream: of the divergence, divided by the temperature; of the cross entropy
  float* of_label;  // g_ce (q - 1) of the label, q at temperature 1

  static constexpr int64_t kArrays = 13;

  DistillTokens(float* memory, int64_t n) : label(reinterpret_cast<int32_t*>(memory)) {
    float** const arrays[] = {&lse_p, &lse_q, &lse_1, &lse_difference, &log_r, &sum_g,
                              &sum_h, &loss,  &ce,    &g,              &g_ce,  &of_label};
    for (float** array : arrays) *array = memory += n;
  }
};

// A call's constants.
struct DistillCall {
  const DistillMath math;
  const DistillTokens& tokens;
  const bool ce, tempered;
  const bool is_kl, first_is_teacher;  // of KL(A, B): A, where neither is a mixture of both
  const bool from_stats;               // the loss and its sums follow from the first sweep
  const bool one_sweep;                // normaliser and sums come from one sweep

  DistillCall(const DistillSpec& spec, const DistillTokens& t)
      : math(distill_math(spec)),
        tokens(t),
        ce(spec.ce),
        tempered(spec.temperature != 1.0),
        is_kl(math.form == Form::kKlOther || math.form == Form::kKlAssistant),
        first_is_teacher(math.form == Form::kKlOther ? !math.other_is_student
                                                     : math.assistant == Assistant::kTeacher),
        from_stats(is_kl && math.assistant == (math.other_is_student ? Assistant::kTeacher : Assistant::kStudent)),
        one_sweep(is_kl && !math.normalised) {}
};

// The blocks that an epilogue works on, whose student's half is the engine's product.
struct DistillBlocks {
  static constexpr bool kNone = false;

  const DistillCall& call;
  const float *zs, *zt;       // first block of both models' logits
  const int64_t first_block;  // its number
  int64_t v0 = 0;
  int rows = 0;

  int64_t block = 0;
  int row = 0;

  DistillBlocks(const DistillCall& c, const float* student, const float* teacher, int64_t first)
      : call(c), zs(student), zt(teacher), first_block(first) {}

  void panel(int64_t first_row, int n) {
    v0 = first_row;
    rows = n;
  }

  LLDFAST_INLINE void begin(int64_t b) {
    block = b;
    row = 0;
  }
  LLDFAST_INLINE void end() {}

  int64_t token() const { return (first_block + block) * kBlock; }
  int stop(int n) const { return row + n < rows ? row + n : rows; }
};

// Where everything so far is -inf, differences to 0 keep sums at (nearly) 0 instead of NaN.
LLDFAST_INLINE F reference_of(F top) {
  return select(top == -kInf, splat(0.0f), top);
}

// First sweep: the running log-sum-exp of both models, of the student's logits at temperature 1 too, and the mean of
// z_teacher - z_student under that of the two which KL names first.
template <bool kTempered>
struct PairEpilogue : DistillBlocks {
  struct Lanes {
    float max_p[kBlock], sum_p[kBlock], max_q[kBlock], sum_q[kBlock], sum_1[kBlock];
    float moment[kBlock];   // of exp(z - max) (z_teacher - z_student)
    float z_label[kBlock];  // -inf until the label is met
  };

  Lanes* lanes;  // of the first block

  PairEpilogue(const DistillBlocks& blocks, Lanes* l) : DistillBlocks(blocks), lanes(l) {}

  static void reset(Lanes& x) {
    for (int i = 0; i < kBlock; ++i) {
      x.max_p[i] = x.max_q[i] = x.z_label[i] = -kInf;
      x.sum_p[i] = x.sum_q[i] = x.sum_1[i] = x.moment[i] = 0.0f;
    }
  }

  // The maximum with the panel's logits z, and what to multiply sums under the former one with (see StatsEpilogue).
  LLDFAST_INLINE void raise(float* top, const float* z, const float* sum, F& factor, F& factor_1) const {
    const F before = load(top);
    F m = before;
    for (int r = 0; r < rows; ++r) m = max(load(z + r * kBlock), m);
    store(top, m);
    const F change = select(load(sum) == 0.0f, splat(0.0f), before - reference_of(m));
    factor = exp(change * call.math.inverse_temperature);
    if constexpr (kTempered) factor_1 = exp(change);
  }

  LLDFAST_INLINE void begin(int64_t b) {
    DistillBlocks::begin(b);
    const float *s = zs + b * kTile, *t = zt + b * kTile;
    Lanes& x = lanes[b];
    match_labels(call.tokens.label + token(), v0, rows,
                 [&](int lane, int r) { x.z_label[lane] = s[r * kBlock + lane]; });
    for (int i = 0; i < kBlock; i += kWidth) {
      F of_p, of_q, of_1, unused;
      raise(x.max_p + i, t + i, x.sum_p + i, of_p, unused);
      raise(x.max_q + i, s + i, x.sum_q + i, of_q, of_1);
      store(x.sum_p + i, settled(load(x.sum_p + i) * of_p));
      store(x.sum_q + i, settled(load(x.sum_q + i) * of_q));
      if constexpr (kTempered) store(x.sum_1 + i, settled(load(x.sum_1 + i) * of_1));
      store(x.moment + i, settled(load(x.moment + i) * (call.first_is_teacher ? of_p : of_q)));
    }
  }

  LLDFAST_INLINE void advance(int n) {
    Lanes& x = lanes[block];
    const float scale = call.math.inverse_temperature;
    const I teacher = splat(call.first_is_teacher ? -1 : 0);
    const int end_row = stop(n);
    for (int i = 0; i < kBlock; i += kWidth) {
      const F top_p = reference_of(load(x.max_p + i)), top_q = reference_of(load(x.max_q + i));
      F sum_p = load(x.sum_p + i), sum_q = load(x.sum_q + i), sum_1 = load(x.sum_1 + i), moment = load(x.moment + i);
      for (int r = row; r < end_row; ++r) {
        const int64_t at = block * kTile + r * kBlock + i;
        const F t = load(zt + at), s = load(zs + at), below = s - top_q;
        const F p = exp((t - top_p) * scale), q = exp(below * scale);
        sum_p += p;
        sum_q += q;
        if constexpr (kTempered) sum_1 += exp(below);
        moment += select(teacher, p, q) * (t - s);
      }
      store(x.sum_p + i, sum_p);
      store(x.sum_q + i, sum_q);
      if constexpr (kTempered) store(x.sum_1 + i, sum_1);
      store(x.moment + i, moment);
    }
    row = end_row;
  }

  // Token t from its statistics over all splits, lane `lane` of parts[s * stride].
  static void finish(const DistillCall& call, const Lanes* parts, int64_t splits, int64_t stride, int lane, int64_t t) {
    const double scale = call.math.inverse_temperature;
    double max_p = -kInf, max_q = -kInf;
    for (int64_t s = 0; s < splits; ++s) {
      const Lanes& x = parts[s * stride];
      max_p = x.max_p[lane] > max_p ? x.max_p[lane] : max_p;
      max_q = x.max_q[lane] > max_q ? x.max_q[lane] : max_q;
    }
    double sum_p = 0.0, sum_q = 0.0, sum_1 = 0.0, moment = 0.0;
    float z_label = -kInf;
    for (int64_t s = 0; s < splits; ++s) {
      const Lanes& x = parts[s * stride];
      const double of_p = std::exp((x.max_p[lane] - max_p) * scale), of_q = std::exp((x.max_q[lane] - max_q) * scale);
      sum_p += x.sum_p[lane] * of_p;
      sum_q += x.sum_q[lane] * of_q;
      if constexpr (kTempered) sum_1 += x.sum_1[lane] * std::exp(x.max_q[lane] - max_q);
      moment += x.moment[lane] * (call.first_is_teacher ? of_p : of_q);
      if (x.z_label[lane] != -kInf) z_label = x.z_label[lane];
    }
    const DistillTokens& tokens = call.tokens;
    const double lse_p = max_p * scale + std::log(sum_p), lse_q = max_q * scale + std::log(sum_q);
    const double log_1 = std::log(kTempered ? sum_1 : sum_q);
    tokens.lse_p[t] = static_cast<float>(lse_p);
    tokens.lse_q[t] = static_cast<float>(lse_q);
    tokens.lse_1[t] = static_cast<float>(max_q + log_1);
    tokens.lse_difference[t] = static_cast<float>(lse_p - lse_q);
    tokens.ce[t] = call.ce ? static_cast<float>((max_q - z_label) + log_1) : 0.0f;
    tokens.of_label[t] = call.ce ? tokens.g_ce[t] * ::expm1f(-tokens.ce[t]) : 0.0f;
    if (!call.from_stats) return;
    const double mean = scale * moment / (call.first_is_teacher ? sum_p : sum_q), shift = lse_p - lse_q;
    const double loss = call.first_is_teacher ? mean - shift : shift - mean;
    const bool other_first = call.math.form == Form::kKlOther;
    tokens.loss[t] = static_cast<float>(loss);
    tokens.sum_g[t] = static_cast<float>(other_first ? -1.0 : loss);
    tokens.sum_h[t] = !call.math.other_is_student ? 0.0f : static_cast<float>(other_first ? loss : -1.0);
  }
};

}  // namespace
}  // namespace lldfast
