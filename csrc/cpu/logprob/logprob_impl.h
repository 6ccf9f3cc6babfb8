// The passes over given logits of logprob.h, for the vectors of the including file. A row is read once, in pieces that
// stay in the first cache between their maximum and their exponentials.
#pragma once

#include <cmath>

#include "cpu/common/parallel.h"
#include "cpu/common/vec.h"
#include "cpu/logprob/logprob.h"

namespace lldfast {
namespace {

constexpr int64_t kPiece = 2048;     // logits worked on at a time
constexpr int64_t kGradRows = 64;    // rows of a backward's item
constexpr int64_t kForwardRows = 8;  // rows of a forward's item

// One row's piece of n logits as fp32, transformed, with -inf behind the end up to a whole number of 4 vectors; returns
// that number.
inline int64_t read_piece(float* z, const LogprobArgs& args, int64_t row, int64_t first, int64_t n) {
  const uint8_t* from = static_cast<const uint8_t*>(args.logits.row(row)) + first * itemsize(args.logits.dtype);
  read_floats(z, from, args.logits.dtype, n);
  const int64_t whole = (n + 4 * kWidth - 1) / (4 * kWidth) * (4 * kWidth);
  for (int64_t i = n; i < whole; ++i) z[i] = -kInf;
  if (args.bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) z[i] += args.bias[first + i];
  }
  if (args.logit_scale != 1.0f) {
    for (int64_t i = 0; i < n; ++i) z[i] *= args.logit_scale;
  }
  if (args.softcap > 0.0f) {
    for (int64_t i = 0; i < n; i += kWidth) store(z + i, args.softcap * tanh(load(z + i) / args.softcap));
    for (int64_t i = n; i < whole; ++i) z[i] = -kInf;
  }
  return whole;
}

template <bool kEntropy>
inline void forward_row(const LogprobArgs& args, const LogprobOut& out, int64_t t, float* z) {
  const int64_t row = args.rows == nullptr ? t : args.rows[t], label = args.labels[row];
  float top = -kInf, z_label = -kInf;
  int64_t best = 0;
  double total = 0.0, total_moment = 0.0;  // of the pieces so far, relative to top: many small terms keep their weight
  for (int64_t first = 0; first < args.vocab; first += kPiece) {
    const int64_t n = args.vocab - first < kPiece ? args.vocab - first : kPiece;
    const int64_t whole = read_piece(z, args, row, first, n);
    if (label >= first && label < first + n) z_label = z[label - first];
    F highest[4];
    for (int i = 0; i < 4; ++i) highest[i] = splat(-kInf);
    for (int64_t k = 0; k < whole; k += 4 * kWidth) {
      for (int i = 0; i < 4; ++i) highest[i] = max(load(z + k + i * kWidth), highest[i]);
    }
    const F both = max(max(highest[0], highest[1]), max(highest[2], highest[3]));
    float piece_top = -kInf;
    for (int i = 0; i < kWidth; ++i) piece_top = both[i] > piece_top ? both[i] : piece_top;
    if (piece_top > top) {
      if (out.argmax != nullptr) {
        int64_t k = 0;
        while (z[k] != piece_top) ++k;
        best = first + k;
      }
      if (top != -kInf) {
        const double change = static_cast<double>(top) - piece_top, factor = std::exp(change);
        if constexpr (kEntropy) total_moment = (total_moment + total * (change > -87.0 ? change : -87.0)) * factor;
        total *= factor;
      } else if (first > 0) {
        // Everything before was -inf (or NaN, which stays): its places count nothing beside a finite maximum.
        if (total == total) total = 0.0;
        total_moment = 0.0;
      }
      top = piece_top;
    }
    const F reference = splat(top == -kInf ? 0.0f : top);
    F sum[4], moment[4];
    for (int i = 0; i < 4; ++i) sum[i] = moment[i] = splat(0.0f);
    for (int64_t k = 0; k < whole; k += 4 * kWidth) {
      for (int i = 0; i < 4; ++i) {
        const F x = load(z + k + i * kWidth) - reference;
        const F e = exp(x);
        sum[i] += e;
        if constexpr (kEntropy) moment[i] += e * max(splat(-87.0f), x);
      }
    }
    for (int i = 0; i < 4; ++i) {
      for (int k = 0; k < kWidth; ++k) {
        total += sum[i][k];
        if constexpr (kEntropy) total_moment += moment[i][k];
      }
    }
  }
  const double log_sum = std::isinf(top) && !std::isnan(total) ? 0.0 : std::log(total);
  out.lse[row] = static_cast<float>(top + log_sum);
  out.logprob[row] = static_cast<float>((static_cast<double>(z_label) - top) - log_sum);
  if (out.argmax != nullptr) {
    out.argmax[row] = best;
    out.top[row] = top;
  }
  if constexpr (kEntropy)
    out.entropy[row] = std::isinf(top) ? kNaN : static_cast<float>(log_sum - total_moment / total);
}

struct ForwardTask {
  const LogprobArgs& args;
  const LogprobOut& out;
  Counter items;

  static void work(void* self, int) {
    ForwardTask& task = *static_cast<ForwardTask*>(self);
    alignas(64) float z[kPiece + 64];
    for (int64_t t = task.items.next() * kForwardRows; t < task.args.tokens; t = task.items.next() * kForwardRows) {
      const int64_t stop = t + kForwardRows < task.args.tokens ? t + kForwardRows : task.args.tokens;
      for (int64_t i = t; i < stop; ++i) {
        if (task.out.entropy != nullptr) {
          forward_row<true>(task.args, task.out, i, z);
        } else {
          forward_row<false>(task.args, task.out, i, z);
        }
      }
    }
  }
};

inline void forward(const LogprobArgs& args, const LogprobOut& out) {
  ForwardTask task{args, out, {}};
  run_team(args.threads, &ForwardTask::work, &task);
}

// An item is a piece of the columns for some rows, or for all rows where dbias sums over them.
struct BackwardTask {
  const LogprobArgs& args;
  const LogprobGrad& grad;
  Counter items;

  void piece(int64_t first, int64_t begin, int64_t end) {
    alignas(64) float z[kPiece + 64];
    alignas(64) float column_sum[kPiece + 64];
    const int64_t n = args.vocab - first < kPiece ? args.vocab - first : kPiece;
    for (int64_t i = 0; i < n; ++i) column_sum[i] = 0.0f;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = args.rows == nullptr ? t : args.rows[t], label = args.labels[row];
      const int64_t whole = read_piece(z, args, row, first, n);
      const float g = grad.g[row], factor = (grad.h[row] - g) * args.logit_scale;
      const bool here = label >= first && label < first + n;
      const float capped = here && args.softcap > 0.0f ? z[label - first] / args.softcap : 0.0f;
      for (int64_t k = 0; k < whole; k += kWidth) {
        const F x = load(z + k);
        F dz = exp(x - grad.lse[row]) * factor;
        if (args.softcap > 0.0f) dz *= 1.0f - (x / args.softcap) * (x / args.softcap);
        store(z + k, dz);
      }
      if (here) {  // g (1 - p) + h p: near p = 1 the difference of g and g p would be rounding alone
        const float logprob = grad.logprob[row];
        const float of_label = grad.h[row] * ::expf(logprob) - g * ::expm1f(logprob);
        z[label - first] = of_label * args.logit_scale * (1.0f - capped * capped);
      }
      if (grad.dlogits.data != nullptr) {
        uint8_t* to = static_cast<uint8_t*>(grad.dlogits.row(row)) + first * itemsize(grad.dlogits.dtype);
        write_floats(to, grad.dlogits.dtype, z, n);
      }
      if (grad.dbias != nullptr) {
        for (int64_t i = 0; i < n; ++i) column_sum[i] += z[i];
      }
    }
    if (grad.dbias != nullptr) std::memcpy(grad.dbias + first, column_sum, static_cast<size_t>(n) * 4);
  }

  static void work(void* self, int) {
    BackwardTask& task = *static_cast<BackwardTask*>(self);
    const int64_t rows = task.grad.dbias != nullptr ? task.args.tokens : kGradRows;
    const int64_t pieces = (task.args.vocab + kPiece - 1) / kPiece, groups = (task.args.tokens + rows - 1) / rows;
    for (int64_t item = task.items.next(); item < pieces * groups; item = task.items.next()) {
      const int64_t begin = item / pieces * rows, end = begin + rows;
      task.piece(item % pieces * kPiece, begin, end < task.args.tokens ? end : task.args.tokens);
    }
  }
};

inline void backward(const LogprobArgs& args, const LogprobGrad& grad) {
  BackwardTask task{args, grad, {}};
  run_team(args.threads, &BackwardTask::work, &task);
}

constexpr LogprobKernels kKernels = {forward, backward};

}  // namespace
}  // namespace lldfast
