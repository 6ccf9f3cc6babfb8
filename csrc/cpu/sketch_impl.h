// fold() of sketch.h. The work is cut by tiles of the sketch: a few rows of sums stay in the first cache while the vector streams past,
// read once in pieces of these rows, four chunks at a time. So the time does not depend on k, and no two threads write the same place.
#pragma once

#include "cpu/parallel.h"
#include "cpu/sketch.h"
#include "cpu/sketch_tile.h"

namespace lldfast {
namespace {

constexpr int kTogether = 4;  // chunks read at a time

template <typename T>
struct FoldTask {
  const SketchArgs& args;
  const SketchShape shape;
  const int64_t first_tile, last_tile, first_chunk, chunks;
  const int parts;          // a tile's rows are split over so many items, where there are fewer tiles than threads
  const TileOrder* orders;  // [chunks]
  Sums* sums;               // by tile and group of kRows rows
  Counter items;

  struct Block {
    TilePlan plans[kBlock];
    XorLoad<T> loads[kBlock];
    int64_t sources[kBlock];  // flat tiles
    int n;
  };

  static void work(void* self, int) {
    FoldTask& task = *static_cast<FoldTask*>(self);
    const PlainFloats plain;
    const Buffer scratch(sizeof(Block));
    for (int64_t item = task.items.next(); item < task.shape.tiles * task.parts; item = task.items.next()) {
      task.bucket_tile(item / task.parts, static_cast<int>(item % task.parts), *reinterpret_cast<Block*>(scratch.bytes()));
    }
  }

  static int groups(const SketchShape& shape) { return shape.rows > kRows ? shape.rows / kRows : 1; }

  void bucket_tile(int64_t tile, int part, Block& block) {
    const int rows = shape.rows / parts, step = rows < kRows ? rows : kRows;
    const int64_t last_chunk = first_chunk + chunks - 1;
    for (int row = part * rows; row < (part + 1) * rows; row += step) *group_sums(tile, row) = {0.0, {0.0, 0.0}};
    for (int64_t b = first_chunk / kBlock; b <= last_chunk / kBlock; ++b) {
      block.n = 0;
      for (int64_t chunk = b * kBlock; chunk < (b + 1) * kBlock; ++chunk) {
        if (chunk < first_chunk || chunk > last_chunk) continue;
        const int64_t source = chunk * shape.tiles + orders[chunk - first_chunk].source(tile, shape.tiles);
        if (source < first_tile || source > last_tile) continue;
        block.plans[block.n].make(chunk, tile, shape, args.seed);
        block.loads[block.n].set(block.plans[block.n].mask);
        block.sources[block.n++] = source;
      }
      if (block.n == 0) continue;
      for (int row = part * rows; row < (part + 1) * rows; row += step) {
        alignas(64) float acc[kRows * kLanes];
        const int places = step * shape.lanes;
        std::memset(acc, 0, static_cast<size_t>(places) * sizeof(float));
        add_block(acc, block, row, step, group_sums(tile, row));
        double* out = args.out + tile * shape.size + row * shape.lanes;
        for (int i = 0; i < places; ++i) out[i] += acc[i];
      }
    }
  }

  Sums* group_sums(int64_t tile, int row) const { return sums + tile * groups(shape) + row / kRows; }

  // Chunk by chunk in their order; four at a time where they are whole.
  void add_block(float* acc, const Block& block, int row, int count, Sums* result) {
    const bool extras = args.scale != nullptr || args.dots[0] != nullptr || args.dots[1] != nullptr;
    const bool vectors = !extras && shape.rows >= kRows;
    for (int i = 0; i < block.n;) {
      int whole = 0;
      while (vectors && whole < kTogether && i + whole < block.n && is_whole(block.sources[i + whole])) ++whole;
      if (whole == kTogether) {
        add_whole<kTogether>(acc, block, i, row, result);
        i += kTogether;
      } else if (whole > 0) {
        add_whole<1>(acc, block, i++, row, result);
      } else {
        add_padded(acc, block.plans[i], block.sources[i], row, count, vectors, result);
        ++i;
      }
    }
  }

  int64_t start_of(int64_t source) const { return source * shape.size - args.offset; }  // in g
  bool is_whole(int64_t source) const {
    return start_of(source) >= 0 && start_of(source) + shape.size <= args.n;
  }

  template <int N>
  void add_whole(float* acc, const Block& block, int i, int row, Sums* result) {
    const T *g[N], *next[N];
    const TilePlan* plans[N];
    const XorLoad<T>* loads[N];
    for (int c = 0; c < N; ++c) {
      g[c] = static_cast<const T*>(args.g) + start_of(block.sources[i + c]);
      plans[c] = &block.plans[i + c];
      loads[c] = &block.loads[i + c];
      // behind the last chunk the first one's next rows follow
      const int after = i + N + c < block.n ? i + N + c : c, next_row = i + N + c < block.n ? row : row + kRows;
      const int source_row = (next_row ^ (block.plans[after].mask / kLanes)) & ~(kRows - 1);
      next[c] = static_cast<const T*>(args.g) + start_of(block.sources[after]) + source_row * kLanes;
    }
    add_rows<N>(acc, g, plans, loads, row, next, result);
  }

  // A tile that g covers in part, or that needs more than its sum: as fp32 with zeros around.
  void add_padded(float* acc, const TilePlan& plan, int64_t source, int row, int count, bool vectors, Sums* result) {
    alignas(64) float g[kTile], others[1 + kSketchDots][kTile];
    const int64_t start = start_of(source), from = start < 0 ? -start : 0;
    const int64_t until = args.n - start < shape.size ? args.n - start : shape.size;
    TileExtras at = {nullptr, {nullptr, nullptr}};
    const float* x = read_padded(g, static_cast<const T*>(args.g) + start, from, until);
    if (vectors) {
      const TilePlan* plans[1] = {&plan};
      XorLoad<float> load;
      load.set(plan.mask);
      const XorLoad<float>* loads[1] = {&load};
      return add_rows<1>(acc, &x, plans, loads, row, &x, result);
    }
    if (args.scale != nullptr) at.scale = read_padded(others[0], args.scale + start, from, until);
    for (int d = 0; d < kSketchDots; ++d) {
      if (args.dots[d] != nullptr) at.dots[d] = read_padded(others[1 + d], args.dots[d] + start, from, until);
    }
    add_places(acc, x, plan, row, count, shape, at, result);
  }

  template <typename S>
  const float* read_padded(float* to, const S* from, int64_t begin, int64_t end) const {
    std::memset(to, 0, static_cast<size_t>(shape.size) * sizeof(float));
    for (int64_t i = begin; i < end; ++i) to[i] = as_float(from[i]);
    return to;
  }
  static float as_float(float x) { return x; }
  static float as_float(Bf16 x) { return from_bf16(x.bits); }
  static float as_float(F16 x) { return from_f16(x.bits); }
};

template <typename T>
void fold_as(const SketchArgs& args) {
  const SketchShape shape(args.k);
  const int64_t first_tile = args.offset / shape.size, last_tile = (args.offset + args.n - 1) / shape.size;
  const int64_t first_chunk = first_tile / shape.tiles, chunks = last_tile / shape.tiles - first_chunk + 1;
  const int groups = FoldTask<T>::groups(shape);
  int parts = 1;
  while (shape.tiles * parts < args.threads && 2 * parts <= groups) parts *= 2;
  const Buffer orders(static_cast<size_t>(chunks) * sizeof(TileOrder));
  TileOrder* order = reinterpret_cast<TileOrder*>(orders.bytes());
  for (int64_t i = 0; i < chunks; ++i) order[i] = TileOrder(first_chunk + i, args.seed);
  const Buffer buffer(static_cast<size_t>(shape.tiles * groups) * sizeof(Sums));
  Sums* sums = reinterpret_cast<Sums*>(buffer.bytes());
  FoldTask<T> task{args, shape, first_tile, last_tile, first_chunk, chunks, parts, order, sums, {}};
  run_team(args.threads, FoldTask<T>::work, &task);
  for (int i = 0; i <= kSketchDots; ++i) args.sums[i] = 0.0;
  for (int64_t i = 0; i < shape.tiles * groups; ++i) {
    args.sums[0] += sums[i].square;
    for (int d = 0; d < kSketchDots; ++d) args.sums[1 + d] += sums[i].dot[d];
  }
  // Squares in fp32 that overflowed, or may have vanished.
  if (!(args.sums[0] > 1e-20 && args.sums[0] < kInf)) {
    args.sums[0] = 0.0;
    for (int64_t i = 0; i < args.n; ++i) {
      float x = FoldTask<T>::as_float(static_cast<const T*>(args.g)[i]);
      if (args.scale != nullptr) x *= args.scale[i];
      args.sums[0] += static_cast<double>(x) * x;
    }
  }
}

inline void fold(const SketchArgs& args) {
  switch (args.dtype) {
    case DType::kF32:
      return fold_as<float>(args);
    case DType::kBf16:
      return fold_as<Bf16>(args);
    case DType::kF16:
      return fold_as<F16>(args);
  }
}

}  // namespace
}  // namespace lldfast
