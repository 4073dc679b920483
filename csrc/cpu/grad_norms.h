// A convolution or linear layer as the kernels of per-sample gradient norms see it, and how its norms are computed.
#pragma once

#include <array>
#include <vector>

#include "operators.h"

namespace adaselect {

using Extent = std::array<int64_t, 3>;

inline int64_t points(const Extent& extent) { return extent[0] * extent[1] * extent[2]; }

// Three spatial dimensions, leading ones where there are fewer; a linear layer is a 1 x 1 convolution of T positions.
// Strides are in elements.
struct Layer {
  Dtype dtype;
  int64_t samples = 0, groups = 1;
  int64_t channels = 0, features = 0;  // of one group
  Extent in{1, 1, 1}, out{1, 1, 1}, kernel{1, 1, 1}, stride{1, 1, 1}, padding{0, 0, 0}, dilation{1, 1, 1};
  const char* input = nullptr;
  int64_t input_sample = 0, input_channel = 0;
  Extent input_space{0, 0, 0};
  const char* grads = nullptr;  // [samples, groups * features, positions]
  int64_t grads_sample = 0, grads_channel = 0, grads_position = 0;
};

enum class Form { kDirect, kGram, kWinograd, kAuto };
Form parse_form(std::string_view form);
std::string name_of(Form form);

// The form that `form` means for the layer, never kAuto. Raises ValueError for kWinograd where it is not 3 x 3 of
// stride 1.
Form choose_form(const Layer& layer, Form form);

// totals[i] += |gradient of the weight for sample i|^2, and that of a bias where it comes with it: returns whether it
// did.
bool add_weight_sq_norms(const Layer& layer, Form form, bool bias, double* totals);

// The same of a linear layer, and weight_grad [p, d] += sum_i G_i^T A_i, bias_grad [p] += sum_it g_it (or null), both
// of the compute type. Returns whether the totals include the bias.
bool add_weight_grad_and_sq_norms(const Layer& layer, void* weight_grad, void* bias_grad, double* totals);

// totals[i] += |sum_t g_it xhat_it|^2 (weight) + |sum_t g_it|^2 (bias) of values and grads [N, T, C] in any layout.
void add_affine_sq_norms(const std::optional<at::Tensor>& values, const at::Tensor& grads,
                         const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& rstd, bool bias,
                         double* totals);

// [N] of the compute type.
at::Tensor as_sq_norms(const std::vector<double>& totals, const at::Tensor& grads);

// Calls function(T{}) with the compute type of `dtype`.
template <class Function>
void with_compute_type(Dtype dtype, Function function) {
  if (dtype == Dtype::kFloat64) {
    function(double{});
  } else {
    function(float{});
  }
}
template <class T>
const MatrixKernels<T>& matrix_kernels() {
  if constexpr (sizeof(T) == 8) {
    return *kernels().matrix64;
  } else {
    return *kernels().matrix32;
  }
}
template <class T>
constexpr Dtype kComputeDtype = sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

inline constexpr int64_t kSumBlock = 512;       // products added in the compute type before they go to float64
inline constexpr int64_t kGroupBlock = 16;      // row groups whose tiles are live at once
inline constexpr int64_t kWorkGrain = 1 << 16;  // operations worth a thread of their own

// Samples a thread takes at least.
inline int64_t sample_grain(int64_t operations) {
  return std::max<int64_t>(1, kWorkGrain / std::max<int64_t>(1, operations));
}

}  // namespace adaselect
