// Matrix products in bf16 on AMX tiles with fp32 sums: C[32, 32] (+)= A[32, K] B[K, 32] for a panel A and blocks B.
//
// A tile is 16 rows of 64 bytes. A panel holds, per 32 steps of K, two tiles of A (16 rows x 32 k); a block two tiles
// of B (16 pairs of k x 16 columns, the pair's two values side by side). 2 x 2 tiles of C take 4 loads for 4 products.
// Tile instructions are written as assembly that clobbers memory: gcc 12 moves its intrinsics across the stores they
// depend on.
#pragma once

#include "cpu/common/block.h"

namespace lldfast {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#define LLDFAST_TILE_LOAD(tile, from, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"(static_cast<int64_t>(stride)) : "memory")
#define LLDFAST_TILE_LOAD_ONCE(tile, from, stride) \
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile::"r"(from), "r"(static_cast<int64_t>(stride)) : "memory")
#define LLDFAST_TILE_STORE(tile, to, stride) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(static_cast<int64_t>(stride)) : "memory")
#define LLDFAST_TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile::)
#define LLDFAST_TILE_DOT(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)

constexpr int64_t kTileBytes = 1024;

// 16 rows of 16 words, transposed.
LLDFAST_INLINE void transpose(__m512i (&x)[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // x[i + j]: in 128-bit lane l, column 4 l + j of rows i .. i + 3
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(x[j], x[j + 4], 0x88), b = _mm512_shuffle_i32x4(x[j], x[j + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0x88),
                  d = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0xdd);
    y[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    y[j + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    y[j + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    y[j + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// Words a0 b0 a1 b1 ...: the values of two rows side by side.
LLDFAST_INLINE __m512i pair_low(__m512i a, __m512i b) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  return _mm512_permutex2var_epi16(a, order, b);
}

LLDFAST_INLINE __m512i pair_high(__m512i a, __m512i b) {
  const __m512i order = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54, 22,
                                         53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
  return _mm512_permutex2var_epi16(a, order, b);
}

LLDFAST_INLINE __m512i to_bf16(F low, F high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low)));
}

// kTerms 1: inputs rounded to bf16. 3: inputs split into a high and a low bf16 part each, W H = Wl Hh + Wh Hh + Wh Hl;
// the fourth product is below fp32's own rounding. A step then holds both parts of both operands: 8 loads for 12
// products.
// kGradientTerms 1: dz rounded to bf16. 2: dz split into a high and a low part, its error 2^-16; the other factor of a
// gradient has one part, so a step of the two is 6 loads for 8 products.
template <int kTerms, int kGradientTerms = 1>
struct AmxEngine {
  static constexpr int kParts = kTerms == 1 ? 1 : 2;
  static constexpr int64_t kPairBytes = 2 * kTileBytes;
  static constexpr int64_t kStepBytes = kParts * kPairBytes;  // of A, and of B, for 32 steps of K
  static constexpr int64_t kGradientBytes = kGradientTerms * kPairBytes;
  static_assert(kGradientTerms == 1 || kTerms == 1, "W and H of a gradient have one part");

  struct Session {
    Session() {
      TileConfig config;
      for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
      }
      __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
    }
    ~Session() { __asm__ volatile("tilerelease" ::: "memory"); }
  };

  // Where a step's two tiles of A are: rows `stride` bytes apart, the next step `step` bytes on.
  struct Tiles {
    const uint8_t* data;
    int64_t stride, step;
  };

  // Panels A: slabs() parts of K, each passed over all blocks before the next; tiles() from step k on, for count steps.
  // kA, kB: parts of the panel and of the blocks that it is multiplied with.
  template <int kPartsA, int kPartsB>
  struct PanelOf {
    static constexpr int kA = kPartsA, kB = kPartsB;
    const uint8_t* data;

    int64_t slabs(int64_t) const { return 1; }
    Tiles tiles(int64_t k, int64_t) const { return {data + k * kA * kPairBytes, 64, kA * kPairBytes}; }
  };
  using PackedPanel = PanelOf<kParts, kParts>;
  using GradientPanel = PanelOf<kGradientTerms, kParts>;
  using TransposedPanel = PanelOf<kParts, kGradientTerms>;

  // Rows [first, first + n) of the weight. A bf16 weight is a panel as it lies: a tile load takes 16 rows at any
  // distance. Others, and odd widths and ends, are packed a slab at a time: what was just stored is read from the first
  // cache. A packed copy of the whole weight would cost its memory again, and go stale.
  struct WeightPanel {
    static constexpr int kA = kParts, kB = kParts;
    const AmxEngine& engine;
    const Matrix& weight;
    int64_t first, n;
    uint8_t* slab;

    bool as_it_lies() const {
      return kParts == 1 && weight.dtype == DType::kBf16 && n == kPanel && engine.width == engine.padded;
    }
    int64_t slabs(int64_t steps) const { return as_it_lies() ? 1 : (steps + kSlab - 1) / kSlab; }
    Tiles tiles(int64_t k, int64_t count) const {
      if (as_it_lies()) return {static_cast<const uint8_t*>(weight.row(first)) + k * 64, weight.stride * 2, 64};
      engine.pack_steps(slab, weight, first, n, k, count, Prefetcher());
      return {slab, 64, kStepBytes};
    }
  };

  static constexpr int64_t kChunkRows = 512;
  static constexpr int64_t kGroupBytes = 1152 << 10;
  // Steps whose part of A, 24 KB, stays in the first cache while the blocks pass.
  static constexpr int64_t kSlab = 12 / kParts;
  static constexpr int64_t kStep = 32;

  // How often multiply() advances its prefetcher.
  static int64_t advances(int64_t steps, int64_t n) { return steps * n; }

  const int64_t width;
  const int64_t padded;

  AmxEngine(int64_t columns, Precision) : width(columns), padded(columns == 0 ? 32 : (columns + 31) / 32 * 32) {}

  int64_t k_steps() const { return padded / 32; }
  int64_t block_bytes() const { return k_steps() * kStepBytes; }
  int64_t panel_bytes() const { return k_steps() * kStepBytes; }
  int64_t stage_bytes() const { return kParts * kBlock * padded * 2; }

  // 32 values from column k on (those behind the width are 0), rounded to bf16, and what the rounding left.
  void split(const void* row, DType dtype, int64_t k, __m512i& high, __m512i& low) const {
    const int64_t n = width - k < 32 ? width - k : 32;
    const uint32_t mask = n == 32 ? ~0u : (1u << n) - 1;
    if (dtype == DType::kBf16) {
      high = _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + k);
      low = _mm512_setzero_si512();
      return;
    }
    __m512 a, b;
    if (dtype == DType::kF32) {
      const float* from = static_cast<const float*>(row) + k;
      a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
      b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + 16);
    } else {
      const __m512i half = _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + k);
      a = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
      b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
    }
    high = to_bf16(reinterpret_cast<F>(a), reinterpret_cast<F>(b));
    if constexpr (kParts == 1) return;
    const __m512 a_high =
        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(high)), 16));
    const __m512 b_high =
        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(high, 1)), 16));
    low = to_bf16(reinterpret_cast<F>(_mm512_sub_ps(a, a_high)), reinterpret_cast<F>(_mm512_sub_ps(b, b_high)));
  }

  // The high parts [32, padded] of 32 rows (the first n real, the rest 0), behind them the low parts.
  void stage_tokens(uint8_t* to, const Matrix& from, const int64_t* numbers, int64_t first, int64_t n) const {
    for (int64_t r = 0; r < kBlock; ++r) {
      const void* row = r < n ? from.row(numbers == nullptr ? first + r : numbers[first + r]) : nullptr;
      for (int64_t k = 0; k < padded; k += 32) {
        __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();
        if (row != nullptr) split(row, from.dtype, k, high, low);
        _mm512_storeu_si512(to + (r * padded + k) * 2, high);
        if constexpr (kParts == 2) _mm512_storeu_si512(to + ((kBlock + r) * padded + k) * 2, low);
      }
    }
  }

  void pack_tokens(uint8_t* to, const uint8_t* staged) const {
    for (int64_t k = 0; k < padded; k += 32) {
      for (int part = 0; part < kParts; ++part) {  // Hh, Hl
        const uint8_t* rows = staged + part * kBlock * padded * 2;
        for (int half = 0; half < 2; ++half, to += kTileBytes) {
          __m512i x[16];
          for (int t = 0; t < 16; ++t) x[t] = _mm512_loadu_si512(rows + ((half * 16 + t) * padded + k) * 2);
          transpose(x);
          for (int t = 0; t < 16; ++t) _mm512_store_si512(to + t * 64, x[t]);
        }
      }
    }
  }

  // Steps [k, k + count) of the panel of rows [first, first + n), the rest of its 32 rows 0.
  void pack_steps(uint8_t* to, const Matrix& weight, int64_t first, int64_t n, int64_t k, int64_t count,
                  Prefetcher prefetcher) const {
    const uint8_t* from = static_cast<const uint8_t*>(weight.row(first));
    const int64_t stride = weight.stride * itemsize(weight.dtype);
    // Step by step, so that the stores are contiguous: those of one row would all fall into two sets of the first
    // cache.
    for (int64_t column = k * 32; column < (k + count) * 32; column += 32, to += kStepBytes) {
      prefetcher.advance();
      if (kParts == 1 && weight.dtype == DType::kBf16 && n == kPanel && column + 32 <= width) {
        for (int64_t r = 0; r < kPanel; ++r) {
          _mm512_store_si512(to + r * 64, _mm512_loadu_si512(from + r * stride + column * 2));
        }
        continue;
      }
      for (int64_t r = 0; r < kPanel; ++r) {
        __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();
        if (r < n) split(from + r * stride, weight.dtype, column, high, low);
        if constexpr (kParts == 2) _mm512_store_si512(to + r * 64, low);
        _mm512_store_si512(to + (kParts - 1) * 2 * kTileBytes + r * 64, high);
      }
    }
  }

  void pack_panel(uint8_t* to, const Matrix& weight, int64_t first, int64_t n, const Prefetcher& prefetcher) const {
    pack_steps(to, weight, first, n, 0, k_steps(), prefetcher);
  }

  int64_t slab_bytes() const { return kSlab * kStepBytes; }
  WeightPanel weight_panel(const Matrix& weight, int64_t first, int64_t n, uint8_t* slab) const {
    return {*this, weight, first, n, slab};
  }
  PackedPanel packed_panel(const uint8_t* packed) const { return {packed}; }

  // C[j] (+)= A B[j] for n blocks. The epilogue of block j - 1 runs between the tile products of block j: the tile unit
  // works for 16 cycles on a product, and the vector ports are idle meanwhile.
  template <class Panel, class Epilogue>
  static void multiply(const Panel& panel, int64_t steps, const uint8_t* b, int64_t b_stride, int64_t n, float* c,
                       int64_t c_stride, bool accumulate, Epilogue* epilogue, Prefetcher prefetcher) {
    constexpr int kA = Panel::kA, kB = Panel::kB;
    constexpr int64_t kBStep = kB * kPairBytes;
    const int64_t slabs = panel.slabs(steps);
    for (int64_t s = 0; s < slabs; ++s) {
      const int64_t k = steps * s / slabs, count = steps * (s + 1) / slabs - k;
      const Tiles a = panel.tiles(k, count);
      for (int64_t j = 0; j < n; ++j) {
        float* out = c + j * c_stride;
        begin_tiles(out, accumulate || s > 0);
        const uint8_t* b_slab = b + j * b_stride + k * kBStep;
        if (Epilogue::kNone || s + 1 < slabs || j == 0) {
          for (int64_t i = 0; i < count; ++i) {
            prefetcher.advance();
            step<kA, kB>(a.data + i * a.step, a.stride, b_slab + i * kBStep);
          }
        } else if constexpr (!Epilogue::kNone) {
          const int piece = static_cast<int>((kPanel / 2 + count - 1) / count) * 2;
          Epilogue work = *epilogue;  // a copy on the stack lets its state live in registers
          work.begin(j - 1);
          for (int64_t i = 0; i < count; ++i) {
            prefetcher.advance();
            step<kA, kB>(a.data + i * a.step, a.stride, b_slab + i * kBStep);
            work.advance(piece);
          }
          work.end();
        }
        end_tiles(out);
      }
    }
    if constexpr (!Epilogue::kNone) {
      epilogue->begin(n - 1);
      epilogue->advance(kPanel);
      epilogue->end();
    }
  }

  struct Gradient {
    // Panels A of dW = dz^T H: [kChunkRows / 32][blocks][terms] x 2 tiles of 16 rows x 32 tokens.
    uint8_t* by_row;
    // Blocks B of dH^T = W^T dz: [blocks][kChunkRows / 32][terms] x 2 tiles of 16 pairs of rows x 16 tokens.
    uint8_t* by_block;
    int64_t tokens;
  };

  static int64_t by_row_bytes(int64_t blocks) { return kChunkRows / kPanel * blocks * kGradientBytes; }
  static int64_t by_block_bytes(int64_t blocks) { return kChunkRows / kPanel * blocks * kGradientBytes; }

  static LLDFAST_INLINE void put(const Gradient& to, int64_t block, int64_t row, const F (&pair)[2][kV]) {
    const int64_t panel = row / kPanel, r = row % kPanel;
    uint8_t* a = to.by_row + (panel * (to.tokens / kBlock) + block) * kGradientBytes + r * 64;
    uint8_t* b = to.by_block + (block * (kChunkRows / kPanel) + panel) * kGradientBytes + r / 2 * 64;
    if constexpr (kGradientTerms == 1) {
      put_term(a, b, pair);
    } else {
      F high[2][kV], low[2][kV];
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {  // cut off, not rounded: exact in bf16, and the rest exact in fp32
          high[i][j] = as_floats(as_ints(pair[i][j]) & static_cast<int32_t>(0xffff0000));
          low[i][j] = pair[i][j] - high[i][j];
        }
      }
      put_term(a, b, high);
      put_term(a + kPairBytes, b + kPairBytes, low);
    }
  }

  static LLDFAST_INLINE void put_term(uint8_t* a, uint8_t* b, const F (&pair)[2][kV]) {
    _mm512_store_si512(a, to_bf16(pair[0][0], pair[0][1]));
    _mm512_store_si512(a + 64, to_bf16(pair[1][0], pair[1][1]));
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int i = 0; i < 2; ++i) {
      _mm512_store_si512(b + i * kTileBytes, _mm512_permutexvar_epi16(interleave, to_bf16(pair[0][i], pair[1][i])));
    }
  }

  static GradientPanel gradient_panel(const Gradient& from, int64_t row) {
    return {from.by_row + row / kPanel * (from.tokens / kBlock) * kGradientBytes};
  }
  static const uint8_t* gradient_block(const Gradient& from, int64_t block) {
    return from.by_block + block * gradient_stride();
  }
  static int64_t gradient_stride() { return kChunkRows / kPanel * kGradientBytes; }

  // W^T of a chunk as panels of 32 columns of W: [padded / 32][kChunkRows / 32] x 2 tiles of 16 columns x 32 rows.
  int64_t transposed_bytes() const { return kChunkRows * padded * 2; }

  void pack_transposed(uint8_t* to, const uint8_t* packed_panel, int64_t number) const {
    for (int64_t j = 0; j < padded / 32; ++j) {
      const uint8_t* from = packed_panel + j * kStepBytes;  // 32 rows of 64 bytes
      uint8_t* out = to + (j * (kChunkRows / kPanel) + number) * kStepBytes;
      for (int half = 0; half < 2; ++half) {
        __m512i x[16];
        for (int r = 0; r < 16; ++r) {
          const __m512i even = _mm512_load_si512(from + 2 * r * 64), odd = _mm512_load_si512(from + (2 * r + 1) * 64);
          x[r] = half == 0 ? pair_low(even, odd) : pair_high(even, odd);
        }
        transpose(x);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(out + half * kTileBytes + i * 64, x[i]);
      }
    }
  }

  TransposedPanel transposed_panel(const uint8_t*, const uint8_t* transposed, int64_t j) const {
    return {transposed + j * (kChunkRows / kPanel) * kStepBytes};
  }

  // H as blocks B of 32 columns: [padded / 32][blocks] x 2 tiles of 16 pairs of tokens x 16 columns.
  int64_t columns_bytes(int64_t blocks) const { return blocks * kBlock * padded * 2; }
  int64_t columns_stride(int64_t blocks) const { return blocks * kStepBytes; }
  void pack_columns(uint8_t* to, const uint8_t* staged, int64_t block, int64_t blocks) const {
    for (int64_t j = 0; j < padded / 32; ++j) {
      uint8_t* out = to + j * columns_stride(blocks) + block * kStepBytes;
      for (int r = 0; r < 16; ++r) {
        const __m512i even = _mm512_loadu_si512(staged + (2 * r * padded + j * 32) * 2);
        const __m512i odd = _mm512_loadu_si512(staged + ((2 * r + 1) * padded + j * 32) * 2);
        _mm512_store_si512(out + r * 64, pair_low(even, odd));
        _mm512_store_si512(out + kTileBytes + r * 64, pair_high(even, odd));
      }
    }
  }
  static const uint8_t* columns_at(const uint8_t* columns, int64_t block) { return columns + block * kStepBytes; }

 private:
  static LLDFAST_INLINE void begin_tiles(const float* c, bool load_them) {
    if (load_them) {
      LLDFAST_TILE_LOAD(0, c, 128);
      LLDFAST_TILE_LOAD(1, c + 16, 128);
      LLDFAST_TILE_LOAD(2, c + 16 * kBlock, 128);
      LLDFAST_TILE_LOAD(3, c + 16 * kBlock + 16, 128);
    } else {
      LLDFAST_TILE_ZERO(0);
      LLDFAST_TILE_ZERO(1);
      LLDFAST_TILE_ZERO(2);
      LLDFAST_TILE_ZERO(3);
    }
  }

  // B passes once per panel: loaded so that it leaves A alone in the first cache.
  static LLDFAST_INLINE void load_b(const uint8_t* b) {
    LLDFAST_TILE_LOAD_ONCE(6, b, 64);
    LLDFAST_TILE_LOAD_ONCE(7, b + kTileBytes, 64);
  }

  static LLDFAST_INLINE void load_a(const uint8_t* a, int64_t stride) {
    LLDFAST_TILE_LOAD(4, a, stride);
    LLDFAST_TILE_LOAD(5, a + 16 * stride, stride);
  }

  static LLDFAST_INLINE void dot() {
    LLDFAST_TILE_DOT(0, 4, 6);
    LLDFAST_TILE_DOT(1, 4, 7);
    LLDFAST_TILE_DOT(2, 5, 6);
    LLDFAST_TILE_DOT(3, 5, 7);
  }

  template <int kA, int kB>
  static LLDFAST_INLINE void step(const uint8_t* a, int64_t stride, const uint8_t* b) {
    load_a(a, stride);
    load_b(b);
    dot();
    if constexpr (kA == 2) {
      load_a(a + kPairBytes, stride);
      dot();
    }
    if constexpr (kB == 2) {
      load_b(b + kPairBytes);
      dot();
    }
  }

  static LLDFAST_INLINE void end_tiles(float* c) {
    LLDFAST_TILE_STORE(0, c, 128);
    LLDFAST_TILE_STORE(1, c + 16, 128);
    LLDFAST_TILE_STORE(2, c + 16 * kBlock, 128);
    LLDFAST_TILE_STORE(3, c + 16 * kBlock + 16, 128);
  }
};

// What a unit's kernels ask for.
template <int kTerms, int kGradientTerms = 1>
using UnitEngine = AmxEngine<kTerms, kGradientTerms>;

}  // namespace
}  // namespace lldfast
