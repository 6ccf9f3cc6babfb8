// XXH3 with 64 bits and seed 0, after the published xxHash specification. Little-endian machines only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lldfast {

// The hash of `size` bytes at `data`; every instruction set gives the same bits.
uint64_t xxh3_64(const uint8_t* data, size_t size);

constexpr size_t kStripe = 64;           // bytes mixed into the eight accumulators at once
constexpr size_t kStripesPerBlock = 16;  // then the accumulators are scrambled
constexpr uint64_t kPrime32_1 = 0x9E3779B1u;

// Mixes `blocks` whole blocks of 1,024 bytes into acc[8], a scramble after each. `secret` has 192 bytes.
using XxhBlocks = void (*)(uint64_t* acc, const uint8_t* data, size_t blocks, const uint8_t* secret);
void xxh3_blocks_scalar(uint64_t* acc, const uint8_t* data, size_t blocks, const uint8_t* secret);
void xxh3_blocks_avx2(uint64_t* acc, const uint8_t* data, size_t blocks, const uint8_t* secret);

}  // namespace lldfast
