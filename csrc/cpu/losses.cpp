// Gradients of weighted cross-entropies: in stored logits, and in the factors of logits that are made a block at a
// time.
#include <ATen/EmptyTensor.h>

#include <cstring>
#include <numeric>
#include <vector>

#include "gemm.h"
#include "operators.h"

namespace adaselect {
namespace {

constexpr int64_t kGrainElements = 1 << 15;  // worth a thread of their own
constexpr int64_t kBlockElements = 1 << 22;  // of a block of logits, and of the rows and classes that make it
constexpr int64_t kBlockRows = 2048;         // at most
constexpr int64_t kTileRows = 128, kTileColumns = 256;  // of a product: a task each
constexpr int64_t kStagger = 16;                        // rows a power of two apart would share cache sets

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// As many of n as fit `limit`, in whole tiles.
int64_t block_size(int64_t n, int64_t limit, int64_t tile) { return std::min(n, std::max(tile, limit / tile * tile)); }

const LossKernels& kernels_for(const at::Tensor& tensor) {
  return kernels().loss[static_cast<int>(dtype_of(tensor, "tensor"))];
}

void check_vector(const at::Tensor& vector, const char* name, int64_t n, at::ScalarType type) {
  check_cpu(vector, name);
  TORCH_CHECK_VALUE(vector.dim() == 1 && vector.size(0) == n, name, " must be [", n, "], got shape ", vector.sizes());
  TORCH_CHECK_TYPE(vector.scalar_type() == type, name, " must be ", type, ", got ", vector.scalar_type());
}

// Row weights, targets and lse of [N, ...] rows, contiguous.
struct RowInputs {
  at::Tensor row_weight, targets, lse, lse_rest;

  RowInputs(const at::Tensor& rows, const at::Tensor& weights, const at::Tensor& labels,
            const at::Tensor& normalisers) {
    const int64_t n = rows.size(0);
    check_vector(weights, "row_weight", n, compute_type(rows));
    const bool finer = normalisers.scalar_type() == at::kDouble && compute_type(rows) == at::kFloat;
    check_vector(normalisers, "lse", n, finer ? at::kDouble : compute_type(rows));
    check_vector(labels, "targets", n, labels.scalar_type() == at::kInt ? at::kInt : at::kLong);
    row_weight = weights.contiguous();
    targets = labels.to(at::kLong).contiguous();
    lse = normalisers.to(compute_type(rows)).contiguous();
    if (finer) lse_rest = normalisers.sub(lse).to(at::kFloat).contiguous();
  }
  LossArgs args(int64_t classes, double label_smoothing, double softcap, double logit_scale, double z_loss) const {
    return {row_weight.const_data_ptr(),
            lse.const_data_ptr(),
            lse_rest.defined() ? lse_rest.const_data_ptr() : nullptr,
            targets.const_data_ptr<int64_t>(),
            classes,
            label_smoothing,
            softcap,
            logit_scale,
            z_loss};
  }
};

// Rows of a stored matrix as a product takes them: where they lie, or gathered and widened into a buffer.
template <class T>
class Operand {
 public:
  Operand(const at::Tensor& stored, const std::vector<int64_t>* listed, int64_t most)
      : stored_(stored), listed_(listed) {
    const bool in_place = listed == nullptr && stored.scalar_type() == compute_type(stored) && stored.stride(1) == 1 &&
                          stored.stride(0) >= stored.size(1);
    if (!in_place) buffer_ = at::detail::empty_cpu({most, stored.size(1)}, compute_type(stored));
  }

  Matrix<const T> rows(int64_t first, int64_t n) {
    const int64_t columns = stored_.size(1), row_bytes = stored_.stride(0) * stored_.element_size();
    const char* data = static_cast<const char*>(stored_.const_data_ptr());
    if (!buffer_.defined()) return {reinterpret_cast<const T*>(data + first * row_bytes), stored_.stride(0)};
    T* out = buffer_.mutable_data_ptr<T>();
    if (first != held_first_ || n != held_) {
      const auto widen = kernels_for(stored_).widen;
      at::parallel_for(0, n, std::max<int64_t>(1, kGrainElements / columns), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = listed_ == nullptr ? first + i : (*listed_)[first + i];
          widen(data + row * row_bytes, stored_.stride(1), columns, out + i * columns);
        }
      });
      held_first_ = first;
      held_ = n;
    }
    return {out, columns};
  }

 private:
  at::Tensor stored_, buffer_;
  const std::vector<int64_t>* listed_;
  int64_t held_first_ = -1, held_ = 0;  // what the buffer holds
};

// f(row, rows, column, columns) for the tiles of a matrix, a task each.
template <class F>
void for_each_tile(int64_t rows, int64_t columns, int64_t tile_rows, int64_t tile_columns, F f) {
  const int64_t across = pieces(columns, tile_columns);
  for_each_task(pieces(rows, tile_rows) * across, [&](int64_t task) {
    const int64_t i = task / across * tile_rows, j = task % across * tile_columns;
    f(i, std::min(tile_rows, rows - i), j, std::min(tile_columns, columns - j));
  });
}

// Row i of the first `listed` to row listed[i], in place, zeros elsewhere.
template <class T>
void spread_rows(const std::vector<int64_t>& listed, int64_t rows, int64_t columns, T* matrix) {
  int64_t source = static_cast<int64_t>(listed.size()) - 1;
  for (int64_t row = rows - 1; row >= 0; --row) {
    T* out = matrix + row * columns;
    if (source >= 0 && listed[source] == row) {
      std::memmove(out, matrix + source-- * columns, sizeof(T) * columns);
    } else {
      std::memset(out, 0, sizeof(T) * columns);
    }
  }
}

struct Gradients {
  at::Tensor rows, weight, bias;  // undefined where not wanted
};

// The rows `listed` (null: all) of `rows`, whose weights, targets and lse are those of `args`, one after the other.
template <class T>
void backward(const LossArgs& args, const at::Tensor& rows, const std::vector<int64_t>* listed, int64_t n,
              const at::Tensor& weight, const std::optional<at::Tensor>& bias, int64_t first_class,
              const Gradients& grads) {
  const int64_t classes = weight.size(0), features = weight.size(1);
  const int64_t row_block = block_size(n, std::min(kBlockRows, kBlockElements / features), kTileRows);
  const int64_t class_block =
      block_size(classes, std::min(kBlockElements / row_block, kBlockElements / features), kTileColumns);
  const int64_t stride = class_block + kStagger;
  Operand<T> row_blocks(rows, listed, row_block), class_blocks(weight, nullptr, class_block);

  const bool rounded = grads.weight.defined() && weight.scalar_type() != compute_type(weight);
  const int64_t logits_bytes = Scratch::aligned(row_block * stride * sizeof(T));
  const int64_t sums_bytes = Scratch::aligned(rounded ? class_block * features * sizeof(T) : 0);
  const int64_t bias_bytes = Scratch::aligned(class_block * sizeof(double));
  Scratch scratch(logits_bytes + sums_bytes + 2 * bias_bytes);
  T* logits = scratch.take<T>(logits_bytes);
  T* weight_sums = scratch.take<T>(sums_bytes);
  double* bias_sums = scratch.take<double>(bias_bytes);
  T* bias_block = bias ? scratch.take<T>(bias_bytes) : nullptr;
  const LossKernels &stored = kernels_for(weight), &kernel = kernels().loss[sizeof(T) == 4 ? 0 : 3];

  for (int64_t first = 0; first < classes; first += class_block) {
    const int64_t count = std::min(class_block, classes - first);
    const Matrix<const T> w = class_blocks.rows(first, count);
    const auto stored_row = [&](const at::Tensor& tensor) {
      return static_cast<char*>(tensor.data_ptr()) + first * tensor.stride(0) * tensor.element_size();
    };
    if (bias) stored.widen(stored_row(*bias), bias->stride(0), count, bias_block);
    T* const weight_grad =
        rounded || !grads.weight.defined() ? weight_sums : reinterpret_cast<T*>(stored_row(grads.weight));
    std::fill_n(bias_sums, count, 0.0);

    for (int64_t begin = 0; begin < n; begin += row_block) {
      const int64_t held = std::min(row_block, n - begin);
      const Matrix<const T> x = row_blocks.rows(begin, held);
      // The logits of a tile, and over them their gradient.
      for_each_tile(held, count, kTileRows, kTileColumns, [&](int64_t i, int64_t tall, int64_t j, int64_t wide) {
        const Matrix<T> tile{logits + i * stride + j, stride};
        gemm<T>(tall, wide, features, x.at(i, 0), w.at(j, 0).transposed(), false, tile);
        kernel.grad_tile(
            args, {tile.data, stride, bias ? bias_block + j : nullptr, begin + i, tall, first_class + first + j, wide});
      });
      const Matrix<const T> g{logits, stride};
      if (grads.rows.defined()) {
        T* out = grads.rows.mutable_data_ptr<T>() + begin * features;
        for_each_tile(held, features, kTileRows, kTileColumns, [&](int64_t i, int64_t tall, int64_t j, int64_t wide) {
          gemm<T>(tall, wide, count, g.at(i, 0), w.at(0, j), first > 0, {out + i * features + j, features});
        });
      }
      if (grads.weight.defined()) {
        for_each_tile(count, features, kTileColumns, kTileColumns,
                      [&](int64_t i, int64_t tall, int64_t j, int64_t wide) {
                        gemm<T>(tall, wide, held, g.at(0, i).transposed(), x.at(0, j), begin > 0,
                                {weight_grad + i * features + j, features});
                      });
      }
      if (grads.bias.defined()) {
        for_each_task(pieces(count, kTileColumns), [&](int64_t task) {
          const int64_t j = task * kTileColumns;
          kernel.add_columns(logits + j, stride, held, std::min(kTileColumns, count - j), bias_sums + j);
        });
      }
    }
    if (rounded) stored.round_to_stored(weight_grad, count * features, stored_row(grads.weight));
    if (grads.bias.defined()) {
      std::copy_n(bias_sums, count, logits);  // free now: to the compute type, then rounded
      stored.round_to_stored(logits, count, stored_row(grads.bias));
    }
  }
}

template <class T>
void backward_of_weighted_rows(const RowInputs& inputs, LossArgs args, const at::Tensor& rows, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, int64_t first_class, const Gradients& grads) {
  const int64_t n = rows.size(0);
  const T* row_weight = inputs.row_weight.const_data_ptr<T>();
  std::vector<int64_t> listed;
  for (int64_t i = 0; i < n; ++i) {
    if (row_weight[i] != 0) listed.push_back(i);  // and NaN
  }
  const int64_t live = static_cast<int64_t>(listed.size());
  if (live == n) {
    backward<T>(args, rows, nullptr, n, weight, bias, first_class, grads);
    return;
  }
  if (live == 0) {
    for (const at::Tensor& grad : {grads.rows, grads.weight, grads.bias}) {
      if (grad.defined()) grad.zero_();
    }
    return;
  }
  std::vector<T> weights(live), lse(live), lse_rest(live);
  std::vector<int64_t> targets(live);
  for (int64_t i = 0; i < live; ++i) {
    weights[i] = row_weight[listed[i]];
    lse[i] = static_cast<const T*>(args.lse)[listed[i]];
    lse_rest[i] = args.lse_rest == nullptr ? T(0) : static_cast<const T*>(args.lse_rest)[listed[i]];
    targets[i] = args.targets[listed[i]];
  }
  args.row_weight = weights.data();
  args.lse = lse.data();
  args.lse_rest = lse_rest.data();
  args.targets = targets.data();
  backward<T>(args, rows, &listed, live, weight, bias, first_class, grads);
  if (grads.rows.defined()) spread_rows(listed, n, rows.size(1), grads.rows.mutable_data_ptr<T>());
}

}  // namespace

at::Tensor cross_entropy_backward(const at::Tensor& row_weight, const at::Tensor& logits, const at::Tensor& targets,
                                  const at::Tensor& lse, double label_smoothing, double softcap, double z_loss) {
  check_cpu(logits, "logits");
  dtype_of(logits, "logits");
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must be [N, C], got shape ", logits.sizes());
  const RowInputs inputs(logits, row_weight, targets, lse);
  at::Tensor grad = at::detail::empty_cpu(logits.sizes(), logits.scalar_type());
  if (grad.numel() == 0) return grad;
  const LossArgs args = inputs.args(logits.size(1), label_smoothing, softcap, 1.0, z_loss);
  const auto kernel = kernels_for(logits).grad_stored;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / logits.size(1));
  at::parallel_for(0, logits.size(0), grain, [&](int64_t begin, int64_t end) {
    kernel(args, logits.const_data_ptr(), logits.stride(0), logits.stride(1), begin, end, grad.mutable_data_ptr());
  });
  return grad;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_loss_backward(
    const at::Tensor& row_weight, const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& targets,
    const at::Tensor& lse, const std::optional<at::Tensor>& bias, int64_t first_class, int64_t classes,
    double label_smoothing, double softcap, double logit_scale, double z_loss, std::array<bool, 3> wanted) {
  check_cpu(rows, "rows");
  check_cpu(weight, "weight");
  dtype_of(rows, "rows");
  TORCH_CHECK_VALUE(rows.dim() == 2 && weight.dim() == 2 && rows.size(1) == weight.size(1) && weight.numel() > 0,
                    "rows must be [N, H] and weight [V, H], got shapes ", rows.sizes(), " and ", weight.sizes());
  TORCH_CHECK_TYPE(rows.scalar_type() == weight.scalar_type(), "rows and weight must have the same dtype, got ",
                   rows.scalar_type(), " and ", weight.scalar_type());
  if (bias) check_vector(*bias, "bias", weight.size(0), weight.scalar_type());
  const RowInputs inputs(rows, row_weight, targets, lse);
  const at::ScalarType type = compute_type(rows);
  const auto allocate = [](bool want, at::IntArrayRef shape, at::ScalarType dtype) -> at::Tensor {
    return at::detail::empty_cpu(want ? shape : at::IntArrayRef{0}, dtype);
  };
  const at::Tensor rows_grad = allocate(wanted[0], rows.sizes(), type);
  const at::Tensor weight_grad = allocate(wanted[1], weight.sizes(), weight.scalar_type());
  const at::Tensor bias_grad = allocate(wanted[2], weight.sizes().slice(0, 1), weight.scalar_type());
  if (wanted[0] || wanted[1] || wanted[2]) {
    const at::Tensor none;
    const Gradients grads{wanted[0] ? rows_grad : none, wanted[1] ? weight_grad : none, wanted[2] ? bias_grad : none};
    const LossArgs args = inputs.args(classes, label_smoothing, softcap, logit_scale, z_loss);
    if (type == at::kDouble) {
      backward_of_weighted_rows<double>(inputs, args, rows, weight, bias, first_class, grads);
    } else {
      backward_of_weighted_rows<float>(inputs, args, rows, weight, bias, first_class, grads);
    }
  }
  return {rows_grad, weight_grad, bias_grad};
}

}  // namespace adaselect
