// logits x [*, V] (fp32, bf16, fp16), labels [T]  ->  fp32 logprob, lse, entropy, max_logit [T], int64 argmax [T];
// formulas in logprob_math.h. The forward is bound by reading the logits once, so everything here serves wide loads.
//
// Bit-equal results: V is cut into splits of kSplit columns and a split into groups. Which thread adds which column of
// a group, and the order in which threads, warps and splits are merged, are fixed by the column numbers, never by T,
// the grid or the alignment of the row. With many tokens a block walks all splits of its row; with few, each split gets
// a block, and a second kernel does the same merges.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/logprob.h"
#include "cuda/logprob_math.h"

namespace lldfast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kUnroll = 4;                  // 16-byte vectors that a thread has in flight
constexpr int kBlocks = 3;                  // per multiprocessor; a compiler left free aims at 4 and spills
constexpr int kSplit = 16384;               // columns; a multiple of a group for every dtype
constexpr int64_t kManyTokens = 1024;       // from here on, a block per token fills the device
constexpr int64_t kMaxTokens = 2147483647;  // of a grid
constexpr int64_t kMaxColumns = 1 << 30;    // column numbers are int, and may pass the end of the row by a chunk

template <typename T>
constexpr int kWidth = 16 / sizeof(T);
template <typename T>
constexpr int kGroup = kThreads * kUnroll * kWidth<T>;

__device__ float to_float(float x) {
  return x;
}
__device__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ float to_float(__half x) {
  return __half2float(x);
}

template <typename T>
__device__ T from_float(float x);
template <>
__device__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// 16 bytes as a load instruction moves them and as elements. Copies through it vanish in registers.
template <typename T>
union Vector {
  uint4 words;
  T elements[kWidth<T>];
  __device__ Vector() : words{0, 0, 0, 0} {}
};

// One row of logits. `phase` is how many bytes behind a 16-byte boundary it starts: odd V gives every row its own.
template <typename T>
struct Row {
  const T* data;
  int columns;
  int phase;
  __device__ Row(const LogprobInput& in, int64_t t)
      : data(static_cast<const T*>(in.logits) + (in.rows ? in.rows[t] : t) * in.row_stride),
        columns(static_cast<int>(in.vocab)),
        phase(static_cast<int>(reinterpret_cast<uintptr_t>(data) & 15)) {}

  // Whether `aligned_pair` of every vector of columns [begin, end) lies inside the row.
  __device__ bool is_inner(int begin, int end) const {
    const int shift = phase / static_cast<int>(sizeof(T));
    return shift == 0 ? end <= columns : begin > 0 && end + kWidth<T> - shift <= columns;
  }

  // The aligned 16 bytes around `column` and those behind them, which are not read where the row is aligned. The second
  // is the first of the next thread, so L1 has it, and which thread adds which column does not depend on the alignment,
  // as it would if the head of the row were peeled.
  __device__ void aligned_pair(int column, uint4& a, uint4& b) const {
    const char* at = reinterpret_cast<const char*>(data + column) - phase;
    a = __ldg(reinterpret_cast<const uint4*>(at));
    if (phase != 0) b = __ldg(reinterpret_cast<const uint4*>(at + 16));
  }

  // A vector at an end of the row, one by one. Elements behind the end keep what they hold.
  __device__ void edge(int column, Vector<T>& v) const {
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j) {
      if (column + j < columns) v.elements[j] = data[column + j];
    }
  }

  // The kWidth columns out of their aligned pair: shifts the eight words down by two, one and half a word. An aligned
  // row goes the same way, by 0: with a branch around this, the compiler waits for the first loads before it issues the
  // last.
  __device__ uint4 unaligned(const uint4& a, const uint4& b) const {
    const bool two = phase & 8, one = phase & 4;
    const uint32_t c0 = two ? a.z : a.x, c1 = two ? a.w : a.y, c2 = two ? b.x : a.z;
    const uint32_t c3 = two ? b.y : a.w, c4 = two ? b.z : b.x, c5 = two ? b.w : b.y;
    const uint32_t d0 = one ? c1 : c0, d1 = one ? c2 : c1, d2 = one ? c3 : c2, d3 = one ? c4 : c3, d4 = one ? c5 : c4;
    if (sizeof(T) == 4) return {d0, d1, d2, d3};
    const int bits = (phase & 2) * 8;
    return {__funnelshift_r(d0, d1, bits), __funnelshift_r(d1, d2, bits), __funnelshift_r(d2, d3, bits),
            __funnelshift_r(d3, d4, bits)};
  }
};

template <typename T>
__device__ void load_bias(const float* bias, int column, int columns, float (&out)[kWidth<T>]) {
  const bool aligned = (reinterpret_cast<uintptr_t>(bias) & 15) == 0;
  if (bias && aligned && column + kWidth<T> <= columns) {
#pragma unroll
    for (int j = 0; j < kWidth<T>; j += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(bias + column + j));
      out[j] = four.x, out[j + 1] = four.y, out[j + 2] = four.z, out[j + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j) out[j] = bias && column + j < columns ? __ldg(bias + column + j) : 0.0f;
  }
}

__device__ Transform transform_of(const LogprobInput& in) {
  return {in.logit_scale, in.softcap, 1.0f / in.softcap};
}

// Adds a group of columns to the thread's sums. kInner: all of them can be read in wide loads. The arithmetic of both
// versions is the same to the bit, as a column that is not there is a z of -inf, which adds 0.
template <typename T, bool kTransform, bool kExtras, bool kInner>
__device__ void add_group(Partial& p, const Row<T>& row, const LogprobInput& in, int group) {
  constexpr int kStep = kThreads * kWidth<T>;
  const int first = group + static_cast<int>(threadIdx.x) * kWidth<T>;
  uint4 a[kUnroll] = {}, b[kUnroll] = {};
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {  // nothing between the loads, so that all are in flight together
    const int column = first + k * kStep;
    if (kInner || row.is_inner(column, column + kWidth<T>)) row.aligned_pair(column, a[k], b[k]);
  }
  Vector<T> v[kUnroll];
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const int column = first + k * kStep;
    v[k].words = row.unaligned(a[k], b[k]);
    if (!kInner && !row.is_inner(column, column + kWidth<T>)) row.edge(column, v[k]);
  }
  float z[kUnroll][kWidth<T>];
  float top = p.m;
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const int column = first + k * kStep;
    float bias[kWidth<T>];
    if (kTransform) load_bias<T>(in.bias, column, row.columns, bias);
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j) {
      z[k][j] = to_float(v[k].elements[j]);
      if (kTransform) z[k][j] = transform(z[k][j], bias[j], transform_of(in));
      if (!kInner && column + j >= row.columns) z[k][j] = -INFINITY;
      top = fmaxf(top, z[k][j]);
      if (kExtras && is_better(z[k][j], p.best)) {
        p.best = z[k][j];
        p.at = column + j;
      }
    }
  }
  const float m = finite(top);
  float s[kUnroll], w[kUnroll];
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    s[k] = w[k] = 0;
    if (!kInner && group + k * kStep >= row.columns) continue;
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j) {
      const float d = z[k][j] - m, e = exp_below(d);
      s[k] += e;
      if (kExtras) w[k] = fmaf(e, bounded(d), w[k]);
    }
  }
  static_assert(kUnroll == 4, "the sums below are written out");
  const float rescale = exp_below(p.m - m);
  if (kExtras) p.w = fmaf(fmaf(bounded(p.m - m), p.s, p.w), rescale, (w[0] + w[1]) + (w[2] + w[3]));
  p.s = fmaf(p.s, rescale, (s[0] + s[1]) + (s[2] + s[3]));
  p.m = m;
}

template <bool kExtras>
__device__ void merge_warp(Partial& p) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    Partial other = p;
    other.m = __shfl_down_sync(0xffffffff, p.m, step);
    other.s = __shfl_down_sync(0xffffffff, p.s, step);
    if (kExtras) {
      other.w = __shfl_down_sync(0xffffffff, p.w, step);
      other.best = __shfl_down_sync(0xffffffff, p.best, step);
      other.at = __shfl_down_sync(0xffffffff, p.at, step);
    }
    merge<kExtras>(p, other);  // lanes above 32 - step add themselves; nobody reads those
  }
}

template <typename T>
__device__ void write_token(const LogprobInput& in, const LogprobOutput& out, int64_t t, const Partial& total) {
  const int64_t y = in.labels[t];
  const bool owned = y >= 0 && y < in.vocab;
  float z_y = 0;
  if (owned) z_y = transform(to_float(Row<T>(in, t).data[y]), in.bias ? in.bias[y] : 0.0f, transform_of(in));
  const TokenScore score = finish(total, z_y, owned);
  out.logprob[t] = score.logprob;
  out.lse[t] = score.lse;
  if (out.argmax) out.argmax[t] = in.vocab == 0 ? -1 : max(total.at, 0);
  if (out.entropy) out.entropy[t] = in.vocab == 0 ? 0.0f : score.entropy;
  if (out.max_logit) out.max_logit[t] = total.best;
}

// Grid [T, 1 or splits]. With `partials` [T, splits] a block leaves its split there, without it finishes its token.
template <typename T, bool kTransform, bool kExtras>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(LogprobInput in, LogprobOutput out, Partial* partials, int splits) {
  __shared__ Partial of_warp[2][kWarps];
  const int64_t t = blockIdx.x;
  const Row<T> row(in, t);
  Partial total = empty_partial();
  for (int split = blockIdx.y; split < splits; split += gridDim.y) {
    Partial p = empty_partial();
    const int end = min(row.columns - split * kSplit, kSplit) + split * kSplit;
    for (int group = split * kSplit; group < end; group += kGroup<T>) {
      if (row.is_inner(group, group + kGroup<T>)) {
        add_group<T, kTransform, kExtras, true>(p, row, in, group);
      } else {
        add_group<T, kTransform, kExtras, false>(p, row, in, group);
      }
    }
    merge_warp<kExtras>(p);
    Partial* shared = of_warp[split & 1];  // two in turn, so that one barrier a split is enough
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = p;
    __syncthreads();
    if (threadIdx.x != 0) continue;
    for (int warp = 1; warp < kWarps; ++warp) merge<kExtras>(p, shared[warp]);
    if (partials) {
      partials[t * splits + split] = p;
    } else {
      merge<kExtras>(total, p);
    }
  }
  if (threadIdx.x == 0 && !partials) write_token<T>(in, out, t, total);
}

template <typename T, bool kExtras>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(LogprobInput in, LogprobOutput out, const Partial* partials, int splits) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= in.tokens) return;
  Partial total = empty_partial();
  for (int split = 0; split < splits; ++split) merge<kExtras>(total, partials[t * splits + split]);
  write_token<T>(in, out, t, total);
}

// The gradient of one token's row, column by column.
struct TokenGrad {
  float lse, g, h;
  int label;  // -1: in another shard
  const float* bias;
  Transform f;
  __device__ TokenGrad(const LogprobInput& in, const LogprobGrad& grad, int64_t t)
      : lse(grad.lse[t]), g(grad.g[t]), h(grad.h[t]), label(-1), bias(in.bias), f(transform_of(in)) {
    if (const int64_t y = in.labels[t]; y >= 0 && y < in.vocab) label = static_cast<int>(y);
  }
  __device__ float at(int column, float x) const {
    return logit_grad(x, bias ? __ldg(bias + column) : 0.0f, f, lse, g, h, column == label);
  }
};

// Grid [T, chunks of a row]. Every column is its own result, so here the head of the row is peeled. A thread reads just
// the columns that it then writes, which is what lets d_logits be the logits; hence no load may go through the
// read-only cache.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) backward_kernel(LogprobInput in, LogprobGrad grad) {
  const int64_t t = blockIdx.x;
  const Row<T> row(in, t);
  const TokenGrad of(in, grad, t);
  T* d = static_cast<T*>(grad.d_logits) + (in.rows ? in.rows[t] : t) * grad.d_row_stride;
  const int total = static_cast<int>(grad.d_columns);
  const int head = min((16 - row.phase) % 16 / static_cast<int>(sizeof(T)), total);
  // Rows that lie differently to 16 bytes in the two tensors have no vectors in common.
  const bool alike = ((reinterpret_cast<uintptr_t>(d) ^ reinterpret_cast<uintptr_t>(row.data)) & 15) == 0;
  const int vectors = alike ? (total - head) / kWidth<T> : 0;

  const int stride = gridDim.y * kThreads;
  const int thread = blockIdx.y * kThreads + threadIdx.x;
  for (int start = thread; start < vectors; start += stride * kUnroll) {
    Vector<T> v[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int column = head + (start + k * stride) * kWidth<T>;
      if (start + k * stride >= vectors) break;
      if (column + kWidth<T> <= row.columns) {
        v[k].words = *reinterpret_cast<const uint4*>(row.data + column);
      } else {
        row.edge(column, v[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int column = head + (start + k * stride) * kWidth<T>;
      if (start + k * stride >= vectors) break;
#pragma unroll
      for (int j = 0; j < kWidth<T>; ++j) {
        const float dz = column + j < row.columns ? of.at(column + j, to_float(v[k].elements[j])) : 0.0f;
        v[k].elements[j] = from_float<T>(dz);
      }
      *reinterpret_cast<uint4*>(d + column) = v[k].words;
    }
  }
  for (int i = thread; i < total - vectors * kWidth<T>; i += stride) {
    const int column = i < head ? i : i + vectors * kWidth<T>;
    d[column] = from_float<T>(column < row.columns ? of.at(column, to_float(row.data[column])) : 0.0f);
  }
}

constexpr int kBiasColumns = 32, kBiasRows = 16;

// d_bias[c] = sum over t of dz[t, c], unrounded. A warp takes 32 columns of every 16th token; the 16 sums of a column
// are then added in turn. There are V / 32 blocks, enough without cutting T, which would need scratch or atomics.
template <typename T>
__global__ void __launch_bounds__(kBiasColumns* kBiasRows) bias_kernel(LogprobInput in, LogprobGrad grad) {
  __shared__ float sums[kBiasRows][kBiasColumns];
  const int column = blockIdx.x * kBiasColumns + threadIdx.x;
  float sum = 0;
  if (column < in.vocab) {
#pragma unroll 4
    for (int64_t t = threadIdx.y; t < in.tokens; t += kBiasRows) {
      sum += TokenGrad(in, grad, t).at(column, to_float(Row<T>(in, t).data[column]));
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= in.vocab) return;
  for (int i = 1; i < kBiasRows; ++i) sum += sums[i][threadIdx.x];
  grad.d_bias[column] = sum;
}

int splits_of(int64_t vocab) {
  return static_cast<int>((vocab + kSplit - 1) / kSplit);
}

bool fits(const LogprobInput& in, int64_t columns) {
  return in.tokens >= 0 && in.tokens <= kMaxTokens && in.vocab >= 0 && std::max(in.vocab, columns) <= kMaxColumns;
}

template <typename T, bool kTransform, bool kExtras>
cudaError_t forward(const LogprobInput& in, const LogprobOutput& out, void* workspace, cudaStream_t stream) {
  const int splits = splits_of(in.vocab);
  const unsigned tokens = static_cast<unsigned>(in.tokens);
  if (logprob_workspace_bytes(in.tokens, in.vocab) == 0) {
    const dim3 grid(tokens);
    forward_kernel<T, kTransform, kExtras><<<grid, kThreads, 0, stream>>>(in, out, nullptr, splits);
    return cudaGetLastError();
  }
  if (workspace == nullptr) return cudaErrorInvalidValue;
  Partial* partials = static_cast<Partial*>(workspace);
  const dim3 grid(tokens, std::min(splits, 65535));
  forward_kernel<T, kTransform, kExtras><<<grid, kThreads, 0, stream>>>(in, out, partials, splits);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  const dim3 finish_grid((tokens + kThreads - 1) / kThreads);
  finish_kernel<T, kExtras><<<finish_grid, kThreads, 0, stream>>>(in, out, partials, splits);
  return cudaGetLastError();
}

template <typename T>
cudaError_t forward_as(const LogprobInput& in, const LogprobOutput& out, void* workspace, cudaStream_t stream) {
  const bool transformed = in.bias || in.softcap > 0 || in.logit_scale != 1;
  if (out.argmax || out.entropy || out.max_logit) {
    return transformed ? forward<T, true, true>(in, out, workspace, stream)
                       : forward<T, false, true>(in, out, workspace, stream);
  }
  return transformed ? forward<T, true, false>(in, out, workspace, stream)
                     : forward<T, false, false>(in, out, workspace, stream);
}

template <typename T>
cudaError_t backward_as(const LogprobInput& in, const LogprobGrad& grad, cudaStream_t stream) {
  if (grad.d_bias && in.vocab > 0) {  // first, for d_logits may replace the logits
    const dim3 grid(static_cast<unsigned>((in.vocab + kBiasColumns - 1) / kBiasColumns));
    const dim3 block(kBiasColumns, kBiasRows);
    bias_kernel<T><<<grid, block, 0, stream>>>(in, grad);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  if (!grad.d_logits || grad.d_columns == 0) return cudaSuccess;
  const int64_t chunks = (grad.d_columns + kGroup<T> - 1) / kGroup<T>;
  const dim3 grid(static_cast<unsigned>(in.tokens), static_cast<unsigned>(std::min<int64_t>(chunks, 65535)));
  backward_kernel<T><<<grid, kThreads, 0, stream>>>(in, grad);
  return cudaGetLastError();
}

}  // namespace

size_t logprob_workspace_bytes(int64_t tokens, int64_t vocab) {
  const int splits = splits_of(vocab);
  return tokens >= kManyTokens || splits < 2 ? 0 : static_cast<size_t>(tokens) * splits * sizeof(Partial);
}

cudaError_t logprob_forward(const LogprobInput& in, const LogprobOutput& out, void* workspace, cudaStream_t stream) {
  if (!fits(in, 0)) return cudaErrorInvalidValue;
  if (in.tokens == 0) return cudaSuccess;
  cudaGetLastError();  // an error that someone else left behind is not ours to report
  switch (in.dtype) {
    case Dtype::kFloat32:
      return forward_as<float>(in, out, workspace, stream);
    case Dtype::kBFloat16:
      return forward_as<__nv_bfloat16>(in, out, workspace, stream);
    case Dtype::kFloat16:
      return forward_as<__half>(in, out, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t logprob_backward(const LogprobInput& in, const LogprobGrad& grad, cudaStream_t stream) {
  if (!fits(in, grad.d_columns) || (grad.d_logits && grad.d_columns < in.vocab)) return cudaErrorInvalidValue;
  if (in.tokens == 0) {
    return grad.d_bias ? cudaMemsetAsync(grad.d_bias, 0, static_cast<size_t>(in.vocab) * sizeof(float), stream)
                       : cudaSuccess;
  }
  cudaGetLastError();
  switch (in.dtype) {
    case Dtype::kFloat32:
      return backward_as<float>(in, grad, stream);
    case Dtype::kBFloat16:
      return backward_as<__nv_bfloat16>(in, grad, stream);
    case Dtype::kFloat16:
      return backward_as<__half>(in, grad, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lldfast
