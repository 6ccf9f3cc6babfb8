// lldfast._cuda: built where a CUDA toolkit is. It loads without a driver; probe() then says so.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cuda/logprob.h"
#include "cuda/sketch.h"

namespace py = pybind11;

namespace {

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// {"runtime", "driver" (None without one), "devices": [{"name", "capability", "memory_bytes", "multiprocessors"}],
//  "reason" (empty when there is a device), "kernels" (whether nvcc was there to compile them)}. Starts the driver: do
//  not fork after it and use CUDA in the child.
py::dict probe() {
  py::dict answer;
  py::list devices;
  int runtime = 0, driver = 0, count = 0;
  std::string reason;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    reason = "no CUDA driver on this machine";
  } else if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    reason = cudaGetErrorString(error);
  } else if (count == 0) {
    reason = "the driver reports no device";
  }
  cudaGetLastError();  // leave no error behind for the next user of the runtime
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (const cudaError_t error = cudaGetDeviceProperties(&properties, i); error != cudaSuccess) {
      reason = "device " + std::to_string(i) + ": " + cudaGetErrorString(error);
      break;
    }
    py::dict device;
    device["name"] = std::string(properties.name);
    device["capability"] = py::make_tuple(properties.major, properties.minor);
    device["memory_bytes"] = properties.totalGlobalMem;
    device["multiprocessors"] = properties.multiProcessorCount;
    devices.append(device);
  }
  answer["runtime"] = version(runtime);
  answer["driver"] = driver == 0 ? py::object(py::none()) : py::object(py::str(version(driver)));
  answer["devices"] = devices;
  answer["reason"] = reason;
#ifdef LLDFAST_CUDA_KERNELS
  answer["kernels"] = true;
#else
  answer["kernels"] = false;
#endif
  return answer;
}

#ifdef LLDFAST_CUDA_KERNELS
using lldfast::Dtype;

// Tensors and streams come as the integers that torch gives for them, so that the module does not depend on torch's
// ABI.
template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_at(uintptr_t stream) {
  return at<CUstream_st>(stream);
}

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "bfloat16") return Dtype::kBFloat16;
  if (name == "float16") return Dtype::kFloat16;
  throw std::invalid_argument("dtype " + name + ": the kernels read float32, bfloat16 and float16");
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // it is reported now, and must not look like the error of the next call
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
  }
}

// Makes the device that holds `memory` the current one: this module's CUDA runtime is not the one torch has set.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const void* memory) {
    cudaPointerAttributes attributes;
    check(cudaPointerGetAttributes(&attributes, memory), "cudaPointerGetAttributes");
    if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged) {
      throw std::invalid_argument("the tensors are not in the memory of a CUDA device");
    }
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(attributes.device), "cudaSetDevice");
  }
  ~OnDeviceOf() { cudaSetDevice(before_); }
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;

 private:
  int before_ = 0;
};

void logprob_fwd(uintptr_t logits, const std::string& dtype, int64_t row_stride, int64_t tokens, int64_t vocab,
                 uintptr_t rows, uintptr_t labels, uintptr_t bias, float softcap, float logit_scale, uintptr_t logprob,
                 uintptr_t lse, uintptr_t argmax, uintptr_t entropy, uintptr_t max_logit, uintptr_t workspace,
                 uintptr_t stream) {
  const lldfast::LogprobInput in{at<void>(logits),  dtype_of(dtype),     row_stride,      tokens,  vocab,
                                 at<int64_t>(rows), at<int64_t>(labels), at<float>(bias), softcap, logit_scale};
  const lldfast::LogprobOutput out{at<float>(logprob), at<float>(lse), at<int64_t>(argmax), at<float>(entropy),
                                   at<float>(max_logit)};
  if (tokens == 0) return;
  const OnDeviceOf device(out.lse);  // not of the logits, which are null when a shard of the vocabulary is empty
  check(lldfast::logprob_forward(in, out, at<void>(workspace), stream_at(stream)), "logprob_fwd");
}

void logprob_bwd(uintptr_t logits, const std::string& dtype, int64_t row_stride, int64_t tokens, int64_t vocab,
                 uintptr_t rows, uintptr_t labels, uintptr_t bias, float softcap, float logit_scale, uintptr_t lse,
                 uintptr_t g, uintptr_t h, uintptr_t d_logits, int64_t d_row_stride, int64_t d_columns,
                 uintptr_t d_bias, uintptr_t stream) {
  const lldfast::LogprobInput in{at<void>(logits),  dtype_of(dtype),     row_stride,      tokens,  vocab,
                                 at<int64_t>(rows), at<int64_t>(labels), at<float>(bias), softcap, logit_scale};
  const lldfast::LogprobGrad grad{at<float>(lse), at<float>(g), at<float>(h),     at<void>(d_logits),
                                  d_row_stride,   d_columns,    at<float>(d_bias)};
  if (tokens == 0 && !grad.d_bias) return;
  const OnDeviceOf device(grad.d_bias ? grad.d_bias : grad.lse);
  check(lldfast::logprob_backward(in, grad, stream_at(stream)), "logprob_bwd");
}

size_t sketch_workspace_bytes(int64_t n, int64_t offset, int64_t k, int dots) {
  const float any = 0;  // asked for its address only: whether there are tensors to multiply with
  return lldfast::sketch_workspace_bytes(
      {nullptr, Dtype::kFloat32, n, offset, 0, nullptr, {dots > 0 ? &any : nullptr, dots > 1 ? &any : nullptr}}, k);
}

void sketch_fold(uintptr_t x, const std::string& dtype, int64_t n, int64_t offset, uint64_t seed, uintptr_t scale,
                 uintptr_t first, uintptr_t second, uintptr_t sketch, int64_t k, uintptr_t sums, uintptr_t workspace,
                 uintptr_t stream) {
  const lldfast::SketchInput in{
      at<void>(x), dtype_of(dtype), n, offset, seed, at<float>(scale), {at<float>(first), at<float>(second)}};
  const OnDeviceOf device(at<void>(sketch));
  check(lldfast::sketch_fold(in, at<double>(sketch), k, at<double>(sums), at<void>(workspace), stream_at(stream)),
        "sketch_fold");
}

void define_kernels(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> without_gil;
  m.def("logprob_workspace_bytes", &lldfast::logprob_workspace_bytes, py::arg("tokens"), py::arg("vocab"),
        "Bytes of device memory that logprob_fwd needs as workspace, often 0.");
  m.def("logprob_fwd", &logprob_fwd, py::arg("logits"), py::arg("dtype"), py::arg("row_stride"), py::arg("tokens"),
        py::arg("vocab"), py::arg("rows"), py::arg("labels"), py::arg("bias"), py::arg("softcap"),
        py::arg("logit_scale"), py::arg("logprob"), py::arg("lse"), py::arg("argmax"), py::arg("entropy"),
        py::arg("max_logit"), py::arg("workspace"), py::arg("stream"), without_gil,
        "Log-likelihood of labels under given logits; addresses are integers, 0 for none (csrc/cuda/logprob.h).");
  m.def("logprob_bwd", &logprob_bwd, py::arg("logits"), py::arg("dtype"), py::arg("row_stride"), py::arg("tokens"),
        py::arg("vocab"), py::arg("rows"), py::arg("labels"), py::arg("bias"), py::arg("softcap"),
        py::arg("logit_scale"), py::arg("lse"), py::arg("g"), py::arg("h"), py::arg("d_logits"),
        py::arg("d_row_stride"), py::arg("d_columns"), py::arg("d_bias"), py::arg("stream"), without_gil,
        "Gradient of sum(g logprob + h lse); d_logits may be the logits (csrc/cuda/logprob.h).");
  m.def("sketch_workspace_bytes", &sketch_workspace_bytes, py::arg("n"), py::arg("offset"), py::arg("k"),
        py::arg("dots"), "Bytes of device memory that sketch_fold needs as workspace for so many inner products.");
  m.def("sketch_fold", &sketch_fold, py::arg("x"), py::arg("dtype"), py::arg("n"), py::arg("offset"), py::arg("seed"),
        py::arg("scale"), py::arg("first"), py::arg("second"), py::arg("sketch"), py::arg("k"), py::arg("sums"),
        py::arg("workspace"), py::arg("stream"), without_gil,
        "The signed XOR-fold of x onto sketch, and its sums (csrc/cuda/sketch.h).");
}
#endif

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA side of lldfast";
  m.def("probe", &probe, "What CUDA finds here, and why not.");
#ifdef LLDFAST_CUDA_KERNELS
  define_kernels(m);
#endif
}
