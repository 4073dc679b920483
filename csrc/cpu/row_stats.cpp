#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "operators.h"

namespace adaselect {
namespace {

// Elements of logits worth a thread of their own.
constexpr int64_t kGrainElements = 32768;

RowStatsArgs describe(const at::Tensor& logits, const at::Tensor& targets, at::ArrayRef<int64_t> stats,
                      int64_t ignore_index, double label_smoothing) {
  const bool sequences = logits.dim() == 3;
  RowStatsArgs args{};
  args.logits = logits.const_data_ptr();
  args.targets = targets.const_data_ptr();
  args.dtype = dtype_of(logits, "logits");
  args.targets_int32 = targets.scalar_type() == at::kInt;
  args.classes = logits.size(-1);
  args.inner = sequences ? logits.size(1) : 1;
  args.rows = logits.size(0) * args.inner;
  args.logits_outer = logits.stride(0);
  args.logits_inner = sequences ? logits.stride(1) : 0;
  args.logits_class = logits.stride(-1);
  args.targets_outer = targets.stride(0);
  args.targets_inner = sequences ? targets.stride(1) : 0;
  args.extent = 1;
  for (int64_t d = 0; d < logits.dim(); ++d) args.extent += (logits.size(d) - 1) * logits.stride(d);
  args.ignore_index = ignore_index;
  args.label_smoothing = label_smoothing;
  args.n_stats = static_cast<int32_t>(stats.size());
  std::copy(stats.begin(), stats.end(), args.stats);
  return args;
}

void run(const RowStatsArgs& args, const at::Tensor& targets) {
  const RowStatsFn kernel = kernels().row_stats[static_cast<int>(args.dtype)];
  const int64_t tiles = (args.rows + kRowTile - 1) / kRowTile;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (args.classes * kRowTile));
  std::atomic<int64_t> bad_row{args.rows};
  at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    const int64_t bad = kernel(args, begin * kRowTile, std::min(end * kRowTile, args.rows));
    int64_t lowest = bad_row.load();
    while (bad >= 0 && bad < lowest && !bad_row.compare_exchange_weak(lowest, bad)) {
    }
  });
  const int64_t row = bad_row.load();
  if (row < args.rows) {
    const int64_t offset = row / args.inner * args.targets_outer + row % args.inner * args.targets_inner;
    const int64_t target =
        args.targets_int32 ? targets.const_data_ptr<int32_t>()[offset] : targets.const_data_ptr<int64_t>()[offset];
    TORCH_CHECK_INDEX(false, "target ", target, " of row ", row, " is outside [0, ", args.classes,
                      ") and not ignore_index=", args.ignore_index);
  }
}

// Mean over the positions that are not ignored; grad_norm: the norm for the mean loss.
template <class T>
void reduce_positions(const RowStatsArgs& args, void* const* out, uint8_t* valid) {
  const int64_t positions = args.inner;
  at::parallel_for(0, args.rows / positions, std::max<int64_t>(1, kGrainElements / positions),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t sample = begin; sample < end; ++sample) {
                       const uint8_t* kept = args.kept + sample * positions;
                       int64_t count = 0;
                       for (int64_t t = 0; t < positions; ++t) count += kept[t];
                       if (valid != nullptr) valid[sample] = count > 0;
                       for (int32_t s = 0; s < args.n_stats; ++s) {
                         const T* values = static_cast<const T*>(args.out[s]) + sample * positions;
                         const bool squared = args.stats[s] == kGradNorm;
                         double sum = 0;
                         for (int64_t t = 0; t < positions; ++t)
                           sum += squared ? double(values[t]) * values[t] : values[t];
                         const double mean = (squared ? std::sqrt(sum) : sum) / static_cast<double>(count);
                         static_cast<T*>(out[s])[sample] = count > 0 ? static_cast<T>(mean) : T(0);
                       }
                     }
                   });
}

}  // namespace

RowShape check_row_stats(const at::Tensor& logits, const at::Tensor& targets, bool per_token) {
  check_cpu(logits, "logits");
  check_cpu(targets, "targets");
  dtype_of(logits, "logits");
  TORCH_CHECK_TYPE(targets.scalar_type() == at::kLong || targets.scalar_type() == at::kInt,
                   "targets must be int64 or int32, got ", targets.scalar_type());
  TORCH_CHECK_VALUE((logits.dim() == 2 || logits.dim() == 3) && logits.numel() > 0,
                    "logits must be [N, C] or [N, T, C] and not empty, got shape ", logits.sizes());
  TORCH_CHECK_VALUE(targets.sizes() == logits.sizes().slice(0, logits.dim() - 1),
                    "targets must have the shape of logits ", logits.sizes(), " without classes, got ",
                    targets.sizes());
  TORCH_CHECK_VALUE(logits.size(-1) < (int64_t{1} << 31), "at most 2^31 - 1 classes, got ", logits.size(-1));
  const int64_t positions = logits.dim() == 3 ? logits.size(0) * logits.size(1) : logits.size(0);
  return {per_token ? positions : logits.size(0), positions};
}

void row_stats(const at::Tensor& logits, const at::Tensor& targets, at::ArrayRef<int64_t> stats, bool per_token,
               int64_t ignore_index, double label_smoothing, void* const* out, uint8_t* valid) {
  RowStatsArgs args = describe(logits, targets, stats, ignore_index, label_smoothing);
  if (per_token || args.inner == 1) {
    std::copy_n(out, stats.size(), args.out);
    args.kept = valid;
    run(args, targets);
    return;
  }
  const bool is_double = args.dtype == Dtype::kFloat64;
  const int64_t bytes = args.rows * (is_double ? 8 : 4);
  Scratch scratch(Scratch::aligned(bytes) * args.n_stats + Scratch::aligned(args.rows));
  for (int32_t s = 0; s < args.n_stats; ++s) args.out[s] = scratch.take(bytes);
  args.kept = scratch.take<uint8_t>(args.rows);
  run(args, targets);
  if (is_double) {
    reduce_positions<double>(args, out, valid);
  } else {
    reduce_positions<float>(args, out, valid);
  }
}

at::Tensor per_sample_stats(const at::Tensor& logits, const at::Tensor& targets, at::ArrayRef<int64_t> stats,
                            std::string_view unit, int64_t ignore_index, double label_smoothing) {
  const bool per_token = parse_choice(unit, "unit", "token", "sample");
  const RowShape shape = check_row_stats(logits, targets, per_token);
  TORCH_CHECK_VALUE(!stats.empty() && stats.size() <= kStats, "between 1 and ", int(kStats), " stats, got ",
                    stats.size());
  for (int64_t stat : stats) TORCH_CHECK_VALUE(stat >= 0 && stat < kStats, "unknown statistic ", stat);
  const int64_t n_stats = static_cast<int64_t>(stats.size());
  at::Tensor table = at::detail::empty_cpu({n_stats, shape.samples}, compute_type(logits));
  void* out[kStats];
  for (int64_t s = 0; s < n_stats; ++s) {
    out[s] = static_cast<char*>(table.mutable_data_ptr()) + s * shape.samples * table.element_size();
  }
  row_stats(logits, targets, stats, per_token, ignore_index, label_smoothing, out, nullptr);
  return table;
}

}  // namespace adaselect
