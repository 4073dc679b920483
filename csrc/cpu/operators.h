// The operators of adaselect_kernels/ops.py on the CPU, and the stages they share.
#pragma once

#include <c10/util/FunctionRef.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "../common.h"

namespace adaselect {

// ---- stages

struct RowShape {
  int64_t samples;    // rows of the result
  int64_t positions;  // rows of logits
};
// Rows [N, width] or [N, T, width] and their targets, but not the dtype of the rows.
RowShape check_rows(const at::Tensor& rows, const at::Tensor& targets, bool per_token, const char* name,
                    const char* width);
RowShape check_row_stats(const at::Tensor& logits, const at::Tensor& targets, bool per_token);
void check_stats(at::ArrayRef<int64_t> stats);

// The result of a call for `stats`, in the compute type of `input`.
struct StatsTable {
  at::Tensor tensor;  // [S, samples]
  void* rows[kStats];
  StatsTable(const at::Tensor& input, at::ArrayRef<int64_t> stats, int64_t samples);
};

// stats[i] of every sample -> out[i] [samples], float32 or for float64 logits float64. valid [samples] (or null): one
// of its targets is not ignore_index. Throws IndexError for a target outside [0, C).
void row_stats(const at::Tensor& logits, const at::Tensor& targets, at::ArrayRef<int64_t> stats, bool per_token,
               int64_t ignore_index, double label_smoothing, void* const* out, uint8_t* valid);

// As row_stats, of logits z = softcap tanh(u / softcap), u = logit_scale (hidden . weight^T + bias); softcap 0 is none.
struct LogitsForm {
  double softcap, logit_scale;
};
void linear_row_stats(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                      const std::optional<at::Tensor>& bias, const LogitsForm& form, at::ArrayRef<int64_t> stats,
                      bool per_token, int64_t ignore_index, double label_smoothing, void* const* out, uint8_t* valid);

// values[i] [samples, positions] -> out[i] [samples]: mean over the positions kept; grad_norm: the norm for the mean
// loss. valid [samples] (or null): one is kept.
void reduce_positions(bool is_double, int64_t samples, int64_t positions, at::ArrayRef<int64_t> stats,
                      const void* const* values, const uint8_t* kept, void* const* out, uint8_t* valid);

struct Samples {
  const void* losses;
  const void* grad_norms;  // null unless a method needs it
  const uint8_t* valid;    // or null
  Dtype dtype;
  int64_t n;
  int64_t losses_stride = 1, grad_norms_stride = 1, valid_stride = 1;
};
// Scores of the batch and the update of `state` [2M + 1] (or nothing). With `indices`, also the choice of k rows.
void batch_stage(const Samples& samples, const std::optional<at::Tensor>& state, at::ArrayRef<int64_t> methods,
                 int64_t k, int64_t seed, at::ArrayRef<double> options, float* scores, int64_t* n_valid,
                 int64_t* indices, bool by_score);
bool needs_grad_norms(at::ArrayRef<int64_t> methods);

// Rows of the k best scores, ascending or best first.
void select(const void* scores, Dtype dtype, int64_t stride, int64_t n, int64_t k, bool largest, bool by_score,
            int64_t* indices);

// The last stages of a selection of k of n rows; `row_stage` fills their losses, gradient norms where a method needs
// them, and which are valid: see row_stats.
using RowStage = c10::function_ref<void(at::ArrayRef<int64_t> stats, void* const* out, uint8_t* valid)>;
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> select_rows(
    int64_t n, bool is_double, const std::optional<at::Tensor>& state, at::ArrayRef<int64_t> methods, int64_t k,
    std::string_view order, int64_t seed, at::ArrayRef<double> options, RowStage row_stage);

// ---- operators

at::Tensor per_sample_stats(const at::Tensor& logits, const at::Tensor& targets, at::ArrayRef<int64_t> stats,
                            std::string_view unit, int64_t ignore_index, double label_smoothing);
std::tuple<at::Tensor, at::Tensor> batch_scores(const at::Tensor& losses, const std::optional<at::Tensor>& grad_norms,
                                                const std::optional<at::Tensor>& valid,
                                                const std::optional<at::Tensor>& state, at::ArrayRef<int64_t> methods,
                                                int64_t k, int64_t seed, at::ArrayRef<double> options);
at::Tensor select_topk(const at::Tensor& scores, int64_t k, bool largest, std::string_view order);
std::tuple<at::Tensor, at::Tensor, at::Tensor> select_from_losses(
    const at::Tensor& losses, const std::optional<at::Tensor>& grad_norms, const std::optional<at::Tensor>& state,
    at::ArrayRef<int64_t> methods, int64_t k, std::string_view order, int64_t seed, at::ArrayRef<double> options);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> fused_select(
    const at::Tensor& logits, const at::Tensor& targets, const std::optional<at::Tensor>& state,
    at::ArrayRef<int64_t> methods, int64_t k, std::string_view unit, std::string_view order, int64_t ignore_index,
    double label_smoothing, int64_t seed, at::ArrayRef<double> options);

at::Tensor linear_per_sample_stats(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                   const std::optional<at::Tensor>& bias, at::ArrayRef<int64_t> stats,
                                   std::string_view unit, int64_t ignore_index, double label_smoothing, double softcap,
                                   double logit_scale);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> fused_linear_select(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& state, at::ArrayRef<int64_t> methods,
    int64_t k, std::string_view unit, std::string_view order, int64_t ignore_index, double label_smoothing,
    double softcap, double logit_scale, int64_t seed, at::ArrayRef<double> options);
at::Tensor linear_partials(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                           const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& hidden_scale,
                           const std::optional<at::Tensor>& weight_scale, int64_t first_class, int64_t class_stride,
                           at::ArrayRef<int64_t> stats, int64_t ignore_index, double label_smoothing, double softcap,
                           double logit_scale);
at::Tensor combine_partials(const at::Tensor& partials, const at::Tensor& targets, int64_t classes,
                            at::ArrayRef<int64_t> stats, int64_t ignore_index, double label_smoothing);

std::tuple<at::Tensor, at::Tensor> bank_select(const at::Tensor& features, const at::Tensor& rows,
                                               const at::Tensor& theta, double norm, int64_t k, bool largest);

at::Tensor select_mask(const at::Tensor& scores, double gamma);

// Gradients of weighted losses, see adaselect_kernels/ops.py.
at::Tensor cross_entropy_backward(const at::Tensor& row_weight, const at::Tensor& logits, const at::Tensor& targets,
                                  const at::Tensor& lse, double label_smoothing, double softcap, double z_loss);
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_loss_backward(
    const at::Tensor& row_weight, const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& targets,
    const at::Tensor& lse, const std::optional<at::Tensor>& bias, int64_t first_class, int64_t classes,
    double label_smoothing, double softcap, double logit_scale, double z_loss, std::array<bool, 3> wanted);

// Per-sample squared norms [N] of gradients, see adaselect_kernels/ops.py.
at::Tensor linear_grad_sq_norms(const at::Tensor& activations, const at::Tensor& grads, bool weight, bool bias,
                                std::string_view form);
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_grads_and_sq_norms(const at::Tensor& activations,
                                                                         const at::Tensor& grads, bool bias);
at::Tensor conv_grad_sq_norms(const at::Tensor& input, const at::Tensor& grads, at::IntArrayRef kernel_size,
                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                              bool weight, bool bias, std::string_view form);
at::Tensor embedding_grad_sq_norms(const at::Tensor& ids, const at::Tensor& grads, int64_t padding_idx);
at::Tensor affine_grad_sq_norms(const at::Tensor& values, const at::Tensor& grads,
                                const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& rstd,
                                bool weight, bool bias);

// The form "auto" takes, "direct", "gram" or "winograd"; takes the arguments of the operators.
std::string linear_grad_form(const at::Tensor& activations, const at::Tensor& grads);
std::string conv_grad_form(const at::Tensor& input, const at::Tensor& grads, at::IntArrayRef kernel_size,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);

}  // namespace adaselect
