// lldfast._C: argument checks and the release of the interpreter's lock. Nothing else here knows Python.
// Tensors come as addresses (tensor.data_ptr()), so one build serves every torch version.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/distill/distill.h"
#include "cpu/distill/distill_linear.h"
#include "cpu/linear_logprob/linear_logprob.h"
#include "cpu/logprob/logprob.h"
#include "cpu/sketch/sketch.h"
#include "cpu/sketch/sketch_outer.h"
#include "cpu/tokens/tokens.h"
#include "cpu/tokens/xxh3.h"
#include "dispatch.h"

namespace py = pybind11;
using Indices = py::array_t<int64_t, py::array::c_style>;

namespace {

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (lldfast::Isa isa : lldfast::supported_isas()) names.emplace_back(lldfast::isa_name(isa));
  return names;
}

uint64_t xxh3_64(const py::buffer& buffer) {
  const py::buffer_info info = buffer.request();
  if (!PyBuffer_IsContiguous(info.view(), 'C')) throw py::value_error("xxh3_64: the buffer is not contiguous");
  py::gil_scoped_release release;
  return lldfast::xxh3_64(static_cast<const uint8_t*>(info.ptr), static_cast<size_t>(info.size * info.itemsize));
}

py::object gather(const Indices& addresses, const Indices& sizes, int itemsize, int64_t vocab_size,
                  const Indices& domain, const Indices& start, int64_t length, uintptr_t x, uintptr_t y) {
  const int64_t n_domains = addresses.size(), rows = domain.size();
  if (sizes.size() != n_domains) throw py::value_error("gather: addresses and sizes differ in length");
  if (start.size() != rows) throw py::value_error("gather: domain and start differ in length");
  if (itemsize != 2 && itemsize != 4) throw py::value_error("gather: itemsize must be 2 or 4");
  if (length < 1) throw py::value_error("gather: length must be at least 1");
  std::vector<lldfast::Shard> shards;
  for (int64_t k = 0; k < n_domains; ++k) {
    shards.push_back({reinterpret_cast<const void*>(addresses.at(k)), sizes.at(k)});
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t k = domain.at(row);
    if (k < 0 || k >= n_domains) {
      throw py::index_error("gather: row " + std::to_string(row) + " asks for domain " + std::to_string(k) + " of " +
                            std::to_string(n_domains));
    }
    if (start.at(row) < 0 || start.at(row) >= shards[k].size || length >= shards[k].size) {
      throw py::index_error("gather: row " + std::to_string(row) + " reads " + std::to_string(length + 1) +
                            " tokens at " + std::to_string(start.at(row)) + " of domain " + std::to_string(k) +
                            ", which has " + std::to_string(shards[k].size));
    }
  }
  lldfast::BadToken bad;
  {
    py::gil_scoped_release release;
    bad = lldfast::gather(shards.data(), itemsize, vocab_size, domain.data(), start.data(), rows, length,
                          reinterpret_cast<int64_t*>(x), reinterpret_cast<int64_t*>(y));
  }
  if (bad.row < 0) return py::none();
  return py::make_tuple(bad.row, bad.position, bad.token);
}

lldfast::DType dtype_of(const std::string& name) {
  if (name == "float32") return lldfast::DType::kF32;
  if (name == "bfloat16") return lldfast::DType::kBf16;
  if (name == "float16") return lldfast::DType::kF16;
  throw py::value_error("dtype " + name + ": the kernels take float32, bfloat16 and float16");
}

lldfast::Precision precision_of(const std::string& name) {
  if (name == "fp32") return lldfast::Precision::kFp32;
  if (name == "bf16") return lldfast::Precision::kBf16;
  if (name == "bf16x3") return lldfast::Precision::kBf16x3;
  throw py::value_error("precision " + name + ": choose fp32, bf16 or bf16x3");
}

lldfast::Isa isa_of(const std::string& name) {
  if (name.empty()) return lldfast::active_isa();
  for (lldfast::Isa isa : lldfast::supported_isas()) {
    if (name == lldfast::isa_name(isa)) return isa;
  }
  throw py::value_error("isa " + name + ": not on this machine");
}

// (address, dtype, row stride in elements) of a matrix whose columns are contiguous; address 0: there is none.
using MatrixTuple = std::tuple<uintptr_t, std::string, int64_t>;

lldfast::Matrix matrix(const MatrixTuple& m) {
  return {reinterpret_cast<const void*>(std::get<0>(m)), dtype_of(std::get<1>(m)), std::get<2>(m)};
}

lldfast::MutableMatrix mutable_matrix(const MatrixTuple& m) {
  return {reinterpret_cast<void*>(std::get<0>(m)), dtype_of(std::get<1>(m)), std::get<2>(m)};
}

// Addresses of per-token results: logprob, lse, argmax, entropy, top; 0: not wanted.
lldfast::LogprobOut outputs(const std::array<uintptr_t, 5>& a) {
  return {reinterpret_cast<float*>(a[0]), reinterpret_cast<float*>(a[1]), reinterpret_cast<int64_t*>(a[2]),
          reinterpret_cast<float*>(a[3]), reinterpret_cast<float*>(a[4])};
}

const float* floats(uintptr_t address) {
  return reinterpret_cast<const float*>(address);
}
const int64_t* integers(uintptr_t address) {
  return reinterpret_cast<const int64_t*>(address);
}

void check_sizes(int64_t tokens, int64_t vocab, int threads) {
  if (tokens < 1 || vocab < 1 || threads < 1) throw py::value_error("tokens, vocab and threads must be at least 1");
  if (vocab > INT32_MAX) throw py::value_error("the kernels number the vocabulary in 32 bits");
}

lldfast::LogprobArgs logprob_args(const MatrixTuple& logits, uintptr_t rows, int64_t tokens, int64_t vocab,
                                  uintptr_t labels, uintptr_t bias, float softcap, float logit_scale, int threads) {
  check_sizes(tokens, vocab, threads);
  return {matrix(logits), integers(rows), tokens, vocab, integers(labels), floats(bias), softcap, logit_scale, threads};
}

lldfast::LinearLogprobArgs linear_args(const MatrixTuple& hidden, uintptr_t rows, int64_t tokens, int64_t width,
                                       const MatrixTuple& weight, int64_t vocab, uintptr_t labels, uintptr_t bias,
                                       float softcap, float logit_scale, const std::string& precision, int threads) {
  check_sizes(tokens, vocab, threads);
  return {matrix(hidden),   integers(rows), tokens,  width,       matrix(weight),          vocab,
          integers(labels), floats(bias),   softcap, logit_scale, precision_of(precision), threads};
}

// assistant, a, lam, order, divergence, x, y, detach, temperature, ce, numbered as in lldfast/ops/distill/spec.py.
using SpecTuple = std::tuple<int, double, double, int, int, double, double, bool, double, bool>;

lldfast::DistillSpec distill_spec(const SpecTuple& spec) {
  const auto [assistant, a, lam, order, divergence, x, y, detach, temperature, ce] = spec;
  if (assistant < 0 || assistant > 5 || order < 0 || order > 3 || divergence < 0 || divergence > 2) {
    throw py::value_error("distill: assistant, order or divergence is out of range");
  }
  return {static_cast<lldfast::Assistant>(assistant),
          a,
          lam,
          static_cast<lldfast::Order>(order),
          static_cast<lldfast::Divergence>(divergence),
          x,
          y,
          detach,
          temperature,
          ce};
}

// gradient: addresses of the coefficients of divergence and cross entropy, and where it goes; 0: none.
void distill_rows(const MatrixTuple& student, int64_t student_vocab, const MatrixTuple& teacher, int64_t teacher_vocab,
                  int64_t rows, uintptr_t labels, const SpecTuple& spec, uintptr_t g_divergence, uintptr_t g_ce,
                  uintptr_t divergence, uintptr_t ce, const MatrixTuple& out, int threads, const std::string& isa) {
  check_sizes(rows, student_vocab, threads);
  check_sizes(rows, teacher_vocab, threads);
  const lldfast::DistillArgs args = {matrix(student), student_vocab,    matrix(teacher),    teacher_vocab,
                                     rows,            integers(labels), distill_spec(spec), threads};
  const lldfast::DistillOut results = {reinterpret_cast<float*>(divergence), reinterpret_cast<float*>(ce),
                                       floats(g_divergence), floats(g_ce), mutable_matrix(out)};
  if (args.spec.ce && labels == 0) throw py::value_error("distill_rows: cross entropy needs labels");
  if (results.out.data != nullptr && g_divergence == 0) throw py::value_error("distill_rows: out needs g_divergence");
  const lldfast::Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  lldfast::distill_rows(chosen, args, results);
}

// (hidden, weight, width, precision).
using HeadTuple = std::tuple<MatrixTuple, MatrixTuple, int64_t, std::string>;

lldfast::DistillHead distill_head(const HeadTuple& head) {
  const auto& [hidden, weight, width, precision] = head;
  const lldfast::DistillHead made = {matrix(hidden), matrix(weight), width, precision_of(precision)};
  if (width < 1) throw py::value_error("distill_linear: width must be at least 1");
  if (made.precision == lldfast::Precision::kBf16x3) throw py::value_error("distill_linear: choose fp32 or bf16");
  return made;
}

// gradient: addresses of the coefficients of divergence and cross entropy, then dh and dw; 0: none.
void distill_linear(const HeadTuple& student, const HeadTuple& teacher, uintptr_t rows, int64_t tokens, int64_t vocab,
                    uintptr_t labels, const SpecTuple& spec, uintptr_t g_divergence, uintptr_t g_ce,
                    uintptr_t divergence, uintptr_t ce, const MatrixTuple& dh, const MatrixTuple& dw, int threads,
                    const std::string& isa) {
  check_sizes(tokens, vocab, threads);
  const lldfast::DistillLinearArgs args = {
      distill_head(student), distill_head(teacher), integers(rows), tokens, vocab, integers(labels), distill_spec(spec),
      threads};
  const lldfast::DistillLinearOut out = {reinterpret_cast<float*>(divergence),
                                         reinterpret_cast<float*>(ce),
                                         floats(g_divergence),
                                         floats(g_ce),
                                         mutable_matrix(dh),
                                         mutable_matrix(dw)};
  if (args.spec.ce && labels == 0) throw py::value_error("distill_linear: cross entropy needs labels");
  if ((out.dh.data != nullptr || out.dw.data != nullptr) && (g_divergence == 0 || (args.spec.ce && g_ce == 0))) {
    throw py::value_error("distill_linear: gradients need g_divergence and g_ce");
  }
  const lldfast::Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  lldfast::distill_linear(chosen, args, out);
}

std::array<double, 1 + lldfast::kSketchDots> sketch_fold(uintptr_t g, const std::string& dtype, int64_t n,
                                                         int64_t offset, uintptr_t out, int64_t k, uint64_t seed,
                                                         uintptr_t scale, uintptr_t dot0, uintptr_t dot1, int threads,
                                                         const std::string& isa) {
  if (n < 1 || offset < 0 || threads < 1) throw py::value_error("sketch_fold: n, offset or threads is out of range");
  if (k < 1 || (k & (k - 1)) != 0) throw py::value_error("sketch_fold: k must be a power of two");
  std::array<double, 1 + lldfast::kSketchDots> sums;
  const lldfast::SketchArgs args = {reinterpret_cast<const void*>(g),
                                    dtype_of(dtype),
                                    n,
                                    offset,
                                    reinterpret_cast<double*>(out),
                                    k,
                                    seed,
                                    floats(scale),
                                    {floats(dot0), floats(dot1)},
                                    threads,
                                    sums.data()};
  const lldfast::Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  lldfast::sketch_fold(chosen, args);
  return sums;
}

// (address, dtype, columns, sample stride, token stride), strides in elements.
using SampleTuple = std::tuple<uintptr_t, std::string, int64_t, int64_t, int64_t>;

lldfast::SampleMatrix sample_matrix(const SampleTuple& m) {
  return {reinterpret_cast<const void*>(std::get<0>(m)), dtype_of(std::get<1>(m)), std::get<2>(m), std::get<3>(m),
          std::get<4>(m)};
}

void check_sketches(int64_t samples, int64_t k, int threads) {
  if (samples < 1 || threads < 1) throw py::value_error("samples and threads must be at least 1");
  if (k < 1 || (k & (k - 1)) != 0) throw py::value_error("k must be a power of two");
}

void sketch_outer(const SampleTuple& a, const SampleTuple& b, int64_t samples, int64_t tokens, int64_t offset,
                  uintptr_t out, int64_t k, uint64_t seed, uintptr_t scale, int threads, const std::string& isa,
                  uintptr_t squares) {
  check_sketches(samples, k, threads);
  const lldfast::SketchOuterArgs args = {sample_matrix(a),
                                         sample_matrix(b),
                                         samples,
                                         tokens,
                                         offset,
                                         reinterpret_cast<double*>(out),
                                         k,
                                         seed,
                                         floats(scale),
                                         threads,
                                         reinterpret_cast<double*>(squares)};
  if (tokens < 1 || args.a.columns < 1 || args.b.columns < 1 || offset < 0) {
    throw py::value_error("sketch_outer: tokens, columns or offset is out of range");
  }
  const lldfast::Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  lldfast::sketch_outer(chosen, args);
}

void sketch_rows(uintptr_t rows, int64_t width, uintptr_t begin, uintptr_t place, int64_t samples, uintptr_t out,
                 int64_t k, uint64_t seed, int threads, const std::string& isa) {
  check_sketches(samples, k, threads);
  const lldfast::SketchRowsArgs args = {
      floats(rows), width, integers(begin), integers(place), samples, reinterpret_cast<double*>(out), k, seed, threads};
  const lldfast::Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  lldfast::sketch_rows(chosen, args);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of lldfast";
  m.def(
      "isa", [] { return std::string(lldfast::isa_name(lldfast::active_isa())); },
      "The instruction set in use: the best one here, or LLDFAST_ISA. ValueError when LLDFAST_ISA cannot be had.");
  m.def("supported_isas", &supported_isas, "The instruction sets of this machine, in rising order.");
  m.def("xxh3_64", &xxh3_64, py::arg("buffer"), "XXH3 (64 bits, seed 0) of a contiguous buffer.");
  m.def(
      "gather", &gather, py::arg("addresses"), py::arg("sizes"), py::arg("itemsize"), py::arg("vocab_size"),
      py::arg("domain"), py::arg("start"), py::arg("length"), py::arg("x"), py::arg("y"),
      "Fill x and y (addresses of int64 [rows, length]) with windows and next tokens; None, or (row, position, token) "
      "of the first token id at or above vocab_size.");

  m.def("distill_rows", &distill_rows,
        "Distillation loss per row of logits, and its gradient (csrc/cpu/distill/distill.h).");
  m.def("distill_linear", &distill_linear,
        "The same from hidden states and heads (csrc/cpu/distill/distill_linear.h).");
  m.def("sketch_fold", &sketch_fold,
        "Add the XOR-fold of g to out; |g scale|^2 and two inner products (csrc/cpu/sketch/sketch.h).");
  m.def("sketch_outer", &sketch_outer,
        "Add the fold of b^T a of each sample to its sketch (csrc/cpu/sketch/sketch_outer.h).");
  m.def("sketch_rows", &sketch_rows,
        "Add rows with a place in the flat space to sketches (csrc/cpu/sketch/sketch_outer.h).");

  // Given logits: cpu/logprob/logprob.h. Hidden states and head: cpu/linear_logprob/linear_logprob.h. isa "" is the
  // one in use.
  m.def("logprob_fwd",
        [](const MatrixTuple& logits, uintptr_t rows, int64_t tokens, int64_t vocab, uintptr_t labels, uintptr_t bias,
           float softcap, float logit_scale, int threads, const std::string& isa, const std::array<uintptr_t, 5>& out) {
          const auto args = logprob_args(logits, rows, tokens, vocab, labels, bias, softcap, logit_scale, threads);
          const lldfast::Isa chosen = isa_of(isa);
          py::gil_scoped_release release;
          lldfast::logprob_forward(chosen, args, outputs(out));
        });
  m.def("logprob_bwd", [](const MatrixTuple& logits, uintptr_t rows, int64_t tokens, int64_t vocab, uintptr_t labels,
                          uintptr_t bias, float softcap, float logit_scale, int threads, const std::string& isa,
                          uintptr_t logprob, uintptr_t lse, uintptr_t g, uintptr_t h, const MatrixTuple& dlogits,
                          uintptr_t dbias) {
    const auto args = logprob_args(logits, rows, tokens, vocab, labels, bias, softcap, logit_scale, threads);
    const lldfast::LogprobGrad grad = {
        floats(logprob), floats(lse), floats(g), floats(h), mutable_matrix(dlogits), reinterpret_cast<float*>(dbias)};
    const lldfast::Isa chosen = isa_of(isa);
    py::gil_scoped_release release;
    lldfast::logprob_backward(chosen, args, grad);
  });
  m.def("linear_logprob_fwd", [](const MatrixTuple& hidden, uintptr_t rows, int64_t tokens, int64_t width,
                                 const MatrixTuple& weight, int64_t vocab, uintptr_t labels, uintptr_t bias,
                                 float softcap, float logit_scale, const std::string& precision, int threads,
                                 const std::string& isa, const std::array<uintptr_t, 5>& out) {
    const auto args =
        linear_args(hidden, rows, tokens, width, weight, vocab, labels, bias, softcap, logit_scale, precision, threads);
    const lldfast::Isa chosen = isa_of(isa);
    py::gil_scoped_release release;
    lldfast::linear_logprob_forward(chosen, args, outputs(out));
  });
  m.def("linear_logprob_bwd", [](const MatrixTuple& hidden, uintptr_t rows, int64_t tokens, int64_t width,
                                 const MatrixTuple& weight, int64_t vocab, uintptr_t labels, uintptr_t bias,
                                 float softcap, float logit_scale, const std::string& precision, int threads,
                                 const std::string& isa, uintptr_t logprob, uintptr_t lse, uintptr_t g, uintptr_t h,
                                 const MatrixTuple& dh, const MatrixTuple& dw, uintptr_t dbias) {
    const auto args =
        linear_args(hidden, rows, tokens, width, weight, vocab, labels, bias, softcap, logit_scale, precision, threads);
    const lldfast::LinearLogprobGrad grad = {floats(logprob),
                                             floats(lse),
                                             floats(g),
                                             floats(h),
                                             mutable_matrix(dh),
                                             mutable_matrix(dw),
                                             reinterpret_cast<float*>(dbias)};
    const lldfast::Isa chosen = isa_of(isa);
    py::gil_scoped_release release;
    lldfast::linear_logprob_backward(chosen, args, grad);
  });
}
