// One tile of the flat space into its tile of the sketch, for the vectors of the including file.
#pragma once

#include "cpu/philox.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace lldfast {
namespace {

typedef double D __attribute__((vector_size(LLDFAST_VEC_BYTES)));

constexpr int kRows = 4;      // rows of sums at a time: the sources' pieces of now and next fit the first cache
constexpr int kTile = 4096;   // places of a tile, fewer where k is smaller
constexpr int kLanes = 128;   // places of a row, whose signs are bits of 128 words
constexpr int kBlock = 32;   // chunks summed in fp32 before their sum goes to the fp64 sketch

// Subnormal numbers count as what they are in every thread, whatever the caller's mode (torch.set_flush_denormal is per thread).
class PlainFloats {
 public:
#if defined(__SSE2__)
  PlainFloats() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
  ~PlainFloats() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#endif
};

struct SketchShape {
  int64_t tiles;  // of a chunk
  int size;       // places of a tile
  int rows, lanes;

  explicit SketchShape(int64_t k)
      : tiles(k > kTile ? k / kTile : 1),
        size(k > kTile ? kTile : static_cast<int>(k)),
        rows(size > kLanes ? size / kLanes : 1),
        lanes(size > kLanes ? kLanes : size) {}
};

// The permutation of a chunk's tiles: bucket tile J takes source tile (a J + b) mod T.
struct TileOrder {
  uint32_t a, b;

  TileOrder(int64_t chunk, uint64_t seed) {
    const uint64_t c = static_cast<uint64_t>(chunk);
    const Words words = philox(0, 2, static_cast<uint32_t>(c), static_cast<uint32_t>(c >> 32), seed);
    a = words.w[0] | 1;
    b = words.w[1];
  }
  int64_t source(int64_t bucket_tile, int64_t tiles) const {
    return (a * static_cast<uint32_t>(bucket_tile) + b) & static_cast<uint32_t>(tiles - 1);
  }
  int64_t target(int64_t source_tile, int64_t tiles) const {
    uint32_t inverse = a;  // right to 3 bits, which every step of Newton's iteration doubles
    for (int i = 0; i < 4; ++i) inverse *= 2 - a * inverse;
    return (inverse * (static_cast<uint32_t>(source_tile) - b)) & static_cast<uint32_t>(tiles - 1);
  }
};

// Where one tile of a chunk goes: bucket place i takes source place i ^ mask, with sign bit i / 128 of words[i % 128].
struct TilePlan {
  alignas(64) uint32_t words[kLanes + 16];
  int mask;

  void make(int64_t chunk, int64_t bucket_tile, const SketchShape& shape, uint64_t seed) {
    const uint32_t low = static_cast<uint32_t>(chunk), high = static_cast<uint32_t>(static_cast<uint64_t>(chunk) >> 32);
    const uint32_t tile = static_cast<uint32_t>(bucket_tile);
    mask = static_cast<int>(philox(tile, 1, low, high, seed).w[0] & static_cast<uint32_t>(shape.size - 1));
    for (int q = 0; 4 * q < shape.lanes; q += kWidth) philox_vector(32 * tile + q, 0, low, high, seed, words + 4 * q);
  }
};

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// Lane i gets place i ^ mask of the vector at an address, as fp32.
template <typename T>
struct XorLoad;

template <>
struct XorLoad<float> {
  I order;
  void set(int mask) {
    for (int i = 0; i < kWidth; ++i) order[i] = i ^ (mask & (kWidth - 1));
  }
  LLDFAST_INLINE F operator()(const float* p) const { return __builtin_shuffle(load(p), order); }
};

// 16-bit values as the high (bf16) or the low (fp16) half of 32 bits.
template <int kHigh>
struct XorLoadHalves {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256i order;  // one shuffle of bytes permutes and widens: both of its halves see all eight values
  void set(int mask) {
    alignas(32) int8_t bytes[32];
    for (int i = 0; i < kWidth; ++i) {
      const int8_t from = static_cast<int8_t>(2 * (i ^ (mask & (kWidth - 1))));
      for (int half = 0; half < 2; ++half) {
        bytes[4 * i + 2 * half] = half == kHigh ? from : static_cast<int8_t>(-1);
        bytes[4 * i + 2 * half + 1] = half == kHigh ? static_cast<int8_t>(from + 1) : static_cast<int8_t>(-1);
      }
    }
    order = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
  }
  LLDFAST_INLINE U operator()(const void* p) const {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    return reinterpret_cast<U>(_mm256_shuffle_epi8(twice, order));
  }
#else
  I order;
  void set(int mask) {
    for (int i = 0; i < kWidth; ++i) order[i] = i ^ (mask & (kWidth - 1));
  }
  LLDFAST_INLINE U operator()(const void* p) const {
#if defined(__AVX512F__)
    const U x = reinterpret_cast<U>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
#else
    uint16_t half[kWidth];
    std::memcpy(half, p, sizeof half);
    U x = {};
    for (int i = 0; i < kWidth; ++i) x[i] = half[i];
#endif
    return __builtin_shuffle(x, order) << (16 * kHigh);
  }
#endif
};

template <>
struct XorLoad<Bf16> {
  XorLoadHalves<1> halves;
  void set(int mask) { halves.set(mask); }
  LLDFAST_INLINE F operator()(const Bf16* p) const { return reinterpret_cast<F>(halves(p)); }
};

template <>
struct XorLoad<F16> {
  XorLoadHalves<0> halves;
  void set(int mask) { halves.set(mask); }
  LLDFAST_INLINE F operator()(const F16* p) const {
    const U bits = halves(p);
    const U magnitude = (bits & 0x7fff) << 13;
    const U scaled = reinterpret_cast<U>(reinterpret_cast<F>(magnitude) * 5.192296858534828e33f);  // 2^112, see from_f16
    const U value = (bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : scaled;
    return reinterpret_cast<F>(value | (bits & 0x8000) << 16);
  }
};

LLDFAST_INLINE void widen(F x, D* low, D* high) {
#if defined(__AVX512F__)
  const __m512 v = reinterpret_cast<__m512>(x);
  *low = reinterpret_cast<D>(_mm512_cvtps_pd(_mm512_castps512_ps256(v)));
  *high = reinterpret_cast<D>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
#elif defined(__AVX2__)
  const __m256 v = reinterpret_cast<__m256>(x);
  *low = reinterpret_cast<D>(_mm256_cvtps_pd(_mm256_castps256_ps128(v)));
  *high = reinterpret_cast<D>(_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
#else
  for (int i = 0; i < kWidth / 2; ++i) {
    (*low)[i] = x[i];
    (*high)[i] = x[i + kWidth / 2];
  }
#endif
}

inline double horizontal(D x) {
  double sum = 0.0;
  for (int i = 0; i < kWidth / 2; ++i) sum += x[i];
  return sum;
}

// Sums beside the sketch: |g scale|^2 and inner products.
struct Sums {
  double square, dot[2];
};

struct TileExtras {
  const float* scale;
  const float* dots[2];
};

// Rows [row, row + kRows) of N tiles of whole rows onto acc [kRows * kLanes], tile by tile in their order. g[i] is the source of
// tile i, loads[i] its permutation within a vector; the kRows rows at next[i] will be read after it.
//
// Squares are added in fp32, 16 of a lane, before they are widened: |x|^2 comes out to about 1e-8, at a seventh of the instructions of
// fp64. They can overflow or vanish, which fold() sees by the result.
template <int N, typename T>
LLDFAST_INLINE void add_rows(float* acc, const T* const* g, const TilePlan* const* plans, const XorLoad<T>* const* loads, int row,
                             const T* const* next, Sums* sums) {
  D low_sum = {}, high_sum = {};
  const T* from[N][kRows];
  for (int c = 0; c < N; ++c) {
    for (int i = 0; i < kRows; ++i) from[c][i] = g[c] + ((row + i) ^ (plans[c]->mask / kLanes)) * kLanes;
  }
  const int shift = 32 - kRows - row;
  for (int64_t lane = 0; lane < kLanes; lane += kWidth) {
    F sum[kRows], squares[2] = {F{}, F{}};
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) sum[i] = load(acc + i * kLanes + lane);
#pragma GCC unroll 4
    for (int c = 0; c < N; ++c) {
      const int64_t place = lane ^ (plans[c]->mask & (kLanes - 1) & ~(kWidth - 1));
      U words;
      std::memcpy(&words, plans[c]->words + lane, sizeof words);
      words <<= shift;  // the last row's bit is the highest
#pragma GCC unroll 4
      for (int i = kRows - 1; i >= 0; --i) {
        const F x = (*loads[c])(from[c][i] + place);
        squares[i & 1] += x * x;
        sum[i] += reinterpret_cast<F>(reinterpret_cast<U>(x) ^ (words & 0x80000000u));
        words += words;
      }
      if (lane * sizeof(T) % 64 == 0) {
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) __builtin_prefetch(next[c] + i * kLanes + lane);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) store(acc + i * kLanes + lane, sum[i]);
    D low, high;
    widen(squares[0] + squares[1], &low, &high);
    low_sum += low;
    high_sum += high;
  }
  sums->square += horizontal(low_sum + high_sum);
}

// Rows [row, row + count) of one tile of any size in fp32, with scale and inner products.
inline void add_places(float* acc, const float* g, const TilePlan& plan, int row, int count, const SketchShape& shape,
                       const TileExtras& extras, Sums* sums) {
  for (int i = 0; i < count * shape.lanes; ++i) {
    const int lane = i % shape.lanes, place = (row * shape.lanes + i) ^ plan.mask;
    float x = g[place];
    for (int d = 0; d < 2; ++d) {
      if (extras.dots[d] != nullptr) sums->dot[d] += static_cast<double>(x) * extras.dots[d][place];
    }
    if (extras.scale != nullptr) x *= extras.scale[place];
    sums->square += static_cast<double>(x) * x;
    acc[i] += (plan.words[lane] >> (row + i / shape.lanes)) & 1u ? -x : x;
  }
}

}  // namespace
}  // namespace lldfast
