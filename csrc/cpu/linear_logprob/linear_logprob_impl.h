// The walk over tokens and vocabulary of linear_logprob.h, for the engine of the including file (unit.cpp.in).
#pragma once

#include <cmath>

#include "cpu/common/linear_walk.h"
#include "cpu/linear_logprob/linear_logprob_epilogue.h"

#include LLDFAST_ENGINE

namespace lldfast {
namespace {

inline int64_t token_row(const LinearLogprobArgs& args, int64_t t) {
  return args.rows == nullptr ? t : args.rows[t];
}

inline int32_t local_label(const LinearLogprobArgs& args, int64_t t) {
  if (t >= args.tokens) return -1;
  const int64_t label = args.labels[token_row(args, t)];
  return label >= 0 && label < args.vocab ? static_cast<int32_t>(label) : -1;
}

template <class Engine, bool kArgmax, bool kEntropy>
struct Forward : TokenGroups {
  const LinearLogprobArgs& args;
  const LogprobOut& out;
  const Engine engine;
  int64_t worker_bytes = 0;
  Lanes* lanes = nullptr;  // [slots][splits][group]
  uint8_t* scratch = nullptr;
  Counter items;

  Forward(const LinearLogprobArgs& a, const LogprobOut& o)
      : TokenGroups(a.tokens, a.vocab, a.threads, Engine::kGroupBytes / Engine(a.width, a.precision).block_bytes()),
        args(a),
        out(o),
        engine(a.width, a.precision) {}

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

// Backward: for each pair of a chunk of the vocabulary and a chunk of tokens the logits are computed again and dz is
// kept in the two layouts that the products want.

template <class Engine>
struct Backward {
  static constexpr int64_t kChunkRows = Engine::kChunkRows;

  const LinearLogprobArgs& args;
  const LinearLogprobGrad& grad;
  const Engine engine;
  const int threads;
  const PackedHead<Engine> head;
  const GradientProducts<Engine> products;
  const int64_t blocks, chunk_blocks;  // of tokens in all, and in a chunk
  Barrier barrier;
  Buffer lanes, bias_part, scratch, label_order;
  int64_t worker_bytes;

  // Per token, in the order of `rows`.
  int32_t* label;
  float *lse, *of_label, *coefficient, *label_grad;

  Backward(const LinearLogprobArgs& a, const LinearLogprobGrad& d)
      : args(a),
        grad(d),
        engine(a.width, a.precision),
        threads(a.threads),
        head(engine, a.hidden, a.weight, a.rows, a.tokens, a.vocab),
        products(engine, a.tokens, a.threads, d.dh.data != nullptr, d.dw.data != nullptr),
        blocks(products.blocks),
        chunk_blocks(products.chunk_blocks),
        barrier(a.threads),
        lanes(static_cast<size_t>(blocks * kBlock) * 5 * 4),
        bias_part(static_cast<size_t>(d.dbias == nullptr ? 0 : blocks * kChunkRows * 4)),
        scratch(static_cast<size_t>(threads) * worker(engine, chunk_blocks)),
        label_order(static_cast<size_t>(blocks * kBlock) * 8),
        worker_bytes(worker(engine, chunk_blocks)) {
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
  static int64_t worker(const Engine& engine, int64_t chunk_blocks) {
    const int64_t z = chunk_blocks * kTile * 4;
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
    for (int64_t b = thread; b < blocks; b += threads) {
      head.pack_tokens(own, b);
      products.pack_tokens(own, b);
    }
    pack_chunk(0, thread);
    barrier.wait();
    int64_t next_label = 0;
    for (int64_t v = 0; v < args.vocab; v += kChunkRows) {
      const int64_t rows = at_most(kChunkRows, args.vocab - v);
      for (int64_t first = 0; first < blocks; first += chunk_blocks) {
        const int64_t n = at_most(chunk_blocks, blocks - first);
        over_tokens(thread, reinterpret_cast<float*>(own), v, rows, first, n);
        barrier.wait();
        const bool last = first + n == blocks;
        for (int64_t p = thread; p < ceil_div(rows, kPanel); p += threads) {
          const float* sums = products.add_dw(p, thread, first, n);
          if (last) next_label = finish_rows(sums, reinterpret_cast<float*>(own), v, p * kPanel, next_label);
        }
        if (last && v + kChunkRows < args.vocab) pack_chunk(v + kChunkRows, thread);
        barrier.wait();
      }
    }
    if (products.need_dh) finish_hidden(thread, reinterpret_cast<float*>(own));
  }

  void pack_chunk(int64_t v, int thread) {
    for (int64_t p = thread; p < ceil_div(at_most(kChunkRows, args.vocab - v), kPanel); p += threads) {
      products.pack_panel(head.pack_panel(v, p, threads), p);
    }
  }

  void over_tokens(int thread, float* z, int64_t v, int64_t rows, int64_t first, int64_t n) {
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
                                  products.gradient(),
                                  begin};
    for (int64_t p = 0; p < n_panels; ++p) {
      epilogue.panel(v + p * kPanel, static_cast<int>(at_most(kPanel, rows - p * kPanel)), p * kPanel);
      head.multiply(p, first + begin, end - begin, z, &epilogue);
    }
    products.add_dh(head.panels.bytes(), n_panels, first, begin, end, v > 0);
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
      if (products.need_dw) {
        products.dw_row(row, sums, r - first);
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
      products.dh_row(row, t);
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

inline void forward_in_terms(const LinearLogprobArgs& args, const LogprobOut& out) {
  if (args.precision == Precision::kBf16x3) return forward<UnitEngine<3>>(args, out);
  forward<UnitEngine<1>>(args, out);
}

constexpr LinearLogprobKernels kKernels = {forward_in_terms, backward<UnitEngine<1>>};

}  // namespace
}  // namespace lldfast
