// Distillation losses of given logits and their gradient by the student's: lldfast/ops/distill/rows.py.
#pragma once

#include <cstdint>

#include "cpu/common/dtypes.h"
#include "cpu/distill/distill_spec.h"
#include "dispatch.h"

namespace lldfast {

struct DistillArgs {
  Matrix student;  // [rows, student_vocab]
  int64_t student_vocab;
  Matrix teacher;  // [rows, teacher_vocab]; ids that one model lacks have logit -inf there
  int64_t teacher_vocab;
  int64_t rows;
  const int64_t* labels;  // [rows], or null without cross entropy
  DistillSpec spec;
  int threads;
};

// ce is 0 without cross entropy. out gets the gradient of sum(g_divergence divergence + g_ce ce) by the student's
// logits, which it may be itself; null: it is not wanted. g_ce may be null.
struct DistillOut {
  float* divergence;
  float* ce;
  const float* g_divergence;
  const float* g_ce;
  MutableMatrix out;
};

void distill_rows(Isa isa, const DistillArgs& args, const DistillOut& out);

// Of one instruction set; AMX has nothing to multiply here.
struct DistillKernels {
  void (*rows)(const DistillArgs& args, const DistillOut& out);
};
const DistillKernels& distill_kernels(Isa isa);  // of the best set up to `isa` (choice.cpp.in)

}  // namespace lldfast
