#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "operators.h"

namespace adaselect {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kGrainChunks = 4;  // worth a thread of their own

// options.py PackedOptions.
struct Options {
  double beta, temperature;
  bool standardize, log_ratio, selected_loss;
  double weight_floor, curriculum_power;
  bool rms_scale, baseline;

  explicit Options(at::ArrayRef<double> o)
      : beta(o[0]),
        temperature(o[1]),
        standardize(o[2] != 0),
        log_ratio(o[3] != 0),
        selected_loss(o[4] != 0),
        weight_floor(o[5]),
        curriculum_power(o[6]),
        rms_scale(o[7] != 0),
        baseline(o[8] != 0) {}
};

// alpha of a method = sum over the terms of share * e / sum e.
struct Ingredient {
  Term term;
  double share;
};
struct Recipe {
  Ingredient parts[2];
  int count;
};
constexpr Recipe kRecipes[kMethods] = {
    {{{kBig, 1}}, 1},
    {{{kSmall, 1}}, 1},
    {{{kGrad, 1}}, 1},
    {{{kAdaBoost, 1}}, 1},
    {{{kBig, 0.5}, {kSmall, 0.5}}, 2},
    {{{kCentre, 1}}, 1},
    {{{kNoise, 1}}, 1},
};

// State of the call: a copy of the caller's (log w, L, t), or a fresh one.
struct State {
  double log_weights[kMethods], previous[kMethods], step;
  int methods;

  State(const std::optional<at::Tensor>& given, int m) : step(1), methods(m) {
    if (given.has_value()) {
      const double* values = given->const_data_ptr<double>();
      std::copy_n(values, m, log_weights);
      std::copy_n(values + m, m, previous);
      step = values[2 * m];
    } else {
      std::fill_n(log_weights, m, -std::log(m));
      std::fill_n(previous, m, kNan);
    }
  }
  void store(const std::optional<at::Tensor>& given) const {
    if (!given.has_value()) return;
    double* values = given->mutable_data_ptr<double>();
    std::copy_n(log_weights, methods, values);
    std::copy_n(previous, methods, values + methods);
    values[2 * methods] = step;
  }
};

// Clip at `floor` and rescale the rest to keep the sum 1; repeated, as the rescaling can push another one below.
void apply_floor(double* weights, int m, double floor) {
  double scaled[kMethods];
  bool clipped[kMethods] = {};
  std::copy_n(weights, m, scaled);
  for (int round = 0; round < m; ++round) {
    double rest = 0, share = 1;
    for (int i = 0; i < m; ++i) {
      clipped[i] = clipped[i] || scaled[i] <= floor;
      rest += clipped[i] ? 0 : weights[i];
      share -= clipped[i] ? floor : 0;
    }
    for (int i = 0; i < m; ++i) scaled[i] = clipped[i] ? floor : weights[i] * (share / rest);
  }
  double sum = 0;
  for (int i = 0; i < m; ++i) sum += scaled[i];
  for (int i = 0; i < m; ++i) weights[i] = scaled[i] / sum;
}

double log_sum_exp(const double* values, int m) {
  const double largest = *std::max_element(values, values + m);
  double sum = 0;
  for (int i = 0; i < m; ++i) sum += std::exp(values[i] - largest);
  return largest + std::log(sum);
}

// Equation 3; leaves the new weights in `weights`.
void update_weights(State& state, const double* method_losses, const Options& options, double* weights) {
  const int m = state.methods;
  for (int i = 0; i < m; ++i) {
    const double previous = state.previous[i], loss = method_losses[i];
    const double increment = !options.log_ratio         ? (previous - loss) / previous
                             : previous > 0 && loss > 0 ? std::log(previous / loss)
                                                        : kNan;
    if (std::isfinite(increment)) state.log_weights[i] += options.beta * increment;
    if (std::isfinite(loss)) state.previous[i] = loss;
  }
  const double normaliser = log_sum_exp(state.log_weights, m);
  for (int i = 0; i < m; ++i) {
    state.log_weights[i] -= normaliser;
    weights[i] = std::exp(state.log_weights[i]);
  }
  if (options.weight_floor > 0) {
    apply_floor(weights, m, options.weight_floor / m);
    for (int i = 0; i < m; ++i) state.log_weights[i] = std::log(weights[i]);
  }
}

// Runs pass(begin, end, partial) over the chunks of n rows; returns the partials in chunk order.
template <class Partial, class Pass>
std::vector<Partial> for_each_chunk(int64_t n, Pass pass) {
  std::vector<Partial> partials((n + kBatchChunk - 1) / kBatchChunk);
  at::parallel_for(0, partials.size(), kGrainChunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      pass(chunk * kBatchChunk, std::min(n, (chunk + 1) * kBatchChunk), partials[chunk]);
    }
  });
  return partials;
}

struct ChunkSums {
  ChunkMoments moments;
  ChunkTerms terms;
};

template <class T>
class Batch {
 public:
  Batch(const Samples& samples, at::ArrayRef<int64_t> methods, int64_t k, int64_t seed, const Options& options,
        const State& state, float* scores)
      : kernel_(kernels().batch[static_cast<int>(samples.dtype)]),
        methods_(methods),
        k_(k),
        options_(options),
        relative_to_chunk_(!options.baseline && !options.standardize && !wants(kAdaBoostMethod) && !wants(kCoreset2)) {
    args_.losses = samples.losses;
    args_.grad_norms = needs_grad_norms(methods) ? samples.grad_norms : nullptr;
    args_.valid = samples.valid;
    args_.dtype = samples.dtype;
    args_.n = samples.n;
    args_.losses_stride = samples.losses_stride;
    args_.grad_norms_stride = samples.grad_norms_stride;
    args_.valid_stride = samples.valid_stride;
    args_.seed = static_cast<uint64_t>(seed);
    args_.step = static_cast<uint64_t>(static_cast<int64_t>(state.step));
    args_.loss_scale = args_.grad_norm_scale = 1 / options_.temperature;
    args_.scores = scores;
    if (options.baseline) return;
    for (int64_t method : methods_) {
      for (int i = 0; i < kRecipes[method].count; ++i) args_.wanted[kRecipes[method].parts[i].term] = true;
    }
    if (args_.wanted[kNoise]) args_.noise = noise_memory(scores);
  }

  // Pass 1: moments, with the sums of the importances where these need nothing else of the whole batch; and, where
  // needed, deviations from the mean. Returns the number of valid rows.
  int64_t measure() {
    double loss_sum = 0, grad_norm_sum = 0, count = 0;
    args_.max_loss = args_.max_grad_norm = -kInfinity;
    args_.min_loss = kInfinity;
    const std::vector<ChunkSums> chunks =
        for_each_chunk<ChunkSums>(args_.n, [&](int64_t begin, int64_t end, ChunkSums& out) {
          kernel_.moments(args_, begin, end, out.moments, relative_to_chunk_ ? &out.terms : nullptr);
        });
    for (const auto& [moments, terms] : chunks) {
      count += moments.count;
      loss_sum += moments.loss_sum;
      loss_sum_sq_ += moments.loss_sum_sq;
      grad_norm_sum += moments.grad_norm_sum;
      args_.max_loss = std::max(args_.max_loss, moments.loss_max);
      args_.min_loss = std::min(args_.min_loss, moments.loss_min);
      args_.max_grad_norm = std::max(args_.max_grad_norm, moments.grad_norm_max);
    }
    n_valid_ = static_cast<int64_t>(count);
    args_.mean_loss = loss_sum / count;
    args_.mean_grad_norm = grad_norm_sum / count;
    if (n_valid_ == 0) return 0;
    if (relative_to_chunk_) {
      for (const auto& [moments, terms] : chunks) add_terms(terms, moments);
    }
    if (options_.standardize || wants(kCoreset2)) measure_deviations();
    return n_valid_;
  }

  // Pass 2, unless pass 1 has them: the sums of the importances; every method's loss.
  void weigh(double* method_losses) {
    if (n_valid_ == 0) {
      std::fill_n(method_losses, methods_.size(), kNan);
      return;
    }
    if (!relative_to_chunk_) run_terms();
    std::vector<T> losses;
    if (options_.selected_loss) losses = make_keys(kBigLoss);
    for (size_t i = 0; i < methods_.size(); ++i) {
      method_losses[i] = options_.selected_loss ? selected_loss(methods_[i], losses) : weighted_loss(methods_[i]);
    }
  }

  // Pass 3: s = r sum_m w^m alpha^m.
  void score(const double* weights, double step) {
    if (n_valid_ == 0) {
      std::fill_n(args_.scores, args_.n, -std::numeric_limits<float>::infinity());
      return;
    }
    for (size_t i = 0; i < methods_.size(); ++i) {
      const Recipe& recipe = kRecipes[methods_[i]];
      for (int j = 0; j < recipe.count; ++j) {
        const auto [term, share] = recipe.parts[j];
        if (sums_.sum[term] == 0) {
          args_.bias += weights[i] * share / static_cast<double>(n_valid_);
        } else {
          args_.coefficients[term] += weights[i] * share / sums_.sum[term];
        }
      }
    }
    if (!std::isnan(options_.curriculum_power) && loss_sum_sq_ > 0) {
      const double scale = options_.rms_scale ? std::sqrt(loss_sum_sq_ / static_cast<double>(n_valid_)) : loss_sum_sq_;
      args_.reward = std::pow(step, options_.curriculum_power) / scale;
    }
    for_each_chunk<char>(args_.n, [&](int64_t begin, int64_t end, char&) { kernel_.scores(args_, begin, end); });
  }

  // The raw key of the only method instead.
  void score_baseline() {
    if constexpr (std::is_same_v<T, float>) {
      fill_keys(methods_[0], args_.scores);
    } else {
      const std::vector<T> key = make_keys(methods_[0]);
      std::copy(key.begin(), key.end(), args_.scores);
    }
  }

  // The k rows that `method` alone chooses.
  void choose(int64_t method, bool by_score, int64_t* indices) const {
    if (method != kCoreset1) {
      select_rows(make_keys(method), k_, by_score, indices);
      return;
    }
    // From both ends: the rows taken from the top are NaN, which ranks after the invalid ones.
    const int64_t bottom = k_ / 2, top = k_ - bottom;
    select_rows(make_keys(kBigLoss), top, false, indices);
    std::vector<T> key = make_keys(kSmallLoss);
    for (int64_t i = 0; i < top; ++i) key[indices[i]] = std::numeric_limits<T>::quiet_NaN();
    if (bottom > 0) select_rows(key, bottom, false, indices + top);
    std::inplace_merge(indices, indices + top, indices + k_);
    if (!by_score) return;
    std::vector<float> ranked(args_.n, std::numeric_limits<float>::quiet_NaN());
    for (int64_t i = 0; i < k_; ++i) ranked[indices[i]] = args_.scores[indices[i]];
    select(ranked.data(), Dtype::kFloat32, 1, args_.n, k_, true, true, indices);
  }

 private:
  bool wants(int64_t method) const { return std::find(methods_.begin(), methods_.end(), method) != methods_.end(); }
  // Scores take the place of float32 noise.
  void* noise_memory(float* scores) {
    if constexpr (std::is_same_v<T, float>) return scores;
    noise_.emplace(args_.n * static_cast<int64_t>(sizeof(T)));
    return noise_->take(0);
  }

  void measure_deviations() {
    ChunkDeviations total{};
    args_.min_deviation = kInfinity;
    for (const ChunkDeviations& chunk : for_each_chunk<ChunkDeviations>(
             args_.n,
             [&](int64_t begin, int64_t end, ChunkDeviations& out) { kernel_.deviations(args_, begin, end, out); })) {
      total.loss_sum += chunk.loss_sum;
      total.loss_sum_sq += chunk.loss_sum_sq;
      total.grad_norm_sum += chunk.grad_norm_sum;
      total.grad_norm_sum_sq += chunk.grad_norm_sum_sq;
      args_.min_deviation = std::min(args_.min_deviation, chunk.loss_min_abs);
    }
    // What the deviations add up to is what the sum of the losses rounded away.
    args_.mean_loss = double(T(args_.mean_loss)) + total.loss_sum / static_cast<double>(n_valid_);
    if (!options_.standardize) return;
    args_.loss_scale /= deviation(total.loss_sum, total.loss_sum_sq) + kStdEps;
    args_.grad_norm_scale /= deviation(total.grad_norm_sum, total.grad_norm_sum_sq) + kStdEps;
  }
  // Standard deviation from sums about the rounded mean.
  double deviation(double sum, double sum_sq) const {
    const double n = static_cast<double>(n_valid_);
    return std::sqrt(std::max(sum_sq / n - (sum / n) * (sum / n), 0.0));
  }

  void run_terms() {
    for (const ChunkTerms& chunk : for_each_chunk<ChunkTerms>(
             args_.n, [&](int64_t begin, int64_t end, ChunkTerms& out) { kernel_.terms(args_, begin, end, out); })) {
      add_terms(chunk);
    }
  }
  void add_terms(const ChunkTerms& chunk) {
    for (int term = 0; term < kTerms; ++term) {
      sums_.sum[term] += chunk.sum[term];
      sums_.loss_sum[term] += chunk.loss_sum[term];
    }
  }
  // Of a chunk whose softmaxes are relative to its own extremes.
  void add_terms(ChunkTerms chunk, const ChunkMoments& moments) {
    const auto rescale = [&](Term term, double exponent) {
      if (!args_.wanted[term]) return;
      const double factor = std::exp(exponent);
      chunk.sum[term] *= factor;
      chunk.loss_sum[term] *= factor;
    };
    rescale(kBig, (moments.loss_max - args_.max_loss) * args_.loss_scale);
    rescale(kSmall, (args_.min_loss - moments.loss_min) * args_.loss_scale);
    rescale(kGrad, (moments.grad_norm_max - args_.max_grad_norm) * args_.grad_norm_scale);
    add_terms(chunk);
  }

  double weighted_loss(int64_t method) const {
    double loss = 0;
    for (int i = 0; i < kRecipes[method].count; ++i) {
      const auto [term, share] = kRecipes[method].parts[i];
      loss += share * (sums_.sum[term] == 0 ? args_.mean_loss : sums_.loss_sum[term] / sums_.sum[term]);
    }
    return loss;
  }

  // Mean of the `losses` (-inf: invalid) of the rows that the method chooses.
  double selected_loss(int64_t method, const std::vector<T>& losses) const {
    std::vector<int64_t> rows(k_);
    choose(method, false, rows.data());
    double sum = 0, count = 0;
    for (int64_t row : rows) {
      if (std::isinf(losses[row])) continue;
      sum += losses[row];
      ++count;
    }
    return sum / count;
  }

  void fill_keys(int64_t method, T* keys) const {
    for_each_chunk<char>(args_.n,
                         [&](int64_t begin, int64_t end, char&) { kernel_.keys(args_, method, begin, end, keys); });
  }
  std::vector<T> make_keys(int64_t method) const {
    std::vector<T> keys(args_.n);
    fill_keys(method, keys.data());
    return keys;
  }
  static void select_rows(const std::vector<T>& key, int64_t k, bool by_score, int64_t* indices) {
    select(key.data(), sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32, 1, static_cast<int64_t>(key.size()), k, true,
           by_score, indices);
  }

  const BatchKernels& kernel_;
  at::ArrayRef<int64_t> methods_;
  int64_t k_;
  const Options& options_;
  bool relative_to_chunk_;  // the terms are made in pass 1
  std::optional<Scratch> noise_;
  BatchArgs args_{};
  ChunkTerms sums_{};
  double loss_sum_sq_ = 0;
  int64_t n_valid_ = 0;
};

template <class T>
void run(const Samples& samples, const std::optional<at::Tensor>& given, at::ArrayRef<int64_t> methods, int64_t k,
         int64_t seed, const Options& options, float* scores, int64_t* n_valid, int64_t* indices, bool by_score) {
  State state(given, static_cast<int>(methods.size()));
  Batch<T> batch(samples, methods, k, seed, options, state, scores);
  *n_valid = batch.measure();
  if (options.baseline) {
    batch.score_baseline();
  } else {
    double method_losses[kMethods], weights[kMethods];
    batch.weigh(method_losses);
    update_weights(state, method_losses, options, weights);
    batch.score(weights, state.step);
  }
  if (indices != nullptr) {
    if (options.baseline && methods[0] == kCoreset1) {
      batch.choose(kCoreset1, by_score, indices);
    } else {
      select(scores, Dtype::kFloat32, 1, samples.n, k, true, by_score, indices);
    }
  }
  state.step += 1;
  state.store(given);
}

void check_methods(at::ArrayRef<int64_t> methods, const std::optional<at::Tensor>& state,
                   at::ArrayRef<double> options) {
  bool seen[kMethods] = {};
  TORCH_CHECK_VALUE(!methods.empty(), "methods must name at least one");
  for (int64_t method : methods) {
    TORCH_CHECK_VALUE(method >= 0 && method < kMethods && !seen[method], "methods must be distinct and known, got ",
                      methods);
    seen[method] = true;
  }
  TORCH_CHECK_VALUE(options.size() == 9, "options must be the 9 numbers of PackedOptions, got ", options.size());
  if (!state.has_value()) return;
  check_cpu(*state, "state");
  TORCH_CHECK_VALUE(state->scalar_type() == at::kDouble && state->is_contiguous() &&
                        state->numel() == 2 * static_cast<int64_t>(methods.size()) + 1,
                    "state must be a contiguous float64 [2 M + 1] of ", methods.size(), " methods, got ",
                    state->scalar_type(), " ", state->sizes());
}

Samples samples_of(const at::Tensor& losses, const std::optional<at::Tensor>& grad_norms,
                   const std::optional<at::Tensor>& valid, at::ArrayRef<int64_t> methods) {
  check_float_vector(losses, "losses");
  Samples samples{losses.const_data_ptr(),    nullptr,        nullptr,
                  dtype_of(losses, "losses"), losses.size(0), losses.stride(0)};
  if (needs_grad_norms(methods)) {
    TORCH_CHECK_VALUE(grad_norms.has_value(), "the method 'grad_norm' needs grad_norms [N], got None");
    check_float_vector(*grad_norms, "grad_norms");
    TORCH_CHECK_VALUE(grad_norms->sizes() == losses.sizes() && grad_norms->scalar_type() == losses.scalar_type(),
                      "grad_norms must be like losses, ", losses.scalar_type(), " ", losses.sizes(), ", got ",
                      grad_norms->scalar_type(), " ", grad_norms->sizes());
    samples.grad_norms = grad_norms->const_data_ptr();
    samples.grad_norms_stride = grad_norms->stride(0);
  }
  if (valid.has_value()) {
    check_cpu(*valid, "valid");
    TORCH_CHECK_VALUE(valid->scalar_type() == at::kBool && valid->sizes() == losses.sizes(), "valid must be bool ",
                      losses.sizes(), ", got ", valid->scalar_type(), " ", valid->sizes());
    samples.valid = static_cast<const uint8_t*>(valid->const_data_ptr());
    samples.valid_stride = valid->stride(0);
  }
  return samples;
}

}  // namespace

bool needs_grad_norms(at::ArrayRef<int64_t> methods) {
  return std::find(methods.begin(), methods.end(), kGradNormMethod) != methods.end();
}

void batch_stage(const Samples& samples, const std::optional<at::Tensor>& state, at::ArrayRef<int64_t> methods,
                 int64_t k, int64_t seed, at::ArrayRef<double> options, float* scores, int64_t* n_valid,
                 int64_t* indices, bool by_score) {
  const Options parsed(options);
  if (samples.dtype == Dtype::kFloat64) {
    run<double>(samples, state, methods, k, seed, parsed, scores, n_valid, indices, by_score);
  } else {
    run<float>(samples, state, methods, k, seed, parsed, scores, n_valid, indices, by_score);
  }
}

std::tuple<at::Tensor, at::Tensor> batch_scores(const at::Tensor& losses, const std::optional<at::Tensor>& grad_norms,
                                                const std::optional<at::Tensor>& valid,
                                                const std::optional<at::Tensor>& state, at::ArrayRef<int64_t> methods,
                                                int64_t k, int64_t seed, at::ArrayRef<double> options) {
  check_methods(methods, state, options);
  const Samples samples = samples_of(losses, grad_norms, valid, methods);
  check_k(k, samples.n);
  at::Tensor scores = at::detail::empty_cpu({samples.n}, at::kFloat);
  at::Tensor n_valid = at::detail::empty_cpu({}, at::kLong);
  batch_stage(samples, state, methods, k, seed, options, scores.mutable_data_ptr<float>(),
              n_valid.mutable_data_ptr<int64_t>(), nullptr, false);
  return {scores, n_valid};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> select_from_losses(
    const at::Tensor& losses, const std::optional<at::Tensor>& grad_norms, const std::optional<at::Tensor>& state,
    at::ArrayRef<int64_t> methods, int64_t k, std::string_view order, int64_t seed, at::ArrayRef<double> options) {
  check_methods(methods, state, options);
  const bool by_score = parse_choice(order, "order", "score", "index");
  const Samples samples = samples_of(losses, grad_norms, std::nullopt, methods);
  check_k(k, samples.n);
  at::Tensor indices = at::detail::empty_cpu({k}, at::kLong);
  at::Tensor scores = at::detail::empty_cpu({samples.n}, at::kFloat);
  at::Tensor n_valid = at::detail::empty_cpu({}, at::kLong);
  batch_stage(samples, state, methods, k, seed, options, scores.mutable_data_ptr<float>(),
              n_valid.mutable_data_ptr<int64_t>(), indices.mutable_data_ptr<int64_t>(), by_score);
  return {indices, scores, n_valid};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> select_rows(
    int64_t n, bool is_double, const std::optional<at::Tensor>& state, at::ArrayRef<int64_t> methods, int64_t k,
    std::string_view order, int64_t seed, at::ArrayRef<double> options, RowStage row_stage) {
  check_methods(methods, state, options);
  const bool by_score = parse_choice(order, "order", "score", "index");
  check_k(k, n);
  at::Tensor indices = at::detail::empty_cpu({k}, at::kLong);
  at::Tensor scores = at::detail::empty_cpu({n}, at::kFloat);
  at::Tensor losses = at::detail::empty_cpu({n}, at::kFloat);
  at::Tensor n_valid = at::detail::empty_cpu({}, at::kLong);

  const int64_t bytes = n * (is_double ? 8 : 4);
  Scratch scratch(2 * Scratch::aligned(bytes) + Scratch::aligned(n));
  void* row_losses = is_double ? scratch.take(bytes) : losses.mutable_data_ptr();
  void* grad_norms = scratch.take(bytes);
  uint8_t* valid = scratch.take<uint8_t>(n);
  const int64_t stats[] = {kLoss, kGradNorm};
  void* const out[] = {row_losses, grad_norms};
  const size_t n_stats = needs_grad_norms(methods) ? 2 : 1;
  row_stage(at::ArrayRef<int64_t>(stats, n_stats), out, valid);
  if (is_double) std::copy_n(static_cast<const double*>(row_losses), n, losses.mutable_data_ptr<float>());

  const Samples samples{row_losses, grad_norms, valid, is_double ? Dtype::kFloat64 : Dtype::kFloat32, n};
  batch_stage(samples, state, methods, k, seed, options, scores.mutable_data_ptr<float>(),
              n_valid.mutable_data_ptr<int64_t>(), indices.mutable_data_ptr<int64_t>(), by_score);
  return {indices, scores, losses, n_valid};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> fused_select(
    const at::Tensor& logits, const at::Tensor& targets, const std::optional<at::Tensor>& state,
    at::ArrayRef<int64_t> methods, int64_t k, std::string_view unit, std::string_view order, int64_t ignore_index,
    double label_smoothing, int64_t seed, at::ArrayRef<double> options) {
  const bool per_token = parse_choice(unit, "unit", "token", "sample");
  const int64_t n = check_row_stats(logits, targets, per_token).samples;
  return select_rows(n, logits.scalar_type() == at::kDouble, state, methods, k, order, seed, options,
                     [&](at::ArrayRef<int64_t> stats, void* const* out, uint8_t* valid) {
                       row_stats(logits, targets, stats, per_token, ignore_index, label_smoothing, out, valid);
                     });
}

}  // namespace adaselect
