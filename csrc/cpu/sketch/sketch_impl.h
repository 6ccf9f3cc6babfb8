// fold() of sketch.h. The work is cut by tiles of the sketch: a tile's sums stay in the first cache while its tiles of
// the vector, one of every chunk, are read from end to end. So the time does not depend on k, and no two threads write
// the same place.
#pragma once

#include "cpu/common/parallel.h"
#include "cpu/sketch/sketch.h"
#include "cpu/sketch/sketch_tile.h"

namespace lldfast {
namespace {

// fp64 <x, y>
inline double inner(const float* x, const float* y, int n) {
  D sums[2] = {D{}, D{}};
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    D low, high, other_low, other_high;
    widen(load(x + i), &low, &high);
    widen(load(y + i), &other_low, &other_high);
    sums[0] += low * other_low;
    sums[1] += high * other_high;
  }
  double sum = horizontal(sums[0] + sums[1]);
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * y[i];
  return sum;
}

// |g scale|^2 and inner products.
struct Sums {
  D squares;
  double dots[kSketchDots];
};

template <typename T>
struct FoldTask {
  static constexpr int kRows = sizeof(T) == 2 ? 4 : 8;  // added at a time: what measured best
  const SketchArgs& args;
  const SketchShape shape;
  const int64_t first_tile, last_tile, first_chunk, last_chunk;
  const int parts;          // a tile's rows are split over so many items, where there are fewer tiles than threads
  const int group;          // rows added at a time
  const TileOrder* orders;  // of the chunks; null where they have one tile each
  const int64_t all_items;
  Sums* sums;  // of the items
  Counter items;

  // A tile of g on its way to a tile of the sketch, or to an item's part of it.
  struct Visit {
    int64_t item, bucket_tile, chunk, source;
    int mask;
  };

  // The visits of one thread, in order.
  class Visits {
   public:
    explicit Visits(FoldTask* task) : task_(*task) { start_item(); }
    bool next(Visit* visit) {
      for (; item_ < task_.all_items; start_item()) {
        while (tile_ >= 0 && chunk_ <= task_.last_chunk) {
          const int64_t chunk = chunk_++, source = task_.source_tile(chunk, tile_);
          if (!task_.is_touched(source)) continue;
          *visit = {item_, tile_, chunk, source, TilePlan::mask_of(chunk, tile_, task_.shape, task_.args.seed)};
          return true;
        }
      }
      return false;
    }

   private:
    void start_item() {
      item_ = task_.items.next();
      tile_ = item_ < task_.all_items ? task_.bucket_tile(item_) : -1;
      chunk_ = task_.first_chunk;
    }
    FoldTask& task_;
    int64_t item_, tile_, chunk_;
  };

  int64_t source_tile(int64_t chunk, int64_t bucket_tile) const {
    return orders == nullptr ? chunk
                             : chunk * shape.tiles + orders[chunk - first_chunk].source(bucket_tile, shape.tiles);
  }
  bool is_touched(int64_t source) const { return source >= first_tile && source <= last_tile; }

  // The tile that an item adds to. Where g touches fewer tiles than the sketch has, the items are those of g, in two
  // chunks at most; -1 for one whose bucket tile has an item already.
  int64_t bucket_tile(int64_t item) const {
    if (all_items == shape.tiles * parts) return item / parts;
    const int64_t source = first_tile + item / parts, chunk = source / shape.tiles;
    const int64_t tile = orders[chunk - first_chunk].target(source % shape.tiles, shape.tiles);
    return chunk > first_chunk && is_touched(source_tile(first_chunk, tile)) ? -1 : tile;
  }

  static void work(void* self, int) {
    FoldTask& task = *static_cast<FoldTask*>(self);
    const PlainFloats plain;
    task.add_visits();
  }

  // kStreams visits, while the next ones are fetched.
  void add_visits() {
    alignas(64) float acc[kTile];
    TilePlan plan;
    Visits visits(this);
    Visit now[kStreams], next[kStreams], last = {-1, -1, -1, -1, 0};
    int n = 0;
    while (n < kStreams && visits.next(&next[n])) ++n;
    while (n > 0) {
      const int count = n;
      for (int i = 0; i < count; ++i) now[i] = next[i];
      for (n = 0; n < kStreams && visits.next(&next[n]);) ++n;
      Ahead ahead = {};
      for (int i = 0; i < kStreams; ++i) ahead.streams[i] = stream(n > 0 ? next[i % n] : now[0]);
      for (int i = 0; i < count; ++i) {
        if (now[i].item != last.item || now[i].chunk / kBlock != last.chunk / kBlock) {
          add_to_sketch(acc, last);
          std::memset(acc, 0, static_cast<size_t>(shape.size / parts) * sizeof(float));
        }
        last = now[i];
        plan.make(last.chunk, last.bucket_tile, last.mask, shape, args.seed);
        add_part(acc, plan, last, &ahead);
      }
    }
    add_to_sketch(acc, last);
  }

  void add_to_sketch(const float* acc, const Visit& last) {
    if (last.item < 0) return;
    const int places = shape.size / parts;
    double* out = args.out + last.bucket_tile * shape.size + last.item % parts * places;
    for (int i = 0; i < places; ++i) out[i] += acc[i];
  }

  // Where in g the rows begin that a visit adds.
  int64_t begin_of(const Visit& visit) const {
    const int rows = shape.rows / parts, part = static_cast<int>(visit.item % parts);
    const int first = (part * rows) ^ (visit.mask / kLanes & ~(rows - 1));
    return visit.source * shape.size - args.offset + first * shape.lanes;
  }
  const T* address(int64_t place) const { return static_cast<const T*>(args.g) + place; }
  const char* stream(const Visit& visit) const {
    const int64_t begin = begin_of(visit);
    return reinterpret_cast<const char*>(address(begin < 0 ? 0 : begin));
  }

  // In the order of g.
  void add_part(float* acc, const TilePlan& plan, const Visit& visit, Ahead* ahead) {
    const bool extras = args.scale != nullptr || args.dots[0] != nullptr || args.dots[1] != nullptr;
    const int rows = shape.rows / parts, first = static_cast<int>(visit.item % parts) * rows;
    const int mask = plan.mask / kLanes & (rows - 1) & ~(group - 1);
    Sums* result = &sums[visit.item];
    XorLoad<T> xor_load;
    xor_load.set(plan.mask);
    int64_t place = begin_of(visit);
    for (int i = 0; i < rows; i += group, place += group * shape.lanes) {
      const int row = i ^ mask;
      float* sum = acc + row * shape.lanes;
      if (group == kRows && !extras && place >= 0 && place + kRows * kLanes <= args.n) {
        add_rows<kRows>(sum, address(place), plan, xor_load, first + row, ahead, &result->squares);
      } else if (place < args.n && place + group * shape.lanes > 0) {
        add_staged(sum, plan, place, first + row, result);
      }
    }
  }

  // Rows that g covers in part, or that need more than their sum: as fp32 with zeros around.
  void add_staged(float* acc, const TilePlan& plan, int64_t place, int row, Sums* result) {
    alignas(64) float x[kRows * kLanes];
    const int size = group * shape.lanes;
    const int begin = place < 0 ? static_cast<int>(-place) : 0;
    const int end = args.n - place < size ? static_cast<int>(args.n - place) : size;
    if (end - begin < size) std::memset(x, 0, sizeof x);
    const T* g = address(place + begin);
    for (int i = begin; i < end; ++i) x[i] = as_float(g[i - begin]);
    for (int d = 0; d < kSketchDots; ++d) {
      if (args.dots[d] != nullptr) result->dots[d] += inner(x + begin, args.dots[d] + place + begin, end - begin);
    }
    if (args.scale != nullptr) {
      for (int i = begin; i < end; ++i) x[i] *= args.scale[place + i];
    }
    XorLoad<float> xor_load;
    xor_load.set(plan.mask);
    if (group == kRows) {
      add_rows<kRows>(acc, x, plan, xor_load, row, nullptr, &result->squares);
    } else if (shape.lanes == kLanes) {
      add_rows<1>(acc, x, plan, xor_load, row, nullptr, &result->squares);
    } else {
      add_places(acc, x, plan, shape, &result->squares);
    }
  }

  static float as_float(float x) { return x; }
  static float as_float(Bf16 x) { return from_bf16(x.bits); }
  static float as_float(F16 x) { return from_f16(x.bits); }
};

template <typename T>
void fold_as(const SketchArgs& args) {
  const SketchShape shape(args.k);
  const int group = shape.rows < FoldTask<T>::kRows ? 1 : FoldTask<T>::kRows;
  const int64_t first_tile = args.offset / shape.size, last_tile = (args.offset + args.n - 1) / shape.size;
  const int64_t first_chunk = first_tile / shape.tiles, last_chunk = last_tile / shape.tiles;
  const int64_t tiles = last_tile - first_tile + 1 < shape.tiles ? last_tile - first_tile + 1 : shape.tiles;
  int parts = 1;
  while (tiles * parts < args.threads && 2 * parts * group <= shape.rows) parts *= 2;
  const int64_t chunks = shape.tiles > 1 ? last_chunk - first_chunk + 1 : 0;
  const Buffer orders(static_cast<size_t>(chunks) * sizeof(TileOrder));
  TileOrder* order = chunks > 0 ? reinterpret_cast<TileOrder*>(orders.bytes()) : nullptr;
  for (int64_t i = 0; i < chunks; ++i) order[i] = TileOrder(first_chunk + i, args.seed);
  const Buffer buffer(static_cast<size_t>(tiles * parts) * sizeof(Sums));
  Sums* sums = reinterpret_cast<Sums*>(buffer.bytes());
  for (int64_t i = 0; i < tiles * parts; ++i) sums[i] = Sums{};
  FoldTask<T> task{args,  shape, first_tile, last_tile,     first_chunk, last_chunk,
                   parts, group, order,      tiles * parts, sums,        {}};
  run_team(tiles * parts < args.threads ? static_cast<int>(tiles * parts) : args.threads, FoldTask<T>::work, &task);
  Sums all = {};
  for (int64_t i = 0; i < tiles * parts; ++i) {
    all.squares += sums[i].squares;
    for (int d = 0; d < kSketchDots; ++d) all.dots[d] += sums[i].dots[d];
  }
  args.sums[0] = horizontal(all.squares);
  for (int d = 0; d < kSketchDots; ++d) args.sums[1 + d] = all.dots[d];
  // Squares in fp32 that overflowed, or may have vanished.
  if (!(args.sums[0] > 1e-20 && args.sums[0] < kInf)) {
    const PlainFloats plain;
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

constexpr SketchKernels kKernels = {fold};

}  // namespace
}  // namespace lldfast
