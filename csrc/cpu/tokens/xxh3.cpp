#include "cpu/tokens/xxh3.h"

#include <cstring>

#include "dispatch.h"

namespace lldfast {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "shards and checksums are little-endian");

constexpr uint64_t kPrime32_2 = 0x85EBCA77u, kPrime32_3 = 0xC2B2AE3Du;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87u, kPrime64_2 = 0xC2B2AE3D27D4EB4Fu, kPrime64_3 = 0x165667B19E3779F9u,
                   kPrime64_4 = 0x85EBCA77C2B2AE63u, kPrime64_5 = 0x27D4EB2F165667C5u;
constexpr uint64_t kMix1 = 0x165667919E3779F9u, kMix2 = 0x9FB21C651E98DF25u;
constexpr size_t kSecretSize = 192;

constexpr uint8_t kSecret[kSecretSize] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4,
    0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e,
    0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43,
    0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19,
    0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7,
    0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78,
    0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16,
    0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};
static_assert(kSecret[kSecretSize - 1] != 0, "a byte of the secret is missing");

uint64_t read64(const uint8_t* p) {
  uint64_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

uint64_t read32(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

uint64_t rotate(uint64_t x, int by) {
  return (x << by) | (x >> (64 - by));
}

// The 128-bit product, its halves xored.
uint64_t fold(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t avalanche(uint64_t h) {
  h = (h ^ (h >> 37)) * kMix1;
  return h ^ (h >> 32);
}

uint64_t avalanche_xxh64(uint64_t h) {
  h = (h ^ (h >> 33)) * kPrime64_2;
  h = (h ^ (h >> 29)) * kPrime64_3;
  return h ^ (h >> 32);
}

uint64_t mix16(const uint8_t* data, const uint8_t* secret) {
  return fold(read64(data) ^ read64(secret), read64(data + 8) ^ read64(secret + 8));
}

uint64_t hash_up_to_16(const uint8_t* data, size_t size) {
  if (size == 0) return avalanche_xxh64(read64(kSecret + 56) ^ read64(kSecret + 64));
  if (size < 4) {
    const uint64_t combined = data[size - 1] | (static_cast<uint64_t>(size) << 8) |
                              (static_cast<uint64_t>(data[0]) << 16) | (static_cast<uint64_t>(data[size / 2]) << 24);
    return avalanche_xxh64(combined ^ read32(kSecret) ^ read32(kSecret + 4));
  }
  if (size <= 8) {
    const uint64_t combined = read32(data + size - 4) + (read32(data) << 32);
    uint64_t h = combined ^ read64(kSecret + 8) ^ read64(kSecret + 16);
    h = (h ^ rotate(h, 49) ^ rotate(h, 24)) * kMix2;
    h = (h ^ ((h >> 35) + size)) * kMix2;
    return h ^ (h >> 28);
  }
  const uint64_t low = read64(data) ^ read64(kSecret + 24) ^ read64(kSecret + 32);
  const uint64_t high = read64(data + size - 8) ^ read64(kSecret + 40) ^ read64(kSecret + 48);
  return avalanche(size + __builtin_bswap64(low) + high + fold(low, high));
}

// 17 to 128 bytes: pairs of 16 bytes from both ends inwards.
uint64_t hash_up_to_128(const uint8_t* data, size_t size) {
  uint64_t h = size * kPrime64_1;
  const size_t pairs = (size - 1) / 32 + 1;
  for (size_t i = pairs; i-- > 0;) {
    h += mix16(data + 16 * i, kSecret + 32 * i);
    h += mix16(data + size - 16 * (i + 1), kSecret + 32 * i + 16);
  }
  return avalanche(h);
}

uint64_t hash_up_to_240(const uint8_t* data, size_t size) {
  uint64_t h = size * kPrime64_1;
  for (size_t i = 0; i < 8; ++i) h += mix16(data + 16 * i, kSecret + 16 * i);
  h = avalanche(h);
  for (size_t i = 8; i < size / 16; ++i) h += mix16(data + 16 * i, kSecret + 16 * (i - 8) + 3);
  h += mix16(data + size - 16, kSecret + 119);
  return avalanche(h);
}

void accumulate(uint64_t* acc, const uint8_t* data, const uint8_t* secret) {
  for (size_t i = 0; i < 8; ++i) {
    const uint64_t value = read64(data + 8 * i);
    const uint64_t keyed = value ^ read64(secret + 8 * i);
    acc[i ^ 1] += value;
    acc[i] += (keyed & 0xffffffffu) * (keyed >> 32);
  }
}

XxhBlocks choose_blocks() {
#if defined(__x86_64__)
  // AVX-512 was no faster: reading the data is the limit.
  if (active_isa() >= Isa::kAvx2) return xxh3_blocks_avx2;
#endif
  return xxh3_blocks_scalar;
}

uint64_t hash_long(const uint8_t* data, size_t size) {
  static const XxhBlocks mix_blocks = choose_blocks();
  uint64_t acc[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3, kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
  constexpr size_t kBlock = kStripe * kStripesPerBlock;
  const size_t blocks = (size - 1) / kBlock;  // the last block, whole or not, is never scrambled
  mix_blocks(acc, data, blocks, kSecret);
  const uint8_t* rest = data + blocks * kBlock;
  const size_t stripes = (size - 1 - blocks * kBlock) / kStripe;
  for (size_t i = 0; i < stripes; ++i) accumulate(acc, rest + kStripe * i, kSecret + 8 * i);
  accumulate(acc, data + size - kStripe, kSecret + kSecretSize - kStripe - 7);

  uint64_t h = size * kPrime64_1;
  for (size_t i = 0; i < 4; ++i) {
    h += fold(acc[2 * i] ^ read64(kSecret + 11 + 16 * i), acc[2 * i + 1] ^ read64(kSecret + 19 + 16 * i));
  }
  return avalanche(h);
}

}  // namespace

void xxh3_blocks_scalar(uint64_t* acc, const uint8_t* data, size_t blocks, const uint8_t* secret) {
  const uint8_t* scramble = secret + kSecretSize - kStripe;
  for (size_t block = 0; block < blocks; ++block) {
    for (size_t i = 0; i < kStripesPerBlock; ++i, data += kStripe) accumulate(acc, data, secret + 8 * i);
    for (size_t i = 0; i < 8; ++i) {
      acc[i] = (acc[i] ^ (acc[i] >> 47) ^ read64(scramble + 8 * i)) * kPrime32_1;
    }
  }
}

uint64_t xxh3_64(const uint8_t* data, size_t size) {
  if (size <= 16) return hash_up_to_16(data, size);
  if (size <= 128) return hash_up_to_128(data, size);
  if (size <= 240) return hash_up_to_240(data, size);
  return hash_long(data, size);
}

}  // namespace lldfast
