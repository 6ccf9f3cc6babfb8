// One tile of the flat space into its tile of the sketch, for the vectors of the including file.
#pragma once

#include "cpu/sketch/philox.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace lldfast {
namespace {

typedef double D __attribute__((vector_size(LLDFAST_VEC_BYTES)));

constexpr int kTile = 4096;  // places of a tile, fewer where k is smaller
constexpr int kLanes = 128;  // places of a row, whose signs are bits of 128 words
constexpr int kStreams = 4;  // tiles fetched at a time, while as many are added
constexpr int kBlock = 32;   // chunks summed in fp32 before their sum goes to the fp64 sketch

// Subnormal numbers count as what they are in every thread, whatever the caller's mode (torch.set_flush_denormal is per
// thread).
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

  static int mask_of(int64_t chunk, int64_t bucket_tile, const SketchShape& shape, uint64_t seed) {
    const uint64_t c = static_cast<uint64_t>(chunk);
    const uint32_t tile = static_cast<uint32_t>(bucket_tile);
    const Words of_tile = philox(tile, 1, static_cast<uint32_t>(c), static_cast<uint32_t>(c >> 32), seed);
    return static_cast<int>(of_tile.w[0] & static_cast<uint32_t>(shape.size - 1));
  }
  void make(int64_t chunk, int64_t bucket_tile, const SketchShape& shape, uint64_t seed) {
    make(chunk, bucket_tile, mask_of(chunk, bucket_tile, shape, seed), shape, seed);
  }
  void make(int64_t chunk, int64_t bucket_tile, int mask_of_tile, const SketchShape& shape, uint64_t seed) {
    const uint32_t low = static_cast<uint32_t>(chunk), high = static_cast<uint32_t>(static_cast<uint64_t>(chunk) >> 32);
    const uint32_t tile = static_cast<uint32_t>(bucket_tile);
    mask = mask_of_tile;
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
  LLDFAST_INLINE F operator()(const float* p) const {
    F x = load(p);
#if defined(__AVX2__) && !defined(__AVX512F__)
    // Zen 3 permutes an operand in memory in twice the time of a load and a register, so it must not become one.
    asm("" : "+x"(x));
#endif
    return __builtin_shuffle(x, order);
  }
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
    const F scale = splat(5.192296858534828e33f);  // 2^112, see from_f16
    const U scaled = reinterpret_cast<U>(reinterpret_cast<F>(magnitude) * scale);
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

// Memory that will be read soon, line by line of kStreams streams in turn. Each in order, for the caches' own
// prefetchers to follow; several, since these start anew with every page.
struct Ahead {
  const char* streams[kStreams];
  uint64_t line;  // the next one

  LLDFAST_INLINE void fetch(uint64_t at) const {
    __builtin_prefetch(streams[at % kStreams] + at / kStreams * 64, 0, 2);  // to the second cache
  }
};

// R rows of a tile onto acc, which holds the rows [row, row + R) of bucket places; g is where the R rows that masks
// keep together begin in the source. R divides row. ahead may be null.
//
// Squares are added in fp32, as a tree, before they are widened: |x|^2 comes out to about 1e-8, at a seventh of the
// instructions of fp64. They can overflow or vanish, which fold() sees by the result.
template <int R, typename T>
LLDFAST_INLINE void add_rows(float* acc, const T* g, const TilePlan& plan, const XorLoad<T>& xor_load, int row,
                             Ahead* ahead, D* squares_sum) {
  constexpr uint64_t kLines = R * kWidth * sizeof(T) / 64;  // read in one round
  const T* from[R];
  for (int i = 0; i < R; ++i) from[i] = g + (i ^ (plan.mask / kLanes & (R - 1))) * kLanes;
  const int shift = 32 - R - row;
  const int64_t lane_mask = plan.mask & (kLanes - 1) & ~(kWidth - 1);
  uint64_t line = ahead != nullptr ? ahead->line : 0;
  F total = {};
  for (int64_t lane = 0; lane < kLanes; lane += kWidth) {
    U words;
    std::memcpy(&words, plan.words + lane, sizeof words);
    words <<= shift;  // the last row's bit is the highest
    F squares[2] = {F{}, F{}};
#pragma GCC unroll 8
    for (int i = R - 1; i >= 0; --i) {
      float* to = acc + i * kLanes + lane;
      const F x = xor_load(from[i] + (lane ^ lane_mask));
      squares[i & 1] += x * x;
      store(to, load(to) + reinterpret_cast<F>(reinterpret_cast<U>(x) ^ (words & 0x80000000u)));
      words += words;
    }
    total += squares[0] + squares[1];
    if (ahead != nullptr) {
#pragma GCC unroll 8
      for (uint64_t i = 0; i < kLines; ++i) ahead->fetch(line + i);
      line += kLines;
    }
  }
  if (ahead != nullptr) ahead->line = line;
  D low, high;
  widen(total, &low, &high);
  *squares_sum += low + high;
}

// A tile of fewer than kLanes places, and so of one row.
inline void add_places(float* acc, const float* g, const TilePlan& plan, const SketchShape& shape, D* squares_sum) {
  for (int i = 0; i < shape.size; ++i) {
    const float x = g[i ^ plan.mask];
    (*squares_sum)[0] += static_cast<double>(x) * x;
    acc[i] += plan.words[i] & 1u ? -x : x;
  }
}

}  // namespace
}  // namespace lldfast
