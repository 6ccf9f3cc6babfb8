// What happens to the blocks of both models' logits in the later sweeps of distill_linear.h over the vocabulary: the
// sums that the loss and its gradient need, and the gradient.
#pragma once

#include <cmath>

#include "cpu/distill/distill_stats.h"

namespace lldfast {
namespace {

// An entry: log p, log q, the log of the distribution that D names beside r, and what mix gives.
struct Entry {
  F p, q, other;
  Mixed mixed;
};

// Of one vector of tokens.
class Entries {
 public:
  LLDFAST_INLINE Entries(const DistillCall& call, int64_t token)
      : math_(call.math),
        lse_p_(load(call.tokens.lse_p + token)),
        lse_q_(load(call.tokens.lse_q + token)),
        difference_(load(call.tokens.lse_difference + token)) {}

  template <Assistant kKind>
  LLDFAST_INLINE Entry entry(F zs, F zt) const {
    const float scale = math_.inverse_temperature;
    const F p = zt * scale - lse_p_, q = zs * scale - lse_q_;
    return {p, q, math_.other_is_student ? q : p, mix<kKind>(math_, p, q, (zt - zs) * scale - difference_)};
  }

 private:
  const DistillMath& math_;
  const F lse_p_, lse_q_, difference_;
};

// G, H and the loss of a token from the sums over its vocabulary.
inline void finish_sums(const DistillCall& call, int64_t t, double loss, double g, double of_student, double wg,
                        double wr) {
  const DistillMath& m = call.math;
  call.tokens.loss[t] = static_cast<float>(loss);
  call.tokens.sum_g[t] = static_cast<float>(g);
  // Where w is the same everywhere, sum w (g - r G) is exactly 0.
  const double through = m.through && !m.constant_w ? wg - g * wr : 0.0;
  call.tokens.sum_h[t] = static_cast<float>(through + (m.other_is_student ? of_student : 0.0));
}

// Rows of an epilogue's block, for one kind of assistant and form: chosen once and called for every piece, since an
// engine's products need not be compiled for each of the kinds.
template <class Epilogue>
using Piece = void (*)(Epilogue&, int);

template <class Epilogue>
Piece<Epilogue> piece_of(const DistillMath& m, Form form) {
  Piece<Epilogue> piece = nullptr;
  with_assistant(m.assistant, [&](auto kind) {
    with_form(form, [&](auto f) {
      constexpr Assistant kKind = decltype(kind)::value;
      constexpr Form kForm = decltype(f)::value;
      if constexpr (Epilogue::needs(kKind, kForm)) piece = &Epilogue::template advance_rows<kKind, kForm>;
    });
  });
  return piece;
}

// The log-sum-exp of what mix gives, where that is not normalised; for KL with the sums that the next sweep would make,
// which separate: KL(o, r) = sum o (log o - log r~) + log Z,   KL(r, o) = sum r~ (log r~ - log o) / Z - log Z.
struct NormaliserEpilogue : DistillBlocks {
  struct Lanes {
    float top[kBlock], sum[kBlock];  // of exp(log r~ - top)
    float loss[kBlock], wg[kBlock], wr[kBlock];
  };

  Lanes* lanes;
  const Piece<NormaliserEpilogue> piece;

  static constexpr bool needs(Assistant kind, Form form) {
    return kind != Assistant::kTeacher && kind != Assistant::kStudent && form != Form::kAb;
  }

  NormaliserEpilogue(const DistillBlocks& blocks, Lanes* l)
      : DistillBlocks(blocks),
        lanes(l),
        piece(piece_of<NormaliserEpilogue>(call.math, call.is_kl ? call.math.form : Form::kJs)) {}

  static void reset(Lanes& x) {
    for (int i = 0; i < kBlock; ++i) {
      x.top[i] = -kInf;
      x.sum[i] = x.loss[i] = x.wg[i] = x.wr[i] = 0.0f;
    }
  }

  LLDFAST_INLINE void advance(int n) { piece(*this, n); }

  template <Assistant kKind, Form kForm>
  static void advance_rows(NormaliserEpilogue& e, int n) {
    constexpr bool kOther = kForm == Form::kKlOther, kAssistant = kForm == Form::kKlAssistant;
    const DistillMath& m = e.call.math;
    Lanes& x = e.lanes[e.block];
    const int end_row = e.stop(n);
    for (int i = 0; i < kBlock; i += kWidth) {
      const Entries entries(e.call, e.token() + i);
      F top = load(x.top + i), sum = load(x.sum + i), loss = load(x.loss + i), wg = load(x.wg + i), wr = load(x.wr + i);
      for (int row = e.row; row < end_row; ++row) {
        const int64_t at = e.block * kTile + row * kBlock + i;
        const Entry entry = entries.entry<kKind>(load(e.zs + at), load(e.zt + at));
        const F r = entry.mixed.r, w = entry.mixed.w;
        if (any(r > top)) {  // seldom, but for the first rows
          const F higher = max(r, top);
          const F factor = exp(select(sum == 0.0f, splat(0.0f), top - reference_of(higher)));
          sum = settled(sum * factor);
          if constexpr (kAssistant) {
            loss = settled(loss * factor);
            wg = settled(wg * factor);
          }
          if constexpr (kOther || kAssistant) wr = settled(wr * factor);
          top = higher;
        }
        const F mass = exp(r - reference_of(top));
        sum += mass;
        if constexpr (kOther) {
          const Terms t = terms<kForm>(m, entry.other, r, entry.mixed.other_minus_r);
          loss += t.loss;
          wg += w * t.of_r;
        }
        if constexpr (kAssistant) {
          const F term = select(is_nothing(r), splat(0.0f), -mass * entry.mixed.other_minus_r);
          loss += term;
          wg += w * term;
        }
        if constexpr (kOther || kAssistant) wr += w * mass;
      }
      store(x.top + i, top);
      store(x.sum + i, sum);
      store(x.loss + i, loss);
      store(x.wg + i, wg);
      store(x.wr + i, wr);
    }
    e.row = end_row;
  }

  static void finish(const DistillCall& call, const Lanes* parts, int64_t splits, int64_t stride, int lane, int64_t t) {
    double top = -kInf;
    for (int64_t s = 0; s < splits; ++s) top = parts[s * stride].top[lane] > top ? parts[s * stride].top[lane] : top;
    const bool other_first = call.math.form == Form::kKlOther;
    double sum = 0.0, loss = 0.0, wg = 0.0, wr = 0.0;
    for (int64_t s = 0; s < splits; ++s) {
      const Lanes& x = parts[s * stride];
      const double factor = std::exp(x.top[lane] - top);
      sum += x.sum[lane] * factor;
      loss += x.loss[lane] * (other_first ? 1.0 : factor);
      wg += x.wg[lane] * (other_first ? 1.0 : factor);
      wr += x.wr[lane] * factor;
    }
    const double log_r = top + std::log(sum);
    call.tokens.log_r[t] = static_cast<float>(log_r);
    if (!call.is_kl) return;
    wr /= sum;
    if (other_first) return finish_sums(call, t, loss + log_r, -1.0, loss + log_r, wg, wr);
    loss = loss / sum - log_r;
    finish_sums(call, t, loss, loss, -1.0, wg / sum - log_r * wr, wr);
  }
};

// The loss and the sums of its gradient.
struct SumsEpilogue : DistillBlocks {
  struct Lanes {
    float loss[kBlock], g[kBlock], of_other[kBlock], wg[kBlock], wr[kBlock];
  };

  Lanes* lanes;
  const Piece<SumsEpilogue> piece;

  static constexpr bool needs(Assistant kind, Form form) {
    return form == Form::kJs || form == Form::kAb || kind == Assistant::kTeacher || kind == Assistant::kStudent ||
           kind == Assistant::kPower;
  }

  SumsEpilogue(const DistillBlocks& blocks, Lanes* l)
      : DistillBlocks(blocks), lanes(l), piece(piece_of<SumsEpilogue>(call.math, call.math.form)) {}

  static void reset(Lanes& x) { x = Lanes{}; }

  LLDFAST_INLINE void advance(int n) { piece(*this, n); }

  template <Assistant kKind, Form kForm>
  static void advance_rows(SumsEpilogue& e, int n) {
    const DistillMath& m = e.call.math;
    Lanes& x = e.lanes[e.block];
    const int end_row = e.stop(n);
    for (int i = 0; i < kBlock; i += kWidth) {
      const Entries entries(e.call, e.token() + i);
      const F log_r = load(e.call.tokens.log_r + e.token() + i);
      F loss = load(x.loss + i), g = load(x.g + i), of_other = load(x.of_other + i), wg = load(x.wg + i);
      F wr = load(x.wr + i);
      for (int row = e.row; row < end_row; ++row) {
        const int64_t at = e.block * kTile + row * kBlock + i;
        const Entry entry = entries.entry<kKind>(load(e.zs + at), load(e.zt + at));
        const F r = entry.mixed.r - log_r, w = entry.mixed.w;
        const Terms t = terms<kForm>(m, entry.other, r, entry.mixed.other_minus_r + log_r);
        loss += t.loss;
        g += t.of_r;
        of_other += t.of_other;
        if (!m.constant_w) {
          wg += w * t.of_r;
          wr += w * exp(r);
        }
      }
      store(x.loss + i, loss);
      store(x.g + i, g);
      store(x.of_other + i, of_other);
      store(x.wg + i, wg);
      store(x.wr + i, wr);
    }
    e.row = end_row;
  }

  static void finish(const DistillCall& call, const Lanes* parts, int64_t splits, int64_t stride, int lane, int64_t t) {
    double loss = 0.0, g = 0.0, of_other = 0.0, wg = 0.0, wr = 0.0;
    for (int64_t s = 0; s < splits; ++s) {
      const Lanes& x = parts[s * stride];
      loss += x.loss[lane];
      g += x.g[lane];
      of_other += x.of_other[lane];
      wg += x.wg[lane];
      wr += x.wr[lane];
    }
    finish_sums(call, t, loss, g, of_other, wg, wr);
  }
};

// dz of the student's logits, handed to the engine two rows at a time. The label's share of the cross entropy comes
// from its logprob: near q = 1 it is the small q - 1, which a rounded q would not give.
template <class Engine>
struct DistillGradEpilogue : DistillBlocks {
  const typename Engine::Gradient gradient;
  const int64_t chunk_block;  // number of the first block in the chunk of tokens
  int64_t chunk_row = 0;      // v0 relative to the chunk of the vocabulary
  const Piece<DistillGradEpilogue> piece;

  static constexpr bool needs(Assistant, Form) { return true; }

  DistillGradEpilogue(const DistillBlocks& blocks, const typename Engine::Gradient& to, int64_t block_in_chunk)
      : DistillBlocks(blocks),
        gradient(to),
        chunk_block(block_in_chunk),
        piece(piece_of<DistillGradEpilogue>(call.math, call.math.form)) {}

  void panel(int64_t first_row, int n, int64_t row_in_chunk) {
    DistillBlocks::panel(first_row, n);
    chunk_row = row_in_chunk;
  }

  LLDFAST_INLINE void advance(int n) { piece(*this, n); }

  template <Assistant kKind, Form kForm>
  static void advance_rows(DistillGradEpilogue& e, int n) {
    const DistillCall& call = e.call;
    const DistillMath& m = call.math;
    const DistillTokens& tokens = call.tokens;
    for (const int stop = e.row + n < kPanel ? e.row + n : kPanel; e.row < stop; e.row += 2) {
      F pair[2][kV];
      for (int i = 0; i < kV; ++i) {
        const int64_t token = e.token() + i * kWidth;
        const Entries entries(call, token);
        const F log_r = load(tokens.log_r + token), sum_g = load(tokens.sum_g + token);
        const F sum_h = load(tokens.sum_h + token), upstream = load(tokens.g + token);
        const I label = load(tokens.label + token) - static_cast<int32_t>(e.v0);
        for (int r = 0; r < 2; ++r) {
          const int row = e.row + r;
          if (row >= e.rows) {
            pair[r][i] = splat(0.0f);  // rows behind the vocabulary
            continue;
          }
          const int64_t at = e.block * kTile + row * kBlock + i * kWidth;
          const F zs = load(e.zs + at);
          const Entry entry = entries.entry<kKind>(zs, load(e.zt + at));
          const F mixed = entry.mixed.r - log_r;
          const Terms t = terms<kForm>(m, entry.other, mixed, entry.mixed.other_minus_r + log_r);
          F h = splat(0.0f);
          if (m.through) h = entry.mixed.w * (t.of_r - exp(mixed) * sum_g);
          if (m.other_is_student) h += t.of_other;
          const F q = exp(entry.q);
          F dz = upstream * (h - q * sum_h);
          if (call.ce) {
            const F plain = call.tempered ? exp(zs - load(tokens.lse_1 + token)) : q;
            dz += select(label == row, load(tokens.of_label + token), load(tokens.g_ce + token) * plain);
          }
          pair[r][i] = dz;
        }
      }
      Engine::put(e.gradient, e.chunk_block + e.block, e.chunk_row + e.row, pair);
    }
  }
};

}  // namespace
}  // namespace lldfast
