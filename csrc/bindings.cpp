// The Python module megatron_rlvr._C. Loading it registers the ops with torch's dispatcher
// (torch.ops.megatron_rlvr.*); the module itself only says how it was built and what this machine runs.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "ops/cpu/vocab_logprob_kernel.h"

namespace {

namespace cpu = megatron_rlvr::vocab_logprob::cpu;

void set_cpu_kernels(const std::string& name) {
  if (name != "portable" && name != "avx2" && name != "avx512") {
    throw pybind11::value_error("name must be portable, avx2 or avx512, got " + name);
  }
  if (!cpu::select_kernels(name.c_str())) {
    throw pybind11::value_error("name must be a set that this machine runs, got " + name);
  }
}

std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> info;
  info["version"] = MEGATRON_RLVR_VERSION;
  info["torch"] = TORCH_VERSION;
#ifdef MEGATRON_RLVR_WITH_CUDA
  info["cuda"] = "yes";
#else
  info["cuda"] = "no";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++/CUDA ops of megatron_rlvr; see megatron_rlvr.ops for the Python faces.";
  m.def("build_info", &build_info, "How this extension was built: version, torch, cuda (yes or no).");
  m.def(
      "cpu_kernels", [] { return std::string(cpu::kernels().name); },
      "The instruction set of the CPU row kernels in use: portable, avx2 or avx512.");
  m.def("set_cpu_kernels", &set_cpu_kernels, pybind11::arg("name"),
        "Chooses the CPU row kernels of this process; ValueError where the machine cannot run them.");
}
