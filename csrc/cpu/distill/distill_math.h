// The formulas of lldfast/ops/distill/math.py per vocabulary entry, on the vectors of the including file.
//
// D names r and one other distribution o, teacher or student. With the arguments of JS and AB exchanged where r comes
// first, four forms cover all orders. A kernel makes a DistillMath once per call, normalises its logs P and Q (-inf:
// excluded), and per entry calls
//
//   mix<assistant>(math, P, Q, P - Q)    log r and log o - log r before r is normalised (nothing to do where
//                                        math.normalised), and w = dR/dQ
//   terms<form>(math, O, R, O - R)       loss, of_r = g, of_other: d where math.other_is_student
//
// with with_assistant and with_form choosing the template's argument outside of its loops. The differences come along
// since those of two rounded logs have lost digits; where both are -inf they may be any number. math.through: whether w
// (g - r G) is part of the gradient. Entries that both exclude give 0, so -inf can fill vectors up; NaN stays NaN.
#pragma once

#include "cpu/common/vec.h"
#include "cpu/distill/distill_spec.h"

namespace lldfast {
namespace {

enum class Form { kKlOther, kKlAssistant, kJs, kAb };  // KL(o, r), KL(r, o)

struct DistillMath {
  Assistant assistant;
  Form form;
  bool other_is_student;
  bool normalised;       // r sums to 1 as mix gives it
  bool constant_w;       // w is the same number everywhere, `w`
  bool through;          // the gradient goes through r
  float lam, rest;       // of p, of q
  float a, inverse_a;    // of the power mean
  float w;               // where constant_w
  float x, y;            // JS: weights of o and r; AB: exponents of o and r
  float inverse_x, inverse_y;
  float sum, inverse_sum;  // of the exponents
  bool by_parts;           // the sum is small beside them
  float inverse_temperature;
};

inline DistillMath distill_math(const DistillSpec& spec) {
  const bool first = spec.order == Order::kRP || spec.order == Order::kRQ;  // r is
  const double least = 1e-37, most = 1e30;  // what fp32 can tell from 0 and infinity, also squared
  const double a = spec.a > most ? most : spec.a < -most ? -most : spec.a;
  DistillMath m = {};
  m.assistant = spec.assistant;
  m.form = spec.divergence == Divergence::kJs   ? Form::kJs
           : spec.divergence == Divergence::kAb ? Form::kAb
           : first                              ? Form::kKlAssistant
                                                : Form::kKlOther;
  m.other_is_student = spec.order == Order::kQR || spec.order == Order::kRQ;
  m.normalised = spec.assistant == Assistant::kTeacher || spec.assistant == Assistant::kStudent ||
                 (spec.assistant == Assistant::kPower && spec.a == 1.0);
  m.constant_w = spec.assistant == Assistant::kTeacher || spec.assistant == Assistant::kStudent ||
                 spec.assistant == Assistant::kGeometric;
  m.through = !spec.detach && spec.assistant != Assistant::kTeacher;
  m.lam = static_cast<float>(spec.lam > least ? spec.lam : least);
  m.rest = static_cast<float>(1.0 - spec.lam > least ? 1.0 - spec.lam : least);
  m.w = spec.assistant == Assistant::kTeacher ? 0.0f : spec.assistant == Assistant::kStudent ? 1.0f : m.rest;
  m.a = static_cast<float>(a);
  m.inverse_a = a != 0.0 ? static_cast<float>(1.0 / a) : 0.0f;
  double x = spec.x, y = spec.divergence == Divergence::kJs ? 1.0 - spec.x : spec.y;
  if (first) {
    const double other = x;
    x = y;
    y = other;
  }
  m.x = static_cast<float>(x);
  m.y = static_cast<float>(y);
  m.inverse_x = x != 0.0 ? static_cast<float>(1.0 / x) : 0.0f;
  m.inverse_y = y != 0.0 ? static_cast<float>(1.0 / y) : 0.0f;
  m.sum = static_cast<float>(x + y);
  m.inverse_sum = x + y != 0.0 ? static_cast<float>(1.0 / (x + y)) : 0.0f;
  const double size_x = x < 0.0 ? -x : x, size_y = y < 0.0 ? -y : y, size_sum = x + y < 0.0 ? -(x + y) : x + y;
  m.by_parts = 2.0 * size_sum < size_x || 2.0 * size_sum < size_y || (x == 0.0 && y == 0.0);
  m.inverse_temperature = static_cast<float>(1.0 / spec.temperature);
  return m;
}

LLDFAST_INLINE I is_nothing(F x) {
  return x == -kInf;
}

LLDFAST_INLINE F magnitude(F x) {
  return as_floats(as_ints(x) & 0x7fffffff);
}

// exp of vec.h, and +inf from 88.7 on.
LLDFAST_INLINE F exp_or_inf(F x) {
  const I over = x > 88.7f;
  return select(over, splat(kInf), exp(select(over, splat(0.0f), x)));
}

struct Exponential {
  F minus_1;  // expm1(x), with a relative error of 2e-7
  F value;    // exp(x), 0 below -87
};

// For any x: above 88 both are +inf.
LLDFAST_INLINE Exponential expm1(F x) {
  const I over = x > 88.0f;
  const F bounded = select(over, splat(0.0f), max(splat(-87.0f), x));
  const F shifted = bounded * kLog2e + 12582912.0f;  // 1.5 * 2^23, as in exp
  const F n = shifted - 12582912.0f;
  const F f = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // n times the first is exact
  // (expm1(f) - f) / f^2 on [-ln2 / 2, ln2 / 2], for the least relative error of expm1 (1.3e-8)
  F p = f * 1.388252247e-3f + 8.366514929e-3f;
  p = p * f + 4.166720062e-2f;
  p = p * f + 1.666654348e-1f;
  p = p * f + 4.999999702e-1f;
  p = p * (f * f) + f;
  const F power = as_floats((as_ints(shifted) << 23) + 0x3f800000);  // 2^n: the bits of 1.5 * 2^23 shift out
  return {select(over, splat(kInf), power * p + (power - 1.0f)),
          select(over, splat(kInf), select(x < -87.0f, splat(0.0f), power * p + power))};
}

// log(y) of y = 1 + x > 0, with a relative error of 2e-7 where x is exact: near 1 the digits come from x, far from it
// from y.
LLDFAST_INLINE F log1p(F x, F y) {
  const I exponent = (as_ints(y) - 0x3f400000) & static_cast<int32_t>(0xff800000);  // y / 2^n lies in [0.75, 1.5)
  const F f = select(exponent == 0, x, as_floats(as_ints(y) - exponent) - 1.0f);
  // (log1p(f) - f) / f^2 on [-0.25, 0.5], for the least relative error of log1p (2.8e-8)
  F p = f * 5.413248390e-2f - 1.206736788e-1f;
  p = p * f + 1.498391628e-1f;
  p = p * f - 1.682281196e-1f;
  p = p * f + 1.997707784e-1f;
  p = p * f - 2.499344200e-1f;
  p = p * f + 3.333354890e-1f;
  p = p * f - 5.000005960e-1f;
  p = p * (f * f) + f;
  const F mean = __builtin_convertvector(exponent, F) * (1.0f / 8388608.0f) * kLn2 + p;
  return select(y != y, y, mean);  // its bits are no number's
}

struct Mixed {
  F r, other_minus_r, w;
};

template <Assistant kKind>
LLDFAST_INLINE Mixed mix(const DistillMath& m, F p, F q, F p_minus_q) {
  const F zero = splat(0.0f), one = splat(1.0f);
  // O - R where R is p (up) or q.
  const auto from = [&](I up) {
    return m.other_is_student ? select(up, -p_minus_q, zero) : select(up, zero, p_minus_q);
  };
  if constexpr (kKind == Assistant::kTeacher || kKind == Assistant::kStudent) {
    constexpr bool kUp = kKind == Assistant::kTeacher;
    return {kUp ? p : q, from(kUp ? zero == zero : zero != zero), splat(m.w)};
  } else if constexpr (kKind == Assistant::kGeometric) {
    return {m.lam * p + m.rest * q, p_minus_q * (m.other_is_student ? -m.lam : m.rest), splat(m.w)};
  } else if constexpr (kKind == Assistant::kPower) {
    const F u = m.a * select(p == q, zero, p_minus_q);
    const I up = u > 0.0f;
    const Exponential e = expm1(-magnitude(u));
    const F share = select(up, splat(m.rest), splat(m.lam));
    // The sum of both shares is 1: as (1 - share) + share e^-|u| it keeps its digits where it is small.
    const F total = select(up, splat(m.lam), splat(m.rest)) + share * e.value;
    const F above = log1p(share * e.minus_1, total) * m.inverse_a;
    return {select(up, p, q) + above, from(up) - above, m.rest * select(up, e.value, one) / total};
  } else {
    const I up = (kKind == Assistant::kMaximum ? p > q : p < q) | (p != p);  // NaN must come through
    return {select(up, p, q), from(up), select(p == q, splat(m.rest), select(up, zero, one))};
  }
}

// KL leaves e^A out of dl/dA: a multiple of r in g, of q in d cancels in the gradient by the logits, but for rounding.
struct Terms {
  F loss, of_other, of_r;
};

template <Form kForm>
LLDFAST_INLINE Terms terms(const DistillMath& m, F o, F r, F o_minus_r) {
  const F zero = splat(0.0f);
  if constexpr (kForm == Form::kKlOther || kForm == Form::kKlAssistant) {
    const F first = kForm == Form::kKlOther ? o : r, delta = kForm == Form::kKlOther ? o_minus_r : -o_minus_r;
    const I none = is_nothing(first);
    const F mass = select(none, zero, exp(first));  // never 0 elsewhere: times an infinite log it must be infinite
    const F loss = select(none, zero, mass * delta);
    return kForm == Form::kKlOther ? Terms{loss, loss, -mass} : Terms{loss, -mass, loss};
  } else if constexpr (kForm == Form::kJs) {
    const F delta = o_minus_r;
    const I up = delta > 0.0f;
    const Exponential e = expm1(-magnitude(delta));
    const F share = select(up, splat(m.y), splat(m.x));
    // The log of the mean minus the higher of the two logs.
    const F mean = log1p(share * e.minus_1, select(up, splat(m.x), splat(m.y)) + share * e.value);
    const F of_o = m.x * exp(o) * (select(up, zero, delta) - mean);
    const F of_r = m.y * exp(r) * (select(up, -delta, zero) - mean);
    const F other = select(is_nothing(o), zero, of_o), assistant = select(is_nothing(r), zero, of_r);
    return {other + assistant, other, assistant};
  } else {
    const I no_o = is_nothing(o), no_r = is_nothing(r), neither = no_o & no_r;
    const F delta = select(neither, zero, o_minus_r), t = -magnitude(delta);
    const I up = delta >= 0.0f;
    F scale = splat(1.0f);
    if (m.sum != 0.0f) scale = exp_or_inf(m.sum * select(up, o, r));
    scale = select(delta == 0.0f, zero, scale);  // also where it is infinite
    F x = t, y = t, power_x = splat(1.0f), power_y = splat(1.0f);
    if (m.x != 0.0f) {
      const Exponential e = expm1(m.x * t);
      x = e.minus_1 * m.inverse_x;
      power_x = e.value;
    }
    if (m.y != 0.0f) {
      const Exponential e = expm1(m.y * t);
      y = e.minus_1 * m.inverse_y;
      power_y = e.value;
    }
    // A large power of the one would meet an underflow of the other: an exponent below 0 takes its own power along.
    const F far_y = m.y < 0.0f ? exp_or_inf(m.sum * t) * (expm1(-m.y * t).minus_1 * -m.inverse_y) : power_x * y;
    const F far_x = m.x < 0.0f ? exp_or_inf(m.sum * t) * (expm1(-m.x * t).minus_1 * -m.inverse_x) : power_y * x;
    F of_o = scale * select(up, -y, far_y), of_r = scale * select(up, far_x, -x);
    if (m.sum > 0.0f) {  // o^x r^y and o^sum are 0 where o is, whatever the factors look like
      if (m.x > 0.0f) of_o = select(no_o, zero, of_o);
      if (m.y > 0.0f) of_r = select(no_r, zero, of_r);
    }
    F loss = (of_o + of_r) * m.inverse_sum;
    if (m.by_parts) {  // by the sum of the exponents the loss would cancel
      const F both = m.sum == 0.0f ? t : expm1(m.sum * t).minus_1 * m.inverse_sum;
      loss = m.x == 0.0f ? 0.5f * delta * delta
                         : scale * select(up, (both - y) * m.inverse_x, (both - x) * m.inverse_y);
    }
    if (m.x < 0.0f || m.y < 0.0f) {  // a difference of infinities; the loss itself is never negative
      loss = select((loss != loss) & (delta == delta), splat(kInf), loss);
    }
    return {loss, of_o, of_r};
  }
}

// Calls body(Is<kind>{}) for the kind that a value has: a template argument for the body's loops.
template <auto kValue>
struct Is {
  static constexpr auto value = kValue;
};

template <class Body>
LLDFAST_INLINE void with_assistant(Assistant kind, Body body) {
  switch (kind) {
    case Assistant::kTeacher: return body(Is<Assistant::kTeacher>{});
    case Assistant::kStudent: return body(Is<Assistant::kStudent>{});
    case Assistant::kPower: return body(Is<Assistant::kPower>{});
    case Assistant::kGeometric: return body(Is<Assistant::kGeometric>{});
    case Assistant::kMaximum: return body(Is<Assistant::kMaximum>{});
    case Assistant::kMinimum: return body(Is<Assistant::kMinimum>{});
  }
}

template <class Body>
LLDFAST_INLINE void with_form(Form form, Body body) {
  switch (form) {
    case Form::kKlOther: return body(Is<Form::kKlOther>{});
    case Form::kKlAssistant: return body(Is<Form::kKlAssistant>{});
    case Form::kJs: return body(Is<Form::kJs>{});
    case Form::kAb: return body(Is<Form::kAb>{});
  }
}

}  // namespace
}  // namespace lldfast
