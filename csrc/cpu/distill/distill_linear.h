// Distillation losses from hidden states and heads of both models, with the gradient by the student's; no [T, V] tensor
// of either is ever alive, not even a chunk of one: every sweep over the vocabulary computes the logits it needs again,
// which on AMX costs less than an fp32 logit's way through memory.
//
//   z = H W^T,   log q = log softmax(z_student / temperature),   log p = log softmax(z_teacher / temperature)
//
// Formulas: lldfast/ops/distill/math.py.
#pragma once

#include <cstdint>

#include "cpu/common/dtypes.h"
#include "cpu/distill/distill_spec.h"
#include "dispatch.h"

namespace lldfast {

struct DistillHead {
  Matrix hidden;  // [*, width]
  Matrix weight;  // [vocab, width]
  int64_t width;
  Precision precision;  // kFp32 or kBf16
};

struct DistillLinearArgs {
  DistillHead student, teacher;
  const int64_t* rows;  // as in LogprobArgs
  int64_t tokens;
  int64_t vocab;          // rows of both weights that are real
  const int64_t* labels;  // by row of hidden; null without spec.ce
  DistillSpec spec;
  int threads;
};

// By row of hidden. Null dh and dw: no gradient; else that of sum(g_divergence divergence + g_ce ce). Rows of dh that
// are not in `rows`, and rows of dw behind vocab, are left as they are.
struct DistillLinearOut {
  float* divergence;
  float* ce;  // 0 without spec.ce
  const float* g_divergence;
  const float* g_ce;
  MutableMatrix dh;  // [*, width of the student]
  MutableMatrix dw;  // [vocab, width of the student], summed in fp32 and rounded once
};

void distill_linear(Isa isa, const DistillLinearArgs& args, const DistillLinearOut& out);

// Of one instruction set; those of AMX round all factors to bf16.
struct DistillLinearKernels {
  void (*loss)(const DistillLinearArgs& args, const DistillLinearOut& out);
};
const DistillLinearKernels& distill_linear_kernels(Isa isa);  // of the best set up to `isa` (choice.cpp.in)

}  // namespace lldfast
