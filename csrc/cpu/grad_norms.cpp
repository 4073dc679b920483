// Operators of per-sample gradient norms: checks, bias terms, embeddings and normalisation layers.
#include "grad_norms.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>

namespace adaselect {
namespace {

void check_pair(const at::Tensor& values, const char* name, const at::Tensor& grads) {
  check_cpu(values, name);
  check_cpu(grads, "grads");
  dtype_of(values, name);
  dtype_of(grads, "grads");
  TORCH_CHECK_TYPE(values.scalar_type() == grads.scalar_type(), name, " and grads must have the same dtype, got ",
                   values.scalar_type(), " and ", grads.scalar_type());
}

void check_sequences(const at::Tensor& activations, const at::Tensor& grads) {
  check_pair(activations, "activations", grads);
  TORCH_CHECK_VALUE(activations.dim() == 3 && grads.dim() == 3 && activations.size(0) == grads.size(0) &&
                        activations.size(1) == grads.size(1),
                    "activations must be [N, T, d] and grads [N, T, p], got shapes ", activations.sizes(), " and ",
                    grads.sizes());
}

Layer linear_layer(const at::Tensor& activations, const at::Tensor& grads) {
  Layer layer{};
  layer.dtype = dtype_of(grads, "grads");
  layer.samples = grads.size(0);
  layer.channels = activations.size(2);
  layer.features = grads.size(2);
  layer.in[2] = layer.out[2] = grads.size(1);
  layer.input = static_cast<const char*>(activations.const_data_ptr());
  layer.input_sample = activations.stride(0);
  layer.input_channel = activations.stride(2);
  layer.input_space[2] = activations.stride(1);
  layer.grads = static_cast<const char*>(grads.const_data_ptr());
  layer.grads_sample = grads.stride(0);
  layer.grads_channel = grads.stride(2);
  layer.grads_position = grads.stride(1);
  return layer;
}

void check_conv(const at::Tensor& input, const at::Tensor& grads, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  check_pair(input, "input", grads);
  const int64_t space = input.dim() - 2;
  TORCH_CHECK_VALUE(space >= 1 && space <= 3 && grads.dim() == input.dim() && input.size(0) == grads.size(0),
                    "input must be [N, C, ...] and grads [N, O, ...] with one to three spatial dimensions, got shapes ",
                    input.sizes(), " and ", grads.sizes());
  const auto check_list = [&](at::IntArrayRef list, const char* name, int64_t least) {
    TORCH_CHECK_VALUE(static_cast<int64_t>(list.size()) == space &&
                          std::all_of(list.begin(), list.end(), [&](int64_t i) { return i >= least; }),
                      name, " must be ", space, " integers >= ", least, ", got ", list);
  };
  check_list(kernel_size, "kernel_size", 1);
  check_list(stride, "stride", 1);
  check_list(padding, "padding", 0);
  check_list(dilation, "dilation", 1);
  TORCH_CHECK_VALUE(groups >= 1 && input.size(1) % groups == 0 && grads.size(1) % groups == 0, "groups=", groups,
                    " must divide the channels ", input.size(1), " of input and ", grads.size(1), " of grads");
  for (int64_t i = 0; i < space; ++i) {
    const int64_t room = input.size(i + 2) + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1;
    const int64_t expected = room < 0 ? 0 : room / stride[i] + 1;
    TORCH_CHECK_VALUE(grads.size(i + 2) == expected, "grads must have ", expected,
                      " positions along spatial dimension ", i, " for an input of ", input.size(i + 2), ", got shape ",
                      grads.sizes());
  }
}

// `grads` is [N, O, positions].
Layer conv_layer(const at::Tensor& input, const at::Tensor& grads, at::IntArrayRef out, at::IntArrayRef kernel_size,
                 at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  Layer layer{};
  layer.dtype = dtype_of(grads, "grads");
  layer.samples = grads.size(0);
  layer.groups = groups;
  layer.channels = input.size(1) / groups;
  layer.features = grads.size(1) / groups;
  layer.input = static_cast<const char*>(input.const_data_ptr());
  layer.input_sample = input.stride(0);
  layer.input_channel = input.stride(1);
  layer.grads = static_cast<const char*>(grads.const_data_ptr());
  layer.grads_sample = grads.stride(0);
  layer.grads_channel = grads.stride(1);
  layer.grads_position = grads.stride(2);
  const int64_t space = static_cast<int64_t>(out.size());
  bool pointwise = true;
  for (int64_t i = 0, to = 3 - space; i < space; ++i, ++to) {
    const bool strided_view = kernel_size[i] == 1 && padding[i] == 0;  // a stride of 1 over every stride-th point
    layer.in[to] = strided_view ? out[i] : input.size(i + 2);
    layer.out[to] = out[i];
    layer.kernel[to] = kernel_size[i];
    layer.stride[to] = strided_view ? 1 : stride[i];
    layer.padding[to] = padding[i];
    layer.dilation[to] = kernel_size[i] == 1 ? 1 : dilation[i];
    layer.input_space[to] = input.stride(i + 2) * (strided_view ? stride[i] : 1);
    pointwise = pointwise && strided_view;
  }
  // A 1 x 1 convolution over evenly spaced points is a linear layer.
  const Extent &n = layer.out, &step = layer.input_space;
  if (pointwise && (n[1] == 1 || step[1] == step[2] * n[2]) && (n[0] == 1 || step[0] == step[2] * n[2] * n[1])) {
    layer.in = layer.out = {1, 1, points(layer.out)};
  }
  return layer;
}

// Values and grads as one of them needs: lanes along T or C, whichever is contiguous in grads.
bool lanes_along_positions(const at::Tensor& grads) {
  return grads.stride(1) == 1 && (grads.stride(2) != 1 || grads.size(2) == 1);
}
at::Tensor with_unit_stride(const at::Tensor& tensor, bool along_positions) {
  const int64_t dim = along_positions ? 1 : 2;
  if (tensor.stride(dim) == 1 || tensor.size(dim) == 1) return tensor;
  return along_positions ? tensor.transpose(1, 2).contiguous().transpose(1, 2) : tensor.contiguous();
}

}  // namespace

at::Tensor as_sq_norms(const std::vector<double>& totals, const at::Tensor& grads) {
  at::Tensor result(at::detail::empty_cpu({static_cast<int64_t>(totals.size())}, compute_type(grads)));
  if (result.scalar_type() == at::kDouble) {
    std::copy(totals.begin(), totals.end(), result.mutable_data_ptr<double>());
  } else {
    std::copy(totals.begin(), totals.end(), result.mutable_data_ptr<float>());
  }
  return result;
}

void add_affine_sq_norms(const std::optional<at::Tensor>& given_values, const at::Tensor& given_grads,
                         const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& rstd, bool bias,
                         double* totals) {
  if (given_grads.numel() == 0) return;
  const bool along_positions = lanes_along_positions(given_grads);
  const at::Tensor grads = with_unit_stride(given_grads, along_positions);
  const at::Tensor values = given_values ? with_unit_stride(*given_values, along_positions) : at::Tensor();
  const int64_t row = along_positions ? 2 : 1, column = along_positions ? 1 : 2;
  AffineArgs args{};
  args.sum_rows = !along_positions;
  args.bias = bias;
  args.rows = grads.size(row);
  args.columns = grads.size(column);
  args.grads_row = grads.stride(row);
  if (given_values) args.values_row = values.stride(row);
  if (mean) args.mean_row = mean->stride(row), args.mean_column = mean->stride(column);
  if (rstd) args.rstd_row = rstd->stride(row), args.rstd_column = rstd->stride(column);
  const AffineFn kernel = kernels().affine[static_cast<int>(dtype_of(grads, "grads"))];
  const auto sample = [](const at::Tensor& tensor, int64_t i) {
    return static_cast<const char*>(tensor.const_data_ptr()) + i * tensor.stride(0) * tensor.element_size();
  };
  at::parallel_for(0, grads.size(0), sample_grain(args.rows * args.columns), [&](int64_t begin, int64_t end) {
    const int64_t bytes = 2 * (args.columns + kPackSlack) * 8;  // lanes of the last vector included
    Scratch scratch(bytes);
    AffineArgs mine = args;
    mine.sums = scratch.take<double>(bytes);
    for (int64_t i = begin; i < end; ++i) {
      mine.grads = sample(grads, i);
      if (given_values) mine.values = sample(values, i);
      if (mean) mine.mean = sample(*mean, i);
      if (rstd) mine.rstd = sample(*rstd, i);
      totals[i] += kernel(mine);
    }
  });
}

at::Tensor linear_grad_sq_norms(const at::Tensor& activations, const at::Tensor& grads, bool weight, bool bias,
                                std::string_view form) {
  const Form wanted = parse_form(form);
  check_sequences(activations, grads);
  std::vector<double> totals(grads.size(0));
  const bool counted = weight && add_weight_sq_norms(linear_layer(activations, grads), wanted, bias, totals.data());
  if (bias && !counted) add_affine_sq_norms(std::nullopt, grads, std::nullopt, std::nullopt, true, totals.data());
  return as_sq_norms(totals, grads);
}

std::string linear_grad_form(const at::Tensor& activations, const at::Tensor& grads) {
  check_sequences(activations, grads);
  return name_of(choose_form(linear_layer(activations, grads), Form::kAuto));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_grads_and_sq_norms(const at::Tensor& activations,
                                                                         const at::Tensor& grads, bool bias) {
  check_sequences(activations, grads);
  std::vector<double> totals(grads.size(0));
  const at::ScalarType type = compute_type(grads);
  const at::Tensor weight_grad(at::detail::empty_cpu({grads.size(2), activations.size(2)}, type));
  const at::Tensor bias_grad(at::detail::empty_cpu({bias ? grads.size(2) : 0}, type));
  weight_grad.zero_();
  bias_grad.zero_();
  const bool counted = add_weight_grad_and_sq_norms(linear_layer(activations, grads), weight_grad.mutable_data_ptr(),
                                                    bias ? bias_grad.mutable_data_ptr() : nullptr, totals.data());
  if (bias && !counted) add_affine_sq_norms(std::nullopt, grads, std::nullopt, std::nullopt, true, totals.data());
  return {as_sq_norms(totals, grads), weight_grad.to(grads.scalar_type()), bias_grad.to(grads.scalar_type())};
}

at::Tensor conv_grad_sq_norms(const at::Tensor& input, const at::Tensor& grads, at::IntArrayRef kernel_size,
                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                              bool weight, bool bias, std::string_view form) {
  const Form wanted = parse_form(form);
  check_conv(input, grads, kernel_size, stride, padding, dilation, groups);
  std::vector<double> totals(grads.size(0));
  const at::Tensor flat = grads.flatten(2);
  const bool counted = weight && add_weight_sq_norms(conv_layer(input, flat, grads.sizes().slice(2), kernel_size,
                                                                stride, padding, dilation, groups),
                                                     wanted, bias, totals.data());
  if (bias && !counted) {
    add_affine_sq_norms(std::nullopt, flat.transpose(1, 2), std::nullopt, std::nullopt, true, totals.data());
  }
  return as_sq_norms(totals, grads);
}

std::string conv_grad_form(const at::Tensor& input, const at::Tensor& grads, at::IntArrayRef kernel_size,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  check_conv(input, grads, kernel_size, stride, padding, dilation, groups);
  const at::Tensor flat = grads.flatten(2);
  const Layer layer = conv_layer(input, flat, grads.sizes().slice(2), kernel_size, stride, padding, dilation, groups);
  return name_of(choose_form(layer, Form::kAuto));
}

at::Tensor embedding_grad_sq_norms(const at::Tensor& ids, const at::Tensor& given_grads, int64_t padding_idx) {
  check_cpu(ids, "ids");
  check_cpu(given_grads, "grads");
  const Dtype dtype = dtype_of(given_grads, "grads");
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, "ids must be int64 or int32, got ",
                   ids.scalar_type());
  TORCH_CHECK_VALUE(ids.dim() == 2 && given_grads.dim() == 3 && given_grads.sizes().slice(0, 2) == ids.sizes(),
                    "ids must be [N, T] and grads [N, T, d], got shapes ", ids.sizes(), " and ", given_grads.sizes());
  std::vector<double> totals(ids.size(0));
  if (given_grads.numel() > 0) {
    const at::Tensor grads = with_unit_stride(given_grads, false);
    const SegmentFn kernel = kernels().segment[static_cast<int>(dtype)];
    const int64_t positions = ids.size(1), columns = grads.size(2);
    const bool narrow = ids.scalar_type() == at::kInt;
    const void* first_id = ids.const_data_ptr();
    const char* first_grad = static_cast<const char*>(grads.const_data_ptr());
    at::parallel_for(0, ids.size(0), sample_grain(positions * columns), [&](int64_t begin, int64_t end) {
      std::vector<std::pair<int64_t, int64_t>> sorted;  // (id, position)
      std::vector<int64_t> listed;
      for (int64_t i = begin; i < end; ++i) {
        sorted.clear();
        for (int64_t t = 0; t < positions; ++t) {
          const int64_t at = i * ids.stride(0) + t * ids.stride(1);
          const int64_t id =
              narrow ? static_cast<const int32_t*>(first_id)[at] : static_cast<const int64_t*>(first_id)[at];
          if (id != padding_idx) sorted.emplace_back(id, t);
        }
        std::sort(sorted.begin(), sorted.end());
        for (size_t from = 0, to = 0; from < sorted.size(); from = to) {
          listed.clear();
          for (; to < sorted.size() && sorted[to].first == sorted[from].first; ++to)
            listed.push_back(sorted[to].second);
          totals[i] += kernel(first_grad + i * grads.stride(0) * grads.element_size(), grads.stride(1), listed.data(),
                              static_cast<int64_t>(listed.size()), columns);
        }
      }
    });
  }
  return as_sq_norms(totals, given_grads);
}

at::Tensor affine_grad_sq_norms(const at::Tensor& values, const at::Tensor& grads,
                                const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& rstd,
                                bool weight, bool bias) {
  check_pair(values, "values", grads);
  TORCH_CHECK_VALUE(values.dim() == 3 && values.sizes() == grads.sizes(),
                    "values and grads must be [N, T, C], got shapes ", values.sizes(), " and ", grads.sizes());
  const auto check_statistic = [&](const std::optional<at::Tensor>& tensor, const char* name) {
    if (!tensor) return;
    check_cpu(*tensor, name);
    TORCH_CHECK_TYPE(tensor->scalar_type() == compute_type(grads), name, " must be ", compute_type(grads),
                     " for grads of ", grads.scalar_type(), ", got ", tensor->scalar_type());
    TORCH_CHECK_VALUE(tensor->sizes() == grads.sizes(), name, " must have the shape of grads ", grads.sizes(), ", got ",
                      tensor->sizes());
  };
  check_statistic(mean, "mean");
  check_statistic(rstd, "rstd");
  std::vector<double> totals(grads.size(0));
  if (weight) {
    add_affine_sq_norms(values, grads, mean, rstd, bias, totals.data());
  } else if (bias) {
    add_affine_sq_norms(std::nullopt, grads, std::nullopt, std::nullopt, true, totals.data());
  }
  return as_sq_norms(totals, grads);
}

}  // namespace adaselect
