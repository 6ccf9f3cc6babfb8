#include <immintrin.h>

#include "cpu/tokens/xxh3.h"

namespace lldfast {
namespace {

__m256i load(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// acc[i ^ 1] += value[i]; acc[i] += low32(keyed[i]) * high32(keyed[i])
__m256i mix(__m256i acc, __m256i value, __m256i secret) {
  const __m256i keyed = _mm256_xor_si256(value, secret);
  const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
  const __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
  return _mm256_add_epi64(acc, _mm256_add_epi64(product, swapped));
}

__m256i scramble(__m256i acc, __m256i secret) {
  const __m256i prime = _mm256_set1_epi32(static_cast<int>(kPrime32_1));
  const __m256i mixed = _mm256_xor_si256(_mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47)), secret);
  const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
  return _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
}

}  // namespace

void xxh3_blocks_avx2(uint64_t* acc, const uint8_t* data, size_t blocks, const uint8_t* secret) {
  __m256i a = load(reinterpret_cast<uint8_t*>(acc)), b = load(reinterpret_cast<uint8_t*>(acc + 4));
  for (size_t block = 0; block < blocks; ++block) {
    for (size_t i = 0; i < kStripesPerBlock; ++i, data += kStripe) {
      a = mix(a, load(data), load(secret + 8 * i));
      b = mix(b, load(data + 32), load(secret + 8 * i + 32));
    }
    a = scramble(a, load(secret + 128));
    b = scramble(b, load(secret + 160));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc), a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + 4), b);
}

}  // namespace lldfast
