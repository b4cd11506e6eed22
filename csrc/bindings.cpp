// The Python module megatron_rlvr._C. Loading it registers the ops with torch's dispatcher
// (torch.ops.megatron_rlvr.*); the module itself only says how it was built and what this machine runs.

#include <torch/extension.h>

#include <map>
#include <string>

namespace {

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
}
