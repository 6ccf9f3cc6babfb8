// The walk over tokens and vocabulary of linear_logprob.h, for any engine (fma_engine.h, amx_engine.h).
#pragma once

#include <cmath>

#include "cpu/parallel.h"
#include "cpu/softmax_block.h"

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

inline int64_t token_row(const LinearLogprobArgs& args, int64_t t) {
  return args.rows == nullptr ? t : args.rows[t];
}

inline int32_t local_label(const LinearLogprobArgs& args, int64_t t) {
  if (t >= args.tokens) return -1;
  const int64_t label = args.labels[token_row(args, t)];
  return label >= 0 && label < args.vocab ? static_cast<int32_t>(label) : -1;
}

// Forward: threads take groups of token blocks, whose packed hidden states stay in the second cache while the
// vocabulary passes.

template <class Engine, bool kArgmax, bool kEntropy>
struct Forward {
  const LinearLogprobArgs& args;
  const LogprobOut& out;
  const Engine engine;
  int64_t blocks, group, groups, splits, ranges, slots, threads;
  int64_t worker_bytes = 0;
  Lanes* lanes = nullptr;  // [slots][splits][group]
  uint8_t* scratch = nullptr;
  Counter items;

  Forward(const LinearLogprobArgs& a, const LogprobOut& o) : args(a), out(o), engine(a) {
    blocks = ceil_div(args.tokens, kBlock);
    const int64_t fitting = Engine::kGroupBytes / engine.block_bytes();
    const int64_t most = fitting < 4 ? 4 : fitting > 32 ? 32 : fitting;
    groups = ceil_div(blocks, at_most(most, ceil_div(blocks, args.threads)));
    group = ceil_div(blocks, groups);
    splits = ceil_div(args.vocab, kSplitRows);
    // Few tokens: the threads share the splits of a group too.
    ranges = groups >= 2 * args.threads || args.threads == 1 ? 1 : at_most(splits, ceil_div(2 * args.threads, groups));
    threads = at_most(args.threads, groups * ranges);
    slots = ranges == 1 ? threads : groups;
  }

  void run() {
    const int64_t stage = engine.stage_bytes(), packed = group * engine.block_bytes(), slab = engine.slab_bytes();
    worker_bytes = ceil_div(stage + packed + slab + group * kTile * 4, 4096) * 4096 + 64;
    const Buffer lanes_memory(static_cast<size_t>(slots * splits * group) * sizeof(Lanes));
    const Buffer scratch_memory(static_cast<size_t>(threads * worker_bytes));
    lanes = reinterpret_cast<Lanes*>(lanes_memory.bytes());
    scratch = scratch_memory.bytes();
    run_team(static_cast<int>(threads), [](void* self, int i) { static_cast<Forward*>(self)->work(i); }, this);
    if (ranges > 1) {
      for (int64_t g = 0; g < groups; ++g) finish(g, g);
    }
  }

  void work(int thread) {
    const typename Engine::Session session;
    (void)session;
    uint8_t* staged = scratch + thread * worker_bytes;
    uint8_t* packed = staged + engine.stage_bytes();
    uint8_t* slab = packed + group * engine.block_bytes();
    float* z = reinterpret_cast<float*>(slab + engine.slab_bytes());
    const int64_t steps = engine.k_steps();
    int64_t packed_group = -1;
    for (int64_t item = items.next(); item < groups * ranges; item = items.next()) {
      const int64_t g = item / ranges, range = item % ranges;
      const int64_t first = g * group, n = at_most(group, blocks - first);
      if (g != packed_group) {
        for (int64_t b = 0; b < n; ++b) {
          const int64_t t = (first + b) * kBlock;
          engine.stage_tokens(staged, args.hidden, args.rows, t, at_most(kBlock, args.tokens - t));
          engine.pack_tokens(packed + b * engine.block_bytes(), staged);
        }
        packed_group = g;
      }
      const int64_t slot = ranges == 1 ? thread : g;
      for (int64_t s = splits * range / ranges; s < splits * (range + 1) / ranges; ++s) {
        Lanes* state = lanes + (slot * splits + s) * group;
        for (int64_t b = 0; b < n; ++b) {
          reset(state[b]);
          for (int i = 0; i < kBlock; ++i) state[b].label[i] = local_label(args, (first + b) * kBlock + i);
        }
        StatsEpilogue<kArgmax, kEntropy> epilogue{args, z, state};
        const int64_t end = at_most((s + 1) * kSplitRows, args.vocab);
        for (int64_t v = s * kSplitRows; v < end; v += kPanel) {
          const int64_t rows = at_most(kPanel, end - v), left = end - v - rows;
          const Prefetcher next_panel(args.weight, v + rows, at_most(kPanel, left), args.width,
                                      Engine::advances(steps, n));
          epilogue.panel(v, static_cast<int>(rows));
          Engine::multiply(engine.weight_panel(args.weight, v, rows, slab), steps, packed, engine.block_bytes(), n, z,
                           kTile, false, &epilogue, next_panel);
        }
      }
      if (ranges == 1) finish(g, thread);
    }
  }

  void finish(int64_t g, int64_t slot) {
    const int64_t first = g * group * kBlock, n = at_most(group * kBlock, args.tokens - first);
    for (int64_t t = 0; t < n; ++t) {
      Total total;
      for (int64_t s = 0; s < splits; ++s)
        total.add(lanes[(slot * splits + s) * group + t / kBlock], static_cast<int>(t % kBlock));
      const double log_sum = std::isinf(total.max) && !std::isnan(total.sum) ? 0.0 : std::log(total.sum);
      const int64_t row = token_row(args, first + t);
      out.lse[row] = static_cast<float>(total.max + log_sum);
      out.logprob[row] = static_cast<float>((total.z_label - total.max) - log_sum);
      if (kArgmax) {
        out.argmax[row] = total.best;
        out.top[row] = static_cast<float>(total.max);
      }
      if (kEntropy)
        out.entropy[row] = std::isinf(total.max) ? kNaN : static_cast<float>(log_sum - total.moment / total.sum);
    }
  }
};

template <class Engine>
void forward(const LinearLogprobArgs& args, const LogprobOut& out) {
  const bool argmax = out.argmax != nullptr, entropy = out.entropy != nullptr;
  if (argmax && entropy) {
    Forward<Engine, true, true>(args, out).run();
  } else if (argmax) {
    Forward<Engine, true, false>(args, out).run();
  } else if (entropy) {
    Forward<Engine, false, true>(args, out).run();
  } else {
    Forward<Engine, false, false>(args, out).run();
  }
}

// Backward: chunks of the vocabulary outside, chunks of tokens inside. For each pair the logits are computed again and
// dz is kept in the two layouts that the products want; then dH^T += W^T dz by threads over tokens, and dW = dz^T H by
// threads over vocabulary rows. Every sum runs in the order of tokens or of vocabulary rows, so gradients do not depend
// on the number of threads.

template <class Engine>
struct Backward {
  static constexpr int64_t kChunkRows = Engine::kChunkRows;
  static constexpr int64_t kPanels = kChunkRows / kPanel;

  const LinearLogprobArgs& args;
  const LinearLogprobGrad& grad;
  const Engine engine;
  const int64_t blocks, chunk_blocks, columns;  // blocks of tokens in all, and in a chunk; blocks of 32 columns
  const int threads;
  const bool need_dh, need_dw;
  Barrier barrier;
  Buffer packed, column_blocks, dh, panels, transposed, dw, by_row, by_block, lanes, bias_part, scratch, label_order;
  int64_t worker_bytes;

  // Per token, in the order of `rows`.
  int32_t* label;
  float *lse, *of_label, *coefficient, *label_grad;

  static int64_t tokens_of_chunk(int threads) { return at_most(8192, threads <= 2 ? 512 : 256 * threads); }

  Backward(const LinearLogprobArgs& a, const LinearLogprobGrad& d)
      : args(a),
        grad(d),
        engine(a),
        blocks(ceil_div(a.tokens, kBlock)),
        chunk_blocks(at_most(blocks, tokens_of_chunk(a.threads) / kBlock)),
        columns(engine.padded / kBlock),
        threads(a.threads),
        need_dh(d.dh.data != nullptr),
        need_dw(d.dw.data != nullptr),
        barrier(a.threads),
        packed(static_cast<size_t>(blocks * engine.block_bytes())),
        column_blocks(static_cast<size_t>(need_dw ? engine.columns_bytes(blocks) : 0)),
        dh(static_cast<size_t>(need_dh ? blocks * columns * kTile * 4 : 0)),
        panels(static_cast<size_t>(kPanels * engine.panel_bytes())),
        transposed(static_cast<size_t>(need_dh ? engine.transposed_bytes() : 0)),
        dw(static_cast<size_t>(need_dw ? (chunk_blocks == blocks ? threads : kPanels) * columns * kTile * 4 : 0)),
        by_row(static_cast<size_t>(Engine::by_row_bytes(chunk_blocks))),
        by_block(static_cast<size_t>(Engine::by_block_bytes(chunk_blocks))),
        lanes(static_cast<size_t>(blocks * kBlock) * 5 * 4),
        bias_part(static_cast<size_t>(d.dbias == nullptr ? 0 : blocks * kChunkRows * 4)),
        scratch(static_cast<size_t>(threads) * worker(engine, blocks, threads)),
        label_order(static_cast<size_t>(blocks * kBlock) * 8),
        worker_bytes(worker(engine, blocks, threads)) {
    float* p = lanes.floats();
    const int64_t n = blocks * kBlock;
    label = reinterpret_cast<int32_t*>(p);
    lse = p + n;
    of_label = p + 2 * n;
    coefficient = p + 3 * n;
    label_grad = p + 4 * n;
    for (int64_t t = 0; t < n; ++t) {
      const bool real = t < args.tokens;
      const int64_t row = real ? token_row(args, t) : 0;
      label[t] = local_label(args, t);
      lse[t] = real ? grad.lse[row] : kInf;  // no token: its probabilities are 0, whatever the bias
      const float logprob = real ? grad.logprob[row] : 0.0f;
      of_label[t] = real ? grad.h[row] * ::expf(logprob) - grad.g[row] * ::expm1f(logprob) : 0.0f;
      coefficient[t] = real ? grad.h[row] - grad.g[row] : 0.0f;
      label_grad[t] = 0.0f;
    }
  }

  // Logits of a thread's blocks of tokens; staged rows.
  static int64_t worker(const Engine& engine, int64_t blocks, int threads) {
    const int64_t z = at_most(blocks, tokens_of_chunk(threads) / kBlock) * kTile * 4;
    const int64_t stage = engine.stage_bytes();
    return ceil_div((z > stage ? z : stage) + 2 * engine.padded * 4, 4096) * 4096 + 64;
  }

  void run() {
    order_labels();
    run_team(threads, [](void* self, int i) { static_cast<Backward*>(self)->work(i); }, this);
  }

  // Tokens by label: a chain per chunk of the vocabulary would do, but labels of one row must come in the order of
  // tokens.
  void order_labels() {
    int64_t* order = reinterpret_cast<int64_t*>(label_order.bytes());
    for (int64_t t = 0; t < blocks * kBlock; ++t) order[t] = static_cast<int64_t>(label[t]) * (int64_t{1} << 32) + t;
    sort(order, args.tokens);
  }

  static void sift(int64_t* x, int64_t root, int64_t n) {
    for (int64_t child = 2 * root + 1; child < n; root = child, child = 2 * root + 1) {
      if (child + 1 < n && x[child + 1] > x[child]) ++child;
      if (x[root] >= x[child]) return;
      const int64_t held = x[root];
      x[root] = x[child];
      x[child] = held;
    }
  }

  // Heap sort, in this file because std::sort would leave a copy of itself for the whole program (parallel.h).
  static void sort(int64_t* x, int64_t n) {
    for (int64_t i = n / 2 - 1; i >= 0; --i) sift(x, i, n);
    for (int64_t i = n - 1; i > 0; --i) {
      const int64_t held = x[0];
      x[0] = x[i];
      x[i] = held;
      sift(x, 0, i);
    }
  }

  void work(int thread) {
    const typename Engine::Session session;
    (void)session;
    uint8_t* own = scratch.bytes() + thread * worker_bytes;
    pack_hidden(own, thread);
    pack_chunk(0, thread);
    barrier.wait();
    int64_t next_label = 0;
    for (int64_t v = 0; v < args.vocab; v += kChunkRows) {
      const int64_t rows = at_most(kChunkRows, args.vocab - v), n_panels = ceil_div(rows, kPanel);
      for (int64_t first = 0; first < blocks; first += chunk_blocks) {
        const int64_t n = at_most(chunk_blocks, blocks - first);
        const typename Engine::Gradient gradient = {
            reinterpret_cast<decltype(Engine::Gradient::by_row)>(by_row.bytes()),
            reinterpret_cast<decltype(Engine::Gradient::by_block)>(by_block.bytes()), chunk_blocks * kBlock};
        over_tokens(thread, reinterpret_cast<float*>(own), gradient, v, rows, first, n);
        barrier.wait();
        const bool last = first + n == blocks;
        for (int64_t p = thread; p < n_panels; p += threads) {
          // Sums that another chunk of tokens goes on with need a place for each panel.
          float* sums = dw.floats() + (chunk_blocks == blocks ? thread : p) * columns * kTile;
          if (need_dw) {
            Engine::multiply(Engine::gradient_panel(gradient, p * kPanel), steps(n),
                             Engine::columns_at(column_blocks.bytes(), first), engine.columns_stride(blocks), columns,
                             sums, kTile, first > 0, static_cast<NoEpilogue*>(nullptr), Prefetcher());
          }
          if (last) next_label = finish_rows(sums, reinterpret_cast<float*>(own), v, p * kPanel, next_label);
        }
        if (last && v + kChunkRows < args.vocab) pack_chunk(v + kChunkRows, thread);
        barrier.wait();
      }
    }
    if (need_dh) finish_hidden(thread, reinterpret_cast<float*>(own));
  }

  // Steps of K that n blocks of tokens, or of vocabulary rows, make.
  static int64_t steps(int64_t n) { return n * kBlock / Engine::kStep; }

  void pack_hidden(uint8_t* staged, int thread) {
    for (int64_t b = thread; b < blocks; b += threads) {
      const int64_t t = b * kBlock;
      engine.stage_tokens(staged, args.hidden, args.rows, t, at_most(kBlock, args.tokens - t));
      engine.pack_tokens(packed.bytes() + b * engine.block_bytes(), staged);
      if (need_dw) engine.pack_columns(column_blocks.bytes(), staged, b, blocks);
    }
  }

  void pack_chunk(int64_t v, int thread) {
    const int64_t rows = at_most(kChunkRows, args.vocab - v);
    for (int64_t p = thread; p < ceil_div(rows, kPanel); p += threads) {
      uint8_t* to = panels.bytes() + p * engine.panel_bytes();
      const int64_t first = v + p * kPanel, next = first + threads * kPanel, left = v + rows - next;
      engine.pack_panel(
          to, args.weight, first, at_most(kPanel, v + rows - first),
          Prefetcher(args.weight, next, left < 0 ? 0 : at_most(kPanel, left), args.width, engine.k_steps()));
      if (need_dh) engine.pack_transposed(transposed.bytes(), to, p);
    }
  }

  void over_tokens(int thread, float* z, typename Engine::Gradient gradient, int64_t v, int64_t rows, int64_t first,
                   int64_t n) {
    const int64_t begin = n * thread / threads, end = n * (thread + 1) / threads;
    if (begin == end) return;
    const int64_t at = first * kBlock, n_panels = ceil_div(rows, kPanel);
    GradEpilogue<Engine> epilogue{args,
                                  z,
                                  label + at,
                                  lse + at,
                                  coefficient + at,
                                  of_label + at,
                                  label_grad + at,
                                  grad.dbias == nullptr ? nullptr : bias_part.floats() + first * kChunkRows,
                                  gradient,
                                  begin};
    const uint8_t* tokens = packed.bytes() + (first + begin) * engine.block_bytes();
    for (int64_t p = 0; p < n_panels; ++p) {
      epilogue.panel(v + p * kPanel, static_cast<int>(at_most(kPanel, rows - p * kPanel)), p * kPanel);
      Engine::multiply(engine.packed_panel(panels.bytes() + p * engine.panel_bytes()), engine.k_steps(), tokens,
                       engine.block_bytes(), end - begin, z, kTile, false, &epilogue, Prefetcher());
    }
    if (!need_dh) return;
    for (int64_t j = 0; j < columns; ++j) {
      Engine::multiply(engine.transposed_panel(panels.bytes(), transposed.bytes(), j), steps(n_panels),
                       Engine::gradient_block(gradient, begin), Engine::gradient_stride(), end - begin,
                       dh.floats() + ((first + begin) * columns + j) * kTile, columns * kTile, v > 0,
                       static_cast<NoEpilogue*>(nullptr), Prefetcher());
    }
  }

  // A panel's rows of dW and dbias: add the labels' own terms, in the order of tokens, and write. `label_at` is a place
  // in the order of labels at or before this panel's; returns the place behind them.
  int64_t finish_rows(const float* sums, float* row, int64_t v, int64_t chunk_row, int64_t label_at) {
    const int64_t* order = reinterpret_cast<const int64_t*>(label_order.bytes());
    float* h = row + engine.padded;
    const int64_t first = v + chunk_row, end = at_most(first + kPanel, args.vocab);
    while (label_at < args.tokens && order[label_at] >> 32 < first) ++label_at;
    for (int64_t r = first; r < end; ++r) {
      int64_t stop = label_at;
      while (stop < args.tokens && order[stop] >> 32 == r) ++stop;
      if (need_dw) {
        const float* from = sums + (r - first) * kBlock;
        for (int64_t j = 0; j < columns; ++j) std::memcpy(row + j * kBlock, from + j * kTile, kBlock * 4);
        for (int64_t i = label_at; i < stop; ++i) {
          const int64_t t = order[i] & 0xffffffff;
          read_factor(h, args.hidden, token_row(args, t));
          for (int64_t k = 0; k < args.width; ++k) row[k] += label_grad[t] * h[k];
        }
        write_floats(grad.dw.row(r), grad.dw.dtype, row, args.width);
      }
      if (grad.dbias != nullptr) {
        double sum = 0.0;
        for (int64_t b = 0; b < blocks; ++b) sum += bias_part.floats()[b * kChunkRows + r - v];
        for (int64_t i = label_at; i < stop; ++i) sum += label_grad[order[i] & 0xffffffff];
        grad.dbias[r] = static_cast<float>(sum);
      }
      label_at = stop;
    }
    return label_at;
  }

  // A row as the products see it.
  void read_factor(float* to, const Matrix& from, int64_t row) const {
    read_floats(to, from.row(row), from.dtype, args.width);
    if (args.precision == Precision::kBf16) {
      for (int64_t k = 0; k < args.width; ++k) to[k] = from_bf16(to_bf16(to[k]));
    }
  }

  void finish_hidden(int thread, float* row) {
    float* w = row + engine.padded;
    for (int64_t t = thread; t < args.tokens; t += threads) {
      const float* from = dh.floats() + t / kBlock * columns * kTile + t % kBlock;
      for (int64_t k = 0; k < args.width; ++k) row[k] = from[k / kBlock * kTile + k % kBlock * kBlock];
      if (label[t] >= 0) {
        read_factor(w, args.weight, label[t]);
        for (int64_t k = 0; k < args.width; ++k) row[k] += label_grad[t] * w[k];
      }
      write_floats(grad.dh.row(token_row(args, t)), grad.dh.dtype, row, args.width);
    }
  }
};

template <class Engine>
void backward(const LinearLogprobArgs& args, const LinearLogprobGrad& grad) {
  Backward<Engine>(args, grad).run();
}

}  // namespace
}  // namespace lldfast
