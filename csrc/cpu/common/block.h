// Blocks of logits z^T [32 vocabulary rows, 32 tokens], in which the products of hidden states and heads come: their
// rows are vocabulary entries and their lanes are tokens.
//
// An epilogue is what happens to a block right after its product, while it is in cache. It works in pieces (begin, some
// rows at a time, end), so that an engine (fma_engine.h, amx_engine.h) can put them between its tile products.
#pragma once

#include "cpu/common/dtypes.h"
#include "cpu/common/vec.h"

namespace lldfast {
namespace {

constexpr int kPanel = 32;              // vocabulary rows of a block
constexpr int kBlock = 32;              // tokens of a block
constexpr int kV = kBlock / kWidth;     // vectors of a block's row
constexpr int kTile = kPanel * kBlock;  // floats of a block

// Brings rows of a matrix into the second cache, a few lines at every call: a burst would fill the line buffers that
// the product needs, and the hardware does not foresee rows that are read a piece at a time.
class Prefetcher {
 public:
  Prefetcher() = default;
  Prefetcher(const Matrix& m, int64_t first, int64_t rows, int64_t width, int64_t calls)
      : row_(static_cast<const char*>(m.row(first))),
        row_bytes_(m.stride * itemsize(m.dtype)),
        lines_((width * itemsize(m.dtype) + 63) / 64),
        rows_(rows),
        per_call_(calls > 0 ? (rows * lines_ + calls - 1) / calls : 0) {}

  LLDFAST_INLINE void advance() {
    for (int64_t i = 0; i < per_call_ && rows_ > 0; ++i) {
      __builtin_prefetch(row_ + line_ * 64, 0, 2);
      if (++line_ == lines_) {
        line_ = 0;
        row_ += row_bytes_;
        --rows_;
      }
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t row_bytes_ = 0, lines_ = 0, rows_ = 0, per_call_ = 0, line_ = 0;
};

struct NoEpilogue {
  static constexpr bool kNone = true;
};

// Calls found(lane, row in the panel) for the tokens whose label is among the panel's rows.
template <class Found>
LLDFAST_INLINE void match_labels(const int32_t* label, int64_t v0, int rows, Found found) {
  for (int i = 0; i < kV; ++i) {
    const I row = load(label + i * kWidth) - static_cast<int32_t>(v0);
    if (!any((row >= 0) & (row < rows))) continue;
    for (int lane = i * kWidth; lane < (i + 1) * kWidth; ++lane) {
      const int64_t r = label[lane] - v0;
      if (r >= 0 && r < rows) found(lane, static_cast<int>(r));
    }
  }
}

LLDFAST_INLINE float sum_lanes(const F (&row)[kV]) {
  F total = row[0];
  for (int i = 1; i < kV; ++i) total += row[i];
  float sum = 0.0f;
  for (int i = 0; i < kWidth; ++i) sum += total[i];
  return sum;
}

}  // namespace
}  // namespace lldfast
