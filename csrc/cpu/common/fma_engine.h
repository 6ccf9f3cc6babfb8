// Matrix products in fp32 by fused multiply-adds: C[32, 32] (+)= A[32, K] B[K, 32] for a panel A and blocks B.
// A element of A at a time is multiplied with a row of B, so A may have any strides and only B is packed.
#pragma once

#include "cpu/common/block.h"

namespace lldfast {
namespace {

struct FmaEngine {
  struct Session {};  // nothing to set up per thread

  struct Part {
    const float* data;
    int64_t row_stride, k_stride;
  };

  // Panels: called for the part of steps [k, k + count).
  struct PackedPanel {
    const float* data;
    int64_t row_stride, k_stride;

    Part operator()(int64_t k, int64_t) const { return {data + k * k_stride, row_stride, k_stride}; }
  };

  // Of rows [first, first + n) of the weight, packed a slab at a time: what is multiplied next stays in the first
  // cache.
  struct WeightPanel {
    const FmaEngine& engine;
    const Matrix& weight;
    int64_t first, n;
    float* slab;

    Part operator()(int64_t k, int64_t count) const {
      for (int64_t r = 0; r < kPanel; ++r) {
        float* to = slab + r * kSlab;
        if (r < n) {
          engine.stage(to, static_cast<const uint8_t*>(weight.row(first + r)) + k * itemsize(weight.dtype),
                       weight.dtype, count);
        } else {
          std::memset(to, 0, static_cast<size_t>(count) * 4);
        }
      }
      return {slab, kSlab, 1};
    }
  };

  static constexpr int64_t kChunkRows = 256;          // vocabulary rows that the backward keeps dz of
  static constexpr int64_t kGroupBytes = 1536 << 10;  // packed tokens that stay in the second cache
  static constexpr int64_t kSlab = 96;                // steps of K whose part of B stays in the first cache
  static constexpr int64_t kStep = 1;

  // How often multiply() advances its prefetcher.
  static int64_t advances(int64_t steps, int64_t n) { return (steps <= kSlab ? 1 : (steps + kSlab - 1) / kSlab) * n; }

  const int64_t width;  // of hidden states, padded to whole blocks for the gradients
  const int64_t padded;
  const bool rounded;  // inputs to bf16 first

  FmaEngine(int64_t columns, Precision precision)
      : width(columns),
        padded(columns == 0 ? 32 : (columns + 31) / 32 * 32),
        rounded(precision == Precision::kBf16) {}

  int64_t k_steps() const { return width; }
  int64_t block_bytes() const { return width * kBlock * 4; }
  int64_t panel_bytes() const { return kPanel * padded * 4; }
  int64_t stage_bytes() const { return kBlock * padded * 4; }

  void stage(float* to, const void* from, DType dtype, int64_t n) const {
    read_floats(to, from, dtype, n);
    if (rounded) {
      for (int64_t k = 0; k < n; ++k) to[k] = from_bf16(to_bf16(to[k]));
    }
  }

  // A whole row [padded]; null: zeros.
  void stage_row(float* to, const void* from, DType dtype) const {
    const int64_t filled = from == nullptr ? 0 : width;
    if (from != nullptr) stage(to, from, dtype, filled);
    std::memset(to + filled, 0, static_cast<size_t>(padded - filled) * 4);
  }

  // A block of tokens, [K, 32 tokens], from its staged rows.
  void pack_tokens(uint8_t* to, const uint8_t* staged) const {
    const float* rows = reinterpret_cast<const float*>(staged);
    float* out = reinterpret_cast<float*>(to);
    for (int64_t k0 = 0; k0 < width; k0 += 16) {  // 16 columns of 32 rows at a time: both sides stay in cache
      const int64_t stop = k0 + 16 < width ? k0 + 16 : width;
      for (int64_t k = k0; k < stop; ++k) {
        for (int64_t t = 0; t < kBlock; ++t) out[k * kBlock + t] = rows[t * padded + k];
      }
    }
  }

  // 32 rows, the first n real, as fp32 [32, padded].
  void stage_tokens(uint8_t* to, const Matrix& from, const int64_t* numbers, int64_t first, int64_t n) const {
    for (int64_t r = 0; r < kBlock; ++r) {
      const int64_t number = r >= n ? 0 : numbers == nullptr ? first + r : numbers[first + r];
      stage_row(reinterpret_cast<float*>(to) + r * padded, r < n ? from.row(number) : nullptr, from.dtype);
    }
  }

  void pack_panel(uint8_t* to, const Matrix& weight, int64_t first, int64_t n, const Prefetcher&) const {
    for (int64_t r = 0; r < kPanel; ++r) {
      stage_row(reinterpret_cast<float*>(to) + r * padded, r < n ? weight.row(first + r) : nullptr, weight.dtype);
    }
  }

  int64_t slab_bytes() const { return kPanel * kSlab * 4; }
  WeightPanel weight_panel(const Matrix& weight, int64_t first, int64_t n, uint8_t* slab) const {
    return {*this, weight, first, n, reinterpret_cast<float*>(slab)};
  }
  PackedPanel packed_panel(const uint8_t* packed) const { return {reinterpret_cast<const float*>(packed), padded, 1}; }

  // C[j] (+)= A B[j] for n blocks; epilogue pieces follow each block's product.
  template <class Panel, class Epilogue>
  static void multiply(const Panel& panel, int64_t steps, const uint8_t* b, int64_t b_stride, int64_t n, float* c,
                       int64_t c_stride, bool accumulate, Epilogue* epilogue, Prefetcher prefetcher) {
    const int64_t slabs = steps <= kSlab ? 1 : (steps + kSlab - 1) / kSlab;
    for (int64_t s = 0; s < slabs; ++s) {
      const int64_t k = steps * s / slabs, count = steps * (s + 1) / slabs - k;
      const Part a = panel(k, count);
      for (int64_t j = 0; j < n; ++j) {
        const float* block = reinterpret_cast<const float*>(b + j * b_stride) + k * kBlock;
        multiply_block(a, count, block, c + j * c_stride, accumulate || s > 0, b_stride / 4);
        if constexpr (!Epilogue::kNone) {
          if (s + 1 == slabs) {
            epilogue->begin(j);
            epilogue->advance(kPanel);
            epilogue->end();
          }
        }
        prefetcher.advance();
      }
    }
  }

  // Gradients: dz of a chunk of the vocabulary for a chunk of tokens, once for each product.
  struct Gradient {
    float* by_row;    // [kChunkRows, tokens]: the panels A of dW = dz^T H
    float* by_block;  // [blocks, kChunkRows, 32]: the blocks B of dH^T = W^T dz
    int64_t tokens;
  };

  static int64_t by_row_bytes(int64_t blocks) { return kChunkRows * blocks * kBlock * 4; }
  static int64_t by_block_bytes(int64_t blocks) { return kChunkRows * blocks * kBlock * 4; }

  static LLDFAST_INLINE void put(const Gradient& to, int64_t block, int64_t row, const F (&pair)[2][kV]) {
    for (int r = 0; r < 2; ++r) {
      float* a = to.by_row + (row + r) * to.tokens + block * kBlock;
      float* b = to.by_block + (block * kChunkRows + row + r) * kBlock;
      for (int i = 0; i < kV; ++i) {
        store(a + i * kWidth, pair[r][i]);
        store(b + i * kWidth, pair[r][i]);
      }
    }
  }

  static PackedPanel gradient_panel(const Gradient& from, int64_t row) {
    return {from.by_row + row * from.tokens, from.tokens, 1};
  }
  static const uint8_t* gradient_block(const Gradient& from, int64_t block) {
    return reinterpret_cast<const uint8_t*>(from.by_block + block * kChunkRows * kBlock);
  }
  static int64_t gradient_stride() { return kChunkRows * kBlock * 4; }

  // W^T of a chunk: the packed panels, read the other way.
  int64_t transposed_bytes() const { return 0; }
  void pack_transposed(uint8_t*, const uint8_t*, int64_t) const {}
  PackedPanel transposed_panel(const uint8_t* packed_panels, const uint8_t*, int64_t j) const {
    return {reinterpret_cast<const float*>(packed_panels) + j * kPanel, 1, padded};
  }

  // H as blocks B of 32 columns, [K = tokens, 32]: rows of one staged block of tokens go to each.
  int64_t columns_bytes(int64_t blocks) const { return blocks * kBlock * padded * 4; }
  int64_t columns_stride(int64_t blocks) const { return blocks * kBlock * kBlock * 4; }
  void pack_columns(uint8_t* to, const uint8_t* staged, int64_t block, int64_t blocks) const {
    const float* rows = reinterpret_cast<const float*>(staged);
    for (int64_t j = 0; j < padded / kBlock; ++j) {
      float* out = reinterpret_cast<float*>(to + j * columns_stride(blocks)) + block * kBlock * kBlock;
      for (int64_t t = 0; t < kBlock; ++t) std::memcpy(out + t * kBlock, rows + t * padded + j * kBlock, kBlock * 4);
    }
  }
  static const uint8_t* columns_at(const uint8_t* columns, int64_t block) {
    return columns + block * kBlock * kBlock * 4;
  }

 private:
#if defined(__AVX512F__)
  static constexpr int kRows = 12;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
  static constexpr int kRows = 6;  // 12 of 16
#else
  static constexpr int kRows = 4;
#endif

  static void multiply_block(const Part& a, int64_t steps, const float* b, float* c, bool accumulate, int64_t ahead) {
    for (int lane = 0; lane < kBlock; lane += 2 * kWidth) {
      int row = 0;
      for (; row + kRows <= kPanel; row += kRows)
        multiply_rows<kRows>(a, row, steps, b + lane, c + lane, accumulate, ahead);
      constexpr int kRest = kPanel % kRows;
      if constexpr (kRest > 0) multiply_rows<kRest>(a, row, steps, b + lane, c + lane, accumulate, ahead);
    }
  }

  // kN rows by two vectors, held in registers over all steps.
  template <int kN>
  static inline void multiply_rows(const Part& a, int row, int64_t steps, const float* b, float* c, bool accumulate,
                                   int64_t ahead) {
    F sum[kN][2];
    for (int r = 0; r < kN; ++r) {
      for (int i = 0; i < 2; ++i) sum[r][i] = accumulate ? load(c + (row + r) * kBlock + i * kWidth) : splat(0.0f);
    }
    // Four rows to a pointer: the addressing modes reach them by multiples of the stride, and no row needs a register
    // of its own.
    const float* from[(kN + 3) / 4];
    for (int q = 0; q < (kN + 3) / 4; ++q) from[q] = a.data + (row + 4 * q) * a.row_stride;
    const int64_t stride = a.row_stride, k_stride = a.k_stride;
    for (int64_t k = 0; k < steps; ++k, b += kBlock) {
      if (row == 0) {  // on the first pass over this block, fetch the next one
        __builtin_prefetch(b + ahead);
        if (kWidth == 16) __builtin_prefetch(b + ahead + kWidth);
      }
      const F b0 = load(b), b1 = load(b + kWidth);
      for (int r = 0; r < kN; ++r) {
        const F x = splat(from[r / 4][r % 4 * stride]);
        sum[r][0] += x * b0;
        sum[r][1] += x * b1;
      }
      for (int q = 0; q < (kN + 3) / 4; ++q) from[q] += k_stride;
    }
    for (int r = 0; r < kN; ++r) {
      for (int i = 0; i < 2; ++i) store(c + (row + r) * kBlock + i * kWidth, sum[r][i]);
    }
  }
};

// What a unit's kernels ask for: AmxEngine's arguments, which make no difference to products in fp32.
template <int kTerms, int kGradientTerms = 1>
using UnitEngine = FmaEngine;

}  // namespace
}  // namespace lldfast
