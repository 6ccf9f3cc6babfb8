// What walks over tokens and vocabulary share, from hidden states and heads to blocks of logits (block.h) and from
// their gradient back, for any engine (fma_engine.h, amx_engine.h).
#pragma once

#include "cpu/common/block.h"
#include "cpu/common/parallel.h"

namespace lldfast {
namespace {

// Splits of the vocabulary, whose statistics are combined in their order: a token's value must not depend on how many
// threads or tokens there are, so the splits depend on nothing.
constexpr int64_t kSplitRows = 8192;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t at_most(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Statistics per token: threads take groups of token blocks, whose packed hidden states stay in the second cache while
// the vocabulary passes.
struct TokenGroups {
  int64_t blocks, group, groups, splits, ranges, slots, threads;

  // fitting: packed blocks that the second cache holds.
  TokenGroups(int64_t tokens, int64_t vocab, int most_threads, int64_t fitting, int64_t split_rows = kSplitRows)
      : blocks(ceil_div(tokens, kBlock)), splits(ceil_div(vocab, split_rows)) {
    const int64_t most = fitting < 4 ? 4 : fitting > 32 ? 32 : fitting;
    groups = ceil_div(blocks, at_most(most, ceil_div(blocks, most_threads)));
    group = ceil_div(blocks, groups);
    // Few tokens: the threads share the splits of a group too.
    ranges = groups >= 2 * most_threads || most_threads == 1 ? 1 : at_most(splits, ceil_div(2 * most_threads, groups));
    threads = at_most(most_threads, groups * ranges);
    slots = ranges == 1 ? threads : groups;
  }
};

// All tokens of one head, packed, and a chunk of its vocabulary.
template <class Engine>
struct PackedHead {
  static constexpr int64_t kChunkRows = Engine::kChunkRows;
  static constexpr int64_t kPanels = kChunkRows / kPanel;

  const Engine& engine;
  const Matrix &hidden, &weight;
  const int64_t* const rows;
  const int64_t tokens, vocab;
  Buffer packed, panels;

  PackedHead(const Engine& e, const Matrix& h, const Matrix& w, const int64_t* kept, int64_t n, int64_t v)
      : engine(e),
        hidden(h),
        weight(w),
        rows(kept),
        tokens(n),
        vocab(v),
        packed(static_cast<size_t>(ceil_div(n, kBlock) * e.block_bytes())),
        panels(static_cast<size_t>(kPanels * e.panel_bytes())) {}

  // Leaves the block's rows in `staged`.
  void pack_tokens(uint8_t* staged, int64_t block) const {
    const int64_t t = block * kBlock;
    engine.stage_tokens(staged, hidden, rows, t, at_most(kBlock, tokens - t));
    engine.pack_tokens(packed.bytes() + block * engine.block_bytes(), staged);
  }

  // Panel p of the chunk from row v on, while the one that this thread packs next is fetched; returns where it is.
  const uint8_t* pack_panel(int64_t v, int64_t p, int threads) const {
    const int64_t rows_left = at_most(kChunkRows, vocab - v), first = v + p * kPanel;
    const int64_t next = first + threads * kPanel, left = v + rows_left - next;
    uint8_t* to = panels.bytes() + p * engine.panel_bytes();
    engine.pack_panel(to, weight, first, at_most(kPanel, v + rows_left - first),
                      Prefetcher(weight, next, left < 0 ? 0 : at_most(kPanel, left), engine.width, engine.k_steps()));
    return to;
  }

  // z^T of panel p for n blocks of tokens.
  template <class Epilogue>
  void multiply(int64_t p, int64_t block, int64_t n, float* z, Epilogue* epilogue) const {
    Engine::multiply(engine.packed_panel(panels.bytes() + p * engine.panel_bytes()), engine.k_steps(),
                     packed.bytes() + block * engine.block_bytes(), engine.block_bytes(), n, z, kTile, false, epilogue,
                     Prefetcher());
  }
};

// The gradient's products: dH^T += W^T dz by threads over tokens, and dW = dz^T H by threads over vocabulary rows, for
// chunks of the vocabulary outside and chunks of tokens inside. Every sum runs in the order of tokens or of vocabulary
// rows, so gradients do not depend on the number of threads.
template <class Engine>
struct GradientProducts {
  static constexpr int64_t kChunkRows = Engine::kChunkRows;
  static constexpr int64_t kPanels = kChunkRows / kPanel;

  const Engine& engine;
  const int threads;
  const bool need_dh, need_dw;
  const int64_t blocks, chunk_blocks, columns;  // blocks of tokens in all, and in a chunk; blocks of 32 columns
  Buffer column_blocks, dh, transposed, dw, by_row, by_block;

  static int64_t blocks_of_chunk(int64_t blocks, int threads) {
    return at_most(blocks, at_most(8192, threads <= 2 ? 512 : 256 * threads) / kBlock);
  }

  GradientProducts(const Engine& e, int64_t tokens, int n_threads, bool for_dh, bool for_dw)
      : engine(e),
        threads(n_threads),
        need_dh(for_dh),
        need_dw(for_dw),
        blocks(ceil_div(tokens, kBlock)),
        chunk_blocks(blocks_of_chunk(blocks, threads)),
        columns(e.padded / kBlock),
        column_blocks(static_cast<size_t>(need_dw ? e.columns_bytes(blocks) : 0)),
        dh(static_cast<size_t>(need_dh ? blocks * columns * kTile * 4 : 0)),
        transposed(static_cast<size_t>(need_dh ? e.transposed_bytes() : 0)),
        dw(static_cast<size_t>(need_dw ? (chunk_blocks == blocks ? threads : kPanels) * columns * kTile * 4 : 0)),
        by_row(static_cast<size_t>(Engine::by_row_bytes(chunk_blocks))),
        by_block(static_cast<size_t>(Engine::by_block_bytes(chunk_blocks))) {}

  // Where a chunk's dz goes.
  typename Engine::Gradient gradient() const {
    return {reinterpret_cast<decltype(Engine::Gradient::by_row)>(by_row.bytes()),
            reinterpret_cast<decltype(Engine::Gradient::by_block)>(by_block.bytes()), chunk_blocks * kBlock};
  }

  // Steps of K that n blocks of tokens, or of vocabulary rows, make.
  static int64_t steps(int64_t n) { return n * kBlock / Engine::kStep; }

  void pack_tokens(const uint8_t* staged, int64_t block) const {
    if (need_dw) engine.pack_columns(column_blocks.bytes(), staged, block, blocks);
  }

  void pack_panel(const uint8_t* packed_panel, int64_t p) const {
    if (need_dh) engine.pack_transposed(transposed.bytes(), packed_panel, p);
  }

  // For blocks [begin, end) of the chunk of tokens that begins with block `first`.
  void add_dh(const uint8_t* panels, int64_t n_panels, int64_t first, int64_t begin, int64_t end,
              bool accumulate) const {
    if (!need_dh) return;
    for (int64_t j = 0; j < columns; ++j) {
      Engine::multiply(engine.transposed_panel(panels, transposed.bytes(), j), steps(n_panels),
                       Engine::gradient_block(gradient(), begin), Engine::gradient_stride(), end - begin,
                       dh.floats() + ((first + begin) * columns + j) * kTile, columns * kTile, accumulate,
                       static_cast<NoEpilogue*>(nullptr), Prefetcher());
    }
  }

  // Panel p's rows of dW from the chunk's n blocks of tokens; returns the sums so far, for dw_row.
  const float* add_dw(int64_t p, int thread, int64_t first, int64_t n) const {
    if (!need_dw) return nullptr;
    // Sums that another chunk of tokens goes on with need a place for each panel.
    float* sums = dw.floats() + (chunk_blocks == blocks ? thread : p) * columns * kTile;
    Engine::multiply(Engine::gradient_panel(gradient(), p * kPanel), steps(n),
                     Engine::columns_at(column_blocks.bytes(), first), engine.columns_stride(blocks), columns, sums,
                     kTile, first > 0, static_cast<NoEpilogue*>(nullptr), Prefetcher());
    return sums;
  }

  void dw_row(float* to, const float* sums, int64_t r) const {
    for (int64_t j = 0; j < columns; ++j) std::memcpy(to + j * kBlock, sums + r * kBlock + j * kTile, kBlock * 4);
  }

  void dh_row(float* to, int64_t t) const {
    const float* from = dh.floats() + t / kBlock * columns * kTile + t % kBlock;
    for (int64_t k = 0; k < engine.width; ++k) to[k] = from[k / kBlock * kTile + k % kBlock * kBlock];
  }
};

}  // namespace
}  // namespace lldfast
