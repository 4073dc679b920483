// What the kernels compute and the table through which the operators call them. No torch headers: kernel files compile
// once per instruction set and must not instantiate code that other files share.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace adaselect {

enum class Dtype { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Positions in options.py STATS.
enum Stat { kLoss, kLse, kGradNorm, kMargin, kTop2Margin, kEntropy, kConfidence, kCorrect, kStats };

// One row of statistics per position (a leading row and a second index of [N, T, C]; T = 1 for [N, C]).
struct RowStatsArgs {
  const void* logits;
  const void* targets;
  Dtype dtype;
  bool targets_int32;
  int64_t rows;     // N * T
  int64_t classes;  // C
  int64_t inner;    // T
  // Strides in elements.
  int64_t logits_outer, logits_inner, logits_class;
  int64_t targets_outer, targets_inner;
  int64_t ignore_index;
  double label_smoothing;
  int32_t stats[kStats];
  int32_t n_stats;
  void* out[kStats];  // [rows] each, float32 or, for float64 logits, float64
  uint8_t* kept;      // [rows] or null: target is not ignore_index
};

// What the classes seen so far say of a row of logits z_j, relative to `max`, at least the largest of them: sums over
// the classes but the target of e_j = exp(z_j - max), e_j^2, e_j (z_j - max), z_j - max and 1; the largest two z_j of
// these.
template <class T>
struct RowSums {
  double sum = 0, sum_sq = 0, sum_ex = 0, sum_x = 0, count = 0;
  T max = -__builtin_inf(), other_max = max, second = max;
};

// Rows [begin, end) -> the lowest row with a bad target, -1 if there is none. Ranges start at multiples of kRowTile.
using RowStatsFn = int64_t (*)(const RowStatsArgs& args, int64_t begin, int64_t end);
inline constexpr int64_t kRowTile = 16;

// ---- statistics of logits z = softcap tanh(u / softcap), u = scale (product + bias), that are never stored

// Positions in options.py PARTIALS.
enum Partial { kMax, kSum, kSumSq, kSumEx, kSecond, kBefore, kSumX, kTargetLogit, kCount, kHasNan, kPartials };

// RowSums without the target in `max`, with what else a partial tells: the largest z_j, j < y; z_y; NaN was met.
template <class T>
struct ClassSums : RowSums<T> {
  T before = -__builtin_inf(), target = 0;
  bool has_nan = false;
};

inline constexpr int64_t kLogitsClasses = 1024;  // of a block of logits, at most

// Products of hidden rows with `classes` rows of weight, each `pitch` after the other.
template <class T>
struct LogitsBlock {
  const T* products;
  int64_t pitch, rows, classes;
  const T* bias;         // [classes], or null
  T scale, softcap;      // softcap 0: none
  int64_t position;      // of the first class among those of the call
  bool extras;           // not only loss, lse, grad_norm and confidence will be read
  const int64_t* y;      // [rows] position of the target among the classes of the call, or any other number
  const int64_t* lower;  // [rows] classes of the call below the target
  ClassSums<T>* sums;    // [rows]
};

// Sums [sets][rows] -> partials [kPartials][all positions], of the sets together.
template <class T>
struct MergeArgs {
  const ClassSums<T>* sums;
  int64_t sets, rows;
  const int64_t* positions;  // [rows]
  int64_t all_positions;
  T* partials;
};

// Partials [sets][kPartials][rows] -> statistics.
struct CombineArgs {
  const void* partials;
  int64_t sets, rows, classes;
  const int64_t* y;  // [rows], kIgnored: 0, kOutside: NaN
  double label_smoothing;
  int32_t stats[kStats];
  int32_t n_stats;
  void* out[kStats];
};
inline constexpr int64_t kIgnored = -1, kOutside = -2;

template <class T>
struct LinearKernels {
  void (*add_logits)(const LogitsBlock<T>& block);
  void (*merge)(const MergeArgs<T>& args, int64_t begin, int64_t end);
  void (*combine)(const CombineArgs& args, int64_t begin, int64_t end);
};

// The batch stage works on chunks, which stay in the first-level cache: partial sums of a chunk are combined in chunk
// order, whoever computes them.
inline constexpr int64_t kBatchChunk = 2048;
inline constexpr double kAdaBoostEps = 1e-6, kStdEps = 1e-6;

// Positions in options.py METHODS.
enum Method { kBigLoss, kSmallLoss, kGradNormMethod, kAdaBoostMethod, kCoreset1, kCoreset2, kUniform, kMethods };
// Unnormalised importances e. The softmaxes are relative to their largest element.
enum Term { kBig, kSmall, kGrad, kCentre, kAdaBoost, kNoise, kTerms };

struct BatchArgs {
  // Inputs [n].
  const void* losses;
  const void* grad_norms;  // null unless the method needs it
  const uint8_t* valid;    // or null
  Dtype dtype;
  int64_t n, losses_stride, grad_norms_stride, valid_stride;
  bool wanted[kTerms];
  void* noise;  // [n] of the compute type, kept from the terms to the scores, which may overwrite it
  uint64_t seed, step;
  // Filled between the passes.
  double mean_loss, mean_grad_norm, max_loss, min_loss, max_grad_norm, min_deviation;
  double loss_scale, grad_norm_scale;  // 1 / tau, or 1 / (tau (std + eps))
  // Last pass: s = exp(-reward l) (bias + sum_j coefficient_j e_j).
  double coefficients[kTerms];
  double bias, reward;
  float* scores;
};

struct ChunkMoments {
  double count, loss_sum, loss_sum_sq, loss_max, loss_min, grad_norm_sum, grad_norm_max;
};
struct ChunkDeviations {  // of (x - mean)
  double loss_sum, loss_sum_sq, loss_min_abs, grad_norm_sum, grad_norm_sum_sq;
};
struct ChunkTerms {
  double sum[kTerms], loss_sum[kTerms];  // sum e, sum e l
};

struct BatchKernels {
  // And, unless null, the terms, with softmaxes relative to the chunk's own extremes.
  void (*moments)(const BatchArgs&, int64_t begin, int64_t end, ChunkMoments&, ChunkTerms*);
  void (*deviations)(const BatchArgs&, int64_t begin, int64_t end, ChunkDeviations&);
  void (*terms)(const BatchArgs&, int64_t begin, int64_t end, ChunkTerms&);
  void (*scores)(const BatchArgs&, int64_t begin, int64_t end);
  // keys[i], of the compute type: what `method` alone ranks row i by; -inf on invalid rows.
  void (*keys)(const BatchArgs&, int64_t method, int64_t begin, int64_t end, void* keys);
};

// Selection ranks unsigned keys: the best score has the largest key, NaN the key 0, -0.0 that of 0.0.
// Keys above `high`, equal to it, strictly between `low` and `high`, and equal to `low`.
struct SplitCounts {
  int64_t above = 0, at_high = 0, inside = 0, at_low = 0;
};
template <class Key>
struct SelectKernels {
  void (*fill)(const void* scores, int64_t stride, int64_t n, bool largest, Key* keys);
  void (*gather)(const void* scores, int64_t stride, const int64_t* rows, int64_t n, bool largest, Key* keys);
  int64_t (*count_at_least)(const Key* keys, int64_t n, Key threshold);
  int64_t (*count_equal)(const Key* keys, int64_t n, Key value);
  // Adds to `counts`; the keys inside follow the counts.inside in `inside`, which has room for n + kCompactSlack more.
  void (*split)(const Key* keys, int64_t n, Key low, Key high, Key* inside, SplitCounts& counts);
  // first_row + i of the keys >= threshold, in order, until `room` are found: returns their number.
  int64_t (*compact_rows)(const Key* keys, int64_t n, Key threshold, int64_t first_row, int64_t* out, int64_t room);
};
inline constexpr int64_t kCompactSlack = 16;

// ---- squared norms of per-sample gradients
//
// A panel holds `width` columns of a matrix, packed [k][width]; a tile is the product of `rows` columns of one matrix
// with a panel of another, summed over k in the compute type for one call and in float64 across calls.

// Steps of a sum over k: positions first, first + step, ... of a panel.
struct Run {
  int64_t first, length;
};

// sum over s >= t of K[t, s] M[t + shift, s + shift], s > t twice, for the rows t of a stripe of K; positions are
// points of grids, and what falls outside the grid of M counts 0.
template <class T>
struct ShiftedProduct {
  const T* gram_grads;  // K rows [begin, end), [end - begin, T]
  const T* gram_input;  // M from row first_row on, [., grid points]
  int64_t first_row;
  int64_t begin, end;
  int64_t out[3], grid[3], shift[3];
};
struct GramSums {
  double total, diagonal;
};

// sum over s, t of (<a_s, a_t> + one) <b_s, b_t> of a [count, n] and b [count, m], strides 1 along n and m; s < t
// twice.
template <class T>
struct GramProduct {
  const T *a, *b;
  int64_t stride_a, stride_b;
  int64_t n, m, count;
  bool one;  // every a has one more entry, 1
};

// Winograd's form of a 3 x 3 weight gradient: tiles of 4 x 4 gradients and of the 6 x 6 inputs that they meet, each
// taken to 36 points, where a product over tiles is left.
inline constexpr int64_t kWinogradTile = 4, kWinogradPoints = 36;

// image [lines][columns of points][width] -> out[point * pitch + tile * width + i]. Up to kPackSlack elements after the
// last tile of a point may be overwritten, and as many be read after the image.
template <class T>
struct WinogradTiles {
  const T* image;
  int64_t rows, columns;  // of tiles
  int64_t width;
  T* out;
  int64_t pitch;
};

// out[point][group][rows][width] = (add: +=) sum over tiles of a[point][group][tile][rows] b[point][tile][width].
template <class T>
struct WinogradProduct {
  const T *a, *b;
  int64_t pitch_a, pitch_b, pitch_out;  // of points
  int64_t group_stride, groups, width, tiles;
  bool add;
  T* out;
};

template <class T>
struct MatrixKernels {
  int64_t rows, lanes;  // panels have lanes or 2 lanes columns
  // tiles [groups][rows][width] += sum_k a[group][k][rows] b[k][width]: k walks the runs of b, and a from its start.
  void (*multiply)(const T* a, int64_t group_stride, int64_t groups, const T* b, int64_t width, int64_t step,
                   const Run* runs, int64_t n_runs, double* tiles);
  // sums [n][lanes] += sum_k a[k][lane] b[k + offsets[i]][lane]: one matrix a lane, `lanes` columns in a panel.
  void (*multiply_lanes)(const T* a, const T* b, int64_t step, const Run* runs, int64_t n_runs, const int64_t* offsets,
                         int64_t n, double* sums);
  // sum_i values_i^2; `sums` += values unless null.
  double (*sum_squares)(const double* values, int64_t n, double* sums);
  GramSums (*shifted_product)(const ShiftedProduct<T>& args);
  GramSums (*gram_product)(const GramProduct<T>& args);
  void (*winograd_grads)(const WinogradTiles<T>& args);
  void (*winograd_input)(const WinogradTiles<T>& args);
  void (*winograd_products)(const WinogradProduct<T>& args);
  // The sum of the squares of the weights of `n` pairs of feature and channel, products[point * pitch + pair].
  double (*winograd_squares)(const T* products, int64_t pitch, int64_t n);
};

// packed[k * pitch + i] = source[k * stride_k + i * stride_i], 0 for count <= i < width, in the compute type. With
// pitch == width, up to kPackSlack elements after the last may be overwritten.
using PackFn = void (*)(const void* source, int64_t stride_k, int64_t stride_i, int64_t steps, int64_t count,
                        int64_t width, int64_t pitch, void* packed);
inline constexpr int64_t kPackSlack = 16;

// |sum_t g_t xhat_t|^2 + |sum_t g_t|^2 of one sample, xhat = (values - mean) * rstd. Lanes run along the columns of
// [rows, columns], whose stride is 1 in values and grads; sums along_rows add the rows, else the columns.
struct AffineArgs {
  const void* values;  // null: no weight
  const void* grads;
  const void* mean;  // of the compute type, or null
  const void* rstd;
  bool sum_rows, bias;
  int64_t rows, columns;
  int64_t values_row, grads_row, mean_row, mean_column, rstd_row, rstd_column;  // strides
  double* sums;  // [2 (columns + kPackSlack)], only for sum_rows
};
using AffineFn = double (*)(const AffineArgs& args);

// |sum over the listed rows|^2 of rows [., columns] at `stride`.
using SegmentFn = double (*)(const void* rows, int64_t stride, const int64_t* listed, int64_t count, int64_t columns);

// Predicted losses theta . [x_i; norm] of a bank of rows: out of features [., count] at the strides, of the dtype of
// the kernel; theta [count + 1] and predictions [bank] of its compute type.
struct BankArgs {
  const void* features;
  const int64_t* rows;
  const void* theta;
  int64_t row_stride, column_stride, count;
  double norm;
  void* predictions;
};
using BankFn = void (*)(const BankArgs& args, int64_t begin, int64_t end);

// Gradients of sum_i w_i l_i in logits (adaselect_kernels/ops.py); rows of weight 0 are the caller's to leave out of
// tiles.
struct LossArgs {
  const void *row_weight, *lse;  // [rows] of the compute type
  const void* lse_rest;          // [rows], what the compute type leaves of lse, or null: nothing
  const int64_t* targets;        // [rows]
  int64_t classes;               // in all
  double label_smoothing, softcap, logit_scale, z_loss;
};
struct LossTile {
  void* logits;      // [rows, columns] before bias, scale and softcap, of the compute type: becomes their gradient
  int64_t stride;    // of its rows
  const void* bias;  // [columns] of the compute type, or null
  int64_t first_row, rows, first_class, columns;
};
struct LossKernels {
  void (*grad_tile)(const LossArgs& args, const LossTile& tile);
  // Rows [begin, end) of stored logits -> out [., classes]; logit_scale is 1.
  void (*grad_stored)(const LossArgs& args, const void* logits, int64_t row_stride, int64_t class_stride, int64_t begin,
                      int64_t end, void* out);
  void (*add_columns)(const void* block, int64_t stride, int64_t rows, int64_t columns, double* sums);
  // From the stored to the compute type and back.
  void (*widen)(const void* values, int64_t stride, int64_t n, void* out);
  void (*round_to_stored)(const void* values, int64_t n, void* out);
};

// One of these per instruction set; arrays are indexed by the Dtype of the kernel's floating point input.
struct KernelTable {
  const char* name;
  const RowStatsFn* row_stats;
  const BatchKernels* batch;
  const SelectKernels<uint32_t>* select32;  // all but float64
  const SelectKernels<uint64_t>* select64;  // float64
  const MatrixKernels<float>* matrix32;     // all but float64
  const MatrixKernels<double>* matrix64;    // float64
  const PackFn* pack;
  const AffineFn* affine;
  const SegmentFn* segment;
  const BankFn* bank;  // and uint8 after the Dtypes
  const LossKernels* loss;
  const LinearKernels<float>* linear32;   // all but float64
  const LinearKernels<double>* linear64;  // float64
};

#define ADASELECT_DECLARE_KERNELS(isa)                       \
  namespace isa {                                            \
  extern const RowStatsFn row_stats_by_dtype[4];             \
  extern const BatchKernels batch_by_dtype[4];               \
  extern const SelectKernels<uint32_t> select32_by_dtype[3]; \
  extern const SelectKernels<uint64_t> select64_kernels;     \
  extern const MatrixKernels<float> matrix32_kernels;        \
  extern const MatrixKernels<double> matrix64_kernels;       \
  extern const PackFn pack_by_dtype[4];                      \
  extern const AffineFn affine_by_dtype[4];                  \
  extern const SegmentFn segment_by_dtype[4];                \
  extern const BankFn bank_by_dtype[5];                      \
  extern const LossKernels loss_by_dtype[4];                 \
  extern const LinearKernels<float> linear32_kernels;        \
  extern const LinearKernels<double> linear64_kernels;       \
  }
#if defined(__x86_64__)
ADASELECT_DECLARE_KERNELS(avx512)
ADASELECT_DECLARE_KERNELS(avx2)
#endif
ADASELECT_DECLARE_KERNELS(baseline)
#undef ADASELECT_DECLARE_KERNELS

// The table of the best instruction set of this machine, or of the one ADASELECT_CPU_CAPABILITY names; chosen once.
const KernelTable& kernels();
// Names of the compiled sets, best first.
std::vector<std::string> compiled_instruction_sets();

}  // namespace adaselect
