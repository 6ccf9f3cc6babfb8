// The passes over a row's vocabulary of distill.h, for the vectors of the including file: log-sum-exps of both models,
// that of the assistant where it is not normalised as it stands, the sums, the gradient. Each works in pieces that stay
// in the first cache; what is cheap to compute is computed again, so nothing but the logits themselves is read twice.
#pragma once

#include <cmath>

#include "cpu/common/parallel.h"
#include "cpu/distill/distill.h"
#include "cpu/distill/distill_math.h"

namespace lldfast {
namespace {

constexpr int64_t kPiece = 1024;  // entries worked on at a time
constexpr int64_t kRows = 4;      // of an item

// Scratch of a piece. The buffers' ends keep them off each other's cache sets.
struct alignas(64) Piece {
  float p[kPiece + 64], q[kPiece + 64], r[kPiece + 64], w[kPiece + 64], dz[kPiece + 64];
  float p_minus_q[kPiece + 64], other_minus_r[kPiece + 64];
};

// Fills up whole vectors with entries that do not count.
inline int64_t whole(int64_t n) {
  return (n + 4 * kWidth - 1) / (4 * kWidth) * (4 * kWidth);
}

// A log-sum-exp in two floats: subtracted one after the other, they do not shift every log by the same rounding error.
struct LogSum {
  float high, low;  // low is NaN where high is infinite

  explicit LogSum(double value = 0.0) : high(static_cast<float>(value)), low(static_cast<float>(value - high)) {}

  LLDFAST_INLINE F normalise(F x) const { return (x - high) - low; }
};

class RunningLogSum {
 public:
  void add(const float* z, int64_t n) {
    F highest[4];
    for (int i = 0; i < 4; ++i) highest[i] = splat(-kInf);
    for (int64_t k = 0; k < n; k += 4 * kWidth) {
      for (int i = 0; i < 4; ++i) highest[i] = max(load(z + k + i * kWidth), highest[i]);
    }
    const F both = max(max(highest[0], highest[1]), max(highest[2], highest[3]));
    float top = -kInf;
    for (int i = 0; i < kWidth; ++i) top = both[i] > top ? both[i] : top;
    if (top > top_) {
      // Everything before was -inf (or NaN, which stays): its places count nothing beside a finite maximum.
      total_ = top_ != -kInf ? total_ * std::exp(static_cast<double>(top_) - top) : total_ == total_ ? 0.0 : total_;
      top_ = top;
    }
    const F reference = splat(top_ == -kInf ? 0.0f : top_);
    // The maximum is counted apart: beside its 1, a lane would lose what is small, which is all that p - 1 consists of.
    F sum[4];
    I count[4];
    for (int i = 0; i < 4; ++i) {
      sum[i] = splat(0.0f);
      count[i] = splat(0);
    }
    for (int64_t k = 0; k < n; k += 4 * kWidth) {
      for (int i = 0; i < 4; ++i) {
        const F x = load(z + k + i * kWidth) - reference;
        const I highest_again = x == 0.0f;
        sum[i] += select(highest_again, splat(0.0f), exp(x));
        count[i] -= highest_again;
      }
    }
    for (int i = 0; i < 4; ++i) {
      for (int k = 0; k < kWidth; ++k) total_ += static_cast<double>(sum[i][k]) + count[i][k];
    }
  }

  double value() const { return top_ + std::log(total_); }

 private:
  float top_ = -kInf;
  double total_ = 0.0;  // relative to top_: many small terms keep their weight
};

LLDFAST_INLINE double sum_lanes(F x) {
  double total = 0.0;
  for (int i = 0; i < kWidth; ++i) total += x[i];
  return total;
}

// Sums over the vocabulary; G, H and the gradient as in lldfast/ops/distill/math.py.
struct Sums {
  double loss = 0.0, g = 0.0, wg = 0.0, wr = 0.0, d = 0.0;
};

// One row's work. kAssistant and kForm make its loops; nothing in them branches on more than a constant of the call.
class Row {
 public:
  Row(const DistillArgs& args, const DistillOut& out, const DistillMath& math, Piece& piece, int64_t row)
      : args_(args), out_(out), m_(math), piece_(piece), row_(row) {
    vocab_ = args.student_vocab > args.teacher_vocab ? args.student_vocab : args.teacher_vocab;
    plain_is_q_ = m_.inverse_temperature == 1.0f;
  }

  void run() {
    log_sums();
    if (!m_.normalised) mixture_log_sum();
    const bool gradient = out_.out.data != nullptr;
    Sums sums;
    with_form(m_.form, [&](auto form) {
      for (int64_t first = 0; first < vocab_; first += kPiece) {
        const int64_t n = logs(first);
        if (!gradient) {
          add<form.value, false, false>(n, sums);
        } else if (m_.constant_w) {
          add<form.value, true, false>(n, sums);
        } else {
          add<form.value, true, true>(n, sums);
        }
      }
    });
    out_.divergence[row_] = static_cast<float>(sums.loss);
    out_.ce[row_] = args_.spec.ce ? static_cast<float>(-logprob_) : 0.0f;
    if (!gradient) return;
    // A constant w leaves of H only this: r sums to 1.
    double h = m_.other_is_student ? sums.d : 0.0;
    if (m_.through && !m_.constant_w) h += sums.wg - sums.g * sums.wr;
    with_form(m_.form, [&](auto form) {
      for (int64_t first = 0; first < vocab_ && first < args_.student_vocab; first += kPiece) {
        const int64_t n = logs(first);
        gradients<form.value>(n, static_cast<float>(sums.g), static_cast<float>(h));
        write(first);
      }
    });
  }

 private:
  // A piece of logits as fp32, -inf where there are none; returns how many to work on.
  int64_t read(float* to, const Matrix& logits, int64_t vocab, int64_t first) const {
    const int64_t left = vocab - first, n = left < 0 ? 0 : left < kPiece ? left : kPiece, end = size(first);
    const uint8_t* from = static_cast<const uint8_t*>(logits.row(row_)) + first * itemsize(logits.dtype);
    if (n > 0) read_floats(to, from, logits.dtype, n);
    for (int64_t i = n; i < end; ++i) to[i] = -kInf;
    return end;
  }

  int64_t size(int64_t first) const { return whole(vocab_ - first < kPiece ? vocab_ - first : kPiece); }

  void log_sums() {
    RunningLogSum p, q, plain;
    const int64_t label = args_.spec.ce ? args_.labels[row_] : -1;
    float z_label = -kInf;
    for (int64_t first = 0; first < vocab_; first += kPiece) {
      const int64_t n = read(piece_.q, args_.student, args_.student_vocab, first);
      read(piece_.p, args_.teacher, args_.teacher_vocab, first);
      if (label >= first && label < first + kPiece && label < args_.student_vocab) z_label = piece_.q[label - first];
      if (!plain_is_q_) {
        if (args_.spec.ce) plain.add(piece_.q, n);
        for (int64_t k = 0; k < n; k += kWidth) {
          store(piece_.p + k, load(piece_.p + k) * m_.inverse_temperature);
          store(piece_.q + k, load(piece_.q + k) * m_.inverse_temperature);
        }
      }
      p.add(piece_.p, n);
      q.add(piece_.q, n);
    }
    p_ = LogSum(p.value());
    q_ = LogSum(q.value());
    p_shift_ = shift(p.value());
    q_shift_ = shift(q.value());
    p_over_q_ = LogSum((p.value() - p_shift_) - (q.value() - q_shift_));
    if (!args_.spec.ce) return;
    const double log_sum = plain_is_q_ ? q.value() : plain.value();
    plain_ = LogSum(log_sum);
    logprob_ = z_label - log_sum;
  }

  // What to take from logits before their difference: far from 0, where that loses no digits of theirs, the other
  // model's would be lost.
  static float shift(double log_sum) {
    return std::fabs(log_sum) < 64.0 ? 0.0f : static_cast<float>(std::rint(log_sum));
  }

  // P, Q and P - Q of a piece.
  int64_t log_probabilities(int64_t first) {
    const int64_t n = read(piece_.q, args_.student, args_.student_vocab, first);
    read(piece_.p, args_.teacher, args_.teacher_vocab, first);
    for (int64_t k = 0; k < n; k += kWidth) {
      const F p = load(piece_.p + k) * m_.inverse_temperature, q = load(piece_.q + k) * m_.inverse_temperature;
      const F delta = (p - p_shift_) - (q - q_shift_);
      store(piece_.p + k, p_.normalise(p));
      store(piece_.q + k, q_.normalise(q));
      // -inf - -inf is no difference.
      store(piece_.p_minus_q + k, p_over_q_.normalise(select(is_nothing(p) & is_nothing(q), splat(0.0f), delta)));
    }
    return n;
  }

  void mixture_log_sum() {
    RunningLogSum sum;
    for (int64_t first = 0; first < vocab_; first += kPiece) {
      const int64_t n = log_probabilities(first);
      with_assistant(m_.assistant, [&](auto assistant) {
        for (int64_t k = 0; k < n; k += kWidth) {
          store(piece_.r + k, mixed<assistant.value>(k).r);
        }
      });
      sum.add(piece_.r, n);
    }
    r_ = LogSum(sum.value());
  }

  template <Assistant kKind>
  LLDFAST_INLINE Mixed mixed(int64_t k) const {
    return mix<kKind>(m_, load(piece_.p + k), load(piece_.q + k), load(piece_.p_minus_q + k));
  }

  // P, Q, R, O - R and w of a piece.
  int64_t logs(int64_t first) {
    const int64_t n = log_probabilities(first);
    with_assistant(m_.assistant, [&](auto assistant) {
      for (int64_t k = 0; k < n; k += kWidth) {
        const Mixed x = mixed<assistant.value>(k);
        store(piece_.r + k, r_.normalise(x.r));
        store(piece_.other_minus_r + k, (x.other_minus_r + r_.high) + r_.low);
        store(piece_.w + k, x.w);
      }
    });
    return n;
  }

  const float* other() const { return m_.other_is_student ? piece_.q : piece_.p; }

  template <Form kForm, bool kGradient, bool kW>
  void add(int64_t n, Sums& sums) const {
    const float* o = other();
    const DistillMath m = m_;
    F loss = splat(0.0f), g = loss, wg = loss, wr = loss, d = loss;
    for (int64_t k = 0; k < n; k += kWidth) {
      const F r = load(piece_.r + k);
      const Terms t = terms<kForm>(m, load(o + k), r, load(piece_.other_minus_r + k));
      loss += t.loss;
      if constexpr (kGradient) {
        g += t.of_r;
        d += t.of_other;
      }
      if constexpr (kW) {
        const F w = load(piece_.w + k);
        wg += w * t.of_r;
        wr += w * exp(r);
      }
    }
    sums.loss += sum_lanes(loss);
    if constexpr (kGradient) {
      sums.g += sum_lanes(g);
      sums.d += sum_lanes(d);
    }
    if constexpr (kW) {
      sums.wg += sum_lanes(wg);
      sums.wr += sum_lanes(wr);
    }
  }

  template <Form kForm>
  void gradients(int64_t n, float sum_g, float sum_h) {
    const float* o = other();
    const DistillMath m = m_;
    const float factor = out_.g_divergence[row_] * m.inverse_temperature;
    const bool r_is_q = m.assistant == Assistant::kStudent;
    for (int64_t k = 0; k < n; k += kWidth) {
      const F q = load(piece_.q + k), r = load(piece_.r + k), mass = exp(q);
      const Terms t = terms<kForm>(m, load(o + k), r, load(piece_.other_minus_r + k));
      F h = m.other_is_student ? t.of_other : splat(0.0f);
      if (m.through) {
        const F r_mass = r_is_q ? mass : exp(r);
        h += load(piece_.w + k) * (t.of_r - r_mass * sum_g);
      }
      store(piece_.dz + k, select(is_nothing(q), splat(0.0f), (h - mass * sum_h) * factor));
    }
  }

  // Adds the cross entropy's part and writes the piece of the gradient.
  void write(int64_t first) {
    const int64_t left = args_.student_vocab - first, n = left < kPiece ? left : kPiece;
    if (args_.spec.ce && out_.g_ce != nullptr) {
      const float g = out_.g_ce[row_];
      const int64_t label = args_.labels[row_] - first;
      if (!plain_is_q_) {
        read(piece_.q, args_.student, args_.student_vocab, first);
        for (int64_t k = 0; k < n; k += kWidth) store(piece_.q + k, plain_.normalise(load(piece_.q + k)));
      }
      if (label >= 0 && label < n && piece_.q[label] != -kInf) {
        piece_.q[label] = -kInf;  // p - 1, which a rounded p would lose near 1
        piece_.dz[label] += g * ::expm1f(static_cast<float>(logprob_));
      }
      for (int64_t k = 0; k < n; k += kWidth) {
        const F q = load(piece_.q + k);
        store(piece_.dz + k, load(piece_.dz + k) + select(is_nothing(q), splat(0.0f), exp(q) * g));
      }
    }
    uint8_t* to = static_cast<uint8_t*>(out_.out.row(row_)) + first * itemsize(out_.out.dtype);
    write_floats(to, out_.out.dtype, piece_.dz, n);
  }

  const DistillArgs& args_;
  const DistillOut& out_;
  const DistillMath& m_;
  Piece& piece_;
  int64_t row_, vocab_;
  bool plain_is_q_;
  LogSum p_, q_, p_over_q_, r_, plain_;
  float p_shift_ = 0.0f, q_shift_ = 0.0f;
  double logprob_ = 0.0;  // of the label, at temperature 1
};

struct RowsTask {
  const DistillArgs& args;
  const DistillOut& out;
  DistillMath math;
  Counter items;

  static void work(void* self, int) {
    RowsTask& task = *static_cast<RowsTask*>(self);
    Piece piece;
    for (int64_t t = task.items.next() * kRows; t < task.args.rows; t = task.items.next() * kRows) {
      for (int64_t row = t; row < t + kRows && row < task.args.rows; ++row) {
        Row(task.args, task.out, task.math, piece, row).run();
      }
    }
  }
};

inline void rows(const DistillArgs& args, const DistillOut& out) {
  RowsTask task{args, out, distill_math(args.spec), {}};
  run_team(args.threads, &RowsTask::work, &task);
}

constexpr DistillKernels kKernels = {rows};

}  // namespace
}  // namespace lldfast
