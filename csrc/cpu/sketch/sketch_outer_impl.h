// outer() and rows() of sketch_outer.h. A thread takes a sample at a time, so that no two write the same sketch, and a
// sample's bits do not depend on their number.
//
// A strip of rows of W = b^T a is computed at a time and stays in the second cache. Since rows lie one after another in
// the flat space, the strip is a piece of it: its whole tiles are folded, and what is left of the last one goes to the
// front of the next strip.
#pragma once

#include "cpu/common/parallel.h"
#include "cpu/sketch/sketch_outer.h"
#include "cpu/sketch/sketch_tile.h"

namespace lldfast {
namespace {

#if defined(__AVX512F__)
constexpr int kGroup = 12;  // rows of W by two vectors of columns: 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kGroup = 6;  // 12 of 16
#else
constexpr int kGroup = 4;
#endif
constexpr int kColumns = 2 * kWidth;
constexpr int64_t kSlabTokens = 2048 / kWidth;  // whose part of a panel of `a` (16 KiB) stays in the first cache
constexpr int64_t kStripFloats = 48 << 10;      // of W in the second cache
constexpr int64_t kLeastGroups = 4, kMostGroups = 16;  // of a strip; with few, all of `a` is read again and again

// C[kGroup, kColumns] (+)= sum_t b[t, :]^T a[t, :].
template <bool kAccumulate>
inline void multiply_group(const float* a, const float* b, int64_t tokens, float* c, int64_t stride) {
  F sum[kGroup][2];
#pragma GCC unroll 12
  for (int r = 0; r < kGroup; ++r) {
    sum[r][0] = kAccumulate ? load(c + r * stride) : F{};
    sum[r][1] = kAccumulate ? load(c + r * stride + kWidth) : F{};
  }
  for (int64_t t = 0; t < tokens; ++t, a += kColumns, b += kGroup) {
    const F a0 = load(a), a1 = load(a + kWidth);
#pragma GCC unroll 12
    for (int r = 0; r < kGroup; ++r) {
      const F x = splat(b[r]);
      sum[r][0] += x * a0;
      sum[r][1] += x * a1;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kGroup; ++r) {
    store(c + r * stride, sum[r][0]);
    store(c + r * stride + kWidth, sum[r][1]);
  }
}

// The same for the first `columns` of these columns alone.
template <bool kAccumulate>
inline void multiply_edge(const float* a, const float* b, int64_t tokens, float* c, int64_t stride, int64_t columns) {
  alignas(64) float block[kGroup * kColumns];
  const size_t bytes = static_cast<size_t>(columns) * sizeof(float);
  if (kAccumulate) {
    std::memset(block, 0, sizeof block);
    for (int r = 0; r < kGroup; ++r) std::memcpy(block + r * kColumns, c + r * stride, bytes);
  }
  multiply_group<kAccumulate>(a, b, tokens, block, kColumns);
  for (int r = 0; r < kGroup; ++r) std::memcpy(c + r * stride, block + r * kColumns, bytes);
}

template <bool kAccumulate>
inline void multiply(const float* a, const float* b, int64_t tokens, float* c, int64_t stride, int64_t columns) {
  if (columns >= kColumns) return multiply_group<kAccumulate>(a, b, tokens, c, stride);
  multiply_edge<kAccumulate>(a, b, tokens, c, stride, columns);
}

// Columns [first, first + count) of a sample as [count / kPiece, tokens, kPiece], zeros behind the last column.
template <int kPiece>
void pack_columns(float* to, const SampleMatrix& from, int64_t sample, int64_t tokens, int64_t first, int64_t count) {
  constexpr int64_t kAtOnce = 4;  // pieces: 256 bytes or so of every token
  const uint8_t* data = static_cast<const uint8_t*>(from.data);
  for (int64_t column = 0; column < count; column += kAtOnce * kPiece) {
    const int64_t stop = column + kAtOnce * kPiece < count ? column + kAtOnce * kPiece : count;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t at = sample * from.sample_stride + t * from.token_stride + first;
      if (stop - column == kAtOnce * kPiece && from.dtype == DType::kF32) {
        const float* source = reinterpret_cast<const float*>(data) + at + column;
        float* piece = to + (column / kPiece * tokens + t) * kPiece;
#pragma GCC unroll 4
        for (int i = 0; i < kAtOnce; ++i) {  // copies of a known size: a few instructions
          std::memcpy(piece + i * kPiece * tokens, source + i * kPiece, kPiece * sizeof(float));
        }
        continue;
      }
      for (int64_t c = column; c < stop; c += kPiece) {
        float* piece = to + (c / kPiece * tokens + t) * kPiece;
        const void* source = data + (at + c) * itemsize(from.dtype);
        const int64_t n = stop - c < kPiece ? stop - c : kPiece;
        read_floats(piece, source, from.dtype, n);
        for (int64_t i = n; i < kPiece; ++i) piece[i] = 0.0f;
      }
    }
  }
}

LLDFAST_INLINE void add_vector(double* to, F x, const uint32_t* words, int shift, D* squares) {
  U signs;
  std::memcpy(&signs, words, sizeof signs);
  D low, high, low_sum, high_sum;
  widen(reinterpret_cast<F>(reinterpret_cast<U>(x) ^ ((signs << shift) & 0x80000000u)), &low, &high);
  std::memcpy(&low_sum, to, sizeof low_sum);
  std::memcpy(&high_sum, to + kWidth / 2, sizeof high_sum);
  low_sum += low;
  high_sum += high;
  std::memcpy(to, &low_sum, sizeof low_sum);
  std::memcpy(to + kWidth / 2, &high_sum, sizeof high_sum);
  squares[0] += low * low;
  squares[1] += high * high;
}

// Adds a whole tile of the flat space to its tile of a sketch; gives |x|^2.
inline double add_tile(double* out, const float* x, const TilePlan& plan, const SketchShape& shape) {
  if (shape.lanes < kWidth) {
    double square = 0.0;
    for (int i = 0; i < shape.size; ++i) {
      const double value = x[i ^ plan.mask];
      out[i] += plan.words[i] & 1u ? -value : value;
      square += value * value;
    }
    return square;
  }
  XorLoad<float> permuted;
  permuted.set(plan.mask);
  D squares[4] = {D{}, D{}, D{}, D{}};  // as many sums as additions are under way
  const int lane_mask = plan.mask & (shape.lanes - 1) & ~(kWidth - 1);
  for (int row = 0; row < shape.rows; ++row) {
    const float* from = x + (row ^ (plan.mask / shape.lanes)) * shape.lanes;
    double* to = out + row * shape.lanes;
    const int shift = 31 - row;
    const int step = shape.lanes < 2 * kWidth ? kWidth : 2 * kWidth;
    for (int lane = 0; lane < shape.lanes; lane += step) {
      add_vector(to + lane, permuted(from + (lane ^ lane_mask)), plan.words + lane, shift, squares);
      if (step > kWidth) {
        const int next = lane + kWidth;
        add_vector(to + next, permuted(from + (next ^ lane_mask)), plan.words + next, shift, squares + 2);
      }
    }
  }
  return horizontal((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

// Where flat tiles go, one after another; the permutation of a chunk and the plan of a tile are kept for the next call.
class TileCursor {
 public:
  TileCursor(const SketchShape& shape, uint64_t seed) : shape_(shape), seed_(seed), order_(0, seed) {}

  const TilePlan& plan(int64_t tile) {
    if (tile != tile_) {
      const int64_t chunk = tile / shape_.tiles;
      if (chunk != chunk_) order_ = TileOrder(chunk, seed_);
      chunk_ = chunk;
      tile_ = tile;
      bucket_ = order_.target(tile % shape_.tiles, shape_.tiles);
      plan_.make(chunk, bucket_, shape_, seed_);
    }
    return plan_;
  }
  int64_t start() const { return bucket_ * shape_.size; }  // in the sketch, of the tile last planned

 private:
  const SketchShape shape_;
  const uint64_t seed_;
  TileOrder order_;
  TilePlan plan_;
  int64_t tile_ = -1, chunk_ = 0, bucket_ = 0;
};

struct OuterTask {
  const SketchOuterArgs& args;
  const SketchShape shape;
  const int64_t panels, strip_rows;
  Counter items;

  explicit OuterTask(const SketchOuterArgs& all)
      : args(all),
        shape(all.k),
        panels((all.a.columns + kColumns - 1) / kColumns),
        strip_rows(rows_of_strip(all.a.columns, all.b.columns)),
        items() {}

  static int64_t rows_of_strip(int64_t width, int64_t rows) {
    int64_t groups = kStripFloats / width / kGroup;
    if (groups < kLeastGroups) groups = kLeastGroups;
    if (groups > kMostGroups) groups = kMostGroups;
    const int64_t all = (rows + kGroup - 1) / kGroup;
    return (groups < all ? groups : all) * kGroup;
  }

  static void work(void* self, int) {
    OuterTask& task = *static_cast<OuterTask*>(self);
    const PlainFloats plain;
    const int64_t tokens = task.args.tokens, width = task.args.a.columns;
    const Buffer a(static_cast<size_t>(task.panels * kColumns * tokens) * sizeof(float));
    const Buffer b(static_cast<size_t>(task.strip_rows * tokens) * sizeof(float));
    const Buffer strip(static_cast<size_t>(2 * task.shape.size + task.strip_rows * width) * sizeof(float));
    for (int64_t n = task.items.next(); n < task.args.samples; n = task.items.next()) {
      task.args.squares[n] = task.sample(n, a.floats(), b.floats(), strip.floats());
    }
  }

  double sample(int64_t n, float* a, float* b, float* strip) const {
    const int64_t width = args.a.columns, rows = args.b.columns;
    TileCursor cursor(shape, args.seed);
    double* out = args.out + n * args.k;
    double square = 0.0;
    int64_t tile = args.offset / shape.size, filled = args.offset % shape.size;
    std::memset(strip, 0, static_cast<size_t>(filled) * sizeof(float));
    pack_columns<kColumns>(a, args.a, n, args.tokens, 0, width);
    for (int64_t row = 0; row < rows; row += strip_rows) {
      const int64_t count = rows - row < strip_rows ? rows - row : strip_rows;
      float* w = strip + filled;
      pack_columns<kGroup>(b, args.b, n, args.tokens, row, count);
      product(w, a, b, count);
      if (args.scale != nullptr) {
        const float* scale = args.scale + row * width;
        for (int64_t i = 0; i < count * width; ++i) w[i] *= scale[i];
      }
      filled += count * width;
      if (row + count == rows) {  // zeros behind the end, to a whole tile
        const int64_t end = (filled + shape.size - 1) / shape.size * shape.size;
        std::memset(strip + filled, 0, static_cast<size_t>(end - filled) * sizeof(float));
        filled = end;
      }
      int64_t done = 0;
      for (; done + shape.size <= filled; done += shape.size, ++tile) {
        const TilePlan& plan = cursor.plan(tile);
        square += add_tile(out + cursor.start(), strip + done, plan, shape);
      }
      filled -= done;
      std::memmove(strip, strip + done, static_cast<size_t>(filled) * sizeof(float));
    }
    return square;
  }

  // w [rows, width] of packed columns; rows are filled up to a whole group.
  void product(float* w, const float* a, const float* b, int64_t rows) const {
    const int64_t tokens = args.tokens, width = args.a.columns;
    const int64_t slabs = (tokens + kSlabTokens - 1) / kSlabTokens;
    for (int64_t s = 0; s < slabs; ++s) {
      const int64_t t = tokens * s / slabs, count = tokens * (s + 1) / slabs - t;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const float* left = a + (panel * tokens + t) * kColumns;
        const int64_t column = panel * kColumns;
        for (int64_t row = 0; row < rows; row += kGroup) {
          const float* right = b + row * tokens + t * kGroup;
          float* c = w + row * width + column;
          if (s == 0) {
            multiply<false>(left, right, count, c, width, width - column);
          } else {
            multiply<true>(left, right, count, c, width, width - column);
          }
        }
      }
    }
  }
};

struct RowsTask {
  const SketchRowsArgs& args;
  const SketchShape shape;
  Counter items;

  static void work(void* self, int) {
    RowsTask& task = *static_cast<RowsTask*>(self);
    const PlainFloats plain;
    TileCursor cursor(task.shape, task.args.seed);
    for (int64_t n = task.items.next(); n < task.args.samples; n = task.items.next()) {
      double* out = task.args.out + n * task.args.k;
      for (int64_t row = task.args.begin[n]; row < task.args.begin[n + 1]; ++row) task.add_row(out, row, cursor);
    }
  }

  void add_row(double* out, int64_t row, TileCursor& cursor) const {
    const float* x = args.rows + row * args.width;
    const int64_t begin = args.place[row], end = begin + args.width;
    for (int64_t at = begin; at < end;) {
      const int64_t tile = at / shape.size, stop = (tile + 1) * shape.size < end ? (tile + 1) * shape.size : end;
      const TilePlan& plan = cursor.plan(tile);
      double* to = out + cursor.start();
      for (; at < stop; ++at) {
        const int place = static_cast<int>(at % shape.size) ^ plan.mask;
        const double value = x[at - begin];
        to[place] += (plan.words[place % shape.lanes] >> (place / shape.lanes)) & 1u ? -value : value;
      }
    }
  }
};

inline void outer(const SketchOuterArgs& args) {
  OuterTask task(args);
  run_team(args.threads, OuterTask::work, &task);
}

inline void rows(const SketchRowsArgs& args) {
  RowsTask task{args, SketchShape(args.k), {}};
  run_team(args.threads, RowsTask::work, &task);
}

constexpr SketchOuterKernels kKernels = {outer, rows};

}  // namespace
}  // namespace lldfast
