// A distillation loss as plain numbers: lldfast/ops/distill/spec.py.
#pragma once

namespace lldfast {

// What r is, and the order (A, B) of D(A, B); numbered as there.
enum class Assistant { kTeacher, kStudent, kPower, kGeometric, kMaximum, kMinimum };
enum class Order { kPR, kQR, kRP, kRQ };
enum class Divergence { kKl, kJs, kAb };

struct DistillSpec {
  Assistant assistant;
  double a, lam;
  Order order;
  Divergence divergence;
  double x, y;  // js: x is beta; ab: the exponents
  bool detach;
  double temperature;
  bool ce;
};

}  // namespace lldfast
