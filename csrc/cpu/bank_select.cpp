#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "operators.h"

namespace adaselect {
namespace {

constexpr int64_t kGrainElements = 1 << 15;  // worth a thread of their own
constexpr int kUint8 = 4;                    // its place among the kernels, after the Dtypes

}  // namespace

std::tuple<at::Tensor, at::Tensor> bank_select(const at::Tensor& features, const at::Tensor& rows,
                                               const at::Tensor& theta, double norm, int64_t k, bool largest) {
  check_cpu(features, "features");
  check_cpu(rows, "rows");
  check_cpu(theta, "theta");
  TORCH_CHECK_VALUE(features.dim() == 2, "features must be [N, D], got shape ", features.sizes());
  const bool bytes = features.scalar_type() == at::kByte;
  const int kernel = bytes ? kUint8 : static_cast<int>(dtype_of(features, "features"));
  TORCH_CHECK_TYPE(rows.scalar_type() == at::kLong, "rows must be int64, got ", rows.scalar_type());
  TORCH_CHECK_VALUE(rows.dim() == 1 && rows.size(0) > 0, "rows must be [n] with n >= 1, got shape ", rows.sizes());
  const at::ScalarType type = compute_type(features);
  TORCH_CHECK_TYPE(theta.scalar_type() == type, "theta must be ", type, ", got ", theta.scalar_type());
  TORCH_CHECK_VALUE(theta.dim() == 1 && theta.size(0) == features.size(1) + 1, "theta must be [D + 1] = [",
                    features.size(1) + 1, "], got shape ", theta.sizes());
  const int64_t n = rows.size(0), total = features.size(0), columns = features.size(1);
  check_k(k, n);
  const at::Tensor bank = rows.contiguous(), weights = theta.contiguous();
  const int64_t* numbers = bank.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    TORCH_CHECK_INDEX(numbers[i] >= 0 && numbers[i] < total, "row ", numbers[i], " at place ", i,
                      " of the bank is outside [0, ", total, ")");
  }
  at::Tensor predictions = at::detail::empty_cpu({n}, type);
  const BankArgs args{features.const_data_ptr(),
                      numbers,
                      weights.const_data_ptr(),
                      features.stride(0),
                      features.stride(1),
                      columns,
                      norm,
                      predictions.mutable_data_ptr()};
  const BankFn predict = kernels().bank[kernel];
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(columns, 1));
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { predict(args, begin, end); });

  at::Tensor picked = at::detail::empty_cpu({k}, at::kLong);
  int64_t* out = picked.mutable_data_ptr<int64_t>();
  const Dtype dtype = type == at::kDouble ? Dtype::kFloat64 : Dtype::kFloat32;
  select(predictions.const_data_ptr(), dtype, 1, n, k, largest, false, out);
  for (int64_t i = 0; i < k; ++i) out[i] = numbers[out[i]];
  return {picked, predictions};
}

}  // namespace adaselect
