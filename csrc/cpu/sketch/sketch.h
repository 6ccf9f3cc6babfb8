// The signed XOR-fold of lldfast/ops/sketch/fold.py, which specifies it to the bit: a vector of P numbers to k.
#pragma once

#include <cstdint>

#include "cpu/common/dtypes.h"
#include "dispatch.h"

namespace lldfast {

constexpr int kSketchDots = 2;

struct SketchArgs {
  const void* g;  // [n]
  DType dtype;
  int64_t n;
  int64_t offset;  // of g[0] in the flat parameter space
  double* out;     // [k]: the sketch that g is added to
  int64_t k;       // a power of two
  uint64_t seed;
  const float* scale;              // [n] or null: g * scale is folded
  const float* dots[kSketchDots];  // [n] or null: inner products with g are wanted
  int threads;
  double* sums;  // [1 + kSketchDots]: |g * scale|^2, <g, dots[0]>, <g, dots[1]>
};

void sketch_fold(Isa isa, const SketchArgs& args);

// Of one instruction set; AMX has nothing to multiply here.
struct SketchKernels {
  void (*fold)(const SketchArgs& args);
};
const SketchKernels& sketch_kernels(Isa isa);  // of the best set up to `isa` (choice.cpp.in)

}  // namespace lldfast
