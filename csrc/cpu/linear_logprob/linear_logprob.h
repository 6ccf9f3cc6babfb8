// Token log-likelihoods from hidden states and the head, forward and backward; no [T, V] tensor is ever alive.
//
//   z = softcap(logit_scale * (H W^T + bias)),   logprob_t = z_t[y_t] - logsumexp(z_t)
//
// The vocabulary is walked in panels of 32 rows against blocks of 32 tokens. A block of logits is z^T: its rows are
// vocabulary entries and its lanes are tokens, so maxima and sums are held per lane and nothing is ever summed across a
// vector.
#pragma once

#include <cstdint>

#include "cpu/common/dtypes.h"
#include "cpu/logprob/logprob.h"
#include "dispatch.h"

namespace lldfast {

struct LinearLogprobArgs {
  Matrix hidden;        // [*, width]
  const int64_t* rows;  // as in LogprobArgs
  int64_t tokens;
  int64_t width;
  Matrix weight;          // [vocab, width]
  int64_t vocab;          // rows of the weight that are real
  const int64_t* labels;  // by row of hidden
  const float* bias;      // [vocab] or null
  float softcap;          // 0: none
  float logit_scale;
  Precision precision;
  int threads;
};

// Gradient of sum_t g_t logprob_t + h_t lse_t. g, h, lse are by row of hidden. Null outputs are not computed; rows of
// dh that are not in `rows`, and rows of dw behind vocab, are left as they are.
struct LinearLogprobGrad {
  const float* logprob;
  const float* lse;
  const float* g;
  const float* h;
  MutableMatrix dh;  // [*, width]
  MutableMatrix dw;  // [vocab, width], summed in fp32 and rounded once
  float* dbias;      // [vocab]
};

void linear_logprob_forward(Isa isa, const LinearLogprobArgs& args, const LogprobOut& out);
void linear_logprob_backward(Isa isa, const LinearLogprobArgs& args, const LinearLogprobGrad& grad);

// Of one instruction set; kFp32 by all, the other precisions by AMX alone.
struct LinearLogprobKernels {
  void (*forward)(const LinearLogprobArgs& args, const LogprobOut& out);
  void (*backward)(const LinearLogprobArgs& args, const LinearLogprobGrad& grad);
};
const LinearLogprobKernels& linear_logprob_kernels(Isa isa);  // of the best set up to `isa` (choice.cpp.in)

}  // namespace lldfast
