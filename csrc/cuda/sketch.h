// The signed XOR-fold of lldfast/ops/sketch/fold.py on a CUDA device: n numbers to a sketch of k.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/logprob.h"

namespace lldfast {

// All pointers are device memory, at any alignment that their type has.
struct SketchInput {
  const void* x;  // [n], entries offset .. offset + n - 1 of the flat parameter space
  Dtype dtype;
  int64_t n;
  int64_t offset;
  uint64_t seed;
  const float* scale;    // [n] or null: x * scale, rounded to fp32, is folded
  const float* dots[2];  // [n] each, or null from the first that is not wanted: inner products with x without scale
};

// Bytes of scratch that sketch_fold needs, at an address that is a multiple of 16.
size_t sketch_workspace_bytes(const SketchInput& in, int64_t k);

// sketch [k] += fold(x), the bits of the reference; k is a power of two. sums: |x * scale|^2 and the inner products,
// summed in an order that depends on n, offset and k alone. The work is queued on `stream` of the current device.
cudaError_t sketch_fold(const SketchInput& in, double* sketch, int64_t k, double* sums, void* workspace,
                        cudaStream_t stream);

}  // namespace lldfast
