// Operators with a CUDA C++ kernel, as torch.ops.adaselect_cuda; schemas as in adaselect_kernels/ops.py.
//
// The device, the stream and the result of a launch are reached through c10's interface to any device, so this file
// compiles, and is compiled by the tests, against a torch without CUDA.
#include <ATen/ATen.h>
#include <Python.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <limits>

#include "embedding_norms.h"

namespace adaselect::cuda {
namespace {

Dtype dtype_of(const at::Tensor& grads) {
  switch (grads.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kDouble:
      return Dtype::kFloat64;
    default:
      TORCH_CHECK_TYPE(false, "grads must be float16, bfloat16, float32 or float64, got ", grads.scalar_type());
  }
}

at::TensorOptions result_options(const at::Tensor& grads) {
  return grads.options().dtype(grads.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

void check(const at::Tensor& ids, const at::Tensor& grads) {
  TORCH_CHECK_VALUE(ids.dim() == 2 && grads.dim() == 3 && ids.sizes() == grads.sizes().slice(0, 2),
                    "ids must be [N, T] and grads [N, T, d], got ", ids.sizes(), " and ", grads.sizes());
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, "ids must be int32 or int64, got ",
                   ids.scalar_type());
  TORCH_CHECK_VALUE(ids.device() == grads.device(), "ids and grads must be on one device, got ", ids.device(), " and ",
                    grads.device());
  dtype_of(grads);
}

// Rows may be read 16 bytes at a time.
bool packed(const at::Tensor& grads) {
  const int64_t width = 16 / grads.element_size();
  return grads.stride(2) == 1 && grads.size(2) % width == 0 && grads.stride(0) % width == 0 &&
         grads.stride(1) % width == 0 && reinterpret_cast<uintptr_t>(grads.data_ptr()) % 16 == 0;
}

at::Tensor embedding_grad_sq_norms(const at::Tensor& ids, const at::Tensor& grads, int64_t padding_idx) {
  check(ids, grads);
  const int64_t samples = grads.size(0), positions = grads.size(1), channels = grads.size(2);
  if (grads.numel() == 0) return at::zeros({samples}, result_options(grads));
  TORCH_CHECK_VALUE(positions <= std::numeric_limits<int32_t>::max(), "T must be below 2^31, got ", positions);
  const c10::DeviceGuard guard(grads.device());
  void* stream = c10::impl::VirtualGuardImpl(grads.device().type()).getStream(grads.device()).native_handle();
  const int32_t count = static_cast<int32_t>(positions);
  at::Tensor sorted, order;
  if (count <= kSortLimit) {
    sorted = at::empty({samples, positions}, ids.options().dtype(at::kLong));
    order = at::empty({samples, positions}, ids.options().dtype(at::kInt));
    sort_ids(ids.data_ptr(), ids.scalar_type() == at::kLong, samples, count, ids.stride(0), ids.stride(1),
             sorted.data_ptr<int64_t>(), order.data_ptr<int32_t>(), stream);
  } else {
    std::tie(sorted, order) = ids.sort(/*stable=*/true, /*dim=*/1, /*descending=*/false);
    sorted = sorted.to(at::kLong).contiguous();
    order = order.to(at::kInt).contiguous();
  }
  const bool wide = packed(grads);
  const int64_t blocks = channel_blocks(channels, dtype_of(grads), wide);
  TORCH_CHECK_VALUE(samples <= std::numeric_limits<int32_t>::max() / blocks,
                    "too many samples for one launch: ", samples);
  const at::Tensor partials = at::empty({samples, blocks}, result_options(grads));
  const at::Tensor out = at::empty({samples}, result_options(grads));
  embedding_sq_norms(sorted.data_ptr<int64_t>(), order.data_ptr<int32_t>(), grads.data_ptr(), dtype_of(grads), wide,
                     samples, count, channels, grads.stride(0), grads.stride(1), grads.stride(2), padding_idx,
                     partials.data_ptr(), out.data_ptr(), stream);
  return out;
}

at::Tensor embedding_shape(const at::Tensor& ids, const at::Tensor& grads, int64_t padding_idx) {
  return at::empty_symint({grads.sym_size(0)}, result_options(grads));
}

}  // namespace

TORCH_LIBRARY(adaselect_cuda, m) {
  m.def("embedding_grad_sq_norms(Tensor ids, Tensor grads, int padding_idx) -> Tensor");
}
TORCH_LIBRARY_IMPL(adaselect_cuda, CUDA, m) { m.impl("embedding_grad_sq_norms", embedding_grad_sq_norms); }
TORCH_LIBRARY_IMPL(adaselect_cuda, Meta, m) { m.impl("embedding_grad_sq_norms", embedding_shape); }

}  // namespace adaselect::cuda

// Importing the module registers the operators; it has nothing else.
PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
