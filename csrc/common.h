// Checks and small conversions shared by the operators. functional.py words the errors a user meets; these keep a
// direct call from reading out of bounds.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include "cpu/kernels.h"

namespace adaselect {

inline Dtype dtype_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kDouble:
      return Dtype::kFloat64;
    default:
      TORCH_CHECK_TYPE(false, name, " must be float16, bfloat16, float32 or float64, got ", tensor.scalar_type());
  }
}

inline at::ScalarType compute_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_cpu(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.is_cpu(), name, " must be on the cpu, got ", tensor.device());
}

inline void check_float_vector(const at::Tensor& values, const char* name) {
  check_cpu(values, name);
  dtype_of(values, name);
  TORCH_CHECK_VALUE(values.dim() == 1 && values.size(0) > 0, name, " must be [N] with N >= 1, got shape ",
                    values.sizes());
}

inline void check_k(int64_t k, int64_t n) {
  TORCH_CHECK_VALUE(k >= 1 && k <= n, "k must be in [1, N] = [1, ", n, "], got ", k);
}

inline bool parse_choice(std::string_view got, const char* name, const char* yes, const char* no) {
  TORCH_CHECK_VALUE(got == yes || got == no, name, " must be one of '", yes, "', '", no, "'; got '", got, "'");
  return got == yes;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Temporary memory of one call, handed out in aligned pieces.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(c10::GetCPUAllocator()->allocate(bytes)) {}

  template <class T = char>
  T* take(int64_t bytes) {
    char* piece = static_cast<char*>(memory_.get()) + used_;
    used_ += aligned(bytes);
    return reinterpret_cast<T*>(piece);
  }
  static int64_t aligned(int64_t bytes) { return round_up(bytes, 64); }

 private:
  c10::DataPtr memory_;
  int64_t used_ = 0;
};

}  // namespace adaselect
