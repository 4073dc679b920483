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

template <class T>
void reduce_positions(int64_t samples, int64_t positions, at::ArrayRef<int64_t> stats, const void* const* values,
                      const uint8_t* kept, void* const* out, uint8_t* valid) {
  at::parallel_for(0, samples, std::max<int64_t>(1, kGrainElements / positions), [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      const uint8_t* here = kept + sample * positions;
      int64_t count = 0;
      for (int64_t t = 0; t < positions; ++t) count += here[t];
      if (valid != nullptr) valid[sample] = count > 0;
      for (size_t s = 0; s < stats.size(); ++s) {
        const T* of_sample = static_cast<const T*>(values[s]) + sample * positions;
        const bool squared = stats[s] == kGradNorm;
        double sum = 0;
        for (int64_t t = 0; t < positions; ++t) {
          sum += squared ? double(of_sample[t]) * of_sample[t] : of_sample[t];
        }
        const double mean = (squared ? std::sqrt(sum) : sum) / static_cast<double>(count);
        static_cast<T*>(out[s])[sample] = count > 0 ? static_cast<T>(mean) : T(0);
      }
    }
  });
}

}  // namespace

RowShape check_rows(const at::Tensor& rows, const at::Tensor& targets, bool per_token, const char* name,
                    const char* width) {
  check_cpu(rows, name);
  check_cpu(targets, "targets");
  TORCH_CHECK_TYPE(targets.scalar_type() == at::kLong || targets.scalar_type() == at::kInt,
                   "targets must be int64 or int32, got ", targets.scalar_type());
  TORCH_CHECK_VALUE((rows.dim() == 2 || rows.dim() == 3) && rows.numel() > 0, name, " must be [N, ", width,
                    "] or [N, T, ", width, "] and not empty, got shape ", rows.sizes());
  TORCH_CHECK_VALUE(targets.sizes() == rows.sizes().slice(0, rows.dim() - 1), "targets must have the shape of ", name,
                    " ", rows.sizes(), " without the last dimension, got ", targets.sizes());
  const int64_t positions = rows.dim() == 3 ? rows.size(0) * rows.size(1) : rows.size(0);
  return {per_token ? positions : rows.size(0), positions};
}

RowShape check_row_stats(const at::Tensor& logits, const at::Tensor& targets, bool per_token) {
  dtype_of(logits, "logits");
  const RowShape shape = check_rows(logits, targets, per_token, "logits", "C");
  TORCH_CHECK_VALUE(logits.size(-1) < (int64_t{1} << 31), "at most 2^31 - 1 classes, got ", logits.size(-1));
  return shape;
}

void check_stats(at::ArrayRef<int64_t> stats) {
  TORCH_CHECK_VALUE(!stats.empty() && stats.size() <= kStats, "between 1 and ", int(kStats), " stats, got ",
                    stats.size());
  for (int64_t stat : stats) TORCH_CHECK_VALUE(stat >= 0 && stat < kStats, "unknown statistic ", stat);
}

StatsTable::StatsTable(const at::Tensor& input, at::ArrayRef<int64_t> stats, int64_t samples)
    : tensor(at::detail::empty_cpu({static_cast<int64_t>(stats.size()), samples}, compute_type(input))) {
  const int64_t bytes = samples * static_cast<int64_t>(tensor.element_size());
  for (size_t s = 0; s < stats.size(); ++s) rows[s] = static_cast<char*>(tensor.mutable_data_ptr()) + s * bytes;
}

void reduce_positions(bool is_double, int64_t samples, int64_t positions, at::ArrayRef<int64_t> stats,
                      const void* const* values, const uint8_t* kept, void* const* out, uint8_t* valid) {
  const auto reduce = is_double ? reduce_positions<double> : reduce_positions<float>;
  reduce(samples, positions, stats, values, kept, out, valid);
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
  reduce_positions(is_double, logits.size(0), args.inner, stats, args.out, args.kept, out, valid);
}

at::Tensor per_sample_stats(const at::Tensor& logits, const at::Tensor& targets, at::ArrayRef<int64_t> stats,
                            std::string_view unit, int64_t ignore_index, double label_smoothing) {
  const bool per_token = parse_choice(unit, "unit", "token", "sample");
  const RowShape shape = check_row_stats(logits, targets, per_token);
  check_stats(stats);
  StatsTable table(logits, stats, shape.samples);
  row_stats(logits, targets, stats, per_token, ignore_index, label_smoothing, table.rows, nullptr);
  return table.tensor;
}

}  // namespace adaselect
