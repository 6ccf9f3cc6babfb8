// Token log-likelihoods from given logits, forward and backward:
//
//   z = softcap(logit_scale * (logits + bias)),   logprob_t = z_t[y_t] - logsumexp(z_t)
#pragma once

#include <cstdint>

#include "cpu/common/dtypes.h"
#include "dispatch.h"

namespace lldfast {

struct LogprobArgs {
  Matrix logits;        // [*, vocab]
  const int64_t* rows;  // [tokens]: which rows of the input, and which places of the outputs; null: all in order
  int64_t tokens;
  int64_t vocab;          // columns that are real
  const int64_t* labels;  // by row of the input; one outside [0, vocab) belongs to another vocabulary shard
  const float* bias;      // [vocab] or null
  float softcap;          // 0: none
  float logit_scale;
  int threads;
};

// By row of the input. argmax, entropy and top may be null; argmax and top go together.
struct LogprobOut {
  float* logprob;
  float* lse;
  int64_t* argmax;
  float* entropy;
  float* top;
};

// Gradient of sum_t g_t logprob_t + h_t lse_t. g, h, lse are by row of the input; dlogits may be the input itself, or
// null.
struct LogprobGrad {
  const float* logprob;
  const float* lse;
  const float* g;
  const float* h;
  MutableMatrix dlogits;
  float* dbias;  // [vocab] or null
};

void logprob_forward(Isa isa, const LogprobArgs& args, const LogprobOut& out);
void logprob_backward(Isa isa, const LogprobArgs& args, const LogprobGrad& grad);

// Of one instruction set; AMX has nothing to multiply here.
struct LogprobKernels {
  void (*forward)(const LogprobArgs& args, const LogprobOut& out);
  void (*backward)(const LogprobArgs& args, const LogprobGrad& grad);
};
const LogprobKernels& logprob_kernels(Isa isa);  // of the best set up to `isa` (choice.cpp.in)

}  // namespace lldfast
