// x [n] (fp32, bf16, fp16)  ->  fp64 sketch [k] +=, fp64 sums; the formula is that of lldfast/ops/sketch/fold.py.
//
// A block of threads owns a bucket tile (32 rows x 128 lanes) for a block of 32 chunks, so that a bucket gets its terms
// in order without atomics. A thread owns 4 neighbouring lanes in 8 rows: the mask moves whole groups of 4, which one
// load fetches, and their order within, which two swaps mend. A Philox call makes the signs of 4 lanes in all 32 rows;
// the warps make those of 4 chunks at a time, one each, and share them. Several blocks of chunks leave partial sums
// that a second pass adds in order. A tensor of fewer tiles than the sketch has gets a block of threads for each tile
// of its own, which inverts the permutation to find the bucket tile; one that two chunks reach belongs to the first.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <vector>

#include "cuda/sketch.h"

namespace lldfast {
namespace {

constexpr int kTile = 4096;
constexpr int kLanes = 128;
constexpr int kChunks = 32;  // of a block, and lanes of a warp: each makes the plan of one chunk
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = kTile / kLanes / kWarps;  // of a thread: warp, warp + kWarps, ...
constexpr int kAhead = 16;                      // loads of the second pass that are under way at a time
constexpr int kCombineThreads = 64;             // few, so that a small sketch reaches many multiprocessors
constexpr int kSumThreads = 256;
constexpr int64_t kPartialBytes = 32 << 20;  // little enough to stay in the L2 cache of a large GPU
constexpr int64_t kMaxGrid = 2147483647;
constexpr unsigned kAll = 0xffffffff;

// Blocks first_block .. first_block + blocks - 1 of the flat space: by bucket tiles, or by the tensor's from
// first_tile.
struct Launch {
  int64_t first_block;
  int64_t blocks;
  int64_t first_tile;
  int64_t programs;  // blocks of threads
  bool by_source;
};

// Sizes of the sketch, and the tensor's tiles first .. last.
struct Shape {
  int64_t k;
  int size;  // of a tile
  uint32_t tiles;
  int64_t first, last;
  Shape(const SketchInput& in, int64_t k)
      : k(k),
        size(static_cast<int>(std::min<int64_t>(k, kTile))),
        tiles(static_cast<uint32_t>(k / size)),
        first(in.offset / size),
        last((in.offset + in.n - 1) / size) {}
};

__device__ float to_float(float x) {
  return x;
}
__device__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ float to_float(__half x) {
  return __half2float(x);
}

// Philox4x32-10 of the counter (c0, c1, chunk).
__device__ uint4 philox(uint32_t c0, uint32_t c1, int64_t chunk, uint64_t seed) {
  uint32_t c2 = static_cast<uint32_t>(chunk), c3 = static_cast<uint32_t>(chunk >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// Four entries as a load instruction moves them.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// The source tile of a chunk: its entries begin at `start` of the tensor, which may be outside.
struct Source {
  int64_t start, n;
  int size, row_mask, group;  // group: where this thread's 4 entries begin within a row
  __device__ int entry(int row) const { return (row ^ row_mask) * kLanes + group; }
};

// x[m][j] is entry source.entry(row) + j of row warp + m * kWarps, 0 where there is none.
template <typename T, bool kWhole>
__device__ void load(const T* x, const Source& source, int warp, float (&out)[kRows][4]) {
  const T* tile = x + source.start;
  const bool inside = source.start >= 0 && source.start + source.size <= source.n;
  if (kWhole && inside && reinterpret_cast<uintptr_t>(tile) % sizeof(Four<T>) == 0) {
    Four<T> four[kRows];
#pragma unroll
    for (int m = 0; m < kRows; ++m) {  // nothing between the loads, so that all are in flight together
      four[m] = *reinterpret_cast<const Four<T>*>(tile + source.entry(warp + m * kWarps));
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[m][j] = to_float(four[m].at[j]);
    }
    return;
  }
  // In 32 bits, within the tile. In a small tile, many threads have no entry.
  const int64_t whole = source.size;
  const int begin = static_cast<int>(min(max(-source.start, int64_t{0}), whole));
  const int end = static_cast<int>(max(min(source.n - source.start, whole), int64_t{0}));
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int e = source.entry(warp + m * kWarps) + j;
      out[m][j] = e >= begin && e < end ? to_float(tile[e]) : 0.0f;
    }
  }
}

__device__ void swap_if(bool yes, float& a, float& b) {
  const float c = yes ? b : a;
  b = yes ? a : b;
  a = c;
}

// Sum over a block of kCount warps, in one order.
template <int kCount>
__device__ double block_sum(double x, double* of_warp) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_down_sync(kAll, x, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kCount; ++i) total += of_warp[i];
  return total;
}

// Grid [programs]. With `partials` [blocks, k] a block of threads leaves its tile there, without it adds it to the
// sketch. kWhole: tiles of 4096. kExtras: there may be a scale and inner products.
template <typename T, bool kWhole, bool kExtras>
__global__ void __launch_bounds__(kThreads) fold_kernel(SketchInput in, Shape shape, Launch launch, double* sketch,
                                                        float* partials, double* sums, int64_t sums_stride) {
  __shared__ uint4 shared_words[2][kWarps][32];
  __shared__ double of_warp[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int size = kWhole ? kTile : shape.size;
  int64_t block = launch.first_block + blockIdx.x / shape.tiles;
  uint32_t target = blockIdx.x % shape.tiles;
  int64_t mine = 0;
  if (launch.by_source) {
    const int64_t tile = launch.first_tile + blockIdx.x;
    block = launch.first_block;
    mine = tile / shape.tiles;
    const uint4 ab = philox(0, 2, mine, in.seed);
    uint32_t inverse = ab.x | 1;  // Newton's iteration modulo 2^32: right to 3 bits, and each step doubles them
    for (int i = 0; i < 4; ++i) inverse *= 2 - (ab.x | 1) * inverse;
    target = inverse * (static_cast<uint32_t>(tile % shape.tiles) - ab.y) & (shape.tiles - 1);
  }
  const int64_t first_chunk = block * kChunks;
  const uint4 ab = philox(0, 2, first_chunk + lane, in.seed);
  const uint32_t from = ((ab.x | 1) * target + ab.y) & (shape.tiles - 1);
  const int mask_of_lane = philox(target, 1, first_chunk + lane, in.seed).x & (size - 1);
  const int64_t tile_of_lane = (first_chunk + lane) * shape.tiles + from;
  const int64_t start_of_lane = tile_of_lane * size - in.offset;
  const int lo = static_cast<int>(max(shape.first / shape.tiles - first_chunk, int64_t{0}));
  const int hi = static_cast<int>(min(shape.last / shape.tiles - first_chunk + 1, int64_t{kChunks}));
  if (launch.by_source) {
    const unsigned touched = __ballot_sync(kAll, tile_of_lane >= shape.first && tile_of_lane <= shape.last);
    if (__ffs(touched) - 1 != mine - first_chunk) {  // the same for all threads
      const int rows = in.dots[0] ? in.dots[1] ? 3 : 2 : 1;
      if (threadIdx.x < rows) sums[threadIdx.x * sums_stride + blockIdx.x] = 0;
      return;
    }
  }

  float acc[kRows][4] = {};
  double square = 0, dots[2] = {0, 0};
  for (int base = lo; base < hi; base += kWarps) {
    // Two buffers in turn, so that one barrier is enough: behind it, nobody reads the other one any more.
    uint4(*words)[32] = shared_words[(base - lo) / kWarps & 1];
    if (base + warp < hi) words[warp][lane] = philox(32 * target + lane, 0, first_chunk + base + warp, in.seed);
    __syncthreads();
    for (int i = base; i < min(base + kWarps, hi); ++i) {
      const int mask = __shfl_sync(kAll, mask_of_lane, i);
      const Source source{__shfl_sync(kAll, start_of_lane, i), in.n, size, mask / kLanes,
                          4 * lane ^ (mask & (kLanes - 4))};
      float x[kRows][4];
      load<T, kWhole>(static_cast<const T*>(in.x), source, warp, x);
      if (kExtras) {
#pragma unroll
        for (int d = 0; d < 2; ++d) {
          if (!in.dots[d]) break;
          float y[kRows][4];
          load<float, kWhole>(in.dots[d], source, warp, y);
          double sum = 0;
#pragma unroll
          for (int m = 0; m < kRows; ++m) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sum += static_cast<double>(x[m][j]) * y[m][j];
          }
          dots[d] += sum;
        }
        if (in.scale) {
          float y[kRows][4];
          load<float, kWhole>(in.scale, source, warp, y);
#pragma unroll
          for (int m = 0; m < kRows; ++m) {
#pragma unroll
            for (int j = 0; j < 4; ++j) x[m][j] = __fmul_rn(x[m][j], y[m][j]);
          }
        }
      }
      const uint4 four = words[i - base][lane];
      const uint32_t word[4] = {four.x >> warp, four.y >> warp, four.z >> warp, four.w >> warp};
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        swap_if(mask & 1, x[m][0], x[m][1]);
        swap_if(mask & 1, x[m][2], x[m][3]);
        swap_if(mask & 2, x[m][0], x[m][2]);
        swap_if(mask & 2, x[m][1], x[m][3]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t minus = word[j] << (31 - m * kWarps) & 0x80000000u;
          acc[m][j] += __uint_as_float(__float_as_uint(x[m][j]) ^ minus);
          square += static_cast<double>(x[m][j]) * x[m][j];
        }
      }
    }
  }

  const int64_t bucket = static_cast<int64_t>(target) * size + 4 * lane;
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    const int at = (warp + m * kWarps) * kLanes;
    if (kWhole && partials) {
      float* to = partials + (block - launch.first_block) * shape.k + bucket + at;
      *reinterpret_cast<float4*>(to) = make_float4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
      continue;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!kWhole && at + 4 * lane + j >= size) continue;
      if (partials) {
        partials[(block - launch.first_block) * shape.k + bucket + at + j] = acc[m][j];
      } else {
        sketch[bucket + at + j] += acc[m][j];
      }
    }
  }
  square = block_sum<kWarps>(square, of_warp);
  if (threadIdx.x == 0) sums[blockIdx.x] = square;
  if (kExtras) {
#pragma unroll
    for (int d = 0; d < 2; ++d) {
      if (!in.dots[d]) break;
      const double dot = block_sum<kWarps>(dots[d], of_warp);
      if (threadIdx.x == 0) sums[(1 + d) * sums_stride + blockIdx.x] = dot;
    }
  }
}

// sketch [k] += partials [blocks, k], one block after another.
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const float* partials, double* sketch, int64_t k, int64_t blocks) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  if (j >= k) return;
  double total = sketch[j];
  const float* from = partials + j;
  int64_t left = blocks;
  for (; left >= kAhead; left -= kAhead, from += kAhead * k) {
    float part[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) part[i] = from[i * k];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) total += part[i];
  }
  for (; left > 0; --left, from += k) total += *from;
  sketch[j] = total;
}

// Grid [rows]: totals [rows] of sums [rows, count].
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const double* sums, double* totals, int64_t count) {
  __shared__ double of_warp[kSumThreads / 32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += sums[blockIdx.x * count + i];
  sum = block_sum<kSumThreads / 32>(sum, of_warp);
  if (threadIdx.x == 0) totals[blockIdx.x] = sum;
}

std::vector<Launch> launches(const Shape& shape) {
  const int64_t per_block = static_cast<int64_t>(kChunks) * shape.tiles;
  const int64_t first = shape.first / per_block, end = shape.last / per_block + 1;
  std::vector<Launch> found;
  if (shape.last - shape.first + 1 < shape.tiles) {  // two chunks at most, which may lie in two blocks
    for (int64_t block = first; block < end; ++block) {
      const int64_t lo = std::max(shape.first, block * per_block);
      const int64_t hi = std::min(shape.last, (block + 1) * per_block - 1);
      found.push_back({block, 1, lo, hi - lo + 1, true});
    }
    return found;
  }
  const int64_t most = std::max<int64_t>(kPartialBytes / (sizeof(float) * shape.k), 1);
  for (int64_t block = first; block < end; block += most) {
    const int64_t blocks = std::min(most, end - block);
    found.push_back({block, blocks, 0, blocks * shape.tiles, false});
  }
  return found;
}

int rows_of(const SketchInput& in) {
  return in.dots[0] ? in.dots[1] ? 3 : 2 : 1;
}

int64_t programs_of(const std::vector<Launch>& plan) {
  int64_t count = 0;
  for (const Launch& launch : plan) count += launch.programs;
  return count;
}

// Bytes of the blocks' sums, up to a multiple of 16: the partial sums of the sketch lie behind.
size_t sums_bytes(int rows, int64_t count) {
  return (rows * count + 1) / 2 * 2 * sizeof(double);
}

template <typename T, bool kWhole>
void fold(const SketchInput& in, const Shape& shape, const Launch& launch, double* sketch, float* partials,
          double* sums, int64_t count, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(launch.programs));
  if (in.scale || in.dots[0]) {
    fold_kernel<T, kWhole, true><<<grid, kThreads, 0, stream>>>(in, shape, launch, sketch, partials, sums, count);
  } else {
    fold_kernel<T, kWhole, false><<<grid, kThreads, 0, stream>>>(in, shape, launch, sketch, partials, sums, count);
  }
}

template <typename T>
cudaError_t fold_as(const SketchInput& in, double* sketch, int64_t k, double* totals, void* workspace,
                    cudaStream_t stream) {
  const Shape shape(in, k);
  const std::vector<Launch> plan = launches(shape);
  const int rows = rows_of(in);
  const int64_t count = programs_of(plan);
  double* sums = static_cast<double*>(workspace);
  float* partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + sums_bytes(rows, count));
  int64_t done = 0;
  for (const Launch& launch : plan) {
    if (launch.programs > kMaxGrid) return cudaErrorInvalidValue;
    float* part = launch.blocks > 1 ? partials : nullptr;
    if (shape.size == kTile) {
      fold<T, true>(in, shape, launch, sketch, part, sums + done, count, stream);
    } else {
      fold<T, false>(in, shape, launch, sketch, part, sums + done, count, stream);
    }
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    done += launch.programs;
    if (!part) continue;
    const dim3 grid(static_cast<unsigned>((k + kCombineThreads - 1) / kCombineThreads));
    combine_kernel<<<grid, kCombineThreads, 0, stream>>>(partials, sketch, k, launch.blocks);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  sum_kernel<<<dim3(rows), kSumThreads, 0, stream>>>(sums, totals, count);
  return cudaGetLastError();
}

bool fits(const SketchInput& in, int64_t k) {
  const bool power = k > 0 && (k & (k - 1)) == 0 && k <= int64_t{1} << 40;
  return power && in.n >= 0 && in.offset >= 0 && in.offset <= int64_t{1} << 62 && (in.dots[0] || !in.dots[1]);
}

}  // namespace

size_t sketch_workspace_bytes(const SketchInput& in, int64_t k) {
  if (in.n <= 0 || !fits(in, k)) return 0;
  const std::vector<Launch> plan = launches(Shape(in, k));
  int64_t blocks = 0;
  for (const Launch& launch : plan) blocks = std::max(blocks, launch.blocks);
  return sums_bytes(rows_of(in), programs_of(plan)) + (blocks > 1 ? blocks * k * sizeof(float) : 0);
}

cudaError_t sketch_fold(const SketchInput& in, double* sketch, int64_t k, double* sums, void* workspace,
                        cudaStream_t stream) {
  if (!fits(in, k)) return cudaErrorInvalidValue;
  if (in.n == 0) return cudaMemsetAsync(sums, 0, rows_of(in) * sizeof(double), stream);
  if (workspace == nullptr) return cudaErrorInvalidValue;
  cudaGetLastError();  // an error that someone else left behind is not ours to report
  switch (in.dtype) {
    case Dtype::kFloat32:
      return fold_as<float>(in, sketch, k, sums, workspace, stream);
    case Dtype::kBFloat16:
      return fold_as<__nv_bfloat16>(in, sketch, k, sums, workspace, stream);
    case Dtype::kFloat16:
      return fold_as<__half>(in, sketch, k, sums, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lldfast
