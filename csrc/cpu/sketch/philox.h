// Philox4x32-10 (Random123), one counter at a time and as many as a vector holds; lldfast/ops/sketch/philox.py is the
// reference.
#pragma once

#include "cpu/common/vec.h"

namespace lldfast {
namespace {

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57, kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

struct Words {
  uint32_t w[4];
};

inline Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0, p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

typedef uint64_t U64 __attribute__((vector_size(LLDFAST_VEC_BYTES)));

// Products of the low words with m.
LLDFAST_INLINE U64 multiply(U64 x, U64 m) {
#if defined(__AVX512F__)
  return reinterpret_cast<U64>(_mm512_mul_epu32(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(m)));
#elif defined(__AVX2__)
  return reinterpret_cast<U64>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(m)));
#else
  return (x & 0xffffffff) * (m & 0xffffffff);
#endif
}

// Words of kWidth counters (first + i, second, third, fourth): word e of counter i goes to words[4 i + e]. A counter's
// words are the low halves of 64-bit lanes, whose high halves may hold anything, so that products stay where they are.
LLDFAST_INLINE void philox_vector(uint32_t first, uint32_t second, uint32_t third, uint32_t fourth, uint64_t seed,
                                  uint32_t* words) {
  constexpr int kLanes64 = kWidth / 2;
  U64 counters = U64{}, even = U64{};
  for (int i = 0; i < kLanes64; ++i) {
    counters[i] = first + i / 2 + i % 2 * (kLanes64 / 2);  // interleaved, to be in order at the end
    even[i] = i / 2 * 2 + i % 2 * kLanes64;
  }
  const U64 odd = even + 1;
  U64 c0[2] = {counters, counters + kLanes64}, c1[2], c2[2], c3[2];
  for (int half = 0; half < 2; ++half) {
    c1[half] = second - U64{};
    c2[half] = third - U64{};
    c3[half] = fourth - U64{};
  }
  U64 k0 = (seed & 0xffffffff) - U64{}, k1 = (seed >> 32) - U64{};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int half = 0; half < 2; ++half) {
      const U64 p0 = multiply(c0[half], kPhiloxM0 - U64{}), p1 = multiply(c2[half], kPhiloxM1 - U64{});
      c0[half] = p1 >> 32 ^ (c1[half] ^ k0);
      c1[half] = p1;
      c2[half] = p0 >> 32 ^ (c3[half] ^ k1);
      c3[half] = p0;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  for (int half = 0; half < 2; ++half) {
    const U64 low = (c0[half] & 0xffffffff) | c1[half] << 32, high = (c2[half] & 0xffffffff) | c3[half] << 32;
    const U64 front = __builtin_shuffle(low, high, even), back = __builtin_shuffle(low, high, odd);
    std::memcpy(words + 2 * kWidth * half, &front, sizeof front);
    std::memcpy(words + 2 * kWidth * half + kWidth, &back, sizeof back);
  }
}

}  // namespace
}  // namespace lldfast
