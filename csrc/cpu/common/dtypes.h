// Matrices of the dtypes that the CPU kernels read and write, and how they are multiplied.
#pragma once

#include <cstdint>

namespace lldfast {

// How products of matrices are computed; sums are in fp32 for all three.
//   kFp32: products of the inputs as they are. kBf16: inputs rounded to bf16 (exact for bf16 inputs).
//   kBf16x3: inputs split into two bf16 terms each, of whose four products the three largest are taken.
enum class Precision { kFp32, kBf16, kBf16x3 };

enum class DType { kF32, kBf16, kF16 };

inline int64_t itemsize(DType dtype) {
  return dtype == DType::kF32 ? 4 : 2;
}

// Rows of unit column stride; `stride` is in elements.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t stride;

  const void* row(int64_t i) const { return static_cast<const uint8_t*>(data) + i * stride * itemsize(dtype); }
};

struct MutableMatrix {
  void* data;
  DType dtype;
  int64_t stride;

  void* row(int64_t i) const { return static_cast<uint8_t*>(data) + i * stride * itemsize(dtype); }
};

}  // namespace lldfast
