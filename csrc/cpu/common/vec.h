// Vectors of fp32, as wide as the instruction set that the including file is compiled for, and exp and tanh on them.
// Everything has internal linkage, so that each of those files keeps its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/common/dtypes.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LLDFAST_VEC_BYTES 64
#elif defined(__AVX2__)
#define LLDFAST_VEC_BYTES 32
#else
#define LLDFAST_VEC_BYTES 16
#endif

// Pieces that must end up in their caller's loop, where they keep their state in registers.
#define LLDFAST_INLINE inline __attribute__((always_inline))

namespace lldfast {
namespace {

constexpr int kWidth = LLDFAST_VEC_BYTES / 4;
typedef float F __attribute__((vector_size(LLDFAST_VEC_BYTES)));
typedef int32_t I __attribute__((vector_size(LLDFAST_VEC_BYTES)));
typedef uint32_t U __attribute__((vector_size(LLDFAST_VEC_BYTES)));

constexpr float kInf = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");
constexpr float kLn2 = 0.693147180559945f;
constexpr float kLog2e = 1.44269504088896f;

LLDFAST_INLINE F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

LLDFAST_INLINE I load(const int32_t* p) {
  I v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

LLDFAST_INLINE void store(float* p, F v) {
  std::memcpy(p, &v, sizeof v);
}
LLDFAST_INLINE void store(int32_t* p, I v) {
  std::memcpy(p, &v, sizeof v);
}
LLDFAST_INLINE F splat(float x) {
  return x - F{};
}
LLDFAST_INLINE I splat(int32_t x) {
  return x - I{};
}
LLDFAST_INLINE F as_floats(I v) {
  return reinterpret_cast<F>(v);
}
LLDFAST_INLINE I as_ints(F v) {
  return reinterpret_cast<I>(v);
}
LLDFAST_INLINE F select(I mask, F a, F b) {
  return mask ? a : b;
}
LLDFAST_INLINE I select(I mask, I a, I b) {
  return mask ? a : b;
}

// x as it is, rounded. Where a product meets a sum, the compiler may fuse them in one of two unrolled copies of a loop
// and not in the other (gcc 13 does): then a value would depend on its lane.
LLDFAST_INLINE F settled(F x) {
#if defined(__x86_64__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#else
  __asm__("" : "+m"(x));
#endif
  return x;
}

// a > b ? a : b, which is b where either is NaN.
LLDFAST_INLINE F max(F a, F b) {
#if defined(__AVX512F__)
  return reinterpret_cast<F>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<F>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

LLDFAST_INLINE bool any(I mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
  for (int i = 0; i < kWidth; ++i) {
    if (mask[i]) return true;
  }
  return false;
#endif
}

// exp(x) for x <= 88, with a relative error of 1e-7 near 0 and |x| 6e-8 elsewhere; exp(0) is exactly 1. Below -87 it
// stays at exp(-87), about 1e-38. NaN stays NaN.
LLDFAST_INLINE F exp(F x) {
  const F t = max(splat(-87.0f), x) * kLog2e;
  const F shifted = t + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are t rounded to an integer
  const F f = t - (shifted - 12582912.0f);
  // 2^f - 1 over f, on [-0.5, 0.5], for the least relative error (2e-9)
  F p = f * 1.53353619e-4f + 1.33988750e-3f;
  p = p * f + 9.61843692e-3f;
  p = p * f + 5.55033237e-2f;
  p = p * f + 2.40226477e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
  return as_floats(as_ints(p) + (as_ints(shifted) << 23));
}

// tanh(x) with an error of a few 1e-8 relative to min(|x|, 1).
LLDFAST_INLINE F tanh(F x) {
  const F size = as_floats(as_ints(x) & 0x7fffffff);
  const F sign = as_floats((as_ints(x) & static_cast<int32_t>(0x80000000)) | 0x3f800000);
  const F square = x * x;
  // Below 0.625 the quotient underneath would lose digits: there the odd series, fitted.
  F p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const F small = x + x * square * p;
  const F bounded = select(size > 10.0f, splat(10.0f), size);  // NaN fails the comparison and stays
  const F large = sign * (1.0f - 2.0f / (exp(2.0f * bounded) + 1.0f));
  return select(size < 0.625f, small, large);
}

// Scalar conversions, written so that loops over them vectorise.
inline float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t to_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

inline float from_f16(uint16_t x) {
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 5.192296858534828e33f;  // 2^112: the difference of the exponents' biases; subnormals come out right too
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits = ((x & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : bits) | static_cast<uint32_t>(x & 0x8000) << 16;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t to_f16(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (bits < 0x38800000) {                       // below 2^-14: adding 0.5 aligns the last bit with f16's smallest step
    float f;
    std::memcpy(&f, &bits, 4);
    f += 0.5f;
    std::memcpy(&bits, &f, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  return sign | static_cast<uint16_t>((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

// n values of any dtype as fp32.
inline void read_floats(float* to, const void* from, DType dtype, int64_t n) {
  const uint16_t* half = static_cast<const uint16_t*>(from);
  switch (dtype) {
    case DType::kF32:
      std::memcpy(to, from, static_cast<size_t>(n) * 4);
      break;
    case DType::kBf16:
      for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(half[i]);
      break;
    case DType::kF16:
      for (int64_t i = 0; i < n; ++i) to[i] = from_f16(half[i]);
      break;
  }
}

inline void write_floats(void* to, DType dtype, const float* from, int64_t n) {
  uint16_t* half = static_cast<uint16_t*>(to);
  switch (dtype) {
    case DType::kF32:
      std::memcpy(to, from, static_cast<size_t>(n) * 4);
      break;
    case DType::kBf16:
      for (int64_t i = 0; i < n; ++i) half[i] = to_bf16(from[i]);
      break;
    case DType::kF16:
      for (int64_t i = 0; i < n; ++i) half[i] = to_f16(from[i]);
      break;
  }
}

}  // namespace
}  // namespace lldfast
