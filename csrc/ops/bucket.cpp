// Many tensors end to end in one flat buffer, cast on the way, and back: what weight transfer sends. One kernel for
// all devices: the copies are ATen's, which cast, follow any strides and use all cores.

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <optional>

namespace megatron_rlvr::bucket {

namespace {

// The bytes [offset, offset + size of `like`) of `flat`, seen as `dtype` in the shape of `like`.
at::Tensor window(const at::Tensor& flat, int64_t offset, const at::Tensor& like, at::ScalarType dtype) {
  const int64_t bytes = like.numel() * static_cast<int64_t>(c10::elementSize(dtype));
  return flat.narrow(0, offset, bytes).view(dtype).view(like.sizes());
}

at::Tensor pack(at::TensorList tensors, std::optional<at::ScalarType> dtype) {
  TORCH_CHECK_VALUE(!tensors.empty(), "tensors must hold at least one tensor, got none");
  int64_t bytes = 0;
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK_VALUE(tensor.device() == tensors[0].device(), "tensors must be on one device, got ",
                      tensors[0].device(), " and ", tensor.device());
    const int64_t size = static_cast<int64_t>(c10::elementSize(dtype.value_or(tensor.scalar_type())));
    TORCH_CHECK_VALUE(bytes % size == 0, "tensors must lie at multiples of their element size in the bucket, got a ",
                      size, "-byte tensor at byte ", bytes);
    bytes += tensor.numel() * size;
  }
  const at::Tensor flat = at::empty({bytes}, tensors[0].options().dtype(at::kByte));
  int64_t offset = 0;
  for (const at::Tensor& tensor : tensors) {
    const at::ScalarType type = dtype.value_or(tensor.scalar_type());
    window(flat, offset, tensor, type).copy_(tensor);
    offset += tensor.numel() * static_cast<int64_t>(c10::elementSize(type));
  }
  return flat;
}

void unpack(const at::Tensor& flat, at::TensorList out, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(flat.dim() == 1 && flat.scalar_type() == at::kByte && flat.is_contiguous(),
                    "flat must be a contiguous uint8 vector, got ", flat.scalar_type(), " ", flat.sizes());
  int64_t bytes = 0;
  for (const at::Tensor& tensor : out) bytes += tensor.numel() * static_cast<int64_t>(c10::elementSize(dtype));
  TORCH_CHECK_VALUE(flat.numel() == bytes, "flat must have ", bytes, " bytes for these tensors, got ", flat.numel());
  int64_t offset = 0;
  for (const at::Tensor& tensor : out) {
    tensor.detach().copy_(window(flat, offset, tensor, dtype));
    offset += tensor.numel() * static_cast<int64_t>(c10::elementSize(dtype));
  }
}

// Sizes alone, symbolic where a compiler traces.
at::Tensor pack_meta(at::TensorList tensors, std::optional<at::ScalarType> dtype) {
  TORCH_CHECK_VALUE(!tensors.empty(), "tensors must hold at least one tensor, got none");
  c10::SymInt bytes = 0;
  for (const at::Tensor& tensor : tensors) {
    bytes += tensor.sym_numel() * static_cast<int64_t>(c10::elementSize(dtype.value_or(tensor.scalar_type())));
  }
  return at::empty_symint({bytes}, tensors[0].options().dtype(at::kByte));
}

void unpack_meta(const at::Tensor&, at::TensorList, at::ScalarType) {}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_rlvr, m) {
  m.def("pack_bucket(Tensor[] tensors, ScalarType? dtype) -> Tensor");
  m.def("unpack_bucket_(Tensor flat, Tensor(a!)[] out, ScalarType dtype) -> ()");
}

TORCH_LIBRARY_IMPL(megatron_rlvr, CompositeExplicitAutograd, m) {
  m.impl("pack_bucket", &pack);
  m.impl("unpack_bucket_", &unpack);
}

TORCH_LIBRARY_IMPL(megatron_rlvr, Meta, m) {
  m.impl("pack_bucket", &pack_meta);
  m.impl("unpack_bucket_", &unpack_meta);
}

}  // namespace megatron_rlvr::bucket
