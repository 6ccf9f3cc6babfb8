// Gradients of single samples into sketches of their own (lldfast/ops/sketch/outer.py), never stored: the products
// b^T a of a linear layer, and rows of numbers with a place each.
#pragma once

#include <cstdint>

#include "cpu/common/dtypes.h"
#include "dispatch.h"

namespace lldfast {

// [samples, tokens, columns] of unit column stride; strides are in elements.
struct SampleMatrix {
  const void* data;
  DType dtype;
  int64_t columns, sample_stride, token_stride;
};

struct SketchOuterArgs {
  SampleMatrix a, b;  // W_n = b_n^T a_n, [b.columns, a.columns]
  int64_t samples, tokens;
  int64_t offset;  // of W[0, 0] in the flat parameter space
  double* out;     // [samples, k]: the sketches that W_n * scale is added to
  int64_t k;       // a power of two
  uint64_t seed;
  const float* scale;  // [b.columns, a.columns] or null
  int threads;
  double* squares;  // [samples]: |W_n * scale|^2
};

struct SketchRowsArgs {
  const float* rows;  // [begin[samples], width]
  int64_t width;
  const int64_t* begin;  // [samples + 1]: rows begin[n] .. begin[n + 1] - 1 belong to sample n
  const int64_t* place;  // of each row in the flat parameter space
  int64_t samples;
  double* out;  // [samples, k]
  int64_t k;
  uint64_t seed;
  int threads;
};

void sketch_outer(Isa isa, const SketchOuterArgs& args);
void sketch_rows(Isa isa, const SketchRowsArgs& args);

// Of one instruction set; AMX multiplies bf16 only.
struct SketchOuterKernels {
  void (*outer)(const SketchOuterArgs& args);
  void (*rows)(const SketchRowsArgs& args);
};
const SketchOuterKernels& sketch_outer_kernels(Isa isa);  // of the best set up to `isa` (choice.cpp.in)

}  // namespace lldfast
