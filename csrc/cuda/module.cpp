// lldfast._cuda: built where a CUDA toolkit is. It loads without a driver; probe() then says so.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

namespace py = pybind11;

namespace {

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

// {"runtime", "driver" (None without one), "devices": [{"name", "capability", "memory_bytes", "multiprocessors"}],
//  "reason" (empty when there is a device)}. Starts the driver: do not fork after it and use CUDA in the child.
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
  return answer;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA side of lldfast";
  m.def("probe", &probe, "What CUDA finds here, and why not.");
}
