// Philox4x32-10 (Random123), one counter at a time and as many as a vector holds; lldfast/ops/philox.py is the reference.
#pragma once

#include "cpu/vec.h"

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

// High and low words of x * m, lane by lane.
LLDFAST_INLINE void multiply(U x, uint32_t m, U* high, U* low) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(m)), v = reinterpret_cast<__m512i>(x);
  const __m512i even = _mm512_mul_epu32(v, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), factor);
  *high = reinterpret_cast<U>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
  *low = reinterpret_cast<U>(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(m)), v = reinterpret_cast<__m256i>(x);
  const __m256i even = _mm256_mul_epu32(v, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), factor);
  *high = reinterpret_cast<U>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
  *low = reinterpret_cast<U>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
#else
  for (int i = 0; i < kWidth; ++i) {
    const uint64_t p = static_cast<uint64_t>(x[i]) * m;
    (*high)[i] = static_cast<uint32_t>(p >> 32);
    (*low)[i] = static_cast<uint32_t>(p);
  }
#endif
}

// Four words for each of kWidth counters, counter after counter.
LLDFAST_INLINE void store_by_counter(U w0, U w1, U w2, U w3, uint32_t* words) {
#if defined(__AVX2__)
  U quads[4];  // counter i and every fourth one after it, in parts of 128 bits
#if defined(__AVX512F__)
  const __m512i a = reinterpret_cast<__m512i>(w0), b = reinterpret_cast<__m512i>(w1);
  const __m512i c = reinterpret_cast<__m512i>(w2), d = reinterpret_cast<__m512i>(w3);
  const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
  const __m512i ab_high = _mm512_unpackhi_epi32(a, b), cd_high = _mm512_unpackhi_epi32(c, d);
  quads[0] = reinterpret_cast<U>(_mm512_unpacklo_epi64(ab, cd));
  quads[1] = reinterpret_cast<U>(_mm512_unpackhi_epi64(ab, cd));
  quads[2] = reinterpret_cast<U>(_mm512_unpacklo_epi64(ab_high, cd_high));
  quads[3] = reinterpret_cast<U>(_mm512_unpackhi_epi64(ab_high, cd_high));
#else
  const __m256i a = reinterpret_cast<__m256i>(w0), b = reinterpret_cast<__m256i>(w1);
  const __m256i c = reinterpret_cast<__m256i>(w2), d = reinterpret_cast<__m256i>(w3);
  const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
  const __m256i ab_high = _mm256_unpackhi_epi32(a, b), cd_high = _mm256_unpackhi_epi32(c, d);
  quads[0] = reinterpret_cast<U>(_mm256_unpacklo_epi64(ab, cd));
  quads[1] = reinterpret_cast<U>(_mm256_unpackhi_epi64(ab, cd));
  quads[2] = reinterpret_cast<U>(_mm256_unpacklo_epi64(ab_high, cd_high));
  quads[3] = reinterpret_cast<U>(_mm256_unpackhi_epi64(ab_high, cd_high));
#endif
  const char* from = reinterpret_cast<const char*>(quads);
  for (int part = 0; part < kWidth / 4; ++part) {
    for (int i = 0; i < 4; ++i) std::memcpy(words + 16 * part + 4 * i, from + sizeof(U) * i + 16 * part, 16);
  }
#else
  for (int i = 0; i < kWidth; ++i) {
    words[4 * i] = w0[i];
    words[4 * i + 1] = w1[i];
    words[4 * i + 2] = w2[i];
    words[4 * i + 3] = w3[i];
  }
#endif
}

// Words of kWidth counters (c0 + lane, c1, c2, c3): word e of lane i goes to words[4 i + e].
LLDFAST_INLINE void philox_vector(uint32_t first, uint32_t second, uint32_t third, uint32_t fourth, uint64_t seed,
                                  uint32_t* words) {
  U c0 = first - U{}, c1 = second - U{}, c2 = third - U{}, c3 = fourth - U{};
  for (int i = 0; i < kWidth; ++i) c0[i] += static_cast<uint32_t>(i);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    U high0, low0, high1, low1;
    multiply(c0, kPhiloxM0, &high0, &low0);
    multiply(c2, kPhiloxM1, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  store_by_counter(c0, c1, c2, c3, words);
}

}  // namespace
}  // namespace lldfast
