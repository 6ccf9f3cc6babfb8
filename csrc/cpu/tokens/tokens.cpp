#include "cpu/tokens/tokens.h"

#include <algorithm>

namespace lldfast {
namespace {

// Widens `count` tokens to out and returns the largest, so that the check costs no second pass.
template <typename Token>
int64_t widen(const Token* tokens, int64_t count, int64_t* out) {
  Token largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, tokens[i]);
    out[i] = tokens[i];
  }
  return largest;
}

template <typename Token>
BadToken gather_as(const Shard* shards, int64_t vocab_size, const int64_t* domain, const int64_t* start, int64_t rows,
                   int64_t length, int64_t* x, int64_t* y) {
  for (int64_t row = 0; row < rows; ++row, x += length, y += length) {
    const Token* tokens = static_cast<const Token*>(shards[domain[row]].data);
    const int64_t size = shards[domain[row]].size;
    const int64_t first = std::min(length, size - start[row]);  // the rest continues at the ring's beginning
    int64_t largest = widen(tokens + start[row], first, x);
    largest = std::max(largest, widen(tokens, length - first, x + first));
    std::copy(x + 1, x + length, y);
    y[length - 1] = tokens[(start[row] + length) % size];
    if (std::max(largest, y[length - 1]) < vocab_size) continue;
    for (int64_t position = start[row];; ++position) {
      if (tokens[position % size] >= vocab_size) return {row, position % size, tokens[position % size]};
    }
  }
  return {-1, 0, 0};
}

}  // namespace

BadToken gather(const Shard* shards, int itemsize, int64_t vocab_size, const int64_t* domain, const int64_t* start,
                int64_t rows, int64_t length, int64_t* x, int64_t* y) {
  if (itemsize == 2) return gather_as<uint16_t>(shards, vocab_size, domain, start, rows, length, x, y);
  return gather_as<uint32_t>(shards, vocab_size, domain, start, rows, length, x, y);
}

}  // namespace lldfast
