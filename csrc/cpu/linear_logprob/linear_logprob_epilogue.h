// What happens to a block of logits (block.h) in linear_logprob.h: StatsEpilogue keeps the running log-sum-exp of each
// token, GradEpilogue turns logits into their gradient.
#pragma once

#include <cmath>

#include "cpu/common/block.h"
#include "cpu/linear_logprob/linear_logprob.h"

namespace lldfast {
namespace {

// Bias, scale and softcap of the logits, in place. `rows` real vocabulary rows from v0 on.
inline void transform(float* z, int rows, int64_t v0, const LinearLogprobArgs& args) {
  const float scale = args.logit_scale;
  if (args.bias != nullptr || scale != 1.0f) {
    for (int r = 0; r < rows; ++r) {
      const F bias = splat(args.bias == nullptr ? 0.0f : args.bias[v0 + r]);
      for (int i = 0; i < kV; ++i) {
        float* p = z + r * kBlock + i * kWidth;
        store(p, (load(p) + bias) * scale);
      }
    }
  }
  if (args.softcap > 0.0f) {
    for (int k = 0; k < rows * kBlock; k += kWidth) store(z + k, args.softcap * tanh(load(z + k) / args.softcap));
  }
}

// Running statistics of a block of tokens over one split of the vocabulary.
struct Lanes {
  float max[kBlock];
  float sum[kBlock];      // of exp(z - max)
  float moment[kBlock];   // of exp(z - max) (z - max), for the entropy
  float z_label[kBlock];  // -inf until the label is met
  int32_t best[kBlock];   // the vocabulary row of max
  int32_t label[kBlock];  // -1 where it is outside the vocabulary, or there is no token
};

inline void reset(Lanes& lanes) {
  for (int i = 0; i < kBlock; ++i) {
    lanes.max[i] = lanes.z_label[i] = -kInf;
    lanes.sum[i] = lanes.moment[i] = 0.0f;
    lanes.best[i] = 0;
  }
}

template <bool kArgmax, bool kEntropy>
struct StatsEpilogue {
  static constexpr bool kNone = false;

  const LinearLogprobArgs& args;
  float* z;      // first block of logits
  Lanes* lanes;  // of the first block
  int64_t v0 = 0;
  int rows = 0;

  // State of the block in work; its pieces keep it in registers.
  F top[kV] = {}, sum[kV] = {}, moment[kV] = {};
  int64_t block = 0;
  int row = 0;

  void panel(int64_t first_row, int n) {
    v0 = first_row;
    rows = n;
  }

  LLDFAST_INLINE void begin(int64_t b) {
    block = b;
    row = 0;
    float* zb = z + b * kTile;
    Lanes& state = lanes[b];
    if (args.bias != nullptr || args.logit_scale != 1.0f || args.softcap > 0.0f) transform(zb, rows, v0, args);
    match_labels(state.label, v0, rows, [&](int lane, int r) { state.z_label[lane] = zb[r * kBlock + lane]; });
    for (int i = 0; i < kV; ++i) {
      const F before = load(state.max + i * kWidth);
      F m = before;
      if constexpr (kArgmax) {
        I best = load(state.best + i * kWidth);
        for (int r = 0; r < rows; ++r) {
          const F x = load(zb + r * kBlock + i * kWidth);
          const I higher = x > m;
          best = select(higher, splat(static_cast<int32_t>(v0 + r)), best);
          m = select(higher, x, m);
        }
        store(state.best + i * kWidth, best);
      } else {
        for (int r = 0; r < rows; ++r) m = max(load(zb + r * kBlock + i * kWidth), m);
      }
      store(state.max + i * kWidth, m);
      // Where everything so far is -inf, differences to 0 keep the sums at (nearly) 0 instead of NaN.
      const F reference = select(m == -kInf, splat(0.0f), m);
      const F was = load(state.sum + i * kWidth);
      const F change = max(splat(-87.0f), select(was == 0.0f, splat(0.0f), before - reference));
      const F factor = exp(change);
      top[i] = reference;
      sum[i] = settled(was * factor);
      if constexpr (kEntropy) moment[i] = settled((load(state.moment + i * kWidth) + was * change) * factor);
    }
  }

  LLDFAST_INLINE void advance(int n) {
    const float* p = z + block * kTile + row * kBlock;
    const int stop = row + n < rows ? row + n : rows;
    for (; row < stop; ++row, p += kBlock) {
      for (int i = 0; i < kV; ++i) {
        const F x = load(p + i * kWidth) - top[i];
        const F e = exp(x);
        sum[i] += e;
        if constexpr (kEntropy) moment[i] += e * max(splat(-87.0f), x);
      }
    }
  }

  LLDFAST_INLINE void end() {
    Lanes& state = lanes[block];
    for (int i = 0; i < kV; ++i) {
      store(state.sum + i * kWidth, sum[i]);
      if constexpr (kEntropy) store(state.moment + i * kWidth, moment[i]);
    }
  }
};

// One token's statistics over all splits, in the order of the splits, whatever threads computed them.
struct Total {
  double max = -kInf, sum = 0.0, moment = 0.0;
  float z_label = -kInf;
  int64_t best = 0;

  void add(const Lanes& part, int lane) {
    if (part.z_label[lane] != -kInf || std::isnan(part.z_label[lane])) z_label = part.z_label[lane];
    const double top = part.max[lane];
    if (part.sum[lane] == 0.0f) return;  // no rows
    const bool first = sum == 0.0;
    const double m = first || top > max ? top : max;
    if (first || top > max) best = part.best[lane];
    // inf - inf is no shift at all: a part without a finite logit counts as it is
    const double old_shift = max == m || first ? 0.0 : max - m, new_shift = top == m ? 0.0 : top - m;
    const double old_factor = std::exp(old_shift), new_factor = std::exp(new_shift);
    moment = (first ? 0.0 : (moment + sum * (old_factor > 0.0 ? old_shift : 0.0)) * old_factor) +
             (part.moment[lane] + part.sum[lane] * (new_factor > 0.0 ? new_shift : 0.0)) * new_factor;
    sum = (first ? 0.0 : sum * old_factor) + part.sum[lane] * new_factor;
    max = m;
  }
};

// Gradient of sum_t g_t logprob_t + h_t lse_t by the logits before bias, scale and softcap, but for the labels' own
// terms:
//   dz = (h - g) softmax(z) * logit_scale * (1 - (z / softcap)^2),
// handed to the engine two rows at a time. The label's own entry is 0 there and left as a factor in label_grad: in fp32
// it goes straight into dH and dW. Near p = 1 it is the small g (1 - p), which a rounded p and a separate g would not
// give.
template <class Engine>
struct GradEpilogue {
  static constexpr bool kNone = false;

  const LinearLogprobArgs& args;
  float* z;
  const int32_t* label;  // [blocks][32], as in Lanes
  const float* lse;      // [blocks][32]
  const float* coefficient;
  const float* of_label;  // g (1 - p) + h p of the label
  float* label_grad;
  float* bias_part;                    // [blocks][rows of the chunk]: sums over a block's tokens, or null
  typename Engine::Gradient gradient;  // where the engine wants the rows
  int64_t first_block = 0;             // number of the first block of z in the arrays above
  int64_t v0 = 0;
  int64_t chunk_row = 0;  // v0 relative to the chunk of the vocabulary
  int rows = 0;

  F top[kV] = {}, factor[kV] = {};
  int64_t block = 0;
  int row = 0;

  void panel(int64_t first_row, int n, int64_t row_in_chunk) {
    v0 = first_row;
    rows = n;
    chunk_row = row_in_chunk;
  }

  LLDFAST_INLINE void begin(int64_t b) {
    block = b;
    row = 0;
    float* zb = z + b * kTile;
    const int64_t at = (first_block + b) * kBlock;
    if (args.bias != nullptr || args.logit_scale != 1.0f || args.softcap > 0.0f) transform(zb, rows, v0, args);
    match_labels(label + at, v0, rows, [&](int lane, int r) {
      const float x = args.softcap > 0.0f ? zb[r * kBlock + lane] / args.softcap : 0.0f;
      label_grad[at + lane] = of_label[at + lane] * args.logit_scale * (1.0f - x * x);
      zb[r * kBlock + lane] = lse[at + lane] - 100.0f;  // a probability of nothing
    });
    for (int i = 0; i < kV; ++i) {
      top[i] = load(lse + at + i * kWidth);
      factor[i] = load(coefficient + at + i * kWidth) * args.logit_scale;
    }
  }

  LLDFAST_INLINE void advance(int n) {
    const float* p = z + block * kTile + row * kBlock;
    for (const int stop = row + n < kPanel ? row + n : kPanel; row < stop; row += 2, p += 2 * kBlock) {
      F pair[2][kV];
      for (int r = 0; r < 2; ++r) {
        for (int i = 0; i < kV; ++i) {
          if (row + r >= rows) {
            pair[r][i] = splat(0.0f);  // rows behind the vocabulary
            continue;
          }
          const F x = load(p + r * kBlock + i * kWidth);
          F dz = exp(x - top[i]) * factor[i];
          if (args.softcap > 0.0f) dz *= 1.0f - (x / args.softcap) * (x / args.softcap);
          pair[r][i] = dz;
        }
        if (bias_part != nullptr) {
          bias_part[(first_block + block) * Engine::kChunkRows + chunk_row + row + r] = sum_lanes(pair[r]);
        }
      }
      Engine::put(gradient, first_block + block, chunk_row + row, pair);
    }
  }

  LLDFAST_INLINE void end() {}
};

}  // namespace
}  // namespace lldfast
