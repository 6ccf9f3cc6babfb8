// The walks of distill_linear.h, for the engine of the including file (unit.cpp.in).
#pragma once

#include "cpu/common/linear_walk.h"
#include "cpu/distill/distill_epilogue.h"

#include LLDFAST_ENGINE

namespace lldfast {
namespace {

// As kSplitRows; shorter, since the sums of a gradient cancel: fp32 only has to hold these rows, doubles the rest.
constexpr int64_t kSweepRows = 2048;

template <class T>
T larger(T a, T b) {
  return a > b ? a : b;
}

template <class Engine>
struct DistillEngines {
  const DistillLinearArgs& args;
  const Engine student, teacher;

  explicit DistillEngines(const DistillLinearArgs& a)
      : args(a), student(a.student.width, a.student.precision), teacher(a.teacher.width, a.teacher.precision) {}

  int64_t stage_bytes() const { return larger(student.stage_bytes(), teacher.stage_bytes()); }
};

// A sweep over the vocabulary that leaves something per token: both models' logits of a panel and a group of blocks,
// then the epilogue, which ends with finish() for each token. Threads share as TokenGroups says.
template <class Engine, class Epilogue>
struct Sweep : TokenGroups {
  using Lanes = typename Epilogue::Lanes;

  const DistillEngines<Engine>& engines;
  const DistillLinearArgs& args;
  const DistillCall& call;
  const int64_t stage_bytes, student_bytes, teacher_bytes, slab_bytes;  // of a thread's scratch
  int64_t worker_bytes = 0;
  Lanes* lanes = nullptr;  // [slots][splits][group]
  uint8_t* scratch = nullptr;
  Counter items;

  Sweep(const DistillEngines<Engine>& e, const DistillCall& c)
      : TokenGroups(e.args.tokens, e.args.vocab, e.args.threads,
                    Engine::kGroupBytes / (e.student.block_bytes() + e.teacher.block_bytes()), kSweepRows),
        engines(e),
        args(e.args),
        call(c),
        stage_bytes(e.stage_bytes()),
        student_bytes(group * e.student.block_bytes()),
        teacher_bytes(group * e.teacher.block_bytes()),
        slab_bytes(larger(e.student.slab_bytes(), e.teacher.slab_bytes())) {}

  void run() {
    const int64_t bytes = stage_bytes + student_bytes + teacher_bytes + slab_bytes + 2 * group * kTile * 4;
    worker_bytes = ceil_div(bytes, 4096) * 4096 + 64;
    const Buffer lanes_memory(static_cast<size_t>(slots * splits * group) * sizeof(Lanes));
    const Buffer scratch_memory(static_cast<size_t>(threads * worker_bytes));
    lanes = reinterpret_cast<Lanes*>(lanes_memory.bytes());
    scratch = scratch_memory.bytes();
    run_team(static_cast<int>(threads), [](void* self, int i) { static_cast<Sweep*>(self)->work(i); }, this);
    if (ranges > 1) {
      for (int64_t g = 0; g < groups; ++g) finish(g, g);
    }
  }

  void pack(const Engine& engine, const Matrix& hidden, uint8_t* staged, uint8_t* packed, int64_t first,
            int64_t n) const {
    for (int64_t b = 0; b < n; ++b) {
      const int64_t t = (first + b) * kBlock;
      engine.stage_tokens(staged, hidden, args.rows, t, at_most(kBlock, args.tokens - t));
      engine.pack_tokens(packed + b * engine.block_bytes(), staged);
    }
  }

  // z^T of the rows [v, v + rows) of a head for n blocks, while the next panel is fetched.
  template <class After>
  void multiply(const Engine& engine, const Matrix& weight, int64_t v, int64_t rows, int64_t end, uint8_t* slab,
                const uint8_t* packed, int64_t n, float* z, After* epilogue) const {
    const int64_t steps = engine.k_steps(), next = at_most(kPanel, end - v - rows);
    const Prefetcher next_panel(weight, v + rows, next, engine.width, Engine::advances(steps, n));
    Engine::multiply(engine.weight_panel(weight, v, rows, slab), steps, packed, engine.block_bytes(), n, z, kTile,
                     false, epilogue, next_panel);
  }

  void work(int thread) {
    const typename Engine::Session session;
    (void)session;
    uint8_t* staged = scratch + thread * worker_bytes;
    uint8_t *of_student = staged + stage_bytes, *of_teacher = of_student + student_bytes;
    uint8_t* slab = of_teacher + teacher_bytes;
    float *zs = reinterpret_cast<float*>(slab + slab_bytes), *zt = zs + group * kTile;
    int64_t packed_group = -1;
    for (int64_t item = items.next(); item < groups * ranges; item = items.next()) {
      const int64_t g = item / ranges, range = item % ranges;
      const int64_t first = g * group, n = at_most(group, blocks - first);
      if (g != packed_group) {
        pack(engines.student, args.student.hidden, staged, of_student, first, n);
        pack(engines.teacher, args.teacher.hidden, staged, of_teacher, first, n);
        packed_group = g;
      }
      const int64_t slot = ranges == 1 ? thread : g;
      for (int64_t s = splits * range / ranges; s < splits * (range + 1) / ranges; ++s) {
        Lanes* state = lanes + (slot * splits + s) * group;
        for (int64_t b = 0; b < n; ++b) Epilogue::reset(state[b]);
        Epilogue epilogue(DistillBlocks(call, zs, zt, first), state);
        const int64_t end = at_most((s + 1) * kSweepRows, args.vocab);
        for (int64_t v = s * kSweepRows; v < end; v += kPanel) {
          const int64_t rows = at_most(kPanel, end - v);
          epilogue.panel(v, static_cast<int>(rows));
          multiply(engines.teacher, args.teacher.weight, v, rows, end, slab, of_teacher, n, zt,
                   static_cast<NoEpilogue*>(nullptr));
          multiply(engines.student, args.student.weight, v, rows, end, slab, of_student, n, zs, &epilogue);
        }
      }
      if (ranges == 1) finish(g, thread);
    }
  }

  void finish(int64_t g, int64_t slot) {
    const int64_t first = g * group * kBlock, n = at_most(group * kBlock, args.tokens - first);
    for (int64_t t = 0; t < n; ++t) {
      const Lanes* parts = lanes + slot * splits * group + t / kBlock;
      Epilogue::finish(call, parts, splits, group, static_cast<int>(t % kBlock), first + t);
    }
  }
};

// The gradient's sweep: for each pair of a chunk of the vocabulary and a chunk of tokens both models' logits are
// computed once more and dz is kept in the two layouts that the products want. A chunk's dW is complete at once.
template <class Engine>
struct DistillGradients {
  static constexpr int64_t kChunkRows = Engine::kChunkRows;

  const DistillLinearArgs& args;
  const DistillLinearOut& out;
  const DistillCall& call;
  const int threads;
  const PackedHead<Engine> student, teacher;
  const GradientProducts<Engine> products;
  Barrier barrier;
  const int64_t worker_bytes;
  Buffer scratch;

  DistillGradients(const DistillEngines<Engine>& e, const DistillCall& c, const DistillLinearOut& o)
      : args(e.args),
        out(o),
        call(c),
        threads(args.threads),
        student(e.student, args.student.hidden, args.student.weight, args.rows, args.tokens, args.vocab),
        teacher(e.teacher, args.teacher.hidden, args.teacher.weight, args.rows, args.tokens, args.vocab),
        products(e.student, args.tokens, threads, o.dh.data != nullptr, o.dw.data != nullptr),
        barrier(threads),
        worker_bytes(worker(e, products.chunk_blocks)),
        scratch(static_cast<size_t>(threads * worker_bytes)) {}

  // Both models' logits of a thread's blocks of tokens; or staged rows, or a row of a gradient.
  static int64_t worker(const DistillEngines<Engine>& e, int64_t chunk_blocks) {
    const int64_t rows = larger(e.stage_bytes(), e.student.padded * 4);
    return ceil_div(larger(2 * chunk_blocks * kTile * 4, rows), 4096) * 4096 + 64;
  }

  void run() {
    run_team(threads, [](void* self, int i) { static_cast<DistillGradients*>(self)->work(i); }, this);
  }

  void work(int thread) {
    const typename Engine::Session session;
    (void)session;
    uint8_t* own = scratch.bytes() + thread * worker_bytes;
    float* row = reinterpret_cast<float*>(own);
    for (int64_t b = thread; b < products.blocks; b += threads) {
      teacher.pack_tokens(own, b);
      student.pack_tokens(own, b);
      products.pack_tokens(own, b);
    }
    pack_chunk(0, thread);
    barrier.wait();
    for (int64_t v = 0; v < args.vocab; v += kChunkRows) {
      const int64_t rows = at_most(kChunkRows, args.vocab - v);
      for (int64_t first = 0; first < products.blocks; first += products.chunk_blocks) {
        const int64_t n = at_most(products.chunk_blocks, products.blocks - first);
        over_tokens(thread, row, v, rows, first, n);
        barrier.wait();
        const bool last = first + n == products.blocks;
        for (int64_t p = thread; p < ceil_div(rows, kPanel) && products.need_dw; p += threads) {
          const float* sums = products.add_dw(p, thread, first, n);
          for (int64_t r = 0; last && r < at_most(kPanel, rows - p * kPanel); ++r) {
            products.dw_row(row, sums, r);
            write_floats(out.dw.row(v + p * kPanel + r), out.dw.dtype, row, args.student.width);
          }
        }
        if (last && v + kChunkRows < args.vocab) pack_chunk(v + kChunkRows, thread);
        barrier.wait();
      }
    }
    for (int64_t t = thread; t < args.tokens && products.need_dh; t += threads) {
      products.dh_row(row, t);
      write_floats(out.dh.row(args.rows == nullptr ? t : args.rows[t]), out.dh.dtype, row, args.student.width);
    }
  }

  void pack_chunk(int64_t v, int thread) {
    for (int64_t p = thread; p < ceil_div(at_most(kChunkRows, args.vocab - v), kPanel); p += threads) {
      teacher.pack_panel(v, p, threads);
      products.pack_panel(student.pack_panel(v, p, threads), p);
    }
  }

  void over_tokens(int thread, float* z, int64_t v, int64_t rows, int64_t first, int64_t n) {
    const int64_t begin = n * thread / threads, end = n * (thread + 1) / threads;
    if (begin == end) return;
    const int64_t n_panels = ceil_div(rows, kPanel);
    float* zt = z + (end - begin) * kTile;
    DistillGradEpilogue<Engine> epilogue(DistillBlocks(call, z, zt, first + begin), products.gradient(), begin);
    for (int64_t p = 0; p < n_panels; ++p) {
      epilogue.panel(v + p * kPanel, static_cast<int>(at_most(kPanel, rows - p * kPanel)), p * kPanel);
      teacher.multiply(p, first + begin, end - begin, zt, static_cast<NoEpilogue*>(nullptr));
      student.multiply(p, first + begin, end - begin, z, &epilogue);
    }
    products.add_dh(student.panels.bytes(), n_panels, first, begin, end, v > 0);
  }
};

inline void read_tokens(const DistillLinearArgs& args, const DistillLinearOut& out, const DistillTokens& tokens) {
  const double temperature = args.spec.temperature;
  for (int64_t t = 0; t < ceil_div(args.tokens, kBlock) * kBlock; ++t) {
    const bool real = t < args.tokens;
    const int64_t row = !real ? 0 : args.rows == nullptr ? t : args.rows[t];
    const bool grads = real && out.g_divergence != nullptr;
    tokens.label[t] = real && args.spec.ce ? static_cast<int32_t>(args.labels[row]) : -1;
    tokens.lse_p[t] = tokens.lse_q[t] = tokens.lse_1[t] = kInf;
    tokens.lse_difference[t] = tokens.log_r[t] = tokens.sum_g[t] = tokens.sum_h[t] = 0.0f;
    tokens.of_label[t] = 0.0f;
    tokens.g[t] = grads ? static_cast<float>(out.g_divergence[row] / temperature) : 0.0f;
    tokens.g_ce[t] = grads && args.spec.ce ? out.g_ce[row] : 0.0f;
  }
}

template <class Engine>
void distill_linear(const DistillLinearArgs& args, const DistillLinearOut& out) {
  const int64_t padded = ceil_div(args.tokens, kBlock) * kBlock;
  const Buffer memory(static_cast<size_t>(padded * DistillTokens::kArrays) * 4);
  const DistillTokens tokens(memory.floats(), padded);
  read_tokens(args, out, tokens);
  const DistillEngines<Engine> engines(args);
  const DistillCall call(args.spec, tokens);
  if (call.tempered) {
    Sweep<Engine, PairEpilogue<true>>(engines, call).run();
  } else {
    Sweep<Engine, PairEpilogue<false>>(engines, call).run();
  }
  if (!call.math.normalised) Sweep<Engine, NormaliserEpilogue>(engines, call).run();
  if (!call.from_stats && !call.one_sweep) Sweep<Engine, SumsEpilogue>(engines, call).run();
  for (int64_t t = 0; t < args.tokens; ++t) {
    const int64_t row = args.rows == nullptr ? t : args.rows[t];
    out.divergence[row] = tokens.loss[t];
    out.ce[row] = tokens.ce[t];
  }
  if (out.dh.data != nullptr || out.dw.data != nullptr) DistillGradients<Engine>(engines, call, out).run();
}

// dz in two terms: rounded to one, the gradient would be off by 1.5e-3 of its norm.
constexpr DistillLinearKernels kKernels = {distill_linear<UnitEngine<1, 2>>};

}  // namespace
}  // namespace lldfast
