#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <limits>

#include "gemm.h"
#include "operators.h"

namespace adaselect {
namespace {

// A block of logits: 2 MiB of float32, which the second and third level caches hold between the product and the
// statistics. Measured at N = 2048, H = 512, V = 32,000 on two cores that others kept busy (noise of 0.1), CPU time
// over that of the plain product: 0.88 for 512 x 1024 (0.87 to 1.05 when repeated), 0.88 to 0.99 for other blocks of
// 128 to 512 rows by 256 to 1024 classes, 1.03 to 1.15 for 2048 classes, 1.05 for 1024 rows x 256. More was not
// measured.
constexpr int64_t kBlockRows = 512, kBlockClasses = kLogitsClasses;
// Features converted at a time where BLAS cannot take hidden or weight as they are: 512 to 2048 take the same time.
constexpr int64_t kBlockFeatures = kProductTerms;
// Tasks a call is cut into where the shape allows: work for the cores of a large machine. The cut depends on the shape
// alone, so that results do not depend on the number of threads.
constexpr int64_t kTasks = 64;
// Rows of partials worth a thread of their own.
constexpr int64_t kGrainRows = 512;

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

template <class T>
const LinearKernels<T>& linear_kernels() {
  if constexpr (sizeof(T) == 8) {
    return *kernels().linear64;
  } else {
    return *kernels().linear32;
  }
}

// ---- what is asked

struct Linear {
  const at::Tensor& hidden;  // [N, H] or [N, T, H]
  const at::Tensor& weight;  // [V, H]
  const std::optional<at::Tensor>& bias;
  double softcap, logit_scale;
  int64_t first_class = 0, class_stride = 1;  // of the rows of weight

  int64_t features() const { return weight.size(1); }
  int64_t classes() const { return weight.size(0); }
  int64_t inner() const { return hidden.dim() == 3 ? hidden.size(1) : 1; }
  int64_t positions() const { return hidden.size(0) * inner(); }
  // Elements from the first row of hidden to another one.
  int64_t offset(int64_t position) const {
    return position / inner() * hidden.stride(0) + position % inner() * (hidden.dim() == 3 ? hidden.stride(1) : 0);
  }
};

int64_t target_at(const at::Tensor& targets, int64_t position) {
  const bool sequences = targets.dim() == 2;
  const int64_t inner = sequences ? targets.size(1) : 1;
  const int64_t offset = position / inner * targets.stride(0) + position % inner * (sequences ? targets.stride(1) : 0);
  return targets.scalar_type() == at::kInt ? targets.const_data_ptr<int32_t>()[offset]
                                           : targets.const_data_ptr<int64_t>()[offset];
}

// The target of every position, kIgnored or, outside [0, classes), kOutside.
std::vector<int64_t> labels_of(const at::Tensor& targets, int64_t classes, int64_t ignore_index) {
  std::vector<int64_t> labels(targets.numel());
  for (int64_t i = 0; i < targets.numel(); ++i) {
    const int64_t y = target_at(targets, i);
    labels[i] = y == ignore_index ? kIgnored : y < 0 || y >= classes ? kOutside : y;
  }
  return labels;
}

void refuse_outside(const std::vector<int64_t>& labels, const at::Tensor& targets, int64_t classes,
                    int64_t ignore_index) {
  const auto bad = std::find(labels.begin(), labels.end(), kOutside);
  TORCH_CHECK_INDEX(bad == labels.end(), "target ", target_at(targets, bad - labels.begin()), " of row ",
                    bad - labels.begin(), " is outside [0, ", classes, ") and not ignore_index=", ignore_index);
}

bool needs_extras(int64_t stat) {
  return stat == kMargin || stat == kTop2Margin || stat == kEntropy || stat == kCorrect;
}

// The positions whose logits are needed: those not ignored.
struct Rows {
  std::vector<int64_t> positions, offsets;  // of hidden
  std::vector<int64_t> y, lower;            // see LogitsBlock

  Rows(const Linear& in, const std::vector<int64_t>& labels) {
    for (int64_t i = 0; i < static_cast<int64_t>(labels.size()); ++i) {
      if (labels[i] == kIgnored) continue;
      positions.push_back(i);
      offsets.push_back(in.offset(i));
      const int64_t above = labels[i] - in.first_class;  // class v of the call is the target's, or below, by this
      y.push_back(above >= 0 && above % in.class_stride == 0 ? above / in.class_stride : -1);
      lower.push_back(above > 0 ? divide_up(above, in.class_stride) : 0);
    }
  }
  int64_t size() const { return static_cast<int64_t>(positions.size()); }
};

// How rows and classes are cut into blocks, and blocks into tasks: a block of rows and a run of class blocks.
struct Plan {
  int64_t block_rows, row_blocks, block_classes, class_blocks, sets;

  Plan(int64_t rows, int64_t classes) {
    row_blocks = divide_up(rows, kBlockRows);
    block_rows = row_blocks == 0 ? 0 : round_up(divide_up(rows, row_blocks), 16);
    // a single task would leave its products to the threads of BLAS
    const int64_t fewest = row_blocks == 1 ? std::min<int64_t>(classes, 2) : 1;
    class_blocks = std::max(divide_up(classes, kBlockClasses), fewest);
    block_classes = divide_up(classes, class_blocks);
    if (block_classes > 16) block_classes = round_up(block_classes, 16);
    class_blocks = divide_up(classes, block_classes);
    sets = row_blocks == 0 ? 0 : std::min(class_blocks, divide_up(kTasks, row_blocks));
  }
  int64_t tasks() const { return row_blocks * sets; }
  // The first class block of a set; the sets differ by one block at most.
  int64_t first_block(int64_t set) const { return set * class_blocks / sets; }
};

// ---- products of a block of rows with a block of classes

// Rows of hidden or weight, in their own dtype.
struct Source {
  const char* data;
  int64_t row_stride, column_stride;
};

// One thread's memory. Half precision is converted to float32 a block at a time, as are layouts that BLAS does not
// take; the products are never rounded to half.
template <class T>
class Products {
 public:
  Products(const Linear& in, const Rows& rows, const Plan& plan)
      : in_(in),
        rows_(rows),
        dtype_(dtype_of(in.hidden, "hidden")),
        element_(in.hidden.element_size()),
        pitch_(round_up(plan.block_classes, 16) + 16),  // no power of two: rows of a tile do not share a cache set
        products_(plan.block_rows * pitch_) {}

  // Adds the classes of a task to sums [sets][rows].
  void run(const Plan& plan, int64_t task, bool extras, ClassSums<T>* sums) {
    const int64_t set = task % plan.sets, first = task / plan.sets * plan.block_rows;
    const int64_t rows = std::min(plan.block_rows, rows_.size() - first);
    for (int64_t block = plan.first_block(set); block < plan.first_block(set + 1); ++block) {
      const int64_t position = block * plan.block_classes;
      const int64_t classes = std::min(plan.block_classes, in_.classes() - position);
      multiply(first, rows, position, classes);
      linear_kernels<T>().add_logits({products_.data(), pitch_, rows, classes, bias_block(position, classes),
                                      T(in_.logit_scale), T(in_.softcap), position, extras, rows_.y.data() + first,
                                      rows_.lower.data() + first, sums + set * rows_.size() + first});
    }
  }

 private:
  // products = rows of hidden . rows of weight
  void multiply(int64_t first, int64_t rows, int64_t position, int64_t classes) {
    const bool evenly = evenly_spaced(first, rows);
    const Source h = hidden_rows(first, evenly ? rows : 1), w = weight_rows(position);
    const bool h_as_it_is = evenly && blas_takes(h, rows), w_as_it_is = blas_takes(w, classes);
    for (int64_t k = 0; k < in_.features(); k += kBlockFeatures) {
      const int64_t width = std::min(kBlockFeatures, in_.features() - k);
      const Matrix<const T> a = h_as_it_is ? view(h, k) : packed_hidden(first, rows, k, width, evenly);
      const Matrix<const T> b = w_as_it_is ? view(w, k) : packed(w, classes, k, width, weight_);
      gemm<T>(rows, classes, width, a, b.transposed(), k > 0, {products_.data(), pitch_});
    }
  }

  bool blas_takes(const Source& source, int64_t rows) const {
    return element_ == sizeof(T) && ((source.column_stride == 1 && source.row_stride >= in_.features()) ||
                                     (source.row_stride == 1 && source.column_stride >= rows));
  }
  bool evenly_spaced(int64_t first, int64_t rows) const {
    const int64_t* offsets = rows_.offsets.data() + first;
    for (int64_t i = 2; i < rows; ++i) {
      if (offsets[i] - offsets[i - 1] != offsets[1] - offsets[0]) return false;
    }
    return true;
  }
  static Matrix<const T> view(const Source& source, int64_t k) {
    return {reinterpret_cast<const T*>(source.data) + k * source.column_stride, source.row_stride,
            source.column_stride};
  }
  Source weight_rows(int64_t position) const {
    const char* data = static_cast<const char*>(in_.weight.const_data_ptr());
    return {data + position * in_.weight.stride(0) * element_, in_.weight.stride(0), in_.weight.stride(1)};
  }
  Source hidden_rows(int64_t first, int64_t rows) const {
    const int64_t* offsets = rows_.offsets.data() + first;
    return {static_cast<const char*>(in_.hidden.const_data_ptr()) + offsets[0] * element_,
            rows > 1 ? offsets[1] - offsets[0] : in_.features(), in_.hidden.stride(-1)};
  }

  void pack(const Source& source, int64_t rows, int64_t k, int64_t width, T* to) const {
    kernels().pack[static_cast<int>(dtype_)](source.data + k * source.column_stride * element_, source.row_stride,
                                             source.column_stride, rows, width, width, width, to);
  }
  Matrix<const T> packed(const Source& source, int64_t rows, int64_t k, int64_t width, std::vector<T>& memory) const {
    memory.resize(std::max<size_t>(memory.size(), rows * kBlockFeatures + kPackSlack));
    pack(source, rows, k, width, memory.data());
    return {memory.data(), width, 1};
  }
  Matrix<const T> packed_hidden(int64_t first, int64_t rows, int64_t k, int64_t width, bool evenly) {
    if (evenly) return packed(hidden_rows(first, rows), rows, k, width, hidden_);
    hidden_.resize(std::max<size_t>(hidden_.size(), rows * kBlockFeatures + kPackSlack));
    for (int64_t i = 0; i < rows; ++i) pack(hidden_rows(first + i, 1), 1, k, width, hidden_.data() + i * width);
    return {hidden_.data(), width, 1};
  }
  const T* bias_block(int64_t position, int64_t classes) {
    if (!in_.bias.has_value()) return nullptr;
    bias_.resize(std::max<size_t>(bias_.size(), classes + kPackSlack));
    const char* from = static_cast<const char*>(in_.bias->const_data_ptr());
    const int64_t stride = in_.bias->stride(0);
    kernels().pack[static_cast<int>(dtype_)](from + position * stride * element_, 0, stride, 1, classes, classes,
                                             classes, bias_.data());
    return bias_.data();
  }

  const Linear& in_;
  const Rows& rows_;
  const Dtype dtype_;
  const int64_t element_, pitch_;
  std::vector<T> products_, hidden_, weight_, bias_;
};

// Partials [kPartials, positions] of all classes of the call, 0 in the rows that are ignored.
template <class T>
at::Tensor partials_of(const Linear& in, const std::vector<int64_t>& labels, bool extras) {
  const Rows rows(in, labels);
  const Plan plan(rows.size(), in.classes());
  std::vector<ClassSums<T>> sums(plan.sets * rows.size());
  for_each_task_of(plan.tasks(), [&] {
    return [&, products = Products<T>(in, rows, plan)](int64_t task) mutable {
      products.run(plan, task, extras, sums.data());
    };
  });
  at::Tensor partials = at::detail::empty_cpu({kPartials, in.positions()}, sizeof(T) == 8 ? at::kDouble : at::kFloat);
  T* out = partials.template mutable_data_ptr<T>();
  if (rows.size() < in.positions()) std::fill_n(out, partials.numel(), T(0));
  at::parallel_for(0, rows.size(), kGrainRows, [&](int64_t begin, int64_t end) {
    linear_kernels<T>().merge({sums.data(), plan.sets, rows.size(), rows.positions.data(), in.positions(), out}, begin,
                              end);
  });
  return partials;
}

at::Tensor partials_of(const Linear& in, const std::vector<int64_t>& labels, at::ArrayRef<int64_t> stats,
                       double label_smoothing) {
  const bool extras = label_smoothing > 0 || std::any_of(stats.begin(), stats.end(), needs_extras);
  return in.hidden.scalar_type() == at::kDouble ? partials_of<double>(in, labels, extras)
                                                : partials_of<float>(in, labels, extras);
}

// Partials [sets, kPartials, N] or of one set [kPartials, N], contiguous -> out.
void combine(const at::Tensor& partials, int64_t sets, int64_t classes, const std::vector<int64_t>& labels,
             at::ArrayRef<int64_t> stats, double label_smoothing, void* const* out) {
  CombineArgs args{partials.const_data_ptr(), sets, partials.size(-1), classes, labels.data(), label_smoothing};
  args.n_stats = static_cast<int32_t>(stats.size());
  std::copy(stats.begin(), stats.end(), args.stats);
  std::copy_n(out, stats.size(), args.out);
  const auto kernel =
      partials.scalar_type() == at::kDouble ? linear_kernels<double>().combine : linear_kernels<float>().combine;
  at::parallel_for(0, args.rows, kGrainRows, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// ---- checks

void check_linear(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check_cpu(hidden, "hidden");
  check_cpu(weight, "weight");
  TORCH_CHECK(hidden.scalar_type() != at::kFloat8_e4m3fn,
              "float8 scoring needs a GPU with float8 matrix units; impl='reference' computes the same numbers slowly");
  dtype_of(hidden, "hidden");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) == hidden.size(-1),
                    "weight must be [V, H] with H = ", hidden.size(-1), " of hidden, got shape ", weight.sizes());
  TORCH_CHECK_TYPE(weight.scalar_type() == hidden.scalar_type(), "weight must have the dtype of hidden, ",
                   hidden.scalar_type(), ", got ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.size(0) < (int64_t{1} << 31), "at most 2^31 - 1 classes, got ", weight.size(0));
  if (!bias.has_value()) return;
  check_cpu(*bias, "bias");
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias must be [V] = [", weight.size(0),
                    "], got shape ", bias->sizes());
  TORCH_CHECK_TYPE(bias->scalar_type() == hidden.scalar_type(), "bias must have the dtype of hidden, ",
                   hidden.scalar_type(), ", got ", bias->scalar_type());
}

}  // namespace

void linear_row_stats(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                      const std::optional<at::Tensor>& bias, const LogitsForm& form, at::ArrayRef<int64_t> stats,
                      bool per_token, int64_t ignore_index, double label_smoothing, void* const* out, uint8_t* valid) {
  const Linear in{hidden, weight, bias, form.softcap, form.logit_scale};
  const std::vector<int64_t> labels = labels_of(targets, in.classes(), ignore_index);
  refuse_outside(labels, targets, in.classes(), ignore_index);
  const bool is_double = hidden.scalar_type() == at::kDouble;
  std::vector<uint8_t> kept(labels.size());
  std::transform(labels.begin(), labels.end(), kept.begin(), [](int64_t y) { return y != kIgnored; });
  const at::Tensor partials = partials_of(in, labels, stats, label_smoothing);
  if (per_token || in.inner() == 1) {
    combine(partials, 1, in.classes(), labels, stats, label_smoothing, out);
    if (valid != nullptr) std::copy(kept.begin(), kept.end(), valid);
    return;
  }
  const int64_t bytes = in.positions() * (is_double ? 8 : 4);
  Scratch scratch(Scratch::aligned(bytes) * static_cast<int64_t>(stats.size()));
  void* values[kStats];
  for (size_t s = 0; s < stats.size(); ++s) values[s] = scratch.take(bytes);
  combine(partials, 1, in.classes(), labels, stats, label_smoothing, values);
  reduce_positions(is_double, hidden.size(0), in.inner(), stats, values, kept.data(), out, valid);
}

at::Tensor linear_per_sample_stats(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                   const std::optional<at::Tensor>& bias, at::ArrayRef<int64_t> stats,
                                   std::string_view unit, int64_t ignore_index, double label_smoothing, double softcap,
                                   double logit_scale) {
  const bool per_token = parse_choice(unit, "unit", "token", "sample");
  const int64_t n = check_rows(hidden, targets, per_token, "hidden", "H").samples;
  check_linear(hidden, weight, bias);
  check_stats(stats);
  StatsTable table(hidden, stats, n);
  linear_row_stats(hidden, weight, targets, bias, {softcap, logit_scale}, stats, per_token, ignore_index,
                   label_smoothing, table.rows, nullptr);
  return table.tensor;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> fused_linear_select(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& state, at::ArrayRef<int64_t> methods,
    int64_t k, std::string_view unit, std::string_view order, int64_t ignore_index, double label_smoothing,
    double softcap, double logit_scale, int64_t seed, at::ArrayRef<double> options) {
  const bool per_token = parse_choice(unit, "unit", "token", "sample");
  const int64_t n = check_rows(hidden, targets, per_token, "hidden", "H").samples;
  check_linear(hidden, weight, bias);
  return select_rows(n, hidden.scalar_type() == at::kDouble, state, methods, k, order, seed, options,
                     [&](at::ArrayRef<int64_t> stats, void* const* out, uint8_t* valid) {
                       linear_row_stats(hidden, weight, targets, bias, {softcap, logit_scale}, stats, per_token,
                                        ignore_index, label_smoothing, out, valid);
                     });
}

at::Tensor linear_partials(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                           const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& hidden_scale,
                           const std::optional<at::Tensor>& weight_scale, int64_t first_class, int64_t class_stride,
                           at::ArrayRef<int64_t> stats, int64_t ignore_index, double label_smoothing, double softcap,
                           double logit_scale) {
  check_rows(hidden, targets, true, "hidden", "H");
  check_linear(hidden, weight, bias);
  check_stats(stats);
  TORCH_CHECK_VALUE(hidden.dim() == 2, "hidden must be [N, H], got shape ", hidden.sizes());
  TORCH_CHECK_VALUE(first_class >= 0 && class_stride >= 1, "first_class must be at least 0 and class_stride 1, got ",
                    first_class, " and ", class_stride);
  TORCH_CHECK_VALUE(!hidden_scale.has_value() && !weight_scale.has_value(),
                    "hidden_scale and weight_scale are for float8 hidden and weight, got ", hidden.scalar_type());
  const Linear in{hidden, weight, bias, softcap, logit_scale, first_class, class_stride};
  const std::vector<int64_t> labels = labels_of(targets, std::numeric_limits<int64_t>::max(), ignore_index);
  return partials_of(in, labels, stats, label_smoothing);
}

at::Tensor combine_partials(const at::Tensor& partials, const at::Tensor& targets, int64_t classes,
                            at::ArrayRef<int64_t> stats, int64_t ignore_index, double label_smoothing) {
  check_cpu(partials, "partials");
  check_cpu(targets, "targets");
  check_stats(stats);
  TORCH_CHECK_TYPE(partials.scalar_type() == at::kFloat || partials.scalar_type() == at::kDouble,
                   "partials must be float32 or float64, got ", partials.scalar_type());
  TORCH_CHECK_TYPE(targets.scalar_type() == at::kLong || targets.scalar_type() == at::kInt,
                   "targets must be int64 or int32, got ", targets.scalar_type());
  TORCH_CHECK_VALUE(partials.dim() == 3 && partials.size(1) == kPartials && partials.numel() > 0,
                    "partials must be [R, ", int(kPartials), ", N] and not empty, got shape ", partials.sizes());
  TORCH_CHECK_VALUE(targets.dim() == 1 && targets.size(0) == partials.size(2), "targets must be [N] = [",
                    partials.size(2), "], got shape ", targets.sizes());
  const std::vector<int64_t> labels = labels_of(targets, classes, ignore_index);
  const at::Tensor dense = partials.contiguous();
  StatsTable table(partials, stats, targets.size(0));
  combine(dense, partials.size(0), classes, labels, stats, label_smoothing, table.rows);
  return table.tensor;
}

}  // namespace adaselect
