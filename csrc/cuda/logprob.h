// Log-likelihoods of labels under given logits, and their gradient, on a CUDA device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace lldfast {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

// All pointers are device memory. Token t is scored on row rows[t] (t itself where rows is null) of the logits
//   x [*, vocab], z = softcap * tanh(logit_scale * (x + bias) / softcap)
// whose columns are contiguous and whose rows start every row_stride elements, at any alignment.
struct LogprobInput {
  const void* logits;
  Dtype dtype;
  int64_t row_stride;
  int64_t tokens;  // T
  int64_t vocab;   // columns that are read; what lies behind them may hold anything
  const int64_t* rows;
  const int64_t* labels;  // [T]; one outside [0, vocab) belongs to another shard of the vocabulary: logprob = -inf
  const float* bias;      // [vocab] or null
  float softcap;          // <= 0: none
  float logit_scale;
};

// Each [T], by token. Null for what is not wanted, except logprob and lse.
struct LogprobOutput {
  float* logprob;
  float* lse;
  int64_t* argmax;  // the lowest column of a tie; -1 for an empty vocabulary
  float* entropy;
  float* max_logit;
};

// lse, g and h are [T], by token. The gradient of sum(g * logprob + h * lse) goes to row rows[t] of d_logits, which may
// be the logits themselves; columns [vocab, d_columns) of that row become 0 and rows that no token names stay as they
// are.
struct LogprobGrad {
  const float* lse;
  const float* g;
  const float* h;
  void* d_logits;  // of the logits' dtype, or null
  int64_t d_row_stride;
  int64_t d_columns;
  float* d_bias;  // [vocab] or null
};

// Bytes of scratch that logprob_forward needs: 0 but for a few tokens with a large vocabulary.
size_t logprob_workspace_bytes(int64_t tokens, int64_t vocab);

// The value of a token does not depend on the other tokens, on its place among them, or on the row's alignment.
// The work is queued on `stream` of the current device; a launch that fails gives its error.
cudaError_t logprob_forward(const LogprobInput& in, const LogprobOutput& out, void* workspace, cudaStream_t stream);

// No row may be named twice. Deterministic: d_bias is summed in an order that depends on T alone.
cudaError_t logprob_backward(const LogprobInput& in, const LogprobGrad& grad, cudaStream_t stream);

}  // namespace lldfast
