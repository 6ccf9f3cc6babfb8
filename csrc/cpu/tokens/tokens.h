// Batches out of memory-mapped token shards.
#pragma once

#include <cstdint>

namespace lldfast {

// One domain's tokens: `size` little-endian integers of 2 or 4 bytes.
struct Shard {
  const void* data;
  int64_t size;
};

// The first token at or above the vocabulary: its row, its position in the shard, its id. row < 0: there is none.
struct BadToken {
  int64_t row;
  int64_t position;
  int64_t token;
};

// For each of `rows` windows: x[row, t] = tokens[start + t] and y[row, t] = tokens[start + t + 1], t < length, out of
// shards[domain[row]] read as a ring (a shard begins and ends at a document boundary). itemsize is 2 or 4.
// The caller has checked 0 <= domain < number of shards, 0 <= start < size and length < size.
BadToken gather(const Shard* shards, int itemsize, int64_t vocab_size, const int64_t* domain, const int64_t* start,
                int64_t rows, int64_t length, int64_t* x, int64_t* y);

}  // namespace lldfast
