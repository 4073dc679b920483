// Module _C: the CPU operators as plain functions, for eager calls that need no dispatcher, and facts about the build.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "cpu/operators.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
  #define ADASELECT_COMPILER "clang " __clang_version__
#else
  #define ADASELECT_COMPILER "gcc " __VERSION__
#endif

py::dict build_info() {
  py::dict info;
  info["instruction_sets"] = adaselect::compiled_instruction_sets();
  info["cpu_capability"] = adaselect::kernels().name;
  info["threads"] = at::get_num_threads();
  info["compiler"] = ADASELECT_COMPILER;
  info["torch_version"] = TORCH_VERSION;
  info["cuda_targets"] = py::list();
  info["sanitizers"] = ADASELECT_SANITIZERS;
  return info;
}

using MaybeTensor = std::optional<at::Tensor>;
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const c10::IndexError& e) {
      py::set_error(PyExc_IndexError, e.what_without_backtrace());
    } catch (const c10::ValueError& e) {
      py::set_error(PyExc_ValueError, e.what_without_backtrace());
    } catch (const c10::TypeError& e) {
      py::set_error(PyExc_TypeError, e.what_without_backtrace());
    }
  });
  adaselect::kernels();  // refuses an unknown ADASELECT_CPU_CAPABILITY at import
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("build_info", build_info);
  m.def(
      "per_sample_stats",
      [](const at::Tensor& logits, const at::Tensor& targets, const Ints& stats, std::string_view unit,
         int64_t ignore_index, double label_smoothing) {
        return adaselect::per_sample_stats(logits, targets, stats, unit, ignore_index, label_smoothing);
      },
      Unlocked());
  m.def(
      "batch_scores",
      [](const at::Tensor& losses, const MaybeTensor& grad_norms, const MaybeTensor& valid, const MaybeTensor& state,
         const Ints& methods, int64_t k, int64_t seed, const Floats& options) {
        return adaselect::batch_scores(losses, grad_norms, valid, state, methods, k, seed, options);
      },
      Unlocked());
  m.def("select_topk", adaselect::select_topk, Unlocked());
  m.def(
      "select_from_losses",
      [](const at::Tensor& losses, const MaybeTensor& grad_norms, const MaybeTensor& state, const Ints& methods,
         int64_t k, std::string_view order, int64_t seed, const Floats& options) {
        return adaselect::select_from_losses(losses, grad_norms, state, methods, k, order, seed, options);
      },
      Unlocked());
  m.def(
      "fused_select",
      [](const at::Tensor& logits, const at::Tensor& targets, const MaybeTensor& state, const Ints& methods, int64_t k,
         std::string_view unit, std::string_view order, int64_t ignore_index, double label_smoothing, int64_t seed,
         const Floats& options) {
        return adaselect::fused_select(logits, targets, state, methods, k, unit, order, ignore_index, label_smoothing,
                                       seed, options);
      },
      Unlocked());
  m.def("select_mask", adaselect::select_mask, Unlocked());
  m.def("cross_entropy_backward", adaselect::cross_entropy_backward, Unlocked());
  m.def("linear_loss_backward", adaselect::linear_loss_backward, Unlocked());
  m.def(
      "linear_per_sample_stats",
      [](const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets, const MaybeTensor& bias,
         const Ints& stats, std::string_view unit, int64_t ignore_index, double label_smoothing, double softcap,
         double logit_scale) {
        return adaselect::linear_per_sample_stats(hidden, weight, targets, bias, stats, unit, ignore_index,
                                                  label_smoothing, softcap, logit_scale);
      },
      Unlocked());
  m.def(
      "fused_linear_select",
      [](const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets, const MaybeTensor& bias,
         const MaybeTensor& state, const Ints& methods, int64_t k, std::string_view unit, std::string_view order,
         int64_t ignore_index, double label_smoothing, double softcap, double logit_scale, int64_t seed,
         const Floats& options) {
        return adaselect::fused_linear_select(hidden, weight, targets, bias, state, methods, k, unit, order,
                                              ignore_index, label_smoothing, softcap, logit_scale, seed, options);
      },
      Unlocked());
  m.def(
      "linear_partials",
      [](const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets, const MaybeTensor& bias,
         const MaybeTensor& hidden_scale, const MaybeTensor& weight_scale, int64_t first_class, int64_t class_stride,
         const Ints& stats, int64_t ignore_index, double label_smoothing, double softcap, double logit_scale) {
        return adaselect::linear_partials(hidden, weight, targets, bias, hidden_scale, weight_scale, first_class,
                                          class_stride, stats, ignore_index, label_smoothing, softcap, logit_scale);
      },
      Unlocked());
  m.def(
      "combine_partials",
      [](const at::Tensor& partials, const at::Tensor& targets, int64_t classes, const Ints& stats,
         int64_t ignore_index, double label_smoothing) {
        return adaselect::combine_partials(partials, targets, classes, stats, ignore_index, label_smoothing);
      },
      Unlocked());
  m.def("bank_select", adaselect::bank_select, Unlocked());
  m.def("linear_grad_sq_norms", adaselect::linear_grad_sq_norms, Unlocked());
  m.def("linear_grads_and_sq_norms", adaselect::linear_grads_and_sq_norms, Unlocked());
  m.def(
      "conv_grad_sq_norms",
      [](const at::Tensor& input, const at::Tensor& grads, const Ints& kernel_size, const Ints& stride,
         const Ints& padding, const Ints& dilation, int64_t groups, bool weight, bool bias, std::string_view form) {
        return adaselect::conv_grad_sq_norms(input, grads, kernel_size, stride, padding, dilation, groups, weight, bias,
                                             form);
      },
      Unlocked());
  m.def("embedding_grad_sq_norms", adaselect::embedding_grad_sq_norms, Unlocked());
  m.def("affine_grad_sq_norms", adaselect::affine_grad_sq_norms, Unlocked());
  m.def("linear_grad_form", adaselect::linear_grad_form, Unlocked());
  m.def(
      "conv_grad_form",
      [](const at::Tensor& input, const at::Tensor& grads, const Ints& kernel_size, const Ints& stride,
         const Ints& padding, const Ints& dilation, int64_t groups) {
        return adaselect::conv_grad_form(input, grads, kernel_size, stride, padding, dilation, groups);
      },
      Unlocked());
}
