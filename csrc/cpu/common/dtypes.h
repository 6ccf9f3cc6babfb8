// Matrices of the dtypes that the CPU kernels read and write.
#pragma once

#include <cstdint>

namespace lldfast {

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
