// lldfast._C: argument checks and the release of the interpreter's lock. Nothing else here knows Python.
// Tensors come as addresses (tensor.data_ptr()), so one build serves every torch version.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/tokens.h"
#include "cpu/xxh3.h"
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

py::object gather(const Indices& addresses, const Indices& sizes, int itemsize, int64_t vocab_size, const Indices& domain,
                  const Indices& start, int64_t length, uintptr_t x, uintptr_t y) {
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
      throw py::index_error("gather: row " + std::to_string(row) + " reads " + std::to_string(length + 1) + " tokens at " +
                            std::to_string(start.at(row)) + " of domain " + std::to_string(k) + ", which has " +
                            std::to_string(shards[k].size));
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of lldfast";
  m.def("isa", [] { return std::string(lldfast::isa_name(lldfast::active_isa())); },
        "The instruction set in use: the best one here, or LLDFAST_ISA. ValueError when LLDFAST_ISA cannot be had.");
  m.def("supported_isas", &supported_isas, "The instruction sets of this machine, in rising order.");
  m.def("xxh3_64", &xxh3_64, py::arg("buffer"), "XXH3 (64 bits, seed 0) of a contiguous buffer.");
  m.def("gather", &gather, py::arg("addresses"), py::arg("sizes"), py::arg("itemsize"), py::arg("vocab_size"),
        py::arg("domain"), py::arg("start"), py::arg("length"), py::arg("x"), py::arg("y"),
        "Fill x and y (addresses of int64 [rows, length]) with windows and next tokens; None, or (row, position, token) "
        "of the first token id at or above vocab_size.");
}
